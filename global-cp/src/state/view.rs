//! What the rest of the process sees of the replicated state: the state itself, immutable, and enough of its past to
//! bring a member up to date without sending everything.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, OnceLock},
};

use isthmus_api::convert::DigestSum;
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
    sum: LazySum,
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
    /// It holds another state under the stamp of this node's: the two have different histories.
    Diverged,
    /// There is nothing yet to send.
    NotFounded,
}

/// What a member holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which state it says it is.
    pub stamp: Stamp,
    /// What is in it.
    pub content: Content,
}

/// How sure it is that a stamp means the same state there as here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It came from this node's present run.
    Known,
    /// The member's digest of it, to be compared.
    Digest(Digest),
    /// The member did not say, or in a way that cannot be compared.
    Unknown,
}

/// See [`isthmus_api::convert::snapshot_digest`].
pub type Digest = [u8; 32];

/// What one revision touched.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Change {
    pub(super) epoch: bool,
    pub(super) bundle: bool,
    pub(super) settings: bool,
    pub(super) clusters: BTreeSet<ClusterName>,
    pub(super) services: BTreeSet<ServiceName>,
    /// Something that members do not see.
    pub(super) declared: bool,
}

/// The last changes, newest at the back. Kept in memory only: after a restart members that missed something get a
/// snapshot.
#[derive(Clone, Debug, Default)]
struct History {
    /// A member that holds this, or later, can be served from `steps`.
    base: Stamp,
    /// Of the state at `base`.
    base_digest: LazyDigest,
    /// `steps[i]` led from `base + i` to `base + i + 1`.
    steps: VecDeque<Step>,
}

#[derive(Clone, Debug)]
struct Step {
    change: Arc<Change>,
    /// Of the state that it led to.
    digest: LazyDigest,
}

/// A state's digest, made when it is first asked for: while the state is the latest, or never.
type LazyDigest = Arc<OnceLock<Digest>>;

/// The part of the latest state's digest that grows with the federation.
type LazySum = Arc<OnceLock<DigestSum>>;

impl View {
    /// Starts with no past.
    pub fn new(state: Arc<State>) -> Self {
        let history = History::new(state.stamp());
        Self { state, history, sum: LazySum::default() }
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
        let changes: Vec<Change> = changes.into_iter().collect();
        self.sum = self.sum_after(&state, &changes);
        for change in changes {
            self.history.steps.push_back(Step { change: Arc::new(change), digest: LazyDigest::default() });
            if self.history.steps.len() > WINDOW
                && let Some(oldest) = self.history.steps.pop_front()
            {
                self.history.base.revision = Revision(self.history.base.revision.0 + 1);
                self.history.base_digest = oldest.digest;
            }
        }
        self.state = state;
        if self.history.base.epoch != self.state.stamp().epoch {
            self.history = History::new(self.state.stamp());
        }
    }

    /// What brings a member that holds `held` up to date. A delta only for who holds what this node held then.
    pub fn since(&self, held: Option<Held>) -> Update {
        let Some(global) = self.state.global() else { return Update::NotFounded };
        let Some(Held { stamp, content }) = held else { return Update::Snapshot(global.clone()) };
        if stamp > global.stamp {
            return Update::Ahead { here: global.stamp };
        }
        if stamp == global.stamp {
            return match content {
                Content::Digest(digest) if digest != self.digest(global) => Update::Diverged,
                Content::Digest(_) | Content::Known | Content::Unknown => Update::UpToDate,
            };
        }
        match self.history.since(stamp, content) {
            Some(changes) => Update::Delta(Box::new(delta(global, stamp, changes))),
            None => Update::Snapshot(global.clone()),
        }
    }

    /// Remembers the latest state's digest, so that who holds that state can be served a delta when it comes back. To be
    /// called when the state is sent to anyone; the first call for a state costs one pass over it.
    pub fn remember(&self) {
        if let Some(global) = self.state.global() {
            self.digest(global);
        }
    }

    /// Of the state that `changes` led to, if that of the present one is known: of what they touched alone.
    fn sum_after(&self, after: &State, changes: &[Change]) -> LazySum {
        let known = self.sum.get().filter(|_| changes.iter().all(|change| !change.epoch));
        let (Some(sum), Some(before), Some(after)) = (known, self.state.global(), after.global()) else {
            return LazySum::default();
        };
        let mut sum = *sum;
        let clusters: BTreeSet<&ClusterName> = changes.iter().flat_map(|change| &change.clusters).collect();
        let services: BTreeSet<&ServiceName> = changes.iter().flat_map(|change| &change.services).collect();
        clusters.into_iter().for_each(|name| sum.cluster(before.clusters.get(name), after.clusters.get(name)));
        for name in services {
            let [before, after] = [before, after].map(|global| global.services.get(name).map(AsRef::as_ref));
            sum.service(before, after);
        }
        Arc::new(OnceLock::from(sum))
    }

    fn digest(&self, global: &GlobalSnapshot) -> Digest {
        let latest = self.history.steps.back().map_or(&self.history.base_digest, |step| &step.digest);
        *latest.get_or_init(|| self.sum.get_or_init(|| DigestSum::of(global)).digest(global))
    }
}

impl Change {
    /// Both, as one.
    pub(super) fn extend(&mut self, other: Self) {
        self.epoch |= other.epoch;
        self.bundle |= other.bundle;
        self.settings |= other.settings;
        self.clusters.extend(other.clusters);
        self.services.extend(other.services);
        self.declared |= other.declared;
    }

    /// Is it nothing, for members and operators?
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl History {
    fn new(base: Stamp) -> Self {
        Self { base, base_digest: LazyDigest::default(), steps: VecDeque::new() }
    }

    /// The changes after `held`, or `None` if it lies before the window, or is not the state that was here then.
    fn since(&self, held: Stamp, content: Content) -> Option<impl Iterator<Item = &Change>> {
        if held.epoch != self.base.epoch {
            return None;
        }
        let skip = usize::try_from(held.revision.0.checked_sub(self.base.revision.0)?).ok()?;
        let then = match skip.checked_sub(1) {
            None => &self.base_digest,
            Some(last) => &self.steps.get(last)?.digest,
        };
        let same = match content {
            Content::Known => true,
            Content::Digest(digest) => then.get() == Some(&digest),
            Content::Unknown => false,
        };
        same.then(|| self.steps.iter().skip(skip).map(|step| step.change.as_ref()))
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
