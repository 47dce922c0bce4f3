//! What sessions send, encoded once for all of them: the latest state, and the differences that lead to it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use isthmus_api::proto::common::v1 as common;
use isthmus_model::{
    global::{GlobalDelta, GlobalSnapshot},
    ids::Stamp,
};
use prost::Message as _;

/// Differences kept: agents that were away hold different states.
const MAX_DELTAS: usize = 64;

/// Of the latest state that anybody asked for.
#[derive(Debug, Default)]
pub(crate) struct Encoded(Mutex<Latest>);

#[derive(Debug, Default)]
struct Latest {
    of: Stamp,
    snapshot: Option<Bytes>,
    /// By where they start.
    deltas: BTreeMap<Stamp, Bytes>,
}

impl Encoded {
    pub(crate) fn snapshot(&self, snapshot: &GlobalSnapshot) -> Bytes {
        let encode = || Bytes::from(common::GlobalSnapshot::from(snapshot).encode_to_vec());
        // Whoever comes meanwhile waits for the same bytes.
        self.at(snapshot.stamp, |latest| match latest {
            Some(latest) => latest.snapshot.get_or_insert_with(encode).clone(),
            None => encode(),
        })
    }

    /// The difference between these two, if somebody was sent it: not even made, let alone encoded, for each agent.
    pub(super) fn made(&self, from: Stamp, to: Stamp) -> Option<Bytes> {
        let latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (latest.of == to).then(|| latest.deltas.get(&from).cloned()).flatten()
    }

    pub(crate) fn delta(&self, delta: &GlobalDelta) -> Bytes {
        let encode = || Bytes::from(common::GlobalDelta::from(delta).encode_to_vec());
        self.at(delta.to, |latest| match latest {
            Some(latest) if latest.deltas.len() < MAX_DELTAS || latest.deltas.contains_key(&delta.from) => {
                latest.deltas.entry(delta.from).or_insert_with(encode).clone()
            }
            _ => encode(),
        })
    }

    /// What is kept for the state `of`; nothing if a later one was asked for already.
    fn at(&self, of: Stamp, take: impl FnOnce(Option<&mut Latest>) -> Bytes) -> Bytes {
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if of > latest.of {
            *latest = Latest { of, ..Latest::default() };
        }
        if of == latest.of {
            return take(Some(&mut latest));
        }
        drop(latest);
        take(None)
    }
}
