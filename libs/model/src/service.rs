//! What one cluster says of itself: the services it exports (intent, never addresses or counts), its gateways' addresses
//! and its trust bundle.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{PortName, ServiceName, SpiffeId, TrustDomain},
    time::Timestamp,
};

/// How an app speaks on a port, from the Service port's `appProtocol` (absent: TCP).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AppProtocol {
    /// Any bytes; server-first protocols work.
    Tcp,
    /// HTTP/1.1 towards the app.
    Http,
    /// HTTP/2 without TLS towards the app (gRPC, `kubernetes.io/h2c`).
    Grpc,
}

/// MCS ServiceImport types (KEP-1645).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ServiceKind {
    /// One virtual IP.
    ClusterSetIp,
    /// No virtual IP; DNS names the endpoints.
    Headless,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServicePort {
    /// Empty for a lone unnamed port.
    pub name: PortName,
    /// 1..=65535.
    pub number: u16,
    /// What the app speaks on it.
    pub protocol: AppProtocol,
}

/// One exported Service of one cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The Service.
    pub service: ServiceName,
    /// The ServiceExport's creation time; the oldest wins conflicts (KEP-1645).
    pub created_at: Timestamp,
    /// ClusterIP-like or headless.
    pub kind: ServiceKind,
    /// In the manifest's order.
    pub ports: Vec<ServicePort>,
    /// Who may answer for it. Callers accept only these.
    pub identities: BTreeSet<SpiffeId>,
}

/// A gateway, and where its tunnel is dialled.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GatewayAddress {
    /// Unique within its cluster.
    pub name: String,
    /// Where peers dial; `None`: it cannot be dialled (behind a NAT, say), so that peers wait for its connections.
    pub tunnel: Option<SocketAddr>,
}

/// A SPIFFE bundle document with the proof that the preceding bundle's owner made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustBundle {
    /// Whose.
    pub trust_domain: TrustDomain,
    /// The JSON document (JWK Set); `isthmus_identity` parses it.
    pub document: String,
    /// Signature over `document` by a key of the preceding bundle; empty for the first.
    pub predecessor_signature: Vec<u8>,
}

/// All that a cluster publishes. Replaces what it published before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// By name; each entry's `service` equals its key.
    pub exports: BTreeMap<ServiceName, Export>,
    /// Sorted by name.
    pub gateways: Vec<GatewayAddress>,
    /// The cluster's own trust bundle.
    pub bundle: TrustBundle,
}
