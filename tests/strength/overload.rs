//! Far more than weir can serve: it refuses in clear words, its operators still see what goes on, and it is as good as new
//! when it is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::client::{Client, Habits, Line};
use crate::faults::assert_none;
use crate::gateway::Gateway;
use crate::plan::{Kind, Plan};
use crate::promises::{Outcome, Story, Verdict, judge};
use crate::weir::{Weir, setting};

/// How long to wait between two looks at the metrics.
const SCRAPES_EVERY: Duration = Duration::from_millis(50);

/// A gateway that answers everything, weir, and clients.
struct Scene {
    plan: Plan,
    clock: Arc<AtomicU64>,
    next: AtomicU64,
    gateway: Gateway,
    weir: Weir,
}

impl Scene {
    fn new(latency: Duration, config: &str) -> Arc<Self> {
        let plan = Plan::steady(latency);
        let clock = Arc::default();
        let gateway = Gateway::start(plan, Arc::clone(&clock));
        let weir = Weir::start(gateway.address, config);
        Arc::new(Self { plan, clock, next: AtomicU64::new(0), gateway, weir })
    }

    /// A client with a connection of its own, which it makes when it first asks.
    fn client(&self, number: usize) -> Client {
        Client { number, to: self.weir.address, clock: self.clock.clone(), line: Line::Http1(None) }
    }

    async fn ask(&self, client: &mut Client) -> Verdict {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        judge(self.plan, &client.ask(id, Kind::Json, Habits::default()).await)
    }

    /// Does this, and asks for metrics all the while. Returns the longest that they took, too.
    async fn while_watched<T>(&self, load: impl Future<Output = T>) -> (T, Duration) {
        let mut longest = Duration::ZERO;
        let watching = async {
            loop {
                let begun = Instant::now();
                // It panics where there is no answer.
                self.weir.metrics().await;
                longest = longest.max(begun.elapsed());
                tokio::time::sleep(SCRAPES_EVERY).await;
            }
        };
        let outcome = tokio::select! {
            outcome = load => outcome,
            () = watching => unreachable!("it watches for ever"),
        };
        (outcome, longest)
    }

    /// Everyone was served, or refused in clear words; and now everything is as before.
    async fn recovers(&self, verdicts: &[Verdict], longest_scrape: Duration) {
        let metrics = self.weir.holds_nothing().await;
        let attempts = self.gateway.take_attempts();
        let story = Story::new(verdicts, &attempts);
        println!("{}\nthe slowest look at the metrics took {longest_scrape:?}", story.summary());
        assert_none(&[story.wrong(), self.gateway.wrong(), self.weir.said()].concat());
        assert_eq!(metrics.sum("weir_requests_total"), verdicts.len() as f64);
        let next = self.ask(&mut self.client(0)).await;
        assert_eq!(next.outcome, Ok(Outcome::Answered(200)), "the next request is served");
        self.weir.holds_nothing().await;
    }
}

fn count(verdicts: &[Verdict], outcome: Outcome) -> usize {
    verdicts.iter().filter(|verdict| verdict.outcome == Ok(outcome)).count()
}

async fn all<T: 'static>(mut tasks: JoinSet<T>) -> Vec<T> {
    let mut done = Vec::new();
    while let Some(task) = tasks.join_next().await {
        done.push(task.expect("a client does not panic"));
    }
    done
}

/// The gateway takes four at once and 50 ms for each, so 80 a second; 800 come, whether the others are served or not. It begins to
/// answer when the first is refused, so that the queue fills on a slow machine too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_ten_times_what_can_be_served_the_rest_is_refused_in_clear_words() {
    const EVERY: Duration = Duration::from_micros(1250);
    let seconds = setting("WEIR_OVERLOAD_SECONDS", 1);
    let config = "[limits]\nconcurrency = 4\n[queue]\nmax_waiting = 50\nmax_wait = \"30s\"\n";
    let scene = Scene::new(Duration::from_millis(50), config);
    scene.gateway.hold();
    let load = async {
        let mut clients = JoinSet::new();
        let begun = tokio::time::Instant::now();
        for number in 0..seconds as usize * 800 {
            tokio::time::sleep_until(begun + EVERY * number as u32).await;
            let scene = scene.clone();
            clients.spawn(async move {
                let verdict = scene.ask(&mut scene.client(number)).await;
                if verdict.outcome == Ok(Outcome::Failed("queue_full")) {
                    scene.gateway.release();
                }
                verdict
            });
        }
        all(clients).await
    };
    let (verdicts, longest_scrape) = scene.while_watched(load).await;
    assert!(count(&verdicts, Outcome::Answered(200)) >= 54, "those in the queue and before it are served");
    assert!(count(&verdicts, Outcome::Failed("queue_full")) > 0, "nobody was refused");
    scene.recovers(&verdicts, longest_scrape).await;
}

/// Hundreds of clients that come back at once for a queue of twenty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_attempted_far_past_its_bounds_stays_within_them() {
    const CLIENTS: usize = 200;
    const MAX_WAITING: f64 = 20.0;
    let attempts = setting("WEIR_OVERLOAD_ATTEMPTS", 3000);
    let config = "[limits]\nconcurrency = 2\n[queue]\nmax_waiting = 20\nmax_wait = \"5s\"\n";
    let scene = Scene::new(Duration::from_millis(20), config);
    let load = async {
        let mut clients = JoinSet::new();
        let left = Arc::new(AtomicU64::new(attempts));
        for number in 0..CLIENTS {
            let (scene, left) = (scene.clone(), left.clone());
            clients.spawn(async move {
                let (mut client, mut verdicts) = (scene.client(number), Vec::new());
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    verdicts.push(scene.ask(&mut client).await);
                }
                verdicts
            });
        }
        all(clients).await.into_iter().flatten().collect::<Vec<_>>()
    };
    let most_waiting = async {
        let mut most = 0.0;
        loop {
            most = f64::max(most, scene.weir.metrics().await.sum("weir_waiting"));
            assert!(most <= MAX_WAITING, "{most} wait");
            tokio::time::sleep(SCRAPES_EVERY).await;
        }
    };
    let (verdicts, longest_scrape) = tokio::select! {
        watched = scene.while_watched(load) => watched,
        never = most_waiting => never,
    };
    assert!(count(&verdicts, Outcome::Failed("queue_full")) > 0, "nobody was refused");
    scene.recovers(&verdicts, longest_scrape).await;
}

/// Thousands of connections, each with a request at once; how memory and CPU grow with their number is printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_connections_as_there_are_descriptors_for_are_all_served() {
    let connections = setting("WEIR_OVERLOAD_CONNECTIONS", 200) as usize;
    let scene = Scene::new(Duration::from_millis(200), "[limits]\nconcurrency = 100000\n[queue]\nmax_wait = \"60s\"\n");
    let (idle, mut clients) = (scene.weir.resident_bytes(), Vec::new());
    let (mut verdicts, mut slowest) = (Vec::new(), Duration::ZERO);
    println!("connections  KiB each under load  CPU µs a request");
    for open in [connections / 10, connections / 5, connections / 2, connections] {
        while clients.len() < open {
            clients.push(scene.client(clients.len()));
        }
        // The first time connects.
        for round in 0..2 {
            let before = scene.weir.cpu_time();
            let mut asking = JoinSet::new();
            for mut client in std::mem::take(&mut clients) {
                let scene = scene.clone();
                asking.spawn(async move {
                    let verdict = scene.ask(&mut client).await;
                    (client, verdict)
                });
            }
            let (done, longest) = scene.while_watched(all(asking)).await;
            slowest = slowest.max(longest);
            let (back, of_round): (Vec<_>, Vec<_>) = done.into_iter().unzip();
            clients = back;
            verdicts.extend(of_round);
            if round == 1 {
                let cpu = (scene.weir.cpu_time() - before).as_micros() / open as u128;
                let memory = scene.weir.resident_bytes().saturating_sub(idle) as f64 / 1024.0 / open as f64;
                println!("{open:>11}  {memory:>19.1}  {cpu:>16}");
            }
        }
    }
    let unserved: Vec<_> = verdicts.iter().filter(|verdict| verdict.outcome != Ok(Outcome::Answered(200))).collect();
    assert!(unserved.is_empty(), "{unserved:?}");
    drop(clients);
    scene.recovers(&verdicts, slowest).await;
}
