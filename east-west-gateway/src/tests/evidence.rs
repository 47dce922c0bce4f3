//! What gateways learn of each other: availability, ejection and return, death, revocation, strangers.

use std::time::{Duration, Instant};

use isthmus_model::global::ClusterState;
use tokio::io::AsyncReadExt;

use super::rig::{Gateway, Server, introduce, knock, linked, linked_with, next, over_both, read, refusing, sni, until};
use crate::config::LinkTransport;
use crate::testkit::{cluster, federation};

over_both!(
    a_change_of_endpoints_is_seen_by_the_peer,
    an_endpoint_that_refuses_leaves_the_peers_candidates_and_comes_back_when_it_answers,
    a_killed_gateway_is_unreachable_within_a_second_and_its_successor_is_found,
    a_revoked_clusters_streams_are_closed_within_a_second_in_both_directions,
    a_gateway_of_an_unknown_cluster_gets_no_tunnel,
    before_the_first_snapshot_nobody_is_served,
);

async fn a_change_of_endpoints_is_seen_by_the_peer(over: LinkTransport) {
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[west])]).await;
    gateways[1].set_endpoints(&[]);
    until("west has no endpoints", || gateways[0].eligibility("west").as_deref() == Some("noEndpoints")).await;
    gateways[1].set_endpoints(&[west]);
    until("west recovers", || gateways[0].eligibility("west").as_deref() == Some("holdDown")).await;
}

async fn an_endpoint_that_refuses_leaves_the_peers_candidates_and_comes_back_when_it_answers(over: LinkTransport) {
    let address = refusing().await;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[address])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert!(client.read(&mut [0; 1]).await.is_err(), "there is nowhere else to go");
    until("west has no endpoints", || gateways[0].eligibility("west").as_deref() == Some("noEndpoints")).await;
    let _server = Server::at(address).await;
    until("west is back", || gateways[0].eligibility("west").as_deref() == Some("holdDown")).await;
}

async fn a_killed_gateway_is_unreachable_within_a_second_and_its_successor_is_found(over: LinkTransport) {
    let west = Server::bind().await.echo(b"west");
    let by_default = |config: &mut crate::Config| {
        config.tunnel.transport = over;
        config.tunnel.dead_after = crate::config::TunnelConfig::default().dead_after;
    };
    let (mut gateways, global) = linked_with(by_default, &[("east", &[]), ("west", &[west])]).await;
    let died = Instant::now();
    let address = gateways[1].tunnel;
    gateways[1].kill();
    until("west is unreachable", || gateways[0].eligibility("west").as_deref() == Some("unreachable")).await;
    assert!(died.elapsed() < Duration::from_secs(1), "{:?}", died.elapsed());
    let free = || std::net::UdpSocket::bind(address).is_ok();
    until("the dead gateway's port is free", free).await;
    let successor = Gateway::start_with("west", |config| {
        config.tunnel.transport = over;
        config.listen.tunnel = address;
    })
    .await;
    successor.set_endpoints(&[west]);
    successor.set_global(&global);
    until("west is back", || gateways[0].eligibility("west").as_deref() == Some("holdDown")).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
}

async fn a_revoked_clusters_streams_are_closed_within_a_second_in_both_directions(over: LinkTransport) {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let (gateways, global) = linked(over, &[("east", &[east.address]), ("west", &[west.address])]).await;
    let pinned = |i: usize, name: &str| gateways[i].inspector.pinned()[&cluster(name)];
    let mut outward = knock(pinned(0, "west"), &sni(Some("west"))).await;
    let _a = west.greet(b"hi").await;
    read(&mut outward, 2).await;
    let mut inward = knock(pinned(1, "east"), &sni(Some("east"))).await;
    let _b = east.greet(b"hi").await;
    read(&mut inward, 2).await;

    let mut revoked = next(&global);
    revoked.clusters.get_mut(&cluster("west")).unwrap().state = ClusterState::Revoked;
    // West itself has not heard of it: it is east that must act.
    gateways[0].set_global(&revoked);
    let since = Instant::now();
    assert!(outward.read(&mut [0; 1]).await.is_err());
    assert!(inward.read(&mut [0; 1]).await.is_err());
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    until("the pinned port is gone", || gateways[0].inspector.pinned().is_empty()).await;
    // West goes on dialling and is turned away.
    let core = gateways[0].core().await;
    until("west is turned away", || core.metrics.rejected("peer_not_a_member") > 0).await;
    assert!(gateways[0].inspector.tunnels().is_empty());
}

async fn a_gateway_of_an_unknown_cluster_gets_no_tunnel(over: LinkTransport) {
    let (gateways, global) = linked(over, &[("east", &[])]).await;
    // Mallory has a certificate of the federation, but its cluster is not in the state.
    let mallory = Gateway::start_over(over, "mallory").await;
    let mut dreamt = global;
    dreamt.clusters.extend(federation(&["mallory"]).clusters);
    mallory.set_global(&dreamt);
    let core = gateways[0].core().await;
    until("mallory is turned away", || core.metrics.rejected("peer_not_a_member") > 1).await;
    until("mallory finds nobody", || mallory.eligibility("east").as_deref() == Some("unreachable")).await;
}

async fn before_the_first_snapshot_nobody_is_served(over: LinkTransport) {
    let east = Gateway::start_over(over, "east").await;
    let west = Gateway::start_over(over, "west").await;
    let gateways = [east, west];
    let global = introduce(&gateways, &[("east", &[]), ("west", &[])]);
    gateways[0].set_global(&global);
    let core = gateways[1].core().await;
    until("east is turned away", || core.metrics.rejected("peer_not_a_member") > 0).await;
    gateways[1].set_global(&global);
    until("east gets through", || gateways[0].inspector.tunnels().iter().all(|t| t.up)).await;
}

#[tokio::test]
async fn an_endpoint_that_dies_while_no_traffic_tells_of_it_leaves_the_peers_candidates() {
    let server = Server::bind().await;
    let address = server.address;
    let looking = |config: &mut crate::Config| config.egress.health_interval = Duration::from_millis(200);
    let (gateways, _) = super::rig::linked_with(looking, &[("east", &[]), ("west", &[address])]).await;
    drop(server);
    until("west has no endpoints", || gateways[0].eligibility("west").as_deref() == Some("noEndpoints")).await;
    let _server = Server::at(address).await;
    until("west is back", || gateways[0].eligibility("west").as_deref() == Some("holdDown")).await;
}
