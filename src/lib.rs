//! weir: a rate-limiting reverse proxy in front of an AI gateway.
//!
//! Programs that call AI models all write the same four things: a semaphore, a token bucket, retries with backoff, and
//! statistics. weir does them once, for all clients together, which change only their base URL.
//!
//! The modules, in reading order; each imports only what stands above it (a test holds them to that).

pub mod config;
pub mod models;
pub mod openai;
pub mod error;
pub mod clients;
pub mod metrics;
pub mod recent;
pub mod outlet;
pub mod access_log;
pub mod ledger;
pub mod admission;
pub mod upstream;
pub mod retry;
pub mod relay;
pub mod proxy;
pub mod server;
pub mod systemd;
pub mod reload;
pub mod admin;
pub mod run;
pub mod explain;
pub mod simulator;
pub mod demo;
