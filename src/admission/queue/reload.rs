//! Changing limits under way: each keeps its state, whoever is under way is counted once, and whoever waits keeps its place.
//!
//! - A limit that stays (by scope and unit) takes the new numbers: a bucket keeps what is lacking ([`Bucket::set_rate`]),
//!   slots keep who holds them. Fewer slots than are held cut nobody off: none is given out until enough came back.
//! - New slots count everyone who is under way on their way, and get them back like any other's. A new bucket is full, and
//!   knows nothing of who was let through before it.
//! - A limit that goes lets its waiters go on: they stand in line at the next limit of their way, with the lead that
//!   they had. So do those of a limit that only observes from now on; it keeps its numbers, and goes on counting.
//! - Slots that begin to hold up, and only observed before, count everyone under way then.
//! - Of lanes the pace stays, with all that was learned.
//!
//! A grant knows which limits counted it by scope and unit ([`Limit::mark`]), and a limit since when it counts
//! ([`Limit::since`]). So nothing is given back to a limit that did not have it, nor twice, nor never.
//!
//! [`Bucket::set_rate`]: crate::admission::bucket::Bucket::set_rate

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

use super::{Place, Queue, Rules};
use crate::admission::fair::Virtual;
use crate::admission::limit::{FlowId, Limit, LimitId, Measure, Scope};
use crate::admission::slack::ChargeNo;
use crate::clients::{ClientId, Tenant};
use crate::config::{Mode, Weight};
use crate::models::ModelId;

/// The limits of one model or client.
pub struct Table {
    /// Whose they are.
    pub name: Arc<str>,
    pub mode: Mode,
    /// As they would be if they began now.
    pub measures: Vec<Measure>,
}

/// The limits that are to hold from now on.
pub struct NewLimits {
    pub rules: Rules,
    /// Everyone's.
    pub global: Vec<Measure>,
    /// Of each of [`Queue::models`].
    pub models: Vec<(ModelId, Table)>,
    /// Of every client; one that is left out has none.
    pub clients: Vec<(ClientId, Weight, Table)>,
}

/// What the limits' change leaves to be done.
#[derive(Default)]
struct Changes {
    /// Limits that are no more.
    gone: Vec<LimitId>,
    /// Limits that hold nobody up any more.
    observing: Vec<LimitId>,
    /// Slots that are to count everyone who is under way.
    counting: Vec<LimitId>,
}

impl<W> Queue<W> {
    /// The models whose limits are known, in an order that does not depend on hashes.
    pub fn models(&self) -> Vec<ModelId> {
        let mut models: Vec<ModelId> = self.of_model.keys().copied().collect();
        models.sort_unstable();
        models
    }

    /// Puts other limits in force. To be followed by [`Queue::pump`].
    pub fn reload(&mut self, to: NewLimits, now: Instant) {
        let mut changes = Changes::default();
        self.rules = to.rules;
        let before = std::mem::take(&mut self.global);
        self.global = self.replace(before, &Scope::Global, to.rules.mode, to.global, &mut changes, now);
        for (model, Table { name, mode, measures }) in to.models {
            let before = self.of_model.remove(&model).unwrap_or_default();
            let limits = self.replace(before, &Scope::Model(name), mode, measures, &mut changes, now);
            self.of_model.insert(model, limits);
        }
        let mut of_client = std::mem::take(&mut self.of_client);
        for (client, weight, Table { name, mode, measures }) in to.clients {
            let before = of_client.remove(&client).unwrap_or_default();
            let limits = self.replace(before, &Scope::Client(name), mode, measures, &mut changes, now);
            self.of_client.insert(client, limits);
            self.weigh(Tenant::Named(client), weight);
        }
        changes.gone.extend(of_client.into_values().flatten());
        self.change_lanes(&mut changes);
        self.reroute(now);
        for limit in changes.observing.iter().chain(&changes.gone) {
            self.clear(*limit);
        }
        self.free_limits.extend(&changes.gone);
        self.count_those_under_way(&changes.counting);
        self.look_at_every_line(now);
    }

    /// Makes these limits those, as far as they are of the same units, and the others anew.
    fn replace(
        &mut self,
        mut before: Vec<LimitId>,
        scope: &Scope,
        mode: Mode,
        measures: Vec<Measure>,
        changes: &mut Changes,
        now: Instant,
    ) -> Vec<LimitId> {
        let mut after = Vec::with_capacity(measures.len());
        for measure in measures {
            let stays = before.iter().position(|id| {
                let was = self.limits[id.0].mode;
                let same = self.limits[id.0].become_like(&measure, mode, now);
                if same && was != mode {
                    changes.mode_of(*id, &measure, mode);
                }
                same
            });
            after.push(match stays {
                Some(at) => before.swap_remove(at),
                None => {
                    let slots = matches!(measure, Measure::Concurrency(_));
                    let id = self.add_limit(Limit::new(scope.clone(), measure, mode));
                    changes.counting.extend(slots.then_some(id));
                    id
                }
            });
        }
        changes.gone.extend(before);
        after
    }

    /// Gives every lane the rules and the mode that new ones have.
    fn change_lanes(&mut self, changes: &mut Changes) {
        for id in self.paces() {
            let limit = &mut self.limits[id.0];
            if let Measure::Pace(pace) = &mut limit.measure {
                pace.set_rules(self.rules.lane);
            }
            if limit.mode != self.rules.mode {
                limit.mode = self.rules.mode;
                changes.mode_of(id, &limit.measure, self.rules.mode);
            }
        }
    }

    fn weigh(&mut self, tenant: Tenant, weight: Weight) {
        let Some(id) = self.tenants.set_weight(tenant, weight) else { return };
        for at in &self.tenants.share(id).lines {
            self.limits[at.0].line.reweigh(id, u64::from(weight.thousandths()));
        }
    }

    /// Sends every flow by way of the limits that there are now. One that stands at none of these any more moves on.
    fn reroute(&mut self, now: Instant) {
        let mut flows: Vec<FlowId> = self.of_flow.values().copied().collect();
        flows.sort_unstable();
        for id in flows {
            let (path, observed) = self.ways_now(id);
            let moves = match self.flows[id.0].place {
                Place::Parked(at) if !path.contains(&at) => Some(self.limits[at.0].line.lead(self.flows[id.0].tenant)),
                Place::Parked(_) | Place::Ready { .. } | Place::Empty => None,
            };
            if moves.is_some() {
                self.unplace(id, now);
            }
            let flow = &mut self.flows[id.0];
            (flow.path, flow.observed) = (path, observed);
            if let Some(lead) = moves {
                self.move_on(id, lead, now);
            }
        }
    }

    /// Parks a flow at the first limit on its way that it has to do with; there it is let through in the fair order.
    fn move_on(&mut self, id: FlowId, lead: Virtual, now: Instant) {
        let flow = &self.flows[id.0];
        let Some((rank, _)) = flow.waiters.first_key_value() else { return };
        let (rank, need) = (*rank, self.need_of(id).expect("it has a first waiter"));
        let concerning = |at: &&LimitId| self.limits[at.0].concerns(need.tokens);
        let Some(at) = flow.path.iter().find(concerning).copied() else {
            return self.make_ready(id, None);
        };
        let is_new = !self.limits[at.0].line.knows(need.tenant);
        self.park(need, rank, at, now);
        if is_new {
            self.limits[at.0].line.served(need.tenant, lead);
        }
    }

    /// Nobody stands at this limit any more: forgets all who were known there.
    fn clear(&mut self, at: LimitId) {
        let limit = &mut self.limits[at.0];
        if let Some(timer) = limit.timer.take() {
            self.timers.remove(&(timer, at));
        }
        debug_assert!(limit.line.is_empty(), "everyone has moved on");
        for tenant in limit.lets_everyone_go() {
            self.tenants.share_mut(tenant).lines.retain(|line| *line != at);
        }
        self.gone.retain(|(limit, _)| *limit != at);
        self.opened.retain(|limit| *limit != at);
    }

    fn count_those_under_way(&mut self, counting: &[LimitId]) {
        // Looked up, since each of many models and clients may have new ones.
        let mut in_use: HashMap<LimitId, u32> = counting.iter().map(|id| (*id, 0)).collect();
        for flow in self.of_flow.values().map(|id| &self.flows[id.0]) {
            for id in flow.way() {
                in_use.entry(id).and_modify(|in_use| *in_use += flow.in_flight);
            }
        }
        for (id, in_use) in in_use {
            let limit = &mut self.limits[id.0];
            limit.since = ChargeNo(self.charges);
            if let Measure::Concurrency(slots) = &mut limit.measure {
                slots.set_in_use(in_use);
            }
        }
    }

    /// There may be room wherever somebody waits, or no hope any more.
    fn look_at_every_line(&mut self, now: Instant) {
        let waited_for = (0..self.limits.len()).map(LimitId).filter(|id| !self.limits[id.0].line.is_empty());
        self.opened.extend(waited_for);
        for pace in self.paces() {
            if self.limits[pace.0].given_up(now) {
                self.turn_away(pace, now);
            }
        }
    }
}

impl Changes {
    /// This limit's mode has changed.
    fn mode_of(&mut self, id: LimitId, measure: &Measure, mode: Mode) {
        match mode {
            Mode::Observe => self.observing.push(id),
            Mode::Enforce if matches!(measure, Measure::Concurrency(_)) => self.counting.push(id),
            Mode::Enforce => {}
        }
    }
}
