//! Connections to the upstream, kept for the next request: what a bare proxy needs of a pool, and no more.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::arguments::Failure;

pub struct Pool {
    upstream: SocketAddr,
    /// Connections whose last answer has been read. The last one back is the first to go out again.
    idle: Mutex<Vec<SendRequest<Incoming>>>,
}

impl Pool {
    pub fn new(upstream: SocketAddr) -> Arc<Self> {
        Arc::new(Self { upstream, idle: Mutex::default() })
    }

    /// Sends the request on an idle connection, or a new one, which goes back when the answer's body has been read.
    pub async fn send(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Relayed>, Failure> {
        let mut connection = self.take().await?;
        let answer = connection.send_request(request).await?;
        let loan = Loan { connection, pool: self };
        Ok(answer.map(|body| Relayed { body, loan: Some(loan) }))
    }

    async fn take(&self) -> Result<SendRequest<Incoming>, Failure> {
        while let Some(mut connection) = self.pop() {
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        self.connect().await
    }

    fn pop(&self) -> Option<SendRequest<Incoming>> {
        self.idle.lock().expect("nothing panics while it holds the lock").pop()
    }

    async fn connect(&self) -> Result<SendRequest<Incoming>, Failure> {
        let stream = TcpStream::connect(self.upstream).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

struct Loan {
    connection: SendRequest<Incoming>,
    pool: Arc<Pool>,
}

impl Loan {
    fn give_back(self) {
        self.pool.idle.lock().expect("nothing panics while it holds the lock").push(self.connection);
    }
}

/// The upstream's body. Read to its end it gives its connection back to the pool; dropped before, it closes it.
pub struct Relayed {
    body: Incoming,
    loan: Option<Loan>,
}

impl Body for Relayed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        if frame.is_none()
            && let Some(loan) = this.loan.take()
        {
            loan.give_back();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        // hyper reads no further than content-length says: the end is then known, though never seen.
        if self.body.is_end_stream()
            && let Some(loan) = self.loan.take()
        {
            loan.give_back();
        }
    }
}
