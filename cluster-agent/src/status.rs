//! What people are told about this cluster: where each consumer of the global state stands, and what needs mending.
//!
//! In: reports of the parts that serve consumers (xDS, feeds, uplink, source). Out: the consumers and problems of the
//! status message to the control plane, and a change signal. Nothing decides from it. A cheap handle; the lock is held
//! for map updates only, never across an await.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use isthmus_api::convert::{ConsumerKind, ConsumerStatus, Problem, limits};
use isthmus_model::ids::Stamp;
use tokio::sync::watch;

/// Problems kept per area; more are counted, not kept.
const MAX_PROBLEMS: usize = 200;
/// A problem's text is cut to this many bytes.
const MAX_TEXT: usize = 1_000;

/// Which part reports; each part replaces only its own problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// Files of the manifests folder.
    Manifests,
    /// Saving them.
    ManifestStore,
    /// Objects that parse but do not fit together.
    Objects,
    /// Parts of the federation's state that are not believed.
    Federation,
    /// A state of the federation that is refused whole.
    Refused,
    /// The control plane's answers to what this agent publishes.
    Uplink,
    /// The state folder.
    Storage,
    /// Saving the federation's state.
    GlobalStore,
    /// This agent's own certificate.
    Identity,
}

/// Collects everyone's standing. Clones share one board.
#[derive(Clone, Debug)]
pub struct StatusBoard {
    inner: Arc<Mutex<Board>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Board {
    consumers: BTreeMap<(ConsumerKind, String), ConsumerStatus>,
    problems: BTreeMap<Area, Vec<Problem>>,
    /// The latest stream of each consumer that is up.
    sessions: BTreeMap<(ConsumerKind, String), u64>,
}

/// Everything on the board at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// By kind and name.
    pub consumers: Vec<ConsumerStatus>,
    /// Of all areas, in their order.
    pub problems: Vec<Problem>,
}

impl Default for StatusBoard {
    fn default() -> Self {
        Self::new()
    }
}

impl StatusBoard {
    /// An empty board.
    pub fn new() -> Self {
        Self { inner: Arc::default(), changed: watch::Sender::new(0) }
    }

    /// The sidecar's Envoy has acknowledged everything up to `stamp`.
    pub fn sidecar_applied(&self, name: &str, stamp: Stamp) {
        self.applied(ConsumerKind::Sidecar, name, stamp);
    }

    /// What the sidecar's Envoy refuses now (its NACKs); empty when it accepts everything.
    pub fn sidecar_problem(&self, name: &str, problems: Vec<String>) {
        self.consumer_problems(ConsumerKind::Sidecar, name, problems);
    }

    /// What keeps a consumer from doing all it should, whole; empty when nothing does.
    pub fn consumer_problems(&self, kind: ConsumerKind, name: &str, problems: Vec<String>) {
        let problems = problems.into_iter().take(limits::CONSUMER_PROBLEMS).map(cut).collect();
        self.update(kind, name, |c| c.problems = problems);
    }

    /// The sidecar's ADS stream came up or went down.
    pub fn sidecar_connected(&self, name: &str, connected: bool) {
        self.connected(ConsumerKind::Sidecar, name, connected);
    }

    /// A consumer has applied `stamp`.
    pub fn applied(&self, kind: ConsumerKind, name: &str, stamp: Stamp) {
        self.update(kind, name, |c| c.applied = Some(stamp));
    }

    /// A consumer's stream came up or went down.
    pub fn connected(&self, kind: ConsumerKind, name: &str, connected: bool) {
        self.update(kind, name, |c| c.connected = connected);
    }

    /// A consumer's stream of this number came up.
    pub fn attached(&self, kind: ConsumerKind, name: &str, session: u64) {
        let mut board = self.lock();
        let current = board.sessions.entry((kind, name.to_owned())).or_insert(session);
        *current = session.max(*current);
        drop(board);
        self.connected(kind, name, true);
    }

    /// It ended. An older stream's end does not count when a newer one is up.
    pub fn detached(&self, kind: ConsumerKind, name: &str, session: u64) {
        let mut board = self.lock();
        if board.sessions.get(&(kind, name.to_owned())) == Some(&session) {
            board.sessions.remove(&(kind, name.to_owned()));
            drop(board);
            self.connected(kind, name, false);
        }
    }

    /// Forgets a consumer that is gone for good.
    pub fn forget(&self, kind: ConsumerKind, name: &str) {
        if self.lock().consumers.remove(&(kind, name.to_owned())).is_some() {
            self.signal();
        }
    }

    /// Replaces the problems of one area.
    pub fn set_problems(&self, area: Area, problems: Vec<Problem>) {
        let more = problems.len().saturating_sub(MAX_PROBLEMS);
        let mut kept: Vec<_> = problems
            .into_iter()
            .take(MAX_PROBLEMS)
            .map(|p| Problem { at: cut(p.at), field: cut(p.field), message: cut(p.message) })
            .collect();
        if more > 0 {
            let message = format!("and {more} more; the log has them all");
            kept.push(Problem { at: String::new(), field: String::new(), message });
        }
        let mut board = self.lock();
        let slot = board.problems.entry(area).or_default();
        if *slot != kept {
            *slot = kept;
            drop(board);
            self.signal();
        }
    }

    /// Everything, now.
    pub fn standing(&self) -> Standing {
        let board = self.lock();
        Standing {
            consumers: board.consumers.values().cloned().collect(),
            problems: board.problems.values().flatten().cloned().collect(),
        }
    }

    /// How many problems these areas have.
    pub fn count(&self, areas: &[Area]) -> usize {
        let board = self.lock();
        areas.iter().filter_map(|area| board.problems.get(area)).map(Vec::len).sum()
    }

    /// Resolves whenever the board has changed since the receiver last looked.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn update(&self, kind: ConsumerKind, name: &str, change: impl FnOnce(&mut ConsumerStatus)) {
        let mut board = self.lock();
        let entry = board.consumers.entry((kind, name.to_owned())).or_insert_with(|| ConsumerStatus {
            kind,
            name: name.to_owned(),
            applied: None,
            connected: false,
            problems: Vec::new(),
        });
        let before = entry.clone();
        change(entry);
        if *entry != before {
            drop(board);
            self.signal();
        }
    }

    fn signal(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        // Every update leaves the maps whole, so a panic elsewhere does not make them unusable.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A problem of a whole thing, not of one field.
pub fn problem(at: impl Into<String>, message: impl Into<String>) -> Problem {
    Problem { at: at.into(), field: String::new(), message: message.into() }
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use isthmus_model::ids::{Epoch, Revision};

    use super::*;

    #[test]
    fn a_report_that_changes_nothing_does_not_signal() {
        let board = StatusBoard::new();
        let mut changes = board.changes();
        let stamp = Stamp { epoch: Epoch(1), revision: Revision(4) };
        board.sidecar_applied("web-1", stamp);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        board.sidecar_applied("web-1", stamp);
        assert!(!changes.has_changed().unwrap());
    }

    #[test]
    fn an_area_replaces_only_its_own_problems_and_stays_bounded() {
        let board = StatusBoard::new();
        board.set_problems(Area::Manifests, vec![problem("a.yaml:3", "bad")]);
        board.set_problems(Area::Uplink, vec![problem("publication", "refused"); 500]);
        let all = board.standing().problems;
        assert_eq!(all.len(), 1 + MAX_PROBLEMS + 1);
        board.set_problems(Area::Uplink, Vec::new());
        assert_eq!(board.standing().problems, vec![problem("a.yaml:3", "bad")]);
    }

    #[test]
    fn a_consumers_problems_are_replaced_whole_and_stay_bounded() {
        let board = StatusBoard::new();
        let problems = |board: &StatusBoard| board.standing().consumers[0].problems.clone();
        board.consumer_problems(ConsumerKind::Gateway, "gateway-1", vec!["a port is taken".to_owned(); 500]);
        assert_eq!(problems(&board).len(), limits::CONSUMER_PROBLEMS);
        board.consumer_problems(ConsumerKind::Gateway, "gateway-1", Vec::new());
        assert!(problems(&board).is_empty());
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        assert!(cut("é".repeat(2_000)).len() <= MAX_TEXT + '…'.len_utf8());
    }
}
