//! How much of a charge can still be given back, so that giving back never lets through more than if it had not been taken.
//!
//! A bucket that is full forgets: had an early charge never been made, it would have been full all the same when the next
//! came, and nothing would be left of the refund. So of a refund only so much counts as the bucket was short of full at
//! every charge since. That is the least of a suffix of charges; kept as the *suffix minima* (a monotone deque), it takes a
//! binary search to find, and the result is the same as replaying every charge without the refunded part.

use std::collections::VecDeque;

/// Charges in the order in which they were made, over all buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChargeNo(pub u64);

/// Minima kept. Beyond it the two oldest become one, which can only make a refund smaller.
const MAX_MINIMA: usize = 64;

/// By how much a bucket was short of full, in nanoseconds of refill, at each charge that matters.
#[derive(Debug, Default)]
pub struct Slack {
    /// Ascending in both: each is the least shortage from its charge on.
    minima: VecDeque<(ChargeNo, u64)>,
}

impl Slack {
    /// A charge found the bucket short of full by so much.
    pub fn note(&mut self, charge: ChargeNo, short_of_full: u64) {
        while self.minima.back().is_some_and(|(_, least)| *least >= short_of_full) {
            self.minima.pop_back();
        }
        self.minima.push_back((charge, short_of_full));
        if self.minima.len() > MAX_MINIMA
            && let Some((_, least)) = self.minima.pop_front()
            && let Some(oldest) = self.minima.front_mut()
        {
            oldest.1 = least;
        }
    }

    /// The time for what a bucket is short of has changed.
    pub fn rescale(&mut self, rescale: impl Fn(u64) -> u64) {
        for (_, least) in &mut self.minima {
            *least = rescale(*least);
        }
    }

    /// How much of `wanted` counts when it is given back of that charge; from then on the bucket is less short by as much.
    pub fn give_back(&mut self, charge: ChargeNo, wanted: u64) -> u64 {
        let later = self.minima.partition_point(|(at, _)| *at <= charge);
        let Some((_, least)) = self.minima.get(later).copied() else { return wanted };
        let given = wanted.min(least);
        for (_, minimum) in self.minima.range_mut(later..) {
            *minimum -= given;
        }
        let still = self.minima.partition_point(|(at, minimum)| *at <= charge && *minimum < least - given);
        self.minima.drain(still..later);
        given
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    /// Every charge ever made, replayed from the start.
    #[derive(Default)]
    struct Replay {
        charges: Vec<(u64, u64)>,
    }

    impl Replay {
        /// When the bucket would be full again.
        fn full_at(&self) -> u64 {
            self.charges.iter().fold(0, |full_at: u64, (at, cost)| full_at.max(*at) + cost)
        }
    }

    #[test]
    fn refunds_leave_what_a_replay_without_the_refunded_part_leaves() {
        for seed in 0..500 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut replay, mut slack, mut full_at, mut now) = (Replay::default(), Slack::default(), 0u64, 0u64);
            for step in 0..200 {
                now += rng.random_range(0..30);
                if rng.random_bool(0.6) || replay.charges.is_empty() {
                    let cost = rng.random_range(1..40);
                    slack.note(ChargeNo(replay.charges.len() as u64), full_at.saturating_sub(now));
                    replay.charges.push((now, cost));
                    full_at = full_at.max(now) + cost;
                } else {
                    let charge = rng.random_range(replay.charges.len().saturating_sub(20)..replay.charges.len());
                    let wanted = rng.random_range(0..=replay.charges[charge].1);
                    replay.charges[charge].1 -= wanted;
                    full_at -= slack.give_back(ChargeNo(charge as u64), wanted);
                }
                // A bucket that is full is full, however long ago.
                assert_eq!(full_at.max(now), replay.full_at().max(now), "seed {seed}, step {step}");
            }
        }
    }

    #[test]
    fn minima_are_bounded_and_their_loss_only_lessens_refunds() {
        let mut slack = Slack::default();
        for number in 0..10_000 {
            slack.note(ChargeNo(number), 1000 + number);
            assert!(slack.minima.len() <= MAX_MINIMA);
        }
        assert!(slack.give_back(ChargeNo(0), 5000) <= 1001);
        assert_eq!(slack.give_back(ChargeNo(9_999), 5000), 5000, "nobody came after the last");
    }
}
