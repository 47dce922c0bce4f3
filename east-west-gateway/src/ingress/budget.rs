//! How many replays are allowed: a share of the recent new connections, and a floor. Sans-IO.
//!
//! When a whole cluster browns out, every connection would be tried again elsewhere and the load on what still works
//! would multiply; the budget caps that. The floor is generous, so that a lone failure is always replayed.

use std::time::{Duration, Instant};

/// A token bucket fed by new connections and by time.
#[derive(Debug)]
pub(crate) struct ReplayBudget {
    ratio: f64,
    floor: f64,
    tokens: f64,
    cap: f64,
    updated: Instant,
}

/// How long unused tokens are kept.
const MEMORY: Duration = Duration::from_secs(10);
/// At least so many are, or a share without a floor could never make up a whole one.
const LEAST: f64 = 10.0;

impl ReplayBudget {
    /// `percent` of new connections, plus `floor_per_second`.
    pub(crate) fn new(percent: u32, floor_per_second: u32, now: Instant) -> Self {
        let floor = f64::from(floor_per_second);
        let cap = (floor * MEMORY.as_secs_f64()).max(LEAST);
        Self { ratio: f64::from(percent) / 100.0, floor, tokens: floor, cap, updated: now }
    }

    /// A new connection is being tried for the first time.
    pub(crate) fn deposit(&mut self) {
        self.tokens = (self.tokens + self.ratio).min(self.cap);
    }

    /// May one connection be tried once more?
    pub(crate) fn withdraw(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.updated).as_secs_f64();
        self.updated = self.updated.max(now);
        self.tokens = (self.tokens + passed * self.floor).min(self.cap);
        let allowed = self.tokens >= 1.0;
        if allowed {
            self.tokens -= 1.0;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_allows_replays_without_any_history() {
        let now = Instant::now();
        let mut budget = ReplayBudget::new(20, 50, now);
        assert_eq!((0..1000).filter(|_| budget.withdraw(now)).count(), 50);
        assert!(budget.withdraw(now + Duration::from_millis(20)));
        assert!(!budget.withdraw(now + Duration::from_millis(20)));
    }

    #[test]
    fn a_brown_out_is_amplified_by_the_ratio_at_most() {
        let start = Instant::now();
        let mut budget = ReplayBudget::new(20, 50, start);
        let mut replays = 0;
        for i in 0..10_000_u32 {
            budget.deposit();
            let now = start + Duration::from_micros(100) * i;
            replays += u32::from(budget.withdraw(now));
        }
        // One second: 20 % of 10,000, 50 from the floor, 50 to begin with.
        assert!((2_050..=2_110).contains(&replays), "{replays}");
    }

    #[test]
    fn without_a_floor_the_share_stands_and_without_either_nothing_is_replayed() {
        let now = Instant::now();
        for (percent, expected) in [(20, 20), (100, 100), (0, 0)] {
            let mut budget = ReplayBudget::new(percent, 0, now);
            let replays = (0..100).filter(|_| {
                budget.deposit();
                budget.withdraw(now)
            });
            let replays = replays.count();
            assert!(replays.abs_diff(expected) <= 1, "{percent} %: {replays}");
        }
    }

    #[test]
    fn time_running_backwards_gives_nothing() {
        let now = Instant::now() + Duration::from_secs(1);
        let mut budget = ReplayBudget::new(0, 1, now);
        assert!(budget.withdraw(now));
        assert!(!budget.withdraw(now - Duration::from_millis(500)));
        assert!(!budget.withdraw(now));
    }
}
