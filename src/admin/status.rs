//! `/status.json`: everything that there is to see now, and of the last ten minutes. docs/status.md describes it for those who
//! read it; the page at `/status` shows nothing else.
//!
//! Names are stable; new ones may be added. Units stand in the names. The lists are bounded, whatever clients send.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::history::{History, INTERVAL, Quantiles, Window};
use super::limit::{Breaker, CoolDown, HeldBy, LimitStatus, rounded, seconds};
use crate::admission::{Level, LimitView, ModelView, Scope, Survey, Waiting, Who};
use crate::clients::{ClientId, Clients};
use crate::config::Mode;
use crate::metrics::{
    AttemptResult, Counts, Distribution, Gauges, ModelReading, Outcome, Reading, RefusedBy, TokenKind,
};
use crate::models::{ModelId, Models};
use crate::recent::RecentError;

/// What rates are made from: the last minute. Latencies too.
pub const WINDOW: Duration = Duration::from_secs(60);

/// Rows of each list, the busiest.
const MOST_MODELS: usize = 100;
const MOST_CLIENTS: usize = 100;
const MOST_WAITING: usize = 50;
const MOST_ERRORS: usize = 50;

/// All of it.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Changes when a name changes its meaning.
    schema: u32,
    version: &'static str,
    time_unix_seconds: f64,
    uptime_seconds: f64,
    /// `ready` or `draining`.
    state: &'static str,
    gateway: String,
    connections: Connections,
    memory: Memory,
    now: Now,
    /// What `rates` and every row's rates and latencies are made from.
    window_seconds: f64,
    rates: Rates,
    latency: Latency,
    totals: Totals,
    queue: Queue,
    /// The limits on all that passes.
    limits: Vec<LimitStatus>,
    models: Vec<Model>,
    models_not_listed: usize,
    clients: Vec<Client>,
    clients_not_listed: usize,
    series: Lines,
    /// The newest first.
    recent_errors: Vec<Failed>,
}

#[derive(Debug, Serialize)]
struct Connections {
    clients: u64,
    clients_limit: u64,
    gateway_active: u64,
    gateway_idle: u64,
}

#[derive(Debug, Serialize)]
struct Memory {
    buffered_bytes: u64,
    buffered_bytes_limit: u64,
}

#[derive(Debug, Serialize)]
struct Now {
    in_flight: u64,
    /// Of how many, where that is one number: `limits.concurrency`, or the models' slots added up.
    in_flight_limit: Option<u64>,
    waiting: u64,
    waiting_limit: u64,
    reserved_tokens: u64,
}

/// Of the window.
#[derive(Debug, Serialize)]
struct Rates {
    requests_per_second: f64,
    ok_per_second: f64,
    tokens_per_second: f64,
    /// By weir.
    refused_per_minute: f64,
    /// Which of weir's limits they were, as a part of `refused_per_minute`.
    refused_by_per_minute: Map<String, Value>,
    /// The gateway's errors that reached a client, and requests without any answer of it.
    errors_per_minute: f64,
    /// Attempts that the gateway refused with a 429, whether a retry made good for it or not.
    gateway_refusals_per_minute: f64,
    /// Attempts that failed at the gateway in any way, 429s included.
    failed_attempts_per_minute: f64,
    retries_per_minute: f64,
    disconnects_per_minute: f64,
    /// What limits in observe mode would have refused.
    would_refuse_per_minute: f64,
}

/// Of the window. Estimated from histograms.
#[derive(Debug, Serialize)]
struct Latency {
    /// As clients see it, waiting included.
    request: Spread,
    /// Of streams, from sending the attempt that answered.
    first_token: Spread,
    queue_wait: Spread,
}

#[derive(Debug, Serialize)]
struct Spread {
    count: u64,
    p50_seconds: Option<f64>,
    p95_seconds: Option<f64>,
    p99_seconds: Option<f64>,
}

/// Since the start.
#[derive(Debug, Serialize)]
struct Totals {
    requests: Map<String, Value>,
    refused: Map<String, Value>,
    would_refuse: Map<String, Value>,
    attempts: Map<String, Value>,
    retries: u64,
    tokens: Map<String, Value>,
}

/// Who waits for what, and whose limit it is.
#[derive(Debug, Serialize)]
struct Queue {
    waiting: u64,
    /// Of the groups listed.
    oldest_seconds: Option<f64>,
    groups: Vec<Group>,
    /// Requests that wait in no group listed.
    not_listed: u64,
}

/// Requests of one client, or kind of clients, that wait for one model at one limit.
#[derive(Debug, Serialize)]
struct Group {
    client: String,
    /// `client` (by name), `keys` (clients' own, that the gateway has served), `address`, or `anyone` (not told apart).
    client_kind: &'static str,
    /// How many sharers they are: keys or addresses.
    tenants: u32,
    model: Arc<str>,
    waiting: u64,
    estimated_tokens: u64,
    oldest_seconds: f64,
    /// How long one more would wait behind them: an expectation.
    expected_wait_seconds: f64,
    held_by: HeldBy,
}

#[derive(Debug, Serialize)]
struct Model {
    name: Arc<str>,
    in_flight: u64,
    in_flight_limit: Option<u32>,
    waiting: u64,
    /// Upstream keys with which it is used.
    lanes: u32,
    closed_lanes: u32,
    #[serde(flatten)]
    rates: RowRates,
    gateway_refusals_per_minute: f64,
    failed_attempts_per_minute: f64,
    retries_per_minute: f64,
    latency: Latency,
    /// Configured first, then what was learned of its most used lane.
    limits: Vec<LimitStatus>,
    cool_down: Option<CoolDown>,
    breaker: Breaker,
}

#[derive(Debug, Serialize)]
struct Client {
    name: Arc<str>,
    weight: f64,
    in_flight: u64,
    waiting: u64,
    #[serde(flatten)]
    rates: RowRates,
    limits: Vec<LimitStatus>,
}

#[derive(Debug, Serialize)]
struct RowRates {
    requests_per_second: f64,
    tokens_per_second: f64,
    refused_per_minute: f64,
    refused_by_per_minute: Map<String, Value>,
    errors_per_minute: f64,
    /// Since the start.
    requests_total: u64,
}

/// Lines of the last ten minutes, of all models or one, the oldest point first.
#[derive(Debug, Serialize)]
struct Lines {
    /// `null`: all models.
    model: Option<Arc<str>>,
    interval_seconds: f64,
    requests_per_second: Vec<f64>,
    errors_per_second: Vec<f64>,
    refused_per_second: Vec<f64>,
    tokens_per_second: Vec<f64>,
    /// At the end of each interval; empty for one model.
    in_flight: Vec<u64>,
    waiting: Vec<u64>,
    /// Each point of the half minute before it, where anything was observed.
    request_seconds: QuantileLines,
    first_token_seconds: QuantileLines,
}

#[derive(Debug, Serialize)]
struct QuantileLines {
    p50: Vec<Option<f64>>,
    p95: Vec<Option<f64>>,
    p99: Vec<Option<f64>>,
}

/// A request that was refused, that failed, or that the gateway answered with an error.
#[derive(Debug, Serialize)]
struct Failed {
    /// When it ended.
    time_unix_seconds: f64,
    request_id: String,
    client: Arc<str>,
    model: Arc<str>,
    /// What the client got.
    status: u16,
    /// As in `weir_requests_total`.
    outcome: &'static str,
    /// Whose limit it was, where weir refused: as in `weir_refused_total`, and of whom.
    refused_by: Option<&'static str>,
    scope: Option<String>,
    /// `error.code` of weir's own answer.
    code: Option<&'static str>,
    message: String,
    attempts: u32,
}

/// What a status is made from, all of the same moment.
pub struct Sources<'a> {
    pub ready: bool,
    pub started: Instant,
    pub now: Instant,
    pub gateway: String,
    /// `limits.concurrency`, where that is a number.
    pub concurrency: Option<u32>,
    pub gauges: &'a Gauges,
    pub survey: &'a Survey,
    pub reading: &'a Reading,
    pub history: &'a History,
    pub models: &'a Models,
    pub clients: &'a Clients,
    pub recent_errors: Vec<RecentError>,
    /// Whose lines are asked for; `None`: all models'.
    pub line: Option<ModelId>,
}

/// Whether weir is about to stop, in a word.
pub fn state(ready: bool) -> &'static str {
    if ready { "ready" } else { "draining" }
}

impl Status {
    /// Everything, as JSON.
    pub fn of(mut from: Sources<'_>) -> Self {
        let recent_errors =
            std::mem::take(&mut from.recent_errors).into_iter().take(MOST_ERRORS).map(Failed::of).collect();
        let from = &from;
        let window = from.history.window(from.reading, WINDOW, from.now);
        let total = from.reading.models.iter().fold(ModelReading::default(), |sum, (_, reading)| sum.plus(reading));
        let mut limits = ByScope::of(&from.survey.limits);
        let (models, models_not_listed) = models(from, &window, &mut limits);
        let (clients, clients_not_listed) = clients(from, &window, &mut limits);
        let Survey { waiting, in_flight, reserved_tokens, .. } = *from.survey;
        Self {
            schema: 1,
            version: env!("CARGO_PKG_VERSION"),
            time_unix_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, seconds),
            uptime_seconds: seconds(from.now.saturating_duration_since(from.started)),
            state: state(from.ready),
            gateway: from.gateway.clone(),
            connections: Connections {
                clients: from.gauges.client_connections,
                clients_limit: from.gauges.client_connections_limit,
                gateway_active: from.gauges.connections_active,
                gateway_idle: from.gauges.connections_idle,
            },
            memory: Memory {
                buffered_bytes: from.gauges.buffered_bytes,
                buffered_bytes_limit: from.gauges.buffered_bytes_limit,
            },
            now: Now {
                in_flight,
                in_flight_limit: in_flight_limit(from),
                waiting,
                waiting_limit: from.gauges.waiting_limit,
                reserved_tokens,
            },
            window_seconds: rounded(window.seconds),
            rates: Rates::of(&window),
            latency: Latency::of(&window.all),
            totals: Totals::of(&total),
            queue: Queue::of(from),
            limits: limits.take("global", ""),
            models,
            models_not_listed,
            clients,
            clients_not_listed,
            series: Lines::of(from),
            recent_errors,
        }
    }
}

impl Rates {
    fn of(window: &Window) -> Self {
        let ModelReading { counts, retries, .. } = &window.all;
        let per_minute = |count: u64| rounded(window.per_second(count) * 60.0);
        let sum = |counts: &[u64]| counts.iter().sum::<u64>();
        Self {
            requests_per_second: rounded(window.per_second(counts.ended())),
            ok_per_second: rounded(window.per_second(counts.outcome(Outcome::Ok))),
            tokens_per_second: rounded(window.per_second(counts.all_tokens())),
            refused_per_minute: per_minute(sum(&counts.refused)),
            refused_by_per_minute: refused_by(window, counts),
            errors_per_minute: per_minute(counts.errors()),
            gateway_refusals_per_minute: per_minute(window.all.attempts[AttemptResult::TooManyRequests as usize]),
            failed_attempts_per_minute: per_minute(window.all.failed_attempts()),
            retries_per_minute: per_minute(sum(retries)),
            disconnects_per_minute: per_minute(counts.outcome(Outcome::Disconnected)),
            would_refuse_per_minute: per_minute(sum(&counts.observed)),
        }
    }
}

impl RowRates {
    fn of(window: &Window, counts: &Counts, total: &Counts) -> Self {
        let per_minute = |count: u64| rounded(window.per_second(count) * 60.0);
        Self {
            requests_per_second: rounded(window.per_second(counts.ended())),
            tokens_per_second: rounded(window.per_second(counts.all_tokens())),
            refused_per_minute: per_minute(counts.refused.iter().sum()),
            refused_by_per_minute: refused_by(window, counts),
            errors_per_minute: per_minute(counts.errors()),
            requests_total: total.ended(),
        }
    }
}

impl Latency {
    fn of(reading: &ModelReading) -> Self {
        Self {
            request: Spread::of(&reading.request_duration),
            first_token: Spread::of(&reading.first_token),
            queue_wait: Spread::of(&reading.queue_wait),
        }
    }
}

impl Spread {
    fn of(distribution: &Distribution) -> Self {
        let quantile = |part| distribution.quantile(part).map(rounded);
        Self {
            count: distribution.count(),
            p50_seconds: quantile(0.5),
            p95_seconds: quantile(0.95),
            p99_seconds: quantile(0.99),
        }
    }
}

impl Totals {
    fn of(total: &ModelReading) -> Self {
        let counts = &total.counts;
        Self {
            requests: named(Outcome::ALL.iter().map(|it| it.label()), &counts.requests),
            refused: named(RefusedBy::ALL.iter().map(|it| it.label()), &counts.refused),
            would_refuse: named(RefusedBy::ALL.iter().map(|it| it.label()), &counts.observed),
            attempts: named(AttemptResult::ALL.iter().map(|it| it.label()), &total.attempts),
            retries: total.retries.iter().sum(),
            tokens: named(TokenKind::ALL.iter().map(|it| it.label()), &counts.tokens),
        }
    }
}

impl Queue {
    fn of(from: &Sources<'_>) -> Self {
        let groups: Vec<Group> =
            from.survey.queue.iter().take(MOST_WAITING).map(|waiting| Group::of(waiting, from)).collect();
        let listed: u64 = groups.iter().map(|group| group.waiting).sum();
        Self {
            waiting: from.survey.waiting,
            oldest_seconds: groups.iter().map(|group| group.oldest_seconds).reduce(f64::max),
            groups,
            not_listed: from.survey.waiting.saturating_sub(listed),
        }
    }
}

impl Group {
    fn of(waiting: &Waiting, from: &Sources<'_>) -> Self {
        let (client, client_kind) = match waiting.who {
            Who::Client(id) => (from.clients.name(id).to_string(), "client"),
            Who::OwnKeys => ("clients' own keys".to_owned(), "keys"),
            Who::Address(address) => (address.to_string(), "address"),
            Who::Anyone => ("anyone".to_owned(), "anyone"),
        };
        Self {
            client,
            client_kind,
            tenants: waiting.tenants,
            model: from.models.name(waiting.model),
            waiting: waiting.requests,
            estimated_tokens: waiting.tokens,
            oldest_seconds: seconds(waiting.oldest),
            expected_wait_seconds: seconds(waiting.expected),
            held_by: HeldBy::of(&waiting.limit, waiting.hold),
        }
    }
}

impl Failed {
    fn of(error: RecentError) -> Self {
        Self {
            time_unix_seconds: error.at.duration_since(UNIX_EPOCH).map_or(0.0, seconds),
            request_id: error.request_id,
            client: error.client,
            model: error.model,
            status: error.status,
            outcome: error.outcome.label(),
            refused_by: error.refused_by.map(RefusedBy::label),
            scope: error.scope,
            code: error.code,
            message: error.message,
            attempts: error.attempts,
        }
    }
}

impl Lines {
    fn of(from: &Sources<'_>) -> Self {
        let series = from.history.series(from.line);
        let rounded_all = |line: Vec<f64>| line.into_iter().map(rounded).collect();
        Self {
            model: from.line.map(|id| from.models.name(id)),
            interval_seconds: INTERVAL.as_secs_f64(),
            requests_per_second: rounded_all(series.requests_per_second),
            errors_per_second: rounded_all(series.errors_per_second),
            refused_per_second: rounded_all(series.refused_per_second),
            tokens_per_second: rounded_all(series.tokens_per_second),
            in_flight: series.in_flight,
            waiting: series.waiting,
            request_seconds: QuantileLines::of(series.duration),
            first_token_seconds: QuantileLines::of(series.first_token),
        }
    }
}

impl QuantileLines {
    fn of(lines: Quantiles) -> Self {
        let rounded_all = |line: Vec<Option<f64>>| line.into_iter().map(|point| point.map(rounded)).collect();
        Self { p50: rounded_all(lines.p50), p95: rounded_all(lines.p95), p99: rounded_all(lines.p99) }
    }
}

/// Every model that was asked for, those with waiters and then the busiest first, and how many are left out.
fn models(from: &Sources<'_>, window: &Window, limits: &mut ByScope) -> (Vec<Model>, usize) {
    let views: HashMap<ModelId, &ModelView> = from.survey.models.iter().map(|view| (view.model, view)).collect();
    let totals: HashMap<ModelId, &ModelReading> =
        from.reading.models.iter().map(|(id, reading)| (*id, reading)).collect();
    let ids: BTreeSet<ModelId> = views.keys().chain(totals.keys()).copied().collect();
    // A request that no model was read from is everyone's stand-in: of no interest while nothing was.
    let none = ModelReading::default();
    let mut rows: Vec<Model> = ids
        .into_iter()
        .map(|id| {
            let seen = (views.get(&id).copied(), totals.get(&id).copied().unwrap_or(&none));
            model(from, window, id, seen, limits.take("model", &from.models.name(id)))
        })
        .filter(|row| row.rates.requests_total > 0 || row.in_flight + row.waiting > 0 || row.lanes > 0)
        .collect();
    rows.sort_by(|a, b| {
        let busy = |row: &Model| (row.waiting, row.in_flight, row.rates.requests_total);
        let rate = b.rates.requests_per_second.total_cmp(&a.rates.requests_per_second);
        let waits = (b.waiting > 0).cmp(&(a.waiting > 0));
        waits.then(rate).then_with(|| busy(b).cmp(&busy(a))).then_with(|| a.name.cmp(&b.name))
    });
    let not_listed = rows.len().saturating_sub(MOST_MODELS);
    rows.truncate(MOST_MODELS);
    (rows, not_listed)
}

fn model(
    from: &Sources<'_>,
    window: &Window,
    id: ModelId,
    (view, total): (Option<&ModelView>, &ModelReading),
    mut limits: Vec<LimitStatus>,
) -> Model {
    let name = from.models.name(id);
    let lately = window.models.get(&id).copied().unwrap_or_default();
    let per_minute = |count: u64| rounded(window.per_second(count) * 60.0);
    let scope = Scope::Model(name.clone());
    let pace = view.map(|view| view.busiest);
    if let (Some(view), Some(pace)) = (view, pace) {
        let lane = LimitView { scope, mode: Mode::Enforce, level: Level::Pace(pace), waiting: view.held };
        limits.extend(LimitStatus::learned(&lane, &pace));
    }
    Model {
        in_flight: view.map_or(0, |view| view.in_flight),
        in_flight_limit: view.and_then(|view| view.slots),
        waiting: view.map_or(0, |view| view.waiting),
        lanes: view.map_or(0, |view| view.lanes),
        closed_lanes: view.map_or(0, |view| view.closed_lanes),
        rates: RowRates::of(window, &lately.counts, &total.counts),
        gateway_refusals_per_minute: per_minute(lately.attempts[AttemptResult::TooManyRequests as usize]),
        failed_attempts_per_minute: per_minute(lately.failed_attempts()),
        retries_per_minute: per_minute(lately.retries.iter().sum()),
        latency: Latency::of(&lately),
        limits,
        cool_down: pace.and_then(|pace| pace.closed).map(|(why, left)| CoolDown::new(why, left)),
        breaker: pace.map_or(Breaker { open: false, failing_for_seconds: None, gives_up_in_seconds: None }, |pace| {
            Breaker::of(&pace)
        }),
        name,
    }
}

/// Every client that has a name, those who wait and then the busiest first, and how many are left out. One that a reload has
/// removed is among them while anything of its is under way.
fn clients(from: &Sources<'_>, window: &Window, limits: &mut ByScope) -> (Vec<Client>, usize) {
    let totals: HashMap<ClientId, &Counts> = from.reading.clients.iter().map(|(id, counts)| (*id, counts)).collect();
    let now: HashMap<ClientId, (u64, u64)> =
        from.survey.clients.iter().map(|(id, in_flight, waiting)| (*id, (*in_flight, *waiting))).collect();
    let (named_in_flight, named_waiting) =
        now.values().fold((0, 0), |sum: (u64, u64), client| (sum.0 + client.0, sum.1 + client.1));
    let others =
        (from.survey.in_flight.saturating_sub(named_in_flight), from.survey.waiting.saturating_sub(named_waiting));
    let none = Counts::default();
    let row = |id: ClientId| {
        let (in_flight, waiting) =
            if id == ClientId::NONE { others } else { now.get(&id).copied().unwrap_or_default() };
        let name = from.clients.name(id).clone();
        let lately = window.clients.get(&id).unwrap_or(&none);
        Client {
            weight: f64::from(from.clients.weight(id).thousandths()) / 1000.0,
            in_flight,
            waiting,
            rates: RowRates::of(window, lately, totals.get(&id).copied().unwrap_or(&none)),
            limits: limits.take("client", &name),
            name,
        }
    };
    let is_busy = |id: &ClientId| now.get(id).is_some_and(|(in_flight, waiting)| in_flight + waiting > 0);
    let named = from.clients.present_and_gone().filter(|id| from.clients.is_named(*id) || is_busy(id));
    let mut rows: Vec<Client> = [ClientId::NONE].into_iter().chain(named).map(row).collect();
    // Where clients are known by name, the others are those who were turned away.
    rows.retain(|row| {
        from.clients.ids().next().is_none()
            || row.name != *from.clients.name(ClientId::NONE)
            || row.rates.requests_total > 0
    });
    rows.sort_by(|a, b| {
        let busy = |row: &Client| (row.waiting, row.in_flight, row.rates.requests_total);
        let rate = b.rates.requests_per_second.total_cmp(&a.rates.requests_per_second);
        let waits = (b.waiting > 0).cmp(&(a.waiting > 0));
        waits.then(rate).then_with(|| busy(b).cmp(&busy(a))).then_with(|| a.name.cmp(&b.name))
    });
    let not_listed = rows.len().saturating_sub(MOST_CLIENTS);
    rows.truncate(MOST_CLIENTS);
    (rows, not_listed)
}

/// Limits by whose they are.
struct ByScope(HashMap<(&'static str, Arc<str>), Vec<LimitStatus>>);

impl ByScope {
    fn of(limits: &[LimitView]) -> Self {
        let mut by_scope: HashMap<(&'static str, Arc<str>), Vec<LimitStatus>> = HashMap::new();
        for limit in limits.iter().flat_map(LimitStatus::of) {
            by_scope.entry((limit.scope, limit.name.clone())).or_default().push(limit);
        }
        Self(by_scope)
    }

    fn take(&mut self, scope: &'static str, name: &str) -> Vec<LimitStatus> {
        self.0.remove(&(scope, Arc::from(name))).unwrap_or_default()
    }
}

fn in_flight_limit(from: &Sources<'_>) -> Option<u64> {
    if let Some(slots) = from.concurrency {
        return Some(slots.into());
    }
    let slots = from.survey.models.iter().filter_map(|model| Some(u64::from(model.slots?) * u64::from(model.lanes)));
    slots.reduce(|sum, slots| sum + slots)
}

fn refused_by(window: &Window, counts: &Counts) -> Map<String, Value> {
    let by = RefusedBy::ALL.iter().zip(counts.refused).filter(|(_, count)| *count > 0);
    by.map(|(by, count)| (by.label().to_owned(), rounded(window.per_second(count) * 60.0).into())).collect()
}

fn named<'l>(labels: impl Iterator<Item = &'l str>, counts: &[u64]) -> Map<String, Value> {
    labels.zip(counts).map(|(label, count)| (label.to_owned(), (*count).into())).collect()
}
