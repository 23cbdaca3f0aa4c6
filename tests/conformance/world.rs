//! A whole weir on sockets of this machine, before a scripted gateway.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use weir::config::{AccessTarget, Config};
use weir::run::Running;

use crate::client::{Answer, Client};
use crate::message::escaped;
use crate::upstream::{Act, FINE, Upstream, send};

/// Whatever takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(10);

/// A request about which nothing is odd.
pub const GET: &str = "GET /v1/files/a HTTP/1.1\r\nhost: weir.test\r\n\r\n";

/// What the gateway is asked with that.
pub const FORWARDED: &str = "GET /v1/files/a HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\n\r\n";

/// What a fine request is, at the client's side.
const FINE_REQUEST: &str = "GET /v1/fine HTTP/1.1\r\nhost: weir.test\r\nauthorization: Bearer fine\r\n\r\n";

/// The same at the gateway's.
pub const FINE_FORWARDED: &str =
    "GET /v1/fine HTTP/1.1\r\nhost: gateway.test\r\nauthorization: Bearer fine\r\nvia: 1.1 weir\r\n\r\n";

/// weir and the gateway behind it.
pub struct World {
    pub upstream: Upstream,
    running: Running,
}

impl World {
    /// A weir with these tables of configuration, before a gateway that answers its requests as the script says.
    pub async fn new(config: &str, script: impl Fn(usize) -> Vec<Act> + Send + Sync + 'static) -> Self {
        let upstream = Upstream::start(script).await;
        let ports = "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n";
        let mut text = match config.contains("[server]\n") {
            true => config.replacen("[server]\n", ports, 1),
            false => format!("{ports}{config}"),
        };
        let base_url = format!("[upstream]\nbase_url = \"http://{}/v1\"\n", upstream.address);
        text = match text.contains("[upstream]\n") {
            true => text.replacen("[upstream]\n", &base_url, 1),
            false => format!("{text}\n{base_url}"),
        };
        if !text.contains("[retry]") {
            text += "[retry]\nmax_retries = 0\n";
        }
        let mut config = Config::parse(&text, &|_| None).unwrap_or_else(|complaints| panic!("{complaints}"));
        config.log.access = AccessTarget::Off;
        let running = Running::start(config).unwrap_or_else(|error| panic!("{error}"));
        Self { upstream, running }
    }

    /// Before a gateway at which all is well.
    pub async fn fine() -> Self {
        Self::new("", |_| vec![send(FINE)]).await
    }

    /// A new connection.
    pub async fn client(&self) -> Client {
        Client::connect(self.address()).await
    }

    /// The same, as a socket.
    pub async fn socket(&self) -> TcpStream {
        TcpStream::connect(self.address()).await.expect("weir listens")
    }

    fn address(&self) -> SocketAddr {
        self.running.addresses[0].tcp().expect("the configuration names ports")
    }

    /// What these bytes are answered with, on a connection of their own.
    pub async fn answer_to(&self, bytes: impl AsRef<[u8]>) -> Answer {
        let mut client = self.client().await;
        client.write(bytes).await;
        client.answer().await.expect("an answer")
    }

    /// weir still serves, and nobody holds anything any more.
    pub async fn is_well(&self, case: &str) {
        let answer = self.answer_to(FINE_REQUEST).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "fine"), "{case}: the next request is served");
        self.holds_nothing(case).await;
    }

    /// Waits until nobody holds a slot, a place in the queue, memory or a connection.
    pub async fn holds_nothing(&self, case: &str) {
        let mut held = Vec::new();
        let looking = async {
            loop {
                held = self.held().await;
                if held.is_empty() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let ended = tokio::time::timeout(DEADLINE, looking).await;
        assert!(ended.is_ok(), "{case}: this is not given back: {held:#?}");
    }

    async fn held(&self) -> Vec<String> {
        let mut admin = Client::connect(self.running.admin_address.tcp().expect("the configuration names ports")).await;
        admin.write("GET /metrics HTTP/1.1\r\nhost: admin.test\r\nconnection: close\r\n\r\n").await;
        let metrics = admin.answer().await.expect("an answer").text();
        const HELD: [&str; 5] = [
            "weir_in_flight{",
            "weir_waiting{",
            "weir_buffered_bytes ",
            "weir_reserved_tokens",
            "weir_upstream_connections{state=\"active\"}",
        ];
        let is_held = |line: &&str| HELD.iter().any(|name| line.starts_with(name)) && !line.ends_with(" 0");
        metrics.lines().filter(is_held).map(str::to_owned).collect()
    }
}

/// What this comes to, which must not take for ever.
pub async fn within<T>(what: &str, awaited: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, awaited).await {
        Ok(result) => result,
        Err(_) => panic!("this has never happened: {what}"),
    }
}

/// One of many, by its name.
pub struct Named(String, Pin<Box<dyn Future<Output = ()> + Send>>);

/// Names a case.
pub fn named(name: impl Into<String>, case: impl Future<Output = ()> + Send + 'static) -> Named {
    Named(name.into(), Box::pin(case))
}

/// Runs every case to its end, and says of all that failed what failed.
pub async fn each(cases: impl IntoIterator<Item = Named>) {
    let mut failures = Vec::new();
    for Named(name, case) in cases {
        // A task, since it may panic.
        if let Err(failed) = tokio::spawn(case).await {
            let panic = failed.into_panic();
            let text = panic.downcast_ref::<String>().map_or_else(|| format!("{panic:?}"), String::clone);
            failures.push(format!("[{name}] {text}"));
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}\n", failures.len(), failures.join("\n"));
}

/// Requests that are refused, each with what it is to be answered with. Behind each stands one more, which must not be
/// answered or reach the gateway either.
pub async fn are_refused<B: AsRef<[u8]>>(
    config: &str,
    status: u16,
    cases: impl IntoIterator<Item = (&'static str, B)>,
) {
    const BEHIND: &str = "GET /v1/behind HTTP/1.1\r\nhost: weir.test\r\n\r\n";
    let world = Arc::new(World::new(config, |_| vec![send(FINE)]).await);
    let case = |(name, bytes): (&'static str, B)| {
        let bytes = [bytes.as_ref(), BEHIND.as_bytes()].concat();
        named(name, is_refused(world.clone(), status, bytes))
    };
    each(cases.into_iter().map(case)).await;
    let received = world.upstream.received();
    assert_eq!(received.replace(FINE_FORWARDED, ""), "", "the gateway got more than the requests that were fine");
}

async fn is_refused(world: Arc<World>, status: u16, bytes: Vec<u8>) {
    let mut client = world.client().await;
    client.write(&bytes).await;
    let case = escaped(&bytes);
    let answer = client.answer().await.unwrap_or_else(|| panic!("{case}: no answer"));
    assert_eq!(answer.status, status, "{case}: {}{}", answer.head, answer.text());
    assert_eq!(answer.values("content-type"), ["application/json"], "{case}");
    assert!(!answer.code().is_empty(), "{case}: {}", answer.text());
    client.finish().await;
    client.is_closed(&case).await;
    world.is_well(&case).await;
}

/// Requests that pass, each with what reaches the gateway. `closes` says that weir closes the connection after the answer;
/// else it answers one more on it.
pub async fn pass_as<B: AsRef<[u8]>>(closes: bool, cases: impl IntoIterator<Item = (&'static str, B, String)>) {
    let case = |(name, bytes, expected): (&'static str, B, String)| {
        named(name, passes_as(closes, bytes.as_ref().to_vec(), expected))
    };
    each(cases.into_iter().map(case)).await;
}

async fn passes_as(closes: bool, bytes: Vec<u8>, expected: String) {
    let world = World::fine().await;
    let mut client = world.client().await;
    client.write([&bytes, GET.as_bytes()].concat()).await;
    let answer = client.answer().await.expect("an answer");
    assert_eq!((answer.status, answer.text().as_str()), (200, "fine"), "{}", escaped(&bytes));
    if closes {
        client.finish().await;
        client.is_closed(&escaped(&bytes)).await;
        assert_eq!(world.upstream.received(), expected);
    } else {
        assert_eq!(client.answer().await.expect("a second answer").text(), "fine");
        assert_eq!(world.upstream.received(), expected + FORWARDED);
    }
    world.is_well(&escaped(&bytes)).await;
}
