//! The simulated gateway through the door its clients use: HTTP over a pipe in memory, under a paused clock.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Fault, Hints, Settings, Simulator};
use crate::config::units::Rate;

/// One connection to the gateway; dropped, it hangs up.
struct Client {
    sender: SendRequest<Full<Bytes>>,
    connection: JoinHandle<()>,
}

impl Client {
    async fn of(simulator: &Simulator) -> Self {
        let (near, far) = tokio::io::duplex(1 << 16);
        let simulator = simulator.clone();
        tokio::spawn(async move { simulator.serve_connection(far).await });
        let (sender, connection) = http1::handshake(TokioIo::new(near)).await.expect("a pipe");
        Self { sender, connection: tokio::spawn(async { drop(connection.await) }) }
    }

    async fn send(&mut self, method: &str, path: &str, body: impl Into<Bytes>) -> hyper::Result<Response<Incoming>> {
        let request = Request::builder().method(method).uri(path).header("host", "gateway");
        self.sender.send_request(request.body(Full::new(body.into())).expect("a request")).await
    }

    async fn post(&mut self, path: &str, body: Value) -> Answer {
        Answer::of(self.send("POST", path, body.to_string()).await.expect("an answer")).await
    }

    async fn chat(&mut self) -> Answer {
        self.post("/v1/chat/completions", chat()).await
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
    /// Whether the body came to an orderly end.
    whole: bool,
}

impl Answer {
    async fn of(response: Response<Incoming>) -> Self {
        let (head, mut body) = response.into_parts();
        let (mut bytes, mut whole) = (Vec::new(), true);
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => bytes.extend(frame.into_data().expect("no trailers")),
                Err(_) => whole = false,
            }
        }
        Self { status: head.status, headers: head.headers, body: bytes, whole }
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    /// What follows `data: ` in each whole event.
    fn events(&self) -> Vec<&str> {
        let data = |event: &'_ str| event.find("data: ").map(|start| start + 6);
        let whole = self.text().split_inclusive("\n\n").filter(|event| event.ends_with("\n\n"));
        whole.filter_map(|event| data(event).map(|start| event[start..].trim_end())).collect()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("ASCII"))
    }
}

fn chat() -> Value {
    json!({"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "Great value!"}]})
}

fn stream() -> Value {
    let mut body = chat();
    body["stream"] = true.into();
    body
}

fn with_fault(fault: Fault) -> Simulator {
    Simulator::new(Settings { faults: vec![(fault, 1.0)], ..Settings::instant() })
}

fn rate(text: &str, burst: u32) -> Option<Rate> {
    Some(Rate::parse(text).expect(text).with_burst(burst))
}

#[tokio::test(start_paused = true)]
async fn a_chat_answer_has_the_shape_and_the_time_of_the_real_one() {
    let settings = Settings { spread: 0.0, output_tokens: 11..=11, ..Settings::default() };
    let mut client = Client::of(&Simulator::new(settings)).await;
    let begun = Instant::now();
    let answer = client.chat().await;
    assert_eq!(begun.elapsed(), Duration::from_millis(400), "first token + ten more");
    assert_eq!(answer.header("openai-processing-ms"), Some("400"));
    assert_eq!(answer.header("content-length"), Some(answer.body.len().to_string().as_str()));
    assert!(answer.header("x-request-id").is_some() && answer.header("x-response-time").is_none());
    let json = answer.json();
    assert_eq!((&json["object"], &json["model"]), (&json!("chat.completion"), &json!("gpt-4.1-mini")));
    let choice = &json["choices"][0];
    assert!(choice["message"]["content"].as_str().expect("text").contains("Great value!"));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!((&json["usage"]["prompt_tokens"], &json["usage"]["completion_tokens"]), (&json!(3), &json!(11)));
    assert_eq!(json["usage"]["total_tokens"], 14);
}

#[tokio::test(start_paused = true)]
async fn a_stream_goes_from_role_to_done_with_the_usage_before_it() {
    let mut body = stream();
    body["stream_options"] = json!({"include_usage": true});
    body["max_tokens"] = 5.into();
    let answer = Client::of(&Simulator::new(Settings::instant())).await.post("/v1/chat/completions", body).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let events = answer.events();
    assert_eq!(events.len(), 1 + 5 + 1 + 1 + 1);
    let event = |nth: usize| -> Value { serde_json::from_str(events[nth]).expect("JSON") };
    assert_eq!(event(0)["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(event(1)["choices"][0]["delta"], json!({"content": "Analysis"}));
    assert_eq!((&event(1)["object"], &event(1)["usage"]), (&json!("chat.completion.chunk"), &Value::Null));
    assert_eq!(event(6)["choices"][0]["finish_reason"], "length");
    assert_eq!((&event(7)["choices"], &event(7)["usage"]["completion_tokens"]), (&json!([]), &json!(5)));
    assert_eq!(events[8], "[DONE]");
    assert!(answer.whole);
}

#[tokio::test(start_paused = true)]
async fn a_stream_comes_event_by_event_at_its_pace() {
    let settings = Settings { spread: 0.0, output_tokens: 3..=3, ..Settings::default() };
    let mut client = Client::of(&Simulator::new(settings)).await;
    let begun = Instant::now();
    let response = client.send("POST", "/v1/chat/completions", stream().to_string()).await.expect("an answer");
    let mut body = response.into_body();
    let mut arrivals = Vec::new();
    while let Some(frame) = body.frame().await {
        let data = frame.expect("no fault").into_data().expect("data");
        let tokens = data.windows(7).filter(|window| window == b"content").count();
        arrivals.extend(vec![begun.elapsed().as_millis(); tokens]);
    }
    assert_eq!(arrivals, [300, 300, 310, 320], "the role's empty content, then a token at a time");
}

#[tokio::test(start_paused = true)]
async fn every_text_api_answers_and_streams_in_its_own_words() {
    let mut client = Client::of(&Simulator::new(Settings::instant())).await;
    for (path, input, usage, last) in [
        ("/v1/completions", "prompt", "completion_tokens", "[DONE]"),
        ("/v1/responses", "input", "output_tokens", "response.completed"),
        ("/v1/messages", "messages", "output_tokens", "message_stop"),
    ] {
        let mut body = json!({"model": "m", (input): "Great value!"});
        let answer = client.post(path, body.clone()).await;
        assert!(answer.text().contains("Analysis of “Great value!”"), "{path}: {}", answer.text());
        assert!(answer.json()["usage"][usage].as_u64() > Some(0), "{path}: {}", answer.text());
        body["stream"] = true.into();
        let answer = client.post(path, body).await;
        assert!(answer.events().last().expect("events").contains(last), "{path}: {}", answer.text());
        assert!(answer.text().contains(" “Great"), "{path}: {}", answer.text());
    }
}

#[tokio::test(start_paused = true)]
async fn what_makes_no_text_is_answered_too() {
    let mut client = Client::of(&Simulator::new(Settings::instant())).await;
    let vectors = client.post("/v1/embeddings", json!({"model": "m", "input": ["a", "b"]})).await;
    assert_eq!(vectors.json()["data"].as_array().map(Vec::len), Some(2));
    for (method, path, status, field, value) in [
        ("GET", "/v1/models", 200, "/object", json!("list")),
        ("GET", "/v1/models/deepseek-chat", 200, "/id", json!("deepseek-chat")),
        ("GET", "/v1/models/none", 404, "/error/code", json!("model_not_found")),
        ("DELETE", "/v1/files/f%2F1?x=y", 200, "/path", json!("/v1/files/f%2F1")),
        ("PUT", "/v1/whatever", 200, "/body_bytes", json!(3)),
        ("GET", "/", 404, "/error/code", json!("unknown_url")),
        ("POST", "/v1/chat/completions", 400, "/error/type", json!("invalid_request_error")),
    ] {
        let answer = Answer::of(client.send(method, path, "abc").await.expect("an answer")).await;
        assert_eq!(answer.status.as_u16(), status, "{method} {path}");
        assert_eq!(answer.json().pointer(field), Some(&value), "{method} {path}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_quota_refuses_exactly_past_its_burst_and_says_the_exact_reset() {
    let simulator = Simulator::new(Settings { requests: rate("60/min", 2), ..Settings::instant() });
    let mut client = Client::of(&simulator).await;
    for (remaining, reset) in [("1", "1s"), ("0", "2s")] {
        let answer = client.chat().await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.header("x-ratelimit-limit-requests"), Some("60"));
        assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some(remaining));
        assert_eq!(answer.header("x-ratelimit-reset-requests"), Some(reset));
        assert_eq!(answer.header("x-ratelimit-limit-tokens"), None);
    }
    tokio::time::advance(Duration::from_millis(300)).await;
    let refused = client.chat().await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.header("retry-after-ms"), Some("700"));
    assert_eq!(refused.json()["error"]["type"], "requests");
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    tokio::time::advance(Duration::from_millis(699)).await;
    assert_eq!(client.chat().await.header("retry-after-ms"), Some("1"));
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(client.chat().await.status, StatusCode::OK);
    let stats = simulator.stats();
    assert_eq!((stats.requests, stats.accepted, stats.refused.requests), (5, 3, 2));
}

#[tokio::test(start_paused = true)]
async fn tokens_are_charged_by_prompt_and_cap_before_they_are_said() {
    let settings = Settings { tokens: rate("600/min", 100), hints: Hints::RetryAfterOnly, ..Settings::instant() };
    let mut client = Client::of(&Simulator::new(settings)).await;
    let mut body = chat();
    body["max_tokens"] = 57.into();
    assert_eq!(client.post("/v1/chat/completions", body.clone()).await.status, StatusCode::OK);
    let refused = client.post("/v1/chat/completions", body.clone()).await;
    assert_eq!(refused.json()["error"]["type"], "tokens");
    assert_eq!((refused.header("retry-after"), refused.header("retry-after-ms")), (Some("2"), None));
    body["max_tokens"] = 101.into();
    let too_large = client.post("/v1/chat/completions", body).await;
    assert_eq!((too_large.status.as_u16(), too_large.header("retry-after")), (429, None));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_up_frees_its_slot_at_once_and_is_counted() {
    for body in [chat(), stream()] {
        let settings = Settings { concurrency: Some(1), per_token: Duration::from_secs(1), ..Settings::instant() };
        let simulator = Simulator::new(settings);
        let mut first = Client::of(&simulator).await;
        let hanging = tokio::spawn(async move { first.post("/v1/chat/completions", body).await });
        // By then a document is still being thought about, and a stream in its middle.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let refused = Client::of(&simulator).await.chat().await;
        assert_eq!((refused.status.as_u16(), &refused.json()["error"]["type"]), (429, &json!("concurrency")));
        assert_eq!(refused.header("retry-after"), None);
        hanging.abort();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(Client::of(&simulator).await.chat().await.status, StatusCode::OK);
        let stats = simulator.stats();
        assert_eq!((stats.in_flight, stats.most_in_flight, stats.cancelled), (0, 1, 1));
        assert_eq!(stats.refused.concurrency, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_429_out_of_the_blue_says_as_much_as_its_name() {
    for (fault, hint) in [
        (Fault::TooManyWithMillis, Some(("retry-after-ms", "1000"))),
        (Fault::TooManyWithSeconds, Some(("retry-after", "1"))),
        (Fault::TooManyWithoutHint, None),
        (Fault::InsufficientQuota, None),
    ] {
        let answer = Client::of(&with_fault(fault)).await.chat().await;
        assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
        for name in ["retry-after", "retry-after-ms", "x-ratelimit-limit-requests"] {
            let wanted = hint.filter(|(hinted, _)| *hinted == name).map(|(_, value)| value);
            assert_eq!(answer.header(name), wanted, "{fault}: {name}");
        }
        let billing = fault == Fault::InsufficientQuota;
        assert_eq!(answer.json()["error"]["code"] == "insufficient_quota", billing);
    }
    let answer = Client::of(&with_fault(Fault::TooManyWithDate)).await.chat().await;
    assert!(httpdate::parse_http_date(answer.header("retry-after").expect("a date")).is_ok());
}

#[tokio::test(start_paused = true)]
async fn each_server_error_has_its_status() {
    for (fault, status) in [(Fault::ServerError, 500), (Fault::Unavailable, 503), (Fault::Overloaded, 529)] {
        let answer = Client::of(&with_fault(fault)).await.chat().await;
        assert_eq!(answer.status.as_u16(), status);
        assert!(answer.json()["error"]["message"].is_string());
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_or_a_stall_before_the_answer_gives_not_a_byte() {
    for (fault, after) in [(Fault::ResetBeforeAnswer, 0), (Fault::StallBeforeAnswer, 600)] {
        let simulator = with_fault(fault);
        let begun = Instant::now();
        let ended = Client::of(&simulator).await.send("POST", "/v1/chat/completions", chat().to_string()).await;
        assert!(ended.expect_err("no answer").is_incomplete_message());
        assert_eq!(begun.elapsed().as_secs(), after);
        let stats = simulator.stats();
        assert_eq!((stats.in_flight, stats.cancelled, stats.faults[fault.name()]), (0, 0, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_or_a_stall_in_the_answer_leaves_a_part_of_it_without_an_end() {
    for (fault, after) in [(Fault::ResetInAnswer, 0), (Fault::StallInAnswer, 600)] {
        for body in [chat(), stream()] {
            let begun = Instant::now();
            let answer = Client::of(&with_fault(fault)).await.post("/v1/chat/completions", body).await;
            assert_eq!(begun.elapsed().as_secs(), after);
            assert_eq!(answer.status, StatusCode::OK);
            assert!(!answer.whole && !answer.body.is_empty());
            assert!(serde_json::from_slice::<Value>(&answer.body).is_err());
            assert!(!answer.text().contains("[DONE]"));
        }
    }
}

/// Over a real socket, and so by the real clock: only there is a reset more than an early end.
#[tokio::test]
async fn over_tcp_a_reset_is_a_reset() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mut client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("a listener");
    let simulator = with_fault(Fault::ResetBeforeAnswer);
    let server = tokio::spawn(async move { simulator.serve(listener).await });
    client.write_all(b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n").await.expect("a connection");
    let error = client.read_to_end(&mut Vec::new()).await.expect_err("no orderly end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn a_stream_can_begin_with_an_error() {
    let answer = Client::of(&with_fault(Fault::ErrorEvent)).await.post("/v1/chat/completions", stream()).await;
    assert!(answer.whole && answer.status == StatusCode::OK);
    assert_eq!(answer.events().len(), 1);
    assert!(answer.text().starts_with(r#"data: {"error":{"#), "{}", answer.text());
    for (path, input) in [("/v1/responses", "input"), ("/v1/messages", "messages")] {
        let body = json!({"model": "m", (input): "Great value!", "stream": true});
        let answer = Client::of(&with_fault(Fault::ErrorEvent)).await.post(path, body).await;
        assert!(answer.text().starts_with("event: error\ndata: {"), "{}", answer.text());
        let event: Value = serde_json::from_str(answer.events()[0]).expect("JSON");
        let message = event["message"].as_str().or(event["error"]["message"].as_str());
        assert!(event["type"] == "error" && message.is_some(), "{}", answer.text());
    }
}

#[tokio::test(start_paused = true)]
async fn a_truncated_stream_ends_well_and_a_cut_event_badly_both_without_done() {
    for (fault, whole) in [(Fault::TruncatedStream, true), (Fault::CutEvent, false)] {
        let answer = Client::of(&with_fault(fault)).await.post("/v1/chat/completions", stream()).await;
        assert_eq!(answer.whole, whole, "{fault}");
        assert_eq!(answer.text().ends_with("\n\n"), whole, "{fault}");
        assert!(!answer.events().is_empty() && !answer.text().contains("[DONE]"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_fault_of_streams_leaves_a_document_alone() {
    let simulator = with_fault(Fault::CutEvent);
    assert_eq!(Client::of(&simulator).await.chat().await.json()["object"], "chat.completion");
    assert!(simulator.stats().faults.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_and_order_make_the_same_answers() {
    async fn play(seed: u64) -> Vec<(u16, Option<String>, usize)> {
        let faults = vec![(Fault::ServerError, 0.3), (Fault::TruncatedStream, 0.3)];
        let simulator = Simulator::new(Settings { seed, faults, ..Settings::instant() });
        let mut client = Client::of(&simulator).await;
        let mut answers = Vec::new();
        for _ in 0..20 {
            let answer = client.post("/v1/chat/completions", stream()).await;
            let id = answer.header("x-request-id").map(str::to_owned);
            answers.push((answer.status.as_u16(), id, answer.events().len()));
        }
        answers
    }
    assert_eq!(play(1).await, play(1).await);
    assert_ne!(play(1).await, play(2).await);
}

#[tokio::test(start_paused = true)]
async fn during_an_outage_all_is_503_and_afterwards_well() {
    let outage = Some(Duration::from_secs(1)..Duration::from_secs(2));
    let simulator = Simulator::new(Settings { outage, ..Settings::instant() });
    let mut client = Client::of(&simulator).await;
    for (status, pause) in [(200, 1000), (503, 999), (503, 1), (200, 0)] {
        assert_eq!(client.chat().await.status.as_u16(), status);
        tokio::time::advance(Duration::from_millis(pause)).await;
    }
    assert_eq!(simulator.stats().faults["outage"], 2);
}

#[tokio::test(start_paused = true)]
async fn without_the_right_key_it_is_401() {
    let simulator = Simulator::new(Settings { key: Some("secret".to_owned()), ..Settings::instant() });
    let mut client = Client::of(&simulator).await;
    for (name, value, status) in [
        ("authorization", "Bearer secret", 200),
        ("x-api-key", "secret", 200),
        ("authorization", "Bearer other", 401),
        ("accept", "*/*", 401),
    ] {
        let request = Request::get("/v1/models").header(name, value).body(Full::default()).expect("a request");
        let answer = client.sender.send_request(request).await.expect("an answer");
        assert_eq!(Answer::of(answer).await.status.as_u16(), status, "{name}: {value}");
    }
    assert_eq!(simulator.stats().unauthorized, 2);
}

#[tokio::test(start_paused = true)]
async fn a_body_too_large_is_refused_before_it_is_sent() {
    let mut client = Client::of(&Simulator::new(Settings::instant())).await;
    let answer = client.send("POST", "/v1/chat/completions", vec![b' '; (64 << 20) + 1]).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test(start_paused = true)]
async fn the_statistics_are_there_to_read_and_count_no_request_themselves() {
    let simulator = Simulator::new(Settings::instant());
    let mut client = Client::of(&simulator).await;
    client.chat().await;
    let answer = Answer::of(client.send("GET", "/_stats", "").await.expect("an answer")).await;
    assert_eq!(answer.json(), simulator.stats().to_json());
    assert_eq!((answer.json()["requests"].as_u64(), answer.json()["accepted"].as_u64()), (Some(1), Some(1)));
}
