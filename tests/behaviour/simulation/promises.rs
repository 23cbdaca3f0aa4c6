//! What must hold at the end of every story.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use super::clients::{End, Kind, Record};
use super::fates::{Attempt, Fate};
use super::rules::{CLIENTS as NAMES, MODELS, Own, Rate, Rules, STRANGER, Tenants};
use super::{CLIENTS, Story};

/// The slots of a lane where concurrency is adaptive.
const LANE_SLOTS: usize = 1000;

/// As many retries as are always allowed within ten seconds.
const BUDGET_FLOOR: f64 = 10.0;

/// A try, three retries, and the probes for others' good that cost none.
const MOST_TRIES: usize = 1 + 3 + 10;

/// A request that streams through waits at most so long, and only then sees weir that its client has left.
const UPLOAD_WAIT: Duration = Duration::from_secs(10);

impl Story {
    pub fn check(&self) {
        let attempts = self.tape.attempts();
        let mut of_request: HashMap<&str, Vec<&Attempt>> = HashMap::new();
        for attempt in &attempts {
            of_request.entry(&attempt.id).or_default().push(attempt);
        }
        let none = Vec::new();
        for record in &self.records {
            let attempts = of_request.get(record.id.as_str()).unwrap_or(&none);
            check_answer(record, attempts, self.stormy);
            check_attempts(record, attempts, self.stormy);
        }
        self.everyone_is_accounted_for();
        self.nothing_is_held();
        self.the_outcomes_are_those_the_clients_saw();
        self.the_attempts_are_those_the_gateway_saw(&attempts);
        if !self.stormy {
            self.retries_stay_within_their_budget();
            self.limits_are_met(&attempts);
        }
    }

    fn requests(&self) -> usize {
        CLIENTS * self.requests_per_client
    }

    /// For those who watch many seeds go by.
    pub fn summary(&self) -> String {
        let of = |family: &str, label: &str, values: &[&str]| {
            let count =
                |value: &&str| format!("{value} {}", self.world.metric_sum(family, &format!("{label}=\"{value}\"")));
            values.iter().map(count).collect::<Vec<_>>().join(", ")
        };
        let outcomes = ["ok", "client_error", "upstream_error", "refused", "failed", "disconnected"];
        let results = ["ok", "429", "4xx", "5xx", "connect_error", "reset", "timeout", "stream_error", "cancelled"];
        format!(
            "{} requests ({}), {} seen by the gateway ({})",
            self.records.len(),
            of("weir_requests_total", "outcome", &outcomes),
            self.tape.attempts().len(),
            of("weir_upstream_attempts_total", "result", &results),
        )
    }

    fn everyone_is_accounted_for(&self) {
        let ids: HashSet<&str> = self.records.iter().map(|record| record.id.as_str()).collect();
        assert_eq!((ids.len(), self.records.len()), (self.requests(), self.requests()));
        assert_eq!(self.world.metric_sum("weir_requests_total", ""), self.requests() as f64);
    }

    fn nothing_is_held(&self) {
        self.world.assert_nothing_held();
        assert_eq!(self.world.gateway.open(), 0, "idle connections are closed in the end");
        let gauges = self.world.proxy.gauges();
        assert_eq!(gauges.connections_idle, 0);
        for limit in gauges.limits.iter().filter(|limit| limit.unit == "concurrency") {
            assert!(limit.remaining > 0, "{limit:?}");
        }
        for limit in gauges.limits.iter().filter(|limit| limit.unit != "concurrency") {
            assert_eq!(Some(limit.remaining), self.burst_of(limit.scope, &limit.name, limit.unit), "{limit:?}");
        }
    }

    /// What a bucket holds, as the last rules say.
    fn burst_of(&self, scope: &str, name: &str, unit: &str) -> Option<u64> {
        let (_, rules) = self.rules.last().expect("there are rules from the start");
        let of_model = || MODELS.iter().zip(rules.models).find(|(model, _)| **model == name).map(|(_, own)| own);
        let of_client = || match &rules.tenants {
            Tenants::Named(clients) => NAMES.iter().zip(clients).find(|(it, _)| **it == name).map(|(_, (_, own))| *own),
            Tenants::Keys | Tenants::Addresses => None,
        };
        let Rules { requests, tokens, slots, .. } = *rules;
        let own = match scope {
            "global" => Some(Own { requests, tokens, slots }),
            "model" => of_model(),
            _ => of_client(),
        }?;
        let rate = if unit == "tokens" { own.tokens } else { own.requests };
        rate.map(|rate| u64::from(rate.burst))
    }

    /// Whoever hung up may have been counted as anything: its answer may have been on its way already.
    fn the_outcomes_are_those_the_clients_saw(&self) {
        let hung_up = self.records.iter().filter(|record| record.end == End::HungUp).count() as f64;
        let counted = |outcome: &str| self.world.metric_sum("weir_requests_total", &format!("outcome=\"{outcome}\""));
        for outcome in ["ok", "client_error", "upstream_error", "refused", "failed"] {
            let seen = self.records.iter().filter(|record| outcome_of(record) == Some(outcome)).count() as f64;
            let counted = counted(outcome);
            assert!((seen..=seen + hung_up).contains(&counted), "{outcome}: {seen} seen, {counted} counted");
        }
        assert!(counted("disconnected") <= hung_up);
        assert!(counted("disconnected") > 0.0, "a story without a hang-up proves little");
        assert_eq!(counted("disconnected"), self.world.metric_sum("weir_client_disconnects_total", ""));
        assert_eq!(counted("refused"), self.world.metric_sum("weir_refused_total", ""));
    }

    /// What is counted as an attempt reaches the gateway once. Only where no connection was made, or the client left at that
    /// moment, may it not have reached it. Attempts that are no first ones are retries, or follow a stale connection.
    fn the_attempts_are_those_the_gateway_saw(&self, attempts: &[Attempt]) {
        let counted = |label| self.world.metric_sum("weir_upstream_attempts_total", label);
        let stale = attempts.iter().filter(|it| it.looks_stale() && is_repeatable(it.kind)).count() as f64;
        let (all, seen) = (counted(""), attempts.len() as f64);
        let may_be_missing = counted("result=\"connect_error\"") + counted("result=\"cancelled\"");
        assert!(seen <= all, "{seen} seen, {all} counted");
        if self.stormy {
            // Any may have been lost on its way.
            return;
        }
        assert!(seen >= all - may_be_missing, "{seen} seen, {all} counted, {may_be_missing} may be missing");
        let without_option = attempts.iter().filter(|it| it.may_be_for_the_option()).count() as f64;
        assert!(
            all <= self.requests() as f64 + self.world.metric_sum("weir_retries_total", "") + stale + without_option
        );
    }

    /// Over ten seconds, retries <= 0.2 x first attempts + 10. Retries are sampled once a second, so that nine seconds by the
    /// samples are ten at most; and a request may have waited for eight before it made its first attempt.
    fn retries_stay_within_their_budget(&self) {
        for (at, spent) in &self.retries {
            let of_window = *at - Duration::from_secs(9).min(*at - self.world.start);
            let before =
                self.retries.iter().rev().find(|(then, _)| *then <= of_window).map_or(0.0, |(_, spent)| *spent);
            let earning = of_window - Duration::from_secs(8).min(of_window - self.world.start)..=*at;
            let first = self.records.iter().filter(|record| earning.contains(&record.begun)).count();
            let allowed = 0.2 * first as f64 + BUDGET_FLOOR;
            assert!(spent - before <= allowed, "{} retries, {allowed} allowed", spent - before);
        }
    }

    fn limits_are_met(&self, attempts: &[Attempt]) {
        let spans: Vec<Span> = self.world.gateway.spans().into_iter().map(Span::of).collect();
        let spans_of = |is_counted: &dyn Fn(&Attempt) -> bool| {
            let pairs = spans.iter().zip(attempts).filter(|(_, attempt)| is_counted(attempt));
            pairs.map(|(span, _)| *span).collect::<Vec<_>>()
        };
        let charged = |is_counted: &dyn Fn(&Attempt) -> bool| {
            let mut stale: HashSet<&str> = HashSet::new();
            let mut times = Vec::new();
            for attempt in attempts {
                let repeats = stale.remove(attempt.id.as_str());
                if !repeats && is_counted(attempt) {
                    times.push(attempt.at);
                }
                if attempt.looks_stale() {
                    stale.insert(&attempt.id);
                }
            }
            times
        };
        let slots = |slots: Option<u32>| slots.map(|slots| slots as usize);
        check_slots(&spans, &self.over_time(|rules| slots(rules.slots)));
        check_rate(&charged(&|_| true), &self.over_time(|rules| rules.requests));
        let lane_slots = self.over_time(|rules| rules.slots.is_none().then_some(LANE_SLOTS));
        for (index, name) in MODELS.iter().enumerate() {
            let own = |rules: &Rules| rules.models.get(index).copied().unwrap_or_default();
            check_slots(&spans_of(&|it| it.model == *name), &self.over_time(|rules| slots(own(rules).slots)));
            check_rate(&charged(&|it| it.model == *name), &self.over_time(|rules| own(rules).requests));
            match self.rules[0].1.tenants {
                Tenants::Keys => NAMES.iter().chain([&STRANGER]).for_each(|key| {
                    check_slots(&spans_of(&|it| it.model == *name && it.client == *key), &lane_slots);
                }),
                _ => check_slots(&spans_of(&|it| it.model == *name), &lane_slots),
            }
        }
        for (index, name) in NAMES.iter().enumerate() {
            let own = |rules: &Rules| match &rules.tenants {
                Tenants::Named(clients) => clients[index].1,
                Tenants::Keys | Tenants::Addresses => Own::default(),
            };
            check_slots(&spans_of(&|it| it.client == *name), &self.over_time(|rules| slots(own(rules).slots)));
            check_rate(&charged(&|it| it.client == *name), &self.over_time(|rules| own(rules).requests));
        }
    }

    /// What one limit was, since when.
    fn over_time<T>(&self, limit: impl Fn(&Rules) -> Option<T>) -> Vec<(Instant, Option<T>)> {
        self.rules.iter().map(|(since, rules)| (*since, limit(rules))).collect()
    }
}

/// Whether weir may send it twice though it does not know what became of it.
fn is_repeatable(kind: Kind) -> bool {
    matches!(kind, Kind::Json | Kind::Stream | Kind::Get)
}

/// Every answer belongs to its request and to the last attempt at it, and is whole or visibly broken.
fn check_answer(record: &Record, attempts: &[&Attempt], stormy: bool) {
    if let End::Lost(error) = &record.end {
        panic!("a request without an answer: {error}: {record:?}");
    }
    let Some(status) = record.status else { return };
    let text = String::from_utf8_lossy(&record.body);
    let is_own = status.as_u16() >= 400 && !text.contains("\"attempt\":");
    if is_own {
        assert!(record.end != End::Broken, "weir's own answers are whole: {record:?}");
        if record.end == End::Whole {
            let value: serde_json::Value = serde_json::from_slice(&record.body).expect("an error is JSON");
            assert!(value["error"]["code"].is_string(), "{text}");
        }
        return;
    }
    let last = attempts.last().unwrap_or_else(|| panic!("an answer without an attempt: {record:?}"));
    match (&record.end, last.fate) {
        (End::Whole, Fate::Answered | Fate::ClientError | Fate::PassingError | Fate::ErrorFirst | Fate::Wordless)
            if !stormy || record.body == last.body =>
        {
            assert_eq!(text, String::from_utf8_lossy(&last.body), "{record:?}");
        }
        (End::Whole, Fate::CutBetween | Fate::StalledInside) if !stormy => {
            assert_eq!(last.kind, Kind::Stream, "{record:?}");
            let told = text.strip_prefix(&*String::from_utf8_lossy(&last.body)).expect("what was sent comes first");
            assert!(told.starts_with("data: {\"error\"") && told.ends_with("\n\n"), "{told:?}");
        }
        (End::Broken, Fate::CutBetween | Fate::CutInside | Fate::BrokenError) => {
            assert!(last.body.starts_with(&record.body), "{record:?}");
        }
        // Any answer may break off on its way: a stream then says so, or it is cut.
        (End::Broken, _) if stormy => assert!(last.body.starts_with(&record.body), "{record:?}"),
        (End::Whole, _) if stormy && last.kind == Kind::Stream => {
            let (before, told) = text.split_at(text.rfind("data: {\"error\"").expect("it says that it broke off"));
            // Perhaps all of it has come, but not the end of the message.
            assert!(last.body.starts_with(before.as_bytes()), "{record:?}");
            assert!((before.is_empty() || before.ends_with("\n\n")) && told.ends_with("\n\n"), "{record:?}");
        }
        (End::HungUp, _) if stormy => {}
        (End::HungUp, _) => {
            let whole_and_more = record.body.starts_with(&last.body);
            assert!(last.body.starts_with(&record.body) || whole_and_more, "{record:?}");
        }
        (_, fate) => panic!("{fate:?} ended in {record:?}"),
    }
}

/// Nothing is sent too often, nor after an answer has begun, nor after the client has left.
fn check_attempts(record: &Record, attempts: &[&Attempt], stormy: bool) {
    // A cut on the way looks the same, whatever the gateway did.
    let looks_stale = |it: &Attempt| it.looks_stale() || (stormy && it.reused);
    let stale = attempts.iter().filter(|it| looks_stale(it) && is_repeatable(it.kind)).count();
    let without_option = attempts.iter().filter(|it| it.may_be_for_the_option()).count().min(1);
    let most = MOST_TRIES + stale + without_option;
    assert!(attempts.len() <= most, "{} attempts, {stale} stale: {record:?}", attempts.len());
    if let Some(head) = record.head_order {
        assert!(attempts.iter().all(|attempt| attempt.order < head), "sent again after an answer: {record:?}");
    }
    let margin = if record.kind == Kind::Upload { UPLOAD_WAIT } else { Duration::ZERO };
    let late = attempts.iter().filter(|attempt| attempt.at > record.ended + margin);
    assert_eq!(late.count(), 0, "sent after the client had left: {record:?}");
    let timeouts = attempts.iter().filter(|attempt| attempt.fate == Fate::Stalled).count();
    assert!(timeouts <= 2, "a timeout is retried once: {record:?}");
    let unknown_ends =
        attempts.iter().filter(|it| matches!(it.fate, Fate::Closed | Fate::HalfHead | Fate::Garbage | Fate::Stalled));
    match record.kind {
        Kind::Upload => assert!(attempts.len() <= 1, "an upload is sent once: {record:?}"),
        Kind::Post => assert!(
            unknown_ends.count() == 0 || !has_unknown_end_before_last(attempts),
            "a POST that may have been done was sent again: {record:?}"
        ),
        Kind::Json | Kind::Stream | Kind::Get => {}
    }
}

fn has_unknown_end_before_last(attempts: &[&Attempt]) -> bool {
    let Some((_, before)) = attempts.split_last() else { return false };
    before.iter().any(|it| matches!(it.fate, Fate::Closed | Fate::HalfHead | Fate::Garbage | Fate::Stalled))
}

/// The outcome by which weir must have counted what the client saw; `None` where the client left.
fn outcome_of(record: &Record) -> Option<&'static str> {
    let text = String::from_utf8_lossy(&record.body);
    let status = record.status?.as_u16();
    let proxied = text.contains("\"attempt\":") || status < 400;
    match (&record.end, status) {
        (End::HungUp | End::Lost(_), _) => None,
        (End::Broken, _) => Some("upstream_error"),
        (End::Whole, 200) if text.contains("data: {") && text.contains("\"error\"") => Some("upstream_error"),
        (End::Whole, 200) if text.contains("\"role\"") && !text.contains("\"content\"") => Some("upstream_error"),
        (End::Whole, 200) => Some("ok"),
        (End::Whole, 400 | 401) => Some("client_error"),
        (End::Whole, 429 | 503) if !proxied => Some("refused"),
        (End::Whole, _) if !proxied => Some("failed"),
        (End::Whole, _) => Some("upstream_error"),
    }
}

/// From when to when an attempt was under way at the gateway.
#[derive(Debug, Clone, Copy)]
struct Span {
    from: Instant,
    to: Instant,
}

impl Span {
    fn of((from, to): (Instant, Option<Instant>)) -> Self {
        Self { from, to: to.expect("everything has ended") }
    }
}

/// Nobody begins while as many are under way as there are slots. What ends in the moment in which another begins makes room
/// for it.
fn check_slots(spans: &[Span], slots: &[(Instant, Option<usize>)]) {
    // `false` sorts first: ends before beginnings.
    let mut changes: Vec<(Instant, bool)> = spans.iter().flat_map(|it| [(it.from, true), (it.to, false)]).collect();
    changes.sort_unstable();
    let mut under_way = 0i64;
    for (at, begins) in changes {
        if !begins {
            under_way -= 1;
            continue;
        }
        under_way += 1;
        // In the moment of a change it may have begun before it or after.
        let in_force = |(index, (since, _)): &(usize, &(Instant, Option<usize>))| {
            *since <= at && slots.get(index + 1).is_none_or(|(until, _)| at <= *until)
        };
        let most = slots.iter().enumerate().filter(in_force).map(|(_, (_, slots))| slots.unwrap_or(usize::MAX)).max();
        assert!(
            most.is_some_and(|most| under_way <= i64::try_from(most).unwrap_or(i64::MAX)),
            "{under_way} under way, {most:?} slots"
        );
    }
}

/// In no window do more begin than the largest burst and the rates allow: of all windows that end with a request, `excess` is
/// the largest number of those in it beyond what the rates gave. A limit that is new begins with a full burst.
fn check_rate(times: &[Instant], limits: &[(Instant, Option<Rate>)]) {
    const TIMER_SLACK: f64 = 0.002;
    let rates = limits.iter().filter_map(|(_, rate)| *rate);
    let fastest = rates.clone().map(|rate| rate.per_second).max().unwrap_or_default();
    let largest = rates.map(|rate| rate.burst).max().unwrap_or_default();
    let allowed = f64::from(largest) + TIMER_SLACK * f64::from(fastest) + 1e-6;
    let (mut excess, mut last, mut in_force) = (0.0, limits[0].0, limits[0].1);
    let pass = |excess: f64, in_force: Option<Rate>, time: Duration| {
        let given = in_force.map_or(f64::INFINITY, |rate| f64::from(rate.per_second) * time.as_secs_f64());
        f64::max(excess - given, 0.0)
    };
    let mut limits = limits[1..].iter().peekable();
    for at in times {
        while let Some((since, rate)) = limits.next_if(|(since, _)| since < at) {
            (excess, last, in_force) = (pass(excess, in_force, *since - last), *since, *rate);
        }
        // In the moment in which a limit goes, it may have held this one up or not.
        let goes_now = limits.peek().is_some_and(|(since, rate)| since == at && rate.is_none());
        in_force = in_force.filter(|_| !goes_now);
        excess = pass(excess, in_force, *at - last) + 1.0;
        last = *at;
        assert!(in_force.is_none() || excess <= allowed, "{excess} ahead of the rates, {allowed} allowed");
    }
}
