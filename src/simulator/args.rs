//! `weir simulate`: the simulated gateway from the command line.

use std::future::Future;
use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::str::FromStr;
use std::time::Duration;

use lexopt::Arg::{Long, Short};
use tokio::net::TcpListener;

use super::{Fault, Hints, QuotaPer, Settings, Simulator, Window};
use crate::config::units::{Rate, parse_duration};

/// What `weir simulate --help` says.
pub const HELP: &str = "\
weir simulate: an OpenAI-compatible gateway to try clients against

Usage: weir simulate [OPTIONS]

  --listen ADDRESS         where to listen [127.0.0.1:9999]; port 0 takes a free one
  --key KEY                ask for this API key; \"env:NAME\" reads it from the environment

Speed:
  --first-token DURATION   median time to the first token [300ms]
  --spread NUMBER          how far that spreads (log-normal), 0 to 3 [0.3]
  --per-token DURATION     time from one token to the next [10ms]
  --output FROM..TO        length of an answer in tokens [20..120]

Quota, for each API key and model:
  --requests RATE          requests, as in 60/min
  --requests-burst N       of these, how many at once [a tenth]
  --tokens RATE            tokens, as in 100000/min: prompt + max_tokens, charged on admission
  --tokens-burst N         of these, how many at once [a tenth]
  --concurrency N          requests in progress
  --window SHAPE           bucket: refills continuously [default]; fixed: all at once, each period
  --quota-per WHO          model: each key and model has its own [default]; key: a key's models share
  --hints KIND             openai: x-ratelimit-* and retry-after [default]; retry-after; http-date; none

Faults:
  --fault NAME=PROBABILITY may be given again; 0 to 1 each, and 1 at most together. Names:
                           429-retry-after-ms 429-retry-after 429-http-date 429-no-hint
                           insufficient-quota 500 503 529 reset-before-answer reset-in-answer
                           stall-before-answer stall-in-answer
                           error-event truncated-stream cut-event (streams only)
  --fault-hint DURATION    the wait that an injected 429 asks for [1s]
  --outage FROM..TO        answer 503 from then to then after the start, as in 10s..14s
  --keep-alive DURATION    close a connection that is silent for so long [75s]
  --seed N                 the same seed and order of requests fail alike [0]

  --help                   this text

GET /_stats shows what happened so far.
";

/// What the arguments ask for.
#[derive(Debug)]
pub enum Invocation {
    /// To print [`HELP`].
    Help,
    /// To serve.
    Serve(Box<Settings>, ListenOptions),
}

/// Where to listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenOptions {
    /// The address; port 0 is any free one.
    pub address: SocketAddr,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self { address: SocketAddr::from(([127, 0, 0, 1], 9999)) }
    }
}

/// Does what `weir simulate` does, until Ctrl-C. What it tells its user goes to `say`.
///
/// # Errors
/// Says why it can't listen, and what `say` returns.
pub async fn run(invocation: Invocation, say: impl Fn(&str) -> Result<(), String>) -> Result<(), String> {
    let (settings, listen) = match invocation {
        Invocation::Serve(settings, listen) => (settings, listen),
        Invocation::Help => return say(HELP),
    };
    let cannot = |error| format!("can't listen on {}: {error}; choose another with --listen", listen.address);
    let listener = TcpListener::bind(listen.address).await.map_err(cannot)?;
    let address = listener.local_addr().map_err(cannot)?;
    say(&welcome(address, settings.key.is_some()))?;
    serve_until(Simulator::new(*settings), listener, tokio::signal::ctrl_c()).await;
    Ok(())
}

async fn serve_until<T>(simulator: Simulator, listener: TcpListener, end: impl Future<Output = T>) {
    tokio::select! {
        () = simulator.serve(listener) => {}
        _ = end => {}
    }
}

const REVIEW: &str = r#"{"model":"gpt-4.1-mini","messages":[{"role":"user","content":"Great value, fast delivery!"}]}"#;

fn welcome(address: SocketAddr, asks_for_key: bool) -> String {
    let key = if asks_for_key { " -H 'authorization: Bearer YOUR_KEY'" } else { "" };
    format!(
        "weir simulate: an OpenAI-compatible gateway on http://{address}/v1 (Ctrl-C ends it). Try:\n\n  \
         curl http://{address}/v1/chat/completions{key} -H 'content-type: application/json' \
         -d '{REVIEW}'\n\n\
         What happened so far: curl http://{address}/_stats\n"
    )
}

impl Settings {
    /// Reads the arguments of `weir simulate`; what they leave out stays at its default. The parser stands behind the
    /// subcommand's name.
    ///
    /// # Errors
    /// Says which argument is wrong and what to write instead.
    pub fn from_args(parser: &mut lexopt::Parser) -> Result<Invocation, String> {
        let mut given = Given::default();
        while let Some(argument) = parser.next().map_err(unknown)? {
            let (name, take) = match argument {
                Long("help") | Short('h') => return Ok(Invocation::Help),
                Long(name) => taker(name).ok_or_else(|| unknown(Long(name).unexpected()))?,
                other => return Err(unknown(other.unexpected())),
            };
            let value = parser.value().map_err(unknown)?;
            let value = value.into_string().map_err(|value| format!("--{name}: {value:?} is not text"))?;
            take(&mut given, &value).map_err(|message| format!("--{name}: {message}"))?;
        }
        let listen = given.listen;
        Ok(Invocation::Serve(Box::new(given.settled()?), listen))
    }
}

/// The arguments so far: what a burst belongs to may still come.
#[derive(Default)]
struct Given {
    settings: Settings,
    listen: ListenOptions,
    requests_burst: Option<u32>,
    tokens_burst: Option<u32>,
}

type Taker = fn(&mut Given, &str) -> Result<(), String>;

/// Every option, and how its value is taken.
const TAKERS: [(&str, Taker); 19] = [
    ("listen", |given, text| whole(text, "an address, as in 127.0.0.1:9999").map(|it| given.listen.address = it)),
    ("key", |given, text| key(text).map(|it| given.settings.key = Some(it))),
    ("first-token", |given, text| parse_duration(text).map(|it| given.settings.first_token = it)),
    ("spread", |given, text| number(text, 3.0).map(|it| given.settings.spread = it)),
    ("per-token", |given, text| parse_duration(text).map(|it| given.settings.per_token = it)),
    ("output", |given, text| output(text).map(|it| given.settings.output_tokens = it)),
    ("requests", |given, text| Rate::parse(text).map(|it| given.settings.requests = Some(it))),
    ("requests-burst", |given, text| positive(text).map(|it| given.requests_burst = Some(it))),
    ("tokens", |given, text| Rate::parse(text).map(|it| given.settings.tokens = Some(it))),
    ("tokens-burst", |given, text| positive(text).map(|it| given.tokens_burst = Some(it))),
    ("concurrency", |given, text| positive(text).map(|it| given.settings.concurrency = Some(it as usize))),
    ("window", |given, text| one_of(text, &WINDOWS).map(|it| given.settings.window = it)),
    ("quota-per", |given, text| one_of(text, &SHARERS).map(|it| given.settings.quota_per = it)),
    ("hints", |given, text| one_of(text, &HINTS).map(|it| given.settings.hints = it)),
    ("fault", |given, text| fault(text).map(|it| given.settings.faults.push(it))),
    ("fault-hint", |given, text| parse_duration(text).map(|it| given.settings.fault_hint = it)),
    ("outage", |given, text| outage(text).map(|it| given.settings.outage = Some(it))),
    ("keep-alive", |given, text| parse_duration(text).map(|it| given.settings.keep_alive = it)),
    ("seed", |given, text| whole(text, "a whole number").map(|it| given.settings.seed = it)),
];

const WINDOWS: [(&str, Window); 2] = [("bucket", Window::Bucket), ("fixed", Window::FixedWindow)];
const SHARERS: [(&str, QuotaPer); 2] = [("model", QuotaPer::KeyAndModel), ("key", QuotaPer::Key)];
const HINTS: [(&str, Hints); 4] = [
    ("openai", Hints::OpenAiHeaders),
    ("retry-after", Hints::RetryAfterOnly),
    ("http-date", Hints::RetryAfterDate),
    ("none", Hints::None),
];

impl Given {
    fn settled(mut self) -> Result<Settings, String> {
        let sum: f64 = self.settings.faults.iter().map(|(_, probability)| probability).sum();
        if sum > 1.0 + 1e-9 {
            return Err(format!("--fault: the probabilities add up to {sum}; make them 1 at most together"));
        }
        self.settings.requests = with_burst("requests", self.settings.requests, self.requests_burst)?;
        self.settings.tokens = with_burst("tokens", self.settings.tokens, self.tokens_burst)?;
        Ok(self.settings)
    }
}

fn taker(name: &str) -> Option<(&'static str, Taker)> {
    TAKERS.into_iter().find(|(known, _)| *known == name)
}

fn with_burst(name: &str, rate: Option<Rate>, burst: Option<u32>) -> Result<Option<Rate>, String> {
    match (rate, burst) {
        (None, Some(_)) => Err(format!("--{name}-burst: there is no --{name} that it belongs to; add one")),
        (Some(rate), Some(burst)) => Ok(Some(rate.with_burst(burst))),
        (rate, None) => Ok(rate),
    }
}

fn unknown(error: lexopt::Error) -> String {
    format!("{error}; `weir simulate --help` shows what can be given")
}

fn whole<T: FromStr>(text: &str, what: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is not {what}"))
}

fn positive(text: &str) -> Result<u32, String> {
    const WHAT: &str = "a whole number from 1";
    let number = whole(text, WHAT)?;
    if number == 0 { Err(format!("\"0\" is not {WHAT}")) } else { Ok(number) }
}

fn number(text: &str, most: f64) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=most).contains(number));
    number.ok_or_else(|| format!("{text:?} is not a number from 0 to {most}"))
}

fn one_of<T: Copy>(text: &str, choices: &[(&str, T)]) -> Result<T, String> {
    let names = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let chosen = choices.iter().find(|(name, _)| *name == text).map(|(_, choice)| *choice);
    chosen.ok_or_else(|| format!("{text:?} is none of: {}", names()))
}

fn key(text: &str) -> Result<String, String> {
    let Some(name) = text.strip_prefix("env:") else { return Ok(text.to_owned()) };
    std::env::var(name).map_err(|error| format!("the environment's {name}: {error}; set it, or write the key itself"))
}

fn output(text: &str) -> Result<RangeInclusive<u32>, String> {
    let complaint = || format!("{text:?} is not a range of tokens; write FROM..TO, as in 20..120");
    let (from, to) = text.split_once("..").ok_or_else(complaint)?;
    let (from, to) = (positive(from).map_err(|_| complaint())?, positive(to).map_err(|_| complaint())?);
    if from <= to { Ok(from..=to) } else { Err(complaint()) }
}

fn outage(text: &str) -> Result<Range<Duration>, String> {
    let complaint = || format!("{text:?} is not a stretch of time; write FROM..TO, as in 10s..14s");
    let (from, to) = text.split_once("..").ok_or_else(complaint)?;
    let (from, to) = (parse_duration(from)?, parse_duration(to)?);
    if from < to { Ok(from..to) } else { Err(complaint()) }
}

fn fault(text: &str) -> Result<(Fault, f64), String> {
    let complaint = || format!("{text:?} is not a fault; write NAME=PROBABILITY, as in 503=0.05");
    let (name, probability) = text.split_once('=').ok_or_else(complaint)?;
    let names = || Fault::ALL.map(Fault::name).join(", ");
    let fault = Fault::named(name).ok_or_else(|| format!("{name:?} is none of: {}", names()))?;
    Ok((fault, number(probability, 1.0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &str) -> Result<Invocation, String> {
        Settings::from_args(&mut lexopt::Parser::from_args(arguments.split_whitespace()))
    }

    fn settings(arguments: &str) -> Settings {
        match read(arguments) {
            Ok(Invocation::Serve(settings, _)) => *settings,
            other => panic!("{arguments}: {other:?}"),
        }
    }

    #[test]
    fn every_option_is_taken_and_stands_in_the_help() {
        let settings = settings(
            "--listen 127.0.0.1:0 --key secret --first-token 1s --spread 0 --per-token 5ms --output 3..4 \
             --requests-burst 7 --requests 60/min --tokens 1000/min --tokens-burst 900 --concurrency 4 --window fixed \
             --quota-per key --hints retry-after --fault 503=0.25 --fault cut-event=0.5 --fault-hint 20ms \
             --outage 10s..14s --keep-alive 5s --seed 9",
        );
        assert_eq!(settings.requests.map(|rate| (rate.count, rate.burst)), Some((60, 7)));
        assert_eq!(settings.tokens.map(|rate| rate.burst), Some(900));
        assert_eq!(settings.faults, [(Fault::Unavailable, 0.25), (Fault::CutEvent, 0.5)]);
        assert_eq!(settings.outage, Some(Duration::from_secs(10)..Duration::from_secs(14)));
        assert_eq!((settings.window, settings.quota_per), (Window::FixedWindow, QuotaPer::Key));
        assert_eq!((settings.hints, settings.seed), (Hints::RetryAfterOnly, 9));
        for name in TAKERS.map(|(name, _)| name).into_iter().chain(Fault::ALL.map(Fault::name)) {
            assert!(HELP.contains(name), "{name}");
        }
    }

    #[test]
    fn a_wrong_argument_is_named_with_what_to_write_instead() {
        for (arguments, messages) in [
            ("--requests 60", ["--requests: ", "\"600/min\""]),
            ("--first-token fast", ["--first-token: ", "\"30s\""]),
            ("--output 9..3", ["--output: ", "20..120"]),
            ("--outage 4s", ["--outage: ", "10s..14s"]),
            ("--fault 418=0.5", ["--fault: ", "cut-event"]),
            ("--fault 503=2", ["--fault: ", "from 0 to 1"]),
            ("--fault 503=0.6 --fault 500=0.6", ["--fault: ", "1 at most"]),
            ("--hints loud", ["--hints: ", "retry-after"]),
            ("--concurrency 0", ["--concurrency: ", "from 1"]),
            ("--tokens-burst 5", ["--tokens-burst: ", "--tokens"]),
            ("--key env:WEIR_NO_SUCH_VARIABLE", ["--key: ", "WEIR_NO_SUCH_VARIABLE"]),
            ("--seed", ["--seed", "--help"]),
            ("--port 80", ["--port", "--help"]),
            ("please", ["please", "--help"]),
        ] {
            let message = read(arguments).expect_err(arguments);
            assert!(messages.iter().all(|part| message.contains(part)), "{arguments}: {message}");
        }
    }

    #[test]
    fn help_wins_over_what_follows() {
        assert!(matches!(read("--seed 1 --help --nonsense"), Ok(Invocation::Help)));
    }
}
