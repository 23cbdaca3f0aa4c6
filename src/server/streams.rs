//! HTTP/2 streams whose client stops reading.
//!
//! The client shuts the window of one stream, the connection goes on, and so the edge sees nothing; hyper does not ask the
//! body again either, which would be held with its slot for ever. Here each stream's task has a deadline of its own: from
//! the moment at which the head or a chunk was given until hyper asks for the next.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use hyper::rt::Executor;
use tokio::time::{Instant, Sleep};

use super::Drain;
use crate::metrics::{Guard, Metrics};

tokio::task_local! {
    /// Since when the stream's client has been owed a chunk.
    static OWED_SINCE: Cell<Option<Instant>>;
}

/// The body is asked for a chunk: what it gave before is on its way.
pub fn asked() {
    // Not an HTTP/2 stream where there is no such cell.
    let _ = OWED_SINCE.try_with(|since| since.set(None));
}

/// The body has given a chunk.
pub fn gave() {
    let _ = OWED_SINCE.try_with(|since| since.set(Some(Instant::now())));
}

/// Runs HTTP/2 streams, and drops one, which resets it, when its client has read nothing for so long. When the drain is over
/// each is polled once more, as its connection is.
#[derive(Clone)]
pub struct StreamExecutor {
    pub write_timeout: Duration,
    pub metrics: Arc<Metrics>,
    pub drain: Drain,
}

impl<F> Executor<F> for StreamExecutor
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let (write_timeout, metrics, mut drain) = (self.write_timeout, self.metrics.clone(), self.drain.clone());
        let stream = OWED_SINCE.scope(Cell::new(None), until_stuck(stream, write_timeout, metrics));
        tokio::spawn(async move { drain.run_to_end(pin!(stream)).await });
    }
}

async fn until_stuck(stream: impl Future, write_timeout: Duration, metrics: Arc<Metrics>) {
    let mut stream = pin!(stream);
    let mut alarm: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        if stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let Some(since) = OWED_SINCE.with(Cell::get) else { return Poll::Pending };
        let deadline = since + write_timeout;
        let alarm = alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if alarm.deadline() != deadline {
            alarm.as_mut().reset(deadline);
        }
        ready!(alarm.as_mut().poll(cx));
        metrics.guard(Guard::WriteTimeout);
        Poll::Ready(())
    })
    .await;
}
