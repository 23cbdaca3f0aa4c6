//! What an answer cost, as the gateway counts it.

use std::sync::LazyLock;

use memchr::{memmem, memrchr};
use serde::Deserialize;

/// The tokens of one answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// All of the prompt, whether it was read anew or from a cache.
    pub prompt: u64,
    pub completion: u64,
    /// The part of `prompt` that was read from the gateway's cache.
    pub cached: u64,
    /// The part of `completion` that was thought, not said.
    pub reasoning: u64,
    /// The part of `prompt` that counts against a token quota: OpenAI counts all of it, Anthropic not what its cache
    /// had.
    pub counted: u64,
}

impl Usage {
    /// The tokens that count against a token quota.
    pub fn quota(self) -> u64 {
        self.counted.saturating_add(self.completion)
    }

    /// The usage of one answer that several events told of, each of a part or of all so far: the larger of each count.
    pub fn merge(self, later: Self) -> Self {
        Self {
            prompt: self.prompt.max(later.prompt),
            completion: self.completion.max(later.completion),
            cached: self.cached.max(later.cached),
            reasoning: self.reasoning.max(later.reasoning),
            counted: self.counted.max(later.counted),
        }
    }
}

/// Made once: a searcher costs more to make than to use on an event.
pub(super) static KEY: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"usage\""));

static KEY_FROM_THE_END: LazyLock<memmem::FinderRev<'static>> = LazyLock::new(|| memmem::FinderRev::new("\"usage\""));

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

    /// The usage of the document that ends with these bytes: a member of its root.
    pub fn usage(&self) -> Option<Usage> {
        find(&self.0, |outline| outline.depth == 1)
    }
}

/// The usage that a stream's event tells: a member of its root, or of the `response` or `message` in it.
///
/// Of a long event the end is enough.
pub fn of_event(json: &[u8]) -> Option<Usage> {
    find(json, |outline| match outline.depth {
        1 => true,
        2 => outline.is_member_of(&[b"\"response\"", b"\"message\""]),
        _ => false,
    })
}

/// The last `"usage"` object that is in its place, in JSON of which at least the end is there.
///
/// Gateways repeat what clients send: the Responses API tells a request's tools, and a tool may well have a parameter of
/// that name. What stands deeper than the gateway's own word would is not it.
fn find(json: &[u8], in_its_place: impl Fn(&Outline<'_>) -> bool) -> Option<Usage> {
    // Nearly every event has none, and forwards that is told much faster.
    KEY.find(json)?;
    let key = KEY.needle();
    let mut outline = Outline { json, at: json.len(), depth: 0, in_string: false };
    let mut end = json.len();
    while let Some(at) = KEY_FROM_THE_END.rfind(&json[..end]) {
        outline.step_back_to(at + key.len());
        if !outline.in_string
            && !is_escaped(json, at)
            && in_its_place(&outline)
            && let Some(usage) = read(&json[at + key.len()..])
        {
            return Some(usage);
        }
        end = at;
    }
    None
}

/// How deep a place in JSON is, counted from its end.
#[derive(Clone, Copy)]
struct Outline<'j> {
    json: &'j [u8],
    at: usize,
    /// Objects and arrays around it: 1 within the root.
    depth: usize,
    in_string: bool,
}

impl Outline<'_> {
    fn step_back_to(&mut self, to: usize) {
        while self.at > to {
            if self.in_string {
                // Nothing else in it matters.
                self.at = memrchr(b'"', &self.json[to..self.at]).map_or(to, |quote| to + quote + 1);
            }
            if self.at > to {
                self.step_back();
            }
        }
    }

    fn step_back(&mut self) {
        self.at -= 1;
        match self.json[self.at] {
            b'"' if !is_escaped(self.json, self.at) => self.in_string = !self.in_string,
            b'}' | b']' if !self.in_string => self.depth += 1,
            b'{' | b'[' if !self.in_string => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }

    /// Whether the object around this place has one of these keys. One whose beginning is cut off might.
    fn is_member_of(&self, keys: &[&[u8]]) -> bool {
        let (mut outside, depth) = (*self, self.depth);
        while outside.depth >= depth {
            if outside.at == 0 {
                return true;
            }
            outside.step_back();
        }
        let before = self.json[..outside.at].trim_ascii_end();
        let Some(key) = before.strip_suffix(b":").map(<[u8]>::trim_ascii_end) else { return false };
        let is_key = |known: &&[u8]| key.strip_suffix(*known).is_some_and(|before| !is_escaped(key, before.len()));
        keys.iter().any(is_key)
    }
}

/// Whether an odd number of backslashes stands before this place.
fn is_escaped(json: &[u8], at: usize) -> bool {
    json[..at].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

/// Reads `: {…}`, whatever follows it.
fn read(after_key: &[u8]) -> Option<Usage> {
    let value = after_key.trim_ascii_start().strip_prefix(b":")?;
    let wire: Wire = serde_json::Deserializer::from_slice(value).into_iter().next()?.ok()?;
    wire.usage()
}

/// Usage under the names of Chat Completions, Completions and Embeddings, and under those of Responses and Messages. Some
/// gateways write both.
#[derive(Deserialize)]
struct Wire {
    prompt_tokens: Option<u64>,
    input_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    output_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
    input_tokens_details: Option<Details>,
    completion_tokens_details: Option<Details>,
    output_tokens_details: Option<Details>,
    cache_read_input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
    reasoning_tokens: Option<u64>,
}

impl Wire {
    fn usage(self) -> Option<Usage> {
        let told = self.prompt_tokens.or(self.input_tokens);
        let completion = self.completion_tokens.or(self.output_tokens);
        told.or(completion)?;
        let cache_is_beside = self.cache_is_beside();
        let (told, read) = (told.unwrap_or(0), self.cache_read_input_tokens.unwrap_or(0));
        let prompt_details = self.prompt_tokens_details.or(self.input_tokens_details);
        let completion_details = self.completion_tokens_details.or(self.output_tokens_details);
        let written = if cache_is_beside { self.cache_creation_input_tokens.unwrap_or(0) } else { 0 };
        let counted = told.saturating_add(written);
        Some(Usage {
            prompt: if cache_is_beside { counted.saturating_add(read) } else { told },
            completion: completion.unwrap_or(0),
            cached: prompt_details.and_then(|details| details.cached_tokens).unwrap_or(read),
            reasoning: completion_details.and_then(|details| details.reasoning_tokens).unwrap_or(0),
            counted,
        })
    }

    /// Whether what the cache had stands beside the input, as in Messages, instead of being a part of it. (A gateway that
    /// translates Messages into OpenAI's words keeps these two names, but has them in its `prompt_tokens`.)
    fn cache_is_beside(&self) -> bool {
        self.prompt_tokens.is_none() && self.prompt_tokens_details.is_none() && self.input_tokens_details.is_none()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    #[test]
    fn stepping_back_over_strings_comes_to_the_same_as_step_by_step() {
        let mut rng = SmallRng::seed_from_u64(1);
        for _ in 0..2000 {
            let json: Vec<u8> = (0..20).map(|_| br#""\{}[]aa""#[rng.random_range(0..9)]).collect();
            let outline = Outline { json: &json, at: json.len(), depth: 0, in_string: false };
            for to in 0..json.len() {
                let (mut at_once, mut slow) = (outline, outline);
                at_once.step_back_to(to);
                while slow.at > to {
                    slow.step_back();
                }
                let state = |it: Outline<'_>| (it.at, it.depth, it.in_string);
                assert_eq!(state(at_once), state(slow), "{} to {to}", json.escape_ascii());
            }
        }
    }

    #[test]
    fn the_usage_of_each_api_is_read() {
        let chat = br#"{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15,
            "prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}},"x":"y"}"#;
        assert_eq!(of_event(chat), Some(Usage { prompt: 10, completion: 5, cached: 4, reasoning: 2, counted: 10 }));
        assert_eq!(of_event(br#"{"usage": {"prompt_tokens":3,"total_tokens":3}}"#).map(|usage| usage.prompt), Some(3));
        assert_eq!(
            of_event(br#"{"usage" : {"input_tokens":1,"output_tokens":2} }"#).map(|usage| usage.completion),
            Some(2)
        );
    }

    #[test]
    fn what_a_cache_had_is_a_part_of_the_prompt_but_counts_only_where_the_api_counts_it() {
        let of = |json: &str| of_event(json.as_bytes()).map(|usage| (usage.prompt, usage.cached, usage.quota()));
        let responses =
            r#"{"usage":{"input_tokens":100,"input_tokens_details":{"cached_tokens":60},"output_tokens":5}}"#;
        assert_eq!(of(responses), Some((100, 60, 105)));
        let messages = r#"{"usage":{"input_tokens":10,"cache_creation_input_tokens":30,"cache_read_input_tokens":60,
            "cache_creation":{"ephemeral_5m_input_tokens":30},"output_tokens":5}}"#;
        assert_eq!(of(messages), Some((100, 60, 45)));
        let translated = r#"{"usage":{"prompt_tokens":100,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":60},
            "cache_creation_input_tokens":30,"cache_read_input_tokens":60}}"#;
        assert_eq!(of(translated), Some((100, 60, 105)));
        let plain = r#"{"usage":{"prompt_tokens":100,"completion_tokens":5,"cache_read_input_tokens":60}}"#;
        assert_eq!(of(plain), Some((100, 60, 105)));
    }

    #[test]
    fn both_names_at_once_are_one_count() {
        let both = br#"{"usage":{"prompt_tokens":10,"completion_tokens":5,"input_tokens":10,"output_tokens":5,
            "prompt_tokens_details":null,"input_tokens_details":{"cached_tokens":4}}}"#;
        assert_eq!(of_event(both), Some(Usage { prompt: 10, completion: 5, cached: 4, reasoning: 0, counted: 10 }));
    }

    #[test]
    fn half_a_count_and_an_absurd_one_are_counts_too() {
        let quota = |json: &str| of_event(json.as_bytes()).map(Usage::quota);
        assert_eq!(quota(r#"{"usage":{"input_tokens":7}}"#), Some(7));
        assert_eq!(quota(r#"{"usage":{"completion_tokens":7,"prompt_tokens":null}}"#), Some(7));
        assert_eq!(quota(r#"{"usage":{"total_tokens":7}}"#), None);
        let absurd = r#"{"usage":{"input_tokens":18446744073709551615,"cache_read_input_tokens":18446744073709551615,
            "cache_creation_input_tokens":1,"output_tokens":18446744073709551615}}"#;
        assert_eq!(quota(absurd), Some(u64::MAX));
    }

    #[test]
    fn events_that_tell_parts_or_all_so_far_add_up_to_one_usage() {
        let start =
            of_event(br#"{"message":{"usage":{"input_tokens":10,"cache_read_input_tokens":90,"output_tokens":1}}}"#);
        let delta = of_event(br#"{"type":"message_delta","usage":{"output_tokens":15}}"#);
        let (start, delta) = (start.expect("usage"), delta.expect("usage"));
        let whole = Usage { prompt: 100, completion: 15, cached: 90, reasoning: 0, counted: 10 };
        assert_eq!((start.merge(delta), whole.quota()), (whole, 25));
        assert_eq!(whole.merge(delta), whole, "a cumulative count is no sum");
        assert_eq!(Usage::default().merge(whole), whole);
    }

    #[test]
    fn the_word_inside_a_string_is_not_usage() {
        assert_eq!(of_event(br#"{"content":"the \"usage\":{\"prompt_tokens\":9}"}"#), None);
        assert_eq!(of_event(br#"{"content":"usage","usage":null}"#), None);
        assert_eq!(of_event(br#"{"a\"usage":{"prompt_tokens":9}}"#), None, "a key that ends so");
        assert_eq!(of_event(br#"{"a\"response":{"usage":{"prompt_tokens":9}}}"#), None, "the same");
        assert_eq!(of_event(br#"{"usage":{"prompt_tokens":"#), None);
    }

    #[test]
    fn what_a_client_sent_and_the_gateway_repeats_is_not_usage() {
        let tool = r#"{"type":"function","parameters":{"properties":{"usage":{"input_tokens":1000000000000}}}}"#;
        let created = format!(r#"{{"type":"response.created","response":{{"tools":[{tool}],"usage":null}}}}"#);
        assert_eq!(of_event(created.as_bytes()), None);
        let completed = format!(r#"{{"response":{{"usage":{{"input_tokens":7}},"tools":[{tool}],"note":"}}\"{{"}}}}"#);
        assert_eq!(of_event(completed.as_bytes()).map(|usage| usage.prompt), Some(7));
        assert_eq!(
            of_event(&completed.as_bytes()[13..]).map(|usage| usage.prompt),
            Some(7),
            "its beginning is cut off"
        );
        assert_eq!(of_event(br#"{"metadata":{"usage":{"input_tokens":7}}}"#), None);
        let mut tail = Tail::default();
        tail.push(br#"{"message":{"usage":{"input_tokens":7}}}"#);
        assert_eq!(tail.usage(), None, "of a document only the root's own");
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
