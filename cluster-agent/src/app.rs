//! [`build`] checks, opens and binds everything that can fail for a newcomer's reasons; [`Bound::run`] does the rest.

use std::{
    fs::{self, DirBuilder},
    io,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use isthmus_identity::{
    ca::{CaError, CertificateAuthority},
    svid::Svid,
    token::Token,
};
use isthmus_model::time::Timestamp;
use isthmus_runtime::{
    files::LastKnownGood,
    health::{self, HealthError, HealthListener},
    net::{BindError, bind_tcp},
    tasks::{TaskError, chain},
};
use tokio::net::{TcpListener, UnixListener};

use crate::{
    agent,
    config::Config,
    local::{
        admin::{self, AdminError},
        tokens::{TokenError, Tokens},
    },
    lock::{LockError, StateLock},
    uplink::{
        Disk,
        admit::Pins,
        join::{self, JoinError, Loaded, Member},
    },
};

/// Streams end, servers stop, the last registrations are saved.
const GRACE: Duration = Duration::from_secs(10);
/// Version of what the last-known-good files hold.
const FORMAT: u32 = 1;

/// Why the agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The state folder cannot be made.
    #[error("make the state folder {path}: check its parent's permissions, or set stateDir")]
    StateDir {
        /// As configured.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A second agent.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A socket that cannot be bound.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// `listen.local`.
    #[error(transparent)]
    Local(#[from] BindError),
    /// `listen.health`.
    #[error(transparent)]
    Health(#[from] HealthError),
    /// The bound socket does not tell its address.
    #[error("read the address of a bound socket")]
    Address(#[source] io::Error),
    /// The cluster's CA.
    #[error("open the cluster's certificate authority in the state folder")]
    Ca(#[from] CaError),
    /// The book of local tokens.
    #[error("open the local tokens")]
    Tokens(#[from] TokenError),
    /// The cluster cannot join.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// What the agent must not forget is damaged.
    #[error("{0}; restore it from a backup: without it the agent could not tell a swapped trust bundle")]
    Pins(String),
}

/// An agent that has its addresses and files, and runs nothing yet.
pub struct Bound {
    pub(crate) lock: StateLock,
    pub(crate) config: Config,
    pub(crate) files: Files,
    pub(crate) ca: Arc<CertificateAuthority>,
    pub(crate) tokens: Tokens,
    pub(crate) membership: Membership,
    pub(crate) local: TcpListener,
    pub(crate) local_addr: SocketAddr,
    pub(crate) admin: UnixListener,
    pub(crate) health: HealthListener,
}

/// Whether the cluster is a member yet.
pub(crate) enum Membership {
    /// It is.
    Joined { member: Member, svid: Svid, pins: Pins },
    /// It will be, with this token; what it believed if it was one before.
    Joining { token: Token, was: Option<(Member, Pins)> },
}

/// Last-known-good state.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) manifests: LastKnownGood,
    pub(crate) members: LastKnownGood,
    pub(crate) disk: Disk,
}

impl Files {
    fn of(dir: &Path) -> Self {
        let file = |name: &str| LastKnownGood::new(dir.join(name), FORMAT);
        Self {
            manifests: file("manifests.lkg"),
            members: file("members.lkg"),
            disk: Disk { global: file("global.lkg"), pins: file("bundles.lkg") },
        }
    }
}

/// Opens the state folder and binds all addresses.
pub async fn build(config: Config) -> Result<Bound, BuildError> {
    let dir = &config.state_dir;
    make_dir(dir)?;
    // First of all: it keeps a second agent off the files.
    let lock = StateLock::take(dir)?;
    let admin = admin::bind(&lock)?;
    let ca = Arc::new(CertificateAuthority::load_or_create(&dir.join("ca"), &config.trust_domain)?);
    let tokens = Tokens::open(dir.join("tokens.json"))?;
    let files = Files::of(dir);
    let pins = || load_pins(&files.disk.pins).map_err(BuildError::Pins);
    let membership = match join::load(&config, Timestamp(isthmus_runtime::now()))? {
        Loaded::Member { member, svid } => Membership::Joined { member, svid, pins: pins()? },
        Loaded::Lapsed { member, lapse } => {
            let token = join::token(&config).map_err(|why| JoinError::Lapsed {
                lapse,
                cluster: config.cluster.clone(),
                why: Box::new(why),
            })?;
            Membership::Joining { token, was: Some((member, pins()?)) }
        }
        Loaded::Never => Membership::Joining { token: join::token(&config)?, was: None },
    };
    let local = bind_tcp(config.listen.local, "listen.local").await?;
    let local_addr = local.local_addr().map_err(BuildError::Address)?;
    let health = health::bind(config.listen.health).await?;
    Ok(Bound { lock, config, files, ca, tokens, membership, local, local_addr, admin, health })
}

fn make_dir(path: &Path) -> Result<(), BuildError> {
    if fs::metadata(path).is_ok_and(|m| m.is_dir()) {
        return Ok(());
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| BuildError::StateDir { path: path.to_owned(), source })
}

fn load_pins(file: &LastKnownGood) -> Result<Pins, String> {
    let bytes = file.load().map_err(|e| chain(&e))?;
    let bytes = bytes.ok_or_else(|| format!("{} is missing", file.path().display()))?;
    serde_json::from_slice(&bytes).map_err(|e| format!("{} is damaged: {e}", file.path().display()))
}

impl Bound {
    /// Where local gRPC and xDS are served.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where health and metrics are served.
    pub fn health_addr(&self) -> SocketAddr {
        self.health.local_addr()
    }

    /// Runs until SIGTERM, SIGINT or a failure.
    pub async fn run(self) -> Result<(), TaskError> {
        let (tasks, _lock) = agent::start(self);
        tasks.run(GRACE).await
    }

    /// Runs until `stop` resolves, for tests.
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> Result<(), TaskError> {
        let (tasks, _lock) = agent::start(self);
        tasks.run_until(stop, GRACE).await
    }
}
