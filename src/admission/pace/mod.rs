//! What a lane has learned of the gateway, and what follows for who may pass.
//!
//! A [`Pace`] is told how attempts end ([`Pace::hear`]) and answers as a limit does: is there room, and if not, when. Its parts
//! are the [`valve`] (closed by a hint or the breaker, half-open, ramp), [`adaptive`] slots, quotas that are [`told`] in headers,
//! and one that is [`inferred`] where nothing is told. All pure: `now` is given.
//!
//! A refusal without a hint may mean too many at once, or too many a minute. Only one of them is cut. First it is taken for a
//! cap. But a cap never refuses what is within it: when attempts are refused that are no more than what was accepted at once
//! just before, it was a rate, the slots are given back, and the rate is inferred. And where refusals come only at a number under
//! way that was never accepted, it was a cap after all.

pub mod adaptive;
pub mod credential;
pub mod inferred;
mod suspicion;
pub mod told;
pub mod valve;

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::line::Load;
use super::queue::Used;
use crate::error::Cause;
use crate::openai::headers::Quota;
use adaptive::{Adaptive, Taken};
use inferred::{Inferred, Opened};
use suspicion::{Seen, Suspicion, Verdict};
use told::{Mark, Told};
use valve::{Passage, Valve, Why};

/// A timer rings up to a tick late: who was due at most so long ago counts as having passed in time.
const TIMER_SLACK: Duration = Duration::from_millis(2);

/// A lane that refuses the only request under way, without saying how long, is closed for so long at first, twice as long each
/// time, up to the second.
const UNHINTED_CLOSURE: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(15)];

/// Attempts of which nothing was heard yet that are watched.
const MOST_UNHEARD: usize = 256;

/// That work goes on more than this many times faster than was seen is taken to be impossible.
const FASTEST: u32 = 4;

/// What the end of an attempt says of the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// The gateway has taken it on: an answer, or an error that is the request's own.
    Accepted,
    /// A quota or a cap is used up (429), until then if the gateway says so.
    Refused { hint: Option<Duration> },
    /// The gateway has too much to do (503, 529), until then.
    Overloaded { hint: Duration },
    /// It failed, for whatever reason.
    Failed,
}

/// What was heard of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    pub signal: Signal,
    /// `x-ratelimit-*`, as of when the request was admitted.
    pub requests: Option<Quota>,
    pub tokens: Option<Quota>,
}

impl Heard {
    /// Whether a quota that is told has nothing left.
    fn is_used_up(&self) -> bool {
        [self.requests, self.tokens].iter().flatten().any(|quota| quota.remaining == 0)
    }
}

/// How lanes begin, and how far they may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneRules {
    /// Adaptive slots: how many at first and at most. `None` where the configuration has a number for all.
    pub slots: Option<(u32, u32)>,
    /// After that time of unbroken failure everyone is refused at once.
    pub give_up: Duration,
}

/// One attempt that was let through.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    taken: Taken,
    sent_at: Instant,
    tokens: u64,
    /// Everything that was charged until then, this one included.
    charged: Charged,
    requests: Option<Mark>,
    token_mark: Option<Mark>,
    /// It is let through to see whether the gateway is back from that.
    probe: Option<Why>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Charged {
    requests: u64,
    tokens: u64,
}

/// A lane's pace.
#[derive(Debug)]
pub struct Pace {
    valve: Valve,
    slots: Option<Adaptive>,
    in_flight: u32,
    requests: Option<Told>,
    tokens: Option<Told>,
    inferred: Option<Inferred>,
    suspicion: Suspicion,
    /// Attempts of which nothing has been heard yet, the oldest first.
    unheard: VecDeque<(Taken, Instant)>,
    cycle: Cycle,
    recent: Recent,
    charged: Charged,
    /// Attempts that were refused.
    refused: u64,
}

/// How many pass a second of late: each weighs less the longer ago it is.
#[derive(Debug, Default)]
struct Recent {
    weight: f64,
    at: Option<Instant>,
}

/// After this time, in seconds, one weighs a third.
const RECENT: f64 = 2.0;

/// From one opening of the valve to the next.
#[derive(Debug)]
struct Cycle {
    since: Instant,
    passed: u32,
    /// How long somebody waited for it, and until when that was seen.
    busy: Duration,
    last_at: Instant,
    /// When it was closed.
    closed_at: Option<Instant>,
    /// Since it was closed, one has been let through to see whether it can be opened.
    probe: Option<(u64, Why, Instant)>,
}

impl Pace {
    /// The pace of a lane of which nothing is known.
    pub fn new(rules: LaneRules, now: Instant) -> Self {
        let slots = rules.slots.map(|(first, most)| Adaptive::new(first, most));
        let cold = rules.slots.is_some_and(|(first, most)| first < most);
        Self {
            valve: Valve::new(cold, rules.give_up, now),
            slots,
            in_flight: 0,
            requests: None,
            tokens: None,
            inferred: None,
            suspicion: Suspicion::default(),
            unheard: VecDeque::new(),
            cycle: Cycle { since: now, passed: 0, busy: Duration::ZERO, last_at: now, closed_at: None, probe: None },
            recent: Recent::default(),
            charged: Charged::default(),
            refused: 0,
        }
    }

    /// Changes how far the lane may go, and when it is given up. What was learned stays. Where adaptive slots begin only now,
    /// those under way are counted.
    pub fn set_rules(&mut self, rules: LaneRules) {
        self.valve.set_give_up(rules.give_up);
        match (&mut self.slots, rules.slots) {
            (slots, None) => *slots = None,
            (Some(slots), Some((_, most))) => slots.set_most(most),
            (slots, Some((first, most))) => *slots = Some(Adaptive::begun(first, most, self.in_flight)),
        }
    }

    /// When a request of that many tokens may pass, if nobody else does; `None` where that depends on what becomes of others.
    pub fn opens_at(&self, tokens: u64, now: Instant) -> Option<Instant> {
        let valve = if self.valve.is_cold() && self.unheard.is_empty() { now } else { self.valve.opens_at()? };
        let slots = self.slots.as_ref().map_or(Some(now), |slots| slots.opens_at(now))?;
        // A probe waits for nothing else.
        let inferred = self.inferred.as_ref().filter(|_| !self.valve.is_half_open());
        let inferred = inferred.map_or(now, |inferred| inferred.opens_at(now));
        let requests = self.requests.as_ref().map_or(now, |told| told.opens_at(1.0, now));
        let tokens = self.tokens.as_ref().filter(|_| tokens > 0).map_or(now, |told| told.opens_at(tokens as f64, now));
        Some(valve.max(slots).max(inferred).max(requests).max(tokens))
    }

    /// Whether a request of that many tokens may pass now.
    pub fn is_open(&self, tokens: u64, now: Instant) -> bool {
        self.opens_at(tokens, now).is_some_and(|at| at <= now)
    }

    /// Lets one pass; `waited` says that it had to wait.
    pub fn pass(&mut self, tokens: u64, waited: bool, now: Instant) -> Pass {
        self.charged.requests += 1;
        self.charged.tokens = self.charged.tokens.saturating_add(tokens);
        let number = self.charged.requests;
        let probe = self.valve.pass(Passage { number, sent_at: now });
        if let Some(why) = probe {
            self.cycle.probe = Some((number, why, now));
        }
        self.cycle.passed += 1;
        if waited {
            self.cycle.busy += now.saturating_duration_since(self.cycle.last_at);
        }
        self.cycle.last_at = now;
        self.recent.note(now);
        let others = self.in_flight;
        let taken = match &mut self.slots {
            Some(slots) => slots.take(number, now),
            None => Taken { number, others, grown: false },
        };
        self.in_flight += 1;
        self.listen(now);
        self.suspicion.passed(taken, now);
        self.unheard.push_back((taken, now));
        if self.unheard.len() > MOST_UNHEARD {
            self.unheard.pop_front();
        }
        if let Some(inferred) = self.inferred.as_mut().filter(|_| probe.is_none()) {
            inferred.pass(waited, now);
        }
        let requests = self.requests.as_mut().map(|told| told.pass(1.0, now));
        let token_mark = self.tokens.as_mut().filter(|_| tokens > 0).map(|told| told.pass(tokens as f64, now));
        Pass { taken, sent_at: now, tokens, charged: self.charged, requests, token_mark, probe }
    }

    /// Takes back what passed.
    pub fn give_back(&mut self, pass: &Pass, used: Used, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(slots) = &mut self.slots {
            let worked = matches!(used, Used::Tokens(_));
            slots.give_back(worked.then(|| now - pass.sent_at));
        }
        self.valve.abandoned(pass.passage(), now);
        if used == Used::Unsent {
            if let (Some(told), Some(_)) = (&mut self.requests, pass.requests) {
                told.take_back(1.0);
            }
            if let (Some(told), Some(_)) = (&mut self.tokens, pass.token_mark) {
                told.take_back(pass.tokens as f64);
            }
        }
    }

    /// What became of an attempt. `true` where the gateway has refused it and it is known when it will take others.
    pub fn hear(&mut self, pass: &Pass, heard: &Heard, now: Instant) -> bool {
        let refused = matches!(heard.signal, Signal::Refused { .. });
        self.listen(now);
        let unheard = self.unheard.iter().position(|(taken, _)| taken.number == pass.taken.number);
        if let Some(at) = unheard {
            self.unheard.remove(at);
        }
        if unheard.is_some() && heard.signal == Signal::Accepted {
            self.not_refused(pass.taken, now);
        }
        self.hear_quotas(pass, heard, refused, now);
        match heard.signal {
            Signal::Accepted => self.accepted(pass, now),
            Signal::Refused { hint } => self.refused(pass, heard, hint, now),
            Signal::Overloaded { hint } => {
                self.valve.refused(pass.passage(), now);
                self.valve.overloaded(pass.passage(), now);
                self.close(pass, hint, Why::Overload, now);
            }
            Signal::Failed => self.valve.failed(pass.passage(), self.charged.requests, now),
        }
        match heard.signal {
            Signal::Accepted | Signal::Failed => false,
            Signal::Overloaded { .. } | Signal::Refused { hint: Some(_) } => true,
            Signal::Refused { hint: None } => heard.is_used_up(),
        }
    }

    /// Nothing passes before then: another lane, which has the same quota, was refused until then.
    pub fn close_until(&mut self, until: Instant, now: Instant) {
        self.valve.close_until(until, now);
        self.cycle.closed_at.get_or_insert(now);
    }

    /// Until when it was closed for a quota, if it is.
    pub fn closed_until(&self, now: Instant) -> Option<Instant> {
        let for_a_quota = matches!(self.valve.closed_by(now), Some(Why::Quota | Why::Silence));
        for_a_quota.then(|| now + self.valve.cooldown(now))
    }

    /// When everyone who waits is to be refused, should the gateway fail until then.
    pub fn gives_up_at(&self) -> Option<Instant> {
        self.valve.gives_up_at()
    }

    /// Whether nobody is to wait any more.
    pub fn given_up(&self, now: Instant) -> bool {
        self.valve.has_given_up(now)
    }

    /// How long it stays closed.
    pub fn cooldown(&self, now: Instant) -> Duration {
        self.valve.cooldown(now)
    }

    /// How many are under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// The adaptive number of slots.
    pub fn slot_limit(&self) -> Option<u32> {
        self.slots.as_ref().map(|slots| slots.slots().limit())
    }

    /// When the last of this load may be expected to pass.
    pub fn expected_at(&self, load: Load, now: Instant) -> Instant {
        let after = self.valve.opens_at().unwrap_or(now).max(now);
        let slots = self.slots.as_ref().map_or(now, |slots| after + slots.slots().expected_wait(load.requests));
        let inferred = self.inferred.as_ref().map_or(now, |inferred| after + inferred.time_for(load.requests));
        let requests = self.requests.as_ref().map_or(now, |told| told.available_at(load.requests as f64, now));
        let tokens = self.tokens.as_ref().map_or(now, |told| told.available_at(load.tokens as f64, now));
        after.max(slots).max(inferred).max(requests).max(tokens)
    }

    /// Before when the last of this load cannot pass.
    pub fn earliest_at(&self, load: Load, now: Instant) -> Instant {
        let after = self.valve.opens_at().unwrap_or(now).max(now);
        let slots = self.slots.as_ref().map_or(Duration::ZERO, |slots| {
            let wait = slots.slots().shortest_wait(load.requests);
            // What is learned now may be wrong, or change.
            wait.mul_f64(f64::from(slots.slots().limit()) / f64::from(slots.most()))
        });
        let told = |told: &Option<Told>, load: u64| {
            let certain = told.as_ref().filter(|told| told.is_certain());
            certain
                .map_or(now, |told| now + told.available_at(load as f64, now).saturating_duration_since(now) / FASTEST)
        };
        let requests = told(&self.requests, load.requests);
        let tokens = told(&self.tokens, load.tokens);
        (after + slots).max(requests).max(tokens)
    }

    /// How long the lane takes for a load, once it is used up.
    pub fn time_for(&self, load: Load) -> Duration {
        let requests = u32::try_from(load.requests).unwrap_or(u32::MAX);
        let slots = self.slots.as_ref().map(|slots| slots.slots().turnover().saturating_mul(requests));
        let inferred = self.inferred.as_ref().map(|inferred| inferred.time_for(load.requests));
        let told = self.requests.as_ref().map(|told| told.time_for(load.requests as f64));
        let tokens = self.tokens.as_ref().map(|told| told.time_for(load.tokens as f64));
        [slots, inferred, told, tokens].into_iter().flatten().max().unwrap_or_default()
    }

    /// Why a request of that many tokens does not pass now.
    pub fn cause(&self, tokens: u64, now: Instant) -> Cause {
        match self.valve.closed_by(now) {
            Some(Why::Breaker | Why::Overload) => return Cause::Unavailable,
            Some(Why::Quota | Why::Silence) => return Cause::Requests,
            None => {}
        }
        let told = |told: &Option<Told>, charge: u64| {
            told.as_ref().filter(|_| charge > 0).map_or(now, |told| told.opens_at(charge as f64, now))
        };
        let (requests, tokens) = (told(&self.requests, 1), told(&self.tokens, tokens));
        let inferred = self.inferred.as_ref().map_or(now, |inferred| inferred.opens_at(now));
        match self.slots.as_ref().map_or(Some(now), |slots| slots.opens_at(now)) {
            None => Cause::Concurrency,
            Some(_) if tokens > requests.max(inferred) => Cause::Tokens,
            Some(_) if requests.max(inferred) > now => Cause::Requests,
            Some(_) => Cause::Concurrency,
        }
    }

    fn hear_quotas(&mut self, pass: &Pass, heard: &Heard, refused: bool, now: Instant) {
        let tells = heard.requests.is_some() || heard.tokens.is_some();
        if !tells && heard.signal != Signal::Accepted {
            return;
        }
        let since = self.charged.requests - pass.charged.requests;
        let answer = Answered { sent_at: pass.sent_at, since, charge: 1, refused };
        hear_quota(&mut self.requests, heard.requests, pass.requests, answer, false, now);
        let since = self.charged.tokens - pass.charged.tokens;
        let answer = Answered { since, charge: pass.tokens, ..answer };
        hear_quota(&mut self.tokens, heard.tokens, pass.token_mark, answer, true, now);
    }

    fn accepted(&mut self, pass: &Pass, now: Instant) {
        self.valve.accepted(pass.passage(), now);
        self.suspicion.accepted(pass.taken, now);
        if let Some(slots) = &mut self.slots {
            slots.answered(now);
        }
    }

    /// Attempts of which nothing was heard in all the time that refusals take have been accepted.
    fn listen(&mut self, now: Instant) {
        let quiet = self.valve.quiet(Why::Quota).unwrap_or_default();
        while let Some((taken, _)) = self.unheard.front().copied().filter(|(_, sent_at)| now - *sent_at > quiet) {
            self.unheard.pop_front();
            self.not_refused(taken, now);
        }
    }

    fn not_refused(&mut self, taken: Taken, now: Instant) {
        if let Some((_, why, at)) = self.cycle.probe.take_if(|(number, ..)| *number == taken.number) {
            self.reopened(why, at, now);
        }
        let in_transit = self.in_transit();
        if let Some(slots) = &mut self.slots {
            slots.accepted(taken, now);
        }
        if self.suspicion.not_refused(taken, self.charged.requests, in_transit) {
            self.infer(taken.number, now);
        }
    }

    fn refused(&mut self, pass: &Pass, heard: &Heard, hint: Option<Duration>, now: Instant) {
        self.valve.refused(pass.passage(), now);
        self.cycle.passed = self.cycle.passed.saturating_sub(1);
        self.refused += 1;
        let quiet = self.valve.quiet(Why::Quota).unwrap_or_default();
        let told = self.requests.is_some() || self.tokens.is_some();
        if told && heard.is_used_up() {
            // It comes back as it was told.
            self.inferred = None;
            if let Some(hint) = hint {
                self.requests.iter_mut().chain(&mut self.tokens).for_each(|told| told.name(now + hint));
                self.close(pass, hint, Why::Quota, now);
            }
            return;
        }
        let verdict = match hint {
            Some(_) => self.suspicion.refused_with_hint(pass.taken, self.charged.requests),
            None => {
                let growing = self.slots.as_ref().filter(|slots| slots.is_growing());
                let known = growing.map_or(0, |slots| slots.slots().limit());
                let settled = self.slots.as_ref().map_or(0, Adaptive::settled);
                let in_transit = self.in_transit();
                let limit = self.slots.as_ref().map_or(0, |slots| slots.slots().limit());
                let seen = Seen { passed: self.passed(), limit, known, settled, quiet, in_transit };
                self.suspicion.refused(pass.taken, self.charged.requests, seen, now)
            }
        };
        self.judge(pass, verdict, now);
        if let Some(hint) = hint {
            self.close(pass, hint, Why::Quota, now);
        }
    }

    fn judge(&mut self, pass: &Pass, verdict: Verdict, now: Instant) {
        let last = self.charged.requests;
        match verdict {
            Verdict::Known => {
                if let Some(slots) = self.slots.as_mut().filter(|_| !self.suspicion.is_rate()) {
                    slots.refused(pass.taken, last, true, now);
                }
                self.inferred.iter_mut().for_each(Inferred::refused_too);
            }
            Verdict::Unclear => {}
            Verdict::Quota => {
                if let Some(inferred) = &mut self.inferred {
                    inferred.refused(last - pass.taken.number, now);
                }
            }
            Verdict::Cap { proven } => {
                if let Some(slots) = &mut self.slots {
                    slots.refused(pass.taken, last, proven, now);
                } else {
                    self.infer(pass.taken.number, now);
                }
                self.inferred = self.inferred.take().filter(|_| self.slots.is_none());
            }
            Verdict::Rate { closures } => {
                // While nothing passes at all, there is nothing to be measured.
                if closures <= 1 || self.inferred.is_none() {
                    self.infer(pass.taken.number, now);
                }
                if closures > 0 {
                    let [least, most] = UNHINTED_CLOSURE;
                    self.close(pass, (least * 2u32.pow(closures.min(8) - 1)).min(most), Why::Silence, now);
                }
            }
        }
    }

    /// How many attempts were not refused so far.
    fn passed(&self) -> u64 {
        self.charged.requests - self.refused
    }

    /// A rate was refused: measures it, or begins to.
    fn infer(&mut self, number: u64, now: Instant) {
        if let Some(inferred) = &mut self.inferred {
            inferred.refused(self.charged.requests - number, now);
            return;
        }
        let (since, before) = self.suspicion.series().unwrap_or((self.cycle.since, 0));
        let passed = self.passed().saturating_sub(before).max(1);
        let seconds = now.saturating_duration_since(since).as_secs_f64().max(0.05);
        // Not everything since then was a time in which somebody wanted to send.
        let rate = (passed as f64 / seconds).max(self.recent.rate(now) / 2.0);
        self.inferred = Some(Inferred::new(rate, now));
        if let Some(slots) = &mut self.slots {
            slots.restore(now);
        }
    }

    /// What part of the attempts under way is on the network.
    fn in_transit(&self) -> f64 {
        let hold = self.slots.as_ref().map_or(0.0, |slots| slots.hold().as_secs_f64());
        self.valve.refusal_time().map_or(0.0, |time| (time.as_secs_f64() / hold.max(0.001)).min(0.5))
    }

    fn close(&mut self, pass: &Pass, hint: Duration, why: Why, now: Instant) {
        self.valve.close(pass.passage(), hint, why, now);
        self.cycle.closed_at.get_or_insert(now);
    }

    /// The valve was closed for a quota, and this one was accepted again.
    fn reopened(&mut self, why: Why, at: Instant, now: Instant) {
        let told = self.requests.is_some() || self.tokens.is_some();
        let passed = self.cycle.passed.saturating_sub(1);
        let was_busy = self.cycle.busy * 2 >= at - self.cycle.since;
        if !told && passed > 0 && was_busy && matches!(why, Why::Quota | Why::Silence) {
            let closed_at = self.cycle.closed_at.unwrap_or(at);
            let opened = Opened {
                passed: f64::from(passed),
                open: closed_at.saturating_duration_since(self.cycle.since),
                closed: at.saturating_duration_since(closed_at),
                named: why == Why::Quota,
            };
            self.inferred.get_or_insert_with(|| Inferred::new(1.0, now)).reopened(opened, now);
        }
        self.cycle = Cycle { since: at, passed: 1, busy: Duration::ZERO, last_at: at, closed_at: None, probe: None };
    }
}

impl Recent {
    fn note(&mut self, now: Instant) {
        self.weight = self.rate(now) * RECENT + 1.0;
        self.at = Some(now);
    }

    fn rate(&self, now: Instant) -> f64 {
        let age = self.at.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.weight * (-age / RECENT).exp() / RECENT
    }
}

impl Pass {
    /// When it was let through.
    pub fn sent_at(&self) -> Instant {
        self.sent_at
    }

    /// Whether it finds out if the gateway takes requests again, at a time that the gateway or the breaker has named.
    pub fn is_probe(&self) -> bool {
        self.probe.is_some_and(|why| why != Why::Silence)
    }

    fn passage(&self) -> Passage {
        Passage { number: self.taken.number, sent_at: self.sent_at }
    }
}

/// The time from which the next step is counted: when it was due, if that was only just.
fn step_from(due: Instant, step: Duration, now: Instant) -> Instant {
    now.checked_sub(TIMER_SLACK).map_or(now, |earliest| due.max(earliest).min(now)) + step
}

/// The request whose answer tells of a quota.
#[derive(Clone, Copy)]
struct Answered {
    sent_at: Instant,
    /// What was charged after it.
    since: u64,
    charge: u64,
    refused: bool,
}

fn hear_quota(
    told: &mut Option<Told>,
    quota: Option<Quota>,
    mark: Option<Mark>,
    answered: Answered,
    guesses: bool,
    now: Instant,
) {
    let Answered { sent_at, since, charge, refused } = answered;
    match (told.as_mut(), quota) {
        (Some(known), quota) => {
            known.hear(quota, mark, sent_at, charge as f64, refused, now);
            if !known.is_told() {
                *told = None;
            }
        }
        (None, Some(quota)) => {
            let charged = if refused { 0.0 } else { charge as f64 };
            *told = Told::new(quota, sent_at, charged, since as f64, guesses, now);
        }
        (None, None) => {}
    }
}

#[cfg(test)]
mod tests;
