//! Eight bytes looked at at once, for strings too short to be worth a search that is made for long ones.

/// So many bytes are looked at here before such a search begins.
const NEAR: usize = 16;

/// Eight bytes, the first the lowest.
#[derive(Clone, Copy)]
pub struct Word(u64);

/// The top bits of some of a word's bytes. Above the lowest of them there may be one that is wrong.
#[derive(Clone, Copy)]
pub struct Marks(u64);

const EACH: u64 = u64::from_le_bytes([1; 8]);
const TOP_BITS: u64 = EACH << 7;

impl Word {
    /// Marks the bytes that are this one.
    pub fn is(self, byte: u8) -> Marks {
        Self(self.0 ^ (EACH * u64::from(byte))).is_below(1)
    }

    /// Marks the bytes that are less than this one, which is less than 128.
    pub fn is_below(self, byte: u8) -> Marks {
        // What a byte borrows of the next can mark that one wrongly.
        Marks(self.0.wrapping_sub(EACH * u64::from(byte)) & !self.0 & TOP_BITS)
    }
}

impl Marks {
    /// Both.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Which byte is the first that is marked.
    fn first(self) -> Option<usize> {
        (self.0 != 0).then(|| self.0.trailing_zeros() as usize / 8)
    }
}

/// Where the first byte is that is marked, or that the search finds among those further on.
#[inline]
pub fn find(bytes: &[u8], marks: impl Fn(Word) -> Marks, search: impl Fn(&[u8]) -> Option<usize>) -> Option<usize> {
    let (words, _) = bytes[..bytes.len().min(NEAR)].as_chunks();
    for (number, word) in words.iter().enumerate() {
        if let Some(at) = marks(Word(u64::from_le_bytes(*word))).first() {
            return Some(8 * number + at);
        }
    }
    let near = 8 * words.len();
    search(&bytes[near..]).map(|at| near + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_marked_byte_is_the_one_that_a_look_at_each_finds() {
        let others = [0, 1, 0x1f, 0x20, 0x21, b'"', 0x23, 0x5b, b'\\', 0x5d, 0x7f, 0x80, 0xa2, 0xdc, 0xff];
        for byte in 0..=u8::MAX {
            for (at, before, behind) in (0..8)
                .flat_map(|at| others.map(|before| (at, before)))
                .flat_map(|(at, before)| others.map(|behind| (at, before, behind)))
            {
                let mut bytes = [behind; 8];
                bytes[..at].fill(before);
                bytes[at] = byte;
                let word = Word(u64::from_le_bytes(bytes));
                for wanted in [b'"', b'\\', 0, 0x7f, 0x80, 0xff] {
                    let slow = bytes.iter().position(|byte| *byte == wanted);
                    assert_eq!(word.is(wanted).first(), slow, "{wanted} in {bytes:?}");
                }
                let either = word.is(b'"').or(word.is_below(b' ')).first();
                assert_eq!(either, bytes.iter().position(|byte| matches!(byte, b'"' | ..b' ')), "{bytes:?}");
            }
        }
    }

    #[test]
    fn what_is_near_and_what_is_far_are_found_in_any_length() {
        let quote = |bytes: &[u8]| find(bytes, |word| word.is(b'"'), |far| far.iter().position(|byte| *byte == b'"'));
        for length in 0..40 {
            assert_eq!(quote(&vec![b'x'; length]), None);
            for at in 0..length {
                let mut bytes = vec![b'x'; length];
                bytes[at] = b'"';
                assert_eq!(quote(&bytes), Some(at), "{length}");
            }
        }
    }
}
