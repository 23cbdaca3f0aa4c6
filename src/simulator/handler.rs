//! The story of one request at the simulated gateway.

use std::time::UNIX_EPOCH;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, request};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use tokio::time::{Instant, sleep};

use super::Inner;
use super::fate::Fate;
use super::fault::Fault;
use super::gate::Slot;
use super::hints;
use super::plan::{Plan, document};
use super::problem::Problem;
use super::script::{Cut, STALL, Script};
use super::settings::Hints;

/// The largest body that is read.
const MAX_BODY: usize = 64 << 20;

/// Why a request ends without the answer it asked for.
enum End {
    Problem(Problem),
    /// Without any.
    Cut,
}

/// Answers a request, or with an error lets hyper cut its connection.
///
/// Dropped when the client hangs up, and so is what it holds: the body is read before anything else, for hyper sees a
/// hang-up only behind it.
pub(super) async fn respond(gateway: &Inner, request: Request<Incoming>) -> Result<Response<Script>, Cut> {
    let arrived = Instant::now();
    let (head, body) = request.into_parts();
    if head.uri.path() == "/_stats" {
        return Ok(document(StatusCode::OK, &gateway.gate.stats().to_json(), None, None));
    }
    if !head.uri.path().starts_with("/v1/") {
        return Ok(error(&Problem::unknown_path(&head.method, head.uri.path())));
    }
    let body = match read(body).await {
        Ok(body) => body,
        Err(problem) => return Ok(error(&problem)),
    };
    let nth = gateway.arrivals.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let fate = Fate::of(&gateway.settings, nth);
    let mut response = match gateway.decide(&head, &body, &fate).await {
        Ok(response) => response,
        Err(End::Problem(problem)) => error(&problem),
        Err(End::Cut) => return Err(Cut),
    };
    stamp(response.headers_mut(), fate.id, arrived);
    Ok(response)
}

impl Inner {
    async fn decide(&self, head: &request::Parts, body: &[u8], fate: &Fate) -> Result<Response<Script>, End> {
        self.gate.count(|stats| stats.requests += 1);
        self.check_outage()?;
        self.check_key(&head.headers)?;
        let wall = self.clock.by_the_wall();
        let created = wall.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let plan = Plan::make(head, body, fate, created)?;
        let key = credential(&head.headers);
        let (verdict, standing) = self.gate.admit(key, plan.model(), plan.charge(), self.clock.since_start());
        let mut response = match verdict {
            Ok(slot) => self.answer(plan, fate, slot).await?,
            Err(refusal) => error(&Problem::refused(refusal, standing, plan.model(), self.settings.hints, wall)),
        };
        if self.settings.hints == Hints::OpenAiHeaders {
            hints::tell(response.headers_mut(), standing);
        }
        Ok(response)
    }

    fn check_outage(&self) -> Result<(), Problem> {
        let now = self.clock.since_start();
        if !self.settings.outage.as_ref().is_some_and(|outage| outage.contains(&now)) {
            return Ok(());
        }
        self.gate.count(|stats| *stats.faults.entry("outage").or_default() += 1);
        Err(Problem::outage())
    }

    fn check_key(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let Some(key) = &self.settings.key else { return Ok(()) };
        let given = credential(headers);
        if given.strip_prefix(b"Bearer ").unwrap_or(given) == key.as_bytes() {
            return Ok(());
        }
        self.gate.count(|stats| stats.unauthorized += 1);
        Err(Problem::unauthorized())
    }

    /// Answers a request that the quota let pass, unless a fault strikes it before its head.
    async fn answer(&self, plan: Plan, fate: &Fate, slot: Slot) -> Result<Response<Script>, End> {
        let fault = fate.fault.filter(|fault| plan.is_stream() || !fault.is_of_streams());
        let Some(slot) = self.strike(fault, slot).await? else { return Err(End::Cut) };
        let per_token = self.settings.per_token;
        let thinking_time = plan.thinking_time(fate.first_token, per_token);
        if !thinking_time.is_zero() {
            sleep(thinking_time).await;
        }
        Ok(plan.respond(fault, fate, per_token, slot))
    }

    /// Lets a fault strike that comes before the answer. Gives the slot back where there will be one.
    async fn strike(&self, fault: Option<Fault>, slot: Slot) -> Result<Option<Slot>, Problem> {
        let Some(fault) = fault else { return Ok(Some(slot)) };
        slot.count_fault(fault.name());
        let problem = Problem::injected(fault, self.settings.fault_hint, self.clock.by_the_wall());
        match (fault, problem) {
            (_, Some(problem)) => {
                slot.finish();
                return Err(problem);
            }
            (Fault::StallBeforeAnswer, _) => sleep(STALL).await,
            (Fault::ResetBeforeAnswer, _) => {}
            _ => return Ok(Some(slot)),
        }
        slot.finish();
        Ok(None)
    }
}

async fn read(body: Incoming) -> Result<Bytes, Problem> {
    // A length that is said is refused at once, while the client still sends.
    if body.size_hint().lower() > MAX_BODY as u64 {
        return Err(Problem::too_large(MAX_BODY));
    }
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Problem::too_large(MAX_BODY)),
        Err(error) => Err(Problem::invalid(None, format!("The request's body could not be read: {error}."))),
    }
}

/// Who asks: the API key as it was sent, empty without one.
fn credential(headers: &HeaderMap) -> &[u8] {
    headers.get(AUTHORIZATION).or_else(|| headers.get("x-api-key")).map_or(b"", HeaderValue::as_bytes)
}

fn error(problem: &Problem) -> Response<Script> {
    let mut response = document(problem.status, &problem.to_json(), None, None);
    for hint in &problem.hints {
        let value = HeaderValue::from_str(&hint.value).expect("digits, or a date");
        response.headers_mut().insert(HeaderName::from_static(hint.name), value);
    }
    response
}

fn stamp(headers: &mut HeaderMap, id: u64, arrived: Instant) {
    let id = HeaderValue::try_from(format!("req_{id:016x}")).expect("digits and letters");
    headers.insert(HeaderName::from_static("x-request-id"), id);
    let millis = u64::try_from(arrived.elapsed().as_millis()).unwrap_or(u64::MAX);
    headers.insert(HeaderName::from_static("openai-processing-ms"), millis.into());
}

impl From<Problem> for End {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}
