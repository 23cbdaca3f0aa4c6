//! How large a prompt is, for an estimate of what it will cost: text by its bytes, what is embedded by the piece.
//!
//! A picture of a megabyte costs a model no more than a page of text, so its base64 must not count as text. And text must
//! not pass for a picture: what is left out has to look like base64 from its beginning.

use memchr::{memchr, memchr2};

/// A payload begins with so many bytes of base64's alphabet; a shorter one is not worth leaving out.
const LOOKED_AT: usize = 64;

/// The value of a `"data"` key is shorter than this in everything but pictures, sounds and files.
const LEAST_DATA: usize = 1 << 10;

/// So long may the beginning of a data URL be, up to its comma.
const LONGEST_MEDIA_TYPE: usize = 128;

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

    /// Looks at a string of the body's JSON, a key or a value: whether it is a data URL, or the key `"data"` (Anthropic's
    /// images, OpenAI's `input_audio`) of 1 KiB or more. What stands in the body behind the string's first quote is given; all
    /// strings together take time in proportion to the body, whatever it holds.
    pub fn sees_string(&mut self, behind_quote: &[u8]) {
        if let Some(payload_len) = behind_quote.strip_prefix(b"data").and_then(payload_len) {
            self.bytes -= payload_len as u64;
            self.embedded = self.embedded.saturating_add(1);
        }
    }
}

/// How long what is embedded is, if anything is, behind `"data`.
fn payload_len(behind_mark: &[u8]) -> Option<usize> {
    let (text, least) = match behind_mark.first()? {
        b':' => (behind_media_type(&behind_mark[1..])?, LOOKED_AT),
        b'"' => (string_value(&behind_mark[1..])?, LEAST_DATA),
        _ => return None,
    };
    if !text.get(..LOOKED_AT)?.iter().all(is_base64) {
        return None;
    }
    memchr(b'"', text).filter(|len| *len >= least)
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
    use memchr::memmem;
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::super::json::Members;
    use super::*;

    impl Prompt {
        /// The same for a whole body, also for one that is no JSON: wherever the mark stands and may begin a string.
        fn of(body: &[u8]) -> Self {
            let mut prompt = Self::text(body);
            for quote in memmem::find_iter(body, b"\"data") {
                // Behind a backslash the quote is a letter of some text.
                if quote == 0 || body[quote - 1] != b'\\' {
                    prompt.sees_string(&body[quote + 1..]);
                }
            }
            prompt
        }
    }

    /// As it is read together with the JSON of an object; `None` where that is malformed.
    fn read_with_members(json: &[u8]) -> Option<Prompt> {
        let mut prompt = Prompt::text(json);
        let mut members = Members::of(json, |behind_quote| prompt.sees_string(behind_quote));
        while members.next_key().ok()?.is_some() {
            members.value().ok()?;
        }
        Some(prompt)
    }

    #[test]
    fn what_is_embedded_is_found_in_passing_as_by_a_search_for_it() {
        let long = "QUJD".repeat(300);
        let url = format!("data:image/png;base64,{long}");
        let escaped = format!(r#"\"data\":\"{long}\", \\"#);
        let texts = ["data", "data:", "x", "", r#"\\"#, r#"\"data"#, &long, &url, &escaped];
        let mut rng = SmallRng::seed_from_u64(1);
        let mut embedded = 0;
        for _ in 0..2000 {
            let mut text = || format!("\"{}\"", texts[rng.random_range(0..texts.len())]);
            let (a, b, c, d, e) = (text(), text(), text(), text(), text());
            let body = format!(r#"{{{a}: {{"b":[{b},{c}], {d}:{e}}}, "data" : {b},"c":[{{"data":{d}}}]}}"#);
            let expected = Prompt::of(body.as_bytes());
            assert_eq!(read_with_members(body.as_bytes()), Some(expected), "{body}");
            embedded += expected.embedded;
        }
        assert!(embedded > 1000, "{embedded}");
    }

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
