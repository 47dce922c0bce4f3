//! The replicated state of the federation, pure: commands go in through [`State::apply`], a [`View`] comes out.
//!
//! Holds: the same commands in the same order give the same state on every node (no IO, no clock, no randomness, no
//! unordered iteration; time comes in with the command). A rejected command changes nothing. The revision grows exactly
//! when something changes that members see, or that an operator declared. VIP indexes belong to a service for its life, cluster indexes for ever.
//!
//! It does not hold what consumers report (see [`crate::status`]), nor addresses or counts of endpoints.

pub(crate) mod access;
mod apply;
pub mod backup;
mod command;
mod events;
mod exports;
mod incarnation;
mod level;
mod membership;
mod nodes;
mod past;
mod proposal;
mod resources;
#[cfg(test)]
mod tests;
mod trust;
mod view;
mod vips;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use isthmus_model::{
    global::{ClusterState, GlobalSnapshot},
    grant::ClusterGrant,
    ids::{ClusterName, ServiceName, Stamp},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

pub(crate) use self::view::Change;
pub use self::{
    access::{Access, AccessName, ApiToken, MintApiToken, Role, RoleBinding, Subject},
    command::{Command, Join, KeyHash, MintToken, Outcome, Publish, Rejection, RejectionKind, Response, TokenHash},
    events::{Actor, Event},
    exports::{ConditionReason, ExportCondition, HeldWithdrawal},
    incarnation::Incarnation,
    level::SUPPORTED,
    nodes::{AdmitNode, MintNodeToken, NodeInfo, SetNode},
    proposal::{Answers, Batch, Proposal, ProposalId},
    resources::{Applied, Apply, Resource, ResourceKey, Write},
    view::{Content, Digest, Held, Update, View},
};
use self::{
    events::Events, exports::Member, membership::JoinToken, nodes::Nodes, past::Past, proposal::Remembered,
    resources::Versions, vips::VipIndexes,
};

/// Join tokens kept at one time, used ones included.
pub const MAX_TOKENS: usize = 10_000;

/// Everything that Raft replicates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The latest time that an accepted command carried; time never runs backwards in here.
    clock: Timestamp,
    /// See [`level`].
    #[serde(default)]
    level: u32,
    /// What members see. `None` until the federation's bundle was set for the first time.
    global: Option<Arc<GlobalSnapshot>>,
    /// One for each entry of `global.clusters`.
    members: BTreeMap<ClusterName, Member>,
    tokens: BTreeMap<TokenHash, JoinToken>,
    vips: VipIndexes,
    /// Exported, and not seen for want of a virtual IP.
    #[serde(default)]
    waiting: BTreeSet<ServiceName>,
    /// When each resource was last changed.
    #[serde(default)]
    versions: Versions,
    /// Grants that were declared for clusters that have not joined.
    #[serde(default)]
    promised: BTreeMap<ClusterName, ClusterGrant>,
    /// The highest cluster index given away.
    last_cluster_index: u16,
    #[serde(default)]
    past: Past,
    #[serde(default)]
    events: Events,
    #[serde(default)]
    nodes: Nodes,
    #[serde(default)]
    access: Arc<Access>,
    #[serde(default)]
    remembered: Remembered,
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

    #[cfg(test)]
    pub(crate) fn clock(&self) -> Timestamp {
        self.clock
    }

    /// What was asked of the state, latest first, as far as it is kept.
    pub fn events(&self) -> impl Iterator<Item = &Event> {
        self.events.latest()
    }

    /// By the clock of whoever asks, or by the state's, which never goes back: a clock that does makes no token good again,
    /// and one that once ran ahead leaves those that are minted later their life.
    fn has_ended(&self, now: Timestamp, expires_at: Timestamp, ends: Option<Timestamp>) -> bool {
        now >= expires_at || self.clock >= ends.unwrap_or(expires_at)
    }

    /// When, by the state's clock, something ends that was made at `now`; `None` if that clock is not ahead.
    fn ends(&self, now: Timestamp, expires_at: Timestamp) -> Option<Timestamp> {
        let ahead = self.clock.0.checked_sub(now.0).filter(|ahead| *ahead > 0)?;
        Some(Timestamp(expires_at.0.saturating_add(ahead)))
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
        if self.has_ended(now, grant.expires_at, grant.ends) {
            return Err(Rejection::TokenExpired { cluster: cluster.clone(), at: grant.expires_at });
        }
        Ok(())
    }
}

/// Refuses anyone who is not an active member, and says why.
pub fn require_active(global: &GlobalSnapshot, cluster: &ClusterName) -> Result<(), Rejection> {
    match global.clusters.get(cluster).map(|info| info.state) {
        Some(ClusterState::Active | ClusterState::Draining) => Ok(()),
        Some(ClusterState::Revoked) => Err(Rejection::ClusterRevoked { cluster: cluster.clone() }),
        None => Err(Rejection::UnknownCluster { cluster: cluster.clone() }),
    }
}
