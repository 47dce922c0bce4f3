//! The control plane's configuration file: its keys, their defaults, and what is wrong with one.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use isthmus_model::{
    global::Settings,
    ids::{NodeName, TrustDomain},
};
use isthmus_runtime::{
    config::{Problems, Validate},
    telemetry::TelemetryConfig,
};
use serde::Deserialize;

/// Everything the control plane can be told.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// This node's name, an RFC 1123 label; part of its SPIFFE ID.
    pub node: String,
    /// The federation's trust domain, and the suffix of its own names. Fixed once the federation is founded.
    pub federation: TrustDomain,
    /// Where the log, the CA and the administrator's credentials are kept.
    pub state_dir: PathBuf,
    /// Where it listens.
    pub listen: Listen,
    /// `host:port` where agents and other nodes dial this one; goes into join tokens. Default: the bound gRPC address.
    #[serde(default)]
    pub advertise: Option<String>,
    /// The token with which this node joins a control plane that runs (`isthmusctl cp add NODE`); read only while
    /// `stateDir` holds no state. Without it the node founds a control plane of its own.
    #[serde(default)]
    pub join_token_file: Option<PathBuf>,
    /// Federation-wide settings with which a control plane is founded. Afterwards `isthmusctl apply` changes them.
    #[serde(default)]
    pub settings: Settings,
    /// The consensus engine.
    #[serde(default)]
    pub raft: Raft,
    /// How long open sessions may take to end after SIGTERM.
    #[serde(default = "drain_grace", with = "humantime_serde")]
    pub drain_grace: Duration,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
    /// Start a new epoch. Not a key of the file, lest it happen at each start: `--new-epoch`.
    #[serde(skip)]
    pub new_epoch: bool,
}

/// Listening addresses. Port 0 takes any free port.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listen {
    /// The federation API, for agents.
    pub grpc: SocketAddr,
    /// The admin API, for `isthmusctl`.
    pub admin: SocketAddr,
    /// `/livez`, `/readyz`, `/metrics`, without TLS.
    pub health: SocketAddr,
}

/// See [`Config::raft`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Raft {
    /// Log entries after which a snapshot is written and the log cut.
    pub snapshot_after_entries: u64,
    /// Size of the log's files, in bytes. They are reserved whole, so that a full disk is found when one is begun.
    pub segment_bytes: u64,
}

/// The smallest file of a log.
const MIN_SEGMENT: u64 = 256 << 10;

impl Default for Raft {
    fn default() -> Self {
        Self { snapshot_after_entries: 1000, segment_bytes: 64 << 20 }
    }
}

fn drain_grace() -> Duration {
    Duration::from_secs(10)
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if let Err(error) = self.node.parse::<NodeName>() {
            problems.add("node", error.to_string());
        }
        if self.state_dir.as_os_str().is_empty() {
            problems.add("stateDir", "name a folder");
        }
        match &self.advertise {
            Some(address) if !is_host_port(address) => {
                problems.add("advertise", format!("{address:?} is not host:port, for example 203.0.113.7:7443"));
            }
            None if self.listen.grpc.ip().is_unspecified() => {
                problems.add("advertise", "needed when listen.grpc is a wildcard address: where do agents dial?");
            }
            _ => {}
        }
        let addresses = [
            ("listen.grpc", self.listen.grpc),
            ("listen.admin", self.listen.admin),
            ("listen.health", self.listen.health),
        ];
        for (i, (field, address)) in addresses.iter().enumerate() {
            let earlier = addresses.iter().take(i).find(|(_, other)| other == address && address.port() != 0);
            if let Some((other, _)) = earlier {
                problems.add(*field, format!("{address} is also {other}; each needs its own"));
            }
        }
        for (field, message) in self.settings.problems() {
            problems.add(format!("settings.{field}"), message);
        }
        if self.raft.snapshot_after_entries == 0 {
            problems.add("raft.snapshotAfterEntries", "use 1 or more");
        }
        if self.raft.segment_bytes < MIN_SEGMENT {
            problems.add("raft.segmentBytes", format!("use {MIN_SEGMENT} or more"));
        }
        problems.within("telemetry", &self.telemetry);
        if self.drain_grace.is_zero() {
            problems.add("drainGrace", "use more than 0, for example 10s");
        }
    }
}

/// `host:port` with a host and a port from 1.
pub(crate) fn is_host_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        !host.is_empty() && (bracketed || !host.contains(':')) && port.parse::<u16>().is_ok_and(|port| port > 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_to_dial_needs_host_and_port() {
        for good in ["127.1.0.1:7443", "cp.example:443", "[::1]:7443"] {
            assert!(is_host_port(good), "{good}");
        }
        for bad in ["", "cp.example", "cp.example:", ":443", "cp.example:0", "::1:7443", "cp.example:70000"] {
            assert!(!is_host_port(bad), "{bad}");
        }
    }
}
