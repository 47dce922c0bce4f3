//! What the rest of the process sees of the replicated state: the state itself, immutable, and enough of its past to
//! bring a member up to date without sending everything.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use isthmus_model::{
    global::{GlobalDelta, GlobalSnapshot},
    ids::{ClusterName, Revision, ServiceName, Stamp},
};

use super::State;

/// Revisions whose changes are remembered. A member that is further behind gets a snapshot.
const WINDOW: usize = 1024;

/// The state at one moment. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View {
    state: Arc<State>,
    history: History,
}

/// What to send to a member that holds some state.
#[derive(Debug)]
pub enum Update {
    /// Nothing: it holds the latest.
    UpToDate,
    /// Everything.
    Snapshot(Arc<GlobalSnapshot>),
    /// The difference.
    Delta(Box<GlobalDelta>),
    /// It holds more than this node knows of: this node is behind, or lost its state.
    Ahead {
        /// Where this node stands.
        here: Stamp,
    },
    /// There is nothing yet to send.
    NotFounded,
}

/// What one revision touched.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Change {
    pub(super) bundle: bool,
    pub(super) settings: bool,
    pub(super) clusters: BTreeSet<ClusterName>,
    pub(super) services: BTreeSet<ServiceName>,
}

/// The last changes, newest at the back. Kept in memory only: after a restart members get a snapshot, or deltas from
/// what the log still replayed.
#[derive(Clone, Debug, Default)]
struct History {
    /// A member that holds this, or later, can be served from `changes`.
    base: Stamp,
    /// `changes[i]` led from `base + i` to `base + i + 1`.
    changes: VecDeque<Arc<Change>>,
}

impl View {
    /// Starts with no past.
    pub fn new(state: Arc<State>) -> Self {
        let base = state.stamp();
        Self { state, history: History { base, changes: VecDeque::new() } }
    }

    /// The whole replicated state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What members see; `None` before the federation is founded.
    pub fn global(&self) -> Option<&Arc<GlobalSnapshot>> {
        self.state.global()
    }

    /// Moves on to `state`, which `changes` led to, one for each revision.
    pub(crate) fn advance(&mut self, state: Arc<State>, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            self.history.changes.push_back(Arc::new(change));
            if self.history.changes.len() > WINDOW {
                self.history.changes.pop_front();
                self.history.base.revision = Revision(self.history.base.revision.0 + 1);
            }
        }
        self.state = state;
        if self.history.base.epoch != self.state.stamp().epoch {
            self.history = History { base: self.state.stamp(), changes: VecDeque::new() };
        }
    }

    /// What brings a member that holds `held` up to date.
    pub fn since(&self, held: Option<Stamp>) -> Update {
        let Some(global) = self.state.global() else { return Update::NotFounded };
        let Some(held) = held else { return Update::Snapshot(global.clone()) };
        if held == global.stamp {
            return Update::UpToDate;
        }
        if held > global.stamp {
            return Update::Ahead { here: global.stamp };
        }
        match self.history.since(held) {
            Some(changes) => Update::Delta(Box::new(delta(global, held, changes))),
            None => Update::Snapshot(global.clone()),
        }
    }
}

impl Change {
    /// Does any member see it?
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl History {
    /// The changes after `held`, or `None` if it lies before the window.
    fn since(&self, held: Stamp) -> Option<impl Iterator<Item = &Change>> {
        if held.epoch != self.base.epoch {
            return None;
        }
        let skip = usize::try_from(held.revision.0.checked_sub(self.base.revision.0)?).ok()?;
        (skip <= self.changes.len()).then(|| self.changes.iter().skip(skip).map(Arc::as_ref))
    }
}

/// The latest value of everything that `changes` touched; what is no longer there was removed.
fn delta<'a>(global: &GlobalSnapshot, from: Stamp, changes: impl Iterator<Item = &'a Change>) -> GlobalDelta {
    let (mut bundle, mut settings) = (false, false);
    let mut clusters = BTreeSet::new();
    let mut services = BTreeSet::new();
    for change in changes {
        bundle |= change.bundle;
        settings |= change.settings;
        clusters.extend(&change.clusters);
        services.extend(&change.services);
    }
    let (present_clusters, gone_clusters): (Vec<&ClusterName>, Vec<_>) =
        clusters.into_iter().partition(|name| global.clusters.contains_key(*name));
    let (present_services, gone_services): (Vec<&ServiceName>, Vec<_>) =
        services.into_iter().partition(|name| global.services.contains_key(*name));
    GlobalDelta {
        from,
        to: global.stamp,
        federation_bundle: bundle.then(|| global.federation_bundle.clone()),
        settings: settings.then(|| global.settings.clone()),
        clusters: present_clusters.into_iter().filter_map(|name| global.clusters.get(name)).cloned().collect(),
        removed_clusters: gone_clusters.into_iter().cloned().collect(),
        services: present_services.into_iter().filter_map(|name| global.services.get(name)).cloned().collect(),
        removed_services: gone_services.into_iter().cloned().collect(),
    }
}
