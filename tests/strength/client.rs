//! Clients that ask for this and that, on connections that they keep, and leave when they like.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rand::RngExt as _;
use rand::rngs::SmallRng;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Mutex;

use crate::gateway::upload_byte;
use crate::plan::Kind;
use crate::weir::DEADLINE;
use crate::wire::{Framing, Wire};

/// The length of an upload: more than weir keeps to send it again.
pub const UPLOAD: usize = (1 << 20) + 10_000;

/// Keys that clients share: as many lanes for each model.
const KEYS: usize = 12;

const MODELS: [&str; 3] = ["gpt-4.1-mini", "deepseek-chat", "made-up"];

/// What a client saw of one request.
#[derive(Debug)]
pub struct Seen {
    pub id: u64,
    pub kind: Kind,
    pub http2: bool,
    pub begun: Instant,
    pub ended: Instant,
    pub status: u16,
    /// `x-test-id` and `x-test-attempt`, as the gateway wrote them; empty where the answer is weir's own.
    pub answered_id: String,
    pub answered_attempt: String,
    /// `retry-after` and `x-should-retry`.
    pub retry_after: String,
    pub should_retry: String,
    /// When the head came, in the order of everything that happened.
    pub head_order: Option<u64>,
    pub body: Vec<u8>,
    pub end: End,
}

impl Seen {
    fn note_head<'h>(&mut self, status: u16, field: impl Fn(&'static str) -> &'h str) {
        self.status = status;
        self.answered_id = field("x-test-id").to_owned();
        self.answered_attempt = field("x-test-attempt").to_owned();
        self.retry_after = field("retry-after").to_owned();
        self.should_retry = field("x-should-retry").to_owned();
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It was answered to the end.
    Whole,
    /// The answer broke off.
    Broken,
    /// The client left.
    HungUp,
    /// There was no answer, or more than one.
    Wrong(String),
}

/// What is different from one request to the next.
#[derive(Debug, Clone, Copy, Default)]
pub struct Habits {
    /// Leaves then.
    pub patience: Option<Duration>,
    /// Ends the connection with a reset in that case.
    pub resets: bool,
    /// Waits so long before each read.
    pub reads_slowly: Option<Duration>,
}

impl Habits {
    pub fn random(rng: &mut SmallRng) -> Self {
        let micros = |rng: &mut SmallRng, most| Duration::from_micros(rng.random_range(1..most));
        Self {
            patience: rng.random_bool(0.08).then(|| micros(rng, 60_000)),
            resets: rng.random_bool(0.3),
            reads_slowly: rng.random_bool(0.03).then(|| micros(rng, 20_000)),
        }
    }
}

/// How a client is connected.
pub enum Line {
    /// By a connection of its own, made anew when it has ended.
    Http1(Option<Http1>),
    /// By a stream of a connection that it shares.
    Http2(SharedHttp2),
}

pub struct Http1 {
    wire: Wire<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

/// An HTTP/2 connection of several clients, made anew when it has ended.
pub type SharedHttp2 = Arc<Mutex<Option<http2::SendRequest<Full<Bytes>>>>>;

/// One client.
pub struct Client {
    pub number: usize,
    pub to: SocketAddr,
    pub clock: Arc<AtomicU64>,
    pub line: Line,
}

impl Client {
    /// Asks, and returns what came of it.
    pub async fn ask(&mut self, id: u64, kind: Kind, habits: Habits) -> Seen {
        let now = Instant::now();
        let http2 = matches!(self.line, Line::Http2(_));
        let mut seen = Seen {
            id,
            kind,
            http2,
            begun: now,
            ended: now,
            status: 0,
            answered_id: String::new(),
            answered_attempt: String::new(),
            retry_after: String::new(),
            should_retry: String::new(),
            head_order: None,
            body: Vec::new(),
            end: End::HungUp,
        };
        let longest = habits.patience.unwrap_or(DEADLINE);
        let exchanged = tokio::time::timeout(longest, self.exchange(&mut seen, habits)).await;
        match exchanged {
            Ok(end) => seen.end = end,
            Err(_) if habits.patience.is_none() => seen.end = End::Wrong("it waits for ever".to_owned()),
            Err(_) => seen.end = End::HungUp,
        }
        if let Line::Http1(line) = &mut self.line
            && (seen.end != End::Whole || kind == Kind::Upload)
            && let Some(line) = line.take()
            && habits.resets
        {
            let _ = line.writer.as_ref().set_zero_linger();
        }
        seen.ended = Instant::now();
        seen
    }

    async fn exchange(&mut self, seen: &mut Seen, habits: Habits) -> End {
        let (number, to, clock) = (self.number, self.to, &*self.clock);
        match &mut self.line {
            Line::Http1(line) => {
                let line = match Http1::still_open(line, to).await {
                    Ok(line) => line,
                    Err(why) => return End::Wrong(why),
                };
                line.wire.pause = habits.reads_slowly;
                line.exchange(&head_of(number, to, seen), &body_of(number, seen), clock, seen).await
            }
            Line::Http2(shared) => {
                let Some(sender) = connected(shared, to).await else {
                    return End::Wrong("no HTTP/2 connection".to_owned());
                };
                over_http2(sender, http2_request(number, to, seen), clock, seen, habits).await
            }
        }
    }
}

impl Http1 {
    async fn connect(to: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        Ok(Self { wire: Wire::new(reader), writer })
    }

    /// The connection, made anew where weir has closed it.
    ///
    /// # Errors
    /// Something has come on it that nobody has asked for.
    async fn still_open(line: &mut Option<Self>, to: SocketAddr) -> Result<&mut Self, String> {
        if let Some(open) = line {
            let mut byte = [0];
            match open.wire.io.try_read(&mut byte) {
                Ok(1..) => return Err("more came than an answer".to_owned()),
                _ if !open.wire.is_drained() => return Err("more came with an answer than the answer".to_owned()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Ok(_) | Err(_) => *line = None,
            }
        }
        if line.is_none() {
            *line = Some(Self::connect(to).await.map_err(|error| format!("weir cannot be reached: {error}"))?);
        }
        Ok(line.as_mut().expect("just connected"))
    }

    /// Writes the request and reads the answer, which may come before all is written.
    async fn exchange(&mut self, head: &str, body: &[u8], clock: &AtomicU64, seen: &mut Seen) -> End {
        let Self { wire, writer } = self;
        let writing = async {
            // Where it fails there may be an answer all the same.
            if writer.write_all(head.as_bytes()).await.is_ok() {
                let _ = writer.write_all(body).await;
            }
            std::future::pending::<()>().await
        };
        let reading = async {
            let head = match wire.head().await {
                Ok(Some(head)) => head,
                Ok(None) => return End::Wrong("the connection was closed without an answer".to_owned()),
                Err(error) => return End::Wrong(format!("no answer: {error}")),
            };
            seen.head_order = Some(clock.fetch_add(1, Ordering::Relaxed));
            seen.note_head(head.status(), |name| head.field(name));
            match wire.body(head.framing(Framing::Close), |piece| seen.body.extend_from_slice(piece)).await {
                Ok(()) => End::Whole,
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => End::Wrong(error.to_string()),
                Err(_) => End::Broken,
            }
        };
        tokio::select! {
            end = reading => end,
            () = writing => unreachable!("it never ends"),
        }
    }
}

/// What the request says, before its body.
fn head_of(number: usize, to: SocketAddr, seen: &Seen) -> String {
    let (method, path) = target_of(seen.kind);
    let (id, kind, key) = (seen.id, seen.kind.name(), number % KEYS);
    let length = body_of(number, seen).len();
    let body = if method == "GET" { String::new() } else { format!("content-length: {length}\r\n") };
    format!(
        "{method} {path} HTTP/1.1\r\nhost: {to}\r\nauthorization: Bearer sk-{key}\r\nx-test-id: {id}\r\n\
         x-test-kind: {kind}\r\ncontent-type: application/json\r\n{body}\r\n"
    )
}

fn target_of(kind: Kind) -> (&'static str, &'static str) {
    match kind {
        Kind::Json | Kind::Stream => ("POST", "/v1/chat/completions"),
        Kind::Get => ("GET", "/v1/models"),
        Kind::Download => ("GET", "/v1/files/1/content"),
        Kind::Post => ("POST", "/v1/batches"),
        Kind::Upload => ("POST", "/v1/files"),
    }
}

fn body_of(number: usize, seen: &Seen) -> Vec<u8> {
    let model = MODELS[number % MODELS.len()];
    let asking = |stream| {
        let message = format!(r#"{{"role":"user","content":"This is request {}."}}"#, seen.id);
        format!(r#"{{"model":"{model}","stream":{stream},"messages":[{message}]}}"#).into_bytes()
    };
    match seen.kind {
        Kind::Json => asking(false),
        Kind::Stream => asking(true),
        Kind::Get | Kind::Download => Vec::new(),
        Kind::Post => format!(r#"{{"input":"This is request {}."}}"#, seen.id).into_bytes(),
        Kind::Upload => vec![upload_byte(seen.id); UPLOAD],
    }
}

fn http2_request(number: usize, to: SocketAddr, seen: &Seen) -> Request<Full<Bytes>> {
    let (method, path) = target_of(seen.kind);
    Request::builder()
        .method(method)
        .uri(format!("http://{to}{path}"))
        .header("authorization", format!("Bearer sk-{}", number % KEYS))
        .header("x-test-id", seen.id)
        .header("x-test-kind", seen.kind.name())
        .header("content-type", "application/json")
        .body(Full::new(body_of(number, seen).into()))
        .expect("the parts are valid")
}

async fn connected(shared: &SharedHttp2, to: SocketAddr) -> Option<http2::SendRequest<Full<Bytes>>> {
    let mut shared = shared.lock().await;
    if let Some(sender) = shared.as_ref().filter(|sender| !sender.is_closed()) {
        return Some(sender.clone());
    }
    let stream = TcpStream::connect(to).await.ok()?;
    stream.set_nodelay(true).ok()?;
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.ok()?;
    tokio::spawn(connection);
    Some(shared.insert(sender).clone())
}

async fn over_http2(
    mut sender: http2::SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
    clock: &AtomicU64,
    seen: &mut Seen,
    habits: Habits,
) -> End {
    let sending = async {
        sender.ready().await?;
        sender.send_request(request).await
    };
    let (head, mut body) = match sending.await {
        Ok(response) => response.into_parts(),
        Err(error) => return End::Wrong(format!("no answer: {error:?}")),
    };
    let field = |name| head.headers.get(name).map_or("", |value| value.to_str().unwrap_or("?"));
    seen.head_order = Some(clock.fetch_add(1, Ordering::Relaxed));
    seen.note_head(head.status.as_u16(), field);
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return End::Broken };
        if let Ok(data) = frame.into_data() {
            seen.body.extend_from_slice(&data);
        }
        if let Some(pause) = habits.reads_slowly {
            tokio::time::sleep(pause).await;
        }
    }
    End::Whole
}
