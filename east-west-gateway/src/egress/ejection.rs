//! Which local endpoints are out, and when each is probed again. Sans-IO: `(state, event, now) → state`.
//!
//! A refused connection takes an endpoint out at once. A close before the first byte may be the caller's doing, so it takes
//! two in a row; silence says something only while another endpoint answers ([`super::race::outrun`]), and takes two, too.
//! What is out is probed with a plain connect after a pause that doubles with each failure in a row; an answer brings it
//! back, and only a carried connection clears its record. What is out for silence alone is better than nothing.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// How an endpoint failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Refused, unreachable, or not connected in time.
    Connect,
    /// Closed before its first byte.
    Closed,
    /// Connected, and silent while another one answered.
    Outrun,
}

impl Failure {
    /// As the access log says it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect_failed",
            Self::Closed => "closed",
            Self::Outrun => "silent",
        }
    }
}

const SOFT_FAILURES: u32 = 2;

/// The record of all endpoints that failed lately.
#[derive(Debug)]
pub(crate) struct Ejections {
    base: Duration,
    max: Duration,
    records: HashMap<SocketAddr, Record>,
}

#[derive(Debug)]
struct Record {
    failures: u32,
    /// Out, and to be probed then.
    probe_at: Option<Instant>,
    /// Pause after the next failure.
    pause: Duration,
    /// Whether all of its failures were silence.
    only_slow: bool,
}

impl Ejections {
    /// Pauses from `base` up to `max`.
    pub(crate) fn new(base: Duration, max: Duration) -> Self {
        Self { base, max, records: HashMap::new() }
    }

    /// A connection to `endpoint` failed. Returns whether that took it out.
    pub(crate) fn failed(&mut self, endpoint: SocketAddr, failure: Failure, now: Instant) -> bool {
        let base = self.base;
        let fresh = Record { failures: 0, probe_at: None, pause: base, only_slow: true };
        let record = self.records.entry(endpoint).or_insert(fresh);
        record.failures = record.failures.saturating_add(1);
        record.only_slow &= failure == Failure::Outrun;
        let out = record.probe_at.is_some();
        if out || (failure != Failure::Connect && record.failures < SOFT_FAILURES) {
            return false;
        }
        record.eject(now, self.max);
        true
    }

    /// A connection to `endpoint` was carried: its record is clean. Returns whether it was out.
    pub(crate) fn succeeded(&mut self, endpoint: SocketAddr) -> bool {
        self.records.remove(&endpoint).is_some_and(|record| record.probe_at.is_some())
    }

    /// The probe of `endpoint` ended. Returns whether it came back.
    pub(crate) fn probed(&mut self, endpoint: SocketAddr, answered: bool, now: Instant) -> bool {
        let max = self.max;
        let Some(record) = self.records.get_mut(&endpoint).filter(|r| r.probe_at.is_some()) else { return false };
        if answered {
            record.probe_at = None;
        } else {
            record.only_slow = false;
            record.eject(now, max);
        }
        answered
    }

    /// Takes no traffic now.
    pub(crate) fn is_out(&self, endpoint: SocketAddr) -> bool {
        self.records.get(&endpoint).is_some_and(|record| record.probe_at.is_some())
    }

    /// Those of `endpoints` that take traffic now; if all are out, those that are out for silence alone.
    pub(crate) fn usable(&self, endpoints: Vec<SocketAddr>) -> Vec<SocketAddr> {
        let (usable, out): (Vec<_>, Vec<_>) = endpoints.into_iter().partition(|endpoint| !self.is_out(*endpoint));
        if usable.is_empty() { out.into_iter().filter(|endpoint| !self.is_dead(*endpoint)).collect() } else { usable }
    }

    /// Takes no traffic, whatever the others do.
    pub(crate) fn is_dead(&self, endpoint: SocketAddr) -> bool {
        self.records.get(&endpoint).is_some_and(|record| record.probe_at.is_some() && !record.only_slow)
    }

    /// Endpoints whose probe is due.
    pub(crate) fn due(&self, now: Instant) -> Vec<SocketAddr> {
        let due = |(endpoint, record): (&SocketAddr, &Record)| {
            record.probe_at.is_some_and(|at| at <= now).then_some(*endpoint)
        };
        self.records.iter().filter_map(due).collect()
    }

    /// When the next probe is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.records.values().filter_map(|record| record.probe_at).min()
    }

    /// Drops the records of endpoints that `keep` does not want: gone, or vouched for anew.
    pub(crate) fn retain(&mut self, keep: impl Fn(SocketAddr) -> bool) {
        self.records.retain(|endpoint, _| keep(*endpoint));
    }
}

impl Record {
    fn eject(&mut self, now: Instant, max: Duration) {
        self.probe_at = Some(now + self.pause);
        self.pause = (self.pause * 2).min(max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn endpoint() -> SocketAddr {
        "127.1.1.21:8080".parse().unwrap()
    }

    fn ejections() -> Ejections {
        Ejections::new(S, S * 30)
    }

    #[test]
    fn a_refused_connection_takes_an_endpoint_out_at_once() {
        let now = Instant::now();
        let mut state = ejections();
        assert!(state.failed(endpoint(), Failure::Connect, now));
        assert!(state.is_out(endpoint()));
        assert_eq!(state.next_due(), Some(now + S));
    }

    #[test]
    fn one_silent_connection_is_forgiven_and_two_in_a_row_are_not() {
        let now = Instant::now();
        let mut state = ejections();
        for failure in [Failure::Outrun, Failure::Closed] {
            assert!(!state.failed(endpoint(), failure, now));
            state.succeeded(endpoint());
            assert!(!state.failed(endpoint(), failure, now));
            assert!(state.failed(endpoint(), failure, now));
            state.succeeded(endpoint());
        }
    }

    #[test]
    fn silence_alone_leaves_an_endpoint_for_want_of_others() {
        let now = Instant::now();
        let (slow, dead) = (endpoint(), "127.1.1.22:8080".parse().unwrap());
        let mut state = ejections();
        assert_eq!((0..2).filter(|_| state.failed(slow, Failure::Outrun, now)).count(), 1);
        assert_eq!(state.usable(vec![slow, dead]), [dead]);
        state.failed(dead, Failure::Connect, now);
        assert_eq!(state.usable(vec![slow, dead]), [slow]);
        state.probed(slow, false, now + S);
        assert!(state.usable(vec![slow, dead]).is_empty(), "it does not even connect");
    }

    #[test]
    fn pauses_double_up_to_the_limit_while_probes_fail() {
        let mut now = Instant::now();
        let mut state = ejections();
        state.failed(endpoint(), Failure::Connect, now);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert_eq!(state.next_due(), Some(now + S * seconds));
            now += S * seconds;
            assert_eq!(state.due(now), [endpoint()]);
            assert!(!state.probed(endpoint(), false, now));
        }
    }

    #[test]
    fn an_answered_probe_readmits_and_a_new_failure_pauses_longer() {
        let now = Instant::now();
        let mut state = ejections();
        state.failed(endpoint(), Failure::Connect, now);
        assert!(state.probed(endpoint(), true, now + S));
        assert!(!state.is_out(endpoint()));
        assert!(state.failed(endpoint(), Failure::Connect, now + S));
        assert_eq!(state.next_due(), Some(now + S * 3));
    }

    #[test]
    fn a_carried_connection_clears_the_record() {
        let now = Instant::now();
        let mut state = ejections();
        state.failed(endpoint(), Failure::Connect, now);
        state.probed(endpoint(), true, now + S);
        state.succeeded(endpoint());
        state.failed(endpoint(), Failure::Connect, now + S);
        assert_eq!(state.next_due(), Some(now + S * 2));
    }

    #[test]
    fn failures_while_out_neither_eject_again_nor_push_the_probe_away() {
        let now = Instant::now();
        let mut state = ejections();
        assert!(state.failed(endpoint(), Failure::Connect, now));
        assert!(!state.failed(endpoint(), Failure::Connect, now + S / 2));
        assert_eq!(state.next_due(), Some(now + S));
    }
}
