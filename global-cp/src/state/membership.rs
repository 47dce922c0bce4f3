//! Who takes part: join tokens, joining, draining, revocation, and what each cluster may do.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use isthmus_api::convert::limits;
use isthmus_model::{
    global::{ClusterInfo, ClusterState, GlobalSnapshot},
    grant::ClusterGrant,
    ids::{ClusterIndex, ClusterName, ServiceName},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{
    Change, Join, KeyHash, MAX_TOKENS, MintToken, Rejection, ResourceKey, State,
    apply::{TOKEN_MEMORY_MS, within},
    exports::{Member, granted_gateways},
    require_active,
    trust::{check_first_bundle, check_successor},
};

/// A join token, known by its hash alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct JoinToken {
    pub(super) cluster: ClusterName,
    pub(super) expires_at: Timestamp,
    /// The same by the state's clock, which was ahead of the minting node's if a node's clock was ever wrong: absent if it
    /// was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ends: Option<Timestamp>,
    pub(super) used_at: Option<Timestamp>,
    /// The key of whoever used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) used_by: Option<KeyHash>,
    /// What the cluster may do that joins with it; `None`: the default, or what it may already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) grant: Option<ClusterGrant>,
}

impl State {
    pub(super) fn mint_token(&mut self, mint: &MintToken) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        if global.clusters.get(&mint.cluster).is_some_and(|info| info.state == ClusterState::Revoked) {
            return Err(Rejection::ClusterRevoked { cluster: mint.cluster.clone() });
        }
        let now = self.clock.max(mint.now);
        let forgotten =
            |token: &JoinToken| token.ends.unwrap_or(token.expires_at).0.saturating_add(TOKEN_MEMORY_MS) <= now.0;
        let kept = self.tokens.values().filter(|token| !forgotten(token)).count();
        within("join tokens outstanding", kept + 1, MAX_TOKENS)?;
        let ends = self.ends(mint.now, mint.expires_at);
        self.clock = now;
        self.tokens.retain(|_, token| !forgotten(token));
        let token = JoinToken {
            cluster: mint.cluster.clone(),
            expires_at: mint.expires_at,
            ends,
            used_at: None,
            used_by: None,
            grant: mint.grant.clone(),
        };
        self.tokens.insert(mint.hash, token);
        Ok(Change::default())
    }

    pub(super) fn join(&mut self, join: &Join) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        let now = self.clock.max(join.now);
        self.check_token(&join.hash, join.key, &join.cluster, join.now)?;
        let grant = self.tokens.get(&join.hash).and_then(|token| token.grant.clone());
        let grant = grant.or_else(|| self.promised.get(&join.cluster).cloned());
        let info = match global.clusters.get(&join.cluster) {
            Some(member) => rejoined(member, join)?,
            None => {
                check_first_bundle(&join.bundle)
                    .map_err(|why| Rejection::Bundle { cluster: join.cluster.clone(), why })?;
                check_owner(global, join)?;
                within("clusters", global.clusters.len() + 1, limits::CLUSTERS)?;
                let index = self.last_cluster_index.checked_add(1).ok_or_else(|| Rejection::TooMany {
                    what: "clusters that ever joined".to_owned(),
                    count: u64::from(u16::MAX) + 1,
                    limit: u64::from(u16::MAX),
                })?;
                ClusterInfo {
                    name: join.cluster.clone(),
                    index: ClusterIndex(index),
                    locality: join.locality.clone(),
                    state: ClusterState::Active,
                    bundle: join.bundle.clone(),
                    gateways: Vec::new(),
                    grant: ClusterGrant::default(),
                }
            }
        };

        self.clock = now;
        self.last_cluster_index = self.last_cluster_index.max(info.index.0);
        if let Some(token) = self.tokens.get_mut(&join.hash) {
            token.used_at = token.used_at.or(Some(now));
            token.used_by = token.used_by.or(join.key);
        }
        self.members.entry(join.cluster.clone()).or_insert_with(|| Member::new(now));
        self.promised.remove(&join.cluster);
        let mut change = self.replace_visible(info, Vec::new());
        if let Some(grant) = grant {
            self.declare(&ResourceKey::ClusterGrant(join.cluster.clone()));
            change.extend(self.set_grant(&join.cluster, &grant)?);
        }
        Ok(change)
    }

    pub(super) fn revoke(&mut self, cluster: &ClusterName) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        let info = global.clusters.get(cluster);
        let mut info = info.ok_or_else(|| Rejection::UnknownCluster { cluster: cluster.clone() })?.clone();
        info.state = ClusterState::Revoked;
        info.gateways.clear();
        let mut touched = BTreeSet::new();
        if let Some(member) = self.members.get_mut(cluster) {
            touched.extend(member.exports.keys().cloned());
            member.exports = Arc::default();
            member.held = None;
        }
        let merged = self.remerge(cluster, &touched);
        Ok(self.replace_visible(info, merged))
    }

    /// Takes other clusters' traffic off a member, or lets it come again.
    pub(super) fn drain(&mut self, cluster: &ClusterName, drain: bool) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        require_active(global, cluster)?;
        let info = global.clusters.get(cluster);
        let mut info = info.ok_or_else(|| Rejection::UnknownCluster { cluster: cluster.clone() })?.clone();
        info.state = if drain { ClusterState::Draining } else { ClusterState::Active };
        Ok(self.replace_visible(info, Vec::new()))
    }

    /// Changes what a member may do. What it published stays known, so that a wider grant takes effect at once.
    pub(super) fn set_grant(&mut self, cluster: &ClusterName, grant: &ClusterGrant) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        require_active(global, cluster)?;
        let unknown = || Rejection::UnknownCluster { cluster: cluster.clone() };
        let mut info = global.clusters.get(cluster).ok_or_else(unknown)?.clone();
        let member = self.members.get(cluster).ok_or_else(unknown)?;
        let before = std::mem::replace(&mut info.grant, grant.clone());
        info.gateways = granted_gateways(&info, &member.gateways);
        let differs = |name: &&ServiceName| before.may_export(&name.namespace) != grant.may_export(&name.namespace);
        let touched: BTreeSet<ServiceName> = member.exports.keys().filter(differs).cloned().collect();
        let mut change = self.replace_visible(info, Vec::new());
        let merged = self.remerge(cluster, &touched);
        let Some(info) = self.global.as_ref().and_then(|global| global.clusters.get(cluster)).cloned() else {
            return Ok(change);
        };
        change.extend(self.replace_visible(info, merged));
        Ok(change)
    }

    /// Clusters that have a token and have not joined yet, each with when the last of its tokens ends.
    pub fn pending(&self, now: Timestamp) -> BTreeMap<ClusterName, Timestamp> {
        let joined = |cluster: &ClusterName| self.members.contains_key(cluster);
        let mut pending = BTreeMap::new();
        for token in self
            .tokens
            .values()
            .filter(|t| t.used_at.is_none() && !self.has_ended(now, t.expires_at, t.ends) && !joined(&t.cluster))
        {
            let last: &mut Timestamp = pending.entry(token.cluster.clone()).or_default();
            *last = token.expires_at.max(*last);
        }
        pending
    }
}

/// A member that joins again keeps its index, its trust domain and what it published.
fn rejoined(member: &ClusterInfo, join: &Join) -> Result<ClusterInfo, Rejection> {
    let cluster = || join.cluster.clone();
    if member.state == ClusterState::Revoked {
        return Err(Rejection::ClusterRevoked { cluster: cluster() });
    }
    if member.bundle.trust_domain != join.bundle.trust_domain {
        return Err(Rejection::TrustDomainFixed {
            cluster: cluster(),
            fixed: member.bundle.trust_domain.clone(),
            offered: join.bundle.trust_domain.clone(),
        });
    }
    let mut info = member.clone();
    info.locality = join.locality.clone();
    if member.bundle.document != join.bundle.document {
        check_successor(&member.bundle, &join.bundle).map_err(|why| Rejection::Bundle { cluster: cluster(), why })?;
        info.bundle = join.bundle.clone();
    }
    Ok(info)
}

/// A trust domain has one owner for ever; a revoked cluster's is not free.
fn check_owner(global: &GlobalSnapshot, join: &Join) -> Result<(), Rejection> {
    let offered = &join.bundle.trust_domain;
    let owner = if *offered == global.federation {
        Some("the federation itself".to_owned())
    } else {
        let owner = global.clusters.values().find(|info| info.bundle.trust_domain == *offered);
        owner.map(|info| format!("cluster {}", info.name))
    };
    match owner {
        Some(owner) => {
            Err(Rejection::TrustDomainTaken { trust_domain: offered.clone(), owner, cluster: join.cluster.clone() })
        }
        None => Ok(()),
    }
}
