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
    /// The admin API: who is believed, and how often one may ask.
    #[serde(default)]
    pub admin: AdminConfig,
    /// How often a cluster may publish.
    #[serde(default)]
    pub publications: Publications,
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

/// See [`Config::admin`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AdminConfig {
    /// OpenID Connect issuers whose tokens are taken.
    pub oidc: Vec<OidcIssuer>,
    /// Requests that one caller may make for any length of time.
    pub requests_per_second: u32,
    /// And at once.
    pub burst: u32,
}

/// See [`AdminConfig::oidc`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OidcIssuer {
    /// The claim `iss`, exactly.
    pub issuer: String,
    /// What the claim `aud` must name.
    pub audience: String,
    /// https URL of its keys. This or `jwksFile`.
    #[serde(default)]
    pub jwks_uri: Option<String>,
    /// A file that holds them, read again like the URL.
    #[serde(default)]
    pub jwks_file: Option<PathBuf>,
    /// The claim that names the user.
    #[serde(default = "username_claim")]
    pub username_claim: String,
    /// The claim that names its groups.
    #[serde(default = "groups_claim")]
    pub groups_claim: String,
    /// Put before the names of users and groups, so that those of two issuers differ.
    #[serde(default)]
    pub prefix: String,
    /// PEM: the roots that `jwksUri`'s server is checked with, instead of the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// The least time between two attempts to get the keys, however many tokens name unknown ones.
    #[serde(default = "keys_min_refresh", with = "humantime_serde")]
    pub keys_min_refresh: Duration,
}

/// See [`Config::publications`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Publications {
    /// Changes of one cluster's exports and gateways that are committed for any length of time.
    pub per_second: u32,
    /// And at once.
    pub burst: u32,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { oidc: Vec::new(), requests_per_second: 50, burst: 200 }
    }
}

impl Default for Publications {
    fn default() -> Self {
        Self { per_second: 20, burst: 200 }
    }
}

fn username_claim() -> String {
    "sub".to_owned()
}

fn groups_claim() -> String {
    "groups".to_owned()
}

fn keys_min_refresh() -> Duration {
    Duration::from_secs(30)
}

impl Validate for AdminConfig {
    fn validate(&self, problems: &mut Problems) {
        for (field, value) in [("requestsPerSecond", self.requests_per_second), ("burst", self.burst)] {
            if value == 0 {
                problems.add(field, "use 1 or more");
            }
        }
        for (i, oidc) in self.oidc.iter().enumerate() {
            problems.within(&format!("oidc[{i}]"), oidc);
            let others = self.oidc.iter().take(i);
            for (j, other) in others.enumerate() {
                if other.issuer == oidc.issuer {
                    problems.add(format!("oidc[{i}].issuer"), format!("is also that of oidc[{j}]"));
                }
                if other.prefix.starts_with(&oidc.prefix) || oidc.prefix.starts_with(&other.prefix) {
                    problems.add(
                        format!("oidc[{i}].prefix"),
                        format!(
                            "{:?} begins like that of oidc[{j}], {:?}: one issuer could name the other's users; give each a \
                             prefix of its own, for example \"corp:\"",
                            oidc.prefix, other.prefix
                        ),
                    );
                }
            }
        }
    }
}

impl Validate for OidcIssuer {
    fn validate(&self, problems: &mut Problems) {
        for (field, text) in [
            ("issuer", &self.issuer),
            ("audience", &self.audience),
            ("usernameClaim", &self.username_claim),
            ("groupsClaim", &self.groups_claim),
        ] {
            if text.is_empty() {
                problems.add(field, "must not be empty");
            }
        }
        match (&self.jwks_uri, &self.jwks_file) {
            (Some(_), Some(_)) => problems.add("jwksFile", "is there beside jwksUri; keep one"),
            (None, None) => problems.add("jwksUri", "name where the issuer's keys are: jwksUri or jwksFile"),
            (Some(uri), None) if !uri.starts_with("https://") => {
                problems.add("jwksUri", format!("{uri:?} is no https URL; who can change the keys can be anybody"));
            }
            _ => {}
        }
        if self.ca_file.is_some() && self.jwks_uri.is_none() {
            problems.add("caFile", "is of no use without jwksUri");
        }
        if self.keys_min_refresh < Duration::from_secs(1) {
            problems.add("keysMinRefresh", "use 1s or more");
        }
    }
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
        problems.within("admin", &self.admin);
        if self.publications.per_second == 0 {
            problems.add("publications.perSecond", "use 1 or more");
        }
        if self.publications.burst == 0 {
            problems.add("publications.burst", "use 1 or more");
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

    fn issuer(issuer: &str, prefix: &str) -> OidcIssuer {
        serde_json::from_value(serde_json::json!({
            "issuer": issuer, "audience": "isthmus", "jwksUri": "https://id.example/keys", "prefix": prefix,
        }))
        .unwrap()
    }

    fn problems(admin: &AdminConfig) -> Vec<String> {
        let mut problems = Problems::default();
        admin.validate(&mut problems);
        problems.iter().map(|(field, _)| field.to_owned()).collect()
    }

    #[test]
    fn issuers_must_not_be_able_to_name_each_others_users() {
        let of = |prefixes: [&str; 2]| AdminConfig {
            oidc: vec![issuer("https://a", prefixes[0]), issuer("https://b", prefixes[1])],
            ..AdminConfig::default()
        };
        assert_eq!(problems(&of(["a:", "b:"])), [""; 0]);
        for bad in [["", ""], ["", "b:"], ["b:", ""], ["a:", "a:b"], ["a:", "a:"]] {
            assert_eq!(problems(&of(bad)), ["oidc[1].prefix"], "{bad:?}");
        }
        let same =
            AdminConfig { oidc: vec![issuer("https://a", "a:"), issuer("https://a", "b:")], ..AdminConfig::default() };
        assert_eq!(problems(&same), ["oidc[1].issuer"]);
    }

    #[test]
    fn an_issuers_keys_come_from_one_place_over_https() {
        let check = |change: fn(&mut OidcIssuer)| {
            let mut one = issuer("https://a", "");
            change(&mut one);
            problems(&AdminConfig { oidc: vec![one], ..AdminConfig::default() })
        };
        assert_eq!(check(|_| {}), [""; 0]);
        assert_eq!(check(|o| o.jwks_uri = Some("http://id.example/keys".to_owned())), ["oidc[0].jwksUri"]);
        assert_eq!(check(|o| o.jwks_uri = None), ["oidc[0].jwksUri"]);
        assert_eq!(check(|o| o.jwks_file = Some("keys".into())), ["oidc[0].jwksFile"]);
        assert_eq!(check(|o| o.keys_min_refresh = Duration::ZERO), ["oidc[0].keysMinRefresh"]);
        assert_eq!(check(|o| o.audience.clear()), ["oidc[0].audience"]);
    }

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
