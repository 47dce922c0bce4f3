//! Consensus: the openraft engine over a durable store, and the one way to change the replicated state, [`Proposer`].
//!
//! Holds: a command is acknowledged only after its entry was flushed to disk and applied. Any error of the store stops
//! the engine, and with it the process ([`Group::failure`]), before anything more is acknowledged.
//!
//! The group has one voter. The store, the state machine and the log format are those that more voters will use; what
//! is missing for them is the network between nodes, which refuses to send (see [`network`]).

mod log;
mod machine;
mod network;
mod proposer;
mod store;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, io::Cursor, sync::Arc, time::Duration};

use openraft::{BasicNode, Config as RaftConfig, Raft, SnapshotPolicy};
use tokio::sync::watch;

use self::{log::LogStore, machine::Machine, network::NoPeers};
pub use self::{
    proposer::{ProposeError, Proposer},
    store::{Store, StoreError},
};
use crate::state::{Command, Response, View};

openraft::declare_raft_types!(
    /// What flows through the engine.
    pub TypeConfig:
        D = Command,
        R = Response,
        NodeId = u64,
        Node = BasicNode,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = Cursor<Vec<u8>>,
);

/// The only voter.
const NODE: u64 = 1;

/// How long the first election may take.
const ELECTION_DEADLINE: Duration = Duration::from_secs(30);

/// The running engine.
#[derive(Clone)]
pub struct Group {
    raft: Raft<TypeConfig>,
    views: watch::Receiver<View>,
}

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store could not be read.
    #[error("read the stored state")]
    Read(#[source] openraft::StorageError<u64>),
    /// The engine's own settings are wrong.
    #[error("configure the consensus engine")]
    Config(#[source] openraft::ConfigError),
    /// The engine stopped while it was starting.
    #[error("start the consensus engine")]
    Engine(#[source] openraft::error::Fatal<u64>),
    /// A group of one was not formed.
    #[error("form the group")]
    Form(#[source] openraft::error::RaftError<u64, openraft::error::InitializeError<u64, BasicNode>>),
    /// Nobody leads.
    #[error("no leader was elected within {} s", ELECTION_DEADLINE.as_secs())]
    NoLeader(#[source] openraft::metrics::WaitError),
}

impl Group {
    /// Starts the engine on `store`, forms a group of one voter if there is none, and waits until this node leads and
    /// has applied all that was committed before.
    pub async fn start(store: Store, snapshot_after: u64) -> Result<Self, StartError> {
        let machine = Machine::load(store.clone()).await.map_err(StartError::Read)?;
        let views = machine.views();
        let config = RaftConfig {
            cluster_name: "isthmus".to_owned(),
            heartbeat_interval: 250,
            election_timeout_min: 1000,
            election_timeout_max: 2000,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshot_after),
            max_in_snapshot_log_to_keep: snapshot_after,
            ..RaftConfig::default()
        };
        let config = Arc::new(config.validate().map_err(StartError::Config)?);
        let raft = Raft::new(NODE, config, NoPeers, LogStore::new(store), machine).await.map_err(StartError::Engine)?;
        if !raft.is_initialized().await.map_err(StartError::Engine)? {
            let members = BTreeMap::from([(NODE, BasicNode::default())]);
            raft.initialize(members).await.map_err(StartError::Form)?;
        }
        let group = Self { raft, views };
        group
            .raft
            .wait(Some(ELECTION_DEADLINE))
            .metrics(
                |m| m.current_leader == Some(NODE) && m.last_applied.map(|id| id.index) >= m.last_log_index,
                "lead, with everything applied",
            )
            .await
            .map_err(StartError::NoLeader)?;
        Ok(group)
    }

    /// The replicated state as it changes.
    pub fn views(&self) -> watch::Receiver<View> {
        self.views.clone()
    }

    /// The way to change it.
    pub fn proposer(&self) -> Proposer {
        Proposer::new(self.raft.clone())
    }

    /// The engine's condition as it changes.
    pub fn metrics(&self) -> watch::Receiver<openraft::RaftMetrics<u64, BasicNode>> {
        self.raft.metrics()
    }

    /// Resolves when the engine has stopped on an error, for example because the store could not be written.
    pub async fn failure(&self) -> openraft::error::Fatal<u64> {
        let mut metrics = self.raft.metrics();
        loop {
            if let Err(fatal) = &metrics.borrow_and_update().running_state {
                return fatal.clone();
            }
            if metrics.changed().await.is_err() {
                return openraft::error::Fatal::Stopped;
            }
        }
    }

    /// Stops the engine and waits for it.
    pub async fn stop(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "the consensus engine did not stop cleanly");
        }
    }
}
