//! From packets to answers: hickory reads and writes DNS over UDP and TCP, the zone answers its own names, the
//! forwarder asks others for the rest.
//!
//! Holds: an answer over UDP is never longer than the client's EDNS size and [`UDP_LIMIT`] (512 without EDNS); one that
//! would be is sent empty with TC, so that a spoofed source receives little more than was sent. Without a zone, names
//! of ours fail (SERVFAIL) rather than be denied. Transfers, updates and other classes are refused.

mod forward;
#[cfg(test)]
mod tests;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use hickory_proto::{
    op::{Edns, Header, HeaderCounts, Metadata, OpCode, ResponseCode},
    rr::{DNSClass, Name, Record, RecordType},
    serialize::binary::{BinEncodable, BinEncoder},
};
use hickory_server::{
    net::{runtime::Time, xfer::Protocol},
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo, Server},
    zone_handler::MessageResponseBuilder,
};
use isthmus_model::time::Timestamp;
use isthmus_runtime::{net as sockets, tasks::Shutdown};
use tokio::net::{TcpListener, UdpSocket};

use self::forward::Forwarder;
use crate::{
    BuildError,
    metrics::Metrics,
    zone::{self, Outcome, Zone},
};

/// The zone being served; `None` until one is known. Swapped as a whole.
pub(crate) type CurrentZone = Arc<ArcSwapOption<Zone>>;

/// What fits into one unfragmented packet on any path (DNS flag day 2020).
const UDP_LIMIT: u16 = 1232;
/// A client without EDNS accepts this much (RFC 1035, 4.2.1).
const PLAIN_UDP_LIMIT: u16 = 512;
/// A TCP connection that asks nothing for this long is closed (RFC 7766).
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Answers waiting for a slow TCP client.
const TCP_RESPONSES: usize = 32;
/// How often port 0 is tried until TCP and UDP get the same one.
const PORT_ATTEMPTS: usize = 16;

/// Both sockets, bound to one port.
pub(crate) struct Listener {
    udp: UdpSocket,
    tcp: TcpListener,
    address: SocketAddr,
}

/// Answers requests; see the module.
pub(crate) struct Handler {
    zone: CurrentZone,
    forwarder: Option<Forwarder>,
    metrics: Metrics,
}

impl Listener {
    /// Binds UDP and TCP on `address`. With port 0 both get the same free port.
    pub(crate) async fn bind(address: SocketAddr) -> Result<Self, BuildError> {
        let mut attempt = 1;
        loop {
            let tcp = sockets::bind_tcp(address, "listen.dns").await.map_err(BuildError::Bind)?;
            let bound = tcp.local_addr().map_err(BuildError::Socket)?;
            match sockets::bind_udp(bound, "listen.dns") {
                Ok(udp) => {
                    udp.set_nonblocking(true).map_err(BuildError::Socket)?;
                    let udp = UdpSocket::from_std(udp).map_err(BuildError::Socket)?;
                    return Ok(Self { udp, tcp, address: bound });
                }
                Err(_) if address.port() == 0 && attempt < PORT_ATTEMPTS => attempt += 1,
                Err(error) => return Err(BuildError::Bind(error)),
            }
        }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`. Questions that are with an upstream then go unanswered: clients ask another server.
    pub(crate) async fn serve(self, handler: Handler, shutdown: Shutdown) -> Result<(), ServeError> {
        let mut server = Server::new(handler);
        server.register_socket(self.udp);
        server.register_listener(self.tcp, TCP_IDLE, TCP_RESPONSES);
        tokio::select! {
            ended = server.block_until_done() => {
                ended.map_err(ServeError::Failed)?;
                if shutdown.is_requested() { Ok(()) } else { Err(ServeError::Ended) }
            }
            () = shutdown.requested() => server.shutdown_gracefully().await.map_err(ServeError::Failed),
        }
    }
}

/// Why serving stopped before it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// A socket failed for good.
    #[error("the DNS sockets failed")]
    Failed(#[source] hickory_server::net::NetError),
    /// Both sockets closed.
    #[error("the DNS sockets closed")]
    Ended,
}

/// An answer before it has a packet.
#[derive(Debug)]
struct Reply {
    code: ResponseCode,
    authoritative: bool,
    records: Vec<Record>,
    authority: Vec<Record>,
    additional: Vec<Record>,
}

impl Reply {
    fn empty(code: ResponseCode) -> Self {
        Self { code, authoritative: false, records: Vec::new(), authority: Vec::new(), additional: Vec::new() }
    }
}

impl Handler {
    /// Serves `zone`, and forwards other names to `upstreams`, if there are any.
    pub(crate) fn new(zone: CurrentZone, upstreams: &[SocketAddr], metrics: Metrics) -> Result<Self, BuildError> {
        let forwarder = if upstreams.is_empty() { None } else { Some(Forwarder::new(upstreams)?) };
        Ok(Self { zone, forwarder, metrics })
    }

    async fn reply(&self, request: &Request) -> (Reply, RecordType) {
        let Ok(info) = request.request_info() else {
            return (Reply::empty(ResponseCode::FormErr), RecordType::ZERO);
        };
        let kind = info.query.query_type();
        if request.version() > 0 {
            return (Reply::empty(ResponseCode::BADVERS), kind);
        }
        if request.metadata.op_code != OpCode::Query {
            return (Reply::empty(ResponseCode::NotImp), kind);
        }
        let transfer = matches!(kind, RecordType::AXFR | RecordType::IXFR);
        if info.query.query_class() != DNSClass::IN || transfer {
            return (Reply::empty(ResponseCode::Refused), kind);
        }
        let name = info.query.original().name();
        (self.lookup(name, kind, request.metadata.recursion_desired).await, kind)
    }

    async fn lookup(&self, name: &Name, kind: RecordType, recurse: bool) -> Reply {
        if zone::contains(name) {
            let zone = self.zone.load_full();
            let answer = zone.and_then(|z| z.answer(name, kind, Timestamp(isthmus_runtime::now())));
            return answer.map_or_else(|| Reply::empty(ResponseCode::ServFail), Reply::from);
        }
        match &self.forwarder {
            Some(forwarder) if recurse => forwarder.lookup(name, kind).await,
            _ => Reply::empty(ResponseCode::Refused),
        }
    }
}

impl From<zone::Answer> for Reply {
    fn from(answer: zone::Answer) -> Self {
        let code = match answer.outcome {
            Outcome::Found | Outcome::NoData => ResponseCode::NoError,
            Outcome::NxDomain => ResponseCode::NXDomain,
        };
        Self {
            code,
            authoritative: true,
            records: answer.records,
            authority: answer.authority,
            additional: answer.additional,
        }
    }
}

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(&self, request: &Request, mut out: R) -> ResponseInfo {
        let (mut reply, kind) = self.reply(request).await;
        self.metrics.count_query(reply.code, kind);
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = reply.code;
        metadata.authoritative = reply.authoritative;
        metadata.recursion_available = self.forwarder.is_some();
        let udp_limit = udp_limit(request);
        let edns = request.edns.as_ref().map(|_| {
            let mut edns = Edns::new();
            edns.set_max_payload(udp_limit);
            edns
        });
        if request.protocol() == Protocol::Udp && !fits(&mut reply, request, udp_limit) {
            metadata.truncation = true;
            let code = reply.code;
            reply = Reply::empty(code);
        }
        let response = MessageResponseBuilder::new(&request.queries, edns.as_ref()).build(
            metadata,
            &reply.records,
            &reply.authority,
            std::iter::empty(),
            &reply.additional,
        );
        match out.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                // The client is gone; there is nobody to tell.
                tracing::debug!(%error, client = %request.src(), "answer not sent");
                metadata.response_code = ResponseCode::ServFail;
                Header { metadata, counts: HeaderCounts::default() }.into()
            }
        }
    }
}

/// The longest UDP answer to `request`.
fn udp_limit(request: &Request) -> u16 {
    request.edns.as_ref().map_or(PLAIN_UDP_LIMIT, |edns| edns.max_payload().clamp(PLAIN_UDP_LIMIT, UDP_LIMIT))
}

/// Whether `reply` fits into `limit` bytes; drops the additional section, which may be left out, to make it fit.
fn fits(reply: &mut Reply, request: &Request, limit: u16) -> bool {
    // Header and an OPT record of ours; the question comes back as it was sent.
    const FIXED: usize = 12 + 11;
    let room = usize::from(limit).saturating_sub(FIXED + request.queries.as_bytes().len());
    let Some(needed) = encoded_len(reply.records.iter().chain(&reply.authority)) else {
        return false;
    };
    if needed > room {
        return false;
    }
    let additional = encoded_len(reply.additional.iter());
    if additional.is_none_or(|more| needed + more > room) {
        reply.additional.clear();
    }
    true
}

/// Bytes of `records` on the wire, without compression against the question: an upper bound. `None`: over 64 KiB.
fn encoded_len<'a>(records: impl Iterator<Item = &'a Record>) -> Option<usize> {
    let mut bytes = Vec::new();
    let mut encoder = BinEncoder::new(&mut bytes);
    for record in records {
        record.emit(&mut encoder).ok()?;
    }
    Some(bytes.len())
}
