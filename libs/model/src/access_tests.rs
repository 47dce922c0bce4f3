//! Tests of access: each reason by itself, and against the rules written down another way.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{
    availability::{Availability, Observations},
    failover::{self, Eligibility, FailoverPolicy},
    global::{ClusterInfo, ClusterState, Exporter, Locality, Settings},
    grant::{ClusterGrant, Namespaces},
    ids::{ClusterIndex, Stamp, VipIndex},
    service::{AppProtocol, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};

const NAMES: [&str; 4] = ["us-east", "us-west", "eu-central", "ap-south"];
const REGIONS: [&str; 3] = ["us", "eu", ""];
const PORTS: [u16; 3] = [80, 81, 82];

/// A federation, in numbers: per cluster (region, active); per port of shop/cart who exposes it (bit by bit), 0: nobody;
/// who exports it; which regions are allowed; who may export and who may import services of the namespace shop.
type World = (Vec<(usize, bool)>, [u8; 3], u8, Option<Vec<usize>>, [u8; 2]);

fn name(i: usize) -> ClusterName {
    NAMES[i].parse().unwrap()
}

fn cart() -> ServiceName {
    "shop/cart".parse().unwrap()
}

fn members(bits: u8) -> impl Iterator<Item = ClusterName> {
    (0..NAMES.len()).filter(move |i| bits & (1 << i) != 0).map(name)
}

fn namespaces(bits: u8, i: usize) -> Namespaces {
    let shop = ["shop".parse().unwrap()];
    if bits & (1 << i) != 0 { Namespaces::Only(shop.into()) } else { Namespaces::Only([].into()) }
}

fn federation((clusters, ports, exporters, allowed, grants): &World) -> GlobalSnapshot {
    let bundle = |domain: &str| TrustBundle {
        trust_domain: domain.parse().unwrap(),
        document: "{}".to_owned(),
        predecessor_signature: vec![],
    };
    let info = |(i, (region, active)): (usize, &(usize, bool))| ClusterInfo {
        name: name(i),
        index: ClusterIndex(u16::try_from(i + 1).unwrap()),
        locality: Locality { region: REGIONS[*region].parse().unwrap(), zone: "a".parse().unwrap() },
        state: if *active { ClusterState::Active } else { ClusterState::Revoked },
        bundle: bundle(&format!("{}.example", NAMES[i])),
        gateways: vec![],
        grant: ClusterGrant {
            export_namespaces: namespaces(grants[0], i),
            import_namespaces: namespaces(grants[1], i),
            ..ClusterGrant::default()
        },
    };
    let port = |(number, bits): (&u16, &u8)| GlobalPort {
        port: ServicePort { name: format!("p{number}").parse().unwrap(), number: *number, protocol: AppProtocol::Tcp },
        clusters: members(*bits).collect(),
    };
    let exporter = |name| (name, Exporter { created_at: Timestamp(0), identities: BTreeSet::new() });
    let service = GlobalService {
        name: cart(),
        index: VipIndex(1),
        kind: ServiceKind::ClusterSetIp,
        ports: PORTS.iter().zip(ports).filter(|(_, bits)| **bits != 0).map(port).collect(),
        exporters: members(*exporters).map(exporter).collect(),
        conflicts: vec![],
    };
    let allowed_regions = allowed.as_ref().map(|a| a.iter().map(|r| REGIONS[*r].parse().unwrap()).collect());
    GlobalSnapshot {
        stamp: Stamp::default(),
        federation: "isthmus.example".parse().unwrap(),
        federation_bundle: bundle("isthmus.example"),
        settings: Settings {
            failover: FailoverPolicy { allowed_regions, ..FailoverPolicy::default() },
            ..Settings::default()
        },
        clusters: clusters.iter().enumerate().map(info).map(|c| (c.name.clone(), c)).collect(),
        services: BTreeMap::from([(cart(), service.into())]),
    }
}

/// Everyone active, two in "us", one in "eu", one in no known region; port 80 of all, 81 of us-west alone.
fn all() -> World {
    (vec![(0, true), (0, true), (1, true), (2, true)], [15, 2, 0], 15, None, [15, 15])
}

fn ask(world: &World, caller: &str, exporter: &str, service: &str, port: u16) -> Result<u16, Denied> {
    let (caller, exporter) = (caller.parse().unwrap(), exporter.parse().unwrap());
    let service: ServiceName = service.parse().unwrap();
    let what = Use { caller: &caller, exporter: &exporter, service: &service, port };
    may_use(&federation(world), &what).map(|permitted| {
        assert_eq!(permitted.service.name, service);
        permitted.port.port.number
    })
}

fn label(world: &World, caller: &str, exporter: &str, service: &str, port: u16) -> &'static str {
    ask(world, caller, exporter, service, port).map_or_else(|denied| denied.label(), |_| "permitted")
}

#[test]
fn a_member_may_use_what_another_or_its_own_cluster_exports() {
    assert_eq!(ask(&all(), "us-east", "us-west", "shop/cart", 81), Ok(81));
    assert_eq!(ask(&all(), "us-east", "us-east", "shop/cart", 80), Ok(80));
}

#[test]
fn each_reason_to_deny_is_told_apart() {
    let mut world = all();
    assert_eq!(label(&world, "us-east", "us-west", "shop/orders", 80), "unknown_service");
    assert_eq!(label(&world, "us-east", "us-west", "shop/cart", 82), "unknown_port");
    assert_eq!(label(&world, "us-east", "eu-central", "shop/cart", 81), "not_exported");
    assert_eq!(label(&world, "us-east", "never-joined", "shop/cart", 80), "not_exported");
    assert_eq!(label(&world, "never-joined", "us-west", "shop/cart", 80), "caller_inactive");
    world.0[0].1 = false;
    assert_eq!(label(&world, "us-east", "us-west", "shop/cart", 80), "caller_inactive");
    assert_eq!(label(&world, "us-west", "us-east", "shop/cart", 80), "exporter_inactive");
    world.2 = 0b1101;
    assert_eq!(label(&world, "eu-central", "us-west", "shop/cart", 80), "not_exported", "a port without its export");
}

#[test]
fn a_region_boundary_holds_for_the_exporter_and_an_unknown_region_is_outside_it() {
    let mut world = all();
    world.3 = Some(vec![0]);
    assert_eq!(label(&world, "eu-central", "us-west", "shop/cart", 80), "permitted", "it is about where traffic goes");
    for outside in ["eu-central", "ap-south"] {
        assert_eq!(label(&world, "us-east", outside, "shop/cart", 80), "outside_regions");
    }
    world.3 = Some(vec![]);
    assert_eq!(label(&world, "us-east", "us-east", "shop/cart", 80), "outside_regions", "nowhere means nowhere");
}

#[test]
fn a_grant_bounds_what_others_use_of_a_cluster_and_what_it_uses_of_others() {
    let mut world = all();
    world.4 = [0b1110, 0b1101];
    assert_eq!(label(&world, "us-west", "us-east", "shop/cart", 80), "import_not_granted");
    assert_eq!(label(&world, "eu-central", "us-east", "shop/cart", 80), "export_not_granted");
    assert_eq!(label(&world, "us-west", "us-west", "shop/cart", 80), "permitted", "its own, it may use");
    assert_eq!(label(&world, "us-east", "us-east", "shop/cart", 80), "export_not_granted");
}

#[test]
fn a_member_keeps_of_a_state_what_grants_allow() {
    let mut world = all();
    world.4 = [0b1110, 0b1101];
    let kept = |own: &str| {
        let mut global = federation(&world);
        global.keep_to_grants(&own.parse().unwrap());
        global.check().unwrap();
        global.services.get(&cart()).map(|service| {
            let ports: Vec<usize> = service.ports.iter().map(|port| port.clusters.len()).collect();
            (service.exporters.keys().map(ToString::to_string).collect::<Vec<_>>().join(" "), ports)
        })
    };
    assert_eq!(kept("eu-central"), Some(("ap-south eu-central us-west".to_owned(), vec![3, 1])));
    assert_eq!(kept("us-west"), Some(("us-west".to_owned(), vec![1, 1])), "it imports nothing");
    world.4 = [0b0001, 0b0000];
    let mut global = federation(&world);
    global.keep_to_grants(&"us-west".parse().unwrap());
    assert!(global.services.is_empty());
}

#[test]
fn a_stranger_learns_nothing_of_what_there_is() {
    for service in ["shop/cart", "shop/none"] {
        let denied = ask(&all(), "never-joined", "us-west", service, 80).unwrap_err();
        assert_eq!(denied.to_string(), "never-joined is no active member of the federation");
        assert!(!denied.retry_elsewhere());
    }
}

fn any_world() -> impl Strategy<Value = World> {
    let clusters = proptest::collection::vec((0..REGIONS.len(), any::<bool>()), 0..=NAMES.len());
    let allowed = proptest::option::of(proptest::collection::vec(0..REGIONS.len(), 0..3));
    // Mostly granted, or most worlds would be denied for that alone.
    let grants = [prop_oneof![3 => Just(15), 1 => 0..16u8], prop_oneof![3 => Just(15), 1 => 0..16u8]];
    (clusters, [0..16u8, 0..16, 0..16], 0..16u8, allowed, grants)
}

proptest! {
    /// The rules, one by one and in no order.
    #[test]
    fn what_is_permitted_is_what_no_rule_speaks_against(
        world in any_world(), caller in 0..NAMES.len(), exporter in 0..NAMES.len(), port in 0..PORTS.len(),
    ) {
        let (clusters, ports, exporters, allowed, grants) = &world;
        let active = |i: usize| clusters.get(i).is_some_and(|(_, active)| *active);
        let inside = |i: usize| match (allowed, clusters.get(i)) {
            (None, _) => true,
            (Some(allowed), Some((region, _))) => allowed.contains(region) && !REGIONS[*region].is_empty(),
            (Some(_), None) => false,
        };
        let expected = active(caller)
            && active(exporter)
            && exporters & (1 << exporter) != 0
            && ports[port] & (1 << exporter) != 0
            && grants[0] & (1 << exporter) != 0
            && (caller == exporter || grants[1] & (1 << caller) != 0)
            && inside(exporter);
        let answer = ask(&world, NAMES[caller], NAMES[exporter], "shop/cart", PORTS[port]);
        prop_assert_eq!(answer.is_ok(), expected, "{:?}", answer);
    }

    /// Whatever is observed: the choice never calls usable what is denied, and forbids an active caller nothing else.
    #[test]
    fn the_choice_agrees_with_access(world in any_world(), caller in 0..NAMES.len(), ready in 0..3u8) {
        let global = federation(&world);
        let (caller, service) = (name(caller), &global.services[&cart()]);
        let mut observed = Observations::default();
        for exporter in (0..NAMES.len()).map(name) {
            observed.observe(&cart(), &exporter, Availability { ready, total: 2, reachable: true }, Timestamp(0));
        }
        prop_assume!(global.active_cluster(&caller).is_some());
        for port in PORTS {
            let candidates = failover::choose(service, Some(port), &caller, &global, &observed, Timestamp(9));
            for exporter in (0..NAMES.len()).map(name) {
                let answer = may_use(&global, &Use { caller: &caller, exporter: &exporter, service: &cart(), port });
                let candidate = candidates.iter().find(|c| c.cluster == exporter);
                prop_assert_eq!(
                    answer.is_ok(),
                    candidate.is_some_and(|c| c.eligibility != Eligibility::Forbidden),
                    "{:?} {:?}", answer, candidate
                );
            }
        }
    }
}
