//! Tests of the merge: who wins, what is recorded, and that arrival order never matters.

use proptest::prelude::*;

use super::*;
use crate::time::Timestamp;

fn port(name: &str, number: u16, protocol: AppProtocol) -> ServicePort {
    ServicePort { name: name.parse().unwrap(), number, protocol }
}

fn service() -> ServiceName {
    ServiceName::new("shop", "cart").unwrap()
}

fn export(created_at: u64, ports: Vec<ServicePort>) -> Export {
    Export {
        service: service(),
        created_at: Timestamp(created_at),
        kind: ServiceKind::ClusterSetIp,
        ports,
        identities: ["spiffe://us-east.example/ns/shop/sa/cart".parse().unwrap()].into(),
    }
}

fn merged(exports: &[(&str, Export)]) -> Option<GlobalService> {
    let owned: Vec<(ClusterName, &Export)> = exports.iter().map(|(c, e)| (c.parse().unwrap(), e)).collect();
    merge(&service(), VipIndex(7), &owned.iter().map(|(c, e)| (c, *e)).collect())
}

fn clusters(port: &GlobalPort) -> Vec<&str> {
    port.clusters.iter().map(ClusterName::as_str).collect()
}

#[test]
fn no_exports_make_no_service() {
    assert_eq!(merged(&[]), None);
}

#[test]
fn agreeing_exports_merge_without_conflict() {
    let http = vec![port("http", 80, AppProtocol::Http), port("db", 5432, AppProtocol::Tcp)];
    let reversed = http.iter().rev().cloned().collect();
    let service = merged(&[("a", export(2, http)), ("b", export(1, reversed))]).unwrap();
    assert_eq!(service.conflicts, []);
    assert_eq!(service.index, VipIndex(7));
    assert_eq!(service.ports.iter().map(|p| p.port.number).collect::<Vec<_>>(), [80, 5432]);
    assert!(service.ports.iter().all(|p| clusters(p) == ["a", "b"]));
    assert_eq!(service.exporters.len(), 2);
}

#[test]
fn the_oldest_export_decides_the_kind_and_ties_go_by_cluster_name() {
    let ports = vec![port("", 80, AppProtocol::Http)];
    let headless = |at| Export { kind: ServiceKind::Headless, ..export(at, ports.clone()) };
    let service = merged(&[("a", export(2, ports.clone())), ("b", headless(1))]).unwrap();
    assert_eq!(service.kind, ServiceKind::Headless);
    assert_eq!(service.conflicts.iter().map(|c| c.reason.as_str()).collect::<Vec<_>>(), ["TypeConflict"]);
    assert!(service.conflicts[0].message.contains("b: Headless; a: ClusterSetIP"), "{}", service.conflicts[0].message);
    let tie = merged(&[("a", export(1, ports.clone())), ("b", headless(1))]).unwrap();
    assert_eq!(tie.kind, ServiceKind::ClusterSetIp);
}

#[test]
fn a_port_lists_only_the_clusters_that_expose_it() {
    let http = port("http", 80, AppProtocol::Http);
    let grpc = port("grpc", 90, AppProtocol::Grpc);
    let service = merged(&[("a", export(1, vec![http.clone()])), ("b", export(2, vec![grpc, http]))]).unwrap();
    assert_eq!(clusters(&service.ports[0]), ["a", "b"]);
    assert_eq!(clusters(&service.ports[1]), ["b"]);
    assert_eq!(service.conflicts[0].reason, "PortConflict");
}

#[test]
fn a_port_of_the_same_name_keeps_the_oldest_number() {
    let service = merged(&[
        ("a", export(2, vec![port("http", 8080, AppProtocol::Http)])),
        ("b", export(1, vec![port("http", 80, AppProtocol::Http)])),
    ])
    .unwrap();
    assert_eq!(service.ports.len(), 1);
    assert_eq!((service.ports[0].port.number, clusters(&service.ports[0])), (80, vec!["a", "b"]));
    assert_eq!(service.conflicts[0].reason, "PortConflict");
}

#[test]
fn a_port_that_speaks_another_protocol_gets_no_traffic() {
    let service = merged(&[
        ("a", export(1, vec![port("http", 80, AppProtocol::Http)])),
        ("b", export(2, vec![port("raw", 80, AppProtocol::Tcp)])),
        ("c", export(3, vec![port("http", 81, AppProtocol::Grpc)])),
    ])
    .unwrap();
    assert_eq!(service.ports.len(), 1);
    assert_eq!(clusters(&service.ports[0]), ["a"]);
    assert_eq!(service.exporters.len(), 3);
}

#[test]
fn a_cluster_finds_its_own_port_though_names_differ() {
    let first = export(1, vec![port("", 80, AppProtocol::Http)]);
    let second = export(2, vec![port("web", 80, AppProtocol::Http)]);
    let service = merged(&[("a", first), ("b", second.clone())]).unwrap();
    assert_eq!(clusters(&service.ports[0]), ["a", "b"]);
    assert_eq!(own_port(&"b".parse().unwrap(), &second, &service.ports[0]).unwrap().name.as_str(), "web");
}

#[test]
fn a_conflict_among_many_has_a_bounded_message() {
    let exports: Vec<(String, Export)> =
        (0..500u16).map(|i| (format!("c{i}"), export(i.into(), vec![port("", i + 1, AppProtocol::Tcp)]))).collect();
    let named: Vec<(&str, Export)> = exports.iter().map(|(c, e)| (c.as_str(), e.clone())).collect();
    let message = &merged(&named).unwrap().conflicts[0].message;
    assert!(message.len() < 1_000 && message.ends_with("and 492 more opinions"), "{message}");
}

fn any_export() -> impl Strategy<Value = Export> {
    let ports = proptest::collection::btree_map("[a-d]?", (1..6u16, 0..3u8), 0..4);
    (0..4u64, any::<bool>(), ports).prop_map(|(at, headless, ports)| {
        let protocol = |p| [AppProtocol::Tcp, AppProtocol::Http, AppProtocol::Grpc][usize::from(p)];
        let mut numbers = BTreeSet::new();
        let ports = ports.into_iter().filter(|(_, (number, _))| numbers.insert(*number));
        let ports = ports.map(|(name, (number, p))| port(&name, number, protocol(p))).collect();
        let kind = if headless { ServiceKind::Headless } else { ServiceKind::ClusterSetIp };
        Export { kind, ..export(at, ports) }
    })
}

fn any_exports() -> impl Strategy<Value = BTreeMap<ClusterName, Export>> {
    let cluster = "[a-f]".prop_map(|c| c.parse::<ClusterName>().unwrap());
    proptest::collection::btree_map(cluster, any_export(), 0..6)
}

fn merge_all<'a>(exports: impl IntoIterator<Item = (&'a ClusterName, &'a Export)>) -> Option<GlobalService> {
    merge(&service(), VipIndex(7), &exports.into_iter().collect())
}

proptest! {
    #[test]
    fn a_withdrawn_export_leaves_no_trace(exports in any_exports(), gone in any_export()) {
        let before = merge_all(&exports);
        let mut with: BTreeMap<ClusterName, Export> = exports.clone();
        with.insert("zz".parse().unwrap(), gone);
        let during = merge_all(&with).unwrap();
        prop_assert_eq!(during.index, VipIndex(7));
        with.remove(&"zz".parse::<ClusterName>().unwrap());
        prop_assert_eq!(merge_all(&with), before);
    }

    #[test]
    fn the_order_of_arrival_and_of_ports_does_not_matter(exports in any_exports()) {
        let forwards = merge_all(&exports);
        let reversed: BTreeMap<ClusterName, Export> = exports
            .iter()
            .rev()
            .map(|(c, e)| (c.clone(), Export { ports: e.ports.iter().rev().cloned().collect(), ..e.clone() }))
            .collect();
        prop_assert_eq!(merge_all(reversed.iter().rev()), forwards);
    }

    #[test]
    fn the_union_is_sound(exports in any_exports()) {
        let Some(service) = merge_all(&exports) else { return Ok(()) };
        let numbers: BTreeSet<u16> = service.ports.iter().map(|p| p.port.number).collect();
        let names: BTreeSet<_> = service.ports.iter().map(|p| p.port.name.clone()).collect();
        prop_assert_eq!((numbers.len(), names.len()), (service.ports.len(), service.ports.len()));
        prop_assert!(service.ports.windows(2).all(|w| w[0].port.number < w[1].port.number));
        prop_assert!(service.conflicts.is_sorted());
        for global in &service.ports {
            prop_assert!(!global.clusters.is_empty());
            for (cluster, export) in &exports {
                let own = own_port(cluster, export, global);
                prop_assert_eq!(own.is_some(), global.clusters.contains(cluster), "{} {:?}", cluster, global);
                prop_assert!(own.is_none_or(|own| own.protocol == global.port.protocol));
            }
        }
        for (cluster, export) in &exports {
            // No own port serves two global ones.
            let own: Vec<_> = service.ports.iter().filter_map(|g| own_port(cluster, export, g)).collect();
            prop_assert_eq!(own.iter().collect::<BTreeSet<_>>().len(), own.len(), "{}", cluster);
        }
    }
}
