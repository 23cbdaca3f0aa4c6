//! What an HTTP intermediary must do (RFC 9110, 9112, 9113), shown on real sockets and byte by byte: raw clients on one side,
//! a raw scripted gateway on the other, and a whole weir between them.

mod client;
mod message;
mod upstream;
mod world;

mod answer_framing;
mod answer_heads;
mod bodies;
mod frames;
mod http2;
mod http2_floods;
mod pace;
mod request_fields;
mod request_framing;
mod request_lines;
mod turns;
