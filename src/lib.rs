//! weir
pub mod config;
pub mod simulator;
