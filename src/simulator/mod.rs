//! An OpenAI-compatible gateway to try clients against: quotas, latency and faults, all of them seeded.
//!
//! A client that has only met a friendly gateway is not tested. This one refuses beyond its quota to the nanosecond,
//! takes its time over each token, and fails in every way a real gateway fails; and since the same seed and the same
//! order of requests make the same decisions, a failure can be seen twice.
//!
//! It is the other side that the proxy is measured against, so it shares no code with it: it has its own buckets, its
//! own dice, and its own idea of the wire format. What decides is pure (`quota`, `gate`, `fate`, `call`, `plan`,
//! `answer`, `prose`, `api`): time and chance come in as arguments. What touches the network is `handler` (the story of
//! one request), `script` (the body that plays an answer) and this file.

mod answer;
mod api;
pub mod args;
mod call;
mod dice;
mod fate;
mod fault;
mod gate;
mod handler;
mod hints;
mod plan;
mod problem;
mod prose;
mod quota;
mod script;
mod settings;
mod stats;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Instant;

pub use self::fault::Fault;
pub use self::settings::{Hints, QuotaPer, Settings, Window};
pub use self::stats::{Refused, Stats};

use self::gate::Gate;

/// A simulated gateway. A clone is another handle to the same one: the same quota, dice and statistics.
#[derive(Clone)]
pub struct Simulator {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Settings,
    gate: Arc<Gate>,
    clock: Clock,
    /// How many requests came so far; a request's number decides its fate.
    arrivals: AtomicU64,
}

impl Simulator {
    /// A gateway whose clock, and with it quota windows and outage, starts now, by tokio's time.
    pub fn new(settings: Settings) -> Self {
        let gate = Arc::new(Gate::new(&settings));
        let clock = Clock { start: Instant::now(), start_by_the_wall: SystemTime::now() };
        Self { inner: Arc::new(Inner { settings, gate, clock, arrivals: AtomicU64::new(0) }) }
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        self.inner.gate.stats()
    }

    /// Serves all who connect. Never returns; dropping it closes the listener and all connections.
    pub async fn serve(&self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => drop(connections.spawn(self.clone().serve_tcp(stream))),
                    // Out of file descriptors, most likely: let some connections end first.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }

    /// Serves one connection until either side closes it, over whatever carries bytes: a pipe in memory will do.
    ///
    /// Dropping it cancels the request it is at, as a client's hang-up does, and drops `io`.
    pub async fn serve_connection<I>(&self, io: I)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        drop(self.drive(io).await);
    }

    async fn serve_tcp(self, stream: TcpStream) {
        // Where it can't be set, small events only come later.
        let _ = stream.set_nodelay(true);
        if let Err(stream) = self.drive(stream).await {
            // The close then sends a reset instead of an orderly end. Where it can't be set, an early end will do.
            let _ = stream.set_zero_linger();
        }
    }

    /// Gives `io` back where a fault wants the connection reset.
    async fn drive<I>(&self, io: I) -> Result<(), I>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let service = service_fn(|request| handler::respond(&self.inner, request));
        let mut connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.inner.settings.keep_alive)
            .serve_connection(TokioIo::new(io), service);
        match (&mut connection).await {
            Err(error) if error.is_user() => Err(connection.into_parts().io.into_inner()),
            _ => Ok(()),
        }
    }
}

/// Time since the start by tokio's clock, and the wall's time derived from it, so that a paused clock pauses both.
struct Clock {
    start: Instant,
    start_by_the_wall: SystemTime,
}

impl Clock {
    fn since_start(&self) -> Duration {
        self.start.elapsed()
    }

    fn by_the_wall(&self) -> SystemTime {
        self.start_by_the_wall + self.since_start()
    }
}
