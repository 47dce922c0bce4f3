//! The gateway's configuration: one YAML file, every key but the first few with a default.
//!
//! In: what `isthmus_runtime::config::load` reads. What holds after validation: limits are non-zero, deadlines are
//! ordered, ports do not overlap. Errors name the field and say what is allowed.

mod checks;
#[cfg(test)]
mod reference;
mod tunnel;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use isthmus_runtime::{
    config::{Problems, Validate},
    telemetry::TelemetryConfig,
};
use serde::Deserialize;

pub use self::tunnel::{Congestion, LinkTransport, TcpConfig, TunnelConfig};

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Unique within the cluster, a DNS label; the name that the one-time token was minted for.
    pub name: String,
    /// Where the key, the certificate and the last known good state are kept.
    pub state_dir: PathBuf,
    /// The one-time token from `isthmus-agent token gateway NAME`; read only while there is no certificate.
    #[serde(default)]
    pub agent_token_file: Option<PathBuf>,
    /// Where to listen.
    pub listen: Listen,
    /// The address that peers dial (UDP, and TCP where a link uses that), if it is not `listen.tunnel`.
    #[serde(default)]
    pub advertise: Option<SocketAddr>,
    /// Peers cannot dial this gateway (NAT, a firewall): it dials them, and both directions use those links.
    #[serde(default)]
    pub dial_only: bool,
    /// Tunnels to other clusters' gateways.
    #[serde(default)]
    pub tunnel: TunnelConfig,
    /// Connections from local sidecars.
    #[serde(default)]
    pub ingress: IngressConfig,
    /// Streams from peers to local endpoints.
    #[serde(default)]
    pub egress: EgressConfig,
    /// When nothing new is taken.
    #[serde(default)]
    pub overload: OverloadConfig,
    /// What happens on SIGTERM.
    #[serde(default)]
    pub drain: DrainConfig,
    /// One line per carried connection.
    #[serde(default)]
    pub access_log: AccessLogConfig,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// Addresses and ports.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listen {
    /// For tunnels, UDP (accepted and dialled from) and TCP (accepted).
    pub tunnel: SocketAddr,
    /// The IP that local sidecars dial.
    pub local: IpAddr,
    /// TCP: here the gateway chooses the cluster. 0 takes a free port (tests).
    pub auto_port: u16,
    /// TCP: traffic pinned to the cluster with index i enters at this plus i. 0 takes free ports (tests).
    pub pinned_port_base: u16,
    /// `/livez`, `/readyz`, `/metrics`, `/debug/…`.
    pub health: SocketAddr,
}

/// What local sidecars may do, and how their connections are placed.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IngressConfig {
    /// From accept to a complete ClientHello.
    #[serde(with = "humantime_serde")]
    pub hello_timeout: Duration,
    /// Largest ClientHello; also all that is held for a replay.
    pub max_hello_bytes: usize,
    /// Silence that ends one attempt.
    #[serde(with = "humantime_serde")]
    pub attempt_timeout: Duration,
    /// All attempts of a connection that is pinned to a cluster; shorter than Envoy's connect timeout.
    #[serde(with = "humantime_serde")]
    pub pinned_timeout: Duration,
    /// Attempts on the auto port.
    pub max_attempts: usize,
    /// Open local connections.
    pub max_connections: usize,
    /// Of these, connections whose ClientHello is still to come.
    pub max_pending_hellos: usize,
    /// And of those, connections from one source address.
    pub max_pending_hellos_per_source: usize,
    /// A carried connection without a byte either way for so long is reset.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// A carried connection is reset when it is so old, however busy it is; 0s: never.
    #[serde(with = "humantime_serde")]
    pub max_lifetime: Duration,
    /// Replays allowed as a share of new connections, in percent.
    pub replay_percent: u32,
    /// Replays always allowed, per second.
    pub replay_floor_per_second: u32,
}

impl Default for IngressConfig {
    fn default() -> Self {
        Self {
            hello_timeout: Duration::from_secs(5),
            max_hello_bytes: 16 * 1024,
            attempt_timeout: Duration::from_secs(1),
            pinned_timeout: Duration::from_millis(1_400),
            max_attempts: 6,
            max_connections: 20_000,
            max_pending_hellos: 4_096,
            max_pending_hellos_per_source: 256,
            idle_timeout: Duration::from_secs(3_600),
            max_lifetime: Duration::ZERO,
            replay_percent: 20,
            replay_floor_per_second: 50,
        }
    }
}

/// How streams reach local endpoints.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EgressConfig {
    /// Streams from all peers together; no cluster takes them all.
    pub max_streams: usize,
    /// For the TCP connection to an endpoint.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Endpoints tried for one stream.
    pub max_endpoints: usize,
    /// An endpoint that no traffic has told of for so long is looked at with a plain connect. 0s: never.
    #[serde(with = "humantime_serde")]
    pub health_interval: Duration,
    /// First pause before a failed endpoint is probed again, or a service is tried again at a cluster where it failed; doubles with each failure in a row.
    #[serde(with = "humantime_serde")]
    pub ejection_base: Duration,
    /// Longest such pause.
    #[serde(with = "humantime_serde")]
    pub ejection_max: Duration,
}

impl Default for EgressConfig {
    fn default() -> Self {
        Self {
            max_streams: 20_000,
            connect_timeout: Duration::from_millis(500),
            max_endpoints: 3,
            health_interval: Duration::from_secs(5),
            ejection_base: Duration::from_secs(1),
            ejection_max: Duration::from_secs(30),
        }
    }
}

/// Beyond which use of memory and processors new connections and streams are turned away; running ones go on.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OverloadConfig {
    /// Resident memory in bytes; if absent, 85 % of the machine's or of the cgroup's limit.
    pub max_memory_bytes: Option<u64>,
    /// What a task that is ready to run may wait, smoothed, for longer than a second.
    #[serde(with = "humantime_serde")]
    pub max_scheduling_delay: Duration,
}

impl Default for OverloadConfig {
    fn default() -> Self {
        Self { max_memory_bytes: None, max_scheduling_delay: Duration::from_millis(100) }
    }
}

/// The two steps of a drain.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DrainConfig {
    /// New connections are still taken for so long, while agent and peers turn away.
    #[serde(with = "humantime_serde")]
    pub accept_for: Duration,
    /// Running connections may go on for so long, counted from the signal.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// The same when a successor has taken over: nobody waits for this gateway's end, so they may take their time.
    #[serde(with = "humantime_serde")]
    pub handover_deadline: Duration,
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self {
            accept_for: Duration::from_secs(1),
            deadline: Duration::from_secs(10),
            handover_deadline: Duration::from_secs(600),
        }
    }
}

/// Which carried connections are logged at INFO. Failed ones always are; the rest is at DEBUG.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AccessLogConfig {
    /// Share of the successful ones, in percent.
    pub sample_percent: u32,
}

impl Config {
    /// Files that are open when all limits on connections are reached: a carried connection has one at each end, where the
    /// far end may be a link over TCP.
    pub(crate) fn open_files(&self) -> u64 {
        let tcp = self.tunnel.transport != LinkTransport::Quic
            || self.tunnel.links.values().any(|over| *over != LinkTransport::Quic);
        let ends = if tcp { 2 } else { 1 };
        let carried = (self.ingress.max_connections + self.egress.max_streams) * ends;
        u64::try_from(carried + self.tunnel.tcp.max_pending_handshakes).unwrap_or(u64::MAX)
    }

    /// The address that peers dial, given the one that was bound; `None`: they cannot.
    pub(crate) fn advertised(&self, bound: SocketAddr) -> Option<SocketAddr> {
        (!self.dial_only).then(|| self.advertise.unwrap_or(bound))
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        let mut check = |ok: bool, field: &str, message: String| {
            if !ok {
                problems.add(field, message);
            }
        };
        let label = isthmus_model::ids::check_label("gateway name", &self.name);
        check(label.is_ok(), "name", label.err().map(|e| e.to_string()).unwrap_or_default());
        let (auto, base) = (self.listen.auto_port, self.listen.pinned_port_base);
        check(
            auto == 0 || base == 0 || auto <= base,
            "listen.autoPort",
            format!("must not lie above listen.pinnedPortBase ({base}): those ports belong to clusters"),
        );
        for (field, ip) in [("listen.local", self.listen.local), ("listen.tunnel", self.listen.tunnel.ip())] {
            let told = self.advertise.is_some() || self.dial_only;
            let known = !ip.is_unspecified() || (field == "listen.tunnel" && told);
            check(known, field, "sidecars and peers must be told an address: name one of this machine's".to_owned());
        }
        check(
            !(self.dial_only && self.advertise.is_some()),
            "advertise",
            "dialOnly says that peers cannot dial: leave one of the two out".to_owned(),
        );
        let t = &self.tunnel;
        check((1_200..=6_400).contains(&t.mtu), "tunnel.mtu", "use 1200 to 6400".to_owned());
        check(!t.ping_interval.is_zero(), "tunnel.pingInterval", "must not be zero".to_owned());
        check(
            t.dead_after >= t.ping_interval * 2,
            "tunnel.deadAfter",
            "must be at least twice tunnel.pingInterval".to_owned(),
        );
        check(t.idle_timeout > t.dead_after, "tunnel.idleTimeout", "must exceed tunnel.deadAfter".to_owned());
        check(t.max_streams_per_peer >= 2, "tunnel.maxStreamsPerPeer", "must be at least 2".to_owned());
        check(
            t.stream_window_bytes >= 16 * 1024 && t.connection_window_bytes >= t.stream_window_bytes,
            "tunnel.streamWindowBytes",
            "must be at least 16384, and at most tunnel.connectionWindowBytes".to_owned(),
        );
        check(
            t.total_window_bytes >= t.connection_window_bytes.into(),
            "tunnel.totalWindowBytes",
            "must be at least tunnel.connectionWindowBytes".to_owned(),
        );
        check((1..=16).contains(&t.connections_per_peer), "tunnel.connectionsPerPeer", "use 1 to 16".to_owned());
        check(
            t.tcp.max_warm >= t.tcp.min_warm.max(1) && t.tcp.max_connections_per_link > t.tcp.max_warm,
            "tunnel.tcp.maxWarm",
            "must be at least 1 and tunnel.tcp.minWarm, and below tunnel.tcp.maxConnectionsPerLink".to_owned(),
        );
        check(
            t.tcp.idle_timeout <= Duration::from_secs(60) && t.tcp.idle_timeout >= Duration::from_secs(1),
            "tunnel.tcp.idleTimeout",
            "use 1s to 60s".to_owned(),
        );
        let i = &self.ingress;
        check(
            (512..=64_000).contains(&i.max_hello_bytes),
            "ingress.maxHelloBytes",
            "use 512 to 64000; a post-quantum ClientHello takes about 1800".to_owned(),
        );
        check(i.attempt_timeout >= Duration::from_millis(50), "ingress.attemptTimeout", "use 50ms or more".to_owned());
        check(
            i.pinned_timeout >= i.attempt_timeout,
            "ingress.pinnedTimeout",
            "must not be shorter than ingress.attemptTimeout".to_owned(),
        );
        check(
            i.max_lifetime.is_zero() || i.max_lifetime >= Duration::from_secs(1),
            "ingress.maxLifetime",
            "use 1s or more, or 0s for no limit".to_owned(),
        );
        check(
            i.replay_percent <= 100,
            "ingress.replayPercent",
            "use 0 to 100: more than one replay for each connection makes a brown-out worse".to_owned(),
        );
        let o = &self.overload;
        check(
            o.max_memory_bytes.is_none_or(|bytes| bytes >= 64 << 20),
            "overload.maxMemoryBytes",
            "use 67108864 (64 MiB) or more; an idle gateway takes some 20 MiB".to_owned(),
        );
        check(
            o.max_scheduling_delay >= Duration::from_millis(10),
            "overload.maxSchedulingDelay",
            "use 10ms or more: timers are late by a few".to_owned(),
        );
        let e = &self.egress;
        check(
            !e.ejection_base.is_zero() && e.ejection_max >= e.ejection_base,
            "egress.ejectionBase",
            "must be above zero and at most egress.ejectionMax".to_owned(),
        );
        for (field, value) in [
            ("ingress.maxAttempts", i.max_attempts),
            ("ingress.maxConnections", i.max_connections),
            ("ingress.maxPendingHellos", i.max_pending_hellos),
            ("ingress.maxPendingHellosPerSource", i.max_pending_hellos_per_source),
            ("egress.maxStreams", e.max_streams),
            ("egress.maxEndpoints", e.max_endpoints),
            ("tunnel.maxConnections", t.max_connections),
            ("tunnel.maxConnectionsPerCluster", t.max_connections_per_cluster),
            ("tunnel.maxPendingHandshakes", t.max_pending_handshakes),
            ("tunnel.maxPendingHandshakesPerSource", t.max_pending_handshakes_per_source),
            ("tunnel.tcp.maxConnectionsPerLink", t.tcp.max_connections_per_link),
            ("tunnel.tcp.maxConnections", t.tcp.max_connections),
            ("tunnel.tcp.maxPendingHandshakes", t.tcp.max_pending_handshakes),
            ("tunnel.tcp.maxPendingHandshakesPerSource", t.tcp.max_pending_handshakes_per_source),
        ] {
            check((1..=1_000_000).contains(&value), field, "use 1 to 1000000".to_owned());
        }
        for (field, time) in [
            ("tunnel.handshakeTimeout", t.handshake_timeout),
            ("ingress.helloTimeout", i.hello_timeout),
            ("ingress.idleTimeout", i.idle_timeout),
            ("egress.connectTimeout", e.connect_timeout),
        ] {
            check(time >= Duration::from_millis(1), field, "must not be zero: nothing would be carried".to_owned());
        }
        for (field, deadline) in
            [("drain.deadline", self.drain.deadline), ("drain.handoverDeadline", self.drain.handover_deadline)]
        {
            check(deadline >= self.drain.accept_for, field, "must not be shorter than drain.acceptFor".to_owned());
        }
        check(self.access_log.sample_percent <= 100, "accessLog.samplePercent", "use 0 to 100".to_owned());
        checks::check(self, problems);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const MINIMAL: &str = "
name: gateway-1
stateDir: /var/lib/isthmus/gateway-1
listen:
  tunnel: 127.1.1.11:15443
  local: 127.1.1.11
  autoPort: 15440
  pinnedPortBase: 15500
  health: 127.1.1.11:15080
";

    pub(super) fn load(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gateway.yaml");
        std::fs::write(&path, text).unwrap();
        isthmus_runtime::config::load(&path, "ISTHMUS_GATEWAY_TEST").map_err(|e| isthmus_runtime::tasks::chain(&e))
    }

    #[test]
    fn a_minimal_file_is_valid_and_has_the_documented_defaults() {
        let config = load(MINIMAL).unwrap();
        assert_eq!(config.tunnel.ping_interval, Duration::from_millis(100));
        assert_eq!(config.tunnel.dead_after, Duration::from_millis(400));
        assert_eq!(config.ingress.hello_timeout, Duration::from_secs(5));
        assert_eq!(config.drain.deadline, Duration::from_secs(10));
    }

    #[test]
    fn durations_are_written_for_people() {
        let config = load(&format!("{MINIMAL}ingress:\n  attemptTimeout: 750ms\n")).unwrap();
        assert_eq!(config.ingress.attempt_timeout, Duration::from_millis(750));
    }

    #[test]
    fn limits_with_which_nothing_would_be_carried_are_refused() {
        for (section, key, value) in [
            ("ingress", "idleTimeout", "0s"),
            ("ingress", "helloTimeout", "0s"),
            ("tunnel", "handshakeTimeout", "0s"),
            ("egress", "connectTimeout", "0s"),
        ] {
            let error = load(&format!("{MINIMAL}{section}:\n  {key}: {value}\n")).unwrap_err();
            assert!(error.contains(&format!("{section}.{key}")), "{error}");
        }
        for (key, value) in [
            ("maxConnectionsPerLink", "18446744073709551615"),
            ("maxPendingHandshakes", "0"),
            ("maxPendingHandshakesPerSource", "0"),
        ] {
            let error = load(&format!("{MINIMAL}tunnel:\n  tcp:\n    {key}: {value}\n")).unwrap_err();
            assert!(error.contains(&format!("tunnel.tcp.{key}")), "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_and_all_problems_are_told_at_once() {
        assert!(load(&format!("{MINIMAL}colour: blue\n")).unwrap_err().contains("colour"));
        let bad = format!("{MINIMAL}tunnel:\n  mtu: 9000\ningress:\n  maxHelloBytes: 10\n");
        let error = load(&bad).unwrap_err();
        assert!(error.contains("tunnel.mtu") && error.contains("ingress.maxHelloBytes"), "{error}");
    }
}
