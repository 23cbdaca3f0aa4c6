//! A drain: nobody who was let in is turned away, and every connection ends as soon as it can.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body::Body;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use crate::gateway::{Step, answer, chunk, completion, error, event, stream_head};
use crate::world::{CHAT, STREAM, World, chat, collect, join_all, over_http2};

const SECOND: Duration = Duration::from_secs(1);

const GET: &str = "GET /v1/models HTTP/1.1\r\nhost: weir.test\r\n\r\n";

fn post(body: &str) -> String {
    let length = body.len();
    format!("POST /v1/chat/completions HTTP/1.1\r\nhost: weir.test\r\ncontent-length: {length}\r\n\r\n{body}")
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_request_has_a_second_left_and_one_with_a_stream_a_second_after_it() {
    let world = World::new("", |_| vec![stream_head(), event("one"), Step::Gate, Step::Send(b"0\r\n\r\n".to_vec())]);
    let (mut idle, mut silent, mut running) = (world.raw(), world.raw(), world.raw());
    idle.write(GET).await;
    world.gateway.saw(1).await;
    world.gateway.go_on();
    assert_eq!(idle.answer().await.expect("an answer").header("connection"), "");
    running.write(post(STREAM)).await;
    world.gateway.saw(2).await;
    world.settle().await;
    world.drain();
    assert_eq!((idle.rest().await.as_str(), world.elapsed()), ("", 1000));
    assert_eq!((silent.rest().await.as_str(), world.elapsed()), ("", 1000));
    tokio::time::sleep(60 * SECOND).await;
    world.gateway.go_on();
    assert!(running.answer().await.expect("an answer").text().contains("one"));
    assert_eq!((running.rest().await.as_str(), world.elapsed()), ("", 62_000));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_request_that_crosses_the_drain_is_answered_and_ends_its_connection() {
    let world = World::new("", |_| [vec![Step::Wait(30 * SECOND)], completion()].concat());
    let mut kept_alive = world.raw();
    kept_alive.write(post(CHAT)).await;
    assert_eq!(kept_alive.answer().await.expect("an answer").header("connection"), "");
    let mut new = world.raw();
    world.drain();
    tokio::time::sleep(Duration::from_millis(900)).await;
    for client in [&mut kept_alive, &mut new] {
        client.write(post(CHAT)).await;
    }
    for client in [&mut kept_alive, &mut new] {
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.header("connection")), (200, "close"));
        assert_eq!(client.rest().await, "");
    }
    // Their starts are paced. The connections end with the answers, not with a deadline.
    assert!((60_900..61_000).contains(&world.elapsed()), "{}", world.elapsed());
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn who_was_not_told_by_a_stream_that_this_was_the_last_may_ask_once_more() {
    let stream = || vec![stream_head(), event("one"), Step::Wait(10 * SECOND), Step::Send(b"0\r\n\r\n".to_vec())];
    let world = World::new("", move |_| stream());
    let mut client = world.raw();
    client.write(post(STREAM)).await;
    world.gateway.saw(1).await;
    world.settle().await;
    world.drain();
    assert_eq!(client.answer().await.expect("an answer").header("connection"), "");
    client.write(post(STREAM)).await;
    assert_eq!(client.answer().await.expect("an answer").header("connection"), "close");
    assert_eq!(client.rest().await, "");
    assert!((20_000..20_100).contains(&world.elapsed()), "{}", world.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_has_not_begun_when_the_drain_does_says_that_the_connection_ends() {
    let world = World::new("", |_| vec![Step::Gate].into_iter().chain(completion()).collect());
    let mut client = world.raw();
    client.write(post(CHAT)).await;
    world.gateway.saw(1).await;
    world.drain();
    world.settle().await;
    world.gateway.go_on();
    let answer = client.answer().await.expect("an answer");
    assert_eq!((answer.status.as_u16(), answer.header("connection")), (200, "close"));
    assert_eq!((client.rest().await.as_str(), world.elapsed()), ("", 0));
}

#[tokio::test(start_paused = true)]
async fn a_head_that_has_begun_to_come_may_take_its_time_in_the_drain_too() {
    let world = World::new("[server]\nheader_timeout = \"10s\"\n", |_| answer(200, &[], "{}"));
    let (mut slow, mut dripping) = (world.raw(), world.raw());
    for client in [&mut slow, &mut dripping] {
        client.write("GET /v1/models HTTP/1.1\r\nx-drip: ").await;
    }
    world.settle().await;
    world.drain();
    tokio::time::sleep(5 * SECOND).await;
    slow.write("x\r\nhost: weir.test\r\n\r\n").await;
    let answer = slow.answer().await.expect("an answer");
    assert_eq!((answer.status.as_u16(), answer.header("connection")), (200, "close"));
    assert!(dripping.drip("x", SECOND).await.is_none());
    assert_eq!(world.elapsed(), 10_000);
}

/// A frame of HTTP/2 (RFC 9113, 4.1).
#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;

impl Frame {
    fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("a short one").to_be_bytes();
        [&length[1..], &[self.kind, self.flags], &self.stream.to_be_bytes(), &self.payload].concat()
    }

    /// `GET /v1/models`, in headers that refer to nothing before.
    fn get(stream: u32) -> Self {
        let text = |name, text: &str| [&[name, text.len() as u8], text.as_bytes()].concat();
        let payload = [vec![0x82, 0x86], text(4, "/v1/models"), text(1, "weir.test")].concat();
        Self { kind: HEADERS, flags: 5, stream, payload }
    }

    /// The frames that weir has written, as far as they are there.
    async fn read_until(
        client: &mut DuplexStream,
        unread: &mut Vec<u8>,
        mut last: impl FnMut(&Self) -> bool,
    ) -> Vec<Self> {
        let mut frames = Vec::new();
        loop {
            while unread.len() >= 9 {
                let length = usize::from(unread[1]) << 8 | usize::from(unread[2]);
                if unread.len() < 9 + length {
                    break;
                }
                let frame: Vec<u8> = unread.drain(..9 + length).collect();
                let stream = u32::from_be_bytes(frame[5..9].try_into().expect("four bytes"));
                frames.push(Self { kind: frame[3], flags: frame[4], stream, payload: frame[9..].to_vec() });
                if frames.last().is_some_and(&mut last) {
                    return frames;
                }
            }
            if client.read_buf(unread).await.expect("no reset") == 0 {
                return frames;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn on_http2_what_was_asked_before_the_client_heard_of_the_drain_is_served() {
    let world = World::new("", |_| [vec![Step::Wait(30 * SECOND)], answer(200, &[], "{}")].concat());
    let (mut client, mut unread) = (world.connect(), Vec::new());
    let settings = Frame { kind: SETTINGS, flags: 0, stream: 0, payload: Vec::new() }.bytes();
    let first = Frame::get(1).bytes();
    client.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..], &first].concat()).await.expect("room");
    world.gateway.saw(1).await;
    world.drain();
    world.settle().await;
    // weir has told, and the client has not read it.
    client.write_all(&Frame::get(3).bytes()).await.expect("room");
    let told = Frame::read_until(&mut client, &mut unread, |frame| frame.kind == PING).await;
    assert!(told.iter().any(|frame| frame.kind == GO_AWAY), "{told:?}");
    let ping = told.into_iter().next_back().expect("a ping").payload;
    client.write_all(&Frame { kind: PING, flags: 1, stream: 0, payload: ping }.bytes()).await.expect("room");
    let rest = Frame::read_until(&mut client, &mut unread, |_| false).await;
    let answered: Vec<u32> = rest.iter().filter(|frame| frame.kind == HEADERS).map(|frame| frame.stream).collect();
    assert_eq!(answered, [1, 3], "both are, and then the connection ends");
    let last = rest.iter().find(|frame| frame.kind == GO_AWAY).expect("the last word").payload[3];
    assert_eq!(last, 3, "the client knows that whatever came after it was not heard");
    assert_eq!(world.gateway.seen().len(), 2);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn on_http2_nothing_in_an_answer_speaks_of_the_connection() {
    let world = World::new("", |_| vec![Step::Gate].into_iter().chain(completion()).collect());
    let mut sender = world.http2().await;
    let asked = sender.send_request(over_http2(chat(CHAT)));
    world.gateway.saw(1).await;
    world.drain();
    world.settle().await;
    world.gateway.go_on();
    let answer = collect(asked.await.expect("an answer")).await;
    // RFC 9113, 8.2.2.
    assert_eq!((answer.status.as_u16(), answer.header("connection")), (200, ""));
    world.settle().await;
    assert!(sender.is_closed(), "the connection ends with its last answer");
}

#[tokio::test(start_paused = true)]
async fn an_http2_connection_that_is_idle_or_just_begun_ends_at_once() {
    let world = World::new("", |_| completion());
    let idle = world.http2().await;
    world.settle().await;
    world.drain();
    world.settle().await;
    assert!(idle.is_closed());
    // Accepted before, and only now telling what it speaks.
    let mut late = world.http2().await;
    if let Ok(response) = late.send_request(over_http2(chat(CHAT))).await {
        assert_eq!(collect(response).await.status, 200);
    }
    world.settle().await;
    assert!(late.is_closed());
    assert_eq!(world.elapsed(), 0);
}

// The end.

/// A chat's answer in one piece of its two: the rest comes after the gate.
fn half_an_answer() -> Vec<Step> {
    let half = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n{\"choi";
    vec![Step::Send(half.into()), Step::Gate, Step::Send(b"ces\":[]}".to_vec())]
}

#[tokio::test(start_paused = true)]
async fn who_has_no_answer_when_the_drain_is_over_is_refused_wherever_the_request_is() {
    let world = World::new("[limits]\nconcurrency = 1\n[retry]\nbase_delay = \"1min\"\n", |seen| {
        if seen.number == 0 { error(503, &[]) } else { vec![Step::Stall] }
    });
    let (mut retrying, mut at_gateway, mut waiting, mut uploading) =
        (world.raw(), world.raw(), world.raw(), world.raw());
    retrying.write(post(CHAT)).await;
    world.gateway.saw(1).await;
    world.settle().await;
    at_gateway.write(post(STREAM)).await;
    world.gateway.saw(2).await;
    waiting.write(post(CHAT)).await;
    uploading.write(&post(CHAT)[..100]).await;
    world.settle().await;
    world.drain();
    tokio::time::sleep(20 * SECOND).await;
    world.end_drain();
    for client in [&mut retrying, &mut at_gateway, &mut waiting, &mut uploading] {
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "draining"));
        assert_eq!(
            ["connection", "retry-after", "x-weir-refused-by"].map(|name| answer.header(name)),
            ["close", "1", "drain"]
        );
        assert_eq!(client.rest().await, "");
    }
    assert!((20_000..21_000).contains(&world.elapsed()), "{}", world.elapsed());
    assert_eq!((world.attempts("5xx"), world.attempts("cancelled")), (1.0, 1.0));
    assert_eq!(world.metric_sum("weir_refused_total", "reason=\"drain\""), 4.0);
    world.settle().await;
    world.assert_nothing_held();
}

/// A body that ends when its client goes away.
struct Endless;

impl Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

#[tokio::test(start_paused = true)]
async fn who_still_uploads_on_http2_when_the_drain_is_over_is_refused_at_once() {
    let world = World::new("", |_| completion());
    let io = TokioIo::new(world.connect());
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.expect("weir speaks HTTP/2");
    tokio::spawn(connection);
    let uploads = ["/v1/chat/completions", "/nowhere"].map(|path| {
        let request = Request::post(format!("http://weir.test{path}")).body(Endless).expect("a request");
        tokio::spawn(sender.send_request(request))
    });
    world.settle().await;
    world.drain();
    world.end_drain();
    let mut answers = Vec::new();
    for answer in join_all(uploads).await {
        answers.push(collect(answer.expect("an answer")).await.code());
    }
    assert_eq!((answers, world.elapsed()), (vec!["draining".to_owned(), "unknown_path".to_owned()], 0));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_the_end_of_the_drain_cuts_says_so_between_two_events() {
    for (path, kind) in [
        ("/v1/chat/completions", r#"data: {"error":{"#),
        ("/v1/messages", "event: error\ndata: {"),
        ("/v1/responses", "event: error\ndata: {"),
    ] {
        let world = World::new("", |_| {
            let cut_in_two = [chunk("data: {\"choices\":"), Step::Gate, chunk("[]}\n\n"), Step::Stall];
            [stream_head(), event("one")].into_iter().chain(cut_in_two).collect()
        });
        let (mut client, mut http2) = (world.raw(), world.http2().await);
        client.write(post(STREAM).replace("/v1/chat/completions", path)).await;
        let mut request = chat(STREAM);
        *request.uri_mut() = path.parse().expect("a path");
        let second = http2.send_request(over_http2(request)).await.expect("an answer");
        world.gateway.saw(2).await;
        world.settle().await;
        world.drain();
        world.end_drain();
        let second = tokio::spawn(collect(second));
        world.settle().await;
        assert!(!second.is_finished(), "there is half an event");
        world.gateway.go_on();
        for answer in [client.answer().await.expect("an answer"), second.await.expect("no panic")] {
            let text = answer.text();
            let (_, last) = text.trim_end().rsplit_once("\n\n").expect("several events");
            assert!(!answer.broken && last.starts_with(kind) && last.contains("\"draining\""), "{path}: {text}");
            assert!(text.contains("\"choices\":[]}\n\n") && text.ends_with("\n\n"), "{path}: {text}");
        }
        assert_eq!((client.rest().await.as_str(), world.elapsed()), ("", 0));
        world.settle().await;
        assert!(http2.is_closed());
        assert_eq!((world.requests("failed"), world.attempts("cancelled")), (2.0, 2.0));
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_can_say_nothing_may_still_end_before_it_is_cut() {
    let world = World::new("", |_| half_an_answer());
    let mut client = world.raw();
    client.write(post(CHAT)).await;
    world.gateway.saw(1).await;
    world.settle().await;
    world.drain();
    world.end_drain();
    world.settle().await;
    world.gateway.go_on();
    assert_eq!(client.answer().await.expect("a whole answer").text(), r#"{"choices":[]}"#);
    assert_eq!((client.rest().await.as_str(), world.elapsed(), world.requests("ok")), ("", 0, 1.0));
}
