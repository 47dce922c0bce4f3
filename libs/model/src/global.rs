//! The federation as every member sees it: clusters and global services, at one revision.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    failover::FailoverPolicy,
    grant::ClusterGrant,
    ids::{ClusterIndex, ClusterName, Region, ServiceName, SpiffeId, Stamp, TrustDomain, VipIndex, Zone},
    service::{GatewayAddress, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};

/// Where something runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Locality {
    /// For example "us".
    pub region: Region,
    /// For example "us-east-1".
    pub zone: Zone,
}

/// Whether a cluster takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterState {
    /// A member.
    Active,
    /// A member whose exports get no new traffic from other clusters as long as anybody else can take it. Its own callers
    /// stay.
    Draining,
    /// Cut off for good; kept so that every member knows to refuse it.
    Revoked,
}

/// One member cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Its id in the clusterset.
    pub name: ClusterName,
    /// Never reused.
    pub index: ClusterIndex,
    /// Where it runs.
    pub locality: Locality,
    /// Member or revoked.
    pub state: ClusterState,
    /// What it may do.
    #[serde(default)]
    pub grant: ClusterGrant,
    /// Its own trust domain's bundle.
    pub bundle: TrustBundle,
    /// And where their tunnels are dialled.
    pub gateways: Vec<GatewayAddress>,
}

/// A port of a global service and who exposes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GlobalPort {
    /// The port, as the oldest exporter that has it declares it.
    pub port: ServicePort,
    /// Only these clusters get its traffic (KEP-1645).
    pub clusters: BTreeSet<ClusterName>,
}

/// One cluster's share in a global service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exporter {
    /// Age decides conflicts.
    pub created_at: Timestamp,
    /// Who may answer there.
    pub identities: BTreeSet<SpiffeId>,
}

/// A disagreement among exporters, for their Conflict condition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Conflict {
    /// A reason of KEP-1645, for example "PortConflict".
    pub reason: String,
    /// Which clusters say what.
    pub message: String,
}

/// The merge of all exports of one name. Exists while at least one active cluster exports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GlobalService {
    /// The name.
    pub name: ServiceName,
    /// Stable for the service's life.
    pub index: VipIndex,
    /// The oldest exporter's.
    pub kind: ServiceKind,
    /// The union, ordered by number then name.
    pub ports: Vec<GlobalPort>,
    /// At least one.
    pub exporters: BTreeMap<ClusterName, Exporter>,
    /// Sorted; empty when all agree.
    pub conflicts: Vec<Conflict>,
}

/// Settings of the whole federation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Settings {
    /// For services without a policy of their own.
    #[serde(default)]
    pub failover: FailoverPolicy,
    /// When a cluster withdraws many exports at once.
    #[serde(default)]
    pub withdrawals: WithdrawalPolicy,
}

/// What happens when a cluster withdraws many exports at once, which is an accident more often than a wish: they stay until
/// the withdrawal is confirmed, by an operator or by time. Traffic follows availability meanwhile, as ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WithdrawalPolicy {
    /// Whether they are held at all.
    pub hold: bool,
    /// Only of a cluster that has more exports than this,
    pub above_exports: u32,
    /// and only if more than this share of them goes, in per cent.
    pub above_percent: u32,
    /// Milliseconds until it counts as confirmed; `None`: only an operator confirms.
    pub confirm_after_ms: Option<u64>,
}

impl Settings {
    /// What is wrong with them that their types cannot say: the field's path, and what to write.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.withdrawals.above_percent > 100 {
            let message = format!("{} is more than 100; use 0 to 100", self.withdrawals.above_percent);
            problems.push(("withdrawals.abovePercent", message));
        }
        if self.withdrawals.confirm_after_ms == Some(0) {
            let message = "0 would confirm at once; write hold: false for that, or null for never".to_owned();
            problems.push(("withdrawals.confirmAfterMs", message));
        }
        problems
    }
}

impl Default for WithdrawalPolicy {
    fn default() -> Self {
        Self { hold: true, above_exports: 10, above_percent: 50, confirm_after_ms: Some(600_000) }
    }
}

impl WithdrawalPolicy {
    /// Is it to be held that a cluster withdraws `gone` of its `held` exports at once?
    pub fn holds(&self, held: usize, gone: usize) -> bool {
        let (above_exports, above_percent) = (self.above_exports as usize, self.above_percent as usize);
        self.hold && held > above_exports && gone.saturating_mul(100) > held.saturating_mul(above_percent)
    }
}

/// The whole state that members consume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GlobalSnapshot {
    /// Which state this is.
    pub stamp: Stamp,
    /// The federation's own trust domain.
    pub federation: TrustDomain,
    /// Verifies the control plane, agents, gateways and DNS servers.
    pub federation_bundle: TrustBundle,
    /// Federation-wide.
    pub settings: Settings,
    /// Members and revoked clusters.
    pub clusters: BTreeMap<ClusterName, ClusterInfo>,
    /// By name. Shared: a state is copied for each change of it.
    pub services: BTreeMap<ServiceName, Arc<GlobalService>>,
}

/// A change from one stamp to a later one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalDelta {
    /// What the receiver must hold.
    pub from: Stamp,
    /// What it holds afterwards.
    pub to: Stamp,
    /// If changed.
    pub federation_bundle: Option<TrustBundle>,
    /// If changed.
    pub settings: Option<Settings>,
    /// New or changed.
    pub clusters: Vec<ClusterInfo>,
    /// Gone.
    pub removed_clusters: Vec<ClusterName>,
    /// New or changed.
    pub services: Vec<Arc<GlobalService>>,
    /// Gone.
    pub removed_services: Vec<ServiceName>,
}

/// A delta that does not start where the holder stands: ask for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the delta starts at {from}, but the state held is {held}")]
pub struct GapError {
    /// Where the delta starts.
    pub from: Stamp,
    /// Where the holder stands.
    pub held: Stamp,
}

/// A snapshot whose parts do not fit together: whoever made it is broken or hostile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InconsistentError {
    /// Ports pinned to a cluster would lead to two.
    #[error("two clusters have the index {0}")]
    ClusterIndexTwice(ClusterIndex),
    /// One VIP would mean two services.
    #[error("two services have the index {0}")]
    ServiceIndexTwice(VipIndex),
    /// One could mint the other's identities.
    #[error("the trust domain {0} has two owners")]
    TrustDomainTwice(TrustDomain),
    /// The federation's bundle is another trust domain's.
    #[error("the federation's bundle is of the trust domain {0}")]
    FederationBundle(TrustDomain),
    /// An exporter that is no cluster of the federation.
    #[error("the service {0} has the exporter {1}, which is not a cluster of the federation")]
    UnknownExporter(ServiceName, ClusterName),
    /// An exporter claims an identity that its bundle does not vouch for.
    #[error("the cluster {0} names {1}, which is outside its trust domain")]
    ForeignIdentity(ClusterName, SpiffeId),
}

impl ClusterState {
    /// Does such a cluster take part?
    pub fn is_member(self) -> bool {
        match self {
            Self::Active | Self::Draining => true,
            Self::Revoked => false,
        }
    }

    /// As tables print it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Revoked => "revoked",
        }
    }
}

impl GlobalSnapshot {
    /// Clusters that one state may hold, revoked ones included.
    pub const MAX_CLUSTERS: usize = 4_096;

    /// Applies `delta`, or refuses it unchanged if it starts elsewhere.
    pub fn apply(&mut self, delta: GlobalDelta) -> Result<(), GapError> {
        if delta.from != self.stamp {
            return Err(GapError { from: delta.from, held: self.stamp });
        }
        self.stamp = delta.to;
        if let Some(bundle) = delta.federation_bundle {
            self.federation_bundle = bundle;
        }
        if let Some(settings) = delta.settings {
            self.settings = settings;
        }
        for name in &delta.removed_clusters {
            self.clusters.remove(name);
        }
        for name in &delta.removed_services {
            self.services.remove(name);
        }
        self.clusters.extend(delta.clusters.into_iter().map(|c| (c.name.clone(), c)));
        self.services.extend(delta.services.into_iter().map(|s| (s.name.clone(), s)));
        Ok(())
    }

    /// Revocation is for good: what `held` knows as revoked stays so here, whatever this state says of it, and exports
    /// nothing. Returns the clusters of which this state said otherwise. Those that it does not know are put back as far as
    /// there is room; one that is not known is no member either.
    pub fn keep_revoked(&mut self, held: &Self) -> Vec<ClusterName> {
        let mut forced = Vec::new();
        let mut room = Self::MAX_CLUSTERS.saturating_sub(self.clusters.len());
        for past in held.clusters.values().filter(|c| c.state == ClusterState::Revoked) {
            match self.clusters.get_mut(&past.name) {
                Some(now) if now.state == ClusterState::Revoked => continue,
                Some(now) => now.state = ClusterState::Revoked,
                None if room == 0 => continue,
                None => {
                    room -= 1;
                    self.clusters.insert(past.name.clone(), past.clone());
                }
            }
            self.withdraw(&past.name);
            forced.push(past.name.clone());
        }
        forced
    }

    fn withdraw(&mut self, cluster: &ClusterName) {
        self.services.retain(|_, service| {
            if service.exporters.contains_key(cluster) {
                let service = Arc::make_mut(service);
                service.exporters.remove(cluster);
                service.ports.retain_mut(|port| !port.clusters.remove(cluster) || !port.clusters.is_empty());
            }
            !service.exporters.is_empty()
        });
    }

    /// Checks what no single entry shows: of the members, indexes are unique and each trust domain has one owner
    /// (a revoked one uses neither, and may be known here only from an earlier state); exporters are known and name only
    /// identities of their own trust domain.
    pub fn check(&self) -> Result<(), InconsistentError> {
        let mut indexes = BTreeSet::new();
        let mut domains = BTreeSet::from([&self.federation]);
        for cluster in self.clusters.values().filter(|c| c.state.is_member()) {
            if !indexes.insert(cluster.index) {
                return Err(InconsistentError::ClusterIndexTwice(cluster.index));
            }
            if !domains.insert(&cluster.bundle.trust_domain) {
                return Err(InconsistentError::TrustDomainTwice(cluster.bundle.trust_domain.clone()));
            }
        }
        if self.federation_bundle.trust_domain != self.federation {
            return Err(InconsistentError::FederationBundle(self.federation_bundle.trust_domain.clone()));
        }
        let mut indexes = BTreeSet::new();
        for service in self.services.values() {
            if !indexes.insert(service.index) {
                return Err(InconsistentError::ServiceIndexTwice(service.index));
            }
            self.check_exporters(service)?;
        }
        Ok(())
    }

    fn check_exporters(&self, service: &GlobalService) -> Result<(), InconsistentError> {
        for (cluster, exporter) in &service.exporters {
            let Some(info) = self.clusters.get(cluster) else {
                return Err(InconsistentError::UnknownExporter(service.name.clone(), cluster.clone()));
            };
            let own = &info.bundle.trust_domain;
            if let Some(id) = exporter.identities.iter().find(|id| id.trust_domain() != own) {
                return Err(InconsistentError::ForeignIdentity(cluster.clone(), id.clone()));
            }
        }
        Ok(())
    }

    /// The cluster, if it is a member in good standing.
    pub fn active_cluster(&self, name: &ClusterName) -> Option<&ClusterInfo> {
        self.clusters.get(name).filter(|c| c.state.is_member())
    }
}

#[cfg(test)]
#[path = "global_tests.rs"]
mod tests;
