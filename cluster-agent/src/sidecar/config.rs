//! The launcher's configuration file: one YAML document, environment over it (`ISTHMUS_SIDECAR__ADDRESS=…`).

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use isthmus_model::{ids::ServiceName, service::AppProtocol};
use isthmus_runtime::{
    config::{ConfigError, Problems, Validate, load},
    telemetry::TelemetryConfig,
};
use serde::Deserialize;

/// Prefix of the environment variables that override the file.
pub const ENV_PREFIX: &str = "ISTHMUS_SIDECAR";

/// Unix socket paths end at 108 bytes with their NUL (unix(7)); the state folder holds `envoy.sock`.
const MAX_STATE_DIR: usize = 107 - "/envoy.sock".len();

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Unique among the cluster's sidecars; Envoy's node id.
    pub name: String,
    /// One-time token of the agent; read only while there is no valid certificate in `stateDir`.
    pub agent_token_file: PathBuf,
    /// Key, certificate, trust set, sockets. Belongs to this launcher alone.
    pub state_dir: PathBuf,
    /// The Envoy binary.
    pub envoy: PathBuf,
    /// Where peers reach this workload; equals its EndpointSlice address.
    pub address: IpAddr,
    /// Ports that Envoy accepts traffic on for the app.
    #[serde(default)]
    pub inbound: Vec<Inbound>,
    /// Services that the app calls, as namespace/name.
    #[serde(default)]
    pub upstreams: Vec<ServiceName>,
    /// What the launcher listens on.
    pub listen: Listen,
    /// Envoy's admin page on `address`; none: only the launcher reaches it. It has no authentication.
    #[serde(default)]
    pub admin_port: Option<u16>,
    /// Where Envoy logs; default: stderr.
    #[serde(default)]
    pub envoy_log: Option<PathBuf>,
    /// Envoy's log level.
    #[serde(default)]
    pub envoy_log_level: EnvoyLogLevel,
    /// How long requests under way may take to finish at a stop.
    #[serde(default = "drain_timeout", with = "humantime_serde")]
    pub drain_timeout: Duration,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// One port of the workload.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Inbound {
    /// Where Envoy listens, on the sidecar's address.
    pub port: u16,
    /// Where the app listens.
    pub app: SocketAddr,
    /// What the app speaks.
    pub protocol: AppProtocol,
}

/// Addresses that the launcher listens on.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listen {
    /// `/livez`, `/readyz`, `/metrics`, plain HTTP.
    pub health: SocketAddr,
}

/// As Envoy's `--log-level`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EnvoyLogLevel {
    /// Everything.
    Trace,
    /// Much.
    Debug,
    /// Envoy's own default.
    Info,
    /// What deserves a look.
    #[default]
    Warning,
    /// Failures.
    Error,
}

impl EnvoyLogLevel {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

fn drain_timeout() -> Duration {
    Duration::from_secs(5)
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        load(path, ENV_PREFIX)
    }

    /// The agent's xDS and this launcher's SDS, for Envoy.
    pub(super) fn xds_socket(&self) -> PathBuf {
        self.state_dir.join("xds.sock")
    }

    /// Envoy's admin page, for the launcher.
    pub(super) fn envoy_socket(&self) -> PathBuf {
        self.state_dir.join("envoy.sock")
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if !matches!(self.name.len(), 1..=63)
            || !self.name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
        {
            problems.add("name", "use 1 to 63 letters, digits, '-', '.' or '_'");
        }
        if self.address.is_unspecified() {
            problems.add("address", "must be the one address that peers dial, not all addresses");
        }
        if self.state_dir.as_os_str().len() > MAX_STATE_DIR {
            problems.add(
                "stateDir",
                format!("the path is too long for a Unix socket in it; at most {MAX_STATE_DIR} bytes"),
            );
        }
        let mut ports = BTreeSet::new();
        for (i, inbound) in self.inbound.iter().enumerate() {
            if inbound.port == 0 {
                problems.add(format!("inbound[{i}].port"), "use 1 to 65535");
            } else if !ports.insert(inbound.port) {
                problems.add(format!("inbound[{i}].port"), format!("{} is in use by another entry", inbound.port));
            }
            if !inbound.app.ip().is_loopback() || inbound.app.ip() == self.address {
                problems.add(
                    format!("inbound[{i}].app"),
                    format!("{} can be reached around the sidecar; let the app listen on 127.0.0.1", inbound.app),
                );
            } else if inbound.app.port() == 0 {
                problems.add(format!("inbound[{i}].app"), "name the app's port");
            }
        }
        if let Some(port) = self.admin_port
            && (port == 0 || !ports.insert(port))
        {
            problems.add("adminPort", "use a port of 1 to 65535 that no entry of `inbound` has");
        }
        if self.listen.health.ip() == self.address && ports.contains(&self.listen.health.port()) {
            problems.add("listen.health", "is one of the ports that Envoy is to listen on");
        }
        if self.upstreams.iter().collect::<BTreeSet<_>>().len() != self.upstreams.len() {
            problems.add("upstreams", "a service is named twice");
        }
        if self.drain_timeout > Duration::from_secs(600) {
            problems.add("drainTimeout", "use at most 10m");
        }
        problems.within("telemetry", &self.telemetry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
name: web-1
agentTokenFile: /run/token
stateDir: /var/lib/isthmus/web-1
envoy: /usr/bin/envoy
address: 127.1.1.31
inbound:
- { port: 8443, app: '127.0.0.1:18080', protocol: http }
upstreams: [shop/cart, shop/orders]
listen: { health: '127.1.1.31:9100' }
";

    fn problems(text: &str) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sidecar.yaml");
        std::fs::write(&path, text).unwrap();
        match Config::load(&path) {
            Ok(_) => Vec::new(),
            Err(ConfigError::Invalid { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
            Err(other) => vec![other.to_string()],
        }
    }

    fn are_about(problems: &[String], fields: &[&str]) -> bool {
        problems.len() == fields.len() && problems.iter().zip(fields).all(|(p, field)| p.contains(field))
    }

    #[test]
    fn a_minimal_file_is_enough() {
        assert!(problems(GOOD).is_empty());
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let bad =
            GOOD.replace("127.0.0.1:18080", "0.0.0.0:18080").replace("web-1\na", "web 1\na") + "adminPort: 8443\n";
        let problems = problems(&bad);
        assert!(are_about(&problems, &[": name: ", ": inbound[0].app: ", ": adminPort: "]), "{problems:#?}");
    }

    #[test]
    fn unknown_keys_are_refused() {
        let problems = problems(&(GOOD.to_owned() + "upstream: [a/b]\n"));
        assert!(are_about(&problems, &["unknown field `upstream`; did you mean `upstreams`?"]), "{problems:#?}");
    }
}
