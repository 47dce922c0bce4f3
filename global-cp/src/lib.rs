//! The global control plane: the federation's replicated state, the API that agents dial, and the one for people.
//!
//! In come publications and joins ([`federation`]) and administrators' requests ([`admin`]); both become commands that
//! [`raft`] commits to disk and [`state`] applies; out goes the global state, as snapshots and deltas. What consumers
//! report is kept beside it, in memory ([`status`]).
//!
//! Holds: what was acknowledged is on disk; a cluster changes only what is its own; nothing here is needed for traffic
//! to flow. It holds no endpoints and no workload keys, and decides nothing from health.

pub mod admin;
pub mod authority;
pub mod config;
pub mod federation;
pub mod metrics;
pub mod raft;
pub mod state;
pub mod status;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use isthmus_identity::{renew::renew_at, tls::TlsError};
use isthmus_model::time::Timestamp;
use isthmus_runtime::{
    health::{self, HealthError, Readiness, Registry},
    net::{BindError, bind_tcp},
    tasks::{Shutdown, TaskError, Tasks, chain},
};

use crate::{
    admin::{Admin, CredentialsError, write_credentials},
    authority::{Authority, AuthorityError},
    config::Config,
    federation::FederationService,
    metrics::Metrics,
    raft::{Group, ProposeError, StartError, Store, StoreError},
    state::Command,
    status::StatusStore,
};

/// After a failed renewal of the node's own certificate; there are days left to succeed.
const RENEWAL_RETRY: Duration = Duration::from_secs(300);

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
    /// The store.
    #[error("open the replicated state")]
    Store(#[from] StoreError),
    /// The certificate authority.
    #[error("prepare the federation's identity")]
    Authority(#[from] AuthorityError),
    /// Consensus.
    #[error("start consensus")]
    Raft(#[source] Box<StartError>),
    /// The first commands.
    #[error("found the federation")]
    Found(#[source] Box<ProposeError>),
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
    /// A thread.
    #[error("the thread that prepared the state folder ended early")]
    Thread,
}

/// Opens the state, takes the lead, binds and serves. When this returns, the node is ready.
pub async fn build(config: Config) -> Result<Bound, BuildError> {
    let tasks = Tasks::new();
    let readiness = Readiness::new();
    let leads = readiness.gate("raft-leader");
    let listens = readiness.gate("listeners");
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);

    // The state folder comes first: if nothing can be kept there, nobody must be able to reach us.
    let (state_dir, federation, node) = (config.state_dir.clone(), config.federation.clone(), config.node.clone());
    let prepare =
        move || Ok::<_, BuildError>((Store::open(&state_dir)?, Authority::open(&state_dir, &federation, &node)?));
    let (store, authority) = tokio::task::spawn_blocking(prepare).await.map_err(|_| BuildError::Thread)??;
    let group = Group::start(store, config.raft.snapshot_after_entries)
        .await
        .map_err(|error| BuildError::Raft(Box::new(error)))?;
    found(&group, &authority, &config).await.map_err(|error| BuildError::Found(Box::new(error)))?;
    leads.ready();

    let grpc = bind_tcp(config.listen.grpc, "listen.grpc").await?;
    let admin = bind_tcp(config.listen.admin, "listen.admin").await?;
    let health = health::bind(config.listen.health).await?;
    let grpc_addr = grpc.local_addr().map_err(BuildError::Address)?;
    let admin_addr = admin.local_addr().map_err(BuildError::Address)?;
    let context = write_credentials(&config.state_dir, &authority, admin_addr)?;

    let status = StatusStore::default();
    let service = FederationService::new(authority.clone(), &group, status.clone(), metrics.clone(), tasks.shutdown());
    service.serve(grpc, &tasks, &mut registry)?;
    let admin_api = Admin {
        node: config.node.as_str().into(),
        advertise: config.advertise.unwrap_or_else(|| grpc_addr.to_string()).into(),
        authority: authority.clone(),
        proposer: group.proposer(),
        views: group.views(),
        status,
    };
    admin_api.serve(admin, &tasks, &mut registry)?;
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

/// Makes sure that the state carries the federation's bundle and the configured settings, and is of a new epoch if it
/// was asked for.
async fn found(group: &Group, authority: &Authority, config: &Config) -> Result<(), ProposeError> {
    let proposer = group.proposer();
    let held = group.views().borrow().global().cloned();
    let bundle = authority.bundle();
    if held.as_ref().is_none_or(|global| global.federation_bundle.document != bundle.document) {
        proposer.propose(Command::SetFederationBundle { bundle }).await?;
    }
    if held.is_none_or(|global| global.settings != config.settings) {
        proposer.propose(Command::SetSettings { settings: config.settings.clone() }).await?;
    }
    if config.new_epoch {
        let outcome = proposer.propose(Command::StartEpoch).await?;
        tracing::warn!(stamp = %outcome.stamp, "a new epoch has begun: every member takes this node's state whole");
    }
    Ok(())
}

/// Follows the engine: metrics and readiness; its failure stops the process.
fn watch(tasks: &Tasks, group: Group, metrics: Metrics, leads: health::Gate) {
    let shutdown = tasks.shutdown();
    tasks.critical("consensus", async move {
        let (mut engine, mut views) = (group.metrics(), group.views());
        loop {
            {
                let engine = engine.borrow_and_update();
                metrics.raft(&engine);
                if let Err(fatal) = &engine.running_state {
                    return Err(fatal.clone().into());
                }
                if engine.current_leader == Some(engine.id) {
                    leads.ready();
                } else {
                    leads.unready("this node does not lead");
                }
            }
            if let Some(global) = views.borrow_and_update().global() {
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
