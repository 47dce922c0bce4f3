//! What the launcher counts.

use std::sync::atomic::{AtomicI64, AtomicU64};

use isthmus_identity::svid::Svid;
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

/// Clones share the numbers.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    pub(super) envoy_live: Gauge<i64, AtomicI64>,
    pub(super) envoy_starts: Counter<u64, AtomicU64>,
    pub(super) envoy_deaths: Counter<u64, AtomicU64>,
    pub(super) refusals: Counter<u64, AtomicU64>,
    pub(super) agent_connected: Gauge<i64, AtomicI64>,
    pub(super) app_ports_ready: Gauge<i64, AtomicI64>,
    pub(super) svid_expiry: Gauge<i64, AtomicI64>,
    pub(super) renewals: Counter<u64, AtomicU64>,
    pub(super) renewal_failures: Counter<u64, AtomicU64>,
    pub(super) trust_revision: Gauge<i64, AtomicI64>,
}

impl Metrics {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register("isthmus_sidecar_envoy_live", "1 while Envoy is live", self.envoy_live.clone());
        r.register("isthmus_sidecar_envoy_starts", "Starts of Envoy", self.envoy_starts.clone());
        r.register("isthmus_sidecar_envoy_deaths", "Ends of Envoy that nobody asked for", self.envoy_deaths.clone());
        r.register("isthmus_sidecar_nacks", "xDS responses that Envoy refused", self.refusals.clone());
        r.register("isthmus_sidecar_agent_connected", "1 while the agent's feed is up", self.agent_connected.clone());
        r.register("isthmus_sidecar_app_ports_ready", "Ports on which the app answers", self.app_ports_ready.clone());
        r.register("isthmus_sidecar_svid_expiry_timestamp_seconds", "End of the certificate", self.svid_expiry.clone());
        r.register("isthmus_sidecar_svid_renewals", "Renewed certificates", self.renewals.clone());
        r.register("isthmus_sidecar_svid_renewal_failures", "Failed renewals", self.renewal_failures.clone());
        r.register("isthmus_sidecar_trust_revision", "Revision of the trust set", self.trust_revision.clone());
    }

    /// The certificate in use.
    pub(super) fn svid_expires(&self, svid: &Svid) {
        self.svid_expiry.set(i64::try_from(svid.not_after().0 / 1000).unwrap_or(i64::MAX));
    }
}
