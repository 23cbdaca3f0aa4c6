//! `stream_options.include_usage`: whether a client asks to be told a stream's usage, and how weir asks in its place.
//!
//! The option is spliced into the body's bytes. All other bytes stay as the client wrote them, since writing the JSON anew
//! would change numbers, the order of keys, and what stands twice.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use memchr::memchr;
use serde::Deserialize;
use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};

/// Whether a request asks for its stream's usage (in the way of Chat Completions and Completions).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum AsksUsage {
    /// It does.
    Yes,
    /// It does not want it, or is no stream, or its options are such that weir leaves them alone: no object, a doubled or
    /// an escaped key, a value that is no boolean.
    #[default]
    No,
    /// It says nothing of it; with this splice it asks.
    Unsaid(Splice),
}

/// A change to a body that makes `stream_options.include_usage` true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Splice {
    at: usize,
    /// How many bytes give way: a `null`, or none.
    replaced: usize,
    text: &'static str,
}

impl Splice {
    /// The body with the option; `body` is the one that was peeked at.
    pub fn apply(&self, body: &[u8]) -> Bytes {
        [&body[..self.at], self.text.as_bytes(), &body[self.at + self.replaced..]].concat().into()
    }
}

/// A key of an object, its escapes undone: borrowed from the body if it has none.
#[derive(Deserialize)]
#[serde(transparent)]
struct Key<'b>(#[serde(borrow)] Cow<'b, str>);

/// Where an object has a certain key.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum Sighting<'b> {
    #[default]
    Nowhere,
    At(&'b str),
    /// Twice, or with escapes, so that its place is not known.
    Unclear,
}

impl<'b> Sighting<'b> {
    pub(super) fn add(&mut self, key: Cow<'b, str>) {
        *self = match (&self, key) {
            (Self::Nowhere, Cow::Borrowed(key)) => Self::At(key),
            _ => Self::Unclear,
        };
    }
}

/// Whether a stream's request asks for the usage; `body` is a JSON object with at least one key, and `stream_options` is
/// where it has that.
pub(super) fn asks_usage(body: &[u8], stream_options: Sighting<'_>) -> AsksUsage {
    let splice = |at, replaced, text| AsksUsage::Unsaid(Splice { at, replaced, text });
    match stream_options {
        Sighting::Nowhere => memchr(b'{', body)
            .map(|brace| splice(brace + 1, 0, r#""stream_options":{"include_usage":true},"#))
            .unwrap_or_default(),
        Sighting::At(key) => match value_at(body, key) {
            Some(at) if body[at..].starts_with(b"null") => splice(at, 4, r#"{"include_usage":true}"#),
            Some(at) if body[at] == b'{' => asked_within(body, at),
            _ => AsksUsage::No,
        },
        Sighting::Unclear => AsksUsage::No,
    }
}

/// The same for options that are an object, which begins at `brace`.
fn asked_within(body: &[u8], brace: usize) -> AsksUsage {
    let splice = |at, replaced, text| AsksUsage::Unsaid(Splice { at, replaced, text });
    let mut options = Options::default();
    if serde_json::Deserializer::from_slice(&body[brace..]).deserialize_map(&mut options).is_err() {
        return AsksUsage::No;
    }
    match options.include_usage {
        Sighting::Nowhere if options.has_keys => splice(brace + 1, 0, r#""include_usage":true,"#),
        Sighting::Nowhere => splice(brace + 1, 0, r#""include_usage":true"#),
        Sighting::At(key) => match value_at(body, key) {
            Some(at) if body[at..].starts_with(b"true") => AsksUsage::Yes,
            Some(at) if body[at..].starts_with(b"null") => splice(at, 4, "true"),
            _ => AsksUsage::No,
        },
        Sighting::Unclear => AsksUsage::No,
    }
}

/// Where the value of a key begins; the key is borrowed from the body.
fn value_at(body: &[u8], key: &str) -> Option<usize> {
    let start = key.as_ptr().addr().checked_sub(body.as_ptr().addr())?;
    let behind_quote = body.get(start + key.len() + 1..)?;
    let value = behind_quote.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
    (!value.is_empty()).then(|| body.len() - value.len())
}

/// The keys of `stream_options`.
#[derive(Default)]
struct Options<'b> {
    has_keys: bool,
    include_usage: Sighting<'b>,
}

impl<'b> Visitor<'b> for &mut Options<'b> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'b>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Key<'b>>()? {
            self.has_keys = true;
            if key.0 == "include_usage" {
                self.include_usage.add(key.0);
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::call::peek;
    use super::*;

    fn asks(body: &str) -> AsksUsage {
        peek(body.as_bytes()).expect("no duplicate").usage
    }

    /// A streaming body with these options, spliced.
    fn spliced(body: &str) -> String {
        let AsksUsage::Unsaid(splice) = asks(body) else { panic!("{body}: {:?}", asks(body)) };
        String::from_utf8(splice.apply(body.as_bytes()).to_vec()).expect("text")
    }

    #[test]
    fn a_request_says_what_it_wants_or_nothing() {
        let with = |options: &str| asks(&format!(r#"{{"stream":true,"stream_options":{options}}}"#));
        assert_eq!(with(r#"{"include_usage":true}"#), AsksUsage::Yes);
        assert_eq!(with(r#"{"x":{"include_usage":false}, "include_usage" : true }"#), AsksUsage::Yes);
        assert_eq!(with(r#"{"include_usage":false}"#), AsksUsage::No);
        assert!(matches!(with(r#"{"x":{"include_usage":true}}"#), AsksUsage::Unsaid(_)));
        for left_alone in ["[]", "7", "\"{\"", "true", r#"{"include_usage":1}"#, r#"{"include_usage":{}}"#] {
            assert_eq!(with(left_alone), AsksUsage::No, "{left_alone}");
        }
        assert_eq!(with(r#"{"include_usage":true,"include_usage":null}"#), AsksUsage::No);
        assert_eq!(with(r#"{},"stream_options":{"include_usage":true}"#), AsksUsage::No);
        for no_stream in [r#"{"stream":false}"#, "{}", "[]", "", r#"{"stream":true"#] {
            assert_eq!(asks(no_stream), AsksUsage::No, "{no_stream}");
        }
        assert_eq!(asks(r#"{"stream_options":{"include_usage":true}}"#), AsksUsage::No);
    }

    #[test]
    fn the_option_is_spliced_in_and_all_other_bytes_stay() {
        let before_and_after = [
            (r#"{"stream":true}"#, r#"{"stream_options":{"include_usage":true},"stream":true}"#),
            (
                " \n{ \"a\\u0062\" : 1.50, \"stream\" : true }\n",
                " \n{\"stream_options\":{\"include_usage\":true}, \"a\\u0062\" : 1.50, \"stream\" : true }\n",
            ),
            (
                "{\"stream\":true,\"stream_options\"\t: \n{ }}",
                "{\"stream\":true,\"stream_options\"\t: \n{\"include_usage\":true }}",
            ),
            (
                r#"{"stream_options":{ "x" : [{}] },"stream":true}"#,
                r#"{"stream_options":{"include_usage":true, "x" : [{}] },"stream":true}"#,
            ),
            (
                r#"{"stream_options" : null ,"stream":true}"#,
                r#"{"stream_options" : {"include_usage":true} ,"stream":true}"#,
            ),
            (
                r#"{"stream":true,"stream_options":{"x":"é","include_usage": null}}"#,
                r#"{"stream":true,"stream_options":{"x":"é","include_usage": true}}"#,
            ),
        ];
        for (before, after) in before_and_after {
            assert_eq!(spliced(before), after);
        }
    }

    #[test]
    fn a_spliced_body_is_the_same_json_with_the_option() {
        let rests = ["", r#","x":{"stream_options":{"include_usage":false}}"#, r#","x":"\"stream_options\":null,{""#];
        let options =
            ["", r#","stream_options":null"#, r#","stream_options":{}"#, r#","stream_options":{"a":1,"b":[]}"#];
        let more = [r#","stream_options" : { "include_usage" : null , "a" : {} }"#];
        for (rest, option) in
            rests.iter().flat_map(|rest| options.iter().chain(&more).map(move |option| (rest, option)))
        {
            for body in [
                format!(r#"{{"stream":true{option}{rest}}}"#),
                format!(r#"{{"é\n":"\u00e9"{rest}{option},"stream":true}}"#),
            ] {
                let mut expected: Value = serde_json::from_str(&body).expect("JSON");
                if expected["stream_options"].is_null() {
                    expected["stream_options"] = json!({});
                }
                expected["stream_options"]["include_usage"] = json!(true);
                assert_eq!(serde_json::from_str::<Value>(&spliced(&body)).expect("JSON"), expected, "{body}");
                assert_eq!(asks(&spliced(&body)), AsksUsage::Yes);
            }
        }
    }

    #[test]
    fn an_escaped_key_is_left_alone_and_never_doubled() {
        let escaped = [
            r#"{"stream":true,"stream\u005foptions":{}}"#,
            r#"{"stream":true,"stream\u005foptions":null}"#,
            r#"{"stream":true,"stream_options":{},"stream\u005foptions":null}"#,
            r#"{"stream":true,"stream_options":{"include\u005fusage":null}}"#,
            r#"{"stream":true,"stream_options":{"include\u005fusage":true}}"#,
        ];
        for body in escaped {
            assert_eq!(asks(body), AsksUsage::No, "{body}");
        }
        assert!(matches!(asks(r#"{"str\u0065am":true}"#), AsksUsage::Unsaid(_)));
    }
}
