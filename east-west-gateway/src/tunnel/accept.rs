//! Connections from other clusters' gateways: who they are, and the streams they open.
//!
//! The cluster is read from the certificate, never from what the peer says. Only an active member of the current snapshot
//! is served; before the first snapshot nobody is. Handshakes, connections (each cluster's, too) and streams are bounded;
//! what does not get through is closed with a code, counted by reason, and disturbs nobody else.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use isthmus_identity::tls;
use isthmus_model::ids::ClusterName;
use quinn::{Connection, Endpoint, Incoming};
use rustls::pki_types::CertificateDer;
use tokio::time;

use super::{
    Close,
    control::{Control, Role},
    endpoint,
};
use crate::{core::Core, egress};

/// The peers' connections.
#[derive(Debug, Default)]
pub(crate) struct Inbound {
    connections: Mutex<HashMap<usize, (ClusterName, Connection)>>,
}

impl Inbound {
    /// Closes the connections of clusters that `unwanted` names.
    pub(crate) fn close_if(&self, unwanted: impl Fn(&ClusterName) -> bool, why: Close) {
        for (cluster, connection) in self.lock().values().filter(|(cluster, _)| unwanted(cluster)) {
            tracing::info!(%cluster, peer = %connection.remote_address(), why = why.label(), "peer's connection closed");
            why.apply(connection);
        }
    }

    /// Takes `connection` in, unless `cluster` has `max` already.
    fn admit(&self, cluster: &ClusterName, connection: &Connection, max: usize) -> bool {
        let mut all = self.lock();
        let open = all.values().filter(|(c, known)| c == cluster && known.close_reason().is_none()).count();
        if open < max {
            all.insert(connection.stable_id(), (cluster.clone(), connection.clone()));
        }
        open < max
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, (ClusterName, Connection)>> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
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
        // Under pressure, only addresses that prove to be real get a slot (RFC 9000, 8.1.2).
        let pressed = core.peer_slots.available_permits() < core.config.tunnel.max_connections / 2;
        if pressed && !incoming.remote_address_validated() && incoming.may_retry() {
            core.metrics.reject("peer_address_check");
            // Fails only for what cannot be retried, which was asked before.
            drop(incoming.retry());
            continue;
        }
        match core.peer_slots.clone().try_acquire_owned() {
            Ok(slot) => {
                let core = core.clone();
                core.tasks.clone().spawn("tunnel.accept", async move {
                    serve(&core, incoming).await;
                    drop(slot);
                });
            }
            Err(_) => {
                core.metrics.reject(Close::Overloaded.label());
                incoming.refuse();
            }
        }
    }
}

async fn serve(core: &Arc<Core>, incoming: Incoming) {
    let remote = incoming.remote_address();
    let deadline = core.config.tunnel.handshake_timeout;
    let handshake = async { incoming.accept()?.await };
    let connection = match time::timeout(deadline, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::debug!(peer = %remote, %error, "peer's handshake failed");
            return core.metrics.reject("peer_handshake");
        }
        Err(_) => return core.metrics.reject("peer_handshake_timeout"),
    };
    let Some(cluster) = cluster_of(&connection, core) else {
        // The verifier accepts gateways of this federation only, so this is not to be expected.
        core.metrics.reject(Close::NotAMember.label());
        return Close::NotAMember.apply(&connection);
    };
    let member = Member { core, connection: &connection, cluster: &cluster };
    // So that one cluster cannot keep the others out.
    if !core.inbound.admit(&cluster, &connection, core.config.tunnel.max_connections_per_cluster) {
        tracing::warn!(%cluster, peer = %remote, "refused a gateway: its cluster has too many connections");
        core.metrics.reject(Close::Overloaded.label());
        return Close::Overloaded.apply(&connection);
    }
    // Judged after it can be found: a revocation from here on closes it.
    if core.current_view().is_active(&cluster) && cluster != core.cluster {
        member.serve().await;
    } else {
        tracing::warn!(%cluster, peer = %remote, "refused a gateway whose cluster is no active member");
        core.metrics.reject(Close::NotAMember.label());
        Close::NotAMember.apply(&connection);
    }
    core.inbound.lock().remove(&connection.stable_id());
}

fn cluster_of(connection: &Connection, core: &Core) -> Option<ClusterName> {
    let identity = connection.peer_identity()?;
    let certificates = identity.downcast_ref::<Vec<CertificateDer<'static>>>()?;
    endpoint::gateway_cluster(&tls::peer_id(Some(certificates))?, &core.identity.federation)
}

/// A connection of a cluster that takes part.
struct Member<'a> {
    core: &'a Arc<Core>,
    connection: &'a Connection,
    cluster: &'a ClusterName,
}

impl Member<'_> {
    async fn serve(&self) {
        let hello = async {
            let (send, recv) = self.connection.accept_bi().await.ok()?;
            Control::open(send, recv, &self.core.config.name).await.ok()
        };
        let Ok(Some(control)) = time::timeout(self.core.config.tunnel.handshake_timeout, hello).await else {
            self.core.metrics.reject(Close::Protocol.label());
            return Close::Protocol.apply(self.connection);
        };
        let gateway = control.peer.clone();
        tracing::info!(cluster = %self.cluster, gateway, peer = %self.connection.remote_address(), "peer connected");
        // It lives, so it can be reached: no need to wait for the next attempt.
        self.core.registry.wake(&(self.cluster.clone(), gateway.clone()));
        tokio::select! {
            () = control.run(self.core, self.connection, &Role::Acceptor) => {}
            () = self.streams() => {}
            () = self.core.expiry(self.connection) => Close::Replaced.apply(self.connection),
        }
        let why = self.connection.close_reason().map(|r| r.to_string()).unwrap_or_default();
        tracing::info!(cluster = %self.cluster, gateway, why, "peer disconnected");
    }

    async fn streams(&self) {
        // Ends when the connection does; the control stream sees to that.
        while let Ok((send, recv)) = self.connection.accept_bi().await {
            let carried = self.core.carried.token();
            let stream = egress::Stream { core: self.core.clone(), peer: self.cluster.clone(), send, recv, carried };
            self.core.tasks.spawn("egress.stream", stream.serve());
        }
    }
}
