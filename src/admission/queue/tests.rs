use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::flows::MAX_LANES;
use super::*;
use crate::admission::bucket::Bucket;
use crate::admission::pace::Signal;
use crate::admission::slots::Slots;
use crate::config::Rate;
use crate::models::Models;

pub(super) const MINUTE: Duration = Duration::from_secs(60);

pub(super) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A queue in simulated time; requests are numbered in the order of their arrival.
pub(super) struct World {
    pub(super) queue: Queue<u64>,
    /// Who asks from now on, and what its requests cost.
    pub(super) tenant: Tenant,
    pub(super) weight: Weight,
    pub(super) tokens: u64,
    pub(super) models: Models,
    pub(super) start: Instant,
    pub(super) now: Instant,
    pub(super) arrivals: u64,
    pub(super) tickets: BTreeMap<u64, Ticket>,
    /// What each request still holds.
    pub(super) grants: BTreeMap<u64, Grant>,
    /// Who was let through, and when, in milliseconds.
    pub(super) admitted: Vec<(u64, u64)>,
    pub(super) refused: BTreeMap<u64, Refusal>,
}

impl World {
    pub(super) fn new(requests: Option<(&str, u32)>, slots: Option<u32>) -> Self {
        let start = Instant::now();
        let bucket = requests.map(|(rate, burst)| Measure::Requests(self::bucket(rate, burst, start)));
        let global = bucket.into_iter().chain(slots.map(|slots| Measure::Concurrency(Slots::new(slots))));
        Self::of(global.collect(), start)
    }

    pub(super) fn of(global: Vec<Measure>, start: Instant) -> Self {
        let lane = LaneRules { slots: None, give_up: MINUTE };
        let rules = Rules { max_waiting: 100_000, lane, mode: Mode::Enforce };
        Self {
            queue: Queue::new(rules, global),
            tenant: Tenant::Shared,
            weight: Weight::ONE,
            tokens: 0,
            models: Models::new(["a", "b", "c"]),
            start,
            now: start,
            arrivals: 0,
            tickets: BTreeMap::new(),
            grants: BTreeMap::new(),
            admitted: Vec::new(),
            refused: BTreeMap::new(),
        }
    }

    pub(super) fn with_model(mut self, name: &str, requests: Option<(&str, u32)>, slots: Option<u32>) -> Self {
        let bucket = requests.map(|(rate, burst)| Measure::Requests(bucket(rate, burst, self.start)));
        let measures = bucket.into_iter().chain(slots.map(|slots| Measure::Concurrency(Slots::new(slots)))).collect();
        self.queue.limit_model(self.models.find(name), &name.into(), Mode::Enforce, measures);
        self
    }

    pub(super) fn with_tokens(mut self, name: &str, tokens: (&str, u32)) -> Self {
        let measures = vec![Measure::Tokens(bucket(tokens.0, tokens.1, self.start))];
        self.queue.limit_model(self.models.find(name), &name.into(), Mode::Enforce, measures);
        self
    }

    /// Before a limit of tokens for everyone.
    pub(super) fn before_tokens(rate: &str, burst: u32) -> Self {
        let start = Instant::now();
        Self::of(vec![Measure::Tokens(bucket(rate, burst, start))], start)
    }

    /// From now on this tenant asks, for requests that cost so much.
    pub(super) fn asks(&mut self, tenant: u64, tokens: u64) -> &mut Self {
        (self.tenant, self.tokens) = (Tenant::Key(tenant), tokens);
        self
    }

    pub(super) fn arrive(&mut self, model: &str) -> u64 {
        self.arrive_for(model, MINUTE)
    }

    pub(super) fn arrive_for(&mut self, model: &str, max_wait: Duration) -> u64 {
        self.arrivals += 1;
        self.ask(self.arrivals, model, max_wait, false);
        self.arrivals
    }

    pub(super) fn ask(&mut self, request: u64, model: &str, max_wait: Duration, again: bool) {
        let ask = Ask {
            tenant: self.tenant,
            weight: self.weight,
            lane: Lane { credential: 1, model: self.models.find(model) },
            rank: Rank(request),
            cost: Cost { prompt: self.tokens, output: 0 },
            max_wait,
            until: self.now + max_wait,
            again,
        };
        match self.queue.offer(&ask, || model.into(), self.now) {
            Offer::Admitted(grant) => self.admit(request, grant),
            Offer::Refused(refusal) => drop(self.refused.insert(request, refusal)),
            Offer::MustWait(opening) => {
                let (ticket, displaced) = self.queue.enqueue(&opening, &ask, request, self.now);
                self.tickets.insert(request, ticket);
                if let Some((other, refusal)) = displaced {
                    self.tickets.remove(&other);
                    self.refused.insert(other, refusal);
                }
            }
        }
        self.pump();
    }

    pub(super) fn admit(&mut self, request: u64, grant: Grant) {
        self.tickets.remove(&request);
        self.admitted.push((request, (self.now - self.start).as_millis() as u64));
        assert!(self.grants.insert(request, grant).is_none(), "nobody is let through twice at once");
    }

    pub(super) fn pump(&mut self) {
        let mut granted = Vec::new();
        self.queue.pump(self.now, |request, grant| granted.push((request, grant)));
        for (request, grant) in granted {
            self.admit(request, grant);
        }
        for (request, refusal) in self.queue.turned_away() {
            assert!(self.tickets.remove(&request).is_some(), "only who waits is turned away");
            self.refused.insert(request, refusal);
        }
        assert!(self.queue.next_timer().is_none_or(|next| next > self.now), "what is due has been done");
    }

    pub(super) fn finish(&mut self, request: u64) {
        let tokens = self.grants[&request].cost().tokens();
        self.settle(request, Used::Tokens(tokens));
    }

    pub(super) fn settle(&mut self, request: u64, used: Used) {
        let grant = self.grants.remove(&request).expect("only what was let through can finish");
        self.queue.release(&grant, used, self.now);
        self.pump();
    }

    pub(super) fn leave(&mut self, request: u64) {
        let ticket = self.tickets.remove(&request).expect("only a waiter can leave");
        assert!(self.queue.leave(ticket, self.now));
        self.pump();
    }

    /// Lets time pass, stopping at every timer on the way, as the timekeeper does.
    pub(super) fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(next) = self.queue.next_timer().filter(|next| *next <= until) {
            self.now = next;
            self.pump();
        }
        self.now = until;
        self.pump();
    }

    pub(super) fn order(&self) -> Vec<u64> {
        self.admitted.iter().map(|(request, _)| *request).collect()
    }
}

pub(super) fn bucket(rate: &str, burst: u32, now: Instant) -> Bucket {
    Bucket::new(Rate::parse(rate).expect("a rate").with_burst(burst), now)
}

#[test]
fn without_a_limit_everyone_passes() {
    let mut world = World::new(None, None);
    for _ in 0..1000 {
        world.arrive("a");
    }
    assert_eq!(world.admitted.len(), 1000);
}

#[test]
fn a_burst_waits_and_is_let_through_as_the_quota_returns() {
    let mut world = World::new(Some(("10/s", 2)), None);
    for _ in 0..5 {
        world.arrive("a");
    }
    world.pass(MINUTE);
    assert_eq!(world.admitted, [(1, 0), (2, 0), (3, 100), (4, 200), (5, 300)]);
    assert_eq!(world.queue.next_timer(), None, "with nobody waiting there is nothing to wake up for");
}

#[test]
fn slots_go_to_whoever_came_first() {
    let mut world = World::new(None, Some(1));
    for _ in 0..4 {
        world.arrive("a");
    }
    for request in 1..=4 {
        world.finish(request);
    }
    assert_eq!(world.order(), [1, 2, 3, 4]);
}

#[test]
fn one_model_does_not_hold_another_up() {
    let mut world = World::new(None, Some(10)).with_model("a", Some(("1/s", 1)), None);
    for _ in 0..5 {
        world.arrive("a");
    }
    let other = world.arrive("b");
    assert_eq!(world.order(), [1, other]);
}

#[test]
fn at_a_shared_limit_the_one_who_came_first_goes_first() {
    let mut world = World::new(None, Some(1)).with_model("a", None, Some(5)).with_model("b", None, Some(5));
    for model in ["a", "b", "a", "c", "b"] {
        world.arrive(model);
    }
    for request in 1..=5 {
        world.finish(request);
    }
    assert_eq!(world.order(), [1, 2, 3, 4, 5]);
}

#[test]
fn a_retry_keeps_its_place_and_passes_a_full_queue() {
    let mut world = World::new(None, Some(1));
    world.queue.rules.max_waiting = 2;
    for _ in 0..3 {
        world.arrive("a");
    }
    let late = world.arrive("a");
    assert_eq!(world.refused[&late].cause, Cause::QueueFull);
    world.finish(1);
    world.ask(1, "a", MINUTE, true);
    world.finish(2);
    assert_eq!(world.order(), [1, 2, 1], "the first is ahead of the third, which came later");
}

#[test]
fn who_cannot_be_served_in_time_is_refused_at_once_and_told_exactly_when_to_return() {
    let mut world = World::new(Some(("10/s", 1)), None);
    for _ in 0..11 {
        world.arrive_for("a", Duration::from_secs(1));
    }
    let late = world.arrive_for("a", Duration::from_secs(1));
    let refusal = world.refused[&late].clone();
    assert_eq!((refusal.cause, refusal.wait, refusal.retry_after), (Cause::Requests, millis(1100), millis(100)));
    world.pass(refusal.retry_after);
    let back = world.arrive_for("a", Duration::from_secs(1));
    world.pass(Duration::from_secs(1));
    assert!(world.order().contains(&back), "who comes back when told is served in time");
}

#[test]
fn the_refused_are_told_to_come_back_one_after_another() {
    let mut world = World::new(Some(("10/s", 1)), None);
    world.arrive("a");
    let refused: Vec<u64> = (0..3).map(|_| world.arrive_for("a", Duration::ZERO)).collect();
    let back: Vec<Duration> = refused.iter().map(|request| world.refused[request].retry_after).collect();
    assert_eq!(back, [millis(100), millis(200), millis(300)]);
}

#[test]
fn one_who_ignores_the_hint_does_not_push_the_others_return_away_without_end() {
    let mut world = World::new(Some(("10/min", 1)), None);
    world.arrive("a");
    let refused: Vec<u64> = (0..1000).map(|_| world.arrive_for("a", Duration::ZERO)).collect();
    assert_eq!(world.refused[&refused[999]].retry_after, Duration::from_secs(6 + 60));
}

#[test]
fn another_models_backlog_does_not_count_against_a_newcomer_beyond_what_its_own_quota_lets_through() {
    let mut world = World::new(Some(("10/s", 1)), None).with_model("a", Some(("1/s", 5)), None);
    for _ in 0..100 {
        world.arrive_for("a", MINUTE * 10);
    }
    // All hundred are parked at the global limit now, but only one a second can come through their own.
    let newcomer = world.arrive_for("b", Duration::from_secs(3));
    assert!(!world.refused.contains_key(&newcomer));
    world.pass(Duration::from_secs(3));
    assert!(world.order().contains(&newcomer));
}

#[test]
fn a_waiter_whose_time_is_over_is_refused_by_the_limit_that_held_it_up() {
    let mut world = World::new(None, Some(1));
    world.arrive("a");
    let waiter = world.arrive_for("a", Duration::from_secs(1));
    world.pass(Duration::from_secs(1));
    let ticket = world.tickets[&waiter];
    let refusal = world.queue.expire(ticket, world.now).expect("still waiting");
    assert_eq!((refusal.cause, refusal.scope), (Cause::Concurrency, Some(Scope::Global)));
    assert!(world.queue.expire(ticket, world.now).is_none(), "nobody is refused twice");
}

#[test]
fn a_cell_that_bought_nothing_wakes_the_next_waiter() {
    let mut world = World::new(Some(("1/min", 1)), None);
    world.arrive("a");
    let waiter = world.arrive_for("a", MINUTE * 5);
    let grant = world.grants.remove(&1).expect("the first was let through");
    world.queue.release(&grant, Used::Unsent, world.now);
    world.pump();
    assert_eq!(world.order(), [1, waiter]);
}

#[test]
fn closing_hands_out_everyone_and_refuses_newcomers() {
    let mut world = World::new(None, Some(1));
    for model in ["a", "a", "b"] {
        world.arrive(model);
    }
    let now = world.now;
    assert_eq!(world.queue.close(now), [2, 3]);
    let late = world.arrive("a");
    assert_eq!(world.refused[&late].cause, Cause::Draining);
    world.finish(1);
    assert!(world.grants.is_empty());
}

#[test]
fn lanes_are_bounded_and_idle_ones_are_forgotten_first() {
    let mut world = World::new(None, None);
    world.queue.rules.lane.slots = Some((1, 1));
    let model = world.models.find("a");
    let ask = |credential: u64, queue: &mut Queue<u64>| {
        let ask = Ask {
            tenant: Tenant::Key(credential),
            weight: Weight::ONE,
            lane: Lane { credential, model },
            rank: Rank(credential),
            cost: Cost::default(),
            max_wait: MINUTE,
            until: world.start + MINUTE,
            again: false,
        };
        match queue.offer(&ask, || "a".into(), world.start) {
            Offer::Admitted(grant) => Some(grant),
            _ => None,
        }
    };
    let busy = ask(1, &mut world.queue).expect("a free lane");
    for credential in 2..100_000 {
        let grant = ask(credential, &mut world.queue).expect("a free lane");
        world.queue.release(&grant, Used::Refused, world.start);
    }
    assert!(world.queue.of_lane.len() <= MAX_LANES && world.queue.flows.len() <= MAX_LANES + 1);
    assert!(world.queue.limits.len() <= MAX_LANES + 1);
    assert!(ask(1, &mut world.queue).is_none(), "the busy lane was not forgotten");
    world.queue.release(&busy, Used::Refused, world.start);
    assert!(ask(1, &mut world.queue).is_some());
}

/// What a plain reading of the rules says: never more than the limits, in order within a model, nothing left over.
#[test]
fn random_arrivals_departures_and_hang_ups_never_break_a_limit_or_lose_a_wake_up() {
    for seed in 0..300 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (slots, model_slots, burst) = (rng.random_range(1..6), rng.random_range(1..4), rng.random_range(1..5));
        let mut world =
            World::new(Some(("20/s", burst)), Some(slots)).with_model("a", Some(("5/s", 1)), Some(model_slots));
        let mut last_of_model: BTreeMap<&str, u64> = BTreeMap::new();
        let mut model_of: BTreeMap<u64, &str> = BTreeMap::new();
        for _ in 0..400 {
            match rng.random_range(0..10) {
                0..4 => {
                    let model = ["a", "b", "c"][rng.random_range(0..3)];
                    let request = world.arrive_for(model, MINUTE * 60);
                    model_of.insert(request, model);
                }
                4..6 => world.pass(millis(rng.random_range(0..300))),
                6..9 => {
                    if let Some(request) = pick(&mut rng, world.grants.keys()) {
                        world.finish(request);
                    }
                }
                _ => {
                    if let Some(request) = pick(&mut rng, world.tickets.keys()) {
                        world.leave(request);
                    }
                }
            }
            assert!(world.grants.len() <= slots as usize, "seed {seed}");
            let of_a = world.grants.keys().filter(|request| model_of.get(request) == Some(&"a")).count();
            assert!(of_a <= model_slots as usize, "seed {seed}");
        }
        for _ in 0..1000 {
            if let Some(request) = world.grants.keys().next().copied() {
                world.finish(request);
            }
            world.pass(millis(300));
        }
        assert!(world.grants.is_empty(), "seed {seed}");
        assert!(world.tickets.is_empty(), "seed {seed}: {} wait for ever", world.tickets.len());
        assert_eq!((world.queue.waiting, world.queue.next_timer()), (0, None), "seed {seed}");
        for (request, _) in &world.admitted {
            let last = last_of_model.entry(model_of[request]).or_default();
            assert!(*last < *request, "seed {seed}: {request} of a model passed {last}");
            *last = *request;
        }
        assert_rate(&world.admitted, 20, burst, seed);
    }
}

fn pick<'k>(rng: &mut SmallRng, keys: impl ExactSizeIterator<Item = &'k u64> + Clone) -> Option<u64> {
    let count = keys.len();
    (count > 0).then(|| *keys.clone().nth(rng.random_range(0..count)).expect("within the count"))
}

/// In every window at most burst + rate * window pass.
fn assert_rate(admitted: &[(u64, u64)], per_second: u64, burst: u32, seed: u64) {
    for (i, (_, from)) in admitted.iter().enumerate() {
        for (j, (_, to)) in admitted.iter().enumerate().skip(i) {
            // Times are cut to whole milliseconds, and timers have 2 ms of slack.
            let most = u64::from(burst) + ((to - from + 3) * per_second).div_ceil(1000);
            assert!((j - i + 1) as u64 <= most, "seed {seed}: {} in {} ms", j - i + 1, to - from);
        }
    }
}

/// Two limits open in the same moment for two flows of one tenant: with the one's turn the other's place in line changes, and
/// the room that it was offered is another's.
#[test]
fn room_that_was_offered_and_not_used_is_offered_to_whoever_is_first_then() {
    let mut world = World::new(None, None).with_model("a", Some(("1/s", 1)), None).with_model("b", None, Some(1));
    let ask = |world: &mut World, tenant: u64, model: &str| world.asks(tenant, 100).arrive(model);
    ask(&mut world, 9, "a");
    let busy = ask(&mut world, 9, "b");
    let waiters = [ask(&mut world, 1, "a"), ask(&mut world, 1, "b"), ask(&mut world, 2, "b")];
    // The bucket is due in the very moment in which the slot becomes free.
    world.now += millis(1000);
    world.finish(busy);
    assert_eq!(world.grants.len(), 3, "the first, and one more for each limit: {waiters:?}");
}

/// Lanes that give a gateway up after two seconds of trouble, and five requests that have failed in the first.
fn in_trouble(mode: Mode) -> World {
    let mut world = World::new(None, None).with_model("a", None, Some(6));
    world.queue.rules.mode = mode;
    world.queue.rules.lane.give_up = Duration::from_secs(2);
    for _ in 0..5 {
        let request = world.arrive("a");
        world.now += millis(50);
        world.ends(request, Signal::Failed);
    }
    world
}

impl World {
    fn ends(&mut self, request: u64, signal: Signal) {
        let heard = Heard { signal, requests: None, tokens: None };
        self.queue.hear(&self.grants[&request], &heard, self.now);
        self.settle(request, Used::Refused);
    }
}

#[test]
fn once_a_gateway_is_given_up_who_waits_is_turned_away_and_newcomers_are_refused() {
    let mut world = in_trouble(Mode::Enforce);
    let [probe, waiting] = [(); 2].map(|()| world.arrive("a"));
    world.pass(Duration::from_secs(1));
    assert_eq!((world.grants.contains_key(&probe), world.tickets.contains_key(&waiting)), (true, true));
    world.ends(probe, Signal::Failed);
    world.pass(millis(900));
    let newcomer = world.arrive("a");
    for refused in [waiting, newcomer] {
        assert_eq!(world.refused[&refused].cause, Cause::Unavailable);
    }
    let other = world.arrive("b");
    assert!(world.grants.contains_key(&other), "another lane is another gateway");
    // Whoever comes when the next probe is due is that.
    world.pass(world.refused[&newcomer].retry_after);
    let probe = world.arrive("a");
    world.ends(probe, Signal::Accepted);
    let after = world.arrive("a");
    assert!(world.grants.contains_key(&after), "it is back");
}

#[test]
fn a_lane_that_only_observes_turns_nobody_away() {
    let mut world = in_trouble(Mode::Observe);
    world.pass(Duration::from_secs(3));
    (0..6).for_each(|_| _ = world.arrive("a"));
    assert_eq!(world.grants.len(), 6, "nobody is held up by what is observed");
    let held_up = world.arrive("a");
    assert!(!world.refused.contains_key(&held_up), "it waits for a slot: {:?}", world.refused.get(&held_up));
}
