//! What agents report about their clusters, for people to look at. In memory only: never in Raft, never decided upon.
//!
//! Each cluster has one report, the latest, whoever of its agent's replicas sent it. It outlives the session, so that one
//! can see what was true last. Its size is bounded where it is read from the wire. An agent has its session with one node of
//! several: who asks for the status is told what all of them have heard ([`crate::nodes::reports`]).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use isthmus_api::convert::{ConsumerKind, ConsumerStatus, Problem, Status};
use isthmus_model::{
    availability::Report,
    global::GlobalSnapshot,
    ids::{ClusterName, Stamp},
    local::TunnelReport,
    time::Timestamp,
};
use serde::Serialize;

/// Agents' sessions of one cluster at one time.
pub const MAX_SESSIONS: usize = 8;

/// All clusters' reports. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct StatusStore {
    clusters: Arc<Mutex<BTreeMap<ClusterName, Entry>>>,
}

#[derive(Debug, Default)]
struct Entry {
    sessions: usize,
    last_seen: Timestamp,
    report: Arc<Status>,
}

/// A cluster as one node has heard of it, or as all have.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Its agent has a session.
    pub connected: bool,
    /// Its last message; zero: never.
    pub last_seen: Timestamp,
    /// The latest report.
    pub report: Arc<Status>,
}

/// One agent's session, for as long as it lives.
#[derive(Debug)]
pub struct SessionGuard {
    store: StatusStore,
    cluster: ClusterName,
}

/// The cluster has [`MAX_SESSIONS`] already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the cluster has {MAX_SESSIONS} sessions open already; close one of its agents, or wait until a dead one times out"
)]
pub struct TooManySessions;

/// `GET /v1/status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusView {
    /// The federation's trust domain.
    pub federation: String,
    /// Where the global state stands.
    pub stamp: Stamp,
    /// The node that answered.
    pub node: String,
    /// Nodes that could not be asked: what agents told them alone is missing here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unasked: Vec<String>,
    /// By name.
    pub clusters: Vec<ClusterStatus>,
}

/// One cluster of [`StatusView`].
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterStatus {
    name: ClusterName,
    state: &'static str,
    region: String,
    zone: String,
    index: u16,
    session: SessionStatus,
    consumers: Vec<ConsumerView>,
    problems: Vec<Problem>,
    availability: Vec<Report>,
    tunnels: Vec<TunnelReport>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct SessionStatus {
    connected: bool,
    /// Unix time in milliseconds of its last message; 0: never since this node started.
    last_seen_ms: Timestamp,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ConsumerView {
    kind: ConsumerKind,
    name: String,
    applied: Stamp,
    connected: bool,
    lag_revisions: u64,
    problems: Vec<String>,
}

impl StatusStore {
    /// A session begins.
    pub fn connect(&self, cluster: &ClusterName, now: Timestamp) -> Result<SessionGuard, TooManySessions> {
        let mut clusters = self.lock();
        let entry = clusters.entry(cluster.clone()).or_default();
        if entry.sessions >= MAX_SESSIONS {
            return Err(TooManySessions);
        }
        entry.sessions += 1;
        entry.last_seen = now;
        Ok(SessionGuard { store: self.clone(), cluster: cluster.clone() })
    }

    /// Sessions open now.
    pub fn sessions(&self) -> usize {
        self.lock().values().map(|entry| entry.sessions).sum()
    }

    /// What this node has heard.
    pub fn heard(&self) -> BTreeMap<ClusterName, Heard> {
        let heard = |entry: &Entry| Heard {
            connected: entry.sessions > 0,
            last_seen: entry.last_seen,
            report: entry.report.clone(),
        };
        self.lock().iter().map(|(cluster, entry)| (cluster.clone(), heard(entry))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ClusterName, Entry>> {
        // Each critical section leaves the map whole, so a poisoned one is as good as any.
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds what another node has heard: of each cluster what was heard last counts.
pub fn merge(all: &mut BTreeMap<ClusterName, Heard>, other: BTreeMap<ClusterName, Heard>) {
    for (cluster, heard) in other {
        let held = all.entry(cluster).or_default();
        if (heard.connected, heard.last_seen) > (held.connected, held.last_seen) {
            *held = heard;
        }
    }
}

/// Everything, in the shape of the admin API.
pub fn view(
    node: &str,
    global: &GlobalSnapshot,
    heard: &BTreeMap<ClusterName, Heard>,
    unasked: Vec<String>,
) -> StatusView {
    let never = Heard::default();
    let status = global.clusters.values().map(|info| {
        let heard = heard.get(&info.name).unwrap_or(&never);
        ClusterStatus {
            name: info.name.clone(),
            state: info.state.label(),
            region: info.locality.region.to_string(),
            zone: info.locality.zone.to_string(),
            index: info.index.0,
            session: SessionStatus { connected: heard.connected, last_seen_ms: heard.last_seen },
            consumers: heard.report.consumers.iter().map(|c| consumer_view(c, global.stamp)).collect(),
            problems: heard.report.problems.clone(),
            availability: heard.report.availability.clone(),
            tunnels: heard.report.tunnels.clone(),
        }
    });
    StatusView {
        federation: global.federation.to_string(),
        stamp: global.stamp,
        node: node.to_owned(),
        unasked,
        clusters: status.collect(),
    }
}

impl SessionGuard {
    /// Something was heard.
    pub fn seen(&self, now: Timestamp) {
        if let Some(entry) = self.store.lock().get_mut(&self.cluster) {
            entry.last_seen = now;
        }
    }

    /// Replaces the cluster's report.
    pub fn report(&self, report: Status) {
        if let Some(entry) = self.store.lock().get_mut(&self.cluster) {
            entry.report = Arc::new(report);
        }
    }
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        if let Some(entry) = self.store.lock().get_mut(&self.cluster) {
            entry.sessions = entry.sessions.saturating_sub(1);
        }
    }
}

fn consumer_view(consumer: &ConsumerStatus, current: Stamp) -> ConsumerView {
    let applied = consumer.applied.unwrap_or_default();
    let missing_from = if applied.epoch == current.epoch { applied.revision.0 } else { 0 };
    ConsumerView {
        kind: consumer.kind,
        name: consumer.name.clone(),
        applied,
        connected: consumer.connected,
        lag_revisions: current.revision.0.saturating_sub(missing_from),
        problems: consumer.problems.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ninth_session_is_refused_until_one_ends() {
        let store = StatusStore::default();
        let cluster: ClusterName = "us-east".parse().unwrap();
        let mut guards: Vec<_> = (0..MAX_SESSIONS).map(|_| store.connect(&cluster, Timestamp(1)).unwrap()).collect();
        assert_eq!(store.connect(&cluster, Timestamp(2)).unwrap_err(), TooManySessions);
        guards.pop();
        assert!(store.connect(&cluster, Timestamp(3)).is_ok());
        drop(guards);
        assert_eq!(store.sessions(), 0);
    }
}
