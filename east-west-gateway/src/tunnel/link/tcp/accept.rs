//! The accepting side of the TCP transport: connections of peers, each sorted by its first frame.
//!
//! A control connection makes a link; the others join theirs. Handshakes and connections are bounded, in all and per
//! source; whatever does not get through is closed and counted, and disturbs nobody else.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use isthmus_api::proto::tunnel::v1::{TcpPreface, TcpPurpose};
use isthmus_identity::tls::{ClientAuth, TlsError, peer_id, server_config};
use isthmus_model::ids::ClusterName;
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{
    net::{TcpListener, TcpStream},
    time,
};

use super::{
    ALPN, LinkNumber, MAX_PREFACE, TcpLink, prepare,
    stream::{Connection, Slot},
    tls::{self, Tls},
};
use crate::{
    core::Core,
    handover::shelf::Role,
    ingress::sources::Sources,
    shares::{Full, Place},
    splice,
    tunnel::{
        VERSION, accept,
        link::{Link, RecvHalf, SendHalf, quic},
    },
};

/// For the word that a gateway is succeeded to reach its peers.
const HEARD: Duration = Duration::from_millis(150);
/// After a failed accept, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts until the gateway stops, or until its successor does.
pub(crate) async fn listen(core: Arc<Core>, listener: TcpListener) {
    let _shelved = core.shelf.put(Role::TunnelTcp, &listener).inspect_err(|error| {
        tracing::warn!(%error, "no successor can be given this listener");
    });
    tokio::select! {
        () = core.steps.open.cancelled() => {}
        () = core.doors.cancelled() => return,
    }
    if !core.steps.alone.is_cancelled() {
        // Until peers have heard of the succession, what they dial belongs to links of the predecessor.
        time::sleep(HEARD).await;
    }
    // Made once: what it shows and trusts is read at each handshake.
    let config = match config(&core) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "no links over TCP: TLS cannot be configured");
            return;
        }
    };
    let sources = Arc::new(Sources::far(core.config.tunnel.tcp.max_pending_handshakes_per_source));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = core.doors.cancelled() => return,
        };
        let (tcp, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                core.metrics.reject("accept_failed");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let places = (core.tcp_handshakes.clone().try_acquire_owned(), sources.try_acquire(remote.ip()));
        let (Ok(pending), Some(share)) = places else {
            core.metrics.reject("peer_overload");
            splice::abort(&tcp);
            continue;
        };
        let (served, config) = (core.clone(), config.clone());
        core.tasks.spawn("tunnel.tcp_accept", async move {
            let deadline = served.config.tunnel.handshake_timeout;
            let sorted = time::timeout(deadline, Newcomer::greet(&served, &config, (tcp, remote))).await;
            drop((pending, share));
            match sorted {
                Ok(Ok(newcomer)) => newcomer.join(&served).await,
                Ok(Err(error)) => {
                    tracing::debug!(peer = %remote, %error, "peer's TCP handshake failed");
                    served.metrics.reject("peer_handshake");
                }
                Err(_) => served.metrics.reject("peer_handshake_timeout"),
            }
        });
    }
}

fn config(core: &Core) -> Result<Arc<ServerConfig>, TlsError> {
    let identity = &core.identity;
    let auth = ClientAuth::Required(quic::any_gateway(&identity.federation));
    let mut config = server_config(&identity.source, &identity.trust, auth, &[ALPN])?;
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// A connection whose first frame was read.
struct Newcomer {
    tls: Tls,
    remote: SocketAddr,
    leaf: CertificateDer<'static>,
    cluster: ClusterName,
    number: LinkNumber,
    purpose: TcpPurpose,
}

impl Newcomer {
    async fn greet(
        core: &Core,
        config: &Arc<ServerConfig>,
        (tcp, remote): (TcpStream, SocketAddr),
    ) -> io::Result<Self> {
        prepare(&tcp, core);
        let refused = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
        let established = tls::accept(config, tcp).await?;
        let verified = established.verified;
        let leaf = established.leaf.clone().ok_or_else(|| refused("no certificate"))?;
        let id = peer_id(Some(std::slice::from_ref(&leaf)));
        let cluster = id.and_then(|id| quic::gateway_cluster(&id, &core.identity.federation));
        let cluster = cluster.ok_or_else(|| refused("not a gateway of this federation"))?;
        let mut tls = Tls::new(established).map_err(|_| refused("not TLS 1.3"))?;
        let preface = read_preface(&mut tls).await?;
        let number = preface.link.as_slice().try_into().map_err(|_| refused("a link's number has 16 bytes"))?;
        if preface.version != VERSION {
            return Err(refused("this gateway speaks version 1"));
        }
        // A link begins with certificates that are shown and verified; its other connections rest on that.
        if preface.purpose() == TcpPurpose::Control && !verified {
            return Err(refused("a control connection must not resume another"));
        }
        Ok(Self { tls, remote, leaf, cluster, number, purpose: preface.purpose() })
    }

    async fn join(self, core: &Arc<Core>) {
        let Self { tls, remote, leaf, cluster, number, purpose } = self;
        let place = match core.tcp_places.try_acquire(&cluster) {
            Ok(place) => place,
            Err(Full::Share) => return core.metrics.reject("tcp_share"),
            Err(Full::All) => return core.metrics.reject("tcp_full"),
        };
        if purpose == TcpPurpose::Control {
            return control(core, (tls, place), (remote, leaf), cluster, number).await;
        }
        // What it may do is asked at each use: its link is closed when its cluster may do nothing more.
        let Some(link) = core.tcp_links.find(&number, &cluster) else { return core.metrics.reject("tcp_no_link") };
        let Ok(slot) = link.slots.clone().try_acquire_owned() else { return core.metrics.reject("tcp_link_full") };
        let slot = Slot { _link: slot, _peers: Some(place) };
        let connection = Connection::new(tls, link.stream_bond(), slot);
        match purpose {
            TcpPurpose::Stream => drop(link.await_first(connection).await),
            TcpPurpose::Offer => link.put(connection),
            TcpPurpose::Control | TcpPurpose::Unspecified => core.metrics.reject("peer_protocol"),
        }
    }
}

async fn control(
    core: &Arc<Core>,
    (tls, peers): (Tls, Place),
    peer: (SocketAddr, CertificateDer<'static>),
    cluster: ClusterName,
    number: LinkNumber,
) {
    if core.draining.is_cancelled() {
        return core.metrics.reject("draining");
    }
    let link = Arc::new(TcpLink::new(number, cluster.clone(), peer, &core.config.tunnel.tcp, None));
    let (Ok(slot), true) = (link.slots.clone().try_acquire_owned(), core.tcp_links.add(&link)) else {
        return core.metrics.reject("peer_protocol");
    };
    let Ok(place) = core.peer_slots.clone().try_acquire_owned() else { return core.metrics.reject("peer_overload") };
    let slot = Slot { _link: slot, _peers: Some(peers) };
    let (send, recv) = Connection::new(tls, link.control_bond(), slot).halves();
    let control = (SendHalf::Tcp(send), RecvHalf::Tcp(recv));
    accept::member(core, Link::Tcp(link), Some(control), cluster).await;
    drop(place);
}

/// The first frame. What came behind it belongs to the stream.
async fn read_preface(tls: &mut Tls) -> io::Result<TcpPreface> {
    let invalid = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut begun = BytesMut::new();
    loop {
        let length = begun.first_chunk().map(|length: &[u8; 2]| usize::from(u16::from_be_bytes(*length)));
        if length.is_some_and(|length| length > MAX_PREFACE) {
            return Err(invalid("the first frame is too long"));
        }
        if let Some(length) = length
            && begun.len() >= 2 + length
        {
            begun.advance(2);
            let frame = begun.split_to(length);
            tls.push_back(begun.freeze());
            return prost::Message::decode(frame).map_err(|_| invalid("the first frame is no preface"));
        }
        let chunk: Option<Bytes> = tls.chunk().await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionReset))?;
        begun.extend_from_slice(&chunk.ok_or(io::ErrorKind::UnexpectedEof)?);
    }
}
