//! The access log: a JSON line for each request that has ended, however it did.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Method;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use weir::outlet::{Sink, Stopped};

use crate::gateway::{Step, answer, chunk, completion, done, error, event, stream_head};
use crate::world::{CHAT, STREAM, World, bearer, chat, over_http2, request, with};

const SECOND: Duration = Duration::from_secs(1);

/// Whatever takes longer has failed; it is the writing thread's time, not the test's.
const DEADLINE: Duration = Duration::from_secs(30);

/// A world's access log, kept in memory.
struct Lines {
    world: World,
    bytes: Memory,
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Sink for Memory {
    fn write(&mut self, lines: &[u8]) -> Result<(), Stopped> {
        self.0.lock().expect("no test panics here").extend_from_slice(lines);
        Ok(())
    }
}

impl Lines {
    /// From now on.
    fn of(world: &World) -> Self {
        let bytes = Memory::default();
        world.proxy.access_log().redirect(Some(Box::new(bytes.clone()))).expect("a thread");
        Self { world: world.clone(), bytes }
    }

    /// As they were written.
    fn text(&self) -> String {
        assert!(self.world.proxy.access_log().flush(DEADLINE), "it is not written");
        String::from_utf8(self.bytes.0.lock().expect("no test panics here").clone()).expect("UTF-8")
    }

    /// All so far, without their time, which is checked to be one.
    fn all(&self) -> Vec<Value> {
        let text = self.text();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(parse).collect()
    }

    /// The only one, or the one since the last look.
    #[track_caller]
    fn sole(&self) -> Value {
        let mut all = self.all();
        assert_eq!(all.len(), 1, "{all:?}");
        self.bytes.0.lock().expect("no test panics here").clear();
        all.remove(0)
    }
}

#[track_caller]
fn parse(line: &str) -> Value {
    let mut value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let time = value.as_object_mut().expect("an object").remove("time").expect("a time");
    let shape: String =
        time.as_str().expect("text").chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000Z");
    value
}

#[tokio::test(start_paused = true)]
async fn an_answered_request_has_all_its_fields() {
    let config = "[upstream]\nbase_url = \"https://gateway.test/v1\"\n[limits]\nrequests = { rate = \"1/s\", burst = 1 }\n\
                  [clients.bot]\nkey = \"k\"\n";
    let world = World::new(config, |_| [vec![Step::Wait(250 * SECOND / 1000)], completion()].concat());
    let lines = Lines::of(&world);
    world.send(bearer(chat(CHAT), "k")).await;
    lines.sole();
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let asked = request(Method::POST, "/v1/chat/completions?api-version=secret", CHAT);
    let answer = world.send(with(bearer(asked, "k"), "traceparent", parent)).await;
    assert_eq!(
        lines.sole(),
        json!({
            "method": "POST", "path": "/v1/chat/completions", "http": "1.1",
            "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "stream": false,
            "request_id": answer.header("x-request-id"), "client": "bot", "model": "gpt-4.1-mini",
            "status": 200, "outcome": "ok", "attempts": 1,
            "queue_ms": 750.0, "upstream_ms": 250.0, "total_ms": 1000.0,
            "tokens": {"prompt": 10, "completion": 5, "cached": 0, "reasoning": 0},
            "bytes_in": CHAT.len(), "bytes_out": answer.body.len(), "upstream": "gateway.test",
        })
    );
}

#[tokio::test(start_paused = true)]
async fn a_stream_has_the_time_of_its_first_token_and_the_bytes_that_its_client_got() {
    // weir asks for the usage, and keeps the chunk that brings it.
    let usage = chunk(
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2,\"total_tokens\":9,\
         \"prompt_tokens_details\":{\"cached_tokens\":3}}}\n\n",
    );
    let world = World::new("", move |_| {
        let [end, last] = done();
        vec![stream_head(), Step::Wait(SECOND), event("a"), Step::Wait(SECOND), event("b"), usage.clone(), end, last]
    });
    let lines = Lines::of(&world);
    let answer = world.stream().await;
    assert!(!answer.text().contains("usage"));
    let line = lines.sole();
    assert_eq!(
        (&line["stream"], &line["first_token_ms"], &line["total_ms"]),
        (&json!(true), &json!(1000.0), &json!(2000.0))
    );
    assert_eq!(line["tokens"], json!({"prompt": 7, "completion": 2, "cached": 3, "reasoning": 0}));
    assert_eq!((&line["bytes_out"], &line["outcome"]), (&json!(answer.body.len()), &json!("ok")));
}

#[tokio::test(start_paused = true)]
async fn whoever_is_refused_has_a_line_that_says_by_what() {
    let config = "[models.\"gpt-4.1-mini\"]\nrequests = { rate = \"1/h\", burst = 1 }\n[queue]\nmax_wait = \"0s\"\n";
    let world = World::new(config, |_| completion());
    world.chat().await;
    let lines = Lines::of(&world);
    let refused = world.chat().await;
    let line = lines.sole();
    assert_eq!((&line["status"], &line["outcome"]), (&json!(429), &json!("refused")));
    assert_eq!((&line["refused_by"], &line["scope"]), (&json!("requests"), &json!("model:gpt-4.1-mini")));
    assert_eq!((&line["code"], &line["attempts"]), (&json!("rate_limit_exceeded"), &json!(0)));
    assert_eq!(
        (&line["request_id"], &line["bytes_out"]),
        (&json!(refused.header("x-request-id")), &json!(refused.body.len()))
    );
    for absent in ["upstream", "upstream_ms", "first_token_ms", "tokens", "trace_id", "model_asked"] {
        assert_eq!(line.get(absent), None, "{absent}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_fails_after_retries_has_one_line_with_all_attempts() {
    let world = World::new("[retry]\nmax_retries = 2\nbase_delay = \"1s\"\n", |_| vec![Step::Close]);
    let lines = Lines::of(&world);
    let answer = world.chat().await;
    let line = lines.sole();
    assert_eq!(
        (&line["status"], &line["outcome"], &line["code"]),
        (&json!(502), &json!("failed"), &json!("upstream_disconnected"))
    );
    assert_eq!(line["attempts"].to_string(), answer.header("x-weir-attempts"));
    assert!(line["attempts"].as_u64() > Some(2), "{line}");
}

#[tokio::test(start_paused = true)]
async fn the_gateways_error_and_an_answer_that_breaks_off_are_upstream_errors() {
    let world = World::new("[retry]\nmax_retries = 0\n", |seen| match seen.number {
        0 => error(503, &[("x-request-id", "gw-1")]),
        _ => vec![stream_head(), event("one"), Step::Close],
    });
    let lines = Lines::of(&world);
    world.chat().await;
    let line = lines.sole();
    assert_eq!(
        (&line["status"], &line["outcome"], &line["request_id"]),
        (&json!(503), &json!("upstream_error"), &json!("gw-1"))
    );
    assert_eq!(line.get("code"), None, "the gateway's own answer went on");
    let answer = world.stream().await;
    let line = lines.sole();
    assert_eq!((&line["status"], &line["outcome"]), (&json!(200), &json!("upstream_error")));
    assert_eq!((&line["code"], &line["bytes_out"]), (&json!("upstream_disconnected"), &json!(answer.body.len())));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_has_one_line_wherever_it_was() {
    let world = World::new("[limits]\nconcurrency = 1\n", |_| vec![stream_head(), event("one"), Step::Stall]);
    let lines = Lines::of(&world);
    let mut streaming = world.begin(chat(STREAM)).await;
    assert!(streaming.body_mut().frame().await.is_some());
    let waiting = world.spawn(with(chat(CHAT), "x-request-id", "mine"));
    world.settle().await;
    tokio::time::advance(3 * SECOND).await;
    waiting.abort();
    world.settle().await;
    let line = lines.sole();
    assert_eq!(
        (&line["outcome"], &line["attempts"], &line["request_id"]),
        (&json!("disconnected"), &json!(0), &json!("mine"))
    );
    assert_eq!((line.get("status"), &line["queue_ms"], &line["bytes_out"]), (None, &json!(3000.0), &json!(0)));
    drop(streaming);
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    let line = lines.sole();
    assert_eq!(
        (&line["outcome"], &line["status"], &line["attempts"]),
        (&json!("disconnected"), &json!(200), &json!(1))
    );
    assert_eq!((&line["upstream_ms"], &line["first_token_ms"]), (&json!(3000.0), &json!(0.0)));
    assert!(line["bytes_out"].as_u64() > Some(0), "{line}");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_wrong_has_a_line_too() {
    let world = World::new("", |_| answer(404, &[], "{}"));
    let lines = Lines::of(&world);
    for (asked, status, code) in [
        (request(Method::GET, "/models", ""), 404, json!("unknown_path")),
        (chat(r#"{"model":"a","model":"b"}"#), 400, json!("duplicate_key")),
        (chat(r#"{"model":"nobody's"}"#), 404, Value::Null),
    ] {
        let target = asked.uri().path().to_owned();
        world.send(asked).await;
        let line = lines.sole();
        assert_eq!((&line["status"], &line["outcome"]), (&json!(status), &json!("client_error")), "{line}");
        assert_eq!((&line["code"], &line["path"]), (&code, &json!(target)));
    }
}

#[tokio::test(start_paused = true)]
async fn the_name_of_a_model_that_is_not_known_is_told_as_the_client_writes_it_cut() {
    let world = World::new("", |_| error(404, &[]));
    let lines = Lines::of(&world);
    world.send(chat(&format!(r#"{{"model":"gpt-\"{}"}}"#, "x".repeat(100)))).await;
    let line = lines.sole();
    assert_eq!((&line["model"], &line["model_asked"]), (&json!("other"), &json!(format!("gpt-\"{}…", "x".repeat(59)))));
    world.chat().await;
    assert_eq!(lines.sole().get("model_asked"), None, "it is known");
}

#[tokio::test(start_paused = true)]
async fn nothing_that_a_client_sends_breaks_a_line_or_makes_it_long() {
    let world = World::new("", |_| completion());
    let lines = Lines::of(&world);
    let (long, mut served) = ("y".repeat(20_000), 0);
    for (id, path) in [
        (&b"a\"},{\"outcome\":\"ok\"\\"[..], "/v1/x\"},\"y\":{\"z"),
        (b"a\tb\x80\xff\xc3\xa9\x9b2J", "/v1/%0a%1b[2J"),
        (long.as_bytes(), &format!("/v1/{long}")),
        (b"\xe2\x80\xa8\xf0\x9f", "/v1/\\u0000"),
    ] {
        let mut client = world.raw();
        client.write(format!("GET {path} HTTP/1.1\r\nhost: weir.test\r\nx-request-id: ")).await;
        client.write(id).await;
        client.write(format!("\r\ntraceparent: {}\r\n\r\n", &long[..99])).await;
        // Some of these are no targets that weir reads; who gets an answer has a line.
        if client.answer_status().await == 200 {
            served += 1;
            let text = lines.text();
            assert!(text.bytes().all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte)), "{text}");
            assert!(text.lines().count() == 1 && text.len() < 1500, "{text}");
            let line = lines.sole();
            let kept = |text: &[u8], most: usize| {
                let text = String::from_utf8_lossy(text).into_owned();
                let cut = text.chars().count() > most;
                text.chars().take(most).chain(cut.then_some('…')).collect::<String>()
            };
            assert_eq!(line["path"], json!(kept(path.as_bytes(), 256)));
            // weir keeps 128 bytes of it.
            assert_eq!(line["request_id"], json!(String::from_utf8_lossy(&id[..id.len().min(128)])));
            assert_eq!(line.get("trace_id"), None);
        }
    }
    assert!(served >= 3, "{served}");
}

#[tokio::test(start_paused = true)]
async fn an_http2_request_and_an_upload_that_streams_through_are_told_with_their_bytes() {
    let world = World::new("", |_| answer(200, &[], "{}"));
    let lines = Lines::of(&world);
    let mut sender = world.http2().await;
    let response = sender.send_request(over_http2(chat(CHAT))).await.expect("answered");
    crate::world::collect(response).await;
    let line = lines.sole();
    assert_eq!((&line["http"], &line["bytes_in"], &line["bytes_out"]), (&json!("2"), &json!(CHAT.len()), &json!(2)));
    let mut client = world.raw();
    client.write("POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 3000000\r\n\r\n").await;
    client.write(vec![b'x'; 3_000_000]).await;
    assert_eq!(client.answer().await.expect("answered").status, 200);
    let line = lines.sole();
    assert_eq!(
        (&line["bytes_in"], &line["model"], &line["path"]),
        (&json!(3_000_000), &json!("-"), &json!("/v1/files"))
    );
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_comes_whole_has_a_line_with_what_came() {
    let world = World::new("[server]\nbody_timeout = \"30s\"\n", |_| completion());
    let lines = Lines::of(&world);
    let mut client = world.raw();
    client.write("POST /v1/chat/completions HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 100\r\n\r\n12345").await;
    assert_eq!(client.answer().await.expect("answered").status, 408);
    let line = lines.sole();
    assert_eq!((&line["status"], &line["bytes_in"], &line["total_ms"]), (&json!(408), &json!(5), &json!(30_000.0)));
    // And one whose client hangs up.
    let mut client = world.connect();
    client
        .write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 100\r\n\r\n12345")
        .await
        .expect("written");
    world.settle().await;
    drop(client);
    world.settle().await;
    let line = lines.sole();
    assert_eq!((line["outcome"].as_str(), line["attempts"].as_u64()), (Some("client_error"), Some(0)), "{line}");
}

#[tokio::test(start_paused = true)]
async fn it_can_be_switched_off_and_on_while_requests_run() {
    let world = World::new("", |_| [vec![Step::Gate], completion()].concat());
    assert_eq!(world.proxy.access_log().redirect(None).err().map(|error| error.to_string()), None);
    let unseen = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    let lines = Lines::of(&world);
    world.gateway.go_on();
    assert_eq!(unseen.await.expect("answered").status, 200);
    assert_eq!(lines.all(), Vec::<Value>::new(), "it began while the log was off");
    let seen = world.spawn(chat(CHAT));
    world.gateway.saw(2).await;
    let later = Lines::of(&world);
    world.gateway.go_on();
    assert_eq!(seen.await.expect("answered").status, 200);
    assert_eq!((lines.all().len(), later.all().len()), (0, 1), "where it is written is decided when it ends");
    world.proxy.access_log().redirect(None).expect("nothing is needed");
    let unseen = world.spawn(chat(CHAT));
    world.gateway.saw(3).await;
    world.gateway.go_on();
    assert_eq!(unseen.await.expect("answered").status, 200);
    assert_eq!(later.all().len(), 1);
}

/// docs/access-log.md has a table of the fields, and examples.
#[tokio::test(start_paused = true)]
async fn every_field_is_documented_and_the_examples_have_no_others() {
    let text = include_str!("../../docs/access-log.md");
    let cells = text.lines().filter(|line| line.starts_with("| `")).filter_map(|line| line.split('|').nth(1));
    let fields: Vec<&str> = cells.flat_map(|cell| cell.split(", ")).map(|name| name.trim().trim_matches('`')).collect();
    let examples: Vec<Value> = text.lines().filter(|line| line.starts_with('{')).map(parse).collect();
    assert_eq!(examples.len(), 2);

    let config = "[models.\"gpt-4.1-mini\"]\nrequests = { rate = \"1/h\", burst = 1 }\n[queue]\nmax_wait = \"0s\"\n";
    let world = World::new(config, |_| crate::gateway::stream(&["a"]));
    let lines = Lines::of(&world);
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    world.send(with(chat(STREAM), "traceparent", parent)).await;
    world.chat().await;
    world.send(chat(r#"{"model":"new"}"#)).await;
    let mut written = lines.all();
    assert_eq!(written.len(), 3);
    written.extend(examples);
    for line in &written {
        for name in line.as_object().expect("an object").keys() {
            assert!(fields.contains(&name.as_str()), "{name} is not in docs/access-log.md");
        }
    }
    for field in fields.iter().filter(|field| **field != "time") {
        assert!(written.iter().any(|line| line.get(field).is_some()), "nothing has {field}");
    }
}
