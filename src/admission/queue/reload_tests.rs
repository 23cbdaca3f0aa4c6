//! Limits that change while others wait for them and hold them.

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::tests::{MINUTE, World, bucket, millis};
use super::*;
use crate::admission::bucket::Bucket;
use crate::admission::slots::Slots;
use crate::clients::Clients;
use crate::config::{Config, Rate};

const SECOND: Duration = Duration::from_secs(1);

fn slots(limit: u32) -> Measure {
    Measure::Concurrency(Slots::new(limit))
}

impl World {
    fn requests(&self, rate: &str, burst: u32) -> Measure {
        Measure::Requests(bucket(rate, burst, self.now))
    }

    /// Everyone's limits become these; models have none, and clients neither.
    fn reload(&mut self, global: Vec<Measure>) {
        let rules = self.queue.rules;
        self.reload_with(rules, global, Vec::new());
    }

    fn reload_with(&mut self, rules: Rules, global: Vec<Measure>, clients: Vec<(ClientId, Weight, Table)>) {
        let none = || Table { name: "any".into(), mode: Mode::Enforce, measures: Vec::new() };
        let models = self.queue.models().into_iter().map(|model| (model, none())).collect();
        self.queue.reload(NewLimits { rules, global, models, clients }, self.now);
        self.pump();
    }

    fn arrive_as(&mut self, tenant: u64, tokens: u64) -> u64 {
        self.asks(tenant, tokens).arrive("a")
    }

    fn slots_in_use(&self) -> u32 {
        let slots = self.queue.limits().find_map(|limit| match &limit.measure {
            Measure::Concurrency(slots) => Some(slots.in_use()),
            _ => None,
        });
        slots.expect("there are slots")
    }
}

#[test]
fn more_slots_go_to_those_who_wait_at_once_in_the_fair_order() {
    let mut world = World::new(None, Some(1));
    let busy = world.arrive_as(9, 10);
    let greedy: Vec<u64> = (0..3).map(|_| world.arrive_as(1, 1000)).collect();
    let modest = world.arrive_as(2, 10);
    world.reload(vec![slots(2)]);
    world.reload(vec![slots(3)]);
    assert_eq!(world.order(), [busy, greedy[0], modest], "the second tenant goes before the first one's second");
    world.reload(vec![slots(9)]);
    assert_eq!((world.grants.len(), world.slots_in_use()), (5, 5));
}

#[test]
fn fewer_slots_than_are_held_cut_nobody_off_and_are_given_out_when_enough_came_back() {
    let mut world = World::new(None, Some(4));
    (0..4).for_each(|_| _ = world.arrive("a"));
    let waiter = world.arrive("a");
    world.reload(vec![slots(2)]);
    assert_eq!(world.grants.len(), 4);
    world.finish(1);
    world.finish(2);
    assert!(!world.grants.contains_key(&waiter), "two are held of two");
    world.finish(3);
    assert!(world.grants.contains_key(&waiter));
    assert_eq!(world.slots_in_use(), 2);
}

#[test]
fn a_limit_that_goes_lets_its_waiters_go_on() {
    let mut world = World::new(Some(("1/min", 1)), None);
    (0..5).for_each(|_| _ = world.arrive_for("a", MINUTE * 60));
    assert_eq!(world.grants.len(), 1);
    world.reload(Vec::new());
    assert_eq!((world.grants.len(), world.queue.next_timer()), (5, None));
}

#[test]
fn new_slots_count_those_who_are_under_way_and_get_them_back() {
    let mut world = World::new(None, None);
    (0..3).for_each(|_| _ = world.arrive("a"));
    world.reload(vec![slots(2)]);
    assert_eq!(world.slots_in_use(), 3);
    let waiter = world.arrive("a");
    world.finish(1);
    assert!(!world.grants.contains_key(&waiter));
    world.finish(2);
    assert!(world.grants.contains_key(&waiter));
    (3..5).for_each(|request| world.finish(request));
    assert_eq!(world.slots_in_use(), 0);
}

#[test]
fn slots_that_went_and_came_again_get_back_what_is_held_and_no_more() {
    let mut world = World::new(None, Some(2));
    world.arrive("a");
    world.reload(Vec::new());
    world.arrive("a");
    world.reload(vec![slots(2)]);
    assert_eq!(world.slots_in_use(), 2, "with them and without them");
    world.finish(1);
    world.arrive("a");
    world.finish(2);
    world.finish(3);
    assert_eq!(world.slots_in_use(), 0);
}

#[test]
fn what_was_used_of_a_bucket_stays_used() {
    let mut world = World::new(Some(("10/s", 10)), None);
    (0..10).for_each(|_| _ = world.arrive("a"));
    let waiters = [(); 2].map(|()| world.arrive("a"));
    let changed = world.requests("1/s", 10);
    world.reload(vec![changed]);
    assert_eq!(world.grants.len(), 10, "nobody gets a second burst");
    world.pass(SECOND * 2);
    assert_eq!(world.admitted[10..], [(waiters[0], 1000), (waiters[1], 2000)]);
}

#[test]
fn a_new_bucket_takes_nothing_back_that_it_has_not_had() {
    let mut world = World::new(None, None);
    let before = world.arrive("a");
    let new = world.requests("1/min", 1);
    world.reload(vec![new]);
    let first = world.arrive("a");
    let second = world.arrive_for("a", MINUTE * 5);
    world.settle(before, Used::Unsent);
    assert_eq!((world.grants.contains_key(&first), world.grants.contains_key(&second)), (true, false));
    world.settle(first, Used::Unsent);
    assert!(world.grants.contains_key(&second), "what it has had it takes back");
}

#[test]
fn who_waits_at_a_limit_that_only_observes_from_now_on_goes_on_and_slots_that_hold_up_again_count_everyone() {
    let mut world = World::new(None, Some(1));
    (0..3).for_each(|_| _ = world.arrive("a"));
    let rules = world.queue.rules;
    let observing = Rules { mode: Mode::Observe, ..rules };
    world.reload_with(observing, vec![slots(1)], Vec::new());
    assert_eq!(world.grants.len(), 3);
    // It would have been refused, and was not counted.
    world.arrive_for("a", Duration::ZERO);
    world.reload(vec![slots(1)]);
    world.reload_with(rules, vec![slots(4)], Vec::new());
    assert_eq!((world.grants.len(), world.slots_in_use()), (4, 4));
    (1..=4).for_each(|request| world.finish(request));
    assert_eq!(world.slots_in_use(), 0);
}

#[test]
fn a_tenants_lead_goes_with_it_to_the_next_limit() {
    let mut world = World::new(None, Some(1));
    world.arrive_as(1, 10_000);
    let greedy = world.arrive_as(1, 10_000);
    let modest = [(); 3].map(|()| world.arrive_as(2, 10));
    world.finish(1);
    assert!(world.grants.contains_key(&greedy), "both had nothing, and it came first");
    world.arrive_as(1, 10_000);
    // The slots go, and a bucket comes that is empty.
    let mut empty = bucket("1/s", 1, world.now);
    assert!(empty.try_take(1, ChargeNo(0), world.now, world.now));
    world.reload(vec![Measure::Requests(empty)]);
    world.pass(SECOND * 10);
    let order = world.order();
    assert_eq!(order[2..5], modest, "who has had much still goes last");
}

#[test]
fn a_clients_new_weight_holds_for_those_who_wait() {
    let config = "[clients.a]\nkey = \"ka\"\n[clients.b]\nkey = \"kb\"\n";
    let clients = Clients::new(&Config::parse(config, &|_| None).expect("a good configuration"));
    let mut world = World::new(Some(("10/s", 1)), None);
    let ids: Vec<ClientId> = clients.ids().collect();
    for _ in 0..60 {
        for id in &ids {
            (world.tenant, world.tokens) = (Tenant::Named(*id), 100);
            world.arrive("a");
        }
    }
    let none = |id: ClientId| Table { name: clients.name(id).clone(), mode: Mode::Enforce, measures: Vec::new() };
    let weights = [Weight::ONE, Weight::new(3.0).expect("a weight")];
    let of_clients = ids.iter().zip(weights).map(|(id, weight)| (*id, weight, none(*id))).collect();
    let (rules, same) = (world.queue.rules, world.requests("10/s", 1));
    world.reload_with(rules, vec![same], of_clients);
    world.pass(SECOND * 4);
    // They came in turns, the first client first.
    let of_second = world.order().iter().filter(|request| *request % 2 == 0).count();
    assert!((29..=31).contains(&of_second), "{of_second} of 41");
}

#[test]
fn adaptive_slots_begin_with_those_who_are_under_way_and_end_with_the_same() {
    let mut world = World::new(None, Some(20));
    (0..20).for_each(|_| _ = world.arrive("a"));
    let waiter = world.arrive("a");
    let rules = world.queue.rules;
    let adaptive = LaneRules { slots: Some((10, 1000)), ..rules.lane };
    world.reload_with(Rules { lane: adaptive, ..rules }, Vec::new(), Vec::new());
    assert!(!world.grants.contains_key(&waiter), "as many as are under way, and no more for now");
    world.finish(1);
    assert!(world.grants.contains_key(&waiter));
    world.reload_with(rules, vec![slots(19)], Vec::new());
    assert_eq!(world.slots_in_use(), 20);
    (2..=21).for_each(|request| world.finish(request));
    assert_eq!(world.slots_in_use(), 0);
}

#[test]
fn who_waits_longer_than_the_new_give_up_allows_is_turned_away_at_once() {
    let mut world = World::new(None, None);
    for _ in 0..5 {
        let request = world.arrive("a");
        world.now += millis(50);
        let failed = Heard { signal: Signal::Failed, requests: None, tokens: None };
        world.queue.hear(&world.grants[&request], &failed, world.now);
        world.settle(request, Used::Refused);
    }
    world.pass(SECOND / 2);
    let waiters = [(); 2].map(|()| world.arrive("a"));
    assert!(waiters.iter().all(|waiter| world.tickets.contains_key(waiter)));
    let rules = world.queue.rules;
    let impatient = LaneRules { give_up: SECOND / 2, ..rules.lane };
    world.reload_with(Rules { lane: impatient, ..rules }, Vec::new(), Vec::new());
    assert!(waiters.iter().all(|waiter| world.refused.get(waiter).is_some_and(|it| it.cause == Cause::Unavailable)));
}

/// Whatever the limits become, and however often: no window lets more through than the largest burst and the rates, and nobody
/// is let through while as many as there are slots are under way.
#[test]
fn random_changes_never_let_more_through_than_the_limits_in_force() {
    for seed in 0..40 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut world = World::new(Some(("20/s", 5)), Some(3));
        let (mut per_second, mut burst, mut most) = (20, 5, 3);
        // What the rates had given when it was let through, in thousandths.
        let mut given = 0;
        let mut passed: Vec<(u64, u32)> = Vec::new();
        for _ in 0..300 {
            let before = (world.admitted.len(), world.grants.len());
            match rng.random_range(0..10) {
                0..4 => _ = world.arrive_for(["a", "b"][rng.random_range(0..2)], MINUTE * 60),
                4..6 => {
                    for _ in 0..rng.random_range(0..300) {
                        let before = world.admitted.len();
                        world.pass(millis(1));
                        given += per_second;
                        passed.extend((before..world.admitted.len()).map(|_| (given, burst)));
                    }
                }
                6..9 => {
                    if let Some(request) = world.grants.keys().next().copied() {
                        world.finish(request);
                    }
                }
                _ => {
                    (per_second, burst, most) =
                        (rng.random_range(1..60), rng.random_range(1..8), rng.random_range(1..6));
                    let rate = Rate::parse(&format!("{per_second}/s")).expect("a rate").with_burst(burst);
                    let requests = Measure::Requests(Bucket::new(rate, world.now));
                    world.reload(vec![requests, slots(most)]);
                }
            }
            passed.extend((passed.len()..world.admitted.len()).map(|_| (given, burst)));
            let more = world.admitted.len() > before.0;
            assert!(!more || world.grants.len() <= most as usize || world.grants.len() <= before.1, "seed {seed}");
        }
        for (i, (from, _)) in passed.iter().enumerate() {
            let mut largest = 0;
            for (count, (to, burst)) in (1..).zip(&passed[i..]) {
                largest = largest.max(u64::from(*burst));
                // Timers have 2 ms of slack, of 60 a second at most.
                let allowed = largest + (to - from) / 1000 + 1;
                assert!(count <= allowed, "seed {seed}: {count} of {allowed}");
            }
        }
        for _ in 0..2000 {
            match world.grants.keys().next().copied() {
                Some(request) => world.finish(request),
                None => world.pass(millis(300)),
            }
        }
        assert!(world.tickets.is_empty(), "seed {seed}: {} wait for ever", world.tickets.len());
    }
}
