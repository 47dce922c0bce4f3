//! Envoy's configurations on the rival's side: what Istio would write for this service, as static resources.
//!
//! Sources of the defaults are Istio's own: `pilot/pkg/networking/core/route/retry/retry.go` (retries),
//! `…/core/cluster_traffic_policy.go` (outlier detection, breakers, panic threshold, least request), the mesh
//! configuration's defaults (10 s to connect, no HTTP/2 upgrade) and the gateway's AUTO_PASSTHROUGH (SNI names the cluster).

use std::{net::SocketAddr, path::Path, time::Duration};

use serde_json::{Value, json};

/// What the server sidecars are called in SNI, as Istio names its clusters there.
pub(super) const SNI: &str = "outbound_.8080_._.cart.shop.svc.cluster.local";
pub(super) const SERVER_ID: &str = "spiffe://cluster.local/ns/shop/sa/cart";
pub(super) const CLIENT_ID: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// What differs between the rival's rows: the client's sidecar, and in it only this.
#[derive(Clone, Debug)]
pub(super) struct Tuning {
    /// `h2UpgradePolicy`. Off by default: an app's HTTP/1.1 stays HTTP/1.1 between sidecars.
    pub(super) http2: bool,
    /// HTTP/2 PINGs (interval, timeout). Istio sets none.
    pub(super) pings: Option<(Duration, Duration)>,
    pub(super) connect_timeout: Duration,
    /// How often ejections are looked at.
    pub(super) interval: Duration,
    /// Share of the four gateways that may be ejected.
    pub(super) max_ejection_percent: u32,
    /// Retries that may go to another priority and after a reset.
    pub(super) expert_retries: bool,
}

/// A sidecar's or client's certificate files.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub(super) chain: String,
    pub(super) key: String,
    pub(super) root: String,
}

/// The client's sidecar: near gateways first, then the far ones.
pub(super) struct ClientSidecar<'a> {
    pub(super) listen: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) near: &'a [SocketAddr],
    pub(super) far: &'a [SocketAddr],
    pub(super) files: &'a Files,
    pub(super) access_log: &'a Path,
    pub(super) tuning: &'a Tuning,
}

impl ClientSidecar<'_> {
    pub(super) fn config(&self) -> Value {
        let tuning = self.tuning;
        let failures = json!({
            "name": "failures",
            "filter": { "status_code_filter": { "comparison": {
                "op": "GE", "value": { "default_value": 400, "runtime_key": "none" } } } },
            "typed_config": {
                "@type": typed("extensions.access_loggers.file.v3.FileAccessLog"),
                "path": self.access_log,
                "log_format": { "text_format_source": { "inline_string":
                    "%START_TIME% %RESPONSE_CODE% %RESPONSE_FLAGS% %DURATION%ms try %UPSTREAM_REQUEST_ATTEMPT_COUNT% \
                     %UPSTREAM_HOST% %RESPONSE_CODE_DETAILS% %UPSTREAM_TRANSPORT_FAILURE_REASON%\n" } },
            },
        });
        let route = json!({ "cluster": "cart", "timeout": "0s", "retry_policy": retries(tuning) });
        let listener = json!({
            "name": "outbound",
            "address": address(self.listen),
            "traffic_direction": "OUTBOUND",
            "filter_chains": [{ "filters": [http_manager("outbound", &route, &json!({ "access_log": [failures] }))] }],
        });
        let options = if tuning.http2 {
            let mut http2 = json!({});
            if let (Some((interval, timeout)), Some(http2)) = (tuning.pings, http2.as_object_mut()) {
                let keepalive = json!({ "interval": seconds(interval), "timeout": seconds(timeout) });
                http2.insert("connection_keepalive".to_owned(), keepalive);
            }
            json!({ "http2_protocol_options": http2 })
        } else {
            json!({ "http_protocol_options": {} })
        };
        let cluster = json!({
            "name": "cart",
            "type": "STATIC",
            "connect_timeout": seconds(tuning.connect_timeout),
            "lb_policy": "LEAST_REQUEST",
            "common_lb_config": { "healthy_panic_threshold": { "value": 0.0 } },
            "circuit_breakers": unlimited(),
            "outlier_detection": {
                "consecutive_5xx": 5,
                "enforcing_consecutive_5xx": 100,
                "enforcing_success_rate": 0,
                "interval": seconds(tuning.interval),
                "base_ejection_time": "30s",
                "max_ejection_percent": tuning.max_ejection_percent,
            },
            "typed_extension_protocol_options": { "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": typed("extensions.upstreams.http.v3.HttpProtocolOptions"),
                "explicit_http_config": options,
            } },
            "load_assignment": { "cluster_name": "cart", "endpoints": [
                { "priority": 0, "locality": { "region": "near" }, "lb_endpoints": hosts(self.near) },
                { "priority": 1, "locality": { "region": "far" }, "lb_endpoints": hosts(self.far) },
            ] },
            "transport_socket": {
                "name": "tls",
                "typed_config": {
                    "@type": typed("extensions.transport_sockets.tls.v3.UpstreamTlsContext"),
                    "sni": SNI,
                    "common_tls_context": tls(self.files, SERVER_ID, &[if tuning.http2 { "h2" } else { "http/1.1" }]),
                },
            },
        });
        bootstrap(self.admin, &listener, &cluster)
    }
}

/// An east-west gateway: reads the SNI, which names the cluster, and passes the bytes on to the sidecar.
pub(super) fn gateway(listen: SocketAddr, admin: SocketAddr, sidecar: SocketAddr) -> Value {
    let listener = json!({
        "name": "passthrough",
        "address": address(listen),
        "traffic_direction": "OUTBOUND",
        "listener_filters": [{
            "name": "tls_inspector",
            "typed_config": { "@type": typed("extensions.filters.listener.tls_inspector.v3.TlsInspector") },
        }],
        "filter_chains": [{
            "filter_chain_match": { "transport_protocol": "tls", "server_names": [SNI] },
            "filters": [
                { "name": "sni_cluster", "typed_config": {
                    "@type": typed("extensions.filters.network.sni_cluster.v3.SniCluster") } },
                { "name": "tcp_proxy", "typed_config": {
                    "@type": typed("extensions.filters.network.tcp_proxy.v3.TcpProxy"),
                    "stat_prefix": "passthrough", "cluster": "BlackHoleCluster" } },
            ],
        }],
    });
    bootstrap(admin, &listener, &plain_cluster(SNI, sidecar))
}

/// The app's sidecar: ends mutual TLS, passes HTTP on to the app.
pub(super) fn sidecar(listen: SocketAddr, admin: SocketAddr, app: SocketAddr, files: &Files) -> Value {
    // Istio's inbound default since 1.24.
    let route = json!({ "cluster": "app", "timeout": "0s",
        "retry_policy": { "retry_on": "reset-before-request", "num_retries": 2 } });
    let names = json!({
        "forward_client_cert_details": "APPEND_FORWARD",
        "set_current_client_cert_details": { "uri": true },
    });
    let listener = json!({
        "name": "inbound",
        "address": address(listen),
        "traffic_direction": "INBOUND",
        "filter_chains": [{
            "filters": [http_manager("inbound", &route, &names)],
            "transport_socket": {
                "name": "tls",
                "typed_config": {
                    "@type": typed("extensions.transport_sockets.tls.v3.DownstreamTlsContext"),
                    "require_client_certificate": true,
                    "common_tls_context": tls(files, CLIENT_ID, &["h2", "http/1.1"]),
                },
            },
        }],
    });
    bootstrap(admin, &listener, &plain_cluster("app", app))
}

fn retries(tuning: &Tuning) -> Value {
    let mut policy = json!({
        "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
        // Istio 1.24 took this out of its default; given to the rival all the same.
        "retriable_status_codes": [503],
        "num_retries": 2,
        "host_selection_retry_max_attempts": 5,
        "retry_host_predicate": [{ "name": "previous_hosts", "typed_config": {
            "@type": typed("extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate") } }],
    });
    if let (true, Some(policy)) = (tuning.expert_retries, policy.as_object_mut()) {
        let on = "connect-failure,refused-stream,unavailable,cancelled,reset,retriable-status-codes";
        policy.insert("retry_on".to_owned(), on.into());
        policy.insert("num_retries".to_owned(), 4.into());
        // `retryRemoteLocalities`.
        let next = json!({ "name": "previous_priorities", "typed_config": {
            "@type": typed("extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"),
            "update_frequency": 2 } });
        policy.insert("retry_priority".to_owned(), next);
    }
    policy
}

fn http_manager(name: &str, route: &Value, more: &Value) -> Value {
    let mut manager = json!({
        "@type": typed("extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": name,
        "route_config": { "name": name, "virtual_hosts": [
            { "name": name, "domains": ["*"], "routes": [{ "match": { "prefix": "/" }, "route": route }] }] },
        "http_filters": [{ "name": "router", "typed_config": {
            "@type": typed("extensions.filters.http.router.v3.Router") } }],
        "stream_idle_timeout": "0s",
    });
    if let (Some(manager), Some(more)) = (manager.as_object_mut(), more.as_object()) {
        manager.extend(more.clone());
    }
    json!({ "name": "http", "typed_config": manager })
}

fn bootstrap(admin: SocketAddr, listener: &Value, cluster: &Value) -> Value {
    json!({
        "admin": { "address": address(admin) },
        "static_resources": { "listeners": [listener], "clusters": [cluster] },
    })
}

fn plain_cluster(name: &str, to: SocketAddr) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "circuit_breakers": unlimited(),
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": hosts(&[to]) }] },
    })
}

fn unlimited() -> Value {
    let most = u32::MAX;
    json!({ "thresholds": [{
        "max_connections": most, "max_pending_requests": most, "max_requests": most, "max_retries": most }] })
}

fn tls(files: &Files, peer: &str, protocols: &[&str]) -> Value {
    json!({
        "alpn_protocols": protocols,
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{
            "certificate_chain": { "filename": files.chain }, "private_key": { "filename": files.key } }],
        "validation_context": {
            "trusted_ca": { "filename": files.root },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": peer } }],
        },
    })
}

fn hosts(addresses: &[SocketAddr]) -> Value {
    addresses.iter().map(|a| json!({ "endpoint": { "address": address(*a) } })).collect()
}

fn address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip(), "port_value": address.port() } })
}

fn typed(name: &str) -> String {
    format!("type.googleapis.com/envoy.{name}")
}

fn seconds(duration: Duration) -> String {
    format!("{}s", duration.as_secs_f64())
}
