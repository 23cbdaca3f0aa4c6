//! Where clients connect: accepting, serving HTTP/1.1 and HTTP/2, and stopping without cutting anyone off.
//!
//! One thread accepts, and hands each connection to the worker with the fewest. A worker is a single-threaded runtime with
//! connections to the gateway of its own, so that a request is served on one core from its first byte to its last
//! (docs/benchmarks.md has the figures behind this).

pub(crate) mod edge;
mod streams;

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::config;
use crate::proxy::{Proxy, ResponseBody};
use crate::relay::BrokenOff;

use edge::{ActiveRequest, Activity, Edge, EdgeLimits, Protocol};
use streams::StreamExecutor;

/// HTTP/2 streams at once on one connection.
const MAX_STREAMS: u32 = 256;

/// What a client may send on an HTTP/2 stream, and on a whole connection, before weir has read it.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 256 << 10;

/// Bytes of an HTTP/2 request's header list; those of HTTP/1 are counted by the proxy.
const MAX_HEADER_LIST: u32 = 64 << 10;

/// Connections that the kernel keeps until they are accepted; it has a bound of its own (`net.core.somaxconn`). With the
/// usual 128, a burst of some hundred clients gets a reset now and then.
const BACKLOG: u32 = 4096;

/// How long to wait before accepting again when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Tells connections to end when they can.
#[derive(Debug, Clone)]
pub struct Drain {
    begun: watch::Receiver<bool>,
}

/// Begins a drain, and sees when everyone who watches it is gone.
#[derive(Debug)]
pub struct DrainControl {
    begin: watch::Sender<bool>,
}

impl DrainControl {
    /// A drain that has not begun.
    pub fn new() -> (Self, Drain) {
        let (begin, begun) = watch::channel(false);
        (Self { begin }, Drain { begun })
    }

    /// Begins: no new request on any connection.
    pub fn begin(&self) {
        self.begin.send_replace(true);
    }

    /// Waits until every [`Drain`] is dropped: every connection has ended.
    pub async fn ended(&self) {
        self.begin.closed().await;
    }
}

impl Default for DrainControl {
    fn default() -> Self {
        Self::new().0
    }
}

impl Drain {
    async fn begun(&mut self) {
        // The control is gone only when the process ends.
        let _ = self.begun.wait_for(|begun| *begun).await;
    }
}

/// Serves one connection until it ends: HTTP/1.1, or HTTP/2 where the client begins with it. `peer` is the address that
/// it comes from, where it has one.
///
/// Dropping the future closes the connection and cancels its requests.
pub async fn serve_connection<I>(
    io: I,
    peer: Option<IpAddr>,
    proxy: Arc<Proxy>,
    settings: &config::Server,
    mut drain: Drain,
) where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let limits =
        EdgeLimits { header: settings.header_timeout, keep_alive: settings.keep_alive, write: settings.write_timeout };
    let activity = Arc::new(Activity::default());
    let mut edge = Edge::new(io, activity.clone(), limits);
    let protocol = tokio::select! {
        biased;
        protocol = edge.detect() => protocol,
        () = drain.begun() => return,
    };
    let service = service_fn(move |request: Request<Incoming>| {
        let active = activity.begin(request.version() == Version::HTTP_2);
        // Boxed: hyper moves it several times, and would keep its room for as long as the connection lives.
        Box::pin(serve(proxy.clone(), request, peer, active))
    });
    let ended: Result<(), Box<dyn Error + Send + Sync>> = match protocol {
        Ok(Protocol::Http1) => {
            let connection = http1().serve_connection(TokioIo::new(edge), service);
            until_drained(connection, http1::Connection::graceful_shutdown, drain).await.map_err(Into::into)
        }
        Ok(Protocol::Http2) => {
            let connection = http2(settings.write_timeout).serve_connection(TokioIo::new(edge), service);
            let serving = until_drained(connection, http2::Connection::graceful_shutdown, drain);
            // Boxed, so that the many of HTTP/1 need no room for it.
            Box::pin(serving).await.map_err(Into::into)
        }
        Err(error) => Err(error.into()),
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a client's connection ended early");
    }
}

/// Serves one request.
async fn serve(
    proxy: Arc<Proxy>,
    request: Request<Incoming>,
    peer: Option<IpAddr>,
    active: ActiveRequest,
) -> Result<Response<Tracked>, Infallible> {
    let response = proxy.serve(request, peer).await.map(|body| Tracked::new(body, active));
    // A client whose window is shut from the start never asks for the first chunk.
    streams::gave();
    Ok(response)
}

/// Runs a connection to its end, and asks it to end when the drain begins.
async fn until_drained<C: Future>(connection: C, shut_down: impl FnOnce(Pin<&mut C>), mut drain: Drain) -> C::Output {
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = drain.begun() => {
            shut_down(connection.as_mut());
            connection.await
        }
    }
}

fn http1() -> http1::Builder {
    let mut builder = http1::Builder::new();
    // Deadlines are the edge's; hyper's own would be the keep-alive limit too.
    builder.timer(TokioTimer::new()).header_read_timeout(None);
    builder
}

fn http2(write_timeout: Duration) -> http2::Builder<StreamExecutor> {
    let mut builder = http2::Builder::new(StreamExecutor { write_timeout });
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST);
    builder
}

/// A response body that ends its request when it is dropped.
struct Tracked {
    body: ResponseBody,
    /// Where the answer has broken off, until hyper has had the time to write what came before that.
    broken_off: Option<BrokenOff>,
    _active: ActiveRequest,
}

impl Tracked {
    fn new(body: ResponseBody, active: ActiveRequest) -> Self {
        Self { body, broken_off: None, _active: active }
    }
}

impl Body for Tracked {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let tracked = self.get_mut();
        streams::asked();
        if let Some(broken_off) = tracked.broken_off.take() {
            return Poll::Ready(Some(Err(broken_off)));
        }
        let frame = Pin::new(&mut tracked.body).poll_frame(cx);
        match frame {
            Poll::Ready(Some(Err(broken_off))) => {
                // hyper drops what it has not written yet when a body fails, the head included. It writes when a body
                // has nothing for now.
                tracked.broken_off = Some(broken_off);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(Some(Ok(_))) => streams::gave(),
            Poll::Ready(None) | Poll::Pending => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.broken_off.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The threads that serve connections.
pub struct Workers {
    workers: Vec<Worker>,
    connections: Arc<Semaphore>,
    max_connections: usize,
}

struct Worker {
    /// Unbounded in form; bounded by `max_connections`, since each carries one of its permits.
    inbox: mpsc::UnboundedSender<Accepted>,
    open: Arc<AtomicUsize>,
    runtime: Handle,
}

/// A connection on its way to its worker.
struct Accepted {
    stream: std::net::TcpStream,
    peer: IpAddr,
    drain: Drain,
    permit: OwnedSemaphorePermit,
}

impl Workers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// A thread or its runtime could not be made.
    pub fn start(count: usize, proxy: &Proxy, settings: &config::Server) -> io::Result<Self> {
        let start = |number| Worker::start(number, Arc::new(proxy.for_another_worker()));
        let max_connections = settings.max_connections as usize;
        Ok(Self {
            workers: (0..count.max(1)).map(start).collect::<io::Result<_>>()?,
            connections: Arc::new(Semaphore::new(max_connections)),
            max_connections,
        })
    }

    /// Clients connected now.
    pub fn connections(&self) -> usize {
        self.max_connections - self.connections.available_permits()
    }

    /// How many clients may be connected.
    pub fn max_connections(&self) -> usize {
        self.max_connections
    }

    /// Tasks alive on all of these threads.
    pub fn tasks(&self) -> usize {
        self.workers.iter().map(|worker| worker.runtime.metrics().num_alive_tasks()).sum()
    }

    /// Accepts connections until the drain begins; then closes the listener.
    pub async fn accept(&self, listener: TcpListener, mut drain: Drain) {
        let watching = drain.clone();
        loop {
            // Beyond the limit nobody is accepted: they wait in the kernel's backlog.
            let next = async {
                let permit = self.connections.clone().acquire_owned().await.expect("the semaphore is never closed");
                (listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                biased;
                () = drain.begun() => return,
                next = next => next,
            };
            match accepted {
                Ok((stream, address)) => self.hand_over(stream, address.ip(), watching.clone(), permit),
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot accept connections; raise the limit of open files if they have run out");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn hand_over(&self, stream: TcpStream, peer: IpAddr, drain: Drain, permit: OwnedSemaphorePermit) {
        let idlest =
            self.workers.iter().min_by_key(|worker| worker.open.load(Ordering::Relaxed)).expect("there is a worker");
        match stream.into_std() {
            Ok(stream) => {
                idlest.open.fetch_add(1, Ordering::Relaxed);
                // A worker ends with the process only.
                let _ = idlest.inbox.send(Accepted { stream, peer, drain, permit });
            }
            Err(error) => tracing::debug!(%error, "a connection was lost on its way"),
        }
    }
}

/// Errors of the connection that was to be accepted, not of accepting.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

impl Worker {
    fn start(number: usize, proxy: Arc<Proxy>) -> io::Result<Self> {
        let (inbox, accepted) = mpsc::unbounded_channel();
        let open = Arc::new(AtomicUsize::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let work = work(accepted, proxy, open.clone());
        std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || runtime.block_on(work))?;
        Ok(Self { inbox, open, runtime: handle })
    }
}

/// Serves every connection that is handed over, each in a task of its own.
async fn work(mut inbox: mpsc::UnboundedReceiver<Accepted>, proxy: Arc<Proxy>, open: Arc<AtomicUsize>) {
    while let Some(Accepted { stream, peer, drain, permit }) = inbox.recv().await {
        // A connection keeps the deadlines that it began with.
        let (proxy, config, place) = (proxy.clone(), proxy.config(), Place(open.clone()));
        tokio::spawn(async move {
            match prepare(stream) {
                Ok(stream) => serve_connection(stream, Some(peer), proxy, &config.server, drain).await,
                Err(error) => tracing::debug!(%error, "a connection was lost on its way"),
            }
            drop((place, permit));
        });
    }
}

/// A connection among those of its worker; given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn prepare(stream: std::net::TcpStream) -> io::Result<TcpStream> {
    let stream = TcpStream::from_std(stream)?;
    // An event must not wait for the acknowledgement of the one before.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Binds an address.
///
/// # Errors
/// That it is taken or not this machine's, with what to do about it.
pub fn bind(address: SocketAddr, option: &str) -> Result<TcpListener, String> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A weir that starts again need not wait for the last one's connections to be forgotten.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("cannot listen on {address}: another program does; stop it, or give {option} another port")
        }
        io::ErrorKind::PermissionDenied => {
            format!(
                "cannot listen on {address}: not allowed; ports below 1024 need a privilege, so give {option} another"
            )
        }
        _ => format!("cannot listen on {address} ({option}): {error}"),
    })
}
