//! Every peer's state as others see it: the agent, and people at `/debug/tunnels`. Nothing decides from it.

use std::{collections::BTreeMap, net::SocketAddr, sync::atomic::Ordering};

use isthmus_model::{
    ids::{ClusterName, ServiceName},
    local::{Transport, TunnelState},
};
use serde::Serialize;

use super::{Origin, Peer, PeerKey, Registry, Tunnel};

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
    /// What carries it, while it is up.
    pub transport: Option<Transport>,
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
    /// The most that one of them has lost of late, per million sent.
    pub loss_ppm: u32,
    /// Congestion windows together, in bytes (QUIC).
    pub congestion_window: u64,
    /// How full it says it is, in permille.
    pub load_permille: u32,
    /// Connections carried now.
    pub open_streams: usize,
    /// Ready endpoints per service, in its gateway's last word.
    pub ready: BTreeMap<ServiceName, u8>,
}

impl Registry {
    /// Every peer's state, for the agent.
    pub(crate) fn states(&self) -> Vec<TunnelState> {
        let state = |info: TunnelInfo| TunnelState {
            cluster: info.cluster,
            gateway: info.gateway,
            up: info.up && !info.draining,
            rtt_us: info.rtt_us,
            transport: info.transport.unwrap_or_default(),
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
                transport: first.map(|t| t.link.transport()),
                downgraded: peer.dial.as_ref().is_some_and(|dial| dial.downgraded),
                links: tunnels.len(),
                accepted: tunnels.iter().filter(|t| t.origin == Origin::Accepted).count(),
                suspect: !tunnels.is_empty() && tunnels.iter().all(|t| t.is_suspect()),
                draining: !tunnels.is_empty() && tunnels.iter().all(|t| t.is_going()),
                rtt_us: first.map(|t| t.rtt_us.load(Ordering::Relaxed)).unwrap_or_default(),
                packets_sent: paths.iter().map(|p| p.sent).sum(),
                packets_lost: paths.iter().map(|p| p.lost).sum(),
                loss_ppm: tunnels.iter().map(|t| t.loss_ppm()).max().unwrap_or_default(),
                congestion_window: paths.iter().map(|p| p.window).sum(),
                load_permille: first.map(|t| t.load.load(Ordering::Relaxed)).unwrap_or_default(),
                open_streams: tunnels.iter().map(|t| t.open.load(Ordering::Relaxed)).sum(),
                ready: peer.table().iter().map(|(service, word)| (service.clone(), word.ready)).collect(),
            }
        };
        self.lock().iter().map(info).collect()
    }
}
