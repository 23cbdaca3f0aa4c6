//! The client's side of a connection: deadlines that hyper does not keep, and a word for what hyper answers without one.
//!
//! hyper has no limit on how slowly a head comes (but one that is the keep-alive limit too), none while it detects the
//! protocol, and none on a client that stops reading. All of them are kept here, on the bytes: [`Edge`] wraps the
//! connection's IO and fails it when the client has kept it waiting for too long.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::error::{Cause, Failure};
use crate::metrics::{Guard, Metrics};
use crate::upstream::connect::Transport;

/// A client's connection, as bytes.
pub trait ClientIo: AsyncRead + AsyncWrite + Unpin {
    /// From now on a close is a reset: nobody takes it for the end of what was sent. What is on its way may be lost with it.
    fn close_with_reset(&self) {}
}

impl ClientIo for TcpStream {
    fn close_with_reset(&self) {
        // Where that fails the client has gone.
        let _ = self.set_zero_linger();
    }
}

/// TLS tells by itself whether it has ended in order; a unix socket can't tell.
impl ClientIo for Box<dyn Transport + '_> {}

/// In memory.
impl ClientIo for DuplexStream {}

/// How slow a client may be.
#[derive(Debug, Clone, Copy)]
pub struct EdgeLimits {
    /// From a head's first byte to its last; for a new connection, from its start.
    pub header: Duration,
    /// Without a request.
    pub keep_alive: Duration,
    /// Without reading.
    pub write: Duration,
}

const TARGET_TOO_LONG: &str = "the request's target is too long";

/// What a client begins an HTTP/2 connection with (RFC 9113, 3.4).
const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Http2,
}

/// What the requests on a connection tell the IO beneath them.
#[derive(Debug)]
pub struct Activity {
    /// Requests begun and ended, in one number: `begun << 32 | ended`, so that they are read together.
    requests: AtomicU64,
    /// Bytes without a request are then not the beginning of a head, but frames of any kind.
    http2: AtomicBool,
    /// The drain has begun: the next answer ends a connection of HTTP/1.
    last: AtomicBool,
    /// An answer is under way that has no end but its connection's.
    open_ended: AtomicBool,
    /// When the last request ended; at first, when the connection began.
    idle_since: Mutex<Instant>,
}

/// A request that is being served; it ends when this is dropped.
#[derive(Debug)]
pub struct ActiveRequest(Arc<Activity>);

impl Default for Activity {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(0),
            http2: AtomicBool::new(false),
            last: AtomicBool::new(false),
            open_ended: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
        }
    }
}

impl Activity {
    /// A request's head has come.
    pub fn begin(self: &Arc<Self>, http2: bool) -> ActiveRequest {
        self.http2.store(http2, Ordering::Relaxed);
        self.requests.fetch_add(1 << 32, Ordering::AcqRel);
        ActiveRequest(Arc::clone(self))
    }

    /// From now on a request is its connection's last ([`ActiveRequest::is_last`]).
    pub fn end_with_next_answer(&self) {
        self.last.store(true, Ordering::Relaxed);
    }

    /// Since when no request has been served; `None` while one is.
    pub fn idle_since(&self) -> Option<Instant> {
        (self.begun_and_active().1 == 0).then(|| self.last_ended())
    }

    /// Requests begun, and those not ended.
    fn begun_and_active(&self) -> (u64, u64) {
        let both = self.requests.load(Ordering::Acquire);
        let (begun, ended) = (both >> 32, both & 0xffff_ffff);
        (begun, begun.wrapping_sub(ended) & 0xffff_ffff)
    }

    /// When the last request ended, or the connection began.
    fn last_ended(&self) -> Instant {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ActiveRequest {
    /// Whether its answer has to say that the connection ends with it.
    pub fn is_last(&self) -> bool {
        self.0.last.load(Ordering::Relaxed)
    }

    /// Its answer has no end but the connection's, and is under way; or it has ended.
    pub fn set_open_ended(&self, under_way: bool) {
        self.0.open_ended.store(under_way, Ordering::Relaxed);
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        *self.0.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        // The lower half may overflow into the upper one after four billion requests on one connection; both are only
        // compared, so that such a connection may at worst be closed once while idle.
        self.0.requests.fetch_add(1, Ordering::AcqRel);
    }
}

/// A client's connection with deadlines.
pub struct Edge<I: ClientIo> {
    io: I,
    /// Read to find out the protocol, and not yet read by hyper.
    beginning: Vec<u8>,
    activity: Arc<Activity>,
    limits: EdgeLimits,
    /// When the first byte of a head was read, and how many requests had begun before it.
    head_since: (u64, Instant),
    read_alarm: Alarm,
    write_alarm: Alarm,
    /// Where a limit that bites is counted: those of clients are, an operator's are not.
    metrics: Option<Arc<Metrics>>,
    /// A limit has ended it, and that was counted.
    cut: bool,
}

impl<I: ClientIo> Edge<I> {
    /// Wraps a new connection.
    pub fn new(io: I, activity: Arc<Activity>, limits: EdgeLimits, metrics: Option<Arc<Metrics>>) -> Self {
        Self {
            io,
            beginning: Vec::new(),
            activity,
            limits,
            // A new connection has its first head to send, from the start.
            head_since: (0, Instant::now()),
            read_alarm: Alarm::default(),
            write_alarm: Alarm::default(),
            metrics,
            cut: false,
        }
    }

    /// Finds out by its first bytes what the client speaks. They can be read again.
    ///
    /// # Errors
    /// The connection broke or was closed, or nothing came in time.
    pub async fn detect(&mut self) -> io::Result<Protocol> {
        let mut beginning = Vec::with_capacity(HTTP2_PREFACE.len());
        while HTTP2_PREFACE.starts_with(&beginning) && beginning.len() < HTTP2_PREFACE.len() {
            let mut room = [0; HTTP2_PREFACE.len()];
            let mut read = ReadBuf::new(&mut room[beginning.len()..]);
            poll_fn(|cx| Pin::new(&mut *self).poll_read(cx, &mut read)).await?;
            if read.filled().is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            beginning.extend_from_slice(read.filled());
        }
        let protocol = if beginning == HTTP2_PREFACE { Protocol::Http2 } else { Protocol::Http1 };
        self.beginning = beginning;
        Ok(protocol)
    }

    /// By when something has to be read, and what bites then, if it is more than the end of an idle connection; `None` while
    /// a request is being served.
    fn read_deadline(&self) -> Option<(Instant, Option<Guard>)> {
        match self.activity.begun_and_active() {
            (begun, 0) if begun == self.head_since.0 => {
                Some((self.head_since.1 + self.limits.header, Some(Guard::HeaderTimeout)))
            }
            (_, 0) => Some((self.activity.last_ended() + self.limits.keep_alive, None)),
            _ => None,
        }
    }

    /// A limit ends the connection. It is counted once, however often hyper asks.
    fn bites(&mut self, guard: Guard) {
        if !std::mem::replace(&mut self.cut, true) {
            self.count(guard);
        }
    }

    fn count(&self, guard: Guard) {
        self.metrics.iter().for_each(|metrics| metrics.guard(guard));
    }

    /// A write is pending; this fails when it has been for too long.
    fn poll_unread<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let error = ready!(self.write_alarm.poll_after(self.limits.write, cx));
        self.bites(Guard::WriteTimeout);
        Poll::Ready(Err(error))
    }

    /// Notes the first byte of a head.
    fn note_read(&mut self) {
        let (begun, active) = self.activity.begun_and_active();
        if active == 0 && begun != self.head_since.0 && !self.activity.http2.load(Ordering::Relaxed) {
            self.head_since = (begun, Instant::now());
        }
    }

    fn replay(&mut self, buf: &mut ReadBuf<'_>) {
        let part = self.beginning.len().min(buf.remaining());
        buf.put_slice(&self.beginning[..part]);
        self.beginning.drain(..part);
        if self.beginning.is_empty() {
            self.beginning = Vec::new();
        }
    }

    /// hyper answers what it can't parse with a bare status, before any request of ours: those bytes are replaced by an
    /// answer that says what is wrong.
    fn own_words(&self, bytes: &[u8]) -> Option<Failure> {
        let status = bytes.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
        // What came from the proxy may be written after its request has ended: a head has more fields than hyper's own, and
        // the end of a body does not look like one.
        if self.activity.begun_and_active().1 > 0 || !is_hypers(bytes) {
            return None;
        }
        let failure = match status {
            b"400" => Failure::new(
                Cause::BadRequest,
                "this is not an HTTP request that weir can read: its first line, a header or its framing is malformed",
            ),
            b"414" => Failure::new(Cause::BadRequest, TARGET_TOO_LONG),
            b"431" => {
                Failure::new(Cause::HeadersTooLarge, "the request's head is too long, or has more than 100 fields")
            }
            _ => return None,
        };
        Some(failure)
    }
}

/// Whether this is a whole head with the fields that hyper gives an answer of its own, and no others.
fn is_hypers(bytes: &[u8]) -> bool {
    let head = bytes.strip_suffix(b"\r\n\r\n").and_then(|head| std::str::from_utf8(head).ok());
    let of_hyper = |line: &str| matches!(line, "connection: close" | "content-length: 0") || line.starts_with("date: ");
    head.is_some_and(|head| head.contains("\r\ncontent-length: 0\r\n") && head.split("\r\n").skip(1).all(of_hyper))
}

/// An error answer in bytes, for a connection that is closed after it.
pub fn serialize(failure: &Failure) -> Vec<u8> {
    let response = failure.response(None);
    let status: StatusCode = response.status();
    let mut bytes = format!(
        "HTTP/1.1 {} {}\r\nconnection: close\r\n",
        status.as_u16(),
        status.canonical_reason().unwrap_or_default()
    )
    .into_bytes();
    for (name, value) in response.headers() {
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(format!("content-length: {}\r\n\r\n", response.body().len()).as_bytes());
    bytes.extend_from_slice(response.body());
    bytes
}

impl<I: ClientIo> Drop for Edge<I> {
    fn drop(&mut self) {
        if self.activity.open_ended.load(Ordering::Relaxed) {
            self.io.close_with_reset();
        }
    }
}

impl<I: ClientIo> AsyncRead for Edge<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let edge = self.get_mut();
        let before = buf.filled().len();
        if !edge.beginning.is_empty() {
            edge.replay(buf);
        }
        // What has been read again goes together with what can be read now.
        let replayed = buf.filled().len() > before;
        if let Poll::Ready(read) = Pin::new(&mut edge.io).poll_read(cx, buf) {
            edge.note_read();
            return Poll::Ready(if replayed { Ok(()) } else { read });
        }
        if replayed {
            return Poll::Ready(Ok(()));
        }
        match edge.read_deadline() {
            Some((deadline, guard)) => {
                let error = ready!(edge.read_alarm.poll(deadline, cx, "the client sent nothing for too long"));
                guard.into_iter().for_each(|guard| edge.bites(guard));
                // hyper just drops it; over TLS the client should know that nobody has cut it off.
                let _ = Pin::new(&mut edge.io).poll_shutdown(cx);
                Poll::Ready(Err(error))
            }
            None => {
                // hyper, which waits for a hang-up meanwhile, does not ask again when the request has ended.
                edge.read_alarm.look_again(edge.limits.keep_alive, cx);
                Poll::Pending
            }
        }
    }
}

impl<I: ClientIo> AsyncWrite for Edge<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let edge = self.get_mut();
        let own = edge.own_words(bytes);
        let own_bytes = own.as_ref().map(serialize);
        if let Poll::Ready(written) = Pin::new(&mut edge.io).poll_write(cx, own_bytes.as_deref().unwrap_or(bytes)) {
            edge.write_alarm.disarm();
            let Some(failure) = own else { return Poll::Ready(written) };
            let guard =
                if failure.message == TARGET_TOO_LONG { Some(Guard::MaxHead) } else { Guard::of(failure.cause) };
            guard.into_iter().for_each(|guard| edge.count(guard));
            // Own words are short: they fit the socket's buffer, or the client gets what fits.
            return Poll::Ready(written.map(|_| bytes.len()));
        }
        edge.poll_unread(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let edge = self.get_mut();
        if let [single] = bufs
            && edge.own_words(single).is_some()
        {
            return Pin::new(edge).poll_write(cx, single);
        }
        if let Poll::Ready(written) = Pin::new(&mut edge.io).poll_write_vectored(cx, bufs) {
            edge.write_alarm.disarm();
            return Poll::Ready(written);
        }
        edge.poll_unread(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let edge = self.get_mut();
        if let Poll::Ready(flushed) = Pin::new(&mut edge.io).poll_flush(cx) {
            edge.write_alarm.disarm();
            return Poll::Ready(flushed);
        }
        edge.poll_unread(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let edge = self.get_mut();
        if let Poll::Ready(shut) = Pin::new(&mut edge.io).poll_shutdown(cx) {
            return Poll::Ready(shut);
        }
        edge.poll_unread(cx)
    }
}

/// A timer that is made when it is first needed.
#[derive(Default)]
struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
    armed: bool,
}

impl Alarm {
    /// Ready with an error when the deadline has come.
    fn poll(&mut self, deadline: Instant, cx: &mut Context<'_>, what: &'static str) -> Poll<io::Error> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        sleep.as_mut().poll(cx).map(|()| io::Error::new(io::ErrorKind::TimedOut, what))
    }

    /// Wakes the task when the deadline that was set last has come, or else after that time.
    fn look_again(&mut self, after: Duration, cx: &mut Context<'_>) {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(after)));
        while sleep.as_mut().poll(cx).is_ready() {
            sleep.as_mut().reset(Instant::now() + after);
        }
    }

    /// Ready with an error when it has been polled for that long without having been disarmed.
    fn poll_after(&mut self, limit: Duration, cx: &mut Context<'_>) -> Poll<io::Error> {
        let deadline = match &self.sleep {
            Some(sleep) if self.armed => sleep.deadline(),
            _ => Instant::now() + limit,
        };
        self.armed = true;
        self.poll(deadline, cx, "the client read nothing for too long")
    }

    fn disarm(&mut self) {
        self.armed = false;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const LIMITS: EdgeLimits = EdgeLimits {
        header: Duration::from_secs(30),
        keep_alive: Duration::from_secs(60),
        write: Duration::from_secs(30),
    };

    /// A new connection, and the client's end of it.
    fn connected() -> (Edge<DuplexStream>, DuplexStream) {
        let (ours, clients) = tokio::io::duplex(1 << 16);
        (Edge::new(ours, Arc::default(), LIMITS, None), clients)
    }

    /// The protocol found when the client sends these pieces, and what can be read thereafter, so many bytes at once.
    async fn detected(pieces: &[&[u8]], at_once: usize) -> (io::Result<Protocol>, Vec<u8>) {
        let (mut edge, mut client) = connected();
        let sending = async {
            for piece in pieces {
                client.write_all(piece).await.expect("there is room");
                // A piece is read before the next comes.
                tokio::task::yield_now().await;
            }
            drop(client);
        };
        let (protocol, ()) = tokio::join!(edge.detect(), sending);
        let (mut read, mut room) = (Vec::new(), vec![0; at_once]);
        while let Ok(length @ 1..) = edge.read(&mut room).await {
            read.extend_from_slice(&room[..length]);
        }
        (protocol, read)
    }

    #[tokio::test]
    async fn the_protocol_is_found_wherever_the_first_bytes_are_cut_and_every_byte_is_read_again() {
        let prior_knowledge = [HTTP2_PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0][..]].concat();
        let cases = [
            (&prior_knowledge[..], Protocol::Http2),
            (HTTP2_PREFACE, Protocol::Http2),
            (b"GET /v1/models HTTP/1.1\r\nhost: weir\r\n\r\n", Protocol::Http1),
            (b"POST /v1/x HTTP/1.1\r\nhost: weir\r\n\r\n", Protocol::Http1),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rx", Protocol::Http1),
            (b"PRI * HTTP/1.1\r\nhost: weir\r\n\r\n", Protocol::Http1),
            (b"\r\n", Protocol::Http1),
        ];
        for (sent, expected) in cases {
            let halves = (0..sent.len()).map(|at| vec![&sent[..at], &sent[at..]]);
            for pieces in halves.chain([sent.chunks(1).collect()]) {
                for at_once in [1, 5, 24, 1000] {
                    let (protocol, read) = detected(&pieces, at_once).await;
                    assert_eq!(protocol.expect("it is found"), expected, "{}", sent.escape_ascii());
                    assert!(read == sent, "{pieces:?}, {at_once}: {}", read.escape_ascii());
                }
            }
        }
    }

    #[tokio::test]
    async fn a_client_that_leaves_before_it_is_clear_what_it_speaks_is_gone() {
        for end in 0..HTTP2_PREFACE.len() {
            let (protocol, _) = detected(&[&HTTP2_PREFACE[..end]], 100).await;
            assert_eq!(protocol.expect_err("it is gone").kind(), io::ErrorKind::UnexpectedEof, "{end}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_bytes_drip_in_for_no_longer_than_a_head_may() {
        let begun = Instant::now();
        let (mut edge, mut client) = connected();
        let dripping = async {
            for byte in HTTP2_PREFACE {
                tokio::time::sleep(Duration::from_secs(2)).await;
                client.write_all(&[*byte]).await.expect("there is room");
            }
        };
        let protocol = tokio::select! {
            protocol = edge.detect() => protocol,
            () = dripping => panic!("it has waited for all of them"),
        };
        assert_eq!(protocol.expect_err("it is late").kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed(), LIMITS.header);
    }
}
