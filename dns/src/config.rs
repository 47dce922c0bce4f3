//! The server's configuration: one YAML file, overlaid by `ISTHMUS_DNS__…` variables. Unknown keys are refused and all
//! problems are told at once.

use std::{net::SocketAddr, path::PathBuf};

use isthmus_model::ids::check_label;
use isthmus_runtime::{
    config::{Problems, Validate},
    telemetry::TelemetryConfig,
};
use serde::Deserialize;

/// Variables named `ISTHMUS_DNS__LISTEN__DNS` and the like override the file.
pub const ENV_PREFIX: &str = "ISTHMUS_DNS";

/// More upstreams than this are a mistake.
const MAX_UPSTREAMS: usize = 8;

/// Everything that can be set.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Unique among the cluster's DNS servers; must be the name that the agent's token was minted for.
    pub name: String,
    /// Key, certificate and last-known-good live here.
    pub state_dir: PathBuf,
    /// A one-time token of the cluster's agent; read only while there is no certificate.
    #[serde(default)]
    pub agent_token_file: Option<PathBuf>,
    /// Where to listen.
    pub listen: Listen,
    /// Resolvers, `ip:port`, for all names outside `clusterset.local`. None: such names are refused.
    #[serde(default)]
    pub upstreams: Vec<SocketAddr>,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// The addresses to bind; port 0 picks a free one.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listen {
    /// UDP and TCP, the same port.
    pub dns: SocketAddr,
    /// `/livez`, `/readyz`, `/metrics`.
    pub health: SocketAddr,
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if let Err(error) = check_label("name", &self.name) {
            problems.add("name", error.to_string());
        }
        if self.state_dir.as_os_str().is_empty() {
            problems.add("stateDir", "name a folder that this server may write to");
        }
        problems.within("telemetry", &self.telemetry);
        if self.upstreams.len() > MAX_UPSTREAMS {
            problems.add("upstreams", format!("at most {MAX_UPSTREAMS} resolvers"));
        }
        for (i, upstream) in self.upstreams.iter().enumerate() {
            let field = format!("upstreams[{i}]");
            if upstream.port() == 0 || upstream.ip().is_unspecified() {
                problems.add(field, format!("{upstream} cannot be asked; write ip:port, for example 192.0.2.1:53"));
            } else if *upstream == self.listen.dns {
                problems.add(field, format!("{upstream} is this server itself; queries would go round in circles"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_runtime::config::load;

    use super::*;

    fn check(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dns.yaml");
        std::fs::write(&path, text).unwrap();
        load(&path, "ISTHMUS_DNS_TEST").map_err(|e| e.to_string())
    }

    const GOOD: &str = "name: dns-1\nstateDir: /var/lib/isthmus-dns\nagentTokenFile: token\n\
        listen: { dns: '127.1.1.2:5353', health: '127.1.1.2:9153' }\n";

    #[test]
    fn a_minimal_file_is_enough() {
        let config = check(GOOD).unwrap();
        assert!(config.upstreams.is_empty());
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = check(&format!("{GOOD}upstream: []\n")).unwrap_err();
        assert!(error.contains("upstream"), "{error}");
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let text = GOOD.replace("dns-1", "DNS 1") + "upstreams: ['127.1.1.2:5353', '0.0.0.0:53']\n";
        let error = check(&text).unwrap_err();
        for part in ["name", "upstreams[0]", "upstreams[1]", "circles"] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }
}
