//! Connections that wait for their next request.
//!
//! Last in, first out, so that in quiet times few connections are used and the rest grow old and are closed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rand::RngExt;
use tokio::time::Instant;

use super::wire::Wire;

/// An idle connection is closed after this, if the gateway has not done so.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// A request that must not be sent twice takes no connection that has been idle for longer: many servers close theirs after
/// 5 s (node, uvicorn), perhaps in the very moment in which it is written to.
const MAX_IDLE_ONCE: Duration = Duration::from_secs(4);

/// A connection is not used any more after this (and up to a fifth less), so that a change of the gateway's address is seen.
const MAX_AGE: Duration = Duration::from_secs(300);

/// How often idle connections are looked at, so that those which the gateway has closed do not linger.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// How long a connection may have been idle to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxIdle {
    /// The request can be sent again: any will do.
    Repeatable,
    /// It can't.
    Once,
}

/// A connection to the gateway, of one pool or another.
#[derive(Debug)]
pub struct Connection {
    pub wire: Wire,
    /// It has carried a request before.
    pub reused: bool,
    retires: Instant,
    #[expect(dead_code, reason = "it is there to be dropped")]
    open: Open,
    /// While it is not in the pool.
    active: Option<Active>,
}

/// How many connections there are, all pools together.
#[derive(Debug, Default)]
pub struct ConnectionCounts {
    open: AtomicU64,
    active: AtomicU64,
}

/// Counts a connection among those that carry a request, until dropped.
#[derive(Debug)]
struct Active(Arc<ConnectionCounts>);

impl Active {
    fn new(counts: &Arc<ConnectionCounts>) -> Self {
        counts.active.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counts))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts a connection among those that are open, until dropped.
#[derive(Debug)]
struct Open(Arc<ConnectionCounts>);

impl Open {
    fn new(counts: &Arc<ConnectionCounts>) -> Self {
        counts.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counts))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ConnectionCounts {
    /// Connections that carry a request, and connections that wait for one.
    pub fn active_and_idle(&self) -> (u64, u64) {
        let active = self.active.load(Ordering::Relaxed);
        (active, self.open.load(Ordering::Relaxed).saturating_sub(active))
    }
}

/// The idle connections of one worker.
#[derive(Debug)]
pub struct Pool {
    /// Guards the list only; held for a push or a pop.
    idle: Mutex<IdleList>,
    counts: Arc<ConnectionCounts>,
    me: Weak<Pool>,
}

#[derive(Debug, Default)]
struct IdleList {
    /// The longest idle first.
    connections: Vec<(Instant, Box<Connection>)>,
    /// A task is there that closes what gets old.
    swept: bool,
}

impl Pool {
    /// An empty pool.
    pub fn new(counts: Arc<ConnectionCounts>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { idle: Mutex::default(), counts, me: me.clone() })
    }

    /// A connection that is ready for a request, the one that was used last.
    pub fn take(&self, max_idle: MaxIdle) -> Option<Box<Connection>> {
        let now = Instant::now();
        let longest = if max_idle == MaxIdle::Once { MAX_IDLE_ONCE } else { MAX_IDLE };
        let mut idle = self.lock();
        let usable = |(since, connection): &mut (Instant, Box<Connection>)| {
            now < connection.retires && now - *since < longest && connection.wire.is_quiet()
        };
        // The newest is usable as a rule; what is passed over is left to the sweep.
        let at = idle.connections.iter_mut().rposition(usable)?;
        let (_, mut connection) = idle.connections.remove(at);
        connection.active = Some(Active::new(&self.counts));
        Some(connection)
    }

    /// Takes in a new connection.
    pub fn adopt(&self, wire: Wire) -> Box<Connection> {
        let age = MAX_AGE - MAX_AGE.mul_f64(rand::rng().random_range(0.0..0.2));
        let (open, active) = (Open::new(&self.counts), Some(Active::new(&self.counts)));
        Box::new(Connection { wire, reused: false, retires: Instant::now() + age, open, active })
    }

    /// Takes a connection back whose answer was read to its end.
    pub fn give_back(&self, mut connection: Box<Connection>) {
        (connection.reused, connection.active) = (true, None);
        let now = Instant::now();
        if !connection.wire.may_be_reused() || now >= connection.retires {
            return;
        }
        let mut idle = self.lock();
        idle.connections.push((now, connection));
        if !std::mem::replace(&mut idle.swept, true) {
            tokio::spawn(sweep(self.me.clone()));
        }
    }

    /// Closes what has been idle for too long, or was closed by the gateway; `false` when nothing is idle any more.
    fn close_old(&self) -> bool {
        let now = Instant::now();
        let mut idle = self.lock();
        idle.connections.retain_mut(|(since, connection)| {
            now < connection.retires && now - *since < MAX_IDLE && connection.wire.is_quiet()
        });
        idle.swept = !idle.connections.is_empty();
        idle.swept
    }

    fn lock(&self) -> MutexGuard<'_, IdleList> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes old connections for as long as there are idle ones: an idle weir runs no timer.
async fn sweep(pool: Weak<Pool>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        if !pool.upgrade().is_some_and(|pool| pool.close_old()) {
            return;
        }
    }
}
