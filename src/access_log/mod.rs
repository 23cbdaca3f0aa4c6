//! The access log: one JSON line for each request that has ended, however it did. docs/access-log.md tells of the fields.
//!
//! A line is begun when a request's head has come, with what only the head knows, and is ended by the request's ledger,
//! which closes once: so each request has one line, one that is dropped half-way too. No line holds a key, a prompt or a
//! completion: of the head stand in it the method, the path without its query, the request's and the trace's id; of the
//! body the model's name; all escaped and cut. What is written goes through an [`Outlet`], so that no request waits for a
//! disk.

mod line;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode, Version, request};

use crate::config::AccessTarget;
use crate::metrics::{Metrics, Outcome, RefusedBy};
use crate::openai::usage::Usage;
use crate::outlet::{Habits, LogFile, Nowhere, Outlet, Sink, Stderr};

pub use line::Line;

/// Characters that are kept of what a client writes.
const MAX_METHOD: usize = 20;
const MAX_PATH: usize = 256;
const MAX_REQUEST_ID: usize = 128;
const MAX_ASKED_MODEL: usize = 64;

/// Of names in the configuration, and of those that the gateway has served. They are shorter.
const MAX_NAME: usize = 256;

/// For how long lines gather: the disk, and the thread that writes, are busy twenty times a second at most.
const GATHER: Duration = Duration::from_millis(50);

/// Where it goes, as it stands.
pub struct AccessLog {
    /// Whether a request that begins now gets a line.
    on: AtomicBool,
    /// Made when the log is first on.
    outlet: OnceLock<Outlet>,
    /// Held to direct the log elsewhere: one such change at a time.
    directing: Mutex<()>,
    /// The gateway's host, and its port where `upstream.base_url` has one.
    upstream: String,
    metrics: Arc<Metrics>,
}

/// What a ledger knows of a request that has ended.
pub struct Entry<'e> {
    pub request_id: &'e [u8],
    pub client: &'e str,
    pub model: &'e str,
    /// `None` where no answer has begun.
    pub status: Option<StatusCode>,
    pub outcome: Outcome,
    pub refused_by: Option<RefusedBy>,
    pub scope: Option<&'e str>,
    pub code: Option<&'static str>,
    pub attempts: u32,
    pub queued: Duration,
    pub upstream: Duration,
    pub first_token: Option<Duration>,
    pub total: Duration,
    pub usage: Option<Usage>,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

/// Where the access log is to be written; `None` where it is off.
///
/// # Errors
/// The file cannot be opened.
pub fn open(target: &AccessTarget) -> io::Result<Option<Box<dyn Sink>>> {
    Ok(match target {
        AccessTarget::Off => None,
        AccessTarget::Stderr => Some(Box::new(Stderr)),
        AccessTarget::File(path) => Some(Box::new(LogFile::open(path)?)),
    })
}

impl AccessLog {
    /// A log that is off. `upstream` is the gateway's authority.
    pub fn off(upstream: &str, metrics: Arc<Metrics>) -> Self {
        let (on, outlet, directing) = (AtomicBool::new(false), OnceLock::new(), Mutex::default());
        Self { on, outlet, directing, upstream: upstream.to_owned(), metrics }
    }

    /// From now on requests are written to this sink, or, with `None`, not at all. Those under way are too, if they began
    /// while the log was on.
    ///
    /// # Errors
    /// The thread that is needed cannot be had. Then all is as before.
    pub fn redirect(&self, sink: Option<Box<dyn Sink>>) -> io::Result<()> {
        let _alone = self.directing.lock().unwrap_or_else(PoisonError::into_inner);
        let on = sink.is_some();
        match (self.outlet.get(), sink) {
            (Some(outlet), sink) => outlet.replace(sink.unwrap_or_else(|| Box::new(Nowhere))),
            (None, Some(sink)) => {
                let started = Outlet::start(sink, self.habits())?;
                self.outlet.get_or_init(|| started);
            }
            (None, None) => {}
        }
        self.on.store(on, Ordering::Relaxed);
        Ok(())
    }

    fn habits(&self) -> Habits {
        let metrics = self.metrics.clone();
        Habits { name: "the access log", gather: GATHER, lost: Box::new(move |lines| metrics.lost_log_lines(lines)) }
    }

    /// Opens the file under its name anew: the old one was renamed. Returns at once; a failure is said in weir's own log,
    /// and the old file stays in use.
    pub fn reopen(&self) {
        if let Some(outlet) = self.outlet.get() {
            outlet.reopen();
        }
    }

    /// Waits until every line so far is written, but no longer than this; `false` where some are not.
    pub fn flush(&self, limit: Duration) -> bool {
        self.outlet.get().is_none_or(|outlet| outlet.flush(limit))
    }

    /// A line for the request that begins with this head; `None` while the log is off.
    pub fn begin(&self, head: &request::Parts) -> Option<Line> {
        if !self.on.load(Ordering::Relaxed) {
            return None;
        }
        let mut line = Line::begin();
        line.text("method", head.method.as_str().as_bytes(), MAX_METHOD);
        line.text("path", head.uri.path().as_bytes(), MAX_PATH);
        line.word("http", version(head.version));
        if let Some(trace) = trace_id(&head.headers) {
            line.text("trace_id", trace, trace.len());
        }
        Some(line)
    }

    /// Ends a line, and hands it over.
    pub fn record(&self, mut line: Line, entry: &Entry<'_>) {
        entry.write(&mut line, &self.upstream);
        let line = line.end(SystemTime::now());
        if let Some(outlet) = self.outlet.get() {
            outlet.push(&line);
        }
    }
}

impl Line {
    /// What the body asks for, and, where weir does not know the model by name, how the client calls it.
    pub fn asks(&mut self, stream: bool, unknown_model: Option<&str>) {
        self.flag("stream", stream);
        if let Some(name) = unknown_model {
            self.text("model_asked", name.as_bytes(), MAX_ASKED_MODEL);
        }
    }
}

impl Entry<'_> {
    fn write(&self, line: &mut Line, upstream: &str) {
        if !self.request_id.is_empty() {
            line.text("request_id", self.request_id, MAX_REQUEST_ID);
        }
        line.text("client", self.client.as_bytes(), MAX_NAME);
        line.text("model", self.model.as_bytes(), MAX_NAME);
        if let Some(status) = self.status {
            line.number("status", status.as_u16().into());
        }
        line.word("outcome", self.outcome.label());
        if let Some(by) = self.refused_by {
            line.word("refused_by", by.label());
        }
        if let Some(scope) = self.scope {
            line.text("scope", scope.as_bytes(), MAX_NAME);
        }
        if let Some(code) = self.code {
            line.word("code", code);
        }
        line.number("attempts", self.attempts.into());
        line.millis("queue_ms", self.queued);
        if self.attempts > 0 {
            line.millis("upstream_ms", self.upstream);
        }
        if let Some(first_token) = self.first_token {
            line.millis("first_token_ms", first_token);
        }
        line.millis("total_ms", self.total);
        if let Some(Usage { prompt, completion, cached, reasoning, .. }) = self.usage {
            let tokens = [("prompt", prompt), ("completion", completion), ("cached", cached), ("reasoning", reasoning)];
            line.numbers("tokens", tokens);
        }
        line.number("bytes_in", self.bytes_in);
        line.number("bytes_out", self.bytes_out);
        if self.attempts > 0 {
            line.text("upstream", upstream.as_bytes(), MAX_NAME);
        }
    }
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    }
}

/// The trace that the request belongs to, where its `traceparent` is one (W3C Trace Context, 3.2.2): 32 lower-case
/// hexadecimal digits, not all zero, of a version that is not `ff`.
fn trace_id(fields: &HeaderMap) -> Option<&[u8]> {
    let mut values = fields.get_all("traceparent").iter();
    let (parent, None) = (values.next()?.as_bytes(), values.next()) else { return None };
    let mut parts = parent.split(|byte| *byte == b'-');
    let [version, trace, span, flags] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?];
    let is_hex =
        |part: &[u8], length| part.len() == length && part.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let whole = is_hex(version, 2) && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2);
    // A later version may have more behind it.
    let ends = version != b"00" || parts.next().is_none();
    let valid =
        whole && ends && version != b"ff" && [trace, span].iter().all(|id| id.iter().any(|digit| *digit != b'0'));
    valid.then_some(trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_traceparent_names_a_trace() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let find = |values: &[&str]| {
            let fields: HeaderMap = values
                .iter()
                .map(|value| (http::HeaderName::from_static("traceparent"), value.parse().expect("a value")))
                .collect();
            trace_id(&fields).map(|trace| String::from_utf8(trace.to_vec()).expect("ASCII"))
        };
        for parent in [
            format!("00-{trace}-00f067aa0ba902b7-01"),
            format!("00-{trace}-00f067aa0ba902b7-00"),
            format!("cc-{trace}-00f067aa0ba902b7-01-what-comes"),
        ] {
            assert_eq!(find(&[&parent]).as_deref(), Some(trace), "{parent}");
        }
        let good = format!("00-{trace}-00f067aa0ba902b7-01");
        for parents in [
            &[][..],
            &[""],
            &["00"],
            &[&good[1..]],
            &[&good.to_uppercase()],
            &[&good, &good],
            &[&format!("{good}-x")],
            &[&good.replace("00-4", "ff-4")],
            &["00-00000000000000000000000000000000-00f067aa0ba902b7-01"],
            &[&format!("00-{trace}-0000000000000000-01")],
            &[&format!("00-{}\"-00f067aa0ba902b7-01", &trace[1..])],
        ] {
            assert_eq!(find(parents), None, "{parents:?}");
        }
    }
}
