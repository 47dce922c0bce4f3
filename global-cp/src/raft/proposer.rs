//! The one way to change the replicated state: propose a command, wait until it is committed and applied.

use std::time::Duration;

use openraft::{
    Raft,
    error::{ClientWriteError, Fatal, RaftError},
};
use tokio::time::timeout;

use super::TypeConfig;
use crate::state::{Command, Outcome, Rejection, Response};

/// How long a command may take. A flush to a busy disk takes tens of milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);

/// Proposes commands. Cheap to clone.
#[derive(Clone)]
pub struct Proposer {
    raft: Raft<TypeConfig>,
}

/// What became of a command that was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ProposeError {
    /// It was committed, and refused by the rules. Nothing changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// This node does not lead. Nothing changed.
    #[error("this control plane node does not lead at the moment; try again")]
    NotLeader,
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
    pub(super) fn new(raft: Raft<TypeConfig>) -> Self {
        Self { raft }
    }

    /// Commits and applies `command`. On `Ok` it is on disk, and every later view contains it.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        let written = timeout(DEADLINE, self.raft.client_write(command)).await.map_err(|_| ProposeError::Deadline)?;
        match written {
            Ok(answer) => match answer.data {
                Response::Accepted(outcome) => Ok(outcome),
                Response::Rejected(rejection) => Err(rejection.into()),
                Response::NoCommand => Err(ProposeError::NoAnswer),
            },
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Err(ProposeError::NotLeader),
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(_))) => Err(ProposeError::NoAnswer),
            Err(RaftError::Fatal(fatal)) => Err(ProposeError::Stopped(fatal)),
        }
    }
}
