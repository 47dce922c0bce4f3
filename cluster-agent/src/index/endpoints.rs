//! The Services' endpoints joined with the sidecars that stand before them. Pure.
//!
//! An endpoint may serve the mesh only if a sidecar registered at its address, under an identity that the Service
//! names, accepts traffic on its ports; it is ready when its EndpointSlice says so *and* the sidecar's probe found the
//! app answering.

use std::collections::BTreeMap;

use isthmus_api::{convert::Problem, manifest::SERVICE_ACCOUNTS_ANNOTATION};
use isthmus_model::{
    global::GlobalSnapshot,
    ids::{ClusterName, PortName, ServiceName, Zone},
    local::{Endpoint, LocalEndpoints},
    merge::own_port,
};

use super::{Index, Service, SliceEndpoint};
use crate::{status::problem, view::Sidecar};

/// A sidecar with what its launcher last said of the app.
#[derive(Clone, Copy, Debug)]
pub struct Probed<'a> {
    /// As registered.
    pub sidecar: &'a Sidecar,
    /// By inbound port; absent: not heard of yet.
    pub ready: &'a BTreeMap<u16, bool>,
}

/// All Services' endpoints, ordered by IP, and what keeps sidecars and Services apart. `zone` is the cluster's own, for
/// endpoints that name none.
pub fn join<'a>(
    index: &Index,
    sidecars: impl Iterator<Item = Probed<'a>>,
    zone: &Zone,
) -> (LocalEndpoints, Vec<Problem>) {
    let mut by_address: BTreeMap<_, Vec<Probed<'a>>> = BTreeMap::new();
    for probed in sidecars {
        by_address.entry(probed.sidecar.hello.address).or_default().push(probed);
    }
    let mut problems = Vec::new();
    let mut services = BTreeMap::new();
    for (name, service) in &index.services {
        let mut endpoints = Vec::with_capacity(service.endpoints.len());
        for (ip, slice) in &service.endpoints {
            let there = by_address.get(ip).map(Vec::as_slice).unwrap_or_default();
            let found = there.iter().find(|p| stands_for(p.sidecar, service, slice));
            if found.is_none() {
                problems.extend(there.iter().filter_map(|p| mismatch(p.sidecar, name, service, slice)));
            }
            endpoints.push(Endpoint {
                ip: *ip,
                ports: slice.ports.clone(),
                ready: slice.ready && found.is_some_and(|p| answers(p, slice)),
                has_sidecar: found.is_some(),
                zone: slice.zone.as_ref().unwrap_or(zone).clone(),
            });
        }
        services.insert(name.clone(), endpoints);
    }
    (LocalEndpoints { services }, problems)
}

/// Names the ports of endpoints as the federation does: by that name gateways and sidecars look them up. An own port that
/// no global port stands for is left out, since another cluster's port may have its name. A Service keeps its own names
/// for as long as the federation does not count this cluster among its exporters.
pub fn by_global_ports(
    mut all: LocalEndpoints,
    index: &Index,
    cluster: &ClusterName,
    global: &GlobalSnapshot,
) -> LocalEndpoints {
    for (name, endpoints) in &mut all.services {
        let Some(export) = index.exports.get(name) else { continue };
        let Some(service) = global.services.get(name).filter(|s| s.exporters.contains_key(cluster)) else { continue };
        let names: Vec<(&PortName, &PortName)> = service
            .ports
            .iter()
            .filter_map(|port| Some((&port.port.name, &own_port(cluster, export, port)?.name)))
            .collect();
        for endpoint in endpoints {
            let number = |own: &PortName| endpoint.ports.get(own).copied();
            endpoint.ports = names.iter().filter_map(|(global, own)| Some(((*global).clone(), number(own)?))).collect();
        }
    }
    all
}

/// Only the exported Services, for those who serve other clusters.
pub fn exported(all: &LocalEndpoints, index: &Index) -> LocalEndpoints {
    let of = |name: &ServiceName| Some((name.clone(), all.services.get(name)?.clone()));
    LocalEndpoints { services: index.exports.keys().filter_map(of).collect() }
}

fn stands_for(sidecar: &Sidecar, service: &Service, slice: &SliceEndpoint) -> bool {
    service.identities.contains(&sidecar.identity) && accepts(sidecar, slice)
}

fn accepts(sidecar: &Sidecar, slice: &SliceEndpoint) -> bool {
    slice.ports.values().all(|port| sidecar.hello.inbound.contains_key(port))
}

fn answers(probed: &Probed<'_>, slice: &SliceEndpoint) -> bool {
    slice.ports.values().all(|port| probed.ready.get(port).copied().unwrap_or(false))
}

/// Why a sidecar at an endpoint's address does not count. A workload may stand behind several Services with a port
/// each, so only a sidecar that has some of the ports is meant for this one.
fn mismatch(sidecar: &Sidecar, name: &ServiceName, service: &Service, slice: &SliceEndpoint) -> Option<Problem> {
    let missing: Vec<_> = slice.ports.values().filter(|port| !sidecar.hello.inbound.contains_key(port)).collect();
    let at = format!("sidecar {} at {}", sidecar.hello.name, sidecar.hello.address);
    if !missing.is_empty() {
        let message = format!(
            "Service {name} has an endpoint there with port {missing:?}, which the sidecar does not accept; add it to \
             `inbound` of the sidecar, or mend the EndpointSlice"
        );
        return Some(problem(at, message));
    }
    let names: Vec<_> = service.identities.iter().map(|id| id.as_str()).collect();
    (!service.identities.contains(&sidecar.identity)).then(|| {
        let message = format!(
            "runs as {}, but Service {name} is answered only by {}; list its service account in the Service's annotation {}",
            sidecar.identity,
            names.join(", "),
            SERVICE_ACCOUNTS_ANNOTATION
        );
        problem(at, message)
    })
}
