//! Links from other clusters' gateways: who they are, and the streams they open.
//!
//! The cluster is read from the certificate, never from what the peer says. Only an active member of the current snapshot
//! is served; before the first snapshot nobody is. Handshakes, links (each cluster's, too) and streams are bounded; what
//! does not get through is closed with a code, counted by reason, and disturbs nobody else.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use isthmus_identity::tls;
use isthmus_model::ids::ClusterName;
use quinn::{Connection, Endpoint, Incoming};
use tokio::{sync::Semaphore, time};

use super::{
    Close,
    control::{self, Control},
    ending,
    link::{self, Link, RecvHalf, SendHalf, quic},
    quiet::Quiet,
    registry::{Origin, Tunnel},
};
use crate::{clock, core::Core, egress};

/// The peers' links.
#[derive(Debug, Default)]
pub(crate) struct Inbound {
    links: Mutex<HashMap<u64, (ClusterName, Link)>>,
    refused: Quiet,
}

impl Inbound {
    /// Closes the links of clusters that `unwanted` names.
    pub(crate) fn close_if(&self, unwanted: impl Fn(&ClusterName) -> bool, why: Close) {
        for (cluster, link) in self.lock().values().filter(|(cluster, _)| unwanted(cluster)) {
            tracing::info!(%cluster, peer = %link.remote_address(), why = why.label(), "peer's link closed");
            link.close(why);
        }
    }

    /// Takes `link` in, unless `cluster` has `max` already.
    fn admit(&self, id: u64, cluster: &ClusterName, link: &Link, max: usize) -> bool {
        let mut all = self.lock();
        let open = all.values().filter(|(c, known)| c == cluster && known.why_closed().is_none()).count();
        if open < max {
            all.insert(id, (cluster.clone(), link.clone()));
        }
        open < max
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (ClusterName, Link)>> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts until the gateway stops.
pub(crate) async fn accept(core: Arc<Core>, endpoint: Endpoint) {
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            () = core.stop.cancelled() => return,
        };
        let Some(incoming) = incoming else { return };
        if core.steps.taken_over.is_cancelled() {
            // Sent again, it reaches the successor.
            incoming.ignore();
            continue;
        }
        if core.draining.is_cancelled() {
            core.metrics.reject("draining");
            incoming.refuse();
            continue;
        }
        // Under pressure, only addresses that prove to be real get a place (RFC 9000, 8.1.2): nobody takes those of another
        // address by its name.
        let source = incoming.remote_address().ip();
        let few = core.quic_handshakes.available_permits() < core.config.tunnel.max_pending_handshakes / 2;
        let pressed = few || core.quic_sources.is_busy(source);
        if pressed && !incoming.remote_address_validated() && incoming.may_retry() {
            core.metrics.reject("peer_address_check");
            // Fails only for what cannot be retried, which was asked before.
            drop(incoming.retry());
            continue;
        }
        let Some(share) = core.quic_sources.try_acquire(source) else {
            core.metrics.reject("peer_source_pending");
            incoming.refuse();
            continue;
        };
        let Ok(pending) = core.quic_handshakes.clone().try_acquire_owned() else {
            core.metrics.reject("peer_overload");
            incoming.refuse();
            continue;
        };
        let core = core.clone();
        core.tasks.clone().spawn("tunnel.accept", async move {
            let connection = shake_hands(&core, incoming).await;
            drop((pending, share));
            if let Some(connection) = connection {
                serve(&core, connection).await;
            }
        });
    }
}

/// `None`: it failed, and was counted.
async fn shake_hands(core: &Core, incoming: Incoming) -> Option<Connection> {
    let remote = incoming.remote_address();
    let deadline = core.config.tunnel.handshake_timeout;
    let handshake = async { incoming.accept()?.await };
    match time::timeout(deadline, handshake).await {
        Ok(Ok(connection)) => return Some(connection),
        Ok(Err(error)) => {
            tracing::debug!(peer = %remote, %error, "peer's handshake failed");
            core.metrics.reject("peer_handshake");
        }
        Err(_) => core.metrics.reject("peer_handshake_timeout"),
    }
    None
}

async fn serve(core: &Arc<Core>, connection: Connection) {
    let id = quic::leaf(&connection).and_then(|leaf| tls::peer_id(Some(&[leaf])));
    let link = Link::Quic(connection.into());
    let Ok(_place) = core.peer_slots.try_acquire() else {
        core.metrics.reject(Close::Overloaded.label());
        return link.close(Close::Overloaded);
    };
    match id.and_then(|id| quic::gateway_cluster(&id, &core.identity.federation)) {
        Some(cluster) => member(core, link, None, cluster).await,
        None => {
            // The verifier accepts gateways of this federation only, so this is not to be expected.
            core.metrics.reject(Close::NotAMember.label());
            link.close(Close::NotAMember);
        }
    }
}

/// Serves a link that a gateway of `cluster` has dialled to its end. `control` is its control stream, if that is known;
/// otherwise the first one that it opens is.
pub(super) async fn member(core: &Arc<Core>, link: Link, control: Option<(SendHalf, RecvHalf)>, cluster: ClusterName) {
    let (id, remote) = (core.next_id(), link.remote_address());
    // So that one cluster cannot keep the others out.
    let refused = if !core.inbound.admit(id, &cluster, &link, core.config.tunnel.max_connections_per_cluster) {
        Some(Close::Overloaded)
    } else if !core.current_view().is_active(&cluster) || cluster == core.cluster {
        // Judged after it can be found: a revocation from here on closes it.
        Some(Close::NotAMember)
    } else {
        None
    };
    match refused {
        None => Member { core, link: &link, cluster: &cluster }.serve(control).await,
        Some(why) => {
            core.metrics.reject(why.label());
            if let Some(times) = core.inbound.refused.times(&cluster, clock::now()) {
                let words = match why {
                    Close::Overloaded => "its cluster has too many links (tunnel.maxConnectionsPerCluster)",
                    _ => "its cluster is no active member",
                };
                tracing::warn!(%cluster, peer = %remote, why = words, times, "refused a gateway; told once a minute");
            }
            link.close(why);
            if let Some((mut send, _)) = control {
                control::say_why(&mut send, &link).await;
            }
        }
    }
    core.inbound.lock().remove(&id);
}

/// A link of a cluster that takes part.
struct Member<'a> {
    core: &'a Arc<Core>,
    link: &'a Link,
    cluster: &'a ClusterName,
}

impl Member<'_> {
    async fn serve(&self, control: Option<(SendHalf, RecvHalf)>) {
        let core = self.core;
        let hello = async {
            let (send, recv) = match control {
                Some(halves) => halves,
                None => self.link.accept().await?,
            };
            Control::open(send, recv, &core.config.name).await.ok()
        };
        let Ok(Some(control)) = time::timeout(core.config.tunnel.handshake_timeout, hello).await else {
            core.metrics.reject(Close::Protocol.label());
            return self.link.close(Close::Protocol);
        };
        let gateway = control.peer.clone();
        tracing::info!(
            cluster = %self.cluster, gateway, peer = %self.link.remote_address(),
            transport = link::label(self.link.transport()), "peer connected"
        );
        let key = (self.cluster.clone(), gateway.clone());
        // It lives, so it can be reached: no need to wait for the next attempt.
        core.registry.wake(&key);
        let tunnel = Arc::new(Tunnel::new(core, key.clone(), self.link.clone(), Origin::Accepted));
        core.registry.up(&tunnel);
        core.links_changed(self.cluster);
        let closed = async {
            tokio::select! {
                () = streams(core, &tunnel) => {}
                () = core.expiry(self.link) => self.link.close(Close::Replaced),
            }
            // The control stream notices, and tells the peer.
            std::future::pending().await
        };
        tokio::select! {
            () = control.run(core, &tunnel) => {}
            () = closed => {}
        }
        core.registry.down(&tunnel);
        if !core.registry.knows(&key) {
            // Its name is what it said itself: a peer that comes under ever new ones must not fill the memory.
            core.metrics.forget_gateway(self.cluster, &gateway);
        }
        core.links_changed(self.cluster);
        let ending = ending::of(&tunnel);
        if ending.planned {
            tracing::info!(cluster = %self.cluster, gateway, why = ending.words, "peer disconnected");
        } else {
            tracing::warn!(cluster = %self.cluster, gateway, why = ending.words, "peer disconnected");
        }
    }
}

/// Serves the streams that the peer opens. Never ends by itself: the control stream notices the link's end.
pub(super) async fn streams(core: &Arc<Core>, tunnel: &Arc<Tunnel>) {
    // QUIC's own flow control has the same limit; over TCP nothing else has.
    let max = usize::try_from(core.config.tunnel.max_streams_per_peer).unwrap_or(Semaphore::MAX_PERMITS);
    let slots = Arc::new(Semaphore::new(max));
    while let Some((send, recv)) = tunnel.link.accept().await {
        let (slot, carried) = (slots.clone().try_acquire_owned().ok(), core.carried.token());
        let stream = egress::Stream { core: core.clone(), tunnel: tunnel.clone(), send, recv, slot, carried };
        core.tasks.spawn("egress.stream", stream.serve());
    }
    std::future::pending().await
}
