//! The fair clock: what each tenant has had of weir, in tokens over its weight.
//!
//! A virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI '24, arXiv 2401.00588), which is
//! start-time fair queueing with tokens for lengths: of those who wait, the one that has had least goes first; what a
//! request is estimated to cost counts when it is let through, and is corrected when its true cost is known. There is one
//! counter for each tenant, whatever models it uses; limits decide only who is eligible now.
//!
//! **No credit for idling**: who comes back begins where the others are. **No endless credit for being held up**: one whom a
//! limit of its own holds up while others are served falls behind them by at most `MAX_LAG`; what it could catch up on
//! without that bound would keep everybody else out for as long as it was held up.

use std::collections::{BTreeSet, HashMap};

use super::limit::{FlowId, LimitId};
use crate::clients::Tenant;
use crate::config::Weight;

/// What a tenant has had: thousandths of a token at weight 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Virtual(u64);

impl Virtual {
    /// What so many tokens count for a tenant of that weight.
    pub fn of(tokens: u64, weight: Weight) -> Self {
        let thousandths = u128::from(tokens) * 1_000_000 / u128::from(weight.thousandths());
        Self(u64::try_from(thousandths).unwrap_or(u64::MAX))
    }

    /// The tokens that a tenant of that weight has to get to come from `self` to `later`.
    pub fn tokens_until(self, later: Self, weight: Weight) -> u64 {
        let tokens = u128::from(later.0.saturating_sub(self.0)) * u128::from(weight.thousandths()) / 1_000_000;
        u64::try_from(tokens).unwrap_or(u64::MAX)
    }

    /// Later by so much.
    #[must_use]
    pub fn plus(self, more: Self) -> Self {
        Self(self.0.saturating_add(more.0))
    }

    /// Earlier by so much.
    #[must_use]
    pub fn minus(self, less: Self) -> Self {
        Self(self.0.saturating_sub(less.0))
    }
}

/// How far a tenant that waits may fall behind those who are served: about what a large quota serves in a minute. It is far
/// above what estimates are wrong by, so that who waits at the same limit as others loses nothing to it.
const MAX_LAG: Virtual = Virtual((1 << 18) * 1000);

/// A tenant's place in the list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub(super) usize);

/// One who gets a share.
pub struct Share {
    pub tenant: Tenant,
    pub weight: Weight,
    /// What it has had.
    pub counter: Virtual,
    /// Its requests that wait.
    pub waiting: u64,
    /// Its flows in which somebody waits.
    pub backlog: BTreeSet<FlowId>,
    /// Its flows, whether somebody waits in them or not.
    pub flows: u32,
    /// The limits that hold some of its flows up.
    pub held_up_at: Vec<LimitId>,
}

/// Everyone who has or lately had something to do with weir.
#[derive(Default)]
pub struct FairClock {
    shares: Vec<Share>,
    of_tenant: HashMap<Tenant, TenantId>,
    free: Vec<TenantId>,
    /// The greatest counter at which a request was let through: where who comes back begins.
    now: Virtual,
    /// Those who wait, by their counters.
    backlogged: BTreeSet<(Virtual, TenantId)>,
}

impl FairClock {
    /// The tenant's place; one that is not known begins with the others.
    pub fn find(&mut self, tenant: Tenant, weight: Weight) -> TenantId {
        if let Some(id) = self.of_tenant.get(&tenant) {
            return *id;
        }
        let share = Share {
            tenant,
            weight,
            counter: Virtual::default(),
            waiting: 0,
            backlog: BTreeSet::new(),
            flows: 0,
            held_up_at: Vec::new(),
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.shares[id.0] = share;
                id
            }
            None => {
                self.shares.push(share);
                TenantId(self.shares.len() - 1)
            }
        };
        self.of_tenant.insert(tenant, id);
        id
    }

    /// The tenant's place, where it has one.
    pub fn known(&self, tenant: Tenant) -> Option<TenantId> {
        self.of_tenant.get(&tenant).copied()
    }

    /// What is known of a tenant.
    pub fn share(&self, id: TenantId) -> &Share {
        &self.shares[id.0]
    }

    /// For the queue's own bookkeeping; the counter is moved by the methods here only.
    pub fn share_mut(&mut self, id: TenantId) -> &mut Share {
        &mut self.shares[id.0]
    }

    /// Where the counters of those who are served stand.
    pub fn now(&self) -> Virtual {
        self.now
    }

    /// Tenants known now.
    pub fn known_tenants(&self) -> usize {
        self.of_tenant.len()
    }

    /// The tenant whose requests fill the queue most, by its weight.
    pub fn heaviest(&self) -> Option<TenantId> {
        let waiting = self.backlogged.iter().map(|(_, id)| *id);
        waiting.max_by_key(|id| Virtual::of(self.share(*id).waiting, self.share(*id).weight))
    }

    /// A tenant that does not wait for anything begins no earlier than the clock, or than `others`, the first of those it is
    /// about to compete with, where they lag.
    pub fn begin(&mut self, id: TenantId, others: Option<Virtual>) {
        let share = &mut self.shares[id.0];
        if share.waiting == 0 {
            share.counter = share.counter.max(others.map_or(self.now, |others| others.min(self.now)));
        }
    }

    /// A request more waits. The counter stays, but for what it lags too far.
    pub fn joins(&mut self, id: TenantId) {
        let floor = self.floor();
        let share = &mut self.shares[id.0];
        share.waiting += 1;
        if share.waiting == 1 {
            share.counter = share.counter.max(floor);
            self.backlogged.insert((share.counter, id));
        }
    }

    /// A request less waits.
    pub fn leaves(&mut self, id: TenantId) {
        let share = &mut self.shares[id.0];
        share.waiting -= 1;
        if share.waiting == 0 {
            self.backlogged.remove(&(share.counter, id));
        }
    }

    /// A request of that many tokens is let through.
    pub fn charge(&mut self, id: TenantId, tokens: u64) {
        let share = self.share(id);
        let (counter, more) = (share.counter, Virtual::of(tokens, share.weight));
        self.now = self.now.max(counter);
        self.set(id, counter.plus(more));
    }

    /// A request that was estimated at `charged` cost `used` in truth.
    pub fn correct(&mut self, id: TenantId, charged: u64, used: u64) {
        let Share { counter, weight, .. } = *self.share(id);
        self.set(id, counter.minus(Virtual::of(charged, weight)).plus(Virtual::of(used, weight)));
    }

    /// The one that lags furthest behind, if that is too far: it is set forward, and its places have to be told. Not at
    /// each step of the clock, but when it has fallen behind by another `MAX_LAG`.
    pub fn set_forward(&mut self) -> Option<TenantId> {
        let (counter, id) = self.backlogged.first().copied()?;
        if counter.plus(MAX_LAG).plus(MAX_LAG) >= self.now {
            return None;
        }
        self.set(id, self.floor());
        Some(id)
    }

    /// Forgets tenants that have no flow: those that have had no more than the others, or, where that leaves more than
    /// `keep`, all of them.
    pub fn forget_idle(&mut self, keep: usize) {
        let (shares, now) = (&self.shares, self.now);
        let idle = |id: &TenantId| shares[id.0].flows == 0;
        let mut forgotten: Vec<_> =
            self.of_tenant.extract_if(|_, id| idle(id) && shares[id.0].counter <= now).map(|(_, id)| id).collect();
        if self.of_tenant.len() > keep {
            forgotten.extend(self.of_tenant.extract_if(|_, id| idle(id)).map(|(_, id)| id));
        }
        self.free.extend(forgotten);
    }

    /// Whether it is listed among those who wait, and once, at its counter.
    #[cfg(test)]
    pub fn is_backlogged(&self, id: TenantId) -> bool {
        let listed: Vec<_> = self.backlogged.iter().filter(|(_, other)| *other == id).collect();
        assert!(listed.iter().all(|(counter, _)| *counter == self.share(id).counter) && listed.len() <= 1);
        !listed.is_empty()
    }

    fn floor(&self) -> Virtual {
        self.now.minus(MAX_LAG)
    }

    fn set(&mut self, id: TenantId, counter: Virtual) {
        let share = &mut self.shares[id.0];
        if share.waiting > 0 {
            self.backlogged.remove(&(share.counter, id));
            self.backlogged.insert((counter, id));
        }
        share.counter = counter;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: u64 = 1000;

    fn clock(tenants: u64) -> (FairClock, Vec<TenantId>) {
        let mut clock = FairClock::default();
        let ids = (0..tenants).map(|key| clock.find(Tenant::Key(key), Weight::default())).collect();
        (clock, ids)
    }

    #[test]
    fn who_was_idle_begins_where_the_others_are() {
        let (mut clock, ids) = clock(2);
        for _ in 0..10 {
            clock.begin(ids[0], None);
            clock.charge(ids[0], 100);
        }
        clock.begin(ids[1], None);
        assert_eq!(clock.share(ids[1]).counter, Virtual(900 * ONE), "where the last one began");
        clock.joins(ids[0]);
        clock.begin(ids[0], Some(Virtual(5000 * ONE)));
        assert_eq!(clock.share(ids[0]).counter, Virtual(1000 * ONE), "who waits keeps its counter");
        let third = clock.find(Tenant::Key(3), Weight::default());
        clock.begin(third, Some(Virtual(300 * ONE)));
        assert_eq!(clock.share(third).counter, Virtual(300 * ONE), "where those are that it competes with");
    }

    #[test]
    fn a_weight_makes_tokens_cheaper_and_a_correction_takes_back_what_was_too_much() {
        let mut clock = FairClock::default();
        let id = clock.find(Tenant::Key(1), Weight::new(4.0).expect("a weight"));
        clock.charge(id, 1000);
        assert_eq!(clock.share(id).counter, Virtual(250 * ONE));
        clock.correct(id, 1000, 100);
        assert_eq!(clock.share(id).counter, Virtual(25 * ONE));
        assert_eq!(Virtual(0).tokens_until(Virtual(25 * ONE), clock.share(id).weight), 100);
    }

    #[test]
    fn who_is_held_up_falls_behind_by_a_bounded_lag() {
        let (mut clock, ids) = clock(2);
        clock.joins(ids[0]);
        for _ in 0..1000 {
            clock.charge(ids[1], 10_000);
            while clock.set_forward().is_some() {}
        }
        let lag = clock.now().minus(clock.share(ids[0]).counter);
        assert!(lag >= MAX_LAG && lag <= MAX_LAG.plus(MAX_LAG), "{lag:?}");
    }

    #[test]
    fn idle_tenants_can_be_forgotten_and_their_places_are_used_again() {
        let mut clock = FairClock::default();
        for key in 0..10_000 {
            let id = clock.find(Tenant::Key(key), Weight::default());
            clock.begin(id, None);
            clock.charge(id, 10);
            if clock.known_tenants() > 100 {
                clock.forget_idle(50);
            }
        }
        assert!(clock.shares.len() <= 102);
    }
}
