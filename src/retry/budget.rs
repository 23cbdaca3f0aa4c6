//! The retry budget: retries are paid for by first attempts, so that a gateway in trouble is not sent a multiple of the
//! load that brought it there (Google's SRE book, chapter 21, "Handling Overload").
//!
//! Over any ten seconds, retries stay within `ratio` x first attempts + 10. tower's `TpsBudget` is meant to hold the same
//! bound, but in tower 0.5.3 it clears a slot of its window too many at nearly every turn, which makes ten seconds about
//! six; and it reads tokio's clock, where here `now` is given.

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

/// Retries in any window that no first attempt has to pay for.
const FLOOR: f64 = 10.0;

/// The window, in seconds; one more is kept, so that retries are counted over a little more than the window.
const WINDOW: u64 = 10;
const KEPT: usize = WINDOW as usize + 1;

/// First attempts pay in, retries are paid from it.
#[derive(Debug)]
pub struct RetryBudget {
    epoch: Instant,
    /// Guards the counts of the last seconds, each at its number modulo [`KEPT`]; held for a few additions.
    seconds: Mutex<[Second; KEPT]>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Second {
    number: u64,
    first_attempts: u32,
    retries: u32,
}

impl RetryBudget {
    /// A budget into which nobody has paid yet.
    pub fn new(now: Instant) -> Self {
        Self { epoch: now, seconds: Mutex::default() }
    }

    /// A request makes its first attempt.
    pub fn deposit(&self, now: Instant) {
        self.with_second(now, |second, _| second.first_attempts = second.first_attempts.saturating_add(1));
    }

    /// Whether there is enough for a retry, where each first attempt pays for `ratio` of them.
    pub fn allows(&self, ratio: f64, now: Instant) -> bool {
        self.with_second(now, |_, sums| sums.allows_retry(ratio))
    }

    /// Pays for a retry, if there is enough.
    pub fn withdraw(&self, ratio: f64, now: Instant) -> bool {
        self.with_second(now, |second, sums| {
            let within = sums.allows_retry(ratio);
            second.retries += u32::from(within);
            within
        })
    }

    /// Changes the current second's counts. The sums take first attempts from the last ten seconds at most, and retries from
    /// the last ten at least: the bound holds for every window, wherever it begins.
    fn with_second<T>(&self, now: Instant, change: impl FnOnce(&mut Second, Second) -> T) -> T {
        let number = now.saturating_duration_since(self.epoch).as_secs();
        let mut seconds = self.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sums = Second::default();
        for second in seconds.iter() {
            let age = number.saturating_sub(second.number);
            if age < WINDOW {
                sums.first_attempts = sums.first_attempts.saturating_add(second.first_attempts);
            }
            if age <= WINDOW {
                sums.retries = sums.retries.saturating_add(second.retries);
            }
        }
        let current = &mut seconds[number as usize % KEPT];
        if current.number != number {
            *current = Second { number, ..Second::default() };
        }
        change(current, sums)
    }
}

impl Second {
    fn allows_retry(self, ratio: f64) -> bool {
        f64::from(self.retries) + 1.0 <= ratio * f64::from(self.first_attempts) + FLOOR
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn ten_retries_are_free_and_first_attempts_pay_for_the_rest() {
        let now = Instant::now();
        let budget = RetryBudget::new(now);
        for _ in 0..100 {
            budget.deposit(now);
        }
        assert_eq!((0..1000).filter(|_| budget.withdraw(0.2, now)).count(), 20 + 10);
        let later = now + Duration::from_secs(12);
        assert_eq!((0..1000).filter(|_| budget.withdraw(0.2, later)).count(), 10, "the floor returns with the window");
    }

    #[test]
    fn in_every_window_of_ten_seconds_retries_stay_within_the_bound() {
        for seed in 0..50 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let start = Instant::now();
            let budget = RetryBudget::new(start);
            let (mut firsts, mut retries, mut at) = (Vec::new(), Vec::new(), Duration::ZERO);
            for _ in 0..3000 {
                at += Duration::from_millis(rng.random_range(0..30));
                if rng.random_range(0..3) == 0 {
                    budget.deposit(start + at);
                    firsts.push(at);
                } else if budget.withdraw(0.2, start + at) {
                    retries.push(at);
                }
            }
            let window = Duration::from_secs(10);
            for end in &retries {
                let within =
                    |times: &[Duration]| times.iter().filter(|at| **at <= *end && **at + window > *end).count() as f64;
                assert!(within(&retries) <= 0.2 * within(&firsts) + 10.0, "seed {seed} at {end:?}");
            }
        }
    }
}
