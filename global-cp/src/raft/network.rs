//! The network of a group that has one voter: there is nobody to talk to. If the engine ever asks to send, that is an
//! error that says so, never a silent success.

use openraft::{
    BasicNode, RaftNetwork, RaftNetworkFactory,
    error::{InstallSnapshotError, NetworkError, RPCError, RaftError},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
        VoteResponse,
    },
};

use super::TypeConfig;

/// Makes clients that refuse to send.
#[derive(Clone, Copy, Debug)]
pub(super) struct NoPeers;

/// A client towards `target`, which does not exist.
#[derive(Clone, Copy, Debug)]
pub(super) struct NoPeer {
    target: u64,
}

/// The answer to any attempt.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("this control plane has one node; there is no node {target} to send {what} to")]
struct NotSent {
    target: u64,
    what: &'static str,
}

type Failure<E = openraft::error::Infallible> = RPCError<u64, BasicNode, RaftError<u64, E>>;

impl NoPeer {
    fn refuse<E: std::error::Error>(self, what: &'static str) -> Failure<E> {
        let error = NotSent { target: self.target, what };
        tracing::error!(%error, "the consensus engine asked to send");
        RPCError::Network(NetworkError::new(&error))
    }
}

impl RaftNetworkFactory<TypeConfig> for NoPeers {
    type Network = NoPeer;

    async fn new_client(&mut self, target: u64, _node: &BasicNode) -> NoPeer {
        NoPeer { target }
    }
}

impl RaftNetwork<TypeConfig> for NoPeer {
    async fn append_entries(
        &mut self,
        _request: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failure> {
        Err(self.refuse("log entries"))
    }

    async fn install_snapshot(
        &mut self,
        _request: InstallSnapshotRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failure<InstallSnapshotError>> {
        Err(self.refuse("a snapshot"))
    }

    async fn vote(&mut self, _request: VoteRequest<u64>, _option: RPCOption) -> Result<VoteResponse<u64>, Failure> {
        Err(self.refuse("a vote request"))
    }
}
