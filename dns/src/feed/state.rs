//! What the agent said, turned into zones: the feed without its network.
//!
//! In: updates as they come off the wire, and the time. Out: the zone to serve, or why the update was refused; a refused
//! update changes nothing. Holds: the stamp never goes back within an epoch, the federation never changes, and its trust
//! bundle only by its predecessor's signature; a cluster once revoked stays so.

use std::{net::Ipv4Addr, sync::Arc};

use ipnet::Ipv4Net;
use isthmus_api::{
    convert::{AvailabilityReport, ConvertError},
    proto::local::v1 as pb,
};
use isthmus_identity::bundle::{self, BundleError};
use isthmus_model::{
    availability::Observations,
    global::GlobalSnapshot,
    ids::{ClusterName, Stamp, TrustDomain},
    local::LocalEndpoints,
    service::TrustBundle,
};

use crate::{
    metrics::Refusal,
    zone::{Sources, Zone},
};

/// Why an update was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// Older than what is held.
    #[error("the agent sent state {sent}, but {held} is held already")]
    Stale {
        /// The update's.
        sent: Stamp,
        /// Ours.
        held: Stamp,
    },
    /// Does not convert.
    #[error("the agent's update is malformed")]
    Malformed(#[source] ConvertError),
    /// A bundle that nobody vouches for.
    #[error("the federation's new trust bundle is not vouched for by the one before")]
    Bundle(#[source] BundleError),
    /// Not ours.
    #[error("the agent sent the state of federation {0}, which is not this server's")]
    Foreign(TrustDomain),
}

impl Refused {
    /// The metric's label.
    pub(crate) fn kind(&self) -> Refusal {
        match self {
            Self::Stale { .. } => Refusal::Stale,
            Self::Malformed(_) => Refusal::Malformed,
            Self::Bundle(_) => Refusal::Bundle,
            Self::Foreign(_) => Refusal::Foreign,
        }
    }
}

/// Everything accepted so far.
pub(crate) struct State {
    cluster: ClusterName,
    federation: TrustDomain,
    server: Option<Ipv4Addr>,
    bundle: TrustBundle,
    zone: Option<Arc<Zone>>,
    /// What the zone is made of.
    global: Option<Arc<GlobalSnapshot>>,
    unrevoked: Vec<ClusterName>,
    observed: Arc<Observations>,
}

impl State {
    /// Nothing accepted; `bundle` is the federation's as of enrolment. `server` is this server's own address.
    pub(crate) fn new(
        cluster: ClusterName,
        federation: TrustDomain,
        bundle: TrustBundle,
        server: Option<Ipv4Addr>,
    ) -> Self {
        Self {
            cluster,
            federation,
            server,
            bundle,
            zone: None,
            global: None,
            unrevoked: Vec::new(),
            observed: Arc::default(),
        }
    }

    /// The federation's bundle that verifies the agent now.
    pub(crate) fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// The stamp of what is held.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        self.zone.as_ref().map(|z| z.stamp())
    }

    /// Takes a configuration whole.
    pub(crate) fn configure(&mut self, update: pb::DnsConfig) -> Result<Arc<Zone>, Refused> {
        let mut sources = self.sources(update).map_err(Refused::Malformed)?;
        let global = &sources.global;
        if global.federation != self.federation {
            return Err(Refused::Foreign(global.federation.clone()));
        }
        // Equal is not stale: endpoints change without a new revision.
        if let Some(held) = self.stamp().filter(|held| global.stamp < *held) {
            return Err(Refused::Stale { sent: global.stamp, held });
        }
        bundle::verify_successor(&self.bundle, &global.federation_bundle).map_err(Refused::Bundle)?;
        self.bundle = global.federation_bundle.clone();
        self.unrevoked = match &self.global {
            Some(held) => Arc::make_mut(&mut sources.global).keep_revoked(held),
            None => Vec::new(),
        };
        self.global = Some(sources.global.clone());
        let zone = Arc::new(Zone::build(&sources, self.observed.clone()));
        self.zone = Some(zone.clone());
        Ok(zone)
    }

    /// The clusters of which the latest configuration took the revocation back, and the state in force without that;
    /// `None` if there are none.
    pub(crate) fn unrevoked(&self) -> Option<(&[ClusterName], &GlobalSnapshot)> {
        let global = self.global.as_deref().filter(|_| !self.unrevoked.is_empty())?;
        Some((&self.unrevoked, global))
    }

    /// Takes the availability of all services whole: what is not in it is not known any more. Returns the zone if there
    /// is one and its evidence changed.
    pub(crate) fn observe(&mut self, report: pb::AvailabilityReport) -> Result<Option<Arc<Zone>>, Refused> {
        let report = AvailabilityReport::try_from(report).map_err(Refused::Malformed)?;
        let observed: Observations = report.availability.into_iter().collect();
        if observed == *self.observed {
            return Ok(None);
        }
        self.observed = Arc::new(observed);
        self.zone = self.zone.as_ref().map(|z| Arc::new(z.with_observed(self.observed.clone())));
        Ok(self.zone.clone())
    }

    fn sources(&self, update: pb::DnsConfig) -> Result<Sources, ConvertError> {
        let missing = |field: &str| ConvertError::new(field, "is missing");
        let global = update.global.ok_or_else(|| missing("global"))?;
        let global = GlobalSnapshot::try_from(global).map_err(|e| e.within("global"))?;
        let vip_range: Ipv4Net = update.vip_range.parse().map_err(|_| {
            let text: String = update.vip_range.chars().take(64).collect();
            ConvertError::new("vip_range", format!("{text:?} is not an IPv4 range such as 127.64.0.0/16"))
        })?;
        let endpoints = match update.endpoints {
            Some(endpoints) => LocalEndpoints::try_from(endpoints).map_err(|e| e.within("endpoints"))?,
            None => LocalEndpoints::default(),
        };
        Ok(Sources {
            cluster: self.cluster.clone(),
            global: Arc::new(global),
            vip_range,
            endpoints,
            server: self.server,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{bundle, config, snapshot, stamp};

    fn state() -> State {
        let (cluster, federation) = ("us-east".parse().unwrap(), "isthmus.example".parse().unwrap());
        State::new(cluster, federation, bundle("isthmus.example"), None)
    }

    fn at(epoch: u64, revision: u64) -> GlobalSnapshot {
        let mut global = snapshot();
        global.stamp = stamp(epoch, revision);
        global
    }

    fn report(entries: &[(&str, u32)]) -> pb::AvailabilityReport {
        let entry = |(cluster, ready): &(&str, u32)| isthmus_api::proto::common::v1::Availability {
            service: Some(isthmus_api::proto::common::v1::ServiceName {
                namespace: "shop".into(),
                name: "cart".into(),
            }),
            cluster: (*cluster).into(),
            ready: *ready,
            total: 2,
            reachable: true,
            recovered_at_unix_ms: 0,
        };
        pb::AvailabilityReport { availability: entries.iter().map(entry).collect(), tunnels: Vec::new() }
    }

    #[test]
    fn stale_revision_is_refused_and_changes_nothing() {
        let mut state = state();
        state.configure(config(&at(1, 7))).unwrap();
        let refused = state.configure(config(&at(1, 6))).err().unwrap();
        assert_eq!(refused.kind(), Refusal::Stale);
        assert_eq!(state.stamp(), Some(stamp(1, 7)));
    }

    #[test]
    fn the_same_revision_may_bring_other_endpoints() {
        let mut state = state();
        state.configure(config(&at(1, 7))).unwrap();
        assert!(state.configure(config(&at(1, 7))).is_ok());
    }

    #[test]
    fn a_new_epoch_may_have_a_lower_revision() {
        let mut state = state();
        state.configure(config(&at(1, 7))).unwrap();
        assert!(state.configure(config(&at(2, 1))).is_ok());
        assert_eq!(state.stamp(), Some(stamp(2, 1)));
    }

    #[test]
    fn a_cluster_once_revoked_stays_revoked_whatever_a_later_state_says() {
        let west = "us-west".parse().unwrap();
        let mut revoked = at(1, 7);
        revoked.clusters.get_mut(&west).unwrap().state = isthmus_model::global::ClusterState::Revoked;
        let mut state = state();
        state.configure(config(&revoked)).unwrap();
        assert!(state.unrevoked().is_none());
        state.configure(config(&at(2, 1))).unwrap();
        let (clusters, global) = state.unrevoked().unwrap();
        assert_eq!(clusters, std::slice::from_ref(&west));
        assert!(global.active_cluster(&west).is_none());
        assert_eq!(state.stamp(), Some(stamp(2, 1)));
    }

    #[test]
    fn another_federations_state_is_refused() {
        let mut global = at(1, 7);
        global.federation = "evil.example".parse().unwrap();
        global.federation_bundle = bundle("evil.example");
        assert_eq!(state().configure(config(&global)).err().unwrap().kind(), Refusal::Foreign);
    }

    #[test]
    fn a_bundle_without_its_predecessors_signature_is_refused() {
        let mut global = at(1, 7);
        global.federation_bundle.document = r#"{"keys":[],"spiffe_sequence":2}"#.into();
        assert_eq!(state().configure(config(&global)).err().unwrap().kind(), Refusal::Bundle);
    }

    #[test]
    fn malformed_updates_name_the_field() {
        let mut update = config(&at(1, 7));
        update.vip_range = "fd00::/8".into();
        let refused = state().configure(update).err().unwrap();
        let source = std::error::Error::source(&refused).unwrap().to_string();
        assert!(source.starts_with("vip_range: "), "{source}");
        let refused = state().configure(pb::DnsConfig::default()).err().unwrap();
        assert_eq!(refused.kind(), Refusal::Malformed);
    }

    #[test]
    fn availability_is_whole_so_what_is_left_out_is_forgotten() {
        let mut state = state();
        state.configure(config(&at(1, 7))).unwrap();
        assert!(state.observe(report(&[("us-east", 1), ("us-west", 1)])).unwrap().is_some());
        assert!(state.observe(report(&[("us-east", 1), ("us-west", 1)])).unwrap().is_none());
        assert!(state.observe(report(&[("us-east", 1)])).unwrap().is_some());
        let service = "shop/cart".parse().unwrap();
        assert!(state.observed.find(&service, &"us-west".parse().unwrap()).is_none());
    }

    #[test]
    fn availability_before_any_configuration_is_kept_for_it() {
        let mut state = state();
        assert!(state.observe(report(&[("us-east", 1)])).unwrap().is_none());
        state.configure(config(&at(1, 7))).unwrap();
        assert!(state.observed.find(&"shop/cart".parse().unwrap(), &"us-east".parse().unwrap()).is_some());
    }
}
