//! What other nodes ask of this one's engine. Who may ask is decided before ([`crate::nodes`]).

use openraft::error::Fatal;
use serde::de::DeserializeOwned;

use super::{
    Group, NoIndex,
    agreement::Digests,
    network::{FORMAT, json},
    proposer::NotHere,
};
use crate::state::Batch;

/// The engine, as peers see it.
#[derive(Clone)]
pub(crate) struct Inbound(Group);

/// Why a peer's request was not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InboundError {
    /// The message is for another node: an address has a new owner.
    #[error("this is node {own}, the message is for node {target}; check the nodes' addresses: isthmusctl cp status")]
    Misdirected { own: u64, target: u64 },
    /// Of another version.
    #[error("the message has format {0}, this version reads {FORMAT}: upgrade the older node")]
    Format(u32),
    /// Not a message.
    #[error("the message is not readable: {0}")]
    Malformed(serde_json::Error),
    /// What was asked for is the leader's.
    #[error("this node does not lead")]
    NotLeader,
    /// The engine has stopped, or a majority cannot be reached.
    #[error("{0}")]
    Failed(String),
}

impl Inbound {
    pub(crate) fn new(group: Group) -> Self {
        Self(group)
    }

    pub(crate) fn digests(&self) -> Digests {
        self.0.digests()
    }

    pub(crate) async fn append_entries(&self, body: &[u8]) -> Result<Vec<u8>, InboundError> {
        Ok(json(&self.0.raft.append_entries(parse(body)?).await))
    }

    pub(crate) async fn vote(&self, body: &[u8]) -> Result<Vec<u8>, InboundError> {
        Ok(json(&self.0.raft.vote(parse(body)?).await))
    }

    pub(crate) async fn install_snapshot(&self, body: &[u8]) -> Result<Vec<u8>, InboundError> {
        Ok(json(&self.0.raft.install_snapshot(parse(body)?).await))
    }

    /// Commits proposals, if this node leads, or hands them on if that was asked for: the answers, and the log's index.
    pub(crate) async fn propose(&self, proposals: &[u8], hand_on: bool) -> Result<(Vec<u8>, u64), InboundError> {
        let batch: Batch = parse(proposals)?;
        match self.0.commit_here(batch.clone()).await {
            Ok((answers, index)) => Ok((json(&answers), index)),
            Err(NotHere::Elsewhere(leader)) if hand_on => {
                let handed = self.0.hand_on(leader, &batch).await;
                let (answers, index) = handed.map_err(|error| InboundError::Failed(error.to_string()))?;
                Ok((json(&answers), index))
            }
            Err(NotHere::Elsewhere(_)) => Err(InboundError::NotLeader),
            Err(NotHere::Failed(error)) => Err(InboundError::Failed(error.to_string())),
        }
    }

    pub(crate) async fn read_index(&self) -> Result<u64, InboundError> {
        self.0.read_index().await.map_err(|error| match error {
            NoIndex::Elsewhere(_) => InboundError::NotLeader,
            NoIndex::NoQuorum(why) => InboundError::Failed(why),
            NoIndex::Stopped(fatal) => stopped(&fatal),
        })
    }

    /// Refuses what is meant for another node, or of another format.
    pub(crate) fn check(&self, format: u32, target: u64) -> Result<(), InboundError> {
        let own = self.0.raft.metrics().borrow().id;
        match () {
            () if format != FORMAT => Err(InboundError::Format(format)),
            () if target != own => Err(InboundError::Misdirected { own, target }),
            () => Ok(()),
        }
    }

    /// Whether `name` is a node of the group, as far as this one knows; a node that has never heard of a group takes
    /// anybody's word who has a node's certificate.
    pub(crate) fn knows(&self, name: &str) -> bool {
        let metrics = self.0.raft.metrics();
        let metrics = metrics.borrow();
        let mut nodes = metrics.membership_config.nodes().peekable();
        nodes.peek().is_none() || nodes.any(|(_, peer)| peer.name == name)
    }
}

fn stopped(fatal: &Fatal<u64>) -> InboundError {
    InboundError::Failed(fatal.to_string())
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, InboundError> {
    serde_json::from_slice(body).map_err(InboundError::Malformed)
}
