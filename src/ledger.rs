//! The account of one request: what it came to, written into the metrics exactly once, also when it is dropped half-way.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::clients::ClientId;
use crate::metrics::{AttemptResult, Metrics, ModelMetrics, Outcome, PairMetrics, Phase, RefusedBy, TokenKind};
use crate::models::ModelId;
use crate::openai::usage::Usage;

/// Opened when a request's head has come; closed by [`Ledger::close`], or by being dropped, which means that the client
/// went away.
pub struct Ledger {
    metrics: Arc<Metrics>,
    /// Whose request it is, and for which model.
    of: (ModelId, ClientId),
    model: Arc<ModelMetrics>,
    pair: Arc<PairMetrics>,
    arrived: Instant,
    phase: Phase,
    /// Time spent in the queue, all attempts together.
    queued: Duration,
    /// Time the gateway took, without the attempt under way.
    upstream: Duration,
    /// Time spent between attempts, and on the client's body.
    elsewhere: Duration,
    attempt: Option<Attempt>,
    attempts: u32,
    open: bool,
}

/// An attempt under way.
struct Attempt {
    began: Instant,
    first_output: Option<Instant>,
}

impl Ledger {
    /// Opens the account of a request that has just arrived; neither its model nor its client is known yet.
    pub fn open(metrics: Arc<Metrics>, arrived: Instant) -> Self {
        let of = (ModelId::NONE, ClientId::NONE);
        Self {
            of,
            model: metrics.model(of.0),
            pair: metrics.pair(of.0, of.1),
            metrics,
            arrived,
            phase: Phase::Queue,
            queued: Duration::ZERO,
            upstream: Duration::ZERO,
            elsewhere: Duration::ZERO,
            attempt: None,
            attempts: 0,
            open: true,
        }
    }

    /// The model is known.
    pub fn set_model(&mut self, model: ModelId) {
        self.of.0 = model;
        self.model = self.metrics.model(model);
        self.pair = self.metrics.pair(model, self.of.1);
    }

    /// The client is known by name.
    pub fn set_client(&mut self, client: ClientId) {
        if client != self.of.1 {
            self.of.1 = client;
            self.pair = self.metrics.pair(self.of.0, client);
        }
    }

    /// When the request arrived.
    pub fn arrived(&self) -> Instant {
        self.arrived
    }

    /// Time spent in the queue so far.
    pub fn queued(&self) -> Duration {
        self.queued
    }

    /// Attempts begun so far.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// An attempt waited so long for its permit, or for its refusal.
    pub fn waited(&mut self, waited: Duration) {
        self.queued += waited;
        self.model.queue_wait(waited);
    }

    /// Time that was neither weir's nor the queue's: reading the client's body, sleeping before a retry.
    pub fn spent_elsewhere(&mut self, spent: Duration) {
        self.elsewhere += spent;
    }

    /// Time that the gateway took so far, all attempts together.
    pub fn upstream_time(&self, now: Instant) -> Duration {
        self.upstream + self.attempt_elapsed(now)
    }

    /// An attempt is being sent.
    pub fn attempt_begins(&mut self) {
        self.attempts += 1;
        self.phase = Phase::Upstream;
        self.attempt = Some(Attempt { began: Instant::now(), first_output: None });
    }

    /// The attempt under way, if there is one, has ended.
    pub fn attempt_ends(&mut self, result: AttemptResult) {
        let Some(attempt) = self.attempt.take() else { return };
        let took = attempt.began.elapsed();
        self.model.attempt(result, took);
        self.upstream += took;
        // Until the next attempt is sent, or the answer begins, it waits again.
        if self.phase == Phase::Upstream && result != AttemptResult::Cancelled {
            self.phase = Phase::Queue;
        }
    }

    /// The attempt that ended like this is made again.
    pub fn retries(&self, reason: AttemptResult) {
        self.model.retry(reason);
    }

    /// How long the attempt under way has taken so far.
    pub fn attempt_elapsed(&self, now: Instant) -> Duration {
        self.attempt.as_ref().map_or(Duration::ZERO, |attempt| now.saturating_duration_since(attempt.began))
    }

    /// The answer begins to go to the client: from here on nothing is retried.
    pub fn answer_begins(&mut self, now: Instant) {
        self.phase = Phase::Stream;
        let others = self.queued + self.elsewhere + self.upstream_time(now);
        self.metrics.overhead((now - self.arrived).saturating_sub(others));
    }

    /// A stream's first output has come.
    pub fn first_output(&mut self) {
        let Some(attempt) = &mut self.attempt else { return };
        let now = Instant::now();
        attempt.first_output = Some(now);
        self.model.first_token(now - attempt.began);
    }

    /// The gateway says what the answer cost.
    pub fn used(&mut self, usage: Usage) {
        let counts = [
            (TokenKind::Prompt, usage.prompt),
            (TokenKind::Completion, usage.completion),
            (TokenKind::Cached, usage.cached),
            (TokenKind::Reasoning, usage.reasoning),
        ];
        for (kind, count) in counts {
            self.pair.tokens(kind, count);
        }
        let first_output = self.attempt.as_ref().and_then(|attempt| attempt.first_output);
        if let (Some(first), 2..) = (first_output, usage.completion) {
            let after_the_first = u32::try_from(usage.completion - 1).unwrap_or(u32::MAX);
            self.model.per_output_token(first.elapsed() / after_the_first);
        }
    }

    /// weir refused the request.
    pub fn refused(&self, by: RefusedBy) {
        self.pair.refused(by);
    }

    /// A limit that only observes would have refused the request.
    pub fn observed(&self, by: RefusedBy) {
        self.pair.observed(by);
    }

    /// The request has ended. Only the first call counts.
    pub fn close(&mut self, outcome: Outcome) {
        if !std::mem::replace(&mut self.open, false) {
            return;
        }
        self.pair.request(outcome);
        if self.attempts > 0 && matches!(outcome, Outcome::Ok | Outcome::ClientError | Outcome::UpstreamError) {
            self.model.request_duration(self.arrived.elapsed());
        }
        if outcome == Outcome::Disconnected {
            self.metrics.disconnect(self.phase);
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.attempt_ends(AttemptResult::Cancelled);
        self.close(Outcome::Disconnected);
    }
}
