//! OpenAI's wire format: the only place that knows it.
//!
//! weir reads as little of it as it can (a few fields of a request, the usage and the errors of an answer) and changes
//! nothing that a client could see: where it asks for a stream's usage itself, it takes the answer to that out again.

pub mod call;
pub mod envelope;
pub mod headers;
pub mod json;
pub mod output;
pub mod preamble;
pub mod prompt;
pub mod sse;
pub mod stream_options;
pub mod usage;
pub mod usage_chunk;
mod word;
