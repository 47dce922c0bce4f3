//! Whatever else may come in: closed within a deadline, counted by reason, without effect on others.

use std::{sync::Arc, time::Duration};

use isthmus_api::proto::{
    common::v1::ServiceName,
    tunnel::v1::{RejectReason, StreamHeader, StreamReply, stream_reply::Kind},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time,
};

use super::rig::{Gateway, Server, connected, hello, knock, local, read, sni, svid, trust, until};
use crate::{
    frame::{self, FrameReader, MAX_HEADER},
    testkit::{FEDERATION, cluster},
    tunnel::{
        Close,
        control::Control,
        link::{
            RecvHalf, SendHalf,
            quic::{self, Identity},
        },
    },
};

/// Sends `bytes` to `address` and waits to be closed.
async fn closed_after(address: std::net::SocketAddr, bytes: &[u8]) {
    let exchange = async {
        // A reset may come as early as the connect.
        let mut tcp = TcpStream::connect(address).await?;
        tcp.write_all(bytes).await?;
        tcp.read(&mut [0; 64]).await
    };
    let end = time::timeout(Duration::from_secs(3), exchange).await;
    assert!(matches!(end.expect("closed within the deadline"), Ok(0) | Err(_)));
}

#[tokio::test]
async fn hellos_that_cannot_be_carried_are_closed_and_counted_and_others_go_on() {
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = connected(&[("east", &[]), ("west", &[west])]).await;
    let core = gateways[0].core().await;
    let auto = gateways[0].auto;
    let pinned = gateways[0].inspector.pinned()[&cluster("west")];
    let mut steady = knock(auto, &sni(None)).await;
    read(&mut steady, 4).await;

    let oversized = [&[22, 3, 1, 0x40, 0][..], &[1, 0xff, 0xff, 0xff], &[0; 100]].concat();
    let cases: [(&str, std::net::SocketAddr, Vec<u8>); 9] = [
        ("not_tls", auto, b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("hello_too_long", auto, oversized),
        ("hello_malformed", auto, [&[22, 3, 1, 0, 10][..], &[2; 10]].concat()),
        ("hello_timeout", auto, hello(&sni(None))[..50].to_vec()),
        ("sni_foreign", auto, hello("www.example.com")),
        ("sni_malformed", auto, hello("cart.svc.any.isthmus.example")),
        ("sni_port_mismatch", auto, hello(&sni(Some("west")))),
        ("sni_port_mismatch", pinned, hello(&sni(None))),
        ("unknown_service", auto, hello("80.nothing.shop.svc.any.isthmus.example")),
    ];
    for (reason, address, bytes) in cases {
        let before = core.metrics.rejected(reason);
        closed_after(address, &bytes).await;
        until(reason, || core.metrics.rejected(reason) == before + 1).await;
    }
    steady.write_all(b"echo").await.unwrap();
    assert_eq!(read(&mut steady, 4).await, b"echo");
}

#[tokio::test]
async fn a_service_without_a_usable_cluster_is_closed_at_once() {
    let (gateways, _) = connected(&[("east", &[]), ("west", &[])]).await;
    gateways[0].set_endpoints(&[]);
    until("no candidate", || gateways[0].eligibility("west").as_deref() == Some("noEndpoints")).await;
    closed_after(gateways[0].auto, &hello(&sni(None))).await;
    let core = gateways[0].core().await;
    until("counted", || core.metrics.rejected("no_candidate") == 1).await;
}

#[tokio::test]
async fn connections_over_the_limit_are_turned_away() {
    let mut global = crate::testkit::federation(&["east"]);
    global.services.clear();
    let gateway = Gateway::start_with("east", |config| {
        config.ingress.max_connections = 2;
        config.ingress.hello_timeout = Duration::from_secs(60);
    })
    .await;
    gateway.set_global(&global);
    let core = gateway.core().await;
    let _first = TcpStream::connect(gateway.auto).await.unwrap();
    let _second = TcpStream::connect(gateway.auto).await.unwrap();
    until("both are in", || core.local_slots.available_permits() == 0).await;
    closed_after(gateway.auto, b"").await;
    until("counted", || core.metrics.rejected("overloaded") == 1).await;
}

#[tokio::test]
async fn one_source_cannot_take_all_places_of_pending_hellos() {
    let gateway = Gateway::start_with("east", |config| {
        config.ingress.max_pending_hellos_per_source = 2;
        config.ingress.hello_timeout = Duration::from_secs(60);
    })
    .await;
    let core = gateway.core().await;
    let places = core.hello_slots.available_permits();
    let _first = TcpStream::connect(gateway.auto).await.unwrap();
    let _second = TcpStream::connect(gateway.auto).await.unwrap();
    until("both are in", || core.hello_slots.available_permits() == places - 2).await;
    closed_after(gateway.auto, b"").await;
    until("counted", || core.metrics.rejected("source_pending") == 1).await;
    let other = tokio::net::TcpSocket::new_v4().unwrap();
    other.bind(([127, 0, 0, 2], 0).into()).unwrap();
    let mut other = other.connect(gateway.auto).await.unwrap();
    other.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    until("another source is listened to", || core.metrics.rejected("not_tls") == 1).await;
}

#[tokio::test]
async fn one_clusters_connections_leave_room_for_the_others() {
    let west = Gateway::start_with("west", |config| {
        config.tunnel.max_connections_per_cluster = 1;
        // Peers by hand answer no probes.
        (config.tunnel.dead_after, config.tunnel.idle_timeout) = (Duration::from_secs(60), Duration::from_secs(120));
    })
    .await;
    west.set_global(&crate::testkit::federation(&["east", "west", "north"]));
    let first = Peer::connect("east", &west).await;
    let (second, _endpoint) = Peer::dial("east", &west).await;
    let why = time::timeout(Duration::from_secs(3), second.closed()).await.expect("closed in time");
    let quinn::ConnectionError::ApplicationClosed(why) = why else { panic!("{why}") };
    assert_eq!(why.error_code, Close::Overloaded.code());
    let north = Peer::connect("north", &west).await;
    assert!(first.connection.close_reason().is_none() && north.connection.close_reason().is_none());
    // Its place is free again once it has gone.
    first.connection.close(0_u32.into(), b"bye");
    drop(Peer::connect("east", &west).await);
}

#[tokio::test]
async fn garbage_datagrams_are_counted_and_tunnels_go_on() {
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = connected(&[("east", &[]), ("west", &[west])]).await;
    let socket = tokio::net::UdpSocket::bind(local(0)).await.unwrap();
    for _ in 0..50 {
        socket.send_to(b"this is no QUIC datagram, whatever it may be", gateways[1].tunnel).await.unwrap();
    }
    let core = gateways[1].core().await;
    until("garbage is counted", || core.metrics.rejected("quic_garbage") >= 10).await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
}

/// A peer that speaks the tunnel by hand: a member's certificate, and whatever streams a test likes.
struct Peer {
    connection: quinn::Connection,
    _control: Control,
    _endpoint: quinn::Endpoint,
}

impl Peer {
    async fn connect(name: &str, to: &Gateway) -> Self {
        let (connection, endpoint) = Self::dial(name, to).await;
        let (send, recv) = connection.open_bi().await.unwrap();
        let control = Control::open(SendHalf::Quic(send.into()), RecvHalf::Quic(recv.into()), "by-hand").await.unwrap();
        Self { connection, _control: control, _endpoint: endpoint }
    }

    async fn dial(name: &str, to: &Gateway) -> (quinn::Connection, quinn::Endpoint) {
        let identity = Identity {
            source: isthmus_identity::tls::IdentitySource::new(svid(name)),
            trust: trust(),
            federation: FEDERATION.parse().unwrap(),
        };
        let core = to.core().await;
        let endpoint = quinn::Endpoint::client(local(0)).unwrap();
        let to = (&core.cluster, to.tunnel);
        let connection = quic::connect(&endpoint, &core.config.tunnel, &identity, to).await.unwrap();
        (connection, endpoint)
    }

    /// Sends `bytes` on a stream of its own and reads the reply.
    async fn ask(&self, bytes: &[u8]) -> Kind {
        let (mut send, recv) = self.connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        Self::reply(recv).await
    }

    async fn reply(recv: quinn::RecvStream) -> Kind {
        let mut reader = FrameReader::new(RecvHalf::Quic(recv.into()), MAX_HEADER);
        let reply = time::timeout(Duration::from_secs(3), reader.next::<StreamReply>()).await;
        reply.expect("answered within the deadline").unwrap().kind.unwrap()
    }

    async fn rejected(&self, bytes: &[u8]) -> (RejectReason, bool) {
        match self.ask(bytes).await {
            Kind::Reject(reject) => (reject.reason(), reject.retry_elsewhere),
            Kind::Accept(_) => panic!("accepted"),
        }
    }
}

fn header(change: impl FnOnce(&mut StreamHeader)) -> Vec<u8> {
    let mut header = StreamHeader {
        version: 1,
        service: Some(ServiceName { namespace: "shop".into(), name: "orders".into() }),
        port: 80,
        selector: String::new(),
        deadline_ms: 500,
        traceparent: String::new(),
    };
    change(&mut header);
    frame::encode(&header).unwrap().to_vec()
}

#[tokio::test]
async fn a_peers_bad_streams_are_rejected_by_reason() {
    let west = Server::bind().await.echo(b"west");
    let (mut gateways, _) = connected(&[("east", &[]), ("west", &[west])]).await;
    let west = gateways.pop().unwrap();
    let peer = Peer::connect("east", &west).await;
    let with_hello = |head: Vec<u8>| [head, hello(&sni(None))].concat();

    let bad_version = with_hello(header(|h| h.version = 2));
    assert_eq!(peer.rejected(&bad_version).await, (RejectReason::Version, true));
    assert_eq!(peer.rejected(&[0xff, 0xff]).await, (RejectReason::Malformed, false));
    let no_service = with_hello(header(|h| h.service = None));
    assert_eq!(peer.rejected(&no_service).await, (RejectReason::Malformed, false));
    let other_service = with_hello(header(|h| h.service.as_mut().unwrap().name = "secret".into()));
    assert_eq!(peer.rejected(&other_service).await, (RejectReason::NotExported, true));
    let other_port = with_hello(header(|h| h.port = 81));
    assert_eq!(peer.rejected(&other_port).await, (RejectReason::NotExported, true));
    let no_hello = [header(|_| {}), b"SSH-2.0-x\r\n".to_vec()].concat();
    assert_eq!(peer.rejected(&no_hello).await, (RejectReason::Malformed, false));
    let too_much = [with_hello(header(|_| {})), vec![23, 3, 3, 0, 1, 0]].concat();
    assert_eq!(peer.rejected(&too_much).await, (RejectReason::Malformed, false));
    // None of that spoilt the connection.
    assert!(matches!(peer.ask(&with_hello(header(|_| {}))).await, Kind::Accept(_)));
}

#[tokio::test]
async fn what_a_peer_does_before_its_answer_ends_the_stream() {
    // Takes connections and never says a byte.
    let silent = Server::bind().await;
    let (mut gateways, _) = connected(&[("east", &[]), ("west", &[silent.address])]).await;
    let west = gateways.pop().unwrap();
    let core = west.core().await;
    let peer = Peer::connect("east", &west).await;
    let asked = [header(|h| h.deadline_ms = 10_000), hello(&sni(None))].concat();
    // A stream whose ClientHello the endpoint has.
    let waits = async || {
        let (mut send, recv) = peer.connection.open_bi().await.unwrap();
        send.write_all(&asked).await.unwrap();
        let mut endpoint = silent.accept().await;
        // Probes connect and say nothing.
        while endpoint.peek(&mut [0; 1]).await.unwrap() == 0 {
            endpoint = silent.accept().await;
        }
        (send, recv, endpoint)
    };

    let (mut send, recv, _endpoint) = waits().await;
    send.write_all(&[23, 3, 3, 0, 1, 0]).await.unwrap();
    assert!(matches!(Peer::reply(recv).await, Kind::Reject(reject) if reject.reason() == RejectReason::Malformed));

    let abandoned = || core.metrics.rejected("egress_abandoned");
    let (mut send, _recv, _endpoint) = waits().await;
    send.finish().unwrap();
    until("an end is one", || abandoned() == 1).await;
    let (mut send, _recv, _endpoint) = waits().await;
    send.reset(1_u8.into()).unwrap();
    until("a reset is one", || abandoned() == 2).await;
}

#[tokio::test]
async fn a_peer_that_answers_no_probe_is_cut_off() {
    let by_default = |config: &mut crate::Config| {
        config.tunnel.dead_after = crate::config::TunnelConfig::default().dead_after;
    };
    let (gateways, _) = super::rig::linked_with(by_default, &[("east", &[]), ("west", &[])]).await;
    let peer = Peer::connect("east", &gateways[1]).await;
    let why = time::timeout(Duration::from_secs(3), peer.connection.closed()).await.expect("closed in time");
    assert!(matches!(why, quinn::ConnectionError::ApplicationClosed(_)), "{why}");
    assert_eq!(gateways[1].core().await.metrics.rejected("peer_dead"), 1);
}

#[tokio::test]
async fn a_peer_without_a_certificate_of_the_federation_gets_no_connection() {
    let (gateways, _) = connected(&[("east", &[]), ("west", &[])]).await;
    let mut tls = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anything))
        .with_no_client_auth();
    tls.alpn_protocols = vec![quic::ALPN.to_vec()];
    let config = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint = quinn::Endpoint::client(local(0)).unwrap();
    let connecting =
        endpoint.connect_with(quinn::ClientConfig::new(Arc::new(config)), gateways[1].tunnel, "x.invalid").unwrap();
    // TLS 1.3: the client may think itself connected before the server has judged.
    if let Ok(connection) = connecting.await {
        time::timeout(Duration::from_secs(3), connection.closed()).await.expect("closed in time");
    }
    let core = gateways[1].core().await;
    until("counted", || core.metrics.rejected("peer_handshake") == 1).await;
}

/// Trusts any server: the stranger does not care.
#[derive(Debug)]
struct Anything;

impl rustls::client::danger::ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
