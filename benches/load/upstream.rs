//! An OpenAI-like upstream that costs next to nothing: one thread, fixed answers, no JSON parsed.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, Interval, interval_at};

use crate::arguments::{self, Failure, required};

/// Request headers in which the client says what the stream shall be.
pub const EVENTS: &str = "x-bench-events";
pub const INTERVAL_MS: &str = "x-bench-interval-ms";

const DEFAULT_EVENTS: u64 = 50;
const DEFAULT_INTERVAL_MS: u64 = 20;

const COMPLETION: &str = r#"{"id":"chatcmpl-9f2c4e7ab1d05836","object":"chat.completion","created":1764000000,"model":"gpt-4.1-mini","choices":[{"index":0,"message":{"role":"assistant","content":"The reviewer likes the battery and the screen, finds the camera average and the price fair. Overall the review is positive: four of five stars. The one complaint that comes up twice is the charger, which is slow and runs warm.","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":231,"completion_tokens":52,"total_tokens":283,"prompt_tokens_details":{"cached_tokens":0}},"system_fingerprint":"fp_44709d6fcb"}"#;

const EVENT: &str = concat!(
    r#"data: {"id":"chatcmpl-9f2c4e7ab1d05836","object":"chat.completion.chunk","created":1764000000,"model":"gpt-4.1-mini","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}"#,
    "\n\n"
);

/// Comes before the end of a stream that asks for it, as a gateway does.
const USAGE: &str = concat!(
    r#"data: {"id":"chatcmpl-9f2c4e7ab1d05836","object":"chat.completion.chunk","created":1764000000,"model":"gpt-4.1-mini","choices":[],"usage":{"prompt_tokens":231,"completion_tokens":50,"total_tokens":281}}"#,
    "\n\n"
);

const DONE: &str = "data: [DONE]\n\n";

/// Thousands of connections may come at once when a proxy begins.
const BACKLOG: u32 = 4096;

type Answer = Response<Either<Full<Bytes>, Events>>;

pub fn run(parser: lexopt::Parser) -> Result<(), Failure> {
    let mut listen: Option<SocketAddr> = None;
    arguments::options(parser, |name, parser| {
        match name {
            "listen" => listen = Some(arguments::value(parser)?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let listen = required(listen, "--listen")?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(listen))
}

async fn serve(listen: SocketAddr) -> Result<(), Failure> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(listen)?;
    let listener = socket.listen(BACKLOG)?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(serve_connection(stream));
    }
}

async fn serve_connection(stream: TcpStream) {
    // It fails when the client is gone, which is the client's to report.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

async fn answer(request: Request<Incoming>) -> Result<Answer, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let wants = |option: &str| memchr::memmem::find(&body, option.as_bytes()).is_some();
    Ok(if wants(r#""stream":true"#) { stream(&head.headers, wants(r#""include_usage":true"#)) } else { completion() })
}

fn completion() -> Answer {
    with_type("application/json", Either::Left(Full::from(COMPLETION)))
}

fn stream(wish: &HeaderMap, usage: bool) -> Answer {
    let number = |name, default| wish.get(name).and_then(|v| v.to_str().ok()?.parse().ok()).unwrap_or(default);
    let gap = Duration::from_millis(number(INTERVAL_MS, DEFAULT_INTERVAL_MS).max(1));
    let left = number(EVENTS, DEFAULT_EVENTS);
    let events = Events { left, usage, begun: false, interval: interval_at(Instant::now() + gap, gap) };
    with_type("text/event-stream", Either::Right(events))
}

fn with_type(content_type: &'static str, body: Either<Full<Bytes>, Events>) -> Answer {
    let mut answer = Response::new(body);
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    answer
}

/// A body of one event per tick, the first at once, and the last with `[DONE]` behind it.
pub struct Events {
    left: u64,
    usage: bool,
    begun: bool,
    interval: Interval,
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        // An interval's own first tick would come a millisecond or two late.
        if self.begun {
            ready!(self.interval.poll_tick(context));
        }
        self.begun = true;
        self.left -= 1;
        let data = if self.left == 0 {
            Bytes::from([EVENT, if self.usage { USAGE } else { "" }, DONE].concat())
        } else {
            Bytes::from_static(EVENT.as_bytes())
        };
        Poll::Ready(Some(Ok(Frame::data(data))))
    }
}
