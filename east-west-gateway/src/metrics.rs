//! What the gateway counts. Every label has a bounded set of values: fixed words, or clusters of the federation.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use isthmus_model::{
    ids::{ClusterName, Stamp},
    local::Transport,
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
};

use isthmus_runtime::health::Registry;

use crate::{overload::Why, tunnel::registry::Tunnel};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabel {
    resource: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    cluster: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabel {
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClusterLabel {
    cluster: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GatewayLabels {
    cluster: String,
    gateway: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DialLabels {
    cluster: String,
    gateway: String,
    transport: &'static str,
}

impl DialLabels {
    fn of(cluster: &ClusterName, gateway: &str, transport: &'static str) -> Self {
        Self { cluster: cluster.to_string(), gateway: gateway.to_owned(), transport }
    }
}

/// Which way a connection is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From a local sidecar to a peer, or to a local endpoint.
    Ingress,
    /// From a peer to a local endpoint.
    Egress,
}

impl Direction {
    /// Its metric label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

type DynHistogram = Family<ClusterLabel, Histogram, fn() -> Histogram>;

/// Cheap to clone; clones count together.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    rejects: Family<ReasonLabel, Counter>,
    attempts: Family<AttemptLabels, Counter>,
    open_streams: Family<DirectionLabel, Gauge>,
    streams: Family<DirectionLabel, Counter>,
    stream_bytes: Family<DirectionLabel, Counter>,
    tunnels: Family<ClusterLabel, Gauge>,
    rtt: DynHistogram,
    first_byte: DynHistogram,
    downgraded: Family<ClusterLabel, Gauge>,
    downgrades: Family<ClusterLabel, Counter>,
    dial_failures: Family<DialLabels, Counter>,
    path_packets: Family<GatewayLabels, Counter>,
    path_lost: Family<GatewayLabels, Counter>,
    path_window: Family<GatewayLabels, Gauge>,
    ejections: Counter,
    hedges: Counter,
    epoch: Gauge,
    revision: Gauge,
    svid_expiry: Gauge,
    feed_connected: Gauge,
    feed_problems: Family<ReasonLabel, Counter>,
    carried_now: Arc<AtomicUsize>,
    overloaded: Family<ResourceLabel, Gauge>,
    scheduling_delay: Gauge<f64, AtomicU64>,
}

fn rtt_histogram() -> Histogram {
    Histogram::new([0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4])
}

fn first_byte_histogram() -> Histogram {
    Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.5, 6.0])
}

impl Metrics {
    /// Registers everything in `registry`.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            rejects: Family::default(),
            attempts: Family::default(),
            open_streams: Family::default(),
            streams: Family::default(),
            stream_bytes: Family::default(),
            tunnels: Family::default(),
            rtt: Family::new_with_constructor(rtt_histogram),
            first_byte: Family::new_with_constructor(first_byte_histogram),
            downgraded: Family::default(),
            downgrades: Family::default(),
            dial_failures: Family::default(),
            path_packets: Family::default(),
            path_lost: Family::default(),
            path_window: Family::default(),
            ejections: Counter::default(),
            hedges: Counter::default(),
            epoch: Gauge::default(),
            revision: Gauge::default(),
            svid_expiry: Gauge::default(),
            feed_connected: Gauge::default(),
            feed_problems: Family::default(),
            carried_now: Arc::default(),
            overloaded: Family::default(),
            scheduling_delay: Gauge::default(),
        };
        let m = metrics.clone();
        registry.register("isthmus_gateway_rejects", "Connections, streams and peers turned away", m.rejects);
        registry.register("isthmus_gateway_attempts", "Attempts to place a connection", m.attempts);
        registry.register("isthmus_gateway_open_streams", "Connections being carried", m.open_streams);
        registry.register("isthmus_gateway_streams", "Connections carried so far", m.streams);
        registry.register("isthmus_gateway_stream_bytes", "Bytes carried, both ways together", m.stream_bytes);
        registry.register("isthmus_gateway_tunnels", "Working links, whoever dialled them", m.tunnels);
        registry.register(
            "isthmus_gateway_links_downgraded",
            "Peers reached over TCP although QUIC is preferred",
            m.downgraded,
        );
        registry.register("isthmus_gateway_link_downgrades", "Changes from QUIC to TCP so far", m.downgrades);
        registry.register(
            "isthmus_gateway_dial_failures",
            "Attempts to reach a peer gateway that failed",
            m.dial_failures,
        );
        registry.register("isthmus_gateway_path_packets", "QUIC packets sent to a peer gateway", m.path_packets);
        registry.register("isthmus_gateway_path_packets_lost", "Of these, found lost", m.path_lost);
        registry.register(
            "isthmus_gateway_path_congestion_window_bytes",
            "Congestion window of the link that a probe came back on last",
            m.path_window,
        );
        registry.register("isthmus_gateway_tunnel_rtt_seconds", "Round trips of tunnel probes", m.rtt);
        registry.register(
            "isthmus_gateway_first_byte_seconds",
            "From ClientHello to the first byte back",
            m.first_byte,
        );
        registry.register("isthmus_gateway_ejections", "Local endpoints taken out after failures", m.ejections);
        registry.register(
            "isthmus_gateway_hedges",
            "Local endpoints asked beside, or after, one that did not answer",
            m.hedges,
        );
        registry.register("isthmus_gateway_epoch", "Epoch of the applied global state", m.epoch);
        registry.register("isthmus_gateway_revision", "Revision of the applied global state", m.revision);
        registry.register(
            "isthmus_gateway_svid_expiry_timestamp_seconds",
            "When this gateway's certificate ends",
            m.svid_expiry,
        );
        registry.register("isthmus_gateway_feed_connected", "1 while the agent's feed is connected", m.feed_connected);
        registry.register("isthmus_gateway_overloaded", "1 while nothing new is taken for want of it", m.overloaded);
        registry.register(
            "isthmus_gateway_scheduling_delay_seconds",
            "What a task waits that is ready to run, smoothed",
            m.scheduling_delay,
        );
        registry.register("isthmus_gateway_feed_problems", "What the agent sent and was refused", m.feed_problems);
        metrics
    }

    /// Something was turned away.
    pub(crate) fn reject(&self, reason: &'static str) {
        self.rejects.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// The counter of `reason`, for those that count without knowing of metrics.
    pub(crate) fn reject_counter(&self, reason: &'static str) -> Counter {
        self.rejects.get_or_create_owned(&ReasonLabel { reason })
    }

    /// How often `reason` was counted.
    #[cfg(test)]
    pub(crate) fn rejected(&self, reason: &'static str) -> u64 {
        self.rejects.get_or_create(&ReasonLabel { reason }).get()
    }

    /// One attempt to place a connection ended.
    pub(crate) fn attempt(&self, cluster: &ClusterName, outcome: &'static str) {
        self.attempts.get_or_create(&AttemptLabels { cluster: cluster.to_string(), outcome }).inc();
    }

    /// How often an attempt ended so.
    #[cfg(test)]
    pub(crate) fn attempted(&self, cluster: &ClusterName, outcome: &'static str) -> u64 {
        self.attempts.get_or_create(&AttemptLabels { cluster: cluster.to_string(), outcome }).get()
    }

    /// A connection is carried from now until the guard is dropped.
    pub(crate) fn stream(&self, direction: Direction) -> StreamGuard {
        let label = DirectionLabel { direction: direction.label() };
        self.streams.get_or_create(&label).inc();
        let gauge = self.open_streams.get_or_create_owned(&label);
        gauge.inc();
        self.carried_now.fetch_add(1, Ordering::Relaxed);
        StreamGuard { gauge, carried_now: self.carried_now.clone() }
    }

    /// How many have been carried so far, both ways, those that still are included.
    pub(crate) fn carried_so_far(&self) -> u64 {
        let of =
            |direction: Direction| self.streams.get_or_create(&DirectionLabel { direction: direction.label() }).get();
        of(Direction::Ingress) + of(Direction::Egress)
    }

    /// How many are carried now, both ways.
    pub(crate) fn carried_now(&self) -> usize {
        self.carried_now.load(Ordering::Relaxed)
    }

    /// Whether nothing new is taken for this reason.
    pub(crate) fn overloaded(&self, why: Why, is: bool) {
        self.overloaded.get_or_create(&ResourceLabel { resource: why.label() }).set(i64::from(is));
    }

    /// What a task waits that is ready to run.
    pub(crate) fn scheduling_delay(&self, delay: Duration) {
        self.scheduling_delay.set(delay.as_secs_f64());
    }

    /// How many were carried.
    #[cfg(test)]
    pub(crate) fn carried(&self, direction: Direction) -> u64 {
        self.streams.get_or_create(&DirectionLabel { direction: direction.label() }).get()
    }

    /// A carried connection ended.
    pub(crate) fn bytes(&self, direction: Direction, bytes: u64) {
        self.stream_bytes.get_or_create(&DirectionLabel { direction: direction.label() }).inc_by(bytes);
    }

    /// How many tunnels to `cluster` work.
    pub(crate) fn tunnels(&self, cluster: &ClusterName, up: usize) {
        let up = i64::try_from(up).unwrap_or(i64::MAX);
        self.tunnels.get_or_create(&ClusterLabel { cluster: cluster.to_string() }).set(up);
    }

    /// `cluster` is no peer any more.
    pub(crate) fn forget_cluster(&self, cluster: &ClusterName) {
        self.tunnels.remove(&ClusterLabel { cluster: cluster.to_string() });
        self.rtt.remove(&ClusterLabel { cluster: cluster.to_string() });
        self.downgraded.remove(&ClusterLabel { cluster: cluster.to_string() });
    }

    /// How many peers of `cluster` are reached over TCP for want of QUIC.
    pub(crate) fn downgraded(&self, cluster: &ClusterName, peers: usize) {
        let peers = i64::try_from(peers).unwrap_or(i64::MAX);
        self.downgraded.get_or_create(&ClusterLabel { cluster: cluster.to_string() }).set(peers);
    }

    /// A peer of `cluster` is from now on reached over TCP for want of QUIC.
    pub(crate) fn downgrade(&self, cluster: &ClusterName) {
        self.downgrades.get_or_create(&ClusterLabel { cluster: cluster.to_string() }).inc();
    }

    /// What a link's transport tells of its path.
    pub(crate) fn path(&self, tunnel: &Tunnel) {
        if tunnel.link.transport() == Transport::Tcp {
            return;
        }
        let labels = GatewayLabels { cluster: tunnel.cluster.to_string(), gateway: tunnel.gateway.clone() };
        let (sent, lost) = tunnel.count_packets();
        self.path_packets.get_or_create(&labels).inc_by(sent);
        self.path_lost.get_or_create(&labels).inc_by(lost);
        let window = i64::try_from(tunnel.link.path().window).unwrap_or(i64::MAX);
        self.path_window.get_or_create(&labels).set(window);
    }

    /// An attempt to reach a peer over `transport` failed.
    pub(crate) fn dial_failed(&self, cluster: &ClusterName, gateway: &str, transport: &'static str) {
        self.dial_failures.get_or_create(&DialLabels::of(cluster, gateway, transport)).inc();
    }

    /// How often.
    #[cfg(test)]
    pub(crate) fn dials_failed(&self, cluster: &ClusterName, gateway: &str, transport: &'static str) -> u64 {
        self.dial_failures.get_or_create(&DialLabels::of(cluster, gateway, transport)).get()
    }

    /// A gateway is no peer any more.
    pub(crate) fn forget_gateway(&self, cluster: &ClusterName, gateway: &str) {
        for transport in ["quic", "tcp"] {
            self.dial_failures.remove(&DialLabels::of(cluster, gateway, transport));
        }
        let labels = GatewayLabels { cluster: cluster.to_string(), gateway: gateway.to_owned() };
        self.path_packets.remove(&labels);
        self.path_lost.remove(&labels);
        self.path_window.remove(&labels);
    }

    /// A probe came back.
    pub(crate) fn rtt(&self, cluster: &ClusterName, rtt: Duration) {
        self.rtt.get_or_create(&ClusterLabel { cluster: cluster.to_string() }).observe(rtt.as_secs_f64());
    }

    /// An attempt succeeded so long after its ClientHello was complete.
    pub(crate) fn first_byte(&self, cluster: &ClusterName, after: Duration) {
        self.first_byte.get_or_create(&ClusterLabel { cluster: cluster.to_string() }).observe(after.as_secs_f64());
    }

    /// A local endpoint was taken out.
    pub(crate) fn ejection(&self) {
        self.ejections.inc();
    }

    /// How many were.
    #[cfg(test)]
    pub(crate) fn ejected(&self) -> u64 {
        self.ejections.get()
    }

    /// One more local endpoint is asked for a connection.
    pub(crate) fn hedge(&self) {
        self.hedges.inc();
    }

    /// The global state at `stamp` is in force.
    pub(crate) fn applied(&self, stamp: Stamp) {
        self.epoch.set(i64::try_from(stamp.epoch.0).unwrap_or(i64::MAX));
        self.revision.set(i64::try_from(stamp.revision.0).unwrap_or(i64::MAX));
    }

    /// The certificate in use ends then (Unix milliseconds).
    pub(crate) fn svid_expiry(&self, unix_ms: u64) {
        self.svid_expiry.set(i64::try_from(unix_ms / 1_000).unwrap_or(i64::MAX));
    }

    /// Whether the agent's feed is connected.
    pub(crate) fn feed_connected(&self, connected: bool) {
        self.feed_connected.set(i64::from(connected));
    }

    /// The agent sent something unusable.
    pub(crate) fn feed_problem(&self, reason: &'static str) {
        self.feed_problems.get_or_create(&ReasonLabel { reason }).inc();
    }
}

/// Counts one open stream while it lives.
#[derive(Debug)]
pub(crate) struct StreamGuard {
    gauge: Gauge,
    carried_now: Arc<AtomicUsize>,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.gauge.dec();
        self.carried_now.fetch_sub(1, Ordering::Relaxed);
    }
}
