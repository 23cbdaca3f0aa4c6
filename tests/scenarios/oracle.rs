//! A client that knows the gateway: it sends each request when it is due, and is never refused.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::gateway::Gateway;
use super::load::Job;
use super::scenario::{Nanos, Scenario};

/// When it has all its answers.
///
/// Each lane of the gateway is served in the order of arrival. Within a cap there are always as many under way as it allows,
/// counted as a client can: from the sending to the last byte.
pub fn finishes(scenario: &Scenario, jobs: &[Job]) -> Nanos {
    let mut last = 0;
    let way = scenario.network.0.midpoint(scenario.network.1);
    for lane in 0..scenario.keys as usize * if scenario.per_model { scenario.models as usize } else { 1 } {
        // A gateway of its own for each lane, since changes are told in the order of time.
        let mut gateway = Gateway::new(scenario);
        let (mut reaches, mut under_way) = (0, BinaryHeap::new());
        for job in jobs {
            if gateway.lane(job.key, job.model) != lane {
                continue;
            }
            let charge = job.charge(scenario);
            reaches = gateway.earliest(lane, charge, reaches.max(job.arrives + way), |cap, at| {
                while under_way.peek().is_some_and(|Reverse(ends)| ends + way <= at) {
                    under_way.pop();
                }
                let full = cap.is_some_and(|cap| under_way.len() >= cap as usize);
                full.then(|| under_way.peek().map_or(Nanos::MAX / 2, |Reverse(ends): &Reverse<Nanos>| ends + way))
            });
            gateway.take(lane, charge, reaches);
            let ends = reaches + job.answer + job.body + way;
            under_way.push(Reverse(ends));
            last = last.max(ends);
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;
    use crate::scenario::SECOND;

    /// In seconds, where each answer takes one second and the way there and back a fifth of one.
    fn takes(line: &str) -> f64 {
        let scenario: Scenario = format!("{line} answer=1 spread=0 network=0.1..0.1").parse().expect("a scenario");
        finishes(&scenario, &load::jobs(&scenario)) as f64 / SECOND as f64
    }

    #[test]
    fn it_sends_each_request_when_it_is_due() {
        assert_eq!(takes("requests=30"), 1.2, "nothing holds it up");
        assert_eq!(takes("requests=30 quota=bucket:600/60:10"), 1.2 + 2.0);
        assert_eq!(takes("requests=30 quota=fixed:10/5:0"), 10.0 + 1.1);
        assert_eq!(takes("requests=30 cap=10"), 3.6);
        assert_eq!(takes("requests=30 cap=10 changes=2:cap=20"), 3.1, "the new cap is used at once");
        assert_eq!(takes("requests=30 quota=bucket:600/60:10 outage=0.5..4.5:error"), 6.3);
        assert_eq!(takes("requests=3 arrivals=every:2"), 4.0 + 1.2);
    }
}
