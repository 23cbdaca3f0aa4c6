//! HTTP/1 messages as the tests read them: strictly, and with no code of weir's.

/// How a body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    None,
    Length(usize),
    Chunks,
    /// By the end of the connection.
    Close,
}

/// What was found at the beginning of some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The body, the trailer section, and how many bytes that was.
    Whole { body: Vec<u8>, trailers: String, used: usize },
    /// Bytes are missing; this is the body so far.
    Partial(Vec<u8>),
}

/// The head at the beginning, with its blank line, and how many bytes that is; `None` where it has not come yet. Bytes beyond
/// ASCII are shown as the Latin-1 that they were once.
pub fn head_of(bytes: &[u8]) -> Option<(String, usize)> {
    let end = find(bytes, b"\r\n\r\n")? + 4;
    let head: String = bytes[..end].iter().map(|byte| char::from(*byte)).collect();
    let lone = |(at, _): (usize, &str)| at == 0 || head.as_bytes()[at - 1] != b'\r';
    assert!(!head.match_indices('\n').any(lone), "a line of this head ends in a bare LF: {head:?}");
    Some((head, end))
}

/// The values of a field, in order.
pub fn values<'h>(head: &'h str, name: &str) -> Vec<&'h str> {
    let fields = head.split("\r\n").skip(1).filter_map(|line| line.split_once(':'));
    fields.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
}

/// How the body behind a head is delimited that says so itself; `otherwise` where it does not.
pub fn framing(head: &str, otherwise: Framing) -> Framing {
    match (values(head, "transfer-encoding").as_slice(), values(head, "content-length").as_slice()) {
        ([], []) => otherwise,
        (["chunked"], []) => Framing::Chunks,
        ([], [length]) => Framing::Length(length.parse().unwrap_or_else(|_| panic!("a length: {head:?}"))),
        both => panic!("a body with more than one framing, {both:?}: {head:?}"),
    }
}

/// The body at the beginning of what comes behind a head.
pub fn body_of(bytes: &[u8], framing: Framing) -> Found {
    let whole = |used: usize| Found::Whole { body: bytes[..used].to_vec(), trailers: String::new(), used };
    match framing {
        Framing::None => whole(0),
        Framing::Length(length) if bytes.len() >= length => whole(length),
        Framing::Length(_) | Framing::Close => Found::Partial(bytes.to_vec()),
        Framing::Chunks => chunks_of(bytes),
    }
}

fn chunks_of(bytes: &[u8]) -> Found {
    let (mut body, mut at) = (Vec::new(), 0);
    while let Some(line) = find(&bytes[at..], b"\r\n") {
        let size =
            std::str::from_utf8(&bytes[at..at + line]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        let size = size.unwrap_or_else(|| panic!("a chunk's size: {}", escaped(&bytes[at..at + line])));
        let data = at + line + 2;
        if size == 0 {
            return trailers_of(bytes, data, body);
        }
        if bytes.len() < data + size + 2 {
            body.extend_from_slice(&bytes[data..bytes.len().min(data + size)]);
            return Found::Partial(body);
        }
        body.extend_from_slice(&bytes[data..data + size]);
        assert_eq!(&bytes[data + size..data + size + 2], b"\r\n", "the end of a chunk");
        at = data + size + 2;
    }
    Found::Partial(body)
}

fn trailers_of(bytes: &[u8], from: usize, body: Vec<u8>) -> Found {
    if bytes[from..].starts_with(b"\r\n") {
        return Found::Whole { body, trailers: String::new(), used: from + 2 };
    }
    match find(&bytes[from..], b"\r\n\r\n") {
        Some(end) => {
            let trailers = String::from_utf8_lossy(&bytes[from..from + end + 2]).into_owned();
            Found::Whole { body, trailers, used: from + end + 4 }
        }
        None => Found::Partial(body),
    }
}

/// Where a needle begins.
pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Bytes for a failure's message.
pub fn escaped(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(2000)];
    let more = if shown.len() < bytes.len() { format!("… ({} bytes)", bytes.len()) } else { String::new() };
    format!("\"{}{more}\"", shown.escape_ascii())
}
