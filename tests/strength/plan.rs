//! What is asked for, and what the gateway does with it: decided by the seed, the request's number and the attempt's, so
//! that the client can tell what its answer has to be without asking the gateway.

use std::ops::Range;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Json,
    Stream,
    /// Opaque and idempotent.
    Get,
    /// The same, with an answer that fills every buffer on its way.
    Download,
    /// Opaque, and perhaps not to be done twice.
    Post,
    /// Opaque, and too long to be held.
    Upload,
}

impl Kind {
    const ALL: [(u32, Self, &'static str); 6] = [
        (430, Self::Json, "json"),
        (350, Self::Stream, "stream"),
        (107, Self::Get, "get"),
        (3, Self::Download, "download"),
        (90, Self::Post, "post"),
        (20, Self::Upload, "upload"),
    ];

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, _, known)| *known == name).map(|(_, kind, _)| *kind)
    }

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind, _)| *kind == self).expect("every kind is there").2
    }

    pub fn random(rng: &mut SmallRng) -> Self {
        pick(rng, Self::ALL.iter().map(|(weight, kind, _)| (*weight, *kind)))
    }

    /// Whether sending it twice does no harm.
    pub fn is_repeatable(self) -> bool {
        !matches!(self, Self::Post | Self::Upload)
    }
}

/// What becomes of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    Answered,
    /// An error of the client's own.
    ClientError,
    /// An error with a hint when to come back.
    Hinted,
    /// An error without one.
    Unhinted,
    /// An error whose body breaks off.
    BrokenError,
    /// A 200 whose stream brings an error and no output.
    ErrorFirst,
    /// A stream that says who will speak, and ends or breaks off.
    Wordless,
    /// The connection is closed, or reset, without a byte.
    Closed,
    Reset,
    /// The same in the middle of the head.
    HalfHead,
    /// What comes is not HTTP.
    Garbage,
    /// Nothing comes.
    Stalled,
    /// The answer breaks off: behind the head, between two events or in a document, or inside an event.
    CutBehindHead,
    CutBetween,
    CutInside,
    /// The same with a reset, which may destroy what was sent before.
    ResetInside,
    /// A chunk's size is no number.
    BadChunk,
    /// The answer stops in the middle, and the connection stays.
    StalledInside,
    /// An error before the body was read.
    Early,
    /// The connection is closed as soon as the request comes, which is not read.
    Slammed,
}

impl Fate {
    /// What may come of the request is not known to who sent it.
    pub fn leaves_doubt(self) -> bool {
        use Fate::{Closed, Garbage, HalfHead, Reset, Slammed, Stalled};
        matches!(self, Closed | Reset | HalfHead | Garbage | Stalled | Slammed)
    }

    /// On a used connection it looks as if the gateway had closed that before.
    pub fn looks_stale(self) -> bool {
        matches!(self, Self::Closed | Self::Reset | Self::HalfHead | Self::Slammed)
    }

    /// The answer that it brings is whole.
    pub fn is_whole(self) -> bool {
        use Fate::{Answered, ClientError, Early, ErrorFirst, Hinted, Unhinted, Wordless};
        matches!(self, Answered | ClientError | Hinted | Unhinted | ErrorFirst | Wordless | Early)
    }
}

/// What the gateway does on the socket.
#[derive(Debug, Clone)]
pub enum Move {
    Send(Vec<u8>),
    Wait(Duration),
    /// Nothing more until weir closes the connection.
    Stall,
    Close,
    Reset,
    /// Closes the connection that much later, without looking whether something has come.
    CloseAfter(Duration),
    /// Closes it in the moment in which the next request comes on it.
    SlamNext,
}

/// The whole of one attempt.
pub struct Script {
    pub fate: Fate,
    pub moves: Vec<Move>,
    /// The answer's body, as a client may see it: whole, or as far as it was sent.
    pub visible: Vec<u8>,
}

/// How a gateway behaves.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    /// Without them every request is answered, after `latency`.
    pub faults: bool,
    pub latency: Duration,
}

impl Plan {
    pub fn faulty(seed: u64) -> Self {
        Self { seed, faults: true, latency: Duration::ZERO }
    }

    pub fn steady(latency: Duration) -> Self {
        Self { seed: 0, faults: false, latency }
    }

    /// Chance for one purpose.
    pub fn rng(&self, purpose: u64, number: u64) -> SmallRng {
        // Odd factors, so that neighbours share nothing.
        let mixed = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ purpose.wrapping_mul(0xd1b5_4a32_d192_ed03);
        SmallRng::seed_from_u64(mixed.wrapping_add(number.wrapping_mul(0x2545_f491_4f6c_dd1d)))
    }

    /// What becomes of the `attempt`-th attempt (from 1) at a request. `asked` says that weir asks for the usage, which is
    /// not for the client to see.
    pub fn script(&self, id: u64, attempt: u32, kind: Kind, asked: bool) -> Script {
        let (fate, rng) = self.decide(id, attempt, kind);
        let mut composer = Composer { rng, id, attempt, kind, asked, faults: self.faults, moves: Vec::new() };
        if !self.latency.is_zero() {
            composer.moves.push(Move::Wait(self.latency));
        }
        let visible = composer.compose(fate);
        Script { fate, moves: composer.moves, visible }
    }

    /// The fate alone.
    pub fn fate(&self, id: u64, attempt: u32, kind: Kind) -> Fate {
        self.decide(id, attempt, kind).0
    }

    fn decide(&self, id: u64, attempt: u32, kind: Kind) -> (Fate, SmallRng) {
        let mut rng = self.rng(u64::from(attempt), id);
        let fate = if self.faults { choose(kind, &mut rng) } else { Fate::Answered };
        (fate, rng)
    }
}

fn pick<T>(rng: &mut SmallRng, weighted: impl Iterator<Item = (u32, T)> + Clone) -> T {
    let mut left = rng.random_range(0..weighted.clone().map(|(weight, _)| weight).sum::<u32>());
    for (weight, it) in weighted {
        match left.checked_sub(weight) {
            Some(rest) => left = rest,
            None => return it,
        }
    }
    unreachable!("the weights add up")
}

/// One in six or so is a fault that weir tries again: more would be more than its budget for retries.
const FATES: [(u32, Fate); 19] = [
    (760, Fate::Answered),
    (15, Fate::ClientError),
    (25, Fate::Hinted),
    (15, Fate::Unhinted),
    (8, Fate::BrokenError),
    (15, Fate::ErrorFirst),
    (12, Fate::Wordless),
    (12, Fate::Closed),
    (10, Fate::Reset),
    (8, Fate::HalfHead),
    (8, Fate::Garbage),
    (5, Fate::Stalled),
    (12, Fate::CutBehindHead),
    (20, Fate::CutBetween),
    (15, Fate::CutInside),
    (15, Fate::ResetInside),
    (10, Fate::BadChunk),
    (5, Fate::StalledInside),
    (30, Fate::Early),
];

fn choose(kind: Kind, rng: &mut SmallRng) -> Fate {
    let fate = pick(rng, FATES.iter().copied());
    match (fate, kind) {
        (Fate::ErrorFirst | Fate::Wordless | Fate::CutInside, kind) if kind != Kind::Stream => Fate::Answered,
        (Fate::Early, kind) if kind != Kind::Upload => Fate::Answered,
        (fate, _) => fate,
    }
}

const DONE: &str = "data: [DONE]\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\n";

/// Writes one answer.
struct Composer {
    rng: SmallRng,
    id: u64,
    attempt: u32,
    kind: Kind,
    asked: bool,
    faults: bool,
    moves: Vec<Move>,
}

impl Composer {
    /// Writes the moves, and returns the body.
    fn compose(&mut self, fate: Fate) -> Vec<u8> {
        let streams = self.kind == Kind::Stream;
        if self.faults && self.rng.random_bool(0.2) {
            self.wait(1..40);
        }
        let visible = match fate {
            Fate::Answered if streams => self.stream(),
            Fate::Answered => self.document(),
            Fate::ClientError => self.error(400, ""),
            Fate::Hinted => self.hinted(),
            Fate::Unhinted => self.unhinted(),
            Fate::Early => self.error(413, ""),
            Fate::BrokenError => self.broken_document(503),
            Fate::ErrorFirst => self.error_first(),
            Fate::Wordless => self.wordless(),
            Fate::CutBehindHead => self.head_alone(),
            Fate::CutBetween | Fate::StalledInside | Fate::BadChunk if streams => self.cut_stream(false),
            Fate::CutInside => self.cut_stream(true),
            Fate::ResetInside if streams => {
                let inside = self.rng.random_bool(0.5);
                self.cut_stream(inside)
            }
            Fate::CutBetween | Fate::StalledInside | Fate::ResetInside => self.broken_document(200),
            Fate::BadChunk => self.chunked_document(),
            Fate::HalfHead => self.raw("HTTP/1.1 200 OK\r\ncontent-"),
            Fate::Garbage => self.raw("SSH-2.0-OpenSSH_9.2\r\n"),
            Fate::Closed | Fate::Reset | Fate::Stalled | Fate::Slammed => Vec::new(),
        };
        if fate == Fate::BadChunk {
            self.send("zz\r\n");
        }
        self.end(fate);
        visible
    }

    /// What becomes of the connection.
    fn end(&mut self, fate: Fate) {
        match fate {
            Fate::Stalled | Fate::StalledInside => self.moves.push(Move::Stall),
            Fate::Reset | Fate::ResetInside => self.moves.push(Move::Reset),
            Fate::Early => self.moves.push(Move::Close),
            Fate::Wordless if matches!(self.moves.last(), Some(Move::Close)) => {}
            Fate::BrokenError | Fate::HalfHead | Fate::CutBehindHead => {
                let resets = self.rng.random_bool(0.3);
                self.moves.push(if resets { Move::Reset } else { Move::Close });
            }
            whole if whole.is_whole() && self.faults => match self.rng.random_range(0..100) {
                0..8 => {
                    let after = Duration::from_micros(self.rng.random_range(0..3000));
                    self.moves.push(Move::CloseAfter(after));
                }
                8..12 => self.moves.push(Move::SlamNext),
                _ => {}
            },
            whole if whole.is_whole() => {}
            _ => self.moves.push(Move::Close),
        }
    }

    fn wait(&mut self, millis: Range<u64>) {
        let wait = Duration::from_millis(self.rng.random_range(millis));
        self.moves.push(Move::Wait(wait));
    }

    fn send(&mut self, bytes: impl Into<Vec<u8>>) {
        self.moves.push(Move::Send(bytes.into()));
    }

    fn raw(&mut self, text: &str) -> Vec<u8> {
        self.send(text);
        Vec::new()
    }

    /// Names the request and the attempt, so that no answer can be taken for another.
    fn names(&self) -> String {
        format!(r#""id":{},"attempt":{}"#, self.id, self.attempt)
    }

    fn head(&self, status: u16, kind: &str, framing: &str) -> String {
        let Self { id, attempt, .. } = self;
        format!(
            "HTTP/1.1 {status} Whatever\r\ncontent-type: {kind}\r\nx-test-id: {id}\r\nx-test-attempt: {attempt}\r\n{framing}\r\n"
        )
    }

    fn text(&mut self) -> String {
        let most = if self.kind == Kind::Download { 4 << 20 } else { 3000 };
        let padding = "x".repeat(self.rng.random_range(most / 4..most));
        format!(
            r#"{{{},"padding":"{padding}","usage":{{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}}}"#,
            self.names()
        )
    }

    fn document(&mut self) -> Vec<u8> {
        if self.rng.random_bool(0.3) {
            let visible = self.chunked_document();
            self.send("0\r\n\r\n");
            return visible;
        }
        let text = self.text();
        let head = self.head(200, "application/json", &format!("content-length: {}\r\n", text.len()));
        self.send(head + &text);
        text.into_bytes()
    }

    fn chunked_document(&mut self) -> Vec<u8> {
        let text = self.text();
        let head = self.head(200, "application/json", "transfer-encoding: chunked\r\n");
        self.send(head);
        self.pieces(&text);
        text.into_bytes()
    }

    /// Declares more than it sends.
    fn broken_document(&mut self, status: u16) -> Vec<u8> {
        let text = self.text();
        let head = self.head(status, "application/json", &format!("content-length: {}\r\n", text.len() + 5));
        self.send(head + &text);
        text.into_bytes()
    }

    fn head_alone(&mut self) -> Vec<u8> {
        let head = match self.kind {
            Kind::Stream => self.head(200, "text/event-stream", "transfer-encoding: chunked\r\n"),
            _ => self.head(200, "application/json", "content-length: 1000\r\n"),
        };
        self.send(head);
        Vec::new()
    }

    fn hinted(&mut self) -> Vec<u8> {
        let status = [429, 503, 529][self.rng.random_range(0..3)];
        let hint = format!("retry-after-ms: {}\r\n", self.rng.random_range(1..30));
        self.error(status, &hint)
    }

    fn unhinted(&mut self) -> Vec<u8> {
        let status = [500, 502, 503, 504][self.rng.random_range(0..4)];
        self.error(status, "")
    }

    fn error(&mut self, status: u16, hint: &str) -> Vec<u8> {
        let text =
            format!(r#"{{{},"error":{{"message":"no","type":"server_error","code":"upstream"}}}}"#, self.names());
        let head = self.head(status, "application/json", &format!("{hint}content-length: {}\r\n", text.len()));
        self.send(head + &text);
        text.into_bytes()
    }

    fn stream_head(&mut self) {
        let head = self.head(200, "text/event-stream", "transfer-encoding: chunked\r\n");
        self.send(head);
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

    fn events(&mut self) -> String {
        let count = self.rng.random_range(1..12);
        let preamble = self.preamble();
        preamble + &(0..count).map(|number| self.event(number)).collect::<String>()
    }

    fn stream(&mut self) -> Vec<u8> {
        let text = self.events();
        let usage = if self.asked { USAGE } else { "" };
        self.stream_head();
        self.pieces(&format!("{text}{usage}{DONE}"));
        self.send("0\r\n\r\n");
        format!("{text}{DONE}").into_bytes()
    }

    fn error_first(&mut self) -> Vec<u8> {
        let preamble = self.preamble();
        let text = format!("{preamble}data: {{{},\"error\":{{\"message\":\"overloaded\"}}}}\n\n", self.names());
        self.stream_head();
        self.pieces(&text);
        self.send("0\r\n\r\n");
        text.into_bytes()
    }

    fn wordless(&mut self) -> Vec<u8> {
        let text = self.role();
        self.stream_head();
        self.send(chunk(&text));
        match self.rng.random_bool(0.5) {
            true => self.send("0\r\n\r\n"),
            false => self.moves.push(Move::Close),
        }
        text.into_bytes()
    }

    fn cut_stream(&mut self, inside: bool) -> Vec<u8> {
        let mut text = self.events();
        if inside {
            let last = self.event(99);
            text.push_str(&last[..self.rng.random_range(1..last.len() - 2)]);
        }
        self.stream_head();
        self.pieces(&text);
        text.into_bytes()
    }

    /// Sends the text in chunks that know nothing of events, at times as a drip.
    fn pieces(&mut self, mut text: &str) {
        let most = if text.len() > 100_000 { 60_000 } else { 400 };
        let drips = self.faults && self.rng.random_bool(0.1);
        while !text.is_empty() {
            let (piece, rest) = text.split_at(self.rng.random_range(1..most).min(text.len()));
            self.send(chunk(piece));
            if drips {
                self.wait(1..15);
            }
            text = rest;
        }
    }
}

/// One chunk of a chunked body.
fn chunk(data: &str) -> Vec<u8> {
    format!("{:x}\r\n{data}\r\n", data.len()).into_bytes()
}
