//! Each timeout has a name, ends what took too long, and leaves nothing behind.

use std::time::Duration;

use http::Method;

use crate::gateway::{Seen, Step, answer, chunk, completion, done, event, stream_head};
use crate::world::{CHAT, STREAM, World, chat, request};

const SECOND: Duration = Duration::from_secs(1);

fn body_of(parts: &[&str]) -> Vec<Step> {
    parts.iter().map(|part| Step::Send(part.as_bytes().to_vec())).chain([Step::Stall]).collect()
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_not_made_in_time_is_a_connect_timeout() {
    let world = World::new("[retry]\nmax_retries = 0\n[timeouts]\nconnect = \"3s\"\n", |_| completion());
    world.gateway.delay_connections(Duration::from_secs(4));
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.code(), world.elapsed()), (504, "connect_timeout".to_owned(), 3000));
    assert_eq!((world.attempts("connect_error"), world.gateway.connections()), (1.0, 0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_connect_timeout_is_retried_as_often_as_any_connection_error() {
    let world = World::new("[timeouts]\nconnect = \"1s\"\n", |_| completion());
    world.gateway.delay_connections(Duration::from_secs(2));
    let answer = world.chat().await;
    assert_eq!((answer.code(), answer.header("x-weir-attempts")), ("connect_timeout".to_owned(), "4"));
    assert_eq!(answer.header("x-should-retry"), "false");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_stream_without_a_head_is_a_first_event_timeout() {
    let world = World::new("[timeouts]\nfirst_event = \"10s\"\n[retry]\nmax_retries = 0\n", |_| vec![Step::Stall]);
    let answer = world.stream().await;
    assert_eq!((answer.status.as_u16(), answer.code()), (504, "first_event_timeout".to_owned()));
    assert_eq!((world.elapsed(), world.gateway.cancelled()), (10_000, 1));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_head_without_an_event_that_has_not_gone_on_is_a_first_event_timeout_too() {
    let script = |seen: &Seen| {
        if seen.number == 0 { vec![stream_head(), Step::Stall] } else { crate::gateway::stream(&["fine"]) }
    };
    let world = World::new("[timeouts]\nfirst_event = \"1s\"\n", script);
    let answer = world.stream().await;
    assert!(answer.text().contains("fine"), "{}", answer.text());
    assert_eq!((answer.header("x-weir-attempts"), world.attempts("timeout")), ("2", 1.0));
    let world = World::new("[timeouts]\nfirst_event = \"1s\"\n", |_| vec![stream_head(), Step::Stall]);
    let answer = world.stream().await;
    assert_eq!((answer.status.as_u16(), answer.code()), (504, "first_event_timeout".to_owned()));
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_head_that_went_on_without_an_event_ends_with_an_error_event() {
    for beginning in ["", ": ping\n\n"] {
        let script = move |_: &_| match beginning {
            "" => vec![stream_head(), Step::Stall],
            ping => vec![stream_head(), chunk(ping), Step::Stall],
        };
        let world = World::new("[timeouts]\nfirst_event = \"10s\"\n", script);
        let answer = world.stream().await;
        assert_eq!((answer.status.as_u16(), answer.broken, world.elapsed()), (200, false, 10_000));
        let text = answer.text();
        assert!(text.starts_with(&format!("{beginning}data: {{\"error\":")), "{text}");
        assert!(text.contains("\"first_event_timeout\"") && text.ends_with("\n\n") && !text.contains("[DONE]"));
        assert_eq!((world.attempts("timeout"), world.requests("upstream_error")), (1.0, 1.0));
        world.settle().await;
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn a_first_event_may_take_long_and_the_next_as_long_as_idle_allows() {
    let config = "[timeouts]\nfirst_event = \"10s\"\nidle = \"60s\"\n";
    let world = World::new(config, |_| {
        [
            vec![stream_head(), Step::Wait(9 * SECOND), event("one"), Step::Wait(59 * SECOND), event("two")],
            done().to_vec(),
        ]
        .concat()
    });
    let answer = world.stream().await;
    assert!(answer.text().ends_with("[DONE]\n\n") && !answer.broken, "{}", answer.text());
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_cannot_be_read_is_not_waited_for_as_if_it_had_not_begun() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
    let world = World::new("[timeouts]\nfirst_event = \"10s\"\n", move |_| {
        let pieces = (0..10).flat_map(|_| [chunk("gzip"), Step::Wait(3 * SECOND)]);
        [Step::Send(head.into())].into_iter().chain(pieces).chain([Step::Send(b"0\r\n\r\n".to_vec())]).collect()
    });
    let response = world.begin(chat(STREAM)).await;
    assert_eq!(world.elapsed(), 0, "there is no first event to wait for");
    let answer = crate::world::collect(response).await;
    assert_eq!((answer.text(), answer.broken), ("gzip".repeat(10), false));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_a_head_is_a_response_timeout_streams_excepted() {
    let config = "[timeouts]\nresponse = \"10s\"\nfirst_event = \"60s\"\n[retry]\nmax_retries = 0\n";
    let script = |seen: &Seen| match seen.number {
        0 | 1 => vec![Step::Stall],
        _ => [vec![Step::Wait(20 * SECOND)], crate::gateway::stream(&["late"])].concat(),
    };
    let world = World::new(config, script);
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.code(), world.elapsed()), (504, "response_timeout".to_owned(), 10_000));
    let opaque = world.send(request(Method::GET, "/v1/models", "")).await;
    assert_eq!((opaque.code(), world.elapsed()), ("response_timeout".to_owned(), 20_000));
    assert_eq!(world.gateway.cancelled(), 2);
    assert!(world.stream().await.text().contains("late"));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_falls_silent_between_events_ends_with_an_error_event() {
    let world = World::new("[timeouts]\nidle = \"20s\"\n", |_| vec![stream_head(), event("one"), Step::Stall]);
    let answer = world.stream().await;
    let text = answer.text();
    assert!(text.contains("one") && text.contains("\"idle_timeout\"") && !text.contains("[DONE]"), "{text}");
    assert_eq!((answer.broken, world.elapsed()), (false, 20_000));
    assert_eq!((world.attempts("timeout"), world.requests("upstream_error")), (1.0, 1.0));
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_falls_silent_inside_an_event_is_cut() {
    let world = World::new("[timeouts]\nidle = \"20s\"\n", |_| {
        vec![stream_head(), event("one"), chunk("data: {\"half"), Step::Stall]
    });
    let answer = world.stream_with_usage().await;
    assert!(answer.broken && answer.text().ends_with("data: {\"half"), "{}", answer.text());
    assert_eq!(world.elapsed(), 20_000);
    let without_usage = world.stream().await;
    assert!(without_usage.broken && !without_usage.text().contains("half"), "of events looked at, whole ones only");
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_json_answer_that_falls_silent_is_cut() {
    for head in ["content-length: 100", "transfer-encoding: chunked"] {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{head}\r\n\r\n");
        let world = World::new("[timeouts]\nidle = \"20s\"\n", move |_| body_of(&[&head, "5\r\n{\"cho\r\n"]));
        let answer = world.chat().await;
        assert!(answer.broken && answer.status == 200, "{answer:?}");
        assert_eq!((world.elapsed(), world.attempts("timeout")), (20_000, 1.0));
        world.settle().await;
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_attempts_and_pauses_together() {
    let world = World::new("[timeouts]\ndeadline = \"10s\"\n", |_| vec![Step::Stall]);
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.code()), (504, "deadline_exceeded".to_owned()));
    assert_eq!((world.elapsed(), world.gateway.seen().len()), (10_000, 1));
    // A pause that would last beyond it is not begun.
    let world =
        World::new("[timeouts]\ndeadline = \"10s\"\n", |_| [vec![Step::Wait(6 * SECOND)], answer_503()].concat());
    let answer = world.chat().await;
    assert_eq!((answer.status.as_u16(), answer.header("x-should-retry")), (503, "false"));
    assert_eq!((world.elapsed(), world.gateway.seen().len()), (6000, 1));
    world.assert_nothing_held();
}

fn answer_503() -> Vec<Step> {
    answer(503, &[("retry-after", "5")], "{}")
}

#[tokio::test(start_paused = true)]
async fn the_deadline_counts_the_queue_too() {
    let config = "[limits]\nconcurrency = 1\n[timeouts]\ndeadline = \"10s\"\nidle = \"1min\"\n";
    let world = World::new(config, |seen| match seen.number {
        0 => vec![stream_head(), event("one"), Step::Wait(8 * SECOND), event("two"), Step::Send(b"0\r\n\r\n".to_vec())],
        _ => vec![Step::Stall],
    });
    let first = world.spawn(chat(STREAM));
    world.gateway.saw(1).await;
    let answer = world.chat().await;
    assert_eq!((answer.code(), world.elapsed()), ("deadline_exceeded".to_owned(), 10_000));
    assert_eq!(world.times(), [0, 8000], "it had two seconds left");
    assert!(first.await.expect("answered").text().contains("two"));
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_head_went_on_is_ended_by_the_deadline_under_its_own_name() {
    let config = "[timeouts]\ndeadline = \"10s\"\nfirst_event = \"60s\"\n";
    let world = World::new(config, |_| vec![stream_head(), Step::Stall]);
    let answer = world.stream().await;
    assert!(answer.text().contains("\"deadline_exceeded\""), "{}", answer.text());
    assert_eq!((answer.status.as_u16(), world.elapsed()), (200, 10_000));
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn the_deadline_never_cuts_an_answer_that_has_begun() {
    let pieces = || (0..10).flat_map(|_| [Step::Wait(3 * SECOND), event("more")]);
    let script = move |seen: &Seen| match seen.body == CHAT.as_bytes() {
        true => {
            let head = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n";
            let bytes = (0..10).flat_map(|_| [Step::Wait(3 * SECOND), Step::Send(b"x".to_vec())]);
            [Step::Send(head.into())].into_iter().chain(bytes).collect()
        }
        false => [stream_head(), event("one")].into_iter().chain(pieces()).chain(done()).collect(),
    };
    let world = World::new("[timeouts]\ndeadline = \"5s\"\n", script);
    let streamed = world.stream().await;
    assert!(streamed.text().ends_with("[DONE]\n\n") && !streamed.broken && world.elapsed() == 30_000);
    let json = world.chat().await;
    assert!(json.text() == "xxxxxxxxxx" && !json.broken && world.elapsed() == 60_000);
    world.assert_nothing_held();
}
