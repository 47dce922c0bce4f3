//! Every rule of the zone, one by one.

use std::sync::Arc;

use hickory_proto::rr::{Name, RData, RecordType};
use isthmus_model::{
    availability::{Availability, Observations},
    global::{ClusterState, GlobalSnapshot},
    ids::{Revision, ServiceName, VipIndex},
    service::ServiceKind,
    time::Timestamp,
};
use proptest::prelude::*;

use super::{Answer, Outcome, TTL, Zone};
use crate::fixture::{endpoint, endpoints, service, snapshot, sources};

const NOW: Timestamp = Timestamp(1_000_000);

fn zone_of(global: GlobalSnapshot) -> Zone {
    Zone::build(&sources(global), Arc::new(Observations::default()))
}

fn zone() -> Zone {
    zone_of(snapshot())
}

fn ask(zone: &Zone, name: &str, kind: RecordType) -> Answer {
    zone.answer(&Name::from_ascii(name).unwrap(), kind, NOW).expect("a name of the zone")
}

/// Outcome and the answers' data as text, sorted.
fn seen(zone: &Zone, name: &str, kind: RecordType) -> (Outcome, Vec<String>) {
    let answer = ask(zone, name, kind);
    let mut data: Vec<String> = answer.records.iter().map(|r| r.data.to_string()).collect();
    data.sort();
    (answer.outcome, data)
}

fn found(data: &[&str]) -> (Outcome, Vec<String>) {
    (Outcome::Found, data.iter().map(|d| (*d).to_owned()).collect())
}

fn nothing(outcome: Outcome) -> (Outcome, Vec<String>) {
    (outcome, Vec::new())
}

#[test]
fn dns_version_is_the_schema_version() {
    assert_eq!(seen(&zone(), "dns-version.clusterset.local.", RecordType::TXT), found(&["1.0.0"]));
}

#[test]
fn cluster_set_ip_has_this_clusters_virtual_address() {
    let got = seen(&zone(), "cart.shop.svc.clusterset.local.", RecordType::A);
    assert_eq!(got, found(&["127.64.0.5"]));
}

#[test]
fn a_service_that_only_other_clusters_export_has_an_address_here_too() {
    assert_eq!(seen(&zone(), "orders.shop.svc.clusterset.local.", RecordType::A), found(&["127.64.0.6"]));
}

#[test]
fn a_known_name_without_the_asked_type_is_no_data() {
    let zone = zone();
    for kind in [RecordType::AAAA, RecordType::TXT, RecordType::CNAME, RecordType::MX] {
        assert_eq!(seen(&zone, "cart.shop.svc.clusterset.local.", kind), nothing(Outcome::NoData), "{kind}");
    }
}

#[test]
fn unknown_names_do_not_exist() {
    let zone = zone();
    for name in [
        "nope.shop.svc.clusterset.local.",
        "cart.nope.svc.clusterset.local.",
        "nope.svc.clusterset.local.",
        "nope.clusterset.local.",
        "x.dns-version.clusterset.local.",
        "a.b.c.cart.shop.svc.clusterset.local.",
        "_http._udp.cart.shop.svc.clusterset.local.",
        "_nope._tcp.cart.shop.svc.clusterset.local.",
        "http._tcp.cart.shop.svc.clusterset.local.",
        "_._tcp.orders.shop.svc.clusterset.local.",
        "*.shop.svc.clusterset.local.",
    ] {
        assert_eq!(seen(&zone, name, RecordType::A), nothing(Outcome::NxDomain), "{name}");
    }
}

#[test]
fn a_cluster_under_a_virtual_address_does_not_exist() {
    let zone = zone();
    for cluster in ["us-east", "us-west", "eu-central"] {
        let name = format!("{cluster}.cart.shop.svc.clusterset.local.");
        assert_eq!(seen(&zone, &name, RecordType::A), nothing(Outcome::NxDomain), "{name}");
    }
}

#[test]
fn names_that_only_hold_others_are_no_data() {
    let zone = zone();
    for name in [
        "svc.clusterset.local.",
        "shop.svc.clusterset.local.",
        "_tcp.cart.shop.svc.clusterset.local.",
        "dns.clusterset.local.",
    ] {
        assert_eq!(seen(&zone, name, RecordType::A), nothing(Outcome::NoData), "{name}");
    }
}

#[test]
fn a_service_without_named_ports_has_no_tcp_level() {
    let got = seen(&zone(), "_tcp.orders.shop.svc.clusterset.local.", RecordType::SRV);
    assert_eq!(got, nothing(Outcome::NxDomain));
}

#[test]
fn each_named_port_has_an_srv_that_targets_the_service_name() {
    let got = seen(&zone(), "_http._tcp.cart.shop.svc.clusterset.local.", RecordType::SRV);
    assert_eq!(got, found(&["0 100 80 cart.shop.svc.clusterset.local."]));
}

#[test]
fn srv_at_the_service_name_lists_every_port_once() {
    let mut global = snapshot();
    let ports = [("http", 80), ("metrics", 9090), ("web", 80)];
    let cart = service("shop/cart", 5, ServiceKind::ClusterSetIp, &ports, &["us-east"]);
    global.services.insert(cart.name.clone(), cart.into());
    let got = seen(&zone_of(global), "cart.shop.svc.clusterset.local.", RecordType::SRV);
    let target = "cart.shop.svc.clusterset.local.";
    assert_eq!(got, found(&[&format!("0 100 80 {target}"), &format!("0 100 9090 {target}")]));
}

#[test]
fn srv_brings_the_targets_address_along() {
    let answer = ask(&zone(), "_http._tcp.cart.shop.svc.clusterset.local.", RecordType::SRV);
    let additional: Vec<String> = answer.additional.iter().map(|r| r.data.to_string()).collect();
    assert_eq!(additional, ["127.64.0.5"]);
}

#[test]
fn headless_names_this_clusters_ready_endpoints_only() {
    assert_eq!(seen(&zone(), "db.shop.svc.clusterset.local.", RecordType::A), found(&["10.0.0.1"]));
    assert_eq!(seen(&zone(), "db.shop.svc.clusterset.local.", RecordType::AAAA), nothing(Outcome::NoData));
}

#[test]
fn headless_without_a_ready_endpoint_does_not_exist() {
    let mut sources = sources(snapshot());
    sources.endpoints = endpoints(vec![endpoint("10.0.0.2", false)]);
    let zone = Zone::build(&sources, Arc::default());
    assert_eq!(seen(&zone, "db.shop.svc.clusterset.local.", RecordType::A), nothing(Outcome::NxDomain));
}

#[test]
fn headless_that_this_cluster_does_not_export_does_not_exist() {
    let mut global = snapshot();
    let db = service("shop/db", 7, ServiceKind::Headless, &[("sql", 5432)], &["us-west"]);
    global.services.insert(db.name.clone(), db.into());
    let got = seen(&zone_of(global), "db.shop.svc.clusterset.local.", RecordType::A);
    assert_eq!(got, nothing(Outcome::NxDomain));
}

#[test]
fn each_headless_endpoint_has_a_name_below_its_cluster() {
    let zone = zone();
    let name = "10-0-0-1.us-east.db.shop.svc.clusterset.local.";
    assert_eq!(seen(&zone, name, RecordType::A), found(&["10.0.0.1"]));
    // Exists for its endpoints' sake, but resolves to nothing.
    assert_eq!(seen(&zone, "us-east.db.shop.svc.clusterset.local.", RecordType::A), nothing(Outcome::NoData));
    for absent in ["10-0-0-2.us-east", "10-0-0-1.us-west", "us-west"] {
        let name = format!("{absent}.db.shop.svc.clusterset.local.");
        assert_eq!(seen(&zone, &name, RecordType::A), nothing(Outcome::NxDomain), "{name}");
    }
}

#[test]
fn headless_srv_targets_the_endpoints_names_and_ports() {
    let zone = zone();
    let want = found(&["0 100 15432 10-0-0-1.us-east.db.shop.svc.clusterset.local."]);
    for name in ["_sql._tcp.db.shop.svc.clusterset.local.", "db.shop.svc.clusterset.local."] {
        assert_eq!(seen(&zone, name, RecordType::SRV), want, "{name}");
    }
    let additional = ask(&zone, "db.shop.svc.clusterset.local.", RecordType::SRV).additional;
    assert_eq!(additional.iter().map(|r| r.data.to_string()).collect::<Vec<_>>(), ["10.0.0.1"]);
}

#[test]
fn headless_endpoints_with_ipv6_are_aaaa() {
    let mut sources = sources(snapshot());
    sources.endpoints = endpoints(vec![endpoint("fd00::1", true)]);
    let zone = Zone::build(&sources, Arc::default());
    assert_eq!(seen(&zone, "db.shop.svc.clusterset.local.", RecordType::AAAA), found(&["fd00::1"]));
    let name = "fd00-0-0-0-0-0-0-1.us-east.db.shop.svc.clusterset.local.";
    assert_eq!(seen(&zone, name, RecordType::AAAA), found(&["fd00::1"]));
}

#[test]
fn addresses_live_five_seconds_and_so_does_their_absence() {
    let zone = zone();
    let answer = ask(&zone, "cart.shop.svc.clusterset.local.", RecordType::A);
    assert!(answer.records.iter().all(|r| r.ttl == TTL && TTL == 5));
    assert!(answer.authority.is_empty());
    for (name, kind) in [("nope.svc.clusterset.local.", RecordType::A), ("svc.clusterset.local.", RecordType::A)] {
        let answer = ask(&zone, name, kind);
        let [soa] = answer.authority.as_slice() else { panic!("one SOA for {name}") };
        assert_eq!((soa.name.to_string().as_str(), soa.ttl), ("clusterset.local.", 5));
        let RData::SOA(soa) = &soa.data else { panic!("{soa}") };
        assert_eq!(soa.minimum, 5);
    }
}

#[test]
fn the_apex_has_soa_and_ns_and_the_serial_follows_the_revision() {
    let zone = zone();
    let (_, soa) = seen(&zone, "clusterset.local.", RecordType::SOA);
    assert!(soa[0].contains(" 7 "), "{soa:?}");
    assert_eq!(seen(&zone, "clusterset.local.", RecordType::NS), found(&["ns.dns.clusterset.local."]));
    assert_eq!(seen(&zone, "ns.dns.clusterset.local.", RecordType::A), found(&["127.1.1.2"]));
    assert_eq!(seen(&zone, "clusterset.local.", RecordType::A), nothing(Outcome::NoData));
    let mut global = snapshot();
    global.stamp.revision = Revision(u64::from(u32::MAX) + 9);
    let (_, soa) = seen(&zone_of(global), "clusterset.local.", RecordType::SOA);
    assert!(soa[0].contains(" 8 "), "{soa:?}");
}

#[test]
fn case_does_not_matter_and_comes_back_as_asked() {
    let answer = ask(&zone(), "CaRt.Shop.SVC.ClusterSet.LOCAL.", RecordType::A);
    assert_eq!(answer.outcome, Outcome::Found);
    assert!(answer.records[0].name.eq_case(&Name::from_ascii("CaRt.Shop.SVC.ClusterSet.LOCAL.").unwrap()));
}

#[test]
fn names_of_other_zones_are_not_answered() {
    let zone = zone();
    for name in ["example.com.", "local.", ".", "cart.shop.svc.cluster.local.", "xclusterset.local."] {
        assert!(zone.answer(&Name::from_ascii(name).unwrap(), RecordType::A, NOW).is_none(), "{name}");
    }
}

#[test]
fn any_gets_one_small_record() {
    let answer = ask(&zone(), "cart.shop.svc.clusterset.local.", RecordType::ANY);
    assert_eq!(answer.records.len(), 1);
    assert_eq!(answer.records[0].record_type(), RecordType::HINFO);
}

#[test]
fn an_index_beyond_the_range_gives_no_data_and_is_named() {
    let mut global = snapshot();
    let cart: ServiceName = "shop/cart".parse().unwrap();
    Arc::make_mut(global.services.get_mut(&cart).unwrap()).index = VipIndex(70_000);
    let zone = zone_of(global);
    assert_eq!(seen(&zone, "cart.shop.svc.clusterset.local.", RecordType::A), nothing(Outcome::NoData));
    assert_eq!(zone.unaddressed().collect::<Vec<_>>(), [&cart]);
}

#[test]
fn a_service_outside_the_allowed_regions_gives_no_data() {
    let mut global = snapshot();
    global.settings.failover.allowed_regions = Some(["eu".parse().unwrap()].into_iter().collect());
    let zone = zone_of(global);
    // Only us-west exports orders; eu-central still serves cart.
    assert_eq!(seen(&zone, "orders.shop.svc.clusterset.local.", RecordType::A), nothing(Outcome::NoData));
    assert_eq!(seen(&zone, "orders.shop.svc.clusterset.local.", RecordType::SRV), nothing(Outcome::NoData));
    assert_eq!(seen(&zone, "cart.shop.svc.clusterset.local.", RecordType::A), found(&["127.64.0.5"]));
}

#[test]
fn a_service_of_a_revoked_cluster_alone_gives_no_data() {
    let mut global = snapshot();
    global.clusters.get_mut(&"us-west".parse().unwrap()).unwrap().state = ClusterState::Revoked;
    let got = seen(&zone_of(global), "orders.shop.svc.clusterset.local.", RecordType::A);
    assert_eq!(got, nothing(Outcome::NoData));
}

#[test]
fn failover_lists_the_candidates_in_order_with_their_reasons() {
    let mut observed = Observations::default();
    for (cluster, ready) in [("us-east", 0), ("us-west", 2), ("eu-central", 1)] {
        let current = Availability { ready, total: 2, reachable: true };
        observed.observe(&"shop/cart".parse().unwrap(), &cluster.parse().unwrap(), current, Timestamp(1));
    }
    let zone = zone().with_observed(Arc::new(observed));
    let answer = ask(&zone, "_failover.cart.shop.svc.clusterset.local.", RecordType::TXT);
    let [record] = answer.records.as_slice() else { panic!("one TXT record: {answer:?}") };
    assert_eq!(record.ttl, 0, "evidence is never cached");
    let RData::TXT(text) = &record.data else { panic!("{record}") };
    let lines: Vec<String> = text.txt_data.iter().map(|l| String::from_utf8_lossy(l).into_owned()).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    for (line, start) in lines.iter().zip(["1 us-west ready: ", "2 eu-central ready: ", "3 us-east no-endpoints: "]) {
        assert!(line.starts_with(start) && line.len() > start.len(), "{lines:?}");
    }
}

#[test]
fn failover_of_an_unknown_service_does_not_exist() {
    let got = seen(&zone(), "_failover.nope.shop.svc.clusterset.local.", RecordType::TXT);
    assert_eq!(got, nothing(Outcome::NxDomain));
}

#[test]
fn failover_of_very_many_clusters_stays_within_bounds() {
    let mut global = snapshot();
    let template = global.clusters[&"us-west".parse().unwrap()].clone();
    let names: Vec<String> = (0..200).map(|i| format!("c{i}-{}", "x".repeat(50))).collect();
    for name in &names {
        let mut cluster = template.clone();
        cluster.name = name.parse().unwrap();
        global.clusters.insert(cluster.name.clone(), cluster);
    }
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let big = service("shop/big", 9, ServiceKind::ClusterSetIp, &[("http", 80)], &all);
    global.services.insert(big.name.clone(), big.into());
    let answer = ask(&zone_of(global), "_failover.big.shop.svc.clusterset.local.", RecordType::TXT);
    let RData::TXT(text) = &answer.records[0].data else { panic!("{answer:?}") };
    assert_eq!(text.txt_data.len(), 65);
    assert!(text.txt_data.iter().all(|l| l.len() <= 255));
    assert!(String::from_utf8_lossy(text.txt_data.last().unwrap()).starts_with("and 136 more"));
}

proptest! {
    #[test]
    fn every_name_gets_an_answer_of_a_consistent_shape(
        labels in prop::collection::vec("[a-zA-Z0-9_*-]{1,20}|svc|shop|cart|db|_tcp|_http|us-east", 0..7),
        kind in prop::sample::select(vec![RecordType::A, RecordType::SRV, RecordType::TXT, RecordType::ANY]),
    ) {
        let name = Name::from_labels(labels.iter().map(String::as_bytes).chain([b"clusterset".as_slice(), b"local"]));
        let name = name.unwrap();
        let answer = zone().answer(&name, kind, NOW).unwrap();
        prop_assert_eq!(answer.outcome == Outcome::Found, !answer.records.is_empty());
        prop_assert_eq!(answer.outcome == Outcome::Found, answer.authority.is_empty());
        prop_assert!(answer.records.iter().all(|r| r.name == name));
    }
}
