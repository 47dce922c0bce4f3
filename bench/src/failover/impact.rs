//! What a fault did to the load: counts, the time to the last affected request, and a time line.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;
use tokio::time::Instant;

use super::load::{Outcome, Sample};

/// A request is called affected when it failed or took longer than this.
pub(super) const SLOW: Duration = Duration::from_millis(250);
/// Width of a slot of the time line.
const SLOT_MS: i64 = 100;
/// How much of the time before the fault the time line shows.
const LEAD_MS: i64 = 2_000;

/// One fault's effect.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Impact {
    /// Requests that ended after the fault.
    pub(super) requests: usize,
    pub(super) failed: usize,
    /// Served, but later than [`SLOW`].
    pub(super) slow: usize,
    /// From the fault to the end of the last request that failed or was slow; 0 if none was.
    pub(super) last_affected_ms: u64,
    /// False: still affected when the benchmark stopped looking, so that the figure above is a lower bound.
    pub(super) settled: bool,
    /// Affected requests in the two seconds before the fault: what this machine does of itself.
    pub(super) affected_before: usize,
    pub(super) max_ms: u64,
    /// Cluster → requests it served.
    pub(super) served: BTreeMap<String, usize>,
    /// Why requests failed → how many.
    pub(super) reasons: BTreeMap<String, usize>,
    pub(super) timeline: Vec<Slot>,
}

/// 100 ms of the time line: requests that were due in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Slot {
    /// Its start, from the fault.
    pub(super) at_ms: i64,
    pub(super) ok: usize,
    pub(super) slow: usize,
    pub(super) failed: usize,
    pub(super) max_ms: u64,
}

/// Failed or slow.
pub(super) fn is_affected(sample: &Sample) -> bool {
    matches!(sample.outcome, Outcome::Failed(_)) || sample.took > SLOW
}

impl Impact {
    pub(super) fn of(samples: &[Sample], fault: Instant, settled: bool) -> Self {
        let mut impact = Self {
            requests: 0,
            failed: 0,
            slow: 0,
            last_affected_ms: 0,
            settled,
            affected_before: 0,
            max_ms: 0,
            served: BTreeMap::new(),
            reasons: BTreeMap::new(),
            timeline: vec![],
        };
        let mut slots: BTreeMap<i64, Slot> = BTreeMap::new();
        for sample in samples {
            let at_ms = signed_ms(sample.due, fault);
            if at_ms >= -LEAD_MS {
                let slot = slots.entry(at_ms.div_euclid(SLOT_MS)).or_default();
                slot.add(sample);
            }
            let Some(end) = (sample.due + sample.took).checked_duration_since(fault) else {
                impact.affected_before += usize::from(at_ms >= -LEAD_MS && is_affected(sample));
                continue;
            };
            impact.add(sample, end);
        }
        impact.timeline = slots.into_iter().map(|(n, slot)| Slot { at_ms: n * SLOT_MS, ..slot }).collect();
        impact
    }

    fn add(&mut self, sample: &Sample, end: Duration) {
        self.requests += 1;
        self.max_ms = self.max_ms.max(ms(sample.took));
        match &sample.outcome {
            Outcome::Served(cluster) => {
                *self.served.entry(cluster.clone()).or_default() += 1;
                self.slow += usize::from(sample.took > SLOW);
            }
            Outcome::Failed(reason) => {
                *self.reasons.entry(reason.clone()).or_default() += 1;
                self.failed += 1;
            }
        }
        if is_affected(sample) {
            self.last_affected_ms = self.last_affected_ms.max(ms(end));
        }
    }
}

impl Slot {
    fn add(&mut self, sample: &Sample) {
        match sample.outcome {
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Served(_) if sample.took > SLOW => self.slow += 1,
            Outcome::Served(_) => self.ok += 1,
        }
        self.max_ms = self.max_ms.max(ms(sample.took));
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn signed_ms(at: Instant, origin: Instant) -> i64 {
    let far = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
    // Before the origin a part of a millisecond counts as a whole one, so that slot −1 ends at the fault.
    at.checked_duration_since(origin).map_or_else(|| -far(origin - at) - 1, far)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_fault_catches_under_way_is_its_own_and_what_ended_before_is_not() {
        let fault = Instant::now() + Duration::from_secs(10);
        let sample = |before_ms: i64, took_ms, failed: Option<&str>| Sample {
            due: if before_ms < 0 {
                fault + Duration::from_millis(before_ms.unsigned_abs())
            } else {
                fault - Duration::from_millis(before_ms.unsigned_abs())
            },
            took: Duration::from_millis(took_ms),
            outcome: failed.map_or(Outcome::Served("b".to_owned()), |f| Outcome::Failed(f.to_owned())),
        };
        let samples = [
            sample(500, 10, None),
            sample(500, 300, Some("earlier")),
            sample(5, 10, Some("under way")),
            sample(-40, 300, None),
            sample(-400, 20, None),
        ];
        let impact = Impact::of(&samples, fault, true);
        assert_eq!((impact.requests, impact.failed, impact.slow, impact.affected_before), (3, 1, 1, 1));
        assert_eq!(impact.last_affected_ms, 340, "the slow one ends 340 ms after the fault");
        assert_eq!(impact.reasons.keys().collect::<Vec<_>>(), ["under way"]);
        let slots: Vec<_> = impact.timeline.iter().map(|s| (s.at_ms, s.ok, s.slow, s.failed)).collect();
        assert_eq!(slots, [(-600, 1, 0, 1), (-100, 0, 0, 1), (0, 0, 1, 0), (400, 1, 0, 0)]);
    }
}
