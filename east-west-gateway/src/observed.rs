//! What this gateway knows of every cluster's ability to serve, with its history: the evidence that
//! [`isthmus_model::failover::choose`] decides on.
//!
//! In: the registry's evidence per remote cluster, the local pool's table, and the view (what is exported at all). Out:
//! candidates, and a version that moves whenever something changed, which is when the agent is told.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use isthmus_model::{
    availability::{Availability, Observations, Report},
    failover::{self, Candidate},
    global::{GlobalService, GlobalSnapshot},
    ids::{ClusterName, ServiceName},
    time::Timestamp,
};
use tokio::sync::watch;

use crate::{
    clock,
    tunnel::{outbox::Table, registry::Evidence},
    view::View,
};

/// What gateways of one cluster say within this is acted on together.
const MERGE: Duration = Duration::from_millis(10);

/// The observations of one gateway, of cluster `own`.
#[derive(Debug)]
pub(crate) struct Observed {
    own: ClusterName,
    inner: Mutex<Inner>,
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    known: Observations,
    /// When each remote cluster was brought up to date last, and how long that took.
    refreshed: BTreeMap<ClusterName, Refreshed>,
    /// Of an earlier run: the history that the first word on each goes on from. It decides nothing by itself, since
    /// only an own tunnel tells what can be reached.
    past: Observations,
}

#[derive(Clone, Copy, Debug)]
struct Refreshed {
    began: Instant,
    took: Duration,
}

impl Inner {
    fn observe(&mut self, service: &ServiceName, cluster: &ClusterName, word: Availability, now: Timestamp) -> bool {
        if self.known.find(service, cluster).is_none()
            && let Some(past) = self.past.take(service, cluster)
        {
            self.known.recall(service, cluster, past);
            self.known.observe(service, cluster, word, now);
            return true;
        }
        self.known.observe(service, cluster, word, now)
    }
}

impl Observed {
    /// Nothing is known yet.
    pub(crate) fn new(own: ClusterName) -> Self {
        Self { own, inner: Mutex::default(), version: watch::Sender::default() }
    }

    /// Moves whenever something changed.
    pub(crate) fn version(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Something changed that is not an observation but is reported with them: a tunnel's state.
    pub(crate) fn touch(&self) {
        self.version.send_modify(|v| *v += 1);
    }

    /// Goes on from what an earlier run has observed.
    pub(crate) fn recall(&self, past: Observations) {
        self.lock().past = past;
    }

    /// What the next run may go on from.
    pub(crate) fn history(&self) -> Observations {
        let inner = self.lock();
        let mut all = inner.known.clone();
        for (service, cluster, past) in inner.past.iter() {
            all.recall(service, cluster, *past);
        }
        all
    }

    /// Brings what is known of the remote `cluster` up to date. `evidence` is asked under the lock, so that of two
    /// refreshes at once the later one wins with the later evidence.
    pub(crate) fn refresh(&self, cluster: &ClusterName, view: &View, evidence: impl FnOnce() -> Option<Evidence>) {
        let now = now();
        let mut inner = self.lock();
        let began = clock::now();
        let mut changed = false;
        match (evidence(), &view.global) {
            (Some(evidence), Some(global)) if view.is_active(cluster) => {
                inner.known.retain(|service, c| {
                    let keep = c != cluster || exports(global, service, cluster);
                    changed |= !keep;
                    keep
                });
                for service in global.services.values().filter(|s| s.exporters.contains_key(cluster)) {
                    if let Some(word) = word(&service.name, cluster, &evidence, &inner.known) {
                        changed |= inner.observe(&service.name, cluster, word, now);
                    }
                }
            }
            _ => inner.known.retain(|_, c| {
                changed |= c == cluster;
                c != cluster
            }),
        }
        if view.is_active(cluster) {
            inner.refreshed.insert(cluster.clone(), Refreshed { began, took: clock::since(began) });
        } else {
            inner.refreshed.remove(cluster);
        }
        drop(inner);
        if changed {
            self.touch();
        }
    }

    /// When something that a gateway of `cluster` said at `heard` should be acted on; `None` if it was, with the word of
    /// another one. They are many and may say much: whatever they say costs at most a tenth of a processor.
    pub(crate) fn due(&self, cluster: &ClusterName, heard: Instant) -> Option<Instant> {
        let inner = self.lock();
        let Some(last) = inner.refreshed.get(cluster) else { return Some(heard) };
        (last.began <= heard).then(|| heard.max(last.began + last.took + MERGE.max(last.took * 10)))
    }

    /// Brings what is known of the own cluster up to date.
    pub(crate) fn refresh_own(&self, table: &Table) {
        let now = now();
        let mut inner = self.lock();
        inner.known.retain(|service, c| c != &self.own || table.contains_key(service));
        let mut changed = false;
        for (service, word) in table {
            changed |= inner.observe(service, &self.own, *word, now);
        }
        drop(inner);
        if changed {
            self.touch();
        }
    }

    /// Where `service` may be reached, best first.
    pub(crate) fn candidates(&self, service: &GlobalService, port: u16, global: &GlobalSnapshot) -> Vec<Candidate> {
        failover::choose(service, Some(port), &self.own, global, &self.lock().known, now())
    }

    /// All that is known of remote clusters.
    pub(crate) fn report(&self) -> Vec<Report> {
        self.lock().known.reports().filter(|report| report.cluster != self.own).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every section leaves the state whole, so a panic in another one does not spoil it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The word on `service`, if there is one to be had.
fn word(
    service: &ServiceName,
    cluster: &ClusterName,
    evidence: &Evidence,
    known: &Observations,
) -> Option<Availability> {
    let nothing = Availability { ready: 0, total: 0, reachable: evidence.reachable };
    match evidence.table.get(service) {
        Some(word) => Some(Availability { reachable: evidence.reachable, ..*word }),
        None if !evidence.reachable => evidence.tried.then_some(nothing),
        // Its peers do not mention it. What was there before is gone; what never was may only be new to them.
        None => known.find(service, cluster).map(|_| nothing),
    }
}

fn exports(global: &GlobalSnapshot, service: &ServiceName, cluster: &ClusterName) -> bool {
    global.services.get(service).is_some_and(|s| s.exporters.contains_key(cluster))
}

fn now() -> Timestamp {
    Timestamp(isthmus_runtime::now())
}

#[cfg(test)]
mod tests {
    use isthmus_model::failover::Eligibility;

    use super::*;
    use crate::testkit::{cluster, federation, service_name};

    fn evidence(reachable: bool, ready: Option<u8>) -> Option<Evidence> {
        let word = |ready| (service_name(), Availability { ready, total: 2, reachable: true });
        Some(Evidence { reachable, tried: true, table: ready.map(word).into_iter().collect() })
    }

    fn eligibility(observed: &Observed, view: &View) -> Eligibility {
        let global = view.global.as_ref().unwrap();
        let candidates = observed.candidates(&global.services[&service_name()], 80, global);
        candidates.into_iter().find(|c| c.cluster == cluster("west")).unwrap().eligibility
    }

    #[test]
    fn a_lost_tunnel_reads_as_unreachable_and_its_return_as_a_recovery() {
        let view = View { global: Some(federation(&["east", "west"]).into()), ..View::default() };
        let observed = Observed::new(cluster("east"));
        assert_eq!(eligibility(&observed, &view), Eligibility::Unknown);
        observed.refresh(&cluster("west"), &view, || evidence(true, Some(2)));
        assert_eq!(eligibility(&observed, &view), Eligibility::Ready);
        observed.refresh(&cluster("west"), &view, || evidence(false, Some(2)));
        assert_eq!(eligibility(&observed, &view), Eligibility::Unreachable);
        observed.refresh(&cluster("west"), &view, || evidence(true, Some(2)));
        assert!(matches!(eligibility(&observed, &view), Eligibility::HoldDown { .. }));
    }

    #[test]
    fn a_restart_ends_no_hold_down_and_is_no_recovery_by_itself() {
        let view = View { global: Some(federation(&["east", "west"]).into()), ..View::default() };
        let restarted = |words: &[Option<u8>]| {
            let before = Observed::new(cluster("east"));
            words.iter().for_each(|ready| before.refresh(&cluster("west"), &view, || evidence(true, *ready)));
            let after = Observed::new(cluster("east"));
            after.recall(before.history());
            assert_eq!(after.history(), before.history(), "another restart at once loses nothing");
            assert_eq!(eligibility(&after, &view), Eligibility::Unknown, "only an own tunnel tells");
            after.refresh(&cluster("west"), &view, || evidence(true, Some(2)));
            eligibility(&after, &view)
        };
        assert_eq!(restarted(&[Some(2)]), Eligibility::Ready);
        assert!(matches!(restarted(&[Some(2), Some(0), Some(2)]), Eligibility::HoldDown { .. }));
        assert!(matches!(restarted(&[Some(2), Some(0)]), Eligibility::HoldDown { .. }), "it returned meanwhile");
    }

    #[test]
    fn what_a_peer_stops_mentioning_has_no_endpoints() {
        let view = View { global: Some(federation(&["east", "west"]).into()), ..View::default() };
        let observed = Observed::new(cluster("east"));
        observed.refresh(&cluster("west"), &view, || evidence(true, None));
        assert_eq!(eligibility(&observed, &view), Eligibility::Unknown);
        observed.refresh(&cluster("west"), &view, || evidence(true, Some(1)));
        observed.refresh(&cluster("west"), &view, || evidence(true, None));
        assert_eq!(eligibility(&observed, &view), Eligibility::NoEndpoints);
    }

    #[test]
    fn the_gateways_of_a_cluster_are_heard_together_and_at_a_pace() {
        let view = View { global: Some(federation(&["east", "west"]).into()), ..View::default() };
        let observed = Observed::new(cluster("east"));
        let (west, before) = (cluster("west"), clock::now());
        assert_eq!(observed.due(&west, before), Some(before), "the first word is acted on at once");
        observed.refresh(&west, &view, || evidence(true, Some(1)));
        assert_eq!(observed.due(&west, before), None, "what was said before is known");
        let heard = clock::now();
        assert!(observed.due(&west, heard).unwrap() >= before + MERGE);
        let slow = Duration::from_millis(30);
        observed.refresh(&west, &view, || {
            let began = clock::now();
            while clock::since(began) < slow {}
            evidence(true, Some(1))
        });
        assert!(observed.due(&west, clock::now()).unwrap() >= heard + slow * 11, "what takes long is done less often");
    }

    #[test]
    fn only_changes_move_the_version() {
        let view = View { global: Some(federation(&["east", "west"]).into()), ..View::default() };
        let observed = Observed::new(cluster("east"));
        let mut version = observed.version();
        observed.refresh(&cluster("west"), &view, || evidence(true, Some(1)));
        assert!(version.has_changed().unwrap());
        version.mark_unchanged();
        observed.refresh(&cluster("west"), &view, || evidence(true, Some(1)));
        assert!(!version.has_changed().unwrap());
        observed.refresh(&cluster("west"), &view, || None);
        assert!(version.has_changed().unwrap());
        assert!(observed.report().is_empty());
    }
}
