//! What there is to see of the queue: who waits for what, and whose limit it is.
//!
//! Everything here only looks. A survey is taken while the gate is locked, so what it costs does not depend on how many wait:
//! it goes through lanes and limits, which are bounded, and of those who wait it looks at the first of each flow, in the flows
//! of those tenants that fill the queue most.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use super::*;
use crate::admission::pace::{Hold, PaceView};
use crate::config::Rate;

/// Tenants whose flows are looked at, and flows of each.
const MOST_TENANTS: usize = 128;
const MOST_FLOWS: usize = 16;

/// Lanes of one model that an outlook lists.
const MOST_LANES: usize = 20;

/// Stands for a tenant, or a flow, that is not known.
const NO_TENANT: TenantId = TenantId(usize::MAX);
const NO_FLOW: FlowId = FlowId(usize::MAX);

/// The whole queue at one moment.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// Requests that wait, and those that hold a permit.
    pub waiting: u64,
    pub in_flight: u64,
    /// What requests under way are estimated to cost, in tokens.
    pub reserved_tokens: u64,
    /// The limits of the configuration, as far as they are in use.
    pub limits: Vec<LimitView>,
    /// Every model that has a lane, in the order of their numbers.
    pub models: Vec<ModelView>,
    /// The clients by name that have had something to do with weir lately: under way, and waiting.
    pub clients: Vec<(ClientId, u64, u64)>,
    /// Those who wait, most first; not all where very many tenants do.
    pub queue: Vec<Waiting>,
}

/// One limit at one moment.
#[derive(Debug, Clone)]
pub struct LimitView {
    pub scope: Scope,
    pub mode: Mode,
    pub level: Level,
    /// Requests that wait for it, and those that wait behind these.
    pub waiting: u64,
}

/// How a limit stands.
#[derive(Debug, Clone, Copy)]
pub enum Level {
    Requests { rate: Rate, remaining: u32, full_in: Duration },
    Tokens { rate: Rate, remaining: u32, full_in: Duration },
    Concurrency { limit: u32, in_use: u32 },
    Pace(PaceView),
}

/// All lanes of one model.
#[derive(Debug, Clone)]
pub struct ModelView {
    pub model: ModelId,
    pub lanes: u32,
    pub in_flight: u64,
    pub waiting: u64,
    /// Those of them that what was learned of their lane holds up.
    pub held: u64,
    /// The tightest number of slots that its requests have to pass, clients' own aside; of the lane that has most.
    pub slots: Option<u32>,
    /// The lane that is used most.
    pub busiest: PaceView,
    /// Lanes that are closed, the longest time, and lanes whose breaker holds requests back.
    pub closed_lanes: u32,
    pub cooldown: Duration,
    pub broken_lanes: u32,
}

/// Whoever waits. Keys are not told apart, so that nothing of them is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Who {
    Client(ClientId),
    /// Those with keys of their own that the gateway has served.
    OwnKeys,
    Address(IpAddr),
    /// All who cannot be told apart.
    Anyone,
}

/// Those who wait for the same model at the same limit.
#[derive(Debug, Clone)]
pub struct Waiting {
    pub who: Who,
    pub model: ModelId,
    /// Whose first waiter this limit holds up.
    pub limit: LimitView,
    /// What of a pace it is.
    pub hold: Option<Hold>,
    pub requests: u64,
    /// What they are estimated to cost.
    pub tokens: u64,
    /// How many tenants they are of.
    pub tenants: u32,
    /// How long the first of them has waited.
    pub oldest: Duration,
    /// How long a newcomer may be expected to wait behind them.
    pub expected: Duration,
}

/// A request that might come.
#[derive(Debug, Clone, Copy)]
pub struct Newcomer {
    pub tenant: Tenant,
    pub weight: Weight,
    pub lane: Lane,
    pub tokens: u64,
}

/// What awaits it.
#[derive(Debug, Clone)]
pub struct Outlook {
    /// Every limit on its way, the widest first; its lane's pace is missing where nothing was sent there lately.
    pub path: Vec<LimitView>,
    /// The one of these that holds it up, and what of a pace it is.
    pub held_up_by: Option<(usize, Option<Hold>)>,
    /// How long it may be expected to wait, and which of the limits it passes last.
    pub expected: Duration,
    pub last: Option<usize>,
    /// However well all goes, it waits as long as that. Admission knows of more that is sure: what of others comes first, and what
    /// was promised.
    pub at_least: Duration,
    /// It would be refused at once, whatever it asks for: its gateway has failed for too long.
    pub given_up: bool,
    /// The queue is full, and nobody in it would give up a place for it.
    pub no_place: bool,
    /// What its tenant has waiting, and under way.
    pub own_waiting: u64,
    pub own_in_flight: u64,
    /// What it would be served beside those who wait for the same limit: its part of their weights.
    pub share: f64,
    /// Lanes of its model, most used first.
    pub lanes: Vec<LaneView>,
    pub more_lanes: usize,
}

/// One lane at one moment.
#[derive(Debug, Clone, Copy)]
pub struct LaneView {
    /// It is the newcomer's own.
    pub own: bool,
    pub waiting: u64,
    /// Those of them that what was learned of the lane holds up.
    pub held: u64,
    pub pace: PaceView,
}

impl<W> Queue<W> {
    /// How everything stands.
    pub fn survey(&self, clients: impl Iterator<Item = ClientId>, now: Instant) -> Survey {
        let models = self.model_views(now);
        Survey {
            waiting: self.waiting as u64,
            in_flight: models.iter().map(|model| model.in_flight).sum(),
            reserved_tokens: self.reserved_tokens,
            limits: self.limits().map(|limit| limit.view(now)).collect(),
            models,
            clients: clients.filter_map(|client| self.client(client)).collect(),
            queue: self.who_waits(now),
        }
    }

    /// Every model that has a lane, its lanes added up.
    pub fn model_views(&self, now: Instant) -> Vec<ModelView> {
        let of_all = self.tightest_slots(&self.global);
        let mut models: BTreeMap<ModelId, ModelView> = BTreeMap::new();
        for lane in self.lanes_in_use() {
            let Some(pace) = self.limits[lane.pace.0].pace() else { continue };
            let (model, view) = (lane.lane.model, pace.view(now));
            let of_model = self.of_model.get(&model).and_then(|limits| self.tightest_slots(limits));
            let slots = of_all.into_iter().chain(of_model).chain(pace.slot_limit()).min();
            let sum = models.entry(model).or_insert_with(|| ModelView::new(model, view));
            sum.add(view, lane.waiting, slots, pace.cooldown(now));
            sum.held += self.limits[lane.pace.0].line.load().requests;
        }
        models.into_values().collect()
    }

    /// What awaits a request, as far as can be told beforehand.
    pub fn outlook(&self, newcomer: &Newcomer, now: Instant) -> Outlook {
        let Newcomer { tenant, lane, tokens, .. } = *newcomer;
        let pace = self.known_lane(lane).map(|lane| lane.pace);
        let all: Vec<LimitId> = self.limits_on(tenant, lane.model, pace).collect();
        let flow = self.known_flow(tenant, lane);
        let id = self.tenants.known(tenant);
        let share = id.map(|id| self.tenants.share(id));
        let blocker = all.iter().position(|at| self.would_hold_up(*at, newcomer, flow, now));
        let waits = all.iter().enumerate().map(|(place, at)| (self.expected_wait(*at, newcomer, flow, now), place));
        let (expected, last) = waits.max().unwrap_or_default();
        let at = blocker.map_or(LimitId(usize::MAX), |place| all[place]);
        let mut lanes: Vec<LaneView> = self
            .lanes_in_use()
            .filter(|other| other.lane.model == lane.model)
            .filter_map(|other| {
                let pace = self.limits[other.pace.0].pace()?.view(now);
                Some(LaneView {
                    own: Some(other.pace) == all.last().copied(),
                    waiting: other.waiting,
                    held: self.limits[other.pace.0].line.load().requests,
                    pace,
                })
            })
            .collect();
        lanes.sort_by_key(|lane| std::cmp::Reverse((lane.own, lane.waiting, lane.pace.in_flight)));
        let more_lanes = lanes.len().saturating_sub(MOST_LANES);
        lanes.truncate(MOST_LANES);
        Outlook {
            path: all.iter().map(|at| self.limits[at.0].view(now)).collect(),
            held_up_by: blocker.map(|place| (place, self.limits[all[place].0].hold(tokens, now))),
            expected,
            last: (!expected.is_zero()).then_some(last),
            at_least: all.iter().map(|at| self.shortest_wait(*at, newcomer, flow, now)).max().unwrap_or_default(),
            given_up: pace.is_some_and(|pace| self.limits[pace.0].given_up(now)),
            no_place: self.is_full() && self.whom_to_displace(id, newcomer.weight).is_none(),
            own_waiting: share.map_or(0, |share| share.waiting),
            own_in_flight: share.map_or(0, |share| share.in_flight.into()),
            share: self.share_at(at, id, newcomer.weight),
            lanes,
            more_lanes,
        }
    }

    fn client(&self, client: ClientId) -> Option<(ClientId, u64, u64)> {
        let share = self.tenants.share(self.tenants.known(Tenant::Named(client))?);
        Some((client, share.in_flight.into(), share.waiting))
    }

    /// Those who wait, added up where they are of one client or kind, for one model, and held up by one limit.
    fn who_waits(&self, now: Instant) -> Vec<Waiting> {
        let mut groups: HashMap<(Who, ModelId, Option<LimitId>), Waiting> = HashMap::new();
        for tenant in self.tenants.backlogged().take(MOST_TENANTS) {
            let share = self.tenants.share(tenant);
            let who = Who::of(share.tenant);
            for id in share.backlog.iter().take(MOST_FLOWS) {
                let flow = &self.flows[id.0];
                let (Some(at), Some((_, first))) = (self.held_up_by(*id), flow.waiters.first_key_value()) else {
                    continue;
                };
                let limit = &self.limits[at.0];
                // Of keys there may be many lanes; they are one to whoever looks.
                let key = (who, flow.model, limit.pace().is_none().then_some(at));
                let newcomer = Newcomer {
                    tenant: share.tenant,
                    weight: share.weight,
                    lane: self.lane_of_flow(flow),
                    tokens: first.cost.tokens(),
                };
                let here = Waiting {
                    who,
                    model: flow.model,
                    limit: limit.view(now),
                    hold: limit.hold(first.cost.tokens(), now),
                    requests: flow.load.requests,
                    tokens: flow.load.tokens,
                    tenants: 1,
                    oldest: now.saturating_duration_since(first.since),
                    expected: self.longest_wait(flow, *id, &newcomer, now),
                };
                match groups.get_mut(&key) {
                    Some(group) => group.add(&here),
                    None => drop(groups.insert(key, here)),
                }
            }
        }
        let mut groups: Vec<Waiting> = groups.into_values().collect();
        groups.sort_by_key(|group| std::cmp::Reverse((group.requests, group.oldest)));
        groups
    }

    fn longest_wait(&self, flow: &Flow<W>, id: FlowId, newcomer: &Newcomer, now: Instant) -> Duration {
        let waits = flow.path.iter().map(|at| self.expected_wait(*at, newcomer, Some(id), now));
        waits.max().unwrap_or_default()
    }

    /// How long a newcomer may be expected to wait for this limit, its own and others' requests before it.
    fn expected_wait(&self, at: LimitId, newcomer: &Newcomer, flow: Option<FlowId>, now: Instant) -> Duration {
        let limit = &self.limits[at.0];
        if limit.mode == Mode::Observe || !limit.concerns(newcomer.tokens) {
            return Duration::ZERO;
        }
        let tenant = self.tenants.known(newcomer.tenant).unwrap_or(NO_TENANT);
        let own = flow.map_or_else(|| limit.line.load_of(tenant), |flow| self.own_ahead(at, flow));
        let own = own.plus(limit.own_part(newcomer.tokens));
        let load = self.with_shares(at, tenant, newcomer.weight, own);
        limit.expected_at(load, now).saturating_duration_since(now)
    }

    /// Before how long a newcomer cannot pass this limit, behind what waits in its own flow.
    fn shortest_wait(&self, at: LimitId, newcomer: &Newcomer, flow: Option<FlowId>, now: Instant) -> Duration {
        let limit = &self.limits[at.0];
        if limit.mode == Mode::Observe || !limit.concerns(newcomer.tokens) {
            return Duration::ZERO;
        }
        let ahead = flow.map_or_else(Load::default, |flow| self.flows[flow.0].load);
        limit.earliest_at(ahead.plus(limit.own_part(newcomer.tokens)), now).saturating_duration_since(now)
    }

    /// Whether this limit would not let a newcomer through now.
    fn would_hold_up(&self, at: LimitId, newcomer: &Newcomer, flow: Option<FlowId>, now: Instant) -> bool {
        let limit = &self.limits[at.0];
        if limit.mode == Mode::Observe || !limit.concerns(newcomer.tokens) {
            return false;
        }
        let tenant = self.tenants.known(newcomer.tenant).unwrap_or(NO_TENANT);
        let need = Need { flow: flow.unwrap_or(NO_FLOW), tenant, model: newcomer.lane.model, tokens: newcomer.tokens };
        // Whoever stands there has come before it; another tenant's goes first only if it has had less.
        let is_before = |head: Head| head.tenant == tenant || limit.line.tag(head.tenant) <= limit.line.tag(tenant);
        !limit.has_room(need, now) || limit.line.first().is_some_and(is_before)
    }

    /// The part of what passes this limit that is this tenant's when it waits there, by the weights of those who do.
    fn share_at(&self, at: LimitId, tenant: Option<TenantId>, weight: Weight) -> f64 {
        let others = self.limits.get(at.0).map_or(0, |limit| limit.line.weights_without(tenant.unwrap_or(NO_TENANT)));
        let own = f64::from(weight.thousandths());
        own / (own + others as f64)
    }

    fn tightest_slots(&self, limits: &[LimitId]) -> Option<u32> {
        let slots = limits.iter().filter_map(|id| match &self.limits[id.0].measure {
            Measure::Concurrency(slots) => Some(slots.limit()),
            Measure::Requests(_) | Measure::Tokens(_) | Measure::Pace(_) => None,
        });
        slots.min()
    }
}

impl Limit {
    /// How it stands.
    pub fn view(&self, now: Instant) -> LimitView {
        let level = match &self.measure {
            Measure::Requests(bucket) => Level::Requests {
                rate: bucket.rate(),
                remaining: bucket.remaining(now),
                full_in: bucket.time_to_full(now),
            },
            Measure::Tokens(bucket) => Level::Tokens {
                rate: bucket.rate(),
                remaining: bucket.remaining(now),
                full_in: bucket.time_to_full(now),
            },
            Measure::Concurrency(slots) => Level::Concurrency { limit: slots.limit(), in_use: slots.in_use() },
            Measure::Pace(pace) => Level::Pace(pace.view(now)),
        };
        LimitView { scope: self.scope.clone(), mode: self.mode, level, waiting: self.line.load().requests }
    }

    fn pace(&self) -> Option<&Pace> {
        match &self.measure {
            Measure::Pace(pace) => Some(pace),
            Measure::Requests(_) | Measure::Tokens(_) | Measure::Concurrency(_) => None,
        }
    }

    /// What of a pace holds such a request up.
    fn hold(&self, tokens: u64, now: Instant) -> Option<Hold> {
        self.pace().and_then(|pace| pace.hold(tokens, now))
    }
}

impl ModelView {
    fn new(model: ModelId, busiest: PaceView) -> Self {
        Self {
            model,
            lanes: 0,
            in_flight: 0,
            waiting: 0,
            held: 0,
            slots: None,
            busiest,
            closed_lanes: 0,
            cooldown: Duration::ZERO,
            broken_lanes: 0,
        }
    }

    fn add(&mut self, lane: PaceView, waiting: u64, slots: Option<u32>, cooldown: Duration) {
        self.lanes += 1;
        self.in_flight += u64::from(lane.in_flight);
        self.waiting += waiting;
        self.slots = self.slots.max(slots);
        self.closed_lanes += u32::from(lane.closed.is_some());
        self.cooldown = self.cooldown.max(cooldown);
        self.broken_lanes += u32::from(lane.failing_for.is_some());
        if (lane.closed.is_some(), lane.in_flight) > (self.busiest.closed.is_some(), self.busiest.in_flight) {
            self.busiest = lane;
        }
    }
}

impl Waiting {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.tenants += other.tenants;
        self.oldest = self.oldest.max(other.oldest);
        self.expected = self.expected.max(other.expected);
    }
}

impl Who {
    fn of(tenant: Tenant) -> Self {
        match tenant {
            Tenant::Named(client) => Self::Client(client),
            Tenant::Key(_) => Self::OwnKeys,
            Tenant::Peer(address) => Self::Address(address),
            Tenant::Shared => Self::Anyone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::bucket::Bucket;
    use crate::admission::estimate::Cost;
    use crate::admission::slots::Slots;

    const MODEL: ModelId = ModelId::OTHER;

    fn queue(global: Vec<Measure>) -> Queue<u64> {
        let lane = LaneRules { slots: None, give_up: Duration::from_secs(30) };
        let mut queue = Queue::new(Rules { max_waiting: 200_000, lane, mode: Mode::Enforce }, global);
        queue.limit_model(MODEL, &"other".into(), Mode::Enforce, Vec::new());
        queue
    }

    /// One more request arrives; its grant, where it need not wait.
    fn arrive(queue: &mut Queue<u64>, tenant: Tenant, rank: u64, now: Instant) -> Option<Grant> {
        let ask = Ask {
            tenant,
            weight: Weight::ONE,
            lane: Lane { credential: 0, model: MODEL },
            rank: Rank(rank),
            cost: Cost { prompt: 10, output: 90 },
            max_wait: Duration::from_secs(1_000_000),
            until: now + Duration::from_secs(1_000_000),
            again: false,
        };
        match queue.offer(&ask, || "other".into(), now) {
            Offer::Admitted(grant) => Some(grant),
            Offer::MustWait(opening) => {
                queue.enqueue(&opening, &ask, rank, now);
                queue.pump(now, |_, _| panic!("nobody can go"));
                None
            }
            Offer::Refused(refusal) => panic!("{refusal:?}"),
        }
    }

    fn newcomer(tenant: Tenant) -> Newcomer {
        Newcomer { tenant, weight: Weight::ONE, lane: Lane { credential: 0, model: MODEL }, tokens: 100 }
    }

    #[test]
    fn a_survey_of_a_hundred_thousand_is_as_short_as_one_of_a_few_and_its_sums_are_right() {
        let now = Instant::now();
        let mut queue = queue(vec![Measure::Concurrency(Slots::new(1))]);
        let held = arrive(&mut queue, Tenant::Key(0), 0, now).expect("the first goes");
        // 4,000 keys, an address with many, and all of them in one lane.
        for rank in 1..=60_000 {
            assert!(arrive(&mut queue, Tenant::Key(rank % 4000), rank, now).is_none());
        }
        for rank in 60_001..=100_000 {
            assert!(arrive(&mut queue, Tenant::Peer([10, 0, 0, 1].into()), rank, now).is_none());
        }
        let survey = queue.survey(std::iter::empty(), now + Duration::from_secs(9));
        assert_eq!((survey.waiting, survey.in_flight, survey.reserved_tokens), (100_000, 1, 100));
        assert_eq!((survey.models.len(), survey.models[0].waiting), (1, 100_000));
        let groups: Vec<(Who, u64, u32)> =
            survey.queue.iter().map(|group| (group.who, group.requests, group.tenants)).collect();
        let shown = MOST_TENANTS as u32 - 1;
        let address = Who::Address([10, 0, 0, 1].into());
        assert_eq!(groups, [(address, 40_000, 1), (Who::OwnKeys, 15 * u64::from(shown), shown)]);
        assert!(
            survey.queue.iter().all(|group| group.oldest == Duration::from_secs(9) && group.limit.waiting == 100_000)
        );
        queue.release(&held, Used::Tokens(100), now);
    }

    #[test]
    fn an_outlook_is_what_the_next_one_meets_and_changes_nothing() {
        let now = Instant::now();
        let rate = Rate::parse("1/s").expect("a rate").with_burst(1);
        let mut queue = queue(vec![Measure::Requests(Bucket::new(rate, now))]);
        let (known, stranger) = (Tenant::Key(1), Tenant::Key(2));
        let fresh = queue.outlook(&newcomer(known), now);
        assert!(fresh.held_up_by.is_none() && fresh.expected.is_zero() && fresh.lanes.is_empty());
        assert!(arrive(&mut queue, known, 0, now).is_some());
        for rank in 1..=10 {
            assert!(arrive(&mut queue, known, rank, now).is_none());
        }
        let (own, others) = (queue.outlook(&newcomer(known), now), queue.outlook(&newcomer(stranger), now));
        assert_eq!((own.own_waiting, own.own_in_flight, others.own_waiting), (10, 1, 0));
        assert_eq!((own.held_up_by, own.expected.as_secs()), (Some((0, None)), 11), "behind ten of its own");
        assert!((1..=2).contains(&others.expected.as_secs()), "{:?}: it takes turns with them", others.expected);
        assert!((others.share - 0.5).abs() < 1e-9 && (own.share - 1.0).abs() < 1e-9);
        assert_eq!(queue.tenants.known_tenants(), 1, "a stranger that was asked about is still one");
        assert_eq!(queue.outlook(&newcomer(known), now).expected, own.expected);
    }

    #[test]
    fn what_is_in_flight_of_a_client_comes_and_goes_with_its_grants() {
        let now = Instant::now();
        let client = ClientId::all().nth(1).expect("there are two");
        let mut queue = queue(vec![Measure::Concurrency(Slots::new(2))]);
        let grants: Vec<Grant> =
            (0..2).map(|rank| arrive(&mut queue, Tenant::Named(client), rank, now).expect("it goes")).collect();
        assert!(arrive(&mut queue, Tenant::Named(client), 2, now).is_none());
        let clients = |queue: &Queue<u64>| queue.survey(ClientId::all().take(3), now).clients;
        assert_eq!(clients(&queue), [(client, 2, 1)]);
        queue.release(&grants[0], Used::Refused, now);
        assert_eq!(clients(&queue), [(client, 1, 1)]);
        queue.pump(now, |_, grant| assert_eq!(grant.cost().tokens(), 100));
        assert_eq!(clients(&queue), [(client, 2, 0)]);
    }
}
