//! weir asks for a stream's usage where its client does not, and nobody notices: not the client, whose stream is as it was
//! without, and not for long a gateway that does not know the option.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;

use crate::gateway::{Seen, Step, chunk, done, error, event, json, stream, stream_head};
use crate::world::{Answer, STREAM, STREAM_WITH_USAGE, World, chat, collect, over_http2, request};

const BUDGET: &str = "[limits]\ntokens = { rate = \"10000/day\", burst = 10000 }\nconcurrency = 100\n";

/// The extra chunk.
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":40,\"completion_tokens\":7}}\n\n";

fn used(world: &World) -> f64 {
    10_000.0 - world.remaining_tokens()
}

fn asked(seen: &Seen) -> bool {
    String::from_utf8_lossy(&seen.body).contains(r#""include_usage":true"#)
}

/// How often the gateway was asked with the option, and how often without.
fn asked_and_not(world: &World) -> (usize, usize) {
    let with = world.gateway.seen().iter().filter(|seen| asked(seen)).count();
    (with, world.gateway.seen().len() - with)
}

/// A stream that ends with its usage where that was asked for.
fn obliging(seen: &Seen) -> Vec<Step> {
    let usage = asked(seen).then(|| chunk(USAGE));
    [stream_head(), event("one"), event("two")].into_iter().chain(usage).chain(done()).collect()
}

/// Refuses the option as those do who have never heard of it.
fn ignorant(seen: &Seen) -> Vec<Step> {
    if asked(seen) { error(400, &[]) } else { obliging(seen) }
}

fn word(text: &str) -> String {
    format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
}

/// What a client gets that did not ask.
fn plain() -> String {
    format!("{}{}data: [DONE]\n\n", word("one"), word("two"))
}

#[track_caller]
fn assert_plain(answer: &Answer) {
    assert_eq!((answer.status.as_u16(), answer.text(), answer.broken), (200, plain(), false));
}

// What goes out and what comes back.

#[tokio::test(start_paused = true)]
async fn the_gateway_is_asked_and_the_client_gets_what_it_asked_for() {
    let world = World::new(BUDGET, obliging);
    assert_plain(&world.stream().await);
    let seen = &world.gateway.seen()[0];
    let expected = STREAM.replacen('{', r#"{"stream_options":{"include_usage":true},"#, 1);
    assert_eq!(String::from_utf8_lossy(&seen.body), expected);
    assert_eq!(seen.header("content-length"), [expected.len().to_string()]);
    let mut value: serde_json::Value = serde_json::from_slice(&seen.body).expect("JSON");
    value.as_object_mut().expect("an object").remove("stream_options");
    assert_eq!(value, serde_json::from_str::<serde_json::Value>(STREAM).expect("JSON"));
    assert_eq!(used(&world), 47.0, "and so weir knows what it cost");
    assert_eq!(world.metric_sum("weir_tokens_total", ""), 47.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn other_options_stay_beside_weirs() {
    let world = World::new(BUDGET, obliging);
    let with_options = |options: &str| STREAM.replacen('{', &format!("{{\"stream_options\":{options},"), 1);
    for (theirs, ours) in [
        (r#"{"include_obfuscation":false}"#, r#"{"include_usage":true,"include_obfuscation":false}"#),
        ("{ }", r#"{"include_usage":true }"#),
        ("null", r#"{"include_usage":true}"#),
        (r#"{"include_usage":null}"#, r#"{"include_usage":true}"#),
    ] {
        assert_plain(&world.send(chat(&with_options(theirs))).await);
        let seen = world.gateway.seen();
        let body = String::from_utf8_lossy(&seen.last().expect("seen").body).into_owned();
        assert_eq!(body, with_options(ours), "{theirs}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_asked_gets_the_usage_and_who_declined_is_left_alone() {
    let world = World::new(BUDGET, obliging);
    let answer = world.stream_with_usage().await;
    assert_eq!(answer.text(), plain().replace("data: [DONE]", &format!("{USAGE}data: [DONE]")));
    let declined = STREAM_WITH_USAGE.replace("true}", "false}");
    assert_plain(&world.send(chat(&declined)).await);
    let bodies: Vec<_> = world.gateway.seen().into_iter().map(|seen| seen.body).collect();
    assert_eq!(bodies, [STREAM_WITH_USAGE.as_bytes(), declined.as_bytes()]);
}

#[tokio::test(start_paused = true)]
async fn only_streams_of_chat_completions_are_asked() {
    let with_usage = |_: &Seen| [vec![stream_head(), event("one"), chunk(USAGE)], done().to_vec()].concat();
    let world = World::new(BUDGET, with_usage);
    for path in ["/v1/completions", "/v1/responses", "/v1/messages"] {
        let answer = world.send(request(Method::POST, path, STREAM)).await;
        assert!(answer.text().contains(USAGE), "{path}: {}", answer.text());
    }
    let whole = STREAM.replace("\"stream\":true", "\"stream\":false");
    world.send(chat(&whole)).await;
    let seen = world.gateway.seen();
    assert!(seen[..3].iter().all(|seen| seen.body == STREAM.as_bytes()));
    assert_eq!(seen[3].body, whole.as_bytes());
}

#[tokio::test(start_paused = true)]
async fn wherever_chunks_cut_the_stream_only_the_usage_is_missing() {
    let text = format!("{}{}{USAGE}data: [DONE]\n\n", word("one"), word("two"));
    for line_end in ["\n", "\r\n"] {
        let (text, expected) = (text.replace('\n', line_end), plain().replace('\n', line_end));
        for at in 1..text.len() {
            let text = text.clone();
            let world = World::new(BUDGET, move |_| {
                let (one, two) = text.split_at(at);
                vec![stream_head(), chunk(one), Step::Wait(Duration::from_millis(1)), chunk(two), done()[1].clone()]
            });
            let answer = world.stream().await;
            assert_eq!((answer.text(), answer.broken), (expected.clone(), false), "cut at {at}");
            assert_eq!(used(&world), 47.0, "cut at {at}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_in_one_piece_and_one_of_declared_length_are_whole_without_the_usage() {
    let text = format!("{}{}{USAGE}data: [DONE]\n\n", word("one"), word("two"));
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {}\r\n\r\n", text.len());
    let ways = [
        vec![stream_head(), chunk(&text), done()[1].clone()],
        vec![Step::Send([head.as_bytes(), text.as_bytes()].concat())],
        vec![Step::Send(head.into_bytes()), Step::Wait(Duration::from_millis(10)), Step::Send(text.into_bytes())],
    ];
    for steps in ways {
        let world = World::new(BUDGET, move |_| steps.clone());
        let answer = world.stream().await;
        assert_plain(&answer);
        assert_eq!(answer.header("content-length"), "");
        let mut client = world.http2().await;
        assert_plain(&collect(client.send_request(over_http2(chat(STREAM))).await.expect("answered")).await);
        assert_eq!((used(&world), world.requests("ok")), (94.0, 2.0));
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_usage_and_nothing_else_ends_well() {
    let bare = World::new(BUDGET, |_| vec![stream_head(), chunk(USAGE), done()[1].clone()]);
    let answer = bare.stream().await;
    assert_eq!((answer.status.as_u16(), answer.text().as_str(), answer.broken), (200, "", false));
    let last = World::new(BUDGET, |_| vec![stream_head(), event("one"), chunk(USAGE.trim_end()), done()[1].clone()]);
    assert_eq!(last.stream().await.text(), word("one"), "though its blank line is missing");
    for world in [bare, last] {
        world.settle().await;
        assert_eq!(world.requests("ok"), 1.0);
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_no_stream_passes_as_it_came() {
    let body = r#"{"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":7}}"#;
    let world = World::new(BUDGET, move |_| json(body));
    let answer = world.stream().await;
    assert_eq!((answer.text().as_str(), answer.header("content-length")), (body, body.len().to_string().as_str()));
    assert_eq!(used(&world), 47.0);
}

#[tokio::test(start_paused = true)]
async fn each_event_still_reaches_the_client_before_the_next_is_made() {
    use http_body_util::BodyExt as _;
    let world = World::new(BUDGET, |_| {
        [vec![stream_head(), event("one"), Step::Gate, event("two"), Step::Gate, chunk(USAGE)], done().to_vec()]
            .concat()
    });
    let mut body = world.begin(chat(STREAM)).await.into_body();
    for text in ["one", "two"] {
        let frame = body.frame().await.expect("more").expect("unbroken").into_data().expect("data");
        assert_eq!(frame, word(text));
        world.settle().await;
        world.gateway.go_on();
    }
    assert_eq!(body.collect().await.expect("whole").to_bytes(), "data: [DONE]\n\n");
}

// Streams that go wrong.

#[tokio::test(start_paused = true)]
async fn a_retried_stream_is_asked_again() {
    let world = World::new(BUDGET, |seen| if seen.number == 0 { error(503, &[]) } else { obliging(seen) });
    assert_plain(&world.stream().await);
    assert_eq!((asked_and_not(&world), used(&world)), ((2, 0), 47.0));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_off_ends_as_any_other() {
    let cut =
        |rest: &'static str| World::new(BUDGET, move |_| vec![stream_head(), event("one"), chunk(rest), Step::Close]);
    let between = cut(USAGE).stream().await;
    assert!(!between.broken && between.text().starts_with(&format!("{}data: {{\"error\"", word("one"))));
    let inside = cut("data: {\"choices\":[{\"delta\"").stream().await;
    assert_eq!((inside.broken, inside.text()), (true, word("one")), "nothing of the half event");
    let told = "data: {\"error\":{\"message\":\"overloaded\"}}\n\n";
    let world = World::new(BUDGET, move |_| [vec![stream_head(), event("one"), chunk(told)], done().to_vec()].concat());
    assert_eq!(world.stream().await.text(), format!("{}{told}data: [DONE]\n\n", word("one")));
    assert_eq!(world.requests("upstream_error"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_hang_up_in_a_stream_whose_usage_is_hidden_leaves_nothing_held() {
    use http_body_util::BodyExt as _;
    let world = World::new(BUDGET, |_| vec![stream_head(), event("one"), chunk("data: {\"choices\":["), Step::Stall]);
    let mut response = world.begin(chat(STREAM)).await;
    assert!(response.body_mut().frame().await.is_some());
    drop(response);
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    world.assert_nothing_held();
}

// Gateways that do not know the option.

#[tokio::test(start_paused = true)]
async fn a_gateway_that_refuses_the_option_is_asked_without_it_for_ten_minutes() {
    let world = World::new(BUDGET, ignorant);
    let answer = world.stream().await;
    assert_plain(&answer);
    assert_eq!(asked_and_not(&world), (1, 1));
    assert_eq!((answer.header("x-weir-attempts"), world.elapsed()), ("2", 0), "at once, and without backoff");
    assert_eq!(
        (world.requests("ok"), world.attempts("4xx"), world.metric_sum("weir_retries_total", "")),
        (1.0, 1.0, 0.0)
    );
    for _ in 0..3 {
        assert_plain(&world.stream().await);
    }
    tokio::time::sleep(Duration::from_secs(599)).await;
    assert_plain(&world.stream().await);
    assert_eq!(asked_and_not(&world), (1, 5));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_plain(&world.stream().await);
    assert_eq!(asked_and_not(&world), (2, 6), "tried again");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn each_model_refuses_for_itself() {
    let config = format!("{BUDGET}[models.\"gpt-4.1-mini\"]\n[models.\"deepseek-chat\"]\n");
    let world = World::new(&config, |seen| {
        let is_ignorant = String::from_utf8_lossy(&seen.body).contains("deepseek");
        if is_ignorant { ignorant(seen) } else { obliging(seen) }
    });
    for _ in 0..2 {
        assert_plain(&world.stream().await);
        assert_plain(&world.send(chat(&STREAM.replace("gpt-4.1-mini", "deepseek-chat"))).await);
    }
    assert_eq!(asked_and_not(&world), (3, 2));
}

#[tokio::test(start_paused = true)]
async fn a_model_without_a_name_proves_nothing_about_another() {
    let world = World::new(BUDGET, |seen| {
        let is_ignorant = String::from_utf8_lossy(&seen.body).contains("deepseek");
        if is_ignorant { ignorant(seen) } else { obliging(seen) }
    });
    let nameless = STREAM.replace(r#""model":"gpt-4.1-mini","#, "");
    assert_plain(&world.send(chat(&nameless)).await);
    assert_plain(&world.send(chat(&STREAM.replace("gpt-4.1-mini", "deepseek-chat"))).await);
    assert_eq!(asked_and_not(&world), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_400_of_the_clients_own_is_passed_on() {
    let is_wrong = |seen: &Seen| String::from_utf8_lossy(&seen.body).contains("wrong");
    let wrong = || chat(&STREAM.replace("hello", "wrong"));
    let world = World::new(BUDGET, move |seen| if is_wrong(seen) { error(400, &[]) } else { obliging(seen) });
    let answer = world.send(wrong()).await;
    assert_eq!((answer.status.as_u16(), answer.code()), (400, "upstream_code".to_owned()));
    assert_eq!(asked_and_not(&world), (1, 1), "it may have been the option");
    assert_plain(&world.stream().await);
    assert_eq!(asked_and_not(&world), (2, 1), "which it was not");
    assert_eq!(world.send(wrong()).await.status, 400);
    assert_eq!(asked_and_not(&world), (3, 1), "and this model is known to know it");
    assert_eq!((world.requests("client_error"), used(&world)), (2.0, 47.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_second_attempt_that_fails_otherwise_is_retried_as_written() {
    let world = World::new(BUDGET, |seen| if seen.number == 1 { error(503, &[]) } else { ignorant(seen) });
    assert_plain(&world.stream().await);
    assert_eq!(asked_and_not(&world), (1, 2));
    assert_plain(&world.stream().await);
    assert_eq!(asked_and_not(&world), (1, 3));
}

#[tokio::test(start_paused = true)]
async fn a_burst_to_a_gateway_that_refuses_the_option_is_served_all_the_same() {
    let world = World::new("", ignorant);
    let clients: Vec<_> = (0..50).map(|_| world.spawn(chat(STREAM))).collect();
    for answer in crate::world::join_all(clients).await {
        assert_plain(&answer);
    }
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_client_of_http2_gets_its_stream_too() {
    let world = World::new(BUDGET, ignorant);
    let ask = |request: Request<Full<Bytes>>| async {
        collect(world.http2().await.send_request(over_http2(request)).await.expect("answered")).await
    };
    assert_plain(&ask(chat(STREAM)).await);
    let world = World::new(BUDGET, obliging);
    let mut client = world.http2().await;
    assert_plain(&collect(client.send_request(over_http2(chat(STREAM))).await.expect("answered")).await);
    assert_eq!(asked_and_not(&world), (1, 0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_refused_option_costs_a_request_of_the_quota_and_no_tokens() {
    let config = BUDGET.replace("[limits]", "[limits]\nrequests = { rate = \"1/s\", burst = 1 }");
    let world = World::new(&config, ignorant);
    assert_plain(&world.stream().await);
    assert_eq!(world.times(), [0, 1000], "both reach the gateway, so both count");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn streams_that_tell_their_usage_in_every_chunk_keep_it() {
    let text = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":{\"prompt_tokens\":40,\"completion_tokens\":1}}\n\n";
    let world = World::new(BUDGET, move |_| vec![stream_head(), chunk(text), chunk(USAGE), done()[1].clone()]);
    assert_eq!(world.stream().await.text(), text);
    assert_eq!(used(&world), 47.0);
    let none = World::new(BUDGET, |_| stream(&["one", "two"]));
    assert_plain(&none.stream().await);
}
