//! What the refused of one tenant were told at one limit: when to come back, one after another, so that they do not return as
//! one herd, and so that those who come meanwhile leave them the place that they were promised.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How far apart those who are refused together are told to return. Who comes back all the same, or never, must not push the
/// others' return away without end.
const MAX_SPREAD: Duration = Duration::from_secs(60);

/// Promises remembered; of further ones only the last.
const MAX_REMEMBERED: usize = 1024;

/// The promises that one limit has given to one tenant.
#[derive(Debug, Default)]
pub struct Promises {
    /// When, and how long the limit takes for what was promised a place.
    outstanding: VecDeque<(Instant, Duration)>,
    last: Option<(Instant, Duration)>,
    turns: Turns,
    /// Those whose time has come, who have not come yet; and when the last of them was told to come.
    due: u32,
    due_at: Option<Instant>,
}

/// How much later than told one may come, and be taken for one who was told.
const GRACE: Duration = Duration::from_secs(1);

/// How much passes the limit, all in all, while so much of one tenant's does: what it shares the limit with, as seen of late.
#[derive(Debug, Default)]
struct Turns {
    /// What had passed in all when it had its last turn, or came to wait.
    mark: u64,
    /// Of late; older turns weigh less.
    passed: f64,
    own: f64,
}

/// The newest turn weighs 1 in so many.
const TURN_WEIGHT: f64 = 8.0;

/// Others may come to want more than of late. With this much on top, of those who return when told 99 in 100 are served in
/// time, as long as a queue holds more than a few requests of each (by simulation).
const MARGIN: f64 = 1.25;

impl Promises {
    /// None yet, to a tenant that wants something when so much has passed in all.
    pub fn new(passed: u64) -> Self {
        Self { turns: Turns { mark: passed, ..Turns::default() }, ..Self::default() }
    }

    /// When the next one who is refused should come back, if not before `earliest`: behind the last by as long as the limit
    /// takes for that one. `takes` is how long it takes for this one.
    pub fn promise(&mut self, earliest: Instant, takes: Duration) -> Instant {
        let takes = takes.clamp(Duration::from_millis(1), MAX_SPREAD);
        let behind_the_last = self.last.map(|(at, _)| at + takes);
        let at = behind_the_last.map_or(earliest, |behind| behind.clamp(earliest, earliest + MAX_SPREAD));
        self.last = Some((at, takes));
        if self.outstanding.len() < MAX_REMEMBERED {
            self.outstanding.push_back((at, takes));
        }
        at
    }

    /// How much longer than otherwise a newcomer's wait has to be taken to be, so that whoever was promised the next place
    /// finds it when it comes. One promise after the other becomes void as its time passes: who does not come leaves the
    /// place to the others.
    pub fn reserved(&mut self, now: Instant) -> Option<Duration> {
        while let Some((at, takes)) = self.outstanding.pop_front() {
            if at > now {
                self.outstanding.push_front((at, takes));
                break;
            }
            self.due = self.due.saturating_add(1);
            self.due_at = Some(at);
        }
        // Places are promised at least as far apart as they take, so the first is the one that could be missed.
        self.outstanding.front().map(|(at, takes)| takes.saturating_sub(*at - now))
    }

    /// The tenant begins to wait, when so much has passed in all.
    pub fn begins_to_wait(&mut self, passed: u64) {
        self.turns.mark = passed;
    }

    /// The tenant has had a turn of that size, with which so much has passed in all.
    pub fn has_turn(&mut self, size: u64, passed: u64) {
        let turns = &mut self.turns;
        let between = passed.saturating_sub(turns.mark);
        turns.mark = passed;
        let keep = 1.0 - 1.0 / TURN_WEIGHT;
        turns.passed = turns.passed * keep + between as f64;
        turns.own = turns.own * keep + size as f64;
    }

    /// How much has to be expected to pass in all for each of the tenant's; exactly 1 where it is alone. `None` where it has
    /// had no turn yet.
    pub fn shared_by(&self) -> Option<f64> {
        let Turns { passed, own, .. } = self.turns;
        (own > 0.0).then(|| 1.0 + MARGIN * (passed / own - 1.0).max(0.0))
    }

    /// Whether this may be one who was told to come now. Only as many are as were told.
    pub fn redeem(&mut self, now: Instant) -> bool {
        self.reserved(now);
        if self.due_at.is_none_or(|at| at + GRACE < now) {
            self.due = 0;
        }
        let due = self.due > 0;
        self.due = self.due.saturating_sub(1);
        due
    }

    /// Nobody is expected any more.
    pub fn are_void(&self, now: Instant) -> bool {
        self.last.is_none_or(|(at, _)| at <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(100);

    #[test]
    fn the_refused_come_back_one_after_another_but_not_without_end() {
        let (mut promises, now) = (Promises::default(), Instant::now());
        let told: Vec<Duration> = (0..3).map(|_| promises.promise(now + STEP, STEP) - now).collect();
        assert_eq!(told, [STEP, STEP * 2, STEP * 3]);
        for _ in 0..100_000 {
            promises.promise(now + STEP, STEP);
        }
        assert_eq!(promises.promise(now + STEP, STEP), now + STEP + MAX_SPREAD);
        assert!(promises.outstanding.len() <= MAX_REMEMBERED);
    }

    #[test]
    fn a_place_is_kept_until_its_time_has_passed() {
        let (mut promises, now) = (Promises::default(), Instant::now());
        promises.promise(now + STEP, STEP);
        assert_eq!(promises.reserved(now), Some(Duration::ZERO), "whoever fits now does not take its place");
        assert_eq!(promises.reserved(now + STEP / 4), Some(STEP / 4));
        assert_eq!(promises.reserved(now + STEP), None, "and now it is its turn");
        assert!(promises.are_void(now + STEP));
    }
}
