//! Whoever shares a quota with a greedy client gets its share of it all the same; and a client's own limits are its own.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio::task::JoinHandle;

use crate::gateway::{Step, completion, costs};
use crate::world::{Answer, CHAT, World, bearer, chat, costing, join_all, with};

/// One a second.
const SLOW: &str = "[limits]\nrequests = { rate = \"1/s\", burst = 1 }\nconcurrency = 100\n";

/// A configuration with the clients a and b, of which a has these settings.
fn two_clients(of_a: &str, rest: &str) -> String {
    format!("{rest}\n[clients.a]\nkey = \"sk-a\"\n{of_a}\n[clients.b]\nkey = \"sk-b\"\n")
}

/// A request of this client's, which the gateway knows by its name.
fn of(client: &str, request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
    with(bearer(request, &format!("sk-{client}")), "x-test-who", client)
}

/// So many chats of a client's at once, in line before anything else happens.
async fn batch(world: &World, client: &str, count: usize) -> Vec<JoinHandle<Answer>> {
    let batch = (0..count).map(|_| world.spawn(of(client, chat(CHAT)))).collect();
    world.settle().await;
    batch
}

/// Whose requests have reached the gateway, in order.
fn served(world: &World) -> String {
    let who = |seen: &crate::gateway::Seen| seen.header("x-test-who").concat();
    world.gateway.seen().iter().map(who).collect()
}

#[track_caller]
fn assert_refused(refused: &Answer, status: u16, kind: &str, code: &str, by: &str) {
    assert_eq!((refused.status.as_u16(), refused.code()), (status, code.to_owned()), "{}", refused.text());
    assert!(refused.text().contains(&format!(r#""type":"{kind}""#)), "{}", refused.text());
    assert_eq!(refused.header("x-weir-refused-by"), by);
    let hint: u64 = refused.header("retry-after-ms").parse().expect("a hint");
    assert!(hint > 0);
}

// A client's own limits.

#[tokio::test(start_paused = true)]
async fn a_clients_own_requests_and_tokens_refuse_it_and_nobody_else() {
    let limits = [
        ("requests = { rate = \"1/min\", burst = 1 }", "requests"),
        ("tokens = { rate = \"100/min\", burst = 100 }", "tokens"),
    ];
    for (limit, word) in limits {
        let world = World::new(&two_clients(&format!("{limit}\nmax_wait = \"1s\""), ""), |_| costs(50, 50));
        assert_eq!(world.send(of("a", costing(50, 50))).await.status, 200);
        let refused = world.send(of("a", costing(50, 50))).await;
        assert_refused(&refused, 429, word, "rate_limit_exceeded", &format!("{word}; client"));
        assert_eq!((refused.header("retry-after-ms"), refused.header("retry-after")), ("59000", "59"));
        assert_eq!(refused.header(&format!("x-ratelimit-remaining-{word}")), "0");
        for _ in 0..5 {
            assert_eq!(world.send(of("b", costing(50, 50))).await.status, 200);
        }
        assert_eq!(world.elapsed(), 0);
        assert_eq!(world.remaining(("client", "a", word)), 0.0);
        let counted = format!(r#"weir_refused_total{{model="gpt-4.1-mini",client="a",reason="{word}"}}"#);
        assert_eq!(world.metric(&counted), 1.0);
        tokio::time::sleep(Duration::from_secs(59)).await;
        assert_eq!(world.send(of("a", costing(50, 50))).await.status, 200, "who comes back when told is served");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn a_clients_own_slots_are_its_own() {
    let of_a = "concurrency = 2\nmax_wait = \"3s\"";
    let world =
        World::new(&two_clients(of_a, "[limits]\nconcurrency = 100"), |_| [vec![Step::Gate], completion()].concat());
    let held = batch(&world, "a", 2).await;
    let refused = world.send(of("a", chat(CHAT))).await;
    assert_refused(&refused, 429, "concurrency", "rate_limit_exceeded", "concurrency; client");
    assert_eq!(world.elapsed(), 3000);
    let others = batch(&world, "b", 20).await;
    world.gateway.saw(22).await;
    assert_eq!(world.remaining(("client", "a", "concurrency")), 0.0);
    let waiter = world.spawn(of("a", chat(CHAT)));
    world.settle().await;
    world.gateway.go_on();
    join_all(held.into_iter().chain(others)).await;
    world.gateway.saw(23).await;
    waiter.abort();
    world.settle().await;
    world.assert_nothing_held();
    assert_eq!(world.remaining(("client", "a", "concurrency")), 2.0);
}

#[tokio::test(start_paused = true)]
async fn a_clients_max_wait_is_its_own() {
    let world = World::new(&two_clients("max_wait = \"2s\"", SLOW), |_| completion());
    let backlog = batch(&world, "b", 10).await;
    let waits = batch(&world, "a", 3).await;
    let answers = join_all(waits).await;
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status.as_u16()).collect();
    assert!(statuses.contains(&429), "{statuses:?}");
    assert_eq!(statuses[0], 200, "its share is within 2 s");
    assert!(world.elapsed() <= 2000, "nobody waits longer");
    assert!(join_all(backlog).await.iter().all(|answer| answer.status == 200));
}

// Shares.

#[tokio::test(start_paused = true)]
async fn who_has_the_weight_of_three_gets_three_times_the_tokens() {
    let limits = "[limits]\ntokens = { rate = \"100/s\", burst = 100 }\nconcurrency = 100\n";
    for output in [50, 10] {
        // What an answer does not use comes back; shares go by what was used.
        let world = World::new(&two_clients("weight = 3", limits), move |_| costs(50, output));
        let begin =
            |client: &'static str| (0..60).map(|_| world.spawn(of(client, costing(50, 50)))).collect::<Vec<_>>();
        let (a, b) = (begin("a"), begin("b"));
        world.gateway.saw(41).await;
        let served: String = served(&world).chars().skip(1).take(40).collect();
        let of_a = served.matches('a').count();
        assert!((29..=31).contains(&of_a), "{of_a} of 40: {served}");
        assert!(join_all(a.into_iter().chain(b)).await.iter().all(|answer| answer.status == 200));
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_count_for_a_share_and_not_requests() {
    let limits = "[limits]\ntokens = { rate = \"1000/s\", burst = 1000 }\nconcurrency = 100\n";
    let world = World::new(&two_clients("", limits), |seen| costs(seen.body.len() as u64 / 4, 50));
    let large: Vec<_> = (0..20).map(|_| world.spawn(of("a", costing(450, 50)))).collect();
    let small: Vec<_> = (0..100).map(|_| world.spawn(of("b", costing(50, 50)))).collect();
    world.gateway.saw(50).await;
    let (of_a, of_b) = (served(&world).matches('a').count(), served(&world).matches('b').count());
    assert!((of_a * 5).abs_diff(of_b) <= 15, "{of_a} of 500 tokens, {of_b} of 100: {}", served(&world));
    assert!(join_all(large.into_iter().chain(small)).await.iter().all(|answer| answer.status == 200));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn where_weir_lends_its_key_each_address_has_a_share() {
    let world = World::new(&format!("[upstream]\napi_key = \"sk-up\"\n{SLOW}"), |_| completion());
    let (greedy, modest) = (world.seen_from("10.0.0.1"), world.seen_from("10.0.0.2"));
    let backlog = batch(&greedy, "a", 20).await;
    let neighbour = batch(&greedy, "c", 1).await;
    assert_eq!(modest.send(of("b", chat(CHAT))).await.status, 200);
    assert!(world.elapsed() <= 2000, "{}", served(&world));
    join_all(backlog.into_iter().chain(neighbour)).await;
    assert!(served(&world).ends_with('c'), "whatever key it sends: {}", served(&world));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn where_keys_pass_through_each_that_was_served_has_a_share_and_the_others_have_one_together() {
    let world = World::new(SLOW, |_| completion());
    for proven in ["a", "b"] {
        assert_eq!(world.send(of(proven, chat(CHAT))).await.status, 200);
    }
    let backlogs = [batch(&world, "a", 10).await, batch(&world, "x", 10).await];
    let begun = world.gateway.seen().len();
    let others = [batch(&world, "y", 1).await, batch(&world, "b", 1).await];
    join_all(backlogs.into_iter().chain(others).flatten()).await;
    let served = served(&world).split_off(begun);
    assert!(served.find('b').expect("served") <= 2, "{served}");
    assert!(served.rfind('x') < served.find('y'), "one share for all who could make up another key: {served}");
    let first_eight = &served[..8];
    assert!(first_eight.matches('x').count() >= 3 && first_eight.matches('a').count() >= 3, "{served}");
    world.assert_nothing_held();
}

// A full queue.

#[tokio::test(start_paused = true)]
async fn a_queue_that_one_fills_has_room_for_another() {
    let world = World::new(&two_clients("", &format!("{SLOW}[queue]\nmax_waiting = 10\n")), |_| completion());
    let mut greedy = batch(&world, "a", 11).await;
    assert_eq!(world.in_flight_and_waiting(), (0.0, 10.0));
    assert_refused(&world.send(of("a", chat(CHAT))).await, 503, "overloaded", "queue_full", "queue; global");
    let modest = world.spawn(of("b", chat(CHAT)));
    let last = greedy.pop().expect("the last of eleven").await.expect("answered");
    assert_refused(&last, 503, "overloaded", "queue_full", "queue; global");
    assert_eq!((world.elapsed(), last.header("x-weir-attempts")), (0, "0"));
    assert_eq!(modest.await.expect("answered").status, 200);
    assert!(world.elapsed() <= 2000, "{}", world.elapsed());
    assert!(join_all(greedy).await.iter().all(|answer| answer.status == 200));
    assert_eq!(world.metric(r#"weir_refused_total{model="gpt-4.1-mini",client="a",reason="queue"}"#), 2.0);
    assert_eq!(world.metric_sum("weir_refused_total", "client=\"b\""), 0.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_waits_is_displaced_by_nobody() {
    let fails_first = |seen: &crate::gateway::Seen| match seen.number {
        0 => crate::gateway::error(503, &[("retry-after-ms", "10")]),
        _ => completion(),
    };
    let world = World::new(&two_clients("", &format!("{SLOW}[queue]\nmax_waiting = 1\n")), fails_first);
    let retried = batch(&world, "a", 1).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let refused = world.send(of("b", chat(CHAT))).await;
    assert_eq!(
        (refused.status.as_u16(), refused.code()),
        (503, "queue_full".to_owned()),
        "a retry is displaced by nobody"
    );
    assert!(join_all(retried).await.iter().all(|answer| answer.status == 200));
}

// Observe mode.

/// So that no lane has to find out how many the gateway takes.
const SLOTS: &str = "[limits]\nconcurrency = 1000\n";

#[tokio::test(start_paused = true)]
async fn limits_that_only_observe_count_and_hold_nobody_up() {
    let limits = "requests = { rate = \"1/min\", burst = 1 }\ntokens = { rate = \"100/min\", burst = 100 }\n\
                  concurrency = 2\nmode = \"observe\"\n";
    let configs = [
        (("global", ""), format!("[limits]\n{limits}{}", two_clients("", ""))),
        (("model", "gpt-4.1-mini"), two_clients("", &format!("{SLOTS}[models.\"gpt-4.1-mini\"]\n{limits}"))),
        (("client", "a"), two_clients(limits, SLOTS)),
    ];
    for ((scope, name), config) in configs {
        let world = World::new(&format!("[queue]\nmax_wait = \"1s\"\n{config}"), |_| {
            [vec![Step::Gate], costs(50, 50)].concat()
        });
        let batch: Vec<_> = (0..8).map(|_| world.spawn(of("a", costing(50, 50)))).collect();
        world.gateway.saw(8).await;
        assert_eq!(world.in_flight_and_waiting(), (8.0, 0.0), "{scope}");
        let remaining = |unit| world.remaining((scope, name, unit));
        assert_eq!(["requests", "tokens", "concurrency"].map(remaining), [0.0; 3], "{scope}");
        world.gateway.go_on();
        for answer in join_all(batch).await {
            assert_eq!((answer.status.as_u16(), answer.header("x-ratelimit-limit-requests")), (200, ""), "{scope}");
        }
        assert_eq!((world.elapsed(), world.metric_sum("weir_refused_total", "")), (0, 0.0), "{scope}");
        for reason in ["requests", "tokens"] {
            let observed = world.metric_sum("weir_observed_total", &format!("reason=\"{reason}\""));
            assert_eq!(observed, 7.0, "{scope}, {reason}");
        }
        assert_eq!(remaining("concurrency"), 2.0, "{scope}: slots come back");
        world.assert_nothing_held();
    }
}

#[tokio::test(start_paused = true)]
async fn an_observed_limit_beside_an_enforced_one_changes_nothing_about_that() {
    let config = two_clients("requests = { rate = \"1/day\", burst = 1 }\nmode = \"observe\"", SLOW);
    let world = World::new(&config, |_| completion());
    let answers = join_all(batch(&world, "a", 4).await).await;
    assert!(
        answers.iter().all(|answer| answer.header("x-ratelimit-limit-requests") == "1"),
        "what is enforced is told"
    );
    assert_eq!(world.times(), [0, 1000, 2000, 3000]);
    assert_eq!(world.metric_sum("weir_observed_total", "client=\"a\""), 3.0);
}
