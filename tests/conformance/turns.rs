//! Requests that follow each other on a client's connection, and when that is closed.

use crate::client::{Closed, End};
use crate::upstream::{Act, FINE, chunked, ok, send};
use crate::world::{FORWARDED, GET, World};

fn get(number: usize, fields: &str) -> String {
    format!("GET /v1/files/{number} HTTP/1.1\r\nhost: weir.test\r\n{fields}\r\n")
}

fn asked(number: usize) -> String {
    format!("GET /v1/files/{number} HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\n\r\n")
}

/// Answers each request with its number.
fn numbers(number: usize) -> Vec<Act> {
    vec![send(ok(&format!("content-length: {}", number.to_string().len()), &number.to_string()))]
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_their_order() {
    for count in [2, 3, 20] {
        let world = World::new("", numbers).await;
        let mut client = world.client().await;
        client.write((0..count).map(|number| get(number, "")).collect::<String>()).await;
        for number in 0..count {
            assert_eq!(client.answer().await.expect("an answer").text(), number.to_string());
        }
        assert_eq!(world.upstream.received(), (0..count).map(asked).collect::<String>());
        assert_eq!(world.upstream.connections().len(), 1, "one after the other");
        world.holds_nothing("pipelined").await;
    }
}

#[tokio::test]
async fn a_pipelined_request_is_not_sent_before_the_one_before_it_is_answered() {
    let world = World::new("", |number| if number == 0 { vec![Act::Gate, send(FINE)] } else { vec![send(FINE)] }).await;
    let mut client = world.client().await;
    client.write(get(0, "") + &get(1, "")).await;
    world.upstream.saw(1).await;
    assert_eq!(world.upstream.received(), asked(0));
    world.upstream.go_on();
    for _ in 0..2 {
        assert_eq!(client.answer().await.expect("an answer").text(), "fine");
    }
    assert_eq!(world.upstream.received(), asked(0) + &asked(1));
}

#[tokio::test]
async fn bodies_and_refusals_between_pipelined_requests_keep_their_places() {
    let world = World::fine().await;
    let mut client = world.client().await;
    let body = "GET /v1/hidden HTTP/1.1\r\nhost: weir.test\r\n\r\n";
    let length = body.len();
    let post = format!("POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ncontent-length: {length}\r\n\r\n{body}");
    let unknown = get(1, "").replace("/v1", "/v2");
    let chunks = "POST /admin HTTP/1.1\r\nhost: weir.test\r\ntransfer-encoding: chunked\r\n\r\n5\r\nGET /\r\n0\r\n\r\n";
    client.write([&get(0, ""), &post, &unknown, chunks, &get(2, "")].concat()).await;
    let mut statuses = Vec::new();
    for _ in 0..5 {
        statuses.push(client.answer().await.expect("an answer").status);
    }
    assert_eq!(statuses, [200, 200, 404, 404, 200]);
    let posted = "POST /v1/files HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\ncontent-length:";
    let posted = format!("{posted} {length}\r\n\r\n{body}");
    assert_eq!(world.upstream.received(), asked(0) + &posted + &asked(2));
    world.holds_nothing("between").await;
}

#[tokio::test]
async fn behind_a_request_that_cannot_be_read_nothing_is_read() {
    let world = World::fine().await;
    let mut client = world.client().await;
    client.write(get(0, "") + &get(1, "x : 1\r\n") + &get(2, "")).await;
    let mut statuses = Vec::new();
    while let Some(answer) = client.answer().await {
        statuses.push(answer.status);
    }
    assert_eq!((statuses, world.upstream.received()), (vec![200, 400], asked(0)));
    world.is_well("malformed between").await;
}

#[tokio::test]
async fn behind_a_request_that_closes_nothing_is_read() {
    for close in
        ["connection: close\r\n", "Connection: x, CLOSE\r\n", "connection: keep-alive\r\nconnection: close\r\n"]
    {
        let world = World::fine().await;
        let mut client = world.client().await;
        client.write(get(0, close) + &get(1, "")).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.text().as_str(), answer.values("connection")), ("fine", vec!["close"]), "{close:?}");
        client.is_closed(close).await;
        assert_eq!(world.upstream.received(), asked(0));
        world.is_well(close).await;
    }
}

#[tokio::test]
async fn http_1_0_is_kept_alive_only_where_it_asks_for_it_and_gets_no_chunks() {
    let old = |number: usize, fields: &str| get(number, fields).replace("HTTP/1.1", "HTTP/1.0");
    let world = World::fine().await;
    let mut client = world.client().await;
    client.write(old(0, "") + &old(1, "")).await;
    let answer = client.answer().await.expect("an answer");
    assert!(answer.head.starts_with("HTTP/1.0 200 ") && answer.end == End::Length, "{}", answer.head);
    client.is_closed("HTTP/1.0").await;

    let mut client = world.client().await;
    client.write(old(2, "connection: keep-alive\r\n") + &old(3, "")).await;
    let answer = client.answer().await.expect("an answer");
    assert_eq!((answer.text().as_str(), answer.values("connection")), ("fine", vec!["keep-alive"]));
    assert_eq!(client.answer().await.expect("a second answer").text(), "fine");
    client.is_closed("HTTP/1.0").await;
    let expected: String = [0, 2, 3].map(|number| asked(number).replace("1.1 weir", "1.0 weir")).concat();
    assert_eq!(sorted(&world.upstream.received()), sorted(&expected));

    // Without a length there is no end but the connection's.
    let chunks = ok("transfer-encoding: chunked", "5\r\nhello\r\n0\r\n\r\n");
    let world = World::new("", move |_| vec![send(&chunks)]).await;
    let mut client = world.client().await;
    client.write(old(0, "connection: keep-alive\r\n")).await;
    let answer = client.answer().await.expect("an answer");
    assert_eq!((answer.text().as_str(), answer.end), ("hello", End::Close), "{}", answer.head);
    assert!(answer.values("transfer-encoding").is_empty(), "{}", answer.head);
}

/// Lines in an order that does not depend on which connection they came over.
fn sorted(text: &str) -> Vec<&str> {
    let mut requests: Vec<&str> = text.split_inclusive("\r\n\r\n").collect();
    requests.sort_unstable();
    requests
}

/// The only end that such a body can have is the connection's, so what breaks off must not end like that.
#[tokio::test]
async fn an_answer_to_http_1_0_that_breaks_off_does_not_end_in_good_order() {
    let world = World::new("", |_| vec![send(chunked("4\r\nhalf\r\n")), Act::Close]).await;
    let answer = world.answer_to("GET /v1/files/a HTTP/1.0\r\n\r\n").await;
    assert_eq!((answer.text().as_str(), answer.end), ("half", End::Broken), "{}", answer.head);
}

#[tokio::test]
async fn a_client_that_has_said_all_is_still_answered() {
    let world = World::new("", |_| vec![Act::Gate, send(FINE)]).await;
    let mut client = world.client().await;
    client.write(GET.repeat(2)).await;
    world.upstream.saw(1).await;
    world.upstream.go_on();
    assert_eq!(client.answer().await.expect("an answer").text(), "fine");
    world.upstream.saw(2).await;
    world.upstream.go_on();
    assert_eq!(client.answer().await.expect("a second answer").text(), "fine");
    client.finish().await;
    assert_eq!(client.rest().await, (vec![], Closed::Cleanly));
    assert_eq!(world.upstream.received(), FORWARDED.repeat(2));
}
