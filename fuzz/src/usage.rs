//! What an answer cost, found at its end.

use weir::openai::usage::{Tail, Usage, of_event};

use super::chunks::cuts;
use super::json::Json;

/// A document shorter than this is kept whole.
const KEPT: usize = 8 << 10;

/// Cut however, a document tells the usage that a plain reading finds; and so does an event.
pub fn check(json: &[u8]) {
    let told = of_event(json);
    let tails: Vec<Option<Usage>> = cuts(json).into_iter().map(usage_of_tail).collect();
    if json.len() <= KEPT {
        assert!(tails.windows(2).all(|pair| pair[0] == pair[1]), "{tails:?}");
    }
    for usage in tails.iter().chain([&told]).copied().flatten() {
        assert!(usage.quota() >= usage.completion);
        assert_eq!(usage.merge(usage), usage);
    }
    // A key with such escapes is no key to weir.
    let has_escapes = json.windows(2).any(|pair| pair == b"\\u");
    if let Some(root) = Json::read(json).filter(|_| !has_escapes && json.len() <= KEPT) {
        assert_eq!(tails[0], in_document(&root));
        assert_eq!(told, in_event(&root));
    }
}

fn usage_of_tail(chunks: Vec<&[u8]>) -> Option<Usage> {
    let mut tail = Tail::default();
    chunks.into_iter().for_each(|chunk| tail.push(chunk));
    tail.usage()
}

/// The last readable usage of the root.
fn in_document(root: &Json) -> Option<Usage> {
    root.all("usage").filter_map(slow_usage).last()
}

/// The last readable usage of the root, its response or its message.
fn in_event(root: &Json) -> Option<Usage> {
    let members = root.members()?.iter();
    let mut told = members.filter_map(|(name, value)| match name.as_str() {
        "usage" => slow_usage(value),
        "response" | "message" => in_document(value),
        _ => None,
    });
    told.next_back()
}

/// A usage object; `None` where it has not what is needed, or something of another type.
fn slow_usage(usage: &Json) -> Option<Usage> {
    usage.members()?;
    let [prompt, input] = counts(usage, ["prompt_tokens", "input_tokens"])?;
    let [completion, output] = counts(usage, ["completion_tokens", "output_tokens"])?;
    let [read, written] = counts(usage, ["cache_read_input_tokens", "cache_creation_input_tokens"])?;
    let of_prompt = [details(usage, "prompt_tokens_details")?, details(usage, "input_tokens_details")?];
    let of_completion = [details(usage, "completion_tokens_details")?, details(usage, "output_tokens_details")?];
    let (told, said) = (prompt.or(input), completion.or(output));
    told.or(said)?;
    let is_anthropic = prompt.is_none() && of_prompt == [None, None];
    let (told, read) = (told.unwrap_or(0), read.unwrap_or(0));
    let written = written.filter(|_| is_anthropic).unwrap_or(0);
    let counted = told.saturating_add(written);
    Some(Usage {
        prompt: if is_anthropic { counted.saturating_add(read) } else { told },
        completion: said.unwrap_or(0),
        cached: of_prompt[0].or(of_prompt[1]).and_then(|[cached, _]| cached).unwrap_or(read),
        reasoning: of_completion[0].or(of_completion[1]).and_then(|[_, reasoning]| reasoning).unwrap_or(0),
        counted,
    })
}

type Counts = [Option<u64>; 2];

/// Two counts, each absent or null; `None` where one is something else, or stands twice.
fn counts(object: &Json, names: [&str; 2]) -> Option<Counts> {
    let mut found = [None; 2];
    for (found, name) in found.iter_mut().zip(names) {
        let mut all = object.all(name);
        *found = match all.next() {
            Some(value) if !value.is_null() => Some(value.number()?.as_u64()?),
            _ => None,
        };
        if all.next().is_some() {
            return None;
        }
    }
    Some(found)
}

fn details(usage: &Json, name: &str) -> Option<Option<Counts>> {
    let mut all = usage.all(name);
    let first = all.next().filter(|details| !details.is_null());
    if all.next().is_some() {
        return None;
    }
    let Some(details) = first else { return Some(None) };
    // serde reads a struct from a list too, member by member.
    details.members()?;
    counts(details, ["cached_tokens", "reasoning_tokens"]).map(Some)
}
