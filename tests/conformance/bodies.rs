//! Requests' bodies on their way to the gateway: how they are framed there, what becomes of one that breaks off, and of one
//! that is answered before it is through.

use std::sync::LazyLock;

use crate::client::{Answer, Client, Closed, End};
use crate::message::{Found, Framing, body_of, escaped, find};
use crate::upstream::{Act, FINE, ok, send};
use crate::world::{World, each, named};

const CHAT: &str = r#"{"model":"gpt-4.1-mini","messages":[{"role":"user","content":"hello"}]}"#;

/// More than weir reads before it sends.
const BIG: usize = 2 << 20;

/// What must never be answered.
const HIDDEN: &str = "GET /v1/hidden HTTP/1.1\r\nhost: weir.test\r\n\r\n";

fn request(line: &str, fields: &str, body: &str) -> String {
    format!("{line} HTTP/1.1\r\nhost: weir.test\r\n{fields}\r\n{body}")
}

fn post(path: &str, framing: &str, body: &str) -> String {
    request(&format!("POST {path}"), &format!("{framing}\r\n"), body)
}

/// Bytes of which no two places are alike, and which hide a request at the end.
fn big_body() -> String {
    static BODY: LazyLock<String> = LazyLock::new(|| {
        let numbers: String = (0..(BIG - HIDDEN.len()) / 64).map(|number| format!("{number:064}")).collect();
        numbers + HIDDEN
    });
    BODY.clone()
}

fn in_chunks(body: &str) -> String {
    let chunks = body.as_bytes().chunks(100_000).map(|chunk| format!("{:x}\r\n{}\r\n", chunk.len(), ascii(chunk)));
    chunks.collect()
}

fn ascii(chunk: &[u8]) -> &str {
    std::str::from_utf8(chunk).expect("it is ASCII")
}

async fn reaches_the_gateway_as(sent: String, expected: String) {
    let world = World::fine().await;
    let mut client = world.client().await;
    client.write(sent.repeat(2)).await;
    for _ in 0..2 {
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.text().as_str()), (200, "fine"));
    }
    assert_eq!(world.upstream.received(), expected.repeat(2));
    world.is_well("a body").await;
}

#[tokio::test]
async fn a_small_body_reaches_the_gateway_with_a_length_however_it_came() {
    let forwarded = |line: &str, rest: &str| format!("{line} HTTP/1.1\r\nhost: gateway.test\r\n{rest}");
    let opaque = |line: &str, length: usize, body: &str| {
        forwarded(line, &format!("via: 1.1 weir\r\ncontent-length: {length}\r\n\r\n{body}"))
    };
    let chat = forwarded(
        "POST /v1/chat/completions",
        &format!("via: 1.1 weir\r\naccept-encoding: identity\r\ncontent-length: {}\r\n\r\n{CHAT}", CHAT.len()),
    );
    let chat_chunks = format!("{:x}\r\n{CHAT}\r\n0\r\n\r\n", CHAT.len());
    let files = "POST /v1/files";
    let cases = [
        ("a length", post("/v1/files", "content-length: 5", "hello"), opaque(files, 5, "hello")),
        ("leading zeros", post("/v1/files", "content-length: 0005", "hello"), opaque(files, 5, "hello")),
        (
            "the same length twice",
            post("/v1/files", "content-length: 5\r\ncontent-length: 5", "hello"),
            opaque(files, 5, "hello"),
        ),
        ("no bytes", post("/v1/files", "content-length: 0", ""), opaque(files, 0, "")),
        ("nothing said", request(files, "", ""), opaque(files, 0, "")),
        (
            "chunks",
            post("/v1/files", "transfer-encoding: chunked", "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
            opaque(files, 5, "hello"),
        ),
        ("no chunks", post("/v1/files", "transfer-encoding: chunked", "0\r\n\r\n"), opaque(files, 0, "")),
        (
            "extensions and trailers",
            post(
                "/v1/files",
                "transfer-encoding: chunked\r\ntrailer: x-sum",
                "5;a=\"b;c\"\r\nhello\r\n0;d\r\nx-sum: 1\r\nhost: evil\r\n\r\n",
            ),
            opaque(files, 5, "hello").replace("via:", "trailer: x-sum\r\nvia:"),
        ),
        ("PUT without a body", request("PUT /v1/files/a", "", ""), opaque("PUT /v1/files/a", 0, "")),
        ("PATCH", request("PATCH /v1/files/a", "content-length: 2\r\n", "{}"), opaque("PATCH /v1/files/a", 2, "{}")),
        (
            "GET with a body",
            request("GET /v1/files", "content-length: 5\r\n", "hello"),
            opaque("GET /v1/files", 5, "hello"),
        ),
        (
            "GET with no bytes",
            request("GET /v1/files", "content-length: 0\r\n", ""),
            forwarded("GET /v1/files", "via: 1.1 weir\r\n\r\n"),
        ),
        ("DELETE", request("DELETE /v1/files/a", "", ""), forwarded("DELETE /v1/files/a", "via: 1.1 weir\r\n\r\n")),
        (
            "a method of its own",
            request("PURGE /v1/files/a", "content-length: 1\r\n", "a"),
            opaque("PURGE /v1/files/a", 1, "a"),
        ),
        (
            "a metered call",
            post("/v1/chat/completions", &format!("content-length: {}", CHAT.len()), CHAT),
            chat.clone(),
        ),
        ("a metered call in chunks", post("/v1/chat/completions", "transfer-encoding: chunked", &chat_chunks), chat),
    ];
    each(cases.into_iter().map(|(name, sent, expected)| named(name, reaches_the_gateway_as(sent, expected)))).await;
}

#[tokio::test]
async fn a_large_body_with_a_length_reaches_the_gateway_byte_for_byte() {
    let world = World::fine().await;
    let body = big_body();
    let answer = world.answer_to(post("/v1/files", &format!("content-length: {}", body.len()), &body)).await;
    assert_eq!(answer.text(), "fine");
    let head = "POST /v1/files HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\ncontent-length:";
    assert!(world.upstream.received() == format!("{head} {}\r\n\r\n{body}", body.len()), "the body arrived changed");
    world.is_well("a large body").await;
}

#[tokio::test]
async fn a_large_body_in_chunks_reaches_the_gateway_in_chunks_without_extensions_or_trailers() {
    let world = World::fine().await;
    let body = big_body();
    let chunks = in_chunks(&body).replace("186a0\r\n", "186a0;a=b\r\n") + "0;c\r\nhost: evil\r\nx-sum: 1\r\n\r\n";
    let answer = world.answer_to(post("/v1/files", "transfer-encoding: chunked", &chunks)).await;
    assert_eq!(answer.text(), "fine");
    let bytes = &world.upstream.connections()[0].bytes;
    let head = find(bytes, b"\r\n\r\n").expect("a head") + 4;
    let found = body_of(&bytes[head..], Framing::Chunks);
    let Found::Whole { body: arrived, trailers, used } = found else { panic!("the body did not end") };
    assert!(arrived == body.as_bytes(), "the body arrived changed");
    assert_eq!((trailers.as_str(), used), ("", bytes.len() - head), "and there is nothing behind it");
    let expected =
        "POST /v1/files HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\ntransfer-encoding: chunked\r\n\r\n";
    assert!(world.upstream.received().starts_with(expected), "{}", escaped(&bytes[..head]));
    world.is_well("a large body in chunks").await;
}

/// A client that leaves in the middle of an upload must not look to the gateway like one that came to its end.
#[tokio::test]
async fn an_upload_that_breaks_off_breaks_off_at_the_gateway_too() {
    let body = big_body();
    let half = &body[..3 << 19];
    let in_chunks = in_chunks(half);
    for (name, framing, sent) in [
        ("a length not met", format!("content-length: {}", body.len()), half),
        ("no last chunk", "transfer-encoding: chunked".to_owned(), in_chunks.as_str()),
        ("a malformed chunk", "transfer-encoding: chunked".to_owned(), &format!("{in_chunks}zz\r\n0\r\n\r\n")),
        (
            "a chunk longer than it says",
            "transfer-encoding: chunked".to_owned(),
            &format!("{in_chunks}1\r\nab\r\n0\r\n\r\n"),
        ),
        ("the last chunk without its end", "transfer-encoding: chunked".to_owned(), &format!("{in_chunks}0\r\n")),
        ("in a trailer", "transfer-encoding: chunked".to_owned(), &format!("{in_chunks}0\r\nx-a")),
    ] {
        let world = World::fine().await;
        let mut client = world.client().await;
        client.write(post("/v1/files", &framing, sent)).await;
        world.upstream.has_received(half.len()).await;
        client.finish().await;
        match client.answer().await {
            None => {}
            Some(answer) => assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{name}"),
        }
        client.is_closed(name).await;
        world.upstream.saw_closed(0).await;
        let bytes = &world.upstream.connections()[0].bytes;
        assert!(!bytes.ends_with(b"\r\n0\r\n\r\n"), "{name}: the gateway takes it for whole");
        assert!(bytes.len() < body.len(), "{name}");
        world.is_well(name).await;
    }
}

#[tokio::test]
async fn a_small_body_that_breaks_off_never_reaches_the_gateway() {
    for (name, path, framing, sent) in [
        ("a length not met", "/v1/files", "content-length: 10", "half"),
        ("no last chunk", "/v1/files", "transfer-encoding: chunked", "4\r\nhalf\r\n"),
        ("a metered length not met", "/v1/chat/completions", "content-length: 1000", CHAT),
        ("a metered call without its last chunk", "/v1/chat/completions", "transfer-encoding: chunked", "1\r\n{\r\n"),
    ] {
        let world = World::fine().await;
        let mut client = world.client().await;
        client.write(post(path, framing, sent)).await;
        client.finish().await;
        if let Some(answer) = client.answer().await {
            assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{name}");
        }
        client.is_closed(name).await;
        assert_eq!(world.upstream.received(), "", "{name}");
        world.is_well(name).await;
    }
}

/// An upload that is answered when the gateway has seen the beginning of it.
async fn answered_early(config: &str, says: String, last: Act) -> (World, Client, Answer) {
    let first = vec![Act::Early, Act::Gate, send(says), last];
    let world = World::new(config, move |number| if number == 0 { first.clone() } else { vec![send(FINE)] }).await;
    let mut client = world.client().await;
    let body = big_body();
    client.write(post("/v1/files", &format!("content-length: {}", body.len()), &body[..100_000])).await;
    client.write(&body[100_000..BIG / 2]).await;
    world.upstream.saw(1).await;
    world.upstream.go_on();
    let answer = client.answer().await.expect("an answer");
    (world, client, answer)
}

/// The gateway has got a beginning of the upload, perhaps all of it, and nothing else.
#[track_caller]
fn assert_got_at_most_the_upload(world: &World, case: &str) {
    let body = big_body();
    let head = "POST /v1/files HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\ncontent-length:";
    let upload = format!("{head} {}\r\n\r\n{body}", body.len());
    assert!(upload.starts_with(&world.upstream.received()), "{case}: the gateway got something else");
    assert_eq!(world.upstream.connections().len(), 1, "{case}");
}

#[tokio::test]
async fn an_upload_that_stalls_after_an_early_answer_is_not_waited_for_without_an_end() {
    let config = "[server]\nbody_timeout = \"200ms\"\nkeep_alive = \"200ms\"\n";
    let (world, mut client, answer) = answered_early(config, TOO_LARGE.to_owned(), Act::Stall).await;
    assert_eq!((answer.status, answer.text().as_str()), (413, "stop"));
    client.is_closed("stalled").await;
    world.upstream.saw_closed(0).await;
    assert_got_at_most_the_upload(&world, "stalled");
    world.is_well("stalled").await;
}

const TOO_LARGE: &str = "HTTP/1.1 413 Content Too Large\r\ncontent-length: 4\r\n\r\nstop";

async fn reaches_the_client_early(says: String, last: Act, status: u16, text: &str) {
    let case = format!("{says:?}, then {last:?}");
    let (world, mut client, answer) = answered_early("", says, last).await;
    assert_eq!((answer.status, answer.text().as_str()), (status, text), "{case}");
    assert_ne!(answer.end, End::Broken, "{case}");
    client.write(&big_body()[BIG / 2..]).await;
    client.finish().await;
    client.is_closed(&case).await;
    assert_got_at_most_the_upload(&world, &case);
    world.is_well(&case).await;
}

#[tokio::test]
async fn an_answer_before_the_body_is_through_reaches_the_client_and_the_rest_is_no_request() {
    let closing = TOO_LARGE.replace("content-length", "connection: close\r\ncontent-length");
    for (says, last, status, text) in [
        (TOO_LARGE.to_owned(), send(""), 413, "stop"),
        (TOO_LARGE.to_owned(), Act::Finish, 413, "stop"),
        (closing, Act::Finish, 413, "stop"),
        (ok("content-length: 5", "hello"), send(""), 200, "hello"),
        (ok("transfer-encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"), send(""), 200, "hello"),
        (ok("x-a: 1", "hello"), Act::Finish, 200, "hello"),
    ] {
        reaches_the_client_early(says, last, status, text).await;
    }
}

/// What it does not read any more is answered with a reset, which weir meets when it writes.
#[tokio::test]
async fn an_answer_before_the_body_is_through_reaches_the_client_though_the_gateway_hangs_up() {
    for _ in 0..10 {
        reaches_the_client_early(TOO_LARGE.to_owned(), Act::Close, 413, "stop").await;
    }
}

#[tokio::test]
async fn a_gateway_that_hangs_up_on_an_upload_is_a_bad_gateway_and_the_rest_is_no_request() {
    for last in [Act::Close, Act::Reset] {
        let (world, mut client, answer) = answered_early("", String::new(), last).await;
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_disconnected"));
        client.write(&big_body()[BIG / 2..]).await;
        client.finish().await;
        client.is_closed("hung up").await;
        assert_got_at_most_the_upload(&world, "hung up");
        world.is_well("hung up").await;
    }
}

#[tokio::test]
async fn what_weir_refuses_before_the_body_is_through_hides_no_request_behind_it() {
    let config = "[server]\nmax_body = \"1KiB\"\n[clients.a]\nkey = \"sk-a\"\n";
    let body = "x".repeat(2000) + HIDDEN;
    let length = format!("content-length: {}", body.len());
    let key = "authorization: Bearer sk-a\r\n";
    let chat = |fields: &str, body: &str| post("/v1/chat/completions", &format!("{key}{fields}"), body);
    for (name, sent, status) in [
        ("too large", chat(&length, &body), 413),
        (
            "too large, in chunks",
            chat("transfer-encoding: chunked", &format!("{:x}\r\n{body}\r\n{HIDDEN}", body.len())),
            413,
        ),
        ("an unknown path", post("/admin", &length, &body), 404),
        ("an unknown key", post("/v1/chat/completions", &length, &body), 401),
        ("two hosts", chat(&format!("host: b\r\n{length}"), &body), 400),
        ("no such body ever comes", post("/admin", "content-length: 1000000", HIDDEN), 404),
        ("a malformed chunk", chat("transfer-encoding: chunked", &format!("zz\r\n{HIDDEN}")), 400),
    ] {
        let world = World::new(config, |_| vec![send(FINE)]).await;
        let mut client = world.client().await;
        client.write(sent).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!(answer.status, status, "{name}: {}", answer.text());
        assert!(answer.head.contains("content-type: application/json\r\n"), "{name}: {}", answer.head);
        client.finish().await;
        client.is_closed(name).await;
        world.holds_nothing(name).await;
        assert_eq!(world.upstream.received(), "", "{name}");
    }
}

#[tokio::test]
async fn a_client_that_asks_before_it_sends_is_told_to_go_on_by_weir_alone() {
    for (path, fields) in [("/v1/chat/completions", "accept-encoding: identity\r\n"), ("/v1/files", "")] {
        for expect in ["100-continue", "100-Continue"] {
            let world = World::fine().await;
            let mut client = world.client().await;
            client.write(post(path, &format!("expect: {expect}\r\ncontent-length: {}", CHAT.len()), "")).await;
            let go_on = client.head().await.expect("to be told to go on");
            assert_eq!(go_on, "HTTP/1.1 100 Continue\r\n\r\n");
            assert_eq!(world.upstream.received(), "", "nothing is sent before the body has come");
            client.write(CHAT).await;
            let answer = client.answer().await.expect("an answer");
            assert_eq!((answer.text().as_str(), answer.informational.len()), ("fine", 0));
            let length = CHAT.len();
            let head = format!("POST {path} HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\n{fields}");
            assert_eq!(world.upstream.received(), format!("{head}content-length: {length}\r\n\r\n{CHAT}"));
            world.is_well(path).await;
        }
    }
}

#[tokio::test]
async fn a_client_that_asks_before_it_sends_is_refused_without_being_told_to_go_on() {
    let config = "[server]\nmax_body = \"1KiB\"\n";
    for (path, length, status) in [("/admin", 10, 404), ("/v1/chat/completions", 2000, 413)] {
        let world = World::new(config, |_| vec![send(FINE)]).await;
        let mut client = world.client().await;
        client.write(post(path, &format!("expect: 100-continue\r\ncontent-length: {length}"), "")).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.informational.len()), (status, 0), "{}", answer.text());
        client.finish().await;
        client.is_closed(path).await;
        assert_eq!(world.upstream.received(), "");
        world.is_well(path).await;
    }
}

#[tokio::test]
async fn other_expectations_and_those_of_http_1_0_are_not_answered_and_stay_behind() {
    for sent in [
        "POST /v1/files HTTP/1.1\r\nhost: weir.test\r\nexpect: miracles\r\ncontent-length: 5\r\n\r\nhello",
        "POST /v1/files HTTP/1.0\r\nhost: weir.test\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\nhello",
    ] {
        let world = World::fine().await;
        let answer = world.answer_to(sent).await;
        assert_eq!((answer.status, answer.informational.len()), (200, 0), "{sent:?}");
        assert!(!world.upstream.received().contains("expect"), "{}", world.upstream.received());
        world.is_well(sent).await;
    }
    let world = World::fine().await;
    let mut client = world.client().await;
    client.write("POST /v1/files HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n").await;
    client.write("hello").await;
    let answer = client.answer().await.expect("an answer");
    assert_eq!((answer.status, answer.informational.len()), (200, 0));
    assert_eq!(client.rest().await, (vec![], Closed::Cleanly));
}

/// It writes on for as long as it can, and looks for an answer only then.
#[tokio::test]
async fn a_client_that_reads_only_when_it_has_written_all_finds_the_refusal() {
    let world = World::new("[server]\nmax_body = \"1KiB\"\n", |_| vec![send(FINE)]).await;
    for framing in ["content-length: 16000000", "transfer-encoding: chunked"] {
        let mut client = world.client().await;
        client.write(post("/v1/chat/completions", framing, "")).await;
        for _ in 0..100 {
            client.write(format!("{:x}\r\n{}\r\n", 100_000, "x".repeat(100_000))).await;
        }
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.code().as_str()), (413, "request_too_large"), "{framing}");
        assert_eq!(world.upstream.received(), "");
        world.holds_nothing(framing).await;
    }
}
