//! What a request asks for: the endpoint, and the few facts of its body that decide how it is served.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::json::{Malformed, Members};
use super::prompt::Prompt;
use super::stream_options::{self, AsksUsage, Sighting};

/// No API gives more answers to one request.
const MOST_CHOICES: u64 = 128;

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peek {
    /// `model`, where it is a string.
    pub model: Option<String>,
    /// `stream` is `true`.
    pub stream: bool,
    /// The largest of `max_tokens`, `max_completion_tokens` and `max_output_tokens`: what the answer may cost at most.
    pub max_tokens: Option<u64>,
    /// `n`, the answers asked for: 1 to 128, and 1 where it is no positive integer.
    pub choices: u32,
    pub prompt: Prompt,
    pub usage: AsksUsage,
}

impl Default for Peek {
    fn default() -> Self {
        Self {
            model: None,
            stream: false,
            max_tokens: None,
            choices: 1,
            prompt: Prompt::default(),
            usage: AsksUsage::default(),
        }
    }
}

/// A key that decides about limits stands twice: weir and the gateway could each believe another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DuplicateKey(pub &'static str);

/// The keys that decide about limits, and the mark of each in [`Scan::seen`].
const KEYS: [&str; 6] = ["model", "stream", "n", "max_tokens", "max_completion_tokens", "max_output_tokens"];

/// Reads the few fields that matter, skipping over all others without building them.
///
/// What is no JSON object gives a [`Peek`] of its size alone: the gateway is the one to judge it, under the limits of unknown models.
///
/// # Errors
/// [`DuplicateKey`] where one of the fields stands twice; but not for `stream_options`, which decides about no limit.
pub fn peek(body: &[u8]) -> Result<Peek, DuplicateKey> {
    let mut scan = Scan::default();
    let whole = scan.read(body);
    if let Some(key) = scan.duplicate {
        return Err(DuplicateKey(key));
    }
    if whole.is_err() {
        return Ok(Peek { prompt: Prompt::text(body), ..Peek::default() });
    }
    let is_stream = scan.peek.stream;
    let usage = if is_stream { stream_options::asks_usage(body, scan.stream_options) } else { AsksUsage::No };
    Ok(Peek { usage, ..scan.peek })
}

#[derive(Default)]
struct Scan<'b> {
    peek: Peek,
    seen: [bool; KEYS.len()],
    duplicate: Option<&'static str>,
    stream_options: Sighting<'b>,
}

impl<'b> Scan<'b> {
    fn read(&mut self, body: &'b [u8]) -> Result<(), Malformed> {
        let mut prompt = Prompt::text(body);
        let mut members = Members::of(body, |behind_quote| prompt.sees_string(behind_quote));
        while let Some(key) = members.next_key()? {
            // Escapes are undone, since `"mod\u0065l"` is `model` to the gateway too.
            let Some(known) = KEYS.iter().position(|known| *known == key) else {
                if key == "stream_options" {
                    self.stream_options.add(key);
                }
                members.value()?;
                continue;
            };
            if std::mem::replace(&mut self.seen[known], true) {
                self.duplicate = Some(KEYS[known]);
                return Err(Malformed);
            }
            let value: Scalar = serde_json::from_slice(members.value()?).map_err(|_| Malformed)?;
            match (KEYS[known], value) {
                ("model", Scalar::Text(name)) => self.peek.model = Some(name),
                ("stream", Scalar::Bool(stream)) => self.peek.stream = stream,
                ("n", Scalar::Count(count)) => self.peek.choices = count.clamp(1, MOST_CHOICES) as u32,
                (limit, Scalar::Count(count) | Scalar::Fraction(count)) if limit.starts_with("max_") => {
                    self.peek.max_tokens = self.peek.max_tokens.max(Some(count));
                }
                _ => {}
            }
        }
        self.peek.prompt = prompt;
        Ok(())
    }
}

/// A value, as far as weir cares.
enum Scalar {
    Text(String),
    Bool(bool),
    Count(u64),
    /// A number between two counts, rounded down.
    Fraction(u64),
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
                Ok(match count {
                    ..0.0 => Scalar::Other,
                    _ if count.fract() == 0.0 => Scalar::Count(count as u64),
                    _ => Scalar::Fraction(count as u64),
                })
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

    /// What is read of a body, but for its size.
    fn peeked(body: &[u8]) -> Result<Peek, DuplicateKey> {
        peek(body).map(|peek| Peek { prompt: Prompt::default(), ..peek })
    }

    #[test]
    fn the_facts_are_read_wherever_they_stand() {
        let body = br#"{"messages":[{"role":"user","content":"\"model\":\"x\""}],"stream":true,"max_tokens":5,
            "tools":[{"model":"y","n":9}],"model":"gpt-4.1-mini","max_completion_tokens":1e3,"n":3,
            "stream_options":{"include_usage":true}}"#;
        let expected = Peek {
            model: Some("gpt-4.1-mini".into()),
            stream: true,
            max_tokens: Some(1000),
            choices: 3,
            prompt: Prompt { bytes: body.len() as u64, embedded: 0 },
            usage: AsksUsage::Yes,
        };
        assert_eq!(peek(body), Ok(expected));
    }

    #[test]
    fn what_is_no_json_object_is_the_gateways_to_judge() {
        for body in [&b""[..], b"[1]", b"null", b"{", br#"{"model":"a"} trailing"#, br#"{"model":"a",}"#, b"\xff\xfe"] {
            let expected = Peek { prompt: Prompt::text(body), ..Peek::default() };
            assert_eq!(peek(body), Ok(expected), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn a_key_that_stands_twice_is_refused_however_it_is_spelled() {
        assert_eq!(peek(br#"{"model":"a","model":"b"}"#), Err(DuplicateKey("model")));
        assert_eq!(peek(br#"{"model":"a","mod\u0065l":"b"}"#), Err(DuplicateKey("model")));
        assert_eq!(peek(br#"{"stream":true,"x":1,"stream":false}"#), Err(DuplicateKey("stream")));
        assert_eq!(peek(br#"{"n":1,"n":128}"#), Err(DuplicateKey("n")));
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
        assert_eq!(peek(br#"{"max_tokens":5.9}"#).expect("fine").max_tokens, Some(5));
        assert_eq!(peeked(br#"{"model":7,"stream":"yes"}"#), Ok(Peek::default()));
    }

    #[test]
    fn the_answers_asked_for_are_between_1_and_128() {
        let choices = |n: &str| peek(format!(r#"{{"n":{n}}}"#).as_bytes()).expect("no duplicate").choices;
        for n in ["0", "-1", "-0", "-1e300", "2.5", "0.1", "\"5\"", "null", "true", "[2]", "{\"n\":2}"] {
            assert_eq!(choices(n), 1, "{n}");
        }
        for (n, expected) in [("1", 1), ("1e1", 10), ("4.0", 4), ("128", 128), ("129", 128), ("1e300", 128)] {
            assert_eq!(choices(n), expected, "{n}");
        }
        assert_eq!((choices("1000000000000000000"), choices("99999999999999999999999")), (128, 128));
        assert_eq!((choices("1e999"), peek(b"{}").expect("fine").choices), (1, 1));
    }

    #[test]
    fn what_is_embedded_is_no_text_of_a_prompt() {
        let body = format!(r#"{{"input":[{{"url":"data:image/png;base64,{}"}}]}}"#, "A".repeat(1000));
        let prompt = Prompt { bytes: body.len() as u64 - 1000, embedded: 1 };
        assert_eq!(peek(body.as_bytes()).expect("fine").prompt, prompt);
        assert_eq!(peek(&body.as_bytes()[1..]).expect("fine").prompt, Prompt::text(&body.as_bytes()[1..]));
    }

    #[test]
    fn a_deeply_nested_body_does_not_exhaust_the_stack() {
        let body = format!(r#"{{"model":"a","x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert!(peek(body.as_bytes()).is_ok());
    }
}
