//! What there is to see of a pace: for operators, who want to know what was learned, and what holds requests up.

use super::*;

/// A pace at one moment.
#[derive(Debug, Clone, Copy)]
pub struct PaceView {
    pub in_flight: u32,
    /// Adaptive slots, where the lane has them.
    pub slots: Option<SlotsView>,
    /// Quotas that the gateway tells.
    pub requests: Option<ToldView>,
    pub tokens: Option<ToldView>,
    /// Requests a second in the long run, where weir has inferred a quota from refusals.
    pub inferred_per_second: Option<f64>,
    /// Why nothing passes now, and for how long at least.
    pub closed: Option<(Why, Duration)>,
    /// How long the gateway has failed, while the breaker holds requests back for it.
    pub failing_for: Option<Duration>,
    /// When all who wait are refused, should it go on; zero once they are.
    pub gives_up_in: Option<Duration>,
}

/// Adaptive slots at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotsView {
    pub limit: u32,
    /// However well all goes, there are no more.
    pub most: u32,
    /// More are tried all the time, since no refusal has stopped it of late.
    pub growing: bool,
}

/// What of a pace holds a request up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// The valve is closed.
    Closed(Why),
    /// The valve has just been opened, or the lane is new: requests go one after the other.
    Ramp,
    /// A quota of requests, or of tokens, that the gateway tells.
    ToldRequests,
    ToldTokens,
    /// A quota that weir has inferred.
    Inferred,
    /// All adaptive slots are taken.
    Slots,
}

impl Pace {
    /// How it stands.
    pub fn view(&self, now: Instant) -> PaceView {
        let slots = self.slots.as_ref().map(|slots| SlotsView {
            limit: slots.slots().limit(),
            most: slots.most(),
            growing: slots.is_growing(),
        });
        let failing_since = self.valve.failing_since(now);
        let gives_up_at = self.valve.gives_up_at().filter(|_| failing_since.is_some());
        PaceView {
            in_flight: self.in_flight,
            slots,
            requests: self.requests.as_ref().map(|told| told.view(now)),
            tokens: self.tokens.as_ref().map(|told| told.view(now)),
            inferred_per_second: self.inferred.as_ref().map(Inferred::per_second),
            closed: self.valve.closed_by(now).map(|why| (why, self.valve.cooldown(now))),
            failing_for: failing_since.map(|since| now.saturating_duration_since(since)),
            gives_up_in: gives_up_at.map(|at| at.saturating_duration_since(now)),
        }
    }

    /// What holds a request of that many tokens up; whatever does so longest, where it is more than one thing.
    pub fn hold(&self, tokens: u64, now: Instant) -> Option<Hold> {
        if let Some(why) = self.valve.closed_by(now) {
            return Some(Hold::Closed(why));
        }
        let told = |told: &Option<Told>, charge: u64| {
            told.as_ref().filter(|_| charge > 0).map(|told| told.opens_at(charge as f64, now))
        };
        let slots = self.slots.as_ref().map_or(Some(now), |slots| slots.opens_at(now));
        let ramp = if self.valve.is_cold() && self.unheard.is_empty() { Some(now) } else { self.valve.opens_at() };
        let inferred = self.inferred.as_ref().filter(|_| !self.valve.is_half_open());
        let holds = [
            (Hold::ToldRequests, told(&self.requests, 1)),
            (Hold::ToldTokens, told(&self.tokens, tokens)),
            (Hold::Inferred, inferred.map(|inferred| inferred.opens_at(now))),
            (Hold::Ramp, ramp),
        ];
        let longest = holds.iter().filter_map(|(hold, at)| Some((*at.as_ref().filter(|at| **at > now)?, *hold)));
        match (slots, longest.max_by_key(|(at, _)| *at)) {
            (None, _) => Some(Hold::Slots),
            (Some(at), Some((longest, hold))) if longest >= at => Some(hold),
            (Some(at), _) => (at > now).then_some(Hold::Slots),
        }
    }
}
