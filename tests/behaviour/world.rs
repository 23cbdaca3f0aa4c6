//! A weir in memory between a client and a scripted gateway, under a paused clock.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use weir::config::Config;
use weir::proxy::Proxy;
use weir::server::{self, DrainControl, Tls};

use crate::gateway::{Gateway, Seen, Step, take_message};

/// A chat request for a model that the tests know by name.
pub const CHAT: &str = r#"{"model":"gpt-4.1-mini","messages":[{"role":"user","content":"hello"}]}"#;

/// The same as a stream.
pub const STREAM: &str = r#"{"model":"gpt-4.1-mini","stream":true,"messages":[{"role":"user","content":"hello"}]}"#;

/// The same, asking for its usage: weir adds nothing to it, and hides nothing of the answer.
pub const STREAM_WITH_USAGE: &str = r#"{"model":"gpt-4.1-mini","stream":true,"stream_options":{"include_usage":true},"messages":[{"role":"user","content":"hello"}]}"#;

/// weir, the gateway behind it, and the time at which both began.
#[derive(Clone)]
pub struct World {
    pub gateway: Gateway,
    pub proxy: Arc<Proxy>,
    pub start: Instant,
    /// Where its clients connect from.
    peer: Option<IpAddr>,
    settings: weir::config::Server,
    drain: Arc<DrainControl>,
    watch: server::Drain,
}

/// A client that writes bytes as it likes, right or wrong.
pub struct Raw {
    pub io: DuplexStream,
    unread: Vec<u8>,
}

impl Raw {
    /// Writes as much as weir takes before it closes the connection.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.io.write_all(bytes.as_ref()).await;
    }

    /// The next answer; `None` when the connection is closed without one. It may be dropped and asked for again.
    pub async fn answer(&mut self) -> Option<Answer> {
        loop {
            if let Some((head, body)) = take_message(&mut self.unread) {
                return Some(Answer::parse(&head, body));
            }
            self.io.read_buf(&mut self.unread).await.ok().filter(|read| *read > 0)?;
        }
    }

    /// The next answer's status, whatever else it holds.
    pub async fn answer_status(&mut self) -> u16 {
        while self.unread.len() < 12 {
            let read = self.io.read_buf(&mut self.unread).await.unwrap_or(0);
            assert!(read > 0, "no answer");
        }
        String::from_utf8_lossy(&self.unread[9..12]).parse().expect("a status")
    }

    /// Everything until weir closes the connection.
    pub async fn rest(&mut self) -> String {
        while self.io.read_buf(&mut self.unread).await.is_ok_and(|read| read > 0) {}
        String::from_utf8_lossy(&std::mem::take(&mut self.unread)).into_owned()
    }

    /// Writes one piece after the other, until there is an answer or the connection is closed.
    pub async fn drip(&mut self, piece: &str, every: Duration) -> Option<Answer> {
        loop {
            if let Ok(answer) = tokio::time::timeout(every, self.answer()).await {
                return answer;
            }
            self.write(piece).await;
        }
    }
}

/// An answer, read to its end.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    /// The body broke off.
    pub broken: bool,
}

impl Answer {
    /// The first answer in these bytes.
    pub fn of(mut bytes: Vec<u8>) -> Self {
        let (head, body) = take_message(&mut bytes).expect("an answer");
        Self::parse(&head, body)
    }

    fn parse(head: &str, body: Vec<u8>) -> Self {
        let mut lines = head.trim_end().lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
        let fields = lines.map(|line| line.split_once(": ").unwrap_or((line.trim_end_matches(':'), "")));
        let headers = fields.map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")));
        Self { status: status.expect("a status"), headers: headers.collect(), body, broken: false }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header's value; empty where there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("headers are text here"))
    }

    /// `error.code` of an error.
    pub fn code(&self) -> String {
        let value: serde_json::Value = serde_json::from_slice(&self.body).expect("an error is JSON");
        assert!(value["error"]["message"].is_string(), "error has a message: {value}");
        value["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl World {
    /// A weir with this configuration (TOML) before a gateway that follows the script.
    pub fn new(config: &str, script: impl Fn(&Seen) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let config = Config::parse(&with_model(config), &|_| None).unwrap_or_else(|complaints| panic!("{complaints}"));
        let gateway = Gateway::new(script);
        let settings = config.server.clone();
        let proxy = Arc::new(Proxy::new(Arc::new(config), gateway.connector()));
        let (drain, watch) = DrainControl::new();
        Self { gateway, proxy, start: Instant::now(), peer: None, settings, drain: Arc::new(drain), watch }
    }

    /// The same world, as a client at this address has it.
    pub fn seen_from(&self, peer: &str) -> Self {
        Self { peer: Some(peer.parse().expect("an address")), ..self.clone() }
    }

    /// A new connection, as bytes.
    pub fn connect(&self) -> DuplexStream {
        self.connect_with_buffer(64 << 10)
    }

    /// A new connection on which so many bytes can be under way in each direction.
    pub fn connect_with_buffer(&self, bytes: usize) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(bytes);
        let (proxy, peer) = (self.proxy.clone(), self.peer);
        let (settings, watch) = (self.settings.clone(), self.watch.clone());
        tokio::spawn(async move { server::serve_connection(theirs, peer, proxy, &settings, watch).await });
        ours
    }

    /// A new connection to a listener with TLS, as bytes.
    pub fn connect_to_tls(&self, tls: &Tls) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let (proxy, peer, tls) = (self.proxy.clone(), self.peer, tls.clone());
        let (settings, watch) = (self.settings.clone(), self.watch.clone());
        tokio::spawn(async move { server::serve_tls_connection(theirs, peer, &tls, proxy, &settings, watch).await });
        ours
    }

    /// A new connection for a client that writes bytes as it likes.
    pub fn raw(&self) -> Raw {
        Raw { io: self.connect(), unread: Vec::new() }
    }

    /// What these bytes are answered with, on a connection of their own.
    pub async fn answer_to(&self, bytes: impl AsRef<[u8]>) -> Answer {
        let mut client = self.raw();
        client.write(bytes).await;
        client.answer().await.expect("an answer")
    }

    /// Puts this configuration in force, in place of the one that the world began with.
    ///
    /// # Errors
    /// Why nothing has changed.
    pub fn reload(&self, config: &str) -> Result<Vec<String>, String> {
        let config = Config::parse(&with_model(config), &|_| None).unwrap_or_else(|complaints| panic!("{complaints}"));
        let changes = self.proxy.reload(config).map_err(|refused| refused.to_string())?;
        Ok(changes.into_iter().map(|change| change.option).collect())
    }

    /// Begins the drain, as SIGTERM does.
    pub fn drain(&self) {
        self.drain.begin();
    }

    /// Ends the drain, as `server.drain` does when it is over.
    pub fn end_drain(&self) {
        self.proxy.gate().close();
        self.proxy.cuts_what_runs();
        self.drain.end();
    }

    /// A chat request on a connection of its own, answered in full.
    pub async fn chat(&self) -> Answer {
        self.send(chat(CHAT)).await
    }

    /// The same as a stream.
    pub async fn stream(&self) -> Answer {
        self.send(chat(STREAM)).await
    }

    /// A stream that asks for its usage.
    pub async fn stream_with_usage(&self) -> Answer {
        self.send(chat(STREAM_WITH_USAGE)).await
    }

    /// Any request on a connection of its own, answered in full.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        collect(self.begin(request).await).await
    }

    /// Any request on a connection of its own, until its answer begins.
    pub async fn begin(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(self.connect())).await.expect("weir speaks HTTP");
        tokio::spawn(connection);
        sender.send_request(request).await.expect("weir answers everything")
    }

    /// As [`World::send`], in a task: aborting it is hanging up.
    pub fn spawn(&self, request: Request<Full<Bytes>>) -> JoinHandle<Answer> {
        let world = self.clone();
        tokio::spawn(async move {
            let (mut sender, connection) =
                http1::handshake(TokioIo::new(world.connect())).await.expect("weir speaks HTTP");
            // In this task: the connection ends with it.
            let exchange =
                async { collect(sender.send_request(request).await.expect("weir answers everything")).await };
            tokio::pin!(exchange);
            tokio::select! {
                biased;
                answer = &mut exchange => answer,
                _ = connection => panic!("the connection ended before the answer"),
            }
        })
    }

    /// A client that speaks HTTP/2.
    pub async fn http2(&self) -> http2::SendRequest<Full<Bytes>> {
        let io = TokioIo::new(self.connect());
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .handshake(io)
            .await
            .expect("weir speaks HTTP/2");
        tokio::spawn(connection);
        sender
    }

    /// The value of a series on /metrics; 0 where there is none.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.proxy.metrics().encode(&self.proxy.gauges());
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        line.unwrap_or(0.0)
    }

    /// The sum of a family's series that have this label, as in `outcome="ok"`; of all of them where it is empty.
    pub fn metric_sum(&self, family: &str, label: &str) -> f64 {
        let text = self.proxy.metrics().encode(&self.proxy.gauges());
        let series = text.lines().filter_map(|line| line.strip_prefix(family)?.strip_prefix('{')?.rsplit_once("} "));
        series.filter(|(labels, _)| labels.contains(label)).map(|(_, value)| value.parse().unwrap_or(0.0)).sum()
    }

    /// Requests to the model that ended so.
    pub fn requests(&self, outcome: &str) -> f64 {
        self.metric(&format!(r#"weir_requests_total{{model="gpt-4.1-mini",client="-",outcome="{outcome}"}}"#))
    }

    /// Attempts for the model that ended so.
    pub fn attempts(&self, result: &str) -> f64 {
        self.metric(&format!(r#"weir_upstream_attempts_total{{model="gpt-4.1-mini",result="{result}"}}"#))
    }

    /// Requests for the model that hold a slot, and that wait.
    pub fn in_flight_and_waiting(&self) -> (f64, f64) {
        let gauge = |name| self.metric(&format!(r#"{name}{{model="gpt-4.1-mini"}}"#));
        (gauge("weir_in_flight"), gauge("weir_waiting"))
    }

    /// What is left of a limit, as in `("global", "", "tokens")`.
    pub fn remaining(&self, (scope, name, unit): (&str, &str, &str)) -> f64 {
        self.metric(&format!(r#"weir_limit_remaining{{scope="{scope}",name="{name}",unit="{unit}"}}"#))
    }

    /// What is left of `limits.tokens`.
    pub fn remaining_tokens(&self) -> f64 {
        self.remaining(("global", "", "tokens"))
    }

    /// What requests under way are estimated to cost.
    pub fn reserved_tokens(&self) -> f64 {
        self.metric("weir_reserved_tokens")
    }

    /// Waits, without time passing, until everything that is ready to run has run.
    pub async fn settle(&self) {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    /// Nothing is held by anyone any more.
    #[track_caller]
    pub fn assert_nothing_held(&self) {
        let gauges = self.proxy.gauges();
        for model in &gauges.models {
            assert_eq!((model.in_flight, model.waiting), (0, 0), "of model {}", model.model);
        }
        assert_eq!(gauges.buffered_bytes, 0, "bytes of request bodies");
        assert_eq!(gauges.reserved_tokens, 0, "tokens of requests under way");
        assert_eq!(gauges.connections_active, 0, "connections to the gateway");
    }

    /// Milliseconds since the world began.
    pub fn elapsed(&self) -> u64 {
        millis(self.start.elapsed())
    }

    /// When each request reached the gateway, in milliseconds.
    pub fn times(&self) -> Vec<u64> {
        self.gateway.seen().iter().map(|seen| millis(seen.at - self.start)).collect()
    }
}

/// The configuration, which knows the tests' model by name.
fn with_model(config: &str) -> String {
    let known = config.contains("[models.\"gpt-4.1-mini\"]");
    if known { config.to_owned() } else { format!("{config}\n[models.\"gpt-4.1-mini\"]\n") }
}

fn millis(time: Duration) -> u64 {
    time.as_millis().try_into().expect("a test takes less than an eternity")
}

/// A chat request with this body.
pub fn chat(body: &str) -> Request<Full<Bytes>> {
    request(Method::POST, "/v1/chat/completions", body)
}

/// Any request, with a Host and JSON as its type.
pub fn request(method: Method, target: &str, body: &str) -> Request<Full<Bytes>> {
    let request = Request::builder().method(method).uri(target).header("host", "weir.test");
    request.header("content-type", "application/json").body(Full::from(body.to_owned())).expect("a request")
}

/// A chat request that weir estimates at so many tokens of prompt and of output, as long as the model's answers teach it
/// nothing else.
pub fn costing(prompt: usize, output: u64) -> Request<Full<Bytes>> {
    chat(&body_of("gpt-4.1-mini", prompt, &format!(r#""max_tokens":{output}"#)))
}

/// A body with these members, of four bytes for each token.
pub fn body_of(model: &str, prompt: usize, members: &str) -> String {
    let around = |text: &str| format!(r#"{{"model":"{model}",{members},"input":"{text}"}}"#);
    let padding = (4 * prompt).checked_sub(around("").len()).expect("the prompt is too short for its body");
    around(&"x".repeat(padding))
}

/// The request with this key.
pub fn bearer(request: Request<Full<Bytes>>, key: &str) -> Request<Full<Bytes>> {
    with(request, "authorization", &format!("Bearer {key}"))
}

/// The request as one of an HTTP/2 connection.
pub fn over_http2(mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
    *request.uri_mut() = format!("http://weir.test{}", request.uri().path()).parse().expect("a URL");
    request.headers_mut().remove("host");
    request
}

/// What all these tasks come to.
pub async fn join_all<T>(tasks: impl IntoIterator<Item = JoinHandle<T>>) -> Vec<T> {
    let mut all = Vec::new();
    for task in tasks.into_iter().collect::<Vec<_>>() {
        all.push(task.await.expect("no task panics"));
    }
    all
}

/// The request with one more header.
pub fn with(mut request: Request<Full<Bytes>>, name: &'static str, value: &str) -> Request<Full<Bytes>> {
    request.headers_mut().append(name, value.parse().expect("a value"));
    request
}

/// Reads an answer to its end.
pub async fn collect(response: Response<Incoming>) -> Answer {
    let (head, mut body) = response.into_parts();
    let mut answer = Answer { status: head.status, headers: head.headers, body: Vec::new(), broken: false };
    while let Some(frame) = body.frame().await {
        match frame.map(http_body::Frame::into_data) {
            Ok(Ok(data)) => answer.body.extend_from_slice(&data),
            Ok(Err(_trailers)) => {}
            // hyper's HTTP/2 bodies say so for ever.
            Err(_) => {
                answer.broken = true;
                break;
            }
        }
    }
    answer
}
