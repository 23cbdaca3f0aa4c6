//! The program itself: its arguments, its files, its signals, over real sockets on this machine.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

#[path = "process/explain.rs"]
mod explain;

/// Whatever takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// A stream of two seconds: long enough to look around while it runs.
const SHORT_STREAM: [&str; 8] = ["--first-token", "10ms", "--spread", "0", "--per-token", "40ms", "--output", "50..50"];

/// A stream of a minute.
const LONG_STREAM: [&str; 8] =
    ["--first-token", "10ms", "--spread", "0", "--per-token", "100ms", "--output", "600..600"];

const CHAT: &str = r#"{"model":"gpt-4.1-mini","messages":[{"role":"user","content":"hello"}]}"#;

const STREAM: &str = r#"{"model":"gpt-4.1-mini","stream":true,"messages":[{"role":"user","content":"hello"}]}"#;

fn weir() -> Command {
    Command::new(env!("CARGO_BIN_EXE_weir"))
}

/// A program under test. It is ended when dropped.
struct Program {
    child: Child,
    /// What it says, on stdout and stderr.
    lines: Receiver<String>,
}

impl Program {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary was built");
        let (told, lines) = channel();
        for output in [child.stdout.take().map(boxed), child.stderr.take().map(boxed)].into_iter().flatten() {
            let told = told.clone();
            std::thread::spawn(move || {
                BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| told.send(line))
            });
        }
        Self { child, lines }
    }

    /// Waits for a line that contains this.
    #[track_caller]
    fn says(&self, what: &str) -> String {
        let mut all = String::new();
        let deadline = Instant::now() + DEADLINE;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            if line.contains(what) {
                return line;
            }
            writeln!(all, "{line}").expect("a String takes everything");
        }
        panic!("it never said {what:?}, but:\n{all}");
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
    fn ends(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        // Its output ends when it does.
        while Instant::now() < deadline {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(_) => break,
            }
        }
        assert!(Instant::now() < deadline, "it did not end");
        self.child.wait().expect("it is our child")
    }
}

fn boxed(output: impl std::io::Read + Send + 'static) -> Box<dyn std::io::Read + Send> {
    Box::new(output)
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A simulated gateway.
struct Gateway {
    _program: Program,
    address: String,
}

impl Gateway {
    fn start(options: &[&str]) -> Self {
        let program = Program::start(weir().args(["simulate", "--listen", "127.0.0.1:0"]).args(options));
        let line = program.says("http://");
        let address = line.split("http://").nth(1).and_then(|rest| rest.split("/v1").next()).expect("an address");
        Self { address: address.to_owned(), _program: program }
    }
}

/// A weir that serves.
struct Weir {
    program: Program,
    /// Its configuration, and what is in it.
    file: PathBuf,
    config: String,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Weir {
    /// Before this gateway, with further tables of configuration.
    fn start(gateway: &Gateway, config: &str) -> Self {
        Self::start_with(&format!("http://{}/v1", gateway.address), config, |_| {})
    }

    fn start_with(base_url: &str, config: &str, prepare: impl FnOnce(&mut Command)) -> Self {
        let config = if config.contains("[server]") { config.to_owned() } else { format!("[server]\n{config}") };
        let ports = "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n";
        let config = config.replacen("[server]\n", ports, 1);
        let config = format!("{config}\n[upstream]\nbase_url = {base_url:?}\n");
        let file = config_file(&config);
        let mut command = weir();
        command.arg("serve").arg("--config").arg(&file);
        prepare(&mut command);
        let program = Program::start(&mut command);
        let line: serde_json::Value = serde_json::from_str(&program.says("\"listening\"")).expect("a JSON line");
        let address = |name: &str| line[name].as_str().and_then(|text| text.parse().ok()).expect("an address");
        assert_eq!((line["message"].as_str(), line["level"].as_str()), (Some("listening"), Some("INFO")));
        Self { address: address("address"), admin: address("admin"), program, file, config }
    }

    /// Writes more tables into its file, behind those that it began with.
    fn rewrite(&self, more: &str) {
        std::fs::write(&self.file, format!("{}\n{more}", self.config)).expect("it was written before");
    }

    /// Waits until a reload is reading.
    #[track_caller]
    fn reads_its_file(&self) {
        let reads = || {
            let threads = std::fs::read_dir(format!("/proc/{}/task", self.program.child.id())).expect("it runs");
            let name = |thread: std::io::Result<std::fs::DirEntry>| {
                std::fs::read_to_string(thread.ok()?.path().join("comm")).ok()
            };
            threads.filter_map(name).any(|name| name == "reload\n")
        };
        let deadline = Instant::now() + DEADLINE;
        while !reads() {
            assert!(Instant::now() < deadline, "it does not read the file");
            std::thread::yield_now();
        }
    }

    /// The value of a series on /metrics.
    #[track_caller]
    fn metric(&self, series: &str) -> f64 {
        let (_, metrics) = get(self.admin, "/metrics");
        let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("{series} is not in {metrics}"))
    }
}

/// A file of its own with this text.
fn config_file(text: &str) -> PathBuf {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{number}", std::process::id()));
    std::fs::write(&file, text).expect("cargo gives tests a directory");
    file
}

/// An answer as it comes.
struct Answer {
    stream: BufReader<TcpStream>,
    status: u16,
    head: String,
}

impl Answer {
    /// Its body, chunked or not, as far as it came.
    fn rest(mut self) -> String {
        let mut bytes = Vec::new();
        // A reset ends it too; what has come is what counts.
        let _ = self.stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for a line of the body that contains this.
    #[track_caller]
    fn comes(&mut self, what: &str) {
        let mut line = String::new();
        while !line.contains(what) {
            line.clear();
            let read = self.stream.read_line(&mut line).expect("it goes on");
            assert!(read > 0, "the answer ended before {what:?}");
        }
    }
}

fn ask(address: SocketAddr, method: &str, path: &str, body: &str) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {length}");
    stream.write_all(format!("{head}\r\ncontent-type: application/json\r\n\r\n{body}").as_bytes())?;
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
    Ok(Answer { stream, status, head })
}

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = ask(address, "GET", path, "").expect("an answer");
    (answer.status, answer.rest())
}

fn chat(address: SocketAddr, body: &str) -> Answer {
    ask(address, "POST", "/v1/chat/completions", body).expect("an answer")
}

fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the binary was built");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (status.code(), text(stdout), text(stderr))
}

// Serving.

#[test]
fn it_says_where_it_listens_and_serves_clients_and_operators() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let weir = Weir::start(&gateway, "");
    assert_eq!(get(weir.admin, "/livez"), (200, "alive\n".to_owned()));
    assert_eq!(get(weir.admin, "/readyz"), (200, "ready\n".to_owned()));
    let answer = chat(weir.address, CHAT);
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("x-weir-attempts: 1\r\n"), "{}", answer.head);
    assert!(answer.rest().contains("\"choices\""));
    let streamed = chat(weir.address, STREAM).rest();
    assert!(streamed.contains("data: [DONE]") && streamed.ends_with("0\r\n\r\n"), "{streamed}");
    let (status, metrics) = get(weir.admin, "/metrics");
    assert_eq!(status, 200);
    assert!(metrics.contains(r#"weir_requests_total{model="gpt-4.1-mini",client="-",outcome="ok"} 2"#), "{metrics}");
}

#[test]
fn beyond_max_connections_a_client_waits_until_another_leaves() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let weir = Weir::start(&gateway, "max_connections = 1");
    let request = "GET /v1/models HTTP/1.1\r\nhost: weir\r\n\r\n";
    let begin = || {
        let mut client = TcpStream::connect(weir.address).expect("the kernel takes the connection");
        client.write_all(request.as_bytes()).expect("the kernel takes the bytes");
        client
    };
    let mut first = begin();
    let mut bytes = [0; 64];
    assert!(first.read(&mut bytes).expect("answered") > 0);
    let mut second = begin();
    second.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
    second.read(&mut bytes).expect_err("nobody has accepted it");
    let (_, metrics) = get(weir.admin, "/metrics");
    assert!(metrics.contains("weir_guards_total{guard=\"max_connections\"} 1\n"), "{metrics}");
    drop(first);
    second.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    assert!(second.read(&mut bytes).expect("answered") > 0);
}

#[test]
fn the_log_is_text_where_it_is_asked_for() {
    let file =
        config_file("[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n[log]\nformat = \"text\"\n");
    let program = Program::start(weir().arg("serve").arg("--config").arg(&file));
    let line = program.says("listening");
    assert!(line.contains("INFO listening address=127.0.0.1:") && !line.starts_with('{'), "{line}");
}

// The access log.

/// The whole lines of an access log's file; none where there is no such file yet.
fn lines_of(file: &std::path::Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

#[test]
fn a_file_that_is_renamed_is_opened_anew_on_sighup_and_no_line_is_lost() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let file = config_file("");
    let mut weir = Weir::start(&gateway, &format!("[log]\naccess = {file:?}\n"));
    let mut rotated = Vec::new();
    for turn in 0..3 {
        for _ in 0..4 {
            assert_eq!(get(weir.address, "/v1/models").0, 200);
        }
        // What is still on its way to the file when it is renamed goes to the new one.
        let (deadline, all) = (Instant::now() + DEADLINE, if turn == 0 { 4 } else { 5 });
        while lines_of(&file).len() < all {
            assert!(Instant::now() < deadline, "the lines are not written");
            std::thread::yield_now();
        }
        let old = file.with_extension(turn.to_string());
        std::fs::rename(&file, &old).expect("a file");
        weir.program.signal("-HUP");
        assert!(weir.program.says("opened anew").contains("INFO"));
        // What ends from now on is in the new file.
        assert_eq!(chat(weir.address, CHAT).status, 200);
        assert_eq!(lines_of(&old).len(), all);
        rotated.push(old);
    }
    weir.program.terminate();
    assert_eq!(weir.program.ends().code(), Some(0));
    let last = lines_of(&file);
    assert_eq!((last.len(), last[0]["path"].as_str()), (1, Some("/v1/chat/completions")));
    let all: Vec<_> = rotated.iter().flat_map(|file| lines_of(file)).chain(last).collect();
    assert_eq!(all.len(), 15);
    let ids: std::collections::BTreeSet<_> = all.iter().map(|line| line["request_id"].to_string()).collect();
    assert_eq!(ids.len(), 15, "each once");
}

#[test]
fn without_a_choice_it_goes_to_stderr_in_whole_lines_beside_weirs_own_log() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let weir = Weir::start(&gateway, "[log]\nlevel = \"debug\"\n");
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let address = weir.address;
            std::thread::spawn(move || {
                (0..10).for_each(|_| assert_eq!(get(address, "/v1/models?text=not-to-be-logged").0, 200));
                (0..10).for_each(|_| assert_eq!(get(address, "/not-under-v1").0, 404));
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().expect("answered"));
    let mut seen = 0;
    while seen < 80 {
        let line = weir.program.says("{");
        assert!(!line.contains("not-to-be-logged"), "{line}");
        let value: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        // weir's own lines have a level.
        assert!(value["outcome"].is_string() != value["level"].is_string(), "{line}");
        seen += usize::from(value["outcome"].is_string());
    }
}

#[test]
fn a_warning_about_a_request_has_what_finds_its_line_in_the_access_log() {
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let cutting = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms", "--fault", "cut-event=1"]);
    for (gateway, body, message) in
        [(nobody.to_string(), CHAT, "\"failed\""), (cutting.address.clone(), STREAM, "\"an answer broke off\"")]
    {
        let file = config_file("");
        let tables = format!("[retry]\nmax_retries = 0\n[log]\naccess = {file:?}\n[models.\"gpt-4.1-mini\"]\n");
        let mut weir = Weir::start_with(&format!("http://{gateway}/v1"), &tables, |_| {});
        let answer = chat(weir.address, body);
        drop(answer.rest());
        let warning: serde_json::Value = serde_json::from_str(&weir.program.says(message)).expect("a JSON line");
        weir.program.terminate();
        assert_eq!(weir.program.ends().code(), Some(0));
        let line = &lines_of(&file)[0];
        assert_eq!((warning["level"].as_str(), line["model"].as_str()), (Some("WARN"), Some("gpt-4.1-mini")));
        for field in ["request_id", "client", "model", "code", "attempts"] {
            assert!(!line[field].is_null() && warning[field] == line[field], "{field}: {warning} and {line}");
        }
        assert!(warning["error"].as_str().is_some_and(|error| !error.is_empty()), "{warning}");
    }
}

#[test]
fn an_access_log_that_cannot_be_opened_is_said_at_the_start() {
    let file = config_file("");
    let access = file.join("access.log");
    let config = config_file(&format!(
        "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n[log]\naccess = {access:?}\n"
    ));
    let (code, _, stderr) = run(weir().arg("--config").arg(&config));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("log.access") && stderr.contains(access.to_str().expect("text")), "{stderr}");
}

/// A weir whose stderr nobody reads behind the line that says where it listens.
struct Unread {
    child: Child,
    stderr: Option<BufReader<std::process::ChildStderr>>,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Unread {
    fn start(gateway: &Gateway) -> Self {
        let config = config_file(&format!(
            "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n[upstream]\n\
             base_url = \"http://{}/v1\"\n[log]\nlevel = \"debug\"\n",
            gateway.address
        ));
        let mut child =
            weir().arg("--config").arg(config).stderr(Stdio::piped()).spawn().expect("the binary was built");
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        while !line.contains("\"listening\"") {
            line.clear();
            assert!(stderr.read_line(&mut line).expect("text") > 0, "it has ended");
        }
        let line: serde_json::Value = serde_json::from_str(&line).expect("a JSON line");
        let address = |name: &str| line[name].as_str().and_then(|text| text.parse().ok()).expect("an address");
        Self { address: address("address"), admin: address("admin"), stderr: Some(stderr), child }
    }

    /// Both logs have something to say: each request has a line, and each connection that breaks off a debug line.
    fn serves(&self, requests: usize) {
        for _ in 0..requests {
            assert_eq!(get(self.address, "/not-under-v1").0, 404);
            TcpStream::connect(self.address)
                .and_then(|mut odd| odd.write_all(b"nonsense\r\n\r\n"))
                .expect("it accepts");
        }
        assert_eq!(chat(self.address, CHAT).status, 200);
        assert_eq!(get(self.admin, "/livez").0, 200);
    }

    fn ends(&mut self) -> Option<i32> {
        let sent = Command::new("kill").arg("-TERM").arg(self.child.id().to_string()).status();
        assert!(sent.expect("there is a kill").success());
        self.child.wait().expect("it is our child").code()
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_reader_of_stderr_that_stops_reading_holds_nobody_up() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let mut weir = Unread::start(&gateway);
    // A pipe takes 64 KiB.
    weir.serves(400);
    assert_eq!(weir.ends(), Some(0), "it does not wait for the reader for ever");
}

#[test]
fn a_reader_of_stderr_that_goes_away_takes_nobody_with_it() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let mut weir = Unread::start(&gateway);
    drop(weir.stderr.take());
    weir.serves(50);
    assert_eq!(weir.ends(), Some(0));
}

// Signals.

#[test]
fn sigterm_lets_a_stream_run_to_its_end_and_nobody_else_in() {
    let gateway = Gateway::start(&SHORT_STREAM);
    let mut weir = Weir::start(&gateway, "");
    let mut stream = chat(weir.address, STREAM);
    stream.comes("data: ");
    weir.program.terminate();
    weir.program.says("\"draining\"");
    assert_eq!(get(weir.admin, "/readyz"), (503, "draining\n".to_owned()));
    assert_eq!(get(weir.admin, "/livez").0, 200, "it still lives");
    let deadline = Instant::now() + DEADLINE;
    while TcpStream::connect(weir.address).is_ok() {
        assert!(Instant::now() < deadline, "new connections are still accepted");
        std::thread::yield_now();
    }
    let rest = stream.rest();
    assert!(rest.contains("data: [DONE]") && rest.ends_with("0\r\n\r\n"), "{rest}");
    assert_eq!(weir.program.ends().code(), Some(0));
}

#[test]
fn sigterm_ends_it_at_once_when_nothing_runs() {
    let gateway = Gateway::start(&["--per-token", "1ms"]);
    let mut weir = Weir::start(&gateway, "");
    // A connection that is kept alive does not keep it.
    let idle = TcpStream::connect(weir.address).expect("it listens");
    chat(weir.address, CHAT).rest();
    let begun = Instant::now();
    weir.program.terminate();
    assert_eq!(weir.program.ends().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(idle);
}

#[test]
fn a_stream_longer_than_the_drain_is_visibly_cut() {
    let gateway = Gateway::start(&LONG_STREAM);
    let file = config_file("");
    let mut weir = Weir::start(&gateway, &format!("[server]\ndrain = \"1s\"\n[log]\naccess = {file:?}\n"));
    let mut stream = chat(weir.address, STREAM);
    stream.comes("data: ");
    let begun = Instant::now();
    weir.program.terminate();
    assert_eq!(weir.program.ends().code(), Some(0));
    let took = begun.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(10)).contains(&took), "{took:?}");
    let rest = stream.rest();
    assert!(!rest.contains("[DONE]") && rest.contains("\"code\":\"draining\""), "{rest}");
    assert!(rest.ends_with("}\n\n\r\n0\r\n\r\n"), "the error is whole: {rest}");
    assert_eq!(lines_of(&file).iter().map(cut_by_weir).collect::<Vec<_>>(), [(Some(200), true)]);
}

/// The status, if an answer had begun, of a line that says that weir has cut its request.
#[track_caller]
fn cut_by_weir(line: &serde_json::Value) -> (Option<u64>, bool) {
    assert_eq!((line["code"].as_str(), line["model"].as_str()), (Some("draining"), Some("gpt-4.1-mini")), "{line}");
    (line["status"].as_u64(), line["outcome"] == "failed" && line["bytes_out"].as_u64() > Some(0))
}

#[test]
fn a_second_sigterm_ends_it_at_once_and_whoever_is_cut_has_a_line() {
    let gateway = Gateway::start(&LONG_STREAM);
    let file = config_file("");
    let mut weir = Weir::start(&gateway, &format!("[limits]\nconcurrency = 1\n[log]\naccess = {file:?}\n"));
    let mut stream = chat(weir.address, STREAM);
    stream.comes("data: ");
    let address = weir.address;
    let waiter = std::thread::spawn(move || ask(address, "POST", "/v1/chat/completions", CHAT).map(|_| ()));
    waiting(&weir, 1);
    weir.program.terminate();
    weir.program.says("\"draining\"");
    let begun = Instant::now();
    weir.program.terminate();
    assert_eq!(weir.program.ends().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(!stream.rest().contains("[DONE]"));
    // It may have been told so, or not.
    let _ = waiter.join().expect("it does not hang");
    let mut lines: Vec<_> = lines_of(&file).iter().map(cut_by_weir).collect();
    lines.sort_unstable();
    assert!(lines.len() == 2 && lines.contains(&(Some(200), true)), "the stream and who waited: {lines:?}");
}

/// Waits until so many requests wait.
fn waiting(weir: &Weir, count: usize) {
    let deadline = Instant::now() + DEADLINE;
    let line = format!("weir_waiting{{model=\"gpt-4.1-mini\"}} {count}\n");
    while !get(weir.admin, "/metrics").1.contains(&line) {
        assert!(Instant::now() < deadline, "never {line}");
        std::thread::yield_now();
    }
}

#[test]
fn who_waits_when_the_drain_begins_is_served_in_it() {
    let gateway =
        Gateway::start(&["--first-token", "10ms", "--spread", "0", "--per-token", "40ms", "--output", "20..20"]);
    let mut weir = Weir::start(&gateway, "[limits]\nconcurrency = 1\n");
    let mut stream = chat(weir.address, STREAM);
    stream.comes("data: ");
    let address = weir.address;
    let waiter = std::thread::spawn(move || chat(address, STREAM));
    waiting(&weir, 1);
    weir.program.terminate();
    weir.program.says("\"draining\"");
    assert!(stream.rest().contains("data: [DONE]"));
    let waited = waiter.join().expect("an answer");
    assert_eq!(waited.status, 200);
    assert!(waited.rest().contains("data: [DONE]"));
    assert_eq!(weir.program.ends().code(), Some(0));
}

#[test]
fn who_still_waits_when_the_drain_is_over_is_told_so() {
    let gateway = Gateway::start(&LONG_STREAM);
    let mut weir = Weir::start(&gateway, "[server]\ndrain = \"1s\"\n[limits]\nconcurrency = 1\n");
    let mut stream = chat(weir.address, STREAM);
    stream.comes("data: ");
    let address = weir.address;
    let waiter = std::thread::spawn(move || chat(address, CHAT));
    waiting(&weir, 1);
    weir.program.terminate();
    let told = waiter.join().expect("an answer");
    assert_eq!(told.status, 503);
    assert!(
        told.head.contains("x-weir-refused-by: drain") && told.head.contains("retry-after: 1\r\n"),
        "{}",
        told.head
    );
    let error: serde_json::Value = serde_json::from_str(&told.rest()).expect("an error is JSON");
    assert_eq!(error["error"]["code"], "draining");
    assert_eq!(weir.program.ends().code(), Some(0));
}

#[test]
fn a_lame_duck_is_not_ready_and_serves_all_who_come_before_it_drains() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let mut weir = Weir::start(&gateway, "[server]\nlame_duck = \"4s\"\n");
    assert!(get(weir.admin, "/metrics").1.contains("\nweir_draining 0\n"));
    weir.program.terminate();
    weir.program.says("lame_duck");
    assert_eq!(get(weir.admin, "/readyz"), (503, "draining\n".to_owned()));
    assert!(get(weir.admin, "/metrics").1.contains("\nweir_draining 1\n"));
    assert_eq!(chat(weir.address, CHAT).status, 200);
    weir.program.says("\"draining\"");
    assert_eq!(weir.program.ends().code(), Some(0));
}

#[test]
fn a_second_sigterm_ends_a_lame_duck_at_once() {
    let gateway = Gateway::start(&LONG_STREAM);
    let mut weir = Weir::start(&gateway, "[server]\nlame_duck = \"5min\"\n");
    let mut stream = chat(weir.address, STREAM);
    stream.comes("data: ");
    weir.program.terminate();
    weir.program.says("lame_duck");
    weir.program.terminate();
    assert_eq!(weir.program.ends().code(), Some(0));
    assert!(!stream.rest().contains("[DONE]"));
}

// Reloading.

#[test]
fn sighup_puts_the_file_in_force_while_a_stream_runs_and_a_bad_file_changes_nothing() {
    let gateway = Gateway::start(&SHORT_STREAM);
    let weir = Weir::start(&gateway, "");
    let mut stream = chat(weir.address, STREAM);
    stream.comes("data: ");
    weir.rewrite("[clients.a]\nkey = \"sk-a\"\n[log]\nlevel = \"debug\"\n[limits]\nrequests = \"600/min\"\n");
    weir.program.signal("-HUP");
    weir.program.says("the configuration was reloaded");
    assert_eq!(chat(weir.address, CHAT).status, 401, "only the client's key is served now");
    // What is logged at that level only.
    let mut garbage = TcpStream::connect(weir.admin).expect("it listens");
    garbage.write_all(b"no request\r\n\r\n").expect("the kernel takes the bytes");
    weir.program.says("DEBUG");
    assert_eq!(weir.metric(r#"weir_limit_capacity{scope="global",name="",unit="requests"}"#), 60.0);

    weir.rewrite(
        "[limits]\nrequests = \"600\"\n[timeouts]\nconnect = \"soon\"\n[clients.a]\nkey = \"sk-a\"\nweight = -1\n",
    );
    weir.program.signal("-HUP");
    let lines = weir.config.lines().count();
    for (line, option) in
        [(lines + 3, "limits.requests"), (lines + 5, "timeouts.connect"), (lines + 8, "clients.a.weight")]
    {
        let said: serde_json::Value = serde_json::from_str(&weir.program.says(option)).expect("a JSON line");
        assert_eq!((said["level"].as_str(), said["line"].as_u64()), (Some("ERROR"), Some(line as u64)), "{said}");
        assert_eq!(said["file"].as_str(), weir.file.to_str());
    }
    weir.program.says("nothing has changed");
    assert_eq!(weir.metric(r#"weir_limit_capacity{scope="global",name="",unit="requests"}"#), 60.0);
    assert_eq!(chat(weir.address, CHAT).status, 401);
    let results =
        ["applied", "refused"].map(|result| weir.metric(&format!("weir_reloads_total{{result=\"{result}\"}}")));
    assert_eq!((results, weir.metric("weir_config_last_reload_successful")), ([1.0, 1.0], 0.0));
    assert!(weir.metric("weir_config_last_reload_success_timestamp_seconds") > 1.7e9);
    let rest = stream.rest();
    assert!(rest.contains("data: [DONE]") && rest.ends_with("0\r\n\r\n"), "{rest}");
}

#[test]
fn post_reload_says_what_has_changed_or_why_nothing_has() {
    let gateway = Gateway::start(&LONG_STREAM);
    let weir = Weir::start(&gateway, "");
    let reload = || {
        let answer = ask(weir.admin, "POST", "/reload", "").expect("an answer");
        (answer.status, answer.rest())
    };
    assert_eq!(reload(), (200, "reloaded; nothing is different\n".to_owned()));
    weir.rewrite("[limits]\nconcurrency = 7\n[timeouts]\nidle = \"1min\"\n");
    let (status, report) = reload();
    assert_eq!(status, 200, "{report}");
    assert_eq!(
        report,
        "reloaded; 2 options are different:\n  limits.concurrency = 7 (was \"adaptive\")\n  \
         timeouts.idle = \"1min\" (was \"5min\")\n"
    );
    weir.rewrite("[limits]\nconcurrency = 0\n[queue]\nmax_wait = \"long\"\n");
    let (status, complaints) = reload();
    assert_eq!(status, 422, "{complaints}");
    for words in ["nothing has changed", "limits.concurrency", "queue.max_wait", &*weir.file.to_string_lossy()] {
        assert!(complaints.contains(words), "{words} is not in {complaints}");
    }
    weir.rewrite("[log]\nformat = \"text\"\n[limits]\nconcurrency = 9\n");
    let (status, refused) = reload();
    assert_eq!(status, 409, "{refused}");
    assert!(refused.contains("restart") && refused.contains("log.format = \"text\""), "{refused}");
    assert_eq!(weir.metric(r#"weir_limit_capacity{scope="global",name="",unit="concurrency"}"#), 7.0);
    assert_eq!(get(weir.admin, "/reload").0, 405);

    let mut stream = chat(weir.address, STREAM);
    stream.comes("data: ");
    weir.program.terminate();
    weir.program.says("\"draining\"");
    assert_eq!(reload().0, 503);
}

#[test]
fn a_new_access_log_that_cannot_be_opened_for_now_holds_nobody_up() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let weir = Weir::start(&gateway, "");
    // To open a pipe is to wait until somebody reads it.
    let pipe = config_file("").with_extension("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("there is a mkfifo").success());
    weir.rewrite(&format!("[limits]\nconcurrency = 7\n[log]\naccess = {pipe:?}\n"));
    let admin = weir.admin;
    let reload = std::thread::spawn(move || ask(admin, "POST", "/reload", "").expect("an answer").rest());
    weir.reads_its_file();
    assert_eq!((chat(weir.address, CHAT).status, get(weir.admin, "/livez").0), (200, 200));
    assert!(
        !get(weir.admin, "/metrics").1.contains("weir_limit_capacity{"),
        "nothing is in force before all of it can be"
    );
    let mut log = BufReader::new(std::fs::File::open(&pipe).expect("a pipe"));
    assert!(reload.join().expect("it is answered").contains("limits.concurrency = 7"));
    assert_eq!(chat(weir.address, CHAT).status, 200);
    let mut line = String::new();
    log.read_line(&mut line).expect("a line");
    assert!(line.contains("\"outcome\":\"ok\""), "{line}");
}

#[test]
fn the_access_log_is_opened_anew_while_a_reload_hangs_and_what_was_asked_meanwhile_is_one_reload() {
    let gateway = Gateway::start(&["--first-token", "1ms", "--per-token", "1ms"]);
    let access = config_file("");
    let weir = Weir::start(&gateway, &format!("[log]\naccess = {access:?}\n"));
    // In place of the file a pipe, which is read when somebody writes to it.
    let (text, held) = (std::fs::read_to_string(&weir.file).expect("it was written"), weir.file.with_extension("held"));
    std::fs::rename(&weir.file, &held).expect("a file");
    assert!(Command::new("mkfifo").arg(&weir.file).status().expect("there is a mkfifo").success());
    weir.program.signal("-HUP");
    weir.reads_its_file();
    weir.program.says("opened anew");
    for turn in 0..2 {
        std::fs::rename(&access, access.with_extension(turn.to_string())).expect("a file");
        weir.program.signal("-HUP");
        weir.program.says("opened anew");
        assert!(access.exists());
    }
    let mut pipe = std::fs::OpenOptions::new().write(true).open(&weir.file).expect("it is read");
    std::fs::rename(&held, &weir.file).expect("a file");
    pipe.write_all(text.as_bytes()).expect("it is read");
    drop(pipe);
    for _ in 0..2 {
        weir.program.says("the configuration was reloaded");
    }
    assert_eq!(weir.metric("weir_reloads_total{result=\"applied\"}"), 2.0, "the one that hung, and one after it");
}

#[test]
fn a_file_that_is_gone_is_said_to_be_and_ends_nothing() {
    let mut command = weir();
    command
        .arg("serve")
        .arg("--config")
        .arg(config_file("[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n"));
    let gone = Program::start(&mut command);
    let line: serde_json::Value = serde_json::from_str(&gone.says("\"listening\"")).expect("a JSON line");
    let admin: SocketAddr = line["admin"].as_str().and_then(|text| text.parse().ok()).expect("an address");
    std::fs::remove_file(PathBuf::from(command.get_args().last().expect("a file"))).expect("it is there");
    gone.signal("-HUP");
    let said = gone.says("cannot read");
    assert!(said.contains("ERROR"), "{said}");
    assert_eq!(get(admin, "/livez").0, 200, "it runs on");
}

#[test]
fn without_a_file_there_is_none_to_reload() {
    use weir::config::Config;
    use weir::run::Running;

    let parse = |text: &str| Config::parse(text, &|_| None).expect("a good configuration");
    let ports = "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n";
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    let running = Running::start(parse(ports)).expect("it starts");
    let admin = running.admin_address.tcp().expect("an address and a port");
    let answer = ask(admin, "POST", "/reload", "").expect("an answer");
    assert_eq!((answer.status, answer.rest().contains("--config FILE")), (409, true));
    let report = running.reload(parse(&format!("{ports}[limits]\nconcurrency = 3\n"))).expect("it can change live");
    assert_eq!(report.changes.len(), 1, "{report}");
    let (_, metrics) = get(admin, "/metrics");
    assert!(metrics.contains("weir_limit_capacity{scope=\"global\",name=\"\",unit=\"concurrency\"} 3\n"), "{metrics}");
}

// Configuration and arguments.

#[test]
fn a_bad_configuration_is_refused_with_every_complaint_and_no_secret() {
    let file = config_file(
        "[server]\nlisten = \"nowhere\"\nmax_bodyy = \"1MiB\"\n[upstream]\nbase_url = \"ftp://gateway\"\n\
         api_key = \"sk-very-secret\"\n[limits]\nrequests = \"600\"\n[timeouts]\nconnect = \"soon\"\n",
    );
    for command in ["serve", "check"] {
        let (code, stdout, stderr) = run(weir().arg(command).arg("--config").arg(&file));
        assert_eq!(code, Some(78), "{stderr}");
        for path in ["server.listen", "max_bodyy", "upstream.base_url", "limits.requests", "timeouts.connect"] {
            assert!(stderr.contains(path), "{path} is missing in\n{stderr}");
        }
        assert!(!stderr.contains("very-secret") && stdout.is_empty(), "{stderr}\n{stdout}");
    }
    let (code, _, stderr) = run(weir().args(["check", "--config", "/nowhere/weir.toml"]));
    assert_eq!(code, Some(78));
    assert!(stderr.contains("/nowhere/weir.toml"), "{stderr}");
}

#[test]
fn check_prints_what_is_in_force_and_masks_secrets() {
    let file = config_file("[upstream]\napi_key = \"sk-very-secret\"\n[models.\"gpt-4.1-mini\"]\nconcurrency = 8\n");
    let (code, stdout, stderr) = run(weir().arg("check").arg("--config").arg(&file));
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    for line in ["listen = \"127.0.0.1:8080\"", "[models.\"gpt-4.1-mini\"]", "concurrency = 8", "api_key = "] {
        assert!(stdout.contains(line), "{line} is missing in\n{stdout}");
    }
    assert!(!stdout.contains("very-secret"), "{stdout}");
    let (code, defaults, _) = run(weir().arg("check"));
    assert_eq!(code, Some(0));
    assert!(defaults.contains("base_url = "), "{defaults}");
}

/// The end of a pipe that nobody reads.
fn unread() -> std::io::PipeWriter {
    std::io::pipe().expect("a pipe").1
}

#[test]
fn a_reader_of_stdout_who_leaves_early_is_no_failure() {
    for arguments in
        [&["check"][..], &["--help"], &["explain", "--help"], &["simulate", "--help"], &["demo"], &["demo", "--exit"]]
    {
        let done = weir().args(arguments).stdout(unread()).output().expect("the binary was built");
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!((done.status.code(), &*stderr), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
fn what_cannot_be_written_to_a_full_disk_is_a_failure_that_is_said() {
    for arguments in [&["check"][..], &["simulate", "--listen", "127.0.0.1:0"], &["demo", "--exit"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
        let done = weir().args(arguments).stdout(full).output().expect("the binary was built");
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("weir: cannot write to stdout: ") && stderr.lines().count() == 1, "{stderr}");
    }
}

#[test]
fn where_nobody_reads_a_complaint_the_exit_status_tells_it() {
    let bad = config_file("[limits]\nconcurrency = 0\n");
    let bad = bad.to_str().expect("text");
    for (arguments, status) in [
        (&["chek"][..], 2),
        (&["check", "--config", bad], 78),
        (&["serve", "--config", bad], 78),
        (&["explain", "--port", "1"], 2),
        (&["explain", "--admin", "unix:/nothing/is/here"], 1),
        (&["simulate", "--first-tokn", "1s"], 2),
    ] {
        let ended = weir().args(arguments).stderr(unread()).status().expect("the binary was built");
        assert_eq!(ended.code(), Some(status), "{arguments:?}");
    }
}

#[test]
fn a_port_that_is_taken_is_named_with_its_option() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    for (option, other) in [("listen", "admin_listen"), ("admin_listen", "listen")] {
        let file = config_file(&format!("[server]\n{option} = \"{address}\"\n{other} = \"127.0.0.1:0\"\n"));
        let (code, _, stderr) = run(weir().arg("--config").arg(&file));
        assert_eq!(code, Some(1), "{stderr}");
        assert!(stderr.contains(&address) && stderr.contains(&format!("server.{option}")), "{stderr}");
    }
}

#[test]
fn arguments_that_are_unknown_are_refused_and_help_is_given() {
    for arguments in [&["--confg", "x"][..], &["server"], &["serve", "--exit"], &["check", "--config"]] {
        let (code, stdout, stderr) = run(weir().args(arguments));
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains("weir --help"), "{stderr}");
    }
    for (arguments, word) in
        [(&["--help"][..], "USAGE"), (&["serve", "-h"], "USAGE"), (&["--version"], env!("CARGO_PKG_VERSION"))]
    {
        let (code, stdout, stderr) = run(weir().args(arguments));
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        assert!(stdout.contains(word), "{stdout}");
    }
    let (code, stdout, _) = run(weir().args(["simulate", "--help"]));
    assert!(code == Some(0) && stdout.contains("--first-token"), "{stdout}");
}

#[test]
fn unknown_arguments_of_simulate_are_wrong_arguments_too() {
    let (code, _, stderr) = run(weir().args(["simulate", "--first-tokn", "1s"]));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("--first-tokn"), "{stderr}");
}

// TLS.

/// A gateway that answers every chat over TLS, with a certificate that it signed itself: its address, and the certificate.
fn tls_gateway() -> (SocketAddr, String) {
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

    let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let (certificate, pem) = (own.cert.der().clone(), own.cert.pem());
    let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()).into();
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key);
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config.expect("key and certificate match")));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            listener.set_nonblocking(true).expect("sockets can");
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            while let Ok((tcp, _)) = listener.accept().await {
                // A client that does not trust it breaks off.
                if let Ok(tls) = acceptor.accept(tcp).await {
                    answer_once(tls).await;
                }
            }
        });
    });
    (address, pem)
}

async fn answer_once(mut tls: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut request = Vec::new();
    while !request.ends_with(CHAT.as_bytes()) {
        if tls.read_buf(&mut request).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\nconnection: close\r\n\r\n{\"choices\":[]}";
    tls.write_all(answer).await.expect("weir reads");
    tls.shutdown().await.expect("weir reads");
}

#[test]
fn a_gateway_is_trusted_by_its_certificate_authority_only() {
    let (address, pem) = tls_gateway();
    let other = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate").cert.pem();
    let base_url = format!("https://localhost:{}/v1", address.port());
    let start = |trusted: &str| {
        let file = config_file(trusted);
        Weir::start_with(&base_url, "[retry]\nmax_retries = 0\n", |command| {
            command.env("SSL_CERT_FILE", file).env_remove("SSL_CERT_DIR");
        })
    };
    let trusting = start(&pem);
    let answer = chat(trusting.address, CHAT);
    assert_eq!((answer.status, answer.rest().as_str()), (200, "{\"choices\":[]}"));

    let distrusting = start(&other);
    let answer = chat(distrusting.address, CHAT);
    assert_eq!(answer.status, 502);
    let text = answer.rest();
    let error: serde_json::Value = serde_json::from_str(&text).expect("an error is JSON");
    assert_eq!(error["error"]["code"], "upstream_unreachable");
    let message = error["error"]["message"].as_str().expect("a message");
    assert!(message.contains("TLS") && message.contains("certificate"), "{message}");
}
