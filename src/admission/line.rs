//! Who waits at one limit, in the fair order: by tenant, and of a tenant whoever came first.

use std::collections::{BTreeMap, BTreeSet};

use super::fair::{TenantId, Virtual};
use super::limit::{FlowId, Rank};

/// How many requests, and how many tokens they are estimated to cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub requests: u64,
    pub tokens: u64,
}

impl Load {
    /// One request of so many tokens.
    pub fn one(tokens: u64) -> Self {
        Self { requests: 1, tokens }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self { requests: self.requests + other.requests, tokens: self.tokens.saturating_add(other.tokens) }
    }

    /// What is left without the other.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(other.requests),
            tokens: self.tokens.saturating_sub(other.tokens),
        }
    }

    /// The part of it that has so many of its tokens.
    #[must_use]
    pub fn up_to_tokens(self, tokens: u64) -> Self {
        if tokens >= self.tokens {
            return self;
        }
        let requests = u128::from(self.requests) * u128::from(tokens) / u128::from(self.tokens);
        Self { requests: u64::try_from(requests).unwrap_or(u64::MAX), tokens }
    }
}

/// A flow whose first waiter is held up, as the line sees it.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    pub tenant: TenantId,
    pub counter: Virtual,
    pub rank: Rank,
    pub flow: FlowId,
}

/// The flows that one limit holds up.
#[derive(Default)]
pub struct Line {
    order: BTreeSet<(Virtual, Rank, TenantId)>,
    of_tenant: BTreeMap<TenantId, OfTenant>,
    /// All who wait in these flows.
    load: Load,
    /// The sum of their tenants' weights, in thousandths.
    weights: u64,
}

struct OfTenant {
    /// Its place in `order`; `None` while all its flows are set aside.
    place: Option<(Virtual, Rank)>,
    flows: BTreeSet<(Rank, FlowId)>,
    /// Flows that stand here and are not offered any room for now.
    aside: BTreeSet<(Rank, FlowId)>,
    load: Load,
    weight: u64,
}

impl Line {
    /// Nobody is held up here.
    pub fn is_empty(&self) -> bool {
        self.of_tenant.is_empty()
    }

    /// Who is next.
    pub fn first(&self) -> Option<Head> {
        let (counter, _, tenant) = self.order.first().copied()?;
        let (rank, flow) = self.of_tenant[&tenant].flows.first().copied().expect("who has a place has a flow");
        Some(Head { tenant, counter, rank, flow })
    }

    /// All who wait here.
    pub fn load(&self) -> Load {
        self.load
    }

    /// What of it is one tenant's.
    pub fn load_of(&self, tenant: TenantId) -> Load {
        self.of_tenant.get(&tenant).map_or(Load::default(), |of| of.load)
    }

    /// The weights of all who wait here, and of this tenant, in thousandths.
    pub fn weights_without(&self, tenant: TenantId) -> u64 {
        self.weights - self.of_tenant.get(&tenant).map_or(0, |of| of.weight)
    }

    /// Everyone's flows but this tenant's, the tenants in order.
    pub fn others(&self, tenant: TenantId) -> impl Iterator<Item = (Virtual, TenantId, FlowId)> + '_ {
        let tenants = self.order.iter().filter(move |(_, _, other)| *other != tenant);
        tenants.flat_map(|(counter, _, other)| {
            let flows = &self.of_tenant[other].flows;
            flows.iter().map(|(_, flow)| (*counter, *other, *flow))
        })
    }

    /// One tenant's flows, whoever came first first.
    pub fn flows_of(&self, tenant: TenantId) -> impl Iterator<Item = FlowId> + '_ {
        let of = self.of_tenant.get(&tenant).into_iter();
        of.flat_map(|of| of.flows.iter().map(|(_, flow)| *flow))
    }

    /// A flow is held up here; `true` where it is the tenant's first.
    pub fn insert(&mut self, head: Head, load: Load, weight: u64) -> bool {
        let new = !self.of_tenant.contains_key(&head.tenant);
        let of = self.of_tenant.entry(head.tenant).or_insert_with(|| OfTenant {
            place: None,
            flows: BTreeSet::new(),
            aside: BTreeSet::new(),
            load: Load::default(),
            weight,
        });
        of.flows.insert((head.rank, head.flow));
        of.load = of.load.plus(load);
        self.load = self.load.plus(load);
        self.weights += if new { weight } else { 0 };
        self.place(head.tenant, head.counter);
        new
    }

    /// A flow is held up here no more; `true` where it was the tenant's last.
    pub fn remove(&mut self, head: Head, load: Load) -> bool {
        let of = self.of_tenant.get_mut(&head.tenant).expect("who is removed stands here");
        let there = of.flows.remove(&(head.rank, head.flow)) || of.aside.remove(&(head.rank, head.flow));
        debug_assert!(there, "a flow stands where its place says");
        of.load = of.load.minus(load);
        self.load = self.load.minus(load);
        self.place(head.tenant, head.counter);
        let of = &self.of_tenant[&head.tenant];
        let last = of.flows.is_empty() && of.aside.is_empty();
        if last {
            self.weights -= of.weight;
            self.of_tenant.remove(&head.tenant);
        }
        last
    }

    /// More wait in a flow that stands here.
    pub fn grow(&mut self, tenant: TenantId, load: Load) {
        self.load = self.load.plus(load);
        let of = self.of_tenant.get_mut(&tenant).expect("who grows stands here");
        of.load = of.load.plus(load);
    }

    /// Fewer wait in a flow that stands here.
    pub fn shrink(&mut self, tenant: TenantId, load: Load) {
        self.load = self.load.minus(load);
        let of = self.of_tenant.get_mut(&tenant).expect("who shrinks stands here");
        of.load = of.load.minus(load);
    }

    /// The tenant's counter has changed. `true` where that changes who is first.
    pub fn recount(&mut self, tenant: TenantId, counter: Virtual) -> bool {
        let first = self.order.first().map(|(_, _, tenant)| *tenant);
        self.place(tenant, counter);
        self.order.first().map(|(_, _, tenant)| *tenant) != first
    }

    /// Offers a flow that stands here no room until [`Line::bring_back`].
    pub fn set_aside(&mut self, head: Head) {
        let of = self.of_tenant.get_mut(&head.tenant).expect("who is set aside stands here");
        if of.flows.remove(&(head.rank, head.flow)) {
            of.aside.insert((head.rank, head.flow));
        }
        self.place(head.tenant, head.counter);
    }

    /// Everyone who was set aside stands in line again.
    pub fn bring_back(&mut self, counter_of: impl Fn(TenantId) -> Virtual) {
        let set_aside = self.of_tenant.iter_mut().filter(|(_, of)| !of.aside.is_empty());
        let tenants: Vec<TenantId> = set_aside
            .map(|(tenant, of)| {
                of.flows.append(&mut of.aside);
                *tenant
            })
            .collect();
        for tenant in tenants {
            self.place(tenant, counter_of(tenant));
        }
    }

    /// Puts a tenant where its counter and its first waiter belong.
    fn place(&mut self, tenant: TenantId, counter: Virtual) {
        let of = self.of_tenant.get_mut(&tenant).expect("who has a place stands here");
        let place = of.flows.first().map(|(rank, _)| (counter, *rank));
        if place == of.place {
            return;
        }
        if let Some((counter, rank)) = std::mem::replace(&mut of.place, place) {
            self.order.remove(&(counter, rank, tenant));
        }
        self.order.extend(place.map(|(counter, rank)| (counter, rank, tenant)));
    }
}
