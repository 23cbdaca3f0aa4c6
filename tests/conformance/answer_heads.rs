//! The heads of the gateway's answers: what is refused, what is put right, what passes, and what stays behind.

use crate::client::End;
use crate::message::escaped;
use crate::upstream::{Act, FINE, chunked, ok, send};
use crate::world::{FORWARDED, GET, Named, World, each, named, within};

/// A world whose gateway says this to the first request.
async fn world(says: impl AsRef<[u8]>, last: Option<Act>) -> World {
    let first: Vec<Act> = [send(says)].into_iter().chain(last).collect();
    World::new("", move |number| if number == 0 { first.clone() } else { vec![send(FINE)] }).await
}

/// The gateway says what is no answer: the client gets a 502 on a connection that goes on, and the gateway's connection is
/// closed.
async fn is_refused(name: String, says: Vec<u8>, last: Option<Act>) {
    let world = world(&says, last).await;
    let mut client = world.client().await;
    client.write(GET).await;
    let answer = client.answer().await.expect("an answer");
    assert_eq!(answer.status, 502, "{} is answered with {}", escaped(&says), answer.head);
    assert!(["upstream_invalid_response", "upstream_disconnected"].contains(&&*answer.code()), "{}", answer.text());
    world.upstream.saw_closed(0).await;
    client.write(GET).await;
    let second = client.answer().await.expect("a second answer");
    assert_eq!((second.status, second.text().as_str()), (200, "fine"));
    assert_eq!(world.upstream.received(), FORWARDED.repeat(2));
    assert_eq!(world.upstream.connections().len(), 2);
    world.is_well(&name).await;
}

fn refused<'c>(cases: impl IntoIterator<Item = (&'c str, impl Into<Vec<u8>>)>) -> Vec<Named> {
    cases.into_iter().map(|(name, says)| named(name, is_refused(name.to_owned(), says.into(), None))).collect()
}

#[tokio::test]
async fn what_is_not_http_1_is_a_bad_gateway() {
    each(refused([
        ("a word", &b"garbage\r\n\r\n"[..]),
        ("another protocol", b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
        ("TLS", b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n"),
        ("NUL", b"\0\0\0\0\0\0\0\0\r\n\r\n"),
        ("HTTP/0.9", b"<html>fine</html>\r\n\r\n"),
        ("HTTP/2 in the status line", b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("HTTP/2 frames", b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0\r\n\r\n"),
        ("HTTP/1.2", b"HTTP/1.2 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("HTTP/0.9 in the status line", b"HTTP/0.9 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("HTTP/1.10", b"HTTP/1.10 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("lower case", b"http/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("no version", b"200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("no slash", b"HTTP 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("a space before", b" HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("two spaces", b"HTTP/1.1  200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("a tab", b"HTTP/1.1\t200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("no status", b"HTTP/1.1\r\ncontent-length: 0\r\n\r\n"),
        ("a status of two digits", b"HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n"),
        ("a status of four digits", b"HTTP/1.1 2000 OK\r\ncontent-length: 0\r\n\r\n"),
        ("a status in letters", b"HTTP/1.1 2x0 OK\r\ncontent-length: 0\r\n\r\n"),
        ("a negative status", b"HTTP/1.1 -20 OK\r\ncontent-length: 0\r\n\r\n"),
        ("status 099", b"HTTP/1.1 099 OK\r\ncontent-length: 0\r\n\r\n"),
        ("a request", b"GET /v1/files/a HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("CR in the reason", b"HTTP/1.1 200 O\rK\r\ncontent-length: 0\r\n\r\n"),
        ("NUL in the reason", b"HTTP/1.1 200 O\0K\r\ncontent-length: 0\r\n\r\n"),
    ]))
    .await;
}

#[tokio::test]
async fn a_malformed_field_is_a_bad_gateway() {
    let with = |fields: &[u8]| [b"HTTP/1.1 200 OK\r\n", fields, b"\r\ncontent-length: 4\r\n\r\nevil"].concat();
    each(refused([
        ("no colon", with(b"x-a")),
        ("no name", with(b": 1")),
        ("a space in the name", with(b"x a: 1")),
        ("a space before the colon", with(b"x-a : 1")),
        ("a tab before the colon", with(b"x-a\t: 1")),
        ("a space before the colon of the length", with(b"content-length : 9")),
        ("a space before the colon of chunks", with(b"transfer-encoding : chunked")),
        ("a folded value", with(b"x-a: 1\r\n 2")),
        ("a folded value, by a tab", with(b"x-a: 1\r\n\t2")),
        ("a folded length", with(b"content-length:\r\n 4")),
        ("a space before the first name", with(b" x-a: 1")),
        ("NUL in a value", with(b"x-a: 1\x002")),
        ("CR in a value", with(b"x-a: 1\r2")),
        ("CR before a name", with(b"\rx-a: 1")),
        ("a bell in a value", with(b"x-a: 1\x072")),
        ("DEL in a value", with(b"x-a: 1\x7f2")),
        ("NUL in a name", with(b"x\0a: 1")),
        ("a name that is not ASCII", with("x-ä: 1".as_bytes())),
        ("a name in quotes", with(b"\"x\": 1")),
    ]))
    .await;
}

#[tokio::test]
async fn a_length_that_is_none_is_a_bad_gateway() {
    let with = |fields: &str| ok(fields, "hello");
    each(refused([
        ("a plus", with("content-length: +5")),
        ("a minus", with("content-length: -5")),
        ("hexadecimal", with("content-length: 0x5")),
        ("a word", with("content-length: five")),
        ("nothing", with("content-length:")),
        ("two with a space", with("content-length: 5 5")),
        ("a fraction", with("content-length: 5.0")),
        ("an underscore", with("content-length: 0_5")),
        ("an empty item", with("content-length: 5,")),
        ("a list that differs", with("content-length: 5, 6")),
        ("two that differ", with("content-length: 5\r\ncontent-length: 6")),
        ("two, one malformed", with("content-length: 5\r\ncontent-length: x")),
        ("beyond 64 bits", with("content-length: 18446744073709551621")),
        ("all of 64 bits", with("content-length: 18446744073709551615")),
        ("chunks in HTTP/1.0", "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned()),
    ]))
    .await;
}

/// A coding that is not taken off cannot be named to the client, since the field is for one connection only: what it would
/// get is not the answer.
#[tokio::test]
async fn a_transfer_coding_that_weir_does_not_know_is_a_bad_gateway() {
    let with = |fields: &str| ok(fields, "5\r\nhello\r\n0\r\n\r\n");
    each(refused([
        ("gzip below chunks", with("transfer-encoding: gzip, chunked")),
        ("gzip below chunks, in two fields", with("transfer-encoding: gzip\r\ntransfer-encoding: chunked")),
        ("gzip", with("transfer-encoding: gzip")),
        ("identity", with("transfer-encoding: identity")),
        ("chunks below identity", with("transfer-encoding: chunked, identity")),
        ("chunks twice", with("transfer-encoding: chunked, chunked")),
        ("chunks twice, in two fields", with("transfer-encoding: chunked\r\ntransfer-encoding: chunked")),
        ("xchunked", with("transfer-encoding: xchunked")),
        ("chunked in quotes", with("transfer-encoding: \"chunked\"")),
        ("chunked with a parameter", with("transfer-encoding: chunked;q=1")),
        ("a vertical tab", with("transfer-encoding: \x0bchunked")),
        ("nothing", with("transfer-encoding:")),
        ("an unknown one and a length", with("transfer-encoding: x\r\ncontent-length: 5")),
    ]))
    .await;
}

#[tokio::test]
async fn a_connection_that_ends_before_its_answer_is_a_bad_gateway() {
    let cases = [
        ("at once", "", Act::Close),
        ("at once, reset", "", Act::Reset),
        ("in the status line", "HTTP/1.1 20", Act::Close),
        ("in a field", "HTTP/1.1 200 OK\r\ncontent-le", Act::Close),
        ("in a field, reset", "HTTP/1.1 200 OK\r\ncontent-le", Act::Reset),
        ("before the blank line", "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n", Act::Close),
        ("behind an informational answer", "HTTP/1.1 103 Early Hints\r\n\r\n", Act::Close),
    ];
    each(cases.map(|(name, says, last)| named(name, is_refused(name.to_owned(), says.into(), Some(last))))).await;
}

#[tokio::test]
async fn a_head_beyond_bounds_is_a_bad_gateway_and_a_long_one_is_not() {
    let bomb = |bytes: usize| ok(&format!("x-bomb: {}\r\ncontent-length: 4", "x".repeat(bytes)), "fine");
    let many = |number: usize| {
        let fields: String = (0..number - 1).map(|number| format!("x-{number}: 1\r\n")).collect();
        ok(&format!("{fields}content-length: 4"), "fine")
    };
    each(refused([
        ("1 MiB", bomb(1 << 20)),
        ("101 fields", many(101)),
        ("a line that does not end", "HTTP/1.1 200 OK\r\nx-a: ".to_owned() + &"x".repeat(1 << 20)),
    ]))
    .await;
    for says in [bomb(60 << 10), many(100)] {
        let world = world(says, None).await;
        let answer = world.answer_to(GET).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "fine"));
        world.is_well("a long head").await;
    }
}

#[tokio::test]
async fn what_is_odd_but_plain_is_put_right() {
    let length = "content-length: 5";
    for (says, fields) in [
        ("HTTP/1.1 200 OK\nx-a: 1\ncontent-length: 5\n\nhello", &["x-a: 1", length][..]),
        ("\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", &[length]),
        ("HTTP/1.1 200 OK\r\nX-A:\t 1 \t\r\nx-b:\r\ncontent-length: 5\r\n\r\nhello", &["x-a: 1", "x-b: ", length]),
        ("HTTP/1.1 200 OK\r\ncontent-length: 005\r\n\r\nhello", &[length]),
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello", &[length]),
        ("HTTP/1.1 200 OK\r\ncontent-length: 5, 5\r\n\r\nhello", &[length]),
    ] {
        let world = world(says, None).await;
        let answer = world.answer_to(GET).await;
        assert_eq!((answer.passed_fields(), answer.text().as_str()), (fields.to_vec(), "hello"), "{says:?}");
        world.is_well(says).await;
    }
}

#[tokio::test]
async fn both_framings_are_one_and_the_length_is_dropped() {
    for fields in [
        "transfer-encoding: chunked\r\ncontent-length: 3",
        "content-length: 3\r\ntransfer-encoding: chunked",
        "content-length: 3\r\ntransfer-encoding: chunked\r\ncontent-length: 4",
        "content-length: x\r\ntransfer-encoding: chunked",
    ] {
        let world = world(ok(fields, "5\r\nhello\r\n0\r\n\r\n"), None).await;
        let mut client = world.client().await;
        client.write(GET.repeat(2)).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.text().as_str(), answer.end), ("hello", End::Chunks), "{fields}");
        assert_eq!(client.answer().await.expect("a second answer").text(), "fine", "{fields}");
        world.is_well(fields).await;
    }
}

/// It may be the one half of an attack on whoever shares the connection.
#[tokio::test]
async fn a_connection_with_both_framings_is_not_used_again() {
    let world = world(ok("content-length: 3\r\ntransfer-encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"), None).await;
    world.answer_to(GET).await;
    world.upstream.saw_closed(0).await;
}

#[tokio::test]
async fn an_answer_that_can_have_no_body_ends_at_its_head_and_its_connection_is_used_again() {
    for (method, says, status, fields) in [
        ("GET", "204 No Content\r\n", 204, &[][..]),
        ("GET", "204 No Content\r\ncontent-length: 0\r\n", 204, &[]),
        ("GET", "204 No Content\r\ncontent-length: 9\r\n", 204, &[]),
        ("GET", "204 No Content\r\ntransfer-encoding: chunked\r\n", 204, &[]),
        ("GET", "304 Not Modified\r\netag: \"a\"\r\n", 304, &["etag: \"a\""]),
        // It may say how long the answer would be, and need not.
        ("GET", "304 Not Modified\r\ncontent-length: 9\r\n", 304, &[]),
        ("GET", "304 Not Modified\r\ntransfer-encoding: chunked\r\n", 304, &[]),
        ("HEAD", "200 OK\r\ncontent-length: 9\r\n", 200, &["content-length: 9"]),
        ("HEAD", "200 OK\r\ncontent-length: 0\r\n", 200, &["content-length: 0"]),
        ("HEAD", "200 OK\r\ntransfer-encoding: chunked\r\n", 200, &[]),
        ("HEAD", "200 OK\r\nx-a: 1\r\n", 200, &["x-a: 1"]),
        ("HEAD", "404 Not Found\r\ncontent-length: 9\r\n", 404, &["content-length: 9"]),
        ("HEAD", "200 OK\r\ncontent-length: 009\r\n", 200, &["content-length: 9"]),
        ("HEAD", "200 OK\r\ncontent-length: 9, 9\r\n", 200, &["content-length: 9"]),
        ("HEAD", "200 OK\r\ncontent-length: 8, 9\r\n", 200, &[]),
        ("HEAD", "200 OK\r\ncontent-length: +9\r\n", 200, &[]),
        ("HEAD", "204 No Content\r\n", 204, &[]),
    ] {
        let world = world(format!("HTTP/1.1 {says}\r\n"), None).await;
        let case = format!("{method}: {says:?}");
        let mut client = world.client().await;
        client.write(format!("{method} /v1/files/a HTTP/1.1\r\nhost: weir.test\r\n\r\n{GET}")).await;
        let answer = client.answer_to(method).await.expect("an answer");
        let seen: Vec<_> =
            answer.passed_fields().into_iter().filter(|field| *field != "transfer-encoding: chunked").collect();
        assert_eq!(
            (answer.status, seen, answer.end),
            (status, fields.to_vec(), End::NoBody),
            "{case}: {}",
            answer.head
        );
        if method != "HEAD" {
            assert_eq!(answer.values("transfer-encoding"), [""; 0], "{case}");
        }
        let second = client.answer().await.expect("a second answer");
        assert_eq!((second.status, second.text().as_str()), (200, "fine"), "{case}");
        assert_eq!(world.upstream.connections().len(), 1, "{case}");
        let first = format!("{method}{}", FORWARDED.trim_start_matches("GET"));
        assert_eq!(world.upstream.received(), first + FORWARDED, "{case}");
        world.is_well(&case).await;
    }
}

/// RFC 9110, 15.2, would have a proxy pass them on; hyper's server has no way to send one.
#[tokio::test]
async fn informational_answers_are_passed_over_and_the_answer_is_the_one_behind_them() {
    let flood = "HTTP/1.1 102 Processing\r\n\r\n".repeat(10_000);
    for before in [
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 100\r\n\r\n",
        "HTTP/1.0 100 Continue\r\n\r\n",
        "HTTP/1.1 102 Processing\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n",
        "HTTP/1.1 199 What\r\ncontent-length: 9\r\n\r\n",
        "HTTP/1.1 100 Continue\r\ntransfer-encoding: chunked\r\n\r\n",
        "HTTP/1.1 100 Continue\r\nconnection: close\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n",
        &flood,
    ] {
        let case = before[..before.len().min(50)].to_owned();
        let says = [send(before), send(ok("x-a: 1\r\ncontent-length: 5", "hello"))];
        let world = World::new("", move |number| if number == 0 { says.to_vec() } else { vec![send(FINE)] }).await;
        let mut client = world.client().await;
        client.write(GET.repeat(2)).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.text().as_str(), answer.informational.len()), (200, "hello", 0), "{case}");
        assert_eq!(answer.passed_fields(), ["x-a: 1", "content-length: 5"], "{case}");
        assert_eq!(client.answer().await.expect("a second answer").text(), "fine", "{case}");
        assert_eq!((world.upstream.received(), world.upstream.connections().len()), (FORWARDED.repeat(2), 1), "{case}");
        world.is_well(&case).await;
    }
}

#[tokio::test]
async fn informational_answers_without_an_end_are_not_waited_for_without_an_end() {
    let config = "[timeouts]\nresponse = \"300ms\"\n";
    let world = World::new(config, |number| match number {
        0 => [vec![send("HTTP/1.1 102 Processing\r\n\r\n"); 100], vec![Act::Stall]].concat(),
        _ => vec![send(FINE)],
    })
    .await;
    let answer = world.answer_to(GET).await;
    assert_eq!((answer.status, answer.code().as_str()), (504, "response_timeout"));
    world.upstream.saw_closed(0).await;
    world.is_well("102 for ever").await;
}

#[tokio::test]
async fn a_switch_of_protocols_is_a_bad_gateway_and_nothing_is_tunnelled() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nsecret";
    let with_length = "HTTP/1.1 101 Switching Protocols\r\ncontent-length: 6\r\n\r\nsecret";
    let asks = "GET /v1/realtime HTTP/1.1\r\nhost: weir.test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    for (says, asks) in [(switch, GET), (switch, asks), (with_length, asks)] {
        let world = world(says, None).await;
        let mut client = world.client().await;
        client.write(asks).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_invalid_response"));
        assert_eq!((answer.values("upgrade").len(), answer.text().contains("secret")), (0, false));
        world.upstream.saw_closed(0).await;
        client.write(GET).await;
        assert_eq!(client.answer().await.expect("a second answer").text(), "fine");
        let asked = FORWARDED.replace("/v1/files/a", asks.split(' ').nth(1).expect("a target"));
        assert_eq!(world.upstream.received(), asked + FORWARDED);
        world.is_well("101").await;
    }
}

#[tokio::test]
async fn fields_pass_in_their_order_and_those_of_one_connection_stay_behind() {
    let says: &[u8] = b"HTTP/1.1 200 Sure\r\nSet-Cookie: a=1; Path=/\r\nset-cookie: b=2, c\r\nx-list: 1\r\nx-list: 2, 3\r\n\
        X-Odd: \xe4 \"a\"  b\r\nconnection: x-secret, X-Other\r\nconnection: keep-alive\r\nx-secret: 1\r\nx-other: 1\r\n\
        keep-alive: timeout=5\r\nproxy-connection: keep-alive\r\nproxy-authenticate: Basic\r\nte: trailers\r\n\
        upgrade: h2c\r\ncontent-length: 5\r\n\r\nhello";
    let world = world(says, None).await;
    let mut client = world.client().await;
    client.write(GET.repeat(2)).await;
    let answer = client.answer().await.expect("an answer");
    let mut fields = answer.passed_fields();
    fields.sort_unstable();
    let expected = [
        "content-length: 5",
        "set-cookie: a=1; Path=/",
        "set-cookie: b=2, c",
        "x-list: 1",
        "x-list: 2, 3",
        "x-odd: \u{e4} \"a\"  b",
    ];
    assert_eq!(fields, expected);
    assert!(answer.head.starts_with("HTTP/1.1 200 Sure\r\n"), "{}", answer.head);
    assert_eq!(client.answer().await.expect("a second answer").text(), "fine");
    assert_eq!(world.upstream.connections().len(), 1);
}

#[tokio::test]
async fn connection_cannot_name_away_what_delimits_an_answer() {
    for (says, end) in [
        (ok("connection: content-length\r\ncontent-length: 5", "hello"), End::Length),
        (ok("connection: transfer-encoding\r\ntransfer-encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"), End::Chunks),
        (ok("connection: ,, (, \"\r\nconnection: \r\ncontent-length: 5", "hello"), End::Length),
    ] {
        let world = world(says, None).await;
        let mut client = world.client().await;
        client.write(GET.repeat(2)).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.text().as_str(), answer.end), ("hello", end), "{}", answer.head);
        assert_eq!(client.answer().await.expect("a second answer").text(), "fine");
        world.is_well("Connection names the framing").await;
    }
}

#[tokio::test]
async fn what_a_gateway_says_of_its_connection_is_not_said_of_the_clients() {
    let world = world(ok("connection: close\r\ncontent-length: 5", "hello"), None).await;
    let mut client = world.client().await;
    client.write(GET).await;
    let answer = client.answer().await.expect("an answer");
    assert_eq!((answer.text().as_str(), answer.values("connection").len()), ("hello", 0));
    client.write(GET).await;
    assert_eq!(client.answer().await.expect("a second answer").text(), "fine");
}

#[tokio::test]
async fn trailers_are_never_fields_of_the_head() {
    for (says, te) in [
        (chunked("5\r\nhello\r\n0\r\nset-cookie: a=1\r\ncontent-length: 3\r\n\r\n"), ""),
        (ok("trailer: x-sum\r\ntransfer-encoding: chunked", "5\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n"), "te: trailers\r\n"),
    ] {
        let world = world(says, None).await;
        let mut client = world.client().await;
        let asks = format!("GET /v1/files/a HTTP/1.1\r\nhost: weir.test\r\nconnection: te\r\n{te}\r\n");
        client.write(asks + GET).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.text().as_str(), answer.end), ("hello", End::Chunks));
        assert!(["set-cookie", "x-sum", "content-length"].iter().all(|name| answer.values(name).is_empty()));
        assert!(["", "x-sum: 1\r\n"].contains(&&*answer.trailers), "{:?}", answer.trailers);
        assert_eq!(client.answer().await.expect("a second answer").text(), "fine");
        assert_eq!(world.upstream.received(), FORWARDED.repeat(2), "TE is for one connection");
        world.is_well("trailers").await;
    }
}

#[tokio::test]
async fn what_comes_over_an_idle_connection_is_no_answer_to_the_next_request() {
    let evil = "HTTP/1.1 408 Request Timeout\r\ncontent-length: 4\r\n\r\nevil";
    let world = World::new("", move |number| match number {
        0 => vec![send(ok("content-length: 5", "hello")), Act::Gate, send(evil)],
        _ => vec![send(FINE)],
    })
    .await;
    let mut client = world.client().await;
    client.write(GET).await;
    assert_eq!(client.answer().await.expect("an answer").text(), "hello");
    world.upstream.go_on();
    within("weir closes it", world.upstream.saw_closed(0)).await;
    client.write(GET).await;
    let second = client.answer().await.expect("a second answer");
    assert_eq!((second.status, second.text().as_str()), (200, "fine"));
    world.is_well("an answer that nobody asked for").await;
}
