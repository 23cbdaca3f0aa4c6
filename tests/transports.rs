//! What only real sockets and processes show of the ways in and out: unix sockets, TLS, sockets that are handed over, and a
//! binary that is replaced under load.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use weir::config::{Address, Config};
use weir::proxy::Proxy;
use weir::server::{DrainControl, Inherited, Listener, Workers};
use weir::upstream::connect;

/// Whatever takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(30);

const CHAT: &str = r#"{"model":"gpt-4.1-mini","messages":[{"role":"user","content":"hello"}]}"#;

const STREAM: &str = r#"{"model":"gpt-4.1-mini","stream":true,"messages":[{"role":"user","content":"hello"}]}"#;

// A program under test.

/// A weir. It is killed when dropped.
struct Weir {
    child: Child,
    lines: Receiver<String>,
}

impl Weir {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary was built");
        let stderr = child.stderr.take().expect("it is piped");
        let (told, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| told.send(line))
        });
        Self { child, lines }
    }

    /// Waits for a line with this.
    #[track_caller]
    fn says(&self, what: &str) -> String {
        let (mut all, deadline) = (String::new(), Instant::now() + DEADLINE);
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            if line.contains(what) {
                return line;
            }
            writeln!(all, "{line}").expect("a String takes everything");
        }
        panic!("it never said {what:?}, but:\n{all}");
    }

    /// Waits until it listens, and tells where: for clients and for operators.
    fn listening(&self) -> (String, String) {
        let line: serde_json::Value = serde_json::from_str(&self.says("\"listening\"")).expect("a JSON line");
        let address = |name: &str| line[name].as_str().expect("an address").to_owned();
        (address("address"), address("admin"))
    }

    fn terminate(&self) {
        self.signal("-TERM");
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(signal).arg(self.child.id().to_string()).status();
        assert!(sent.expect("there is a kill").success());
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    fn ends(mut self) -> (ExitStatus, String) {
        let (mut all, deadline) = (String::new(), Instant::now() + DEADLINE);
        // Its log ends when it does.
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            writeln!(all, "{line}").expect("a String takes everything");
        }
        assert!(Instant::now() < deadline, "it did not end:\n{all}");
        (self.child.wait().expect("it is our child"), all)
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `weir serve` with this configuration.
fn weir(config: &str) -> Command {
    weir_with(&file("toml", config))
}

/// `weir serve` with the configuration in this file.
fn weir_with(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.arg("serve").arg("--config").arg(config).stdout(Stdio::null());
    command
}

/// The same, started with these sockets, called so, as a service manager does. (Standard streams are all that can be handed
/// to a child without unsafe code; a shell moves them to where they belong.) `FOR_PID` names another process as the one that
/// they are for.
fn weir_on(config: &str, [(first, first_socket), (second, second_socket)]: [(&str, OwnedFd); 2]) -> Command {
    let script = "exec 3<&0 4<&1 0</dev/null 1>&2; export LISTEN_PID=${FOR_PID:-$$}; exec \"$0\" \"$@\"";
    let mut command = in_shell(script, config);
    command.env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", format!("{first}:{second}"));
    command.stdin(first_socket).stdout(second_socket);
    command
}

/// `weir serve` with this configuration, as the `"$0" "$@"` of a script.
fn in_shell(script: &str, config: &str) -> Command {
    let direct = weir(config);
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg(direct.get_program()).args(direct.get_args());
    command
}

/// A file of its own with this text.
fn file(ending: &str, text: &str) -> PathBuf {
    let file = place(ending);
    std::fs::write(&file, text).expect("cargo gives tests a directory");
    file
}

/// A path of its own at which there is nothing; short, as a unix socket needs it.
fn place(ending: &str) -> PathBuf {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("weir-test-{}-{number}.{ending}", std::process::id()))
}

/// Removes a path's file when dropped.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        Self(place("sock"))
    }

    fn url(&self) -> String {
        format!("unix:{}", self.0.display())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

// A gateway.

/// Answers every chat; a stream goes on as others ask, so that some are always under way. Keeps the target and Host of each request.
#[derive(Clone, Default)]
struct Gateway {
    seen: Arc<Mutex<Vec<(String, String)>>>,
    heard: Arc<watch::Sender<usize>>,
}

/// So many requests come between two events of a stream.
const BETWEEN_EVENTS: usize = 10;

impl Gateway {
    /// On a port of its own.
    async fn start(&self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let gateway = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).expect("it is open");
                gateway.clone().serve(stream);
            }
        });
        address
    }

    /// Behind a unix socket.
    fn start_at(&self, path: &Path) {
        let listener = tokio::net::UnixListener::bind(path).expect("a free path");
        let gateway = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                gateway.clone().serve(stream);
            }
        });
    }

    fn serve(self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        let service = service_fn(move |request: Request<Incoming>| self.clone().answer(request));
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection);
    }

    /// Nobody else asks from now on: streams wait for nobody.
    fn let_go(&self) {
        self.heard.send_replace(usize::MAX);
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<Events>, hyper::Error> {
        let host = request.headers()["host"].to_str().expect("text").to_owned();
        self.seen.lock().expect("nobody panics").push((request.uri().to_string(), host));
        self.heard.send_modify(|heard| *heard = heard.saturating_add(1));
        let body = request.into_body().collect().await?.to_bytes();
        let is_stream = String::from_utf8_lossy(&body).contains("\"stream\":true");
        let (kind, left) = if is_stream { ("text/event-stream", 6) } else { ("application/json", 0) };
        let answer = Response::builder().header("content-type", kind);
        Ok(answer.body(Events { left, is_stream, heard: self.heard, turn: None, ended: false }).expect("an answer"))
    }
}

/// A body: six events, or one piece of JSON.
struct Events {
    left: usize,
    is_stream: bool,
    heard: Arc<watch::Sender<usize>>,
    /// Until it is the next event's.
    turn: Option<std::pin::Pin<Box<dyn Future<Output = ()> + Send>>>,
    ended: bool,
}

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        use std::task::Poll;
        let piece =
            |text: &'static str| Poll::Ready(Some(Ok(http_body::Frame::data(Bytes::from_static(text.as_bytes())))));
        if self.ended {
            return Poll::Ready(None);
        }
        if self.left == 0 {
            self.ended = true;
            return piece(if self.is_stream { "data: [DONE]\n\n" } else { r#"{"choices":[]}"# });
        }
        let mut heard = self.heard.subscribe();
        let turn = self.turn.get_or_insert_with(|| {
            let enough = heard.borrow().saturating_add(BETWEEN_EVENTS);
            Box::pin(async move { _ = heard.wait_for(|heard| *heard >= enough).await })
        });
        std::task::ready!(turn.as_mut().poll(cx));
        self.turn = None;
        self.left -= 1;
        piece("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"x\"}}]}\n\n")
    }
}

// Clients.

/// What is asked over a connection of its own: status and body.
async fn ask(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    method: &str,
    path: &str,
    body: &str,
) -> (u16, String) {
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.expect("weir speaks HTTP");
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", "localhost");
    let request = request.body(Full::<Bytes>::from(body.to_owned())).expect("a request");
    let response = sender.send_request(request).await.expect("an answer");
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.expect("a whole answer").to_bytes();
    (status, String::from_utf8_lossy(&body).into_owned())
}

async fn get_over_unix(path: &Path, target: &str) -> (u16, String) {
    ask(tokio::net::UnixStream::connect(path).await.expect("it listens"), "GET", target, "").await
}

async fn get(address: SocketAddr, target: &str) -> (u16, String) {
    ask(tokio::net::TcpStream::connect(address).await.expect("it listens"), "GET", target, "").await
}

// Unix sockets.

#[tokio::test]
async fn unix_sockets_on_all_sides() {
    let (front, admin, back) = (Place::new(), Place::new(), Place::new());
    let gateway = Gateway::default();
    gateway.start_at(&back.0);
    let weir = Weir::start(&mut weir(&format!(
        "[server]\nlisten = [\"{}\", \"127.0.0.1:0\"]\nadmin_listen = \"{}\"\n[upstream]\nbase_url = \"{}:/api\"\napi_key = \"k\"\n",
        front.url(),
        admin.url(),
        back.url(),
    )));
    assert_eq!(weir.listening(), (front.url(), admin.url()));
    let client = tokio::net::UnixStream::connect(&front.0).await.expect("it listens");
    assert_eq!(ask(client, "POST", "/v1/chat/completions", CHAT).await, (200, r#"{"choices":[]}"#.to_owned()));
    let seen = ("/api/chat/completions".to_owned(), "localhost".to_owned());
    assert_eq!(*gateway.seen.lock().expect("nobody panics"), [seen]);
    assert_eq!(get_over_unix(&admin.0, "/readyz").await, (200, "ready\n".to_owned()));
    assert!(get_over_unix(&admin.0, "/metrics").await.1.contains("\nweir_draining 0\n"));
    weir.terminate();
    assert_eq!(weir.ends().0.code(), Some(0));
    assert!(!front.0.exists() && !admin.0.exists(), "the files went with it");
}

#[tokio::test]
async fn the_socket_of_a_dead_weir_is_replaced_and_that_of_a_living_one_is_not() {
    let place = Place::new();
    let start =
        || Weir::start(&mut weir(&format!("[server]\nlisten = \"{}\"\nadmin_listen = \"127.0.0.1:0\"\n", place.url())));
    let killed = start();
    killed.listening();
    drop(killed);
    assert!(place.0.exists(), "who is killed leaves it behind");
    let living = start();
    living.listening();
    let (status, said) = start().ends();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("another program does") && said.contains("server.listen"), "{said}");
    assert_eq!(get_over_unix(&place.0, "/v1/none/../..").await.0, 404, "the living one serves on");
    // Somebody has put another in its place: that is not weir's to remove.
    std::fs::remove_file(&place.0).expect("it is there");
    let other = UnixListener::bind(&place.0).expect("a free path");
    living.terminate();
    assert_eq!(living.ends().0.code(), Some(0));
    UnixStream::connect(&place.0).expect("it is there still");
    drop(other);
}

#[tokio::test]
async fn a_file_that_is_no_socket_stays_and_a_folder_that_is_missing_is_told() {
    let place = Place::new();
    std::fs::write(&place.0, "precious").expect("a file");
    let admin = format!("[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"{}\"\n", place.url());
    let (status, said) = Weir::start(&mut weir(&admin)).ends();
    assert!(status.code() == Some(1) && said.contains("no socket") && said.contains("server.admin_listen"), "{said}");
    assert_eq!(std::fs::read_to_string(&place.0).expect("a file"), "precious");
    let nowhere = "[server]\nlisten = \"unix:/nowhere/at/all.sock\"\nadmin_listen = \"127.0.0.1:0\"\n";
    let (status, said) = Weir::start(&mut weir(nowhere)).ends();
    assert!(status.code() == Some(1) && said.contains("its folder does not exist"), "{said}");
}

#[tokio::test]
async fn who_may_connect_to_a_unix_socket_follows_from_the_umask() {
    let place = Place::new();
    let config = format!("[server]\nlisten = \"{}\"\nadmin_listen = \"127.0.0.1:0\"\n", place.url());
    let weir = Weir::start(&mut in_shell("umask 007; exec \"$0\" \"$@\"", &config));
    weir.listening();
    let found = std::fs::metadata(&place.0).expect("it is there");
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o770);
}

// TLS.

/// A certificate for localhost that signed itself, as files, and what its clients need.
struct Identity {
    tables: String,
    certificate: CertificateDer<'static>,
}

impl Identity {
    fn new() -> Self {
        let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
        let (cert, key) = (file("pem", &own.cert.pem()), file("pem", &own.signing_key.serialize_pem()));
        let tables = format!("tls = {{ cert = \"{}\", key = \"{}\" }}\n", cert.display(), key.display());
        Self { tables, certificate: own.cert.der().clone() }
    }

    async fn connect(
        &self,
        address: SocketAddr,
        protocol: &[u8],
    ) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).expect("a certificate");
        let mut client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = vec![protocol.to_vec()];
        let tcp = tokio::net::TcpStream::connect(address).await.expect("it listens");
        let name = ServerName::try_from("localhost").expect("a name");
        TlsConnector::from(Arc::new(client)).connect(name, tcp).await.expect("they agree on TLS")
    }
}

fn ports(more: &str) -> String {
    format!("[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n{more}")
}

fn parsed((address, admin): (String, String)) -> (SocketAddr, SocketAddr) {
    (address.parse().expect("an address"), admin.parse().expect("an address"))
}

#[tokio::test]
async fn clients_speak_http_over_tls_and_silent_handshakes_do_not_keep_them_out() {
    let (identity, gateway) = (Identity::new(), Gateway::default());
    let upstream = format!("[upstream]\nbase_url = \"http://{}/v1\"\n", gateway.start().await);
    let limits = "max_connections = 4\nheader_timeout = \"1s\"\n";
    let weir = Weir::start(&mut weir(&ports(&format!("{limits}{}{upstream}", identity.tables))));
    let (address, admin) = parsed(weir.listening());
    // They take every place there is; with `header_timeout` each gives its own back.
    let silent: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect(address).expect("the kernel takes it")).collect();
    gateway.let_go();
    let answer = ask(identity.connect(address, b"http/1.1").await, "POST", "/v1/chat/completions", STREAM).await;
    assert!(answer.0 == 200 && answer.1.ends_with("data: [DONE]\n\n"), "{answer:?}");
    for mut silent in silent {
        silent.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        assert!(matches!(silent.read(&mut [0]), Ok(0) | Err(_)), "it is closed");
    }
    let io = TokioIo::new(identity.connect(address, b"h2").await);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.expect("weir speaks HTTP/2");
    tokio::spawn(connection);
    let request = Request::post("https://localhost/v1/chat/completions").body(Full::<Bytes>::from(CHAT));
    let response = sender.send_request(request.expect("a request")).await.expect("an answer");
    assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
    let metrics = get(admin, "/metrics").await.1;
    assert!(metrics.contains("\nweir_tls_handshake_failures_total 4\n"), "operators speak no TLS: {metrics}");
}

#[tokio::test]
async fn a_certificate_that_cannot_be_used_is_told_before_anything_is_served() {
    let config = ports("tls = { cert = \"/nowhere/cert.pem\", key = \"/nowhere/key.pem\" }\n");
    let (status, said) = Weir::start(&mut weir(&config)).ends();
    assert!(status.code() == Some(1) && said.contains("cannot read /nowhere/cert.pem"), "{said}");
    let mut check = Command::new(env!("CARGO_BIN_EXE_weir"));
    let (status, said) = Weir::start(check.arg("check").arg("--config").arg(file("toml", &config))).ends();
    assert!(status.code() == Some(78) && said.contains("server.tls.cert: cannot read"), "{said}");
}

// What a service manager hands over, and is told.

fn tcp_socket() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

fn handed(socket: &TcpListener) -> OwnedFd {
    socket.try_clone().expect("there are descriptors").into()
}

#[tokio::test]
async fn sockets_that_are_handed_over_are_known_by_name_or_by_address() {
    let ((clients, address), place) = (tcp_socket(), Place::new());
    let operators = UnixListener::bind(&place.0).expect("a free path");
    let by_name = "[server]\nlisten = \"127.0.0.1:1\"\nadmin_listen = \"127.0.0.1:2\"\n".to_owned();
    let by_address = format!("[server]\nlisten = \"{address}\"\nadmin_listen = \"{}\"\n", place.url());
    for (config, names) in [(by_name, ["listen", "admin"]), (by_address, ["weir.socket", "unknown"])] {
        let admin = operators.try_clone().expect("there are descriptors").into();
        let weir = Weir::start(&mut weir_on(&config, [(names[0], handed(&clients)), (names[1], admin)]));
        assert_eq!(weir.listening(), (address.to_string(), place.url()));
        assert_eq!(get(address, "/none").await.0, 404);
        assert_eq!(get_over_unix(&place.0, "/livez").await, (200, "alive\n".to_owned()));
        weir.terminate();
        assert_eq!(weir.ends().0.code(), Some(0));
        assert!(place.0.exists(), "it is not weir's to remove");
    }
    // They are another process's.
    let mut other = weir_on(&ports(""), [("listen", handed(&clients)), ("listen", handed(&clients))]);
    let weir = Weir::start(other.env("FOR_PID", "1"));
    assert_ne!(weir.listening().0, address.to_string());
}

#[tokio::test]
async fn sockets_that_nobody_can_use_are_told() {
    let ((clients, address), (admin, _)) = (tcp_socket(), tcp_socket());
    let client = TcpStream::connect(address).expect("the kernel takes it");
    let (connection, _) = clients.accept().expect("a connection");
    let datagram = UnixDatagram::unbound().expect("a socket");
    let with_key = ports("[upstream]\napi_key = \"sk-x\"\n");
    let open = TcpListener::bind("0.0.0.0:0").expect("a free port");
    for (config, sockets, what) in [
        (ports(""), [("weir.socket", handed(&clients)), ("admin", handed(&admin))], "is for nobody"),
        (ports(""), [("admin", handed(&clients)), ("admin", handed(&admin))], "two sockets for operators"),
        (ports(""), [("listen", connection.into()), ("admin", handed(&admin))], "needs Accept=no"),
        (ports(""), [("listen", handed(&clients)), ("admin", datagram.into())], "no TCP or unix stream socket"),
        (with_key, [("listen", handed(&open)), ("admin", handed(&admin))], "would be lent to everyone"),
    ] {
        let (status, said) = Weir::start(&mut weir_on(&config, sockets)).ends();
        assert!(status.code() == Some(1) && said.contains(what) && !said.contains("sk-x"), "{what}: {said}");
    }
    drop(client);
}

/// What a service manager hears.
struct Manager {
    place: Place,
    socket: UnixDatagram,
}

impl Manager {
    fn new() -> Self {
        let place = Place::new();
        let socket = UnixDatagram::bind(&place.0).expect("a free path");
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        Self { place, socket }
    }

    /// The next word.
    fn heard(&self) -> String {
        let mut room = [0; 256];
        let length = self.socket.recv(&mut room).expect("a word");
        String::from_utf8_lossy(&room[..length]).into_owned()
    }
}

#[test]
fn a_service_manager_is_told_that_it_is_ready_and_that_it_stops() {
    let manager = Manager::new();
    let weir = Weir::start(weir(&ports("")).env("NOTIFY_SOCKET", &manager.place.0));
    assert_eq!(manager.heard(), "READY=1");
    weir.terminate();
    assert_eq!(manager.heard(), "STOPPING=1");
    assert_eq!(weir.ends().0.code(), Some(0));
}

#[test]
fn a_service_manager_is_told_what_became_of_a_reload() {
    let manager = Manager::new();
    let config = file("toml", &ports(""));
    let weir = Weir::start(weir_with(&config).env("NOTIFY_SOCKET", &manager.place.0));
    assert_eq!(manager.heard(), "READY=1");
    for (text, word) in [("nonsense = 1\n", "refused"), ("[queue]\nmax_waiting = 9\n", "applied")] {
        std::fs::write(&config, ports(text)).expect("it was written before");
        weir.signal("-HUP");
        assert!(manager.heard().starts_with(&format!("STATUS=the last reload was {word}")), "{word}");
    }
    weir.terminate();
    assert_eq!(manager.heard(), "STOPPING=1");
}

#[test]
fn a_service_manager_that_does_not_listen_holds_up_neither_reloads_nor_the_end() {
    let manager = Manager::new();
    let config = file("toml", &ports(""));
    // More words than a socket holds that nobody reads.
    let room: usize = std::fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen")
        .map_or(10, |text| text.trim().parse().expect("a number"));
    let weir = Weir::start(weir_with(&config).env("NOTIFY_SOCKET", &manager.place.0));
    weir.listening();
    for _ in 0..room + 3 {
        weir.signal("-HUP");
        weir.says("the configuration was reloaded");
    }
    weir.terminate();
    assert_eq!(weir.ends().0.code(), Some(0));
    assert_eq!(manager.heard(), "READY=1");
}

// Stopping.

/// Lets a weir listen that was told to stop before it has accepted anybody, until it has closed the listener; it goes on
/// serving until it is dropped.
async fn closed_at_once(listener: Listener) -> Workers {
    let config = Config::parse("[upstream]\nbase_url = \"http://127.0.0.1:1/v1\"\n", &|_| None);
    let config = Arc::new(config.unwrap_or_else(|complaints| panic!("{complaints}")));
    let connector = connect::network(&config.upstream.base_url).expect("it needs no authority");
    let proxy = Proxy::new(config.clone(), connector);
    let workers = Workers::start(1, &proxy, &config.server).expect("there are threads");
    let (control, drain) = DrainControl::new();
    control.begin();
    workers.accept(listener, None, drain).await;
    workers
}

/// Waits until the kernel has so many connections for this listener. `connect` returns a moment before that.
async fn until_backlog_has(count: usize, address: SocketAddr) {
    let (listening, deadline) = (format!(":{:04X} 00000000:0000 0A", address.port()), Instant::now() + DEADLINE);
    let waiting = || {
        let sockets = std::fs::read_to_string("/proc/net/tcp").expect("a table of sockets");
        let line = sockets.lines().find(|line| line.contains(&listening)).expect("it listens");
        let queues = line.split_whitespace().nth(4).expect("a column of queues");
        usize::from_str_radix(&queues[9..], 16).expect("a number")
    };
    while waiting() < count {
        assert!(Instant::now() < deadline, "{} have come", waiting());
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn who_has_connected_when_the_listener_closes_is_answered_and_who_comes_to_a_shared_one_waits_for_the_next() {
    let place = Place::new();
    let own = Listener::bind(&Address::Tcp(([127, 0, 0, 1], 0).into()), "server.listen").expect("a free port");
    let address = own.address().tcp().expect("TCP");
    let own_unix = Listener::bind(&Address::Unix(place.0.clone()), "server.listen").expect("a free path");
    let waiting: Vec<_> = (0..50).map(|_| TcpStream::connect(address).expect("the kernel takes it")).collect();
    let waiting_unix = UnixStream::connect(&place.0).expect("the kernel takes it");
    until_backlog_has(waiting.len(), address).await;
    let _serving = (closed_at_once(own).await, closed_at_once(own_unix).await);
    for client in waiting {
        client.set_nonblocking(true).expect("it is open");
        let client = tokio::net::TcpStream::from_std(client).expect("it is open");
        assert_eq!(ask(client, "GET", "/none", "").await.0, 404);
    }
    waiting_unix.set_nonblocking(true).expect("it is open");
    let client = tokio::net::UnixStream::from_std(waiting_unix).expect("it is open");
    assert_eq!(ask(client, "GET", "/none", "").await.0, 404);
    TcpStream::connect(address).expect_err("it is closed");
    assert!(!place.0.exists(), "the file went with it");

    let (shared, address) = tcp_socket();
    let inherited = Inherited::Tcp(shared.try_clone().expect("there are descriptors"));
    let client = TcpStream::connect(address).expect("the kernel takes it");
    drop(closed_at_once(Listener::inherit(inherited).expect("it listens")).await);
    shared.set_nonblocking(false).expect("it is open");
    let (_, peer) = shared.accept().expect("the client is there still");
    assert_eq!(peer, client.local_addr().expect("it is open"));
}

// Replacing the binary.

/// How a client connects, and what it does when a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A connection for each request.
    New,
    /// HTTP/1.1, one connection as long as it lasts.
    KeptAlive,
    /// The same in HTTP/2.
    Http2,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn connect(kind: Kind, address: SocketAddr) -> Result<Self, String> {
        let io = tokio::net::TcpStream::connect(address).await.map_err(|error| format!("connecting: {error}"))?;
        let io = TokioIo::new(io);
        let failed = |error| format!("a handshake: {error}");
        if kind == Kind::Http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.map_err(failed)?;
            tokio::spawn(connection);
            return Ok(Self::Http2(sender));
        }
        let (sender, connection) = http1::handshake(io).await.map_err(failed)?;
        tokio::spawn(connection);
        Ok(Self::Http1(sender))
    }

    /// Whether another request may be sent, as far as the client knows.
    async fn is_open(&mut self) -> bool {
        match self {
            Self::Http1(sender) => sender.ready().await.is_ok(),
            Self::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    /// The answer's head, or why there is none.
    async fn send(&mut self, body: &'static str) -> Result<Response<Incoming>, hyper::Error> {
        let request = Request::post("http://weir.test/v1/chat/completions").header("host", "weir.test");
        let mut request = request.body(Full::<Bytes>::from(body)).expect("a request");
        match self {
            Self::Http1(sender) => {
                *request.uri_mut() = "/v1/chat/completions".parse().expect("a path");
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                request.headers_mut().remove("host");
                sender.send_request(request).await
            }
        }
    }
}

/// What happened to the clients.
#[derive(Debug, Default)]
struct Tally {
    answered: watch::Sender<usize>,
    /// Sent once more, since the connection was used before and ended without a byte of an answer.
    again: AtomicUsize,
    failures: Mutex<Vec<String>>,
}

/// Asks on and on until told to stop.
async fn client(kind: Kind, body: &'static str, address: SocketAddr, tally: Arc<Tally>, stop: Arc<AtomicBool>) {
    let mut kept: Option<Sender> = None;
    while !stop.load(Ordering::Relaxed) {
        match exchange(kind, body, address, &mut kept, &tally).await {
            Ok(()) => tally.answered.send_modify(|count| *count += 1),
            Err(failure) => tally.failures.lock().expect("nobody panics").push(format!("{kind:?}: {failure}")),
        }
    }
}

async fn exchange(
    kind: Kind,
    body: &'static str,
    address: SocketAddr,
    kept: &mut Option<Sender>,
    tally: &Tally,
) -> Result<(), String> {
    if let Some(mut sender) = kept.take()
        && sender.is_open().await
    {
        match sender.send(body).await {
            Ok(response) => return read(response, body, sender, kept).await,
            // RFC 9112, 9.3.1, and RFC 9113, 8.7: nothing of an answer has come, on a connection that may have been ended.
            Err(_) => tally.again.fetch_add(1, Ordering::Relaxed),
        };
    }
    let mut sender = Sender::connect(kind, address).await?;
    let response = sender.send(body).await.map_err(|error| format!("on a new connection: {error:?}"))?;
    read(response, body, sender, kept).await?;
    if kind == Kind::New {
        *kept = None;
    }
    Ok(())
}

async fn read(
    response: Response<Incoming>,
    body: &str,
    sender: Sender,
    kept: &mut Option<Sender>,
) -> Result<(), String> {
    let status = response.status();
    let read = response.into_body().collect().await.map_err(|error| format!("in an answer: {error:?}"))?.to_bytes();
    let end = if body == STREAM { &b"data: [DONE]\n\n"[..] } else { br#"{"choices":[]}"# };
    if status != 200 || !read.ends_with(end) {
        return Err(format!("{status}: {}", String::from_utf8_lossy(&read)));
    }
    *kept = Some(sender);
    Ok(())
}

#[tokio::test]
async fn the_binary_is_replaced_under_load_and_no_request_fails() {
    let ((clients, address), (operators, admin)) = (tcp_socket(), tcp_socket());
    let gateway = Gateway::default();
    let upstream = gateway.start().await;
    let config = format!("[upstream]\nbase_url = \"http://{upstream}/v1\"\n[limits]\nconcurrency = 64\n");
    let start = || {
        let weir = Weir::start(&mut weir_on(&config, [("listen", handed(&clients)), ("admin", handed(&operators))]));
        weir.listening();
        weir
    };
    let mut serving = start();
    let (tally, stop) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
    let mut running = JoinSet::new();
    for kind in [Kind::New, Kind::KeptAlive, Kind::Http2] {
        for body in [CHAT, STREAM, STREAM] {
            for _ in 0..2 {
                running.spawn(client(kind, body, address, tally.clone(), stop.clone()));
            }
        }
    }
    for round in 0..4 {
        let mut answered = tally.answered.subscribe();
        let enough = *answered.borrow() + 100;
        let come = tokio::time::timeout(DEADLINE, answered.wait_for(|count| *count >= enough)).await;
        assert!(come.is_ok_and(|counted| counted.is_ok()), "{round}: {:?}", tally.failures);
        let next = start();
        serving.terminate();
        let ended = tokio::task::spawn_blocking(move || serving.ends()).await.expect("no panic");
        assert!(ended.0.code() == Some(0) && !ended.1.contains("the drain's time is over"), "{round}: {}", ended.1);
        assert_eq!(get(admin, "/readyz").await, (200, "ready\n".to_owned()), "{round}");
        serving = next;
    }
    stop.store(true, Ordering::Relaxed);
    gateway.let_go();
    while running.join_next().await.is_some() {}
    let failures = tally.failures.lock().expect("nobody panics").join("\n");
    assert!(failures.is_empty(), "of {}:\n{failures}", *tally.answered.borrow());
    println!("{} answered, {} sent again", *tally.answered.borrow(), tally.again.load(Ordering::Relaxed));
}
