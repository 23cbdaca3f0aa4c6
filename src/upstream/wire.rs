//! One HTTP/1.1 connection to the gateway, driven by the task whose request it carries.
//!
//! hyper's client drives each connection in a task of its own, with channels to it and two buffers that stay: some 30 KiB
//! for each open stream, and two wake-ups more for each piece of an answer (docs/benchmarks.md). Here the request's own
//! task reads and writes, and a connection that waits holds no buffer at all: what comes is read into one buffer of the
//! thread's, and copied from there in its true size.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::{StatusCode, response};
use http_body::{Frame, SizeHint};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::task::unconstrained;

use super::chunked::ChunkedDecoder;
use super::connect::Io;
use super::head::{AnswerHead, Framing, Outgoing, Taken, take_head};
use super::outbox::Outbox;
use super::payload::Payload;
use super::wire_error::WireError;

/// What is read at once.
const READ_SIZE: usize = 32 << 10;

thread_local! {
    /// Where every connection of this thread reads to; nothing stays in it between two reads.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_SIZE].into());
}

/// A connection, and what of the request it carries is still to be written.
pub struct Wire {
    io: Io,
    outbox: Outbox,
    /// What was read behind an answer's head, or of a head that is not whole.
    unread: Bytes,
    /// It can carry another request when this answer was read.
    keep_alive: bool,
}

/// What remains of an answer's body.
#[derive(Debug)]
pub enum Reader {
    Length(u64),
    Chunked(ChunkedDecoder),
    UntilClose,
}

/// An attempt that brought no answer.
pub struct Unanswered {
    pub error: WireError,
    /// The body, where nothing at all was written.
    pub unsent: Option<Payload>,
    /// Not a byte of an answer had come.
    pub silent: bool,
}

impl Wire {
    /// A new connection.
    pub fn new(io: Io) -> Self {
        Self { io, outbox: Outbox::default(), unread: Bytes::new(), keep_alive: true }
    }

    /// Whether the gateway has neither closed it nor sent anything since its last answer, as far as the runtime has heard:
    /// that takes no system call. Once it was not quiet, it never is again.
    pub fn is_quiet(&mut self) -> bool {
        let mut byte = [0];
        let read = poll_fn(|cx| Pin::new(&mut self.io).poll_read(cx, &mut ReadBuf::new(&mut byte)));
        // A task that has had its turn is told of nothing, as if there were nothing; hence without that bound.
        let waits = pin!(unconstrained(read)).poll(&mut Context::from_waker(Waker::noop())).is_pending();
        // The byte is lost, and with it where an answer would begin.
        self.keep_alive &= waits;
        self.keep_alive
    }

    /// Whether it can carry another request, once its answer was read to the end.
    pub fn may_be_reused(&self) -> bool {
        self.keep_alive && self.outbox.is_done() && self.unread.is_empty()
    }

    /// Sends a request, and reads the head of its answer. What is left of the body then is sent while the answer is read.
    ///
    /// # Errors
    /// No answer came; the connection is of no more use.
    pub async fn exchange(
        &mut self,
        outgoing: &Outgoing,
        payload: Payload,
    ) -> Result<(response::Parts, Reader), Unanswered> {
        self.outbox = Outbox::new(outgoing, payload);
        if !self.is_quiet() {
            return Err(Unanswered { error: WireError::Closed, unsent: self.outbox.take_unsent(), silent: true });
        }
        let mut receiving = Receiving::default();
        let answered = poll_fn(|cx| {
            self.outbox.poll(&mut self.io, cx).map_err(WireError::Upload)?;
            self.poll_head(&mut receiving, outgoing, cx)
        });
        match answered.await {
            Ok(head) => {
                self.keep_alive = head.keep_alive;
                Ok((head.parts, Reader::new(head.framing)))
            }
            Err(error) => {
                let error = match (error, self.outbox.take_failure()) {
                    // What could not be written says more than the end that was read thereafter.
                    (WireError::Closed | WireError::Truncated | WireError::Io(_), Some(failure)) => failure.into(),
                    (error, _) => error,
                };
                Err(Unanswered { error, unsent: self.outbox.take_unsent(), silent: !receiving.begun })
            }
        }
    }

    fn poll_head(
        &mut self,
        receiving: &mut Receiving,
        outgoing: &Outgoing,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Box<AnswerHead>, WireError>> {
        loop {
            if receiving.is_worth_parsing(&self.unread) {
                match take_head(std::mem::take(&mut self.unread), outgoing.method())? {
                    Taken::Partial(read) => {
                        receiving.parsed = read.len();
                        self.unread = read;
                    }
                    Taken::Whole(head, rest) => {
                        self.unread = rest;
                        if !is_interim(head.parts.status) {
                            return Poll::Ready(Ok(head));
                        }
                        // It is dropped: hyper has no way to pass it on.
                        *receiving = Receiving { begun: true, ..Receiving::default() };
                        continue;
                    }
                }
            }
            let more = ready!(self.poll_read(cx, Bytes::copy_from_slice))?;
            if more.is_empty() {
                return Poll::Ready(Err(if receiving.begun { WireError::Truncated } else { WireError::Closed }));
            }
            receiving.begun = true;
            if self.unread.is_empty() {
                self.unread = more;
            } else {
                let mut both = Vec::from(std::mem::take(&mut self.unread));
                both.extend_from_slice(&more);
                self.unread = both.into();
            }
        }
    }

    /// Reads once, and hands what has come to `take`: nothing, where the gateway has closed its side.
    fn poll_read<T>(&mut self, cx: &mut Context<'_>, take: impl FnOnce(&[u8]) -> T) -> Poll<io::Result<T>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut read = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
            Poll::Ready(Ok(take(read.filled())))
        })
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("keep_alive", &self.keep_alive).finish_non_exhaustive()
    }
}

/// A 101 is the last of its kind: nothing that follows it is HTTP.
fn is_interim(status: StatusCode) -> bool {
    status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
}

/// How far the reading of a head has come.
#[derive(Default)]
struct Receiving {
    /// Something has come, be it of an interim answer (100, 102, 103).
    begun: bool,
    /// How much was parsed in vain.
    parsed: usize,
    /// In how much the end was looked for.
    searched: usize,
}

impl Receiving {
    /// A head that drips in is not parsed again with each byte: only where its end may have come, or it has doubled.
    fn is_worth_parsing(&mut self, unread: &[u8]) -> bool {
        let new = &unread[self.searched.saturating_sub(2)..];
        self.searched = unread.len();
        let ends = || new.windows(2).any(|pair| pair == b"\n\n") || new.windows(3).any(|three| three == b"\n\r\n");
        !unread.is_empty() && (unread.len() >= 2 * self.parsed || ends())
    }
}

impl Reader {
    const END: Self = Self::Length(0);

    fn new(framing: Framing) -> Self {
        match framing {
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(ChunkedDecoder::default()),
            Framing::UntilClose => Self::UntilClose,
        }
    }

    /// Whether all of it was read.
    pub fn is_done(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(decoder) => decoder.is_done() && !decoder.has_trailers(),
            Self::UntilClose => false,
        }
    }

    /// Whether what was read is an error, which comes next.
    fn is_malformed(&self) -> bool {
        matches!(self, Self::Chunked(decoder) if decoder.is_malformed())
    }

    /// How much is to come, where that is known.
    pub fn size_hint(&self) -> SizeHint {
        match self {
            Self::Length(left) => SizeHint::with_exact(*left),
            Self::Chunked(_) if self.is_done() => SizeHint::with_exact(0),
            Self::Chunked(_) | Self::UntilClose => SizeHint::default(),
        }
    }

    /// The next piece of the body, `None` behind the last. What has come of several chunks is one piece.
    pub fn poll_frame(
        &mut self,
        wire: &mut Wire,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, WireError>>> {
        // Should the client's body break off now: the answer has begun, and is passed on for as long as it comes.
        let _ = wire.outbox.poll(&mut wire.io, cx);
        if let Self::Chunked(decoder) = self
            && let Some(trailers) = decoder.take_trailers()
        {
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        while !self.is_done() {
            let data = match std::mem::take(&mut wire.unread) {
                unread if unread.is_empty() && self.is_malformed() => self.take(unread),
                unread if unread.is_empty() => ready!(wire.poll_read(cx, |read| self.take_from(read)))?,
                unread => self.take(unread),
            };
            let Taking { data, surplus } = data?;
            // What comes behind an answer that has ended was not asked for.
            wire.keep_alive &= !surplus;
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            if let Self::Chunked(decoder) = self
                && let Some(trailers) = decoder.take_trailers()
            {
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
        }
        Poll::Ready(None)
    }

    /// Takes what has just been read.
    fn take_from(&mut self, read: &[u8]) -> Result<Taking, WireError> {
        match self {
            Self::UntilClose if read.is_empty() => {
                *self = Self::END;
                Ok(Taking { data: Bytes::new(), surplus: false })
            }
            _ if read.is_empty() => Err(WireError::Truncated),
            Self::Chunked(decoder) => Taking::decoded(decoder, read),
            Self::Length(_) | Self::UntilClose => self.take(Bytes::copy_from_slice(read)),
        }
    }

    fn take(&mut self, mut read: Bytes) -> Result<Taking, WireError> {
        match self {
            Self::UntilClose => Ok(Taking { data: read, surplus: false }),
            Self::Chunked(decoder) => Taking::decoded(decoder, &read),
            Self::Length(left) => {
                let surplus = read.len() as u64 > *left;
                if surplus {
                    read.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                }
                *left -= read.len() as u64;
                Ok(Taking { data: read, surplus })
            }
        }
    }
}

/// What was taken of the bytes that have come.
struct Taking {
    data: Bytes,
    /// There was more than belongs to the answer.
    surplus: bool,
}

impl Taking {
    fn decoded(decoder: &mut ChunkedDecoder, read: &[u8]) -> Result<Self, WireError> {
        let mut data = Vec::with_capacity(read.len());
        let used = decoder.decode(read, &mut data)?;
        Ok(Self { data: data.into(), surplus: used < read.len() })
    }
}

#[cfg(test)]
mod tests;
