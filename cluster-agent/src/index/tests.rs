use isthmus_api::manifest;
use isthmus_model::{
    local::{self, Inbound},
    service::AppProtocol,
};

use super::{endpoints::*, *};
use crate::view::Sidecar;

const NOW: Timestamp = Timestamp(5_000);
const CART: &str = "apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {ports: [{name: http, port: 80, appProtocol: http}]}
";
const EXPORT: &str = "apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: cart, namespace: shop}
";
const SLICE: &str = "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 15080}]
endpoints:
- addresses: [127.1.1.21]
- addresses: [127.1.1.22]
  conditions: {ready: false}
";

fn files(texts: &[(&str, &str)]) -> BTreeMap<String, Arc<[Object]>> {
    let objects = |(name, text): &(&str, &str)| {
        let objects: Vec<_> = manifest::parse(name, text).into_iter().map(Result::unwrap).collect();
        ((*name).to_owned(), objects.into())
    };
    texts.iter().map(objects).collect()
}

fn index_of(texts: &[(&str, &str)]) -> Index {
    let first_seen = BTreeMap::from([("shop/cart".parse().unwrap(), Timestamp(1_000))]);
    let trust_domain = "us-east.example".parse().unwrap();
    build(&files(texts), Context { trust_domain: &trust_domain, first_seen: &first_seen, now: NOW })
}

fn cart() -> ServiceName {
    "shop/cart".parse().unwrap()
}

fn sidecar(account: &str, address: &str) -> Sidecar {
    let inbound = Inbound { app: "127.0.0.1:18080".parse().unwrap(), protocol: AppProtocol::Http };
    let hello = local::Sidecar {
        name: "cart-1".to_owned(),
        address: address.parse().unwrap(),
        inbound: BTreeMap::from([(15080, inbound)]),
        upstreams: BTreeSet::new(),
    };
    Sidecar { hello, identity: format!("spiffe://us-east.example/ns/shop/sa/{account}").parse().unwrap() }
}

fn joined(index: &Index, sidecar: &Sidecar, ready: bool) -> (LocalEndpointsOf, Vec<Problem>) {
    let ready = BTreeMap::from([(15080, ready)]);
    let (all, problems) = join(index, [Probed { sidecar, ready: &ready }].into_iter(), &"us-east-1".parse().unwrap());
    (all.of(&cart()).iter().map(|e| (e.ip.to_string(), e.has_sidecar, e.ready)).collect(), problems)
}

type LocalEndpointsOf = Vec<(String, bool, bool)>;

#[test]
fn an_export_says_ports_kind_and_identities_but_no_addresses() {
    let index = index_of(&[("a.yaml", CART), ("b.yaml", EXPORT), ("c.yaml", SLICE)]);
    assert_eq!(index.problems, []);
    let export = &index.exports[&cart()];
    assert_eq!(export.created_at, Timestamp(1_000));
    assert_eq!(export.ports.len(), 1);
    let ids: Vec<_> = export.identities.iter().map(SpiffeId::as_str).collect();
    assert_eq!(ids, ["spiffe://us-east.example/ns/shop/sa/cart"]);
}

#[test]
fn a_service_without_an_export_is_not_published() {
    let index = index_of(&[("a.yaml", CART), ("c.yaml", SLICE)]);
    assert!(index.exports.is_empty());
    assert_eq!(index.services[&cart()].endpoints.len(), 2);
}

#[test]
fn an_export_without_a_service_is_named() {
    let index = index_of(&[("b.yaml", EXPORT)]);
    assert!(index.exports.is_empty());
    let [p] = index.problems.try_into().unwrap();
    assert!(p.at.contains("b.yaml") && p.message.contains("NoService"), "{p:?}");
}

#[test]
fn an_external_name_cannot_be_exported() {
    let external = "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\nspec: {type: ExternalName, externalName: a.example}\n";
    let index = index_of(&[("a.yaml", external), ("b.yaml", EXPORT)]);
    let [p] = index.problems.try_into().unwrap();
    assert!(p.message.contains("InvalidServiceType"), "{p:?}");
}

#[test]
fn of_duplicates_the_first_file_wins() {
    let other = CART.replace("port: 80", "port: 81");
    let index = index_of(&[("b.yaml", &other), ("a.yaml", CART), ("c.yaml", EXPORT)]);
    assert_eq!(index.exports[&cart()].ports[0].number, 80);
    let [p] = index.problems.try_into().unwrap();
    assert!(p.at == "b.yaml" && p.message.contains("a.yaml"), "{p:?}");
}

#[test]
fn headless_services_and_named_accounts_are_understood() {
    let service = "apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, annotations: {isthmus.io/service-accounts: 'cart-v1, cart-v2'}}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
";
    let index = index_of(&[("a.yaml", service), ("b.yaml", EXPORT)]);
    let export = &index.exports[&cart()];
    assert_eq!(export.kind, ServiceKind::Headless);
    assert_eq!(export.identities.len(), 2);
}

#[test]
fn a_port_that_is_not_tcp_is_left_out_with_its_field() {
    let service = CART.replace("ports: [", "ports: [{name: q, port: 443, protocol: UDP}, ");
    let index = index_of(&[("a.yaml", &service), ("b.yaml", EXPORT)]);
    assert_eq!(index.exports[&cart()].ports.len(), 1);
    assert_eq!(index.problems[0].field, "spec.ports[0].protocol");
}

#[test]
fn a_creation_time_in_the_future_is_cut_to_now() {
    let export = EXPORT.replace("{name: cart", "{creationTimestamp: '2999-01-01T00:00:00Z', name: cart");
    assert_eq!(index_of(&[("a.yaml", CART), ("b.yaml", &export)]).exports[&cart()].created_at, NOW);
}

#[test]
fn an_endpoint_serves_only_with_its_sidecar_its_app_and_its_slice_ready() {
    let index = index_of(&[("a.yaml", CART), ("c.yaml", SLICE)]);
    let at = |address, ready| joined(&index, &sidecar("cart", address), ready).0;
    let both = |first: (bool, bool), second: (bool, bool)| {
        vec![("127.1.1.21".to_owned(), first.0, first.1), ("127.1.1.22".to_owned(), second.0, second.1)]
    };
    assert_eq!(at("127.1.1.21", true), both((true, true), (false, false)));
    assert_eq!(at("127.1.1.21", false), both((true, false), (false, false)));
    assert_eq!(at("127.1.1.22", true), both((false, false), (true, false)));
}

#[test]
fn a_sidecar_under_another_identity_does_not_count_and_is_named() {
    let index = index_of(&[("a.yaml", CART), ("c.yaml", SLICE)]);
    let (endpoints, problems) = joined(&index, &sidecar("thief", "127.1.1.21"), true);
    assert!(endpoints.iter().all(|(_, has_sidecar, ready)| !has_sidecar && !ready));
    assert!(problems[0].message.contains("isthmus.io/service-accounts"), "{problems:?}");
}

#[test]
fn a_sidecar_that_lacks_the_port_is_named() {
    let index = index_of(&[("a.yaml", CART), ("c.yaml", SLICE)]);
    let mut sidecar = sidecar("cart", "127.1.1.21");
    let inbound = sidecar.hello.inbound.remove(&15080).unwrap();
    sidecar.hello.inbound.insert(9, inbound);
    let (_, problems) = joined(&index, &sidecar, true);
    assert!(problems[0].message.contains("inbound"), "{problems:?}");
}

#[test]
fn a_slice_of_no_service_and_with_no_fitting_port_are_named() {
    let index = index_of(&[("c.yaml", SLICE)]);
    assert!(index.problems[0].message.contains("no Service"), "{:?}", index.problems);
    let slice = SLICE.replace("name: http", "name: other");
    let index = index_of(&[("a.yaml", CART), ("c.yaml", &slice)]);
    assert!(index.problems[0].message.contains("port"), "{:?}", index.problems);
}
