//! What an answer cost, as the gateway counts it.

use memchr::memmem;
use serde::Deserialize;

/// The tokens of one answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: u64,
    pub completion: u64,
    /// The part of `prompt` that was read from the gateway's cache.
    pub cached: u64,
    /// The part of `completion` that was thought, not said.
    pub reasoning: u64,
}

/// Usage stands near the end of a body, so only so much of it is kept.
const TAIL: usize = 8 << 10;

/// The last bytes of a body, copied (a slice would pin the buffer that it was read into).
#[derive(Debug, Default)]
pub struct Tail(Vec<u8>);

impl Tail {
    /// Adds the next bytes; keeps at least the last 8 KiB and at most twice as much.
    pub fn push(&mut self, chunk: &[u8]) {
        let chunk = &chunk[chunk.len().saturating_sub(TAIL)..];
        if self.0.len() + chunk.len() > 2 * TAIL {
            self.0.drain(..self.0.len() - TAIL.min(self.0.len()));
        }
        self.0.extend_from_slice(chunk);
    }

    /// The usage in these bytes.
    pub fn usage(&self) -> Option<Usage> {
        find(&self.0)
    }
}

/// The last `"usage"` object in a piece of JSON, which may begin anywhere.
///
/// Inside a JSON string the word's quotes would be escaped, so they can't be mistaken for the key.
pub fn find(json: &[u8]) -> Option<Usage> {
    let key = b"\"usage\"";
    let mut end = json.len();
    while let Some(at) = memmem::rfind(&json[..end], key) {
        if (at == 0 || json[at - 1] != b'\\')
            && let Some(usage) = read(&json[at + key.len()..])
        {
            return Some(usage);
        }
        end = at;
    }
    None
}

/// Reads `: {…}`, whatever follows it.
fn read(after_key: &[u8]) -> Option<Usage> {
    let value = after_key.trim_ascii_start().strip_prefix(b":")?;
    let wire: Wire = serde_json::Deserializer::from_slice(value).into_iter().next()?.ok()?;
    if wire.prompt.is_none() && wire.completion.is_none() {
        return None;
    }
    let cached = wire.prompt_details.and_then(|details| details.cached_tokens).or(wire.cache_read_input_tokens);
    Some(Usage {
        prompt: wire.prompt.unwrap_or(0),
        completion: wire.completion.unwrap_or(0),
        cached: cached.unwrap_or(0),
        reasoning: wire.completion_details.and_then(|details| details.reasoning_tokens).unwrap_or(0),
    })
}

/// Usage as Chat Completions, Completions and Embeddings write it, and under the names of Responses and Messages.
#[derive(Deserialize)]
struct Wire {
    #[serde(rename = "prompt_tokens", alias = "input_tokens")]
    prompt: Option<u64>,
    #[serde(rename = "completion_tokens", alias = "output_tokens")]
    completion: Option<u64>,
    #[serde(rename = "prompt_tokens_details", alias = "input_tokens_details")]
    prompt_details: Option<Details>,
    #[serde(rename = "completion_tokens_details", alias = "output_tokens_details")]
    completion_details: Option<Details>,
    cache_read_input_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
    reasoning_tokens: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usage_of_each_api_is_read() {
        let chat = br#"{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15,
            "prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}},"x":"y"}"#;
        assert_eq!(find(chat), Some(Usage { prompt: 10, completion: 5, cached: 4, reasoning: 2 }));
        assert_eq!(find(br#"{"usage": {"prompt_tokens":3,"total_tokens":3}}"#).map(|usage| usage.prompt), Some(3));
        assert_eq!(find(br#""usage" : {"input_tokens":1,"output_tokens":2}"#).map(|usage| usage.completion), Some(2));
    }

    #[test]
    fn the_word_inside_a_string_is_not_usage() {
        assert_eq!(find(br#"{"content":"the \"usage\":{\"prompt_tokens\":9}"}"#), None);
        assert_eq!(find(br#"{"content":"usage","usage":null}"#), None);
        assert_eq!(find(br#"{"usage":{"prompt_tokens":"#), None);
    }

    #[test]
    fn the_tail_of_a_long_body_still_has_the_usage() {
        let mut tail = Tail::default();
        for _ in 0..100 {
            tail.push(&[b'x'; 3000]);
            assert!(tail.0.len() <= 2 * TAIL);
        }
        tail.push(&[b'x'; 100_000]);
        tail.push(br#"","usage":{"prompt_tokens":1,"completion_tokens":2}}"#);
        assert_eq!(tail.usage().map(|usage| usage.completion), Some(2));
    }
}
