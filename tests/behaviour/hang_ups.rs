//! A client that leaves: the gateway's work is cancelled at once, the slot comes back, and it is counted.

use std::time::Duration;

use http_body_util::BodyExt as _;
use tokio::io::AsyncWriteExt as _;

use crate::gateway::{Step, event, stream_head};
use crate::world::{CHAT, STREAM, World, chat, over_http2};

fn disconnects(world: &World, phase: &str) -> f64 {
    world.metric(&format!(r#"weir_client_disconnects_total{{phase="{phase}"}}"#))
}

#[tokio::test(start_paused = true)]
async fn in_the_queue_the_place_is_given_up() {
    let world = World::new("[limits]\nconcurrency = 1\n", |_| vec![Step::Stall]);
    let _holder = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    let waiter = world.spawn(chat(CHAT));
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (1.0, 1.0));
    waiter.abort();
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
    assert_eq!((disconnects(&world, "queue"), world.requests("disconnected")), (1.0, 1.0));
}

#[tokio::test(start_paused = true)]
async fn while_waiting_for_the_head_the_gateways_work_is_cancelled() {
    let world = World::new("", |_| vec![Step::Stall]);
    let client = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    client.abort();
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    assert_eq!(world.elapsed(), 0);
    assert_eq!((disconnects(&world, "upstream"), world.attempts("cancelled")), (1.0, 1.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn in_the_middle_of_a_stream_the_gateways_work_is_cancelled() {
    let world = World::new("", |_| vec![stream_head(), event("one"), Step::Stall]);
    let mut response = world.begin(chat(STREAM)).await;
    assert!(response.body_mut().frame().await.is_some());
    drop(response);
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    assert_eq!(world.elapsed(), 0);
    assert_eq!((disconnects(&world, "stream"), world.attempts("cancelled")), (1.0, 1.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn while_weir_sleeps_before_a_retry_nothing_more_is_sent() {
    let world = World::new("", |_| crate::gateway::error(503, &[]));
    let client = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    world.settle().await;
    client.abort();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(world.gateway.seen().len(), 1);
    assert_eq!(disconnects(&world, "queue"), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_http2_stream_that_is_reset_is_cancelled_and_its_neighbour_is_not() {
    let world = World::new("", |_| {
        vec![stream_head(), event("one"), Step::Gate, event("two"), Step::Send(b"0\r\n\r\n".to_vec())]
    });
    let sender = world.http2().await;
    let (left, stays) = (sender.clone().send_request(chat_h2()).await, sender.clone().send_request(chat_h2()).await);
    drop(left.expect("answered"));
    world.gateway.saw_cancelled(1).await;
    world.gateway.go_on();
    let answer = crate::world::collect(stays.expect("answered")).await;
    assert!(answer.text().contains("two") && !answer.broken);
    assert_eq!(world.gateway.cancelled(), 1);
    world.settle().await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_http2_request_that_is_dropped_in_the_queue_gives_its_place_up() {
    let world = World::new("[limits]\nconcurrency = 1\n", |_| vec![Step::Stall]);
    let sender = world.http2().await;
    let holder = tokio::spawn(sender.clone().send_request(chat_h2()));
    world.gateway.saw(1).await;
    let waiter = tokio::spawn(sender.clone().send_request(chat_h2()));
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (1.0, 1.0));
    waiter.abort();
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
    holder.abort();
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    world.assert_nothing_held();
}

fn chat_h2() -> http::Request<http_body_util::Full<bytes::Bytes>> {
    over_http2(chat(STREAM))
}

#[tokio::test(start_paused = true)]
async fn an_http2_client_that_never_opens_its_window_loses_its_slot() {
    let long = "x".repeat(8 << 20);
    let world = World::new("[server]\nwrite_timeout = \"3s\"\n", move |_| crate::gateway::answer(200, &[], &long));
    let mut response = world.http2().await.send_request(chat_h2()).await.expect("answered");
    // One frame is read, and then no more: the window stays shut.
    assert!(response.body_mut().frame().await.is_some());
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.settle().await;
    world.assert_nothing_held();
    assert_eq!(disconnects(&world, "stream"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_waits_hides_its_hang_up_for_ten_seconds_and_no_longer() {
    let world = World::new("[limits]\nconcurrency = 1\n", |_| vec![Step::Stall]);
    let _holder = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    let mut upload = world.connect_with_buffer(4 << 20);
    let head = "POST /v1/files HTTP/1.1\r\nhost: weir.test\r\ncontent-length: 2000000\r\n\r\n";
    upload.write_all(head.as_bytes()).await.expect("written");
    world.settle().await;
    let waiting = || world.metric(r#"weir_waiting{model="-"}"#);
    drop(upload);
    world.settle().await;
    assert_eq!(waiting(), 1.0, "hyper does not read on, and so does not see the end");
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert_eq!(waiting(), 0.0);
    assert_eq!(world.gateway.seen().len(), 1);
}
