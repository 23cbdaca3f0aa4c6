//! The peek at a request's body, and the splice that makes it ask for its stream's usage.

use serde_json::{Value, json};
use weir::openai::call::{DuplicateKey, Peek, peek};
use weir::openai::prompt::Prompt;
use weir::openai::stream_options::{AsksUsage, Splice};

use super::json::Json;

const LIMITS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

/// What may be put in, and how many bytes of `null` it replaces.
const TEXTS: [(&str, &str); 5] = [
    (r#""stream_options":{"include_usage":true},"#, ""),
    (r#"{"include_usage":true}"#, "null"),
    (r#""include_usage":true,"#, ""),
    (r#""include_usage":true"#, ""),
    ("true", "null"),
];

/// The peek agrees with a plain reading; a splice changes nothing but the option.
pub fn check(body: &[u8]) {
    let peeked = peek(body);
    if let Some(json) = Json::read(body) {
        agree(&peeked, &json, body);
    }
    let Ok(peeked) = peeked else { return };
    assert!(peeked.prompt.bytes <= body.len() as u64 && (1..=128).contains(&peeked.choices));
    assert_eq!(
        peeked.prompt.embedded == 0,
        peeked.prompt.bytes == body.len() as u64,
        "only what is embedded is left out"
    );
    if let AsksUsage::Unsaid(splice) = &peeked.usage {
        changes_the_option_only(body, &peeked, splice);
    }
}

fn agree(peeked: &Result<Peek, DuplicateKey>, json: &Json, body: &[u8]) {
    let Some(members) = json.members() else {
        assert_eq!(
            *peeked,
            Ok(Peek { prompt: Prompt::text(body), ..Peek::default() }),
            "no object is the gateway's to judge"
        );
        return;
    };
    let stands_twice = |key: &&str| members.iter().filter(|(name, _)| name == key).count() > 1;
    let deciding = ["model", "stream", "n"].iter().chain(&LIMITS);
    if let Some(_doubled) = deciding.copied().find(|key| stands_twice(key)) {
        assert!(peeked.as_ref().is_err_and(|DuplicateKey(key)| stands_twice(key)), "{peeked:?} of a doubled key");
        return;
    }
    let peeked = peeked.as_ref().expect("no key that decides about limits stands twice");
    let of = |name| json.all(name).next();
    let counts = LIMITS.iter().filter_map(|name| of(*name).and_then(count));
    let choices = of("n").filter(|n| is_whole(n)).and_then(count).unwrap_or(1).clamp(1, 128);
    assert_eq!(peeked.model.as_deref(), of("model").and_then(Json::str));
    assert_eq!(peeked.stream, of("stream") == Some(&Json::Scalar(true.into())));
    assert_eq!(peeked.max_tokens, counts.max());
    assert_eq!(u64::from(peeked.choices), choices);
    asks_as_it_says(peeked, json);
}

/// A number as a count: rounded down, and none if it is negative.
fn count(json: &Json) -> Option<u64> {
    let number = json.number()?;
    number.as_u64().or_else(|| number.as_f64().filter(|float| *float >= 0.0).map(|float| float as u64))
}

fn is_whole(json: &Json) -> bool {
    json.number().and_then(serde_json::Number::as_f64).is_some_and(|float| float.fract() == 0.0)
}

fn asks_as_it_says(peeked: &Peek, json: &Json) {
    let options: Vec<&Json> = json.all("stream_options").collect();
    let inner: Vec<&Json> = options.iter().flat_map(|options| options.all("include_usage")).collect();
    let is_clear = options.len() <= 1 && inner.len() <= 1;
    let is_true = |json: &&Json| **json == Json::Scalar(true.into());
    let says_nothing = match (options.first(), inner.first()) {
        (None, _) => true,
        (Some(options), None) => options.is_null() || options.members().is_some(),
        (_, Some(inner)) => inner.is_null(),
    };
    match &peeked.usage {
        AsksUsage::Yes => assert!(peeked.stream && is_clear && inner.first().is_some_and(is_true)),
        AsksUsage::Unsaid(_) => assert!(peeked.stream && is_clear && says_nothing),
        // Or a key has escapes, so that weir does not touch it.
        AsksUsage::No => {}
    }
}

fn changes_the_option_only(body: &[u8], before: &Peek, splice: &Splice) {
    let spliced = splice.apply(body);
    assert!(TEXTS.iter().any(|(text, gone)| is_replaced(body, &spliced, gone, text)), "other bytes have changed");
    let after = peek(&spliced).expect("no key is doubled by it");
    let expected = Peek { prompt: after.prompt, usage: AsksUsage::Yes, ..before.clone() };
    assert_eq!(after, expected, "it asks now, and for the rest as before");

    let (value, spliced) = (serde_json::from_slice::<Value>(body), serde_json::from_slice::<Value>(&spliced));
    assert_eq!(value.is_ok(), spliced.is_ok(), "JSON before and after, or neither");
    if let (Ok(mut expected), Ok(spliced)) = (value, spliced) {
        if expected["stream_options"].is_null() {
            expected["stream_options"] = json!({});
        }
        expected["stream_options"]["include_usage"] = json!(true);
        assert_eq!(spliced, expected);
    }
}

/// Whether one makes the other with `text` in the place of `gone` somewhere.
fn is_replaced(before: &[u8], after: &[u8], gone: &str, text: &str) -> bool {
    if before.len() + text.len() != after.len() + gone.len() {
        return false;
    }
    let same_start = before.iter().zip(after).take_while(|(a, b)| a == b).count();
    let same_end = before.iter().rev().zip(after.iter().rev()).take_while(|(a, b)| a == b).count();
    let first = (before.len() - gone.len()).saturating_sub(same_end);
    (first..=same_start.min(before.len() - gone.len()))
        .any(|at| before[at..].starts_with(gone.as_bytes()) && after[at..].starts_with(text.as_bytes()))
}
