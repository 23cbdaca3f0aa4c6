//! One quota, exact to the nanosecond: a bucket that refills continuously, or a window that begins anew.
//!
//! All sums are whole numbers. The bucket counts in grains, of which one unit has as many as the period has
//! nanoseconds: then `count` units a period are `count` grains a nanosecond, and nothing is ever rounded.

use std::time::Duration;

use super::settings::Window;
use crate::config::units::Rate;

pub(super) struct Quota {
    rate: Rate,
    state: State,
}

enum State {
    Bucket { grains: u128, at: Duration },
    FixedWindow { index: u128, used: u64 },
}

/// What a gateway tells of a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level {
    /// Per period.
    pub(super) limit: u64,
    /// What could be taken now.
    pub(super) remaining: u64,
    /// Until all of it could.
    pub(super) reset: Duration,
}

impl Quota {
    /// A full one. Time is given as time since the gateway's start.
    pub(super) fn new(rate: Rate, window: Window) -> Self {
        let state = match window {
            Window::Bucket => {
                State::Bucket { grains: u128::from(rate.burst) * rate.period.as_nanos(), at: Duration::ZERO }
            }
            Window::FixedWindow => State::FixedWindow { index: 0, used: 0 },
        };
        Self { rate, state }
    }

    /// How long until `units` may be taken, given that nobody else comes; `None` is never.
    pub(super) fn wait(&mut self, units: u64, now: Duration) -> Option<Duration> {
        if units > self.capacity() {
            return None;
        }
        self.advance(now);
        Some(match &self.state {
            State::Bucket { grains, .. } => {
                self.refill_time((u128::from(units) * self.grain()).saturating_sub(*grains))
            }
            State::FixedWindow { used, .. } if used.saturating_add(units) <= self.rate.count => Duration::ZERO,
            State::FixedWindow { .. } => self.window_end(now),
        })
    }

    /// Takes `units`, for which [`wait`](Self::wait) was zero.
    pub(super) fn take(&mut self, units: u64) {
        let cost = u128::from(units) * self.grain();
        match &mut self.state {
            State::Bucket { grains, .. } => *grains = grains.saturating_sub(cost),
            State::FixedWindow { used, .. } => *used = used.saturating_add(units),
        }
    }

    pub(super) fn level(&mut self, now: Duration) -> Level {
        self.advance(now);
        let (remaining, reset) = match &self.state {
            State::Bucket { grains, .. } => {
                (*grains / self.grain(), self.refill_time(self.full() - (*grains).min(self.full())))
            }
            State::FixedWindow { used, .. } => {
                (u128::from(self.rate.count.saturating_sub(*used)), self.window_end(now))
            }
        };
        Level { limit: self.rate.count, remaining: u64::try_from(remaining).unwrap_or(u64::MAX), reset }
    }

    fn advance(&mut self, now: Duration) {
        let (count, full, period) = (u128::from(self.rate.count), self.full(), self.grain());
        match &mut self.state {
            State::Bucket { grains, at } => {
                let refill = now.saturating_sub(*at).as_nanos().saturating_mul(count);
                *grains = grains.saturating_add(refill).min(full);
                *at = now.max(*at);
            }
            State::FixedWindow { index, used } => {
                let current = now.as_nanos() / period;
                if current > *index {
                    (*index, *used) = (current, 0);
                }
            }
        }
    }

    /// The most that can be taken at once.
    fn capacity(&self) -> u64 {
        match self.state {
            State::Bucket { .. } => u64::from(self.rate.burst),
            State::FixedWindow { .. } => self.rate.count,
        }
    }

    fn grain(&self) -> u128 {
        self.rate.period.as_nanos().max(1)
    }

    fn full(&self) -> u128 {
        u128::from(self.rate.burst) * self.grain()
    }

    fn refill_time(&self, missing: u128) -> Duration {
        let nanos = missing.div_ceil(u128::from(self.rate.count.max(1)));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn window_end(&self, now: Duration) -> Duration {
        let nanos = self.grain() - now.as_nanos() % self.grain();
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn quota(rate: &str, burst: u32, window: Window) -> Quota {
        Quota::new(Rate::parse(rate).expect(rate).with_burst(burst), window)
    }

    #[test]
    fn a_bucket_grants_its_burst_and_then_one_per_interval_to_the_nanosecond() {
        let mut quota = quota("60/min", 3, Window::Bucket);
        for _ in 0..3 {
            assert_eq!(quota.wait(1, ms(0)), Some(ms(0)));
            quota.take(1);
        }
        assert_eq!(quota.wait(1, ms(0)), Some(ms(1000)));
        assert_eq!(quota.wait(1, ms(1000) - Duration::from_nanos(1)), Some(Duration::from_nanos(1)));
        assert_eq!(quota.wait(1, ms(1000)), Some(ms(0)));
        assert_eq!(quota.wait(3, ms(1000)), Some(ms(2000)));
    }

    #[test]
    fn a_bucket_grants_in_the_long_run_exactly_its_rate() {
        let mut quota = quota("7/s", 1, Window::Bucket);
        let mut now = ms(0);
        for _ in 0..=7000 {
            now += quota.wait(1, now).expect("within the burst");
            assert_eq!(quota.wait(1, now), Some(ms(0)), "the wait it told is enough");
            quota.take(1);
        }
        assert!(now.abs_diff(Duration::from_secs(1000)) <= Duration::from_micros(7), "{now:?}");
    }

    #[test]
    fn a_bucket_says_what_remains_and_when_it_is_full() {
        let mut quota = quota("60/min", 5, Window::Bucket);
        assert_eq!(quota.level(ms(0)), Level { limit: 60, remaining: 5, reset: ms(0) });
        quota.take(2);
        assert_eq!(quota.level(ms(500)), Level { limit: 60, remaining: 3, reset: ms(1500) });
    }

    #[test]
    fn a_window_grants_all_its_count_and_begins_anew_on_time() {
        let mut quota = quota("3/s", 1, Window::FixedWindow);
        assert_eq!(quota.wait(3, ms(400)), Some(ms(0)));
        quota.take(3);
        assert_eq!(quota.level(ms(400)), Level { limit: 3, remaining: 0, reset: ms(600) });
        assert_eq!(quota.wait(1, ms(400)), Some(ms(600)));
        assert_eq!(quota.wait(1, ms(1000)), Some(ms(0)));
    }

    #[test]
    fn what_can_never_fit_is_never_granted() {
        assert_eq!(quota("60/min", 3, Window::Bucket).wait(4, ms(0)), None);
        assert_eq!(quota("60/min", 3, Window::FixedWindow).wait(61, ms(0)), None);
    }
}
