//! What passes is counted, in the right units and under bounded names, and passes untouched all the same.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use crate::gateway::{Seen, Step, answer, chunk, completion, done, error, event, json, stream_head};
use crate::world::{CHAT, STREAM, World, bearer, chat, collect, request};

const MODEL: &str = "gpt-4.1-mini";

fn tokens(world: &World) -> [f64; 4] {
    ["prompt", "completion", "cached", "reasoning"]
        .map(|kind| world.metric(&format!(r#"weir_tokens_total{{model="{MODEL}",client="-",kind="{kind}"}}"#)))
}

/// How often a model's histogram was fed, and what it adds up to in milliseconds.
fn histogram(world: &World, name: &str) -> (f64, u64) {
    let of = |suffix: &str| world.metric(&format!(r#"weir_{name}_seconds_{suffix}{{model="{MODEL}"}}"#));
    (of("count"), (of("sum") * 1000.0).round() as u64)
}

fn wait(millis: u64) -> Step {
    Step::Wait(Duration::from_millis(millis))
}

/// A chat request to this model.
fn chat_to(model: &str) -> Request<Full<Bytes>> {
    chat(&format!(r#"{{"model":{model:?}}}"#))
}

// Tokens.

#[tokio::test(start_paused = true)]
async fn the_tokens_of_chats_completions_and_embeddings_are_counted() {
    let script = |seen: &Seen| match seen.target() {
        "/v1/chat/completions" => json(
            r#"{"choices":[{"message":{"content":"the \"usage\":{\"prompt_tokens\":999}"}}],"usage":{"prompt_tokens":10,
            "completion_tokens":5,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}}}"#,
        ),
        "/v1/completions" => json(r#"{"choices":[{"text":"a"}],"usage":{"prompt_tokens":100,"completion_tokens":50}}"#),
        _ => json(r#"{"data":[{"embedding":[0.1,0.2]}],"usage":{"prompt_tokens":1000,"total_tokens":1000}}"#),
    };
    let world = World::new("", script);
    assert_eq!(world.chat().await.status, 200);
    assert_eq!(tokens(&world), [10.0, 5.0, 4.0, 2.0]);
    for (path, expected) in [("/v1/completions", [110.0, 55.0, 4.0, 2.0]), ("/v1/embeddings", [1110.0, 55.0, 4.0, 2.0])]
    {
        assert_eq!(world.send(request(Method::POST, path, r#"{"model":"gpt-4.1-mini"}"#)).await.status, 200);
        assert_eq!(tokens(&world), expected, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_tokens_of_a_stream_are_those_of_its_usage_chunk() {
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\r\n\r\n";
    let world = World::new("", move |_| {
        let usage_null = chunk("data: {\"choices\":[{\"delta\":{}}],\"usage\":null}\n\n");
        // The usage comes in two chunks.
        let (one, two) = usage.split_at(40);
        [vec![stream_head(), event("one"), usage_null, chunk(one), chunk(two)], done().to_vec()].concat()
    });
    let streamed = world.stream_with_usage().await;
    assert!(streamed.text().ends_with(&format!("{usage}data: [DONE]\n\n")) && !streamed.broken);
    assert_eq!(tokens(&world), [7.0, 3.0, 0.0, 0.0]);
}

#[tokio::test(start_paused = true)]
async fn the_tokens_of_messages_are_told_at_the_beginning_and_at_the_end_of_the_stream() {
    let start = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":10,\
        \"cache_creation_input_tokens\":20,\"cache_read_input_tokens\":70,\"output_tokens\":1}}}\n\n";
    let delta = "event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":15}}\n\n";
    let end = Step::Send(b"0\r\n\r\n".to_vec());
    let world = World::new("", move |_| vec![stream_head(), chunk(start), chunk(delta), end.clone()]);
    assert_eq!(world.send(request(Method::POST, "/v1/messages", STREAM)).await.text(), format!("{start}{delta}"));
    assert_eq!(tokens(&world), [100.0, 15.0, 70.0, 0.0], "what the cache had is a part of the prompt");
}

#[tokio::test(start_paused = true)]
async fn an_encoded_answer_passes_unread() {
    let body = r#"{"usage":{"prompt_tokens":10,"completion_tokens":5}}"#;
    let headers = [("content-type", "application/json"), ("content-encoding", "gzip")];
    let world = World::new("", move |_| answer(200, &headers, body));
    let passed = world.chat().await;
    assert_eq!((passed.text().as_str(), passed.header("content-encoding")), (body, "gzip"));
    assert_eq!(tokens(&world), [0.0; 4]);
    assert_eq!(world.requests("ok"), 1.0);
    assert_eq!(world.gateway.seen()[0].header("accept-encoding"), ["identity"], "though it was asked not to be");
}

#[tokio::test(start_paused = true)]
async fn the_tokens_of_an_opaque_call_or_an_error_are_not_counted() {
    let body = r#"{"usage":{"prompt_tokens":10,"completion_tokens":5},"error":{"message":"no"}}"#;
    let world = World::new("", move |seen| answer(if seen.number == 0 { 200 } else { 400 }, &[], body));
    assert_eq!(world.send(request(Method::POST, "/v1/audio/speech", r#"{"model":"gpt-4.1-mini"}"#)).await.status, 200);
    assert_eq!(world.chat().await.status, 400);
    assert_eq!(world.metric_sum("weir_tokens_total", ""), 0.0);
}

// Names.

#[tokio::test(start_paused = true)]
async fn a_model_has_its_name_from_the_configuration_or_from_its_first_success() {
    let world = World::new("", |seen| if seen.number == 0 { error(404, &[]) } else { completion() });
    let of = |model: &str| world.metric_sum("weir_requests_total", &format!("model={model:?}"));
    assert_eq!(world.send(chat_to("deepseek-chat")).await.status, 404);
    assert_eq!((of("deepseek-chat"), of("other")), (0.0, 1.0), "a name that fails is no name");
    assert_eq!(world.send(chat_to("deepseek-chat")).await.status, 200);
    assert_eq!((of("deepseek-chat"), of("other")), (1.0, 1.0), "the success is the name's own");
    assert_eq!(world.chat().await.status, 200);
    assert_eq!(world.send(request(Method::GET, "/v1/models", "")).await.status, 200);
    assert_eq!((of(MODEL), of("-")), (1.0, 1.0));
    assert_eq!(world.send(chat(r#"{"messages":[]}"#)).await.status, 200);
    assert_eq!(of("other"), 2.0, "a call that should name a model and does not");
}

#[tokio::test(start_paused = true)]
async fn made_up_names_make_no_series_without_end() {
    let is_failing = |seen: &Seen| String::from_utf8_lossy(&seen.body).contains("failing");
    let world = World::new("", move |seen| if is_failing(seen) { error(400, &[]) } else { completion() });
    let mut client = world.http2().await;
    for number in 0..300 {
        for kind in ["failing", "made-up"] {
            let mut request = chat_to(&format!("{kind}-{number}"));
            *request.uri_mut() = "http://weir.test/v1/chat/completions".parse().expect("a URL");
            request.headers_mut().remove("host");
            client.ready().await.expect("open");
            collect(client.send_request(request).await.expect("answered")).await;
        }
    }
    let text = world.proxy.metrics().encode(&world.proxy.gauges());
    let counted = |series: &str| text.lines().filter(|line| line.contains(series)).count();
    assert_eq!(counted(r#"model="failing"#), 0);
    assert_eq!(counted(r#",client="-",outcome="ok""#), 2 + 256, "256 names, other, and the calls that name none");
    let others = r#"weir_requests_total{model="other",client="-",outcome="#;
    assert_eq!(world.metric(&format!("{others}\"ok\"}}")), 300.0 - 256.0);
    assert_eq!(world.metric(&format!("{others}\"client_error\"}}")), 300.0);
    assert_eq!(world.metric_sum("weir_requests_total", ""), 600.0);
}

#[tokio::test(start_paused = true)]
async fn all_who_wait_are_counted_at_the_limit_that_they_wait_for() {
    let config = "[limits]\nconcurrency = 3\n[models.slow]\nconcurrency = 1\n[models.tried]\nconcurrency = 1\n\
                  mode = \"observe\"\n[clients.batch]\nkey = \"batch\"\nrequests = { rate = \"1/min\", burst = 1 }\n\
                  [clients.bot]\nkey = \"bot\"\n";
    let world = World::new(config, |seen| match String::from_utf8_lossy(&seen.body).contains("cold") {
        true => error(429, &[("retry-after", "60")]),
        false => vec![Step::Stall],
    });
    let mut sent = Vec::new();
    for (key, model, count) in [("bot", "cold", 1), ("batch", "fast", 3), ("bot", "slow", 3), ("bot", "tried", 6)] {
        sent.extend((0..count).map(|_| world.spawn(bearer(chat_to(model), key))));
        world.settle().await;
    }
    let at = |scope, name, unit| {
        world.metric(&format!(r#"weir_limit_waiting{{scope="{scope}",name="{name}",unit="{unit}"}}"#))
    };
    assert_eq!(world.metric_sum("weir_learned_waiting", ""), 1.0, "the gateway's word for cold: other by name");
    assert_eq!(at("client", "batch", "requests"), 2.0);
    assert_eq!(at("model", "slow", "concurrency"), 2.0);
    assert_eq!(at("global", "", "concurrency"), 5.0, "two before them are under way, and one of theirs");
    assert_eq!(at("model", "tried", "concurrency"), 0.0, "what only observes holds nobody up");
    assert_eq!(world.metric_sum("weir_limit_waiting", ""), 9.0, "each waits for one limit at a time");
    assert_eq!(world.metric_sum("weir_waiting", ""), 10.0);
    sent.iter().for_each(tokio::task::JoinHandle::abort);
    drop(sent);
    world.settle().await;
    assert_eq!((world.metric_sum("weir_limit_waiting", ""), world.metric_sum("weir_learned_waiting", "")), (0.0, 0.0));
}

// Times.

#[tokio::test(start_paused = true)]
async fn each_time_is_measured_from_where_it_says() {
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":5}}\n\n";
    let script = move |_: &Seen| {
        let begins = vec![wait(1000), stream_head(), wait(500), event("one"), wait(2000)];
        [begins, vec![event("two"), chunk(usage), chunk("data: [DONE]\n\n"), Step::Send(b"0\r\n\r\n".to_vec())]]
            .concat()
    };
    let world = World::new("[limits]\nconcurrency = 1\n", script);
    let clients = [world.spawn(chat(STREAM)), world.spawn(chat(STREAM))];
    for client in clients {
        assert_eq!(client.await.expect("answered").status, 200);
    }
    assert_eq!(histogram(&world, "time_to_first_token"), (2.0, 2 * 1500));
    assert_eq!(histogram(&world, "time_per_output_token"), (2.0, 2 * 2000 / 4), "2 s for the four after the first");
    assert_eq!(histogram(&world, "upstream_duration"), (2.0, 2 * 3500));
    assert_eq!(histogram(&world, "queue_wait"), (2.0, 3500), "the second waited for the first");
    assert_eq!(histogram(&world, "request_duration"), (2.0, 3500 + 7000));
    let overhead = |suffix| world.metric(&format!("weir_overhead_seconds_{suffix}"));
    assert_eq!((overhead("count"), overhead("sum")), (2.0, 0.0), "no time passes within weir");
}

#[tokio::test(start_paused = true)]
async fn a_first_output_after_three_seconds_counts_as_three_seconds() {
    // Longer than the head is held.
    let world = World::new("", |_| [vec![stream_head(), wait(3000), event("one")], done().to_vec()].concat());
    world.stream().await;
    assert_eq!(histogram(&world, "time_to_first_token"), (1.0, 3000));
    assert_eq!(histogram(&world, "time_per_output_token"), (0.0, 0), "no usage, no mean");
}

#[tokio::test(start_paused = true)]
async fn the_first_token_is_the_first_output_and_neither_a_role_nor_an_error() {
    let role = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n";
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":5}}\n\n";
    // Held until then, or not any more.
    for pause in [1000, 4000] {
        let world = World::new("", move |_| {
            let begins =
                vec![wait(500), stream_head(), chunk(role), wait(pause), event("one"), wait(2000), chunk(usage)];
            [begins, done().to_vec()].concat()
        });
        world.stream().await;
        assert_eq!(histogram(&world, "time_to_first_token"), (1.0, 500 + pause));
        assert_eq!(histogram(&world, "time_per_output_token"), (1.0, 2000 / 4));
    }
    let error = "data: {\"error\":{\"message\":\"overloaded\"}}\n\n";
    let world = World::new("[retry]\nmax_retries = 0\n", move |_| {
        [vec![stream_head(), chunk(role), chunk(error)], done().to_vec()].concat()
    });
    world.stream().await;
    assert_eq!((histogram(&world, "time_to_first_token"), world.attempts("stream_error")), ((0.0, 0), 1.0));
}

#[tokio::test(start_paused = true)]
async fn retries_and_the_sleep_before_them_count_for_the_request_only() {
    let script = |seen: &Seen| match seen.number {
        0 => [vec![wait(200)], error(503, &[("retry-after", "4")])].concat(),
        _ => [vec![wait(300)], completion()].concat(),
    };
    let world = World::new("", script);
    let answer = world.chat().await;
    assert_eq!(answer.header("x-response-time"), "4500");
    assert_eq!(
        answer.header("server-timing"),
        "queue;dur=4000.0, upstream;dur=500.0",
        "its lane waited for the gateway"
    );
    assert_eq!(histogram(&world, "request_duration"), (1.0, 4500));
    assert_eq!(histogram(&world, "upstream_duration"), (2.0, 500));
    assert_eq!(histogram(&world, "queue_wait"), (2.0, 4000));
    assert_eq!(histogram(&world, "time_to_first_token"), (0.0, 0), "of streams only");
    assert_eq!(world.metric("weir_overhead_seconds_sum"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn no_wait_is_weirs_overhead_though_it_was_in_vain() {
    /// The gateway refuses all but this request, for which it takes three seconds.
    fn all_but(number: usize) -> impl Fn(&Seen) -> Vec<Step> {
        move |seen| match seen.number == number {
            true => [vec![wait(3000)], completion()].concat(),
            false => error(409, &[]),
        }
    }
    let budget = "[retry]\nbudget = 0\n[timeouts]\ndeadline = \"8s\"\n[limits]\n";
    let ways = [
        ("the queue", "[queue]\nmax_wait = \"2500ms\"\n[limits]\nconcurrency = 1\n".to_owned(), 1, 1),
        // Ten retries are free; the others sleep, and are out of time.
        ("the budget", format!("{budget}concurrency = 100\n"), 20, 30),
        // They sleep while it is allowed, and when the slot is free others have been quicker.
        ("the budget, with a permit", format!("{budget}concurrency = 1\n"), 20, 30),
    ];
    for (what, config, refused, attempts) in ways {
        let world = World::new(&config, all_but(refused));
        let mut clients: Vec<_> = (0..refused).map(|_| world.spawn(chat(CHAT))).collect();
        world.gateway.saw(refused).await;
        clients.push(world.spawn(chat(CHAT)));
        for client in clients {
            assert!([200, 409].contains(&client.await.expect("answered").status.as_u16()), "{what}");
        }
        let overhead = |suffix| world.metric(&format!("weir_overhead_seconds_{suffix}"));
        assert_eq!(world.attempts("4xx"), f64::from(attempts), "{what}");
        assert_eq!((overhead("count"), overhead("sum")), (refused as f64 + 1.0, 0.0), "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_clients_body_is_not_weirs_overhead() {
    let world = World::new("", |_| completion());
    let mut client = world.raw();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: weir\r\ncontent-length: ";
    client.write(format!("{head}{}\r\n\r\n", CHAT.len())).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    client.write(CHAT).await;
    assert_eq!(client.answer_status().await, 200);
    assert_eq!(world.metric("weir_overhead_seconds_sum"), 0.0);
}

// Ends.

#[tokio::test(start_paused = true)]
async fn every_way_to_end_has_its_word() {
    type Script = fn(&Seen) -> Vec<Step>;
    let refusing = "[limits]\nrequests = { rate = \"1/min\", burst = 1 }\n[queue]\nmax_wait = \"1s\"\n";
    let ways: [(&str, &str, Script, &str); 9] = [
        ("an answer", "", |_| completion(), "ok"),
        ("the client's own error", "", |_| error(422, &[]), "client_error"),
        ("an error passed on", "", |_| error(503, &[("retry-after-ms", "1")]), "upstream_error"),
        ("a 429 passed on", "", |_| error(429, &[("retry-after-ms", "1")]), "upstream_error"),
        ("a broken answer", "", |_| vec![stream_head(), event("one"), Step::Close], "upstream_error"),
        ("an answer with too little", "", |_| short(), "upstream_error"),
        ("no answer", "", |_| vec![Step::Close], "failed"),
        ("too slow an answer", "[timeouts]\nresponse = \"1s\"\n", |_| vec![Step::Stall], "failed"),
        ("a refusal", refusing, |_| completion(), "refused"),
    ];
    for (what, config, script, outcome) in ways {
        let world = World::new(config, script);
        if outcome == "refused" {
            world.chat().await;
        }
        let before = world.requests(outcome);
        world.chat().await;
        assert_eq!(world.requests(outcome), before + 1.0, "{what}");
        assert_eq!(world.metric_sum("weir_requests_total", &format!("outcome={outcome:?}")), 1.0, "{what}");
        world.assert_nothing_held();
    }
}

/// Declares more than it sends.
fn short() -> Vec<Step> {
    vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"choices\":[]}".to_vec()), Step::Close]
}

#[tokio::test(start_paused = true)]
async fn requests_that_are_wrong_are_the_clients_errors() {
    let world = World::new("", |_| completion());
    assert_eq!(world.send(request(Method::GET, "/models", "")).await.status, 404);
    assert_eq!(world.send(chat(r#"{"model":"a","model":"b"}"#)).await.status, 400);
    assert_eq!(world.metric_sum("weir_requests_total", "outcome=\"client_error\""), 2.0);
    assert_eq!(world.metric_sum("weir_requests_total", ""), 2.0);
    assert_eq!(world.metric_sum("weir_upstream_attempts_total", ""), 0.0);
    assert_eq!(world.gateway.connections(), 0);
}

#[tokio::test(start_paused = true)]
async fn retries_are_counted_by_what_they_repeat() {
    let script = |seen: &Seen| match seen.number {
        0 => error(429, &[("retry-after-ms", "1")]),
        1 => error(503, &[("retry-after-ms", "1")]),
        // On a pooled connection a mere close would be a stale one, which costs no retry.
        2 => vec![Step::Send(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), Step::Close],
        4 => vec![Step::Stall],
        5 => {
            [vec![stream_head(), chunk("data: {\"error\":{\"message\":\"overloaded\"}}\n\n")], done().to_vec()].concat()
        }
        _ => completion(),
    };
    let world = World::new("[timeouts]\nresponse = \"1s\"\n", script);
    assert_eq!(world.chat().await.header("x-weir-attempts"), "4");
    assert_eq!(world.chat().await.header("x-weir-attempts"), "3");
    let of = |reason: &str| world.metric(&format!(r#"weir_retries_total{{model="{MODEL}",reason="{reason}"}}"#));
    assert_eq!(["429", "5xx", "reset", "timeout", "stream_error"].map(of), [1.0; 5]);
    assert_eq!(world.metric_sum("weir_retries_total", ""), 5.0);
    assert_eq!(world.metric_sum("weir_upstream_attempts_total", ""), 7.0);
    assert_eq!(world.attempts("ok"), 2.0);
}

// Streams.

#[tokio::test(start_paused = true)]
async fn each_event_reaches_the_client_before_the_next_is_made() {
    let world = World::new("", |_| {
        let words = ["one", "two", "three"].iter().flat_map(|word| [event(word), Step::Gate]);
        [vec![stream_head()], words.collect(), done().to_vec()].concat()
    });
    let mut body = world.begin(chat(STREAM)).await.into_body();
    for word in ["one", "two", "three"] {
        let frame = body.frame().await.expect("more comes").expect("unbroken").into_data().expect("data");
        assert!(String::from_utf8_lossy(&frame).contains(word), "{frame:?}");
        world.settle().await;
        world.gateway.go_on();
    }
    let rest = body.collect().await.expect("whole").to_bytes();
    assert_eq!(rest, "data: [DONE]\n\n");
    assert_eq!(world.elapsed(), 0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn wherever_chunks_cut_an_event_the_bytes_stay_and_are_understood() {
    let text = "data: {\"choices\":[{\"delta\":{\"content\":\"Grüße\"}}]}\r\n\r\n: a comment\n\ndata: {\"choices\":[],\
                \"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\r\n\r\ndata: [DONE]\n\n";
    for at in 1..text.len() {
        let script = move |_: &Seen| {
            let raw = |bytes: &[u8]| Step::Send([format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat());
            let (one, two) = text.as_bytes().split_at(at);
            vec![stream_head(), raw(one), wait(1), raw(two), Step::Send(b"0\r\n\r\n".to_vec())]
        };
        let world = World::new("", script);
        assert_eq!(world.stream_with_usage().await.body, text.as_bytes(), "cut at {at}");
        assert_eq!(tokens(&world), [7.0, 3.0, 0.0, 0.0], "cut at {at}");
        assert_eq!(histogram(&world, "time_to_first_token").0, 1.0, "cut at {at}");
        assert_eq!((world.requests("ok"), world.attempts("ok")), (1.0, 1.0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_nobody_reads_stops_the_gateway() {
    const EVENT: usize = 64 << 10;
    const EVENTS: usize = 160;
    // Between the gateway and the client: two pipes of 64 KiB, hyper's buffers on either side of weir, and what one event
    // overhangs. All of it is less than this.
    const UNDER_WAY: usize = 2 << 20;
    let word = "x".repeat(EVENT);
    let world = World::new("", move |_| {
        let events = (0..EVENTS).map(|_| event(&word));
        [vec![stream_head()], events.collect(), done().to_vec()].concat()
    });
    let (mut sender, connection) = http1::handshake(TokioIo::new(world.connect())).await.expect("weir speaks HTTP");
    tokio::spawn(connection);
    let mut body = sender.send_request(chat(STREAM)).await.expect("answered").into_body();
    assert!(body.frame().await.is_some());
    tokio::time::sleep(Duration::from_secs(30)).await;
    let sent = world.gateway.sent();
    assert!(sent < UNDER_WAY, "{sent} bytes of {} were taken from the gateway", EVENT * EVENTS);
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        read += frame.expect("unbroken").into_data().expect("data").len();
        assert!(world.gateway.sent() < read + EVENT + UNDER_WAY);
    }
    assert!(read >= EVENT * (EVENTS - 1), "who reads on gets it all");
    world.settle().await;
    assert_eq!(world.requests("ok"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_drain_lets_a_stream_end_and_then_closes_its_connection() {
    let world = World::new("", |_| [vec![stream_head(), event("one"), Step::Gate], done().to_vec()].concat());
    let (mut sender, connection) = http1::handshake(TokioIo::new(world.connect())).await.expect("weir speaks HTTP");
    let connection = tokio::spawn(connection);
    let response = sender.send_request(chat(STREAM)).await.expect("answered");
    world.drain();
    world.settle().await;
    world.gateway.go_on();
    let answer = collect(response).await;
    assert!(answer.text().ends_with("data: [DONE]\n\n") && !answer.broken);
    connection.await.expect("no panic").expect("closed in good order");
    assert_eq!(world.requests("ok"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_answer_with_trailers_is_whole_and_nothing_is_held_back_for_good() {
    for end in ["data: [DONE]\n\n", "data: [DONE]\n"] {
        let script = move |_: &Seen| {
            let body = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"a\"}}}}]}}\n\n{end}");
            let last = Step::Send(b"0\r\nx-sum: 1\r\n\r\n".to_vec());
            vec![stream_head(), chunk(&body), last]
        };
        let world = World::new("", script);
        let answer = world.stream().await;
        assert!(answer.text().ends_with(end) && !answer.broken, "{:?}", answer.text());
        world.settle().await;
        assert_eq!((world.requests("ok"), world.attempts("ok")), (1.0, 1.0));
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_client_sent_and_the_gateway_repeats_is_not_taken_for_usage() {
    let tool = r#"{"type":"function","parameters":{"properties":{"usage":{"input_tokens":1000000000000}}}}"#;
    let world = World::new("[limits]\ntokens = \"200000/min\"\n", move |_| {
        let created = format!(r#"{{"type":"response.created","response":{{"tools":[{tool}],"usage":null}}}}"#);
        let completed = r#"{"type":"response.completed","response":{"usage":{"input_tokens":10,"output_tokens":2}}}"#;
        let events = [created.as_str(), completed].map(|data| chunk(&format!("data: {data}\n\n")));
        [vec![stream_head()], events.to_vec(), vec![Step::Send(b"0\r\n\r\n".to_vec())]].concat()
    });
    for _ in 0..2 {
        assert_eq!(world.send(request(Method::POST, "/v1/responses", STREAM)).await.status, 200);
    }
    assert_eq!((tokens(&world), world.elapsed()), ([20.0, 4.0, 0.0, 0.0], 0));
}

#[tokio::test(start_paused = true)]
async fn what_is_counted_for_all_together_is_there_at_zero_before_anything_has_happened() {
    let world = World::new("", |_| completion());
    let text = world.proxy.metrics().encode(&world.proxy.gauges());
    // An alert on increase() sees the first one only if there was a 0 before it.
    for series in [
        r#"weir_client_disconnects_total{phase="queue"}"#,
        r#"weir_client_disconnects_total{phase="stream"}"#,
        r#"weir_guards_total{guard="max_connections"}"#,
        r#"weir_guards_total{guard="write_timeout"}"#,
        r#"weir_reloads_total{result="applied"}"#,
        r#"weir_reloads_total{result="refused"}"#,
        "weir_tls_handshake_failures_total",
        "weir_access_log_dropped_total",
        "weir_overhead_seconds_count",
    ] {
        assert!(text.lines().any(|line| line == format!("{series} 0")), "{series} is not 0 in {text}");
    }
}
