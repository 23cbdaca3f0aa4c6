//! An HTTP/2 answer that its client does not read.
//!
//! On HTTP/1 a client that stops reading shows in the socket, and the edge's write deadline ends it. On HTTP/2 it may go on
//! reading the connection and just not open a stream's window: hyper then never asks for the next frame, and the answer
//! would hold its slot for as long as the client likes. So each HTTP/2 answer has a watcher, which takes the body away when
//! a frame was handed out, or could have been, and no other was asked for within `server.write_timeout`.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::edge::ActiveRequest;
use crate::proxy::ResponseBody;
use crate::relay::BrokenOff;

/// A body that is dropped when nobody reads it.
pub struct Watched {
    state: Arc<Mutex<State>>,
    watcher: AbortHandle,
}

/// Guards the body against being polled while it is taken away.
struct State {
    body: Option<(ResponseBody, ActiveRequest)>,
    /// Since when the client could have asked for more, and has not.
    unread_since: Option<Instant>,
}

impl Watched {
    /// Watches a body that the client has not yet begun to read.
    pub fn new(body: ResponseBody, active: ActiveRequest, limit: Duration) -> Self {
        let state = Arc::new(Mutex::new(State { body: Some((body, active)), unread_since: Some(Instant::now()) }));
        let watcher = tokio::spawn(watch(Arc::downgrade(&state), limit)).abort_handle();
        Self { state, watcher }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

async fn watch(state: Weak<Mutex<State>>, limit: Duration) {
    let mut look = Instant::now() + limit;
    loop {
        tokio::time::sleep_until(look).await;
        let Some(state) = state.upgrade() else { return };
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match state.unread_since.map(|since| since + limit) {
            Some(deadline) if deadline <= now => {
                drop(state.body.take());
                return;
            }
            deadline => look = deadline.unwrap_or(now + limit),
        }
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let mut state = self.lock();
        state.unread_since = None;
        let Some((body, _)) = &mut state.body else {
            return Poll::Ready(Some(Err(BrokenOff::unread())));
        };
        let frame = Pin::new(body).poll_frame(cx);
        if frame.is_ready() {
            state.unread_since = Some(Instant::now());
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.lock().body.as_ref().is_some_and(|(body, _)| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.lock().body.as_ref().map_or_else(SizeHint::default, |(body, _)| body.size_hint())
    }
}
