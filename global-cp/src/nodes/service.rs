//! What nodes ask of each other. Everything but `Join` is for nodes of the group, known by their certificates.

use isthmus_api::proto::peers::v1::{
    NodeJoinRequest, NodeJoinResponse, ProposalAnswers, Proposals, RaftMessage, ReadIndexRequest, ReadIndexResponse,
    ReportsRequest, ReportsResponse, StateDigestsRequest, StateDigestsResponse, peers_server::Peers,
};
use isthmus_identity::grpc::PeerInfo;
use tonic::{Request, Response, Status};

use super::{Nodes, agreement, reports};
use crate::{authority::node_of, raft::InboundError};

impl Nodes {
    /// The message, if it comes from a node of the group.
    fn admit<T>(&self, request: Request<T>) -> Result<T, Status> {
        let id = request.extensions().get::<PeerInfo>().and_then(|peer| peer.id.as_ref());
        let id =
            id.ok_or_else(|| Status::unauthenticated("this call needs the certificate of a control plane node"))?;
        let node = node_of(id, self.0.authority.federation())
            .ok_or_else(|| Status::permission_denied(format!("{id} is no node of this control plane")))?;
        if !self.0.inbound.knows(node.as_str()) {
            return Err(Status::permission_denied(format!(
                "{node} is no node of this group, as far as this node knows; see isthmusctl cp status"
            )));
        }
        Ok(request.into_inner())
    }

    /// The same for a message to the engine.
    fn message(&self, request: Request<RaftMessage>) -> Result<Vec<u8>, Status> {
        let message = self.admit(request)?;
        self.0.inbound.check(message.format, message.target).map_err(|error| status(&error))?;
        Ok(message.body)
    }
}

fn answer(body: Result<Vec<u8>, InboundError>) -> Result<Response<RaftMessage>, Status> {
    let body = body.map_err(|error| status(&error))?;
    Ok(Response::new(RaftMessage { format: 1, target: 0, body }))
}

fn status(error: &InboundError) -> Status {
    let words = error.to_string();
    match error {
        InboundError::Misdirected { .. } => Status::failed_precondition(words),
        InboundError::Format(_) => Status::unimplemented(words),
        InboundError::Malformed(_) => Status::invalid_argument(words),
        InboundError::NotLeader | InboundError::Failed(_) => Status::unavailable(words),
    }
}

#[tonic::async_trait]
impl Peers for Nodes {
    async fn append_entries(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let body = self.message(request)?;
        answer(self.0.inbound.append_entries(&body).await)
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let body = self.message(request)?;
        answer(self.0.inbound.vote(&body).await)
    }

    async fn install_snapshot(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let body = self.message(request)?;
        answer(self.0.inbound.install_snapshot(&body).await)
    }

    async fn propose(&self, request: Request<Proposals>) -> Result<Response<ProposalAnswers>, Status> {
        let Proposals { proposals, hand_on } = self.admit(request)?;
        let committed = self.0.inbound.propose(&proposals, hand_on).await;
        let (answers, log_index) = committed.map_err(|error| status(&error))?;
        Ok(Response::new(ProposalAnswers { answers, log_index }))
    }

    async fn read_index(&self, request: Request<ReadIndexRequest>) -> Result<Response<ReadIndexResponse>, Status> {
        self.admit(request)?;
        let log_index = self.0.inbound.read_index().await.map_err(|error| status(&error))?;
        Ok(Response::new(ReadIndexResponse { log_index }))
    }

    async fn reports(&self, request: Request<ReportsRequest>) -> Result<Response<ReportsResponse>, Status> {
        self.admit(request)?;
        Ok(Response::new(reports::own(&self.0.status)))
    }

    async fn state_digests(
        &self,
        request: Request<StateDigestsRequest>,
    ) -> Result<Response<StateDigestsResponse>, Status> {
        self.admit(request)?;
        Ok(Response::new(agreement::own(&self.0.inbound.digests())))
    }

    async fn join(&self, request: Request<NodeJoinRequest>) -> Result<Response<NodeJoinResponse>, Status> {
        let remote = request.extensions().get::<PeerInfo>().map(|peer| peer.remote);
        self.join_node(request.into_inner(), remote).await.map(Response::new)
    }
}
