//! What a run comes to: the log that the world writes, the figures made of it, and the timeline.

use std::fmt;

use super::scenario::{MILLI, Nanos, SECOND, Scenario};

/// A row of the timeline.
const SLICE: Nanos = 250 * MILLI;

/// The budget's window, and the retries in it that no first attempt pays for.
const BUDGET_WINDOW: Nanos = 10 * SECOND;
const BUDGET_RATIO: f64 = 0.2;
const BUDGET_FLOOR: f64 = 10.0;

/// What happened, and when; each list in the order of time.
#[derive(Default)]
pub struct Log {
    pub firsts: Vec<Nanos>,
    /// Decisions to try again.
    pub retries: Vec<Nanos>,
    /// What reached the gateway.
    pub reached: Vec<Nanos>,
    /// What it accepted.
    pub accepted: Vec<Nanos>,
    pub ended: Vec<Nanos>,
    pub refusals: u64,
    pub failures: u64,
    pub errors: u64,
    /// Attempts begun while the gateway's hint asked to wait.
    pub early: u64,
    /// The most that was at the gateway at once after the outage, served or about to be refused.
    pub most_at_once: u32,
    pub events: u64,
    pub slices: Vec<Slice>,
    pub violations: Vec<String>,
}

/// A quarter of a second. Those in which nothing happens are left out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Slice {
    number: u64,
    pub sent: u32,
    pub accepted: u32,
    pub refused: u32,
    pub failed: u32,
    pub ended: u32,
    /// At its end.
    pub in_flight: u32,
    pub waiting: u32,
    /// At its end: the slots that weir has for it, summed over lanes.
    pub slots: Option<u32>,
    /// At its end: what is left of the quota of the gateway's first lane, of requests or else of tokens.
    pub left: Option<u64>,
}

impl Log {
    /// Whether a slice begins with this moment.
    pub fn is_new_slice(&self, now: Nanos) -> bool {
        self.slices.last().is_none_or(|slice| slice.number != now / SLICE)
    }

    pub fn begin_slice(&mut self, now: Nanos) {
        self.slices.push(Slice { number: now / SLICE, ..Slice::default() });
    }

    pub fn slice(&mut self) -> &mut Slice {
        self.slices.last_mut().expect("a slice has begun before anything happens")
    }

    pub fn count_failure(&mut self, refused: bool) {
        self.refusals += u64::from(refused);
        self.failures += u64::from(!refused);
        self.slice().refused += u32::from(refused);
        self.slice().failed += u32::from(!refused);
    }

    pub fn violate(&mut self, what: impl FnOnce() -> String) {
        if self.violations.len() < 5 {
            self.violations.push(what());
        }
    }
}

/// How good a run was.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The oracle's time over weir's, at most 1, times the part that was served.
    pub efficiency: f64,
    /// 429s for each request.
    pub refusals: f64,
    pub attempts: f64,
    pub errors: u64,
    /// The most retries in any ten seconds, as a part of what the budget allows.
    pub budget: f64,
    /// From the end of the outage until as much as before is accepted again; `None` without an outage, or if never.
    pub recovery: Option<f64>,
    had_outage: bool,
    /// Attempts in any second that begins after the outage, at most.
    pub peak_after: u64,
    /// What was at the gateway at once after the outage, at most, with those that it was about to refuse.
    pub most_at_once: u32,
    pub early: u64,
    /// How long the run was, in seconds, and the oracle's.
    pub took: f64,
    pub oracle: f64,
    pub events: u64,
    pub violations: Vec<String>,
    pub slices: Vec<Slice>,
}

impl Figures {
    pub fn of(log: Log, scenario: &Scenario, oracle: Nanos) -> Self {
        let requests = f64::from(scenario.requests);
        let took = log.ended.last().copied().unwrap_or_default();
        let outage_ends = scenario.outage.map(|outage| outage.to);
        Self {
            efficiency: (oracle as f64 / took.max(1) as f64).min(1.0) * (1.0 - log.errors as f64 / requests),
            refusals: log.refusals as f64 / requests,
            attempts: log.reached.len() as f64 / requests,
            errors: log.errors,
            budget: budget_used(&log.firsts, &log.retries),
            recovery: recovery(&log.accepted, scenario),
            had_outage: scenario.outage.is_some(),
            peak_after: outage_ends.map_or(0, |from| peak(&log.reached, from)),
            most_at_once: log.most_at_once,
            early: log.early,
            took: took as f64 / SECOND as f64,
            oracle: oracle as f64 / SECOND as f64,
            events: log.events,
            violations: log.violations,
            slices: log.slices,
        }
    }

    /// After the outage there were more attempts in a second than the quota lets through, or more at once than the cap.
    pub fn has_spike(&self, scenario: &Scenario) -> bool {
        let above_quota = scenario.requests_quota.is_some_and(|quota| self.peak_after > quota.most_in(SECOND));
        above_quota || scenario.cap.is_some_and(|cap| self.most_at_once > cap + 1 + cap / 20)
    }

    /// The run in quarters of a second.
    pub fn timeline(&self) -> String {
        let mut text =
            String::from("  seconds    sent accepted refused failed   ended in-flight waiting limit    left\n");
        for slice in &self.slices {
            let Slice { sent, accepted, refused, failed, ended, in_flight, waiting, slots, left, number } = slice;
            let at = (number * SLICE) as f64 / SECOND as f64;
            let or_dash = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
            let (slots, left) = (or_dash(slots.map(u64::from)), or_dash(*left));
            text += &format!(
                "{at:9.2} {sent:7} {accepted:8} {refused:7} {failed:6} {ended:7} {in_flight:9} {waiting:7} {slots:>5} {left:>7}\n"
            );
        }
        text
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { efficiency, refusals, attempts, errors, budget, early, took, oracle, .. } = self;
        write!(
            f,
            "efficiency {efficiency:.3} ({oracle:.1} s of {took:.1} s), refusals {refusals:.4}, attempts {attempts:.3}, \
             errors {errors}, budget {budget:.2}, early {early}"
        )?;
        if self.had_outage {
            let recovery = self.recovery.map_or("never".to_owned(), |seconds| format!("after {seconds:.2} s"));
            write!(f, ", back {recovery}, then at most {}/s, {} at once", self.peak_after, self.most_at_once)?;
        }
        Ok(())
    }
}

/// The most retries in any window of the budget's, over what it allows.
fn budget_used(firsts: &[Nanos], retries: &[Nanos]) -> f64 {
    let (mut retry, mut first, mut most) = (0, [0; 2], 0.0f64);
    for (index, end) in retries.iter().enumerate() {
        let from = (*end + 1).saturating_sub(BUDGET_WINDOW);
        retry += retries[retry..].iter().take_while(|at| **at < from).count();
        first[0] += firsts[first[0]..].iter().take_while(|at| **at < from).count();
        first[1] += firsts[first[1]..].iter().take_while(|at| **at <= *end).count();
        let allowed = BUDGET_RATIO * (first[1] - first[0]) as f64 + BUDGET_FLOOR;
        most = most.max((index + 1 - retry) as f64 / allowed);
    }
    most
}

/// When, after the outage, as many are accepted in a second as nine tenths of the mean before it.
fn recovery(accepted: &[Nanos], scenario: &Scenario) -> Option<f64> {
    let outage = scenario.outage?;
    // The second half of the time before it: what was learned till then, and no initial burst.
    let before = accepted.iter().filter(|at| (outage.from / 2..outage.from).contains(*at)).count() as f64;
    let wanted = 0.9 * before * SECOND as f64 / (outage.from - outage.from / 2) as f64;
    let after = &accepted[accepted.partition_point(|at| *at < outage.to)..];
    let starts = std::iter::once(outage.to).chain(after.iter().copied());
    let in_second_from =
        |from: Nanos| after.partition_point(|at| *at < from + SECOND) - after.partition_point(|at| *at < from);
    let mut full = starts.filter(|from| in_second_from(*from) as f64 >= wanted.floor());
    full.next().map(|from| (from - outage.to) as f64 / SECOND as f64)
}

/// The most in any second that begins at `from` or later.
fn peak(times: &[Nanos], from: Nanos) -> u64 {
    let times = &times[times.partition_point(|at| *at < from)..];
    let mut end = 0;
    let counts = times.iter().enumerate().map(|(index, start)| {
        end += times[end..].iter().take_while(|at| **at < start + SECOND).count();
        end - index
    });
    counts.max().unwrap_or_default() as u64
}
