//! The last requests that came to nothing, and why: what an operator looks at first.
//!
//! What is kept are weir's own words. Of the gateway's error there is its status, of its body nothing; and nothing of what
//! the client has sent but its request id, and what a path or Host has put into weir's own message. All of it is cut to a
//! length, and the number of entries is bounded, so that a flood of refusals costs a few short copies each and no memory.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::metrics::{Outcome, RefusedBy};

/// How many are kept; a further one takes the place of the oldest.
pub const MAX_RECENT: usize = 100;

/// Bytes that are kept of a request's id.
pub const MAX_ID: usize = 128;

/// Bytes that are kept of a message.
const MAX_MESSAGE: usize = 400;

/// A request that was refused, that failed, or that the gateway answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecentError {
    /// When it ended.
    pub at: SystemTime,
    /// As the client sees it in `x-request-id`.
    pub request_id: String,
    /// The client's name, or `-`.
    pub client: Arc<str>,
    /// The model's name, `other`, or `-` for a call without one.
    pub model: Arc<str>,
    /// What the client got; of an answer that broke off, what it began with.
    pub status: u16,
    /// `Refused`, `Failed` or `UpstreamError`.
    pub outcome: Outcome,
    /// Whose limit it was, where weir refused.
    pub refused_by: Option<RefusedBy>,
    /// Where that limit stands: `global`, `model:NAME` or `client`.
    pub scope: Option<String>,
    /// `error.code` of weir's answer, or of what broke off; `None` where the gateway's own answer went on.
    pub code: Option<&'static str>,
    /// What happened, in a sentence.
    pub message: String,
    /// Attempts at the gateway.
    pub attempts: u32,
}

/// The last of them.
#[derive(Debug, Default)]
pub struct RecentErrors {
    /// The oldest first. Locked for a push, or for a copy of them all.
    ring: Mutex<VecDeque<RecentError>>,
}

impl RecentErrors {
    /// Keeps one more, cut to length.
    pub fn push(&self, mut error: RecentError) {
        cut(&mut error.message, MAX_MESSAGE);
        cut(&mut error.request_id, MAX_ID);
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = (ring.len() == MAX_RECENT).then(|| ring.pop_front());
        ring.push_back(error);
        drop(ring);
        // It is freed when nobody waits for the lock any more.
        drop(oldest);
    }

    /// All that are kept, the newest first.
    pub fn latest(&self) -> Vec<RecentError> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.iter().rev().cloned().collect()
    }
}

/// Shortens a text to so many bytes at most, between two characters, and gives the room back.
fn cut(text: &mut String, most: usize) {
    if text.len() > most {
        let end = (0..=most).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(number: usize) -> RecentError {
        RecentError {
            at: SystemTime::UNIX_EPOCH,
            request_id: format!("id-{number}"),
            client: "-".into(),
            model: "m".into(),
            status: 429,
            outcome: Outcome::Refused,
            refused_by: Some(RefusedBy::Requests),
            scope: Some("global".to_owned()),
            code: Some("rate_limit_exceeded"),
            message: "wait".to_owned(),
            attempts: 0,
        }
    }

    #[test]
    fn the_newest_comes_first_and_the_oldest_goes() {
        let recent = RecentErrors::default();
        assert_eq!(recent.latest(), []);
        (0..MAX_RECENT + 3).for_each(|number| recent.push(error(number)));
        let expected: Vec<RecentError> = (3..MAX_RECENT + 3).rev().map(error).collect();
        assert_eq!(recent.latest(), expected);
    }

    #[test]
    fn what_is_kept_is_cut_to_length_between_two_characters() {
        let recent = RecentErrors::default();
        let long = "é".repeat(1_000_000);
        recent.push(RecentError { message: format!("x{long}"), request_id: long, ..error(0) });
        let kept = recent.latest().remove(0);
        assert_eq!((kept.message.len(), kept.request_id.len()), (MAX_MESSAGE - 1, MAX_ID));
        assert!(kept.message.starts_with("xé") && kept.message.capacity() < 1000, "{}", kept.message.capacity());
    }
}
