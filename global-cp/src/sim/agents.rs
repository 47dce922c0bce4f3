//! Agents that follow the federation's state: from node to node, by snapshots and deltas in their wire formats, with messages
//! that are lost with their session. The node's side keeps the rules of [`crate::federation`]'s sessions.

use std::collections::VecDeque;

use bytes::Bytes;
use isthmus_api::{convert::snapshot_digest, proto::common::v1 as common};
use isthmus_model::global::{GlobalDelta, GlobalSnapshot};
use prost::Message as _;
use rand::{RngExt as _, rngs::StdRng};

use super::{judge::Judge, replica::Replica, world::Bug};
use crate::state::{Content, Held, Update};

/// A transport takes so many messages before the agent has read them.
const ROOM: usize = 3;

pub(super) struct Agent {
    pub(super) number: usize,
    held: Option<GlobalSnapshot>,
    session: Option<Session>,
}

struct Session {
    node: usize,
    /// Of the node; with another one this session is over.
    run: u64,
    /// What the agent holds once it has received all that was sent, as the node knows.
    held: Option<Held>,
    sent: VecDeque<Message>,
}

enum Message {
    Snapshot(Bytes),
    Delta(Bytes),
}

/// What a step of an agent did, to be counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Did {
    Nothing,
    Connected,
    Refused,
    Snapshot,
    Delta,
}

impl Agent {
    pub(super) fn new(number: usize) -> Self {
        Self { number, held: None, session: None }
    }

    /// One step at the nodes that it reaches.
    pub(super) fn step(
        &mut self,
        nodes: &[Replica],
        rng: &mut StdRng,
        (judge, bug): (&mut Judge, Option<Bug>),
    ) -> Result<Did, String> {
        let Some(session) = &mut self.session else {
            let node = rng.random_range(0..nodes.len());
            if !nodes[node].up {
                return Ok(Did::Nothing);
            }
            let mut content = |held: &GlobalSnapshot| match rng.random_bool(0.9) {
                true => Content::Digest(snapshot_digest(held)),
                // An agent of another version.
                false => Content::Unknown,
            };
            let held = self.held.as_ref().map(|held| Held { stamp: held.stamp, content: content(held) });
            self.session = Some(Session { node, run: nodes[node].run, held, sent: VecDeque::new() });
            return Ok(Did::Connected);
        };
        let node = &nodes[session.node];
        if !node.up || node.run != session.run || rng.random_bool(0.05) {
            self.session = None;
            return Ok(Did::Nothing);
        }
        if rng.random_bool(0.5) {
            let sent = session.send(node, bug)?;
            if sent == Did::Refused {
                self.session = None;
            }
            return Ok(sent);
        }
        let Some(message) = session.sent.pop_front() else { return Ok(Did::Nothing) };
        self.receive(message, judge)
    }

    /// What it lacks at `node`, all at once.
    pub(super) fn settle(&mut self, node: &Replica, nth: usize, judge: &mut Judge) -> Result<(), String> {
        let held = |held: &GlobalSnapshot| Held { stamp: held.stamp, content: Content::Digest(snapshot_digest(held)) };
        let mut session =
            Session { node: nth, run: node.run, held: self.held.as_ref().map(held), sent: VecDeque::new() };
        if session.send(node, None)? == Did::Refused {
            return Err(format!("agent {} holds more than what there is at the end", self.number));
        }
        while let Some(message) = session.sent.pop_front() {
            self.receive(message, judge)?;
        }
        let (held, here) = (self.held.as_ref(), node.view.global().map(|global| &**global));
        if held == here {
            Ok(())
        } else {
            Err(format!("agent {} holds {held:?} at the end, not {here:?}", self.number))
        }
    }

    fn receive(&mut self, message: Message, judge: &mut Judge) -> Result<Did, String> {
        let (next, did) = match message {
            Message::Snapshot(bytes) => {
                let snapshot = common::GlobalSnapshot::decode(bytes).map_err(|error| error.to_string())?;
                (GlobalSnapshot::try_from(snapshot).map_err(|error| error.to_string())?, Did::Snapshot)
            }
            Message::Delta(bytes) => {
                let delta = common::GlobalDelta::decode(bytes).map_err(|error| error.to_string())?;
                let delta = GlobalDelta::try_from(delta).map_err(|error| error.to_string())?;
                let mut next = self.held.clone().ok_or("a delta for an agent that holds nothing")?;
                next.apply(delta).map_err(|gap| format!("agent {}: {gap}", self.number))?;
                (next, Did::Delta)
            }
        };
        if let Some(held) = self.held.as_ref().filter(|held| held.stamp > next.stamp) {
            return Err(format!("agent {} held {} and was given {}", self.number, held.stamp, next.stamp));
        }
        judge.shown(self.number, &next)?;
        self.held = Some(next);
        Ok(did)
    }
}

impl Session {
    /// The node's part: what the agent lacks, if there is room for it.
    fn send(&mut self, node: &Replica, bug: Option<Bug>) -> Result<Did, String> {
        if self.sent.len() >= ROOM {
            return Ok(Did::Nothing);
        }
        let (stamp, message, did) = match node.view.since(self.held) {
            Update::UpToDate | Update::NotFounded => return Ok(Did::Nothing),
            Update::Ahead { .. } if bug == Some(Bug::SentBack) => {
                let global = node.view.global().ok_or("nothing")?;
                (global.stamp, Message::Snapshot(node.encoded.snapshot(global)), Did::Snapshot)
            }
            Update::Ahead { .. } => return Ok(Did::Refused),
            Update::Diverged => return Err(format!("an agent holds another state {}", node.view.state().stamp())),
            Update::Snapshot(snapshot) => {
                (snapshot.stamp, Message::Snapshot(node.encoded.snapshot(&snapshot)), Did::Snapshot)
            }
            Update::Delta(mut delta) => {
                if bug == Some(Bug::StaleDelta) {
                    delta.services.pop();
                }
                let to = delta.to;
                let bytes = match bug {
                    // Encoded for another one, who held something else.
                    Some(Bug::DeltaOfAnother) => {
                        delta.from.revision.0 = delta.from.revision.0.saturating_sub(1);
                        node.encoded.delta(&delta)
                    }
                    _ => node.encoded.delta(&delta),
                };
                (to, Message::Delta(bytes), Did::Delta)
            }
        };
        node.view.remember();
        self.held = Some(Held { stamp, content: Content::Known });
        if bug != Some(Bug::LostMessage) || self.sent.len() != 1 {
            self.sent.push_back(message);
        }
        Ok(did)
    }
}
