//! What must hold, whatever happens: of each answer by itself, and of all requests and all attempts together.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use crate::client::{End, Seen};
use crate::gateway::Attempt;
use crate::plan::{Fate, Kind, Plan};

/// `retry.max_retries`, and what else is sent again: docs/errors.md and ARCHITECTURE.md, *Retries* and *Bounds*.
const MOST_RETRIES: usize = 3;
const MOST_FREE_PROBES: usize = 10;

/// `retry.budget` and the retries that are always allowed, in any such time.
const BUDGET: f64 = 0.2;
const BUDGET_FLOOR: f64 = 10.0;
const BUDGET_WINDOW: Duration = Duration::from_secs(10);

/// How much later than it was decided on an attempt may reach the gateway, on a machine that is busy.
const ON_THE_WAY: Duration = Duration::from_secs(2);

/// `timeouts.response` counts from an upload's beginning; whose bytes are missing when it is over is the one who was slow.
const UPLOAD_TOO_SLOW: &str = "request_timeout";

/// weir's own words for what went wrong, with the status that belongs to each.
const OWN_ERRORS: [(u16, &str); 13] = [
    (408, UPLOAD_TOO_SLOW),
    (429, "rate_limit_exceeded"),
    (502, "upstream_disconnected"),
    (502, "upstream_invalid_response"),
    (502, "upstream_unreachable"),
    (503, "concurrency_exhausted"),
    (503, "queue_full"),
    (503, "upstream_unavailable"),
    (504, "connect_timeout"),
    (504, "deadline_exceeded"),
    (504, "first_event_timeout"),
    (504, "response_timeout"),
    (504, "idle_timeout"),
];

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// The gateway's answer, whole.
    Answered(u16),
    /// An error in weir's own words.
    Failed(&'static str),
    /// A stream that ended with an event that says so.
    ToldBroken,
    /// An answer that broke off, visibly.
    Broken,
    HungUp,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(status) => write!(f, "{status}"),
            Self::Failed(code) => f.write_str(code),
            Self::ToldBroken => f.write_str("broken off with an event"),
            Self::Broken => f.write_str("broken off"),
            Self::HungUp => f.write_str("hung up"),
        }
    }
}

/// What was made of what a client saw.
#[derive(Debug)]
pub struct Verdict {
    pub id: u64,
    pub kind: Kind,
    begun: Instant,
    ended: Instant,
    head_order: Option<u64>,
    /// Which attempt the answer came from, where it came from the gateway.
    attempt: Option<u32>,
    pub outcome: Result<Outcome, String>,
}

/// Judges an answer by itself: it is the right one and whole, or visibly a failure.
pub fn judge(plan: Plan, seen: &Seen) -> Verdict {
    let attempt = seen.answered_attempt.parse().ok();
    let outcome = outcome(plan, seen, attempt).map_err(|why| format!("{why}: {}", describe(seen)));
    let Seen { id, kind, begun, ended, head_order, .. } = *seen;
    Verdict { id, kind, begun, ended, head_order, attempt, outcome }
}

fn describe(seen: &Seen) -> String {
    let Seen { id, kind, http2, status, answered_id, answered_attempt, end, body, .. } = seen;
    let text = String::from_utf8_lossy(&body[..body.len().min(2000)]).into_owned();
    let version = if *http2 { 2 } else { 1 };
    format!(
        "{kind:?} {id} over HTTP/{version}: {status} of {answered_id}'s attempt {answered_attempt}, {end:?}, {} bytes: {text}",
        body.len()
    )
}

fn outcome(plan: Plan, seen: &Seen, attempt: Option<u32>) -> Result<Outcome, String> {
    if let End::Wrong(why) = &seen.end {
        return Err(why.clone());
    }
    let Some(_) = seen.head_order else { return Ok(Outcome::HungUp) };
    let Some(attempt) = attempt else { return own_error(seen) };
    if seen.answered_id != seen.id.to_string() {
        return Err("another's answer".to_owned());
    }
    let script = plan.script(seen.id, attempt, seen.kind, false);
    let (sent, got) = (&script.visible, &seen.body);
    match seen.end {
        End::Whole if script.fate.is_whole() && got == sent => Ok(Outcome::Answered(seen.status)),
        End::Whole if seen.kind == Kind::Stream && is_told_broken(sent, got) => Ok(Outcome::ToldBroken),
        End::Broken if sent.starts_with(got) => Ok(Outcome::Broken),
        End::HungUp if sent.starts_with(got) => Ok(Outcome::HungUp),
        End::HungUp if is_told_broken(sent, got) => Ok(Outcome::HungUp),
        _ => Err(format!("not the answer of {:?}", script.fate)),
    }
}

/// Whole events of what was sent, then one that says that it broke off. What was sent ends before its last event: whoever has
/// that has the whole answer.
fn is_told_broken(sent: &[u8], got: &[u8]) -> bool {
    let text = String::from_utf8_lossy(got);
    let Some(at) = text.rfind("data: {\"error\"") else { return false };
    let (before, event) = text.split_at(at);
    let whole_events = before.is_empty() || before.ends_with("\n\n");
    whole_events && event.ends_with("\n\n") && !before.contains("[DONE]") && sent.starts_with(before.as_bytes())
}

fn own_error(seen: &Seen) -> Result<Outcome, String> {
    match seen.end {
        End::HungUp => return Ok(Outcome::HungUp),
        End::Broken => return Err("weir's own answers are whole".to_owned()),
        End::Whole | End::Wrong(_) => {}
    }
    let error: serde_json::Value = serde_json::from_slice(&seen.body).map_err(|error| error.to_string())?;
    let code = error["error"]["code"].as_str().unwrap_or_default();
    let known = OWN_ERRORS.iter().find(|known| **known == (seen.status, code));
    let (_, code) = known.ok_or("no error of the table")?;
    let says_what_to_do = match seen.status {
        429 | 503 => seen.retry_after.parse::<u64>().is_ok(),
        408 => seen.kind == Kind::Upload,
        _ => seen.should_retry == "false",
    };
    if !says_what_to_do || !error["error"]["message"].is_string() {
        return Err("it does not say what to do".to_owned());
    }
    Ok(Outcome::Failed(code))
}

/// Everything that was seen, on both sides.
pub struct Story<'a> {
    verdicts: &'a [Verdict],
    attempts: &'a [Attempt],
    of_request: HashMap<u64, Vec<&'a Attempt>>,
}

impl<'a> Story<'a> {
    pub fn new(verdicts: &'a [Verdict], attempts: &'a [Attempt]) -> Self {
        let mut of_request: HashMap<u64, Vec<&Attempt>> = HashMap::new();
        for attempt in attempts {
            of_request.entry(attempt.id).or_default().push(attempt);
        }
        Self { verdicts, attempts, of_request }
    }

    /// What was wrong; nothing where every promise was kept.
    pub fn wrong(&self) -> Vec<String> {
        let of_answer = |verdict: &Verdict| {
            let why = verdict.outcome.clone().err()?;
            Some(format!("{why}; at the gateway: {:?}", self.attempts_at(verdict.id)))
        };
        let answers = self.verdicts.iter().filter_map(of_answer);
        let attempts = self.verdicts.iter().filter_map(|verdict| self.check_attempts(verdict).err());
        answers.chain(attempts).chain(self.check_ids()).chain(self.check_budget()).collect()
    }

    /// Outcomes, fates and how often each.
    pub fn summary(&self) -> String {
        let mut outcomes: HashMap<Outcome, usize> = HashMap::new();
        self.verdicts.iter().flat_map(|it| &it.outcome).for_each(|it| *outcomes.entry(*it).or_default() += 1);
        let mut outcomes: Vec<_> = outcomes.into_iter().collect();
        outcomes.sort_unstable();
        let mut fates: HashMap<Fate, usize> = HashMap::new();
        self.attempts.iter().for_each(|it| *fates.entry(it.fate).or_default() += 1);
        let mut fates: Vec<_> = fates.into_iter().map(|(fate, count)| (count, format!("{fate:?}"))).collect();
        fates.sort_unstable_by(|a, b| b.cmp(a));
        let outcomes: Vec<_> = outcomes.iter().map(|(it, count)| format!("{it} {count}")).collect();
        let fates: Vec<_> = fates.iter().map(|(count, it)| format!("{it} {count}")).collect();
        let (requests, attempts) = (self.verdicts.len(), self.attempts.len());
        format!("{requests} requests: {}\n{attempts} attempts: {}", outcomes.join(", "), fates.join(", "))
    }

    /// Good answers that their client did not get as such; on a machine that is very busy a timeout may have ended some.
    pub fn spoiled(&self, plan: Plan) -> usize {
        let is_spoiled = |verdict: &&Verdict| {
            let good = |attempt| plan.fate(verdict.id, attempt, verdict.kind) == Fate::Answered;
            verdict.attempt.is_some_and(good) && matches!(verdict.outcome, Ok(Outcome::ToldBroken | Outcome::Broken))
        };
        self.verdicts.iter().filter(is_spoiled).count()
    }

    fn attempts_at(&self, id: u64) -> &[&Attempt] {
        self.of_request.get(&id).map_or(&[], Vec::as_slice)
    }

    /// Nothing is sent too often, nor after an answer has begun, nor after the client has left.
    fn check_attempts(&self, verdict: &Verdict) -> Result<(), String> {
        let attempts = self.attempts_at(verdict.id);
        let fail = |why: &str| Err(format!("{why}: {verdict:?}, {attempts:?}"));
        if verdict.head_order.is_some_and(|head| attempts.iter().any(|attempt| attempt.order > head)) {
            return fail("sent again after an answer had begun");
        }
        if verdict.attempt.is_some() && verdict.attempt != attempts.last().map(|last| last.number) {
            return fail("not the last attempt's answer");
        }
        // A request that streams through may wait for 10 s without that weir sees whether its client has left.
        let is_late = |attempt: &&&Attempt| attempt.at > verdict.ended + ON_THE_WAY;
        if verdict.kind != Kind::Upload && attempts.iter().any(|attempt| is_late(&attempt)) {
            return fail("sent after the client had left");
        }
        let free = attempts.iter().filter(|attempt| is_free(attempt)).count();
        if attempts.len() > 1 + MOST_RETRIES + MOST_FREE_PROBES + free {
            return fail("sent too often");
        }
        if attempts.iter().filter(|attempt| attempt.fate == Fate::Stalled).count() > 2 {
            return fail("a timeout is retried once");
        }
        let before_last = attempts.split_last().map_or(&[][..], |(_, before)| before);
        if !verdict.kind.is_repeatable() && before_last.iter().any(|attempt| attempt.fate.leaves_doubt()) {
            return fail("sent again though it may have been done");
        }
        if verdict.kind == Kind::Upload && attempts.len() > 1 {
            return fail("an upload is sent once");
        }
        Ok(())
    }

    /// Each request was asked for once.
    fn check_ids(&self) -> Option<String> {
        let mut ids: Vec<u64> = self.verdicts.iter().map(|verdict| verdict.id).collect();
        ids.sort_unstable();
        ids.dedup();
        let known = self.of_request.keys().filter(|id| ids.binary_search(id).is_ok()).count();
        let (asked, distinct, came) = (self.verdicts.len(), ids.len(), self.of_request.len());
        (asked != distinct || came != known)
            .then(|| format!("{asked} requests, {distinct} of them different; {came} came, {known} of them asked for"))
    }

    /// In the ten seconds before any retry, retries <= 0.2 x first attempts + 10. The first attempts may well be the older ones:
    /// where the gateway names a time to come back at, or the breaker opens, all retries come after it together.
    fn check_budget(&self) -> Option<String> {
        let mut retries = Vec::new();
        for attempts in self.of_request.values() {
            // What follows a free one is no retry.
            let pairs = attempts.iter().zip(&attempts[1..]);
            retries.extend(pairs.filter(|(before, _)| !is_free(before)).map(|(_, retry)| retry.at));
        }
        retries.sort_unstable();
        let firsts: Vec<_> = self.verdicts.iter().map(|verdict| self.first_attempt(verdict)).collect();
        retries.iter().enumerate().find_map(|(index, end)| {
            // Less the time on the way: what was decided on before the window is not counted as one of it.
            let within = |at: &Instant| *at + (BUDGET_WINDOW - ON_THE_WAY) > *end;
            let spent = retries[..=index].iter().filter(|at| within(at)).count();
            let may_have_paid =
                |(since, until): &&(Instant, Instant)| *since <= *end && *until + BUDGET_WINDOW + ON_THE_WAY > *end;
            let earned = firsts.iter().filter(may_have_paid).count();
            let allowed = BUDGET * earned as f64 + BUDGET_FLOOR;
            (spent as f64 > allowed).then(|| format!("{spent} retries in ten seconds, {allowed} are allowed"))
        })
    }

    /// Between when and when its first attempt was made. One that was refused, or whose connection was closed at once, has not
    /// reached the gateway, which counts the next for the first, or none.
    fn first_attempt(&self, verdict: &Verdict) -> (Instant, Instant) {
        let came = self.attempts_at(verdict.id).first().map(|attempt| attempt.at);
        (verdict.begun, came.unwrap_or(verdict.ended))
    }
}

/// Whether weir may send it again at once, for nothing: its connection may have been closed before, or the gateway may not like
/// to be asked for the usage.
fn is_free(attempt: &Attempt) -> bool {
    let stale = attempt.reused && attempt.fate.looks_stale() && attempt.kind.is_repeatable();
    stale || attempt.kind == Kind::Stream && attempt.fate == Fate::ClientError
}
