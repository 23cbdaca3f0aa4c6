//! What there is to see now, read when scraped.

use std::sync::Arc;
use std::time::Duration;

/// The gauges of one model, read when scraped.
#[derive(Debug, Clone, Default)]
pub struct ModelGauges {
    pub model: Arc<str>,
    pub in_flight: u64,
    pub waiting: u64,
    /// Those of them that wait for what was learned of the gateway.
    pub learned_waiting: u64,
    pub concurrency_limit: Option<u32>,
    /// How long the gateway wants to be left alone by it.
    pub cooldown: Duration,
    /// The breaker holds requests back.
    pub breaker_open: bool,
    /// What the gateway's headers tell, and what weir has inferred from refusals.
    pub told_requests_per_second: Option<f64>,
    pub inferred_requests_per_second: Option<f64>,
    pub told_tokens_per_second: Option<f64>,
}

/// What is left of one limit, read when scraped.
#[derive(Debug, Clone)]
pub struct LimitGauge {
    /// `global`, `model` or `client`.
    pub scope: &'static str,
    /// The model's name, or the client's; empty for the global limits.
    pub name: Arc<str>,
    /// `requests`, `tokens` or `concurrency`.
    pub unit: &'static str,
    pub remaining: u64,
    /// What `remaining` is at most: the bucket's burst, or all slots.
    pub capacity: u64,
    /// What comes back in a second; `None` for slots.
    pub per_second: Option<f64>,
    /// Requests that wait for it, and those that wait behind these.
    pub waiting: u64,
}

/// All gauges, read when scraped.
#[derive(Debug, Clone, Default)]
pub struct Gauges {
    pub models: Vec<ModelGauges>,
    pub limits: Vec<LimitGauge>,
    pub connections_active: u64,
    pub connections_idle: u64,
    /// Clients connected, and how many may be.
    pub client_connections: u64,
    pub client_connections_limit: u64,
    /// How many requests may wait.
    pub waiting_limit: u64,
    /// Request bodies held in memory, and how much may be.
    pub buffered_bytes: u64,
    pub buffered_bytes_limit: u64,
    /// Tokens that requests under way are estimated to take.
    pub reserved_tokens: u64,
    /// Whether weir was told to stop.
    pub is_draining: bool,
    /// tokio's tasks alive, of all runtimes.
    pub tasks: u64,
}
