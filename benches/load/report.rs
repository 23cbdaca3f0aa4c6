//! Samples of durations, and what is said of them.

use std::time::Duration;

use serde_json::{Value, json};

#[derive(Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    pub fn add(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The median, the 99th percentile and the greatest, in microseconds.
    pub fn summary(mut self) -> Value {
        self.0.sort_unstable();
        let at = |share: f64| {
            let last = self.0.len().checked_sub(1)?;
            Some(microseconds(self.0[(last as f64 * share).round() as usize]))
        };
        json!({ "p50": at(0.5), "p99": at(0.99), "max": at(1.0) })
    }
}

/// To the tenth.
pub fn microseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e7).round() / 10.0
}
