//! Every metric and label. The only user of `prometheus`.
//!
//! Handles are kept per model, so that a request touches atomics only: no label is hashed, and none can collide with
//! another (prometheus' own vectors hash label values without a separator). The labels' values are closed vocabularies and
//! the bounded names of [`Models`]; nothing a client sends makes a series. Gauges are read when scraped.

use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use prometheus::core::{Collector as _, Metric as _};
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::{Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Histogram, HistogramOpts, IntCounter, TextEncoder};

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
struct Counters<const N: usize>([IntCounter; N]);

impl<const N: usize> Counters<N> {
    fn new() -> Self {
        Self(std::array::from_fn(|_| IntCounter::new("x", "x").expect("a valid name")))
    }
}

/// What is counted for one model.
pub struct ModelMetrics {
    requests: Counters<{ Outcome::ALL.len() }>,
    attempts: Counters<{ AttemptResult::ALL.len() }>,
    retries: Counters<{ AttemptResult::ALL.len() }>,
    refused: Counters<{ RefusedBy::ALL.len() }>,
    tokens: Counters<{ TokenKind::ALL.len() }>,
    request_duration: Histogram,
    upstream_duration: Histogram,
    first_token: Histogram,
    per_output_token: Histogram,
    queue_wait: Histogram,
}

impl ModelMetrics {
    fn new() -> Self {
        Self {
            requests: Counters::new(),
            attempts: Counters::new(),
            retries: Counters::new(),
            refused: Counters::new(),
            tokens: Counters::new(),
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

    /// A request has ended.
    pub fn request(&self, outcome: Outcome) {
        self.requests.0[outcome as usize].inc();
    }

    /// A request was answered; all its waiting included.
    pub fn request_duration(&self, duration: Duration) {
        self.request_duration.observe(duration.as_secs_f64());
    }

    /// An attempt has ended that long after it began.
    pub fn attempt(&self, result: AttemptResult, duration: Duration) {
        self.attempts.0[result as usize].inc();
        self.upstream_duration.observe(duration.as_secs_f64());
    }

    /// An attempt that ended like this is made again.
    pub fn retry(&self, reason: AttemptResult) {
        self.retries.0[reason as usize].inc();
    }

    /// weir refused a request.
    pub fn refused(&self, by: RefusedBy) {
        self.refused.0[by as usize].inc();
    }

    /// The gateway counted so many tokens.
    pub fn tokens(&self, kind: TokenKind, count: u64) {
        self.tokens.0[kind as usize].inc_by(count);
    }

    /// From sending the attempt that answered to its first event.
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
}

/// What is left of one limit, read when scraped.
#[derive(Debug, Clone)]
pub struct LimitGauge {
    /// `global` or `model`.
    pub scope: &'static str,
    /// The model's name; empty for the global limits.
    pub name: String,
    /// `requests` or `concurrency`.
    pub unit: &'static str,
    pub remaining: u32,
}

/// All gauges, read when scraped.
#[derive(Debug, Clone, Default)]
pub struct Gauges {
    pub models: Vec<ModelGauges>,
    pub limits: Vec<LimitGauge>,
    pub connections_active: u64,
    pub connections_idle: u64,
    pub buffered_bytes: u64,
}

/// Everything that is counted.
pub struct Metrics {
    models: Arc<Models>,
    /// By [`ModelId::index`]; filled as models come into use.
    per_model: RwLock<Vec<Option<Arc<ModelMetrics>>>>,
    /// The two that every weir has, without a lock.
    stand_ins: [OnceLock<Arc<ModelMetrics>>; 2],
    disconnects: Counters<{ Phase::ALL.len() }>,
    overhead: Histogram,
    process: ProcessCollector,
}

impl Metrics {
    /// All zero.
    pub fn new(models: Arc<Models>) -> Self {
        Self {
            models,
            per_model: RwLock::default(),
            stand_ins: Default::default(),
            disconnects: Counters::new(),
            // 50 us to 100 ms.
            overhead: histogram(0.000_05, 2.0, 12),
            process: ProcessCollector::for_self(),
        }
    }

    /// The handles of a model.
    pub fn model(&self, id: ModelId) -> Arc<ModelMetrics> {
        if let Some(stand_in) = self.stand_ins.get(id.index()) {
            return Arc::clone(stand_in.get_or_init(|| Arc::new(ModelMetrics::new())));
        }
        let known = |per_model: &[Option<Arc<ModelMetrics>>]| per_model.get(id.index()).cloned().flatten();
        if let Some(metrics) = known(&self.per_model.read().unwrap_or_else(PoisonError::into_inner)) {
            return metrics;
        }
        let mut per_model = self.per_model.write().unwrap_or_else(PoisonError::into_inner);
        if per_model.len() <= id.index() {
            per_model.resize(id.index() + 1, None);
        }
        Arc::clone(per_model[id.index()].get_or_insert_with(|| Arc::new(ModelMetrics::new())))
    }

    /// A client went away.
    pub fn disconnect(&self, phase: Phase) {
        self.disconnects.0[phase as usize].inc();
    }

    /// What weir itself added to a request, waiting excluded.
    pub fn overhead(&self, duration: Duration) {
        self.overhead.observe(duration.as_secs_f64());
    }

    /// Everything, in Prometheus' text format.
    pub fn encode(&self, gauges: &Gauges) -> String {
        let models = self.in_use();
        let mut families: Vec<MetricFamily> = COUNTERS.iter().map(|family| family.of(&models)).collect();
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

    /// Every model that was asked for since the start, with its name.
    fn in_use(&self) -> Vec<(Arc<str>, Arc<ModelMetrics>)> {
        let per_model = self.per_model.read().unwrap_or_else(PoisonError::into_inner);
        let find = |id: ModelId| match self.stand_ins.get(id.index()) {
            Some(stand_in) => stand_in.get().cloned(),
            None => per_model.get(id.index()).cloned().flatten(),
        };
        self.models.all().into_iter().filter_map(|id| Some((self.models.name(id), find(id)?))).collect()
    }

    fn disconnects(&self) -> MetricFamily {
        let phases = Phase::ALL.iter().zip(&self.disconnects.0);
        let metrics = phases.map(|(phase, counter)| labeled(counter.metric(), &[("phase", phase.label())]));
        let help = "Clients that went away before their answer was whole, by how far the request had come.";
        family("weir_client_disconnects_total", help, MetricType::COUNTER, metrics.collect())
    }
}

type InUse = [(Arc<str>, Arc<ModelMetrics>)];

/// A family of counters, one for each model and value of a vocabulary.
struct CounterFamily {
    name: &'static str,
    help: &'static str,
    label: &'static str,
    /// Whether there is a `client` label.
    by_client: bool,
    values: fn(&ModelMetrics) -> Vec<(&'static str, &IntCounter)>,
}

/// Pairs a vocabulary's labels with its counters.
macro_rules! values {
    ($vocabulary:ident, $field:ident) => {
        |metrics| $vocabulary::ALL.iter().map(|value| value.label()).zip(&metrics.$field.0).collect()
    };
}

const COUNTERS: [CounterFamily; 5] = [
    CounterFamily {
        name: "weir_requests_total",
        help: "Requests, by how they ended for the client.",
        label: "outcome",
        by_client: true,
        values: values!(Outcome, requests),
    },
    CounterFamily {
        name: "weir_refused_total",
        help: "Requests that weir refused, by whose limit it was.",
        label: "reason",
        by_client: true,
        values: values!(RefusedBy, refused),
    },
    CounterFamily {
        name: "weir_upstream_attempts_total",
        help: "Attempts at the gateway, by how they ended. More than requests: there were retries.",
        label: "result",
        by_client: false,
        values: values!(AttemptResult, attempts),
    },
    CounterFamily {
        name: "weir_retries_total",
        help: "Attempts that were made again, by how the one before had ended.",
        label: "reason",
        by_client: false,
        values: values!(AttemptResult, retries),
    },
    CounterFamily {
        name: "weir_tokens_total",
        help: "Tokens as the gateway counts them. cached is part of prompt, reasoning part of completion.",
        label: "kind",
        by_client: true,
        values: values!(TokenKind, tokens),
    },
];

impl CounterFamily {
    fn of(&self, models: &InUse) -> MetricFamily {
        let metrics = models.iter().flat_map(|(model, metrics)| {
            (self.values)(metrics).into_iter().map(|(value, counter)| {
                // Nobody is told apart by client yet: the label is there so that queries need not change.
                let client = self.by_client.then_some(("client", "-"));
                let labels: Vec<_> =
                    [("model", &**model)].into_iter().chain(client).chain([(self.label, value)]).collect();
                labeled(counter.metric(), &labels)
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
        help: "From sending the attempt that answered with a stream to its first event.",
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
    fn of(&self, models: &InUse) -> MetricFamily {
        let metrics = models.iter().map(|(model, metrics)| labeled((self.pick)(metrics).metric(), &[("model", model)]));
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
        gauge(f64::from(limit.remaining), &[("scope", limit.scope), ("name", &limit.name), ("unit", limit.unit)])
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
            "The tightest number of slots that the model's requests have to share.",
            of_models(|model| model.concurrency_limit.map(f64::from)),
        ),
        row(
            "weir_limit_remaining",
            "What is left of a limit now: requests that may start, or free slots.",
            limits.collect(),
        ),
        row("weir_upstream_connections", "Connections to the gateway.", connections),
        row("weir_buffered_bytes", "Request bodies held in memory.", vec![gauge(gauges.buffered_bytes as f64, &[])]),
        row("weir_build_info", "1, with the version as a label.", vec![version]),
    ]
}

fn histogram(start: f64, factor: f64, count: usize) -> Histogram {
    let buckets =
        prometheus::exponential_buckets(start, factor, count).expect("the start is positive and the factor above 1");
    Histogram::with_opts(HistogramOpts::new("x", "x").buckets(buckets)).expect("a valid name")
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

    #[test]
    fn two_models_never_share_a_series() {
        let models = Arc::new(Models::new(["gpt-4", "gpt-4-"]));
        let metrics = Metrics::new(models.clone());
        metrics.model(models.find("gpt-4")).request(Outcome::Ok);
        metrics.model(models.find("gpt-4-")).request(Outcome::Ok);
        let text = metrics.encode(&Gauges::default());
        assert!(text.contains(r#"weir_requests_total{model="gpt-4",client="-",outcome="ok"} 1"#), "{text}");
        assert!(text.contains(r#"weir_requests_total{model="gpt-4-",client="-",outcome="ok"} 1"#), "{text}");
    }

    #[test]
    fn a_name_with_quotes_and_line_breaks_is_escaped() {
        let models = Arc::new(Models::new(["a\"b\n"]));
        let metrics = Metrics::new(models.clone());
        metrics.model(models.find("a\"b\n")).retry(AttemptResult::ServerError);
        assert!(metrics.encode(&Gauges::default()).contains(r#"weir_retries_total{model="a\"b\n",reason="5xx"} 1"#));
    }

    #[test]
    fn every_family_has_a_help_text_and_the_prefix() {
        let metrics = Metrics::new(Arc::new(Models::new([])));
        metrics.model(ModelId::NONE).request(Outcome::Ok);
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
