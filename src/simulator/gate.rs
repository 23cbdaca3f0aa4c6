//! Who may pass: a lane of quotas and slots for each key and model, and the count of all that was decided.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::quota::{Level, Quota};
use super::settings::{QuotaPer, Settings, Window};
use super::stats::Stats;
use crate::config::units::Rate;

pub(super) struct Gate {
    requests: Option<Rate>,
    tokens: Option<Rate>,
    concurrency: usize,
    window: Window,
    quota_per: QuotaPer,
    /// Guards the lanes and the statistics together, so that a snapshot of these agrees with itself.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lanes: HashMap<LaneId, Lane>,
    stats: Stats,
}

/// Lanes are known by a hash: a client chooses the names, and their length is not ours to store.
type LaneId = u64;

/// Clients invent lanes at will; what comes after this many shares one.
const MAX_LANES: usize = 4096;
const SHARED_LANE: LaneId = 0;

struct Lane {
    requests: Option<Quota>,
    tokens: Option<Quota>,
    in_flight: usize,
}

/// What the gate tells of a lane's quotas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) requests: Option<Level>,
    pub(super) tokens: Option<Level>,
}

/// Which limit refused, and how long until it would not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    Requests {
        wait: Duration,
    },
    Tokens {
        wait: Duration,
    },
    /// The request wants more tokens than the quota ever has.
    TooLarge,
    /// Nobody knows when a slot comes free.
    Concurrency,
}

impl Gate {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            requests: settings.requests,
            tokens: settings.tokens,
            concurrency: settings.concurrency.unwrap_or(usize::MAX),
            window: settings.window,
            quota_per: settings.quota_per,
            state: Mutex::default(),
        }
    }

    pub(super) fn stats(&self) -> Stats {
        self.state().stats.clone()
    }

    /// Counts something that is not this gate's own to decide.
    pub(super) fn count(&self, count: impl FnOnce(&mut Stats)) {
        count(&mut self.state().stats);
    }

    /// Lets a request of this many tokens pass, or says why not; either way, how the quotas stand after it.
    pub(super) fn admit(
        self: &Arc<Self>,
        key: &[u8],
        model: &str,
        tokens: u64,
        now: Duration,
    ) -> (Result<Slot, Refusal>, Standing) {
        let mut state = self.state();
        let id = self.lane_id(&state, key, model);
        let lane = state.lanes.entry(id).or_insert_with(|| self.new_lane());
        let verdict = lane.admit(tokens, self.concurrency, now);
        let standing = lane.standing(now);
        state.stats.record(verdict);
        (verdict.map(|()| Slot { gate: Arc::clone(self), lane: id, finished: false }), standing)
    }

    fn lane_id(&self, state: &State, key: &[u8], model: &str) -> LaneId {
        let mut hasher = DefaultHasher::new();
        match self.quota_per {
            QuotaPer::Key => key.hash(&mut hasher),
            QuotaPer::KeyAndModel => (key, model).hash(&mut hasher),
        }
        let id = hasher.finish();
        if state.lanes.len() < MAX_LANES || state.lanes.contains_key(&id) { id } else { SHARED_LANE }
    }

    fn new_lane(&self) -> Lane {
        Lane {
            requests: self.requests.map(|rate| Quota::new(rate, self.window)),
            tokens: self.tokens.map(|rate| Quota::new(rate, self.window)),
            in_flight: 0,
        }
    }

    fn release(&self, lane: LaneId, finished: bool) {
        let mut state = self.state();
        if let Some(lane) = state.lanes.get_mut(&lane) {
            lane.in_flight -= 1;
        }
        state.stats.in_flight -= 1;
        state.stats.cancelled += u64::from(!finished);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The counts are as good as before, should someone have panicked while holding them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lane {
    fn admit(&mut self, tokens: u64, concurrency: usize, now: Duration) -> Result<(), Refusal> {
        if self.in_flight >= concurrency {
            return Err(Refusal::Concurrency);
        }
        let wait =
            |quota: &mut Option<Quota>, units| quota.as_mut().map_or(Some(Duration::ZERO), |q| q.wait(units, now));
        match (wait(&mut self.requests, 1), wait(&mut self.tokens, tokens)) {
            (_, None) | (None, _) => Err(Refusal::TooLarge),
            (Some(wait), _) if !wait.is_zero() => Err(Refusal::Requests { wait }),
            (_, Some(wait)) if !wait.is_zero() => Err(Refusal::Tokens { wait }),
            _ => {
                self.take(tokens);
                Ok(())
            }
        }
    }

    fn take(&mut self, tokens: u64) {
        if let Some(quota) = &mut self.requests {
            quota.take(1);
        }
        if let Some(quota) = &mut self.tokens {
            quota.take(tokens);
        }
        self.in_flight += 1;
    }

    fn standing(&mut self, now: Duration) -> Standing {
        let level = |quota: &mut Option<Quota>| quota.as_mut().map(|quota| quota.level(now));
        Standing { requests: level(&mut self.requests), tokens: level(&mut self.tokens) }
    }
}

impl Stats {
    fn record(&mut self, verdict: Result<(), Refusal>) {
        match verdict {
            Ok(()) => {
                self.accepted += 1;
                self.in_flight += 1;
                self.most_in_flight = self.most_in_flight.max(self.in_flight);
            }
            Err(Refusal::Requests { .. }) => self.refused.requests += 1,
            Err(Refusal::Tokens { .. } | Refusal::TooLarge) => self.refused.tokens += 1,
            Err(Refusal::Concurrency) => self.refused.concurrency += 1,
        }
    }
}

/// An accepted request's place. Dropped before it is finished, it counts as cancelled by the client.
pub(super) struct Slot {
    gate: Arc<Gate>,
    lane: LaneId,
    finished: bool,
}

impl Slot {
    /// Gives the place back: the gateway has done what it would do.
    pub(super) fn finish(mut self) {
        self.finished = true;
    }

    pub(super) fn count_fault(&self, name: &'static str) {
        self.gate.count(|stats| *stats.faults.entry(name).or_default() += 1);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.gate.release(self.lane, self.finished);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn gate(settings: Settings) -> Arc<Gate> {
        Arc::new(Gate::new(&settings))
    }

    fn rate(text: &str, burst: u32) -> Option<Rate> {
        Some(Rate::parse(text).expect(text).with_burst(burst))
    }

    fn refusal(gate: &Arc<Gate>, key: &str, model: &str, tokens: u64) -> Option<Refusal> {
        let (verdict, _) = gate.admit(key.as_bytes(), model, tokens, NOW);
        verdict.map(Slot::finish).err()
    }

    #[test]
    fn a_request_refused_for_its_tokens_costs_no_request() {
        let gate = gate(Settings { requests: rate("60/min", 2), tokens: rate("600/min", 100), ..Settings::default() });
        assert_eq!(refusal(&gate, "a", "m", 60), None);
        assert_eq!(refusal(&gate, "a", "m", 60), Some(Refusal::Tokens { wait: Duration::from_secs(2) }));
        assert_eq!(refusal(&gate, "a", "m", 40), None);
        assert_eq!(refusal(&gate, "a", "m", 0), Some(Refusal::Requests { wait: Duration::from_secs(1) }));
        assert_eq!(refusal(&gate, "a", "m", 101), Some(Refusal::TooLarge));
    }

    #[test]
    fn each_key_and_model_has_its_own_quota_unless_a_key_shares_one() {
        for (quota_per, other_model) in [(QuotaPer::KeyAndModel, true), (QuotaPer::Key, false)] {
            let gate = gate(Settings { requests: rate("1/min", 1), quota_per, ..Settings::default() });
            assert_eq!(refusal(&gate, "a", "m", 0), None);
            assert!(refusal(&gate, "a", "m", 0).is_some());
            assert_eq!(refusal(&gate, "a", "n", 0).is_none(), other_model);
            assert_eq!(refusal(&gate, "b", "m", 0), None);
        }
    }

    #[test]
    fn a_slot_is_taken_until_it_is_finished_or_dropped() {
        let gate = gate(Settings { concurrency: Some(1), ..Settings::default() });
        let (slot, _) = gate.admit(b"a", "m", 0, NOW);
        assert_eq!(refusal(&gate, "a", "m", 0), Some(Refusal::Concurrency));
        drop(slot);
        assert_eq!(refusal(&gate, "a", "m", 0), None);
        let stats = gate.stats();
        assert_eq!((stats.accepted, stats.in_flight, stats.most_in_flight, stats.cancelled), (2, 0, 1, 1));
    }

    #[test]
    fn clients_cannot_grow_the_lanes_without_end() {
        let gate = gate(Settings::default());
        for model in 0..MAX_LANES + 100 {
            assert_eq!(refusal(&gate, "a", &model.to_string(), 0), None);
        }
        assert_eq!(gate.state().lanes.len(), MAX_LANES + 1);
    }
}
