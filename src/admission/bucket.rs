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

use super::slack::{ChargeNo, Slack};
use crate::config::Rate;

/// A timer fires up to a tick (1 ms) late. Whoever waited for a cell is charged as of when it was due, if that is no longer
/// ago than this, in nanoseconds; else a bucket with a small burst would lose a little of its rate with each wake-up.
const TIMER_SLACK: u64 = 2_000_000;

/// Centuries ahead is never, and more would overflow an `Instant`.
const FAR: u64 = u64::MAX / 8;

/// A bucket of cells (requests, or tokens) that refills at a [`Rate`].
///
/// In any window `w` it lets through at most `burst + rate * w` (with `w` stretched by 2 ms of timer slack), and by as much
/// more as charges turn out to have been too small ([`Bucket::owe`]). In the long run it lets through the rate exactly.
/// For charges that turn out to have been too large see [`Bucket::of_guesses`].
pub struct Bucket {
    limiter: RateLimiter<NotKeyed, Tat, GivenClock, NoOpMiddleware<Nanos>>,
    tat: Tat,
    clock: GivenClock,
    rate: Rate,
    /// The time of one cell, in nanoseconds, and of all that it holds.
    interval: u64,
    capacity: u64,
    epoch: Instant,
    slack: Slack,
    /// What a smaller burst was spared of what was lacking, in nanoseconds of refill: lacking again when the burst grows, less
    /// the time in which the bucket was full.
    spared: u64,
    /// Charges are guesses.
    guesses: bool,
}

impl Bucket {
    /// A full bucket.
    pub fn new(rate: Rate, now: Instant) -> Self {
        let (tat, clock) = (Tat::default(), GivenClock::default());
        let limiter = limiter(rate, &tat, &clock);
        let (interval, capacity) = interval_and_capacity(rate);
        let slack = Slack::default();
        Self { limiter, tat, clock, rate, interval, capacity, epoch: now, slack, spared: 0, guesses: false }
    }

    /// A full bucket whose charges are guesses, settled when the truth is known.
    ///
    /// While there is a queue, what was guessed too much comes back in full: else guesses would cost rate. So with a queue a
    /// window may use more than `burst + rate * w` by what the guesses under way at its beginning were too much by. A bucket
    /// that is full stays full, so a burst that holds less than a few requests costs rate all the same.
    pub fn of_guesses(rate: Rate, now: Instant) -> Self {
        Self { guesses: true, ..Self::new(rate, now) }
    }

    /// Changes the rate and the burst. What was used stays used, and no change gives a second burst: as many cells as were
    /// lacking are lacking still, at most the whole new burst. What was debt before (more than the old burst) stays debt.
    /// Cells that come back from now on come back at the new rate.
    ///
    /// So in a window across any number of changes at most the largest burst is let through, and what each rate gives in its
    /// part of the window.
    pub fn set_rate(&mut self, rate: Rate, now: Instant) {
        if rate == self.rate {
            return;
        }
        let (before, now) = (self.rate, self.nanos(now));
        // The time for a cell has changed by this.
        let rescale = |nanos: u64| {
            let nanos = u128::from(nanos) * rate.period.as_nanos() * u128::from(before.count)
                / (before.period.as_nanos() * u128::from(rate.count));
            u64::try_from(nanos).unwrap_or(FAR).min(FAR)
        };
        self.was_full_until(now);
        let lacking = self.tat.get().saturating_sub(now);
        let debt = lacking.saturating_sub(self.capacity);
        let of_burst = rescale((lacking - debt).saturating_add(self.spared));
        self.rate = rate;
        (self.interval, self.capacity) = interval_and_capacity(rate);
        self.spared = of_burst.saturating_sub(self.capacity);
        let lacking = of_burst.min(self.capacity).saturating_add(rescale(debt)).min(FAR);
        self.tat.update(|tat| if lacking > 0 { now.saturating_add(lacking) } else { tat });
        self.slack.rescale(rescale);
        // A clock that reads 0 while the limiter is made, so that TATs go on counting from `epoch`.
        self.clock.set(0);
        self.limiter = limiter(rate, &self.tat, &self.clock);
    }

    /// If it was full for a while before then, as much more would have come back of what it was spared.
    fn was_full_until(&mut self, at: u64) {
        if self.spared > 0 {
            self.spared = self.spared.saturating_sub(at.saturating_sub(self.tat.get()));
        }
    }

    /// The rate it refills at.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Whether `n` cells are more than it ever holds: who needs them passes when it is full, and leaves a debt.
    pub fn is_oversize(&self, n: u64) -> bool {
        n > u64::from(self.rate.burst)
    }

    /// Takes `n` cells, if they are there; of more than the burst, the rest as debt. Cells that were waited for since before
    /// they were due count from when they were due.
    pub fn try_take(&mut self, n: u64, charge: ChargeNo, waiting_since: Instant, now: Instant) -> bool {
        let Some(at_once) = NonZeroU32::new(self.at_once(n)) else { return true };
        let due = self.available_nanos(u64::from(at_once.get()), 0);
        let to = self.nanos(now);
        let since = if waiting_since == now { to } else { self.nanos(waiting_since) };
        let charged_at = due.max(since).max(to.saturating_sub(TIMER_SLACK)).min(to);
        let short_of_full = self.tat.get().saturating_sub(charged_at);
        self.clock.set(charged_at);
        self.was_full_until(charged_at);
        let taken = self.limiter.check_n(at_once).is_ok_and(|fits| fits.is_ok());
        if taken {
            let waited = waiting_since < now;
            if !(self.guesses && waited) {
                self.slack.note(charge, short_of_full);
            }
            // governor's cells are whole nanoseconds long, and are no more than the burst.
            let rest = self.time_for(n).saturating_sub(self.interval * u64::from(at_once.get()));
            self.tat.update(|tat| tat.saturating_add(rest).min(FAR));
        }
        taken
    }

    /// Takes cells that may not be there: whoever comes next waits for them.
    pub fn owe(&mut self, n: u64, charge: ChargeNo, now: Instant) {
        let now = self.nanos(now);
        let short_of_full = self.tat.get().saturating_sub(now);
        if !self.guesses || short_of_full == 0 {
            self.slack.note(charge, short_of_full);
        }
        self.was_full_until(now);
        let debt = self.time_for(n);
        self.tat.update(|tat| tat.max(now).saturating_add(debt).min(FAR));
    }

    /// Puts cells back that were taken by that charge and bought nothing. A full bucket stays full, and no more can be taken
    /// than if they had never been taken (see [`super::slack`]).
    pub fn give_back(&mut self, n: u64, charge: ChargeNo) {
        let given = self.slack.give_back(charge, self.time_for(n));
        self.tat.update(|tat| tat.saturating_sub(given));
    }

    /// When the `n`-th cell from now (from 1) can be taken, if nobody else takes one; not later than `now` where it is there.
    pub fn available_at(&self, n: u64, now: Instant) -> Instant {
        self.epoch + Duration::from_nanos(self.available_nanos(n, self.nanos(now)))
    }

    /// When a request for `n` cells can pass, if nobody else takes one: when they are there or, of more than the burst, when
    /// the bucket is full.
    pub fn open_at(&self, n: u64, now: Instant) -> Instant {
        self.available_at(u64::from(self.at_once(n)), now)
    }

    /// Whether a request for `n` cells can pass now.
    pub fn is_open(&self, n: u64, now: Instant) -> bool {
        let now = self.nanos(now);
        self.available_nanos(u64::from(self.at_once(n)), now) <= now
    }

    /// As [`Bucket::open_at`], where someone has been saving since then for all that the bucket holds: half of the refill is
    /// theirs. `None` where so many cells would never be left.
    pub fn open_beside_saver_at(&self, n: u64, saving_since: Instant, now: Instant) -> Option<Instant> {
        let level = self.capacity.saturating_sub(self.tat.get().saturating_sub(self.nanos(now)));
        let elapsed = self.nanos(now).saturating_sub(self.nanos(saving_since));
        let wanted = u64::from(self.at_once(n)).saturating_mul(self.interval).saturating_add(elapsed / 2);
        if wanted > self.capacity {
            return None;
        }
        // The level rises by one while what is saved rises by a half.
        Some(now + Duration::from_nanos(wanted.saturating_sub(level).saturating_mul(2)))
    }

    /// How many cells can be taken between now and then.
    pub fn count_by(&self, until: Instant, now: Instant) -> u64 {
        let first = self.available_at(1, now);
        if first > until {
            return 0;
        }
        let there = u64::from(self.remaining(now).max(1));
        let from = first.max(now);
        let more = until.saturating_duration_since(from).as_nanos() / u128::from(self.interval);
        u64::try_from(more).unwrap_or(u64::MAX).saturating_add(there)
    }

    /// How many cells could be taken now.
    pub fn remaining(&self, now: Instant) -> u32 {
        self.remaining_of(self.short_of_full(now))
    }

    /// How long until it is full, if nobody takes anything.
    pub fn time_to_full(&self, now: Instant) -> Duration {
        Duration::from_nanos(self.short_of_full(now))
    }

    /// Both [`Bucket::remaining`] and [`Bucket::time_to_full`].
    pub fn standing(&self, now: Instant) -> (u32, Duration) {
        let short_of_full = self.short_of_full(now);
        (self.remaining_of(short_of_full), Duration::from_nanos(short_of_full))
    }

    /// The time in which `n` cells come back.
    pub fn refill_time(&self, n: u64) -> Duration {
        Duration::from_nanos(self.time_for(n))
    }

    /// How many cells come back in that time; no more than it holds.
    pub fn refilled_in(&self, time: Duration) -> u64 {
        let cells = time.as_nanos() / u128::from(self.interval);
        u64::try_from(cells).unwrap_or(u64::MAX).min(u64::from(self.rate.burst))
    }

    /// What it is short of full, in nanoseconds of refill.
    fn short_of_full(&self, now: Instant) -> u64 {
        self.tat.get().saturating_sub(self.nanos(now))
    }

    fn remaining_of(&self, short_of_full: u64) -> u32 {
        let lacking = short_of_full.div_ceil(self.interval);
        self.rate.burst.saturating_sub(u32::try_from(lacking).unwrap_or(u32::MAX))
    }

    /// How many of `n` cells have to be there when they are taken.
    fn at_once(&self, n: u64) -> u32 {
        u32::try_from(n).unwrap_or(u32::MAX).min(self.rate.burst)
    }

    /// As [`Bucket::available_at`], in nanoseconds since the epoch.
    fn available_nanos(&self, n: u64, now: u64) -> u64 {
        let full_at = self.tat.get().max(now);
        let burst = u64::from(self.rate.burst);
        let nanos = match n.checked_sub(burst) {
            Some(beyond) => full_at.saturating_add(self.time_for(beyond)),
            None => full_at.saturating_sub((burst - n).saturating_mul(self.interval)),
        };
        nanos.min(FAR)
    }

    /// The time in which `n` cells are granted, once the burst is used up; exact, however short one cell's is.
    fn time_for(&self, n: u64) -> u64 {
        let period = self.rate.period.as_nanos();
        if let Some(product) = u64::try_from(period).ok().and_then(|period| n.checked_mul(period)) {
            // The same, and several times as fast.
            return (product / self.rate.count).min(FAR);
        }
        let nanos = u128::from(n).saturating_mul(period) / u128::from(self.rate.count);
        u64::try_from(nanos).unwrap_or(FAR).min(FAR)
    }

    fn nanos(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.epoch);
        since.as_secs().saturating_mul(1_000_000_000).saturating_add(u64::from(since.subsec_nanos()))
    }
}

/// The time of one cell, in nanoseconds, and of all that the bucket holds.
fn interval_and_capacity(rate: Rate) -> (u64, u64) {
    let interval = u64::try_from(rate.interval().as_nanos()).unwrap_or(u64::MAX);
    (interval, u64::from(rate.burst).saturating_mul(interval))
}

/// A limiter of governor's over that state, made while the clock reads 0.
fn limiter(rate: Rate, tat: &Tat, clock: &GivenClock) -> RateLimiter<NotKeyed, Tat, GivenClock, NoOpMiddleware<Nanos>> {
    let quota = Quota::with_period(rate.interval()).expect("an interval is never 0");
    let quota = quota.allow_burst(NonZeroU32::new(rate.burst).unwrap_or(NonZeroU32::MIN));
    RateLimiter::new(quota, tat.clone(), clock.clone())
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
    use std::collections::VecDeque;

    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    /// A bucket whose charges are numbered as they are made.
    struct Numbered {
        bucket: Bucket,
        start: Instant,
        charges: u64,
    }

    impl Numbered {
        fn new(rate: &str, burst: u32) -> Self {
            let start = Instant::now();
            Self { bucket: Bucket::new(Rate::parse(rate).expect("a rate").with_burst(burst), start), start, charges: 0 }
        }

        fn of_guesses(rate: &str, burst: u32) -> Self {
            let it = Self::new(rate, burst);
            Self { bucket: Bucket { guesses: true, ..it.bucket }, ..it }
        }

        fn at(&self, millis: u64) -> Instant {
            self.start + Duration::from_millis(millis)
        }

        /// Takes `n` at that time; the charge's number where they were there.
        fn take(&mut self, n: u64, at: Instant) -> Option<ChargeNo> {
            self.charges += 1;
            let charge = ChargeNo(self.charges);
            self.bucket.try_take(n, charge, at, at).then_some(charge)
        }

        fn owe(&mut self, n: u64, at: Instant) {
            self.charges += 1;
            self.bucket.owe(n, ChargeNo(self.charges), at);
        }

        fn available_at(&self, n: u64, now: Instant) -> u64 {
            (self.bucket.available_at(n, now) - self.start).as_millis() as u64
        }
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let mut it = Numbered::new("10/s", 3);
        let taken: Vec<u64> = (0..2000).filter(|millis| it.take(1, it.at(*millis)).is_some()).collect();
        assert_eq!(taken[..6], [0, 1, 2, 100, 200, 300]);
        assert_eq!(taken.len(), 3 + 19);
    }

    #[test]
    fn it_tells_when_the_nth_cell_can_be_taken() {
        let mut it = Numbered::new("10/s", 2);
        let start = it.start;
        assert_eq!((it.available_at(2, start), it.available_at(3, start)), (0, 100));
        assert!(it.take(1, start).is_some() && it.take(1, start).is_some() && it.take(1, start).is_none());
        assert_eq!((it.available_at(1, start), it.available_at(5, start)), (100, 500));
        assert_eq!((it.bucket.remaining(start), it.bucket.remaining(it.at(150))), (0, 1));
        assert_eq!(it.available_at(3, it.at(9000)), 9100);
        let due = it.bucket.available_at(1, start);
        assert!(it.take(1, due - Duration::from_nanos(1)).is_none());
        assert!(it.take(1, due).is_some());
    }

    #[test]
    fn several_cells_are_taken_together_or_not_at_all() {
        let mut it = Numbered::new("100/s", 50);
        assert!(it.take(40, it.start).is_some() && it.take(20, it.start).is_none());
        assert_eq!(it.bucket.remaining(it.start), 10);
        assert!(it.take(20, it.at(100)).is_some());
    }

    #[test]
    fn more_than_the_burst_passes_a_full_bucket_and_leaves_a_debt() {
        let mut it = Numbered::new("100/s", 50);
        assert!(it.take(1, it.start).is_some() && it.take(250, it.start).is_none());
        assert_eq!((it.bucket.open_at(250, it.start) - it.start).as_millis(), 10);
        assert!(it.take(250, it.at(10)).is_some());
        assert_eq!(it.available_at(1, it.at(10)), 10 + 2010);
    }

    #[test]
    fn beside_one_who_saves_half_of_the_refill_is_left() {
        let mut it = Numbered::new("100/s", 50);
        assert!(it.take(50, it.start).is_some());
        let beside = |it: &Numbered, n, at| {
            it.bucket.open_beside_saver_at(n, it.start, at).map(|at| (at - it.start).as_millis())
        };
        assert_eq!(beside(&it, 10, it.start), Some(200), "ten in the time of twenty");
        assert_eq!(beside(&it, 10, it.at(200)), Some(200));
        assert_eq!(beside(&it, 10, it.at(900)), None, "then all of it is saved");
    }

    #[test]
    fn a_cell_given_back_can_be_taken_again_and_a_full_bucket_stays_full() {
        let mut it = Numbered::new("10/s", 1);
        let charge = it.take(1, it.start).expect("full");
        assert!(it.take(1, it.start).is_none());
        it.bucket.give_back(1, charge);
        let charge = it.take(1, it.start).expect("given back");
        let later = it.at(60_000);
        it.bucket.give_back(1, charge);
        assert_eq!(it.bucket.remaining(later), 1);
        assert!(it.take(1, later).is_some() && it.take(1, later).is_none());
    }

    #[test]
    fn a_debt_is_waited_for_by_whoever_comes_next() {
        let mut it = Numbered::new("10/s", 1);
        assert!(it.take(1, it.start).is_some());
        it.owe(1, it.start);
        assert_eq!(it.available_at(1, it.start), 200);
    }

    #[test]
    fn a_cell_that_comes_back_late_lets_no_more_through_than_a_full_bucket() {
        let mut it = Numbered::new("10/s", 2);
        let early = it.take(1, it.start).expect("full");
        let later = it.at(5000);
        let late = it.take(1, later).expect("full again");
        it.bucket.give_back(1, early);
        assert!(it.take(1, later).is_some());
        assert!(it.take(1, later).is_none(), "two at once and no third");
        it.bucket.give_back(1, late);
        assert!(it.take(1, later).is_some(), "but what was taken since does come back");
    }

    #[test]
    fn a_change_of_rate_keeps_what_is_lacking() {
        let rate = |text: &str, burst| Rate::parse(text).expect("a rate").with_burst(burst);
        let mut it = Numbered::new("10/s", 10);
        assert!(it.take(8, it.start).is_some());
        it.bucket.set_rate(rate("100/s", 10), it.start);
        assert_eq!((it.bucket.remaining(it.start), it.available_at(3, it.start)), (2, 10));
        it.bucket.set_rate(rate("1/s", 20), it.start);
        assert_eq!(it.bucket.remaining(it.start), 12, "eight of twenty are lacking");
        it.bucket.set_rate(rate("1/s", 5), it.start);
        assert_eq!(it.available_at(1, it.start), 1000, "a smaller burst is lacking as a whole, and no more than that");
    }

    #[test]
    fn a_debt_stays_one_when_the_rate_changes() {
        let rate = |text: &str, burst| Rate::parse(text).expect("a rate").with_burst(burst);
        let mut it = Numbered::new("1/s", 20);
        assert!(it.take(8, it.start).is_some());
        it.owe(30, it.start);
        it.bucket.set_rate(rate("10/s", 5), it.start);
        assert_eq!(it.available_at(1, it.start), 1900, "18 were debt, and of the burst all five are lacking");
    }

    /// What was let through across changes, against the larger burst and what the rates gave.
    #[test]
    fn in_a_window_across_changes_no_more_passes_than_the_largest_burst_and_the_rates() {
        for seed in 0..200 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut it = Numbered::new("1000/s", 300);
            let (mut millis, mut given) = (0, 0);
            let mut under_way: Vec<(ChargeNo, u64, usize)> = Vec::new();
            // What the rates had given when it passed, in thousandths, what passed, and the burst in force.
            let mut passed: Vec<(u64, u64, u64)> = Vec::new();
            for _ in 0..400 {
                let pause = rng.random_range(0..40);
                given += pause * it.bucket.rate().count;
                millis += pause;
                let now = it.at(millis);
                if rng.random_bool(0.1) {
                    let rate = Rate { count: rng.random_range(10..=2000), ..it.bucket.rate() };
                    it.bucket.set_rate(rate.with_burst(rng.random_range(1..=500)), now);
                }
                let (burst, cells) = (it.bucket.rate().burst, rng.random_range(1..60));
                if let Some(charge) = it.take(cells.min(u64::from(burst)), now) {
                    under_way.push((charge, cells.min(u64::from(burst)), passed.len()));
                    passed.push((given, cells.min(u64::from(burst)), u64::from(burst)));
                }
                if !under_way.is_empty() && rng.random_bool(0.3) {
                    // It was never sent.
                    let (charge, cells, at) = under_way.swap_remove(rng.random_range(0..under_way.len()));
                    it.bucket.give_back(cells, charge);
                    passed[at].1 = 0;
                }
            }
            for (i, (from, ..)) in passed.iter().enumerate() {
                let (mut total, mut burst) = (0, 0);
                for (to, cells, in_force) in &passed[i..] {
                    (total, burst) = (total + cells, in_force.max(&burst).to_owned());
                    assert!(total <= burst + (to - from) / 1000 + 4, "seed {seed}: {total} of {burst}");
                }
            }
        }
    }

    #[test]
    fn a_late_timer_costs_no_rate_and_a_long_pause_gives_no_credit_beyond_the_burst() {
        let mut it = Numbered::new("100/s", 1);
        let (start, mut now) = (it.start, it.start);
        for number in 0..100 {
            assert!(it.bucket.try_take(1, ChargeNo(number), start, now));
            now = it.bucket.available_at(1, now) + Duration::from_micros(900);
        }
        assert!(now - start < Duration::from_millis(1002), "{:?}", now - start);
        let after_a_stall = now + Duration::from_secs(1);
        assert!(it.bucket.try_take(1, ChargeNo(100), start, after_a_stall));
        assert!(!it.bucket.try_take(1, ChargeNo(101), start, after_a_stall));
    }

    #[test]
    fn a_rate_of_many_cells_a_microsecond_is_exact_too() {
        // A cell is 85.7 ns, which governor takes for 85.
        let mut it = Numbered::new("700000000/min", 10_000);
        let mut now = it.start;
        for _ in 0..100_000 {
            now = it.bucket.open_at(7000, now).max(now);
            assert!(it.take(7000, now).is_some());
        }
        let rate = 7000.0 * 100_000.0 / (now - it.start).as_secs_f64() * 60.0;
        assert!((rate / 700e6 - 1.0).abs() < 0.001, "{rate}");
    }

    /// Charges are guesses, settled later; what is used is compared with what the quota allows.
    #[test]
    fn in_every_window_no_more_is_used_than_burst_and_rate_and_what_guesses_fell_short_by() {
        for seed in 0..200 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut it = Numbered::of_guesses("1000/s", 500);
            let mut under_way: Vec<(u64, u64, ChargeNo)> = Vec::new();
            // When it was let through, what it used, and by how much the guess fell short.
            let mut used: Vec<(u64, u64, u64)> = Vec::new();
            let mut millis = 0;
            for _ in 0..300 {
                millis += if rng.random_bool(0.1) { rng.random_range(0..2000) } else { rng.random_range(0..60) };
                let now = it.at(millis);
                let (guess, truth) = (rng.random_range(1..200), rng.random_range(1..200));
                if let Some(charge) = it.take(guess, now) {
                    under_way.push((guess, truth, charge));
                    used.push((millis, truth, truth.saturating_sub(guess)));
                }
                if rng.random_bool(0.02) {
                    // Up to the rate and the burst that the bound is stated for.
                    let rate = Rate { count: rng.random_range(100..=1000), ..it.bucket.rate() };
                    it.bucket.set_rate(rate.with_burst(rng.random_range(200..=500)), now);
                }
                while !under_way.is_empty() && rng.random_bool(0.4) {
                    let (guess, truth, charge) = under_way.swap_remove(rng.random_range(0..under_way.len()));
                    match guess.checked_sub(truth) {
                        Some(too_much) => it.bucket.give_back(too_much, charge),
                        None => it.owe(truth - guess, now),
                    }
                }
            }
            for (i, (from, ..)) in used.iter().enumerate() {
                let (mut total, mut short) = (0, 0);
                for (to, truth, shortfall) in &used[i..] {
                    (total, short) = (total + truth, short + shortfall);
                    let most = 500 + (to - from + 1);
                    assert!(total <= most + short, "seed {seed}: {total} in {} ms", to - from);
                }
            }
        }
    }

    #[test]
    fn in_the_long_run_what_is_used_is_the_rate_whatever_was_guessed() {
        for (most_guessed, most_used) in [(300, 300), (1000, 100), (100, 1000)] {
            let used = used_with_a_queue(most_guessed, most_used);
            assert!((used / 10_000_000.0 - 1.0).abs() < 0.01, "{used} in 10,000 s at 1,000 a second");
        }
    }

    /// What is used in 10,000 s by a queue that never ends, every answer taking two seconds.
    fn used_with_a_queue(most_guessed: u64, most_used: u64) -> f64 {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut it = Numbered::of_guesses("1000/s", 5000);
        let mut under_way: VecDeque<(u64, u64, ChargeNo, Instant)> = VecDeque::new();
        let (mut now, mut total) = (it.start, 0u64);
        while now < it.at(10_000_000) {
            let (guess, truth) = (rng.random_range(1..most_guessed), rng.random_range(1..most_used));
            loop {
                let opens = it.bucket.open_at(guess, now).max(now);
                if under_way.front().is_none_or(|(.., ends)| *ends > opens) {
                    now = opens + Duration::from_nanos(1);
                    break;
                }
                let (guess, truth, charge, _) = under_way.pop_front().expect("there is one");
                match u64::checked_sub(guess, truth) {
                    Some(too_much) => it.bucket.give_back(too_much, charge),
                    None => it.owe(truth - guess, now),
                }
            }
            it.charges += 1;
            let charge = ChargeNo(it.charges);
            assert!(it.bucket.try_take(guess, charge, it.start, now), "waited for");
            total += truth;
            under_way.push_back((guess, truth, charge, now + Duration::from_secs(2)));
        }
        total as f64
    }
}
