//! Who shares, by what weight, and how service is measured: in tokens over weight.
//!
//! The measure is that of the virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI '24,
//! arXiv 2401.00588), which is start-time fair queueing with tokens for lengths. What it decides is in [`super::line`].

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

    /// What so many tokens count at weight 1.
    pub const fn of_tokens(tokens: u64) -> Self {
        Self(tokens.saturating_mul(1000))
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

/// A tenant's place in the list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub(super) usize);

/// One who gets a share.
pub struct Share {
    pub tenant: Tenant,
    pub weight: Weight,
    /// Its requests that wait.
    pub waiting: u64,
    /// Its flows in which somebody waits.
    pub backlog: BTreeSet<FlowId>,
    /// Its flows, whether somebody waits in them or not.
    pub flows: u32,
    /// The limits in whose lines it is known.
    pub lines: Vec<LimitId>,
}

/// Everyone who has or lately had something to do with weir.
#[derive(Default)]
pub struct Tenants {
    shares: Vec<Share>,
    of_tenant: HashMap<Tenant, TenantId>,
    free: Vec<TenantId>,
    /// Weights that have changed since the start: whoever asked before does not know them.
    changed: HashMap<Tenant, Weight>,
    /// Those who wait, by how much of the queue they fill for their weight.
    backlogged: BTreeSet<(Virtual, TenantId)>,
}

impl Tenants {
    /// The tenant's place, also if it was not known. A weight that [`Tenants::set_weight`] has set counts before this one.
    pub fn find(&mut self, tenant: Tenant, weight: Weight) -> TenantId {
        if let Some(id) = self.of_tenant.get(&tenant) {
            return *id;
        }
        let weight = self.changed.get(&tenant).copied().unwrap_or(weight);
        let share = Share { tenant, weight, waiting: 0, backlog: BTreeSet::new(), flows: 0, lines: Vec::new() };
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

    /// From now on the tenant has this weight, whatever its requests say. Its place, where it is known.
    pub fn set_weight(&mut self, tenant: Tenant, weight: Weight) -> Option<TenantId> {
        self.changed.insert(tenant, weight);
        let id = self.known(tenant)?;
        let Share { waiting, weight: before, .. } = self.shares[id.0];
        self.shares[id.0].weight = weight;
        if self.backlogged.remove(&(part_of_queue(waiting, before), id)) {
            self.backlogged.insert((part_of_queue(waiting, weight), id));
        }
        Some(id)
    }

    /// What is known of a tenant.
    pub fn share(&self, id: TenantId) -> &Share {
        &self.shares[id.0]
    }

    /// For the queue's own bookkeeping.
    pub fn share_mut(&mut self, id: TenantId) -> &mut Share {
        &mut self.shares[id.0]
    }

    /// Tenants known now.
    pub fn known_tenants(&self) -> usize {
        self.of_tenant.len()
    }

    /// The tenant whose requests fill the queue most, by its weight.
    pub fn heaviest(&self) -> Option<TenantId> {
        self.backlogged.last().map(|(_, id)| *id)
    }

    /// A request more of this tenant waits.
    pub fn joins(&mut self, id: TenantId) {
        self.set_waiting(id, |waiting| waiting + 1);
    }

    /// A request less of this tenant waits.
    pub fn leaves(&mut self, id: TenantId) {
        self.set_waiting(id, |waiting| waiting - 1);
    }

    fn set_waiting(&mut self, id: TenantId, change: impl Fn(u64) -> u64) {
        let share = &mut self.shares[id.0];
        let (before, after) = (share.waiting, change(share.waiting));
        share.waiting = after;
        if before > 0 {
            self.backlogged.remove(&(part_of_queue(before, share.weight), id));
        }
        if after > 0 {
            self.backlogged.insert((part_of_queue(after, share.weight), id));
        }
    }

    /// Forgets tenants that have no flow, and says which, and in whose lines they were known.
    pub fn forget_idle(&mut self) -> Vec<(TenantId, Vec<LimitId>)> {
        let shares = &mut self.shares;
        let forgotten: Vec<TenantId> =
            self.of_tenant.extract_if(|_, id| shares[id.0].flows == 0).map(|(_, id)| id).collect();
        self.free.extend(&forgotten);
        forgotten.into_iter().map(|id| (id, std::mem::take(&mut self.shares[id.0].lines))).collect()
    }
}

/// How much of the queue so many requests fill for a tenant of that weight.
fn part_of_queue(waiting: u64, weight: Weight) -> Virtual {
    Virtual(waiting * 1_000_000 / u64::from(weight.thousandths()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_makes_tokens_cheaper() {
        let weight = Weight::new(4.0).expect("a weight");
        assert_eq!(Virtual::of(1000, weight), Virtual(250_000));
        assert_eq!(Virtual(0).tokens_until(Virtual(250_000), weight), 1000);
        assert_eq!(Virtual::of(u64::MAX, Weight::new(0.01).expect("a weight")), Virtual(u64::MAX));
    }

    #[test]
    fn the_heaviest_is_the_one_with_most_for_its_weight() {
        let mut tenants = Tenants::default();
        let light = tenants.find(Tenant::Key(1), Weight::ONE);
        let heavy = tenants.find(Tenant::Key(2), Weight::new(10.0).expect("a weight"));
        (0..3).for_each(|_| tenants.joins(light));
        (0..20).for_each(|_| tenants.joins(heavy));
        assert_eq!(tenants.heaviest(), Some(light));
        (0..3).for_each(|_| tenants.leaves(light));
        assert_eq!(tenants.heaviest(), Some(heavy));
    }

    #[test]
    fn idle_tenants_can_be_forgotten_and_their_places_are_used_again() {
        let mut tenants = Tenants::default();
        for key in 0..10_000 {
            tenants.find(Tenant::Key(key), Weight::ONE);
            if tenants.known_tenants() > 100 {
                tenants.forget_idle();
            }
        }
        assert!(tenants.shares.len() <= 102);
    }
}
