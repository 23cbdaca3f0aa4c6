//! HTTP/1.1 as bytes on a socket, read without any library that weir uses itself.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// One side's reading half of a connection.
pub struct Wire<S> {
    pub io: S,
    unread: Vec<u8>,
    at: usize,
    /// How long to wait before each read: somebody who reads slowly.
    pub pause: Option<Duration>,
}

/// A message's first line and fields, the names in lower case.
pub struct Head {
    pub first_line: String,
    fields: Vec<(String, String)>,
}

/// Where a body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Length(usize),
    Chunked,
    /// Where the connection does.
    Close,
}

impl Head {
    /// A field's value; empty where there is none.
    pub fn field(&self, name: &str) -> &str {
        self.fields.iter().find(|(found, _)| found == name).map_or("", |(_, value)| value)
    }

    /// The status of an answer.
    pub fn status(&self) -> u16 {
        self.first_line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// How the body is framed, where none is announced as `otherwise`.
    pub fn framing(&self, otherwise: Framing) -> Framing {
        match self.field("content-length").parse() {
            Ok(length) => Framing::Length(length),
            Err(_) if self.field("transfer-encoding") == "chunked" => Framing::Chunked,
            Err(_) => otherwise,
        }
    }

    /// The head in the text of which this is the beginning, as far as it goes.
    pub fn parse(text: &str) -> Self {
        let mut lines = text.split("\r\n");
        let first_line = lines.next().unwrap_or_default().to_owned();
        let fields = lines.filter_map(|line| line.split_once(':'));
        let fields = fields.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
        Self { first_line, fields }
    }
}

impl<S: AsyncRead + Unpin> Wire<S> {
    pub fn new(io: S) -> Self {
        Self { io, unread: Vec::new(), at: 0, pause: None }
    }

    /// Whether everything that has been read was asked for.
    pub fn is_drained(&self) -> bool {
        self.at == self.unread.len()
    }

    /// Reads a message's head; `None` where the connection ends before its first byte.
    pub async fn head(&mut self) -> io::Result<Option<Head>> {
        let mut text = String::new();
        loop {
            if self.is_drained() && text.is_empty() && self.fill().await? == 0 {
                return Ok(None);
            }
            let line = self.line().await?;
            if line.is_empty() {
                return Ok(Some(Head::parse(&text)));
            }
            text.push_str(&line);
            text.push_str("\r\n");
        }
    }

    /// Reads a body and gives away its bytes as they come.
    ///
    /// # Errors
    /// It broke off, or its framing is wrong.
    pub async fn body(&mut self, framing: Framing, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        match framing {
            Framing::Length(length) => self.exactly(length, &mut take).await,
            Framing::Close => {
                while !self.is_drained() || self.fill().await? > 0 {
                    take(&self.unread[self.at..]);
                    self.at = self.unread.len();
                }
                Ok(())
            }
            Framing::Chunked => loop {
                let line = self.line().await?;
                let size = usize::from_str_radix(&line, 16).map_err(|_| malformed(&line))?;
                self.exactly(size, &mut take).await?;
                let end = self.line().await?;
                if !end.is_empty() {
                    return Err(malformed(&end));
                }
                if size == 0 {
                    return Ok(());
                }
            },
        }
    }

    /// Reads and drops until the other side ends the connection.
    pub async fn until_closed(&mut self) {
        while self.fill().await.is_ok_and(|read| read > 0) {
            self.at = self.unread.len();
        }
    }

    async fn line(&mut self) -> io::Result<String> {
        let mut searched = self.at;
        loop {
            if let Some(end) = memchr::memmem::find(&self.unread[searched..], b"\r\n") {
                let line = String::from_utf8_lossy(&self.unread[self.at..searched + end]).into_owned();
                self.at = searched + end + 2;
                return Ok(line);
            }
            let known = self.unread.len() - self.at;
            self.fill_or_fail().await?;
            searched = self.at + known.saturating_sub(1);
        }
    }

    async fn exactly(&mut self, mut length: usize, take: &mut impl FnMut(&[u8])) -> io::Result<()> {
        while length > 0 {
            if self.is_drained() {
                self.fill_or_fail().await?;
            }
            let piece = &self.unread[self.at..][..length.min(self.unread.len() - self.at)];
            take(piece);
            length -= piece.len();
            self.at += piece.len();
        }
        Ok(())
    }

    async fn fill_or_fail(&mut self) -> io::Result<()> {
        match self.fill().await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn fill(&mut self) -> io::Result<usize> {
        if let Some(pause) = self.pause {
            tokio::time::sleep(pause).await;
        }
        self.unread.drain(..std::mem::take(&mut self.at));
        self.unread.reserve(16 << 10);
        self.io.read_buf(&mut self.unread).await
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed framing: {what:?}"))
}
