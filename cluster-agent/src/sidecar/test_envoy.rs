//! Where tests find the real Envoy.

use std::path::{Path, PathBuf};

use super::config::{Config, EnvoyLogLevel, Inbound, Listen};

/// `ISTHMUS_ENVOY`, else what `make envoy` fetched. Fails the test that asks for it if there is none.
pub(crate) fn binary() -> PathBuf {
    let path = match std::env::var_os("ISTHMUS_ENVOY") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/envoy/envoy"),
    };
    assert!(path.is_file(), "no Envoy at {}: run `make envoy`, or set ISTHMUS_ENVOY to a binary", path.display());
    path
}

/// A launcher's configuration with its state in `dir`, without ports.
pub(crate) fn config(dir: &Path) -> Config {
    Config {
        name: "web-1".to_owned(),
        agent_token_file: dir.join("token"),
        state_dir: dir.to_owned(),
        envoy: binary(),
        address: "127.0.0.1".parse().unwrap(),
        inbound: Vec::<Inbound>::new(),
        upstreams: Vec::new(),
        listen: Listen { health: "127.0.0.1:0".parse().unwrap() },
        admin_port: None,
        envoy_log: Some(dir.join("envoy.log")),
        envoy_log_level: EnvoyLogLevel::Info,
        drain_timeout: std::time::Duration::from_secs(2),
        telemetry: Default::default(),
    }
}
