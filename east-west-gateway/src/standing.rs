//! Where this gateway stands, as its agent is told: the state that is in force, and what keeps it from doing all that
//! the state asks for.
//!
//! In: how far the parts that act on the state have followed it, and their problems. Out: watches of both. What holds: a
//! state is in force only when its listeners are bound and peers that it revokes are closed, and that never goes back.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use isthmus_api::convert::limits;
use isthmus_model::ids::Stamp;
use tokio::sync::watch;

use crate::metrics::Metrics;

/// A part that acts on the state; all of them must have, for it to be in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Ports for local sidecars.
    Listeners,
    /// Tunnels, both ways.
    Peers,
}

impl Part {
    const ALL: [Self; 2] = [Self::Listeners, Self::Peers];
}

/// Where a problem lies; each part replaces only its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Area {
    /// Ports that cannot be bound.
    Listeners,
    /// A state that takes a revocation back.
    Revocations,
    /// Clusters that the configuration names and the federation does not have.
    Links,
}

/// The standing of one gateway.
#[derive(Debug)]
pub(crate) struct Standing {
    metrics: Metrics,
    parts: Mutex<BTreeMap<Part, Stamp>>,
    tried: watch::Sender<bool>,
    in_force: watch::Sender<Option<Stamp>>,
    problems: watch::Sender<BTreeMap<Area, Vec<String>>>,
}

impl Standing {
    /// Nothing is in force, nothing is wrong.
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            parts: Mutex::default(),
            tried: watch::Sender::default(),
            in_force: watch::Sender::default(),
            problems: watch::Sender::default(),
        }
    }

    /// `part` has done what it can for the state at `stamp`; `whole` if that is all that was to do.
    pub(crate) fn followed(&self, part: Part, stamp: Stamp, whole: bool) {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if part == Part::Listeners {
            self.tried.send_if_modified(|tried| !std::mem::replace(tried, true));
        }
        if whole {
            parts.insert(part, stamp);
        }
        // Who has followed a later state has followed the earlier one.
        let slowest = Part::ALL.iter().map(|p| parts.get(p).copied()).min().flatten();
        self.in_force.send_if_modified(|known| {
            let later = slowest > *known;
            if later {
                *known = slowest;
            }
            later
        });
        if let Some(stamp) = slowest {
            self.metrics.applied(stamp);
        }
    }

    /// Whether `part` has followed any state whole.
    pub(crate) fn has_followed(&self, part: Part) -> bool {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&part)
    }

    /// Says once more what is in force.
    pub(crate) fn repeat(&self) {
        self.in_force.send_modify(|_| {});
    }

    /// Whether listeners have been tried for any state: from then on, sidecars are served.
    pub(crate) fn tried(&self) -> watch::Receiver<bool> {
        self.tried.subscribe()
    }

    /// The latest state in force.
    pub(crate) fn in_force(&self) -> watch::Receiver<Option<Stamp>> {
        self.in_force.subscribe()
    }

    /// Replaces the problems of one area. Returns whether that changes any.
    pub(crate) fn set_problems(&self, area: Area, texts: Vec<String>) -> bool {
        self.problems.send_if_modified(|problems| {
            let changed = problems.get(&area).map(Vec::as_slice).unwrap_or_default() != texts;
            problems.insert(area, texts);
            changed
        })
    }

    /// Moves whenever a problem comes or goes.
    pub(crate) fn problems_changed(&self) -> watch::Receiver<BTreeMap<Area, Vec<String>>> {
        self.problems.subscribe()
    }

    /// All problems, as many as an agent takes.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut texts: Vec<String> = self.problems.borrow().values().flatten().cloned().collect();
        if texts.len() > limits::CONSUMER_PROBLEMS {
            let more = texts.len() - limits::CONSUMER_PROBLEMS + 1;
            texts.truncate(limits::CONSUMER_PROBLEMS - 1);
            texts.push(format!("and {more} more; the gateway's log has them all"));
        }
        texts
    }
}

#[cfg(test)]
mod tests {
    use isthmus_model::ids::{Epoch, Revision};

    use super::*;

    fn stamp(revision: u64) -> Stamp {
        Stamp { epoch: Epoch(1), revision: Revision(revision) }
    }

    fn standing() -> Standing {
        Standing::new(Metrics::register(&mut isthmus_runtime::health::Registry::default()))
    }

    #[test]
    fn a_state_is_in_force_only_when_all_parts_have_followed_it_whole() {
        let standing = standing();
        let in_force = standing.in_force();
        standing.followed(Part::Listeners, stamp(1), true);
        assert_eq!(*in_force.borrow(), None, "revoked peers may still be connected");
        standing.followed(Part::Peers, stamp(1), true);
        assert_eq!(*in_force.borrow(), Some(stamp(1)));
        standing.followed(Part::Peers, stamp(2), true);
        standing.followed(Part::Listeners, stamp(2), false);
        assert_eq!(*in_force.borrow(), Some(stamp(1)), "a port is missing");
        standing.followed(Part::Listeners, stamp(3), true);
        assert_eq!(*in_force.borrow(), Some(stamp(2)), "peers are not there yet");
        standing.followed(Part::Peers, stamp(3), true);
        assert_eq!(*in_force.borrow(), Some(stamp(3)));
    }

    #[test]
    fn a_gateway_with_a_missing_port_serves_all_the_same() {
        let standing = standing();
        standing.followed(Part::Listeners, stamp(1), false);
        assert!(*standing.tried().borrow());
    }

    #[test]
    fn problems_are_replaced_by_area_signalled_on_change_and_bounded() {
        let standing = standing();
        let mut changed = standing.problems_changed();
        standing.set_problems(Area::Listeners, Vec::new());
        assert!(!changed.has_changed().unwrap());
        standing.set_problems(Area::Revocations, vec!["west came back".to_owned()]);
        standing.set_problems(Area::Listeners, vec!["a port is taken".to_owned(); 500]);
        assert!(changed.has_changed().unwrap());
        changed.mark_unchanged();
        assert_eq!(standing.problems().len(), limits::CONSUMER_PROBLEMS);
        assert!(standing.problems().last().unwrap().contains("and 438 more"));
        standing.set_problems(Area::Listeners, Vec::new());
        assert_eq!(standing.problems(), ["west came back"]);
    }
}
