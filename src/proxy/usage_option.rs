//! Whether weir may ask for a stream's usage in a client's place: not every gateway knows `stream_options`, and one that does
//! not answers 400 to a request that its client had every right to make.
//!
//! Until a model has served a stream with the option, a 400 may be the option's fault, and the request is sent once more as
//! its client wrote it. If that is served, weir does not ask this model again for a while.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;

use crate::models::ModelId;

/// How long a model that refuses the option is not asked.
const PAUSE: Duration = Duration::from_secs(600);

/// What is known of the models, by [`ModelId::index`].
#[derive(Debug, Default)]
pub(super) struct UsageOption {
    /// Locked for a look or an update.
    known: Mutex<Vec<Known>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Known {
    #[default]
    Nothing,
    Served,
    RefusedUntil(Instant),
}

impl UsageOption {
    /// Whether weir may ask.
    pub(super) fn may_be_asked(&self, model: ModelId, now: Instant) -> bool {
        !matches!(self.of(model), Known::RefusedUntil(until) if now < until)
    }

    /// Whether an answer may be owed to the option; `body` is the error's, as far as it was read.
    pub(super) fn may_be_to_blame(&self, model: ModelId, status: StatusCode, body: &[u8]) -> bool {
        let names_it =
            || memchr::memmem::find(body, b"stream_options").or(memchr::memmem::find(body, b"include_usage"));
        could_be_about_it(status) && (self.of(model) != Known::Served || names_it().is_some())
    }

    /// The model has served a stream that was asked for its usage. Of those that have no name to weir, one proves nothing
    /// about another.
    pub(super) fn served(&self, model: ModelId) {
        if model != ModelId::OTHER {
            self.set(model, Known::Served);
        }
    }

    /// The model has served without the option what it refused with it.
    pub(super) fn refused(&self, model: ModelId, now: Instant) {
        tracing::info!("the gateway refuses stream_options.include_usage; weir does without it for ten minutes");
        self.set(model, Known::RefusedUntil(now + PAUSE));
    }

    fn of(&self, model: ModelId) -> Known {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(model.index()).copied().unwrap_or_default()
    }

    fn set(&self, model: ModelId, state: Known) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() <= model.index() {
            known.resize(model.index() + 1, Known::Nothing);
        }
        known[model.index()] = state;
    }
}

/// The statuses of a request that is not understood: by OpenAI's word, and by those who check it against a schema.
pub(super) fn could_be_about_it(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY)
}
