//! Commands as they stand in the log: many in one entry, each with an id, so that one that is proposed twice takes effect
//! once.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::Arc,
};

use isthmus_model::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Actor, Change, Command, Response, State};

/// How many answers are remembered, roughly. A proposal is tried again within seconds.
const REMEMBERED: usize = 10_240;
/// Of which one is copied with each entry of the log.
const PART: usize = 32;

/// What the proposer has drawn for a proposal: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ProposalId(pub [u8; 16]);

/// A command with its id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// Of this proposal and its repetitions.
    pub id: ProposalId,
    /// Who asks.
    #[serde(default)]
    pub by: Actor,
    /// When it was proposed.
    #[serde(default)]
    pub at: Timestamp,
    /// What is proposed.
    pub command: Command,
}

/// One log entry: proposals in their order, each decided by itself. Clones share them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Batch(pub Arc<Vec<Proposal>>);

/// One for each proposal; none for an entry that carried no batch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers(pub Vec<Response>);

/// The answers to the latest proposals, in parts: a state is cloned for each view, and all but the last part are shared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Remembered {
    /// Oldest first.
    parts: VecDeque<Arc<BTreeMap<ProposalId, Response>>>,
}

impl Remembered {
    fn answer(&self, id: &ProposalId) -> Option<&Response> {
        self.parts.iter().rev().find_map(|part| part.get(id))
    }

    fn remember(&mut self, id: ProposalId, response: Response) {
        if self.parts.back().is_none_or(|part| part.len() >= PART) {
            self.parts.push_back(Arc::default());
        }
        if let Some(part) = self.parts.back_mut() {
            Arc::make_mut(part).insert(id, response);
        }
        if self.parts.len() > REMEMBERED / PART {
            self.parts.pop_front();
        }
    }
}

impl State {
    /// Applies the proposals of one entry, in order: the answers, and what members see of them.
    pub(crate) fn apply_batch(&mut self, batch: &Batch) -> (Answers, Vec<Change>) {
        let mut changes = Vec::new();
        let answers = batch.0.iter().map(|proposal| {
            if let Some(known) = self.remembered.answer(&proposal.id) {
                return known.clone();
            }
            let before = self.stamp();
            let (response, change) = self.apply(&proposal.command);
            self.events.record(proposal, &response, (before, self.stamp()));
            changes.extend(change);
            self.remembered.remember(proposal.id, response.clone());
            response
        });
        let answers = Answers(answers.collect());
        (answers, changes)
    }
}

impl fmt::Debug for ProposalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl TryFrom<String> for ProposalId {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl From<ProposalId> for String {
    fn from(id: ProposalId) -> Self {
        hex::encode(id.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> ProposalId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&n.to_le_bytes());
        ProposalId(id)
    }

    #[test]
    fn the_latest_answers_are_remembered_and_survive_a_snapshot() {
        let mut remembered = Remembered::default();
        for n in 0..3 * REMEMBERED {
            remembered.remember(id(n), Response::NoCommand);
        }
        let kept = (0..3 * REMEMBERED).filter(|n| remembered.answer(&id(*n)).is_some()).collect::<Vec<_>>();
        assert_eq!(kept.last(), Some(&(3 * REMEMBERED - 1)));
        assert!((REMEMBERED - PART..=REMEMBERED).contains(&kept.len()), "{}", kept.len());
        assert!(kept.is_sorted() && kept.windows(2).all(|two| two[1] == two[0] + 1));
        let json = serde_json::to_vec(&remembered).unwrap();
        assert_eq!(serde_json::from_slice::<Remembered>(&json).unwrap(), remembered);
    }
}
