//! Which clusters a local connection may go to, in order. The one decision is [`isthmus_model::failover::choose`]; here is
//! only what a gateway does with it: pinned ports, attempts, and what comes after a failed one.

use std::collections::VecDeque;

use isthmus_model::{
    access::{self, Denied, Use},
    failover::Candidate,
    ids::ClusterName,
    sni,
};

use crate::{clock, core::Core, view::View};

/// On pinned ports: this many gateways of the one cluster.
const PINNED_ATTEMPTS: usize = 2;

/// Why nothing can be tried. `label` is its metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hopeless {
    /// No snapshot yet, or no such service or port in it.
    UnknownService,
    /// The pinned cluster does not export it, or is none.
    NotExported,
    /// Policy keeps traffic out of there.
    Forbidden,
    /// Nothing usable.
    NoCandidate,
}

impl Hopeless {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::UnknownService => "unknown_service",
            Self::NotExported => "not_exported",
            Self::Forbidden => "forbidden",
            Self::NoCandidate => "no_candidate",
        }
    }
}

impl From<&Denied> for Hopeless {
    fn from(denied: &Denied) -> Self {
        match denied {
            Denied::UnknownService(_) | Denied::UnknownPort(..) => Self::UnknownService,
            Denied::NotExported { .. } => Self::NotExported,
            Denied::CallerInactive(_)
            | Denied::ExporterInactive(_)
            | Denied::ImportNotGranted { .. }
            | Denied::ExportNotGranted { .. }
            | Denied::OutsideRegions { .. } => Self::Forbidden,
        }
    }
}

/// What comes after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// The way there failed: another gateway of the same cluster may do.
    SameCluster,
    /// The cluster itself cannot: the next one.
    NextCluster,
    /// Nobody can.
    Nobody,
}

/// The clusters left to try. Sans-IO.
#[derive(Debug)]
pub(crate) struct Plan {
    clusters: VecDeque<ClusterName>,
    attempts_left: usize,
}

impl Plan {
    /// The plan for `route`, or why there is none.
    pub(crate) fn make(core: &Core, view: &View, route: &sni::Route) -> Result<Self, Hopeless> {
        let (Some(service), Some(global)) = (view.service(&route.service), &view.global) else {
            return Err(Hopeless::UnknownService);
        };
        if !service.ports.iter().any(|p| p.port.number == route.port) {
            return Err(Hopeless::UnknownService);
        }
        let may = |exporter: &ClusterName| {
            access::may_use(global, &Use { caller: &core.cluster, exporter, service: &route.service, port: route.port })
        };
        if let Some(cluster) = &route.cluster {
            // The caller has chosen, so stale evidence does not overrule it; a hard boundary does.
            return may(cluster).map(|_| Self::pinned(cluster)).map_err(|denied| Hopeless::from(&denied));
        }
        let mut candidates = core.observed.candidates(service, route.port, global);
        candidates.retain(|c| may(&c.cluster).is_ok());
        let (outcasts, now) = (core.outcasts(), clock::now());
        // Stable: otherwise the order stands.
        candidates.sort_by_key(|c| outcasts.is_out(&route.service, &c.cluster, now));
        drop(outcasts);
        Self::auto(&candidates, core.config.ingress.max_attempts)
    }

    fn pinned(cluster: &ClusterName) -> Self {
        Self { clusters: [cluster.clone()].into(), attempts_left: PINNED_ATTEMPTS }
    }

    fn auto(candidates: &[Candidate], max: usize) -> Result<Self, Hopeless> {
        let clusters: VecDeque<_> = candidates.iter().filter(|c| c.usable()).map(|c| c.cluster.clone()).collect();
        if clusters.is_empty() {
            return Err(Hopeless::NoCandidate);
        }
        Ok(Self { clusters, attempts_left: max })
    }

    /// Where to try next.
    pub(crate) fn next(&self) -> Option<&ClusterName> {
        self.clusters.front().filter(|_| self.attempts_left > 0)
    }

    /// There is no way to that cluster; it costs no attempt.
    pub(crate) fn skip(&mut self) {
        self.clusters.pop_front();
    }

    /// An attempt was made and failed.
    pub(crate) fn failed(&mut self, after: After) {
        self.attempts_left = self.attempts_left.saturating_sub(1);
        match after {
            After::SameCluster => {}
            After::NextCluster => self.skip(),
            After::Nobody => self.clusters.clear(),
        }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_model::failover::{Eligibility, Tier};

    use super::*;
    use crate::testkit::cluster;

    fn candidate(name: &str, eligibility: Eligibility) -> Candidate {
        Candidate { cluster: cluster(name), tier: Tier::Any, eligibility, reason: String::new() }
    }

    #[test]
    fn only_usable_clusters_are_planned_in_order() {
        let candidates = [
            candidate("a", Eligibility::Ready),
            candidate("b", Eligibility::Unknown),
            candidate("c", Eligibility::Unreachable),
            candidate("d", Eligibility::Forbidden),
        ];
        let mut plan = Plan::auto(&candidates, 6).unwrap();
        assert_eq!(plan.next(), Some(&cluster("a")));
        plan.failed(After::NextCluster);
        assert_eq!(plan.next(), Some(&cluster("b")));
        plan.failed(After::NextCluster);
        assert_eq!(plan.next(), None);
        assert_eq!(Plan::auto(&candidates[2..], 6).unwrap_err(), Hopeless::NoCandidate);
    }

    #[test]
    fn a_failed_way_is_tried_through_another_gateway_first() {
        let candidates = [candidate("a", Eligibility::Ready), candidate("b", Eligibility::Ready)];
        let mut plan = Plan::auto(&candidates, 6).unwrap();
        plan.failed(After::SameCluster);
        assert_eq!(plan.next(), Some(&cluster("a")));
        plan.skip();
        assert_eq!(plan.next(), Some(&cluster("b")));
    }

    #[test]
    fn attempts_are_capped() {
        let candidates = [candidate("a", Eligibility::Ready), candidate("b", Eligibility::Ready)];
        let mut plan = Plan::auto(&candidates, 2).unwrap();
        plan.failed(After::SameCluster);
        plan.failed(After::SameCluster);
        assert_eq!(plan.next(), None);
    }

    #[test]
    fn a_pinned_cluster_is_tried_twice() {
        let mut plan = Plan::pinned(&cluster("b"));
        plan.failed(After::SameCluster);
        assert_eq!(plan.next(), Some(&cluster("b")));
        plan.failed(After::SameCluster);
        assert_eq!(plan.next(), None);
    }

    #[test]
    fn what_is_denied_is_hopeless_for_the_same_reason() {
        let unknown = Denied::UnknownPort(crate::testkit::service_name(), 81);
        assert_eq!(Hopeless::from(&unknown), Hopeless::UnknownService);
        assert_eq!(Hopeless::from(&Denied::ExporterInactive(cluster("b"))), Hopeless::Forbidden);
    }
}
