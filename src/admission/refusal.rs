//! A refusal, and how it is put to the client.

use std::time::Duration;

use super::limit::Scope;
use crate::config::units::format_duration;
use crate::error::{Cause, Failure};

/// A client whose weir is stopping tries again soon: by then another instance answers.
const AFTER_DRAIN: Duration = Duration::from_secs(1);

/// Why a request is not let through, and when a new try would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub cause: Cause,
    pub scope: Option<Scope>,
    /// The limit in words.
    pub limit: String,
    /// How long it would have to wait from now on.
    pub wait: Duration,
    /// How long it has waited, where its time ran out in the queue.
    pub waited: Option<Duration>,
    /// How long it is allowed to wait.
    pub allowed: Duration,
    /// When a new try would be taken into the queue and served in time.
    pub retry_after: Duration,
}

impl Refusal {
    /// Nobody is let in any more.
    pub fn draining() -> Self {
        let none = Duration::ZERO;
        Self {
            cause: Cause::Draining,
            scope: None,
            limit: String::new(),
            wait: none,
            waited: None,
            allowed: none,
            retry_after: AFTER_DRAIN,
        }
    }

    fn message(&self) -> String {
        let back = tenths(self.retry_after);
        let Self { limit, allowed, .. } = self;
        match (self.cause, self.waited) {
            (Cause::Draining, _) => {
                "weir is about to stop; try again in a second, another instance will answer".to_owned()
            }
            (Cause::QueueFull, _) => format!("weir's queue is full, held up by {limit}; try again in {back}"),
            (Cause::Unavailable, _) => format!(
                "the gateway fails, or has too much to do{}, and weir does not wait for it any longer; try again in {back}",
                match &self.scope {
                    Some(Scope::Model(name)) => format!(" for model {name}"),
                    Some(Scope::Global | Scope::Client(_)) | None => String::new(),
                }
            ),
            (_, Some(waited)) => format!(
                "{limit} held this request up for {}, as long as it may wait; try again in {back}",
                tenths(waited)
            ),
            (_, None) => format!(
                "{limit} is used up: the wait would be about {}, and {} is allowed; try again in {back}",
                tenths(self.wait),
                format_duration(*allowed)
            ),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self {
            cause: refusal.cause,
            message: refusal.message(),
            retry_after: Some(refusal.retry_after),
            scope: refusal.scope.as_ref().map(ToString::to_string),
        }
    }
}

/// A duration for reading: seconds, to a tenth, rounded up.
fn tenths(duration: Duration) -> String {
    let tenths = duration.as_millis().div_ceil(100);
    format!("{}.{} s", tenths / 10, tenths % 10)
}
