//! What is known inside one cluster and never leaves it: endpoints, gateways and sidecars.
//!
//! The agent assembles these from its source and from what gateways and sidecars say of themselves; gateways and DNS
//! receive them. Nothing here is ever published to the control plane.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{ClusterName, PortName, ServiceName, Zone},
    service::AppProtocol,
};

/// One endpoint of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Unique within its service.
    pub ip: IpAddr,
    /// By the name of the Service's port: the port that the endpoint's sidecar listens on.
    pub ports: BTreeMap<PortName, u16>,
    /// The app says that it can serve.
    pub ready: bool,
    /// Only endpoints with a sidecar may receive traffic from the mesh.
    pub has_sidecar: bool,
    /// Empty if unknown.
    pub zone: Zone,
}

impl Endpoint {
    /// May get traffic: ready, and behind a sidecar.
    pub fn is_serving(&self) -> bool {
        self.ready && self.has_sidecar
    }

    /// Where to dial it for the Service's port `name`.
    pub fn address(&self, name: &PortName) -> Option<SocketAddr> {
        self.ports.get(name).map(|port| SocketAddr::new(self.ip, *port))
    }
}

/// All endpoints of a cluster's exported services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalEndpoints {
    /// Each list ordered by IP.
    pub services: BTreeMap<ServiceName, Vec<Endpoint>>,
}

impl LocalEndpoints {
    /// The endpoints of `service`; none if it is not known.
    pub fn of(&self, service: &ServiceName) -> &[Endpoint] {
        self.services.get(service).map(Vec::as_slice).unwrap_or_default()
    }
}

/// A gateway, as its own cluster's agent and sidecars see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalGateway {
    /// Unique within the cluster.
    pub name: String,
    /// Where peers dial (UDP; TCP too where links may run over it); `None`: it cannot be dialled and only dials out.
    pub tunnel: Option<SocketAddr>,
    /// Where local sidecars dial (TCP).
    pub local_ip: IpAddr,
    /// The port where the gateway chooses the cluster.
    pub auto_port: u16,
    /// Traffic pinned to the cluster with index `i` enters at this plus `i`.
    pub pinned_port_base: u16,
}

/// A sidecar, as its launcher describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Unique within the cluster; Envoy's node id.
    pub name: String,
    /// Where peers reach the workload; equals its EndpointSlice address.
    pub address: IpAddr,
    /// By the port that Envoy listens on at `address`.
    pub inbound: BTreeMap<u16, Inbound>,
    /// The services that it calls.
    pub upstreams: BTreeSet<ServiceName>,
}

/// How a sidecar hands a port's traffic to its app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inbound {
    /// Where the app listens; a loopback address.
    pub app: SocketAddr,
    /// What it speaks there.
    pub protocol: AppProtocol,
}

/// What a tunnel runs over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// QUIC, over UDP.
    #[default]
    Quic,
    /// TLS, over TCP.
    Tcp,
}

/// The state of a gateway's path to another cluster's gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelState {
    /// The far cluster.
    pub cluster: ClusterName,
    /// The far gateway.
    pub gateway: String,
    /// It answers.
    pub up: bool,
    /// Smoothed round-trip time in microseconds; 0 if not measured.
    pub rtt_us: u32,
    /// What it runs over, or ran over when it was last up.
    pub transport: Transport,
    /// It should run over QUIC, and runs over TCP because QUIC does not get through.
    pub downgraded: bool,
    /// Lost packets per million sent, of late; 0 if not measured.
    pub loss_ppm: u32,
    /// Bytes that may be under way at once (congestion window); 0 if not measured.
    pub cwnd_bytes: u64,
    /// Why the last attempt to dial it failed, for people; empty if none has since it was last up.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub dial_error: String,
}

/// A path, and which of the cluster's own gateways says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelReport {
    /// The near gateway.
    pub from: String,
    /// Its path.
    #[serde(flatten)]
    pub tunnel: TunnelState,
}

impl TunnelState {
    /// Says the same as `other` but for what is measured (round-trip time, loss and congestion window), and for which
    /// error the last of several failed attempts met.
    pub fn same_but_for_measures(&self, other: &Self) -> bool {
        let unmeasured = |t: &Self| Self {
            rtt_us: 0,
            loss_ppm: 0,
            cwnd_bytes: 0,
            dial_error: if t.dial_error.is_empty() { String::new() } else { "some".to_owned() },
            ..t.clone()
        };
        unmeasured(self) == unmeasured(other)
    }
}
