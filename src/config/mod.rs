//! The configuration: a file in, a checked [`Config`] out, or every complaint at once.
//!
//! Two stages. What the file says is read by `reader`, key by key; what comes out here is resolved (secrets looked up,
//! addresses parsed, shares taken) and can be trusted by everything else. An empty file is a whole configuration.

mod address;
pub mod change;
mod client;
mod effective;
mod operators;
mod reader;
mod secret;
pub mod units;
mod upstream_url;

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reader::{Document, FromToml, Section, is_a};
use toml::de::DeValue;
use zeroize::Zeroizing;

pub use address::Address;
pub use client::{Client, NOBODY, Weight};
pub use operators::OperatorsAccess;
pub use reader::Complaint;
pub use secret::Secret;
pub use units::Rate;
pub use upstream_url::UpstreamUrl;

/// The labels that stand for no model and for every model not known by name: no model can be called that.
pub const STAND_INS: [&str; 2] = ["-", "other"];

/// Everything an operator can choose, checked. The names are those of config.toml, where each is explained.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub server: Server,
    pub upstream: Upstream,
    pub limits: Limits,
    pub queue: Queue,
    pub retry: Retry,
    pub breaker: Breaker,
    pub timeouts: Timeouts,
    pub log: Log,
    /// Limits of single models, on top of `limits`; `"*"` stands for every model not named.
    pub models: BTreeMap<String, LimitTable>,
    /// The clients known by name; with any of them, nobody else is served.
    pub clients: BTreeMap<String, Client>,
}

/// `[server]`: who may connect, and how slow a client may be.
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    pub listen: Vec<Address>,
    pub admin_listen: Address,
    /// What operators have to send; absent, whoever can connect is one.
    pub admin_token: Option<Secret>,
    /// Bytes of a metered call's body.
    pub max_body: u64,
    pub max_connections: u32,
    pub header_timeout: Duration,
    pub body_timeout: Duration,
    pub write_timeout: Duration,
    pub keep_alive: Duration,
    /// Between the signal to stop and the drain: not ready any more, but accepting.
    pub lame_duck: Duration,
    pub drain: Duration,
    /// What TCP listeners for clients speak; absent, they speak plain HTTP.
    pub tls: Option<Tls>,
    pub allow_anonymous: bool,
}

/// `server.tls`: the files, in PEM, of what weir proves its name with. They are read when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// Its own certificate first, then those between it and the authority.
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// `[upstream]`: the gateway.
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    pub base_url: UpstreamUrl,
    /// Replaces the clients' own keys; absent, theirs go through.
    pub api_key: Option<Secret>,
}

/// `[limits]`: shared by all that passes.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    pub requests: Option<Rate>,
    /// Of prompt and answer together, as the gateway counts them.
    pub tokens: Option<Rate>,
    pub concurrency: Concurrency,
    pub mode: Mode,
    /// Each weir takes this part of every limit in the file. Never 0.
    pub replicas: u32,
}

/// How many requests may be under way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Concurrency {
    /// Each lane (an upstream credential and a model) finds its own.
    Adaptive,
    /// So many, all together. Never 0.
    Fixed(u32),
}

/// The limits of one model (`[models.NAME]`) or of one client (`[clients.NAME]`).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LimitTable {
    pub requests: Option<Rate>,
    /// Of prompt and answer together, as the gateway counts them.
    pub tokens: Option<Rate>,
    /// Never 0.
    pub concurrency: Option<u32>,
    pub mode: Mode,
}

/// What becomes of a request that is beyond a table's limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// It waits, or is refused.
    #[default]
    Enforce,
    /// It passes, and is counted.
    Observe,
}

/// `[queue]`: who may wait, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub struct Queue {
    pub max_waiting: u32,
    /// Bytes of request bodies held in memory, all together.
    pub max_bytes: u64,
    pub max_wait: Duration,
}

/// `[retry]`: how often, and how soon, to try again.
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    pub max_retries: u32,
    pub base_delay: Duration,
    pub max_delay: Duration,
    /// Retries per first attempt, over ten seconds.
    pub budget: f64,
}

/// `[breaker]`: what is done while the gateway fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    /// Of unbroken failure: after that time everyone is refused at once.
    pub give_up: Duration,
}

/// `[timeouts]`: how long the gateway may take.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeouts {
    pub connect: Duration,
    pub first_event: Duration,
    pub response: Duration,
    pub idle: Duration,
    pub deadline: Duration,
}

/// `[log]`: what is told, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    pub access: AccessTarget,
    pub format: LogFormat,
    pub level: LogLevel,
}

/// `log.access`: where a line for each finished request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessTarget {
    Off,
    Stderr,
    File(PathBuf),
}

/// `log.format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    Text,
    Json,
}

/// `log.level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

/// Why a configuration can't be used: every complaint, a line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaints(pub Vec<Complaint>);

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, complaint) in self.0.iter().enumerate() {
            let line_break = if i == 0 { "" } else { "\n" };
            write!(f, "{line_break}{complaint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Complaints {}

impl Default for Config {
    fn default() -> Self {
        Self::parse("", &|_| None).expect("an empty file is a whole configuration")
    }
}

impl Config {
    /// Reads and checks a file; secrets are looked up in the process's environment.
    ///
    /// # Errors
    /// That the file can't be read, or all that is wrong with what is in it.
    pub fn load(path: &Path) -> Result<Self, Complaints> {
        Self::parse(&read_file(path)?, &|name| std::env::var(name).ok())
    }

    /// Checks a configuration's text; `env` looks an environment variable up.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(source: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Complaints> {
        let document = Document::new(source);
        let config = document.parse().map(|table| Self::read(&document.root(table.get_ref()), env));
        match (config, document.complaints()) {
            (Some(config), none) if none.is_empty() => Ok(config),
            (_, complaints) => Err(Complaints(complaints)),
        }
    }

    /// Whether clients may be served at an address that is not the configuration's own: that of a socket which weir was
    /// handed.
    ///
    /// # Errors
    /// As for an address in `server.listen`: the gateway's key would be lent to strangers.
    pub fn may_listen(&self, address: &Address) -> Result<(), String> {
        let complaint = if self.clients.is_empty() { self.server.open_relay(address, &self.upstream) } else { None };
        complaint.map_or(Ok(()), Err)
    }

    /// The path of every option there is, for the test that holds config.toml against the code.
    pub fn option_paths() -> Vec<String> {
        let document = Document::new("[models.NAME]\n[clients.NAME]\n");
        let table = document.parse().expect("it is TOML");
        Self::read(&document.root(table.get_ref()), &|_| None);
        document.known_keys()
    }

    fn read(root: &Section<'_>, env: &dyn Fn(&str) -> Option<String>) -> Self {
        let upstream = Upstream::read(&root.section("upstream"), env);
        let limits = Limits::read(&root.section("limits"));
        let models = root.sections("models");
        for (name, section) in &models {
            if STAND_INS.contains(name) {
                section.complain_of_it(
                    "is weir's own word for models that it does not know by name; write [models.\"*\"]",
                );
            }
        }
        let clients = root.sections("clients");
        Self {
            models: models.iter().map(|(name, section)| (name.to_string(), LimitTable::read(section))).collect(),
            server: Server::read(&root.section("server"), &upstream, !clients.is_empty(), env),
            clients: Client::read_all(&clients, env),
            upstream,
            limits,
            queue: Queue::read(&root.section("queue")),
            retry: Retry::read(&root.section("retry")),
            breaker: Breaker::read(&root.section("breaker")),
            timeouts: Timeouts::read(&root.section("timeouts")),
            log: Log::read(&root.section("log")),
        }
    }
}

impl Server {
    fn read(
        section: &Section<'_>,
        upstream: &Upstream,
        knows_clients: bool,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Self {
        let server = Self {
            listen: section.get_checked("listen", vec![loopback(8080)], at_least_one),
            admin_listen: section.get_or("admin_listen", loopback(9090)),
            admin_token: Secret::read(section, "admin_token", env),
            max_body: section.get_checked("max_body", Size(32 << 20), |size| size.at_least(1 << 10)).0,
            max_connections: section.get_checked("max_connections", 10_000, positive),
            header_timeout: section.get_checked("header_timeout", Duration::from_secs(10), some_time),
            body_timeout: section.get_checked("body_timeout", Duration::from_secs(30), some_time),
            write_timeout: section.get_checked("write_timeout", Duration::from_secs(60), some_time),
            keep_alive: section.get_checked("keep_alive", Duration::from_secs(75), some_time),
            lame_duck: section.get_or("lame_duck", Duration::ZERO),
            drain: section.get_or("drain", Duration::from_secs(300)),
            tls: section.get("tls"),
            allow_anonymous: section.get_or("allow_anonymous", false),
        };
        server.refuse_clashes(section);
        if !knows_clients {
            server.refuse_an_open_relay(section, upstream);
        }
        server
    }

    fn refuse_clashes(&self, section: &Section<'_>) {
        if self.listen.iter().any(|address| address.clashes_with(&self.admin_listen)) {
            section.complain("admin_listen", "is the address that clients use (listen); give it one of its own");
        }
    }

    fn refuse_an_open_relay(&self, section: &Section<'_>, upstream: &Upstream) {
        if let Some(complaint) = self.listen.iter().find_map(|address| self.open_relay(address, upstream)) {
            section.complain("listen", complaint);
        }
    }

    /// With a key of its own and an open door, weir would lend the key to everyone who finds it.
    fn open_relay(&self, address: &Address, upstream: &Upstream) -> Option<String> {
        if address.is_local() || upstream.api_key.is_none() || self.allow_anonymous {
            return None;
        }
        Some(format!(
            "{address} can be reached from other machines, and upstream.api_key would be lent to everyone who does; \
             give each client a key under [clients], or listen on 127.0.0.1 or a unix socket, or leave api_key out so \
             that clients' own keys go through, or set allow_anonymous = true if something else keeps strangers away"
        ))
    }
}

impl Upstream {
    fn read(section: &Section<'_>, env: &dyn Fn(&str) -> Option<String>) -> Self {
        let api_key = Secret::read(section, "api_key", env);
        Self { base_url: section.get_or("base_url", UpstreamUrl::default()), api_key }
    }
}

impl Secret {
    /// The secret that is written at `key`; `None` where it is absent or cannot be found (which is a complaint).
    fn read<'s>(section: &Section<'s>, key: &'s str, env: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let written = Zeroizing::new(section.get::<String>(key)?);
        Self::resolve(&written, env).map_err(|message| section.complain(key, message)).ok()
    }
}

impl Limits {
    fn read(section: &Section<'_>) -> Self {
        Self {
            requests: section.get("requests"),
            tokens: section.get("tokens"),
            concurrency: section.get_or("concurrency", Concurrency::Adaptive),
            mode: section.get_or("mode", Mode::Enforce),
            replicas: section.get_checked("replicas", 1, positive),
        }
    }
}

impl LimitTable {
    fn read(section: &Section<'_>) -> Self {
        let concurrency = section.get_checked("concurrency", 0, positive);
        Self {
            requests: section.get("requests"),
            tokens: section.get("tokens"),
            concurrency: (concurrency > 0).then_some(concurrency),
            mode: section.get_or("mode", Mode::Enforce),
        }
    }
}

impl Queue {
    fn read(section: &Section<'_>) -> Self {
        Self {
            max_waiting: section.get_or("max_waiting", 10_000),
            max_bytes: section.get_checked("max_bytes", Size(1 << 30), |size| size.at_least(1 << 20)).0,
            max_wait: section.get_or("max_wait", Duration::from_secs(300)),
        }
    }
}

impl Retry {
    fn read(section: &Section<'_>) -> Self {
        Self {
            max_retries: section.get_checked("max_retries", 3, |retries| match retries {
                0..=20 => Ok(()),
                _ => Err("is more than anyone would wait for; write 0 to 20".to_owned()),
            }),
            base_delay: section.get_or("base_delay", Duration::from_secs(1)),
            max_delay: section.get_or("max_delay", Duration::from_secs(30)),
            budget: section.get_checked("budget", 0.2, |budget| match budget {
                0.0..=10.0 => Ok(()),
                _ => {
                    Err("write how many retries each first attempt pays for, from 0 to 10; 0.2 is a good value"
                        .to_owned())
                }
            }),
        }
    }
}

impl Breaker {
    fn read(section: &Section<'_>) -> Self {
        Self { give_up: section.get_or("give_up", Duration::from_secs(30)) }
    }
}

impl Timeouts {
    fn read(section: &Section<'_>) -> Self {
        let timeout = |key, seconds| section.get_checked(key, Duration::from_secs(seconds), some_time);
        Self {
            connect: timeout("connect", 5),
            first_event: timeout("first_event", 120),
            response: timeout("response", 600),
            idle: timeout("idle", 300),
            deadline: timeout("deadline", 900),
        }
    }
}

impl Log {
    fn read(section: &Section<'_>) -> Self {
        Self {
            access: section.get_or("access", AccessTarget::Stderr),
            format: section.get_or("format", LogFormat::Auto),
            level: section.get_or("level", LogLevel::Info),
        }
    }
}

/// A configuration's text. Secrets may stand in it.
fn read_file(path: &Path) -> Result<Zeroizing<String>, Complaints> {
    std::fs::read_to_string(path).map(Zeroizing::new).map_err(|error| {
        let message = format!("cannot read {}: {error}", path.display());
        Complaints(vec![Complaint { line: None, path: String::new(), message }])
    })
}

fn loopback(port: u16) -> Address {
    Address::Tcp((Ipv4Addr::LOCALHOST, port).into())
}

fn positive(number: &u32) -> Result<(), String> {
    if *number > 0 { Ok(()) } else { Err("0 would let nothing pass; write at least 1, or leave it out".to_owned()) }
}

fn some_time(duration: &Duration) -> Result<(), String> {
    if duration.is_zero() { Err("0 leaves no time for anything; write at least \"1ms\"".to_owned()) } else { Ok(()) }
}

#[expect(clippy::ptr_arg, reason = "it is called with the type that was read")]
fn at_least_one(addresses: &Vec<Address>) -> Result<(), String> {
    if addresses.is_empty() { Err("is empty; write an address, as in \"127.0.0.1:8080\"".to_owned()) } else { Ok(()) }
}

impl FromToml for Tls {
    /// `{ cert = "file", key = "file" }`.
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        const EXAMPLE: &str = r#"write { cert = "/etc/weir/cert.pem", key = "/etc/weir/key.pem" }"#;
        let DeValue::Table(table) = value else { return Err(format!("{}; {EXAMPLE}", is_a(value))) };
        let (mut cert, mut key) = (None, None);
        for (name, value) in table {
            let place = match name.get_ref().as_ref() {
                "cert" => &mut cert,
                "key" => &mut key,
                unknown => return Err(format!("{unknown:?} is not part of it; {EXAMPLE}")),
            };
            let path = String::from_toml(value.get_ref()).map_err(|message| format!("{} {message}", name.get_ref()))?;
            // A file's content in place of its name: what would be shown is a secret.
            if path.is_empty() || path.contains("-----BEGIN") {
                return Err(format!("{} has to be the name of a file; {EXAMPLE}", name.get_ref()));
            }
            *place = Some(PathBuf::from(path));
        }
        match (cert, key) {
            (Some(cert), Some(key)) => Ok(Self { cert, key }),
            _ => Err(format!("needs both a certificate and its key; {EXAMPLE}")),
        }
    }
}

impl FromToml for Duration {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::Integer(number) => Err(format!("has no unit; write \"{}s\" if it means seconds", number.as_str())),
            DeValue::String(text) => units::parse_duration(text),
            other => Err(format!("{}; write a duration, as in \"30s\"", is_a(other))),
        }
    }
}

/// A number of bytes.
#[derive(Clone, Copy)]
struct Size(u64);

impl Size {
    fn at_least(&self, bytes: u64) -> Result<(), String> {
        if self.0 >= bytes {
            Ok(())
        } else {
            Err(format!("is too small to work; write at least {:?}", units::format_size(bytes)))
        }
    }
}

impl FromToml for Size {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::Integer(number) => Err(format!("has no unit; write \"{}B\" if it means bytes", number.as_str())),
            DeValue::String(text) => units::parse_size(text).map(Self),
            other => Err(format!("{}; write a size, as in \"32MiB\"", is_a(other))),
        }
    }
}

impl FromToml for Rate {
    /// `"600/min"`, or `{ rate = "600/min", burst = 60 }`.
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        const EXAMPLE: &str = r#"write "600/min", or { rate = "600/min", burst = 60 }"#;
        let table = match value {
            DeValue::String(text) => return Rate::parse(text),
            DeValue::Table(table) => table,
            other => return Err(format!("{}; {EXAMPLE}", is_a(other))),
        };
        let (mut rate, mut burst) = (None, None);
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "rate" => rate = Some(Rate::parse(&String::from_toml(value.get_ref())?)?),
                "burst" => burst = Some(u32::from_toml(value.get_ref()).map_err(|message| format!("burst {message}"))?),
                unknown => return Err(format!("{unknown:?} is not part of a rate; {EXAMPLE}")),
            }
        }
        let rate = rate.ok_or_else(|| format!("has no rate; {EXAMPLE}"))?;
        match burst {
            Some(0) => Err("a burst of 0 would let nothing pass; write at least 1".to_owned()),
            Some(burst) if rate.with_burst(burst).time_to_fill() > Rate::LONGEST_FILL => Err(format!(
                "a burst of {burst} at {rate} would take more than a year to come back; write a smaller one"
            )),
            Some(burst) => Ok(rate.with_burst(burst)),
            None => Ok(rate),
        }
    }
}

impl FromToml for Concurrency {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) if text == "adaptive" => Ok(Self::Adaptive),
            DeValue::Integer(_) => {
                let number = u32::from_toml(value)?;
                positive(&number).map(|()| Self::Fixed(number))
            }
            _ => Err("write \"adaptive\" or a whole number".to_owned()),
        }
    }
}

impl FromToml for Mode {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("enforce") => Ok(Self::Enforce),
            Some("observe") => Ok(Self::Observe),
            _ => Err("write \"enforce\", or \"observe\" to count what would be refused and refuse nothing".to_owned()),
        }
    }
}

impl FromToml for AccessTarget {
    /// `"stderr"`, `"off"` or a path, which has a `/` or a `.` in it, so that no misspelled word makes a file.
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("off") => Ok(Self::Off),
            Some("stderr") => Ok(Self::Stderr),
            Some(path) if path.contains(['/', '.']) && !path.ends_with('/') && !path.contains('\0') => {
                Ok(Self::File(path.into()))
            }
            _ => Err("write \"stderr\", \"off\", or a file's path, as in \"/var/log/weir/access.log\"".to_owned()),
        }
    }
}

impl FromToml for LogFormat {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("auto") => Ok(Self::Auto),
            Some("text") => Ok(Self::Text),
            Some("json") => Ok(Self::Json),
            _ => Err("write \"auto\", \"text\" or \"json\"".to_owned()),
        }
    }
}

impl FromToml for LogLevel {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("error") => Ok(Self::Error),
            Some("warn") => Ok(Self::Warn),
            Some("info") => Ok(Self::Info),
            Some("debug") => Ok(Self::Debug),
            _ => Err("write \"error\", \"warn\", \"info\" or \"debug\"".to_owned()),
        }
    }
}

impl FromToml for UpstreamUrl {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        Self::parse(&String::from_toml(value)?)
    }
}

#[cfg(test)]
mod tests;
