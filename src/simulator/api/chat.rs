//! `POST /v1/chat/completions`.

use serde_json::{Value, json};

use super::{data, finish_reason, usage};
use crate::simulator::answer::{Answer, Part};

pub(super) fn json(answer: &Answer) -> Value {
    let choices: Vec<Value> = (0..answer.call.choices)
        .map(|index| {
            json!({
                "index": index,
                "message": {"role": "assistant", "content": answer.text(index), "refusal": null},
                "logprobs": null,
                "finish_reason": finish_reason(answer),
            })
        })
        .collect();
    json!({
        "id": format!("chatcmpl-{}", answer.id),
        "object": "chat.completion",
        "created": answer.created,
        "model": answer.call.model,
        "choices": choices,
        "usage": usage(answer),
    })
}

pub(super) fn event(answer: &Answer, part: Part) -> String {
    match part {
        Part::Opening { choice } => {
            chunk(answer, choice, &json!({"role": "assistant", "content": "", "refusal": null}), None)
        }
        Part::Token { choice, nth } => chunk(answer, choice, &json!({"content": answer.token(choice, nth)}), None),
        Part::Closing { choice } => chunk(answer, choice, &json!({}), Some(finish_reason(answer))),
        Part::Usage if answer.call.include_usage => envelope(answer, json!([]), usage(answer)),
        Part::Usage => String::new(),
        Part::Done => "data: [DONE]\n\n".to_owned(),
    }
}

fn chunk(answer: &Answer, index: u32, delta: &Value, finish_reason: Option<&str>) -> String {
    let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": finish_reason});
    envelope(answer, json!([choice]), Value::Null)
}

fn envelope(answer: &Answer, choices: Value, usage: Value) -> String {
    let mut chunk = json!({
        "id": format!("chatcmpl-{}", answer.id),
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.call.model,
        "choices": choices,
    });
    // Who asked for the usage finds the field in every chunk, null until the last.
    if answer.call.include_usage {
        chunk["usage"] = usage;
    }
    data(&chunk)
}
