//! The configuration of one story.

use std::ops::Range;
use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::SmallRng;

/// The models that are asked for; the configuration knows the first two.
pub const MODELS: [&str; 3] = ["gpt-4.1-mini", "deepseek-chat", "made-up"];

/// `timeouts.connect`.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The names of the clients, of which several have the same, and one key for each.
pub const CLIENTS: [&str; 3] = ["a", "b", "c"];

/// A limit of requests or tokens: so many a second, and so many at once.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    pub per_second: u32,
    pub burst: u32,
}

impl Rate {
    fn sometimes(rng: &mut SmallRng, per_second: Range<u32>, burst: Range<u32>) -> Option<Self> {
        let rate = Self { per_second: rng.random_range(per_second), burst: rng.random_range(burst) };
        rng.random_bool(0.6).then_some(rate)
    }

    /// Some of these hold less than one request is thought to cost before anything is known.
    fn of_tokens(rng: &mut SmallRng) -> Option<Self> {
        Self::sometimes(rng, 300..3000, 20..5000)
    }

    fn line(this: Option<Self>, unit: &str) -> String {
        this.map(|Self { per_second, burst }| format!("{unit} = {{ rate = \"{per_second}/s\", burst = {burst} }}\n"))
            .unwrap_or_default()
    }
}

/// The limits of one model or client.
#[derive(Debug, Clone, Copy, Default)]
pub struct Own {
    pub requests: Option<Rate>,
    pub tokens: Option<Rate>,
    pub slots: Option<u32>,
}

impl Own {
    fn random(rng: &mut SmallRng) -> Self {
        let requests = Rate::sometimes(rng, 5..40, 1..20);
        Self { requests, tokens: Rate::of_tokens(rng), slots: slots(rng, 2..15) }
    }

    fn lines(self) -> String {
        let slots = self.slots.map(|slots| format!("concurrency = {slots}\n")).unwrap_or_default();
        [Rate::line(self.requests, "requests"), Rate::line(self.tokens, "tokens"), slots].concat()
    }
}

fn slots(rng: &mut SmallRng, range: Range<u32>) -> Option<u32> {
    rng.random_bool(0.6).then(|| rng.random_range(range))
}

/// Whose key nobody knows.
pub const STRANGER: &str = "stranger";

/// What tells clients apart.
#[derive(Debug)]
pub enum Tenants {
    /// Their keys, which pass through, once the gateway has served them.
    Keys,
    /// The addresses that they come from: weir has a key of its own.
    Addresses,
    /// Their keys, with a weight and limits for each of [`CLIENTS`].
    Named([(u32, Own); CLIENTS.len()]),
}

/// What is random about the configuration.
#[derive(Debug)]
pub struct Rules {
    pub requests: Option<Rate>,
    pub tokens: Option<Rate>,
    /// `None` where concurrency is adaptive.
    pub slots: Option<u32>,
    /// Of the first two of [`MODELS`].
    pub models: [Own; 2],
    pub tenants: Tenants,
    max_waiting: u32,
    max_wait_millis: u32,
    delay_millis: u32,
}

impl Rules {
    pub fn random(rng: &mut SmallRng) -> Self {
        Self {
            requests: Rate::sometimes(rng, 10..60, 1..20),
            tokens: Rate::of_tokens(rng),
            slots: slots(rng, 5..30),
            models: [(); 2].map(|()| Own::random(rng)),
            tenants: match rng.random_range(0..3) {
                0 => Tenants::Keys,
                1 => Tenants::Addresses,
                _ => Tenants::Named([(); CLIENTS.len()].map(|()| (rng.random_range(1..5), Own::random(rng)))),
            },
            max_waiting: rng.random_range(3..40),
            max_wait_millis: rng.random_range(200..8000),
            delay_millis: rng.random_range(20..1500),
        }
    }

    /// Others, in which clients are told apart as before.
    pub fn changed(&self, rng: &mut SmallRng) -> Self {
        let others = Self::random(rng);
        let tenants = match &self.tenants {
            Tenants::Keys => Tenants::Keys,
            Tenants::Addresses => Tenants::Addresses,
            Tenants::Named(_) => {
                Tenants::Named([(); CLIENTS.len()].map(|()| (rng.random_range(1..5), Own::random(rng))))
            }
        };
        Self { tenants, ..others }
    }

    /// As a configuration file.
    pub fn config(&self) -> String {
        let concurrency = self.slots.map_or("\"adaptive\"".to_owned(), |slots| slots.to_string());
        let Self { max_waiting, max_wait_millis, delay_millis, .. } = self;
        let mut config = format!(
            "[limits]\n{}{}concurrency = {concurrency}\n\
             [queue]\nmax_waiting = {max_waiting}\nmax_wait = \"{max_wait_millis}ms\"\n\
             [retry]\nbase_delay = \"{delay_millis}ms\"\nmax_delay = \"{delay_millis}ms\"\n\
             [timeouts]\nconnect = \"{}ms\"\nfirst_event = \"3s\"\nresponse = \"4s\"\nidle = \"3s\"\ndeadline = \"15s\"\n",
            Rate::line(self.requests, "requests"),
            Rate::line(self.tokens, "tokens"),
            CONNECT_TIMEOUT.as_millis(),
        );
        for (name, limits) in MODELS.iter().zip(self.models) {
            config.push_str(&format!("[models.{name:?}]\n{}", limits.lines()));
        }
        if !matches!(self.tenants, Tenants::Keys) {
            config.push_str("[upstream]\napi_key = \"sk-upstream\"\n");
        }
        if let Tenants::Named(clients) = &self.tenants {
            for (name, (weight, limits)) in CLIENTS.iter().zip(clients) {
                let lines = limits.lines();
                config.push_str(&format!("[clients.{name}]\nkey = \"sk-{name}\"\nweight = {weight}\n{lines}"));
            }
        }
        config
    }
}
