//! One attempt on the wire: a connection from the pool or a new one, the request out, the answer's head in.
//!
//! HTTP/1.1 on hyper's connection API. Dropping [`Upstream::send`]'s future or an answer's body before its end closes the
//! connection, which is how HTTP/1 cancels a request; a body read to its end gives the connection back to the pool.

pub mod connect;
mod pool;

use std::error::Error as _;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, header, response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;
use tower::{Service as _, ServiceExt as _};

use crate::config::{Config, UpstreamUrl};
use connect::{ConnectError, Connector};
use pool::{MaxIdle, Pool};

pub use pool::{Connection, ConnectionCounts};

/// A pooled connection that breaks sooner than this after it was written to had been closed already; one that breaks later
/// had the gateway at work on the request.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// A gateway, and the connections to it.
///
/// Each of weir's workers has one of its own, so that a request's two connections are driven by one thread.
pub struct Upstream {
    connector: Connector,
    origin: Uri,
    connect_timeout: Duration,
    pool: Arc<Pool>,
}

/// What is sent: the same for every attempt, so that one costs no more than a copy of the head.
#[derive(Debug)]
pub struct Outgoing {
    pub method: Method,
    pub uri: Uri,
    pub headers: HeaderMap,
}

/// A request's body.
#[derive(Debug)]
pub enum Payload {
    /// In memory: it can be sent again.
    Whole(Bytes),
    /// On its way from the client: it can be sent once.
    Streamed(Streamed),
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
    incoming: Incoming,
    connection: Option<Connection>,
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
    Stale(hyper::Error),
    /// The connection broke before an answer.
    Broken(hyper::Error),
    /// What came is not HTTP.
    InvalidResponse(hyper::Error),
}

impl Upstream {
    /// The gateway of the configuration, reached through `connector`.
    pub fn new(config: &Config, connector: Connector, counts: Arc<ConnectionCounts>) -> Self {
        Self {
            connector,
            origin: config.upstream.base_url.origin(),
            connect_timeout: config.timeouts.connect,
            pool: Pool::new(counts),
        }
    }

    /// A connection that is ready for a request: from the pool, unless `fresh`, else a new one.
    ///
    /// `repeatable` says that the request can be sent again: then a connection will do that the gateway may be about to
    /// close.
    ///
    /// # Errors
    /// No connection could be made, or not within `timeouts.connect`.
    pub async fn connection(&self, repeatable: bool, fresh: bool) -> Result<Connection, SendError> {
        let max_idle = if repeatable { MaxIdle::Repeatable } else { MaxIdle::Once };
        let pooled = if fresh { None } else { self.pool.take(max_idle) };
        match pooled {
            Some(pooled) => Ok(pooled),
            None => self.connect().await,
        }
    }

    /// Sends a request and waits for the head of its answer. There is no time limit here. Dropping the future closes the
    /// connection.
    ///
    /// # Errors
    /// Why no answer came.
    pub async fn send(
        &self,
        mut connection: Connection,
        outgoing: &Outgoing,
        payload: Payload,
    ) -> Result<Exchange, SendError> {
        let written_at = Instant::now();
        match connection.sender.try_send_request(outgoing.request(payload)).await {
            Ok(response) => Ok(self.exchange(response, connection)),
            Err(mut error) => Err(match error.take_message() {
                Some(unsent) => SendError::Unsent(unsent.into_body()),
                None if connection.reused && written_at.elapsed() < STALE_WITHIN && is_stale(error.error()) => {
                    SendError::Stale(error.into_error())
                }
                None => SendError::from_hyper(error.into_error()),
            }),
        }
    }

    async fn connect(&self) -> Result<Connection, SendError> {
        let connecting = async {
            let mut connector = self.connector.clone();
            let io = connector.ready().await.map_err(SendError::Connect)?.call(self.origin.clone());
            let io = io.await.map_err(SendError::Connect)?;
            http1::handshake(TokioIo::new(io)).await.map_err(SendError::Broken)
        };
        let handshaken = tokio::time::timeout(self.connect_timeout, connecting).await;
        let (sender, driver) = handshaken.map_err(|_| SendError::ConnectTimeout(self.connect_timeout))??;
        Ok(self.pool.adopt(sender, driver))
    }

    fn exchange(&self, response: Response<Incoming>, connection: Connection) -> Exchange {
        let (head, incoming) = response.into_parts();
        let mut body = AnswerBody { incoming, connection: Some(connection), pool: self.pool.clone() };
        // Without a body there is no end to be read.
        if body.incoming.is_end_stream() {
            body.give_connection_back();
        }
        Exchange { head, body }
    }
}

impl Outgoing {
    fn request(&self, payload: Payload) -> Request<Payload> {
        let mut request = Request::new(payload);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        // hyper leaves it out, and some servers answer 411 then (RFC 9110, 8.6).
        if request.body().is_end_stream() && matches!(self.method, Method::POST | Method::PUT | Method::PATCH) {
            request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(0));
        }
        request
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

/// Whether a reused connection was closed by the other side before it saw the request.
fn is_stale(error: &hyper::Error) -> bool {
    let reset = |error: &std::io::Error| {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
        matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected)
    };
    error.is_incomplete_message()
        || error.is_canceled()
        || error.source().and_then(|cause| cause.downcast_ref()).is_some_and(reset)
}

impl AnswerBody {
    /// Whether all of it was read.
    pub fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    /// How much is to come, where the head said so.
    pub fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }

    /// The next piece; `None` behind the last.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        match &frame {
            Some(Err(_)) => drop(self.connection.take()),
            // hyper's reader does not have to be asked again once the declared length is met.
            _ if frame.is_none() || self.incoming.is_end_stream() => self.give_connection_back(),
            Some(Ok(_)) | None => {}
        }
        Poll::Ready(frame)
    }

    /// The next piece of data; `None` behind the last. Trailers are dropped.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn data(&mut self) -> Option<Result<Bytes, hyper::Error>> {
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

impl SendError {
    fn from_hyper(error: hyper::Error) -> Self {
        if error.is_parse() { Self::InvalidResponse(error) } else { Self::Broken(error) }
    }
}

impl fmt::Display for SendError {
    /// The whole chain of causes: the outermost alone says little.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "{error}"),
            Self::ConnectTimeout(after) => write!(f, "no connection within {} ms", after.as_millis()),
            Self::Unsent(_) => f.write_str("the connection was closed before anything was written"),
            Self::Stale(error) | Self::Broken(error) | Self::InvalidResponse(error) => {
                write!(f, "{error}")?;
                let mut cause = error.source();
                while let Some(error) = cause {
                    write!(f, ": {error}")?;
                    cause = error.source();
                }
                Ok(())
            }
        }
    }
}

/// A body that is passed on as it comes from the client: what was read of it already, then the rest.
pub struct Streamed {
    pub begun: Option<Bytes>,
    pub rest: Pin<Box<dyn Body<Data = Bytes, Error = BodyFault> + Send + Sync>>,
}

/// The client's body broke off: not the gateway's fault.
#[derive(Debug)]
pub struct BodyFault(pub String);

impl fmt::Display for BodyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BodyFault {}

impl Body for Payload {
    type Data = Bytes;
    type Error = BodyFault;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        match self.get_mut() {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Streamed(streamed) => match streamed.begun.take() {
                Some(begun) => Poll::Ready(Some(Ok(Frame::data(begun)))),
                None => streamed.rest.as_mut().poll_frame(cx),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Streamed(streamed) => streamed.begun.is_none() && streamed.rest.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Streamed(streamed) => {
                let begun = streamed.begun.as_ref().map_or(0, |begun| begun.len() as u64);
                match streamed.rest.size_hint().exact() {
                    Some(rest) => SizeHint::with_exact(begun + rest),
                    None => SizeHint::default(),
                }
            }
        }
    }
}

impl fmt::Debug for Streamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streamed").field("begun", &self.begun.as_ref().map_or(0, Bytes::len)).finish_non_exhaustive()
    }
}

impl Streamed {
    /// A body of which `begun` was read already.
    pub fn new(begun: Bytes, rest: impl Body<Data = Bytes, Error = BodyFault> + Send + Sync + 'static) -> Self {
        Self { begun: (!begun.is_empty()).then_some(begun), rest: Box::pin(rest) }
    }
}
