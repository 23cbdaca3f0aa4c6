//! Who is next, for how long, and who is refused: the deciding part of admission.
//!
//! Pure: it is given `now`, holds no socket, task or lock, and hands out what `W` stands for (a sender in weir, a number in
//! tests) when a waiter's turn has come.
//!
//! Requests of one tenant in one lane wait in one **flow**, first come first served. A flow is *ready* (its first waiter is
//! to be looked at), *parked* at the one limit that holds its first waiter up, or empty. So flows do not block each other
//! unless they wait for the same limit, and there the one whose tenant has had least goes first ([`super::line`]). A big
//! request that is first in line is not passed by smaller ones behind it: it waits until there is enough for it.
//!
//! No wake-up is lost: a limit with somebody parked has no room for the first in line, or is in `opened` and about to be
//! looked at. Room appears when a slot or cell is given back (`opened` at once), when a bucket refills (its timer), or when
//! another becomes first (`opened`). Every method that may make room is followed by [`Queue::pump`].

mod flows;
mod predict;
mod reload;
mod survey;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::estimate::Cost;
use super::fair::{TenantId, Tenants, Virtual};
use super::ids::IdMap;
use super::limit::{FlowId, Limit, LimitId, Measure, Need, Rank, Scope};
use super::line::{Head, Line, Load};
use super::pace::{Heard, LaneRules, Pace, Pass, Signal};
use super::refusal::Refusal;
use super::slack::ChargeNo;
use crate::clients::{ClientId, Tenant};
use crate::config::{Mode, Weight};
use crate::error::Cause;
use crate::models::ModelId;

use flows::{Flow, LaneId, LaneState, Shared};

pub use reload::{NewLimits, Table};
pub use survey::{LaneView, Level, LimitView, ModelView, Newcomer, Outlook, Survey, Waiting, Who};

/// Those who share what is learned about the gateway: one upstream credential (by fingerprint) and one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lane {
    pub credential: u64,
    pub model: ModelId,
}

/// The least that a request counts for among tenants, in tokens: one that costs nothing takes its place all the same.
const LEAST_SHARE: u64 = 64;

/// A request that asks to be let through.
#[derive(Debug, Clone)]
pub struct Ask {
    pub tenant: Tenant,
    pub weight: Weight,
    pub lane: Lane,
    pub rank: Rank,
    pub cost: Cost,
    /// How long a request like this may wait, counted from its first arrival.
    pub max_wait: Duration,
    /// When this one has waited long enough.
    pub until: Instant,
    /// It has been let through before: it may pass `max_waiting`.
    pub again: bool,
}

/// What was taken for a request: a slot of every semaphore on the way, and what it is estimated to cost.
#[derive(Debug)]
pub struct Grant {
    flow: FlowId,
    at: Instant,
    charge: ChargeNo,
    cost: Cost,
    /// Its tenant's, when it was let through.
    weight: Weight,
    /// The limits that counted it, by [`Limit::mark`].
    counted: u16,
    /// The limits in observe mode that would have refused it.
    pub would_refuse: Vec<Cause>,
    /// What its lane's pace wants to have back.
    pass: Option<Pass>,
}

impl Grant {
    /// What the request was estimated to cost.
    pub fn cost(&self) -> Cost {
        self.cost
    }
}

/// What follows from how an attempt has ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Echo {
    /// Its lane holds everyone up until the gateway takes requests again, so that a retry need not wait by itself.
    pub lane_waits: bool,
    /// The attempt found out for others, who wait, what the gateway takes: it is not to cost the request a retry.
    pub was_for_others: bool,
}

/// What a request that was let through came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Used {
    /// The gateway never saw it.
    Unsent,
    /// The gateway answered it with an error: no tokens, but a request.
    Refused,
    /// So many tokens.
    Tokens(u64),
}

/// Where a waiter stands.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    flow: FlowId,
    rank: Rank,
}

/// Where a request may wait, and in whose place if the queue is full.
pub struct Opening {
    flow: FlowId,
    displaced: Option<Ticket>,
}

/// The answer to an [`Ask`].
pub enum Offer {
    Admitted(Grant),
    /// To be followed by [`Queue::enqueue`], before anything else happens.
    MustWait(Opening),
    Refused(Refusal),
}

/// What holds for the queue as a whole.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub max_waiting: usize,
    pub lane: LaneRules,
    /// Whether everyone's limits hold anybody up.
    pub mode: Mode,
}

/// Everyone who waits, and every limit they wait for. Limits can be changed under way ([`Queue::reload`]).
pub struct Queue<W> {
    rules: Rules,
    limits: Vec<Limit>,
    /// Places in `limits` that a forgotten lane has left.
    free_limits: Vec<LimitId>,
    global: Vec<LimitId>,
    of_model: IdMap<ModelId, Vec<LimitId>>,
    of_client: IdMap<ClientId, Vec<LimitId>>,
    tenants: Tenants,
    lanes: Vec<LaneState>,
    free_lanes: Vec<LaneId>,
    of_lane: IdMap<Lane, LaneId>,
    /// By [`Lane::credential`].
    credentials: IdMap<u64, Shared>,
    flows: Vec<Flow<W>>,
    free_flows: Vec<FlowId>,
    of_flow: IdMap<(TenantId, LaneId), FlowId>,
    /// When there are so many flows, idle ones are forgotten.
    flows_before_sweep: usize,
    ready: BTreeSet<(Rank, FlowId)>,
    opened: Vec<LimitId>,
    /// Tenants whose last flow has left a line; it may stand there again before the pump is done.
    gone: Vec<(LimitId, TenantId)>,
    timers: BTreeSet<(Instant, LimitId)>,
    /// Who waited until the gateway was given up.
    turned_away: Vec<(W, Refusal)>,
    charges: u64,
    waiting: usize,
    reserved_tokens: u64,
    closed: bool,
}

struct Waiter<W> {
    wake: W,
    cost: Cost,
    since: Instant,
    max_wait: Duration,
    again: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Empty,
    /// About to be looked at; `from` is the limit that has made room for it and may have more.
    Ready {
        from: Option<LimitId>,
    },
    Parked(LimitId),
}

impl<W> Queue<W> {
    /// An empty queue before these limits, which everyone has to pass.
    pub fn new(rules: Rules, global: Vec<Measure>) -> Self {
        let mut queue = Self {
            rules,
            limits: Vec::new(),
            free_limits: Vec::new(),
            global: Vec::new(),
            of_model: IdMap::default(),
            of_client: IdMap::default(),
            tenants: Tenants::default(),
            lanes: Vec::new(),
            free_lanes: Vec::new(),
            of_lane: IdMap::default(),
            credentials: IdMap::default(),
            flows: Vec::new(),
            free_flows: Vec::new(),
            of_flow: IdMap::default(),
            flows_before_sweep: flows::MAX_IDLE,
            ready: BTreeSet::new(),
            opened: Vec::new(),
            gone: Vec::new(),
            timers: BTreeSet::new(),
            turned_away: Vec::new(),
            charges: 0,
            waiting: 0,
            reserved_tokens: 0,
            closed: false,
        };
        queue.global = queue.add_limits(&Scope::Global, rules.mode, global);
        queue
    }

    /// Whether the limits of this model are known already; else [`Queue::limit_model`] comes first.
    pub fn knows(&self, model: ModelId) -> bool {
        self.of_model.contains_key(&model)
    }

    /// Sets the limits of a model, on top of everyone's.
    pub fn limit_model(&mut self, model: ModelId, name: &Arc<str>, mode: Mode, measures: Vec<Measure>) {
        let limits = self.add_limits(&Scope::Model(name.clone()), mode, measures);
        self.of_model.insert(model, limits);
    }

    /// Sets the limits of a client, on top of everyone's.
    pub fn limit_client(&mut self, client: ClientId, name: &Arc<str>, mode: Mode, measures: Vec<Measure>) {
        let limits = self.add_limits(&Scope::Client(name.clone()), mode, measures);
        self.of_client.insert(client, limits);
    }

    /// Lets a request through at once if it can, or says that it must wait or is refused.
    pub fn offer(&mut self, ask: &Ask, model_name: impl Fn() -> Arc<str>, now: Instant) -> Offer {
        if self.closed {
            return Offer::Refused(Refusal::draining());
        }
        let id = self.flow_of(ask, model_name, now);
        let need = self.need(id, ask.cost);
        let first = self.flows[id.0].waiters.first_key_value().is_none_or(|(head, _)| ask.rank < *head);
        let blocker = match self.blocker(need, ask.rank, now) {
            None if first => return Offer::Admitted(self.grant(id, ask.cost, ask.max_wait, now, now)),
            // What holds up those before it holds it up too.
            None => self.held_up_by(id).expect("nobody waits where there is no limit"),
            Some(blocker) => blocker,
        };
        let pace = self.pace_of(id);
        if self.limits[pace.0].given_up(now) {
            return Offer::Refused(self.refuse(id, pace, Cause::Unavailable, ask.cost, ask.max_wait, now));
        }
        if let Some(limit) = self.too_late(id, ask, now) {
            let cause = self.limits[limit.0].cause(ask.cost.tokens(), now);
            return Offer::Refused(self.refuse(id, limit, cause, ask.cost, ask.max_wait, now));
        }
        let full = self.is_full() && !ask.again;
        let displaced = if full { self.whom_to_displace(Some(self.flows[id.0].tenant), ask.weight) } else { None };
        if full && displaced.is_none() {
            return Offer::Refused(self.refuse(id, blocker, Cause::QueueFull, ask.cost, ask.max_wait, now));
        }
        Offer::MustWait(Opening { flow: id, displaced })
    }

    /// Puts a request in its place in the queue. [`Queue::pump`] hands `wake` out when its turn has come.
    ///
    /// In a full queue it takes the place of another tenant's last, which is handed back with its refusal.
    pub fn enqueue(&mut self, opening: &Opening, ask: &Ask, wake: W, now: Instant) -> (Ticket, Option<(W, Refusal)>) {
        let id = opening.flow;
        let displaced = opening.displaced.and_then(|ticket| self.displace(ticket, now));
        let Ask { rank, cost, max_wait, again, .. } = *ask;
        let waiter = Waiter { wake, cost, since: now, max_wait, again };
        let head = self.flows[id.0].waiters.first_key_value().map(|(rank, _)| *rank);
        let behind = head.is_some_and(|head| head < rank);
        if !behind {
            self.leave_place(id, now);
        }
        let flow = &mut self.flows[id.0];
        let (tenant, load) = (flow.tenant, Load::one(cost.tokens()));
        flow.waiters.insert(rank, waiter);
        flow.load = flow.load.plus(load);
        if let (true, Place::Parked(limit)) = (behind, flow.place) {
            self.limits[limit.0].line.grow(tenant, load);
        }
        let lane = flow.lane;
        self.lane_mut(lane).waiting += 1;
        self.tenants.joins(tenant);
        if head.is_none() {
            self.tenants.share_mut(tenant).backlog.insert(id);
        }
        self.waiting += 1;
        if !behind {
            self.make_ready(id, None);
        }
        (Ticket { flow: id, rank }, displaced)
    }

    /// Takes a waiter out who has given up. `false` where its turn had come already.
    pub fn leave(&mut self, ticket: Ticket, now: Instant) -> bool {
        self.remove(ticket, now).is_some()
    }

    /// Refuses a waiter whose time is over. `None` where its turn had come already.
    pub fn expire(&mut self, ticket: Ticket, now: Instant) -> Option<Refusal> {
        let blocker = self.held_up_by(ticket.flow);
        let waiter = self.remove(ticket, now)?;
        let cause = self.limits[blocker?.0].cause(waiter.cost.tokens(), now);
        Some(self.refuse(ticket.flow, blocker?, cause, waiter.cost, waiter.max_wait, now))
    }

    /// Takes back what was granted, and settles what it came to.
    pub fn release(&mut self, grant: &Grant, used: Used, now: Instant) {
        let flow = &mut self.flows[grant.flow.0];
        flow.in_flight -= 1;
        let tenant = flow.tenant;
        let charged = grant.cost.tokens();
        let tokens = match used {
            Used::Unsent | Used::Refused => 0,
            Used::Tokens(tokens) => tokens,
        };
        self.reserved_tokens = self.reserved_tokens.saturating_sub(charged);
        let correction = self.next_charge();
        let held = now.saturating_duration_since(grant.at);
        for id in self.flows[grant.flow.0].way() {
            let limit = &mut self.limits[id.0];
            if !limit.has_counted(grant.charge, grant.counted) {
                continue;
            }
            match &mut limit.measure {
                Measure::Concurrency(slots) => slots.give_back(held),
                Measure::Pace(pace) => {
                    let Some(pass) = &grant.pass else { continue };
                    pace.give_back(pass, used, now);
                }
                Measure::Requests(bucket) if used == Used::Unsent => bucket.give_back(1, grant.charge),
                Measure::Requests(_) => continue,
                Measure::Tokens(_) if charged == 0 => continue,
                Measure::Tokens(bucket) if tokens < charged => bucket.give_back(charged - tokens, grant.charge),
                Measure::Tokens(bucket) => bucket.owe(tokens - charged, correction, now),
            }
            if !limit.line.is_empty() {
                self.opened.push(id);
            }
        }
        let share = match used {
            Used::Unsent => 0,
            // It has cost the others a request, if no tokens.
            Used::Refused => grant.cost.prompt.max(LEAST_SHARE),
            Used::Tokens(tokens) => tokens.max(LEAST_SHARE),
        };
        self.tenants.share_mut(tenant).in_flight -= 1;
        // As it was charged: its weight may have changed meanwhile.
        let weight = grant.weight;
        let (charged, service) = (Virtual::of(charged.max(LEAST_SHARE), weight), Virtual::of(share, weight));
        self.recount(grant.flow, |line, here| match here {
            true => line.correct(tenant, charged, service),
            false => line.correct_elsewhere(tenant, charged, service),
        });
    }

    /// What became of an attempt, as far as the gateway's answer or silence tells it. Before [`Queue::release`].
    pub fn hear(&mut self, grant: &Grant, heard: &Heard, now: Instant) -> Echo {
        let Some(pass) = &grant.pass else { return Echo::default() };
        let pace = self.pace_of(grant.flow);
        let limit = &mut self.limits[pace.0];
        let waits = limit.hear(pass, heard, now);
        self.compare_lanes(grant.flow, pass, heard.signal, now);
        let limit = &mut self.limits[pace.0];
        let others_wait = !limit.line.is_empty();
        if others_wait {
            self.opened.push(pace);
        }
        let found_out = pass.is_probe() || matches!(heard.signal, Signal::Refused { .. });
        Echo { lane_waits: waits && limit.mode == Mode::Enforce, was_for_others: found_out && others_wait }
    }

    /// Charges the request buckets on the way once more, whether they have room or not.
    pub fn charge_again(&mut self, grant: &Grant, now: Instant) {
        let charge = self.next_charge();
        let way: Vec<LimitId> = self.flows[grant.flow.0].way().collect();
        for id in way {
            let limit = &mut self.limits[id.0];
            let counted = limit.has_counted(grant.charge, grant.counted);
            if let Measure::Requests(bucket) = &mut limit.measure
                && counted
            {
                bucket.owe(1, charge, now);
                self.set_timer(id, now);
            }
        }
    }

    /// Refuses everyone from now on, and hands out all who wait.
    pub fn close(&mut self, now: Instant) -> Vec<W> {
        self.closed = true;
        let mut all = Vec::new();
        for id in (0..self.flows.len()).map(FlowId) {
            while let Some((rank, _)) = self.flows[id.0].waiters.first_key_value() {
                let ticket = Ticket { flow: id, rank: *rank };
                all.extend(self.remove(ticket, now).map(|waiter| waiter.wake));
            }
        }
        all
    }

    /// Lets through whoever can go now, in order; `granted` is told of each.
    pub fn pump(&mut self, now: Instant, mut granted: impl FnMut(W, Grant)) {
        while let Some((at, limit)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, limit));
            self.limits[limit.0].timer = None;
            if self.limits[limit.0].given_up(now) {
                self.turn_away(limit, now);
            }
            self.opened.push(limit);
        }
        loop {
            while let Some(limit) = self.opened.pop() {
                self.unpark_first(limit, now);
            }
            let Some((rank, id)) = self.ready.first().copied() else { break };
            self.look_at(id, rank, now, &mut granted);
        }
        for (limit, tenant) in std::mem::take(&mut self.gone) {
            for tenant in self.limits[limit.0].line.went(tenant) {
                self.tenants.share_mut(tenant).lines.retain(|line| *line != limit);
            }
        }
    }

    /// Those whom [`Queue::pump`] has refused, since their gateway has failed for too long.
    pub fn turned_away(&mut self) -> Vec<(W, Refusal)> {
        std::mem::take(&mut self.turned_away)
    }

    /// When [`Queue::pump`] is to be called at the latest.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// What requests under way are estimated to cost, until they are settled.
    pub fn reserved_tokens(&self) -> u64 {
        self.reserved_tokens
    }

    /// The limits of the configuration: everyone's, the models' and the clients'.
    pub fn limits(&self) -> impl Iterator<Item = &Limit> {
        let own = self.of_model.values().chain(self.of_client.values());
        self.global.iter().chain(own.flatten()).map(|id| &self.limits[id.0])
    }

    fn add_limits(&mut self, scope: &Scope, mode: Mode, measures: Vec<Measure>) -> Vec<LimitId> {
        measures.into_iter().map(|measure| self.add_limit(Limit::new(scope.clone(), measure, mode))).collect()
    }

    fn add_limit(&mut self, mut limit: Limit) -> LimitId {
        limit.since = ChargeNo(self.charges);
        if let Some(id) = self.free_limits.pop() {
            self.limits[id.0] = limit;
            return id;
        }
        self.limits.push(limit);
        LimitId(self.limits.len() - 1)
    }

    fn next_charge(&mut self) -> ChargeNo {
        self.charges += 1;
        ChargeNo(self.charges)
    }

    fn need(&self, flow: FlowId, cost: Cost) -> Need {
        let Flow { tenant, model, .. } = self.flows[flow.0];
        Need { flow, tenant, model, tokens: cost.tokens() }
    }

    /// What a flow's first waiter needs.
    fn need_of(&self, flow: FlowId) -> Option<Need> {
        let (_, waiter) = self.flows[flow.0].waiters.first_key_value()?;
        Some(self.need(flow, waiter.cost))
    }

    /// The first limit on the way that holds up a waiter of this rank: one without room, or where an earlier one waits.
    fn blocker(&self, need: Need, rank: Rank, now: Instant) -> Option<LimitId> {
        let flow = &self.flows[need.flow.0];
        let precedes = |line: &Line, head: Head| match head.tenant == flow.tenant {
            true => head.rank < rank,
            false => (line.tag(head.tenant), head.rank) < (line.tag(flow.tenant), rank),
        };
        let holds_up = |limit: &Limit| {
            // Who has saved long enough has its turn.
            let saved = limit.saver.is_some_and(|saver| saver.need.flow == need.flow);
            let has_turn = || saved || !limit.line.first().is_some_and(|head| precedes(&limit.line, head));
            limit.concerns(need.tokens) && !(limit.has_room(need, now) && has_turn())
        };
        flow.path.iter().copied().find(|limit| holds_up(&self.limits[limit.0]))
    }

    fn grant(&mut self, id: FlowId, cost: Cost, max_wait: Duration, waiting_since: Instant, now: Instant) -> Grant {
        let charge = self.next_charge();
        let tokens = cost.tokens();
        let flow = &mut self.flows[id.0];
        let weight = self.tenants.share(flow.tenant).weight;
        let (would_refuse, pass) = (Vec::new(), None);
        let mut grant = Grant { flow: id, at: now, charge, cost, weight, counted: 0, would_refuse, pass };
        flow.in_flight += 1;
        for limit in &flow.path {
            let limit = &mut self.limits[limit.0];
            if limit.concerns(tokens) {
                grant.pass = limit.take(tokens, charge, waiting_since, now).or(grant.pass);
                grant.counted |= limit.mark;
                limit.note_turn(flow.tenant, tokens, waiting_since < now);
            }
        }
        for limit in &flow.observed {
            let limit = &mut self.limits[limit.0];
            if let Measure::Pace(pace) = &mut limit.measure {
                // It goes on learning, and holds nobody up.
                grant.pass = Some(pace.pass(tokens, waiting_since < now, now));
                grant.counted |= limit.mark;
                continue;
            }
            if limit.concerns(tokens) && limit.observe(tokens, charge, max_wait, now) {
                grant.counted |= limit.mark;
            } else if limit.concerns(tokens) && !grant.would_refuse.contains(&limit.cause(tokens, now)) {
                grant.would_refuse.push(limit.cause(tokens, now));
            }
        }
        self.reserved_tokens = self.reserved_tokens.saturating_add(tokens);
        let tenant = flow.tenant;
        let share = self.tenants.share_mut(tenant);
        share.in_flight += 1;
        let service = Virtual::of(tokens.max(LEAST_SHARE), share.weight);
        for id in &flow.path {
            let line = &mut self.limits[id.0].line;
            // Where there is a line, whoever passes is known from now on.
            if line.has_begun() && line.meet(tenant) {
                share.lines.push(*id);
            }
        }
        self.recount(id, |line, here| match here {
            true => line.served(tenant, service),
            false => line.served_elsewhere(tenant, service),
        });
        grant
    }

    /// What the flow's tenant has had changes in all lines where it is known, by way of this flow's limits or elsewhere. Where
    /// that makes another the first, it may have room at once.
    fn recount(&mut self, id: FlowId, change: impl Fn(&mut Line, bool)) {
        let flow = &self.flows[id.0];
        let lines = &self.tenants.share(flow.tenant).lines;
        let elsewhere = lines.iter().filter(|limit| !flow.path.contains(limit)).map(|limit| (*limit, false));
        for (limit, here) in flow.path.iter().map(|limit| (*limit, true)).chain(elsewhere) {
            let Limit { line, saver, .. } = &mut self.limits[limit.0];
            // Who has a line to itself competes with nobody there. One that uses many models has many such lines.
            if !line.knows(flow.tenant) || !(here || line.is_shared()) {
                continue;
            }
            let first = line.first().map(|head| head.tenant);
            change(line, here);
            // Who is behind one who saves may not be so any more.
            if line.first().map(|head| head.tenant) != first || saver.is_some() {
                self.opened.push(limit);
            }
        }
    }

    /// Lets the first of a ready flow through, or parks the flow at what holds it up.
    fn look_at(&mut self, id: FlowId, rank: Rank, now: Instant, granted: &mut impl FnMut(W, Grant)) {
        let Place::Ready { from } = self.unplace(id, now) else { unreachable!("only ready flows are looked at") };
        let need = self.need_of(id).expect("a ready flow has a first waiter");
        let blocker = self.blocker(need, rank, now);
        if let Some(from) = from {
            self.end_saving(id, from);
        }
        if let Some(limit) = blocker {
            self.park(need, rank, limit, now);
            // The room it was offered is left to whoever is next in line there now.
            self.opened.extend(from);
            return;
        }
        let waiter = self.take_first(id).expect("a ready flow has a first waiter");
        let grant = self.grant(id, waiter.cost, waiter.max_wait, waiter.since, now);
        self.make_ready(id, None);
        self.opened.extend(from);
        granted(waiter.wake, grant);
    }

    fn make_ready(&mut self, id: FlowId, from: Option<LimitId>) {
        let flow = &mut self.flows[id.0];
        let Some((rank, _)) = flow.waiters.first_key_value() else { return };
        self.ready.insert((*rank, id));
        flow.place = Place::Ready { from };
    }

    fn park(&mut self, need: Need, rank: Rank, at: LimitId, now: Instant) {
        let flow = &mut self.flows[need.flow.0];
        flow.place = Place::Parked(at);
        let load = flow.load;
        let head = self.head(need.flow, rank);
        let share = self.tenants.share_mut(head.tenant);
        let limit = &mut self.limits[at.0];
        if limit.line.load_of(head.tenant).requests == 0 {
            limit.begins_to_wait(head.tenant);
        }
        if limit.line.insert(head, load, u64::from(share.weight.thousandths())) {
            share.lines.push(at);
        }
        if limit.is_behind_saver(need) {
            limit.line.set_aside(head);
        } else if limit.is_oversize(need.tokens) {
            // It may have to save, and nobody is to stand behind it until then.
            self.opened.push(at);
        }
        self.set_timer(at, now);
    }

    /// Makes the first of those parked here ready, if there is room for it. One at a time: it may take the last room.
    ///
    /// One that needs more than a bucket ever holds is set aside until the bucket is full, and with it those behind it that
    /// are for its model: what is left of the refill goes to the others.
    fn unpark_first(&mut self, at: LimitId, now: Instant) {
        loop {
            let limit = &self.limits[at.0];
            if let Some(saver) = limit.saver.filter(|saver| limit.has_room(saver.need, now)) {
                return self.offer_room(saver.need.flow, at, now);
            }
            let Some(head) = limit.line.first() else { break };
            let need = self.need_of(head.flow).expect("who stands in line waits");
            let limit = &mut self.limits[at.0];
            if limit.has_room(need, now) {
                return self.offer_room(head.flow, at, now);
            }
            if limit.saver.is_none() && limit.is_oversize(need.tokens) {
                limit.begin_saving(need, now);
            } else if !limit.is_behind_saver(need) {
                break;
            }
            limit.line.set_aside(head);
        }
        self.set_timer(at, now);
    }

    fn offer_room(&mut self, id: FlowId, at: LimitId, now: Instant) {
        self.unplace(id, now);
        self.make_ready(id, Some(at));
    }

    /// Takes a flow out of where it stands, and says where that was.
    fn unplace(&mut self, id: FlowId, now: Instant) -> Place {
        let flow = &mut self.flows[id.0];
        let place = std::mem::replace(&mut flow.place, Place::Empty);
        let Some((rank, _)) = flow.waiters.first_key_value() else { return place };
        let (rank, load) = (*rank, flow.load);
        match place {
            Place::Empty => {}
            Place::Ready { .. } => {
                self.ready.remove(&(rank, id));
            }
            Place::Parked(at) => {
                let head = self.head(id, rank);
                if self.limits[at.0].line.remove(head, load) {
                    self.gone.push((at, head.tenant));
                }
                self.set_timer(at, now);
            }
        }
        place
    }

    /// If this flow was saving, those who were set aside for it stand in line again.
    fn end_saving(&mut self, id: FlowId, at: LimitId) {
        let limit = &mut self.limits[at.0];
        if limit.saver.is_some_and(|saver| saver.need.flow == id) {
            limit.saver = None;
            limit.line.bring_back();
            self.opened.push(at);
        }
    }

    /// As [`Queue::unplace`], for a flow whose first waiter changes: whoever stands behind it there is looked at next.
    fn leave_place(&mut self, id: FlowId, now: Instant) {
        match self.unplace(id, now) {
            Place::Empty => {}
            Place::Ready { from } => self.opened.extend(from),
            Place::Parked(at) => {
                self.pay_for_saving(id, at, now);
                self.end_saving(id, at);
                self.opened.push(at);
            }
        }
    }

    /// Who saved and leaves has kept its model's others waiting: that counts as service, or one could do it for ever.
    fn pay_for_saving(&mut self, id: FlowId, at: LimitId, now: Instant) {
        let (tenant, limit) = (self.flows[id.0].tenant, &mut self.limits[at.0]);
        if limit.saver.is_some_and(|saver| saver.need.flow == id) {
            let weight = self.tenants.share(tenant).weight;
            limit.line.served(tenant, Virtual::of(limit.saved(now), weight));
        }
    }

    fn remove(&mut self, ticket: Ticket, now: Instant) -> Option<Waiter<W>> {
        let Ticket { flow: id, rank } = ticket;
        let (head, _) = self.flows[id.0].waiters.first_key_value()?;
        if *head == rank {
            self.leave_place(id, now);
            let waiter = self.take_first(id);
            self.make_ready(id, None);
            return waiter;
        }
        let waiter = self.take_out(id, rank)?;
        let flow = &self.flows[id.0];
        if let Place::Parked(limit) = flow.place {
            self.limits[limit.0].line.shrink(flow.tenant, Load::one(waiter.cost.tokens()));
        }
        Some(waiter)
    }

    fn take_first(&mut self, id: FlowId) -> Option<Waiter<W>> {
        let (rank, _) = self.flows[id.0].waiters.first_key_value()?;
        self.take_out(id, *rank)
    }

    /// Takes a waiter out of its flow, and out of all sums but a line's.
    fn take_out(&mut self, id: FlowId, rank: Rank) -> Option<Waiter<W>> {
        let flow = &mut self.flows[id.0];
        let waiter = flow.waiters.remove(&rank)?;
        flow.load = flow.load.minus(Load::one(waiter.cost.tokens()));
        if flow.waiters.is_empty() {
            self.tenants.share_mut(flow.tenant).backlog.remove(&id);
        }
        let (tenant, lane) = (flow.tenant, flow.lane);
        self.tenants.leaves(tenant);
        self.lane_mut(lane).waiting -= 1;
        self.waiting -= 1;
        Some(waiter)
    }

    fn head(&self, flow: FlowId, rank: Rank) -> Head {
        Head { tenant: self.flows[flow.0].tenant, rank, flow }
    }

    /// What holds a flow up; between two pumps nobody is merely ready, and whatever is on the way will do.
    fn held_up_by(&self, id: FlowId) -> Option<LimitId> {
        match self.flows[id.0].place {
            Place::Parked(limit) => Some(limit),
            Place::Ready { .. } | Place::Empty => self.flows[id.0].path.first().copied(),
        }
    }

    fn set_timer(&mut self, id: LimitId, now: Instant) {
        let limit = &self.limits[id.0];
        let wanted = match limit.line.first() {
            Some(head) => limit.next_look(self.need_of(head.flow), now),
            None => limit.next_look(None, now),
        };
        let limit = &mut self.limits[id.0];
        if limit.timer == wanted {
            return;
        }
        if let Some(at) = std::mem::replace(&mut limit.timer, wanted) {
            self.timers.remove(&(at, id));
        }
        self.timers.extend(wanted.map(|at| (at, id)));
    }

    fn is_full(&self) -> bool {
        self.waiting >= self.rules.max_waiting
    }

    /// Another tenant's waiter to give up its place in a full queue: the last of the one that fills it most, if this tenant (none
    /// where it is not known yet) would still have less of it than that one. A retry is nobody's to displace: it was let through
    /// before.
    fn whom_to_displace(&self, own: Option<TenantId>, weight: Weight) -> Option<Ticket> {
        let other = self.tenants.heaviest()?;
        let waiting = |tenant: TenantId| self.tenants.share(tenant).waiting;
        let with_one_more = Virtual::of(own.map_or(0, waiting) + 1, weight);
        let with_one_less = Virtual::of(waiting(other) - 1, self.tenants.share(other).weight);
        if own == Some(other) || with_one_more > with_one_less {
            return None;
        }
        let last = |flow: &FlowId| {
            let (rank, _) = self.flows[flow.0].waiters.iter().rev().find(|(_, waiter)| !waiter.again)?;
            Some(Ticket { flow: *flow, rank: *rank })
        };
        self.tenants.share(other).backlog.iter().filter_map(last).max_by_key(|ticket| ticket.rank)
    }

    /// Refuses everyone who waits in the lane of this pace.
    fn turn_away(&mut self, pace: LimitId, now: Instant) {
        let in_lane = |id: &FlowId| self.pace_of(*id) == pace && !self.flows[id.0].waiters.is_empty();
        let flows: Vec<FlowId> = self.of_flow.values().copied().filter(in_lane).collect();
        for flow in flows {
            while let Some((rank, _)) = self.flows[flow.0].waiters.first_key_value() {
                let Some(waiter) = self.remove(Ticket { flow, rank: *rank }, now) else { break };
                let refusal = self.refuse(flow, pace, Cause::Unavailable, waiter.cost, waiter.max_wait, now);
                self.turned_away.push((waiter.wake, refusal));
            }
        }
    }

    fn displace(&mut self, ticket: Ticket, now: Instant) -> Option<(W, Refusal)> {
        let blocker = self.held_up_by(ticket.flow)?;
        let waiter = self.remove(ticket, now)?;
        let refusal = self.refuse(ticket.flow, blocker, Cause::QueueFull, waiter.cost, waiter.max_wait, now);
        Some((waiter.wake, refusal))
    }
}

#[cfg(test)]
mod fair_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod reload_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod token_tests;
