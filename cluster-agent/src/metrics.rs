//! What the agent measures of itself. Clones share the values.

use std::sync::atomic::AtomicI64;

use isthmus_model::{ids::Stamp, time::Timestamp};
use isthmus_runtime::health::Registry;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

/// The agent's own metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    epoch: Gauge,
    revision: Gauge,
    /// 1 while a session with the control plane is up.
    pub uplink_connected: Gauge,
    /// Services that this cluster exports.
    pub exports: Gauge,
    /// Things in manifests that need mending.
    pub manifest_problems: Gauge,
    publications: Family<OutcomeLabel, Counter>,
    expiry: Family<IdentityLabel, Gauge<i64, AtomicI64>>,
    enrolments: Family<OutcomeLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Ok,
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IdentityLabel {
    identity: &'static str,
}

impl Metrics {
    /// Makes and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let m = Self::default();
        registry.register("isthmus_agent_epoch", "Epoch of the applied state of the federation", m.epoch.clone());
        registry.register(
            "isthmus_agent_revision",
            "Revision of the applied state of the federation",
            m.revision.clone(),
        );
        registry.register(
            "isthmus_agent_uplink_connected",
            "1 while a session with the control plane is up",
            m.uplink_connected.clone(),
        );
        registry.register("isthmus_agent_exports", "Services that this cluster exports", m.exports.clone());
        registry.register(
            "isthmus_agent_manifest_problems",
            "Files and objects of the manifests folder that need mending",
            m.manifest_problems.clone(),
        );
        registry.register(
            "isthmus_agent_publications",
            "Publications that the control plane answered, by outcome",
            m.publications.clone(),
        );
        registry.register(
            "isthmus_agent_svid_expiry_seconds",
            "Unix time at which the certificate ends",
            m.expiry.clone(),
        );
        registry.register("isthmus_agent_enrolments", "Enrolments by token, by outcome", m.enrolments.clone());
        m
    }

    /// A state of the federation was applied.
    pub fn revision(&self, stamp: Stamp) {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.epoch.set(number(stamp.epoch.0));
        self.revision.set(number(stamp.revision.0));
    }

    /// The control plane answered a publication.
    pub fn published(&self, committed: bool) {
        self.publications.get_or_create(&OutcomeLabel::of(committed)).inc();
    }

    /// Somebody tried to enrol.
    pub fn enrolled(&self, admitted: bool) {
        self.enrolments.get_or_create(&OutcomeLabel::of(admitted)).inc();
    }

    /// When the agent's own certificate ends.
    pub fn expiry(&self, at: Timestamp) {
        let seconds = i64::try_from(at.0 / 1000).unwrap_or(i64::MAX);
        self.expiry.get_or_create(&IdentityLabel { identity: "agent" }).set(seconds);
    }
}

impl OutcomeLabel {
    fn of(ok: bool) -> Self {
        Self { outcome: if ok { Outcome::Ok } else { Outcome::Refused } }
    }
}
