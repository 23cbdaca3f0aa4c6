//! All that chance decides for one request, drawn at once and in one order, so that nothing the request does can shift
//! what the next one meets.

use std::time::Duration;

use super::dice::Dice;
use super::fault::Fault;
use super::settings::Settings;

/// No answer is longer, whatever the settings say: a document is made in memory.
const MAX_OUTPUT_TOKENS: u32 = 1_000_000;

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fate {
    pub(super) fault: Option<Fault>,
    /// The time to the first token.
    pub(super) first_token: Duration,
    /// The tokens it would say if nothing capped it; never 0.
    pub(super) output_tokens: u32,
    /// Where in the answer a fault strikes, from 0 to just below 1.
    pub(super) breaking_point: f64,
    pub(super) id: u64,
}

impl Fate {
    /// What awaits the `nth` request.
    pub(super) fn of(settings: &Settings, nth: u64) -> Self {
        let mut dice = Dice::of(settings.seed, nth);
        Self {
            fault: Fault::drawn(&settings.faults, dice.fraction()),
            first_token: dice.spread(settings.first_token, settings.spread),
            output_tokens: dice.within(&settings.output_tokens).clamp(1, MAX_OUTPUT_TOKENS),
            breaking_point: dice.fraction(),
            id: dice.bits(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_number_make_the_same_fate() {
        let faults = vec![(Fault::ServerError, 0.3), (Fault::CutEvent, 0.3)];
        let fates = |seed| -> Vec<Fate> {
            let settings = Settings { seed, faults: faults.clone(), ..Settings::default() };
            (0..50).map(|nth| Fate::of(&settings, nth)).collect()
        };
        assert_eq!(fates(1), fates(1));
        assert_ne!(fates(1), fates(2));
    }

    #[test]
    fn a_fault_strikes_as_often_as_it_is_probable() {
        let settings = Settings { faults: vec![(Fault::ServerError, 0.2)], ..Settings::default() };
        let struck = (0..10_000).filter(|nth| Fate::of(&settings, *nth).fault.is_some()).count();
        assert!((1850..2150).contains(&struck), "{struck}");
    }
}
