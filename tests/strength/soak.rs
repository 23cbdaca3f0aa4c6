//! Mixed load with faults for a long time: memory, descriptors and tasks stay flat.
//!
//! `WEIR_SOAK_SECONDS=3600 cargo test --release --test strength soak` goes on for an hour and leaves a table behind
//! (`WEIR_SOAK_CSV` names it), which tests/strength/graph.py draws.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::faults::{CONFIG, assert_none};
use crate::gateway::Gateway;
use crate::load::{Load, Until};
use crate::plan::Plan;
use crate::promises::Story;
use crate::weir::{Metrics, Weir, setting};

const CLIENTS: usize = 64;

/// The requests of one cycle, and how many cycles there are.
const REQUESTS: u64 = 120;
const CYCLES: u64 = 3;

/// Of an hour: how long is a round, after which everything is looked at, and how often a sample is taken.
const ROUND: Duration = Duration::from_secs(120);
const SAMPLES_EVERY: Duration = Duration::from_secs(10);

/// Not to take the machine away from others.
const PER_SECOND: f64 = 160.0;

/// Everything of one soak.
struct Scene {
    plan: Plan,
    gateway: Gateway,
    weir: Weir,
    load: Load,
}

impl Scene {
    fn new() -> Self {
        let plan = Plan::faulty(setting("WEIR_SOAK_SEED", 2));
        let clock = Arc::default();
        let gateway = Gateway::start(plan, Arc::clone(&clock));
        let weir = Weir::start(gateway.address, CONFIG);
        let load = Load::new(weir.address, plan, clock);
        Self { plan, gateway, weir, load }
    }

    /// Some load, until everyone has an answer; every promise was kept.
    async fn round(&self, pause: Duration, until: Until) -> usize {
        let verdicts = self.load.run(CLIENTS, pause, until).await;
        self.weir.holds_nothing().await;
        let attempts = self.gateway.take_attempts();
        let story = Story::new(&verdicts, &attempts);
        println!("{}", story.summary());
        assert_none(&[story.wrong(), self.gateway.wrong(), self.weir.said()].concat());
        assert!(story.spoiled(self.plan) * 100 <= verdicts.len());
        verdicts.len()
    }

    /// Waits until the gateway's connections are gone; nothing is open then but what a weir at rest has.
    async fn comes_to_rest(&self, most: Option<(usize, f64)>) -> (usize, f64) {
        self.gateway.close_idle();
        let rests = |weir: &Weir, metrics: &Metrics| {
            let connections = metrics.sum("weir_upstream_connections");
            let few = most.is_none_or(|most| weir.descriptors() <= most.0 && metrics.sum("weir_tasks") <= most.1);
            connections == 0.0 && few
        };
        let metrics = self.weir.comes_to("weir comes to rest", rests).await;
        (self.weir.descriptors(), metrics.sum("weir_tasks"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_each_cycle_of_load_and_quiet_no_more_descriptors_and_tasks_are_left_than_after_the_first() {
    let scene = Scene::new();
    let before = scene.weir.descriptors();
    let mut rest = None;
    for cycle in 1..=setting("WEIR_SOAK_CYCLES", CYCLES) {
        scene.round(Duration::ZERO, Until::Request(cycle * REQUESTS)).await;
        // Each worker's pool has a sweeper after the first cycle, for a minute.
        let (_, tasks) = scene.comes_to_rest(rest).await;
        rest = rest.or(Some((before, tasks)));
        scene.comes_to_rest(rest).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn for_as_long_as_it_is_told_memory_descriptors_and_tasks_stay_flat() {
    let seconds = setting("WEIR_SOAK_SECONDS", 0);
    if seconds == 0 {
        // The cycles above are what an ordinary run has time for.
        return;
    }
    let scene = Scene::new();
    let table = std::env::var("WEIR_SOAK_CSV")
        .unwrap_or_else(|_| format!("{}/soak-{}.csv", env!("CARGO_TARGET_TMPDIR"), std::process::id()));
    println!("the table is {table}");
    let end = Instant::now() + Duration::from_secs(seconds);
    let pause = Duration::from_secs_f64(CLIENTS as f64 / PER_SECOND);
    let load = async {
        let mut requests = 0;
        while Instant::now() < end {
            requests += scene.round(pause, Until::Time(end.min(Instant::now() + ROUND))).await;
        }
        requests
    };
    let requests = tokio::select! {
        requests = load => requests,
        never = sample(&scene, &table) => never,
    };
    println!("{requests} requests in {seconds} s");
    let samples = std::fs::read_to_string(&table).expect("it was written");
    stays_flat(&samples);
    scene.comes_to_rest(None).await;
}

/// Writes a line every few seconds.
async fn sample<T>(scene: &Scene, table: &str) -> T {
    let begun = Instant::now();
    let mut text = "seconds,requests,resident_kib,descriptors,tasks,upstream_connections\n".to_owned();
    loop {
        let metrics = scene.weir.metrics().await;
        let (seconds, requests) = (begun.elapsed().as_secs(), scene.load.next.load(Ordering::Relaxed));
        let (memory, descriptors) = (scene.weir.resident_bytes() >> 10, scene.weir.descriptors());
        let (tasks, connections) = (metrics.sum("weir_tasks"), metrics.sum("weir_upstream_connections"));
        writeln!(text, "{seconds},{requests},{memory},{descriptors},{tasks},{connections}").expect("a String");
        std::fs::write(table, &text).expect("the table can be written");
        tokio::time::sleep(SAMPLES_EVERY).await;
    }
}

/// The second half's median is about the first half's, the warm-up left out.
fn stays_flat(samples: &str) {
    let rows = samples.lines().skip(1).map(|line| line.split(',').map(|it| it.parse().expect("a number")).collect());
    let rows: Vec<Vec<f64>> = rows.collect();
    let rows = &rows[rows.len() / 10..];
    let (first, second) = rows.split_at(rows.len() / 2);
    for (column, name, slack) in [(2, "memory", 4096.0), (3, "descriptors", 20.0), (4, "tasks", 20.0)] {
        let median = |rows: &[Vec<f64>]| {
            let mut values: Vec<f64> = rows.iter().map(|row| row[column]).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or_default()
        };
        let (early, late) = (median(first), median(second));
        println!("{name}: {early} in the first half, {late} in the second");
        assert!(late <= early * 1.1 + slack, "{name} grew from {early} to {late}");
    }
}
