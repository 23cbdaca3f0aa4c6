//! The operators' listener: the status page and what is behind it, metrics, and probes.
//!
//! It accepts on the main thread's runtime, apart from the workers, so that it answers however busy they are. What takes
//! longer than a moment (text for a scraper, a survey for the page) is made on a thread of its own, one at a time: the main
//! thread accepts clients and keeps the queue's time.

mod explain;
mod history;
mod limit;
mod origin;
mod page;
pub mod query;
mod status;
mod token;

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior};

use crate::config::{Address, Concurrency};
use crate::metrics::Gauges;
use crate::proxy::Proxy;
use crate::reload::{NotReloaded, Reloader};
use crate::server::edge::{Activity, ClientIo, Edge, EdgeLimits};
use crate::server::{Listener, Workers};

use explain::{Explanation, Question};
use history::History;
use query::Query;
use status::{Sources, Status};

/// Scrapers, browsers and probes at once; a further one waits.
const MAX_CONNECTIONS: usize = 64;

/// Whoever is slower than this is cut off, so that none of them can keep the others out.
const LIMITS: EdgeLimits =
    EdgeLimits { header: Duration::from_secs(10), keep_alive: Duration::from_secs(75), write: Duration::from_secs(10) };

/// What there is, for who asks for something else.
const CONTENTS: &str = "this is weir's listener for operators: there is /status (a page), /status.json, /explain, /metrics, \
                        /livez, /readyz and POST /reload here; clients use the other one (server.listen)\n";

type Answer = Response<Full<Bytes>>;

/// What the operators' listener tells of.
pub struct Admin {
    proxy: Proxy,
    workers: Arc<Workers>,
    reloader: Arc<Reloader>,
    /// The listener is on loopback, where it is web pages that have to be kept out.
    on_loopback: bool,
    /// Whether `/readyz` says yes.
    ready: AtomicBool,
    started: Instant,
    /// The last ten minutes. Locked for a sample, or for what is made of them.
    history: Mutex<History>,
    /// Held by what is done on a thread of its own: one at a time, so that scrapers leave a core to the workers.
    turn: Arc<Semaphore>,
}

impl Admin {
    /// Tells of this proxy, which is ready, and of the threads that it runs on; and has its configuration reloaded. It will listen
    /// at that address.
    pub fn new(proxy: Proxy, workers: Arc<Workers>, reloader: Arc<Reloader>, listen: &Address) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            history: Mutex::new(History::new(proxy.metrics().read(), now)),
            proxy,
            workers,
            reloader,
            on_loopback: listen.tcp().is_some_and(|address| address.ip().is_loopback()),
            ready: AtomicBool::new(true),
            started: now,
            turn: Arc::new(Semaphore::new(1)),
        })
    }

    /// From now on `/readyz` says no: weir is about to stop.
    pub fn not_ready(&self) {
        self.ready.store(false, Ordering::Release);
    }

    /// Answers on this listener until dropped.
    pub async fn serve(self: Arc<Self>, listener: Listener) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let permit = connections.clone().acquire_owned().await.expect("the semaphore is never closed");
            let Ok((connection, _)) = listener.accept().await else {
                // Out of file descriptors, most likely; the server's own log line says so.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let admin = self.clone();
            tokio::spawn(async move {
                admin.serve_connection(connection.into_io()).await;
                drop(permit);
            });
        }
    }

    /// Answers on one connection until it ends.
    pub async fn serve_connection(self: Arc<Self>, io: impl ClientIo) {
        let activity = Arc::new(Activity::default());
        let io = TokioIo::new(Edge::new(io, activity.clone(), LIMITS, None));
        let service = service_fn(|request: Request<Incoming>| {
            let (active, admin) = (activity.begin(false), self.clone());
            async move {
                let response = admin.answer(&request).await;
                drop(active);
                Ok::<_, Infallible>(response)
            }
        });
        // The edge's deadlines are the ones in force.
        if let Err(error) = http1::Builder::new().header_read_timeout(None).serve_connection(io, service).await {
            tracing::debug!(%error, "an operator's connection ended early");
        }
    }

    /// Notes every few seconds what was counted, for rates and for the page's lines. Until dropped.
    pub async fn keep_history(self: Arc<Self>) {
        let mut ticks = tokio::time::interval_at(Instant::now() + history::INTERVAL, history::INTERVAL);
        // Whatever it was held up by, an interval is no shorter for it.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.clone().aside(Self::sample).await;
        }
    }

    /// Reads the configuration's file anew. A client that hangs up before it was read changes nothing.
    async fn reload(&self) -> Answer {
        match self.reloader.reload_file().await {
            Ok(report) => text(StatusCode::OK, report.to_string()),
            Err(refused) => {
                let status = match refused {
                    NotReloaded::Invalid(..) | NotReloaded::AccessLog(_) | NotReloaded::Tls(_) => {
                        StatusCode::UNPROCESSABLE_ENTITY
                    }
                    NotReloaded::NoFile | NotReloaded::CannotChange(_) => StatusCode::CONFLICT,
                    NotReloaded::Stopping | NotReloaded::Slow(_) => StatusCode::SERVICE_UNAVAILABLE,
                };
                text(status, format!("{refused}\n"))
            }
        }
    }

    async fn answer<B>(self: Arc<Self>, request: &Request<B>) -> Answer {
        let (method, path) = (request.method(), request.uri().path());
        let config = self.proxy.config();
        let token = config.server.admin_token.as_ref();
        let is_of_this_machine = || !self.on_loopback || origin::is_of_this_machine(request);
        let mut response = match path {
            "/livez" | "/readyz" => self.open(method, path),
            _ if token.is_none() && !is_of_this_machine() => text(StatusCode::FORBIDDEN, origin::STRANGE_NAME),
            "/status" | "/" => self.open(method, path),
            _ if !token::admits(token, request.headers()) => unauthorized(),
            _ if token.is_none() && origin::is_forged(request) => text(StatusCode::FORBIDDEN, origin::STRANGE_PAGE),
            "/reload" if method == Method::POST => self.reload().await,
            "/reload" => not_allowed("POST"),
            _ => self.guarded(method, path, request.uri().query()).await,
        };
        let fields = response.headers_mut();
        // What is true now is not in a second; and a browser is not to take it for anything else than it is.
        fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        fields.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response
    }

    /// What needs no token: it tells nothing but whether weir is ready. (The page is empty without /status.json.)
    fn open(&self, method: &Method, path: &str) -> Answer {
        if !is_read(method) {
            return not_allowed("GET, HEAD");
        }
        match path {
            "/livez" => text(StatusCode::OK, "alive\n"),
            "/readyz" if self.is_ready() => text(StatusCode::OK, "ready\n"),
            "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            "/" => page::to_the_page(),
            _ => page::page(),
        }
    }

    async fn guarded(self: Arc<Self>, method: &Method, path: &str, query: Option<&str>) -> Answer {
        if !is_read(method) {
            return not_allowed("GET, HEAD");
        }
        let query = Query::new(query);
        match path {
            "/metrics" => self.aside(Self::metrics).await,
            "/status.json" => {
                let model = query.get("model");
                self.aside(move |admin| admin.status(model.as_deref())).await
            }
            "/explain" => {
                let tokens = query.get("tokens").and_then(|tokens| tokens.parse().ok());
                let question = Question { client: query.get("client"), model: query.get("model"), tokens };
                self.aside(move |admin| admin.explain(&question)).await
            }
            _ => text(StatusCode::NOT_FOUND, CONTENTS),
        }
    }

    /// Does what takes a while on a thread of its own. Dropped while it waits for its turn, nothing is done; after that it is done
    /// to its end, and keeps its turn until then.
    async fn aside<T: Send + 'static>(self: Arc<Self>, work: impl FnOnce(&Self) -> T + Send + 'static) -> T {
        let turn = self.turn.clone().acquire_owned().await.expect("the semaphore is never closed");
        // For the count of this runtime's tasks, and its clock.
        let runtime = Handle::current();
        let work = move || {
            let _entered = runtime.enter();
            let done = work(&self);
            drop(turn);
            done
        };
        tokio::task::spawn_blocking(work).await.expect("what makes an answer does not panic")
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    fn metrics(&self) -> Answer {
        let mut response = text(StatusCode::OK, self.proxy.metrics().encode(&self.gauges()));
        let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    fn gauges(&self) -> Gauges {
        let tasks = self.workers.tasks() + Handle::current().metrics().num_alive_tasks();
        Gauges {
            tasks: tasks as u64,
            client_connections: self.workers.connections() as u64,
            client_connections_limit: self.workers.max_connections() as u64,
            is_draining: !self.is_ready(),
            ..self.proxy.gauges()
        }
    }

    fn status(&self, model: Option<&str>) -> Answer {
        let (proxy, reading) = (&self.proxy, self.proxy.metrics().read());
        let survey = proxy.gate().survey(&proxy.clients());
        // After the survey: who is in it is known then, also while a reload brings clients in.
        let (clients, config) = (proxy.clients(), proxy.config());
        let concurrency = match config.limits.concurrency {
            Concurrency::Adaptive => None,
            Concurrency::Fixed(slots) => Some(slots),
        };
        let status = Status::of(Sources {
            ready: self.is_ready(),
            started: self.started,
            now: Instant::now(),
            gateway: config.upstream.base_url.to_string(),
            concurrency,
            gauges: &self.gauges(),
            survey: &survey,
            reading: &reading,
            history: &self.history(),
            models: proxy.models(),
            clients: &clients,
            recent_errors: proxy.recent_errors(),
            line: model.map(|name| proxy.models().find(name)),
        });
        json(StatusCode::OK, &status)
    }

    fn explain(&self, question: &Question) -> Answer {
        match Explanation::of(question, &self.proxy, &self.proxy.metrics().read(), self.is_ready()) {
            Ok(explanation) => json(StatusCode::OK, &explanation),
            Err(unknown) => json(StatusCode::NOT_FOUND, &unknown),
        }
    }

    fn sample(&self) {
        let survey = self.proxy.gate().survey(&self.proxy.clients());
        let reading = self.proxy.metrics().read();
        self.history().note(reading, survey.in_flight, survey.waiting, Instant::now());
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

fn not_allowed(instead: &'static str) -> Answer {
    let mut response =
        text(StatusCode::METHOD_NOT_ALLOWED, format!("only {instead} is answered at this path; {CONTENTS}"));
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(instead));
    response
}

fn unauthorized() -> Answer {
    let mut response = text(StatusCode::UNAUTHORIZED, token::HELP);
    response.headers_mut().insert(header::WWW_AUTHENTICATE, token::CHALLENGE);
    response
}

fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    let body = serde_json::to_vec(body).expect("what is told has text for keys");
    let mut response = text(status, body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
