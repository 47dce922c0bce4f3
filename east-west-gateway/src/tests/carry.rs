//! Connections that arrive: bytes, ends and resets, and the second attempts that nobody notices.

use std::{io::ErrorKind, sync::Arc, time::Duration};

use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    keys::KeyPair,
    svid::Svid,
    tls::{self, ClientAuth, IdentitySource, PeerPolicy},
};
use isthmus_model::ids::{SpiffeId, TrustDomain};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::rig::{Gateway, Server, connected, introduce, knock, linked, over_both, read, refusing, sni, until};
use crate::{config::LinkTransport, splice, testkit::cluster};

over_both!(
    bytes_flow_both_ways_and_come_to_their_end,
    workloads_authenticate_each_other_through_the_gateways,
    an_end_of_one_direction_leaves_the_other_open,
    a_reset_of_either_side_is_a_reset_of_the_other,
    a_pinned_port_leads_to_its_cluster_even_if_another_is_nearer,
    a_dead_endpoint_in_the_first_cluster_is_replayed_to_the_second_unseen,
    a_dead_endpoint_of_the_own_cluster_is_replayed_to_another_one_unseen,
    an_endpoint_that_closes_before_its_first_byte_costs_the_next_one_a_try,
    a_silent_endpoint_is_replayed_elsewhere_within_its_deadline,
    a_gateway_killed_mid_handshake_is_replayed_around,
    a_client_that_leaves_before_the_answer_frees_the_endpoint,
    a_gateway_with_all_streams_taken_sends_the_next_one_elsewhere_until_one_ends,
);

async fn bytes_flow_both_ways_and_come_to_their_end(over: LinkTransport) {
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[west])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let (mut reader, mut writer) = client.into_split();
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
        writer
    });
    let mut received = Vec::new();
    reader.read_to_end(&mut received).await.unwrap();
    drop(writing.await.unwrap());
    assert!(received == expected, "{} of {} bytes", received.len(), expected.len());
}

async fn workloads_authenticate_each_other_through_the_gateways(over: LinkTransport) {
    isthmus_identity::install_crypto();
    let domain: TrustDomain = "west.example".parse().unwrap();
    let day = Duration::from_secs(86_400);
    let ca = CertificateAuthority::create(&domain, day).unwrap();
    let trust = TrustStore::new();
    trust.set([(domain.clone(), vec![ca.root_der().clone()])].into());
    let identity = |account: &str| {
        let id = SpiffeId::workload(&domain, &"shop".parse().unwrap(), account).unwrap();
        let key = KeyPair::generate().unwrap();
        let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], day).unwrap();
        IdentitySource::new(Svid::new(chain, &key).unwrap())
    };
    let only = |account: &'static str| -> PeerPolicy { Arc::new(move |id| id.segments().last() == Some(account)) };
    let server = tls::server_config(&identity("orders"), &trust, ClientAuth::Required(only("web")), &[]).unwrap();
    let client = tls::client_config(Some(&identity("web")), &trust, only("orders"), &[]).unwrap();

    let orders = Server::bind().await;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[orders.address])]).await;
    let serving = tokio::spawn(async move {
        let mut tls = TlsAcceptor::from(Arc::new(server)).accept(orders.accept().await).await.unwrap();
        // Server-first, as no inspector in between may need the client's bytes.
        tls.write_all(b"220 orders\r\n").await.unwrap();
        let mut request = [0; 4];
        tls.read_exact(&mut request).await.unwrap();
        tls.write_all(&request).await.unwrap();
        tls.shutdown().await.unwrap();
    });
    let tcp = TcpStream::connect(gateways[0].auto).await.unwrap();
    let mut tls = TlsConnector::from(Arc::new(client)).connect(sni(None).try_into().unwrap(), tcp).await.unwrap();
    let mut greeting = [0; 12];
    tls.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 orders\r\n");
    tls.write_all(b"ping").await.unwrap();
    let mut rest = Vec::new();
    tls.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"ping");
    serving.await.unwrap();
}

async fn an_end_of_one_direction_leaves_the_other_open(over: LinkTransport) {
    let west = Server::bind().await;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[west.address])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    let mut served = west.greet(b"hi").await;
    assert_eq!(read(&mut client, 2).await, b"hi");
    client.write_all(b"all").await.unwrap();
    client.shutdown().await.unwrap();
    let mut request = Vec::new();
    served.read_to_end(&mut request).await.unwrap();
    assert_eq!(request, b"all");
    // The client has ended; the answer still flows, in more than one piece.
    for piece in [b"one", b"two"] {
        served.write_all(piece).await.unwrap();
        assert_eq!(read(&mut client, 3).await, piece);
    }
    served.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0, "an orderly end, not a reset");
}

async fn a_reset_of_either_side_is_a_reset_of_the_other(over: LinkTransport) {
    let west = Server::bind().await;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[west.address])]).await;

    let mut client = knock(gateways[0].auto, &sni(None)).await;
    let mut served = west.greet(b"hi").await;
    read(&mut client, 2).await;
    splice::abort(&client);
    drop(client);
    assert_eq!(served.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);

    let mut client = knock(gateways[0].auto, &sni(None)).await;
    let served = west.greet(b"hi").await;
    read(&mut client, 2).await;
    splice::abort(&served);
    drop(served);
    assert_eq!(client.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn the_own_cluster_comes_first_and_is_reached_without_a_tunnel() {
    let (here, there) = (Server::bind().await.echo(b"here"), Server::bind().await.echo(b"over"));
    let (gateways, _) = connected(&[("east", &[here]), ("west", &[there])]).await;
    until("the own endpoints are known", || gateways[0].eligibility("east").as_deref() == Some("ready")).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"here");
}

async fn a_pinned_port_leads_to_its_cluster_even_if_another_is_nearer(over: LinkTransport) {
    let (here, there) = (Server::bind().await.echo(b"here"), Server::bind().await.echo(b"over"));
    let (gateways, _) = linked(over, &[("east", &[here]), ("west", &[there])]).await;
    let pinned = gateways[0].inspector.pinned()[&cluster("west")];
    let mut client = knock(pinned, &sni(Some("west"))).await;
    assert_eq!(read(&mut client, 4).await, b"over");
}

async fn a_dead_endpoint_in_the_first_cluster_is_replayed_to_the_second_unseen(over: LinkTransport) {
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = linked(over, &[("east", &[]), ("central", &[refusing().await]), ("west", &[west])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
    let metrics = &gateways[0].core().await.metrics;
    assert_eq!(metrics.attempted(&cluster("central"), "rejected_connect_failed"), 1);
    assert_eq!(metrics.attempted(&cluster("west"), "accepted"), 1);
}

async fn a_dead_endpoint_of_the_own_cluster_is_replayed_to_another_one_unseen(over: LinkTransport) {
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = linked(over, &[("east", &[refusing().await]), ("west", &[west])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
}

async fn an_endpoint_that_closes_before_its_first_byte_costs_the_next_one_a_try(over: LinkTransport) {
    let (closing, good) = (Server::bind().await, Server::bind().await.echo(b"good"));
    let closes = closing.address;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[closes, good])]).await;
    tokio::spawn(async move {
        loop {
            drop(closing.accept().await);
        }
    });
    for _ in 0..8 {
        let mut client = knock(gateways[0].auto, &sni(None)).await;
        assert_eq!(read(&mut client, 4).await, b"good");
    }
}

async fn a_silent_endpoint_is_replayed_elsewhere_within_its_deadline(over: LinkTransport) {
    let silent = Server::bind().await;
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = linked(over, &[("east", &[]), ("central", &[silent.address]), ("west", &[west])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    let _held = silent.accept().await;
    assert_eq!(read(&mut client, 4).await, b"west");
    let metrics = &gateways[0].core().await.metrics;
    // Whether the far gateway's word still comes in time depends on how busy this machine is. If it does not, the other
    // link to that gateway is tried, too.
    let ends = ["rejected_timeout", "silent"].map(|end| metrics.attempted(&cluster("central"), end));
    assert!(matches!(ends, [1, 0] | [0, 1] | [0, 2] | [1, 1]), "{ends:?}");
}

async fn a_gateway_killed_mid_handshake_is_replayed_around(over: LinkTransport) {
    let silent = Server::bind().await;
    let west = Server::bind().await.echo(b"west");
    let (mut gateways, _) = linked(over, &[("east", &[]), ("central", &[silent.address]), ("west", &[west])]).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    // Central's endpoint has the hello; then its gateway is gone.
    let _held = silent.accept().await;
    gateways[1].kill();
    assert_eq!(read(&mut client, 4).await, b"west");
    until("central is unreachable", || gateways[0].eligibility("central").as_deref() == Some("unreachable")).await;
}

async fn a_client_that_leaves_before_the_answer_frees_the_endpoint(over: LinkTransport) {
    let silent = Server::bind().await;
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[silent.address])]).await;
    let client = knock(gateways[0].auto, &sni(None)).await;
    let mut held = silent.accept().await;
    super::rig::answer_hello(&mut held).await;
    drop(client);
    assert!(matches!(held.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    let core = gateways[0].core().await;
    until("the attempt is given up", || core.metrics.attempted(&cluster("west"), "client_gone") == 1).await;
}

async fn a_gateway_with_all_streams_taken_sends_the_next_one_elsewhere_until_one_ends(over: LinkTransport) {
    let east = Gateway::start_over(over, "east").await;
    let mut gateways = vec![east];
    let members: [(&str, &[_]); 3] =
        [("east", &[]), ("north", &[Server::bind().await.echo(b"N")]), ("west", &[Server::bind().await.echo(b"W")])];
    for (name, _) in &members[1..] {
        gateways.push(
            Gateway::start_with(name, |config| {
                config.tunnel.transport = over;
                config.egress.max_streams = 1;
            })
            .await,
        );
    }
    let global = introduce(&gateways, &members);
    for (gateway, (_, endpoints)) in gateways.iter().zip(&members) {
        gateway.set_endpoints(endpoints);
        gateway.set_global(&global);
    }
    gateways[0].sees_ready("north").await;
    gateways[0].sees_ready("west").await;
    let auto = gateways[0].auto;
    let mut first = knock(auto, &sni(None)).await;
    let mut second = knock(auto, &sni(None)).await;
    let mut greetings = [read(&mut first, 1).await, read(&mut second, 1).await].concat();
    greetings.sort_unstable();
    assert_eq!(greetings, b"NW", "an open stream counts");
    let core = gateways[0].core().await;
    let overloaded = ["north", "west"].map(|c| core.metrics.attempted(&cluster(c), "rejected_overloaded"));
    assert_eq!(overloaded.iter().sum::<u64>(), 1);
    let mut third = knock(auto, &sni(None)).await;
    assert!(third.read(&mut [0; 1]).await.is_err(), "all are taken");
    drop(first);
    let free = async || {
        let mut fourth = knock(auto, &sni(None)).await;
        fourth.read(&mut [0; 1]).await.is_ok_and(|n| n == 1)
    };
    isthmus_runtime::wait::wait_for("the next one gets it", super::rig::SOON, free).await.unwrap();
}
