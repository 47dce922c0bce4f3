//! The group as one of its nodes sees it, for people.

use isthmus_model::{ids::NodeName, time::Timestamp};
use serde::Serialize;

use crate::{
    raft::{EngineMetrics, Group},
    state::State,
};

/// `GET /v1/nodes`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct GroupStatus {
    /// The node that answered.
    node: String,
    /// Who leads, if anybody does.
    leader: Option<String>,
    term: u64,
    /// The last entry of the answering node's log.
    last_log_index: u64,
    /// By name.
    nodes: Vec<NodeStatus>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeStatus {
    name: NodeName,
    id: u64,
    address: String,
    role: Role,
    /// The last entry that it is known to hold; known to the leader, and of the answering node itself.
    log_index: Option<u64>,
    joined_at: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    Leader,
    Voter,
    /// It gets the log and has no vote yet.
    Learner,
    /// It is not in the group yet.
    Joining,
}

impl GroupStatus {
    pub(crate) fn of(node: &str, group: &Group, state: &State) -> Self {
        let metrics = group.metrics();
        let metrics = metrics.borrow();
        let membership = &metrics.membership_config;
        let leader = metrics.current_leader;
        let name = |id: u64| membership.nodes().find(|(other, _)| **other == id).map(|(_, peer)| peer.name.clone());
        let nodes = state.nodes().iter().map(|(name, info)| NodeStatus {
            name: name.clone(),
            id: info.id,
            address: info.address.clone(),
            role: role(&metrics, info.id),
            log_index: log_index(&metrics, info.id),
            joined_at: info.joined_at,
        });
        Self {
            node: node.to_owned(),
            leader: leader.and_then(name),
            term: metrics.current_term,
            last_log_index: metrics.last_log_index.unwrap_or_default(),
            nodes: nodes.collect(),
        }
    }
}

fn role(metrics: &EngineMetrics, id: u64) -> Role {
    let membership = &metrics.membership_config;
    match () {
        () if metrics.current_leader == Some(id) => Role::Leader,
        () if membership.voter_ids().any(|voter| voter == id) => Role::Voter,
        () if membership.nodes().any(|(node, _)| *node == id) => Role::Learner,
        () => Role::Joining,
    }
}

fn log_index(metrics: &EngineMetrics, id: u64) -> Option<u64> {
    if metrics.id == id {
        return metrics.last_log_index;
    }
    metrics.replication.as_ref()?.get(&id).copied().flatten().map(|at| at.index)
}
