//! The TCP transport: where UDP does not get through, or a link's policy says so (docs/tunnel.md).
//!
//! A link is a group of TLS 1.3 connections that the dialler opens, tied together by a number it chose: one carries the
//! control stream, each other one carries a single stream in its life. Some are kept warm, so that a new stream costs no
//! handshake. Either side opens streams: the dialler on connections of its own, the acceptor on those that the dialler
//! *offers* when asked to, since an acceptor may not be able to dial. [`dial`] and [`accept`] make links, [`stream`] is
//! one connection and [`tls`] what protects it. What holds: when the control connection ends, so does everything; a connection belongs to the link of
//! the same number *and* the same cluster, by its certificate.

pub(crate) mod accept;
mod dial;
mod stream;
mod tls;

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use isthmus_model::ids::ClusterName;
use rustls::pki_types::CertificateDer;
use socket2::SockRef;
use tokio::{
    net::TcpStream,
    sync::{Mutex as AsyncMutex, Notify, Semaphore, mpsc},
    time,
};
use tokio_util::sync::CancellationToken;

use self::{
    dial::{Purpose, UnderWay, Way},
    stream::{Bond, Connection},
};
pub(crate) use self::{
    dial::{TcpError, dial},
    stream::{Receiver, Sender},
};
use super::{Broken, RecvHalf, SendHalf};
use crate::{clock, config::TcpConfig, core::Core, splice, tunnel::Close};

/// The protocol's name (ALPN).
pub(crate) const ALPN: &[u8] = b"isthmus-tcp/1";
/// The longest first frame.
const MAX_PREFACE: usize = 64;
/// How long to wait for a connection that the peer should offer. It may not know that we need one.
const OFFER: Duration = Duration::from_millis(500);
/// A handshake that takes longer has lost its first packet, which TCP sends again after a second (RFC 6298, 2.1), or has a
/// long way.
const OVERDUE: Duration = Duration::from_millis(250);
/// Old connections are looked for, and the number of misses is halved.
const TICK: Duration = Duration::from_secs(5);
/// Streams that the peer opened and nobody has taken yet.
const BACKLOG: usize = 128;

/// What ties a link's connections together.
pub(super) type LinkNumber = [u8; 16];

/// A link over TCP.
#[derive(Debug)]
pub(crate) struct TcpLink {
    number: LinkNumber,
    cluster: ClusterName,
    remote: SocketAddr,
    leaf: CertificateDer<'static>,
    config: TcpConfig,
    /// How more connections are made: by the dialler only.
    way: Option<Way>,
    /// Connections for streams of our own.
    ready: Mutex<VecDeque<Ready>>,
    arrived: Notify,
    taken: Notify,
    /// How many were missing when a stream was opened, of late: what is kept warm grows with it.
    misses: AtomicUsize,
    /// When an acceptor last looked after its pool.
    tended: Mutex<Option<Instant>>,
    /// Connections that the peer would like to be offered.
    wanted: AtomicUsize,
    /// Offered, and not used yet.
    offered: AtomicUsize,
    to_accept: mpsc::Sender<(SendHalf, RecvHalf)>,
    incoming: AsyncMutex<mpsc::Receiver<(SendHalf, RecvHalf)>>,
    slots: Arc<Semaphore>,
    closed: CancellationToken,
    /// Its streams end with it, but for those of a link that ends in good order: they have connections of their own, and a
    /// while for what is on its way.
    cut: CancellationToken,
    /// [`Bond::heard`] of all its connections.
    heard: Arc<AtomicU64>,
    why: OnceLock<String>,
    own_reason: OnceLock<Close>,
}

#[derive(Debug)]
struct Ready {
    connection: Connection,
    since: Instant,
}

impl TcpLink {
    fn new(
        number: LinkNumber,
        cluster: ClusterName,
        (remote, leaf): (SocketAddr, CertificateDer<'static>),
        config: &TcpConfig,
        way: Option<Way>,
    ) -> Self {
        let (tx, rx) = mpsc::channel(BACKLOG);
        Self {
            number,
            cluster,
            remote,
            leaf,
            config: config.clone(),
            way,
            ready: Mutex::default(),
            arrived: Notify::new(),
            taken: Notify::new(),
            misses: AtomicUsize::new(0),
            tended: Mutex::default(),
            wanted: AtomicUsize::new(0),
            offered: AtomicUsize::new(0),
            to_accept: tx,
            incoming: AsyncMutex::new(rx),
            slots: Arc::new(Semaphore::new(config.max_connections_per_link)),
            closed: CancellationToken::new(),
            cut: CancellationToken::new(),
            heard: Arc::default(),
            why: OnceLock::new(),
            own_reason: OnceLock::new(),
        }
    }

    /// Of a connection that carries a stream.
    fn stream_bond(&self) -> Bond {
        Bond { ended: self.cut.clone(), heard: self.heard.clone() }
    }

    /// Of the connection that carries the control stream of a link that the peer has dialled.
    fn control_bond(&self) -> Bond {
        Bond { ended: self.closed.clone(), heard: self.heard.clone() }
    }

    /// How often something new has come from the peer.
    pub(super) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    /// A connection for a stream of our own: a warm one, or a new one if we can dial, or the next one offered.
    pub(super) async fn open(&self) -> Result<(SendHalf, RecvHalf), Broken> {
        if self.closed.is_cancelled() {
            return Err(Broken);
        }
        let connection = match &self.way {
            Some(way) => match self.take() {
                Some(warm) => warm,
                None => {
                    self.missed();
                    self.dialled(way).await?
                }
            },
            None => self.next_offered().await?,
        };
        let (send, recv) = connection.halves();
        Ok((SendHalf::Tcp(send), RecvHalf::Tcp(recv)))
    }

    /// One that the peer offers.
    async fn next_offered(&self) -> Result<Connection, Broken> {
        let deadline = time::Instant::now() + OFFER;
        loop {
            let mut arrived = pin!(self.arrived.notified());
            // What comes after the look at what is there is not missed.
            arrived.as_mut().enable();
            if let Some(connection) = self.take() {
                return Ok(connection);
            }
            self.missed();
            tokio::select! {
                () = arrived => {}
                () = self.closed.cancelled() => return Err(Broken),
                () = time::sleep_until(deadline) => return Err(Broken),
            }
        }
    }

    /// None was ready.
    fn missed(&self) {
        self.misses.fetch_add(1, Ordering::Relaxed);
        self.taken.notify_one();
    }

    /// One that is dialled now; if that takes long, what the others have become is as good.
    async fn dialled(&self, way: &Way) -> Result<Connection, Broken> {
        let mut own = pin!(way.connect(self, Purpose::Stream));
        if let Ok(own) = time::timeout(OVERDUE, &mut own).await {
            return own.map_err(|_| Broken);
        }
        loop {
            let mut arrived = pin!(self.arrived.notified());
            arrived.as_mut().enable();
            if let Some(connection) = self.take() {
                return Ok(connection);
            }
            tokio::select! {
                own = &mut own => return own.map_err(|_| Broken),
                () = arrived => {}
                () = self.closed.cancelled() => return Err(Broken),
            }
        }
    }

    /// The next stream that the peer opened. Cancel-safe.
    pub(super) async fn accept(&self) -> Option<(SendHalf, RecvHalf)> {
        let mut incoming = self.incoming.lock().await;
        tokio::select! {
            stream = incoming.recv() => stream,
            () = self.closed.cancelled() => None,
        }
    }

    pub(super) fn close(&self, why: Close) {
        if self.why.set(why.label().to_owned()).is_ok() {
            self.own_reason.get_or_init(|| why);
        }
        self.end();
    }

    /// The peer has closed it, or its control connection is gone.
    pub(crate) fn ended(&self, why: String) {
        // The first reason stands.
        drop(self.why.set(why));
        self.end();
    }

    /// The peer has drained: no streams any more, and those that it has finished may still have bytes on their way. The
    /// caller cuts them off later.
    pub(crate) fn ended_in_order(&self, why: String) {
        drop(self.why.set(why));
        self.closed.cancel();
        self.lock().clear();
    }

    /// Ends what streams are left.
    pub(crate) fn end(&self) {
        self.closed.cancel();
        self.cut.cancel();
        self.lock().clear();
    }

    pub(super) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    pub(super) fn why_closed(&self) -> Option<String> {
        self.closed.is_cancelled().then(|| self.why.get().cloned().unwrap_or_default())
    }

    /// Why *we* have closed it, if we have.
    pub(crate) fn own_reason(&self) -> Option<Close> {
        self.own_reason.get().copied()
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        self.remote
    }

    pub(super) fn leaf(&self) -> &CertificateDer<'static> {
        &self.leaf
    }

    /// How many connections an acceptor would like to have on offer for its own streams; 0 while it can dial. Asked again
    /// and again.
    pub(crate) fn wishes(&self, needs: bool) -> u32 {
        if self.way.is_none() && self.is_untended() {
            self.tend();
        }
        let wish = if needs && self.way.is_none() { self.warm() } else { 0 };
        u32::try_from(wish).unwrap_or(u32::MAX)
    }

    /// The peer would like so many connections on offer.
    pub(crate) fn want(&self, connections: u32) {
        let wanted = usize::try_from(connections).unwrap_or(usize::MAX).min(self.config.max_warm);
        if self.wanted.swap(wanted, Ordering::Relaxed) != wanted {
            self.taken.notify_one();
        }
    }

    /// Lets go of what is too old or has ended, and of half of the wish for more. For whoever runs the link, each [`TICK`].
    fn tend(&self) {
        self.misses.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n / 2)).ok();
        let limit = self.config.idle_timeout;
        self.lock().retain(|ready| clock::since(ready.since) < limit && ready.connection.is_quiet());
    }

    /// Whether [`TcpLink::tend`] is due; then not again for a while.
    fn is_untended(&self) -> bool {
        let now = clock::now();
        let mut tended = self.tended.lock().unwrap_or_else(PoisonError::into_inner);
        let due = tended.is_none_or(|at| now.duration_since(at) >= TICK);
        if due {
            *tended = Some(now);
        }
        due
    }

    /// How many connections to keep ready.
    fn warm(&self) -> usize {
        (self.config.min_warm + self.misses.load(Ordering::Relaxed)).min(self.config.max_warm)
    }

    /// What to dial next, beside what is `under_way`.
    fn missing(&self, under_way: &UnderWay) -> Option<Purpose> {
        if self.lock().len() + under_way.streams < self.warm() {
            return Some(Purpose::Stream);
        }
        let offered = self.offered.load(Ordering::Relaxed) + under_way.offers;
        (offered < self.wanted.load(Ordering::Relaxed)).then_some(Purpose::Offer)
    }

    fn take(&self) -> Option<Connection> {
        let mut ready = self.lock();
        let now = clock::now();
        while let Some(first) = ready.pop_front() {
            if now.duration_since(first.since) < self.config.idle_timeout && first.connection.is_quiet() {
                drop(ready);
                self.taken.notify_one();
                return Some(first.connection);
            }
        }
        None
    }

    fn put(&self, connection: Connection) {
        let mut ready = self.lock();
        // The peer offers what it was asked for; more than fits is the peer's mistake and dropped.
        if !self.closed.is_cancelled() && ready.len() < self.config.max_warm {
            ready.push_back(Ready { connection, since: clock::now() });
            drop(ready);
            self.arrived.notify_one();
        }
    }

    /// Waits for the first bytes on a connection that the peer may use, and hands it on as a stream of the peer's; whether
    /// it came to that.
    async fn await_first(&self, connection: Connection) -> bool {
        let (send, mut recv) = connection.halves();
        // The peer gives it up before we do, unless it is gone.
        let limit = self.config.idle_timeout + Duration::from_secs(15);
        let first = tokio::select! {
            first = time::timeout(limit, recv.chunk()) => first,
            () = self.closed.cancelled() => return false,
        };
        let Ok(Ok(Some(bytes))) = first else { return false };
        recv.push_back(bytes);
        // A full backlog makes the peer's next streams wait; its deadlines judge that. Nobody empties it after the end.
        tokio::select! {
            sent = self.to_accept.send((SendHalf::Tcp(send), RecvHalf::Tcp(recv))) => sent.is_ok(),
            () = self.closed.cancelled() => false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Ready>> {
        // Every section leaves the queue whole, so a panic in another one does not spoil it.
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.closed.cancel();
        self.cut.cancel();
    }
}

/// Links that peers have dialled, by number: further connections find theirs here.
#[derive(Debug, Default)]
pub(crate) struct Links(Mutex<HashMap<LinkNumber, Weak<TcpLink>>>);

impl Links {
    fn add(&self, link: &Arc<TcpLink>) -> bool {
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|_, link| link.strong_count() > 0);
        let free = !links.contains_key(&link.number);
        if free {
            links.insert(link.number, Arc::downgrade(link));
        }
        free
    }

    fn find(&self, number: &LinkNumber, cluster: &ClusterName) -> Option<Arc<TcpLink>> {
        let links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let link = links.get(number)?.upgrade()?;
        (link.cluster == *cluster && !link.closed.is_cancelled()).then_some(link)
    }
}

/// What every connection of a link is set to: no coalescing, and an end for peers that vanish without a word.
fn prepare(tcp: &TcpStream, core: &Core) {
    splice::prepare(tcp);
    let unacknowledged = core.config.tunnel.tcp.user_timeout;
    if let Err(error) = SockRef::from(tcp).set_tcp_user_timeout(Some(unacknowledged)) {
        tracing::debug!(%error, "TCP_USER_TIMEOUT refused");
    }
}

#[cfg(test)]
mod tests {
    use super::{
        stream::Slot,
        tls::tests::{pair, say},
        *,
    };
    use crate::testkit::cluster;

    #[tokio::test]
    async fn what_nobody_accepts_ends_with_the_link() {
        let remote = SocketAddr::from(([127, 0, 0, 1], 1));
        let leaf = CertificateDer::from(Vec::new());
        let link = TcpLink::new([7; 16], cluster("east"), (remote, leaf), &TcpConfig::default(), None);
        let link = Arc::new(link);
        let mut peers = Vec::new();
        for taken in 0..=BACKLOG {
            let (mut near, far) = pair().await;
            say(&mut near, b"1").await;
            peers.push(near);
            let slot = Slot { _link: link.slots.clone().try_acquire_owned().unwrap(), _peers: None };
            let mut waits = pin!(link.await_first(Connection::new(far, link.stream_bond(), slot)));
            if taken < BACKLOG {
                assert!(waits.await, "it is to be accepted");
                continue;
            }
            let waited = time::timeout(Duration::from_millis(200), &mut waits).await;
            assert!(waited.is_err(), "there is no room, and nobody accepts");
            link.end();
            assert_eq!(time::timeout(Duration::from_secs(5), waits).await, Ok(false));
        }
    }

    #[tokio::test]
    async fn an_acceptor_lets_go_of_what_has_ended_and_of_its_wish() {
        let remote = SocketAddr::from(([127, 0, 0, 1], 1));
        let config = TcpConfig::default();
        let link = TcpLink::new([7; 16], cluster("east"), (remote, CertificateDer::from(Vec::new())), &config, None);
        let (near, far) = pair().await;
        let slot = Slot { _link: link.slots.clone().try_acquire_owned().unwrap(), _peers: None };
        link.put(Connection::new(far, link.stream_bond(), slot));
        for _ in 0..1_000 {
            link.missed();
        }
        assert_eq!(link.wishes(true) as usize, config.max_warm);
        assert_eq!(link.lock().len(), 1);
        drop(near);
        let given_back = async || {
            *link.tended.lock().unwrap() = None;
            let wish = link.wishes(true) as usize;
            link.lock().is_empty() && wish == config.min_warm
        };
        isthmus_runtime::wait::wait_for("all is given back", Duration::from_secs(5), given_back).await.unwrap();
    }
}
