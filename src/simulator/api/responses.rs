//! `POST /v1/responses`: one message, and of the events those that carry it.

use serde_json::{Value, json};

use super::named;
use crate::simulator::answer::{Answer, Part};

pub(super) fn json(answer: &Answer) -> Value {
    let status = if answer.capped { "incomplete" } else { "completed" };
    let mut response = response(answer, status, json!([message(answer, &answer.text(0))]));
    if answer.capped {
        response["incomplete_details"] = json!({"reason": "max_output_tokens"});
    }
    let usage = answer.usage;
    response["usage"] = json!({
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.total(),
    });
    response
}

pub(super) fn events(answer: &Answer, part: Part) -> String {
    match part {
        Part::Opening { .. } => opening(answer),
        Part::Token { nth, .. } => {
            event("response.output_text.delta", OPENING + nth, in_place(answer, json!({"delta": answer.token(0, nth)})))
        }
        Part::Closing { .. } => closing(answer, OPENING + answer.spoken),
        Part::Usage => String::new(),
        Part::Done => {
            let name = if answer.capped { "response.incomplete" } else { "response.completed" };
            event(name, OPENING + answer.spoken + CLOSING, json!({"response": json(answer)}))
        }
    }
}

/// How many events come before the tokens, and how many after them.
const OPENING: u32 = 3;
const CLOSING: u32 = 3;

fn opening(answer: &Answer) -> String {
    let begun = json!({"response": response(answer, "in_progress", json!([]))});
    let item = json!({"output_index": 0, "item": message(answer, "")});
    let part = in_place(answer, json!({"part": content("")}));
    event("response.created", 0, begun)
        + &event("response.output_item.added", 1, item)
        + &event("response.content_part.added", 2, part)
}

fn closing(answer: &Answer, number: u32) -> String {
    let text = answer.text(0);
    let part = in_place(answer, json!({"part": content(&text)}));
    let item = json!({"output_index": 0, "item": message(answer, &text)});
    event("response.output_text.done", number, in_place(answer, json!({"text": text})))
        + &event("response.content_part.done", number + 1, part)
        + &event("response.output_item.done", number + 2, item)
}

/// Says which part of the response the event is about.
fn in_place(answer: &Answer, mut event: Value) -> Value {
    event["item_id"] = format!("msg_{}", answer.id).into();
    event["output_index"] = 0.into();
    event["content_index"] = 0.into();
    event
}

fn event(name: &str, number: u32, mut event: Value) -> String {
    (event["type"], event["sequence_number"]) = (name.into(), number.into());
    named(name, &event)
}

fn response(answer: &Answer, status: &str, output: Value) -> Value {
    json!({
        "id": format!("resp_{}", answer.id),
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "model": answer.call.model,
        "output": output,
        "error": null,
        "incomplete_details": null,
        "parallel_tool_calls": true,
        "tool_choice": "auto",
        "tools": [],
        "usage": null,
    })
}

fn message(answer: &Answer, text: &str) -> Value {
    let (status, content) = match text {
        "" => ("in_progress", json!([])),
        _ => ("completed", json!([content(text)])),
    };
    json!({
        "id": format!("msg_{}", answer.id),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    })
}

fn content(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": []})
}
