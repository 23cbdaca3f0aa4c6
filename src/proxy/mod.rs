//! The story of one request, from its head to the moment its answer begins.
//!
//! `Proxy::story` tells it top to bottom: find out whose it is, read the call, then wait for a permit, make an attempt,
//! judge it, and again if that helps. The answer's way back is `relay`'s. There is no `tokio::spawn` on the way: when the
//! client goes away, hyper drops the future, and with it the place in the queue, the permit and the connection to the
//! gateway.

mod attempt;
mod body;
mod call;
pub mod fields;
pub mod route;
mod settings;
mod usage_option;

use std::fmt;
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::{HeaderValue, Request, Response, Version, request};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::access_log::AccessLog;
use crate::admission::{Applicant, ByteBudget, Gate, Permit, Refusal, Standing};
use crate::clients::Clients;
use crate::config::Config;
use crate::config::change::Change;
use crate::error::{Cause, Failure};
use crate::ledger::{Books, Ledger};
use crate::metrics::{AttemptResult, Gauges, Guard, Metrics, Outcome, RefusedBy};
use crate::models::{ModelId, Models};
use crate::openai::call::Endpoint;
use crate::openai::headers;
use crate::recent::RecentError;
use crate::relay::{BrokenOff, Relay};
use crate::retry::{Ending, Tries, Verdict};
use crate::upstream::connect::Connector;
use crate::upstream::{ConnectionCounts, Upstream};

use attempt::{Answer, Tried, given_up};
use call::{AsksUsage, Call};
use fields::Via;
use settings::Settings;
use usage_option::UsageOption;

/// How many of a request's attempts may find out for all whether the gateway is back, and cost it no retry.
const MOST_FREE_PROBES: u32 = 10;

/// How often it is looked whether the budget allows a retry that waits for it.
const BUDGET_INTERVAL: Duration = Duration::from_millis(500);

/// Why a configuration cannot come into force while weir runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CannotChange {
    /// Options that are different and are put in force at the start only.
    NeedsRestart(Vec<Change>),
    /// Names are known until weir stops, and there have been too many: what they are names of.
    TooManyNames(String),
}

impl fmt::Display for CannotChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeedsRestart(changes) => {
                f.write_str(
                    "a restart is needed for what cannot change while weir runs (or put it back, and reload): ",
                )?;
                changes.iter().enumerate().try_for_each(|(index, change)| {
                    let comma = if index == 0 { "" } else { "; " };
                    write!(f, "{comma}{change}")
                })
            }
            Self::TooManyNames(why) => write!(f, "a restart is needed: {why}"),
        }
    }
}

impl std::error::Error for CannotChange {}

impl Shared {
    /// What is in force.
    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The models that the configuration knows by name.
fn model_names(config: &Config) -> impl Iterator<Item = &str> {
    config.models.keys().map(String::as_str).filter(|name| *name != "*")
}

/// Where clients' requests become the gateway's. A clone for each worker, with connections of its own.
pub struct Proxy {
    shared: Arc<Shared>,
    upstream: Upstream,
}

/// What all workers share, as long as weir runs.
struct Shared {
    /// What is in force. Locked to take a share of it, once for each request, and to put another in its place.
    settings: RwLock<Arc<Settings>>,
    /// Held for a change of the settings, and of all that follows from them.
    reloading: Mutex<()>,
    models: Arc<Models>,
    books: Arc<Books>,
    gate: Arc<Gate>,
    memory: ByteBudget,
    usage_option: UsageOption,
    connector: Connector,
    connections: Arc<ConnectionCounts>,
    via: Via,
    /// Names this process in request ids.
    instance: String,
    requests: AtomicU64,
}

impl Proxy {
    /// A proxy to the configuration's gateway, reached through `connector`.
    ///
    /// # Panics
    /// Outside a tokio runtime: the gate keeps time in a task.
    pub fn new(config: Arc<Config>, connector: Connector) -> Self {
        let models = Arc::new(Models::new(model_names(&config)));
        let instance = format!("{:08x}", rand::random::<u32>());
        let settings = Settings::new(config);
        let Settings { config, clients, .. } = &settings;
        let shared = Shared {
            books: Arc::new(Books::new(
                Metrics::new(models.clone(), clients.names()),
                config.upstream.base_url.authority().as_str(),
            )),
            gate: Gate::open(config, models.clone(), clients),
            memory: ByteBudget::new(config.queue.max_bytes),
            usage_option: UsageOption::default(),
            connections: Arc::default(),
            via: Via::new(&instance),
            requests: AtomicU64::new(0),
            reloading: Mutex::default(),
            settings: RwLock::new(Arc::new(settings)),
            models,
            connector,
            instance,
        };
        Self::of(Arc::new(shared))
    }

    /// The same proxy with connections of its own, for another worker.
    #[must_use]
    pub fn for_another_worker(&self) -> Self {
        Self::of(self.shared.clone())
    }

    fn of(shared: Arc<Shared>) -> Self {
        let config = shared.settings().config.clone();
        let upstream = Upstream::new(&config, shared.connector.clone(), shared.connections.clone());
        Self { shared, upstream }
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.shared.settings().config.clone()
    }

    /// Puts another configuration in force, whole, and says what has changed. Requests under way keep what they began with,
    /// except for limits, which change for all.
    ///
    /// # Errors
    /// It cannot come into force while weir runs; nothing has changed.
    pub fn reload(&self, config: Config) -> Result<Vec<Change>, CannotChange> {
        let shared = &*self.shared;
        let _one_at_a_time = shared.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let before = shared.settings();
        let changes = before.config.changes_to(&config);
        let needs_restart: Vec<Change> = changes.iter().filter(|change| change.needs_restart()).cloned().collect();
        if !needs_restart.is_empty() {
            return Err(CannotChange::NeedsRestart(needs_restart));
        }
        let after = before.changed_to(Arc::new(config)).map_err(CannotChange::TooManyNames)?;
        shared.models.configure(model_names(&after.config)).map_err(CannotChange::TooManyNames)?;
        // Nothing can fail from here on. A client has its counters before anybody can be that client.
        shared.books.metrics.know_clients(after.clients.names());
        shared.memory.set_limit(after.config.queue.max_bytes);
        shared.gate.reload(&after.config, &after.clients);
        *shared.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(after);
        Ok(changes)
    }

    /// The gate that every request passes.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.shared.gate
    }

    /// What was counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.books.metrics
    }

    /// Where a line for each finished request is written; at first it is off.
    pub fn access_log(&self) -> &Arc<AccessLog> {
        &self.shared.books.access_log
    }

    /// weir ends. From now on a request that is polled ends with a word to its client, where there is one that it can still hear:
    /// a refusal, or a stream's last event. One that is dropped was cut by weir; its client has not gone away.
    pub fn cuts_what_runs(&self) {
        self.shared.books.cut_by_weir.store(true, Ordering::Relaxed);
    }

    /// The last requests that were refused, failed or answered with an error, the newest first.
    pub fn recent_errors(&self) -> Vec<RecentError> {
        self.shared.books.recent_errors.latest()
    }

    /// Who is known now, and how.
    pub fn clients(&self) -> Arc<Clients> {
        self.shared.settings().clients.clone()
    }

    /// The models known by name.
    pub fn models(&self) -> &Models {
        &self.shared.models
    }

    /// What there is to see now; of tasks and clients' connections the proxy knows nothing.
    pub fn gauges(&self) -> Gauges {
        let (connections_active, connections_idle) = self.shared.connections.active_and_idle();
        let queue = &self.config().queue;
        Gauges {
            models: self.shared.gate.model_gauges(),
            limits: self.shared.gate.limit_gauges(),
            connections_active,
            connections_idle,
            waiting_limit: queue.max_waiting.into(),
            buffered_bytes: self.shared.memory.held(),
            buffered_bytes_limit: queue.max_bytes,
            reserved_tokens: self.shared.gate.reserved_tokens(),
            ..Gauges::default()
        }
    }

    /// Serves one request, of a client at that address. Dropping the future cancels it everywhere.
    pub async fn serve(&self, request: Request<Incoming>, peer: Option<IpAddr>) -> Response<ResponseBody> {
        let mut ledger = Ledger::open(self.shared.books.clone(), Instant::now());
        let settings = self.shared.settings();
        let (head, body) = request.into_parts();
        ledger.begins(&head);
        let (version, mut asked) = (head.version, Asked { settings: &settings, body: Some(body), applicant: None });
        // A copy: what shares hyper's read buffer keeps it from being used again.
        let request_id =
            head.headers.get(&headers::REQUEST_ID).and_then(|id| HeaderValue::from_bytes(id.as_bytes()).ok());
        let endpoint = route::route(&head.method, head.uri.path()).and_then(|route| route.endpoint);
        let told = self.unless_cut(pin!(self.story(head, &mut asked, peer, &mut ledger))).await;
        let mut response = match told.unwrap_or_else(|| Err(Refusal::draining().into())) {
            Ok(answer) => self.respond(answer, endpoint, request_id, ledger),
            Err(failure) => {
                // Of a story that was cut.
                ledger.attempt_ends(AttemptResult::Cancelled);
                if let (Some(unread), Version::HTTP_2) = (&mut asked.body, version) {
                    // When weir ends, its last words do not wait for what the client still sends.
                    self.unless_cut(pin!(body::discard(unread))).await;
                }
                let cause = failure.cause;
                let mut response = self.fail(&settings.config, failure, endpoint, request_id, ledger);
                if matches!(cause, Cause::BadRequest | Cause::HeadersTooLarge) && version < Version::HTTP_2 {
                    // Someone between here and the client may read differently where it ends, as hyper supposes of its own.
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                response
            }
        };
        if let (Some(applicant), Some(_)) = (&asked.applicant, endpoint) {
            let Standing { requests, tokens } = self.shared.gate.standing(applicant);
            headers::tell_quota(response.headers_mut(), requests, tokens);
        }
        response
    }

    /// Something to its end; `None` where weir's comes first. Taken by reference: an async function would keep room for it twice.
    fn unless_cut<F: Future>(&self, mut running: Pin<&mut F>) -> impl Future<Output = Option<F::Output>> {
        let cut = || self.shared.books.cut_by_weir.load(Ordering::Relaxed);
        poll_fn(move |cx| match running.as_mut().poll(cx) {
            Poll::Pending if cut() => Poll::Ready(None),
            pending_or_done => pending_or_done.map(Some),
        })
    }

    /// The story of one request.
    async fn story(
        &self,
        head: request::Parts,
        asked: &mut Asked<'_>,
        peer: Option<IpAddr>,
        ledger: &mut Ledger,
    ) -> Result<Box<Answer>, Failure> {
        let settings = asked.settings;
        fields::check(&head, &self.shared.via)?;
        let route = route::route(&head.method, head.uri.path()).ok_or_else(|| call::unknown_path(&head))?;
        let (target, endpoint) = (Self::target(settings, &route, head.uri.query())?, route.endpoint);
        let caller = settings.clients.identify(&head.headers, peer)?;
        ledger.set_client(caller.client);
        let mut call = self.read(head, target, endpoint, caller, asked, ledger).await?;
        let applicant = asked.applicant.insert(self.applicant(&call, ledger.arrived()));
        let mut tries = Tries {
            retries: 0,
            by_client: call.by_client,
            timed_out: false,
            repeatable: call.is_repeatable(),
            probe: false,
        };
        let (mut free_probes, mut owes_retry) = (0, None);
        let mut last: Option<Result<Box<Answer>, Failure>> = None;
        loop {
            let permit = match self.admit(applicant, ledger).await {
                Ok(permit) => permit,
                Err(refusal) => return last.map_or(Err(refusal), given_up),
            };
            if let Some(reason) = owes_retry {
                if !settings.policy.pay(Instant::now()) {
                    // Another was quicker; this permit goes back, and the request waits for the budget again.
                    drop(permit);
                    match last {
                        Some(kept) if !self.waits_for_budget(&call, applicant, ledger).await => return given_up(kept),
                        kept => last = kept,
                    }
                    continue;
                }
                ledger.retries(reason);
                owes_retry = None;
            }
            if ledger.attempts() == 0 {
                settings.policy.first_attempt(Instant::now());
            }
            let tried = self.attempt(&mut call, permit, ledger).await;
            if tried.option_refused {
                // That is between weir and the gateway: no retry, and not for the client to see.
                ledger.attempt_ends(tried.result);
                call.usage = AsksUsage::InVain;
                // Unless no further attempt is let through.
                last = Some(tried.outcome.map(Answer::without_permit));
                continue;
            }
            tries.probe = tried.echo.was_for_others && free_probes < MOST_FREE_PROBES;
            let verdict = self.judge(&tried, tries, &call, ledger);
            if tried.outcome.is_err() || verdict != Verdict::Final {
                ledger.attempt_ends(tried.result);
            }
            let delay = match verdict {
                Verdict::Final => {
                    self.learn(&tried, &call, ledger);
                    return tried.outcome;
                }
                Verdict::GiveUp => return given_up(tried.outcome),
                Verdict::Again { delay } => delay,
            };
            if let Some(mut permit) = tried.over_quota {
                // The gateway's quota is behind weir's: given back, these tokens would buy the next in line another refusal.
                permit.used(permit.cost().tokens());
            }
            match tries.probe {
                true => free_probes += 1,
                false => tries.retries += 1,
            }
            tries.timed_out |= tried.ending == Ending::TimedOut;
            // Kept in case no further attempt is let through; the slot is not kept.
            let kept = tried.outcome.map(Answer::without_permit);
            if self.shared.gate.has_given_up(applicant) {
                return given_up(kept);
            }
            // Where its lane waits for the gateway, the request waits in its place in the queue.
            if !tried.echo.lane_waits {
                sleep(delay, ledger).await;
            }
            if !self.waits_for_budget(&call, applicant, ledger).await {
                return given_up(kept);
            }
            (last, owes_retry) = (Some(kept), Some(tried.result));
        }
    }

    /// Waits until the budget allows a retry; `false` where the request's time is over before that, or nobody is to wait for this
    /// gateway any more.
    async fn waits_for_budget(&self, call: &Call<'_>, applicant: &Applicant, ledger: &mut Ledger) -> bool {
        while !call.settings.policy.allows_retry(Instant::now()) {
            if time_left(call, ledger) <= BUDGET_INTERVAL || self.shared.gate.has_given_up(applicant) {
                return false;
            }
            sleep(BUDGET_INTERVAL, ledger).await;
        }
        true
    }

    /// Waits for a permit. Dropped while it waits, the place in the queue is given up.
    async fn admit(&self, applicant: &Applicant, ledger: &mut Ledger) -> Result<Permit, Failure> {
        let again = ledger.attempts() > 0;
        ledger.waits();
        let admitted = self.shared.gate.admit(applicant, again).await;
        ledger.waited();
        let permit = admitted?;
        if !again {
            permit.would_refuse().iter().filter_map(|cause| RefusedBy::of(*cause)).for_each(|by| ledger.observed(by));
        }
        Ok(permit)
    }

    /// The gateway has served this call: its model may have a name in metrics and limits of its own, and its key may be
    /// a tenant. A call that is not metered proves nothing: gateways list their models to everyone.
    fn learn(&self, tried: &Tried, call: &Call<'_>, ledger: &mut Ledger) {
        let Shared { models, gate, usage_option, .. } = &*self.shared;
        let served = tried.outcome.as_ref().is_ok_and(|answer| answer.head.status.is_success());
        if tried.result != AttemptResult::Ok || !served || call.endpoint.is_none() {
            return;
        }
        call.settings.clients.accepted(&call.caller);
        let model = match (call.model, &call.model_name) {
            (ModelId::OTHER, Some(name)) => models.learn(name),
            (known, _) => known,
        };
        ledger.set_model(model);
        gate.learn_first_byte(model, call.stream, ledger.attempt_elapsed(Instant::now()));
        match call.usage {
            AsksUsage::ForClient(_) => usage_option.served(model),
            AsksUsage::InVain => usage_option.refused(model, Instant::now()),
            AsksUsage::AsWritten => {}
        }
    }

    fn judge(&self, tried: &Tried, tries: Tries, call: &Call<'_>, ledger: &Ledger) -> Verdict {
        if !call.body.is_whole() {
            return Verdict::Final;
        }
        let left = time_left(call, ledger);
        call.settings.policy.judge(tried.ending, tries, left, &mut rand::rng())
    }

    /// The gateway's answer, with what weir adds.
    fn respond(
        &self,
        answer: Box<Answer>,
        endpoint: Option<Endpoint>,
        request_id: Option<HeaderValue>,
        mut ledger: Ledger,
    ) -> Response<ResponseBody> {
        let Answer { mut head, source, hides_usage } = *answer;
        let now = Instant::now();
        ledger.answer_begins(now);
        fields::to_client(&mut head);
        add_own_fields(&mut head.headers, &ledger, now);
        ledger.answers(self.name(&mut head.headers, request_id), head.status);
        let endpoint = endpoint.filter(|_| head.status.is_success());
        if hides_usage {
            // A chunk will be missing from it.
            head.headers.remove(header::CONTENT_LENGTH);
        }
        let relay = Relay::new(&head, source, ledger, endpoint, hides_usage, now);
        Response::from_parts(head, ResponseBody::Relay(Box::new(relay)))
    }

    /// weir's own answer.
    fn fail(
        &self,
        config: &Config,
        failure: Failure,
        endpoint: Option<Endpoint>,
        request_id: Option<HeaderValue>,
        mut ledger: Ledger,
    ) -> Response<ResponseBody> {
        let outcome = match RefusedBy::of(failure.cause) {
            Some(by) => {
                ledger.refused(by);
                Outcome::Refused
            }
            None if failure.cause.is_clients_fault() => Outcome::ClientError,
            None => Outcome::Failed,
        };
        Guard::of(failure.cause).into_iter().for_each(|guard| self.metrics().guard(guard));
        let response = failure.response(endpoint);
        ledger.gave(response.body().len());
        let mut response = response.map(|body| ResponseBody::Own(Some(body)));
        add_own_fields(response.headers_mut(), &ledger, Instant::now());
        if outcome == Outcome::Failed && config.retry.max_retries == 0 {
            // Retrying is left to the client.
            response.headers_mut().remove(&headers::SHOULD_RETRY);
        }
        ledger.answers(self.name(response.headers_mut(), request_id), failure.cause.status());
        ledger.close_with(outcome, failure);
        response
    }

    /// Gives the answer the gateway's request id, else the client's, else one of weir's.
    fn name<'f>(&self, fields: &'f mut HeaderMap, of_client: Option<HeaderValue>) -> &'f HeaderValue {
        fields.entry(&headers::REQUEST_ID).or_insert_with(|| {
            of_client.unwrap_or_else(|| {
                let number = self.shared.requests.fetch_add(1, Ordering::Relaxed);
                let id = ["weir-", &self.shared.instance, "-", itoa::Buffer::new().format(number)].concat();
                HeaderValue::try_from(id).expect("digits and letters")
            })
        })
    }
}

/// Sleeps between attempts; that time is not weir's, whatever comes of it.
async fn sleep(delay: Duration, ledger: &mut Ledger) {
    let asleep = Instant::now();
    tokio::time::sleep(delay).await;
    ledger.spent_elsewhere(asleep.elapsed());
}

/// For how long the request is still worth an attempt.
fn time_left(call: &Call<'_>, ledger: &Ledger) -> Duration {
    let deadline = call.settings.config.timeouts.deadline;
    let patience = call.patience.unwrap_or(Duration::MAX).min(deadline);
    patience.saturating_sub(ledger.arrived().elapsed())
}

/// What is left of a request, and known of it, when its story has ended.
struct Asked<'s> {
    /// What was in force when it arrived.
    settings: &'s Settings,
    /// Taken when it has been read, or is being passed on.
    body: Option<Incoming>,
    /// How it applied for its permits.
    applicant: Option<Applicant>,
}

/// Where the time went, and how many attempts it took.
fn add_own_fields(fields: &mut HeaderMap, ledger: &Ledger, now: Instant) {
    let elapsed = u64::try_from((now - ledger.arrived()).as_millis()).unwrap_or(u64::MAX);
    fields.entry(&headers::RESPONSE_TIME).or_insert_with(|| headers::number(elapsed));
    headers::tell_timing(fields, ledger.queued(), ledger.upstream_time(now));
    fields.insert(&headers::WEIR_ATTEMPTS, headers::number(ledger.attempts().into()));
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
