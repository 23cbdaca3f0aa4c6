//! What must hold of everything that weir reads from strangers: a property for each fuzz target.
//!
//! Each module has one `check`, which panics where its property does not hold. The fuzz targets (`fuzz_targets/`) call it
//! with what libFuzzer makes up; `tests/corpus.rs` of weir itself, which includes this file, with every file of `corpus/`.

pub mod answer;
pub mod chunks;
pub mod config;
pub mod errors;
pub mod events;
pub mod head;
pub mod hints;
pub mod json;
pub mod preamble;
pub mod request;
pub mod usage;
pub mod usage_chunk;

/// Panics where something does not hold.
pub type Property = fn(&[u8]);

/// Every target by its name, which is also that of its corpus.
pub const TARGETS: [(&str, Property); 10] = [
    ("answer", answer::check),
    ("config", config::check),
    ("errors", errors::check),
    ("events", events::check),
    ("head", head::check),
    ("hints", hints::check),
    ("preamble", preamble::check),
    ("request", request::check),
    ("usage", usage::check),
    ("usage_chunk", usage_chunk::check),
];
