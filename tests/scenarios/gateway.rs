//! The gateway: quotas, a concurrency cap, what it tells of them, and its bad days. Pure and seeded.

use std::collections::VecDeque;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use weir::openai::headers;

use super::scenario::{Change, Faults, Hints, MILLI, Manner, Nanos, NewLimit, SECOND, Scenario, Shape, Window};

/// What becomes of a request that reaches the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Accepted,
    /// 429, and when it would not be, where the gateway says so.
    Refused {
        hint: Option<Nanos>,
    },
    /// 503.
    Error {
        hint: Option<Nanos>,
    },
    ConnectionRefused,
    Hangs,
    /// Taken in, and then the connection breaks.
    Reset,
    /// A 200 whose stream begins with an error.
    ErrorFirst,
}

/// How a quota and a cap stand against a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fits,
    Capped,
    /// It would fit after so long.
    Exhausted(Nanos),
}

/// What `x-ratelimit-*` say: of requests, and of tokens.
pub type Standing = [Option<headers::Quota>; 2];

pub struct Gateway<'s> {
    scenario: &'s Scenario,
    lanes: Vec<Lane>,
    cap: Option<u32>,
    changes: std::slice::Iter<'s, Change>,
    dice: SmallRng,
}

/// Who shares a quota and the cap.
struct Lane {
    requests: Option<Quota>,
    tokens: Option<Quota>,
    in_flight: u32,
    /// When the next of the others' requests comes.
    next_other: Nanos,
    others: SmallRng,
}

impl<'s> Gateway<'s> {
    pub fn new(scenario: &'s Scenario) -> Self {
        let number = scenario.keys * if scenario.per_model { scenario.models } else { 1 };
        Self {
            scenario,
            lanes: (0..number).map(|index| Lane::new(scenario, u64::from(index))).collect(),
            cap: scenario.cap,
            changes: scenario.changes.iter(),
            dice: SmallRng::seed_from_u64(scenario.seed ^ 0xd1ce),
        }
    }

    /// The lane of this key and model.
    pub fn lane(&self, key: u32, model: u32) -> usize {
        if self.scenario.per_model { (key * self.scenario.models + model) as usize } else { key as usize }
    }

    /// A request arrives; `struck` says how often faults have hit it before.
    pub fn receive(&mut self, lane: usize, tokens: u64, struck: u8, now: Nanos) -> Fate {
        if let Some(manner) = self.outage(now) {
            return match manner {
                Manner::Error(hint) => Fate::Error { hint },
                Manner::RefusesConnections => Fate::ConnectionRefused,
                Manner::Hangs => Fate::Hangs,
            };
        }
        match self.verdict(lane, tokens, now) {
            Verdict::Fits => {}
            Verdict::Capped => return Fate::Refused { hint: None },
            Verdict::Exhausted(wait) => return Fate::Refused { hint: self.hint(lane, wait, now) },
        }
        self.take(lane, tokens, now);
        let fate = self.roll(struck);
        // What breaks at once does not occupy anything.
        self.lanes[lane].in_flight += u32::from(matches!(fate, Fate::Accepted));
        fate
    }

    /// An answer that was accepted has been sent to its end.
    pub fn finish(&mut self, lane: usize) {
        self.lanes[lane].in_flight -= 1;
    }

    /// The `x-ratelimit-*` of an answer that leaves now.
    pub fn standing(&mut self, lane: usize, now: Nanos) -> Standing {
        if !matches!(self.scenario.hints, Hints::OpenAi | Hints::Standing) {
            return [None; 2];
        }
        let Lane { requests, tokens, .. } = &mut self.lanes[lane];
        [requests, tokens].map(|quota| quota.as_mut().map(|quota| quota.standing(now)))
    }

    /// What is left of a lane's quota, of requests or else of tokens.
    pub fn left(&mut self, lane: usize, now: Nanos) -> Option<u64> {
        let Lane { requests, tokens, .. } = &mut self.lanes[lane];
        requests.as_mut().or(tokens.as_mut()).map(|quota| quota.standing(now).remaining)
    }

    /// When a request could be accepted that arrives no sooner than `from`. Where the quota lets it pass, `blocked_until` is
    /// given the cap and the time, and says when to look again if the sender is not within that cap. Time only moves forward
    /// from call to call.
    pub fn earliest(
        &mut self,
        lane: usize,
        tokens: u64,
        from: Nanos,
        mut blocked_until: impl FnMut(Option<u32>, Nanos) -> Option<Nanos>,
    ) -> Nanos {
        let mut at = from;
        loop {
            if let Some(outage) = self.scenario.outage.filter(|outage| (outage.from..outage.to).contains(&at)) {
                at = outage.to;
            }
            let wait = match self.verdict(lane, tokens, at) {
                Verdict::Exhausted(wait) => Some(at + wait),
                Verdict::Fits | Verdict::Capped => blocked_until(self.cap, at),
            };
            let Some(next) = wait else { return at };
            at = self.changes.as_slice().first().map_or(next, |change| next.min(change.at)).max(at + 1);
        }
    }

    /// Charges a request without asking.
    pub fn take(&mut self, lane: usize, tokens: u64, now: Nanos) {
        let Lane { requests, tokens: of_tokens, .. } = &mut self.lanes[lane];
        requests.iter_mut().for_each(|quota| quota.take(1, now));
        of_tokens.iter_mut().for_each(|quota| quota.take(tokens, now));
    }

    /// What is in flight, as the gateway counts it.
    pub fn in_flight(&self, lane: usize) -> u32 {
        self.lanes[lane].in_flight
    }

    fn outage(&self, now: Nanos) -> Option<Manner> {
        self.scenario.outage.filter(|outage| (outage.from..outage.to).contains(&now)).map(|outage| outage.manner)
    }

    fn verdict(&mut self, lane: usize, tokens: u64, now: Nanos) -> Verdict {
        self.change(now);
        let cap = self.cap.unwrap_or(u32::MAX);
        let lane = &mut self.lanes[lane];
        lane.let_others_in(self.scenario.others, now);
        if lane.in_flight >= cap {
            return Verdict::Capped;
        }
        let requests = lane.requests.as_mut().map_or(0, |quota| quota.wait(1, now));
        let tokens = lane.tokens.as_mut().map_or(0, |quota| quota.wait(tokens, now));
        match requests.max(tokens) {
            0 => Verdict::Fits,
            wait => Verdict::Exhausted(wait),
        }
    }

    fn change(&mut self, now: Nanos) {
        while let Some(change) = self.changes.as_slice().first().filter(|change| change.at <= now) {
            self.changes.next();
            match change.to {
                NewLimit::Cap(cap) => self.cap = Some(cap),
                NewLimit::Requests(count) => {
                    let quotas = self.lanes.iter_mut().filter_map(|lane| lane.requests.as_mut());
                    quotas.for_each(|quota| quota.set_count(count, now));
                }
            }
        }
    }

    fn hint(&mut self, lane: usize, wait: Nanos, now: Nanos) -> Option<Nanos> {
        match self.scenario.hints {
            Hints::OpenAi => Some(wait.div_ceil(MILLI) * MILLI),
            Hints::RetryAfter => Some(wait.div_ceil(SECOND) * SECOND),
            // As weir reads it: the reset of what has nothing left.
            Hints::Standing => {
                let exhausted = self.standing(lane, now).into_iter().flatten().filter(|quota| quota.remaining == 0);
                exhausted.map(|quota| quota.reset.as_nanos() as Nanos).max()
            }
            Hints::None => None,
        }
    }

    fn roll(&mut self, struck: u8) -> Fate {
        let Faults { error, reset, error_first } = self.scenario.faults;
        if error + reset + error_first == 0.0 || struck >= Faults::MOST_PER_REQUEST {
            return Fate::Accepted;
        }
        match self.dice.random_range(0.0..1.0) {
            roll if roll < error => Fate::Error { hint: None },
            roll if roll < error + reset => Fate::Reset,
            roll if roll < error + reset + error_first => Fate::ErrorFirst,
            _ => Fate::Accepted,
        }
    }
}

impl Lane {
    fn new(scenario: &Scenario, index: u64) -> Self {
        let mut lane = Self {
            requests: scenario.requests_quota.map(Quota::new),
            tokens: scenario.tokens_quota.map(Quota::new),
            in_flight: 0,
            next_other: 0,
            others: SmallRng::seed_from_u64(scenario.seed ^ 0x07e5 ^ (index << 20)),
        };
        lane.next_other = if scenario.others > 0.0 { lane.pause(scenario.others) } else { Nanos::MAX };
        lane
    }

    /// The others ask whenever they like, and what they get is gone.
    fn let_others_in(&mut self, per_second: f64, now: Nanos) {
        while self.next_other <= now {
            let at = self.next_other;
            if let Some(quota) = &mut self.requests
                && quota.wait(1, at) == 0
            {
                quota.take(1, at);
            }
            self.next_other += self.pause(per_second);
        }
    }

    fn pause(&mut self, per_second: f64) -> Nanos {
        let chance: f64 = self.others.random_range(f64::EPSILON..1.0);
        (-chance.ln() / per_second * SECOND as f64) as Nanos + 1
    }
}

/// One quota, exact to the nanosecond. All that is asked of it is asked in the order of time.
struct Quota {
    shape: Shape,
    state: State,
}

enum State {
    /// In grains, of which a unit has as many as the period has nanoseconds.
    Bucket {
        grains: u128,
        at: Nanos,
    },
    Fixed {
        index: u64,
        used: u64,
    },
    Sliding {
        taken: VecDeque<(Nanos, u64)>,
        used: u64,
    },
}

impl Quota {
    fn new(shape: Shape) -> Self {
        let state = match shape.window {
            Window::Bucket { burst } => State::Bucket { grains: u128::from(burst) * u128::from(shape.period), at: 0 },
            Window::Fixed { .. } => State::Fixed { index: 0, used: 0 },
            Window::Sliding => State::Sliding { taken: VecDeque::new(), used: 0 },
        };
        Self { shape, state }
    }

    /// How long until so many may be taken, if nobody else comes.
    fn wait(&mut self, units: u64, now: Nanos) -> Nanos {
        assert!(units <= self.shape.burst().max(self.shape.count), "it could never be served");
        self.advance(now);
        match &self.state {
            State::Bucket { grains, .. } => {
                let needed = u128::from(units) * u128::from(self.shape.period);
                Self::refill_time(needed.saturating_sub(*grains), self.shape.count)
            }
            State::Fixed { used, .. } if used + units <= self.shape.count => 0,
            State::Fixed { .. } => self.window_end(now) - now,
            State::Sliding { used, .. } if used + units <= self.shape.count => 0,
            State::Sliding { taken, used } => {
                let mut left = *used;
                let frees = taken.iter().find(|(_, units_then)| {
                    left -= units_then;
                    left + units <= self.shape.count
                });
                frees.map_or(self.shape.period, |(at, _)| at + self.shape.period - now)
            }
        }
    }

    fn take(&mut self, units: u64, now: Nanos) {
        self.advance(now);
        match &mut self.state {
            State::Bucket { grains, .. } => {
                *grains = grains.saturating_sub(u128::from(units) * u128::from(self.shape.period));
            }
            State::Fixed { used, .. } => *used += units,
            State::Sliding { taken, used } => {
                taken.push_back((now, units));
                *used += units;
            }
        }
    }

    fn standing(&mut self, now: Nanos) -> headers::Quota {
        self.advance(now);
        let Shape { count, period, .. } = self.shape;
        let (remaining, reset) = match &self.state {
            State::Bucket { grains, .. } => {
                let full = u128::from(self.shape.burst()) * u128::from(period);
                ((*grains / u128::from(period)) as u64, Self::refill_time(full.saturating_sub(*grains), count))
            }
            State::Fixed { used, .. } => (count.saturating_sub(*used), self.window_end(now) - now),
            State::Sliding { taken, used } => {
                (count.saturating_sub(*used), taken.back().map_or(0, |(at, _)| at + period - now))
            }
        };
        headers::Quota { limit: count, remaining, reset: Duration::from_millis(reset.div_ceil(MILLI)) }
    }

    fn set_count(&mut self, count: u64, now: Nanos) {
        self.advance(now);
        self.shape.count = count;
    }

    fn advance(&mut self, now: Nanos) {
        let full = u128::from(self.shape.burst()) * u128::from(self.shape.period);
        match &mut self.state {
            State::Bucket { grains, at } => {
                let refill = u128::from(now.saturating_sub(*at)) * u128::from(self.shape.count);
                *grains = (*grains + refill).min(full);
                *at = now.max(*at);
            }
            State::Fixed { index, used } => {
                let current = window_of(self.shape, now);
                if current > *index {
                    (*index, *used) = (current, 0);
                }
            }
            State::Sliding { taken, used } => {
                while let Some((at, units)) = taken.front()
                    && at + self.shape.period <= now
                {
                    *used -= units;
                    taken.pop_front();
                }
            }
        }
    }

    fn window_end(&self, now: Nanos) -> Nanos {
        let Window::Fixed { phase } = self.shape.window else { unreachable!("only fixed windows end") };
        (window_of(self.shape, now) + 1) * self.shape.period - phase
    }

    fn refill_time(missing: u128, count: u64) -> Nanos {
        missing.div_ceil(u128::from(count)) as Nanos
    }
}

fn window_of(shape: Shape, now: Nanos) -> u64 {
    let Window::Fixed { phase } = shape.window else { unreachable!("only fixed windows are numbered") };
    (now + phase) / shape.period
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Nanos = 60 * SECOND;

    fn taken(shape: Shape, times: usize) -> Quota {
        let mut quota = Quota::new(shape);
        for _ in 0..times {
            assert_eq!(quota.wait(1, 0), 0);
            quota.take(1, 0);
        }
        quota
    }

    fn standing(quota: &mut Quota, now: Nanos) -> (u64, u64) {
        let standing = quota.standing(now);
        (standing.remaining, standing.reset.as_millis() as u64)
    }

    #[test]
    fn a_bucket_refills_one_by_one() {
        let mut quota = taken(Shape::bucket(600, MINUTE, 3), 3);
        assert_eq!(quota.wait(1, 0), 100 * MILLI);
        assert_eq!(quota.wait(2, 99_999_999), 100 * MILLI + 1);
        assert_eq!(standing(&mut quota, 250 * MILLI), (2, 50));
        assert_eq!(standing(&mut quota, MINUTE), (3, 0));
    }

    #[test]
    fn a_fixed_window_begins_anew_at_its_phase() {
        let mut quota = taken(Shape::fixed(3, 10 * SECOND, 4 * SECOND), 3);
        assert_eq!((quota.wait(1, 0), quota.wait(1, 5 * SECOND)), (6 * SECOND, SECOND));
        assert_eq!(standing(&mut quota, 5 * SECOND), (0, 1000));
        assert_eq!(quota.wait(3, 6 * SECOND), 0);
    }

    #[test]
    fn in_a_sliding_window_each_comes_back_a_period_after_it_was_taken() {
        let mut quota = taken(Shape::sliding(3, 10 * SECOND), 2);
        quota.take(1, 4 * SECOND);
        assert_eq!((quota.wait(1, 5 * SECOND), quota.wait(3, 5 * SECOND)), (5 * SECOND, 9 * SECOND));
        assert_eq!(standing(&mut quota, 5 * SECOND), (0, 9000));
        assert_eq!((quota.wait(2, 10 * SECOND), quota.wait(3, 10 * SECOND)), (0, 4 * SECOND));
    }
}
