//! Who is next, for how long, and who is refused: the deciding part of admission.
//!
//! Pure: it is given `now`, holds no socket, task or lock, and hands out what `W` stands for (a sender in weir, a number in
//! tests) when a waiter's turn has come.
//!
//! Requests of one lane wait in one **flow**, first come first served. A flow is *ready* (its first waiter is to be looked
//! at), *parked* at the one limit that holds its first waiter up, or empty. So flows do not block each other unless they
//! wait for the same limit, and there the one whose first waiter came earliest goes first.
//!
//! No wake-up is lost: a limit with somebody parked has no room, or is in `opened` and about to be looked at. Room appears
//! when a slot or cell is given back (`opened` at once), when a bucket refills (its timer), or when the first in line
//! leaves (`opened`). Every method that may make room is followed by [`Queue::pump`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::limit::{FlowId, Limit, LimitId, Measure, Rank, Scope};
use super::refusal::Refusal;
use crate::error::Cause;
use crate::models::ModelId;

/// Those who share what is learned about the gateway: one upstream credential (by fingerprint) and one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lane {
    pub credential: u64,
    pub model: ModelId,
}

/// Lanes kept at once. Beyond it the idle ones are forgotten, and if none is idle, newcomers share one lane a model.
pub const MAX_LANES: usize = 4096;

/// A request that asks to be let through.
#[derive(Debug, Clone)]
pub struct Ask {
    pub lane: Lane,
    pub rank: Rank,
    /// How long a request like this may wait, counted from its first arrival.
    pub max_wait: Duration,
    /// When this one has waited long enough.
    pub until: Instant,
    /// It has been let through before: it may pass `max_waiting`.
    pub again: bool,
}

/// What is to be given back: a slot of every semaphore on the way.
#[derive(Debug)]
pub struct Grant {
    flow: FlowId,
    at: Instant,
}

/// Where a waiter stands.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    flow: FlowId,
    rank: Rank,
}

/// The answer to an [`Ask`].
pub enum Offer {
    Admitted(Grant),
    MustWait,
    Refused(Refusal),
}

/// How many requests of a lane may be under way, where no other limit says.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub max_waiting: usize,
    /// Slots of each lane; `None` where the configuration has one number for all.
    pub lane_slots: Option<u32>,
}

/// What there is to see of one lane.
#[derive(Debug, Clone)]
pub struct LaneView {
    pub model: ModelId,
    pub in_flight: u32,
    pub waiting: u64,
    /// The tightest number of slots on its way.
    pub slots: Option<u32>,
}

/// Everyone who waits, and every limit they wait for.
pub struct Queue<W> {
    rules: Rules,
    limits: Vec<Limit>,
    /// Places in `limits` that a forgotten lane has left.
    free_limits: Vec<LimitId>,
    global: Vec<LimitId>,
    of_model: HashMap<ModelId, Vec<LimitId>>,
    flows: Vec<Flow<W>>,
    of_lane: HashMap<Lane, FlowId>,
    free_flows: Vec<FlowId>,
    ready: BTreeSet<(Rank, FlowId)>,
    opened: Vec<LimitId>,
    timers: BTreeSet<(Instant, LimitId)>,
    waiting: usize,
    closed: bool,
}

struct Flow<W> {
    lane: Lane,
    /// Every limit on the way, the widest first.
    path: Vec<LimitId>,
    own_slots: Option<LimitId>,
    waiters: BTreeMap<Rank, Waiter<W>>,
    place: Place,
    in_flight: u32,
}

struct Waiter<W> {
    wake: W,
    since: Instant,
    max_wait: Duration,
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
            of_model: HashMap::new(),
            flows: Vec::new(),
            of_lane: HashMap::new(),
            free_flows: Vec::new(),
            ready: BTreeSet::new(),
            opened: Vec::new(),
            timers: BTreeSet::new(),
            waiting: 0,
            closed: false,
        };
        queue.global = global.into_iter().map(|measure| queue.add_limit(Limit::new(Scope::Global, measure))).collect();
        queue
    }

    /// Whether the limits of this model are known already; else [`Queue::limit_model`] comes first.
    pub fn knows(&self, model: ModelId) -> bool {
        self.of_model.contains_key(&model)
    }

    /// Sets the limits of a model, on top of everyone's.
    pub fn limit_model(&mut self, model: ModelId, name: &Arc<str>, measures: Vec<Measure>) {
        let scoped = |measure| Limit::new(Scope::Model(name.clone()), measure);
        let limits = measures.into_iter().map(|measure| self.add_limit(scoped(measure))).collect();
        self.of_model.insert(model, limits);
    }

    /// Lets a request through at once if it can, or says that it must wait or is refused.
    ///
    /// A [`Offer::MustWait`] is followed by [`Queue::enqueue`] before anything else happens.
    pub fn offer(&mut self, ask: &Ask, model_name: impl Fn() -> Arc<str>, now: Instant) -> Offer {
        if self.closed {
            return Offer::Refused(Refusal::draining());
        }
        let id = self.flow_of(ask.lane, model_name);
        let first = self.flows[id.0].waiters.first_key_value().is_none_or(|(head, _)| ask.rank < *head);
        let Some(blocker) = self.blocker(id, ask.rank, now) else {
            if first {
                return Offer::Admitted(self.grant(id, now, now));
            }
            return Offer::MustWait;
        };
        if self.waiting >= self.rules.max_waiting && !ask.again {
            return Offer::Refused(self.refuse(id, blocker, Cause::QueueFull, ask.max_wait, now));
        }
        match self.too_late(id, ask.until, now) {
            Some(limit) => {
                let cause = self.limits[limit.0].cause();
                Offer::Refused(self.refuse(id, limit, cause, ask.max_wait, now))
            }
            None => Offer::MustWait,
        }
    }

    /// Puts a request in its place in the queue. [`Queue::pump`] hands `wake` out when its turn has come.
    pub fn enqueue(&mut self, ask: &Ask, wake: W, now: Instant) -> Ticket {
        let id = self.of_lane[&self.lane_in_use(ask.lane)];
        let waiter = Waiter { wake, since: now, max_wait: ask.max_wait };
        let head = self.flows[id.0].waiters.first_key_value().map(|(rank, _)| *rank);
        if head.is_some_and(|head| head < ask.rank) {
            self.flows[id.0].waiters.insert(ask.rank, waiter);
            if let Place::Parked(limit) = self.flows[id.0].place {
                self.limits[limit.0].waiting += 1;
            }
        } else {
            self.leave_place(id, now);
            self.flows[id.0].waiters.insert(ask.rank, waiter);
            self.make_ready(id, None);
        }
        self.waiting += 1;
        Ticket { flow: id, rank: ask.rank }
    }

    /// Takes a waiter out who has given up. `false` where its turn had come already.
    pub fn leave(&mut self, ticket: Ticket, now: Instant) -> bool {
        self.remove(ticket, now).is_some()
    }

    /// Refuses a waiter whose time is over. `None` where its turn had come already.
    pub fn expire(&mut self, ticket: Ticket, now: Instant) -> Option<Refusal> {
        let place = self.flows[ticket.flow.0].place;
        let waiter = self.remove(ticket, now)?;
        let blocker = match place {
            Place::Parked(limit) => limit,
            // Between two pumps nobody is merely ready; whatever is tightest will do.
            Place::Ready { .. } | Place::Empty => {
                *self.flows[ticket.flow.0].path.first().expect("nobody waits where there is no limit")
            }
        };
        let cause = self.limits[blocker.0].cause();
        Some(self.refuse(ticket.flow, blocker, cause, waiter.max_wait, now))
    }

    /// Takes back what was granted. `unsent` says that the gateway never saw the request: its cells are given back too.
    pub fn release(&mut self, grant: &Grant, unsent: bool, now: Instant) {
        let flow = &mut self.flows[grant.flow.0];
        flow.in_flight -= 1;
        for id in &flow.path {
            match &mut self.limits[id.0].measure {
                Measure::Concurrency(slots) => slots.give_back(now.saturating_duration_since(grant.at)),
                Measure::Requests(bucket) if unsent => bucket.give_back(grant.at),
                Measure::Requests(_) => continue,
            }
            self.opened.push(*id);
        }
    }

    /// Charges the buckets on the way once more, whether they have room or not.
    pub fn charge_again(&mut self, grant: &Grant, now: Instant) {
        for id in self.flows[grant.flow.0].path.clone() {
            if let Measure::Requests(bucket) = &self.limits[id.0].measure {
                bucket.take_as_debt(now);
                self.set_timer(id, now);
            }
        }
    }

    /// Refuses everyone from now on, and hands out all who wait.
    pub fn close(&mut self, now: Instant) -> Vec<W> {
        self.closed = true;
        let mut all = Vec::new();
        for id in (0..self.flows.len()).map(FlowId) {
            self.unplace(id, now);
            all.extend(std::mem::take(&mut self.flows[id.0].waiters).into_values().map(|waiter| waiter.wake));
        }
        self.waiting = 0;
        all
    }

    /// Lets through whoever can go now, in order; `granted` is told of each.
    pub fn pump(&mut self, now: Instant, mut granted: impl FnMut(W, Grant)) {
        while let Some((at, limit)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, limit));
            self.limits[limit.0].timer = None;
            self.opened.push(limit);
        }
        loop {
            while let Some(limit) = self.opened.pop() {
                self.unpark_first(limit, now);
            }
            let Some((rank, id)) = self.ready.first().copied() else { return };
            self.look_at(id, rank, now, &mut granted);
        }
    }

    /// When [`Queue::pump`] is to be called at the latest.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Every lane that somebody uses.
    pub fn lanes(&self) -> Vec<LaneView> {
        let lanes = self.of_lane.values().map(|id| &self.flows[id.0]);
        lanes
            .map(|flow| LaneView {
                model: flow.lane.model,
                in_flight: flow.in_flight,
                waiting: flow.waiters.len() as u64,
                slots: self.tightest_slots(flow),
            })
            .collect()
    }

    /// The limits of the configuration: everyone's and the models'.
    pub fn limits(&self) -> impl Iterator<Item = &Limit> {
        self.global.iter().chain(self.of_model.values().flatten()).map(|id| &self.limits[id.0])
    }

    fn tightest_slots(&self, flow: &Flow<W>) -> Option<u32> {
        let numbers = flow.path.iter().filter_map(|id| match &self.limits[id.0].measure {
            Measure::Concurrency(slots) => Some(slots.limit()),
            Measure::Requests(_) => None,
        });
        numbers.min()
    }

    fn add_limit(&mut self, limit: Limit) -> LimitId {
        if let Some(id) = self.free_limits.pop() {
            self.limits[id.0] = limit;
            return id;
        }
        self.limits.push(limit);
        LimitId(self.limits.len() - 1)
    }

    fn flow_of(&mut self, lane: Lane, model_name: impl Fn() -> Arc<str>) -> FlowId {
        if let Some(id) = self.of_lane.get(&lane) {
            return *id;
        }
        if self.of_lane.len() >= MAX_LANES {
            self.forget_idle_lanes();
        }
        let lane = self.lane_in_use(lane);
        match self.of_lane.get(&lane) {
            Some(id) => *id,
            None => self.add_flow(lane, model_name),
        }
    }

    /// The lane itself, or the one that its model's newcomers share while there are too many.
    fn lane_in_use(&self, lane: Lane) -> Lane {
        let full = self.of_lane.len() >= MAX_LANES && !self.of_lane.contains_key(&lane);
        if full { Lane { credential: 0, ..lane } } else { lane }
    }

    fn add_flow(&mut self, lane: Lane, model_name: impl Fn() -> Arc<str>) -> FlowId {
        let slots = self.rules.lane_slots.map(|slots| Measure::Concurrency(super::slots::Slots::new(slots)));
        let own_slots = slots.map(|slots| self.add_limit(Limit::new(Scope::Model(model_name()), slots)));
        let of_model = self.of_model.get(&lane.model).into_iter().flatten();
        let path = self.global.iter().chain(of_model).copied().chain(own_slots).collect();
        let flow = Flow { lane, path, own_slots, waiters: BTreeMap::new(), place: Place::Empty, in_flight: 0 };
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
        self.of_lane.insert(lane, id);
        id
    }

    fn forget_idle_lanes(&mut self) {
        let flows = &self.flows;
        let idle = |id: &FlowId| flows[id.0].in_flight == 0 && flows[id.0].waiters.is_empty();
        let forgotten: Vec<FlowId> = self.of_lane.extract_if(|_, id| idle(id)).map(|(_, id)| id).collect();
        for id in forgotten {
            self.free_limits.extend(self.flows[id.0].own_slots.take());
            self.free_flows.push(id);
        }
    }

    /// The first limit on the way that holds up a waiter of this rank: one without room, or where an earlier one waits.
    fn blocker(&self, id: FlowId, rank: Rank, now: Instant) -> Option<LimitId> {
        let holds_up =
            |limit: &Limit| !limit.has_room(now) || limit.parked.first().is_some_and(|(first, _)| *first < rank);
        self.flows[id.0].path.iter().copied().find(|limit| holds_up(&self.limits[limit.0]))
    }

    fn grant(&mut self, id: FlowId, waiting_since: Instant, now: Instant) -> Grant {
        let flow = &mut self.flows[id.0];
        flow.in_flight += 1;
        for limit in &flow.path {
            self.limits[limit.0].take(waiting_since, now);
        }
        Grant { flow: id, at: now }
    }

    /// Lets the first of a ready flow through, or parks the flow at what holds it up.
    fn look_at(&mut self, id: FlowId, rank: Rank, now: Instant, granted: &mut impl FnMut(W, Grant)) {
        let Place::Ready { from } = self.unplace(id, now) else { unreachable!("only ready flows are looked at") };
        if let Some(limit) = self.blocker(id, rank, now) {
            self.park(id, rank, limit, now);
            // The room it was offered is left to the next in line there.
            self.opened.extend(from.filter(|from| *from != limit));
            return;
        }
        let (_, waiter) = self.flows[id.0].waiters.pop_first().expect("a ready flow has a first waiter");
        self.waiting -= 1;
        let grant = self.grant(id, waiter.since, now);
        self.make_ready(id, None);
        self.opened.extend(from);
        granted(waiter.wake, grant);
    }

    fn make_ready(&mut self, id: FlowId, from: Option<LimitId>) {
        let Some((rank, _)) = self.flows[id.0].waiters.first_key_value() else { return };
        self.ready.insert((*rank, id));
        self.flows[id.0].place = Place::Ready { from };
    }

    fn park(&mut self, id: FlowId, rank: Rank, at: LimitId, now: Instant) {
        let limit = &mut self.limits[at.0];
        limit.parked.insert((rank, id));
        limit.waiting += self.flows[id.0].waiters.len() as u64;
        self.flows[id.0].place = Place::Parked(at);
        self.set_timer(at, now);
    }

    /// Makes the first of those parked here ready, if there is room for it. One at a time: it may take the last room.
    fn unpark_first(&mut self, at: LimitId, now: Instant) {
        let limit = &self.limits[at.0];
        let Some((_, id)) = limit.parked.first().copied() else { return };
        if limit.has_room(now) {
            self.unplace(id, now);
            self.make_ready(id, Some(at));
        } else {
            self.set_timer(at, now);
        }
    }

    /// Takes a flow out of where it stands, and says where that was.
    fn unplace(&mut self, id: FlowId, now: Instant) -> Place {
        let flow = &mut self.flows[id.0];
        let place = std::mem::replace(&mut flow.place, Place::Empty);
        let Some((rank, _)) = flow.waiters.first_key_value() else { return place };
        match place {
            Place::Empty => {}
            Place::Ready { .. } => {
                self.ready.remove(&(*rank, id));
            }
            Place::Parked(at) => {
                let limit = &mut self.limits[at.0];
                limit.parked.remove(&(*rank, id));
                limit.waiting -= flow.waiters.len() as u64;
                self.set_timer(at, now);
            }
        }
        place
    }

    /// As [`Queue::unplace`], for a flow whose first waiter changes: whoever stands behind it there is looked at next.
    fn leave_place(&mut self, id: FlowId, now: Instant) {
        match self.unplace(id, now) {
            Place::Empty => {}
            Place::Ready { from } => self.opened.extend(from),
            Place::Parked(at) => self.opened.push(at),
        }
    }

    fn remove(&mut self, ticket: Ticket, now: Instant) -> Option<Waiter<W>> {
        let flow = &self.flows[ticket.flow.0];
        let (head, _) = flow.waiters.first_key_value()?;
        if *head == ticket.rank {
            self.leave_place(ticket.flow, now);
            let waiter = self.flows[ticket.flow.0].waiters.remove(&ticket.rank);
            self.make_ready(ticket.flow, None);
            self.waiting -= 1;
            return waiter;
        }
        let place = flow.place;
        let waiter = self.flows[ticket.flow.0].waiters.remove(&ticket.rank)?;
        if let Place::Parked(limit) = place {
            self.limits[limit.0].waiting -= 1;
        }
        self.waiting -= 1;
        Some(waiter)
    }

    fn set_timer(&mut self, id: LimitId, now: Instant) {
        let limit = &mut self.limits[id.0];
        let wanted = limit.next_look(now);
        if limit.timer == wanted {
            return;
        }
        if let Some(at) = std::mem::replace(&mut limit.timer, wanted) {
            self.timers.remove(&(at, id));
        }
        self.timers.extend(wanted.map(|at| (at, id)));
    }

    /// The limit on the way that a newcomer to this flow passes last, if even that is after `until` when all goes as well
    /// as it can.
    fn too_late(&self, id: FlowId, until: Instant, now: Instant) -> Option<LimitId> {
        let at_best = |limit: LimitId, ahead: u64| self.limits[limit.0].earliest_at(1 + ahead, now);
        let late = self.flows[id.0].path.iter().copied().filter(|limit| {
            at_best(*limit, self.ahead(*limit, id)) > until
                && at_best(*limit, self.surely_ahead(*limit, id, until, now)) > until
        });
        late.max_by_key(|limit| at_best(*limit, self.ahead(*limit, id)))
    }

    /// How many wait for this limit before a newcomer to the flow.
    fn ahead(&self, limit: LimitId, id: FlowId) -> u64 {
        let flow = &self.flows[id.0];
        let own = if flow.place == Place::Parked(limit) { 0 } else { flow.waiters.len() as u64 };
        self.limits[limit.0].waiting + own
    }

    /// As [`Queue::ahead`], but of another flow only so many as its other buckets let through by `until`.
    fn surely_ahead(&self, limit: LimitId, id: FlowId, until: Instant, now: Instant) -> u64 {
        let others = self.limits[limit.0].parked.iter().filter(|(_, other)| *other != id);
        let passing = others.map(|(_, other)| {
            let flow = &self.flows[other.0];
            let elsewhere = flow.path.iter().filter(|other| **other != limit);
            let most = elsewhere.filter_map(|other| match &self.limits[other.0].measure {
                Measure::Requests(bucket) => Some(bucket.count_by(until, now)),
                Measure::Concurrency(_) => None,
            });
            most.min().unwrap_or(u64::MAX).min(flow.waiters.len() as u64)
        });
        passing.sum::<u64>() + self.flows[id.0].waiters.len() as u64
    }

    fn refuse(&mut self, id: FlowId, by: LimitId, cause: Cause, allowed: Duration, now: Instant) -> Refusal {
        let ahead = self.ahead(by, id);
        let limit = &mut self.limits[by.0];
        let wait = limit.expected_at(1 + ahead, now) - now;
        let mut earliest = now + wait.saturating_sub(allowed).max(Duration::from_millis(1));
        if cause == Cause::QueueFull {
            // There is a place in the queue when the first in line has left it.
            earliest = earliest.max(limit.expected_at(1, now));
        }
        let back = limit.promise(earliest);
        Refusal {
            cause,
            scope: Some(limit.scope.clone()),
            limit: limit.to_string(),
            wait,
            allowed,
            retry_after: back - now,
        }
    }
}

#[cfg(test)]
mod tests;
