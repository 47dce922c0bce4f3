//! What `/metrics` says of the control plane beyond what every process says.

use isthmus_runtime::health::Registry;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

use crate::raft::EngineMetrics;

/// All of them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    revision: Gauge,
    epoch: Gauge,
    clusters: Gauge,
    services: Gauge,
    sessions: Gauge,
    publications: Family<ResultLabel, Counter>,
    joins: Family<ResultLabel, Counter>,
    certificates: Family<RoleLabel, Counter>,
    svid_expiry: Gauge,
    raft_term: Gauge,
    raft_last_log: Gauge,
    raft_last_applied: Gauge,
    raft_snapshot: Gauge,
    raft_leader: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabel {
    role: &'static str,
}

/// Counts a session for as long as it lives.
#[derive(Debug)]
pub struct SessionCount(Gauge);

impl Metrics {
    /// Makes and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let m = &metrics;
        let r = registry.sub_registry_with_prefix("isthmus_cp");
        r.register("revision", "Revision of the global state on this node", m.revision.clone());
        r.register("epoch", "Epoch of the global state on this node", m.epoch.clone());
        r.register("clusters", "Clusters known, revoked ones included", m.clusters.clone());
        r.register("services", "Global services", m.services.clone());
        r.register("sessions", "Agents' sessions open", m.sessions.clone());
        r.register("publications", "Publications received, by result", m.publications.clone());
        r.register("joins", "Join attempts, by result", m.joins.clone());
        r.register("certificates", "Certificates signed, by role", m.certificates.clone());
        r.register(
            "svid_expiry_timestamp_seconds",
            "When this node's own certificate ends, in Unix time",
            m.svid_expiry.clone(),
        );
        let r = r.sub_registry_with_prefix("raft");
        r.register("term", "Current term", m.raft_term.clone());
        r.register("last_log", "Index of the last log entry", m.raft_last_log.clone());
        r.register("last_applied", "Index of the last entry applied", m.raft_last_applied.clone());
        r.register("snapshot", "Index of the last entry in the snapshot", m.raft_snapshot.clone());
        r.register("leader", "1 if this node leads", m.raft_leader.clone());
        metrics
    }

    /// A session begins.
    pub fn session(&self) -> SessionCount {
        self.sessions.inc();
        SessionCount(self.sessions.clone())
    }

    /// A publication was answered: "committed", "unchanged", or the code of its refusal.
    pub fn publication(&self, result: &'static str) {
        self.publications.get_or_create(&ResultLabel { result }).inc();
    }

    /// A join was answered: "joined", or the code of its refusal.
    pub fn join(&self, result: &'static str) {
        self.joins.get_or_create(&ResultLabel { result }).inc();
    }

    /// A certificate was signed.
    pub fn certificate(&self, role: &'static str) {
        self.certificates.get_or_create(&RoleLabel { role }).inc();
    }

    /// This node has a new certificate.
    pub fn own_certificate(&self, not_after: isthmus_model::time::Timestamp) {
        self.svid_expiry.set(signed(not_after.0 / 1000));
    }

    /// The state moved on.
    pub fn state(&self, global: &isthmus_model::global::GlobalSnapshot) {
        self.revision.set(signed(global.stamp.revision.0));
        self.epoch.set(signed(global.stamp.epoch.0));
        self.clusters.set(signed(global.clusters.len()));
        self.services.set(signed(global.services.len()));
    }

    /// The engine moved on.
    pub fn raft(&self, raft: &EngineMetrics) {
        self.raft_term.set(signed(raft.current_term));
        self.raft_last_log.set(signed(raft.last_log_index.unwrap_or(0)));
        self.raft_last_applied.set(signed(raft.last_applied.map_or(0, |id| id.index)));
        self.raft_snapshot.set(signed(raft.snapshot.map_or(0, |id| id.index)));
        self.raft_leader.set(i64::from(raft.current_leader == Some(raft.id)));
    }
}

impl Drop for SessionCount {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn signed(n: impl TryInto<i64>) -> i64 {
    n.try_into().unwrap_or(i64::MAX)
}
