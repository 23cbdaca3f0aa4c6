//! Which flow a request waits in: found, made, and forgotten when nobody is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Ask, FlowView, Lane, Place, Queue, Waiter};
use crate::admission::fair::TenantId;
use crate::admission::limit::{FlowId, Limit, LimitId, Measure, Rank, Scope};
use crate::admission::line::Load;
use crate::admission::pace::credential::Credential;
use crate::admission::pace::{Pace, Pass, Signal};
use crate::clients::Tenant;
use crate::config::Mode;
use crate::models::ModelId;

/// Lanes kept at once. Beyond it the idle ones are forgotten, and if none is idle, newcomers share one lane a model.
pub const MAX_LANES: usize = 4096;

/// Idle flows, and tenants that have none, are forgotten when there are so many. Those in use are bounded by the requests
/// that wait or are under way.
pub const MAX_IDLE: usize = 4096;

/// Lanes that share a quota are opened one after the other, so far apart, up to so many times: the first finds out for all.
const TURN: Duration = Duration::from_millis(10);
const MOST_TURNS: usize = 20;

/// A lane's place in the queue's list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct LaneId(usize);

/// What belongs to one lane.
pub(super) struct LaneState {
    lane: Lane,
    pace: LimitId,
    flows: u32,
}

/// The lanes of one credential, and what they have in common.
#[derive(Default)]
pub(super) struct Shared {
    credential: Credential,
    lanes: BTreeSet<LaneId>,
}

/// One tenant's requests in one lane.
pub(super) struct Flow<W> {
    pub(super) tenant: TenantId,
    lane: LaneId,
    pub(super) model: ModelId,
    /// Every limit on the way that can hold somebody up, the widest first.
    pub(super) path: Vec<LimitId>,
    /// Every limit on the way that only counts.
    pub(super) observed: Vec<LimitId>,
    pub(super) waiters: BTreeMap<Rank, Waiter<W>>,
    /// All who wait in it.
    pub(super) load: Load,
    pub(super) place: Place,
    pub(super) in_flight: u32,
}

impl<W> Flow<W> {
    fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.waiters.is_empty()
    }

    /// Every limit on the way, whether it can hold somebody up or not.
    pub(super) fn way(&self) -> impl Iterator<Item = LimitId> + '_ {
        self.path.iter().chain(&self.observed).copied()
    }
}

impl<W> Queue<W> {
    /// Every flow that somebody uses.
    pub fn flows(&self, now: Instant) -> impl Iterator<Item = FlowView> + '_ {
        self.of_flow.values().map(move |id| {
            let flow = &self.flows[id.0];
            FlowView {
                model: flow.model,
                in_flight: flow.in_flight,
                waiting: flow.waiters.len() as u64,
                slots: self.tightest_slots(flow),
                cooldown: self.cooldown(self.pace_of(*id), now),
            }
        })
    }

    /// The limits that a request of this tenant in this lane has to pass; none where nobody has come that way lately.
    pub fn limits_on_the_way(&self, tenant: Tenant, lane: Lane) -> impl Iterator<Item = &Limit> + '_ {
        let flow = self.tenants.known(tenant).zip(self.of_lane.get(&self.lane_in_use(lane)).copied());
        let flow = flow.and_then(|key| self.of_flow.get(&key)).map(|id| &self.flows[id.0]);
        flow.into_iter().flat_map(|flow| &flow.path).map(|id| &self.limits[id.0])
    }

    /// Whether this lane's gateway has failed so long that nobody is to wait for it.
    pub fn has_given_up(&self, tenant: Tenant, lane: Lane, now: Instant) -> bool {
        self.limits_on_the_way(tenant, lane).any(|limit| limit.given_up(now))
    }

    /// The pace of the flow's lane.
    pub(super) fn pace_of(&self, flow: FlowId) -> LimitId {
        self.lanes[self.flows[flow.0].lane.0].pace
    }

    pub(super) fn flow_of(&mut self, ask: &Ask, model_name: impl Fn() -> Arc<str>, now: Instant) -> FlowId {
        let tenant = self.tenants.find(ask.tenant, ask.weight);
        if let Some(lane) = self.of_lane.get(&ask.lane)
            && let Some(id) = self.of_flow.get(&(tenant, *lane))
        {
            return *id;
        }
        // The tenant may have been idle long enough to be forgotten.
        self.sweep();
        let tenant = self.tenants.find(ask.tenant, ask.weight);
        let lane = self.lane_of(ask.lane, model_name, now);
        match self.of_flow.get(&(tenant, lane)) {
            Some(id) => *id,
            None => self.add_flow(ask.tenant, tenant, lane),
        }
    }

    /// The lane itself, or the one that its model's newcomers share while there are too many.
    fn lane_in_use(&self, lane: Lane) -> Lane {
        let full = self.of_lane.len() >= MAX_LANES && !self.of_lane.contains_key(&lane);
        if full { Lane { credential: 0, ..lane } } else { lane }
    }

    fn lane_of(&mut self, lane: Lane, model_name: impl Fn() -> Arc<str>, now: Instant) -> LaneId {
        let lane = self.lane_in_use(lane);
        if let Some(id) = self.of_lane.get(&lane) {
            return *id;
        }
        let pace = Measure::Pace(Box::new(Pace::new(self.rules.lane, now)));
        let pace = self.add_limit(Limit::new(Scope::Model(model_name()), pace, self.rules.mode));
        let state = LaneState { lane, pace, flows: 0 };
        let id = match self.free_lanes.pop() {
            Some(id) => {
                self.lanes[id.0] = state;
                id
            }
            None => {
                self.lanes.push(state);
                LaneId(self.lanes.len() - 1)
            }
        };
        self.of_lane.insert(lane, id);
        self.credentials.entry(lane.credential).or_default().lanes.insert(id);
        id
    }

    /// What an attempt in this flow's lane says about the quota of its credential. Where that is shared, all its lanes wait until
    /// the one that was refused may go on, one a little after the other.
    pub(super) fn compare_lanes(&mut self, flow: FlowId, pass: &Pass, signal: Signal, now: Instant) {
        let id = self.flows[flow.0].lane;
        let LaneState { lane, pace, .. } = self.lanes[id.0];
        let Some(Shared { credential, lanes }) = self.credentials.get_mut(&lane.credential) else { return };
        if lanes.len() < 2 {
            return;
        }
        let until = match &self.limits[pace.0].measure {
            Measure::Pace(pace) => pace.closed_until(now),
            Measure::Requests(_) | Measure::Tokens(_) | Measure::Concurrency(_) => None,
        };
        match (signal, until) {
            (Signal::Accepted, _) => credential.accepted(id.0, pass.sent_at()),
            (Signal::Refused { .. }, Some(until)) => {
                credential.refused(id.0, pass.sent_at(), until);
                if credential.is_shared() {
                    let others: Vec<LaneId> = lanes.iter().copied().filter(|other| *other != id).collect();
                    self.close_lanes(&others, until, now);
                }
            }
            _ => {}
        }
    }

    fn close_lanes(&mut self, lanes: &[LaneId], until: Instant, now: Instant) {
        for (turn, lane) in lanes.iter().enumerate() {
            let at = self.lanes[lane.0].pace;
            if let Measure::Pace(pace) = &mut self.limits[at.0].measure {
                pace.close_until(until + TURN * u32::try_from(turn.min(MOST_TURNS)).unwrap_or_default(), now);
            }
            if !self.limits[at.0].line.is_empty() {
                self.opened.push(at);
            }
        }
    }

    fn add_flow(&mut self, of: Tenant, tenant: TenantId, lane: LaneId) -> FlowId {
        let model = self.lanes[lane.0].lane.model;
        let (path, observed) = self.ways_of(of, lane);
        let flow = Flow {
            tenant,
            lane,
            model,
            path,
            observed,
            waiters: BTreeMap::new(),
            load: Load::default(),
            place: Place::Empty,
            in_flight: 0,
        };
        let id = match self.free_flows.pop() {
            Some(id) => {
                self.flows[id.0] = flow;
                id
            }
            None => {
                self.flows.push(flow);
                FlowId(self.flows.len() - 1)
            }
        };
        self.of_flow.insert((tenant, lane), id);
        self.lanes[lane.0].flows += 1;
        self.tenants.share_mut(tenant).flows += 1;
        id
    }

    /// The limits that such a tenant's requests in this lane have to pass, and those that only count them.
    fn ways_of(&self, tenant: Tenant, lane: LaneId) -> (Vec<LimitId>, Vec<LimitId>) {
        let LaneState { lane: Lane { model, .. }, pace, .. } = self.lanes[lane.0];
        let of_model = self.of_model.get(&model).into_iter().flatten();
        let client = if let Tenant::Named(client) = tenant { self.of_client.get(&client) } else { None };
        let all = self.global.iter().chain(of_model).chain(client.into_iter().flatten()).copied().chain([pace]);
        all.partition(|id| self.limits[id.0].mode == Mode::Enforce)
    }

    /// The same for a flow that is there, as it would be made now.
    pub(super) fn ways_now(&self, id: FlowId) -> (Vec<LimitId>, Vec<LimitId>) {
        let Flow { tenant, lane, .. } = self.flows[id.0];
        self.ways_of(self.tenants.share(tenant).tenant, lane)
    }

    /// The paces of all lanes, in an order that does not depend on hashes.
    pub(super) fn paces(&self) -> Vec<LimitId> {
        let mut paces: Vec<LimitId> = self.of_lane.values().map(|lane| self.lanes[lane.0].pace).collect();
        paces.sort_unstable();
        paces
    }

    /// Forgets what is idle, when there is much.
    fn sweep(&mut self) {
        let many = self.of_flow.len() >= self.flows_before_sweep
            || self.of_lane.len() >= MAX_LANES
            || self.tenants.known_tenants() > 2 * MAX_IDLE;
        if !many {
            return;
        }
        let flows = &self.flows;
        let idle: Vec<FlowId> = self.of_flow.extract_if(|_, id| flows[id.0].is_idle()).map(|(_, id)| id).collect();
        for id in idle {
            let Flow { tenant, lane, .. } = self.flows[id.0];
            self.lanes[lane.0].flows -= 1;
            self.tenants.share_mut(tenant).flows -= 1;
            self.free_flows.push(id);
        }
        let lanes = &self.lanes;
        let unused: Vec<LaneId> = self.of_lane.extract_if(|_, id| lanes[id.0].flows == 0).map(|(_, id)| id).collect();
        for id in unused {
            let LaneState { lane, pace, .. } = self.lanes[id.0];
            self.free_limits.push(pace);
            self.free_lanes.push(id);
            if let Some(shared) = self.credentials.get_mut(&lane.credential) {
                shared.lanes.remove(&id);
                if shared.lanes.is_empty() {
                    self.credentials.remove(&lane.credential);
                }
            }
        }
        let forgotten = self.tenants.forget_idle();
        for (tenant, lines) in &forgotten {
            lines.iter().for_each(|limit| self.limits[limit.0].line.forget(*tenant));
        }
        // Their places are given to others, who have been promised nothing.
        let forgotten = forgotten.into_iter().map(|(tenant, _)| tenant).collect();
        self.limits.iter_mut().for_each(|limit| limit.forget(&forgotten));
        // Where many are in use, not at each newcomer.
        self.flows_before_sweep = MAX_IDLE.max(2 * self.of_flow.len());
    }

    fn cooldown(&self, pace: LimitId, now: Instant) -> Duration {
        match &self.limits[pace.0].measure {
            Measure::Pace(pace) => pace.cooldown(now),
            Measure::Requests(_) | Measure::Tokens(_) | Measure::Concurrency(_) => Duration::ZERO,
        }
    }

    fn tightest_slots(&self, flow: &Flow<W>) -> Option<u32> {
        let limits = flow.way().map(|id| &self.limits[id.0]);
        let of_everyone = limits.filter(|limit| !matches!(limit.scope, Scope::Client(_)));
        let numbers = of_everyone.filter_map(|limit| match &limit.measure {
            Measure::Concurrency(slots) => Some(slots.limit()),
            Measure::Pace(pace) => pace.slot_limit(),
            Measure::Requests(_) | Measure::Tokens(_) => None,
        });
        numbers.min()
    }
}
