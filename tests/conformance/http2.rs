//! HTTP/2 requests: what reaches the gateway of them in HTTP/1.1, and what never does.

use std::sync::Arc;

use crate::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Ended, HEADERS, Http2, PADDED, PING, PRIORITY, PUSH_PROMISE,
    RST_STREAM, SETTINGS, WINDOW_UPDATE, block, frame, head, string,
};
use crate::upstream::{FINE, send};
use crate::world::{FINE_FORWARDED, World, each, named};

/// What reaches the gateway.
fn asked(line: &str, fields: &str, body: &str) -> String {
    format!("{line} HTTP/1.1\r\n{fields}host: gateway.test\r\nvia: 2.0 weir\r\n\r\n{body}")
}

fn posted(body: &str) -> String {
    let head = "POST /v1/files HTTP/1.1\r\nhost: gateway.test\r\nvia: 2.0 weir";
    format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// The frames of a request on stream 1.
fn request(fields: &[(&str, &str)], flags: u8) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, 1, block(fields))
}

#[tokio::test]
async fn a_request_reaches_the_gateway_as_one_of_http_1_1() {
    let get = |more: &[(&str, &str)]| request(&head("GET", "/v1/files/a?b=%2F", more), END_STREAM);
    let post = |more: &[(&str, &str)], data: Vec<u8>| [request(&head("POST", "/v1/files", more), 0), data].concat();
    let data = |flags: u8, payload: &str| frame(DATA, flags, 1, payload);
    let bare = asked("GET /v1/files/a?b=%2F", "", "");
    let in_parts = {
        let whole = block(&head("GET", "/v1/files/a?b=%2F", &[("x-a", "1")]));
        let (one, two) = whole.split_at(20);
        [frame(HEADERS, END_STREAM, 1, one), frame(CONTINUATION, 0, 1, []), frame(CONTINUATION, END_HEADERS, 1, two)]
            .concat()
    };
    let padded = |payload: &str| [&[3], payload.as_bytes(), &[0; 3]].concat();
    let cases = [
        ("no fields", get(&[]), bare.clone()),
        ("a field", get(&[("x-a", "1")]), asked("GET /v1/files/a?b=%2F", "x-a: 1\r\n", "")),
        ("a head in parts", in_parts, asked("GET /v1/files/a?b=%2F", "x-a: 1\r\n", "")),
        (
            "crumbs",
            get(&[("cookie", "a=1"), ("cookie", "b=2")]),
            asked("GET /v1/files/a?b=%2F", "cookie: a=1; b=2\r\n", ""),
        ),
        ("the host again", get(&[("host", "weir.test")]), bare.clone()),
        ("TE", get(&[("te", "trailers")]), bare.clone()),
        ("no bytes", post(&[], data(END_STREAM, "")), posted("")),
        ("data", post(&[], data(END_STREAM, "hello")), posted("hello")),
        (
            "a length",
            post(&[("content-length", "5")], [data(0, "he"), data(END_STREAM, "llo")].concat()),
            posted("hello"),
        ),
        (
            "empty frames between",
            post(&[], [data(0, "he"), data(0, ""), data(0, "llo"), data(END_STREAM, "")].concat()),
            posted("hello"),
        ),
        ("padding", post(&[], frame(DATA, END_STREAM | PADDED, 1, padded("hello"))), posted("hello")),
        (
            "trailers",
            post(
                &[],
                [
                    data(0, "hello"),
                    frame(HEADERS, END_STREAM | END_HEADERS, 1, block(&[("host", "evil"), ("x-sum", "1")])),
                ]
                .concat(),
            ),
            posted("hello"),
        ),
        (
            "data that looks like HTTP/1.1",
            post(&[], data(END_STREAM, "0\r\n\r\nGET /v1/x HTTP/1.1\r\n\r\n")),
            posted("0\r\n\r\nGET /v1/x HTTP/1.1\r\n\r\n"),
        ),
    ];
    each(cases.into_iter().map(|(name, bytes, expected)| named(name, reaches_the_gateway_as(bytes, expected)))).await;
}

async fn reaches_the_gateway_as(bytes: Vec<u8>, expected: String) {
    let world = World::fine().await;
    let mut client = Http2::begin(world.socket().await, &[]).await;
    client.write(bytes).await;
    let answer = client.answer(1).await;
    assert_eq!(
        (answer.status, answer.text().as_str(), answer.ended),
        (Some(200), "fine", Ended::Whole),
        "{}",
        answer.text()
    );
    let sorted = |text: &str| {
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let mut lines: Vec<String> = head.split("\r\n").map(str::to_owned).collect();
        lines[1..].sort_unstable();
        (lines, body.to_owned())
    };
    // The order of the fields is that of a map from which some were taken.
    assert_eq!(sorted(&world.upstream.received()), sorted(&expected));
    world.is_well("HTTP/2").await;
}

/// Nothing of it reaches the gateway: the stream or the connection is reset, or it is refused in words.
async fn goes_no_further(world: Arc<World>, bytes: Vec<u8>) {
    let before = world.upstream.received().len();
    let mut client = Http2::begin(world.socket().await, &[]).await;
    client.write(bytes).await;
    let answer = client.answer(1).await;
    let refused = match answer.ended {
        Ended::Whole => {
            matches!(answer.status, Some(400 | 404)) || answer.code() == "headers_too_large" || answer.body.is_empty()
        }
        Ended::Reset(_) => answer.status.is_none_or(|status| matches!(status, 400 | 404)),
        Ended::Connection(_) => true,
    };
    assert!(refused && answer.status != Some(200), "{answer:?}");
    world.is_well("HTTP/2").await;
    assert_eq!(world.upstream.received().len() - before, FINE_FORWARDED.len(), "{}", world.upstream.received());
}

async fn go_no_further(cases: Vec<(&'static str, Vec<u8>)>) {
    let world = Arc::new(World::fine().await);
    each(cases.into_iter().map(|(name, bytes)| named(name, goes_no_further(world.clone(), bytes)))).await;
    assert_eq!(world.upstream.received().replace(FINE_FORWARDED, ""), "");
}

#[tokio::test]
async fn nothing_is_injected_through_pseudo_headers() {
    let pseudo = |method: &str, scheme: &str, authority: &str, path: &str| {
        let fields = [(":method", method), (":scheme", scheme), (":authority", authority), (":path", path)];
        request(&fields, END_STREAM)
    };
    let path = |path: &str| pseudo("GET", "http", "weir.test", path);
    let method = |method: &str| pseudo(method, "http", "weir.test", "/v1/models");
    let authority = |authority: &str| pseudo("GET", "http", authority, "/v1/models");
    go_no_further(vec![
        ("a space in the path", path("/v1/models HTTP/1.1")),
        ("a second request in the path", path("/v1/models HTTP/1.1\r\nhost: a\r\n\r\nGET /v1/hidden")),
        ("LF in the path", path("/v1/mod\nels")),
        ("CR in the path", path("/v1/mod\rels")),
        ("NUL in the path", path("/v1/mod\0els")),
        ("a tab in the path", path("/v1/mod\tels")),
        ("DEL in the path", path("/v1/mod\x7fels")),
        ("no path", path("")),
        ("a path without a slash", path("v1/models")),
        ("an asterisk", path("*")),
        ("an absolute path", path("http://weir.test/v1/models")),
        ("a path out of /v1", path("/v1/../admin")),
        ("a path out of /v1, encoded", path("/v1/%2e%2e/admin")),
        ("no method", method("")),
        ("a space in the method", method("GET /v1/hidden HTTP/1.1\r\n")),
        ("CRLF in the method", method("GET\r\nx-a: 1")),
        ("NUL in the method", method("GE\0T")),
        ("CONNECT", method("CONNECT")),
        ("CRLF in the authority", authority("weir.test\r\nx-a: 1")),
        ("a space in the authority", authority("weir test")),
        ("a path in the authority", authority("weir.test/v1")),
        ("a name before the authority", authority("user@weir.test")),
        ("NUL in the authority", authority("weir\0test")),
        ("CRLF in the scheme", pseudo("GET", "http\r\nx-a: 1", "weir.test", "/v1/models")),
        ("a scheme that is none", pseudo("GET", "ht tp", "weir.test", "/v1/models")),
    ])
    .await;
}

#[tokio::test]
async fn pseudo_headers_that_are_missing_doubled_unknown_or_late_are_refused() {
    let with = |fields: &[(&str, &str)]| request(fields, END_STREAM);
    let good = head("GET", "/v1/models", &[]);
    let without = |name: &str| with(&good.iter().filter(|(it, _)| *it != name).copied().collect::<Vec<_>>());
    let and = |more: (&'static str, &'static str)| with(&[&good[..], &[more]].concat());
    go_no_further(vec![
        ("no method", without(":method")),
        ("no scheme", without(":scheme")),
        ("no path", without(":path")),
        ("two methods", and((":method", "GET"))),
        ("two paths", and((":path", "/v1/models"))),
        ("two schemes", and((":scheme", "http"))),
        ("two authorities", and((":authority", "weir.test"))),
        ("an unknown one", and((":x", "1"))),
        ("a status", and((":status", "200"))),
        ("a protocol", and((":protocol", "websocket"))),
        ("one behind a field", with(&[&[("x-a", "1")], &good[..]].concat())),
        ("the path last, behind a field", with(&[&good[..3], &[("x-a", "1"), good[3]]].concat())),
        ("upper case", with(&[&good[..3], &[(":Path", "/v1/models")]].concat())),
    ])
    .await;
}

#[tokio::test]
async fn malformed_fields_and_those_of_one_connection_are_refused() {
    let and =
        |name: &'static str, value: &'static str| request(&head("GET", "/v1/models", &[(name, value)]), END_STREAM);
    go_no_further(vec![
        ("CRLF in a value", and("x-a", "1\r\nx-b: 2")),
        ("LF in a value", and("x-a", "1\n2")),
        ("CR in a value", and("x-a", "1\r2")),
        ("NUL in a value", and("x-a", "1\x002")),
        ("a bell in a value", and("x-a", "1\x072")),
        ("an upper-case name", and("X-A", "1")),
        ("a space in a name", and("x a", "1")),
        ("a colon in a name", and("x:a", "1")),
        ("CRLF in a name", and("x-a: 1\r\nx-b", "1")),
        ("no name", and("", "1")),
        ("a name that is not ASCII", and("x-ä", "1")),
        ("connection", and("connection", "close")),
        ("connection that names a field", and("connection", "authorization")),
        ("keep-alive", and("keep-alive", "timeout=5")),
        ("proxy-connection", and("proxy-connection", "keep-alive")),
        ("upgrade", and("upgrade", "websocket")),
        ("transfer-encoding", and("transfer-encoding", "chunked")),
        ("TE that is not trailers", and("te", "gzip")),
        ("a host of another name", and("host", "elsewhere.test")),
        ("a malformed host", and("host", "a b")),
        ("two hosts", request(&head("GET", "/v1/models", &[("host", "weir.test"), ("host", "weir.test")]), END_STREAM)),
    ])
    .await;
}

#[tokio::test]
async fn a_length_that_the_data_belies_is_refused() {
    let post = |length: &'static str, flags: u8, data: &[u8]| {
        [request(&head("POST", "/v1/files", &[("content-length", length)]), flags), data.to_vec()].concat()
    };
    let data = |flags: u8, payload: &str| frame(DATA, flags, 1, payload);
    go_no_further(vec![
        ("more data", post("3", 0, &data(END_STREAM, "hello"))),
        ("more data, in frames", post("3", 0, &[data(0, "hel"), data(END_STREAM, "lo")].concat())),
        ("less data", post("9", 0, &data(END_STREAM, "hello"))),
        ("no data", post("5", END_STREAM, b"")),
        (
            "less data and trailers",
            post(
                "9",
                0,
                &[data(0, "hello"), frame(HEADERS, END_STREAM | END_HEADERS, 1, block(&[("x-a", "1")]))].concat(),
            ),
        ),
        ("a word", post("five", 0, &data(END_STREAM, "hello"))),
        ("a plus", post("+5", 0, &data(END_STREAM, "hello"))),
        ("a list", post("5, 5", 0, &data(END_STREAM, "hello"))),
        (
            "two that differ",
            [
                request(&head("POST", "/v1/files", &[("content-length", "5"), ("content-length", "6")]), 0),
                data(END_STREAM, "hello"),
            ]
            .concat(),
        ),
        ("beyond 64 bits", post("18446744073709551621", 0, &data(END_STREAM, "hello"))),
    ])
    .await;
}

#[tokio::test]
async fn frames_that_make_no_sense_end_the_stream_or_the_connection() {
    let good = block(&head("GET", "/v1/models", &[]));
    let open = request(&head("POST", "/v1/files", &[]), 0);
    let behind = |bytes: Vec<u8>| [open.clone(), bytes].concat();
    let mut out_of_range = block(&head("GET", "/v1/models", &[]));
    out_of_range.push(0xff);
    go_no_further(vec![
        ("a frame beyond 16 KiB", behind(frame(DATA, END_STREAM, 1, vec![b'x'; 16_385]))),
        ("a head on stream 0", frame(HEADERS, END_HEADERS | END_STREAM, 0, &good)),
        ("a head on an even stream", frame(HEADERS, END_HEADERS | END_STREAM, 2, &good)),
        ("data on stream 0", frame(DATA, END_STREAM, 0, "x")),
        ("data on an idle stream", frame(DATA, END_STREAM, 1, "x")),
        ("a reset of an idle stream", frame(RST_STREAM, 0, 1, 8_u32.to_be_bytes())),
        ("a reset of three bytes", behind(frame(RST_STREAM, 0, 1, [0; 3]))),
        ("a window for an idle stream", frame(WINDOW_UPDATE, 0, 1, 1_u32.to_be_bytes())),
        ("a window of nothing", behind(frame(WINDOW_UPDATE, 0, 1, 0_u32.to_be_bytes()))),
        ("a window of nothing for all", frame(WINDOW_UPDATE, 0, 0, 0_u32.to_be_bytes())),
        ("a window beyond 31 bits", behind(frame(WINDOW_UPDATE, 0, 1, 0x7fff_ffff_u32.to_be_bytes()))),
        ("a window beyond 31 bits for all", frame(WINDOW_UPDATE, 0, 0, 0x7fff_ffff_u32.to_be_bytes())),
        ("settings of five bytes", frame(SETTINGS, 0, 0, [0; 5])),
        ("settings on a stream", frame(SETTINGS, 0, 1, [])),
        ("an impossible window in the settings", frame(SETTINGS, 0, 0, [0, 4, 0xff, 0xff, 0xff, 0xff])),
        ("an impossible frame size in the settings", frame(SETTINGS, 0, 0, [0, 5, 0, 0, 0, 1])),
        ("a ping of seven bytes", frame(PING, 0, 0, [0; 7])),
        ("a ping on a stream", frame(PING, 0, 1, [0; 8])),
        ("a promise", frame(PUSH_PROMISE, END_HEADERS, 1, [&[0, 0, 0, 2], &good[..]].concat())),
        ("a continuation of nothing", frame(CONTINUATION, END_HEADERS, 1, &good)),
        ("another frame within a head", [frame(HEADERS, END_STREAM, 1, &good), frame(PING, 0, 0, [0; 8])].concat()),
        (
            "a continuation of another",
            [frame(HEADERS, END_STREAM, 1, &good), frame(CONTINUATION, END_HEADERS, 3, [])].concat(),
        ),
        ("padding beyond the frame", behind(frame(DATA, END_STREAM | PADDED, 1, [9, b'x']))),
        ("padding beyond the head", frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, [&[255], &good[..]].concat())),
        ("a priority of four bytes", frame(PRIORITY, 0, 1, [0; 4])),
        ("an index of nothing", frame(HEADERS, END_HEADERS | END_STREAM, 1, [0x80])),
        ("an index out of range", frame(HEADERS, END_HEADERS | END_STREAM, 1, out_of_range)),
        ("a string beyond the block", frame(HEADERS, END_HEADERS | END_STREAM, 1, [0, 100, b'x'])),
        (
            "a length that never ends",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, [&[0, 0x7f][..], &[0xff; 20]].concat()),
        ),
        ("data before the head", frame(DATA, 0, 1, "GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")),
    ])
    .await;
}

#[tokio::test]
async fn a_head_beyond_bounds_is_refused() {
    let long = "x".repeat(12 << 10);
    let mut frames = frame(HEADERS, END_STREAM, 1, block(&head("GET", "/v1/models", &[])));
    for _ in 0..9 {
        frames.extend(frame(CONTINUATION, 0, 1, block(&[("x-long", &long)])));
    }
    frames.extend(frame(CONTINUATION, END_HEADERS, 1, []));
    // One long field that is kept in the table, and then named again and again by a byte.
    let mut bomb = block(&head("GET", "/v1/models", &[]));
    bomb.push(0x40);
    string(&mut bomb, b"x-bomb");
    string(&mut bomb, &[b'x'; 4000]);
    bomb.extend([0xbe; 8000]);
    go_no_further(vec![
        ("many long fields", frames),
        ("a field named again and again", frame(HEADERS, END_HEADERS | END_STREAM, 1, bomb)),
    ])
    .await;
}

#[tokio::test]
async fn an_upload_that_is_reset_breaks_off_at_the_gateway_too() {
    let world = World::fine().await;
    let mut client = Http2::begin(world.socket().await, &[]).await;
    client.headers(1, &head("POST", "/v1/files", &[("content-length", "9000000")]), 0).await;
    client.upload(1, 2 << 20).await;
    world.upstream.has_received(3 << 19).await;
    client.write(frame(RST_STREAM, 0, 1, 8_u32.to_be_bytes())).await;
    world.upstream.saw_closed(0).await;
    let received = world.upstream.received();
    assert!(received.starts_with("POST /v1/files HTTP/1.1\r\n") && received.len() < 9_000_000);
    world.is_well("a reset upload").await;
}

#[tokio::test]
async fn a_preface_that_is_none_is_refused() {
    for bytes in [
        &b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\nhost: a\r\n\r\n",
        b"PRI /v1/models HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let world = World::new("[server]\nheader_timeout = \"200ms\"\n", |_| vec![send(FINE)]).await;
        let mut client = world.client().await;
        client.write(bytes).await;
        client.rest().await;
        assert_eq!(world.upstream.received(), "");
        world.is_well("no preface").await;
    }
}
