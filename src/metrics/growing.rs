//! A table that grows, and is read without a lock: what is in it never moves and never goes.

use std::sync::OnceLock;

/// How many places are made at a time, and how often at most.
const SEGMENT: usize = 64;
const SEGMENTS: usize = 160;

/// Values by small numbers.
pub(super) struct Growing<T> {
    segments: [OnceLock<Box<[OnceLock<T>]>>; SEGMENTS],
}

impl<T> Growing<T> {
    /// How many values it can hold.
    pub(super) const CAPACITY: usize = SEGMENT * SEGMENTS;

    /// An empty table.
    pub(super) fn new() -> Self {
        Self { segments: [const { OnceLock::new() }; SEGMENTS] }
    }

    /// The value at this place, if it was put there.
    pub(super) fn get(&self, index: usize) -> Option<&T> {
        self.segments.get(index / SEGMENT)?.get()?.get(index % SEGMENT)?.get()
    }

    /// Puts a value at this place, if none is there.
    ///
    /// # Panics
    /// The place is beyond [`Growing::CAPACITY`].
    pub(super) fn put(&self, index: usize, make: impl FnOnce() -> T) {
        let empty = || (0..SEGMENT).map(|_| OnceLock::new()).collect();
        self.segments[index / SEGMENT].get_or_init(empty)[index % SEGMENT].get_or_init(make);
    }

    /// Every value, in order, until the first place where none is.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        (0..Self::CAPACITY).map_while(|index| self.get(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_and_not_replaced() {
        let table = Growing::new();
        (0..1000).for_each(|number| table.put(number, || number));
        table.put(7, || 0);
        assert_eq!((table.get(7), table.get(999), table.get(1000)), (Some(&7), Some(&999), None));
        assert_eq!(table.iter().copied().collect::<Vec<_>>(), (0..1000).collect::<Vec<_>>());
        assert_eq!(table.get(Growing::<usize>::CAPACITY), None);
    }
}
