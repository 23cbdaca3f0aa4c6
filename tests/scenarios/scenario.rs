//! One run's parameters, and their spelling in one line: what a failing run prints, a replay reads.

use std::fmt;
use std::str::FromStr;

/// Nanoseconds, of time that passes or since the start.
pub type Nanos = u64;

pub const MILLI: Nanos = 1_000_000;
pub const SECOND: Nanos = 1_000_000_000;

#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    pub seed: u64,
    pub requests: u32,
    pub arrivals: Arrivals,
    pub models: u32,
    pub keys: u32,
    pub max_wait: Nanos,
    pub told: Told,
    pub requests_quota: Option<Shape>,
    pub tokens_quota: Option<Shape>,
    pub cap: Option<u32>,
    /// Each model of a key has a quota of its own; else a key's models share one.
    pub per_model: bool,
    pub hints: Hints,
    /// The headers state the quota as of the moment of the answer, not of admission.
    pub standing_at_answer: bool,
    pub charge: Charge,
    /// What weir takes a request to cost, as a multiple of what it costs.
    pub estimate: f64,
    pub outage: Option<Outage>,
    pub faults: Faults,
    pub changes: Vec<Change>,
    /// Requests a second of others, which use up the same quota.
    pub others: f64,
    /// The least and the longest time from weir to the gateway, or back.
    pub network: (Nanos, Nanos),
    /// Median time to an answer's head, or a stream's first token.
    pub answer: Nanos,
    /// The standard deviation of that time's logarithm.
    pub spread: f64,
    /// Median time from a stream's first token to its last; 0 for answers that are not streamed.
    pub body: Nanos,
    /// How long weir waits for an answer.
    pub timeout: Nanos,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            seed: 0,
            requests: 300,
            arrivals: Arrivals::AtOnce,
            models: 1,
            keys: 1,
            max_wait: 300 * SECOND,
            told: Told::default(),
            requests_quota: None,
            tokens_quota: None,
            cap: None,
            per_model: true,
            hints: Hints::None,
            standing_at_answer: false,
            charge: Charge::Used,
            estimate: 1.0,
            outage: None,
            faults: Faults::default(),
            changes: Vec::new(),
            others: 0.0,
            network: (MILLI, 20 * MILLI),
            answer: 300 * MILLI,
            spread: 0.3,
            body: 0,
            timeout: 120 * SECOND,
        }
    }
}

/// When the requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrivals {
    AtOnce,
    /// One every so often.
    Every(Nanos),
    /// With that mean time between two.
    Poisson(Nanos),
}

/// What weir's configuration says of the gateway.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Told {
    pub requests: Option<Shape>,
    pub tokens: Option<Shape>,
    pub slots: Option<u32>,
}

/// A quota: `count` in each `period`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    pub count: u64,
    pub period: Nanos,
    pub window: Window,
}

/// How a quota comes back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Window {
    /// Continuously, up to the burst.
    Bucket { burst: u64 },
    /// All at once; the first window ends a `phase` early.
    Fixed { phase: Nanos },
    /// Each unit a period after it was taken.
    Sliding,
}

impl Shape {
    pub fn bucket(count: u64, period: Nanos, burst: u64) -> Self {
        Self { count, period, window: Window::Bucket { burst } }
    }

    pub fn fixed(count: u64, period: Nanos, phase: Nanos) -> Self {
        Self { count, period, window: Window::Fixed { phase } }
    }

    pub fn sliding(count: u64, period: Nanos) -> Self {
        Self { count, period, window: Window::Sliding }
    }

    /// The most that is ever let through at once.
    pub fn burst(&self) -> u64 {
        match self.window {
            Window::Bucket { burst } => burst,
            Window::Fixed { .. } | Window::Sliding => self.count,
        }
    }

    /// The most that may pass in any window this long.
    pub fn most_in(&self, window: Nanos) -> u64 {
        match self.window {
            Window::Bucket { burst } => burst + 1 + self.count * window / self.period,
            Window::Fixed { .. } => self.count * (window / self.period + 2),
            Window::Sliding => self.count * (window / self.period + 1),
        }
    }
}

/// What the gateway tells of its quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hints {
    /// `x-ratelimit-*` on every answer, and `retry-after-ms` on refusals.
    OpenAi,
    /// `x-ratelimit-*` on every answer, and nothing else.
    Standing,
    /// `retry-after` on refusals, in whole seconds.
    RetryAfter,
    None,
}

/// What a request costs of the gateway's quota of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Charge {
    /// Its prompt and its output.
    Used,
    /// Its prompt and the most that its output may be.
    Asked,
}

/// A time in which the gateway serves nobody.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outage {
    pub from: Nanos,
    pub to: Nanos,
    pub manner: Manner,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Manner {
    /// 503, perhaps with a hint.
    Error(Option<Nanos>),
    RefusesConnections,
    /// It takes requests and does not answer.
    Hangs,
}

/// The probabilities of faults, of requests that the quota has let through.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Faults {
    pub error: f64,
    pub reset: f64,
    pub error_first: f64,
}

impl Faults {
    /// No request is struck more often: one that fails each of its tries by chance says nothing about weir.
    pub const MOST_PER_REQUEST: u8 = 3;
}

/// From then on the gateway is another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    pub at: Nanos,
    pub to: NewLimit,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NewLimit {
    Cap(u32),
    /// The quota's count.
    Requests(u64),
}

impl fmt::Display for Scenario {
    /// Only what differs from the default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.words();
        let usual = Self::default().words();
        let own = words.iter().zip(&usual).filter(|(word, usual)| word != usual);
        let words: Vec<String> = own.map(|((key, value), _)| format!("{key}={value}")).collect();
        f.write_str(&words.join(" "))
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut scenario = Self::default();
        for word in line.split_whitespace() {
            let read = word.split_once('=').and_then(|(key, value)| scenario.set(key, value));
            read.ok_or_else(|| format!("{word:?} is no part of a scenario"))?;
        }
        Ok(scenario)
    }
}

impl Scenario {
    fn words(&self) -> Vec<(&'static str, String)> {
        let pair = |(least, most)| format!("{}..{}", seconds(least), seconds(most));
        vec![
            ("requests", self.requests.to_string()),
            ("arrivals", self.arrivals.to_string()),
            ("models", self.models.to_string()),
            ("keys", self.keys.to_string()),
            ("max_wait", seconds(self.max_wait)),
            ("told_requests", optional(self.told.requests)),
            ("told_tokens", optional(self.told.tokens)),
            ("told_slots", optional(self.told.slots)),
            ("quota", optional(self.requests_quota)),
            ("tokens", optional(self.tokens_quota)),
            ("cap", optional(self.cap)),
            ("per_model", self.per_model.to_string()),
            ("hints", name_of(&HINTS, &self.hints)),
            ("standing_at_answer", self.standing_at_answer.to_string()),
            ("charge", name_of(&CHARGES, &self.charge)),
            ("estimate", self.estimate.to_string()),
            ("outage", optional(self.outage)),
            ("faults", format!("{},{},{}", self.faults.error, self.faults.reset, self.faults.error_first)),
            ("changes", self.changes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
            ("others", self.others.to_string()),
            ("network", pair(self.network)),
            ("answer", seconds(self.answer)),
            ("spread", self.spread.to_string()),
            ("body", seconds(self.body)),
            ("timeout", seconds(self.timeout)),
            ("seed", self.seed.to_string()),
        ]
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "requests" => self.requests = value.parse().ok()?,
            "arrivals" => self.arrivals = arrivals(value)?,
            "models" => self.models = value.parse().ok()?,
            "keys" => self.keys = value.parse().ok()?,
            "max_wait" => self.max_wait = nanos(value)?,
            "told_requests" => self.told.requests = Some(shape(value)?),
            "told_tokens" => self.told.tokens = Some(shape(value)?),
            "told_slots" => self.told.slots = Some(value.parse().ok()?),
            "quota" => self.requests_quota = Some(shape(value)?),
            "tokens" => self.tokens_quota = Some(shape(value)?),
            "cap" => self.cap = Some(value.parse().ok()?),
            "per_model" => self.per_model = value.parse().ok()?,
            "hints" => self.hints = of_name(&HINTS, value)?,
            "standing_at_answer" => self.standing_at_answer = value.parse().ok()?,
            "charge" => self.charge = of_name(&CHARGES, value)?,
            "estimate" => self.estimate = value.parse().ok()?,
            "outage" => self.outage = Some(outage(value)?),
            "faults" => self.faults = faults(value)?,
            "changes" => self.changes = value.split(',').map(change).collect::<Option<_>>()?,
            "others" => self.others = value.parse().ok()?,
            "network" => self.network = range(value)?,
            "answer" => self.answer = nanos(value)?,
            "spread" => self.spread = value.parse().ok()?,
            "body" => self.body = nanos(value)?,
            "timeout" => self.timeout = nanos(value)?,
            "seed" => self.seed = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }
}

const HINTS: [(&str, Hints); 4] = [
    ("openai", Hints::OpenAi),
    ("standing", Hints::Standing),
    ("retry-after", Hints::RetryAfter),
    ("none", Hints::None),
];

const CHARGES: [(&str, Charge); 2] = [("used", Charge::Used), ("asked", Charge::Asked)];

fn name_of<T: PartialEq>(names: &[(&str, T)], value: &T) -> String {
    names.iter().find(|(_, named)| named == value).map(|(name, _)| (*name).to_owned()).expect("every one has a name")
}

fn of_name<T: Copy>(names: &[(&str, T)], name: &str) -> Option<T> {
    names.iter().find(|(other, _)| *other == name).map(|(_, value)| *value)
}

fn optional(value: Option<impl fmt::Display>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn seconds(nanos: Nanos) -> String {
    (nanos as f64 / SECOND as f64).to_string()
}

fn nanos(seconds: &str) -> Option<Nanos> {
    let seconds: f64 = seconds.parse().ok().filter(|seconds| *seconds >= 0.0)?;
    Some((seconds * SECOND as f64).round() as Nanos)
}

fn range(text: &str) -> Option<(Nanos, Nanos)> {
    let (from, to) = text.split_once("..")?;
    Some((nanos(from)?, nanos(to)?))
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtOnce => f.write_str("at-once"),
            Self::Every(gap) => write!(f, "every:{}", seconds(*gap)),
            Self::Poisson(gap) => write!(f, "poisson:{}", seconds(*gap)),
        }
    }
}

fn arrivals(text: &str) -> Option<Arrivals> {
    match text.split_once(':') {
        None => (text == "at-once").then_some(Arrivals::AtOnce),
        Some(("every", gap)) => Some(Arrivals::Every(nanos(gap)?)),
        Some(("poisson", gap)) => Some(Arrivals::Poisson(nanos(gap)?)),
        Some(_) => None,
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = format!("{}/{}", self.count, seconds(self.period));
        match self.window {
            Window::Bucket { burst } => write!(f, "bucket:{rate}:{burst}"),
            Window::Fixed { phase } => write!(f, "fixed:{rate}:{}", seconds(phase)),
            Window::Sliding => write!(f, "sliding:{rate}:0"),
        }
    }
}

fn shape(text: &str) -> Option<Shape> {
    let (kind, rest) = text.split_once(':')?;
    let (rate, last) = rest.split_once(':')?;
    let (count, period) = rate.split_once('/')?;
    let window = match kind {
        "bucket" => Window::Bucket { burst: last.parse().ok()? },
        "fixed" => Window::Fixed { phase: nanos(last)? },
        "sliding" => Window::Sliding,
        _ => return None,
    };
    Some(Shape { count: count.parse().ok()?, period: nanos(period)?, window })
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}:", seconds(self.from), seconds(self.to))?;
        match self.manner {
            Manner::Error(None) => f.write_str("error"),
            Manner::Error(Some(hint)) => write!(f, "hint={}", seconds(hint)),
            Manner::RefusesConnections => f.write_str("refuses"),
            Manner::Hangs => f.write_str("hangs"),
        }
    }
}

fn outage(text: &str) -> Option<Outage> {
    let (times, manner) = text.split_once(':')?;
    let (from, to) = range(times)?;
    let manner = match manner {
        "error" => Manner::Error(None),
        "refuses" => Manner::RefusesConnections,
        "hangs" => Manner::Hangs,
        hint => Manner::Error(Some(nanos(hint.strip_prefix("hint=")?)?)),
    };
    Some(Outage { from, to, manner })
}

fn faults(text: &str) -> Option<Faults> {
    let mut parts = text.split(',').map(|part| part.parse().ok());
    Some(Faults { error: parts.next()??, reset: parts.next()??, error_first: parts.next()?? })
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to {
            NewLimit::Cap(cap) => write!(f, "{}:cap={cap}", seconds(self.at)),
            NewLimit::Requests(count) => write!(f, "{}:quota={count}", seconds(self.at)),
        }
    }
}

fn change(text: &str) -> Option<Change> {
    let (at, to) = text.split_once(':')?;
    let to = match to.split_once('=')? {
        ("cap", cap) => NewLimit::Cap(cap.parse().ok()?),
        ("quota", count) => NewLimit::Requests(count.parse().ok()?),
        _ => return None,
    };
    Some(Change { at: nanos(at)?, to })
}

#[test]
fn a_scenario_is_read_as_it_was_written() {
    let line = "requests=1000 arrivals=poisson:0.02 models=2 told_slots=7 quota=bucket:600/60:10 \
                tokens=fixed:90000/60:0.5 cap=20 per_model=false hints=retry-after charge=asked estimate=0.7 \
                outage=10..14:hint=2.5 faults=0.05,0.03,0.05 changes=30:cap=5,60:quota=100 network=0.001..0.05 seed=9";
    let scenario: Scenario = line.parse().expect("a scenario");
    assert_eq!(scenario.to_string(), line);
    assert_eq!(Scenario::default().to_string(), "");
}
