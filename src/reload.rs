//! Another configuration for a weir that runs: read, checked as a whole, and put in force whole or not at all.
//!
//! What cannot change live (`config::change::NEEDS_RESTART`) is a reason to refuse all of it: so after a reload that was
//! applied, what is in force is what the file says, every option of it; and after one that was not, nothing has changed.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};

use crate::access_log;
use crate::config::change::Change;
use crate::config::{Complaints, Config};
use crate::metrics::ReloadResult;
use crate::outlet::Sink;
use crate::proxy::{CannotChange, Proxy};
use crate::server::{NewCertificate, Tls};
use crate::systemd;

/// How long a reload may take to read all that it needs, and to wait for one before it. A disk that hangs is not waited for
/// longer; what comes from it later is thrown away.
const PATIENCE: Duration = Duration::from_secs(10);

/// Is told of each configuration that has come into force.
pub type OnApplied = Box<dyn Fn(&Config) + Send + Sync>;

/// Where other configurations come from, and who else has to know of them.
#[derive(Default)]
pub struct Source {
    /// The file that is read anew; `None` where weir was given none.
    pub file: Option<PathBuf>,
    /// For what is not the proxy's: the log's level.
    pub on_applied: Option<OnApplied>,
}

/// Puts other configurations in force, one at a time.
pub struct Reloader {
    proxy: Proxy,
    /// Whose certificate is read anew, too.
    tls: Option<Tls>,
    source: Source,
    /// Held from before the file is read until what it says is in force.
    turn: Arc<Mutex<()>>,
    stopping: AtomicBool,
}

/// A configuration, with what had to be opened and read for it: none of that may wait for a disk when it is put in force.
struct Prepared {
    config: Config,
    /// The new access log, where it is another than before.
    access_log: Option<Option<Box<dyn Sink>>>,
    certificate: Option<NewCertificate>,
}

impl Prepared {
    /// Opens and reads it. `before` is what is in force.
    fn new(config: Config, before: &Config) -> Result<Self, NotReloaded> {
        let target = &config.log.access;
        let open = || {
            let no_log = |error| NotReloaded::AccessLog(format!("cannot write the access log to {target}: {error}"));
            access_log::open(target).map_err(no_log)
        };
        let access_log = (*target != before.log.access).then(open).transpose()?;
        let certificate = config.server.tls.as_ref().map(NewCertificate::read).transpose().map_err(NotReloaded::Tls)?;
        Ok(Self { config, access_log, certificate })
    }
}

/// What has changed by a reload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub changes: Vec<Change>,
}

/// Why nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotReloaded {
    /// weir was started without a file.
    NoFile,
    /// It is about to stop.
    Stopping,
    /// The file, or what it names, could not be read in time; or a reload before it still waits for that.
    Slow(PathBuf),
    /// The file, and all that is wrong with it.
    Invalid(PathBuf, Complaints),
    /// The certificate cannot be used.
    Tls(String),
    /// The new access log cannot be opened.
    AccessLog(String),
    /// It is right, but cannot come into force while weir runs.
    CannotChange(CannotChange),
}

impl Reloader {
    /// For this proxy, with configurations from there.
    pub fn new(proxy: Proxy, tls: Option<Tls>, source: Source) -> Arc<Self> {
        Arc::new(Self { proxy, tls, source, turn: Arc::default(), stopping: AtomicBool::new(false) })
    }

    /// From now on nothing is reloaded any more.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Reads the file anew and puts what it says in force. Waits for a reload that is under way. Takes 10 s at most.
    ///
    /// Dropped before the file was read, nothing is changed.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub async fn reload_file(&self) -> Result<Report, NotReloaded> {
        let outcome = match &self.source.file {
            Some(file) => {
                let loading = tokio::time::timeout(PATIENCE, self.load(file.clone())).await;
                let loaded = loading.unwrap_or_else(|_| Err(NotReloaded::Slow(file.clone())));
                loaded.and_then(|(prepared, _turn)| self.apply(prepared))
            }
            None => Err(NotReloaded::NoFile),
        };
        self.record(&outcome);
        outcome
    }

    /// Puts this configuration in force. Opens what is new in it here and now.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub fn reload(&self, config: Config) -> Result<Report, NotReloaded> {
        let outcome = Prepared::new(config, &self.proxy.config()).and_then(|prepared| self.apply(prepared));
        self.record(&outcome);
        outcome
    }

    /// Reads the file, and all that it names, when it is its turn, which lasts until it is dropped.
    async fn load(&self, file: PathBuf) -> Result<(Prepared, OwnedMutexGuard<()>), NotReloaded> {
        let turn = self.turn.clone().lock_owned().await;
        let (tell, told) = oneshot::channel();
        // A thread of its own: a disk that hangs, or a pipe that nobody reads, holds up neither those who wait for a refill nor
        // the process' end. It keeps the turn, so that there is one such thread at most.
        let (from, before) = (file.clone(), self.proxy.config());
        let load = move || {
            let loaded = Config::load(&from).map_err(|complaints| NotReloaded::Invalid(from, complaints));
            // Whoever asked may have gone, or waits no longer.
            let _ = tell.send((loaded.and_then(|config| Prepared::new(config, &before)), turn));
        };
        let reading = std::thread::Builder::new().name("reload".to_owned()).spawn(load);
        let unread = |why: String| {
            let complaint = crate::config::Complaint { line: None, path: String::new(), message: why };
            NotReloaded::Invalid(file.clone(), Complaints(vec![complaint]))
        };
        reading.map_err(|error| unread(format!("cannot start a thread to read it: {error}")))?;
        let (prepared, turn) = told.await.map_err(|_| unread("reading it was broken off".to_owned()))?;
        Ok((prepared?, turn))
    }

    fn apply(&self, prepared: Prepared) -> Result<Report, NotReloaded> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(NotReloaded::Stopping);
        }
        let Prepared { config, access_log, certificate } = prepared;
        let changes = self.proxy.reload(config).map_err(NotReloaded::CannotChange)?;
        if let Some(sink) = access_log
            && let Err(error) = self.proxy.access_log().redirect(sink)
        {
            tracing::error!(%error, "the access log goes on where it was");
        }
        if let (Some(tls), Some(certificate)) = (&self.tls, certificate) {
            tls.show(certificate);
        }
        if let Some(on_applied) = &self.source.on_applied {
            on_applied(&self.proxy.config());
        }
        Ok(Report { changes })
    }

    /// Counts a reload, and tells the operator of it.
    fn record(&self, outcome: &Result<Report, NotReloaded>) {
        let result = match outcome {
            Ok(_) => Some(ReloadResult::Applied),
            // That says nothing about a configuration.
            Err(NotReloaded::Stopping) => None,
            Err(_) => Some(ReloadResult::Refused),
        };
        result.into_iter().for_each(|result| self.proxy.metrics().reload(result, SystemTime::now()));
        match result {
            Some(ReloadResult::Applied) => systemd::say("the last reload was applied"),
            Some(ReloadResult::Refused) => {
                systemd::say("the last reload was refused, and nothing has changed: the log says why");
            }
            None => {}
        }
        match outcome {
            Ok(Report { changes }) => {
                for change in changes {
                    tracing::info!(option = change.option, "reload: {change}");
                }
                tracing::info!(changes = changes.len(), "the configuration was reloaded");
            }
            Err(NotReloaded::Invalid(file, Complaints(complaints))) => {
                for complaint in complaints {
                    tracing::error!(file = %file.display(), line = complaint.line, "reload: {complaint}");
                }
                tracing::error!(
                    complaints = complaints.len(),
                    "the configuration was not reloaded: nothing has changed"
                );
            }
            Err(refused) => tracing::error!("the configuration was not reloaded: {refused}"),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.changes.len() {
            0 => writeln!(f, "reloaded; nothing is different"),
            1 => writeln!(f, "reloaded; one option is different:"),
            several => writeln!(f, "reloaded; {several} options are different:"),
        }?;
        self.changes.iter().try_for_each(|change| writeln!(f, "  {change}"))
    }
}

impl fmt::Display for NotReloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFile => f.write_str(
                "weir was started without a file; start it with --config FILE to reload that. Nothing has changed",
            ),
            Self::Stopping => f.write_str("weir is about to stop. Nothing has changed"),
            Self::Slow(file) => write!(
                f,
                "{} and what it names could not be read within {} s, or a reload before this one still waits for that: \
                 look at the disks that they are on. Nothing has changed",
                file.display(),
                PATIENCE.as_secs()
            ),
            Self::Invalid(file, Complaints(complaints)) => {
                write!(f, "{} cannot be used, and nothing has changed:", file.display())?;
                complaints.iter().try_for_each(|complaint| write!(f, "\n  {complaint}"))
            }
            Self::Tls(why) => write!(f, "{why}. Nothing has changed"),
            Self::AccessLog(why) => write!(f, "{why} (log.access). Nothing has changed"),
            Self::CannotChange(why) => write!(f, "{why}. Nothing has changed"),
        }
    }
}

impl std::error::Error for NotReloaded {}
