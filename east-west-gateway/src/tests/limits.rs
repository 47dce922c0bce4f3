//! Limits that end a connection, or keep it from beginning, although both of its sides are well.

use std::{io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::rig::{Gateway, Server, knock, read, show, sni, until};
use crate::testkit::cluster;

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
    let ended: std::io::Result<()> = tokio::time::timeout(super::rig::SOON, busy).await.expect("it ends");
    assert!(matches!(ended.unwrap_err().kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe));
    assert!(began.elapsed() >= LIMIT, "{:?}", began.elapsed());
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
