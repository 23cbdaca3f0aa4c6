//! The body that plays an answer: event by event, each at its time, to its end or to its breaking point.
//!
//! An event is made when hyper asks for it, so a client that does not read holds back the answer and costs no memory.
//! The slot lives in here: it is given back with the last byte, or at once when the client hangs up and hyper drops
//! the body.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::fault::Fault;
use super::gate::Slot;

/// How long a fault stays silent when the client does not go: longer than any client should wait.
pub(super) const STALL: Duration = Duration::from_secs(600);

/// A moment in which hyper writes out what it has, before the connection is cut.
const LAST_GASP: Duration = Duration::from_millis(1);

/// A piece of the body that is written at once.
pub(super) struct Event {
    pub(super) bytes: Bytes,
    /// Whether it takes the time of a token; else it comes with the one before.
    pub(super) is_token: bool,
}

type Events = Box<dyn Iterator<Item = Event> + Send>;

enum Ending {
    Clean,
    Cut { after: Duration },
}

/// The end of a connection that a fault wants cut.
#[derive(Debug)]
pub(super) struct Cut;

pub(super) struct Script {
    events: Events,
    /// The event that comes next, known early so that the last one is known to be the last.
    next: Option<Event>,
    ending: Ending,
    /// The bytes still to come, where the head promises a length.
    remaining: Option<u64>,
    begun: Instant,
    per_token: Duration,
    tokens: u32,
    timer: Option<Pin<Box<Sleep>>>,
    slot: Option<Slot>,
}

impl Script {
    /// A document, at once. It breaks at the half, if it breaks.
    pub(super) fn document(text: String, fault: Option<Fault>, slot: Option<Slot>) -> Self {
        let mut second = Bytes::from(text);
        let length = second.len() as u64;
        let first = second.split_to(if fault.is_some() { second.len() / 2 } else { second.len() });
        let halves = [first, second].into_iter().filter(|half| !half.is_empty());
        let events = halves.map(|bytes| Event { bytes, is_token: false });
        Self { remaining: Some(length), ..Self::play(Box::new(events), fault, 1, Duration::ZERO, slot) }
    }

    /// A stream, one token every `per_token`. It breaks after `breaking_point` events, if it breaks.
    pub(super) fn stream(
        events: impl Iterator<Item = Event> + Send + 'static,
        fault: Option<Fault>,
        breaking_point: usize,
        per_token: Duration,
        slot: Slot,
    ) -> Self {
        Self::play(Box::new(events), fault, breaking_point, per_token, Some(slot))
    }

    fn play(
        events: Events,
        fault: Option<Fault>,
        breaking_point: usize,
        per_token: Duration,
        slot: Option<Slot>,
    ) -> Self {
        let (mut events, ending) = broken(events, fault, breaking_point);
        let next = events.next();
        let begun = Instant::now();
        Self { events, next, ending, remaining: None, begun, per_token, tokens: 0, timer: None, slot }
    }

    fn is_over(&self) -> bool {
        self.next.is_none() && matches!(self.ending, Ending::Clean)
    }

    fn finish(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.finish();
        }
    }

    fn poll_event(&mut self, event: Event, cx: &mut Context<'_>) -> Poll<Bytes> {
        if event.is_token {
            let due = self.begun + self.per_token.saturating_mul(self.tokens);
            if self.poll_until(due, cx).is_pending() {
                self.next = Some(event);
                return Poll::Pending;
            }
            self.tokens += 1;
        }
        self.next = self.events.next();
        if self.is_over() {
            // hyper may never ask again once it has the last byte.
            self.finish();
        }
        if let Some(remaining) = &mut self.remaining {
            *remaining -= event.bytes.len() as u64;
        }
        Poll::Ready(event.bytes)
    }

    fn poll_until(&mut self, due: Instant, cx: &mut Context<'_>) -> Poll<()> {
        if self.timer.is_none() && due <= Instant::now() {
            return Poll::Ready(());
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        ready!(timer.as_mut().poll(cx));
        self.timer = None;
        Poll::Ready(())
    }

    fn poll_cut(&mut self, after: Duration, cx: &mut Context<'_>) -> Poll<Cut> {
        ready!(self.poll_until(Instant::now() + after, cx));
        self.finish();
        Poll::Ready(Cut)
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        if let Some(event) = self.next.take() {
            return self.poll_event(event, cx).map(|bytes| Some(Ok(Frame::data(bytes))));
        }
        match self.ending {
            Ending::Clean => Poll::Ready(None),
            Ending::Cut { after } => self.poll_cut(after, cx).map(|cut| Some(Err(cut))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// The events up to the breaking point of a fault that strikes within the answer, and what comes then.
fn broken(events: Events, fault: Option<Fault>, breaking_point: usize) -> (Events, Ending) {
    let whole = |events: Events| -> Events { Box::new(events.take(breaking_point)) };
    match fault {
        Some(Fault::TruncatedStream) => (whole(events), Ending::Clean),
        Some(Fault::ResetInAnswer) => (whole(events), Ending::Cut { after: LAST_GASP }),
        Some(Fault::StallInAnswer) => (whole(events), Ending::Cut { after: STALL }),
        Some(Fault::CutEvent) => {
            let halve = move |(nth, event)| if nth == breaking_point { half(event) } else { event };
            (Box::new(events.enumerate().take(breaking_point + 1).map(halve)), Ending::Cut { after: LAST_GASP })
        }
        _ => (events, Ending::Clean),
    }
}

fn half(event: Event) -> Event {
    Event { bytes: event.bytes.slice(..event.bytes.len() / 2), ..event }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a fault cut the connection")
    }
}

impl std::error::Error for Cut {}
