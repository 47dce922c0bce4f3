use std::collections::BTreeSet;

use isthmus_api::manifest::{self, Object};
use isthmus_model::{
    global::{ClusterInfo, Exporter, GlobalPort, GlobalService, Locality, Settings},
    ids::{ClusterIndex, Epoch, PortName, Revision, Stamp, VipIndex},
    local::{self, Inbound},
    service::{AppProtocol, ServiceKind, ServicePort, TrustBundle},
};

use super::*;

const TEXT: &str = "apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {ports: [{name: http, port: 80, appProtocol: http}]}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: cart, namespace: shop}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 15080}]
endpoints: [{addresses: [127.1.1.21]}]
";
const NOW: Timestamp = Timestamp(1_000_000);

fn at(seconds: u64) -> Timestamp {
    NOW + Duration::from_secs(seconds)
}

fn own() -> Own {
    Own {
        cluster: "us-east".parse().unwrap(),
        trust_domain: "us-east.example".parse().unwrap(),
        vip_range: "127.64.0.0/16".parse().unwrap(),
        zone: "us-east-1".parse().unwrap(),
        workload_lifetime: Duration::from_secs(3600),
    }
}

fn cart() -> ServiceName {
    "shop/cart".parse().unwrap()
}

fn manifests() -> Arc<Manifests> {
    let objects: Vec<Object> = manifest::parse("all.yaml", TEXT).into_iter().map(Result::unwrap).collect();
    Arc::new(Manifests {
        files: BTreeMap::from([("all.yaml".to_owned(), objects.into())]),
        problems: Vec::new(),
        synced: true,
    })
}

fn cluster((index, name): (u16, &str)) -> (ClusterName, ClusterInfo) {
    let name: ClusterName = name.parse().unwrap();
    let bundle = TrustBundle {
        trust_domain: format!("{name}.example").parse().unwrap(),
        document: String::new(),
        predecessor_signature: Vec::new(),
    };
    let info = ClusterInfo {
        name: name.clone(),
        index: ClusterIndex(index),
        locality: Locality { region: "us".parse().unwrap(), zone: "us-1".parse().unwrap() },
        state: ClusterState::Active,
        bundle,
        gateways: Vec::new(),
        grant: Default::default(),
    };
    (name, info)
}

/// us-east and us-west export the cart.
fn global() -> Arc<GlobalSnapshot> {
    let exporter = || Exporter { created_at: NOW, identities: BTreeSet::new() };
    let exporters = ["us-east", "us-west"].map(|c| (c.parse().unwrap(), exporter()));
    let service = GlobalService {
        name: cart(),
        index: VipIndex(1),
        kind: ServiceKind::ClusterSetIp,
        ports: Vec::new(),
        exporters: exporters.into(),
        conflicts: Vec::new(),
    };
    let federation: TrustDomain = "isthmus.example".parse().unwrap();
    Arc::new(GlobalSnapshot {
        stamp: Stamp { epoch: Epoch(1), revision: Revision(1) },
        federation: federation.clone(),
        federation_bundle: TrustBundle {
            trust_domain: federation,
            document: String::new(),
            predecessor_signature: Vec::new(),
        },
        settings: Settings::default(),
        clusters: (1..).zip(["us-east", "us-west"]).map(cluster).collect(),
        services: BTreeMap::from([(cart(), service.into())]),
    })
}

fn state() -> State {
    State::new(own(), global(), manifests(), Members::default(), NOW)
}

fn sidecar(account: &str) -> Sidecar {
    let inbound = Inbound { app: "127.0.0.1:18080".parse().unwrap(), protocol: AppProtocol::Http };
    let hello = local::Sidecar {
        name: "cart-1".to_owned(),
        address: "127.1.1.21".parse().unwrap(),
        inbound: BTreeMap::from([(15080, inbound)]),
        upstreams: BTreeSet::new(),
    };
    Sidecar { hello, identity: format!("spiffe://us-east.example/ns/shop/sa/{account}").parse().unwrap() }
}

/// Of a process that does not say which one it is.
fn gateway(name: &str) -> gateways::Hello {
    let hello = local::LocalGateway {
        name: name.to_owned(),
        tunnel: "127.1.1.11:15443".parse().ok(),
        local_ip: "127.1.1.11".parse().unwrap(),
        auto_port: 15440,
        pinned_port_base: 15500,
    };
    gateways::Hello { gateway: LocalGateway { hello, draining: false }, instance: String::new() }
}

fn report(ready: u8, reachable: bool) -> GatewayEvent {
    let current = Availability { ready, total: 2, reachable };
    let report = Report { service: cart(), cluster: "us-west".parse().unwrap(), current, recovered_at: None };
    GatewayEvent::Report(vec![report])
}

fn on_sidecar(state: &mut State, session: Session, event: SidecarEvent) -> Result<(), Refusal> {
    state.apply(Event::Sidecar("cart-1".to_owned(), session, event), NOW)
}

fn on_gateway(state: &mut State, name: &str, session: Session, event: GatewayEvent, now: Timestamp) {
    state.apply(Event::Gateway(name.to_owned(), session, event), now).unwrap();
}

fn ready(state: &State) -> bool {
    state.view().endpoints.of(&cart())[0].ready
}

fn west(state: &State) -> Option<Availability> {
    state.view().observations.find(&cart(), &"us-west".parse().unwrap()).map(|o| o.current)
}

fn serve(state: &mut State) {
    on_sidecar(state, 1, SidecarEvent::Hello(sidecar("cart"))).unwrap();
    on_sidecar(state, 1, SidecarEvent::Readiness(BTreeMap::from([(15080, true)]))).unwrap();
    assert!(ready(state));
}

#[test]
fn nothing_is_published_before_the_source_was_read() {
    let unsynced = Arc::new(Manifests { synced: false, ..(*manifests()).clone() });
    let mut state = State::new(own(), global(), unsynced, Members::default(), NOW);
    assert_eq!(state.intent(), None);
    assert_eq!(state.view().endpoints.services.len(), 1);
    state.apply(Event::Manifests(manifests()), NOW).unwrap();
    assert_eq!(state.intent().unwrap().exports.len(), 1);
}

/// The federation calls the cart's port 80 by another name, and has a port of another cluster's under ours.
fn renamed() -> Arc<GlobalSnapshot> {
    let port = |name: &str, number, clusters: &[&str]| GlobalPort {
        port: ServicePort { name: name.parse().unwrap(), number, protocol: AppProtocol::Http },
        clusters: clusters.iter().map(|c| c.parse().unwrap()).collect(),
    };
    let mut global = (*global()).clone();
    global.stamp.revision = Revision(2);
    Arc::make_mut(global.services.get_mut(&cart()).unwrap()).ports =
        vec![port("web", 80, &["us-east", "us-west"]), port("metrics", 9090, &["us-west"])];
    Arc::new(global)
}

fn ports(endpoints: &LocalEndpoints) -> Vec<(&str, u16)> {
    endpoints.of(&cart())[0].ports.iter().map(|(name, number)| (name.as_str(), *number)).collect()
}

#[test]
fn endpoints_are_found_by_the_global_ports_name_and_by_the_own_one_while_not_exported() {
    let mut state = state();
    serve(&mut state);
    let mut without_us = (*renamed()).clone();
    Arc::make_mut(without_us.services.get_mut(&cart()).unwrap()).exporters.remove(&own().cluster);
    for (global, expected) in [(without_us.into(), "http"), (renamed(), "web")] {
        state.apply(Event::Global(global), NOW).unwrap();
        assert_eq!(ports(&state.view().endpoints), [(expected, 15080)]);
        assert_eq!(ports(&state.exported()), [(expected, 15080)], "what gateways get");
    }
    assert!(ready(&state));
    state.apply(Event::Manifests(manifests()), NOW).unwrap();
    assert_eq!(ports(&state.exported()), [("web", 15080)], "whatever event came last");
}

#[test]
fn an_own_port_never_stands_for_another_clusters_port_of_its_name() {
    let mut state = state();
    let mut global = (*renamed()).clone();
    let ports_of = &mut Arc::make_mut(global.services.get_mut(&cart()).unwrap()).ports;
    ports_of.remove(0);
    ports_of[0].port.name = "http".parse::<PortName>().unwrap();
    state.apply(Event::Global(Arc::new(global)), NOW).unwrap();
    assert_eq!(ports(&state.exported()), []);
}

#[test]
fn an_app_that_stops_answering_takes_its_endpoint_out_and_the_local_availability_follows() {
    let mut state = state();
    serve(&mut state);
    let local = |state: &State| state.view().observations.find(&cart(), &own().cluster).unwrap().current.ready;
    assert_eq!(local(&state), 1);
    on_sidecar(&mut state, 1, SidecarEvent::Readiness(BTreeMap::from([(15080, false)]))).unwrap();
    assert!(!ready(&state));
    assert_eq!(local(&state), 0);
}

#[test]
fn a_lost_launcher_changes_nothing_and_a_goodbye_does() {
    let mut state = state();
    serve(&mut state);
    on_sidecar(&mut state, 1, SidecarEvent::Lost).unwrap();
    assert!(ready(&state));
    on_sidecar(&mut state, 2, SidecarEvent::Hello(sidecar("cart"))).unwrap();
    assert!(ready(&state), "the same workload again keeps what was known");
    on_sidecar(&mut state, 2, SidecarEvent::Goodbye).unwrap();
    assert!(!ready(&state));
    assert_eq!(state.view().sidecars.len(), 1);
}

#[test]
fn a_connected_sidecars_name_cannot_be_taken_by_another_identity() {
    let mut state = state();
    serve(&mut state);
    let refused = on_sidecar(&mut state, 2, SidecarEvent::Hello(sidecar("thief")));
    assert!(matches!(refused, Err(Refusal::NameTaken { .. })));
    on_sidecar(&mut state, 1, SidecarEvent::Lost).unwrap();
    on_sidecar(&mut state, 3, SidecarEvent::Hello(sidecar("thief"))).unwrap();
    assert!(!ready(&state));
}

#[test]
fn an_older_session_does_not_override_a_newer_one() {
    let mut state = state();
    serve(&mut state);
    on_sidecar(&mut state, 5, SidecarEvent::Hello(sidecar("cart"))).unwrap();
    on_sidecar(&mut state, 1, SidecarEvent::Goodbye).unwrap();
    assert!(ready(&state));
}

#[test]
fn a_restart_begins_with_everything_it_knew() {
    let mut before = state();
    serve(&mut before);
    on_gateway(&mut before, "gateway-1", 1, GatewayEvent::Hello(gateway("gateway-1")), NOW);
    on_gateway(&mut before, "gateway-1", 1, report(2, true), NOW);
    let bytes = serde_json::to_vec(before.members()).unwrap();
    let members = serde_json::from_slice(&bytes).unwrap();
    let after = State::new(own(), global(), manifests(), members, at(5));
    assert_eq!(after.view().gateways, before.view().gateways);
    assert_eq!(after.view().sidecars, before.view().sidecars);
    assert!(ready(&after));
    assert_eq!(west(&after), west(&before));
    assert_eq!(after.intent(), before.intent());
}

#[test]
fn a_gateway_that_breaks_off_stays_and_one_that_says_goodbye_drains_until_it_returns() {
    let mut state = state();
    let draining = |state: &State| state.view().gateways["gateway-1"].draining;
    on_gateway(&mut state, "gateway-1", 1, GatewayEvent::Hello(gateway("gateway-1")), NOW);
    on_gateway(&mut state, "gateway-1", 1, GatewayEvent::Lost, NOW);
    assert!(!draining(&state));
    on_gateway(&mut state, "gateway-1", 2, GatewayEvent::Hello(gateway("gateway-1")), NOW);
    on_gateway(&mut state, "gateway-1", 2, GatewayEvent::Goodbye, NOW);
    assert!(draining(&state));
    assert_eq!(state.intent().unwrap().gateways.len(), 1, "peers learn of drains through the tunnel");
    on_gateway(&mut state, "gateway-1", 3, GatewayEvent::Hello(gateway("gateway-1")), NOW);
    assert!(!draining(&state));
    on_gateway(&mut state, "gateway-1", 3, GatewayEvent::Draining, NOW);
    assert!(draining(&state));
}

#[test]
fn a_gateway_that_is_not_connected_for_a_day_is_forgotten_whether_it_said_goodbye_or_crashed() {
    for end in [GatewayEvent::Lost, GatewayEvent::Goodbye] {
        let mut state = state();
        for (name, session) in [("gateway-1", 1), ("gateway-2", 2)] {
            on_gateway(&mut state, name, session, GatewayEvent::Hello(gateway(name)), NOW);
        }
        on_gateway(&mut state, "gateway-1", 1, end, NOW);
        state.tick(at(23 * 3600));
        assert_eq!(state.view().gateways.len(), 2, "it may come back");
        state.tick(at(25 * 3600));
        assert_eq!(state.view().gateways.keys().collect::<Vec<_>>(), ["gateway-2"]);
        assert_eq!(state.intent().unwrap().gateways.len(), 1);
    }
}

#[test]
fn what_a_dead_gateway_said_gives_way_to_the_living_after_a_while() {
    let mut state = state();
    for (name, session) in [("gateway-1", 1), ("gateway-2", 2)] {
        on_gateway(&mut state, name, session, GatewayEvent::Hello(gateway(name)), NOW);
    }
    on_gateway(&mut state, "gateway-1", 1, report(2, true), NOW);
    on_gateway(&mut state, "gateway-2", 2, report(0, true), NOW);
    on_gateway(&mut state, "gateway-1", 1, GatewayEvent::Lost, NOW);
    assert_eq!(west(&state).unwrap().ready, 2);
    assert_eq!(state.next_change(NOW), Some(at(10)));
    state.tick(at(10));
    assert_eq!(west(&state).unwrap().ready, 0);
}

#[test]
fn a_recovery_is_looked_at_again_when_its_hold_down_ends() {
    let mut state = state();
    on_gateway(&mut state, "gateway-1", 1, GatewayEvent::Hello(gateway("gateway-1")), NOW);
    on_gateway(&mut state, "gateway-1", 1, report(2, true), NOW);
    on_gateway(&mut state, "gateway-1", 1, report(0, true), at(1));
    on_gateway(&mut state, "gateway-1", 1, report(2, true), at(2));
    let hold_down = global().settings.failover.hold_down;
    assert_eq!(state.next_change(at(2)), Some(at(2) + hold_down));
    assert_eq!(state.next_change(at(2) + hold_down), None);
    assert_eq!(state.next_change(Timestamp(0)), None, "the clock was set back: nothing is held down");
}

#[test]
fn only_exporters_are_observed_and_a_withdrawn_export_is_forgotten() {
    let mut state = state();
    on_gateway(&mut state, "gateway-1", 1, GatewayEvent::Hello(gateway("gateway-1")), NOW);
    on_gateway(&mut state, "gateway-1", 1, report(2, true), NOW);
    assert!(west(&state).is_some());
    let mut without = (*global()).clone();
    without.services.clear();
    state.apply(Event::Global(Arc::new(without)), NOW).unwrap();
    assert_eq!(west(&state), None);
    state.apply(Event::Global(global()), NOW).unwrap();
    assert!(west(&state).is_some(), "the report still stands");
}

#[test]
fn a_sidecar_not_heard_of_for_a_day_is_forgotten() {
    let mut state = state();
    serve(&mut state);
    state.tick(at(25 * 3600));
    assert_eq!(state.view().sidecars.len(), 1, "connected ones stay");
    on_sidecar(&mut state, 1, SidecarEvent::Lost).unwrap();
    state.tick(at(23 * 3600));
    assert_eq!(state.view().sidecars.len(), 1);
    state.tick(at(25 * 3600));
    assert_eq!(state.view().sidecars.len(), 0);
}

#[test]
fn a_sidecar_is_remembered_for_as_long_as_its_certificate_may_live() {
    let day = Duration::from_secs(24 * 3600);
    let own = Own { workload_lifetime: 7 * day, ..own() };
    let mut state = State::new(own, global(), manifests(), Members::default(), NOW);
    serve(&mut state);
    on_sidecar(&mut state, 1, SidecarEvent::Lost).unwrap();
    state.tick(NOW + 6 * day);
    assert_eq!(state.view().sidecars.len(), 1);
    state.tick(NOW + 7 * day);
    assert_eq!(state.view().sidecars.len(), 0);
}

#[test]
fn what_was_never_read_is_neither_known_nor_forgotten() {
    let mut before = state();
    serve(&mut before);
    let unread = Arc::new(Manifests::default());
    let mut after = State::new(own(), global(), unread, before.members().clone(), at(5));
    assert!(!after.view().objects_known);
    assert_eq!(after.members().first_seen, before.members().first_seen);
    assert_eq!(after.members().observations, before.members().observations);
    after.apply(Event::Manifests(manifests()), at(6)).unwrap();
    assert!(after.view().objects_known);
    assert_eq!(after.intent(), before.intent());
    let none = Arc::new(Manifests { synced: true, ..Manifests::default() });
    after.apply(Event::Manifests(none), at(7)).unwrap();
    assert!(after.view().objects_known, "a folder without objects is known too");
    assert!(after.members().first_seen.is_empty());
}
