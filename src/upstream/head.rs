//! Heads on the wire: the request's, written, and the answer's, read (RFC 9112, sections 2 to 6).

use std::fmt;
use std::io::Write as _;
use std::mem::MaybeUninit;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header, response};
use hyper::ext::ReasonPhrase;

use super::wire_error::WireError;

/// An answer's head may not be longer.
const MAX_HEAD: usize = 64 << 10;

/// Nor have more fields.
const MAX_FIELDS: usize = 100;

/// Room for the fields that are added to an answer's: with less, its map would be made a second time.
const OWN_FIELDS: usize = 10;

/// No body is that long; hyper has a meaning of its own for what is longer.
const MAX_LENGTH: u64 = u64::MAX - 2;

const MALFORMED: WireError = WireError::Malformed("it is not HTTP/1.1");

/// A request's head, ready to be sent as often as needed. Only the body's length is missing.
pub struct Outgoing {
    method: Method,
    /// Request line and fields, each with its line end.
    lines: Bytes,
}

/// How an answer's body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// What is done to a body for the way to the next recipient (RFC 9112, 6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    None,
    Chunked,
    /// Something that weir can't take off, alone or below the chunks.
    Other,
}

/// An answer's head, and what it says of what follows.
#[derive(Debug)]
pub struct AnswerHead {
    pub parts: response::Parts,
    pub framing: Framing,
    /// The connection may be used again when the body was read to its end.
    pub keep_alive: bool,
}

impl Coding {
    /// What the fields of a request or an answer say of it.
    pub fn of(fields: &HeaderMap) -> Self {
        let mut codings = fields.get_all(header::TRANSFER_ENCODING).iter();
        match (codings.next(), codings.next()) {
            (None, _) => Self::None,
            (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Self::Chunked,
            (Some(_), _) => Self::Other,
        }
    }
}

impl Outgoing {
    /// A request for `target`, its path and query, with those of these fields that go on. Those that frame a body do not.
    pub fn new(method: Method, target: &http::Uri, fields: &HeaderMap, goes_on: impl Fn(&HeaderName) -> bool) -> Self {
        let target = target.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let fields = || fields.iter().filter(|(name, _)| goes_on(name));
        let field_bytes: usize = fields().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        let mut lines = Vec::with_capacity(method.as_str().len() + target.len() + field_bytes + 16);
        for part in [method.as_str(), " ", target, " HTTP/1.1\r\n"] {
            lines.extend_from_slice(part.as_bytes());
        }
        for (name, value) in fields() {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                lines.extend_from_slice(part);
            }
        }
        Self { method, lines: lines.into() }
    }

    /// The request's method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// The head of a request whose body has that length, or, without one, is chunked. There is room behind it for so many
    /// bytes.
    pub fn head(&self, body_length: Option<u64>, room: usize) -> Vec<u8> {
        let mut head = Vec::with_capacity(self.lines.len() + room + 32);
        head.extend_from_slice(&self.lines);
        match body_length {
            // Some servers answer 411 to these without a length (RFC 9110, 8.6).
            Some(0) if !matches!(self.method, Method::POST | Method::PUT | Method::PATCH) => {}
            Some(length) => {
                write!(head, "content-length: {length}\r\n").expect("a vector takes everything");
            }
            None => head.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        }
        head.extend_from_slice(b"\r\n");
        head
    }
}

impl fmt::Debug for Outgoing {
    /// Without the fields: the gateway's key is among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing").field("method", &self.method).finish_non_exhaustive()
    }
}

/// What came of looking for a head.
pub enum Taken {
    /// The head, and what came behind it.
    Whole(Box<AnswerHead>, Bytes),
    /// More has to be read; here is what there is.
    Partial(Bytes),
}

/// Looks for an answer's head at the front of what was read.
///
/// # Errors
/// It is no head that weir reads, or its framing is ambiguous.
pub fn take_head(read: Bytes, asked: &Method) -> Result<Taken, WireError> {
    let mut lines = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let parser = httparse::ParserConfig::default();
    let length = match parser.parse_response_with_uninit_headers(&mut parsed, &read, &mut lines) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if read.len() < MAX_HEAD => return Ok(Taken::Partial(read)),
        Ok(httparse::Status::Partial) => return Err(WireError::Malformed("its head is too long")),
        Err(httparse::Error::TooManyHeaders) => return Err(WireError::Malformed("its head has more than 100 fields")),
        Err(_) => return Err(MALFORMED),
    };
    if length > MAX_HEAD {
        return Err(WireError::Malformed("its head is too long"));
    }
    let (mut parts, ()) = Response::new(()).into_parts();
    parts.status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(MALFORMED)?;
    parts.version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    parts.headers.reserve(parsed.headers.len() + OWN_FIELDS);
    for line in &*parsed.headers {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| MALFORMED)?;
        let value = HeaderValue::from_maybe_shared(read.slice_ref(line.value)).map_err(|_| MALFORMED)?;
        parts.headers.append(name, value);
    }
    let reason = parsed.reason.unwrap_or_default();
    if !reason.is_empty() && parts.status.canonical_reason() != Some(reason) {
        ReasonPhrase::try_from(reason.as_bytes()).into_iter().for_each(|reason| drop(parts.extensions.insert(reason)));
    }
    let framing = framing(asked, &parts)?;
    let keep_alive = framing != Framing::UntilClose && keeps_alive(&parts);
    Ok(Taken::Whole(Box::new(AnswerHead { parts, framing, keep_alive }), read.slice(length..)))
}

/// How the answer's body ends (RFC 9112, 6.3).
fn framing(asked: &Method, head: &response::Parts) -> Result<Framing, WireError> {
    if asked == Method::HEAD || head.status.is_informational() || matches!(head.status.as_u16(), 204 | 304) {
        return Ok(Framing::Length(0));
    }
    match Coding::of(&head.headers) {
        Coding::None => Ok(declared_length(&head.headers)?.map_or(Framing::UntilClose, Framing::Length)),
        // An HTTP/1.0 sender knows nothing of it: the framing is faulty (RFC 9112, 6.1).
        _ if head.version == Version::HTTP_10 => Err(WireError::Malformed("it is HTTP/1.0 with a Transfer-Encoding")),
        Coding::Chunked => Ok(Framing::Chunked),
        Coding::Other => Err(WireError::Malformed("it has a transfer coding that weir has not asked for")),
    }
}

/// The length that Content-Length declares; the same one several times is one.
fn declared_length(fields: &HeaderMap) -> Result<Option<u64>, WireError> {
    let bad = WireError::Malformed("its Content-Length is no length, or there are several");
    let mut length = None;
    for part in fields.get_all(header::CONTENT_LENGTH).iter().flat_map(|value| value.as_bytes().split(|&b| b == b',')) {
        let digits = part.trim_ascii();
        let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
        let number = std::str::from_utf8(digits).ok().filter(|_| is_number).and_then(|digits| digits.parse().ok());
        match (number, length) {
            (None | Some(MAX_LENGTH..), _) => return Err(bad),
            (Some(this), Some(other)) if this != other => return Err(bad),
            (Some(this), _) => length = Some(this),
        }
    }
    Ok(length)
}

/// Whether the gateway leaves the connection open (RFC 9112, 9.3).
fn keeps_alive(head: &response::Parts) -> bool {
    // With both, the sender can't be trusted to know where its next answer begins (RFC 9112, 6.3).
    let is_ambiguous =
        head.headers.contains_key(header::TRANSFER_ENCODING) && head.headers.contains_key(header::CONTENT_LENGTH);
    let says = |token: &str| {
        let values = head.headers.get_all(header::CONNECTION).iter().map(HeaderValue::as_bytes);
        let mut options = values.flat_map(|value| value.split(|&byte| byte == b','));
        options.any(|option| option.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
    };
    let stays = head.version == Version::HTTP_11 || says("keep-alive");
    stays && !says("close") && !is_ambiguous && head.status != StatusCode::SWITCHING_PROTOCOLS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(text: &'static str) -> Result<Option<(AnswerHead, Bytes)>, WireError> {
        take_head(Bytes::from_static(text.as_bytes()), &Method::GET).map(|taken| match taken {
            Taken::Whole(head, rest) => Some((*head, rest)),
            Taken::Partial(_) => None,
        })
    }

    fn framed(text: &'static str) -> (Framing, bool) {
        let (head, _) = take(text).expect("a head").expect("a whole one");
        (head.framing, head.keep_alive)
    }

    #[test]
    fn a_head_is_found_when_it_is_whole() {
        let text = "HTTP/1.1 200 Fine\r\nContent-Type: text/plain\r\nX-A: 1\r\nx-a: 2\r\ncontent-length: 3\r\n\r\nabc";
        for end in 0..text.len() - 3 {
            assert!(take(&text[..end]).expect("so far so good").is_none(), "{end}");
        }
        let (head, rest) = take(text).expect("a head").expect("a whole one");
        assert_eq!((head.parts.status, head.framing, head.keep_alive), (StatusCode::OK, Framing::Length(3), true));
        assert_eq!(head.parts.headers.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(head.parts.extensions.get::<ReasonPhrase>().map(ReasonPhrase::as_bytes), Some(&b"Fine"[..]));
        assert_eq!(rest, "abc");
    }

    #[test]
    fn the_framing_follows_the_rfc() {
        use Framing::{Chunked, Length, UntilClose};
        for (text, expected) in [
            ("HTTP/1.1 200 OK\r\n\r\n", (UntilClose, false)),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5, 5\r\ncontent-length: 5\r\n\r\n", (Length(5), true)),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n", (Chunked, true)),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n", (Chunked, false)),
            ("HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 5\r\n\r\n", (Length(5), false)),
            ("HTTP/1.1 200 OK\r\nconnection: close, \u{e9}\r\ncontent-length: 5\r\n\r\n", (Length(5), false)),
            ("HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n", (Length(5), false)),
            ("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\n", (Length(5), true)),
            ("HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n", (Length(0), true)),
            ("HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", (Length(0), true)),
            ("HTTP/1.1 101 Switching Protocols\r\n\r\n", (Length(0), false)),
        ] {
            assert_eq!(framed(text), expected, "{text:?}");
        }
    }

    #[test]
    fn an_answer_to_head_has_no_body() {
        let read = Bytes::from_static(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n");
        let Taken::Whole(head, _) = take_head(read, &Method::HEAD).expect("a head") else { panic!("it is whole") };
        assert_eq!((head.framing, head.keep_alive), (Framing::Length(0), true));
    }

    #[test]
    fn what_is_ambiguous_or_malformed_is_an_error() {
        for text in [
            "SSH-2.0-OpenSSH_9\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/1.1 20x OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nbad name: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nname : x\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: b\r\n folded\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: b\0c\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: \r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551616\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        ] {
            assert!(take(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_head_has_bounds() {
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(MAX_FIELDS + 1));
        assert!(take_head(many.into(), &Method::GET).is_err());
        let long = format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(MAX_HEAD));
        assert!(take_head(long.into(), &Method::GET).is_err());
        let long_and_whole = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "b".repeat(MAX_HEAD));
        assert!(take_head(long_and_whole.into(), &Method::GET).is_err());
    }

    #[test]
    fn a_requests_head_says_how_its_body_ends() {
        let mut fields = HeaderMap::new();
        fields.insert("host", HeaderValue::from_static("gateway"));
        let head = |method: Method, length| {
            let outgoing = Outgoing::new(method, &http::Uri::from_static("/v1/models?a=%2F"), &fields, |_| true);
            String::from_utf8(outgoing.head(length, 0)).expect("ASCII")
        };
        assert_eq!(head(Method::GET, Some(0)), "GET /v1/models?a=%2F HTTP/1.1\r\nhost: gateway\r\n\r\n");
        for (method, length, line) in [
            (Method::POST, Some(0), "content-length: 0"),
            (Method::POST, Some(1234), "content-length: 1234"),
            (Method::PUT, None, "transfer-encoding: chunked"),
        ] {
            assert!(head(method, length).ends_with(&format!("gateway\r\n{line}\r\n\r\n")));
        }
    }

    #[test]
    fn a_requests_fields_are_not_in_debug_output() {
        let mut fields = HeaderMap::new();
        fields.insert("authorization", HeaderValue::from_static("Bearer sk-secret"));
        let outgoing = Outgoing::new(Method::GET, &http::Uri::from_static("/v1/models"), &fields, |_| true);
        assert!(!format!("{outgoing:?}").contains("sk-secret"));
    }
}
