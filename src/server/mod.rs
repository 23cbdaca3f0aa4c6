//! Where clients connect: accepting, serving HTTP/1.1 and HTTP/2, and stopping without cutting anyone off.
//!
//! One thread accepts, and hands each connection to the worker with the fewest. A worker is a single-threaded runtime with
//! connections to the gateway of its own, so that a request is served on one core from its first byte to its last
//! (docs/benchmarks.md has the figures behind this).

pub(crate) mod edge;
mod listener;
mod streams;
mod tls;

use std::convert::Infallible;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Version, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::unconstrained;
use tokio::time::Instant;

use crate::config;
use crate::metrics::{Guard, Metrics};
use crate::proxy::{Proxy, ResponseBody};
use crate::relay::BrokenOff;

pub use listener::{Connection, Inherited, Listener};
pub use tls::{NewCertificate, Tls};

use edge::{ActiveRequest, Activity, ClientIo, Edge, EdgeLimits, Protocol};
use streams::StreamExecutor;

/// HTTP/2 streams at once on one connection.
const MAX_STREAMS: u32 = 256;

/// What a client may send on an HTTP/2 stream, and on a whole connection, before weir has read it.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 256 << 10;

/// Bytes of an HTTP/2 request's header list; those of HTTP/1 are counted by the proxy.
const MAX_HEADER_LIST: u32 = 64 << 10;

/// How long to wait before accepting again when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a connection without a request may still bring one when the drain begins. It is answered, and ends the
/// connection. Closed at once, the connection would meet the next request of a client in full swing, which cannot know
/// whether that was heard (RFC 9112, 9.5); who is silent for so long hardly begins just then.
const LAST_CALL: Duration = Duration::from_secs(1);

/// Tells connections to end when they can.
#[derive(Debug, Clone)]
pub struct Drain {
    stage: watch::Receiver<Stage>,
    /// The same for who asks often: without a lock.
    has_begun: Arc<AtomicBool>,
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Serving,
    Draining,
    Over,
}

/// Begins a drain, and sees when everyone who watches it is gone.
#[derive(Debug)]
pub struct DrainControl {
    stage: watch::Sender<Stage>,
    has_begun: Arc<AtomicBool>,
}

impl DrainControl {
    /// A drain that has not begun.
    pub fn new() -> (Self, Drain) {
        let (control, watching) = watch::channel(Stage::Serving);
        let has_begun = Arc::new(AtomicBool::new(false));
        (Self { stage: control, has_begun: has_begun.clone() }, Drain { stage: watching, has_begun })
    }

    /// Begins: no new request on any connection.
    pub fn begin(&self) {
        self.has_begun.store(true, Ordering::Release);
        self.reach(Stage::Draining);
    }

    /// Its time is over: whatever is still served is polled once more, and each connection ends as soon as it has written what
    /// comes of that.
    pub fn end(&self) {
        self.reach(Stage::Over);
    }

    fn reach(&self, stage: Stage) {
        self.stage.send_if_modified(|reached| std::mem::replace(reached, stage.max(*reached)) < stage);
    }

    /// Waits until every [`Drain`] is dropped: every connection has ended.
    pub async fn ended(&self) {
        self.stage.closed().await;
    }
}

impl Default for DrainControl {
    fn default() -> Self {
        Self::new().0
    }
}

impl Drain {
    /// Polled once, it wakes its task when the drain begins, however much that had done in its turn: tokio would have a task
    /// whose budget is used up ask again ([`ends_before`] does not).
    async fn begun(&mut self) {
        // The control is gone only when the process ends.
        let _ = unconstrained(self.stage.wait_for(|stage| *stage >= Stage::Draining)).await;
    }

    async fn over(&mut self) {
        let _ = self.stage.wait_for(|stage| *stage == Stage::Over).await;
    }

    /// Runs something to its end, and polls it once more when the drain is over.
    async fn run_to_end<F: Future>(&mut self, mut running: Pin<&mut F>) -> F::Output {
        tokio::select! {
            biased;
            ended = running.as_mut() => return ended,
            () = self.over() => {}
        }
        running.await
    }

    fn has_begun(&self) -> bool {
        self.has_begun.load(Ordering::Acquire)
    }

    /// The drain has begun, and the time for requests that were on their way is over.
    async fn last_call_over(&mut self) {
        self.begun().await;
        sleep(LAST_CALL).await;
    }
}

/// Serves one connection until it ends: HTTP/1.1, or HTTP/2 where the client begins with it. `peer` is the address that
/// it comes from, where it has one.
///
/// Dropping the future closes the connection and cancels its requests.
pub fn serve_connection<I>(
    io: I,
    peer: Option<IpAddr>,
    proxy: Arc<Proxy>,
    settings: &config::Server,
    drain: Drain,
) -> impl Future<Output = ()>
where
    I: ClientIo + Send + 'static,
{
    serve_protocol(io, None, peer, proxy, settings, drain)
}

/// As [`serve_connection`], after a TLS handshake that may take `header_timeout`.
pub async fn serve_tls_connection<I>(
    io: I,
    peer: Option<IpAddr>,
    tls: &Tls,
    proxy: Arc<Proxy>,
    settings: &config::Server,
    mut drain: Drain,
) where
    I: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
{
    let handshake = tokio::time::timeout(settings.header_timeout, tls.accept(io));
    let accepted = tokio::select! {
        biased;
        accepted = handshake => accepted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        () = drain.last_call_over() => return,
    };
    match accepted {
        Ok((io, protocol)) => serve_protocol(io, protocol, peer, proxy, settings, drain).await,
        Err(error) => {
            proxy.metrics().failed_handshake();
            tracing::debug!(%error, "a client's TLS handshake failed");
        }
    }
}

/// Serves a connection on which this protocol was agreed, or on which the first bytes tell.
async fn serve_protocol<I>(
    io: I,
    agreed: Option<Protocol>,
    peer: Option<IpAddr>,
    proxy: Arc<Proxy>,
    settings: &config::Server,
    mut drain: Drain,
) where
    I: ClientIo + Send + 'static,
{
    let limits =
        EdgeLimits { header: settings.header_timeout, keep_alive: settings.keep_alive, write: settings.write_timeout };
    let activity = Arc::new(Activity::default());
    let metrics = proxy.metrics().clone();
    let mut edge = Edge::new(io, activity.clone(), limits, Some(metrics.clone()));
    let protocol = match agreed {
        Some(agreed) => Ok(agreed),
        None => tokio::select! {
            biased;
            protocol = edge.detect() => protocol,
            () = drain.last_call_over() => return,
        },
    };
    let requests = activity.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let active = requests.begin(request.version() == Version::HTTP_2);
        // Boxed: hyper moves it several times, and would keep its room for as long as the connection lives.
        Box::pin(serve(proxy.clone(), request, peer, active))
    });
    let ended: Result<(), Box<dyn Error + Send + Sync>> = match protocol {
        Ok(Protocol::Http1) => {
            let connection = http1().serve_connection(TokioIo::new(edge), service);
            let mut connection = pin!(connection);
            let watched = drain.clone();
            let ended = match ends_before(connection.as_mut(), &watched, last_call(&activity, &mut drain)).await {
                Some(ended) => ended,
                None => {
                    connection.as_mut().graceful_shutdown();
                    drain.run_to_end(connection).await
                }
            };
            ended.map_err(Into::into)
        }
        Ok(Protocol::Http2) => {
            let connection =
                http2(settings.write_timeout, metrics, &drain).serve_connection(TokioIo::new(edge), service);
            // Boxed, so that the many of HTTP/1 need no room for it.
            let mut connection = Box::pin(connection);
            let ended = tokio::select! {
                biased;
                ended = connection.as_mut() => ended,
                () = drain.begun() => {
                    // The client is told which of its requests are still served (RFC 9113, 6.8).
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            ended.map_err(Into::into)
        }
        Err(error) => Err(error.into()),
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a client's connection ended early");
    }
    // Whoever waits for the drain to end waits for this.
    drop(drain);
}

/// Serves one request.
async fn serve(
    proxy: Arc<Proxy>,
    request: Request<Incoming>,
    peer: Option<IpAddr>,
    active: ActiveRequest,
) -> Result<Response<Tracked>, Infallible> {
    let version = request.version();
    let mut response = proxy.serve(request, peer).await;
    if version != Version::HTTP_2 && active.is_last() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if version == Version::HTTP_10 && response.body().size_hint().exact().is_none() {
        // There are no chunks in HTTP/1.0: what breaks off, wherever, must not end as a whole answer does.
        active.set_open_ended(true);
    }
    let response = response.map(|body| Tracked::new(body, active));
    // A client whose window is shut from the start never asks for the first chunk.
    streams::gave();
    Ok(response)
}

/// How a connection ends; `None` where its `last_call` is over before. That one only waits for the drain at first, which wakes
/// this task, so until then it is not asked again with every piece of an answer.
async fn ends_before<T>(
    mut connection: impl Future<Output = T> + Unpin,
    drain: &Drain,
    last_call: impl Future<Output = ()>,
) -> Option<T> {
    let mut last_call = pin!(last_call);
    let mut woken_by_drain: Option<Waker> = None;
    poll_fn(|cx| {
        if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
            return Poll::Ready(Some(ended));
        }
        let will_be_woken = woken_by_drain.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if will_be_woken && !drain.has_begun() {
            return Poll::Pending;
        }
        woken_by_drain = Some(cx.waker().clone());
        last_call.as_mut().poll(cx).map(|()| None)
    })
    .await
}

/// Waits for the drain, and then until the connection has been without a request for as long as [`LAST_CALL`]. From the
/// drain on every answer of HTTP/1 says that it is the connection's last; a stream that had begun before could not say so,
/// and its client may ask again. When the drain is over there is no more waiting.
async fn last_call(activity: &Activity, drain: &mut Drain) {
    drain.begun().await;
    activity.end_with_next_answer();
    // Boxed, as the sleep is.
    let over = Box::pin(drain.over());
    tokio::select! {
        () = quiet(activity) => {}
        () = over => {}
    }
}

/// Waits until the connection has been without a request for as long as [`LAST_CALL`].
async fn quiet(activity: &Activity) {
    let mut quiet_since = Instant::now();
    loop {
        sleep(quiet_since + LAST_CALL - Instant::now()).await;
        match activity.idle_since() {
            Some(idle_since) if idle_since <= quiet_since => return,
            Some(idle_since) => quiet_since = idle_since,
            None => quiet_since = Instant::now(),
        }
    }
}

/// Sleeps in a box: connections of all kinds would keep room for it all their lives.
async fn sleep(time: Duration) {
    Box::pin(tokio::time::sleep(time)).await;
}

fn http1() -> http1::Builder {
    let mut builder = http1::Builder::new();
    // Deadlines are the edge's; hyper's own would be the keep-alive limit too.
    builder.timer(TokioTimer::new()).header_read_timeout(None);
    builder
}

fn http2(write_timeout: Duration, metrics: Arc<Metrics>, drain: &Drain) -> http2::Builder<StreamExecutor> {
    let mut builder = http2::Builder::new(StreamExecutor { write_timeout, metrics, drain: drain.clone() });
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
    is_broken: bool,
    active: ActiveRequest,
}

impl Tracked {
    fn new(body: ResponseBody, active: ActiveRequest) -> Self {
        Self { body, broken_off: None, is_broken: false, active }
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
                (tracked.broken_off, tracked.is_broken) = (Some(broken_off), true);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(Some(Ok(_))) => streams::gave(),
            Poll::Ready(None) => tracked.active.set_open_ended(false),
            Poll::Pending => {}
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

impl Drop for Tracked {
    fn drop(&mut self) {
        // hyper need not ask for the end of a body that says by itself that nothing more is to come.
        if !self.is_broken && self.is_end_stream() {
            self.active.set_open_ended(false);
        }
    }
}

/// The threads that serve connections.
pub struct Workers {
    workers: Vec<Worker>,
    /// Whether they are to let go of everything. Each thread keeps a receiver until it has.
    over: watch::Sender<bool>,
    connections: Arc<Semaphore>,
    max_connections: usize,
    metrics: Arc<Metrics>,
}

struct Worker {
    /// Unbounded in form; bounded by `max_connections`, since each carries one of its permits.
    inbox: mpsc::UnboundedSender<Accepted>,
    open: Arc<AtomicUsize>,
    runtime: Handle,
}

/// A connection that belongs to no runtime.
enum Stream {
    Tcp(std::net::TcpStream),
    Tls(std::net::TcpStream, Tls),
    Unix(std::os::unix::net::UnixStream),
}

impl Stream {
    fn new(connection: Connection, tls: Option<&Tls>) -> io::Result<Self> {
        Ok(match (connection, tls) {
            (Connection::Tcp(stream), None) => Self::Tcp(stream.into_std()?),
            (Connection::Tcp(stream), Some(tls)) => Self::Tls(stream.into_std()?, tls.clone()),
            (Connection::Unix(stream), _) => Self::Unix(stream.into_std()?),
        })
    }
}

/// A connection on its way to its worker.
struct Accepted {
    stream: Stream,
    peer: Option<IpAddr>,
    drain: Drain,
    permit: OwnedSemaphorePermit,
}

impl Workers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// A thread or its runtime could not be made.
    pub fn start(count: usize, proxy: &Proxy, settings: &config::Server) -> io::Result<Self> {
        let (over, watching) = watch::channel(false);
        let start = |number| Worker::start(number, Arc::new(proxy.for_another_worker()), watching.clone());
        let max_connections = settings.max_connections as usize;
        Ok(Self {
            workers: (0..count.max(1)).map(start).collect::<io::Result<_>>()?,
            over,
            connections: Arc::new(Semaphore::new(max_connections)),
            max_connections,
            metrics: proxy.metrics().clone(),
        })
    }

    /// Cuts every connection, and waits until all that was served on them is gone: each account is closed then. The threads
    /// end with it, and serve nothing any more.
    pub async fn cut(&self) {
        self.over.send_replace(true);
        self.over.closed().await;
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

    /// Accepts connections until the drain begins, and then those who have connected by then, as far as there are places;
    /// closes the listener. Over TCP clients have to speak TLS, where it is given.
    pub async fn accept(&self, listener: Listener, tls: Option<Tls>, mut drain: Drain) {
        let watching = drain.clone();
        loop {
            // Beyond the limit nobody is accepted: they wait in the kernel's backlog.
            let next = async {
                let permit = self.place().await;
                (listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                biased;
                () = drain.begun() => break,
                next = next => next,
            };
            match accepted {
                Ok((connection, peer)) => self.take(connection, peer, tls.as_ref(), watching.clone(), permit),
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot accept connections; raise the limit of open files if they have run out");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        for accepted in listener.close() {
            match (accepted, self.connections.clone().try_acquire_owned()) {
                (Ok((connection, peer)), Ok(permit)) => {
                    self.take(connection, peer, tls.as_ref(), watching.clone(), permit);
                }
                (Err(error), Ok(_)) if is_passing(&error) => {}
                // Nobody is there any more, or there is no place.
                _ => return,
            }
        }
    }

    fn take(
        &self,
        connection: Connection,
        peer: Option<IpAddr>,
        tls: Option<&Tls>,
        drain: Drain,
        permit: OwnedSemaphorePermit,
    ) {
        match Stream::new(connection, tls) {
            Ok(stream) => self.hand_over(Accepted { stream, peer, drain, permit }),
            Err(error) => tracing::debug!(%error, "a connection was lost on its way"),
        }
    }

    /// A place for one more client. Waits while all are taken, which is counted.
    async fn place(&self) -> OwnedSemaphorePermit {
        let connections = || self.connections.clone();
        if let Ok(permit) = connections().try_acquire_owned() {
            return permit;
        }
        self.metrics.guard(Guard::MaxConnections);
        connections().acquire_owned().await.expect("the semaphore is never closed")
    }

    fn hand_over(&self, accepted: Accepted) {
        let idlest =
            self.workers.iter().min_by_key(|worker| worker.open.load(Ordering::Relaxed)).expect("there is a worker");
        idlest.open.fetch_add(1, Ordering::Relaxed);
        // A worker that was cut takes nobody.
        let _ = idlest.inbox.send(accepted);
    }
}

/// Errors of the connection that was to be accepted, not of accepting.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

impl Worker {
    fn start(number: usize, proxy: Arc<Proxy>, mut over: watch::Receiver<bool>) -> io::Result<Self> {
        let (inbox, accepted) = mpsc::unbounded_channel();
        let open = Arc::new(AtomicUsize::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let work = work(accepted, proxy, open.clone());
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    biased;
                    // Nobody can say so any more when the workers themselves are dropped.
                    _ = over.wait_for(|over| *over) => {}
                    () = work => {}
                }
            });
            // What it still serves is dropped here. A name that is being looked up is not waited for.
            runtime.shutdown_background();
            drop(over);
        };
        std::thread::Builder::new().name(format!("worker-{number}")).spawn(run)?;
        Ok(Self { inbox, open, runtime: handle })
    }
}

/// Serves every connection that is handed over, each in a task of its own.
async fn work(mut inbox: mpsc::UnboundedReceiver<Accepted>, proxy: Arc<Proxy>, open: Arc<AtomicUsize>) {
    while let Some(Accepted { stream, peer, drain, permit }) = inbox.recv().await {
        // A connection keeps the deadlines that it began with.
        let (proxy, config, place) = (proxy.clone(), proxy.config(), Place(open.clone()));
        tokio::spawn(async move {
            if let Err(error) = serve_stream(stream, peer, proxy, &config.server, drain).await {
                tracing::debug!(%error, "a connection was lost on its way");
            }
            drop((place, permit));
        });
    }
}

/// Serves a connection of any kind. All but plain TCP is boxed, so that plain TCP pays nothing for it.
async fn serve_stream(
    stream: Stream,
    peer: Option<IpAddr>,
    proxy: Arc<Proxy>,
    settings: &config::Server,
    drain: Drain,
) -> io::Result<()> {
    match stream {
        Stream::Tcp(stream) => serve_connection(prepare(stream)?, peer, proxy, settings, drain).await,
        Stream::Tls(stream, tls) => {
            let stream = prepare(stream)?;
            Box::pin(serve_tls_connection(stream, peer, &tls, proxy, settings, drain)).await;
        }
        Stream::Unix(stream) => {
            let io = Connection::Unix(UnixStream::from_std(stream)?).into_io();
            Box::pin(serve_connection(io, peer, proxy, settings, drain)).await;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::task::ready;

    use tokio::task::coop::{has_budget_remaining, poll_proceed};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_has_much_to_do_when_it_begins_hears_of_the_drain_all_the_same() {
        let (control, drain) = DrainControl::new();
        let connection = tokio::spawn(async move {
            let (watched, mut waits) = (drain.clone(), drain);
            // Its first turn uses up what a task may do in one, and after that there is nothing to do.
            let mut first = true;
            let busy = poll_fn(|cx| {
                while first && has_budget_remaining() {
                    ready!(poll_proceed(cx)).made_progress();
                }
                first = false;
                Poll::<()>::Pending
            });
            ends_before(busy, &watched, async { waits.begun().await }).await
        });
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        control.begin();
        let ended = tokio::time::timeout(LAST_CALL, connection).await.expect("it hears of the drain");
        assert_eq!(ended.expect("no panic"), None);
    }
}
