//! A gateway that answers with scripted bytes and remembers every byte that it got.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};

use crate::message::{Found, Framing, body_of, escaped, framing, head_of};
use crate::world::within;

/// What the gateway does with a request.
#[derive(Debug, Clone)]
pub enum Act {
    /// First in a script: does not wait for the request's body.
    Early,
    Send(Vec<u8>),
    /// Waits until the test says go on.
    Gate,
    Close,
    Reset,
    /// Says that nothing more is to come, and reads on until weir closes the connection.
    Finish,
    /// Says nothing more, and waits until weir closes the connection.
    Stall,
}

/// Sends these bytes.
pub fn send(bytes: impl AsRef<[u8]>) -> Act {
    Act::Send(bytes.as_ref().to_vec())
}

/// An answer that nothing is wrong with.
pub const FINE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfine";

/// An answer with these fields and this body.
pub fn ok(fields: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n{body}")
}

/// An answer with this chunked body.
pub fn chunked(body: &str) -> String {
    ok("transfer-encoding: chunked", body)
}

/// What came over one connection.
#[derive(Debug, Clone, Default)]
pub struct Connection {
    pub bytes: Vec<u8>,
    /// By weir, or by the script.
    pub closed: bool,
}

#[derive(Debug, Default)]
struct Record {
    connections: Vec<Connection>,
    /// Requests whose head has come.
    requests: usize,
}

/// The gateway.
#[derive(Clone)]
pub struct Upstream {
    pub address: SocketAddr,
    inner: Arc<Inner>,
}

struct Inner {
    script: Box<dyn Fn(usize) -> Vec<Act> + Send + Sync>,
    record: Mutex<Record>,
    changed: Notify,
    gate: Semaphore,
}

impl Upstream {
    /// Listens, and answers the requests, numbered from 0, as the script says.
    pub async fn start(script: impl Fn(usize) -> Vec<Act> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (record, changed, gate) = (Mutex::default(), Notify::new(), Semaphore::new(0));
        let inner = Arc::new(Inner { script: Box::new(script), record, changed, gate });
        let accepting = inner.clone();
        tokio::spawn(async move {
            while let Ok((io, _)) = listener.accept().await {
                io.set_nodelay(true).expect("a socket");
                let number = accepting.change(|record| {
                    record.connections.push(Connection::default());
                    record.connections.len() - 1
                });
                tokio::spawn(Conversation { inner: accepting.clone(), number, io, read: 0 }.hold());
            }
        });
        Self { address, inner }
    }

    /// Lets one gate open.
    pub fn go_on(&self) {
        self.inner.gate.add_permits(1);
    }

    pub fn connections(&self) -> Vec<Connection> {
        self.inner.record.lock().expect("no test panics in it").connections.clone()
    }

    /// Every byte that came, a connection after the other, as text that the tests compare: weir's instance and this
    /// gateway's address are the only things in it that chance has a hand in.
    pub fn received(&self) -> String {
        let text: String = self.connections().iter().map(|it| escaped_whole(&it.bytes)).collect();
        let text = text.replace(&self.address.to_string(), "gateway.test");
        let mut pieces = text.split(" weir-");
        let first = pieces.next().unwrap_or_default().to_owned();
        pieces.fold(first, |before, after| before + " weir" + after.get(8..).unwrap_or_default())
    }

    /// Waits until the head of the so manyth request has come.
    pub async fn saw(&self, requests: usize) {
        self.until(&format!("{requests} requests"), |record| record.requests >= requests).await;
    }

    /// Waits until the connection of this number is closed.
    pub async fn saw_closed(&self, connection: usize) {
        let closed = |record: &Record| record.connections.get(connection).is_some_and(|it| it.closed);
        self.until(&format!("weir closes connection {connection}"), closed).await;
    }

    /// Waits until that many bytes have come, over all connections.
    pub async fn has_received(&self, bytes: usize) {
        let enough = |record: &Record| record.connections.iter().map(|it| it.bytes.len()).sum::<usize>() >= bytes;
        self.until(&format!("{bytes} bytes"), enough).await;
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Record) -> bool) {
        let waiting = async {
            loop {
                let changed = self.inner.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if is_so(&self.inner.record.lock().expect("no test panics in it")) {
                    return;
                }
                changed.await;
            }
        };
        within(what, waiting).await;
    }
}

/// Bytes as text in which nothing is lost; lines end as they are written in the tests.
fn escaped_whole(bytes: &[u8]) -> String {
    let plain = |byte: &u8| matches!(byte, b' '..=b'~' | b'\r' | b'\n' | b'\t');
    let mut text = String::with_capacity(bytes.len());
    let mut rest = bytes;
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| !plain(byte)).unwrap_or(rest.len());
        text.push_str(std::str::from_utf8(&rest[..end]).expect("it is ASCII"));
        let escaped = rest.get(end).map(|byte| format!("\\x{byte:02x}"));
        text.extend(escaped);
        rest = rest.get(end + 1..).unwrap_or_default();
    }
    text
}

impl Inner {
    fn change<T>(&self, change: impl FnOnce(&mut Record) -> T) -> T {
        let changed = change(&mut self.record.lock().expect("no test panics in it"));
        self.changed.notify_waiters();
        changed
    }
}

/// One connection.
struct Conversation {
    inner: Arc<Inner>,
    number: usize,
    io: TcpStream,
    /// Bytes that belong to requests that are over.
    read: usize,
}

impl Conversation {
    async fn hold(mut self) {
        self.converse().await;
        let Self { inner, number, io, .. } = self;
        drop(io);
        inner.change(|record| record.connections[number].closed = true);
    }

    async fn converse(&mut self) {
        while let Some((head, used)) = self.head().await {
            let number = self.inner.change(|record| {
                record.requests += 1;
                record.requests - 1
            });
            let mut acts = (self.inner.script)(number);
            let early = matches!(acts.first(), Some(Act::Early));
            if early {
                acts.remove(0);
            } else if !self.body(&head, used).await {
                return;
            }
            for act in acts {
                if !self.act(act).await {
                    return;
                }
            }
            if early && !self.body(&head, used).await {
                return;
            }
        }
    }

    /// The next head; `None` when weir has closed the connection.
    async fn head(&mut self) -> Option<(String, usize)> {
        loop {
            if let Some(head) = self.unread(head_of) {
                return Some(head);
            }
            if !self.read().await {
                return None;
            }
        }
    }

    /// Reads a request to its end; `false` when weir has closed the connection before.
    async fn body(&mut self, head: &str, head_bytes: usize) -> bool {
        let framing = framing(head, Framing::None);
        loop {
            let found = self.unread(|bytes| body_of(&bytes[head_bytes..], framing));
            if let Found::Whole { used, .. } = found {
                self.read += head_bytes + used;
                return true;
            }
            if !self.read().await {
                return false;
            }
        }
    }

    fn unread<T>(&self, look: impl FnOnce(&[u8]) -> T) -> T {
        let record = self.inner.record.lock().expect("no test panics in it");
        look(&record.connections[self.number].bytes[self.read..])
    }

    async fn act(&mut self, act: Act) -> bool {
        match act {
            Act::Early => panic!("Early comes first"),
            // weir may have had enough.
            Act::Send(bytes) => drop(self.io.write_all(&bytes).await),
            Act::Gate => self.inner.gate.acquire().await.expect("it is never closed").forget(),
            Act::Close => return false,
            Act::Reset => {
                self.io.set_zero_linger().expect("a socket");
                return false;
            }
            Act::Finish => {
                let _ = self.io.shutdown().await;
                while self.read().await {}
                return false;
            }
            Act::Stall => {
                while self.read().await {}
                return false;
            }
        }
        true
    }

    /// Reads more; `false` when weir has closed the connection.
    async fn read(&mut self) -> bool {
        let mut bytes = Vec::with_capacity(16 << 10);
        // A reset is an end too.
        let _ = self.io.read_buf(&mut bytes).await;
        self.inner.change(|record| record.connections[self.number].bytes.extend_from_slice(&bytes));
        !bytes.is_empty()
    }
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let connections = self.connections();
        f.debug_list().entries(connections.iter().map(|it| (escaped(&it.bytes), it.closed))).finish()
    }
}
