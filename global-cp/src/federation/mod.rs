//! The federation API, which agents dial: join with a token, have certificates signed, and the one long-lived session.
//!
//! Who may do what: `Join` anyone with a valid token; `Sign` and `Session` the agent of an active cluster, known by its
//! certificate, never by what a message says. Nothing from an unauthenticated caller reaches the log before its token
//! was checked. What is wrong is told in words that say what to do.

pub(crate) mod clock;
mod encoded;
mod join;
mod refusal;
mod session;

use std::{sync::Arc, time::Duration};

use futures_util::stream::BoxStream;
use isthmus_api::proto::federation::v1::{
    AgentMessage, ControlMessage, JoinRequest, JoinResponse, SignRequest, SignResponse,
    federation_server::{Federation, FederationServer},
};
use isthmus_identity::{
    grpc::{PeerInfo, TlsIncoming},
    tls::{ClientAuth, PeerPolicy, TlsError, server_config},
};
use isthmus_model::{
    global::GlobalSnapshot,
    ids::{ClusterName, SpiffeId},
};
use isthmus_runtime::tasks::{Shutdown, Tasks};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

pub(crate) use self::{
    encoded::Encoded,
    refusal::{status_of, status_of_proposal},
};
use crate::{
    authority::{Authority, agent_of, node_of},
    config::Publications,
    limits::{Buckets, Rate},
    metrics::Metrics,
    nodes::Nodes,
    raft::{Group, Proposer},
    state::{Actor, View, require_active},
    status::StatusStore,
};

/// Largest message that is decoded.
const MAX_MESSAGE: usize = 16 << 20;
/// Joins under way at one time; each costs two signature checks and two flushes.
const MAX_JOINS: usize = 16;
/// A peer that does not answer a ping for this long, after this long of silence, is gone.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// For a call's request to arrive and be answered; a session's first answer counts.
const CALL_DEADLINE: Duration = Duration::from_secs(15);
/// Calls, the session included, under way on one connection.
const MAX_CALLS: u32 = 32;

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct FederationService {
    shared: Arc<Shared>,
}

/// What all calls share.
pub(crate) struct Shared {
    pub(crate) authority: Authority,
    pub(crate) proposer: Proposer,
    pub(crate) views: watch::Receiver<View>,
    pub(crate) status: StatusStore,
    pub(crate) metrics: Metrics,
    pub(crate) shutdown: Shutdown,
    pub(crate) joins: Semaphore,
    pub(crate) group: Group,
    encoded: Encoded,
    /// How often each cluster may change what it says of itself.
    publications: Buckets<ClusterName>,
}

impl FederationService {
    pub(crate) fn new(
        authority: Authority,
        (proposer, group): (Proposer, Group),
        status: StatusStore,
        metrics: Metrics,
        shutdown: Shutdown,
        publications: Publications,
    ) -> Self {
        let rate = Rate { per_second: f64::from(publications.per_second), burst: f64::from(publications.burst) };
        let publications = Buckets::new(rate, isthmus_api::convert::limits::CLUSTERS);
        let (joins, views, encoded) = (Semaphore::new(MAX_JOINS), group.views(), Encoded::default());
        let shared =
            Shared { authority, proposer, views, status, metrics, shutdown, joins, group, encoded, publications };
        Self { shared: Arc::new(shared) }
    }

    /// Serves on `listener` until shutdown, and other nodes beside the agents.
    pub(crate) fn serve(
        self,
        nodes: Nodes,
        listener: TcpListener,
        tasks: &Tasks,
        registry: &mut isthmus_runtime::health::Registry,
    ) -> Result<(), TlsError> {
        let authority = &self.shared.authority;
        let federation = authority.federation().clone();
        let callers: PeerPolicy =
            Arc::new(move |id: &SpiffeId| agent_of(id, &federation).is_some() || node_of(id, &federation).is_some());
        let tls = server_config(authority.source(), authority.trust(), ClientAuth::Optional(callers), &[b"h2"])?;
        let incoming = TlsIncoming::new(listener, Arc::new(tls));
        incoming.handshakes().register(registry, "federation");
        let shutdown = self.shared.shutdown.clone();
        let service = FederationServer::new(self).max_decoding_message_size(MAX_MESSAGE);
        tasks.critical("federation-api", async move {
            Server::builder()
                .http2_keepalive_interval(Some(KEEPALIVE))
                .http2_keepalive_timeout(Some(KEEPALIVE))
                .max_concurrent_streams(MAX_CALLS)
                .timeout(CALL_DEADLINE)
                .add_service(service)
                .add_service(nodes.server())
                .serve_with_incoming_shutdown(incoming, async move { shutdown.requested().await })
                .await?;
            Ok(())
        });
        Ok(())
    }
}

impl Shared {
    /// What members see now.
    fn global(&self) -> Result<Arc<GlobalSnapshot>, Status> {
        let global = self.views.borrow().global().cloned();
        global.ok_or_else(|| Status::unavailable("the federation is not founded yet; try again"))
    }

    /// The active cluster whose agent is calling.
    fn caller<T>(&self, request: &Request<T>) -> Result<ClusterName, Status> {
        let peer = request.extensions().get::<PeerInfo>();
        let id = peer.and_then(|peer| peer.id.as_ref()).ok_or_else(|| {
            Status::unauthenticated("this call needs the certificate of a cluster's agent; join the cluster first")
        })?;
        let cluster = agent_of(id, self.authority.federation())
            .ok_or_else(|| Status::permission_denied(format!("{id} is not the agent of a cluster")))?;
        require_active(&*self.global()?, &cluster).map_err(|rejection| status_of(&rejection))?;
        Ok(cluster)
    }
}

#[tonic::async_trait]
impl Federation for FederationService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let remote = request.extensions().get::<PeerInfo>().map(|peer| peer.remote);
        self.shared.join(request.into_inner(), remote).await.map(Response::new)
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let cluster = self.shared.caller(&request)?;
        self.shared.sign(&cluster, &request.into_inner()).map(Response::new)
    }

    type SessionStream = BoxStream<'static, Result<ControlMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let cluster = self.shared.caller(&request)?;
        let by = request.extensions().get::<PeerInfo>().map(|peer| Actor {
            who: peer.id.as_ref().map(ToString::to_string).unwrap_or_default(),
            from: peer.remote.to_string(),
        });
        let caller = session::Caller { cluster, by: by.unwrap_or_default() };
        Ok(Response::new(session::open(self.shared.clone(), caller, request.into_inner())))
    }
}
