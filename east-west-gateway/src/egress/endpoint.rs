//! Handing a ClientHello to a local endpoint and waiting for its first byte: for streams from peers, and for local
//! connections that stay in the cluster.
//!
//! Several endpoints may be asked within one deadline, in turn and side by side ([`super::race`]); the first that answers
//! serves, the others' connections are reset. What each did is remembered by the pool. Nothing but the ClientHello is sent
//! to any of them, so asking another one is safe.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use isthmus_model::global::GlobalService;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time,
};

use super::{
    ejection::Failure,
    race::{Race, Step},
};
use crate::{availability::Lease, clock, core::Core, splice};

const FIRST_READ: usize = 16 * 1024;

/// What to place.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) service: &'a GlobalService,
    pub(crate) port: u16,
    pub(crate) selector: Option<&'a str>,
    pub(crate) hello: &'a [u8],
    /// For all endpoints together.
    pub(crate) deadline: Duration,
}

/// An endpoint that answered.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) tcp: TcpStream,
    /// Its first bytes.
    pub(crate) first: Bytes,
    pub(crate) lease: Lease,
}

/// Why none answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndpointFailure {
    /// None was there to try.
    None,
    /// All that were asked refused or closed.
    Failed,
    /// Some were silent until the deadline.
    Silent,
}

impl EndpointFailure {
    /// Its metric label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::None => "no_endpoint",
            Self::Failed => "connect_failed",
            Self::Silent => "timeout",
        }
    }
}

/// An endpoint that was asked, and how that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tried {
    pub(crate) endpoint: SocketAddr,
    pub(crate) outcome: &'static str,
}

/// One that was asked.
struct Asked {
    lease: Lease,
    at: Instant,
}

/// The first endpoint that answers the hello. Who was asked is in `log`, even if nobody waits for the end.
pub(crate) async fn first_byte(
    core: &Arc<Core>,
    request: Request<'_>,
    log: &mut Vec<Tried>,
) -> Result<Answered, EndpointFailure> {
    let Request { service, port, selector, hello, deadline } = request;
    let mut race = Race::new(clock::now() + deadline, core.config.egress.max_endpoints);
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut asked: Vec<Asked> = Vec::new();
    let mut attempts = FuturesUnordered::new();
    core.hedges().deposit();
    loop {
        let until = match race.step(clock::now()) {
            Step::Ask { charged } => {
                let picked = core.pool.pick(service, port, selector, &tried);
                let Some(lease) = picked.filter(|_| !charged || may_hedge(core)) else {
                    race.none_asked();
                    continue;
                };
                let address = lease.address();
                tried.push(address);
                log.push(Tried { endpoint: address, outcome: "silent" });
                asked.push(Asked { lease, at: clock::now() });
                race.asked(core.pool.choices(service, port, selector, &tried), clock::now());
                let attempt = attempt(address, hello, core.config.egress.connect_timeout);
                attempts.push(async move { (address, attempt.await) });
                continue;
            }
            Step::Wait(until) => until,
            Step::Over(why) => return Err(why),
        };
        let ended = tokio::select! {
            ended = attempts.next() => ended,
            () = time::sleep_until(until.into()) => None,
        };
        let Some((address, outcome)) = ended else { continue };
        let Some(at) = asked.iter().position(|asked| asked.lease.address() == address) else { continue };
        let Asked { lease, at: asked_at } = asked.swap_remove(at);
        if let Some(tried) = log.iter_mut().find(|tried| tried.endpoint == address) {
            tried.outcome = outcome.as_ref().map_or_else(|failure| failure.label(), |_| "accepted");
        }
        match outcome {
            Ok((tcp, first)) => {
                let silent: Vec<_> = asked.iter().map(|a| (a.lease.address(), clock::since(a.at))).collect();
                lease.succeeded(clock::since(asked_at), &silent);
                return Ok(Answered { tcp, first, lease });
            }
            Err(failure) => {
                tracing::debug!(endpoint = %address, service = %service.name, ?failure, "endpoint failed");
                lease.failed(failure);
                race.failed(failure);
            }
        }
    }
}

/// The budget's leave to ask one more endpoint; counted either way.
fn may_hedge(core: &Core) -> bool {
    let may = core.hedges().withdraw(clock::now());
    if may {
        core.metrics.hedge();
    } else {
        core.metrics.reject("hedge_budget");
    }
    may
}

/// Asks one endpoint. The caller sets the deadline for its answer.
async fn attempt(address: SocketAddr, hello: &[u8], connect: Duration) -> Result<(TcpStream, Bytes), Failure> {
    let connected = time::timeout(connect, TcpStream::connect(address)).await;
    let mut tcp = connected.map_err(|_| Failure::Connect)?.map_err(|_| Failure::Connect)?;
    splice::prepare(&tcp);
    // A late answer would be for nobody; what is used is spliced, which sees to an orderly end.
    splice::abort(&tcp);
    tcp.write_all(hello).await.map_err(|_| Failure::Closed)?;
    let mut first = BytesMut::with_capacity(FIRST_READ);
    match tcp.read_buf(&mut first).await {
        // Alone: the buffer is much larger than most first answers, and these may be held for a while.
        Ok(n) if n > 0 => Ok((tcp, Bytes::copy_from_slice(&first))),
        _ => Err(Failure::Closed),
    }
}
