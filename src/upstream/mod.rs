//! One attempt on the wire: a connection from the pool or a new one, the request out, the answer's head in.
//!
//! HTTP/1.1, written and read by the request's own task (`wire`). Dropping [`Upstream::send`]'s future or an answer's body
//! before its end closes the connection, which is how HTTP/1 cancels a request; a body read to its end gives the connection
//! back to the pool.

pub mod chunked;
pub mod connect;
pub mod head;
mod outbox;
mod payload;
mod pool;
mod wire;
mod wire_error;

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Uri, response};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;
use tower::{Service as _, ServiceExt as _};

use crate::config::{Config, UpstreamUrl};
use connect::{ConnectError, Connector};
use pool::{MaxIdle, Pool};
use wire::{Reader, Wire};

pub use head::Outgoing;
pub use payload::{BodyFault, Payload, Streamed};
pub use pool::{Connection, ConnectionCounts};
pub use wire_error::WireError;

/// A pooled connection that breaks sooner than this after it was written to had been closed already; one that breaks later
/// had the gateway at work on the request.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// A gateway, and the connections to it.
///
/// Each of weir's workers has one of its own, so that a request's two connections are driven by one thread.
pub struct Upstream {
    connector: Connector,
    origin: Uri,
    pool: Arc<Pool>,
}

/// An answer whose body has yet to be read.
#[derive(Debug)]
pub struct Exchange {
    pub head: response::Parts,
    pub body: AnswerBody,
}

/// The body of an answer. Read to its end, it gives its connection back to the pool; dropped before, it closes it.
#[derive(Debug)]
pub struct AnswerBody {
    reader: Reader,
    /// Until the end was read, or it broke.
    connection: Option<Box<Connection>>,
    pool: Arc<Pool>,
}

/// Why there was no answer.
#[derive(Debug)]
pub enum SendError {
    /// No connection; nothing was written.
    Connect(ConnectError),
    /// No connection within `timeouts.connect`; nothing was written.
    ConnectTimeout(Duration),
    /// The pooled connection was closed before anything was written; here is the body back.
    Unsent(Payload),
    /// The pooled connection broke before the first byte of an answer: the gateway had most likely closed it already.
    Stale(WireError),
    /// The connection broke before an answer.
    Broken(WireError),
    /// What came is not HTTP.
    InvalidResponse(WireError),
}

impl Upstream {
    /// The gateway of the configuration, reached through `connector`.
    pub fn new(config: &Config, connector: Connector, counts: Arc<ConnectionCounts>) -> Self {
        Self { connector, origin: config.upstream.base_url.origin(), pool: Pool::new(counts) }
    }

    /// A connection that is ready for a request: from the pool, unless `fresh`, else a new one, made within `timeout`.
    ///
    /// `repeatable` says that the request can be sent again: then a connection will do that the gateway may be about to
    /// close.
    ///
    /// # Errors
    /// No connection could be made, or not in time.
    pub async fn connection(
        &self,
        repeatable: bool,
        fresh: bool,
        timeout: Duration,
    ) -> Result<Box<Connection>, SendError> {
        let max_idle = if repeatable { MaxIdle::Repeatable } else { MaxIdle::Once };
        let pooled = if fresh { None } else { self.pool.take(max_idle) };
        match pooled {
            Some(pooled) => Ok(pooled),
            None => self.connect(timeout).await,
        }
    }

    /// Sends a request and waits for the head of its answer. There is no time limit here. Dropping the future closes the
    /// connection.
    ///
    /// # Errors
    /// Why no answer came.
    pub async fn send(
        &self,
        mut connection: Box<Connection>,
        outgoing: &Outgoing,
        payload: Payload,
    ) -> Result<Exchange, SendError> {
        let written_at = Instant::now();
        match connection.wire.exchange(outgoing, payload).await {
            Ok((head, reader)) => Ok(self.answered(head, reader, connection)),
            Err(unanswered) => Err(match (unanswered.error, unanswered.unsent) {
                (error @ WireError::Upload(_), _) => SendError::Broken(error),
                (_, Some(unsent)) => SendError::Unsent(unsent),
                (error @ WireError::Malformed(_), _) => SendError::InvalidResponse(error),
                (error, None) if connection.reused && unanswered.silent && written_at.elapsed() < STALE_WITHIN => {
                    SendError::Stale(error)
                }
                (error, None) => SendError::Broken(error),
            }),
        }
    }

    async fn connect(&self, timeout: Duration) -> Result<Box<Connection>, SendError> {
        let connecting = async {
            let mut connector = self.connector.clone();
            connector.ready().await?.call(self.origin.clone()).await
        };
        let connected = tokio::time::timeout(timeout, connecting).await;
        let io = connected.map_err(|_| SendError::ConnectTimeout(timeout))?.map_err(SendError::Connect)?;
        Ok(self.pool.adopt(Wire::new(io)))
    }

    fn answered(&self, head: response::Parts, reader: Reader, connection: Box<Connection>) -> Exchange {
        let mut body = AnswerBody { reader, connection: Some(connection), pool: self.pool.clone() };
        // Without a body there is no end to be read.
        if body.reader.is_done() {
            body.give_connection_back();
        }
        Exchange { head, body }
    }
}

/// The target of a client's request at the gateway: its path below `/v1` and its query, byte for byte, behind the base
/// URL's path.
pub fn target(base: &UpstreamUrl, below_v1: &str, query: Option<&str>) -> Option<Uri> {
    let mut target =
        String::with_capacity(base.path().len() + below_v1.len() + query.map_or(0, |query| query.len() + 1));
    target.push_str(base.path());
    target.push_str(below_v1);
    if let Some(query) = query {
        target.push('?');
        target.push_str(query);
    }
    Uri::try_from(target).ok()
}

impl AnswerBody {
    /// Whether all of it was read.
    pub fn is_end_stream(&self) -> bool {
        self.reader.is_done()
    }

    /// How much is to come, where the head said so.
    pub fn size_hint(&self) -> SizeHint {
        self.reader.size_hint()
    }

    /// The next piece; `None` behind the last.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, WireError>>> {
        let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
        let frame = ready!(self.reader.poll_frame(&mut connection.wire, cx));
        match &frame {
            Some(Err(_)) => drop(self.connection.take()),
            // Whoever reads need not ask again once the end was read.
            _ if self.reader.is_done() => self.give_connection_back(),
            Some(Ok(_)) | None => {}
        }
        Poll::Ready(frame)
    }

    /// The next piece of data; `None` behind the last. Trailers are dropped.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn data(&mut self) -> Option<Result<Bytes, WireError>> {
        loop {
            match std::future::poll_fn(|cx| self.poll_frame(cx)).await? {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => return Some(Ok(data)),
                    Err(_trailers) => {}
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }

    fn give_connection_back(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.pool.give_back(connection);
        }
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "{error}"),
            Self::ConnectTimeout(after) => write!(f, "no connection within {} ms", after.as_millis()),
            Self::Unsent(_) => f.write_str("the connection was closed before anything was written"),
            Self::Stale(error) | Self::Broken(error) | Self::InvalidResponse(error) => write!(f, "{error}"),
        }
    }
}
