//! The table at the end: what the batch came to, and how each model did.

use std::fmt;
use std::time::Duration;

use super::batch::{Batch, SIZE};
use super::scene::MODELS;
use crate::simulator::Stats;

/// What the batch came to.
pub struct Report {
    answers: usize,
    errors: usize,
    /// What the gateway's quota refused.
    refused: u64,
    /// The gateway's faults, by name.
    faults: Vec<(&'static str, u64)>,
    retries: u32,
    took: Duration,
    one_after_another: Duration,
    models: Vec<ModelReport>,
    /// How the first answer begins.
    sample: String,
}

/// How one model did.
struct ModelReport {
    model: &'static str,
    /// The gateway's own time for each answer, sorted.
    gateway: Vec<Duration>,
    /// The client's time for each answer, waiting included, sorted.
    client: Vec<Duration>,
}

impl Report {
    /// Sums up the batch, and what the gateway counted meanwhile.
    pub fn new(batch: &Batch, gateway: &Stats) -> Self {
        let answers = batch.answers().count();
        Self {
            answers,
            errors: SIZE - answers,
            refused: gateway.refused.total(),
            faults: gateway.faults.iter().map(|(name, count)| (*name, *count)).collect(),
            retries: batch.answers().map(|(_, answer)| answer.retries).sum(),
            took: batch.took,
            one_after_another: batch.answers().map(|(_, answer)| answer.gateway).sum(),
            models: MODELS.iter().map(|model| ModelReport::new(batch, model)).collect(),
            sample: batch.answers().next().map_or_else(String::new, |(_, answer)| excerpt(&answer.text)),
        }
    }

    fn faults(&self) -> String {
        let total: u64 = self.faults.iter().map(|(_, count)| count).sum();
        let each: Vec<String> = self.faults.iter().map(|(name, count)| format!("{name} {count}")).collect();
        if each.is_empty() { total.to_string() } else { format!("{total} ({})", each.join(", ")) }
    }
}

impl ModelReport {
    fn new(batch: &Batch, model: &'static str) -> Self {
        let answers = || batch.answers().filter(|(of, _)| *of == model).map(|(_, answer)| answer);
        let (mut gateway, mut client): (Vec<_>, Vec<_>) = answers().map(|answer| (answer.gateway, answer.took)).unzip();
        gateway.sort_unstable();
        client.sort_unstable();
        Self { model, gateway, client }
    }
}

/// The smallest of the values, which are sorted, that at least `percent` of them don't exceed; `None` of none.
fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// The first characters, as many as fit on a line.
fn excerpt(text: &str) -> String {
    const MOST: usize = 70;
    if text.chars().count() <= MOST {
        text.to_owned()
    } else {
        format!("{}…", text.chars().take(MOST).collect::<String>())
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        let rows = [
            ("answers", format!("{}/{SIZE}", self.answers)),
            ("errors seen by the client", self.errors.to_string()),
            ("refused by the gateway's quota", self.refused.to_string()),
            ("faults at the gateway", self.faults()),
            ("retries made by weir", self.retries.to_string()),
            ("time taken", seconds(self.took)),
            ("one after another", format!("{} (the gateway's time, added up)", seconds(self.one_after_another))),
        ];
        for (what, value) in rows {
            writeln!(f, "{what:<32}{value}")?;
        }
        writeln!(f, "\n{:<16}{:>20}  {:>20}", "seconds", "at the gateway", "with the queue")?;
        write!(f, "{:<16}{:>10}{:>10}  {:>10}{:>10}", "model", "p50", "p95", "p50", "p95")?;
        self.models.iter().try_for_each(|model| write!(f, "\n{model}"))?;
        if self.sample.is_empty() { Ok(()) } else { write!(f, "\n\nThe first answer: {}", self.sample) }
    }
}

impl fmt::Display for ModelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figure = |sorted: &[Duration], percent| {
            percentile(sorted, percent).map_or("-".to_owned(), |time| format!("{:.2}", time.as_secs_f64()))
        };
        let [p50, p95] = [50, 95].map(|percent| figure(&self.gateway, percent));
        let [client_p50, client_p95] = [50, 95].map(|percent| figure(&self.client, percent));
        write!(f, "{:<16}{p50:>10}{p95:>10}  {client_p50:>10}{client_p95:>10}", self.model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let ten: Vec<Duration> = (1..=10).map(ms).collect();
        assert_eq!(
            [1, 50, 51, 95, 100].map(|percent| percentile(&ten, percent)),
            [1, 5, 6, 10, 10].map(|n| Some(ms(n)))
        );
        assert_eq!(percentile(&[ms(7)], 50), Some(ms(7)));
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn the_table_is_aligned_also_where_a_model_has_no_answer() {
        let models = vec![
            ModelReport { model: MODELS[0], gateway: vec![ms(900), ms(1500)], client: vec![ms(2000), ms(6100)] },
            ModelReport { model: MODELS[1], gateway: Vec::new(), client: Vec::new() },
        ];
        let report = Report {
            answers: 2,
            errors: 18,
            refused: 0,
            faults: vec![("503", 2), ("error-event", 1)],
            retries: 3,
            took: ms(6140),
            one_after_another: ms(20_000),
            models,
            sample: "good".to_owned(),
        };
        let expected = "
answers                         2/20
errors seen by the client       18
refused by the gateway's quota  0
faults at the gateway           3 (503 2, error-event 1)
retries made by weir            3
time taken                      6.1 s
one after another               20.0 s (the gateway's time, added up)

seconds               at the gateway        with the queue
model                  p50       p95         p50       p95
gpt-4.1-mini          0.90      1.50        2.00      6.10
deepseek-chat            -         -           -         -

The first answer: good";
        assert_eq!(report.to_string(), expected);
    }
}
