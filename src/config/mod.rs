//! config (being written)
pub mod units;
