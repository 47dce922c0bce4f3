//! Tests of snapshots and deltas: what a delta turns one state into, and what a snapshot may not hold.

use proptest::prelude::*;

use super::*;
use crate::ids::{Epoch, Revision};

fn stamp(revision: u64) -> Stamp {
    Stamp { epoch: Epoch(1), revision: Revision(revision) }
}

fn bundle(domain: &str, document: u8) -> TrustBundle {
    TrustBundle {
        trust_domain: domain.parse().unwrap(),
        document: document.to_string(),
        predecessor_signature: vec![document],
    }
}

fn cluster(index: u16, document: u8) -> ClusterInfo {
    ClusterInfo {
        name: format!("c{index}").parse().unwrap(),
        index: ClusterIndex(index),
        locality: Locality { region: "us".parse().unwrap(), zone: "us-1".parse().unwrap() },
        state: if document == 0 { ClusterState::Revoked } else { ClusterState::Active },
        bundle: bundle(&format!("c{index}.example"), document),
        gateways: vec![],
    }
}

fn service(index: u32, exporters: &BTreeSet<u16>) -> GlobalService {
    let exporter = |i: &u16| {
        let id = format!("spiffe://c{i}.example/ns/shop/sa/s");
        (
            format!("c{i}").parse().unwrap(),
            Exporter { created_at: Timestamp(1), identities: [id.parse().unwrap()].into() },
        )
    };
    GlobalService {
        name: ServiceName::new("shop", &format!("s{index}")).unwrap(),
        index: VipIndex(index),
        kind: ServiceKind::ClusterSetIp,
        ports: vec![],
        exporters: exporters.iter().map(exporter).collect(),
        conflicts: vec![],
    }
}

fn snapshot(revision: u64, clusters: &BTreeMap<u16, u8>, services: &BTreeMap<u32, BTreeSet<u16>>) -> GlobalSnapshot {
    let clusters = clusters.iter().map(|(i, d)| cluster(*i, *d));
    let services = services.iter().map(|(i, e)| service(*i, e));
    GlobalSnapshot {
        stamp: stamp(revision),
        federation: "isthmus.example".parse().unwrap(),
        federation_bundle: bundle("isthmus.example", 1),
        settings: Settings::default(),
        clusters: clusters.map(|c| (c.name.clone(), c)).collect(),
        services: services.map(|s| (s.name.clone(), s)).collect(),
    }
}

fn any_snapshot(revision: u64) -> impl Strategy<Value = GlobalSnapshot> {
    let clusters = proptest::collection::btree_map(1..6u16, 0..3u8, 0..5);
    let exporters = proptest::collection::btree_set(1..6u16, 1..3);
    let services = proptest::collection::btree_map(1..6u32, exporters, 0..5);
    (clusters, services, any::<bool>(), 0..2u64).prop_map(move |(clusters, services, rotated, hold_down)| {
        let mut all = snapshot(revision, &clusters, &services);
        all.federation_bundle = bundle("isthmus.example", u8::from(rotated));
        all.settings.failover.hold_down = std::time::Duration::from_secs(hold_down);
        all
    })
}

proptest! {
    #[test]
    fn a_delta_turns_one_snapshot_into_the_other(held in any_snapshot(1), next in any_snapshot(2)) {
        let delta = held.delta_to(&next);
        let mut state = held.clone();
        prop_assert_eq!(state.apply(delta.clone()), Ok(()));
        prop_assert_eq!(&state, &next);
        prop_assert_eq!(state.apply(delta), Err(GapError { from: stamp(1), held: stamp(2) }));
        prop_assert_eq!(state, next, "a refused delta changes nothing");
    }

    #[test]
    fn a_snapshot_survives_json(state in any_snapshot(1)) {
        let text = serde_json::to_string(&state).unwrap();
        prop_assert_eq!(serde_json::from_str::<GlobalSnapshot>(&text).unwrap(), state);
    }

    #[test]
    fn a_delta_between_equals_is_empty(state in any_snapshot(1)) {
        let delta = state.delta_to(&state);
        prop_assert!(delta.clusters.is_empty() && delta.services.is_empty() && delta.settings.is_none());
        prop_assert!(delta.removed_clusters.is_empty() && delta.removed_services.is_empty());
        prop_assert!(delta.federation_bundle.is_none());
    }
}

#[test]
fn a_snapshot_whose_parts_do_not_fit_is_refused() {
    let good = snapshot(1, &[(1, 1), (2, 1)].into(), &[(1, [1, 2].into()), (2, [2].into())].into());
    assert_eq!(good.check(), Ok(()));
    let names: Vec<ClusterName> = good.clusters.keys().cloned().collect();
    let services: Vec<ServiceName> = good.services.keys().cloned().collect();

    let mut bad = good.clone();
    bad.clusters.get_mut(&names[1]).unwrap().index = ClusterIndex(1);
    assert_eq!(bad.check(), Err(InconsistentError::ClusterIndexTwice(ClusterIndex(1))));

    let mut bad = good.clone();
    bad.services.get_mut(&services[1]).unwrap().index = VipIndex(1);
    assert_eq!(bad.check(), Err(InconsistentError::ServiceIndexTwice(VipIndex(1))));

    for stolen in ["c1.example", "isthmus.example"] {
        let mut bad = good.clone();
        bad.clusters.get_mut(&names[1]).unwrap().bundle = bundle(stolen, 1);
        assert_eq!(bad.check(), Err(InconsistentError::TrustDomainTwice(stolen.parse().unwrap())));
    }

    let mut bad = good.clone();
    bad.clusters.remove(&names[0]);
    assert!(matches!(bad.check(), Err(InconsistentError::UnknownExporter(..))));

    let mut bad = good.clone();
    let exporter = bad.services.get_mut(&services[0]).unwrap().exporters.get_mut(&names[0]).unwrap();
    exporter.identities = ["spiffe://c2.example/ns/shop/sa/s".parse().unwrap()].into();
    assert!(matches!(bad.check(), Err(InconsistentError::ForeignIdentity(..))));

    let mut bad = good;
    bad.federation_bundle = bundle("c1.example", 1);
    assert!(matches!(bad.check(), Err(InconsistentError::FederationBundle(_))));
}
