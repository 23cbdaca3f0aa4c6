//! Clients that ask for this and that, on connections that they keep, and leave when they like.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use rand::RngExt as _;
use rand::rngs::SmallRng;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::fates::Tape;
use super::rules::{CLIENTS, MODELS, STRANGER};
use crate::world::{World, bearer, over_http2, request, with};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Json,
    Stream,
    /// Opaque and idempotent.
    Get,
    /// Opaque, and perhaps not to be done twice.
    Post,
    /// Opaque, and too long to be held.
    Upload,
}

impl Kind {
    const ALL: [(u32, Self, &'static str); 5] = [
        (45, Self::Json, "json"),
        (35, Self::Stream, "stream"),
        (10, Self::Get, "get"),
        (9, Self::Post, "post"),
        (1, Self::Upload, "upload"),
    ];

    pub fn named(name: &str) -> Self {
        Self::ALL.iter().find(|(_, _, known)| *known == name).expect("a kind's name").1
    }

    fn random(rng: &mut SmallRng) -> (Self, &'static str) {
        let dice = rng.random_range(0..100);
        let mut below = 0;
        let chosen = Self::ALL.iter().find(|(weight, ..)| {
            below += weight;
            dice < below
        });
        let (_, kind, name) = chosen.expect("the weights add up to 100");
        (*kind, name)
    }
}

/// What a client saw of one request.
pub struct Record {
    pub id: String,
    pub kind: Kind,
    pub begun: Instant,
    pub status: Option<StatusCode>,
    /// When the head came, in the order of everything that happened.
    pub head_order: Option<u64>,
    pub attempts: u32,
    pub body: Vec<u8>,
    pub end: End,
    pub ended: Instant,
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, kind, status, attempts, end, .. } = self;
        let body = String::from_utf8_lossy(&self.body);
        write!(f, "{id}, {kind:?}: {status:?} after {attempts} attempts, {end:?}: {body}")
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// It was answered to the end.
    Whole,
    /// The answer broke off.
    Broken,
    /// The client left.
    HungUp,
    /// There was no answer at all.
    Lost(String),
}

/// How a client is connected.
pub enum Line {
    /// By a connection of its own, made anew when it has ended.
    Http1(Option<Http1>),
    /// By a stream of a shared connection.
    Http2(http2::SendRequest<Full<Bytes>>),
}

pub struct Http1 {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Http1 {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Line {
    async fn send(&mut self, world: &World, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http1(line) => {
                let still_open = match line {
                    Some(line) => line.sender.ready().await.is_ok(),
                    None => false,
                };
                if !still_open {
                    *line = Some(connect(world).await);
                }
                line.as_mut().expect("just connected").sender.send_request(request).await
            }
        }
    }
}

async fn connect(world: &World) -> Http1 {
    let (sender, connection) = http1::handshake(TokioIo::new(world.connect())).await.expect("weir speaks HTTP");
    let driver = tokio::spawn(async move {
        // How it ended is told to whoever waits for an answer on it.
        let _ = connection.await;
    });
    Http1 { sender, driver }
}

/// One client.
pub struct Client {
    number: usize,
    world: World,
    tape: Arc<Tape>,
    rng: SmallRng,
    line: Line,
}

impl Client {
    pub fn new(number: usize, world: World, tape: Arc<Tape>, rng: SmallRng, line: Line) -> Self {
        Self { number, world, tape, rng, line }
    }

    /// Asks so often, one after another with pauses.
    pub async fn run(mut self, requests: usize) -> Vec<Record> {
        let mut records = Vec::with_capacity(requests);
        for number in 0..requests {
            if self.rng.random_bool(0.8) {
                tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..1000))).await;
            }
            records.push(self.ask(format!("{}-{number}", self.number)).await);
        }
        records
    }

    async fn ask(&mut self, id: String) -> Record {
        let (kind, name) = Kind::random(&mut self.rng);
        let request = self.request(&id, kind, name);
        let now = Instant::now();
        let mut record = Record {
            id,
            kind,
            begun: now,
            status: None,
            head_order: None,
            attempts: 0,
            body: Vec::new(),
            end: End::HungUp,
            ended: now,
        };
        // At least a millisecond, so that weir has heard of the request.
        let patience = self.rng.random_bool(0.25).then(|| self.rng.random_range(1..4000));
        let reads_slowly = self.rng.random_bool(0.05);
        let exchange = exchange(&self.world, &self.tape, &mut self.line, request, &mut record, reads_slowly);
        match patience {
            None => exchange.await,
            Some(millis) => {
                if tokio::time::timeout(Duration::from_millis(millis), exchange).await.is_err() {
                    record.end = End::HungUp;
                }
            }
        }
        if let (Line::Http1(line), true) = (&mut self.line, record.end != End::Whole) {
            *line = None;
        }
        record.ended = Instant::now();
        record
    }

    fn request(&mut self, id: &str, kind: Kind, name: &str) -> Request<Full<Bytes>> {
        let model = MODELS[[0, 0, 0, 1, 1, 2][self.rng.random_range(0..6)]];
        let (method, path, body) = match kind {
            Kind::Json => (Method::POST, "/v1/chat/completions", format!(r#"{{"model":"{model}"}}"#)),
            Kind::Stream => (Method::POST, "/v1/chat/completions", format!(r#"{{"model":"{model}","stream":true}}"#)),
            Kind::Get => (Method::GET, "/v1/models", String::new()),
            Kind::Post => (Method::POST, "/v1/batches", "{}".to_owned()),
            Kind::Upload => (Method::POST, "/v1/files", "x".repeat((1 << 20) + 10_000)),
        };
        let metered = matches!(kind, Kind::Json | Kind::Stream);
        let mut request = request(method, path, &body);
        if let Line::Http2(_) = self.line {
            request = over_http2(request);
        }
        let client = if self.rng.random_bool(0.98) { CLIENTS[self.number % CLIENTS.len()] } else { STRANGER };
        let request = with(bearer(request, &format!("sk-{client}")), "x-test-client", client);
        let request = with(with(request, "x-test-id", id), "x-test-kind", name);
        with(request, "x-test-model", if metered { model } else { "-" })
    }
}

/// Sends the request and reads the answer, noting what is seen as it is seen.
async fn exchange(
    world: &World,
    tape: &Tape,
    line: &mut Line,
    request: Request<Full<Bytes>>,
    record: &mut Record,
    reads_slowly: bool,
) {
    let response = match line.send(world, request).await {
        Ok(response) => response,
        Err(error) => {
            record.end = End::Lost(format!("{error:?}"));
            return;
        }
    };
    record.head_order = Some(tape.tick());
    record.status = Some(response.status());
    let attempts = response.headers().get("x-weir-attempts").and_then(|value| value.to_str().ok()?.parse().ok());
    record.attempts = attempts.expect("every answer tells its attempts");
    let mut body = response.into_body();
    record.end = End::Whole;
    while let Some(frame) = body.frame().await {
        match frame.map(http_body::Frame::into_data) {
            Ok(Ok(data)) => record.body.extend_from_slice(&data),
            Ok(Err(_trailers)) => {}
            Err(_) => {
                // hyper's HTTP/2 bodies say so for ever.
                record.end = End::Broken;
                return;
            }
        }
        if reads_slowly {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
