//! The account of one request: what it came to, written into the [`Books`] exactly once, also when it is dropped half-way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use http::{HeaderValue, StatusCode, request};
use tokio::time::Instant;

use crate::access_log::{AccessLog, Entry, Line};
use crate::clients::ClientId;
use crate::error::{Cause, Failure};
use crate::metrics::{AttemptResult, Metrics, ModelMetrics, Outcome, PairMetrics, Phase, RefusedBy, TokenKind};
use crate::models::ModelId;
use crate::openai::headers;
use crate::openai::usage::Usage;
use crate::recent::{MAX_ID, RecentError, RecentErrors};

/// Where it is written what became of requests.
pub struct Books {
    pub metrics: Arc<Metrics>,
    pub recent_errors: RecentErrors,
    pub access_log: Arc<AccessLog>,
    /// weir ends, and cuts what is still under way: what can still tell its client so does, when it is polled next.
    pub cut_by_weir: AtomicBool,
}

impl Books {
    /// Books with an access log that is off. `upstream` is the gateway's authority.
    pub fn new(metrics: Metrics, upstream: &str) -> Self {
        let metrics = Arc::new(metrics);
        let access_log = Arc::new(AccessLog::off(upstream, metrics.clone()));
        Self { metrics, recent_errors: RecentErrors::default(), access_log, cut_by_weir: AtomicBool::new(false) }
    }
}

/// Opened when a request's head has come; closed by [`Ledger::close`], or by being dropped, which means that the client
/// went away, or that weir ends ([`Books::cut_by_weir`]).
pub struct Ledger {
    books: Arc<Books>,
    /// Whose request it is, and for which model.
    of: (ModelId, ClientId),
    model: Arc<ModelMetrics>,
    pair: Arc<PairMetrics>,
    arrived: Instant,
    phase: Phase,
    /// Time spent in the queue, all attempts together, and since when it waits there now.
    queued: Duration,
    waiting_since: Option<Instant>,
    /// Time the gateway took, without the attempt under way.
    upstream: Duration,
    /// Time spent between attempts, and on the client's body.
    elsewhere: Duration,
    attempt: Option<Attempt>,
    attempts: u32,
    /// From sending the attempt that answered to its first output.
    first_token: Option<Duration>,
    usage: Option<Usage>,
    /// Bytes of the request's body that were read; of one that streams through, those before it does.
    bytes_in: u64,
    /// The bytes of a body that streams through.
    upload: Option<Arc<AtomicU64>>,
    /// Bytes of the answer's body that were handed on.
    bytes_out: u64,
    /// The line of the access log, while that is on.
    line: Option<Line>,
    /// What the client sees in `x-request-id`; before its answer begins, what it sent there, or nothing.
    request_id: Box<[u8]>,
    /// What the client's answer begins with; `None` before that.
    status: Option<StatusCode>,
    open: bool,
}

/// An attempt under way.
struct Attempt {
    began: Instant,
    first_output: Option<Instant>,
}

impl Ledger {
    /// Opens the account of a request that has just arrived; neither its model nor its client is known yet.
    pub fn open(books: Arc<Books>, arrived: Instant) -> Self {
        let of = (ModelId::NONE, ClientId::NONE);
        Self {
            of,
            model: books.metrics.model(of.0),
            pair: books.metrics.pair(of.0, of.1),
            books,
            arrived,
            phase: Phase::Queue,
            queued: Duration::ZERO,
            waiting_since: None,
            upstream: Duration::ZERO,
            elsewhere: Duration::ZERO,
            attempt: None,
            attempts: 0,
            first_token: None,
            usage: None,
            bytes_in: 0,
            upload: None,
            bytes_out: 0,
            line: None,
            request_id: Box::default(),
            status: None,
            open: true,
        }
    }

    /// The request begins with this head.
    pub fn begins(&mut self, head: &request::Parts) {
        self.line = self.books.access_log.begin(head);
        if let (Some(_), Some(id)) = (&self.line, head.headers.get(&headers::REQUEST_ID)) {
            // Until the answer has one: the client may leave before.
            self.set_request_id(id);
        }
    }

    /// The body asks for a stream, or not, of a model that the client calls by this name.
    pub fn asks(&mut self, stream: bool, model: Option<&str>) {
        if let Some(line) = &mut self.line {
            line.asks(stream, model.filter(|_| self.of.0 == ModelId::OTHER));
        }
    }

    /// So many bytes of the request's body have been read.
    pub fn received(&mut self, bytes: usize) {
        self.bytes_in += bytes as u64;
    }

    /// The rest of the request's body streams through, and is counted there.
    pub fn streams_in(&mut self, counter: Arc<AtomicU64>) {
        self.upload = Some(counter);
    }

    /// So many bytes of the answer's body have been handed on.
    pub fn gave(&mut self, bytes: usize) {
        self.bytes_out += bytes as u64;
    }

    /// The model is known.
    pub fn set_model(&mut self, model: ModelId) {
        self.of.0 = model;
        self.model = self.books.metrics.model(model);
        self.pair = self.books.metrics.pair(model, self.of.1);
    }

    /// The client is known by name.
    pub fn set_client(&mut self, client: ClientId) {
        if client != self.of.1 {
            self.of.1 = client;
            self.pair = self.books.metrics.pair(self.of.0, client);
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

    /// An attempt waits for its permit from now on.
    pub fn waits(&mut self) {
        self.waiting_since = Some(Instant::now());
    }

    /// It has its permit, or its refusal.
    pub fn waited(&mut self) {
        let Some(since) = self.waiting_since.take() else { return };
        let waited = since.elapsed();
        self.queued += waited;
        self.model.queue_wait(waited);
    }

    /// Time that was neither weir's nor the queue's: reading the client's body, sleeping before a retry,
    /// waiting for the budget.
    pub fn spent_elsewhere(&mut self, spent: Duration) {
        self.elsewhere += spent;
    }

    /// Time that the gateway took so far, all attempts together.
    pub fn upstream_time(&self, now: Instant) -> Duration {
        self.upstream + self.attempt_elapsed(now)
    }

    /// An attempt is being sent, from the time on that is returned.
    pub fn attempt_begins(&mut self) -> Instant {
        let began = Instant::now();
        self.attempts += 1;
        self.phase = Phase::Upstream;
        self.attempt = Some(Attempt { began, first_output: None });
        began
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
        self.books.metrics.overhead((now - self.arrived).saturating_sub(others));
    }

    /// A stream's first output has come.
    pub fn first_output(&mut self) {
        let Some(attempt) = &mut self.attempt else { return };
        let now = Instant::now();
        attempt.first_output = Some(now);
        self.first_token = Some(now - attempt.began);
        self.model.first_token(now - attempt.began);
    }

    /// Whether weir ends, and the request with it.
    pub fn is_cut(&self) -> bool {
        self.books.cut_by_weir.load(Ordering::Relaxed)
    }

    /// The gateway says what the answer cost.
    pub fn used(&mut self, usage: Usage) {
        self.usage = Some(usage);
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

    /// What the client's answer says: its `x-request-id` and its status.
    pub fn answers(&mut self, request_id: &HeaderValue, status: StatusCode) {
        self.set_request_id(request_id);
        self.status = Some(status);
    }

    /// A copy: what shares the buffer that a head was read into would keep it for as long as a stream runs.
    fn set_request_id(&mut self, id: &HeaderValue) {
        let id = id.as_bytes();
        self.request_id = id[..id.len().min(MAX_ID)].into();
    }

    /// The request has ended, without a failure that weir has a word for. Only the first call counts.
    pub fn close(&mut self, outcome: Outcome) {
        self.end(outcome, None);
    }

    /// The request has ended in this failure: weir's answer, or how the gateway's broke off. Only the first call counts.
    pub fn close_with(&mut self, outcome: Outcome, failure: Failure) {
        self.end(outcome, Some(failure));
    }

    fn end(&mut self, outcome: Outcome, failure: Option<Failure>) {
        if !std::mem::replace(&mut self.open, false) {
            return;
        }
        self.pair.request(outcome);
        if self.attempts > 0 && matches!(outcome, Outcome::Ok | Outcome::ClientError | Outcome::UpstreamError) {
            self.model.request_duration(self.arrived.elapsed());
        }
        if outcome == Outcome::Disconnected {
            self.books.metrics.disconnect(self.phase);
        }
        let line = self.line.take();
        let is_error = matches!(outcome, Outcome::Refused | Outcome::Failed | Outcome::UpstreamError);
        if line.is_none() && !is_error {
            return;
        }
        let (client, model) = self.books.metrics.names(self.of.1, self.of.0);
        if let Some(line) = line {
            self.books.access_log.record(line, &self.entry((&client, &model), outcome, failure.as_ref()));
        }
        if is_error {
            self.note_error((client, model), outcome, failure);
        }
    }

    fn entry<'e>(
        &'e self,
        (client, model): (&'e str, &'e str),
        outcome: Outcome,
        failure: Option<&'e Failure>,
    ) -> Entry<'e> {
        let uploaded = self.upload.as_ref().map_or(0, |counter| counter.load(Ordering::Relaxed));
        let waits = self.waiting_since.map_or(Duration::ZERO, |since| since.elapsed());
        Entry {
            request_id: &self.request_id,
            client,
            model,
            status: self.status,
            outcome,
            refused_by: failure.and_then(|failure| RefusedBy::of(failure.cause)),
            scope: failure.and_then(|failure| failure.scope.as_deref()),
            code: failure.map(|failure| failure.cause.code()),
            attempts: self.attempts,
            queued: self.queued + waits,
            upstream: self.upstream,
            first_token: self.first_token,
            total: self.arrived.elapsed(),
            usage: self.usage,
            bytes_in: self.bytes_in + uploaded,
            bytes_out: self.bytes_out,
        }
    }

    fn note_error(&self, (client, model): (Arc<str>, Arc<str>), outcome: Outcome, failure: Option<Failure>) {
        let status = self.status.unwrap_or_default();
        let cause = failure.as_ref().map(|failure| failure.cause);
        let request_id = String::from_utf8_lossy(&self.request_id).into_owned();
        if let Some(failure) = &failure {
            self.log(&request_id, (&client, &model), outcome, failure);
        }
        let (message, scope) = match failure {
            Some(failure) => (failure.message, failure.scope),
            None if status.is_success() => {
                ("the gateway's stream ended in an error, or with nothing said".to_owned(), None)
            }
            None => (format!("the gateway answered {}", status.as_u16()), None),
        };
        self.books.recent_errors.push(RecentError {
            at: SystemTime::now(),
            request_id,
            client,
            model,
            status: status.as_u16(),
            outcome,
            refused_by: cause.and_then(RefusedBy::of),
            scope,
            code: cause.map(Cause::code),
            message,
            attempts: self.attempts,
        });
    }

    /// A line in weir's own log, with what finds the request's in the access log.
    fn log(&self, request_id: &str, (client, model): (&str, &str), outcome: Outcome, failure: &Failure) {
        let (code, attempts) = (failure.cause.code(), self.attempts);
        match (RefusedBy::of(failure.cause), outcome) {
            (Some(by), _) => {
                let refused_by = by.label();
                tracing::debug!(request_id, client, model, refused_by, code, attempts, error = %failure, "refused");
            }
            (None, Outcome::Failed) => {
                tracing::warn!(request_id, client, model, code, attempts, error = %failure, "failed");
            }
            (None, _) => {
                tracing::warn!(request_id, client, model, code, attempts, error = %failure, "an answer broke off");
            }
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.attempt_ends(AttemptResult::Cancelled);
        if self.open && self.is_cut() {
            let cut = Failure::new(Cause::Draining, "weir has ended, and the request was still under way");
            return self.close_with(Outcome::Failed, cut);
        }
        self.close(Outcome::Disconnected);
    }
}
