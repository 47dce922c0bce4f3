//! One node of the model: what it has on disk, what it holds in memory, and Raft's rules of votes and logs, each as one
//! step of one or two nodes. No IO, no time, no chance.

use std::sync::Arc;

use super::world::Bug;
use crate::{
    federation::Encoded,
    state::{Answers, Batch, State, View},
};

/// One entry of the log.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) term: u64,
    pub(super) batch: Batch,
}

/// A snapshot as it lies on disk, and goes to others.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) index: u64,
    pub(super) term: u64,
    pub(super) bytes: Arc<Vec<u8>>,
}

pub(super) struct Replica {
    pub(super) up: bool,
    // On disk.
    pub(super) term: u64,
    voted: Option<usize>,
    /// Entries from `base + 1` on.
    log: Vec<Entry>,
    base: (u64, u64),
    pub(super) snapshot: Stored,
    // In memory.
    pub(super) leads: bool,
    pub(super) commit: u64,
    pub(super) applied: u64,
    pub(super) view: View,
    pub(super) encoded: Encoded,
    /// What a leader knows of the others.
    matches: Vec<u64>,
    /// Counts its starts.
    pub(super) run: u64,
}

impl Replica {
    pub(super) fn new(nodes: usize) -> Self {
        let state = Arc::new(State::default());
        let bytes = Arc::new(serde_json::to_vec(&*state).unwrap());
        Self {
            up: true,
            term: 0,
            voted: None,
            log: Vec::new(),
            base: (0, 0),
            snapshot: Stored { index: 0, term: 0, bytes },
            leads: false,
            commit: 0,
            applied: 0,
            view: View::new(state),
            encoded: Encoded::default(),
            matches: vec![0; nodes],
            run: 0,
        }
    }

    pub(super) fn last(&self) -> u64 {
        self.base.0 + self.log.len() as u64
    }

    fn at(&self, index: u64) -> Option<&Entry> {
        self.log.get(usize::try_from(index.checked_sub(self.base.0 + 1)?).ok()?)
    }

    pub(super) fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base.0 { Some(self.base.1) } else { self.at(index).map(|entry| entry.term) }
    }

    /// It loses its memory.
    pub(super) fn crash(&mut self, bug: Option<Bug>) {
        self.up = false;
        self.leads = false;
        if bug == Some(Bug::ForgottenVote) {
            self.voted = None;
        }
        if bug == Some(Bug::UnflushedTail) {
            // What was acknowledged was not on disk yet.
            self.log.pop();
        }
    }

    /// From the snapshot; the log after it is applied when it is known to be committed.
    pub(super) fn start(&mut self) {
        self.up = true;
        self.run += 1;
        self.load();
    }

    fn load(&mut self) {
        let state: State = serde_json::from_slice(&self.snapshot.bytes).unwrap();
        self.view = View::new(Arc::new(state));
        self.encoded = Encoded::default();
        (self.applied, self.commit) = (self.snapshot.index, self.snapshot.index);
    }

    /// Writes a snapshot, and cuts the log to `keep` entries before it.
    pub(super) fn take_snapshot(&mut self, keep: u64) {
        let bytes = Arc::new(serde_json::to_vec(self.view.state()).unwrap());
        let term = self.term_at(self.applied).unwrap();
        self.snapshot = Stored { index: self.applied, term, bytes };
        let base = self.applied.saturating_sub(keep).max(self.base.0);
        let base_term = self.term_at(base).unwrap();
        self.log.drain(..usize::try_from(base - self.base.0).unwrap());
        self.base = (base, base_term);
    }

    /// A vote for `candidate`, if it may have it.
    pub(super) fn vote(&mut self, candidate: usize, term: u64, last: (u64, u64), bug: Option<Bug>) -> bool {
        self.hear(term);
        let own = (self.term_at(self.last()).unwrap(), self.last());
        let behind = last < own && bug != Some(Bug::VoteForWhoeverAsks);
        if term < self.term || self.voted.is_some_and(|voted| voted != candidate) || behind {
            return false;
        }
        self.voted = Some(candidate);
        true
    }

    /// Of a term.
    pub(super) fn hear(&mut self, term: u64) {
        if term > self.term {
            (self.term, self.voted, self.leads) = (term, None, false);
        }
    }

    /// Stands for election in the next term.
    pub(super) fn stand(&mut self, own: usize) -> (u64, (u64, u64)) {
        self.hear(self.term + 1);
        self.voted = Some(own);
        (self.term, (self.term_at(self.last()).unwrap(), self.last()))
    }

    /// Leads from now on.
    pub(super) fn lead(&mut self) {
        self.leads = true;
        self.matches.fill(0);
        self.append(Batch(Arc::new(Vec::new())));
    }

    /// The place of a new entry.
    pub(super) fn append(&mut self, batch: Batch) -> (u64, u64) {
        self.log.push(Entry { term: self.term, batch });
        (self.term, self.last())
    }

    /// Sends `to` up to `most` entries, or a snapshot: whether it was one.
    pub(super) fn replicate(&mut self, to: &mut Self, nth: usize, most: usize, bug: Option<Bug>) -> bool {
        to.hear(self.term);
        if to.term > self.term {
            self.hear(to.term);
            return false;
        }
        to.leads = false;
        // The last index at which both agree, at or below the end of both.
        let mut agreed = to.last().min(self.last());
        while agreed > to.base.0 && agreed > self.base.0 && to.term_at(agreed) != self.term_at(agreed) {
            agreed -= 1;
        }
        let snapshot = agreed < self.base.0 || to.term_at(agreed) != self.term_at(agreed);
        if snapshot {
            to.install(self.snapshot.clone(), bug);
            agreed = to.last();
        }
        for _ in 0..most {
            let Some(entry) = self.at(agreed + 1).cloned() else { break };
            if to.term_at(agreed + 1) != Some(entry.term) {
                if bug != Some(Bug::KeptTail) {
                    to.log.truncate(usize::try_from(agreed - to.base.0).unwrap());
                }
                if to.at(agreed + 1).is_none() {
                    to.log.push(entry);
                }
            }
            agreed += 1;
        }
        to.commit = to.commit.max(self.commit.min(agreed));
        self.matches[nth] = self.matches[nth].max(agreed);
        snapshot
    }

    fn install(&mut self, snapshot: Stored, bug: Option<Bug>) {
        // What it has beyond is not of this leader's log, or comes again.
        self.log.clear();
        self.base = (snapshot.index, snapshot.term);
        let index = snapshot.index;
        self.snapshot = snapshot;
        if bug == Some(Bug::SnapshotNotTaken) {
            (self.applied, self.commit) = (index, index);
        } else {
            self.load();
        }
    }

    /// What a majority has is committed, if it is of this term.
    pub(super) fn advance(&mut self, own: usize, bug: Option<Bug>) {
        let mut matches = self.matches.clone();
        matches[own] = self.last();
        matches.sort_unstable();
        let majority = matches.len() / 2 + 1;
        let needed = if bug == Some(Bug::CommittedWithoutMajority) { majority - 1 } else { majority };
        let reached = matches[matches.len() - needed];
        if self.term_at(reached) == Some(self.term) || bug == Some(Bug::CommittedOfAnEarlierTerm) {
            self.commit = self.commit.max(reached);
        }
    }

    /// Applies the next committed entry.
    pub(super) fn apply(&mut self, bug: Option<Bug>) -> Option<(u64, Entry, Answers)> {
        let index = self.applied + 1;
        if index > self.commit {
            return None;
        }
        let entry = self.at(index)?.clone();
        let mut state = self.view.state().clone();
        let batch = match bug {
            Some(Bug::BatchReversed) if self.run % 2 == 1 => {
                Batch(Arc::new(entry.batch.0.iter().rev().cloned().collect()))
            }
            _ => entry.batch.clone(),
        };
        let (mut answers, changes) = state.apply_batch(&batch);
        if bug == Some(Bug::AppliedTwice) && self.run % 2 == 1 {
            for proposal in batch.0.iter() {
                state.apply(&proposal.command);
            }
        }
        if bug == Some(Bug::AnswersSwapped) {
            answers.0.reverse();
        }
        self.view.advance(Arc::new(state), changes);
        self.applied = index;
        Some((index, entry, answers))
    }
}
