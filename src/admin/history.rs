//! The last ten minutes: what was counted every five seconds, and what rates and latencies follow from it.
//!
//! Only differences are kept, of what was used in each interval, so that an idle model costs nothing. Bound: 120 intervals,
//! each of [`MOST_MODELS`] models (850 bytes) and [`MOST_CLIENTS`] clients (180 bytes) at most, the busiest: 9 MB, and some
//! hundred kilobytes where a handful are in use. What is not kept of a model counts in the sum of all.
//!
//! Pure: readings and `now` are given.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::clients::ClientId;
use crate::metrics::{Counts, Distribution, ModelReading, Reading};
use crate::models::ModelId;

/// From one sample to the next.
pub const INTERVAL: Duration = Duration::from_secs(5);

/// Samples kept: ten minutes.
pub const SAMPLES: usize = 120;

/// Models and clients kept of one interval.
const MOST_MODELS: usize = 64;
const MOST_CLIENTS: usize = 128;

/// A point of a latency's line is made from so many intervals: of one alone it would jump about.
const SMOOTHED: usize = 6;

/// What was counted lately.
pub struct History {
    previous: Reading,
    previous_at: Instant,
    /// The oldest first.
    samples: VecDeque<Sample>,
}

/// One interval.
struct Sample {
    began: Instant,
    seconds: f64,
    /// All models together.
    all: ModelReading,
    models: Vec<(ModelId, ModelReading)>,
    clients: Vec<(ClientId, Counts)>,
    /// When it ended.
    in_flight: u64,
    waiting: u64,
}

/// What was counted in a stretch of time that ends now.
pub struct Window {
    /// How long it is; shorter than asked for soon after the start.
    pub seconds: f64,
    pub all: ModelReading,
    pub models: HashMap<ModelId, ModelReading>,
    pub clients: HashMap<ClientId, Counts>,
}

/// Lines for charts, a point for each interval, the oldest first. A latency is `None` where nothing was observed.
#[derive(Default)]
pub struct Series {
    pub requests_per_second: Vec<f64>,
    pub errors_per_second: Vec<f64>,
    pub refused_per_second: Vec<f64>,
    pub tokens_per_second: Vec<f64>,
    pub duration: Quantiles,
    pub first_token: Quantiles,
    /// Of all models only.
    pub in_flight: Vec<u64>,
    pub waiting: Vec<u64>,
}

/// A latency's lines, in seconds.
#[derive(Default)]
pub struct Quantiles {
    pub p50: Vec<Option<f64>>,
    pub p95: Vec<Option<f64>>,
    pub p99: Vec<Option<f64>>,
}

impl History {
    /// Begins now, when so much was counted already.
    pub fn new(reading: Reading, now: Instant) -> Self {
        Self { previous: reading, previous_at: now, samples: VecDeque::new() }
    }

    /// An interval has ended.
    pub fn note(&mut self, reading: Reading, in_flight: u64, waiting: u64, now: Instant) {
        let mut sample = self.sample(&reading, now);
        (sample.in_flight, sample.waiting) = (in_flight, waiting);
        keep_busiest(&mut sample.models, MOST_MODELS, |model| {
            model.counts.ended() + model.attempts.iter().sum::<u64>()
        });
        keep_busiest(&mut sample.clients, MOST_CLIENTS, Counts::ended);
        if self.samples.len() >= SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
        (self.previous, self.previous_at) = (reading, now);
    }

    /// What was counted in the time before now, up to the reading of now.
    pub fn window(&self, reading: &Reading, length: Duration, now: Instant) -> Window {
        let since_last = self.sample(reading, now);
        let begins = now.checked_sub(length);
        let within = |sample: &&Sample| begins.is_none_or(|begins| sample.began >= begins);
        let mut window =
            Window { seconds: 0.0, all: ModelReading::default(), models: HashMap::new(), clients: HashMap::new() };
        for sample in self.samples.iter().rev().take_while(within).chain([&since_last]) {
            window.add(sample);
        }
        window
    }

    /// The lines of one model, or of all together.
    pub fn series(&self, model: Option<ModelId>) -> Series {
        let readings: Vec<(&Sample, ModelReading)> =
            self.samples.iter().map(|sample| (sample, sample.of(model))).collect();
        let mut series = Series::default();
        for (at, (sample, reading)) in readings.iter().enumerate() {
            let per_second = |count: u64| count as f64 / sample.seconds;
            series.requests_per_second.push(per_second(reading.counts.ended()));
            series.errors_per_second.push(per_second(reading.counts.errors()));
            series.refused_per_second.push(per_second(reading.counts.refused.iter().sum()));
            series.tokens_per_second.push(per_second(reading.counts.all_tokens()));
            let lately = &readings[(at + 1).saturating_sub(SMOOTHED)..=at];
            let lately = lately.iter().fold(ModelReading::default(), |sum, (_, reading)| sum.plus(reading));
            series.duration.add(&lately.request_duration);
            series.first_token.add(&lately.first_token);
            if model.is_none() {
                series.in_flight.push(sample.in_flight);
                series.waiting.push(sample.waiting);
            }
        }
        series
    }

    /// What was counted since the last interval ended.
    fn sample(&self, reading: &Reading, now: Instant) -> Sample {
        let before: HashMap<ModelId, &ModelReading> =
            self.previous.models.iter().map(|(id, reading)| (*id, reading)).collect();
        let models = reading
            .models
            .iter()
            .map(|(id, reading)| (*id, before.get(id).map_or(*reading, |before| reading.since(before))));
        let models: Vec<(ModelId, ModelReading)> = models.filter(|(_, reading)| !is_nothing(reading)).collect();
        let before: HashMap<ClientId, &Counts> =
            self.previous.clients.iter().map(|(id, counts)| (*id, counts)).collect();
        let clients = reading
            .clients
            .iter()
            .map(|(id, counts)| (*id, before.get(id).map_or(*counts, |before| counts.since(before))));
        Sample {
            began: self.previous_at,
            seconds: now.saturating_duration_since(self.previous_at).as_secs_f64().max(0.001),
            all: models.iter().fold(ModelReading::default(), |sum, (_, reading)| sum.plus(reading)),
            models,
            clients: clients.filter(|(_, counts)| *counts != Counts::default()).collect(),
            in_flight: 0,
            waiting: 0,
        }
    }
}

impl Sample {
    fn of(&self, model: Option<ModelId>) -> ModelReading {
        let Some(model) = model else { return self.all };
        self.models.iter().find(|(id, _)| *id == model).map_or(ModelReading::default(), |(_, reading)| *reading)
    }
}

impl Window {
    /// So many in a second.
    pub fn per_second(&self, count: u64) -> f64 {
        // Right after the start a request is not to count as a thousand a second.
        count as f64 / self.seconds.max(1.0)
    }

    fn add(&mut self, sample: &Sample) {
        self.seconds += sample.seconds;
        self.all = self.all.plus(&sample.all);
        for (id, reading) in &sample.models {
            let sum = self.models.entry(*id).or_default();
            *sum = sum.plus(reading);
        }
        for (id, counts) in &sample.clients {
            let sum = self.clients.entry(*id).or_default();
            *sum = sum.plus(counts);
        }
    }
}

impl Quantiles {
    fn add(&mut self, distribution: &Distribution) {
        self.p50.push(distribution.quantile(0.5));
        self.p95.push(distribution.quantile(0.95));
        self.p99.push(distribution.quantile(0.99));
    }
}

fn is_nothing(reading: &ModelReading) -> bool {
    let attempts: u64 = reading.attempts.iter().sum();
    reading.counts == Counts::default() && attempts == 0 && reading.queue_wait.count() == 0
}

/// Leaves those that have most.
fn keep_busiest<K, T>(all: &mut Vec<(K, T)>, most: usize, busy: impl Fn(&T) -> u64) {
    if all.len() > most {
        all.sort_by_cached_key(|(_, it)| std::cmp::Reverse(busy(it)));
        all.truncate(most);
    }
    all.shrink_to_fit();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Outcome;
    use crate::models::Models;

    /// Ids of so many models.
    fn ids(count: usize) -> Vec<ModelId> {
        let names: Vec<String> = (0..count).map(|n| format!("m{n}")).collect();
        Models::new(names.iter().map(String::as_str)).all().split_off(2)
    }

    /// So many requests of each model were served so far.
    fn reading(served: &[(ModelId, u64)]) -> Reading {
        let model = |served: u64| {
            let mut model = ModelReading::default();
            model.counts.requests[Outcome::Ok as usize] = served;
            model
        };
        Reading { models: served.iter().map(|(id, count)| (*id, model(*count))).collect(), clients: Vec::new() }
    }

    #[test]
    fn rates_follow_from_what_was_counted_between() {
        let (start, model) = (Instant::now(), ids(1)[0]);
        let mut history = History::new(reading(&[(model, 100)]), start);
        for step in 1..=24 {
            let served = 100 + 10 * u64::from(step);
            history.note(reading(&[(model, served)]), 3, 7, start + INTERVAL * step);
        }
        let now = start + INTERVAL * 24;
        let window = history.window(&reading(&[(model, 340)]), Duration::from_secs(60), now);
        assert!((window.per_second(window.all.counts.ended()) - 2.0).abs() < 0.01, "ten in five seconds");
        assert_eq!(window.models[&model].counts.ended(), window.all.counts.ended());
        let series = history.series(Some(model));
        assert_eq!(series.requests_per_second, vec![2.0; 24]);
        assert!(series.waiting.is_empty() && series.duration.p50.iter().all(Option::is_none));
        assert_eq!(history.series(None).waiting, vec![7; 24]);
    }

    #[test]
    fn what_has_just_happened_counts_at_once() {
        let (start, model) = (Instant::now(), ids(1)[0]);
        let history = History::new(Reading::default(), start);
        let window = history.window(&reading(&[(model, 6)]), Duration::from_secs(60), start + Duration::from_secs(2));
        assert!((window.per_second(6) - 3.0).abs() < 1e-9);
        let at_once = history.window(&reading(&[(model, 6)]), Duration::from_secs(60), start);
        assert!(at_once.per_second(6) <= 6.0, "not a thousand a second");
    }

    #[test]
    fn only_ten_minutes_and_the_busiest_are_kept() {
        let (start, models) = (Instant::now(), ids(200));
        let mut history = History::new(Reading::default(), start);
        for step in 1..=500_u32 {
            let served: Vec<_> = models.iter().enumerate().map(|(n, id)| (*id, u64::from(step) * n as u64)).collect();
            history.note(reading(&served), 0, 0, start + INTERVAL * step);
        }
        assert_eq!(history.samples.len(), SAMPLES);
        assert!(history.samples.iter().all(|sample| sample.models.len() == MOST_MODELS));
        let (idlest, busiest) = (history.series(Some(models[1])), history.series(Some(models[199])));
        assert!(idlest.requests_per_second.iter().all(|rate| *rate == 0.0));
        assert!(busiest.requests_per_second.iter().all(|rate| (*rate - 199.0 / 5.0).abs() < 1e-9));
        let all = history.series(None);
        assert!(all.requests_per_second.iter().all(|rate| (*rate - 19900.0 / 5.0).abs() < 1e-9), "all of them count");
    }

    #[test]
    fn an_idle_model_costs_nothing() {
        let (start, models) = (Instant::now(), ids(50));
        let served: Vec<_> = models.iter().map(|id| (*id, 5)).collect();
        let mut history = History::new(reading(&served), start);
        history.note(reading(&served), 0, 0, start + INTERVAL);
        assert!(history.samples[0].models.is_empty());
    }
}
