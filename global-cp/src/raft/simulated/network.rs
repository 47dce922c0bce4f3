//! A network between nodes in one process: requests and answers take a while, and some are lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use isthmus_api::proto::peers::v1::{ProposalAnswers, Proposals, RaftMessage, ReadIndexRequest, ReadIndexResponse};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::time::sleep;
use tonic::{Response, Status};

use super::super::{Inbound, InboundError, Peer, network::FORMAT};

/// Of a connection whose packets are lost, until that is noticed.
const NOTICED: Duration = Duration::from_secs(5);

/// All nodes and what is between them. Clones share it.
#[derive(Clone)]
pub(super) struct Network(Arc<Mutex<Inner>>);

struct Inner {
    rng: StdRng,
    up: BTreeMap<String, Inbound>,
    /// From whom nothing comes to whom.
    cuts: BTreeSet<(String, String)>,
    slowest: u64,
}

/// One node's end of it.
#[derive(Clone)]
pub(in crate::raft) struct Link {
    network: Network,
    own: String,
}

impl Network {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let slowest = *[1, 20, 150].get(rng.random_range(0..3)).unwrap();
        Self(Arc::new(Mutex::new(Inner { rng, up: BTreeMap::new(), cuts: BTreeSet::new(), slowest })))
    }

    pub(super) fn link(&self, own: &str) -> Link {
        Link { network: self.clone(), own: own.to_owned() }
    }

    pub(super) fn starts(&self, node: &str, inbound: Inbound) {
        self.0.lock().unwrap().up.insert(node.to_owned(), inbound);
    }

    pub(super) fn ends(&self, node: &str) {
        self.0.lock().unwrap().up.remove(node);
    }

    /// These cuts, and no others.
    pub(super) fn cut(&self, cuts: BTreeSet<(String, String)>) {
        self.0.lock().unwrap().cuts = cuts;
    }

    async fn carry(&self, from: &str, to: &str) -> Result<(), Status> {
        let (takes, lost) = {
            let mut inner = self.0.lock().unwrap();
            let slowest = inner.slowest;
            let takes = inner.rng.random_range(0..=slowest);
            (Duration::from_millis(takes), inner.cuts.contains(&(from.to_owned(), to.to_owned())))
        };
        if lost {
            sleep(NOTICED).await;
            return Err(Status::unavailable("nothing came back"));
        }
        sleep(takes).await;
        Ok(())
    }

    fn node(&self, name: &str) -> Result<Inbound, Status> {
        let up = self.0.lock().unwrap().up.get(name).cloned();
        up.ok_or_else(|| Status::unavailable("nobody listens"))
    }
}

fn status(error: InboundError) -> Status {
    Status::unavailable(error.to_string())
}

impl Link {
    async fn there(&self, to: &Peer) -> Result<Inbound, Status> {
        self.network.carry(&self.own, &to.name).await?;
        self.network.node(&to.name)
    }

    async fn back<T>(&self, to: &Peer, answer: Result<T, InboundError>) -> Result<Response<T>, Status> {
        // It may have ended before it could answer.
        self.network.node(&to.name)?;
        self.network.carry(&to.name, &self.own).await?;
        answer.map(Response::new).map_err(status)
    }

    pub(in crate::raft) async fn append_entries(
        &self,
        to: &Peer,
        message: RaftMessage,
    ) -> Result<Response<RaftMessage>, Status> {
        let answer = self.there(to).await?.append_entries(&message.body).await;
        self.back(to, answer.map(reply)).await
    }

    pub(in crate::raft) async fn install_snapshot(
        &self,
        to: &Peer,
        message: RaftMessage,
    ) -> Result<Response<RaftMessage>, Status> {
        let answer = self.there(to).await?.install_snapshot(&message.body).await;
        self.back(to, answer.map(reply)).await
    }

    pub(in crate::raft) async fn vote(&self, to: &Peer, message: RaftMessage) -> Result<Response<RaftMessage>, Status> {
        let answer = self.there(to).await?.vote(&message.body).await;
        self.back(to, answer.map(reply)).await
    }

    /// Boxed, for the node that is asked may hand it on by the same way.
    pub(in crate::raft) fn propose<'a>(
        &'a self,
        to: &'a Peer,
        request: Proposals,
    ) -> BoxFuture<'a, Result<Response<ProposalAnswers>, Status>> {
        async move {
            let answer = self.there(to).await?.propose(&request.proposals, request.hand_on).await;
            let answer = answer.map(|(answers, log_index)| ProposalAnswers { answers, log_index });
            self.back(to, answer).await
        }
        .boxed()
    }

    pub(in crate::raft) async fn read_index(
        &self,
        to: &Peer,
        _request: ReadIndexRequest,
    ) -> Result<Response<ReadIndexResponse>, Status> {
        let answer = self.there(to).await?.read_index().await;
        self.back(to, answer.map(|log_index| ReadIndexResponse { log_index })).await
    }
}

fn reply(body: Vec<u8>) -> RaftMessage {
    RaftMessage { format: FORMAT, target: 0, body }
}
