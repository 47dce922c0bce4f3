//! From a configuration to a running gateway, and its drain.
//!
//! Sockets are bound first, so that a taken port is an error at once; health is served before the gateway is enrolled.
//! Drain: unready, agent and peers told; after a while no new connection; running ones finish until the deadline; then
//! all is reset.

use std::{
    future::Future,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use isthmus_api::proto::local::v1::GatewayHello;
use isthmus_identity::enrol::{Member, Newcomer, Subject};
use isthmus_runtime::{
    BoxError,
    health::{self, Gate, HealthError, HealthListener, Readiness, Registry},
    net::{self, BindError},
    tasks::{TaskError, Tasks},
};
use tokio::{net::TcpListener, sync::watch, time};

use crate::{
    config::Config,
    core::{Core, Parts},
    debug::{self, Inspector},
    feed::{Agent, Feed, Given},
    ingress,
    metrics::Metrics,
    tunnel::{
        accept,
        link::{
            quic::{self, Identity},
            tcp,
        },
        peers,
    },
    view::View,
};

/// For connections to say goodbye after the drain.
const FAREWELL: Duration = Duration::from_secs(1);
/// On top of the drain's deadline, before tasks are aborted.
const MARGIN: Duration = Duration::from_secs(3);

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// An address cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The health server's address cannot be bound.
    #[error(transparent)]
    Health(#[from] HealthError),
    /// A bound socket does not tell its address.
    #[error("read a bound socket's address")]
    Address(#[source] std::io::Error),
}

/// Why a gateway stopped other than by request.
#[derive(Debug, thiserror::Error)]
#[error("the gateway stopped")]
pub struct RunError(#[from] TaskError);

/// A gateway whose sockets are bound and that serves nothing yet.
#[derive(Debug)]
pub struct Bound {
    config: Arc<Config>,
    feed: Feed,
    tunnel: UdpSocket,
    tunnel_addr: SocketAddr,
    tunnel_tcp: TcpListener,
    auto: TcpListener,
    auto_addr: SocketAddr,
    health: HealthListener,
    inspector: Inspector,
}

/// Binds everything that has a fixed address. Pinned ports come and go with the clusters.
pub async fn build(config: Config, feed: Feed) -> Result<Bound, BuildError> {
    let health = health::bind(config.listen.health).await?;
    let (tunnel, tunnel_tcp) = bind_tunnel(config.listen.tunnel).await?;
    let auto = SocketAddr::new(config.listen.local, config.listen.auto_port);
    let auto = net::bind_tcp(auto, "listen.autoPort").await?;
    Ok(Bound {
        tunnel_addr: tunnel.local_addr().map_err(BuildError::Address)?,
        auto_addr: auto.local_addr().map_err(BuildError::Address)?,
        config: Arc::new(config),
        feed,
        tunnel,
        tunnel_tcp,
        auto,
        health,
        inspector: Inspector::default(),
    })
}

/// The same port for UDP and TCP.
async fn bind_tunnel(address: SocketAddr) -> Result<(UdpSocket, TcpListener), BuildError> {
    let mut tries = 0;
    loop {
        let tcp = net::bind_tcp(address, "listen.tunnel").await?;
        let same = tcp.local_addr().map_err(BuildError::Address)?;
        match net::bind_udp(same, "listen.tunnel") {
            Ok(udp) => return Ok((udp, tcp)),
            // A port that the system chose for one may be taken for the other.
            Err(_) if address.port() == 0 && tries < 10 => tries += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

impl Bound {
    /// Where peers dial (UDP and TCP).
    pub fn tunnel_addr(&self) -> SocketAddr {
        self.tunnel_addr
    }

    /// Where local sidecars let the gateway choose.
    pub fn auto_addr(&self) -> SocketAddr {
        self.auto_addr
    }

    /// Where health, metrics and debug routes are.
    pub fn health_addr(&self) -> SocketAddr {
        self.health.local_addr()
    }

    /// A view into it that outlives this value.
    pub fn inspector(&self) -> Inspector {
        self.inspector.clone()
    }

    /// Serves until SIGTERM or SIGINT, then drains.
    pub async fn run_until_signal(self) -> Result<(), RunError> {
        let grace = self.grace();
        Ok(self.start().run(grace).await?)
    }

    /// Serves until `stop` resolves, then drains.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), RunError> {
        let grace = self.grace();
        Ok(self.start().run_until(stop, grace).await?)
    }

    fn grace(&self) -> Duration {
        self.config.drain.deadline + FAREWELL + MARGIN
    }

    fn start(self) -> Tasks {
        let tasks = Tasks::new();
        let readiness = Readiness::new();
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let gates = Gates { enrolled: readiness.gate("enrolment"), listening: readiness.gate("global state") };
        self.health.serve(&tasks, Arc::new(registry), readiness.clone(), debug::router(self.inspector.clone()));
        let starting = Starting {
            config: self.config,
            tunnel: self.tunnel,
            tunnel_addr: self.tunnel_addr,
            tunnel_tcp: self.tunnel_tcp,
            auto: self.auto,
            auto_addr: self.auto_addr,
            inspector: self.inspector,
            metrics,
            tasks: tasks.clone(),
            readiness,
            gates,
        };
        tasks.critical("gateway", starting.serve(self.feed));
        tasks
    }
}

struct Gates {
    enrolled: Gate,
    listening: Gate,
}

/// Everything between binding and draining.
struct Starting {
    config: Arc<Config>,
    tunnel: UdpSocket,
    tunnel_addr: SocketAddr,
    tunnel_tcp: TcpListener,
    auto: TcpListener,
    auto_addr: SocketAddr,
    inspector: Inspector,
    metrics: Metrics,
    tasks: Tasks,
    readiness: Readiness,
    gates: Gates,
}

impl Starting {
    async fn serve(self, feed: Feed) -> Result<(), BoxError> {
        let shutdown = self.tasks.shutdown();
        let (given, agent) = match feed {
            Feed::Given(given) => (given, None),
            Feed::Agent => {
                let newcomer = Newcomer {
                    subject: Subject::Gateway(self.config.name.clone()),
                    state_dir: self.config.state_dir.clone(),
                    token_file: self.config.agent_token_file.clone(),
                };
                let member = tokio::select! {
                    member = newcomer.obtain() => member?,
                    () = shutdown.requested() => return Ok(()),
                };
                let (given, agent) = self.follow(member);
                (given, Some(agent))
            }
        };
        self.gates.enrolled.ready();
        let identity = Identity { source: given.identity, trust: given.trust, federation: given.federation };
        let garbage = self.metrics.reject_counter("quic_garbage");
        let endpoint = quic::endpoint(self.tunnel, &self.config.tunnel, &identity, garbage)?;
        self.metrics.svid_expiry(identity.source.current().not_after().0);
        let core = Arc::new(Core::new(Parts {
            config: self.config.clone(),
            cluster: given.cluster,
            identity,
            view: given.view,
            metrics: self.metrics,
            tasks: self.tasks.clone(),
        }));
        if let Some(agent) = &agent {
            core.observed.recall(agent.past(&core.metrics));
        }
        core.pool.set_view(core.current_view());
        core.observed.refresh_own(&core.pool.table().borrow());
        self.inspector.attach(core.clone());
        tracing::info!(
            cluster = %core.cluster, name = core.config.name, tunnel = %self.tunnel_addr, auto = %self.auto_addr,
            "gateway serves"
        );
        let tasks = &self.tasks;
        tasks.spawn("tunnel.accept_loop", accept::accept(core.clone(), endpoint.clone()));
        tasks.spawn("tunnel.tcp_accept_loop", tcp::accept::listen(core.clone(), self.tunnel_tcp));
        tasks.spawn("tunnel.peers", peers::manage(core.clone(), endpoint.clone()));
        tasks.spawn("ingress.listen", ingress::listen(core.clone(), self.auto, self.inspector.listeners()));
        tasks.spawn("pool.probe", core.pool.clone().probe(core.stop.clone()));
        tasks.spawn("pool.view", keep_own_house(core.clone()));
        tasks.spawn("readiness", ready_once_tried(core.clone(), self.gates.listening));
        if let Some(agent) = agent {
            let hello = GatewayHello {
                name: core.config.name.clone(),
                tunnel_address: core.config.advertised(self.tunnel_addr).map(|a| a.to_string()).unwrap_or_default(),
                local_ip: core.config.listen.local.to_string(),
                auto_port: self.auto_addr.port().into(),
                pinned_port_base: core.config.listen.pinned_port_base.into(),
                instance: format!("{}-{}", std::process::id(), isthmus_runtime::now()),
            };
            tasks.spawn("feed.follow", agent.clone().follow(core.clone(), hello));
            tasks.spawn("feed.remember", agent.clone().remember(core.clone()));
            tasks.spawn("feed.renew", agent.renew(core.clone()));
        }
        shutdown.requested().await;
        self.readiness.begin_drain();
        drain(&core).await;
        drop(time::timeout(FAREWELL, endpoint.wait_idle()).await);
        Ok(())
    }

    fn follow(&self, member: Member) -> (Given, Agent) {
        let record = member.record();
        let (federation, identity, trust) =
            (record.federation().clone(), member.source().clone(), member.trust().clone());
        let agent = Agent::new(member, self.config.state_dir.clone(), &self.metrics);
        (Given { cluster: record.cluster, federation, identity, trust, view: agent.view() }, agent)
    }
}

/// Brings the local pool, and what follows from it, up to date with every view.
pub(crate) async fn keep_own_house(core: Arc<Core>) {
    let mut view: watch::Receiver<Arc<View>> = core.view.clone();
    let mut table = core.pool.table();
    view.mark_changed();
    loop {
        tokio::select! {
            changed = view.changed() => {
                if changed.is_err() {
                    core.stop.cancelled().await;
                    return;
                }
                let now = view.borrow_and_update().clone();
                core.pool.set_view(now);
            }
            _ = table.changed() => {
                let now = table.borrow_and_update().clone();
                core.observed.refresh_own(&now);
            }
            () = core.stop.cancelled() => return,
        }
    }
}

/// A port that is taken does not make the gateway unready: the others serve.
async fn ready_once_tried(core: Arc<Core>, gate: Gate) {
    let mut tried = core.standing.tried();
    tokio::select! {
        reached = tried.wait_for(|tried| *tried) => if reached.is_ok() { gate.ready() },
        () = core.stop.cancelled() => {}
    }
}

pub(crate) async fn drain(core: &Core) {
    let drain = &core.config.drain;
    tracing::info!(carried = core.carried.len(), deadline = ?drain.deadline, "draining");
    core.draining.cancel();
    time::sleep(drain.accept_for).await;
    core.closing.cancel();
    core.carried.close();
    let left = drain.deadline.saturating_sub(drain.accept_for);
    if time::timeout(left, core.carried.wait()).await.is_err() {
        tracing::warn!(carried = core.carried.len(), "drain deadline over; the rest is reset");
    }
    core.stop.cancel();
}
