//! Consensus: the openraft engine over a durable store, and the one way to change the replicated state, [`Proposer`].
//!
//! Holds: a command is acknowledged only after its entry was flushed to disk by a majority of the voters, and applied here.
//! Any error of the store stops the engine, and with it the process ([`Group::failure`]), before anything more is
//! acknowledged. Changes may be proposed, and reads made to see all that was acknowledged before ([`Group::barrier`]), on
//! any node: what only the leader can do is asked of it.

mod agreement;
#[cfg(test)]
mod formats;
mod inbound;
mod journal;
mod log;
mod machine;
mod network;
mod proposer;
#[cfg(test)]
mod simulated;
mod store;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Cursor,
    sync::Arc,
    time::Duration,
};

use isthmus_model::ids::NodeName;
use isthmus_runtime::tasks::Tasks;
use openraft::{
    ChangeMembers, Config as RaftConfig, Raft, RaftMetrics, SnapshotPolicy, error::RaftError,
    storage::RaftLogStorage as _,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout_at},
};

pub use self::{
    agreement::{Digests, StateDigest, Verdict, judge},
    journal::{JournalError, TooLongWrite},
    network::{NoChannel, Peer, Peers},
    proposer::{ProposeError, Proposer},
    store::{Store, StoreError},
};
pub(crate) use self::{
    inbound::{Inbound, InboundError},
    network::MAX_PEER_MESSAGE,
};
use self::{log::LogStore, machine::Machine};
use crate::state::{Actor, Answers, Batch, View};

openraft::declare_raft_types!(
    /// What flows through the engine.
    pub TypeConfig:
        D = Batch,
        R = Answers,
        NodeId = u64,
        Node = Peer,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = Cursor<Vec<u8>>,
);

/// How long the first election of a group of one may take.
const ELECTION_DEADLINE: Duration = Duration::from_secs(30);
/// For a read to be allowed.
const READ_DEADLINE: Duration = Duration::from_secs(5);
/// Until the leader is asked again.
const RETRY: Duration = Duration::from_millis(50);
/// A learner this many entries behind the leader, or fewer, may vote.
const CAUGHT_UP: u64 = 100;

/// The engine's view of itself and of the group.
pub type EngineMetrics = RaftMetrics<u64, Peer>;

/// The running engine.
#[derive(Clone)]
pub struct Group {
    raft: Raft<TypeConfig>,
    peers: Peers,
    views: watch::Receiver<View>,
    began_alone: bool,
    digests: Digests,
    resumed: Option<Resumed>,
}

/// This node led when it stopped. The engine then leads on in the same term, if nobody else was elected meanwhile, without
/// knowing what of its log was committed; a read must not see less than all of that.
#[derive(Clone, Copy, Debug)]
struct Resumed {
    vote: openraft::Vote<u64>,
    /// Where its log ended.
    last: u64,
}

/// Which node this is, and how it came to the group.
#[derive(Clone, Debug)]
pub struct Own {
    /// Its number in the group.
    pub id: u64,
    /// Its name.
    pub node: NodeName,
    /// Its name, and where the others dial it.
    pub peer: Peer,
    /// It is the first one, and forms the group if there is none.
    pub founds: bool,
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
    Form(#[source] RaftError<u64, openraft::error::InitializeError<u64, Peer>>),
    /// Nobody leads.
    #[error("no leader was elected within {} s", ELECTION_DEADLINE.as_secs())]
    NoLeader(#[source] openraft::metrics::WaitError),
}

/// Why a read could not be made to see all that was acknowledged before.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Nobody leads, or the leader cannot be reached.
    #[error(
        "no leader of the control plane answered within {} s: {why}; what this node holds can be read with \
         ?consistency=stale", READ_DEADLINE.as_secs()
    )]
    NoLeader {
        /// What was tried last.
        why: String,
    },
    /// The engine has stopped; the process is about to.
    #[error("the control plane is stopping because of an internal error; see its log")]
    Stopped(#[source] openraft::error::Fatal<u64>),
}

/// Why the group's members were not changed.
#[derive(Debug, thiserror::Error)]
#[error("change the group's members")]
pub struct ChangeError(#[source] RaftError<u64, openraft::error::ClientWriteError<u64, Peer>>);

impl Group {
    /// Starts the engine on `store`. The founding node forms a group of one if there is none; others wait to be called.
    pub async fn start(store: Store, own: Own, peers: Peers, snapshot_after: u64) -> Result<Self, StartError> {
        let machine = Machine::load(store.clone()).await.map_err(StartError::Read)?;
        let (views, digests) = (machine.views(), machine.digests());
        let config = RaftConfig {
            cluster_name: "isthmus".to_owned(),
            // Also the time that a follower has to flush what it is sent.
            heartbeat_interval: 300,
            election_timeout_min: 1_000,
            election_timeout_max: 2_000,
            install_snapshot_timeout: 30_000,
            snapshot_max_chunk_size: 1 << 20,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshot_after),
            max_in_snapshot_log_to_keep: snapshot_after,
            replication_lag_threshold: snapshot_after.saturating_mul(2),
            ..RaftConfig::default()
        };
        let config = Arc::new(config.validate().map_err(StartError::Config)?);
        let mut log = LogStore::new(store);
        let resumed = resumed(&mut log, own.id).await.map_err(StartError::Read)?;
        let raft = Raft::new(own.id, config, peers.clone(), log, machine).await.map_err(StartError::Engine)?;
        if own.founds && !raft.is_initialized().await.map_err(StartError::Engine)? {
            raft.initialize(BTreeMap::from([(own.id, own.peer)])).await.map_err(StartError::Form)?;
        }
        // Of the engine itself: its metrics follow a little later.
        let id = own.id;
        let alone = raft.with_raft_state(move |state| state.membership_state.effective().voter_ids().eq([id]));
        let began_alone = alone.await.map_err(StartError::Engine)?;
        let group = Self { raft, peers, views, began_alone, digests, resumed };
        if began_alone {
            let settled = |m: &EngineMetrics| {
                m.current_leader == Some(own.id) && m.last_applied.map(|id| id.index) >= m.last_log_index
            };
            let wait = group.raft.wait(Some(ELECTION_DEADLINE));
            wait.metrics(settled, "lead, with everything applied").await.map_err(StartError::NoLeader)?;
        }
        Ok(group)
    }

    /// Of this node's state at some places of the log.
    pub fn digests(&self) -> Digests {
        self.digests.clone()
    }

    /// Whether no other node was needed for anything when it started.
    pub fn began_alone(&self) -> bool {
        self.began_alone
    }

    /// Where the other nodes look for this one, by the log that it holds.
    pub fn own_address(&self) -> Option<String> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let mut nodes = metrics.membership_config.nodes();
        nodes.find(|(id, _)| **id == metrics.id).map(|(_, peer)| peer.address.clone())
    }

    /// Waits until a read here sees all that was acknowledged before, by whichever node.
    pub async fn barrier(&self) -> Result<(), ReadError> {
        let deadline = Instant::now() + READ_DEADLINE;
        let mut why = "it did not answer".to_owned();
        loop {
            match timeout_at(deadline, self.try_barrier()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(Barrier::Stopped(fatal))) => return Err(ReadError::Stopped(fatal)),
                Ok(Err(Barrier::TryAgain(reason))) => why = reason,
                Err(_) => return Err(ReadError::NoLeader { why }),
            }
            sleep(RETRY).await;
        }
    }

    async fn try_barrier(&self) -> Result<(), Barrier> {
        let index = match self.read_index().await {
            Ok(index) => index,
            Err(NoIndex::Elsewhere(Some(leader))) => {
                self.peers.read_index(&leader).await.map_err(|error| Barrier::TryAgain(error.to_string()))?
            }
            Err(NoIndex::Elsewhere(None)) => return Err(Barrier::TryAgain("nobody leads".to_owned())),
            Err(NoIndex::NoQuorum(why)) => return Err(Barrier::TryAgain(why)),
            Err(NoIndex::Stopped(fatal)) => return Err(Barrier::Stopped(fatal)),
        };
        self.applied(index).await;
        Ok(())
    }

    /// Where the log stands for a read, if this node leads, as a majority of the voters has just confirmed.
    pub(super) async fn read_index(&self) -> Result<u64, NoIndex> {
        use openraft::error::CheckIsLeaderError;

        // Before the question: the metrics come late, never early.
        let vote = self.raft.metrics().borrow().vote;
        let at_least = self.resumed.filter(|resumed| vote <= resumed.vote).map_or(0, |resumed| resumed.last);
        match self.raft.get_read_log_id().await {
            Ok((read, _)) => Ok(read.map_or(0, |id| id.index).max(at_least)),
            Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(to))) => {
                Err(NoIndex::Elsewhere(to.leader_node))
            }
            Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(error))) => {
                Err(NoIndex::NoQuorum(error.to_string()))
            }
            Err(RaftError::Fatal(fatal)) => Err(NoIndex::Stopped(fatal)),
        }
    }

    /// Waits until this node has applied the log up to and with `index`. For ever, if it does not come.
    async fn applied(&self, index: u64) {
        let mut metrics = self.raft.metrics();
        // It ends only with the process.
        drop(metrics.wait_for(|m| m.last_applied.is_some_and(|id| id.index >= index) || index == 0).await);
    }

    /// Makes the group's members those of `wanted`, one step at a time: whoever is new learns before it votes. For the
    /// leader; whether there is more to do.
    pub(crate) async fn follow(&self, wanted: &BTreeMap<u64, Peer>) -> Result<bool, ChangeError> {
        let step = next_step(&self.raft.metrics().borrow(), wanted);
        let Some(step) = step else { return Ok(false) };
        tracing::info!(?step, "the group's members change");
        match step {
            Step::Learn(id, peer) => drop(self.raft.add_learner(id, peer, false).await.map_err(ChangeError)?),
            Step::Vote(ids) => {
                drop(self.raft.change_membership(ChangeMembers::AddVoterIds(ids), true).await.map_err(ChangeError)?);
            }
            Step::Move(nodes) => {
                drop(self.raft.change_membership(ChangeMembers::SetNodes(nodes), true).await.map_err(ChangeError)?);
            }
            Step::Leave(ids) => {
                drop(self.raft.change_membership(ChangeMembers::RemoveVoters(ids), false).await.map_err(ChangeError)?);
            }
            Step::Forget(ids) => {
                drop(self.raft.change_membership(ChangeMembers::RemoveNodes(ids), false).await.map_err(ChangeError)?);
            }
        }
        Ok(true)
    }

    /// The replicated state as it changes.
    pub fn views(&self) -> watch::Receiver<View> {
        self.views.clone()
    }

    /// A way to change it, which ends when its clones do.
    pub fn proposer(&self, tasks: &Tasks, by: Actor) -> Proposer {
        Proposer::new(self.clone(), tasks, by)
    }

    /// The engine's condition as it changes.
    pub fn metrics(&self) -> watch::Receiver<EngineMetrics> {
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

async fn resumed(log: &mut LogStore, own: u64) -> Result<Option<Resumed>, openraft::StorageError<u64>> {
    let vote = log.read_vote().await?.filter(|vote| vote.is_committed() && vote.leader_id().node_id == own);
    let last = log.get_log_state().await?.last_log_id.map_or(0, |last| last.index);
    Ok(vote.map(|vote| Resumed { vote, last }))
}

enum Barrier {
    TryAgain(String),
    Stopped(openraft::error::Fatal<u64>),
}

/// Why this node has no read index to give.
pub(super) enum NoIndex {
    /// Another node leads, if one is known.
    Elsewhere(Option<Peer>),
    NoQuorum(String),
    Stopped(openraft::error::Fatal<u64>),
}

/// One change of the group's members.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// A new node gets the log.
    Learn(u64, Peer),
    /// Learners that have it get a vote.
    Vote(BTreeSet<u64>),
    /// Nodes are dialled elsewhere.
    Move(BTreeMap<u64, Peer>),
    /// Voters leave.
    Leave(BTreeSet<u64>),
    /// Learners leave.
    Forget(BTreeSet<u64>),
}

/// What brings the members nearer to `wanted`; nothing if they are those, or while a learner is still behind.
fn next_step(metrics: &EngineMetrics, wanted: &BTreeMap<u64, Peer>) -> Option<Step> {
    let membership = &metrics.membership_config;
    let present: BTreeMap<u64, Peer> = membership.nodes().map(|(id, peer)| (*id, peer.clone())).collect();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    if let Some((id, peer)) = wanted.iter().find(|(id, _)| !present.contains_key(id)) {
        return Some(Step::Learn(*id, peer.clone()));
    }
    let moved: BTreeMap<u64, Peer> = wanted
        .iter()
        .filter(|(id, peer)| present.get(id).is_some_and(|held| held != *peer))
        .map(|(id, peer)| (*id, peer.clone()))
        .collect();
    if !moved.is_empty() {
        return Some(Step::Move(moved));
    }
    let last = metrics.last_log_index.unwrap_or_default();
    let replicated = |id: &u64| metrics.replication.as_ref()?.get(id).copied().flatten().map(|at| at.index);
    let caught_up: BTreeSet<u64> = wanted
        .keys()
        .filter(|id| !voters.contains(id) && replicated(id).is_some_and(|at| at + CAUGHT_UP >= last))
        .copied()
        .collect();
    if !caught_up.is_empty() {
        return Some(Step::Vote(caught_up));
    }
    let gone = |ids: &mut dyn Iterator<Item = u64>| ids.filter(|id| !wanted.contains_key(id)).collect::<BTreeSet<_>>();
    let leaving = gone(&mut voters.iter().copied());
    if !leaving.is_empty() {
        return Some(Step::Leave(leaving));
    }
    let forgotten = gone(&mut present.keys().copied());
    (!forgotten.is_empty()).then_some(Step::Forget(forgotten))
}
