//! What to answer: the way from a path and a body to an answer that only waits to be let out.

use std::time::Duration;

use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Method, Response, StatusCode, request};
use serde_json::{Value, json};

use super::answer::{Answer, Part};
use super::api::{self, embeddings::Embeddings, models};
use super::call::{Api, Call};
use super::fate::Fate;
use super::fault::Fault;
use super::gate::Slot;
use super::problem::Problem;
use super::script::{Event, Script};

pub(super) enum Plan {
    /// Text, as a document or a stream.
    Text(Answer),
    /// Vectors.
    Embeddings(Embeddings),
    /// The models, or one of them.
    Models(Value),
    /// What came in, for all that this gateway does not know.
    Echo(Value),
}

impl Plan {
    pub(super) fn make(head: &request::Parts, body: &[u8], fate: &Fate, created: u64) -> Result<Self, Problem> {
        let path = head.uri.path();
        let text = |api| Call::parse(api, body).map(|call| Self::Text(Answer::plan(call, fate, created)));
        match (&head.method, path.strip_prefix("/v1/").unwrap_or_default()) {
            (&Method::POST, "chat/completions") => text(Api::Chat),
            (&Method::POST, "completions") => text(Api::Completions),
            (&Method::POST, "responses") => text(Api::Responses),
            (&Method::POST, "messages") => text(Api::Messages),
            (&Method::POST, "embeddings") => Embeddings::parse(body).map(Self::Embeddings),
            (&Method::GET, "models") => Ok(Self::Models(models::list())),
            (&Method::GET, rest) if rest.starts_with("models/") => {
                let name = rest.trim_start_matches("models/");
                models::find(name).map(Self::Models).ok_or_else(|| Problem::unknown_model(name))
            }
            (method, _) => Ok(Self::Echo(json!({
                "object": "echo", "method": method.as_str(), "path": path, "query": head.uri.query(),
                "body_bytes": body.len(),
            }))),
        }
    }

    /// The model whose quota it counts against; none for calls that name none.
    pub(super) fn model(&self) -> &str {
        match self {
            Self::Text(answer) => &answer.call.model,
            Self::Embeddings(embeddings) => &embeddings.model,
            Self::Models(_) | Self::Echo(_) => "",
        }
    }

    /// The tokens to charge.
    pub(super) fn charge(&self) -> u64 {
        match self {
            Self::Text(answer) => answer.charge(),
            Self::Embeddings(embeddings) => embeddings.tokens,
            Self::Models(_) | Self::Echo(_) => 0,
        }
    }

    pub(super) fn is_stream(&self) -> bool {
        matches!(self, Self::Text(answer) if answer.call.stream)
    }

    /// How long until the answer's head: a document's comes when all of its tokens are made.
    pub(super) fn thinking_time(&self, first_token: Duration, per_token: Duration) -> Duration {
        match self {
            Self::Models(_) => Duration::ZERO,
            Self::Text(answer) if !answer.call.stream => first_token + per_token.saturating_mul(answer.spoken - 1),
            Self::Text(_) | Self::Embeddings(_) | Self::Echo(_) => first_token,
        }
    }

    /// The answer, which breaks where the fault wants it.
    pub(super) fn respond(
        self,
        fault: Option<Fault>,
        fate: &Fate,
        per_token: Duration,
        slot: Slot,
    ) -> Response<Script> {
        let json = match self {
            Self::Text(answer) if answer.call.stream => return stream(answer, fault, fate, per_token, slot),
            Self::Text(answer) => api::json(&answer),
            Self::Embeddings(embeddings) => embeddings.to_json(),
            Self::Models(json) | Self::Echo(json) => json,
        };
        document(StatusCode::OK, &json, fault, Some(slot))
    }
}

/// An answer that is one JSON document.
pub(super) fn document(status: StatusCode, json: &Value, fault: Option<Fault>, slot: Option<Slot>) -> Response<Script> {
    let mut response = Response::new(Script::document(json.to_string(), fault, slot));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn stream(answer: Answer, fault: Option<Fault>, fate: &Fate, per_token: Duration, slot: Slot) -> Response<Script> {
    // Never before the first event, and always before the last token.
    let tokens = (answer.spoken * answer.call.choices) as usize;
    let breaking_point = answer.call.choices as usize + (fate.breaking_point * tokens as f64) as usize;
    let script = if fault == Some(Fault::ErrorEvent) {
        let error = Event { bytes: api::error_event(answer.call.api).into(), is_token: false };
        Script::stream(std::iter::once(error), None, 1, per_token, slot)
    } else {
        Script::stream(events(answer), fault, breaking_point, per_token, slot)
    };
    let mut response = Response::new(script);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn events(answer: Answer) -> impl Iterator<Item = Event> + Send + 'static {
    let parts = answer.parts();
    let event = move |part| Event {
        bytes: api::events(&answer, part).into(),
        // The choices are spoken at the same time.
        is_token: matches!(part, Part::Token { choice: 0, .. }),
    };
    parts.map(event).filter(|event| !event.bytes.is_empty())
}
