//! weir
pub mod config;
