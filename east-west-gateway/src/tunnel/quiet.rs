//! Log lines that a cluster can cause at will, thinned: one a minute each, with how many there were.
//!
//! Pure: the clock is the caller's. Bounded: of clusters beyond [`MAX`] none is told apart.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use isthmus_model::ids::ClusterName;

/// Between two lines on one cluster.
const PAUSE: Duration = Duration::from_secs(60);
/// Certificates name the clusters, so there are few.
const MAX: usize = 1_024;

/// When each cluster was last told of, and what was kept back since.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    told: Mutex<BTreeMap<ClusterName, (Instant, u64)>>,
}

impl Quiet {
    /// Something about `cluster` happened. If it is to be told: how often it did since the last time, this one included.
    pub(super) fn times(&self, cluster: &ClusterName, now: Instant) -> Option<u64> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, kept)) = told.get_mut(cluster) {
            *kept += 1;
            if now.saturating_duration_since(*last) < PAUSE {
                return None;
            }
            *last = now;
            return Some(std::mem::take(kept));
        }
        told.retain(|_, (last, _)| now.saturating_duration_since(*last) < PAUSE);
        if told.len() >= MAX {
            return None;
        }
        told.insert(cluster.clone(), (now, 0));
        Some(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_told_of_once_a_minute_with_the_count() {
        let (quiet, now) = (Quiet::default(), Instant::now());
        let (west, north) = ("west".parse().unwrap(), "north".parse().unwrap());
        assert_eq!(quiet.times(&west, now), Some(1));
        let later = (1..100).filter(|i| quiet.times(&west, now + PAUSE / 200 * *i).is_some());
        assert_eq!(later.count(), 0);
        assert_eq!(quiet.times(&north, now), Some(1), "another one is not kept back");
        assert_eq!(quiet.times(&west, now + PAUSE), Some(100));
        assert_eq!(quiet.times(&west, now + PAUSE), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (quiet, now) = (Quiet::default(), Instant::now());
        for i in 0..2 * MAX {
            quiet.times(&format!("c{i}").parse().unwrap(), now);
        }
        assert_eq!(quiet.told.lock().unwrap().len(), MAX);
        assert_eq!(quiet.times(&"new".parse().unwrap(), now + PAUSE), Some(1));
        assert_eq!(quiet.told.lock().unwrap().len(), 1);
    }
}
