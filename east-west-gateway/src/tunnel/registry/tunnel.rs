//! One working link to a peer: what is known of its state, and what it carries.
//!
//! Written by its control stream and by whoever opens or serves a stream on it; read by the choice among links. What holds:
//! a retired link gets no new streams, and is spent only when neither side's are left.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use isthmus_model::{ids::ClusterName, local::Transport};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::PeerKey;
use crate::{
    clock,
    core::Core,
    tunnel::{
        link::{Link, redundancy::LOSSY_PPM},
        stalled::Stalled,
    },
};

/// A working link to a peer.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// Unique in the process.
    pub(crate) id: u64,
    /// The far cluster.
    pub(crate) cluster: ClusterName,
    /// The far gateway.
    pub(crate) gateway: String,
    /// Streams are opened here.
    pub(crate) link: Link,
    /// Who made it.
    pub(crate) origin: Origin,
    /// How full the peer says it is, in permille.
    pub(crate) load: AtomicU32,
    /// Streams whose near side takes nothing (QUIC).
    pub(crate) stalled: Option<Stalled>,
    pub(super) since: Instant,
    pub(super) open: AtomicUsize,
    served: AtomicUsize,
    pub(super) rtt_us: AtomicU32,
    suspect: AtomicBool,
    goaway: AtomicBool,
    /// The peer's successor is to be dialled; this tunnel serves until that one's does.
    pub(crate) succeeded: CancellationToken,
    retired: CancellationToken,
    idle: Notify,
    packets: Mutex<Packets>,
}

/// Who made a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// This gateway, at this address.
    Dialled(SocketAddr),
    /// The peer.
    Accepted,
}

impl Tunnel {
    /// A tunnel over `link`, with the transport's own round-trip time until probes give one.
    pub(crate) fn new(core: &Core, (cluster, gateway): PeerKey, link: Link, origin: Origin) -> Self {
        let rtt = micros(link.path().rtt);
        let config = &core.config.tunnel;
        let shared_window = link.transport() == Transport::Quic;
        let stalled = shared_window.then(|| Stalled::new(config.connection_window_bytes, config.stream_window_bytes));
        Self {
            id: core.next_id(),
            cluster,
            gateway,
            link,
            origin,
            load: AtomicU32::new(0),
            stalled,
            since: clock::now(),
            open: AtomicUsize::new(0),
            served: AtomicUsize::new(0),
            rtt_us: AtomicU32::new(rtt),
            suspect: AtomicBool::new(false),
            goaway: AtomicBool::new(false),
            succeeded: CancellationToken::new(),
            retired: CancellationToken::new(),
            idle: Notify::new(),
            packets: Mutex::default(),
        }
    }

    /// Counts one stream of our own while the guard lives.
    pub(crate) fn hold(self: &Arc<Self>) -> Held {
        self.count(Opener::Us)
    }

    /// The same for one that the peer has opened.
    pub(crate) fn serve(self: &Arc<Self>) -> Held {
        self.count(Opener::Peer)
    }

    fn count(self: &Arc<Self>, opener: Opener) -> Held {
        self.counter(opener).fetch_add(1, Ordering::Relaxed);
        Held { tunnel: self.clone(), opener }
    }

    fn counter(&self, opener: Opener) -> &AtomicUsize {
        match opener {
            Opener::Us => &self.open,
            Opener::Peer => &self.served,
        }
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

    /// No new streams here: another link takes its place.
    pub(crate) fn retire(&self) {
        self.retired.cancel();
    }

    /// Resolves when another link has taken its place, or it has ended.
    pub(crate) async fn replaced(&self) {
        tokio::select! {
            () = self.retired.cancelled() => {}
            () = self.link.closed() => {}
        }
    }

    /// Resolves when it is retired and carries nothing more, of neither side.
    pub(crate) async fn spent(&self) {
        self.retired.cancelled().await;
        loop {
            let changed = self.idle.notified();
            if self.open.load(Ordering::Acquire) == 0 && self.served.load(Ordering::Acquire) == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Packets sent and lost since the last call. To be called in regular intervals.
    pub(crate) fn count_packets(&self) -> (u64, u64) {
        let path = self.link.path();
        let mut packets = self.packets();
        let (sent, lost) = (path.sent.saturating_sub(packets.counted.0), path.lost.saturating_sub(packets.counted.1));
        packets.counted = (path.sent, path.lost);
        packets.sent_of_late = packets.sent_of_late * Packets::MEMORY + sent as f64;
        packets.lost_of_late = packets.lost_of_late * Packets::MEMORY + lost as f64;
        (sent, lost)
    }

    /// Lost packets per million sent, of late.
    pub(crate) fn loss_ppm(&self) -> u32 {
        let packets = self.packets();
        let share = packets.lost_of_late / packets.sent_of_late.max(1.0);
        (share.clamp(0.0, 1.0) * 1e6) as u32
    }

    /// It loses packets, and that is more than an accident.
    pub(crate) fn is_lossy(&self) -> bool {
        self.packets().lost_of_late >= 3.0 && self.loss_ppm() >= LOSSY_PPM
    }

    fn packets(&self) -> MutexGuard<'_, Packets> {
        self.packets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_going(&self) -> bool {
        self.goaway.load(Ordering::Relaxed) || self.retired.is_cancelled()
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Relaxed)
    }

    /// Lower is better: nothing against it first, then round trip times load here times load there. Round trips below a
    /// millisecond differ by noise.
    pub(super) fn cost(&self) -> (bool, u64) {
        let rtt = u64::from(self.rtt_us.load(Ordering::Relaxed)).max(1_000);
        let open = self.open.load(Ordering::Relaxed) as u64;
        let load = u64::from(self.load.load(Ordering::Relaxed));
        (self.is_suspect() || load >= 1_000, rtt.saturating_mul(open + 1).saturating_mul(load + 1_000))
    }
}

/// What a tunnel's transport has said of its packets.
#[derive(Debug, Default)]
struct Packets {
    counted: (u64, u64),
    /// The same with the past fading away.
    sent_of_late: f64,
    lost_of_late: f64,
}

impl Packets {
    /// Per call, ten a second: half is forgotten in seven seconds.
    const MEMORY: f64 = 0.99;
}

/// Who has opened a stream.
#[derive(Clone, Copy, Debug)]
enum Opener {
    Us,
    Peer,
}

/// One open stream of a tunnel.
#[derive(Debug)]
pub(crate) struct Held {
    tunnel: Arc<Tunnel>,
    opener: Opener,
}

impl Held {
    /// The tunnel.
    pub(crate) fn tunnel(&self) -> &Tunnel {
        &self.tunnel
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.tunnel.counter(self.opener).fetch_sub(1, Ordering::Release) == 1 {
            self.tunnel.idle.notify_waiters();
        }
    }
}

fn micros(d: Duration) -> u32 {
    u32::try_from(d.as_micros()).unwrap_or(u32::MAX)
}
