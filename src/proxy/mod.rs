//! The story of one request, from its head to the moment its answer begins.
//!
//! `Proxy::story` tells it top to bottom: read the call, then wait for a permit, make an attempt, judge it, and again if
//! that helps. The answer's way back is [`relay`]'s. There is no `tokio::spawn` on the way: when the client goes away, hyper
//! drops the future, and with it the place in the queue, the permit and the connection to the gateway.

mod body;
mod fields;
mod route;

use std::hash::{BuildHasher as _, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::HeaderMap;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, request, response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::admission::{Applicant, ByteBudget, Gate, HeldBytes, Lane, Permit};
use crate::config::Config;
use crate::error::{self, Cause, Failure};
use crate::ledger::Ledger;
use crate::metrics::{AttemptResult, Gauges, Metrics, Outcome, RefusedBy};
use crate::models::{ModelId, Models};
use crate::openai::call::{self, Endpoint};
use crate::openai::{envelope, headers};
use crate::relay::{self, BrokenOff, FirstEvent, Opening, Patience, Relay, WholeError};
use crate::retry::{self, Ending, Policy, Tries, Verdict};
use crate::upstream::connect::Connector;
use crate::upstream::{
    AnswerBody, ConnectionCounts, Exchange, Outgoing, Payload, SendError, Streamed, Upstream, target,
};

use body::{Read, ReadLimits, Upload, UploadWatch};
use fields::Via;

/// An opaque call's body up to this is read before it is sent, and can be sent again; a longer one streams through.
const MAX_REPLAYED: u64 = 1 << 20;

/// How long a call whose body streams through may wait for its slot: weir can't see such a client hang up.
const MAX_UPLOAD_WAIT: Duration = Duration::from_secs(10);

/// How long a stream's head is held back for its first event.
const MAX_HEAD_HOLD: Duration = Duration::from_secs(2);

/// Where clients' requests become the gateway's. A clone for each worker, with connections of its own.
pub struct Proxy {
    shared: Arc<Shared>,
    upstream: Upstream,
}

/// What all workers share.
struct Shared {
    config: Arc<Config>,
    models: Arc<Models>,
    metrics: Arc<Metrics>,
    gate: Arc<Gate>,
    policy: Policy,
    memory: ByteBudget,
    connector: Connector,
    connections: Arc<ConnectionCounts>,
    via: Via,
    host: HeaderValue,
    /// Names this process in request ids.
    instance: String,
    requests: AtomicU64,
    /// Keys are told apart by a keyed hash that is worth nothing outside this process.
    fingerprints: RandomState,
}

/// A request that was read and found good.
struct Call {
    outgoing: Outgoing,
    body: CallBody,
    endpoint: Option<Endpoint>,
    model: ModelId,
    model_name: Option<String>,
    stream: bool,
    credential: u64,
    /// Retries that the client's SDK has made already.
    by_client: u32,
    /// How long the client waits for an answer, where it says so.
    patience: Option<Duration>,
    /// The memory that the body takes.
    _held: HeldBytes,
}

enum CallBody {
    Whole(Bytes),
    /// Taken by the only attempt.
    Upload(Option<Streamed>, Arc<UploadWatch>),
}

/// An attempt that has ended, or that has brought an answer.
struct Tried {
    ending: Ending,
    result: AttemptResult,
    outcome: Result<Answer, Failure>,
}

/// An answer of the gateway's, before it goes to the client.
struct Answer {
    head: response::Parts,
    opening: Opening,
    rest: Option<AnswerBody>,
    permit: Option<Permit>,
    patience: Patience,
}

impl Proxy {
    /// A proxy to the configuration's gateway, reached through `connector`.
    ///
    /// # Panics
    /// Outside a tokio runtime: the gate keeps time in a task.
    pub fn new(config: Arc<Config>, connector: Connector) -> Self {
        let configured = config.models.keys().map(String::as_str).filter(|name| *name != "*");
        let models = Arc::new(Models::new(configured));
        let instance = format!("{:08x}", rand::random::<u32>());
        let authority = config.upstream.base_url.authority().as_str();
        let shared = Shared {
            metrics: Arc::new(Metrics::new(models.clone())),
            gate: Gate::open(&config, models.clone()),
            policy: Policy::new(&config.retry, Instant::now()),
            memory: ByteBudget::new(config.queue.max_bytes),
            connections: Arc::default(),
            via: Via::new(&instance),
            host: HeaderValue::from_str(authority).expect("an authority is visible ASCII"),
            requests: AtomicU64::new(0),
            fingerprints: RandomState::new(),
            models,
            connector,
            instance,
            config,
        };
        Self::of(Arc::new(shared))
    }

    /// The same proxy with connections of its own, for another worker.
    #[must_use]
    pub fn for_another_worker(&self) -> Self {
        Self::of(self.shared.clone())
    }

    fn of(shared: Arc<Shared>) -> Self {
        let upstream = Upstream::new(&shared.config, shared.connector.clone(), shared.connections.clone());
        Self { shared, upstream }
    }

    /// The gate that every request passes.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.shared.gate
    }

    /// What was counted.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// What there is to see now.
    pub fn gauges(&self) -> Gauges {
        let (connections_active, connections_idle) = self.shared.connections.active_and_idle();
        Gauges {
            models: self.shared.gate.model_gauges(),
            limits: self.shared.gate.limit_gauges(),
            connections_active,
            connections_idle,
            buffered_bytes: self.shared.memory.held(),
        }
    }

    /// Serves one request. Dropping the future cancels it everywhere.
    pub async fn serve(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let mut ledger = Ledger::open(self.shared.metrics.clone(), Instant::now());
        let (head, body) = request.into_parts();
        let (version, mut body) = (head.version, Some(body));
        let request_id = head.headers.get(headers::REQUEST_ID).cloned();
        let metered = route::route(head.uri.path()).filter(|_| head.method == Method::POST);
        let endpoint = metered.and_then(|route| route.endpoint);
        let response = match self.story(head, &mut body, &mut ledger).await {
            Ok(answer) => self.respond(answer, endpoint, ledger),
            Err(failure) => {
                if let (Some(unread), Version::HTTP_2) = (&mut body, version) {
                    body::discard(unread).await;
                }
                self.fail(&failure, endpoint, ledger)
            }
        };
        self.name(response, request_id)
    }

    /// The story of one request. What it does not read of the body stays in `body`.
    async fn story(
        &self,
        head: request::Parts,
        body: &mut Option<Incoming>,
        ledger: &mut Ledger,
    ) -> Result<Answer, Failure> {
        fields::check(&head, &self.shared.via)?;
        let mut call = self.read(head, body, ledger).await?;
        let applicant = self.applicant(&call, ledger.arrived());
        let mut tries =
            Tries { retries: 0, by_client: call.by_client, timed_out: false, repeatable: call.is_repeatable() };
        let mut last: Option<Result<Answer, Failure>> = None;
        loop {
            let permit = match self.admit(&applicant, last.is_some(), ledger).await {
                Ok(permit) => permit,
                Err(refusal) => return last.map_or(Err(refusal), given_up),
            };
            if last.is_none() {
                self.shared.policy.first_attempt(Instant::now());
            }
            let tried = self.attempt(&mut call, permit, ledger).await;
            let verdict = self.judge(&tried, tries, &call, ledger);
            if tried.outcome.is_err() || verdict != Verdict::Final {
                ledger.attempt_ends(tried.result);
            }
            let delay = match verdict {
                Verdict::Final => {
                    self.learn_model(&tried, &call, ledger);
                    return tried.outcome;
                }
                Verdict::GiveUp => return given_up(tried.outcome),
                Verdict::Again { delay } => delay,
            };
            ledger.retries(tried.result);
            tries.retries += 1;
            tries.timed_out |= tried.ending == Ending::TimedOut;
            // Kept in case no further attempt is let through; the slot is not kept.
            last = Some(tried.outcome.map(Answer::without_permit));
            let asleep = Instant::now();
            tokio::time::sleep(delay).await;
            ledger.spent_elsewhere(asleep.elapsed());
        }
    }

    /// Reads what the request asks for, and its body unless that streams through.
    async fn read(
        &self,
        mut head: request::Parts,
        body: &mut Option<Incoming>,
        ledger: &mut Ledger,
    ) -> Result<Call, Failure> {
        let config = &self.shared.config;
        let uri = head.uri.clone();
        let route = route::route(uri.path()).ok_or_else(|| unknown_path(&head))?;
        let target = target(&config.upstream.base_url, route.below_v1, uri.query()).ok_or_else(|| {
            Failure::new(Cause::BadRequest, "the request's path cannot be put behind upstream.base_url")
        })?;
        let endpoint = route.endpoint.filter(|_| head.method == Method::POST);
        let mut held = self.shared.memory.hold();
        let limits = ReadLimits {
            max: if endpoint.is_some() { config.server.max_body } else { MAX_REPLAYED },
            timeout: config.server.body_timeout,
            deadline: ledger.arrived() + config.timeouts.deadline,
        };
        let begun_reading = Instant::now();
        let incoming = body.as_mut().expect("a body is read once");
        let body = match body::read(incoming, limits, &mut held).await? {
            Read::Whole(bytes) => CallBody::Whole(bytes),
            Read::Longer(_) if endpoint.is_some() => return Err(body::too_large(limits.max)),
            Read::Longer(begun) => {
                let watch = Arc::<UploadWatch>::default();
                let rest = body.take().expect("a body is read once");
                let upload = Upload::new(rest, config.server.body_timeout, watch.clone());
                CallBody::Upload(Some(Streamed::new(begun, upload)), watch)
            }
        };
        ledger.spent_elsewhere(begun_reading.elapsed());
        let peek = match (&body, endpoint) {
            (CallBody::Whole(bytes), Some(_)) => call::peek(bytes).map_err(|duplicate| duplicate_key(&duplicate))?,
            _ => call::Peek::default(),
        };
        let model = match (endpoint, &peek.model) {
            (None, _) => ModelId::NONE,
            (Some(_), Some(name)) => self.shared.models.find(name),
            (Some(_), None) => ModelId::OTHER,
        };
        ledger.set_model(model);
        let credential = self.credential(&head.headers);
        let (by_client, patience) = (headers::client_retries(&head.headers), headers::client_patience(&head.headers));
        let key = config.upstream.api_key.as_ref();
        fields::to_upstream(&mut head, &self.shared.host, &self.shared.via, key, endpoint.is_some());
        let outgoing = Outgoing { method: head.method, uri: target, headers: head.headers };
        Ok(Call {
            outgoing,
            body,
            endpoint,
            model,
            model_name: peek.model,
            stream: peek.stream,
            credential,
            by_client,
            patience,
            _held: held,
        })
    }

    /// Whose quota at the gateway it is: weir's own key's, or the client's.
    fn credential(&self, fields: &HeaderMap) -> u64 {
        match (&self.shared.config.upstream.api_key, fields::client_key(fields)) {
            (None, Some(key)) => self.shared.fingerprints.hash_one(key.as_bytes()),
            _ => 0,
        }
    }

    fn applicant(&self, call: &Call, arrived: Instant) -> Applicant {
        let config = &self.shared.config;
        let mut max_wait = config.queue.max_wait.min(call.patience.unwrap_or(Duration::MAX));
        let mut until = arrived + max_wait.min(config.timeouts.deadline);
        if !call.body.is_whole() {
            max_wait = max_wait.min(MAX_UPLOAD_WAIT);
            // From now: its beginning may have taken longer than that to come.
            until = until.min(Instant::now() + max_wait);
        }
        Applicant {
            lane: Lane { credential: call.credential, model: call.model },
            rank: self.shared.gate.next_rank(),
            max_wait,
            until,
        }
    }

    /// Waits for a permit. Dropped while it waits, the place in the queue is given up.
    async fn admit(&self, applicant: &Applicant, again: bool, ledger: &mut Ledger) -> Result<Permit, Failure> {
        let begun = Instant::now();
        let admitted = self.shared.gate.admit(applicant, again).await;
        ledger.waited(begun.elapsed());
        admitted.map_err(Failure::from)
    }

    /// One attempt, until it is clear whether it brought an answer.
    async fn attempt(&self, call: &mut Call, mut permit: Permit, ledger: &mut Ledger) -> Tried {
        ledger.attempt_begins();
        let limit = self.attempt_limit(call, ledger.arrived());
        let exchanging = self.exchange(call, &mut permit, ledger);
        let exchange = match tokio::time::timeout_at(limit.at, exchanging).await {
            Ok(Ok(exchange)) => exchange,
            Ok(Err(error)) => return unanswered(&error, call),
            Err(_) => return self.late(limit, call),
        };
        if exchange.head.status == StatusCode::SWITCHING_PROTOCOLS {
            let failure =
                Failure::new(Cause::InvalidResponse, "the gateway switched protocols, which nobody asked it to");
            return Tried { ending: Ending::Broken, result: AttemptResult::Reset, outcome: Err(failure) };
        }
        self.open(exchange, call, permit, limit).await
    }

    /// Sends the request and waits for the head of its answer.
    ///
    /// A pooled connection may have been closed by the gateway in the very moment in which it was taken. What was not
    /// written then goes over a new one; so does, once more, what was, if that does no harm. It costs no retry, but
    /// counts as an attempt, and against the quota.
    async fn exchange(&self, call: &mut Call, permit: &mut Permit, ledger: &mut Ledger) -> Result<Exchange, SendError> {
        let repeatable = call.is_repeatable();
        let (mut payload, mut fresh) = (call.body.payload(), false);
        loop {
            let connection = self.upstream.connection(repeatable, fresh).await?;
            let reused = connection.reused;
            permit.spend();
            match self.upstream.send(connection, &call.outgoing, payload).await {
                Err(SendError::Unsent(unsent)) => {
                    permit.was_not_written();
                    // A gateway that closes new connections at once is one that cannot be reached.
                    if !reused {
                        return Err(SendError::Unsent(unsent));
                    }
                    (payload, fresh) = (unsent, true);
                }
                Err(SendError::Stale(_)) if repeatable && call.body.is_whole() => {
                    ledger.attempt_ends(AttemptResult::Reset);
                    ledger.attempt_begins();
                    (payload, fresh) = (call.body.payload(), true);
                }
                ended => return ended,
            }
        }
    }

    /// How long an attempt may take to bring the beginning of an answer.
    fn attempt_limit(&self, call: &Call, arrived: Instant) -> Limit {
        let timeouts = &self.shared.config.timeouts;
        let now = Instant::now();
        let own = match call.stream {
            true => Limit { at: now + timeouts.first_event, cause: Cause::FirstEventTimeout, name: "first_event" },
            false => Limit { at: now + timeouts.response, cause: Cause::ResponseTimeout, name: "response" },
        };
        let deadline = Limit { at: arrived + timeouts.deadline, cause: Cause::DeadlineExceeded, name: "deadline" };
        if deadline.at < own.at { deadline } else { own }
    }

    /// There was no answer in time: the client's fault where it is the one that is still waited for.
    fn late(&self, limit: Limit, call: &Call) -> Tried {
        match &call.body {
            CallBody::Upload(_, watch) if watch.is_waiting() => {
                let fault = body::too_slow(self.shared.config.server.body_timeout);
                Tried { ending: Ending::Broken, result: AttemptResult::Cancelled, outcome: Err(fault) }
            }
            _ => limit.exceeded(),
        }
    }

    /// Reads as much of an answer as it takes to judge it: an error's body, a stream's first event.
    async fn open(&self, exchange: Exchange, call: &Call, permit: Permit, limit: Limit) -> Tried {
        let Exchange { head, body } = exchange;
        let patience = Patience {
            idle: self.shared.config.timeouts.idle,
            first_event: (call.stream && relay::is_event_stream(&head)).then_some((limit.at, limit.cause)),
        };
        let mut answer = Answer { head, opening: Opening::default(), rest: Some(body), permit: Some(permit), patience };
        let until = limit.at.min(Instant::now() + MAX_HEAD_HOLD);
        let status = answer.head.status;
        let result = retry::result_of(status);
        let can_be_repeated = call.body.is_whole();
        if status.is_success() && can_be_repeated && relay::is_event_stream(&answer.head) {
            return answer.hold_first_event(until, limit).await;
        }
        let mut hopeless = !can_be_repeated;
        if can_be_repeated && retry::is_worth_holding(status, headers::should_retry(&answer.head.headers)) {
            match answer.hold_error(until).await {
                WholeError::Whole(body) => hopeless = envelope::is_hopeless(&body),
                WholeError::TooLong => hopeless = true,
                WholeError::Broken(error) => {
                    let failure =
                        Failure::new(Cause::Disconnected, format!("the gateway broke its error {status} off: {error}"));
                    let ending = answer.ending(false);
                    return Tried { ending, result, outcome: Err(failure) };
                }
            }
        }
        Tried { ending: answer.ending(hopeless), result, outcome: Ok(answer) }
    }

    /// The gateway serves this model: it may have a name in metrics and limits of its own.
    fn learn_model(&self, tried: &Tried, call: &Call, ledger: &mut Ledger) {
        if let (AttemptResult::Ok, ModelId::OTHER, Some(name)) = (tried.result, call.model, &call.model_name) {
            ledger.set_model(self.shared.models.learn(name));
        }
    }

    fn judge(&self, tried: &Tried, tries: Tries, call: &Call, ledger: &Ledger) -> Verdict {
        if !call.body.is_whole() {
            return Verdict::Final;
        }
        let deadline = self.shared.config.timeouts.deadline;
        let patience = call.patience.unwrap_or(Duration::MAX).min(deadline);
        let left = patience.saturating_sub(ledger.arrived().elapsed());
        self.shared.policy.judge(tried.ending, tries, left, Instant::now(), &mut rand::rng())
    }

    /// The gateway's answer, with what weir adds.
    fn respond(&self, answer: Answer, endpoint: Option<Endpoint>, mut ledger: Ledger) -> Response<ResponseBody> {
        let Answer { mut head, opening, rest, permit, patience } = answer;
        ledger.answer_begins();
        fields::to_client(&mut head);
        add_own_fields(&mut head.headers, &ledger);
        let endpoint = endpoint.filter(|_| head.status.is_success());
        let relay = Relay::new(&head, opening, rest, permit, ledger, endpoint, patience);
        Response::from_parts(head, ResponseBody::Relay(Box::new(relay)))
    }

    /// weir's own answer.
    fn fail(&self, failure: &Failure, endpoint: Option<Endpoint>, mut ledger: Ledger) -> Response<ResponseBody> {
        let outcome = match failure.cause.refused_by() {
            Some(word) => {
                let by =
                    RefusedBy::ALL.iter().find(|by| by.label() == word).expect("every word of the table is a label");
                ledger.refused(*by);
                tracing::debug!(code = failure.cause.code(), message = %failure, "refused");
                Outcome::Refused
            }
            None if failure.cause.is_clients_fault() => Outcome::ClientError,
            None => {
                tracing::warn!(code = failure.cause.code(), attempts = ledger.attempts(), error = %failure, "failed");
                Outcome::Failed
            }
        };
        let mut response = failure.response(endpoint).map(|body| ResponseBody::Own(Some(body)));
        add_own_fields(response.headers_mut(), &ledger);
        ledger.close(outcome);
        response
    }

    /// Gives the answer the gateway's request id, else the client's, else one of weir's.
    fn name(&self, mut response: Response<ResponseBody>, of_client: Option<HeaderValue>) -> Response<ResponseBody> {
        response.headers_mut().entry(headers::REQUEST_ID).or_insert_with(|| {
            of_client.unwrap_or_else(|| {
                let number = self.shared.requests.fetch_add(1, Ordering::Relaxed);
                let id = format!("weir-{}-{number}", self.shared.instance);
                HeaderValue::from_str(&id).expect("digits and letters")
            })
        });
        response
    }
}

/// When an attempt has taken too long, and by which timeout.
#[derive(Clone, Copy)]
struct Limit {
    at: Instant,
    cause: Cause,
    name: &'static str,
}

impl Limit {
    fn exceeded(self) -> Tried {
        let failure = Failure::new(self.cause, format!("the gateway did not answer in time (timeouts.{})", self.name));
        Tried { ending: Ending::TimedOut, result: AttemptResult::Timeout, outcome: Err(failure) }
    }
}

impl Call {
    /// Whether sending it twice does no harm: a metered call only costs more, an idempotent method is meant for it.
    fn is_repeatable(&self) -> bool {
        self.endpoint.is_some() || self.outgoing.method.is_idempotent()
    }
}

impl CallBody {
    /// What an attempt sends.
    fn payload(&mut self) -> Payload {
        match self {
            Self::Whole(bytes) => Payload::Whole(bytes.clone()),
            Self::Upload(upload, _) => {
                Payload::Streamed(upload.take().expect("a body that streams through is sent once"))
            }
        }
    }

    fn is_whole(&self) -> bool {
        matches!(self, Self::Whole(_))
    }
}

impl Answer {
    /// Keeps the answer, and gives the slot back.
    fn without_permit(self) -> Self {
        Self { rest: None, permit: None, ..self }
    }

    fn ending(&self, hopeless: bool) -> Ending {
        let (status, fields) = (self.head.status, &self.head.headers);
        let should_retry = headers::should_retry(fields);
        let is_error = status.is_client_error() || status.is_server_error();
        let hint = if is_error { headers::retry_hint(fields, SystemTime::now()) } else { None };
        Ending::Answer { status, hopeless, should_retry, hint }
    }

    /// Reads an error's body, so that the answer can be kept without its connection.
    async fn hold_error(&mut self, until: Instant) -> WholeError {
        let Some(rest) = &mut self.rest else { return WholeError::TooLong };
        let held = self.opening.whole_error(rest, until).await;
        if matches!(held, WholeError::Whole(_)) {
            (self.rest, self.permit) = (None, None);
        }
        held
    }

    /// Holds a stream back until its first event, which may be an error, or until it has taken too long to be held.
    async fn hold_first_event(mut self, until: Instant, limit: Limit) -> Tried {
        let first = match &mut self.rest {
            Some(rest) => self.opening.first_event(rest, until).await,
            None => FirstEvent::Unknown,
        };
        match first {
            FirstEvent::Late if until == limit.at => limit.exceeded(),
            FirstEvent::Output | FirstEvent::Unknown | FirstEvent::Late => {
                Tried { ending: self.ending(false), result: AttemptResult::Ok, outcome: Ok(self) }
            }
            FirstEvent::Error => {
                Tried { ending: Ending::ErrorEvent, result: AttemptResult::StreamError, outcome: Ok(self) }
            }
            FirstEvent::Broken(error) => {
                let failure = Failure::new(
                    Cause::Disconnected,
                    format!("the gateway broke its stream off before the first event: {error}"),
                );
                Tried { ending: Ending::Broken, result: AttemptResult::Reset, outcome: Err(failure) }
            }
        }
    }
}

/// Where the time went, and how many attempts it took.
fn add_own_fields(fields: &mut HeaderMap, ledger: &Ledger) {
    let millis = |duration: Duration| duration.as_secs_f64() * 1000.0;
    let timing =
        format!("queue;dur={:.1}, upstream;dur={:.1}", millis(ledger.queued()), millis(ledger.upstream_time()));
    let elapsed = u64::try_from(ledger.arrived().elapsed().as_millis()).unwrap_or(u64::MAX);
    fields.entry(headers::RESPONSE_TIME).or_insert_with(|| HeaderValue::from(elapsed));
    fields.append(headers::SERVER_TIMING, HeaderValue::from_str(&timing).expect("digits and letters"));
    fields.insert(headers::WEIR_ATTEMPTS, HeaderValue::from(ledger.attempts()));
}

/// There was no answer.
fn unanswered(error: &SendError, call: &Call) -> Tried {
    if let CallBody::Upload(_, watch) = &call.body
        && let Some(fault) = watch.fault()
    {
        return Tried { ending: Ending::Broken, result: AttemptResult::Cancelled, outcome: Err(fault.clone()) };
    }
    let (ending, result, cause) = match error {
        SendError::Connect(_) => (Ending::ConnectFailed, AttemptResult::ConnectError, Cause::Unreachable),
        SendError::ConnectTimeout(_) => (Ending::ConnectFailed, AttemptResult::ConnectError, Cause::ConnectTimeout),
        SendError::InvalidResponse(_) => (Ending::Broken, AttemptResult::Reset, Cause::InvalidResponse),
        SendError::Unsent(_) => (Ending::ConnectFailed, AttemptResult::ConnectError, Cause::Unreachable),
        SendError::Stale(_) | SendError::Broken(_) => (Ending::Broken, AttemptResult::Reset, Cause::Disconnected),
    };
    Tried { ending, result, outcome: Err(Failure::new(cause, format!("no answer from the gateway: {error}"))) }
}

/// weir has tried often enough: the SDK that gets this must not begin anew.
fn given_up(outcome: Result<Answer, Failure>) -> Result<Answer, Failure> {
    outcome.map(|mut answer| {
        error::no_retry(&mut answer.head.headers);
        answer
    })
}

fn unknown_path(head: &request::Parts) -> Failure {
    let host = head.headers.get(http::header::HOST).and_then(|host| host.to_str().ok());
    let host = host.or(head.uri.authority().map(http::uri::Authority::as_str)).unwrap_or("HOST:PORT");
    let message = format!(
        "weir serves the paths under /v1, and {} is not one of them; set your client's base URL to http://{host}/v1",
        head.uri.path()
    );
    Failure::new(Cause::UnknownPath, message)
}

fn duplicate_key(duplicate: &call::DuplicateKey) -> Failure {
    let message = format!("{:?} stands twice in the request's body; send it once", duplicate.0);
    Failure::new(Cause::DuplicateKey, message)
}

/// The body of every response.
pub enum ResponseBody {
    /// weir's own, short.
    Own(Option<Bytes>),
    /// The gateway's.
    Relay(Box<Relay>),
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match self.get_mut() {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Relay(relay) => Pin::new(relay.as_mut()).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            Self::Relay(relay) => relay.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Relay(relay) => relay.size_hint(),
        }
    }
}
