//! What the configuration says of links to other clusters' gateways: `tunnel` and all below it.

use std::{collections::BTreeMap, time::Duration};

use isthmus_model::ids::ClusterName;
use serde::Deserialize;

/// Links to other clusters' gateways, and their probing.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TunnelConfig {
    /// Largest UDP payload that path discovery may settle on. Above 1,452 only where the whole path is known to carry it.
    pub mtu: u16,
    /// Between probes on each tunnel.
    #[serde(with = "humantime_serde")]
    pub ping_interval: Duration,
    /// A tunnel without an answer for so long is closed, its streams reset.
    #[serde(with = "humantime_serde")]
    pub dead_after: Duration,
    /// QUIC's own idle timeout, a net below `deadAfter`.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// From a peer's first packet, or ours, to a working control stream.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// Longest pause between attempts to reach a peer.
    #[serde(with = "humantime_serde")]
    pub dial_backoff_max: Duration,
    /// Streams that a peer may have open on one link.
    pub max_streams_per_peer: u32,
    /// Links that peers may have made.
    pub max_connections: usize,
    /// Of these, links of the gateways of one cluster together.
    pub max_connections_per_cluster: usize,
    /// Handshakes of peers under way (QUIC).
    pub max_pending_handshakes: usize,
    /// Of these, from one source address.
    pub max_pending_handshakes_per_source: usize,
    /// Unread bytes that one stream may hold.
    pub stream_window_bytes: u32,
    /// Unread bytes that all streams of one connection may hold (QUIC).
    pub connection_window_bytes: u32,
    /// Of all connections together, dealt evenly (QUIC).
    pub total_window_bytes: u64,
    /// Unread bytes that slow readers of all connections may hold beyond that, before the slowest is given up.
    pub slow_reader_bytes: u64,
    /// Asked of the system for the UDP socket, each way.
    pub socket_buffer_bytes: usize,
    /// QUIC's congestion controller.
    pub congestion: Congestion,
    /// While a path loses packets, small ones are sent twice (QUIC): a lost request then costs no round trip.
    pub redundancy: bool,
    /// QUIC connections to each peer gateway.
    pub connections_per_peer: usize,
    /// What the links that this gateway dials run over.
    pub transport: LinkTransport,
    /// The same for links to single clusters, by the cluster's name.
    pub links: BTreeMap<ClusterName, LinkTransport>,
    /// With `auto`: TCP is used when there is no QUIC for so long.
    #[serde(with = "humantime_serde")]
    pub fallback_after: Duration,
    /// Links over TCP.
    pub tcp: TcpConfig,
}

/// What a link may run over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LinkTransport {
    /// QUIC only: whoever blocks UDP does not choose the transport.
    #[default]
    Quic,
    /// TCP only.
    Tcp,
    /// QUIC, and TCP while QUIC does not get through. The change is logged, counted, and shown in the status.
    Auto,
}

/// QUIC's congestion controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Congestion {
    /// CUBIC that does not take sparse losses without a queue for congestion.
    #[default]
    Tolerant,
    /// RFC 9438.
    Cubic,
    /// Model-based; for paths that lose packets without being congested. Experimental in the library we use.
    Bbr,
    /// RFC 9002, 7.
    NewReno,
}

/// The connections of a link over TCP: each carries one stream.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TcpConfig {
    /// Kept warm in quiet times.
    pub min_warm: usize,
    /// Kept warm at most, when streams are opened often.
    pub max_warm: usize,
    /// A warm connection is replaced when it gets so old unused.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// Connections of one link: streams, warm ones, and the control connection.
    pub max_connections_per_link: usize,
    /// Connections of all peers' links together, used or not; no cluster takes them all.
    pub max_connections: usize,
    /// Sent bytes that are not acknowledged for so long end a connection (TCP_USER_TIMEOUT).
    #[serde(with = "humantime_serde")]
    pub user_timeout: Duration,
    /// Handshakes of peers under way.
    pub max_pending_handshakes: usize,
    /// Of these, from one source address.
    pub max_pending_handshakes_per_source: usize,
}

impl Default for TcpConfig {
    fn default() -> Self {
        Self {
            min_warm: 4,
            max_warm: 64,
            idle_timeout: Duration::from_secs(60),
            max_connections_per_link: 16_384,
            max_connections: 32_768,
            user_timeout: Duration::from_secs(10),
            max_pending_handshakes: 1_024,
            max_pending_handshakes_per_source: 256,
        }
    }
}

impl TunnelConfig {
    /// What links to `cluster` run over.
    pub(crate) fn transport_to(&self, cluster: &ClusterName) -> LinkTransport {
        self.links.get(cluster).copied().unwrap_or(self.transport)
    }
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            mtu: 1_452,
            ping_interval: Duration::from_millis(100),
            dead_after: Duration::from_millis(400),
            idle_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            dial_backoff_max: Duration::from_secs(2),
            max_streams_per_peer: 4_096,
            max_connections: 1_024,
            max_connections_per_cluster: 64,
            max_pending_handshakes: 1_024,
            max_pending_handshakes_per_source: 256,
            stream_window_bytes: 4 << 20,
            connection_window_bytes: 128 << 20,
            total_window_bytes: 2 << 30,
            slow_reader_bytes: 1 << 30,
            socket_buffer_bytes: 4 << 20,
            congestion: Congestion::default(),
            redundancy: true,
            connections_per_peer: 1,
            transport: LinkTransport::default(),
            links: BTreeMap::new(),
            fallback_after: Duration::from_secs(1),
            tcp: TcpConfig::default(),
        }
    }
}
