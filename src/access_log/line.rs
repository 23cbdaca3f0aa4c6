//! One line: a JSON object in visible ASCII, whatever the values hold.
//!
//! Written by hand, into one buffer: serde_json would need a structure of owned values first, and leaves more bytes as they
//! are than a terminal, or a tool that splits lines at U+2028, should be shown.

use std::time::{Duration, SystemTime};

/// Room for a usual line.
const ROOM: usize = 768;

/// What the line begins with; the time is put into it at the end.
const BEGINNING: &[u8] = b"{\"time\":\"0000-00-00T00:00:00.000Z\"";

/// Where the time stands in it.
const TIME_AT: usize = 9;

/// A line under way.
pub struct Line(Vec<u8>);

impl Line {
    pub fn begin() -> Self {
        let mut bytes = Vec::with_capacity(ROOM);
        bytes.extend_from_slice(BEGINNING);
        Self(bytes)
    }

    /// A text of somebody else's: escaped, and cut behind so many characters, which `…` tells.
    pub fn text(&mut self, key: &str, value: &[u8], most: usize) {
        self.key(key);
        self.0.push(b'"');
        escape(&mut self.0, value, most);
        self.0.push(b'"');
    }

    /// A word of weir's own, in letters.
    pub fn word(&mut self, key: &str, value: &'static str) {
        self.key(key);
        self.0.push(b'"');
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(b'"');
    }

    pub fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        self.0.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    }

    pub fn flag(&mut self, key: &str, value: bool) {
        self.key(key);
        self.0.extend_from_slice(if value { b"true" } else { b"false" });
    }

    /// Milliseconds, to the microsecond.
    pub fn millis(&mut self, key: &str, value: Duration) {
        let micros = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
        self.number(key, micros / 1000);
        self.0.push(b'.');
        self.0.extend_from_slice(&digits::<3>(micros % 1000));
    }

    /// An object of numbers.
    pub fn numbers(&mut self, key: &str, values: [(&str, u64); 4]) {
        self.key(key);
        self.0.push(b'{');
        let begun = self.0.len();
        for (name, value) in values {
            self.number(name, value);
        }
        // The first needs no comma before it.
        self.0.remove(begun);
        self.0.push(b'}');
    }

    /// The finished line, with its line break.
    pub fn end(mut self, now: SystemTime) -> Vec<u8> {
        self.0.extend_from_slice(b"}\n");
        write_time(&mut self.0[TIME_AT..], now);
        self.0
    }

    fn key(&mut self, key: &str) {
        self.0.extend_from_slice(b",\"");
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(b"\":");
    }
}

/// Writes at most so many characters of a text as JSON has them between quotes. What is not visible ASCII becomes `\u…`; what
/// is not UTF-8, U+FFFD.
fn escape(out: &mut Vec<u8>, text: &[u8], most: usize) {
    // The usual case.
    if text.len() <= most && text.iter().all(|byte| is_plain(*byte)) {
        return out.extend_from_slice(text);
    }
    let characters = text.utf8_chunks().flat_map(|chunk| {
        let broken = (!chunk.invalid().is_empty()).then_some(char::REPLACEMENT_CHARACTER);
        chunk.valid().chars().chain(broken)
    });
    for (number, character) in characters.enumerate() {
        if number == most {
            return escape_character(out, '…');
        }
        escape_character(out, character);
    }
}

/// Whether a byte stands for itself.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\')
}

fn escape_character(out: &mut Vec<u8>, character: char) {
    match character {
        '"' | '\\' => out.extend_from_slice(&[b'\\', character as u8]),
        ' '..='~' => out.push(character as u8),
        _ => {
            for unit in character.encode_utf16(&mut [0; 2]) {
                out.extend_from_slice(b"\\u");
                let nibbles = [12, 8, 4, 0].map(|shift| b"0123456789abcdef"[usize::from(*unit >> shift & 0xf)]);
                out.extend_from_slice(&nibbles);
            }
        }
    }
}

/// The last `N` decimal digits of a number.
fn digits<const N: usize>(mut number: u64) -> [u8; N] {
    let mut digits = [b'0'; N];
    for digit in digits.iter_mut().rev() {
        *digit += (number % 10) as u8;
        number /= 10;
    }
    digits
}

/// Writes a time as RFC 3339 has it, UTC and to the millisecond, over the 24 bytes of another.
fn write_time(place: &mut [u8], time: SystemTime) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = date(since.as_secs() / 86_400);
    let second = since.as_secs() % 86_400;
    place[..4].copy_from_slice(&digits::<4>(year));
    for (at, number) in [(5, month), (8, day), (11, second / 3600), (14, second / 60 % 60), (17, second % 60)] {
        place[at..at + 2].copy_from_slice(&digits::<2>(number));
    }
    place[20..23].copy_from_slice(&digits::<3>(since.subsec_millis().into()));
}

/// Days from 1 March 2000, a year's end as far as leap days go, back to 1 January 1970.
const MARCH_2000: u64 = 11_017;

/// Days of 400 years, 100, 4 and one.
const CYCLES: [u64; 4] = [146_097, 36_524, 1_461, 365];

/// Year, month and day of the Gregorian calendar, so many days after 1 January 1970.
///
/// Years are counted from 1 March, so that a leap day is the last of its year, of its four years, and of its four hundred.
fn date(days: u64) -> (u64, u64, u64) {
    // 400 years earlier, so that nothing is negative.
    let mut rest = days + CYCLES[0] - MARCH_2000;
    let four_centuries = rest / CYCLES[0];
    rest %= CYCLES[0];
    let centuries = (rest / CYCLES[1]).min(3);
    rest -= centuries * CYCLES[1];
    let fours = rest / CYCLES[2];
    rest %= CYCLES[2];
    let years = (rest / CYCLES[3]).min(3);
    rest -= years * CYCLES[3];
    let mut year = 1600 + 400 * four_centuries + 100 * centuries + 4 * fours + years;
    let mut month = 3;
    for length in [31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    if month > 12 {
        (year, month) = (year + 1, month - 12);
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn at(millis: u64) -> String {
        let line = String::from_utf8(Line::begin().end(UNIX_EPOCH + Duration::from_millis(millis))).expect("ASCII");
        line.strip_prefix("{\"time\":\"").and_then(|rest| rest.strip_suffix("\"}\n")).expect("nothing else").to_owned()
    }

    #[test]
    fn the_time_is_written_as_rfc_3339_has_it() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_799, "2000-02-29T23:59:59.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (253_402_300_799, "9999-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(at(1000 * seconds), expected);
        }
        assert_eq!(at(1_795_536_000_042), "2026-11-24T16:00:00.042Z");
        assert_eq!(at(999), "1970-01-01T00:00:00.999Z");
    }

    /// Against a reading that goes from day to day.
    #[test]
    fn every_day_of_a_hundred_and_forty_years_has_its_date() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..365 * 140 {
            assert_eq!(date(days), (year, month, day), "{days}");
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (year, month, day) = match (month, day) {
                (12, 31) => (year + 1, 1, 1),
                (_, day) if day == length => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
        }
    }

    /// What a reader makes of a text that was written.
    fn read_back(text: &[u8], most: usize) -> String {
        let mut line = Line::begin();
        line.text("x", text, most);
        let bytes = line.end(UNIX_EPOCH);
        let (last, before) = bytes.split_last().expect("a line");
        assert!(*last == b'\n' && before.iter().all(|byte| (b' '..=b'~').contains(byte)), "{}", bytes.escape_ascii());
        let value: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        value["x"].as_str().expect("text").to_owned()
    }

    #[test]
    fn any_text_comes_back_as_it_was() {
        for text in ["", "a", "\"\\\"", "\u{1b}[2J\u{9b}2J", "a\r\nb\t\0", "é€😀", "\u{2028}\u{85}\u{7f}", "</script>"]
        {
            assert_eq!(read_back(text.as_bytes(), 100), text);
        }
        assert_eq!(read_back(b"a\xff\xfeb\xe2\x82", 100), "a\u{fffd}\u{fffd}b\u{fffd}");
    }

    #[test]
    fn a_long_text_is_cut_between_two_characters() {
        assert_eq!(read_back(&[b'x'; 5], 5), "xxxxx");
        assert_eq!(read_back(&[b'x'; 6], 5), "xxxxx…");
        assert_eq!(read_back("é".repeat(5).as_bytes(), 5), "ééééé");
        assert_eq!(read_back("😀".repeat(6).as_bytes(), 5), "😀😀😀😀😀…");
    }

    #[test]
    fn whatever_bytes_are_written_the_line_is_json_and_short() {
        // xorshift: the same bytes in each run.
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..5_000 {
            let length = (next() % 200) as usize;
            let bytes: Vec<u8> = (0..length)
                .map(|_| match next() % 4 {
                    0 => (next() % 0x30) as u8,
                    1 => b"\"\\\n\x7f\xc3\xa9\xe2\x80\xa8\xf0\x9f"[(next() % 10) as usize],
                    _ => next() as u8,
                })
                .collect();
            let back = read_back(&bytes, 64);
            let expected = String::from_utf8_lossy(&bytes);
            let kept: String = expected.chars().take(64).collect();
            assert_eq!(back.trim_end_matches('…'), kept.trim_end_matches('…'), "{}", bytes.escape_ascii());
            assert!(back.chars().count() <= 65);
        }
    }

    #[test]
    fn numbers_are_plain() {
        let mut line = Line::begin();
        line.number("a", u64::MAX);
        line.millis("b", Duration::from_nanos(1_234_567_890));
        line.millis("c", Duration::from_nanos(999));
        line.millis("d", Duration::MAX);
        line.flag("e", true);
        line.numbers("f", [("p", 1), ("q", 20), ("r", 0), ("s", 3)]);
        line.word("g", "ok");
        let text = String::from_utf8(line.end(UNIX_EPOCH)).expect("ASCII");
        let expected = concat!(
            r#","a":18446744073709551615,"b":1234.567,"c":0.000,"d":18446744073709551.615,"e":true,"#,
            r#""f":{"p":1,"q":20,"r":0,"s":3},"g":"ok"}"#,
            "\n"
        );
        assert!(text.ends_with(expected), "{text}");
        serde_json::from_str::<serde_json::Value>(&text).expect("JSON");
    }
}
