//! Envoy clusters: one per upstream service port, one per own port.
//!
//! HTTP clusters do their own failing over by priority, below the choice that the load assignment already expresses; TCP
//! clusters know gateways only, for Envoy's TCP proxy cannot choose between clusters.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{
                    CircuitBreakers, Cluster, OutlierDetection,
                    circuit_breakers::Thresholds,
                    cluster::{ClusterDiscoveryType, CommonLbConfig, DiscoveryType, EdsClusterConfig, LbPolicy},
                },
                core::v3::{Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions, KeepaliveSettings},
                endpoint::v3::{
                    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
                },
            },
            extensions::upstreams::http::v3 as upstreams,
        },
        google::protobuf::Any,
    },
    util::pack_any,
};
use isthmus_model::{ids::SpiffeId, service::AppProtocol};

use super::{
    tls::{self, Sni},
    wire::{address, ads, boolean, duration, millis, percent, uint},
};

/// A path on which nothing answers a TLS handshake in this time is another's turn. Longer than the gateway's two attempts
/// together (its `ingress.pinnedTimeout`).
const HTTP_CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Behind one TCP connection the gateway may try several clusters, each with a deadline of its own.
const TCP_CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// An app on the same machine accepts at once or not at all.
const APP_CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The far gateway picks an endpoint per connection, so connections must not live for ever, nor end all at once.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);
/// Above this many requests at once a second connection opens, hence perhaps a second far endpoint.
const STREAMS_PER_CONNECTION: u32 = 100;
/// Envoy's defaults (1,024 connections, 3 retries) are a breaker nobody asked for; policies will set real ones.
const UNLIMITED: u32 = 1_000_000;

/// An upstream port that speaks HTTP; its load assignment carries the priorities.
pub(super) fn http_outbound(name: &str, identities: &BTreeSet<SpiffeId>) -> Cluster {
    Cluster {
        connect_timeout: duration(HTTP_CONNECT_TIMEOUT),
        lb_policy: LbPolicy::LeastRequest.into(),
        transport_socket: tls::upstream(identities, Sni::OfEndpoint, &["h2"]),
        typed_extension_protocol_options: [http2_between_sidecars()].into(),
        outlier_detection: Some(OutlierDetection {
            max_ejection_percent: uint(100),
            always_eject_one_host: boolean(true),
            // One lost tunnel resets all requests of a connection in the same instant, and Envoy counts each as a failure
            // of the local gateway, whose other tunnels are fine: a count in a row would eject the path to the whole
            // cluster. A share of a second's requests tells a dead host from a hiccup.
            enforcing_consecutive_local_origin_failure: uint(0),
            enforcing_failure_percentage: uint(0),
            enforcing_failure_percentage_local_origin: uint(100),
            failure_percentage_threshold: uint(90),
            failure_percentage_minimum_hosts: uint(1),
            failure_percentage_request_volume: uint(3),
            interval: millis(1000),
            ..ejection()
        }),
        ..eds(name)
    }
}

/// An upstream port of any other kind: every endpoint is a gateway, and `sni` leaves the cluster to it.
pub(super) fn tcp_outbound(name: &str, identities: &BTreeSet<SpiffeId>, sni: String) -> Cluster {
    Cluster {
        connect_timeout: duration(TCP_CONNECT_TIMEOUT),
        // A retry of the TCP proxy must not land on the gateway that just failed.
        lb_policy: LbPolicy::RoundRobin.into(),
        transport_socket: tls::upstream(identities, Sni::Fixed(sni), &[]),
        outlier_detection: Some(OutlierDetection {
            // When the service is down everywhere every gateway fails alike; ejecting all of them would only delay its return.
            max_ejection_percent: uint(50),
            ..ejection()
        }),
        ..eds(name)
    }
}

/// The workload's app.
pub(super) fn inbound(name: &str, app: SocketAddr, protocol: AppProtocol) -> Cluster {
    let typed_extension_protocol_options = match protocol {
        AppProtocol::Tcp => [].into(),
        AppProtocol::Http => [http_options(
            upstreams::http_protocol_options::explicit_http_config::ProtocolConfig::HttpProtocolOptions(
                Http1ProtocolOptions::default(),
            ),
            HttpProtocolOptions::default(),
        )]
        .into(),
        AppProtocol::Grpc => [http_options(
            upstreams::http_protocol_options::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(
                Http2ProtocolOptions::default(),
            ),
            HttpProtocolOptions::default(),
        )]
        .into(),
    };
    let endpoint = LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address: address(app), ..Default::default() })),
        ..Default::default()
    };
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        connect_timeout: duration(APP_CONNECT_TIMEOUT),
        circuit_breakers: unlimited(),
        typed_extension_protocol_options,
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: name.to_owned(),
            endpoints: vec![LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn eds(name: &str) -> Cluster {
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: ads(), service_name: String::new() }),
        circuit_breakers: unlimited(),
        common_lb_config: Some(CommonLbConfig {
            // Panic mode would send to hosts known to be dead.
            healthy_panic_threshold: percent(0.0),
            // Failover must not wait for Envoy's default window of one second.
            update_merge_window: millis(0),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Ejection by what the path did (connection failures) and by what a proxy said of the app (502 to 504). An app's own 500
/// says nothing about the path and ejects nothing. Times are short: health itself comes with the load assignment, and
/// Envoy's part is the moment until it arrives.
fn ejection() -> OutlierDetection {
    OutlierDetection {
        split_external_local_origin_errors: true,
        consecutive_local_origin_failure: uint(2),
        enforcing_consecutive_local_origin_failure: uint(100),
        consecutive_gateway_failure: uint(3),
        enforcing_consecutive_gateway_failure: uint(100),
        enforcing_consecutive_5xx: uint(0),
        enforcing_success_rate: uint(0),
        enforcing_local_origin_success_rate: uint(0),
        interval: millis(200),
        base_ejection_time: millis(1000),
        max_ejection_time: millis(3000),
        ..Default::default()
    }
}

fn http2_between_sidecars() -> (String, Any) {
    http_options(
        upstreams::http_protocol_options::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(
            Http2ProtocolOptions {
                max_concurrent_streams: uint(STREAMS_PER_CONNECTION),
                // A path that dies without a FIN (a stopped process, a lost machine) is noticed here, and only here: there
                // is no timeout per try, since that would repeat requests that are merely slow.
                connection_keepalive: Some(KeepaliveSettings {
                    interval: millis(1000),
                    timeout: millis(500),
                    ..Default::default()
                }),
                ..Default::default()
            },
        ),
        HttpProtocolOptions {
            max_connection_duration: duration(CONNECTION_LIFE),
            max_connection_duration_jitter: percent(50.0),
            ..Default::default()
        },
    )
}

fn http_options(
    protocol: upstreams::http_protocol_options::explicit_http_config::ProtocolConfig,
    common: HttpProtocolOptions,
) -> (String, Any) {
    let explicit = upstreams::http_protocol_options::ExplicitHttpConfig { protocol_config: Some(protocol) };
    let options = upstreams::HttpProtocolOptions {
        common_http_protocol_options: Some(common),
        upstream_protocol_options: Some(upstreams::http_protocol_options::UpstreamProtocolOptions::ExplicitHttpConfig(
            explicit,
        )),
        ..Default::default()
    };
    ("envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned(), pack_any(options))
}

fn unlimited() -> Option<CircuitBreakers> {
    let thresholds = Thresholds {
        max_connections: uint(UNLIMITED),
        max_pending_requests: uint(UNLIMITED),
        max_requests: uint(UNLIMITED),
        max_retries: uint(UNLIMITED),
        ..Default::default()
    };
    Some(CircuitBreakers { thresholds: vec![thresholds], ..Default::default() })
}
