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
        grant: Default::default(),
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
        services: services.map(|s| (s.name.clone(), s.into())).collect(),
    }
}

/// The smallest delta from `held` to `next`.
fn delta(held: &GlobalSnapshot, next: &GlobalSnapshot) -> GlobalDelta {
    fn news<K: Ord, V: Clone + PartialEq>(held: &BTreeMap<K, V>, next: &BTreeMap<K, V>) -> Vec<V> {
        next.iter().filter(|(k, v)| held.get(k) != Some(v)).map(|(_, v)| v.clone()).collect()
    }
    fn gone<K: Ord + Clone, V>(held: &BTreeMap<K, V>, next: &BTreeMap<K, V>) -> Vec<K> {
        held.keys().filter(|k| !next.contains_key(k)).cloned().collect()
    }
    GlobalDelta {
        from: held.stamp,
        to: next.stamp,
        federation_bundle: (held.federation_bundle != next.federation_bundle).then(|| next.federation_bundle.clone()),
        settings: (held.settings != next.settings).then(|| next.settings.clone()),
        clusters: news(&held.clusters, &next.clusters),
        removed_clusters: gone(&held.clusters, &next.clusters),
        services: news(&held.services, &next.services),
        removed_services: gone(&held.services, &next.services),
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
        let delta = delta(&held, &next);
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
    Arc::make_mut(bad.services.get_mut(&services[1]).unwrap()).index = VipIndex(1);
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
    let service = Arc::make_mut(bad.services.get_mut(&services[0]).unwrap());
    let exporter = service.exporters.get_mut(&names[0]).unwrap();
    exporter.identities = ["spiffe://c2.example/ns/shop/sa/s".parse().unwrap()].into();
    assert!(matches!(bad.check(), Err(InconsistentError::ForeignIdentity(..))));

    let mut bad = good;
    bad.federation_bundle = bundle("c1.example", 1);
    assert!(matches!(bad.check(), Err(InconsistentError::FederationBundle(_))));
}

fn revoked(all: &GlobalSnapshot) -> Vec<u16> {
    all.clusters.values().filter(|c| c.state == ClusterState::Revoked).map(|c| c.index.0).collect()
}

#[test]
fn a_revoked_cluster_that_is_active_again_stays_revoked_and_exports_nothing() {
    let held = snapshot(1, &[(1, 1), (2, 0)].into(), &BTreeMap::new());
    let services = [(1, [1, 2].into()), (2, [2].into())].into();
    let mut next = snapshot(2, &[(1, 1), (2, 1)].into(), &services);
    next.stamp.epoch = Epoch(2);
    assert_eq!(next.keep_revoked(&held), ["c2".parse().unwrap()]);
    assert_eq!(revoked(&next), [2]);
    assert_eq!(next.services.len(), 1, "only c2 exported the other one");
    assert!(next.services.values().all(|s| !s.exporters.contains_key(&"c2".parse().unwrap())));
    assert_eq!(next.check(), Ok(()));
}

#[test]
fn a_revoked_cluster_that_is_missing_is_put_back_even_if_another_one_has_its_index_now() {
    let held = snapshot(1, &[(1, 1), (2, 0)].into(), &BTreeMap::new());
    let mut next = snapshot(2, &[(1, 1)].into(), &BTreeMap::new());
    let mut newcomer = cluster(3, 1);
    newcomer.index = ClusterIndex(2);
    newcomer.bundle = bundle("c2.example", 1);
    next.clusters.insert(newcomer.name.clone(), newcomer);
    assert_eq!(next.keep_revoked(&held), ["c2".parse().unwrap()]);
    assert!(next.active_cluster(&"c2".parse().unwrap()).is_none());
    assert!(next.active_cluster(&"c3".parse().unwrap()).is_some());
    // What is saved must be readable again.
    assert_eq!(next.check(), Ok(()));
}

#[test]
fn what_agrees_with_the_revocations_held_is_left_as_it_is() {
    let held = snapshot(1, &[(1, 1), (2, 0)].into(), &BTreeMap::new());
    let mut next = snapshot(2, &[(1, 0), (2, 0), (3, 1)].into(), &[(1, [3].into())].into());
    let sent = next.clone();
    assert!(next.keep_revoked(&held).is_empty());
    assert_eq!(next, sent);
}

#[test]
fn revocations_held_never_make_a_state_too_large_to_be_read_again() {
    let many = |from: u16| (0..3_000).map(|i| (from + i, 0)).collect();
    let held = snapshot(1, &many(1), &BTreeMap::new());
    let mut next = snapshot(2, &many(4_000), &BTreeMap::new());
    assert_eq!(next.keep_revoked(&held).len(), GlobalSnapshot::MAX_CLUSTERS - 3_000);
    assert_eq!(next.clusters.len(), GlobalSnapshot::MAX_CLUSTERS);
}
