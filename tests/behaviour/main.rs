//! How weir behaves, seen from both sides: real HTTP over pipes in memory, a scripted gateway, a paused clock.

mod gateway;
mod network;
mod world;

mod clients;
mod edge;
mod fairness;
mod hang_ups;
mod held_streams;
mod learning;
mod limits;
mod metering;
mod recent_errors;
mod reloads;
mod retries;
mod simulation;
mod steering;
mod timeouts;
mod tokens;
mod transparency;
mod usage_option;
