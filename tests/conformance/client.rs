//! A client that writes bytes as it likes, and reads answers strictly.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::message::{Found, Framing, body_of, escaped, framing, head_of, values};
use crate::world::within;

/// A connection to weir.
pub struct Client {
    io: TcpStream,
    unread: Vec<u8>,
    end: Option<Closed>,
}

/// How weir has closed a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    Cleanly,
    Reset,
}

/// How an answer's body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// There was none.
    NoBody,
    Length,
    Chunks,
    /// With the connection, as nothing was said of its length.
    Close,
    /// Before it was whole.
    Broken,
}

/// An answer, and the informational ones before it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub informational: Vec<String>,
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    pub trailers: String,
    pub end: End,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let io = TcpStream::connect(address).await.expect("weir listens");
        io.set_nodelay(true).expect("a socket");
        Self { io, unread: Vec::new(), end: None }
    }

    /// Writes as much as weir takes before it closes the connection.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = within("weir reads", self.io.write_all(bytes.as_ref())).await;
    }

    /// Writes one piece after the other, for as long as weir reads them.
    pub async fn drip(&mut self, piece: &str) {
        let writing = async {
            while !piece.is_empty() && self.io.write_all(piece.as_bytes()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        within("weir has had enough", writing).await;
    }

    /// Says that nothing more is to come.
    pub async fn finish(&mut self) {
        let _ = self.io.shutdown().await;
    }

    /// The answer to a request that is no HEAD; `None` when the connection is closed without one.
    pub async fn answer(&mut self) -> Option<Answer> {
        self.answer_to("GET").await
    }

    /// The answer to a request with this method.
    pub async fn answer_to(&mut self, method: &str) -> Option<Answer> {
        let mut informational = Vec::new();
        let head = loop {
            let head = self.head().await?;
            match status_of(&head) {
                100..=199 => informational.push(head),
                _ => break head,
            }
        };
        let status = status_of(&head);
        let framing = match (method, status) {
            ("HEAD", _) | (_, 204 | 304) => Framing::None,
            _ => framing(&head, Framing::Close),
        };
        let (body, trailers, end) = self.body(framing).await;
        Some(Answer { informational, status, head, body, trailers, end })
    }

    /// The next head, be it an informational answer's.
    pub async fn head(&mut self) -> Option<String> {
        loop {
            if let Some((head, used)) = head_of(&self.unread) {
                self.unread.drain(..used);
                return Some(head);
            }
            if !self.read().await {
                assert!(self.unread.is_empty(), "the connection ended within a head: {}", escaped(&self.unread));
                return None;
            }
        }
    }

    async fn body(&mut self, framing: Framing) -> (Vec<u8>, String, End) {
        loop {
            match body_of(&self.unread, framing) {
                Found::Whole { body, trailers, used } => {
                    self.unread.drain(..used);
                    let end = match framing {
                        Framing::None => End::NoBody,
                        Framing::Chunks => End::Chunks,
                        Framing::Length(_) | Framing::Close => End::Length,
                    };
                    return (body, trailers, end);
                }
                Found::Partial(body) if !self.read().await => {
                    self.unread.clear();
                    let ends_with_connection = framing == Framing::Close && self.end == Some(Closed::Cleanly);
                    let end = if ends_with_connection { End::Close } else { End::Broken };
                    return (body, String::new(), end);
                }
                Found::Partial(_) => {}
            }
        }
    }

    /// Waits until weir closes the connection: what came before, and how it was closed.
    pub async fn rest(&mut self) -> (Vec<u8>, Closed) {
        while self.read().await {}
        (std::mem::take(&mut self.unread), self.end.expect("it is closed"))
    }

    /// Waits until weir closes the connection, and sees that nothing came before that.
    #[track_caller]
    pub fn is_closed(&mut self, case: &str) -> impl Future<Output = ()> {
        let case = case.to_owned();
        async move {
            let (rest, _) = self.rest().await;
            assert!(rest.is_empty(), "{case}: there is more behind the last answer: {}", escaped(&rest));
        }
    }

    /// Reads more; `false` when weir has closed the connection.
    async fn read(&mut self) -> bool {
        if self.end.is_some() {
            return false;
        }
        let waiting = format!("weir says more than {}", escaped(&self.unread));
        self.unread.reserve(16 << 10);
        match within(&waiting, self.io.read_buf(&mut self.unread)).await {
            Ok(0) => self.end = Some(Closed::Cleanly),
            Ok(_) => {}
            Err(_) => self.end = Some(Closed::Reset),
        }
        self.end.is_none()
    }
}

fn status_of(head: &str) -> u16 {
    let status = head.strip_prefix("HTTP/1.1 ").or(head.strip_prefix("HTTP/1.0 "));
    let status = status.and_then(|rest| rest.get(..3)?.parse().ok());
    status.unwrap_or_else(|| panic!("a status line: {head:?}"))
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The values of a field.
    pub fn values(&self, name: &str) -> Vec<&str> {
        values(&self.head, name)
    }

    /// `error.code` of one of weir's own.
    pub fn code(&self) -> String {
        let value: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        value["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    /// The fields that are not weir's or its server's own, as they stand in the head.
    pub fn passed_fields(&self) -> Vec<&str> {
        const OWN: [&str; 7] =
            ["date", "server-timing", "x-request-id", "x-response-time", "x-weir-attempts", "connection", "via"];
        let fields = self.head.trim_end().split("\r\n").skip(1);
        fields.filter(|line| line.split_once(':').is_none_or(|(name, _)| !OWN.contains(&name))).collect()
    }
}
