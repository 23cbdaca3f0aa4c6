//! The text that is scraped: every family, with its name and help.

use prometheus::core::{Collector as _, Metric as _};
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Histogram, TextEncoder};

use super::*;

impl Metrics {
    /// Everything, in Prometheus' text format.
    pub fn encode(&self, gauges: &Gauges) -> String {
        let (models, pairs) = (self.models_in_use(), self.pairs_in_use());
        let mut families: Vec<MetricFamily> = PAIR_COUNTERS.iter().map(|family| family.of(&pairs)).collect();
        families.extend(MODEL_COUNTERS.iter().map(|family| family.of(&models)));
        families.extend(HISTOGRAMS.iter().map(|family| family.of(&models)));
        families.extend(self.of_all());
        families.extend(self.of_last_reload());
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

    /// How the last new configuration fared.
    fn of_last_reload(&self) -> [MetricFamily; 2] {
        let last = *self.last_reload.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |name, help, value| family(name, help, MetricType::GAUGE, vec![gauge(value, &[])]);
        let applied_at = last.applied_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        [
            of(
                "weir_config_last_reload_successful",
                "1 where the configuration in force is the last one given; 0 where that was refused: weir's log says why.",
                f64::from(u8::from(last.successful)),
            ),
            of(
                "weir_config_last_reload_success_timestamp_seconds",
                "When the configuration in force was applied, in seconds since 1970: at the start, or by the last reload.",
                applied_at.as_secs_f64().floor(),
            ),
        ]
    }

    /// What is counted for all together.
    fn of_all(&self) -> [MetricFamily; 5] {
        let of = |name, help, metrics| family(name, help, MetricType::COUNTER, metrics);
        let phases = Phase::ALL.iter().zip(self.disconnects.read());
        let guards = Guard::ALL.iter().zip(self.guards.read());
        let reloads = ReloadResult::ALL.iter().zip(self.reloads.read());
        [
            of(
                "weir_client_disconnects_total",
                "Clients that went away before their answer was whole, by how far the request had come: in the queue, at the gateway, or in the stream.",
                phases.map(|(phase, count)| counter(count, &[("phase", phase.label())])).collect(),
            ),
            of(
                "weir_guards_total",
                "How often a bound of the configuration's [server] has held a client up, refused it or cut it off.",
                guards.map(|(guard, count)| counter(count, &[("guard", guard.label())])).collect(),
            ),
            of(
                "weir_reloads_total",
                "New configurations, by what became of them; a refused one has changed nothing.",
                reloads.map(|(result, count)| counter(count, &[("result", result.label())])).collect(),
            ),
            of(
                "weir_tls_handshake_failures_total",
                "Clients' TLS handshakes that came to nothing.",
                vec![counter(self.failed_handshakes.load(Ordering::Relaxed), &[])],
            ),
            of(
                "weir_access_log_dropped_total",
                "Lines of the access log that were not written: the disk was too slow, or refused them.",
                vec![counter(self.lost_log_lines.load(Ordering::Relaxed), &[])],
            ),
        ]
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
        help: "Requests that have ended, by how they did for the client. Errors that clients see are upstream_error, failed and refused.",
        label: "outcome",
        values: values!(Outcome, requests),
    },
    CounterFamily {
        name: "weir_refused_total",
        help: "Requests that weir refused, by whose limit it was: requests, tokens, concurrency, queue (full), breaker, drain. Not those that the gateway refused.",
        label: "reason",
        values: values!(RefusedBy, refused),
    },
    CounterFamily {
        name: "weir_observed_total",
        help: "Requests that a limit in observe mode would have refused; they passed. Look at it before the limit is enforced.",
        label: "reason",
        values: values!(RefusedBy, observed),
    },
    CounterFamily {
        name: "weir_tokens_total",
        help: "Tokens as the gateway counts them, of answers that told their usage. cached is part of prompt, reasoning part of completion: add prompt and completion only.",
        label: "kind",
        values: values!(TokenKind, tokens),
    },
];

const MODEL_COUNTERS: [CounterFamily<ModelMetrics>; 2] = [
    CounterFamily {
        name: "weir_upstream_attempts_total",
        help: "Attempts at the gateway, by how they ended. 429 and 5xx are what the gateway refused or failed at, whether or not a retry made good for it.",
        label: "result",
        values: values!(AttemptResult, attempts),
    },
    CounterFamily {
        name: "weir_retries_total",
        help: "Attempts that were made again, by how the one before had ended. Many of 429 say that a limit of weir's is higher than the gateway's.",
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
        help: "From a request's head to the last byte of its answer: what a client sees, waiting and retries included. Answered requests only: no refusals, no failures.",
        pick: |metrics| &metrics.request_duration,
    },
    HistogramFamily {
        name: "weir_upstream_duration_seconds",
        help: "One attempt at the gateway, from sending it to its end, refused and failed ones included; no waiting in weir: the model's own latency.",
        pick: |metrics| &metrics.upstream_duration,
    },
    HistogramFamily {
        name: "weir_time_to_first_token_seconds",
        help: "Streams only: from sending the attempt that answered to its first output. Waiting in weir is not in it; see weir_queue_wait_seconds.",
        pick: |metrics| &metrics.first_token,
    },
    HistogramFamily {
        name: "weir_time_per_output_token_seconds",
        help: "Streams that told their usage: the mean time for each token after the first.",
        pick: |metrics| &metrics.per_output_token,
    },
    HistogramFamily {
        name: "weir_queue_wait_seconds",
        help: "How long an attempt waited in weir for its permit, or until it was refused; near 0 where no limit was in the way.",
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

const OVERHEAD_HELP: &str = "What weir itself added before an answer began: without waiting, without the gateway's time, without reading the client's body. It grows when weir is short of CPU.";

fn gauge_families(gauges: &Gauges) -> Vec<MetricFamily> {
    let of_models = |value: fn(&ModelGauges) -> Option<f64>| {
        let metrics =
            gauges.models.iter().filter_map(move |model| Some(gauge(value(model)?, &[("model", &model.model)])));
        metrics.collect::<Vec<_>>()
    };
    let limits = |value: fn(&LimitGauge) -> Option<f64>| {
        let of = move |limit: &LimitGauge| {
            let labels = [("scope", limit.scope), ("name", &*limit.name), ("unit", limit.unit)];
            Some(gauge(value(limit)?, &labels))
        };
        gauges.limits.iter().filter_map(of).collect::<Vec<_>>()
    };
    let single = |value: u64| vec![gauge(value as f64, &[])];
    let connections = [("active", gauges.connections_active), ("idle", gauges.connections_idle)];
    let connections = connections.map(|(state, count)| gauge(count as f64, &[("state", state)])).to_vec();
    let version = gauge(1.0, &[("version", env!("CARGO_PKG_VERSION"))]);
    let row = |name, help, metrics| family(name, help, MetricType::GAUGE, metrics);
    vec![
        row(
            "weir_in_flight",
            "Requests that hold a permit now: sent to the gateway, until the last byte of the answer.",
            of_models(|model| Some(model.in_flight as f64)),
        ),
        row(
            "weir_waiting",
            "Requests in the queue now. weir_queue_wait_seconds says how long they take to leave it; weir_limit_waiting and weir_learned_waiting, whose limit they wait for.",
            of_models(|model| Some(model.waiting as f64)),
        ),
        row(
            "weir_learned_waiting",
            "Requests of the model that wait now for what weir has learned of its gateway: a cool-down, a quota, the breaker, adaptive slots. What they wait for is the gateway's, not a limit of the configuration.",
            of_models(|model| Some(model.learned_waiting as f64)),
        ),
        row(
            "weir_concurrency_limit",
            "How many of the model's requests may be under way: configured, or found by trying where limits.concurrency is adaptive (of the key that has most, where clients pass keys of their own).",
            of_models(|model| model.concurrency_limit.map(f64::from)),
        ),
        row(
            "weir_cooldown_seconds",
            "How long no request for the model is let through yet: the gateway has said so (429, 503 with a hint), or fails. Of several keys the longest.",
            of_models(|model| Some(model.cooldown.as_secs_f64())),
        ),
        row(
            "weir_breaker_open",
            "1 while the gateway fails and the breaker holds the model's requests back but for one a second; after breaker.give_up they are refused. 0 where it is known and well.",
            of_models(|model| Some(f64::from(u8::from(model.breaker_open)))),
        ),
        row(
            "weir_learned_requests_per_second",
            "The quota of requests that weir has learned of the model's gateway: source told by its headers, or inferred from its refusals (of the key that is used most, where clients pass keys of their own). Absent while nothing is known, which is as it should be where nothing is refused.",
            learned_requests(&gauges.models),
        ),
        row(
            "weir_learned_tokens_per_second",
            "The quota of tokens that the gateway's headers tell of the model, as fast as it was seen to come back. Absent while nothing is known.",
            of_models(|model| model.told_tokens_per_second),
        ),
        row(
            "weir_limit_remaining",
            "What is left of a limit now: requests that may start, tokens that may be asked for, or free slots.",
            limits(|limit| Some(limit.remaining as f64)),
        ),
        row(
            "weir_limit_capacity",
            "What weir_limit_remaining is at most: a bucket's burst, or all slots.",
            limits(|limit| Some(limit.capacity as f64)),
        ),
        row(
            "weir_limit_refill_per_second",
            "What comes back to a limit in a second: the rate of the configuration, this weir's share of it.",
            limits(|limit| limit.per_second),
        ),
        row(
            "weir_limit_waiting",
            "Requests that wait for a limit of the configuration now, and those behind them in their client's turn: each waits for one limit at a time. 0 where it is in nobody's way.",
            limits(|limit| Some(limit.waiting as f64)),
        ),
        row("weir_upstream_connections", "Connections to the gateway.", connections),
        row("weir_client_connections", "Connections from clients.", single(gauges.client_connections)),
        row(
            "weir_client_connections_limit",
            "server.max_connections: so many clients may be connected.",
            single(gauges.client_connections_limit),
        ),
        row(
            "weir_draining",
            "1 from the signal to stop on: /readyz says no, and after server.lame_duck the listeners close.",
            single(gauges.is_draining.into()),
        ),
        row("weir_waiting_limit", "queue.max_waiting: so many requests may wait.", single(gauges.waiting_limit)),
        row("weir_buffered_bytes", "Request bodies held in memory.", single(gauges.buffered_bytes)),
        row("weir_buffered_bytes_limit", "queue.max_bytes: so much may be held.", single(gauges.buffered_bytes_limit)),
        row(
            "weir_reserved_tokens",
            "Estimated tokens of requests under way, not settled yet.",
            single(gauges.reserved_tokens),
        ),
        row(
            "weir_tasks",
            "Tasks alive in weir: two for each connection or so, and a few of its own. Not to grow without these.",
            single(gauges.tasks),
        ),
        row("weir_build_info", "1, with the version as a label.", vec![version]),
    ]
}

fn learned_requests(models: &[ModelGauges]) -> Vec<Metric> {
    let of_model = |model: &ModelGauges| {
        let sources = [("told", model.told_requests_per_second), ("inferred", model.inferred_requests_per_second)];
        let labels = |source| [("model", Arc::clone(&model.model)), ("source", Arc::from(source))];
        let known = sources.into_iter().filter_map(move |(source, rate)| Some((labels(source), rate?)));
        known
            .map(|(labels, rate)| gauge(rate, &labels.each_ref().map(|(name, value)| (*name, &**value))))
            .collect::<Vec<_>>()
    };
    models.iter().flat_map(of_model).collect()
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
    fn a_client_that_is_new_is_counted_and_one_that_is_gone_keeps_its_series() {
        let config = |text| Config::parse(text, &|_| None).expect("good");
        let (models, before) = (Arc::new(Models::new(["m"])), Clients::new(&config("[clients.a]\nkey = \"k1\"")));
        let metrics = Metrics::new(models.clone(), before.names());
        let a = before.ids().next().expect("a client");
        metrics.pair(models.find("m"), a).tokens(TokenKind::Prompt, 1);
        let after = before.changed_to(&config("[clients.b]\nkey = \"k2\"")).expect("few names");
        metrics.know_clients(after.names());
        metrics.pair(models.find("m"), after.ids().next().expect("a client")).tokens(TokenKind::Prompt, 2);
        let text = metrics.encode(&Gauges::default());
        for series in [
            r#"weir_tokens_total{model="m",client="a",kind="prompt"} 1"#,
            r#"weir_tokens_total{model="m",client="b",kind="prompt"} 2"#,
        ] {
            assert!(text.contains(series), "{series} is not in {text}");
        }
    }

    #[test]
    fn a_reload_that_was_refused_leaves_the_time_of_the_last_that_was_not() {
        let metrics = metrics(&Arc::new(Models::new([])));
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        metrics.reload(ReloadResult::Applied, at(1_000_000));
        metrics.reload(ReloadResult::Refused, at(2_000_000));
        let text = metrics.encode(&Gauges::default());
        assert!(text.contains("\nweir_config_last_reload_successful 0\n"), "{text}");
        assert!(text.contains("\nweir_config_last_reload_success_timestamp_seconds 1000000\n"), "{text}");
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
            limits: vec![LimitGauge {
                scope: "global",
                name: Arc::default(),
                unit: "requests",
                remaining: 3,
                capacity: 5,
                per_second: Some(0.5),
                waiting: 2,
            }],
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
