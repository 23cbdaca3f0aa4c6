//! Clients that are slow, silent, greedy or broken: each gets a clear answer, and holds nothing for ever.

use std::time::Duration;

use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::gateway::{Step, answer, chunk, completion, error, event, stream_head};
use crate::world::{Answer, CHAT, STREAM, World, chat};

const SECOND: Duration = Duration::from_secs(1);

fn post(path: &str, framing: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: weir.test\r\n{framing}\r\n\r\n{body}")
}

fn post_chat(framing: &str, body: &str) -> String {
    post("/v1/chat/completions", framing, body)
}

fn whole_chat(body: &str) -> String {
    post_chat(&format!("content-length: {}", body.len()), body)
}

fn upload(framing: &str) -> String {
    post("/v1/files", framing, "")
}

/// A chat request as HTTP/2 has it.
fn http2(body: &str) -> http::Request<http_body_util::Full<bytes::Bytes>> {
    let mut request = chat(body);
    *request.uri_mut() = "http://weir.test/v1/chat/completions".parse().expect("a URL");
    request.headers_mut().remove("host");
    request
}

#[track_caller]
fn assert_error(answer: &Answer, status: u16, code: &str) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (status, code), "{}", answer.text());
    assert_eq!(answer.header("content-type"), "application/json");
}

fn nothing(_: &crate::gateway::Seen) -> Vec<Step> {
    answer(200, &[], "{}")
}

/// How often a bound of `[server]` has bitten.
fn guards(world: &World, guard: &str) -> f64 {
    let all = world.metric_sum("weir_guards_total", "");
    let count = world.metric(&format!(r#"weir_guards_total{{guard="{guard}"}}"#));
    assert_eq!(all, count, "another than {guard} has bitten");
    count
}

#[tokio::test(start_paused = true)]
async fn a_new_connection_that_says_nothing_is_closed() {
    let world = World::new("[server]\nheader_timeout = \"10s\"\n", nothing);
    assert_eq!(world.raw().rest().await, "");
    assert_eq!(world.elapsed(), 10_000);
    assert_eq!(guards(&world, "header_timeout"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_head_that_drips_is_closed_after_header_timeout() {
    let world = World::new("[server]\nheader_timeout = \"10s\"\n", nothing);
    let mut client = world.raw();
    client.write("GET /v1/models HTTP/1.1\r\nx-drip: ").await;
    assert!(client.drip("x", SECOND).await.is_none());
    assert_eq!(world.elapsed(), 10_000);
    // The preface of HTTP/2 that never ends is no better.
    let mut client = world.raw();
    client.write("PRI * HT").await;
    assert_eq!(client.rest().await, "");
    assert_eq!(world.elapsed(), 20_000);
    assert_eq!(guards(&world, "header_timeout"), 2.0);
}

#[tokio::test(start_paused = true)]
async fn the_next_head_has_header_timeout_from_its_first_byte() {
    let world = World::new("[server]\nheader_timeout = \"10s\"\nkeep_alive = \"75s\"\n", nothing);
    let mut client = world.raw();
    client.write("GET /v1/models HTTP/1.1\r\nhost: weir.test\r\n\r\n").await;
    assert_eq!(client.answer().await.expect("an answer").status, 200);
    tokio::time::sleep(50 * SECOND).await;
    client.write("GET /v1/models HTTP/1.1\r\nx-drip: ").await;
    assert!(client.drip("x", SECOND).await.is_none());
    assert_eq!(world.elapsed(), 60_000);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_after_keep_alive_and_a_busy_one_is_not() {
    let world =
        World::new("[server]\nkeep_alive = \"75s\"\n", |_| [vec![Step::Wait(200 * SECOND)], completion()].concat());
    let mut client = world.raw();
    for finished in [200_000, 460_000] {
        client.write(whole_chat(CHAT)).await;
        assert_eq!(client.answer().await.expect("an answer").status, 200);
        assert_eq!(world.elapsed(), finished);
        tokio::time::sleep(60 * SECOND).await;
    }
    assert_eq!(client.rest().await, "");
    assert_eq!(world.elapsed(), 460_000 + 75_000);
    assert_eq!(guards(&world, "header_timeout"), 0.0, "an idle connection is no guard's");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_idle_http2_connection_is_closed_after_keep_alive_and_a_busy_one_is_not() {
    let world =
        World::new("[server]\nkeep_alive = \"75s\"\n", |_| [vec![Step::Wait(200 * SECOND)], completion()].concat());
    let mut sender = world.http2().await;
    let response = sender.send_request(http2(CHAT)).await.expect("answered");
    assert_eq!(crate::world::collect(response).await.status, 200);
    assert_eq!(world.elapsed(), 200_000);
    tokio::time::sleep(74 * SECOND).await;
    assert!(!sender.is_closed());
    tokio::time::sleep(2 * SECOND).await;
    assert!(sender.is_closed());
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stops_coming_is_answered_with_408() {
    let world = World::new("[server]\nbody_timeout = \"30s\"\n", nothing);
    for framing in ["content-length: 100", "transfer-encoding: chunked"] {
        let begun = world.elapsed();
        let mut client = world.raw();
        client.write(post_chat(framing, "5\r\n{\"mod\r\n")).await;
        assert_error(&client.answer().await.expect("an answer"), 408, "request_timeout");
        assert_eq!(world.elapsed() - begun, 30_000);
        assert_eq!(client.rest().await, "", "what would come after it is no request");
        world.assert_nothing_held();
    }
    assert_eq!(guards(&world, "body_timeout"), 2.0);
    assert_eq!(world.gateway.seen().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_drips_for_ever_is_answered_with_408_at_the_deadline() {
    let world = World::new("[timeouts]\ndeadline = \"2min\"\n", nothing);
    let mut client = world.raw();
    client.write(post_chat("content-length: 100000", "{")).await;
    world.settle().await;
    assert_eq!(world.proxy.gauges().buffered_bytes, 1);
    assert_error(&client.drip(" ", 20 * SECOND).await.expect("an answer"), 408, "request_timeout");
    assert_eq!(world.elapsed(), 120_000);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_metered_body_beyond_max_body_is_answered_with_413() {
    let world = World::new("[server]\nmax_body = \"1KiB\"\n", nothing);
    let body = "x".repeat(2000);
    for (framing, body) in [
        ("content-length: 2000", ""),
        ("content-length: 2000", body.as_str()),
        ("transfer-encoding: chunked", &format!("7d0\r\n{body}\r\n")),
    ] {
        let mut client = world.raw();
        client.write(post_chat(framing, body)).await;
        assert_error(&client.answer().await.expect("an answer"), 413, "request_too_large");
        world.assert_nothing_held();
    }
    let exact = format!("{{\"x\":\"{}\"}}", "x".repeat(1024 - 8));
    assert_eq!(world.answer_to(whole_chat(&exact)).await.status, 200);
    assert_eq!((world.gateway.seen().len(), world.elapsed()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_malformed_chunk_of_a_metered_call_is_the_clients_fault() {
    let world = World::new("", nothing);
    let answer = world.answer_to(post_chat("transfer-encoding: chunked", "5\r\nhello\r\nnonsense\r\n")).await;
    assert_error(&answer, 400, "bad_request");
    assert_eq!(world.gateway.seen().len(), 0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_malformed_chunk_of_an_upload_is_the_clients_fault() {
    let world = World::new("", nothing);
    let mut client = world.raw();
    client.write(upload("transfer-encoding: chunked")).await;
    client.write(format!("{:x}\r\n{}\r\n", 2 << 20, "x".repeat(2 << 20))).await;
    world.gateway.has_received(2 << 20).await;
    client.write("nonsense\r\n").await;
    assert_error(&client.answer().await.expect("an answer"), 400, "bad_request");
    let attempts = |result| world.metric(&format!(r#"weir_upstream_attempts_total{{model="-",result="{result}"}}"#));
    assert_eq!((attempts("cancelled"), attempts("reset"), world.gateway.connections()), (1.0, 0.0, 1));
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_stalls_gives_its_slot_back() {
    let world = World::new("[limits]\nconcurrency = 1\n[server]\nbody_timeout = \"5s\"\n", nothing);
    for framing in ["content-length: 3000000", "transfer-encoding: chunked"] {
        let before = world.gateway.received();
        let begun = world.elapsed();
        let mut client = world.raw();
        client.write(upload(framing)).await;
        client.write(format!("1e8480\r\n{}", "x".repeat(1_500_000))).await;
        world.gateway.has_received(before + 1_500_000).await;
        let waiting = world.spawn(chat(CHAT));
        assert_error(&client.answer().await.expect("an answer"), 408, "request_timeout");
        assert_eq!(world.elapsed() - begun, 5000);
        assert_eq!(waiting.await.expect("answered").status, 200);
        assert_eq!(world.elapsed() - begun, 5000, "the slot was free at once");
        world.settle().await;
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_drips_for_ever_is_the_clients_fault_too() {
    let world = World::new("[timeouts]\nresponse = \"2min\"\n", nothing);
    let mut client = world.raw();
    client.write(upload("content-length: 30000000")).await;
    client.write("x".repeat(1_500_000)).await;
    assert_error(&client.drip("x", 20 * SECOND).await.expect("an answer"), 408, "request_timeout");
    assert_eq!(world.elapsed(), 120_000);
    assert_eq!(guards(&world, "body_timeout"), 1.0);
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_stops_reading_an_upload_is_at_fault_itself() {
    let world = World::new("[timeouts]\nresponse = \"1min\"\n", |_| vec![Step::Stall]);
    let mut client = world.raw();
    client.write(upload("content-length: 2000000")).await;
    client.write("x".repeat(2_000_000)).await;
    assert_error(&client.answer().await.expect("an answer"), 504, "response_timeout");
    assert_eq!(world.elapsed(), 60_000);
    world.settle().await;
    world.assert_nothing_held();
}

/// A stream of 16 MiB.
fn endless() -> Vec<Step> {
    let piece = chunk(&format!("data: {}\n\n", "x".repeat(16 << 10)));
    [stream_head(), event("one")].into_iter().chain(std::iter::repeat_n(piece, 1024)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_reading_is_cut_after_write_timeout() {
    let world = World::new("[server]\nwrite_timeout = \"60s\"\n", |_| endless());
    let mut client = world.raw();
    client.write(whole_chat(STREAM)).await;
    world.gateway.saw(1).await;
    tokio::time::sleep(59 * SECOND).await;
    let sent = world.gateway.sent();
    assert!(sent < 2 << 20, "{sent} bytes are held somewhere");
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    assert_eq!((world.elapsed(), world.attempts("cancelled")), (60_000, 1.0));
    assert_eq!(world.gateway.sent(), sent, "nothing more was taken from the gateway");
    assert_eq!(world.gateway.open(), 0);
    assert_eq!(guards(&world, "write_timeout"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_slowly_is_not_cut() {
    let world = World::new("[server]\nwrite_timeout = \"60s\"\n", |_| {
        [endless(), vec![Step::Send(b"0\r\n\r\n".to_vec())]].concat()
    });
    let mut response = world.begin(chat(STREAM)).await;
    let mut frames = 0;
    while let Some(frame) = response.body_mut().frame().await {
        frame.expect("unbroken");
        frames += 1;
        if frames % 100 == 0 {
            tokio::time::sleep(50 * SECOND).await;
        }
    }
    assert!(world.elapsed() > 100_000);
    world.assert_nothing_held();
}

/// The same over HTTP/2: the client shuts one stream's window, and the connection goes on.
#[tokio::test(start_paused = true)]
async fn an_http2_stream_that_is_not_read_is_reset_after_write_timeout_and_its_neighbour_is_not() {
    let world = World::new("[server]\nwrite_timeout = \"60s\"\n", |seen| match seen.number {
        0 => endless(),
        _ => [vec![stream_head(), event("one"), Step::Wait(100 * SECOND)], crate::gateway::done().to_vec()].concat(),
    });
    let mut sender = world.http2().await;
    let unread = sender.send_request(http2(STREAM)).await.expect("answered");
    let neighbour = tokio::spawn(crate::world::collect(sender.send_request(http2(STREAM)).await.expect("answered")));
    world.gateway.saw_cancelled(1).await;
    assert_eq!(world.elapsed(), 60_000);
    assert!(crate::world::collect(unread).await.broken);
    let neighbour = neighbour.await.expect("answered");
    assert!(neighbour.text().ends_with("[DONE]\n\n") && !neighbour.broken);
    world.settle().await;
    assert_eq!(guards(&world, "write_timeout"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn bodies_beyond_max_bytes_are_refused_until_there_is_room() {
    let body = format!(r#"{{"model":"gpt-4.1-mini","x":"{}"}}"#, "x".repeat(700_000));
    let world = World::new("[queue]\nmax_bytes = \"1MiB\"\n", |_| [vec![Step::Gate], completion()].concat());
    let first = world.spawn(chat(&body));
    world.gateway.saw(1).await;
    let refused = world.send(chat(&body)).await;
    assert_error(&refused, 503, "queue_full");
    assert_eq!((refused.header("retry-after"), refused.header("retry-after-ms")), ("1", "1000"));
    assert!(refused.header("x-weir-refused-by").starts_with("queue"));
    world.gateway.go_on();
    assert_eq!(first.await.expect("answered").status, 200);
    world.settle().await;
    assert_eq!(world.proxy.gauges().buffered_bytes, 0);
    let third = world.spawn(chat(&body));
    world.gateway.saw(2).await;
    world.gateway.go_on();
    assert_eq!(third.await.expect("answered").status, 200);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_header_bomb_is_answered_with_431() {
    let world = World::new("", nothing);
    let huge = format!("x-bomb: {}", "x".repeat(100 << 10));
    let monstrous = format!("x-bomb: {}", "x".repeat(1 << 20));
    let many = (0..150).map(|number| format!("x-{number}: 1")).collect::<Vec<_>>().join("\r\n");
    for fields in [huge, monstrous, many] {
        let text = format!("GET /v1/models HTTP/1.1\r\nhost: weir.test\r\n{fields}\r\n\r\n");
        let mut client = world.raw();
        // In a task: weir stops reading before the end of it.
        let (mut reader, mut writer) = tokio::io::split(&mut client.io);
        let writing = async {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut writer, text.as_bytes()).await;
        };
        let mut bytes = Vec::new();
        let reading = tokio::io::AsyncReadExt::read_to_end(&mut reader, &mut bytes);
        let _ = tokio::join!(writing, reading);
        let answer = Answer::of(bytes);
        assert_error(&answer, 431, "headers_too_large");
    }
    assert_eq!(guards(&world, "max_head"), 3.0);
    assert_eq!(world.gateway.seen().len(), 0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn what_is_no_http_request_is_answered_with_400() {
    let world = World::new("", nothing);
    for text in [
        "nonsense\r\n\r\n",
        "GET /v1/models\r\n\r\n",
        "GET /v1/a b HTTP/1.1\r\nhost: weir.test\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nhost : weir.test\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nhost: weir.test\r\nbad name: 1\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nhost: weir.test\r\n folded: 1\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nhost: weir.test\r\nx: \0\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03 a TLS hello \r\n\r\n",
        "GET /v1/models HTTP/1.1\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nhost: a.test\r\nhost: a.test\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nhost: a.test/x\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nhost: user@a.test\r\n\r\n",
        "POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 1, 2\r\n\r\nab",
        "POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ncontent-length: +1\r\n\r\na",
        "POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ncontent-length: -1\r\n\r\n",
        "POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ntransfer-encoding: gzip\r\n\r\n",
        "POST /v1/files HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        let answer = world.answer_to(text).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_request"), "{text:?}");
        assert_eq!(answer.header("content-type"), "application/json");
    }
    assert_eq!((world.gateway.seen().len(), world.elapsed()), (0, 0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_target_that_is_too_long_is_answered_with_json_too() {
    let world = World::new("", nothing);
    let target = "x".repeat(70_000);
    let mut client = world.connect_with_buffer(1 << 20);
    let text = format!("GET /v1/{target} HTTP/1.1\r\nhost: weir.test\r\n\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut client, text.as_bytes()).await.expect("there is room");
    let mut bytes = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut client, &mut bytes).await.expect("an answer");
    assert_error(&Answer::of(bytes), 400, "bad_request");
    assert_eq!(guards(&world, "max_head"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn garbage_behind_a_good_request_does_not_touch_its_answer() {
    let world = World::new("", nothing);
    let mut client = world.raw();
    client.write("GET /v1/models HTTP/1.1\r\nhost: weir.test\r\n\r\nnonsense\r\n\r\n").await;
    assert_eq!(client.answer().await.expect("the first").status, 200);
    assert_eq!(client.answer().await.expect("the second").status, 400);
    assert_eq!(client.rest().await, "");
    world.assert_nothing_held();
}

/// hyper believes the chunks and drops the length (RFC 9112, 6.3), and closes the connection behind the answer. What is sent
/// on has one framing, made anew from the body that was read.
#[tokio::test(start_paused = true)]
async fn a_length_beside_chunks_is_never_forwarded() {
    let world = World::new("", nothing);
    for framing in
        ["content-length: 4\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 4"]
    {
        let smuggled = "GET /v1/smuggled HTTP/1.1\r\nhost: weir.test\r\n\r\n";
        let mut client = world.raw();
        client.write(post("/v1/files", framing, &format!("5\r\nhello\r\n0\r\n\r\n{smuggled}"))).await;
        assert_eq!(client.answer().await.expect("an answer").status, 200);
        assert_eq!(client.rest().await, "", "what follows is never taken for a request");
    }
    for seen in world.gateway.seen() {
        assert_eq!((seen.target(), seen.body.as_slice()), ("/v1/files", &b"hello"[..]));
        assert_eq!((seen.header("content-length"), seen.header("transfer-encoding").len()), (vec!["5"], 0));
    }
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn pipelined_requests_are_answered_in_order() {
    let world = World::new("", |seen| match seen.number {
        0 => [vec![Step::Wait(SECOND)], answer(200, &[], "first")].concat(),
        1 => error(400, &[("x-kept", "1")]),
        _ => answer(200, &[], "third"),
    });
    let mut client = world.raw();
    let get = "GET /v1/models HTTP/1.1\r\nhost: weir.test\r\n\r\n";
    client.write(format!("{get}{}{get}", whole_chat(CHAT))).await;
    assert_eq!(client.answer().await.expect("the first").text(), "first");
    assert_eq!(client.answer().await.expect("the second").header("x-kept"), "1");
    assert_eq!(client.answer().await.expect("the third").text(), "third");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_expects_to_be_told_to_continue_is_told() {
    let world = World::new("[server]\nmax_body = \"1KiB\"\n", nothing);
    let mut client = world.raw();
    client.write(post_chat(&format!("content-length: {}\r\nexpect: 100-continue", CHAT.len()), "")).await;
    assert_eq!(client.answer().await.expect("to be told").status, 100);
    client.write(CHAT).await;
    assert_eq!(client.answer().await.expect("an answer").status, 200);
    let seen = &world.gateway.seen()[0];
    assert_eq!((seen.body.as_slice(), seen.header("expect").len()), (CHAT.as_bytes(), 0));
    // And who would send too much is told so before it does.
    let answer = world.answer_to(post_chat("content-length: 5000\r\nexpect: 100-continue", "")).await;
    assert_error(&answer, 413, "request_too_large");
    assert_eq!(guards(&world, "max_body"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_key_that_decides_about_limits_may_not_stand_twice() {
    let world = World::new("", nothing);
    for (key, value) in [("model", "\"a\""), ("stream", "true"), ("max_tokens", "1"), ("max_completion_tokens", "1")] {
        let answer = world.send(chat(&format!("{{\"{key}\":{value},\"x\":1,\"{key}\":{value}}}"))).await;
        assert_error(&answer, 400, "duplicate_key");
        assert!(answer.text().contains(key));
    }
    assert_eq!(world.gateway.seen().len(), 0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn malformed_json_is_the_gateways_to_judge() {
    let world = World::new("", |_| error(400, &[]));
    for (number, body) in ["{\"model\":", "", "[]", "nonsense", "{\"model\":7}"].into_iter().enumerate() {
        let answer = world.send(chat(body)).await;
        assert_error(&answer, 400, "upstream_code");
        assert_eq!(world.gateway.seen()[number].body, body.as_bytes());
    }
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_begins_slowly_still_waits_for_its_slot() {
    let world = World::new("[limits]\nconcurrency = 1", |seen| {
        let mut steps = vec![Step::Wait(Duration::from_secs(3))];
        steps.extend(if seen.number == 0 { completion() } else { answer(200, &[], "{}") });
        steps
    });
    let mut io = world.connect();
    let begun = vec![b'x'; 1 << 20];
    io.write_all(b"POST /v1/files HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n")
        .await
        .expect("written");
    io.write_all(b"100000\r\n").await.expect("written");
    io.write_all(&begun).await.expect("written");
    tokio::time::sleep(Duration::from_secs(11)).await;
    let first = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    io.write_all(b"\r\n1\r\nx\r\n0\r\n\r\n").await.expect("written");
    let mut all = String::new();
    io.read_to_string(&mut all).await.expect("read");
    assert!(all.starts_with("HTTP/1.1 200"), "{all}");
    assert_eq!(first.await.expect("served").status, 200);
}
