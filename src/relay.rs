//! The answer's way back: bytes pass as they came, and on the way they are counted.
//!
//! [`Relay`] is the body of the response that the client gets. It owns the [`Permit`] and the [`Ledger`], so that the slot is
//! given back and the account closed exactly once: when the answer ends, breaks off, or is dropped because the client went
//! away.

mod opening;

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{StatusCode, header, response};
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use crate::admission::Permit;
use crate::error::{Cause, Failure};
use crate::ledger::Ledger;
use crate::metrics::{AttemptResult, Outcome};
use crate::openai::call::Endpoint;
use crate::openai::preamble::is_preamble;
use crate::openai::sse::Scanner;
use crate::openai::usage::{self, Tail, Usage};
use crate::openai::usage_chunk::UsageChunkFilter;
use crate::openai::{envelope, output};
use crate::retry;
use crate::upstream::AnswerBody;

pub use opening::{Beginning, Opening, WholeError};

/// How long an answer may be silent.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Between two chunks.
    pub idle: Duration,
    /// By when a stream has to have its first event, be it a ping, and what it is otherwise.
    pub first_event: Option<(Instant, Cause)>,
}

/// Where an answer's body comes from, and what it holds.
#[derive(Debug)]
pub struct Source {
    pub opening: Opening,
    /// `None` where all of it is in `opening`, or when it has ended.
    pub rest: Option<AnswerBody>,
    /// Absent where the whole answer is in `opening`.
    pub permit: Option<Permit>,
    pub patience: Patience,
}

/// The body of a proxied response.
pub struct Relay {
    source: Source,
    ledger: Ledger,
    status: StatusCode,
    endpoint: Option<Endpoint>,
    meter: Meter,
    /// Where the client is not to see the usage that weir has asked for.
    hiding: Option<Hiding>,
    /// What comes behind the body.
    trailers: Option<Frame<Bytes>>,
    /// When the last chunk came.
    quiet_since: Instant,
    /// Armed while waiting for a chunk; it may ring early, since it is not reset with each one.
    alarm: Option<Pin<Box<Sleep>>>,
}

/// An answer broke off; hyper cuts the client's connection, so that it cannot be taken for whole.
#[derive(Debug)]
pub struct BrokenOff(String);

impl fmt::Display for BrokenOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BrokenOff {}

impl Relay {
    /// Takes over an answer that begins now. `hides_usage` says that weir has asked for a stream's usage and the client has not.
    pub fn new(
        head: &response::Parts,
        source: Source,
        ledger: Ledger,
        endpoint: Option<Endpoint>,
        hides_usage: bool,
        now: Instant,
    ) -> Self {
        let metered = endpoint.is_some() && head.status.is_success();
        let meter = Meter { format: if metered { Format::of(head) } else { Format::Opaque }, bytes: 0 };
        let hiding = hides_usage.then(Hiding::default);
        let (status, quiet_since) = (head.status, now);
        let mut relay =
            Self { source, ledger, status, endpoint, meter, hiding, trailers: None, quiet_since, alarm: None };
        relay.end_if_whole();
        relay
    }

    /// Ends the account as soon as nothing more is to come: hyper need not ask again once the declared length is met.
    fn end_if_whole(&mut self) {
        if self.source.is_read() {
            let (result, outcome) = match retry::result_of(self.status) {
                AttemptResult::Ok if self.meter.saw_error() || self.meter.saw_nothing() => {
                    (AttemptResult::StreamError, Outcome::UpstreamError)
                }
                AttemptResult::Ok => (AttemptResult::Ok, Outcome::Ok),
                AttemptResult::ClientError => (AttemptResult::ClientError, Outcome::ClientError),
                result => (result, Outcome::UpstreamError),
            };
            self.settle(true);
            self.end(result, outcome, None);
        }
    }

    /// `failure` is how it broke off, where it did.
    fn end(&mut self, result: AttemptResult, outcome: Outcome, failure: Option<Failure>) {
        if let Some(hiding) = &mut self.hiding {
            hiding.ends();
            // hyper takes them before it sees the end.
            self.ledger.gave(hiding.passed.iter().map(Bytes::len).sum());
        }
        self.ledger.attempt_ends(result);
        match failure {
            Some(failure) => self.ledger.close_with(outcome, failure),
            None => self.ledger.close(outcome),
        }
        self.source.opening.chunks.clear();
        self.source.rest = None;
        self.alarm = None;
    }

    /// Tells what the answer cost, and gives the permit back. Only the first call counts.
    ///
    /// Where the gateway does not tell, it is the estimate for a whole answer of which weir sees nothing, and otherwise
    /// the prompt and what has come of the output.
    fn settle(&mut self, whole: bool) {
        let Some(mut permit) = self.source.permit.take() else { return };
        if !self.status.is_success() {
            return;
        }
        let cost = permit.cost();
        let failed = self.meter.saw_error();
        match (self.meter.usage(whole), &self.meter.format) {
            // The same as one that was held, and tried again.
            (_, Format::Events { error: true, answered: false, .. }) => permit.refused(),
            // A Messages stream begins with a usage, which counts hardly anything of what follows.
            (Some(usage), Format::Events { .. }) if failed || !whole => {
                self.ledger.used(usage);
                permit.used(usage.quota().max(usage.counted.saturating_add(self.meter.output())));
            }
            (Some(usage), _) => {
                self.ledger.used(usage);
                permit.answered(usage);
            }
            (None, Format::Events { .. }) => permit.used(cost.prompt.saturating_add(self.meter.output())),
            (None, _) if whole => permit.used(cost.tokens()),
            (None, _) => permit.used(cost.prompt.saturating_add(self.meter.output().min(cost.output))),
        }
    }

    /// Counts a chunk and passes it on, if something is left of it when the usage is hidden.
    fn pass(&mut self, chunk: Bytes) -> Next {
        let had_output = self.meter.has_output();
        self.meter.feed(&chunk);
        if self.meter.has_output() && !had_output {
            self.ledger.first_output();
        }
        if self.meter.has_begun() {
            self.source.patience.first_event = None;
        }
        let passed = match &mut self.hiding {
            Some(hiding) => {
                hiding.filter.feed(chunk, &mut hiding.passed);
                hiding.passed.pop_front()
            }
            None => Some(chunk),
        };
        self.ledger.gave(passed.as_ref().map_or(0, Bytes::len));
        self.end_if_whole();
        passed.map_or(Next::Hidden, |passed| Next::Frame(Ok(Frame::data(passed))))
    }

    /// What of the answer is ready to be passed on without reading more.
    fn passed_already(&mut self) -> Option<Frame<Bytes>> {
        let chunk = self.hiding.as_mut().and_then(|hiding| hiding.passed.pop_front())?;
        self.ledger.gave(chunk.len());
        Some(Frame::data(chunk))
    }

    /// The answer breaks off. A stream between two events can still say so; anything else is cut.
    fn break_off(&mut self, result: AttemptResult, cause: Cause, why: String) -> Result<Frame<Bytes>, BrokenOff> {
        let says_so = self.can_say_so();
        self.settle(false);
        // An event that was held back half is not passed on.
        self.hiding = None;
        let failure = Failure::new(cause, why.as_str());
        let event = says_so.then(|| failure.event(self.endpoint));
        self.ledger.gave(event.as_ref().map_or(0, Bytes::len));
        let outcome = if cause == Cause::Draining { Outcome::Failed } else { Outcome::UpstreamError };
        self.end(result, outcome, Some(failure));
        if let Some(event) = event {
            return Ok(Frame::data(event));
        }
        Err(BrokenOff(why))
    }

    /// Whether one more event can be put behind what the client has got.
    fn can_say_so(&self) -> bool {
        let open_ended =
            self.hiding.is_some() || self.source.rest.as_ref().is_some_and(|rest| rest.size_hint().exact().is_none());
        open_ended && self.is_between_events()
    }

    /// Whether both what the gateway has sent and what the client has got end with a whole event.
    fn is_between_events(&self) -> bool {
        let passed_whole = self.hiding.as_ref().is_none_or(|hiding| hiding.filter.at_boundary());
        passed_whole && self.meter.is_between_events()
    }

    /// How long the answer has to stay silent from now to be given up, and why.
    fn limit(&self) -> (Instant, Cause) {
        match self.source.patience.first_event {
            Some(first_event) => first_event,
            None => (self.quiet_since + self.source.patience.idle, Cause::IdleTimeout),
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        // What cannot say so goes on until it can, or is cut.
        if self.ledger.is_cut() && !self.source.is_read() && self.can_say_so() {
            let why = "weir ends, and does not wait for the rest of this answer".to_owned();
            return Poll::Ready(Next::Frame(self.break_off(AttemptResult::Cancelled, Cause::Draining, why)));
        }
        if let Some(chunk) = self.source.opening.chunks.pop_front() {
            return Poll::Ready(self.pass(chunk));
        }
        let Some(rest) = &mut self.source.rest else {
            return Poll::Ready(self.trailers.take().map_or(Next::End, |trailers| Next::Frame(Ok(trailers))));
        };
        Poll::Ready(match rest.poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.quiet_since = Instant::now();
                match frame.into_data() {
                    Ok(chunk) => self.pass(chunk),
                    Err(trailers) => {
                        // hyper asks for nothing more behind them: the account has to be closed before.
                        self.trailers = Some(trailers);
                        Next::Hidden
                    }
                }
            }
            Poll::Ready(Some(Err(error))) => {
                let why = format!("the gateway broke the answer off: {error}");
                Next::Frame(self.break_off(AttemptResult::Reset, Cause::Disconnected, why))
            }
            Poll::Ready(None) => {
                self.source.rest = None;
                self.end_if_whole();
                // Something may have been held back until now.
                Next::Hidden
            }
            Poll::Pending => {
                let cause = ready!(self.poll_alarm(cx));
                let why = "the gateway sent nothing more for too long".to_owned();
                Next::Frame(self.break_off(AttemptResult::Timeout, cause, why))
            }
        })
    }

    fn poll_alarm(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        loop {
            let (limit, cause) = self.limit();
            let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(limit)));
            ready!(alarm.as_mut().poll(cx));
            if Instant::now() >= limit {
                return Poll::Ready(cause);
            }
            alarm.as_mut().reset(limit);
        }
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let relay = self.get_mut();
        loop {
            if let Some(frame) = relay.passed_already() {
                return Poll::Ready(Some(Ok(frame)));
            }
            match ready!(relay.poll_next(cx)) {
                Next::Frame(frame) => return Poll::Ready(Some(frame)),
                Next::Hidden => {}
                Next::End => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let all_passed = self.hiding.as_ref().is_none_or(|hiding| hiding.passed.is_empty());
        self.source.is_read() && all_passed && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.hiding.is_some() {
            return SizeHint::default();
        }
        let Source { opening, rest, .. } = &self.source;
        let held: usize = opening.chunks.iter().map(Bytes::len).sum();
        let rest = rest.as_ref().map_or(Some(0), |rest| rest.size_hint().exact());
        rest.map_or_else(SizeHint::default, |rest| SizeHint::with_exact(held as u64 + rest))
    }
}

impl Drop for Relay {
    /// The client went away, if the answer had not ended.
    fn drop(&mut self) {
        self.settle(false);
    }
}

impl Source {
    /// Whether nothing more is to come.
    fn is_read(&self) -> bool {
        self.opening.chunks.is_empty() && self.rest.as_ref().is_none_or(AnswerBody::is_end_stream)
    }
}

/// What comes next of an answer.
enum Next {
    Frame(Result<Frame<Bytes>, BrokenOff>),
    /// Nothing for now that the client is to see.
    Hidden,
    End,
}

/// Takes the usage that weir has asked for out of a stream again.
#[derive(Default)]
struct Hiding {
    filter: UsageChunkFilter,
    /// What has come through the filter and not been asked for yet.
    passed: VecDeque<Bytes>,
}

impl Hiding {
    /// What was held back of an event that never ended is passed on as it is.
    fn ends(&mut self) {
        self.passed.extend(self.filter.finish());
    }
}

/// Of text in an answer whose tokens the gateway does not tell.
const BYTES_PER_TOKEN: u64 = 4;

/// What is read of an answer in passing.
struct Meter {
    format: Format,
    bytes: u64,
}

/// What an answer's body is.
enum Format {
    Events {
        scanner: Scanner,
        usage: Option<Usage>,
        begun: bool,
        /// Something has come that is no preamble, before any error.
        answered: bool,
        error: bool,
        /// Events that carry output, and how much.
        with_output: u64,
        text_bytes: u64,
    },
    /// A JSON document, whose usage stands near its end.
    Json(Tail),
    /// Nothing that could be read, or that anybody wants to know of.
    Opaque,
}

impl Format {
    /// What the head announces. An encoded body can't be read.
    fn of(head: &response::Parts) -> Self {
        if head.headers.contains_key(header::CONTENT_ENCODING) {
            return Self::Opaque;
        }
        if is_event_stream(head) {
            let scanner = Scanner::default();
            let (begun, answered, error) = (false, false, false);
            return Self::Events { scanner, usage: None, begun, answered, error, with_output: 0, text_bytes: 0 };
        }
        Self::Json(Tail::default())
    }
}

impl Meter {
    fn feed(&mut self, chunk: &[u8]) {
        self.bytes += chunk.len() as u64;
        match &mut self.format {
            Format::Events { scanner, usage, begun, answered, error, with_output, text_bytes } => {
                scanner.feed(chunk, |event| {
                    *begun = true;
                    *usage = match (*usage, usage::of_event(event.data)) {
                        (Some(earlier), Some(later)) => Some(earlier.merge(later)),
                        (earlier, later) => later.or(earlier),
                    };
                    *error |= envelope::is_error_event(event.name, event.data);
                    *answered = *answered || !*error && !is_preamble(event);
                    let text = output::text_bytes(event.data) as u64;
                    *with_output += u64::from(text > 0);
                    *text_bytes += text;
                });
            }
            Format::Json(tail) => tail.push(chunk),
            Format::Opaque => {}
        }
    }

    fn usage(&self, whole: bool) -> Option<Usage> {
        match &self.format {
            Format::Events { usage, .. } => *usage,
            // Where a document breaks off, nobody knows what its end would have been.
            Format::Json(tail) if whole => tail.usage(),
            Format::Json(_) | Format::Opaque => None,
        }
    }

    /// The tokens of what has come so far, as far as weir can tell: of a stream at least one for each event with output.
    fn output(&self) -> u64 {
        match &self.format {
            Format::Events { with_output, text_bytes, .. } => (text_bytes / BYTES_PER_TOKEN).max(*with_output),
            Format::Json(_) | Format::Opaque => self.bytes / BYTES_PER_TOKEN,
        }
    }

    /// Whether a stream's first event has come.
    fn has_begun(&self) -> bool {
        matches!(self.format, Format::Events { begun: true, .. })
    }

    /// Whether a stream has brought output, or the end of an answer without any.
    fn has_output(&self) -> bool {
        matches!(self.format, Format::Events { answered: true, .. })
    }

    fn saw_error(&self) -> bool {
        matches!(self.format, Format::Events { error: true, .. })
    }

    /// Whether a stream that has ended was no answer at all, and not an error either.
    fn saw_nothing(&self) -> bool {
        matches!(self.format, Format::Events { answered: false, error: false, .. }) && self.is_between_events()
    }

    fn is_between_events(&self) -> bool {
        matches!(&self.format, Format::Events { scanner, .. } if scanner.at_boundary())
    }
}

const EVENT_STREAM: &[u8] = b"text/event-stream";

/// Whether the answer is a stream of server-sent events that weir can read: an encoded one it can't.
pub fn is_event_stream(head: &response::Parts) -> bool {
    if head.headers.contains_key(header::CONTENT_ENCODING) {
        return false;
    }
    let Some(kind) = head.headers.get(header::CONTENT_TYPE) else { return false };
    let (name, rest) = kind.as_bytes().trim_ascii_start().split_at_checked(EVENT_STREAM.len()).unwrap_or_default();
    let is_whole = || matches!(rest.trim_ascii_start().first(), None | Some(b';'));
    name.eq_ignore_ascii_case(EVENT_STREAM) && is_whole() && kind.to_str().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_stream_is_known_by_its_type_alone_and_only_where_it_can_be_read() {
        let is_stream = |fields: &[(&str, &[u8])]| {
            let response = fields.iter().fold(http::Response::builder(), |it, (name, value)| it.header(*name, *value));
            is_event_stream(&response.body(()).expect("ok").into_parts().0)
        };
        for kind in
            ["text/event-stream", " Text/Event-Stream\t; charset=utf-8", "text/event-stream;", "TEXT/EVENT-STREAM \t"]
        {
            assert!(is_stream(&[("content-type", kind.as_bytes())]), "{kind:?}");
            assert!(!is_stream(&[("content-type", kind.as_bytes()), ("content-encoding", b"gzip")]), "{kind:?}");
        }
        let others: [&[u8]; 9] = [
            b"",
            b"application/json",
            b"text/event-strea",
            b"text/event-streams",
            b"text/event-stream x",
            b"text/event-stream, text/plain",
            b"x; text/event-stream",
            b"text/event-stream; charset=\xe9",
            b"\xe9",
        ];
        for kind in others {
            assert!(!is_stream(&[("content-type", kind)]), "{}", kind.escape_ascii());
        }
        assert!(!is_stream(&[]));
    }
}
