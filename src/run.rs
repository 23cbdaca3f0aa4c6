//! A whole weir: its listeners, its workers, and how they stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::admin::Admin;
use crate::config::Config;
use crate::proxy::Proxy;
use crate::reload::{NotReloaded, Reloader, Report, Source};
use crate::server::{self, DrainControl, Workers};
use crate::upstream::connect;

/// After the drain's deadline: how long those who were still waiting have to read that they are refused.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A weir that serves. Dropping it closes its listeners.
pub struct Running {
    /// Where clients connect; ports given as 0 are the ones that were found free.
    pub addresses: Vec<SocketAddr>,
    /// Where operators connect.
    pub admin_address: SocketAddr,
    admin: Arc<Admin>,
    proxy: Proxy,
    workers: Arc<Workers>,
    drain: DrainControl,
    reloader: Arc<Reloader>,
    listeners: JoinSet<()>,
}

impl Running {
    /// Binds every listener and begins to serve.
    ///
    /// # Errors
    /// An address that can't be bound, or no certificate authority to trust the gateway by.
    pub fn start(config: Config) -> Result<Self, String> {
        Self::start_with(config, Source::default())
    }

    /// As [`Running::start`], with a file from which the configuration can be reloaded.
    ///
    /// # Errors
    /// As there.
    pub fn start_with(config: Config, source: Source) -> Result<Self, String> {
        let connector = connect::network(config.upstream.base_url.is_tls())?;
        let settings = config.server.clone();
        let bound = settings.listen.iter().map(|address| server::bind(*address, "server.listen"));
        let bound: Vec<_> = bound.collect::<Result<_, _>>()?;
        let admin_listener = server::bind(settings.admin_listen, "server.admin_listen")?;
        let address = |listener: &tokio::net::TcpListener| listener.local_addr().map_err(|error| error.to_string());
        let addresses = bound.iter().map(address).collect::<Result<_, _>>()?;
        let admin_address = address(&admin_listener)?;

        let proxy = Proxy::new(Arc::new(config), connector);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers =
            Workers::start(cores, &proxy, &settings).map_err(|error| format!("cannot start a worker: {error}"))?;
        let workers = Arc::new(workers);
        let reloader = Reloader::new(proxy.for_another_worker(), source);
        let admin = Admin::new(proxy.for_another_worker(), workers.clone(), reloader.clone());
        let (control, drain) = DrainControl::new();
        let mut listeners = JoinSet::new();
        for listener in bound {
            let (workers, drain) = (workers.clone(), drain.clone());
            listeners.spawn(async move { workers.accept(listener, drain).await });
        }
        listeners.spawn(admin.clone().serve(admin_listener));
        Ok(Self { addresses, admin_address, admin, proxy, workers, drain: control, reloader, listeners })
    }

    /// Puts another configuration in force, whole or not at all.
    ///
    /// # Errors
    /// Why nothing has changed.
    pub fn reload(&self, config: Config) -> Result<Report, NotReloaded> {
        self.reloader.reload(config)
    }

    /// Reads the configuration's file anew, and puts what it says in force, whole or not at all. What became of it is counted
    /// and logged.
    ///
    /// # Errors
    /// Why nothing has changed.
    pub async fn reload_file(&self) -> Result<Report, NotReloaded> {
        self.reloader.reload_file().await
    }

    /// Stops: no new connection, no new request, but what has begun or waits is served, for as long as `server.drain`.
    /// Whoever still waits then is told so, and streams that still run are cut.
    ///
    /// Dropping the future stops at once.
    pub async fn stop(self) {
        self.admin.not_ready();
        self.reloader.stop();
        self.drain.begin();
        tracing::info!(connections = self.workers.connections(), "draining");
        if tokio::time::timeout(self.proxy.config().server.drain, self.drain.ended()).await.is_ok() {
            return;
        }
        self.proxy.gate().close();
        let _ = tokio::time::timeout(LAST_WORDS, self.drain.ended()).await;
        tracing::warn!(connections = self.workers.connections(), "the drain's time is over: what still runs is cut");
        drop(self.listeners);
    }
}
