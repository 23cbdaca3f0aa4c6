//! The chunked transfer coding, read (RFC 9112, section 7.1).
//!
//! Input may be cut anywhere; nothing of it is kept but the trailer section. Line ends are CRLF and nothing else: where two
//! readers disagree about an end, one of them can be fooled.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::wire_error::WireError;

/// The most bytes of chunk extensions in one body. Nobody uses them; they are read and dropped.
const MAX_EXTENSIONS: usize = 16 << 10;

/// The most bytes that a trailer section may have.
const MAX_TRAILERS: usize = 16 << 10;

/// The most trailer fields.
const MAX_TRAILER_FIELDS: usize = 64;

/// Decodes one chunked body, from its start.
#[derive(Debug, Default)]
pub struct ChunkedDecoder {
    state: State,
    extension_bytes: usize,
    trailer_section: Vec<u8>,
    trailers: Option<HeaderMap>,
}

/// What is wrong with a body.
struct Malformed(&'static str);

const MALFORMED_TRAILERS: Malformed = Malformed("the trailers of its body are malformed");

/// What comes next in the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A digit of a chunk's size, or, after the first one, its end.
    Size {
        so_far: u64,
        digits: u8,
    },
    /// White space behind a size (RFC 9112 calls it bad, and has it read).
    BehindSize(u64),
    /// An extension, up to the line's end.
    Extension(u64),
    /// The LF that ends a size's line.
    SizeLineFeed(u64),
    /// So many bytes of data.
    Data(u64),
    /// The CR behind a chunk's data.
    DataReturn,
    DataLineFeed,
    /// The trailer section, up to and with its blank line.
    Trailers,
    Done,
    /// What is wrong, to be told when what came before it was taken.
    Malformed(&'static str),
}

impl ChunkedDecoder {
    /// Whether there is an error to be told.
    pub fn is_malformed(&self) -> bool {
        matches!(self.state, State::Malformed(_))
    }

    /// Whether the body has ended in good order.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// The trailer fields, once, if there were any.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        self.trailers.take()
    }

    /// Whether trailer fields have yet to be taken.
    pub fn has_trailers(&self) -> bool {
        self.trailers.is_some()
    }

    /// Appends the data in `input` to `data`, and returns how much of the input was used: less than all only when the body
    /// has ended.
    ///
    /// # Errors
    /// It is not a chunked body; nothing that follows means anything. Where there was data before that, the error is that of
    /// the next call.
    pub fn decode(&mut self, input: &[u8], data: &mut Vec<u8>) -> Result<usize, WireError> {
        if let State::Malformed(what) = self.state {
            return Err(WireError::Malformed(what));
        }
        self.advance(input, data).or_else(|Malformed(what)| {
            self.state = State::Malformed(what);
            if data.is_empty() { Err(WireError::Malformed(what)) } else { Ok(input.len()) }
        })
    }

    fn advance(&mut self, input: &[u8], data: &mut Vec<u8>) -> Result<usize, Malformed> {
        let mut at = 0;
        while at < input.len() && self.state != State::Done {
            match self.state {
                State::Data(left) => {
                    let part = input.len().min(at.saturating_add(usize::try_from(left).unwrap_or(usize::MAX)));
                    data.extend_from_slice(&input[at..part]);
                    let left = left - (part - at) as u64;
                    self.state = if left == 0 { State::DataReturn } else { State::Data(left) };
                    at = part;
                }
                State::Trailers => at += self.trailer_bytes(&input[at..])?,
                _ => {
                    self.state = self.framing_byte(input[at])?;
                    at += 1;
                }
            }
        }
        Ok(at)
    }

    fn framing_byte(&mut self, byte: u8) -> Result<State, Malformed> {
        let malformed = || Malformed("a chunk of its body is malformed");
        Ok(match (self.state, byte) {
            (State::Size { so_far, digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16).map_or(0, u64::from);
                // Leading zeros are no reason to read for ever.
                if digits == 16 {
                    return Err(malformed());
                }
                State::Size { so_far: so_far << 4 | digit, digits: digits + 1 }
            }
            (State::Size { digits: 0, .. }, _) => return Err(malformed()),
            (State::Size { so_far: size, .. } | State::BehindSize(size), b'\r') => State::SizeLineFeed(size),
            (State::Size { so_far: size, .. } | State::BehindSize(size), b';') => State::Extension(size),
            (State::Size { so_far: size, .. } | State::BehindSize(size), b' ' | b'\t') => {
                self.count_extension()?;
                State::BehindSize(size)
            }
            (State::Extension(size), b'\r') => State::SizeLineFeed(size),
            (State::Extension(_), b'\n') => return Err(malformed()),
            (State::Extension(size), _) => {
                self.count_extension()?;
                State::Extension(size)
            }
            (State::SizeLineFeed(0), b'\n') => State::Trailers,
            (State::SizeLineFeed(size), b'\n') => State::Data(size),
            (State::DataReturn, b'\r') => State::DataLineFeed,
            (State::DataLineFeed, b'\n') => State::NEXT_CHUNK,
            _ => return Err(malformed()),
        })
    }

    fn count_extension(&mut self) -> Result<(), Malformed> {
        self.extension_bytes += 1;
        if self.extension_bytes > MAX_EXTENSIONS {
            return Err(Malformed("the chunk extensions of its body are too long"));
        }
        Ok(())
    }

    /// Takes the trailer section's bytes, up to the blank line that ends the body.
    fn trailer_bytes(&mut self, input: &[u8]) -> Result<usize, Malformed> {
        let section = &mut self.trailer_section;
        for (at, byte) in input.iter().enumerate() {
            section.push(*byte);
            if section.len() > MAX_TRAILERS {
                return Err(Malformed("the trailers of its body are too long"));
            }
            if *byte == b'\n' && !section.ends_with(b"\r\n") {
                return Err(MALFORMED_TRAILERS);
            }
            if section == b"\r\n" || section.ends_with(b"\r\n\r\n") {
                self.state = State::Done;
                self.trailers = parse_trailers(section)?;
                self.trailer_section = Vec::new();
                return Ok(at + 1);
            }
        }
        Ok(input.len())
    }
}

impl State {
    const NEXT_CHUNK: Self = Self::Size { so_far: 0, digits: 0 };
}

impl Default for State {
    fn default() -> Self {
        Self::NEXT_CHUNK
    }
}

fn parse_trailers(section: &[u8]) -> Result<Option<HeaderMap>, Malformed> {
    let mut lines = [httparse::EMPTY_HEADER; MAX_TRAILER_FIELDS];
    let Ok(httparse::Status::Complete((_, lines))) = httparse::parse_headers(section, &mut lines) else {
        return Err(MALFORMED_TRAILERS);
    };
    let mut trailers = HeaderMap::with_capacity(lines.len());
    for line in lines {
        match (HeaderName::from_bytes(line.name.as_bytes()), HeaderValue::from_bytes(line.value)) {
            (Ok(name), Ok(value)) => trailers.append(name, value),
            _ => return Err(MALFORMED_TRAILERS),
        };
    }
    Ok((!trailers.is_empty()).then_some(trailers))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The body's data and trailers, with the input cut into pieces of that size.
    fn decode(input: &[u8], piece: usize) -> Result<(Vec<u8>, Option<HeaderMap>, bool), WireError> {
        let (mut decoder, mut data) = (ChunkedDecoder::default(), Vec::new());
        for piece in input.chunks(piece) {
            decoder.decode(piece, &mut data)?;
        }
        decoder.decode(b"", &mut data)?;
        Ok((data, decoder.take_trailers(), decoder.is_done()))
    }

    #[test]
    fn a_body_is_the_same_however_it_is_cut() {
        let input = b"5\r\nhello\r\n00a;name=\"x\"\r\n, gateway.\r\n1 \t\r\n!\r\n0\r\nx-checksum: 7\r\n\r\n";
        for piece in 1..=input.len() {
            let (data, trailers, done) = decode(input, piece).expect("a body");
            assert_eq!(data, b"hello, gateway.!", "pieces of {piece}");
            assert!(done);
            assert_eq!(trailers.expect("trailers")["x-checksum"], "7");
        }
    }

    #[test]
    fn what_stands_behind_the_end_is_left() {
        let (mut decoder, mut data) = (ChunkedDecoder::default(), Vec::new());
        let input = b"1\r\na\r\n0\r\n\r\nHTTP/1.1 200";
        assert_eq!(decoder.decode(input, &mut data).expect("a body"), input.len() - 12);
        assert!(decoder.is_done() && !decoder.has_trailers());
    }

    #[test]
    fn a_malformed_body_is_an_error() {
        let bad: &[&[u8]] = &[
            b"\r\n",
            b"g\r\n",
            b"0x1\r\na",
            b"-1\r\na",
            b"+1\r\na",
            b" 1\r\na",
            b"1\na\r\n",
            b"1\r\nab\r\n",
            b"1\r\na\n0\r\n\r\n",
            b"1\r\na0\r\n\r\n",
            b"1\r\na\r0\r\n\r\n",
            b"1;x\ny\r\na",
            b"1 1\r\na",
            b"fffffffffffffffff\r\n",
            b"00000000000000001\r\na",
            b"0\r\nno colon\r\n\r\n",
            b"0\r\nname : value\r\n\r\n",
            b"0\r\n\n",
            b"0\r\na: b\n\nHTTP/1.1 200 OK\r\n\r\n",
            b"0\r\na: b\nc: d\r\n\r\n",
        ];
        for input in bad {
            for piece in [1, input.len()] {
                assert!(decode(input, piece).is_err(), "{:?}", input.escape_ascii().to_string());
            }
        }
    }

    #[test]
    fn what_came_before_an_error_is_told_first() {
        let (mut decoder, mut data) = (ChunkedDecoder::default(), Vec::new());
        assert!(decoder.decode(b"5\r\nhello\r\nno size\r\n", &mut data).is_ok());
        assert!(data == b"hello" && decoder.is_malformed() && !decoder.is_done());
        assert!(decoder.decode(b"", &mut data).is_err());
    }

    #[test]
    fn an_error_is_told_again() {
        for malformed in [&b"no size\r\n"[..], b"0\r\nno colon\r\n\r\n"] {
            let mut decoder = ChunkedDecoder::default();
            assert!(decoder.decode(malformed, &mut Vec::new()).is_err());
            assert!(decoder.is_malformed() && !decoder.is_done());
            assert!(decoder.decode(b"0\r\n\r\n", &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn a_body_that_is_cut_is_not_done() {
        let input = b"5\r\nhello\r\n0\r\n\r\n";
        for end in 0..input.len() {
            assert!(!decode(&input[..end], usize::MAX).expect("so far so good").2, "{end}");
        }
    }

    #[test]
    fn extensions_and_trailers_have_a_bound() {
        let extension = [b"1;".as_slice(), &[b'x'; MAX_EXTENSIONS + 1]].concat();
        assert!(decode(&extension, 1000).is_err());
        let many = b"1;x\r\na\r\n".repeat(MAX_EXTENSIONS + 1);
        assert!(decode(&many, 1000).is_err());
        let trailers = [b"0\r\nx: ".as_slice(), &[b'x'; MAX_TRAILERS]].concat();
        assert!(decode(&trailers, 1000).is_err());
        let fields = [b"0\r\n".as_slice(), &b"x: y\r\n".repeat(MAX_TRAILER_FIELDS + 1), b"\r\n"].concat();
        assert!(decode(&fields, 1000).is_err());
    }

    #[test]
    fn the_largest_size_is_taken_and_never_met() {
        let (data, _, done) = decode(b"ffffffffffffffff\r\nabc", usize::MAX).expect("so far so good");
        assert_eq!((data.as_slice(), done), (b"abc".as_slice(), false));
    }
}
