//! How long a wait will be: a lower bound, beyond which a newcomer is refused at once, and an expectation, by which the
//! refused are told when to come back.
//!
//! Ahead of a newcomer is all that waits in its own flow and, at the same limit, what of its own tenant was there first. Of
//! the others goes ahead what the fair order gives them while that is served: for the expectation as much as was seen of late,
//! or their shares by weight; for the lower bound what their counters say, and no more of any flow than its other limits let
//! through by then.

use std::time::Duration;

use tokio::time::Instant;

use super::flows::Flow;
use super::{Ask, LEAST_SHARE, Place, Queue};
use crate::admission::estimate::Cost;
use crate::admission::fair::{TenantId, Virtual};
use crate::admission::limit::{FlowId, LimitId};
use crate::admission::line::Load;
use crate::admission::refusal::Refusal;
use crate::config::Weight;
use crate::error::Cause;

/// Flows of others that are looked at one by one. What is not looked at is taken not to be ahead.
const MAX_LOOKED_AT: usize = 256;

impl<W> Queue<W> {
    /// The limit on the way that a newcomer to this flow passes last, if even that is too late when all goes as well as it can.
    pub(super) fn too_late(&mut self, id: FlowId, ask: &Ask, now: Instant) -> Option<LimitId> {
        let tokens = ask.cost.tokens();
        let mut latest: Option<(Instant, LimitId)> = None;
        for index in 0..self.flows[id.0].path.len() {
            let at = self.flows[id.0].path[index];
            if !self.limits[at.0].concerns(tokens) {
                continue;
            }
            // A retry goes to the front.
            let late =
                if ask.again { self.too_late_in_front(at, ask, now) } else { self.too_late_behind(at, id, ask, now) };
            latest = latest.max(late.map(|passes_at| (passes_at, at)));
        }
        latest.map(|(_, limit)| limit)
    }

    fn too_late_in_front(&self, at: LimitId, ask: &Ask, now: Instant) -> Option<Instant> {
        let limit = &self.limits[at.0];
        let passes_at = limit.earliest_at(limit.own_part(ask.cost.tokens()), now);
        (passes_at > ask.until).then_some(passes_at)
    }

    /// When a newcomer passes this limit, if that is too late. Where places were promised to others of its tenant, they find
    /// theirs when they come: a newcomer is taken in only if it may be expected to be served in time with them.
    fn too_late_behind(&mut self, at: LimitId, id: FlowId, ask: &Ask, now: Instant) -> Option<Instant> {
        let Flow { tenant, load: ahead, .. } = self.flows[id.0];
        let weight = self.tenants.share(tenant).weight;
        let limit = &mut self.limits[at.0];
        let reserved = limit.reserved(tenant, now);
        let promised = reserved.is_some() && !limit.redeem(tenant, now);
        let reserved = reserved.filter(|_| promised).unwrap_or_default();
        let until = ask.until.checked_sub(reserved).unwrap_or(now);
        let limit = &self.limits[at.0];
        let own_part = limit.own_part(ask.cost.tokens());
        let at_best = limit.earliest_at(ahead.plus(own_part), now);
        if at_best > until {
            return Some(at_best);
        }
        let expected =
            limit.expected_at(self.with_shares(at, tenant, weight, self.own_ahead(at, id).plus(own_part)), now);
        if expected <= until || promised {
            return (expected > until).then_some(expected);
        }
        let ahead = ahead.plus(self.surely_ahead(at, id, until, now));
        let at_best = limit.earliest_at(ahead.plus(own_part), now);
        (at_best > until).then_some(at_best)
    }

    /// Refuses a request of this flow, and says when to come back.
    pub(super) fn refuse(
        &mut self,
        id: FlowId,
        by: LimitId,
        cause: Cause,
        cost: Cost,
        allowed: Duration,
        now: Instant,
    ) -> Refusal {
        let tenant = self.flows[id.0].tenant;
        let weight = self.tenants.share(tenant).weight;
        let own_part = self.limits[by.0].own_part(cost.tokens());
        let load = self.with_shares(by, tenant, weight, self.own_ahead(by, id).plus(own_part));
        let takes = self.time_in_turn(by, tenant, own_part);
        let limit = &mut self.limits[by.0];
        let wait = limit.expected_at(load, now) - now;
        let mut earliest = now + wait.saturating_sub(allowed).max(Duration::from_millis(1));
        if cause == Cause::QueueFull {
            // There is a place in the queue when the first in line has left it.
            earliest = earliest.max(limit.expected_at(Load::one(cost.tokens()), now));
        }
        if cause == Cause::Unavailable {
            // Whoever comes before the next probe is refused again.
            earliest = earliest.max(limit.expected_at(Load::default(), now));
        }
        let back = limit.promise(tenant, earliest, takes, now);
        Refusal {
            cause,
            scope: Some(limit.scope.clone()),
            limit: limit.to_string(),
            wait,
            waited: None,
            allowed,
            retry_after: back - now,
        }
    }

    /// What of its own tenant waits for this limit before a newcomer to the flow.
    pub(super) fn own_ahead(&self, at: LimitId, id: FlowId) -> Load {
        let flow = &self.flows[id.0];
        let here = self.limits[at.0].line.load_of(flow.tenant);
        if flow.place == Place::Parked(at) { here } else { here.plus(flow.load) }
    }

    /// A load of this tenant, and what of the others goes through with it: as was seen of late or, where nothing was, by
    /// their shares.
    pub(super) fn with_shares(&self, at: LimitId, tenant: TenantId, weight: Weight, own: Load) -> Load {
        if let Some(shared_by) = self.limits[at.0].shared_by(tenant) {
            // Before its first turn the others come as far as it is already.
            let line = &self.limits[at.0].line;
            let lead = line.clock().tokens_until(line.tag(tenant), weight);
            let own_tokens = own.tokens.max(LEAST_SHARE) as f64;
            let others = (shared_by - 1.0) * (own_tokens + lead as f64) / own_tokens;
            let part = |own: u64| (own as f64 * others) as u64;
            // Of late is not now: others who have gone are not expected.
            let waiting = line.load().minus(line.load_of(tenant));
            return own.plus(Load {
                requests: part(own.requests).min(4 * waiting.requests),
                tokens: part(own.tokens).min(waiting.tokens.saturating_mul(4)),
            });
        }
        let line = &self.limits[at.0].line;
        let weight = u128::from(weight.thousandths());
        let others = u128::from(line.weights_without(tenant));
        let part = |own: u64| u64::try_from(u128::from(own) * others / weight).unwrap_or(u64::MAX);
        let waiting = line.load().minus(line.load_of(tenant));
        own.plus(Load {
            requests: waiting.requests.min(part(own.requests)),
            tokens: waiting.tokens.min(part(own.tokens)),
        })
    }

    /// What of other flows has its turn before a newcomer to this one: all that was there first of its own tenant's, and of
    /// the other tenants' what comes before its turn then.
    fn surely_ahead(&self, at: LimitId, id: FlowId, until: Instant, now: Instant) -> Load {
        let Flow { tenant, load: own, .. } = self.flows[id.0];
        let line = &self.limits[at.0].line;
        let mut ahead = Load::default();
        for flow in line.flows_of(tenant).filter(|flow| *flow != id).take(MAX_LOOKED_AT) {
            ahead = ahead.plus(self.most_by(flow, at, until, now));
        }
        let turn = line.tag(tenant).plus(Virtual::of(own.plus(ahead).tokens, self.tenants.share(tenant).weight));
        let mut of_tenant: Option<(TenantId, u64)> = None;
        for (tag, other, flow) in line.others(tenant).take(MAX_LOOKED_AT) {
            if tag >= turn {
                break;
            }
            let left = match of_tenant {
                Some((same, left)) if same == other => left,
                _ => tag.tokens_until(turn, self.tenants.share(other).weight),
            };
            let mut passes = self.most_by(flow, at, until, now).up_to_tokens(left);
            passes.requests = passes.requests.min(left.div_ceil(LEAST_SHARE));
            let share = passes.tokens.max(passes.requests.saturating_mul(LEAST_SHARE));
            of_tenant = Some((other, left.saturating_sub(share)));
            ahead = ahead.plus(passes);
        }
        ahead
    }

    /// What of a flow gets as far as this limit by then, going by the other limits on its way.
    fn most_by(&self, id: FlowId, at: LimitId, until: Instant, now: Instant) -> Load {
        let flow = &self.flows[id.0];
        let elsewhere = flow.path.iter().filter(|limit| **limit != at);
        elsewhere.fold(flow.load, |most, limit| self.limits[limit.0].most_by(most, until, now))
    }

    /// How long this limit takes for a load of this tenant's, others taking turns with it.
    fn time_in_turn(&self, at: LimitId, tenant: TenantId, load: Load) -> Duration {
        let limit = &self.limits[at.0];
        let own = f64::from(self.tenants.share(tenant).weight.thousandths());
        let others = limit.line.weights_without(tenant) as f64;
        let shared_by = limit.shared_by(tenant).unwrap_or((own + others) / own);
        let seconds = limit.time_for(load).as_secs_f64() * shared_by;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}
