//! Requests wait for quota and slots, in order, and are refused only when waiting can't help.

use std::time::Duration;

use crate::gateway::{Step, answer, completion, event, stream_head};
use crate::world::{CHAT, World, chat, join_all, with};

#[tokio::test(start_paused = true)]
async fn a_small_burst_waits_and_is_not_refused() {
    let world = World::new("[limits]\nrequests = { rate = \"10/s\", burst = 2 }\n", |_| completion());
    let answers = join_all((0..6).map(|_| world.spawn(chat(CHAT)))).await;
    assert!(answers.iter().all(|answer| answer.status == 200));
    assert_eq!(world.times(), [0, 0, 100, 200, 300, 400]);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_slot_is_held_to_the_last_byte_of_a_stream() {
    let script = |_: &_| vec![stream_head(), event("one"), Step::Gate, event("two"), Step::Send(b"0\r\n\r\n".to_vec())];
    let world = World::new("[limits]\nconcurrency = 1\n", script);
    let first = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    let second = world.spawn(chat(CHAT));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(world.gateway.seen().len(), 1, "the second waits while the first streams");
    assert_eq!(world.in_flight_and_waiting(), (1.0, 1.0));
    world.gateway.go_on();
    assert!(first.await.expect("answered").text().contains("two"));
    world.gateway.saw(2).await;
    world.gateway.go_on();
    assert_eq!(second.await.expect("answered").status, 200);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn who_cannot_be_served_in_time_is_refused_at_once_and_told_when() {
    let config = "[limits]\nrequests = { rate = \"1/s\", burst = 1 }\n[queue]\nmax_wait = \"2s\"\n";
    let world = World::new(config, |_| completion());
    let served: Vec<_> = (0..3).map(|_| world.spawn(chat(CHAT))).collect();
    world.settle().await;
    let refused = world.chat().await;
    assert_eq!(world.elapsed(), 0, "refused without waiting");
    assert_eq!((refused.status.as_u16(), refused.code()), (429, "rate_limit_exceeded".to_owned()));
    assert_eq!((refused.header("retry-after"), refused.header("retry-after-ms")), ("1", "1000"));
    assert_eq!(refused.header("x-weir-refused-by"), "requests; global");
    assert_eq!(refused.header("x-weir-attempts"), "0");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.chat().await.status, 200, "who comes back when told is served");
    assert!(join_all(served).await.iter().all(|answer| answer.status == 200));
    assert_eq!(world.metric(r#"weir_refused_total{model="gpt-4.1-mini",client="-",reason="requests"}"#), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_with_503() {
    let world = World::new("[limits]\nconcurrency = 1\n[queue]\nmax_waiting = 1\n", |_| vec![Step::Stall]);
    let (_first, _second) = (world.spawn(chat(CHAT)), world.spawn(chat(CHAT)));
    world.gateway.saw(1).await;
    world.settle().await;
    let refused = world.chat().await;
    assert_eq!((refused.status.as_u16(), refused.code()), (503, "queue_full".to_owned()));
    assert!(!refused.header("retry-after-ms").is_empty());
    assert_eq!(refused.header("x-weir-refused-by"), "queue; global");
}

#[tokio::test(start_paused = true)]
async fn who_has_waited_max_wait_for_a_slot_is_refused() {
    let world = World::new("[limits]\nconcurrency = 1\n[queue]\nmax_wait = \"3s\"\n", |_| vec![Step::Stall]);
    let _first = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    let refused = world.chat().await;
    assert_eq!(world.elapsed(), 3000);
    assert_eq!((refused.status.as_u16(), refused.code()), (503, "concurrency_exhausted".to_owned()));
    let held_up =
        "the limit of 1 request at a time held this request up for 3.0 s, as long as it may wait; try again in ";
    assert!(refused.text().contains(held_up), "{}", refused.text());
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_the_deadline_and_the_hint_knows_it() {
    let limits = "[limits]\nrequests = { rate = \"1/min\", burst = 1 }\n[queue]\nmax_wait = \"1h\"\n";
    let world = World::new(&format!("{limits}[timeouts]\ndeadline = \"20s\"\n"), |_| completion());
    assert_eq!(world.chat().await.status, 200);
    let refused = world.chat().await;
    assert_eq!((refused.status.as_u16(), refused.header("retry-after"), world.elapsed()), (429, "40", 0));
    let why = "the request limit of 1/min is used up: the wait would be about 60.0 s, and 20s is allowed";
    assert!(refused.text().contains(why), "{}", refused.text());
    tokio::time::sleep(Duration::from_secs(41)).await;
    assert_eq!(world.chat().await.status, 200, "who comes back when told is served");
}

#[tokio::test(start_paused = true)]
async fn a_clients_own_patience_is_shorter_than_max_wait() {
    let world = World::new("[limits]\nrequests = { rate = \"1/min\", burst = 1 }\n", |_| completion());
    assert_eq!(world.chat().await.status, 200);
    let refused = world.send(with(chat(CHAT), "x-stainless-read-timeout", "10")).await;
    assert_eq!((refused.status.as_u16(), refused.header("retry-after")), (429, "50"));
    assert_eq!(world.elapsed(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_model_has_its_own_limits_and_the_star_stands_for_each_unnamed_one() {
    let config = r#"
        [models."gpt-4.1-mini"]
        requests = { rate = "1/s", burst = 1 }
        [models."*"]
        requests = { rate = "1/min", burst = 1 }
    "#;
    let world = World::new(config, |_| completion());
    let named: Vec<_> = (0..3).map(|_| world.spawn(chat(CHAT))).collect();
    join_all(named).await;
    assert_eq!(world.times(), [0, 1000, 2000]);
    // Both names are unknown until a first success, and share one bucket so long.
    let deepseek = chat(r#"{"model":"deepseek-chat"}"#);
    assert_eq!(world.send(deepseek.clone()).await.status, 200);
    let before = world.elapsed();
    assert_eq!(world.send(deepseek).await.status, 200, "now known by name, with a bucket of its own");
    assert_eq!(world.elapsed(), before);
    assert_eq!(world.send(chat(r#"{"model":"another"}"#)).await.status, 200);
    assert_eq!(world.elapsed(), before + 60_000);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn replicas_share_the_quota() {
    let config = "[limits]\nrequests = { rate = \"10/s\", burst = 2 }\nconcurrency = 4\nreplicas = 2\n";
    let world = World::new(config, |_| completion());
    join_all((0..4).map(|_| world.spawn(chat(CHAT)))).await;
    assert_eq!(world.times(), [0, 200, 400, 600]);
    assert_eq!(world.metric(r#"weir_limit_remaining{scope="global",name="",unit="concurrency"}"#), 2.0);
}

#[tokio::test(start_paused = true)]
async fn each_lane_begins_with_ten_slots_where_concurrency_is_adaptive() {
    let world = World::new("", |_| vec![Step::Stall]);
    let _held: Vec<_> = (0..12).map(|_| world.spawn(chat(CHAT))).collect();
    let _other_key: Vec<_> = (0..3).map(|_| world.spawn(with(chat(CHAT), "authorization", "Bearer other"))).collect();
    world.gateway.saw(13).await;
    world.settle().await;
    assert_eq!(world.gateway.seen().len(), 13);
    assert_eq!(world.in_flight_and_waiting(), (13.0, 2.0));
    assert_eq!(world.metric(r#"weir_concurrency_limit{model="gpt-4.1-mini"}"#), 10.0);
    // Nobody knows yet what this gateway takes: a refusal of the second is to be heard before the tenth is sent.
    let mut times = world.times();
    times.sort_unstable();
    assert_eq!((times[0], times[12]), (0, 180), "{times:?}");
}

#[tokio::test(start_paused = true)]
async fn an_opaque_call_passes_the_same_gate() {
    let world = World::new("[limits]\nrequests = { rate = \"1/s\", burst = 1 }\n", |_| answer(200, &[], "{}"));
    for _ in 0..3 {
        let request = crate::world::request(http::Method::GET, "/v1/models", "");
        assert_eq!(world.send(request).await.status, 200);
    }
    assert_eq!(world.times(), [0, 1000, 2000]);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn who_finds_the_queue_full_is_told_when_there_is_a_place_in_it() {
    let limits = "[limits]\nrequests = { rate = \"1/s\", burst = 1 }\n[queue]\nmax_waiting = 1";
    let world = World::new(limits, |_| completion());
    world.chat().await;
    let waiting = world.spawn(chat(CHAT));
    world.settle().await;
    let refused = world.chat().await;
    assert_eq!(refused.code(), "queue_full");
    tokio::time::sleep(Duration::from_millis(refused.header("retry-after-ms").parse().expect("a number"))).await;
    assert_eq!(world.chat().await.status, 200);
    assert_eq!(waiting.await.expect("served").status, 200);
}
