//! The command line: arguments, configuration, logging, and running until a signal.

use std::io::{self, ErrorKind, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Registry, fmt};
use weir::access_log::AccessLog;
use weir::config::{Complaints, Config, Log, LogFormat, LogLevel, OperatorsAccess};
use weir::explain::{self, Arguments, Invocation};
use weir::outlet::{Habits, Outlet, Stderr};
use weir::reload::Source;
use weir::run::Running;
use weir::server::Tls;
use weir::systemd::{self, Sockets};
use weir::{demo, simulator};

const HELP: &str = "\
weir: a rate-limiting reverse proxy in front of an AI gateway

USAGE
  weir [serve] [--config FILE]   serve; without a file, with the built-in defaults
  weir check [--config FILE]     say what is wrong with a configuration, or print it in full, secrets masked
  weir explain [OPTIONS]         ask a running weir what a client's next request would meet; see weir explain --help
  weir demo [--exit]             a simulated gateway, weir, and a batch through it: no key, no network
  weir simulate [OPTIONS]        the simulated gateway alone; see weir simulate --help
  weir --help | --version

A weir that serves reads its file anew at SIGHUP, or POST /reload on the operators' listener. At SIGTERM or SIGINT it takes
nobody new, and what has begun may end; a second one ends it at once.

Clients set their base URL to http://HOST:PORT/v1 (by default http://127.0.0.1:8080/v1), and change nothing else.

EXIT STATUS  0 ended as asked, 1 failed, 2 wrong arguments, 3 would be refused (explain), 78 wrong configuration
";

/// What the command line asks for.
enum Command {
    Serve(Option<PathBuf>),
    Check(Option<PathBuf>),
    Explain(lexopt::Parser),
    Demo { exit: bool },
    Simulate(lexopt::Parser),
    Print(String),
}

/// Wrong arguments (`EX_USAGE` has no agreed number on Linux; 2 is what shells use).
const USAGE: u8 = 2;

/// `EX_CONFIG` of sysexits.h.
const BAD_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let command = match parse(lexopt::Parser::from_env()) {
        Ok(command) => command,
        Err(error) => {
            complain(&format!("{error}; weir --help lists what there is"));
            return ExitCode::from(USAGE);
        }
    };
    match command {
        Command::Print(text) => finish(say(&text)),
        Command::Check(file) => check(file),
        Command::Serve(file) => match load(file.as_ref()) {
            // The sockets first: there are no other threads yet.
            Ok(config) => finish(Sockets::from_env().and_then(|sockets| run(serve(config, file, sockets)))),
            Err(exit) => exit,
        },
        Command::Explain(mut arguments) => explain(&mut arguments),
        Command::Demo { exit } => finish(run(demo::run(exit))),
        Command::Simulate(mut arguments) => match simulator::Settings::from_args(&mut arguments) {
            Ok(invocation) => finish(run(simulator::args::run(invocation, say))),
            Err(message) => {
                complain(&message);
                ExitCode::from(USAGE)
            }
        },
    }
}

fn parse(mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
    use lexopt::prelude::{Long, Short, Value};
    let mut word: Option<String> = None;
    let (mut file, mut exit) = (None, false);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            Short('V') | Long("version") => return Ok(Command::Print(format!("weir {}\n", env!("CARGO_PKG_VERSION")))),
            Value(value) if word.is_none() => match value.to_str() {
                Some("explain") => return Ok(Command::Explain(parser)),
                Some("simulate") => return Ok(Command::Simulate(parser)),
                Some(known @ ("serve" | "check" | "demo")) => word = Some(known.to_owned()),
                _ => return Err(format!("there is no command {}", value.to_string_lossy()).into()),
            },
            Short('c') | Long("config") if word.as_deref() != Some("demo") => file = Some(parser.value()?.into()),
            Long("exit") if word.as_deref() == Some("demo") => exit = true,
            other => return Err(other.unexpected()),
        }
    }
    Ok(match word.as_deref() {
        Some("check") => Command::Check(file),
        Some("demo") => Command::Demo { exit },
        _ => Command::Serve(file),
    })
}

fn load(file: Option<&PathBuf>) -> Result<Config, ExitCode> {
    let Some(path) = file else { return Ok(Config::default()) };
    Config::load(path).map_err(|complaints| cannot_use(path, &complaints))
}

/// Says what is wrong with a configuration's file.
fn cannot_use(path: &Path, complaints: &Complaints) -> ExitCode {
    let each: String = complaints.0.iter().map(|complaint| format!("\n  {complaint}")).collect();
    complain(&format!("{} cannot be used:{each}", path.display()));
    ExitCode::from(BAD_CONFIG)
}

fn check(file: Option<PathBuf>) -> ExitCode {
    let config = match load(file.as_ref()) {
        Ok(config) => config,
        Err(exit) => return exit,
    };
    if let Some(Err(message)) = config.server.tls.as_ref().map(Tls::load) {
        complain(&message);
        return ExitCode::from(BAD_CONFIG);
    }
    finish(say(&config.to_string()))
}

/// A request would be refused.
const REFUSED: u8 = 3;

fn explain(arguments: &mut lexopt::Parser) -> ExitCode {
    let arguments = match Arguments::parse(arguments) {
        Ok(Invocation::Ask(arguments)) => arguments,
        Ok(Invocation::Help) => return finish(say(explain::HELP)),
        Err(error) => {
            complain(&format!("{error}; weir explain --help lists what there is"));
            return ExitCode::from(USAGE);
        }
    };
    let file = arguments.config.as_deref();
    let access = match file.map(|file| OperatorsAccess::load(file).map_err(|complaints| cannot_use(file, &complaints)))
    {
        Some(Err(exit)) => return exit,
        Some(Ok(access)) => Some(access),
        None => None,
    };
    let mut refused = false;
    let asked = run(async {
        let told = explain::ask(&arguments, access.as_ref()).await?;
        refused = told.refused;
        say(&told.text)
    });
    match asked {
        Ok(()) if refused => ExitCode::from(REFUSED),
        asked => finish(asked),
    }
}

/// Runs on this thread; the workers have threads of their own.
fn run(work: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| format!("cannot start the runtime: {error}"))?.block_on(work)
}

/// Says it on stdout. A reader who leaves early (`weir check | head`) has what they wanted.
fn say(text: &str) -> Result<(), String> {
    let mut stdout = io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(format!("cannot write to stdout: {error}")),
        _ => Ok(()),
    }
}

/// Says on stderr what went wrong. Where nobody can be told, the exit status tells it.
fn complain(message: &str) {
    let _ = io::stderr().write_all(format!("weir: {message}\n").as_bytes());
}

fn finish(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            complain(&message);
            ExitCode::FAILURE
        }
    }
}

/// How long the last lines of each log may take to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Serves until a signal, then drains; a second signal ends it at once. SIGHUP reloads the configuration and opens the access
/// log anew; while it drains, only the latter. What is said goes to stderr.
async fn serve(config: Config, file: Option<PathBuf>, sockets: Sockets) -> Result<(), String> {
    let (log, level) = start_log(&config.log).map_err(|error| format!("cannot start the log: {error}"))?;
    let result = serve_until_told(config, file, sockets, level).await;
    log.flush(LAST_LINES);
    result
}

async fn serve_until_told(
    config: Config,
    file: Option<PathBuf>,
    sockets: Sockets,
    level: LevelHandle,
) -> Result<(), String> {
    if file.is_none() {
        tracing::info!("no --config given: the built-in defaults are in force; weir check prints them");
    }
    if config.limits.replicas > 1 {
        tracing::info!(
            replicas = config.limits.replicas,
            "this weir takes one share of every limit in its configuration"
        );
    }
    let upstream = config.upstream.base_url.to_string();
    let mut signals = Signals::new()?;
    let mut hangups = watch(SignalKind::hangup())?;
    let on_applied = move |config: &Config| {
        // It is there as long as the log is.
        let _ = level.reload(level_of(&config.log));
    };
    let running = Running::start_on(sockets, config, Source { file, on_applied: Some(Box::new(on_applied)) })?;
    for address in &running.addresses {
        tracing::info!(address = %address, admin = %running.admin_address, upstream, "listening");
    }
    systemd::notify("READY=1");
    let access_log = running.access_log().clone();
    tokio::select! {
        () = signals.next() => {}
        () = obey_hangups(&running, &mut hangups) => {}
    }
    systemd::notify("STOPPING=1");
    tokio::select! {
        () = running.stop() => {}
        () = signals.next() => {
            tracing::warn!("a second signal: ending at once");
            running.cut().await;
        }
        () = reopen_at_hangups(&access_log, &mut hangups) => {}
    }
    if !access_log.flush(LAST_LINES) {
        tracing::warn!("the access log's last lines could not be written in time");
    }
    Ok(())
}

/// Does what SIGHUP asks for, each time that it comes, until dropped. The access log does not wait for the configuration: its
/// file may have been renamed whatever becomes of that. One reload is for all who asked before it began.
async fn obey_hangups(running: &Running, hangups: &mut Signal) {
    let asked = Notify::new();
    let reloading = async {
        loop {
            asked.notified().await;
            // What became of it is in the log.
            let _ = running.reload_file().await;
        }
    };
    let hearing = async {
        while hangups.recv().await.is_some() {
            running.access_log().reopen();
            asked.notify_one();
        }
    };
    tokio::select! {
        () = hearing => {}
        () = reloading => {}
    }
}

fn watch(kind: SignalKind) -> Result<Signal, String> {
    signal(kind).map_err(|error| format!("cannot watch for signals: {error}"))
}

/// Opens the access log anew at each SIGHUP, until dropped.
async fn reopen_at_hangups(access_log: &AccessLog, hangups: &mut Signal) {
    while hangups.recv().await.is_some() {
        access_log.reopen();
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, String> {
        Ok(Self { terminate: watch(SignalKind::terminate())?, interrupt: watch(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// By which the log's level is changed.
type LevelHandle = tracing_subscriber::reload::Handle<LevelFilter, Registry>;

/// weir's own log. No thread that serves waits for stderr: what is said goes through an outlet.
fn start_log(settings: &Log) -> io::Result<(Outlet, LevelHandle)> {
    let (level, handle) = tracing_subscriber::reload::Layer::new(level_of(settings));
    let terminal = std::io::stderr().is_terminal();
    let habits = Habits { name: "weir's own log", gather: Duration::ZERO, lost: Box::new(|_| {}) };
    let outlet = Outlet::start(Box::new(Stderr), habits)?;
    let writer = outlet.clone();
    let log = tracing_subscriber::registry().with(level);
    let lines = fmt::layer()
        .with_writer(move || writer.clone())
        .with_target(false)
        // It would be said on stderr, which is what cannot be written to, and end the thread.
        .log_internal_errors(false);
    match settings.format {
        LogFormat::Json => log.with(lines.json().flatten_event(true)).init(),
        LogFormat::Auto if !terminal => log.with(lines.json().flatten_event(true)).init(),
        LogFormat::Auto | LogFormat::Text => log.with(lines.with_ansi(terminal)).init(),
    }
    Ok((outlet, handle))
}

fn level_of(settings: &Log) -> LevelFilter {
    match settings.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    }
}
