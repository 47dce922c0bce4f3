//! Which configuration comes from which view, and that a real Envoy accepts all of it.

use std::{path::PathBuf, process::Command, sync::Arc};

use envoy_types::pb::envoy::{
    config::{
        bootstrap::v3::{Bootstrap, bootstrap::StaticResources},
        cluster::v3::{
            Cluster,
            cluster::{ClusterDiscoveryType, DiscoveryType},
        },
        core::v3::{Address, Node, Pipe, address},
        endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier},
        listener::v3::{Listener, filter::ConfigType},
        route::v3::RouteConfiguration,
    },
    extensions::{
        filters::network::http_connection_manager::v3::{
            HttpConnectionManager, http_connection_manager::RouteSpecifier,
        },
        transport_sockets::tls::v3::{UpstreamTlsContext, common_tls_context::ValidationContextType},
    },
};
use isthmus_model::{
    availability::{Availability, Observations},
    global::ClusterState,
    time::Timestamp,
};
use prost::Message;

use super::{
    fixture::{NOW, cluster, service, sidecar, view},
    *,
};
use crate::{sidecar::test_envoy, view::View, xds::names::ResourceType};

/// Priority, address and hostname of each endpoint, in order.
fn assignment(view: &View, name: &str) -> Vec<(u32, String, String)> {
    let resources = build(view, &sidecar(), NOW);
    let load: ClusterLoadAssignment = decode(&resources, ResourceType::Endpoints, name);
    let mut all = Vec::new();
    for group in load.endpoints {
        for endpoint in group.lb_endpoints {
            let Some(HostIdentifier::Endpoint(endpoint)) = endpoint.host_identifier else { panic!("no endpoint") };
            all.push((group.priority, text(&endpoint), endpoint.hostname));
        }
    }
    all
}

fn text(endpoint: &Endpoint) -> String {
    let Some(address::Address::SocketAddress(at)) = endpoint.address.clone().unwrap().address else {
        panic!("no address")
    };
    match at.port_specifier {
        Some(envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier::PortValue(port)) => {
            format!("{}:{port}", at.address)
        }
        other => panic!("no port: {other:?}"),
    }
}

fn decode<T: Message + Default>(resources: &Resources, kind: ResourceType, name: &str) -> T {
    let resource = resources.find(kind, name).unwrap_or_else(|| panic!("{name} is missing"));
    T::decode(resource.body.value.as_slice()).unwrap()
}

fn entries(rows: &[(u32, &str, &str)]) -> Vec<(u32, String, String)> {
    rows.iter().map(|(p, a, h)| (*p, a.to_string(), h.to_string())).collect()
}

fn observe(view: &mut View, name: &str, c: &str, ready: u8) {
    let mut observations: Observations = (*view.observations).clone();
    observations.observe(&service(name), &cluster(c), Availability { ready, total: 1, reachable: true }, Timestamp(1));
    view.observations = Arc::new(observations);
}

#[test]
fn http_goes_to_local_endpoints_first_and_then_to_each_cluster_over_every_local_gateway() {
    let expected = entries(&[
        (0, "127.1.1.21:18080", "80.cart.shop.svc.us-east.isthmus.example"),
        (1, "127.1.1.11:15502", "80.cart.shop.svc.us-west.isthmus.example"),
        (1, "127.1.1.12:15502", "80.cart.shop.svc.us-west.isthmus.example"),
        (2, "127.1.1.11:15503", "80.cart.shop.svc.eu-central.isthmus.example"),
        (2, "127.1.1.12:15503", "80.cart.shop.svc.eu-central.isthmus.example"),
    ]);
    assert_eq!(assignment(&view(), "outbound|80|shop/cart"), expected);
}

#[test]
fn a_cluster_without_ready_endpoints_leaves_and_priorities_stay_contiguous() {
    let mut view = view();
    observe(&mut view, "cart", "us-west", 0);
    let expected = entries(&[
        (0, "127.1.1.21:18080", "80.cart.shop.svc.us-east.isthmus.example"),
        (1, "127.1.1.11:15503", "80.cart.shop.svc.eu-central.isthmus.example"),
        (1, "127.1.1.12:15503", "80.cart.shop.svc.eu-central.isthmus.example"),
    ]);
    assert_eq!(assignment(&view, "outbound|80|shop/cart"), expected);
}

#[test]
fn an_endpoint_that_is_unready_or_lacks_a_sidecar_gets_nothing() {
    for (ready, has_sidecar) in [(false, true), (true, false)] {
        let mut view = view();
        let mut endpoints = (*view.endpoints).clone();
        let first = &mut endpoints.services.get_mut(&service("cart")).unwrap()[0];
        (first.ready, first.has_sidecar) = (ready, has_sidecar);
        view.endpoints = Arc::new(endpoints);
        let rows = assignment(&view, "outbound|80|shop/cart");
        assert_eq!(rows[0], entries(&[(0, "127.1.1.11:15502", "80.cart.shop.svc.us-west.isthmus.example")])[0]);
    }
}

#[test]
fn a_draining_gateway_is_in_no_assignment() {
    let mut view = view();
    view.gateways.get_mut("gateway-1").unwrap().draining = true;
    for name in ["outbound|80|shop/cart", "outbound|5000|shop/orders"] {
        assert!(assignment(&view, name).iter().all(|(_, at, _)| !at.starts_with("127.1.1.11:")), "{name}");
    }
}

#[test]
fn tcp_leaves_the_choice_of_the_cluster_to_the_gateways() {
    let sni = "5000.orders.shop.svc.any.isthmus.example";
    let expected = entries(&[(0, "127.1.1.11:15440", sni), (0, "127.1.1.12:15440", sni)]);
    assert_eq!(assignment(&view(), "outbound|5000|shop/orders"), expected);
    let tls = upstream_tls(&view(), "outbound|5000|shop/orders");
    assert_eq!((tls.sni.as_str(), tls.auto_host_sni), (sni, false));
}

#[test]
fn only_exporters_of_the_port_in_active_clusters_are_accepted_as_peers() {
    let mut view = view();
    let mut global = (*view.global).clone();
    global.clusters.get_mut(&cluster("eu-central")).unwrap().state = ClusterState::Revoked;
    Arc::make_mut(global.services.get_mut(&service("cart")).unwrap()).ports[1].clusters.remove(&cluster("us-west"));
    view.global = Arc::new(global);
    assert_eq!(
        accepted(&view, "outbound|80|shop/cart"),
        ["spiffe://us-east.example/ns/shop/sa/cart", "spiffe://us-west.example/ns/shop/sa/cart"]
    );
    assert_eq!(accepted(&view, "outbound|81|shop/cart"), ["spiffe://us-east.example/ns/shop/sa/cart"]);
}

#[test]
fn a_port_that_nobody_may_answer_for_is_not_configured_at_all() {
    let mut view = view();
    let mut global = (*view.global).clone();
    Arc::make_mut(global.services.get_mut(&service("orders")).unwrap()).ports[0].clusters.clear();
    view.global = Arc::new(global);
    let resources = build(&view, &sidecar(), NOW);
    assert!(resources.find(ResourceType::Cluster, "outbound|5000|shop/orders").is_none());
    assert!(resources.find(ResourceType::Listener, "outbound|127.64.0.2:5000").is_none());
    assert!(
        resources.problems.iter().any(|p| p.contains("shop/orders") && p.contains("5000")),
        "{:?}",
        resources.problems
    );
}

#[test]
fn a_sidecar_gets_its_upstreams_and_its_own_ports_only() {
    let mut sidecar = sidecar();
    sidecar.hello.upstreams = [service("orders"), service("nowhere")].into();
    let resources = build(&view(), &sidecar, NOW);
    let names = |kind| resources.of(kind).map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
    assert_eq!(
        names(ResourceType::Listener),
        ["inbound|8443", "inbound|8444", "inbound|8445", "outbound|127.64.0.2:5000"]
    );
    assert_eq!(names(ResourceType::Endpoints), ["outbound|5000|shop/orders"]);
    assert!(resources.problems.iter().any(|p| p.contains("shop/nowhere")), "{:?}", resources.problems);
}

#[test]
fn a_new_revision_without_a_change_for_the_sidecar_changes_no_version() {
    let mut later = view();
    let mut global = (*later.global).clone();
    global.stamp.revision.0 += 1;
    later.global = Arc::new(global);
    let (a, b) = (build(&view(), &sidecar(), NOW), build(&later, &sidecar(), NOW));
    assert_ne!(a.stamp, b.stamp);
    for kind in ResourceType::ADS {
        assert!(a.of(kind).eq(b.of(kind)), "{kind:?}");
    }
}

#[test]
fn every_reference_between_resources_has_its_target() {
    let resources = build(&view(), &sidecar(), NOW);
    for (name, _) in resources.of(ResourceType::Cluster).filter(|(name, _)| name.starts_with("outbound")) {
        assert!(resources.find(ResourceType::Endpoints, name).is_some(), "{name}");
    }
    for (name, _) in resources.of(ResourceType::Route) {
        assert!(resources.find(ResourceType::Cluster, name).is_some(), "{name}");
    }
}

#[test]
fn a_real_envoy_accepts_every_resource() {
    let resources = build(&view(), &sidecar(), NOW);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bootstrap.pb");
    std::fs::write(&path, static_bootstrap(&resources).encode_to_vec()).unwrap();
    let out = validate(&path);
    assert!(out.0, "Envoy refuses the configuration:\n{}", out.1);
}

#[test]
fn the_validation_notices_a_bad_resource() {
    let resources = build(&view(), &sidecar(), NOW);
    let mut bootstrap = static_bootstrap(&resources);
    bootstrap.static_resources.as_mut().unwrap().clusters[1].connect_timeout =
        Some(envoy_types::pb::google::protobuf::Duration { seconds: -1, nanos: 0 });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bootstrap.pb");
    std::fs::write(&path, bootstrap.encode_to_vec()).unwrap();
    assert!(!validate(&path).0);
}

fn validate(path: &PathBuf) -> (bool, String) {
    let out = Command::new(test_envoy::binary())
        .args(["--mode", "validate", "--log-level", "warn", "--config-path"])
        .arg(path)
        .output()
        .expect("start Envoy");
    (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// The same resources without a server: assignments inside their clusters, routes inside their listeners.
fn static_bootstrap(resources: &Resources) -> Bootstrap {
    let clusters = resources.of(ResourceType::Cluster).map(|(name, _)| {
        let mut cluster: Cluster = decode(resources, ResourceType::Cluster, name);
        if cluster.eds_cluster_config.take().is_some() {
            cluster.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into()));
            cluster.load_assignment = Some(decode(resources, ResourceType::Endpoints, name));
        }
        cluster
    });
    let listeners = resources.of(ResourceType::Listener).map(|(name, _)| {
        let mut listener: Listener = decode(resources, ResourceType::Listener, name);
        for filter in &mut listener.filter_chains[0].filters {
            let Some(ConfigType::TypedConfig(any)) = &mut filter.config_type else { panic!("untyped filter") };
            if !any.type_url.ends_with("HttpConnectionManager") {
                continue;
            }
            let mut manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap();
            if let Some(RouteSpecifier::Rds(rds)) = &manager.route_specifier {
                let table: RouteConfiguration = decode(resources, ResourceType::Route, &rds.route_config_name);
                manager.route_specifier = Some(RouteSpecifier::RouteConfig(table));
            }
            any.value = manager.encode_to_vec();
        }
        listener
    });
    Bootstrap {
        node: Some(Node { id: "web-1".to_owned(), cluster: "us-east".to_owned(), ..Default::default() }),
        static_resources: Some(StaticResources {
            clusters: std::iter::once(launcher()).chain(clusters).collect(),
            listeners: listeners.collect(),
            secrets: Vec::new(),
        }),
        ..Default::default()
    }
}

fn launcher() -> Cluster {
    let pipe = Address {
        address: Some(address::Address::Pipe(Pipe { path: "/nonexistent.sock".to_owned(), ..Default::default() })),
    };
    let endpoint = LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address: Some(pipe), ..Default::default() })),
        ..Default::default()
    };
    #[allow(deprecated)]
    Cluster {
        name: names::LAUNCHER_CLUSTER.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        http2_protocol_options: Some(Default::default()),
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: names::LAUNCHER_CLUSTER.to_owned(),
            endpoints: vec![LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn upstream_tls(view: &View, name: &str) -> UpstreamTlsContext {
    use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
    let cluster: Cluster = decode(&build(view, &sidecar(), NOW), ResourceType::Cluster, name);
    let Some(ConfigType::TypedConfig(any)) = cluster.transport_socket.unwrap().config_type else { panic!("no TLS") };
    UpstreamTlsContext::decode(any.value.as_slice()).unwrap()
}

fn accepted(view: &View, name: &str) -> Vec<String> {
    use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
    let common = upstream_tls(view, name).common_tls_context.unwrap();
    let Some(ValidationContextType::CombinedValidationContext(combined)) = common.validation_context_type else {
        panic!("no validation context")
    };
    let matchers = combined.default_validation_context.unwrap().match_typed_subject_alt_names;
    matchers
        .into_iter()
        .map(|m| match m.matcher.unwrap().match_pattern {
            Some(MatchPattern::Exact(id)) => id,
            other => panic!("not exact: {other:?}"),
        })
        .collect()
}
