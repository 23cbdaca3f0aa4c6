//! `weir explain` against a running weir, and the token of the admin listener.

use super::*;

/// Answers at once.
const QUICK: [&str; 8] = ["--first-token", "5ms", "--spread", "0", "--per-token", "1ms", "--output", "2..3"];

/// `weir explain` with these arguments: its exit status, and what it says.
fn explain(arguments: &[&str], token: Option<&str>) -> (Option<i32>, String) {
    let mut command = weir();
    command.arg("explain").args(arguments).env_remove("WEIR_ADMIN_TOKEN");
    if let Some(token) = token {
        command.env("WEIR_ADMIN_TOKEN", token);
    }
    let Output { status, stdout, stderr } = command.output().expect("the binary was built");
    (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

#[test]
fn explain_says_in_words_what_the_next_request_meets() {
    let gateway = Gateway::start(&QUICK);
    let tables = "[queue]\nmax_wait = \"10s\"\n[models.\"gpt-4.1-mini\"]\nrequests = { rate = \"1/min\", burst = 1 }\n\
                  [clients.bot]\nkey = \"sk-own-bot\"\ntokens = { rate = \"30/h\", burst = 100000 }\n";
    let weir = Weir::start(&gateway, tables);
    let admin = format!("http://{}", weir.admin);
    let question = ["--admin", &admin, "--client", "bot", "--model", "gpt-4.1-mini"];
    let (status, before) = explain(&question, None);
    assert_eq!(status, Some(0), "{before}");
    for part in [
        "client bot, gpt-4.1-mini",
        "passes at once",
        "1/min requests for model gpt-4.1-mini: 0 of 1 used",
        "30/h tokens for client bot: 0 of 100000 used, refills 30.0 an hour",
        "Queue",
    ] {
        assert!(before.contains(part), "{part} is not in:\n{before}");
    }
    let mut client = TcpStream::connect(weir.address).expect("it listens");
    let key = "Authorization: Bearer sk-own-bot\r\nConnection: close\r\n";
    write!(
        client,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{key}Content-Length: {}\r\n\r\n{CHAT}",
        CHAT.len()
    )
    .expect("it reads");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let (status, after) = explain(&question, None);
    assert_eq!(status, Some(3), "{after}");
    assert!(
        after.contains("is refused") && after.contains("the limit of 1/min requests for model gpt-4.1-mini"),
        "{after}"
    );
    assert!(after.contains("lane 1: 0 under way") && !after.contains("sk-own"), "{after}");
    let (status, json) = explain(&[&question[..], &["--json"]].concat(), None);
    assert!(status == Some(3) && json.starts_with('{') && json.contains("\"expected_wait_seconds\""), "{json}");
    let (status, unknown) = explain(&["--admin", &admin, "--client", "nobody"], None);
    assert!(status == Some(1) && unknown.contains("\"nobody\"") && unknown.contains("there are: bot"), "{unknown}");
    let (status, other) = explain(&["--admin", &admin, "--client", "bot", "--model", "strange"], None);
    assert!(status == Some(0) && other.contains("count as \"other\""), "{other}");
}

#[test]
fn explain_reads_listener_and_token_from_the_configuration() {
    let gateway = Gateway::start(&QUICK);
    let weir = Weir::start(&gateway, "");
    // The rest of it is not for this shell, which has none of weir's keys.
    let guarded = config_file(&format!(
        "[server]\nadmin_listen = \"{}\"\nadmin_token = \"tok-1\"\n[upstream]\napi_key = \"env:WEIR_TEST_NO_SUCH_KEY\"\n\
         [clients.bot]\nkey = \"file:/nothing/is/here\"\n",
        weir.admin
    ));
    let guarded = guarded.to_str().expect("a path");
    // This weir has no token, and does not mind one.
    let (status, told) = explain(&["--config", guarded, "--model", "m"], None);
    assert_eq!(status, Some(0), "{told}");
    for (wrong, why) in [
        ("[server]\nadmin_token = \"env:WEIR_TEST_NO_SUCH_TOKEN\"\n", "line 2: server.admin_token: "),
        ("[server]\nadmin_listen = 9090\n", "line 2: server.admin_listen: "),
        ("server = 1\n", "line 1: server: "),
        ("[server\n", "line 1: this is not TOML"),
    ] {
        let (status, told) = explain(&["--config", config_file(wrong).to_str().expect("a path")], None);
        assert!(status == Some(78) && told.contains(why), "{wrong}: {told}");
    }
}

#[test]
fn explain_needs_the_token_where_there_is_one_and_never_says_it() {
    let config = config_file(
        "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\nadmin_token = \"env:WEIR_TEST_TOKEN\"\n\
         [log]\nformat = \"text\"\n",
    );
    let program = Program::start(weir().args(["serve", "--config"]).arg(&config).env("WEIR_TEST_TOKEN", "tok-secret"));
    let line = program.says("listening");
    let admin = line.split("admin=").nth(1).and_then(|rest| rest.split(' ').next()).expect("an address").to_owned();
    let question = ["--admin", &admin, "--model", "m"];
    for (token, code) in [(None, 1), (Some(""), 1), (Some("tok-wrong"), 1), (Some("tok-secret"), 0)] {
        let (status, told) = explain(&question, token);
        assert_eq!(status, Some(code), "{token:?}: {told}");
        let why = if token == Some("tok-wrong") {
            "does not take the admin token of WEIR_ADMIN_TOKEN"
        } else {
            "set WEIR_ADMIN_TOKEN"
        };
        assert!(code == 0 || told.contains(why), "{told}");
        assert!(!told.contains("tok-"), "{told}");
    }
}

#[test]
fn explain_without_a_weir_says_where_it_looked() {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let (status, told) = explain(&["--admin", &format!("http://{free}")], None);
    assert!(status == Some(1) && told.contains(&free.to_string()) && told.contains("--admin"), "{told}");
    let (status, told) = explain(&["--admin", "nowhere"], None);
    assert!(status == Some(2) && told.contains("http://HOST:PORT"), "{told}");
    let (status, told) = explain(&["--nonsense"], None);
    assert!(status == Some(2) && told.contains("weir explain --help"), "{told}");
    assert!(explain(&["--help"], None).1.contains("EXIT STATUS"));
}

#[test]
fn an_admin_listener_open_to_others_without_a_token_is_warned_of() {
    for (token, warned) in [("", true), ("admin_token = \"tok\"\n", false)] {
        let server = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"0.0.0.0:0\"\n{token}[log]\nformat = \"text\"\n"
        );
        let program = Program::start(weir().args(["serve", "--config"]).arg(config_file(&server)));
        let line = program.says(if warned { "server.admin_token" } else { "listening" });
        assert_eq!(line.contains("WARN"), warned, "{line}");
    }
}
