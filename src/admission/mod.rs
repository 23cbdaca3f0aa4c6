//! Admission: may a request go, and when?
//!
//! A request asks the [`Gate`] and gets a [`Permit`], at once or after waiting its turn, or a refusal that says when to come
//! back. The permit holds a slot of every semaphore on the request's way, and the tokens that it is estimated to cost, until
//! it is dropped, wherever that happens; then the tokens are settled to what the answer did cost.
//!
//! The deciding parts ([`queue`], [`fair`], [`bucket`], [`slots`], [`estimate`]) are pure and driven by a given `now`. This
//! file gives them a lock, a clock and a way to wake a waiter. Nobody polls: a waiter sleeps until it is handed its permit,
//! and one task sleeps until the next bucket refills.

pub mod bucket;
pub mod bytes;
pub mod estimate;
pub mod fair;
mod ids;
pub mod limit;
pub mod line;
pub mod pace;
pub mod promise;
pub mod queue;
pub mod refusal;
pub mod slack;
pub mod slots;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::clients::{ClientId, Clients, Tenant};
use crate::config::{Concurrency, Config, LimitTable, Mode, Weight};
use crate::error::Cause;
use crate::metrics::{LimitGauge, ModelGauges};
use crate::models::{ModelId, Models};
use crate::openai::headers::Quota;
use crate::openai::usage::Usage;

use bucket::Bucket;
use estimate::Learned;
use limit::{Limit, Measure};
use pace::LaneRules;
use queue::{Ask, Grant, NewLimits, Offer, Queue, Rules, Table, Ticket, Used};
use slots::Slots;

pub use bytes::{ByteBudget, HeldBytes, NoRoom};
pub use estimate::{Cost, Size};
pub use limit::{Rank, Scope, some_requests};
pub use pace::{Heard, Signal};
pub use pace::{Hold, PaceView, SlotsView, ToldView, Why};
pub use queue::{Echo, Lane, LaneView, Level, LimitView, ModelView, Newcomer, Outlook, Survey, Waiting, Who};
pub use refusal::Refusal;

/// Where an adaptive lane starts, and how far it may go.
const LANE_SLOTS: (u32, u32) = (10, 1000);

/// A request, as admission sees it: the same for each of its attempts.
#[derive(Debug, Clone)]
pub struct Applicant {
    /// Who gets a share of its own.
    pub tenant: Tenant,
    pub weight: Weight,
    pub lane: Lane,
    /// Its place in the order of arrival, from [`Gate::next_rank`].
    pub rank: Rank,
    /// What it is estimated to cost, and from what; `None` for a call that costs no tokens.
    pub size: Option<Size>,
    pub cost: Cost,
    /// How long such a request may wait.
    pub max_wait: Duration,
    /// When this one has waited long enough.
    pub until: Instant,
}

/// How the limits stand that a client's requests have to pass: of each unit the tightest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    pub requests: Option<Quota>,
    pub tokens: Option<Quota>,
}

/// What wakes a waiter: its permit, or that another took its place in a full queue.
type Turn = Result<Permit, Refusal>;

/// Every limit, and everyone who waits for one. There is one gate, shared by all, whatever configuration comes.
pub struct Gate {
    /// Guards the whole state of admission. Held for a decision, never across an await.
    queue: Mutex<Queue<oneshot::Sender<Turn>>>,
    /// What was learned about each model, by [`ModelId::index`]. Locked for a look or an update.
    learned: Mutex<Vec<Learned>>,
    /// Tells the timekeeper that the next refill to wait for has changed.
    retime: Arc<Notify>,
    ranks: AtomicU64,
    models: Arc<Models>,
    /// Locked for a look while the queue is, when a model is seen for the first time, and for a reload.
    tables: Mutex<ModelTables>,
    /// Whether any limit is a quota of which clients are told how it stands.
    has_quotas: AtomicBool,
    /// To put into permits.
    me: Weak<Gate>,
}

/// The limits of models, by name.
struct ModelTables {
    /// The configuration's `[models]`.
    by_name: BTreeMap<String, LimitTable>,
    replicas: u32,
}

/// The right to send one request to the gateway. Dropping it gives back its slots, and settles its tokens: to nothing, with
/// the request's cells, before [`Permit::spend`]; after that to what [`Permit::answered`], [`Permit::used`] or
/// [`Permit::refused`] say, or, where nobody said anything, to the prompt's estimate: the gateway may have read it.
pub struct Permit {
    gate: Arc<Gate>,
    grant: Box<Grant>,
    /// What its estimate was made from, and for which model.
    estimated: Option<(ModelId, Size)>,
    /// How often the gateway may have seen the request.
    written: u32,
    /// What it came to, as far as that is known.
    used: Used,
}

impl Gate {
    /// Opens a gate with the limits of the configuration, and starts the task that lets waiters through when a bucket
    /// refills. The task ends with the gate.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(config: &Config, models: Arc<Models>, clients: &Clients) -> Arc<Self> {
        let (now, replicas) = (Instant::now(), config.limits.replicas);
        let mut queue = Queue::new(rules(config), measures(&global_table(config), replicas, now));
        for client in clients.ids() {
            let own = clients.limits(client);
            queue.limit_client(client, clients.name(client), own.mode, measures(own, replicas, now));
        }
        let gate = Arc::new_cyclic(|me| Self {
            queue: Mutex::new(queue),
            learned: Mutex::default(),
            retime: Arc::new(Notify::new()),
            ranks: AtomicU64::new(0),
            models,
            tables: Mutex::new(ModelTables::of(config)),
            has_quotas: AtomicBool::new(has_quotas(config)),
            me: me.clone(),
        });
        tokio::spawn(keep_time(Arc::downgrade(&gate), gate.retime.clone()));
        gate
    }

    /// Puts the limits of another configuration in force, for those too who wait or are under way ([`Queue::reload`]).
    pub fn reload(&self, config: &Config, clients: &Clients) {
        let replicas = config.limits.replicas;
        self.change(|queue, now| {
            *self.tables() = ModelTables::of(config);
            let of_model = |model: ModelId| {
                let name = self.models.name(model);
                let (mode, measures) = self.measures_of(model, &name, now);
                (model, Table { name, mode, measures })
            };
            let of_client = |client: ClientId| {
                let own = clients.limits(client);
                let measures = measures(own, replicas, now);
                let table = Table { name: clients.name(client).clone(), mode: own.mode, measures };
                (client, clients.weight(client), table)
            };
            let models = queue.models().into_iter().map(of_model).collect();
            let global = measures(&global_table(config), replicas, now);
            let clients = clients.ids().map(of_client).collect();
            queue.reload(NewLimits { rules: rules(config), global, models, clients }, now);
            self.has_quotas.store(has_quotas(config), Ordering::Relaxed);
        });
    }

    /// The next place in the order of arrival.
    pub fn next_rank(&self) -> Rank {
        Rank(self.ranks.fetch_add(1, Ordering::Relaxed))
    }

    /// What a request of that size to that model will cost, and how long the first byte of its answer usually takes.
    pub fn estimate(&self, model: ModelId, size: Size, stream: bool) -> (Cost, Duration) {
        self.learned(model, |learned| (learned.estimate(size), learned.usual_first_byte(stream)))
    }

    /// The first byte of an answer came so long after its request was sent.
    pub fn learn_first_byte(&self, model: ModelId, stream: bool, after: Duration) {
        self.learned(model, |learned| learned.saw_first_byte(stream, after));
    }

    /// Waits until the request may be sent. `again` says that this is not its first attempt.
    ///
    /// Dropping the future gives the place in the queue up, and the permit if it was just handed over.
    ///
    /// # Errors
    /// The [`Refusal`]: on arrival where no waiting can help, when `until` has come, or when the queue is full and another
    /// tenant, which has less of it, needs the place.
    pub async fn admit(&self, who: &Applicant, again: bool) -> Result<Permit, Refusal> {
        let mut permit = self.wait_for_turn(who, again).await?;
        permit.estimated = who.size.map(|size| (who.lane.model, size));
        Ok(permit)
    }

    async fn wait_for_turn(&self, who: &Applicant, again: bool) -> Turn {
        let (ticket, mut turn) = match self.offer_or_enqueue(&who.ask(again))? {
            Place::Permit(permit) => return Ok(permit),
            Place::Waiting(ticket, turn) => (ticket, turn),
        };
        let since = Instant::now();
        // Given up at the await below, the guard takes the ticket out of the queue; a permit already in the channel
        // is dropped with it, and gives its slots back like any other.
        let mut place = PlaceInQueue { gate: self, ticket: Some(ticket) };
        tokio::select! {
            biased;
            turn = &mut turn => {
                place.ticket = None;
                turn.unwrap_or_else(|_| Err(Refusal::draining()))
            }
            () = tokio::time::sleep_until(who.until) => {
                place.ticket = None;
                // A bucket may refill at this very moment; the waiter whose cell that is gets it.
                self.change(|_, _| ());
                match self.change(|queue, now| queue.expire(ticket, now)) {
                    Some(refusal) => Err(Refusal { waited: Some(since.elapsed()), ..refusal }),
                    None => turn.await.unwrap_or_else(|_| Err(Refusal::draining())),
                }
            }
        }
    }

    /// How the quotas stand that such a request has to pass; nothing where there are none.
    pub fn standing(&self, who: &Applicant) -> Standing {
        let mut standing = Standing::default();
        if !self.has_quotas.load(Ordering::Relaxed) {
            return standing;
        }
        let now = Instant::now();
        for limit in self.lock().limits_on_the_way(who.tenant, who.lane) {
            let (tightest, bucket) = match &limit.measure {
                Measure::Requests(bucket) => (&mut standing.requests, bucket),
                Measure::Tokens(bucket) => (&mut standing.tokens, bucket),
                Measure::Concurrency(_) | Measure::Pace(_) => continue,
            };
            let (remaining, reset) = bucket.standing(now);
            let quota = Quota { limit: bucket.rate().count, remaining: remaining.into(), reset };
            if tightest.is_none_or(|other| (quota.remaining, quota.limit) < (other.remaining, other.limit)) {
                *tightest = Some(quota);
            }
        }
        standing
    }

    /// Whether the gateway has failed so long that nobody is to wait for it in this lane.
    pub fn has_given_up(&self, who: &Applicant) -> bool {
        self.lock().has_given_up(who.tenant, who.lane, Instant::now())
    }

    /// Refuses everyone who waits, and everyone who comes from now on.
    pub fn close(&self) {
        drop(self.change(Queue::close));
    }

    /// How each model stands, its lanes added up.
    pub fn model_gauges(&self) -> Vec<ModelGauges> {
        let models = self.lock().model_views(Instant::now());
        models.into_iter().map(|model| self.gauges_of(&model)).collect()
    }

    fn gauges_of(&self, view: &ModelView) -> ModelGauges {
        let pace = &view.busiest;
        ModelGauges {
            model: self.models.name(view.model),
            in_flight: view.in_flight,
            waiting: view.waiting,
            learned_waiting: view.held,
            concurrency_limit: view.slots,
            cooldown: view.cooldown,
            breaker_open: view.broken_lanes > 0,
            told_requests_per_second: pace.requests.and_then(|told| told.per_second),
            inferred_requests_per_second: pace.inferred_per_second,
            told_tokens_per_second: pace.tokens.and_then(|told| told.per_second),
        }
    }

    /// How everything stands: who waits for what, and whose limit it is. Locked for as long as it takes to go through lanes
    /// and limits, however many wait.
    pub fn survey(&self, clients: &Clients) -> Survey {
        self.lock().survey(clients.present_and_gone(), Instant::now())
    }

    /// What awaits a request that might come.
    pub fn outlook(&self, newcomer: &Newcomer) -> Outlook {
        let model = newcomer.lane.model;
        let name = self.models.name(model);
        let mut queue = self.lock();
        let now = Instant::now();
        if !queue.knows(model) {
            let (mode, measures) = self.measures_of(model, &name, now);
            queue.limit_model(model, &name, mode, measures);
        }
        queue.outlook(newcomer, now)
    }

    /// The limits of the configuration and what is left of them.
    pub fn limit_gauges(&self) -> Vec<LimitGauge> {
        let now = Instant::now();
        self.lock().limits().filter_map(|limit| gauge_of(limit, now)).collect()
    }

    /// What requests under way are estimated to cost, until they are settled.
    pub fn reserved_tokens(&self) -> u64 {
        self.lock().reserved_tokens()
    }

    fn offer_or_enqueue(&self, ask: &Ask) -> Result<Place, Refusal> {
        let model = ask.lane.model;
        let name = || self.models.name(model);
        let mut displaced = None;
        let place = self.change(|queue, now| {
            if !queue.knows(model) {
                let (mode, measures) = self.measures_of(model, &name(), now);
                queue.limit_model(model, &name(), mode, measures);
            }
            match queue.offer(ask, name, now) {
                Offer::Admitted(grant) => Ok(Err(grant)),
                Offer::Refused(refusal) => Err(refusal),
                Offer::MustWait(opening) => {
                    let (wake, turn) = oneshot::channel();
                    let (ticket, other) = queue.enqueue(&opening, ask, wake, now);
                    displaced = other;
                    Ok(Ok((ticket, turn)))
                }
            }
        })?;
        if let Some((wake, refusal)) = displaced {
            // A waiter that is gone needs no refusal.
            let _ = wake.send(Err(refusal));
        }
        Ok(match place {
            Ok((ticket, turn)) => Place::Waiting(ticket, turn),
            Err(grant) => Place::Permit(self.permit(grant)),
        })
    }

    fn measures_of(&self, model: ModelId, name: &str, now: Instant) -> (Mode, Vec<Measure>) {
        let tables = self.tables();
        // A call that names no model is no model's.
        let named = || tables.by_name.get(name).or_else(|| tables.by_name.get("*"));
        let limits = if model == ModelId::NONE { None } else { named() };
        limits.map_or((Mode::Enforce, Vec::new()), |limits| (limits.mode, measures(limits, tables.replicas, now)))
    }

    /// Changes the queue, lets through whoever can go after that, and wakes them once the lock is free.
    fn change<T>(&self, change: impl FnOnce(&mut Queue<oneshot::Sender<Turn>>, Instant) -> T) -> T {
        let mut turns = Vec::new();
        let mut queue = self.lock();
        // Not before: with several workers the queue would see time go back.
        let now = Instant::now();
        let before = queue.next_timer();
        let answer = change(&mut queue, now);
        queue.pump(now, |wake, grant| turns.push((wake, grant)));
        let turned_away = queue.turned_away();
        let sooner = queue.next_timer().is_some_and(|next| before.is_none_or(|before| next < before));
        drop(queue);
        if sooner {
            self.retime.notify_one();
        }
        for (wake, grant) in turns {
            // A waiter that is gone gives the permit back by dropping it.
            let _ = wake.send(Ok(self.permit(grant)));
        }
        for (wake, refusal) in turned_away {
            let _ = wake.send(Err(refusal));
        }
        answer
    }

    fn permit(&self, grant: Grant) -> Permit {
        let gate = self.me.upgrade().expect("a gate that is asked is alive");
        let used = Used::Tokens(grant.cost().prompt);
        Permit { gate, grant: Box::new(grant), estimated: None, written: 0, used }
    }

    fn learned<T>(&self, model: ModelId, look: impl FnOnce(&mut Learned) -> T) -> T {
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        if learned.len() <= model.index() {
            learned.resize_with(model.index() + 1, Learned::default);
        }
        look(&mut learned[model.index()])
    }

    fn tables(&self) -> MutexGuard<'_, ModelTables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Queue<oneshot::Sender<Turn>>> {
        // A panic while deciding is a broken invariant; the state is still the best there is.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ModelTables {
    fn of(config: &Config) -> Self {
        Self { by_name: config.models.clone(), replicas: config.limits.replicas }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.retime.notify_one();
    }
}

impl Applicant {
    fn ask(&self, again: bool) -> Ask {
        let Self { tenant, weight, lane, rank, size: _, cost, max_wait, until } = *self;
        Ask { tenant, weight, lane, rank, cost, max_wait, until, again }
    }
}

impl Permit {
    /// The request is about to be written: from here on it counts against the quota. Written once more (a pooled
    /// connection turned out to be closed), it counts again, as debt: the next in line waits for it.
    pub fn spend(&mut self) {
        self.written += 1;
        if self.written > 1 {
            self.gate.change(|queue, now| queue.charge_again(&self.grant, now));
        }
    }

    /// After all, nothing was written this time.
    pub fn was_not_written(&mut self) {
        self.written = self.written.saturating_sub(1);
    }

    /// What became of the attempt, and what follows from it.
    pub fn hear(&self, heard: &Heard) -> Echo {
        self.gate.change(|queue, now| queue.hear(&self.grant, heard, now))
    }

    /// What the request was estimated to cost.
    pub fn cost(&self) -> Cost {
        self.grant.cost()
    }

    /// The gateway told what its answer cost; the next estimate is better for it.
    pub fn answered(&mut self, usage: Usage) {
        self.used(usage.quota());
        if let Some((model, size)) = self.estimated {
            self.gate.learned(model, |learned| learned.learn(size, usage));
        }
    }

    /// The gateway answered with an error: no tokens were used.
    pub fn refused(&mut self) {
        self.used = Used::Refused;
    }

    /// So many tokens were used; more than [`estimate::MOST`] are not believed, since they would close the gate for ages.
    pub fn used(&mut self, tokens: u64) {
        self.used = Used::Tokens(tokens.min(estimate::MOST));
    }

    /// Why the limits in observe mode would have refused this request, each reason once.
    pub fn would_refuse(&self) -> &[Cause] {
        &self.grant.would_refuse
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let used = if self.written > 0 { self.used } else { Used::Unsent };
        self.gate.change(|queue, now| queue.release(&self.grant, used, now));
    }
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Permit").field("grant", &self.grant).field("written", &self.written).finish_non_exhaustive()
    }
}

/// What a request that was not refused has.
enum Place {
    Permit(Permit),
    Waiting(Ticket, oneshot::Receiver<Turn>),
}

/// A waiter's place, given up when dropped.
struct PlaceInQueue<'g> {
    gate: &'g Gate,
    ticket: Option<Ticket>,
}

impl Drop for PlaceInQueue<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.gate.change(|queue, now| queue.leave(ticket, now));
        }
    }
}

/// Lets waiters through whenever a bucket has refilled, until the gate is gone.
async fn keep_time(gate: Weak<Gate>, retime: Arc<Notify>) {
    loop {
        let next = match gate.upgrade() {
            Some(gate) => {
                gate.change(|_, _| ());
                gate.lock().next_timer()
            }
            None => return,
        };
        match next {
            Some(at) => tokio::select! {
                biased;
                () = tokio::time::sleep_until(at) => {}
                () = retime.notified() => {}
            },
            None => retime.notified().await,
        }
    }
}

/// What holds for the queue as a whole.
fn rules(config: &Config) -> Rules {
    let replicas = config.limits.replicas;
    let slots = match config.limits.concurrency {
        Concurrency::Adaptive => Some((share(LANE_SLOTS.0, replicas), share(LANE_SLOTS.1, replicas))),
        Concurrency::Fixed(_) => None,
    };
    let lane = LaneRules { slots, give_up: config.breaker.give_up };
    Rules { max_waiting: config.queue.max_waiting as usize, lane, mode: config.limits.mode }
}

/// Everyone's limits.
fn global_table(config: &Config) -> LimitTable {
    let limits = &config.limits;
    let concurrency = match limits.concurrency {
        Concurrency::Adaptive => None,
        Concurrency::Fixed(number) => Some(number),
    };
    LimitTable { requests: limits.requests, tokens: limits.tokens, concurrency, mode: limits.mode }
}

fn measures(limits: &LimitTable, replicas: u32, now: Instant) -> Vec<Measure> {
    let requests = limits.requests.map(|rate| Measure::Requests(Bucket::new(rate.share(replicas), now)));
    let tokens = limits.tokens.map(|rate| Measure::Tokens(Bucket::of_guesses(rate.share(replicas), now)));
    let slots = limits.concurrency.map(|number| Measure::Concurrency(Slots::new(share(number, replicas))));
    requests.into_iter().chain(tokens).chain(slots).collect()
}

/// Whether there is any quota that clients can be told of.
fn has_quotas(config: &Config) -> bool {
    let of_clients = config.clients.values().map(|client| &client.limits);
    config.models.values().chain(of_clients).chain([&global_table(config)]).any(has_quota)
}

/// Whether clients can be told how one of these limits stands; one that is only observed is not theirs to know.
fn has_quota(limits: &LimitTable) -> bool {
    limits.mode == Mode::Enforce && (limits.requests.is_some() || limits.tokens.is_some())
}

/// One of `replicas` equal shares of a number of slots, at least 1.
fn share(number: u32, replicas: u32) -> u32 {
    (number / replicas.max(1)).max(1)
}

fn gauge_of(limit: &Limit, now: Instant) -> Option<LimitGauge> {
    let of_bucket =
        |unit, bucket: &Bucket| (unit, bucket.remaining(now), bucket.rate().burst, Some(bucket.rate().per_second()));
    let (unit, remaining, capacity, per_second) = match &limit.measure {
        Measure::Requests(bucket) => of_bucket("requests", bucket),
        Measure::Tokens(bucket) => of_bucket("tokens", bucket),
        Measure::Concurrency(slots) => {
            ("concurrency", slots.limit().saturating_sub(slots.in_use()), slots.limit(), None)
        }
        Measure::Pace(_) => return None,
    };
    let (scope, name) = match &limit.scope {
        Scope::Global => ("global", Arc::default()),
        Scope::Model(name) => ("model", Arc::clone(name)),
        Scope::Client(name) => ("client", Arc::clone(name)),
    };
    let waiting = limit.line.load().requests;
    Some(LimitGauge { scope, name, unit, remaining: remaining.into(), capacity: capacity.into(), per_second, waiting })
}
