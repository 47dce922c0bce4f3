//! Dials every gateway of every other active cluster, and keeps at it.
//!
//! Level-triggered: each view is compared with the registry, whatever happened in between. New peers get a task that
//! dials with backoff and jitter; peers that left, moved or were revoked are dropped at once, their connections closed in
//! both directions. One task per peer; it ends with its peer.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use isthmus_model::{global::ClusterState, ids::ClusterName};
use isthmus_runtime::backoff::Backoff;
use quinn::Endpoint;
use tokio::time;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Close,
    control::{Control, HelloError, Role},
    endpoint::{self, EndpointError},
    registry::{PeerKey, Steer, Tunnel},
};
use crate::{core::Core, standing::Part, view::View};

const BACKOFF_BASE: Duration = Duration::from_millis(100);
/// What an attempt takes at most where the peer lives: a round trip or two.
const PATIENCE: Duration = Duration::from_millis(500);
/// The name in the tunnel's own ClientHello. Nobody looks at it: the SPIFFE ID counts.
const SERVER_NAME: &str = "gateway.invalid";

/// Why a peer could not be reached.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("configure the dialler")]
    Configure(#[from] EndpointError),
    #[error("begin the QUIC handshake")]
    Begin(#[from] quinn::ConnectError),
    #[error("finish the QUIC handshake")]
    Handshake(#[from] quinn::ConnectionError),
    #[error("open the control stream")]
    Control(#[from] HelloError),
    #[error("no answer in time")]
    Timeout,
    #[error("the gateway at this address calls itself {0:?}")]
    OtherGateway(String),
}

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
        if wanted.get(key) != Some(address) {
            let why = if view.is_active(&key.0) { Close::Replaced } else { Close::Revoked };
            tracing::info!(cluster = %key.0, gateway = key.1, why = why.label(), "peer dropped");
            if let Some((steer, tunnel)) = core.registry.remove(key) {
                // In this order, so that the peer is told this reason.
                tunnel.iter().for_each(|t| why.apply(&t.connection));
                steer.cancel.cancel();
            }
            touched.insert(key.0.clone());
        }
    }
    for (key, address) in &wanted {
        if current.get(key) != Some(address) {
            let steer = Steer { cancel: core.stop.child_token(), wake: Arc::default() };
            core.registry.add(key.clone(), *address, steer.clone());
            let peer =
                Peer { core: core.clone(), endpoint: endpoint.clone(), key: key.clone(), address: *address, steer };
            core.tasks.spawn("tunnel.dial", peer.keep());
            touched.insert(key.0.clone());
        }
    }
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

fn wanted(core: &Core, view: &View) -> BTreeMap<PeerKey, SocketAddr> {
    let Some(global) = &view.global else { return BTreeMap::new() };
    let others = global.clusters.values().filter(|c| c.state == ClusterState::Active && c.name != core.cluster);
    others.flat_map(|c| c.gateways.iter().map(|g| ((c.name.clone(), g.name.clone()), g.tunnel))).collect()
}

/// Why a tunnel is not the one to use any more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    Lost,
    /// Its peer goes on in another process, which is to be dialled now.
    Succeeded,
}

/// The task of one peer.
#[derive(Clone)]
struct Peer {
    core: Arc<Core>,
    endpoint: Endpoint,
    key: PeerKey,
    address: SocketAddr,
    steer: Steer,
}

impl Peer {
    async fn keep(self) {
        let mut backoff = Backoff::new(BACKOFF_BASE, self.core.config.tunnel.dial_backoff_max);
        loop {
            let dialled = tokio::select! {
                dialled = self.dial() => dialled,
                () = self.steer.cancel.cancelled() => return,
                // An attempt's packets may have been lost to a dead predecessor.
                () = self.sign_of_life() => continue,
            };
            match dialled {
                Ok((connection, control)) => {
                    backoff.reset();
                    if self.carry(connection, control).await == Ended::Succeeded {
                        continue;
                    }
                }
                Err(error) => {
                    tracing::debug!(
                        cluster = %self.key.0, gateway = self.key.1, address = %self.address,
                        error = isthmus_runtime::tasks::chain(&error), "peer not reached"
                    );
                    self.core.registry.failed(&self.key);
                    self.core.refresh(&self.key.0);
                }
            }
            // A gateway that was taken over leaves dialling to its successor.
            if self.steer.cancel.is_cancelled() || self.core.steps.taken_over.is_cancelled() {
                return;
            }
            tokio::select! {
                () = time::sleep(backoff.next()) => {}
                () = self.steer.wake.notified() => {}
                () = self.steer.cancel.cancelled() => return,
            }
        }
    }

    /// The peer has dialled us, and our own attempt should have come through by now. Not at once: two gateways that dial
    /// each other must not keep each other from finishing.
    async fn sign_of_life(&self) {
        time::sleep(PATIENCE).await;
        self.steer.wake.notified().await;
    }

    async fn dial(&self) -> Result<(quinn::Connection, Control), DialError> {
        let tunnel = &self.core.config.tunnel;
        let attempt = async {
            let config = endpoint::dialler(tunnel, &self.core.identity, &self.key.0)?;
            let connection = self.endpoint.connect_with(config, self.address, SERVER_NAME)?.await?;
            let (send, recv) = connection.open_bi().await?;
            let control = Control::open(send, recv, &self.core.config.name).await?;
            if control.peer != self.key.1 {
                Close::Protocol.apply(&connection);
                return Err(DialError::OtherGateway(control.peer));
            }
            Ok((connection, control))
        };
        time::timeout(tunnel.handshake_timeout, attempt).await.unwrap_or(Err(DialError::Timeout))
    }

    /// From here until the connection's end, or until its peer is succeeded, new streams may use it.
    async fn carry(&self, connection: quinn::Connection, control: Control) -> Ended {
        let (cluster, gateway) = &self.key;
        let tunnel = Arc::new(Tunnel::new(self.core.next_id(), self.key.clone(), connection.clone()));
        if !self.core.registry.up(&tunnel) {
            Close::Replaced.apply(&connection);
            return Ended::Lost;
        }
        tracing::info!(%cluster, gateway, address = %self.address, rtt = ?tunnel.rtt(), "tunnel up");
        self.changed();
        let ended = CancellationToken::new();
        // A task of its own: what it carries outlives the word that the peer is succeeded.
        let carrying = self.clone().to_the_end(tunnel.clone(), control, ended.clone().drop_guard());
        self.core.tasks.spawn("tunnel.carry", carrying);
        tokio::select! {
            biased;
            () = ended.cancelled() => Ended::Lost,
            () = tunnel.succeeded.cancelled() => Ended::Succeeded,
        }
    }

    async fn to_the_end(self, tunnel: Arc<Tunnel>, control: Control, _ended: DropGuard) {
        let connection = &tunnel.connection;
        let role = Role::Dialler(tunnel.clone());
        tokio::select! {
            () = control.run(&self.core, connection, &role) => {}
            () = self.core.expiry(connection) => Close::Replaced.apply(connection),
            () = self.steer.cancel.cancelled() => {}
        }
        self.core.registry.down(&tunnel);
        self.changed();
        // Whoever cancelled this peer has closed the connection with its reason; this changes nothing then.
        Close::Drained.apply(connection);
        let why = connection.close_reason().map(|r| r.to_string()).unwrap_or_default();
        tracing::info!(cluster = %self.key.0, gateway = self.key.1, why, "tunnel down");
    }

    fn changed(&self) {
        let cluster = &self.key.0;
        self.core.metrics.tunnels(cluster, self.core.registry.count(cluster));
        self.core.refresh(cluster);
        self.core.observed.touch();
    }
}
