//! Was that an answer? The verdict on an attempt, the delay before the next, and the budget that keeps retries from
//! storming.
//!
//! Pure: time and chance are given.

mod budget;

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use rand::{Rng, RngExt};
use tokio::time::Instant;

use crate::config;
use crate::metrics::AttemptResult;
use budget::RetryBudget;

/// How an attempt ended, as far as retrying is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The gateway answered with this status.
    Answer {
        status: StatusCode,
        /// The body says that waiting won't help: money lacks, or the request alone is above the quota.
        hopeless: bool,
        /// `x-should-retry`, where the gateway sent it.
        should_retry: Option<bool>,
        /// How long the gateway asks to wait.
        hint: Option<Duration>,
    },
    /// A 200 whose stream begins with an error.
    ErrorEvent,
    /// No connection was made.
    ConnectFailed,
    /// The connection broke before an answer, or what came was not HTTP.
    Broken,
    /// No answer in time, though the request was sent.
    TimedOut,
}

/// What is known of a request when an attempt has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tries {
    /// Retries made so far.
    pub retries: u32,
    /// Retries that the client's SDK has already made of this request.
    pub by_client: u32,
    /// One of the attempts ended in a timeout.
    pub timed_out: bool,
    /// Doing it twice does no harm that doing it once does not: a metered call, or an idempotent method.
    pub repeatable: bool,
    /// The attempt was to find out whether the gateway is back. That it failed does not count among the retries.
    pub probe: bool,
}

/// Try again after a delay, or leave it at that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The attempt's end is the request's end: it is an answer, or nothing to be mended by trying again.
    Final,
    /// It was a passing fault, but enough has been tried.
    GiveUp,
    /// Try again after this delay, when the budget allows it ([`Policy::pay`]).
    Again { delay: Duration },
}

/// The statuses of passing faults. 408, 409 and 429 are the SDKs' too; 520 to 524 are a CDN's word for a gateway that does
/// not answer, 529 is Anthropic's for overload.
fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 409 | 429 | 500 | 502 | 503 | 504 | 520..=524 | 529)
}

/// How often, and how soon, to try again.
pub struct Policy {
    max_retries: u32,
    base_delay: Duration,
    max_delay: Duration,
    /// Retries that each first attempt pays for.
    ratio: f64,
    budget: Arc<RetryBudget>,
}

impl Policy {
    /// The policy of the configuration, its budget full.
    pub fn new(settings: &config::Retry, now: Instant) -> Self {
        Self::with(settings, Arc::new(RetryBudget::new(now)))
    }

    /// The policy of another configuration, which pays from the same budget.
    #[must_use]
    pub fn changed_to(&self, settings: &config::Retry) -> Self {
        Self::with(settings, self.budget.clone())
    }

    fn with(settings: &config::Retry, budget: Arc<RetryBudget>) -> Self {
        Self {
            max_retries: settings.max_retries,
            base_delay: settings.base_delay,
            max_delay: settings.max_delay,
            ratio: settings.budget,
            budget,
        }
    }

    /// A request makes its first attempt: it pays into the budget.
    pub fn first_attempt(&self, now: Instant) {
        self.budget.deposit(now);
    }

    /// Whether the budget allows a retry. One that it does not allow yet waits: that keeps retries from storming as well as giving up,
    /// and loses nothing.
    pub fn allows_retry(&self, now: Instant) -> bool {
        self.budget.allows(self.ratio, now)
    }

    /// Pays for a retry that is about to be made, if there is enough.
    pub fn pay(&self, now: Instant) -> bool {
        self.budget.withdraw(self.ratio, now)
    }

    /// Judges an attempt. `patience` is the time that the request has left; a longer delay is not worth waiting for.
    pub fn judge(&self, ending: Ending, tries: Tries, patience: Duration, rng: &mut impl Rng) -> Verdict {
        if !may_help(ending, tries) {
            return Verdict::Final;
        }
        let hint = match ending {
            Ending::Answer { hint, .. } => hint,
            _ => None,
        };
        let delay = hint.unwrap_or_else(|| self.backoff(tries.retries, rng));
        let tries_left = tries.probe || tries.retries < self.max_retries.saturating_sub(tries.by_client);
        let second_timeout = ending == Ending::TimedOut && tries.timed_out;
        if self.max_retries == 0 {
            // Retrying was left to the client.
            return Verdict::Final;
        }
        if !tries_left || second_timeout || delay >= patience {
            return Verdict::GiveUp;
        }
        Verdict::Again { delay }
    }

    /// `min(base_delay * 2^retries + uniform(0, base_delay), max_delay)`.
    fn backoff(&self, retries: u32, rng: &mut impl Rng) -> Duration {
        let doubled = self.base_delay.saturating_mul(2u32.saturating_pow(retries));
        let jitter = self.base_delay.mul_f64(rng.random_range(0.0..1.0));
        doubled.saturating_add(jitter).min(self.max_delay)
    }
}

/// Whether another attempt could end better.
fn may_help(ending: Ending, tries: Tries) -> bool {
    match ending {
        Ending::Answer { hopeless: true, .. } => false,
        Ending::Answer { status, should_retry, .. } => is_worth_holding(status, should_retry),
        // The gateway may have done it already, and does not say.
        Ending::Broken | Ending::TimedOut => tries.repeatable,
        Ending::ErrorEvent | Ending::ConnectFailed => true,
    }
}

/// Whether an answer may turn out to be a passing fault, so that its body is to be read before it is passed on.
pub fn is_worth_holding(status: StatusCode, should_retry: Option<bool>) -> bool {
    match should_retry {
        Some(word) => word && (status.is_client_error() || status.is_server_error()),
        None => is_passing(status),
    }
}

/// The label of an attempt that was answered with this status.
pub fn result_of(status: StatusCode) -> AttemptResult {
    match status.as_u16() {
        429 => AttemptResult::TooManyRequests,
        400..500 => AttemptResult::ClientError,
        500.. => AttemptResult::ServerError,
        _ => AttemptResult::Ok,
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;
    use crate::config::Config;

    const PATIENCE: Duration = Duration::from_secs(900);
    const FRESH: Tries = Tries { retries: 0, by_client: 0, timed_out: false, repeatable: true, probe: false };

    fn answer(status: u16) -> Ending {
        let status = StatusCode::from_u16(status).expect("a status");
        Ending::Answer { status, hopeless: false, should_retry: None, hint: None }
    }

    fn judge(ending: Ending, tries: Tries) -> Verdict {
        judge_with(ending, tries, PATIENCE)
    }

    fn judge_with(ending: Ending, tries: Tries, patience: Duration) -> Verdict {
        Policy::new(&Config::default().retry, Instant::now()).judge(
            ending,
            tries,
            patience,
            &mut SmallRng::seed_from_u64(1),
        )
    }

    fn is_retried(ending: Ending, tries: Tries) -> bool {
        matches!(judge(ending, tries), Verdict::Again { .. })
    }

    #[test]
    fn passing_faults_are_retried_and_nothing_else() {
        let retried: Vec<u16> = (200..600).filter(|status| is_retried(answer(*status), FRESH)).collect();
        assert_eq!(retried, [408, 409, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529]);
        for ending in [Ending::ErrorEvent, Ending::ConnectFailed, Ending::Broken, Ending::TimedOut] {
            assert!(is_retried(ending, FRESH), "{ending:?}");
        }
    }

    #[test]
    fn the_delay_doubles_with_jitter_up_to_its_cap() {
        let policy = Policy::new(&Config::default().retry, Instant::now());
        let mut rng = SmallRng::seed_from_u64(7);
        for retries in 0..40 {
            for _ in 0..100 {
                let delay = policy.backoff(retries, &mut rng).as_secs_f64();
                let base = 2f64.powi(retries as i32);
                assert!(delay >= base.min(30.0) && delay <= (base + 1.0).min(30.0), "{retries}: {delay}");
            }
        }
    }

    #[test]
    fn a_hint_replaces_the_delay_and_a_hint_beyond_the_patience_ends_it() {
        let hinted = |millis| Ending::Answer {
            status: StatusCode::TOO_MANY_REQUESTS,
            hopeless: false,
            should_retry: None,
            hint: Some(Duration::from_millis(millis)),
        };
        let delay = Duration::from_millis(20);
        assert_eq!(judge(hinted(20), FRESH), Verdict::Again { delay });
        assert_eq!(judge_with(hinted(2000), FRESH, Duration::from_secs(1)), Verdict::GiveUp);
    }

    #[test]
    fn money_that_lacks_is_never_waited_for() {
        let ending = Ending::Answer {
            status: StatusCode::TOO_MANY_REQUESTS,
            hopeless: true,
            should_retry: Some(true),
            hint: None,
        };
        assert_eq!(judge(ending, FRESH), Verdict::Final);
    }

    #[test]
    fn the_gateways_own_word_overrides_the_status() {
        let told = |status, word| Ending::Answer { status, hopeless: false, should_retry: Some(word), hint: None };
        assert_eq!(judge(told(StatusCode::SERVICE_UNAVAILABLE, false), FRESH), Verdict::Final);
        assert!(is_retried(told(StatusCode::BAD_REQUEST, true), FRESH));
        assert_eq!(judge(told(StatusCode::OK, true), FRESH), Verdict::Final);
    }

    #[test]
    fn three_retries_are_enough_and_an_sdks_own_count_among_them() {
        assert!(is_retried(answer(503), Tries { retries: 2, ..FRESH }));
        assert_eq!(judge(answer(503), Tries { retries: 3, ..FRESH }), Verdict::GiveUp);
        assert_eq!(judge(answer(503), Tries { retries: 1, by_client: 2, ..FRESH }), Verdict::GiveUp);
        assert_eq!(judge(answer(503), Tries { by_client: u32::MAX, ..FRESH }), Verdict::GiveUp);
    }

    #[test]
    fn a_probe_costs_no_retry() {
        assert!(is_retried(answer(503), Tries { retries: 3, probe: true, ..FRESH }));
        assert!(is_retried(answer(429), Tries { by_client: 9, probe: true, ..FRESH }));
    }

    #[test]
    fn without_a_budget_a_retry_waits_for_it() {
        let policy = Policy::new(&Config::default().retry, Instant::now());
        let now = Instant::now();
        while policy.pay(now) {}
        assert!(is_retried(answer(503), FRESH) && !policy.allows_retry(now));
        let later = now + Duration::from_secs(11);
        assert!(policy.allows_retry(later) && policy.pay(later));
    }

    #[test]
    fn another_policy_pays_from_the_same_budget() {
        let (policy, now) = (Policy::new(&Config::default().retry, Instant::now()), Instant::now());
        while policy.pay(now) {}
        (0..10).for_each(|_| policy.first_attempt(now));
        let generous = config::Retry { budget: 1.0, ..Config::default().retry };
        let generous = policy.changed_to(&generous);
        assert_eq!(
            (0..100).filter(|_| generous.pay(now)).count(),
            10,
            "with the floor 20, of which ten were paid for before"
        );
    }

    #[test]
    fn a_timeout_is_retried_once_at_most() {
        assert_eq!(judge(Ending::TimedOut, Tries { retries: 1, timed_out: true, ..FRESH }), Verdict::GiveUp);
        assert!(is_retried(answer(503), Tries { retries: 1, timed_out: true, ..FRESH }));
    }

    #[test]
    fn what_may_have_been_done_already_is_not_repeated_unless_that_does_no_harm() {
        let once = Tries { repeatable: false, ..FRESH };
        assert_eq!(judge(Ending::Broken, once), Verdict::Final);
        assert_eq!(judge(Ending::TimedOut, once), Verdict::Final);
        assert!(is_retried(Ending::ConnectFailed, once) && is_retried(answer(503), once));
    }
}
