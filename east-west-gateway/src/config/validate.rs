//! What every key may be, and which keys must fit each other. Each problem names its field and says what is allowed; all are
//! told at once.

use std::time::Duration;

use isthmus_runtime::config::{Problems, Validate};

use super::Config;

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
        ] {
            check((1..=1_000_000).contains(&value), field, "use 1 to 1000000".to_owned());
        }
        for (field, deadline) in
            [("drain.deadline", self.drain.deadline), ("drain.handoverDeadline", self.drain.handover_deadline)]
        {
            check(deadline >= self.drain.accept_for, field, "must not be shorter than drain.acceptFor".to_owned());
        }
        check(self.access_log.sample_percent <= 100, "accessLog.samplePercent", "use 0 to 100".to_owned());
    }
}
