//! The operators' listener: `/metrics`, `/livez`, `/readyz`, `/reload`.
//!
//! It runs on the main thread's runtime, apart from the workers, so that it answers however busy they are.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::metrics::Gauges;
use crate::proxy::Proxy;
use crate::reload::{NotReloaded, Reloader};
use crate::server::Workers;
use crate::server::edge::{Activity, Edge, EdgeLimits};

/// Scrapers and probes at once; a further one waits.
const MAX_CONNECTIONS: usize = 64;

/// A scraper or probe that is slower than this is cut off, so that none of them can keep the others out.
const LIMITS: EdgeLimits =
    EdgeLimits { header: Duration::from_secs(10), keep_alive: Duration::from_secs(75), write: Duration::from_secs(10) };

/// What the operators' listener tells of.
pub struct Admin {
    proxy: Proxy,
    workers: Arc<Workers>,
    reloader: Arc<Reloader>,
    /// Whether `/readyz` says yes.
    ready: AtomicBool,
}

impl Admin {
    /// Tells of this proxy, which is ready, and of the threads that it runs on; and has its configuration reloaded.
    pub fn new(proxy: Proxy, workers: Arc<Workers>, reloader: Arc<Reloader>) -> Arc<Self> {
        Arc::new(Self { proxy, workers, reloader, ready: AtomicBool::new(true) })
    }

    /// From now on `/readyz` says no: weir is about to stop.
    pub fn not_ready(&self) {
        self.ready.store(false, Ordering::Release);
    }

    /// Answers on this listener until dropped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let permit = connections.clone().acquire_owned().await.expect("the semaphore is never closed");
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors, most likely; the server's own log line says so.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let admin = self.clone();
            tokio::spawn(async move {
                admin.serve_connection(stream).await;
                drop(permit);
            });
        }
    }

    async fn serve_connection(self: Arc<Self>, stream: TcpStream) {
        let activity = Arc::new(Activity::default());
        let io = TokioIo::new(Edge::new(stream, activity.clone(), LIMITS));
        let service = service_fn(|request: Request<Incoming>| {
            let (active, admin) = (activity.begin(false), self.clone());
            async move {
                let response = match (request.method(), request.uri().path()) {
                    (&Method::POST, "/reload") => admin.reload().await,
                    (method, path) => admin.answer(method, path),
                };
                drop(active);
                Ok::<_, Infallible>(response)
            }
        });
        // The edge's deadlines are the ones in force.
        if let Err(error) = http1::Builder::new().header_read_timeout(None).serve_connection(io, service).await {
            tracing::debug!(%error, "an operator's connection ended early");
        }
    }

    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here, and POST /reload\n");
        }
        match path {
            "/metrics" => self.metrics(),
            "/livez" => text(StatusCode::OK, "alive\n"),
            "/readyz" if self.ready.load(Ordering::Acquire) => text(StatusCode::OK, "ready\n"),
            "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            "/reload" => text(StatusCode::METHOD_NOT_ALLOWED, "POST reloads the configuration\n"),
            _ => text(
                StatusCode::NOT_FOUND,
                "there is /metrics, /livez, /readyz and POST /reload here; clients use the other listener\n",
            ),
        }
    }

    /// Reads the configuration's file anew. A client that hangs up before it was read changes nothing.
    async fn reload(&self) -> Response<Full<Bytes>> {
        match self.reloader.reload_file().await {
            Ok(report) => text(StatusCode::OK, report.to_string()),
            Err(refused) => {
                let status = match refused {
                    NotReloaded::Invalid(..) => StatusCode::UNPROCESSABLE_ENTITY,
                    NotReloaded::NoFile | NotReloaded::CannotChange(_) => StatusCode::CONFLICT,
                    NotReloaded::Stopping => StatusCode::SERVICE_UNAVAILABLE,
                };
                text(status, format!("{refused}\n"))
            }
        }
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let tasks = self.workers.tasks() + Handle::current().metrics().num_alive_tasks();
        let gauges = Gauges {
            tasks: tasks as u64,
            client_connections: self.workers.connections() as u64,
            client_connections_limit: self.workers.max_connections() as u64,
            ..self.proxy.gauges()
        };
        let mut response = text(StatusCode::OK, self.proxy.metrics().encode(&gauges));
        let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
