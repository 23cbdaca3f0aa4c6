//! The headers with which gateways and SDKs tell each other how long to wait.

use std::time::{Duration, SystemTime};

use bytes::{BufMut as _, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, header};

pub static RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
pub static SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
pub static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub static RESPONSE_TIME: HeaderName = HeaderName::from_static("x-response-time");
pub static SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
pub static WEIR_ATTEMPTS: HeaderName = HeaderName::from_static("x-weir-attempts");
pub static WEIR_REFUSED_BY: HeaderName = HeaderName::from_static("x-weir-refused-by");

/// `x-ratelimit-{limit,remaining,reset}-requests`.
static REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];

/// `x-ratelimit-{limit,remaining,reset}-tokens`.
static TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

static RETRY_COUNT: HeaderName = HeaderName::from_static("x-stainless-retry-count");

/// How long the SDKs wait: Python's always, Node's where a call has a timeout.
static SDK_TIMEOUTS: [HeaderName; 2] =
    [HeaderName::from_static("x-stainless-read-timeout"), HeaderName::from_static("x-stainless-timeout")];

/// How a quota stands, as a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    pub limit: u64,
    pub remaining: u64,
    /// How long until all of `limit` remains again.
    pub reset: Duration,
}

/// No hint is believed beyond a day.
const LONGEST_HINT: Duration = Duration::from_secs(86_400);

/// How long the gateway asks to wait: `retry-after-ms`, else `retry-after` (seconds or an HTTP date), else the reset of
/// the `x-ratelimit` quota that has nothing left. At most a day; what can't be read is no hint.
pub fn retry_hint(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    explicit_hint(headers, now).or_else(|| exhausted_reset(headers)).map(|hint| hint.min(LONGEST_HINT))
}

/// Whether the gateway says in so many words when to come back, with `retry-after-ms` or `retry-after`.
pub fn explicit_hint(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    millis(headers).or_else(|| retry_after(headers, now)).map(|hint| hint.min(LONGEST_HINT))
}

/// How the gateway says that its quotas of requests and tokens stand. Values that are not positive mean nothing (some gateways
/// send -1), and neither do those that can't be read. A quota without a time is taken to be a minute's.
pub fn told_quotas(headers: &HeaderMap) -> [Option<Quota>; 2] {
    [&REQUESTS, &TOKENS].map(|[limit, remaining, reset]| {
        let limit: u64 = text(headers, limit)?.parse().ok().filter(|limit| *limit > 0)?;
        let remaining: u64 = text(headers, remaining)?.parse().ok()?;
        let told = text(headers, reset).and_then(|told| go_duration(told).or_else(|| seconds(told)));
        let lacking = limit.saturating_sub(remaining) as f64 / limit as f64;
        let reset = told.unwrap_or_else(|| Duration::from_secs(60).mul_f64(lacking)).min(LONGEST_HINT);
        Some(Quota { limit, remaining, reset })
    })
}

/// The gateway's `x-should-retry`, which overrides what the status says.
pub fn should_retry(headers: &HeaderMap) -> Option<bool> {
    match text(headers, &SHOULD_RETRY)? {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// How many retries of its own an SDK has already spent on this request.
pub fn client_retries(headers: &HeaderMap) -> u32 {
    text(headers, &RETRY_COUNT).and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// How long the SDK that sent this will wait for an answer, where it says so (in seconds).
pub fn client_patience(headers: &HeaderMap) -> Option<Duration> {
    let told = SDK_TIMEOUTS.iter().filter_map(|name| seconds(text(headers, name)?));
    told.filter(|patience| !patience.is_zero()).min()
}

/// Tells how weir's quotas stand, in place of what the gateway said of its own. Of a unit that is `None` the gateway's
/// word stays.
pub fn tell_quota(fields: &mut HeaderMap, requests: Option<Quota>, tokens: Option<Quota>) {
    if requests.is_none() && tokens.is_none() {
        return;
    }
    // All values are parts of one piece of memory.
    let mut text = BytesMut::with_capacity(QUOTA_BYTES);
    for ([limit, remaining, reset], quota) in [(&REQUESTS, requests), (&TOKENS, tokens)] {
        let Some(quota) = quota else { continue };
        for (name, count) in [(limit, quota.limit), (remaining, quota.remaining)] {
            put_number(&mut text, count);
            fields.insert(name, visible(text.split()));
        }
        put_go_duration(&mut text, quota.reset);
        fields.insert(reset, visible(text.split()));
    }
}

/// The values of two quotas are hardly ever longer.
const QUOTA_BYTES: usize = 96;

/// Tells where the time went; milliseconds, to the tenth.
pub fn tell_timing(fields: &mut HeaderMap, queued: Duration, upstream: Duration) {
    let mut text = BytesMut::with_capacity(48);
    for (stage, duration) in [("queue;dur=", queued), (", upstream;dur=", upstream)] {
        let tenths = u64::from(duration.subsec_nanos() + 50_000) / 100_000;
        let tenths = duration.as_secs().saturating_mul(10_000).saturating_add(tenths);
        text.put_slice(stage.as_bytes());
        put_number(&mut text, tenths / 10);
        text.put_u8(b'.');
        put_number(&mut text, tenths % 10);
    }
    fields.append(&SERVER_TIMING, visible(text));
}

/// A number as a value.
pub fn number(number: u64) -> HeaderValue {
    HeaderValue::from_str(itoa::Buffer::new().format(number)).expect("digits")
}

fn put_number(text: &mut BytesMut, number: u64) {
    text.put_slice(itoa::Buffer::new().format(number).as_bytes());
}

fn visible(text: BytesMut) -> HeaderValue {
    HeaderValue::from_maybe_shared(text.freeze()).expect("digits, letters and points are a header's value")
}

fn millis(headers: &HeaderMap) -> Option<Duration> {
    seconds(text(headers, &RETRY_AFTER_MS)?).map(|thousandfold| thousandfold / 1000)
}

fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = text(headers, &header::RETRY_AFTER)?;
    seconds(value).or_else(|| {
        let date = httpdate::parse_http_date(value).ok()?;
        Some(date.duration_since(now).unwrap_or(Duration::ZERO))
    })
}

fn exhausted_reset(headers: &HeaderMap) -> Option<Duration> {
    let exhausted = [&REQUESTS, &TOKENS].into_iter().filter(|[_, remaining, _]| text(headers, remaining) == Some("0"));
    exhausted.filter_map(|[_, _, reset]| go_duration(text(headers, reset)?)).max()
}

/// Reads a duration as Go prints it: `1s`, `6m0s`, `20ms`, `1h2m3.5s`.
pub fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let unit_end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += number
            * match &rest[..unit_end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 0.001,
                "us" | "µs" => 0.000_001,
                "ns" => 0.000_000_001,
                _ => return None,
            };
        rest = &rest[unit_end..];
    }
    if text.is_empty() { None } else { Duration::try_from_secs_f64(total).ok() }
}

/// Writes a duration as Go does, in whole milliseconds: it is rounded up, so that who waits so long has waited enough.
fn put_go_duration(text: &mut BytesMut, duration: Duration) {
    let of_a_second = u64::from(duration.subsec_nanos().div_ceil(1_000_000));
    let millis = duration.as_secs().saturating_mul(1000).saturating_add(of_a_second);
    if (1..1000).contains(&millis) {
        put_number(text, millis);
        return text.put_slice(b"ms");
    }
    let (hours, minutes, seconds) = (millis / 3_600_000, millis / 60_000 % 60, millis / 1000 % 60);
    if hours > 0 {
        put_number(text, hours);
        text.put_u8(b'h');
    }
    if hours > 0 || minutes > 0 {
        put_number(text, minutes);
        text.put_u8(b'm');
    }
    put_number(text, seconds);
    let mut fraction = millis % 1000;
    if fraction > 0 {
        text.put_u8(b'.');
    }
    while fraction > 0 {
        put_number(text, fraction / 100);
        fraction = fraction % 100 * 10;
    }
    text.put_u8(b's');
}

/// A non-negative number of seconds, whole or not.
fn seconds(text: &str) -> Option<Duration> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number: f64 = text.parse().ok().filter(|_| plain)?;
    // What overflows is longer than any patience.
    Some(Duration::try_from_secs_f64(number).unwrap_or(Duration::MAX))
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(lines: &[(&'static str, &'static str)]) -> Option<Duration> {
        let headers = lines
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("a value")))
            .collect();
        retry_hint(&headers, SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777))
    }

    #[test]
    fn the_most_exact_hint_wins() {
        assert_eq!(hint(&[("retry-after", "2"), ("retry-after-ms", "20")]), Some(Duration::from_millis(20)));
        assert_eq!(hint(&[("retry-after", "1.5")]), Some(Duration::from_millis(1500)));
        assert_eq!(hint(&[("retry-after", "Sun, 06 Nov 1994 08:49:40 GMT")]), Some(Duration::from_secs(3)));
        assert_eq!(hint(&[("retry-after", "Sun, 06 Nov 1994 08:49:30 GMT")]), Some(Duration::ZERO));
        assert_eq!(
            hint(&[
                ("x-ratelimit-remaining-requests", "0"),
                ("x-ratelimit-reset-requests", "6m0s"),
                ("x-ratelimit-remaining-tokens", "9"),
                ("x-ratelimit-reset-tokens", "1h0m0s")
            ]),
            Some(Duration::from_secs(360))
        );
    }

    #[test]
    fn what_cannot_be_read_is_no_hint() {
        for value in ["", "soon", "-5", "NaN", "inf", "1e9", "Sun, 99 Nov 1994"] {
            assert_eq!(hint(&[("retry-after", value)]), None, "{value}");
        }
        assert_eq!(hint(&[("retry-after", "99999999999999999999999999")]), Some(LONGEST_HINT));
    }

    fn told(lines: &[(&'static str, &'static str)]) -> [Option<Quota>; 2] {
        let headers = lines
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("a value")))
            .collect();
        told_quotas(&headers)
    }

    #[test]
    fn the_gateways_quotas_are_read() {
        let lines = [
            ("x-ratelimit-limit-requests", "500"),
            ("x-ratelimit-remaining-requests", "499"),
            ("x-ratelimit-reset-requests", "120ms"),
            ("x-ratelimit-limit-tokens", "1000"),
            ("x-ratelimit-remaining-tokens", "250"),
        ];
        let requests = Quota { limit: 500, remaining: 499, reset: Duration::from_millis(120) };
        let tokens = Quota { limit: 1000, remaining: 250, reset: Duration::from_secs(45) };
        assert_eq!(told(&lines), [Some(requests), Some(tokens)]);
        let plain = [lines[0], lines[1], ("x-ratelimit-reset-requests", "0.12")];
        assert_eq!(told(&plain), [Some(requests), None]);
    }

    #[test]
    fn quotas_that_mean_nothing_are_not_read() {
        for (limit, remaining) in [("-1", "-1"), ("0", "0"), ("10", "-1"), ("x", "1"), ("10", ""), ("1e3", "1")] {
            let lines = [("x-ratelimit-limit-requests", limit), ("x-ratelimit-remaining-requests", remaining)];
            assert_eq!(told(&lines), [None, None], "{limit} {remaining}");
        }
        assert_eq!(told(&[("x-ratelimit-remaining-requests", "1")]), [None, None]);
    }

    #[test]
    fn go_durations_are_read() {
        assert_eq!(go_duration("1h2m3.5s"), Some(Duration::from_millis(3_723_500)));
        assert_eq!(go_duration("20ms"), Some(Duration::from_millis(20)));
        for text in ["", "5", "s", "1x", "1s2", "..s"] {
            assert_eq!(go_duration(text), None, "{text}");
        }
    }

    fn to_go_duration(duration: Duration) -> String {
        let mut text = BytesMut::new();
        put_go_duration(&mut text, duration);
        String::from_utf8(text.into()).expect("ASCII")
    }

    #[test]
    fn durations_are_written_as_go_does_and_read_back() {
        let written = [
            (0, "0s"),
            (1, "1ms"),
            (20_000_000, "20ms"),
            (20_000_001, "21ms"),
            (999_000_001, "1s"),
            (1_500_000_000, "1.5s"),
            (60_050_000_000, "1m0.05s"),
            (360_000_000_000, "6m0s"),
            (3_600_000_000_000, "1h0m0s"),
            (3_723_004_000_000, "1h2m3.004s"),
        ];
        for (nanos, text) in written {
            assert_eq!(to_go_duration(Duration::from_nanos(nanos)), text);
        }
        for millis in (0..200_000_000).step_by(7919) {
            let duration = Duration::from_millis(millis);
            assert_eq!(go_duration(&to_go_duration(duration)), Some(duration));
        }
        assert!(to_go_duration(Duration::MAX).ends_with('s'));
    }

    #[test]
    fn weirs_quota_stands_in_place_of_the_gateways_unit_by_unit() {
        let mut headers = HeaderMap::new();
        for name in REQUESTS.iter().chain(&TOKENS) {
            headers.append(name, "upstream".parse().expect("a value"));
            headers.append(name, "again".parse().expect("a value"));
        }
        let of = |headers: &HeaderMap, names: &[HeaderName; 3]| {
            let values = names.each_ref().map(|name| headers.get_all(name).iter().cloned().collect::<Vec<_>>());
            values.concat().iter().map(|value| value.to_str().expect("text").to_owned()).collect::<Vec<_>>()
        };
        tell_quota(&mut headers, None, Some(Quota { limit: 5000, remaining: 0, reset: Duration::from_micros(1500) }));
        assert_eq!(of(&headers, &TOKENS), ["5000", "0", "2ms"]);
        assert_eq!(of(&headers, &REQUESTS).len(), 6, "the gateway's stay");
        tell_quota(&mut headers, Some(Quota { limit: 10, remaining: 9, reset: Duration::from_secs(6) }), None);
        assert_eq!(of(&headers, &REQUESTS), ["10", "9", "6s"]);
        assert_eq!(of(&headers, &TOKENS), ["5000", "0", "2ms"]);
    }

    #[test]
    fn an_sdk_tells_its_patience_and_its_retries() {
        let mut headers = HeaderMap::new();
        assert_eq!((client_patience(&headers), client_retries(&headers)), (None, 0));
        headers.insert("x-stainless-read-timeout", "600".parse().expect("a value"));
        headers.insert("x-stainless-retry-count", "2".parse().expect("a value"));
        assert_eq!((client_patience(&headers), client_retries(&headers)), (Some(Duration::from_secs(600)), 2));
    }
}
