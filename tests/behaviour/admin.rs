//! What operators see: the status page's data, what a next request would meet, metrics, and who may look.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request};
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use weir::admin::Admin;
use weir::clients::ClientId;
use weir::config::Address;
use weir::metrics::Outcome;
use weir::reload::{Reloader, Source};
use weir::server::Workers;

use crate::gateway::{Seen, Step, answer, completion, error, event, stream_head};
use crate::world::{Answer, CHAT, STREAM, World, bearer, chat, collect, join_all, request, with};

const TWO_CLIENTS: &str = "[clients.batch]\nkey = \"sk-own-batch\"\nconcurrency = 1\nweight = 2\n\
                           [clients.bot]\nkey = \"sk-own-bot\"\nmax_wait = \"20s\"\n";

/// The operators' listener of a world.
struct Operators(Arc<Admin>);

impl Operators {
    /// On loopback, as by default.
    fn of(world: &World) -> Self {
        Self::at(world, "127.0.0.1:9090")
    }

    fn at(world: &World, address: &str) -> Self {
        let settings = weir::config::Config::default().server;
        let workers = Workers::start(1, &world.proxy, &settings).expect("a thread can be started");
        let reloader = Reloader::new(world.proxy.for_another_worker(), None, Source::default());
        let address = Address::parse(address).expect("an address");
        Self(Admin::new(world.proxy.for_another_worker(), Arc::new(workers), reloader, &address))
    }

    /// An answer, on a connection of its own.
    async fn ask(&self, request: Request<Full<Bytes>>) -> Answer {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        tokio::spawn(self.0.clone().serve_connection(theirs));
        let (mut sender, connection) = http1::handshake(TokioIo::new(ours)).await.expect("weir speaks HTTP");
        tokio::spawn(connection);
        collect(sender.send_request(request).await.expect("weir answers everything")).await
    }

    async fn get(&self, target: &str) -> Answer {
        self.ask(ask(Method::GET, target)).await
    }

    async fn json(&self, target: &str) -> Value {
        let answer = self.get(target).await;
        assert_eq!((answer.status.as_u16(), answer.header("content-type")), (200, "application/json"), "{target}");
        let text = answer.text();
        // The whole of it, so that no test has to think of it: nothing of anyone's key.
        assert!(!text.contains("sk-own"), "{text}");
        serde_json::from_str(&text).expect("JSON")
    }

    async fn status(&self) -> Value {
        self.json("/status.json").await
    }
}

/// A request as an operator on this machine sends it.
fn ask(method: Method, target: &str) -> Request<Full<Bytes>> {
    let mut request = request(method, target, "");
    request.headers_mut().insert("host", HeaderValue::from_static("127.0.0.1:9090"));
    request
}

/// The row of this name.
#[track_caller]
fn row<'v>(rows: &'v Value, name: &str) -> &'v Value {
    let found = rows.as_array().expect("a list").iter().find(|row| row["name"] == name);
    found.unwrap_or_else(|| panic!("{name} is not in {rows:#}"))
}

/// The limit of this unit and source.
#[track_caller]
fn limit<'v>(limits: &'v Value, unit: &str, source: &str) -> &'v Value {
    let found = limits.as_array().expect("a list").iter().find(|it| it["unit"] == unit && it["source"] == source);
    found.unwrap_or_else(|| panic!("no {source} limit of {unit} in {limits:#}"))
}

fn gated(_: &Seen) -> Vec<Step> {
    [vec![Step::Gate], completion()].concat()
}

// Who waits for what, and whose limit it is.

#[tokio::test(start_paused = true)]
async fn the_status_says_who_waits_for_what_and_whose_limit_it_is() {
    let config = format!("[models.\"gpt-4.1-mini\"]\nconcurrency = 3\n{TWO_CLIENTS}");
    let world = World::new(&config, gated);
    let operators = Operators::of(&world);
    let _batch: Vec<_> = (0..5).map(|_| world.spawn(bearer(chat(CHAT), "sk-own-batch"))).collect();
    world.settle().await;
    let _bot: Vec<_> = (0..4).map(|_| world.spawn(bearer(chat(CHAT), "sk-own-bot"))).collect();
    world.gateway.saw(3).await;
    tokio::time::sleep(Duration::from_secs(7)).await;

    let status = operators.status().await;
    assert_eq!((&status["now"]["in_flight"], &status["now"]["waiting"]), (&3.into(), &6.into()));
    let groups = status["queue"]["groups"].as_array().expect("a list");
    let told: Vec<_> = groups
        .iter()
        .map(|group| {
            let held = &group["held_by"];
            (
                group["client"].as_str(),
                group["waiting"].as_u64(),
                held["scope"].as_str(),
                held["name"].as_str(),
                held["whose"].as_str(),
            )
        })
        .collect();
    let expected = [
        (Some("batch"), Some(4), Some("client"), Some("batch"), Some("configuration")),
        (Some("bot"), Some(2), Some("model"), Some("gpt-4.1-mini"), Some("configuration")),
    ];
    assert_eq!(told, expected, "{:#}", status["queue"]);
    for group in groups {
        assert_eq!((&group["held_by"]["what"], &group["model"]), (&"concurrency".into(), &"gpt-4.1-mini".into()));
        assert!((6.9..7.3).contains(&group["oldest_seconds"].as_f64().expect("a number")), "{group:#}");
        assert!(group["expected_wait_seconds"].as_f64() > Some(0.0), "{group:#}");
    }
    assert_eq!(status["queue"]["not_listed"], 0);

    let model = row(&status["models"], "gpt-4.1-mini");
    assert_eq!((&model["in_flight"], &model["waiting"], &model["in_flight_limit"]), (&3.into(), &6.into(), &3.into()));
    let slots = limit(&model["limits"], "concurrency", "configured");
    assert_eq!((&slots["used"], &slots["capacity"], &slots["waiting"]), (&3.0.into(), &3.0.into(), &2.into()));
    let batch = row(&status["clients"], "batch");
    assert_eq!((&batch["in_flight"], &batch["waiting"], &batch["weight"]), (&1.into(), &4.into(), &2.0.into()));
    assert_eq!(limit(&batch["limits"], "concurrency", "configured")["waiting"], 4);
    let bot = row(&status["clients"], "bot");
    assert_eq!((&bot["in_flight"], &bot["waiting"]), (&2.into(), &2.into()));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_a_reload_removes_is_listed_for_as_long_as_anything_of_its_is_under_way() {
    let world = World::new(&format!("[limits]\nconcurrency = 2\n{TWO_CLIENTS}"), gated);
    let operators = Operators::of(&world);
    let of_bot: Vec<_> = (0..3).map(|_| world.spawn(bearer(chat(CHAT), "sk-own-bot"))).collect();
    world.gateway.saw(2).await;
    world.settle().await;
    for without in ["[clients.batch]\nkey = \"sk-own-batch\"\n", ""] {
        world.reload(&format!("[limits]\nconcurrency = 2\n{without}")).expect("it can change live");
        let status = operators.status().await;
        let bot = row(&status["clients"], "bot");
        assert_eq!((&bot["in_flight"], &bot["waiting"]), (&2.into(), &1.into()), "{bot:#}");
        assert_eq!(status["queue"]["groups"][0]["client"], "bot");
        let rows = status["clients"].as_array().expect("a list");
        let others: u64 =
            rows.iter().filter(|row| row["name"] != "bot").filter_map(|row| row["in_flight"].as_u64()).sum();
        assert_eq!((others, &status["now"]["in_flight"]), (0, &2.into()), "nobody is counted twice: {rows:#?}");
    }
    world.gateway.go_on();
    world.gateway.saw(3).await;
    world.settle().await;
    world.gateway.go_on();
    for answer in join_all(of_bot).await {
        assert_eq!(answer.status, 200);
    }
    let status = operators.status().await;
    assert!(status["clients"].as_array().expect("a list").iter().all(|row| row["name"] != "bot"), "{status:#}");
    let counted = r#"weir_requests_total{model="gpt-4.1-mini",client="bot",outcome="ok"}"#;
    assert_eq!(world.metric(counted), 3.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn clients_with_keys_of_their_own_are_counted_and_their_keys_not_shown() {
    let world =
        World::new("[limits]\nconcurrency = 2\n", |seen| if seen.number < 4 { completion() } else { gated(seen) });
    let operators = Operators::of(&world);
    let ask = |key: usize| world.spawn(bearer(chat(CHAT), &format!("sk-own-{key}")));
    join_all((0..4).map(ask)).await;
    let _waiting: Vec<_> = (0..8).map(|n| ask(n % 4)).collect();
    world.gateway.saw(6).await;
    world.settle().await;
    let status = operators.status().await;
    let group = &status["queue"]["groups"][0];
    assert_eq!((&group["client_kind"], &group["waiting"]), (&"keys".into(), &6.into()), "{group:#}");
    assert!(group["tenants"].as_u64() >= Some(2), "{group:#}");
    assert_eq!(row(&status["models"], "gpt-4.1-mini")["lanes"], 4);
    let explained = operators.json("/explain?model=gpt-4.1-mini").await;
    assert_eq!(explained["lanes"].as_array().map(Vec::len), Some(4), "{explained:#}");
}

#[tokio::test(start_paused = true)]
async fn a_pause_that_the_gateway_has_asked_for_is_told_as_the_gateways() {
    let script = |seen: &Seen| if seen.number == 0 { error(429, &[("retry-after", "30")]) } else { completion() };
    let world = World::new("", script);
    let operators = Operators::of(&world);
    let waiting: Vec<_> = (0..3).map(|_| world.spawn(chat(CHAT))).collect();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let status = operators.status().await;
    let model = row(&status["models"], "gpt-4.1-mini");
    assert_eq!(model["cool_down"]["why"], "quota");
    assert!((24.0..=25.1).contains(&model["cool_down"]["seconds"].as_f64().expect("a number")), "{model:#}");
    let held = &status["queue"]["groups"][0]["held_by"];
    assert_eq!((&held["whose"], &held["what"]), (&"gateway".into(), &"cool_down".into()), "{:#}", status["queue"]);
    let explained = operators.json("/explain?model=gpt-4.1-mini").await;
    assert_eq!((&explained["next"], &explained["held_by"]["what"]), (&"waits".into(), &"cool_down".into()));
    assert!((24.0..=26.0).contains(&explained["expected_wait_seconds"].as_f64().expect("a number")), "{explained:#}");
    join_all(waiting).await;
    let status = operators.status().await;
    assert_eq!(row(&status["models"], "gpt-4.1-mini")["cool_down"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn an_open_breaker_is_seen_in_status_metric_and_explanation() {
    let config = "[breaker]\ngive_up = \"20s\"\n[retry]\nmax_retries = 1\n";
    let world = World::new(config, |seen| if seen.number < 40 { error(500, &[]) } else { completion() });
    let operators = Operators::of(&world);
    let open = || world.metric(r#"weir_breaker_open{model="gpt-4.1-mini"}"#);
    join_all((0..8).map(|_| world.spawn(chat(CHAT)))).await;
    assert_eq!(open(), 1.0);
    let status = operators.status().await;
    let breaker = &row(&status["models"], "gpt-4.1-mini")["breaker"];
    assert_eq!(breaker["open"], true);
    assert!(breaker["failing_for_seconds"].as_f64() > Some(0.0) && breaker["gives_up_in_seconds"].is_number());
    let explained = operators.json("/explain?model=gpt-4.1-mini").await;
    assert_eq!(explained["lanes"][0]["breaker"]["open"], true);
    // It goes on failing until nobody waits for it any more.
    while world.chat().await.status != 503 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(operators.json("/explain?model=gpt-4.1-mini").await["next"], "is refused");
    while world.chat().await.status != 200 {
        tokio::time::sleep(Duration::from_millis(900)).await;
    }
    assert_eq!(open(), 0.0);
    assert_eq!(row(&operators.status().await["models"], "gpt-4.1-mini")["breaker"]["open"], false);
}

#[tokio::test(start_paused = true)]
async fn what_a_gateway_tells_of_its_quota_is_shown_as_learned() {
    let script = |seen: &Seen| {
        let (left, reset) = (599 - seen.number, format!("{}ms", 100 * (seen.number + 1)));
        let headers = [
            ("x-ratelimit-limit-requests", "600"),
            ("x-ratelimit-remaining-requests", &*left.to_string()),
            ("x-ratelimit-reset-requests", &*reset),
        ];
        answer(200, &headers, r#"{"choices":[]}"#)
    };
    let world = World::new("", script);
    for _ in 0..40 {
        world.chat().await;
    }
    let told = world.metric(r#"weir_learned_requests_per_second{model="gpt-4.1-mini",source="told"}"#);
    assert!((9.0..=11.0).contains(&told), "{told}");
    let status = Operators::of(&world).status().await;
    let limit = limit(&row(&status["models"], "gpt-4.1-mini")["limits"], "requests", "told").clone();
    assert_eq!(limit["capacity"], 600.0);
    assert!((9.0..=11.0).contains(&limit["refill_per_second"].as_f64().expect("a number")), "{limit:#}");
    assert!(limit["used"].as_f64() > Some(30.0), "{limit:#}");
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_stand_before_the_busiest() {
    let config = "[models.busy]\n[models.held]\nconcurrency = 1\n[clients.a]\nkey = \"sk-own-a\"\n[clients.z]\nkey = \"sk-own-z\"\n";
    let world = World::new(config, |seen| match String::from_utf8_lossy(&seen.body).contains("held") {
        true => vec![Step::Stall],
        false => completion(),
    });
    for _ in 0..20 {
        assert_eq!(world.send(bearer(chat(r#"{"model":"busy"}"#), "sk-own-a")).await.status, 200);
    }
    let _held: Vec<_> = (0..2).map(|_| world.spawn(bearer(chat(r#"{"model":"held"}"#), "sk-own-z"))).collect();
    world.settle().await;
    let status = Operators::of(&world).status().await;
    let names =
        |rows: &Value| rows.as_array().expect("a list").iter().map(|row| row["name"].clone()).collect::<Vec<_>>();
    assert_eq!(
        (names(&status["models"]), names(&status["clients"])),
        (["held", "busy"].map(Value::from).into(), ["z", "a"].map(Value::from).into())
    );
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_one_an_hour_is_shown_as_it_was_configured_and_refills() {
    let world = World::new("[limits]\nrequests = { rate = \"1/h\", burst = 1 }\n", |_| completion());
    let status = Operators::of(&world).status().await;
    let limit = limit(&status["limits"], "requests", "configured");
    assert_eq!((&limit["rate"], &limit["refill_per_second"]), (&"1/h".into(), &0.000278.into()));
}

// Rates, latencies, errors.

#[tokio::test(start_paused = true)]
async fn rates_and_latencies_of_the_last_minutes_follow_what_was_served() {
    let script = |_: &Seen| [vec![Step::Wait(Duration::from_secs(3))], completion()].concat();
    let world = World::new(TWO_CLIENTS, script);
    let operators = Operators::of(&world);
    let history = tokio::spawn(operators.0.clone().keep_history());
    let before = operators.status().await;
    assert_eq!(before["series"]["requests_per_second"].as_array().map(Vec::len), Some(0));
    for _ in 0..30 {
        world.send(bearer(chat(CHAT), "sk-own-bot")).await;
    }
    let status = operators.status().await;
    let near = |value: &Value, wanted: f64| {
        let value = value.as_f64().expect("a number");
        assert!((value / wanted - 1.0).abs() < 0.15, "{value}, not about {wanted}");
    };
    near(&status["window_seconds"], 60.0);
    near(&status["rates"]["requests_per_second"], 1.0 / 3.0);
    near(&status["rates"]["tokens_per_second"], 5.0);
    near(&row(&status["clients"], "bot")["requests_per_second"], 1.0 / 3.0);
    let model = row(&status["models"], "gpt-4.1-mini");
    near(&model["requests_per_second"], 1.0 / 3.0);
    assert_eq!(model["requests_total"], 30);
    let p50 = status["latency"]["request"]["p50_seconds"].as_f64().expect("a number");
    assert!((2.56..=5.12).contains(&p50), "{p50}: the bucket that 3 s falls into");
    let series = &status["series"];
    for line in [&series["requests_per_second"], &series["request_seconds"]["p95"], &series["waiting"]] {
        assert_eq!(line.as_array().map(Vec::len), Some(18), "one point for five of ninety seconds");
    }
    let of_model = operators.json("/status.json?model=gpt-4.1-mini").await;
    assert_eq!(of_model["series"]["model"], "gpt-4.1-mini");
    assert_eq!(of_model["series"]["requests_per_second"], series["requests_per_second"]);
    assert_eq!(status["totals"]["requests"]["ok"], 30);
    history.abort();
}

#[tokio::test(start_paused = true)]
async fn refusals_and_errors_are_there_with_their_cause() {
    let config = "[limits]\nrequests = { rate = \"1/h\", burst = 1 }\n[queue]\nmax_wait = \"1s\"\n";
    let world = World::new(config, |_| completion());
    let operators = Operators::of(&world);
    world.chat().await;
    assert_eq!(world.chat().await.status, 429);
    let status = operators.status().await;
    assert_eq!(status["totals"]["refused"]["requests"], 1);
    assert!(status["rates"]["refused_by_per_minute"]["requests"].as_f64() > Some(0.0), "{:#}", status["rates"]);
    let error = &status["recent_errors"][0];
    assert_eq!((&error["outcome"], &error["refused_by"]), (&"refused".into(), &"requests".into()));
    assert_eq!((&error["scope"], &error["status"]), (&"global".into(), &429.into()));
    assert_eq!(limit(&status["limits"], "requests", "configured")["used"], 1.0);
}

// What would happen.

#[tokio::test(start_paused = true)]
async fn an_explanation_says_what_the_next_request_would_wait_for() {
    let config = format!("[models.\"gpt-4.1-mini\"]\nrequests = {{ rate = \"6/min\", burst = 1 }}\n{TWO_CLIENTS}");
    let world = World::new(&config, |_| completion());
    let operators = Operators::of(&world);
    let question = "/explain?client=bot&model=gpt-4.1-mini";
    let before = operators.json(question).await;
    assert_eq!((&before["next"], &before["held_by"]), (&"passes".into(), &Value::Null), "{before:#}");
    assert_eq!(world.metric_sum("weir_in_flight", "gpt-4.1-mini"), 0.0);

    world.send(bearer(chat(CHAT), "sk-own-bot")).await;
    let _waiting = world.spawn(bearer(chat(CHAT), "sk-own-bot"));
    world.settle().await;
    let explained = operators.json(question).await;
    assert_eq!((&explained["next"], &explained["client"]["waiting"]), (&"waits".into(), &1.into()), "{explained:#}");
    let wait = explained["expected_wait_seconds"].as_f64().expect("a number");
    assert!((19.0..=20.0).contains(&wait), "{wait}: behind one, with a request every ten seconds");
    let held = &explained["held_by"];
    assert_eq!(
        (&held["scope"], &held["what"], &held["source"]),
        (&"model".into(), &"requests".into(), &"configured".into())
    );
    let limit = limit(&explained["limits"], "requests", "configured");
    assert_eq!((&limit["used"], &limit["capacity"], &limit["waiting"]), (&1.0.into(), &1.0.into(), &1.into()));
    // It came true: the one that was explained waits as long as that.
    let begun = tokio::time::Instant::now();
    assert_eq!(world.send(bearer(chat(CHAT), "sk-own-bot")).await.status, 200);
    let waited = begun.elapsed().as_secs_f64();
    assert!((waited - wait).abs() < 0.2, "told {wait}, waited {waited}");
}

#[tokio::test(start_paused = true)]
async fn an_explanation_of_what_would_be_refused_says_so_and_leaves_no_trace() {
    let config = format!("[models.\"gpt-4.1-mini\"]\nrequests = {{ rate = \"1/min\", burst = 1 }}\n{TWO_CLIENTS}");
    let world = World::new(&config, |_| completion());
    let operators = Operators::of(&world);
    world.send(bearer(chat(CHAT), "sk-own-bot")).await;
    let question = "/explain?client=bot&model=gpt-4.1-mini";
    for _ in 0..50 {
        let explained = operators.json(question).await;
        assert_eq!((&explained["next"], &explained["max_wait_seconds"]), (&"is refused".into(), &20.0.into()));
    }
    let other = operators.json("/explain?client=batch&model=gpt-4.1-mini").await;
    assert_eq!(other["next"], "waits", "it may wait five minutes");
    // Questions take nobody's place, and use up nothing.
    assert_eq!(world.send(bearer(chat(CHAT), "sk-own-bot")).await.header("retry-after"), "40");
    assert_eq!(world.metric_sum("weir_refused_total", "bot"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn what_may_take_too_long_is_explained_as_admission_decides_and_it_takes_it_in() {
    let config = format!("[models.\"gpt-4.1-mini\"]\nconcurrency = 1\n{TWO_CLIENTS}");
    let world = World::new(&config, |_| [vec![Step::Wait(Duration::from_secs(10))], completion()].concat());
    let operators = Operators::of(&world);
    for _ in 0..3 {
        world.send(bearer(chat(CHAT), "sk-own-bot")).await;
    }
    let _held_up: Vec<_> = (0..3).map(|_| world.spawn(bearer(chat(CHAT), "sk-own-bot"))).collect();
    world.settle().await;
    let explained = operators.json("/explain?client=bot&model=gpt-4.1-mini").await;
    assert!(explained["expected_wait_seconds"].as_f64() > Some(20.0), "{explained:#}");
    assert_eq!((&explained["next"], &explained["max_wait_seconds"]), (&"waits".into(), &20.0.into()), "{explained:#}");
    assert!(explained["why"].as_str().is_some_and(|why| why.contains("may be refused")), "{explained:#}");
    let _next = world.spawn(bearer(chat(CHAT), "sk-own-bot"));
    world.settle().await;
    assert_eq!(operators.status().await["now"]["waiting"], 3, "it was not refused");
}

#[tokio::test(start_paused = true)]
async fn who_would_be_given_anothers_place_in_a_full_queue_is_said_to_wait_and_does() {
    let clients = TWO_CLIENTS.replace("concurrency = 1\n", "");
    let world =
        World::new(&format!("[limits]\nconcurrency = 1\n[queue]\nmax_waiting = 3\n{clients}"), |_| vec![Step::Stall]);
    let operators = Operators::of(&world);
    let _of_batch: Vec<_> = (0..4).map(|_| world.spawn(bearer(chat(CHAT), "sk-own-batch"))).collect();
    world.settle().await;
    let for_batch = operators.json("/explain?client=batch&model=gpt-4.1-mini").await;
    assert_eq!(for_batch["next"], "is refused", "{for_batch:#}");
    assert!(for_batch["why"].as_str().is_some_and(|why| why.contains("queue.max_waiting")), "{for_batch:#}");
    assert_eq!(world.send(bearer(chat(CHAT), "sk-own-batch")).await.code(), "queue_full");
    let for_bot = operators.json("/explain?client=bot&model=gpt-4.1-mini").await;
    assert_eq!(for_bot["next"], "waits", "{for_bot:#}");
    let _of_bot = world.spawn(bearer(chat(CHAT), "sk-own-bot"));
    world.settle().await;
    let waits = operators.json("/explain?client=bot&model=gpt-4.1-mini").await;
    assert_eq!((&waits["client"]["waiting"], &waits["next"]), (&1.into(), &"is refused".into()), "{waits:#}");
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_clients_key_is_said_to_be_refused_where_there_are_clients() {
    let world = World::new(TWO_CLIENTS, |_| completion());
    let operators = Operators::of(&world);
    for question in ["/explain?model=gpt-4.1-mini", "/explain?client=-"] {
        let explained = operators.json(question).await;
        assert_eq!((&explained["next"], &explained["held_by"]), (&"is refused".into(), &Value::Null), "{explained:#}");
        let why = explained["why"].as_str().expect("a sentence");
        assert!(why.contains("401") && why.contains("batch, bot"), "{why}");
    }
    assert_eq!(world.chat().await.status, 401);
}

#[tokio::test(start_paused = true)]
async fn an_explanation_says_when_weir_is_about_to_stop() {
    let world = World::new("", |_| completion());
    let operators = Operators::of(&world);
    assert_eq!(operators.json("/explain").await["state"], "ready");
    operators.0.not_ready();
    assert_eq!(operators.json("/explain").await["state"], "draining");
}

#[tokio::test(start_paused = true)]
async fn who_is_not_known_is_told_who_is() {
    let world = World::new(TWO_CLIENTS, |_| completion());
    let operators = Operators::of(&world);
    let unknown = operators.get("/explain?client=nobody").await;
    assert_eq!(unknown.status, 404);
    let unknown: Value = serde_json::from_slice(&unknown.body).expect("JSON");
    assert_eq!(unknown["clients"], serde_json::json!(["batch", "bot"]));
    let other = operators.json("/explain?client=bot&model=no-such-model").await;
    assert_eq!((&other["model"]["asked"], &other["model"]["name"]), (&"no-such-model".into(), &"other".into()));
    assert!(other["model"]["note"].as_str().is_some_and(|note| note.contains("other")), "{other:#}");
    assert_eq!(operators.json("/explain").await["model"]["name"], "-");
    let strange = operators.json("/explain?client=-&model=%3Cimg%20src%3Dx%3E&tokens=77").await;
    assert_eq!((&strange["model"]["asked"], &strange["tokens"]), (&"<img src=x>".into(), &77.into()));
}

// Who may look.

#[tokio::test(start_paused = true)]
async fn with_a_token_only_probes_and_the_empty_page_go_without() {
    let world = World::new("[server]\nadmin_token = \"tok-123\"\n", |_| completion());
    let operators = Operators::of(&world);
    for (target, status) in [("/livez", 200), ("/readyz", 200), ("/status", 200), ("/", 302)] {
        assert_eq!(operators.get(target).await.status, status, "{target}");
    }
    for target in ["/metrics", "/status.json", "/explain", "/nothing", "/status.json?token=tok-123"] {
        let refused = operators.get(target).await;
        assert_eq!(
            (refused.status.as_u16(), refused.header("www-authenticate")),
            (401, "Bearer realm=\"weir\""),
            "{target}"
        );
        assert!(refused.text().contains("server.admin_token") && !refused.text().contains("tok-123"));
    }
    let asked = |target, token| with(ask(Method::GET, target), "authorization", token);
    assert_eq!(operators.ask(asked("/status.json", "Bearer tok-123")).await.status, 200);
    assert_eq!(operators.ask(asked("/nothing", "Bearer tok-123")).await.status, 404);
    assert_eq!(operators.ask(asked("/metrics", "Bearer tok-12")).await.status, 401);
    let reload = |token| with(ask(Method::POST, "/reload"), "authorization", token);
    assert_eq!(operators.ask(reload("Bearer tok-12")).await.status, 401);
    assert_eq!(operators.ask(reload("Bearer tok-123")).await.status, 409, "there is no file");
    let page = operators.get("/status").await.text();
    assert!(!page.contains("tok-123") && !page.contains("gpt-4.1-mini"), "the page itself has no data");
}

#[tokio::test(start_paused = true)]
async fn a_web_page_neither_reads_from_a_loopback_listener_by_a_name_of_its_own_nor_reloads_by_any() {
    let world = World::new("", |_| completion());
    // Sent by these names, by a page of that site, if any.
    let statuses = async |operators: &Operators, host: &str, origin: &str, method: Method, target: &str| {
        let mut request = ask(method, target);
        request.headers_mut().insert("host", HeaderValue::from_str(host).expect("a name"));
        let request = if origin.is_empty() { request } else { with(request, "origin", origin) };
        operators.ask(request).await.status.as_u16()
    };
    let local = Operators::of(&world);
    for target in ["/status.json", "/metrics", "/explain", "/status", "/", "/reload"] {
        assert_eq!(statuses(&local, "evil.example:9090", "", Method::GET, target).await, 403, "{target}");
    }
    assert_eq!(statuses(&local, "probe.example", "", Method::GET, "/livez").await, 200, "probes tell nothing");
    assert_eq!(statuses(&local, "localhost:9090", "", Method::GET, "/status.json").await, 200);
    // From elsewhere it is asked for by whatever name it has, but what changes something is no page's to send.
    let open = Operators::at(&world, "0.0.0.0:9090");
    assert_eq!(statuses(&open, "weir.internal:9090", "", Method::GET, "/metrics").await, 200);
    for operators in [&local, &open] {
        let host = "localhost:9090";
        let post = async |origin| statuses(operators, host, origin, Method::POST, "/reload").await;
        assert_eq!(post("https://evil.example").await, 403);
        for honest in ["", "http://localhost:9090"] {
            assert_eq!(post(honest).await, 409, "{honest}: there is no file, that is all");
        }
    }
    // A page does not know the token.
    let world = World::new("[server]\nadmin_token = \"tok-1\"\n", |_| completion());
    let guarded = Operators::of(&world);
    let by_name = with(request(Method::GET, "/metrics", ""), "authorization", "Bearer tok-1");
    assert_eq!(guarded.ask(by_name).await.status, 200, "any name will do");
    assert_eq!(statuses(&guarded, "evil.example", "", Method::GET, "/metrics").await, 401);
}

#[tokio::test(start_paused = true)]
async fn every_answer_says_what_a_browser_may_do_with_it() {
    let world = World::new("", |_| completion());
    let operators = Operators::of(&world);
    for target in ["/status", "/status.json", "/metrics", "/livez", "/explain?client=nobody", "/nothing"] {
        let answer = operators.get(target).await;
        assert_eq!((answer.header("cache-control"), answer.header("x-content-type-options")), ("no-store", "nosniff"));
        let head = operators.ask(ask(Method::HEAD, target)).await;
        assert_eq!((head.status, head.body.len()), (answer.status, 0), "{target}");
        assert_eq!(head.header("content-type"), answer.header("content-type"));
        assert_ne!(head.header("content-length"), "0", "{target}");
        assert_eq!(operators.ask(ask(Method::POST, target)).await.header("allow"), "GET, HEAD", "{target}");
    }
    let reload = operators.get("/reload").await;
    assert_eq!((reload.status.as_u16(), reload.header("allow")), (405, "POST"));
    // A client that was given the wrong port is told so, and whoever looks for something what there is.
    let lost = operators.ask(ask(Method::POST, "/v1/chat/completions")).await;
    for answer in [lost, reload, operators.get("/nothing").await, operators.ask(ask(Method::POST, "/metrics")).await] {
        for part in ["/status.json", "/explain", "/metrics", "/readyz", "POST /reload", "server.listen"] {
            assert!(answer.text().contains(part), "{part}: {}", answer.text());
        }
    }
    let page = operators.get("/status").await;
    let policy = page.header("content-security-policy");
    for part in
        ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "frame-ancestors 'none'", "form-action 'none'"]
    {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    let nonce = policy.split("script-src 'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a nonce");
    assert!(nonce.len() >= 32 && page.text().contains(&format!("<script nonce=\"{nonce}\">")), "{nonce}");
}

#[tokio::test(start_paused = true)]
async fn a_probe_or_a_scraper_at_the_clients_listener_is_told_of_the_other_one() {
    let world = World::new("", |_| completion());
    for path in ["/status", "/status.json", "/explain", "/metrics", "/livez", "/readyz", "/reload"] {
        assert_ne!(Operators::of(&world).get(path).await.status, 404, "{path}");
        let lost = world.send(request(Method::GET, path, "")).await;
        assert_eq!((lost.status.as_u16(), lost.code()), (404, "unknown_path".to_owned()), "{path}");
        assert!(lost.text().contains("server.admin_listen"), "{}", lost.text());
    }
    assert!(world.send(request(Method::GET, "/chat/completions", "")).await.text().contains("base URL to http://"));
}

// Many models, many clients, and scrapers that never stop.

/// 300 models, 20 clients, and something counted for each pair of them.
fn crowd() -> World {
    let models: String = (0..50).map(|n| format!("[models.m{n}]\nconcurrency = 9\n")).collect();
    let clients: String =
        (0..20).map(|n| format!("[clients.c{n}]\nkey = \"sk-own-{n}\"\nrequests = \"600/min\"\n")).collect();
    let script = |seen: &Seen| match String::from_utf8_lossy(&seen.body).contains("stream") {
        true => [
            stream_head(),
            event("one"),
            Step::Wait(Duration::from_secs(3)),
            event("two"),
            Step::Send(b"0\r\n\r\n".to_vec()),
        ]
        .to_vec(),
        false => completion(),
    };
    let world = World::new(&format!("{models}{clients}"), script);
    let (metrics, names) = (world.proxy.metrics(), world.proxy.models());
    for n in 50..400 {
        names.learn(&format!("m{n}"));
    }
    for model in names.all() {
        for client in ClientId::all().take(21) {
            metrics.pair(model, client).request(Outcome::Ok);
        }
        metrics.model(model).request_duration(Duration::from_secs(1));
    }
    world
}

#[tokio::test(start_paused = true)]
async fn whatever_clients_send_the_answers_are_bounded() {
    let world = crowd();
    let operators = Operators::of(&world);
    for n in 0..100 {
        let body = format!(r#"{{"model":"nonsense-{n}","messages":[]}}"#);
        world.send(bearer(chat(&body), "sk-own-1")).await;
    }
    let metrics = operators.get("/metrics").await.text();
    let known = world.proxy.models().all().len();
    assert_eq!(known, 2 + 51 + 256, "the stand-ins, the configuration's, and those learned");
    let series = metrics.lines().filter(|line| line.starts_with("weir_requests_total{")).count();
    assert_eq!(series, known * 21 * Outcome::ALL.len());
    assert!(!metrics.contains("nonsense-99"));
    let status = operators.status().await;
    assert_eq!(status["models"].as_array().map(Vec::len), Some(100));
    assert!(status["models_not_listed"].as_u64() > Some(150), "{}", status["models_not_listed"]);
}

#[test]
fn a_scrape_delays_no_request_no_stream_and_no_probe() {
    // One thread only makes answers like that, and it is taken: whatever needs it waits, and nothing else may.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().start_paused(true).max_blocking_threads(1).build().expect("a runtime");
    runtime.block_on(async {
        let world = crowd();
        let operators = Operators::of(&world);
        let (let_go, held) = std::sync::mpsc::channel::<()>();
        let taken = tokio::task::spawn_blocking(move || held.recv());
        let scrapes: Vec<_> = ["/metrics", "/status.json", "/metrics", "/explain?client=c1&model=m1"]
            .into_iter()
            .map(|target| {
                let operators = Operators(operators.0.clone());
                tokio::spawn(async move { operators.get(target).await })
            })
            .collect();
        world.settle().await;
        let stream = world.begin(bearer(chat(STREAM), "sk-own-3")).await;
        assert_eq!(stream.status(), 200);
        assert_eq!(world.send(bearer(chat(CHAT), "sk-own-4")).await.status, 200);
        assert_eq!(operators.get("/livez").await.status, 200);
        assert!(scrapes.iter().all(|scrape| !scrape.is_finished()), "they are made on a thread of their own");
        let_go.send(()).expect("it waits for that");
        taken.await.expect("no panic").expect("it was let go");
        assert!(join_all(scrapes).await.iter().all(|answer| answer.status == 200));
        assert!(collect(stream).await.text().contains("two"));
        world.assert_nothing_held();
    });
}
