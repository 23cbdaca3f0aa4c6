//! Server-sent events, read in passing: where one event ends, and what it carries.
//!
//! Events may be cut anywhere by the chunks they come in, and their lines may end in LF, CR LF or CR (WHATWG HTML, "Server-sent
//! events"). The scanner copies only what it must: an event that lies whole within a chunk is looked at in place.

use memchr::memchr2;

/// Of an event longer than this only its name and its end are kept: that is where the usage stands.
const KEPT: usize = 8 << 10;

/// Reads a stream's bytes as they pass.
#[derive(Debug, Default)]
pub struct Scanner {
    /// The event that has begun and not ended.
    partial: Vec<u8>,
    /// The beginning of `partial` was dropped.
    truncated: bool,
    /// What it said the event's name is.
    name: Option<Vec<u8>>,
    /// It had a name or data, so that it is no mere comment.
    says_something: bool,
}

/// One event with a name or data; comments and bare keep-alives are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event<'e> {
    /// `event:`, where given.
    pub name: Option<&'e [u8]>,
    /// The first `data:` line (the APIs that pass here use one), or the end of a very long event.
    pub data: &'e [u8],
}

impl Scanner {
    /// Looks at the next bytes; `seen` is told of every event that ends in them.
    pub fn feed(&mut self, chunk: &[u8], mut seen: impl FnMut(Event<'_>)) {
        let mut rest = chunk;
        if !self.partial.is_empty() {
            rest = self.complete(chunk, &mut seen);
        }
        while let Some(end) = event_end(rest, 0) {
            if let Some(event) = Event::parse(&rest[..end]) {
                seen(event);
            }
            rest = &rest[end..];
        }
        self.keep(rest);
    }

    /// Whether all bytes so far are whole events: the only place where a stream can be ended without cutting one.
    pub fn at_boundary(&self) -> bool {
        self.partial.iter().all(|byte| matches!(byte, b'\r' | b'\n'))
    }

    /// Ends the event under way with the chunk's first bytes, if they do, and returns what is left of the chunk.
    fn complete<'c>(&mut self, chunk: &'c [u8], seen: &mut impl FnMut(Event<'_>)) -> &'c [u8] {
        let Some(end) = event_end_across(&self.partial, chunk) else {
            self.keep(chunk);
            return &[];
        };
        self.partial.extend_from_slice(&chunk[..end]);
        let event = Event::parse(&self.partial);
        if self.truncated && (self.says_something || event.is_some()) {
            seen(Event { name: self.name.as_deref(), data: &self.partial })
        } else if let Some(event) = event {
            seen(event)
        }
        self.partial.clear();
        (self.truncated, self.name, self.says_something) = (false, None, false);
        &chunk[end..]
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        if self.partial.len() > 2 * KEPT {
            let event = Event::parse(&self.partial);
            self.says_something |= event.is_some();
            if !self.truncated {
                self.name = event.and_then(|event| event.name).map(<[u8]>::to_vec);
            }
            self.partial.drain(..self.partial.len() - KEPT);
            self.truncated = true;
        }
    }
}

impl<'e> Event<'e> {
    /// Reads the lines of a whole event; `None` where they have neither name nor data.
    pub fn parse(lines: &'e [u8]) -> Option<Self> {
        let (mut name, mut data) = (None, None);
        let mut rest = lines;
        while !rest.is_empty() {
            let end = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
            let line = &rest[..end];
            rest = rest.get(end + 1..).unwrap_or_default();
            let Some((field, value)) = field(line) else { continue };
            match field {
                Field::Event => name = Some(value),
                Field::Data => data = data.or(Some(value)),
            }
        }
        (name.is_some() || data.is_some()).then(|| Self { name, data: data.unwrap_or_default() })
    }
}

/// The fields that are read.
enum Field {
    Event,
    Data,
}

/// A line's field and its value; `None` for those that are not read, and for comments.
fn field(line: &[u8]) -> Option<(Field, &[u8])> {
    let (field, value) = match line {
        [b'd', b'a', b't', b'a', b':', value @ ..] => (Field::Data, value),
        [b'e', b'v', b'e', b'n', b't', b':', value @ ..] => (Field::Event, value),
        _ => return None,
    };
    Some((field, value.strip_prefix(b" ").unwrap_or(value)))
}

/// The place just behind the blank line that ends the first event, looking from `from`.
///
/// A CR at the very end counts as a whole line break: its LF may yet come.
pub fn event_end(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        at += memchr2(b'\n', b'\r', &bytes[at..])?;
        let line_end = line_break(bytes, at)?;
        if let Some(blank_end) = line_break(bytes, line_end) {
            return Some(blank_end);
        }
        at = line_end;
    }
}

/// The place in `chunk` just behind the blank line that ends an event of which `before` came earlier, without its end; the
/// last three bytes of that are enough.
pub fn event_end_across(before: &[u8], chunk: &[u8]) -> Option<usize> {
    // An end may begin up to three bytes before the chunk: CR LF CR | LF.
    let tail = &before[before.len().saturating_sub(3)..];
    let head = &chunk[..chunk.len().min(3)];
    let mut overlap = [0; 6];
    overlap[..tail.len()].copy_from_slice(tail);
    overlap[tail.len()..tail.len() + head.len()].copy_from_slice(head);
    let across = event_end(&overlap[..tail.len() + head.len()], 0).and_then(|end| end.checked_sub(tail.len()));
    let end = across.or_else(|| event_end(chunk, 0))?;
    // The overlap may have cut a CR from its LF.
    let is_cut = end > 0 && chunk[end - 1] == b'\r' && chunk.get(end) == Some(&b'\n');
    Some(if is_cut { end + 1 } else { end })
}

/// The place behind the line break at `at`; `None` where there is none.
fn line_break(bytes: &[u8], at: usize) -> Option<usize> {
    match (bytes.get(at)?, bytes.get(at + 1)) {
        (b'\r', Some(b'\n')) => Some(at + 2),
        (b'\n' | b'\r', _) => Some(at + 1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(chunks: &[&[u8]]) -> (Vec<(Option<String>, String)>, bool) {
        let mut scanner = Scanner::default();
        let mut events = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        for chunk in chunks {
            scanner.feed(chunk, |event| events.push((event.name.map(text), text(event.data))));
        }
        (events, scanner.at_boundary())
    }

    #[test]
    fn events_are_the_same_however_the_chunks_cut_them() {
        let whole = b": ping\n\nevent: a\ndata: {\"x\":1}\n\ndata: two\r\n\r\nid: 7\ndata:three\r\rdata: [DONE]\n\n";
        let (expected, boundary) = scan(&[whole]);
        assert_eq!(expected.len(), 4);
        assert_eq!(expected[0], (Some("a".into()), "{\"x\":1}".into()));
        assert!(boundary);
        for a in 0..whole.len() {
            for b in a..whole.len() {
                assert_eq!(
                    scan(&[&whole[..a], &whole[a..b], &whole[b..]]),
                    (expected.clone(), true),
                    "cut at {a} and {b}"
                );
            }
        }
        let bytes: Vec<&[u8]> = whole.chunks(1).collect();
        assert_eq!(scan(&bytes).0, expected);
    }

    #[test]
    fn the_inside_of_an_event_is_no_boundary() {
        assert!(!scan(&[b"data: half"]).1);
        assert!(!scan(&[b"data: half\n"]).1);
        assert!(scan(&[b"data: whole\n\n"]).1);
        assert!(scan(&[b"data: whole\r\n\r", b"\n"]).1);
        assert!(scan(&[]).1);
    }

    #[test]
    fn a_comment_is_no_event_however_long_it_is() {
        let comment = [b":", &[b'x'; 3 * KEPT][..], b"\n\n"].concat();
        let pieces: Vec<&[u8]> = comment.chunks(1000).collect();
        assert_eq!(scan(&[&comment]), (vec![], true));
        assert_eq!(scan(&pieces), (vec![], true));
    }

    #[test]
    fn of_an_endless_event_only_the_name_and_the_end_are_kept() {
        let mut scanner = Scanner::default();
        scanner.feed(b"event: long\ndata: ", |_| panic!("no event yet"));
        for _ in 0..1000 {
            scanner.feed(&[b'x'; 1000], |_| panic!("no event yet"));
            assert!(scanner.partial.len() <= 2 * KEPT);
        }
        let mut seen = 0;
        scanner.feed(b"\"usage\":{}}\n\ndata: next\n\n", |event| {
            seen += 1;
            match seen {
                1 => assert!(event.name == Some(b"long") && event.data.ends_with(b"\"usage\":{}}\n\n")),
                _ => assert_eq!(event, Event { name: None, data: b"next" }),
            }
        });
        assert_eq!(seen, 2);
    }
}
