//! Errors: the gateway's, read, and weir's own, written.

use http::StatusCode;
use serde_json::Value;
use weir::openai::call::Endpoint;
use weir::openai::envelope;
use weir::openai::sse::Scanner;

use super::events::slow_events;

/// Whatever the gateway's errors say, weir's own are right: JSON with an `error` that has the message, and one whole event.
pub fn check(bytes: &[u8]) {
    is_judged(bytes);
    let message = String::from_utf8_lossy(bytes);
    let endpoints = [Endpoint::ChatCompletions, Endpoint::Completions, Endpoint::Responses, Endpoint::Messages];
    for endpoint in endpoints.into_iter().map(Some).chain([None]) {
        let body = envelope::write(endpoint, StatusCode::BAD_GATEWAY, &message, &message, &message);
        let body: Value = serde_json::from_slice(&body).expect("an error is JSON");
        assert_eq!(body["error"]["message"], *message);

        let stream = envelope::event(endpoint, StatusCode::BAD_GATEWAY, "kind", "code", &message);
        let (mut scanner, mut events) = (Scanner::default(), 0);
        scanner.feed(&stream, |event| {
            events += 1;
            assert!(envelope::is_error_event(event.name, event.data));
            let data: Value = serde_json::from_slice(event.data).expect("an error event is JSON");
            let error = if endpoint == Some(Endpoint::Responses) { &data } else { &data["error"] };
            assert_eq!(error["message"], *message);
        });
        assert!(events == 1 && scanner.at_boundary() && slow_events(&stream).1.is_empty());
    }
}

/// What a body says of itself does not depend on how it is written.
fn is_judged(body: &[u8]) {
    let is_hopeless = envelope::is_hopeless(body);
    let is_error = envelope::is_error_event(None, body);
    match serde_json::from_slice::<Value>(body) {
        Ok(value) => {
            let anew = value.to_string();
            assert_eq!(envelope::is_hopeless(anew.as_bytes()), is_hopeless);
            // Written anew, it has no space before it and no escapes in its keys.
            assert!(!is_error || envelope::is_error_event(None, anew.as_bytes()));
        }
        Err(_) => assert!(!is_hopeless && !is_error, "what can't be read says nothing"),
    }
}
