//! Leaving: peers are told, running connections finish, new ones are served until the doors close.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{config::LinkTransport, testkit::cluster};

use super::rig::{Gateway, Server, knock, linked, over_both, read, sni, until};

over_both!(a_draining_gateway_finishes_what_it_carries_and_takes_nothing_new, the_near_gateway_drains_too,);

async fn a_draining_gateway_finishes_what_it_carries_and_takes_nothing_new(over: LinkTransport) {
    let west = Server::bind().await;
    let (mut gateways, _) = linked(over, &[("east", &[]), ("west", &[west.address])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    let mut served = west.greet(b"hi").await;
    read(&mut client, 2).await;

    gateways[1].drain();
    until("east is told", || gateways[0].eligibility("west").as_deref() == Some("unreachable")).await;
    // The running connection goes on, in both directions, to its orderly end.
    client.write_all(b"still").await.unwrap();
    assert_eq!(read(&mut served, 5).await, b"still");
    served.write_all(b"here").await.unwrap();
    served.shutdown().await.unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"here");
    client.shutdown().await.unwrap();
    drop((client, served));
    gateways[1].ended().await;
}

async fn the_near_gateway_drains_too(over: LinkTransport) {
    let west = Server::bind().await;
    let (mut gateways, _) = linked(over, &[("east", &[]), ("west", &[west.address])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    let mut served = west.greet(b"hi").await;
    read(&mut client, 2).await;
    let auto = gateways[0].auto;
    gateways[0].drain();
    let core = gateways[0].core().await;
    core.closing.cancelled().await;
    let closed = async || TcpStream::connect(auto).await.is_err();
    isthmus_runtime::wait::wait_for("the door is closed", super::rig::SOON, closed).await.unwrap();
    client.write_all(b"bye").await.unwrap();
    client.shutdown().await.unwrap();
    let mut request = Vec::new();
    served.read_to_end(&mut request).await.unwrap();
    assert_eq!(request, b"bye");
    served.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    gateways[0].ended().await;
}

#[tokio::test]
async fn until_the_doors_close_whatever_still_comes_is_served_on_both_sides() {
    let (east, west) = (Server::bind().await.echo(b"east"), Server::bind().await.echo(b"west"));
    let slow = |config: &mut crate::Config| config.drain.accept_for = std::time::Duration::from_secs(2);
    let mut gateways = [Gateway::start("east").await, Gateway::start_with("west", slow).await];
    let members: [(&str, &[std::net::SocketAddr]); 2] = [("east", &[east]), ("west", &[west])];
    let global = super::rig::introduce(&gateways, &members);
    for (gateway, (_, endpoints)) in gateways.iter().zip(&members) {
        gateway.set_endpoints(endpoints);
        gateway.set_global(&global);
    }
    gateways[0].sees_ready("west").await;
    gateways[1].sees_ready("east").await;
    let (near, far) = (gateways[0].core().await, gateways[1].core().await);
    let to_west = gateways[0].inspector.pinned()[&cluster("west")];
    let (west_auto, to_east) = (gateways[1].auto, gateways[1].inspector.pinned()[&cluster("east")]);
    gateways[1].drain();
    until("east is told", || gateways[0].eligibility("west").as_deref() == Some("unreachable")).await;
    for (entry, name, greeting) in
        [(to_west, Some("west"), b"west"), (west_auto, None, b"west"), (to_east, Some("east"), b"east")]
    {
        let mut late = knock(entry, &sni(name)).await;
        assert_eq!(read(&mut late, 4).await, greeting);
    }
    assert!(!far.closing.is_cancelled(), "all of that was before the doors closed");
    far.closing.cancelled().await;
    let mut too_late = knock(to_west, &sni(Some("west"))).await;
    assert!(too_late.read(&mut [0; 1]).await.is_err());
    drop(far);
    gateways[1].ended().await;
    assert!(near.metrics.attempted(&cluster("west"), "accepted") >= 1);
}

#[tokio::test]
async fn a_connection_that_outlasts_the_deadline_is_reset() {
    let east = Server::bind().await;
    let mut gateway = Gateway::start_with("east", |config| {
        config.drain.deadline = std::time::Duration::from_millis(300);
    })
    .await;
    gateway.set_endpoints(&[east.address]);
    gateway.set_global(&crate::testkit::federation(&["east"]));
    gateway.sees_ready("east").await;
    let mut client = knock(gateway.auto, &sni(None)).await;
    let mut served = east.greet(b"hi").await;
    read(&mut client, 2).await;
    gateway.drain();
    assert!(client.read(&mut [0; 1]).await.is_err());
    assert!(served.read(&mut [0; 1]).await.is_err());
    gateway.ended().await;
}
