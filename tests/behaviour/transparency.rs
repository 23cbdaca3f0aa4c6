//! What passes, passes as it came; what concerns one connection only stays behind; what weir adds, it adds and no more.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::gateway::{Seen, Step, answer, completion, error, event, stream, stream_head};
use crate::world::{Answer, CHAT, STREAM, STREAM_WITH_USAGE, World, chat, collect, over_http2, request, with};

fn echo(_: &Seen) -> Vec<Step> {
    answer(200, &[("content-type", "application/json")], "{}")
}

fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nhost: weir.test\r\n\r\n")
}

fn send(text: &str) -> Vec<Step> {
    vec![Step::Send(text.as_bytes().to_vec())]
}

fn error_of(answer: &Answer) -> serde_json::Value {
    serde_json::from_slice(&answer.body).expect("an error is JSON")
}

#[tokio::test(start_paused = true)]
async fn target_and_query_go_on_byte_for_byte() {
    let world = World::new("", echo);
    let targets = [
        "/v1/files/a%2Fb/c%2fd",
        "/v1//files///x/",
        "/v1/files/./x/../y",
        "/v1/models?",
        "/v1/models?after=a%20b+c&after=&x=/../?y",
        "/v1/files/;a=1,b!$'()*~@:=&",
        "/v1/files/{x}|[y]^",
        "/v1/files/100%",
        "/v1/files/größe?q=größe",
        "/v1/",
    ];
    for (number, target) in targets.into_iter().enumerate() {
        assert_eq!(world.answer_to(get(target)).await.status, 200, "{target}");
        assert_eq!(world.gateway.seen()[number].target(), target);
    }
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_base_url_with_a_path_of_its_own_stands_before_the_target() {
    let world = World::new("[upstream]\nbase_url = \"http://gateway.test:8000/api/openai/\"\n", echo);
    world.answer_to(get("/v1/models?a=%2F")).await;
    let seen = &world.gateway.seen()[0];
    assert_eq!((seen.target(), seen.header("host")), ("/api/openai/models?a=%2F", vec!["gateway.test:8000"]));
}

#[tokio::test(start_paused = true)]
async fn an_absolute_target_goes_to_the_gateway_all_the_same() {
    let world = World::new("", echo);
    let text = "GET http://elsewhere.test:1/v1/models?a=1 HTTP/1.1\r\nhost: weir.test\r\n\r\n";
    assert_eq!(world.answer_to(text).await.status, 200);
    let seen = &world.gateway.seen()[0];
    assert_eq!((seen.target(), seen.header("host")), ("/v1/models?a=1", vec!["api.holysheep.ai"]));
}

#[tokio::test(start_paused = true)]
async fn nothing_outside_v1_is_reached_and_the_answer_names_the_base_url() {
    let world = World::new("", echo);
    for target in [
        "/",
        "/v1",
        "/admin",
        "/v2/models",
        "/v1/../admin",
        "/v1/%2e%2e/admin",
        "/v1/..%2fadmin",
        "/v1/models/../../admin",
        "http://weir.test/admin",
    ] {
        let answer = world.answer_to(get(target)).await;
        assert_eq!((answer.status.as_u16(), answer.code()), (404, "unknown_path".to_owned()), "{target}");
        assert!(answer.text().contains("http://weir.test/v1"), "{}", answer.text());
    }
    for text in
        ["OPTIONS * HTTP/1.1\r\nhost: weir.test\r\n\r\n", "CONNECT a.test:443 HTTP/1.1\r\nhost: a.test:443\r\n\r\n"]
    {
        assert_eq!(world.answer_to(text).await.status, 404);
    }
    assert_eq!(world.gateway.seen().len(), 0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_is_never_opened() {
    let world = World::new("", |_| send("HTTP/1.1 200 OK\r\n\r\n"));
    let mut client = world.raw();
    client.write("CONNECT /v1/models HTTP/1.1\r\nhost: weir.test\r\n\r\n").await;
    let status = client.answer().await.map(|answer| answer.status.as_u16());
    assert!(matches!(status, Some(400 | 404 | 405)), "{status:?}");
    assert_eq!(world.gateway.seen().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn unknown_headers_fields_and_bodies_pass_untouched_both_ways() {
    let body = r#"{ "model" : "gpt-4.1-mini","messages":[ ],"x_unknown":{"a":[1,2.50,1e3]},"x":"\u0065","x":1 }"#;
    let back = "{ \"choices\" : [ ],\n\"x_unknown\":1e3 }\r\n";
    let script =
        |_: &_| answer(200, &[("content-type", "application/json"), ("X-Odd", "a  b"), ("openai-model", "m")], back);
    let world = World::new("", script);
    let sent = with(with(with(chat(body), "x-odd", "\"q\" ; é=1"), "x-list", "a"), "x-list", "b, c");
    let answer = world.send(sent).await;
    let seen = &world.gateway.seen()[0];
    assert_eq!(seen.body, body.as_bytes());
    assert_eq!(seen.header("x-odd"), ["\"q\" ; é=1"]);
    assert_eq!(seen.header("x-list"), ["a", "b, c"]);
    assert_eq!(seen.header("content-type"), ["application/json"]);
    assert_eq!(seen.header("content-length"), [body.len().to_string()]);
    assert_eq!(answer.text(), back);
    assert_eq!((answer.header("x-odd"), answer.header("openai-model")), ("a  b", "m"));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn hop_by_hop_headers_and_those_that_connection_names_stay_behind_on_the_way_out() {
    let world = World::new("", echo);
    let answer = world
        .answer_to(
            "GET /v1/models HTTP/1.1\r\nhost: weir.test\r\nconnection: X-Secret, keep-alive\r\nconnection: x-other\r\n\
             x-secret: 1\r\nx-other: 1\r\nkeep-alive: timeout=5\r\nte: trailers\r\nupgrade: websocket\r\n\
             proxy-connection: close\r\nproxy-authorization: Basic x\r\nx-kept: 1\r\n\r\n",
        )
        .await;
    assert_eq!(answer.status, 200);
    let seen = &world.gateway.seen()[0];
    let mut names: Vec<&str> = seen.head.lines().filter_map(|line| Some(line.split_once(": ")?.0)).collect();
    names.sort_unstable();
    assert_eq!(names, ["host", "via", "x-kept"]);
}

#[tokio::test(start_paused = true)]
async fn hop_by_hop_headers_and_those_that_connection_names_stay_behind_on_the_way_back() {
    let hops = [
        ("connection", "X-Secret"),
        ("x-secret", "1"),
        ("keep-alive", "timeout=5"),
        ("proxy-authenticate", "Basic"),
        ("proxy-connection", "keep-alive"),
        ("te", "trailers"),
        ("upgrade", "h2c"),
        ("x-kept", "1"),
    ];
    let world = World::new("", move |_| answer(200, &hops, "{}"));
    let answer = world.chat().await;
    for (name, _) in &hops[..7] {
        assert!(!answer.headers.contains_key(*name), "{name}");
    }
    assert_eq!(answer.header("x-kept"), "1");
}

#[tokio::test(start_paused = true)]
async fn separate_set_cookie_lines_stay_separate() {
    let cookies = [("set-cookie", "a=1; Path=/"), ("set-cookie", "b=2, c")];
    let world = World::new("", move |_| answer(200, &cookies, "{}"));
    let answer = world.chat().await;
    let lines: Vec<_> = answer.headers.get_all("set-cookie").iter().collect();
    assert_eq!(lines, ["a=1; Path=/", "b=2, c"]);
}

#[tokio::test(start_paused = true)]
async fn host_is_the_upstreams_and_via_is_added_to_those_before() {
    let world = World::new("", echo);
    world.send(with(chat(CHAT), "via", "1.1 cdn")).await;
    let seen = &world.gateway.seen()[0];
    assert_eq!(seen.header("host"), ["api.holysheep.ai"]);
    let via = seen.header("via");
    assert_eq!(via[0], "1.1 cdn");
    assert!(via.len() == 2 && via[1].starts_with("1.1 weir-"), "{via:?}");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_back_is_refused_with_508() {
    let world = World::new("", echo);
    world.chat().await;
    let via = world.gateway.seen()[0].header("via").join(", ");
    let answer = world.send(with(chat(CHAT), "via", &format!("1.1 cdn, {via}"))).await;
    assert_eq!((answer.status.as_u16(), answer.code()), (508, "loop_detected".to_owned()));
    assert_eq!(world.gateway.seen().len(), 1);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn the_upstreams_key_stands_wherever_the_client_put_its_own() {
    let world = World::new("[upstream]\napi_key = \"sk-test\"\n", echo);
    let keys = with(with(chat(CHAT), "authorization", "Bearer mine"), "x-api-key", "mine");
    world.send(with(keys, "api-key", "mine")).await;
    world.chat().await;
    let seen = world.gateway.seen();
    assert!(!seen[0].head.contains("mine"), "{}", seen[0].head);
    assert_eq!(seen[0].header("authorization"), ["Bearer sk-test"]);
    assert_eq!((seen[0].header("x-api-key"), seen[0].header("api-key")), (vec!["sk-test"], vec!["sk-test"]));
    assert_eq!(seen[1].header("authorization"), ["Bearer sk-test"]);
    assert!(seen[1].header("x-api-key").is_empty(), "the key goes where it is needed and no further");
}

#[tokio::test(start_paused = true)]
async fn without_a_key_of_its_own_weir_passes_the_clients() {
    let world = World::new("", echo);
    world.send(with(with(chat(CHAT), "authorization", "Bearer mine"), "x-api-key", "mine too")).await;
    let seen = &world.gateway.seen()[0];
    assert_eq!((seen.header("authorization"), seen.header("x-api-key")), (vec!["Bearer mine"], vec!["mine too"]));
}

#[tokio::test(start_paused = true)]
async fn metered_calls_ask_for_no_encoding_and_opaque_ones_as_the_client_does() {
    let world = World::new("", echo);
    let encoding = |request| with(request, "accept-encoding", "gzip, br");
    world.send(encoding(chat(CHAT))).await;
    world.send(encoding(request(Method::GET, "/v1/models", ""))).await;
    world.send(encoding(request(Method::GET, "/v1/chat/completions", ""))).await;
    world.send(request(Method::GET, "/v1/models", "")).await;
    let asked: Vec<_> = world.gateway.seen().iter().map(|seen| seen.header("accept-encoding").join("|")).collect();
    assert_eq!(asked, ["identity", "gzip, br", "gzip, br", ""]);
}

#[tokio::test(start_paused = true)]
async fn an_encoding_that_comes_all_the_same_is_passed_on() {
    let gzip = "\u{1f}bytes";
    let world = World::new("", move |_| answer(200, &[("content-encoding", "gzip")], gzip));
    let answer = world.chat().await;
    assert_eq!((answer.text().as_str(), answer.header("content-encoding")), (gzip, "gzip"));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_head_answer_keeps_its_length_and_the_connection_its_use() {
    let script = |seen: &Seen| match seen.number {
        0 => send("HTTP/1.1 200 OK\r\ncontent-length: 1234\r\nx-kept: 1\r\n\r\n"),
        _ => completion(),
    };
    let world = World::new("", script);
    let answer = world.send(request(Method::HEAD, "/v1/files/a/content", "")).await;
    assert_eq!((answer.status.as_u16(), answer.header("content-length")), (200, "1234"));
    assert_eq!((answer.body.len(), answer.header("x-kept")), (0, "1"));
    assert_eq!(world.chat().await.status, 200);
    assert_eq!(world.gateway.connections(), 1);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn answers_without_a_body_end_at_their_head() {
    for head in [
        "204 No Content\r\n",
        "304 Not Modified\r\netag: \"a\"\r\n",
        "304 Not Modified\r\netag: \"a\"\r\ncontent-length: 9\r\n",
    ] {
        let world = World::new("", move |_| send(&format!("HTTP/1.1 {head}\r\n")));
        let mut client = world.raw();
        for _ in 0..2 {
            client.write(get("/v1/files/a")).await;
            let answer = client.answer().await.expect("an answer");
            assert_eq!(answer.status.as_str(), &head[..3]);
            assert_eq!((answer.body.len(), answer.header("transfer-encoding")), (0, ""));
        }
        assert_eq!(world.gateway.connections(), 1);
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_without_a_body_of_its_own_is_the_gateways_still() {
    for status in [400, 414, 431] {
        let world = World::new("", move |_| answer(status, &[("x-kept", "yes")], ""));
        for method in [Method::GET, Method::HEAD, Method::POST] {
            let answer = world.send(request(method, "/v1/files/a", "")).await;
            assert_eq!((answer.status.as_u16(), answer.header("x-kept"), answer.text().as_str()), (status, "yes", ""));
        }
        let world = World::new("", move |_| answer(status, &[("x-kept", "yes")], "it is wrong\r\n\r\n"));
        assert_eq!(world.chat().await.text(), "it is wrong\r\n\r\n");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn an_http_1_0_client_is_answered_in_its_own_version() {
    let script = |seen: &Seen| if seen.number == 0 { completion() } else { stream(&["one", "two"]) };
    let world = World::new("", script);
    let post =
        |body: &str| format!("POST /v1/chat/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut client = world.raw();
    client.write(post(CHAT)).await;
    let text = client.rest().await;
    assert!(text.starts_with("HTTP/1.0 200 ") && text.contains("fine"), "{text}");
    // What has no length ends with the connection.
    let mut client = world.raw();
    client.write(post(STREAM)).await;
    let text = client.rest().await;
    assert!(!text.contains("transfer-encoding") && text.ends_with("data: [DONE]\n\n"), "{text}");
    assert!(world.gateway.seen().iter().all(|seen| seen.head.contains(" HTTP/1.1\r\n")));
    assert!(world.gateway.seen()[0].header("via")[0].starts_with("1.0 weir-"), "{}", world.gateway.seen()[0].head);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_http2_client_gets_what_an_http1_client_gets() {
    let script = |seen: &Seen| match seen.target() {
        "/v1/models?a=%2F" => answer(200, &[("set-cookie", "a"), ("set-cookie", "b"), ("keep-alive", "x")], "[]"),
        _ if seen.body == STREAM_WITH_USAGE.as_bytes() => stream(&["one", "two"]),
        _ => completion(),
    };
    let world = World::new("", script);
    let mut sender = world.http2().await;
    let h2 = |method: Method, target: &str, body: &str| {
        let builder = Request::builder().method(method).uri(format!("http://weir.test{target}"));
        builder.body(Full::from(Bytes::from(body.to_owned()))).expect("a request")
    };
    let models = with(with(h2(Method::GET, "/v1/models?a=%2F", ""), "cookie", "a=1"), "cookie", "b=2");
    let plain = collect(sender.send_request(models).await.expect("answered")).await;
    assert_eq!((plain.status.as_u16(), plain.text().as_str(), plain.header("keep-alive")), (200, "[]", ""));
    assert_eq!(plain.headers.get_all("set-cookie").iter().count(), 2);
    assert!(!plain.header("x-request-id").is_empty());
    let response = sender.send_request(h2(Method::POST, "/v1/chat/completions", STREAM_WITH_USAGE)).await;
    let streamed = collect(response.expect("answered")).await;
    assert!(streamed.text().contains("two") && streamed.text().ends_with("[DONE]\n\n") && !streamed.broken);
    let chat =
        collect(sender.send_request(h2(Method::POST, "/v1/chat/completions", CHAT)).await.expect("answered")).await;
    assert!(chat.text().contains("fine"));
    let unknown = collect(sender.send_request(h2(Method::GET, "/v1/../admin", "")).await.expect("answered")).await;
    assert_eq!((unknown.status.as_u16(), unknown.code()), (404, "unknown_path".to_owned()));
    assert!(unknown.text().contains("http://weir.test/v1"), "{}", unknown.text());
    let seen = &world.gateway.seen();
    assert_eq!((seen[0].header("cookie"), seen[0].header("host")), (vec!["a=1; b=2"], vec!["api.holysheep.ai"]));
    assert!(seen[0].header("via")[0].starts_with("2.0 weir-"));
    assert_eq!((seen[1].body.as_slice(), seen[2].body.as_slice()), (STREAM_WITH_USAGE.as_bytes(), CHAT.as_bytes()));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn events_reach_the_client_one_by_one() {
    let world =
        World::new("", |_| [vec![stream_head(), event("one"), Step::Gate], stream(&["two"])[1..].to_vec()].concat());
    let mut response = world.begin(chat(STREAM)).await;
    let first = response.body_mut().frame().await.expect("a frame").expect("unbroken").into_data().expect("data");
    assert!(first.ends_with(b"\n\n") && world.elapsed() == 0);
    world.gateway.go_on();
    assert!(collect(response).await.text().contains("two"));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn weir_names_and_times_the_answer_where_the_gateway_did_not() {
    let world = World::new("", |_| [vec![Step::Wait(Duration::from_millis(250))], completion()].concat());
    let answer = world.chat().await;
    assert!(answer.header("x-request-id").starts_with("weir-"));
    assert_eq!((answer.header("x-response-time"), answer.header("x-weir-attempts")), ("250", "1"));
    assert_eq!(answer.header("server-timing"), "queue;dur=0.0, upstream;dur=250.0");
    let named = world.send(with(chat(CHAT), "x-request-id", "mine")).await;
    assert_eq!(named.header("x-request-id"), "mine", "the client's own name for it");
}

#[tokio::test(start_paused = true)]
async fn the_gateways_own_name_and_times_stand() {
    let own =
        [("x-request-id", "req_1"), ("x-response-time", "7"), ("x-weir-attempts", "3"), ("server-timing", "db;dur=5")];
    let world = World::new("", move |_| answer(200, &own, "{}"));
    let answer = world.send(with(chat(CHAT), "x-request-id", "mine")).await;
    assert_eq!((answer.header("x-request-id"), answer.header("x-response-time")), ("req_1", "7"));
    assert_eq!(answer.headers.get_all("x-weir-attempts").iter().count(), 1);
    let timings: Vec<_> = answer.headers.get_all("server-timing").iter().collect();
    assert_eq!(timings, ["db;dur=5", "queue;dur=0.0, upstream;dur=0.0"]);
}

#[tokio::test(start_paused = true)]
async fn a_length_beside_chunks_is_dropped_and_the_body_is_whole() {
    for fields in ["transfer-encoding: chunked\r\ncontent-length: 3", "content-length: 3\r\ntransfer-encoding: chunked"]
    {
        let world =
            World::new("", move |_| send(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n5\r\nwhole\r\n0\r\n\r\n")));
        let answer = world.chat().await;
        assert_eq!((answer.text().as_str(), answer.header("content-length"), answer.broken), ("whole", "", false));
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_length_or_chunks_ends_with_its_connection() {
    let world = World::new("", |_| vec![Step::Send(b"HTTP/1.1 200 OK\r\n\r\nall of it".to_vec()), Step::Close]);
    let answer = world.chat().await;
    assert_eq!((answer.text().as_str(), answer.broken), ("all of it", false));
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_cut_short_is_cut_visibly() {
    for text in [
        "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        let world = World::new("", move |_| [send(text), vec![Step::Close]].concat());
        let answer = world.chat().await;
        assert!(answer.broken && answer.text() == "half", "{answer:?}");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn a_protocol_that_nobody_asked_for_is_refused() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhello";
    let world = World::new("", move |_| send(switch));
    let upgrade = with(with(request(Method::GET, "/v1/realtime", ""), "connection", "upgrade"), "upgrade", "websocket");
    let answer = world.send(upgrade).await;
    assert_eq!((answer.status.as_u16(), answer.code()), (502, "upstream_invalid_response".to_owned()));
    assert!(world.gateway.seen()[0].header("upgrade").is_empty());
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn informational_answers_are_not_the_answer() {
    let hints = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n";
    let world = World::new("", move |_| [send(hints), vec![Step::Wait(Duration::from_secs(1))], completion()].concat());
    let answer = world.chat().await;
    assert!(answer.status == 200 && answer.header("link").is_empty() && answer.text().contains("fine"));
    assert_eq!(world.gateway.seen().len(), 1);
    world.assert_nothing_held();
}

/// More than is read before it is sent on, and no two places alike.
fn big_body() -> String {
    (0..400_000).map(|number: u32| format!("{number:07}")).collect()
}

fn upload_head(framing: &str) -> String {
    let kind = "multipart/form-data; boundary=x";
    format!("POST /v1/audio/transcriptions HTTP/1.1\r\nhost: weir.test\r\ncontent-type: {kind}\r\n{framing}\r\n\r\n")
}

#[tokio::test(start_paused = true)]
async fn a_large_upload_with_a_length_streams_through() {
    let world = World::new("", echo);
    let body = big_body();
    let mut client = world.raw();
    client.write(upload_head(&format!("content-length: {}", body.len()))).await;
    client.write(&body[..body.len() / 2]).await;
    // Half of it is with the gateway before the other half is there.
    world.gateway.has_received(body.len() / 2).await;
    assert!(world.proxy.gauges().buffered_bytes <= 1 << 20);
    client.write(&body[body.len() / 2..]).await;
    assert_eq!(client.answer().await.expect("an answer").status, 200);
    let seen = &world.gateway.seen()[0];
    assert!(seen.body == body.as_bytes(), "the body arrived changed");
    assert_eq!(seen.header("content-length"), [body.len().to_string()]);
    assert_eq!(seen.header("content-type"), ["multipart/form-data; boundary=x"]);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_large_upload_in_chunks_streams_through() {
    let world = World::new("", echo);
    let body = big_body();
    let mut client = world.raw();
    client.write(upload_head("transfer-encoding: chunked")).await;
    let mut pieces = body.as_bytes().chunks(100_000);
    for piece in pieces.by_ref().take(20) {
        client.write([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()).await;
    }
    world.gateway.has_received(2_000_000).await;
    assert!(world.proxy.gauges().buffered_bytes <= (1 << 20) + 100_000);
    for piece in pieces {
        client.write([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()).await;
    }
    client.write("0\r\n\r\n").await;
    assert_eq!(client.answer().await.expect("an answer").status, 200);
    let seen = &world.gateway.seen()[0];
    assert!(seen.body == body.as_bytes(), "the body arrived changed");
    assert_eq!((seen.header("transfer-encoding"), seen.header("content-length").len()), (vec!["chunked"], 0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_small_upload_is_sent_again_and_a_large_one_is_not() {
    let script = |seen: &Seen| if seen.number == 0 { error(503, &[]) } else { echo(seen) };
    let upload = |body: &str| request(Method::POST, "/v1/audio/transcriptions", body);
    let small = &big_body()[..1 << 20];
    let world = World::new("", script);
    let answer = world.send(upload(small)).await;
    assert_eq!((answer.status.as_u16(), answer.header("x-weir-attempts")), (200, "2"));
    assert!(world.gateway.seen().iter().all(|seen| seen.body == small.as_bytes()));
    world.assert_nothing_held();
    let world = World::new("", script);
    let answer = world.send(upload(&big_body()[..(1 << 20) + 1])).await;
    assert_eq!((answer.status.as_u16(), answer.code()), (503, "upstream_code".to_owned()));
    assert_eq!(answer.header("x-should-retry"), "", "weir has not tried in the client's stead");
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_early_no_reaches_a_client_that_is_still_uploading() {
    let world = World::new("", |_| [error(413, &[]), vec![Step::Close]].concat());
    world.gateway.answer_early();
    let mut client = world.raw();
    client.write(upload_head("content-length: 3000000")).await;
    client.write("x".repeat(100_000)).await;
    let answer = client.answer().await.expect("an answer");
    assert_eq!((answer.status.as_u16(), answer.code()), (413, "upstream_code".to_owned()));
    // What is left of the body is never taken for a request.
    client.write(get("/v1/models")).await;
    assert_eq!(client.answer().await.map(|answer| answer.status), None);
    assert_eq!(world.gateway.seen().len(), 1);
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_post_without_a_body_arrives_as_one() {
    let world = World::new("", echo);
    world.answer_to("POST /v1/batches/b/cancel HTTP/1.1\r\nhost: weir.test\r\n\r\n").await;
    world
        .answer_to(
            "POST /v1/batches/b/cancel HTTP/1.1\r\nhost: weir.test\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        )
        .await;
    world.answer_to("DELETE /v1/files/a HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 0\r\n\r\n").await;
    for seen in world.gateway.seen() {
        assert!(seen.body.is_empty() && seen.header("transfer-encoding").is_empty(), "{}", seen.head);
    }
    assert_eq!(world.gateway.seen()[0].header("content-length"), ["0"]);
}

#[tokio::test(start_paused = true)]
async fn errors_take_the_shape_of_the_api_that_was_called() {
    let world = World::new("", echo);
    let twice = r#"{"model":"a","model":"b"}"#;
    let messages = error_of(&world.send(request(Method::POST, "/v1/messages", twice)).await);
    assert_eq!((&messages["type"], &messages["error"]["type"]), (&"error".into(), &"invalid_request_error".into()));
    assert!(messages["error"]["message"].is_string());
    for path in ["/v1/responses", "/v1/chat/completions", "/v1/embeddings"] {
        let openai = error_of(&world.send(request(Method::POST, path, twice)).await);
        let (kind, code) = (&openai["error"]["type"], &openai["error"]["code"]);
        assert_eq!((kind, code), (&"invalid_request_error".into(), &"duplicate_key".into()));
        assert!(openai["error"]["param"].is_null() && openai["error"]["message"].is_string());
    }
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_ends_with_an_error_event_in_the_shape_of_its_api() {
    let world = World::new("", |_| vec![stream_head(), event("one"), Step::Close]);
    for (path, expected) in [
        ("/v1/chat/completions", "\n\ndata: {\"error\":{"),
        ("/v1/messages", "\n\nevent: error\ndata: {"),
        ("/v1/responses", "\n\nevent: error\ndata: {"),
    ] {
        let answer = world.send(request(Method::POST, path, STREAM)).await;
        assert!(answer.text().contains(expected) && !answer.text().contains("[DONE]"), "{}", answer.text());
        assert!(answer.text().contains("upstream_disconnected") && answer.text().ends_with("\n\n"));
    }
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_body_that_ends_like_an_answer_of_hypers_passes_as_it_came() {
    const END: &str = "HTTP/1.1 400 Bad Request\r\nx: y\r\n\r\n";
    let world = World::new("", |_| {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\nabcd", 4 + END.len());
        vec![Step::Send(head.into_bytes()), Step::Wait(Duration::from_secs(1)), Step::Send(END.into())]
    });
    let mut io = world.connect();
    io.write_all(b"GET /v1/files/a/content HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.expect("written");
    let mut all = String::new();
    io.read_to_string(&mut all).await.expect("read");
    assert!(all.ends_with(&format!("\r\n\r\nabcd{END}")), "{all}");
}

#[tokio::test(start_paused = true)]
async fn what_came_of_an_answer_that_breaks_off_is_passed_on_before_the_connection_is_cut() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
    for begun in ["", "{\"half\":"] {
        let world = World::new("", move |_| [send(HEAD), send(begun), vec![Step::Close]].concat());
        let mut raw = world.raw();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length";
        raw.write(format!("{head}: {}\r\n\r\n{CHAT}", CHAT.len())).await;
        let text = raw.rest().await;
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{begun}: {text:?}");
        assert!(text.ends_with(&format!("\r\n\r\n{begun}")), "{begun}: {text:?}");

        let mut sender = world.http2().await;
        let response = sender.send_request(over_http2(chat(CHAT))).await.expect("a head");
        let answer = collect(response).await;
        assert_eq!((answer.status.as_u16(), answer.text().as_str(), answer.broken), (200, begun, true));
        assert_eq!(world.gateway.seen().len(), 2, "nothing is sent again");
    }
}

/// W3C Trace Context: what weir does not take part in, it must not touch, and several `tracestate` fields are one list whose
/// order counts.
#[tokio::test(start_paused = true)]
async fn traces_pass_untouched_both_ways_in_either_protocol() {
    let response = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let world = World::new("", move |_| answer(200, &[("traceresponse", response), ("tracestate", "gw=1")], "{}"));
    // Also one that is not valid: judging it is for those who take part.
    for parent in ["00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", "nonsense", response] {
        let asked = with(chat(CHAT), "traceparent", parent);
        let asked =
            with(with(asked, "tracestate", "rojo=00f067aa0ba902b7, a@b=t61rcWkgMzE"), "tracestate", "congo=,x=\"y\"");
        let over_http1 = world.send(asked.clone()).await;
        let mut http2 = world.http2().await;
        let over_http2 = http2.send_request(crate::world::over_http2(asked)).await.expect("answered");
        for answer in [over_http1, crate::world::collect(over_http2).await] {
            assert_eq!((answer.header("traceresponse"), answer.header("tracestate")), (response, "gw=1"));
        }
        let seen = world.gateway.seen();
        for seen in &seen[seen.len() - 2..] {
            assert_eq!(seen.header("traceparent"), [parent]);
            assert_eq!(seen.header("tracestate"), ["rojo=00f067aa0ba902b7, a@b=t61rcWkgMzE", "congo=,x=\"y\""]);
        }
    }
}
