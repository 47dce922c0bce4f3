//! Envoy as a system under test, three ways, each configured to do its best.
//!
//! In common: as many workers as our gateway has threads, no access log, circuit breakers out of the way, TLS 1.3 only. The flow
//! control windows are Envoy's defaults (16 MiB a stream, 24 MiB a connection), larger than ours. That the wanted protocol is
//! spoken and both certificates are asked for is proved from its own counters, so that a misconfigured rival is an error.

mod connect;
mod passthrough;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{
    certificates::stem,
    place::{End, Place},
    process::Process,
    system::{Ports, Setting, System, host},
};

/// More than anything here needs.
const PLENTY: u32 = 1_000_000;
const BACKLOG: u32 = 4_096;
/// Both sides call what is behind them so.
const UPSTREAM: &str = "next";
/// Prefix of the far side's HTTP counters.
const HTTP: &str = "tunnel";

/// What a configuration needs to know.
struct Site<'a> {
    system: System,
    setting: &'a Setting,
    ports: Ports,
    /// The name in the client's hello.
    name: &'a str,
}

/// Envoy's program: `ISTHMUS_ENVOY`, or where `make envoy` puts it.
pub(super) fn find(repository: &Path) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("ISTHMUS_ENVOY").map_or_else(|| repository.join(".tools/envoy/envoy"), PathBuf::from);
    ensure!(path.is_file(), "Envoy is missing at {}: run `make envoy`, or set ISTHMUS_ENVOY", path.display());
    path.canonicalize().with_context(|| format!("resolve {}", path.display()))
}

/// Starts both sides, near first.
pub(super) fn start(system: System, setting: &Setting, ports: Ports, name: &str) -> anyhow::Result<[Process; 2]> {
    let site = Site { system, setting, ports, name };
    Ok([site.start(End::Near)?, site.start(End::Far)?])
}

impl Site<'_> {
    fn start(&self, end: End) -> anyhow::Result<Process> {
        let Self { system, setting, ports, .. } = self;
        let name = format!("{}-{}", system.name(), stem(end));
        let (listener, cluster) = match system {
            System::EnvoySni => passthrough::side(self, end),
            _ => connect::side(self, end)?,
        };
        let config = json!({
            "node": { "id": name, "cluster": "bench" },
            "admin": { "address": address(ports.admin(&setting.place, end)) },
            "static_resources": { "listeners": [listener], "clusters": [cluster] },
        });
        let path = setting.dir.join(format!("{name}.json"));
        let text = serde_json::to_vec_pretty(&config).context("write Envoy's configuration")?;
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        let mut command = setting.place.command(end, &setting.envoy);
        command.args(["--use-dynamic-base-id", "--disable-hot-restart", "-l", "warn", "--concurrency"]);
        command.arg(setting.workers.to_string()).arg("-c").arg(&path);
        Process::start(&name, command, &setting.dir)
    }

    /// Where the near side finds the far one, and the far side the server.
    fn behind(&self, end: End) -> SocketAddr {
        match end {
            End::Near => self.ports.tunnel(&self.setting.place, End::Far),
            End::Far => self.setting.server(),
        }
    }

    /// Where this side listens.
    fn at(&self, end: End) -> SocketAddr {
        match end {
            End::Near => self.ports.entry(&self.setting.place),
            End::Far => self.ports.tunnel(&self.setting.place, End::Far),
        }
    }

    /// A cluster of the one endpoint behind this side.
    fn cluster(&self, end: End) -> Value {
        let limits = json!({
            "max_connections": PLENTY, "max_pending_requests": PLENTY, "max_requests": PLENTY, "max_retries": PLENTY,
        });
        json!({
            "name": UPSTREAM,
            "type": "STATIC",
            "connect_timeout": "5s",
            "circuit_breakers": { "thresholds": [limits] },
            "load_assignment": {
                "cluster_name": UPSTREAM,
                "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(self.behind(end)) } }] }],
            },
        })
    }
}

/// A listener's TCP filter chain that hands everything to what is behind.
fn tcp_proxy(more: Value) -> Value {
    let mut config = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp",
        "cluster": UPSTREAM,
    });
    merge(&mut config, more);
    json!({ "name": "envoy.filters.network.tcp_proxy", "typed_config": config })
}

fn address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": host(address.ip()), "port_value": address.port() } })
}

/// Adds the fields of `more`.
fn merge(into: &mut Value, more: Value) {
    if let (Value::Object(into), Value::Object(more)) = (into, more) {
        into.extend(more);
    }
}

/// Its own counters say that it carried what it should, as it should.
pub(super) async fn prove(system: System, place: &Place, ports: Ports) -> anyhow::Result<()> {
    let near = Counters::read(place, End::Near, ports).await?;
    let far = Counters::read(place, End::Far, ports).await?;
    let connections = format!("cluster.{UPSTREAM}.upstream_cx_total");
    near.some(&connections)?;
    far.some(&connections)?;
    match system {
        System::EnvoyH2 | System::EnvoyH3 => {
            let version = if system == System::EnvoyH2 { "http2" } else { "http3" };
            near.some(&format!("cluster.{UPSTREAM}.upstream_cx_{version}_total"))?;
            far.some(&format!("http.{HTTP}.downstream_cx_{version}_total"))?;
            far.some(&format!("http.{HTTP}.downstream_cx_ssl_total"))?;
            let (streams, carried) =
                (format!("http.{HTTP}.downstream_rq_2xx"), format!("http.{HTTP}.downstream_rq_total"));
            far.some(&streams)?;
            ensure!(
                far.get(&streams) > far.get(&carried) / 2,
                "most tunnels failed: {} of {} began",
                far.get(&streams),
                far.get(&carried)
            );
        }
        _ => {
            for side in [&near, &far] {
                side.some("tls_inspector.sni_found")?;
            }
        }
    }
    Ok(())
}

struct Counters {
    end: End,
    text: String,
}

impl Counters {
    async fn read(place: &Place, end: End, ports: Ports) -> anyhow::Result<Self> {
        let text = place.http_get(end, ports.admin(place, end), "/stats?usedonly").await;
        Ok(Self { end, text: text.context("read Envoy's counters")? })
    }

    /// Zero for a counter that nothing has counted.
    fn get(&self, name: &str) -> u64 {
        let value = self.text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.and_then(|value| value.trim().parse().ok()).unwrap_or_default()
    }

    fn some(&self, name: &str) -> anyhow::Result<()> {
        ensure!(self.get(name) > 0, "the {} side's Envoy counts no {name}", stem(self.end));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_by_its_whole_name_and_a_missing_one_is_an_error() {
        let text = "cluster.next.upstream_cx_http2_total: 2\ncluster.next.upstream_cx_http2_total_more: 7\n".to_owned();
        let counters = Counters { end: End::Near, text };
        assert_eq!(counters.get("cluster.next.upstream_cx_http2_total"), 2);
        assert!(counters.some("cluster.next.upstream_cx_http2_total").is_ok());
        let error = counters.some("cluster.next.upstream_cx_http3_total").unwrap_err().to_string();
        assert!(error.contains("upstream_cx_http3_total"), "{error}");
    }
}
