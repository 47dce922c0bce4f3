//! What of the control plane's word is believed. Pure.
//!
//! A stolen or broken control plane must not swap a cluster's roots unnoticed: the first bundle of each trust domain is
//! pinned, and only a bundle signed by a key of the pinned one replaces it. Anything else keeps the pinned one and makes
//! a problem. A revocation is never taken back: whoever was revoked once stays so here, whatever a restored, stolen or
//! broken control plane says later, until people start over. A state that contradicts itself, or is of another federation, is refused whole.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_api::convert::{Problem, limits};
use isthmus_identity::bundle::{BundleDocument, verify_successor};
use isthmus_model::{
    global::{ClusterInfo, ClusterState, GlobalSnapshot, InconsistentError, Locality},
    ids::{ClusterIndex, ClusterName, Stamp, TrustDomain},
    service::TrustBundle,
};
use serde::{Deserialize, Serialize};

use crate::status::problem;

/// The bundles and revocations believed so far; outlives restarts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pins {
    /// The federation's own, from the join.
    pub federation: TrustBundle,
    /// By cluster; kept when a cluster goes.
    pub clusters: BTreeMap<ClusterName, TrustBundle>,
    /// Every cluster that was ever seen as revoked.
    #[serde(default)]
    pub revoked: BTreeSet<ClusterName>,
}

impl Pins {
    /// What a cluster believes that has just joined.
    pub fn new(federation: TrustBundle) -> Self {
        Self { federation, clusters: BTreeMap::new(), revoked: BTreeSet::new() }
    }
}

/// Why a state was refused whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Older than what is held.
    #[error(
        "the control plane offers {offered}, but this agent holds {held} already; a control plane restored from backup must begin a new epoch"
    )]
    Stale {
        /// What came.
        offered: Stamp,
        /// What is held.
        held: Stamp,
    },
    /// Of others.
    #[error("the control plane speaks for federation {0}, which this cluster did not join")]
    Federation(TrustDomain),
    /// Contradicts itself.
    #[error("the control plane's state contradicts itself")]
    Inconsistent(#[from] InconsistentError),
    /// A cluster claims a trust domain that was another's.
    #[error(
        "cluster {cluster} claims trust domain {domain}, which belongs to cluster {owner}, without a signature of its owner"
    )]
    DomainTaken {
        /// The claimant.
        cluster: ClusterName,
        /// What it claims.
        domain: TrustDomain,
        /// Whose it is.
        owner: ClusterName,
    },
}

/// A state that may be used.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// With believed bundles only.
    pub snapshot: GlobalSnapshot,
    /// The bundles as of now.
    pub pins: Pins,
    /// What was not believed.
    pub problems: Vec<Problem>,
}

/// Is `offered` news for someone who holds `held`?
pub fn is_news(held: Option<Stamp>, offered: Stamp) -> Result<bool, Refused> {
    match held {
        Some(held) if offered < held => Err(Refused::Stale { offered, held }),
        Some(held) => Ok(offered > held),
        None => Ok(true),
    }
}

/// Judges a state. `own` is this cluster with its own CA's bundle, which no one else can tell it.
pub fn admit(raw: &GlobalSnapshot, pins: &Pins, own: (&ClusterName, &TrustBundle)) -> Result<Admitted, Refused> {
    if raw.federation != pins.federation.trust_domain {
        return Err(Refused::Federation(raw.federation.clone()));
    }
    raw.check()?;
    let mut judged = Admitted { snapshot: raw.clone(), pins: pins.clone(), problems: Vec::new() };
    let at = format!("federation {}", raw.federation);
    let kept = follow(&at, &pins.federation, &raw.federation_bundle, &mut judged.problems);
    judged.pins.federation = kept.clone();
    judged.snapshot.federation_bundle = kept;
    for (name, cluster) in &mut judged.snapshot.clusters {
        let at = format!("cluster {name}");
        if name == own.0 {
            // A control plane that is only behind holds a predecessor of our bundle.
            if verify_successor(&cluster.bundle, own.1).is_err() {
                let message = "the control plane gives out a trust bundle for this cluster that its CA did not make; \
                               the other clusters may be trusting a stranger: compare with `isthmusctl get clusters`";
                judged.problems.push(problem(at, message));
            }
            cluster.bundle = own.1.clone();
            continue;
        }
        let bundle = match judged.pins.clusters.get(name) {
            Some(pinned) => follow(&at, pinned, &cluster.bundle, &mut judged.problems),
            None => {
                let domain = &cluster.bundle.trust_domain;
                let pinned = judged.pins.clusters.iter().find(|(_, b)| b.trust_domain == *domain);
                let pinned = pinned.or_else(|| (own.1.trust_domain == *domain).then_some(own));
                if let Some((owner, pinned)) = pinned
                    && verify_successor(pinned, &cluster.bundle).is_err()
                {
                    let (cluster, owner) = (name.clone(), owner.clone());
                    return Err(Refused::DomainTaken { cluster, domain: domain.clone(), owner });
                }
                if let Err(e) = BundleDocument::parse(&cluster.bundle.document) {
                    judged.problems.push(problem(
                        at,
                        format!("its trust bundle is not usable, so none of its workloads is trusted: {e}"),
                    ));
                }
                cluster.bundle.clone()
            }
        };
        judged.pins.clusters.insert(name.clone(), bundle.clone());
        cluster.bundle = bundle;
    }
    hold_revocations(&mut judged, own);
    judged.snapshot.keep_to_grants(own.0);
    Ok(judged)
}

/// Remembers who is revoked, and revokes again who was: by name, or by a trust domain that is a revoked cluster's, since
/// that one has its keys still.
fn hold_revocations(judged: &mut Admitted, own: (&ClusterName, &TrustBundle)) {
    let Admitted { snapshot, pins, problems } = judged;
    let seen = snapshot.clusters.values().filter(|c| c.state == ClusterState::Revoked);
    pins.revoked.extend(seen.map(|c| c.name.clone()));
    let bundle = |name: &ClusterName| if name == own.0 { Some(own.1) } else { pins.clusters.get(name) };
    let domains: BTreeSet<_> = pins.revoked.iter().filter_map(|name| Some(&bundle(name)?.trust_domain)).collect();
    let revoked = |c: &ClusterInfo| pins.revoked.contains(&c.name) || domains.contains(&c.bundle.trust_domain);
    let mut clusters: BTreeMap<ClusterName, ClusterInfo> = snapshot
        .clusters
        .values()
        .filter(|c| revoked(c))
        .map(|c| (c.name.clone(), ClusterInfo { state: ClusterState::Revoked, ..c.clone() }))
        .collect();
    // The control plane counts indexes up from one; whom it dropped gets one from the other end.
    let taken: BTreeSet<u16> = snapshot.clusters.values().map(|c| c.index.0).collect();
    let free = (1..=u16::MAX).rev().filter(|index| !taken.contains(index));
    let dropped = pins.revoked.iter().filter(|name| !snapshot.clusters.contains_key(*name));
    let room = limits::CLUSTERS.saturating_sub(snapshot.clusters.len());
    for (name, index) in dropped.zip(free).take(room) {
        let info = bundle(name).and_then(|bundle| dropped_cluster(name, index, bundle));
        clusters.extend(info.map(|info| (name.clone(), info)));
    }
    if clusters.is_empty() {
        return;
    }
    let held = GlobalSnapshot {
        stamp: snapshot.stamp,
        federation: snapshot.federation.clone(),
        federation_bundle: snapshot.federation_bundle.clone(),
        settings: snapshot.settings.clone(),
        clusters,
        services: BTreeMap::new(),
    };
    for name in snapshot.keep_revoked(&held) {
        let message = "the control plane says that it is active, or does not know it any more, but it was revoked, or has \
                       the trust domain of a cluster that was; it stays revoked here: if the control plane was restored \
                       from a backup, revoke it there again with `isthmusctl cluster revoke`; to take part again, it \
                       must join under a new name and trust domain";
        problems.push(problem(format!("cluster {name}"), message));
    }
}

/// A revoked cluster that the control plane has dropped, without what only the control plane knew of it.
fn dropped_cluster(name: &ClusterName, index: u16, bundle: &TrustBundle) -> Option<ClusterInfo> {
    Some(ClusterInfo {
        name: name.clone(),
        index: ClusterIndex(index),
        locality: Locality { region: "".parse().ok()?, zone: "".parse().ok()? },
        state: ClusterState::Revoked,
        bundle: bundle.clone(),
        gateways: Vec::new(),
        grant: Default::default(),
    })
}

/// The bundle to use when `next` is offered after `pinned`.
fn follow(at: &str, pinned: &TrustBundle, next: &TrustBundle, problems: &mut Vec<Problem>) -> TrustBundle {
    match verify_successor(pinned, next) {
        Ok(()) => next.clone(),
        Err(e) => {
            let message = format!(
                "the control plane offers a new trust bundle of {} that its owner did not sign, so the one before \
                 stays in use: {e}",
                pinned.trust_domain
            );
            problems.push(problem(at, message));
            pinned.clone()
        }
    }
}

#[cfg(test)]
mod tests;
