//! No key is in anything that the program says: not in its logs, its metrics, its answers or its complaints; and no prompt or
//! completion in what it keeps or tells of requests.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Whatever takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// What is looked for. Its middle alone would be a leak too, so that is what is looked for.
const UPSTREAM: &str = "sk-up-Qx7vUpstreamZ9-end";
const CLIENT: &str = "sk-cl-Qx7vClientZ9-end";
const OTHER: &str = "sk-ot-Qx7vOtherZ9-end";
const STRANGER: &str = "sk-st-Qx7vStrangerZ9-end";
const MIDDLE: &str = "Qx7v";

/// What prompts, and completions and errors of the gateway's, have in them.
const SAID: &str = "zPq9Said";

const CHAT: &str = r#"{"model":"gpt-4.1-mini","messages":[{"role":"user","content":"zPq9Said"}]}"#;
const STREAM: &str = r#"{"model":"gpt-4.1-mini","stream":true,"messages":[{"role":"user","content":"zPq9Said"}]}"#;

/// How a configuration has its keys.
#[derive(Debug, Clone, Copy)]
enum Form {
    Inline,
    Environment,
    File,
}

impl Form {
    fn write(self, key: &str) -> String {
        match self {
            Self::Inline => key.to_owned(),
            Self::Environment => format!("env:WEIR_TEST_{}", key.len()),
            Self::File => format!("file:{}", file(&format!("{key}\n")).display()),
        }
    }

    /// As much as a configuration can have to do with keys.
    fn config(self, gateway: SocketAddr, log: &str) -> PathBuf {
        let [upstream, client, other] = [UPSTREAM, CLIENT, OTHER].map(|key| self.write(key));
        file(&format!(
            "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\nheader_timeout = \"300ms\"\n\
             [upstream]\nbase_url = \"http://{gateway}/v1\"\napi_key = {upstream:?}\n\
             [retry]\nmax_retries = 1\nbase_delay = \"1ms\"\n[log]\nlevel = \"debug\"\nformat = {log:?}\n\
             [clients.a]\nkey = {client:?}\n[clients.b]\nkey = {other:?}\nrequests = {{ rate = \"1/day\", burst = 1 }}\n\
             max_wait = \"0s\"\n"
        ))
    }
}

fn weir() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    for key in [UPSTREAM, CLIENT, OTHER] {
        command.env(format!("WEIR_TEST_{}", key.len()), key);
    }
    command
}

/// A file of its own with this text.
fn file(text: &str) -> PathBuf {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let name = format!("secrets-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&file, text).expect("cargo gives tests a directory");
    file
}

/// A weir that serves, and what it says.
struct Weir {
    child: Child,
    lines: Receiver<String>,
    said: String,
}

impl Weir {
    fn start(config: &Path) -> Self {
        let mut command = weir();
        let command = command.arg("serve").arg("--config").arg(config).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary was built");
        let (told, lines) = channel();
        let outputs: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("piped")), Box::new(child.stderr.take().expect("piped"))];
        for output in outputs {
            let told = told.clone();
            std::thread::spawn(move || {
                BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| told.send(line))
            });
        }
        Self { child, lines, said: String::new() }
    }

    /// The addresses in its first line, for clients and for operators.
    fn addresses(&mut self) -> [SocketAddr; 2] {
        let line = loop {
            let line =
                self.lines.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("it does not listen:\n{}", self.said));
            self.said.push_str(&line);
            if line.contains("listening") {
                break line;
            }
        };
        let words = line.split(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | ':')));
        let mut found = words.filter_map(|word| word.trim_matches(':').parse().ok());
        [found.next().expect("an address"), found.next().expect("an address of the admin listener")]
    }

    /// Ends it as an operator does, and returns all that it has said.
    fn end(mut self) -> String {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().expect("there is a kill").success());
        while let Ok(line) = self.lines.recv_timeout(DEADLINE) {
            self.said.push_str(&line);
            self.said.push('\n');
        }
        assert!(self.child.wait().expect("it is our child").success(), "{}", self.said);
        std::mem::take(&mut self.said)
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A gateway that behaves as a path's last word says, and keeps the heads it has got.
fn gateway() -> (SocketAddr, Arc<Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let heads = Arc::<Mutex<String>>::default();
    let seen = heads.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let seen = seen.clone();
            std::thread::spawn(move || {
                let mut request = [0; 8192];
                let read = stream.read(&mut request).unwrap_or(0);
                let head = String::from_utf8_lossy(&request[..read]).into_owned();
                let body = r#"{"choices":[{"message":{"content":"zPq9Said"}}],"error":{"message":"zPq9Said","code":"zPq9Said"}}"#;
                let length = body.len();
                let json = format!(
                    "content-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
                );
                let answer = match head.split([' ', '?']).nth(2).unwrap_or_default() {
                    "garbage" => "SSH-2.0-not-http\r\n".to_owned(),
                    "close" => String::new(),
                    "fails" => format!("HTTP/1.1 500 Oops\r\n{json}"),
                    "busy" => format!("HTTP/1.1 429 Busy\r\nretry-after: 9999\r\n{json}"),
                    "denies" => format!("HTTP/1.1 401 Unauthorized\r\n{json}"),
                    "cut" => "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_owned(),
                    "stream" => "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {\"choices\":[{\"delta\":{\"content\":\"zPq9Said\"}}]}\n\n".to_owned(),
                    _ => format!("HTTP/1.1 200 OK\r\n{json}"),
                };
                seen.lock().expect("no test panics here").push_str(&head);
                // weir may have gone.
                let _ = stream.write_all(answer.as_bytes());
            });
        }
    });
    (address, heads)
}

/// Everything that comes back for these bytes.
fn exchange(address: SocketAddr, bytes: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    stream.write_all(bytes.as_bytes()).expect("the kernel takes the bytes");
    let mut answer = Vec::new();
    // A reset ends it too; what has come is what counts.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn post(target: &str, fields: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {target} HTTP/1.1\r\nhost: weir\r\nconnection: close\r\n{fields}\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

/// Requests of every fate, each with keys in it.
fn requests() -> Vec<String> {
    let chat = "/v1/chat/completions";
    let own = format!("authorization: Bearer {CLIENT}");
    let mut requests = Vec::new();
    for fate in ["ok", "garbage", "close", "fails", "busy", "denies", "cut", "stream"] {
        requests.push(post(&format!("{chat}?{fate}"), &own, if fate == "stream" { STREAM } else { CHAT }));
    }
    for field in ["authorization: Bearer ", "authorization: ", "authorization: Basic ", "x-api-key: ", "api-key: "] {
        for key in [CLIENT, OTHER, STRANGER, UPSTREAM] {
            requests.push(post(chat, &format!("{field}{key}"), CHAT));
        }
    }
    requests.extend([
        post("/v1/messages", &format!("x-api-key: {STRANGER}"), CHAT),
        post(&format!("/v1beta/models?key={CLIENT}"), &own, CHAT),
        post(&format!("/v1/models?key={CLIENT}"), &own, CHAT),
        post(chat, &own, r#"{"model":"a","model":"b"}"#),
        post(chat, &format!("{own}\r\nhost: {CLIENT}"), CHAT),
        post(chat, &format!("{own}\r\nx-long: {}", "x".repeat(70_000)), CHAT),
        post(chat, &format!("{own}\r\nbad name: {CLIENT}"), CHAT),
        post(chat, &format!("{own}\r\ntransfer-encoding: chunked"), CHAT),
        post(chat, &own, CHAT).replace("HTTP/1.1", &format!("HTTP/{CLIENT}")),
        format!("GET /v1/models HTTP/1.1\r\nhost: weir\r\n{own}\r\n"),
        format!("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{CLIENT}{STRANGER}{UPSTREAM}"),
        format!("{CLIENT}\r\n\r\n"),
        format!("CONNECT {CLIENT}:80 HTTP/1.1\r\nhost: weir\r\n{own}\r\nconnection: close\r\n\r\n"),
    ]);
    requests
}

/// Neither a key nor what was said to the gateway or by it.
#[track_caller]
fn assert_nothing_private(what: &str, text: &str) {
    assert_no_key(what, text);
    assert!(!text.contains(SAID), "{what} shows what was said");
}

#[track_caller]
fn assert_no_key(what: &str, text: &str) {
    let at = text.find(MIDDLE).map(|at| text[at.saturating_sub(200)..].chars().take(400).collect::<String>());
    assert_eq!(at, None, "{what} shows a key");
}

#[test]
fn no_key_is_in_the_log_the_metrics_or_an_answer() {
    let (gateway, heads) = gateway();
    let forms = [(Form::Inline, "json"), (Form::Environment, "text"), (Form::File, "json")];
    let statuses: BTreeSet<String> = std::thread::scope(|scope| {
        let all = forms.map(|(form, log)| scope.spawn(move || statuses_of(&form.config(gateway, log))));
        all.into_iter().flat_map(|one| one.join().expect("nothing is shown")).collect()
    });
    let heads = heads.lock().expect("no test panics here");
    assert!(heads.contains(&format!("Bearer {UPSTREAM}")) && heads.contains(SAID), "key and prompt were in use");
    for status in ["200", "400", "401", "404", "429", "431", "500", "502"] {
        assert!(statuses.contains(status), "nothing was answered with {status}: {statuses:?}");
    }
}

/// Makes every request of a weir with this configuration, looks at all that it shows, and returns the statuses of its answers.
fn statuses_of(config: &Path) -> BTreeSet<String> {
    let mut statuses = BTreeSet::new();
    let mut weir = Weir::start(config);
    let [address, admin] = weir.addresses();
    for request in requests() {
        let answer = exchange(address, &request);
        assert_no_key(&format!("the answer to\n{request:.300}\n"), &answer);
        statuses.extend(answer.split(' ').nth(1).map(str::to_owned));
    }
    for path in [
        "/metrics",
        "/livez",
        "/readyz",
        "/status",
        "/status.json",
        "/explain?client=a&model=gpt-4.1-mini",
        &format!("/{CLIENT}"),
    ] {
        let answer = exchange(
            admin,
            &format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {CLIENT}\r\nconnection: close\r\n\r\n"),
        );
        assert_nothing_private(path, &answer);
        assert!(path != "/metrics" || answer.contains("client=\"a\""), "{answer}");
    }
    let said = weir.end();
    assert!(said.contains("DEBUG"), "it says all that it can:\n{said}");
    // The access log is among it.
    for outcome in ["ok", "client_error", "upstream_error", "refused", "failed"] {
        assert!(said.contains(&format!("\"outcome\":\"{outcome}\"")), "no request was {outcome}:\n{said}");
    }
    assert_nothing_private("the log", &said);
    statuses
}

#[test]
fn no_key_is_in_what_check_prints() {
    let nowhere = "127.0.0.1:1".parse().expect("an address");
    for form in [Form::Inline, Form::Environment, Form::File] {
        let Output { status, stdout, stderr } = weir()
            .arg("check")
            .arg("--config")
            .arg(form.config(nowhere, "text"))
            .output()
            .expect("the binary was built");
        assert!(status.success(), "{form:?}: {}", String::from_utf8_lossy(&stderr));
        let printed = String::from_utf8(stdout).expect("text");
        assert!(printed.contains("api_key = \"") && printed.contains("[clients.\"a\"]"), "{printed}");
        assert_no_key(&format!("{form:?}"), &printed);
    }
}

#[test]
fn no_key_is_in_a_complaint_about_a_configuration() {
    let missing = format!("file:{}", file("").with_extension("missing").display());
    let spaced = file(&format!("{UPSTREAM} {CLIENT}"));
    let wrong = [
        format!("[upstream]\napi_key = \"{UPSTREAM}"),
        format!("[upstream]\napi_key = {UPSTREAM}\n"),
        format!("[upstream]\napi_key = '{UPSTREAM}\n"),
        format!("[upstream]\napi_key: {UPSTREAM}\n"),
        format!("[upstream]\napi_key \"{UPSTREAM}\"\n"),
        format!("[upstream]\napi_key = \"{UPSTREAM}\" \"x\"\n"),
        format!("[upstream]\napi_key = [\"{UPSTREAM}\"]\n"),
        format!("[upstream]\napi_key = {{ value = \"{UPSTREAM}\" }}\n"),
        format!("[upstream]\napi_key = \"{UPSTREAM}\"\napi_key = \"{UPSTREAM}\"\n"),
        format!("[upstream]\napi_kye = \"{UPSTREAM}\"\n"),
        format!("[upstream]\napi_key = \"{UPSTREAM} x\"\n"),
        format!("[upstream]\napi_key = \"{UPSTREAM}\\u00e9\"\n"),
        format!("[upstream]\napi_key = \"{UPSTREAM}\\q\"\n"),
        format!("[upstream]\napi_key = \"file:{}\"\n", spaced.display()),
        format!("[upstream]\napi_key = {missing:?}\n"),
        "[upstream]\napi_key = \"env:WEIR_TEST_SPACED\"\n".to_owned(),
        format!("api_key = \"{UPSTREAM}\"\n"),
        format!("upstream = \"{UPSTREAM}\"\n"),
        format!("[upstream]\nbase_url = \"https://user:{UPSTREAM}@gateway.test/v1\"\n"),
        format!("[upstream]\nbase_url = \"https://{UPSTREAM}@gateway.test/v1?x\"\n"),
        format!("[upstream]\nbase_url = \"ftp://{UPSTREAM}@gateway.test\"\n"),
        format!("[clients.a]\nkey = \"{CLIENT}\"\n[clients.b]\nkey = \"{CLIENT}\"\n"),
        format!("[clients]\na = \"{CLIENT}\"\n"),
        format!("[clients.a]\nkeys = [\"{CLIENT}\"]\n"),
        format!("[clients.a]\nkey = \"{CLIENT}\"\nweight = \"{OTHER}\"\n"),
        format!("[server]\nadmin_token = \"{OTHER} x\"\n"),
        format!("[server]\nlisten = \"0.0.0.0:1\"\n[upstream]\napi_key = \"{UPSTREAM}\"\n"),
    ];
    for text in wrong {
        let config = file(&text);
        for command in ["check", "serve"] {
            let mut weir = weir();
            let weir = weir.env("WEIR_TEST_SPACED", format!("{UPSTREAM} x")).args([command, "--config"]).arg(&config);
            let Output { status, stdout, stderr } = weir.output().expect("the binary was built");
            assert_eq!(status.code(), Some(78), "{text}");
            assert_no_key(&text, &String::from_utf8_lossy(&[stdout, stderr].concat()));
        }
    }
}
