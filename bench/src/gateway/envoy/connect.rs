//! (b) and (c) CONNECT over mutual TLS: HTTP/2, what Istio's ambient mesh does, or HTTP/3 (QUIC).
//!
//! The near side wraps each TCP connection into a CONNECT stream to the far side, which unwraps it. Both sides show a certificate
//! and want the other's SPIFFE ID.

use anyhow::Context;
use serde_json::{Value, json};

use super::{BACKLOG, HTTP, Site, UPSTREAM, address, merge, tcp_proxy};
use crate::gateway::{
    certificates::{dns_name, id},
    place::End,
    system::System,
};

/// A connection's streams; beyond them Envoy opens another connection.
const STREAMS: u32 = 1_024;
/// Of each UDP socket, each way, as our gateways ask for; the system's default (208 KiB) overflows at these rates.
const SOCKET_BUFFER: u32 = 4 << 20;
/// The largest packet that QUICHE sends, and ours too.
const PACKET: u32 = 1_452;

/// This side's listener and cluster.
pub(super) fn side(site: &Site<'_>, end: End) -> anyhow::Result<(Value, Value)> {
    match end {
        End::Near => Ok((entry(site), tunnel_client(site)?)),
        End::Far => Ok((tunnel_server(site)?, site.cluster(end))),
    }
}

fn entry(site: &Site<'_>) -> Value {
    let tunnel = json!({ "tunneling_config": { "hostname": site.name } });
    json!({
        "name": "entry",
        "address": address(site.at(End::Near)),
        "tcp_backlog_size": BACKLOG,
        "filter_chains": [{ "filters": [tcp_proxy(tunnel)] }],
    })
}

fn tunnel_client(site: &Site<'_>) -> anyhow::Result<Value> {
    let tls = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": dns_name(End::Far),
        "common_tls_context": common_tls(site, End::Near, End::Far)?,
    });
    let mut cluster = site.cluster(End::Near);
    let options = json!({
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": match site.system {
            System::EnvoyH3 => json!({ "http3_protocol_options": { "quic_protocol_options": quic() } }),
            _ => json!({ "http2_protocol_options": { "max_concurrent_streams": STREAMS } }),
        },
    });
    let socket = match site.system {
        System::EnvoyH3 => json!({
            "name": "envoy.transport_sockets.quic",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.quic.v3.QuicUpstreamTransport",
                "upstream_tls_context": untyped(tls),
            },
        }),
        _ => json!({ "name": "envoy.transport_sockets.tls", "typed_config": tls }),
    };
    merge(
        &mut cluster,
        json!({
            "typed_extension_protocol_options": { "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options },
            "transport_socket": socket,
        }),
    );
    if site.system == System::EnvoyH3 {
        merge(&mut cluster, json!({ "upstream_bind_config": { "socket_options": socket_buffers() } }));
    }
    Ok(cluster)
}

fn tunnel_server(site: &Site<'_>) -> anyhow::Result<Value> {
    let tls = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": true,
        "common_tls_context": common_tls(site, End::Far, End::Near)?,
    });
    let at = address(site.at(End::Far));
    let (listener, socket, http) = match site.system {
        System::EnvoyH3 => {
            let mut at = at;
            at.pointer_mut("/socket_address").context("an address")?["protocol"] = "UDP".into();
            let udp = json!({
                "quic_options": { "quic_protocol_options": quic() },
                "downstream_socket_config": { "prefer_gro": true },
            });
            let socket = json!({
                "name": "envoy.transport_sockets.quic",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.quic.v3.QuicDownstreamTransport",
                    "downstream_tls_context": untyped(tls),
                },
            });
            let http = json!({
                "codec_type": "HTTP3",
                "http3_protocol_options": { "allow_extended_connect": true, "quic_protocol_options": quic() },
            });
            let listener = json!({ "address": at, "udp_listener_config": udp, "socket_options": socket_buffers() });
            (listener, socket, http)
        }
        _ => {
            let socket = json!({ "name": "envoy.transport_sockets.tls", "typed_config": tls });
            let http = json!({
                "codec_type": "HTTP2",
                "http2_protocol_options": { "allow_connect": true, "max_concurrent_streams": STREAMS },
            });
            (json!({ "address": at, "tcp_backlog_size": BACKLOG }), socket, http)
        }
    };
    let mut manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": HTTP,
        "generate_request_id": false,
        "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
        "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [route()] }] },
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
        }],
    });
    merge(&mut manager, http);
    let mut listener = listener;
    merge(
        &mut listener,
        json!({
            "name": "tunnel",
            "filter_chains": [{
                "transport_socket": socket,
                "filters": [{ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager }],
            }],
        }),
    );
    Ok(listener)
}

fn route() -> Value {
    json!({
        "match": { "connect_matcher": {} },
        "route": {
            "cluster": UPSTREAM,
            "timeout": "0s",
            "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }],
        },
    })
}

fn quic() -> Value {
    json!({ "max_concurrent_streams": STREAMS, "max_packet_length": PACKET })
}

/// SO_RCVBUF and SO_SNDBUF (Linux numbers).
fn socket_buffers() -> Value {
    const SOL_SOCKET: u32 = 1;
    const SO_SNDBUF: u32 = 7;
    const SO_RCVBUF: u32 = 8;
    let option =
        |name: u32| json!({ "level": SOL_SOCKET, "name": name, "int_value": SOCKET_BUFFER, "state": "STATE_PREBIND" });
    json!([option(SO_RCVBUF), option(SO_SNDBUF)])
}

/// What `own` shows and whom it wants to see.
fn common_tls(site: &Site<'_>, own: End, peer: End) -> anyhow::Result<Value> {
    let certificates = &site.setting.certificates;
    let mut tls = json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{
            "certificate_chain": { "filename": certificates.chain(own) },
            "private_key": { "filename": certificates.key(own) },
        }],
        "validation_context": {
            "trusted_ca": { "filename": certificates.ca() },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": id(peer)?.to_string() } }],
        },
    });
    if site.system == System::EnvoyH2 {
        merge(&mut tls, json!({ "alpn_protocols": ["h2"] }));
    }
    Ok(tls)
}

/// Without the type, for a place that has only one.
fn untyped(mut message: Value) -> Value {
    if let Value::Object(fields) = &mut message {
        fields.remove("@type");
    }
    message
}
