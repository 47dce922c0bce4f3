//! Handing a ClientHello to a local endpoint and waiting for its first byte: for streams from peers, and for local
//! connections that stay in the cluster.
//!
//! A refused, closed or silent endpoint costs the next one a try, within one deadline; each failure is remembered by the
//! pool. Nothing but the ClientHello has been sent when an attempt fails, so trying again is safe.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use isthmus_model::global::GlobalService;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time,
};

use super::ejection::Failure;
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
    /// The last one refused or closed.
    Failed,
    /// The last one was silent.
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

/// The first endpoint that answers the hello.
pub(crate) async fn first_byte(core: &Arc<Core>, request: Request<'_>) -> Result<Answered, EndpointFailure> {
    let began = clock::now();
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut last = EndpointFailure::None;
    while tried.len() < core.config.egress.max_endpoints {
        let left = request.deadline.saturating_sub(clock::since(began));
        if left.is_zero() {
            break;
        }
        let Some(lease) = core.pool.pick(request.service, request.port, request.selector, &tried) else { break };
        tried.push(lease.address());
        // A silent endpoint must leave time for those after it; the last one gets all that is left.
        let untried = core.pool.choices(request.service, request.port, request.selector, &tried);
        let tries = (untried + 1).min(core.config.egress.max_endpoints + 1 - tried.len());
        let share = left / u32::try_from(tries).unwrap_or(1);
        let tried_at = clock::now();
        match attempt(lease.address(), request.hello, share.min(left), core.config.egress.connect_timeout).await {
            Ok((tcp, first)) => {
                lease.succeeded(clock::since(tried_at));
                return Ok(Answered { tcp, first, lease });
            }
            Err(failure) => {
                tracing::debug!(endpoint = %lease.address(), service = %request.service.name, ?failure, "endpoint failed");
                last = if failure == Failure::Silent { EndpointFailure::Silent } else { EndpointFailure::Failed };
                // A peer with a short deadline must not be able to put our endpoints out.
                if failure != Failure::Silent || share >= core.config.egress.connect_timeout / 2 {
                    lease.failed(failure);
                }
            }
        }
    }
    Err(last)
}

async fn attempt(
    address: SocketAddr,
    hello: &[u8],
    deadline: Duration,
    connect: Duration,
) -> Result<(TcpStream, Bytes), Failure> {
    let began = clock::now();
    // Out of time by the caller's deadline says less of the endpoint than out of time by our own.
    let late = if connect <= deadline { Failure::Connect } else { Failure::Silent };
    let connected = time::timeout(connect.min(deadline), TcpStream::connect(address)).await;
    let mut tcp = connected.map_err(|_| late)?.map_err(|_| Failure::Connect)?;
    splice::prepare(&tcp);
    let exchange = async {
        tcp.write_all(hello).await.map_err(|_| Failure::Closed)?;
        let mut first = BytesMut::with_capacity(FIRST_READ);
        match tcp.read_buf(&mut first).await {
            // Alone: the buffer is much larger than most first answers, and these may be held for a while.
            Ok(n) if n > 0 => Ok(Bytes::copy_from_slice(&first)),
            _ => Err(Failure::Closed),
        }
    };
    let first = time::timeout(deadline.saturating_sub(clock::since(began)), exchange).await;
    match first {
        Ok(Ok(first)) => Ok((tcp, first)),
        Ok(Err(failure)) => Err(failure),
        Err(_) => {
            // Its late answer is for nobody.
            splice::abort(&tcp);
            Err(Failure::Silent)
        }
    }
}
