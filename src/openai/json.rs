//! JSON read in passing: an object's keys, and its values as they stand there.
//!
//! A prompt is a long string that nobody here reads. serde_json skips it byte by byte, which was most of what a long request
//! cost; here strings are skipped in large steps. All else is as strict (RFC 8259), except that the text inside of
//! strings which are skipped need not be UTF-8.

use std::borrow::Cow;

use memchr::memchr2;

use super::word::{self, Word};

/// It is not JSON, or not an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// The members of an object, in their order. [`Members::next_key`] and [`Members::value`] are called in turn.
#[derive(Debug)]
pub struct Members<'b, F> {
    json: &'b [u8],
    at: usize,
    begun: bool,
    string_begins: F,
}

impl<'b, F: FnMut(&'b [u8])> Members<'b, F> {
    /// The members of the object that `json` is. `string_begins` is told, wherever a string begins, keys among them, what
    /// stands behind its first quote.
    pub fn of(json: &'b [u8], string_begins: F) -> Self {
        Self { json, at: 0, begun: false, string_begins }
    }

    /// The next key, its escapes undone: borrowed where it has none. `None` when the object has ended, with nothing but white
    /// space behind it.
    ///
    /// # Errors
    /// There is neither.
    pub fn next_key(&mut self) -> Result<Option<Cow<'b, str>>, Malformed> {
        match (std::mem::replace(&mut self.begun, true), self.next_token()?) {
            (false, b'{') => {
                if self.peek_token()? == b'}' {
                    self.at += 1;
                    return self.end();
                }
            }
            (true, b',') => {}
            (true, b'}') => return self.end(),
            _ => return Err(Malformed),
        }
        if self.peek_token()? != b'"' {
            return Err(Malformed);
        }
        let start = self.at;
        let inside = self.string()?;
        let quoted = &self.json[start..self.at];
        if self.next_token()? != b':' {
            return Err(Malformed);
        }
        let key = match inside.contains(&b'\\') {
            true => Cow::Owned(serde_json::from_slice(quoted).map_err(|_| Malformed)?),
            false => Cow::Borrowed(std::str::from_utf8(inside).map_err(|_| Malformed)?),
        };
        Ok(Some(key))
    }

    /// The value of the key that was just read, as it is written.
    ///
    /// # Errors
    /// There is none.
    pub fn value(&mut self) -> Result<&'b [u8], Malformed> {
        self.peek_token()?;
        let start = self.at;
        self.skip_value()?;
        Ok(&self.json[start..self.at])
    }

    fn end(&mut self) -> Result<Option<Cow<'b, str>>, Malformed> {
        self.white_space();
        if self.at == self.json.len() { Ok(None) } else { Err(Malformed) }
    }

    /// Skips a value, without recursion: it may be nested as deep as it is long.
    fn skip_value(&mut self) -> Result<(), Malformed> {
        // The ends of what is open.
        let mut open: Vec<u8> = Vec::new();
        loop {
            match self.peek_token()? {
                b'"' => _ = self.string()?,
                bracket @ (b'{' | b'[') => {
                    self.at += 1;
                    let end = if bracket == b'{' { b'}' } else { b']' };
                    if self.peek_token()? == end {
                        self.at += 1;
                    } else {
                        open.push(end);
                        self.before_element(end)?;
                        continue;
                    }
                }
                b't' => self.literal(b"true")?,
                b'f' => self.literal(b"false")?,
                b'n' => self.literal(b"null")?,
                _ => self.number()?,
            }
            loop {
                let Some(end) = open.last().copied() else { return Ok(()) };
                match self.next_token()? {
                    b',' => {
                        self.before_element(end)?;
                        break;
                    }
                    token if token == end => _ = open.pop(),
                    _ => return Err(Malformed),
                }
            }
        }
    }

    /// What stands before a value: in an object, its key.
    fn before_element(&mut self, end: u8) -> Result<(), Malformed> {
        if end == b']' {
            return Ok(());
        }
        if self.peek_token()? != b'"' {
            return Err(Malformed);
        }
        self.string()?;
        if self.next_token()? == b':' { Ok(()) } else { Err(Malformed) }
    }

    /// Skips the string that begins here; returns what is between its quotes.
    fn string(&mut self) -> Result<&'b [u8], Malformed> {
        let start = self.at + 1;
        (self.string_begins)(&self.json[start..]);
        let mut at = start;
        loop {
            at += plain_len(self.json.get(at..).ok_or(Malformed)?).ok_or(Malformed)?;
            match self.json[at] {
                b'"' => {
                    self.at = at + 1;
                    return Ok(&self.json[start..at]);
                }
                b'\\' => {}
                // A control character has to be escaped.
                _ => return Err(Malformed),
            }
            at += escape_len(&self.json[at + 1..]).ok_or(Malformed)?;
        }
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), Malformed> {
        if !self.json[self.at..].starts_with(word) {
            return Err(Malformed);
        }
        self.at += word.len();
        Ok(())
    }

    fn number(&mut self) -> Result<(), Malformed> {
        self.take_one(b"-");
        let leads_with_zero = self.byte() == Some(b'0');
        let whole = self.digits();
        if whole == 0 || leads_with_zero && whole > 1 {
            return Err(Malformed);
        }
        if self.take_one(b".") && self.digits() == 0 {
            return Err(Malformed);
        }
        if self.take_one(b"eE") {
            self.take_one(b"+-");
            if self.digits() == 0 {
                return Err(Malformed);
            }
        }
        Ok(())
    }

    fn take_one(&mut self, of: &[u8]) -> bool {
        let is_one = self.byte().is_some_and(|byte| of.contains(&byte));
        self.at += usize::from(is_one);
        is_one
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while self.byte().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        self.at - start
    }

    fn byte(&self) -> Option<u8> {
        self.json.get(self.at).copied()
    }

    fn white_space(&mut self) {
        while matches!(self.byte(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    /// The next byte that is no white space; the reading goes on at it.
    fn peek_token(&mut self) -> Result<u8, Malformed> {
        self.white_space();
        self.byte().ok_or(Malformed)
    }

    fn next_token(&mut self) -> Result<u8, Malformed> {
        let token = self.peek_token()?;
        self.at += 1;
        Ok(token)
    }
}

/// How much of a string stands before the next byte that means something in it; `None` where none comes, or only behind a
/// control character.
fn plain_len(text: &[u8]) -> Option<usize> {
    let means_something = |word: Word| word.is(b'"').or(word.is(b'\\')).or(word.is_below(b' '));
    word::find(text, means_something, |far| {
        let at = memchr2(b'"', b'\\', far)?;
        // Of this the compiler makes one look at many bytes.
        let least = far[..at].iter().fold(u8::MAX, |least, byte| least.min(*byte));
        (least >= b' ').then_some(at)
    })
}

/// The length of an escape, its backslash included, of which `rest` is what follows that.
fn escape_len(rest: &[u8]) -> Option<usize> {
    match rest {
        [b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => Some(2),
        [b'u', digits @ ..] if digits.get(..4)?.iter().all(u8::is_ascii_hexdigit) => Some(6),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};
    use serde::de::IgnoredAny;

    use super::*;

    /// Every member, or `Malformed`.
    fn members(json: &str) -> Result<Vec<(String, String)>, Malformed> {
        let (mut members, mut read) = (Members::of(json.as_bytes(), |_| ()), Vec::new());
        while let Some(key) = members.next_key()? {
            let value = std::str::from_utf8(members.value()?).expect("text");
            read.push((key.into_owned(), value.to_owned()));
        }
        Ok(read)
    }

    #[test]
    fn keys_and_values_are_told_as_they_stand_there() {
        let json = r#" { "a" : 1 , "mod\u0065l":"x\"y" ,"c":[1,{"d":[]},"]"],
            "e":{"f":{}}, "":null,"n":-0.5e+3,"t":true,"f":false,"z":0 } "#;
        let expected = [
            ("a", "1"),
            ("model", r#""x\"y""#),
            ("c", r#"[1,{"d":[]},"]"]"#),
            ("e", r#"{"f":{}}"#),
            ("", "null"),
            ("n", "-0.5e+3"),
            ("t", "true"),
            ("f", "false"),
            ("z", "0"),
        ];
        let expected: Vec<_> = expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        assert_eq!(members(json), Ok(expected));
        assert_eq!(members("{}"), Ok(vec![]));
        assert_eq!(members("\t{ \r\n} "), Ok(vec![]));
    }

    #[test]
    fn it_is_as_strict_as_serde_json() {
        let long = "x".repeat(40);
        let texts = [
            r#"{"a":1}"#,
            "",
            " ",
            "{",
            "}",
            "[]",
            "1",
            "null",
            "{}x",
            "{},",
            r#"{"a":1,}"#,
            r#"{,"a":1}"#,
            r#"{"a" 1}"#,
            r#"{"a":}"#,
            r#"{a:1}"#,
            r#"{"a":1 "b":2}"#,
            r#"{"a":[1,]}"#,
            r#"{"a":[1 2]}"#,
            r#"{"a":[1}}"#,
            r#"{"a":{]}"#,
            r#"{"a":{"b"}}"#,
            r#"{"a":{"b":1,}}"#,
            r#"{"a":01}"#,
            r#"{"a":-}"#,
            r#"{"a":+1}"#,
            r#"{"a":1.}"#,
            r#"{"a":.5}"#,
            r#"{"a":1e}"#,
            r#"{"a":1e+}"#,
            r#"{"a":-0}"#,
            r#"{"a":-01}"#,
            r#"{"a":1E9}"#,
            r#"{"a":tru}"#,
            r#"{"a":nulll}"#,
            r#"{"a":True}"#,
            r#"{"a":"\x"}"#,
            r#"{"a":"\u12"}"#,
            r#"{"a":"\u12g4"}"#,
            r#"{"a":"\ud800"}"#,
            r#"{"a":"\"#,
            r#"{"a":"b"#,
            r#"{"a\q":1}"#,
            "{\"a\":\"\n\"}",
            "{\"a\u{1}\":1}",
            "{\"a\":\"\u{7f}\"}",
            "\u{feff}{}",
            "{\"a\":\u{a0}1}",
            r#"{"a":NaN}"#,
            r#"{"a":1}{"b":2}"#,
            r#"{"a":"/\/"}"#,
            r#"{"a":[[[[]]]]}"#,
        ];
        let with_long = texts.iter().map(|text| text.replace('a', &long).replace('b', "\u{e9}\u{1f600}"));
        for text in texts.iter().map(|text| (*text).to_owned()).chain(with_long) {
            let expected = serde_json::from_str::<std::collections::HashMap<String, IgnoredAny>>(&text).is_ok();
            assert_eq!(members(&text).is_ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_control_character_is_found_wherever_it_stands() {
        for length in [0, 15, 16, 17, 255, 256, 300, 1000] {
            for behind in [0, 1, 300] {
                let text = format!("{{\"a\":\"{}\u{2}{}\"}}", "x".repeat(length), "y".repeat(behind));
                assert_eq!(members(&text), Err(Malformed), "{length} before, {behind} behind");
            }
        }
    }

    #[test]
    fn the_next_byte_that_means_something_is_found_wherever_it_stands() {
        let slow = |text: &[u8]| {
            let at = text.iter().position(|byte| matches!(byte, b'"' | b'\\' | ..b' '))?;
            (text[at] >= b' ').then_some(at)
        };
        let strange = [0, 1, 0x1f, 0x20, 0x21, b'"', 0x23, 0x5b, b'\\', 0x5d, 0x7f, 0x80, 0xa2, 0xdc, 0xff];
        let mut rng = SmallRng::seed_from_u64(1);
        for length in (0..200).chain([1000]) {
            for strange_part in [0.0, 0.01, 0.1, 0.5, 1.0] {
                let byte = |rng: &mut SmallRng| match rng.random_bool(strange_part) {
                    true => strange[rng.random_range(0..strange.len())],
                    false => rng.random_range(b'a'..=b'z'),
                };
                let text: Vec<u8> = (0..length).map(|_| byte(&mut rng)).collect();
                for start in 0..length.min(8) {
                    let text = &text[start..];
                    let found = plain_len(text).filter(|at| text[*at] >= b' ');
                    assert_eq!(found, slow(text), "{}", text.escape_ascii());
                }
            }
        }
    }

    #[test]
    fn depth_is_no_danger() {
        let deep = 200_000;
        let text = format!("{{\"a\":{}1{}}}", "[".repeat(deep), "]".repeat(deep));
        assert_eq!(members(&text).map(|members| members.len()), Ok(1));
        assert!(members(&text[..text.len() - 2]).is_err());
    }

    #[test]
    fn a_text_cut_anywhere_is_malformed() {
        let text = r#"{"a":"b\u00e9","c":[1.5e3,{"d":null}],"e":true}"#;
        for end in 0..text.len() {
            assert!(members(&text[..end]).is_err(), "{end}");
        }
    }
}
