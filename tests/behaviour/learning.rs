//! What one attempt hears of the gateway all others of its lane heed: they wait as long as it asks, one of them looks whether it
//! is back, and where quotas are told nobody runs into them.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::gateway::{Seen, Step, answer, completion, error};
use crate::world::{Answer, CHAT, World, bearer, chat, join_all};

const OTHER_MODEL: &str = r#"{"model":"deepseek-chat","messages":[{"role":"user","content":"hello"}]}"#;

const LACK_OF_MONEY: &str = r#"{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","code":"insufficient_quota"}}"#;

const COOLDOWN: &str = r#"weir_cooldown_seconds{model="gpt-4.1-mini"}"#;
const LIMIT: &str = r#"weir_concurrency_limit{model="gpt-4.1-mini"}"#;

fn statuses(answers: &[Answer]) -> Vec<u16> {
    answers.iter().map(|answer| answer.status.as_u16()).collect()
}

/// A gateway that fails until so long after its first request.
fn down_for(outage: Duration) -> impl Fn(&Seen) -> Vec<Step> + Send + Sync {
    let begun: Mutex<Option<Instant>> = Mutex::new(None);
    move |seen: &Seen| {
        let begun = *begun.lock().expect("no test panics here").get_or_insert(seen.at);
        if seen.at - begun < outage { error(503, &[]) } else { completion() }
    }
}

/// A gateway that tells of its quota of requests, and keeps to it.
fn telling(rate: f64, burst: f64) -> impl Fn(&Seen) -> Vec<Step> + Send + Sync {
    let state: Mutex<Option<(f64, Instant)>> = Mutex::new(None);
    move |seen: &Seen| {
        let mut state = state.lock().expect("no test panics here");
        let (level, at) = state.unwrap_or((burst, seen.at));
        let level = (level + (seen.at - at).as_secs_f64() * rate).min(burst);
        let passes = level >= 1.0;
        let left = if passes { level - 1.0 } else { level };
        *state = Some((left, seen.at));
        let (limit, remaining) = (format!("{burst}"), format!("{}", left.floor()));
        let reset = format!("{}ms", ((burst - left) / rate * 1000.0).round());
        let headers = [
            ("x-ratelimit-limit-requests", limit.as_str()),
            ("x-ratelimit-remaining-requests", &remaining),
            ("x-ratelimit-reset-requests", &reset),
        ];
        if passes { answer(200, &headers, r#"{"choices":[]}"#) } else { error(429, &headers) }
    }
}

#[tokio::test(start_paused = true)]
async fn one_hint_holds_the_whole_lane_and_no_other() {
    let script = |seen: &Seen| if seen.number == 0 { error(429, &[("retry-after", "5")]) } else { completion() };
    let world = World::new("[models.deepseek-chat]\n", script);
    let mut lane = vec![world.spawn(chat(CHAT))];
    world.gateway.saw(1).await;
    world.settle().await;
    lane.extend((0..20).map(|_| world.spawn(chat(CHAT))));
    let others = [world.spawn(bearer(chat(CHAT), "another")), world.spawn(chat(OTHER_MODEL))];
    let others = join_all(others).await;
    assert_eq!((statuses(&others), world.elapsed()), (vec![200, 200], 0), "another key, another model");
    assert!(statuses(&join_all(lane).await).iter().all(|status| *status == 200));
    let times = world.times();
    assert_eq!(times[..3], [0, 0, 0]);
    assert!(times[3..].iter().all(|at| *at >= 5000), "{times:?}");
    assert_eq!((world.gateway.seen().len(), world.attempts("429")), (24, 1.0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn after_a_hint_one_looks_before_the_others_go() {
    let script = |seen: &Seen| if seen.number < 4 { error(429, &[("retry-after", "2")]) } else { completion() };
    let world = World::new("", script);
    let first = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    world.settle().await;
    let waiting: Vec<_> = (0..10).map(|_| world.spawn(chat(CHAT))).collect();
    assert_eq!(first.await.expect("answered").status, 200);
    assert!(statuses(&join_all(waiting).await).iter().all(|status| *status == 200));
    let times = world.times();
    assert_eq!(times.iter().filter(|at| **at < 8000).count(), 4, "{times:?}");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn who_looks_for_others_and_is_refused_ten_times_is_served_all_the_same() {
    let script = |seen: &Seen| if seen.number <= 10 { error(429, &[("retry-after", "1")]) } else { completion() };
    let world = World::new("", script);
    let first = world.spawn(chat(&CHAT.replace("hello", "the first")));
    world.gateway.saw(1).await;
    world.settle().await;
    let second = world.spawn(chat(CHAT));
    let answers = join_all([first, second]).await;
    assert_eq!(statuses(&answers), [200, 200]);
    let seen = world.gateway.seen();
    let by_first = seen.iter().filter(|seen| String::from_utf8_lossy(&seen.body).contains("the first")).count();
    assert_eq!((by_first, seen.len()), (12, 13), "the first in line looks");
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn an_outage_costs_few_attempts_and_nobody_an_answer() {
    let world = World::new("", down_for(Duration::from_secs(20)));
    let answers = join_all((0..50).map(|_| world.spawn(chat(CHAT)))).await;
    assert!(statuses(&answers).iter().all(|status| *status == 200), "{:?}", statuses(&answers));
    let times = world.times();
    let during = times.iter().filter(|at| **at < 20_000).count();
    assert!(during <= 40, "{during} attempts in an outage of 20 s: {times:?}");
    assert!(world.elapsed() <= 23_000, "it is over {} ms after the first request", world.elapsed());
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn after_give_up_nobody_waits_any_more() {
    let world = World::new("[breaker]\ngive_up = \"5s\"\n", down_for(Duration::from_secs(3600)));
    let waiting = (0..30).map(|_| {
        let world = world.clone();
        tokio::spawn(async move { (world.chat().await, world.elapsed()) })
    });
    let answers = join_all(waiting).await;
    let turned_away = answers.iter().filter(|(answer, _)| answer.header("x-weir-attempts") == "0");
    let turned_away: Vec<&Answer> = turned_away
        .map(|(answer, at)| {
            assert!((4900..=5500).contains(at), "turned away after {at} ms");
            answer
        })
        .collect();
    assert!(turned_away.len() >= 10, "{} of 30 were never sent", turned_away.len());
    let newcomer = world.chat().await;
    for answer in turned_away.into_iter().chain([&newcomer]) {
        assert_eq!((answer.status.as_u16(), answer.code()), (503, "upstream_unavailable".to_owned()));
        assert!(answer.header("x-weir-refused-by").starts_with("breaker; "), "{:?}", answer.headers);
        let hint: u64 = answer.header("retry-after-ms").parse().expect("a hint");
        assert!(hint > 0, "{:?}", answer.headers);
        assert_eq!(answer.header("retry-after"), hint.div_ceil(1000).to_string());
    }
    // Whoever comes first when a probe is due is it.
    let hint: u64 = newcomer.header("retry-after-ms").parse().expect("a hint");
    let seen = world.gateway.seen().len();
    assert!(hint <= 2500, "there is a probe each second, and the refused do not come back all at once: {hint}");
    tokio::time::sleep(Duration::from_millis(hint)).await;
    world.chat().await;
    assert!(world.gateway.seen().len() > seen);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn once_given_up_a_gateway_that_is_back_is_found_by_newcomers() {
    let world = World::new("[breaker]\ngive_up = \"5s\"\n", down_for(Duration::from_secs(60)));
    join_all((0..30).map(|_| world.spawn(chat(CHAT)))).await;
    while world.elapsed() < 62_000 {
        world.chat().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let answers = join_all((0..30).map(|_| world.spawn(chat(CHAT)))).await;
    assert!(statuses(&answers).iter().all(|status| *status == 200), "{:?}", statuses(&answers));
    assert!(world.elapsed() <= 64_000, "{}", world.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_lack_of_money_is_one_requests_own() {
    let script = |seen: &Seen| match seen.number {
        0..3 => answer(429, &[("retry-after", "60")], LACK_OF_MONEY),
        _ => completion(),
    };
    let world = World::new("", script);
    for status in [429, 429, 429, 200, 200] {
        assert_eq!(world.chat().await.status, status);
    }
    assert_eq!((world.elapsed(), world.metric(COOLDOWN)), (0, 0.0));
}

#[tokio::test(start_paused = true)]
async fn a_quota_that_is_told_is_never_run_into() {
    let world = World::new("", telling(5.0, 10.0));
    let answers = join_all((0..60).map(|_| world.spawn(chat(CHAT)))).await;
    assert!(statuses(&answers).iter().all(|status| *status == 200), "{:?}", statuses(&answers));
    assert_eq!((world.gateway.seen().len(), world.attempts("429")), (60, 0.0));
    assert!((10_000..=12_000).contains(&world.elapsed()), "and used: {} ms", world.elapsed());
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_closed_lane_and_its_slots_are_seen_in_the_metrics() {
    let script = |seen: &Seen| if seen.number == 0 { error(429, &[("retry-after", "5")]) } else { completion() };
    let world = World::new("", script);
    assert_eq!(world.metric(COOLDOWN), 0.0);
    let first = world.spawn(chat(CHAT));
    world.gateway.saw(1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.metric(COOLDOWN), 4.0);
    assert_eq!(first.await.expect("answered").status, 200);
    assert_eq!(world.metric(COOLDOWN), 0.0);
}

#[tokio::test(start_paused = true)]
async fn slots_grow_while_all_are_taken_and_nobody_is_refused() {
    let world = World::new("", |_| [vec![Step::Wait(Duration::from_secs(1))], completion()].concat());
    assert_eq!(world.chat().await.status, 200);
    assert_eq!(world.metric(LIMIT), 10.0);
    join_all((0..5).map(|_| world.spawn(chat(CHAT)))).await;
    assert_eq!(world.metric(LIMIT), 10.0, "not while five are enough");
    let before = world.elapsed();
    join_all((0..300).map(|_| world.spawn(chat(CHAT)))).await;
    assert!(world.metric(LIMIT) >= 40.0, "{}", world.metric(LIMIT));
    assert!(world.elapsed() - before < 10_000, "with ten slots it would have taken half a minute");
}

#[tokio::test(start_paused = true)]
async fn a_cap_is_found_and_kept_to() {
    // The gateway takes twenty at once, and refuses more without saying for how long.
    let busy = Mutex::new(Vec::<Instant>::new());
    let script = move |seen: &Seen| {
        let mut busy = busy.lock().expect("no test panics here");
        busy.retain(|until| *until > seen.at);
        if busy.len() >= 20 {
            return error(429, &[]);
        }
        busy.push(seen.at + Duration::from_secs(2));
        [vec![Step::Wait(Duration::from_secs(2))], completion()].concat()
    };
    let world = World::new("", script);
    let answers = join_all((0..400).map(|_| world.spawn(chat(CHAT)))).await;
    assert!(statuses(&answers).iter().all(|status| *status == 200));
    assert!(world.attempts("429") <= 40.0, "{} refused of 400", world.attempts("429"));
    assert!(world.elapsed() <= 60_000, "{} ms, where 40 s are the least", world.elapsed());
}
