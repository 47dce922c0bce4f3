//! What this cluster's gateways say of other clusters, merged: the best that any of them knows. Pure.

use std::{collections::BTreeMap, time::Duration};

use isthmus_model::{
    availability::{Availability, Report},
    ids::{ClusterName, ServiceName},
    time::Timestamp,
};

/// What a disconnected gateway said counts this long beside what others say; alone, it counts until something newer.
pub const STALE_AFTER: Duration = Duration::from_secs(10);

/// One gateway's latest report.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// Whole.
    pub reports: Vec<Report>,
    /// Since when its stream is down; `None` while it is up.
    pub silent_since: Option<Timestamp>,
}

impl Said {
    fn is_fresh(&self, now: Timestamp) -> bool {
        self.silent_since.is_none_or(|since| now.since(since) < STALE_AFTER)
    }

    /// When it turns stale, if that lies ahead.
    pub fn stale_at(&self, now: Timestamp) -> Option<Timestamp> {
        self.silent_since.map(|since| since + STALE_AFTER).filter(|at| *at > now)
    }
}

/// Per service and cluster, the best of the fresh reports; of the stale ones where there is no fresh one.
pub fn merge<'a>(
    all: impl Iterator<Item = &'a Said>,
    now: Timestamp,
) -> BTreeMap<(&'a ServiceName, &'a ClusterName), Availability> {
    let mut best: BTreeMap<_, (bool, Availability)> = BTreeMap::new();
    for said in all {
        let fresh = said.is_fresh(now);
        for report in &said.reports {
            let rank = |fresh: bool, a: Availability| (fresh, a.reachable, a.ready, a.total);
            best.entry((&report.service, &report.cluster))
                .and_modify(|known| {
                    if rank(fresh, report.current) > rank(known.0, known.1) {
                        *known = (fresh, report.current);
                    }
                })
                .or_insert((fresh, report.current));
        }
    }
    best.into_iter().map(|(key, (_, availability))| (key, availability)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(100_000);

    fn said(ready: u8, reachable: bool, silent_since: Option<Timestamp>) -> Said {
        let current = Availability { ready, total: 4, reachable };
        let (service, cluster) = ("shop/cart".parse().unwrap(), "us-west".parse().unwrap());
        let report = Report { service, cluster, current, recovered_at: None };
        Said { reports: vec![report], silent_since }
    }

    fn merged(all: &[Said]) -> Availability {
        *merge(all.iter(), NOW).values().next().unwrap()
    }

    #[test]
    fn one_gateway_that_reaches_a_cluster_is_enough() {
        let best = merged(&[said(3, false, None), said(2, true, None)]);
        assert_eq!(best, Availability { ready: 2, total: 4, reachable: true });
    }

    #[test]
    fn a_gateway_that_left_counts_for_a_while_then_only_if_alone() {
        let just_left = said(3, true, Some(Timestamp(95_000)));
        let long_gone = said(3, true, Some(Timestamp(89_000)));
        let here = said(0, true, None);
        assert_eq!(merged(&[just_left.clone(), here.clone()]).ready, 3);
        assert_eq!(merged(&[long_gone.clone(), here]).ready, 0);
        assert_eq!(merged(std::slice::from_ref(&long_gone)).ready, 3);
        assert_eq!(just_left.stale_at(NOW), Some(Timestamp(105_000)));
        assert_eq!(long_gone.stale_at(NOW), None);
    }
}
