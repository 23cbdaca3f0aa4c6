//! HTTP/2 by hand: frames and uncompressed header blocks, right or wrong.

use std::collections::HashMap;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::world::within;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let length = u32::try_from(payload.len()).expect("a frame is short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block of literals that are neither indexed nor compressed.
pub fn block<B: AsRef<[u8]>>(fields: &[(&str, B)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        string(&mut block, name.as_bytes());
        string(&mut block, value.as_ref());
    }
    block
}

/// A string with its length in front (RFC 7541, 5.1 and 5.2).
pub fn string(block: &mut Vec<u8>, bytes: &[u8]) {
    let mut length = bytes.len();
    if length < 127 {
        block.push(length as u8);
    } else {
        block.push(127);
        length -= 127;
        while length >= 128 {
            block.push((length % 128) as u8 | 128);
            length /= 128;
        }
        block.push(length as u8);
    }
    block.extend_from_slice(bytes);
}

/// A whole request's head, with further fields.
pub fn head<'f>(method: &'f str, path: &'f str, more: &[(&'f str, &'f str)]) -> Vec<(&'f str, &'f str)> {
    let pseudo = [(":method", method), (":scheme", "http"), (":authority", "weir.test"), (":path", path)];
    [&pseudo[..], more].concat()
}

/// How a stream came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Whole,
    /// It was reset, with this code.
    Reset(u32),
    /// The connection was, or was closed without a word.
    Connection(Option<u32>),
}

/// What came on a stream.
#[derive(Debug, Clone)]
pub struct Stream {
    pub status: Option<u16>,
    pub body: Vec<u8>,
    pub ended: Ended,
}

impl Stream {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// `error.code` of one of weir's own answers.
    pub fn code(&self) -> String {
        let value: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        value["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

#[derive(Debug, Default)]
struct Unended {
    status: Option<u16>,
    body: Vec<u8>,
    ended: Option<Ended>,
}

/// A client's connection.
pub struct Http2 {
    io: TcpStream,
    unread: Vec<u8>,
    streams: HashMap<u32, Unended>,
    goaway: Option<u32>,
    closed: bool,
    /// What may be sent on each stream, and on all together under 0, beyond the first 65,535 bytes.
    windows: HashMap<u32, usize>,
}

impl Http2 {
    /// Begins with the preface and these settings.
    pub async fn begin(io: TcpStream, settings: &[(u16, u32)]) -> Self {
        io.set_nodelay(true).expect("a socket");
        let (unread, streams, windows) = (Vec::new(), HashMap::new(), HashMap::new());
        let mut client = Self { io, unread, streams, goaway: None, closed: false, windows };
        let payload: Vec<u8> =
            settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
        client.write([PREFACE, &frame(SETTINGS, 0, 0, payload)].concat()).await;
        client
    }

    /// Writes as much as weir takes before it closes the connection.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = within("weir reads", self.io.write_all(bytes.as_ref())).await;
    }

    /// The same, and reads meanwhile, so that no one waits for the other.
    pub async fn flood(&mut self, bytes: Vec<u8>) {
        let mut rest = &bytes[..];
        while !rest.is_empty() && !self.closed {
            let (mut reader, mut writer) = self.io.split();
            let mut buffer = [0; 4096];
            let step = async {
                tokio::select! {
                    written = writer.write(rest) => (written.ok(), None),
                    read = reader.read(&mut buffer) => (Some(0), Some(read.unwrap_or(0))),
                }
            };
            match within("weir reads or writes", step).await {
                (None, _) | (_, Some(0)) => self.closed = true,
                (Some(written), read) => {
                    rest = &rest[written..];
                    self.unread.extend_from_slice(&buffer[..read.unwrap_or(0)]);
                }
            }
        }
    }

    /// A request's head.
    pub async fn headers<B: AsRef<[u8]>>(&mut self, stream: u32, fields: &[(&str, B)], flags: u8) {
        self.write(frame(HEADERS, flags | END_HEADERS, stream, block(fields))).await;
    }

    /// Sends so many bytes on a stream, as fast as weir opens its windows.
    pub async fn upload(&mut self, stream: u32, bytes: usize) {
        const PIECE: usize = 16_000;
        let piece = frame(DATA, 0, stream, vec![b'x'; PIECE]);
        for sent in (0..bytes).step_by(PIECE) {
            while [0, stream].iter().any(|it| sent + PIECE > 65_535 + self.windows.get(it).copied().unwrap_or(0)) {
                assert!(self.read().await, "the connection ended");
            }
            self.write(&piece).await;
        }
    }

    /// Waits until a stream has come to an end, by itself or with the connection.
    pub async fn answer(&mut self, stream: u32) -> Stream {
        loop {
            self.take_all().await;
            let unended = self.streams.entry(stream).or_default();
            let over =
                (self.closed || self.goaway.is_some_and(|code| code != 0)).then_some(Ended::Connection(self.goaway));
            if let Some(ended) = unended.ended.or(over) {
                return Stream { status: unended.status, body: unended.body.clone(), ended };
            }
            self.read().await;
        }
    }

    /// Reads more; `false` when weir has closed the connection.
    async fn read(&mut self) -> bool {
        self.unread.reserve(16 << 10);
        let read = within("weir says something on its HTTP/2 connection", self.io.read_buf(&mut self.unread)).await;
        self.closed = read.unwrap_or(0) == 0;
        self.take_all().await;
        !self.closed
    }

    async fn take_all(&mut self) {
        while let Some((kind, flags, on, payload)) = self.next_frame() {
            self.take(kind, flags, on, &payload).await;
        }
    }

    fn next_frame(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let length =
            u32::from_be_bytes([0, *self.unread.first()?, *self.unread.get(1)?, *self.unread.get(2)?]) as usize;
        if self.unread.len() < 9 + length {
            return None;
        }
        let frame: Vec<u8> = self.unread.drain(..9 + length).collect();
        let stream = u32::from_be_bytes([frame[5], frame[6], frame[7], frame[8]]);
        Some((frame[3], frame[4], stream, frame[9..].to_vec()))
    }

    async fn take(&mut self, kind: u8, flags: u8, on: u32, payload: &[u8]) {
        let stream = self.streams.entry(on).or_default();
        let code = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().expect("four bytes"));
        match kind {
            // The first field is the status; of those that weir answers often, a byte says which.
            HEADERS if stream.status.is_none() => {
                let first = payload.iter().find(|byte| **byte >= 0x40).copied().unwrap_or_default();
                let known = [200, 204, 206, 304, 400, 404, 500];
                let known = first.checked_sub(0x88).and_then(|at| known.get(usize::from(at)).copied());
                stream.status = Some(known.unwrap_or_default());
            }
            DATA => stream.body.extend_from_slice(payload),
            RST_STREAM => stream.ended = stream.ended.or(Some(Ended::Reset(code(0)))),
            SETTINGS if flags & ACK == 0 => self.write(frame(SETTINGS, ACK, 0, [])).await,
            WINDOW_UPDATE => *self.windows.entry(on).or_default() += code(0) as usize,
            GOAWAY => self.goaway = Some(code(4)),
            _ => {}
        }
        if matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0 {
            let stream = self.streams.entry(on).or_default();
            stream.ended = stream.ended.or(Some(Ended::Whole));
        }
    }
}
