//! The units people write: durations (`"30s"`), sizes (`"32MiB"`) and rates (`"600/min"`).
//!
//! Each parser answers what was wrong *and what to write instead*, since its message is shown as it is. What a value
//! prints is what its parser reads, so an effective configuration can be read back.

use std::fmt;
use std::time::Duration;

/// Reads a duration: a number and one of `ms`, `s`, `min`, `h`; `"1.5s"` is fine. It is rounded to whole milliseconds, and
/// is none only if 0 was written.
///
/// # Errors
/// Says what is wrong and shows a duration that would do.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const EXAMPLE: &str = r#"write a number and ms, s, min or h, as in "30s""#;
    let (number, unit) = split_number(text);
    let seconds_per_unit = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "min" => 60.0,
        "h" => 3600.0,
        "" => return Err(format!("{text:?} has no unit; {EXAMPLE}")),
        _ => return Err(format!("{text:?} is not a duration; {EXAMPLE}")),
    };
    let number: f64 = number.parse().map_err(|_| format!("{text:?} is not a duration; {EXAMPLE}"))?;
    // A year is longer than anything here should wait, and keeps all later sums far from overflow.
    let seconds = number * seconds_per_unit;
    if seconds > 365.0 * 86_400.0 {
        return Err(format!("{text:?} is longer than a year; {EXAMPLE}"));
    }
    // Whole milliseconds are what can be written again; a time that is no time at all says so with a 0.
    let millis = (seconds * 1000.0).round() as u64;
    Ok(Duration::from_millis(if seconds > 0.0 { millis.max(1) } else { 0 }))
}

/// Writes a duration as [`parse_duration`] reads it, in the largest unit that keeps it whole.
pub fn format_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    match millis {
        0 => "0s".to_owned(),
        _ if millis.is_multiple_of(3_600_000) => format!("{}h", millis / 3_600_000),
        _ if millis.is_multiple_of(60_000) => format!("{}min", millis / 60_000),
        _ if millis.is_multiple_of(1000) => format!("{}s", millis / 1000),
        _ => format!("{millis}ms"),
    }
}

/// Reads a size in bytes: a whole number and one of `B`, `KiB`, `MiB`, `GiB`.
///
/// # Errors
/// Says what is wrong and shows a size that would do.
pub fn parse_size(text: &str) -> Result<u64, String> {
    const EXAMPLE: &str = r#"write a whole number and B, KiB, MiB or GiB, as in "32MiB""#;
    let (number, unit) = split_number(text);
    let bytes_per_unit = match unit {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "" => return Err(format!("{text:?} has no unit; {EXAMPLE}")),
        _ => return Err(format!("{text:?} is not a size; {EXAMPLE}")),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(bytes_per_unit))
        .ok_or_else(|| format!("{text:?} is not a size; {EXAMPLE}"))
}

/// Writes a size as [`parse_size`] reads it, in the largest unit that keeps it whole.
pub fn format_size(bytes: u64) -> String {
    match bytes {
        0 => "0B".to_owned(),
        _ if bytes.is_multiple_of(1 << 30) => format!("{}GiB", bytes >> 30),
        _ if bytes.is_multiple_of(1 << 20) => format!("{}MiB", bytes >> 20),
        _ if bytes.is_multiple_of(1 << 10) => format!("{}KiB", bytes >> 10),
        _ => format!("{bytes}B"),
    }
}

/// A quota: so many per period, of which `burst` may be taken at once after a pause.
///
/// In any window `w` a bucket of this rate lets through at most `burst + w * count / period`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How many per [`period`](Self::period). Never 0.
    pub count: u64,
    /// The period that `count` is for. Never 0.
    pub period: Duration,
    /// How many at once. Never 0.
    pub burst: u32,
}

impl Rate {
    /// The fastest rate a bucket can keep exact enough: one every 10 ns.
    const MAX_PER_SECOND: u64 = 100_000_000;

    /// Reads `"600/min"`; the burst is a tenth of the count, at least 1.
    ///
    /// # Errors
    /// Says what is wrong and shows a rate that would do.
    pub fn parse(text: &str) -> Result<Self, String> {
        const EXAMPLE: &str = r#"write a whole number per s, min, h or day, as in "600/min""#;
        let complaint = || format!("{text:?} is not a rate; {EXAMPLE}");
        let (count, period) = text.split_once('/').ok_or_else(complaint)?;
        let seconds = match period.trim() {
            "s" => 1,
            "min" => 60,
            "h" => 3600,
            "day" => 86_400,
            _ => return Err(complaint()),
        };
        let count: u64 = count.trim().replace('_', "").parse().map_err(|_| complaint())?;
        if count == 0 {
            return Err(format!("{text:?} lets nothing pass; {EXAMPLE}, or leave the limit out"));
        }
        if count / seconds > Self::MAX_PER_SECOND {
            return Err(format!("{text:?} is more than {} a second; leave the limit out", Self::MAX_PER_SECOND));
        }
        let burst = u32::try_from((count / 10).max(1)).unwrap_or(u32::MAX);
        Ok(Self { count, period: Duration::from_secs(seconds), burst })
    }

    /// The same quota with another burst.
    #[must_use]
    pub fn with_burst(self, burst: u32) -> Self {
        Self { burst: burst.max(1), ..self }
    }

    /// The longest that a bucket may take to fill: more is no limit that anyone would see the end of.
    pub const LONGEST_FILL: Duration = Duration::from_secs(366 * 86_400);

    /// How long an empty bucket of this rate takes to fill.
    pub fn time_to_fill(self) -> Duration {
        let nanos = self.period.as_nanos() * u128::from(self.burst) / u128::from(self.count);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// One of `replicas` equal shares of this quota. A share of a small quota keeps its rate by a longer period.
    #[must_use]
    pub fn share(self, replicas: u32) -> Self {
        Self { period: self.period * replicas, burst: (self.burst / replicas).max(1), ..self }
    }

    /// How many are granted in a second, on average.
    pub fn per_second(self) -> f64 {
        self.count as f64 / self.period.as_secs_f64()
    }

    /// The time in which one more is granted, once the burst is used up.
    pub fn interval(self) -> Duration {
        let nanos = self.period.as_nanos() / u128::from(self.count);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX).max(1))
    }
}

impl fmt::Display for Rate {
    /// The rate as written in the file: `600/min`. A share of a quota prints its rate rounded, and is marked so.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.period.as_secs() {
            1 => write!(f, "{}/s", self.count),
            60 => write!(f, "{}/min", self.count),
            3600 => write!(f, "{}/h", self.count),
            86_400 => write!(f, "{}/day", self.count),
            seconds => write!(f, "~{:.3}/s", self.count as f64 / seconds as f64),
        }
    }
}

fn split_number(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_read_and_written_alike() {
        for text in ["0s", "250ms", "30s", "5min", "2h"] {
            assert_eq!(format_duration(parse_duration(text).expect(text)), text);
        }
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
    }

    #[test]
    fn a_duration_is_whole_milliseconds_so_that_it_can_be_written() {
        for (text, written) in
            [("1.1h", "66min"), ("0.1ms", "1ms"), ("1.4999s", "1500ms"), ("0.0s", "0s"), (".5s", "500ms")]
        {
            assert_eq!(parse_duration(text).map(format_duration), Ok(written.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_bad_duration_says_what_to_write() {
        for text in ["", "5", "s", "5 meg", "-1s", "1e3s", "1.2.3s", "99999999h", "NaNs"] {
            let message = parse_duration(text).expect_err(text);
            assert!(message.contains(r#""30s""#), "{message}");
        }
    }

    #[test]
    fn a_size_is_read_and_written_alike() {
        for text in ["0B", "1B", "1500B", "64KiB", "32MiB", "1GiB"] {
            assert_eq!(format_size(parse_size(text).expect(text)), text);
        }
        for text in ["", "5", "5MB", "1.5MiB", "99999999999999GiB"] {
            assert!(parse_size(text).expect_err(text).contains(r#""32MiB""#));
        }
    }

    #[test]
    fn a_rate_has_a_burst_of_a_tenth_and_at_least_one() {
        assert_eq!(Rate::parse("600/min").map(|rate| rate.burst), Ok(60));
        assert_eq!(Rate::parse("5/s").map(|rate| rate.burst), Ok(1));
        assert_eq!(Rate::parse("600/min").map(Rate::interval), Ok(Duration::from_millis(100)));
        for text in ["", "600", "600/week", "0/min", "-5/s", "99999999999/s"] {
            assert!(Rate::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_shares_of_a_quota_add_up_to_it() {
        let share = Rate::parse("600/min").expect("a rate").share(3);
        assert_eq!(share.interval(), Duration::from_millis(300));
        assert_eq!(share.burst, 20);
        assert_eq!(Rate::parse("1/s").expect("a rate").share(10).burst, 1);
    }
}
