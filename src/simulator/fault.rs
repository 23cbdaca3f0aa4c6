//! The ways in which a gateway fails, each by its name.

use std::fmt;

/// A way in which the simulated gateway fails a request that its quota let pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A 429 out of the blue, with `retry-after-ms`.
    TooManyWithMillis,
    /// A 429 out of the blue, with `retry-after` in whole seconds.
    TooManyWithSeconds,
    /// A 429 out of the blue, with `retry-after` as an HTTP date.
    TooManyWithDate,
    /// A 429 out of the blue that says nothing of when to come back.
    TooManyWithoutHint,
    /// A 429 that is about money (`insufficient_quota`): waiting does not help.
    InsufficientQuota,
    /// A 500.
    ServerError,
    /// A 503.
    Unavailable,
    /// A 529, "overloaded".
    Overloaded,
    /// The connection is reset before a byte of the answer.
    ResetBeforeAnswer,
    /// The connection is reset in the middle: of a stream after a whole event, else at half the body.
    ResetInAnswer,
    /// Not a byte of an answer, until the client goes or ten minutes have passed.
    StallBeforeAnswer,
    /// Silence in the middle of the answer, until the client goes or ten minutes have passed.
    StallInAnswer,
    /// A stream whose status is 200 and whose first event is an error.
    ErrorEvent,
    /// A stream that ends as if all were well, after a whole event, but too early and without its last one.
    TruncatedStream,
    /// A stream whose connection is reset in the middle of an event.
    CutEvent,
}

impl Fault {
    /// All faults.
    pub const ALL: [Self; 15] = [
        Self::TooManyWithMillis,
        Self::TooManyWithSeconds,
        Self::TooManyWithDate,
        Self::TooManyWithoutHint,
        Self::InsufficientQuota,
        Self::ServerError,
        Self::Unavailable,
        Self::Overloaded,
        Self::ResetBeforeAnswer,
        Self::ResetInAnswer,
        Self::StallBeforeAnswer,
        Self::StallInAnswer,
        Self::ErrorEvent,
        Self::TruncatedStream,
        Self::CutEvent,
    ];

    /// The fault's name on the command line and in the statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooManyWithMillis => "429-retry-after-ms",
            Self::TooManyWithSeconds => "429-retry-after",
            Self::TooManyWithDate => "429-http-date",
            Self::TooManyWithoutHint => "429-no-hint",
            Self::InsufficientQuota => "insufficient-quota",
            Self::ServerError => "500",
            Self::Unavailable => "503",
            Self::Overloaded => "529",
            Self::ResetBeforeAnswer => "reset-before-answer",
            Self::ResetInAnswer => "reset-in-answer",
            Self::StallBeforeAnswer => "stall-before-answer",
            Self::StallInAnswer => "stall-in-answer",
            Self::ErrorEvent => "error-event",
            Self::TruncatedStream => "truncated-stream",
            Self::CutEvent => "cut-event",
        }
    }

    /// The fault of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    /// Whether it takes a stream to fail like this.
    pub(super) fn is_of_streams(self) -> bool {
        matches!(self, Self::ErrorEvent | Self::TruncatedStream | Self::CutEvent)
    }

    /// The fault that a `roll` from 0 to below 1 hits, where each takes up as much room as it is probable.
    pub(super) fn drawn(faults: &[(Self, f64)], roll: f64) -> Option<Self> {
        let mut sum = 0.0;
        let hit = faults.iter().find(|(_, probability)| {
            sum += probability;
            roll < sum
        });
        hit.map(|(fault, _)| *fault)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_found_by_its_name() {
        for fault in Fault::ALL {
            assert_eq!(Fault::named(fault.name()), Some(fault));
        }
        assert_eq!(Fault::named("404"), None);
    }

    #[test]
    fn a_roll_hits_each_fault_in_its_share_and_none_beyond() {
        let faults = [(Fault::ServerError, 0.25), (Fault::CutEvent, 0.5)];
        assert_eq!(Fault::drawn(&faults, 0.0), Some(Fault::ServerError));
        assert_eq!(Fault::drawn(&faults, 0.25), Some(Fault::CutEvent));
        assert_eq!(Fault::drawn(&faults, 0.75), None);
        assert_eq!(Fault::drawn(&[(Fault::CutEvent, 1.0)], 0.999_999), Some(Fault::CutEvent));
    }
}
