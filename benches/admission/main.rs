//! What a decision of admission costs: without a queue, with ten thousand waiting, and in memory for each of these.
//!
//! `cargo bench --bench admission`; `-- --memory queue` or `-- --memory gate` for the memory. docs/benchmarks.md says
//! what the figures mean.

mod memory;
mod scene;

use std::cell::{LazyCell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use weir::admission::{Applicant, Cost, Gate, Lane};
use weir::clients::Tenant;
use weir::config::{Config, Weight};
use weir::models::Models;

use scene::{HeldUpBy, MAX_WAIT, Scene, clients};

const WAITING: usize = 10_000;

/// So many of one kind are timed together, for the clock's own cost not to count.
const CHUNK: u64 = 100;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--memory") {
        return memory::measure(arguments.get(at + 1).map_or("", String::as_str));
    }
    let criterion = Criterion::default().warm_up_time(Duration::from_millis(500));
    let mut criterion = criterion.measurement_time(Duration::from_secs(2)).sample_size(30).configure_from_args();
    without_a_queue(&mut criterion);
    through_the_gate(&mut criterion);
    with_ten_thousand_waiting(&mut criterion);
    criterion.final_summary();
}

fn without_a_queue(criterion: &mut Criterion) {
    let mut group = group(criterion, "without a queue");
    for tenants in [1, 10, 1000] {
        let scene = LazyCell::new(|| RefCell::new(Scene::<()>::new(HeldUpBy::Nothing, tenants, 1)));
        group.bench_function(format!("{tenants} tenants"), |bench| {
            let mut scene = scene.borrow_mut();
            bench.iter(|| scene.pass());
        });
    }
}

/// The same with the lock, the clock and the permit that weir has around it.
fn through_the_gate(criterion: &mut Criterion) {
    let limits = "requests = { rate = \"1000000/s\", burst = 100000000 }\n\
                  tokens = { rate = \"100000000/s\", burst = 100000000 }\n\
                  concurrency = 1000000\n";
    let config = format!("[limits]\n{limits}[models.m]\n{limits}[clients.a]\nkey = \"a\"\n{limits}");
    let config = Config::parse(&config, &|_| None).expect("a good configuration");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let _inside = runtime.enter();
    let (models, clients) = (Arc::new(Models::new(["m"])), clients(1, limits));
    let gate = Gate::open(&config, models.clone(), &clients);
    let tenant = Tenant::Named(clients.ids().next().expect("a client"));
    let lane = Lane { credential: 0, model: models.find("m") };
    // Little enough for the real clock's quota to last.
    let cost = Cost { prompt: 3, output: 2 };
    let pass = async || {
        let until = tokio::time::Instant::now() + MAX_WAIT;
        let (rank, weight) = (gate.next_rank(), Weight::ONE);
        let who = Applicant { tenant, weight, lane, rank, size: None, cost, max_wait: MAX_WAIT, until };
        let mut permit = gate.admit(&who, false).await.expect("there is room for everyone");
        permit.spend();
        permit.used(4);
    };
    group(criterion, "without a queue").bench_function("through the gate", |bench| {
        bench.iter_custom(|iterations| {
            runtime.block_on(async {
                let begun = Instant::now();
                for _ in 0..iterations {
                    pass().await;
                }
                begun.elapsed()
            })
        });
    });
}

fn with_ten_thousand_waiting(criterion: &mut Criterion) {
    for (what, held_up_by) in [("slots", HeldUpBy::Slots), ("tokens", HeldUpBy::Tokens)] {
        let mut group = group(criterion, &format!("10,000 wait for {what}"));
        for tenants in [1, 10, 1000] {
            admit_and_enqueue(&mut group, &format!("{tenants} tenants"), held_up_by, tenants, 1);
            let scene = LazyCell::new(|| crowded(held_up_by, tenants, 1));
            for (why, max_wait) in [("too late", Duration::from_millis(10)), ("full", MAX_WAIT)] {
                group.bench_function(format!("refuse, {why}/{tenants} tenants"), |bench| {
                    let mut scene = scene.borrow_mut();
                    bench.iter(|| scene.refuse(max_wait, ()));
                });
            }
        }
    }
    let mut group = group(criterion, "10,000 wait for 300 models");
    for tenants in [1, 10] {
        admit_and_enqueue(&mut group, &format!("{tenants} tenants"), HeldUpBy::ModelSlots, tenants, 300);
    }
}

fn admit_and_enqueue(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    held_up_by: HeldUpBy,
    tenants: usize,
    models: usize,
) {
    let scene = LazyCell::new(|| crowded(held_up_by, tenants, models));
    group.bench_function(format!("admit the next/{name}"), |bench| {
        bench.iter_custom(|iterations| in_chunks(&mut scene.borrow_mut(), iterations).0);
    });
    group.bench_function(format!("enqueue/{name}"), |bench| {
        bench.iter_custom(|iterations| in_chunks(&mut scene.borrow_mut(), iterations).1);
    });
}

/// As many leave the queue as enter it; the time of each kind.
fn in_chunks(scene: &mut Scene<()>, iterations: u64) -> (Duration, Duration) {
    let (mut admitting, mut enqueueing) = (Duration::ZERO, Duration::ZERO);
    let mut left = iterations;
    while left > 0 {
        let chunk = left.min(CHUNK);
        let begun = Instant::now();
        (0..chunk).for_each(|_| scene.admit_next());
        let between = Instant::now();
        (0..chunk).for_each(|_| scene.arrive(()));
        admitting += between - begun;
        enqueueing += between.elapsed();
        left -= chunk;
    }
    (admitting, enqueueing)
}

/// Made when the first asks for it: whoever measures one thing need not wait for the others.
fn crowded(held_up_by: HeldUpBy, tenants: usize, models: usize) -> RefCell<Scene<()>> {
    let mut scene = Scene::with_room_for(WAITING, held_up_by, tenants, models);
    scene.fill(WAITING, || ());
    // So that how long slots are held, and what passes beside whom, is known.
    for _ in 0..2 * WAITING {
        scene.admit_next();
        scene.arrive(());
    }
    RefCell::new(scene)
}

fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(1));
    group
}
