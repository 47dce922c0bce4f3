//! The replicated state of the federation, pure: commands go in through [`State::apply`], a [`View`] comes out.
//!
//! Holds: the same commands in the same order give the same state on every node (no IO, no clock, no randomness, no
//! unordered iteration; time comes in with the command). A rejected command changes nothing. The revision grows exactly
//! when something that members see changes. VIP indexes belong to a service for its life, cluster indexes for ever.
//!
//! It does not hold what consumers report (see [`crate::status`]), nor addresses or counts of endpoints.

mod apply;
pub mod backup;
mod command;
mod events;
mod nodes;
mod past;
mod proposal;
#[cfg(test)]
mod tests;
mod trust;
mod view;
mod vips;

use std::{collections::BTreeMap, sync::Arc};

use isthmus_model::{
    global::{ClusterState, GlobalSnapshot},
    ids::{ClusterName, ServiceName, Stamp},
    service::{Export, Publication},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

pub(crate) use self::view::Change;
pub use self::{
    command::{Command, Join, KeyHash, MintToken, Outcome, Publish, Rejection, RejectionKind, Response, TokenHash},
    events::{Actor, Event},
    nodes::{AdmitNode, MintNodeToken, NodeInfo, SetNode},
    proposal::{Answers, Batch, Proposal, ProposalId},
    view::{Content, Digest, Held, Update, View},
};
use self::{events::Events, nodes::Nodes, past::Past, proposal::Remembered, vips::VipIndexes};

/// Join tokens kept at one time, used ones included.
pub const MAX_TOKENS: usize = 10_000;

/// Everything that Raft replicates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The latest time that an accepted command carried; time never runs backwards in here.
    clock: Timestamp,
    /// What members see. `None` until the federation's bundle was set for the first time.
    global: Option<Arc<GlobalSnapshot>>,
    /// One for each entry of `global.clusters`.
    members: BTreeMap<ClusterName, Member>,
    tokens: BTreeMap<TokenHash, Grant>,
    vips: VipIndexes,
    /// The highest cluster index given away.
    last_cluster_index: u16,
    #[serde(default)]
    past: Past,
    #[serde(default)]
    events: Events,
    #[serde(default)]
    nodes: Nodes,
    #[serde(default)]
    remembered: Remembered,
}

/// What is kept of a cluster beyond what all members see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Member {
    /// When it joined for the first time.
    joined_at: Timestamp,
    /// Its latest publication's exports. Shared: a state is cloned for each view.
    exports: Arc<BTreeMap<ServiceName, Claim>>,
}

/// An export as merged, with the age that the cluster claimed for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Claim {
    /// As published, before it was clamped.
    claimed_at: Timestamp,
    /// With `created_at` clamped to between the cluster's join and the time of the entry that brought it.
    export: Export,
}

/// A join token, known by its hash alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Grant {
    cluster: ClusterName,
    expires_at: Timestamp,
    used_at: Option<Timestamp>,
    /// The key of whoever used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used_by: Option<KeyHash>,
}

impl State {
    /// What members see; `None` before the first [`Command::SetFederationBundle`].
    pub fn global(&self) -> Option<&Arc<GlobalSnapshot>> {
        self.global.as_ref()
    }

    /// Where the state stands.
    pub fn stamp(&self) -> Stamp {
        self.global.as_ref().map(|g| g.stamp).unwrap_or_default()
    }

    /// What was asked of the state, latest first, as far as it is kept.
    pub fn events(&self) -> impl Iterator<Item = &Event> {
        self.events.latest()
    }

    /// Would publishing this again change nothing? Lets a session answer without writing to the log.
    pub fn already_published(&self, cluster: &ClusterName, publication: &Publication) -> bool {
        let Some(info) = self.global.as_ref().and_then(|g| g.active_cluster(cluster)) else { return false };
        let Some(member) = self.members.get(cluster) else { return false };
        info.gateways == publication.gateways
            && info.bundle.trust_domain == publication.bundle.trust_domain
            && info.bundle.document == publication.bundle.document
            && member.exports.len() == publication.exports.len()
            && publication.exports.iter().all(|(name, export)| {
                member.exports.get(name).is_some_and(|claim| {
                    claim.claimed_at == export.created_at
                        && claim.export.kind == export.kind
                        && claim.export.ports == export.ports
                        && claim.export.identities == export.identities
                })
            })
    }

    /// Checks a join token as [`Command::Join`] will, without using it up: what an unauthenticated caller sends must
    /// not reach the log unless it is likely to be accepted. A used token is still good for the key that used it.
    pub fn check_token(
        &self,
        hash: &TokenHash,
        key: Option<KeyHash>,
        cluster: &ClusterName,
        now: Timestamp,
    ) -> Result<(), Rejection> {
        let grant = self.tokens.get(hash).ok_or_else(|| Rejection::UnknownToken { cluster: cluster.clone() })?;
        if grant.cluster != *cluster {
            return Err(Rejection::TokenForAnother { token: grant.cluster.clone(), cluster: cluster.clone() });
        }
        let repeats = key.is_some() && key == grant.used_by;
        if let Some(at) = grant.used_at.filter(|_| !repeats) {
            return Err(Rejection::TokenUsed { cluster: cluster.clone(), at });
        }
        if now.max(self.clock) >= grant.expires_at {
            return Err(Rejection::TokenExpired { cluster: cluster.clone(), at: grant.expires_at });
        }
        Ok(())
    }

    /// Who exports `name`. A revoked cluster exports nothing.
    fn exporters(&self, name: &ServiceName) -> BTreeMap<&ClusterName, &Export> {
        self.members.iter().filter_map(|(cluster, member)| Some((cluster, &member.exports.get(name)?.export))).collect()
    }
}

/// Refuses anyone who is not an active member, and says why.
pub fn require_active(global: &GlobalSnapshot, cluster: &ClusterName) -> Result<(), Rejection> {
    match global.clusters.get(cluster).map(|info| info.state) {
        Some(ClusterState::Active) => Ok(()),
        Some(ClusterState::Revoked) => Err(Rejection::ClusterRevoked { cluster: cluster.clone() }),
        None => Err(Rejection::UnknownCluster { cluster: cluster.clone() }),
    }
}
