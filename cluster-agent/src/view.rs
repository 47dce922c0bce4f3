//! Everything the agent knows, as one immutable snapshot: what the feeds (xDS, gateways, DNS) are computed from.
//!
//! In: the global state, the cluster's own endpoints, its gateways and sidecars, and the evidence about remote clusters.
//! Out: `watch<Arc<View>>`. Nobody writes to a published view; a change makes a new one.

use std::{collections::BTreeMap, sync::Arc};

use ipnet::Ipv4Net;
use isthmus_model::{
    availability::Observations,
    global::GlobalSnapshot,
    ids::{ClusterName, SpiffeId},
    local::{self, LocalEndpoints},
};
use serde::{Deserialize, Serialize};

/// A gateway of this cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalGateway {
    /// As it registered.
    pub hello: local::LocalGateway,
    /// On its way out: takes no new traffic.
    pub draining: bool,
}

/// A sidecar, and who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// As its launcher registered it. It gets configuration for its upstreams and nothing else.
    pub hello: local::Sidecar,
    /// From the launcher's certificate.
    pub identity: SpiffeId,
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
    /// This cluster's objects were read, from the folder or from what was saved of it. Until then `endpoints` says nothing.
    pub objects_known: bool,
    /// Of every local Service; the ports of a global one by the global ports' names.
    pub endpoints: Arc<LocalEndpoints>,
    /// By name. Kept over an agent's restart.
    pub gateways: BTreeMap<String, LocalGateway>,
    /// By name. Kept over an agent's restart.
    pub sidecars: BTreeMap<String, Sidecar>,
    /// What the data path says of every cluster, this one included.
    pub observations: Arc<Observations>,
}
