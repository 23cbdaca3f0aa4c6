//! Which of a stream's events are an answer, so that it can't be tried again.

use weir::openai::envelope::is_error_event;
use weir::openai::output::text_bytes;
use weir::openai::preamble::is_preamble;
use weir::openai::sse::{Event, Scanner};

use super::chunks::cuts;
use super::events::slow_events;
use super::json::Json;

/// What comes before the answer carries no output; and an answer begins at the same event however it is cut.
pub fn check(stream: &[u8]) {
    let (events, _) = slow_events(stream);
    for event in &events {
        says_nothing(Event { name: event.name, data: event.data });
    }
    says_nothing(Event { name: None, data: stream });
    let expected = events.iter().position(|it| begins_answer(Event { name: it.name, data: it.data }));
    for chunks in cuts(stream) {
        let (mut scanner, mut number, mut first) = (Scanner::default(), 0, None);
        for chunk in chunks {
            scanner.feed(chunk, |event| {
                first = first.or_else(|| begins_answer(event).then_some(number));
                number += 1;
            });
        }
        assert_eq!(first, expected);
    }
}

fn begins_answer(event: Event<'_>) -> bool {
    is_error_event(event.name, event.data) || !is_preamble(event)
}

fn says_nothing(event: Event<'_>) {
    if !is_preamble(event) {
        return;
    }
    let json = Json::read(event.data);
    let kind = json.as_ref().and_then(|json| json.all("type").next()).and_then(Json::str);
    let name = event.name.and_then(|name| std::str::from_utf8(name).ok());
    if kind.or(name).is_some_and(|kind| matches!(kind, "ping" | "keepalive") || kind.starts_with("response.")) {
        return;
    }
    let Some(json) = &json else { return };
    assert!(!ends(json), "an answer that ends is one");
    if name.is_none() && kind.is_none() {
        assert!(json.all("choices").next().is_some(), "what is not known is an answer");
        let text: usize = json.all("choices").map(|choices| text_bytes(as_text(choices).as_bytes())).sum();
        assert_eq!(text, 0, "output is an answer");
    }
}

/// Whether a choice has a reason to end.
fn ends(json: &Json) -> bool {
    let has_reason =
        |choice: &Json| choice.all("finish_reason").any(|reason| reason.str().is_some_and(|it| !it.is_empty()));
    let is_chunk = json.all("type").next().is_none();
    is_chunk && json.all("choices").any(|it| matches!(it, Json::Array(choices) if choices.iter().any(has_reason)))
}

/// JSON that is written anew, with the keys that stand twice.
fn as_text(json: &Json) -> String {
    match json {
        Json::Object(members) => {
            let members = members
                .iter()
                .map(|(name, value)| format!("{}:{}", serde_json::Value::from(name.as_str()), as_text(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        }
        Json::Array(items) => format!("[{}]", items.iter().map(as_text).collect::<Vec<_>>().join(",")),
        Json::Scalar(value) => value.to_string(),
    }
}
