//! What the gateway does with each attempt, decided by the seed and the attempt's number, and the record of it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;

use super::clients::Kind;
use crate::gateway::{Seen, Step, answer};

/// What becomes of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// A whole answer, perhaps in pieces and after a while.
    Answered,
    /// An error of the client's own.
    ClientError,
    /// 429 or 5xx, most often with a hint.
    PassingError,
    /// An error whose body breaks off.
    BrokenError,
    /// A 200 whose stream brings an error and no output.
    ErrorFirst,
    /// A stream that says who will speak, and then breaks off or ends.
    Wordless,
    /// The connection is closed without a byte, perhaps after a while.
    Closed,
    /// The connection is closed in the middle of the head.
    HalfHead,
    /// What comes is not HTTP.
    Garbage,
    /// Nothing comes.
    Stalled,
    /// The answer breaks off between two events, or in a JSON body.
    CutBetween,
    /// The stream breaks off inside an event.
    CutInside,
    /// The stream stops in the middle, and the connection stays.
    StalledInside,
}

/// One attempt, as the gateway saw it.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub id: String,
    pub kind: Kind,
    pub model: String,
    pub client: String,
    pub at: Instant,
    /// Its place in the order of everything that happened.
    pub order: u64,
    pub fate: Fate,
    /// The body of the answer, as far as it was sent.
    pub body: Vec<u8>,
    /// It came on a connection that had been used before.
    pub reused: bool,
}

impl Attempt {
    /// Whether weir must take the connection for one that had gone stale in the pool.
    pub fn looks_stale(&self) -> bool {
        self.reused && matches!(self.fate, Fate::Closed | Fate::HalfHead)
    }

    /// Whether weir may have taken the error for one that its own wish for the usage has caused.
    pub fn may_be_for_the_option(&self) -> bool {
        self.kind == Kind::Stream && self.fate == Fate::ClientError
    }
}

/// Decides every fate, and notes it.
pub struct Tape {
    seed: u64,
    order: AtomicU64,
    attempts: Mutex<Vec<Attempt>>,
    /// Requests that came on each connection.
    used: Mutex<Vec<usize>>,
}

impl Tape {
    pub fn new(seed: u64) -> Self {
        Self { seed, order: AtomicU64::new(0), attempts: Mutex::default(), used: Mutex::default() }
    }

    /// The next place in the order of everything that happens.
    pub fn tick(&self) -> u64 {
        self.order.fetch_add(1, Ordering::Relaxed)
    }

    /// Every attempt, in order.
    pub fn attempts(&self) -> Vec<Attempt> {
        self.attempts.lock().expect("nobody panics with it").clone()
    }

    /// The gateway's script.
    pub fn script(self: &Arc<Self>) -> impl Fn(&Seen) -> Vec<Step> + Send + Sync + use<> {
        let tape = Arc::clone(self);
        move |seen| tape.decide(seen)
    }

    fn decide(&self, seen: &Seen) -> Vec<Step> {
        let header = |name| seen.header(name).first().map(|value| (*value).to_owned()).expect("every client sends it");
        let (id, kind) = (header("x-test-id"), Kind::named(&header("x-test-kind")));
        let mut rng = SmallRng::seed_from_u64(self.seed.wrapping_mul(1_000_003) + seen.number as u64);
        let fate = choose(kind, &mut rng);
        let asked = String::from_utf8_lossy(&seen.body).contains("include_usage");
        let (steps, body) = Composer { rng, id: &id, kind, asked, number: seen.number }.compose(fate);
        let attempt = Attempt {
            id,
            kind,
            model: header("x-test-model"),
            client: header("x-test-client"),
            at: seen.at,
            order: self.tick(),
            fate,
            body,
            reused: self.reuse(seen.connection),
        };
        self.attempts.lock().expect("nobody panics with it").push(attempt);
        steps
    }

    fn reuse(&self, connection: usize) -> bool {
        let mut used = self.used.lock().expect("nobody panics with it");
        if used.len() <= connection {
            used.resize(connection + 1, 0);
        }
        used[connection] += 1;
        used[connection] > 1
    }
}

fn choose(kind: Kind, rng: &mut SmallRng) -> Fate {
    const FATES: [(u32, Fate); 13] = [
        (64, Fate::Answered),
        (3, Fate::ClientError),
        (12, Fate::PassingError),
        (1, Fate::BrokenError),
        (4, Fate::ErrorFirst),
        (3, Fate::Wordless),
        (4, Fate::Closed),
        (1, Fate::HalfHead),
        (2, Fate::Garbage),
        (2, Fate::Stalled),
        (3, Fate::CutBetween),
        (3, Fate::CutInside),
        (1, Fate::StalledInside),
    ];
    let mut left = rng.random_range(0..FATES.iter().map(|(weight, _)| weight).sum());
    let mut fates = FATES.iter();
    let fate = loop {
        let (weight, fate) = fates.next().expect("the weights add up");
        match u32::checked_sub(left, *weight) {
            Some(rest) => left = rest,
            None => break *fate,
        }
    };
    let of_streams = matches!(fate, Fate::ErrorFirst | Fate::Wordless | Fate::CutInside | Fate::StalledInside);
    if of_streams && kind != Kind::Stream { Fate::Answered } else { fate }
}

/// Writes one answer.
struct Composer<'a> {
    rng: SmallRng,
    id: &'a str,
    kind: Kind,
    /// For the stream's usage: by weir, since no client does.
    asked: bool,
    number: usize,
}

impl Composer<'_> {
    /// The steps, and the bytes of the body among them.
    fn compose(mut self, fate: Fate) -> (Vec<Step>, Vec<u8>) {
        let mut steps = Vec::new();
        if self.rng.random_bool(0.3) {
            steps.push(self.wait(1..1500));
        }
        let body = match fate {
            Fate::Answered if self.kind == Kind::Stream => self.stream(&mut steps),
            Fate::Answered => self.document(&mut steps),
            Fate::ClientError => self.error(400, &mut steps),
            Fate::PassingError => self.passing_error(&mut steps),
            Fate::BrokenError => self.broken_document(503, &mut steps),
            Fate::ErrorFirst => self.error_first(&mut steps),
            Fate::Wordless => self.wordless(&mut steps),
            Fate::CutBetween if self.kind == Kind::Stream => self.cut_stream(false, &mut steps),
            Fate::CutBetween => self.broken_document(200, &mut steps),
            Fate::CutInside => self.cut_stream(true, &mut steps),
            Fate::StalledInside => self.cut_stream(false, &mut steps),
            Fate::HalfHead => self.raw(b"HTTP/1.1 200 OK\r\ncontent-", &mut steps),
            Fate::Garbage => self.raw(b"SSH-2.0-OpenSSH_9.2\r\n", &mut steps),
            Fate::Closed | Fate::Stalled => Vec::new(),
        };
        match fate {
            Fate::Stalled | Fate::StalledInside => steps.push(Step::Stall),
            Fate::Answered | Fate::ClientError | Fate::PassingError | Fate::ErrorFirst => {
                if self.rng.random_bool(0.2) {
                    steps.push(Step::CloseIdle(Duration::from_millis(self.rng.random_range(0..3000))));
                }
            }
            _ => steps.push(Step::Close),
        }
        (steps, body)
    }

    fn wait(&mut self, millis: Range<u64>) -> Step {
        Step::Wait(Duration::from_millis(self.rng.random_range(millis)))
    }

    fn raw(&self, bytes: &[u8], steps: &mut Vec<Step>) -> Vec<u8> {
        steps.push(Step::Send(bytes.to_vec()));
        Vec::new()
    }

    /// Names the request and the attempt, so that no answer can be taken for another.
    fn names(&self) -> String {
        format!(r#""id":"{}","attempt":{}"#, self.id, self.number)
    }

    fn text(&mut self) -> String {
        let padding = "x".repeat(self.rng.random_range(0..3000));
        let usage = r#""usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}"#;
        format!(r#"{{{},"padding":"{padding}",{usage}}}"#, self.names())
    }

    fn document(&mut self, steps: &mut Vec<Step>) -> Vec<u8> {
        let text = self.text();
        steps.extend(answer(200, &[("content-type", "application/json")], &text));
        text.into_bytes()
    }

    /// Declares more than it sends.
    fn broken_document(&mut self, status: u16, steps: &mut Vec<Step>) -> Vec<u8> {
        let text = self.text();
        let head = format!("HTTP/1.1 {status} Whatever\r\ncontent-type: application/json\r\n");
        steps.push(Step::Send(format!("{head}content-length: {}\r\n\r\n{text}", text.len() + 5).into_bytes()));
        text.into_bytes()
    }

    fn error(&mut self, status: u16, steps: &mut Vec<Step>) -> Vec<u8> {
        self.error_with(status, &[], steps)
    }

    fn passing_error(&mut self, steps: &mut Vec<Step>) -> Vec<u8> {
        let status = [429, 429, 500, 502, 503, 529][self.rng.random_range(0..6)];
        let millis = self.rng.random_range(1..3000).to_string();
        match self.rng.random_range(0..3) {
            0 => self.error_with(status, &[("retry-after-ms", &millis)], steps),
            1 => self.error_with(status, &[("retry-after", "1")], steps),
            _ => self.error_with(status, &[], steps),
        }
    }

    fn error_with(&mut self, status: u16, hints: &[(&str, &str)], steps: &mut Vec<Step>) -> Vec<u8> {
        let text =
            format!(r#"{{{},"error":{{"message":"no","type":"server_error","code":"upstream"}}}}"#, self.names());
        let headers: Vec<_> = [("content-type", "application/json")].into_iter().chain(hints.iter().copied()).collect();
        steps.extend(answer(status, &headers, &text));
        text.into_bytes()
    }

    fn stream_head(&self, steps: &mut Vec<Step>) {
        steps.push(crate::gateway::stream_head());
    }

    fn event(&self, number: usize) -> String {
        format!("data: {{{},\"choices\":[{{\"delta\":{{\"content\":\"word {number}\"}}}}]}}\n\n", self.names())
    }

    fn role(&self) -> String {
        format!("data: {{{},\"choices\":[{{\"delta\":{{\"role\":\"assistant\"}}}}]}}\n\n", self.names())
    }

    /// The role, as some gateways send it before all else.
    fn preamble(&mut self) -> String {
        if self.rng.random_bool(0.5) { self.role() } else { String::new() }
    }

    fn events(&mut self) -> Vec<String> {
        let count = self.rng.random_range(1..12);
        std::iter::once(self.preamble()).chain((0..count).map(|number| self.event(number))).collect()
    }

    fn stream(&mut self, steps: &mut Vec<Step>) -> Vec<u8> {
        const DONE: &str = "data: [DONE]\n\n";
        const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\n";
        let text = self.events().concat();
        let usage = if self.asked { USAGE } else { "" };
        self.stream_head(steps);
        self.pieces(format!("{text}{usage}{DONE}").as_bytes(), steps);
        steps.push(Step::Send(b"0\r\n\r\n".to_vec()));
        // That is not for the client.
        format!("{text}{DONE}").into_bytes()
    }

    fn error_first(&mut self, steps: &mut Vec<Step>) -> Vec<u8> {
        let preamble = self.preamble();
        let text = format!("{preamble}data: {{{},\"error\":{{\"message\":\"overloaded\"}}}}\n\n", self.names());
        self.stream_head(steps);
        self.pieces(text.as_bytes(), steps);
        steps.push(Step::Send(b"0\r\n\r\n".to_vec()));
        text.into_bytes()
    }

    fn wordless(&mut self, steps: &mut Vec<Step>) -> Vec<u8> {
        let text = self.role();
        self.stream_head(steps);
        // In one piece, so that it is not held for too long to be tried again.
        steps.push(crate::gateway::chunk(&text));
        if self.rng.random_bool(0.5) {
            steps.push(Step::Send(b"0\r\n\r\n".to_vec()));
        }
        text.into_bytes()
    }

    fn cut_stream(&mut self, inside: bool, steps: &mut Vec<Step>) -> Vec<u8> {
        let mut text = self.events().concat();
        if inside {
            let last = self.event(99);
            text.push_str(&last[..self.rng.random_range(1..last.len() - 2)]);
        }
        self.stream_head(steps);
        self.pieces(text.as_bytes(), steps);
        text.into_bytes()
    }

    /// Sends the text in chunks that know nothing of events.
    fn pieces(&mut self, mut text: &[u8], steps: &mut Vec<Step>) {
        while !text.is_empty() {
            let length = self.rng.random_range(1..400).min(text.len());
            let (piece, rest) = text.split_at(length);
            steps.push(crate::gateway::chunk(std::str::from_utf8(piece).expect("ASCII")));
            if self.rng.random_bool(0.3) {
                steps.push(self.wait(1..400));
            }
            text = rest;
        }
    }
}
