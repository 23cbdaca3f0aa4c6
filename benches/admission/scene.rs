//! Queues as they are in service: every kind of limit on, and nobody or ten thousand waiting.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use weir::admission::bucket::Bucket;
use weir::admission::limit::Measure;
use weir::admission::pace::LaneRules;
use weir::admission::queue::{Ask, Grant, Offer, Queue, Rules, Used};
use weir::admission::slots::Slots;
use weir::admission::{Cost, Lane, Rank};
use weir::clients::{Clients, Tenant};
use weir::config::{Config, Mode, Rate, Weight};
use weir::models::{ModelId, Models};

/// What a request is estimated to cost, and what it does cost.
pub const COST: Cost = Cost { prompt: 300, output: 200 };
const USED: Used = Used::Tokens(400);

/// Simulated time between two steps.
const STEP: Duration = Duration::from_micros(100);

/// The default of `queue.max_wait`.
pub const MAX_WAIT: Duration = Duration::from_secs(300);

/// What everyone waits for, once it is used up; all other limits have room.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum HeldUpBy {
    Nothing,
    /// A hundred slots for everyone.
    Slots,
    /// A bucket of tokens for everyone: 2,000 requests a second.
    Tokens,
    /// One slot for each model.
    ModelSlots,
}

/// A queue in simulated time, with `W` as what wakes a waiter.
pub struct Scene<W> {
    pub queue: Queue<W>,
    held_up_by: HeldUpBy,
    tenants: Vec<Tenant>,
    models: Vec<ModelId>,
    now: Instant,
    arrivals: u64,
    /// Who holds a slot, the oldest first.
    grants: VecDeque<Grant>,
}

impl<W> Scene<W> {
    pub fn new(held_up_by: HeldUpBy, tenants: usize, models: usize) -> Self {
        Self::with_room_for(1_000_000, held_up_by, tenants, models)
    }

    /// Where no more than so many may wait.
    pub fn with_room_for(max_waiting: usize, held_up_by: HeldUpBy, tenants: usize, models: usize) -> Self {
        let now = Instant::now();
        let lane = LaneRules { slots: None, give_up: MAX_WAIT };
        let rules = Rules { max_waiting, lane, mode: Mode::Enforce };
        let slots = if held_up_by == HeldUpBy::Slots { 100 } else { 1_000_000 };
        let tokens = if held_up_by == HeldUpBy::Tokens { scarce_tokens() } else { ample("100000000/s") };
        let mut queue = Queue::new(rules, measures(tokens, slots, now));
        let names: Vec<String> = (0..models).map(|n| format!("model-{n}")).collect();
        let known = Models::new(names.iter().map(String::as_str));
        let models: Vec<ModelId> = names.iter().map(|name| known.find(name)).collect();
        let slots = if held_up_by == HeldUpBy::ModelSlots { 1 } else { 1_000_000 };
        for (model, name) in models.iter().zip(&names) {
            let measures = measures(ample("100000000/s"), slots, now);
            queue.limit_model(*model, &name.as_str().into(), Mode::Enforce, measures);
        }
        let clients = clients(tenants, "");
        for id in clients.ids() {
            let measures = measures(ample("100000000/s"), 1_000_000, now);
            queue.limit_client(id, clients.name(id), Mode::Enforce, measures);
        }
        let tenants = clients.ids().map(Tenant::Named).collect();
        Self { queue, held_up_by, tenants, models, now, arrivals: 0, grants: VecDeque::new() }
    }

    /// What the next to arrive asks for: the tenants take turns, and each of them takes the models in turn.
    pub fn next_ask(&mut self) -> Ask {
        let (turn, number) = (self.arrivals as usize, self.arrivals);
        self.arrivals += 1;
        Ask {
            tenant: self.tenants[turn % self.tenants.len()],
            weight: Weight::ONE,
            lane: Lane { credential: 0, model: self.models[turn / self.tenants.len() % self.models.len()] },
            rank: Rank(number),
            cost: COST,
            max_wait: MAX_WAIT,
            until: self.now + MAX_WAIT,
            again: false,
        }
    }

    pub fn offer(&mut self, ask: &Ask) -> Offer {
        self.queue.offer(ask, || Arc::from("model"), self.now)
    }

    /// One decision without a queue: let through, and given back.
    pub fn pass(&mut self) {
        self.now += STEP;
        let ask = self.next_ask();
        let Offer::Admitted(grant) = self.offer(&ask) else { panic!("there is room for everyone") };
        self.release(&grant);
    }

    /// One more arrives, and waits.
    pub fn arrive(&mut self, wake: W) {
        let ask = self.next_ask();
        match self.offer(&ask) {
            Offer::Admitted(grant) => self.grants.push_back(grant),
            Offer::MustWait(opening) => drop(self.queue.enqueue(&opening, &ask, wake, self.now)),
            Offer::Refused(refusal) => panic!("nobody is refused here: {refusal:?}"),
        }
        self.pump();
    }

    /// So many arrive that `waiting` wait.
    pub fn fill(&mut self, waiting: usize, wake: impl Fn() -> W) {
        while self.waiting() < waiting {
            self.arrive(wake());
        }
    }

    pub fn waiting(&self) -> usize {
        self.queue.model_views(self.now).iter().map(|model| model.waiting as usize).sum()
    }

    /// The next one's turn comes: as a slot is given back, or as the bucket refills.
    pub fn admit_next(&mut self) {
        if self.held_up_by == HeldUpBy::Tokens {
            self.now = self.queue.next_timer().expect("somebody waits for the bucket");
            self.pump();
        } else {
            self.now += STEP;
        }
        let grant = self.grants.pop_front().expect("slots are taken");
        self.release(&grant);
    }

    /// One more arrives that would have to wait for too long, or, allowed to wait for long, finds the queue full.
    pub fn refuse(&mut self, max_wait: Duration, wake: W) {
        self.now += STEP / 1000;
        let ask = Ask { max_wait, until: self.now + max_wait, ..self.next_ask() };
        // Now and then time has made room for one.
        if let Offer::MustWait(opening) = self.offer(&ask) {
            drop(self.queue.enqueue(&opening, &ask, wake, self.now));
        }
        self.pump();
    }

    fn release(&mut self, grant: &Grant) {
        self.queue.release(grant, USED, self.now);
        self.pump();
    }

    fn pump(&mut self) {
        let grants = &mut self.grants;
        self.queue.pump(self.now, |_, grant| grants.push_back(grant));
    }
}

/// So many clients, each with these lines of configuration.
pub fn clients(count: usize, lines: &str) -> Clients {
    let tables: String = (0..count).map(|n| format!("[clients.client-{n}]\nkey = \"key-{n}\"\n{lines}")).collect();
    Clients::new(&Config::parse(&tables, &|_| None).expect("a good configuration"))
}

fn measures(tokens: Rate, slots: u32, now: Instant) -> Vec<Measure> {
    let requests = Bucket::new(ample("1000000/s"), now);
    let tokens = Bucket::of_guesses(tokens, now);
    vec![Measure::Requests(requests), Measure::Tokens(tokens), Measure::Concurrency(Slots::new(slots))]
}

fn ample(rate: &str) -> Rate {
    Rate::parse(rate).expect("a rate").with_burst(100_000_000)
}

fn scarce_tokens() -> Rate {
    Rate::parse("1000000/s").expect("a rate").with_burst(1000)
}
