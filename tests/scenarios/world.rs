//! Weir in simulated time: the calls that the proxy makes of its pure cores, in the same order, and the gateway behind them.
//!
//! A discrete-event simulation: the next thing to happen is the first of the heap, of the arrivals, of those whose wait is
//! over, and of the queue's own timer. The clock is the start and an offset, so a run costs what its events cost.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::time::Instant;
use weir::admission::bucket::Bucket;
use weir::admission::limit::Measure;
use weir::admission::pace::LaneRules;
use weir::admission::queue::{Ask, Grant, Offer, Queue, Rules, Ticket, Used};
use weir::admission::slots::Slots;
use weir::admission::{Cost, Echo, Heard, Lane, Rank, Signal};
use weir::clients::Tenant;
use weir::config::{Config, Mode, Rate, Weight};
use weir::models::{ModelId, Models};
use weir::retry::{Ending, Policy, Tries, Verdict};

use super::figures::{Figures, Log};
use super::gateway::{Fate, Gateway, Standing};
use super::load::{self, Job};
use super::oracle;
use super::scenario::{MILLI, Nanos, SECOND, Scenario, Shape, Window};

/// Where an adaptive lane starts and how far it may go, as in the gate.
const LANE_SLOTS: (u32, u32) = (10, 1000);

/// How many refused probes cost a request no retry, and how often it is looked whether the budget allows one, as in the proxy.
const MOST_FREE_PROBES: u32 = 10;
const BUDGET_INTERVAL: Nanos = 500 * MILLI;

/// The gateway's time for what it does not serve.
const QUICK: Nanos = MILLI;

/// A timer rings at a whole millisecond, as tokio's do.
const TICK: Nanos = MILLI;

/// A hint that ends so soon is over: a timer's slack.
const HINT_SLACK: Nanos = 2 * MILLI;

/// Events for each request beyond which a run is taken to go round in circles.
const MOST_EVENTS: u64 = 2000;

/// Runs a scenario to its end.
pub fn run(scenario: &Scenario) -> Figures {
    let jobs = load::jobs(scenario);
    let oracle = oracle::finishes(scenario, &jobs);
    let mut world = World::new(scenario, jobs);
    world.run();
    world.check_the_end();
    Figures::of(world.log, scenario, oracle)
}

/// The queue as the gate makes it from a configuration that says this of the gateway.
fn queue(scenario: &Scenario, start: Instant) -> Queue<u32> {
    let told = scenario.told;
    let slots = told.slots.is_none().then_some(LANE_SLOTS);
    let lane = LaneRules { slots, give_up: Config::default().breaker.give_up };
    let rules = Rules { max_waiting: usize::MAX, lane, mode: Mode::Enforce };
    let requests = told.requests.map(|shape| Measure::Requests(Bucket::new(rate(&shape), start)));
    let tokens = told.tokens.map(|shape| Measure::Tokens(Bucket::of_guesses(rate(&shape), start)));
    let slots = told.slots.map(|slots| Measure::Concurrency(Slots::new(slots)));
    Queue::new(rules, requests.into_iter().chain(tokens).chain(slots).collect())
}

fn rate(shape: &Shape) -> Rate {
    let Window::Bucket { burst } = shape.window else { panic!("weir is told of buckets only") };
    let burst = u32::try_from(burst).expect("a burst that weir can hold");
    Rate { count: shape.count, period: Duration::from_nanos(shape.period), burst }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// An attempt reaches the gateway.
    Reaches(u32),
    /// Its answer's head leaves the gateway.
    HeadLeaves(u32),
    /// Its answer's head, or its failure, is seen by weir.
    Told(u32),
    /// The gateway is done with it.
    Leaves(u32),
    /// Its answer has been read to its end.
    Ends(u32),
    /// Its delay is over.
    AsksAgain(u32),
    /// It looks whether the budget allows a retry.
    Pays(u32),
}

/// A request and how far it has come.
struct Request {
    job: Job,
    /// Attempts that count: all but refused probes.
    counted: u32,
    free_probes: u32,
    attempts: u32,
    timed_out: bool,
    /// How often a fault has hit it.
    struck: u8,
    place: Place,
    /// What its attempt came to, on its way to weir.
    fate: Fate,
    standing: Standing,
    /// The way back that its answer takes.
    way_back: Nanos,
    ends: u32,
}

/// Where weir has it.
enum Place {
    Elsewhere,
    Waiting(Ticket),
    UnderWay(Grant),
}

pub struct World<'s> {
    scenario: &'s Scenario,
    start: Instant,
    now: Nanos,
    queue: Queue<u32>,
    policy: Policy,
    deadline: Duration,
    gateway: Gateway<'s>,
    models: Vec<(ModelId, Arc<str>)>,
    requests: Vec<Request>,
    /// How many have arrived, and how many of these have waited too long or are done: both in the order of arrival.
    arrived: usize,
    expired: usize,
    unfinished: usize,
    under_way: u32,
    waiting: u32,
    events: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    numbered: u64,
    turns: Vec<(u32, Grant)>,
    /// Until when each of weir's lanes was told to wait.
    closed_until: HashMap<(u32, u32), Nanos>,
    dice: SmallRng,
    log: Log,
}

impl<'s> World<'s> {
    fn new(scenario: &'s Scenario, jobs: Vec<Job>) -> Self {
        let start = Instant::now();
        let config = Config::default();
        let names: Vec<String> = (0..scenario.models).map(|number| format!("m{number}")).collect();
        let models = Models::new(names.iter().map(String::as_str));
        Self {
            scenario,
            start,
            now: 0,
            queue: queue(scenario, start),
            policy: Policy::new(&config.retry, start),
            deadline: config.timeouts.deadline,
            gateway: Gateway::new(scenario),
            models: names.iter().map(|name| (models.find(name), Arc::from(name.as_str()))).collect(),
            unfinished: jobs.len(),
            requests: jobs.into_iter().map(Request::new).collect(),
            arrived: 0,
            expired: 0,
            under_way: 0,
            waiting: 0,
            events: BinaryHeap::new(),
            numbered: 0,
            turns: Vec::new(),
            closed_until: HashMap::new(),
            dice: SmallRng::seed_from_u64(scenario.seed ^ 0x3e1d),
            log: Log::default(),
        }
    }

    fn run(&mut self) {
        let most_events = MOST_EVENTS * (self.requests.len() as u64 + 100);
        while self.unfinished > 0 {
            let Some((at, next)) = self.next() else {
                let (unfinished, now) = (self.unfinished, self.now / SECOND);
                return self.log.violate(|| format!("{unfinished} wait for nothing at {now} s"));
            };
            self.log.events += 1;
            if self.log.events > most_events {
                let now = self.now / SECOND;
                return self.log.violate(|| format!("it goes round in circles at {now} s"));
            }
            self.now = at.max(self.now);
            if self.log.is_new_slice(self.now) {
                self.end_slice();
                self.log.begin_slice(self.now);
            }
            self.happen(next);
        }
        // What the gateway still does for those who have left it.
        self.end_slice();
    }

    /// What happens next, and when.
    fn next(&self) -> Option<(Nanos, Next)> {
        let event = self.events.peek().map(|Reverse((at, _, _))| (*at, Next::Event));
        let arrival = self.requests.get(self.arrived).map(|request| (request.job.arrives, Next::Arrival));
        let timer = self.queue.next_timer().map(|at| (self.tick_after(at), Next::Timer));
        let expiry = self.requests[..self.arrived].get(self.expired);
        let expiry = expiry.map(|request| (request.job.arrives + self.scenario.max_wait, Next::Expiry));
        // Of two at the same time the first of these.
        [timer, event, arrival, expiry].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn happen(&mut self, next: Next) {
        match next {
            Next::Event => {
                let Reverse((_, _, event)) = self.events.pop().expect("it was peeked at");
                match event {
                    Event::Reaches(id) => self.reach(id),
                    Event::HeadLeaves(id) => self.head_leaves(id),
                    Event::Told(id) => self.hear(id),
                    Event::Leaves(id) => self.leave(id),
                    Event::Ends(id) => self.end(id),
                    Event::AsksAgain(id) => self.ask(id),
                    Event::Pays(id) => self.pay(id),
                }
            }
            Next::Arrival => {
                self.arrived += 1;
                self.ask((self.arrived - 1) as u32);
            }
            Next::Timer => self.pump(),
            Next::Expiry => {
                self.expired += 1;
                self.expire((self.expired - 1) as u32);
            }
        }
    }

    /// A request asks for its turn, for the first time or again.
    fn ask(&mut self, id: u32) {
        let (ask, now) = (self.ask_of(id), self.instant());
        let model = self.requests[id as usize].job.model as usize;
        let names = &self.models;
        match self.queue.offer(&ask, || names[model].1.clone(), now) {
            Offer::Admitted(grant) => _ = self.send(id, grant),
            Offer::Refused(_) => self.fail(id),
            Offer::MustWait(opening) => {
                let (ticket, displaced) = self.queue.enqueue(&opening, &ask, id, now);
                self.requests[id as usize].place = Place::Waiting(ticket);
                self.waiting += 1;
                if let Some((other, _)) = displaced {
                    self.waiting -= 1;
                    self.requests[other as usize].place = Place::Elsewhere;
                    self.fail(other);
                }
            }
        }
        self.pump();
    }

    fn ask_of(&self, id: u32) -> Ask {
        let Request { job, attempts, .. } = &self.requests[id as usize];
        let credential = u64::from(job.key) + 1;
        let estimate = |tokens: u64| (tokens as f64 * self.scenario.estimate) as u64;
        Ask {
            tenant: Tenant::Key(credential),
            weight: Weight::ONE,
            lane: Lane { credential, model: self.models[job.model as usize].0 },
            rank: Rank(u64::from(id)),
            cost: Cost { prompt: estimate(job.prompt), output: estimate(job.charge(self.scenario) - job.prompt) },
            max_wait: Duration::from_nanos(self.scenario.max_wait),
            until: self.start + Duration::from_nanos(job.arrives + self.scenario.max_wait),
            again: *attempts > 0,
        }
    }

    /// Lets through whoever can go.
    fn pump(&mut self) {
        let now = self.instant();
        let mut turns = std::mem::take(&mut self.turns);
        self.queue.pump(now, |id, grant| turns.push((id, grant)));
        let mut all_sent = true;
        for (id, grant) in turns.drain(..) {
            self.waiting -= 1;
            all_sent &= self.send(id, grant);
        }
        self.turns = turns;
        if !all_sent {
            self.pump();
        }
        for (id, _) in self.queue.turned_away() {
            self.waiting -= 1;
            self.requests[id as usize].place = Place::Elsewhere;
            self.fail(id);
        }
    }

    /// Sends an attempt; `false` where it is a retry for which the budget has nothing left, and the grant goes back.
    fn send(&mut self, id: u32, grant: Grant) -> bool {
        if self.requests[id as usize].attempts > 0 {
            if !self.policy.pay(self.instant()) {
                self.queue.release(&grant, Used::Unsent, self.instant());
                self.requests[id as usize].place = Place::Elsewhere;
                self.schedule(self.now + BUDGET_INTERVAL, Event::Pays(id));
                return false;
            }
            self.log.retries.push(self.now);
        }
        let (now, instant, to) = (self.now, self.instant(), self.way());
        let request = &mut self.requests[id as usize];
        request.attempts += 1;
        if request.attempts == 1 {
            self.policy.first_attempt(instant);
            self.log.firsts.push(now);
        }
        request.place = Place::UnderWay(grant);
        self.under_way += 1;
        let told = self.closed_until.get(&request.lane()).copied().unwrap_or_default();
        self.log.early += u64::from(told > now + HINT_SLACK);
        self.log.slice().sent += 1;
        self.schedule(now + to, Event::Reaches(id));
        true
    }

    fn reach(&mut self, id: u32) {
        let (now, way_back) = (self.now, self.way());
        let Request { job, struck, .. } = self.requests[id as usize];
        let lane = self.gateway.lane(job.key, job.model);
        let fate = self.gateway.receive(lane, job.charge(self.scenario), struck, now);
        self.log.reached.push(now);
        if self.scenario.outage.is_some_and(|outage| outage.to <= now) {
            let at_once = self.gateway.in_flight(lane) + u32::from(fate != Fate::Accepted);
            self.log.most_at_once = self.log.most_at_once.max(at_once);
        }
        let answered_after = match fate {
            Fate::Accepted | Fate::ErrorFirst => job.answer,
            Fate::Reset => job.answer / 2,
            Fate::Refused { .. } | Fate::Error { .. } | Fate::ConnectionRefused => QUICK,
            Fate::Hangs => self.scenario.timeout,
        };
        if fate == Fate::Accepted {
            self.log.accepted.push(now);
            self.log.slice().accepted += 1;
            self.schedule(now + job.answer + job.body, Event::Leaves(id));
        }
        let standing = self.standing(lane, fate);
        let request = &mut self.requests[id as usize];
        (request.fate, request.standing, request.way_back) = (fate, standing, way_back);
        request.struck += u8::from(matches!(fate, Fate::Reset | Fate::ErrorFirst | Fate::Error { .. }));
        if self.scenario.standing_at_answer && matches!(fate, Fate::Accepted | Fate::ErrorFirst) {
            self.schedule(now + answered_after, Event::HeadLeaves(id));
        } else {
            self.schedule(now + answered_after + way_back, Event::Told(id));
        }
    }

    fn head_leaves(&mut self, id: u32) {
        let Request { job, fate, way_back, .. } = self.requests[id as usize];
        let lane = self.gateway.lane(job.key, job.model);
        self.requests[id as usize].standing = self.standing(lane, fate);
        self.schedule(self.now + way_back, Event::Told(id));
    }

    fn standing(&mut self, lane: usize, fate: Fate) -> Standing {
        match fate {
            Fate::Accepted | Fate::ErrorFirst | Fate::Refused { .. } => self.gateway.standing(lane, self.now),
            Fate::Error { .. } | Fate::ConnectionRefused | Fate::Hangs | Fate::Reset => [None; 2],
        }
    }

    fn leave(&mut self, id: u32) {
        let Job { key, model, .. } = self.requests[id as usize].job;
        self.gateway.finish(self.gateway.lane(key, model));
    }

    /// An answer's head is there, or it is clear that there will be none.
    fn hear(&mut self, id: u32) {
        let now = self.instant();
        let Request { fate, standing: [requests, tokens], job, ref place, .. } = self.requests[id as usize];
        let Place::UnderWay(grant) = place else { unreachable!("an attempt is under way until it has ended") };
        let signal = signal_of(fate);
        let echo = self.queue.hear(grant, &Heard { signal, requests, tokens }, now);
        if let Signal::Refused { hint: Some(hint) } | Signal::Overloaded { hint } = signal {
            let until = self.closed_until.entry(self.requests[id as usize].lane()).or_default();
            *until = (*until).max(self.now + hint.as_nanos() as Nanos);
        }
        self.pump();
        match fate {
            Fate::Accepted if job.body == 0 => self.end(id),
            // Its last byte is as long under way as its first.
            Fate::Accepted => self.schedule(self.now + job.body, Event::Ends(id)),
            _ => self.judge(id, echo),
        }
    }

    /// An answer has been read to its end.
    fn end(&mut self, id: u32) {
        let Job { prompt, output, .. } = self.requests[id as usize].job;
        self.log.slice().ended += 1;
        self.finish(id);
        self.release(id, Used::Tokens(prompt + output));
    }

    /// An attempt has failed.
    fn judge(&mut self, id: u32, echo: Echo) {
        let request = &mut self.requests[id as usize];
        let (ending, fate) = (ending_of(request.fate), request.fate);
        let Place::UnderWay(grant) = &request.place else { unreachable!("an attempt is under way until it has ended") };
        let (cost, refused) = (grant.cost(), matches!(fate, Fate::Refused { .. }));
        let probe = echo.was_for_others && request.free_probes < MOST_FREE_PROBES;
        match probe {
            true => request.free_probes += 1,
            false => request.counted += 1,
        }
        let tries = Tries {
            retries: request.counted.saturating_sub(1),
            by_client: 0,
            timed_out: request.timed_out,
            repeatable: true,
            probe,
        };
        request.timed_out |= ending == Ending::TimedOut;
        let patience = self.deadline.saturating_sub(Duration::from_nanos(self.now - request.job.arrives));
        let verdict = self.policy.judge(ending, tries, patience, &mut self.dice);
        let is_again = matches!(verdict, Verdict::Again { .. });
        self.log.count_failure(refused);
        let used = match fate {
            // The gateway's quota is behind weir's.
            Fate::Refused { .. } if is_again => Used::Tokens(cost.tokens()),
            Fate::ConnectionRefused => Used::Unsent,
            Fate::Reset | Fate::Hangs => Used::Tokens(cost.prompt),
            _ => Used::Refused,
        };
        self.release(id, used);
        match verdict {
            Verdict::Again { delay } => {
                // Where the lane waits for the gateway, it stands in line at once.
                let delay = if echo.lane_waits { 0 } else { delay.as_nanos() as Nanos };
                self.schedule(self.now + delay, Event::Pays(id));
            }
            Verdict::Final | Verdict::GiveUp => self.fail(id),
        }
    }

    /// It waits for the budget of retries.
    fn pay(&mut self, id: u32) {
        let at = if self.policy.allows_retry(self.instant()) { self.now } else { self.now + BUDGET_INTERVAL };
        let event = if at == self.now { Event::AsksAgain(id) } else { Event::Pays(id) };
        self.schedule(at, event);
    }

    fn release(&mut self, id: u32, used: Used) {
        let place = std::mem::replace(&mut self.requests[id as usize].place, Place::Elsewhere);
        let Place::UnderWay(grant) = place else { unreachable!("only what is under way is released") };
        self.under_way -= 1;
        self.queue.release(&grant, used, self.instant());
        self.pump();
    }

    /// Its time is over; one who waits no longer is not concerned.
    fn expire(&mut self, id: u32) {
        self.pump();
        let Place::Waiting(ticket) = self.requests[id as usize].place else { return };
        if self.queue.expire(ticket, self.instant()).is_some() {
            self.waiting -= 1;
            self.requests[id as usize].place = Place::Elsewhere;
            self.fail(id);
        }
        self.pump();
    }

    /// Its client sees an error.
    fn fail(&mut self, id: u32) {
        self.log.errors += 1;
        self.finish(id);
    }

    fn finish(&mut self, id: u32) {
        let request = &mut self.requests[id as usize];
        request.ends += 1;
        if request.ends > 1 {
            return self.log.violate(|| format!("request {id} ends twice"));
        }
        self.unfinished -= 1;
        self.log.ended.push(self.now);
    }

    fn end_slice(&mut self) {
        if self.log.slices.is_empty() {
            return;
        }
        let models = self.queue.model_views(self.instant());
        let of_lanes =
            models.iter().filter_map(|model| Some(model.slots? * model.lanes)).reduce(|all, slots| all + slots);
        let slots = self.scenario.told.slots.or(of_lanes);
        let (in_flight, waiting) = (self.under_way, self.waiting);
        let left = self.gateway.left(0, self.now);
        let slice = self.log.slice();
        (slice.in_flight, slice.waiting, slice.slots, slice.left) = (in_flight, waiting, slots, left);
    }

    fn check_the_end(&mut self) {
        let now = self.instant();
        let Self { queue, log, requests, .. } = self;
        let left = requests.iter().filter(|request| request.ends != 1).count();
        if left > 0 {
            log.violate(|| format!("{left} requests have not ended exactly once"));
        }
        for model in queue.model_views(now).iter().filter(|model| (model.in_flight, model.waiting) != (0, 0)) {
            let (under_way, waiting) = (model.in_flight, model.waiting);
            log.violate(|| format!("a model has {under_way} under way and {waiting} waiting at the end"));
        }
        let slots = |limit: &weir::admission::limit::Limit| match &limit.measure {
            Measure::Concurrency(slots) => slots.in_use(),
            Measure::Pace(pace) => pace.in_flight(),
            Measure::Requests(_) | Measure::Tokens(_) => 0,
        };
        let in_use: u32 = queue.limits().map(slots).sum();
        if in_use > 0 || queue.reserved_tokens() > 0 {
            log.violate(|| format!("{in_use} slots and {} tokens are held at the end", queue.reserved_tokens()));
        }
    }

    fn schedule(&mut self, at: Nanos, event: Event) {
        self.numbered += 1;
        self.events.push(Reverse((at, self.numbered, event)));
    }

    fn way(&mut self) -> Nanos {
        let (least, most) = self.scenario.network;
        self.dice.random_range(least..=most)
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_nanos(self.now)
    }

    /// When a timer rings that is set to this moment.
    fn tick_after(&self, at: Instant) -> Nanos {
        (at.saturating_duration_since(self.start).as_nanos() as Nanos).div_ceil(TICK) * TICK
    }
}

/// Where the next thing to happen comes from.
#[derive(Debug, Clone, Copy)]
enum Next {
    Timer,
    Event,
    Arrival,
    Expiry,
}

impl Request {
    fn new(job: Job) -> Self {
        Self {
            job,
            counted: 0,
            free_probes: 0,
            attempts: 0,
            timed_out: false,
            struck: 0,
            place: Place::Elsewhere,
            fate: Fate::Accepted,
            standing: [None; 2],
            way_back: 0,
            ends: 0,
        }
    }

    /// Weir's lane.
    fn lane(&self) -> (u32, u32) {
        (self.job.key, self.job.model)
    }
}

fn signal_of(fate: Fate) -> Signal {
    match fate {
        Fate::Accepted => Signal::Accepted,
        Fate::Refused { hint } => Signal::Refused { hint: hint.map(Duration::from_nanos) },
        Fate::Error { hint: Some(hint) } => Signal::Overloaded { hint: Duration::from_nanos(hint) },
        Fate::Error { hint: None } | Fate::ConnectionRefused | Fate::Hangs | Fate::Reset | Fate::ErrorFirst => {
            Signal::Failed
        }
    }
}

fn ending_of(fate: Fate) -> Ending {
    let answer = |status, hint: Option<Nanos>| Ending::Answer {
        status,
        hopeless: false,
        should_retry: None,
        hint: hint.map(Duration::from_nanos),
    };
    match fate {
        Fate::Accepted => answer(StatusCode::OK, None),
        Fate::Refused { hint } => answer(StatusCode::TOO_MANY_REQUESTS, hint),
        Fate::Error { hint } => answer(StatusCode::SERVICE_UNAVAILABLE, hint),
        Fate::ConnectionRefused => Ending::ConnectFailed,
        Fate::Hangs => Ending::TimedOut,
        Fate::Reset => Ending::Broken,
        Fate::ErrorFirst => Ending::ErrorEvent,
    }
}
