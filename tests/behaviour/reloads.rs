//! Another configuration comes into force while requests wait and stream.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use weir::reload::{NotReloaded, Reloader, Report, Source};

use crate::gateway::{Step, completion, event, stream_head};
use crate::world::{Answer, CHAT, World, bearer, chat, join_all, with};

const SECOND: Duration = Duration::from_secs(1);

/// A stream of two events, between which the gateway waits.
fn gated_stream() -> Vec<Step> {
    vec![stream_head(), event("one"), Step::Gate, event("two"), Step::Send(b"0\r\n\r\n".to_vec())]
}

#[track_caller]
fn applied(world: &World, config: &str) -> Vec<String> {
    world.reload(config).expect("it can change live")
}

fn statuses(answers: &[Answer]) -> Vec<u16> {
    answers.iter().map(|answer| answer.status.as_u16()).collect()
}

// Limits.

#[tokio::test(start_paused = true)]
async fn more_slots_let_waiters_go_at_once_and_the_stream_under_way_is_untouched() {
    let world = World::new("[limits]\nconcurrency = 1\n", |_| gated_stream());
    let first = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    let waiting: Vec<_> = (0..3).map(|_| world.spawn(chat(CHAT))).collect();
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (1.0, 3.0));
    assert_eq!(applied(&world, "[limits]\nconcurrency = 3\n"), ["limits.concurrency"]);
    world.gateway.saw(3).await;
    assert_eq!((world.elapsed(), world.in_flight_and_waiting()), (0, (3.0, 1.0)));
    for seen in [3, 4] {
        world.gateway.saw(seen).await;
        world.settle().await;
        world.gateway.go_on();
    }
    let first = first.await.expect("answered");
    assert!(!first.broken && first.text().contains("one") && first.text().contains("two"), "{}", first.text());
    for answer in join_all(waiting).await {
        assert_eq!(answer.body, first.body);
    }
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn fewer_slots_cut_nobody_off() {
    let world = World::new("[limits]\nconcurrency = 3\n", |_| gated_stream());
    let streams: Vec<_> = (0..3).map(|_| world.spawn(chat(CHAT))).collect();
    world.gateway.saw(3).await;
    applied(&world, "[limits]\nconcurrency = 1\n");
    let waiter = world.spawn(chat(CHAT));
    tokio::time::sleep(SECOND * 60).await;
    assert_eq!(world.in_flight_and_waiting(), (3.0, 1.0));
    world.gateway.go_on();
    for answer in join_all(streams).await {
        assert!(!answer.broken && answer.text().contains("two"));
    }
    world.gateway.saw(4).await;
    world.gateway.go_on();
    assert_eq!(waiter.await.expect("answered").status, 200);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_rate_changes_for_those_who_wait_and_what_was_used_stays_used() {
    let world = World::new("[limits]\nrequests = { rate = \"1/s\", burst = 5 }\n", |_| completion());
    let burst = join_all((0..5).map(|_| world.spawn(chat(CHAT)))).await;
    assert_eq!(statuses(&burst), [200; 5]);
    let waiting: Vec<_> = (0..4).map(|_| world.spawn(chat(CHAT))).collect();
    tokio::time::sleep(SECOND / 2).await;
    applied(&world, "[limits]\nrequests = { rate = \"10/s\", burst = 5 }\n");
    assert_eq!(statuses(&join_all(waiting).await), [200; 4]);
    // Half a cell was there, and the rest comes ten times as fast.
    assert_eq!(world.times()[5..], [550, 650, 750, 850]);
}

#[tokio::test(start_paused = true)]
async fn a_burst_cannot_be_had_twice_by_reloading() {
    let limits = |burst| {
        format!(
            "[limits]\nrequests = {{ rate = \"1/min\", burst = {burst} }}\nconcurrency = 100\n[queue]\nmax_wait = \"0s\"\n"
        )
    };
    let world = World::new(&limits(10), |_| completion());
    let served = async || {
        let answers = join_all((0..20).map(|_| world.spawn(chat(CHAT)))).await;
        answers.iter().filter(|answer| answer.status == 200).count()
    };
    assert_eq!(served().await, 10);
    for burst in [1, 10, 3, 10] {
        applied(&world, &limits(burst));
        assert_eq!(served().await, 0, "with a burst of {burst}");
    }
    applied(&world, &limits(12));
    assert_eq!(served().await, 2, "what is new of it");
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_is_removed_lets_its_waiters_go_on_and_one_that_is_added_counts_who_is_under_way() {
    let world = World::new("[models.\"gpt-4.1-mini\"]\nconcurrency = 1\n", |_| vec![Step::Stall]);
    let _held: Vec<_> = (0..3).map(|_| world.spawn(chat(CHAT))).collect();
    world.gateway.saw(1).await;
    applied(&world, "[models.\"gpt-4.1-mini\"]\n");
    world.gateway.saw(3).await;
    applied(&world, "[models.\"*\"]\nrequests = \"1/min\"\n[clients.a]\nkey = \"ka\"\n[limits]\nconcurrency = 5\n");
    assert_eq!(world.remaining(("global", "", "concurrency")), 2.0);
    let _more: Vec<_> = (0..3).map(|_| world.spawn(bearer(chat(CHAT), "ka"))).collect();
    world.gateway.saw(5).await;
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (5.0, 1.0));
}

#[tokio::test(start_paused = true)]
async fn who_would_have_been_refused_by_an_observed_limit_waits_when_it_is_enforced() {
    let limit = |mode| format!("[limits]\nconcurrency = 1\nmode = \"{mode}\"\n");
    let world = World::new(&limit("observe"), |_| gated_stream());
    let held: Vec<_> = (0..2).map(|_| world.spawn(chat(CHAT))).collect();
    world.gateway.saw(2).await;
    applied(&world, &limit("enforce"));
    let waiter = world.spawn(chat(CHAT));
    world.settle().await;
    assert_eq!(world.in_flight_and_waiting(), (2.0, 1.0));
    applied(&world, &limit("observe"));
    world.gateway.saw(3).await;
    world.gateway.go_on();
    join_all(held).await;
    assert_eq!(waiter.await.expect("answered").status, 200);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_smaller_queue_throws_nobody_out() {
    let limits = |waiting| format!("[limits]\nconcurrency = 1\n[queue]\nmax_waiting = {waiting}\n");
    let world = World::new(&limits(10), |_| gated_stream());
    let held: Vec<_> = (0..4).map(|_| world.spawn(chat(CHAT))).collect();
    world.gateway.saw(1).await;
    world.settle().await;
    applied(&world, &limits(1));
    assert_eq!(world.metric("weir_waiting_limit"), 1.0);
    assert_eq!(world.chat().await.code(), "queue_full");
    for seen in 1..=4 {
        world.gateway.saw(seen).await;
        world.gateway.go_on();
    }
    assert_eq!(statuses(&join_all(held).await), [200; 4]);
}

// Clients.

const BOTH: &str = "[clients.a]\nkey = \"ka\"\nrequests = { rate = \"1/min\", burst = 1 }\n[clients.b]\nkey = \"kb\"\n";

#[tokio::test(start_paused = true)]
async fn clients_come_and_go_and_change_their_keys_and_what_they_used_stays_used() {
    let world = World::new(&format!("{BOTH}[queue]\nmax_wait = \"0s\"\n"), |_| completion());
    let ask = async |key: &str| world.send(bearer(chat(CHAT), key)).await.status.as_u16();
    assert_eq!((ask("ka").await, ask("kb").await, ask("kc").await), (200, 200, 401));
    let rekeyed = BOTH.replace("\"ka\"", "\"kc\"").replace("clients.b", "clients.d");
    let changed = applied(&world, &format!("{rekeyed}[queue]\nmax_wait = \"0s\"\n"));
    assert!(changed.contains(&"clients.\"a\".key".to_owned()), "{changed:?}");
    assert_eq!((ask("ka").await, ask("kc").await, ask("kb").await), (401, 429, 200), "the burst is used up, by name");
    tokio::time::sleep(SECOND * 60).await;
    assert_eq!(ask("kc").await, 200);
    let of = |client| {
        world.metric(&format!(r#"weir_requests_total{{model="gpt-4.1-mini",client="{client}",outcome="ok"}}"#))
    };
    assert_eq!((of("a"), of("b"), of("d")), (2.0, 1.0, 1.0), "who is gone keeps its series");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_removed_is_served_to_the_end() {
    let world = World::new(&format!("{BOTH}[limits]\nconcurrency = 1\n"), |_| gated_stream());
    let stream = world.spawn(bearer(chat(CHAT), "kb"));
    world.gateway.saw(1).await;
    let waiter = world.spawn(bearer(chat(CHAT), "kb"));
    world.settle().await;
    applied(&world, "[clients.a]\nkey = \"ka\"\n[limits]\nconcurrency = 1\n");
    assert_eq!(world.send(bearer(chat(CHAT), "kb")).await.status, 401);
    world.gateway.go_on();
    assert!(stream.await.expect("answered").text().contains("two"));
    world.gateway.saw(2).await;
    world.gateway.go_on();
    assert_eq!(waiter.await.expect("answered").status, 200);
    world.assert_nothing_held();
}

// What is not a limit.

#[tokio::test(start_paused = true)]
async fn the_key_for_the_gateway_changes_for_requests_that_arrive_after_it() {
    let key = |key| format!("[upstream]\napi_key = \"{key}\"\n[limits]\nconcurrency = 1\n");
    let world = World::new(&key("sk-1"), |seen| if seen.number == 0 { gated_stream() } else { completion() });
    let under_way = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    let waiting = world.spawn(chat(CHAT));
    world.settle().await;
    assert_eq!(applied(&world, &key("sk-2")), ["upstream.api_key"]);
    let after = world.spawn(chat(CHAT));
    world.settle().await;
    world.gateway.go_on();
    assert_eq!(statuses(&join_all([under_way, waiting, after]).await), [200; 3]);
    let keys: Vec<String> = world.gateway.seen().iter().map(|seen| seen.header("authorization").concat()).collect();
    assert_eq!(keys, ["Bearer sk-1", "Bearer sk-1", "Bearer sk-2"], "a request sees one configuration");
}

#[tokio::test(start_paused = true)]
async fn timeouts_retries_and_sizes_change_for_requests_that_arrive_after_it() {
    let settings = |response, retries, body| {
        format!(
            "[timeouts]\nresponse = \"{response}\"\n[retry]\nmax_retries = {retries}\n[server]\nmax_body = \"{body}\"\n"
        )
    };
    let world = World::new(&settings("10s", 0, "1MiB"), |_| vec![Step::Stall]);
    let before = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    applied(&world, &settings("2s", 1, "1KiB"));
    let after = world.chat().await;
    assert_eq!((after.code().as_str(), after.header("x-weir-attempts")), ("response_timeout", "2"));
    assert!((4000..7000).contains(&world.elapsed()), "{}", world.elapsed());
    assert_eq!(world.send(chat(&format!("{{\"x\":\"{}\"}}", "x".repeat(2000)))).await.status, 413);
    let before = before.await.expect("answered");
    assert_eq!((before.header("x-weir-attempts"), world.elapsed()), ("1", 10_000));
}

#[tokio::test(start_paused = true)]
async fn quotas_that_are_new_are_told_to_clients() {
    let world = World::new("", |_| completion());
    assert_eq!(world.chat().await.header("x-ratelimit-limit-requests"), "");
    applied(&world, "[limits]\nrequests = \"600/min\"\n");
    assert_eq!(world.chat().await.header("x-ratelimit-limit-requests"), "600");
    applied(&world, "");
    assert_eq!(world.chat().await.header("x-ratelimit-limit-requests"), "");
}

#[tokio::test(start_paused = true)]
async fn what_a_lane_has_learned_outlives_a_reload() {
    let refused = crate::gateway::answer(429, &[("retry-after", "30")], "{}");
    let world = World::new("", move |seen| if seen.number == 0 { refused.clone() } else { completion() });
    let first = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    world.settle().await;
    applied(&world, "[limits]\nrequests = \"600/min\"\n[timeouts]\nidle = \"1min\"\n");
    assert_eq!(world.send(with(chat(CHAT), "x-stainless-read-timeout", "10")).await.status, 429);
    assert_eq!((first.await.expect("answered").status.as_u16(), world.elapsed()), (200, 30_000));
}

// Whole or not at all.

#[tokio::test(start_paused = true)]
async fn what_needs_a_restart_is_named_and_nothing_is_changed() {
    let world = World::new("[limits]\nrequests = { rate = \"1/min\", burst = 1 }\n", |_| completion());
    let refused = world.reload(
        "[server]\nlisten = \"127.0.0.1:8081\"\n[upstream]\nbase_url = \"https://other.test/v1\"\n[queue]\nmax_wait = \"1s\"\n",
    );
    let refused = refused.expect_err("two options need a restart");
    for words in ["restart", "server.listen = \"127.0.0.1:8081\" (was ", "upstream.base_url = "] {
        assert!(refused.contains(words), "{refused}");
    }
    assert!(!refused.contains("max_wait"), "{refused}");
    let waiting = [(); 2].map(|()| world.spawn(chat(CHAT)));
    assert_eq!(statuses(&join_all(waiting).await), [200, 200], "who waits a minute is not refused");
    assert_eq!(world.times(), [0, 60_000], "the limit is still there");
}

#[tokio::test(start_paused = true)]
async fn a_reload_of_the_same_changes_nothing() {
    let config = "[limits]\nrequests = { rate = \"10/s\", burst = 2 }\n[clients.a]\nkey = \"ka\"\n";
    let world = World::new(config, |_| completion());
    let sent: Vec<_> = (0..6).map(|_| world.spawn(bearer(chat(CHAT), "ka"))).collect();
    for _ in 0..10 {
        assert!(applied(&world, config).is_empty());
        tokio::time::sleep(SECOND / 20).await;
    }
    join_all(sent).await;
    assert_eq!(world.times(), [0, 0, 100, 200, 300, 400]);
}

// The file.

#[tokio::test(start_paused = true)]
async fn a_file_that_cannot_be_read_for_now_is_not_waited_for_for_ever_and_changes_nothing_later() {
    // To open a pipe is to wait until somebody writes to it, as on a disk that hangs.
    let pipe = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("reload-{}.pipe", std::process::id()));
    let _ = std::fs::remove_file(&pipe);
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("there is a mkfifo").success());
    let world = World::new("[limits]\nconcurrency = 1\n", |_| completion());
    let source = Source { file: Some(pipe.clone()), on_applied: None };
    let reloader = Reloader::new(world.proxy.for_another_worker(), None, source);
    // The second one waits for its turn, which the thread that hangs has.
    let both = tokio::join!(reloader.reload_file(), reloader.reload_file());
    assert_eq!((both.0, both.1, world.elapsed()), (slow(&pipe), slow(&pipe), 10_000));
    let said = slow(&pipe).expect_err("it is slow").to_string();
    assert!(said.contains("10 s") && said.contains("Nothing has changed"), "{said}");
    assert_eq!(world.metric("weir_reloads_total{result=\"refused\"}"), 2.0);
    // Now it can be read, and nobody waits for it any more.
    std::fs::write(&pipe, "[limits]\nconcurrency = 2\n").expect("it is read");
    std::fs::remove_file(&pipe).expect("it is there");
    std::fs::write(&pipe, "[limits]\nconcurrency = 3\n").expect("a folder of the tests");
    tokio::time::resume();
    let report = reloader.reload_file().await.expect("its turn has come");
    assert_eq!(report.changes.len(), 2, "the first time is over: {report}");
    assert!(report.to_string().contains("limits.concurrency = 3 (was 1)"), "{report}");
}

fn slow(file: &Path) -> Result<Report, NotReloaded> {
    Err(NotReloaded::Slow(file.to_owned()))
}
