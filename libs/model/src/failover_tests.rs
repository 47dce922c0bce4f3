//! Tests of the choice: order, boundaries, hold-down, and that nothing is ever dropped or duplicated.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{
    availability::Availability,
    global::{Exporter, GlobalPort, Locality, Settings},
    ids::{ClusterIndex, ServiceName, Stamp, VipIndex},
    service::{AppProtocol, ServiceKind, ServicePort, TrustBundle},
};

const UP: Availability = Availability { ready: 2, total: 2, reachable: true };
const EMPTY: Availability = Availability { ready: 0, total: 2, reachable: true };
const LOST: Availability = Availability { ready: 2, total: 2, reachable: false };
const CLUSTERS: [(&str, &str, &str); 5] = [
    ("us-east", "us", "us-1"),
    ("us-near", "us", "us-1"),
    ("us-west", "us", "us-2"),
    ("eu-central", "eu", "eu-1"),
    ("nowhere", "", ""),
];

struct World {
    global: GlobalSnapshot,
    service: GlobalService,
    observed: Observations,
}

fn bundle(domain: &str) -> TrustBundle {
    TrustBundle { trust_domain: domain.parse().unwrap(), document: "{}".into(), predecessor_signature: vec![] }
}

/// Five clusters that all export shop/cart on port 80, hold-down 3 s, nothing observed.
fn world() -> World {
    let info = |i: usize, (name, region, zone): &(&str, &str, &str)| ClusterInfo {
        name: name.parse().unwrap(),
        index: ClusterIndex(u16::try_from(i + 1).unwrap()),
        locality: Locality { region: region.parse().unwrap(), zone: zone.parse().unwrap() },
        state: ClusterState::Active,
        bundle: bundle(&format!("{name}.example")),
        gateways: vec![],
        grant: Default::default(),
    };
    let clusters: BTreeMap<_, _> =
        CLUSTERS.iter().enumerate().map(|(i, c)| (c.0.parse().unwrap(), info(i, c))).collect();
    let port = ServicePort { name: "http".parse().unwrap(), number: 80, protocol: AppProtocol::Http };
    let exporter = Exporter { created_at: Timestamp(0), identities: BTreeSet::new() };
    let policy = FailoverPolicy { hold_down: Duration::from_secs(3), allowed_regions: None };
    World {
        service: GlobalService {
            name: ServiceName::new("shop", "cart").unwrap(),
            index: VipIndex(1),
            kind: ServiceKind::ClusterSetIp,
            ports: vec![GlobalPort { port, clusters: clusters.keys().cloned().collect() }],
            exporters: clusters.keys().map(|c| (c.clone(), exporter.clone())).collect(),
            conflicts: vec![],
        },
        global: GlobalSnapshot {
            stamp: Stamp::default(),
            federation: "isthmus.example".parse().unwrap(),
            federation_bundle: bundle("isthmus.example"),
            settings: Settings { failover: policy, ..Settings::default() },
            clusters,
            services: BTreeMap::new(),
        },
        observed: Observations::default(),
    }
}

impl World {
    fn see(&mut self, cluster: &str, what: Availability, at: u64) {
        self.observed.observe(&self.service.name, &cluster.parse().unwrap(), what, Timestamp(at));
    }

    fn see_all(&mut self, what: Availability) {
        for (cluster, ..) in CLUSTERS {
            self.see(cluster, what, 0);
        }
    }

    fn choose(&self, now: u64) -> Vec<Candidate> {
        let caller = "us-east".parse().unwrap();
        choose(&self.service, Some(80), &caller, &self.global, &self.observed, Timestamp(now))
    }

    fn order(&self, now: u64) -> Vec<String> {
        self.choose(now).into_iter().map(|c| c.cluster.to_string()).collect()
    }

    fn of(&self, cluster: &str, now: u64) -> Candidate {
        self.choose(now).into_iter().find(|c| c.cluster.as_str() == cluster).unwrap()
    }

    fn cluster(&mut self, name: &str) -> &mut ClusterInfo {
        self.global.clusters.get_mut(&name.parse::<ClusterName>().unwrap()).unwrap()
    }
}

#[test]
fn ready_clusters_come_nearest_first() {
    let mut world = world();
    world.see_all(UP);
    assert_eq!(world.order(10), ["us-east", "us-near", "us-west", "eu-central", "nowhere"]);
    let tiers: Vec<_> = world.choose(10).into_iter().map(|c| c.tier).collect();
    assert_eq!(tiers, [Tier::LocalCluster, Tier::LocalZone, Tier::LocalRegion, Tier::Any, Tier::Any]);
    assert_eq!(world.of("us-west", 10).reason, "same region us, 2 of 2 endpoints ready");
    assert_eq!(world.of("nowhere", 10).reason, "an unknown region, 2 of 2 endpoints ready");
}

#[test]
fn dead_clusters_go_behind_unknown_ones_and_are_unusable() {
    let mut world = world();
    world.see("us-east", EMPTY, 0);
    world.see("us-near", LOST, 0);
    world.see("eu-central", UP, 0);
    assert_eq!(world.order(10), ["eu-central", "us-west", "nowhere", "us-near", "us-east"]);
    let usable: Vec<_> = world.choose(10).iter().map(Candidate::usable).collect();
    assert_eq!(usable, [true, true, true, false, false]);
}

#[test]
fn a_draining_cluster_is_the_last_resort_of_others_and_no_different_for_its_own_callers() {
    let mut world = world();
    world.see_all(UP);
    world.cluster("us-near").state = ClusterState::Draining;
    world.see("nowhere", LOST, 1);
    assert_eq!(world.order(10), ["us-east", "us-west", "eu-central", "us-near", "nowhere"]);
    let draining = world.of("us-near", 10);
    assert!(draining.usable() && draining.eligibility == Eligibility::Draining);
    assert_eq!(draining.reason, "same zone us-1, draining, 2 of 2 endpoints ready");
    world.see("us-near", EMPTY, 20);
    assert_eq!(world.of("us-near", 30).eligibility, Eligibility::NoEndpoints, "nobody is there all the same");

    world.cluster("us-near").state = ClusterState::Active;
    world.cluster("us-east").state = ClusterState::Draining;
    assert_eq!(world.of("us-east", 10).eligibility, Eligibility::Ready, "its own callers stay");
}

#[test]
fn nothing_reported_yet_still_gives_destinations() {
    let order = world().choose(0);
    assert!(order.iter().all(|c| c.usable() && c.eligibility == Eligibility::Unknown));
    assert_eq!(order[0].cluster.as_str(), "us-east");
}

#[test]
fn a_recovered_cluster_waits_out_its_hold_down() {
    let mut world = world();
    world.see_all(UP);
    world.see("us-east", EMPTY, 1_000);
    world.see("us-east", UP, 2_000);
    assert_eq!(world.order(3_200)[0], "us-near");
    let held = world.of("us-east", 3_200);
    assert_eq!(held.eligibility, Eligibility::HoldDown { until: Timestamp(5_000) });
    assert_eq!(
        held.reason,
        "the caller's own cluster, held down for 1.8 s more (recovered 1.2 s ago, hold-down 3 s), 2 of 2 endpoints ready"
    );
    assert_eq!(next_change(&world.choose(3_200)), Some(Timestamp(5_000)));
    assert_eq!(world.order(4_999)[0], "us-near");
    assert_eq!(world.order(5_000)[0], "us-east");
    assert_eq!(next_change(&world.choose(5_000)), None);
}

#[test]
fn held_down_clusters_are_used_when_nothing_is_ready_and_the_nearest_is_first() {
    let mut world = world();
    world.see_all(UP);
    world.see_all(EMPTY);
    world.see("eu-central", UP, 1_000);
    assert_eq!(world.order(1_500)[0], "eu-central");
    world.see("us-west", UP, 1_200);
    assert_eq!(world.order(1_500)[..2], ["us-west", "eu-central"], "the tier counts, not whose hold-down ends first");
    assert!(world.choose(1_500)[0].usable());
}

#[test]
fn a_clock_set_back_does_not_hold_a_cluster_down_for_long() {
    let mut world = world();
    world.see_all(UP);
    world.see("us-east", EMPTY, 9_000_000);
    world.see("us-east", UP, 9_000_001);
    assert_eq!(world.of("us-east", 1_000).eligibility, Eligibility::Ready);
}

#[test]
fn a_region_outside_the_boundary_is_never_usable() {
    let mut world = world();
    world.global.settings.failover.allowed_regions = Some(["us".parse().unwrap()].into());
    world.see("eu-central", UP, 0);
    world.see("nowhere", UP, 0);
    for (cluster, reason) in [
        ("eu-central", "region eu is outside the allowed regions (us)"),
        ("nowhere", "an unknown region is outside the allowed regions (us)"),
    ] {
        let candidate = world.of(cluster, 10);
        assert_eq!((candidate.eligibility.clone(), candidate.usable()), (Eligibility::Forbidden, false));
        assert_eq!(candidate.reason, reason);
    }
    assert_eq!(world.order(10)[3..], ["eu-central", "nowhere"]);
}

#[test]
fn revoked_and_unknown_clusters_are_forbidden() {
    let mut world = world();
    world.see_all(UP);
    world.cluster("us-near").state = ClusterState::Revoked;
    world.global.clusters.remove(&"us-west".parse::<ClusterName>().unwrap());
    assert_eq!(world.of("us-near", 1).eligibility, Eligibility::Forbidden);
    assert_eq!(world.of("us-near", 1).reason, "us-near is revoked");
    assert_eq!(world.of("us-west", 1).eligibility, Eligibility::Forbidden);
    assert_eq!(world.order(1)[..3], ["us-east", "eu-central", "nowhere"]);
}

#[test]
fn only_clusters_that_expose_the_port_are_candidates() {
    let mut world = world();
    world.service.ports[0].clusters.remove(&"us-east".parse::<ClusterName>().unwrap());
    assert!(!world.order(0).contains(&"us-east".to_owned()));
    let caller = "us-east".parse().unwrap();
    let all = |port| choose(&world.service, port, &caller, &world.global, &world.observed, Timestamp(0)).len();
    assert_eq!((all(None), all(Some(80)), all(Some(81))), (5, 4, 0));
}

#[test]
fn a_caller_that_is_no_cluster_has_no_near_ones() {
    let world = world();
    let caller = "stranger".parse().unwrap();
    let order = choose(&world.service, None, &caller, &world.global, &world.observed, Timestamp(0));
    assert!(order.iter().all(|c| c.tier == Tier::Any));
}

fn any_availability() -> impl Strategy<Value = Availability> {
    (0..3u8, any::<bool>()).prop_map(|(ready, reachable)| Availability { ready, total: 3, reachable })
}

proptest! {
    #[test]
    fn the_order_is_complete_sorted_and_within_the_boundary(
        history in proptest::collection::vec((0..CLUSTERS.len(), any_availability(), 0..500u64), 0..40),
        allowed in proptest::option::of(proptest::collection::btree_set(proptest::sample::select(vec!["us", "eu"]), 0..3)),
        revoked in proptest::option::of(0..CLUSTERS.len()),
        later in 0..10_000u64,
    ) {
        let mut world = world();
        let mut now = 0;
        for (cluster, what, pause) in history {
            now += pause;
            world.see(CLUSTERS[cluster].0, what, now);
        }
        world.global.settings.failover.allowed_regions =
            allowed.map(|regions| regions.into_iter().map(|r| r.parse().unwrap()).collect());
        if let Some(i) = revoked {
            world.cluster(CLUSTERS[i].0).state = ClusterState::Revoked;
        }
        let order = world.choose(now + later);
        let names: BTreeSet<_> = order.iter().map(|c| c.cluster.clone()).collect();
        prop_assert_eq!(names.len(), CLUSTERS.len());
        prop_assert_eq!(order.len(), CLUSTERS.len());
        prop_assert!(order.windows(2).all(|w| w[0].rank() < w[1].rank()));
        prop_assert!(order.windows(2).all(|w| w[0].usable() || !w[1].usable()), "usable ones first");
        for c in order.iter().filter(|c| c.usable()) {
            let info = &world.global.clusters[&c.cluster];
            prop_assert_eq!(info.state, ClusterState::Active);
            let regions = &world.global.settings.failover.allowed_regions;
            prop_assert!(regions.as_ref().is_none_or(|r| r.contains(&info.locality.region)));
        }
        if let Some(at) = next_change(&order) {
            prop_assert!(at > Timestamp(now + later));
            // Until then, time alone changes nothing but the sentences.
            let states = |o: Vec<Candidate>| o.into_iter().map(|c| (c.cluster, c.eligibility)).collect::<Vec<_>>();
            prop_assert_eq!(states(order), states(world.choose(at.0 - 1)));
        }
    }
}
