//! Everything the agent knows, as one immutable snapshot: what the feeds (xDS, gateways, DNS) are computed from.
//!
//! In: the global state, the cluster's own endpoints, its gateways and sidecars, and the evidence about remote clusters.
//! Out: `watch<Arc<View>>`. Nobody writes to a published view; a change makes a new one.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::Ipv4Net;
use isthmus_model::{
    availability::Observations,
    global::GlobalSnapshot,
    ids::{ClusterName, PortName, ServiceName, SpiffeId},
    service::AppProtocol,
};
use serde::{Deserialize, Serialize};

/// One endpoint of a local Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// Where its sidecar (or, without one, the app) listens.
    pub ip: IpAddr,
    /// Service port name → port number at the endpoint.
    pub ports: BTreeMap<PortName, u16>,
    /// Ready by its EndpointSlice and by its sidecar's probe of the app.
    pub ready: bool,
    /// Only endpoints with a sidecar get traffic from the mesh.
    pub has_sidecar: bool,
}

/// A gateway of this cluster, as it registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalGateway {
    /// Unique within the cluster.
    pub name: String,
    /// UDP address for peers.
    pub tunnel: SocketAddr,
    /// Where local sidecars dial it.
    pub ip: IpAddr,
    /// The gateway chooses the cluster.
    pub auto_port: u16,
    /// Traffic pinned to the cluster with index i enters at this plus i.
    pub pinned_port_base: u16,
    /// On its way out: takes no new traffic.
    pub draining: bool,
}

/// One port on which a sidecar accepts traffic for its app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboundPort {
    /// Where Envoy listens, on the sidecar's address.
    pub port: u16,
    /// Where the app listens.
    pub app: SocketAddr,
    /// What the app speaks.
    pub protocol: AppProtocol,
}

/// A sidecar, as its launcher registered it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Unique within the cluster; Envoy's node id.
    pub name: String,
    /// From the launcher's certificate.
    pub identity: SpiffeId,
    /// Equals its EndpointSlice address.
    pub address: IpAddr,
    /// What it accepts.
    pub inbound: Vec<InboundPort>,
    /// What its workload calls; it gets configuration for nothing else.
    pub upstreams: Vec<ServiceName>,
}

/// The agent's whole knowledge at one moment.
#[derive(Clone, Debug)]
pub struct View {
    /// This cluster.
    pub cluster: ClusterName,
    /// Where this cluster's VIPs lie.
    pub vip_range: Ipv4Net,
    /// The federation at one revision.
    pub global: Arc<GlobalSnapshot>,
    /// Local endpoints by Service.
    pub endpoints: Arc<BTreeMap<ServiceName, Vec<LocalEndpoint>>>,
    /// By name. Kept over an agent's restart.
    pub gateways: BTreeMap<String, LocalGateway>,
    /// By name. Kept over an agent's restart.
    pub sidecars: BTreeMap<String, Sidecar>,
    /// What the data path says of every cluster, this one included.
    pub observations: Arc<Observations>,
}
