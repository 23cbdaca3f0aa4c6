//! Maps by numbers that weir has made itself.
//!
//! The standard library's hash guards against keys that are chosen to collide. Ids are counted up here and fingerprints are
//! keyed hashes already, so nobody chooses them, and a multiplication is enough. An address or a name that a client writes is
//! no such key.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map by ids or fingerprints.
pub type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;

/// Mixes a few small numbers.
#[derive(Debug, Default)]
pub struct IdHasher(u64);

/// An odd number whose bits are in no order: 2^64 over the golden ratio.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for IdHasher {
    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(32) ^ number).wrapping_mul(MIX);
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn write_u16(&mut self, number: u16) {
        self.write_u64(number.into());
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }

    fn finish(&self) -> u64 {
        // The map takes a place by the lower bits and a tag by the upper ones; those of a product are the better mixed.
        self.0.rotate_left(32)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::{BuildHasher as _, Hash};

    use super::*;

    /// How many of these differ in the bits that a map of twice as many places goes by, tag included.
    fn distinct(keys: impl Iterator<Item = impl Hash + Copy>) -> usize {
        let hash = |key| BuildHasherDefault::<IdHasher>::default().hash_one(key);
        keys.map(|key| (hash(key) & 0x1fff, hash(key) >> 57)).collect::<HashSet<_>>().len()
    }

    #[test]
    fn ids_that_are_counted_up_hardly_collide() {
        assert!(distinct(0..4096u16) > 4000);
        assert!(distinct((0..4096u64).map(|id| id << 32)) > 4000);
        assert!(distinct((0..4096usize).map(|id| (id % 64, id / 64))) > 4000);
        assert!(distinct((0..4096u64).map(|id| (0u64, id as u16))) > 4000);
    }
}
