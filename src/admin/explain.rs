//! `/explain`: which limits a client's next request for a model has to pass, how they stand, and how long it would have to wait.
//! `weir explain` asks for it.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::limit::{Breaker, CoolDown, HeldBy, LimitStatus, rounded, seconds};
use super::status::state;
use crate::admission::{Lane, LaneView, Level, LimitView, Newcomer, Outlook, Scope};
use crate::clients::{ClientId, Clients, Tenant};
use crate::config::Mode;
use crate::metrics::{ModelReading, Outcome, Reading};
use crate::models::ModelId;
use crate::proxy::Proxy;

/// A request is taken to be of that size where nothing was seen yet.
const UNKNOWN_TOKENS: u64 = 1000;

/// What is said of a request that would be.
const REFUSED: &str = "is refused";

/// What is asked.
#[derive(Debug, Default)]
pub struct Question {
    /// A client's name; without, whoever has none.
    pub client: Option<String>,
    /// A model's name, as a client would send it; without, a call that names none.
    pub model: Option<String>,
    /// What the request is taken to cost.
    pub tokens: Option<u64>,
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct Explanation {
    schema: u32,
    /// As in /status.json.
    state: &'static str,
    client: ClientPart,
    model: ModelPart,
    /// What the request is taken to cost, and why that.
    tokens: u64,
    tokens_from: &'static str,
    /// `passes`, `waits`, or `is refused`.
    next: &'static str,
    /// How long it would wait: an expectation.
    expected_wait_seconds: f64,
    max_wait_seconds: f64,
    held_by: Option<HeldBy>,
    /// In a sentence.
    why: String,
    /// Every limit on its way, in the order in which they are looked at; what was learned comes last.
    limits: Vec<LimitStatus>,
    queue: QueuePart,
    /// Upstream keys with which the model was used, the caller's own first. Which keys they are is not told.
    lanes: Vec<LanePart>,
    lanes_not_listed: usize,
}

#[derive(Debug, Serialize)]
struct ClientPart {
    name: Arc<str>,
    weight: f64,
    in_flight: u64,
    waiting: u64,
}

#[derive(Debug, Serialize)]
struct ModelPart {
    asked: Option<String>,
    /// As metrics and limits know it.
    name: Arc<str>,
    /// In a sentence, where that is not what was asked for.
    note: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct QueuePart {
    /// All who wait in weir, and those who wait for this model.
    waiting: u64,
    waiting_limit: u64,
    waiting_for_model: u64,
    /// What part of the limit that holds it up is this client's, while others wait for it too: 0 to 1.
    share: f64,
}

#[derive(Debug, Serialize)]
struct LanePart {
    /// It is the caller's.
    own: bool,
    in_flight: u32,
    waiting: u64,
    limits: Vec<LimitStatus>,
    cool_down: Option<CoolDown>,
    breaker: Breaker,
}

/// A question that cannot be answered.
#[derive(Debug, Serialize)]
pub struct Unknown {
    error: String,
    /// The clients that there are.
    clients: Vec<Arc<str>>,
}

impl Explanation {
    /// What awaits such a request at this proxy, of which so much was counted so far. `ready` says that it is not about to stop.
    ///
    /// # Errors
    /// The client is not known.
    pub fn of(question: &Question, proxy: &Proxy, reading: &Reading, ready: bool) -> Result<Self, Unknown> {
        let (clients, config) = (proxy.clients(), proxy.config());
        let client = client_of(question, &clients)?;
        let (model, part) = model_of(question, proxy);
        let (tokens, tokens_from) = tokens_of(question, model, reading);
        let tenant = if client == ClientId::NONE { Tenant::Shared } else { Tenant::Named(client) };
        let lane = Lane { credential: clients.credential(client), model };
        let newcomer = Newcomer { tenant, weight: clients.weight(client), lane, tokens };
        let outlook = proxy.gate().outlook(&newcomer);
        let gauges = proxy.gauges();
        let waiting: u64 = gauges.models.iter().map(|model| model.waiting).sum();
        let of_model: u64 = outlook.lanes.iter().map(|lane| lane.waiting).sum();
        let max_wait = clients.max_wait(client).unwrap_or(config.queue.max_wait).min(config.timeouts.deadline);
        let is_stranger = client == ClientId::NONE && !config.clients.is_empty();
        let (next, why) = if is_stranger { turned_away(&clients) } else { verdict(&outlook, max_wait) };
        let held_by = if is_stranger { None } else { held_by(&outlook) };
        Ok(Self {
            schema: 1,
            state: state(ready),
            client: ClientPart {
                name: clients.name(client).clone(),
                weight: f64::from(newcomer.weight.thousandths()) / 1000.0,
                in_flight: outlook.own_in_flight,
                waiting: outlook.own_waiting,
            },
            tokens,
            tokens_from,
            next,
            expected_wait_seconds: seconds(outlook.expected),
            max_wait_seconds: seconds(max_wait),
            held_by,
            why,
            limits: outlook.path.iter().flat_map(LimitStatus::of).collect(),
            queue: QueuePart {
                waiting,
                waiting_limit: gauges.waiting_limit,
                waiting_for_model: of_model,
                share: rounded(outlook.share),
            },
            lanes: outlook.lanes.iter().map(|lane| LanePart::of(lane, &part.name)).collect(),
            lanes_not_listed: outlook.more_lanes,
            model: part,
        })
    }
}

impl LanePart {
    fn of(lane: &LaneView, model: &Arc<str>) -> Self {
        let scope = Scope::Model(model.clone());
        let view = LimitView { scope, mode: Mode::Enforce, level: Level::Pace(lane.pace), waiting: lane.held };
        Self {
            own: lane.own,
            in_flight: lane.pace.in_flight,
            waiting: lane.waiting,
            limits: LimitStatus::of(&view),
            cool_down: lane.pace.closed.map(|(why, left)| CoolDown::new(why, left)),
            breaker: Breaker::of(&lane.pace),
        }
    }
}

/// What becomes of a request without the key of a client, where there are clients.
fn turned_away(clients: &Clients) -> (&'static str, String) {
    let names: Vec<&str> = clients.ids().map(|id| &**clients.name(id)).collect();
    let who = names.join(", ");
    (
        REFUSED,
        format!(
            "weir has [clients], and answers 401 (invalid_api_key) to a request without a key of theirs; there are: {who}"
        ),
    )
}

fn client_of(question: &Question, clients: &Clients) -> Result<ClientId, Unknown> {
    let Some(name) = question.client.as_deref().filter(|name| **name != **clients.name(ClientId::NONE)) else {
        return Ok(ClientId::NONE);
    };
    clients.find_by_name(name).ok_or_else(|| Unknown {
        error: format!("there is no client {name:?} in the configuration"),
        clients: clients.ids().map(|id| clients.name(id).clone()).collect(),
    })
}

fn model_of(question: &Question, proxy: &Proxy) -> (ModelId, ModelPart) {
    let Some(asked) = question.model.clone() else {
        let note = "no model was given: this is about calls that name none, such as GET /v1/models";
        return (ModelId::NONE, ModelPart { asked: None, name: proxy.models().name(ModelId::NONE), note: Some(note) });
    };
    let model = proxy.models().find(&asked);
    let note = (model == ModelId::OTHER).then_some(
        "weir does not know this model by name: it is in no [models] table, and the gateway has not served it yet. Such \
         models count as \"other\", together, under the limits of [models.\"*\"]",
    );
    (model, ModelPart { asked: Some(asked), name: proxy.models().name(model), note })
}

/// What a request for the model usually costs.
fn tokens_of(question: &Question, model: ModelId, reading: &Reading) -> (u64, &'static str) {
    if let Some(tokens) = question.tokens {
        return (tokens, "as asked");
    }
    if model == ModelId::NONE {
        return (0, "a call that names no model costs no tokens");
    }
    let of_model = reading.models.iter().find(|(id, _)| *id == model).map(|(_, reading)| reading);
    let mean = |reading: &ModelReading| reading.counts.all_tokens().checked_div(reading.counts.outcome(Outcome::Ok));
    match of_model.and_then(mean).filter(|tokens| *tokens > 0) {
        Some(tokens) => (tokens, "the mean of the model's answers so far"),
        None => (UNKNOWN_TOKENS, "a guess: nothing was seen of the model yet"),
    }
}

fn held_by(outlook: &Outlook) -> Option<HeldBy> {
    let (place, hold) = outlook.held_up_by?;
    outlook.path.get(place).map(|limit| HeldBy::of(limit, hold))
}

/// What would become of it, in a word and in a sentence.
fn verdict(outlook: &Outlook, max_wait: Duration) -> (&'static str, String) {
    // Whoever tries whether a gateway is back that was given up has nothing in its way.
    let Some(held) = held_by(outlook) else {
        return ("passes", "nothing is in its way".to_owned());
    };
    if outlook.given_up {
        return (REFUSED, "the gateway has failed for so long (breaker.give_up) that nobody waits for it".to_owned());
    }
    let last = outlook.last.and_then(|place| outlook.path.get(place)).map(|limit| HeldBy::of(limit, None).text);
    let also = last.filter(|text| outlook.last != outlook.held_up_by.map(|(place, _)| place) && *text != held.text);
    let also = also.map_or_else(String::new, |text| format!("; then {text} takes longest"));
    if outlook.at_least > max_wait {
        return (REFUSED, format!("{}{also}; that takes longer than it may wait", held.text));
    }
    if outlook.no_place {
        return (REFUSED, format!("the queue is full (queue.max_waiting), held up by {}", held.text));
    }
    if outlook.expected > max_wait {
        let why = "that is expected to take longer than it may wait: it may be refused, at once or when its time is up";
        return ("waits", format!("{}{also}; {why}", held.text));
    }
    ("waits", format!("{}{also}", held.text))
}
