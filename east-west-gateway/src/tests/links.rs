//! What links go through: NAT, moves, blocked UDP, new certificates, slow readers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use isthmus_model::{
    global::{GlobalService, GlobalSnapshot},
    ids::{ServiceName, VipIndex},
    local::Transport,
    service::GatewayAddress,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    relay::Relay,
    rig::{Gateway, Server, introduce, knock, linked, next, over_both, read, sni, svid, until},
};
use crate::{config::LinkTransport, testkit::cluster, tunnel::Close};

over_both!(
    a_link_that_was_refused_leaves_nothing_behind,
    a_link_that_is_given_up_is_no_broken_one_to_the_peer,
    a_link_that_was_replaced_finishes_what_the_peer_carries_on_it,
    a_gateway_that_cannot_be_dialled_is_reached_through_the_link_it_made,
    a_renewed_certificate_is_shown_on_a_new_link_and_the_old_one_finishes_what_it_carries,
    a_peer_that_moves_is_linked_anew_and_the_old_link_finishes_what_it_carries,
    slow_readers_stall_nobody_else,
    a_client_that_resets_while_nobody_takes_its_bytes_ends_both_halves,
    whatever_comes_over_a_link_counts_as_a_sign_of_life,
    steady_downloads_over_one_link_all_arrive,
    more_bulk_than_the_windows_hold_delays_neither_probes_nor_new_connections,
    a_link_that_has_ended_is_not_chosen_again,
    two_gateways_that_have_much_to_say_hear_each_other,
);

/// East and west, where `dialled` says at which address the other one finds each; `None`: not at all.
async fn pair(
    over: LinkTransport,
    endpoints: [&Server; 2],
    dialled: impl AsyncFn([&Gateway; 2]) -> [Option<std::net::SocketAddr>; 2],
) -> (Vec<Gateway>, GlobalSnapshot) {
    let gateways = vec![Gateway::start_over(over, "east").await, Gateway::start_over(over, "west").await];
    let [east, west] = endpoints.map(|server| [server.address]);
    let mut global = introduce(&gateways, &[("east", &east), ("west", &west)]);
    let addresses = dialled([&gateways[0], &gateways[1]]).await;
    for (name, tunnel) in ["east", "west"].into_iter().zip(addresses) {
        let address = GatewayAddress { name: "gateway-1".to_owned(), tunnel };
        global.clusters.get_mut(&cluster(name)).unwrap().gateways = vec![address];
    }
    for (gateway, endpoints) in gateways.iter().zip([east, west]) {
        gateway.set_endpoints(&endpoints);
        gateway.set_global(&global);
    }
    (gateways, global)
}

/// A connection from `from` pinned to `to`, carried end to end.
async fn carried(from: &Gateway, to: &str, server: &Server) -> (TcpStream, TcpStream) {
    let pinned = from.inspector.pinned()[&cluster(to)];
    let name = sni(Some(to));
    let (mut client, served) = tokio::join!(knock(pinned, &name), server.greet(b"hi"));
    assert_eq!(read(&mut client, 2).await, b"hi");
    (client, served)
}

async fn exchange(client: &mut TcpStream, served: &mut TcpStream, word: &[u8]) {
    client.write_all(word).await.unwrap();
    assert_eq!(read(served, word.len()).await, word);
    served.write_all(word).await.unwrap();
    assert_eq!(read(client, word.len()).await, word);
}

async fn a_gateway_that_cannot_be_dialled_is_reached_through_the_link_it_made(over: LinkTransport) {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let (gateways, _) = pair(over, [&east, &west], async |[_, w]| [None, Some(w.tunnel)]).await;
    gateways[0].sees_ready("west").await;
    gateways[1].sees_ready("east").await;
    for _ in 0..3 {
        let (mut client, mut served) = carried(&gateways[1], "east", &east).await;
        exchange(&mut client, &mut served, b"inward").await;
        let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
        exchange(&mut client, &mut served, b"outward").await;
    }
    let tunnels = gateways[1].inspector.tunnels();
    assert!(tunnels.iter().all(|t| t.address.is_none() && t.accepted == t.links), "{tunnels:?}");
}

#[tokio::test]
async fn streams_survive_a_nat_that_forgets_and_a_move_of_the_peer() {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let relay = tokio::sync::OnceCell::new();
    let (gateways, _) = pair(LinkTransport::Quic, [&east, &west], async |[_, w]| {
        let relay = relay.get_or_init(|| Relay::before(w.tunnel)).await;
        [None, Some(relay.address)]
    })
    .await;
    gateways[0].sees_ready("west").await;
    let relay = relay.get().unwrap();
    let (mut outward, mut outward_served) = carried(&gateways[0], "west", &west).await;
    let (mut inward, mut inward_served) = carried(&gateways[1], "east", &east).await;
    let core = gateways[1].core().await;
    let seen = || core.registry.remotes(&cluster("east"));
    for _ in 0..3 {
        let before = seen();
        relay.rebind();
        exchange(&mut outward, &mut outward_served, b"before and after").await;
        exchange(&mut inward, &mut inward_served, b"the other way").await;
        until("west sees where east is now", || seen() != before).await;
    }
    assert_eq!(gateways[0].core().await.metrics.rejected("peer_dead"), 0);
    assert_eq!(core.metrics.rejected("peer_dead"), 0, "one and the same link");
}

#[tokio::test]
async fn tcp_stands_in_for_blocked_udp_only_where_the_link_says_auto_and_only_as_long() {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let relay = tokio::sync::OnceCell::new();
    let blocked = async |[_, w]: [&Gateway; 2]| {
        let relay = relay
            .get_or_init(async || {
                let relay = Relay::before(w.tunnel).await;
                relay.block_udp(true);
                relay
            })
            .await;
        [None, Some(relay.address)]
    };
    let (gateways, _) = pair(LinkTransport::Auto, [&east, &west], blocked).await;
    gateways[0].sees_ready("west").await;
    let tunnel = || gateways[0].inspector.tunnels().remove(0);
    let shown = tunnel();
    assert_eq!((shown.transport, shown.downgraded), (Transport::Tcp, true));
    let (mut old, mut old_served) = carried(&gateways[0], "west", &west).await;

    relay.get().unwrap().block_udp(false);
    until("QUIC is back", || tunnel().transport == Transport::Quic && !tunnel().downgraded).await;
    exchange(&mut old, &mut old_served, b"begun over TCP").await;
    let (mut new, mut new_served) = carried(&gateways[0], "west", &west).await;
    exchange(&mut new, &mut new_served, b"over QUIC").await;
    assert_eq!(gateways[0].core().await.registry.downgraded(&cluster("west")), 0);
    drop((old, old_served));
    until("the TCP link is given up", || tunnel().links == 1).await;

    // Blocked again while it is up: the link dies, and TCP stands in once more.
    relay.get().unwrap().block_udp(true);
    until("TCP stands in again", || tunnel().downgraded).await;
    let (mut again, mut again_served) = carried(&gateways[0], "west", &west).await;
    exchange(&mut again, &mut again_served, b"over TCP").await;
}

#[tokio::test]
async fn a_link_that_says_quic_is_not_made_over_tcp_by_whoever_blocks_udp() {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let relay = tokio::sync::OnceCell::new();
    let (gateways, _) = pair(LinkTransport::Quic, [&east, &west], async |[_, w]: [&Gateway; 2]| {
        let relay = relay.get_or_init(|| Relay::before(w.tunnel)).await;
        relay.block_udp(true);
        [None, Some(relay.address)]
    })
    .await;
    until("east gives up", || gateways[0].eligibility("west").as_deref() == Some("unreachable")).await;
    assert!(!gateways[0].inspector.tunnels().remove(0).up);
}

#[tokio::test]
async fn a_peer_is_linked_by_as_many_quic_connections_as_are_configured_and_all_carry() {
    let west = Server::bind().await;
    let three = |config: &mut crate::Config| config.tunnel.connections_per_peer = 3;
    let (gateways, _) = super::rig::linked_with(three, &[("east", &[]), ("west", &[west.address])]).await;
    let core = gateways[0].core().await;
    let links = || core.registry.own_links(&cluster("west"));
    until("all links are up", || links().len() == 3).await;
    let mut carried_now = Vec::new();
    for _ in 0..12 {
        let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
        exchange(&mut client, &mut served, b"over one of three").await;
        carried_now.push((client, served));
    }
    let streams = core.registry.open_streams(&cluster("west"));
    assert_eq!(streams.iter().sum::<usize>(), 12);
    assert!(streams.iter().all(|open| *open > 0), "each takes its part: {streams:?}");
}

#[tokio::test]
async fn every_congestion_controller_carries_bulk() {
    use crate::config::Congestion;

    for congestion in [Congestion::Tolerant, Congestion::Cubic, Congestion::Bbr, Congestion::NewReno] {
        let west = Server::bind().await;
        let with = |config: &mut crate::Config| config.tunnel.congestion = congestion;
        let (gateways, _) = super::rig::linked_with(with, &[("east", &[]), ("west", &[west.address])]).await;
        let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
        let sent: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 251) as u8).collect();
        let (taken, ()) = tokio::join!(read(&mut client, sent.len()), async {
            served.write_all(&sent).await.unwrap();
        });
        assert!(taken == sent, "{congestion:?}");
    }
}

#[tokio::test]
async fn tcp_connections_that_hang_delay_streams_but_fail_none() {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let relay = tokio::sync::OnceCell::new();
    let (gateways, _) = pair(LinkTransport::Tcp, [&east, &west], async |[_, w]: [&Gateway; 2]| {
        let relay = relay.get_or_init(|| Relay::before(w.tunnel)).await;
        [None, Some(relay.address)]
    })
    .await;
    gateways[0].sees_ready("west").await;
    let relay = relay.get().unwrap();
    let all = |n| futures_util::future::join_all((0..n).map(|_| carried(&gateways[0], "west", &west)));
    let core = gateways[0].core().await;
    let silent = || core.metrics.attempted(&cluster("west"), "silent");
    // The first one is the link's control connection, the second a warm one.
    relay.stall_tcp(|nth| nth == 1);
    all(4).await;
    let before = silent();
    assert!(before <= 1, "that stream took another connection of the same link");
    // And every other one that is dialled from now on.
    let made = relay.tcp_connections();
    relay.stall_tcp(move |nth| nth >= made && nth % 2 == 0);
    all(16).await;
    assert_eq!(silent(), before, "what waited for a dial took what another one became");
}

async fn a_renewed_certificate_is_shown_on_a_new_link_and_the_old_one_finishes_what_it_carries(over: LinkTransport) {
    let west = Server::bind().await;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[west.address])]).await;
    let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
    let core = gateways[0].core().await;
    let before = core.registry.own_links(&cluster("west"));
    core.identity.source.set(svid("east"));
    until("there is a new link", || core.registry.own_links(&cluster("west")).iter().any(|id| !before.contains(id)))
        .await;
    exchange(&mut client, &mut served, b"still here").await;
    let (mut new, mut new_served) = carried(&gateways[0], "west", &west).await;
    exchange(&mut new, &mut new_served, b"here too").await;
    drop((client, served));
    let gone = || core.registry.own_links(&cluster("west")).iter().all(|id| !before.contains(id));
    until("the old link is given up", gone).await;
    exchange(&mut new, &mut new_served, b"as before").await;
}

async fn a_peer_that_moves_is_linked_anew_and_the_old_link_finishes_what_it_carries(over: LinkTransport) {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let relays = tokio::sync::OnceCell::new();
    let (gateways, global) = pair(over, [&east, &west], async |[_, w]| {
        let both = async || [Relay::before(w.tunnel).await, Relay::before(w.tunnel).await];
        [None, Some(relays.get_or_init(both).await[0].address)]
    })
    .await;
    gateways[0].sees_ready("west").await;
    gateways[1].sees_ready("east").await;
    let core = gateways[0].core().await;
    let links = || core.registry.own_links(&cluster("west"));
    let before = links();
    // One each way, all on the link that east has made.
    let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
    let (mut inward, mut inward_served) = carried(&gateways[1], "east", &east).await;

    let mut moved = next(&global);
    let address = relays.get().unwrap()[1].address;
    moved.clusters.get_mut(&cluster("west")).unwrap().gateways[0].tunnel = Some(address);
    gateways[0].set_global(&moved);
    until("there is a new link", || links().iter().any(|id| !before.contains(id))).await;
    assert_eq!(gateways[0].inspector.tunnels()[0].address, Some(address));
    exchange(&mut client, &mut served, b"still here").await;
    exchange(&mut inward, &mut inward_served, b"the other way").await;
    let (mut new, mut new_served) = carried(&gateways[0], "west", &west).await;
    drop((client, served));
    let west_core = gateways[1].core().await;
    let draining = || west_core.registry.infos().iter().any(|t| t.links == 2 && !t.draining);
    until("west knows both links", draining).await;
    // For longer than an idle one is kept.
    let since = std::time::Instant::now();
    while since.elapsed() < Duration::from_millis(2_500) {
        exchange(&mut inward, &mut inward_served, b"until it ends").await;
    }
    assert!(links().iter().any(|id| before.contains(id)), "it carries the other way");
    drop((inward, inward_served));
    until("the old link is given up", || links().iter().all(|id| !before.contains(id))).await;
    exchange(&mut new, &mut new_served, b"as before").await;
    assert_eq!(core.metrics.rejected("peer_dead"), 0);
}

#[tokio::test]
async fn a_certificate_renewed_during_a_handshake_is_shown_on_the_next_link() {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let relay = tokio::sync::OnceCell::new();
    let (gateways, _) = pair(LinkTransport::Quic, [&east, &west], async |[_, w]| {
        let relay = relay.get_or_init(|| Relay::before(w.tunnel)).await;
        relay.hold_at_certificate(true);
        [None, Some(relay.address)]
    })
    .await;
    let relay = relay.get().unwrap();
    until("east has shown its certificate", || relay.holds()).await;
    let renewed = svid("east");
    let leaf = renewed.chain()[0].clone();
    gateways[0].core().await.identity.source.set(renewed);
    assert!(gateways[0].inspector.tunnels().iter().all(|t| !t.up), "the handshake is under way");
    relay.hold_at_certificate(false);
    let core = gateways[1].core().await;
    let shown = || core.registry.pick(&cluster("east"), &[]).and_then(|tunnel| tunnel.link.leaf());
    until("the link is up", || shown().is_some()).await;
    until("west has seen the new certificate", || shown().as_ref() == Some(&leaf)).await;
}

#[tokio::test]
async fn small_datagrams_go_twice_where_the_path_loses_some_and_nowhere_else() {
    let (east, west) = (Server::bind().await, Server::bind().await);
    let relay = tokio::sync::OnceCell::new();
    let through = async |[_, w]: [&Gateway; 2]| {
        let relay = relay.get_or_init(|| Relay::before(w.tunnel)).await;
        [None, Some(relay.address)]
    };
    let (gateways, _) = pair(LinkTransport::Quic, [&east, &west], through).await;
    gateways[0].sees_ready("west").await;
    let relay = relay.get().unwrap();
    let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
    for _ in 0..100 {
        exchange(&mut client, &mut served, b"a path that loses nothing").await;
    }
    assert_eq!(relay.copies(), (0, 0));

    relay.lose_one_in(10);
    for n in 0.. {
        exchange(&mut client, &mut served, b"a path that loses some").await;
        if relay.copies().0 >= 100 {
            break;
        }
        assert!(n < 5_000, "{:?}", gateways[0].inspector.tunnels());
    }
    // Bulk is not: what follows a lost packet reveals the loss at once.
    let bulk = vec![7; 4_000_000];
    let (sent, received) = tokio::join!(client.write_all(&bulk), read(&mut served, bulk.len()));
    sent.unwrap();
    assert!(received == bulk);
    let (_, largest) = relay.copies();
    assert!(largest <= 1_200, "{largest}");
}

#[tokio::test]
async fn nothing_goes_twice_where_redundancy_is_turned_off() {
    let west = Server::bind().await;
    let plain = |config: &mut crate::Config| config.tunnel.redundancy = false;
    let gateways = [Gateway::start_with("east", plain).await, Gateway::start("west").await];
    let relay = Relay::before(gateways[1].tunnel).await;
    let mut global = introduce(&gateways, &[("east", &[]), ("west", &[west.address])]);
    global.clusters.get_mut(&cluster("east")).unwrap().gateways.clear();
    global.clusters.get_mut(&cluster("west")).unwrap().gateways =
        vec![GatewayAddress { name: "gateway-1".to_owned(), tunnel: Some(relay.address) }];
    gateways[1].set_endpoints(&[west.address]);
    gateways.iter().for_each(|gateway| gateway.set_global(&global));
    gateways[0].sees_ready("west").await;
    let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
    relay.lose_one_in(10);
    let lost = || gateways[0].inspector.tunnels()[0].packets_lost;
    for n in 0.. {
        exchange(&mut client, &mut served, b"a path that loses some").await;
        assert_eq!(relay.copies(), (0, 0));
        if lost() >= 10 {
            break;
        }
        assert!(n < 5_000, "{:?}", gateways[0].inspector.tunnels());
    }
}

async fn a_link_that_was_refused_leaves_nothing_behind(over: LinkTransport) {
    let mut gateways = [Gateway::start_over(over, "east").await, Gateway::start_over(over, "west").await];
    let global = introduce(&gateways, &[("east", &[]), ("west", &[])]);
    gateways[0].set_global(&global);
    // West knows nobody yet.
    let core = gateways[1].core().await;
    until("east is turned away", || core.metrics.rejected("peer_not_a_member") > 1).await;
    gateways[0].drain();
    // What goes on although nobody needs it is waited for until the drain's deadline, and then some.
    tokio::time::timeout(Duration::from_secs(4), gateways[0].ended()).await.expect("it ends when it is done");
}

async fn a_link_that_is_given_up_is_no_broken_one_to_the_peer(over: LinkTransport) {
    let west = Server::bind().await;
    let (gateways, global) = linked(over, &[("east", &[]), ("west", &[west.address])]).await;
    let (east, west) = (gateways[0].core().await, gateways[1].core().await);
    let accepted = || gateways[1].inspector.tunnels().iter().map(|t| t.accepted).sum::<usize>();
    east.identity.source.set(svid("east"));
    until("a new link is there beside the old one", || accepted() == 2).await;
    until("the old one is given up", || accepted() == 1).await;
    assert_eq!(west.metrics.rejected("peer_protocol"), 0);
    let mut without = next(&global);
    without.clusters.get_mut(&cluster("west")).unwrap().gateways.clear();
    gateways[0].set_global(&without);
    until("east has left", || accepted() == 0).await;
    assert_eq!(west.metrics.rejected("peer_protocol"), 0);
}

async fn a_link_that_was_replaced_finishes_what_the_peer_carries_on_it(over: LinkTransport) {
    let (east, west) = (Server::bind().await, Server::bind().await);
    // West cannot dial: all goes by east's link.
    let (gateways, _) = pair(over, [&east, &west], async |[_, w]| [None, Some(w.tunnel)]).await;
    gateways[1].sees_ready("east").await;
    let (mut client, mut served) = carried(&gateways[1], "east", &east).await;
    let core = gateways[0].core().await;
    let before = core.registry.own_links(&cluster("west"));
    core.identity.source.set(svid("east"));
    let there = |old: bool| core.registry.own_links(&cluster("west")).iter().any(|id| before.contains(id) == old);
    until("there is a new link", || there(false)).await;
    // For longer than a link that carries nothing is kept.
    let mut trickle = tokio::time::interval(Duration::from_millis(50));
    for _ in 0..60 {
        trickle.tick().await;
        exchange(&mut client, &mut served, b"inward").await;
    }
    drop((client, served));
    until("the old link is given up", || !there(true)).await;
}

async fn slow_readers_stall_nobody_else(over: LinkTransport) {
    let west = Server::bind().await;
    let small = |config: &mut crate::Config| {
        config.tunnel.transport = over;
        config.tunnel.stream_window_bytes = 64 * 1024;
        config.tunnel.connection_window_bytes = 256 * 1024;
    };
    let (gateways, _) = super::rig::linked_with(small, &[("east", &[]), ("west", &[west.address])]).await;
    // More than the window holds of clients that do not read, and servers that do not stop.
    let mut slow = Vec::new();
    for _ in 0..12 {
        let (client, mut served) = carried(&gateways[0], "west", &west).await;
        let flood = tokio::spawn(async move { while served.write_all(&[7; 64 * 1024]).await.is_ok() {} });
        slow.push((client, flood));
    }
    let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
    for _ in 0..50 {
        exchange(&mut client, &mut served, &[1; 4_000]).await;
    }
    // A slow reader that is borne gets its bytes in the end.
    let mut whole = 0;
    for (mut client, flood) in slow {
        let mut taken = 0;
        let mut buffer = vec![0; 64 * 1024];
        while taken < 2_000_000 {
            match tokio::time::timeout(Duration::from_secs(10), client.read(&mut buffer)).await.unwrap() {
                Ok(n) if n > 0 => taken += n,
                _ => break,
            }
        }
        whole += usize::from(taken >= 2_000_000);
        flood.abort();
    }
    assert!(whole >= 1, "not all are given up");
    let tunnels = gateways[0].inspector.tunnels();
    assert!(tunnels.iter().all(|t| t.up), "{tunnels:?}");
    assert_eq!(gateways[0].core().await.metrics.rejected("peer_dead"), 0);
}

#[tokio::test]
async fn a_way_that_swallows_everything_is_not_held_against_the_service() {
    let west = Server::bind().await.echo(b"west");
    let patient = |config: &mut crate::Config| {
        (config.tunnel.dead_after, config.tunnel.idle_timeout) = (Duration::from_secs(60), Duration::from_secs(120));
    };
    let gateways = [Gateway::start_with("east", patient).await, Gateway::start_with("west", patient).await];
    let mut global = introduce(&gateways, &[("east", &[]), ("west", &[west])]);
    let relay = Relay::before(gateways[1].tunnel).await;
    global.clusters.get_mut(&cluster("east")).unwrap().gateways[0].tunnel = None;
    global.clusters.get_mut(&cluster("west")).unwrap().gateways[0].tunnel = Some(relay.address);
    gateways[1].set_endpoints(&[west]);
    gateways.iter().for_each(|gateway| gateway.set_global(&global));
    gateways[0].sees_ready("west").await;
    relay.block_udp(true);
    let name = sni(None);
    let clients = futures_util::future::join_all((0..4).map(|_| knock(gateways[0].auto, &name))).await;
    let core = gateways[0].core().await;
    until("all attempts are given up", || core.metrics.attempted(&cluster("west"), "silent") == 4).await;
    assert_eq!(core.metrics.rejected("service_out"), 0);
    drop(clients);
}

async fn a_client_that_resets_while_nobody_takes_its_bytes_ends_both_halves(over: LinkTransport) {
    let west = Server::bind().await;
    let small = |config: &mut crate::Config| {
        config.tunnel.transport = over;
        config.tunnel.stream_window_bytes = 64 * 1024;
        config.tunnel.connection_window_bytes = 256 * 1024;
    };
    let (gateways, _) = super::rig::linked_with(small, &[("east", &[]), ("west", &[west.address])]).await;
    let name = sni(None);
    let (mut client, served) = tokio::join!(knock(gateways[0].auto, &name), west.greet(b"hi"));
    read(&mut client, 2).await;
    let flood = vec![7; 64 * 1024];
    while tokio::time::timeout(Duration::from_millis(500), client.write_all(&flood)).await.is_ok() {}
    let cores = [gateways[0].core().await, gateways[1].core().await];
    assert!(cores.iter().all(|core| core.metrics.carried_now() == 1));
    client.set_zero_linger().unwrap();
    drop(client);
    until("neither carries it", || cores.iter().all(|core| core.metrics.carried_now() == 0)).await;
    until("the endpoint sees a reset", || served.take_error().unwrap().is_some()).await;
}

/// Beside pings and pongs, which may be late on a busy machine.
async fn whatever_comes_over_a_link_counts_as_a_sign_of_life(over: LinkTransport) {
    const WORDS: u64 = 100;
    let rare = |config: &mut crate::Config| {
        config.tunnel.transport = over;
        (config.tunnel.ping_interval, config.tunnel.dead_after) = (Duration::from_secs(60), Duration::from_secs(600));
        config.tunnel.idle_timeout = Duration::from_secs(1_200);
    };
    let west = Server::bind().await;
    let (gateways, _) = super::rig::linked_with(rare, &[("east", &[]), ("west", &[west.address])]).await;
    let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
    let received = async || {
        let cores = [gateways[0].core().await, gateways[1].core().await];
        [cores[0].registry.received(&cluster("west")), cores[1].registry.received(&cluster("east"))]
    };
    let before = received().await;
    for _ in 0..WORDS {
        exchange(&mut client, &mut served, b"word").await;
    }
    for (before, after) in before.into_iter().zip(received().await) {
        // A word may come while the one before is being read.
        assert!(after - before >= WORDS / 2, "{} signs for {WORDS} words", after - before);
    }
}

/// Default windows: more clients than fit into them that each read a steady 2 MB/s, none of whom ever stops.
async fn steady_downloads_over_one_link_all_arrive(over: LinkTransport) {
    const CLIENTS: usize = 32;
    const SIZE: usize = 12_000_000;
    let west = Server::bind().await;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[west.address])]).await;
    let mut pairs = Vec::new();
    for _ in 0..CLIENTS {
        pairs.push(carried(&gateways[0], "west", &west).await);
    }
    let mut clients = tokio::task::JoinSet::new();
    for (mut client, mut served) in pairs {
        tokio::spawn(async move {
            drop(served.write_all(&vec![7; SIZE]).await);
            drop(served.shutdown().await);
        });
        clients.spawn(async move {
            let (mut taken, mut buffer): (usize, _) = (0, vec![0; 256 * 1024]);
            loop {
                // The pace of the reader, not a wait for something.
                tokio::time::sleep(Duration::from_millis(120)).await;
                match client.read(&mut buffer).await {
                    Ok(0) => return (taken, None),
                    Ok(n) => taken += n,
                    Err(error) => return (taken, Some(error.kind())),
                }
            }
        });
    }
    let ends = clients.join_all().await;
    let cut: Vec<_> = ends.iter().filter(|(taken, error)| *taken != SIZE || error.is_some()).collect();
    assert!(cut.is_empty(), "{} of {} downloads were reset: {cut:?}", cut.len(), ends.len());
}

async fn more_bulk_than_the_windows_hold_delays_neither_probes_nor_new_connections(over: LinkTransport) {
    let west = Server::bind().await;
    let small = |config: &mut crate::Config| {
        config.tunnel.transport = over;
        config.tunnel.stream_window_bytes = 256 * 1024;
        config.tunnel.connection_window_bytes = 1 << 20;
        config.tunnel.slow_reader_bytes = 0;
        // What is held here is a share of the bytes, not a time: a busy machine may take longer for them.
        config.ingress.attempt_timeout = Duration::from_secs(5);
        config.ingress.pinned_timeout = Duration::from_secs(10);
    };
    // Of bulk that goes before a new connection and one small exchange on it. Over TCP there is no window that all share, and each gateway gives every
    // stream its turn.
    let share: u64 = match over {
        LinkTransport::Tcp => 512 << 20,
        _ => 16 << 20,
    };
    let (gateways, _) = super::rig::linked_with(small, &[("east", &[]), ("west", &[west.address])]).await;
    let mut bulk = tokio::task::JoinSet::new();
    let moved = Arc::new(AtomicU64::new(0));
    for _ in 0..32 {
        let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
        bulk.spawn(async move { while served.write_all(&[7; 64 * 1024]).await.is_ok() {} });
        let moved = moved.clone();
        bulk.spawn(async move {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(n @ 1..) = client.read(&mut buffer).await {
                moved.fetch_add(n as u64, Ordering::Relaxed);
            }
        });
    }
    // For longer than a link without answers lives.
    let began = std::time::Instant::now();
    let mut before = Vec::new();
    while began.elapsed() < Duration::from_secs(3) || before.len() < 5 {
        let was = moved.load(Ordering::Relaxed);
        let (mut client, mut served) = carried(&gateways[0], "west", &west).await;
        exchange(&mut client, &mut served, b"meanwhile").await;
        before.push(moved.load(Ordering::Relaxed) - was);
    }
    before.sort_unstable();
    assert!(before[before.len() / 2] < share, "bytes of bulk that went before each: {before:?}");
    assert!(moved.load(Ordering::Relaxed) > 10 * (32 * 256 * 1024), "bulk went on meanwhile");
    for gateway in &gateways {
        assert_eq!(gateway.core().await.metrics.rejected("peer_dead"), 0);
    }
    bulk.abort_all();
}

async fn a_link_that_has_ended_is_not_chosen_again(over: LinkTransport) {
    let west = Server::bind().await;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[west.address])]).await;
    let registry = &gateways[0].core().await.registry;
    // Nobody else has a turn in between who would take it off the list.
    while let Some(tunnel) = registry.pick(&cluster("west"), &[]) {
        assert!(tunnel.link.why_closed().is_none());
        tunnel.link.close(Close::Protocol);
    }
}

/// Each has more to say than the way holds while nobody reads.
async fn two_gateways_that_have_much_to_say_hear_each_other(over: LinkTransport) {
    let (east, west) = (Server::bind().await.echo(b"east"), Server::bind().await.echo(b"west"));
    let narrow = |config: &mut crate::Config| {
        config.tunnel.transport = over;
        config.tunnel.stream_window_bytes = 16 * 1024;
        config.tunnel.connection_window_bytes = 16 * 1024;
    };
    let gateways = [Gateway::start_with("east", narrow).await, Gateway::start_with("west", narrow).await];
    let mut global = introduce(&gateways, &[("east", &[east]), ("west", &[west])]);
    let first = global.services.values().next().unwrap().clone();
    for n in 2..5_000 {
        let name: ServiceName = format!("shop/service-with-a-long-name-{n}").parse().unwrap();
        let service = GlobalService { name: name.clone(), index: VipIndex(n), ..first.as_ref().clone() };
        global.services.insert(name, service.into());
    }
    for (gateway, endpoint) in gateways.iter().zip([east, west]) {
        gateway.set_endpoints_of_all(&global, &[endpoint]);
        gateway.set_global(&global);
    }
    gateways[0].sees_ready("west").await;
    gateways[1].sees_ready("east").await;
}
