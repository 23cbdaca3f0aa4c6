//! What happened at the simulated gateway: the other side's own count, to hold the client's against.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// What happened so far, as of one moment. `GET /_stats` shows the same as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests under `/v1` that arrived whole.
    pub requests: u64,
    /// Of these, those that the quota let pass; faults may have struck some.
    pub accepted: u64,
    /// Those that it refused.
    pub refused: Refused,
    /// Those without the right API key.
    pub unauthorized: u64,
    /// Faults that struck, by name; `outage` counts the requests that came during one.
    pub faults: BTreeMap<&'static str, u64>,
    /// Accepted requests whose answer has not ended yet.
    pub in_flight: usize,
    /// The most there ever were of these.
    pub most_in_flight: usize,
    /// Accepted requests whose client went before the answer's end.
    pub cancelled: u64,
}

/// Refused requests, by the limit that refused them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refused {
    /// The quota on requests.
    pub requests: u64,
    /// The quota on tokens.
    pub tokens: u64,
    /// The concurrency limit.
    pub concurrency: u64,
}

impl Refused {
    /// All of them.
    pub fn total(self) -> u64 {
        self.requests + self.tokens + self.concurrency
    }
}

impl Stats {
    pub(super) fn to_json(&self) -> Value {
        json!({
            "requests": self.requests,
            "accepted": self.accepted,
            "refused": {
                "requests": self.refused.requests,
                "tokens": self.refused.tokens,
                "concurrency": self.refused.concurrency,
            },
            "unauthorized": self.unauthorized,
            "faults": self.faults,
            "in_flight": self.in_flight,
            "most_in_flight": self.most_in_flight,
            "cancelled": self.cancelled,
        })
    }
}
