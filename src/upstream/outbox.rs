//! What is still to be written of a request: its head and body, or the part of the body that has come so far.

use std::io::{self, IoSlice, Write as _};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Body as _;
use tokio::io::AsyncWrite;

use super::head::Outgoing;
use super::payload::{BodyFault, Payload};

/// A body, or a piece of one, up to this is copied behind what is written before it; a longer one is written from where it
/// is.
const MAX_COPIED: usize = 16 << 10;

/// A request on its way out. An empty one has nothing to write.
#[derive(Default)]
pub struct Outbox {
    /// Written first, from `at` on: the head, and what is short.
    buffer: Vec<u8>,
    at: usize,
    /// Written behind it.
    behind: Bytes,
    /// Where more comes from.
    source: Option<Source>,
    /// The whole body, until something was written.
    whole: Option<Bytes>,
    /// Something was written.
    begun: bool,
    state: State,
}

/// A body that is sent while it comes. It is a [`Payload`] to be given back as one.
struct Source {
    body: Payload,
    /// How many chunks were begun; `None` where the head has told the length.
    chunks: Option<u64>,
}

#[derive(Default)]
enum State {
    Open,
    #[default]
    Done,
    /// The gateway takes no more.
    Failed(Option<io::Error>),
}

enum WriteError {
    Io(io::Error),
    Body(BodyFault),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Outbox {
    /// A request, of which nothing was written.
    pub fn new(outgoing: &Outgoing, payload: Payload) -> Self {
        let empty = Self { state: State::Open, ..Self::default() };
        match payload {
            Payload::Whole(bytes) if bytes.len() <= MAX_COPIED => {
                let mut buffer = outgoing.head(Some(bytes.len() as u64), bytes.len());
                buffer.extend_from_slice(&bytes);
                Self { buffer, whole: Some(bytes), ..empty }
            }
            Payload::Whole(bytes) => {
                let buffer = outgoing.head(Some(bytes.len() as u64), 0);
                Self { buffer, behind: bytes.clone(), whole: Some(bytes), ..empty }
            }
            Payload::Streamed(_) => {
                let length = payload.size_hint().exact();
                let source = Source { body: payload, chunks: length.is_none().then_some(0) };
                Self { buffer: outgoing.head(length, 0), source: Some(source), ..empty }
            }
        }
    }

    /// Whether all of it was written.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Why the gateway takes no more, told once.
    pub fn take_failure(&mut self) -> Option<io::Error> {
        if let State::Failed(error) = &mut self.state { error.take() } else { None }
    }

    /// The body, where nothing of the request was written.
    pub fn take_unsent(&mut self) -> Option<Payload> {
        let whole = self.whole.take().map(Payload::Whole);
        let body = whole.or_else(|| self.source.take().map(|source| source.body));
        body.filter(|_| !self.begun)
    }

    /// Writes as much as can be written now, and has the task woken when there is more. A gateway that takes no more may have
    /// answered, so that is no error here; nothing more is written then, and it is never done.
    ///
    /// # Errors
    /// The client's body broke off.
    pub fn poll(&mut self, io: &mut (impl AsyncWrite + Unpin), cx: &mut Context<'_>) -> Result<(), BodyFault> {
        if !matches!(self.state, State::Open) {
            return Ok(());
        }
        match self.poll_write(io, cx) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => *self = Self::default(),
            Poll::Ready(Err(WriteError::Io(error))) => self.fail(Some(error)),
            Poll::Ready(Err(WriteError::Body(fault))) => {
                self.fail(None);
                return Err(fault);
            }
        }
        Ok(())
    }

    fn fail(&mut self, error: Option<io::Error>) {
        self.state = State::Failed(error);
        (self.buffer, self.behind) = (Vec::new(), Bytes::new());
    }

    fn poll_write(&mut self, io: &mut (impl AsyncWrite + Unpin), cx: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        loop {
            while self.at < self.buffer.len() || !self.behind.is_empty() {
                let written = ready!(self.poll_write_once(io, cx))?;
                self.advance(written)?;
            }
            let Some(source) = &mut self.source else {
                ready!(Pin::new(io).poll_flush(cx))?;
                return Poll::Ready(Ok(()));
            };
            let Poll::Ready(frame) = Pin::new(&mut source.body).poll_frame(cx) else {
                // What has come so far need not wait for the rest.
                ready!(Pin::new(io).poll_flush(cx))?;
                return Poll::Pending;
            };
            match frame.transpose().map_err(WriteError::Body)? {
                // Trailers end here: the gateway has not asked for any.
                Some(frame) => frame.into_data().into_iter().for_each(|data| self.queue(data)),
                None => self.end(),
            }
        }
    }

    fn poll_write_once(&self, io: &mut (impl AsyncWrite + Unpin), cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let first = &self.buffer[self.at..];
        match (first.is_empty(), self.behind.is_empty()) {
            (_, true) => Pin::new(io).poll_write(cx, first),
            (true, false) => Pin::new(io).poll_write(cx, &self.behind),
            (false, false) => Pin::new(io).poll_write_vectored(cx, &[IoSlice::new(first), IoSlice::new(&self.behind)]),
        }
    }

    fn advance(&mut self, written: usize) -> io::Result<()> {
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        (self.begun, self.whole) = (true, None);
        let of_buffer = written.min(self.buffer.len() - self.at);
        self.at += of_buffer;
        if self.at == self.buffer.len() {
            self.buffer.clear();
            self.at = 0;
        }
        let _written = self.behind.split_to(written - of_buffer);
        Ok(())
    }

    /// Frames a piece of the body.
    fn queue(&mut self, data: Bytes) {
        let Some(Source { chunks, .. }) = &mut self.source else { return };
        if data.is_empty() {
            // An empty chunk would be the last.
            return;
        }
        if let Some(chunks) = chunks {
            *chunks += 1;
            // The line end of the chunk before comes with it.
            let line_end = if *chunks > 1 { "\r\n" } else { "" };
            write!(self.buffer, "{line_end}{:x}\r\n", data.len()).expect("a vector takes everything");
        }
        if data.len() <= MAX_COPIED {
            self.buffer.extend_from_slice(&data);
        } else {
            self.behind = data;
        }
    }

    fn end(&mut self) {
        let last: &[u8] = match self.source.take().and_then(|source| source.chunks) {
            None => b"",
            Some(0) => b"0\r\n\r\n",
            Some(_) => b"\r\n0\r\n\r\n",
        };
        self.buffer.extend_from_slice(last);
    }
}
