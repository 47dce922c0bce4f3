//! What all parts of one running gateway share: configuration, identity, the view, evidence, limits, and the steps of a
//! drain.
//!
//! Made once the gateway is enrolled. Nothing here decides; it only holds, so that parts need not know each other.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use isthmus_identity::svid;
use isthmus_model::{
    failover::Candidate,
    ids::{ClusterName, ServiceName},
    time::Timestamp,
};
use isthmus_runtime::tasks::Tasks;
use tokio::{
    sync::{Semaphore, watch},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    availability::LocalPool,
    clock,
    config::Config,
    handover::{shelf::Shelf, steps::Steps},
    ingress::{budget::ReplayBudget, outcasts::Outcasts, sources::Sources},
    metrics::Metrics,
    observed::Observed,
    overload::{Overload, Why},
    shares::Shares,
    standing::Standing,
    tunnel::{
        accept::Inbound,
        link::{Link, quic::Identity, redundancy::Redundancy, tcp},
        registry::{Evidence, Registry},
        stalled::Room,
    },
    view::View,
};

/// What the parts of one gateway share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Arc<Config>,
    /// This gateway's own.
    pub(crate) cluster: ClusterName,
    pub(crate) identity: Identity,
    pub(crate) view: watch::Receiver<Arc<View>>,
    pub(crate) pool: Arc<LocalPool>,
    pub(crate) observed: Observed,
    pub(crate) registry: Registry,
    pub(crate) inbound: Inbound,
    pub(crate) metrics: Metrics,
    pub(crate) tasks: Tasks,
    /// Whether anything new is taken.
    pub(crate) overload: Overload,
    /// What the agent is told of this gateway.
    pub(crate) standing: Standing,
    /// Which paths lose packets (QUIC).
    pub(crate) redundancy: Arc<Redundancy>,
    /// Links that peers have dialled over TCP.
    pub(crate) tcp_links: tcp::Links,
    /// Links of peers.
    pub(crate) peer_slots: Arc<Semaphore>,
    /// QUIC handshakes of peers under way.
    pub(crate) quic_handshakes: Arc<Semaphore>,
    /// And each source's share of those.
    pub(crate) quic_sources: Arc<Sources>,
    /// TCP connections of peers whose first frame is still to come.
    pub(crate) tcp_handshakes: Arc<Semaphore>,
    /// Connections that peers have open over TCP.
    pub(crate) tcp_places: Arc<Shares>,
    /// Streams of all peers.
    pub(crate) stream_places: Arc<Shares>,
    /// What links may hold unread.
    pub(crate) room: Arc<Room>,
    /// Connections of local sidecars.
    pub(crate) local_slots: Arc<Semaphore>,
    /// Of these, the ones whose ClientHello is still to come.
    pub(crate) hello_slots: Arc<Semaphore>,
    /// And each source's share of those.
    pub(crate) hello_sources: Arc<Sources>,
    /// Drain, step one: agent and peers are told to turn away; all is still served.
    pub(crate) draining: CancellationToken,
    /// Step two: no new connection or stream.
    pub(crate) closing: CancellationToken,
    /// Step two for local sidecars, which a successor's listeners may serve before.
    pub(crate) doors: CancellationToken,
    /// Step three: everything ends.
    pub(crate) stop: CancellationToken,
    /// Connections being carried; a drain waits for them.
    pub(crate) carried: TaskTracker,
    /// What a handover adds to that.
    pub(crate) steps: Steps,
    /// What a successor is given.
    pub(crate) shelf: Shelf,
    replays: Mutex<ReplayBudget>,
    hedges: Mutex<ReplayBudget>,
    outcasts: Mutex<Outcasts>,
    ids: AtomicU64,
}

/// What [`Core::new`] needs from outside.
pub(crate) struct Parts {
    pub(crate) config: Arc<Config>,
    pub(crate) cluster: ClusterName,
    pub(crate) identity: Identity,
    pub(crate) view: watch::Receiver<Arc<View>>,
    pub(crate) metrics: Metrics,
    pub(crate) tasks: Tasks,
    pub(crate) steps: Steps,
    pub(crate) shelf: Shelf,
    pub(crate) redundancy: Arc<Redundancy>,
}

impl Core {
    /// A core at rest.
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { config, cluster, identity, view, metrics, tasks, steps, shelf, redundancy } = parts;
        let closing = CancellationToken::new();
        let slots = |n: usize| Arc::new(Semaphore::new(n));
        let ingress = &config.ingress;
        let budget =
            || Mutex::new(ReplayBudget::new(ingress.replay_percent, ingress.replay_floor_per_second, clock::now()));
        Self {
            pool: Arc::new(LocalPool::new(cluster.clone(), &config.egress, metrics.clone())),
            observed: Observed::new(cluster.clone()),
            registry: Registry::default(),
            overload: Overload::default(),
            standing: Standing::new(metrics.clone()),
            inbound: Inbound::default(),
            tcp_links: tcp::Links::default(),
            peer_slots: slots(config.tunnel.max_connections),
            quic_handshakes: slots(config.tunnel.max_pending_handshakes),
            quic_sources: Arc::new(Sources::far(config.tunnel.max_pending_handshakes_per_source)),
            tcp_handshakes: slots(config.tunnel.tcp.max_pending_handshakes),
            tcp_places: Arc::new(Shares::new(config.tunnel.tcp.max_connections)),
            stream_places: Arc::new(Shares::new(config.egress.max_streams)),
            room: Arc::new(Room::new(&config.tunnel)),
            local_slots: slots(ingress.max_connections),
            hello_slots: slots(ingress.max_pending_hellos),
            hello_sources: Arc::new(Sources::near(ingress.max_pending_hellos_per_source)),
            draining: CancellationToken::new(),
            doors: closing.child_token(),
            closing,
            stop: CancellationToken::new(),
            carried: TaskTracker::new(),
            replays: budget(),
            hedges: budget(),
            outcasts: Mutex::new(Outcasts::new(config.egress.ejection_base, config.egress.ejection_max)),
            ids: AtomicU64::new(1),
            redundancy,
            config,
            cluster,
            identity,
            view,
            metrics,
            tasks,
            steps,
            shelf,
        }
    }

    /// The view in force.
    pub(crate) fn current_view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Brings what is known of a remote cluster up to date.
    pub(crate) fn refresh(&self, cluster: &ClusterName) {
        let view = self.current_view();
        self.observed.refresh(cluster, &view, || self.evidence(cluster, &view));
    }

    /// What the gateways of `cluster` say of what it exports.
    pub(crate) fn evidence(&self, cluster: &ClusterName, view: &View) -> Option<Evidence> {
        let services = view.global.iter().flat_map(|global| global.services.values());
        let exported = services.filter(|service| service.exporters.contains_key(cluster));
        self.registry.evidence(cluster, exported.map(|service| &service.name))
    }

    /// Resolves when this gateway serves, with true; or when it stops before.
    pub(crate) async fn opened(&self) -> bool {
        tokio::select! {
            () = self.steps.open.cancelled() => true,
            () = self.stop.cancelled() => false,
        }
    }

    /// A number that no other call gets.
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// A connection is placed for the first time.
    pub(crate) fn note_first_attempt(&self) {
        self.replays.lock().unwrap_or_else(PoisonError::into_inner).deposit();
    }

    /// May a connection be placed once more?
    pub(crate) fn may_replay(&self) -> bool {
        self.replays.lock().unwrap_or_else(PoisonError::into_inner).withdraw(clock::now())
    }

    /// The same for local endpoints of one connection: what the replays of peers and of own sidecars add up to here.
    pub(crate) fn hedges(&self) -> MutexGuard<'_, ReplayBudget> {
        self.hedges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where services failed lately.
    pub(crate) fn outcasts(&self) -> MutexGuard<'_, Outcasts> {
        // Every section leaves the state whole, so a panic in another one does not spoil it.
        self.outcasts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where `port` of `service` may be reached from here; `None` if there is no such service.
    pub(crate) fn candidates(&self, service: &ServiceName, port: u16) -> Option<Vec<Candidate>> {
        let view = self.current_view();
        let global = view.global.as_ref()?;
        Some(self.observed.candidates(global.services.get(service)?, port, global))
    }

    /// Links to `cluster` came or went.
    pub(crate) fn links_changed(&self, cluster: &ClusterName) {
        self.metrics.tunnels(cluster, self.registry.count(cluster));
        self.metrics.downgraded(cluster, self.registry.downgraded(cluster));
        self.refresh(cluster);
        self.observed.touch();
    }

    /// May one more connection or stream be carried? The one decision; limits on their number are counted elsewhere.
    pub(crate) fn admit(&self) -> Result<(), Why> {
        self.overload.admit(self.metrics.carried_now())
    }

    /// How full this gateway is, in permille of the streams that it takes from peers; all of it while it takes none.
    pub(crate) fn load_permille(&self) -> u32 {
        if self.admit().is_err() {
            return 1_000;
        }
        let max = self.config.egress.max_streams.max(1);
        u32::try_from(self.stream_places.taken().saturating_mul(1_000) / max).unwrap_or(u32::MAX)
    }

    /// Resolves when the peer's certificate ends: a link must not outlive what proved it.
    pub(crate) async fn expiry(&self, link: &Link) {
        // The handshake has verified this very leaf; without an end it would not have.
        let ends = expires(link).map_or(0, |at| at.0);
        time::sleep(Duration::from_millis(ends.saturating_sub(isthmus_runtime::now()))).await;
    }
}

/// When the peer's certificate ends.
pub(crate) fn expires(link: &Link) -> Option<Timestamp> {
    svid::expiry_of(&link.leaf()?).ok()
}
