//! One working link to a peer: what it carries, how it does, whether it is on its way out.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use isthmus_model::ids::ClusterName;
use tokio::{sync::Notify, time};
use tokio_util::sync::CancellationToken;

use super::PeerKey;
use crate::{
    clock,
    core::Core,
    tunnel::{
        control::LINGER,
        link::{Link, redundancy::LOSSY_PPM},
        stalled::Stalled,
    },
};

/// For a peer to learn of a link that works here.
const KNOWN: Duration = Duration::from_secs(1);

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
    /// Streams of the peer's.
    served: AtomicUsize,
    pub(super) rtt_us: AtomicU32,
    suspect: AtomicBool,
    goaway: AtomicBool,
    /// The peer's successor is to be dialled; this tunnel serves until that one's does.
    pub(crate) succeeded: CancellationToken,
    retired: CancellationToken,
    replaced_because: OnceLock<&'static str>,
    dead_because: OnceLock<String>,
    retired_at: OnceLock<Instant>,
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
        let stalled = link.windows().map(|windows| core.room.link(windows));
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
            replaced_because: OnceLock::new(),
            dead_because: OnceLock::new(),
            retired_at: OnceLock::new(),
            idle: Notify::new(),
            packets: Mutex::default(),
        }
    }

    /// Counts one open stream while the guard lives.
    pub(crate) fn hold(self: &Arc<Self>) -> Held {
        self.open.fetch_add(1, Ordering::Relaxed);
        Held(self.clone())
    }

    /// The same for one that the peer has opened.
    pub(crate) fn serve(self: &Arc<Self>) -> Served {
        self.served.fetch_add(1, Ordering::Relaxed);
        Served(self.clone())
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
        self.retired_at.get_or_init(clock::now);
        self.retired.cancel();
    }

    /// It ends, or will, for this reason.
    pub(crate) fn set_replaced_because(&self, words: &'static str) {
        self.replaced_because.get_or_init(|| words);
    }

    /// See above.
    pub(crate) fn replaced_because(&self) -> Option<&'static str> {
        self.replaced_because.get().copied()
    }

    /// It is given up for dead, for this reason.
    pub(crate) fn set_dead_because(&self, words: String) {
        self.dead_because.get_or_init(|| words);
    }

    /// See above.
    pub(crate) fn dead_because(&self) -> Option<&str> {
        self.dead_because.get().map(String::as_str)
    }

    /// The peer should open its streams elsewhere, too. Not before it knows of the link that takes this one's place.
    pub(crate) fn is_past(&self) -> bool {
        self.retired_at.get().is_some_and(|at| clock::since(*at) >= KNOWN)
    }

    /// Resolves when another link has taken its place, or it has ended.
    pub(crate) async fn replaced(&self) {
        tokio::select! {
            () = self.retired.cancelled() => {}
            () = self.link.closed() => {}
        }
    }

    /// Resolves when it is retired and carries nothing more.
    pub(crate) async fn spent(&self) {
        self.retired.cancelled().await;
        let idle = || self.open.load(Ordering::Acquire) == 0 && self.served.load(Ordering::Acquire) == 0;
        loop {
            let changed = self.idle.notified();
            if idle() {
                // The last stream's end may be on its way yet.
                time::sleep(LINGER).await;
                if idle() {
                    return;
                }
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

    /// A new stream is better off elsewhere.
    pub(super) fn is_doubtful(&self) -> bool {
        self.is_suspect() || self.load.load(Ordering::Relaxed) >= 1_000
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Relaxed)
    }

    /// Lower is better: round trip times load here times load there. Round trips below a millisecond differ by noise.
    pub(super) fn cost(&self) -> u64 {
        let rtt = u64::from(self.rtt_us.load(Ordering::Relaxed)).max(1_000);
        let open = self.open.load(Ordering::Relaxed) as u64;
        let load = u64::from(self.load.load(Ordering::Relaxed));
        rtt.saturating_mul(open + 1).saturating_mul(load + 1_000)
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

/// One open stream of a tunnel.
#[derive(Debug)]
pub(crate) struct Held(Arc<Tunnel>);

impl Held {
    /// The tunnel.
    pub(crate) fn tunnel(&self) -> &Tunnel {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::Release) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

/// One open stream of a tunnel's peer.
#[derive(Debug)]
pub(crate) struct Served(Arc<Tunnel>);

impl Drop for Served {
    fn drop(&mut self) {
        if self.0.served.fetch_sub(1, Ordering::Release) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

fn micros(d: Duration) -> u32 {
    u32::try_from(d.as_micros()).unwrap_or(u32::MAX)
}
