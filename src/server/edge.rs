//! The client's side of a connection: deadlines that hyper does not keep, and a word for what hyper answers without one.
//!
//! hyper has no limit on how slowly a head comes (but one that is the keep-alive limit too), none while it detects the
//! protocol, and none on a client that stops reading. All of them are kept here, on the bytes: [`Edge`] wraps the
//! connection's IO and fails it when the client has kept it waiting for too long.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::error::{Cause, Failure};

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

/// What the requests on a connection tell the IO beneath them.
#[derive(Debug, Default)]
pub struct Activity {
    /// Requests begun and ended, in one number: `begun << 32 | ended`, so that they are read together.
    requests: AtomicU64,
    /// Bytes without a request are then not the beginning of a head, but frames of any kind.
    http2: AtomicBool,
}

/// A request that is being served; it ends when this is dropped.
#[derive(Debug)]
pub struct ActiveRequest(Arc<Activity>);

impl Activity {
    /// A request's head has come.
    pub fn begin(self: &Arc<Self>, http2: bool) -> ActiveRequest {
        self.http2.store(http2, Ordering::Relaxed);
        self.requests.fetch_add(1 << 32, Ordering::AcqRel);
        ActiveRequest(Arc::clone(self))
    }

    /// Requests begun, and those not ended.
    fn begun_and_active(&self) -> (u64, u64) {
        let both = self.requests.load(Ordering::Acquire);
        let (begun, ended) = (both >> 32, both & 0xffff_ffff);
        (begun, begun.wrapping_sub(ended) & 0xffff_ffff)
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        // The lower half may overflow into the upper one after four billion requests on one connection; both are only
        // compared, so that such a connection may at worst be closed once while idle.
        self.0.requests.fetch_add(1, Ordering::AcqRel);
    }
}

/// A client's connection with deadlines.
pub struct Edge<I> {
    io: I,
    activity: Arc<Activity>,
    limits: EdgeLimits,
    /// What `activity` said when it was last looked at.
    seen: (u64, u64),
    /// When the connection became idle.
    idle_since: Instant,
    /// When the first byte of the head that is coming was read.
    head_since: Option<Instant>,
    read_alarm: Alarm,
    write_alarm: Alarm,
}

impl<I> Edge<I> {
    /// Wraps a new connection.
    pub fn new(io: I, activity: Arc<Activity>, limits: EdgeLimits) -> Self {
        let now = Instant::now();
        Self {
            io,
            activity,
            limits,
            seen: (0, 0),
            idle_since: now,
            // A new connection has its first head to send, from the start.
            head_since: Some(now),
            read_alarm: Alarm::default(),
            write_alarm: Alarm::default(),
        }
    }

    /// By when something has to be read; `None` while a request is being served.
    fn read_deadline(&mut self) -> Option<Instant> {
        let now_seen = self.activity.begun_and_active();
        if now_seen != self.seen {
            self.seen = now_seen;
            self.head_since = None;
            self.idle_since = Instant::now();
        }
        match (self.seen.1, self.head_since) {
            (0, Some(since)) => Some(since + self.limits.header),
            (0, None) => Some(self.idle_since + self.limits.keep_alive),
            _ => None,
        }
    }

    /// Notes the first byte of a head.
    fn note_read(&mut self) {
        let idle = self.activity.begun_and_active().1 == 0;
        if idle && self.head_since.is_none() && !self.activity.http2.load(Ordering::Relaxed) {
            self.head_since = Some(Instant::now());
        }
    }

    /// hyper answers what it can't parse with a bare status, before any request of ours: those bytes are replaced by an
    /// answer that says what is wrong.
    fn own_words(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let status = bytes.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
        // Whatever passed through weir carries this field, also when it is written after its request has ended.
        let ours = || memchr::memmem::find(bytes, b"\r\nx-weir-attempts: ").is_some();
        if self.activity.begun_and_active().1 > 0 || !bytes.ends_with(b"\r\n\r\n") || ours() {
            return None;
        }
        let failure = match status {
            b"400" => Failure::new(
                Cause::BadRequest,
                "this is not an HTTP request that weir can read: its first line, a header or its framing is malformed",
            ),
            b"414" => Failure::new(Cause::BadRequest, "the request's target is too long"),
            b"431" => {
                Failure::new(Cause::HeadersTooLarge, "the request's head is too long, or has more than 100 fields")
            }
            _ => return None,
        };
        Some(serialize(&failure))
    }
}

/// An error answer in bytes, for a connection that is closed after it.
fn serialize(failure: &Failure) -> Vec<u8> {
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

impl<I: AsyncRead + Unpin> AsyncRead for Edge<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let edge = self.get_mut();
        if let Poll::Ready(read) = Pin::new(&mut edge.io).poll_read(cx, buf) {
            edge.note_read();
            return Poll::Ready(read);
        }
        let deadline = edge.read_deadline();
        edge.read_alarm.poll(deadline, cx, "the client sent nothing for too long")
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Edge<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let edge = self.get_mut();
        if let Some(own) = edge.own_words(bytes) {
            // Short, and the first to be written here: it fits the socket's buffer, or the client gets what fits.
            return Pin::new(&mut edge.io).poll_write(cx, &own).map_ok(|_| bytes.len());
        }
        if let Poll::Ready(written) = Pin::new(&mut edge.io).poll_write(cx, bytes) {
            edge.write_alarm.disarm();
            return Poll::Ready(written);
        }
        edge.write_alarm.poll_after(edge.limits.write, cx).map(|late| late.map(|()| 0))
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
        edge.write_alarm.poll_after(edge.limits.write, cx).map(|late| late.map(|()| 0))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let edge = self.get_mut();
        if let Poll::Ready(flushed) = Pin::new(&mut edge.io).poll_flush(cx) {
            return Poll::Ready(flushed);
        }
        edge.write_alarm.poll_after(edge.limits.write, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let edge = self.get_mut();
        if let Poll::Ready(shut) = Pin::new(&mut edge.io).poll_shutdown(cx) {
            return Poll::Ready(shut);
        }
        edge.write_alarm.poll_after(edge.limits.write, cx)
    }
}

/// A timer that is made when it is first needed.
#[derive(Default)]
struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
    armed: bool,
}

impl Alarm {
    /// Fails when the deadline has come; without one, waits for whoever wakes it next.
    fn poll(&mut self, deadline: Option<Instant>, cx: &mut Context<'_>, what: &'static str) -> Poll<io::Result<()>> {
        let Some(deadline) = deadline else { return Poll::Pending };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        sleep.as_mut().poll(cx).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, what)))
    }

    /// Fails when it has been polled for that long without having been disarmed.
    fn poll_after(&mut self, limit: Duration, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let deadline = match &self.sleep {
            Some(sleep) if self.armed => sleep.deadline(),
            _ => Instant::now() + limit,
        };
        self.armed = true;
        self.poll(Some(deadline), cx, "the client read nothing for too long")
    }

    fn disarm(&mut self) {
        self.armed = false;
    }
}
