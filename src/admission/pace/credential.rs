//! Whether a quota is a model's own or the credential's, for all its models together.
//!
//! When one lane has been refused until a certain time, what becomes of the other lanes' attempts until then tells: if they are
//! refused too, again and again, the quota is the credential's. If they are accepted, it is not.

use std::time::Duration;

use tokio::time::Instant;

/// So many refusals of other lanes while one was refused, none accepted between, and the quota is shared.
const AGREED: u32 = 3;

/// So many accepted, and it is not.
const DISAGREED: u32 = 2;

/// Attempts sent closer together than this may have reached the gateway in any order.
const SURE: Duration = Duration::from_millis(20);

/// What the lanes of one credential have in common.
#[derive(Debug, Default)]
pub struct Credential {
    shared: bool,
    agreed: u32,
    disagreed: u32,
    closing: Option<Closing>,
}

/// A lane that was refused until some time.
#[derive(Debug, Clone, Copy)]
struct Closing {
    lane: usize,
    from: Instant,
    until: Instant,
}

impl Credential {
    /// Whether its models share a quota.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// An attempt of this lane was refused until then.
    pub fn refused(&mut self, lane: usize, sent_at: Instant, until: Instant) {
        if self.closing.is_some_and(|closing| closing.concerns(lane, sent_at)) {
            self.agreed += 1;
            self.disagreed = 0;
            self.shared |= self.agreed >= AGREED;
        }
        if self.closing.is_none_or(|closing| closing.lane == lane || closing.until < sent_at) {
            self.closing = Some(Closing { lane, from: sent_at, until });
        }
    }

    /// An attempt of this lane was accepted.
    pub fn accepted(&mut self, lane: usize, sent_at: Instant) {
        if !self.closing.is_some_and(|closing| closing.concerns(lane, sent_at)) {
            return;
        }
        self.agreed = 0;
        self.disagreed += 1;
        self.shared &= self.disagreed < DISAGREED;
    }
}

impl Closing {
    /// Whether an attempt sent then tells something about this: another lane's, at a time when this one's would be refused.
    fn concerns(&self, lane: usize, sent_at: Instant) -> bool {
        lane != self.lane && sent_at > self.from + SURE && sent_at < self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn models_that_are_refused_together_share_a_quota() {
        let (start, mut credential) = (Instant::now(), Credential::default());
        for round in 0..4 {
            let at = start + 1000 * round * MILLI;
            credential.refused(0, at, at + 900 * MILLI);
            credential.refused(1, at + 50 * MILLI, at + 900 * MILLI);
            assert_eq!(credential.is_shared(), round >= 2, "{round}");
        }
    }

    #[test]
    fn models_of_which_one_is_served_while_the_other_is_refused_do_not() {
        let (start, mut credential) = (Instant::now(), Credential::default());
        for round in 0..100 {
            let at = start + 1000 * round * MILLI;
            credential.refused(0, at, at + 900 * MILLI);
            credential.accepted(1, at + 40 * MILLI);
            credential.refused(1, at + 50 * MILLI, at + 900 * MILLI);
        }
        assert!(!credential.is_shared());
    }

    #[test]
    fn what_turns_out_not_to_be_shared_is_not_for_long() {
        let (start, mut credential) = (Instant::now(), Credential { shared: true, ..Credential::default() });
        for round in 0..2 {
            let at = start + 1000 * round * MILLI;
            credential.refused(0, at, at + 900 * MILLI);
            credential.accepted(1, at + 40 * MILLI);
        }
        assert!(!credential.is_shared());
    }

    #[test]
    fn attempts_that_may_have_come_before_the_refused_one_say_nothing() {
        let (start, mut credential) = (Instant::now(), Credential { shared: true, ..Credential::default() });
        for round in 0..10 {
            let at = start + 1000 * round * MILLI;
            credential.refused(0, at, at + 900 * MILLI);
            credential.accepted(1, at + 5 * MILLI);
            credential.accepted(0, at + 50 * MILLI);
        }
        assert!(credential.is_shared());
    }
}
