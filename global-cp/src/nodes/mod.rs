//! The control plane's own nodes: how one joins, what they ask of each other, who has a vote.
//!
//! A node comes with a one-time token and its own CA's root ([`newcomer`] there, [`admission`] here); the leader then makes
//! the group's members those that the state lists ([`membership`]). What nodes ask of each other ([`service`]) is served
//! where agents dial, to whoever shows the certificate of a node of the group. Keys never travel: each node signs with its
//! own CA, and the federation's bundle holds the roots of all.

mod admission;
pub(crate) mod agreement;
pub(crate) mod membership;
pub(crate) mod newcomer;
pub(crate) mod reports;
mod service;
pub(crate) mod status;

use std::sync::Arc;

pub use self::newcomer::JoinError;
use isthmus_api::proto::peers::v1::peers_server::PeersServer;
use tokio::sync::{Semaphore, watch};

use crate::{
    authority::Authority,
    raft::{Inbound, MAX_PEER_MESSAGE, Proposer},
    state::View,
    status::StatusStore,
};

/// Nodes that join at one time.
const MAX_JOINS: usize = 4;

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Nodes(Arc<Shared>);

struct Shared {
    authority: Authority,
    proposer: Proposer,
    views: watch::Receiver<View>,
    inbound: Inbound,
    status: StatusStore,
    joins: Semaphore,
}

impl Nodes {
    pub(crate) fn new(
        authority: Authority,
        (proposer, views): (Proposer, watch::Receiver<View>),
        inbound: Inbound,
        status: StatusStore,
    ) -> Self {
        let joins = Semaphore::new(MAX_JOINS);
        Self(Arc::new(Shared { authority, proposer, views, inbound, status, joins }))
    }

    /// To be served beside the federation API.
    pub(crate) fn server(self) -> PeersServer<Self> {
        PeersServer::new(self).max_decoding_message_size(MAX_PEER_MESSAGE).max_encoding_message_size(MAX_PEER_MESSAGE)
    }
}
