//! Many clients at once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt as _;
use rand::rngs::SmallRng;
use tokio::task::JoinSet;

use crate::client::{Client, Habits, Line, SharedHttp2};
use crate::plan::{Kind, Plan};
use crate::promises::{Verdict, judge};

/// Of eight clients, so many share HTTP/2 connections; the others have HTTP/1.1 connections of their own.
const HTTP2_OF_EIGHT: usize = 2;

/// Clients on one HTTP/2 connection.
const SHARING: usize = 8;

/// Purposes of chance.
const HABITS: u64 = 3 << 40;

/// What is asked for, all together.
#[derive(Clone)]
pub struct Load {
    pub to: SocketAddr,
    pub plan: Plan,
    /// Counts everything that happens, here and at the gateway.
    pub clock: Arc<AtomicU64>,
    /// The next request's number.
    pub next: Arc<AtomicU64>,
}

/// When to stop.
#[derive(Clone, Copy)]
pub enum Until {
    /// So many have been asked for since the beginning of all.
    Request(u64),
    Time(Instant),
}

impl Load {
    pub fn new(to: SocketAddr, plan: Plan, clock: Arc<AtomicU64>) -> Self {
        Self { to, plan, clock, next: Arc::default() }
    }

    /// Lets so many clients ask one request after the other, with `pause` between two on average, and returns what was seen
    /// of each.
    pub async fn run(&self, clients: usize, pause: Duration, until: Until) -> Vec<Verdict> {
        let mut all = JoinSet::new();
        let mut shared = SharedHttp2::default();
        for number in 0..clients {
            let http2 = number % 8 < HTTP2_OF_EIGHT;
            if number % (8 * SHARING / HTTP2_OF_EIGHT) == 0 {
                shared = SharedHttp2::default();
            }
            let line = if http2 { Line::Http2(shared.clone()) } else { Line::Http1(None) };
            let client = Client { number, to: self.to, clock: self.clock.clone(), line };
            all.spawn(self.clone().ask_on(client, pause, until));
        }
        let mut verdicts = Vec::new();
        while let Some(of_client) = all.join_next().await {
            verdicts.extend(of_client.expect("a client does not panic"));
        }
        verdicts
    }

    async fn ask_on(self, mut client: Client, pause: Duration, until: Until) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        while let Some(id) = self.next_id(until) {
            let mut rng = self.plan.rng(HABITS, id);
            let kind = Kind::random(&mut rng);
            let seen = client.ask(id, kind, Habits::random(&mut rng)).await;
            verdicts.push(judge(self.plan, &seen));
            self.rest(&mut rng, pause).await;
        }
        verdicts
    }

    fn next_id(&self, until: Until) -> Option<u64> {
        match until {
            Until::Time(end) if Instant::now() >= end => None,
            Until::Time(_) => Some(self.next.fetch_add(1, Ordering::Relaxed)),
            Until::Request(end) => {
                let below = |next| (next < end).then_some(next + 1);
                self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below).ok()
            }
        }
    }

    async fn rest(&self, rng: &mut SmallRng, pause: Duration) {
        if !pause.is_zero() {
            tokio::time::sleep(pause.mul_f64(rng.random_range(0.0..2.0))).await;
        }
    }
}
