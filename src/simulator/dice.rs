//! Seeded chance: SplitMix64, since what it rolls must stay the same from release to release.
//!
//! A generator from a crate may change its stream with an update, and with it every recorded failure.
//! (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014.)

use std::ops::RangeInclusive;
use std::time::Duration;

pub(super) struct Dice(u64);

impl Dice {
    /// The dice of the `nth` request: independent of what others rolled before.
    pub(super) fn of(seed: u64, nth: u64) -> Self {
        Self(mix(mix(seed) ^ nth))
    }

    pub(super) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Evenly from 0 to just below 1.
    pub(super) fn fraction(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Evenly from the range; a range that is empty gives its start.
    pub(super) fn within(&mut self, range: &RangeInclusive<u32>) -> u32 {
        let count = u64::from(range.end().saturating_sub(*range.start())) + 1;
        // Below `count`, which is at most 2^32: the sum is at most the range's end.
        let step = (self.fraction() * count as f64) as u32;
        range.start().saturating_add(step)
    }

    /// Log-normal about `median`: `sigma` is the standard deviation of the logarithm, and three of it the utmost.
    pub(super) fn spread(&mut self, median: Duration, sigma: f64) -> Duration {
        let radius = (-2.0 * (1.0 - self.fraction()).ln()).sqrt();
        let normal = radius * (std::f64::consts::TAU * self.fraction()).cos();
        let seconds = median.as_secs_f64() * (sigma * normal.clamp(-3.0, 3.0)).exp();
        Duration::try_from_secs_f64(seconds).unwrap_or(median)
    }
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_rolls_the_same_and_another_rolls_otherwise() {
        let roll = |seed, nth| Dice::of(seed, nth).bits();
        assert_eq!(roll(7, 1), roll(7, 1));
        assert_ne!(roll(7, 1), roll(7, 2));
        assert_ne!(roll(7, 1), roll(8, 1));
    }

    #[test]
    fn a_range_is_drawn_to_both_ends_and_never_beyond() {
        let drawn: Vec<u32> = (0..1000).map(|nth| Dice::of(1, nth).within(&(3..=5))).collect();
        assert_eq!(drawn.iter().min(), Some(&3));
        assert_eq!(drawn.iter().max(), Some(&5));
        assert_eq!(Dice::of(1, 1).within(&RangeInclusive::new(9, 2)), 9);
        assert!(Dice::of(1, 1).within(&(0..=u32::MAX)) > 0);
    }

    #[test]
    fn the_median_of_a_spread_is_the_median_and_no_spread_is_exact() {
        let median = Duration::from_millis(300);
        let mut drawn: Vec<Duration> = (0..2001).map(|nth| Dice::of(1, nth).spread(median, 0.3)).collect();
        drawn.sort();
        assert!(drawn[1000].abs_diff(median) < Duration::from_millis(10), "{:?}", drawn[1000]);
        assert!(drawn[2000] <= median.mul_f64((0.9_f64).exp()));
        assert_eq!(Dice::of(1, 1).spread(median, 0.0), median);
        assert!(Dice::of(1, 1).spread(median, f64::INFINITY) <= median);
    }
}
