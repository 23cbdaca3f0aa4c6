//! Mixed requests through a weir whose gateway fails in every way it can think of, and whose clients leave when they like.
//!
//! `WEIR_FAULT_REQUESTS=100000 cargo test --release --test strength faults` asks for more, `WEIR_FAULT_SEED=17` for others.

use std::sync::Arc;
use std::time::Duration;

use crate::gateway::Gateway;
use crate::load::{Load, Until};
use crate::plan::Plan;
use crate::promises::{Outcome, Story, Verdict};
use crate::weir::{Metrics, Weir, setting};

const CLIENTS: usize = 96;

/// Of fewer requests memory tells little.
const ENOUGH_FOR_MEMORY: u64 = 20_000;

/// What the second half of the requests may add to memory. The allocator keeps some of what large answers to slow readers have
/// taken at once; of 100,000 requests a leak of 700 bytes in each is more.
const MEMORY_GROWTH: u64 = 32 << 20;

/// Short timeouts, so that a gateway that stalls does not hold the test up.
pub const CONFIG: &str = "
[queue]
max_wait = \"8s\"
[retry]
base_delay = \"5ms\"
max_delay = \"40ms\"
[timeouts]
connect = \"1s\"
first_event = \"1s\"
response = \"1s\"
idle = \"1s\"
deadline = \"8s\"
[models.\"gpt-4.1-mini\"]
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_gateway_does_every_request_has_one_right_answer_or_a_visible_failure() {
    let requests = setting("WEIR_FAULT_REQUESTS", 1500);
    let plan = Plan::faulty(setting("WEIR_FAULT_SEED", 1));
    let clock = Arc::default();
    let gateway = Gateway::start(plan, Arc::clone(&clock));
    let weir = Weir::start(gateway.address, CONFIG);
    let load = Load::new(weir.address, plan, clock);
    let before = weir.holds_nothing().await;
    let descriptors = weir.descriptors();

    let mut verdicts = load.run(CLIENTS, Duration::ZERO, Until::Request(requests / 2)).await;
    let half_way = weir.resident_bytes();
    verdicts.extend(load.run(CLIENTS, Duration::ZERO, Until::Request(requests)).await);
    let metrics = weir.holds_nothing().await;
    let in_the_end = weir.resident_bytes();

    let attempts = gateway.take_attempts();
    let story = Story::new(&verdicts, &attempts);
    println!("{}", story.summary());
    println!("memory half way: {} KiB, in the end: {} KiB", half_way >> 10, in_the_end >> 10);
    assert_none(&[story.wrong(), gateway.wrong(), weir.said()].concat());
    assert_eq!(verdicts.len() as u64, requests);
    assert!(story.spoiled(plan) * 100 <= verdicts.len(), "{} good answers were spoiled", story.spoiled(plan));
    everyone_is_counted(&before, &metrics, &verdicts);
    if requests >= ENOUGH_FOR_MEMORY {
        assert!(in_the_end <= half_way + MEMORY_GROWTH, "memory grew from {half_way} to {in_the_end} bytes");
    }

    gateway.close_idle();
    let given_back = |weir: &Weir, _: &Metrics| weir.descriptors() <= descriptors;
    weir.comes_to("every descriptor is given back", given_back).await;
}

/// Whoever hung up may have done so before weir had its request.
fn everyone_is_counted(before: &Metrics, after: &Metrics, verdicts: &[Verdict]) {
    let counted = after.sum("weir_requests_total") - before.sum("weir_requests_total");
    let stayed = verdicts.iter().filter(|verdict| verdict.outcome != Ok(Outcome::HungUp)).count() as f64;
    let all = verdicts.len() as f64;
    assert!((stayed..=all).contains(&counted), "{counted} counted, {stayed} of {all} stayed");
}

/// Names the first of what was wrong.
pub fn assert_none(wrong: &[String]) {
    let first: Vec<&str> = wrong.iter().take(10).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} things were wrong, the first of them:\n{}\n", wrong.len(), first.join("\n"));
}
