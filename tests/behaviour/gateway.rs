//! A gateway in memory that does what a test's script says, byte by byte.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::Notify;
use tokio::time::Instant;
use tower::service_fn;
use tower::util::BoxCloneSyncService;
use weir::upstream::connect::{ConnectError, Connector, Io};

use crate::network::Network;

/// What the gateway does once it has read a request.
#[derive(Debug, Clone)]
pub enum Step {
    Send(Vec<u8>),
    Wait(Duration),
    /// Does nothing more until weir closes the connection.
    Stall,
    /// Waits for [`Gateway::go_on`].
    Gate,
    /// Closes the connection.
    Close,
    /// Closes the connection, unless another request has begun to come on it within this time.
    CloseIdle(Duration),
}

/// A request as it reached the gateway.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Requests before this one.
    pub number: usize,
    /// Which connection it came on, from 0.
    pub connection: usize,
    pub at: Instant,
    /// The head, byte for byte.
    pub head: String,
    pub body: Vec<u8>,
}

impl Seen {
    /// The request line's target.
    pub fn target(&self) -> &str {
        self.head.split(' ').nth(1).expect("a request line has a target")
    }

    /// The values of a header.
    pub fn header(&self, name: &str) -> Vec<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
    }
}

type Script = dyn Fn(&Seen) -> Vec<Step> + Send + Sync;

/// The gateway, and what it has seen.
#[derive(Clone)]
pub struct Gateway(Arc<State>);

struct State {
    script: Box<Script>,
    seen: Mutex<Vec<Seen>>,
    /// Where each connection was to lead.
    asked_for: Mutex<Vec<String>>,
    /// When each request was done with, by its number; `None` while its script goes on.
    ended: Mutex<Vec<Option<Instant>>>,
    connections: AtomicUsize,
    open: AtomicUsize,
    /// Requests whose connection weir closed before the script was through.
    cancelled: AtomicUsize,
    /// Connections to refuse before any is made.
    refuse: AtomicUsize,
    /// Connections to close as soon as they are made.
    hang_up: AtomicUsize,
    /// How long a connection takes to be made.
    connect_delay: Mutex<Duration>,
    /// What lies between weir and the gateway; nothing where there is none.
    network: OnceLock<Arc<Network>>,
    /// Answers follow a request's head, without its body being read first.
    early: AtomicBool,
    /// Bytes read from weir, and written to it by steps that are done.
    received: AtomicUsize,
    sent: AtomicUsize,
    go_on: Notify,
    happened: Notify,
}

impl Gateway {
    /// A gateway that answers as the script says.
    pub fn new(script: impl Fn(&Seen) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self(Arc::new(State {
            script: Box::new(script),
            seen: Mutex::default(),
            asked_for: Mutex::default(),
            ended: Mutex::default(),
            connections: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            refuse: AtomicUsize::new(0),
            hang_up: AtomicUsize::new(0),
            connect_delay: Mutex::default(),
            network: OnceLock::new(),
            early: AtomicBool::new(false),
            received: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
            go_on: Notify::new(),
            happened: Notify::new(),
        }))
    }

    /// Refuses the next `count` connections.
    pub fn refuse_connections(&self, count: usize) {
        self.0.refuse.store(count, Ordering::Relaxed);
    }

    /// Closes the next `count` connections as soon as they are made.
    pub fn hang_up_on(&self, count: usize) {
        self.0.hang_up.store(count, Ordering::Relaxed);
    }

    /// Lets all connections go through this network from now on.
    pub fn reached_through(&self, network: Arc<Network>) {
        self.0.network.set(network).expect("a gateway has one network");
    }

    /// Takes so long to accept a connection.
    pub fn delay_connections(&self, delay: Duration) {
        *self.0.connect_delay.lock().expect("no test panics here") = delay;
    }

    /// Answers from now on as soon as it has a request's head, and reads the body while it answers.
    pub fn answer_early(&self) {
        self.0.early.store(true, Ordering::Relaxed);
    }

    /// Lets every script that stands at a [`Step::Gate`] go on.
    pub fn go_on(&self) {
        self.0.go_on.notify_waiters();
    }

    /// Everything that has reached the gateway.
    pub fn seen(&self) -> Vec<Seen> {
        self.0.seen.lock().expect("no test panics here").clone()
    }

    /// From when to when each request was being answered, by its number; `None` for those that still are.
    pub fn spans(&self) -> Vec<(Instant, Option<Instant>)> {
        let ended = self.0.ended.lock().expect("no test panics here").clone();
        self.seen().iter().map(|seen| seen.at).zip(ended).collect()
    }

    /// Connections made so far.
    pub fn connections(&self) -> usize {
        self.0.connections.load(Ordering::Relaxed)
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    /// Requests that weir cancelled.
    pub fn cancelled(&self) -> usize {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// Bytes that have come from weir.
    pub fn received(&self) -> usize {
        self.0.received.load(Ordering::Relaxed)
    }

    /// Bytes that weir has taken, in whole steps.
    pub fn sent(&self) -> usize {
        self.0.sent.load(Ordering::Relaxed)
    }

    /// Waits until so many bytes have come from weir.
    pub async fn has_received(&self, bytes: usize) {
        self.until(|gateway| gateway.received() >= bytes).await;
    }

    /// Waits until so many requests have reached the gateway.
    pub async fn saw(&self, count: usize) {
        self.until(|gateway| gateway.seen().len() >= count).await;
    }

    /// Waits until so many requests have been cancelled.
    pub async fn saw_cancelled(&self, count: usize) {
        self.until(|gateway| gateway.cancelled() >= count).await;
    }

    async fn until(&self, met: impl Fn(&Self) -> bool) {
        loop {
            let happened = self.0.happened.notified();
            if met(self) {
                return;
            }
            happened.await;
        }
    }

    /// The way to it, for weir.
    pub fn connector(&self) -> Connector {
        let gateway = self.clone();
        BoxCloneSyncService::new(service_fn(move |uri: http::Uri| {
            gateway.0.asked_for.lock().expect("no test panics here").push(uri.to_string());
            gateway.clone().connect()
        }))
    }

    /// Where each connection that weir has asked for was to lead.
    pub fn asked_for(&self) -> Vec<String> {
        self.0.asked_for.lock().expect("no test panics here").clone()
    }

    async fn connect(self) -> Result<Io, ConnectError> {
        let delay = *self.0.connect_delay.lock().expect("no test panics here");
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let refusing = |left: usize| left.checked_sub(1);
        if self.0.refuse.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refusing).is_ok() {
            return Err(ConnectError::new(
                "cannot connect to the gateway",
                std::io::ErrorKind::ConnectionRefused.into(),
            ));
        }
        if let Some(network) = self.0.network.get() {
            network.is_passable().await;
        }
        let (ours, mut theirs) = tokio::io::duplex(64 << 10);
        if self.0.hang_up.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refusing).is_ok() {
            return Ok(Box::new(ours));
        }
        let connection = self.0.connections.fetch_add(1, Ordering::Relaxed);
        self.0.open.fetch_add(1, Ordering::Relaxed);
        if let Some(network) = self.0.network.get() {
            let (far, end) = tokio::io::duplex(64 << 10);
            tokio::spawn(network.clone().carry(connection, std::mem::replace(&mut theirs, end), far));
        }
        tokio::spawn(async move {
            self.serve(theirs, connection).await;
            self.0.open.fetch_sub(1, Ordering::Relaxed);
            self.0.happened.notify_waiters();
        });
        Ok(Box::new(ours))
    }

    async fn serve(&self, mut io: DuplexStream, connection: usize) {
        let mut buffer = Vec::new();
        while let Some((head, body)) = self.read_request(&mut io, &mut buffer).await {
            let seen = {
                let mut all = self.0.seen.lock().expect("no test panics here");
                let seen = Seen { number: all.len(), connection, at: Instant::now(), head, body };
                all.push(seen.clone());
                self.0.ended.lock().expect("no test panics here").push(None);
                seen
            };
            self.0.happened.notify_waiters();
            for step in (self.0.script)(&seen) {
                if let Step::CloseIdle(after) = step {
                    self.end(&seen);
                    let next = tokio::time::timeout(after, io.read_buf(&mut buffer)).await;
                    if !matches!(next, Ok(Ok(1..))) {
                        return;
                    }
                    break;
                }
                let closes = matches!(step, Step::Close);
                if closes || !self.take(step, &mut io).await {
                    if !closes {
                        self.0.cancelled.fetch_add(1, Ordering::Relaxed);
                    }
                    self.end(&seen);
                    return;
                }
            }
            self.end(&seen);
        }
    }

    fn end(&self, seen: &Seen) {
        self.0.ended.lock().expect("no test panics here")[seen.number].get_or_insert_with(Instant::now);
    }

    /// Does one step; `false` when weir has closed the connection.
    async fn take(&self, step: Step, io: &mut DuplexStream) -> bool {
        let (mut reader, mut writer) = tokio::io::split(io);
        let acting = async {
            match step {
                Step::Send(bytes) => {
                    let written = writer.write_all(&bytes).await.is_ok();
                    self.0.sent.fetch_add(if written { bytes.len() } else { 0 }, Ordering::Relaxed);
                    return written;
                }
                Step::Wait(time) => tokio::time::sleep(time).await,
                Step::Gate => self.0.go_on.notified().await,
                Step::Stall => std::future::pending().await,
                Step::Close | Step::CloseIdle(_) => {}
            }
            true
        };
        // What comes meanwhile is the body of a request that is answered early.
        let mut discarded = vec![0; 64 << 10];
        let closed = async { while reader.read(&mut discarded).await.is_ok_and(|read| read > 0) {} };
        tokio::select! {
            biased;
            alive = acting => alive,
            () = closed => false,
        }
    }

    /// Reads a request: its head as text, its body decoded. `None` when the connection has ended.
    async fn read_request(&self, io: &mut DuplexStream, buffer: &mut Vec<u8>) -> Option<(String, Vec<u8>)> {
        loop {
            if self.0.early.load(Ordering::Relaxed)
                && let Some(head_end) = head_end(buffer)
            {
                let head = String::from_utf8_lossy(&buffer[..head_end]).into_owned();
                buffer.clear();
                return Some((head, Vec::new()));
            }
            if let Some((head, body)) = take_message(buffer) {
                return Some((head, body));
            }
            let read = io.read_buf(buffer).await.ok().filter(|read| *read > 0)?;
            self.0.received.fetch_add(read, Ordering::Relaxed);
            self.0.happened.notify_waiters();
        }
    }
}

fn head_end(buffer: &[u8]) -> Option<usize> {
    buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n").map(|at| at + 4)
}

/// Takes the first message, if it is there whole: its head as text, its body decoded.
pub fn take_message(buffer: &mut Vec<u8>) -> Option<(String, Vec<u8>)> {
    let head_end = head_end(buffer)?;
    let head = String::from_utf8_lossy(&buffer[..head_end]).into_owned();
    let lower = head.to_ascii_lowercase();
    let length = lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
    let (body, end) = match length {
        Some(length) => (buffer.get(head_end..head_end + length)?.to_vec(), head_end + length),
        None if lower.contains("transfer-encoding: chunked") => decode_chunks(buffer, head_end)?,
        None => (Vec::new(), head_end),
    };
    buffer.drain(..end);
    Some((head, body))
}

/// A chunked body that begins at `at`, and where it ends.
fn decode_chunks(bytes: &[u8], mut at: usize) -> Option<(Vec<u8>, usize)> {
    let mut body = Vec::new();
    loop {
        let line = &bytes[at..];
        let digits = line.windows(2).position(|bytes| bytes == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&line[..digits]).ok()?, 16).ok()?;
        let data = at + digits + 2;
        body.extend_from_slice(bytes.get(data..data + size)?);
        at = data + size + 2;
        bytes.get(at - 1)?;
        if size == 0 {
            return Some((body, at));
        }
    }
}

/// An answer with a body of known length.
pub fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Vec<Step> {
    let mut text = format!("HTTP/1.1 {status} Whatever\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    vec![Step::Send(format!("{text}\r\n{body}").into_bytes())]
}

/// A chat completion.
pub fn completion() -> Vec<Step> {
    let usage = r#""usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}"#;
    answer(
        200,
        &[("content-type", "application/json")],
        &format!(r#"{{"choices":[{{"message":{{"content":"fine"}}}}],{usage}}}"#),
    )
}

/// A JSON answer.
pub fn json(body: &str) -> Vec<Step> {
    answer(200, &[("content-type", "application/json")], body)
}

/// A chat completion that cost so many tokens.
pub fn costs(prompt: u64, completion: u64) -> Vec<Step> {
    json(&format!(
        r#"{{"choices":[{{"message":{{"content":"fine"}}}}],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{completion}}}}}"#
    ))
}

/// An error in OpenAI's shape.
pub fn error(status: u16, headers: &[(&str, &str)]) -> Vec<Step> {
    let mut all = vec![("content-type", "application/json")];
    all.extend_from_slice(headers);
    answer(
        status,
        &all,
        r#"{"error":{"message":"the gateway says no","type":"server_error","param":null,"code":"upstream_code"}}"#,
    )
}

/// The head of a stream of events.
pub fn stream_head() -> Step {
    Step::Send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec())
}

/// One chunk of a chunked body.
pub fn chunk(data: &str) -> Step {
    Step::Send(format!("{:x}\r\n{data}\r\n", data.len()).into_bytes())
}

/// An event that carries a word.
pub fn event(word: &str) -> Step {
    chunk(&format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{word}\"}}}}]}}\n\n"))
}

/// The end of a stream.
pub fn done() -> [Step; 2] {
    [chunk("data: [DONE]\n\n"), Step::Send(b"0\r\n\r\n".to_vec())]
}

/// A whole stream of these words.
pub fn stream(words: &[&str]) -> Vec<Step> {
    let words = words.iter().map(|word| event(word));
    std::iter::once(stream_head()).chain(words).chain(done()).collect()
}
