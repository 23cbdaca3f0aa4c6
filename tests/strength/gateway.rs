//! A gateway on a real port that does what the [`Plan`] says, byte by byte, and keeps a record of what reached it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::RngExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::plan::{Fate, Kind, Move, Plan};
use crate::wire::{Framing, Head, Wire};

/// Of a thousand connections, so many are closed as soon as they are made.
const CLOSED_AT_ONCE: u64 = 30;

/// Purposes of chance.
const CONNECTIONS: u64 = 1 << 40;
const DOOR: u64 = 2 << 40;

/// The byte that an upload consists of.
pub fn upload_byte(id: u64) -> u8 {
    b'a' + (id % 26) as u8
}

/// One attempt, as the gateway saw it.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub id: u64,
    pub number: u32,
    pub kind: Kind,
    pub at: Instant,
    /// Its place in the order of everything that happened.
    pub order: u64,
    pub fate: Fate,
    /// It came on a connection that had been used before.
    pub reused: bool,
}

/// The gateway; it ends when dropped.
pub struct Gateway {
    pub address: SocketAddr,
    state: Arc<State>,
    door: AbortHandle,
}

struct State {
    plan: Plan,
    clock: Arc<AtomicU64>,
    attempts: Mutex<Vec<Attempt>>,
    /// Attempts at each request so far.
    counts: Mutex<HashMap<u64, u32>>,
    /// What no request may look like.
    wrong: Mutex<Vec<String>>,
    /// Changes when idle connections are to be closed.
    quiet: watch::Sender<u64>,
    /// While it is so, nobody is answered.
    held: watch::Sender<bool>,
}

impl Gateway {
    /// Serves on a free port. `clock` counts everything that happens, here and at the clients.
    pub fn start(plan: Plan, clock: Arc<AtomicU64>) -> Self {
        let state = Arc::new(State {
            plan,
            clock,
            attempts: Mutex::default(),
            counts: Mutex::default(),
            wrong: Mutex::default(),
            quiet: watch::Sender::new(0),
            held: watch::Sender::new(false),
        });
        let reserved = socket(SocketAddr::from(([127, 0, 0, 1], 0)));
        let address = reserved.local_addr().expect("it is bound");
        let listener = listen(address);
        let door = tokio::spawn(keep_door(state.clone(), reserved, listener)).abort_handle();
        Self { address, state, door }
    }

    /// Every attempt, in order, and none of them any more after that.
    pub fn take_attempts(&self) -> Vec<Attempt> {
        self.state.counts.lock().expect("nobody panics with it").clear();
        std::mem::take(&mut *self.state.attempts.lock().expect("nobody panics with it"))
    }

    /// What was wrong with requests that came.
    pub fn wrong(&self) -> Vec<String> {
        self.state.wrong.lock().expect("nobody panics with it").clone()
    }

    /// Answers nobody, until [`Gateway::release`].
    pub fn hold(&self) {
        self.state.held.send_replace(true);
    }

    pub fn release(&self) {
        self.state.held.send_replace(false);
    }

    /// Closes all connections that carry no request.
    pub fn close_idle(&self) {
        self.state.quiet.send_modify(|epoch| *epoch += 1);
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.door.abort();
    }
}

/// A socket on this address, which several may have at once.
fn socket(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("a socket has that option");
    socket.set_reuseport(true).expect("a socket has that option");
    socket.bind(address).expect("the port is free, or shared");
    socket
}

fn listen(address: SocketAddr) -> TcpListener {
    socket(address).listen(4096).expect("a bound socket can listen")
}

/// Accepts, but for some moments in which connections are refused. `_reserved` does not listen, but keeps others from the
/// port meanwhile.
async fn keep_door(state: Arc<State>, _reserved: TcpSocket, mut listener: TcpListener) {
    let address = listener.local_addr().expect("it is bound");
    let mut connections = Connections { tasks: JoinSet::new(), number: 0 };
    let mut rng = state.plan.rng(DOOR, 0);
    loop {
        let open_for = Duration::from_millis(rng.random_range(300..1500));
        let shut_for = Duration::from_millis(rng.random_range(5..40));
        let accepting = connections.accept(&state, &listener);
        if !state.plan.faults {
            return accepting.await;
        }
        let _ = tokio::time::timeout(open_for, accepting).await;
        drop(listener);
        tokio::time::sleep(shut_for).await;
        listener = listen(address);
    }
}

/// The connections that were made.
struct Connections {
    tasks: JoinSet<()>,
    number: u64,
}

impl Connections {
    async fn accept(&mut self, state: &Arc<State>, listener: &TcpListener) {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            while self.tasks.try_join_next().is_some() {}
            self.number += 1;
            if state.plan.faults && state.plan.rng(CONNECTIONS, self.number).random_range(0..1000) < CLOSED_AT_ONCE {
                continue;
            }
            let state = state.clone();
            self.tasks.spawn(async move {
                let _ = stream.set_nodelay(true);
                state.serve(stream).await;
            });
        }
    }
}

/// What becomes of a connection after an answer.
enum After {
    Keep,
    Slam,
    Gone,
}

impl State {
    async fn serve(&self, stream: TcpStream) {
        let mut quiet = self.quiet.subscribe();
        let mut wire = Wire::new(stream);
        let (mut reused, mut after) = (false, After::Keep);
        loop {
            let head = tokio::select! {
                head = self.next(&mut wire, &mut after) => head,
                // Nobody but the tests' end tells connections to close.
                _ = quiet.changed() => return,
            };
            let Some(head) = head else { return };
            after = match after {
                After::Keep => self.answer(&mut wire, &head, reused).await,
                After::Slam => {
                    self.note(&head, Some(Fate::Slammed), reused);
                    After::Gone
                }
                After::Gone => return,
            };
            if matches!(after, After::Gone) {
                return;
            }
            reused = true;
        }
    }

    /// The next request's head; only looked at, and left unread, where the connection is about to be slammed.
    async fn next(&self, wire: &mut Wire<TcpStream>, after: &mut After) -> Option<Head> {
        if matches!(after, After::Keep) {
            return wire.head().await.ok().flatten();
        }
        let mut seen = vec![0; 4096];
        let length = wire.io.peek(&mut seen).await.ok().filter(|length| *length > 0)?;
        Some(Head::parse(&String::from_utf8_lossy(&seen[..length])))
    }

    async fn answer(&self, wire: &mut Wire<TcpStream>, head: &Head, reused: bool) -> After {
        let Some((id, number, kind)) = self.note(head, None, reused) else { return After::Gone };
        let early = self.plan.fate(id, number, kind) == Fate::Early;
        let mut asked = false;
        if !early {
            let Some(asks) = self.read_body(wire, head, id, kind).await else { return After::Gone };
            asked = asks;
        }
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        for step in self.plan.script(id, number, kind, asked).moves {
            match step {
                Move::Send(bytes) => {
                    if wire.io.write_all(&bytes).await.is_err() {
                        return After::Gone;
                    }
                }
                Move::Wait(time) => tokio::time::sleep(time).await,
                Move::Stall => {
                    wire.until_closed().await;
                    return After::Gone;
                }
                Move::Close if early => {
                    // Unread bytes would turn the end into a reset, which may destroy the answer.
                    let _ = wire.io.shutdown().await;
                    wire.until_closed().await;
                    return After::Gone;
                }
                Move::Close => return After::Gone,
                Move::Reset => {
                    let _ = wire.io.set_zero_linger();
                    return After::Gone;
                }
                Move::CloseAfter(time) => {
                    tokio::time::sleep(time).await;
                    return After::Gone;
                }
                Move::SlamNext => return After::Slam,
            }
        }
        After::Keep
    }

    /// Notes that a request has come. `None` where that can't be one of the clients'.
    fn note(&self, head: &Head, fate: Option<Fate>, reused: bool) -> Option<(u64, u32, Kind)> {
        let (id, kind) = (head.field("x-test-id").parse::<u64>(), Kind::named(head.field("x-test-kind")));
        let (Ok(id), Some(kind)) = (id, kind) else {
            self.complain(format!("a request of nobody's: {:?}", head.first_line));
            return None;
        };
        let number = {
            let mut counts = self.counts.lock().expect("nobody panics with it");
            let count = counts.entry(id).or_default();
            *count += 1;
            *count
        };
        let fate = fate.unwrap_or_else(|| self.plan.fate(id, number, kind));
        let order = self.clock.fetch_add(1, Ordering::Relaxed);
        self.attempts.lock().expect("nobody panics with it").push(Attempt {
            id,
            number,
            kind,
            at: Instant::now(),
            order,
            fate,
            reused,
        });
        Some((id, number, kind))
    }

    /// Reads the body, which has to be the one that belongs to the head. Returns whether it asks for a stream's usage; `None`
    /// where it broke off.
    async fn read_body(&self, wire: &mut Wire<TcpStream>, head: &Head, id: u64, kind: Kind) -> Option<bool> {
        let framing = head.framing(Framing::Length(0));
        if kind == Kind::Upload {
            let right = |byte: &u8| *byte == upload_byte(id);
            let (mut length, mut all_right) = (0, true);
            let take = |piece: &[u8]| {
                length += piece.len();
                all_right &= piece.iter().all(right);
            };
            wire.body(framing, take).await.ok()?;
            if !all_right || length != crate::client::UPLOAD {
                self.complain(format!("upload {id} came as {length} bytes, its own: {all_right}"));
            }
            return Some(false);
        }
        let mut body = Vec::new();
        wire.body(framing, |piece| body.extend_from_slice(piece)).await.ok()?;
        let text = String::from_utf8_lossy(&body);
        let is_own = match kind {
            Kind::Get | Kind::Download => text.is_empty(),
            _ => text.ends_with('}') && text.contains(&format!("request {id}.")),
        };
        if !is_own {
            self.complain(format!("request {id} came with this body: {text:?}"));
        }
        Some(text.contains("include_usage"))
    }

    fn complain(&self, what: String) {
        self.wrong.lock().expect("nobody panics with it").push(what);
    }
}
