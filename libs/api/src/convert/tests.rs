//! Tests of the conversions: round trips, and that each kind of bad field is refused with its path.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use isthmus_model::{
    availability::{Availability, Report},
    failover::FailoverPolicy,
    global::{ClusterInfo, ClusterState, Conflict, GlobalDelta, GlobalSnapshot, Locality, Settings, WithdrawalPolicy},
    grant::{ClusterGrant, GrantLimits, MemberRole, Namespaces},
    ids::{ClusterIndex, ClusterName, Epoch, Revision, ServiceName, Stamp, VipIndex},
    local::{Endpoint, Inbound, LocalEndpoints, LocalGateway, Sidecar, Transport, TunnelReport, TunnelState},
    merge::merge,
    service::{AppProtocol, Export, GatewayAddress, Publication, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::proto::{common::v1 as common, federation::v1 as fed, local::v1 as loc};

/// (cluster, age, headless, ports as name, number, protocol).
type Said = (u8, u64, bool, BTreeMap<String, (u16, u8)>);

fn bundle(domain: &str) -> TrustBundle {
    TrustBundle {
        trust_domain: domain.parse().unwrap(),
        document: r#"{"keys":[]}"#.into(),
        predecessor_signature: vec![1, 2],
    }
}

fn publication((cluster, age, headless, ports): &Said) -> Publication {
    let protocols = [AppProtocol::Tcp, AppProtocol::Http, AppProtocol::Grpc];
    let mut ports: Vec<ServicePort> = ports
        .iter()
        .map(|(name, (number, protocol))| ServicePort {
            name: name.parse().unwrap(),
            number: *number,
            protocol: protocols[usize::from(*protocol)],
        })
        .collect();
    ports.dedup_by_key(|p| p.number);
    let mut seen = std::collections::BTreeSet::new();
    ports.retain(|p| seen.insert(p.number));
    let service = ServiceName::new("shop", "cart").unwrap();
    let id = format!("spiffe://c{cluster}.example/ns/shop/sa/cart");
    let export = Export {
        service: service.clone(),
        created_at: Timestamp(*age),
        kind: if *headless { ServiceKind::Headless } else { ServiceKind::ClusterSetIp },
        ports,
        identities: [id.parse().unwrap()].into(),
    };
    let gateway = |name: &str, tunnel| GatewayAddress { name: name.into(), tunnel };
    Publication {
        exports: [(service, export)].into(),
        gateways: vec![gateway("gateway-1", "127.1.1.11:15443".parse().ok()), gateway("gateway-2", None)],
        bundle: bundle(&format!("c{cluster}.example")),
    }
}

fn grant(number: u8) -> ClusterGrant {
    match number % 3 {
        0 => ClusterGrant::default(),
        1 => ClusterGrant {
            export_namespaces: Namespaces::Only(["shop".parse().unwrap()].into()),
            import_namespaces: Namespaces::Only([].into()),
            roles: [MemberRole::Dns, MemberRole::ConfigSource].into(),
            limits: GrantLimits { exports: Some(7), gateways: Some(0) },
        },
        _ => ClusterGrant { roles: [].into(), ..ClusterGrant::default() },
    }
}

fn snapshot(said: &[Said], hold_down: u64, regions: Option<Vec<String>>) -> GlobalSnapshot {
    let publications: BTreeMap<ClusterName, (u8, Publication)> =
        said.iter().map(|s| (format!("c{}", s.0).parse().unwrap(), (s.0, publication(s)))).collect();
    let info = |(name, (number, p)): (&ClusterName, &(u8, Publication))| ClusterInfo {
        name: name.clone(),
        index: ClusterIndex(u16::from(*number) + 1),
        locality: Locality { region: "us".parse().unwrap(), zone: "".parse().unwrap() },
        state: [ClusterState::Active, ClusterState::Revoked, ClusterState::Draining][usize::from(number % 3)],
        bundle: p.bundle.clone(),
        gateways: p.gateways.clone(),
        grant: grant(*number),
    };
    let exports = publications.iter().map(|(c, (_, p))| (c, p.exports.values().next().unwrap())).collect();
    let service = merge(&ServiceName::new("shop", "cart").unwrap(), VipIndex(9), &exports);
    let allowed_regions = regions.map(|r| r.iter().map(|r| r.parse().unwrap()).collect());
    GlobalSnapshot {
        stamp: Stamp { epoch: Epoch(2), revision: Revision(hold_down) },
        federation: "isthmus.example".parse().unwrap(),
        federation_bundle: bundle("isthmus.example"),
        settings: Settings {
            failover: FailoverPolicy { hold_down: Duration::from_millis(hold_down), allowed_regions },
            withdrawals: WithdrawalPolicy {
                hold: hold_down.is_multiple_of(2),
                above_exports: said.len() as u32,
                above_percent: 7,
                confirm_after_ms: Some(hold_down).filter(|ms| ms % 3 != 0),
            },
        },
        clusters: publications.iter().map(info).map(|i| (i.name.clone(), i)).collect(),
        services: service.into_iter().map(|s| (s.name.clone(), s.into())).collect(),
    }
}

fn any_said() -> impl Strategy<Value = Said> {
    (0..9u8, 0..5u64, any::<bool>(), proptest::collection::btree_map("[a-z]{1,3}", (1..9u16, 0..3u8), 1..5))
}

fn any_snapshot() -> impl Strategy<Value = GlobalSnapshot> {
    let regions = proptest::option::of(proptest::collection::vec("[a-z]{1,3}", 1..3));
    (proptest::collection::vec(any_said(), 0..5), 1..99_999u64, regions).prop_map(|(s, h, r)| snapshot(&s, h, r))
}

proptest! {
    #[test]
    fn publications_survive_the_wire(said in any_said()) {
        let publication = publication(&said);
        let bytes = fed::Publication::from(&publication).encode_to_vec();
        prop_assert_eq!(Publication::try_from(fed::Publication::decode(bytes.as_slice()).unwrap()), Ok(publication));
    }

    #[test]
    fn snapshots_survive_the_wire(snapshot in any_snapshot()) {
        let bytes = common::GlobalSnapshot::from(&snapshot).encode_to_vec();
        let decoded = common::GlobalSnapshot::decode(bytes.as_slice()).unwrap();
        prop_assert_eq!(GlobalSnapshot::try_from(decoded), Ok(snapshot));
    }

    #[test]
    fn a_digest_is_the_same_on_both_ends_and_another_for_another_state(mut sent in any_snapshot()) {
        for service in sent.services.values_mut() {
            // A receiver cuts it short.
            Arc::make_mut(service).conflicts.push(Conflict { reason: "Long".to_owned(), message: "x".repeat(limits::TEXT_BYTES + 1) });
        }
        let received = GlobalSnapshot::try_from(common::GlobalSnapshot::from(&sent)).unwrap();
        prop_assert_eq!(snapshot_digest(&received), snapshot_digest(&sent));
        let mut other = received.clone();
        other.settings.failover.hold_down += Duration::from_millis(1);
        prop_assert_ne!(snapshot_digest(&other), snapshot_digest(&received));
    }

    #[test]
    fn deltas_survive_the_wire(held in any_snapshot(), next in any_snapshot()) {
        let mut next = next;
        next.stamp = Stamp { epoch: Epoch(3), revision: Revision(0) };
        let delta = GlobalDelta {
            from: held.stamp,
            to: next.stamp,
            federation_bundle: Some(next.federation_bundle),
            settings: Some(next.settings),
            clusters: next.clusters.into_values().collect(),
            removed_clusters: held.clusters.into_keys().collect(),
            services: next.services.into_values().collect(),
            removed_services: held.services.into_keys().collect(),
        };
        let wire = common::GlobalDelta::from(&delta);
        prop_assert_eq!(GlobalDelta::try_from(wire), Ok(delta));
    }

    #[test]
    fn garbage_is_refused_or_taken_but_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(p) = fed::AgentMessage::decode(bytes.as_slice()) {
            match p.kind {
                Some(fed::agent_message::Kind::Publish(p)) => drop(p.publication.map(Publication::try_from)),
                Some(fed::agent_message::Kind::Status(s)) => drop(Status::try_from(s)),
                _ => {}
            }
        }
        let _ = common::GlobalSnapshot::decode(bytes.as_slice()).map(GlobalSnapshot::try_from);
        let _ = common::GlobalDelta::decode(bytes.as_slice()).map(GlobalDelta::try_from);
        let _ = loc::LocalEndpoints::decode(bytes.as_slice()).map(LocalEndpoints::try_from);
        let _ = loc::SidecarHello::decode(bytes.as_slice()).map(Sidecar::try_from);
    }
}

#[test]
fn local_messages_survive_the_wire() {
    let endpoint = Endpoint {
        ip: "127.1.1.21".parse().unwrap(),
        ports: [("http".parse().unwrap(), 15001)].into(),
        ready: true,
        has_sidecar: true,
        zone: "us-east-1".parse().unwrap(),
    };
    let endpoints = LocalEndpoints { services: [(ServiceName::new("shop", "cart").unwrap(), vec![endpoint])].into() };
    assert_eq!(loc::LocalEndpoints::from(&endpoints).try_into(), Ok(endpoints));

    for tunnel in ["127.1.1.11:15443".parse().ok(), None] {
        let gateway = LocalGateway {
            name: "gateway-1".into(),
            tunnel,
            local_ip: "127.1.1.11".parse().unwrap(),
            auto_port: 15440,
            pinned_port_base: 15500,
        };
        assert_eq!(loc::GatewayHello::from(&gateway).try_into(), Ok(gateway));
    }

    let sidecar = Sidecar {
        name: "cart-1".into(),
        address: "127.1.1.21".parse().unwrap(),
        inbound: [(15001, Inbound { app: "127.0.0.1:8080".parse().unwrap(), protocol: AppProtocol::Grpc })].into(),
        upstreams: [ServiceName::new("shop", "catalog").unwrap()].into(),
    };
    assert_eq!(loc::SidecarHello::from(&sidecar).try_into(), Ok(sidecar));

    let report = AvailabilityReport {
        availability: vec![Report {
            service: ServiceName::new("shop", "cart").unwrap(),
            cluster: "us-west".parse().unwrap(),
            current: Availability { ready: 1, total: 2, reachable: true },
            recovered_at: Some(Timestamp(7)),
        }],
        tunnels: vec![tunnel()],
    };
    assert_eq!(loc::AvailabilityReport::from(&report).try_into(), Ok(report));
}

fn tunnel() -> TunnelState {
    TunnelState {
        cluster: "us-west".parse().unwrap(),
        gateway: "gateway-1".into(),
        up: true,
        rtt_us: 700,
        transport: Transport::Tcp,
        downgraded: true,
        loss_ppm: 12_000,
        cwnd_bytes: 64_000,
        dial_error: "no answer".to_owned(),
    }
}

#[test]
fn a_tunnels_state_is_checked_and_one_from_before_there_was_a_choice_runs_over_quic() {
    let said = common::TunnelStatus::from(&tunnel());
    let read = |change: &dyn Fn(&mut common::TunnelStatus)| {
        let mut said = said.clone();
        change(&mut said);
        TunnelState::try_from(said).map(|t| (t.transport, t.downgraded, t.loss_ppm)).map_err(|e| e.field)
    };
    assert_eq!(read(&|t| t.transport = 0), Ok((Transport::Quic, false, 12_000)), "nothing falls to QUIC");
    assert_eq!(read(&|t| t.loss_ppm = 1_000_001), Ok((Transport::Tcp, true, 1_000_000)));
    assert_eq!(read(&|t| t.transport = 9), Err("transport".to_owned()));
    assert_eq!(read(&|t| t.gateway = "a/b".to_owned()), Err("gateway".to_owned()));
}

#[test]
fn status_survives_the_wire() {
    let status = Status {
        consumers: vec![ConsumerStatus {
            kind: ConsumerKind::Sidecar,
            name: "cart-1".into(),
            applied: Some(Stamp { epoch: Epoch(1), revision: Revision(2) }),
            connected: true,
            problems: vec!["refused".into()],
        }],
        availability: vec![],
        problems: vec![Problem { at: "cart.yaml:14".into(), field: "spec".into(), message: "is missing".into() }],
        tunnels: vec![TunnelReport { from: "gateway-2".into(), tunnel: tunnel() }],
    };
    assert_eq!(fed::Status::from(&status).try_into(), Ok(status));
}

fn wire() -> fed::Publication {
    (&publication(&(0, 1, false, [("a".to_owned(), (1, 0)), ("b".to_owned(), (2, 1))].into()))).into()
}

fn refusal(change: impl FnOnce(&mut fed::Publication)) -> String {
    let mut publication = wire();
    change(&mut publication);
    Publication::try_from(publication).unwrap_err().to_string()
}

#[test]
fn a_bad_publication_is_refused_with_the_path_of_its_field() {
    assert_eq!(refusal(|p| p.bundle = None), "bundle: is missing");
    assert_eq!(
        refusal(|p| p.exports[0].ports[1].number = 65_536),
        "exports[0].ports[1].number: 65536 is not a port; use 1 to 65535"
    );
    assert_eq!(
        refusal(|p| p.exports[0].ports[1].name.clear()),
        "exports[0].ports[1].name: is empty; each of several ports needs a name"
    );
    assert_eq!(refusal(|p| p.exports[0].ports[1].name = "a".into()), "exports[0].ports[1].name: a is there twice");
    assert_eq!(refusal(|p| p.exports[0].ports[1].number = 1), "exports[0].ports[1].number: 1 is there twice");
    assert_eq!(
        refusal(|p| p.exports[0].ports[0].protocol = 0),
        "exports[0].ports[0].protocol: is not specified; use tcp, http or grpc"
    );
    assert_eq!(refusal(|p| p.exports[0].kind = 77), "exports[0].kind: 77 is not a value that this version knows");
    assert!(
        refusal(|p| p.exports[0].service.as_mut().unwrap().namespace = "A".into())
            .starts_with("exports[0].service.namespace: namespace \"A\" is not valid")
    );
    assert!(refusal(|p| p.exports[0].identities[0] = "x".into()).starts_with("exports[0].identities[0]: SPIFFE ID"));
    assert_eq!(
        refusal(|p| p.exports[0].identities = vec!["spiffe://other.example/ns/shop/sa/cart".into()]),
        "exports: shop/cart names spiffe://other.example/ns/shop/sa/cart, which is outside the cluster's trust domain c0.example"
    );
    assert_eq!(refusal(|p| p.exports.push(p.exports[0].clone())), "exports[1]: shop/cart is there twice");
    assert_eq!(refusal(|p| p.gateways.push(p.gateways[0].clone())), "gateways[2]: gateway-1 is there twice");
    assert!(
        refusal(|p| p.gateways[0].tunnel = "0.0.0.0:1".into()).starts_with("gateways[0].tunnel: \"0.0.0.0:1\" cannot")
    );
    assert_eq!(
        refusal(|p| p.exports[0].ports = vec![p.exports[0].ports[0].clone(); 65]),
        "exports[0].ports: has 65 entries; at most 64 are allowed"
    );
    assert_eq!(
        refusal(|p| p.bundle.as_mut().unwrap().document = vec![b'a'; 300_000]),
        "bundle.document: 300000 bytes; at most 262144 are allowed"
    );
}

#[test]
fn a_bad_snapshot_is_refused() {
    let said = [(0, 1, false, [("a".to_owned(), (1, 0))].into()), (2, 2, false, BTreeMap::new())];
    let good = common::GlobalSnapshot::from(&snapshot(&said, 1, None));
    let refusal = |change: &dyn Fn(&mut common::GlobalSnapshot)| {
        let mut bad = good.clone();
        change(&mut bad);
        GlobalSnapshot::try_from(bad).unwrap_err().to_string()
    };
    assert_eq!(refusal(&|s| s.clusters[0].index = 0), "clusters[0].index: 0 is not a cluster index; 1 to 65535 are");
    assert_eq!(refusal(&|s| s.clusters[1].index = 1), "two clusters have the index 1");
    assert_eq!(refusal(&|s| s.services[0].index = 0), "services[0].index: 0 is not a service index; they start at 1");
    assert_eq!(
        refusal(&|s| s.services[0].ports[0].clusters = vec!["c7".into()]),
        "services[0].ports[0].clusters: c7 is not an exporter"
    );
    assert!(refusal(&|s| s.clusters[0].name = "any".into()).starts_with("clusters[0].name: cluster name \"any\""));
    assert_eq!(
        refusal(&|s| s.services[0].exporters.clear()),
        "services[0].exporters: is empty; a global service has at least one"
    );
}

#[test]
fn an_app_outside_loopback_is_refused() {
    let hello = loc::SidecarHello {
        name: "cart-1".into(),
        address: "127.1.1.21".into(),
        inbound: vec![loc::InboundPort { port: 15001, app: "192.0.2.1:80".into(), protocol: 2 }],
        upstreams: vec![],
    };
    let error = Sidecar::try_from(hello).unwrap_err();
    assert_eq!(error.field, "inbound[0].app");
}

#[test]
fn a_gateway_speaks_only_for_its_own_cluster() {
    let service = Some(common::ServiceName { namespace: "shop".into(), name: "cart".into() });
    let said = common::Availability {
        service,
        cluster: String::new(),
        ready: 300,
        total: 300,
        reachable: true,
        ..Default::default()
    };
    let (_, availability) = own_availability(said.clone()).unwrap();
    assert_eq!(availability, Availability { ready: 255, total: 255, reachable: true });
    assert_eq!(
        own_availability(common::Availability { cluster: "eu".into(), ..said.clone() }).unwrap_err().field,
        "cluster"
    );
    assert_eq!(own_availability(common::Availability { total: 1, ..said }).unwrap_err().field, "ready");
}

#[test]
fn long_text_is_cut_at_a_character() {
    let cut = text("é".repeat(limits::TEXT_BYTES));
    assert_eq!(cut.len(), limits::TEXT_BYTES);
    assert_eq!(text("é".repeat(3)), "ééé");
}
