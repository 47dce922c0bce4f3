//! From the agent's view to one sidecar's Envoy configuration: pure.
//!
//! In: the view, the sidecar, the time. Out: resources by type and name, each with a version that is a hash of its content,
//! so that equal configuration is never sent twice, whatever the revision. A sidecar gets what its workload calls and
//! accepts, nothing else. What cannot be configured is left out and told in [`Resources::problems`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use envoy_types::{pb::google::protobuf::Any, util::pack_any};
use isthmus_model::{
    global::{GlobalPort, GlobalService},
    ids::{SpiffeId, Stamp},
    service::{AppProtocol, ServiceKind},
    time::Timestamp,
    vip,
};
use prost::{Message, Name};
use sha2::{Digest, Sha256};

use super::{
    cluster, endpoints, listener,
    names::{self, ResourceType},
    route,
};
use crate::view::{Sidecar, View};

/// One resource, as it goes on the wire.
#[derive(Clone, Debug, PartialEq)]
pub struct Resource {
    /// The message.
    pub body: Any,
    /// A hash of it.
    pub version: String,
}

/// A whole configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resources {
    /// The federation's state that this was computed from.
    pub stamp: Stamp,
    /// What a person must mend.
    pub problems: Vec<String>,
    by_type: BTreeMap<ResourceType, BTreeMap<String, Resource>>,
}

impl Resources {
    /// An empty configuration for `stamp`.
    pub fn new(stamp: Stamp) -> Self {
        Self { stamp, ..Default::default() }
    }

    /// Adds a resource; one of the same type and name is replaced.
    pub fn insert<T: Name + Message>(&mut self, kind: ResourceType, name: impl Into<String>, message: T) {
        let body = pack_any(message);
        let mut hash = hex::encode(Sha256::digest(&body.value));
        hash.truncate(16);
        self.by_type.entry(kind).or_default().insert(name.into(), Resource { body, version: hash });
    }

    /// All resources of a type, by name.
    pub fn of(&self, kind: ResourceType) -> impl Iterator<Item = (&str, &Resource)> {
        self.by_type.get(&kind).into_iter().flatten().map(|(name, r)| (name.as_str(), r))
    }

    /// One resource.
    pub fn find(&self, kind: ResourceType, name: &str) -> Option<&Resource> {
        self.by_type.get(&kind)?.get(name)
    }
}

/// Everything that `sidecar`'s Envoy should have.
pub fn build(view: &View, sidecar: &Sidecar, now: Timestamp) -> Resources {
    let mut out = Resources::new(view.global.stamp);
    let sidecar = &sidecar.hello;
    for (port, inbound) in &sidecar.inbound {
        let name = names::inbound(*port);
        let at = SocketAddr::new(sidecar.address, *port);
        out.insert(ResourceType::Cluster, &name, cluster::inbound(&name, inbound.app, inbound.protocol));
        out.insert(ResourceType::Listener, &name, listener::inbound(&name, at, inbound.protocol));
    }
    for name in &sidecar.upstreams {
        match view.global.services.get(name) {
            Some(service) => outbound(&mut out, view, service, now),
            None => out.problems.push(format!(
                "upstream {name}: no cluster exports it; check the name in the sidecar's upstreams and the ServiceExports"
            )),
        }
    }
    out
}

fn outbound(out: &mut Resources, view: &View, service: &GlobalService, now: Timestamp) {
    if service.kind == ServiceKind::Headless {
        out.problems.push(format!("upstream {} is headless: it has no virtual address to listen on", service.name));
        return;
    }
    let Some(vip) = vip::vip(view.vip_range, service.index) else {
        out.problems.push(format!(
            "upstream {}: its index {} does not fit into this cluster's VIP range {}; give the agent a larger vipRange",
            service.name, service.index, view.vip_range
        ));
        return;
    };
    let mut taken = BTreeSet::new();
    for port in &service.ports {
        let number = port.port.number;
        if !taken.insert(number) {
            out.problems.push(format!(
                "upstream {}: two of its ports have the number {number}; only the first is served",
                service.name
            ));
            continue;
        }
        let identities = identities(view, service, port);
        if identities.is_empty() {
            // Without a matcher Envoy would accept any workload of the federation for it.
            out.problems.push(format!("upstream {} port {number}: no active cluster exposes it", service.name));
            continue;
        }
        let name = names::outbound(&service.name, number);
        match port.port.protocol {
            AppProtocol::Http | AppProtocol::Grpc => {
                let load = endpoints::http(&name, view, service, port, now, &mut out.problems);
                out.insert(ResourceType::Cluster, &name, cluster::http_outbound(&name, &identities));
                out.insert(ResourceType::Endpoints, &name, load);
                out.insert(ResourceType::Route, &name, route::outbound(&name, port.port.protocol));
            }
            AppProtocol::Tcp => {
                let Some(sni) = endpoints::server_name(view, service, number, None) else {
                    out.problems.push(endpoints::unnameable(service, number));
                    continue;
                };
                out.insert(ResourceType::Endpoints, &name, endpoints::tcp(&name, view, &sni));
                out.insert(ResourceType::Cluster, &name, cluster::tcp_outbound(&name, &identities, sni));
            }
        }
        let listener_name = names::outbound_listener(vip, number);
        let at = SocketAddr::new(IpAddr::V4(vip), number);
        let listener = listener::outbound(&listener_name, at, &name, port.port.protocol);
        out.insert(ResourceType::Listener, listener_name, listener);
    }
}

/// Who may answer for a port: the workloads behind it in the active clusters that expose it.
fn identities(view: &View, service: &GlobalService, port: &GlobalPort) -> BTreeSet<SpiffeId> {
    port.clusters
        .iter()
        .filter(|cluster| view.global.active_cluster(cluster).is_some())
        .filter_map(|cluster| service.exporters.get(cluster))
        .flat_map(|exporter| exporter.identities.iter().cloned())
        .collect()
}
