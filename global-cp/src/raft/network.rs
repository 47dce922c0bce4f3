//! The way to the other nodes: one channel to each, made when it is first needed and again after a loss, in mutual TLS.
//!
//! In: the engine's requests, proposals for the leader, reads that must see all. Out: the peer's answers. A channel serves
//! one node only: whoever answers at its address must show that node's certificate.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use isthmus_api::proto::peers::v1::{
    ProposalAnswers, Proposals, RaftMessage, ReadIndexRequest, peers_client::PeersClient,
};
use isthmus_identity::{
    bundle::TrustStore,
    grpc::connect_lazy,
    tls::{IdentitySource, PeerPolicy, TlsError, client_config},
};
use isthmus_model::ids::{IdError, SpiffeId, TrustDomain};
use openraft::{
    RaftNetwork, RaftNetworkFactory,
    error::{
        Infallible, InstallSnapshotError, NetworkError, PayloadTooLarge, RPCError, RaftError, RemoteError, Unreachable,
    },
    network::{Backoff, RPCOption},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
        VoteResponse,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tonic::{Code, Response, Status, transport::Channel};

use super::TypeConfig;
use crate::state::{Answers, Batch};

/// Of a message's body: JSON.
pub(crate) const FORMAT: u32 = 1;
/// Entries of this length together go in one request, and a single longer one. A request must be read, flushed and answered
/// within a heartbeat, by a busy node too, else it is sent again and nothing goes forward.
const MAX_ENTRIES: usize = 512 << 10;
/// What one node takes from another one.
pub(crate) const MAX_PEER_MESSAGE: usize = 512 << 20;
/// To a node that does not answer.
const RETRY: Duration = Duration::from_millis(100);

/// Where a node is dialled, and who must answer there.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Peer {
    /// Its name, the last segment of its SPIFFE ID.
    pub name: String,
    /// "host:port".
    pub address: String,
}

/// Channels to the other nodes. Clones share them.
#[derive(Clone)]
pub struct Peers(Arc<Inner>);

struct Inner {
    source: IdentitySource,
    trust: TrustStore,
    federation: TrustDomain,
    made: Mutex<BTreeMap<Peer, PeersClient<Channel>>>,
    #[cfg(test)]
    simulated: Option<super::simulated::Link>,
}

/// A way to one node.
#[derive(Clone)]
enum Way {
    Grpc(PeersClient<Channel>),
    #[cfg(test)]
    Simulated(super::simulated::Link, Peer),
}

/// Sends a request by either way.
macro_rules! ask {
    ($way:expr, $call:ident, $request:expr) => {
        match $way {
            Way::Grpc(client) => client.$call($request).await,
            #[cfg(test)]
            Way::Simulated(link, to) => link.$call(to, $request).await,
        }
    };
}

/// The engine's way to one node.
pub struct Connection {
    target: u64,
    way: Result<Way, NoChannel>,
}

/// Why there is no channel to a node.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NoChannel {
    /// TLS.
    #[error("prepare TLS towards another node")]
    Tls(#[source] Arc<TlsError>),
    /// A name that is none.
    #[error("name another node")]
    Name(#[from] IdError),
}

/// What a peer made of a request that it did not serve, or that never reached it.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    /// It may serve it later, or another node now.
    #[error("{0}")]
    TryAgain(String),
    /// It will not.
    #[error("{0}")]
    Refused(String),
}

impl Peers {
    /// For a node that shows `source`'s certificate and trusts `trust`.
    pub fn new(source: IdentitySource, trust: TrustStore, federation: TrustDomain) -> Self {
        let made = Mutex::default();
        Self(Arc::new(Inner {
            source,
            trust,
            federation,
            made,
            #[cfg(test)]
            simulated: None,
        }))
    }

    /// Over a network that tests have made.
    #[cfg(test)]
    pub(super) fn simulated(source: IdentitySource, federation: TrustDomain, link: super::simulated::Link) -> Self {
        let (trust, made) = (TrustStore::new(), Mutex::default());
        Self(Arc::new(Inner { source, trust, federation, made, simulated: Some(link) }))
    }

    fn way(&self, peer: &Peer) -> Result<Way, NoChannel> {
        #[cfg(test)]
        if let Some(link) = &self.0.simulated {
            return Ok(Way::Simulated(link.clone(), peer.clone()));
        }
        self.client(peer).map(Way::Grpc)
    }

    pub(crate) fn client(&self, peer: &Peer) -> Result<PeersClient<Channel>, NoChannel> {
        let mut made = self.0.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(peer) {
            return Ok(client.clone());
        }
        let wanted = SpiffeId::new(&self.0.federation, &["cp", &peer.name])?;
        let policy: PeerPolicy = Arc::new(move |id| *id == wanted);
        let tls = client_config(Some(&self.0.source), &self.0.trust, policy, &[b"h2"])
            .map_err(|error| NoChannel::Tls(Arc::new(error)))?;
        let client = PeersClient::new(connect_lazy(&peer.address, Arc::new(tls)))
            .max_decoding_message_size(MAX_PEER_MESSAGE)
            .max_encoding_message_size(MAX_PEER_MESSAGE);
        made.insert(peer.clone(), client.clone());
        Ok(client)
    }

    /// Has `peer` commit `batch`, or `hand_on` to who leads: the answers, and the log's index that they took effect at.
    pub(super) async fn propose(&self, peer: &Peer, batch: &Batch, hand_on: bool) -> Result<(Answers, u64), PeerError> {
        let mut way = self.way(peer).map_err(|error| PeerError::Refused(error.to_string()))?;
        let request = Proposals { proposals: json(batch), hand_on };
        let answer: ProposalAnswers = ask!(&mut way, propose, request).map_err(peer_error)?.into_inner();
        let answers = serde_json::from_slice(&answer.answers)
            .map_err(|error| PeerError::Refused(format!("the leader's answer is not readable: {error}")))?;
        Ok((answers, answer.log_index))
    }

    /// The index that must be applied here for a read that sees all that was acknowledged before.
    pub(super) async fn read_index(&self, leader: &Peer) -> Result<u64, PeerError> {
        let mut way = self.way(leader).map_err(|error| PeerError::Refused(error.to_string()))?;
        Ok(ask!(&mut way, read_index, ReadIndexRequest {}).map_err(peer_error)?.into_inner().log_index)
    }
}

fn peer_error(status: Status) -> PeerError {
    let words = isthmus_identity::grpc::words(&status);
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => PeerError::TryAgain(words),
        _ => PeerError::Refused(words),
    }
}

pub(super) fn json<T: Serialize>(value: &T) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "our types have string keys and no failing serializer")]
    serde_json::to_vec(value).expect("serialize to memory")
}

type Failure<E = Infallible> = RPCError<u64, Peer, RaftError<u64, E>>;

#[expect(clippy::result_large_err, reason = "openraft's type")]
impl Connection {
    fn begin<E: std::error::Error>(&self, body: Vec<u8>) -> Result<(Way, RaftMessage), Failure<E>> {
        let way = self.way.clone().map_err(|error| RPCError::Unreachable(Unreachable::new(&error)))?;
        Ok((way, RaftMessage { format: FORMAT, target: self.target, body }))
    }

    fn end<A, E>(&self, answer: Result<Response<RaftMessage>, Status>) -> Result<A, Failure<E>>
    where
        A: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        let answer = answer.map_err(|status| match peer_error(status) {
            error @ PeerError::TryAgain(_) => RPCError::Unreachable(Unreachable::new(&error)),
            error @ PeerError::Refused(_) => RPCError::Network(NetworkError::new(&error)),
        })?;
        let answer: Result<A, RaftError<u64, E>> = serde_json::from_slice(&answer.into_inner().body)
            .map_err(|error| RPCError::Network(NetworkError::new(&error)))?;
        answer.map_err(|error| RPCError::RemoteError(RemoteError::new(self.target, error)))
    }
}

impl RaftNetworkFactory<TypeConfig> for Peers {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, node: &Peer) -> Connection {
        Connection { target, way: self.way(node) }
    }
}

impl RaftNetwork<TypeConfig> for Connection {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failure> {
        let body = json(&request);
        if body.len() > MAX_ENTRIES && request.entries.len() > 1 {
            let fewer = u64::try_from(request.entries.len() / 2).unwrap_or(1);
            return Err(RPCError::PayloadTooLarge(PayloadTooLarge::new_entries_hint(fewer.max(1))));
        }
        let (mut way, message) = self.begin(body)?;
        self.end(ask!(&mut way, append_entries, message))
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failure<InstallSnapshotError>> {
        let (mut way, message) = self.begin(json(&request))?;
        self.end(ask!(&mut way, install_snapshot, message))
    }

    async fn vote(&mut self, request: VoteRequest<u64>, _option: RPCOption) -> Result<VoteResponse<u64>, Failure> {
        let (mut way, message) = self.begin(json(&request))?;
        self.end(ask!(&mut way, vote, message))
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}
