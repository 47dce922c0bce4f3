//! What is known of each cluster's ability to serve, and since when: evidence from the data path.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    ids::{ClusterName, ServiceName},
    time::Timestamp,
};

/// How much of one service one cluster can serve right now. Coarse on purpose: counts saturate at 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Availability {
    /// Endpoints that are ready and have a sidecar.
    pub ready: u8,
    /// All known endpoints.
    pub total: u8,
    /// A working tunnel leads there (true for the local cluster).
    pub reachable: bool,
}

impl Availability {
    /// At least one endpoint can be reached.
    pub fn is_serving(self) -> bool {
        self.reachable && self.ready > 0
    }
}

/// What one reporter says of one service in one cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Which service.
    pub service: ServiceName,
    /// Where.
    pub cluster: ClusterName,
    /// How much of it.
    #[serde(flatten)]
    pub current: Availability,
    /// As [`Observation::recovered_at`], so that all who hear of it hold down alike.
    #[serde(default, rename = "recoveredAt", skip_serializing_if = "Option::is_none")]
    pub recovered_at: Option<Timestamp>,
}

/// An [`Availability`] with its history, as far as the choice needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// The latest word.
    pub current: Availability,
    /// When it last went from not serving to serving after having served before; `None` if it has not.
    pub recovered_at: Option<Timestamp>,
    /// It has served at some time, so that a later return is a recovery and not a start.
    pub ever_served: bool,
}

impl Observation {
    /// What is known after the next word, `current`, arrived at `now`.
    fn followed_by(self, current: Availability, now: Timestamp) -> Self {
        let recovered_at = match (self.current.is_serving(), current.is_serving()) {
            (true, false) => None,
            (false, true) if self.ever_served => Some(now),
            _ => self.recovered_at,
        };
        Self { current, recovered_at, ever_served: self.ever_served || current.is_serving() }
    }
}

/// Everything one consumer knows. Fed by [`Observations::observe`]; read by [`crate::failover::choose`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observations {
    services: BTreeMap<ServiceName, BTreeMap<ClusterName, Observation>>,
}

impl Observations {
    /// Records the latest word on `service` in `cluster`. Returns whether anything changed.
    pub fn observe(
        &mut self,
        service: &ServiceName,
        cluster: &ClusterName,
        current: Availability,
        now: Timestamp,
    ) -> bool {
        if let Some(known) = self.services.get_mut(service).and_then(|by| by.get_mut(cluster)) {
            let next = known.followed_by(current, now);
            let changed = *known != next;
            *known = next;
            return changed;
        }
        let first = Observation { current, recovered_at: None, ever_served: current.is_serving() };
        self.services.entry(service.clone()).or_default().insert(cluster.clone(), first);
        true
    }

    /// Takes up what was known of `service` in `cluster` before a restart, unless something is known already. The next
    /// [`Observations::observe`] goes on from there.
    pub fn recall(&mut self, service: &ServiceName, cluster: &ClusterName, past: Observation) {
        self.services.entry(service.clone()).or_default().entry(cluster.clone()).or_insert(past);
    }

    /// No working tunnel leads to `cluster` any more: all that is known of it stays known, but unreachable. Returns
    /// whether anything changed.
    pub fn lose_cluster(&mut self, cluster: &ClusterName, now: Timestamp) -> bool {
        let mut changed = false;
        for known in self.services.values_mut().filter_map(|by| by.get_mut(cluster)) {
            let next = known.followed_by(Availability { reachable: false, ..known.current }, now);
            changed |= *known != next;
            *known = next;
        }
        changed
    }

    /// Forgets `service` in `cluster` (withdrawn export, removed cluster).
    pub fn forget(&mut self, service: &ServiceName, cluster: &ClusterName) {
        let _ = self.take(service, cluster);
    }

    /// The same, and returns what was known.
    pub fn take(&mut self, service: &ServiceName, cluster: &ClusterName) -> Option<Observation> {
        let by = self.services.get_mut(service)?;
        let known = by.remove(cluster);
        if by.is_empty() {
            self.services.remove(service);
        }
        known
    }

    /// Forgets all services in `cluster` (removed or revoked).
    pub fn forget_cluster(&mut self, cluster: &ClusterName) {
        self.retain(|_, c| c != cluster);
    }

    /// Keeps what `keep` says, for example what the global state still names; forgets the rest.
    pub fn retain(&mut self, mut keep: impl FnMut(&ServiceName, &ClusterName) -> bool) {
        self.services.retain(|service, by| {
            by.retain(|cluster, _| keep(service, cluster));
            !by.is_empty()
        });
    }

    /// What is known of `service` in `cluster`.
    pub fn find(&self, service: &ServiceName, cluster: &ClusterName) -> Option<&Observation> {
        self.services.get(service)?.get(cluster)
    }

    /// Everything known, to pass on.
    pub fn reports(&self) -> impl Iterator<Item = Report> {
        self.iter().map(|(service, cluster, o)| Report {
            service: service.clone(),
            cluster: cluster.clone(),
            current: o.current,
            recovered_at: o.recovered_at,
        })
    }

    /// Everything known, in order of service and cluster.
    pub fn iter(&self) -> impl Iterator<Item = (&ServiceName, &ClusterName, &Observation)> {
        self.services.iter().flat_map(|(s, by)| by.iter().map(move |(c, o)| (s, c, o)))
    }
}

/// What someone else observed, taken over as it is.
impl FromIterator<Report> for Observations {
    fn from_iter<I: IntoIterator<Item = Report>>(reports: I) -> Self {
        let mut all = Self::default();
        for Report { service, cluster, current, recovered_at } in reports {
            let ever_served = current.is_serving() || recovered_at.is_some();
            let observation = Observation { current, recovered_at, ever_served };
            all.services.entry(service).or_default().insert(cluster, observation);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Availability = Availability { ready: 1, total: 2, reachable: true };
    const DOWN: Availability = Availability { ready: 0, total: 2, reachable: true };

    fn names() -> (ServiceName, ClusterName) {
        (ServiceName::new("shop", "cart").unwrap(), "us-east".parse().unwrap())
    }

    #[test]
    fn a_start_is_not_a_recovery() {
        let (service, cluster) = names();
        let mut all = Observations::default();
        assert!(all.observe(&service, &cluster, DOWN, Timestamp(1)));
        assert!(all.observe(&service, &cluster, UP, Timestamp(2)));
        let known = all.find(&service, &cluster).unwrap();
        assert_eq!((known.recovered_at, known.ever_served), (None, true));
    }

    #[test]
    fn a_return_is_a_recovery_until_the_next_loss() {
        let (service, cluster) = names();
        let mut all = Observations::default();
        all.observe(&service, &cluster, UP, Timestamp(1));
        all.observe(&service, &cluster, DOWN, Timestamp(2));
        all.observe(&service, &cluster, UP, Timestamp(3));
        assert_eq!(all.find(&service, &cluster).unwrap().recovered_at, Some(Timestamp(3)));
        assert!(!all.observe(&service, &cluster, UP, Timestamp(4)), "a repeated word changes nothing");
        assert_eq!(all.find(&service, &cluster).unwrap().recovered_at, Some(Timestamp(3)));
        all.observe(&service, &cluster, DOWN, Timestamp(5));
        assert_eq!(all.find(&service, &cluster).unwrap().recovered_at, None);
    }

    #[test]
    fn a_lost_cluster_recovers_when_it_is_heard_again() {
        let (service, cluster) = names();
        let mut all = Observations::default();
        all.observe(&service, &cluster, UP, Timestamp(1));
        assert!(all.lose_cluster(&cluster, Timestamp(2)));
        assert!(!all.lose_cluster(&cluster, Timestamp(3)));
        assert!(!all.find(&service, &cluster).unwrap().current.is_serving());
        all.observe(&service, &cluster, UP, Timestamp(4));
        assert_eq!(all.find(&service, &cluster).unwrap().recovered_at, Some(Timestamp(4)));
    }

    #[test]
    fn what_is_recalled_goes_on_as_if_nothing_had_happened_in_between() {
        let (service, cluster) = names();
        let past = |current, recovered_at: Option<u64>| Observation {
            current,
            recovered_at: recovered_at.map(Timestamp),
            ever_served: true,
        };
        let next = |past, word| {
            let mut all = Observations::default();
            all.recall(&service, &cluster, past);
            all.observe(&service, &cluster, word, Timestamp(9));
            all.find(&service, &cluster).unwrap().recovered_at
        };
        assert_eq!(next(past(UP, Some(3)), UP), Some(Timestamp(3)), "its hold-down goes on");
        assert_eq!(next(past(UP, None), UP), None, "a restart alone is no recovery");
        assert_eq!(next(past(DOWN, None), UP), Some(Timestamp(9)), "it returned while nobody looked");
        assert_eq!(next(past(UP, Some(3)), DOWN), None);
        let mut all = Observations::default();
        all.observe(&service, &cluster, UP, Timestamp(1));
        all.recall(&service, &cluster, past(DOWN, None));
        assert!(all.find(&service, &cluster).unwrap().current.is_serving(), "what is known counts");
    }

    #[test]
    fn what_was_observed_survives_being_reported() {
        let (service, cluster) = names();
        let mut all = Observations::default();
        for (word, at) in [(UP, 1), (DOWN, 2), (UP, 3)] {
            all.observe(&service, &cluster, word, Timestamp(at));
        }
        assert_eq!(all.reports().collect::<Observations>(), all);
    }

    #[test]
    fn a_report_is_flat_in_json() {
        let (service, cluster) = names();
        let report = Report { service, cluster, current: UP, recovered_at: None };
        let json = serde_json::json!({
            "service": "shop/cart", "cluster": "us-east", "ready": 1, "total": 2, "reachable": true
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), json);
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report);
    }

    #[test]
    fn what_is_forgotten_leaves_nothing_behind() {
        let (service, cluster) = names();
        let mut all = Observations::default();
        all.observe(&service, &cluster, UP, Timestamp(1));
        all.forget_cluster(&cluster);
        assert_eq!(all, Observations::default());
        all.observe(&service, &cluster, UP, Timestamp(2));
        all.forget(&service, &cluster);
        assert_eq!(all, Observations::default());
    }
}
