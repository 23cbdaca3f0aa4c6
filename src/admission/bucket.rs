//! The token bucket: governor's GCRA over a state that weir can read and move.
//!
//! governor decides and charges. What it does not offer (telling when the n-th cell from now would pass, or taking a charge
//! back) follows from the one number of its state, the *theoretical arrival time* (TAT): the state store is ours, so we
//! keep a second hand on it. This file is the only user of governor.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{NotKeyed, StateStore};
use governor::{Quota, RateLimiter};
use tokio::time::Instant;

use crate::config::Rate;

/// A timer fires up to a tick (1 ms) late. Whoever waited for a cell is charged as of when it was due, if that is no longer
/// ago than this; else a bucket with a small burst would lose a little of its rate with each wake-up.
const TIMER_SLACK: Duration = Duration::from_millis(2);

/// Centuries ahead is never, and more would overflow an `Instant`.
const FAR: u64 = u64::MAX / 8;

/// A bucket of cells that refills at a [`Rate`].
///
/// In any window `w` it lets through at most `burst + rate * w` (with `w` stretched by 2 ms of timer slack).
pub struct Bucket {
    limiter: RateLimiter<NotKeyed, Tat, GivenClock, NoOpMiddleware<Nanos>>,
    tat: Tat,
    clock: GivenClock,
    rate: Rate,
    epoch: Instant,
    /// When a cell was taken last.
    taken_at: Instant,
    /// Cells taken before this cannot come back any more: the bucket was full then, or as good as that.
    busy_since: Instant,
    /// By how much, in nanoseconds of refill, the bucket was short of full at least, whenever a cell was taken after
    /// `busy_since`; less what has come back since.
    shortest: u64,
}

impl Bucket {
    /// A full bucket.
    pub fn new(rate: Rate, now: Instant) -> Self {
        let quota = Quota::with_period(rate.interval()).expect("an interval is never 0");
        let quota = quota.allow_burst(NonZeroU32::new(rate.burst).unwrap_or(NonZeroU32::MIN));
        let (tat, clock) = (Tat::default(), GivenClock::default());
        // The clock reads 0 now, so that TATs count from `epoch`, whatever limiter reads them.
        let limiter = RateLimiter::new(quota, tat.clone(), clock.clone());
        Self { limiter, tat, clock, rate, epoch: now, taken_at: now, busy_since: now, shortest: u64::MAX }
    }

    /// The rate it refills at.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Takes a cell, if one is there. A cell that was waited for since before it was due counts from when it was due.
    pub fn try_take(&mut self, waiting_since: Instant, now: Instant) -> bool {
        let tolerance = u64::from(self.rate.burst - 1).saturating_mul(self.interval_nanos());
        let due = self.epoch + Duration::from_nanos(self.tat.get().saturating_sub(tolerance).min(FAR));
        let charged_at = due.max(waiting_since).max(now - TIMER_SLACK).min(now);
        let short_of_full = self.tat.get().saturating_sub(self.nanos(charged_at));
        self.clock.set(self.nanos(charged_at));
        let taken = self.limiter.check().is_ok();
        if taken {
            self.note_taken(short_of_full, now);
        }
        taken
    }

    /// Takes a cell that may not be there yet: whoever comes next waits for it.
    pub fn take_as_debt(&self, now: Instant) {
        let now = self.nanos(now);
        self.tat.update(|tat| tat.max(now).saturating_add(self.interval_nanos()));
    }

    fn note_taken(&mut self, short_of_full: u64, now: Instant) {
        self.taken_at = now;
        if short_of_full < self.interval_nanos() {
            (self.busy_since, self.shortest) = (now, u64::MAX);
        } else {
            self.shortest = self.shortest.min(short_of_full);
        }
    }

    /// Puts a cell back that was taken then and bought nothing. A full bucket stays full.
    ///
    /// Had the cell never been taken, the bucket might have been full since, and have let no more through for it. So a cell
    /// that comes back after others were taken counts only where the bucket was short of it all the time.
    pub fn give_back(&mut self, taken_at: Instant) {
        let interval = self.interval_nanos();
        if taken_at < self.taken_at {
            if taken_at < self.busy_since {
                return;
            }
            if self.shortest < interval {
                (self.busy_since, self.shortest) = (self.taken_at, u64::MAX);
                return;
            }
            if self.shortest != u64::MAX {
                self.shortest -= interval;
            }
        }
        self.tat.update(|tat| tat.saturating_sub(interval));
    }

    /// When the `n`-th cell from now (from 1) can be taken, if nobody else takes one; not later than `now` where it is there.
    pub fn available_at(&self, n: u64, now: Instant) -> Instant {
        let (burst, interval) = (u64::from(self.rate.burst), self.interval_nanos());
        let ahead = n.saturating_sub(burst).saturating_mul(interval);
        let credit = burst.saturating_sub(n).saturating_mul(interval);
        let nanos = self.tat.get().max(self.nanos(now)).saturating_add(ahead).saturating_sub(credit);
        self.epoch + Duration::from_nanos(nanos.min(FAR))
    }

    /// How many cells can be taken between now and then.
    pub fn count_by(&self, until: Instant, now: Instant) -> u64 {
        let first = self.available_at(1, now);
        if first > until {
            return 0;
        }
        let more = until.duration_since(first).as_nanos() / u128::from(self.interval_nanos());
        u64::try_from(more).unwrap_or(u64::MAX).saturating_add(1)
    }

    /// How many cells could be taken now.
    pub fn remaining(&self, now: Instant) -> u32 {
        let behind = self.tat.get().saturating_sub(self.nanos(now)).div_ceil(self.interval_nanos());
        self.rate.burst.saturating_sub(u32::try_from(behind).unwrap_or(u32::MAX))
    }

    fn interval_nanos(&self) -> u64 {
        u64::try_from(self.rate.interval().as_nanos()).unwrap_or(u64::MAX)
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The theoretical arrival time in nanoseconds since the bucket's epoch; 0 means that nothing was ever taken.
#[derive(Clone, Default)]
struct Tat(Arc<AtomicU64>);

impl Tat {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn update(&self, step: impl Fn(u64) -> u64) {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |tat| Some(step(tat)))
            .expect("the step always gives a value");
    }
}

impl StateStore for Tat {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _: &NotKeyed, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut before = self.get();
        loop {
            let (answer, after) = decide((before != 0).then(|| before.into()))?;
            match self.0.compare_exchange_weak(before, after.into(), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(answer),
                Err(current) => before = current,
            }
        }
    }
}

/// The clock that reads what it was set to: time comes in as an argument here.
#[derive(Clone, Default)]
struct GivenClock(Arc<AtomicU64>);

impl GivenClock {
    fn set(&self, nanos: u64) {
        self.0.store(nanos, Ordering::Release);
    }
}

impl Clock for GivenClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        self.0.load(Ordering::Acquire).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(rate: &str, burst: u32) -> (Bucket, Instant) {
        let now = Instant::now();
        (Bucket::new(Rate::parse(rate).expect("a rate").with_burst(burst), now), now)
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let (mut bucket, start) = bucket("10/s", 3);
        let taken = (0..2000u64).filter(|millis| {
            let now = start + Duration::from_millis(*millis);
            bucket.try_take(now, now)
        });
        let taken: Vec<u64> = taken.collect();
        assert_eq!(taken[..6], [0, 1, 2, 100, 200, 300]);
        assert_eq!(taken.len(), 3 + 19);
    }

    #[test]
    fn it_tells_when_the_nth_cell_can_be_taken() {
        let (mut bucket, start) = bucket("10/s", 2);
        assert_eq!(bucket.available_at(2, start), start);
        assert_eq!(bucket.available_at(3, start), start + Duration::from_millis(100));
        assert!(bucket.try_take(start, start) && bucket.try_take(start, start) && !bucket.try_take(start, start));
        assert_eq!(bucket.available_at(1, start), start + Duration::from_millis(100));
        assert_eq!(bucket.available_at(5, start), start + Duration::from_millis(500));
        assert_eq!(bucket.remaining(start), 0);
        assert_eq!(bucket.remaining(start + Duration::from_millis(150)), 1);
        let later = start + Duration::from_secs(9);
        assert_eq!(bucket.available_at(3, later), later + Duration::from_millis(100));
        let due = bucket.available_at(1, start);
        assert!(!bucket.try_take(due, due - Duration::from_nanos(1)));
        assert!(bucket.try_take(due, due));
    }

    #[test]
    fn a_cell_given_back_can_be_taken_again_and_a_full_bucket_stays_full() {
        let (mut bucket, start) = bucket("10/s", 1);
        assert!(bucket.try_take(start, start) && !bucket.try_take(start, start));
        bucket.give_back(start);
        assert!(bucket.try_take(start, start));
        let later = start + Duration::from_secs(60);
        bucket.give_back(start);
        bucket.give_back(start);
        assert_eq!(bucket.remaining(later), 1);
        assert!(bucket.try_take(later, later) && !bucket.try_take(later, later));
    }

    #[test]
    fn a_debt_is_waited_for_by_whoever_comes_next() {
        let (mut bucket, start) = bucket("10/s", 1);
        assert!(bucket.try_take(start, start));
        bucket.take_as_debt(start);
        assert_eq!(bucket.available_at(1, start), start + Duration::from_millis(200));
    }

    #[test]
    fn a_cell_that_comes_back_late_lets_no_more_through_than_a_full_bucket() {
        let (mut bucket, start) = bucket("10/s", 2);
        assert!(bucket.try_take(start, start));
        let later = start + Duration::from_secs(5);
        assert!(bucket.try_take(later, later));
        bucket.give_back(start);
        assert!(bucket.try_take(later, later));
        assert!(!bucket.try_take(later, later), "two at once and no third");
        bucket.give_back(later);
        assert!(bucket.try_take(later, later), "but what was taken since does come back");
    }

    #[test]
    fn a_late_timer_costs_no_rate_and_a_long_pause_gives_no_credit_beyond_the_burst() {
        let (mut bucket, start) = bucket("100/s", 1);
        let mut now = start;
        for _ in 0..100 {
            assert!(bucket.try_take(start, now));
            now = bucket.available_at(1, now) + Duration::from_micros(900);
        }
        assert!(now - start < Duration::from_millis(1002), "{:?}", now - start);
        let after_a_stall = now + Duration::from_secs(1);
        assert!(bucket.try_take(start, after_a_stall));
        assert!(!bucket.try_take(start, after_a_stall));
    }
}
