//! The filter that takes the usage chunk out of a stream again.

use std::collections::VecDeque;

use bytes::Bytes;
use weir::openai::usage_chunk::UsageChunkFilter;

use super::chunks::{cuts, expand};
use super::events::{event_of, is_break, slow_end};
use super::json::Json;

/// An event longer than this passes as it comes, if it does not come at once.
const LONGEST_HELD: usize = 16 << 10;

/// Cut however, a stream comes out as it went in, less its usage chunks.
pub fn check(stream: &[u8]) {
    let stream = expand(stream);
    let expected = without_usage(&stream);
    for chunks in cuts(&stream) {
        let mut filter = UsageChunkFilter::default();
        let mut passed = Vec::new();
        let mut out = VecDeque::new();
        for chunk in chunks {
            filter.feed(Bytes::copy_from_slice(chunk), &mut out);
            assert!(out.iter().all(|bytes| !bytes.is_empty()), "an empty chunk would end a chunked body");
            out.drain(..).for_each(|bytes| passed.extend_from_slice(&bytes));
            if filter.at_boundary() {
                assert!(passed.last().is_none_or(is_break), "only whole events have passed");
            }
        }
        if let Some(held) = filter.finish() {
            passed.extend_from_slice(&held);
        }
        assert!(filter.is_empty());
        match &expected {
            Some(expected) => {
                assert!(passed == *expected, "{:.2000}\ninstead of\n{:.2000}", text(&passed), text(expected))
            }
            None => assert!(passed.len() <= stream.len()),
        }
    }
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// A slow reading of what passes; `None` where an event cannot be judged plainly: too long, or JSON that only weir reads.
fn without_usage(stream: &[u8]) -> Option<Vec<u8>> {
    let (mut passed, mut rest) = (Vec::new(), stream);
    while !rest.is_empty() {
        let blank = rest.iter().take_while(|byte| is_break(byte)).count();
        passed.extend_from_slice(&rest[..blank]);
        rest = &rest[blank..];
        let (event, behind) = rest.split_at(slow_end(rest).unwrap_or(rest.len()));
        if event.len() > LONGEST_HELD {
            return None;
        }
        if !is_usage_chunk(event)? {
            passed.extend_from_slice(event);
        }
        rest = behind;
    }
    Some(passed)
}

fn is_usage_chunk(event: &[u8]) -> Option<bool> {
    let Some(event) = event_of(event) else { return Some(false) };
    if !event.data.windows(9).any(|key| key == b"\"choices\"") {
        return Some(false);
    }
    let json = Json::read(event.data)?;
    let (choices, usage): (Vec<_>, Vec<_>) = (json.all("choices").collect(), json.all("usage").collect());
    Some(matches!((&choices[..], &usage[..]), ([Json::Array(choices)], [Json::Object(_)]) if choices.is_empty()))
}
