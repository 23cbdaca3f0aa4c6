//! Whether a lane lets anything through at all: closed by a hint or by the breaker, half-open with one probe, then a ramp.
//!
//! A gateway refuses quickly and accepts slowly: an answer takes as long as the model does. So nothing here waits to hear that
//! a probe was accepted. When twice the time has passed that refusals have taken so far, silence counts as acceptance.

use std::time::Duration;

use tokio::time::Instant;

/// A new lane's first requests are this far apart, unless all before were heard of: whoever has no quota at all is told so by the first refusal, not by the
/// tenth.
const COLD_SPACING: Duration = Duration::from_millis(20);

/// How many are sent like that.
const COLD_REQUESTS: u32 = 10;

/// How long silence has to last before it counts as acceptance: twice what refusals took, within these.
const QUIET: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

/// The same while the gateway fails: it fails in more ways than it refuses.
const QUIET_IN_TROUBLE: Duration = Duration::from_millis(200);

/// A gateway whose failures take longer has to be heard before anything is concluded.
const SLOW_FAILURE: Duration = Duration::from_millis(500);

/// The newest refusal weighs 1 in so many.
const LATENCY_WEIGHT: u32 = 8;

/// Where the ramp begins after an outage.
const AFTER_TROUBLE: u32 = 8;

/// After so many requests that went well a ramp is over.
const RAMP_REQUESTS: u32 = 256;

/// A lane whose probes are refused one after the other stays closed for at least this long, doubled each time up to the
/// bound, whatever short time the gateway names.
const LEAST_CLOSURE: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(8)];

/// Failures in a row that open the breaker, if they are most of what was sent since the first of them.
const FAILURES: u32 = 5;

/// From one probe to the next while the breaker is open: traffic is to be back within two seconds of an outage's end.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// One attempt, as the valve knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passage {
    /// The attempt's number in its lane.
    pub number: u64,
    pub sent_at: Instant,
}

/// Why a valve is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A quota is used up.
    Quota,
    /// The gateway has too much to do.
    Overload,
    /// The gateway fails.
    Breaker,
    /// It refuses everything, and does not say for how long.
    Silence,
}

/// A lane's valve.
#[derive(Debug)]
pub struct Valve {
    state: State,
    /// When it was opened last; what was sent before says nothing about the time since.
    opened_at: Instant,
    /// How long refusals, or failures, take to come.
    refusal_time: Option<Duration>,
    failure_time: Option<Duration>,
    /// The last probe, and how many in a row were refused.
    probe: u64,
    refused_probes: u32,
    trouble: Option<Trouble>,
    /// Of unbroken failure: then everyone is refused at once.
    give_up: Duration,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Open,
    /// Until then; whoever passes first after that is the probe.
    Closed {
        until: Instant,
        why: Why,
    },
    Probing {
        probe: Passage,
        why: Why,
    },
    Ramp(Ramp),
}

#[derive(Debug, Clone, Copy)]
struct Ramp {
    next_at: Instant,
    sent: u32,
    pace: RampPace,
}

#[derive(Debug, Clone, Copy)]
enum RampPace {
    Cold,
    /// Twice as many in each such time.
    Doubling(Duration),
}

/// Failures without an acceptance between.
#[derive(Debug, Clone, Copy)]
struct Trouble {
    since: Instant,
    /// The lane's last attempt before it, and the last that failed.
    before: u64,
    last: u64,
    failures: u32,
    /// When the last was heard of.
    last_at: Instant,
    /// The breaker has opened.
    opened: bool,
}

impl Valve {
    /// Open; `cold` says that nothing is known of the gateway, and that its first requests are to be told apart.
    pub fn new(cold: bool, give_up: Duration, now: Instant) -> Self {
        let state = if cold { State::Ramp(Ramp { next_at: now, sent: 0, pace: RampPace::Cold }) } else { State::Open };
        let (refusal_time, failure_time) = (None, None);
        Self { state, opened_at: now, refusal_time, failure_time, probe: 0, refused_probes: 0, trouble: None, give_up }
    }

    /// Changes after how long everyone is refused at once. A failure under way has lasted as long as it has.
    pub fn set_give_up(&mut self, give_up: Duration) {
        self.give_up = give_up;
    }

    /// Whether one may pass now.
    pub fn is_open(&self, now: Instant) -> bool {
        match self.opens_at() {
            None => false,
            Some(at) => at <= now,
        }
    }

    /// When the next may pass; `None` where that depends on what becomes of the probe. Open valves name a time in the past.
    pub fn opens_at(&self) -> Option<Instant> {
        match self.state {
            State::Open => Some(self.opened_at),
            State::Closed { until, .. } => Some(until),
            State::Probing { probe, why } => self.quiet(why).map(|quiet| probe.sent_at + quiet),
            State::Ramp(ramp) => Some(ramp.next_at),
        }
    }

    /// Whether the next to pass is a probe.
    pub fn is_half_open(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    /// Whether it waits for nothing but to hear of those that have passed.
    pub fn is_cold(&self) -> bool {
        matches!(self.state, State::Ramp(Ramp { pace: RampPace::Cold, .. }))
    }

    /// Why it is closed, where it is.
    pub fn closed_by(&self, now: Instant) -> Option<Why> {
        match self.state {
            State::Closed { why, .. } | State::Probing { why, .. } if !self.is_open(now) => Some(why),
            _ => None,
        }
    }

    /// How long it stays closed from now.
    pub fn cooldown(&self, now: Instant) -> Duration {
        match self.state {
            State::Closed { until, .. } => until.saturating_duration_since(now),
            _ => Duration::ZERO,
        }
    }

    /// How long refusals take to come.
    pub fn refusal_time(&self) -> Option<Duration> {
        self.refusal_time
    }

    /// When it was opened last.
    pub fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// Lets one pass, which has been seen to be possible; where it is a probe, says of what.
    pub fn pass(&mut self, passage: Passage) -> Option<Why> {
        let now = passage.sent_at;
        match self.state {
            State::Open => None,
            State::Closed { why, .. } => {
                (self.opened_at, self.probe) = (now, passage.number);
                self.state = State::Probing { probe: passage, why };
                Some(why)
            }
            State::Probing { why, .. } => {
                // Nothing was heard of the probe: it was accepted.
                let doubling = self.quiet(why).unwrap_or(QUIET_IN_TROUBLE);
                let mut ramp = Ramp { next_at: now, sent: 1, pace: RampPace::Doubling(doubling) };
                ramp.step(now);
                self.state = State::Ramp(ramp);
                None
            }
            State::Ramp(mut ramp) => {
                ramp.step(now);
                self.state = if ramp.is_over() { State::Open } else { State::Ramp(ramp) };
                None
            }
        }
    }

    /// An attempt was accepted.
    pub fn accepted(&mut self, passage: Passage, now: Instant) {
        let Some(trouble) = self.trouble else { return self.accepted_at_peace(passage) };
        if !trouble.opened && passage.number > trouble.before {
            self.trouble = None;
        } else if trouble.opened && passage.number > trouble.last {
            // Those who have waited meanwhile come one after the other, if quickly.
            self.trouble = None;
            self.opened_at = now;
            let pace = RampPace::Doubling(QUIET_IN_TROUBLE / 2);
            self.state = State::Ramp(Ramp { next_at: now, sent: AFTER_TROUBLE, pace });
        }
    }

    fn accepted_at_peace(&mut self, passage: Passage) {
        let is_opening = match self.state {
            State::Probing { .. } => true,
            State::Ramp(ramp) => matches!(ramp.pace, RampPace::Doubling(_)) && ramp.sent < AFTER_TROUBLE,
            State::Open | State::Closed { .. } => false,
        };
        if passage.sent_at >= self.opened_at && is_opening {
            self.state = State::Open;
            self.refused_probes = 0;
        }
    }

    /// An attempt was refused, for so long if the gateway says how long.
    pub fn refused(&mut self, passage: Passage, now: Instant) {
        let took = now.saturating_duration_since(passage.sent_at);
        self.refusal_time = Some(smooth(self.refusal_time, took));
    }

    /// Nothing passes for so long, and then a probe.
    pub fn close(&mut self, passage: Passage, hint: Duration, why: Why, now: Instant) {
        let [least, most] = LEAST_CLOSURE;
        if matches!(self.state, State::Closed { .. }) {
            // Of the same burst as the one that closed it.
        } else if self.probe == passage.number {
            self.refused_probes += 1;
        } else {
            self.refused_probes = 0;
        }
        let least = match self.refused_probes {
            0 => Duration::ZERO,
            times => (least * 2u32.pow(times.min(10) - 1)).min(most),
        };
        let until = now + hint.max(least);
        self.state = match self.state {
            State::Closed { until: other, why } if other > until => State::Closed { until: other, why },
            _ => State::Closed { until, why },
        };
    }

    /// Nothing passes before then.
    pub fn close_until(&mut self, until: Instant, now: Instant) {
        let sooner = match self.state {
            State::Closed { until: other, .. } => other < until,
            // A gateway that fails is not to be tried more often for it.
            State::Probing { why, .. } => why != Why::Breaker,
            State::Open | State::Ramp(_) => true,
        };
        if sooner && until > now {
            let why = if let State::Closed { why, .. } = self.state { why } else { Why::Quota };
            self.state = State::Closed { until, why };
        }
    }

    /// An attempt failed, and nobody knows why. `sent` is the number of the lane's last attempt so far.
    pub fn failed(&mut self, passage: Passage, sent: u64, now: Instant) {
        let took = now.saturating_duration_since(passage.sent_at);
        self.failure_time = Some(smooth(self.failure_time, took));
        let before = passage.number.saturating_sub(1);
        let trouble = self.trouble_with(passage, now);
        if passage.number <= trouble.before {
            trouble.before = before;
        }
        trouble.failures += 1;
        let most = u64::from(trouble.failures) * 5 >= 4 * (sent - trouble.before);
        if trouble.opened {
            // What was under way when it opened fails too; a probe that fails closes it again.
            if passage.sent_at >= self.opened_at {
                self.state = State::Closed { until: now + PROBE_INTERVAL, why: Why::Breaker };
            }
        } else if trouble.failures >= FAILURES && most {
            trouble.opened = true;
            self.state = State::Closed { until: now + PROBE_INTERVAL, why: Why::Breaker };
            self.opened_at = now + PROBE_INTERVAL;
        }
    }

    /// An attempt was answered that the gateway has too much to do.
    pub fn overloaded(&mut self, passage: Passage, now: Instant) {
        self.trouble_with(passage, now).opened = true;
    }

    /// The trouble that this attempt is part of. Failures long ago are another.
    fn trouble_with(&mut self, passage: Passage, now: Instant) -> &mut Trouble {
        let give_up = self.give_up;
        self.trouble = self.trouble.filter(|trouble| now.saturating_duration_since(trouble.last_at) <= give_up);
        let before = passage.number.saturating_sub(1);
        let new = Trouble { since: now, before, last: 0, failures: 0, last_at: now, opened: false };
        let trouble = self.trouble.get_or_insert(new);
        trouble.last_at = now;
        trouble.last = trouble.last.max(passage.number);
        trouble
    }

    /// An attempt has come to nothing: its client went away, or it was never sent.
    pub fn abandoned(&mut self, passage: Passage, now: Instant) {
        if let State::Probing { probe, why } = self.state
            && probe.number == passage.number
        {
            self.state = State::Closed { until: now, why };
        }
    }

    /// When everyone is refused at once, should the gateway fail until then.
    pub fn gives_up_at(&self) -> Option<Instant> {
        self.trouble.filter(|trouble| trouble.opened).map(|trouble| trouble.since + self.give_up)
    }

    /// Whether that time has come, and the gateway was seen to fail of late.
    pub fn has_given_up(&self, now: Instant) -> bool {
        let of_late =
            self.trouble.is_some_and(|trouble| now.saturating_duration_since(trouble.last_at) <= self.give_up);
        of_late && self.gives_up_at().is_some_and(|at| at <= now)
    }

    /// Silence for longer than that means acceptance; `None` where it means nothing.
    pub fn quiet(&self, why: Why) -> Option<Duration> {
        let [least, most] = QUIET;
        match why {
            Why::Quota | Why::Overload | Why::Silence => {
                Some(self.refusal_time.map_or(most / 10, |time| (2 * time).clamp(least, most)))
            }
            Why::Breaker => {
                let time = self.failure_time.filter(|time| *time <= SLOW_FAILURE)?;
                Some((2 * time).max(QUIET_IN_TROUBLE))
            }
        }
    }
}

impl Ramp {
    fn step(&mut self, now: Instant) {
        self.sent += 1;
        let step = match self.pace {
            RampPace::Cold => COLD_SPACING,
            RampPace::Doubling(time) => time.mul_f64(std::f64::consts::LN_2) / self.sent,
        };
        self.next_at = super::step_from(self.next_at, step, now);
    }

    fn is_over(&self) -> bool {
        match self.pace {
            RampPace::Cold => self.sent >= COLD_REQUESTS,
            RampPace::Doubling(_) => self.sent >= RAMP_REQUESTS,
        }
    }
}

fn smooth(mean: Option<Duration>, newest: Duration) -> Duration {
    mean.map_or(newest, |mean| (mean * (LATENCY_WEIGHT - 1) + newest) / LATENCY_WEIGHT)
}

#[cfg(test)]
mod tests;
