//! The semaphore: how many requests may be under way at once, and how long each stays.

use std::time::Duration;

/// A number of slots; a request holds one from before it is sent until the last byte of its answer.
#[derive(Debug)]
pub struct Slots {
    limit: u32,
    in_use: u32,
    /// Moving average of how long a slot is held; `None` before the first was given back.
    mean_hold: Option<Duration>,
}

/// The newest hold weighs 1 in so many.
const HOLD_WEIGHT: u32 = 16;

/// How long a slot is taken to be held before the first was given back: no prediction, but better than to tell the refused
/// to come back at once.
const UNKNOWN_HOLD: Duration = Duration::from_secs(1);

/// Holds vary with the length of the answers. That work goes on more than this many times faster than of late is taken
/// to be impossible when a request is refused on arrival.
const FASTEST: u32 = 4;

impl Slots {
    /// `limit` free slots; never 0.
    pub fn new(limit: u32) -> Self {
        Self { limit: limit.max(1), in_use: 0, mean_hold: None }
    }

    /// How many there are.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Changes how many there are; never 0. More may be taken than there are then, and none is until enough came back.
    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit.max(1);
    }

    /// From now on so many are taken, whoever has taken them; there may be fewer.
    pub fn set_in_use(&mut self, in_use: u32) {
        self.in_use = in_use;
    }

    /// How many are taken.
    pub fn in_use(&self) -> u32 {
        self.in_use
    }

    /// How many more are taken than there are: with a limit that is only observed.
    pub fn beyond(&self) -> u64 {
        u64::from(self.in_use.saturating_sub(self.limit))
    }

    /// Whether one can be taken.
    pub fn has_room(&self) -> bool {
        self.in_use < self.limit
    }

    /// Takes one; the caller has seen that there is room.
    pub fn take(&mut self) {
        self.in_use += 1;
    }

    /// Gives one back that was held for so long.
    pub fn give_back(&mut self, held: Duration) {
        debug_assert!(self.in_use > 0, "a slot is given back once");
        self.in_use = self.in_use.saturating_sub(1);
        self.mean_hold = Some(match self.mean_hold {
            None => held,
            Some(mean) => (mean * (HOLD_WEIGHT - 1) + held) / HOLD_WEIGHT,
        });
    }

    /// Gives one back that says nothing about how long they are held.
    pub fn give_back_unused(&mut self) {
        debug_assert!(self.in_use > 0, "a slot is given back once");
        self.in_use = self.in_use.saturating_sub(1);
    }

    /// How long until the `n`-th slot from now (from 1) is free, going by how long they were held of late.
    pub fn expected_wait(&self, n: u64) -> Duration {
        let free = u64::from(self.limit.saturating_sub(self.in_use));
        let turnovers = u32::try_from(n.saturating_sub(free)).unwrap_or(u32::MAX);
        self.turnover().saturating_mul(turnovers)
    }

    /// How soon the `n`-th slot from now could be free at the very best.
    pub fn shortest_wait(&self, n: u64) -> Duration {
        // Nobody is refused on a guess.
        if self.mean_hold.is_some() { self.expected_wait(n) / FASTEST } else { Duration::ZERO }
    }

    /// The mean time between two slots becoming free while all are taken.
    pub fn turnover(&self) -> Duration {
        self.mean_hold.unwrap_or(UNKNOWN_HOLD) / self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_taken_and_given_back() {
        let mut slots = Slots::new(2);
        slots.take();
        assert!(slots.has_room());
        slots.take();
        assert!(!slots.has_room());
        slots.give_back(Duration::from_secs(1));
        assert_eq!((slots.has_room(), slots.in_use(), slots.limit()), (true, 1, 2));
    }

    #[test]
    fn there_can_be_fewer_than_are_taken() {
        let mut slots = Slots::new(3);
        (0..3).for_each(|_| slots.take());
        slots.set_limit(1);
        assert_eq!((slots.has_room(), slots.beyond()), (false, 2));
        (0..2).for_each(|_| slots.give_back(Duration::from_secs(1)));
        assert!(!slots.has_room());
        slots.give_back(Duration::from_secs(1));
        assert!(slots.has_room());
    }

    #[test]
    fn the_wait_is_expected_from_how_long_slots_were_held() {
        let mut slots = Slots::new(2);
        slots.take();
        slots.take();
        assert_eq!(slots.shortest_wait(100), Duration::ZERO, "nothing is known yet");
        assert_eq!(slots.expected_wait(2), Duration::from_secs(1));
        slots.give_back(Duration::from_secs(4));
        slots.take();
        assert_eq!(slots.expected_wait(3), Duration::from_secs(6));
        assert!(slots.shortest_wait(3) < slots.expected_wait(3));
    }
}
