//! weir: a rate-limiting reverse proxy in front of an AI gateway.
//!
//! The modules, in reading order; each imports only what stands above it.

pub mod admission;
pub mod config;
pub mod error;
pub mod metrics;
pub mod models;
pub mod openai;
