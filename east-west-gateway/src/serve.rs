//! From a configuration to a running gateway, and its drain.
//!
//! Sockets are bound first, or taken over from a running gateway, so that a taken port is an error at once; health is
//! served before the gateway is enrolled. A gateway that takes over prepares everything and then waits for its
//! predecessor's word ([`crate::handover`]).
//! It ends with a [drain](crate::drain).

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
    open_files,
    tasks::{TaskError, Tasks},
};
use tokio::{net::TcpListener, sync::watch, time};

use crate::{
    beginning::{Beginning, BuildError},
    config::Config,
    core::{Core, Parts},
    debug::{self, Inspector},
    drain::drain,
    feed::{Agent, Feed, Given},
    handover::{
        self,
        lock::StateLock,
        predecessor,
        shelf::{Role, Shelf},
        socket::SharedSocket,
        steps::Steps,
        successor::Successor,
    },
    ingress,
    metrics::Metrics,
    overload::sample,
    standing::Part,
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
/// For a successor to reach each of its peers before it takes over; those that do not answer must not hold it up.
const REACH_PEERS: Duration = Duration::from_secs(5);
const REACH_CHECK: Duration = Duration::from_millis(20);

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
    successor: Option<Successor>,
    /// There is none for a gateway that was given its feed and has no state folder.
    lock: Option<StateLock>,
}

/// Binds everything that has a fixed address. Pinned ports come and go with the clusters.
pub async fn build(config: Config, feed: Feed) -> Result<Bound, BuildError> {
    bind(config, feed, Beginning::Afresh).await
}

/// The same beside a gateway that runs with the same configuration: it gives its sockets, and goes on serving until
/// [`Bound::run`] is ready to. Without one, this is [`build`].
pub async fn take_over(config: Config, feed: Feed) -> Result<Bound, BuildError> {
    let beginning =
        Successor::ask(&config).await?.map_or(Beginning::NobodyThere, |s| Beginning::Succeeding(Box::new(s)));
    bind(config, feed, beginning).await
}

async fn bind(config: Config, feed: Feed, mut beginning: Beginning) -> Result<Bound, BuildError> {
    // First of all: it keeps a second gateway off identity and sockets.
    let lock = beginning.lock(&config, &feed)?;
    let given = match &beginning {
        Beginning::Succeeding(successor) => successor.given.clone(),
        Beginning::Afresh | Beginning::NobodyThere => Arc::default(),
    };
    let health = match given.tcp(&Role::Health, config.listen.health) {
        Some(listener) => health::adopt(listener),
        None => health::bind(config.listen.health).await,
    };
    let health = health.map_err(|error| match error {
        HealthError::Bind(error) => beginning.explain(&config, error),
        error @ HealthError::Address(_) => BuildError::Health(error),
    })?;
    let given_tunnel = given.udp(&Role::Tunnel, config.listen.tunnel);
    if let Beginning::Succeeding(successor) = &mut beginning {
        successor.shares_tunnel = given_tunnel.is_some();
    }
    let bound = bind_tunnel(config.listen.tunnel, given_tunnel, &given).await;
    let (tunnel, tunnel_tcp) = bound.map_err(|error| match error {
        BuildError::Bind(error) => beginning.explain(&config, error),
        error => error,
    })?;
    let auto = SocketAddr::new(config.listen.local, config.listen.auto_port);
    let auto = match given.tcp(&Role::Auto, auto) {
        Some(listener) => TcpListener::from_std(listener).map_err(BuildError::Address)?,
        None => net::bind_tcp(auto, "listen.autoPort").await.map_err(|error| match error {
            // The port is not what is wrong.
            BindError::NotOnThisMachine { addr, .. } => {
                BuildError::Bind(BindError::NotOnThisMachine { field: "listen.local".to_owned(), addr })
            }
            error => beginning.explain(&config, error),
        })?,
    };
    let successor = match beginning {
        Beginning::Succeeding(successor) => Some(*successor),
        Beginning::Afresh | Beginning::NobodyThere => None,
    };
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
        successor,
        lock,
    })
}

/// The same port for UDP and TCP. What the predecessor gave is used.
async fn bind_tunnel(
    address: SocketAddr,
    given_udp: Option<UdpSocket>,
    given: &handover::shelf::Given,
) -> Result<(UdpSocket, TcpListener), BuildError> {
    let address = match &given_udp {
        Some(udp) => udp.local_addr().map_err(BuildError::Address)?,
        None => address,
    };
    let mut given_udp = given_udp;
    let mut given_tcp = given.tcp(&Role::TunnelTcp, address);
    let mut tries = 0;
    loop {
        let tcp = match given_tcp.take() {
            Some(listener) => TcpListener::from_std(listener).map_err(BuildError::Address)?,
            None => net::bind_tcp(address, "listen.tunnel").await.map_err(BuildError::Bind)?,
        };
        let same = tcp.local_addr().map_err(BuildError::Address)?;
        match given_udp.take().map_or_else(|| net::bind_udp(same, "listen.tunnel"), Ok) {
            Ok(udp) => return Ok((udp, tcp)),
            // A port that the system chose for one may be taken for the other.
            Err(_) if address.port() == 0 && tries < 10 => tries += 1,
            Err(error) => return Err(BuildError::Bind(error)),
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
        let needed = self.config.open_files();
        if let Some(limit) = open_files::limit().filter(|limit| *limit < needed) {
            tracing::warn!(
                limit,
                needed,
                "the limit of open files is below what ingress.maxConnections and egress.maxStreams allow: raise it \
                 (ulimit -n, LimitNOFILE), or lower those"
            );
        }
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
        let steps = if self.successor.is_some() { Steps::default() } else { Steps::afresh() };
        let shelf = Shelf::default();
        let answers = Health { listener: self.health, registry, shelf: shelf.clone() };
        tasks.spawn(
            "health.start",
            answers.serve(tasks.clone(), readiness.clone(), self.inspector.clone(), steps.clone()),
        );
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
            steps,
            shelf,
            successor: self.successor,
            lock: self.lock,
        };
        tasks.critical("gateway", starting.serve(self.feed));
        tasks
    }
}

/// The health server to be.
struct Health {
    listener: HealthListener,
    registry: Registry,
    shelf: Shelf,
}

impl Health {
    /// Serves while this gateway is the one that answers: a probe must not meet a successor that prepares, nor a
    /// predecessor that finishes.
    async fn serve(self, tasks: Tasks, readiness: Readiness, inspector: Inspector, steps: Steps) {
        let shutdown = tasks.shutdown();
        tokio::select! {
            () = steps.open.cancelled() => {}
            () = shutdown.requested() => return,
        }
        let shelved = self.shelf.put(Role::Health, &self.listener);
        let leave = async move {
            steps.taken_over.cancelled().await;
            drop(shelved);
        };
        self.listener.serve_until(&tasks, Arc::new(self.registry), readiness, debug::router(inspector), leave);
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
    steps: Steps,
    shelf: Shelf,
    successor: Option<Successor>,
    lock: Option<StateLock>,
}

impl Starting {
    async fn serve(self, feed: Feed) -> Result<(), BoxError> {
        let shutdown = self.tasks.shutdown();
        // Until this gateway has ended, also while a successor serves that holds it, too.
        let _lock = self.lock.as_ref().map(|lock| self.shelf.put(Role::Lock, lock)).transpose()?;
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
        let lost = self.metrics.reject_counter("relay_full");
        let tunnel = match &self.successor {
            Some(successor) => successor.tunnel(self.tunnel, lost)?,
            None => SharedSocket::alone(self.tunnel, lost)?,
        };
        let endpoint = quic::endpoint(tunnel.clone(), &self.config.tunnel, &identity, garbage)?;
        self.metrics.svid_expiry(identity.source.current().not_after().0);
        let core = Arc::new(Core::new(Parts {
            config: self.config.clone(),
            cluster: given.cluster,
            identity,
            view: given.view,
            metrics: self.metrics,
            tasks: self.tasks.clone(),
            steps: self.steps,
            shelf: self.shelf,
            redundancy: tunnel.redundancy(),
        }));
        if let Some(agent) = &agent {
            core.observed.recall(agent.past(&core.metrics));
        }
        core.pool.set_view(core.current_view());
        core.observed.refresh_own(&core.pool.table().borrow());
        self.inspector.attach(core.clone());
        let tasks = &self.tasks;
        tasks.spawn("tunnel.accept_loop", accept::accept(core.clone(), endpoint.clone()));
        tasks.spawn("tunnel.tcp_accept_loop", tcp::accept::listen(core.clone(), self.tunnel_tcp));
        tasks.spawn("tunnel.peers", peers::manage(core.clone(), endpoint.clone()));
        let given = self.successor.as_ref().map(|s| s.given.clone()).unwrap_or_default();
        let listen = ingress::listen(core.clone(), self.auto, self.inspector.listeners(), given.clone());
        tasks.spawn("ingress.listen", listen);
        tasks.spawn("pool.probe", core.pool.clone().probe(core.stop.clone()));
        tasks.spawn("overload.watch", sample::watch(core.clone()));
        tasks.spawn("tunnel.windows", shrink_windows(core.clone()));
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
        if let Some(successor) = self.successor {
            tokio::select! {
                outcome = successor.go(&tunnel, prepared(&core)) => match outcome {
                    Ok(attendant) => tasks.spawn("handover.attend", attendant.attend(tunnel.clone(), core.steps.clone())),
                    Err(error) => {
                        core.stop.cancel();
                        return Err(error.into());
                    }
                },
                () = shutdown.requested() => {
                    core.stop.cancel();
                    return Ok(());
                }
            }
            core.steps.open.cancel();
            tasks.spawn("handover.rest", close_rest(core.clone(), given));
        }
        tasks.spawn("handover.offer", predecessor::serve(core.clone(), tunnel));
        tracing::info!(
            cluster = %core.cluster, name = core.config.name, tunnel = %self.tunnel_addr, auto = %self.auto_addr,
            "gateway serves"
        );
        tokio::select! {
            () = shutdown.requested() => {}
            () = core.steps.taken_over.cancelled() => {}
        }
        self.readiness.begin_drain();
        drain(&core, &shutdown).await;
        drop(time::timeout(FAREWELL, endpoint.wait_idle()).await);
        // For a gateway that was taken over, which nobody asked to stop.
        shutdown.request();
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

/// Until the end.
async fn shrink_windows(core: Arc<Core>) {
    tokio::select! {
        () = core.room.clone().shrink() => {}
        () = core.stop.cancelled() => {}
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

/// A successor is ready when its ports are listened on and its peers have been tried: then what is accepted can be carried.
async fn prepared(core: &Core) {
    // The sender lives as long as the core does.
    drop(core.standing.tried().wait_for(|tried| *tried).await);
    let reached = async {
        while !(core.standing.has_followed(Part::Peers) && core.registry.all_tried()) {
            time::sleep(REACH_CHECK).await;
        }
    };
    if time::timeout(REACH_PEERS, reached).await.is_err() {
        let peers: Vec<String> =
            core.registry.untried().into_iter().map(|(cluster, gateway)| format!("{cluster}/{gateway}")).collect();
        tracing::warn!(peers = peers.join(", "), waited = ?REACH_PEERS, "not all peers answer; taking over all the same");
    }
}

/// What the configuration or the state does not ask for is closed: not before there is a state, which may come later when
/// the predecessor was lost early.
async fn close_rest(core: Arc<Core>, given: Arc<handover::shelf::Given>) {
    tokio::select! {
        () = prepared(&core) => given.close_rest(),
        () = core.stop.cancelled() => {}
    }
}
