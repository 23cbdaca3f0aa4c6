//! Admission: may a request go, and when?
//!
//! A request asks the [`Gate`] and gets a [`Permit`], at once or after waiting its turn, or a refusal that says when to come
//! back. The permit holds a slot of every semaphore on the request's way until it is dropped, wherever that happens.
//!
//! The deciding parts ([`queue`], [`bucket`], [`slots`]) are pure and driven by a given `now`. This file gives them a lock, a
//! clock and a way to wake a waiter. Nobody polls: a waiter sleeps until it is handed its permit, and one task sleeps
//! until the next bucket refills.

pub mod bucket;
pub mod bytes;
pub mod limit;
pub mod queue;
pub mod refusal;
pub mod slots;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::config::{Concurrency, Config, LimitTable, Rate};
use crate::metrics::{LimitGauge, ModelGauges};
use crate::models::{ModelId, Models};

use bucket::Bucket;
use limit::Measure;
use queue::{Ask, Grant, Offer, Queue, Rules, Ticket};
use slots::Slots;

pub use bytes::{ByteBudget, HeldBytes, NoRoom};
pub use limit::{Rank, Scope};
pub use queue::Lane;
pub use refusal::Refusal;

/// Where an adaptive lane starts.
const INITIAL_LANE_SLOTS: u32 = 10;

/// A request, as admission sees it: the same for each of its attempts.
#[derive(Debug, Clone)]
pub struct Applicant {
    pub lane: Lane,
    /// Its place in the order of arrival, from [`Gate::next_rank`].
    pub rank: Rank,
    /// How long such a request may wait.
    pub max_wait: Duration,
    /// When this one has waited long enough.
    pub until: Instant,
}

/// Every limit, and everyone who waits for one. There is one gate, shared by all.
pub struct Gate {
    /// Guards the whole state of admission. Held for a decision, never across an await.
    queue: Mutex<Queue<oneshot::Sender<Permit>>>,
    /// Tells the timekeeper that the next refill to wait for has changed.
    retime: Arc<Notify>,
    ranks: AtomicU64,
    models: Arc<Models>,
    /// The configuration's `[models]`.
    model_limits: BTreeMap<String, LimitTable>,
    replicas: u32,
    /// To put into permits.
    me: Weak<Gate>,
}

/// The right to send one request to the gateway. Dropping it gives back its slots.
///
/// Dropped before [`Permit::spend`], it gives back the request's cells too.
pub struct Permit {
    gate: Arc<Gate>,
    grant: Grant,
    /// The gateway may have seen the request.
    spent: bool,
}

impl Gate {
    /// Opens a gate with the limits of the configuration, and starts the task that lets waiters through when a bucket
    /// refills. The task ends with the gate.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(config: &Config, models: Arc<Models>) -> Arc<Self> {
        let replicas = config.limits.replicas;
        let lane_slots = match config.limits.concurrency {
            Concurrency::Adaptive => Some(share(INITIAL_LANE_SLOTS, replicas)),
            Concurrency::Fixed(_) => None,
        };
        let rules = Rules { max_waiting: config.queue.max_waiting as usize, lane_slots };
        let slots = match config.limits.concurrency {
            Concurrency::Adaptive => None,
            Concurrency::Fixed(number) => Some(number),
        };
        let now = Instant::now();
        let gate = Arc::new_cyclic(|me| Self {
            queue: Mutex::new(Queue::new(rules, measures(config.limits.requests, slots, replicas, now))),
            retime: Arc::new(Notify::new()),
            ranks: AtomicU64::new(0),
            models,
            model_limits: config.models.clone(),
            replicas,
            me: me.clone(),
        });
        tokio::spawn(keep_time(Arc::downgrade(&gate), gate.retime.clone()));
        gate
    }

    /// The next place in the order of arrival.
    pub fn next_rank(&self) -> Rank {
        Rank(self.ranks.fetch_add(1, Ordering::Relaxed))
    }

    /// Waits until the request may be sent. `again` says that this is not its first attempt.
    ///
    /// Dropping the future gives the place in the queue up, and the permit if it was just handed over.
    ///
    /// # Errors
    /// The [`Refusal`], on arrival where no waiting can help, else when `until` has come.
    pub async fn admit(&self, who: &Applicant, again: bool) -> Result<Permit, Refusal> {
        let ask = Ask { lane: who.lane, rank: who.rank, max_wait: who.max_wait, until: who.until, again };
        let (ticket, mut turn) = match self.offer_or_enqueue(&ask)? {
            Place::Permit(permit) => return Ok(permit),
            Place::Waiting(ticket, turn) => (ticket, turn),
        };
        // Given up at the await below, the guard takes the ticket out of the queue; a permit already in the channel
        // is dropped with it, and gives its slots back like any other.
        let mut place = PlaceInQueue { gate: self, ticket: Some(ticket) };
        tokio::select! {
            biased;
            permit = &mut turn => {
                place.ticket = None;
                permit.map_err(|_| Refusal::draining())
            }
            () = tokio::time::sleep_until(ask.until) => {
                place.ticket = None;
                // A bucket may refill at this very moment; the waiter whose cell that is gets it.
                self.change(|_, _| ());
                match self.change(|queue, now| queue.expire(ticket, now)) {
                    Some(refusal) => Err(refusal),
                    None => turn.await.map_err(|_| Refusal::draining()),
                }
            }
        }
    }

    /// Refuses everyone who waits, and everyone who comes from now on.
    pub fn close(&self) {
        drop(self.change(Queue::close));
    }

    /// How many requests of each model are under way and waiting, its lanes added up.
    pub fn model_gauges(&self) -> Vec<ModelGauges> {
        let mut of_model: BTreeMap<ModelId, ModelGauges> = BTreeMap::new();
        for lane in self.lock().lanes() {
            let gauges = of_model.entry(lane.model).or_default();
            gauges.in_flight += u64::from(lane.in_flight);
            gauges.waiting += lane.waiting;
            gauges.concurrency_limit = gauges.concurrency_limit.max(lane.slots);
        }
        let named =
            of_model.into_iter().map(|(model, gauges)| ModelGauges { model: self.models.name(model), ..gauges });
        named.collect()
    }

    /// The limits of the configuration and what is left of them.
    pub fn limit_gauges(&self) -> Vec<LimitGauge> {
        let now = Instant::now();
        let queue = self.lock();
        let views = queue.limits().map(|limit| {
            let (unit, remaining) = match &limit.measure {
                Measure::Requests(bucket) => ("requests", bucket.remaining(now)),
                Measure::Concurrency(slots) => ("concurrency", slots.limit().saturating_sub(slots.in_use())),
            };
            let (scope, name) = match &limit.scope {
                Scope::Global => ("global", String::new()),
                Scope::Model(name) => ("model", name.to_string()),
            };
            LimitGauge { scope, name, unit, remaining: u64::from(remaining) }
        });
        views.collect()
    }

    fn offer_or_enqueue(&self, ask: &Ask) -> Result<Place, Refusal> {
        let model = ask.lane.model;
        let name = || self.models.name(model);
        let place = self.change(|queue, now| {
            if !queue.knows(model) {
                queue.limit_model(model, &name(), self.measures_of(model, &name(), now));
            }
            match queue.offer(ask, name, now) {
                Offer::Admitted(grant) => Ok(Err(grant)),
                Offer::Refused(refusal) => Err(refusal),
                Offer::MustWait => {
                    let (wake, turn) = oneshot::channel();
                    Ok(Ok((queue.enqueue(ask, wake, now), turn)))
                }
            }
        })?;
        Ok(match place {
            Ok((ticket, turn)) => Place::Waiting(ticket, turn),
            Err(grant) => Place::Permit(self.permit(grant)),
        })
    }

    fn measures_of(&self, model: ModelId, name: &str, now: Instant) -> Vec<Measure> {
        // A call that names no model is no model's.
        let named = || self.model_limits.get(name).or_else(|| self.model_limits.get("*"));
        let limits = if model == ModelId::NONE { None } else { named() };
        let limits = limits.cloned().unwrap_or_default();
        measures(limits.requests, limits.concurrency, self.replicas, now)
    }

    /// Changes the queue, lets through whoever can go after that, and wakes them once the lock is free.
    fn change<T>(&self, change: impl FnOnce(&mut Queue<oneshot::Sender<Permit>>, Instant) -> T) -> T {
        let now = Instant::now();
        let mut turns = Vec::new();
        let mut queue = self.lock();
        let before = queue.next_timer();
        let answer = change(&mut queue, now);
        queue.pump(now, |wake, grant| turns.push((wake, grant)));
        let sooner = queue.next_timer().is_some_and(|next| before.is_none_or(|before| next < before));
        drop(queue);
        if sooner {
            self.retime.notify_one();
        }
        for (wake, grant) in turns {
            // A waiter that is gone gives the permit back by dropping it.
            let _ = wake.send(self.permit(grant));
        }
        answer
    }

    fn permit(&self, grant: Grant) -> Permit {
        let gate = self.me.upgrade().expect("a gate that is asked is alive");
        Permit { gate, grant, spent: false }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<oneshot::Sender<Permit>>> {
        // A panic while deciding is a broken invariant; the state is still the best there is.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.retime.notify_one();
    }
}

impl Permit {
    /// The request is about to be written: from here on it counts against the quota. Written once more (a pooled
    /// connection turned out to be closed), it counts again, as debt: the next in line waits for it.
    pub fn spend(&mut self) {
        if std::mem::replace(&mut self.spent, true) {
            self.gate.change(|queue, now| queue.charge_again(&self.grant, now));
        }
    }

    /// After all, nothing was written.
    pub fn was_not_written(&mut self) {
        self.spent = false;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.change(|queue, now| queue.release(&self.grant, !self.spent, now));
    }
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Permit").field("grant", &self.grant).field("spent", &self.spent).finish_non_exhaustive()
    }
}

/// What a request that was not refused has.
enum Place {
    Permit(Permit),
    Waiting(Ticket, oneshot::Receiver<Permit>),
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

fn measures(requests: Option<Rate>, slots: Option<u32>, replicas: u32, now: Instant) -> Vec<Measure> {
    let bucket = requests.map(|rate| Measure::Requests(Bucket::new(rate.share(replicas), now)));
    let slots = slots.map(|number| Measure::Concurrency(Slots::new(share(number, replicas))));
    bucket.into_iter().chain(slots).collect()
}

/// One of `replicas` equal shares of a number of slots, at least 1.
fn share(number: u32, replicas: u32) -> u32 {
    (number / replicas.max(1)).max(1)
}
