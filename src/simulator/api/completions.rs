//! `POST /v1/completions`, the API before chat.

use serde_json::{Value, json};

use super::{data, finish_reason, usage};
use crate::simulator::answer::{Answer, Part};

pub(super) fn json(answer: &Answer) -> Value {
    let choices: Vec<Value> =
        (0..answer.call.choices).map(|index| choice(index, answer.text(index), Some(finish_reason(answer)))).collect();
    let mut json = envelope(answer, choices);
    json["usage"] = usage(answer);
    json
}

pub(super) fn event(answer: &Answer, part: Part) -> String {
    let only = |choice| data(&envelope(answer, vec![choice]));
    match part {
        Part::Token { choice: index, nth } => only(choice(index, answer.token(index, nth), None)),
        Part::Closing { choice: index } => only(choice(index, String::new(), Some(finish_reason(answer)))),
        Part::Usage if answer.call.include_usage => {
            let mut last = envelope(answer, Vec::new());
            last["usage"] = usage(answer);
            data(&last)
        }
        Part::Opening { .. } | Part::Usage => String::new(),
        Part::Done => "data: [DONE]\n\n".to_owned(),
    }
}

fn choice(index: u32, text: String, finish_reason: Option<&str>) -> Value {
    json!({"index": index, "text": text, "logprobs": null, "finish_reason": finish_reason})
}

fn envelope(answer: &Answer, choices: Vec<Value>) -> Value {
    json!({
        "id": format!("cmpl-{}", answer.id),
        "object": "text_completion",
        "created": answer.created,
        "model": answer.call.model,
        "choices": choices,
    })
}
