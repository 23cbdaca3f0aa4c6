use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn quota(limit: u64, remaining: u64, reset: f64) -> Quota {
    Quota { limit, remaining, reset: Duration::from_secs_f64(reset) }
}

/// A quota of requests that is told, in simulated time.
struct World {
    told: Told,
    now: Instant,
}

impl World {
    /// What the first answer told, whose request was the only one.
    fn begin(quota: Quota) -> Self {
        let now = Instant::now();
        Self { told: Told::new(quota, now, 1.0, 0.0, false, now).expect("a quota that makes sense"), now }
    }

    /// Lets one pass, and hears at once what its answer tells.
    fn exchange(&mut self, quota: Quota) {
        let mark = self.told.pass(1.0, self.now);
        self.told.hear(Some(quota), Some(mark), self.now, 1.0, false, self.now);
    }

    /// How many pass at once.
    fn passing(&mut self) -> u32 {
        let mut passed = 0;
        while passed < 10_000 && self.wait_for(1.0).is_zero() {
            self.told.pass(1.0, self.now);
            passed += 1;
        }
        passed
    }

    fn wait_for(&self, charge: f64) -> Duration {
        self.told.opens_at(charge, self.now).saturating_duration_since(self.now)
    }
}

/// A gateway's bucket, as it is and as it is told.
struct Bucket {
    rate: f64,
    burst: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(rate: f64, burst: f64, at: Instant) -> Self {
        Self { rate, burst, level: burst, at }
    }

    /// One arrives: whether it was let through, and what it is told.
    fn ask(&mut self, charge: f64, now: Instant) -> (bool, Quota) {
        self.level = (self.level + (now - self.at).as_secs_f64() * self.rate).min(self.burst);
        self.at = now;
        let passes = self.level >= charge;
        self.level -= if passes { charge } else { 0.0 };
        let reset = ((self.burst - self.level) / self.rate * 1000.0).round() / 1000.0;
        (passes, quota(self.burst as u64, self.level as u64, reset))
    }
}

#[test]
fn a_buckets_rate_is_read_from_two_answers() {
    let mut world = World::begin(quota(100, 99, 0.1));
    assert!(!world.told.is_certain());
    (1..50).for_each(|used| world.exchange(quota(100, 99 - used, 0.1 * (1 + used) as f64)));
    assert!(world.told.is_certain());
    let time = world.told.time_for(100.0).as_secs_f64();
    assert!((9.5..10.5).contains(&time), "10 a second come back, and so 100 in {time} s");
}

#[test]
fn what_remains_passes_at_once_and_the_rest_as_it_comes_back() {
    let mut world = World::begin(quota(10, 9, 0.2));
    (1..5).for_each(|used| world.exchange(quota(10, 9 - used, 0.2 * (1 + used) as f64)));
    let passed = world.passing();
    assert!((4..=5).contains(&passed), "{passed} of 5 that remain");
    let wait = world.wait_for(1.0).as_secs_f64();
    assert!(wait > 0.0 && wait <= 0.4, "the next in {wait} s, where 5 a second come back");
}

#[test]
fn a_window_is_told_from_a_bucket() {
    let mut world = World::begin(quota(60, 59, 60.0));
    for used in 1..50 {
        world.now += SECOND;
        world.exchange(quota(60, 59 - used, (60 - used) as f64));
    }
    let passed = world.passing();
    assert!((5..=10).contains(&passed), "{passed} of 10 that remain");
    let wait = world.wait_for(1.0).as_secs_f64();
    assert!((10.0..12.0).contains(&wait), "nothing comes back before the window ends in 11 s: {wait}");
    world.now += Duration::from_secs(12);
    assert_eq!(world.wait_for(1.0), Duration::ZERO);
}

#[test]
fn when_a_window_has_ended_no_more_pass_than_the_next_one_holds() {
    let mut world = World::begin(quota(60, 59, 60.0));
    for used in 1..30 {
        world.now += SECOND;
        world.exchange(quota(60, 59 - used, (60 - used) as f64));
    }
    world.passing();
    world.now += 32 * SECOND;
    let passed = world.passing();
    assert!((55..=60).contains(&passed), "{passed} of 60");
}

#[test]
fn what_is_under_way_counts() {
    let now = Instant::now();
    // The answer tells how it stood when its request was sent; seven have passed since.
    let told = Told::new(quota(10, 9, 0.2), now, 1.0, 7.0, false, now).expect("a quota");
    let passed = World { told, now }.passing();
    assert!((1..=2).contains(&passed), "{passed} of 2");
}

#[test]
fn too_high_a_level_is_lowered_at_once() {
    let mut world = World::begin(quota(100, 99, 1.0));
    (1..10).for_each(|used| world.exchange(quota(100, 99 - used, (1 + used) as f64)));
    // Somebody else has used much of it.
    world.exchange(quota(100, 5, 95.0));
    let passed = world.passing();
    assert!((4..=5).contains(&passed), "{passed} of 5");
}

#[test]
fn too_low_a_level_is_raised_only_when_three_answers_say_so() {
    let mut world = World::begin(quota(100, 99, 1.0));
    (1..96).for_each(|used| world.exchange(quota(100, 99 - used, (1 + used) as f64)));
    // Four remain; now they tell of more.
    for remaining in [25, 24] {
        world.exchange(quota(100, remaining, (100 - remaining) as f64));
        assert!(world.told.available_at(10.0, world.now) > world.now, "one answer may be wrong");
    }
    world.exchange(quota(100, 23, 77.0));
    let passed = world.passing();
    assert!((19..=23).contains(&passed), "{passed} of 23");
}

#[test]
fn answers_that_come_late_correct_once() {
    let mut world = World::begin(quota(100, 99, 1.0));
    (1..10).for_each(|used| world.exchange(quota(100, 99 - used, (1 + used) as f64)));
    // Somebody else has used 50. Ten leave before that is known, and come back in any order.
    let mut under_way: Vec<(Mark, Quota)> = Vec::new();
    for used in 0..10 {
        let remaining = 39 - used;
        under_way.push((world.told.pass(1.0, world.now), quota(100, remaining, (100 - remaining) as f64)));
    }
    for at in [3, 0, 1, 5, 9, 2, 4, 8, 6, 7] {
        let (mark, quota) = under_way[at];
        world.told.hear(Some(quota), Some(mark), world.now, 1.0, false, world.now);
    }
    let passed = world.passing();
    assert!((28..=30).contains(&passed), "{passed} of 30");
}

#[test]
fn answers_out_of_order_change_nothing_that_is_right() {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut world = World::begin(quota(1000, 999, 1.0));
    let mut bucket = Bucket::new(1.0, 1000.0, world.now);
    bucket.ask(1.0, world.now);
    let mut under_way: Vec<(Mark, Quota)> = Vec::new();
    for _ in 0..500 {
        under_way.push((world.told.pass(1.0, world.now), bucket.ask(1.0, world.now).1));
        while under_way.len() > 40 {
            let (mark, quota) = under_way.swap_remove(rng.random_range(0..under_way.len()));
            world.told.hear(Some(quota), Some(mark), world.now, 1.0, false, world.now);
        }
    }
    let passed = f64::from(world.passing());
    assert!((bucket.level - 2.0..=bucket.level).contains(&passed), "{passed} of {}", bucket.level);
}

#[test]
fn a_refused_one_is_not_charged() {
    let mut world = World::begin(quota(10, 9, 1.0));
    (1..10).for_each(|used| world.exchange(quota(10, 9 - used, (1 + used) as f64)));
    for round in 0..20 {
        let wait = world.wait_for(1.0);
        assert!(wait <= 2 * SECOND, "round {round}: {wait:?}, where one comes back in a second");
        world.now += wait;
        let mark = world.told.pass(1.0, world.now);
        world.told.hear(Some(quota(10, 0, 10.0)), Some(mark), world.now, 1.0, true, world.now);
    }
}

#[test]
fn what_was_never_sent_comes_back() {
    let mut world = World::begin(quota(10, 9, 1.0));
    let passed = world.passing();
    (0..passed).for_each(|_| world.told.take_back(1.0));
    assert_eq!(world.passing(), passed);
}

#[test]
fn after_32_answers_without_it_it_is_forgotten() {
    let mut world = World::begin(quota(10, 0, 3600.0));
    for _ in 0..32 {
        assert!(world.told.is_told());
        let mark = world.told.pass(1.0, world.now);
        world.told.hear(None, Some(mark), world.now, 1.0, false, world.now);
    }
    assert!(!world.told.is_told());
}

#[test]
fn one_answer_that_tells_of_it_again_is_enough_to_keep_it() {
    let mut world = World::begin(quota(10, 5, 5.0));
    for round in 0..200 {
        let mark = world.told.pass(1.0, world.now);
        let quota = (round % 20 == 0).then(|| quota(10, 5, 5.0));
        world.told.hear(quota, Some(mark), world.now, 1.0, false, world.now);
        assert!(world.told.is_told());
    }
}

#[test]
fn a_quota_of_nothing_is_none() {
    let now = Instant::now();
    assert!(Told::new(quota(0, 0, 0.0), now, 1.0, 0.0, false, now).is_none());
    assert!(Told::new(quota(0, 5, 1.0), now, 1.0, 0.0, true, now).is_none());
}

/// Hears all these, and says when the next may pass.
fn opening_after(quotas: &[Quota], charge: f64, guesses: bool) -> Duration {
    let mut now = Instant::now();
    let Some(mut told) = Told::new(quotas[0], now, charge, 0.0, guesses, now) else { return Duration::ZERO };
    for quota in &quotas[1..] {
        now += Duration::from_millis(100);
        if told.opens_at(charge, now) <= now {
            let mark = told.pass(charge, now);
            told.hear(Some(*quota), Some(mark), now, charge, false, now);
        } else {
            told.hear(Some(*quota), None, now, charge, false, now);
        }
    }
    told.available_at(1e6, now);
    told.time_for(1e6);
    told.opens_at(charge, now) - now
}

const ABSURD: [(u64, u64, f64); 8] = [
    (u64::MAX, u64::MAX, 0.0),
    (u64::MAX, 0, 86_400.0),
    (1, u64::MAX, 0.0),
    (1, 0, 0.0),
    (10, 100, 0.0),
    (10, 10, 86_400.0),
    (10, 3, 0.0),
    (60, 30, 30.0),
];

#[test]
fn a_quota_that_makes_no_sense_closes_nothing_for_longer_than_a_day() {
    for (limit, remaining, reset) in ABSURD {
        for (charge, guesses) in [(1.0, false), (1.0, true), (500.0, true), (5e7, true)] {
            let opens = opening_after(&[quota(limit, remaining, reset); 20], charge, guesses);
            assert!(opens <= Duration::from_secs(86_400), "{limit} {remaining} {reset}: {opens:?}");
        }
    }
}

#[test]
fn nor_do_many_of_them_mixed() {
    let mut rng = SmallRng::seed_from_u64(7);
    for round in 0..500 {
        let quotas: Vec<Quota> = (0..20)
            .map(|_| ABSURD[rng.random_range(0..ABSURD.len())])
            .map(|(limit, remaining, reset)| quota(limit, remaining, reset))
            .collect();
        let (charge, guesses) = [(1.0, false), (1.0, true), (500.0, true)][round % 3];
        let mut now = Instant::now();
        let Some(mut told) = Told::new(quotas[0], now, charge, 0.0, guesses, now) else { continue };
        let mut under_way = Vec::new();
        for quota in &quotas[1..] {
            now += Duration::from_millis(rng.random_range(0..2000));
            if told.opens_at(charge, now) <= now {
                under_way.push((told.pass(charge, now), now));
            }
            if rng.random_bool(0.5) && !under_way.is_empty() {
                let (mark, sent_at) = under_way.swap_remove(rng.random_range(0..under_way.len()));
                told.hear(Some(*quota), Some(mark), sent_at, charge, false, now);
            }
        }
        // Whatever it waits for, within two days all is back.
        for _ in 0..2 {
            now = told.opens_at(charge, now).max(now);
        }
        assert!(told.opens_at(charge, now) <= now, "round {round}: {:?} more", told.opens_at(charge, now) - now);
    }
}

#[test]
fn more_than_it_ever_holds_passes_when_it_is_full() {
    let mut world = World::begin(quota(10, 9, 1.0));
    (1..9).for_each(|used| world.exchange(quota(10, 9 - used, (1 + used) as f64)));
    let wait = world.wait_for(1000.0);
    assert!(wait > 5 * SECOND && wait <= 15 * SECOND, "{wait:?}");
}

#[test]
fn and_those_behind_it_wait_no_longer_than_until_it_is_full_again() {
    let mut world = World::begin(quota(10, 9, 1.0));
    (1..9).for_each(|used| world.exchange(quota(10, 9 - used, (1 + used) as f64)));
    world.now += world.wait_for(1000.0);
    world.told.pass(1000.0, world.now);
    assert!(world.wait_for(1.0) <= 60 * SECOND, "{:?}", world.wait_for(1.0));
}

/// What a gateway saw of a client that only does what is told.
#[derive(Debug, Default)]
struct Outcome {
    served: u32,
    refused: u32,
    seconds: f64,
}

/// A request whose answer is on its way, and what that tells.
struct Answering {
    mark: Option<Mark>,
    sent_at: Instant,
    refused: bool,
    quota: Quota,
}

/// Sends `requests` to a bucket, each as soon as what was told lets it pass; answers take `latency`, more or less. Counts after
/// the first 50.
fn follow(bucket: &mut Bucket, latency: Duration, requests: u32, rng: &mut SmallRng) -> Outcome {
    let mut now = bucket.at;
    let mut told: Option<Told> = None;
    let mut under_way: BTreeMap<(Instant, u32), Answering> = BTreeMap::new();
    let (mut outcome, mut counted_since) = (Outcome::default(), now);
    for sent in 0..requests {
        loop {
            let opens_at = match &told {
                // Of a new lane one is sent, and heard, before the rest.
                None if sent > 0 => now + 3600 * SECOND,
                None => now,
                Some(told) => told.opens_at(1.0, now).max(now),
            };
            let next = under_way.first_key_value().map(|((at, _), _)| *at);
            if next.is_none_or(|next| opens_at <= next) {
                now = opens_at;
                break;
            }
            let ((at, number), Answering { mark, sent_at, refused, quota }) = under_way.pop_first().expect("just seen");
            now = at;
            match &mut told {
                Some(told) => told.hear(Some(quota), mark, sent_at, 1.0, refused, now),
                None => told = Told::new(quota, sent_at, 1.0, f64::from(sent - number - 1), false, now),
            }
        }
        if sent == 50 {
            (outcome, counted_since) = (Outcome::default(), now);
        }
        let mark = told.as_mut().map(|told| told.pass(1.0, now));
        let (passes, quota) = bucket.ask(1.0, now);
        outcome.served += u32::from(passes);
        outcome.refused += u32::from(!passes);
        // Refusals come at once.
        let after = if passes { latency.mul_f64(rng.random_range(0.5..1.5)) } else { latency / 10 };
        under_way.insert((now + after, sent), Answering { mark, sent_at: now, refused: !passes, quota });
    }
    outcome.seconds = (now - counted_since).as_secs_f64();
    outcome
}

#[test]
fn a_bucket_that_is_told_is_used_up_and_hardly_ever_refuses() {
    for seed in 0..40 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (rate, burst) = (rng.random_range(0.5..200.0), f64::from(rng.random_range(2..200)));
        let latency = Duration::from_millis(rng.random_range(10..2000));
        let mut bucket = Bucket::new(rate, burst, Instant::now());
        let outcome = follow(&mut bucket, latency, 500, &mut rng);
        let asked = f64::from(outcome.served + outcome.refused);
        let what = format!("seed {seed}: {rate:.2}/s, burst {burst}, {latency:?}: {outcome:?}");
        assert!(f64::from(outcome.refused) <= 0.02 * asked, "{what}");
        assert!(f64::from(outcome.served) >= 0.9 * rate * outcome.seconds, "{what}");
    }
}

#[test]
fn a_charge_factor_is_learned() {
    // The gateway takes three tokens for what weir takes for one.
    let mut now = Instant::now();
    let mut bucket = Bucket::new(1000.0, 10_000.0, now);
    let (_, first) = bucket.ask(300.0, now);
    let mut told = Told::new(first, now, 100.0, 0.0, true, now).expect("a quota");
    for _ in 0..200 {
        now = told.opens_at(100.0, now).max(now);
        let mark = told.pass(100.0, now);
        let (passes, quota) = bucket.ask(300.0, now);
        told.hear(Some(quota), Some(mark), now, 100.0, !passes, now);
    }
    let time = told.time_for(100.0).as_secs_f64();
    assert!((0.25..0.36).contains(&time), "100 of weir's take {time} s to come back");
}
