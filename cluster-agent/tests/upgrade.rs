//! A gateway's successor beside it: two feeds of one name at the agent in process, and what an Envoy is told meanwhile.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::{collections::BTreeSet, time::Duration};

use isthmus_api::proto::{
    common::v1 as common,
    local::v1::{Draining, gateway_message, local_client::LocalClient},
};
use isthmus_identity::ca::CertificateAuthority;
use isthmus_model::{
    global::{ClusterInfo, Exporter, GlobalPort, GlobalService, GlobalSnapshot},
    ids::{ClusterIndex, VipIndex},
    service::{AppProtocol, GatewayAddress, ServiceKind, ServicePort},
    time::Timestamp,
};
use support::{
    ControlPlane,
    clients::{Gateway, cart, gateway, joined, sidecar_of},
    enrol, enrol_channel,
    envoy::Envoy,
    eventually, stamp,
};

/// What us-west exports: shop/`name`s, port 80.
fn with_west(control: &ControlPlane, revision: u64, names: &[&str]) -> GlobalSnapshot {
    let mut global = control.snapshot(revision);
    let ca = CertificateAuthority::create(&"us-west.example".parse().unwrap(), Duration::from_secs(3600)).unwrap();
    let east = global.clusters.values().next().unwrap().clone();
    let west = ClusterInfo {
        name: "us-west".parse().unwrap(),
        index: ClusterIndex(2),
        bundle: ca.bundle(),
        gateways: vec![GatewayAddress { name: "gateway-1".to_owned(), tunnel: None }],
        ..east
    };
    for (index, name) in (1..).zip(names) {
        let port = ServicePort { name: "http".parse().unwrap(), number: 80, protocol: AppProtocol::Http };
        let identities = BTreeSet::from([format!("spiffe://us-west.example/ns/shop/sa/{name}").parse().unwrap()]);
        let service = GlobalService {
            name: format!("shop/{name}").parse().unwrap(),
            index: VipIndex(index),
            kind: ServiceKind::ClusterSetIp,
            ports: vec![GlobalPort { port, clusters: [west.name.clone()].into() }],
            exporters: [(west.name.clone(), Exporter { created_at: Timestamp(1), identities })].into(),
            conflicts: Vec::new(),
        };
        global.services.insert(service.name.clone(), service.into());
    }
    global.clusters.insert(west.name.clone(), west);
    global
}

fn to(cluster: &str, addresses: &[&str]) -> (String, Vec<String>) {
    (cluster.to_owned(), addresses.iter().map(|a| (*a).to_owned()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateways_successor_takes_over_without_any_word_to_envoy_and_its_own_drain_leaves_envoy_first() {
    let (control, home, agent) = joined().await;
    control.state.send_replace(Some(with_west(&control, 2, &["catalog"])));
    let (mut client, _) = enrol(&home.mint(gateway()).await).await.unwrap();
    let old = Gateway::connect_as(&mut client, "1-1").await;
    old.say(gateway_message::Kind::Applied(common::Stamp { epoch: 1, revision: 2 })).await;
    let (channel, _) = enrol_channel(&home.mint(cart()).await).await.unwrap();
    let _sidecar = sidecar_of(&mut LocalClient::new(channel.clone()), &["shop/catalog", "shop/news"]).await;
    eventually("all is known", async || {
        let view = agent.get("/debug/view").await;
        ["cart-1", "gateway-1", "shop/catalog"].iter().all(|name| view.contains(name))
    })
    .await;
    let mut envoy = Envoy::connect(channel).await;
    let catalog = "outbound|80|shop/catalog";
    assert_eq!(envoy.endpoints().await, [to(catalog, &["127.1.1.11:15502"])]);

    let successor = Gateway::connect_as(&mut client, "2-2").await;
    let applied = |revision| {
        let seen = control.seen.lock().unwrap();
        let gateway = seen.status.consumers.iter().find(|c| c.name == "gateway-1");
        gateway.is_some_and(|g| g.connected && g.applied == Some(stamp(revision)))
    };
    successor.say(gateway_message::Kind::Applied(common::Stamp { epoch: 1, revision: 3 })).await;
    eventually("the successor's word counts", async || applied(3)).await;
    old.say(gateway_message::Kind::Applied(common::Stamp { epoch: 1, revision: 2 })).await;
    old.say(gateway_message::Kind::Draining(Draining {})).await;
    old.leave().await;

    // What comes next is the news alone: nothing was said of the catalog meanwhile.
    control.state.send_replace(Some(with_west(&control, 4, &["catalog", "news"])));
    assert_eq!(envoy.endpoints().await, [to("outbound|80|shop/news", &["127.1.1.11:15502"])]);
    assert!(applied(3), "the old one's acknowledgement does not count");
    assert!(agent.get("/debug/view").await.contains("\"draining\":false"));

    successor.say(gateway_message::Kind::Draining(Draining {})).await;
    let mut left = BTreeSet::new();
    while left.len() < 2 {
        left.extend(envoy.endpoints().await);
    }
    assert_eq!(left, [to(catalog, &[]), to("outbound|80|shop/news", &[])].into());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_gateway_leaves_envoys_endpoints_while_it_still_runs_and_the_other_stays() {
    let (control, home, agent) = joined().await;
    control.state.send_replace(Some(with_west(&control, 2, &["catalog"])));
    let (mut client, _) = enrol(&home.mint(gateway()).await).await.unwrap();
    let first = Gateway::connect_number(&mut client, 1, "1-1").await;
    let second = Gateway::connect_number(&mut client, 2, "1-1").await;
    let (channel, _) = enrol_channel(&home.mint(cart()).await).await.unwrap();
    let _sidecar = sidecar_of(&mut LocalClient::new(channel.clone()), &["shop/catalog"]).await;
    eventually("all is known", async || {
        let view = agent.get("/debug/view").await;
        ["cart-1", "gateway-1", "gateway-2", "shop/catalog"].iter().all(|name| view.contains(name))
    })
    .await;
    let mut envoy = Envoy::connect(channel).await;
    let catalog = "outbound|80|shop/catalog";
    assert_eq!(envoy.endpoints().await, [to(catalog, &["127.1.1.11:15502", "127.1.1.12:15502"])]);
    first.say(gateway_message::Kind::Draining(Draining {})).await;
    assert_eq!(envoy.endpoints().await, [to(catalog, &["127.1.1.12:15502"])]);
    // Its end, once it has finished what it carries, changes nothing more; its return does.
    first.leave().await;
    let _first = Gateway::connect_number(&mut client, 1, "2-2").await;
    assert_eq!(envoy.endpoints().await, [to(catalog, &["127.1.1.11:15502", "127.1.1.12:15502"])]);
    drop(second);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_fails_gives_the_name_back_to_its_predecessor() {
    let (control, home, agent) = joined().await;
    let (mut client, _) = enrol(&home.mint(gateway()).await).await.unwrap();
    let old = Gateway::connect_as(&mut client, "1-1").await;
    old.say(gateway_message::Kind::Applied(common::Stamp { epoch: 1, revision: 1 })).await;
    eventually("the gateway is known", async || agent.get("/debug/view").await.contains("gateway-1")).await;
    Gateway::connect_as(&mut client, "2-2").await.leave().await;
    let view = agent.get("/debug/view").await;
    assert!(view.contains("\"draining\":false"), "{view}");
    let connected =
        || control.seen.lock().unwrap().status.consumers.iter().any(|c| c.name == "gateway-1" && c.connected);
    eventually("it is reported as connected", async || connected()).await;
    old.leave().await;
    assert!(agent.get("/debug/view").await.contains("\"draining\":true"));
    agent.stop().await;
}
