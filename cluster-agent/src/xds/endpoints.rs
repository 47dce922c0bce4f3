//! Load assignments: where the traffic of one service port goes, by priority.
//!
//! For HTTP the priorities are [`isthmus_model::failover::choose`]'s candidates, in its order, without those that may not
//! be used: the own cluster as its ready endpoints, a remote one as one entry per local gateway, at the port pinned to that
//! cluster. For TCP there is one priority, the local gateways' auto ports. A draining gateway is in neither.

use std::{collections::BTreeSet, net::SocketAddr};

use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, cluster_load_assignment::Policy,
    lb_endpoint::HostIdentifier,
};
use isthmus_model::{
    failover,
    global::{GlobalPort, GlobalService},
    ids::{ClusterIndex, ClusterName},
    local::LocalGateway,
    sni::{self, Route},
    time::Timestamp,
};

use super::wire::{address, uint};
use crate::view::View;

/// Envoy accepts priorities up to this.
const MAX_PRIORITIES: usize = 128;

/// Of an HTTP port. Problems are told, not fatal: an endpoint that cannot be named is left out.
pub(super) fn http(
    name: &str,
    view: &View,
    service: &GlobalService,
    port: &GlobalPort,
    now: Timestamp,
    problems: &mut Vec<String>,
) -> ClusterLoadAssignment {
    let number = port.port.number;
    let mut seen = BTreeSet::new();
    let mut groups = Vec::new();
    let candidates = failover::choose(service, Some(number), &view.cluster, &view.global, &view.observations, now);
    for candidate in candidates.iter().filter(|c| c.usable()) {
        let Some(sni) = server_name(view, service, number, Some(&candidate.cluster)) else {
            problems.push(unnameable(service, number));
            continue;
        };
        let addresses = if candidate.cluster == view.cluster {
            local(view, service, port)
        } else {
            remote(view, &candidate.cluster, problems)
        };
        // Envoy de-duplicates by address, across priorities too, so a repeated one would vanish from where we meant it.
        let group: Vec<_> = addresses.into_iter().filter(|a| seen.insert(*a)).map(|a| endpoint(a, &sni)).collect();
        if !group.is_empty() {
            groups.push(group);
        }
    }
    groups.truncate(MAX_PRIORITIES);
    assignment(name, groups)
}

/// Of a TCP port: the gateways, which choose.
pub(super) fn tcp(name: &str, view: &View, sni: &str) -> ClusterLoadAssignment {
    let group: Vec<_> =
        active_gateways(view).map(|g| endpoint(SocketAddr::new(g.local_ip, g.auto_port), sni)).collect();
    assignment(name, if group.is_empty() { Vec::new() } else { vec![group] })
}

/// The SNI for a service's port; `cluster` pins it. `None` if it would be too long.
pub(super) fn server_name(
    view: &View,
    service: &GlobalService,
    port: u16,
    cluster: Option<&ClusterName>,
) -> Option<String> {
    let route = Route { service: service.name.clone(), port, cluster: cluster.cloned(), selector: None };
    sni::encode(&route, &view.global.federation)
}

/// What to say when there is no SNI for a port.
pub(super) fn unnameable(service: &GlobalService, port: u16) -> String {
    format!(
        "port {port} of {} has no server name of at most 253 bytes: shorten the service's, the cluster's or the federation's name",
        service.name
    )
}

fn local(view: &View, service: &GlobalService, port: &GlobalPort) -> Vec<SocketAddr> {
    let serving = view.endpoints.of(&service.name).iter().filter(|e| e.is_serving());
    serving.filter_map(|e| e.address(&port.port.name)).collect()
}

fn remote(view: &View, cluster: &ClusterName, problems: &mut Vec<String>) -> Vec<SocketAddr> {
    let Some(info) = view.global.active_cluster(cluster) else { return Vec::new() };
    let mut addresses = Vec::new();
    for gateway in active_gateways(view) {
        match pinned_port(gateway, info.index) {
            Some(port) => addresses.push(SocketAddr::new(gateway.local_ip, port)),
            None => problems.push(format!(
                "gateway {} has no port for cluster {cluster}: pinnedPortBase {} plus the cluster's index {} exceeds 65535; lower pinnedPortBase",
                gateway.name, gateway.pinned_port_base, info.index
            )),
        }
    }
    addresses
}

fn pinned_port(gateway: &LocalGateway, index: ClusterIndex) -> Option<u16> {
    gateway.pinned_port_base.checked_add(index.0)
}

fn active_gateways(view: &View) -> impl Iterator<Item = &LocalGateway> {
    view.gateways.values().filter(|g| !g.draining).map(|g| &g.hello)
}

fn endpoint(at: SocketAddr, sni: &str) -> LbEndpoint {
    LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: address(at),
            hostname: sni.to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn assignment(name: &str, groups: Vec<Vec<LbEndpoint>>) -> ClusterLoadAssignment {
    let endpoints = (0u32..)
        .zip(groups)
        .map(|(priority, lb_endpoints)| LocalityLbEndpoints { lb_endpoints, priority, ..Default::default() })
        .collect();
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints,
        // Traffic leaves a priority in proportion to its dead endpoints, not only below 71 % as by default.
        policy: Some(Policy { overprovisioning_factor: uint(100), ..Default::default() }),
        ..Default::default()
    }
}
