//! The control plane's own nodes: who they are, where they are dialled, and the tokens by which they come. Who votes is the
//! engine's affair, and follows this ([`crate::nodes`]).

use std::collections::BTreeMap;

use isthmus_model::{ids::NodeName, service::TrustBundle, time::Timestamp};
use serde::{Deserialize, Serialize};

use super::{
    Change, KeyHash, Rejection, State, TokenHash,
    apply::{TOKEN_MEMORY_MS, within},
};

/// Nodes at one time. More would make every write slower and no data safer.
const MAX_NODES: usize = 9;
/// Node tokens kept at one time.
const MAX_NODE_TOKENS: usize = 100;

/// See [`super::Command::MintNodeToken`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MintNodeToken {
    /// Of the secret.
    pub hash: TokenHash,
    /// The only node that may use it.
    pub node: NodeName,
    /// From then on it is worthless.
    pub expires_at: Timestamp,
    /// When it was proposed.
    pub now: Timestamp,
}

/// See [`super::Command::AdmitNode`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmitNode {
    /// Of the secret that the node showed.
    pub hash: TokenHash,
    /// Of the node's own root certificate.
    pub root: KeyHash,
    /// Its name.
    pub node: NodeName,
    /// "host:port" where the other nodes dial it.
    pub address: String,
    /// The federation's, with the node's root.
    pub bundle: TrustBundle,
    /// The highest feature level that its program supports.
    #[serde(default = "first_level")]
    pub supports: u32,
    /// When it was proposed.
    pub now: Timestamp,
}

/// See [`super::Command::SetNode`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetNode {
    /// Its number in the group.
    pub id: u64,
    /// Its name.
    pub node: NodeName,
    /// "host:port" where the other nodes dial it.
    pub address: String,
    /// The highest feature level that its program supports.
    #[serde(default = "first_level")]
    pub supports: u32,
    /// When it was proposed.
    pub now: Timestamp,
}

/// A node of the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeInfo {
    /// Its number in the group, never given to another one.
    pub id: u64,
    /// "host:port" where the other nodes dial it.
    pub address: String,
    /// When it became one.
    pub joined_at: Timestamp,
    /// The highest feature level that its program supports, as far as it has said.
    #[serde(default = "first_level")]
    pub supports: u32,
}

/// Of programs that say nothing of levels.
fn first_level() -> u32 {
    1
}

/// All nodes, and what there is to admit more.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Nodes {
    present: BTreeMap<NodeName, NodeInfo>,
    /// The highest number given away.
    last_id: u64,
    tokens: BTreeMap<TokenHash, NodeGrant>,
}

/// A node token, known by its hash alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct NodeGrant {
    node: NodeName,
    expires_at: Timestamp,
    /// See the same of a join token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ends: Option<Timestamp>,
    used_at: Option<Timestamp>,
    used_by: Option<KeyHash>,
}

impl State {
    /// The control plane's nodes, by name.
    pub fn nodes(&self) -> &BTreeMap<NodeName, NodeInfo> {
        &self.nodes.present
    }

    /// Checks a node token as [`super::Command::AdmitNode`] will. A used one is still good for the root that used it.
    pub fn check_node_token(
        &self,
        hash: &TokenHash,
        root: KeyHash,
        node: &NodeName,
        now: Timestamp,
    ) -> Result<(), Rejection> {
        let node = || node.clone();
        let grant = self.nodes.tokens.get(hash).ok_or_else(|| Rejection::UnknownNodeToken { node: node() })?;
        if grant.node != node() {
            return Err(Rejection::TokenForAnotherNode { token: grant.node.clone(), node: node() });
        }
        if let Some(at) = grant.used_at.filter(|_| grant.used_by != Some(root)) {
            return Err(Rejection::NodeTokenUsed { node: node(), at });
        }
        if self.has_ended(now, grant.expires_at, grant.ends) {
            return Err(Rejection::NodeTokenExpired { node: node(), at: grant.expires_at });
        }
        Ok(())
    }

    pub(super) fn mint_node_token(&mut self, mint: &MintNodeToken) -> Result<Change, Rejection> {
        let now = self.clock.max(mint.now);
        if self.nodes.present.contains_key(&mint.node) {
            return Err(Rejection::NodeExists { node: mint.node.clone() });
        }
        let forgotten =
            |grant: &NodeGrant| grant.ends.unwrap_or(grant.expires_at).0.saturating_add(TOKEN_MEMORY_MS) <= now.0;
        let kept = self.nodes.tokens.values().filter(|grant| !forgotten(grant)).count();
        within("node tokens outstanding", kept + 1, MAX_NODE_TOKENS)?;
        let ends = self.ends(mint.now, mint.expires_at);
        self.clock = now;
        self.nodes.tokens.retain(|_, grant| !forgotten(grant));
        let (node, expires_at) = (mint.node.clone(), mint.expires_at);
        let grant = NodeGrant { node, expires_at, ends, used_at: None, used_by: None };
        self.nodes.tokens.insert(mint.hash, grant);
        Ok(Change::default())
    }

    pub(super) fn admit_node(&mut self, admit: &AdmitNode) -> Result<Change, Rejection> {
        let now = self.clock.max(admit.now);
        self.check_node_token(&admit.hash, admit.root, &admit.node, admit.now)?;
        let repeats = self.nodes.tokens.get(&admit.hash).is_some_and(|grant| grant.used_by == Some(admit.root));
        let held = self.nodes.present.get(&admit.node);
        if held.is_some() && !repeats {
            return Err(Rejection::NodeExists { node: admit.node.clone() });
        }
        if held.is_none() {
            within("control plane nodes", self.nodes.present.len() + 1, MAX_NODES)?;
        }
        let (id, joined_at) = held.map_or((self.nodes.last_id + 1, now), |held| (held.id, held.joined_at));
        if admit.supports < self.level() {
            let (node, supports, level) = (admit.node.clone(), admit.supports, self.level());
            return Err(Rejection::NotSupported { node, supports, level });
        }
        let change = self.set_federation_bundle(&admit.bundle)?;
        self.clock = now;
        self.nodes.last_id = self.nodes.last_id.max(id);
        let info = NodeInfo { id, address: admit.address.clone(), joined_at, supports: admit.supports };
        self.nodes.present.insert(admit.node.clone(), info);
        if let Some(grant) = self.nodes.tokens.get_mut(&admit.hash) {
            grant.used_at = grant.used_at.or(Some(now));
            grant.used_by = Some(admit.root);
        }
        Ok(change)
    }

    pub(super) fn set_node(&mut self, set: &SetNode) -> Result<Change, Rejection> {
        let now = self.clock.max(set.now);
        let founds = self.nodes.present.is_empty();
        let held = self.nodes.present.get(&set.node).filter(|held| held.id == set.id);
        if held.is_none() && !founds {
            return Err(Rejection::UnknownNode { node: set.node.clone() });
        }
        let joined_at = held.map_or(now, |held| held.joined_at);
        self.clock = now;
        self.nodes.last_id = self.nodes.last_id.max(set.id);
        let info = NodeInfo { id: set.id, address: set.address.clone(), joined_at, supports: set.supports };
        self.nodes.present.insert(set.node.clone(), info);
        Ok(Change::default())
    }

    pub(super) fn remove_node(&mut self, node: &NodeName) -> Result<Change, Rejection> {
        if !self.nodes.present.contains_key(node) {
            return Err(Rejection::UnknownNode { node: node.clone() });
        }
        if self.nodes.present.len() == 1 {
            return Err(Rejection::LastNode { node: node.clone() });
        }
        self.nodes.present.remove(node);
        self.nodes.tokens.retain(|_, grant| grant.node != *node);
        Ok(Change::default())
    }
}
