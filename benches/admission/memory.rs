//! What one who waits takes of memory, its body aside: the growth of the process with 200,000 of them.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::sync::oneshot;
use weir::admission::{Applicant, Gate, Lane, Permit, Rank, Refusal};
use weir::clients::Tenant;
use weir::config::{Config, Weight};
use weir::models::Models;

use crate::scene::{COST, HeldUpBy, MAX_WAIT, Scene, clients};

const WAITERS: usize = 200_000;

/// What is measured has a process of its own, since freed memory is used again.
pub fn measure(what: &str) {
    match what {
        "queue" => queue(),
        "gate" => gate(),
        _ => println!("usage: --memory queue | --memory gate"),
    }
}

/// The queue and the channel by which the gate wakes a waiter, both of its ends.
fn queue() {
    for tenants in [1, 1000] {
        let mut scene: Scene<oneshot::Sender<Result<Permit, Refusal>>> = Scene::new(HeldUpBy::Slots, tenants, 1);
        scene.fill(1000, || oneshot::channel().0);
        let mut turns = Vec::with_capacity(WAITERS);
        turns.resize_with(WAITERS, || None);
        let before = resident_bytes();
        for place in &mut turns {
            let (wake, turn) = oneshot::channel();
            scene.arrive(wake);
            *place = Some(turn);
        }
        report(&format!("queue and channel, {tenants} tenants"), before);
        // Still there for the next, which must not find freed memory.
        std::thread::spawn(move || (scene.waiting(), turns.len(), std::thread::park()));
    }
}

/// The whole future of a request that waits, timer and all, as weir's own future of the request has it inside.
fn gate() {
    let config = format!("[limits]\nconcurrency = 1\n[queue]\nmax_waiting = {}\n", 2 * WAITERS);
    let config = Config::parse(&config, &|_| None).expect("a good configuration");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let _inside = runtime.enter();
    let models = Arc::new(Models::new(["m"]));
    let gate = Gate::open(&config, models.clone(), &clients(0, ""));
    let until = tokio::time::Instant::now() + MAX_WAIT;
    let applicants: Vec<Applicant> = (0..WAITERS as u64)
        .map(|rank| Applicant {
            tenant: Tenant::Shared,
            weight: Weight::ONE,
            lane: Lane { credential: 0, model: models.find("m") },
            rank: Rank(rank),
            size: None,
            cost: COST,
            max_wait: MAX_WAIT,
            until,
        })
        .collect();
    let first = pin!(gate.admit(&applicants[0], false));
    let mut context = Context::from_waker(Waker::noop());
    let first = first.poll(&mut context);
    assert!(matches!(first, Poll::Ready(Ok(_))), "the first has the slot");
    let mut waiting = Vec::with_capacity(WAITERS);
    let before = resident_bytes();
    for who in &applicants {
        let mut request = Box::pin(gate.admit(who, false));
        assert!(request.as_mut().poll(&mut context).is_pending(), "the others wait");
        waiting.push(request);
    }
    let size = std::mem::size_of_val(&*waiting[0]);
    report(&format!("gate, the future of {size} bytes included"), before);
}

fn report(what: &str, before: usize) {
    println!("{what}: {} bytes for each of {WAITERS} who wait", (resident_bytes() - before) / WAITERS);
}

fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    let kibibytes: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kibibytes * 1024
}
