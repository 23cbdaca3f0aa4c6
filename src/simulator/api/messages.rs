//! `POST /v1/messages`, Anthropic's API: one text block, and its own names for the usage.

use serde_json::{Value, json};

use super::named;
use crate::simulator::answer::{Answer, Part};

pub(super) fn json(answer: &Answer) -> Value {
    let content = json!([{"type": "text", "text": answer.text(0)}]);
    message(answer, content, stop_reason(answer).into(), answer.usage.completion)
}

pub(super) fn events(answer: &Answer, part: Part) -> String {
    match part {
        Part::Opening { .. } => {
            let start = message(answer, json!([]), Value::Null, 1);
            let block = json!({"type": "text", "text": ""});
            event("message_start", json!({"message": start}))
                + &event("content_block_start", json!({"index": 0, "content_block": block}))
        }
        Part::Token { nth, .. } => {
            let delta = json!({"type": "text_delta", "text": answer.token(0, nth)});
            event("content_block_delta", json!({"index": 0, "delta": delta}))
        }
        Part::Closing { .. } => {
            let delta = json!({"stop_reason": stop_reason(answer), "stop_sequence": null});
            let usage = json!({"output_tokens": answer.usage.completion});
            event("content_block_stop", json!({"index": 0}))
                + &event("message_delta", json!({"delta": delta, "usage": usage}))
        }
        Part::Usage => String::new(),
        Part::Done => event("message_stop", json!({})),
    }
}

fn event(name: &str, mut event: Value) -> String {
    event["type"] = name.into();
    named(name, &event)
}

fn stop_reason(answer: &Answer) -> &'static str {
    if answer.capped { "max_tokens" } else { "end_turn" }
}

fn message(answer: &Answer, content: Value, stop_reason: Value, output_tokens: u64) -> Value {
    let usage = answer.usage;
    json!({
        "id": format!("msg_{}", answer.id),
        "type": "message",
        "role": "assistant",
        "model": answer.call.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": null,
        // Here the cached part does not count among the input, but beside it.
        "usage": {
            "input_tokens": usage.prompt - usage.cached,
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": output_tokens,
        },
    })
}
