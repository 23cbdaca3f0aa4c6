//! What a stream says before it says anything: that an answer will come, and that the connection still stands.
//!
//! Nobody misses these events if the stream dies behind them, so an answer can still be tried again. Only what is known to
//! be one counts; whatever weir does not recognise is somebody's answer, and is not to wait.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;

use super::sse::Event;

/// Whether an event carries neither output nor an end: a role alone, a response or message that has just been made, a
/// part of one that is still empty, a ping.
///
/// An answer that ends has ended, though it be empty: an event with a `finish_reason`, or a usage behind the last choice,
/// is none of these. Errors are not told from output here.
pub fn is_preamble(event: Event<'_>) -> bool {
    let name = event.name.and_then(|name| std::str::from_utf8(name).ok());
    if event.data.is_empty() {
        // Without data an event is dispatched to nobody; its name is for those who look at it all the same.
        return event.name.is_none() || name.is_some_and(says_nothing_else);
    }
    match serde_json::from_slice::<Outline<'_>>(event.data) {
        Ok(outline) => outline.is_preamble(name),
        // Of a very long event the name is all that can be read: Responses repeats a request's tools and instructions.
        Err(_) => name.is_some_and(says_nothing_else),
    }
}

/// The types that are preambles whatever else the event has.
fn says_nothing_else(kind: &str) -> bool {
    matches!(kind, "ping" | "keepalive" | "response.created" | "response.queued" | "response.in_progress")
}

/// The members that decide. All others are skipped without being built.
#[derive(Deserialize)]
struct Outline<'e> {
    #[serde(rename = "type", borrow)]
    kind: Option<Cow<'e, str>>,
    choices: Option<Vec<Value>>,
    usage: Option<Value>,
    message: Option<Value>,
    content_block: Option<Value>,
    item: Option<Value>,
    part: Option<Value>,
    delta: Option<Value>,
}

impl Outline<'_> {
    fn is_preamble(&self, name: Option<&str>) -> bool {
        let is_bare = |member: &Option<Value>| member.as_ref().is_some_and(is_bare);
        match self.kind.as_deref().or(name) {
            Some(kind) if says_nothing_else(kind) => true,
            Some("message_start") => self.message.as_ref().is_some_and(is_new_message),
            Some("content_block_start") => is_bare(&self.content_block),
            Some("content_block_delta") => is_bare(&self.delta),
            Some("response.output_item.added") => self.item.as_ref().is_some_and(is_new_item),
            Some("response.content_part.added" | "response.reasoning_summary_part.added") => is_bare(&self.part),
            Some(kind) if kind.starts_with("response.") && kind.ends_with(".delta") => {
                self.delta.as_ref().is_some_and(is_blank)
            }
            // Chunks have no type; some gateways name their events all the same.
            _ => self.has_empty_choices(),
        }
    }

    /// A chunk of chat/completions or completions without output: with a role, or with what Azure says of the prompt.
    fn has_empty_choices(&self) -> bool {
        match self.choices.as_deref() {
            Some([]) => self.usage.is_none(),
            Some(choices) => choices.iter().all(is_empty_choice),
            None => false,
        }
    }
}

fn is_empty_choice(choice: &Value) -> bool {
    choice.as_object().is_some_and(|members| {
        members.iter().all(|(name, value)| match name.as_str() {
            "index" => true,
            "delta" => is_bare(value),
            // Azure annotates what it has checked.
            name => name.starts_with("content_filter_") || is_blank(value),
        })
    })
}

fn is_new_message(message: &Value) -> bool {
    is_blank(&message["content"]) && is_blank(&message["stop_reason"])
}

/// Of Responses' items, a call of a tool is output from its beginning; what is said or thought is not before its text.
fn is_new_item(item: &Value) -> bool {
    let is_text = item["type"] == "message" || item["type"] == "reasoning";
    is_text && is_blank(&item["content"]) && is_blank(&item["summary"])
}

/// Whether a part says no more than what it is going to be.
fn is_bare(part: &Value) -> bool {
    match part {
        Value::Object(members) => {
            members.iter().all(|(name, value)| matches!(&**name, "role" | "type") || is_blank(value))
        }
        other => is_blank(other),
    }
}

/// Whether nothing is said at any depth, which serde_json bounds.
fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.iter().all(is_blank),
        Value::Object(members) => members.values().all(is_blank),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_data(data: &str) -> bool {
        is_preamble(Event { name: None, data: data.as_bytes() })
    }

    fn of_name(name: &str, data: &str) -> bool {
        is_preamble(Event { name: Some(name.as_bytes()), data: data.as_bytes() })
    }

    /// A chat chunk with this delta.
    fn delta(delta: &str) -> String {
        format!(
            r#"{{"id":"c","object":"chat.completion.chunk","created":1,"choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":null}}],"usage":null}}"#
        )
    }

    #[test]
    fn what_announces_an_answer_is_none_yet() {
        let deltas = [
            r#"{"role":"assistant"}"#,
            r#"{"role":"assistant","content":"","refusal":null,"tool_calls":[],"reasoning":""}"#,
            r#"{"content":""}"#,
            "{}",
            "null",
        ];
        for it in deltas {
            assert!(of_data(&delta(it)), "{it}");
        }
        let events = [
            r#"{"choices":[],"prompt_filter_results":[{"prompt_index":0}]}"#,
            r#"{"choices":[{"index":0,"finish_reason":null,"content_filter_results":{"hate":{"filtered":false}}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"role":"assistant"}},{"index":1,"delta":{"role":"assistant"}}],"usage":{"prompt_tokens":9}}"#,
            r#"{"object":"text_completion","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":null}]}"#,
            r#"{"type":"response.created","response":{"status":"in_progress","instructions":"a\ud800","output":[]}}"#,
            r#"{"type":"response.queued","response":{}}"#,
            r#"{"type":"response.in_progress","response":{}}"#,
            r#"{"type":"response.output_item.added","item":{"id":"m","type":"message","status":"in_progress","content":[],"role":"assistant"}}"#,
            r#"{"type":"response.output_item.added","item":{"id":"r","type":"reasoning","summary":[],"encrypted_content":"abc"}}"#,
            r#"{"type":"response.content_part.added","part":{"type":"output_text","annotations":[],"text":""}}"#,
            r#"{"type":"response.reasoning_summary_part.added","part":{"type":"summary_text","text":""}}"#,
            r#"{"type":"response.output_text.delta","delta":""}"#,
            r#"{"type":"keepalive","sequence_number":3}"#,
            r#"{"type":"message_start","message":{"id":"m","role":"assistant","content":[],"stop_reason":null,"usage":{"input_tokens":9}}}"#,
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":""}}"#,
            r#" {"type" : "ping"} "#,
            "",
        ];
        for event in events {
            assert!(of_data(event), "{event}");
        }
        let role = r#"{"choices":[{"delta":{"role":"assistant"}}]}"#;
        for (name, data) in [("ping", ""), ("ping", "{}"), ("message_start", r#"{"message":{}}"#), ("message", role)] {
            assert!(of_name(name, data), "{name}");
        }
    }

    #[test]
    fn output_of_any_kind_is_the_answer() {
        let deltas = [
            r#"{"role":"assistant","content":"Hi"}"#,
            r#"{"content":null,"refusal":"I"}"#,
            r#"{"tool_calls":[{"index":0,"id":"call","function":{"name":"f","arguments":""}}]}"#,
            r#"{"function_call":{"name":"f","arguments":""}}"#,
            r#"{"role":"assistant","audio":{"id":"audio"}}"#,
            r#"{"reasoning_content":"so"}"#,
            r#"{"images":[{"image_url":{"url":"data:"}}]}"#,
            r#"{"x_new":1}"#,
        ];
        for it in deltas {
            assert!(!of_data(&delta(it)), "{it}");
        }
        let events = [
            r#"{"choices":[{"text":"a"}]}"#,
            r#"{"choices":[{"delta":{}},{"delta":{"content":"a"}}]}"#,
            r#"{"type":"response.output_text.delta","delta":"a"}"#,
            r#"{"type":"response.refusal.delta","delta":"a"}"#,
            r#"{"type":"response.output_item.added","item":{"type":"function_call","name":"f","arguments":""}}"#,
            r#"{"type":"response.output_item.added","item":{"type":"web_search_call","status":"in_progress"}}"#,
            r#"{"type":"response.output_item.added","item":{"type":"message","content":[{"type":"output_text","text":"a"}]}}"#,
            r#"{"type":"response.content_part.added","part":{"type":"output_text","text":"a"}}"#,
            r#"{"type":"response.image_generation_call.partial_image","partial_image_b64":"abc"}"#,
            r#"{"type":"message_start","message":{"content":[{"type":"text","text":"a"}]}}"#,
            r#"{"type":"content_block_start","content_block":{"type":"tool_use","id":"t","name":"f","input":{}}}"#,
            r#"{"type":"content_block_start","content_block":{"type":"redacted_thinking","data":"abc"}}"#,
            r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{"}}"#,
        ];
        for event in events {
            assert!(!of_data(event), "{event}");
        }
    }

    #[test]
    fn an_answer_that_ends_without_output_is_one_too() {
        let events = [
            "[DONE]",
            r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[{"index":0,"text":"","finish_reason":"length"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":0}}"#,
            r#"{"type":"response.completed","response":{"output":[]}}"#,
            r#"{"type":"response.incomplete","response":{"output":[]}}"#,
            r#"{"type":"content_block_stop","index":0}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"}}"#,
            r#"{"type":"message_start","message":{"content":[],"stop_reason":"refusal"}}"#,
            r#"{"type":"message_stop"}"#,
        ];
        for event in events {
            assert!(!of_data(event), "{event}");
        }
        assert!(!of_name("message_stop", ""));
    }

    #[test]
    fn what_is_not_recognised_is_taken_for_output() {
        let deep = format!(r#"{{"choices":[{{"delta":{}{}}}]}}"#, "[".repeat(10_000), "]".repeat(10_000));
        let strange = [
            "{}",
            "[]",
            "null",
            "7",
            "text",
            "{\"choices\":[",
            "{\"choices\":{}}",
            "{\"choices\":[7]}",
            "{\"type\":7}",
            "{\"type\":\"thread.run.created\"}",
            "{\"candidates\":[]}",
            "{\"type\":\"message_start\"}",
            "\u{0}",
            &deep,
            "{\"choices\":[],\"choices\":[]}",
        ];
        for event in strange {
            assert!(!of_data(event), "{}", &event[..event.len().min(40)]);
        }
        assert!(!of_name("thread.run.created", "") && !of_name("thread.run.created", "{}"));
        assert!(!is_preamble(Event { name: Some(b"\xff"), data: b"" }));
        assert!(!is_preamble(Event { name: None, data: b"{\"choices\":[{\"text\":\"\xff\"}]}" }));
    }

    #[test]
    fn of_an_event_too_long_to_be_read_the_name_decides() {
        assert!(of_name("response.created", r#"a tool's description"}]}}"#));
        assert!(!of_name("response.completed", r#"the end of an answer"}]}}"#));
    }
}
