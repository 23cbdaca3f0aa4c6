//! Every metric and label. The only user of `prometheus`.
//!
//! Handles are kept per model, and per model and client, so that a request touches atomics only: no label is hashed, and
//! none can collide with another (prometheus' own vectors hash label values without a separator). The labels' values are
//! closed vocabularies, the bounded names of [`Models`] and the configuration's clients; nothing a client sends makes a
//! series. Gauges are read when scraped.

mod gauges;
mod growing;
mod text;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::process_collector::ProcessCollector;
use prometheus::{Histogram, HistogramOpts};

use crate::clients::ClientId;
use crate::error::Cause;
use crate::models::{ModelId, Models};
use growing::Growing;

pub use gauges::{Gauges, LimitGauge, ModelGauges};

/// Defines a label's closed vocabulary.
macro_rules! vocabulary {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The label's text.
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }
    };
}

vocabulary! {
    /// How a request ended, as its client saw it.
    Outcome {
        /// The gateway's answer, whole.
        Ok = "ok",
        /// The client's fault, in the gateway's words or weir's.
        ClientError = "client_error",
        /// The gateway's error, passed on, or an answer that broke off.
        UpstreamError = "upstream_error",
        /// By weir, which could have served it later.
        Refused = "refused",
        /// Without an answer of the gateway's: unreachable, or too slow.
        Failed = "failed",
        /// The client went away first.
        Disconnected = "disconnected",
    }
}

vocabulary! {
    /// How one attempt ended.
    AttemptResult {
        Ok = "ok",
        TooManyRequests = "429",
        ClientError = "4xx",
        ServerError = "5xx",
        ConnectError = "connect_error",
        Reset = "reset",
        Timeout = "timeout",
        StreamError = "stream_error",
        Cancelled = "cancelled",
    }
}

vocabulary! {
    /// Whose limit refused a request.
    RefusedBy {
        Requests = "requests",
        Tokens = "tokens",
        Concurrency = "concurrency",
        Queue = "queue",
        Breaker = "breaker",
        Drain = "drain",
    }
}

impl RefusedBy {
    /// Whose limit it is that refuses for this cause; `None` where something failed, or the request is at fault.
    pub fn of(cause: Cause) -> Option<Self> {
        let word = cause.refused_by()?;
        Some(*Self::ALL.iter().find(|by| by.label() == word).expect("every word of the table is a label"))
    }
}

vocabulary! {
    /// Tokens by what they were for.
    TokenKind {
        Prompt = "prompt",
        Completion = "completion",
        Cached = "cached",
        Reasoning = "reasoning",
    }
}

vocabulary! {
    /// How far a request had come when its client went away.
    Phase {
        Queue = "queue",
        Upstream = "upstream",
        Stream = "stream",
    }
}

vocabulary! {
    /// A bound of the configuration's `[server]` that has bitten.
    Guard {
        /// So many clients were connected that a further one had to wait.
        MaxConnections = "max_connections",
        /// A head, or the first byte of a connection, took too long.
        HeaderTimeout = "header_timeout",
        /// A request's body stopped coming.
        BodyTimeout = "body_timeout",
        /// A client stopped reading its answer.
        WriteTimeout = "write_timeout",
        /// A metered call's body was longer than `max_body`.
        MaxBody = "max_body",
        /// A request's head was too long.
        MaxHead = "max_head",
    }
}

vocabulary! {
    /// What became of a new configuration.
    ReloadResult {
        Applied = "applied",
        Refused = "refused",
    }
}

/// One counter for each value of a vocabulary.
struct Counters<const N: usize>([AtomicU64; N]);

impl<const N: usize> Counters<N> {
    fn new() -> Self {
        Self([const { AtomicU64::new(0) }; N])
    }

    fn add(&self, index: usize, count: u64) {
        self.0[index].fetch_add(count, Ordering::Relaxed);
    }

    fn read(&self) -> [u64; N] {
        self.0.each_ref().map(|counter| counter.load(Ordering::Relaxed))
    }
}

/// What is counted for one client's requests for one model.
pub struct PairMetrics {
    requests: Counters<{ Outcome::ALL.len() }>,
    refused: Counters<{ RefusedBy::ALL.len() }>,
    observed: Counters<{ RefusedBy::ALL.len() }>,
    tokens: Counters<{ TokenKind::ALL.len() }>,
}

impl PairMetrics {
    fn new() -> Self {
        Self { requests: Counters::new(), refused: Counters::new(), observed: Counters::new(), tokens: Counters::new() }
    }

    /// A request has ended.
    pub fn request(&self, outcome: Outcome) {
        self.requests.add(outcome as usize, 1);
    }

    /// weir refused a request.
    pub fn refused(&self, by: RefusedBy) {
        self.refused.add(by as usize, 1);
    }

    /// A limit that only observes would have refused a request.
    pub fn observed(&self, by: RefusedBy) {
        self.observed.add(by as usize, 1);
    }

    /// The gateway counted so many tokens.
    pub fn tokens(&self, kind: TokenKind, count: u64) {
        self.tokens.add(kind as usize, count);
    }
}

/// What is counted for one model, whoever asks for it.
pub struct ModelMetrics {
    attempts: Counters<{ AttemptResult::ALL.len() }>,
    retries: Counters<{ AttemptResult::ALL.len() }>,
    request_duration: Histogram,
    upstream_duration: Histogram,
    first_token: Histogram,
    per_output_token: Histogram,
    queue_wait: Histogram,
}

impl ModelMetrics {
    fn new() -> Self {
        Self {
            attempts: Counters::new(),
            retries: Counters::new(),
            // 10 ms to 655 s: the SDKs wait for 600.
            request_duration: histogram(0.01, 2.0, 17),
            upstream_duration: histogram(0.01, 2.0, 17),
            // 1 ms to 40 s and more.
            first_token: histogram(0.001, 2.0, 17),
            // 10 ms to 2.5 s.
            per_output_token: histogram(0.01, 2.0, 9),
            // 1 ms to 65 s, and two above for those who wait minutes.
            queue_wait: histogram(0.001, 2.0, 19),
        }
    }

    /// A request was answered; all its waiting included.
    pub fn request_duration(&self, duration: Duration) {
        self.request_duration.observe(duration.as_secs_f64());
    }

    /// An attempt has ended that long after it began.
    pub fn attempt(&self, result: AttemptResult, duration: Duration) {
        self.attempts.add(result as usize, 1);
        self.upstream_duration.observe(duration.as_secs_f64());
    }

    /// An attempt that ended like this is made again.
    pub fn retry(&self, reason: AttemptResult) {
        self.retries.add(reason as usize, 1);
    }

    /// From sending the attempt that answered to its first output.
    pub fn first_token(&self, duration: Duration) {
        self.first_token.observe(duration.as_secs_f64());
    }

    /// The mean time for each token after the first.
    pub fn per_output_token(&self, duration: Duration) {
        self.per_output_token.observe(duration.as_secs_f64());
    }

    /// A request was let through, or refused, after waiting so long.
    pub fn queue_wait(&self, duration: Duration) {
        self.queue_wait.observe(duration.as_secs_f64());
    }
}

/// A table by [`ModelId::index`], filled as models come into use.
struct PerModel<T> {
    /// The two that every weir has, without a lock.
    stand_ins: [OnceLock<Arc<T>>; 2],
    named: RwLock<Vec<Option<Arc<T>>>>,
}

impl<T> PerModel<T> {
    fn new() -> Self {
        Self { stand_ins: [const { OnceLock::new() }; 2], named: RwLock::default() }
    }

    /// The model's entry, made where there is none.
    fn get(&self, id: ModelId, make: fn() -> T) -> Arc<T> {
        if let Some(stand_in) = self.stand_ins.get(id.index()) {
            return Arc::clone(stand_in.get_or_init(|| Arc::new(make())));
        }
        if let Some(known) = self.find(id) {
            return known;
        }
        let mut named = self.named.write().unwrap_or_else(PoisonError::into_inner);
        if named.len() <= id.index() {
            named.resize_with(id.index() + 1, || None);
        }
        Arc::clone(named[id.index()].get_or_insert_with(|| Arc::new(make())))
    }

    /// The model's entry, if it was asked for before.
    fn find(&self, id: ModelId) -> Option<Arc<T>> {
        match self.stand_ins.get(id.index()) {
            Some(stand_in) => stand_in.get().cloned(),
            None => self.named.read().unwrap_or_else(PoisonError::into_inner).get(id.index()).cloned().flatten(),
        }
    }
}

/// Everything that is counted.
pub struct Metrics {
    models: Arc<Models>,
    per_model: PerModel<ModelMetrics>,
    /// By [`ClientId::index`].
    clients: Growing<ClientPairs>,
    disconnects: Counters<{ Phase::ALL.len() }>,
    guards: Counters<{ Guard::ALL.len() }>,
    reloads: Counters<{ ReloadResult::ALL.len() }>,
    /// Locked for a look or an update.
    last_reload: Mutex<LastReload>,
    failed_handshakes: AtomicU64,
    lost_log_lines: AtomicU64,
    overhead: Histogram,
    process: ProcessCollector,
}

/// How the configuration came into force; the start counts as a reload that was applied.
#[derive(Debug, Clone, Copy)]
struct LastReload {
    successful: bool,
    /// When one was applied the last time.
    applied_at: SystemTime,
}

/// What is counted for one client.
struct ClientPairs {
    name: Arc<str>,
    per_model: PerModel<PairMetrics>,
}

impl Metrics {
    /// All zero. The clients' names come in the order of [`ClientId::index`].
    pub fn new<'c>(models: Arc<Models>, client_names: impl IntoIterator<Item = &'c Arc<str>>) -> Self {
        let metrics = Self {
            models,
            per_model: PerModel::new(),
            clients: Growing::new(),
            disconnects: Counters::new(),
            guards: Counters::new(),
            reloads: Counters::new(),
            last_reload: Mutex::new(LastReload { successful: true, applied_at: SystemTime::now() }),
            failed_handshakes: AtomicU64::new(0),
            lost_log_lines: AtomicU64::new(0),
            // 50 us to 100 ms.
            overhead: histogram(0.000_05, 2.0, 12),
            process: ProcessCollector::for_self(),
        };
        metrics.know_clients(client_names);
        metrics
    }

    /// There are these clients now, in the order of [`ClientId::index`]. Those that were known keep what was counted, also
    /// when they are no clients any more.
    pub fn know_clients<'c>(&self, names: impl IntoIterator<Item = &'c Arc<str>>) {
        for (index, name) in names.into_iter().enumerate() {
            self.clients.put(index, || ClientPairs { name: Arc::clone(name), per_model: PerModel::new() });
        }
    }

    /// The handles of a model.
    pub fn model(&self, id: ModelId) -> Arc<ModelMetrics> {
        self.per_model.get(id, ModelMetrics::new)
    }

    /// The handles of a client's requests for a model.
    pub fn pair(&self, model: ModelId, client: ClientId) -> Arc<PairMetrics> {
        self.client(client).per_model.get(model, PairMetrics::new)
    }

    /// The names that stand for a client and a model in labels.
    pub fn names(&self, client: ClientId, model: ModelId) -> (Arc<str>, Arc<str>) {
        (Arc::clone(&self.client(client).name), self.models.name(model))
    }

    fn client(&self, id: ClientId) -> &ClientPairs {
        self.clients.get(id.index()).expect("a client is known here before it has an id")
    }

    /// A client went away.
    pub fn disconnect(&self, phase: Phase) {
        self.disconnects.add(phase as usize, 1);
    }

    /// A bound has bitten.
    pub fn guard(&self, guard: Guard) {
        self.guards.add(guard as usize, 1);
    }

    /// A new configuration was given at that time.
    pub fn reload(&self, result: ReloadResult, at: SystemTime) {
        self.reloads.add(result as usize, 1);
        let mut last = self.last_reload.lock().unwrap_or_else(PoisonError::into_inner);
        last.successful = result == ReloadResult::Applied;
        if last.successful {
            last.applied_at = at;
        }
    }

    /// A client's TLS handshake came to nothing.
    pub fn failed_handshake(&self) {
        self.failed_handshakes.fetch_add(1, Ordering::Relaxed);
    }

    /// So many lines of the access log could not be written.
    pub fn lost_log_lines(&self, count: u64) {
        self.lost_log_lines.fetch_add(count, Ordering::Relaxed);
    }

    /// What weir itself added to a request, waiting excluded.
    pub fn overhead(&self, duration: Duration) {
        self.overhead.observe(duration.as_secs_f64());
    }
}

// Every client that can be known has a place.
const _: () = assert!(crate::clients::MAX_NAMES < Growing::<ClientPairs>::CAPACITY);

fn histogram(start: f64, factor: f64, count: usize) -> Histogram {
    let buckets =
        prometheus::exponential_buckets(start, factor, count).expect("the start is positive and the factor above 1");
    Histogram::with_opts(HistogramOpts::new("x", "x").buckets(buckets)).expect("a valid name")
}
