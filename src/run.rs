//! A whole weir: its listeners, its workers, and how they stop.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};

use crate::access_log::{self, AccessLog};
use crate::admin::Admin;
use crate::config::{Address, Config};
use crate::proxy::Proxy;
use crate::reload::{NotReloaded, Reloader, Report, Source};
use crate::server::{DrainControl, Tls, Workers};
use crate::systemd::{Listeners, Sockets};
use crate::upstream::connect;

/// After the drain's deadline: how long those who are told that weir ends have to read it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a worker may take to let go of what is cut. It does not wait for anything.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// A weir that serves. Dropping it closes its listeners.
pub struct Running {
    /// Where clients connect; ports given as 0 are the ones that were found free.
    pub addresses: Vec<Address>,
    /// Where operators connect.
    pub admin_address: Address,
    admin: Arc<Admin>,
    proxy: Proxy,
    workers: Arc<Workers>,
    drain: DrainControl,
    reloader: Arc<Reloader>,
    /// They end when this is dropped.
    _listeners: JoinSet<()>,
    /// The admin listener, where others have its socket too.
    shared_admin: Option<AbortHandle>,
}

impl Running {
    /// Binds every listener and begins to serve.
    ///
    /// # Errors
    /// An address that can't be bound, a certificate that can't be used, no certificate authority to trust the gateway by,
    /// or an access log that can't be written.
    pub fn start(config: Config) -> Result<Self, String> {
        Self::start_on(Sockets::default(), config, Source::default())
    }

    /// As [`Running::start`], on sockets that were handed over, as far as they go, and with a file from which the configuration
    /// can be reloaded.
    ///
    /// # Errors
    /// As [`Running::start`], and a socket that there is no use for.
    pub fn start_on(sockets: Sockets, config: Config, source: Source) -> Result<Self, String> {
        let target = &config.log.access;
        let no_log = |error| format!("cannot write the access log to {target} (log.access): {error}");
        let access = access_log::open(target).map_err(no_log)?;
        let connector = connect::network(&config.upstream.base_url)?;
        let settings = config.server.clone();
        let tls = settings.tls.as_ref().map(Tls::load).transpose()?;
        let Listeners { clients, admin: admin_listener } = sockets.listeners(&config)?;
        let addresses = clients.iter().map(|listener| listener.address().clone()).collect();
        let admin_address = admin_listener.address().clone();
        if settings.admin_token.is_none() && admin_address.tcp().is_some_and(|address| !address.ip().is_loopback()) {
            tracing::warn!(
                address = %admin_address,
                "the admin listener can be reached from other machines, and asks for no token: whoever finds it sees clients, \
                 models and limits; set server.admin_token, or server.admin_listen to a loopback address"
            );
        }

        let proxy = Proxy::new(Arc::new(config), connector);
        proxy.access_log().redirect(access).map_err(|error| format!("cannot start the access log: {error}"))?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers =
            Workers::start(cores, &proxy, &settings).map_err(|error| format!("cannot start a worker: {error}"))?;
        let workers = Arc::new(workers);
        let reloader = Reloader::new(proxy.for_another_worker(), tls.clone(), source);
        let admin = Admin::new(proxy.for_another_worker(), workers.clone(), reloader.clone(), &admin_address);
        let (control, drain) = DrainControl::new();
        let mut listeners = JoinSet::new();
        for listener in clients {
            let (workers, tls, drain) = (workers.clone(), tls.clone(), drain.clone());
            listeners.spawn(async move { workers.accept(listener, tls, drain).await });
        }
        let is_shared = admin_listener.is_inherited();
        let accepting_operators = listeners.spawn(admin.clone().serve(admin_listener));
        listeners.spawn(admin.clone().keep_history());
        Ok(Self {
            addresses,
            admin_address,
            admin,
            proxy,
            workers,
            drain: control,
            reloader,
            _listeners: listeners,
            shared_admin: is_shared.then_some(accepting_operators),
        })
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

    /// Where a line for each finished request is written.
    pub fn access_log(&self) -> &Arc<AccessLog> {
        self.proxy.access_log()
    }

    /// Stops. `/readyz` says no at once, and all goes on for `server.lame_duck`. Then: no new connection, no new request, but
    /// what has begun or waits is served, for as long as `server.drain`. Who has no answer then is refused, a stream ends with an
    /// error; what can't be told, or is not read, is cut a second later.
    ///
    /// Dropped, it has stopped as far as it has come; [`Running::cut`] does the rest at once.
    pub async fn stop(&self) {
        self.admin.not_ready();
        self.reloader.stop();
        let lame_duck = self.proxy.config().server.lame_duck;
        if !lame_duck.is_zero() {
            tracing::info!(seconds = lame_duck.as_secs_f64(), "not ready any more, but still serving (lame_duck)");
            tokio::time::sleep(lame_duck).await;
        }
        self.drain.begin();
        if let Some(admin) = &self.shared_admin {
            // Who asks from now on means the weir that takes over.
            admin.abort();
        }
        tracing::info!(connections = self.workers.connections(), "draining");
        if tokio::time::timeout(self.proxy.config().server.drain, self.drain.ended()).await.is_err() {
            tracing::warn!(
                connections = self.workers.connections(),
                "the drain's time is over: what still runs is told so, and cut"
            );
            self.proxy.gate().close();
            self.proxy.cuts_what_runs();
            self.drain.end();
            let _ = tokio::time::timeout(LAST_WORDS, self.drain.ended()).await;
        }
        self.cut().await;
    }

    /// Ends at once whatever is served. When it returns, every request has its line in the access log, one that was cut too.
    pub async fn cut(&self) {
        self.reloader.stop();
        self.drain.begin();
        // Nobody takes the places of those who are cut.
        self.proxy.gate().close();
        self.proxy.cuts_what_runs();
        if tokio::time::timeout(LAST_BREATH, self.workers.cut()).await.is_err() {
            tracing::warn!("a worker does not end; requests that it served have no line in the access log");
        }
    }
}
