//! The one way to change the replicated state: propose a command, wait until it is committed and applied.
//!
//! Proposals that come while others are being written go into one entry: a flush to disk costs the same for one as for
//! hundreds. Two entries are on their way at a time, so that one is flushed while the next is gathered.
//!
//! A node that does not lead hands its entries to the leader. While nobody leads, or the leader does not answer, it tries
//! again: the proposals' ids make sure that each takes effect once.

use std::{sync::Arc, time::Duration};

use isthmus_model::time::Timestamp;
use isthmus_runtime::tasks::Tasks;
use openraft::error::{ClientWriteError, Fatal, RaftError};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{Group, Peer, RETRY, network::PeerError};
use crate::state::{Actor, Answers, Batch, Command, Outcome, Proposal, ProposalId, Rejection, Response};

/// How long a command may take. A flush to a busy disk takes tens of milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// Weight of the proposals of one entry: what is small has 1, and so has each export that is published. An entry must not take
/// so long to send, flush and apply that heartbeats and those who wait suffer.
const GATHERED: usize = 512;
/// Entries on their way.
const IN_FLIGHT: usize = 2;
/// Proposals that wait; more must wait to wait.
const QUEUE: usize = 4 * GATHERED;

/// Proposes commands, in somebody's name. Cheap to clone.
#[derive(Clone)]
pub struct Proposer {
    queue: mpsc::Sender<Waiting>,
    by: Actor,
}

/// A proposal, and who waits for what becomes of it.
struct Waiting {
    proposal: Proposal,
    answer: oneshot::Sender<Result<Response, ProposeError>>,
}

/// What became of a command that was not accepted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// It was committed, and refused by the rules. Nothing changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// Nobody leads, or the leader cannot be reached; it may still happen.
    #[error("no leader of the control plane took the change within {} s: {why}; try again", DEADLINE.as_secs())]
    NoLeader {
        /// What was tried last.
        why: String,
    },
    /// The leader does not take changes from this node.
    #[error("the leader of the control plane refused to take the change: {why}")]
    Refused {
        /// In its words.
        why: String,
    },
    /// Not decided in time; it may still be.
    #[error("the control plane did not commit the change within {} s; it may still happen", DEADLINE.as_secs())]
    Deadline,
    /// The engine has stopped; the process is about to.
    #[error("the control plane is stopping because of an internal error; see its log")]
    Stopped(#[source] Fatal<u64>),
    /// The engine answered with something that a command cannot cause.
    #[error("the control plane gave no answer to the change; see its log")]
    NoAnswer,
}

impl Proposer {
    /// Its task ends with the last clone.
    pub(super) fn new(group: Group, tasks: &Tasks, by: Actor) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let to_write = tasks.clone();
        tasks.spawn("raft.gather", gather(group, waiting, to_write));
        Self { queue, by }
    }

    /// The same for somebody else.
    pub fn by(&self, by: Actor) -> Self {
        Self { queue: self.queue.clone(), by }
    }

    /// Commits and applies `command`. On `Ok` it is on disk, and every later view contains it.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        self.propose_once(ProposalId(rand::random()), command).await
    }

    /// The same for a command that may be proposed again: with the same `id` it takes effect once, and the later answer is
    /// that of the first.
    pub async fn propose_once(&self, id: ProposalId, command: Command) -> Result<Outcome, ProposeError> {
        let (answer, answered) = oneshot::channel();
        let proposal = Proposal { id, by: self.by.clone(), at: Timestamp(isthmus_runtime::now()), command };
        let propose = async {
            let waiting = Waiting { proposal, answer };
            self.queue.send(waiting).await.map_err(|_| ProposeError::Stopped(Fatal::Stopped))?;
            answered.await.map_err(|_| ProposeError::Stopped(Fatal::Stopped))?
        };
        match timeout(DEADLINE, propose).await.map_err(|_| ProposeError::Deadline)?? {
            Response::Accepted(outcome) => Ok(outcome),
            Response::Rejected(rejection) => Err(rejection.into()),
            Response::NoCommand => Err(ProposeError::NoAnswer),
        }
    }
}

async fn gather(group: Group, mut waiting: mpsc::Receiver<Waiting>, tasks: Tasks) {
    let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut gathered = Vec::with_capacity(GATHERED);
    loop {
        // First the room, so that what comes meanwhile is gathered.
        let Ok(room) = in_flight.clone().acquire_owned().await else { return };
        let Some(first) = waiting.recv().await else { return };
        let mut weight = weight(&first.proposal.command);
        gathered.push(first);
        while weight < GATHERED
            && let Ok(next) = waiting.try_recv()
        {
            weight = weight.saturating_add(self::weight(&next.proposal.command));
            gathered.push(next);
        }
        let (proposals, answers): (Vec<_>, Vec<_>) = gathered.drain(..).map(|w| (w.proposal, w.answer)).unzip();
        let group = group.clone();
        tasks.spawn("raft.write", async move {
            let written = group.commit(Batch(Arc::new(proposals))).await;
            drop(room);
            match written {
                Ok(Answers(responses)) => {
                    let mut responses = responses.into_iter();
                    for answer in answers {
                        // Whoever does not wait any more has been told so.
                        drop(answer.send(responses.next().ok_or(ProposeError::NoAnswer)));
                    }
                }
                Err(error) => answers.into_iter().for_each(|answer| drop(answer.send(Err(error.clone())))),
            }
        });
    }
}

/// What of an entry a proposal takes.
fn weight(command: &Command) -> usize {
    match command {
        Command::Publish(publish) => 1 + publish.publication.exports.len(),
        Command::Restore(_) => GATHERED,
        _ => 1,
    }
}

impl Group {
    /// Commits `batch`, here or at the leader. What was answered is applied here.
    async fn commit(&self, batch: Batch) -> Result<Answers, ProposeError> {
        let deadline = Instant::now() + DEADLINE;
        let mut why = "nobody leads".to_owned();
        loop {
            let leader = match self.other_leader() {
                // The engine would only say the same.
                Some(leader) => Some(leader),
                None => match timeout_at(deadline, self.commit_here(batch.clone())).await {
                    Ok(Ok((answers, _))) => return Ok(answers),
                    Ok(Err(NotHere::Elsewhere(leader))) => leader,
                    Ok(Err(NotHere::Failed(error))) => return Err(error),
                    Err(_) => return Err(ProposeError::Deadline),
                },
            };
            // Without a word of a leader this node may have moved, so that nobody finds it: another one knows who leads.
            let hand_on = leader.is_none();
            let ask = leader.map_or_else(|| self.others(), |leader| vec![leader]);
            for peer in ask {
                match timeout_at(deadline, self.peers.propose(&peer, &batch, hand_on)).await {
                    Ok(Ok((answers, index))) => {
                        let applied = timeout_at(deadline, self.applied(index)).await;
                        return applied.map(|()| answers).map_err(|_| ProposeError::Deadline);
                    }
                    Ok(Err(PeerError::TryAgain(reason))) => why = format!("{}: {reason}", peer.name),
                    Ok(Err(PeerError::Refused(why))) => return Err(ProposeError::Refused { why }),
                    Err(_) => return Err(ProposeError::Deadline),
                }
            }
            if Instant::now() + RETRY >= deadline {
                return Err(ProposeError::NoLeader { why });
            }
            sleep(RETRY).await;
        }
    }

    /// Hands `batch`, which another node has asked for, on to the leader.
    pub(super) async fn hand_on(&self, leader: Option<Peer>, batch: &Batch) -> Result<(Answers, u64), PeerError> {
        let leader = leader.ok_or_else(|| PeerError::TryAgain("nobody leads".to_owned()))?;
        self.peers.propose(&leader, batch, false).await
    }

    /// The node that leads, if it is known and another one than this.
    fn other_leader(&self) -> Option<Peer> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let leader = metrics.current_leader.filter(|leader| *leader != metrics.id && metrics.running_state.is_ok())?;
        metrics.membership_config.nodes().find(|(id, _)| **id == leader).map(|(_, peer)| peer.clone())
    }

    fn others(&self) -> Vec<Peer> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let others = metrics.membership_config.nodes().filter(|(id, _)| **id != metrics.id);
        others.map(|(_, peer)| peer.clone()).collect()
    }

    /// Commits `batch` if this node leads: the answers, and the log's index.
    pub(super) async fn commit_here(&self, batch: Batch) -> Result<(Answers, u64), NotHere> {
        match self.raft.client_write(batch).await {
            Ok(answer) => Ok((answer.data, answer.log_id.index)),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to))) => Err(NotHere::Elsewhere(to.leader_node)),
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(_))) => {
                Err(NotHere::Failed(ProposeError::NoAnswer))
            }
            Err(RaftError::Fatal(fatal)) => Err(NotHere::Failed(ProposeError::Stopped(fatal))),
        }
    }
}

/// Why an entry was not committed by this node.
pub(super) enum NotHere {
    /// Another node leads, if one is known.
    Elsewhere(Option<Peer>),
    Failed(ProposeError),
}
