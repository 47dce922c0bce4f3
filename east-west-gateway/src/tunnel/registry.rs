//! The peers that should be reached, the tunnels that work, and what their peers say of their own clusters.
//!
//! Written by the peer manager, the acceptor and the control streams; read by whoever places a connection. A peer's last
//! word outlives its tunnel, so that a lost tunnel reads as "unreachable" and not as "unknown".

mod tunnel;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::Ordering},
};

use isthmus_model::{
    ids::{ClusterName, ServiceName},
    local::{Transport, TunnelState},
};
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) use self::tunnel::{Held, Origin, Tunnel};
use super::{
    inbox::{MAX_SERVICES, Word},
    outbox::Table,
};
use crate::availability::better_of_two;

/// Attempts of one stream over a TCP link.
const CONNECTIONS_OF_ONE_LINK: usize = 3;

/// One gateway of another cluster.
pub(crate) type PeerKey = (ClusterName, String);

/// A tunnel that was tried for a connection.
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) tunnel: Arc<Tunnel>,
    /// Its gateway has answered: another link to it would not help.
    pub(crate) refused: bool,
}

/// How the manager steers the tasks that dial one peer.
#[derive(Clone, Debug)]
pub(crate) struct Steer {
    /// Give up the peer.
    pub(crate) cancel: CancellationToken,
    /// Do not dial it there any more; its links live on until others work.
    pub(crate) moved: CancellationToken,
    /// Moves when there is a sign of life: dial now rather than after the pause.
    pub(crate) wake: watch::Sender<u64>,
}

impl Steer {
    /// Until `stop`.
    pub(crate) fn new(stop: &CancellationToken) -> Self {
        Self { cancel: stop.child_token(), moved: CancellationToken::new(), wake: watch::Sender::default() }
    }
}

#[derive(Debug, Default)]
struct Peer {
    /// It should be reached there; `None` if it is only known by its own links.
    dial: Option<Dial>,
    legs: Vec<Leg>,
    /// What it said last on a tunnel that is gone: stands until another one has spoken.
    last: Table,
}

#[derive(Debug)]
struct Dial {
    address: SocketAddr,
    steer: Steer,
    /// The first attempt to reach it has ended.
    tried: bool,
    /// An `auto` link runs over TCP, since QUIC does not get through.
    downgraded: bool,
    /// What it is to run over, if there is a choice.
    transport: Transport,
    /// Why the last attempt failed, and over what; until one succeeds over the same.
    error: Option<(Transport, String)>,
}

/// A tunnel and what was said on it.
#[derive(Debug)]
struct Leg {
    tunnel: Arc<Tunnel>,
    /// Its first snapshot has begun.
    began: bool,
    /// It has come, all of it: half of one would read as endpoints that are gone.
    spoken: bool,
    table: Table,
}

impl Peer {
    /// The table to believe: the oldest tunnel's, unless its answers are overdue.
    fn table(&self) -> &Table {
        let order = |leg: &&Leg| (leg.tunnel.is_going(), leg.tunnel.is_suspect(), leg.tunnel.id);
        let spoken = self.legs.iter().filter(|leg| leg.spoken);
        spoken.min_by_key(order).map_or(&self.last, |leg| &leg.table)
    }

    fn serves(&self) -> bool {
        self.legs.iter().any(|leg| !leg.tunnel.is_going())
    }
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

/// A peer's tunnels, as `/debug/tunnels` shows them.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelInfo {
    /// The far cluster.
    pub cluster: ClusterName,
    /// The far gateway.
    pub gateway: String,
    /// Where it is dialled; `None` if it cannot be.
    pub address: Option<SocketAddr>,
    /// It works.
    pub up: bool,
    /// What carries it; while it is down, what it is to run over.
    pub transport: Transport,
    /// Why the last attempt to dial it failed, if none has succeeded since over the same transport.
    pub dial_error: Option<String>,
    /// It should run over QUIC and does not.
    pub downgraded: bool,
    /// Links that we dialled, and that the peer dialled.
    pub links: usize,
    /// Of these, the peer's.
    pub accepted: usize,
    /// All answers are overdue.
    pub suspect: bool,
    /// Its gateway drains.
    pub draining: bool,
    /// Smoothed round-trip time in microseconds; 0 while it is down.
    pub rtt_us: u32,
    /// Packets sent, and of these lost, on the links that are up (QUIC).
    pub packets_sent: u64,
    /// See above.
    pub packets_lost: u64,
    /// What the link that the next stream would likely take has lost of late, per million sent (QUIC).
    pub loss_ppm: u32,
    /// Its congestion window, in bytes (QUIC).
    pub congestion_window: u64,
    /// How full it says it is, in permille.
    pub load_permille: u32,
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
    /// A peer is to be dialled at `address`, if possible over `transport`, and not where it was before. Returns the tunnels
    /// that lead there yet.
    pub(crate) fn add(
        &self,
        key: PeerKey,
        (address, transport): (SocketAddr, Transport),
        steer: Steer,
    ) -> Arc<[Weak<Tunnel>]> {
        let dial = Dial { address, steer, tried: false, downgraded: false, transport, error: None };
        let mut peers = self.lock();
        let peer = peers.entry(key).or_default();
        if let Some(before) = peer.dial.replace(dial) {
            before.steer.moved.cancel();
        }
        let own = peer.legs.iter().filter(|leg| leg.tunnel.origin != Origin::Accepted);
        own.map(|leg| Arc::downgrade(&leg.tunnel)).collect()
    }

    /// Peers that are dialled, and where.
    pub(crate) fn addresses(&self) -> BTreeMap<PeerKey, SocketAddr> {
        let dialled = |(key, peer): (&PeerKey, &Peer)| Some((key.clone(), peer.dial.as_ref()?.address));
        self.lock().iter().filter_map(dialled).collect()
    }

    /// Stops reaching for a peer. Its links are the caller's to close, and then its dialling to cancel.
    pub(crate) fn remove(&self, key: &PeerKey) -> Option<(Steer, Vec<Arc<Tunnel>>)> {
        let mut peers = self.lock();
        let peer = peers.get_mut(key)?;
        let dial = peer.dial.take()?;
        let (ours, theirs) = std::mem::take(&mut peer.legs)
            .into_iter()
            .partition::<Vec<_>, _>(|leg| leg.tunnel.origin != Origin::Accepted);
        peer.legs = theirs;
        if peer.legs.is_empty() {
            peers.remove(key);
        }
        Some((dial.steer, ours.into_iter().map(|leg| leg.tunnel).collect()))
    }

    /// Dial this peer now, if no own tunnel to it is up.
    pub(crate) fn wake(&self, key: &PeerKey) {
        if let Some(dial) = self.lock().get(key).filter(|peer| !has_own(peer)).and_then(|peer| peer.dial.as_ref()) {
            dial.steer.wake.send_modify(|n| *n += 1);
        }
    }

    /// The tunnel works. False if the peer is not wanted (there) any more.
    pub(crate) fn up(&self, tunnel: &Arc<Tunnel>) -> bool {
        let mut peers = self.lock();
        let leg = Leg { tunnel: tunnel.clone(), began: false, spoken: false, table: Table::new() };
        match tunnel.origin {
            Origin::Accepted => {
                peers.entry(key_of(tunnel)).or_default().legs.push(leg);
                true
            }
            Origin::Dialled(address) => match peers.get_mut(&key_of(tunnel)) {
                Some(Peer { dial: Some(dial), legs, .. }) if dial.address == address => {
                    dial.tried = true;
                    dial.error.take_if(|(over, _)| *over == tunnel.link.transport());
                    legs.push(leg);
                    true
                }
                _ => false,
            },
        }
    }

    /// Whether every peer that is dialled was tried at least once.
    pub(crate) fn all_tried(&self) -> bool {
        self.lock().values().filter_map(|peer| peer.dial.as_ref()).all(|dial| dial.tried)
    }

    /// An attempt to reach the peer over `transport` failed. Returns whether that is news.
    pub(crate) fn failed(&self, key: &PeerKey, transport: Transport, error: String) -> bool {
        let mut peers = self.lock();
        let Some(dial) = peers.get_mut(key).and_then(|peer| peer.dial.as_mut()) else { return false };
        dial.tried = true;
        dial.error.replace((transport, error)).is_none()
    }

    /// Peers of which one was not tried yet.
    pub(crate) fn untried(&self) -> Vec<PeerKey> {
        let untried = |peer: &Peer| peer.dial.as_ref().is_some_and(|dial| !dial.tried);
        self.lock().iter().filter(|(_, peer)| untried(peer)).map(|(key, _)| key.clone()).collect()
    }

    /// An `auto` link runs over TCP for want of QUIC, or does not any more. Returns whether that is news.
    pub(crate) fn set_downgraded(&self, key: &PeerKey, downgraded: bool) -> bool {
        let mut peers = self.lock();
        let dial = peers.get_mut(key).and_then(|peer| peer.dial.as_mut());
        dial.is_some_and(|dial| std::mem::replace(&mut dial.downgraded, downgraded) != downgraded)
    }

    /// The tunnel is gone.
    pub(crate) fn down(&self, tunnel: &Tunnel) {
        let mut peers = self.lock();
        let Some(peer) = peers.get_mut(&key_of(tunnel)) else { return };
        if let Some(at) = peer.legs.iter().position(|leg| leg.tunnel.id == tunnel.id) {
            let leg = peer.legs.remove(at);
            if leg.spoken {
                peer.last = leg.table;
            }
        }
        if peer.legs.is_empty() && peer.dial.is_none() {
            peers.remove(&key_of(tunnel));
        }
    }

    /// The peer speaks of its cluster. False if it says more than is allowed.
    pub(crate) fn heard(&self, tunnel: &Tunnel, word: Word) -> bool {
        let mut peers = self.lock();
        let peer = peers.get_mut(&key_of(tunnel));
        let Some(leg) = peer.and_then(|peer| peer.legs.iter_mut().find(|leg| leg.tunnel.id == tunnel.id)) else {
            return true;
        };
        leg.began |= word.is_snapshot();
        leg.spoken |= leg.began && word.is_last_part();
        word.apply(&mut leg.table, MAX_SERVICES)
    }

    /// The better of two working tunnels to `cluster`, of those not `tried`; over TCP a stream has a connection of its own,
    /// so that another one on the same link may do better, and a third. In this order: draining ones, gateways that failed already, ones
    /// that are full or whose answers are overdue, and links that the peer dialled only if there is nothing better.
    pub(crate) fn pick(&self, cluster: &ClusterName, tried: &[Tried]) -> Option<Arc<Tunnel>> {
        let tried: Vec<&Tried> = tried.iter().filter(|x| x.tunnel.cluster == *cluster).collect();
        let most = |t: &Tunnel| if t.link.transport() == Transport::Quic { 1 } else { CONNECTIONS_OF_ONE_LINK };
        let refused = |t: &Tunnel| tried.iter().any(|x| x.refused && x.tunnel.gateway == t.gateway);
        let used_up = |t: &Tunnel| tried.iter().filter(|x| x.tunnel.id == t.id).count() >= most(t);
        // One that has ended is taken off the list a moment later.
        let out = |t: &Tunnel| refused(t) || used_up(t) || t.link.why_closed().is_some();
        let up: Vec<Arc<Tunnel>> = of_cluster(&self.lock(), cluster)
            .flat_map(|peer| &peer.legs)
            .map(|leg| &leg.tunnel)
            .filter(|t| !out(t))
            .cloned()
            .collect();
        let failed = |t: &Tunnel| tried.iter().any(|x| x.tunnel.gateway == t.gateway);
        let class = |t: &Arc<Tunnel>| (t.is_going(), failed(t), t.is_doubtful(), t.origin == Origin::Accepted);
        let best = up.iter().map(class).min()?;
        let best: Vec<_> = up.iter().filter(|t| class(t) == best).cloned().collect();
        better_of_two(&best, |t| t.cost())
    }

    /// A TCP link to `cluster` whose peer is succeeded, until its replacement works. New connections of it would reach the
    /// successor, which knows nothing of this link.
    pub(crate) fn succession(&self, cluster: &ClusterName) -> Option<Arc<Tunnel>> {
        let succeeded =
            |t: &&Arc<Tunnel>| t.succeeded.is_cancelled() && !t.is_going() && t.link.transport() == Transport::Tcp;
        let peers = self.lock();
        let mut tunnels = of_cluster(&peers, cluster).flat_map(|peer| &peer.legs).map(|leg| &leg.tunnel);
        tunnels.find(succeeded).cloned()
    }

    /// What is known of `cluster` and these services; `None` if no gateway of it is known. Its gateways may speak of others.
    pub(crate) fn evidence<'s>(
        &self,
        cluster: &ClusterName,
        services: impl Iterator<Item = &'s ServiceName>,
    ) -> Option<Evidence> {
        let peers = self.lock();
        let all: Vec<&Peer> = of_cluster(&peers, cluster).collect();
        if all.is_empty() {
            return None;
        }
        let serving: Vec<&Peer> = all.iter().filter(|peer| peer.serves()).copied().collect();
        let reachable = !serving.is_empty();
        // Without a tunnel the last legs stand, so that it is known what was there.
        let speakers = if reachable { &serving } else { &all };
        let tables: Vec<&Table> = speakers.iter().map(|peer| peer.table()).collect();
        let best =
            |service| tables.iter().filter_map(|table| table.get(service)).max_by_key(|word| (word.ready, word.total));
        let table: Table = services.filter_map(|service| Some((service.clone(), *best(service)?))).collect();
        let tried = all.iter().all(|peer| peer.dial.as_ref().is_none_or(|dial| dial.tried));
        Some(Evidence { reachable, tried, table })
    }

    /// The peer can only be reached by its own links.
    pub(crate) fn needs_reverse(&self, tunnel: &Tunnel) -> bool {
        tunnel.origin == Origin::Accepted && self.lock().get(&key_of(tunnel)).is_none_or(|peer| !has_own(peer))
    }

    /// Whether an own QUIC tunnel to the peer takes new streams.
    pub(crate) fn has_quic(&self, key: &PeerKey) -> bool {
        let own = |leg: &Leg| {
            let tunnel = &leg.tunnel;
            tunnel.origin != Origin::Accepted && tunnel.link.transport() == Transport::Quic && !tunnel.is_going()
        };
        self.lock().get(key).is_some_and(|peer| peer.legs.iter().any(own))
    }

    /// Where the gateways of `cluster` are now.
    #[cfg(test)]
    pub(crate) fn remotes(&self, cluster: &ClusterName) -> Vec<SocketAddr> {
        let peers = self.lock();
        let legs = of_cluster(&peers, cluster).flat_map(|peer| &peer.legs);
        legs.map(|leg| leg.tunnel.link.remote_address()).collect()
    }

    /// What has come over all links of `cluster`, see [`Path::received`](super::link::Path::received).
    #[cfg(test)]
    pub(crate) fn received(&self, cluster: &ClusterName) -> u64 {
        let peers = self.lock();
        of_cluster(&peers, cluster).flat_map(|peer| &peer.legs).map(|leg| leg.tunnel.link.path().received).sum()
    }

    /// How many streams each of the tunnels that were dialled to `cluster` carries.
    #[cfg(test)]
    pub(crate) fn open_streams(&self, cluster: &ClusterName) -> Vec<usize> {
        let peers = self.lock();
        let own = of_cluster(&peers, cluster).flat_map(|peer| &peer.legs).map(|leg| &leg.tunnel);
        own.filter(|tunnel| tunnel.origin != Origin::Accepted)
            .map(|tunnel| tunnel.open.load(Ordering::Relaxed))
            .collect()
    }

    /// The tunnels that were dialled to `cluster`.
    #[cfg(test)]
    pub(crate) fn own_links(&self, cluster: &ClusterName) -> Vec<u64> {
        let peers = self.lock();
        let legs = of_cluster(&peers, cluster).flat_map(|peer| &peer.legs);
        legs.filter(|leg| leg.tunnel.origin != Origin::Accepted).map(|leg| leg.tunnel.id).collect()
    }

    /// Whether anything leads to this peer, or should.
    pub(crate) fn knows(&self, key: &PeerKey) -> bool {
        self.lock().contains_key(key)
    }

    /// How many tunnels to `cluster` work.
    pub(crate) fn count(&self, cluster: &ClusterName) -> usize {
        of_cluster(&self.lock(), cluster).map(|peer| peer.legs.len()).sum()
    }

    /// How many peers of `cluster` are downgraded.
    pub(crate) fn downgraded(&self, cluster: &ClusterName) -> usize {
        let downgraded = |peer: &&Peer| peer.dial.as_ref().is_some_and(|dial| dial.downgraded);
        of_cluster(&self.lock(), cluster).filter(downgraded).count()
    }

    /// Every peer's state, for the agent.
    pub(crate) fn states(&self) -> Vec<TunnelState> {
        let state = |info: TunnelInfo| TunnelState {
            cluster: info.cluster,
            gateway: info.gateway,
            up: info.up && !info.draining,
            rtt_us: info.rtt_us,
            transport: info.transport,
            dial_error: info.dial_error.unwrap_or_default(),
            downgraded: info.downgraded,
            loss_ppm: info.loss_ppm,
            cwnd_bytes: info.congestion_window,
        };
        self.infos().into_iter().map(state).collect()
    }

    /// Every peer's state, for people.
    pub(crate) fn infos(&self) -> Vec<TunnelInfo> {
        let info = |((cluster, gateway), peer): (&PeerKey, &Peer)| {
            let tunnels: Vec<&Tunnel> = peer.legs.iter().map(|leg| leg.tunnel.as_ref()).collect();
            // The one that the next stream would likely take.
            let first = tunnels.iter().min_by_key(|t| (t.is_going(), t.origin == Origin::Accepted, t.since));
            let paths: Vec<_> = tunnels.iter().map(|t| t.link.path()).collect();
            TunnelInfo {
                cluster: cluster.clone(),
                gateway: gateway.clone(),
                address: peer.dial.as_ref().map(|dial| dial.address),
                up: !tunnels.is_empty(),
                transport: first.map_or_else(
                    || peer.dial.as_ref().map(|dial| dial.transport).unwrap_or_default(),
                    |t| t.link.transport(),
                ),
                dial_error: peer.dial.as_ref().and_then(|dial| Some(dial.error.as_ref()?.1.clone())),
                downgraded: peer.dial.as_ref().is_some_and(|dial| dial.downgraded),
                links: tunnels.len(),
                accepted: tunnels.iter().filter(|t| t.origin == Origin::Accepted).count(),
                suspect: !tunnels.is_empty() && tunnels.iter().all(|t| t.is_suspect()),
                draining: !tunnels.is_empty() && tunnels.iter().all(|t| t.is_going()),
                rtt_us: first.map(|t| t.rtt_us.load(Ordering::Relaxed)).unwrap_or_default(),
                packets_sent: paths.iter().map(|p| p.sent).sum(),
                packets_lost: paths.iter().map(|p| p.lost).sum(),
                loss_ppm: first.map(|t| t.loss_ppm()).unwrap_or_default(),
                congestion_window: first.map(|t| t.link.path().window).unwrap_or_default(),
                load_permille: first.map(|t| t.load.load(Ordering::Relaxed)).unwrap_or_default(),
                open_streams: tunnels.iter().map(|t| t.open.load(Ordering::Relaxed)).sum(),
                ready: peer.table().iter().map(|(service, word)| (service.clone(), word.ready)).collect(),
            }
        };
        self.lock().iter().map(info).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PeerKey, Peer>> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_own(peer: &Peer) -> bool {
    peer.legs.iter().any(|leg| leg.tunnel.origin != Origin::Accepted && !leg.tunnel.is_going())
}

fn of_cluster<'a>(peers: &'a BTreeMap<PeerKey, Peer>, cluster: &ClusterName) -> impl Iterator<Item = &'a Peer> {
    let cluster = cluster.clone();
    let first = (cluster.clone(), String::new());
    peers.range(first..).take_while(move |((c, _), _)| *c == cluster).map(|(_, peer)| peer)
}

fn key_of(tunnel: &Tunnel) -> PeerKey {
    (tunnel.cluster.clone(), tunnel.gateway.clone())
}
