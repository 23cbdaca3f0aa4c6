//! One attempt: sending the request, and reading as much of what comes back as it takes to judge it.

use std::time::{Duration, SystemTime};

use http::{StatusCode, response};
use tokio::time::Instant;

use super::Proxy;
use super::call::{AsksUsage, Call, CallBody};
use super::{body, fields, usage_option};
use crate::admission::{Echo, Heard, Permit, Signal};
use crate::error::{self, Cause, Failure};
use crate::ledger::Ledger;
use crate::metrics::AttemptResult;
use crate::openai::{envelope, headers};
use crate::relay::{self, Beginning, Opening, Patience, Source, WholeError};
use crate::retry::{self, Ending};
use crate::upstream::{Exchange, SendError};

/// How long a stream's head is held back for its first output.
const MAX_HEAD_HOLD: Duration = Duration::from_secs(2);

/// An attempt that has ended, or that has brought an answer.
pub(super) struct Tried {
    pub(super) ending: Ending,
    pub(super) result: AttemptResult,
    pub(super) outcome: Result<Box<Answer>, Failure>,
    /// The gateway refused it, and that may be because weir asked for the stream's usage.
    pub(super) option_refused: bool,
    /// The permit of one that the gateway refused for its quota.
    pub(super) over_quota: Option<Permit>,
    pub(super) echo: Echo,
}

/// An answer of the gateway's, before it goes to the client.
pub(super) struct Answer {
    pub(super) head: response::Parts,
    pub(super) source: Source,
    /// weir has asked for the stream's usage, and the client has not.
    pub(super) hides_usage: bool,
}

/// When an attempt has taken too long, and by which timeout.
#[derive(Clone, Copy)]
struct Limit {
    at: Instant,
    cause: Cause,
    name: &'static str,
}

impl Proxy {
    /// One attempt, until it is clear whether it brought an answer.
    pub(super) async fn attempt(&self, call: &mut Call<'_>, mut permit: Permit, ledger: &mut Ledger) -> Tried {
        let began = ledger.attempt_begins();
        let limit = self.attempt_limit(call, ledger.arrived(), began);
        let exchanging = self.exchange(call, &mut permit, ledger);
        let exchange = match tokio::time::timeout_at(limit.at, exchanging).await {
            Ok(Ok(exchange)) => exchange,
            Ok(Err(error)) => return unanswered(&error, call).heard_by(&permit),
            Err(_) if limit.cause == Cause::DeadlineExceeded => return self.late(limit, call),
            Err(_) => return self.late(limit, call).heard_by(&permit),
        };
        if let Err(failure) = fields::check_answer(&exchange.head) {
            return Tried::failed(Ending::Broken, AttemptResult::Reset, failure).heard_by(&permit);
        }
        self.open(exchange, call, permit, limit).await
    }

    /// Sends the request and waits for the head of its answer.
    ///
    /// A pooled connection may have been closed by the gateway in the very moment in which it was taken. What was not
    /// written then goes over a new one; so does, once more, what was, if that does no harm. It costs no retry, but
    /// counts as an attempt, and against the quota.
    async fn exchange(
        &self,
        call: &mut Call<'_>,
        permit: &mut Permit,
        ledger: &mut Ledger,
    ) -> Result<Exchange, SendError> {
        let (repeatable, timeout) = (call.is_repeatable(), call.settings.config.timeouts.connect);
        let (mut payload, mut fresh) = (call.payload(), false);
        loop {
            let connection = self.upstream.connection(repeatable, fresh, timeout).await?;
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
                    (payload, fresh) = (call.payload(), true);
                }
                ended => return ended,
            }
        }
    }

    /// How long an attempt may take to bring the beginning of an answer.
    fn attempt_limit(&self, call: &Call<'_>, arrived: Instant, now: Instant) -> Limit {
        let timeouts = &call.settings.config.timeouts;
        let own = match call.stream {
            true => Limit { at: now + timeouts.first_event, cause: Cause::FirstEventTimeout, name: "first_event" },
            false => Limit { at: now + timeouts.response, cause: Cause::ResponseTimeout, name: "response" },
        };
        let deadline = Limit { at: arrived + timeouts.deadline, cause: Cause::DeadlineExceeded, name: "deadline" };
        if deadline.at < own.at { deadline } else { own }
    }

    /// There was no answer in time: the client's fault where it is the one that is still waited for.
    fn late(&self, limit: Limit, call: &Call<'_>) -> Tried {
        match &call.body {
            CallBody::Upload(_, watch) if watch.is_waiting() => {
                let fault = body::too_slow(call.settings.config.server.body_timeout);
                Tried::failed(Ending::Broken, AttemptResult::Cancelled, fault)
            }
            _ => limit.exceeded(),
        }
    }

    /// Reads as much of an answer as it takes to judge it: an error's body, a stream up to its first output.
    async fn open(&self, exchange: Exchange, call: &Call<'_>, mut permit: Permit, limit: Limit) -> Tried {
        let Exchange { head, body } = exchange;
        if !head.status.is_success() {
            permit.refused();
        }
        let is_stream = relay::is_event_stream(&head);
        let patience = Patience {
            idle: call.settings.config.timeouts.idle,
            first_event: (call.stream && is_stream).then_some((limit.at, limit.cause)),
        };
        let asked_for_client = matches!(call.usage, AsksUsage::ForClient(_));
        let hides_usage = asked_for_client && head.status.is_success() && is_stream;
        let source = Source { opening: Opening::default(), rest: Some(body), permit: Some(permit), patience };
        // In a box: it is handed on several times.
        let mut answer = Box::new(Answer { head, source, hides_usage });
        let until = || limit.at.min(Instant::now() + MAX_HEAD_HOLD);
        let status = answer.head.status;
        let result = retry::result_of(status);
        let can_be_repeated = call.body.is_whole();
        if status.is_success() && can_be_repeated && is_stream {
            return answer.hold_preamble(call.endpoint.is_some(), until(), limit).await;
        }
        let (mut hopeless, mut own_fault) = (!can_be_repeated, false);
        let mut option_refused = false;
        let about_the_option = asked_for_client && usage_option::could_be_about_it(status);
        let worth_holding = retry::is_worth_holding(status, answer.should_retry());
        // What a 429 means for others its body says.
        let about_the_lane = status == StatusCode::TOO_MANY_REQUESTS;
        if can_be_repeated && (worth_holding || about_the_option || about_the_lane) {
            match answer.hold_error(until()).await {
                WholeError::Whole(body) => {
                    hopeless = envelope::is_hopeless(&body);
                    own_fault = hopeless;
                    option_refused =
                        about_the_option && self.shared.usage_option.may_be_to_blame(call.model, status, &body);
                }
                WholeError::TooLong => hopeless = true,
                WholeError::Broken(error) => {
                    let failure =
                        Failure::new(Cause::Disconnected, format!("the gateway broke its error {status} off: {error}"));
                    let tried = Tried::failed(answer.ending(false), result, failure);
                    return answer.source.permit.iter().fold(tried, Tried::heard_by);
                }
            }
        }
        let ending = answer.ending(hopeless);
        let echo = answer
            .source
            .permit
            .as_ref()
            .map(|permit| permit.hear(&answer.heard(ending, own_fault)))
            .unwrap_or_default();
        let held_whole = answer.source.rest.is_none();
        let over_quota = status == StatusCode::TOO_MANY_REQUESTS && !hopeless;
        let permit = answer.source.permit.take_if(|_| held_whole).filter(|_| over_quota);
        Tried { ending, result, outcome: Ok(answer), option_refused, over_quota: permit, echo }
    }
}

impl Tried {
    fn failed(ending: Ending, result: AttemptResult, failure: Failure) -> Self {
        Self { ending, result, outcome: Err(failure), option_refused: false, over_quota: None, echo: Echo::default() }
    }

    /// Tells the attempt's lane that the gateway has failed, unless it was the client.
    fn heard_by(self, permit: &Permit) -> Self {
        if self.result == AttemptResult::Cancelled {
            return self;
        }
        let echo = permit.hear(&Heard { signal: Signal::Failed, requests: None, tokens: None });
        Self { echo, ..self }
    }
}

impl Limit {
    fn exceeded(self) -> Tried {
        let failure = Failure::new(self.cause, format!("the gateway did not answer in time (timeouts.{})", self.name));
        Tried::failed(Ending::TimedOut, AttemptResult::Timeout, failure)
    }
}

impl Answer {
    /// Keeps the answer, and gives the slot back.
    pub(super) fn without_permit(mut self: Box<Self>) -> Box<Self> {
        (self.source.rest, self.source.permit) = (None, None);
        self
    }

    fn ending(&self, hopeless: bool) -> Ending {
        let should_retry = self.should_retry();
        let hint = if self.is_error() { headers::retry_hint(&self.head.headers, SystemTime::now()) } else { None };
        Ending::Answer { status: self.head.status, hopeless, should_retry, hint }
    }

    fn is_error(&self) -> bool {
        self.head.status.is_client_error() || self.head.status.is_server_error()
    }

    /// What the gateway says of its error; of any other answer it has no say.
    fn should_retry(&self) -> Option<bool> {
        if self.is_error() { headers::should_retry(&self.head.headers) } else { None }
    }

    /// What the answer says of its lane.
    fn heard(&self, ending: Ending, own_fault: bool) -> Heard {
        let fields = &self.head.headers;
        let hint = if self.is_error() { headers::explicit_hint(fields, SystemTime::now()) } else { None };
        let [requests, tokens] = headers::told_quotas(fields);
        let signal = match (self.head.status.as_u16(), ending, hint) {
            // Money lacks, or the request is too large: others are not concerned.
            _ if own_fault => Signal::Accepted,
            (429, _, hint) => Signal::Refused { hint },
            (503 | 529, _, Some(hint)) => Signal::Overloaded { hint },
            (408 | 500.., _, _) | (_, Ending::ErrorEvent | Ending::Broken, _) => Signal::Failed,
            _ => Signal::Accepted,
        };
        Heard { signal, requests, tokens }
    }

    /// Reads an error's body, so that the answer can be kept without its connection.
    async fn hold_error(&mut self, until: Instant) -> WholeError {
        let Source { opening, rest, .. } = &mut self.source;
        let Some(body) = rest else { return WholeError::TooLong };
        let held = opening.whole_error(body, until).await;
        if matches!(held, WholeError::Whole(_)) {
            *rest = None;
        }
        held
    }

    /// Holds a stream back until its first output, or until it has taken too long to be held. One that comes to nothing
    /// before that can still be tried again.
    async fn hold_preamble(mut self: Box<Self>, metered: bool, until: Instant, limit: Limit) -> Tried {
        let Source { opening, rest, .. } = &mut self.source;
        let beginning = match rest {
            Some(rest) if metered => opening.first_output(rest, until).await,
            Some(rest) => opening.first_event(rest, until).await,
            None => Beginning::Undecided,
        };
        let (ending, result) = match beginning {
            Beginning::Silence if until == limit.at => {
                return self.source.permit.iter().fold(limit.exceeded(), Tried::heard_by);
            }
            Beginning::Output | Beginning::Undecided | Beginning::Silence => (self.ending(false), AttemptResult::Ok),
            Beginning::Error { hopeless } => {
                // As good as an error for a head.
                self.source.permit.iter_mut().for_each(Permit::refused);
                let ending = if hopeless { self.ending(true) } else { Ending::ErrorEvent };
                (ending, AttemptResult::StreamError)
            }
            // A backend that dies leaves this behind when there is a proxy before it.
            Beginning::Nothing => (Ending::Broken, AttemptResult::StreamError),
            Beginning::Broken(error) => {
                let failure = Failure::new(
                    Cause::Disconnected,
                    format!("the gateway broke its stream off before the first output: {error}"),
                );
                let broken = Tried::failed(Ending::Broken, AttemptResult::Reset, failure);
                return self.source.permit.iter().fold(broken, Tried::heard_by);
            }
        };
        self.tried(ending, result)
    }

    /// An attempt that has brought the beginning of a stream.
    fn tried(self: Box<Self>, ending: Ending, result: AttemptResult) -> Tried {
        let own_fault = matches!(ending, Ending::Answer { hopeless: true, .. });
        let heard = self.heard(ending, own_fault);
        let echo = self.source.permit.as_ref().map(|permit| permit.hear(&heard)).unwrap_or_default();
        Tried { ending, result, outcome: Ok(self), option_refused: false, over_quota: None, echo }
    }
}

/// There was no answer.
fn unanswered(error: &SendError, call: &Call<'_>) -> Tried {
    if let CallBody::Upload(_, watch) = &call.body
        && let Some(fault) = watch.fault()
    {
        return Tried::failed(Ending::Broken, AttemptResult::Cancelled, fault.clone());
    }
    let (ending, result, cause) = match error {
        SendError::Connect(_) => (Ending::ConnectFailed, AttemptResult::ConnectError, Cause::Unreachable),
        SendError::ConnectTimeout(_) => (Ending::ConnectFailed, AttemptResult::ConnectError, Cause::ConnectTimeout),
        SendError::InvalidResponse(_) => (Ending::Broken, AttemptResult::Reset, Cause::InvalidResponse),
        SendError::Unsent(_) => (Ending::ConnectFailed, AttemptResult::ConnectError, Cause::Unreachable),
        SendError::Stale(_) | SendError::Broken(_) => (Ending::Broken, AttemptResult::Reset, Cause::Disconnected),
    };
    Tried::failed(ending, result, Failure::new(cause, format!("no answer from the gateway: {error}")))
}

/// weir has tried often enough: the SDK that gets this must not begin anew.
pub(super) fn given_up(outcome: Result<Box<Answer>, Failure>) -> Result<Box<Answer>, Failure> {
    outcome.map(|mut answer| {
        error::no_retry(&mut answer.head.headers);
        answer
    })
}
