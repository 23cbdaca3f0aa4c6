//! What the simulated gateway is like.

use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use super::fault::Fault;
use crate::config::units::Rate;

/// What the simulated gateway is like: how fast, how generous, how faulty.
///
/// The default is a friendly gateway at the speed of a small model: no quota, no faults.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The median time from a request to its first token.
    pub first_token: Duration,
    /// How far that time spreads: the standard deviation of its logarithm (it is log-normal, as measured latencies
    /// are). 0 is no spread; with 0.3 two of three answers begin within a factor of 1.35. Draws beyond three standard
    /// deviations count as three.
    pub spread: f64,
    /// The time from one token to the next. An answer that isn't streamed waits for all of its tokens.
    pub per_token: Duration,
    /// How long an answer is, in tokens, drawn evenly from 1 to a million; the request's own `max_tokens`
    /// caps it.
    pub output_tokens: RangeInclusive<u32>,
    /// The quota on requests; `None` is no limit.
    pub requests: Option<Rate>,
    /// The quota on tokens; `None` is no limit.
    ///
    /// A request is charged on admission: its prompt, plus its `max_tokens` where it gives one (as OpenAI charges),
    /// else the output it will get. Nothing is settled or given back later. What is refused costs nothing.
    pub tokens: Option<Rate>,
    /// How many requests may be in progress, from admission to the last byte of the answer; `None` is no limit.
    pub concurrency: Option<usize>,
    /// How a quota comes back.
    pub window: Window,
    /// Who shares a quota and the concurrency.
    pub quota_per: QuotaPer,
    /// What the gateway tells of its quota.
    pub hints: Hints,
    /// Faults and the probability of each. One roll of the dice decides for a request: the probabilities add up, and
    /// what goes beyond a sum of 1 never happens. A fault of streams leaves other answers alone.
    pub faults: Vec<(Fault, f64)>,
    /// The wait that an injected 429 with a hint asks for.
    pub fault_hint: Duration,
    /// From when to when, since the start, everything is answered with a 503.
    pub outage: Option<Range<Duration>>,
    /// The same seed and the same order of requests make the same decisions.
    pub seed: u64,
    /// The API key to ask for (`Authorization: Bearer KEY` or `x-api-key: KEY`); `None` takes any and none.
    pub key: Option<String>,
    /// How long a connection may be silent between two requests, and how long a request's head may take.
    pub keep_alive: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            first_token: Duration::from_millis(300),
            spread: 0.3,
            per_token: Duration::from_millis(10),
            output_tokens: 20..=120,
            requests: None,
            tokens: None,
            concurrency: None,
            window: Window::Bucket,
            quota_per: QuotaPer::KeyAndModel,
            hints: Hints::OpenAiHeaders,
            faults: Vec::new(),
            fault_hint: Duration::from_secs(1),
            outage: None,
            seed: 0,
            key: None,
            keep_alive: Duration::from_secs(75),
        }
    }
}

impl Settings {
    /// A friendly gateway that answers at once: for tests and benches, where only the client's time counts.
    pub fn instant() -> Self {
        Self { first_token: Duration::ZERO, spread: 0.0, per_token: Duration::ZERO, ..Self::default() }
    }
}

/// How a quota comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Continuously, up to the rate's burst.
    Bucket,
    /// All at once, whenever a period since the start ends; the rate's burst says nothing here.
    FixedWindow,
}

/// Who shares a quota and the concurrency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaPer {
    /// All requests of an API key.
    Key,
    /// All requests of an API key to the same model; those that name none share one too.
    KeyAndModel,
}

/// What the gateway tells of its quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hints {
    /// `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` on every answer that the quota had a say in, but for
    /// injected errors, with the time until the quota is full again. On a refusal `retry-after` and `retry-after-ms`
    /// too, with the time until this very request would pass.
    OpenAiHeaders,
    /// On a refusal only, `retry-after` in whole seconds, rounded up.
    RetryAfterOnly,
    /// On a refusal only, `retry-after` as an HTTP date, rounded up to the second.
    RetryAfterDate,
    /// Nothing.
    None,
}
