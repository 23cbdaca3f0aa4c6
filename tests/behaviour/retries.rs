//! Passing faults are retried out of the client's sight, and nothing is ever sent again that may do harm twice.

use std::time::Duration;

use crate::gateway::{Seen, Step, chunk, completion, done, error, event, stream, stream_head};
use crate::world::{CHAT, World, chat, request, with};

/// A gateway that fails so for the first `times` requests, and then answers.
fn failing(
    times: usize,
    how: impl Fn() -> Vec<Step> + Send + Sync + 'static,
) -> impl Fn(&Seen) -> Vec<Step> + Send + Sync {
    move |seen: &Seen| if seen.number < times { how() } else { completion() }
}

#[tokio::test(start_paused = true)]
async fn each_passing_fault_is_absorbed() {
    for status in [408, 409, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529] {
        let world = World::new("", failing(1, move || error(status, &[])));
        let answer = world.chat().await;
        assert_eq!((answer.status.as_u16(), answer.header("x-weir-attempts")), (200, "2"), "{status}");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn other_errors_are_the_clients_own() {
    for status in [400, 401, 403, 404, 413, 422, 501] {
        let world = World::new("", failing(1, move || error(status, &[("x-kept", "yes")])));
        let answer = world.chat().await;
        assert_eq!((answer.status.as_u16(), answer.header("x-weir-attempts")), (status, "1"));
        assert_eq!((answer.code(), answer.header("x-kept")), ("upstream_code".to_owned(), "yes"));
        assert_eq!(answer.header("x-should-retry"), "");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_closes_or_refuses_or_talks_nonsense_is_tried_again() {
    let faults: [fn() -> Vec<Step>; 3] = [
        || vec![Step::Close],
        || vec![Step::Send(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), Step::Close],
        || vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-".to_vec()), Step::Close],
    ];
    for fault in faults {
        let world = World::new("", failing(1, fault));
        assert_eq!(world.chat().await.header("x-weir-attempts"), "2");
        assert_eq!(world.attempts("reset"), 1.0);
        world.assert_nothing_held();
    }
    let world = World::new("", |_| completion());
    world.gateway.refuse_connections(2);
    assert_eq!(world.chat().await.header("x-weir-attempts"), "3");
    assert_eq!(world.attempts("connect_error"), 2.0);
}

#[tokio::test(start_paused = true)]
async fn after_three_retries_the_gateways_own_error_goes_on_as_it_came() {
    let world = World::new("", |_| error(503, &[("x-kept", "yes"), ("retry-after-ms", "100")]));
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.code()), (503, "upstream_code".to_owned()));
    assert_eq!((answer.header("x-should-retry"), answer.header("x-weir-attempts")), ("false", "4"));
    assert_eq!((answer.header("x-kept"), answer.header("retry-after-ms")), ("yes", "100"));
    assert_eq!(world.times(), [0, 100, 200, 300]);
    assert_eq!((world.attempts("5xx"), world.requests("upstream_error")), (4.0, 1.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn without_an_answer_after_three_retries_weir_says_what_happened() {
    let world = World::new("", |_| vec![Step::Close]);
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.code()), (502, "upstream_disconnected".to_owned()));
    assert_eq!((answer.header("x-should-retry"), answer.header("x-weir-attempts")), ("false", "4"));
    assert_eq!(world.requests("failed"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn the_delays_double_with_jitter() {
    let world = World::new("", |_| error(500, &[]));
    world.chat().await;
    let times = world.times();
    let delays: Vec<u64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (delay, base) in delays.iter().zip([1000, 2000, 4000]) {
        assert!((base..=base + 1001).contains(delay), "{delays:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hint_replaces_the_delay() {
    for (name, value, millis) in [("retry-after-ms", "20", 20), ("retry-after", "2", 2000), ("retry-after", "0.5", 500)]
    {
        let world = World::new("", failing(1, move || error(429, &[(name, value)])));
        assert_eq!(world.chat().await.status, 200);
        assert_eq!(world.times(), [0, millis], "{name}: {value}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hint_beyond_the_deadline_is_passed_on_at_once() {
    let world = World::new("[timeouts]\ndeadline = \"10s\"\n", |_| error(429, &[("retry-after", "30")]));
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.header("retry-after"), world.elapsed()), (429, "30", 0));
    assert_eq!(answer.header("x-should-retry"), "false");
}

#[tokio::test(start_paused = true)]
async fn a_lack_of_money_is_not_waited_for() {
    let body = r#"{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","code":"insufficient_quota"}}"#;
    let world = World::new("", move |_| crate::gateway::answer(429, &[], body));
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.text().as_str()), (429, body));
    assert_eq!(world.gateway.seen().len(), 1);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn no_slot_is_held_while_weir_sleeps() {
    let script = |seen: &Seen| if seen.number == 0 { error(503, &[]) } else { completion() };
    let world = World::new("[limits]\nconcurrency = 1\n", script);
    let first = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    assert_eq!(world.chat().await.status, 200);
    assert_eq!(world.elapsed(), 0, "the second went while the first slept");
    assert_eq!(first.await.expect("answered").status, 200);
    assert!(matches!(world.times()[..], [0, 0, 1000..=2001]), "{:?}", world.times());
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_retry_goes_to_the_front_of_the_queue_and_past_its_bound() {
    let script = |seen: &Seen| match seen.number {
        0 => error(503, &[]),
        _ => [vec![Step::Wait(Duration::from_secs(3))], completion()].concat(),
    };
    let world = World::new("[limits]\nconcurrency = 1\n[queue]\nmax_waiting = 2\n", script);
    for name in ["first", "second", "third"] {
        world.spawn(chat(&CHAT.replace("hello", name)));
        world.settle().await;
    }
    tokio::time::sleep(Duration::from_millis(2002)).await;
    // The second has the slot, the first is back in the queue with the third: full, by number.
    let fourth = world.chat().await;
    assert_eq!(fourth.code(), "queue_full");
    world.gateway.saw(4).await;
    let order: Vec<String> =
        world.gateway.seen().iter().map(|seen| String::from_utf8_lossy(&seen.body).into_owned()).collect();
    let expected = ["first", "second", "first", "third"];
    assert!(order.iter().zip(expected).all(|(body, name)| body.contains(name)), "{order:?}");
}

#[tokio::test(start_paused = true)]
async fn when_no_further_attempt_is_let_through_the_gateways_error_is_passed_on() {
    let config = "[limits]\nrequests = { rate = \"1/min\", burst = 1 }\n[queue]\nmax_wait = \"10s\"\n";
    let world = World::new(config, |_| error(503, &[("retry-after-ms", "10")]));
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.code()), (503, "upstream_code".to_owned()));
    assert_eq!((answer.header("x-should-retry"), answer.header("x-weir-attempts")), ("false", "1"));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_went_stale_in_the_pool_costs_no_retry() {
    let script = |seen: &Seen| if seen.number == 1 { vec![Step::Close] } else { completion() };
    let world = World::new("", script);
    assert_eq!(world.chat().await.status, 200);
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.header("x-weir-attempts")), (200, "2"));
    assert_eq!(world.metric(r#"weir_retries_total{model="gpt-4.1-mini",reason="reset"}"#), 0.0);
    let connections: Vec<usize> = world.gateway.seen().iter().map(|seen| seen.connection).collect();
    assert_eq!(connections, [0, 0, 1], "reused, found closed, and sent over a new one");
    assert_eq!(world.elapsed(), 0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_twice_over_a_stale_connection_counts_twice_against_the_quota() {
    let script = |seen: &Seen| if seen.number == 1 { vec![Step::Close] } else { completion() };
    let world = World::new("[limits]\nrequests = { rate = \"1/s\", burst = 2 }\n", script);
    for _ in 0..3 {
        assert_eq!(world.chat().await.status, 200);
    }
    assert_eq!(world.times(), [0, 0, 0, 2000]);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_never_got_a_connection_costs_nothing_of_the_quota() {
    let world = World::new("[limits]\nrequests = { rate = \"1/min\", burst = 1 }\n", |_| completion());
    world.gateway.refuse_connections(2);
    assert_eq!(world.chat().await.header("x-weir-attempts"), "3");
    assert!(world.elapsed() < 10_000, "no minute was waited for a cell");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_before_a_connection_is_made_costs_nothing_of_the_quota() {
    let world = World::new("[limits]\nrequests = { rate = \"1/min\", burst = 1 }\n", |_| completion());
    world.gateway.delay_connections(Duration::from_secs(3));
    let client = world.spawn(chat(CHAT));
    tokio::time::sleep(Duration::from_secs(1)).await;
    client.abort();
    world.settle().await;
    world.assert_nothing_held();
    assert_eq!(world.chat().await.status, 200);
    assert_eq!(world.elapsed(), 4000);
}

#[tokio::test(start_paused = true)]
async fn an_opaque_post_is_not_sent_twice_when_it_may_have_been_done() {
    let script = |seen: &Seen| if seen.number == 1 { vec![Step::Close] } else { completion() };
    let world = World::new("", script);
    let post = || request(http::Method::POST, "/v1/batches", "{}");
    assert_eq!(world.send(post()).await.status, 200);
    let answer = world.send(post()).await;
    assert_eq!((answer.status.as_u16(), answer.code()), (502, "upstream_disconnected".to_owned()));
    assert_eq!(world.gateway.seen().len(), 2);
    let world = World::new("", failing(1, || error(503, &[])));
    assert_eq!(world.send(post()).await.status, 200, "an answered error says that it was not done");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_is_retried_once() {
    let world = World::new("[timeouts]\nresponse = \"1s\"\n", |_| vec![Step::Stall]);
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.code()), (504, "response_timeout".to_owned()));
    assert_eq!((answer.header("x-weir-attempts"), answer.header("x-should-retry")), ("2", "false"));
    assert_eq!(world.gateway.cancelled(), 2, "what took too long was cancelled");
    assert_eq!(world.attempts("timeout"), 2.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_sdks_own_retries_lower_weirs() {
    let world = World::new("", |_| error(500, &[("retry-after-ms", "1")]));
    let answer = world.send(with(chat(CHAT), "x-stainless-retry-count", "2")).await;
    assert_eq!(answer.header("x-weir-attempts"), "2");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_begins_with_an_error_is_retried_unseen() {
    let script = |seen: &Seen| match seen.number {
        0 => {
            [vec![stream_head(), chunk("data: {\"error\":{\"message\":\"overloaded\"}}\n\n")], done().to_vec()].concat()
        }
        _ => stream(&["fine"]),
    };
    let world = World::new("", script);
    let answer = world.stream().await;
    assert_eq!((answer.status.as_u16(), answer.header("x-weir-attempts")), (200, "2"));
    assert!(answer.text().contains("fine") && !answer.text().contains("overloaded"));
    assert_eq!(world.attempts("stream_error"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_head_is_held_two_seconds_for_its_first_event_and_no_longer() {
    let world = World::new("", |_| {
        [vec![stream_head(), Step::Wait(Duration::from_secs(30))], stream(&["late"])[1..].to_vec()].concat()
    });
    let response = world.begin(chat(crate::world::STREAM)).await;
    assert_eq!(world.elapsed(), 2000);
    assert!(crate::world::collect(response).await.text().contains("late"));
}

#[tokio::test(start_paused = true)]
async fn once_a_byte_has_gone_to_the_client_nothing_is_retried() {
    let world = World::new("", |_| vec![stream_head(), event("one"), Step::Close]);
    let answer = world.stream().await;
    assert!(answer.text().contains("one"));
    assert_eq!(world.gateway.seen().len(), 1);
    assert_eq!((world.attempts("reset"), world.requests("upstream_error")), (1.0, 1.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn the_budget_keeps_retries_from_storming() {
    let world = World::new("[limits]\nconcurrency = 1000\n", |_| error(500, &[]));
    let clients: Vec<_> = (0..200).map(|_| world.spawn(chat(CHAT))).collect();
    for client in clients {
        let answer = client.await.expect("answered");
        assert!(
            answer.status == 500 && answer.header("x-should-retry") == "false"
                || answer.code() == "upstream_unavailable"
        );
    }
    let times = world.times();
    for from in 0..times.len() {
        let within = |number: &&u64| **number < times[from] + 10_000;
        let attempts = times[from..].iter().take_while(within).count();
        assert!(attempts <= 200 + 40 + 10, "{attempts} in ten seconds from {}", times[from]);
    }
    assert!(world.elapsed() < 60_000, "after breaker.give_up nobody waits any more");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn with_no_retries_configured_the_client_is_left_to_its_own() {
    let world = World::new("[retry]\nmax_retries = 0\n", |_| error(500, &[]));
    let answer = world.chat().await;
    assert_eq!((answer.header("x-weir-attempts"), answer.header("x-should-retry")), ("1", ""));
    let world = World::new("[retry]\nmax_retries = 0\n", |_| vec![Step::Close]);
    let answer = world.chat().await;
    assert_eq!((answer.code().as_str(), answer.header("x-should-retry")), ("upstream_disconnected", ""));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_a_stale_connection_may_have_taken_along_is_charged() {
    let script = |seen: &Seen| if seen.number == 1 { vec![Step::Close] } else { completion() };
    let config = "[limits]\nrequests = { rate = \"1/h\", burst = 3 }\n[retry]\nmax_retries = 0\n";
    let world = World::new(config, script);
    let remaining = || world.metric(r#"weir_limit_remaining{scope="global",name="",unit="requests"}"#);
    assert_eq!(world.chat().await.status, 200);
    world.gateway.refuse_connections(2);
    assert_eq!(world.chat().await.code(), "upstream_unreachable");
    assert_eq!((world.gateway.seen().len(), remaining()), (2, 1.0), "the gateway has seen it");
    assert_eq!(world.chat().await.code(), "upstream_unreachable");
    assert_eq!((world.gateway.seen().len(), remaining()), (2, 1.0), "nothing was written");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_closes_new_connections_is_not_tried_without_end() {
    let world = World::new("[limits]\nrequests = { rate = \"1/h\", burst = 1 }", |_| completion());
    world.gateway.hang_up_on(1_000_000);
    let began = tokio::time::Instant::now();
    let answer = tokio::time::timeout(Duration::from_secs(60), world.chat()).await.expect("an answer");
    assert_eq!((answer.code().as_str(), answer.header("x-weir-attempts")), ("upstream_unreachable", "4"));
    assert!(began.elapsed() > Duration::from_secs(1));
    world.assert_nothing_held();
    world.gateway.hang_up_on(0);
    assert_eq!(world.chat().await.status, 200, "nothing was written, so the cell is still there");
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_is_not_let_through_is_not_counted_as_one() {
    let world = World::new("[limits]\nrequests = { rate = \"1/h\", burst = 1 }\n", |_| error(503, &[]));
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), world.gateway.seen().len()), (503, 1));
    assert_eq!(world.metric_sum("weir_retries_total", ""), 0.0);
}
