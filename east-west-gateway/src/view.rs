//! What the gateway is told: the federation's state and this cluster's endpoints, as one immutable value.
//!
//! Comes from a feed (the agent, the disk, a test), is swapped whole, and is read by everything else. Nobody writes to a
//! published view.

use std::{net::SocketAddr, sync::Arc};

use isthmus_model::{
    global::{GlobalService, GlobalSnapshot},
    ids::{ClusterName, ServiceName},
    local::{Endpoint, LocalEndpoints},
};

/// All that is told, at one moment.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// `None` until the first snapshot: then nothing is carried and no peer is known.
    pub global: Option<Arc<GlobalSnapshot>>,
    /// This cluster's own.
    pub endpoints: Arc<LocalEndpoints>,
}

impl View {
    /// `cluster` is a member in good standing.
    pub(crate) fn is_active(&self, cluster: &ClusterName) -> bool {
        self.global.as_ref().is_some_and(|global| global.active_cluster(cluster).is_some())
    }

    /// The global service of that name.
    pub(crate) fn service(&self, name: &ServiceName) -> Option<&GlobalService> {
        self.global.as_ref()?.services.get(name).map(AsRef::as_ref)
    }

    /// The addresses that local endpoints serve `port` of `service` at, of all that may get traffic.
    ///
    /// `selector` picks one endpoint of a headless service by its dashed IP, as DNS names it.
    pub(crate) fn addresses(&self, service: &GlobalService, port: u16, selector: Option<&str>) -> Vec<SocketAddr> {
        let Some(entry) = service.ports.iter().find(|p| p.port.number == port) else { return Vec::new() };
        let wanted = |e: &&Endpoint| e.is_serving() && selector.is_none_or(|s| dashed(e) == s);
        // The agent names endpoints' ports as the global service does, whatever the cluster's own names.
        let address = |e: &Endpoint| e.address(&entry.port.name);
        self.endpoints.of(&service.name).iter().filter(wanted).filter_map(address).collect()
    }
}

fn dashed(endpoint: &Endpoint) -> String {
    endpoint.ip.to_string().replace(['.', ':'], "-")
}
