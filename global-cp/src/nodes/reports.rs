//! What agents' sessions have said, gathered from all nodes for whoever asks one of them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::join_all;
use isthmus_api::{
    convert::Status,
    proto::peers::v1::{ClusterReport, ReportsRequest, ReportsResponse},
};
use isthmus_model::{ids::ClusterName, time::Timestamp};
use tokio::time::timeout;

use crate::{
    raft::{Peer, Peers},
    state::State,
    status::{Heard, StatusStore, merge},
};

/// For another node to answer.
const DEADLINE: Duration = Duration::from_secs(2);

/// What all nodes have heard, and the names of those that did not answer.
pub(crate) async fn gather(
    own: &str,
    store: &StatusStore,
    peers: &Peers,
    state: &State,
) -> (BTreeMap<ClusterName, Heard>, Vec<String>) {
    let others = state.nodes().iter().filter(|(name, _)| name.as_str() != own).map(|(name, info)| async {
        let peer = Peer { name: name.to_string(), address: info.address.clone() };
        (name.to_string(), timeout(DEADLINE, ask(peers, &peer)).await.ok().flatten())
    });
    let mut heard = store.heard();
    let mut unasked = Vec::new();
    for (name, answer) in join_all(others).await {
        match answer {
            Some(reports) => merge(&mut heard, reports),
            None => unasked.push(name),
        }
    }
    (heard, unasked)
}

async fn ask(peers: &Peers, peer: &Peer) -> Option<BTreeMap<ClusterName, Heard>> {
    let mut client = peers.client(peer).ok()?;
    let response = client.reports(ReportsRequest {}).await.ok()?.into_inner();
    Some(response.clusters.into_iter().filter_map(read).collect())
}

fn read(report: ClusterReport) -> Option<(ClusterName, Heard)> {
    let cluster = report.cluster.parse().ok()?;
    let status = Status::try_from(report.status.unwrap_or_default()).ok()?;
    let heard =
        Heard { connected: report.connected, last_seen: Timestamp(report.last_seen_unix_ms), report: Arc::new(status) };
    Some((cluster, heard))
}

/// What this node has heard, for another one.
pub(super) fn own(store: &StatusStore) -> ReportsResponse {
    let report = |(cluster, heard): (ClusterName, Heard)| ClusterReport {
        cluster: cluster.to_string(),
        connected: heard.connected,
        last_seen_unix_ms: heard.last_seen.0,
        status: Some((&*heard.report).into()),
    };
    ReportsResponse { clusters: store.heard().into_iter().map(report).collect() }
}
