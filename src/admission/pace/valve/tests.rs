use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const GIVE_UP: Duration = Duration::from_secs(30);

/// How long refusals and failures take to come here.
const LATENCY: Duration = Duration::from_millis(50);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A valve in simulated time.
struct World {
    valve: Valve,
    now: Instant,
    sent: u64,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        Self { valve: Valve::new(false, GIVE_UP, now), now, sent: 0 }
    }

    /// A valve that is closed, by a refusal that has just been heard.
    fn closed_for(hint: Duration) -> Self {
        let mut world = Self::new();
        let passage = world.send();
        world.now += LATENCY;
        world.refuse(passage, hint);
        world
    }

    fn is_open(&self) -> bool {
        self.valve.is_open(self.now)
    }

    /// Lets one pass; says of what it is a probe.
    fn pass(&mut self) -> (Passage, Option<Why>) {
        assert!(self.is_open(), "only open valves let anyone pass");
        self.sent += 1;
        let passage = Passage { number: self.sent, sent_at: self.now };
        (passage, self.valve.pass(passage))
    }

    fn send(&mut self) -> Passage {
        self.pass().0
    }

    fn refuse(&mut self, passage: Passage, hint: Duration) {
        self.valve.refused(passage, self.now);
        self.valve.close(passage, hint, Why::Quota, self.now);
    }

    fn fail(&mut self, passage: Passage) {
        self.valve.failed(passage, self.sent, self.now);
    }

    /// Lets time pass until one may pass, and says how long that was.
    fn wait(&mut self) -> Duration {
        let opens_at = self.valve.opens_at().expect("it opens by itself").max(self.now);
        opens_at - std::mem::replace(&mut self.now, opens_at)
    }

    /// Sends so many one after the other, each of which fails at once.
    fn storm(&mut self, failures: u32) {
        for _ in 0..failures {
            let passage = self.send();
            self.now += LATENCY;
            self.fail(passage);
        }
    }

    /// How many pass within this time, if everyone wants to.
    fn passing_within(&mut self, time: Duration) -> u32 {
        let until = self.now + time;
        let mut passed = 0;
        while passed < 10_000 && self.valve.opens_at().is_some_and(|at| at < until) {
            self.wait();
            self.send();
            passed += 1;
        }
        self.now = until;
        passed
    }
}

#[test]
fn a_hint_closes_it_until_then() {
    let mut world = World::closed_for(2 * SECOND);
    assert_eq!((world.is_open(), world.valve.cooldown(world.now)), (false, 2 * SECOND));
    assert_eq!(world.valve.closed_by(world.now), Some(Why::Quota));
    assert_eq!(world.wait(), 2 * SECOND);
    assert!(world.is_open());
    assert_eq!((world.valve.cooldown(world.now), world.valve.closed_by(world.now)), (Duration::ZERO, None));
}

#[test]
fn a_shorter_hint_of_the_same_burst_does_not_open_it_earlier() {
    let mut world = World::new();
    let [first, second, third] = [(); 3].map(|()| world.send());
    world.now += LATENCY;
    world.refuse(first, SECOND);
    world.refuse(second, millis(100));
    assert_eq!(world.valve.cooldown(world.now), SECOND);
    world.refuse(third, 3 * SECOND);
    assert_eq!(world.valve.cooldown(world.now), 3 * SECOND, "a longer one does close it for longer");
}

#[test]
fn after_it_one_probe_passes_and_the_others_wait_until_silence_counts_as_acceptance() {
    let mut world = World::closed_for(SECOND);
    world.wait();
    assert_eq!(world.pass().1, Some(Why::Quota));
    assert!(!world.is_open());
    let quiet = world.wait();
    assert!(quiet > LATENCY && quiet <= 4 * LATENCY, "{quiet:?} of silence, where refusals take {LATENCY:?}");
    assert_eq!(world.pass().1, None, "it is a probe no more");
}

#[test]
fn after_a_probe_that_was_not_refused_there_is_a_ramp() {
    let mut world = World::closed_for(SECOND);
    world.wait();
    world.send();
    world.wait();
    let passed: Vec<u32> = (0..4).map(|_| world.passing_within(2 * LATENCY)).collect();
    assert!(passed[0] <= 8, "{passed:?}: not all at once");
    assert!(passed.windows(2).all(|pair| pair[1] > pair[0]), "{passed:?}: ever more");
    assert!(world.passing_within(10 * SECOND) >= 1000, "and in the end everyone");
}

#[test]
fn a_probe_that_was_heard_to_be_accepted_needs_no_ramp() {
    let mut world = World::closed_for(SECOND);
    world.wait();
    let probe = world.send();
    world.now += millis(5);
    world.valve.accepted(probe, world.now);
    (0..100).for_each(|_| _ = world.pass());
}

#[test]
fn an_answer_to_what_was_sent_before_it_closed_does_not_open_it() {
    let mut world = World::new();
    let [before, refused] = [(); 2].map(|()| world.send());
    world.now += LATENCY;
    world.refuse(refused, SECOND);
    world.valve.accepted(before, world.now);
    assert!(!world.is_open());
    world.wait();
    world.send();
    world.valve.accepted(before, world.now);
    assert!(!world.is_open(), "nor does it say anything of the probe");
}

#[test]
fn a_probe_that_is_refused_closes_it_again_ever_longer() {
    let mut world = World::closed_for(millis(1));
    let mut closures = Vec::new();
    for _ in 0..20 {
        world.wait();
        let probe = world.send();
        world.now += LATENCY;
        world.refuse(probe, millis(1));
        closures.push(world.valve.cooldown(world.now));
    }
    assert!(closures[0] < millis(100), "{closures:?}: the first of them may have been bad luck");
    assert!(closures.windows(2).all(|pair| pair[1] >= pair[0]), "{closures:?}");
    assert!(closures[19] >= SECOND && closures[19] <= 10 * SECOND, "{closures:?}: bounded");
}

#[test]
fn after_an_acceptance_closures_are_short_again() {
    let mut world = World::closed_for(millis(1));
    for accepted in [false, false, false, false, false, false, true] {
        world.wait();
        let probe = world.send();
        world.now += LATENCY;
        if accepted { world.valve.accepted(probe, world.now) } else { world.refuse(probe, millis(1)) }
    }
    let passage = world.send();
    world.now += LATENCY;
    world.refuse(passage, millis(1));
    assert!(world.valve.cooldown(world.now) < millis(50));
}

#[test]
fn a_probe_that_is_abandoned_hands_its_role_on() {
    let mut world = World::closed_for(SECOND);
    world.wait();
    let probe = world.send();
    world.now += millis(1);
    world.valve.abandoned(probe, world.now);
    assert_eq!(world.pass().1, Some(Why::Quota), "the next is the probe");
    assert!(!world.is_open(), "and the only one");
}

#[test]
fn one_that_is_no_probe_may_be_abandoned_without_harm() {
    let mut world = World::new();
    let [early, refused] = [(); 2].map(|()| world.send());
    world.refuse(refused, SECOND);
    world.valve.abandoned(early, world.now);
    assert!(!world.is_open());
    world.wait();
    world.send();
    world.valve.abandoned(early, world.now);
    assert!(!world.is_open(), "the probe is still under way");
}

#[test]
fn a_new_lanes_first_requests_are_sent_one_by_one_and_then_all() {
    let now = Instant::now();
    let mut world = World { valve: Valve::new(true, GIVE_UP, now), now, sent: 0 };
    let passed = world.passing_within(millis(100));
    assert!((2..=20).contains(&passed), "{passed} in the first 100 ms");
    world.passing_within(SECOND);
    assert!(world.passing_within(millis(1)) >= 1000);
}

#[test]
fn five_failures_in_a_row_open_the_breaker() {
    let mut world = World::new();
    world.storm(4);
    assert!(world.is_open());
    world.storm(1);
    assert_eq!((world.is_open(), world.valve.closed_by(world.now)), (false, Some(Why::Breaker)));
}

#[test]
fn five_failures_among_many_that_are_still_under_way_do_not() {
    let mut world = World::new();
    let sent: Vec<Passage> = (0..50).map(|_| world.send()).collect();
    world.now += LATENCY;
    sent[..25].iter().for_each(|passage| world.fail(*passage));
    assert!(world.is_open(), "as many may still be accepted");
    sent[25..].iter().for_each(|passage| world.fail(*passage));
    assert!(!world.is_open());
}

#[test]
fn of_an_open_breaker_one_probe_a_second_passes() {
    let mut world = World::new();
    world.storm(5);
    for _ in 0..20 {
        let waited = world.wait();
        assert!(waited >= SECOND - LATENCY && waited <= SECOND, "{waited:?}");
        let (probe, of) = world.pass();
        assert_eq!((of, world.is_open()), (Some(Why::Breaker), false));
        world.now += LATENCY;
        world.fail(probe);
    }
}

#[test]
fn a_probe_whose_failure_takes_long_is_waited_for() {
    let mut world = World::new();
    for _ in 0..5 {
        let passage = world.send();
        world.now += 5 * SECOND;
        world.fail(passage);
    }
    world.wait();
    let probe = world.send();
    assert_eq!(world.valve.opens_at(), None, "silence means nothing");
    world.valve.accepted(probe, world.now);
    assert!(world.is_open());
}

#[test]
fn an_acceptance_closes_the_breaker() {
    let mut world = World::new();
    world.storm(5);
    world.wait();
    let probe = world.send();
    world.valve.accepted(probe, world.now);
    assert_eq!(world.valve.gives_up_at(), None);
    (0..300).for_each(|_| {
        world.wait();
        _ = world.pass();
    });
    world.storm(4);
    assert!(world.is_open(), "it takes five again");
}

#[test]
fn an_answer_to_what_was_sent_before_the_trouble_does_not() {
    let mut world = World::new();
    let before = world.send();
    world.storm(5);
    world.valve.accepted(before, world.now);
    assert!(!world.is_open() && world.valve.gives_up_at().is_some());
}

#[test]
fn the_failures_of_what_was_under_way_do_not_put_the_probe_off() {
    let mut world = World::new();
    let late: Vec<Passage> = (0..3).map(|_| world.send()).collect();
    world.storm(5);
    let opens_at = world.valve.opens_at();
    world.now += LATENCY;
    late.iter().for_each(|passage| world.fail(*passage));
    assert_eq!(world.valve.opens_at(), opens_at);
}

#[test]
fn after_the_time_of_unbroken_failure_it_gives_up() {
    let mut world = World::new();
    world.storm(1);
    let since = world.now;
    assert_eq!(world.valve.gives_up_at(), None, "one failure is no trouble");
    world.storm(4);
    assert_eq!(world.valve.gives_up_at(), Some(since + GIVE_UP));
    while world.now < since + GIVE_UP {
        world.wait();
        let probe = world.send();
        world.fail(probe);
    }
    assert_eq!(world.valve.gives_up_at(), Some(since + GIVE_UP), "each failure is of the same trouble");
    world.wait();
    let probe = world.send();
    world.valve.accepted(probe, world.now);
    assert_eq!(world.valve.gives_up_at(), None);
}

/// How often the breaker opens in 4000 attempts of which one in eight fails, so many a second; failures are heard at once,
/// acceptances later.
fn openings(seed: u64, rate: u32, acceptances_take: Duration) -> u32 {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut world = World::new();
    let mut under_way: Vec<(Instant, Passage, bool)> = Vec::new();
    let (mut openings, mut was_open) = (0, true);
    while world.sent < 4000 {
        world.now += SECOND / rate;
        under_way.sort_by_key(|(at, ..)| std::cmp::Reverse(*at));
        while let Some((_, passage, fails)) = under_way.pop_if(|(at, ..)| *at <= world.now) {
            if fails { world.fail(passage) } else { world.valve.accepted(passage, world.now) }
        }
        let is_open = world.valve.closed_by(world.now) != Some(Why::Breaker);
        openings += u32::from(was_open && !is_open);
        was_open = is_open;
        if world.is_open() {
            let passage = world.send();
            let fails = rng.random_bool(1.0 / 8.0);
            let after = if fails { LATENCY } else { acceptances_take.mul_f64(rng.random_range(0.5..1.5)) };
            under_way.push((world.now + after, passage, fails));
        }
    }
    openings
}

#[test]
fn one_failure_in_eight_never_opens_it() {
    for seed in 0..4 {
        assert_eq!(openings(seed, 10, LATENCY), 0, "seed {seed}");
    }
}

#[test]
fn nor_where_answers_take_long() {
    for seed in 0..4 {
        assert_eq!(openings(seed, 20, SECOND), 0, "seed {seed}");
    }
}
