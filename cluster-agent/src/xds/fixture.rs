//! A federation for tests: us-east (the agent's own cluster), us-west and eu-central, with the services of the shop.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use isthmus_model::{
    availability::{Availability, Observations},
    global::{ClusterInfo, ClusterState, Exporter, GlobalPort, GlobalService, GlobalSnapshot, Locality, Settings},
    ids::{ClusterIndex, ClusterName, Epoch, Revision, ServiceName, Stamp, VipIndex},
    local::{self, Endpoint, Inbound, LocalEndpoints},
    service::{AppProtocol, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};

use crate::view::{LocalGateway, Sidecar, View};

pub(crate) const CLUSTERS: [(&str, &str); 3] = [("us-east", "us"), ("us-west", "us"), ("eu-central", "eu")];
pub(crate) const NOW: Timestamp = Timestamp(1_000_000);

pub(crate) fn service(name: &str) -> ServiceName {
    ServiceName::new("shop", name).unwrap()
}

pub(crate) fn cluster(name: &str) -> ClusterName {
    name.parse().unwrap()
}

/// shop/cart (HTTP 80, gRPC 81) and shop/orders (TCP 5000), exported by every cluster and healthy in each.
pub(crate) fn view() -> View {
    let services = [
        ("cart", 1, vec![("http", 80, AppProtocol::Http), ("grpc", 81, AppProtocol::Grpc)]),
        ("orders", 2, vec![("", 5000, AppProtocol::Tcp)]),
    ];
    let mut observations = Observations::default();
    let mut endpoints = LocalEndpoints::default();
    let mut global = BTreeMap::new();
    for (index, (name, vip, ports)) in (21u8..).zip(services) {
        for (c, _) in CLUSTERS {
            let up = Availability { ready: 1, total: 1, reachable: true };
            observations.observe(&service(name), &cluster(c), up, Timestamp(0));
        }
        let local = Endpoint {
            ip: format!("127.1.1.{index}").parse().unwrap(),
            ports: ports.iter().map(|(n, number, _)| (n.parse().unwrap(), 18_000 + number)).collect(),
            ready: true,
            has_sidecar: true,
            zone: "us-east-1".parse().unwrap(),
        };
        endpoints.services.insert(service(name), vec![local]);
        global.insert(service(name), global_service(name, vip, &ports).into());
    }
    View {
        cluster: cluster("us-east"),
        vip_range: "127.64.0.0/16".parse().unwrap(),
        global: Arc::new(GlobalSnapshot {
            stamp: Stamp { epoch: Epoch(1), revision: Revision(7) },
            federation: "isthmus.example".parse().unwrap(),
            federation_bundle: bundle("isthmus.example"),
            settings: Settings::default(),
            clusters: (1..)
                .zip(CLUSTERS)
                .map(|(i, (name, region))| (cluster(name), cluster_info(name, region, i)))
                .collect(),
            services: global,
        }),
        objects_known: true,
        endpoints: Arc::new(endpoints),
        gateways: [("gateway-1", "127.1.1.11"), ("gateway-2", "127.1.1.12")]
            .into_iter()
            .map(|(name, ip)| (name.to_owned(), gateway(name, ip)))
            .collect(),
        sidecars: [("web-1".to_owned(), sidecar())].into(),
        observations: Arc::new(observations),
    }
}

pub(crate) fn sidecar() -> Sidecar {
    let port = |port: u16, app: &str, protocol| (port, Inbound { app: app.parse().unwrap(), protocol });
    let hello = local::Sidecar {
        name: "web-1".to_owned(),
        address: "127.1.1.31".parse().unwrap(),
        inbound: BTreeMap::from([
            port(8443, "127.0.0.1:18080", AppProtocol::Http),
            port(8444, "127.0.0.1:18081", AppProtocol::Grpc),
            port(8445, "127.0.0.1:18082", AppProtocol::Tcp),
        ]),
        upstreams: [service("cart"), service("orders")].into(),
    };
    Sidecar { hello, identity: "spiffe://us-east.example/ns/shop/sa/web".parse().unwrap() }
}

fn gateway(name: &str, ip: &str) -> LocalGateway {
    let hello = local::LocalGateway {
        name: name.to_owned(),
        tunnel: Some(SocketAddr::new(ip.parse().unwrap(), 15443)),
        local_ip: ip.parse().unwrap(),
        auto_port: 15440,
        pinned_port_base: 15500,
    };
    LocalGateway { hello, draining: false }
}

fn global_service(name: &str, index: u32, ports: &[(&str, u16, AppProtocol)]) -> GlobalService {
    let exporter = |c: &str| Exporter {
        created_at: Timestamp(1),
        identities: [format!("spiffe://{c}.example/ns/shop/sa/{name}").parse().unwrap()].into(),
    };
    GlobalService {
        name: service(name),
        index: VipIndex(index),
        kind: ServiceKind::ClusterSetIp,
        ports: ports
            .iter()
            .map(|(n, number, protocol)| GlobalPort {
                port: ServicePort { name: n.parse().unwrap(), number: *number, protocol: *protocol },
                clusters: CLUSTERS.iter().map(|(c, _)| cluster(c)).collect(),
            })
            .collect(),
        exporters: CLUSTERS.iter().map(|(c, _)| (cluster(c), exporter(c))).collect(),
        conflicts: Vec::new(),
    }
}

fn cluster_info(name: &str, region: &str, index: u16) -> ClusterInfo {
    ClusterInfo {
        name: cluster(name),
        index: ClusterIndex(index),
        locality: Locality { region: region.parse().unwrap(), zone: format!("{name}-1").parse().unwrap() },
        state: ClusterState::Active,
        bundle: bundle(&format!("{name}.example")),
        gateways: Vec::new(),
        grant: Default::default(),
    }
}

fn bundle(domain: &str) -> TrustBundle {
    TrustBundle {
        trust_domain: domain.parse().unwrap(),
        document: r#"{"keys":[]}"#.to_owned(),
        predecessor_signature: Vec::new(),
    }
}
