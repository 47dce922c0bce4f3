//! Medians, and what they say about a goal.

use serde::{Deserialize, Serialize};

/// The middle value; the mean of the two middle ones of an even number. `None` for nothing, or where a value is no number.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    if sorted.is_empty() || sorted.iter().any(|v| !v.is_finite()) {
        return None;
    }
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.get((sorted.len() - 1) / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Better {
    /// Latency, memory.
    Lower,
    /// Throughput.
    Higher,
}

impl Better {
    /// The best of several, with its name.
    pub(crate) fn best<'a>(self, of: impl IntoIterator<Item = (&'a str, f64)>) -> Option<(&'a str, f64)> {
        of.into_iter().reduce(|a, b| if self.at_least_as_good(a.1, b.1) { a } else { b })
    }

    /// `ratio`, ours to the rival's, keeps to `goal`.
    pub(crate) fn holds(self, ratio: f64, goal: f64) -> bool {
        self.at_least_as_good(ratio, goal)
    }

    fn at_least_as_good(self, a: f64, b: f64) -> bool {
        match self {
            Self::Lower => a <= b,
            Self::Higher => a >= b,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn the_best_rival_is_the_smallest_latency_and_the_largest_throughput() {
        let rivals = [("h2", 2.0), ("h3", 3.0)];
        assert_eq!(Better::Lower.best(rivals), Some(("h2", 2.0)));
        assert_eq!(Better::Higher.best(rivals), Some(("h3", 3.0)));
        assert_eq!(Better::Lower.best([]), None);
    }

    #[test]
    fn a_goal_holds_at_its_limit_and_not_beyond() {
        assert!(Better::Lower.holds(0.5, 0.5) && !Better::Lower.holds(0.51, 0.5));
        assert!(Better::Higher.holds(1.5, 1.5) && !Better::Higher.holds(1.49, 1.5));
        assert!(!Better::Higher.holds(f64::NAN, 1.5));
    }
}
