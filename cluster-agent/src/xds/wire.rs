//! Small constructors for Envoy's protobuf vocabulary, so that the builders read as configuration.

use std::{net::SocketAddr, time::Duration};

use envoy_types::{
    pb::{
        envoy::{
            config::core::v3::{
                Address, AggregatedConfigSource, ApiConfigSource, ApiVersion, ConfigSource, GrpcService, SocketAddress,
                TransportSocket, TypedExtensionConfig, address, api_config_source, config_source, grpc_service,
                socket_address, transport_socket,
            },
            r#type::{matcher::v3::StringMatcher, matcher::v3::string_matcher::MatchPattern, v3::Percent},
        },
        google::protobuf::{self, BoolValue, UInt32Value},
    },
    util::pack_any,
};
use prost::{Message, Name};

use super::names::LAUNCHER_CLUSTER;

pub(super) fn duration(d: Duration) -> Option<protobuf::Duration> {
    let seconds = i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
    Some(protobuf::Duration { seconds, nanos: i32::try_from(d.subsec_nanos()).unwrap_or(0) })
}

pub(super) fn millis(ms: u64) -> Option<protobuf::Duration> {
    duration(Duration::from_millis(ms))
}

pub(super) fn uint(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

pub(super) fn boolean(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

pub(super) fn percent(value: f64) -> Option<Percent> {
    Some(Percent { value })
}

pub(super) fn address(at: SocketAddr) -> Option<Address> {
    Some(Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: at.ip().to_string(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(at.port().into())),
            ..Default::default()
        })),
    })
}

pub(super) fn exactly(text: &str) -> Option<StringMatcher> {
    Some(StringMatcher { match_pattern: Some(MatchPattern::Exact(text.to_owned())), ..Default::default() })
}

/// A source on the stream that the configuration itself came from.
pub(super) fn ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(config_source::ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..Default::default()
    })
}

/// The launcher's own SDS: keys never travel on the stream from the agent.
pub(super) fn launcher_sds() -> Option<ConfigSource> {
    let grpc = grpc_service::EnvoyGrpc { cluster_name: LAUNCHER_CLUSTER.to_owned(), ..Default::default() };
    let api = ApiConfigSource {
        api_type: api_config_source::ApiType::DeltaGrpc.into(),
        transport_api_version: ApiVersion::V3.into(),
        grpc_services: vec![GrpcService {
            target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(grpc)),
            ..Default::default()
        }],
        set_node_on_first_message_only: true,
        ..Default::default()
    };
    Some(ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(config_source::ConfigSourceSpecifier::ApiConfigSource(api)),
        ..Default::default()
    })
}

pub(super) fn tls_socket<T: Name + Message>(context: T) -> Option<TransportSocket> {
    Some(TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(pack_any(context))),
    })
}

pub(super) fn extension<T: Name + Message>(name: &str, config: T) -> TypedExtensionConfig {
    TypedExtensionConfig { name: name.to_owned(), typed_config: Some(pack_any(config)) }
}
