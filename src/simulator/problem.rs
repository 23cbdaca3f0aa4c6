//! Every way a request ends without what it asked for, in the error shape of OpenAI.

use std::time::{Duration, SystemTime};

use http::StatusCode;
use serde_json::{Value, json};

use super::fault::Fault;
use super::gate::{Refusal, Standing};
use super::hints::{Hint, go_duration};
use super::quota::Level;
use super::settings::Hints;

/// An answer that is an error.
#[derive(Debug, PartialEq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<&'static str>,
    message: String,
    pub(super) hints: Vec<Hint>,
}

impl Problem {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into(), hints: Vec::new() }
    }

    /// The request says something wrong at `param`.
    pub(super) fn invalid(param: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, INVALID, None, message) }
    }

    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("The request's body is larger than {limit} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("request_too_large"), message)
    }

    pub(super) fn unauthorized() -> Self {
        let message = "Incorrect API key provided; the simulator was started with one of its own.";
        Self::new(StatusCode::UNAUTHORIZED, INVALID, Some("invalid_api_key"), message)
    }

    pub(super) fn unknown_path(method: &http::Method, path: &str) -> Self {
        let message = format!("Invalid URL ({method} {path}): the API is under /v1.");
        Self::new(StatusCode::NOT_FOUND, INVALID, Some("unknown_url"), message)
    }

    pub(super) fn unknown_model(model: &str) -> Self {
        let message = format!("The model `{model}` does not exist or you do not have access to it.");
        Self { param: Some("model"), ..Self::new(StatusCode::NOT_FOUND, INVALID, Some("model_not_found"), message) }
    }

    pub(super) fn outage() -> Self {
        let message = "The gateway is out of order for a while.";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("service_unavailable"), message)
    }

    /// What the quota's refusal looks like, with as much of a hint as `hints` gives.
    pub(super) fn refused(refusal: Refusal, standing: Standing, model: &str, hints: Hints, wall: SystemTime) -> Self {
        let (kind, mut message, wait) = match refusal {
            Refusal::Requests { wait } => ("requests", reached(model, "requests", standing.requests), Some(wait)),
            Refusal::Tokens { wait } => ("tokens", reached(model, "tokens", standing.tokens), Some(wait)),
            Refusal::TooLarge => ("tokens", too_large(model, standing), None),
            Refusal::Concurrency => ("concurrency", format!("Too many requests to {model} at once."), None),
        };
        let hints = wait.map_or_else(Vec::new, |wait| Hint::of_refusal(hints, wait, wall));
        if let Some(wait) = wait.filter(|_| !hints.is_empty()) {
            message.push_str(&format!(" Please try again in {}.", go_duration(wait)));
        }
        Self { hints, ..Self::new(StatusCode::TOO_MANY_REQUESTS, kind, Some(LIMITED), message) }
    }

    /// What a fault looks like that is an error answer; `None` for the others.
    pub(super) fn injected(fault: Fault, wait: Duration, wall: SystemTime) -> Option<Self> {
        let too_many = |hint: Option<Hint>| Self {
            hints: hint.into_iter().collect(),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", Some(LIMITED), "Too many requests, out of the blue.")
        };
        Some(match fault {
            Fault::TooManyWithMillis => too_many(Some(Hint::millis(wait))),
            Fault::TooManyWithSeconds => too_many(Some(Hint::seconds(wait))),
            Fault::TooManyWithDate => too_many(Some(Hint::date(wall, wait))),
            Fault::TooManyWithoutHint => too_many(None),
            Fault::InsufficientQuota => Self::insufficient_quota(),
            Fault::ServerError => Self::server_error(),
            Fault::Unavailable => Self::overloaded(StatusCode::SERVICE_UNAVAILABLE),
            Fault::Overloaded => Self::overloaded(status(529)),
            _ => return None,
        })
    }

    /// The error that comes as a stream's first event.
    pub(super) fn in_a_stream() -> Self {
        Self::server_error()
    }

    fn insufficient_quota() -> Self {
        let message = "You exceeded your current quota, please check your plan and billing details.";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", Some("insufficient_quota"), message)
    }

    fn server_error() -> Self {
        let message = "The server had an error while processing your request. Sorry about that!";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, None, message)
    }

    fn overloaded(status: StatusCode) -> Self {
        Self::new(status, SERVER, Some("overloaded"), "The engine is currently overloaded, please try again later.")
    }

    pub(super) fn to_json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const LIMITED: &str = "rate_limit_exceeded";

fn reached(model: &str, unit: &str, level: Option<Level>) -> String {
    let limit = level.map_or(0, |level| level.limit);
    format!("Rate limit reached for {model} on {unit}: limit {limit}.")
}

fn too_large(model: &str, standing: Standing) -> String {
    let limit = standing.tokens.map_or(0, |level| level.limit);
    format!("Request too large for {model} on tokens: limit {limit}; it must be smaller to ever pass.")
}

fn status(code: u16) -> StatusCode {
    StatusCode::from_u16(code).expect("a number of three digits")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_millis(1500);

    fn names(problem: &Problem) -> Vec<&'static str> {
        problem.hints.iter().map(|hint| hint.name).collect()
    }

    #[test]
    fn a_refusal_says_when_to_come_back_as_far_as_the_gateway_gives_hints() {
        let refused = |hints| {
            let refusal = Refusal::Requests { wait: WAIT };
            Problem::refused(refusal, Standing::default(), "m", hints, SystemTime::UNIX_EPOCH)
        };
        assert_eq!(names(&refused(Hints::OpenAiHeaders)), ["retry-after", "retry-after-ms"]);
        assert_eq!(names(&refused(Hints::RetryAfterOnly)), ["retry-after"]);
        assert!(refused(Hints::RetryAfterOnly).message.ends_with("Please try again in 1.5s."));
        assert_eq!(names(&refused(Hints::None)), [""; 0]);
        assert!(!refused(Hints::None).message.contains("try again"));
    }

    #[test]
    fn a_request_that_can_never_pass_is_not_told_to_come_back() {
        let hints = Hints::OpenAiHeaders;
        let problem = Problem::refused(Refusal::TooLarge, Standing::default(), "m", hints, SystemTime::UNIX_EPOCH);
        assert!(problem.hints.is_empty());
        assert!(problem.message.starts_with("Request too large"));
    }

    #[test]
    fn every_fault_with_a_number_for_a_name_has_that_status() {
        for fault in Fault::ALL {
            let Ok(code) = fault.name().get(..3).unwrap_or_default().parse::<u16>() else { continue };
            let problem = Problem::injected(fault, WAIT, SystemTime::UNIX_EPOCH).expect("an error answer");
            assert_eq!(problem.status.as_u16(), code, "{fault}");
        }
    }
}
