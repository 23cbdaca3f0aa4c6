//! What a request asks for: the endpoint, and the three facts of its body that decide how it is served.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

/// A call whose JSON body is read before it queues, since its model and size decide when it may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    ChatCompletions,
    Completions,
    Embeddings,
    /// OpenAI's Responses API.
    Responses,
    /// Anthropic's Messages API, as gateways serve it too.
    Messages,
}

impl Endpoint {
    /// The endpoint at a path below `/v1`, such as `/chat/completions`.
    pub fn at(path: &str) -> Option<Self> {
        match path {
            "/chat/completions" => Some(Self::ChatCompletions),
            "/completions" => Some(Self::Completions),
            "/embeddings" => Some(Self::Embeddings),
            "/responses" => Some(Self::Responses),
            "/messages" => Some(Self::Messages),
            _ => None,
        }
    }
}

/// What weir reads of a metered call's body.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peek {
    /// `model`, where it is a string.
    pub model: Option<String>,
    /// `stream` is `true`.
    pub stream: bool,
    /// The largest of `max_tokens`, `max_completion_tokens` and `max_output_tokens`: what the answer may cost at most.
    pub max_tokens: Option<u64>,
}

/// A key that decides about limits stands twice: weir and the gateway could each believe another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DuplicateKey(pub &'static str);

/// The keys that weir reads, and the mark of each in [`Scan::seen`].
const KEYS: [&str; 5] = ["model", "stream", "max_tokens", "max_completion_tokens", "max_output_tokens"];

/// Reads the few fields that matter, skipping over all others without building them.
///
/// What is no JSON object gives an empty [`Peek`]: the gateway is the one to judge it, under the limits of unknown models.
///
/// # Errors
/// [`DuplicateKey`] where one of the fields stands twice.
pub fn peek(body: &[u8]) -> Result<Peek, DuplicateKey> {
    let mut scan = Scan::default();
    let mut json = serde_json::Deserializer::from_slice(body);
    let whole = json.deserialize_map(&mut scan).and_then(|()| json.end());
    if let Some(key) = scan.duplicate {
        return Err(DuplicateKey(key));
    }
    Ok(whole.map(|()| scan.peek).unwrap_or_default())
}

#[derive(Default)]
struct Scan {
    peek: Peek,
    seen: [bool; KEYS.len()],
    duplicate: Option<&'static str>,
}

impl<'de> Visitor<'de> for &mut Scan {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(key)) = map.next_key()? {
            let Some(key) = key else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if std::mem::replace(&mut self.seen[key], true) {
                self.duplicate = Some(KEYS[key]);
                return Err(A::Error::custom("duplicate key"));
            }
            let value: Scalar = map.next_value()?;
            match (KEYS[key], value) {
                ("model", Scalar::Text(name)) => self.peek.model = Some(name),
                ("stream", Scalar::Bool(stream)) => self.peek.stream = stream,
                (limit, Scalar::Count(count)) if limit.starts_with("max_") => {
                    self.peek.max_tokens = self.peek.max_tokens.max(Some(count));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A key, by its place in [`KEYS`]; escapes are undone first, since `"mod\u0065l"` is `model` to the gateway too.
struct Key(Option<usize>);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, key: &str) -> Result<Key, E> {
                Ok(Key(KEYS.iter().position(|known| *known == key)))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

/// A value, as far as weir cares.
enum Scalar {
    Text(String),
    Bool(bool),
    Count(u64),
    Other,
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;
        impl<'de> Visitor<'de> for ScalarVisitor {
            type Value = Scalar;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_str<E>(self, text: &str) -> Result<Scalar, E> {
                Ok(Scalar::Text(text.to_owned()))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar::Bool(value))
            }

            fn visit_u64<E>(self, count: u64) -> Result<Scalar, E> {
                Ok(Scalar::Count(count))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Scalar, E> {
                Ok(Scalar::Other)
            }

            fn visit_f64<E>(self, count: f64) -> Result<Scalar, E> {
                // `1e3` is a count too; `as` saturates, and a negative one is none.
                Ok(if count >= 0.0 { Scalar::Count(count as u64) } else { Scalar::Other })
            }

            fn visit_unit<E>(self) -> Result<Scalar, E> {
                Ok(Scalar::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scalar, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other)
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Scalar, A::Error> {
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other)
            }
        }
        deserializer.deserialize_any(ScalarVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_facts_are_read_wherever_they_stand() {
        let body = br#"{"messages":[{"role":"user","content":"\"model\":\"x\""}],"stream":true,"max_tokens":5,
            "tools":[{"model":"y"}],"model":"gpt-4.1-mini","max_completion_tokens":1e3}"#;
        let expected = Peek { model: Some("gpt-4.1-mini".into()), stream: true, max_tokens: Some(1000) };
        assert_eq!(peek(body), Ok(expected));
    }

    #[test]
    fn what_is_no_json_object_is_the_gateways_to_judge() {
        for body in [&b""[..], b"[1]", b"null", b"{", br#"{"model":"a"} trailing"#, br#"{"model":"a",}"#, b"\xff\xfe"] {
            assert_eq!(peek(body), Ok(Peek::default()), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn a_key_that_stands_twice_is_refused_however_it_is_spelled() {
        assert_eq!(peek(br#"{"model":"a","model":"b"}"#), Err(DuplicateKey("model")));
        assert_eq!(peek(br#"{"model":"a","mod\u0065l":"b"}"#), Err(DuplicateKey("model")));
        assert_eq!(peek(br#"{"stream":true,"x":1,"stream":false}"#), Err(DuplicateKey("stream")));
        assert_eq!(peek(br#"{"max_tokens":1,"max_tokens":1"#), Err(DuplicateKey("max_tokens")));
        assert!(peek(br#"{"x":1,"x":2}"#).is_ok());
    }

    #[test]
    fn a_wrong_type_or_an_absurd_number_is_no_limit_and_no_panic() {
        for value in ["-1", "\"5\"", "null", "[1]", "{\"a\":1}", "-1.5"] {
            let body = format!(r#"{{"model":"a","max_tokens":{value}}}"#);
            assert_eq!(peek(body.as_bytes()).expect("no duplicate").max_tokens, None, "{value}");
        }
        assert_eq!(peek(br#"{"max_tokens":1000000000000000000}"#).expect("fine").max_tokens, Some(10u64.pow(18)));
        assert_eq!(peek(br#"{"max_tokens":1e300}"#).expect("fine").max_tokens, Some(u64::MAX));
        assert_eq!(peek(br#"{"model":7,"stream":"yes"}"#), Ok(Peek::default()));
    }

    #[test]
    fn a_deeply_nested_body_does_not_exhaust_the_stack() {
        let body = format!(r#"{{"model":"a","x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert!(peek(body.as_bytes()).is_ok());
    }
}
