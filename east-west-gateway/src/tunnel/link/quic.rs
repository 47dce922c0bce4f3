//! The QUIC transport: one UDP socket that both dials and accepts, and links over it.
//!
//! In: the bound socket (which a successor may come to share), the gateway's identity and the federation's roots. Out: a
//! quinn endpoint whose handshakes are mutual TLS 1.3 without resumption or 0-RTT. Windows, streams and buffers are bounded
//! by configuration. A peer whose address changes keeps its connections (RFC 9000, 9): quinn's server side follows it after
//! validating the new path.

use std::{net::SocketAddr, os::fd::AsFd, sync::Arc, time::Duration};

use isthmus_identity::{
    bundle::TrustStore,
    tls::{self, ClientAuth, IdentitySource, PeerPolicy},
};
use isthmus_model::ids::{ClusterName, SpiffeId, TrustDomain};
use prometheus_client::metrics::counter::Counter;
use quinn::{
    AckFrequencyConfig, AsyncUdpSocket, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig,
    MtuDiscoveryConfig, TokioRuntime, TransportConfig, VarInt,
    congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig},
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use quinn_proto::{HashedConnectionIdGenerator, InvalidCid};
use rustls::pki_types::CertificateDer;
use socket2::SockRef;

use super::{Fresh, Link, Path, QuicLink, tolerant::TolerantConfig};
use crate::{
    config::{Congestion, TunnelConfig},
    handover::{cids::CidKey, socket::SharedSocket},
};

/// The protocol's name (ALPN).
pub(crate) const ALPN: &[u8] = b"isthmus-tunnel/1";
/// The name in the tunnel's own ClientHello. Nobody looks at it: the SPIFFE ID counts.
const SERVER_NAME: &str = "gateway.invalid";

/// RFC 9000: what every path carries, and what quinn reads by default.
const DEFAULT_PAYLOAD: u16 = 1_472;

/// Packets that the peer may leave unacknowledged, and for how long.
const ACK_EVERY: u32 = 10;
const ACK_DELAY: Duration = Duration::from_millis(5);

/// Why the endpoint, or a dialler's side of it, cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndpointError {
    /// The TLS configuration is not usable.
    #[error("make the tunnel's TLS configuration")]
    Tls(#[source] isthmus_identity::tls::TlsError),
    /// The provider lacks QUIC's initial cipher suite.
    #[error("the TLS provider cannot do QUIC")]
    Cipher(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
    /// The socket cannot be used.
    #[error("use the tunnel's UDP socket")]
    Socket(#[source] std::io::Error),
    /// A configured number does not fit QUIC.
    #[error("tunnel.{0} does not fit QUIC")]
    Number(&'static str),
}

/// What both sides of the tunnel need.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// This gateway's certificate, swapped on renewal.
    pub(crate) source: IdentitySource,
    /// The federation's roots.
    pub(crate) trust: TrustStore,
    /// The federation's trust domain.
    pub(crate) federation: TrustDomain,
}

/// The cluster whose gateway `id` names, if it is one of this federation's.
pub(crate) fn gateway_cluster(id: &SpiffeId, federation: &TrustDomain) -> Option<ClusterName> {
    if id.trust_domain() != federation {
        return None;
    }
    let segments: Vec<&str> = id.segments().collect();
    match segments.as_slice() {
        ["cluster", cluster, "gateway"] => cluster.parse().ok(),
        _ => None,
    }
}

/// Accepts the gateways of any cluster of `federation`.
pub(crate) fn any_gateway(federation: &TrustDomain) -> PeerPolicy {
    let federation = federation.clone();
    Arc::new(move |id| gateway_cluster(id, &federation).is_some())
}

/// Accepts the gateways of `cluster`, and nobody else.
pub(crate) fn gateway_of(federation: &TrustDomain, cluster: &ClusterName) -> PeerPolicy {
    let (federation, cluster) = (federation.clone(), cluster.clone());
    Arc::new(move |id| gateway_cluster(id, &federation).as_ref() == Some(&cluster))
}

/// The endpoint on `socket`, accepting from gateways of this federation. `garbage` counts datagrams that are no QUIC of
/// ours.
pub(crate) fn endpoint(
    socket: Arc<SharedSocket>,
    config: &TunnelConfig,
    identity: &Identity,
    garbage: Counter,
) -> Result<Endpoint, EndpointError> {
    grow_buffers(&*socket, config.socket_buffer_bytes);
    let key = socket.key();
    endpoint_on(socket, key, config, identity, garbage)
}

/// The same on anything that sends and receives datagrams; connection IDs are issued under `key`.
pub(crate) fn endpoint_on(
    socket: Arc<dyn AsyncUdpSocket>,
    key: CidKey,
    config: &TunnelConfig,
    identity: &Identity,
    garbage: Counter,
) -> Result<Endpoint, EndpointError> {
    let auth = ClientAuth::Required(any_gateway(&identity.federation));
    let tls = tls::server_config(&identity.source, &identity.trust, auth, &[ALPN]).map_err(EndpointError::Tls)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    server.transport_config(Arc::new(transport(config)?));
    // Handshakes that were not looked at yet; the rest is refused.
    server.max_incoming(config.max_pending_handshakes);
    let mut endpoint = EndpointConfig::default();
    endpoint
        .max_udp_payload_size(config.mtu.max(DEFAULT_PAYLOAD))
        .map_err(|_| EndpointError::Number("mtu"))?
        .cid_generator(move || Box::new(Cids { own: key.generator(), garbage: garbage.clone() }));
    Endpoint::new_with_abstract_socket(endpoint, Some(server), socket, Arc::new(TokioRuntime))
        .map_err(EndpointError::Socket)
}

/// Dials `address`, where a gateway of `cluster` is expected. The caller sets the deadline.
pub(crate) async fn dial(
    endpoint: &Endpoint,
    config: &TunnelConfig,
    identity: &Identity,
    (cluster, address): (&ClusterName, SocketAddr),
) -> Result<Fresh, DialError> {
    let connection = connect(endpoint, config, identity, (cluster, address)).await?;
    let link = QuicLink::from(connection);
    let (send, recv) = link.halves(link.open_bi().await?);
    Ok(Fresh { link: Link::Quic(link), send, recv })
}

/// The same without a control stream.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    config: &TunnelConfig,
    identity: &Identity,
    (cluster, address): (&ClusterName, SocketAddr),
) -> Result<quinn::Connection, DialError> {
    let policy = gateway_of(&identity.federation, cluster);
    let tls =
        tls::client_config(Some(&identity.source), &identity.trust, policy, &[ALPN]).map_err(EndpointError::Tls)?;
    let mut client =
        quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(EndpointError::Cipher)?));
    client.transport_config(Arc::new(transport(config)?));
    Ok(endpoint.connect_with(client, address, SERVER_NAME)?.await?)
}

/// Why dialling failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// Our side cannot be made.
    #[error("configure the dialler")]
    Configure(#[from] EndpointError),
    /// No packet was sent.
    #[error("begin the QUIC handshake")]
    Begin(#[from] quinn::ConnectError),
    /// The peer did not answer, or not well.
    #[error("finish the QUIC handshake")]
    Handshake(#[from] quinn::ConnectionError),
}

/// The peer's certificate.
pub(crate) fn leaf(connection: &quinn::Connection) -> Option<CertificateDer<'static>> {
    let identity = connection.peer_identity()?;
    identity.downcast_ref::<Vec<CertificateDer<'static>>>()?.first().cloned()
}

/// What the connection knows of its path.
pub(crate) fn path(connection: &quinn::Connection) -> Path {
    let stats = connection.stats();
    let path = stats.path;
    Path {
        rtt: path.rtt,
        sent: path.sent_packets,
        lost: path.lost_packets,
        received: stats.udp_rx.datagrams,
        window: path.cwnd,
    }
}

fn congestion(config: Congestion) -> Arc<dyn ControllerFactory + Send + Sync> {
    match config {
        Congestion::Tolerant => Arc::new(TolerantConfig::default()),
        Congestion::Cubic => Arc::new(CubicConfig::default()),
        Congestion::Bbr => Arc::new(BbrConfig::default()),
        Congestion::NewReno => Arc::new(NewRenoConfig::default()),
    }
}

fn transport(config: &TunnelConfig) -> Result<TransportConfig, EndpointError> {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(config.mtu);
    let idle = config.idle_timeout.try_into().map_err(|_| EndpointError::Number("idleTimeout"))?;
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(config.max_streams_per_peer))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(config.stream_window_bytes))
        // For the handshake and the first words; the link's share comes when it has proved itself a link.
        .receive_window(VarInt::from_u32(config.stream_window_bytes))
        .send_window(config.stream_window_bytes.into())
        .max_idle_timeout(Some(idle))
        // Signs of life even while all windows are used up and no ping gets through.
        .keep_alive_interval(Some(config.ping_interval.min(config.idle_timeout / 3)))
        // A lost first packet is sent again after three times this; 333 ms would be a second lost.
        .initial_rtt(Duration::from_millis(100))
        // Without it quinn sends the whole of one stream before anything else, whatever its priority: pongs behind megabytes.
        .send_fairness(true)
        .mtu_discovery_config(Some(discovery))
        .congestion_controller_factory(congestion(config.congestion))
        .ack_frequency_config(Some(acknowledgements()))
        .datagram_receive_buffer_size(None);
    Ok(transport)
}

/// What is asked of the peer (QUIC's acknowledgement frequency extension). By RFC 9000 it would acknowledge every other packet,
/// which for small requests is a third of all datagrams. What shows a loss is still acknowledged at once.
fn acknowledgements() -> AckFrequencyConfig {
    let mut config = AckFrequencyConfig::default();
    config.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY)).max_ack_delay(Some(ACK_DELAY));
    config
}

/// The system's default of 208 KiB loses packets even on loopback. It may grant less than asked for.
fn grow_buffers(socket: &impl AsFd, bytes: usize) {
    let socket = SockRef::from(socket);
    let asked = socket.set_recv_buffer_size(bytes).and_then(|()| socket.set_send_buffer_size(bytes));
    // Linux reports twice what it grants.
    let granted = socket.recv_buffer_size().map(|n| n / 2).unwrap_or_default();
    if asked.is_err() || granted < bytes {
        tracing::info!(
            granted,
            asked = bytes,
            "the system limits UDP buffers; raise net.core.rmem_max and net.core.wmem_max for bulk throughput"
        );
    }
}

/// Connection IDs that tell their own from others', so that datagrams which belong to no connection can be counted.
struct Cids {
    own: HashedConnectionIdGenerator,
    garbage: Counter,
}

impl ConnectionIdGenerator for Cids {
    fn generate_cid(&mut self) -> ConnectionId {
        self.own.generate_cid()
    }

    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        self.own.validate(cid).inspect_err(|_| {
            self.garbage.inc();
        })
    }

    fn cid_len(&self) -> usize {
        self.own.cid_len()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        self.own.cid_lifetime()
    }
}
