//! Keeps one link to one peer: dials with backoff and jitter, watches over it, and replaces it before it must end.
//!
//! Several lanes may lead to one peer. A link is replaced make-before-break when this gateway's certificate was renewed,
//! when the peer's nears its end, when the peer has moved or is succeeded by another process, or when QUIC works again where TCP stood
//! in for it: once the new link works the old one takes no new streams, and the running ones finish on it. A lane ends
//! with its peer.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use isthmus_identity::svid::Svid;
use isthmus_model::local::Transport;
use isthmus_runtime::backoff::Backoff;
use quinn::Endpoint;
use tokio::{sync::watch, time};
use tokio_util::sync::CancellationToken;

use super::{
    Close, accept,
    control::{Control, HelloError},
    ending,
    link::{self, Link, quic, tcp},
    registry::{Origin, PeerKey, Steer, Tunnel},
};
use crate::{
    clock,
    core::{Core, expires},
};

const BACKOFF_BASE: Duration = Duration::from_millis(100);
/// A link that has lasted so long was worth dialling: its end is the first failure again.
const LASTING: Duration = Duration::from_secs(1);
/// What an attempt takes at most where the peer lives: a round trip or two.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often it is asked whether a link should be replaced.
const WATCH: Duration = Duration::from_millis(200);
/// A link is replaced so long before the peer's certificate ends, or when a quarter of what was left of it is.
const EARLY: Duration = Duration::from_secs(3_600);

/// What a lane is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Quic,
    Tcp,
    /// TCP, while no QUIC lane works.
    TcpWithoutQuic,
}

impl Lane {
    fn transport(self) -> Transport {
        match self {
            Self::Quic => Transport::Quic,
            Self::Tcp | Self::TcpWithoutQuic => Transport::Tcp,
        }
    }
}

/// Why a peer could not be reached.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("dial over QUIC")]
    Quic(#[from] quic::DialError),
    #[error("dial over TCP")]
    Tcp(#[from] tcp::TcpError),
    #[error("open the control stream")]
    Control(#[from] HelloError),
    #[error("no answer within {0:?}: is the gateway up, and does the way let {1} through?")]
    Timeout(Duration, &'static str),
    #[error("the gateway at this address calls itself {0:?}")]
    OtherGateway(String),
}

/// One gateway to be reached.
#[derive(Clone)]
pub(super) struct Peer {
    pub(super) core: Arc<Core>,
    pub(super) endpoint: Endpoint,
    pub(super) key: PeerKey,
    pub(super) address: SocketAddr,
    pub(super) steer: Steer,
    /// Links to where it was before: they take new streams until one to `address` works.
    pub(super) before: Arc<[Weak<Tunnel>]>,
}

impl Peer {
    /// Keeps one link until the peer is given up.
    pub(super) async fn keep(self, lane: Lane) {
        let mut wake = self.steer.wake.subscribe();
        tokio::select! {
            () = self.lane(lane, &mut wake) => {}
            () = self.steer.cancel.cancelled() => {}
            () = self.steer.moved.cancelled() => {}
        }
    }

    async fn lane(&self, lane: Lane, wake: &mut watch::Receiver<u64>) {
        let mut backoff = Backoff::new(BACKOFF_BASE, self.core.config.tunnel.dial_backoff_max);
        // Takes new streams until another one does.
        let mut before: Option<Arc<Tunnel>> = None;
        loop {
            // A gateway that was taken over leaves dialling to its successor.
            if self.core.steps.taken_over.is_cancelled() {
                return;
            }
            if lane == Lane::TcpWithoutQuic && before.is_none() {
                self.without_quic(self.core.config.tunnel.fallback_after).await;
            }
            // Before the handshake, so that a renewal meanwhile is not missed.
            let shown = self.core.identity.source.current();
            let dialled = tokio::select! {
                dialled = self.dial(lane) => dialled,
                // An attempt's packets may have been lost to a dead predecessor.
                () = sign_of_life(wake) => continue,
            };
            match dialled {
                Ok((link, control)) => {
                    let began = clock::now();
                    let (ended, tunnel) = self.carry(lane, (link, shown), control, before.take()).await;
                    before = tunnel;
                    let lasted = clock::since(began) >= LASTING;
                    if lasted {
                        backoff.reset();
                    }
                    // Whatever a peer says as soon as a link works, it is not dialled without a pause.
                    if ended == Ended::Replace && lasted {
                        continue;
                    }
                }
                Err(error) => self.failed(lane, &error),
            }
            tokio::select! {
                () = time::sleep(backoff.next()) => {}
                _ = wake.changed() => {}
            }
        }
    }

    /// The first failure in a row is worth a look; the rest is in the status and the metrics.
    fn failed(&self, lane: Lane, error: &DialError) {
        let transport = lane.transport();
        let (cluster, gateway) = &self.key;
        let (address, over, error) = (self.address, link::label(transport), isthmus_runtime::tasks::chain(error));
        self.core.metrics.dial_failed(cluster, gateway, over);
        if self.core.registry.failed(&self.key, transport, error.clone()) {
            tracing::warn!(%cluster, gateway, %address, transport = over, error, "peer not reached; trying on");
        } else {
            tracing::debug!(%cluster, gateway, %address, transport = over, error, "peer not reached");
        }
        self.core.refresh(cluster);
    }

    async fn dial(&self, lane: Lane) -> Result<(Link, Control), DialError> {
        let core = &self.core;
        let attempt = async {
            let fresh = match lane {
                Lane::Quic => {
                    let to = (&self.key.0, self.address);
                    quic::dial(&self.endpoint, &core.config.tunnel, &core.identity, to).await?
                }
                Lane::Tcp | Lane::TcpWithoutQuic => tcp::dial(core, &self.key.0, self.address).await?,
            };
            let opening = Opening { link: fresh.link, done: false };
            let control = Control::open(fresh.send, fresh.recv, &core.config.name).await?;
            if control.peer != self.key.1 {
                return Err(DialError::OtherGateway(control.peer));
            }
            Ok((opening.done(), control))
        };
        let deadline = core.config.tunnel.handshake_timeout;
        let protocol = match lane.transport() {
            Transport::Quic => "UDP",
            Transport::Tcp => "TCP",
        };
        time::timeout(deadline, attempt).await.unwrap_or(Err(DialError::Timeout(deadline, protocol)))
    }

    /// From here until it ends or is replaced, new streams may use the link, and `before` takes none any more. Returns the
    /// tunnel if it serves on until it is replaced.
    async fn carry(
        &self,
        lane: Lane,
        (link, shown): (Link, Arc<Svid>),
        control: Control,
        before: Option<Arc<Tunnel>>,
    ) -> (Ended, Option<Arc<Tunnel>>) {
        let (cluster, gateway) = &self.key;
        let transport = link.transport();
        let origin = Origin::Dialled(self.address);
        let tunnel = Arc::new(Tunnel::new(&self.core, self.key.clone(), link, origin));
        let replace = self.replacement_due(&tunnel.link, shown);
        if !self.core.registry.up(&tunnel) {
            tunnel.link.close(Close::Replaced);
            return (Ended::Lost, before);
        }
        let elsewhere = self.before.iter().filter_map(Weak::upgrade);
        before.into_iter().chain(elsewhere).for_each(|before| before.retire());
        // TCP does not tell; the first probe will.
        let rtt = Some(tunnel.rtt()).filter(|rtt| !rtt.is_zero()).map(tracing::field::debug);
        tracing::info!(%cluster, gateway, address = %self.address, transport = link::label(transport), rtt, "tunnel up");
        if lane == Lane::TcpWithoutQuic && self.core.registry.set_downgraded(&self.key, true) {
            tracing::warn!(%cluster, gateway, "QUIC does not get through to this gateway: TCP stands in for it");
            self.core.metrics.downgrade(cluster);
        }
        self.core.links_changed(cluster);
        let over = CancellationToken::new();
        self.core.tasks.spawn("tunnel.carry", self.clone().serve(tunnel.clone(), control, over.clone()));
        let (replaced, serves_on) = tokio::select! {
            () = over.cancelled() => (Ended::Lost, None),
            () = replace => (Ended::Replace, Some((tunnel.clone(), "a certificate was renewed or nears its end"))),
            () = tunnel.succeeded.cancelled() => (Ended::Replace, Some((tunnel.clone(), "the peer was taken over by its successor"))),
            () = self.with_quic(), if lane == Lane::TcpWithoutQuic => {
                tunnel.set_replaced_because("QUIC gets through again");
                (Ended::Replace, None)
            }
        };
        let serves_on = serves_on.map(|(tunnel, why)| {
            tunnel.set_replaced_because(why);
            tunnel
        });
        if serves_on.is_none() {
            tunnel.retire();
        }
        if lane == Lane::TcpWithoutQuic && self.core.registry.set_downgraded(&self.key, false) {
            tracing::info!(%cluster, gateway, quic = replaced == Ended::Replace, "TCP does not stand in for QUIC any more");
        }
        self.core.links_changed(cluster);
        (replaced, serves_on)
    }

    async fn serve(self, tunnel: Arc<Tunnel>, control: Control, over: CancellationToken) {
        let core = &self.core;
        let closed = async {
            tokio::select! {
                () = accept::streams(core, &tunnel) => {}
                () = core.expiry(&tunnel.link) => {
                    tunnel.set_replaced_because("the peer's certificate ended");
                    tunnel.link.close(Close::Replaced);
                }
                () = tunnel.spent() => tunnel.link.close(Close::Drained),
                // Whoever cancelled has closed the link with its reason.
                () = self.steer.cancel.cancelled() => tunnel.link.close(Close::Drained),
            }
            // The control stream notices and tells the peer: without a word, it would take the link for broken.
            std::future::pending().await
        };
        tokio::select! {
            () = control.run(core, &tunnel) => {}
            () = closed => {}
        }
        core.registry.down(&tunnel);
        core.links_changed(&self.key.0);
        // One that the peer has ended in good order has a while for what is on its way.
        if tunnel.link.why_closed().is_none() {
            tunnel.link.close(Close::Drained);
        }
        let ending = ending::of(&tunnel);
        let (cluster, gateway) = &self.key;
        if ending.planned {
            tracing::info!(%cluster, gateway, why = ending.words, "tunnel down");
        } else {
            tracing::warn!(%cluster, gateway, why = ending.words, "tunnel down");
        }
        over.cancel();
    }

    /// Resolves when a link with a newer certificate should take the place of this one, which `shown` was shown on.
    fn replacement_due(&self, link: &Link, shown: Arc<Svid>) -> impl Future<Output = ()> + use<> {
        let source = self.core.identity.source.clone();
        let left = expires(link).map_or(0, |at| at.0).saturating_sub(isthmus_runtime::now());
        let left = Duration::from_millis(left);
        let until = clock::now() + left.saturating_sub(EARLY.min(left / 4));
        async move {
            while Arc::ptr_eq(&shown, &source.current()) && clock::now() < until {
                time::sleep(WATCH).await;
            }
        }
    }

    /// Resolves when no QUIC lane has worked for `long`.
    async fn without_quic(&self, long: Duration) {
        let mut since = clock::now();
        while clock::since(since) < long {
            time::sleep(WATCH.min(long / 2)).await;
            if self.core.registry.has_quic(&self.key) {
                since = clock::now();
            }
        }
    }

    /// Resolves when a QUIC lane works.
    async fn with_quic(&self) {
        while !self.core.registry.has_quic(&self.key) {
            time::sleep(WATCH).await;
        }
    }
}

/// A link whose control stream is not open yet. One that comes to nothing is closed: over TCP it would dial for ever.
struct Opening {
    link: Link,
    done: bool,
}

impl Opening {
    fn done(mut self) -> Link {
        self.done = true;
        self.link.clone()
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if !self.done {
            self.link.close(Close::Protocol);
        }
    }
}

/// How a lane's link ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// It is gone: after a pause, another one.
    Lost,
    /// It still carries what it carries: another one at once, unless this one is new.
    Replace,
}

/// The peer has dialled us, and our own attempt should have come through by now. Not at once: two gateways that dial
/// each other must not keep each other from finishing.
async fn sign_of_life(wake: &mut watch::Receiver<u64>) {
    time::sleep(PATIENCE).await;
    if wake.changed().await.is_err() {
        std::future::pending().await
    }
}
