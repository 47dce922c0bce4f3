//! The dialling side of a TCP link: its control connection, and the connections it keeps warm or on offer.
//!
//! One task per link refills what is used, replaces what grows old, and dials at most a few at a time; one that takes long
//! holds up no other. It ends with the link.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use isthmus_api::proto::tunnel::v1::{TcpPreface, TcpPurpose};
use isthmus_model::ids::ClusterName;
use isthmus_runtime::backoff::Backoff;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    net::TcpStream,
    time::{self, Instant},
};

use super::{
    ALPN, LinkNumber, TICK, TcpLink, prepare,
    stream::{Connection, Slot},
    tls::{self, Established, Tls},
};
use crate::{
    clock,
    core::Core,
    frame,
    tunnel::{
        VERSION,
        link::{Fresh, Link, RecvHalf, SendHalf, quic},
    },
};

/// Handshakes of one link under way at one time.
const DIALS: usize = 32;
const BACKOFF_BASE: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Until an offer that ended unused is made again, unless it had lasted for a while.
const UNUSED: Duration = Duration::from_secs(1);
const LASTED: Duration = Duration::from_secs(10);

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TcpError {
    /// The TLS configuration is not usable.
    #[error("make the TLS configuration")]
    Tls(#[from] isthmus_identity::tls::TlsError),
    /// The connection, or its handshake, failed.
    #[error("connect over TCP")]
    Connect(#[from] std::io::Error),
    /// The first frame could not be sent.
    #[error("send the first frame")]
    Preface,
    /// The link has as many connections as it may.
    #[error("the link has as many connections as it may")]
    Full,
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Control,
    Stream,
    Offer,
}

/// How to reach the peer again.
pub(super) struct Way {
    core: Arc<Core>,
    address: SocketAddr,
    cluster: ClusterName,
    /// Made once: what it shows and trusts is read at each handshake.
    tls: Arc<ClientConfig>,
}

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Way").field("address", &self.address).field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// Dials `address`, where a gateway of `cluster` is expected. The caller sets the deadline.
pub(crate) async fn dial(core: &Arc<Core>, cluster: &ClusterName, address: SocketAddr) -> Result<Fresh, TcpError> {
    let identity = &core.identity;
    let policy = quic::gateway_of(&identity.federation, cluster);
    let mut config = isthmus_identity::tls::client_config(Some(&identity.source), &identity.trust, policy, &[ALPN])?;
    config.enable_secret_extraction = true;
    let way = Way { core: core.clone(), address, cluster: cluster.clone(), tls: Arc::new(config) };
    let established = way.handshake().await?;
    let leaf = established.leaf.clone().ok_or(TcpError::Preface)?;
    let number: LinkNumber = rand::random();
    let link = TcpLink::new(number, cluster.clone(), (address, leaf), &core.config.tunnel.tcp, Some(way));
    let link = Arc::new(link);
    let control = admit(&link, established, Purpose::Control).await?;
    core.tasks.spawn("tunnel.tcp_pool", keep(link.clone()));
    let (send, recv) = control.halves();
    Ok(Fresh { link: Link::Tcp(link), send: SendHalf::Tcp(send), recv: RecvHalf::Tcp(recv) })
}

impl Way {
    /// One more connection for `link`.
    pub(super) async fn connect(&self, link: &TcpLink, purpose: Purpose) -> Result<Connection, TcpError> {
        let attempt = async { admit(link, self.handshake().await?, purpose).await };
        let deadline = self.core.config.tunnel.handshake_timeout;
        time::timeout(deadline, attempt).await.unwrap_or(Err(TcpError::Timeout))
    }

    async fn handshake(&self) -> Result<Established, TcpError> {
        let tcp = TcpStream::connect(self.address).await?;
        prepare(&tcp, &self.core);
        // Nobody looks at the name: the SPIFFE ID counts.
        let name = ServerName::IpAddress(self.address.ip().into());
        Ok(tls::connect(&self.tls, name, tcp).await?)
    }
}

async fn admit(link: &TcpLink, established: Established, purpose: Purpose) -> Result<Connection, TcpError> {
    let slot = link.slots.clone().try_acquire_owned().map_err(|_| TcpError::Full)?;
    let slot = Slot { _link: slot, _peers: None };
    let purpose = match purpose {
        Purpose::Control => TcpPurpose::Control,
        Purpose::Stream => TcpPurpose::Stream,
        Purpose::Offer => TcpPurpose::Offer,
    };
    let preface = TcpPreface { version: VERSION, link: link.number.to_vec(), purpose: purpose.into() };
    let preface = frame::encode(&preface).map_err(|_| TcpError::Preface)?;
    let tls = Tls::new(established).map_err(|_| TcpError::Preface)?;
    let connection = Connection::new(tls, link.stream_bond(), slot);
    let (mut send, _) = connection.clone().halves();
    send.write_chunk(preface.freeze()).await.map_err(|_| TcpError::Preface)?;
    Ok(connection)
}

/// Keeps the link's connections as many and as young as they should be.
async fn keep(link: Arc<TcpLink>) {
    let Some(way) = &link.way else { return };
    let mut backoff = Backoff::new(BACKOFF_BASE, BACKOFF_MAX);
    let mut pause = None;
    let mut ticks = time::interval(TICK);
    let mut dials = FuturesUnordered::new();
    let mut under_way = UnderWay::default();
    loop {
        while pause.is_none()
            && dials.len() < DIALS
            && let Some(purpose) = link.missing(&under_way)
        {
            *under_way.of(purpose) += 1;
            let link = &link;
            dials.push(async move { (purpose, way.connect(link, purpose).await) });
        }
        tokio::select! {
            Some((purpose, dialled)) = dials.next() => {
                *under_way.of(purpose) -= 1;
                match dialled {
                    Ok(connection) => {
                        backoff.reset();
                        if purpose == Purpose::Offer {
                            offer(&link, way, connection);
                        } else {
                            link.put(connection);
                        }
                    }
                    Err(error) => {
                        tracing::debug!(cluster = %way.cluster, address = %way.address, %error, "no further connection");
                        pause = Some(Instant::now() + backoff.next());
                    }
                }
            }
            () = time::sleep_until(pause.unwrap_or_else(Instant::now)), if pause.is_some() => pause = None,
            () = link.taken.notified() => {}
            _ = ticks.tick() => {
                link.tend();
            }
            () = link.closed.cancelled() => return,
        }
    }
}

/// Dials of one link, by what they are for.
#[derive(Default)]
pub(super) struct UnderWay {
    pub(super) streams: usize,
    pub(super) offers: usize,
}

impl UnderWay {
    fn of(&mut self, purpose: Purpose) -> &mut usize {
        if purpose == Purpose::Offer { &mut self.offers } else { &mut self.streams }
    }
}

/// Until the peer uses it, or it ends. One that ended soon and unused keeps its place for a while: the peer might else have
/// us dial without pause. One that has only become old is replaced at once: all of them do at about the same time.
fn offer(link: &Arc<TcpLink>, way: &Way, connection: Connection) {
    link.offered.fetch_add(1, Ordering::Relaxed);
    let link = link.clone();
    way.core.tasks.spawn("tunnel.tcp_offer", async move {
        let since = clock::now();
        if !link.await_first(connection).await && clock::since(since) < LASTED {
            tokio::select! {
                () = time::sleep(UNUSED) => {}
                () = link.closed.cancelled() => {}
            }
        }
        link.offered.fetch_sub(1, Ordering::Relaxed);
        link.taken.notify_one();
    });
}
