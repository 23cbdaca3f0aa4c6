//! A weir in a process of its own, so that what it holds is its own.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::wire::{Framing, Wire};

/// Whatever takes longer has failed.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// How long to wait before looking again whether something has come true.
const INTERVAL: Duration = Duration::from_millis(10);

/// The process under test. It is ended when dropped.
pub struct Weir {
    child: Child,
    pub address: SocketAddr,
    admin: SocketAddr,
    /// What it has said since it began to listen.
    said: Arc<Mutex<Vec<String>>>,
}

/// The sums of all series of a family, by its name.
pub struct Metrics(HashMap<String, f64>, String);

impl Weir {
    /// Before this gateway, with further tables of configuration.
    pub fn start(gateway: SocketAddr, config: &str) -> Self {
        let config = if config.contains("[server]") { config.to_owned() } else { format!("[server]\n{config}") };
        let ports = "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n";
        let upstream = format!("[upstream]\nbase_url = \"http://{gateway}/v1\"\n[log]\naccess = \"off\"\n");
        let file = config_file(&format!("{}\n{upstream}", config.replacen("[server]\n", ports, 1)));
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.arg("serve").arg("--config").arg(&file).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("cargo has built it");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let listening = lines.by_ref().map_while(Result::ok).find(|line| line.contains("\"listening\""));
        let listening: serde_json::Value =
            serde_json::from_str(&listening.expect("it says that it listens")).expect("its log is JSON here");
        let address = |name: &str| listening[name].as_str().and_then(|text| text.parse().ok()).expect("an address");
        let said = Arc::new(Mutex::new(Vec::new()));
        let (address, admin, heard) = (address("address"), address("admin"), said.clone());
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|line| !is_usual(line)) {
                heard.lock().expect("nobody panics with it").push(line);
            }
        });
        Self { child, address, admin, said }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said that is no warning: panics and errors among it.
    pub fn said(&self) -> Vec<String> {
        self.said.lock().expect("nobody panics with it").clone()
    }

    /// Asks the admin listener; whatever is the matter with weir, it has to answer within the deadline.
    pub async fn metrics(&self) -> Metrics {
        let text = tokio::time::timeout(DEADLINE, self.scrape()).await.expect("the admin listener answers");
        Metrics::parse(text)
    }

    async fn scrape(&self) -> String {
        let mut stream = TcpStream::connect(self.admin).await.expect("the admin listener is there");
        let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.expect("the admin listener reads");
        let mut wire = Wire::new(stream);
        let head = wire.head().await.expect("an answer").expect("an answer");
        let mut text = Vec::new();
        wire.body(head.framing(Framing::Close), |piece| text.extend_from_slice(piece)).await.expect("a whole answer");
        String::from_utf8(text).expect("metrics are text")
    }

    /// Waits until the metrics are like that, and returns them.
    pub async fn comes_to(&self, what: &str, met: impl Fn(&Self, &Metrics) -> bool) -> Metrics {
        let begun = Instant::now();
        loop {
            let metrics = self.metrics().await;
            if met(self, &metrics) {
                return metrics;
            }
            let (held, rest) = (metrics.held(), &metrics.1);
            assert!(
                begun.elapsed() < DEADLINE,
                "{what}: not yet, {held:?}, {} descriptors\n{rest}",
                self.descriptors()
            );
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Waits until nothing is held for any request.
    pub async fn holds_nothing(&self) -> Metrics {
        self.comes_to("everything is given back", |_, metrics| metrics.held().is_empty()).await
    }

    /// File descriptors open now.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(self.proc("fd")).expect("Linux tells").count()
    }

    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).expect("Linux tells");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it runs");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// Time on the CPU so far, all threads together.
    pub fn cpu_time(&self) -> Duration {
        let threads = std::fs::read_dir(self.proc("task")).expect("Linux tells");
        let of_thread = |path: PathBuf| {
            let line = std::fs::read_to_string(path.join("schedstat")).ok()?;
            line.split(' ').next()?.parse().ok().map(Duration::from_nanos)
        };
        threads.filter_map(|thread| of_thread(thread.ok()?.path())).sum()
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.pid().to_string()).join(name)
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Metrics {
    fn parse(text: String) -> Self {
        let mut sums = HashMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').expect("a series and its value");
            let name = series.split('{').next().expect("a name");
            *sums.entry(name.to_owned()).or_default() += value.parse::<f64>().expect("a number");
            // Connections are told apart by their state.
            if name == "weir_upstream_connections" {
                *sums.entry(series.to_owned()).or_default() += value.parse::<f64>().expect("a number");
            }
        }
        Self(sums, text)
    }

    /// All series of a family together; 0 where there is none.
    pub fn sum(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }

    /// Gauges of what is held for requests that are not 0.
    pub fn held(&self) -> Vec<(&'static str, f64)> {
        const HELD: [&str; 5] = [
            "weir_in_flight",
            "weir_waiting",
            "weir_buffered_bytes",
            "weir_reserved_tokens",
            r#"weir_upstream_connections{state="active"}"#,
        ];
        HELD.iter().map(|name| (*name, self.sum(name))).filter(|(_, value)| *value != 0.0).collect()
    }
}

/// weir tells of every failure of the gateway's.
fn is_usual(line: &str) -> bool {
    line.contains("\"WARN\"") || line.contains("\"INFO\"")
}

/// A file of its own with this text.
fn config_file(text: &str) -> PathBuf {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("strength-{}-{number}.toml", std::process::id()));
    std::fs::write(&file, text).expect("cargo gives tests a directory");
    file
}

/// A number from the environment, under which a test can be made larger by hand.
pub fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}
