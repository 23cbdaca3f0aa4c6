//! The same bytes in chunks cut in many ways.

/// A byte that no text has stands for this many letters: long events, from small files.
const LONG: usize = 9000;

/// The bytes with every 0x01 made into a long run of letters; at most about six of them.
pub fn expand(bytes: &[u8]) -> Vec<u8> {
    let mut expanded = Vec::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            1 if expanded.len() < 48 << 10 => expanded.resize(expanded.len() + LONG, b'x'),
            other => expanded.push(*other),
        }
    }
    expanded
}

/// More bytes than this are cut less often, or a fuzzer would hardly get ahead.
const FEW: usize = 4096;

/// At so many places at most the bytes are cut into two.
const MOST_HALVES: usize = 64;

/// The bytes cut into chunks: as one, into two at every place if they are few and else around line breaks, into single
/// bytes, and by chance.
pub fn cuts(bytes: &[u8]) -> Vec<Vec<&[u8]>> {
    let mut all = vec![vec![bytes]];
    let is_break = |byte: &u8| matches!(byte, b'\r' | b'\n');
    let is_place = |at: &usize| bytes.len() <= MOST_HALVES || bytes[at - 1..=*at].iter().any(is_break);
    let places = (1..bytes.len()).filter(is_place).take(if bytes.len() <= FEW { MOST_HALVES } else { 4 });
    all.extend(places.map(|at| vec![&bytes[..at], &bytes[at..]]));
    let mut chance = Chance::of(bytes);
    if bytes.len() <= FEW {
        all.push(bytes.chunks(1).collect());
        all.push(by_chance(bytes, 8, &mut chance));
    }
    all.extend([200, 10_000].map(|longest| by_chance(bytes, longest, &mut chance)));
    all
}

fn by_chance<'b>(mut bytes: &'b [u8], longest: usize, chance: &mut Chance) -> Vec<&'b [u8]> {
    let mut chunks = Vec::new();
    while !bytes.is_empty() {
        let (chunk, rest) = bytes.split_at(bytes.len().min(1 + chance.below(longest)));
        chunks.push(chunk);
        bytes = rest;
    }
    chunks
}

/// Chance that is the same for the same bytes, so that a crash comes again (SplitMix64, seeded by FNV-1a).
struct Chance(u64);

impl Chance {
    fn of(bytes: &[u8]) -> Self {
        let hash = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        Self(bytes.iter().fold(0xcbf2_9ce4_8422_2325, hash))
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }
}
