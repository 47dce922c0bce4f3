//! Placing a connection: one attempt after the other until a first byte comes back.
//!
//! What is sent in an attempt is a header and the ClientHello, and the client has seen nothing; so a failed attempt is
//! followed by the same hello elsewhere, and the app sees a slower connect instead of an error. The first byte back ends
//! that. Nothing is read from the client meanwhile; only its leaving is noticed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use isthmus_api::proto::tunnel::v1::{Reject, RejectReason, StreamHeader, StreamReply, stream_reply::Kind};
use isthmus_model::{ids::ClusterName, sni};
use tokio::{net::TcpStream, time};

use crate::{
    access::{Access, Attempt},
    availability::Lease,
    choose::{After, Plan},
    clock,
    core::Core,
    egress::endpoint::{self, Answered, Request},
    frame::{self, FrameReader, MAX_HEADER},
    splice::Far,
    tunnel::{
        VERSION,
        link::{self, SendHalf},
        registry::{Held, Tried, Tunnel},
    },
};

/// What the far gateway's answer needs on top of the round trip.
const MARGIN: Duration = Duration::from_millis(50);

/// Outcomes that tell of the service at a cluster rather than of the way there: what the far gateway has said. Silence may
/// be the way's.
const WANTING: [&str; 3] = ["rejected_connect_failed", "rejected_timeout", "rejected_no_endpoint"];

/// Why a connection could not be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unplaced {
    /// All that was worth trying failed, the last one so.
    Failed(&'static str),
    /// Usable clusters, but no tunnel to any.
    NoTunnel,
    /// Too many replays lately.
    Budget,
    /// The client left meanwhile.
    ClientGone,
}

impl Unplaced {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Failed(_) => "attempts_failed",
            Self::NoTunnel => "no_tunnel",
            Self::Budget => "replay_budget",
            Self::ClientGone => "client_gone",
        }
    }
}

/// A connection that was placed.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) far: Far,
    /// The first bytes back.
    pub(super) first: Bytes,
    /// Counts against whoever carries it.
    pub(super) held: HeldBy,
}

/// Dropped when the connection has ended.
#[derive(Debug)]
pub(super) enum HeldBy {
    Tunnel(Held),
    Endpoint(Lease),
}

impl HeldBy {
    /// The far gateway, if one takes part.
    fn gateway(&self) -> Option<&str> {
        self.tunnel().map(|tunnel| tunnel.gateway.as_str())
    }

    /// The endpoint, if it is one of this cluster's own.
    fn endpoint(&self) -> Option<SocketAddr> {
        match self {
            Self::Tunnel(_) => None,
            Self::Endpoint(lease) => Some(lease.address()),
        }
    }

    /// The tunnel that carries it, if one does.
    pub(super) fn tunnel(&self) -> Option<&Tunnel> {
        match self {
            Self::Tunnel(held) => Some(held.tunnel()),
            Self::Endpoint(_) => None,
        }
    }
}

/// What all attempts share.
pub(super) struct Placing<'a> {
    pub(super) core: &'a Arc<Core>,
    pub(super) client: &'a TcpStream,
    pub(super) route: &'a sni::Route,
    pub(super) hello: &'a [u8],
}

/// A failed attempt.
#[derive(Clone, Debug)]
struct Failed {
    label: &'static str,
    /// What comes next.
    after: After,
    /// The far gateway's words.
    detail: Option<String>,
}

impl Failed {
    const fn new(label: &'static str, after: After) -> Self {
        Self { label, after, detail: None }
    }
}

const LOST: Failed = Failed::new("tunnel_lost", After::SameCluster);
const SILENT: Failed = Failed::new("silent", After::SameCluster);
/// For a link to a peer's successor to come up, over TCP.
const SUCCESSION: Duration = Duration::from_millis(300);
/// A far gateway that drains.
const DRAINING: &str = "rejected_draining";
const BROKEN: Failed = Failed::new("protocol", After::SameCluster);
/// Of a far gateway's words, as many characters are kept.
const MAX_DETAIL: usize = 200;

impl Placing<'_> {
    /// Works through `plan`.
    pub(super) async fn place(&self, mut plan: Plan, access: &mut Access) -> Result<Placed, Unplaced> {
        let began = clock::now();
        let config = &self.core.config.ingress;
        let mut tried: Vec<Tried> = Vec::new();
        let mut last = Unplaced::NoTunnel;
        let mut first = true;
        while let Some(cluster) = plan.next().cloned() {
            let local = cluster == self.core.cluster;
            if !local && let Some(old) = self.core.registry.succession(&cluster) {
                // The link that is being dialled is worth more than a lost attempt.
                drop(time::timeout(SUCCESSION, old.replaced()).await);
            }
            let tunnel = if local { None } else { self.core.registry.pick(&cluster, &tried) };
            if !local && tunnel.is_none() {
                if first {
                    self.core.metrics.attempt(&cluster, "no_tunnel");
                    access.tried(Attempt::new(&cluster, None, "no_tunnel"));
                }
                plan.skip();
                continue;
            }
            let left = match self.route.cluster {
                // Both of a pinned port's attempts must fit into what its client allows for a handshake.
                Some(_) => {
                    let left = config.pinned_timeout.saturating_sub(clock::since(began));
                    left.min(config.pinned_timeout / 2).min(config.attempt_timeout)
                }
                None => config.attempt_timeout,
            };
            if left.is_zero() {
                break;
            }
            if first {
                self.core.note_first_attempt();
            } else if !self.core.may_replay() {
                return Err(Unplaced::Budget);
            }
            first = false;
            let mut endpoints = Vec::new();
            let attempt = async {
                match &tunnel {
                    Some(tunnel) => self.through(tunnel, left, &access.traceparent()).await,
                    None => self.locally(left, &mut endpoints).await,
                }
            };
            let outcome = tokio::select! {
                outcome = attempt => Some(outcome),
                () = gone(self.client) => None,
            };
            endpoints.iter().for_each(|tried| access.tried(Attempt::at(&cluster, tried)));
            let Some(outcome) = outcome else {
                self.core.metrics.attempt(&cluster, Unplaced::ClientGone.label());
                return Err(Unplaced::ClientGone);
            };
            // A draining gateway may have a successor behind its other links.
            let may_differ = |label: &str| [LOST.label, SILENT.label, DRAINING].contains(&label);
            let refused = outcome.as_ref().is_err_and(|failed| !may_differ(failed.label));
            let label = outcome.as_ref().map_or_else(|failed| failed.label, |_| "accepted");
            self.core.metrics.attempt(&cluster, label);
            let detail = outcome.as_ref().err().and_then(|failed| failed.detail.clone());
            // Of the own endpoints, each was written down.
            if endpoints.is_empty() {
                access.tried(Attempt { detail, ..Attempt::new(&cluster, tunnel.as_deref(), label) });
            }
            tried.extend(tunnel.map(|tunnel| Tried { tunnel, refused }));
            match outcome {
                Ok(placed) => {
                    self.core.outcasts().succeeded(&self.route.service, &cluster);
                    self.core.metrics.first_byte(&cluster, clock::since(began));
                    access.destined(&cluster, placed.held.gateway(), placed.held.endpoint());
                    return Ok(placed);
                }
                Err(failed) => {
                    last = Unplaced::Failed(failed.label);
                    self.note_failure(&cluster, failed.label);
                    // The own cluster's endpoints are all that it has.
                    plan.failed(if local { After::NextCluster } else { failed.after });
                }
            }
        }
        Err(last)
    }

    fn note_failure(&self, cluster: &ClusterName, label: &'static str) {
        let tells = WANTING.contains(&label);
        if tells && self.core.outcasts().failed(&self.route.service, cluster, clock::now()) {
            tracing::warn!(service = %self.route.service, %cluster, label, "here this service is tried last for a while");
            self.core.metrics.reject("service_out");
        }
    }

    async fn locally(&self, deadline: Duration, log: &mut Vec<endpoint::Tried>) -> Result<Placed, Failed> {
        let view = self.core.current_view();
        let Some(service) = view.service(&self.route.service) else {
            return Err(Failed::new("gone", After::NextCluster));
        };
        let request = Request {
            service,
            port: self.route.port,
            selector: self.route.selector.as_deref(),
            hello: self.hello,
            deadline,
        };
        match endpoint::first_byte(self.core, request, log).await {
            Ok(Answered { tcp, first, lease }) => {
                Ok(Placed { far: Far::Tcp(tcp), first, held: HeldBy::Endpoint(lease) })
            }
            Err(failure) => Err(Failed::new(failure.label(), After::NextCluster)),
        }
    }

    async fn through(&self, tunnel: &Arc<Tunnel>, deadline: Duration, traceparent: &str) -> Result<Placed, Failed> {
        let held = tunnel.hold();
        let exchange = async {
            tokio::select! {
                exchanged = self.exchange(tunnel, deadline, traceparent) => exchanged,
                () = tunnel.link.closed() => Err(LOST),
            }
        };
        match time::timeout(deadline, exchange).await {
            Ok(Ok((far, first))) => Ok(Placed { far, first, held: HeldBy::Tunnel(held) }),
            Ok(Err(failed)) => Err(failed),
            // The far gateway should have spoken up before: it, not its endpoints, is what is slow.
            Err(_) => Err(SILENT),
        }
    }

    async fn exchange(&self, tunnel: &Tunnel, deadline: Duration, traceparent: &str) -> Result<(Far, Bytes), Failed> {
        let for_endpoint = deadline.saturating_sub(tunnel.rtt() + MARGIN).max(MARGIN);
        let header = StreamHeader {
            version: VERSION,
            service: Some((&self.route.service).into()),
            port: self.route.port.into(),
            selector: self.route.selector.clone().unwrap_or_default(),
            deadline_ms: u32::try_from(for_endpoint.as_millis()).unwrap_or(u32::MAX),
            traceparent: traceparent.to_owned(),
        };
        let mut flight = frame::encode(&header).map_err(|_| BROKEN)?;
        flight.extend_from_slice(self.hello);
        let (send, recv) = tunnel.link.open().await.map_err(|_| LOST)?;
        let mut stream = Opened { send: Some(send), reader: Some(FrameReader::new(recv, MAX_HEADER)) };
        let (Some(send), Some(reader)) = (&mut stream.send, &mut stream.reader) else { return Err(BROKEN) };
        send.write_all(&flight).await.map_err(|_| LOST)?;
        match reader.next::<StreamReply>().await {
            Ok(StreamReply { kind: Some(Kind::Accept(_)) }) => stream.into_far().ok_or(BROKEN),
            Ok(StreamReply { kind: Some(Kind::Reject(reject)) }) => Err(rejected(&reject)),
            Ok(StreamReply { kind: None }) => Err(BROKEN),
            Err(frame::FrameError::Broken(_) | frame::FrameError::Ended) => Err(LOST),
            Err(_) => Err(BROKEN),
        }
    }
}

/// A stream that is reset unless it comes to be used: dropping it alone would read as an orderly end.
struct Opened {
    send: Option<SendHalf>,
    reader: Option<FrameReader>,
}

impl Opened {
    fn into_far(mut self) -> Option<(Far, Bytes)> {
        let (recv, first) = self.reader.take()?.into_parts();
        Some((Far::Tunnel(self.send.take()?, recv), first))
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let (Some(mut send), Some(reader)) = (self.send.take(), self.reader.take()) {
            link::reset(&mut send, &mut reader.into_parts().0);
        }
    }
}

fn rejected(reject: &Reject) -> Failed {
    let (label, after) = match reject.reason() {
        RejectReason::Unspecified => ("rejected", After::NextCluster),
        RejectReason::Version => ("rejected_version", After::SameCluster),
        RejectReason::Malformed => ("rejected_malformed", After::Nobody),
        RejectReason::NotExported => ("rejected_not_exported", After::NextCluster),
        RejectReason::Forbidden => ("rejected_forbidden", After::NextCluster),
        RejectReason::NoEndpoint => ("rejected_no_endpoint", After::NextCluster),
        RejectReason::ConnectFailed => ("rejected_connect_failed", After::NextCluster),
        RejectReason::Overloaded => ("rejected_overloaded", After::SameCluster),
        RejectReason::Draining => (DRAINING, After::SameCluster),
        RejectReason::Timeout => ("rejected_timeout", After::NextCluster),
    };
    let after = if reject.retry_elsewhere { after } else { After::Nobody };
    let detail: String = reject.detail.chars().take(MAX_DETAIL).collect();
    Failed { label, after, detail: (!detail.is_empty()).then_some(detail) }
}

/// Resolves when the client ends or breaks. A byte after its hello stays unread: it goes out after the accept.
async fn gone(client: &TcpStream) {
    match client.peek(&mut [0; 1]).await {
        Ok(n) if n > 0 => std::future::pending().await,
        _ => {}
    }
}
