//! How the gateway's answers are delimited: where one ends, whether it is whole, and whether its connection can be used again.

use crate::client::{Client, Closed, End};
use crate::message::escaped;
use crate::upstream::{Act, FINE, chunked, ok, send};
use crate::world::{FINE_FORWARDED, FORWARDED, GET, Named, World, each, named};

/// What becomes of the gateway's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Reused,
    Closed,
}

/// What a gateway says, and what comes of it.
struct Case {
    name: &'static str,
    says: String,
    last: Option<Act>,
    body: &'static str,
    end: End,
    then: Then,
}

fn case(name: &'static str, says: impl Into<String>, body: &'static str, end: End, then: Then) -> Case {
    Case { name, says: says.into(), last: None, body, end, then }
}

impl Case {
    fn and(self, last: Act) -> Self {
        Self { last: Some(last), ..self }
    }

    fn named(self) -> Named {
        named(self.name, self.holds())
    }

    /// Asks, reads the answer, and sees what has become of the gateway's connection by asking once more.
    async fn holds(self) {
        let Self { name, says, last, body, end, then } = self;
        let script: Vec<Act> = [send(&says)].into_iter().chain(last).collect();
        let world = World::new("", move |number| if number == 0 { script.clone() } else { vec![send(FINE)] }).await;
        let mut client = world.client().await;
        client.write(GET).await;
        match client.answer().await {
            Some(answer) => {
                let (status, text) = (answer.status, answer.text());
                assert_eq!((status, text.as_str(), answer.end), (200, body, end), "{name}: {}", answer.head);
                assert_eq!(answer.trailers, "", "{name}");
            }
            // The head waits for the first byte, and is lost when none comes.
            None => assert_eq!((body, end), ("", End::Broken), "{name}: no answer"),
        }
        is_used_again(&world, name, client, then, end == End::Broken).await;
    }
}

/// Sees what becomes of the gateway's first connection, and of the client's.
async fn is_used_again(world: &World, name: &str, mut client: Client, then: Then, broken: bool) {
    if then == Then::Closed {
        world.upstream.saw_closed(0).await;
    }
    if broken {
        client.is_closed(name).await;
        client = world.client().await;
    }
    client.write(GET).await;
    let second = client.answer().await.unwrap_or_else(|| panic!("{name}: no second answer"));
    assert_eq!((second.status, second.text().as_str()), (200, "fine"), "{name}: the second answer");
    assert_eq!(world.upstream.received(), FORWARDED.repeat(2), "{name}");
    let connections = if then == Then::Reused { 1 } else { 2 };
    assert_eq!(world.upstream.connections().len(), connections, "{name}: connections to the gateway");
    world.is_well(name).await;
}

#[tokio::test]
async fn a_whole_answer_passes_whole_and_its_connection_is_used_again() {
    use {End::*, Then::Reused};
    each(
        [
            case("a length", ok("content-length: 5", "hello"), "hello", Length, Reused),
            case("no bytes", ok("content-length: 0", ""), "", Length, Reused),
            case("upper case", ok("CONTENT-LENGTH: 5", "hello"), "hello", Length, Reused),
            case("space around the length", ok("content-length: \t 5 \t ", "hello"), "hello", Length, Reused),
            case("no reason, but its space", "HTTP/1.1 200 \r\ncontent-length: 1\r\n\r\na", "a", Length, Reused),
            case("no reason", "HTTP/1.1 200\r\ncontent-length: 1\r\n\r\na", "a", Length, Reused),
            case("a chunk", chunked("5\r\nhello\r\n0\r\n\r\n"), "hello", Chunks, Reused),
            case("no chunk", chunked("0\r\n\r\n"), "", Chunks, Reused),
            case("several chunks", chunked("2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"), "hello", Chunks, Reused),
            case("upper-case digits", chunked("A\r\n0123456789\r\n0\r\n\r\n"), "0123456789", Chunks, Reused),
            case("leading zeros", chunked("0005\r\nhello\r\n000\r\n\r\n"), "hello", Chunks, Reused),
            case("extensions", chunked("5;a;b=1;c=\"x;y\"\r\nhello\r\n0;z\r\n\r\n"), "hello", Chunks, Reused),
            case("Chunked", ok("Transfer-Encoding: Chunked", "5\r\nhello\r\n0\r\n\r\n"), "hello", Chunks, Reused),
            case("a trailer", chunked("5\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n"), "hello", Chunks, Reused),
            case(
                "a chunk that holds a last chunk",
                chunked("7\r\n0\r\n\r\n\r\n\r\n0\r\n\r\n"),
                "0\r\n\r\n\r\n",
                Chunks,
                Reused,
            ),
        ]
        .into_iter()
        .map(Case::named),
    )
    .await;
}

#[tokio::test]
async fn an_answer_after_which_the_gateway_closes_is_whole_and_its_connection_is_not_used_again() {
    use {End::*, Then::Closed};
    each(
        [
            case("connection: close", ok("content-length: 5\r\nconnection: close", "hello"), "hello", Length, Closed),
            case(
                "close among others",
                ok("content-length: 5\r\nconnection: x, Close", "hello"),
                "hello",
                Length,
                Closed,
            ),
            case("HTTP/1.0", "HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\na", "a", Length, Closed),
            case("no length", ok("x-a: 1", "all of it"), "all of it", Chunks, Closed).and(Act::Close),
            case("no length and no byte", ok("x-a: 1", ""), "", Chunks, Closed).and(Act::Close),
            case("no length in HTTP/1.0", "HTTP/1.0 200 OK\r\n\r\nall", "all", Chunks, Closed).and(Act::Close),
        ]
        .into_iter()
        .map(Case::named),
    )
    .await;
}

#[tokio::test]
async fn an_answer_that_ends_early_or_wrongly_is_broken_for_the_client_too() {
    use {End::Broken, Then::Closed};
    let cut = |name, says: String, body, last| case(name, says, body, Broken, Closed).and(last);
    each(
        [
            cut("a length not met", ok("content-length: 10", "half"), "half", Act::Close),
            cut("a length not met, reset", ok("content-length: 10", "half"), "half", Act::Reset),
            cut("a length and nothing", ok("content-length: 10", ""), "", Act::Close),
            cut("no last chunk", chunked("4\r\nhalf\r\n"), "half", Act::Close),
            cut("no last chunk, reset", chunked("4\r\nhalf\r\n"), "half", Act::Reset),
            cut("no chunk at all", chunked(""), "", Act::Close),
            cut("cut in a chunk", chunked("a\r\nhalf"), "half", Act::Close),
            cut("cut in a chunk's size", chunked("4\r\nhalf\r\n1"), "half", Act::Close),
            cut("the last chunk without its end", chunked("4\r\nhalf\r\n0\r\n"), "half", Act::Close),
            cut("the last chunk with half its end", chunked("4\r\nhalf\r\n0\r\n\r"), "half", Act::Close),
            cut("cut in the trailers", chunked("4\r\nhalf\r\n0\r\nx-a: 1\r\n"), "half", Act::Close),
            cut("LF for the end of the last chunk", chunked("4\r\nhalf\r\n0\r\n\n"), "half", Act::Close),
            cut("LF for the end of the last chunk", chunked("4\r\nhalf\r\n0\r\n\n"), "half", Act::Close),
            cut("no length, reset", ok("x-a: 1", "half"), "half", Act::Reset),
        ]
        .into_iter()
        .map(Case::named),
    )
    .await;
    // The gateway keeps its connection open, and it is weir that ends it.
    let wrong = |name, says: &str| case(name, chunked(&format!("4\r\nhalf\r\n{says}")), "half", Broken, Closed);
    each(
        [
            wrong("no size", "\r\nhalf\r\n"),
            wrong("a word for a size", "five\r\nhello\r\n0\r\n\r\n"),
            wrong("0x", "0x5\r\nhello\r\n0\r\n\r\n"),
            wrong("a negative size", "-5\r\nhello\r\n0\r\n\r\n"),
            wrong("a plus", "+5\r\nhello\r\n0\r\n\r\n"),
            wrong("a size beyond 64 bits", "10000000000000005\r\nhello\r\n0\r\n\r\n"),
            wrong("a size with an underscore", "0_5\r\nhello\r\n0\r\n\r\n"),
            wrong("a space before the size", " 5\r\nhello\r\n0\r\n\r\n"),
            wrong("two sizes", "5 5\r\nhello\r\n0\r\n\r\n"),
            wrong("LF after the size", "5\nhello\r\n0\r\n\r\n"),
            wrong("CR after the size", "5\rhello\r\n0\r\n\r\n"),
            wrong("LF in an extension", "5;a\nhello\r\n0\r\n\r\n"),
            wrong("LF after the last size", "0\n\r\n"),
            wrong("a word after the last size", "0 x\r\n\r\n"),
        ]
        .into_iter()
        .map(Case::named),
    )
    .await;
    let behind = |name, says: &str| case(name, chunked(&format!("4\r\nhalf{says}")), "half", Broken, Closed);
    each(
        [
            behind("no end of the data", "0\r\n\r\n"),
            behind("LF after the data", "\n0\r\n\r\n"),
            behind("more data than the size says", "more\r\n0\r\n\r\n"),
        ]
        .into_iter()
        .map(Case::named),
    )
    .await;
}

#[tokio::test]
async fn bytes_behind_an_answer_are_never_the_next_ones() {
    let evil = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
    for (name, says) in [
        ("behind a length", ok("content-length: 5", "hello")),
        ("behind no bytes", ok("content-length: 0", "")),
        ("behind the last chunk", chunked("5\r\nhello\r\n0\r\n\r\n")),
        ("behind trailers", chunked("5\r\nhello\r\n0\r\nx-a: 1\r\n\r\n")),
        ("behind a 204", "HTTP/1.1 204 No Content\r\n\r\n".to_owned()),
        ("behind a 204 with a length", "HTTP/1.1 204 No Content\r\ncontent-length: 44\r\n\r\n".to_owned()),
        ("behind a 304", "HTTP/1.1 304 Not Modified\r\ncontent-length: 44\r\n\r\n".to_owned()),
        ("behind a 304 with chunks", "HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n".to_owned()),
    ] {
        for evil in [evil, "HTTP/1.1 100 Continue\r\n\r\n", "\r\n", "garbage"] {
            let says = format!("{says}{evil}");
            let world = World::new("", move |number| vec![send(if number == 0 { &says } else { FINE })]).await;
            let mut client = world.client().await;
            // Pipelined: weir asks for the second the moment the first is through.
            client.write(GET.repeat(2)).await;
            let name = format!("{} {name}", escaped(evil.as_bytes()));
            assert!(client.answer().await.is_some_and(|answer| answer.status < 400), "{name}");
            let second = client.answer().await.unwrap_or_else(|| panic!("{name}: no second answer"));
            assert_eq!((second.status, second.text().as_str()), (200, "fine"), "{name}: the second answer");
            assert_eq!(world.upstream.received(), FORWARDED.repeat(2), "{name}");
            assert_eq!(world.upstream.connections().len(), 2, "{name}: connections to the gateway");
            world.is_well(&name).await;
        }
    }
}

#[tokio::test]
async fn an_answer_without_a_length_for_http_1_0_ends_with_the_connection() {
    for says in [ok("x-a: 1", "all of it"), chunked("3\r\nall\r\n6\r\n of it\r\n0\r\n\r\n")] {
        let world = World::new("", move |_| vec![send(&says), Act::Close]).await;
        let mut client = world.client().await;
        client.write("GET /v1/files/a HTTP/1.0\r\n\r\n").await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.text().as_str(), answer.end), ("all of it", End::Close));
        assert!(answer.head.starts_with("HTTP/1.0 200 OK\r\n"), "{}", answer.head);
        assert_eq!(client.rest().await, (vec![], Closed::Cleanly));
        world.holds_nothing("HTTP/1.0").await;
    }
}

#[tokio::test]
async fn a_gateway_of_http_1_0_that_keeps_alive_is_asked_in_weirs_own_version_again() {
    let says = "HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\na";
    case("keep-alive in HTTP/1.0", says, "a", End::Length, Then::Reused).holds().await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_before_its_first_byte_is_an_answer_still() {
    for says in [ok("content-length: 10", ""), chunked("")] {
        let world = World::new("", move |_| vec![send(&says), Act::Close]).await;
        let mut client = world.client().await;
        client.write(GET).await;
        assert!(client.answer().await.is_some(), "the connection is closed without a word");
    }
}

#[tokio::test]
async fn the_harness_knows_what_the_gateway_is_asked() {
    let world = World::fine().await;
    world.is_well("nothing happened").await;
    assert_eq!(world.upstream.received(), FINE_FORWARDED);
}
