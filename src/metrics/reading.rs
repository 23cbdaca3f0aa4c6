//! What was counted so far, as numbers: for who derives rates from two readings.

use prometheus::core::Metric as _;

use super::*;

/// The most buckets that a histogram here has.
const MOST_BUCKETS: usize = 19;

/// All that was counted so far.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// Every model that was asked for since the start.
    pub models: Vec<(ModelId, ModelReading)>,
    /// Every client that asked for anything since the start.
    pub clients: Vec<(ClientId, Counts)>,
}

/// What was counted of one model.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ModelReading {
    /// All clients together.
    pub counts: Counts,
    /// By [`AttemptResult`].
    pub attempts: [u64; AttemptResult::ALL.len()],
    /// By how the attempt before had ended.
    pub retries: [u64; AttemptResult::ALL.len()],
    pub request_duration: Distribution,
    pub first_token: Distribution,
    pub queue_wait: Distribution,
}

/// What was counted of a client, or of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// By [`Outcome`].
    pub requests: [u64; Outcome::ALL.len()],
    /// By [`RefusedBy`].
    pub refused: [u64; RefusedBy::ALL.len()],
    /// As `refused`, of limits that only observe.
    pub observed: [u64; RefusedBy::ALL.len()],
    /// By [`TokenKind`].
    pub tokens: [u64; TokenKind::ALL.len()],
}

/// How many observations fell into which bucket.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Distribution {
    /// The first bucket's upper bound, in seconds; each further one's is twice the one before.
    first_bound: f64,
    /// How many buckets have a bound.
    bounded: usize,
    /// Each bucket for itself; behind those with a bound comes what was beyond all.
    counts: [u64; MOST_BUCKETS + 1],
}

impl Metrics {
    /// Reads everything. It takes no lock that a request waits for.
    pub fn read(&self) -> Reading {
        let ids = self.models.all();
        let mut models: Vec<(ModelId, ModelReading)> = Vec::new();
        let mut clients: Vec<(ClientId, Counts)> = Vec::new();
        for id in &ids {
            let Some(metrics) = self.per_model.find(*id) else { continue };
            models.push((*id, metrics.read()));
        }
        for (client, pairs) in ClientId::all().zip(self.clients.iter()) {
            let mut of_client = Counts::default();
            for (model, reading) in &mut models {
                let Some(pair) = pairs.per_model.find(*model) else { continue };
                let counts = pair.read();
                of_client = of_client.plus(&counts);
                reading.counts = reading.counts.plus(&counts);
            }
            if of_client != Counts::default() {
                clients.push((client, of_client));
            }
        }
        Reading { models, clients }
    }
}

impl PairMetrics {
    fn read(&self) -> Counts {
        Counts {
            requests: self.requests.read(),
            refused: self.refused.read(),
            observed: self.observed.read(),
            tokens: self.tokens.read(),
        }
    }
}

impl ModelMetrics {
    fn read(&self) -> ModelReading {
        ModelReading {
            counts: Counts::default(),
            attempts: self.attempts.read(),
            retries: self.retries.read(),
            request_duration: Distribution::of(&self.request_duration),
            first_token: Distribution::of(&self.first_token),
            queue_wait: Distribution::of(&self.queue_wait),
        }
    }
}

impl ModelReading {
    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        self.with(other, |a, b| a + b)
    }

    /// What came since the earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        self.with(earlier, u64::saturating_sub)
    }

    /// Attempts that came to nothing at the gateway: refused, failed, broken off or too late.
    pub fn failed_attempts(&self) -> u64 {
        let fine = [AttemptResult::Ok, AttemptResult::ClientError, AttemptResult::Cancelled];
        let all = AttemptResult::ALL.iter().zip(self.attempts);
        all.filter(|(result, _)| !fine.contains(result)).map(|(_, count)| count).sum()
    }

    fn with(&self, other: &Self, each: fn(u64, u64) -> u64) -> Self {
        Self {
            counts: self.counts.with(&other.counts, each),
            attempts: zip(self.attempts, other.attempts, each),
            retries: zip(self.retries, other.retries, each),
            request_duration: self.request_duration.with(&other.request_duration, each),
            first_token: self.first_token.with(&other.first_token, each),
            queue_wait: self.queue_wait.with(&other.queue_wait, each),
        }
    }
}

impl Counts {
    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        self.with(other, |a, b| a + b)
    }

    /// What came since the earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        self.with(earlier, u64::saturating_sub)
    }

    /// Requests that have ended, however they did.
    pub fn ended(&self) -> u64 {
        self.requests.iter().sum()
    }

    /// Requests that ended so.
    pub fn outcome(&self, outcome: Outcome) -> u64 {
        self.requests[outcome as usize]
    }

    /// Requests that ended in an error that is not their client's: the gateway's, or none of an answer.
    pub fn errors(&self) -> u64 {
        self.outcome(Outcome::UpstreamError) + self.outcome(Outcome::Failed)
    }

    /// Tokens as the gateway counts them: prompt and answer.
    pub fn all_tokens(&self) -> u64 {
        self.tokens[TokenKind::Prompt as usize] + self.tokens[TokenKind::Completion as usize]
    }

    fn with(&self, other: &Self, each: fn(u64, u64) -> u64) -> Self {
        Self {
            requests: zip(self.requests, other.requests, each),
            refused: zip(self.refused, other.refused, each),
            observed: zip(self.observed, other.observed, each),
            tokens: zip(self.tokens, other.tokens, each),
        }
    }
}

impl Distribution {
    fn of(histogram: &Histogram) -> Self {
        let metric = histogram.metric();
        let histogram = metric.get_histogram();
        let buckets = histogram.get_bucket();
        let mut counts = [0; MOST_BUCKETS + 1];
        let mut below = 0;
        let bounded = buckets.len().min(MOST_BUCKETS);
        for (count, bucket) in counts.iter_mut().zip(&buckets[..bounded]) {
            *count = bucket.cumulative_count().saturating_sub(below);
            below = below.max(bucket.cumulative_count());
        }
        counts[bounded] = histogram.get_sample_count().saturating_sub(below);
        Self { first_bound: buckets.first().map_or(1.0, prometheus::proto::Bucket::upper_bound), bounded, counts }
    }

    /// How many observations there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// What this part (0 to 1) of the observations does not exceed, in seconds: an estimate, exact to the bucket that it falls
    /// into, and taken to be spread evenly on a logarithmic scale within that. Of what is beyond all bounds nothing but the
    /// last bound is known. `None` where there are no observations.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let all = self.count();
        if all == 0 {
            return None;
        }
        let wanted = part.clamp(0.0, 1.0) * all as f64;
        let (mut below, mut bound) = (0.0, self.first_bound);
        for (index, count) in self.counts[..self.bounded].iter().enumerate() {
            let count = *count as f64;
            if count > 0.0 && below + count >= wanted {
                let within = ((wanted - below) / count).clamp(0.0, 1.0);
                // The first bucket begins at nothing, which has no logarithm.
                return Some(if index == 0 { bound * within } else { bound / 2.0 * 2f64.powf(within) });
            }
            below += count;
            bound *= 2.0;
        }
        Some(bound / 2.0)
    }

    fn with(&self, other: &Self, each: fn(u64, u64) -> u64) -> Self {
        // One that was never read has no bounds.
        let shape = if self.bounded > 0 { self } else { other };
        Self { counts: zip(self.counts, other.counts, each), ..*shape }
    }
}

fn zip<const N: usize>(a: [u64; N], b: [u64; N], each: fn(u64, u64) -> u64) -> [u64; N] {
    std::array::from_fn(|index| each(a[index], b[index]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clients::Clients;
    use crate::config::Config;

    fn distribution(seconds: &[f64]) -> Distribution {
        let histogram = histogram(0.01, 2.0, 17);
        seconds.iter().for_each(|value| histogram.observe(*value));
        Distribution::of(&histogram)
    }

    #[test]
    fn a_quantile_is_exact_to_the_bucket_and_interpolated_within() {
        let values: Vec<f64> = (1..=1000).map(|n| f64::from(n) / 100.0).collect();
        let spread = distribution(&values);
        assert_eq!(spread.count(), 1000);
        for (part, truth) in [(0.5, 5.0), (0.95, 9.5), (0.99, 9.9)] {
            let told = spread.quantile(part).expect("there are observations");
            assert!((told / truth - 1.0).abs() < 0.25, "{part}: {told} for {truth}");
        }
        assert!(spread.quantile(0.5) < spread.quantile(0.95));
    }

    #[test]
    fn quantiles_at_the_ends_are_what_is_known() {
        assert_eq!(distribution(&[]).quantile(0.5), None);
        assert_eq!(Distribution::default().quantile(0.5), None);
        let tiny = distribution(&[0.001]).quantile(0.99).expect("one");
        assert!(tiny <= 0.01, "{tiny}");
        let beyond = distribution(&[1e6, 1e7]).quantile(0.5).expect("two");
        assert!((beyond - 0.01 * 65536.0).abs() < 1e-6, "{beyond}: no more than the last bound is known");
    }

    #[test]
    fn a_difference_has_only_what_came_between() {
        let early = distribution(&[0.02, 0.02, 0.02]);
        let late = distribution(&[0.02, 0.02, 0.02, 5.0]);
        let between = late.with(&early, u64::saturating_sub);
        assert_eq!(between.count(), 1);
        assert!(between.quantile(0.5).expect("one") > 2.0);
    }

    #[test]
    fn a_reading_adds_up_models_and_clients() {
        let config = Config::parse("[clients.a]\nkey = \"k1\"\n[clients.b]\nkey = \"k2\"", &|_| None).expect("good");
        let (models, clients) = (Arc::new(Models::new(["m", "n"])), Clients::new(&config));
        let metrics = Metrics::new(models.clone(), clients.names());
        let ids: Vec<ClientId> = clients.ids().collect();
        for (client, model, times) in [(ids[0], "m", 3), (ids[0], "n", 1), (ids[1], "m", 2)] {
            metrics.model(models.find(model)).attempt(AttemptResult::ServerError, Duration::from_secs(1));
            (0..times).for_each(|_| metrics.pair(models.find(model), client).request(Outcome::Ok));
        }
        let reading = metrics.read();
        let of = |name: &str| {
            let found = reading.models.iter().find(|(id, _)| *id == models.find(name));
            found.expect("it was asked for").1
        };
        assert_eq!((of("m").counts.ended(), of("n").counts.ended()), (5, 1));
        assert_eq!((of("m").failed_attempts(), of("n").failed_attempts()), (2, 1));
        let of_clients: Vec<_> = reading.clients.iter().map(|(id, counts)| (*id, counts.ended())).collect();
        assert_eq!(of_clients, [(ids[0], 4), (ids[1], 2)]);
    }
}
