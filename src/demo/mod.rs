//! `weir demo`: a simulated gateway, weir in front of it, and a batch of requests through both, on one machine.
//!
//! What a newcomer wants to see before believing anything: twenty requests sent at once to a gateway that has a quota and
//! fails now and then, and twenty answers. Nothing here is staged but the gateway: the client, the connections and weir
//! are real. The gateway's seed is chosen such that it fails four of the first requests that reach it, each in another
//! way: too few for one request to meet with more faults than weir retries.

mod batch;
mod client;
mod report;
mod scene;

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use report::Report;
use scene::{Scene, Stage};

/// Why the demo is over before its end.
#[derive(Debug, PartialEq, Eq)]
enum Broken {
    /// Who read what it prints has seen enough, as in `weir demo | head`.
    ReaderLeft,
    Failed(String),
}

impl From<String> for Broken {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

/// Does what `weir demo` does: the batch, its table, and then it serves until Ctrl-C, or ends at once if `exit`. It also ends
/// when nobody reads any more what it prints.
///
/// # Errors
/// That something could not be started or printed, or that a request was not answered.
pub async fn run(exit: bool) -> Result<(), String> {
    let (scene, mut out) = (Scene::demo(), std::io::stdout());
    tokio::select! {
        ended = play(&scene, exit, &mut out) => match ended {
            Ok(()) | Err(Broken::ReaderLeft) => Ok(()),
            Err(Broken::Failed(why)) => Err(why),
        },
        interrupted = tokio::signal::ctrl_c() => interrupted.map_err(|error| format!("cannot wait for Ctrl-C: {error}")),
    }
}

/// The demo, from the first line it prints to the last.
async fn play(scene: &Scene, exit: bool, out: &mut impl Write) -> Result<(), Broken> {
    let stage = Stage::set(scene).await?;
    say(out, introduction(scene, &stage))?;
    let batch = batch::run(stage.address, out).await?;
    say(out, Report::new(&batch, &stage.simulator.stats()))?;
    batch.all_answered()?;
    if !exit {
        say(out, invitation(&stage))?;
        std::future::pending::<()>().await;
    }
    Ok(())
}

fn say(out: &mut impl Write, what: impl Display) -> Result<(), Broken> {
    writeln!(out, "{what}").and_then(|()| out.flush()).map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => Broken::ReaderLeft,
        _ => Broken::Failed(format!("cannot write to stdout: {error}")),
    })
}

fn introduction(scene: &Scene, stage: &Stage) -> String {
    let config = stage.config.trim_end().replace('\n', "\n  ").replace("\n  \n", "\n\n");
    format!(
        "A simulated gateway on http://{gateway}/v1: {quota},\n\
         and about one request in ten fails, in one of four ways.\n\
         weir in front of it on http://{weir}/v1, with this configuration:\n\n  {config}\n\n\
         {count} product reviews to {models}, all at once, every second pair as streams.\n",
        gateway = stage.gateway,
        quota = scene.quota_in_words(),
        weir = stage.address,
        count = batch::SIZE,
        models = scene::MODELS.join(" and "),
    )
}

/// How to go on by hand. Python minds its indentation, so nothing is indented.
fn invitation(stage: &Stage) -> String {
    let [model, other_model] = scene::MODELS;
    format!(
        r#"
weir still serves. Try it:

curl http://{weir}/v1/chat/completions -H 'content-type: application/json' -d '{{"model":"{model}","messages":[{{"role":"user","content":"배송이 빠르고 포장도 꼼꼼해요."}}]}}'

With Python (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="http://{weir}/v1", api_key="any")
messages = [{{"role": "user", "content": "소리는 좋은데 배터리가 아쉬워요."}}]
answer = client.chat.completions.create(model="{other_model}", messages=messages)
print(answer.choices[0].message.content)

Metrics: http://{admin}/metrics
Ctrl-C ends it."#,
        weir = stage.address,
        admin = stage.admin_address,
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::simulator::{Fault, Settings};

    /// The demo's gateway and its faults, without its slowness.
    fn fast(faults: Vec<(Fault, f64)>) -> Scene {
        let demo = Scene::demo();
        let gateway = Settings {
            first_token: Duration::ZERO,
            per_token: Duration::ZERO,
            fault_hint: Duration::from_millis(10),
            faults,
            requests: None,
            ..demo.gateway
        };
        Scene { gateway, requests: r#""6000/min""#, base_delay: "10ms", ports: &[(0, 0)] }
    }

    #[tokio::test]
    async fn every_request_is_answered_with_its_own_answer_though_the_gateway_fails() {
        let stage = Stage::set(&fast(Scene::demo().gateway.faults)).await.expect("a stage");
        let batch = batch::run(stage.address, &mut Vec::new()).await.expect("a batch");
        assert_eq!(batch.all_answered(), Ok(()));
        assert_eq!(batch.finished.len(), batch::SIZE);
        for finished in &batch.finished {
            let answer = finished.outcome.as_ref().expect("an answer");
            let quoted: String = batch::question(finished.number).prompt.chars().take(16).collect();
            assert!(answer.text.contains(&quoted), "{}", answer.text);
        }
        // An error event befalls streams only, so there are three or four.
        let faults = stage.simulator.stats().faults;
        assert!((3..=4).contains(&faults.values().sum::<u64>()), "{faults:?}");
    }

    #[tokio::test]
    async fn it_ends_well_with_a_table_that_shows_no_error() {
        let mut out = Vec::new();
        assert_eq!(play(&fast(Scene::demo().gateway.faults), true, &mut out).await, Ok(()));
        let told = String::from_utf8(out).expect("text");
        assert!(told.contains("20/20") && told.contains("concurrency = 5"), "{told}");
    }

    #[tokio::test]
    async fn it_says_so_when_requests_are_not_answered() {
        let mut out = Vec::new();
        // No retry helps there; with another fault the test would last until weir gives up.
        let failed = play(&fast(vec![(Fault::InsufficientQuota, 1.0)]), true, &mut out).await;
        let Err(Broken::Failed(why)) = failed else { panic!("{failed:?}") };
        assert!(why.contains("20 of 20") && why.contains("429"), "{why}");
        assert!(String::from_utf8(out).expect("text").contains("0/20"));
    }

    #[tokio::test]
    async fn taken_ports_are_replaced_by_free_ones() {
        let taken = |listener: &std::net::TcpListener| listener.local_addr().expect("an address").port();
        let [one, two] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").expect("a port"));
        let ports: &[(u16, u16)] = Box::leak(Box::new([(taken(&one), taken(&two)), (0, taken(&two)), (0, 0)]));
        let stage = Stage::set(&Scene { ports, ..fast(Vec::new()) }).await.expect("a stage");
        assert!(stage.config.contains(&format!("listen = \"{}\"", stage.address)), "{}", stage.config);
        let told = invitation(&stage);
        assert!(told.contains(&stage.address.to_string()) && told.contains(&stage.admin_address.to_string()), "{told}");
    }
}
