//! Listeners: one per upstream port at its virtual address, one per own port at the workload's address.
//!
//! No listener inspects first bytes: the declared protocol decides, so that server-first protocols work. No port is shared
//! (`SO_REUSEPORT` off), so that two sidecars, or a sidecar and an app, never split an address in silence: the second one is
//! refused, and the refusal becomes a problem in the status.

use std::net::SocketAddr;

use envoy_types::{
    pb::envoy::{
        config::{
            accesslog::v3::{AccessLogFilter, ResponseFlagFilter, access_log_filter::FilterSpecifier},
            core::v3::{HeaderValue, HeaderValueOption, Http2ProtocolOptions, KeepaliveSettings, TrafficDirection},
            listener::v3::{Filter, FilterChain, Listener, filter::ConfigType},
        },
        extensions::filters::{
            http::router::v3::Router,
            network::{
                http_connection_manager::v3::{
                    HttpConnectionManager, HttpFilter, LocalReplyConfig, Rds, ResponseMapper,
                    http_connection_manager::{
                        CodecType, ForwardClientCertDetails, RouteSpecifier, ServerHeaderTransformation,
                        SetCurrentClientCertDetails,
                    },
                    http_filter,
                },
                tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier},
            },
        },
    },
    util::pack_any,
};
use isthmus_model::service::AppProtocol;

use super::{
    names::UNREACHED_HEADER,
    route, tls,
    wire::{address, ads, boolean, millis, uint},
};

/// One try per gateway for two gateways, and one more.
const TCP_CONNECT_ATTEMPTS: u32 = 3;
/// Whoever knocks and does not complete a TLS handshake in this time is shown out.
const HANDSHAKE_TIMEOUT_MS: u64 = 5_000;

/// At a virtual address. `cluster` also names the route table.
pub(super) fn outbound(name: &str, at: SocketAddr, cluster: &str, protocol: AppProtocol) -> Listener {
    let filter = match protocol {
        AppProtocol::Http | AppProtocol::Grpc => http_filter(HttpConnectionManager {
            route_specifier: Some(RouteSpecifier::Rds(Rds {
                config_source: ads(),
                route_config_name: cluster.to_owned(),
            })),
            ..connection_manager("outbound")
        }),
        AppProtocol::Tcp => tcp_filter("outbound", cluster, TCP_CONNECT_ATTEMPTS),
    };
    listener(name, at, TrafficDirection::Outbound, FilterChain { filters: vec![filter], ..Default::default() })
}

/// At the workload's address: ends the mesh's TLS and hands over to the app.
pub(super) fn inbound(name: &str, at: SocketAddr, protocol: AppProtocol) -> Listener {
    let (filter, alpn): (_, &[&str]) = match protocol {
        AppProtocol::Http | AppProtocol::Grpc => (
            http_filter(HttpConnectionManager {
                route_specifier: Some(RouteSpecifier::RouteConfig(route::inbound(name))),
                forward_client_cert_details: ForwardClientCertDetails::SanitizeSet.into(),
                set_current_client_cert_details: Some(SetCurrentClientCertDetails { uri: true, ..Default::default() }),
                local_reply_config: Some(mark_unreached()),
                http2_protocol_options: Some(Http2ProtocolOptions {
                    // A caller that vanished without a FIN must not hold its streams for ever.
                    connection_keepalive: Some(KeepaliveSettings {
                        interval: millis(30_000),
                        timeout: millis(10_000),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..connection_manager("inbound")
            }),
            &["h2", "http/1.1"],
        ),
        // The connection to the app opens before the TLS handshake: when the app is dead the caller's gateway sees a close
        // without one byte of TLS and may still take the ClientHello elsewhere.
        AppProtocol::Tcp => (tcp_filter("inbound", name, 1), &[]),
    };
    let chain = FilterChain {
        filters: vec![filter],
        transport_socket: tls::downstream(alpn),
        transport_socket_connect_timeout: millis(HANDSHAKE_TIMEOUT_MS),
        ..Default::default()
    };
    listener(name, at, TrafficDirection::Inbound, chain)
}

fn listener(name: &str, at: SocketAddr, direction: TrafficDirection, chain: FilterChain) -> Listener {
    Listener {
        name: name.to_owned(),
        address: address(at),
        traffic_direction: direction.into(),
        enable_reuse_port: boolean(false),
        filter_chains: vec![chain],
        ..Default::default()
    }
}

fn connection_manager(stat_prefix: &str) -> HttpConnectionManager {
    HttpConnectionManager {
        codec_type: CodecType::Auto.into(),
        stat_prefix: stat_prefix.to_owned(),
        server_header_transformation: ServerHeaderTransformation::PassThrough.into(),
        // Per route: a gRPC stream may be silent for longer than Envoy's five minutes.
        stream_idle_timeout: millis(0),
        http_filters: vec![HttpFilter {
            name: "envoy.filters.http.router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(pack_any(Router {
                suppress_envoy_headers: true,
                ..Default::default()
            }))),
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// Envoy's flags for "no connection to the app" (UF) and "not even tried" (UO): the request went nowhere.
fn mark_unreached() -> LocalReplyConfig {
    let flags = ResponseFlagFilter { flags: vec!["UF".to_owned(), "UO".to_owned()] };
    LocalReplyConfig {
        mappers: vec![ResponseMapper {
            filter: Some(AccessLogFilter { filter_specifier: Some(FilterSpecifier::ResponseFlagFilter(flags)) }),
            headers_to_add: vec![HeaderValueOption {
                header: Some(HeaderValue {
                    key: UNREACHED_HEADER.to_owned(),
                    value: "true".to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn http_filter(manager: HttpConnectionManager) -> Filter {
    Filter {
        name: "envoy.filters.network.http_connection_manager".to_owned(),
        config_type: Some(ConfigType::TypedConfig(pack_any(manager))),
    }
}

fn tcp_filter(stat_prefix: &str, cluster: &str, attempts: u32) -> Filter {
    let proxy = TcpProxy {
        stat_prefix: stat_prefix.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        max_connect_attempts: uint(attempts),
        ..Default::default()
    };
    Filter {
        name: "envoy.filters.network.tcp_proxy".to_owned(),
        config_type: Some(ConfigType::TypedConfig(pack_any(proxy))),
    }
}
