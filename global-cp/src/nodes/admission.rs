//! Trades a node token for a place in the group: the newcomer's root goes into the federation's bundle, signed by this
//! node's CA. The token is used up only once that is committed; should the answer then get lost, the newcomer may ask again
//! with the same root.

use std::net::SocketAddr;

use isthmus_api::{
    convert::ConvertError,
    proto::peers::v1::{NodeJoinRequest, NodeJoinResponse},
};
use isthmus_identity::{tls::sha256, token::Token};
use isthmus_model::{
    ids::{IdError, NodeName},
    service::TrustBundle,
    time::Timestamp,
};
use isthmus_runtime::tasks::chain;
use tonic::Status;

use super::Nodes;
use crate::{
    authority::AuthorityError,
    config::is_host_port,
    federation::{status_of, status_of_proposal},
    raft::ProposeError,
    state::{Actor, AdmitNode, Command, KeyHash, Rejection, TokenHash},
};

/// Two nodes that join at once follow the same bundle; the second one tries again.
const ATTEMPTS: usize = 5;

impl Nodes {
    pub(super) async fn join_node(
        &self,
        request: NodeJoinRequest,
        remote: Option<SocketAddr>,
    ) -> Result<NodeJoinResponse, Status> {
        let busy = |_| Status::resource_exhausted("too many nodes join at once; try again");
        let _permit = self.0.joins.try_acquire().map_err(busy)?;
        let now = Timestamp(isthmus_runtime::now());
        let (node, hash, root) = parse(&request)?;
        // Also decided in `apply`; here so that strangers can neither fill the log nor have anything signed.
        let likely = self.0.views.borrow().state().check_node_token(&hash, root, &node, now);
        if let Err(rejection) = likely {
            tracing::warn!(%node, ?remote, reason = rejection.code(), "a node's join was refused");
            return Err(status_of(&rejection));
        }
        let by = Actor { who: "node token".to_owned(), from: remote.map(|at| at.to_string()).unwrap_or_default() };
        let proposer = self.0.proposer.by(by);
        for _ in 0..ATTEMPTS {
            let bundle = self.bundle_with(&request.root)?;
            let admit = AdmitNode {
                supports: request.supports.max(1),
                hash,
                root,
                node: node.clone(),
                address: request.address.clone(),
                bundle: bundle.clone(),
                now,
            };
            match proposer.propose(Command::AdmitNode(admit)).await {
                Ok(_) => return self.admitted(&node, &bundle, remote),
                Err(ProposeError::Rejected(Rejection::FederationBundle { .. })) => {}
                Err(error) => {
                    tracing::warn!(%node, ?remote, %error, "a node's join was refused");
                    return Err(status_of_proposal(&error));
                }
            }
        }
        Err(Status::unavailable("the federation's bundle changes too fast; try again"))
    }

    fn admitted(
        &self,
        node: &NodeName,
        bundle: &TrustBundle,
        remote: Option<SocketAddr>,
    ) -> Result<NodeJoinResponse, Status> {
        let id = self.0.views.borrow().state().nodes().get(node).map(|info| info.id);
        let id = id.ok_or_else(|| Status::aborted("the node was removed again at once"))?;
        tracing::info!(%node, id, ?remote, "a node joined the control plane");
        Ok(NodeJoinResponse {
            id,
            federation: self.0.authority.federation().to_string(),
            federation_bundle: Some(bundle.into()),
        })
    }

    /// The federation's bundle with one root more.
    fn bundle_with(&self, root: &[u8]) -> Result<TrustBundle, Status> {
        let global = self.0.views.borrow().global().cloned();
        let global = global.ok_or_else(|| Status::unavailable("the federation is not founded yet; try again"))?;
        self.0.authority.with_root(&global.federation_bundle, root).map_err(|error| match error {
            AuthorityError::Bundle(error) => Status::invalid_argument(format!("the node's root: {}", chain(&error))),
            other => {
                tracing::error!(error = %chain(&other), "cannot sign the federation's bundle");
                Status::internal("the federation's bundle could not be signed; see the control plane's log")
            }
        })
    }
}

fn parse(request: &NodeJoinRequest) -> Result<(NodeName, TokenHash, KeyHash), Status> {
    let name = |error: IdError| ConvertError::new("name", error.to_string());
    let node: NodeName = request.name.parse().map_err(name)?;
    if !is_host_port(&request.address) {
        let rule = format!("{:?} is not host:port", request.address.chars().take(100).collect::<String>());
        return Err(ConvertError::new("address", rule).into());
    }
    Ok((node, TokenHash(Token::secret_hash(&request.secret)), KeyHash(sha256(&request.root))))
}
