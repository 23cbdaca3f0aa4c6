//! What weir is held to in front of each kind of gateway: one test a row, over seeds, quotas and latencies.

use super::figures::Figures;
use super::scenario::{Charge, Faults, Hints, MILLI, Manner, Nanos, Outage, SECOND, Scenario, Shape, Told};
use super::{sweep, world};

const MINUTE: Nanos = 60 * SECOND;

/// The bounds of a row.
struct Row {
    efficiency: f64,
    refusals: f64,
}

impl Row {
    /// Runs each scenario with each seed, and tells of all that miss a bound, not of the first alone.
    fn holds_for(&self, scenarios: &[Scenario]) {
        let wrong = complaints(scenarios, |_, figures| {
            figures.efficiency >= self.efficiency && figures.refusals <= self.refusals && figures.errors == 0
        });
        let Self { efficiency, refusals } = self;
        assert!(
            wrong.is_empty(),
            "at least {efficiency}, refusals at most {refusals}, no errors:\n{}",
            wrong.join("\n")
        );
    }
}

/// Those of the runs that are not as they should be.
fn complaints(scenarios: &[Scenario], is_good: impl Fn(&Scenario, &Figures) -> bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for scenario in scenarios {
        for seed in 1..=sweep::seeds(2) {
            let scenario = Scenario { seed, ..scenario.clone() };
            let figures = world::run(&scenario);
            println!("{scenario}\n    {figures}");
            let sound = figures.violations.is_empty() && figures.budget <= 1.0;
            if !sound || !is_good(&scenario, &figures) {
                wrong.push(format!("{scenario}\n    {figures} {:?}", figures.violations));
            }
        }
    }
    wrong
}

/// A batch at once: what is served takes as long as the gateway lets it.
fn batch(requests: u32, answer: Nanos) -> Scenario {
    Scenario { requests, answer, ..Scenario::default() }
}

/// Caps with latencies from 50 ms to 5 s.
fn capped() -> Vec<Scenario> {
    let sets = [
        (2000, 50 * MILLI, 5),
        (1000, 300 * MILLI, 20),
        (600, 300 * MILLI, 3),
        (600, SECOND, 40),
        (1500, 5 * SECOND, 100),
    ];
    sets.map(|(requests, answer, cap)| Scenario { cap: Some(cap), ..batch(requests, answer) }).into()
}

/// Buckets of requests with latencies from 50 ms to 5 s. Each holds more than the way's jitter is worth: a bucket of one
/// refuses also those who know it.
fn rated() -> Vec<Scenario> {
    let sets = [
        (600, 50 * MILLI, Shape::bucket(600, MINUTE, 10)),
        (1500, 300 * MILLI, Shape::bucket(600, MINUTE, 60)),
        (1000, 300 * MILLI, Shape::bucket(3000, MINUTE, 5)),
        (600, SECOND, Shape::bucket(20, SECOND, 20)),
        (6000, 300 * MILLI, Shape::bucket(6000, MINUTE, 600)),
        (1500, 2 * SECOND, Shape::bucket(1200, MINUTE, 20)),
    ];
    sets.map(|(requests, answer, quota)| Scenario { requests_quota: Some(quota), ..batch(requests, answer) }).into()
}

fn each(scenarios: Vec<Scenario>, change: impl Fn(&mut Scenario)) -> Vec<Scenario> {
    let mut scenarios = scenarios;
    scenarios.iter_mut().for_each(change);
    scenarios
}

/// Windows of two seconds to a minute, which begin at odd times.
fn windowed() -> Vec<Scenario> {
    let sets = [
        (400, 50 * MILLI, Shape::fixed(40, 2 * SECOND, 700 * MILLI)),
        (300, 300 * MILLI, Shape::fixed(50, 5 * SECOND, 0)),
        (500, SECOND, Shape::fixed(100, 10 * SECOND, 3300 * MILLI)),
        (1000, 300 * MILLI, Shape::fixed(600, MINUTE, 30 * SECOND)),
        (300, 5 * SECOND, Shape::fixed(100, 15 * SECOND, 5 * SECOND)),
    ];
    sets.map(|(requests, answer, quota)| Scenario { requests_quota: Some(quota), ..batch(requests, answer) }).into()
}

/// Quotas of tokens; a request costs some 900 of them, or with the most that its answer may have 1,100.
fn token_rated() -> Vec<Scenario> {
    let sets = [
        (600, 50 * MILLI, Shape::bucket(600_000, MINUTE, 60_000), Charge::Used, 1.0),
        (500, 300 * MILLI, Shape::bucket(900_000, MINUTE, 30_000), Charge::Used, 1.3),
        (2500, SECOND, Shape::bucket(2_000_000, MINUTE, 200_000), Charge::Asked, 1.0),
        (1500, 300 * MILLI, Shape::bucket(200_000, 10 * SECOND, 200_000), Charge::Asked, 0.8),
        (1000, 5 * SECOND, Shape::bucket(10_000, SECOND, 10_000), Charge::Used, 1.0),
    ];
    let scenario = |(requests, answer, quota, charge, estimate)| Scenario {
        tokens_quota: Some(quota),
        charge,
        estimate,
        hints: Hints::OpenAi,
        ..batch(requests, answer)
    };
    sets.map(scenario).into()
}

/// Gateways without a quota: what weir is told is all there is.
fn unlimited() -> Vec<Scenario> {
    let sets = [(300, 50 * MILLI, 2), (1000, 300 * MILLI, 20), (600, SECOND, 40), (400, 5 * SECOND, 100)];
    let told = |slots| Told { slots: Some(slots), ..Told::default() };
    sets.map(|(requests, answer, slots)| Scenario { told: told(slots), ..batch(requests, answer) }).into()
}

#[test]
fn nothing_told_by_the_gateway_but_the_concurrency_by_the_operator() {
    let scenarios = each(capped(), |scenario| scenario.told.slots = scenario.cap);
    Row { efficiency: 0.97, refusals: 0.005 }.holds_for(&scenarios);
}

#[test]
fn nothing_told_by_the_gateway_but_the_rate_by_the_operator() {
    let scenarios = each(rated(), |scenario| scenario.told.requests = scenario.requests_quota);
    Row { efficiency: 0.97, refusals: 0.005 }.holds_for(&scenarios);
}

#[test]
fn a_concurrency_cap_without_a_hint() {
    Row { efficiency: 0.85, refusals: 0.05 }.holds_for(&capped());
}

#[test]
fn a_rate_with_the_headers_of_openai() {
    let scenarios = each(rated(), |scenario| scenario.hints = Hints::OpenAi);
    Row { efficiency: 0.95, refusals: 0.005 }.holds_for(&scenarios);
}

#[test]
fn a_fixed_window_with_retry_after_only() {
    let scenarios = each(windowed(), |scenario| scenario.hints = Hints::RetryAfter);
    Row { efficiency: 0.90, refusals: 0.05 }.holds_for(&scenarios);
}

#[test]
fn a_rate_without_any_header() {
    Row { efficiency: 0.85, refusals: 0.06 }.holds_for(&rated());
}

#[test]
fn a_token_rate_with_headers() {
    Row { efficiency: 0.92, refusals: 0.01 }.holds_for(&token_rated());
}

#[test]
fn four_seconds_of_503_in_the_middle() {
    let told_cap = each(capped(), |scenario| scenario.told.slots = scenario.cap);
    let told_rate = each(rated(), |scenario| scenario.told.requests = scenario.requests_quota);
    let headers = each(rated(), |scenario| scenario.hints = Hints::OpenAi);
    let all = [told_cap, told_rate, headers, capped()].concat();
    let scenarios = each(all, |scenario| {
        scenario.outage = Some(Outage { from: 8 * SECOND, to: 12 * SECOND, manner: Manner::Error(None) });
    });
    let wrong = complaints(&scenarios, |scenario, figures| {
        let requests = f64::from(scenario.requests);
        let is_back = figures.recovery.is_some_and(|seconds| seconds <= 2.0);
        let few_attempts = figures.attempts * requests <= 1.2 * requests + 10.0;
        is_back && few_attempts && figures.errors == 0 && !figures.has_spike(scenario)
    });
    assert!(wrong.is_empty(), "back within 2 s, no spike, few attempts, no errors:\n{}", wrong.join("\n"));
}

#[test]
fn one_in_eight_fails() {
    let scenarios = each(unlimited(), |scenario| {
        scenario.faults = Faults { error: 0.05, reset: 0.03, error_first: 0.05 };
        scenario.body = SECOND;
    });
    let told_nothing = each(scenarios.clone(), |scenario| scenario.told = Told::default());
    let wrong = complaints(&[scenarios, told_nothing].concat(), |_, figures| figures.errors == 0);
    assert!(wrong.is_empty(), "no errors:\n{}", wrong.join("\n"));
}
