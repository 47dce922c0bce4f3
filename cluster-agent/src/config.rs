//! The agent's configuration file: one YAML document, environment over it (`ISTHMUS_AGENT__LISTEN__LOCAL=…`).
//!
//! Everything is checked at once before anything starts; unknown keys are errors. It holds no secrets: the join token is
//! named by its file.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use isthmus_model::{
    global::Locality,
    ids::{ClusterName, TrustDomain},
};
use isthmus_runtime::{
    config::{ConfigError, Problems, Validate, load},
    telemetry::TelemetryConfig,
};
use serde::Deserialize;

/// Prefix of the environment variables that override the file.
pub const ENV_PREFIX: &str = "ISTHMUS_AGENT";

/// Unix socket paths end at 108 bytes with their NUL (unix(7)); the state folder holds `admin.sock`.
const MAX_STATE_DIR: usize = 107 - "/admin.sock".len();

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// This cluster's name in the federation.
    pub cluster: ClusterName,
    /// The cluster's own trust domain, fixed when it joins.
    pub trust_domain: TrustDomain,
    /// Where the cluster runs.
    pub locality: Locality,
    /// Keys, certificates, last-known-good state. Belongs to this agent alone.
    pub state_dir: PathBuf,
    /// Folder of manifests (`*.yaml`, `*.yml`, `*.json`).
    pub manifests: PathBuf,
    /// Join token of the control plane; read only while the cluster has not joined.
    #[serde(default)]
    pub join_token_file: Option<PathBuf>,
    /// `host:port` of the control plane, if it has moved since the cluster joined.
    #[serde(default)]
    pub control_plane: Option<String>,
    /// What the agent listens on.
    pub listen: Listen,
    /// `host:port` at which gateways, DNS servers and sidecars reach `listen.local`; default: that address.
    #[serde(default)]
    pub advertise: Option<String>,
    /// Where this cluster's virtual IPs lie.
    pub vip_range: Ipv4Net,
    /// How long certificates of workloads live.
    #[serde(default = "day", with = "humantime_serde")]
    pub workload_certificate_lifetime: Duration,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// Addresses that the agent listens on.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listen {
    /// Local gRPC and ADS, TLS.
    pub local: SocketAddr,
    /// `/livez`, `/readyz`, `/metrics`, plain HTTP.
    pub health: SocketAddr,
}

fn day() -> Duration {
    Duration::from_secs(24 * 60 * 60)
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        load(path, ENV_PREFIX)
    }

    /// What goes into local tokens, when `listen.local` is bound to `bound`.
    pub fn advertised(&self, bound: SocketAddr) -> String {
        self.advertise.clone().unwrap_or_else(|| bound.to_string())
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        let host_port = |text: &str| {
            text.rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
        };
        for (field, value) in [("controlPlane", &self.control_plane), ("advertise", &self.advertise)] {
            if let Some(text) = value
                && !host_port(text)
            {
                problems.add(field, format!("{text:?} is not host:port, for example 192.0.2.1:7500"));
            }
        }
        if self.advertise.is_none() && self.listen.local.ip().is_unspecified() {
            problems.add("advertise", "needed, since listen.local is on every address: which one do others dial?");
        }
        if self.vip_range.prefix_len() > 30 {
            problems.add("vipRange", format!("{} holds no addresses; use /30 or wider, usually /16", self.vip_range));
        }
        if self.state_dir.as_os_str().len() > MAX_STATE_DIR {
            problems.add(
                "stateDir",
                format!("the path is too long for a Unix socket in it; at most {MAX_STATE_DIR} bytes"),
            );
        }
        let lifetime = self.workload_certificate_lifetime;
        if lifetime < Duration::from_secs(60) || lifetime > 30 * day() {
            problems.add("workloadCertificateLifetime", "use 1m to 30days");
        }
        problems.within("telemetry", &self.telemetry);
        if self.manifests.starts_with(&self.state_dir) {
            problems.add("manifests", "lies inside stateDir, which belongs to the agent; use a folder of its own");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "cluster: us-east\ntrustDomain: us-east.example\nlocality: {region: us, zone: us-east-1}\n\
                        stateDir: /var/lib/a\nmanifests: /etc/a\nvipRange: 127.64.0.0/16\n\
                        listen: {local: '127.1.1.1:7500', health: '127.1.1.1:7501'}\n";

    fn load_text(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.yaml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn defaults_fill_what_may_be_left_out() {
        let config = load_text(GOOD).unwrap();
        assert_eq!(config.workload_certificate_lifetime, day());
        assert_eq!(config.advertised(config.listen.local), "127.1.1.1:7500");
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let bad =
            GOOD.replace("/16", "/31").replace("local: '127.1.1.1", "local: '0.0.0.0") + "controlPlane: nowhere\n";
        let error = load_text(&bad).unwrap_err().to_string();
        for field in ["vipRange", "advertise", "controlPlane"] {
            assert!(error.contains(field), "{field} is not in {error}");
        }
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(load_text(&format!("{GOOD}manifest: /x\n")).is_err());
    }
}
