//! One scenario, told in words, with what happens in it: for those who want to know why.

use crate::gateway::{Hints, Settings, Shape};
use crate::world::{Load, oracle, play};

/// `WEIR_SCENARIO="bucket=50,5 hints=none answer=0.3,0.3 network=0.005 seed=1 requests=500"`, with `WEIR_TRACE=1` for a
/// timeline.
#[test]
fn replay() {
    let Ok(words) = std::env::var("WEIR_SCENARIO") else { return };
    let (settings, load) = scenario(&words);
    let best = oracle(&settings, &load);
    let ours = play(&settings, &load);
    println!(
        "{words}\nratio {:.3} ({best:.1} s / {:.1} s), refusals {:.4} ({}), errors {}, attempts {}",
        best / ours.time,
        ours.time,
        ours.refusals_per_request(),
        ours.refusals,
        ours.errors,
        ours.attempts
    );
}

fn scenario(words: &str) -> (Settings, Load) {
    let (mut settings, mut load) = (Settings::default(), Load::default());
    for word in words.split_whitespace() {
        let (name, value) = word.split_once('=').expect("name=value");
        let numbers: Vec<f64> = value.split(',').filter_map(|number| number.parse().ok()).collect();
        match name {
            "bucket" => settings.requests = Some(Shape::Bucket { rate: numbers[0], burst: numbers[1] }),
            "fixed" => settings.requests = Some(Shape::Fixed { count: numbers[0], period: numbers[1], phase: numbers[2] }),
            "sliding" => settings.requests = Some(Shape::Sliding { count: numbers[0], period: numbers[1] }),
            "tokens" => settings.tokens = Some(Shape::Bucket { rate: numbers[0], burst: numbers[1] }),
            "cap" => settings.cap = Some(numbers[0] as u32),
            "cap_moves" => settings.cap_moves = Some((numbers[0], numbers[1] as u32)),
            "outage" => settings.outage = Some(numbers[0]..numbers[1]),
            "faults" => settings.faults = [numbers[0], numbers[1], numbers[2]],
            "hints" => {
                settings.hints = match value {
                    "none" => Hints::None,
                    "retry-after" => Hints::RetryAfter,
                    _ => Hints::OpenAi,
                }
            }
            "answer" => settings.answer = (numbers[0], numbers[1]),
            "network" => settings.network = numbers[0],
            "charge" => settings.charge = numbers[0],
            "shared" => settings.shared = numbers[0] > 0.0,
            "seed" => settings.seed = numbers[0] as u64,
            "requests" => load.requests = numbers[0] as usize,
            "rate" => load.rate = numbers[0],
            "models" => load.models = numbers[0] as usize,
            "estimate" => load.estimate = numbers[0] as u64,
            other => panic!("no {other}"),
        }
    }
    (settings, load)
}
