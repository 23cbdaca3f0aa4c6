//! Requests whose answer comes in one piece: closed loop (each connection sends its next request when the last one is
//! answered) or open loop (requests are due at fixed times, whatever became of the ones before).

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::json;
use tokio::sync::{Mutex, mpsc};
use tokio::task::{JoinSet, LocalSet};

use crate::arguments::{self, Failure, required};
use crate::client::{Client, chat_body, chat_request};
use crate::process::Process;
use crate::report::{Samples, microseconds};

#[derive(Clone)]
struct Plan {
    to: SocketAddr,
    connections: usize,
    body: Bytes,
}

/// When a run ends: whichever comes first.
struct End {
    at: Instant,
    requests_left: Cell<u64>,
}

#[derive(Default)]
struct Outcome {
    latencies: Samples,
    errors: u64,
    last_error: Option<Failure>,
}

pub fn run(parser: lexopt::Parser) -> Result<(), Failure> {
    let (mut to, mut pid, mut rate) = (None, None, None);
    let (mut seconds, mut warm_up) = (None, Duration::from_millis(300));
    let (mut requests, mut connections, mut body_bytes) = (None, 64, 1024);
    arguments::options(parser, |name, parser| {
        match name {
            "to" => to = Some(arguments::value(parser)?),
            "pid" => pid = Some(arguments::value(parser)?),
            "rate" => rate = Some(arguments::value::<f64>(parser)?),
            "seconds" => seconds = Some(arguments::seconds(parser)?),
            "warm-up" => warm_up = arguments::seconds(parser)?,
            "requests" => requests = Some(arguments::value::<u64>(parser)?),
            "connections" => connections = arguments::value(parser)?,
            "body-bytes" => body_bytes = arguments::value(parser)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let plan = Plan { to: required(to, "--to")?, connections, body: chat_body(body_bytes, false) };
    let process = pid.map(Process::new).transpose()?;
    // With a number of requests given, the time is only there so that a run ends in any case.
    let time = seconds.unwrap_or(Duration::from_secs(if requests.is_some() { 600 } else { 3 }));
    let requests = requests.unwrap_or(u64::MAX);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        closed_loop(&plan, warm_up, u64::MAX).await;
        let before = process.as_ref().map(Process::cpu_time).transpose()?;
        let begun = Instant::now();
        let outcome = match rate {
            Some(rate) => open_loop(&plan, rate, time, requests).await,
            None => closed_loop(&plan, time, requests).await,
        };
        let took = begun.elapsed();
        let after = process.as_ref().map(Process::cpu_time).transpose()?;
        let cpu = before.zip(after).map(|(before, after)| after.since(&before));
        print_report(outcome, took, cpu, process.as_ref())
    })
}

fn print_report(
    outcome: Outcome,
    took: Duration,
    cpu: Option<Duration>,
    process: Option<&Process>,
) -> Result<(), Failure> {
    let answered = outcome.latencies.len();
    let asked = answered as u64 + outcome.errors;
    let report = json!({
        "requests": asked,
        "errors": outcome.errors,
        "last_error": outcome.last_error.map(|error| error.to_string()),
        "seconds": took.as_secs_f64(),
        "requests_per_second": (answered as f64 / took.as_secs_f64()).round(),
        "latency_us": outcome.latencies.summary(),
        "cpu_us_per_request": cpu.map(|cpu| microseconds(cpu) / asked.max(1) as f64),
        "peak_resident_bytes": process.map(Process::peak_resident_bytes).transpose()?,
    });
    println!("{report}");
    Ok(())
}

async fn closed_loop(plan: &Plan, time: Duration, requests: u64) -> Outcome {
    let end = Rc::new(End { at: Instant::now() + time, requests_left: Cell::new(requests) });
    let clients = (0..plan.connections).map(|_| {
        let (plan, end) = (plan.clone(), Rc::clone(&end));
        async move {
            let mut client = Client::new(plan.to);
            let mut outcome = Outcome::default();
            while end.one_more() {
                outcome.ask(&mut client, &plan, Instant::now()).await;
            }
            outcome
        }
    });
    together(clients).await
}

/// Every client takes the next due request when it is free; with all of them busy, the wait counts as latency.
async fn open_loop(plan: &Plan, rate: f64, time: Duration, requests: u64) -> Outcome {
    let due = Arc::new(Mutex::new(clock(rate, time, requests)));
    let clients = (0..plan.connections).map(|_| {
        let (plan, due) = (plan.clone(), Arc::clone(&due));
        async move {
            let mut client = Client::new(plan.to);
            let mut outcome = Outcome::default();
            while let Some(due) = { due.lock().await.recv().await } {
                outcome.ask(&mut client, &plan, due).await;
            }
            outcome
        }
    });
    together(clients).await
}

/// Sends the time at which each request is due, when it is due. A thread of its own, since tokio's timers are only good
/// to the millisecond.
fn clock(rate: f64, time: Duration, requests: u64) -> mpsc::UnboundedReceiver<Instant> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let begun = Instant::now();
    thread::spawn(move || {
        let requests = requests.min((time.as_secs_f64() * rate) as u64);
        for number in 0..requests {
            let due = begun + Duration::from_secs_f64(number as f64 / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if sender.send(due).is_err() {
                return;
            }
        }
    });
    receiver
}

async fn together(clients: impl Iterator<Item = impl Future<Output = Outcome> + 'static>) -> Outcome {
    let mut running = JoinSet::new();
    for client in clients {
        running.spawn_local(client);
    }
    let mut sum = Outcome::default();
    while let Some(outcome) = running.join_next().await {
        sum.include(outcome.expect("a client does not panic"));
    }
    sum
}

impl End {
    fn one_more(&self) -> bool {
        let left = self.requests_left.get();
        self.requests_left.set(left.saturating_sub(1));
        left > 0 && Instant::now() < self.at
    }
}

impl Outcome {
    async fn ask(&mut self, client: &mut Client, plan: &Plan, due: Instant) {
        match client.complete(chat_request(plan.to, plan.body.clone())).await {
            Ok(()) => self.latencies.add(due.elapsed()),
            Err(error) => {
                self.errors += 1;
                self.last_error = Some(error);
            }
        }
    }

    fn include(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        self.errors += other.errors;
        self.last_error = other.last_error.or(self.last_error.take());
    }
}
