//! What the tests and fuzz targets of this crate share: names and a small federation.
#![allow(clippy::unwrap_used, reason = "test code, which the fuzz targets share")]

use std::collections::{BTreeMap, BTreeSet};

use isthmus_model::{
    global::{ClusterInfo, ClusterState, Exporter, GlobalPort, GlobalService, GlobalSnapshot, Locality, Settings},
    ids::{ClusterIndex, ClusterName, Epoch, Revision, ServiceName, Stamp, VipIndex},
    service::{AppProtocol, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};

pub(crate) const FEDERATION: &str = "isthmus.example";

pub(crate) fn cluster(name: &str) -> ClusterName {
    name.parse().unwrap()
}

pub(crate) fn service_name() -> ServiceName {
    ServiceName::new("shop", "orders").unwrap()
}

pub(crate) fn no_bundle(domain: &str) -> TrustBundle {
    TrustBundle {
        trust_domain: domain.parse().unwrap(),
        document: r#"{"keys":[]}"#.to_owned(),
        predecessor_signature: Vec::new(),
    }
}

/// A federation of these clusters, in one region, all of which export `shop/orders` on port 80 ("tcp").
pub(crate) fn federation(names: &[&str]) -> GlobalSnapshot {
    let info = |(i, name): (usize, &&str)| {
        let info = ClusterInfo {
            name: cluster(name),
            index: ClusterIndex(u16::try_from(i + 1).unwrap()),
            locality: Locality { region: "us".parse().unwrap(), zone: name.parse().unwrap() },
            state: ClusterState::Active,
            bundle: no_bundle(&format!("{name}.example")),
            gateways: Vec::new(),
            grant: Default::default(),
        };
        (info.name.clone(), info)
    };
    let clusters: BTreeSet<ClusterName> = names.iter().map(|n| cluster(n)).collect();
    let exporter = Exporter { created_at: Timestamp(1), identities: BTreeSet::new() };
    let service = GlobalService {
        name: service_name(),
        index: VipIndex(1),
        kind: ServiceKind::ClusterSetIp,
        ports: vec![GlobalPort {
            port: ServicePort { name: "tcp".parse().unwrap(), number: 80, protocol: AppProtocol::Tcp },
            clusters: clusters.clone(),
        }],
        exporters: clusters.into_iter().map(|c| (c, exporter.clone())).collect(),
        conflicts: Vec::new(),
    };
    GlobalSnapshot {
        stamp: Stamp { epoch: Epoch(1), revision: Revision(1) },
        federation: FEDERATION.parse().unwrap(),
        federation_bundle: no_bundle(FEDERATION),
        settings: Settings::default(),
        clusters: names.iter().enumerate().map(info).collect::<BTreeMap<_, _>>(),
        services: [(service_name(), service.into())].into(),
    }
}
