//! The wire format of each API: an answer as one JSON document, or part by part as events.

mod chat;
mod completions;
pub(super) mod embeddings;
mod messages;
pub(super) mod models;
mod responses;

use serde_json::{Value, json};

use super::answer::{Answer, Part};
use super::call::Api;
use super::problem::Problem;

/// The whole answer.
pub(super) fn json(answer: &Answer) -> Value {
    match answer.call.api {
        Api::Chat => chat::json(answer),
        Api::Completions => completions::json(answer),
        Api::Responses => responses::json(answer),
        Api::Messages => messages::json(answer),
    }
}

/// The events that one part of the answer makes; none for a part that this API or request does without.
pub(super) fn events(answer: &Answer, part: Part) -> String {
    match answer.call.api {
        Api::Chat => chat::event(answer, part),
        Api::Completions => completions::event(answer, part),
        Api::Responses => responses::events(answer, part),
        Api::Messages => messages::events(answer, part),
    }
}

/// An error as the first event of a stream.
pub(super) fn error_event(api: Api) -> String {
    let mut error = Problem::in_a_stream().to_json();
    match api {
        Api::Chat | Api::Completions => data(&error),
        Api::Responses => {
            let message = error["error"]["message"].take();
            let fields = json!({"type": "error", "sequence_number": 0, "code": "server_error", "param": null});
            named("error", &with(fields, "message", message))
        }
        Api::Messages => named("error", &with(error, "type", "error".into())),
    }
}

fn with(mut object: Value, name: &str, value: Value) -> Value {
    object[name] = value;
    object
}

/// An event without a name.
fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// An event with a name.
fn named(event: &str, value: &Value) -> String {
    format!("event: {event}\ndata: {value}\n\n")
}

/// What the chat and completions APIs call the usage.
fn usage(answer: &Answer) -> Value {
    let usage = answer.usage;
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total(),
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    })
}

fn finish_reason(answer: &Answer) -> &'static str {
    if answer.capped { "length" } else { "stop" }
}
