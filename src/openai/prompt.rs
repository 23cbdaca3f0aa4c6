//! How large a prompt is, for an estimate of what it will cost: text by its bytes, what is embedded by the piece.
//!
//! A picture of a megabyte costs a model no more than a page of text, so its base64 must not count as text. And text must
//! not pass for a picture: what is left out has to look like base64 from its beginning.

use std::sync::LazyLock;

use memchr::{memchr, memchr2, memmem};

/// A payload begins with so many bytes of base64's alphabet; a shorter one is not worth leaving out.
const LOOKED_AT: usize = 64;

/// The value of a `"data"` key is shorter than this in everything but pictures, sounds and files.
const LEAST_DATA: usize = 1 << 10;

/// So long may the beginning of a data URL be, up to its comma.
const LONGEST_MEDIA_TYPE: usize = 128;

/// What something embedded begins with. Made once: a searcher costs more to make than to use on a short body.
static MARK: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"\"data"));

/// The size of a call's body.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prompt {
    /// The body's bytes, without what is embedded.
    pub bytes: u64,
    /// How many pictures, sounds and files are embedded as base64.
    pub embedded: u32,
}

impl Prompt {
    /// A body that is all text.
    pub fn text(body: &[u8]) -> Self {
        Self { bytes: body.len() as u64, embedded: 0 }
    }

    /// Looks through a body of JSON for data URLs, and for `"data"` keys (Anthropic's images, OpenAI's `input_audio`) with
    /// 1 KiB or more. Takes time in proportion to the body, whatever it holds.
    pub fn of(body: &[u8]) -> Self {
        let mut prompt = Self::text(body);
        let mut at = 0;
        while let Some(found) = MARK.find(&body[at..]) {
            let quote = at + found;
            at = quote + MARK.needle().len();
            // Behind a backslash the quote is a letter of some text.
            let begins_string = quote == 0 || body[quote - 1] != b'\\';
            if let Some(payload) = payload(&body[at..]).filter(|_| begins_string) {
                prompt.bytes -= payload.len as u64;
                prompt.embedded = prompt.embedded.saturating_add(1);
                at += payload.start + payload.len;
            }
        }
        prompt
    }
}

/// Something embedded, counted from behind `"data`.
struct Payload {
    start: usize,
    len: usize,
}

fn payload(behind_mark: &[u8]) -> Option<Payload> {
    let (text, least) = match behind_mark.first()? {
        b':' => (behind_media_type(&behind_mark[1..])?, LOOKED_AT),
        b'"' => (string_value(&behind_mark[1..])?, LEAST_DATA),
        _ => return None,
    };
    if !text.get(..LOOKED_AT)?.iter().all(is_base64) {
        return None;
    }
    let len = memchr(b'"', text).filter(|len| *len >= least)?;
    Some(Payload { start: behind_mark.len() - text.len(), len })
}

/// What stands behind `image/png;base64,`.
fn behind_media_type(url: &[u8]) -> Option<&[u8]> {
    let end = memchr2(b',', b'"', &url[..url.len().min(LONGEST_MEDIA_TYPE)])?;
    url[..end].ends_with(b";base64").then(|| url[end..].strip_prefix(b","))?
}

/// What stands behind `: "`.
fn string_value(behind_key: &[u8]) -> Option<&[u8]> {
    behind_key.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start().strip_prefix(b"\"")
}

/// Both alphabets of RFC 4648; and the backslash, since some JSON writers escape the slash.
fn is_base64(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'-' | b'_' | b'=' | b'\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around(before: &str, payload: &str, after: &str) -> (u64, u32, u64) {
        let prompt = Prompt::of(format!("{before}{payload}{after}").as_bytes());
        (prompt.bytes, prompt.embedded, (before.len() + after.len()) as u64)
    }

    #[test]
    fn what_is_embedded_is_counted_by_the_piece() {
        let payload = "iVBORw0KGgo".repeat(200);
        let embeddings = [
            (r#"{"image_url":{"url":"data:image/png;base64,"#, r#""}}"#),
            (r#"{"url":"data:image\/png;charset=x;base64,"#, r#"","detail":"low"}"#),
            (r#"{"source":{"type":"base64","data":""#, r#""}}"#),
            ("{\"input_audio\":{\"data\" :\n\"", r#"","format":"wav"}}"#),
            (r#"{"data":"data:application/pdf;base64,"#, r#""}"#),
        ];
        for (before, after) in embeddings {
            let (bytes, embedded, around) = around(before, &payload, after);
            assert_eq!((bytes, embedded), (around, 1), "{before}");
        }
        let (before, after) = embeddings[0];
        let (bytes, embedded, around) = around(&format!("[{before}{payload}{after},{before}"), &payload, after);
        assert_eq!((bytes, embedded), (around - payload.len() as u64, 2));
    }

    #[test]
    fn text_does_not_pass_for_data() {
        let long = "A".repeat(2000);
        let not_embedded = [
            (r#"{"url":"data:image/png;base64,"#, "a picture of a cat, in words ".repeat(100)),
            (r#"{"url":"data:text/plain,"#, long.clone()),
            (r#"{"url":"data:image/png;base64,"#, "A".repeat(63)),
            (r#"{"data":""#, "A".repeat(1023)),
            (r#"{"data":""#, "words ".repeat(1000)),
            (r#"{"data":["#, long.clone()),
            (r#"{"datum":""#, long.clone()),
            (r#"{"content":"see \"data:image/png;base64,"#, long.clone()),
            (r#"{"content":"{\"data\":\""#, long.clone()),
        ];
        for (before, text) in not_embedded {
            let (bytes, embedded, around) = around(before, &text, r#""}"#);
            assert_eq!((bytes, embedded), (around + text.len() as u64, 0), "{before}");
        }
    }

    #[test]
    fn a_body_that_breaks_off_anywhere_is_no_panic() {
        let whole = format!(r#"{{"data" : "{}","url":"data:image/png;base64,{}"}}"#, "A".repeat(1100), "B".repeat(80));
        for end in 0..=whole.len() {
            let body = &whole.as_bytes()[..end];
            assert!(Prompt::of(body).bytes <= body.len() as u64);
        }
    }

    #[test]
    fn a_hostile_body_takes_no_longer_than_a_long_one() {
        for piece in ["\"data", "\"data:", "\"data\"", "\"data\" : \"", "\"data\":\"AAAA", "\"data:;base64,"] {
            let body = piece.repeat((1 << 20) / piece.len());
            assert_eq!(Prompt::of(body.as_bytes()), Prompt::text(body.as_bytes()), "{piece}");
        }
    }
}
