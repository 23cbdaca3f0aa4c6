//! One client connection that asks for chat completions, and counts what fails rather than stop.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::arguments::Failure;

pub struct Client {
    to: SocketAddr,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    pub fn new(to: SocketAddr) -> Self {
        Self { to, connection: None }
    }

    /// One request and its whole answer; anything but a 200 is an error. Connects first where need be.
    pub async fn complete(&mut self, request: Request<Full<Bytes>>) -> Result<(), Failure> {
        let mut body = self.begin(request).await?.into_body();
        while let Some(frame) = body.frame().await {
            frame?;
        }
        Ok(())
    }

    /// Sends the request and waits for the head of its answer.
    pub async fn begin(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failure> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(self.to).await?,
        };
        connection.ready().await?;
        let answer = connection.send_request(request).await?;
        self.connection = Some(connection);
        if !answer.status().is_success() {
            return Err(format!("status {}", answer.status()).into());
        }
        Ok(answer)
    }
}

async fn connect(to: SocketAddr) -> Result<SendRequest<Full<Bytes>>, Failure> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// The model and the key of a client that is not told to vary them.
pub const MODEL: &str = "gpt-4.1-mini";
pub const AUTHORIZATION: HeaderValue = HeaderValue::from_static("Bearer sk-not-a-key");

/// A chat request as a client library sends it.
pub fn chat_request(to: SocketAddr, authorization: HeaderValue, body: Bytes) -> Request<Full<Bytes>> {
    Request::post("/v1/chat/completions")
        .header(header::HOST, to.to_string())
        .header(header::AUTHORIZATION, authorization)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, "weir-bench")
        .body(Full::new(body))
        .expect("the parts are valid")
}

/// The body of a chat request, its prompt filled up to a length.
pub fn chat_body(model: &str, length: usize, stream: bool) -> Bytes {
    let start =
        format!(r#"{{"model":"{model}","stream":{stream},"max_tokens":100,"messages":[{{"role":"user","content":""#);
    let end = r#""}]}"#;
    let text = "What do these reviews have in common? ";
    let room = length.saturating_sub(start.len() + end.len());
    let text: String = text.chars().cycle().take(room).collect();
    Bytes::from(start + &text + end)
}
