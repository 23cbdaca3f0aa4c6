//! The memory that request bodies take, all together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bound on bytes held, shared by all requests.
#[derive(Debug, Clone)]
pub struct ByteBudget {
    held: Arc<AtomicU64>,
    limit: u64,
}

/// Bytes held by one request; given back when dropped.
#[derive(Debug)]
pub struct HeldBytes {
    budget: ByteBudget,
    bytes: u64,
}

impl ByteBudget {
    /// Room for `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self { held: Arc::default(), limit }
    }

    /// Nothing held yet, to be grown.
    pub fn hold(&self) -> HeldBytes {
        HeldBytes { budget: self.clone(), bytes: 0 }
    }

    /// Bytes held now.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }
}

impl HeldBytes {
    /// Takes `more` bytes; `false`, with nothing taken, where there is no room.
    pub fn grow(&mut self, more: usize) -> bool {
        let more = more as u64;
        let within = |held: u64| held.checked_add(more).filter(|after| *after <= self.budget.limit);
        let grown = self.budget.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok();
        if grown {
            self.bytes += more;
        }
        grown
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_held_up_to_the_limit_and_given_back_on_drop() {
        let budget = ByteBudget::new(10);
        let (mut a, mut b) = (budget.hold(), budget.hold());
        assert!(a.grow(6) && !b.grow(5) && b.grow(4) && !a.grow(1));
        drop(a);
        assert_eq!(budget.held(), 4);
        assert!(b.grow(6) && !b.grow(usize::MAX));
    }
}
