//! Which clusters a local connection may go to, in order. The one decision is [`isthmus_model::failover::choose`]; here is
//! only what a gateway does with it: pinned ports, attempts, and what comes after a failed one.

use std::collections::VecDeque;

use isthmus_model::{
    failover::{Candidate, Eligibility},
    ids::ClusterName,
    sni,
};

use crate::{core::Core, view::View};

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
        let candidates = core.observed.candidates(service, route.port, global);
        match &route.cluster {
            Some(cluster) => Self::pinned(&candidates, cluster),
            None => Self::auto(&candidates, core.config.ingress.max_attempts),
        }
    }

    /// The caller has chosen, so stale evidence does not overrule it; a hard boundary does.
    fn pinned(candidates: &[Candidate], cluster: &ClusterName) -> Result<Self, Hopeless> {
        let candidate = candidates.iter().find(|c| c.cluster == *cluster).ok_or(Hopeless::NotExported)?;
        if candidate.eligibility == Eligibility::Forbidden {
            return Err(Hopeless::Forbidden);
        }
        Ok(Self { clusters: [cluster.clone()].into(), attempts_left: PINNED_ATTEMPTS })
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
    use isthmus_model::failover::Tier;

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
    fn a_pinned_cluster_is_tried_twice_whatever_the_evidence_but_never_across_a_boundary() {
        let candidates = [candidate("a", Eligibility::Ready), candidate("b", Eligibility::NoEndpoints)];
        let mut plan = Plan::pinned(&candidates, &cluster("b")).unwrap();
        plan.failed(After::SameCluster);
        assert_eq!(plan.next(), Some(&cluster("b")));
        plan.failed(After::SameCluster);
        assert_eq!(plan.next(), None);
        assert_eq!(Plan::pinned(&candidates, &cluster("x")).unwrap_err(), Hopeless::NotExported);
        let forbidden = [candidate("b", Eligibility::Forbidden)];
        assert_eq!(Plan::pinned(&forbidden, &cluster("b")).unwrap_err(), Hopeless::Forbidden);
    }
}
