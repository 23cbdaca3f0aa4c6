//! Token limits: charged by estimate before a request goes, settled by what its answer did cost, never lost and never free.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};

use crate::gateway::{Step, answer, chunk, costs, done, error, event, json, stream_head};
use crate::world::{Answer, World, body_of, chat, costing, join_all, request, with};

/// So many tokens, of which hardly any comes back while a test lasts.
const BUDGET: &str = "[limits]\ntokens = { rate = \"10000/day\", burst = 10000 }\nconcurrency = 100\n";

/// The same, and nothing is retried.
const ONE_TRY: &str = "[limits]\ntokens = { rate = \"10000/day\", burst = 10000 }\nconcurrency = 100\n\
                       [retry]\nmax_retries = 0\n";

/// A hundred a second, a thousand at once.
const RATE: &str = "[limits]\ntokens = { rate = \"100/s\", burst = 1000 }\nconcurrency = 200\n";

/// What is gone of a budget of 10000.
fn used(world: &World) -> f64 {
    10_000.0 - world.remaining_tokens()
}

fn wait(millis: u64) -> Step {
    Step::Wait(Duration::from_millis(millis))
}

/// A stream of these events, which ends well.
fn events(texts: &[&str]) -> Vec<Step> {
    let chunks = texts.iter().map(|text| chunk(text));
    std::iter::once(stream_head()).chain(chunks).chain(done()).collect()
}

/// A streaming chat of 50 tokens of prompt, which may bring 50 more.
fn streaming() -> Request<Full<Bytes>> {
    let members = r#""stream":true,"stream_options":{"include_usage":true},"max_tokens":50"#;
    chat(&body_of("gpt-4.1-mini", 50, members))
}

/// A request of 50 tokens of prompt to this path.
fn to(path: &str, members: &str) -> Request<Full<Bytes>> {
    request(Method::POST, path, &body_of("gpt-4.1-mini", 50, members))
}

#[track_caller]
fn assert_refused_by_tokens(refused: &Answer, scope: &str) {
    assert_eq!(
        (refused.status.as_u16(), refused.code()),
        (429, "rate_limit_exceeded".to_owned()),
        "{}",
        refused.text()
    );
    assert!(refused.text().contains(r#""type":"tokens""#), "{}", refused.text());
    assert_eq!(refused.header("x-weir-refused-by"), format!("tokens; {scope}"));
}

// The rate.

#[tokio::test(start_paused = true)]
async fn of_a_hundred_requests_at_once_ten_fit_and_the_others_follow_as_quota_returns() {
    let world = World::new(RATE, |_| costs(50, 50));
    let answers = join_all((0..100).map(|_| world.spawn(costing(50, 50)))).await;
    assert!(answers.iter().all(|answer| answer.status == 200));
    let expected: Vec<u64> = (0..100u64).map(|number| number.saturating_sub(9) * 1000).collect();
    assert_eq!(world.times(), expected);
    assert_eq!(world.metric_sum("weir_refused_total", ""), 0.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn what_an_answer_did_not_use_lets_the_next_through_at_once() {
    let world = World::new(RATE, |_| [vec![wait(500)], costs(10, 10)].concat());
    let first = join_all((0..10).map(|_| world.spawn(costing(50, 50))));
    let second = join_all((0..10).map(|_| world.spawn(costing(50, 50))));
    let (first, second) = tokio::join!(first, second);
    assert!(first.iter().chain(&second).all(|answer| answer.status == 200));
    let times = world.times();
    assert_eq!(times[..10], [0; 10]);
    assert!(times[19] <= 1000, "{times:?}");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_debt_delays_the_next() {
    let world = World::new(RATE, |seen| if seen.number == 0 { costs(50, 1950) } else { costs(50, 50) });
    assert_eq!(world.send(costing(50, 50)).await.status, 200);
    assert_eq!(world.remaining_tokens(), 0.0);
    assert_eq!(world.send(costing(50, 50)).await.status, 200);
    assert_eq!(world.times(), [0, 11_000], "a thousand owed, a hundred wanted");
    world.assert_nothing_held();
}

// Settlement.

#[tokio::test(start_paused = true)]
async fn the_usage_of_every_api_is_what_counts() {
    let chat_usage = r#"data: {"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":7}}"#;
    let responses = r#"data: {"type":"response.completed","response":{"usage":{"input_tokens":40,"output_tokens":7}}}"#;
    let start = r#"data: {"type":"message_start","message":{"usage":{"input_tokens":30,"cache_creation_input_tokens":10,"cache_read_input_tokens":500,"output_tokens":1}}}"#;
    let delta = r#"data: {"type":"message_delta","usage":{"output_tokens":7}}"#;
    let of_stream = |texts: &[&str]| {
        let texts: Vec<String> = texts.iter().map(|text| format!("{text}\n\n")).collect();
        events(&texts.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let stream = r#""stream":true"#;
    let input_output = json(r#"{"output":[],"usage":{"input_tokens":40,"output_tokens":7}}"#);
    let ways = [
        ("/v1/chat/completions", r#""x":1"#, costs(40, 7), 47.0),
        ("/v1/completions", r#""x":1"#, costs(40, 7), 47.0),
        ("/v1/embeddings", r#""x":1"#, json(r#"{"data":[],"usage":{"prompt_tokens":40,"total_tokens":40}}"#), 40.0),
        ("/v1/responses", r#""x":1"#, input_output.clone(), 47.0),
        ("/v1/messages", r#""x":1"#, input_output, 47.0),
        ("/v1/chat/completions", stream, of_stream(&[chat_usage]), 47.0),
        ("/v1/completions", stream, of_stream(&[chat_usage]), 47.0),
        ("/v1/responses", stream, of_stream(&[responses]), 47.0),
        ("/v1/messages", stream, of_stream(&[start, delta]), 47.0),
    ];
    for (path, members, steps, expected) in ways {
        let world = World::new(BUDGET, move |_| steps.clone());
        assert_eq!(world.send(to(path, members)).await.status, 200);
        assert_eq!(used(&world), expected, "{path}, {members}");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_are_reserved_while_a_request_is_under_way() {
    let world = World::new(BUDGET, |_| [vec![Step::Gate], costs(50, 10)].concat());
    let client = world.spawn(costing(50, 20));
    world.gateway.saw(1).await;
    assert_eq!((world.reserved_tokens(), used(&world)), (70.0, 70.0));
    world.gateway.go_on();
    assert_eq!(client.await.expect("answered").status, 200);
    assert_eq!((world.reserved_tokens(), used(&world)), (0.0, 60.0));
}

#[tokio::test(start_paused = true)]
async fn an_error_costs_nothing() {
    for status in [400, 404, 429, 500, 503] {
        let world = World::new(ONE_TRY, move |_| error(status, &[]));
        assert_eq!(world.send(costing(50, 50)).await.status, status);
        assert_eq!(used(&world), 0.0, "{status}");
        world.assert_nothing_held();
    }
    let error_event = events(&["data: {\"error\":{\"message\":\"overloaded\"}}\n\n"]);
    let world = World::new(ONE_TRY, move |_| error_event.clone());
    world.send(streaming()).await;
    assert_eq!(used(&world), 0.0, "a stream that begins with an error is one too");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn what_never_reached_the_gateway_costs_neither_tokens_nor_a_request() {
    let config = ONE_TRY.replace("[limits]", "[limits]\nrequests = { rate = \"10/day\", burst = 10 }");
    let world = World::new(&config, |_| costs(50, 50));
    world.gateway.refuse_connections(1);
    assert_eq!(world.send(costing(50, 50)).await.status, 502);
    assert_eq!((used(&world), world.remaining(("global", "", "requests"))), (0.0, 10.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_off_costs_its_prompt_and_what_came() {
    let begun = || vec![stream_head(), event(&"x".repeat(40)), event("y"), event("z")];
    let cut = World::new(ONE_TRY, move |_| [begun(), vec![Step::Close]].concat());
    cut.send(streaming()).await;
    assert_eq!(used(&cut), 50.0 + 10.0, "42 bytes in 3 events");
    cut.assert_nothing_held();

    let abandoned = World::new(ONE_TRY, move |_| [begun(), vec![Step::Stall]].concat());
    let mut response = abandoned.begin(streaming()).await;
    assert!(response.body_mut().frame().await.is_some());
    abandoned.settle().await;
    drop(response);
    abandoned.settle().await;
    assert_eq!(used(&abandoned), 50.0 + 10.0);
    abandoned.assert_nothing_held();

    let many = World::new(ONE_TRY, |_| {
        let words = (0..30).map(|_| event("x"));
        std::iter::once(stream_head()).chain(words).chain([Step::Close]).collect()
    });
    many.send(streaming()).await;
    assert_eq!(used(&many), 50.0 + 30.0, "an event with output is a token at least");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_comes_to_nothing_costs_its_prompt_and_one_with_an_error_instead_costs_nothing() {
    const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n";
    const START: &str =
        "data: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":45,\"output_tokens\":1}}}\n\n";
    const ERROR: &str = "data: {\"type\":\"error\",\"error\":{\"message\":\"overloaded\"}}\n\n";
    let end = || Step::Send(b"0\r\n\r\n".to_vec());
    let late = || Step::Wait(Duration::from_secs(3));
    let ways = [
        (vec![chunk(ROLE), Step::Close], 50.0),
        (vec![chunk(ROLE), end()], 50.0),
        (vec![chunk(ROLE), late(), Step::Close], 50.0),
        (vec![end()], 50.0),
        (vec![chunk(ROLE), chunk(ERROR), end()], 0.0),
        (vec![chunk(ROLE), late(), chunk(ERROR), end()], 0.0),
        (vec![chunk(START), chunk(ERROR), end()], 0.0),
        (vec![chunk(START), late(), chunk(ERROR), end()], 0.0),
    ];
    for (number, (steps, expected)) in ways.into_iter().enumerate() {
        let world = World::new(ONE_TRY, move |_| [vec![stream_head()], steps.clone()].concat());
        world.send(streaming()).await;
        world.settle().await;
        assert_eq!(used(&world), expected, "{number}");
        world.assert_nothing_held();
    }
    let at_once = format!("{BUDGET}[retry]\nbase_delay = \"1ms\"\n");
    let world = World::new(&at_once, |seen| match seen.number {
        0 => vec![stream_head(), chunk(ROLE), Step::Close],
        1 => vec![stream_head(), chunk(ROLE), chunk(ERROR), Step::Close],
        2 => vec![stream_head(), chunk(ROLE), Step::Send(b"0\r\n\r\n".to_vec())],
        _ => costs(50, 20),
    });
    assert_eq!(world.send(streaming()).await.header("x-weir-attempts"), "4");
    assert_eq!(used(&world), 50.0 + 50.0 + 70.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_messages_stream_that_ends_in_an_error_costs_what_came_before() {
    let start = r#"{"type":"message_start","message":{"usage":{"input_tokens":45,"output_tokens":1}}}"#;
    let words = format!(r#"{{"type":"content_block_delta","delta":{{"text":"{}"}}}}"#, "x".repeat(400));
    let error = r#"{"type":"error","error":{"type":"overloaded_error","message":"overloaded"}}"#;
    let steps = events(&[start, &words, error].map(|data| format!("data: {data}\n\n")).each_ref().map(String::as_str));
    let world = World::new(ONE_TRY, move |_| steps.clone());
    world.send(to("/v1/messages", r#""stream":true,"max_tokens":500"#)).await;
    assert_eq!(used(&world), 45.0 + 100.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_messages_stream_that_breaks_off_costs_what_came_though_it_began_with_a_usage() {
    let world = World::new(ONE_TRY, |_| {
        let start = r#"data: {"type":"message_start","message":{"usage":{"input_tokens":45,"output_tokens":1}}}"#;
        let words = format!(r#"data: {{"type":"content_block_delta","delta":{{"text":"{}"}}}}"#, "x".repeat(400));
        let [start, words] = [start, &words].map(|text| chunk(&format!("{text}\n\n")));
        vec![stream_head(), start, words, Step::Close]
    });
    world.send(to("/v1/messages", r#""stream":true,"max_tokens":500"#)).await;
    assert_eq!(used(&world), 45.0 + 100.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn who_leaves_or_is_left_before_the_head_pays_for_the_prompt() {
    let config = format!("{ONE_TRY}[timeouts]\nresponse = \"1s\"\n");
    let world = World::new(&config, |_| vec![Step::Stall]);
    assert_eq!(world.send(costing(50, 70)).await.status, 504);
    assert_eq!(used(&world), 50.0, "a timeout");
    let client = world.spawn(costing(50, 70));
    world.gateway.saw(2).await;
    client.abort();
    world.gateway.saw_cancelled(2).await;
    world.settle().await;
    assert_eq!(used(&world), 100.0, "a hang-up");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_cannot_be_read_costs_its_estimate() {
    let encoded = answer(200, &[("content-type", "application/json"), ("content-encoding", "gzip")], "gibberish");
    for steps in [encoded, json(r#"{"choices":[]}"#)] {
        let world = World::new(BUDGET, move |_| steps.clone());
        assert_eq!(world.send(costing(50, 70)).await.status, 200);
        assert_eq!(used(&world), 120.0);
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn each_attempt_is_charged_and_settled() {
    let world = World::new(BUDGET, |seen| match seen.number {
        0 => error(503, &[("retry-after-ms", "10")]),
        1 => [vec![Step::Gate], error(429, &[("retry-after-ms", "10")])].concat(),
        2 => vec![stream_head(), Step::Close],
        _ => costs(50, 20),
    });
    let client = world.spawn(costing(50, 70));
    world.gateway.saw(2).await;
    assert_eq!((world.reserved_tokens(), used(&world)), (120.0, 120.0), "the second attempt's alone");
    world.gateway.go_on();
    let answer = client.await.expect("answered");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("x-weir-attempts"), "4");
    // The gateway's quota was behind weir's at the second; the third broke off, and the gateway may have read its prompt.
    assert_eq!(used(&world), 120.0 + 50.0 + 70.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_again_since_its_connection_was_stale_costs_tokens_once_and_two_requests() {
    let config = BUDGET.replace("[limits]", "[limits]\nrequests = { rate = \"10/day\", burst = 10 }");
    let world = World::new(&config, |seen| if seen.number == 1 { vec![Step::Close] } else { costs(50, 20) });
    for _ in 0..2 {
        assert_eq!(world.send(costing(50, 70)).await.status, 200);
    }
    assert_eq!(world.gateway.seen().len(), 3);
    assert_eq!((used(&world), world.remaining(("global", "", "requests"))), (140.0, 7.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_hang_up_at_any_point_leaves_nothing_reserved() {
    let limits = "[limits]\ntokens = { rate = \"100/s\", burst = 1000 }\nconcurrency = 1\n";
    let world = World::new(limits, |_| vec![stream_head(), event("one"), Step::Stall]);
    let mut holder = world.begin(streaming()).await;
    assert!(holder.body_mut().frame().await.is_some());
    let waiter = world.spawn(costing(50, 50));
    world.settle().await;
    assert_eq!(
        (world.in_flight_and_waiting(), world.reserved_tokens()),
        ((1.0, 1.0), 100.0),
        "who waits reserves nothing"
    );
    waiter.abort();
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
    let next = world.spawn(costing(50, 50));
    world.settle().await;
    drop(holder);
    world.gateway.saw(2).await;
    assert_eq!(world.reserved_tokens(), 100.0);
    next.abort();
    world.settle().await;
    world.assert_nothing_held();
    assert_eq!(world.remaining(("global", "", "concurrency")), 1.0);
}

#[tokio::test(start_paused = true)]
async fn who_hangs_up_while_it_waits_for_tokens_leaves_them_to_the_next() {
    let world = World::new(RATE, |_| costs(500, 50));
    assert_eq!(world.send(costing(950, 50)).await.status, 200);
    let (big, small) = (world.spawn(costing(850, 50)), world.spawn(costing(50, 50)));
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (0.0, 2.0));
    big.abort();
    assert_eq!(small.await.expect("answered").status, 200);
    assert_eq!(world.elapsed(), 0, "the first cost 550: there is room for the small one");
    world.assert_nothing_held();
}

// More than a bucket ever holds.

#[tokio::test(start_paused = true)]
async fn more_than_the_burst_passes_when_the_bucket_is_full_and_only_its_own_model_waits_for_it() {
    let config = format!("{RATE}[models.\"gpt-4.1-mini\"]\n[models.\"deepseek-chat\"]\n");
    let world = World::new(&config, |seen| costs(seen.body.len() as u64 / 4, 50));
    assert_eq!(world.send(costing(450, 50)).await.status, 200);
    let big = world.spawn(costing(2950, 50));
    world.settle().await;
    let small = world.spawn(costing(50, 50));
    let other = chat(&body_of("deepseek-chat", 50, r#""max_tokens":50"#));
    assert_eq!(world.send(other).await.status, 200);
    assert_eq!(world.elapsed(), 0, "another model is not held up");
    assert_eq!(big.await.expect("answered").status, 200);
    assert_eq!(world.elapsed(), 6000, "500 and 100 were missing");
    assert_eq!(small.await.expect("answered").status, 200);
    assert_eq!(world.elapsed(), 6000 + 21_000, "behind the big one, and its debt");
    world.assert_nothing_held();
}

// Refusals.

#[tokio::test(start_paused = true)]
async fn a_refusal_tells_when_so_many_tokens_can_be_had() {
    let config = format!("{RATE}[queue]\nmax_wait = \"2s\"\n");
    for (prompt, millis) in [(250, 1000), (450, 3000), (950, 8000)] {
        let world = World::new(&config, |seen| costs(seen.body.len() as u64 / 4, 50));
        assert_eq!(world.send(costing(950, 50)).await.status, 200);
        let refused = world.send(costing(prompt, 50)).await;
        assert_refused_by_tokens(&refused, "global");
        assert_eq!((world.elapsed(), refused.header("retry-after-ms")), (0, millis.to_string().as_str()));
        tokio::time::sleep(Duration::from_millis(millis)).await;
        assert_eq!(world.send(costing(prompt, 50)).await.status, 200, "who comes back when told is served");
        assert_eq!(world.elapsed(), millis + 2000);
        assert_eq!(world.metric_sum("weir_refused_total", "reason=\"tokens\""), 1.0);
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn who_fits_is_served_where_a_larger_one_was_refused() {
    let config = format!("{RATE}[queue]\nmax_wait = \"2s\"\n");
    let world = World::new(&config, |seen| costs(seen.body.len() as u64 / 4, 50));
    assert_eq!(world.send(costing(750, 50)).await.status, 200);
    assert_refused_by_tokens(&world.send(costing(950, 50)).await, "global");
    assert_eq!(world.send(costing(100, 50)).await.status, 200);
    assert_eq!(world.elapsed(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_models_own_tokens_are_a_limit_too() {
    let config = "[models.\"gpt-4.1-mini\"]\ntokens = { rate = \"100/s\", burst = 100 }\n[queue]\nmax_wait = \"1s\"\n";
    let world = World::new(config, |_| costs(50, 50));
    assert_eq!(world.send(costing(50, 50)).await.status, 200);
    let (waits, refused) = (world.spawn(costing(50, 50)), world.send(costing(50, 50)).await);
    assert_refused_by_tokens(&refused, "model:gpt-4.1-mini");
    assert_eq!(waits.await.expect("answered").status, 200);
    assert_eq!(world.times(), [0, 1000]);
}

// Absurd requests.

#[tokio::test(start_paused = true)]
async fn an_absurd_number_is_neither_free_nor_a_lock_out() {
    let unlimited = 1024.0;
    let numbers = [
        (r#""max_tokens":-5"#, unlimited),
        (r#""max_tokens":1.5"#, 1.0),
        (r#""max_tokens":"many""#, unlimited),
        (r#""max_tokens":1000000000000000000"#, unlimited),
        (r#""max_tokens":1e300"#, unlimited),
        (r#""max_tokens":null,"max_completion_tokens":0"#, 0.0),
        (r#""max_tokens":10,"n":1000000000000000000"#, 1280.0),
        (r#""max_tokens":10,"n":-3"#, 10.0),
        (r#""max_tokens":10,"n":"x""#, 10.0),
    ];
    for (members, output) in numbers {
        let world = World::new(RATE, |seen| match seen.number {
            0 => [vec![Step::Gate], error(400, &[])].concat(),
            _ => costs(50, 50),
        });
        let absurd = world.spawn(to("/v1/chat/completions", members));
        world.gateway.saw(1).await;
        assert_eq!(world.reserved_tokens(), 50.0 + output, "{members}");
        let other = world.spawn(costing(50, 50));
        world.settle().await;
        world.gateway.go_on();
        assert_eq!(absurd.await.expect("answered").status, 400);
        assert_eq!(other.await.expect("answered").status, 200);
        assert_eq!(world.elapsed(), 0, "{members}: what was refused is given back");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn an_absurd_usage_is_no_lock_out_for_ever() {
    let most = u64::MAX;
    let config = "[limits]\ntokens = { rate = \"1000000/s\", burst = 1000 }\n";
    let world = World::new(config, move |seen| if seen.number == 0 { costs(most, most) } else { costs(50, 50) });
    assert_eq!(world.send(costing(50, 50)).await.status, 200);
    let next = world.send(costing(50, 50)).await;
    assert_eq!(next.status, 200, "{}", next.text());
    assert_eq!(world.elapsed(), 50_000, "fifty million are believed, and no more");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_empty_bucket_does_not_hold_up_what_costs_no_tokens() {
    let world = World::new(RATE, |_| costs(950, 2050));
    assert_eq!(world.send(costing(950, 50)).await.status, 200);
    assert_eq!(world.remaining_tokens(), 0.0);
    for opaque in [request(Method::GET, "/v1/models", ""), request(Method::POST, "/v1/audio/speech", "{}")] {
        let answer = world.send(opaque).await;
        assert_eq!((answer.status.as_u16(), answer.header("x-ratelimit-limit-tokens")), (200, ""));
    }
    assert_eq!(world.elapsed(), 0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_no_json_is_charged_by_its_size() {
    let world = World::new(BUDGET, |_| [vec![Step::Gate], error(400, &[])].concat());
    let client = world.spawn(chat(&"x".repeat(4000)));
    world.gateway.saw(1).await;
    assert_eq!(world.reserved_tokens(), 1000.0 + 1024.0);
    world.gateway.go_on();
    assert_eq!(client.await.expect("answered").status, 400);
    assert_eq!(used(&world), 0.0);
    world.assert_nothing_held();
}

// What clients are told.

/// `x-ratelimit-{limit,remaining,reset}` of a unit.
fn quota(answer: &Answer, unit: &str) -> [String; 3] {
    ["limit", "remaining", "reset"].map(|what| answer.header(&format!("x-ratelimit-{what}-{unit}")).to_owned())
}

/// As a gateway tells its own quotas.
const TOLD: [(&str, &str); 4] = [
    ("x-ratelimit-limit-requests", "7"),
    ("x-ratelimit-remaining-requests", "6"),
    ("x-ratelimit-limit-tokens", "700"),
    ("x-ratelimit-reset-tokens", "1h0m0s"),
];

#[tokio::test(start_paused = true)]
async fn every_metered_answer_tells_how_the_tightest_quotas_stand() {
    let config = r#"
        [limits]
        requests = { rate = "600/min", burst = 60 }
        tokens = { rate = "6000/min", burst = 1000 }
        [models."gpt-4.1-mini"]
        requests = { rate = "60/min", burst = 2 }
        [queue]
        max_wait = "500ms"
    "#;
    let world = World::new(config, |seen| match seen.number {
        0 => costs(50, 50),
        _ => error(400, &TOLD),
    });
    let answer = world.send(costing(50, 50)).await;
    assert_eq!(quota(&answer, "requests"), ["60", "1", "1s"], "the model's, which are fewer");
    assert_eq!(quota(&answer, "tokens"), ["6000", "900", "1s"], "after the estimate, which was right");
    let wrong = world.send(costing(50, 50)).await;
    assert_eq!((wrong.status.as_u16(), quota(&wrong, "requests")), (400, ["60", "0", "2s"].map(str::to_owned)));
    let refused = world.send(costing(50, 50)).await;
    assert_eq!((refused.status.as_u16(), quota(&refused, "requests")), (429, ["60", "0", "2s"].map(str::to_owned)));
    assert_eq!(quota(&refused, "tokens")[0], "6000");
}

#[tokio::test(start_paused = true)]
async fn the_gateways_word_on_a_quota_stands_where_weir_has_none_of_its_own() {
    let told = |config: &'static str| async move {
        let world = World::new(config, |_| answer(200, &TOLD, "{}"));
        let answer = world.send(costing(50, 50)).await;
        (quota(&answer, "requests"), quota(&answer, "tokens"))
    };
    let gateways = (["7", "6", ""].map(str::to_owned), ["700", "", "1h0m0s"].map(str::to_owned));
    assert_eq!(told("").await, gateways);
    assert_eq!(told("[limits]\ntokens = \"10000/min\"\nmode = \"observe\"\n").await, gateways, "observed, not told");
    let (requests, tokens) = told("[limits]\ntokens = { rate = \"6000/min\", burst = 1000 }\n").await;
    assert_eq!((requests, tokens), (gateways.0, ["6000", "900", "1s"].map(str::to_owned)));
}

#[tokio::test(start_paused = true)]
async fn a_stream_tells_how_the_quota_stands_while_it_is_reserved() {
    let world = World::new(RATE, |_| events(&["data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n"]));
    let answer = world.send(streaming()).await;
    assert_eq!(quota(&answer, "tokens"), ["100", "900", "1s"]);
    let over_http2 = world.http2().await.send_request(crate::world::over_http2(streaming())).await.expect("answered");
    assert!(over_http2.headers().contains_key("x-ratelimit-remaining-tokens"));
}

// A client's patience.

#[tokio::test(start_paused = true)]
async fn a_clients_patience_is_for_the_queue_and_the_models_first_byte() {
    for (patience, status) in [("8", 429), ("9", 200)] {
        let world = World::new(RATE, |seen| [vec![wait(4000)], costs(seen.body.len() as u64 / 4, 50)].concat());
        assert_eq!(world.send(costing(50, 50)).await.status, 200);
        assert_eq!(world.send(costing(950, 50)).await.status, 200);
        // 400 tokens are there: 5 s until there are 900, and 4 s for the answer.
        let answer = world.send(with(costing(850, 50), "x-stainless-read-timeout", patience)).await;
        assert_eq!(answer.status, status, "{patience} s: {}", answer.text());
        if status == 429 {
            assert_refused_by_tokens(&answer, "global");
            assert_eq!((world.elapsed(), answer.header("retry-after-ms")), (8000, "1000"));
        } else {
            assert_eq!(world.elapsed(), 8000 + 9000);
        }
    }
}

/// The gateway's bucket is a little behind weir's: one is refused, and the tokens that it gets back are its own.
#[tokio::test(start_paused = true)]
async fn one_refusal_of_the_gateways_does_not_bring_the_next_in_line_another() {
    let script = |seen: &crate::gateway::Seen| match seen.number {
        10 => error(429, &[("retry-after-ms", "30")]),
        _ => [vec![Step::Wait(Duration::from_secs(2))], crate::gateway::completion()].concat(),
    };
    let config = "[limits]\ntokens = { rate = \"2000/s\", burst = 1000 }\nconcurrency = 1000\n";
    let world = World::new(config, script);
    let body = format!(r#"{{"model":"gpt-4.1-mini","max_tokens":5,"messages":"{}"}}"#, "x".repeat(400));
    let answers: Vec<_> = (0..30).map(|_| world.spawn(chat(&body))).collect();
    for answer in answers {
        assert_eq!(answer.await.expect("answered").status, 200);
    }
    let seen = world.times();
    let refused_at = seen[10];
    let soon = seen.iter().filter(|at| (refused_at..refused_at + 30).contains(*at)).count();
    assert_eq!(soon, 1, "nobody takes the place of the one that was refused: {seen:?}");
    world.assert_nothing_held();
}
