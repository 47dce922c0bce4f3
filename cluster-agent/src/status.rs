//! What people are told about this cluster: where each consumer of the global state stands, and what needs mending.
//!
//! In: reports of the parts that serve consumers (xDS, feeds, uplink, source). Out: the consumers and problems of the
//! status message to the control plane, and a change signal. Nothing decides from it. A cheap handle; the lock is held
//! for map updates only, never across an await.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use isthmus_api::convert::{ConsumerKind, ConsumerStatus, Problem, limits};
use isthmus_model::{
    ids::Stamp,
    local::{TunnelReport, TunnelState},
};
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
    /// What the control plane makes of single exports.
    Exports,
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
    consumers: BTreeMap<Key, Consumer>,
    problems: BTreeMap<Area, Vec<Problem>>,
}

type Key = (ConsumerKind, String);

/// All that is heard under one name. There may be several streams of it: a connection that nobody has found dead yet
/// beside its successor, or a process beside the one that takes over from it.
#[derive(Debug, Default)]
struct Consumer {
    /// By age. The newest counts.
    live: BTreeMap<u64, Word>,
    /// The last word of before, and of those who have no stream here.
    last: Word,
    /// Of those who have no stream here.
    connected: bool,
}

/// What one stream says of its consumer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Word {
    applied: Option<Stamp>,
    problems: Vec<String>,
    tunnels: Vec<TunnelState>,
}

/// One stream of a consumer, for as long as it lives.
#[derive(Debug)]
pub struct Attached {
    board: StatusBoard,
    key: Key,
    session: u64,
}

/// Everything on the board at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// By kind and name.
    pub consumers: Vec<ConsumerStatus>,
    /// Of all areas, in their order.
    pub problems: Vec<Problem>,
    /// Of the gateways that are connected, by name.
    pub tunnels: Vec<TunnelReport>,
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
        self.update(ConsumerKind::Sidecar, name, |c| c.last.applied = Some(stamp));
    }

    /// What the sidecar's Envoy refuses now (its NACKs), whole; empty when it accepts everything.
    pub fn sidecar_problem(&self, name: &str, problems: Vec<String>) {
        self.update(ConsumerKind::Sidecar, name, |c| c.last.problems = bounded(problems));
    }

    /// The sidecar's ADS stream came up or went down.
    pub fn sidecar_connected(&self, name: &str, connected: bool) {
        self.update(ConsumerKind::Sidecar, name, |c| c.connected = connected);
    }

    /// A consumer of before a restart, which has not been heard since.
    pub fn remember(&self, kind: ConsumerKind, name: &str) {
        self.update(kind, name, |_| ());
    }

    /// A consumer's stream of this number came up; numbers grow. Of a name's streams the newest counts.
    pub fn attach(&self, kind: ConsumerKind, name: &str, session: u64) -> Attached {
        self.update(kind, name, |c| drop(c.live.insert(session, Word::default())));
        Attached { board: self.clone(), key: (kind, name.to_owned()), session }
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
        let tunnels = board.consumers.iter().flat_map(|((_, name), consumer)| {
            let report = |t: &TunnelState| TunnelReport { from: name.clone(), tunnel: t.clone() };
            consumer.word().tunnels.iter().map(report)
        });
        Standing {
            consumers: board.consumers.iter().map(|(key, consumer)| consumer.status(key)).collect(),
            problems: board.problems.values().flatten().cloned().collect(),
            tunnels: tunnels.collect(),
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

    fn update(&self, kind: ConsumerKind, name: &str, change: impl FnOnce(&mut Consumer)) {
        let key = (kind, name.to_owned());
        let mut board = self.lock();
        let before = board.consumers.get(&key).map(|c| (c.status(&key), c.word().tunnels.clone()));
        let consumer = board.consumers.entry(key.clone()).or_default();
        change(consumer);
        let same = before.is_some_and(|(status, tunnels)| {
            status == consumer.status(&key) && same_but_for_measures(&tunnels, &consumer.word().tunnels)
        });
        drop(board);
        if !same {
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

impl Consumer {
    fn word(&self) -> &Word {
        self.live.last_key_value().map_or(&self.last, |(_, word)| word)
    }

    fn status(&self, (kind, name): &Key) -> ConsumerStatus {
        let word = self.word();
        ConsumerStatus {
            kind: *kind,
            name: name.clone(),
            applied: word.applied,
            connected: self.connected || !self.live.is_empty(),
            problems: word.problems.clone(),
        }
    }
}

impl Attached {
    /// It has applied `stamp`.
    pub fn applied(&self, stamp: Stamp) {
        self.say(|word| word.applied = Some(stamp));
    }

    /// What keeps it from doing all it should, whole; empty when nothing does.
    pub fn problems(&self, problems: Vec<String>) {
        self.say(|word| word.problems = bounded(problems));
    }

    /// Where its tunnels stand, whole. Measures alone signal no change: they go along with the next one.
    pub fn tunnels(&self, tunnels: Vec<TunnelState>) {
        self.say(|word| word.tunnels = tunnels);
    }

    fn say(&self, change: impl FnOnce(&mut Word)) {
        let (kind, name) = &self.key;
        self.board.update(*kind, name, |c| {
            if let Some(word) = c.live.get_mut(&self.session) {
                change(word);
            }
        });
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let (kind, name) = &self.key;
        self.board.update(*kind, name, |c| {
            if let Some(word) = c.live.remove(&self.session)
                && c.live.is_empty()
            {
                // Where the tunnels of one stand that is not heard is not known.
                c.last = Word { tunnels: Vec::new(), ..word };
            }
        });
    }
}

fn bounded(problems: Vec<String>) -> Vec<String> {
    // The same words twice tell nobody more.
    let mut known = BTreeSet::new();
    problems.into_iter().map(cut).filter(|text| known.insert(text.clone())).take(limits::CONSUMER_PROBLEMS).collect()
}

fn same_but_for_measures(a: &[TunnelState], b: &[TunnelState]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same_but_for_measures(b))
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
    use isthmus_model::{
        ids::{Epoch, Revision},
        local::Transport,
    };

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
    fn the_same_words_of_one_consumer_are_kept_once() {
        let board = StatusBoard::new();
        let gateway = board.attach(ConsumerKind::Gateway, "gateway-1", 1);
        gateway.problems(["port taken", "no such cluster", "port taken"].map(str::to_owned).to_vec());
        assert_eq!(board.standing().consumers[0].problems, ["port taken", "no such cluster"]);
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
        let stream = board.attach(ConsumerKind::Gateway, "gateway-1", 1);
        stream.problems((0..500).map(|port| format!("port {port} is taken")).collect());
        assert_eq!(gateway(&board).problems.len(), limits::CONSUMER_PROBLEMS);
        stream.problems(Vec::new());
        assert!(gateway(&board).problems.is_empty());
    }

    fn gateway(board: &StatusBoard) -> ConsumerStatus {
        board.standing().consumers.remove(0)
    }

    fn stamp(revision: u64) -> Stamp {
        Stamp { epoch: Epoch(1), revision: Revision(revision) }
    }

    #[test]
    fn the_newest_stream_of_a_name_counts_and_an_older_one_again_when_it_is_gone() {
        let board = StatusBoard::new();
        let old = board.attach(ConsumerKind::Gateway, "gateway-1", 1);
        old.applied(stamp(3));
        let new = board.attach(ConsumerKind::Gateway, "gateway-1", 2);
        assert_eq!((gateway(&board).connected, gateway(&board).applied), (true, None));
        old.applied(stamp(4));
        old.problems(vec!["old".to_owned()]);
        assert_eq!((gateway(&board).applied, gateway(&board).problems), (None, Vec::new()));
        new.applied(stamp(5));
        drop(new);
        assert_eq!((gateway(&board).connected, gateway(&board).applied), (true, Some(stamp(4))));
        let newer = board.attach(ConsumerKind::Gateway, "gateway-1", 3);
        newer.applied(stamp(6));
        drop(old);
        assert_eq!((gateway(&board).connected, gateway(&board).applied), (true, Some(stamp(6))));
        drop(newer);
        assert_eq!((gateway(&board).connected, gateway(&board).applied), (false, Some(stamp(6))));
    }

    #[test]
    fn tunnels_are_known_while_their_gateway_is_connected_and_measures_alone_do_not_signal() {
        let tunnel = |up, rtt_us, loss_ppm| TunnelState {
            cluster: "us-west".parse().unwrap(),
            gateway: "gateway-1".to_owned(),
            up,
            rtt_us,
            transport: Transport::Quic,
            downgraded: false,
            loss_ppm,
            cwnd_bytes: 0,
            dial_error: String::new(),
        };
        let board = StatusBoard::new();
        let stream = board.attach(ConsumerKind::Gateway, "gateway-2", 1);
        stream.tunnels(vec![tunnel(true, 700, 0)]);
        let mut changes = board.changes();
        stream.tunnels(vec![tunnel(true, 900, 4)]);
        assert!(!changes.has_changed().unwrap());
        let report = TunnelReport { from: "gateway-2".to_owned(), tunnel: tunnel(true, 900, 4) };
        assert_eq!(board.standing().tunnels, [report], "the latest measures go along with the next report");
        stream.tunnels(vec![TunnelState { transport: Transport::Tcp, downgraded: true, ..tunnel(true, 900, 4) }]);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        drop(stream);
        assert!(board.standing().tunnels.is_empty() && changes.has_changed().unwrap());
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        assert!(cut("é".repeat(2_000)).len() <= MAX_TEXT + '…'.len_utf8());
    }
}
