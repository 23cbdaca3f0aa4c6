//! A client as simple as they come: one connection, one question, and no retry, limit or patience of its own.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::openai::sse::Scanner;

/// What to ask.
pub struct Question {
    pub model: &'static str,
    pub prompt: String,
    pub stream: bool,
}

/// A whole answer.
pub struct Answer {
    pub text: String,
    pub status: StatusCode,
    /// From the first byte sent to the last one read.
    pub took: Duration,
    /// Of this, the time that weir let it wait in its queue.
    pub queued: Duration,
    /// Of this, the time that the gateway was at it, in all attempts.
    pub gateway: Duration,
    /// Attempts that weir made beyond the first.
    pub retries: u32,
}

/// Asks.
///
/// # Errors
/// What the client sees instead of a whole answer.
pub async fn ask(address: SocketAddr, question: &Question) -> Result<Answer, String> {
    let asked = Instant::now();
    let (head, body) = send(address, question).await?.into_parts();
    let begun = Instant::now();
    let body = body.collect().await.map_err(|error| format!("the answer broke off: {error}"))?.to_bytes();
    let text = match (head.status, question.stream) {
        (StatusCode::OK, true) => stream_text(&body)?,
        (StatusCode::OK, false) => document_text(&body)?,
        (status, _) => return Err(format!("{status}: {}", String::from_utf8_lossy(&body))),
    };
    Ok(Answer {
        text,
        status: head.status,
        took: asked.elapsed(),
        queued: timing(&head.headers, "queue"),
        // weir's figure is from when the answer began; the rest of it is the gateway's time too.
        gateway: timing(&head.headers, "upstream") + begun.elapsed(),
        retries: attempts(&head.headers).saturating_sub(1),
    })
}

async fn send(address: SocketAddr, question: &Question) -> Result<Response<Incoming>, String> {
    let tcp = TcpStream::connect(address).await.map_err(|error| format!("cannot connect to {address}: {error}"))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(tcp)).await.map_err(|error| format!("no HTTP on {address}: {error}"))?;
    // It ends with its only exchange; how, the exchange itself tells.
    tokio::spawn(async move { drop(connection.await) });
    let body = json!({
        "model": question.model,
        "messages": [{"role": "user", "content": question.prompt}],
        "stream": question.stream,
    });
    let request = Request::post("/v1/chat/completions")
        .header("host", address.to_string())
        .header("authorization", "Bearer any")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .map_err(|error| format!("cannot make a request: {error}"))?;
    sender.send_request(request).await.map_err(|error| format!("no answer: {error}"))
}

/// What an answer in one piece says.
fn document_text(body: &[u8]) -> Result<String, String> {
    let answer: Value = serde_json::from_slice(body).map_err(|error| format!("the answer is not JSON: {error}"))?;
    match answer.pointer("/choices/0/message/content").and_then(Value::as_str) {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(format!("the answer says nothing: {answer}")),
    }
}

/// What a stream says, if it came to its proper end.
fn stream_text(body: &[u8]) -> Result<String, String> {
    let mut scanner = Scanner::default();
    let (mut text, mut done) = (String::new(), false);
    scanner.feed(body, |event| {
        done = event.data == b"[DONE]";
        let chunk: Value = serde_json::from_slice(event.data).unwrap_or_default();
        text += chunk.pointer("/choices/0/delta/content").and_then(Value::as_str).unwrap_or_default();
    });
    match (done && scanner.at_boundary(), text.is_empty()) {
        (true, false) => Ok(text),
        (true, true) => Err("the stream says nothing".to_owned()),
        (false, _) => Err(format!("the stream ended without [DONE], after {text:?}")),
    }
}

/// An entry of `server-timing`, in which weir says where the time went.
fn timing(headers: &HeaderMap, name: &str) -> Duration {
    let values = headers.get_all("server-timing").iter().filter_map(|value| value.to_str().ok());
    let entry = values.flat_map(|value| value.split(',')).find_map(|entry| {
        let millis = entry.trim().strip_prefix(name)?.strip_prefix(";dur=")?;
        Duration::try_from_secs_f64(millis.parse::<f64>().ok()? / 1000.0).ok()
    });
    entry.unwrap_or_default()
}

fn attempts(headers: &HeaderMap) -> u32 {
    let value = headers.get("x-weir-attempts").and_then(|value| value.to_str().ok());
    value.and_then(|value| value.parse().ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_an_answer_if_it_says_something() {
        let said = br#"{"choices":[{"message":{"role":"assistant","content":"good"}}]}"#;
        assert_eq!(document_text(said).as_deref(), Ok("good"));
        for empty in [&br#"{"choices":[{"message":{"content":""}}]}"#[..], br#"{"choices":[]}"#, b"{", b""] {
            assert!(document_text(empty).is_err());
        }
    }

    #[test]
    fn a_stream_is_an_answer_only_if_it_ends_as_it_should() {
        let spoken = "data: {\"choices\":[{\"delta\":{\"content\":\"go\"}}]}\n\n\
                      data: {\"choices\":[{\"delta\":{\"content\":\"od\"}}]}\n\n";
        let text = |stream: String| stream_text(stream.as_bytes());
        assert_eq!(text(format!("{spoken}data: [DONE]\n\n")).as_deref(), Ok("good"));
        let error = "data: {\"error\":{\"message\":\"broken\"}}\n\n";
        for tail in ["", "data: [DONE]", "data: [DONE]\n\ndata: more\n\n", error] {
            assert!(text(format!("{spoken}{tail}")).is_err(), "{tail}");
        }
        assert!(text("data: [DONE]\n\n".to_owned()).is_err());
    }

    #[test]
    fn weirs_headers_say_where_the_time_went() {
        let mut headers = HeaderMap::new();
        assert_eq!((timing(&headers, "queue"), attempts(&headers)), (Duration::ZERO, 1));
        headers.append("server-timing", "cache;dur=3".parse().expect("a value"));
        headers.append("server-timing", "queue;dur=1.5, upstream;dur=900.0".parse().expect("a value"));
        headers.insert("x-weir-attempts", "2".parse().expect("a value"));
        assert_eq!(timing(&headers, "queue"), Duration::from_micros(1500));
        assert_eq!(timing(&headers, "upstream"), Duration::from_millis(900));
        assert_eq!(attempts(&headers), 2);
    }
}
