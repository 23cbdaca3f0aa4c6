//! Clients are known by their keys, which stay with weir; strangers are turned away, or share with their like.

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use tokio::task::JoinHandle;

use crate::gateway::{Seen, Step, answer, completion};
use crate::world::{Answer, CHAT, World, bearer, chat, request, with};

const TWO_CLIENTS: &str = r#"
    [upstream]
    api_key = "sk-upstream"
    [clients.support-bot]
    key = "sk-support"
    [clients.batch]
    key = "sk-batch"
"#;

/// Room for a megabyte of bodies.
const SMALL_MEMORY: &str = "[queue]\nmax_bytes = \"1MiB\"\n";

/// A chat request with a body of so many kilobytes and a bit.
fn long_chat(kilobytes: usize) -> Request<Full<Bytes>> {
    chat(&format!(r#"{{"model":"gpt-4.1-mini","x":"{}"}}"#, "x".repeat(kilobytes * 1000)))
}

/// Short bodies are answered at once, long ones when the gateway goes on; models are listed to everyone.
fn script(seen: &Seen) -> Vec<Step> {
    match (seen.target(), seen.body.len()) {
        ("/v1/models", _) => answer(200, &[], "{}"),
        (_, 0..1000) => completion(),
        _ => [vec![Step::Gate], completion()].concat(),
    }
}

/// Begins to send it, until so many requests have reached the gateway.
async fn hold(world: &World, request: Request<Full<Bytes>>, seen: usize) -> JoinHandle<Answer> {
    let held = world.spawn(request);
    world.gateway.saw(seen).await;
    held
}

#[track_caller]
fn assert_over_its_share(refused: &Answer) {
    assert_eq!((refused.status.as_u16(), refused.code()), (503, "queue_full".to_owned()), "{}", refused.text());
    assert_eq!((refused.header("x-weir-refused-by"), refused.header("retry-after")), ("queue; client", "1"));
    assert!(refused.text().contains("their share of queue.max_bytes"), "{}", refused.text());
}

// Who is who.

#[tokio::test(start_paused = true)]
async fn an_unknown_key_is_answered_with_401_in_the_shape_of_its_api() {
    let world = World::new(TWO_CLIENTS, |_| completion());
    for request in [chat(CHAT), bearer(chat(CHAT), "sk-strange"), with(chat(CHAT), "x-api-key", "sk-upstream")] {
        let answer = world.send(request).await;
        assert_eq!((answer.status.as_u16(), answer.code()), (401, "invalid_api_key".to_owned()));
        assert!(answer.text().contains(r#""type":"invalid_request_error""#), "{}", answer.text());
        assert_eq!((answer.header("www-authenticate"), answer.header("x-weir-attempts")), ("Bearer", "0"));
        assert!(answer.text().contains("operator") && !answer.text().contains("sk-"), "{}", answer.text());
        assert_eq!((answer.header("x-weir-refused-by"), answer.header("retry-after")), ("", ""));
    }
    let messages = world.send(with(request(Method::POST, "/v1/messages", CHAT), "x-api-key", "sk-strange")).await;
    assert_eq!((messages.status.as_u16(), messages.code()), (401, "invalid_api_key".to_owned()));
    assert!(messages.text().contains(r#""type":"authentication_error""#), "{}", messages.text());
    let opaque = world.send(request(Method::GET, "/v1/models", "")).await;
    assert_eq!(opaque.status, 401);
    assert!(world.gateway.seen().is_empty(), "nothing of it reaches the gateway");
    assert_eq!(world.metric(r#"weir_requests_total{model="-",client="-",outcome="client_error"}"#), 5.0);
}

#[tokio::test(start_paused = true)]
async fn a_path_outside_v1_is_told_before_the_key_is_asked_for() {
    let world = World::new(TWO_CLIENTS, |_| completion());
    let answer = world.send(request(Method::POST, "/chat/completions", CHAT)).await;
    assert_eq!((answer.status.as_u16(), answer.code()), (404, "unknown_path".to_owned()));
    assert!(answer.text().contains("http://weir.test/v1"), "{}", answer.text());
}

#[tokio::test(start_paused = true)]
async fn the_body_of_an_unknown_client_is_not_read() {
    let world = World::new(TWO_CLIENTS, |_| completion());
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 1000000\r\n";
    for expecting in ["", "expect: 100-continue\r\n"] {
        let answer = world.answer_to(format!("{head}{expecting}\r\n")).await;
        assert_eq!(answer.status, 401, "at once, and without asking for the body");
    }
    assert_eq!(world.elapsed(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_gateway_sees_the_upstreams_key_and_never_a_clients() {
    let world = World::new(TWO_CLIENTS, |_| completion());
    let everywhere = with(with(bearer(chat(CHAT), "sk-batch"), "x-api-key", "sk-support"), "api-key", "sk-support");
    let twice = bearer(bearer(chat(CHAT), "sk-batch"), "sk-support");
    let lone = ["x-api-key", "api-key"].map(|name| with(chat(CHAT), name, "sk-support"));
    let bare = with(chat(CHAT), "authorization", "sk-support");
    for request in lone.into_iter().chain([everywhere, twice, bare]) {
        assert_eq!(world.send(request).await.status, 200);
    }
    for seen in world.gateway.seen() {
        assert!(!seen.head.contains("sk-support") && !seen.head.contains("sk-batch"), "{}", seen.head);
        assert_eq!(seen.header("authorization"), ["Bearer sk-upstream"]);
    }
    assert_eq!(world.metric_sum("weir_requests_total", r#"client="batch""#), 2.0, "the first key decides");
}

#[tokio::test(start_paused = true)]
async fn without_a_key_of_weirs_own_a_known_clients_key_goes_through() {
    let world = World::new("[clients.batch]\nkey = \"sk-batch\"\n", |_| completion());
    assert_eq!(world.send(bearer(chat(CHAT), "sk-batch")).await.status, 200);
    assert_eq!(world.send(bearer(chat(CHAT), "sk-strange")).await.status, 401);
    let seen = world.gateway.seen();
    assert_eq!((seen.len(), seen[0].header("authorization")), (1, vec!["Bearer sk-batch"]));
}

#[tokio::test(start_paused = true)]
async fn what_a_client_does_is_counted_under_its_name() {
    let limits = "[limits]\nrequests = { rate = \"1/min\", burst = 1 }\n[queue]\nmax_wait = \"1s\"\n";
    let world = World::new(&format!("{TWO_CLIENTS}{limits}"), |_| completion());
    assert_eq!(world.send(bearer(chat(CHAT), "sk-support")).await.status, 200);
    assert_eq!(world.send(bearer(chat(CHAT), "sk-batch")).await.status, 429);
    let of = |client: &str, rest: &str| format!(r#"{{model="gpt-4.1-mini",client="{client}",{rest}}}"#);
    let metric = |family: &str, client, rest| world.metric(&format!("{family}{}", of(client, rest)));
    assert_eq!(metric("weir_requests_total", "support-bot", r#"outcome="ok""#), 1.0);
    assert_eq!(metric("weir_tokens_total", "support-bot", r#"kind="prompt""#), 10.0);
    assert_eq!(metric("weir_requests_total", "batch", r#"outcome="refused""#), 1.0);
    assert_eq!(metric("weir_refused_total", "batch", r#"reason="requests""#), 1.0);
    assert_eq!(metric("weir_tokens_total", "batch", r#"kind="prompt""#), 0.0);
    assert_eq!(world.metric_sum("weir_requests_total", r#"client="-""#), 0.0);
}

// Who shares with whom: seen in the memory for bodies.

#[tokio::test(start_paused = true)]
async fn a_client_that_fills_its_share_of_the_memory_leaves_room_for_another() {
    let world = World::new(&format!("{TWO_CLIENTS}{SMALL_MEMORY}"), script);
    let greedy = hold(&world, bearer(long_chat(800), "sk-batch"), 1).await;
    assert_over_its_share(&world.send(bearer(long_chat(200), "sk-batch")).await);
    let other = hold(&world, bearer(long_chat(100), "sk-support"), 2).await;
    world.gateway.go_on();
    for held in [greedy, other] {
        assert_eq!(held.await.expect("answered").status, 200);
    }
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn where_weir_lends_its_key_clients_are_told_apart_by_their_address() {
    let world = World::new(&format!("[upstream]\napi_key = \"sk-upstream\"\n{SMALL_MEMORY}"), script);
    let (one, other) = (world.seen_from("2001:db8::1"), world.seen_from("10.0.0.1"));
    let _greedy = hold(&one, bearer(long_chat(800), "sk-1"), 1).await;
    assert_over_its_share(&one.send(bearer(long_chat(200), "sk-2")).await);
    assert_over_its_share(&world.seen_from("2001:db8::2").send(long_chat(200)).await);
    let _other = hold(&other, bearer(long_chat(100), "sk-1"), 2).await;
}

#[tokio::test(start_paused = true)]
async fn where_keys_pass_through_one_that_the_gateway_has_served_is_a_tenant() {
    let world = World::new(SMALL_MEMORY, script);
    for key in ["sk-1", "sk-2"] {
        assert_eq!(world.send(bearer(chat(CHAT), key)).await.status, 200);
    }
    let _greedy = hold(&world, bearer(long_chat(800), "sk-1"), 3).await;
    assert_over_its_share(&world.send(bearer(long_chat(200), "sk-1")).await);
    let _other = hold(&world, bearer(long_chat(100), "sk-2"), 4).await;
}

#[tokio::test(start_paused = true)]
async fn keys_that_the_gateway_has_not_served_share_one_tenant_however_many_there_are() {
    let world = World::new(SMALL_MEMORY, script);
    for key in ["sk-1", "sk-2"] {
        let listed = bearer(request(Method::GET, "/v1/models", ""), key);
        assert_eq!(world.send(listed).await.status, 200, "which proves nothing: models are listed to everyone");
    }
    let _greedy = hold(&world, bearer(long_chat(800), "sk-1"), 3).await;
    assert_over_its_share(&world.send(bearer(long_chat(200), "sk-2")).await);
    assert_over_its_share(&world.send(long_chat(200)).await);
}
