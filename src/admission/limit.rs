//! One limit: a bucket or a set of slots, whose it is, and who waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::bucket::Bucket;
use super::fair::TenantId;
use super::line::{Line, Load};
use super::pace::{Heard, Pace, Pass};
use super::promise::Promises;
use super::slack::ChargeNo;
use super::slots::Slots;
use crate::config::Mode;
use crate::error::Cause;
use crate::models::ModelId;

/// Whose limit it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All that passes.
    Global,
    /// One model, by name; a lane's own concurrency counts as its model's.
    Model(Arc<str>),
    /// One client, by name.
    Client(Arc<str>),
}

impl fmt::Display for Scope {
    /// As in `x-weir-refused-by`: a client knows its own name, and need not be told.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Global => f.write_str("global"),
            Self::Model(name) => write!(f, "model:{name}"),
            Self::Client(_) => f.write_str("client"),
        }
    }
}

/// The order of arrival; a retry keeps that of its first attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(pub u64);

/// A flow's place in the queue's list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(pub(super) usize);

/// A limit's place in the queue's list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LimitId(pub(super) usize);

/// Promises to fewer tenants are not worth looking through.
const MIN_SWEEP: usize = 64;

/// What is limited.
pub enum Measure {
    /// How many may start.
    Requests(Bucket),
    /// How many tokens they may cost.
    Tokens(Bucket),
    /// How many may be under way.
    Concurrency(Slots),
    /// What a lane has learned of the gateway.
    Pace(Box<Pace>),
}

/// What a request needs of a limit.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    pub flow: FlowId,
    pub tenant: TenantId,
    pub model: ModelId,
    /// What it is estimated to cost.
    pub tokens: u64,
}

/// A flow whose first waiter needs more than a bucket ever holds: it waits until the bucket is full.
#[derive(Debug, Clone, Copy)]
pub struct Saver {
    pub need: Need,
    since: Instant,
}

/// A limit and the flows whose first waiter it holds up.
pub struct Limit {
    pub scope: Scope,
    pub measure: Measure,
    pub mode: Mode,
    /// One bit, by scope and unit: no two limits on one way have the same.
    pub mark: u16,
    /// The last that was let through before it began to count. Slots have counted all who were under way then; buckets none.
    pub since: ChargeNo,
    /// Flows held up here.
    pub line: Line,
    /// One of them, set aside with all others of its model until the bucket is full.
    pub saver: Option<Saver>,
    /// When this limit is to be looked at again; a bucket's only, and only while somebody is held up.
    pub timer: Option<Instant>,
    /// What the refused were told, for each tenant: it has its own share.
    promises: BTreeMap<TenantId, Promises>,
    /// When there are so many, void ones are forgotten.
    promises_before_sweep: usize,
    /// What has passed in all: tokens of a limit of tokens, else requests.
    passed: u64,
}

impl Limit {
    /// A limit that nobody waits for.
    pub fn new(scope: Scope, measure: Measure, mode: Mode) -> Self {
        Self {
            mark: mark(&scope, &measure),
            since: ChargeNo(0),
            scope,
            measure,
            mode,
            line: Line::default(),
            saver: None,
            timer: None,
            promises: BTreeMap::new(),
            promises_before_sweep: MIN_SWEEP,
            passed: 0,
        }
    }

    /// Whether it has counted a request that was let through as this charge and counted by the limits with these marks.
    pub fn has_counted(&self, charge: ChargeNo, marks: u16) -> bool {
        match &self.measure {
            Measure::Concurrency(_) if charge <= self.since => true,
            Measure::Concurrency(_) | Measure::Requests(_) | Measure::Tokens(_) | Measure::Pace(_) => {
                charge > self.since && marks & self.mark != 0
            }
        }
    }

    /// From now on the limit is this one, with the state that it has. `false` where it is one of another unit.
    pub fn become_like(&mut self, other: &Measure, mode: Mode, now: Instant) -> bool {
        match (&mut self.measure, other) {
            (Measure::Requests(bucket), Measure::Requests(other))
            | (Measure::Tokens(bucket), Measure::Tokens(other)) => {
                bucket.set_rate(other.rate(), now);
            }
            (Measure::Concurrency(slots), Measure::Concurrency(other)) => slots.set_limit(other.limit()),
            _ => return false,
        }
        self.mode = mode;
        true
    }

    /// Nobody waits for it any more, since it holds nobody up any more. Hands out the tenants that were known here.
    pub fn lets_everyone_go(&mut self) -> Vec<TenantId> {
        self.saver = None;
        self.promises.clear();
        std::mem::take(&mut self.line).into_tenants().collect()
    }

    /// Whether a request of that many tokens has to do with it at all: one without tokens passes a limit of tokens.
    pub fn concerns(&self, tokens: u64) -> bool {
        tokens > 0 || !matches!(self.measure, Measure::Tokens(_))
    }

    /// Whether it could never hold enough for that many tokens.
    pub fn is_oversize(&self, tokens: u64) -> bool {
        matches!(&self.measure, Measure::Tokens(bucket) if bucket.is_oversize(tokens))
    }

    /// Whether this one may pass now.
    pub fn has_room(&self, need: Need, now: Instant) -> bool {
        match &self.measure {
            Measure::Concurrency(slots) => slots.has_room(),
            Measure::Pace(pace) => pace.is_open(need.tokens, now),
            Measure::Requests(bucket) if self.saver.is_none() => bucket.is_open(1, now),
            Measure::Tokens(bucket) if self.saver.is_none() => bucket.is_open(need.tokens, now),
            Measure::Requests(_) | Measure::Tokens(_) => self.opens_at(need, now).is_some_and(|at| at <= now),
        }
    }

    /// Lets one pass that has waited since then. A pace wants to have what it returns back.
    pub fn take(&mut self, tokens: u64, charge: ChargeNo, waiting_since: Instant, now: Instant) -> Option<Pass> {
        match &mut self.measure {
            Measure::Requests(bucket) => {
                let taken = bucket.try_take(1, charge, waiting_since, now);
                debug_assert!(taken, "a bucket with room gives a cell");
            }
            Measure::Tokens(bucket) => {
                let taken = bucket.try_take(tokens, charge, waiting_since, now);
                debug_assert!(taken, "a bucket with room gives its cells");
            }
            Measure::Concurrency(slots) => slots.take(),
            Measure::Pace(pace) => return Some(pace.pass(tokens, waiting_since < now, now)),
        }
        None
    }

    /// One of this tenant's has passed; `waited` says that it had to wait.
    pub fn note_turn(&mut self, tenant: TenantId, tokens: u64, waited: bool) {
        let size = if matches!(self.measure, Measure::Tokens(_)) { tokens } else { 1 };
        let before = self.passed;
        self.passed = self.passed.wrapping_add(size);
        if let Some(promises) = self.promises.get_mut(&tenant) {
            if !waited {
                // What passed while it wanted nothing did not share the limit with it.
                promises.begins_to_wait(before);
            }
            promises.has_turn(size, self.passed);
        }
    }

    /// The tenant, of which nobody waited here, begins to wait.
    pub fn begins_to_wait(&mut self, tenant: TenantId) {
        if let Some(promises) = self.promises.get_mut(&tenant) {
            promises.begins_to_wait(self.passed);
        }
    }

    /// How much passes in all for each of the tenant's, as far as that was seen of late.
    pub fn shared_by(&self, tenant: TenantId) -> Option<f64> {
        self.promises.get(&tenant)?.shared_by()
    }

    /// In observe mode: counts one that passes in any case as if it had waited for its turn. `false` where its wait would
    /// have been longer than allowed, and it would have been refused; that one is not counted.
    pub fn observe(&mut self, tokens: u64, charge: ChargeNo, allowed: Duration, now: Instant) -> bool {
        let passes_at = match &self.measure {
            Measure::Requests(bucket) => bucket.open_at(1, now),
            Measure::Tokens(bucket) => bucket.open_at(tokens, now),
            Measure::Concurrency(slots) => now + slots.shortest_wait(slots.beyond() + 1),
            // What is learned is the gateway's: it does not observe but refuse.
            Measure::Pace(_) => now,
        };
        if passes_at > now + allowed {
            return false;
        }
        match &mut self.measure {
            Measure::Requests(bucket) => bucket.owe(1, charge, now),
            Measure::Tokens(bucket) => bucket.owe(tokens, charge, now),
            Measure::Concurrency(slots) => slots.take(),
            Measure::Pace(_) => {}
        }
        true
    }

    /// When the last of this load may be expected to pass.
    pub fn expected_at(&self, load: Load, now: Instant) -> Instant {
        match &self.measure {
            Measure::Concurrency(slots) => now + slots.expected_wait(load.requests),
            Measure::Pace(pace) => pace.expected_at(load, now),
            Measure::Requests(_) | Measure::Tokens(_) => self.earliest_at(load, now),
        }
    }

    /// Before when the last of this load cannot pass.
    pub fn earliest_at(&self, load: Load, now: Instant) -> Instant {
        match &self.measure {
            Measure::Requests(bucket) => bucket.available_at(load.requests, now).max(now),
            Measure::Tokens(bucket) => bucket.available_at(load.tokens, now).max(now),
            Measure::Concurrency(slots) => now + slots.shortest_wait(load.requests),
            Measure::Pace(pace) => pace.earliest_at(load, now),
        }
    }

    /// What of a load a request of that many tokens has to wait for before it passes itself: with more than a bucket holds
    /// it passes when that is full.
    pub fn own_part(&self, tokens: u64) -> Load {
        match &self.measure {
            Measure::Tokens(bucket) => Load::one(tokens.min(u64::from(bucket.rate().burst))),
            Measure::Requests(_) | Measure::Concurrency(_) | Measure::Pace(_) => Load::one(tokens),
        }
    }

    /// The most of a flow's waiters that this limit lets through by then.
    pub fn most_by(&self, waiting: Load, until: Instant, now: Instant) -> Load {
        match &self.measure {
            Measure::Requests(bucket) => {
                let requests = bucket.count_by(until, now).min(waiting.requests);
                let tokens = u128::from(waiting.tokens) * u128::from(requests) / u128::from(waiting.requests.max(1));
                Load { requests, tokens: u64::try_from(tokens).unwrap_or(u64::MAX) }
            }
            Measure::Tokens(bucket) => waiting.up_to_tokens(bucket.count_by(until, now)),
            Measure::Concurrency(_) | Measure::Pace(_) => waiting,
        }
    }

    /// How long the limit takes for a load, once it is used up.
    pub fn time_for(&self, load: Load) -> Duration {
        match &self.measure {
            Measure::Requests(bucket) => bucket.refill_time(load.requests),
            Measure::Tokens(bucket) => bucket.refill_time(load.tokens),
            Measure::Concurrency(slots) => {
                slots.turnover().saturating_mul(u32::try_from(load.requests).unwrap_or(u32::MAX))
            }
            Measure::Pace(pace) => pace.time_for(load),
        }
    }

    /// When to look at it again while somebody is held up; slots tell by themselves when one becomes free.
    pub fn next_look(&self, first_in_line: Option<Need>, now: Instant) -> Option<Instant> {
        if matches!(self.measure, Measure::Concurrency(_)) {
            return None;
        }
        if let Measure::Pace(pace) = &self.measure {
            let first = first_in_line?;
            let gives_up_at = pace.gives_up_at().filter(|at| *at > now);
            return pace.opens_at(first.tokens, now).into_iter().chain(gives_up_at).min();
        }
        let saver = self.saver.and_then(|saver| self.opens_at(saver.need, now));
        let first = first_in_line.and_then(|need| self.opens_at(need, now));
        // Never in the past: what is due has just been looked at.
        saver.into_iter().chain(first).min()
    }

    /// When a request may pass a bucket, if nobody else does; `None` where that depends on others.
    fn opens_at(&self, need: Need, now: Instant) -> Option<Instant> {
        let (bucket, cells) = match &self.measure {
            Measure::Requests(bucket) => (bucket, 1),
            Measure::Tokens(bucket) => (bucket, need.tokens),
            Measure::Concurrency(_) | Measure::Pace(_) => return None,
        };
        match self.saver {
            Some(saver) if saver.need.flow == need.flow => Some(bucket.open_at(cells, now)),
            Some(_) if self.is_behind_saver(need) => None,
            Some(saver) => bucket.open_beside_saver_at(cells, saver.since, now),
            None => Some(bucket.open_at(cells, now)),
        }
    }

    /// Whether this one has to wait until the saver has passed: it is for the same model, and not before it in the fair order.
    pub fn is_behind_saver(&self, need: Need) -> bool {
        self.saver.is_some_and(|saver| {
            let precedes =
                need.tenant != saver.need.tenant && self.line.tag(need.tenant) < self.line.tag(saver.need.tenant);
            saver.need.model == need.model && !precedes
        })
    }

    /// From now on this flow saves for all that the bucket holds.
    pub fn begin_saving(&mut self, need: Need, now: Instant) {
        self.saver = Some(Saver { need, since: now });
    }

    /// What has been saved so far.
    pub fn saved(&self, now: Instant) -> u64 {
        match (&self.measure, self.saver) {
            (Measure::Tokens(bucket), Some(saver)) => bucket.refilled_in(now.saturating_duration_since(saver.since)),
            _ => 0,
        }
    }

    /// Forgets what was promised to these.
    pub fn forget(&mut self, tenants: &BTreeSet<TenantId>) {
        self.promises.retain(|tenant, _| !tenants.contains(tenant));
    }

    /// How much longer than otherwise a newcomer's wait has to be taken to be, for those whom this limit has promised a place.
    pub fn reserved(&mut self, tenant: TenantId, now: Instant) -> Option<Duration> {
        self.promises.get_mut(&tenant).and_then(|promises| promises.reserved(now))
    }

    /// Whether a newcomer may be one of this tenant who was told to come now.
    pub fn redeem(&mut self, tenant: TenantId, now: Instant) -> bool {
        self.promises.get_mut(&tenant).is_some_and(|promises| promises.redeem(now))
    }

    /// When the next one of this tenant who is refused should come back, if not before `earliest`; `takes` is how long the
    /// tenant's share of the limit takes for it.
    pub fn promise(&mut self, tenant: TenantId, earliest: Instant, takes: Duration, now: Instant) -> Instant {
        if self.promises.len() >= self.promises_before_sweep {
            self.promises.retain(|other, promises| *other == tenant || !promises.are_void(now));
            self.promises_before_sweep = MIN_SWEEP.max(2 * self.promises.len());
        }
        self.promises.entry(tenant).or_insert_with(|| Promises::new(self.passed)).promise(earliest, takes)
    }

    /// Why a request of that many tokens is refused that this limit holds up.
    pub fn cause(&self, tokens: u64, now: Instant) -> Cause {
        match (&self.measure, &self.scope) {
            (Measure::Requests(_), _) => Cause::Requests,
            (Measure::Tokens(_), _) => Cause::Tokens,
            (Measure::Concurrency(_), Scope::Client(_)) => Cause::ClientConcurrency,
            (Measure::Concurrency(_), _) => Cause::Concurrency,
            (Measure::Pace(pace), _) => pace.cause(tokens, now),
        }
    }

    /// What became of an attempt that a pace has let through. `true` where nobody passes for some time after it.
    pub fn hear(&mut self, pass: &Pass, heard: &Heard, now: Instant) -> bool {
        let Measure::Pace(pace) = &mut self.measure else { return false };
        pace.hear(pass, heard, now)
    }

    /// Whether the gateway has failed for so long that nobody is to wait.
    pub fn given_up(&self, now: Instant) -> bool {
        self.mode == Mode::Enforce && matches!(&self.measure, Measure::Pace(pace) if pace.given_up(now))
    }
}

/// A bit for each scope and unit that a limit can be of.
fn mark(scope: &Scope, measure: &Measure) -> u16 {
    let scope = match scope {
        Scope::Global => 0,
        Scope::Model(_) => 1,
        Scope::Client(_) => 2,
    };
    match measure {
        Measure::Requests(_) => 1 << (3 * scope),
        Measure::Tokens(_) => 2 << (3 * scope),
        Measure::Concurrency(_) => 4 << (3 * scope),
        Measure::Pace(_) => 1 << 9,
    }
}

/// So many requests, in words.
pub fn some_requests(count: u32) -> String {
    if count == 1 { "1 request".to_owned() } else { format!("{count} requests") }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.measure {
            Measure::Requests(bucket) => write!(f, "the request limit of {}", bucket.rate())?,
            Measure::Tokens(bucket) => write!(f, "the limit of {} tokens", bucket.rate())?,
            Measure::Concurrency(slots) => write!(f, "the limit of {} at a time", some_requests(slots.limit()))?,
            Measure::Pace(_) => f.write_str("what the gateway takes")?,
        }
        match &self.scope {
            Scope::Global => Ok(()),
            Scope::Model(name) => write!(f, " for model {name}"),
            Scope::Client(name) => write!(f, " for client {name}"),
        }
    }
}
