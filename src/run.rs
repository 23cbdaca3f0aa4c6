//! A whole weir: its listeners, its workers, and how they stop.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};

use crate::admin::Admin;
use crate::config::{Address, Config};
use crate::proxy::Proxy;
use crate::server::{DrainControl, Tls, Workers};
use crate::systemd::{Listeners, Sockets};
use crate::upstream::connect;

/// After the drain's deadline: how long those who were still waiting have to read that they are refused.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A weir that serves. Dropping it closes its listeners.
pub struct Running {
    /// Where clients connect; ports given as 0 are the ones that were found free.
    pub addresses: Vec<Address>,
    /// Where operators connect.
    pub admin_address: Address,
    /// Where clients speak TLS.
    tls: Option<Tls>,
    admin: Arc<Admin>,
    proxy: Proxy,
    workers: Arc<Workers>,
    drain: DrainControl,
    lame_duck: Duration,
    drain_timeout: Duration,
    listeners: JoinSet<()>,
    /// The admin listener, where others have its socket too.
    shared_admin: Option<AbortHandle>,
}

impl Running {
    /// Binds every listener and begins to serve.
    ///
    /// # Errors
    /// An address that can't be bound, a certificate that can't be used, or no certificate authority to trust the gateway
    /// by.
    pub fn start(config: Config) -> Result<Self, String> {
        Self::start_on(Sockets::default(), config)
    }

    /// As [`Running::start`], on sockets that were handed over, as far as they go.
    ///
    /// # Errors
    /// As [`Running::start`], and a socket that there is no use for.
    pub fn start_on(sockets: Sockets, config: Config) -> Result<Self, String> {
        let connector = connect::network(&config.upstream.base_url)?;
        let settings = config.server.clone();
        let tls = settings.tls.as_ref().map(Tls::load).transpose()?;
        let Listeners { clients, admin: admin_listener } = sockets.listeners(&config)?;
        let addresses = clients.iter().map(|listener| listener.address().clone()).collect();
        let admin_address = admin_listener.address().clone();

        let proxy = Proxy::new(Arc::new(config), connector);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers =
            Workers::start(cores, &proxy, &settings).map_err(|error| format!("cannot start a worker: {error}"))?;
        let workers = Arc::new(workers);
        let admin = Admin::new(proxy.for_another_worker(), workers.clone());
        let (control, drain) = DrainControl::new();
        let mut listeners = JoinSet::new();
        for listener in clients {
            let (workers, tls, drain) = (workers.clone(), tls.clone(), drain.clone());
            listeners.spawn(async move { workers.accept(listener, tls, drain).await });
        }
        let is_shared = admin_listener.is_inherited();
        let accepting_operators = listeners.spawn(admin.clone().serve(admin_listener));
        Ok(Self {
            addresses,
            admin_address,
            tls,
            admin,
            proxy,
            workers,
            drain: control,
            lame_duck: settings.lame_duck,
            drain_timeout: settings.drain,
            listeners,
            shared_admin: is_shared.then_some(accepting_operators),
        })
    }

    /// What clients' TLS handshakes are made with; `None` where they speak plain HTTP.
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// Stops. `/readyz` says no at once, and all goes on for `server.lame_duck`. Then: no new connection, no new request, but
    /// what has begun or waits is served, for as long as `server.drain`. Whoever still waits then is told so, and streams
    /// that still run are cut.
    ///
    /// Dropping the future stops at once.
    pub async fn stop(self) {
        self.admin.not_ready();
        if !self.lame_duck.is_zero() {
            tracing::info!(seconds = self.lame_duck.as_secs_f64(), "not ready any more, but still serving (lame_duck)");
            tokio::time::sleep(self.lame_duck).await;
        }
        self.drain.begin();
        if let Some(admin) = &self.shared_admin {
            // Who asks from now on means the weir that takes over.
            admin.abort();
        }
        tracing::info!(connections = self.workers.connections(), "draining");
        if tokio::time::timeout(self.drain_timeout, self.drain.ended()).await.is_ok() {
            return;
        }
        self.proxy.gate().close();
        let _ = tokio::time::timeout(LAST_WORDS, self.drain.ended()).await;
        tracing::warn!(connections = self.workers.connections(), "the drain's time is over: what still runs is cut");
        drop(self.listeners);
    }
}
