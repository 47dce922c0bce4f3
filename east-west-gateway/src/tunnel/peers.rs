//! Dials every gateway of every other active cluster, and keeps at it.
//!
//! Level-triggered: each view is compared with the registry, whatever happened in between. New peers get tasks that dial
//! with backoff and jitter ([`super::lane`]); those that moved are dialled at their new address, and keep their links until that
//! works; peers that left or were revoked are dropped at once, their links closed in both directions.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use isthmus_model::{ids::ClusterName, local::Transport};
use quinn::Endpoint;

use super::{
    Close,
    lane::{Lane, Peer},
    registry::{PeerKey, Steer},
};
use crate::{
    config::LinkTransport,
    core::Core,
    standing::{Area, Part},
    view::View,
};

/// Follows the view until the gateway stops.
pub(crate) async fn manage(core: Arc<Core>, endpoint: Endpoint) {
    let mut view = core.view.clone();
    loop {
        reconcile(&core, &endpoint);
        tokio::select! {
            changed = view.changed() => {
                if changed.is_err() {
                    // The feed is gone for good: what is known stands, until the gateway stops.
                    core.stop.cancelled().await;
                    return;
                }
            }
            () = core.stop.cancelled() => return,
        }
    }
}

fn reconcile(core: &Arc<Core>, endpoint: &Endpoint) {
    let view = core.current_view();
    let wanted = wanted(core, &view);
    let current = core.registry.addresses();
    let mut touched: BTreeSet<ClusterName> = BTreeSet::new();
    for (key, address) in &current {
        let Some(wanted) = wanted.get(key) else {
            let why = if view.is_active(&key.0) { Close::Replaced } else { Close::Revoked };
            tracing::info!(cluster = %key.0, gateway = key.1, why = why.label(), "peer dropped");
            if let Some((steer, tunnels)) = core.registry.remove(key) {
                // In this order, so that the peer is told this reason.
                tunnels.iter().for_each(|t| t.link.close(why));
                steer.cancel.cancel();
            }
            core.metrics.forget_gateway(&key.0, &key.1);
            touched.insert(key.0.clone());
            continue;
        };
        if wanted != address {
            tracing::info!(cluster = %key.0, gateway = key.1, from = %address, to = %wanted, "peer has moved");
        }
    }
    for (key, address) in &wanted {
        if current.get(key) != Some(address) {
            let over = match core.config.tunnel.transport_to(&key.0) {
                LinkTransport::Tcp => Transport::Tcp,
                LinkTransport::Quic | LinkTransport::Auto => Transport::Quic,
            };
            let steer = Steer::new(&core.stop);
            let before = core.registry.add(key.clone(), (*address, over), steer.clone());
            touched.insert(key.0.clone());
            let (core, endpoint, key, address) = (core.clone(), endpoint.clone(), key.clone(), *address);
            reach(&Peer { core, endpoint, key, address, steer, before });
        }
    }
    check_links(core, &view);
    core.inbound.close_if(|cluster| !view.is_active(cluster), Close::Revoked);
    if let Some(global) = &view.global {
        core.standing.followed(Part::Peers, global.stamp, true);
    }
    let present: BTreeSet<&ClusterName> = wanted.keys().map(|(cluster, _)| cluster).collect();
    for cluster in touched.iter().filter(|c| !present.contains(c)) {
        core.metrics.forget_cluster(cluster);
    }
    // Exports may have changed for any of them.
    for cluster in touched.iter().chain(present.iter().copied()) {
        core.refresh(cluster);
    }
}

/// An entry of `tunnel.links` for a cluster that there is not has no effect, as with a typing error.
fn check_links(core: &Core, view: &View) {
    let Some(global) = &view.global else { return };
    let unknown = core.config.tunnel.links.keys().filter(|cluster| !global.clusters.contains_key(cluster));
    let text =
        |cluster| format!("tunnel.links: {cluster} is no cluster of this federation, so the entry has no effect");
    let texts: Vec<String> = unknown.map(text).collect();
    if core.standing.set_problems(Area::Links, texts.clone()) {
        let known = global.clusters.keys().filter(|name| **name != core.cluster).map(ClusterName::as_str);
        let known = known.collect::<Vec<_>>().join(", ");
        texts.iter().for_each(|problem| tracing::warn!(problem, known, "correct the configuration"));
    }
}

/// Starts the tasks that keep the peer's links, as the configuration wants them.
fn reach(peer: &Peer) {
    let tunnel = &peer.core.config.tunnel;
    let quic = (0..tunnel.connections_per_peer).map(|_| Lane::Quic);
    let lanes: Vec<Lane> = match tunnel.transport_to(&peer.key.0) {
        LinkTransport::Quic => quic.collect(),
        LinkTransport::Tcp => vec![Lane::Tcp],
        LinkTransport::Auto => quic.chain([Lane::TcpWithoutQuic]).collect(),
    };
    for lane in lanes {
        peer.core.tasks.spawn("tunnel.dial", peer.clone().keep(lane));
    }
}

fn wanted(core: &Core, view: &View) -> BTreeMap<PeerKey, SocketAddr> {
    let Some(global) = &view.global else { return BTreeMap::new() };
    let others = global.clusters.values().filter(|c| c.state.is_member() && c.name != core.cluster);
    // Those that cannot be dialled dial us.
    let gateways = others.flat_map(|c| c.gateways.iter().map(move |g| (c, g)));
    gateways.filter_map(|(c, g)| Some(((c.name.clone(), g.name.clone()), g.tunnel?))).collect()
}
