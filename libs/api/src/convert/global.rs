//! Global snapshots and deltas ↔ [`isthmus_model::global`].
//!
//! A snapshot is also checked as a whole ([`GlobalSnapshot::check`]). A delta cannot be: who applies one checks the
//! result.

use std::{collections::BTreeSet, sync::Arc};

use isthmus_model::{
    global::{
        ClusterInfo, ClusterState, Conflict, Exporter, GlobalDelta, GlobalPort, GlobalService, GlobalSnapshot, Settings,
    },
    ids::{ClusterIndex, ClusterName, ServiceName, SpiffeId, VipIndex},
    service::ServicePort,
    time::Timestamp,
};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::{
    ConvertError, Result,
    common::{gateways, known, service_kind},
    limits, list, name, optional, required, text, unique,
};
use crate::proto::common::v1 as pb;

impl TryFrom<pb::GlobalSnapshot> for GlobalSnapshot {
    type Error = ConvertError;

    fn try_from(p: pb::GlobalSnapshot) -> Result<Self> {
        let snapshot = Self {
            stamp: required("stamp", p.stamp)?,
            federation: name("federation", &p.federation)?,
            federation_bundle: required("federation_bundle", p.federation_bundle)?,
            settings: optional("settings", p.settings)?.unwrap_or_default(),
            clusters: unique("clusters", limits::CLUSTERS, p.clusters, ClusterInfo::try_from, |c| c.name.clone())?,
            services: unique("services", limits::SERVICES, p.services, shared_service, |s| s.name.clone())?,
        };
        snapshot.check().map_err(|e| ConvertError::new("", e.to_string()))?;
        Ok(snapshot)
    }
}

fn shared_service(p: pb::GlobalService) -> Result<Arc<GlobalService>> {
    GlobalService::try_from(p).map(Arc::new)
}

impl From<&GlobalSnapshot> for pb::GlobalSnapshot {
    fn from(s: &GlobalSnapshot) -> Self {
        Self {
            stamp: Some(s.stamp.into()),
            federation: s.federation.to_string(),
            federation_bundle: Some((&s.federation_bundle).into()),
            settings: Some((&s.settings).into()),
            clusters: s.clusters.values().map(Into::into).collect(),
            services: s.services.values().map(|service| service.as_ref().into()).collect(),
        }
    }
}

/// A digest of a state's wire form: equal for two who hold the same state, whichever way it came to them. It tells
/// histories apart, not forgers: whoever sends one is believed to hold what it names.
pub fn snapshot_digest(snapshot: &GlobalSnapshot) -> [u8; 32] {
    DigestSum::of(snapshot).digest(snapshot)
}

/// What clusters and services add to a state's digest: the sum of their own, so that whoever knows what changed need not
/// look at all the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DigestSum([u64; 4]);

impl DigestSum {
    /// Of all of `snapshot`'s.
    pub fn of(snapshot: &GlobalSnapshot) -> Self {
        let mut sum = Self::default();
        snapshot.clusters.values().for_each(|cluster| sum.cluster(None, Some(cluster)));
        snapshot.services.values().for_each(|service| sum.service(None, Some(service)));
        sum
    }

    /// A cluster was `before` and is `after`.
    pub fn cluster(&mut self, before: Option<&ClusterInfo>, after: Option<&ClusterInfo>) {
        let item = |cluster: &ClusterInfo| item(1, pb::ClusterInfo::from(cluster).encode_to_vec());
        self.replace(before.map(item), after.map(item));
    }

    /// A service was `before` and is `after`.
    pub fn service(&mut self, before: Option<&GlobalService>, after: Option<&GlobalService>) {
        let item = |service: &GlobalService| {
            let mut wire = pb::GlobalService::from(service);
            // What a receiver cuts short.
            for conflict in &mut wire.conflicts {
                conflict.reason = text(std::mem::take(&mut conflict.reason));
                conflict.message = text(std::mem::take(&mut conflict.message));
            }
            item(2, wire.encode_to_vec())
        };
        self.replace(before.map(item), after.map(item));
    }

    /// The digest of `snapshot`, whose clusters and services this is the sum of.
    pub fn digest(self, snapshot: &GlobalSnapshot) -> [u8; 32] {
        let head = pb::GlobalSnapshot {
            stamp: Some(snapshot.stamp.into()),
            federation: snapshot.federation.to_string(),
            federation_bundle: Some((&snapshot.federation_bundle).into()),
            settings: Some((&snapshot.settings).into()),
            clusters: Vec::new(),
            services: Vec::new(),
        };
        let mut hash = Sha256::new_with_prefix(head.encode_to_vec());
        self.0.iter().for_each(|lane| hash.update(lane.to_be_bytes()));
        hash.finalize().into()
    }

    fn replace(&mut self, before: Option<[u64; 4]>, after: Option<[u64; 4]>) {
        for (lane, (before, after)) in self.0.iter_mut().zip(lanes(before).zip(lanes(after))) {
            *lane = lane.wrapping_sub(before).wrapping_add(after);
        }
    }
}

fn lanes(item: Option<[u64; 4]>) -> impl Iterator<Item = u64> {
    item.unwrap_or_default().into_iter()
}

/// The digest of one thing of a `kind`.
fn item(kind: u8, wire: Vec<u8>) -> [u64; 4] {
    let hash: [u8; 32] = Sha256::new_with_prefix([kind]).chain_update(wire).finalize().into();
    let mut lanes = [0; 4];
    for (lane, bytes) in lanes.iter_mut().zip(hash.as_chunks::<8>().0) {
        *lane = u64::from_be_bytes(*bytes);
    }
    lanes
}

impl TryFrom<pb::GlobalDelta> for GlobalDelta {
    type Error = ConvertError;

    fn try_from(p: pb::GlobalDelta) -> Result<Self> {
        let clusters = unique("clusters", limits::CLUSTERS, p.clusters, ClusterInfo::try_from, |c| c.name.clone())?;
        let services = unique("services", limits::SERVICES, p.services, shared_service, |s| s.name.clone())?;
        let delta = Self {
            from: required("from", p.from)?,
            to: required("to", p.to)?,
            federation_bundle: optional("federation_bundle", p.federation_bundle)?,
            settings: optional::<_, Settings>("settings", p.settings)?,
            clusters: clusters.into_values().collect(),
            removed_clusters: list("removed_clusters", limits::CLUSTERS, p.removed_clusters, |c| name("", &c))?,
            services: services.into_values().collect(),
            removed_services: list("removed_services", limits::SERVICES, p.removed_services, ServiceName::try_from)?,
        };
        if delta.to <= delta.from {
            return Err(ConvertError::new("to", format!("{} is not after {}", delta.to, delta.from)));
        }
        Ok(delta)
    }
}

impl From<&GlobalDelta> for pb::GlobalDelta {
    fn from(d: &GlobalDelta) -> Self {
        Self {
            from: Some(d.from.into()),
            to: Some(d.to.into()),
            federation_bundle: d.federation_bundle.as_ref().map(Into::into),
            settings: d.settings.as_ref().map(Into::into),
            clusters: d.clusters.iter().map(Into::into).collect(),
            removed_clusters: d.removed_clusters.iter().map(ClusterName::to_string).collect(),
            services: d.services.iter().map(|service| service.as_ref().into()).collect(),
            removed_services: d.removed_services.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<pb::ClusterInfo> for ClusterInfo {
    type Error = ConvertError;

    fn try_from(p: pb::ClusterInfo) -> Result<Self> {
        let index = u16::try_from(p.index).ok().filter(|i| *i > 0);
        let state = match known::<pb::ClusterState>("state", p.state)? {
            pb::ClusterState::Active => ClusterState::Active,
            pb::ClusterState::Draining => ClusterState::Draining,
            pb::ClusterState::Revoked => ClusterState::Revoked,
            pb::ClusterState::Unspecified => return Err(ConvertError::new("state", "is not specified")),
        };
        Ok(Self {
            name: name("name", &p.name)?,
            index: ClusterIndex(index.ok_or_else(|| {
                ConvertError::new("index", format!("{} is not a cluster index; 1 to 65535 are", p.index))
            })?),
            locality: required("locality", p.locality)?,
            state,
            bundle: required("bundle", p.bundle)?,
            gateways: gateways("gateways", p.gateways)?,
            grant: optional("grant", p.grant)?.unwrap_or_default(),
        })
    }
}

impl From<&ClusterInfo> for pb::ClusterInfo {
    fn from(c: &ClusterInfo) -> Self {
        let state = match c.state {
            ClusterState::Active => pb::ClusterState::Active,
            ClusterState::Draining => pb::ClusterState::Draining,
            ClusterState::Revoked => pb::ClusterState::Revoked,
        };
        Self {
            name: c.name.to_string(),
            index: c.index.0.into(),
            locality: Some((&c.locality).into()),
            state: state.into(),
            bundle: Some((&c.bundle).into()),
            gateways: c.gateways.iter().map(Into::into).collect(),
            grant: Some((&c.grant).into()),
        }
    }
}

impl TryFrom<pb::GlobalService> for GlobalService {
    type Error = ConvertError;

    fn try_from(p: pb::GlobalService) -> Result<Self> {
        if p.index == 0 {
            return Err(ConvertError::new("index", "0 is not a service index; they start at 1"));
        }
        let exporters = unique("exporters", limits::CLUSTERS, p.exporters, exporter, |(cluster, _)| cluster.clone())?;
        if exporters.is_empty() {
            return Err(ConvertError::new("exporters", "is empty; a global service has at least one"));
        }
        let ports = list("ports", limits::PORTS * limits::CLUSTERS, p.ports, |port| {
            let port = GlobalPort::try_from(port)?;
            match port.clusters.iter().find(|c| !exporters.contains_key(c)) {
                Some(stranger) => Err(ConvertError::new("clusters", format!("{stranger} is not an exporter"))),
                None => Ok(port),
            }
        })?;
        Ok(Self {
            name: required("name", p.name)?,
            index: VipIndex(p.index),
            kind: service_kind("kind", p.kind)?,
            ports,
            exporters: exporters.into_values().collect(),
            conflicts: list("conflicts", limits::CONFLICTS, p.conflicts, |c| {
                Ok(Conflict { reason: text(c.reason), message: text(c.message) })
            })?,
        })
    }
}

impl From<&GlobalService> for pb::GlobalService {
    fn from(s: &GlobalService) -> Self {
        let exporter = |(cluster, e): (&ClusterName, &Exporter)| pb::Exporter {
            cluster: cluster.to_string(),
            created_at_unix_ms: e.created_at.0,
            identities: e.identities.iter().map(SpiffeId::to_string).collect(),
        };
        let conflict = |c: &Conflict| pb::Conflict { reason: c.reason.clone(), message: c.message.clone() };
        Self {
            name: Some((&s.name).into()),
            index: s.index.0,
            kind: pb::ServiceKind::from(s.kind).into(),
            ports: s.ports.iter().map(Into::into).collect(),
            exporters: s.exporters.iter().map(exporter).collect(),
            conflicts: s.conflicts.iter().map(conflict).collect(),
        }
    }
}

impl TryFrom<pb::GlobalPort> for GlobalPort {
    type Error = ConvertError;

    fn try_from(p: pb::GlobalPort) -> Result<Self> {
        let clusters: BTreeSet<ClusterName> =
            unique("clusters", limits::CLUSTERS, p.clusters, |c| name("", &c), ClusterName::clone)?
                .into_keys()
                .collect();
        if clusters.is_empty() {
            return Err(ConvertError::new("clusters", "is empty; a port has at least one cluster"));
        }
        Ok(Self { port: required::<_, ServicePort>("port", p.port)?, clusters })
    }
}

impl From<&GlobalPort> for pb::GlobalPort {
    fn from(p: &GlobalPort) -> Self {
        Self { port: Some((&p.port).into()), clusters: p.clusters.iter().map(ClusterName::to_string).collect() }
    }
}

fn exporter(p: pb::Exporter) -> Result<(ClusterName, Exporter)> {
    let exporter = Exporter { created_at: Timestamp(p.created_at_unix_ms), identities: identities(p.identities)? };
    Ok((name("cluster", &p.cluster)?, exporter))
}

/// The `identities` field of an export or exporter.
pub(super) fn identities(items: Vec<String>) -> Result<BTreeSet<SpiffeId>> {
    let ids = unique("identities", limits::IDENTITIES, items, |id| name("", &id), SpiffeId::clone)?;
    Ok(ids.into_keys().collect())
}
