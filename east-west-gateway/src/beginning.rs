//! How a gateway comes to its addresses and its state folder: afresh, or from the one that it takes over.
//!
//! In: whether it was to take over, and whom it found. Out: the state folder's lock, and errors that say what a taken
//! address has to do with taking over. Binding itself is [`crate::serve`]'s.

use std::path::PathBuf;

use isthmus_runtime::{health::HealthError, net::BindError};

use crate::{
    config::Config,
    feed::Feed,
    handover::{
        lock::{LockError, StateLock},
        successor::{Successor, TakeOverError},
    },
};

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// An address cannot be bound.
    #[error(transparent)]
    Bind(BindError),
    /// The health server's address cannot be used.
    #[error(transparent)]
    Health(HealthError),
    /// An address is taken, as by a gateway that runs; nobody was to be taken over.
    #[error("if this gateway's earlier process still runs, start this one with --take-over")]
    InUse(#[source] BindError),
    /// An address is taken, and no gateway could be asked to hand it over.
    #[error(
        "a gateway may run at this address, but none with this stateDir ({}), by which --take-over finds it",
        state_dir.display()
    )]
    InUseElsewhere {
        /// As configured.
        state_dir: PathBuf,
        /// The address.
        source: BindError,
    },
    /// The state folder is another gateway's, or cannot be used.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A bound socket does not tell its address.
    #[error("read a bound socket's address")]
    Address(#[source] std::io::Error),
    /// A gateway runs and could not be taken over.
    #[error("take over from the running gateway")]
    TakeOver(#[from] TakeOverError),
}

/// How a gateway comes to its sockets.
#[derive(Debug)]
pub(crate) enum Beginning {
    Afresh,
    /// It was to take over.
    NobodyThere,
    Succeeding(Box<Successor>),
}

impl Beginning {
    /// Says what a taken address may mean.
    pub(crate) fn explain(&self, config: &Config, error: BindError) -> BuildError {
        match (self, error) {
            (Self::Afresh, error @ BindError::InUse { .. }) => BuildError::InUse(error),
            (Self::NobodyThere, source @ BindError::InUse { .. }) => {
                BuildError::InUseElsewhere { state_dir: config.state_dir.clone(), source }
            }
            (_, error) => BuildError::Bind(error),
        }
    }

    /// The state folder's lock: the predecessor's, or a new one.
    pub(crate) fn lock(&self, config: &Config, feed: &Feed) -> Result<Option<StateLock>, LockError> {
        let dir = &config.state_dir;
        let given = match self {
            Self::Succeeding(successor) => successor.given.state_lock(),
            Self::Afresh | Self::NobodyThere => None,
        };
        if let Some(given) = given {
            return Ok(Some(StateLock::share(given)));
        }
        if matches!(feed, Feed::Agent) {
            StateLock::make_dir(dir)?;
        }
        let asked = !matches!(self, Self::Afresh);
        dir.is_dir().then(|| StateLock::take(dir, asked)).transpose()
    }
}
