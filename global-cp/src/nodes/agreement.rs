//! Compares this node's state with the others', and stops it if it is the one that differs.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::future::join_all;
use isthmus_api::proto::peers::v1::{StateDigestsRequest, StateDigestsResponse};
use isthmus_runtime::tasks::Tasks;
use tokio::time::{sleep, timeout};

use crate::raft::{Digests, Group, Peer, Peers, StateDigest, Verdict, judge};

/// Between two comparisons.
const PAUSE: Duration = Duration::from_secs(5);
/// For another node to answer.
const DEADLINE: Duration = Duration::from_secs(2);
/// Digests that are read from one answer.
const MAX_DIGESTS: usize = 64;

/// This node holds something else than the others.
#[derive(Debug, thiserror::Error)]
#[error(
    "this node's state differs from the other nodes' after log entry {index}, so it stops: its disk, memory or program is \
     broken. Remove it (isthmusctl cp remove {node}) and add it anew with an empty stateDir"
)]
struct Differs {
    index: u64,
    node: String,
}

/// Stops the process when this node's state differs from most nodes'.
pub(crate) fn watch(tasks: &Tasks, group: Group, peers: Peers, node: String) {
    let shutdown = tasks.shutdown();
    tasks.critical("state-agreement", async move {
        let mut known: BTreeSet<String> = BTreeSet::new();
        loop {
            tokio::select! {
                () = shutdown.requested() => return Ok(()),
                () = sleep(PAUSE) => {}
            }
            let view = group.views().borrow().clone();
            let others = view.state().nodes().iter().filter(|(name, _)| name.as_str() != node).map(|(name, info)| async {
                let peer = Peer { name: name.to_string(), address: info.address.clone() };
                Some((name.to_string(), timeout(DEADLINE, ask(&peers, &peer)).await.ok().flatten()?))
            });
            let others: BTreeMap<_, _> = join_all(others).await.into_iter().flatten().collect();
            let leads = {
                let engine = group.metrics();
                let engine = engine.borrow();
                engine.current_leader == Some(engine.id)
            };
            match judge(&group.digests().all(), &others, leads) {
                Verdict::Own { index } => return Err(Differs { index, node }.into()),
                Verdict::Others(names) => {
                    for name in names.iter().filter(|name| !known.contains(*name)) {
                        tracing::error!(node = %name, "the state of another node differs from this one's and most; it should stop");
                    }
                    known.extend(names);
                }
                Verdict::Agrees => known.clear(),
                Verdict::Unknown => {}
            }
        }
    });
}

async fn ask(peers: &Peers, peer: &Peer) -> Option<BTreeMap<u64, StateDigest>> {
    let mut client = peers.client(peer).ok()?;
    let answer = client.state_digests(StateDigestsRequest {}).await.ok()?.into_inner();
    if answer.version != env!("CARGO_PKG_VERSION") {
        return None;
    }
    let read = |(index, digest): (u64, Vec<u8>)| Some((index, StateDigest::try_from(digest).ok()?));
    Some(answer.digests.into_iter().take(MAX_DIGESTS).filter_map(read).collect())
}

/// What this node holds, for another one.
pub(super) fn own(digests: &Digests) -> StateDigestsResponse {
    let digests = digests.all().into_iter().map(|(index, digest)| (index, digest.to_vec())).collect();
    StateDigestsResponse { version: env!("CARGO_PKG_VERSION").to_owned(), digests }
}
