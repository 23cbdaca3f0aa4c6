//! A gateway's answer: its head, how its body ends, and a body in chunks.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use weir::upstream::chunked::ChunkedDecoder;
use weir::upstream::head::{AnswerHead, Framing, Taken, take_head};

use super::chunks;

/// Bounds that weir has set itself.
const MAX_HEAD: usize = 64 << 10;
const MAX_FIELDS: usize = 100;
const MAX_EXTENSIONS: usize = 16 << 10;
const MAX_TRAILERS: usize = 16 << 10;
const MAX_TRAILER_FIELDS: usize = 64;

/// What a gateway has sent; what has no head is taken for a body in chunks.
pub fn check(sent: &[u8]) {
    let sent = chunks::expand(sent);
    for asked in [Method::GET, Method::HEAD] {
        let slow = slow_head(&sent, &asked);
        for cut in chunks::cuts(&sent) {
            is_the_same_head(&slow, read_head(&cut, &asked), &sent);
        }
    }
    let behind_head = match slow_head(&sent, &Method::GET) {
        SlowHead::Whole { length, .. } => length,
        SlowHead::Malformed | SlowHead::Cut => 0,
    };
    let body = &sent[behind_head..];
    let slow = slow_body(body);
    for cut in chunks::cuts(body) {
        assert_eq!(read_body(&cut), slow, "in {} pieces", cut.len());
    }
}

/// A head that was read piece by piece, and how much was read behind it; `None` if it is not whole.
fn read_head(pieces: &[&[u8]], asked: &Method) -> Result<Option<(AnswerHead, Bytes)>, String> {
    let mut unread = Vec::new();
    for piece in pieces {
        unread.extend_from_slice(piece);
        match take_head(unread.into(), asked).map_err(|error| error.to_string())? {
            Taken::Whole(head, rest) => return Ok(Some((*head, rest))),
            Taken::Partial(read) => unread = read.into(),
        }
    }
    Ok(None)
}

fn is_the_same_head(slow: &SlowHead, read: Result<Option<(AnswerHead, Bytes)>, String>, sent: &[u8]) {
    match (slow, read) {
        (SlowHead::Whole { length, status, fields, framing, keep_alive }, Ok(Some((head, rest)))) => {
            assert_eq!((head.parts.status.as_u16(), &head.parts.headers), (*status, fields));
            assert_eq!((head.framing, head.keep_alive), (*framing, *keep_alive));
            assert!(sent[*length..].starts_with(&rest), "what is behind the head is left as it is");
        }
        (SlowHead::Malformed, Err(_)) | (SlowHead::Cut, Ok(None) | Err(_)) => {}
        (slow, read) => panic!("{read:?} is not {slow:?}"),
    }
}

#[derive(Debug)]
enum SlowHead {
    Whole {
        length: usize,
        status: u16,
        fields: HeaderMap,
        framing: Framing,
        keep_alive: bool,
    },
    Malformed,
    /// Its end has not come; it may be malformed already.
    Cut,
}

fn slow_head(sent: &[u8], asked: &Method) -> SlowHead {
    let (mut length, mut lines) = (0, Vec::new());
    loop {
        let Some(end) = sent[length..].iter().position(|byte| *byte == b'\n') else { return SlowHead::Cut };
        let line = &sent[length..length + end];
        length += end + 1;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match (line.is_empty(), lines.is_empty()) {
            // Empty lines before a head count for nothing.
            (true, true) => {}
            (true, false) => break,
            (false, _) => lines.push(line),
        }
    }
    whole_head(length, &lines, asked).unwrap_or(SlowHead::Malformed)
}

fn whole_head(length: usize, lines: &[&[u8]], asked: &Method) -> Option<SlowHead> {
    let (minor, status) = status_line(lines[0])?;
    let fields = fields(&lines[1..], MAX_FIELDS)?;
    let (codings, lengths) = (options(&fields, "transfer-encoding"), options(&fields, "content-length"));
    let framing = if asked == Method::HEAD || matches!(status, 100..200 | 204 | 304) {
        Framing::Length(0)
    } else if fields.contains_key("transfer-encoding") {
        let is_chunked = minor == b'1' && fields.get_all("transfer-encoding").iter().count() == 1;
        (is_chunked && codings == ["chunked"]).then_some(Framing::Chunked)?
    } else if fields.contains_key("content-length") {
        let numbers: Vec<u64> = lengths.iter().map(|length| plain_number(length)).collect::<Option<_>>()?;
        numbers.iter().all(|number| *number == numbers[0]).then_some(Framing::Length(numbers[0]))?
    } else {
        Framing::UntilClose
    };
    let says = |option: &str| options(&fields, "connection").iter().any(|other| other == option);
    let both = fields.contains_key("transfer-encoding") && fields.contains_key("content-length");
    let stays = (minor == b'1' || says("keep-alive")) && !says("close");
    let keep_alive = stays && !both && status != 101 && framing != Framing::UntilClose;
    (length <= MAX_HEAD).then_some(SlowHead::Whole { length, status, fields, framing, keep_alive })
}

/// The minor version's digit, and the status.
fn status_line(line: &[u8]) -> Option<(u8, u16)> {
    let minor = *line.strip_prefix(b"HTTP/1.")?.first().filter(|digit| matches!(digit, b'0' | b'1'))?;
    let behind = line[8..].strip_prefix(b" ")?;
    let (digits, reason) = behind.split_at_checked(3)?;
    let is_reason = matches!(reason, [] | [b' ', ..]) && reason.iter().all(|byte| is_text(*byte));
    let is_number = digits.iter().all(u8::is_ascii_digit);
    let status = std::str::from_utf8(digits).ok()?.parse().ok().filter(|_| is_reason && is_number)?;
    (status >= 100).then_some((minor, status))
}

fn fields(lines: &[&[u8]], most: usize) -> Option<HeaderMap> {
    let fields = lines.iter().map(|line| field(line)).collect::<Option<HeaderMap>>()?;
    (lines.len() <= most).then_some(fields)
}

fn field(line: &[u8]) -> Option<(HeaderName, HeaderValue)> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let (name, value) = (HeaderName::from_bytes(&line[..colon]).ok()?, line[colon + 1..].trim_ascii());
    let is_value = line[colon + 1..].iter().all(|byte| is_text(*byte));
    Some((name, HeaderValue::from_bytes(value).ok()?)).filter(|_| is_value)
}

fn is_text(byte: u8) -> bool {
    byte == b'\t' || byte >= b' ' && byte != 0x7f
}

/// What is between the commas of a field's values, in small letters.
fn options(fields: &HeaderMap, name: &str) -> Vec<String> {
    let values =
        fields.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase());
    values
        .flat_map(|value| value.split(',').map(|part| part.trim_matches([' ', '\t']).to_owned()).collect::<Vec<_>>())
        .collect()
}

fn plain_number(digits: &str) -> Option<u64> {
    let is_plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    // No body is longer than hyper can say.
    digits.parse().ok().filter(|number| is_plain && *number < u64::MAX - 2)
}

/// What came of a body in chunks.
#[derive(Debug, PartialEq)]
struct Body {
    data: Vec<u8>,
    end: End,
}

#[derive(Debug, PartialEq)]
enum End {
    /// So many bytes belong to it.
    Whole(usize, HeaderMap),
    Malformed,
    Cut,
}

fn read_body(pieces: &[&[u8]]) -> Body {
    let (mut decoder, mut data, mut used) = (ChunkedDecoder::default(), Vec::new(), 0);
    // What is wrong is told at the latest when nothing more comes.
    for piece in pieces.iter().copied().chain([&b""[..]]) {
        let mut taken = Vec::new();
        let Ok(of_piece) = decoder.decode(piece, &mut taken) else {
            assert!(taken.is_empty() && decoder.is_malformed() && !decoder.is_done());
            return Body { data, end: End::Malformed };
        };
        data.extend_from_slice(&taken);
        used += of_piece;
        assert!(of_piece == piece.len() || decoder.is_done());
    }
    let trailers = decoder.take_trailers();
    assert!(!decoder.has_trailers());
    let end = if decoder.is_done() { End::Whole(used, trailers.unwrap_or_default()) } else { End::Cut };
    Body { data, end }
}

fn slow_body(sent: &[u8]) -> Body {
    let (mut data, mut at, mut extensions) = (Vec::new(), 0, 0);
    let end = loop {
        let Some(Line { text, is_whole }) = line(&sent[at..]) else { break End::Malformed };
        match size_of(text, &mut extensions) {
            None if text.is_empty() && !is_whole && at == sent.len() => break End::Cut,
            None => break End::Malformed,
            Some(_) if !is_whole => break End::Cut,
            Some(0) => break trailers(&sent[at + text.len() + 2..], at + text.len() + 2),
            Some(size) => {
                at += text.len() + 2;
                let part = usize::try_from(size).unwrap_or(usize::MAX).min(sent.len() - at);
                data.extend_from_slice(&sent[at..at + part]);
                at += part;
                match &sent[at..] {
                    [b'\r', b'\n', ..] if part as u64 == size => at += 2,
                    [] | [b'\r'] => break End::Cut,
                    _ => break End::Malformed,
                }
            }
        }
    };
    Body { data, end }
}

struct Line<'l> {
    text: &'l [u8],
    /// Its CRLF has come.
    is_whole: bool,
}

/// The line at the front, without its end; `None` where a CR or LF stands alone in it.
fn line(sent: &[u8]) -> Option<Line<'_>> {
    let upto = sent.iter().position(|byte| *byte == b'\n').map_or(sent.len(), |at| at + 1);
    let (line, is_whole) = (&sent[..upto], sent[..upto].ends_with(b"\n"));
    let text = match is_whole {
        true => line.strip_suffix(b"\r\n")?,
        false => line.strip_suffix(b"\r").unwrap_or(line),
    };
    (!text.contains(&b'\r')).then_some(Line { text, is_whole })
}

/// The size that a chunk's first line tells.
fn size_of(text: &[u8], extensions: &mut usize) -> Option<u64> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let behind = text[digits..].iter().position(|byte| !matches!(byte, b' ' | b'\t'));
    let space = behind.unwrap_or(text.len() - digits);
    let extension = match &text[digits + space..] {
        [] => 0,
        [b';', extension @ ..] => extension.len(),
        _ => return None,
    };
    *extensions += space + extension;
    let size = u64::from_str_radix(std::str::from_utf8(&text[..digits]).ok()?, 16).ok();
    size.filter(|_| digits <= 16 && *extensions <= MAX_EXTENSIONS)
}

fn trailers(sent: &[u8], behind: usize) -> End {
    let (mut at, mut lines) = (0, Vec::new());
    loop {
        // Within a line only its end is looked at before the section is whole.
        let upto = sent[at..].iter().position(|byte| *byte == b'\n').map_or(sent.len(), |end| at + end + 1);
        if upto > MAX_TRAILERS || sent[at..upto].ends_with(b"\n") && !sent[at..upto].ends_with(b"\r\n") {
            return End::Malformed;
        }
        let Some(text) = sent[at..upto].strip_suffix(b"\r\n") else { return End::Cut };
        at = upto;
        if text.is_empty() {
            return fields(&lines, MAX_TRAILER_FIELDS).map_or(End::Malformed, |fields| End::Whole(behind + at, fields));
        }
        lines.push(text);
    }
}
