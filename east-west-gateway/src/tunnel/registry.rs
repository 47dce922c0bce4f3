//! The peers that should be reached, the tunnels that work, and what their peers say of their own clusters.
//!
//! Written by the peer manager and the control streams; read by whoever places a connection. A peer's last word outlives
//! its tunnel, so that a lost tunnel reads as "unreachable" and not as "unknown".

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use isthmus_model::{
    availability::Availability,
    ids::{ClusterName, ServiceName},
    local::TunnelState,
};
use serde::Serialize;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::outbox::Table;
use crate::availability::better_of_two;

/// Services of which one peer may speak; a bound on memory, as for exports.
const MAX_SERVICES: usize = 10_000;

/// One gateway of another cluster.
pub(crate) type PeerKey = (ClusterName, String);

/// A working connection that this gateway dialled.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// Unique in the process.
    pub(crate) id: u64,
    /// The far cluster.
    pub(crate) cluster: ClusterName,
    /// The far gateway.
    pub(crate) gateway: String,
    /// Streams are opened here.
    pub(crate) connection: quinn::Connection,
    open: AtomicUsize,
    rtt_us: AtomicU32,
    suspect: AtomicBool,
    goaway: AtomicBool,
    /// The peer's successor is to be dialled; this tunnel serves until that one's does.
    pub(crate) succeeded: CancellationToken,
}

impl Tunnel {
    /// A tunnel over `connection`, with QUIC's own round-trip time until probes give one.
    pub(crate) fn new(id: u64, (cluster, gateway): PeerKey, connection: quinn::Connection) -> Self {
        let rtt = micros(connection.rtt());
        Self {
            id,
            cluster,
            gateway,
            connection,
            open: AtomicUsize::new(0),
            rtt_us: AtomicU32::new(rtt),
            suspect: AtomicBool::new(false),
            goaway: AtomicBool::new(false),
            succeeded: CancellationToken::new(),
        }
    }

    /// Counts one open stream while the guard lives.
    pub(crate) fn hold(self: &Arc<Self>) -> Held {
        self.open.fetch_add(1, Ordering::Relaxed);
        Held(self.clone())
    }

    /// The smoothed round-trip time.
    pub(crate) fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed).into())
    }

    pub(crate) fn set_rtt(&self, rtt: Duration) {
        self.rtt_us.store(micros(rtt), Ordering::Relaxed);
    }

    /// Whether its answers are overdue.
    pub(crate) fn set_suspect(&self, suspect: bool) {
        self.suspect.store(suspect, Ordering::Relaxed);
    }

    /// The peer drains. Returns whether that is news.
    pub(crate) fn set_goaway(&self) -> bool {
        !self.goaway.swap(true, Ordering::Relaxed)
    }

    fn is_going(&self) -> bool {
        self.goaway.load(Ordering::Relaxed)
    }

    /// Lower is better: no suspicion first, then round trip times load. Differences below a millisecond are noise.
    fn cost(&self) -> (bool, u64) {
        let rtt = u64::from(self.rtt_us.load(Ordering::Relaxed)).max(1_000);
        let open = self.open.load(Ordering::Relaxed) as u64;
        (self.suspect.load(Ordering::Relaxed), rtt.saturating_mul(open + 1))
    }
}

/// One open stream of a tunnel.
#[derive(Debug)]
pub(crate) struct Held(Arc<Tunnel>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How the manager steers the task that dials one peer.
#[derive(Clone, Debug)]
pub(crate) struct Steer {
    /// Give up the peer.
    pub(crate) cancel: CancellationToken,
    /// Dial now rather than after the pause: there is a sign of life.
    pub(crate) wake: Arc<Notify>,
}

#[derive(Debug)]
struct Peer {
    address: SocketAddr,
    steer: Steer,
    tunnel: Option<Arc<Tunnel>>,
    table: Table,
    /// The first attempt to reach it has ended.
    tried: bool,
}

/// What is known of one cluster through its gateways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Evidence {
    /// A working tunnel leads there whose peer is not draining.
    pub(crate) reachable: bool,
    /// Every gateway was tried at least once, so that "not reachable" is a finding.
    pub(crate) tried: bool,
    /// The best word on each service.
    pub(crate) table: Table,
}

/// A tunnel, as `/debug/tunnels` shows it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelInfo {
    /// The far cluster.
    pub cluster: ClusterName,
    /// The far gateway.
    pub gateway: String,
    /// Where it is dialled.
    pub address: SocketAddr,
    /// It works.
    pub up: bool,
    /// Its answers are overdue.
    pub suspect: bool,
    /// Its gateway drains.
    pub draining: bool,
    /// Smoothed round-trip time in microseconds; 0 while it is down.
    pub rtt_us: u32,
    /// Connections carried now.
    pub open_streams: usize,
    /// Ready endpoints per service, in its gateway's last word.
    pub ready: BTreeMap<ServiceName, u8>,
}

/// All peers.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    peers: Mutex<BTreeMap<PeerKey, Peer>>,
}

impl Registry {
    /// Adds a peer to be dialled at `address`.
    pub(crate) fn add(&self, key: PeerKey, address: SocketAddr, steer: Steer) {
        let peer = Peer { address, steer, tunnel: None, table: Table::new(), tried: false };
        self.lock().insert(key, peer);
    }

    /// Peers and where they are dialled.
    pub(crate) fn addresses(&self) -> BTreeMap<PeerKey, SocketAddr> {
        self.lock().iter().map(|(key, peer)| (key.clone(), peer.address)).collect()
    }

    /// Forgets a peer. Its connection is the caller's to close, and then its dialling to cancel.
    pub(crate) fn remove(&self, key: &PeerKey) -> Option<(Steer, Option<Arc<Tunnel>>)> {
        self.lock().remove(key).map(|peer| (peer.steer, peer.tunnel))
    }

    /// Dial this peer now, if its tunnel is down.
    pub(crate) fn wake(&self, key: &PeerKey) {
        if let Some(peer) = self.lock().get(key).filter(|p| p.tunnel.is_none()) {
            peer.steer.wake.notify_one();
        }
    }

    /// The peer's tunnel works. False if the peer is not wanted any more.
    pub(crate) fn up(&self, tunnel: &Arc<Tunnel>) -> bool {
        match self.lock().get_mut(&key_of(tunnel)) {
            Some(peer) if peer.address == tunnel.connection.remote_address() => {
                peer.tried = true;
                peer.tunnel = Some(tunnel.clone());
                true
            }
            _ => false,
        }
    }

    /// Whether every peer was tried at least once.
    pub(crate) fn all_tried(&self) -> bool {
        self.lock().values().all(|peer| peer.tried)
    }

    /// An attempt to reach the peer failed.
    pub(crate) fn failed(&self, key: &PeerKey) {
        if let Some(peer) = self.lock().get_mut(key) {
            peer.tried = true;
        }
    }

    /// The peer's tunnel is gone.
    pub(crate) fn down(&self, tunnel: &Tunnel) {
        if let Some(peer) = self.lock().get_mut(&key_of(tunnel))
            && peer.tunnel.as_ref().is_some_and(|t| t.id == tunnel.id)
        {
            peer.tunnel = None;
        }
    }

    /// The peer speaks of its cluster. False if it says more than is allowed.
    pub(crate) fn heard(
        &self,
        tunnel: &Tunnel,
        snapshot: bool,
        services: Vec<(ServiceName, Availability)>,
        removed: &[ServiceName],
    ) -> bool {
        let mut peers = self.lock();
        let Some(peer) = peers.get_mut(&key_of(tunnel)) else { return true };
        if peer.tunnel.as_ref().is_none_or(|t| t.id != tunnel.id) {
            return true;
        }
        if snapshot {
            peer.table.clear();
        }
        peer.table.extend(services);
        for service in removed {
            peer.table.remove(service);
        }
        peer.table.len() <= MAX_SERVICES
    }

    /// The better of two working tunnels to `cluster`, of those not `tried`. A draining one only if there is no other.
    pub(crate) fn pick(&self, cluster: &ClusterName, tried: &[u64]) -> Option<Arc<Tunnel>> {
        let up: Vec<Arc<Tunnel>> = of_cluster(&self.lock(), cluster)
            .filter_map(|peer| peer.tunnel.clone())
            .filter(|t| !tried.contains(&t.id))
            .collect();
        let staying: Vec<_> = up.iter().filter(|t| !t.is_going()).cloned().collect();
        better_of_two(if staying.is_empty() { &up } else { &staying }, |t| t.cost())
    }

    /// What is known of `cluster`; `None` if it has no gateway that is dialled.
    pub(crate) fn evidence(&self, cluster: &ClusterName) -> Option<Evidence> {
        let peers = self.lock();
        let all: Vec<&Peer> = of_cluster(&peers, cluster).collect();
        if all.is_empty() {
            return None;
        }
        let serves = |peer: &&&Peer| peer.tunnel.as_ref().is_some_and(|t| !t.is_going());
        let serving: Vec<&Peer> = all.iter().filter(serves).copied().collect();
        let reachable = !serving.is_empty();
        // Without a tunnel the last words stand, so that it is known what was there.
        let speakers = if reachable { &serving } else { &all };
        let mut table = Table::new();
        for (service, word) in speakers.iter().flat_map(|peer| &peer.table) {
            let best = table.entry(service.clone()).or_insert(*word);
            if (word.ready, word.total) > (best.ready, best.total) {
                *best = *word;
            }
        }
        Some(Evidence { reachable, tried: all.iter().all(|peer| peer.tried), table })
    }

    /// How many tunnels to `cluster` work.
    pub(crate) fn count(&self, cluster: &ClusterName) -> usize {
        of_cluster(&self.lock(), cluster).filter(|peer| peer.tunnel.is_some()).count()
    }

    /// Every peer's state, for the agent.
    pub(crate) fn states(&self) -> Vec<TunnelState> {
        let state = |info: TunnelInfo| TunnelState {
            cluster: info.cluster,
            gateway: info.gateway,
            up: info.up && !info.draining,
            rtt_us: info.rtt_us,
        };
        self.infos().into_iter().map(state).collect()
    }

    /// Every peer's state, for people.
    pub(crate) fn infos(&self) -> Vec<TunnelInfo> {
        let info = |((cluster, gateway), peer): (&PeerKey, &Peer)| {
            let tunnel = peer.tunnel.as_deref();
            TunnelInfo {
                cluster: cluster.clone(),
                gateway: gateway.clone(),
                address: peer.address,
                up: tunnel.is_some(),
                suspect: tunnel.is_some_and(|t| t.suspect.load(Ordering::Relaxed)),
                draining: tunnel.is_some_and(Tunnel::is_going),
                rtt_us: tunnel.map(|t| t.rtt_us.load(Ordering::Relaxed)).unwrap_or_default(),
                open_streams: tunnel.map(|t| t.open.load(Ordering::Relaxed)).unwrap_or_default(),
                ready: peer.table.iter().map(|(service, word)| (service.clone(), word.ready)).collect(),
            }
        };
        self.lock().iter().map(info).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PeerKey, Peer>> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn of_cluster<'a>(peers: &'a BTreeMap<PeerKey, Peer>, cluster: &ClusterName) -> impl Iterator<Item = &'a Peer> {
    let cluster = cluster.clone();
    let first = (cluster.clone(), String::new());
    peers.range(first..).take_while(move |((c, _), _)| *c == cluster).map(|(_, peer)| peer)
}

fn key_of(tunnel: &Tunnel) -> PeerKey {
    (tunnel.cluster.clone(), tunnel.gateway.clone())
}

fn micros(d: Duration) -> u32 {
    u32::try_from(d.as_micros()).unwrap_or(u32::MAX)
}
