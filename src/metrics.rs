//! Every metric and label. The only user of `prometheus`.
//!
//! Handles are kept per model, and per model and client, so that a request touches atomics only: no label is hashed, and
//! none can collide with another (prometheus' own vectors hash label values without a separator). The labels' values are
//! closed vocabularies, the bounded names of [`Models`] and the configuration's clients; nothing a client sends makes a
//! series. Gauges are read when scraped.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use prometheus::core::{Collector as _, Metric as _};
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Histogram, HistogramOpts, TextEncoder};

use crate::clients::ClientId;
use crate::models::{ModelId, Models};

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

/// The gauges of one model, read when scraped.
#[derive(Debug, Clone, Default)]
pub struct ModelGauges {
    pub model: Arc<str>,
    pub in_flight: u64,
    pub waiting: u64,
    pub concurrency_limit: Option<u32>,
    /// How long the gateway wants to be left alone by it.
    pub cooldown: Duration,
}

/// What is left of one limit, read when scraped.
#[derive(Debug, Clone)]
pub struct LimitGauge {
    /// `global`, `model` or `client`.
    pub scope: &'static str,
    /// The model's name, or the client's; empty for the global limits.
    pub name: String,
    /// `requests`, `tokens` or `concurrency`.
    pub unit: &'static str,
    pub remaining: u64,
}

/// All gauges, read when scraped.
#[derive(Debug, Clone, Default)]
pub struct Gauges {
    pub models: Vec<ModelGauges>,
    pub limits: Vec<LimitGauge>,
    pub connections_active: u64,
    pub connections_idle: u64,
    pub buffered_bytes: u64,
    /// Tokens that requests under way are estimated to take.
    pub reserved_tokens: u64,
    /// tokio's tasks alive, of all runtimes.
    pub tasks: u64,
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
    clients: Vec<ClientPairs>,
    disconnects: Counters<{ Phase::ALL.len() }>,
    overhead: Histogram,
    process: ProcessCollector,
}

/// What is counted for one client.
struct ClientPairs {
    name: Arc<str>,
    per_model: PerModel<PairMetrics>,
}

impl Metrics {
    /// All zero. The clients' names come in the order of [`ClientId::index`].
    pub fn new<'c>(models: Arc<Models>, client_names: impl IntoIterator<Item = &'c Arc<str>>) -> Self {
        let pairs = |name: &Arc<str>| ClientPairs { name: Arc::clone(name), per_model: PerModel::new() };
        Self {
            models,
            per_model: PerModel::new(),
            clients: client_names.into_iter().map(pairs).collect(),
            disconnects: Counters::new(),
            // 50 us to 100 ms.
            overhead: histogram(0.000_05, 2.0, 12),
            process: ProcessCollector::for_self(),
        }
    }

    /// The handles of a model.
    pub fn model(&self, id: ModelId) -> Arc<ModelMetrics> {
        self.per_model.get(id, ModelMetrics::new)
    }

    /// The handles of a client's requests for a model.
    pub fn pair(&self, model: ModelId, client: ClientId) -> Arc<PairMetrics> {
        self.clients[client.index()].per_model.get(model, PairMetrics::new)
    }

    /// A client went away.
    pub fn disconnect(&self, phase: Phase) {
        self.disconnects.add(phase as usize, 1);
    }

    /// What weir itself added to a request, waiting excluded.
    pub fn overhead(&self, duration: Duration) {
        self.overhead.observe(duration.as_secs_f64());
    }

    /// Everything, in Prometheus' text format.
    pub fn encode(&self, gauges: &Gauges) -> String {
        let (models, pairs) = (self.models_in_use(), self.pairs_in_use());
        let mut families: Vec<MetricFamily> = PAIR_COUNTERS.iter().map(|family| family.of(&pairs)).collect();
        families.extend(MODEL_COUNTERS.iter().map(|family| family.of(&models)));
        families.extend(HISTOGRAMS.iter().map(|family| family.of(&models)));
        families.push(self.disconnects());
        families.push(family(
            "weir_overhead_seconds",
            OVERHEAD_HELP,
            MetricType::HISTOGRAM,
            vec![self.overhead.metric()],
        ));
        families.extend(gauge_families(gauges));
        families.retain(|family| !family.get_metric().is_empty());
        families.extend(self.process.collect());
        TextEncoder::new().encode_to_string(&families).expect("named families that are not empty can be encoded")
    }

    /// Every model that was asked for since the start.
    fn models_in_use(&self) -> Vec<InUse<ModelMetrics>> {
        let find = |id| Some(InUse { model: self.models.name(id), client: None, metrics: self.per_model.find(id)? });
        self.models.all().into_iter().filter_map(find).collect()
    }

    /// Every model with every client that asked for it since the start.
    fn pairs_in_use(&self) -> Vec<InUse<PairMetrics>> {
        let models = self.models.all();
        let of_client = |client: &ClientPairs| {
            let find = |id: &ModelId| {
                let (model, client_name) = (self.models.name(*id), Arc::clone(&client.name));
                Some(InUse { model, client: Some(client_name), metrics: client.per_model.find(*id)? })
            };
            models.iter().filter_map(find).collect::<Vec<_>>()
        };
        self.clients.iter().flat_map(of_client).collect()
    }

    fn disconnects(&self) -> MetricFamily {
        let phases = Phase::ALL.iter().zip(self.disconnects.read());
        let metrics = phases.map(|(phase, count)| counter(count, &[("phase", phase.label())]));
        let help = "Clients that went away before their answer was whole, by how far the request had come.";
        family("weir_client_disconnects_total", help, MetricType::COUNTER, metrics.collect())
    }
}

/// What is counted, and the names that stand for what it is counted for.
struct InUse<T> {
    model: Arc<str>,
    /// Absent where clients are not told apart.
    client: Option<Arc<str>>,
    metrics: Arc<T>,
}

/// A family of counters, one for each model (and client) and value of a vocabulary.
struct CounterFamily<T> {
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: fn(&T) -> Vec<(&'static str, u64)>,
}

/// Pairs a vocabulary's labels with its counters.
macro_rules! values {
    ($vocabulary:ident, $field:ident) => {
        |metrics| $vocabulary::ALL.iter().map(|value| value.label()).zip(metrics.$field.read()).collect()
    };
}

const PAIR_COUNTERS: [CounterFamily<PairMetrics>; 4] = [
    CounterFamily {
        name: "weir_requests_total",
        help: "Requests, by how they ended for the client.",
        label: "outcome",
        values: values!(Outcome, requests),
    },
    CounterFamily {
        name: "weir_refused_total",
        help: "Requests that weir refused, by whose limit it was.",
        label: "reason",
        values: values!(RefusedBy, refused),
    },
    CounterFamily {
        name: "weir_observed_total",
        help: "Requests that a limit in observe mode would have refused.",
        label: "reason",
        values: values!(RefusedBy, observed),
    },
    CounterFamily {
        name: "weir_tokens_total",
        help: "Tokens as the gateway counts them. cached is part of prompt, reasoning part of completion.",
        label: "kind",
        values: values!(TokenKind, tokens),
    },
];

const MODEL_COUNTERS: [CounterFamily<ModelMetrics>; 2] = [
    CounterFamily {
        name: "weir_upstream_attempts_total",
        help: "Attempts at the gateway, by how they ended. More than requests: there were retries.",
        label: "result",
        values: values!(AttemptResult, attempts),
    },
    CounterFamily {
        name: "weir_retries_total",
        help: "Attempts that were made again, by how the one before had ended.",
        label: "reason",
        values: values!(AttemptResult, retries),
    },
];

impl<T> CounterFamily<T> {
    fn of(&self, in_use: &[InUse<T>]) -> MetricFamily {
        let metrics = in_use.iter().flat_map(|InUse { model, client, metrics }| {
            (self.values)(metrics).into_iter().map(move |(value, count)| {
                let client = client.as_ref().map(|client| ("client", &**client));
                let labels: Vec<_> =
                    [("model", &**model)].into_iter().chain(client).chain([(self.label, value)]).collect();
                counter(count, &labels)
            })
        });
        family(self.name, self.help, MetricType::COUNTER, metrics.collect())
    }
}

/// A family of histograms, one for each model.
struct HistogramFamily {
    name: &'static str,
    help: &'static str,
    pick: fn(&ModelMetrics) -> &Histogram,
}

const HISTOGRAMS: [HistogramFamily; 5] = [
    HistogramFamily {
        name: "weir_request_duration_seconds",
        help: "From a request's head to the last byte of its answer, waiting and retries included; answered requests only.",
        pick: |metrics| &metrics.request_duration,
    },
    HistogramFamily {
        name: "weir_upstream_duration_seconds",
        help: "One attempt at the gateway, from sending it to its end: the model's own latency.",
        pick: |metrics| &metrics.upstream_duration,
    },
    HistogramFamily {
        name: "weir_time_to_first_token_seconds",
        help: "From sending the attempt that answered with a stream to its first output.",
        pick: |metrics| &metrics.first_token,
    },
    HistogramFamily {
        name: "weir_time_per_output_token_seconds",
        help: "Mean time for each token of a stream after the first.",
        pick: |metrics| &metrics.per_output_token,
    },
    HistogramFamily {
        name: "weir_queue_wait_seconds",
        help: "How long an attempt waited for its permit, or until it was refused.",
        pick: |metrics| &metrics.queue_wait,
    },
];

impl HistogramFamily {
    fn of(&self, models: &[InUse<ModelMetrics>]) -> MetricFamily {
        let of_model = |of: &InUse<ModelMetrics>| labeled((self.pick)(&of.metrics).metric(), &[("model", &of.model)]);
        let metrics = models.iter().map(of_model);
        family(self.name, self.help, MetricType::HISTOGRAM, metrics.collect())
    }
}

const OVERHEAD_HELP: &str =
    "What weir itself added before an answer began, without waiting and without the gateway's time.";

fn gauge_families(gauges: &Gauges) -> Vec<MetricFamily> {
    let of_models = |value: fn(&ModelGauges) -> Option<f64>| {
        let metrics =
            gauges.models.iter().filter_map(move |model| Some(gauge(value(model)?, &[("model", &model.model)])));
        metrics.collect::<Vec<_>>()
    };
    let limits = gauges.limits.iter().map(|limit| {
        gauge(limit.remaining as f64, &[("scope", limit.scope), ("name", &limit.name), ("unit", limit.unit)])
    });
    let connections = [("active", gauges.connections_active), ("idle", gauges.connections_idle)];
    let connections = connections.map(|(state, count)| gauge(count as f64, &[("state", state)])).to_vec();
    let version = gauge(1.0, &[("version", env!("CARGO_PKG_VERSION"))]);
    let row = |name, help, metrics| family(name, help, MetricType::GAUGE, metrics);
    vec![
        row("weir_in_flight", "Requests that hold a slot now.", of_models(|model| Some(model.in_flight as f64))),
        row("weir_waiting", "Requests in the queue now.", of_models(|model| Some(model.waiting as f64))),
        row(
            "weir_concurrency_limit",
            "How many of the model's requests may be under way: found by trying where limits.concurrency is adaptive.",
            of_models(|model| model.concurrency_limit.map(f64::from)),
        ),
        row(
            "weir_cooldown_seconds",
            "How long no request for the model is let through yet: the gateway has said so, or fails.",
            of_models(|model| Some(model.cooldown.as_secs_f64())),
        ),
        row(
            "weir_limit_remaining",
            "What is left of a limit now: requests that may start, tokens that may be asked for, or free slots.",
            limits.collect(),
        ),
        row("weir_upstream_connections", "Connections to the gateway.", connections),
        row("weir_buffered_bytes", "Request bodies held in memory.", vec![gauge(gauges.buffered_bytes as f64, &[])]),
        row(
            "weir_reserved_tokens",
            "Estimated tokens of requests under way, not settled yet.",
            vec![gauge(gauges.reserved_tokens as f64, &[])],
        ),
        row(
            "weir_tasks",
            "Tasks alive in weir: two for each connection or so, and a few of its own. Not to grow without these.",
            vec![gauge(gauges.tasks as f64, &[])],
        ),
        row("weir_build_info", "1, with the version as a label.", vec![version]),
    ]
}

fn histogram(start: f64, factor: f64, count: usize) -> Histogram {
    let buckets =
        prometheus::exponential_buckets(start, factor, count).expect("the start is positive and the factor above 1");
    Histogram::with_opts(HistogramOpts::new("x", "x").buckets(buckets)).expect("a valid name")
}

fn counter(count: u64, labels: &[(&str, &str)]) -> Metric {
    let (mut metric, mut counter) = (Metric::default(), Counter::default());
    counter.set_value(count as f64);
    metric.set_counter(counter);
    labeled(metric, labels)
}

fn gauge(value: f64, labels: &[(&str, &str)]) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    labeled(Metric::from_gauge(gauge), labels)
}

fn labeled(mut metric: Metric, labels: &[(&str, &str)]) -> Metric {
    let pairs = labels.iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    });
    metric.set_label(pairs.collect());
    metric
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clients::Clients;
    use crate::config::Config;

    /// The metrics of a weir with these models and without clients.
    fn metrics(models: &Arc<Models>) -> Metrics {
        Metrics::new(models.clone(), Clients::new(&Config::default()).names())
    }

    #[test]
    fn two_models_never_share_a_series() {
        let models = Arc::new(Models::new(["gpt-4", "gpt-4-"]));
        let metrics = metrics(&models);
        metrics.pair(models.find("gpt-4"), ClientId::NONE).request(Outcome::Ok);
        metrics.pair(models.find("gpt-4-"), ClientId::NONE).request(Outcome::Ok);
        let text = metrics.encode(&Gauges::default());
        assert!(text.contains(r#"weir_requests_total{model="gpt-4",client="-",outcome="ok"} 1"#), "{text}");
        assert!(text.contains(r#"weir_requests_total{model="gpt-4-",client="-",outcome="ok"} 1"#), "{text}");
    }

    #[test]
    fn each_client_has_counters_of_its_own_for_each_model() {
        let config = Config::parse("[clients.a]\nkey = \"k1\"\n[clients.b]\nkey = \"k2\"", &|_| None).expect("good");
        let (models, clients) = (Arc::new(Models::new(["m"])), Clients::new(&config));
        let metrics = Metrics::new(models.clone(), clients.names());
        for (count, client) in [ClientId::NONE].into_iter().chain(clients.ids()).enumerate() {
            metrics.pair(models.find("m"), client).tokens(TokenKind::Prompt, count as u64);
            metrics.pair(models.find("m"), client).observed(RefusedBy::Tokens);
        }
        let text = metrics.encode(&Gauges::default());
        for series in [
            r#"weir_tokens_total{model="m",client="-",kind="prompt"} 0"#,
            r#"weir_tokens_total{model="m",client="a",kind="prompt"} 1"#,
            r#"weir_tokens_total{model="m",client="b",kind="prompt"} 2"#,
            r#"weir_observed_total{model="m",client="b",reason="tokens"} 1"#,
            "weir_reserved_tokens 0",
        ] {
            assert!(text.contains(series), "{series} is not in {text}");
        }
        assert!(!text.contains(r#"model="other""#), "only what was asked for has series");
    }

    #[test]
    fn a_name_with_quotes_and_line_breaks_is_escaped() {
        let models = Arc::new(Models::new(["a\"b\n"]));
        let metrics = metrics(&models);
        metrics.model(models.find("a\"b\n")).retry(AttemptResult::ServerError);
        assert!(metrics.encode(&Gauges::default()).contains(r#"weir_retries_total{model="a\"b\n",reason="5xx"} 1"#));
    }

    #[test]
    fn every_family_has_a_help_text_and_the_prefix() {
        let metrics = metrics(&Arc::new(Models::new([])));
        metrics.model(ModelId::NONE).retry(AttemptResult::Reset);
        metrics.pair(ModelId::NONE, ClientId::NONE).request(Outcome::Ok);
        let gauges = Gauges {
            models: vec![ModelGauges { model: "a".into(), concurrency_limit: Some(10), ..ModelGauges::default() }],
            limits: vec![LimitGauge { scope: "global", name: String::new(), unit: "requests", remaining: 3 }],
            ..Gauges::default()
        };
        let text = metrics.encode(&gauges);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().expect("a name");
            let base =
                ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
            assert!(name.starts_with("weir_") || name.starts_with("process_"), "{line}");
            assert!(text.contains(&format!("# HELP {base} ")), "{line}");
        }
    }
}
