//! How a gateway tells of its quota: the headers of OpenAI, and `retry-after` in its three spellings.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::gate::Standing;
use super::quota::Level;
use super::settings::Hints;

/// A header that says when to come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hint {
    pub(super) name: &'static str,
    pub(super) value: String,
}

impl Hint {
    pub(super) fn of_refusal(hints: Hints, wait: Duration, wall: SystemTime) -> Vec<Self> {
        match hints {
            Hints::OpenAiHeaders => vec![Self::seconds(wait), Self::millis(wait)],
            Hints::RetryAfterOnly => vec![Self::seconds(wait)],
            Hints::RetryAfterDate => vec![Self::date(wall, wait)],
            Hints::None => Vec::new(),
        }
    }

    pub(super) fn millis(wait: Duration) -> Self {
        Self { name: "retry-after-ms", value: millis_rounded_up(wait).to_string() }
    }

    pub(super) fn seconds(wait: Duration) -> Self {
        Self { name: "retry-after", value: wait.as_nanos().div_ceil(1_000_000_000).to_string() }
    }

    pub(super) fn date(wall: SystemTime, wait: Duration) -> Self {
        // A date's whole seconds are rounded down as it is printed; and a year from now is late enough for any.
        let rounding = Duration::from_nanos(999_999_999);
        let date = wall + wait.min(Duration::from_secs(365 * 86_400)) + rounding;
        Self { name: "retry-after", value: httpdate::fmt_http_date(date) }
    }
}

/// Puts `x-ratelimit-*` on an answer.
pub(super) fn tell(headers: &mut HeaderMap, standing: Standing) {
    const REQUESTS: [HeaderName; 3] = [
        HeaderName::from_static("x-ratelimit-limit-requests"),
        HeaderName::from_static("x-ratelimit-remaining-requests"),
        HeaderName::from_static("x-ratelimit-reset-requests"),
    ];
    const TOKENS: [HeaderName; 3] = [
        HeaderName::from_static("x-ratelimit-limit-tokens"),
        HeaderName::from_static("x-ratelimit-remaining-tokens"),
        HeaderName::from_static("x-ratelimit-reset-tokens"),
    ];
    tell_level(headers, REQUESTS, standing.requests);
    tell_level(headers, TOKENS, standing.tokens);
}

fn tell_level(headers: &mut HeaderMap, [limit, remaining, reset]: [HeaderName; 3], level: Option<Level>) {
    let Some(level) = level else { return };
    headers.insert(limit, level.limit.into());
    headers.insert(remaining, level.remaining.into());
    let duration = HeaderValue::try_from(go_duration(level.reset)).expect("digits and letters");
    headers.insert(reset, duration);
}

/// Writes a duration as Go does (`20ms`, `1.5s`, `6m0s`, `1h0m0s`), rounded up to the millisecond.
pub(super) fn go_duration(duration: Duration) -> String {
    let millis = millis_rounded_up(duration);
    if (1..1000).contains(&millis) {
        return format!("{millis}ms");
    }
    let (seconds, fraction) = (millis / 1000, millis % 1000);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let fraction = if fraction == 0 { String::new() } else { format!(".{fraction:03}") };
    let seconds = format!("{seconds}{}s", fraction.trim_end_matches('0'));
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, _) => format!("{minutes}m{seconds}"),
        _ => format!("{hours}h{minutes}m{seconds}"),
    }
}

fn millis_rounded_up(duration: Duration) -> u128 {
    duration.as_nanos().div_ceil(1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_written_as_go_writes_it_and_never_too_short() {
        for (millis, text) in [
            (0, "0s"),
            (20, "20ms"),
            (1000, "1s"),
            (1500, "1.5s"),
            (72_300, "1m12.3s"),
            (360_000, "6m0s"),
            (3_600_000, "1h0m0s"),
        ] {
            assert_eq!(go_duration(Duration::from_millis(millis)), text);
        }
        assert_eq!(go_duration(Duration::from_nanos(1)), "1ms");
    }

    #[test]
    fn a_wait_is_rounded_up_in_each_spelling() {
        let wait = Duration::from_micros(1_000_001);
        assert_eq!(Hint::millis(wait).value, "1001");
        assert_eq!(Hint::seconds(wait).value, "2");
        let date = |wait| Hint::date(SystemTime::UNIX_EPOCH, wait).value;
        assert_eq!(date(wait), "Thu, 01 Jan 1970 00:00:02 GMT");
        assert_eq!(date(Duration::from_secs(1)), "Thu, 01 Jan 1970 00:00:01 GMT");
        assert_eq!(date(Duration::MAX), "Fri, 01 Jan 1971 00:00:00 GMT");
    }
}
