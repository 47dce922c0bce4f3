//! Envoy's bootstrap: who it is, and that everything else comes from the launcher's Unix socket.

use std::path::Path;

use isthmus_model::ids::ClusterName;
use serde_json::{Value, json};

use super::config::Config;
use crate::xds::names::LAUNCHER_CLUSTER;

/// A reconnecting Envoy must not wait half a minute (its default) once the agent is back.
const RECONNECT_BASE: &str = "0.1s";
const RECONNECT_CAP: &str = "1s";
/// Protects the machine's file descriptors, which Envoy warns about when nothing does.
const MAX_CONNECTIONS: u32 = 50_000;

/// The document, as JSON, which Envoy reads by the file's extension.
pub(super) fn document(config: &Config, cluster: &ClusterName) -> Value {
    let grpc = json!({
        "envoy_grpc": {
            "cluster_name": LAUNCHER_CLUSTER,
            "retry_policy": { "retry_back_off": { "base_interval": RECONNECT_BASE, "max_interval": RECONNECT_CAP } },
        }
    });
    let ads = json!({ "resource_api_version": "V3", "ads": {} });
    let mut clusters = vec![pipe_cluster(LAUNCHER_CLUSTER, &config.xds_socket(), true)];
    let mut listeners = Vec::new();
    if let Some(port) = config.admin_port {
        clusters.push(pipe_cluster("envoy-admin", &config.envoy_socket(), false));
        listeners.push(json!({
            "name": "envoy-admin",
            "address": { "socket_address": { "address": config.address, "port_value": port } },
            "enable_reuse_port": false,
            "filter_chains": [{ "filters": [{
                "name": "envoy.filters.network.tcp_proxy",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                    "stat_prefix": "envoy-admin",
                    "cluster": "envoy-admin",
                },
            }]}],
        }));
    }
    json!({
        "node": { "id": config.name, "cluster": cluster },
        "admin": { "address": { "pipe": { "path": config.envoy_socket(), "mode": 0o600 } } },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [grpc],
            },
            "cds_config": ads,
            "lds_config": ads,
        },
        "static_resources": { "clusters": clusters, "listeners": listeners },
        "overload_manager": {
            "resource_monitors": [{
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": MAX_CONNECTIONS,
                },
            }],
        },
    })
}

fn pipe_cluster(name: &str, socket: &Path, http2: bool) -> Value {
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": { "pipe": { "path": socket } } } }] }],
        },
    });
    if let (true, Some(object)) = (http2, cluster.as_object_mut()) {
        let options = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { "http2_protocol_options": {} },
            }
        });
        object.insert("typed_extension_protocol_options".to_owned(), options);
    }
    cluster
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::sidecar::test_envoy;

    #[test]
    fn a_real_envoy_accepts_the_bootstrap_with_and_without_an_admin_port() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = test_envoy::config(dir.path());
        for admin_port in [None, Some(19_000)] {
            config.admin_port = admin_port;
            let path = dir.path().join("envoy.json");
            let text = document(&config, &"us-east".parse().unwrap()).to_string();
            std::fs::write(&path, text).unwrap();
            let out = Command::new(test_envoy::binary())
                .args(["--mode", "validate", "--log-level", "warn", "--config-path"])
                .arg(&path)
                .output()
                .unwrap();
            let log = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "Envoy refuses the bootstrap:\n{log}");
            assert!(!log.contains("deprecated"), "{log}");
        }
    }
}
