//! Gateways that are slow, or close their connection at a bad moment.

use crate::client::End;
use crate::upstream::{Act, FINE, chunked, ok, send};
use crate::world::{FORWARDED, GET, World};

const POST: &str = "POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 5\r\n\r\nhello";

/// What the gateway is asked with that.
const POSTED: &str = "POST /v1/files HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\ncontent-length: 5\r\n\r\nhello";

#[tokio::test]
async fn an_answer_that_comes_byte_by_byte_is_the_same_answer() {
    for says in [
        ok("x-a: 1\r\ncontent-length: 5", "hello"),
        chunked("5;a=b\r\nhello\r\n0\r\nx-t: 1\r\n\r\n"),
        format!("HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n{}", ok("content-length: 5", "hello")),
    ] {
        let bytes: Vec<Act> = says.bytes().map(|byte| send([byte])).collect();
        let world = World::new("", move |number| if number == 0 { bytes.clone() } else { vec![send(FINE)] }).await;
        let mut client = world.client().await;
        client.write(GET.repeat(2)).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.text().as_str()), (200, "hello"), "{says:?}");
        assert_eq!(client.answer().await.expect("a second answer").text(), "fine", "{says:?}");
        assert_eq!(
            (world.upstream.received(), world.upstream.connections().len()),
            (FORWARDED.repeat(2), 1),
            "{says:?}"
        );
        world.is_well(&says).await;
    }
}

#[tokio::test]
async fn a_gateway_that_stalls_before_its_head_is_through_is_given_up_and_its_connection_closed() {
    for says in ["", "HTTP/1.1 200 OK\r\ncontent-le", "HTTP/1.1 100 Continue\r\n\r\n"] {
        let first = vec![send(says), Act::Stall];
        let script = move |number| if number == 0 { first.clone() } else { vec![send(FINE)] };
        let world = World::new("[timeouts]\nresponse = \"200ms\"\n", script).await;
        let mut client = world.client().await;
        client.write(GET).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.code().as_str()), (504, "response_timeout"), "{says:?}");
        world.upstream.saw_closed(0).await;
        client.write(GET).await;
        assert_eq!(client.answer().await.expect("a second answer").text(), "fine", "{says:?}");
        assert_eq!(world.upstream.received(), FORWARDED.repeat(2), "{says:?}");
        world.is_well(says).await;
    }
}

#[tokio::test]
async fn a_gateway_that_stalls_in_its_body_is_cut_visibly() {
    for says in [
        ok("content-length: 10", "half"),
        chunked("4\r\nhalf\r\n"),
        chunked("a\r\nhalf"),
        chunked("4\r\nhalf\r\n0\r\n"),
        ok("x-a: 1", "half"),
    ] {
        let first = vec![send(&says), Act::Stall];
        let script = move |number| if number == 0 { first.clone() } else { vec![send(FINE)] };
        let world = World::new("[timeouts]\nidle = \"200ms\"\n", script).await;
        let mut client = world.client().await;
        client.write(GET).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.text().as_str(), answer.end), (200, "half", End::Broken), "{says:?}");
        client.is_closed(&says).await;
        world.upstream.saw_closed(0).await;
        assert_eq!(world.upstream.received(), FORWARDED, "{says:?}");
        world.is_well(&says).await;
    }
}

#[tokio::test]
async fn a_connection_that_the_gateway_has_closed_is_not_used_again() {
    for last in [Act::Close, Act::Reset] {
        for asks in [GET, POST] {
            let first = vec![send(ok("content-length: 5", "hello")), Act::Gate, last.clone()];
            let world = World::new("", move |number| if number == 0 { first.clone() } else { vec![send(FINE)] }).await;
            let mut client = world.client().await;
            client.write(GET).await;
            assert_eq!(client.answer().await.expect("an answer").text(), "hello");
            world.upstream.go_on();
            world.upstream.saw_closed(0).await;
            client.write(asks).await;
            let second = client.answer().await.expect("a second answer");
            assert_eq!((second.status, second.text().as_str()), (200, "fine"));
            let asked = if asks == GET { FORWARDED } else { POSTED };
            assert_eq!(world.upstream.received(), FORWARDED.to_owned() + asked);
            world.is_well("closed while idle").await;
        }
    }
}

/// The gateway has closed an idle connection in the very moment in which weir writes to it: what can be repeated is, once
/// and at once, and what cannot is not.
#[tokio::test]
async fn what_meets_a_closing_connection_is_sent_again_if_that_does_no_harm() {
    for last in [Act::Close, Act::Reset] {
        for (asks, forwarded, again) in [(GET, FORWARDED, true), (POST, POSTED, false)] {
            let last = last.clone();
            let world = World::new("", move |number| match number {
                0 => vec![send(ok("content-length: 5", "hello"))],
                1 => vec![last.clone()],
                _ => vec![send(FINE)],
            })
            .await;
            let mut client = world.client().await;
            client.write(GET).await;
            assert_eq!(client.answer().await.expect("an answer").text(), "hello");
            client.write(asks).await;
            let second = client.answer().await.expect("a second answer");
            assert_eq!(second.status, if again { 200 } else { 502 }, "{asks:?}");
            let expected = FORWARDED.to_owned() + &forwarded.repeat(if again { 2 } else { 1 });
            assert_eq!(world.upstream.received(), expected);
            world.is_well("closed while written to").await;
        }
    }
}

/// On a connection of its own there is no doubt: the gateway has had the request.
#[tokio::test]
async fn what_breaks_on_a_new_connection_is_not_sent_again_unasked() {
    for asks in [GET, POST] {
        let world = World::new("", |number| if number == 0 { vec![Act::Close] } else { vec![send(FINE)] }).await;
        let answer = world.answer_to(asks).await;
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_disconnected"));
        assert_eq!(world.upstream.received(), if asks == GET { FORWARDED } else { POSTED });
        world.is_well("closed without an answer").await;
    }
}
