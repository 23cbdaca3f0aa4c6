//! How many requests a lane may have under way, found by trying.
//!
//! How long an answer takes says nothing about load, since it depends on how long the answer is. So only a refusal tells: of
//! the attempts under way when one was refused, those that were not refused themselves are what the gateway takes. The limit
//! is set to that, once for all refusals of attempts that were begun before the cut, stays there, and after a while one more is
//! tried. It grows in time, not with each answer: spread over as long as a slot is held, so that when the cap is passed, only
//! what is sent until the refusal is heard goes beyond it.

use std::time::Duration;

use tokio::time::Instant;

use crate::admission::slots::Slots;

/// In how many times a slot's hold the limit doubles while it grows.
const DOUBLING: f64 = 0.8;

/// The times in which the limit doubles at the soonest and at the latest: refusals have to be heard before it is far too high, and
/// they come at once, however long answers take.
const DOUBLING_TIMES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];

/// A gateway that has not answered anything for this and a hold has fallen silent.
const SILENT: Duration = Duration::from_secs(1);

/// How many holds to stay at a limit before one more is tried; twice as many each time that is refused. With more under way than
/// so many, that is all that has to pass in a round.
const ROUNDS: [u32; 2] = [2, 64];
const MANY: u32 = 16;

/// However long answers take, a cap that rises is to be noticed.
const LONGEST_STAY: Duration = Duration::from_secs(60);

/// What is left of a limit that is refused again before anything was accepted, once and more often in a row: at first the
/// estimate may have been a little high, then the cap has moved, or it is none.
const BACKOFF: [f64; 2] = [0.95, 0.5];

/// Of a burst of refusals so many are remembered; more say nothing new.
const MOST_REFUSED: usize = 64;

/// So many that are tried beyond the limit and accepted set it growing again.
const ACCEPTED: u32 = 2;

/// An adaptive number of slots.
#[derive(Debug)]
pub struct Adaptive {
    slots: Slots,
    most: u32,
    /// When one more than the limit may be tried while all are taken. `None` before anything was accepted.
    grow_at: Option<Instant>,
    /// When an attempt was answered last.
    answered_at: Option<Instant>,
    growth: Growth,
    /// The last attempt before the last cut: what is refused of these belongs to that cut.
    cut_at: u64,
    /// Those of these that were refused.
    refused: Vec<u64>,
    /// The limit before cuts in a row began, and how many there were.
    before_cuts: u32,
    in_a_row: usize,
    /// The limit after the last cut.
    settled: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Growth {
    Doubling,
    Staying { rounds: u32, accepted: u32 },
}

/// One attempt, as the slots know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The attempt's number in its lane.
    pub number: u64,
    /// How many others were under way.
    pub others: u32,
    /// It was one more than the limit.
    pub grown: bool,
}

impl Adaptive {
    /// `first` slots to begin with, and never more than `most`.
    pub fn new(first: u32, most: u32) -> Self {
        let slots = Slots::new(first.min(most));
        let before_cuts = slots.limit();
        Self {
            slots,
            most: most.max(1),
            grow_at: None,
            answered_at: None,
            growth: Growth::Doubling,
            cut_at: 0,
            refused: Vec::new(),
            before_cuts,
            in_a_row: 0,
            settled: 0,
        }
    }

    /// The same where so many requests are under way already. So many or more to begin with: nothing has refused them.
    pub fn begun(first: u32, most: u32, under_way: u32) -> Self {
        let mut adaptive = Self::new(first.max(under_way), most);
        adaptive.slots.set_in_use(under_way);
        adaptive
    }

    /// Changes how many there may ever be. Of those that are taken none is taken back.
    pub fn set_most(&mut self, most: u32) {
        self.most = most.max(1);
        self.before_cuts = self.before_cuts.min(self.most);
        self.slots.set_limit(self.slots.limit().min(self.most));
    }

    /// The slots as they are now.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The most that there may ever be.
    pub fn most(&self) -> u32 {
        self.most
    }

    /// Whether it grows, as no refusal has stopped it of late.
    pub fn is_growing(&self) -> bool {
        self.growth == Growth::Doubling
    }

    /// When one may be taken; `None` where one has to be given back first.
    pub fn opens_at(&self, now: Instant) -> Option<Instant> {
        if self.slots.has_room() {
            return Some(now);
        }
        let may_grow = self.slots.in_use() == self.slots.limit() && self.slots.limit() < self.most;
        // Of a gateway that has fallen silent nobody knows how many it takes.
        let is_at_work = self.answered_at.is_some_and(|at| now - at <= SILENT + self.hold());
        self.grow_at.filter(|_| may_grow && is_at_work)
    }

    /// Takes one, which was seen to be possible.
    pub fn take(&mut self, number: u64, now: Instant) -> Taken {
        let others = self.slots.in_use();
        let grown = others == self.slots.limit() && others < self.most;
        if grown {
            self.slots.set_limit(self.slots.limit() + 1);
            self.grow_at = match self.growth {
                Growth::Doubling => self.grow_at.map(|at| super::step_from(at, self.step(), now)),
                // Not before it is known what becomes of this one.
                Growth::Staying { rounds, .. } => Some(now + self.stay(rounds)),
            };
        }
        self.slots.take();
        Taken { number, others, grown }
    }

    /// Gives one back, held for so long where it was put to use.
    pub fn give_back(&mut self, held: Option<Duration>) {
        let Some(held) = held else { return self.slots.give_back_unused() };
        self.slots.give_back(held);
    }

    /// An attempt was answered.
    pub fn answered(&mut self, now: Instant) {
        self.answered_at = Some(now);
        self.grow_at.get_or_insert(now);
    }

    /// An attempt was accepted: answered, or not refused in all the time that refusals take.
    pub fn accepted(&mut self, taken: Taken, now: Instant) {
        let Growth::Staying { rounds, accepted } = self.growth else { return };
        if !taken.grown || taken.number <= self.cut_at {
            return;
        }
        self.growth = match accepted + 1 {
            ACCEPTED => Growth::Doubling,
            accepted => Growth::Staying { rounds, accepted },
        };
        // Not at once: were it a rate, the next would be refused for coming so soon.
        self.grow_at = Some(now + self.stay(1) / 2);
    }

    /// An attempt was refused, and a cap seems to be why. `proven` says that others, begun after the last cut, were accepted.
    pub fn refused(&mut self, taken: Taken, last: u64, proven: bool, now: Instant) {
        if taken.number <= self.cut_at {
            // Of the same burst as the one that cut: the estimate gets better.
            let before = self.refused.iter().filter(|number| **number < taken.number).count();
            let accepted = taken.others.saturating_sub(u32::try_from(before).unwrap_or(u32::MAX));
            if self.refused.len() < MOST_REFUSED {
                self.refused.push(taken.number);
            }
            self.slots.set_limit(self.slots.limit().min(accepted.max(1)));
            return;
        }
        let before = self.slots.limit();
        let again = self.cut_at > 0 && !proven && self.growth != Growth::Doubling;
        let mut limit = taken.others.min(before);
        if again {
            let part = BACKOFF[self.in_a_row.min(BACKOFF.len() - 1)];
            limit = limit.min((f64::from(before) * part).ceil() as u32);
            self.in_a_row += 1;
        } else {
            (self.before_cuts, self.in_a_row) = (before, 0);
        }
        let rounds = match self.growth {
            // What was tried was a little more than the last time, and in vain.
            Growth::Staying { rounds, .. } if !again && limit >= self.settled && limit <= self.settled + 1 => {
                (rounds * 2).min(ROUNDS[1])
            }
            Growth::Staying { rounds, .. } if !again => rounds,
            Growth::Staying { .. } | Growth::Doubling => ROUNDS[0],
        };
        self.settled = limit;
        self.cut_at = last;
        self.refused.clear();
        self.refused.push(taken.number);
        self.growth = Growth::Staying { rounds, accepted: 0 };
        self.slots.set_limit(limit.max(1));
        self.grow_at = Some(now + self.stay(rounds));
    }

    /// It was not a cap after all.
    pub fn restore(&mut self, now: Instant) {
        self.slots.set_limit(self.slots.limit().max(self.before_cuts));
        self.growth = Growth::Doubling;
        self.grow_at = self.grow_at.map(|at| at.max(now));
    }

    /// Where it was found to be the last time.
    pub fn settled(&self) -> u32 {
        self.settled
    }

    /// The last attempt before the last cut.
    pub fn cut_at(&self) -> u64 {
        self.cut_at
    }

    /// How long to stay: until so many times as many requests have passed as are under way, or as are enough where many are.
    fn stay(&self, rounds: u32) -> Duration {
        (self.slots.turnover() * self.slots.limit().min(MANY) * rounds).min(LONGEST_STAY)
    }

    fn step(&self) -> Duration {
        let [soonest, latest] = DOUBLING_TIMES;
        let doubling = self.hold().mul_f64(DOUBLING).clamp(soonest, latest);
        doubling.mul_f64(std::f64::consts::LN_2) / self.slots.limit()
    }

    /// How long a slot is held.
    pub fn hold(&self) -> Duration {
        self.slots.turnover() * self.slots.limit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Slots in simulated time; whoever holds one holds it for a second.
    struct World {
        adaptive: Adaptive,
        now: Instant,
        sent: u64,
        under_way: Vec<(Taken, Instant)>,
    }

    impl World {
        fn new(first: u32, most: u32) -> Self {
            Self { adaptive: Adaptive::new(first, most), now: Instant::now(), sent: 0, under_way: Vec::new() }
        }

        fn limit(&self) -> u32 {
            self.adaptive.slots().limit()
        }

        fn is_open(&self) -> bool {
            self.adaptive.opens_at(self.now).is_some_and(|at| at <= self.now)
        }

        fn take(&mut self) -> Taken {
            self.sent += 1;
            let taken = self.adaptive.take(self.sent, self.now);
            self.under_way.push((taken, self.now));
            taken
        }

        /// Takes as many as there are now.
        fn fill(&mut self) -> Vec<Taken> {
            let mut taken = Vec::new();
            while self.is_open() && taken.len() < 2000 {
                taken.push(self.take());
            }
            taken
        }

        /// As many are under way as there are slots at first, and one was answered before.
        fn full(slots: u32) -> (Self, Vec<Taken>) {
            let mut world = Self::new(slots, 1000);
            let taken = (0..slots).map(|_| world.take()).collect();
            world.adaptive.answered(world.now);
            (world, taken)
        }

        /// So many milliseconds pass, in which up to `wanted` are under way and all are accepted.
        fn work(&mut self, millis: u64, wanted: usize) {
            for _ in 0..millis / 10 {
                self.now += Duration::from_millis(10);
                while let Some((taken, since)) = self.under_way.first().copied().filter(|it| self.now - it.1 >= SECOND)
                {
                    self.under_way.remove(0);
                    self.adaptive.accepted(taken, self.now);
                    self.adaptive.answered(self.now);
                    self.adaptive.give_back(Some(self.now - since));
                }
                while self.under_way.len() < wanted && self.is_open() {
                    self.take();
                }
            }
        }

        fn refuse(&mut self, taken: Taken) {
            self.under_way.retain(|(other, _)| *other != taken);
            self.adaptive.refused(taken, self.sent, true, self.now);
            self.adaptive.give_back(None);
        }
    }

    #[test]
    fn nothing_grows_before_anything_was_answered() {
        let mut world = World::new(10, 1000);
        assert_eq!(world.fill().len(), 10);
        assert_eq!(world.adaptive.opens_at(world.now), None);
        world.now += 60 * SECOND;
        assert_eq!((world.fill().len(), world.limit()), (0, 10));
    }

    #[test]
    fn they_grow_in_time_while_all_are_taken() {
        let mut world = World::new(10, 1000);
        let mut limits = vec![10];
        for _ in 0..5 {
            world.work(1000, usize::MAX);
            limits.push(world.limit());
        }
        assert!(limits[2..].windows(2).all(|pair| pair[1] > pair[0] && pair[1] <= 4 * pair[0]), "{limits:?}");
        world.work(20_000, usize::MAX);
        assert_eq!(world.limit(), 1000, "as far as they may");
    }

    #[test]
    fn they_do_not_grow_while_some_are_free() {
        let mut world = World::new(10, 1000);
        world.work(60_000, 9);
        assert_eq!(world.limit(), 10);
    }

    #[test]
    fn a_fixed_number_does_not_grow() {
        let mut world = World::new(4, 4);
        world.work(10_000, usize::MAX);
        assert_eq!(world.limit(), 4);
    }

    #[test]
    fn a_burst_of_refusals_cuts_once_to_what_was_accepted() {
        let (mut world, taken) = World::full(30);
        taken[20..].iter().for_each(|taken| world.refuse(*taken));
        assert!((19..=20).contains(&world.limit()), "of thirty ten were refused: {}", world.limit());
    }

    #[test]
    fn refusals_heard_in_any_order_come_to_the_same() {
        let (mut world, taken) = World::full(30);
        (20..30).rev().for_each(|at| world.refuse(taken[at]));
        assert!((19..=20).contains(&world.limit()), "of thirty ten were refused: {}", world.limit());
    }

    #[test]
    fn there_can_be_fewer_than_are_taken() {
        let (mut world, taken) = World::full(20);
        world.refuse(taken[5]);
        assert!(world.limit() <= 6);
        assert_eq!((world.adaptive.slots().in_use(), world.is_open()), (19, false));
        assert_eq!(world.adaptive.opens_at(world.now), None, "one has to be given back first");
        (0..13).for_each(|_| world.adaptive.give_back(Some(SECOND)));
        assert!(!world.is_open());
        (0..6).for_each(|_| world.adaptive.give_back(Some(SECOND)));
        assert!(world.is_open());
    }

    #[test]
    fn one_slot_is_always_left() {
        let mut world = World::new(3, 100);
        world.adaptive.answered(world.now);
        for _ in 0..20 {
            let taken = world.fill();
            taken.iter().for_each(|taken| world.refuse(*taken));
            world.now += 60 * SECOND;
        }
        assert!(world.limit() >= 1 && world.is_open());
    }

    #[test]
    fn after_a_while_at_a_cap_one_more_is_tried_and_where_that_is_refused_later_again() {
        let (mut world, taken) = World::full(10);
        world.refuse(taken[9]);
        let cap = world.limit() as usize;
        let mut tried = Vec::new();
        let mut since = world.now;
        while tried.len() < 4 {
            world.work(10, cap + 1);
            if world.under_way.len() > cap {
                tried.push(world.now - since);
                since = world.now;
                let (beyond, _) = *world.under_way.last().expect("it is under way");
                world.refuse(beyond);
            }
            assert!(world.under_way.len() <= cap && world.now - since < 600 * SECOND);
        }
        assert!(tried[0] >= SECOND, "{tried:?}: not at once");
        assert!(tried.is_sorted() && tried[3] >= 3 * tried[0], "{tried:?}: ever more seldom");
    }

    #[test]
    fn where_more_is_accepted_again_it_grows_on() {
        let (mut world, taken) = World::full(10);
        world.refuse(taken[9]);
        assert!(!world.adaptive.is_growing());
        world.work(60_000, usize::MAX);
        assert!(world.adaptive.is_growing() && world.limit() > 50, "{}", world.limit());
    }

    #[test]
    fn a_gateway_that_has_fallen_silent_is_not_given_more() {
        let mut world = World::new(10, 1000);
        world.work(3000, usize::MAX);
        let before = world.limit();
        assert!(before > 10);
        // Nothing is answered any more.
        world.now += 60 * SECOND;
        assert_eq!((world.fill().len(), world.limit(), world.adaptive.opens_at(world.now)), (0, before, None));
    }

    #[test]
    fn what_was_no_cap_is_given_back() {
        let mut world = World::new(10, 1000);
        world.work(5000, usize::MAX);
        let before = world.limit();
        let (refused, _) = world.under_way[3];
        world.refuse(refused);
        assert!(world.limit() < before);
        world.adaptive.restore(world.now);
        assert_eq!((world.limit(), world.adaptive.is_growing()), (before, true));
    }
}
