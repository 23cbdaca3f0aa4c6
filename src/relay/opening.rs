//! The beginning of an answer, read to judge it before any of it goes to the client.

use std::collections::VecDeque;

use bytes::Bytes;
use tokio::time::Instant;

use crate::openai::envelope;
use crate::openai::preamble::is_preamble;
use crate::openai::sse::{Event, Scanner};
use crate::upstream::{AnswerBody, WireError};

/// A stream that brings more than this before its first output goes on without having been judged.
const MAX_HELD: usize = 256 << 10;

/// So does one with that many events before it.
const MAX_EVENTS: usize = 64;

/// An error answer longer than this is passed on without being held, and so without being retried.
const MAX_ERROR: usize = 64 << 10;

/// The beginning of an answer that was read to judge it; the rest has yet to come.
#[derive(Debug, Default)]
pub struct Opening {
    pub(super) chunks: VecDeque<Bytes>,
    bytes: usize,
}

/// What a stream begins with.
#[derive(Debug)]
pub enum Beginning {
    /// Output, or the end of an answer that has none.
    Output,
    Error {
        /// It says that waiting won't help.
        hopeless: bool,
    },
    /// Neither yet, and weir holds no more.
    Undecided,
    /// Not even an event in the time there was.
    Silence,
    /// Neither: it has ended in good order before.
    Nothing,
    /// The connection broke before there was either.
    Broken(WireError),
}

/// What came of reading an error's body.
#[derive(Debug)]
pub enum WholeError {
    Whole(Vec<u8>),
    /// It is longer than weir holds, or takes longer.
    TooLong,
    Broken(WireError),
}

impl Opening {
    /// Reads a metered call's stream up to its first output or error, until `until` at the latest, and at most 64 events and
    /// 256 KiB of what comes before that.
    pub async fn first_output(&mut self, body: &mut AnswerBody, until: Instant) -> Beginning {
        self.beginning(body, until, MAX_EVENTS).await
    }

    /// Reads a stream whose API weir does not know up to its first event, until `until` at the latest.
    pub async fn first_event(&mut self, body: &mut AnswerBody, until: Instant) -> Beginning {
        match self.beginning(body, until, 1).await {
            // That may be all that there is to say.
            Beginning::Nothing => Beginning::Undecided,
            beginning => beginning,
        }
    }

    async fn beginning(&mut self, body: &mut AnswerBody, until: Instant, most_events: usize) -> Beginning {
        let mut scanner = Scanner::default();
        let (mut events, mut beginning) = (0, None);
        while beginning.is_none() && events < most_events && self.bytes < MAX_HELD {
            let Ok(next) = tokio::time::timeout_at(until, body.data()).await else {
                return if events == 0 { Beginning::Silence } else { Beginning::Undecided };
            };
            match next {
                Some(Ok(chunk)) => {
                    scanner.feed(&chunk, |event| {
                        events += 1;
                        beginning = beginning.take().or_else(|| beginning_of(event));
                    });
                    self.push(chunk);
                }
                Some(Err(error)) => return Beginning::Broken(error),
                None if scanner.at_boundary() => return Beginning::Nothing,
                // An event without its blank line: some read it all the same.
                None => break,
            }
        }
        beginning.unwrap_or(Beginning::Undecided)
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

/// What begins with this event; `None` where nothing does yet.
fn beginning_of(event: Event<'_>) -> Option<Beginning> {
    if envelope::is_error_event(event.name, event.data) {
        return Some(Beginning::Error { hopeless: envelope::is_hopeless(event.data) });
    }
    (!is_preamble(event)).then_some(Beginning::Output)
}
