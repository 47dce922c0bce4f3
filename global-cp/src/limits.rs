//! Token buckets: how often somebody may do something, without anybody else being affected.
//!
//! Pure: time comes in with each call. Holds: over any span a bucket gives at most its burst and what its rate makes of
//! that span; a map of buckets never holds more than its bound, and what it forgets is a bucket that is full again, or
//! else the one that has waited longest.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How much, and how much at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rate {
    pub(crate) per_second: f64,
    pub(crate) burst: f64,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Less than zero: others wait for what comes next.
    left: f64,
    /// When it was last filled.
    at: Instant,
    /// When somebody last wanted something of it.
    asked: Instant,
}

/// One bucket for each key.
#[derive(Debug)]
pub(crate) struct Buckets<K> {
    rate: Rate,
    most: usize,
    held: Mutex<BTreeMap<K, Bucket>>,
}

impl Bucket {
    fn fill(&mut self, rate: Rate, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * rate.per_second;
        self.left = (self.left + gained).min(rate.burst);
        self.at = now.max(self.at);
    }
}

impl<K: Ord + Clone> Buckets<K> {
    pub(crate) fn new(rate: Rate, most: usize) -> Self {
        Self { rate, most, held: Mutex::default() }
    }

    /// Takes one, or says how long it takes until there is one.
    pub(crate) fn take(&self, key: &K, now: Instant) -> Result<(), Duration> {
        self.with(key, now, |bucket, rate| {
            if bucket.left >= 1.0 {
                bucket.left -= 1.0;
                return Ok(());
            }
            Err(wait(1.0 - bucket.left, rate))
        })
    }

    /// Takes one that may come later: how long to wait for it. More than `longest` is refused, and nothing taken.
    pub(crate) fn reserve(&self, key: &K, longest: Duration, now: Instant) -> Result<Duration, Duration> {
        self.with(key, now, |bucket, rate| {
            let due = if bucket.left >= 1.0 { Duration::ZERO } else { wait(1.0 - bucket.left, rate) };
            if due > longest {
                return Err(due);
            }
            bucket.left -= 1.0;
            Ok(due)
        })
    }

    fn with<T>(&self, key: &K, now: Instant, act: impl FnOnce(&mut Bucket, Rate) -> T) -> T {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if !held.contains_key(key) && held.len() >= self.most {
            make_room(&mut held, self.rate, now);
        }
        let bucket = held.entry(key.clone()).or_insert(Bucket { left: self.rate.burst, at: now, asked: now });
        bucket.fill(self.rate, now);
        bucket.asked = now;
        act(bucket, self.rate)
    }
}

fn wait(missing: f64, rate: Rate) -> Duration {
    // A rate is never zero by configuration; without that the wait is the longest that there is.
    Duration::try_from_secs_f64(missing / rate.per_second).unwrap_or(Duration::MAX)
}

/// Full buckets are as good as none; if that makes no room, the tenth that was not asked for longest goes, so that a flood
/// of keys does not look for the oldest each time.
fn make_room<K: Ord + Clone>(held: &mut BTreeMap<K, Bucket>, rate: Rate, now: Instant) {
    let before = held.len();
    held.retain(|_, bucket| {
        bucket.fill(rate, now);
        bucket.left < rate.burst
    });
    if held.len() < before {
        return;
    }
    let mut ages: Vec<(Instant, K)> = held.iter().map(|(key, bucket)| (bucket.asked, key.clone())).collect();
    ages.sort_unstable();
    for (_, key) in ages.into_iter().take(before / 10 + 1) {
        held.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RATE: Rate = Rate { per_second: 2.0, burst: 3.0 };

    fn later(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_burst_is_given_at_once_and_then_the_rate() {
        let (buckets, start) = (Buckets::new(RATE, 10), Instant::now());
        for _ in 0..3 {
            buckets.take(&"a", start).unwrap();
        }
        assert_eq!(buckets.take(&"a", start), Err(Duration::from_millis(500)));
        buckets.take(&"b", start).expect("another one is not affected");
        buckets.take(&"a", later(start, 500)).unwrap();
        assert!(buckets.take(&"a", later(start, 500)).is_err());
    }

    #[test]
    fn what_is_reserved_comes_in_turn_and_no_later_than_allowed() {
        let (buckets, start) = (Buckets::new(RATE, 10), Instant::now());
        let longest = Duration::from_secs(1);
        let waits: Vec<_> = (0..7).map(|_| buckets.reserve(&"a", longest, start)).collect();
        let ms = Duration::from_millis;
        assert_eq!(waits[..5], [Ok(ms(0)), Ok(ms(0)), Ok(ms(0)), Ok(ms(500)), Ok(ms(1000))]);
        assert_eq!(waits[5..], [Err(ms(1500)), Err(ms(1500))], "a refusal takes nothing");
    }

    #[test]
    fn a_flood_of_keys_stays_within_the_bound() {
        let (buckets, start) = (Buckets::new(RATE, 100), Instant::now());
        for key in 0..1000_u32 {
            buckets.take(&key, later(start, u64::from(key))).unwrap();
        }
        assert!(buckets.held.lock().unwrap().len() <= 100);
        buckets.take(&999, later(start, 1000)).unwrap();
        buckets.take(&999, later(start, 1000)).unwrap();
        assert!(buckets.take(&999, later(start, 1000)).is_err(), "the latest are remembered");
    }

    proptest! {
        #[test]
        fn no_span_gives_more_than_burst_and_rate(gaps in proptest::collection::vec(0_u64..700, 1..200)) {
            let (buckets, start) = (Buckets::new(RATE, 4), Instant::now());
            let (mut at, mut given) = (0, 0_u32);
            for gap in gaps {
                at += gap;
                given += u32::from(buckets.take(&(), later(start, at)).is_ok());
                prop_assert!(f64::from(given) <= RATE.burst + RATE.per_second * at as f64 / 1000.0 + 1e-6);
            }
        }
    }
}
