//! Shares, places in a full queue, and what the refused are told, from the queue's door.

use std::collections::{BTreeMap, BinaryHeap};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::tests::{MINUTE, World, bucket, millis};
use super::*;
use crate::admission::slots::Slots;
use crate::clients::Clients;
use crate::config::Config;

/// Two clients that the configuration names.
fn two_clients() -> (Clients, Vec<ClientId>) {
    let config = "[clients.a]\nkey = \"ka\"\n[clients.b]\nkey = \"kb\"\n";
    let clients = Clients::new(&Config::parse(config, &|_| None).expect("a good configuration"));
    let ids = clients.ids().collect();
    (clients, ids)
}

#[test]
fn two_who_wait_take_turns_whoever_came_first() {
    let mut world = World::new(None, Some(1));
    world.asks(9, 100).arrive("a");
    for _ in 0..10 {
        world.asks(1, 100).arrive("a");
    }
    for _ in 0..3 {
        world.asks(2, 100).arrive("a");
    }
    for _ in 0..13 {
        let under_way = *world.grants.keys().next().expect("one is under way");
        world.finish(under_way);
    }
    // Requests 2 to 11 are the first tenant's, 12 to 14 the second's.
    assert_eq!(world.order(), [1, 2, 12, 3, 13, 4, 14, 5, 6, 7, 8, 9, 10, 11]);
}

#[test]
fn shares_are_of_tokens_not_of_requests_and_go_by_weight() {
    let mut world = World::before_tokens("600000/min", 1000);
    for _ in 0..600 {
        world.weight = Weight::ONE;
        world.asks(1, 300).arrive_for("a", MINUTE * 60);
        world.weight = Weight::new(3.0).expect("a weight");
        world.asks(2, 100).arrive_for("a", MINUTE * 60);
    }
    world.pass(Duration::from_secs(6));
    let tokens = |odd: bool| -> u64 {
        let own = world.admitted.iter().filter(|(request, _)| (request % 2 == 1) == odd);
        own.count() as u64 * if odd { 300 } else { 100 }
    };
    let ratio = tokens(false) as f64 / tokens(true) as f64;
    assert!((ratio - 3.0).abs() < 0.1, "{ratio}");
}

/// The bound of the paper (theorem 4.4 there): the service of two who are backlogged all the time differs by at most twice
/// the largest request, in any interval; here with the largest error of the guesses under way on top.
#[test]
fn the_service_of_two_backlogged_tenants_never_differs_by_much() {
    const LARGEST: u64 = 400;
    const SLOTS: u64 = 4;
    for seed in 0..100 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut world = World::new(None, Some(SLOTS as u32));
        let mut guesses = BTreeMap::new();
        for _ in 0..400 {
            for tenant in 1..=2 {
                let guess = rng.random_range(100..=LARGEST);
                let request = world.asks(tenant, guess).arrive_for(["a", "b"][rng.random_range(0..2)], MINUTE * 60);
                guesses.insert(request, guess);
            }
        }
        // Odd numbers are the first tenant's. What is let through counts as guessed, and is corrected when it ends.
        let (mut service, mut least, mut most) = (0i64, 0i64, 0i64);
        let mut seen = 0;
        for _ in 0..500 {
            for (request, _) in &world.admitted[seen..] {
                service += guesses[request] as i64 * if request % 2 == 1 { 1 } else { -1 };
            }
            seen = world.admitted.len();
            (least, most) = (least.min(service), most.max(service));
            let index = rng.random_range(0..world.grants.len());
            let request = *world.grants.keys().nth(index).expect("slots are full");
            let truth = rng.random_range(64..=guesses[&request]);
            service -= (guesses[&request] - truth) as i64 * if request % 2 == 1 { 1 } else { -1 };
            world.settle(request, Used::Tokens(truth));
        }
        let bound = (2 * LARGEST + SLOTS * LARGEST) as i64;
        assert!(most - least <= bound, "seed {seed}: {least} to {most}");
    }
}

#[test]
fn who_was_idle_gets_no_credit_for_it() {
    let mut world = World::new(None, Some(1));
    for _ in 0..1000 {
        let request = world.asks(1, 100).arrive("a");
        world.finish(request);
    }
    world.asks(9, 100).arrive("a");
    let before = world.admitted.len();
    for _ in 0..50 {
        world.asks(1, 100).arrive("a");
        world.asks(2, 100).arrive("a");
    }
    for _ in 0..40 {
        let under_way = *world.grants.keys().next().expect("one is under way");
        world.finish(under_way);
    }
    let first = world.order()[before..].iter().filter(|request| **request % 2 == 0).count();
    assert!((19..=21).contains(&first), "{first} of 40");
}

#[test]
fn a_client_at_its_own_limit_does_not_hold_others_up_and_gets_no_endless_credit() {
    let (clients, ids) = two_clients();
    let mut world = World::new(None, Some(1));
    let own = vec![Measure::Requests(bucket("1/h", 1, world.start))];
    world.queue.limit_client(ids[0], clients.name(ids[0]), Mode::Enforce, own);
    world.tokens = 1000;
    world.tenant = Tenant::Named(ids[0]);
    for _ in 0..5 {
        world.arrive_for("a", MINUTE * 600);
    }
    world.finish(1);
    world.tenant = Tenant::Named(ids[1]);
    for _ in 0..2000 {
        let request = world.arrive("a");
        world.finish(request);
    }
    assert_eq!(world.admitted.len(), 2001);
    // When its limit opens, it gets one turn, not all of them.
    let (busy, next) = (world.arrive_for("a", MINUTE * 600), world.arrive_for("a", MINUTE * 600));
    world.pass(MINUTE * 60);
    world.finish(busy);
    world.finish(2);
    assert_eq!(world.order()[2002..], [2, next]);
}

#[test]
fn weir_says_whose_limit_it_was() {
    let (clients, ids) = two_clients();
    let mut world = World::new(None, None);
    let own = vec![Measure::Concurrency(Slots::new(1)), Measure::Tokens(bucket("60/min", 10, world.start))];
    world.queue.limit_client(ids[0], clients.name(ids[0]), Mode::Enforce, own);
    (world.tenant, world.tokens) = (Tenant::Named(ids[0]), 10);
    let first = world.arrive("a");
    let waiter = world.arrive_for("a", Duration::from_secs(20));
    world.pass(Duration::from_secs(20));
    let refusal = world.queue.expire(world.tickets[&waiter], world.now).expect("still waiting");
    assert_eq!(refusal.cause, Cause::ClientConcurrency);
    assert_eq!(refusal.scope.map(|scope| scope.to_string()).as_deref(), Some("client"));
    world.finish(first);
    let served = world.arrive("a");
    assert!(world.order().contains(&served));
    let late = world.arrive_for("a", Duration::from_secs(1));
    assert_eq!(world.refused[&late].cause, Cause::Tokens);
}

#[test]
fn in_a_full_queue_one_with_less_takes_the_place_of_the_last_of_the_one_with_most() {
    let mut world = World::new(None, Some(1));
    world.queue.rules.max_waiting = 4;
    for _ in 0..5 {
        world.asks(1, 10).arrive("a");
    }
    let (sixth, seventh) = (world.asks(2, 10).arrive("a"), world.arrive("a"));
    assert_eq!(world.refused.keys().copied().collect::<Vec<_>>(), [4, 5], "the last of the first tenant's");
    assert_eq!(world.refused[&5].cause, Cause::QueueFull);
    let eighth = world.arrive("a");
    assert!(world.refused.contains_key(&eighth), "now both have two");
    assert!(world.tickets.contains_key(&sixth) && world.tickets.contains_key(&seventh));
    for _ in 0..5 {
        let under_way = *world.grants.keys().next().expect("one is under way");
        world.finish(under_way);
    }
    assert!(world.tickets.is_empty() && world.grants.is_empty());
}

#[test]
fn a_retry_is_not_displaced() {
    let mut world = World::new(None, Some(1));
    world.queue.rules.max_waiting = 1;
    world.asks(1, 10).arrive("a");
    world.ask(100, "a", MINUTE, true);
    world.ask(101, "a", MINUTE, true);
    let newcomer = world.asks(2, 10).arrive("a");
    assert_eq!(world.refused[&newcomer].cause, Cause::QueueFull);
    assert!(world.tickets.contains_key(&100) && world.tickets.contains_key(&101));
}

#[test]
fn what_is_only_observed_holds_nobody_up_and_is_counted_as_if_it_did() {
    let start = Instant::now();
    let mut world = World::of(Vec::new(), start);
    let model = world.models.find("a");
    let measures = vec![Measure::Requests(bucket("1/s", 1, start)), Measure::Concurrency(Slots::new(5))];
    world.queue.limit_model(model, &"a".into(), Mode::Observe, measures);
    for _ in 0..5 {
        world.arrive_for("a", Duration::from_secs(2));
    }
    assert_eq!(world.admitted.len(), 5);
    let refused = |request: u64| world.grants[&request].would_refuse.clone();
    assert_eq!([refused(1), refused(2), refused(3)], [Vec::<Cause>::new(), vec![], vec![]]);
    assert_eq!([refused(4), refused(5)], [vec![Cause::Requests], vec![Cause::Requests]]);
    for request in 1..=5 {
        world.finish(request);
    }
    for limit in world.queue.limits() {
        if let Measure::Concurrency(slots) = &limit.measure {
            assert_eq!(slots.in_use(), 0);
        }
    }
}

/// The waits of one who sends twenty at once every ten seconds, at a quota of ten a second.
fn waits_of_a_batch(beside_a_flood: bool) -> Vec<u64> {
    let mut world = World::new(Some(("10/s", 1)), None);
    let mut arrived = BTreeMap::new();
    for tick in 0..6000u64 {
        if beside_a_flood {
            // Two hundred a second: a hundred times what the other sends.
            world.asks(1, 100).arrive_for("a", Duration::from_secs(30));
            world.asks(1, 100).arrive_for("b", Duration::from_secs(30));
        }
        if tick % 1000 == 500 {
            for _ in 0..20 {
                arrived.insert(world.asks(2, 100).arrive_for("a", MINUTE), tick * 10);
            }
        }
        world.pass(millis(10));
        expire_old(&mut world);
    }
    let waits = world.admitted.iter().filter_map(|(request, at)| Some(at - arrived.get(request)?));
    let mut waits: Vec<u64> = waits.collect();
    assert_eq!(waits.len(), arrived.len(), "all of them are served");
    waits.sort_unstable();
    waits
}

/// Those who have waited for half a minute give up, as the gate makes them.
fn expire_old(world: &mut World) {
    while let Some((request, ticket)) = world.tickets.first_key_value().map(|(request, ticket)| (*request, *ticket)) {
        let Some(waiter) = world.queue.flows[ticket.flow.0].waiters.get(&ticket.rank) else { return };
        if waiter.since + Duration::from_secs(30) > world.now || waiter.max_wait > Duration::from_secs(30) {
            return;
        }
        world.queue.expire(ticket, world.now);
        world.tickets.remove(&request);
        world.pump();
    }
}

#[test]
fn one_who_sends_a_hundred_times_as_much_makes_another_wait_twice_as_long_and_no_more() {
    let p95 = |waits: Vec<u64>| waits[waits.len() * 95 / 100];
    let (alone, beside) = (p95(waits_of_a_batch(false)), p95(waits_of_a_batch(true)));
    // Half of the quota is the other's; and what has just been let through is not taken back.
    assert!(beside <= 2 * alone + 100, "alone {alone} ms, beside a flood {beside} ms");
}

/// What happens next in [`returns_and_losses`]: a first try, or a return as told.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Try {
    at: std::cmp::Reverse<Instant>,
    returns: bool,
    tenant: u64,
    tokens: u64,
}

/// How many return when they were told, and how many of these are not served in time, with these tries offered for a minute.
fn returns_and_losses(world: &mut World, mut tries: BinaryHeap<Try>, max_wait: Duration) -> (u32, u32) {
    let (mut returned, mut waiting) = (0u32, BTreeMap::new());
    let mut lost = 0u32;
    while let Some(next) = tries.pop() {
        let until = next.at.0.max(world.now);
        world.pass(until - world.now);
        let overdue: Vec<u64> =
            waiting.iter().filter(|(_, (by, _))| *by <= world.now).map(|(request, _)| *request).collect();
        for request in overdue {
            let (_, was_told) = waiting.remove(&request).expect("just found");
            if let Some(ticket) = world.tickets.remove(&request) {
                world.queue.expire(ticket, world.now);
                world.pump();
                lost += u32::from(was_told);
            }
        }
        returned += u32::from(next.returns);
        let request = world.asks(next.tenant, next.tokens).arrive_for("a", max_wait);
        match world.refused.get(&request) {
            Some(refusal) => {
                lost += u32::from(next.returns);
                tries.push(Try { at: std::cmp::Reverse(world.now + refusal.retry_after), returns: true, ..next });
            }
            None => drop(waiting.insert(request, (world.now + max_wait, next.returns))),
        }
        if world.now > world.start + MINUTE * 10 {
            break;
        }
    }
    assert!(returned > 50, "only {returned} were refused");
    (returned, lost)
}

/// First tries at random times within a minute.
fn offered(
    rng: &mut SmallRng,
    start: Instant,
    tries: u64,
    tenants: u64,
    tokens: std::ops::Range<u64>,
) -> BinaryHeap<Try> {
    let one = |_| Try {
        at: std::cmp::Reverse(start + millis(rng.random_range(0..60_000))),
        returns: false,
        tenant: rng.random_range(0..tenants),
        tokens: rng.random_range(tokens.clone()),
    };
    (0..tries).map(one).collect()
}

/// Plays ten seeds, each with another `max_wait`; the part of all returns that were served in time.
fn served_of_all(world: impl Fn() -> World, tries: u64, tenants: u64, tokens: std::ops::Range<u64>) -> f64 {
    let (mut returned, mut served) = (0.0, 0.0);
    for seed in 0..10 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let max_wait = millis(rng.random_range(500..5000));
        let mut world = world();
        let tries = offered(&mut rng, world.start, tries, tenants, tokens.clone());
        let (of, lost) = returns_and_losses(&mut world, tries, max_wait);
        returned += f64::from(of);
        served += f64::from(of - lost);
    }
    served / returned
}

#[test]
fn who_returns_when_told_is_served_in_time() {
    let requests = served_of_all(|| World::new(Some(("10/s", 1)), None), 900, 1, 1..2);
    let tokens = served_of_all(|| World::before_tokens("60000/min", 2000), 300, 1, 100..500);
    assert!(requests >= 0.99 && tokens >= 0.99, "{requests}, {tokens}");
}

#[test]
fn who_returns_when_told_is_served_in_time_among_others_too() {
    for tenants in [2, 4] {
        let served = served_of_all(|| World::before_tokens("60000/min", 2000), 3000, tenants, 10..50);
        assert!(served >= 0.99, "{tenants} tenants: {served}");
    }
}

#[test]
fn who_is_held_up_at_one_model_has_no_claims_at_another_for_it() {
    let mut world = World::new(None, None).with_model("a", Some(("1/day", 1)), None).with_model("b", None, Some(1));
    world.asks(1, 100).arrive("a");
    world.arrive_for("a", MINUTE * 60 * 48);
    for _ in 0..1000 {
        let request = world.asks(2, 100).arrive("b");
        world.finish(request);
    }
    let mut busy = world.asks(3, 100).arrive("b");
    for _ in 0..100 {
        world.asks(1, 100).arrive_for("b", MINUTE * 600);
    }
    let other = world.asks(2, 100).arrive_for("b", MINUTE * 600);
    let before = world.admitted.len();
    while !world.order().contains(&other) {
        world.finish(busy);
        busy = *world.order().last().expect("somebody is next");
    }
    assert!(world.admitted.len() - before <= 2, "{} turns", world.admitted.len() - before);
}

#[test]
fn a_fast_model_does_not_blur_the_shares_at_a_slow_one() {
    let mut world = World::new(None, None).with_tokens("b", ("6000/min", 1000));
    for _ in 0..200 {
        // Odd numbers are the light one's.
        world.weight = Weight::ONE;
        world.asks(1, 200).arrive_for("b", MINUTE * 6000);
        world.weight = Weight::new(4.0).expect("a weight");
        world.asks(2, 200).arrive_for("b", MINUTE * 6000);
    }
    world.weight = Weight::ONE;
    let begun = world.admitted.len();
    for _ in 0..1000 {
        let request = world.asks(3, 10_000).arrive("a");
        world.finish(request);
        world.pass(millis(100));
    }
    let of_b: Vec<u64> = world.order()[begun..].iter().copied().filter(|request| *request <= 400).collect();
    let light = of_b.iter().filter(|request| *request % 2 == 1).count();
    let ratio = (of_b.len() - light) as f64 / light as f64;
    assert!((ratio - 4.0).abs() < 0.5, "{ratio}");
}

#[test]
fn who_asks_for_more_than_the_burst_and_leaves_again_and_again_does_not_stop_the_others() {
    let mut world = World::before_tokens("60000/min", 6000);
    world.asks(3, 6000).arrive("b");
    let mut served = Vec::new();
    for _ in 0..60 {
        // Another model keeps the bucket from filling; the light one's model is the one that is asked for too much of.
        for _ in 0..10 {
            world.asks(3, 100).arrive_for("b", MINUTE);
        }
        let huge = world.asks(1, 6001).arrive_for("a", MINUTE);
        let light = world.asks(2, 10).arrive_for("a", MINUTE);
        world.pass(Duration::from_secs(1));
        served.push(world.order().contains(&light));
        if world.tickets.contains_key(&huge) {
            world.leave(huge);
        }
    }
    let in_time = served.iter().filter(|served| **served).count();
    assert!(in_time >= 50, "{in_time} of 60 within a second");
}

#[test]
fn who_is_alone_now_is_not_refused_for_those_it_shared_with_before() {
    let mut world = World::new(Some(("10/s", 1)), None);
    for _ in 0..100 {
        for tenant in 1..=20 {
            world.asks(tenant, 100).arrive_for("a", Duration::from_secs(5));
        }
        world.pass(millis(100));
    }
    for request in world.tickets.keys().copied().collect::<Vec<_>>() {
        world.leave(request);
    }
    let before = world.refused.len();
    for _ in 0..10 {
        for _ in 0..20 {
            world.asks(1, 100).arrive_for("a", Duration::from_secs(5));
        }
        world.pass(Duration::from_secs(2));
    }
    assert!(
        world.refused.len() - before <= 20,
        "{} of 200 refused, by a limit that stood idle",
        world.refused.len() - before
    );
}

/// The longest that anyone of a lone tenant is told to stay away, with half as much again as the quota of ten a second offered
/// for six seconds.
fn longest_told(world: &mut World) -> Duration {
    let before = world.refused.len();
    for _ in 0..90 {
        world.asks(1, 0).arrive_for("a", Duration::from_secs(1));
        world.pass(millis(66));
    }
    assert!(world.refused.len() > before + 10);
    world.refused.values().map(|refusal| refusal.retry_after).max().expect("some were refused")
}

#[test]
fn what_has_passed_before_a_tenant_was_first_refused_is_not_taken_for_what_it_shares_the_limit_with() {
    let mut world = World::new(Some(("10/s", 1)), None);
    for _ in 0..600 {
        world.asks(1, 0).arrive("a");
        world.pass(millis(100));
    }
    let longest = longest_told(&mut world);
    assert!(longest < Duration::from_secs(4), "{longest:?}");
}

#[test]
fn what_passes_while_a_tenant_is_idle_is_not_taken_for_what_it_shares_the_limit_with() {
    let mut world = World::new(Some(("10/s", 1)), None);
    longest_told(&mut world);
    for _ in 0..600 {
        world.asks(2, 0).arrive("a");
        world.pass(millis(100));
    }
    world.pass(MINUTE);
    world.asks(1, 0).arrive("a");
    let longest = longest_told(&mut world);
    assert!(longest < Duration::from_secs(4), "{longest:?}");
}
