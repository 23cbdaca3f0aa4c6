//! The JSON of errors: how weir writes its own, and what it reads of the gateway's.

use std::sync::LazyLock;

use bytes::Bytes;
use http::StatusCode;
use memchr::memmem;
use serde_json::{Value, json};

use super::call::Endpoint;

/// Made once: a searcher costs more to make than to use on an event.
static ERROR_KEY: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"error\""));

/// Writes an error's body in the shape of the endpoint's API. `error` is always an object that has `message`.
pub fn write(endpoint: Option<Endpoint>, status: StatusCode, kind: &str, code: &str, message: &str) -> Bytes {
    let body = match endpoint {
        Some(Endpoint::Messages) => {
            json!({ "type": "error", "error": { "type": anthropic_type(status), "message": message, "code": code } })
        }
        _ => json!({ "error": { "message": message, "type": kind, "param": null, "code": code } }),
    };
    Bytes::from(body.to_string())
}

/// The last event of a stream that broke off, in the shape of the endpoint's API.
pub fn event(endpoint: Option<Endpoint>, status: StatusCode, kind: &str, code: &str, message: &str) -> Bytes {
    let (name, data) = match endpoint {
        Some(Endpoint::Messages) => (
            "event: error\n",
            json!({ "type": "error", "error": { "type": anthropic_type(status), "message": message, "code": code } }),
        ),
        Some(Endpoint::Responses) => {
            ("event: error\n", json!({ "type": "error", "code": code, "message": message, "param": null }))
        }
        _ => ("", json!({ "error": { "message": message, "type": kind, "param": null, "code": code } })),
    };
    Bytes::from(format!("{name}data: {data}\n\n"))
}

/// Anthropic names its errors after the status (Messages API reference, "Errors").
fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    }
}

/// Whether an error's body says that the same request would be refused again, whatever the status.
pub fn is_hopeless(body: &[u8]) -> bool {
    is_about_billing(body) || is_too_large_for_the_quota(body)
}

/// Whether money, not pace, is what lacks: waiting would not help.
fn is_about_billing(body: &[u8]) -> bool {
    error_words(body).iter().any(|word| {
        word == "insufficient_quota"
            || word.starts_with("billing_")
            || word.starts_with("credit_")
            || word.ends_with("_spend_limit_reached")
            || word.contains("_spend_limit_")
    })
}

/// Whether this one request is larger than the whole quota (OpenAI's words): it would be refused for ever.
fn is_too_large_for_the_quota(body: &[u8]) -> bool {
    error_member(body, "message").is_some_and(|message| message.starts_with("Request too large"))
}

/// Whether an event of a stream reports an error instead of output.
pub fn is_error_event(name: Option<&[u8]>, data: &[u8]) -> bool {
    if matches!(name, Some(b"error" | b"response.failed")) {
        return true;
    }
    if !data.starts_with(b"{") || ERROR_KEY.find(data).is_none() {
        return false;
    }
    match serde_json::from_slice::<Value>(data) {
        Ok(value) => {
            // The error of a failed response stands within it.
            value.get("type").is_some_and(|kind| kind == "error" || kind == "response.failed")
                || value.get("error").is_some_and(|error| !error.is_null())
        }
        Err(_) => false,
    }
}

/// The type and the code of an error, where it has them.
fn error_words(body: &[u8]) -> Vec<String> {
    ["type", "code"].into_iter().filter_map(|name| error_member(body, name)).collect()
}

/// A text of the error that this body or event is about. It stands in `error`, in a failed `response`, or bare, as in the
/// error events of Responses.
fn error_member(body: &[u8], name: &str) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let inner =
        ["/error", "/response/error"].into_iter().find_map(|path| value.pointer(path).filter(|it| it.is_object()));
    inner.unwrap_or(&value).get(name)?.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_has_an_error_object_with_a_message() {
        for endpoint in [None, Some(Endpoint::ChatCompletions), Some(Endpoint::Responses), Some(Endpoint::Messages)] {
            let body =
                write(endpoint, StatusCode::TOO_MANY_REQUESTS, "requests", "rate_limit_exceeded", "slow \"down\"");
            let value: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(value["error"]["message"], "slow \"down\"");
        }
    }

    #[test]
    fn a_lack_of_money_is_told_from_a_lack_of_pace() {
        assert!(is_about_billing(
            br#"{"error":{"message":"x","type":"insufficient_quota","code":"insufficient_quota"}}"#
        ));
        assert!(is_about_billing(br#"{"error":{"code":"billing_hard_limit_reached"}}"#));
        assert!(is_about_billing(br#"{"error":{"code":"project_spend_limit_exceeded"}}"#));
        assert!(is_about_billing(br#"{"type":"error","code":"insufficient_quota","message":"x"}"#));
        assert!(is_about_billing(br#"{"type":"response.failed","response":{"error":{"code":"insufficient_quota"}}}"#));
        assert!(!is_about_billing(br#"{"error":{"message":"insufficient_quota","code":"rate_limit_exceeded"}}"#));
        assert!(!is_about_billing(b"<html>"));
    }

    #[test]
    fn an_error_event_is_told_from_output() {
        assert!(is_error_event(None, br#"{"error":{"message":"overloaded"}}"#));
        assert!(is_error_event(Some(b"error"), b"whatever"));
        assert!(is_error_event(None, br#"{"type":"error","error":{"type":"overloaded_error"}}"#));
        assert!(!is_error_event(None, br#"{"choices":[{"delta":{"content":"\"error\""}}],"error":null}"#));
        let response =
            |status| format!(r#"{{"type":"response.{status}","response":{{"error":{{"code":"server_error"}}}}}}"#);
        assert!(is_error_event(None, response("failed").as_bytes()));
        assert!(is_error_event(Some(b"response.failed"), b"the end of a long event"));
        assert!(!is_error_event(Some(b"response.incomplete"), response("incomplete").as_bytes()));
        assert!(!is_error_event(None, b"[DONE]"));
    }
}
