//! How this node joins a control plane that runs: once, with a one-time token, before it has a state.

use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

use isthmus_api::{
    convert::ConvertError,
    proto::peers::v1::{NodeJoinRequest, peers_client::PeersClient},
};
use isthmus_identity::{
    grpc::{connect_lazy, words},
    tls::{PeerPolicy, TlsError, pinned_client_config},
    token::{Token, TokenError, TokenKind},
};
use isthmus_model::{ids::NodeName, service::TrustBundle};
use isthmus_runtime::backoff::Backoff;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

use crate::authority::{Authority, AuthorityError, node_of};

const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// For the control plane to come within reach.
const JOIN_DEADLINE: Duration = Duration::from_secs(120);

/// Why this node is not one of the group's.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token's file.
    #[error("read the token of `joinTokenFile` from {}; mint one: isthmusctl cp add {node}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// For whom.
        node: NodeName,
        /// Why.
        source: io::Error,
    },
    /// What is in it.
    #[error("use the token in {}", .path.display())]
    Token {
        /// Which.
        path: PathBuf,
        /// Why.
        source: TokenError,
    },
    /// A token for another one.
    #[error("the token is for {found}, this node is {own}; mint one for it: isthmusctl cp add {own}")]
    OtherNode {
        /// The token's subject.
        found: String,
        /// This node's name.
        own: NodeName,
    },
    /// TLS.
    #[error("prepare TLS")]
    Tls(#[from] TlsError),
    /// The control plane said no.
    #[error("the control plane at {address} refused this node: {why}")]
    Refused {
        /// Where.
        address: String,
        /// In its words.
        why: String,
    },
    /// It cannot be reached.
    #[error("the control plane at {address} could not be reached within {} s: {why}", JOIN_DEADLINE.as_secs())]
    Unreachable {
        /// Where.
        address: String,
        /// What happened last.
        why: String,
    },
    /// Its answer makes no sense.
    #[error("the control plane's answer is not usable")]
    Answer(#[from] ConvertError),
    /// The federation is another one.
    #[error("that control plane is of federation {found}, this node's configuration says {own}")]
    OtherFederation {
        /// Its.
        found: String,
        /// Ours.
        own: String,
    },
    /// The bundle cannot be taken into use.
    #[error("take the federation's bundle into use")]
    Adopt(#[from] AuthorityError),
}

/// Joins as `node`, dialled at `address`; this node's number in the group.
pub(crate) async fn join(
    authority: &Authority,
    node: &NodeName,
    address: &str,
    token_file: PathBuf,
) -> Result<u64, JoinError> {
    let token = read(&token_file, node)?;
    let federation = authority.federation().clone();
    let policy: PeerPolicy = Arc::new(move |id| node_of(id, &federation).is_some());
    let (tls, _root) = pinned_client_config(token.ca_pin, policy)?;
    let mut client = PeersClient::new(connect_lazy(&token.address, Arc::new(tls)));
    let request = NodeJoinRequest {
        secret: token.secret.clone(),
        name: node.to_string(),
        address: address.to_owned(),
        root: authority.root_der().to_vec(),
        supports: crate::state::SUPPORTED,
    };
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut why = String::new();
    let ask = async {
        loop {
            match timeout(CALL_DEADLINE, client.join(request.clone())).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if !is_transient(&status) => return Err(status),
                Ok(Err(status)) => why = words(&status),
                Err(_) => "no answer in time".clone_into(&mut why),
            }
            tracing::warn!(control_plane = %token.address, %why, "cannot join yet; trying again");
            sleep(backoff.next()).await;
        }
    };
    let answer = match timeout(JOIN_DEADLINE, ask).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(status)) => {
            return Err(JoinError::Refused { address: token.address.clone(), why: status.message().to_owned() });
        }
        Err(_) => return Err(JoinError::Unreachable { address: token.address.clone(), why }),
    };
    if answer.federation != authority.federation().as_str() {
        let own = authority.federation().to_string();
        return Err(JoinError::OtherFederation { found: answer.federation, own });
    }
    let missing = || ConvertError::new("federation_bundle", "is missing");
    let bundle = TrustBundle::try_from(answer.federation_bundle.ok_or_else(missing)?)?;
    authority.adopt(&bundle)?;
    Ok(answer.id)
}

fn read(path: &PathBuf, node: &NodeName) -> Result<Token, JoinError> {
    let text = fs::read_to_string(path).map_err(|source| JoinError::File {
        path: path.clone(),
        node: node.clone(),
        source,
    })?;
    let token = Token::parse(&text)
        .and_then(|token| token.require(TokenKind::Node))
        .map_err(|source| JoinError::Token { path: path.clone(), source })?;
    if token.subject != format!("cp/{node}") {
        return Err(JoinError::OtherNode { found: token.subject, own: node.clone() });
    }
    Ok(token)
}

fn is_transient(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Unknown)
}
