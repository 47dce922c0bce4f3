//! Streams from peers to local endpoints: the far half of a carried connection.
//!
//! In: one stream of an authenticated peer. The header is checked (version, export, membership, boundary), the
//! ClientHello is read and handed to an endpoint, and only with the endpoint's first byte is the stream accepted;
//! everything before that ends in a reject that tells the peer whether to try elsewhere. Then bytes are spliced.

pub(crate) mod ejection;
pub(crate) mod endpoint;
pub(crate) mod race;

use std::{mem, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::OptionFuture;
use isthmus_api::proto::tunnel::v1::{Accept, Reject, RejectReason, StreamHeader, StreamReply, stream_reply::Kind};
use isthmus_model::{
    access::{self, Denied, Use},
    global::GlobalService,
    ids::{ClusterName, ServiceName},
    sni,
};
use tokio::{sync::OwnedSemaphorePermit, time};
use tokio_util::task::task_tracker::TaskTrackerToken;

use self::endpoint::{Answered, EndpointFailure, Request};
use crate::{
    access::{Access, Attempt, Route, Source},
    clock,
    core::Core,
    frame::{self, FrameReader, MAX_HEADER},
    hello::{HelloReader, Progress},
    metrics::Direction,
    shares::Full,
    splice::{self, Far, Limits},
    tunnel::{
        VERSION,
        link::{self, RecvHalf, SendHalf},
        registry::Tunnel,
    },
    view::View,
};

/// The longest that a peer may make us wait for an endpoint.
const MAX_DEADLINE: Duration = Duration::from_secs(10);
/// For the header and the ClientHello, which come in the first flight.
const FIRST_FLIGHT: Duration = Duration::from_secs(5);
/// A dialler that does not wait for its answer.
const EARLY: &str = "bytes follow the ClientHello before the accept";

/// A stream that a peer opened.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) core: Arc<Core>,
    /// What it came through; its cluster is from the peer's certificate.
    pub(crate) tunnel: Arc<Tunnel>,
    pub(crate) send: SendHalf,
    pub(crate) recv: RecvHalf,
    /// Its place among the link's streams; `None`: there are too many.
    pub(crate) slot: Option<OwnedSemaphorePermit>,
    /// A drain waits for it.
    pub(crate) carried: TaskTrackerToken,
}

/// A refusal, as the peer is told.
#[derive(Debug)]
struct Refusal {
    reason: RejectReason,
    elsewhere: bool,
    detail: &'static str,
    /// Counted as.
    label: &'static str,
}

/// The header, checked.
struct Asked {
    service: ServiceName,
    port: u16,
    selector: Option<String>,
    deadline: Duration,
    traceparent: String,
}

impl Asked {
    /// Whether a server name asks for the same, here: what the endpoint's sidecar reads must be what was judged.
    fn is_named(&self, name: &str, core: &Core) -> bool {
        let Ok(route) = sni::parse(name, &core.identity.federation) else { return false };
        let here = route.cluster.is_none_or(|cluster| cluster == core.cluster);
        here && (route.service, route.port, route.selector) == (self.service.clone(), self.port, self.selector.clone())
    }
}

impl Stream {
    /// Serves the stream to its end.
    pub(crate) async fn serve(self) {
        let Self { core, tunnel, send, recv, slot, carried: token } = self;
        let mut access = Access::new(Direction::Egress, tunnel.cluster.clone(), core.cluster.clone(), clock::now());
        access.came_from(Source::Peer { gateway: &tunnel.gateway, id: tunnel.link.leaf() });
        // Held until the stream has ended.
        let served = tunnel.serve();
        let place = match slot {
            Some(slot) => core.stream_places.try_acquire(&tunnel.cluster).map(|place| (slot, place)).map_err(no_place),
            None => Err(Refusal::overloaded("too many streams on this link", "egress_link_full")),
        };
        let (place, refused) = place.map_or_else(|refusal| (None, Some(refusal)), |place| (Some(place), None));
        // Boxed, since what is over soon takes much more memory than the carrying.
        let opened = open(&core, &tunnel, refused, (send, recv), &mut access);
        let Some((mut far, answered, first)) = Box::pin(opened).await else { return access.finish(&core, None) };
        let guard = core.metrics.stream(Direction::Egress);
        let limits = Limits {
            idle: core.config.ingress.idle_timeout,
            lifetime: core.config.ingress.max_lifetime,
            // What peers send slowly to us is bounded by the endpoint's own pace, and that is a near side, too.
            stalled: tunnel.stalled.as_ref(),
            force: &core.stop,
            draining: &core.draining,
        };
        let mut carried = splice::splice(&answered.tcp, &mut far, Bytes::new(), limits).await;
        carried.out += first as u64;
        access.finish(&core, Some(carried));
        drop((guard, answered, place, served, token));
    }
}

/// Finds an endpoint that answers, and accepts the stream; with the number of bytes that went back by that. `None`: it was
/// turned away, and counted.
async fn open(
    core: &Arc<Core>,
    tunnel: &Tunnel,
    refused: Option<Refusal>,
    (mut send, recv): (SendHalf, RecvHalf),
    access: &mut Access,
) -> Option<(Far, Answered, usize)> {
    let mut reader = FrameReader::new(recv, MAX_HEADER);
    let refused = match core.admit() {
        Ok(()) => refused,
        Err(why) => Some(Refusal::overloaded(why.detail(), label(RejectReason::Overloaded))),
    };
    let placed = match refused {
        None => place(core, &tunnel.cluster, &mut reader, &send, access).await,
        Some(refusal) => Err(Some(refusal)),
    };
    let (mut recv, _) = reader.into_parts();
    match placed {
        Ok(mut answered) => {
            access.accepted();
            access.destined(&core.cluster, None, Some(answered.lease.address()));
            let first = mem::take(&mut answered.first);
            let length = first.len();
            if accept(&mut send, first).await.is_err() {
                link::reset(&mut send, &mut recv);
                splice::abort(&answered.tcp);
                return None;
            }
            Some((Far::Tunnel(send, recv), answered, length))
        }
        Err(None) => {
            link::reset(&mut send, &mut recv);
            core.metrics.reject("egress_abandoned");
            access.failed("abandoned");
            None
        }
        Err(Some(refusal)) => {
            core.metrics.reject(refusal.label);
            access.failed(refusal.label);
            access.because(refusal.detail);
            refuse(&mut send, &mut recv, &refusal).await;
            None
        }
    }
}

/// Finds an endpoint that answers. `Err(None)`: the peer gave up.
async fn place(
    core: &Arc<Core>,
    peer: &ClusterName,
    reader: &mut FrameReader,
    send: &SendHalf,
    access: &mut Access,
) -> Result<Answered, Option<Refusal>> {
    let Ok(header) = time::timeout(FIRST_FLIGHT, reader.next::<StreamHeader>()).await else {
        return Err(Some(Refusal::malformed("no header in time")));
    };
    let asked = header.map_err(|_| Refusal::malformed("the header is not readable")).and_then(check).map_err(Some)?;
    let route = Route { service: asked.service.clone(), port: asked.port };
    access.join(&asked.traceparent);
    access.route(route);
    if core.closing.is_cancelled() {
        return Err(Some(Refusal::new(RejectReason::Draining, true, "this gateway drains")));
    }
    let view = core.current_view();
    let service = permit(core, &view, peer, &asked).map_err(Some)?;
    let hello = time::timeout(FIRST_FLIGHT, read_hello(reader, core.config.ingress.max_hello_bytes)).await;
    let (name, hello) = hello.unwrap_or(Err(Refusal::malformed("no ClientHello in time"))).map_err(Some)?;
    if !asked.is_named(&name, core) {
        return Err(Some(Refusal::malformed("the ClientHello names something else than the header")));
    }
    let request = Request {
        service,
        port: asked.port,
        selector: asked.selector.as_deref(),
        hello: &hello,
        deadline: asked.deadline,
    };
    let mut log = Vec::new();
    let answered = tokio::select! {
        answered = endpoint::first_byte(core, request, &mut log) => answered.map_err(|failure| Some(failure.into())),
        why = given_up(send, reader) => Err(why),
    };
    log.iter().for_each(|tried| access.tried(Attempt::at(&core.cluster, tried)));
    answered
}

/// Resolves when the dialler, or its client, no longer wants an answer. It sends nothing before it has one: bytes are a
/// reason to refuse it.
async fn given_up(send: &SendHalf, reader: &mut FrameReader) -> Option<Refusal> {
    let closed = OptionFuture::from(send.link_closed());
    tokio::select! {
        bytes = reader.bytes() => bytes.ok().map(|_| Refusal::malformed(EARLY)),
        Some(()) = closed => None,
    }
}

fn check(header: StreamHeader) -> Result<Asked, Refusal> {
    if header.version != VERSION {
        return Err(Refusal::new(RejectReason::Version, true, "this gateway speaks version 1"));
    }
    let service = header.service.and_then(|s| ServiceName::try_from(s).ok());
    let port = u16::try_from(header.port).ok().filter(|p| *p > 0);
    let (Some(service), Some(port)) = (service, port) else {
        return Err(Refusal::malformed("the header names no service and port"));
    };
    let deadline = Duration::from_millis(header.deadline_ms.into());
    if deadline.is_zero() || header.selector.len() > 63 || header.traceparent.len() > 128 {
        return Err(Refusal::malformed("deadline, selector or traceparent is out of bounds"));
    }
    Ok(Asked {
        service,
        port,
        selector: (!header.selector.is_empty()).then_some(header.selector),
        deadline: deadline.min(MAX_DEADLINE),
        traceparent: header.traceparent,
    })
}

/// Whether a header passes, for what is replayed and fuzzed; whatever passes is within bounds.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn passes(header: StreamHeader) -> bool {
    let Ok(asked) = check(header) else { return false };
    assert!(asked.port > 0 && !asked.deadline.is_zero() && asked.deadline <= MAX_DEADLINE);
    assert!(asked.selector.is_none_or(|s| s.len() <= 63) && asked.traceparent.len() <= 128);
    true
}

/// May a gateway of `peer` reach this here? Checked against the view, whatever the peer's own view says.
fn permit<'v>(core: &Core, view: &'v View, peer: &ClusterName, asked: &Asked) -> Result<&'v GlobalService, Refusal> {
    let not_exported = || Refusal::new(RejectReason::NotExported, true, "this cluster does not export it");
    let global = view.global.as_ref().ok_or_else(not_exported)?;
    let what = Use { caller: peer, exporter: &core.cluster, service: &asked.service, port: asked.port };
    match access::may_use(global, &what) {
        Ok(permitted) => Ok(permitted.service),
        Err(Denied::CallerInactive(_)) => {
            Err(Refusal::new(RejectReason::Forbidden, false, "the peer's cluster is no active member"))
        }
        // The peer's state may be newer than ours: what we do not know, others may have.
        Err(Denied::UnknownService(_) | Denied::UnknownPort(..) | Denied::NotExported { .. }) => Err(not_exported()),
        Err(Denied::ExporterInactive(_)) => {
            Err(Refusal::new(RejectReason::Forbidden, true, "this cluster is no active member"))
        }
        Err(Denied::ImportNotGranted { .. }) => Err(Refusal::new(
            RejectReason::Forbidden,
            false,
            "the grant of the peer's cluster does not let it import this",
        )),
        Err(Denied::ExportNotGranted { .. }) => {
            Err(Refusal::new(RejectReason::Forbidden, true, "this cluster's grant does not let it export this"))
        }
        Err(Denied::OutsideRegions { .. }) => {
            Err(Refusal::new(RejectReason::Forbidden, true, "policy keeps traffic out of this region"))
        }
    }
}

/// The server name, and exactly the ClientHello: the dialler sends nothing after it until it is accepted.
async fn read_hello(reader: &mut FrameReader, max: usize) -> Result<(String, Vec<u8>), Refusal> {
    let mut hello = HelloReader::new(max);
    let mut received = 0;
    loop {
        let bytes = reader.bytes().await.map_err(|_| Refusal::malformed("the stream ended before its ClientHello"))?;
        received += bytes.len();
        match hello.push(&bytes) {
            Progress::NeedMore => {}
            Progress::Hello(done) if done.len == received => return Ok((done.sni, hello.into_raw())),
            Progress::Hello(_) => return Err(Refusal::malformed(EARLY)),
            Progress::Bad(_) => return Err(Refusal::malformed("what follows the header is no ClientHello to carry")),
        }
    }
}

async fn accept(send: &mut SendHalf, first: Bytes) -> Result<(), ()> {
    let reply = StreamReply { kind: Some(Kind::Accept(Accept {})) };
    let frame = frame::encode(&reply).map_err(drop)?.freeze();
    // The dialler's window is open: nothing was written before.
    let write = async {
        send.write_chunk(frame).await?;
        send.write_chunk(first).await
    };
    let written = time::timeout(FIRST_FLIGHT, write).await;
    written.map_err(drop)?.map_err(drop)
}

async fn refuse(send: &mut SendHalf, recv: &mut RecvHalf, refusal: &Refusal) {
    let reject =
        Reject { reason: refusal.reason.into(), retry_elsewhere: refusal.elsewhere, detail: refusal.detail.to_owned() };
    let Ok(frame) = frame::encode(&StreamReply { kind: Some(Kind::Reject(reject)) }) else { return };
    // Whoever does not take the refusal is told by the stream's end.
    let say = async {
        send.write_all(&frame).await?;
        send.finish().await?;
        link::stop(recv).await
    };
    drop(time::timeout(FIRST_FLIGHT, say).await);
}

impl Refusal {
    fn new(reason: RejectReason, elsewhere: bool, detail: &'static str) -> Self {
        Self { reason, elsewhere, detail, label: label(reason) }
    }

    fn overloaded(detail: &'static str, label: &'static str) -> Self {
        Self { label, ..Self::new(RejectReason::Overloaded, true, detail) }
    }

    fn malformed(detail: &'static str) -> Self {
        Self::new(RejectReason::Malformed, false, detail)
    }
}

fn no_place(full: Full) -> Refusal {
    match full {
        Full::All => Refusal::overloaded("too many streams", label(RejectReason::Overloaded)),
        Full::Share => Refusal::overloaded("this cluster has its share of the streams", "egress_share"),
    }
}

impl From<EndpointFailure> for Refusal {
    fn from(failure: EndpointFailure) -> Self {
        match failure {
            EndpointFailure::None => Self::new(RejectReason::NoEndpoint, true, "no endpoint is ready"),
            EndpointFailure::Failed => Self::new(RejectReason::ConnectFailed, true, "endpoints refused or closed"),
            EndpointFailure::Silent => Self::new(RejectReason::Timeout, true, "endpoints were silent"),
        }
    }
}

/// A reject's metric label, on the side that gives it.
fn label(reason: RejectReason) -> &'static str {
    match reason {
        RejectReason::Unspecified => "egress_unspecified",
        RejectReason::Version => "egress_version",
        RejectReason::Malformed => "egress_malformed",
        RejectReason::NotExported => "egress_not_exported",
        RejectReason::Forbidden => "egress_forbidden",
        RejectReason::NoEndpoint => "egress_no_endpoint",
        RejectReason::ConnectFailed => "egress_connect_failed",
        RejectReason::Overloaded => "egress_overloaded",
        RejectReason::Draining => "egress_draining",
        RejectReason::Timeout => "egress_timeout",
    }
}
