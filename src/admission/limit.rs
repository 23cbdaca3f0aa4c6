//! One limit: a bucket or a set of slots, whose it is, and who waits for it.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::bucket::Bucket;
use super::slots::Slots;
use crate::error::Cause;

/// Whose limit it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All that passes.
    Global,
    /// One model, by name; a lane's own concurrency counts as its model's.
    Model(Arc<str>),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Global => f.write_str("global"),
            Self::Model(name) => write!(f, "model:{name}"),
        }
    }
}

/// How far apart those who are refused together are told to return.
const MAX_SPREAD: Duration = Duration::from_secs(30);

/// The order of arrival; a retry keeps that of its first attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(pub u64);

/// A flow's place in the queue's list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(pub(super) usize);

/// A limit's place in the queue's list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LimitId(pub(super) usize);

/// What is limited.
pub enum Measure {
    /// How many may start.
    Requests(Bucket),
    /// How many may be under way.
    Concurrency(Slots),
}

/// A limit and the flows whose first waiter it holds up.
pub struct Limit {
    pub scope: Scope,
    pub measure: Measure,
    /// Flows held up here, by the rank of their first waiter.
    pub parked: BTreeSet<(Rank, FlowId)>,
    /// How many requests wait in those flows.
    pub waiting: u64,
    /// When this limit is to be looked at again; a bucket's only, and only while somebody is parked.
    pub timer: Option<Instant>,
    /// When the last of those refused was told to come back: the next one is told a little later.
    promised: Option<Instant>,
}

impl Limit {
    /// A limit that nobody waits for.
    pub fn new(scope: Scope, measure: Measure) -> Self {
        Self { scope, measure, parked: BTreeSet::new(), waiting: 0, timer: None, promised: None }
    }

    /// Whether one more may pass now.
    pub fn has_room(&self, now: Instant) -> bool {
        match &self.measure {
            Measure::Requests(bucket) => bucket.available_at(1, now) <= now,
            Measure::Concurrency(slots) => slots.has_room(),
        }
    }

    /// Lets one pass that has waited since then; there is room.
    pub fn take(&mut self, waiting_since: Instant, now: Instant) {
        match &mut self.measure {
            Measure::Requests(bucket) => {
                let taken = bucket.try_take(waiting_since, now);
                debug_assert!(taken, "a bucket with room gives a cell");
            }
            Measure::Concurrency(slots) => slots.take(),
        }
    }

    /// When the `n`-th from now (from 1) may be expected to pass.
    pub fn expected_at(&self, n: u64, now: Instant) -> Instant {
        match &self.measure {
            Measure::Requests(bucket) => bucket.available_at(n, now).max(now),
            Measure::Concurrency(slots) => now + slots.expected_wait(n),
        }
    }

    /// Before when the `n`-th from now (from 1) cannot pass.
    pub fn earliest_at(&self, n: u64, now: Instant) -> Instant {
        match &self.measure {
            Measure::Requests(bucket) => bucket.available_at(n, now).max(now),
            Measure::Concurrency(slots) => now + slots.shortest_wait(n),
        }
    }

    /// When to look at it again while somebody waits; slots tell by themselves when one becomes free.
    pub fn next_look(&self, now: Instant) -> Option<Instant> {
        match &self.measure {
            Measure::Requests(bucket) if !self.parked.is_empty() => Some(bucket.available_at(1, now)),
            _ => None,
        }
    }

    /// When the next one who is refused should come back, if not before `earliest`: each a step later than the last, so
    /// that they do not return as one herd. Those who come back all the same, or never, must not push the others' return
    /// away without end: the spread is 30 s at most.
    pub fn promise(&mut self, earliest: Instant) -> Instant {
        let step = match &self.measure {
            Measure::Requests(bucket) => bucket.rate().interval(),
            Measure::Concurrency(slots) => slots.turnover(),
        };
        let after_the_last = self.promised.map(|last| last + step.max(Duration::from_millis(1)));
        let at = after_the_last.map_or(earliest, |after| after.clamp(earliest, earliest + MAX_SPREAD));
        self.promised = Some(at);
        at
    }

    /// Why a request that this limit holds up is refused.
    pub fn cause(&self) -> Cause {
        match self.measure {
            Measure::Requests(_) => Cause::Requests,
            Measure::Concurrency(_) => Cause::Concurrency,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.measure {
            Measure::Requests(bucket) => write!(f, "the request limit of {}", bucket.rate())?,
            Measure::Concurrency(slots) => write!(f, "the limit of {} requests at a time", slots.limit())?,
        }
        match &self.scope {
            Scope::Global => Ok(()),
            Scope::Model(name) => write!(f, " for model {name}"),
        }
    }
}
