//! A stream's head is held back until there is output behind it: what dies before that is tried again, and nobody sees it.
//! Nothing is held that is an answer, or may be one, and nothing for long.

use std::time::Duration;

use http::{Method, Request};
use http_body_util::Full;
use serde_json::Value;

use crate::gateway::{Seen, Step, chunk, done, event, stream_head};
use crate::world::{Answer, STREAM, STREAM_WITH_USAGE, World, chat, collect, over_http2, request};

const ROLE: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
const WORD: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"fine\"},\"finish_reason\":null}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";

const ONE_TRY: &str = "[retry]\nmax_retries = 0\n";

/// An API: where it is, what announces an answer, what is one, and what is an error in a stream.
struct Api {
    path: &'static str,
    preamble: &'static str,
    answer: &'static str,
    error: &'static str,
}

const APIS: [Api; 4] = [
    Api {
        path: "/v1/chat/completions",
        preamble: ROLE,
        answer: "data: {\"choices\":[{\"delta\":{\"content\":\"fine\"}}]}\n\ndata: [DONE]\n\n",
        error: "data: {\"error\":{\"message\":\"overloaded\"}}\n\n",
    },
    Api {
        path: "/v1/completions",
        preamble: "data: {\"object\":\"text_completion\",\"choices\":[{\"text\":\"\",\"finish_reason\":null}]}\n\n",
        answer: "data: {\"choices\":[{\"text\":\"fine\"}]}\n\ndata: [DONE]\n\n",
        error: "data: {\"error\":{\"message\":\"overloaded\"}}\n\n",
    },
    Api {
        path: "/v1/responses",
        preamble: "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"error\":null}}\n\n\
                   event: response.in_progress\ndata: {\"type\":\"response.in_progress\",\"response\":{\"error\":null}}\n\n\
                   data: {\"type\":\"response.output_item.added\",\"item\":{\"type\":\"message\",\"content\":[]}}\n\n\
                   data: {\"type\":\"response.content_part.added\",\"part\":{\"type\":\"output_text\",\"text\":\"\"}}\n\n",
        answer: "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"fine\"}\n\n\
                 data: {\"type\":\"response.completed\",\"response\":{}}\n\n",
        error: "event: response.failed\ndata: {\"type\":\"response.failed\",\"response\":{\"error\":{\"code\":\"server_error\"}}}\n\n",
    },
    Api {
        path: "/v1/messages",
        preamble: "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"content\":[],\"usage\":{\"input_tokens\":9,\"output_tokens\":1}}}\n\n\
                   event: ping\ndata: {\"type\": \"ping\"}\n\n\
                   event: content_block_start\ndata: {\"type\":\"content_block_start\",\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
        answer: "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"fine\"}}\n\n\
                 event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
        error: "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"overloaded\"}}\n\n",
    },
];

impl Api {
    fn request(&self) -> Request<Full<bytes::Bytes>> {
        request(Method::POST, self.path, STREAM)
    }

    fn whole(&self) -> String {
        format!("{}{}", self.preamble, self.answer)
    }
}

/// The end of a chunked body.
fn end() -> Step {
    Step::Send(b"0\r\n\r\n".to_vec())
}

fn wait(millis: u64) -> Step {
    Step::Wait(Duration::from_millis(millis))
}

/// A stream of this text in one chunk, and what comes then.
fn stream_of(text: &str, then: Step) -> Vec<Step> {
    vec![stream_head(), chunk(text), then]
}

/// A gateway whose first stream is this, and whose others are good.
fn first(steps: Vec<Step>) -> impl Fn(&Seen) -> Vec<Step> + Send + Sync {
    move |seen| if seen.number == 0 { steps.clone() } else { stream_of(&format!("{ROLE}{WORD}{DONE}"), end()) }
}

#[track_caller]
fn assert_second_stream(answer: &Answer) {
    assert_eq!((answer.text(), answer.broken), (format!("{ROLE}{WORD}{DONE}"), false));
    assert_eq!((answer.status.as_u16(), answer.header("x-weir-attempts")), (200, "2"));
}

// What dies before its first output.

#[tokio::test(start_paused = true)]
async fn a_stream_that_comes_to_nothing_is_retried_unseen_in_every_api() {
    for api in APIS {
        let ways = [
            (stream_of(api.preamble, Step::Close), "reset"),
            (stream_of(api.preamble, end()), "stream_error"),
            (stream_of(&format!("{}{}", api.preamble, api.error), end()), "stream_error"),
            (stream_of(&format!("{}{}", api.preamble, api.error), Step::Close), "stream_error"),
            (vec![stream_head(), chunk(api.preamble), wait(1500), chunk(api.error), end()], "stream_error"),
            (vec![stream_head(), end()], "stream_error"),
        ];
        for (number, (steps, result)) in ways.into_iter().enumerate() {
            let what = format!("{} {number}", api.path);
            let whole = api.whole();
            let script = move |seen: &Seen| if seen.number == 0 { steps.clone() } else { stream_of(&whole, end()) };
            let world = World::new("", script);
            let answer = world.send(api.request()).await;
            assert_eq!((answer.text(), answer.broken), (api.whole(), false), "{what}");
            assert_eq!(answer.header("x-weir-attempts"), "2", "{what}");
            assert_eq!((world.attempts(result), world.attempts("ok"), world.requests("ok")), (1.0, 1.0, 1.0), "{what}");
            world.settle().await;
            world.assert_nothing_held();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn wherever_chunks_cut_it_a_preamble_is_one() {
    let text = format!(": PROCESSING\r\n\r\nevent: ping\ndata: {{\"type\":\"ping\"}}\n\n{ROLE}");
    for at in 0..=text.len() {
        let (one, two) = text.split_at(at);
        let pieces = [one, two].into_iter().filter(|piece| !piece.is_empty());
        let sent = pieces.flat_map(|piece| [chunk(piece), wait(1)]);
        let steps: Vec<_> = [stream_head()].into_iter().chain(sent).chain([Step::Close]).collect();
        let world = World::new("", first(steps));
        assert_second_stream(&world.stream_with_usage().await);
    }
    let bytes = (0..text.len()).map(|at| chunk(&text[at..=at]));
    let world = World::new("", first([stream_head()].into_iter().chain(bytes).chain([Step::Close]).collect()));
    assert_second_stream(&world.stream_with_usage().await);
}

#[tokio::test(start_paused = true)]
async fn a_preamble_that_breaks_off_within_an_event_is_retried_too() {
    let world = World::new(
        "",
        first(stream_of(&format!("{ROLE}data: {{\"choices\":[{{\"delta\":{{\"content\":\"ha"), Step::Close)),
    );
    assert_second_stream(&world.stream().await);
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_preamble_longer_than_the_scanner_keeps_is_one_by_its_name() {
    let tools = format!("{{\"description\":\"{}\"}}", "x".repeat(20_000));
    let pieces =
        ["event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"tools\":[", &tools, "]}}\n\n"];
    let sent: Vec<_> = pieces.iter().flat_map(|piece| [chunk(piece), wait(1)]).collect();
    let script = move |seen: &Seen| match seen.number {
        0 => [vec![stream_head()], sent.clone(), vec![Step::Close]].concat(),
        _ => stream_of(APIS[2].answer, end()),
    };
    let world = World::new("", script);
    let answer = world.send(APIS[2].request()).await;
    assert_eq!((answer.text().as_str(), answer.header("x-weir-attempts")), (APIS[2].answer, "2"));
}

#[tokio::test(start_paused = true)]
async fn when_retries_are_used_up_what_has_come_passes_as_it_came() {
    for api in APIS {
        let with_error = format!("{}{}", api.preamble, api.error);
        for text in [with_error.as_str(), api.preamble, ""] {
            let steps = match text {
                "" => vec![stream_head(), end()],
                text => stream_of(text, end()),
            };
            let world = World::new("", move |_| steps.clone());
            let answer = world.send(api.request()).await;
            assert_eq!((answer.status.as_u16(), answer.text().as_str(), answer.broken), (200, text, false));
            assert_eq!((answer.header("x-weir-attempts"), answer.header("x-should-retry")), ("4", "false"));
            world.settle().await;
            assert_eq!((world.attempts("stream_error"), world.requests("upstream_error")), (4.0, 1.0), "{text}");
            world.assert_nothing_held();
        }
        let world = World::new("", move |_| stream_of(api.preamble, Step::Close));
        let answer = world.send(api.request()).await;
        assert_eq!((answer.status.as_u16(), answer.header("x-weir-attempts")), (502, "4"));
        assert!(answer.text().contains("upstream_disconnected") && !answer.text().contains("[DONE]"));
        assert_eq!((world.attempts("reset"), world.requests("failed")), (4.0, 1.0));
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn without_retries_a_stream_of_nothing_is_an_error_that_passes_as_it_came() {
    let world = World::new(ONE_TRY, |_| stream_of(ROLE, end()));
    let answer = world.stream().await;
    assert_eq!((answer.status.as_u16(), answer.text().as_str(), answer.header("x-should-retry")), (200, ROLE, ""));
    world.settle().await;
    assert_eq!((world.attempts("stream_error"), world.requests("upstream_error")), (1.0, 1.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_error_that_waiting_will_not_mend_is_passed_on_at_once() {
    let broke = [
        (0, "data: {\"error\":{\"message\":\"no money\",\"code\":\"insufficient_quota\"}}\n\n"),
        (2, "event: error\ndata: {\"type\":\"error\",\"code\":\"insufficient_quota\",\"message\":\"no money\"}\n\n"),
        (2, "data: {\"type\":\"response.failed\",\"response\":{\"error\":{\"code\":\"insufficient_quota\"}}}\n\n"),
    ];
    for (api, error) in broke {
        let text = format!("{}{error}", APIS[api].preamble);
        let sent = text.clone();
        let world = World::new("", move |_| stream_of(&sent, end()));
        let answer = world.send(APIS[api].request()).await;
        assert_eq!((answer.text(), world.gateway.seen().len(), world.elapsed()), (text, 1, 0));
        world.settle().await;
        assert_eq!((world.attempts("stream_error"), world.requests("upstream_error")), (1.0, 1.0));
        world.assert_nothing_held();
    }
}

// What is not held, or no longer.

#[tokio::test(start_paused = true)]
async fn a_head_is_held_two_seconds_for_its_first_output_and_no_longer() {
    let world = World::new("", |_| {
        let rest = [wait(30_000), chunk(WORD), chunk(DONE), end()];
        [vec![wait(5000), stream_head(), wait(1000), chunk(ROLE)], rest.to_vec()].concat()
    });
    let response = world.begin(chat(STREAM)).await;
    assert_eq!(world.elapsed(), 7000, "two seconds after the gateway's");
    let answer = collect(response).await;
    assert_eq!((answer.text(), answer.broken), (format!("{ROLE}{WORD}{DONE}"), false));
    assert_eq!(world.gateway.seen().len(), 1);
    assert_eq!(world.requests("ok"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn of_what_comes_before_the_output_64_events_are_held() {
    let world = World::new("", first(stream_of(&ROLE.repeat(63), Step::Close)));
    assert_second_stream(&world.stream().await);
    for steps in [
        stream_of(&ROLE.repeat(64), Step::Gate),
        stream_of(&format!("{ROLE}: {}\n\n", "x".repeat(256 << 10)), Step::Gate),
    ] {
        let world = World::new("", move |_| [steps.clone(), vec![chunk(WORD), end()]].concat());
        let response = world.begin(chat(STREAM)).await;
        assert_eq!(world.elapsed(), 0);
        world.gateway.go_on();
        let answer = collect(response).await;
        assert!(answer.text().starts_with(ROLE) && answer.text().ends_with(WORD) && !answer.broken);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_not_held_whatever_it_is_and_though_it_be_empty() {
    let delta = |delta: &str| format!("data: {{\"choices\":[{{\"delta\":{delta}}}]}}\n\n");
    let beginnings = [
        WORD.to_owned(),
        delta(r#"{"tool_calls":[{"index":0,"function":{"name":"f","arguments":""}}]}"#),
        delta(r#"{"function_call":{"name":"f","arguments":""}}"#),
        delta(r#"{"refusal":"no"}"#),
        delta(r#"{"reasoning_content":"so"}"#),
        delta(r#"{"audio":{"id":"a"}}"#),
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n".to_owned(),
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":0}}\n\n".to_owned(),
        DONE.to_owned(),
        "data: {\"something\":\"new\"}\n\n".to_owned(),
        "data: no JSON\n\n".to_owned(),
    ];
    for text in beginnings {
        let text = format!("{ROLE}{text}");
        let steps = stream_of(&text, Step::Gate);
        let world = World::new("", move |_| [steps.clone(), vec![end()]].concat());
        let response = world.begin(chat(STREAM_WITH_USAGE)).await;
        assert_eq!(world.elapsed(), 0, "{text}");
        world.gateway.go_on();
        assert_eq!(collect(response).await.text(), text);
        world.settle().await;
        assert_eq!((world.requests("ok"), world.gateway.seen().len()), (1.0, 1), "{text}");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn once_the_hold_is_over_nothing_is_retried() {
    let late = |ending: Vec<Step>| [vec![stream_head(), chunk(ROLE), wait(3000)], ending].concat();
    let reset = late(vec![Step::Close]);
    let world = World::new("", move |_| reset.clone());
    let answer = world.stream().await;
    assert!(answer.text().starts_with(&format!("{ROLE}data: {{\"error\":")) && !answer.broken, "{}", answer.text());
    assert_eq!((world.attempts("reset"), world.requests("upstream_error"), world.gateway.seen().len()), (1.0, 1.0, 1));
    for text in [ROLE, APIS[0].error] {
        let steps = late(vec![chunk(text), end()]);
        let world = World::new("", move |_| steps.clone());
        let answer = world.stream().await;
        assert_eq!((answer.text(), answer.broken), (format!("{ROLE}{text}"), false));
        world.settle().await;
        assert_eq!((world.attempts("stream_error"), world.requests("upstream_error")), (1.0, 1.0), "{text}");
        assert_eq!(world.gateway.seen().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_weir_cannot_read_or_does_not_know_is_passed_on_unjudged() {
    let encoded = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
    let world = World::new("", move |_| vec![Step::Send(encoded.into()), chunk("gzip"), end()]);
    let answer = world.stream().await;
    assert_eq!((answer.text().as_str(), world.elapsed(), world.requests("ok")), ("gzip", 0, 1.0));
    for (method, path) in [(Method::GET, "/v1/responses/r?stream=true"), (Method::POST, "/v1/threads/runs")] {
        let opaque = || request(method.clone(), path, "");
        let world = World::new("", |_| stream_of(APIS[2].preamble, Step::Stall));
        assert_eq!((world.begin(opaque()).await.status().as_u16(), world.elapsed()), (200, 0), "one event is enough");
        for text in [APIS[2].preamble, ": nothing\n\n"] {
            let world = World::new("", move |_| stream_of(text, end()));
            assert_eq!(world.send(opaque()).await.text(), text);
            assert_eq!((world.gateway.seen().len(), world.elapsed()), (1, 0));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_ping_is_an_event_as_far_as_the_first_events_timeout_goes() {
    let ping = "event: ping\ndata: {\"type\":\"ping\"}\n\n";
    let world = World::new("[timeouts]\nfirst_event = \"1s\"\n", move |_| {
        vec![stream_head(), wait(900), chunk(ping), wait(5000), chunk(WORD), chunk(DONE), end()]
    });
    let response = world.begin(chat(STREAM)).await;
    assert_eq!(world.elapsed(), 1000, "it has begun in time, and is held no longer than it might have been silent");
    assert_eq!(collect(response).await.text(), format!("{ping}{WORD}{DONE}"));
    assert_eq!((world.requests("ok"), world.gateway.seen().len()), (1.0, 1));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_up_while_its_stream_is_held_leaves_nothing_behind() {
    let world = World::new("[limits]\nconcurrency = 1\n", |_| stream_of(ROLE, Step::Stall));
    let client = world.spawn(chat(STREAM));
    world.gateway.saw(1).await;
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
    client.abort();
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    assert_eq!((world.elapsed(), world.attempts("cancelled")), (0, 1.0));
    assert_eq!(world.metric(r#"weir_client_disconnects_total{phase="upstream"}"#), 1.0);
    world.assert_nothing_held();
}

// What breaks off later.

/// The last event of a stream, which begins with this.
fn error_event<'a>(text: &'a str, before: &str) -> (Option<&'a str>, Value) {
    let last = text.strip_prefix(before).unwrap_or_else(|| panic!("{text:?} begins with {before:?}"));
    let (name, data) = match last.strip_prefix("event: ").and_then(|last| last.split_once('\n')) {
        Some((name, data)) => (Some(name), data),
        None => (None, last),
    };
    let data = data.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n")).expect("one event");
    (name, serde_json::from_str(data).expect("JSON"))
}

#[tokio::test(start_paused = true)]
async fn a_stream_cut_between_two_events_ends_with_an_error_event_of_its_api() {
    for api in APIS {
        let sent = format!("{}{}", api.preamble, api.answer.split_inclusive("\n\n").next().expect("an event"));
        let script_text = sent.clone();
        let world = World::new("", move |_| stream_of(&script_text, Step::Close));
        let answer = world.send(api.request()).await;
        assert!(!answer.broken && !answer.text().contains("[DONE]"), "{}", answer.text());
        let text = answer.text();
        let (name, data) = error_event(&text, &sent);
        let code = match api.path {
            "/v1/responses" => {
                assert_eq!((name, &data["type"]), (Some("error"), &Value::from("error")));
                &data["code"]
            }
            "/v1/messages" => {
                assert_eq!((name, &data["type"]), (Some("error"), &Value::from("error")));
                &data["error"]["code"]
            }
            _ => {
                assert_eq!(name, None);
                assert!(data["error"]["message"].is_string());
                &data["error"]["code"]
            }
        };
        assert_eq!(code, "upstream_disconnected", "{}", api.path);
        assert_eq!((world.attempts("reset"), world.requests("upstream_error")), (1.0, 1.0), "{}", api.path);
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_cut_inside_an_event_is_aborted_in_every_api() {
    for api in APIS {
        let whole = api.whole();
        for at in [whole.len() - 1, whole.len() - 5] {
            let text = whole[..at].to_owned();
            let world = World::new("", move |_| stream_of(&text, Step::Close));
            for http2 in [false, true] {
                let answer = match http2 {
                    true => {
                        let sent = world.http2().await.send_request(over_http2(api.request())).await;
                        collect(sent.expect("answered")).await
                    }
                    false => world.send(api.request()).await,
                };
                assert!(
                    answer.broken && !answer.text().contains("upstream_disconnected"),
                    "{}: {}",
                    api.path,
                    answer.text()
                );
                assert!(!answer.text().contains("[DONE]\n\n"), "{}", answer.text());
            }
            world.settle().await;
            assert_eq!((world.attempts("reset"), world.requests("upstream_error")), (2.0, 2.0), "{}", api.path);
            world.assert_nothing_held();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_well_without_a_done_passes_as_it_came() {
    for (request, text) in [(STREAM, format!("{ROLE}{WORD}")), (STREAM_WITH_USAGE, WORD.to_owned())] {
        let sent = text.clone();
        let world = World::new("", move |_| stream_of(&sent, end()));
        let answer = world.send(chat(request)).await;
        assert_eq!((answer.text(), answer.broken), (text, false));
        world.settle().await;
        assert_eq!((world.attempts("ok"), world.requests("ok"), world.gateway.seen().len()), (1.0, 1.0, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn what_follows_the_preamble_reaches_the_client_event_by_event() {
    use http_body_util::BodyExt as _;
    let world = World::new("", |_| {
        [vec![stream_head(), chunk(ROLE), wait(500), event("one"), Step::Gate, event("two")], done().to_vec()].concat()
    });
    let mut body = world.begin(chat(STREAM)).await.into_body();
    assert_eq!(world.elapsed(), 500, "the head comes with the first output");
    let mut got = Vec::new();
    while !String::from_utf8_lossy(&got).contains("one") {
        got.extend(body.frame().await.expect("more").expect("unbroken").into_data().expect("data"));
    }
    assert!(got.starts_with(ROLE.as_bytes()));
    world.settle().await;
    world.gateway.go_on();
    assert!(body.collect().await.expect("whole").to_bytes().ends_with(DONE.as_bytes()));
    world.settle().await;
    world.assert_nothing_held();
}
