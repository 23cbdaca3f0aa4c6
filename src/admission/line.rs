//! Who waits at one limit, in the fair order: of the tenants whoever has had least, and of a tenant whoever came first.
//!
//! Each tenant in the line has a **tag**: what it has had since the line began, in tokens over its weight. What a request is
//! estimated to cost counts when it is let through, and is corrected when its true cost is known (the virtual token counter
//! of arXiv 2401.00588). The line's **clock** is the greatest tag at which a request was let through.
//!
//! - No credit for idling: who comes, or comes back, begins at the clock, or where its own tag stands if that is later.
//! - What a tenant gets *elsewhere*, through other limits than this one, counts too: it has had it of weir. But only up to
//!   `MOST_ELSEWHERE`: a fast model must not keep its users out of a slow one for good. Nor does a line's clock know of other
//!   lines: who is held up for an hour by a limit of its own has no claims anywhere for it.
//! - When nobody waits any more, all is forgotten: everyone has what it asked for.

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

/// How far what a tenant gets elsewhere sets it back here: some tens of usual requests.
const MOST_ELSEWHERE: Virtual = Virtual::of_tokens(1 << 16);

/// A flow whose first waiter is held up, as the line sees it.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    pub tenant: TenantId,
    pub rank: Rank,
    pub flow: FlowId,
}

/// The flows that one limit holds up.
#[derive(Default)]
pub struct Line {
    /// Those who stand here, each where its tag and its first waiter belong.
    order: BTreeSet<(Virtual, Rank, TenantId)>,
    /// All who have had something since the line began.
    of_tenant: BTreeMap<TenantId, OfTenant>,
    clock: Virtual,
    /// How many tenants stand here.
    standing: usize,
    /// All who wait in these flows.
    load: Load,
    /// The sum of their tenants' weights, in thousandths.
    weights: u64,
}

/// One tenant, as the line knows it.
#[derive(Default)]
struct OfTenant {
    /// What it has had here, counted from where it began.
    here: Virtual,
    elsewhere: Virtual,
    /// It does not wait for anything here: when it comes back, it begins at the clock at the earliest.
    away: bool,
    /// Its place in `order`; `None` while it does not stand here, or all its flows are set aside.
    place: Option<(Virtual, Rank)>,
    flows: BTreeSet<(Rank, FlowId)>,
    /// Flows that stand here and are not offered any room for now.
    aside: BTreeSet<(Rank, FlowId)>,
    load: Load,
    /// In thousandths, while it stands here.
    weight: u64,
}

impl OfTenant {
    fn new(clock: Virtual) -> Self {
        Self { here: clock, ..Self::default() }
    }

    fn stands(&self) -> bool {
        !(self.flows.is_empty() && self.aside.is_empty())
    }

    fn tag(&self) -> Virtual {
        self.here.plus(self.elsewhere)
    }

    fn comes_back(&mut self, clock: Virtual) {
        if std::mem::take(&mut self.away) && self.tag() < clock {
            (self.here, self.elsewhere) = (clock, Virtual::default());
        }
    }
}

impl Line {
    /// Nobody is held up here.
    pub fn is_empty(&self) -> bool {
        self.standing == 0
    }

    /// Whether anybody is known here: while there is a line, whoever passes counts.
    pub fn has_begun(&self) -> bool {
        !self.of_tenant.is_empty()
    }

    /// Whether more than one tenant is known here.
    pub fn is_shared(&self) -> bool {
        self.of_tenant.len() > 1
    }

    /// Who is next.
    pub fn first(&self) -> Option<Head> {
        let (_, _, tenant) = self.order.first().copied()?;
        let (rank, flow) = self.of_tenant[&tenant].flows.first().copied().expect("who has a place has a flow");
        Some(Head { tenant, rank, flow })
    }

    /// Whether the tenant is known here.
    pub fn knows(&self, tenant: TenantId) -> bool {
        self.of_tenant.contains_key(&tenant)
    }

    /// Where the tenant's next request stands in the fair order.
    pub fn tag(&self, tenant: TenantId) -> Virtual {
        match self.of_tenant.get(&tenant) {
            None => self.clock,
            Some(of) if of.away => of.tag().max(self.clock),
            Some(of) => of.tag(),
        }
    }

    /// The greatest tag at which a request was let through.
    pub fn clock(&self) -> Virtual {
        self.clock
    }

    /// How much more the tenant has had than whoever was let through last, if it has.
    pub fn lead(&self, tenant: TenantId) -> Virtual {
        self.tag(tenant).minus(self.clock)
    }

    /// All who wait here.
    pub fn load(&self) -> Load {
        self.load
    }

    /// What of it is one tenant's.
    pub fn load_of(&self, tenant: TenantId) -> Load {
        self.of_tenant.get(&tenant).map_or(Load::default(), |of| of.load)
    }

    /// The weights of all who wait here but this tenant, in thousandths.
    pub fn weights_without(&self, tenant: TenantId) -> u64 {
        self.weights - self.of_tenant.get(&tenant).map_or(0, |of| of.weight)
    }

    /// Everyone's flows but this tenant's, with the tenants' tags, in order.
    pub fn others(&self, tenant: TenantId) -> impl Iterator<Item = (Virtual, TenantId, FlowId)> + '_ {
        let tenants = self.order.iter().filter(move |(_, _, other)| *other != tenant);
        tenants.flat_map(|(tag, _, other)| {
            let flows = &self.of_tenant[other].flows;
            flows.iter().map(|(_, flow)| (*tag, *other, *flow))
        })
    }

    /// One tenant's flows, whoever came first first.
    pub fn flows_of(&self, tenant: TenantId) -> impl Iterator<Item = FlowId> + '_ {
        let of = self.of_tenant.get(&tenant).into_iter();
        of.flat_map(|of| of.flows.iter().map(|(_, flow)| *flow))
    }

    /// A flow is held up here. `true` where its tenant was not known here.
    pub fn insert(&mut self, head: Head, load: Load, weight: u64) -> bool {
        let (clock, new) = (self.clock, !self.of_tenant.contains_key(&head.tenant));
        let of = self.of_tenant.entry(head.tenant).or_insert_with(|| OfTenant::new(clock));
        if !of.stands() {
            of.comes_back(clock);
            of.weight = weight;
            self.standing += 1;
            self.weights += weight;
        }
        of.flows.insert((head.rank, head.flow));
        of.load = of.load.plus(load);
        self.load = self.load.plus(load);
        self.place(head.tenant);
        new
    }

    /// A flow is held up here no more. `true` where it was its tenant's last.
    pub fn remove(&mut self, head: Head, load: Load) -> bool {
        let of = self.known(head.tenant);
        let there = of.flows.remove(&(head.rank, head.flow)) || of.aside.remove(&(head.rank, head.flow));
        debug_assert!(there, "a flow stands where its place says");
        of.load = of.load.minus(load);
        let last = !of.stands();
        if last {
            let weight = std::mem::take(&mut of.weight);
            self.standing -= 1;
            self.weights -= weight;
        }
        self.load = self.load.minus(load);
        self.place(head.tenant);
        last
    }

    /// More wait in a flow that stands here.
    pub fn grow(&mut self, tenant: TenantId, load: Load) {
        self.load = self.load.plus(load);
        let of = self.known(tenant);
        of.load = of.load.plus(load);
    }

    /// Fewer wait in a flow that stands here.
    pub fn shrink(&mut self, tenant: TenantId, load: Load) {
        self.load = self.load.minus(load);
        let of = self.known(tenant);
        of.load = of.load.minus(load);
    }

    /// Makes a tenant known that passes by; `true` where it was not.
    pub fn meet(&mut self, tenant: TenantId) -> bool {
        let (clock, known) = (self.clock, self.of_tenant.len());
        self.of_tenant.entry(tenant).or_insert_with(|| OfTenant { away: true, ..OfTenant::new(clock) });
        self.of_tenant.len() > known
    }

    /// A request of the tenant's is let through here.
    pub fn served(&mut self, tenant: TenantId, service: Virtual) {
        let clock = self.clock;
        let of = self.known(tenant);
        let away = of.away;
        of.comes_back(clock);
        let tag = of.tag();
        of.here = of.here.plus(service);
        of.away = away;
        self.clock = clock.max(tag);
        self.place(tenant);
    }

    /// The tenant was served by way of other limits than this one.
    pub fn served_elsewhere(&mut self, tenant: TenantId, service: Virtual) {
        let of = self.known(tenant);
        of.elsewhere = of.elsewhere.plus(service).min(MOST_ELSEWHERE);
        self.place(tenant);
    }

    /// What the tenant was served here was `service`, not `charged`.
    pub fn correct(&mut self, tenant: TenantId, charged: Virtual, service: Virtual) {
        let of = self.known(tenant);
        of.here = of.here.plus(service).minus(charged);
        self.place(tenant);
    }

    /// As [`Line::correct`], of what it was served elsewhere.
    pub fn correct_elsewhere(&mut self, tenant: TenantId, charged: Virtual, service: Virtual) {
        let of = self.known(tenant);
        of.elsewhere = of.elsewhere.plus(service).minus(charged).min(MOST_ELSEWHERE);
        self.place(tenant);
    }

    /// The tenant does not wait here any more, unless it stands here again. When nobody does, everyone is forgotten, and
    /// handed out.
    pub fn went(&mut self, tenant: TenantId) -> Vec<TenantId> {
        if let Some(of) = self.of_tenant.get_mut(&tenant) {
            of.away = !of.stands();
        }
        if self.standing > 0 {
            return Vec::new();
        }
        std::mem::take(&mut self.of_tenant).into_keys().collect()
    }

    /// The tenant's weight has changed, in thousandths. What it has had stays counted as it was.
    pub fn reweigh(&mut self, tenant: TenantId, weight: u64) {
        let of = self.known(tenant);
        if of.stands() {
            let before = std::mem::replace(&mut of.weight, weight);
            self.weights = self.weights - before + weight;
        }
    }

    /// Every tenant that was known here.
    pub fn into_tenants(self) -> impl Iterator<Item = TenantId> {
        self.of_tenant.into_keys()
    }

    /// The tenant is not known any more.
    pub fn forget(&mut self, tenant: TenantId) {
        let forgotten = self.of_tenant.remove(&tenant);
        debug_assert!(forgotten.is_none_or(|of| !of.stands()), "who is forgotten does not wait");
    }

    /// Offers a flow that stands here no room until [`Line::bring_back`].
    pub fn set_aside(&mut self, head: Head) {
        let of = self.known(head.tenant);
        if of.flows.remove(&(head.rank, head.flow)) {
            of.aside.insert((head.rank, head.flow));
        }
        self.place(head.tenant);
    }

    /// Everyone who was set aside stands in line again.
    pub fn bring_back(&mut self) {
        let set_aside = self.of_tenant.iter_mut().filter(|(_, of)| !of.aside.is_empty());
        let tenants: Vec<TenantId> = set_aside
            .map(|(tenant, of)| {
                of.flows.append(&mut of.aside);
                *tenant
            })
            .collect();
        for tenant in tenants {
            self.place(tenant);
        }
    }

    fn known(&mut self, tenant: TenantId) -> &mut OfTenant {
        self.of_tenant.get_mut(&tenant).expect("a tenant remembers the lines in which it is known")
    }

    /// Puts a tenant where its tag and its first waiter belong.
    fn place(&mut self, tenant: TenantId) {
        let of = self.of_tenant.get_mut(&tenant).expect("who has a place is known");
        let place = of.flows.first().map(|(rank, _)| (of.tag(), *rank));
        if place == of.place {
            return;
        }
        if let Some((tag, rank)) = std::mem::replace(&mut of.place, place) {
            self.order.remove(&(tag, rank, tenant));
        }
        self.order.extend(place.map(|(tag, rank)| (tag, rank, tenant)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(0);
    const B: TenantId = TenantId(1);

    fn of(tokens: u64) -> Virtual {
        Virtual::of_tokens(tokens)
    }

    fn head(tenant: TenantId, rank: u64) -> Head {
        Head { tenant, rank: Rank(rank), flow: FlowId(tenant.0) }
    }

    fn first(line: &Line) -> Option<TenantId> {
        line.first().map(|head| head.tenant)
    }

    #[test]
    fn whoever_has_had_least_is_next_and_among_equals_whoever_came_first() {
        let mut line = Line::default();
        assert!(line.insert(head(B, 1), Load::one(10), 1000) && line.insert(head(A, 2), Load::one(10), 1000));
        assert_eq!(first(&line), Some(B));
        line.served(B, of(100));
        assert_eq!(first(&line), Some(A));
        line.served(A, of(300));
        assert_eq!(first(&line), Some(B));
        line.correct(A, of(300), of(50));
        assert_eq!(first(&line), Some(A), "it cost less than was thought");
    }

    #[test]
    fn who_comes_back_begins_at_the_clock() {
        let mut line = Line::default();
        line.insert(head(A, 1), Load::one(10), 1000);
        line.insert(head(B, 2), Load::one(10), 1000);
        assert!(line.remove(head(B, 2), Load::one(10)) && line.went(B).is_empty());
        for _ in 0..10 {
            line.served(A, of(100));
        }
        assert_eq!((line.clock(), line.tag(A), line.tag(B)), (of(900), of(1000), of(900)));
        line.insert(head(B, 3), Load::one(10), 1000);
        assert_eq!(line.tag(B), of(900));
    }

    #[test]
    fn who_passes_a_line_counts_and_does_not_pass_for_nothing_again() {
        let mut line = Line::default();
        line.insert(head(A, 1), Load::one(10), 1000);
        assert!(line.meet(B) && !line.meet(B));
        line.served(B, of(50));
        assert_eq!(line.tag(B), of(50));
        line.served(B, of(50));
        assert_eq!((line.tag(B), line.clock()), (of(100), of(50)));
    }

    #[test]
    fn what_is_had_elsewhere_counts_up_to_a_bound() {
        let mut line = Line::default();
        line.insert(head(A, 1), Load::one(10), 1000);
        line.served_elsewhere(A, of(1000));
        assert_eq!(line.tag(A), of(1000));
        line.served_elsewhere(A, of(u64::MAX / 2000));
        assert_eq!(line.tag(A), MOST_ELSEWHERE);
    }

    #[test]
    fn when_nobody_waits_everyone_is_forgotten() {
        let mut line = Line::default();
        line.insert(head(A, 1), Load::one(10), 1000);
        line.meet(B);
        line.served(B, of(50));
        assert!(line.remove(head(A, 1), Load::one(10)));
        assert_eq!(line.went(A), [A, B]);
        assert!(!line.has_begun() && line.is_empty() && line.load() == Load::default());
    }
}
