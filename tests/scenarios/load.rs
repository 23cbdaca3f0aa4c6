//! The requests of a run: drawn once, so that weir and the oracle have the same work.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::scenario::{Arrivals, Charge, Nanos, SECOND, Scenario};

/// The most tokens that an answer may have, where requests say so.
const MAX_OUTPUT: u64 = 500;

/// One request, as its client means it.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    pub arrives: Nanos,
    pub key: u32,
    pub model: u32,
    pub prompt: u64,
    pub output: u64,
    /// From when it is accepted to its answer's head.
    pub answer: Nanos,
    /// From its answer's head to its end.
    pub body: Nanos,
}

impl Job {
    /// What the gateway charges for it.
    pub fn charge(&self, scenario: &Scenario) -> u64 {
        match scenario.charge {
            Charge::Used => self.prompt + self.output,
            Charge::Asked => self.prompt + MAX_OUTPUT,
        }
    }
}

/// All requests, in the order of arrival.
pub fn jobs(scenario: &Scenario) -> Vec<Job> {
    let mut rng = SmallRng::seed_from_u64(scenario.seed);
    let mut arrives = 0;
    let mut job = |index| {
        if index > 0 {
            arrives += gap(scenario.arrivals, &mut rng);
        }
        Job {
            arrives,
            key: rng.random_range(0..scenario.keys),
            model: rng.random_range(0..scenario.models),
            prompt: rng.random_range(200..=1000),
            output: rng.random_range(50..=MAX_OUTPUT),
            answer: log_normal(scenario.answer, scenario.spread, &mut rng),
            body: log_normal(scenario.body, scenario.spread, &mut rng),
        }
    };
    (0..scenario.requests).map(&mut job).collect()
}

fn gap(arrivals: Arrivals, rng: &mut SmallRng) -> Nanos {
    match arrivals {
        Arrivals::AtOnce => 0,
        Arrivals::Every(gap) => gap,
        Arrivals::Poisson(mean) => {
            let chance: f64 = rng.random_range(f64::EPSILON..1.0);
            (-chance.ln() * mean as f64) as Nanos
        }
    }
}

/// Beyond three standard deviations it counts as three.
fn log_normal(median: Nanos, spread: f64, rng: &mut SmallRng) -> Nanos {
    let (radius, angle): (f64, f64) = (rng.random_range(f64::EPSILON..1.0), rng.random_range(0.0..1.0));
    let normal = (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos();
    let time = median as f64 * (spread * normal.clamp(-3.0, 3.0)).exp();
    (time as Nanos).min(600 * SECOND)
}
