//! Takes back out of a stream what weir's own `include_usage` brought into it.
//!
//! A gateway that is asked for a stream's usage tells it in one more chunk, whose `choices` are empty. Clients that did not
//! ask read `choices[0]` of every chunk, so they must not get to see that one.

use std::collections::VecDeque;

use bytes::Bytes;
use memchr::memmem;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::sse::{Event, event_end, event_end_across};
use super::usage;

/// An event longer than this is no usage, and passes as it comes.
const LONGEST_HELD: usize = 16 << 10;

/// Lets the events of a chat-completions stream pass, except for those with empty `choices` and a `usage`.
///
/// Whatever passes is the same bytes as came. Only whole events pass, except for one that is longer than 16 KiB.
#[derive(Debug, Default)]
pub struct UsageChunkFilter {
    /// The event that has begun and not ended; of one that passes as it comes, its last three bytes.
    partial: Vec<u8>,
    /// The event under way has been passed on so far.
    passing: bool,
    /// The last chunk ended with an event that was taken out, and that with a CR whose LF may yet come.
    cut_at_cr: bool,
}

impl UsageChunkFilter {
    /// Takes the stream's next bytes, and puts what may pass behind `out`: slices of the chunk, and a copy of an event that
    /// began in an earlier one.
    pub fn feed(&mut self, mut chunk: Bytes, out: &mut VecDeque<Bytes>) {
        if chunk.is_empty() {
            return;
        }
        if std::mem::take(&mut self.cut_at_cr) && chunk[0] == b'\n' {
            drop(chunk.split_to(1));
        }
        if !self.partial.is_empty() {
            self.continue_event(&mut chunk, out);
            self.cut_at_cr &= chunk.is_empty();
        }
        self.pass_whole_events(&mut chunk, out);
        if !chunk.is_empty() {
            self.take(chunk, false, out);
        }
    }

    /// The stream has ended: what is left of it, an event without its blank line.
    pub fn finish(&mut self) -> Option<Bytes> {
        let left = std::mem::take(self);
        let passes = !left.partial.is_empty() && !left.passing && !is_usage_chunk(&left.partial);
        passes.then(|| left.partial.into())
    }

    /// Whether nothing is held back.
    pub fn is_empty(&self) -> bool {
        self.partial.is_empty() || self.passing
    }

    /// Whether what has passed so far is whole events: the only place where a stream can be ended without cutting one.
    pub fn at_boundary(&self) -> bool {
        !self.passing
    }

    /// Gives the event under way its part of the chunk.
    fn continue_event(&mut self, chunk: &mut Bytes, out: &mut VecDeque<Bytes>) {
        let end = event_end_across(&self.partial, chunk);
        let part = chunk.split_to(end.unwrap_or(chunk.len()));
        self.take(part, end.is_some(), out);
    }

    /// Takes a part of the event under way, which may be its last: holds it, unless the event is too long.
    fn take(&mut self, part: Bytes, is_last: bool, out: &mut VecDeque<Bytes>) {
        if !self.passing && self.partial.len() + part.len() > LONGEST_HELD {
            pass(Bytes::copy_from_slice(&self.partial), out);
            self.passing = true;
        }
        self.partial.extend_from_slice(if self.passing { last_three(&part) } else { &part });
        if self.passing {
            self.partial = last_three(&self.partial).to_vec();
            pass(part, out);
        }
        if is_last {
            self.end_event(out);
        }
    }

    /// The event under way is whole.
    fn end_event(&mut self, out: &mut VecDeque<Bytes>) {
        let event = std::mem::take(&mut self.partial);
        if std::mem::take(&mut self.passing) {
            return;
        }
        if is_usage_chunk(&event) {
            self.cut_at_cr = event.ends_with(b"\r");
        } else {
            pass(event.into(), out);
        }
    }

    /// Passes the events that lie whole within the chunk, and leaves the rest of it.
    fn pass_whole_events(&mut self, chunk: &mut Bytes, out: &mut VecDeque<Bytes>) {
        let mut at = line_breaks(chunk);
        while let Some(end) = event_end(chunk, at) {
            if is_usage_chunk(&chunk[at..end]) {
                self.cut_at_cr = end == chunk.len() && chunk.ends_with(b"\r");
                pass(chunk.split_to(at), out);
                drop(chunk.split_to(end - at));
                at = 0;
            } else {
                at = end;
            }
            at += line_breaks(&chunk[at..]);
        }
        pass(chunk.split_to(at), out);
    }
}

fn last_three(bytes: &[u8]) -> &[u8] {
    &bytes[bytes.len().saturating_sub(3)..]
}

fn pass(bytes: Bytes, out: &mut VecDeque<Bytes>) {
    if !bytes.is_empty() {
        out.push_back(bytes);
    }
}

/// How many blank lines these bytes begin with: more of them than one belong to no event.
fn line_breaks(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count()
}

/// The members that tell the extra chunk from all others.
#[derive(Deserialize)]
struct Chunk {
    choices: Vec<IgnoredAny>,
    #[serde(rename = "usage")]
    _usage: Map<String, Value>,
}

/// Nearly every other chunk is told by the first, cheap question.
fn is_usage_chunk(event: &[u8]) -> bool {
    if usage::KEY.find(event).is_none() || !has_empty_choices(event) {
        return false;
    }
    let chunk = Event::parse(event).and_then(|event| serde_json::from_slice::<Chunk>(event.data).ok());
    chunk.is_some_and(|chunk| chunk.choices.is_empty())
}

/// Whether `"choices": []` stands somewhere.
fn has_empty_choices(event: &[u8]) -> bool {
    let key = b"\"choices\"";
    memmem::find_iter(event, key).any(|at| is_empty_array(&event[at + key.len()..]).unwrap_or(false))
}

/// Whether `: []` follows.
fn is_empty_array(behind_key: &[u8]) -> Option<bool> {
    let value = behind_key.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
    Some(value.strip_prefix(b"[")?.trim_ascii_start().starts_with(b"]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const USAGE: &str = "data: {\"choices\" : [ ] ,\"usage\":{\"x\":1}}";

    fn filter(chunks: &[&[u8]]) -> String {
        let (mut filter, mut out) = (UsageChunkFilter::default(), VecDeque::new());
        for chunk in chunks {
            filter.feed(Bytes::copy_from_slice(chunk), &mut out);
            assert!(out.iter().all(|bytes| !bytes.is_empty()));
        }
        out.extend(filter.finish());
        assert!(filter.is_empty() && filter.at_boundary());
        String::from_utf8(out.into_iter().flatten().collect()).expect("text")
    }

    /// Every way to cut these bytes in three.
    fn assert_filtered(whole: &str, expected: &str) {
        let bytes = whole.as_bytes();
        for a in 0..=bytes.len() {
            for b in a..=bytes.len() {
                let filtered = filter(&[&bytes[..a], &bytes[a..b], &bytes[b..]]);
                assert_eq!(filtered, expected, "{whole:?} cut at {a} and {b}");
            }
        }
        assert_eq!(filter(&bytes.chunks(1).collect::<Vec<_>>()), expected, "{whole:?} byte by byte");
    }

    #[test]
    fn the_usage_chunk_is_taken_out_however_the_stream_is_cut() {
        let ends = ["\n\n", "\r\n\r\n", "\r\r", "\r\n\r", "\n\r\n", "\r\n\n"];
        for end in ends {
            let before = format!(": ping{end}data: {{\"choices\":[1]}}{end}");
            let after = format!("data: [DONE]{end}");
            assert_filtered(&format!("{before}{USAGE}{end}{after}"), &format!("{before}{after}"));
            assert_filtered(&format!("{USAGE}{end}{before}"), &before);
            assert_filtered(&format!("{before}{USAGE}{end}"), &before);
        }
    }

    #[test]
    fn blank_lines_that_belong_to_no_event_stay() {
        assert_filtered(
            &format!("\n\ndata: a\n\n\n{USAGE}\n\n\ndata: b\n\n\n\n"),
            "\n\ndata: a\n\n\n\ndata: b\n\n\n\n",
        );
        assert_filtered(&format!("\r\ndata: a\r\n\r\n\r\n{USAGE}\r\n\r\n\r\n"), "\r\ndata: a\r\n\r\n\r\n\r\n");
    }

    #[test]
    fn everything_else_passes_byte_for_byte() {
        let others = [
            "data: {\"choices\":[{\"delta\":{}}],\"usage\":{\"prompt_tokens\":1}}\n\n",
            "data: {\"choices\":[],\"prompt_filter_results\":[]}\r\n\r\nid: 7\n\n",
            "data: {\"choices\":[],\"usage\":null}\n\n: {\"choices\":[],\"usage\":{}}\n\n",
            "data: {\"usage\":{\"choices\":[]}}\n\ndata: {\"choices\":[],\"usage\":{}} and more\n\n",
            "data: {\"x\":\"\\\"choices\\\":[],\\\"usage\\\":{}\"}\n\ndata: [DONE]\n\ndata: half",
            "\n",
            "",
        ];
        for other in others {
            assert_filtered(other, other);
        }
    }

    #[test]
    fn a_usage_chunk_without_its_blank_line_is_taken_out_at_the_end_too() {
        assert_filtered(&format!("data: a\n\n{USAGE}\n"), "data: a\n\n");
        assert_filtered(&format!("data: a\n\n{USAGE}"), "data: a\n\n");
    }

    #[test]
    fn what_passes_ends_where_an_event_ends() {
        let (mut filter, mut out) = (UsageChunkFilter::default(), VecDeque::new());
        filter.feed(Bytes::from_static(b"data: a\n\ndata: b\n\ndata: c"), &mut out);
        assert_eq!(out.pop_front().as_deref(), Some(&b"data: a\n\ndata: b\n\n"[..]), "one slice, not two");
        assert!(out.is_empty() && filter.at_boundary() && !filter.is_empty());
        filter.feed(Bytes::from_static(b"\n\n"), &mut out);
        assert_eq!(out.pop_front().as_deref(), Some(&b"data: c\n\n"[..]));
        assert!(filter.is_empty());
    }

    #[test]
    fn a_very_long_event_is_not_held() {
        let ends = ["\n|\n", "\r\n|\r\n", "\r\n\r|\n", "|\n\n", "\r|\r", "\r|\n\r|\n", "\n\n|"];
        for end in ends {
            let (mut filter, mut out) = (UsageChunkFilter::default(), VecDeque::new());
            let mut fed = String::new();
            let mut feed = |filter: &mut UsageChunkFilter, text: &str, fed: &mut String| {
                fed.push_str(text);
                filter.feed(Bytes::copy_from_slice(text.as_bytes()), &mut out);
                out.iter().map(Bytes::len).sum::<usize>()
            };
            assert_eq!(feed(&mut filter, &format!("data: {}", "x".repeat(LONGEST_HELD - 6)), &mut fed), 0);
            assert_eq!(feed(&mut filter, "x", &mut fed), fed.len());
            assert!(!filter.at_boundary() && filter.is_empty());
            for part in end.split('|') {
                assert_eq!(feed(&mut filter, part, &mut fed), fed.len(), "{end:?}");
            }
            assert!(filter.at_boundary(), "{end:?}");
            let passed = feed(&mut filter, &format!("{USAGE}\n\ndata: b\n\n"), &mut fed);
            assert_eq!(passed, fed.len() - USAGE.len() - 2, "{end:?}");
            assert!(filter.finish().is_none());
        }
    }
}
