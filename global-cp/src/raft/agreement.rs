//! Do all nodes hold the same state? Each takes a digest of its own at the same places of the log, and compares it with the
//! others'. A node that differs from most must stop, loudly: its disk, its memory or its program is broken, and what it says
//! cannot be trusted.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use isthmus_identity::tls::sha256;

use crate::state::State;

/// Log entries between two places.
pub(super) const EVERY: u64 = if cfg!(test) { 8 } else { 1_024 };
/// Places that are remembered.
const REMEMBERED: usize = 8;

/// SHA-256 of a state as a snapshot holds it.
pub type StateDigest = [u8; 32];

/// A node's own digests, by the index of the log's entry.
#[derive(Clone, Debug, Default)]
pub struct Digests(Arc<Mutex<VecDeque<(u64, StateDigest)>>>);

/// What a comparison comes to, for one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is no place that both remember.
    Unknown,
    /// All that were asked hold the same.
    Agrees,
    /// These hold something else than this node and most.
    Others(Vec<String>),
    /// This node holds something else than most, or, where two differ, than who leads.
    Own {
        /// At which entry.
        index: u64,
    },
}

impl Digests {
    pub(super) fn remember(&self, index: u64, digest: StateDigest) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.push_back((index, digest));
        if held.len() > REMEMBERED {
            held.pop_front();
        }
    }

    /// All that are remembered.
    pub fn all(&self) -> BTreeMap<u64, StateDigest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}

pub(super) fn digest(state: &State) -> StateDigest {
    sha256(&super::store::encode(state))
}

/// Compares at the latest place that this node shares with anybody.
pub fn judge(
    own: &BTreeMap<u64, StateDigest>,
    others: &BTreeMap<String, BTreeMap<u64, StateDigest>>,
    leads: bool,
) -> Verdict {
    let shared = |index: &&u64| others.values().any(|other| other.contains_key(*index));
    let Some((index, mine)) = own.keys().rev().find(shared).and_then(|index| own.get_key_value(index)) else {
        return Verdict::Unknown;
    };
    let at = |other: &BTreeMap<u64, StateDigest>| other.get(index).copied();
    let (same, different): (Vec<_>, Vec<_>) =
        others.iter().filter_map(|(name, other)| Some((name, at(other)?))).partition(|(_, theirs)| theirs == mine);
    if different.is_empty() {
        return Verdict::Agrees;
    }
    let ours = 1 + same.len();
    let most = different.iter().map(|(_, theirs)| different.iter().filter(|(_, other)| other == theirs).count()).max();
    let outvoted = most.is_some_and(|most| most > ours || (most == ours && !leads));
    if outvoted {
        return Verdict::Own { index: *index };
    }
    Verdict::Others(different.into_iter().map(|(name, _)| name.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digests(at: &[(u64, u8)]) -> BTreeMap<u64, StateDigest> {
        at.iter().map(|(index, digest)| (*index, [*digest; 32])).collect()
    }

    fn others(all: &[(&str, &[(u64, u8)])]) -> BTreeMap<String, BTreeMap<u64, StateDigest>> {
        all.iter().map(|(name, at)| ((*name).to_owned(), digests(at))).collect()
    }

    #[test]
    fn who_differs_from_most_is_told_apart() {
        let own = digests(&[(1024, 1), (2048, 2)]);
        let all = |two: u8, three: u8| others(&[("cp-2", &[(2048, two)]), ("cp-3", &[(2048, three)])]);
        assert_eq!(judge(&own, &all(2, 2), false), Verdict::Agrees);
        assert_eq!(judge(&own, &all(2, 9), false), Verdict::Others(vec!["cp-3".to_owned()]));
        assert_eq!(judge(&own, &all(9, 9), true), Verdict::Own { index: 2048 });
        // Three that differ: the one that leads is believed.
        assert_eq!(judge(&own, &all(8, 9), true), Verdict::Others(vec!["cp-2".to_owned(), "cp-3".to_owned()]));
        assert_eq!(judge(&own, &all(8, 9), false), Verdict::Own { index: 2048 });
    }

    #[test]
    fn of_two_that_differ_the_one_that_leads_is_believed() {
        let (own, other) = (digests(&[(1024, 1)]), others(&[("cp-2", &[(1024, 2)])]));
        assert_eq!(judge(&own, &other, true), Verdict::Others(vec!["cp-2".to_owned()]));
        assert_eq!(judge(&own, &other, false), Verdict::Own { index: 1024 });
    }

    #[test]
    fn only_the_same_place_is_compared() {
        let own = digests(&[(1024, 1), (2048, 2)]);
        assert_eq!(judge(&own, &others(&[("cp-2", &[(3072, 9)])]), false), Verdict::Unknown);
        assert_eq!(judge(&own, &others(&[("cp-2", &[(1024, 1), (3072, 9)])]), false), Verdict::Agrees);
        assert_eq!(judge(&own, &others(&[]), false), Verdict::Unknown);
        assert_eq!(judge(&digests(&[]), &others(&[("cp-2", &[(1024, 1)])]), false), Verdict::Unknown);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let held = Digests::default();
        for i in 0..20 {
            held.remember(i * EVERY, [0; 32]);
        }
        assert_eq!(held.all().keys().copied().collect::<Vec<_>>(), (12..20).map(|i| i * EVERY).collect::<Vec<_>>());
    }
}
