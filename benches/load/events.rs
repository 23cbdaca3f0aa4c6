//! Streams of server-sent events, many at once: what an event costs the proxy, and what an open stream holds.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderValue;
use http_body_util::BodyExt;
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::arguments::{self, Failure, required};
use crate::client::{AUTHORIZATION, Client, MODEL, chat_body, chat_request};
use crate::process::{CpuTime, Process};
use crate::report::{Samples, microseconds};
use crate::upstream::{EVENTS, INTERVAL_MS};

/// A stream that has not opened by then is counted as an error.
const MOST_PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone)]
struct Plan {
    to: SocketAddr,
    streams: u64,
    events: u64,
    interval: Duration,
    /// Over how long the streams are opened.
    opening: Duration,
    body: Bytes,
}

/// What all streams count together.
#[derive(Default)]
struct Counts {
    open: AtomicU64,
    events: AtomicU64,
    all_open: Notify,
}

/// The proxy at one moment, and how many events it had passed on by then.
struct Moment {
    cpu: Option<CpuTime>,
    resident_bytes: Option<u64>,
    events: u64,
}

pub fn run(parser: lexopt::Parser) -> Result<(), Failure> {
    let (mut to, mut pid, mut opening_ms) = (None, None, None);
    let (mut streams, mut events, mut interval_ms, mut body_bytes) = (100, 50, 20, 1024);
    arguments::options(parser, |name, parser| {
        match name {
            "to" => to = Some(arguments::value(parser)?),
            "pid" => pid = Some(arguments::value(parser)?),
            "streams" => streams = arguments::value(parser)?,
            "events" => events = arguments::value(parser)?,
            "interval-ms" => interval_ms = arguments::value(parser)?,
            "opening-ms" => opening_ms = Some(arguments::value(parser)?),
            "body-bytes" => body_bytes = arguments::value(parser)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let interval = Duration::from_millis(interval_ms);
    let opening = opening_ms.map_or(interval, Duration::from_millis);
    let (to, body) = (required(to, "--to")?, chat_body(MODEL, body_bytes, true));
    let plan = Plan { to, streams, events, interval, opening, body };
    let process = pid.map(Process::new).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(plan, process))
}

async fn measure(plan: Plan, process: Option<Process>) -> Result<(), Failure> {
    let counts = Arc::new(Counts::default());
    let begin = Moment::now(process.as_ref(), &counts)?;
    let mut streams = start(&plan, &counts);
    // Should a stream fail to open, the middle comes when the others should have ended.
    let whole = plan.opening + plan.interval * u32::try_from(plan.events)? + Duration::from_secs(10);
    let _ = tokio::time::timeout(whole, counts.all_open.notified()).await;
    let middle = Moment::now(process.as_ref(), &counts)?;
    let (mut first_events, mut last_error, mut errors) = (Samples::default(), None, 0_u64);
    // What follows the first end is in part the cost of ending.
    let mut steady = None;
    while let Some(stream) = streams.join_next().await {
        if steady.is_none() {
            steady = Moment::now(process.as_ref(), &counts)?.since(&middle);
        }
        match stream.expect("a stream does not panic") {
            Ok(first_event) => first_events.add(first_event),
            Err(error) => {
                errors += 1;
                last_error = Some(error.to_string());
            }
        }
    }
    let events = counts.events.load(Relaxed);
    let opened = middle.resident_bytes.zip(begin.resident_bytes);
    let report = json!({
        "streams": plan.streams,
        "errors": errors,
        "last_error": last_error,
        "open": counts.open.load(Relaxed),
        "events": events,
        "events_missing": (plan.events * plan.streams).saturating_sub(events),
        "first_event_us": first_events.summary(),
        "cpu_us_per_event": steady.map(|(cpu, events)| microseconds(cpu) / events.max(1) as f64),
        "resident_bytes_per_stream": opened.map(|(open, before)| (open as f64 - before as f64) / plan.streams as f64),
        "peak_resident_bytes": process.as_ref().map(Process::peak_resident_bytes).transpose()?,
    });
    println!("{report}");
    Ok(())
}

/// Starts the streams spread evenly, over one interval or longer: in step, their events would share wake-ups as real ones
/// don't.
fn start(plan: &Plan, counts: &Arc<Counts>) -> JoinSet<Result<Duration, Failure>> {
    let mut streams = JoinSet::new();
    for number in 0..plan.streams {
        let delay = plan.opening.mul_f64(number as f64 / plan.streams as f64);
        let (plan, counts) = (plan.clone(), Arc::clone(counts));
        streams.spawn(async move {
            tokio::time::sleep(delay).await;
            read_stream(&plan, &counts).await
        });
    }
    streams
}

/// Reads one stream to its end. Returns how long its first event took.
async fn read_stream(plan: &Plan, counts: &Counts) -> Result<Duration, Failure> {
    let mut request = chat_request(plan.to, AUTHORIZATION, plan.body.clone());
    request.headers_mut().insert(EVENTS, HeaderValue::from(plan.events));
    request.headers_mut().insert(INTERVAL_MS, HeaderValue::try_from(plan.interval.as_millis().to_string())?);
    let begun = Instant::now();
    let mut client = Client::new(plan.to);
    let answer = tokio::time::timeout(MOST_PATIENCE, client.begin(request)).await;
    let mut body = answer.map_err(|_| "the stream did not open within 20 s")??.into_body();
    let mut first_event = None;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        counts.events.fetch_add(words(&data), Relaxed);
        if first_event.is_none() {
            first_event = Some(begun.elapsed());
            counts.opened(plan.streams);
        }
    }
    first_event.ok_or_else(|| "the stream ended before its first event".into())
}

/// Events that carry a word, which is all but `[DONE]` and what a proxy may have added.
fn words(data: &[u8]) -> u64 {
    memchr::memmem::find_iter(data, br#""content":""#).count() as u64
}

impl Counts {
    fn opened(&self, of: u64) {
        if self.open.fetch_add(1, Relaxed) + 1 == of {
            self.all_open.notify_one();
        }
    }
}

impl Moment {
    fn now(process: Option<&Process>, counts: &Counts) -> Result<Self, Failure> {
        Ok(Self {
            cpu: process.map(Process::cpu_time).transpose()?,
            resident_bytes: process.map(Process::resident_bytes).transpose()?,
            events: counts.events.load(Relaxed),
        })
    }

    /// CPU time and events between two moments.
    fn since(&self, earlier: &Self) -> Option<(Duration, u64)> {
        let cpu = self.cpu.as_ref()?.since(earlier.cpu.as_ref()?);
        Some((cpu, self.events - earlier.events))
    }
}
