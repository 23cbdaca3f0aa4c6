//! A seeded simulation: some thousand mixed requests against a gateway that does anything it can think of, and clients
//! that leave when they like. Whatever happens, the promises hold.
//!
//! In every second story there is a network between weir and the gateway, and it is bad: slow, in each direction as it likes,
//! interrupted in one direction or both, and connections are cut in one direction. What the gateway sees is then not what
//! weir has done at that time, so limits and budget are checked in the other stories only.
//!
//! In every second pair of stories the limits change every few seconds, under those who wait and are under way.
//!
//! `WEIR_SEEDS=200 cargo test --test behaviour simulation` runs more seeds, `WEIR_SEED=17` one. A seed tells the same
//! story each time: backoff is capped at its base, so that even weir's jitter is none.

mod clients;
mod fates;
mod promises;
mod rules;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;

use crate::network::{CUT_ONE_OF, Network, Way};
use crate::world::World;
use clients::{Client, Line, Record};
use fates::Tape;
use rules::Rules;

const CLIENTS: usize = 40;
const REQUESTS_PER_CLIENT: usize = 30;

/// Of eight clients, so many share HTTP/2 connections; the others have HTTP/1.1 connections of their own.
const HTTP2_OF_EIGHT: usize = 3;

const ADDRESSES: usize = 5;

/// No client waits longer than this for its answers, all together.
const LONGEST: Duration = Duration::from_secs(900);

/// Long enough for every deadline, idle timeout and pooled connection to be over.
const AFTERMATH: Duration = Duration::from_secs(600);

#[test]
fn whatever_happens_every_promise_holds() {
    let number = |name| std::env::var(name).ok().map(|text: String| text.parse::<u64>().expect("a number"));
    let seeds = number("WEIR_SEED").map_or(1..=number("WEIR_SEEDS").unwrap_or(4), |seed| seed..=seed);
    for seed in seeds {
        simulate(seed, REQUESTS_PER_CLIENT);
    }
}

#[test]
fn a_seed_tells_the_same_story_twice() {
    for seed in [1, 2] {
        assert_eq!(simulate(seed, 10), simulate(seed, 10));
    }
}

/// Plays a seed, checks every promise, and returns what reached the gateway and when.
fn simulate(seed: u64, requests_per_client: usize) -> Vec<(u128, String)> {
    let _named = NameSeed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let story = play(seed, requests_per_client).await;
        println!("seed {seed}: {}", story.summary());
        story.check();
        story.tape.attempts().iter().map(|it| ((it.at - story.world.start).as_millis(), it.id.clone())).collect()
    })
}

/// Says which seed it was when a check fails.
struct NameSeed(u64);

impl Drop for NameSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the seed was {0}; WEIR_SEED={0} runs it alone", self.0);
        }
    }
}

/// What happened, as everyone saw it.
struct Story {
    world: World,
    /// Since when each was in force, the first from the start.
    rules: Vec<(Instant, Rules)>,
    tape: Arc<Tape>,
    /// The network was bad.
    stormy: bool,
    requests_per_client: usize,
    /// What each client saw, in no order.
    records: Vec<Record>,
    /// `weir_retries_total`, once a second.
    retries: Vec<(Instant, f64)>,
}

async fn play(seed: u64, requests_per_client: usize) -> Story {
    let mut rng = SmallRng::seed_from_u64(seed);
    let rules = Rules::random(&mut rng);
    let tape = Arc::new(Tape::new(seed));
    let world = World::new(&rules.config(), tape.script());
    let stormy = seed.is_multiple_of(2);
    let network = Arc::new(Network::default());
    if stormy {
        world.gateway.reached_through(network.clone());
    }
    let mut shared = Vec::new();
    for number in 0..HTTP2_OF_EIGHT {
        shared.push(world.seen_from(&address(number)).http2().await);
    }
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let line = shared.get(number % 8).map_or(Line::Http1(None), |shared| Line::Http2(shared.clone()));
            let rng = SmallRng::seed_from_u64(seed.wrapping_mul(1000) + number as u64);
            tokio::spawn(
                Client::new(number, world.seen_from(&address(number)), tape.clone(), rng, line)
                    .run(requests_per_client),
            )
        })
        .collect();
    drop(shared);
    let rules = Arc::new(Mutex::new(vec![(world.start, rules)]));
    let reloads = (seed / 2).is_multiple_of(2).then(|| {
        let rng = SmallRng::seed_from_u64(seed.wrapping_mul(31));
        tokio::spawn(change_rules(world.clone(), rules.clone(), rng))
    });
    let trouble = tokio::spawn(trouble_connections(world.clone(), rng));
    let storm = tokio::spawn(storm(network.clone(), SmallRng::seed_from_u64(!seed)));
    let retries = Arc::new(Mutex::new(Vec::new()));
    let watch = tokio::spawn(count_retries(world.clone(), retries.clone()));
    let mut records = Vec::new();
    for (number, client) in clients.into_iter().enumerate() {
        let client = tokio::time::timeout_at(world.start + LONGEST, client).await;
        let client = client.unwrap_or_else(|_| panic!("client {number} waits for ever"));
        records.extend(client.expect("a client does not panic"));
    }
    if let Some(reloads) = reloads {
        reloads.abort();
        let changes = rules.lock().expect("nobody panics with it").len();
        assert!(changes > 3, "a story in which nothing changes proves little");
    }
    trouble.abort();
    watch.abort();
    storm.abort();
    network.interrupt(&[]);
    tokio::time::sleep(AFTERMATH).await;
    let retries = retries.lock().expect("nobody panics with it").clone();
    let rules = std::mem::take(&mut *rules.lock().expect("nobody panics with it"));
    Story { world, rules, tape, stormy, requests_per_client, records, retries }
}

/// Where a client connects from: of each address there are several.
fn address(client: usize) -> String {
    format!("10.0.0.{}", 1 + client % ADDRESSES)
}

/// Every few seconds other rules are put in force.
async fn change_rules(world: World, rules: Arc<Mutex<Vec<(Instant, Rules)>>>, mut rng: SmallRng) {
    loop {
        tokio::time::sleep(Duration::from_millis(rng.random_range(200..5000))).await;
        let mut rules = rules.lock().expect("nobody panics with it");
        let (_, before) = rules.last().expect("there are rules from the start");
        let after = before.changed(&mut rng);
        world.reload(&after.config()).expect("limits can change live");
        rules.push((Instant::now(), after));
    }
}

/// At times a few connections are refused, at times none is made before weir has lost patience.
async fn trouble_connections(world: World, mut rng: SmallRng) {
    let mut pause = async |from, to| tokio::time::sleep(Duration::from_millis(rng.random_range(from..to))).await;
    loop {
        pause(500, 4000).await;
        world.gateway.refuse_connections(3);
        pause(500, 4000).await;
        world.gateway.delay_connections(rules::CONNECT_TIMEOUT * 2);
        pause(100, 2000).await;
        world.gateway.delay_connections(Duration::ZERO);
    }
}

/// At times bytes take long, at times they wait, and at times connections are cut.
async fn storm(network: Arc<Network>, mut rng: SmallRng) {
    loop {
        let mut millis = |from, to| Duration::from_millis(rng.random_range(from..to));
        tokio::time::sleep(millis(100, 3000)).await;
        network.delay([millis(0, 200), millis(0, 200)]);
        let (calm, interruption) = (millis(100, 2000), millis(10, 4000));
        let way = Way::BOTH[rng.random_range(0..2)];
        network.cut(way, rng.random_range(0..CUT_ONE_OF));
        tokio::time::sleep(calm).await;
        let ways = if rng.random_bool(0.5) { &Way::BOTH[..] } else { &[way] };
        network.interrupt(ways);
        tokio::time::sleep(interruption).await;
        network.interrupt(&[]);
    }
}

async fn count_retries(world: World, counted: Arc<Mutex<Vec<(Instant, f64)>>>) {
    loop {
        let now = (Instant::now(), world.metric_sum("weir_retries_total", ""));
        counted.lock().expect("nobody panics with it").push(now);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
