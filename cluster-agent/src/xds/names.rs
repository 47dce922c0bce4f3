//! The names that the agent, the sidecar launcher and Envoy must agree on: resource types in the order in which they are
//! sent, resource names, secret names, and the cluster behind which the launcher's Unix socket hides.

use std::net::{Ipv4Addr, SocketAddrV4};

use isthmus_model::ids::ServiceName;

/// Envoy's static cluster for the launcher's Unix socket: ADS and SDS come from there.
pub const LAUNCHER_CLUSTER: &str = "isthmus-launcher";
/// SDS secret: the workload's key and certificate chain.
pub const WORKLOAD_SECRET: &str = "workload";
/// SDS secret: the validation context, one bundle per trust domain (`envoy.tls.cert_validator.spiffe`).
pub const TRUST_SECRET: &str = "trust";
/// Response header set by the far sidecar when the request never reached its app, so that any method may be retried.
pub(crate) const UNREACHED_HEADER: &str = "x-isthmus-unreached";

/// What a resource is. The order is make before break: clusters, endpoints, listeners, routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// CDS.
    Cluster,
    /// EDS.
    Endpoints,
    /// LDS.
    Listener,
    /// RDS.
    Route,
    /// SDS; served by the launcher alone.
    Secret,
}

impl ResourceType {
    /// The types of the aggregated stream, in the order in which they are sent.
    pub const ADS: [Self; 4] = [Self::Cluster, Self::Endpoints, Self::Listener, Self::Route];

    /// The type URL on the wire.
    pub fn url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        }
    }

    /// The inverse of [`Self::url`]; `None` for types that are not served.
    pub fn from_url(url: &str) -> Option<Self> {
        [Self::Cluster, Self::Endpoints, Self::Listener, Self::Route, Self::Secret].into_iter().find(|t| t.url() == url)
    }
}

/// Cluster, load assignment and route configuration of a service's port all bear this name.
pub(crate) fn outbound(service: &ServiceName, port: u16) -> String {
    format!("outbound|{port}|{service}")
}

/// The listener at a service's virtual address.
pub(crate) fn outbound_listener(vip: Ipv4Addr, port: u16) -> String {
    format!("outbound|{}", SocketAddrV4::new(vip, port))
}

/// Listener and cluster of one of the workload's own ports.
pub(crate) fn inbound(port: u16) -> String {
    format!("inbound|{port}")
}

/// What a listener is for, read back from its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ListenerName {
    /// A virtual address.
    Outbound(SocketAddrV4),
    /// A port of the workload.
    Inbound(u16),
}

impl ListenerName {
    /// `None` if this crate did not make the name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name.split_once('|')? {
            ("outbound", address) => address.parse().ok().map(Self::Outbound),
            ("inbound", port) => port.parse().ok().map(Self::Inbound),
            _ => None,
        }
    }
}
