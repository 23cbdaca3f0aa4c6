//! The configuration of one story.

use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::SmallRng;

/// The models that are asked for; the configuration knows the first two.
pub const MODELS: [&str; 3] = ["gpt-4.1-mini", "deepseek-chat", "made-up"];

/// `timeouts.connect`.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A request limit: so many a second, and so many at once.
#[derive(Debug, Clone, Copy)]
pub struct Requests {
    pub per_second: u32,
    pub burst: u32,
}

/// The limits of one model.
#[derive(Debug, Clone, Copy, Default)]
pub struct OfModel {
    pub requests: Option<Requests>,
    pub slots: Option<u32>,
}

/// What is random about the configuration.
#[derive(Debug)]
pub struct Rules {
    pub requests: Option<Requests>,
    /// `None` where concurrency is adaptive.
    pub slots: Option<u32>,
    /// Of the first two of [`MODELS`].
    pub models: [OfModel; 2],
    max_waiting: u32,
    max_wait_millis: u32,
    delay_millis: u32,
}

impl Rules {
    pub fn random(rng: &mut SmallRng) -> Self {
        let sometimes =
            |rng: &mut SmallRng, from: u32, to: u32| rng.random_bool(0.6).then(|| rng.random_range(from..to));
        let requests = |rng: &mut SmallRng, from: u32, to: u32| {
            sometimes(rng, from, to).map(|per_second| Requests { per_second, burst: rng.random_range(1..20) })
        };
        let model = |rng: &mut SmallRng| OfModel { requests: requests(rng, 5, 40), slots: sometimes(rng, 2, 15) };
        Self {
            requests: requests(rng, 10, 60),
            slots: sometimes(rng, 5, 30),
            models: [model(rng), model(rng)],
            max_waiting: rng.random_range(3..40),
            max_wait_millis: rng.random_range(200..8000),
            delay_millis: rng.random_range(20..1500),
        }
    }

    /// As a configuration file.
    pub fn config(&self) -> String {
        let rate = |requests: Option<Requests>| {
            let line =
                |it: Requests| format!("requests = {{ rate = \"{}/s\", burst = {} }}\n", it.per_second, it.burst);
            requests.map(line).unwrap_or_default()
        };
        let concurrency = self.slots.map_or("\"adaptive\"".to_owned(), |slots| slots.to_string());
        let Self { max_waiting, max_wait_millis, delay_millis, .. } = self;
        let mut config = format!(
            "[limits]\n{}concurrency = {concurrency}\n\
             [queue]\nmax_waiting = {max_waiting}\nmax_wait = \"{max_wait_millis}ms\"\n\
             [retry]\nbase_delay = \"{delay_millis}ms\"\nmax_delay = \"{delay_millis}ms\"\n\
             [timeouts]\nconnect = \"{}ms\"\nfirst_event = \"3s\"\nresponse = \"4s\"\nidle = \"3s\"\ndeadline = \"15s\"\n",
            rate(self.requests),
            CONNECT_TIMEOUT.as_millis(),
        );
        for (name, limits) in MODELS.iter().zip(self.models) {
            config.push_str(&format!("[models.{name:?}]\n{}", rate(limits.requests)));
            config.push_str(&limits.slots.map(|slots| format!("concurrency = {slots}\n")).unwrap_or_default());
        }
        config
    }
}
