//! Which of many alike attempts are written down one by one, and which are only counted.
//!
//! Pure: time comes in with each call. Holds: each attempt is either told to be written or is in a count that
//! [`Sampler::drain`] gives out once; what is kept is bounded in keys, and what comes beyond them is counted together.

use std::{collections::BTreeMap, time::Duration};

use isthmus_model::time::Timestamp;

/// The span that is looked at.
pub(super) const WINDOW: Duration = Duration::from_secs(60);
/// Written one by one, per span and key.
pub(super) const WRITTEN: u32 = 20;
/// Keys at one time.
const MAX_KEYS: usize = 1024;
/// Who is counted together beyond them.
const OTHERS: &str = "(others)";

/// What became of attempts, and whose they were.
pub(super) type Key = (&'static str, String);

#[derive(Debug, Default)]
pub(super) struct Sampler {
    began: Timestamp,
    seen: BTreeMap<Key, Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    written: u32,
    counted: u64,
}

impl Sampler {
    /// Is this attempt to be written? If not, it is counted.
    pub(super) fn takes(&mut self, (outcome, who): Key, now: Timestamp) -> bool {
        if self.seen.is_empty() {
            self.began = now;
        }
        let known = self.seen.contains_key(&(outcome, who.clone()));
        let who = if known || self.seen.len() < MAX_KEYS { who } else { OTHERS.to_owned() };
        let seen = self.seen.entry((outcome, who)).or_default();
        if seen.written < WRITTEN {
            seen.written += 1;
            return true;
        }
        seen.counted += 1;
        false
    }

    /// Is the span over?
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        !self.seen.is_empty() && now.since(self.began) >= WINDOW
    }

    /// What was only counted, and a new span.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (Key, u64)> + use<> {
        let seen = std::mem::take(&mut self.seen);
        seen.into_iter().filter(|(_, seen)| seen.counted > 0).map(|(key, seen)| (key, seen.counted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_written_and_none_is_lost() {
        let mut sampler = Sampler::default();
        let mut written = 0;
        for n in 0..1000 {
            written += u64::from(sampler.takes(("denied", "mallory".to_owned()), Timestamp(n)));
        }
        assert!(sampler.takes(("denied", "bob".to_owned()), Timestamp(1000)), "each has its own");
        assert!(!sampler.is_due(Timestamp(59_999)) && sampler.is_due(Timestamp(60_000)));
        let counted: Vec<_> = sampler.drain().collect();
        assert_eq!(counted, [(("denied", "mallory".to_owned()), 1000 - written)]);
        assert_eq!(written, u64::from(WRITTEN));
        assert!(sampler.takes(("denied", "mallory".to_owned()), Timestamp(60_001)));
    }

    #[test]
    fn a_flood_of_names_is_bounded_and_counted() {
        let mut sampler = Sampler::default();
        let written = (0..10_000).filter(|n| sampler.takes(("denied", n.to_string()), Timestamp(0))).count();
        assert!(sampler.seen.len() <= MAX_KEYS + 1);
        let counted: u64 = sampler.drain().map(|(_, count)| count).sum();
        assert_eq!(written as u64 + counted, 10_000);
    }
}
