//! One connection of a local sidecar, from its ClientHello to its end.
//!
//! In: a TCP connection and the port it came in on. The hello is peeked within a deadline, its server name must fit the
//! port; then the connection is placed ([`super::place`]) and spliced. Whatever cannot be carried is closed at once and
//! counted by reason.

use std::{mem, sync::Arc};

use isthmus_model::sni;
use tokio::{io::AsyncReadExt, net::TcpStream, sync::OwnedSemaphorePermit, time};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    Entry,
    place::{self, Placed, Unplaced},
    sources::Share,
};
use crate::{
    access::{Access, Route, Source},
    choose::{Hopeless, Plan},
    clock,
    core::Core,
    hello::{BadHello, HelloReader, Progress},
    metrics::Direction,
    splice::{self, Limits},
};

/// Why a connection is turned away before anything is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Hello(BadHello),
    /// It ended, or broke, before its hello did.
    HelloEnded,
    HelloTimeout,
    /// Not a name of this federation, or not a name of ours at all.
    Sni(sni::SniError),
    /// The name asks for another cluster than the port is for.
    Port,
    Hopeless(Hopeless),
}

impl Refused {
    fn label(self) -> &'static str {
        match self {
            Self::Hello(bad) => bad.label(),
            Self::HelloEnded => "hello_ended",
            Self::HelloTimeout => "hello_timeout",
            Self::Sni(sni::SniError::ForeignDomain) => "sni_foreign",
            Self::Sni(sni::SniError::Malformed) => "sni_malformed",
            Self::Port => "sni_port_mismatch",
            Self::Hopeless(why) => why.label(),
        }
    }
}

/// A connection as accepted.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) core: Arc<Core>,
    pub(super) entry: Entry,
    pub(super) tcp: TcpStream,
    /// A drain waits for it.
    pub(super) _carried: TaskTrackerToken,
}

impl Local {
    /// Serves it to its end. `pending` counts it among those whose hello is still to come.
    pub(super) async fn serve(&mut self, pending: (OwnedSemaphorePermit, Share)) {
        let core = self.core.clone();
        let mut access = Access::new(Direction::Ingress, core.cluster.clone(), core.cluster.clone(), clock::now());
        access.came_from(Source::Local(self.tcp.peer_addr().ok()));
        splice::prepare(&self.tcp);
        // What comes before the carrying is boxed, since it takes much more memory, and only for a moment.
        let Some((mut placed, hello)) = Box::pin(self.place(pending, &mut access)).await else {
            splice::abort(&self.tcp);
            return access.finish(&core, None);
        };
        access.accepted();
        let guard = core.metrics.stream(Direction::Ingress);
        let limits = Limits {
            idle: core.config.ingress.idle_timeout,
            lifetime: core.config.ingress.max_lifetime,
            stalled: placed.held.tunnel().and_then(|tunnel| tunnel.stalled.as_ref()),
            force: &core.stop,
            draining: &core.draining,
        };
        let first = mem::take(&mut placed.first);
        let mut carried = splice::splice(&self.tcp, &mut placed.far, first, limits).await;
        carried.out += hello as u64;
        access.finish(&core, Some(carried));
        drop((guard, placed.held));
    }

    /// Finds who answers the hello, and tells how long that is. `None`: turned away, and counted.
    async fn place(&mut self, pending: (OwnedSemaphorePermit, Share), access: &mut Access) -> Option<(Placed, usize)> {
        let metrics = self.core.metrics.clone();
        let (hello, route, plan) = match self.route(access).await {
            Ok(routed) => routed,
            Err(refused) => {
                metrics.reject(refused.label());
                access.failed(refused.label());
                return None;
            }
        };
        drop(pending);
        let placing = place::Placing { core: &self.core, client: &self.tcp, route: &route, hello: &hello };
        match placing.place(plan, access).await {
            Ok(placed) => Some((placed, hello.len())),
            Err(why) => {
                if why != Unplaced::ClientGone {
                    metrics.reject(why.label());
                }
                access.failed(why.label());
                None
            }
        }
    }

    async fn route(&mut self, access: &mut Access) -> Result<(Vec<u8>, sni::Route, Plan), Refused> {
        let core = &self.core;
        let peeked =
            time::timeout(core.config.ingress.hello_timeout, peek(&mut self.tcp, core.config.ingress.max_hello_bytes));
        let (name, hello) = peeked.await.unwrap_or(Err(Refused::HelloTimeout))?;
        let route = sni::parse(&name, &core.identity.federation).map_err(Refused::Sni)?;
        access.route(Route { service: route.service.clone(), port: route.port });
        let fits = match &self.entry {
            Entry::Auto => route.cluster.is_none(),
            Entry::Pinned(cluster) => route.cluster.as_ref() == Some(cluster),
        };
        if !fits {
            return Err(Refused::Port);
        }
        let plan = Plan::make(core, &core.current_view(), &route).map_err(Refused::Hopeless)?;
        Ok((hello, route, plan))
    }
}

/// The server name, and exactly the ClientHello's bytes.
async fn peek(tcp: &mut TcpStream, max: usize) -> Result<(String, Vec<u8>), Refused> {
    let mut reader = HelloReader::new(max);
    let mut buffer = [0; 4096];
    loop {
        let wanted = reader.wanted().min(buffer.len());
        let Some(space) = buffer.get_mut(..wanted) else { return Err(Refused::HelloEnded) };
        let n = tcp.read(space).await.map_err(|_| Refused::HelloEnded)?;
        if n == 0 {
            return Err(Refused::HelloEnded);
        }
        match reader.push(space.get(..n).unwrap_or_default()) {
            Progress::NeedMore => {}
            Progress::Hello(hello) => return Ok((hello.sni, reader.into_raw())),
            Progress::Bad(bad) => return Err(Refused::Hello(bad)),
        }
    }
}
