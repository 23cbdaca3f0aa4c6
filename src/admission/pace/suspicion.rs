//! What a refusal means: too many at once, or too many a minute.

use std::time::Duration;

use tokio::time::Instant;

use super::adaptive::Taken;

/// Refusals in a row that speak against a cap, until it is taken for a rate.
const AGAINST_CAP: u32 = 3;

/// Refusals in a row that speak for a cap, until a rate is taken for one.
const AGAINST_RATE: u32 = 3;

/// Refusals so many requests apart have nothing to do with each other.
const APART: u32 = 30;

/// A refusal at fewer than this part less than were accepted at once is within what is accepted.
const MARGIN: f64 = 0.125;

/// More refusals within what was found to be a cap, not too far apart, and it is none: it would be found to be lower once or twice.
const INSIDE: f64 = 1.0;
const LONG_APART: u32 = 300;

/// The most that were under way of late is remembered for so long, and half as long at least.
const OF_LATE: Duration = Duration::from_secs(20);

/// A series of refusals is over when none has come for so long.
const SERIES: Duration = Duration::from_secs(10);

/// What a refusal is taken to mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The same as the one before: its attempt was begun before that was known.
    Known,
    /// Nothing yet: one more will tell.
    Unclear,
    /// A quota, of which the gateway has said when it is back.
    Quota,
    /// Too many at once. `proven` says that others, begun after the last cut, were accepted.
    Cap { proven: bool },
    /// Too many a minute; `closures` counts how often in a row nothing at all has passed.
    Rate { closures: u32 },
}

/// What else is known when an attempt is refused.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// How many have passed, and were not refused, so far.
    pub passed: u64,
    /// How many may be under way now, how many are known to be accepted at once, and how many were found to be the most.
    pub limit: u32,
    pub known: u32,
    pub settled: u32,
    /// In all this time a refusal would have come.
    pub quiet: Duration,
    /// The part of what is under way that is on the network: so much of the number at a refusal is chance.
    pub in_transit: f64,
}

/// What refusals have spoken for so far.
#[derive(Debug, Default)]
pub struct Suspicion {
    rate: bool,
    /// In a row, against what it is taken for.
    against: u32,
    /// Refusals within what was found to be the cap, which then was lowered.
    inside: u32,
    /// The last attempt before the last refusal that was judged.
    judged: u64,
    /// The first attempt after that.
    first: Option<(u64, Instant)>,
    /// One that was begun after that was accepted.
    proven: bool,
    /// Attempts since, the most others under way at one of them but the latest, and the latest's.
    passed: u32,
    most_others: u32,
    latest_others: u32,
    high: High,
    /// How many were under way at the last refusal that is taken for a cap.
    refused_at: u32,
    closures: u32,
    /// When the first refusal in a row came, how many had passed by then, and when the last came.
    series: Option<(Instant, u64, Instant)>,
}

impl Suspicion {
    /// Whether refusals are taken to mean a rate.
    pub fn is_rate(&self) -> bool {
        self.rate
    }

    /// When the first refusal in a row came, and how many had passed by then.
    pub fn series(&self) -> Option<(Instant, u64)> {
        self.series.map(|(since, passed, _)| (since, passed))
    }

    /// An attempt has begun.
    pub fn passed(&mut self, taken: Taken, now: Instant) {
        self.first.get_or_insert((taken.number, now));
        self.passed += 1;
        self.most_others = self.most_others.max(self.latest_others);
        self.latest_others = taken.others;
    }

    /// An attempt has not been refused in all the time that refusals take. `true` where that is no cap: as many under way were
    /// refused before.
    pub fn not_refused(&mut self, taken: Taken, last: u64, in_transit: f64) -> bool {
        if self.rate || taken.number <= self.judged || self.refused_at == 0 {
            return false;
        }
        self.proven = true;
        if f64::from(taken.others) + 0.5 < f64::from(self.refused_at) * (1.0 + 2.0 * in_transit) {
            return false;
        }
        self.against += 1;
        self.refused_at = 0;
        if self.against < AGAINST_CAP {
            return false;
        }
        (self.rate, self.against, self.inside) = (true, 0, 0);
        self.start_anew(last);
        true
    }

    /// An attempt was accepted.
    pub fn accepted(&mut self, taken: Taken, now: Instant) {
        self.high.note(taken.others, now);
        self.proven |= taken.number > self.judged;
    }

    /// An attempt was refused, the `last` being the lane's last.
    pub fn refused(&mut self, taken: Taken, last: u64, seen: Seen, now: Instant) -> Verdict {
        let Seen { passed, quiet, .. } = seen;
        self.note_series(passed, now);
        if taken.number <= self.judged {
            return Verdict::Known;
        }
        let unheard = self.first.is_some_and(|(number, at)| number < taken.number && now - at > quiet);
        let proven = self.proven || unheard;
        let nothing_passes = taken.others == 0 && self.passed <= 1;
        let verdict = match self.rate {
            true => self.judge_rate(taken, nothing_passes),
            false => self.judge_cap(taken, proven, seen, now),
        };
        self.start_anew(last);
        verdict
    }

    /// As [`Suspicion::refused`], where the gateway has said when to come back: that decides, unless it is always the same number
    /// under way that is refused.
    pub fn refused_with_hint(&mut self, taken: Taken, last: u64) -> Verdict {
        if taken.number <= self.judged {
            return Verdict::Quota;
        }
        let cap = self.speaks_for_cap(taken);
        self.start_anew(last);
        if cap { Verdict::Cap { proven: false } } else { Verdict::Quota }
    }

    /// A cap never refuses what is within it, unless it has moved, and then it refuses everything for a while.
    fn judge_cap(&mut self, taken: Taken, proven: bool, seen: Seen, now: Instant) -> Verdict {
        if self.passed >= APART {
            self.against = 0;
        }
        let high = f64::from(self.high.of_late(now).max(seen.known));
        let within = f64::from(taken.others) + 1.0 < high * (1.0 - MARGIN - seen.in_transit);
        let against = proven && within;
        self.against += u32::from(against);
        self.inside = if self.passed >= LONG_APART { 0 } else { self.inside };
        self.inside += u32::from(proven && taken.others < seen.settled);
        if f64::from(self.inside) > INSIDE + 2.0 * seen.in_transit * f64::from(seen.settled) {
            self.against = AGAINST_CAP;
        }
        if taken.others == 0 || self.against >= AGAINST_CAP {
            (self.rate, self.against, self.inside) = (true, 0, 0);
            self.closures = u32::from(taken.others == 0);
            return Verdict::Rate { closures: self.closures };
        }
        let by_chance = self.passed >= APART && taken.others + 1 < seen.limit;
        let unclear = proven && (within || by_chance);
        self.refused_at = if unclear { 0 } else { taken.others };
        if unclear { Verdict::Unclear } else { Verdict::Cap { proven } }
    }

    fn judge_rate(&mut self, taken: Taken, nothing_passes: bool) -> Verdict {
        if self.speaks_for_cap(taken) {
            self.rate = false;
            return Verdict::Cap { proven: false };
        }
        self.closures = if nothing_passes { self.closures + 1 } else { 0 };
        Verdict::Rate { closures: self.closures }
    }

    /// Under a rate others come and go as they like; under a cap a refusal comes only at a number that was never accepted.
    fn speaks_for_cap(&mut self, taken: Taken) -> bool {
        let never_accepted = self.passed > taken.others && taken.others > self.most_others;
        self.against = if never_accepted { self.against + 1 } else { 0 };
        if self.against < AGAINST_RATE {
            return false;
        }
        self.against = 0;
        true
    }

    fn start_anew(&mut self, last: u64) {
        self.judged = last;
        self.first = None;
        self.proven = false;
        (self.passed, self.most_others, self.latest_others) = (0, 0, 0);
    }

    fn note_series(&mut self, passed: u64, now: Instant) {
        self.series = match self.series {
            Some((since, before, latest)) if now - latest < SERIES => Some((since, before, now)),
            _ => Some((now, passed, now)),
        };
    }
}

/// The most that were under way of late.
#[derive(Debug, Default)]
struct High {
    /// Of this span of time and of the one before.
    now: u32,
    before: u32,
    since: Option<Instant>,
}

impl High {
    fn note(&mut self, others: u32, now: Instant) {
        let since = *self.since.get_or_insert(now);
        if now - since >= OF_LATE / 2 {
            self.before = if now - since >= OF_LATE { 0 } else { self.now };
            (self.now, self.since) = (0, Some(now));
        }
        self.now = self.now.max(others);
    }

    fn of_late(&self, now: Instant) -> u32 {
        let old = self.since.is_none_or(|since| now - since >= OF_LATE);
        if old { self.now } else { self.now.max(self.before) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN: Seen =
        Seen { passed: 0, limit: 0, known: 0, settled: 0, quiet: Duration::from_millis(60), in_transit: 0.0 };

    /// A suspicion in simulated time; attempts come ten milliseconds apart.
    struct World {
        suspicion: Suspicion,
        now: Instant,
        sent: u64,
    }

    impl World {
        fn new() -> Self {
            Self { suspicion: Suspicion::default(), now: Instant::now(), sent: 0 }
        }

        /// An attempt begins while so many others are under way.
        fn send(&mut self, others: u32) -> Taken {
            self.now += Duration::from_millis(10);
            self.sent += 1;
            let taken = Taken { number: self.sent, others, grown: false };
            self.suspicion.passed(taken, self.now);
            taken
        }

        /// One is sent and accepted; `true` where that shows that it is no cap.
        fn accept(&mut self, others: u32) -> bool {
            let taken = self.send(others);
            let no_cap = self.suspicion.not_refused(taken, self.sent, 0.0);
            self.suspicion.accepted(taken, self.now);
            no_cap
        }

        fn refuse(&mut self, others: u32) -> Verdict {
            let taken = self.send(others);
            self.suspicion.refused(taken, self.sent, SEEN, self.now)
        }
    }

    fn is_cap(verdict: Verdict) -> bool {
        matches!(verdict, Verdict::Cap { .. })
    }

    fn is_rate(verdict: Verdict) -> bool {
        matches!(verdict, Verdict::Rate { .. })
    }

    #[test]
    fn a_refusal_at_more_than_was_ever_accepted_is_a_cap() {
        let mut world = World::new();
        for _ in 0..20 {
            (0..10).for_each(|others| _ = world.accept(others));
            assert!(is_cap(world.refuse(10)));
        }
        assert!(!world.suspicion.is_rate());
    }

    #[test]
    fn others_of_the_same_burst_are_known() {
        let mut world = World::new();
        (0..10).for_each(|others| _ = world.accept(others));
        let burst: Vec<Taken> = (10..15).map(|others| world.send(others)).collect();
        let verdicts: Vec<Verdict> =
            burst.iter().map(|taken| world.suspicion.refused(*taken, world.sent, SEEN, world.now)).collect();
        assert!(is_cap(verdicts[0]), "{verdicts:?}");
        assert!(verdicts[1..].iter().all(|verdict| *verdict == Verdict::Known), "{verdicts:?}");
    }

    #[test]
    fn a_refusal_of_the_only_one_is_no_cap() {
        assert!(is_rate(World::new().refuse(0)));
    }

    #[test]
    fn the_only_one_refused_again_and_again_counts_closures() {
        let mut world = World::new();
        let closures: Vec<Verdict> = (0..4).map(|_| world.refuse(0)).collect();
        assert_eq!(closures, [1, 2, 3, 4].map(|closures| Verdict::Rate { closures }));
        world.accept(0);
        assert_eq!(world.refuse(0), Verdict::Rate { closures: 0 });
    }

    #[test]
    fn refusals_well_within_what_was_accepted_are_a_rate() {
        let mut world = World::new();
        let mut verdicts = Vec::new();
        while !world.suspicion.is_rate() {
            (0..20).for_each(|others| _ = world.accept(others));
            verdicts.push(world.refuse(5));
            assert!(verdicts.len() <= 5, "{verdicts:?}");
        }
        assert!(verdicts.len() >= 2, "one may be by chance");
        assert!(is_rate(verdicts[verdicts.len() - 1]), "{verdicts:?}");
    }

    #[test]
    fn single_refusals_far_apart_have_nothing_to_do_with_each_other() {
        let mut world = World::new();
        for _ in 0..20 {
            (0..200).for_each(|at| _ = world.accept(at % 20));
            let verdict = world.refuse(5);
            assert!(!is_rate(verdict), "{verdict:?}");
        }
    }

    #[test]
    fn what_was_taken_for_a_cap_is_none_where_as_many_are_accepted() {
        let mut world = World::new();
        let mut rounds = 0;
        while !world.suspicion.is_rate() {
            (0..10).for_each(|others| _ = world.accept(others));
            // Refused at ten, and soon after it ten and more are accepted.
            world.refuse(10);
            (10..14).for_each(|others| _ = world.accept(others));
            rounds += 1;
            assert!(rounds <= 5);
        }
        assert!(rounds >= 2, "a cap may be one higher than it seemed");
    }

    #[test]
    fn what_was_taken_for_a_rate_is_a_cap_where_only_a_number_never_accepted_is_refused() {
        let mut world = World::new();
        world.refuse(0);
        assert!(world.suspicion.is_rate());
        let mut rounds = 0;
        while world.suspicion.is_rate() {
            (0..8).chain(4..8).for_each(|others| _ = world.accept(others));
            world.refuse(8);
            rounds += 1;
            assert!(rounds <= 6);
        }
        assert!(rounds >= 2, "a rate may look like that by chance");
    }

    #[test]
    fn a_hint_decides_unless_it_is_always_the_same_number_that_is_refused() {
        let refuse = |world: &mut World, others| {
            let taken = world.send(others);
            world.suspicion.refused_with_hint(taken, world.sent)
        };
        let mut world = World::new();
        for round in 0..30 {
            (0..10).for_each(|others| _ = world.accept(others));
            assert_eq!(refuse(&mut world, round % 7), Verdict::Quota);
        }
        let mut world = World::new();
        let verdicts: Vec<Verdict> = (0..6)
            .map(|_| {
                (0..10).for_each(|others| _ = world.accept(others));
                refuse(&mut world, 10)
            })
            .collect();
        assert_eq!(verdicts[0], Verdict::Quota);
        assert!(verdicts.iter().any(|verdict| is_cap(*verdict)), "{verdicts:?}");
    }
}
