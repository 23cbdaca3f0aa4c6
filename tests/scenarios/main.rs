//! Weir's pure cores in simulated time, in front of gateways of every kind: how close they come to a client that knows the
//! gateway's quota, how often they are refused, and whether every request ends well.
//!
//! Nothing here knows how weir learns: `world` makes the same calls in the same order as the proxy does, and measures what
//! comes of them. See `sweep` for how to replay one run and look at its timeline.

mod figures;
mod gateway;
mod load;
mod oracle;
mod scenario;
mod world;

mod sweep;
mod table;
