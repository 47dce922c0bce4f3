//! Places that other clusters take here, such as streams: bounded in all, and so that no cluster takes them from the rest.
//!
//! The rule is one threshold that moves: a cluster may hold up to three times as many places as are free. Alone it gets
//! three quarters of all; however many take all they can, some stay free, and whoever holds less gets those first.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use isthmus_model::ids::ClusterName;

/// Places held per free one.
const PER_FREE: usize = 3;

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// All are taken.
    All,
    /// This cluster has its share.
    Share,
}

/// The places of one kind.
#[derive(Debug)]
pub(crate) struct Shares {
    max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    /// Only of clusters that hold some.
    by_cluster: HashMap<ClusterName, usize>,
}

impl Shares {
    /// `max` places.
    pub(crate) fn new(max: usize) -> Self {
        Self { max, taken: Mutex::default() }
    }

    /// A place for `cluster`.
    pub(crate) fn try_acquire(self: &Arc<Self>, cluster: &ClusterName) -> Result<Place, Full> {
        let mut taken = self.lock();
        let own = taken.by_cluster.get(cluster).copied().unwrap_or_default();
        may_take(own, taken.total, self.max)?;
        taken.total += 1;
        taken.by_cluster.insert(cluster.clone(), own + 1);
        Ok(Place { shares: self.clone(), cluster: cluster.clone() })
    }

    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.lock().total
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        // Every section leaves the counts whole, so a panic in another one does not spoil them.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// May a cluster that holds `own` of the `total` places that are taken have one more?
fn may_take(own: usize, total: usize, max: usize) -> Result<(), Full> {
    let free = max.saturating_sub(total);
    match free {
        0 => Err(Full::All),
        free if own >= free.saturating_mul(PER_FREE) => Err(Full::Share),
        _ => Ok(()),
    }
}

/// One place, while it lives.
#[derive(Debug)]
pub(crate) struct Place {
    shares: Arc<Shares>,
    cluster: ClusterName,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.shares.lock();
        taken.total = taken.total.saturating_sub(1);
        if let Some(own) = taken.by_cluster.get_mut(&self.cluster) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                taken.by_cluster.remove(&self.cluster);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::cluster;

    fn take_all(shares: &Arc<Shares>, name: &str) -> Vec<Place> {
        std::iter::from_fn(|| shares.try_acquire(&cluster(name)).ok()).collect()
    }

    #[test]
    fn one_cluster_takes_three_quarters_at_most_and_the_next_ones_find_places() {
        let shares = Arc::new(Shares::new(1_000));
        let greedy = take_all(&shares, "a");
        assert_eq!(greedy.len(), 750);
        assert_eq!(shares.try_acquire(&cluster("a")).unwrap_err(), Full::Share);
        let second = take_all(&shares, "b");
        assert!(second.len() > 180, "{}", second.len());
        assert!(!take_all(&shares, "c").is_empty(), "nor do two together take all");
        assert_eq!(shares.taken(), greedy.len() + second.len());
    }

    #[test]
    fn places_come_back_when_they_are_left() {
        let shares = Arc::new(Shares::new(8));
        let held = take_all(&shares, "a");
        assert_eq!(held.len(), 6);
        drop(held);
        assert!(shares.taken() == 0 && shares.lock().by_cluster.is_empty());
        assert_eq!(take_all(&shares, "b").len(), 6);
    }

    #[test]
    fn a_single_place_can_be_taken() {
        let shares = Arc::new(Shares::new(1));
        let _held = shares.try_acquire(&cluster("a")).unwrap();
        assert_eq!(shares.try_acquire(&cluster("b")).unwrap_err(), Full::All);
    }
}
