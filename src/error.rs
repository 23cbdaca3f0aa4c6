//! Every way in which a request ends without an answer of the gateway's, and the one table of what its client sees.
//!
//! The table is documented in docs/errors.md; a test holds the two together.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};

use crate::openai::call::Endpoint;
use crate::openai::{envelope, headers};

/// Why weir answered itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// A request quota is used up, and the wait would be too long.
    Requests,
    /// A token quota is used up, and the wait would be too long.
    Tokens,
    /// A client's own slots stayed busy for as long as the request could wait.
    ClientConcurrency,
    /// All slots stayed busy for as long as the request could wait.
    Concurrency,
    /// No room in the queue, by number or by bytes.
    QueueFull,
    /// The gateway fails or says that it has too much to do, and the wait would be too long.
    Unavailable,
    /// weir is about to stop.
    Draining,
    /// No connection to the gateway.
    Unreachable,
    /// The gateway closed the connection without an answer.
    Disconnected,
    /// What the gateway sent is not HTTP, or not an answer.
    InvalidResponse,
    /// `timeouts.connect`.
    ConnectTimeout,
    /// `timeouts.first_event`.
    FirstEventTimeout,
    /// `timeouts.response`.
    ResponseTimeout,
    /// `timeouts.idle`. It can only end an answer that has begun, so its client sees it as a stream's last event.
    IdleTimeout,
    /// `timeouts.deadline`.
    DeadlineExceeded,
    /// The request line, Host or framing is wrong.
    BadRequest,
    /// A key that decides about limits stands twice in the body.
    DuplicateKey,
    /// The key is none of those in `[clients]`.
    InvalidApiKey,
    /// The path is not under `/v1`.
    UnknownPath,
    /// The body came too slowly.
    RequestTimeout,
    /// The body is longer than `server.max_body`.
    RequestTooLarge,
    /// The head is longer than weir reads.
    HeadersTooLarge,
    /// The request has been through this weir before.
    LoopDetected,
}

/// What the client may conclude about trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hint {
    /// The failure carries the time.
    Exact,
    /// weir has tried often enough: `x-should-retry: false`.
    DoNotRetry,
    /// The request itself is wrong.
    None,
}

/// A row of the table.
struct Row {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    /// The word in `x-weir-refused-by`, the metrics and the log, where weir refused what it could have served later.
    refused_by: Option<&'static str>,
    hint: Hint,
}

impl Cause {
    /// Every cause, in the order of the table.
    pub const ALL: [Self; 23] = [
        Self::Requests,
        Self::Tokens,
        Self::ClientConcurrency,
        Self::Concurrency,
        Self::QueueFull,
        Self::Unavailable,
        Self::Draining,
        Self::Unreachable,
        Self::Disconnected,
        Self::InvalidResponse,
        Self::ConnectTimeout,
        Self::FirstEventTimeout,
        Self::ResponseTimeout,
        Self::IdleTimeout,
        Self::DeadlineExceeded,
        Self::BadRequest,
        Self::DuplicateKey,
        Self::InvalidApiKey,
        Self::UnknownPath,
        Self::RequestTimeout,
        Self::RequestTooLarge,
        Self::HeadersTooLarge,
        Self::LoopDetected,
    ];

    /// THE table.
    fn row(self) -> Row {
        const INVALID: &str = "invalid_request_error";
        let (status, kind, code, refused_by, hint) = match self {
            Self::Requests => (429, "requests", "rate_limit_exceeded", Some("requests"), Hint::Exact),
            Self::Tokens => (429, "tokens", "rate_limit_exceeded", Some("tokens"), Hint::Exact),
            Self::ClientConcurrency => (429, "concurrency", "rate_limit_exceeded", Some("concurrency"), Hint::Exact),
            Self::Concurrency => (503, "overloaded", "concurrency_exhausted", Some("concurrency"), Hint::Exact),
            Self::QueueFull => (503, "overloaded", "queue_full", Some("queue"), Hint::Exact),
            Self::Unavailable => (503, "upstream_error", "upstream_unavailable", Some("breaker"), Hint::Exact),
            Self::Draining => (503, "overloaded", "draining", Some("drain"), Hint::Exact),
            Self::Unreachable => (502, "upstream_error", "upstream_unreachable", None, Hint::DoNotRetry),
            Self::Disconnected => (502, "upstream_error", "upstream_disconnected", None, Hint::DoNotRetry),
            Self::InvalidResponse => (502, "upstream_error", "upstream_invalid_response", None, Hint::DoNotRetry),
            Self::ConnectTimeout => (504, "timeout", "connect_timeout", None, Hint::DoNotRetry),
            Self::FirstEventTimeout => (504, "timeout", "first_event_timeout", None, Hint::DoNotRetry),
            Self::ResponseTimeout => (504, "timeout", "response_timeout", None, Hint::DoNotRetry),
            Self::IdleTimeout => (504, "timeout", "idle_timeout", None, Hint::DoNotRetry),
            Self::DeadlineExceeded => (504, "timeout", "deadline_exceeded", None, Hint::DoNotRetry),
            Self::BadRequest => (400, INVALID, "bad_request", None, Hint::None),
            Self::DuplicateKey => (400, INVALID, "duplicate_key", None, Hint::None),
            Self::InvalidApiKey => (401, INVALID, "invalid_api_key", None, Hint::None),
            Self::UnknownPath => (404, INVALID, "unknown_path", None, Hint::None),
            Self::RequestTimeout => (408, INVALID, "request_timeout", None, Hint::None),
            Self::RequestTooLarge => (413, INVALID, "request_too_large", None, Hint::None),
            Self::HeadersTooLarge => (431, INVALID, "headers_too_large", None, Hint::None),
            Self::LoopDetected => (508, INVALID, "loop_detected", None, Hint::None),
        };
        let status = StatusCode::from_u16(status).expect("the table's statuses are valid");
        Row { status, kind, code, refused_by, hint }
    }

    /// The status the client gets.
    pub fn status(self) -> StatusCode {
        self.row().status
    }

    /// `error.code`: the name of this cause for programs.
    pub fn code(self) -> &'static str {
        self.row().code
    }

    /// The word for who refused, where weir refused; `None` where something failed.
    pub fn refused_by(self) -> Option<&'static str> {
        self.row().refused_by
    }

    /// Whether the request was at fault, not weir or the gateway.
    pub fn is_clients_fault(self) -> bool {
        self.row().kind == "invalid_request_error"
    }
}

/// Above this the SDKs do not sleep but retry at once, or give up in their own way.
const LONGEST_SDK_SLEEP: Duration = Duration::from_secs(60);

/// One request's end without an answer of the gateway's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub cause: Cause,
    /// What happened and what the client can do, in a sentence.
    pub message: String,
    /// When a new try would be served in time.
    pub retry_after: Option<Duration>,
    /// Whose limit it was: `global`, `model:NAME`, or `client` for one of the client's own.
    pub scope: Option<String>,
}

impl Failure {
    /// A failure that no waiting mends.
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into(), retry_after: None, scope: None }
    }

    /// The answer that tells the client of it, in the shape of the API it called.
    pub fn response(&self, endpoint: Option<Endpoint>) -> Response<Bytes> {
        let row = self.cause.row();
        let mut response = Response::new(envelope::write(endpoint, row.status, row.kind, row.code, &self.message));
        *response.status_mut() = row.status;
        let fields = response.headers_mut();
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match row.hint {
            Hint::Exact => self.write_retry_after(fields),
            Hint::DoNotRetry => no_retry(fields),
            Hint::None => {}
        }
        if row.status == StatusCode::UNAUTHORIZED {
            // RFC 9110, 15.5.2.
            fields.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(word) = row.refused_by {
            let who = self.scope.as_ref().map_or(word.to_owned(), |scope| format!("{word}; {scope}"));
            if let Ok(value) = HeaderValue::from_str(&who) {
                fields.insert(&headers::WEIR_REFUSED_BY, value);
            }
        }
        response
    }

    /// The last event of a stream that ends like this, in the shape of the API that was called.
    pub fn event(&self, endpoint: Option<Endpoint>) -> Bytes {
        let row = self.cause.row();
        envelope::event(endpoint, row.status, row.kind, row.code, &self.message)
    }

    /// `retry-after` in whole seconds, rounded up, and `retry-after-ms`, rounded up too.
    fn write_retry_after(&self, fields: &mut http::HeaderMap) {
        let Some(wait) = self.retry_after else { return };
        let millis = wait.as_micros().div_ceil(1000);
        let seconds = millis.div_ceil(1000);
        fields.insert(header::RETRY_AFTER, HeaderValue::from(u64::try_from(seconds).unwrap_or(u64::MAX)));
        fields.insert(&headers::RETRY_AFTER_MS, HeaderValue::from(u64::try_from(millis).unwrap_or(u64::MAX)));
        if wait > LONGEST_SDK_SLEEP {
            no_retry(fields);
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Tells the SDKs that weir has retried for them already: without it their retries would multiply weir's.
pub fn no_retry(fields: &mut http::HeaderMap) {
    fields.insert(&headers::SHOULD_RETRY, HeaderValue::from_static("false"));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/errors.md has a row a cause: | `code` | status | `type` | hint | …
    #[test]
    fn the_documented_table_is_the_one_in_force() {
        let documented: Vec<Vec<&str>> = include_str!("../docs/errors.md")
            .lines()
            .filter(|line| line.starts_with("| `"))
            .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect())
            .collect();
        let in_force: Vec<Vec<&str>> = Cause::ALL.iter().map(|cause| row_as_documented(*cause)).collect();
        let shortened: Vec<Vec<&str>> = documented.iter().map(|row| row[..5].to_vec()).collect();
        assert_eq!(shortened, in_force);
    }

    fn row_as_documented(cause: Cause) -> Vec<&'static str> {
        let row = cause.row();
        let hint = match row.hint {
            Hint::Exact => "exact",
            Hint::DoNotRetry => "do not retry",
            Hint::None => "none",
        };
        vec![row.code, status_text(row.status), row.kind, row.refused_by.unwrap_or("–"), hint]
    }

    fn status_text(status: StatusCode) -> &'static str {
        Box::leak(status.as_u16().to_string().into_boxed_str())
    }

    #[test]
    fn a_wait_is_rounded_up_in_both_units() {
        let failure =
            Failure { retry_after: Some(Duration::from_micros(1_000_001)), ..Failure::new(Cause::Requests, "wait") };
        let response = failure.response(None);
        assert_eq!(
            (&response.headers()["retry-after"], &response.headers()["retry-after-ms"]),
            (&"2".parse::<HeaderValue>().expect("ok"), &"1001".parse::<HeaderValue>().expect("ok"))
        );
        assert!(!response.headers().contains_key("x-should-retry"));
    }

    #[test]
    fn a_wait_that_no_sdk_would_sleep_forbids_the_retry() {
        let failure = Failure { retry_after: Some(Duration::from_secs(61)), ..Failure::new(Cause::QueueFull, "wait") };
        assert_eq!(failure.response(None).headers()["x-should-retry"], "false");
    }

    #[test]
    fn who_is_not_known_is_told_how_to_show_a_key() {
        let response = Failure::new(Cause::InvalidApiKey, "who are you?").response(None);
        assert_eq!(
            (response.status().as_u16(), &response.headers()["www-authenticate"]),
            (401, &"Bearer".parse().expect("ok"))
        );
    }

    #[test]
    fn whose_limit_it_was_stands_in_a_header() {
        let failure = Failure { scope: Some("model:gpt-4.1-mini".into()), ..Failure::new(Cause::Requests, "wait") };
        assert_eq!(failure.response(None).headers()["x-weir-refused-by"], "requests; model:gpt-4.1-mini");
        let own = Failure { scope: Some("client".into()), ..Failure::new(Cause::ClientConcurrency, "wait") };
        assert_eq!(own.response(None).headers()["x-weir-refused-by"], "concurrency; client");
        let odd = Failure { scope: Some("model:a\nb".into()), ..Failure::new(Cause::Requests, "wait") };
        assert!(!odd.response(None).headers().contains_key("x-weir-refused-by"));
    }
}
