//! Many gateways of many kinds: what must hold before any of them, and how good weir is in front of each kind.
//!
//! - `WEIR_SCENARIO_SEEDS=200 cargo test --release --test scenarios sweep -- --nocapture --include-ignored` prints for each
//!   kind the worst, the twentieth and the median of each figure, and the scenario with the worst. The table's rows take as
//!   many seeds, too, and with `--nocapture` print each of their runs.
//! - `WEIR_SCENARIO="cap=20 requests=1000 seed=3" cargo test --release --test scenarios replay -- --nocapture` runs one
//!   scenario, as it is printed here, and shows its timeline: quarters of a second, those without any event left out.

use std::fmt::Write as _;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::figures::Figures;
use super::scenario::{
    Arrivals, Change, Charge, Faults, Hints, MILLI, Manner, Nanos, NewLimit, Outage, SECOND, Scenario, Shape,
};
use super::world;

const MINUTE: Nanos = 60 * SECOND;

/// No scenario of a sweep has more requests.
const MOST_REQUESTS: f64 = 3000.0;

/// How many seeds to try.
pub fn seeds(default: u64) -> u64 {
    std::env::var("WEIR_SCENARIO_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A kind of gateway, of which a seed draws one.
type Family = (&'static str, fn(&mut SmallRng) -> Scenario);

const FAMILIES: [Family; 14] = [
    ("a cap", |rng| capped(rng)),
    ("a cap that changes", |rng| with_new_cap(capped(rng), rng)),
    ("a rate, OpenAI's headers", |rng| with_hints(rated(rng), Hints::OpenAi, rng)),
    ("a rate, its standing only", |rng| with_hints(rated(rng), Hints::Standing, rng)),
    ("a rate, retry-after", |rng| with_hints(rated(rng), Hints::RetryAfter, rng)),
    ("a rate, nothing told", |rng| rated(rng)),
    ("a rate that changes", |rng| with_new_rate(with_any_hints(rated(rng), rng), rng)),
    ("a rate that others use too", |rng| with_others(with_any_hints(rated(rng), rng))),
    ("a fixed window", |rng| with_any_hints(fixed(rng), rng)),
    ("a sliding window", |rng| with_any_hints(sliding(rng), rng)),
    ("tokens", |rng| with_any_hints(tokens(rng), rng)),
    ("several lanes", |rng| with_lanes(with_any_hints(rated(rng), rng), rng)),
    ("an outage", |rng| with_outage(with_any_hints(rated(rng), rng), rng)),
    ("a cap and faults", |rng| with_faults(capped(rng))),
];

#[test]
fn every_request_ends_once_and_nothing_is_lost_whatever_the_gateway_is_like() {
    let mut wrong = Vec::new();
    for family in FAMILIES {
        let runs = run(family);
        print!("{}", report(family.0, &runs));
        let unsound = runs.iter().filter(|(_, figures)| !figures.violations.is_empty() || figures.budget > 1.0);
        wrong.extend(unsound.map(|(scenario, figures)| format!("{scenario}\n    {figures} {:?}", figures.violations)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_is_sent_while_the_gateway_asks_to_wait() {
    let runs = FAMILIES.into_iter().flat_map(run);
    let wrong: Vec<String> = runs
        .filter(|(_, figures)| figures.early > 0)
        .map(|(scenario, figures)| format!("{scenario}\n    {figures}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_same_scenario_takes_the_same_course() {
    let scenario = with_faults(capped(&mut SmallRng::seed_from_u64(7)));
    assert_eq!(world::run(&scenario).timeline(), world::run(&scenario).timeline());
}

#[test]
fn replay() {
    let Ok(line) = std::env::var("WEIR_SCENARIO") else { return };
    let scenario: Scenario = line.parse().unwrap_or_else(|error| panic!("{error}"));
    let begun = std::time::Instant::now();
    let figures = world::run(&scenario);
    println!("{scenario}\n{}{figures}", figures.timeline());
    println!("{} events in {:.3} s", figures.events, begun.elapsed().as_secs_f64());
    assert!(figures.violations.is_empty(), "{:?}", figures.violations);
}

fn run((family, draw): Family) -> Vec<(Scenario, Figures)> {
    let scenario = |seed: u64| {
        let of_family = family.bytes().fold(seed, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut rng = SmallRng::seed_from_u64(of_family);
        let scenario = Scenario { seed, ..draw(&mut rng) };
        // What is read from its line is what is run, to the nanosecond.
        scenario.to_string().parse::<Scenario>().expect("a scenario is read as it was written")
    };
    let mut runs: Vec<(Scenario, Figures)> = Vec::new();
    for scenario in (1..=seeds(2)).map(scenario) {
        let figures = world::run(&scenario);
        runs.push((scenario, figures));
    }
    runs
}

/// The worst, the twentieth and the median of each figure.
fn report(family: &str, runs: &[(Scenario, Figures)]) -> String {
    /// A figure's name, and how bad it is.
    type Badness = (&'static str, fn(&Figures) -> f64);
    const FIGURES: [Badness; 6] = [
        ("efficiency", |figures| -figures.efficiency),
        ("refusals", |figures| figures.refusals),
        ("errors", |figures| figures.errors as f64),
        ("attempts", |figures| figures.attempts),
        ("early", |figures| figures.early as f64),
        ("recovery", |figures| figures.recovery.unwrap_or_default()),
    ];
    let mut text = format!("{family}: {} runs\n", runs.len());
    for (name, badness) in FIGURES {
        let mut ranked: Vec<(f64, &Scenario)> = runs.iter().map(|(scenario, it)| (badness(it), scenario)).collect();
        ranked.sort_by(|one, other| other.0.total_cmp(&one.0));
        let at = |part: f64| ranked[(ranked.len() as f64 * part) as usize].0.abs();
        let (worst, scenario) = ranked[0];
        if worst != 0.0 {
            let (twentieth, median) = (at(0.05), at(0.5));
            let worst = worst.abs();
            writeln!(text, "  {name:<10} {worst:8.4} {twentieth:8.4} {median:8.4}   {scenario}").expect("text grows");
        }
    }
    text
}

/// As likely in each order of magnitude.
fn log_uniform(rng: &mut SmallRng, least: f64, most: f64) -> f64 {
    (rng.random_range(least.ln()..most.ln())).exp()
}

/// In whole milliseconds, so that a scenario's line stays short.
fn log_uniform_seconds(rng: &mut SmallRng, least: f64, most: f64) -> Nanos {
    (log_uniform(rng, least, most) * 1000.0) as Nanos * MILLI
}

fn plain(rng: &mut SmallRng) -> Scenario {
    let way = log_uniform_seconds(rng, 0.001, 0.05);
    Scenario {
        answer: log_uniform_seconds(rng, 0.05, 5.0),
        spread: f64::from(rng.random_range(0..=6)) / 10.0,
        body: if rng.random_bool(0.3) { log_uniform_seconds(rng, 0.1, 10.0) } else { 0 },
        network: (way / 2, way),
        ..Scenario::default()
    }
}

/// As many requests as take about this long, given how many are served in a second and at once. One in three scenarios has
/// them come one by one, a little faster than they are served.
fn loaded(scenario: Scenario, per_second: f64, at_once: f64, rng: &mut SmallRng) -> Scenario {
    let seconds = rng.random_range(10.0..60.0f64).max((5.0 / per_second).min(200.0));
    let requests = (at_once + per_second * seconds).clamp(5.0, MOST_REQUESTS);
    let gap = ((1_000_000.0 / (per_second * 1.1)) as Nanos).max(1) * (MILLI / 1000);
    let arrivals = match rng.random_range(0..6) {
        0 => Arrivals::Every(gap),
        1 => Arrivals::Poisson(gap),
        _ => Arrivals::AtOnce,
    };
    Scenario { requests: requests as u32, arrivals, ..scenario }
}

fn capped(rng: &mut SmallRng) -> Scenario {
    let scenario = plain(rng);
    let cap = log_uniform(rng, 1.0, 500.0);
    let per_second = cap * SECOND as f64 / (scenario.answer + scenario.body) as f64;
    Scenario { cap: Some(cap as u32), ..loaded(scenario, per_second, 0.0, rng) }
}

/// Requests a minute.
fn count(rng: &mut SmallRng) -> u64 {
    log_uniform(rng, 1.0, 10_000.0) as u64
}

fn of_quota(quota: Shape, rng: &mut SmallRng) -> Scenario {
    let per_second = quota.count as f64 * SECOND as f64 / quota.period as f64;
    let scenario = Scenario { requests_quota: Some(quota), ..plain(rng) };
    loaded(scenario, per_second, quota.burst() as f64, rng)
}

fn rated(rng: &mut SmallRng) -> Scenario {
    let count = count(rng);
    let burst = match rng.random_range(0..3) {
        0 => 1,
        1 => (count / 10).max(1),
        _ => count,
    };
    of_quota(Shape::bucket(count, MINUTE, burst), rng)
}

/// A window, and its count, of which a minute has as many as any rate of the sweep.
fn window(rng: &mut SmallRng) -> (u64, Nanos) {
    let period = [SECOND, 10 * SECOND, MINUTE][rng.random_range(0..3)];
    ((count(rng) * period / MINUTE).max(1), period)
}

fn fixed(rng: &mut SmallRng) -> Scenario {
    let (count, period) = window(rng);
    let phase = rng.random_range(0..period / MILLI) * MILLI;
    of_quota(Shape::fixed(count, period, phase), rng)
}

fn sliding(rng: &mut SmallRng) -> Scenario {
    let (count, period) = window(rng);
    of_quota(Shape::sliding(count, period), rng)
}

fn tokens(rng: &mut SmallRng) -> Scenario {
    /// What a request costs, about, and at most.
    const USUAL: u64 = 1000;
    const MOST: u64 = 1500;
    let count = count(rng).max(10) * USUAL;
    let burst = (count / [1, 4, 10][rng.random_range(0..3)]).max(MOST);
    let scenario = Scenario {
        tokens_quota: Some(Shape::bucket(count, MINUTE, burst)),
        charge: [Charge::Used, Charge::Asked][rng.random_range(0..2)],
        estimate: f64::from(rng.random_range(7..=14)) / 10.0,
        ..plain(rng)
    };
    loaded(scenario, count as f64 / USUAL as f64 / 60.0, burst as f64 / USUAL as f64, rng)
}

fn with_hints(scenario: Scenario, hints: Hints, rng: &mut SmallRng) -> Scenario {
    Scenario { hints, standing_at_answer: rng.random_bool(0.3), ..scenario }
}

fn with_any_hints(scenario: Scenario, rng: &mut SmallRng) -> Scenario {
    let hints = [Hints::OpenAi, Hints::Standing, Hints::RetryAfter, Hints::None][rng.random_range(0..4)];
    with_hints(scenario, hints, rng)
}

fn with_new_cap(scenario: Scenario, rng: &mut SmallRng) -> Scenario {
    let cap = f64::from(scenario.cap.unwrap_or(10));
    let change = |at, rng: &mut SmallRng| {
        let cap = (cap * log_uniform(rng, 0.3, 3.0)) as u32;
        Change { at, to: NewLimit::Cap(cap.max(1)) }
    };
    let changes = vec![change(10 * SECOND, rng), change(25 * SECOND, rng)];
    Scenario { changes, ..scenario }
}

fn with_new_rate(scenario: Scenario, rng: &mut SmallRng) -> Scenario {
    let count = scenario.requests_quota.map_or(60.0, |quota| quota.count as f64);
    let change = |at, rng: &mut SmallRng| {
        let count = (count * log_uniform(rng, 0.3, 3.0)) as u64;
        Change { at, to: NewLimit::Requests(count.max(1)) }
    };
    let changes = vec![change(10 * SECOND, rng), change(25 * SECOND, rng)];
    Scenario { changes, ..scenario }
}

/// They use a third of it.
fn with_others(scenario: Scenario) -> Scenario {
    let others = scenario.requests_quota.map_or(1.0, |quota| (quota.count as f64 / 1.8).ceil() / 100.0);
    Scenario { others, ..scenario }
}

fn with_lanes(scenario: Scenario, rng: &mut SmallRng) -> Scenario {
    let (models, keys) = (rng.random_range(1..=3), rng.random_range(1..=4));
    Scenario { models, keys, per_model: rng.random_bool(0.5), ..scenario }
}

fn with_outage(scenario: Scenario, rng: &mut SmallRng) -> Scenario {
    let from = rng.random_range(2..10) * SECOND;
    let manner = match rng.random_range(0..4) {
        0 => Manner::Error(None),
        1 => Manner::Error(Some(rng.random_range(1..4) * SECOND)),
        2 => Manner::RefusesConnections,
        _ => Manner::Hangs,
    };
    let outage = Outage { from, to: from + rng.random_range(1..6) * SECOND, manner };
    Scenario { outage: Some(outage), timeout: 10 * SECOND, ..scenario }
}

fn with_faults(scenario: Scenario) -> Scenario {
    Scenario { faults: Faults { error: 0.05, reset: 0.03, error_first: 0.05 }, ..scenario }
}
