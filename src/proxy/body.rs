//! Reading what a client sends, as slowly as it likes to within limits.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use crate::admission::{HeldBytes, NoRoom};
use crate::config::units::{format_duration, format_size};
use crate::error::{Cause, Failure};
use crate::upstream::BodyFault;

/// When memory for bodies is short, some of it is free again about as soon as an answer has begun.
const MEMORY_RETRY_AFTER: Duration = Duration::from_secs(1);

/// No more than this is set aside for a body on the strength of its declared length.
const MAX_TRUSTED_LENGTH: u64 = 1 << 20;

/// How much of a body is read for an answer that is known before, and for how long.
const MAX_DISCARDED: usize = 4 << 20;
const MAX_DISCARD_TIME: Duration = Duration::from_secs(2);

/// The limits of reading a body.
#[derive(Debug, Clone, Copy)]
pub struct ReadLimits {
    /// Bytes that are read at most.
    pub max: u64,
    /// Between two reads.
    pub timeout: Duration,
    /// For all of it.
    pub deadline: Instant,
}

/// What came of reading a body into memory.
pub enum Read {
    Whole(Bytes),
    /// It is longer than `max`; this is what was read of it.
    Longer(Bytes),
}

/// Reads a body into memory, as far as `limits.max` bytes, which are taken from `held`, and says how many it has `received`.
///
/// # Errors
/// It came too slowly, broke off, or there is no memory for it.
pub async fn read(
    body: &mut Incoming,
    limits: ReadLimits,
    held: &mut HeldBytes,
    received: &mut usize,
) -> Result<Read, Failure> {
    let declared = body.size_hint().exact();
    let mut bytes = Vec::with_capacity(declared.unwrap_or(0).min(limits.max).min(MAX_TRUSTED_LENGTH) as usize);
    if declared.is_some_and(|declared| declared > limits.max) {
        return Ok(Read::Longer(Bytes::new()));
    }
    while !body.is_end_stream() {
        let by = limits.deadline.min(Instant::now() + limits.timeout);
        let next = tokio::time::timeout_at(by, body.frame()).await.map_err(|_| too_slow(limits.timeout))?;
        let Some(frame) = next else { break };
        let frame =
            frame.map_err(|error| Failure::new(Cause::BadRequest, format!("the request's body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        *received += data.len();
        held.grow(data.len()).map_err(no_memory)?;
        bytes.extend_from_slice(&data);
        if bytes.len() as u64 > limits.max {
            return Ok(Read::Longer(bytes.into()));
        }
    }
    Ok(Read::Whole(bytes.into()))
}

/// Reads what is left of an HTTP/2 request's body and drops it, within reason. An answer to a request that was not read to
/// its end comes with a reset, which is right by RFC 9113 (8.1) but makes some clients (curl 7.88) lose the answer.
pub async fn discard(body: &mut Incoming) {
    let discarding = async {
        let mut discarded = 0;
        while discarded < MAX_DISCARDED {
            match body.frame().await {
                Some(Ok(frame)) => discarded += frame.data_ref().map_or(0, Bytes::len),
                Some(Err(_)) | None => return,
            }
        }
    };
    // Slower than that, the client is better off with the reset.
    let _ = tokio::time::timeout(MAX_DISCARD_TIME, discarding).await;
}

/// There is no memory for a body, or none for this tenant's.
fn no_memory(no_room: NoRoom) -> Failure {
    let (message, scope) = match no_room {
        NoRoom::Full => ("weir holds as many request bodies as queue.max_bytes allows; try again in a second", None),
        NoRoom::Share => {
            let message = "the requests of this client, and of those that weir cannot tell from it, hold their share of \
                           queue.max_bytes; send fewer at once, or try again in a second";
            (message, Some("client".to_owned()))
        }
    };
    Failure { retry_after: Some(MEMORY_RETRY_AFTER), scope, ..Failure::new(Cause::QueueFull, message) }
}

/// A metered call's body is longer than allowed.
pub fn too_large(max: u64) -> Failure {
    Failure::new(
        Cause::RequestTooLarge,
        format!("the request's body is longer than {} (server.max_body)", format_size(max)),
    )
}

/// A body came more slowly than weir waits.
pub fn too_slow(timeout: Duration) -> Failure {
    let message = format!(
        "the request's body came too slowly: nothing for {} (server.body_timeout), or not whole in time",
        format_duration(timeout)
    );
    Failure::new(Cause::RequestTimeout, message)
}

/// A body that is passed on while it comes. It ends in a fault when the client is too slow or breaks off, and notes that
/// fault, so that it is not taken for the gateway's.
pub struct Upload {
    body: Incoming,
    timeout: Duration,
    alarm: Option<Pin<Box<Sleep>>>,
    watch: Arc<UploadWatch>,
    /// Bytes that have come.
    received: Arc<AtomicU64>,
}

/// What an [`Upload`] lets others see of it.
#[derive(Debug, Default)]
pub struct UploadWatch {
    fault: OnceLock<Failure>,
    waiting: AtomicBool,
}

impl UploadWatch {
    /// What went wrong with it.
    pub fn fault(&self) -> Option<&Failure> {
        self.fault.get()
    }

    /// It would go on if the client sent more.
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }
}

impl Upload {
    /// Passes `body` on, with a limit on the time between two reads.
    pub fn new(body: Incoming, timeout: Duration, watch: Arc<UploadWatch>) -> Self {
        Self { body, timeout, alarm: None, watch, received: Arc::default() }
    }

    /// Where the bytes that have come are counted.
    pub fn counter(&self) -> Arc<AtomicU64> {
        self.received.clone()
    }

    fn failed(&self, failure: Failure) -> BodyFault {
        let fault = BodyFault(failure.message.clone());
        // The first fault is the one that counts.
        let _ = self.watch.fault.set(failure);
        fault
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyFault;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            self.alarm = None;
            self.watch.waiting.store(false, Ordering::Relaxed);
            if let Some(Ok(frame)) = &frame {
                self.received.fetch_add(frame.data_ref().map_or(0, Bytes::len) as u64, Ordering::Relaxed);
            }
            let broken =
                |error| self.failed(Failure::new(Cause::BadRequest, format!("the request's body broke off: {error}")));
            return Poll::Ready(frame.map(|frame| frame.map_err(broken)));
        }
        self.watch.waiting.store(true, Ordering::Relaxed);
        let timeout = self.timeout;
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        match alarm.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Some(Err(self.failed(too_slow(timeout))))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
