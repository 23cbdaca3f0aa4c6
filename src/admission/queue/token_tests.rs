//! Limits of tokens, from the queue's door.

use super::tests::{MINUTE, World, millis};
use super::*;

fn at(admitted: &[(u64, u64)], request: u64) -> Option<u64> {
    admitted.iter().find(|(other, _)| *other == request).map(|(_, at)| *at)
}

#[test]
fn ten_of_a_hundred_fit_the_burst_and_the_others_pass_as_the_quota_returns() {
    let mut world = World::before_tokens("6000/min", 1000);
    world.asks(1, 100);
    for _ in 0..100 {
        world.arrive_for("a", MINUTE * 2);
    }
    assert_eq!(world.admitted.len(), 10);
    world.pass(MINUTE * 2);
    let times: Vec<u64> = world.admitted.iter().map(|(_, at)| *at).collect();
    let expected: Vec<u64> = (0..100u64).map(|number| number.saturating_sub(9) * 1000).collect();
    assert_eq!(times, expected);
}

#[test]
fn what_an_answer_did_not_cost_goes_to_the_next_at_once() {
    let mut world = World::before_tokens("60/min", 100);
    let (first, second) = (world.asks(1, 100).arrive("a"), world.arrive_for("a", MINUTE * 2));
    assert_eq!(world.order(), [first]);
    world.settle(first, Used::Tokens(0));
    assert_eq!(world.order(), [first, second]);
    assert_eq!(world.queue.reserved_tokens(), 100);
    world.settle(second, Used::Refused);
    assert_eq!(world.queue.reserved_tokens(), 0);
}

#[test]
fn what_an_answer_cost_more_is_a_debt_that_the_next_waits_for() {
    let mut world = World::before_tokens("60/min", 100);
    let first = world.asks(1, 100).arrive("a");
    world.settle(first, Used::Tokens(400));
    let second = world.asks(1, 1).arrive_for("a", MINUTE * 10);
    world.pass(MINUTE * 10);
    assert_eq!(at(&world.admitted, second), Some(301_000));
}

#[test]
fn a_call_without_tokens_passes_a_limit_of_tokens_that_is_used_up() {
    let mut world = World::before_tokens("60/min", 100);
    world.asks(1, 100).arrive("a");
    let waiter = world.arrive_for("a", MINUTE * 2);
    let free = world.asks(2, 0).arrive("b");
    assert_eq!(world.order(), [1, free]);
    assert!(world.tickets.contains_key(&waiter));
}

#[test]
fn a_big_request_is_not_passed_by_small_ones_behind_it() {
    let mut world = World::before_tokens("60000/min", 1000);
    world.asks(1, 1000).arrive("a");
    let big = world.asks(1, 900).arrive("a");
    let small: Vec<u64> = (0..50).map(|_| world.asks(1, 10).arrive("b")).collect();
    world.pass(MINUTE);
    assert_eq!(at(&world.admitted, big), Some(900));
    assert!(small.iter().all(|small| at(&world.admitted, *small) > Some(900)));
}

#[test]
fn one_larger_than_the_burst_passes_when_the_bucket_is_full_and_leaves_a_debt() {
    let mut world = World::before_tokens("60000/min", 1000);
    world.asks(1, 500).arrive("a");
    let huge = world.asks(1, 5000).arrive("a");
    let behind = world.asks(1, 1).arrive("a");
    world.pass(MINUTE);
    assert_eq!(at(&world.admitted, huge), Some(500), "full again");
    assert_eq!(at(&world.admitted, behind), Some(500 + 4001), "after the debt");
}

#[test]
fn while_one_waits_for_a_full_bucket_its_models_smaller_ones_wait_and_other_models_do_not() {
    let mut world = World::before_tokens("60000/min", 1000);
    world.asks(1, 1000).arrive("a");
    let huge = world.asks(1, 5000).arrive("a");
    let same_model = world.asks(2, 10).arrive("a");
    let mut others = Vec::new();
    for _ in 0..120 {
        others.push(world.asks(3, 10).arrive("b"));
        world.pass(millis(20));
    }
    let passed_at = at(&world.admitted, huge).expect("not starved");
    assert!((1000..=2020).contains(&passed_at), "half of the refill is its own: {passed_at}");
    assert!(at(&world.admitted, same_model).is_none_or(|at| at >= passed_at));
    let waits =
        others.iter().enumerate().map(|(number, other)| at(&world.admitted, *other).map(|at| at - 20 * number as u64));
    let before: Vec<Option<u64>> = waits.take(passed_at as usize / 20 - 2).collect();
    assert!(before.iter().all(|wait| wait.is_some_and(|wait| wait <= 40)), "{before:?}");
    world.pass(MINUTE);
    assert!(world.tickets.is_empty());
}

#[test]
fn who_saves_and_leaves_makes_room_for_those_behind_it() {
    let mut world = World::before_tokens("60000/min", 1000);
    world.asks(1, 1000).arrive("a");
    let huge = world.asks(1, 5000).arrive("a");
    let behind = world.asks(2, 10).arrive("a");
    world.pass(millis(500));
    world.leave(huge);
    assert_eq!(at(&world.admitted, behind), Some(500));
    assert_eq!(world.queue.next_timer(), None);
}

#[test]
fn a_models_limit_of_tokens_does_not_hold_other_models_up() {
    let mut world = World::new(None, Some(100)).with_tokens("a", ("60/min", 100));
    world.asks(1, 100).arrive("a");
    let held_up = world.asks(1, 100).arrive_for("a", MINUTE * 2);
    let other = world.asks(1, 100_000).arrive("b");
    assert_eq!(world.order(), [1, other]);
    world.pass(MINUTE * 2);
    assert_eq!(at(&world.admitted, held_up), Some(100_000));
}

#[test]
fn behind_one_who_saves_the_queue_is_bounded_too() {
    let mut world = World::before_tokens("60000/min", 1000);
    world.queue.rules.max_waiting = 5;
    world.asks(1, 500).arrive("a");
    world.asks(1, 5000).arrive("a");
    for _ in 0..100 {
        world.asks(1, 10).arrive("a");
    }
    assert_eq!((world.tickets.len(), world.refused.len()), (5, 96));
}
