//! Limits that end a connection, or keep it from beginning, although both of its sides are well.

use std::{io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time,
};

use super::rig::{Gateway, SOON, Server, introduce, knock, linked_with, over_both, read, show, sni, until};
use crate::{config::LinkTransport, testkit::cluster};

over_both!(one_cluster_cannot_take_all_streams_from_the_others);

#[tokio::test]
async fn a_connection_is_reset_at_its_age_limit_however_busy_it_is() {
    const LIMIT: Duration = Duration::from_millis(700);
    let west = Server::bind().await.echo(b"west");
    let east = Gateway::start_with("east", |config| config.ingress.max_lifetime = LIMIT).await;
    let gateways = [east, Gateway::start("west").await];
    show(&gateways, &[("east", &[]), ("west", &[west])]).await;
    let began = std::time::Instant::now();
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    read(&mut client, 4).await;
    let busy = async {
        loop {
            client.write_all(b"x").await?;
            client.read_exact(&mut [0; 1]).await?;
        }
    };
    let ended: std::io::Result<()> = time::timeout(SOON, busy).await.expect("it ends");
    assert!(matches!(ended.unwrap_err().kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe));
    assert!(began.elapsed() >= LIMIT, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_without_a_byte_is_reset_and_a_busy_one_is_not() {
    const LIMIT: Duration = Duration::from_millis(700);
    let west = Server::bind().await.echo(b"west");
    let east = Gateway::start_with("east", |config| config.ingress.idle_timeout = LIMIT).await;
    let gateways = [east, Gateway::start("west").await];
    show(&gateways, &[("east", &[]), ("west", &[west])]).await;
    // Before any byte: how long after the gateway's last byte the client saw it is not known here.
    let began = std::time::Instant::now();
    let (mut busy, mut idle) = (knock(gateways[0].auto, &sni(None)).await, knock(gateways[0].auto, &sni(None)).await);
    read(&mut busy, 4).await;
    read(&mut idle, 4).await;
    let talk = async {
        loop {
            busy.write_all(b"x").await.unwrap();
            busy.read_exact(&mut [0; 1]).await.unwrap();
        }
    };
    let mut byte = [0; 1];
    let ended = async {
        tokio::select! {
            ended = idle.read(&mut byte) => ended,
            () = talk => unreachable!("it never ends"),
        }
    };
    let ended = time::timeout(SOON, ended).await.expect("the idle one is reset");
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(began.elapsed() >= LIMIT, "{:?}", began.elapsed());
    busy.write_all(b"y").await.unwrap();
    assert_eq!(read(&mut busy, 1).await.len(), 1, "the busy one goes on");
}

#[tokio::test]
async fn a_gateway_short_of_memory_sends_new_streams_elsewhere_and_finishes_what_it_carries() {
    let mut gateways = vec![Gateway::start("east").await];
    let members: [(&str, &[_]); 3] =
        [("east", &[]), ("north", &[Server::bind().await.echo(b"N")]), ("west", &[Server::bind().await.echo(b"W")])];
    // Any process uses more than that, so it is overloaded as soon as it carries something.
    let short = |config: &mut crate::Config| config.overload.max_memory_bytes = Some(1);
    gateways.push(Gateway::start_with("north", short).await);
    gateways.push(Gateway::start("west").await);
    show(&gateways, &members).await;
    let (auto, to_north) = (gateways[0].auto, gateways[0].inspector.pinned()[&cluster("north")]);
    let mut first = knock(to_north, &sni(Some("north"))).await;
    assert_eq!(read(&mut first, 1).await, b"N", "an idle one takes it");
    let (near, north) = (gateways[0].core().await, gateways[1].core().await);
    until("north is overloaded", || north.admit().is_err()).await;

    let tried = || near.metrics.attempted(&cluster("north"), "rejected_overloaded");
    let mut served = 0;
    while tried() == 0 {
        let mut next = knock(auto, &sni(None)).await;
        assert_eq!(read(&mut next, 1).await, b"W", "after {served}");
        served += 1;
        assert!(served < 100, "north is never tried");
    }
    let mut pinned = knock(to_north, &sni(Some("north"))).await;
    assert!(pinned.read(&mut [0; 1]).await.is_err(), "nowhere else to go");
    // Its own sidecars are turned away at once, too.
    if let Ok(mut own) = TcpStream::connect(gateways[1].auto).await {
        assert!(matches!(own.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    }
    until("that was counted", || north.metrics.rejected("overloaded_memory") == 1).await;

    first.write_all(b"still").await.unwrap();
    assert_eq!(read(&mut first, 5).await, b"still");
    drop(first);
    until("an idle gateway takes new work", || north.admit().is_ok()).await;
    let mut again = knock(to_north, &sni(Some("north"))).await;
    assert_eq!(read(&mut again, 1).await, b"N");
}

async fn one_cluster_cannot_take_all_streams_from_the_others(over: LinkTransport) {
    let west = Server::bind().await.echo(b"west");
    let few = |config: &mut crate::Config| {
        config.tunnel.transport = over;
        config.egress.max_streams = 4;
    };
    let (gateways, _) = linked_with(few, &[("east", &[]), ("north", &[]), ("west", &[west])]).await;
    gateways[1].sees_ready("west").await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut client = knock(gateways[0].auto, &sni(None)).await;
        assert_eq!(read(&mut client, 4).await, b"west");
        held.push(client);
    }
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert!(client.read(&mut [0; 1]).await.is_err(), "the last place is not for it");
    let far = gateways[2].core().await;
    assert_eq!(far.metrics.rejected("egress_share"), 1);
    assert_eq!(gateways[0].core().await.metrics.attempted(&cluster("west"), "rejected_overloaded"), 1);
    let mut other = knock(gateways[1].auto, &sni(None)).await;
    assert_eq!(read(&mut other, 4).await, b"west");
    drop((held, other));
    until("all places are free", || far.stream_places.taken() == 0).await;
}

#[tokio::test]
async fn a_link_over_tcp_carries_no_more_streams_than_a_peer_may_have() {
    let west = Server::bind().await.echo(b"west");
    let few = |config: &mut crate::Config| {
        config.tunnel.transport = LinkTransport::Tcp;
        config.tunnel.max_streams_per_peer = 2;
    };
    let gateways = [Gateway::start_with("east", few).await, Gateway::start_with("west", few).await];
    let mut global = introduce(&gateways, &[("east", &[]), ("west", &[west])]);
    // Only east dials, so that there is one link.
    global.clusters.get_mut(&cluster("east")).unwrap().gateways.clear();
    gateways[1].set_endpoints(&[west]);
    gateways.iter().for_each(|gateway| gateway.set_global(&global));
    gateways[0].sees_ready("west").await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut client = knock(gateways[0].auto, &sni(None)).await;
        assert_eq!(read(&mut client, 4).await, b"west");
        held.push(client);
    }
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert!(client.read(&mut [0; 1]).await.is_err(), "that is one too many");
    let far = gateways[1].core().await;
    assert_eq!(far.metrics.rejected("egress_link_full"), 1);
    drop(held);
    until("both have ended", || far.stream_places.taken() == 0).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
}

#[tokio::test]
async fn unused_connections_of_one_cluster_do_not_keep_another_one_from_linking() {
    let west = Server::bind().await.echo(b"west");
    let greedy = |config: &mut crate::Config| {
        config.tunnel.transport = LinkTransport::Tcp;
        config.tunnel.tcp.min_warm = 32;
    };
    let few = |config: &mut crate::Config| {
        config.tunnel.transport = LinkTransport::Tcp;
        config.tunnel.tcp.max_connections = 24;
    };
    let east = Gateway::start_with("east", greedy).await;
    let west_gateway = Gateway::start_with("west", few).await;
    let mut gateways = vec![east, west_gateway];
    show(&gateways, &[("east", &[]), ("west", &[west])]).await;
    let far = gateways[1].core().await;
    until("east has its share", || far.metrics.rejected("tcp_share") > 0).await;
    let north = Gateway::start_with("north", |config| {
        config.tunnel.transport = LinkTransport::Tcp;
        config.tunnel.tcp.min_warm = 1;
    })
    .await;
    gateways.push(north);
    let members: [(&str, &[_]); 3] = [("east", &[]), ("west", &[west]), ("north", &[])];
    let global = introduce(&gateways, &members);
    gateways.iter().for_each(|gateway| gateway.set_global(&global));
    gateways[2].sees_ready("west").await;
    let mut client = knock(gateways[2].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
    assert!(far.tcp_places.taken() <= 24);
}
