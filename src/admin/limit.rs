//! A limit as JSON has it, the same in `/status.json` and `/explain`: how it stands, and whose it is.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::admission::{Hold, Level, LimitView, PaceView, Scope, ToldView, Why, some_requests};
use crate::config::Mode;
use crate::config::units::Rate;

/// One limit of requests, tokens or concurrency, of whatever source.
#[derive(Debug, Clone, Serialize)]
pub struct LimitStatus {
    /// `global`, `model` or `client`.
    pub scope: &'static str,
    /// The model's name, or the client's; empty for a global limit.
    pub name: Arc<str>,
    /// `requests`, `tokens` or `concurrency`.
    pub unit: &'static str,
    /// `configured`; or learned: `told` (by the gateway's headers), `inferred` (from its refusals), `adaptive` (found by trying).
    pub source: &'static str,
    /// `enforce`, or `observe`: it only counts.
    pub mode: &'static str,
    /// The limit in words.
    pub text: String,
    /// How the configuration has it, as in `600/min`; absent for slots, and for what is learned.
    pub rate: Option<String>,
    /// What is used of `capacity`; absent where only a rate is known.
    pub used: Option<f64>,
    pub capacity: Option<f64>,
    /// What comes back in a second; absent for slots, and where it is not known.
    pub refill_per_second: Option<f64>,
    /// When all of it is back, if nothing more is used.
    pub full_in_seconds: Option<f64>,
    /// Requests held up by it, those behind them included. Of learned limits: by all that was learned of the lane.
    pub waiting: u64,
}

/// What holds requests up.
#[derive(Debug, Clone, Serialize)]
pub struct HeldBy {
    /// `configuration` where it is a limit of weir's configuration, else `gateway`.
    pub whose: &'static str,
    /// `global`, `model` or `client`.
    pub scope: &'static str,
    pub name: Arc<str>,
    /// `requests`, `tokens`, `concurrency`; or `cool_down`, `breaker`, `ramp`.
    pub what: &'static str,
    /// As [`LimitStatus::source`], or `hint` or `breaker`.
    pub source: &'static str,
    /// In words.
    pub text: String,
}

/// Why a lane lets nothing through.
#[derive(Debug, Clone, Serialize)]
pub struct CoolDown {
    /// `quota`, `overload`, `breaker` or `silence`.
    pub why: &'static str,
    /// Until the next request may try; 0 while one is trying.
    pub seconds: f64,
    /// In words.
    pub text: String,
}

/// A gateway that fails.
#[derive(Debug, Clone, Serialize)]
pub struct Breaker {
    pub open: bool,
    /// How long it has failed; absent while it is not open.
    pub failing_for_seconds: Option<f64>,
    /// When all who wait are refused, should it go on; 0 once they are.
    pub gives_up_in_seconds: Option<f64>,
}

impl LimitStatus {
    /// The limit itself, or all that a pace has learned.
    pub fn of(view: &LimitView) -> Vec<Self> {
        match view.level {
            Level::Requests { rate, remaining, full_in } => {
                vec![Self::bucket(view, "requests", rate, remaining, full_in)]
            }
            Level::Tokens { rate, remaining, full_in } => vec![Self::bucket(view, "tokens", rate, remaining, full_in)],
            Level::Concurrency { limit, in_use } => {
                let text = format!("{limit} at a time{}", of_whom(&view.scope));
                vec![Self {
                    used: Some(in_use.into()),
                    capacity: Some(limit.into()),
                    ..Self::new(view, "concurrency", "configured", text)
                }]
            }
            Level::Pace(pace) => Self::learned(view, &pace),
        }
    }

    /// What was learned of one lane of a model.
    pub fn learned(view: &LimitView, pace: &PaceView) -> Vec<Self> {
        let of = of_whom(&view.scope);
        let slots = pace.slots.map(|slots| Self {
            used: Some(pace.in_flight.into()),
            capacity: Some(slots.limit.into()),
            ..Self::new(
                view,
                "concurrency",
                "adaptive",
                format!(
                    "{} at a time{of}, found by trying{}",
                    slots.limit,
                    if slots.growing { ": no refusal so far, it grows while it is used" } else { "" }
                ),
            )
        });
        let told = |unit, told: Option<ToldView>| told.map(|told| Self::told(view, unit, told));
        let inferred = pace.inferred_per_second.map(|rate| Self {
            refill_per_second: Some(rounded_rate(rate)),
            ..Self::new(
                view,
                "requests",
                "inferred",
                format!("{}{of}, inferred from refusals", a_minute(rate, "requests")),
            )
        });
        [slots, told("requests", pace.requests), told("tokens", pace.tokens), inferred].into_iter().flatten().collect()
    }

    fn bucket(view: &LimitView, unit: &'static str, rate: Rate, remaining: u32, full_in: Duration) -> Self {
        Self {
            used: Some(rate.burst.saturating_sub(remaining).into()),
            capacity: Some(rate.burst.into()),
            rate: Some(rate.to_string()),
            refill_per_second: Some(rounded_rate(rate.per_second())),
            full_in_seconds: Some(seconds(full_in)),
            ..Self::new(view, unit, "configured", format!("{rate} {unit}{}", of_whom(&view.scope)))
        }
    }

    fn told(view: &LimitView, unit: &'static str, told: ToldView) -> Self {
        Self {
            used: Some(rounded(told.capacity - told.remaining)),
            capacity: Some(rounded(told.capacity)),
            refill_per_second: told.per_second.map(rounded_rate),
            full_in_seconds: told.window_ends_in.map(seconds),
            ..Self::new(
                view,
                unit,
                "told",
                format!("{} {unit}{}, as the gateway tells", told.limit, of_whom(&view.scope)),
            )
        }
    }

    fn new(view: &LimitView, unit: &'static str, source: &'static str, text: String) -> Self {
        let (scope, name) = scope_and_name(&view.scope);
        Self {
            scope,
            name,
            unit,
            source,
            mode: match view.mode {
                Mode::Enforce => "enforce",
                Mode::Observe => "observe",
            },
            text,
            rate: None,
            used: None,
            capacity: None,
            refill_per_second: None,
            full_in_seconds: None,
            waiting: view.waiting,
        }
    }
}

impl HeldBy {
    /// What of this limit does so.
    pub fn of(view: &LimitView, hold: Option<Hold>) -> Self {
        let of = of_whom(&view.scope);
        let (whose, what, source, text) = match (view.level, hold) {
            (Level::Requests { rate, .. }, _) => {
                ("configuration", "requests", "configured", format!("the limit of {rate} requests{of}"))
            }
            (Level::Tokens { rate, .. }, _) => {
                ("configuration", "tokens", "configured", format!("the limit of {rate} tokens{of}"))
            }
            (Level::Concurrency { limit, .. }, _) => (
                "configuration",
                "concurrency",
                "configured",
                format!("the limit of {} at a time{of}", some_requests(limit)),
            ),
            (Level::Pace(pace), hold) => by_pace(&pace, hold, of),
        };
        let (scope, name) = scope_and_name(&view.scope);
        Self { whose, scope, name, what, source, text }
    }
}

fn by_pace(pace: &PaceView, hold: Option<Hold>, of: String) -> (&'static str, &'static str, &'static str, String) {
    let (what, source, text) = match hold {
        Some(Hold::Closed(why)) => {
            let closed = CoolDown::new(why, pace.closed.map_or(Duration::ZERO, |(_, left)| left));
            match why {
                Why::Quota | Why::Silence => ("cool_down", "hint", format!("{}{of}", closed.text)),
                Why::Overload | Why::Breaker => ("breaker", "breaker", format!("{}{of}", closed.text)),
            }
        }
        Some(Hold::Ramp) => (
            "ramp",
            "adaptive",
            format!("requests go one after the other until it is known what the gateway takes{of}"),
        ),
        Some(Hold::ToldRequests) => ("requests", "told", format!("the gateway's quota of requests{of}, as it tells")),
        Some(Hold::ToldTokens) => ("tokens", "told", format!("the gateway's quota of tokens{of}, as it tells")),
        Some(Hold::Inferred) => {
            let rate = pace.inferred_per_second.unwrap_or_default();
            (
                "requests",
                "inferred",
                format!("{}{of}: the gateway's quota, inferred from its refusals", a_minute(rate, "requests")),
            )
        }
        Some(Hold::Slots) | None => {
            let slots = pace.slots.map_or_else(|| "requests".to_owned(), |slots| some_requests(slots.limit));
            ("concurrency", "adaptive", format!("the {slots} at a time{of} that the gateway was found to take"))
        }
    };
    ("gateway", what, source, text)
}

impl CoolDown {
    /// Of a lane that is closed.
    pub fn new(why: Why, left: Duration) -> Self {
        let (word, reason) = match why {
            Why::Quota => ("quota", "the gateway has refused a request for its quota, and said when to come back"),
            Why::Overload => ("overload", "the gateway has said that it has too much to do"),
            Why::Breaker => ("breaker", "the gateway fails; one request a second tries whether it is back"),
            Why::Silence => ("silence", "the gateway refuses everything, and does not say for how long"),
        };
        let until =
            if left.is_zero() { "one request is trying now".to_owned() } else { format!("in {:.1} s", seconds(left)) };
        Self { why: word, seconds: seconds(left), text: format!("{reason} ({until})") }
    }
}

impl Breaker {
    /// Of a lane.
    pub fn of(pace: &PaceView) -> Self {
        Self {
            open: pace.failing_for.is_some(),
            failing_for_seconds: pace.failing_for.map(seconds),
            gives_up_in_seconds: pace.gives_up_in.map(seconds),
        }
    }
}

fn scope_and_name(scope: &Scope) -> (&'static str, Arc<str>) {
    match scope {
        Scope::Global => ("global", Arc::default()),
        Scope::Model(name) => ("model", Arc::clone(name)),
        Scope::Client(name) => ("client", Arc::clone(name)),
    }
}

fn of_whom(scope: &Scope) -> String {
    match scope {
        Scope::Global => " for all".to_owned(),
        Scope::Model(name) => format!(" for model {name}"),
        Scope::Client(name) => format!(" for client {name}"),
    }
}

/// A rate as people write them.
fn a_minute(per_second: f64, unit: &str) -> String {
    match per_second {
        rate if rate >= 10.0 => format!("{rate:.0} {unit} a second"),
        rate if rate >= 1.0 => format!("{rate:.1} {unit} a second"),
        rate => format!("{:.1} {unit} a minute", rate * 60.0),
    }
}

/// Seconds, to the millisecond.
pub fn seconds(duration: Duration) -> f64 {
    rounded(duration.as_secs_f64())
}

/// To the millionth: one a day is still more than nothing.
fn rounded_rate(per_second: f64) -> f64 {
    (per_second * 1e6).round() / 1e6
}

/// To the thousandth: more would be noise in JSON.
pub fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}
