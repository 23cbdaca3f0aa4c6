//! The headers with which gateways and SDKs say how long to wait.

use std::time::{Duration, SystemTime};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use weir::openai::headers::{
    Quota, client_patience, client_retries, explicit_hint, go_duration, retry_hint, should_retry, tell_quota,
    told_quotas,
};

const DAY: Duration = Duration::from_secs(86_400);

/// Sun, 06 Nov 1994 08:49:37 GMT.
const NOW: SystemTime = SystemTime::UNIX_EPOCH;
const NOW_SECONDS: u64 = 784_111_777;

/// A nanosecond in the unit of [`slow_go_duration`].
const NANO: u128 = 1_000_000_000_000_000_000;

/// Lines of `name: value`; or a single value, which is tried in every place.
pub fn check(lines: &[u8]) {
    let mut fields = HeaderMap::new();
    for line in lines.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..colon]), value) {
            fields.append(name, value);
        }
    }
    are_within_bounds(&fields);
    if let Ok(text) = std::str::from_utf8(lines) {
        is_the_time_it_says(text);
        if let Ok(value) = HeaderValue::from_str(text) {
            are_within_bounds(&everywhere(&value));
            plain_numbers_are_read(text.trim_ascii(), value);
        }
    }
}

fn everywhere(value: &HeaderValue) -> HeaderMap {
    const NAMES: [&str; 11] = [
        "retry-after",
        "retry-after-ms",
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
        "x-ratelimit-limit-tokens",
        "x-ratelimit-remaining-tokens",
        "x-ratelimit-reset-tokens",
        "x-should-retry",
        "x-stainless-retry-count",
        "x-stainless-timeout",
    ];
    NAMES.iter().map(|name| (HeaderName::from_static(name), value.clone())).collect()
}

fn are_within_bounds(fields: &HeaderMap) {
    let now = NOW + Duration::from_secs(NOW_SECONDS);
    let (hint, explicit) = (retry_hint(fields, now), explicit_hint(fields, now));
    assert!(hint.is_none_or(|hint| hint <= DAY));
    assert!(explicit.is_none() || explicit == hint, "what is said in so many words goes first");
    assert!(client_patience(fields).is_none_or(|patience| !patience.is_zero()));
    let _ = (should_retry(fields), client_retries(fields));
    let [requests, tokens] = told_quotas(fields);
    for quota in [requests, tokens].into_iter().flatten() {
        assert!(quota.limit > 0 && quota.reset <= DAY, "{quota:?}");
    }
    let mut told = fields.clone();
    tell_quota(&mut told, requests, tokens);
    let rounded = |quota: Quota| {
        let millis = u64::try_from(quota.reset.as_nanos().div_ceil(1_000_000)).expect("a day has fewer");
        Quota { reset: Duration::from_millis(millis), ..quota }
    };
    assert_eq!(told_quotas(&told), [requests.map(rounded), tokens.map(rounded)], "what is told is what is read");
}

fn is_the_time_it_says(text: &str) {
    let read = go_duration(text);
    match slow_go_duration(text) {
        Some(exact) if exact < NANO << 62 => {
            let read = read.expect("it is a duration").as_nanos() * NANO;
            assert!(read.abs_diff(exact) <= NANO + exact / (1 << 40), "{text:?}: {read} instead of {exact}");
        }
        Some(_) => {}
        None => assert_eq!(read, None, "{text:?} is no duration"),
    }
}

/// In parts of 10⁻¹⁸ nanoseconds, so that what is cut off of many fractions does not add up to one.
/// `None` where it is no duration.
fn slow_go_duration(text: &str) -> Option<u128> {
    const UNITS: [(&str, u128); 7] = [
        ("ns", 1),
        ("us", 1000),
        ("µs", 1000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
    ];
    let (mut rest, mut total) = (text, 0u128);
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit = rest[number..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |end| number + end);
        let nanos = UNITS.iter().find(|(name, _)| *name == &rest[number..unit])?.1;
        let (whole, fraction) = rest[..number].split_once('.').unwrap_or((&rest[..number], ""));
        if fraction.contains('.') || whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let digits = |text: &str| text.bytes().fold(0u128, |n, digit| (n * 10 + u128::from(digit - b'0')).min(1 << 70));
        let fraction = &fraction[..fraction.len().min(18)];
        let part = digits(fraction) * 10u128.pow(18 - fraction.len() as u32) * nanos;
        total = total.saturating_add(digits(whole).saturating_mul(nanos).saturating_mul(NANO)).saturating_add(part);
        rest = &rest[unit..];
    }
    (!text.is_empty()).then_some(total)
}

fn plain_numbers_are_read(text: &str, value: HeaderValue) {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return;
    }
    let whole = text.parse().unwrap_or(u64::MAX).min(DAY.as_secs());
    let fields = HeaderMap::from_iter([(HeaderName::from_static("retry-after"), value)]);
    assert_eq!(retry_hint(&fields, NOW), Some(Duration::from_secs(whole)));
}
