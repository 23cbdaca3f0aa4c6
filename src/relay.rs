//! The answer's way back: bytes pass as they came, and on the way they are counted.
//!
//! [`Relay`] is the body of the response that the client gets. It owns the [`Permit`] and the [`Ledger`], so that the slot is
//! given back and the account closed exactly once: when the answer ends, breaks off, or is dropped because the client went
//! away.

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
use crate::error::Cause;
use crate::ledger::Ledger;
use crate::metrics::{AttemptResult, Outcome};
use crate::openai::call::Endpoint;
use crate::openai::envelope;
use crate::openai::sse::Scanner;
use crate::openai::usage::{self, Tail, Usage};
use crate::retry;
use crate::upstream::AnswerBody;

/// A stream whose first event is longer than this begins without having been looked at.
const MAX_HELD: usize = 256 << 10;

/// An error answer longer than this is passed on without being held, and so without being retried.
const MAX_ERROR: usize = 64 << 10;

/// The beginning of an answer that was read to judge it, and the rest that has yet to come.
#[derive(Debug, Default)]
pub struct Opening {
    chunks: VecDeque<Bytes>,
    bytes: usize,
}

/// What a stream begins with.
#[derive(Debug)]
pub enum FirstEvent {
    Output,
    Error,
    /// None at all, or none within what weir holds.
    Unknown,
    /// None yet.
    Late,
    /// The connection broke before there was one.
    Broken(hyper::Error),
}

/// What came of reading an error's body.
#[derive(Debug)]
pub enum WholeError {
    Whole(Vec<u8>),
    /// It is longer than weir holds, or takes longer.
    TooLong,
    Broken(hyper::Error),
}

impl Opening {
    /// Reads a stream up to its first event, for as long as `until`.
    pub async fn first_event(&mut self, body: &mut AnswerBody, until: Instant) -> FirstEvent {
        let mut scanner = Scanner::default();
        let mut first = None;
        while first.is_none() && self.bytes < MAX_HELD {
            let Ok(next) = tokio::time::timeout_at(until, body.data()).await else { return FirstEvent::Late };
            match next {
                Some(Ok(chunk)) => {
                    scanner.feed(&chunk, |event| {
                        first.get_or_insert(envelope::is_error_event(event.name, event.data));
                    });
                    self.push(chunk);
                }
                Some(Err(error)) => return FirstEvent::Broken(error),
                None => break,
            }
        }
        match first {
            Some(true) => FirstEvent::Error,
            Some(false) => FirstEvent::Output,
            None => FirstEvent::Unknown,
        }
    }

    /// Reads an error's whole body, if it is short and comes by `until`.
    pub async fn whole_error(&mut self, body: &mut AnswerBody, until: Instant) -> WholeError {
        while self.bytes <= MAX_ERROR {
            match tokio::time::timeout_at(until, body.data()).await {
                Ok(Some(Ok(chunk))) => self.push(chunk),
                Ok(Some(Err(error))) => return WholeError::Broken(error),
                Ok(None) => return WholeError::Whole(self.chunks.iter().flatten().copied().collect()),
                Err(_) => break,
            }
        }
        WholeError::TooLong
    }

    fn push(&mut self, chunk: Bytes) {
        self.bytes += chunk.len();
        self.chunks.push_back(chunk);
    }
}

/// How long an answer may be silent.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Between two chunks.
    pub idle: Duration,
    /// By when a stream has to have its first event, and what it is otherwise.
    pub first_event: Option<(Instant, Cause)>,
}

/// The body of a proxied response.
pub struct Relay {
    opening: Opening,
    /// `None` where all of it is in `opening`, or when it has ended.
    rest: Option<AnswerBody>,
    permit: Option<Permit>,
    ledger: Ledger,
    status: StatusCode,
    endpoint: Option<Endpoint>,
    meter: Meter,
    patience: Patience,
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
    /// Takes over an answer. `permit` is absent where the whole answer is in `opening` already.
    pub fn new(
        head: &response::Parts,
        opening: Opening,
        rest: Option<AnswerBody>,
        permit: Option<Permit>,
        ledger: Ledger,
        endpoint: Option<Endpoint>,
        patience: Patience,
    ) -> Self {
        let meter = if endpoint.is_some() && head.status.is_success() { Meter::of(head) } else { Meter::None };
        let (status, quiet_since) = (head.status, Instant::now());
        let mut relay =
            Self { opening, rest, permit, ledger, status, endpoint, meter, patience, quiet_since, alarm: None };
        relay.end_if_whole();
        relay
    }

    /// Ends the account as soon as nothing more is to come: hyper need not ask again once the declared length is met.
    fn end_if_whole(&mut self) {
        if self.opening.chunks.is_empty() && self.rest.as_ref().is_none_or(AnswerBody::is_end_stream) {
            let (result, outcome) = match retry::result_of(self.status) {
                AttemptResult::Ok if self.meter.saw_error() => (AttemptResult::StreamError, Outcome::UpstreamError),
                AttemptResult::Ok => (AttemptResult::Ok, Outcome::Ok),
                AttemptResult::ClientError => (AttemptResult::ClientError, Outcome::ClientError),
                result => (result, Outcome::UpstreamError),
            };
            self.end(result, outcome);
        }
    }

    fn end(&mut self, result: AttemptResult, outcome: Outcome) {
        if let Some(usage) = self.meter.usage() {
            self.ledger.used(usage);
        }
        self.meter = Meter::None;
        self.ledger.attempt_ends(result);
        self.ledger.close(outcome);
        self.opening.chunks.clear();
        self.rest = None;
        self.permit = None;
        self.alarm = None;
    }

    fn pass(&mut self, chunk: Bytes) -> Frame<Bytes> {
        if self.meter.feed(&chunk) {
            self.ledger.first_event();
            self.patience.first_event = None;
        }
        self.end_if_whole();
        Frame::data(chunk)
    }

    /// The answer breaks off. A stream between two events can still say so; anything else is cut.
    fn break_off(&mut self, result: AttemptResult, cause: Cause, why: String) -> Result<Frame<Bytes>, BrokenOff> {
        let open_ended = self.rest.as_ref().is_some_and(|rest| rest.size_hint().exact().is_none());
        let says_so = open_ended && self.meter.is_between_events();
        tracing::warn!(error = %why, "an answer broke off");
        self.end(result, Outcome::UpstreamError);
        if says_so {
            let event = envelope::event(self.endpoint, cause.code(), &why);
            return Ok(Frame::data(event));
        }
        Err(BrokenOff(why))
    }

    /// How long the answer has to stay silent from now to be given up, and why.
    fn limit(&self) -> (Instant, Cause) {
        match self.patience.first_event {
            Some(first_event) => first_event,
            None => (self.quiet_since + self.patience.idle, Cause::IdleTimeout),
        }
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
        if let Some(chunk) = relay.opening.chunks.pop_front() {
            return Poll::Ready(Some(Ok(relay.pass(chunk))));
        }
        let Some(rest) = &mut relay.rest else { return Poll::Ready(None) };
        match rest.poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                relay.quiet_since = Instant::now();
                let frame = match frame.into_data() {
                    Ok(chunk) => relay.pass(chunk),
                    Err(trailers) => trailers,
                };
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                let why = format!("the gateway broke the answer off: {error}");
                Poll::Ready(Some(relay.break_off(AttemptResult::Reset, Cause::Disconnected, why)))
            }
            Poll::Ready(None) => {
                relay.rest = None;
                relay.end_if_whole();
                Poll::Ready(None)
            }
            Poll::Pending => {
                let cause = ready!(relay.poll_alarm(cx));
                let why = "the gateway sent nothing more for too long".to_owned();
                Poll::Ready(Some(relay.break_off(AttemptResult::Timeout, cause, why)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.opening.chunks.is_empty() && self.rest.as_ref().is_none_or(AnswerBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let held: usize = self.opening.chunks.iter().map(Bytes::len).sum();
        let rest = self.rest.as_ref().map_or(Some(0), |rest| rest.size_hint().exact());
        rest.map_or_else(SizeHint::default, |rest| SizeHint::with_exact(held as u64 + rest))
    }
}

/// What is read of an answer in passing.
enum Meter {
    /// A stream of events.
    Events { scanner: Scanner, usage: Option<Usage>, begun: bool, error: bool },
    /// A JSON document, whose usage stands near its end.
    Json(Tail),
    /// Nothing.
    None,
}

impl Meter {
    /// What the head announces. An encoded body can't be read.
    fn of(head: &response::Parts) -> Self {
        if head.headers.contains_key(header::CONTENT_ENCODING) {
            return Self::None;
        }
        if is_event_stream(head) {
            return Self::Events { scanner: Scanner::default(), usage: None, begun: false, error: false };
        }
        Self::Json(Tail::default())
    }

    /// Reads a chunk; `true` when a stream's first event ends in it.
    fn feed(&mut self, chunk: &[u8]) -> bool {
        match self {
            Self::Events { scanner, usage: total, begun, error } => {
                let before = *begun;
                scanner.feed(chunk, |event| {
                    *begun = true;
                    if let Some(told) = usage::find(event.data) {
                        *total = Some(total.unwrap_or_default().merge(told));
                    }
                    *error |= envelope::is_error_event(event.name, event.data);
                });
                *begun && !before
            }
            Self::Json(tail) => {
                tail.push(chunk);
                false
            }
            Self::None => false,
        }
    }

    fn usage(&self) -> Option<Usage> {
        match self {
            Self::Events { usage, .. } => *usage,
            Self::Json(tail) => tail.usage(),
            Self::None => None,
        }
    }

    fn saw_error(&self) -> bool {
        matches!(self, Self::Events { error: true, .. })
    }

    fn is_between_events(&self) -> bool {
        matches!(self, Self::Events { scanner, .. } if scanner.at_boundary())
    }
}

/// Whether the answer is a stream of server-sent events that weir can read: an encoded one it can't.
pub fn is_event_stream(head: &response::Parts) -> bool {
    if head.headers.contains_key(header::CONTENT_ENCODING) {
        return false;
    }
    let kind = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
}
