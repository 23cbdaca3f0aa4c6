//! The queue against a slow reading of its own rules, after every step of a random history.
//!
//! `WEIR_MODEL_SEEDS=3000 cargo test --lib model_tests` plays more of them.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::tests::{MINUTE, World, millis};
use super::*;
use crate::admission::bucket::Bucket;
use crate::admission::pace::Signal;
use crate::admission::slots::Slots;
use crate::clients::Clients;
use crate::config::{Config, Rate};
use crate::openai::headers::Quota;

const CLIENTS: &str = "[clients.a]\nkey = \"ka\"\n[clients.b]\nkey = \"kb\"\n[clients.c]\nkey = \"kc\"\n";
const MODELS: [&str; 3] = ["a", "b", "c"];
const LONG: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// What a request asked for, to ask again with.
#[derive(Clone, Copy)]
struct Facts {
    tenant: Tenant,
    weight: Weight,
    model: &'static str,
    tokens: u64,
    again: bool,
}

/// What a gateway mostly answers.
#[derive(Clone, Copy)]
enum Temper {
    Kind,
    Strict,
    Broken,
    Moody,
}

/// What it tells of its quotas.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Telling {
    Nothing,
    Sense,
    Nonsense,
}

const TEMPERS: [Temper; 4] = [Temper::Kind, Temper::Strict, Temper::Broken, Temper::Moody];

/// A world with random limits in which random things happen.
struct History {
    rng: SmallRng,
    world: World,
    tenants: Vec<(Tenant, Weight)>,
    facts: BTreeMap<u64, Facts>,
    /// Requests under way of which the gateway has been heard.
    heard: BTreeSet<u64>,
    /// Requests that were let through and have ended: they may be retried.
    ended: Vec<u64>,
    temper: Temper,
    telling: Telling,
    largest: u64,
    clients: Clients,
    /// First attempts that may wait: `max_waiting`, or as many as waited already when that became less.
    most_waiting: usize,
}

impl History {
    fn new(seed: u64, telling: Telling) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let start = Instant::now();
        let global = if rng.random_bool(0.5) { measures(&mut rng, start) } else { Vec::new() };
        let mut world = World::of(global, start);
        world.queue.rules.max_waiting = [3, 20, 100_000][rng.random_range(0..3)];
        // What a lane learns may be only observed.
        world.queue.rules.mode = mode(&mut rng);
        world.queue.rules.lane = lane_rules(&mut rng);
        for model in MODELS {
            let (id, mode) = (world.models.find(model), mode(&mut rng));
            let measures = measures(&mut rng, start);
            world.queue.limit_model(id, &model.into(), mode, measures);
        }
        let clients = Clients::new(&Config::parse(CLIENTS, &|_| None).expect("a good configuration"));
        for id in clients.ids() {
            let (mode, measures) = (mode(&mut rng), measures(&mut rng, start));
            world.queue.limit_client(id, clients.name(id), mode, measures);
        }
        let weights = [0.01, 0.5, 1.0, 1.0, 1.0, 3.0, 1000.0];
        let named = clients.ids().map(Tenant::Named);
        let tenants: Vec<Tenant> = named.chain((0..3).map(Tenant::Key)).take(rng.random_range(1..=6)).collect();
        let mut weight = || Weight::new(weights[rng.random_range(0..weights.len())]).expect("a weight");
        let tenants = tenants.into_iter().map(|tenant| (tenant, weight())).collect();
        // Now and then so large that laggards are set forward.
        let largest = [200, 2000, 400_000][rng.random_range(0..3)];
        let temper = TEMPERS[rng.random_range(0..4)];
        let (facts, heard, ended) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        let most_waiting = world.queue.rules.max_waiting;
        Self { rng, world, tenants, facts, heard, ended, temper, telling, largest, clients, most_waiting }
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..30 => self.arrive(),
            30..34 => self.retry(),
            34..44 => self.hear(),
            44..60 => self.settle(),
            60..63 => self.charge_again(),
            63..70 => self.leave(),
            70..75 => self.expire(),
            75..90 => {
                let time = millis(self.rng.random_range(0..1000));
                self.world.pass(time);
            }
            90 => self.change_limit(),
            91 => self.reload(),
            92..96 => {
                // The timekeeper is late: several things are due at once.
                self.world.now += millis(self.rng.random_range(0..3000));
                self.late();
            }
            96..98 => {
                // A timer is due in the very moment in which something else happens.
                if let Some(next) = self.world.queue.next_timer() {
                    self.world.now = next;
                }
                self.late();
            }
            _ => {
                let time = Duration::from_secs(self.rng.random_range(0..600));
                self.world.pass(time);
            }
        }
    }

    fn late(&mut self) {
        match self.rng.random_range(0..5) {
            0 => self.arrive(),
            1 => self.settle(),
            2 => self.leave(),
            3 => self.hear(),
            _ => {}
        }
        // There may have been nothing to settle, or nobody to leave.
        self.world.pump();
    }

    fn arrive(&mut self) {
        let (tenant, weight) = self.tenants[self.rng.random_range(0..self.tenants.len())];
        let model = MODELS[self.rng.random_range(0..MODELS.len())];
        let tokens = match self.rng.random_range(0..10) {
            0 => 0,
            1..8 => self.rng.random_range(1..50),
            _ => self.rng.random_range(1..self.largest),
        };
        self.world.arrivals += 1;
        self.ask(self.world.arrivals, Facts { tenant, weight, model, tokens, again: false });
    }

    fn retry(&mut self) {
        if !self.ended.is_empty() {
            let request = self.ended.swap_remove(self.rng.random_range(0..self.ended.len()));
            let facts = self.facts[&request];
            self.ask(request, Facts { again: true, ..facts });
        }
    }

    fn ask(&mut self, request: u64, facts: Facts) {
        let Facts { tenant, weight, model, tokens, again } = facts;
        (self.world.tenant, self.world.weight, self.world.tokens) = (tenant, weight, tokens);
        self.facts.insert(request, facts);
        let max_wait = [Duration::ZERO, millis(500), MINUTE, LONG][self.rng.random_range(0..4)];
        self.world.ask(request, model, max_wait, again);
    }

    /// The gateway answers somebody, or fails, which is heard once of each; the answer itself goes on for a while.
    fn hear(&mut self) {
        let unheard: BTreeSet<u64> =
            self.world.grants.keys().filter(|request| !self.heard.contains(request)).copied().collect();
        let Some(request) = pick(&mut self.rng, unheard.iter()) else { return };
        if self.rng.random_bool(0.05) {
            // Its gateway has changed its mind.
            self.temper = TEMPERS[self.rng.random_range(0..4)];
        }
        let heard = Heard {
            signal: signal(&mut self.rng, self.temper),
            requests: quota(&mut self.rng, self.telling),
            tokens: quota(&mut self.rng, self.telling),
        };
        self.heard.insert(request);
        let World { queue, grants, now, .. } = &mut self.world;
        queue.hear(&grants[&request], &heard, *now);
        self.world.pump();
        // An error is read at once.
        if heard.signal != Signal::Accepted && self.rng.random_bool(0.7) {
            self.end(request, Used::Refused);
        }
    }

    fn settle(&mut self) {
        let Some(request) = pick(&mut self.rng, self.world.grants.keys()) else { return };
        let charged = self.world.grants[&request].cost().tokens();
        let used = match self.rng.random_range(0..6) {
            0 => Used::Unsent,
            1 => Used::Refused,
            2 => Used::Tokens(charged),
            3 => Used::Tokens(charged.saturating_mul(3)),
            _ => Used::Tokens(self.rng.random_range(0..=charged)),
        };
        self.end(request, used);
    }

    fn end(&mut self, request: u64, used: Used) {
        self.heard.remove(&request);
        self.world.settle(request, used);
        self.ended.push(request);
    }

    fn charge_again(&mut self) {
        let Some(request) = pick(&mut self.rng, self.world.grants.keys()) else { return };
        self.world.queue.charge_again(&self.world.grants[&request], self.world.now);
        self.world.pump();
    }

    /// A limit's rate or number changes while others wait for it.
    fn change_limit(&mut self) {
        let World { queue, now, .. } = &mut self.world;
        if queue.limits.is_empty() {
            return;
        }
        let id = LimitId(self.rng.random_range(0..queue.limits.len()));
        match &mut queue.limits[id.0].measure {
            Measure::Concurrency(slots) => slots.set_limit(self.rng.random_range(1..5)),
            Measure::Requests(bucket) | Measure::Tokens(bucket) => {
                let count = self.rng.random_range(1..100);
                let rate = Rate { count, ..bucket.rate() }.with_burst(self.rng.random_range(1..300));
                bucket.set_rate(rate, *now);
            }
            Measure::Pace(_) => {}
        }
        queue.opened.push(id);
        self.world.pump();
    }

    /// Every limit becomes another, goes, or comes, for everyone who waits and is under way.
    fn reload(&mut self) {
        let Self { rng, world, clients, .. } = self;
        let now = world.now;
        let table = |rng: &mut SmallRng, name: &str| Table {
            name: name.into(),
            mode: mode(rng),
            // A table may have no limits at all.
            measures: if rng.random_bool(0.8) { measures(rng, now) } else { Vec::new() },
        };
        let models = MODELS.map(|name| (world.models.find(name), table(rng, name))).into_iter().collect();
        let mut of_clients = Vec::new();
        for id in clients.ids() {
            let weight = Weight::new([0.1, 1.0, 5.0][rng.random_range(0..3)]).expect("a weight");
            let client = (id, weight, table(rng, clients.name(id)));
            // Some are no clients any more.
            of_clients.extend(rng.random_bool(0.8).then_some(client));
        }
        let rules =
            Rules { max_waiting: [3, 20, 100_000][rng.random_range(0..3)], lane: lane_rules(rng), mode: mode(rng) };
        let global = measures(rng, now);
        world.queue.reload(NewLimits { rules, global, models, clients: of_clients }, now);
        self.most_waiting = rules.max_waiting.max(self.first_attempts_waiting());
        self.world.pump();
    }

    fn first_attempts_waiting(&self) -> usize {
        self.world.tickets.keys().filter(|request| !self.facts[request].again).count()
    }

    fn leave(&mut self) {
        if let Some(request) = pick(&mut self.rng, self.world.tickets.keys()) {
            self.world.leave(request);
        }
    }

    fn expire(&mut self) {
        let Some(request) = pick(&mut self.rng, self.world.tickets.keys()) else { return };
        let ticket = self.world.tickets.remove(&request).expect("just picked");
        let refusal = self.world.queue.expire(ticket, self.world.now).expect("it waits");
        assert!(refusal.retry_after > Duration::ZERO);
        self.world.pump();
    }

    /// Everyone ends, and time goes on, until nobody waits any more.
    fn run_dry(&mut self) {
        for _ in 0..20_000 {
            let Some(request) = self.world.grants.keys().next().copied() else {
                match self.world.queue.next_timer() {
                    Some(next) => self.world.pass(next - self.world.now),
                    None => break,
                }
                continue;
            };
            self.world.finish(request);
        }
        let World { queue, tickets, grants, .. } = &self.world;
        assert!(tickets.is_empty(), "{} wait for ever", tickets.len());
        assert!(grants.is_empty());
        assert_eq!((queue.waiting, queue.reserved_tokens(), queue.next_timer()), (0, 0, None));
    }

    fn check(&mut self) {
        self.check_queue();
        let first_attempts = self.first_attempts_waiting();
        assert!(first_attempts <= self.most_waiting, "only retries pass max_waiting");
        self.most_waiting = first_attempts.max(self.world.queue.rules.max_waiting);
    }

    fn check_queue(&self) {
        let World { queue, tickets, .. } = &self.world;
        assert!(queue.ready.is_empty() && queue.opened.is_empty(), "between two pumps everyone stands somewhere");
        self.check_flows();
        self.check_tenants();
        let in_use = |id: &LimitId| !queue.free_limits.contains(id);
        (0..queue.limits.len()).map(LimitId).filter(in_use).for_each(|id| self.check_limit(id));
        assert!(
            queue.free_limits.iter().all(|id| queue.limits[id.0].line.is_empty()),
            "nobody waits for what is no more"
        );
        let timers: BTreeSet<(Instant, LimitId)> =
            queue.limits.iter().zip(0..).filter_map(|(limit, id)| Some((limit.timer?, LimitId(id)))).collect();
        assert_eq!(queue.timers, timers);
        for (request, ticket) in tickets {
            assert!(queue.flows[ticket.flow.0].waiters.contains_key(&Rank(*request)), "{request} has a place");
        }
    }

    fn check_flows(&self) {
        let World { queue, tickets, grants, .. } = &self.world;
        let waiting: usize = queue.flows.iter().map(|flow| flow.waiters.len()).sum();
        assert_eq!((queue.waiting, tickets.len()), (waiting, waiting));
        let reserved: u64 = grants.values().map(|grant| grant.cost().tokens()).sum();
        assert_eq!(queue.reserved_tokens, reserved);
        for lane in queue.lanes_in_use() {
            let of_lane = queue
                .of_flow
                .values()
                .map(|id| &queue.flows[id.0])
                .filter(|flow| queue.lane_of_flow(flow) == lane.lane);
            assert_eq!(lane.waiting, of_lane.map(|flow| flow.waiters.len() as u64).sum::<u64>());
        }
        for (id, flow) in queue.flows.iter().enumerate() {
            let under_way = grants.values().filter(|grant| grant.flow == FlowId(id)).count();
            assert_eq!(flow.in_flight as usize, under_way);
            assert_eq!(flow.waiters.is_empty(), flow.place == Place::Empty, "who waits is parked");
            let load = flow.waiters.values().map(|waiter| Load::one(waiter.cost.tokens()));
            assert_eq!(flow.load, load.fold(Load::default(), Load::plus));
            if let Place::Parked(at) = flow.place {
                assert!(flow.path.contains(&at));
            }
        }
    }

    fn check_tenants(&self) {
        let queue = &self.world.queue;
        for (tenant, _) in &self.tenants {
            let Some(id) = queue.tenants.known(*tenant) else { continue };
            let share = queue.tenants.share(id);
            let own = || queue.flows.iter().enumerate().filter(|(_, flow)| flow.tenant == id);
            assert_eq!(share.waiting, own().map(|(_, flow)| flow.waiters.len() as u64).sum::<u64>());
            assert_eq!(share.in_flight, own().map(|(_, flow)| flow.in_flight).sum::<u32>());
            let backlog: BTreeSet<FlowId> =
                own().filter(|(_, flow)| !flow.waiters.is_empty()).map(|(id, _)| FlowId(id)).collect();
            assert_eq!(share.backlog, backlog);
            let parked_at: BTreeSet<LimitId> = own().filter_map(|(_, flow)| parked_at(flow.place)).collect();
            let lines: BTreeSet<LimitId> = share.lines.iter().copied().collect();
            assert!(lines.len() == share.lines.len() && lines.is_superset(&parked_at), "each line once");
            let known_in = (0..queue.limits.len()).map(LimitId).filter(|at| queue.limits[at.0].line.knows(id));
            assert_eq!(known_in.collect::<BTreeSet<_>>(), lines);
        }
    }

    fn check_limit(&self, at: LimitId) {
        let World { queue, now, .. } = &self.world;
        let limit = &queue.limits[at.0];
        let parked: Vec<FlowId> = (0..queue.flows.len())
            .map(FlowId)
            .filter(|flow| parked_at(queue.flows[flow.0].place) == Some(at))
            .collect();
        self.check_sums(at, &parked);
        let in_line = |flow: &FlowId| limit.line.flows_of(queue.flows[flow.0].tenant).any(|other| other == *flow);
        let (in_line, aside): (Vec<FlowId>, Vec<FlowId>) = parked.iter().copied().partition(in_line);
        self.check_saver(at, &aside);
        let first = in_line.iter().map(|flow| self.head(*flow)).min_by_key(|(head, of_tenant)| {
            // By tenant, and of a tenant whoever came first.
            (limit.line.tag(head.tenant), *of_tenant, head.tenant, head.rank)
        });
        let first = first.map(|(head, _)| head.flow);
        assert_eq!(limit.line.first().map(|head| head.flow), first, "the fair order");
        let need = first.map(|flow| queue.need_of(flow).expect("who is parked waits"));
        let with_room = need.into_iter().chain(limit.saver.map(|saver| saver.need));
        for need in with_room {
            assert!(!limit.has_room(need, *now), "{limit}: a wake-up is lost");
        }
        if !parked.is_empty() {
            let wanted = limit.next_look(need, *now);
            // Halves of what is saved are rounded.
            let by = wanted.map(|at| at + Duration::from_nanos(2));
            assert!(by.is_none_or(|by| limit.timer.is_some_and(|timer| timer <= by)), "looked at in time");
        } else {
            assert_eq!(limit.timer, None, "nobody waits for it");
        }
        self.check_slots(at);
        self.check_pace(at, &parked);
    }

    /// What a lane has learned holds nobody up for ever: its time will come, or somebody is under way whose end will tell.
    fn check_pace(&self, at: LimitId, parked: &[FlowId]) {
        let World { queue, now, .. } = &self.world;
        let limit = &queue.limits[at.0];
        let Measure::Pace(pace) = &limit.measure else { return };
        assert!(parked.is_empty() || limit.timer.is_some() || pace.in_flight() > 0, "{limit}: a wake-up is lost");
        assert!(parked.is_empty() || limit.mode == Mode::Enforce, "who only observes holds nobody up");
        if let Some(timer) = limit.timer {
            let latest = queue.rules.lane.give_up.max(DAY) + DAY;
            assert!(timer <= *now + latest, "{limit}: closed for {:?}", timer - *now);
        }
        if let (Some(slots), Some((_, most))) = (pace.slot_limit(), queue.rules.lane.slots) {
            assert!((1..=most).contains(&slots) || limit.mode == Mode::Observe, "{slots} slots of {most}");
        }
    }

    /// A parked flow, and the rank of the first of its tenant's flows in line at the same limit.
    fn head(&self, flow: FlowId) -> (Head, Rank) {
        let queue = &self.world.queue;
        let rank_of = |flow: FlowId| *queue.flows[flow.0].waiters.first_key_value().expect("who is parked waits").0;
        let head = queue.head(flow, rank_of(flow));
        let at = parked_at(queue.flows[flow.0].place).expect("it is parked");
        let of_tenant = queue.limits[at.0].line.flows_of(head.tenant).map(rank_of).min();
        (head, of_tenant.expect("it stands in line"))
    }

    fn check_sums(&self, at: LimitId, parked: &[FlowId]) {
        let queue = &self.world.queue;
        let line = &queue.limits[at.0].line;
        let mut loads: BTreeMap<TenantId, Load> = BTreeMap::new();
        for flow in parked.iter().map(|flow| &queue.flows[flow.0]) {
            let load = loads.entry(flow.tenant).or_default();
            *load = load.plus(flow.load);
        }
        assert_eq!(line.load(), loads.values().copied().fold(Load::default(), Load::plus));
        let weight = |tenant: TenantId| u64::from(queue.tenants.share(tenant).weight.thousandths());
        let weights: u64 = loads.keys().map(|tenant| weight(*tenant)).sum();
        for (tenant, load) in &loads {
            assert_eq!(line.load_of(*tenant), *load);
            assert_eq!(line.weights_without(*tenant), weights - weight(*tenant));
        }
        assert_eq!(line.is_empty(), parked.is_empty());
        assert!(line.has_begun() != line.is_empty(), "a line that nobody stands in is forgotten");
    }

    /// Only whoever saves, and its model's others, are set aside.
    fn check_saver(&self, at: LimitId, aside: &[FlowId]) {
        let queue = &self.world.queue;
        let Some(saver) = queue.limits[at.0].saver else {
            assert!(aside.is_empty(), "nobody is set aside for ever");
            return;
        };
        assert!(aside.contains(&saver.need.flow), "who saves stands aside");
        assert_eq!(queue.need_of(saver.need.flow).map(|need| need.tokens), Some(saver.need.tokens));
        assert!(aside.iter().all(|flow| queue.flows[flow.0].model == saver.need.model));
    }

    fn check_slots(&self, at: LimitId) {
        let World { queue, grants, .. } = &self.world;
        let in_use = match &queue.limits[at.0].measure {
            Measure::Concurrency(slots) => slots.in_use(),
            Measure::Pace(pace) => pace.in_flight(),
            Measure::Requests(_) | Measure::Tokens(_) => return,
        };
        let holding = grants.values().filter(|grant| {
            let passed = queue.flows[grant.flow.0].way().any(|id| id == at);
            // Who holds others up counts everyone; who observes, those that it would not have refused.
            let limit = &queue.limits[at.0];
            passed && (limit.mode == Mode::Enforce || limit.has_counted(grant.charge, grant.counted))
        });
        let holding = holding.count();
        assert_eq!(in_use as usize, holding);
    }
}

fn parked_at(place: Place) -> Option<LimitId> {
    if let Place::Parked(at) = place { Some(at) } else { None }
}

fn measures(rng: &mut SmallRng, start: Instant) -> Vec<Measure> {
    let mut measures = Vec::new();
    let rates = ["60/min", "5/s", "100/s", "10000/s"];
    if rng.random_bool(0.3) {
        let rate = Rate::parse(rates[rng.random_range(0..3)]).expect("a rate");
        measures.push(Measure::Requests(Bucket::new(rate.with_burst(rng.random_range(1..5)), start)));
    }
    if rng.random_bool(0.4) {
        let rate = Rate::parse(rates[rng.random_range(1..4)]).expect("a rate");
        measures.push(Measure::Tokens(Bucket::of_guesses(rate.with_burst(rng.random_range(10..300)), start)));
    }
    if rng.random_bool(0.4) {
        measures.push(Measure::Concurrency(Slots::new(rng.random_range(1..4))));
    }
    measures
}

fn lane_rules(rng: &mut SmallRng) -> LaneRules {
    let slots = match rng.random_range(0..10) {
        0..3 => Some(rng.random_range(1..5)).map(|slots| (slots, slots)),
        3..7 => Some((rng.random_range(1..5), rng.random_range(1..=20))),
        _ => None,
    };
    let give_up = if rng.random_bool(0.5) { MINUTE } else { Duration::from_secs(rng.random_range(0..10)) };
    LaneRules { slots, give_up }
}

fn signal(rng: &mut SmallRng, temper: Temper) -> Signal {
    let likely = match temper {
        Temper::Kind => 0,
        Temper::Strict => rng.random_range(1..3),
        Temper::Broken => 4,
        Temper::Moody => rng.random_range(0..5),
    };
    let hints = [Duration::ZERO, millis(1), millis(100), millis(700), millis(700), Duration::from_secs(5), MINUTE, DAY];
    let hint = hints[rng.random_range(0..hints.len())];
    match if rng.random_bool(0.9) { likely } else { rng.random_range(0..5) } {
        0 => Signal::Accepted,
        1 => Signal::Refused { hint: None },
        2 => Signal::Refused { hint: Some(hint) },
        3 => Signal::Overloaded { hint },
        _ => Signal::Failed,
    }
}

/// What an answer tells of a quota, if anything: of 60 a minute, or something that makes no sense.
fn quota(rng: &mut SmallRng, telling: Telling) -> Option<Quota> {
    let [limit, remaining] = [0, 0].map(|_| [0, 1, 1000, u64::MAX][rng.random_range(0..4)]);
    let reset = [Duration::ZERO, millis(1), MINUTE, DAY][rng.random_range(0..4)];
    match rng.random_range(0..6) {
        _ if telling == Telling::Nothing => None,
        0..3 => None,
        3 if telling == Telling::Nonsense => Some(Quota { limit, remaining, reset }),
        _ => {
            let remaining = rng.random_range(0..=60);
            Some(Quota { limit: 60, remaining, reset: Duration::from_secs(60 - remaining) })
        }
    }
}

fn mode(rng: &mut SmallRng) -> Mode {
    if rng.random_bool(0.2) { Mode::Observe } else { Mode::Enforce }
}

fn pick<'k>(rng: &mut SmallRng, keys: impl ExactSizeIterator<Item = &'k u64>) -> Option<u64> {
    let count = keys.len();
    (count > 0).then(|| *keys.into_iter().nth(rng.random_range(0..count)).expect("within the count"))
}

#[test]
fn whatever_happens_the_queue_is_as_a_slow_reading_of_its_rules_says() {
    play(&[Telling::Nothing, Telling::Sense]);
}

#[test]
fn so_it_is_when_gateways_tell_of_quotas_that_make_no_sense() {
    play(&[Telling::Nonsense]);
}

fn play(telling: &[Telling]) {
    let seeds = std::env::var("WEIR_MODEL_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(50);
    for (seed, telling) in (0..seeds).zip(telling.iter().cycle()) {
        let mut history = History::new(seed, *telling);
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..400 {
                history.step();
                history.check();
            }
            history.run_dry();
            history.check();
        }));
        assert!(played.is_ok(), "seed {seed}");
    }
}
