//! What agents report about their clusters, for people to look at. In memory only: never in Raft, never decided upon.
//!
//! Each cluster has one report, the latest, whoever of its agent's replicas sent it. It outlives the session, so that one
//! can see what was true last. Its size is bounded where it is read from the wire.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use isthmus_api::convert::{ConsumerKind, ConsumerStatus, Problem, Status};
use isthmus_model::{
    availability::Report,
    global::{ClusterState, GlobalSnapshot},
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

    /// The latest report of a cluster's agent, if it made one.
    pub fn report(&self, cluster: &ClusterName) -> Option<Arc<Status>> {
        self.lock().get(cluster).map(|entry| entry.report.clone())
    }

    /// Everything, in the shape of the admin API.
    pub fn view(&self, node: &str, global: &GlobalSnapshot) -> StatusView {
        let clusters = self.lock();
        let empty = Entry::default();
        let status = global.clusters.values().map(|info| {
            let entry = clusters.get(&info.name).unwrap_or(&empty);
            ClusterStatus {
                name: info.name.clone(),
                state: match info.state {
                    ClusterState::Active => "active",
                    ClusterState::Revoked => "revoked",
                },
                region: info.locality.region.to_string(),
                zone: info.locality.zone.to_string(),
                index: info.index.0,
                session: SessionStatus { connected: entry.sessions > 0, last_seen_ms: entry.last_seen },
                consumers: entry.report.consumers.iter().map(|c| consumer_view(c, global.stamp)).collect(),
                problems: entry.report.problems.clone(),
                availability: entry.report.availability.clone(),
                tunnels: entry.report.tunnels.clone(),
            }
        });
        StatusView {
            federation: global.federation.to_string(),
            stamp: global.stamp,
            node: node.to_owned(),
            clusters: status.collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ClusterName, Entry>> {
        // Each critical section leaves the map whole, so a poisoned one is as good as any.
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner)
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
