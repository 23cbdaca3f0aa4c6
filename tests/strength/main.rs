//! What weir stands: a gateway that fails in every way, load for a long time, and far more load than it can serve. Real
//! sockets, and weir as a process of its own.
//!
//! Small by default; docs/testing.md says how to run each part in full.

mod client;
mod gateway;
mod load;
mod plan;
mod promises;
mod weir;
mod wire;

mod faults;
mod overload;
mod soak;
