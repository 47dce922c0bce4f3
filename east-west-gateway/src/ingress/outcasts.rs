//! Services that failed at a cluster lately: there they are tried last. Sans-IO.
//!
//! What is out is one service at one cluster, never the path to the cluster, and never for good: after a pause that doubles
//! with each failure it is tried again, and one success clears its record. Where everything is out, everything is tried.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use isthmus_model::ids::{ClusterName, ServiceName};

/// Failures in a row that put a service out.
const FAILURES: u32 = 3;
/// Records kept; a bound on memory. More than any federation has pairs that fail at one time.
const MAX: usize = 10_000;

/// The services that are out.
#[derive(Debug)]
pub(crate) struct Outcasts {
    base: Duration,
    max: Duration,
    records: HashMap<(ServiceName, ClusterName), Record>,
}

#[derive(Debug)]
struct Record {
    failures: u32,
    until: Option<Instant>,
    pause: Duration,
}

impl Outcasts {
    /// Pauses from `base` up to `max`.
    pub(crate) fn new(base: Duration, max: Duration) -> Self {
        Self { base, max, records: HashMap::new() }
    }

    /// `service` could not be had at `cluster`. Returns whether that put it out.
    pub(crate) fn failed(&mut self, service: &ServiceName, cluster: &ClusterName, now: Instant) -> bool {
        if self.records.len() >= MAX {
            self.records.retain(|_, record| record.until.is_some_and(|until| until > now));
        }
        let base = self.base;
        let key = (service.clone(), cluster.clone());
        let record = self.records.entry(key).or_insert(Record { failures: 0, until: None, pause: base });
        record.failures = record.failures.saturating_add(1);
        if record.failures < FAILURES || record.until.is_some_and(|until| until > now) {
            return false;
        }
        record.until = Some(now + record.pause);
        record.pause = (record.pause * 2).min(self.max);
        true
    }

    /// It was had.
    pub(crate) fn succeeded(&mut self, service: &ServiceName, cluster: &ClusterName) {
        // The usual case is that there is nothing to forget.
        if !self.records.is_empty() {
            self.records.remove(&(service.clone(), cluster.clone()));
        }
    }

    /// Better not now.
    pub(crate) fn is_out(&self, service: &ServiceName, cluster: &ClusterName, now: Instant) -> bool {
        if self.records.is_empty() {
            return false;
        }
        let record = self.records.get(&(service.clone(), cluster.clone()));
        record.and_then(|record| record.until).is_some_and(|until| until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{cluster, service_name};

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn three_failures_in_a_row_put_a_service_out_at_that_cluster_and_nowhere_else() {
        let now = Instant::now();
        let (service, west) = (service_name(), cluster("west"));
        let mut state = Outcasts::new(S, S * 30);
        assert!(!state.failed(&service, &west, now) && !state.failed(&service, &west, now));
        state.succeeded(&service, &west);
        assert!(!state.failed(&service, &west, now) && !state.failed(&service, &west, now));
        assert!(state.failed(&service, &west, now));
        assert!(state.is_out(&service, &west, now));
        assert!(!state.is_out(&service, &cluster("east"), now));
        assert!(!state.is_out(&ServiceName::new("shop", "cart").unwrap(), &west, now));
    }

    #[test]
    fn it_is_tried_again_after_a_pause_that_doubles() {
        let mut now = Instant::now();
        let (service, west) = (service_name(), cluster("west"));
        let mut state = Outcasts::new(S, S * 4);
        assert_eq!((0..3).filter(|_| state.failed(&service, &west, now)).count(), 1);
        for pause in [1, 2, 4, 4] {
            assert!(state.is_out(&service, &west, now + S * pause - S / 2), "{pause}");
            now += S * pause;
            assert!(!state.is_out(&service, &west, now));
            assert!(state.failed(&service, &west, now));
        }
        state.succeeded(&service, &west);
        assert!(!state.is_out(&service, &west, now));
    }
}
