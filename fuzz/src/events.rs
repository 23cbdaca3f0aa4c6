//! The scanner of server-sent events.

use weir::openai::output;
use weir::openai::sse::{Event, Scanner};

use super::chunks::{cuts, expand};
use super::json::Json;

/// What the scanner keeps at least of an event that is too long.
const KEPT: usize = 8 << 10;

/// Cut however, a stream has the events of a slow reading of it.
pub fn check(stream: &[u8]) {
    let stream = expand(stream);
    let (expected, rest) = slow_events(&stream);
    for chunks in cuts(&stream) {
        let mut scanner = Scanner::default();
        let mut seen = Vec::new();
        for chunk in chunks {
            scanner.feed(chunk, |event| seen.push((event.name.map(<[u8]>::to_vec), event.data.to_vec())));
        }
        assert_eq!(seen.len(), expected.len(), "as many events");
        for ((name, data), expected) in seen.iter().zip(&expected) {
            let told = || String::from_utf8_lossy(&data[..data.len().min(1000)]).into_owned();
            assert!(expected.is(name.as_deref(), data), "{name:?} {:?}", told());
        }
        assert_eq!(scanner.at_boundary(), rest.iter().all(is_break));
    }
    for event in &expected {
        text_is_counted(event.data);
    }
}

/// An event, and its lines with the blank one.
pub struct SlowEvent<'e> {
    pub name: Option<&'e [u8]>,
    pub data: &'e [u8],
    pub raw: &'e [u8],
}

impl SlowEvent<'_> {
    fn is(&self, name: Option<&[u8]>, data: &[u8]) -> bool {
        if self.raw.len() <= 2 * KEPT || self.data == data {
            return self.name == name && self.data == data;
        }
        // Cut, or whole and still without one of its lines: of a longer one only the end is promised.
        // (Where a chunk cut the last CR from its LF, the event ended with the CR.)
        let ends_so = |raw: &[u8]| raw.ends_with(data);
        data.len() >= KEPT && (ends_so(self.raw) || self.raw.strip_suffix(b"\n").is_some_and(ends_so))
    }
}

/// Every event with a name or data, and what stands behind the last blank line.
pub fn slow_events(stream: &[u8]) -> (Vec<SlowEvent<'_>>, &[u8]) {
    let (mut events, mut rest) = (Vec::new(), stream);
    while let Some(end) = slow_end(rest) {
        let (raw, behind) = rest.split_at(end);
        let (mut name, mut data) = (None, None);
        for line in raw.split(is_break) {
            match split_line(line) {
                Some((b"event", value)) => name = Some(value),
                Some((b"data", value)) if data.is_none() => data = Some(value),
                _ => {}
            }
        }
        if name.is_some() || data.is_some() {
            events.push(SlowEvent { name, data: data.unwrap_or_default(), raw });
        }
        rest = behind;
    }
    (events, rest)
}

/// The place behind the first two line breaks in a row: LF, CR LF or CR each.
pub fn slow_end(bytes: &[u8]) -> Option<usize> {
    let break_at = |at: usize| match bytes.get(at..)? {
        [b'\r', b'\n', ..] => Some(at + 2),
        [b'\r' | b'\n', ..] => Some(at + 1),
        _ => None,
    };
    let mut at = 0;
    while at < bytes.len() {
        match break_at(at) {
            Some(behind) => match break_at(behind) {
                Some(end) => return Some(end),
                None => at = behind,
            },
            None => at += 1,
        }
    }
    None
}

pub fn is_break(byte: &u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

fn split_line(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let value = &line[colon + 1..];
    Some((&line[..colon], value.strip_prefix(b" ").unwrap_or(value)))
}

/// The output that an event carries is as long as a plain reading of its JSON says.
fn text_is_counted(data: &[u8]) {
    let counted = output::text_bytes(data);
    assert!(counted <= data.len());
    // A key with escapes is no key to weir.
    let has_escapes = data.windows(2).any(|pair| pair == b"\\u");
    if let Some(json) = Json::read(data).filter(|_| !has_escapes) {
        assert_eq!(counted, if repeats_output(&json) { 0 } else { slow_text(&json) });
    }
}

fn repeats_output(json: &Json) -> bool {
    match json {
        Json::Object(members) => members.iter().any(|(name, value)| {
            let kind = value.str().filter(|_| name == "type").unwrap_or_default();
            kind.starts_with("response.") && !kind.ends_with(".delta") || repeats_output(value)
        }),
        Json::Array(items) => items.iter().any(repeats_output),
        Json::Scalar(_) => false,
    }
}

fn slow_text(json: &Json) -> usize {
    const OUTPUT: [&str; 8] =
        ["content", "text", "delta", "arguments", "partial_json", "thinking", "reasoning_content", "reasoning"];
    match json {
        Json::Object(members) => {
            let own = |(name, value): &(String, Json)| match value.str() {
                Some(text) if OUTPUT.contains(&name.as_str()) => text.len(),
                _ => slow_text(value),
            };
            members.iter().map(own).sum()
        }
        Json::Array(items) => items.iter().map(slow_text).sum(),
        Json::Scalar(_) => 0,
    }
}

/// The event of these bytes, for those who have one alone.
pub fn event_of(bytes: &[u8]) -> Option<Event<'_>> {
    Event::parse(bytes)
}
