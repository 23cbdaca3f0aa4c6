//! Reading a request: what it asks for, and how long it may wait.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Uri, request};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::body::{self, Read, ReadLimits, Upload, UploadWatch};
use super::fields;
use super::route::Route;
use super::settings::Settings;
use super::{Asked, Proxy, Shared};
use crate::admission::{Applicant, HeldBytes, Lane, Size};
use crate::clients::Caller;
use crate::config::Config;
use crate::error::{Cause, Failure};
use crate::ledger::Ledger;
use crate::models::ModelId;
use crate::openai::call::{self, Endpoint};
use crate::openai::headers;
use crate::openai::stream_options::{self, Splice};
use crate::upstream::{Outgoing, Payload, Streamed, target};

/// An opaque call's body up to this is read before it is sent, and can be sent again; a longer one streams through.
const MAX_REPLAYED: u64 = 1 << 20;

/// How long a call whose body streams through may wait for its slot: weir can't see such a client hang up.
const MAX_UPLOAD_WAIT: Duration = Duration::from_secs(10);

/// A request that was read and found good.
pub(super) struct Call<'s> {
    /// What was in force when it arrived.
    pub(super) settings: &'s Settings,
    pub(super) outgoing: Outgoing,
    pub(super) body: CallBody,
    pub(super) endpoint: Option<Endpoint>,
    pub(super) model: ModelId,
    /// As the client wrote it.
    pub(super) model_name: Option<String>,
    pub(super) stream: bool,
    /// What its cost is estimated from; `None` for a call that costs no tokens.
    size: Option<Size>,
    /// Who asks for its stream's usage.
    pub(super) usage: AsksUsage,
    /// Whose request it is.
    pub(super) caller: Caller,
    /// Retries that the client's SDK has made already.
    pub(super) by_client: u32,
    /// How long the client waits for an answer, where it says so.
    pub(super) patience: Option<Duration>,
    /// The memory that the body takes.
    _held: HeldBytes,
}

/// Who asks for a stream's usage.
pub(super) enum AsksUsage {
    /// The body goes out as the client wrote it.
    AsWritten,
    /// weir does in its place, with this splice, and keeps the answer to itself.
    ForClient(Splice),
    /// weir did, and the gateway refused it; now the body goes out as the client wrote it.
    InVain,
}

pub(super) enum CallBody {
    Whole(Bytes),
    /// Taken by the only attempt.
    Upload(Option<Streamed>, Arc<UploadWatch>),
}

impl Proxy {
    /// Where the request goes at the gateway.
    pub(super) fn target(settings: &Settings, route: &Route<'_>, query: Option<&str>) -> Result<Uri, Failure> {
        target(&settings.config.upstream.base_url, route.below_v1, query)
            .ok_or_else(|| Failure::new(Cause::BadRequest, "the request's path cannot be put behind upstream.base_url"))
    }

    /// Reads what the request asks for, and its body unless that streams through.
    pub(super) async fn read<'s>(
        &self,
        mut head: request::Parts,
        target: Uri,
        endpoint: Option<Endpoint>,
        caller: Caller,
        asked: &mut Asked<'s>,
        ledger: &mut Ledger,
    ) -> Result<Call<'s>, Failure> {
        let settings = asked.settings;
        let mut held = self.shared.memory.hold(caller.tenant, settings.clients.weight(caller.client));
        let body = read_body(&settings.config, endpoint, &mut asked.body, &mut held, ledger).await?;
        let peek = match (&body, endpoint) {
            (CallBody::Whole(bytes), Some(_)) => call::peek(bytes).map_err(|duplicate| duplicate_key(&duplicate))?,
            _ => call::Peek::default(),
        };
        let model = self.model(endpoint, peek.model.as_deref());
        ledger.set_model(model);
        ledger.asks(peek.stream, peek.model.as_deref());
        let (by_client, patience) = (headers::client_retries(&head.headers), headers::client_patience(&head.headers));
        let Settings { host, key, .. } = settings;
        fields::to_upstream(&mut head, host, &self.shared.via, key.as_ref(), endpoint.is_some());
        let outgoing = Outgoing::new(head.method, &target, &head.headers, fields::goes_on);
        let size = endpoint.map(|endpoint| size_of(endpoint, &peek));
        let may_be_asked = || self.shared.usage_option.may_be_asked(model, Instant::now());
        let usage = match (endpoint, peek.usage) {
            (Some(Endpoint::ChatCompletions), stream_options::AsksUsage::Unsaid(splice)) if may_be_asked() => {
                AsksUsage::ForClient(splice)
            }
            _ => AsksUsage::AsWritten,
        };
        let (model_name, stream) = (peek.model, peek.stream);
        Ok(Call {
            settings,
            outgoing,
            body,
            endpoint,
            model,
            model_name,
            stream,
            size,
            usage,
            caller,
            by_client,
            patience,
            _held: held,
        })
    }

    fn model(&self, endpoint: Option<Endpoint>, name: Option<&str>) -> ModelId {
        match (endpoint, name) {
            (None, _) => ModelId::NONE,
            (Some(_), Some(name)) => self.shared.models.find(name),
            (Some(_), None) => ModelId::OTHER,
        }
    }

    /// How it applies for a permit, at each of its attempts.
    pub(super) fn applicant(&self, call: &Call<'_>, arrived: Instant) -> Applicant {
        let Shared { gate, .. } = &*self.shared;
        let Settings { config, clients, .. } = call.settings;
        let Caller { client, tenant, credential, .. } = call.caller;
        let (cost, first_byte) = match call.size {
            Some(size) => gate.estimate(call.model, size, call.stream),
            None => Default::default(),
        };
        // A client that waits for an answer waits for the gateway too.
        let patience = call.patience.map_or(Duration::MAX, |patience| patience.saturating_sub(first_byte));
        let bound = patience.min(config.timeouts.deadline);
        let mut max_wait = clients.max_wait(client).unwrap_or(config.queue.max_wait).min(bound);
        let mut until = arrived + max_wait;
        if !call.body.is_whole() {
            max_wait = max_wait.min(MAX_UPLOAD_WAIT);
            // From now: its beginning may have taken longer than that to come.
            until = until.min(Instant::now() + max_wait);
        }
        Applicant {
            tenant,
            weight: clients.weight(client),
            lane: Lane { credential, model: call.model },
            rank: gate.next_rank(),
            size: call.size,
            cost,
            max_wait,
            until,
        }
    }
}

impl Call<'_> {
    /// What an attempt sends.
    pub(super) fn payload(&mut self) -> Payload {
        match (&mut self.body, &self.usage) {
            (CallBody::Whole(bytes), AsksUsage::ForClient(splice)) => Payload::Whole(splice.apply(bytes)),
            (CallBody::Whole(bytes), _) => Payload::Whole(bytes.clone()),
            (CallBody::Upload(upload, _), _) => {
                Payload::Streamed(upload.take().expect("a body that streams through is sent once"))
            }
        }
    }

    /// Whether sending it twice does no harm: a metered call only costs more, an idempotent method is meant for it.
    pub(super) fn is_repeatable(&self) -> bool {
        self.endpoint.is_some() || self.outgoing.method().is_idempotent()
    }
}

impl CallBody {
    pub(super) fn is_whole(&self) -> bool {
        matches!(self, Self::Whole(_))
    }
}

/// Reads the body into memory, as far as that is wanted: all of a metered call's, the beginning of another's.
async fn read_body(
    config: &Config,
    endpoint: Option<Endpoint>,
    body: &mut Option<Incoming>,
    held: &mut HeldBytes,
    ledger: &mut Ledger,
) -> Result<CallBody, Failure> {
    let limits = ReadLimits {
        max: if endpoint.is_some() { config.server.max_body } else { MAX_REPLAYED },
        timeout: config.server.body_timeout,
        deadline: ledger.arrived() + config.timeouts.deadline,
    };
    let begun_reading = Instant::now();
    let incoming = body.as_mut().expect("a body is read once");
    let mut received = 0;
    let read = body::read(incoming, limits, held, &mut received).await;
    ledger.received(received);
    let read = read?;
    ledger.spent_elsewhere(begun_reading.elapsed());
    match read {
        Read::Whole(bytes) => Ok(CallBody::Whole(bytes)),
        Read::Longer(_) if endpoint.is_some() => Err(body::too_large(limits.max)),
        Read::Longer(begun) => {
            let watch = Arc::<UploadWatch>::default();
            let rest = body.take().expect("a body is read once");
            let upload = Upload::new(rest, config.server.body_timeout, watch.clone());
            ledger.streams_in(upload.counter());
            Ok(CallBody::Upload(Some(Streamed::new(begun, upload)), watch))
        }
    }
}

/// What its cost is estimated from. An embedding has no output.
fn size_of(endpoint: Endpoint, peek: &call::Peek) -> Size {
    let max_output = if endpoint == Endpoint::Embeddings { Some(0) } else { peek.max_tokens };
    Size { prompt: peek.prompt, max_output, choices: peek.choices }
}

/// Paths of the other listener, which a probe or a scraper may look for here.
const OPERATORS_PATHS: [&str; 7] = ["/status", "/status.json", "/explain", "/metrics", "/livez", "/readyz", "/reload"];

/// The path is not one that weir serves: most likely the client's base URL is wrong.
pub(super) fn unknown_path(head: &request::Parts) -> Failure {
    let path = head.uri.path();
    if OPERATORS_PATHS.contains(&path) {
        let message =
            format!("weir serves clients here, and {path} to operators at another address (server.admin_listen)");
        return Failure::new(Cause::UnknownPath, message);
    }
    let host = head.headers.get(http::header::HOST).and_then(|host| host.to_str().ok());
    let host = host.or(head.uri.authority().map(http::uri::Authority::as_str)).unwrap_or("HOST:PORT");
    let message = format!(
        "weir serves the paths under /v1, and {path} is not one of them; set your client's base URL to http://{host}/v1"
    );
    Failure::new(Cause::UnknownPath, message)
}

fn duplicate_key(duplicate: &call::DuplicateKey) -> Failure {
    let message = format!("{:?} stands twice in the request's body; send it once", duplicate.0);
    Failure::new(Cause::DuplicateKey, message)
}
