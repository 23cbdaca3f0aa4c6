//! `weir explain`: asks a running weir what a client's next request would meet, and says it in words.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::admin::query;
use crate::config::{Address, OperatorsAccess, Secret};

/// What `weir explain --help` says.
pub const HELP: &str = "\
weir explain: which limits a client's next request for a model meets, and how long it would wait

USAGE
  weir explain [OPTIONS]

OPTIONS
  --client NAME    a client of the configuration; without, one that is not known by name
  --model NAME     the model, as the client would ask for it
  --tokens N       what the request costs, prompt and answer together [the mean of the model's answers]
  --admin URL      the running weir's admin listener, http://HOST:PORT or unix:/PATH
                   [admin_listen of the configuration, else http://127.0.0.1:9090]
  --config FILE    the running weir's configuration, for its admin_listen and admin_token
  --json           the answer as it came

The admin token, where there is one, is read from the environment variable WEIR_ADMIN_TOKEN, or from the configuration.

EXIT STATUS  0 the request would pass or wait, 3 it would be refused, 1 no answer, 2 wrong arguments, 78 wrong configuration
";

/// The environment variable with the token.
const TOKEN_VARIABLE: &str = "WEIR_ADMIN_TOKEN";

/// Where `weir serve` listens for operators when nothing else is said.
const DEFAULT_ADMIN: &str = "http://127.0.0.1:9090";

/// Longer than this no answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// An answer is a few kilobytes.
const LONGEST_ANSWER: usize = 4 << 20;

/// What the arguments say.
#[derive(Debug, Default)]
pub struct Arguments {
    pub client: Option<String>,
    pub model: Option<String>,
    pub tokens: Option<u64>,
    pub admin: Option<Admin>,
    pub config: Option<PathBuf>,
    pub json: bool,
}

/// What is asked for.
pub enum Invocation {
    Help,
    Ask(Arguments),
}

/// What there is to print.
#[derive(Debug)]
pub struct Told {
    pub text: String,
    /// The request would be refused.
    pub refused: bool,
}

/// The listener to ask.
#[derive(Debug)]
pub struct Admin {
    /// As it was written.
    url: String,
    place: Place,
}

/// Where the listener is.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl Arguments {
    /// Reads what follows `explain`.
    ///
    /// # Errors
    /// An argument that is unknown, or has no value, or a wrong one.
    pub fn parse(parser: &mut lexopt::Parser) -> Result<Invocation, lexopt::Error> {
        use lexopt::prelude::{Long, Short, ValueExt as _};
        let mut arguments = Self::default();
        while let Some(argument) = parser.next()? {
            match argument {
                Short('h') | Long("help") => return Ok(Invocation::Help),
                Long("client") => arguments.client = Some(parser.value()?.string()?),
                Long("model") => arguments.model = Some(parser.value()?.string()?),
                Long("tokens") => arguments.tokens = Some(parser.value()?.parse()?),
                Long("admin") => arguments.admin = Some(Admin::parse(&parser.value()?.string()?)?),
                Short('c') | Long("config") => arguments.config = Some(parser.value()?.into()),
                Long("json") => arguments.json = true,
                other => return Err(other.unexpected()),
            }
        }
        Ok(Invocation::Ask(arguments))
    }

    fn path_and_query(&self) -> String {
        let tokens = self.tokens.map(|tokens| tokens.to_string());
        let pairs = [("client", &self.client), ("model", &self.model), ("tokens", &tokens)];
        let given =
            pairs.iter().filter_map(|(name, value)| Some(format!("{name}={}", query::encode(value.as_deref()?))));
        format!("/explain?{}", given.collect::<Vec<_>>().join("&"))
    }
}

/// Asks, and puts the answer into words. `access` is what the file says that was given.
///
/// # Errors
/// That weir is not there, wants a token, or does not know the client; with what to do about it.
pub async fn ask(arguments: &Arguments, access: Option<&OperatorsAccess>) -> Result<Told, String> {
    let url_of_config = || access.map_or_else(|| DEFAULT_ADMIN.to_owned(), |access| url_of(&access.listen));
    let by_config;
    let Admin { url: admin, place } = match &arguments.admin {
        Some(given) => given,
        None => {
            by_config = Admin::parse(&url_of_config())?;
            &by_config
        }
    };
    let (token, from) = match std::env::var(TOKEN_VARIABLE).ok().filter(|token| !token.is_empty()) {
        Some(token) => {
            let token = Secret::resolve(&token, &|_| None).map_err(|error| format!("{TOKEN_VARIABLE}: {error}"))?;
            (Some(token), TOKEN_VARIABLE)
        }
        None => (access.and_then(|access| access.token.clone()), "--config"),
    };
    let path = arguments.path_and_query();
    let fetched = tokio::time::timeout(PATIENCE, fetch(admin, place, &path, token.as_ref())).await;
    let (status, body) = fetched.map_err(|_| format!("{admin} does not answer within {} s", PATIENCE.as_secs()))??;
    let parsed: Option<Value> = serde_json::from_slice(&body).ok();
    match (status, parsed) {
        (StatusCode::OK, Some(answer)) if answer["next"].is_string() => Ok(Told {
            text: if arguments.json { format!("{answer:#}\n") } else { in_words(&answer) },
            refused: answer["next"] == "is refused",
        }),
        (StatusCode::UNAUTHORIZED, _) if token.is_some() => Err(format!(
            "{admin} does not take the admin token of {from}: it is the one of the configuration in force, since the last start \
             or reload; {TOKEN_VARIABLE} comes before --config"
        )),
        (StatusCode::UNAUTHORIZED, _) => Err(format!(
            "{admin} asks for the admin token: set {TOKEN_VARIABLE}, or give --config with server.admin_token in it"
        )),
        (StatusCode::FORBIDDEN, _) => {
            Err(format!("{admin} refuses to answer: {}", printable(String::from_utf8_lossy(&body).trim())))
        }
        (StatusCode::NOT_FOUND, Some(answer)) if answer["error"].is_string() => Err(unknown_client(&answer)),
        (status, _) => Err(format!(
            "{admin} answers {status}, and not as weir's admin listener does; is it server.admin_listen, not server.listen?"
        )),
    }
}

async fn fetch(
    admin: &str,
    place: &Place,
    path: &str,
    token: Option<&Secret>,
) -> Result<(StatusCode, Vec<u8>), String> {
    let not_there = |error: std::io::Error| {
        format!(
            "no weir answers at {admin} ({error}); is it running? --admin URL says where its admin listener is, and --config \
             FILE reads it from the configuration"
        )
    };
    match place {
        Place::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(not_there)?;
            let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
            get(stream, &format!("{host}:{port}"), path, token).await
        }
        Place::Unix(socket) => {
            let stream = UnixStream::connect(socket).await.map_err(not_there)?;
            get(stream, "localhost", path, token).await
        }
    }
    .map_err(|error| format!("{admin} does not answer as weir does: {error}"))
}

async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    host: &str,
    path: &str,
    token: Option<&Secret>,
) -> Result<(StatusCode, Vec<u8>), Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::get(path).header(header::HOST, host).header(header::CONNECTION, "close");
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
    }
    let request = request.body(Empty::<bytes::Bytes>::new())?;
    let exchange = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, LONGEST_ANSWER).collect().await?;
        Ok((head.status, body.to_bytes().to_vec()))
    };
    tokio::pin!(exchange);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        ended = connection => {
            ended?;
            // All of the answer is there.
            exchange.await
        }
    }
}

impl Admin {
    fn parse(url: &str) -> Result<Self, String> {
        Ok(Self { url: url.to_owned(), place: Place::parse(url)? })
    }
}

impl Place {
    fn parse(url: &str) -> Result<Self, String> {
        let wrong = || {
            let why = if url.starts_with("https:") { ", which speaks plain HTTP" } else { "" };
            format!("--admin: {url:?} is not where an admin listener can be{why}; write http://HOST:PORT or unix:/PATH")
        };
        if let Some(path) = url.strip_prefix("unix:") {
            return if path.is_empty() { Err(wrong()) } else { Ok(Self::Unix(path.into())) };
        }
        let authority = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || host.contains(['/', '@', '?', ' ']) {
            Err(wrong())
        } else {
            Ok(Self::Tcp { host: host.to_owned(), port })
        }
    }
}

/// Where a listener can be reached from its own machine.
fn url_of(listen: &Address) -> String {
    let Some(address) = listen.tcp() else { return listen.to_string() };
    let host: IpAddr = match address.ip() {
        any if !any.is_unspecified() => any,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    format!("http://{}", SocketAddr::new(host, address.port()))
}

fn unknown_client(answer: &Value) -> String {
    let clients: Vec<&str> = answer["clients"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let error = printable(answer["error"].as_str().unwrap_or_default());
    match clients.as_slice() {
        [] => format!("{error}: it has no [clients]; leave --client out"),
        names => format!("{error}; there are: {}", printable(&names.join(", "))),
    }
}

/// The answer as a person reads it.
fn in_words(answer: &Value) -> String {
    let mut text = String::new();
    write_all(&mut text, answer).expect("a String takes everything");
    printable(&text)
}

/// Names may be anything that a client has sent: a terminal is not to obey them.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn write_all(text: &mut String, answer: &Value) -> std::fmt::Result {
    let string = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (client, model) = (&answer["client"], &answer["model"]);
    let who = match string(&client["name"]).as_str() {
        "-" => "a client without a name".to_owned(),
        name => format!("client {name}"),
    };
    let asked = model["asked"].as_str().unwrap_or("no model");
    writeln!(
        text,
        "{who}, {asked}, a request of {} tokens ({})",
        number(&answer["tokens"]),
        string(&answer["tokens_from"])
    )?;
    if let Some(note) = model["note"].as_str() {
        writeln!(text, "  note: {note}")?;
    }
    if answer["state"] == "draining" {
        writeln!(text, "  note: this weir is about to stop, and takes nobody new once server.lame_duck is over")?;
    }
    let (expected, allowed) = (duration(&answer["expected_wait_seconds"]), duration(&answer["max_wait_seconds"]));
    let next = match answer["next"].as_str().unwrap_or_default() {
        "passes" => "passes at once".to_owned(),
        "waits" => format!("waits about {expected}, of {allowed} allowed"),
        _ if answer["held_by"].is_null() => "is refused".to_owned(),
        _ => format!("is refused (expected wait {expected}, allowed {allowed})"),
    };
    writeln!(text, "\nThe next request {next}.\n  {}", string(&answer["why"]))?;
    if let Some(whose) = answer["held_by"]["whose"].as_str() {
        let whose = if whose == "gateway" { "the gateway's, not weir's configuration" } else { "weir's configuration" };
        writeln!(text, "  that limit is {whose}")?;
    }
    writeln!(text, "\nLimits on its way")?;
    write_limits(text, &answer["limits"], "  ", "none")?;
    let queue = &answer["queue"];
    writeln!(
        text,
        "\nQueue\n  {} of {} places taken, {} of them for this model\n  of this client: {} waiting, {} under way; weight {}, {} of \
         what passes while others wait with it",
        number(&queue["waiting"]),
        number(&queue["waiting_limit"]),
        number(&queue["waiting_for_model"]),
        number(&client["waiting"]),
        number(&client["in_flight"]),
        number(&client["weight"]),
        percent(&queue["share"]),
    )?;
    write_lanes(text, answer)
}

fn write_limits(text: &mut String, limits: &Value, indent: &str, none: &str) -> std::fmt::Result {
    let limits = limits.as_array().map(Vec::as_slice).unwrap_or_default();
    if limits.is_empty() {
        return writeln!(text, "{indent}{none}");
    }
    for limit in limits {
        let level = match (limit["used"].as_f64(), limit["capacity"].as_f64()) {
            (Some(_), Some(_)) => format!("{} of {} used", number(&limit["used"]), number(&limit["capacity"])),
            _ => "level not known".to_owned(),
        };
        let refill = match limit["refill_per_second"].as_f64() {
            Some(rate) if rate >= 1.0 => format!(", refills {rate:.1} a second"),
            Some(rate) if rate * 60.0 >= 1.0 => format!(", refills {:.1} a minute", rate * 60.0),
            Some(rate) => format!(", refills {:.1} an hour", rate * 3600.0),
            None => String::new(),
        };
        let waiting = limit["waiting"].as_u64().filter(|waiting| *waiting > 0);
        let waiting = waiting.map_or_else(String::new, |waiting| format!(", {waiting} waiting"));
        let observed = if limit["mode"] == "observe" { " (observed only)" } else { "" };
        let words = limit["text"].as_str().unwrap_or_default();
        let unit = limit["unit"].as_str().unwrap_or_default();
        writeln!(text, "{indent}{unit:<11} {words}{observed}: {level}{refill}{waiting}")?;
    }
    Ok(())
}

fn write_lanes(text: &mut String, answer: &Value) -> std::fmt::Result {
    let lanes = answer["lanes"].as_array().map(Vec::as_slice).unwrap_or_default();
    if lanes.is_empty() {
        return writeln!(text, "\nGateway\n  nothing was sent for this model lately; what it takes is not known yet");
    }
    let several = lanes.len() > 1;
    writeln!(text, "\nGateway{}", if several { ", one lane for each upstream key" } else { "" })?;
    for (place, lane) in lanes.iter().enumerate() {
        let own = match (several, lane["own"] == true) {
            (true, true) => " (this client's)",
            _ => "",
        };
        writeln!(
            text,
            "  lane {}{own}: {} under way, {} waiting",
            place + 1,
            number(&lane["in_flight"]),
            number(&lane["waiting"])
        )?;
        if let Some(reason) = lane["cool_down"]["text"].as_str() {
            writeln!(text, "    closed: {reason}")?;
        }
        if lane["breaker"]["open"] == true {
            let failing = duration(&lane["breaker"]["failing_for_seconds"]);
            let gives_up = duration(&lane["breaker"]["gives_up_in_seconds"]);
            writeln!(text, "    breaker open: the gateway has failed for {failing}; all are refused in {gives_up}")?;
        }
        write_limits(text, &lane["limits"], "    ", "no limit was learned")?;
    }
    match answer["lanes_not_listed"].as_u64() {
        Some(more @ 1..) => writeln!(text, "  and {more} more lanes"),
        _ => Ok(()),
    }
}

fn number(value: &Value) -> String {
    match (value.as_u64(), value.as_f64()) {
        (Some(whole), _) => whole.to_string(),
        (None, Some(number)) if number.fract() == 0.0 => format!("{number:.0}"),
        (None, Some(number)) => format!("{number:.1}"),
        (None, None) => "?".to_owned(),
    }
}

fn percent(value: &Value) -> String {
    value.as_f64().map_or_else(|| "?".to_owned(), |part| format!("{:.0} %", part * 100.0))
}

fn duration(value: &Value) -> String {
    match value.as_f64() {
        None => "an unknown time".to_owned(),
        Some(seconds) if seconds < 10.0 => format!("{seconds:.1} s"),
        Some(seconds) if seconds < 120.0 => format!("{seconds:.0} s"),
        Some(seconds) => format!("{:.0} min", seconds / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, lexopt::Error> {
        Arguments::parse(&mut lexopt::Parser::from_args(line.split_whitespace()))
    }

    #[test]
    fn arguments_become_a_question() {
        let Ok(Invocation::Ask(arguments)) =
            parse("--client a&b --model gpt-4.1/x --tokens 7 --admin http://h:1 --json")
        else {
            panic!("they are right");
        };
        assert_eq!(arguments.path_and_query(), "/explain?client=a%26b&model=gpt-4.1%2Fx&tokens=7");
        assert!(arguments.json && arguments.admin.is_some_and(|admin| admin.url == "http://h:1"));
        for wrong in ["--tokens many", "--client", "--port 1", "gpt-4.1", "--admin nowhere", "--admin unix:"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(matches!(parse("--client a --help"), Ok(Invocation::Help)));
    }

    #[test]
    fn a_listener_is_asked_where_it_can_be_reached() {
        for (listen, url) in [
            ("127.0.0.1:9090", "http://127.0.0.1:9090"),
            ("0.0.0.0:9090", "http://127.0.0.1:9090"),
            ("[::]:1", "http://[::1]:1"),
            ("10.1.2.3:80", "http://10.1.2.3:80"),
        ] {
            assert_eq!(url_of(&Address::parse(listen).expect("an address")), url);
        }
        let tcp = |host: &str, port| Place::Tcp { host: host.to_owned(), port };
        assert_eq!(Place::parse("http://localhost:9090/"), Ok(tcp("localhost", 9090)));
        assert_eq!(Place::parse("[::1]:9"), Ok(tcp("::1", 9)));
        assert_eq!(Place::parse("unix:/run/weir.sock"), Ok(Place::Unix("/run/weir.sock".into())));
        for wrong in ["http://localhost", "ftp://x:1x", "http://:9", "http://a/b:9", "http://user@h:9", "unix:"] {
            assert!(Place::parse(wrong).is_err(), "{wrong}");
        }
        assert!(Place::parse("https://h:9").is_err_and(|message| message.contains("plain HTTP")));
    }

    #[test]
    fn a_name_with_an_escape_sequence_is_not_obeyed() {
        let told = in_words(&serde_json::json!({ "model": { "asked": "m\u{1b}[2J" }, "next": "passes" }));
        assert!(told.contains("m\u{fffd}[2J") && !told.contains('\u{1b}'), "{told:?}");
    }
}
