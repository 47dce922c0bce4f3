//! Delays between retries: exponential, full jitter, capped, reset on success.
//!
//! The n-th delay is uniform in `0..=min(cap, base * 2^n)`, so that many clients that lost the same server do not
//! return together. It only computes; the caller sleeps, and decides whether to retry at all.

use std::time::Duration;

/// The delays of one retry loop.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    ceiling: Duration,
}

impl Backoff {
    /// Starts with delays up to `base`, which double with each failure until `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, ceiling: base.min(cap) }
    }

    /// The delay before the next attempt.
    #[expect(clippy::should_implement_trait, reason = "it never ends, and callers name the act of asking for a delay")]
    pub fn next(&mut self) -> Duration {
        let ceiling = self.ceiling;
        self.ceiling = ceiling.saturating_mul(2).min(self.cap);
        ceiling.mul_f64(rand::random_range(0.0..=1.0))
    }

    /// Begins anew: call it when an attempt succeeded.
    pub fn reset(&mut self) {
        self.ceiling = self.base.min(self.cap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_millis(100);
    const CAP: Duration = Duration::from_secs(5);

    #[test]
    fn delays_stay_under_the_doubling_ceiling_and_the_cap() {
        for _ in 0..100 {
            let mut backoff = Backoff::new(BASE, CAP);
            for attempt in 0..40 {
                let ceiling = BASE.saturating_mul(1 << attempt.min(20)).min(CAP);
                let delay = backoff.next();
                assert!(delay <= ceiling, "attempt {attempt}: {delay:?} > {ceiling:?}");
            }
        }
    }

    #[test]
    fn delays_are_spread_over_the_whole_range() {
        let mut backoff = Backoff::new(CAP, CAP);
        let delays: Vec<Duration> = (0..1000).map(|_| backoff.next()).collect();
        assert!(delays.iter().any(|delay| *delay < CAP / 10));
        assert!(delays.iter().any(|delay| *delay > CAP / 10 * 9));
    }

    #[test]
    fn success_starts_over_from_the_base() {
        let mut backoff = Backoff::new(BASE, CAP);
        for _ in 0..10 {
            backoff.next();
        }
        backoff.reset();
        assert!(backoff.next() <= BASE);
    }

    #[test]
    fn a_base_above_the_cap_is_capped() {
        let mut backoff = Backoff::new(CAP * 2, CAP);
        assert!((0..100).all(|_| backoff.next() <= CAP));
    }
}
