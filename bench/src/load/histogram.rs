//! A histogram of durations with a relative error below 1 %, whatever their size.
//!
//! Buckets are logarithmic: 128 to each doubling, from 1 ns to 2^40 ns (18 minutes). What is recorded is never lost: longer
//! durations count as the longest.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets to each doubling, as a power of two.
const PRECISION: u32 = 7;
const SUB: u64 = 1 << PRECISION;
/// Doublings beyond the first [`SUB`] values, which have buckets of their own.
const DOUBLINGS: u64 = 40 - PRECISION as u64;

/// Counts of durations.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    total: u64,
    longest: u64,
    sum: u128,
}

/// What is told of a histogram, in microseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Summary {
    pub(crate) count: u64,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = usize::try_from((DOUBLINGS + 1) * SUB).unwrap_or(0);
        Self { counts: vec![0; buckets], total: 0, longest: 0, sum: 0 }
    }
}

impl Histogram {
    pub(crate) fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let last = self.counts.len() - 1;
        if let Some(count) = self.counts.get_mut(bucket(nanos).min(last)) {
            *count += 1;
        }
        self.total += 1;
        self.longest = self.longest.max(nanos);
        self.sum += u128::from(nanos);
    }

    pub(crate) fn count(&self) -> u64 {
        self.total
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.longest = self.longest.max(other.longest);
        self.sum += other.sum;
    }

    /// The duration that a share `q` of all does not exceed, in nanoseconds; zero if there are none.
    fn quantile(&self, q: f64) -> u64 {
        let wanted = ((self.total as f64 * q).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return highest(index).min(self.longest);
            }
        }
        self.longest
    }

    pub(crate) fn summary(&self) -> Summary {
        let micros = |nanos: u64| nanos as f64 / 1e3;
        Summary {
            count: self.total,
            mean: self.sum as f64 / self.total.max(1) as f64 / 1e3,
            p50: micros(self.quantile(0.5)),
            p90: micros(self.quantile(0.9)),
            p99: micros(self.quantile(0.99)),
            p999: micros(self.quantile(0.999)),
            max: micros(self.longest),
        }
    }
}

fn bucket(nanos: u64) -> usize {
    let doubling = (64 - nanos.leading_zeros()).saturating_sub(PRECISION + 1);
    let index = u64::from(doubling) * SUB + (nanos >> doubling);
    usize::try_from(index).unwrap_or(usize::MAX)
}

/// The longest duration that falls into bucket `index`.
fn highest(index: usize) -> u64 {
    let index = index as u64;
    let doubling = (index >> PRECISION).saturating_sub(1);
    ((index - doubling * SUB + 1) << doubling) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_found_within_one_per_cent() {
        for nanos in (0..1_000).chain((0..39).flat_map(|e| [1 << e, (1 << e) + 1, (1 << e) * 3 / 2])) {
            let found = highest(bucket(nanos));
            assert!(found >= nanos, "{nanos} became {found}");
            assert!(found as f64 <= nanos as f64 * 1.01 + 1.0, "{nanos} became {found}");
        }
    }

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for index in 0..(DOUBLINGS as usize) * SUB as usize {
            assert_eq!(bucket(highest(index)), index);
            assert_eq!(bucket(highest(index) + 1), index + 1);
        }
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let mut histogram = Histogram::default();
        let mut other = Histogram::default();
        for micros in 1..=1_000 {
            let half = if micros % 2 == 0 { &mut histogram } else { &mut other };
            half.record(Duration::from_micros(micros));
        }
        histogram.merge(&other);
        let summary = histogram.summary();
        assert_eq!(summary.count, 1_000);
        for (found, expected) in [
            (summary.p50, 500.0),
            (summary.p99, 990.0),
            (summary.p999, 999.0),
            (summary.max, 1_000.0),
            (summary.mean, 500.5),
        ] {
            assert!((found / expected - 1.0).abs() < 0.01, "{found} is not {expected}");
        }
    }

    #[test]
    fn an_hour_is_not_lost() {
        let mut histogram = Histogram::default();
        histogram.record(Duration::from_secs(3_600));
        assert_eq!(histogram.summary().count, 1);
        assert!(histogram.summary().p50 > 1e9);
    }
}
