//! A small federation for tests: three clusters, an HTTP service everywhere, a headless one, and ways to vary them.

use std::{collections::BTreeMap, sync::Arc};

use isthmus_model::{
    global::{ClusterInfo, ClusterState, Exporter, GlobalPort, GlobalService, GlobalSnapshot, Locality, Settings},
    ids::{ClusterIndex, Epoch, Revision, ServiceName, Stamp, VipIndex},
    local::{Endpoint, LocalEndpoints},
    service::{AppProtocol, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};

use crate::zone::Sources;

/// The clusters, each with its region.
pub(crate) const CLUSTERS: [(&str, &str); 3] = [("us-east", "us"), ("us-west", "us"), ("eu-central", "eu")];

pub(crate) fn bundle(domain: &str) -> TrustBundle {
    TrustBundle {
        trust_domain: domain.parse().unwrap(),
        document: r#"{"keys":[],"spiffe_sequence":1}"#.into(),
        predecessor_signature: Vec::new(),
    }
}

pub(crate) fn port(name: &str, number: u16, clusters: &[&str]) -> GlobalPort {
    GlobalPort {
        port: ServicePort { name: name.parse().unwrap(), number, protocol: AppProtocol::Http },
        clusters: clusters.iter().map(|c| c.parse().unwrap()).collect(),
    }
}

/// A service exported by `clusters`.
pub(crate) fn service(
    name: &str,
    index: u32,
    kind: ServiceKind,
    ports: &[(&str, u16)],
    clusters: &[&str],
) -> GlobalService {
    let name: ServiceName = name.parse().unwrap();
    let exporter = |cluster: &&str| {
        let id = format!("spiffe://{cluster}.example/ns/{}/sa/{}", name.namespace, name.name());
        let exporter = Exporter { created_at: Timestamp(1), identities: [id.parse().unwrap()].into_iter().collect() };
        (cluster.parse().unwrap(), exporter)
    };
    GlobalService {
        index: VipIndex(index),
        kind,
        ports: ports.iter().map(|(n, p)| port(n, *p, clusters)).collect(),
        exporters: clusters.iter().map(exporter).collect(),
        conflicts: Vec::new(),
        name,
    }
}

/// `shop/cart` in all clusters and headless `shop/db` in us-east and us-west, at revision 7.
pub(crate) fn snapshot() -> GlobalSnapshot {
    let all: Vec<&str> = CLUSTERS.iter().map(|(name, _)| *name).collect();
    let services = [
        service("shop/cart", 5, ServiceKind::ClusterSetIp, &[("http", 80), ("metrics", 9090)], &all),
        service("shop/orders", 6, ServiceKind::ClusterSetIp, &[("", 7000)], &["us-west"]),
        service("shop/db", 7, ServiceKind::Headless, &[("sql", 5432)], &["us-east", "us-west"]),
    ];
    let clusters = CLUSTERS.iter().zip(1..).map(|((name, region), index)| ClusterInfo {
        name: name.parse().unwrap(),
        index: ClusterIndex(index),
        locality: Locality { region: region.parse().unwrap(), zone: format!("{name}-1").parse().unwrap() },
        state: ClusterState::Active,
        bundle: bundle(&format!("{name}.example")),
        gateways: Vec::new(),
        grant: Default::default(),
    });
    GlobalSnapshot {
        stamp: stamp(1, 7),
        federation: "isthmus.example".parse().unwrap(),
        federation_bundle: bundle("isthmus.example"),
        settings: Settings::default(),
        clusters: clusters.map(|c| (c.name.clone(), c)).collect(),
        services: services.into_iter().map(|s| (s.name.clone(), s.into())).collect(),
    }
}

pub(crate) fn stamp(epoch: u64, revision: u64) -> Stamp {
    Stamp { epoch: Epoch(epoch), revision: Revision(revision) }
}

pub(crate) fn endpoint(ip: &str, ready: bool) -> Endpoint {
    Endpoint {
        ip: ip.parse().unwrap(),
        ports: BTreeMap::from([("sql".parse().unwrap(), 15432)]),
        ready,
        has_sidecar: true,
        zone: "".parse().unwrap(),
    }
}

/// Endpoints of `shop/db`.
pub(crate) fn endpoints(of_db: Vec<Endpoint>) -> LocalEndpoints {
    LocalEndpoints { services: BTreeMap::from([("shop/db".parse().unwrap(), of_db)]) }
}

/// us-east's view, with one ready and one unready endpoint of `shop/db`.
pub(crate) fn sources(global: GlobalSnapshot) -> Sources {
    Sources {
        cluster: "us-east".parse().unwrap(),
        global: Arc::new(global),
        vip_range: "127.64.0.0/16".parse().unwrap(),
        endpoints: endpoints(vec![endpoint("10.0.0.1", true), endpoint("10.0.0.2", false)]),
        server: Some([127, 1, 1, 2].into()),
    }
}

/// The agent's update for `global`.
pub(crate) fn config(global: &GlobalSnapshot) -> isthmus_api::proto::local::v1::DnsConfig {
    isthmus_api::proto::local::v1::DnsConfig {
        global: Some(global.into()),
        vip_range: "127.64.0.0/16".into(),
        endpoints: Some((&endpoints(vec![endpoint("10.0.0.1", true)])).into()),
    }
}
