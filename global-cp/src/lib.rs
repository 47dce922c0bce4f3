//! The global control plane: the federation's replicated state, the API that agents dial, and the one for people.
//!
//! In come publications and joins ([`federation`]) and administrators' requests ([`admin`]); both become commands that
//! [`raft`] commits to disk and [`state`] applies; out goes the global state, as snapshots and deltas. What consumers
//! report is kept beside it, in memory ([`status`]). Several nodes hold the same state; how one joins them is [`nodes`]'.
//!
//! Holds: what was acknowledged is on disk; a cluster changes only what is its own; nothing here is needed for traffic
//! to flow. It holds no endpoints and no workload keys, and decides nothing from health.

pub mod admin;
pub mod authority;
pub mod config;
pub mod federation;
mod limits;
pub mod metrics;
pub mod nodes;
pub mod raft;
#[cfg(test)]
mod sim;
pub mod state;
pub mod status;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use isthmus_identity::{renew::renew_at, tls::TlsError};
use isthmus_model::{
    global::Settings,
    ids::{IdError, NodeName},
    time::Timestamp,
};
use isthmus_runtime::{
    health::{self, HealthError, Readiness, Registry},
    net::{BindError, bind_tcp},
    tasks::{Shutdown, TaskError, Tasks, chain},
};

use crate::{
    admin::{
        Admin, CredentialsError, JournalError, OidcError,
        auth::{Issuers, journal::Journal},
        write_credentials,
    },
    authority::{Authority, AuthorityError},
    config::Config,
    federation::FederationService,
    metrics::Metrics,
    nodes::{JoinError, Nodes},
    raft::{Group, Inbound, Own, Peer, Peers, ProposeError, Proposer, ReadError, StartError, Store, StoreError},
    state::{Actor, Apply, Command, Resource, SUPPORTED, SetNode, Write},
    status::StatusStore,
};

/// After a failed renewal of the node's own certificate; there are days left to succeed.
const RENEWAL_RETRY: Duration = Duration::from_secs(300);
/// After a first command that nobody took.
const FOUND_RETRY: Duration = Duration::from_secs(1);

/// A control plane that is up: it leads, listens, and serves.
pub struct Bound {
    /// The federation API.
    pub grpc: SocketAddr,
    /// The admin API.
    pub admin: SocketAddr,
    /// Health and metrics.
    pub health: SocketAddr,
    /// The context file for `isthmusctl`.
    pub context: PathBuf,
    tasks: Tasks,
    group: Group,
    drain_grace: Duration,
}

/// Why the control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A name that validation refuses, in a configuration that was not read from a file.
    #[error("read the node's name")]
    Node(#[from] IdError),
    /// The store.
    #[error("open the replicated state")]
    Store(#[from] StoreError),
    /// The certificate authority.
    #[error("prepare the federation's identity")]
    Authority(#[from] AuthorityError),
    /// The control plane that this node was to join.
    #[error("join the control plane")]
    Join(#[source] Box<JoinError>),
    /// Consensus.
    #[error("start consensus")]
    Raft(#[source] Box<StartError>),
    /// The first commands.
    #[error("found the federation")]
    Found(#[source] Box<FoundError>),
    /// A listening address.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The health server.
    #[error(transparent)]
    Health(#[from] HealthError),
    /// An address that was bound cannot be read.
    #[error("read the bound address")]
    Address(#[source] io::Error),
    /// TLS.
    #[error("prepare TLS")]
    Tls(#[from] TlsError),
    /// The administrator's files.
    #[error("write the administrator's credentials")]
    Credentials(#[from] CredentialsError),
    /// The audit log of this node.
    #[error("open this node's audit log")]
    Journal(#[from] JournalError),
    /// The issuers of administrators' tokens.
    #[error("prepare the issuers in admin.oidc")]
    Oidc(#[from] OidcError),
    /// A thread.
    #[error("the thread that prepared the state folder ended early")]
    Thread,
}

/// Why a node's first commands were not accepted.
#[derive(Debug, thiserror::Error)]
pub enum FoundError {
    /// What there is could not be read.
    #[error("read the federation's state")]
    Read(#[from] ReadError),
    /// A change was refused.
    #[error("change the federation's state")]
    Propose(#[from] ProposeError),
}

/// Opens the state, joins the group or forms one, binds and serves. When this returns, a node that is alone is ready; one
/// of several becomes ready when it has heard of a leader and holds all that was committed.
pub async fn build(config: Config) -> Result<Bound, BuildError> {
    let tasks = Tasks::new();
    let readiness = Readiness::new();
    let leads = readiness.gate("raft-leader");
    let listens = readiness.gate("listeners");
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);

    let node: NodeName = config.node.parse()?;
    // The state folder comes first: if nothing can be kept there, nobody must be able to reach us.
    let (state_dir, federation, own_name) = (config.state_dir.clone(), config.federation.clone(), node.clone());
    let segment_bytes = config.raft.segment_bytes;
    let prepare = move || {
        Ok::<_, BuildError>((
            Store::open(&state_dir, segment_bytes)?,
            Authority::open(&state_dir, &federation, &own_name)?,
        ))
    };
    let (store, authority) = tokio::task::spawn_blocking(prepare).await.map_err(|_| BuildError::Thread)??;

    let grpc = bind_tcp(config.listen.grpc, "listen.grpc").await?;
    let admin = bind_tcp(config.listen.admin, "listen.admin").await?;
    let health = health::bind(config.listen.health).await?;
    let grpc_addr = grpc.local_addr().map_err(BuildError::Address)?;
    let admin_addr = admin.local_addr().map_err(BuildError::Address)?;
    let advertise = config.advertise.clone().unwrap_or_else(|| grpc_addr.to_string());

    let peer = Peer { name: node.to_string(), address: advertise.clone() };
    let own = own(&store, &authority, &config, (node, peer)).await?;
    let peers = Peers::new(authority.source().clone(), authority.trust().clone(), config.federation.clone());
    let group = Group::start(store, own.clone(), peers.clone(), config.raft.snapshot_after_entries)
        .await
        .map_err(|error| BuildError::Raft(Box::new(error)))?;
    let proposer = group.proposer(&tasks, Actor { who: authority.own().to_string(), from: String::new() });
    let context = write_credentials(&config.state_dir, &authority, admin_addr)?;

    let status = StatusStore::default();
    let service = FederationService::new(
        authority.clone(),
        (proposer.clone(), group.clone()),
        status.clone(),
        metrics.clone(),
        tasks.shutdown(),
        config.publications,
    );
    let nodes =
        Nodes::new(authority.clone(), (proposer.clone(), group.views()), Inbound::new(group.clone()), status.clone());
    service.serve(nodes, grpc, &tasks, &mut registry)?;
    nodes::membership::follow(&tasks, group.clone(), proposer.clone());
    nodes::agreement::watch(&tasks, group.clone(), peers.clone(), config.node.clone());
    federation::clock::follow(&tasks, group.clone(), proposer.clone());
    let (state_dir, own_address) = (config.state_dir.clone(), admin_addr);
    follow_bundle(&tasks, &group, authority.clone(), move |authority| {
        write_credentials(&state_dir, authority, own_address).map(drop)
    });
    let admin_api = Admin {
        node: config.node.as_str().into(),
        advertise: advertise.into(),
        authority: authority.clone(),
        proposer: proposer.clone(),
        group: group.clone(),
        peers,
        views: group.views(),
        status,
        journal: Journal::open(&config.state_dir, &tasks)?,
    };
    let issuers = Issuers::start(&config.admin.oidc, &tasks)?;
    let admin_config = config.admin.clone();
    if group.began_alone() {
        found(&group, &proposer, &authority, (&own, &config))
            .await
            .map_err(|error| BuildError::Found(Box::new(error)))?;
        leads.ready();
    } else {
        found_when_led(&tasks, (group.clone(), proposer, authority.clone()), own, config.clone());
    }
    admin_api.serve(admin, (&admin_config, issuers), &tasks, &mut registry)?;
    let bound = Bound {
        grpc: grpc_addr,
        admin: admin_addr,
        health: health.local_addr(),
        context,
        tasks: tasks.clone(),
        group: group.clone(),
        drain_grace: config.drain_grace,
    };
    health.serve(&tasks, Arc::new(registry), readiness.clone(), axum::Router::new());
    listens.ready();
    watch(&tasks, group, metrics.clone(), leads);
    renew_own(&tasks, authority, metrics);
    drain(&tasks, readiness);
    tracing::info!(grpc = %bound.grpc, admin = %bound.admin, health = %bound.health, "control plane ready");
    Ok(bound)
}

impl Bound {
    /// Asks it to stop.
    pub fn shutdown(&self) -> Shutdown {
        self.tasks.shutdown()
    }

    /// Runs until SIGTERM, SIGINT or a failure, then drains.
    pub async fn run(self) -> Result<(), TaskError> {
        let ended = self.tasks.run(self.drain_grace).await;
        self.group.stop().await;
        ended
    }

    /// The same without signals, for tests and embedding: stops when `stop` resolves.
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> Result<(), TaskError> {
        let ended = self.tasks.run_until(stop, self.drain_grace).await;
        self.group.stop().await;
        ended
    }
}

/// Which node this is: as it was, as the group says that it joins, or the first one.
async fn own(
    store: &Store,
    authority: &Authority,
    config: &Config,
    (node, peer): (NodeName, Peer),
) -> Result<Own, BuildError> {
    let open = store.clone();
    let held = tokio::task::spawn_blocking(move || open.own()).await.map_err(|_| BuildError::Thread)??;
    let (id, founds) = match (held, &config.join_token_file) {
        (Some(held), _) => held,
        (None, None) => (1, true),
        (None, Some(token)) => {
            let id = nodes::newcomer::join(authority, &node, &peer.address, token.clone())
                .await
                .map_err(|error| BuildError::Join(Box::new(error)))?;
            tracing::info!(%node, id, "joined the control plane");
            (id, false)
        }
    };
    if held.is_none() {
        let open = store.clone();
        tokio::task::spawn_blocking(move || open.set_own(id, founds)).await.map_err(|_| BuildError::Thread)??;
    }
    Ok(Own { id, node, peer, founds })
}

/// Makes sure that the state carries the federation's bundle, this node's address and the configured settings, and is of a
/// new epoch if it was asked for.
async fn found(
    group: &Group,
    proposer: &Proposer,
    authority: &Authority,
    (own, config): (&Own, &Config),
) -> Result<(), FoundError> {
    // First of all: where the others look for this node they may not find it.
    let node = SetNode {
        supports: SUPPORTED,
        id: own.id,
        node: own.node.clone(),
        address: own.peer.address.clone(),
        now: Timestamp(isthmus_runtime::now()),
    };
    if group.own_address().is_some_and(|address| address != node.address) {
        proposer.propose(Command::SetNode(node.clone())).await?;
    }
    group.barrier().await?;
    let view = group.views().borrow().clone();
    if view
        .state()
        .nodes()
        .get(&node.node)
        .is_none_or(|info| info.address != node.address || info.supports != SUPPORTED)
    {
        proposer.propose(Command::SetNode(node)).await?;
    }
    let held = view.global().cloned();
    if own.founds && held.as_ref().is_none_or(|global| !authority.is_rooted_in(&global.federation_bundle)) {
        proposer.propose(Command::SetFederationBundle { bundle: authority.own_bundle() }).await?;
    }
    match held {
        None if own.founds && config.settings != Settings::default() => {
            let resource = Resource::Settings(config.settings.clone());
            let writes = vec![Write::Put { resource, expected: None }];
            proposer.propose(Command::Apply(Apply { writes })).await?;
        }
        Some(held) if config.settings != Settings::default() && held.settings != config.settings => tracing::warn!(
            "the settings of the configuration file are not those in force: they count when a control plane is founded; \
             since then `isthmusctl apply` changes them, and `isthmusctl get settings -o yaml` shows them"
        ),
        _ => {}
    }
    if config.new_epoch {
        let outcome = proposer.propose(Command::StartEpoch).await?;
        tracing::warn!(stamp = %outcome.stamp, "a new epoch has begun: every member takes this node's state whole");
    }
    Ok(())
}

/// The same for a node of several, which may come up before a majority has.
fn found_when_led(tasks: &Tasks, (group, proposer, authority): (Group, Proposer, Authority), own: Own, config: Config) {
    let shutdown = tasks.shutdown();
    tasks.spawn("first-commands", async move {
        loop {
            let attempt = tokio::select! {
                () = shutdown.requested() => return,
                attempt = found(&group, &proposer, &authority, (&own, &config)) => attempt,
            };
            match attempt {
                Ok(()) => return,
                Err(error) => tracing::warn!(error = %chain(&error), "waiting for the other nodes"),
            }
            tokio::select! {
                () = shutdown.requested() => return,
                () = tokio::time::sleep(FOUND_RETRY) => {}
            }
        }
    });
}

/// Takes the federation's bundle into use whenever the group agrees on another one.
fn follow_bundle(
    tasks: &Tasks,
    group: &Group,
    authority: Authority,
    written: impl Fn(&Authority) -> Result<(), CredentialsError> + Clone + Send + 'static,
) {
    let (shutdown, mut views) = (tasks.shutdown(), group.views());
    tasks.spawn("federation-bundle", async move {
        loop {
            let bundle = views.borrow_and_update().global().map(|global| global.federation_bundle.clone());
            if let Some(bundle) = bundle.filter(|bundle| *bundle != authority.bundle()) {
                let (authority, written) = (authority.clone(), written.clone());
                let adopt = move || -> Result<bool, String> {
                    let adopted = authority.adopt(&bundle).map_err(|error| chain(&error))?;
                    if adopted {
                        written(&authority).map_err(|error| chain(&error))?;
                    }
                    Ok(adopted)
                };
                match tokio::task::spawn_blocking(adopt).await {
                    Ok(Ok(true)) => tracing::info!("the federation's bundle has changed"),
                    Ok(Ok(false)) => {}
                    Ok(Err(error)) => tracing::error!(%error, "cannot take the federation's bundle into use"),
                    Err(error) => tracing::error!(%error, "cannot take the federation's bundle into use"),
                }
            }
            tokio::select! {
                () = shutdown.requested() => return,
                changed = views.changed() => if changed.is_err() { return },
            }
        }
    });
}

/// Follows the engine: metrics and readiness; its failure stops the process.
fn watch(tasks: &Tasks, group: Group, metrics: Metrics, leads: health::Gate) {
    let shutdown = tasks.shutdown();
    tasks.critical("consensus", async move {
        let (mut engine, mut views) = (group.metrics(), group.views());
        loop {
            // The engine answers whom it applied something for before it tells so in its metrics.
            let founded = views.borrow_and_update().global().cloned();
            {
                let engine = engine.borrow_and_update();
                metrics.raft(&engine);
                if let Err(fatal) = &engine.running_state {
                    return Err(fatal.clone().into());
                }
                if engine.current_leader.is_some() && (engine.last_applied.is_some() || founded.is_some()) {
                    leads.ready();
                } else {
                    leads.unready("no leader is known");
                }
            }
            if let Some(global) = &founded {
                metrics.state(global);
            }
            tokio::select! {
                () = shutdown.requested() => return Ok(()),
                fatal = group.failure() => return Err(fatal.into()),
                changed = engine.changed() => changed?,
                changed = views.changed() => changed?,
            }
        }
    });
}

/// Renews the node's own certificate at half of its life.
fn renew_own(tasks: &Tasks, authority: Authority, metrics: Metrics) {
    let shutdown = tasks.shutdown();
    tasks.spawn("renew-own-certificate", async move {
        loop {
            let current = authority.source().current();
            metrics.own_certificate(current.not_after());
            let due = renew_at(&current).since(Timestamp(isthmus_runtime::now()));
            tokio::select! {
                () = shutdown.requested() => return,
                () = tokio::time::sleep(due) => {}
            }
            if let Err(error) = authority.renew() {
                tracing::error!(error = %chain(&error), "cannot renew this node's certificate; trying again");
                tokio::select! {
                    () = shutdown.requested() => return,
                    () = tokio::time::sleep(RENEWAL_RETRY) => {}
                }
            }
        }
    });
}

/// The first step of a drain: nobody should send anyone here any more.
fn drain(tasks: &Tasks, readiness: Readiness) {
    let shutdown = tasks.shutdown();
    tasks.spawn("drain", async move {
        shutdown.requested().await;
        readiness.begin_drain();
    });
}
