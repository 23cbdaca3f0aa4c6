//! Requests that wait: one stream holds the only slot of its model, and all others queue for it. They share HTTP/2
//! connections, since so many sockets would be a measure of the operating system.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri};
use http_body_util::{BodyExt, Collected, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::arguments::{self, Failure, required};
use crate::client::{AUTHORIZATION, chat_body, chat_request};
use crate::upstream::{EVENTS, INTERVAL_MS};

/// A little less than the 256 that weir lets a connection have.
const STREAMS_PER_CONNECTION: usize = 250;

type Connection = SendRequest<Full<Bytes>>;

pub fn run(parser: lexopt::Parser) -> Result<(), Failure> {
    let (mut to, mut model) = (None, None);
    let (mut waiters, mut body_bytes, mut time) = (1000, 1024, Duration::from_secs(60));
    arguments::options(parser, |name, parser| {
        match name {
            "to" => to = Some(arguments::value(parser)?),
            "model" => model = Some(arguments::value::<String>(parser)?),
            "waiters" => waiters = arguments::value(parser)?,
            "seconds" => time = arguments::seconds(parser)?,
            "body-bytes" => body_bytes = arguments::value(parser)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let (to, model) = (required(to, "--to")?, required(model, "--model")?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let _holder = hold_slot(to, chat_body(&model, body_bytes, true)).await?;
        let answers = wait_in_line(to, waiters, &chat_body(&model, body_bytes, false), time).await?;
        println!("{}", json!({ "waiters": waiters, "answered": answers }));
        Ok(())
    })
}

/// The slot is held until the answer is dropped.
async fn hold_slot(to: SocketAddr, body: Bytes) -> Result<Response<Incoming>, Failure> {
    let mut request = http2_request(to, body)?;
    request.headers_mut().insert(EVENTS, HeaderValue::from(2));
    request.headers_mut().insert(INTERVAL_MS, HeaderValue::from(600_000));
    let mut answer = connect(to).await?.send_request(request).await?;
    if !answer.status().is_success() {
        return Err(format!("who shall hold the slot got status {}", answer.status()).into());
    }
    answer.body_mut().frame().await.ok_or("the stream ended")??;
    Ok(answer)
}

/// Returns how many were answered within the time: none, if all has gone well. Says why the first one was.
async fn wait_in_line(to: SocketAddr, waiters: usize, body: &Bytes, time: Duration) -> Result<u64, Failure> {
    let mut waiting = JoinSet::new();
    let mut connection = connect(to).await?;
    for number in 0..waiters {
        if number % STREAMS_PER_CONNECTION == 0 {
            connection = connect(to).await?;
        }
        connection.ready().await?;
        waiting.spawn(connection.send_request(http2_request(to, body.clone())?));
    }
    let mut answered = 0;
    let _ = tokio::time::timeout(time, async {
        while let Some(answer) = waiting.join_next().await {
            if answered == 0 {
                eprintln!("load: one that should wait was answered: {}", told(answer.expect("no panic")).await);
            }
            answered += 1;
        }
    })
    .await;
    Ok(answered)
}

async fn told(answer: hyper::Result<Response<Incoming>>) -> String {
    match answer {
        Err(error) => error.to_string(),
        Ok(answer) => {
            let status = answer.status();
            let body = answer.into_body().collect().await.map(Collected::to_bytes).unwrap_or_default();
            format!("{status} {}", String::from_utf8_lossy(&body))
        }
    }
}

fn http2_request(to: SocketAddr, body: Bytes) -> Result<Request<Full<Bytes>>, Failure> {
    let mut request = chat_request(to, AUTHORIZATION, body);
    request.headers_mut().remove(http::header::HOST);
    *request.uri_mut() = Uri::try_from(format!("http://{to}/v1/chat/completions"))?;
    Ok(request)
}

async fn connect(to: SocketAddr) -> Result<Connection, Failure> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}
