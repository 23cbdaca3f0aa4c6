//! Requests whose answer comes in one piece: closed loop (each connection sends its next request when the last one is
//! answered) or open loop (requests are due at fixed times, whatever became of the ones before).

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::Full;
use serde_json::json;
use tokio::sync::{Mutex, mpsc};
use tokio::task::{JoinSet, LocalSet};

use crate::arguments::{self, Failure, required};
use crate::client::{AUTHORIZATION, Client, MODEL, chat_body, chat_request};
use crate::process::Process;
use crate::report::{Samples, microseconds};

/// How long after the one before each connection is opened: all at once they would overflow the listener's backlog,
/// and then the gateway's.
const STAGGER: Duration = Duration::from_micros(400);

/// What is asked: the models and the keys take turns.
struct Question {
    to: SocketAddr,
    bodies: Vec<Bytes>,
    keys: Vec<HeaderValue>,
    asked: Cell<usize>,
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
    /// With their connections, for the next load.
    clients: Vec<Client>,
}

pub fn run(parser: lexopt::Parser) -> Result<(), Failure> {
    let (mut to, mut pid, mut rate) = (None, None, None);
    let (mut models, mut keys) = (vec![MODEL.to_owned()], vec![AUTHORIZATION]);
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
            "models" => models = (0..arguments::value(parser)?).map(|number: u32| format!("model-{number}")).collect(),
            "clients" => keys = (0..arguments::value(parser)?).map(client_key).collect::<Result<_, _>>()?,
            "body-bytes" => body_bytes = arguments::value(parser)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let bodies = models.iter().map(|model| chat_body(model, body_bytes, false)).collect();
    let question = Rc::new(Question { to: required(to, "--to")?, bodies, keys, asked: Cell::new(0) });
    let process = pid.map(Process::new).transpose()?;
    // With a number of requests given, the time is only there so that a run ends in any case.
    let time = seconds.unwrap_or(Duration::from_secs(if requests.is_some() { 600 } else { 3 }));
    let requests = requests.unwrap_or(u64::MAX);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let clients = (0..connections).map(|_| Client::new(question.to)).collect();
        let Outcome { clients, .. } = match warm_up {
            Duration::ZERO => Outcome { clients, ..Outcome::default() },
            _ => closed_loop(clients, &question, STAGGER, warm_up, u64::MAX).await,
        };
        let before = process.as_ref().map(Process::cpu_time).transpose()?;
        let begun = Instant::now();
        let outcome = match rate {
            Some(rate) => open_loop(clients, &question, rate, time, requests).await,
            None => closed_loop(clients, &question, Duration::ZERO, time, requests).await,
        };
        let took = begun.elapsed();
        let after = process.as_ref().map(Process::cpu_time).transpose()?;
        let cpu = before.zip(after).map(|(before, after)| after.since(&before));
        print_report(outcome, took, cpu, process.as_ref())
    })
}

/// The first is the one that all other loads have.
fn client_key(number: u32) -> Result<HeaderValue, Failure> {
    if number == 0 {
        return Ok(AUTHORIZATION);
    }
    Ok(HeaderValue::try_from(format!("Bearer sk-client-{number}"))?)
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

/// The clients begin one after the other, `stagger` apart; the time runs from when the last one has begun.
async fn closed_loop(
    clients: Vec<Client>,
    question: &Rc<Question>,
    stagger: Duration,
    time: Duration,
    requests: u64,
) -> Outcome {
    let ramp = stagger * clients.len() as u32;
    let end = Rc::new(End { at: Instant::now() + ramp + time, requests_left: Cell::new(requests) });
    let clients = clients.into_iter().zip(0_u32..).map(|(mut client, number)| {
        let (question, end) = (Rc::clone(question), Rc::clone(&end));
        async move {
            if !stagger.is_zero() {
                tokio::time::sleep(stagger * number).await;
            }
            let mut outcome = Outcome::default();
            while end.one_more() {
                outcome.ask(&mut client, &question, Instant::now()).await;
            }
            outcome.clients.push(client);
            outcome
        }
    });
    together(clients).await
}

/// Every client takes the next due request when it is free; with all of them busy, the wait counts as latency.
async fn open_loop(clients: Vec<Client>, question: &Rc<Question>, rate: f64, time: Duration, requests: u64) -> Outcome {
    let due = Arc::new(Mutex::new(clock(rate, time, requests)));
    let clients = clients.into_iter().map(|mut client| {
        let (question, due) = (Rc::clone(question), Arc::clone(&due));
        async move {
            let mut outcome = Outcome::default();
            while let Some(due) = { due.lock().await.recv().await } {
                outcome.ask(&mut client, &question, due).await;
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

impl Question {
    fn next(&self) -> Request<Full<Bytes>> {
        let number = self.asked.replace(self.asked.get().wrapping_add(1));
        let (key, body) = (&self.keys[number % self.keys.len()], &self.bodies[number % self.bodies.len()]);
        chat_request(self.to, key.clone(), body.clone())
    }
}

impl Outcome {
    async fn ask(&mut self, client: &mut Client, question: &Question, due: Instant) {
        match client.complete(question.next()).await {
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
        self.clients.extend(other.clients);
    }
}
