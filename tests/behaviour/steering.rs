//! Nothing that a client writes chooses where its request goes, which key it goes with, or whose share it is served from.

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;

use crate::gateway::{Seen, Step, completion};
use crate::world::{CHAT, World, bearer, chat, collect, over_http2, request, with};

const CONFIG: &str = r#"
    [upstream]
    base_url = "http://gateway.test:8000/v1"
    api_key = "sk-upstream"
    [clients.mine]
    key = "sk-mine"
    [clients.another]
    key = "sk-another"
    requests = { rate = "1/min", burst = 1 }
"#;

/// What a client might try, beside a key that is its own: other proxies, gateways and frameworks believe these.
const TRIED: [(&str, &str); 62] = [
    // Another address.
    ("x-forwarded-host", "evil.test"),
    ("x-forwarded-server", "evil.test"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-port", "1"),
    ("x-forwarded-prefix", "/admin"),
    ("x-forwarded-uri", "/admin"),
    ("x-host", "evil.test"),
    ("x-original-host", "evil.test"),
    ("x-original-url", "/v1/models"),
    ("x-original-uri", "/v1/models"),
    ("x-rewrite-url", "http://evil.test/v1"),
    ("x-proxy-url", "http://evil.test/v1"),
    ("x-accel-redirect", "/admin"),
    ("x-upstream", "http://evil.test/v1"),
    ("x-base-url", "http://evil.test/v1"),
    ("x-backend", "evil.test"),
    ("destination", "http://evil.test/v1"),
    ("x-envoy-original-dst-host", "evil.test:80"),
    ("x-portkey-custom-host", "http://evil.test/v1"),
    ("helicone-openai-api-base", "http://evil.test/v1"),
    ("helicone-target-url", "http://evil.test"),
    ("litellm-api-base", "http://evil.test/v1"),
    ("x-weir-upstream", "http://evil.test/v1"),
    // Another method.
    ("x-http-method-override", "DELETE"),
    ("x-http-method", "DELETE"),
    ("x-method-override", "DELETE"),
    // Another key.
    ("authorization", "Bearer sk-another"),
    ("authorization", "Basic c2stYW5vdGhlcg=="),
    ("x-api-key", "sk-another"),
    ("api-key", "sk-another"),
    ("x-goog-api-key", "sk-evil"),
    ("x-auth-token", "sk-evil"),
    ("openai-api-key", "sk-evil"),
    ("helicone-auth", "Bearer sk-evil"),
    ("x-portkey-api-key", "sk-evil"),
    ("x-weir-key", "sk-evil"),
    ("proxy-authorization", "Bearer sk-another"),
    ("x-forwarded-authorization", "Bearer sk-evil"),
    ("x-original-authorization", "Bearer sk-evil"),
    ("www-authenticate", "Bearer"),
    ("cookie", "authorization=sk-evil; session=another"),
    ("connection", "authorization"),
    ("connection", "host, x-api-key, api-key, via"),
    ("proxy-connection", "authorization"),
    // Another client.
    ("x-forwarded-for", "10.9.9.9"),
    ("forwarded", "for=10.9.9.9;host=evil.test;proto=https"),
    ("x-real-ip", "10.9.9.9"),
    ("x-client-ip", "10.9.9.9"),
    ("true-client-ip", "10.9.9.9"),
    ("cf-connecting-ip", "10.9.9.9"),
    ("x-remote-user", "another"),
    ("x-forwarded-user", "another"),
    ("x-consumer-username", "another"),
    ("x-user-id", "another"),
    ("x-client", "another"),
    ("x-weir-client", "another"),
    ("x-weir-refused-by", "requests; client"),
    ("x-weir-attempts", "9"),
    ("x-stainless-retry-count", "1"),
    ("x-stainless-async", "another"),
    ("from", "another@weir.test"),
    ("user-agent", "another"),
];

fn world(config: &str) -> World {
    World::new(config, |_: &Seen| completion())
}

/// Of every request: it goes to the gateway of the configuration with the upstream's key, as the chat call that it is.
#[track_caller]
fn assert_not_steered(world: &World, requests: usize) {
    let seen = world.gateway.seen();
    assert_eq!(seen.len(), requests);
    for seen in seen {
        assert!(seen.head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{}", seen.head);
        assert_eq!(seen.header("host"), ["gateway.test:8000"], "{}", seen.head);
        assert_eq!(seen.header("authorization"), ["Bearer sk-upstream"], "{}", seen.head);
        for name in ["x-api-key", "api-key"] {
            assert!(seen.header(name).iter().all(|key| *key == "sk-upstream"), "{}", seen.head);
        }
        assert!(!seen.head.contains("sk-mine") && !seen.head.contains("sk-another"), "{}", seen.head);
    }
    for address in world.gateway.asked_for() {
        assert_eq!(address, "http://gateway.test:8000/");
    }
    let of = |client: &str| world.metric_sum("weir_requests_total", &format!("client=\"{client}\""));
    assert_eq!((of("mine"), of("another"), of("-")), (requests as f64, 0.0, 0.0), "whose requests they are");
    assert_eq!(world.remaining(("client", "another", "requests")), 1.0, "its quota is untouched");
}

#[tokio::test(start_paused = true)]
async fn no_header_chooses_an_upstream_a_key_or_another_clients_share() {
    let world = world(CONFIG);
    for (name, value) in TRIED {
        let answer = world.send(with(bearer(chat(CHAT), "sk-mine"), name, value)).await;
        assert_eq!(answer.status, 200, "{name}: {value}: {}", answer.text());
    }
    let all = TRIED.iter().fold(bearer(chat(CHAT), "sk-mine"), |request, (name, value)| with(request, name, value));
    assert_eq!(world.send(all).await.status, 200);
    assert_not_steered(&world, TRIED.len() + 1);
}

#[tokio::test(start_paused = true)]
async fn no_header_does_so_over_http2_either() {
    let world = world(CONFIG);
    let mut client = world.http2().await;
    // Of one connection only, which HTTP/2 has no place for.
    let tried = TRIED.iter().filter(|(name, _)| !matches!(*name, "connection" | "proxy-connection"));
    let mut requests = 0;
    for (name, value) in tried {
        let sent = client.send_request(over_http2(with(bearer(chat(CHAT), "sk-mine"), name, value))).await;
        let answer = collect(sent.expect("answered")).await;
        assert_eq!(answer.status, 200, "{name}: {value}: {}", answer.text());
        requests += 1;
    }
    assert_not_steered(&world, requests);
}

#[tokio::test(start_paused = true)]
async fn no_request_line_and_no_host_does_so() {
    let world = world(CONFIG);
    let targets = [
        ("/v1/chat/completions", "evil.test"),
        ("http://evil.test/v1/chat/completions", "weir.test"),
        ("http://evil.test:8000/v1/chat/completions", "evil.test:8000"),
        ("https://evil.test/v1/chat/completions", "weir.test"),
    ];
    for (target, host) in targets {
        let length = CHAT.len();
        let head = format!("POST {target} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer sk-mine\r\n");
        let answer = world.answer_to(format!("{head}content-length: {length}\r\n\r\n{CHAT}")).await;
        assert_eq!(answer.status, 200, "{target} {host}: {}", answer.text());
    }
    assert_not_steered(&world, targets.len());
    for target in
        ["//evil.test/v1/chat/completions", "/v1/../admin", "/v1@evil.test/x", "/v1:80/x", "http://evil.test/admin"]
    {
        let head = format!("POST {target} HTTP/1.1\r\nhost: weir.test\r\nauthorization: Bearer sk-mine\r\n");
        let answer = world.answer_to(format!("{head}content-length: 0\r\n\r\n")).await;
        assert!(matches!(answer.status.as_u16(), 400 | 404), "{target}: {}", answer.status);
    }
    assert_eq!(world.gateway.seen().len(), targets.len(), "nothing of those reaches the gateway");
}

/// Keys of others count in the first of the three places only: behind a wrong one a right one does not help.
#[tokio::test(start_paused = true)]
async fn a_wrong_key_is_not_mended_by_a_right_one_behind_it() {
    let world = world(CONFIG);
    for (first, value) in
        [("authorization", "Bearer sk-wrong"), ("authorization", "Basic c2stbWluZQ=="), ("x-api-key", "sk-wrong")]
    {
        let answer = world.send(with(with(chat(CHAT), first, value), "api-key", "sk-mine")).await;
        assert_eq!(answer.status, 401, "{first}: {value}");
    }
    for name in ["cookie", "proxy-authorization", "x-weir-key", "openai-api-key", "x-forwarded-authorization"] {
        assert_eq!(world.send(with(chat(CHAT), name, "sk-mine")).await.status, 401, "{name}");
    }
    let in_its_target = request(Method::POST, "/v1/chat/completions?api-key=sk-mine&key=sk-mine", CHAT);
    assert_eq!(world.send(in_its_target).await.status, 401);
    assert!(world.gateway.seen().is_empty());
}

/// Seen in the memory for bodies, of which each has a share.
#[tokio::test(start_paused = true)]
async fn no_header_makes_another_client_of_an_address() {
    let config = "[upstream]\napi_key = \"sk-upstream\"\n[queue]\nmax_bytes = \"1MiB\"\n";
    let script = |_: &Seen| [vec![Step::Gate], completion()].concat();
    let world = World::new(config, script).seen_from("10.0.0.1");
    let _greedy = world.spawn(long_chat(800));
    world.gateway.saw(1).await;
    for (name, value) in TRIED {
        let refused = world.send(with(long_chat(200), name, value)).await;
        assert_eq!((refused.status.as_u16(), refused.code()), (503, "queue_full".to_owned()), "{name}: {value}");
    }
    let _other = world.seen_from("10.0.0.2").spawn(long_chat(200));
    world.gateway.saw(2).await;
}

/// A chat request with a body of so many kilobytes and a bit.
fn long_chat(kilobytes: usize) -> Request<Full<Bytes>> {
    chat(&format!(r#"{{"model":"gpt-4.1-mini","x":"{}"}}"#, "x".repeat(kilobytes * 1000)))
}
