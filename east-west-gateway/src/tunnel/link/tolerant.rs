//! A congestion controller for paths that lose packets without being congested, as long and wireless ones do.
//!
//! CUBIC (RFC 9438) takes every loss for congestion: at 1 % it leaves a connection a dozen packets per round trip, whatever
//! the path could carry. This one asks two questions first, as BBR does: is the loss sparse (up to 5 %; the second version of BBR
//! bears 2 %, the first 20 %), and is there no queue, that is, does the round trip take no longer than the shortest one known? If
//! both, CUBIC is not told. ECN marks and persistent congestion always count.

use std::{any::Any, sync::Arc, time::Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

/// Lost bytes that are borne, for each acknowledged one.
const SHARE: f64 = 0.05;
/// How much of that may be saved up, in packets.
const BURST: f64 = 10.0;
/// A round trip so much longer than the shortest means a queue: a quarter, and a little for coarse clocks.
const QUEUE_FACTOR: f64 = 1.25;
const QUEUE_SLACK: f64 = 0.003;

/// Makes controllers.
#[derive(Debug, Default)]
pub(crate) struct TolerantConfig {
    cubic: Arc<CubicConfig>,
}

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let inner = self.cubic.clone().build(now, current_mtu);
        let mtu = f64::from(current_mtu);
        Box::new(Tolerant { inner, mtu, credit: BURST * mtu, queued: false })
    }
}

/// CUBIC behind a sieve.
struct Tolerant {
    inner: Box<dyn Controller>,
    mtu: f64,
    /// Lost bytes that may still be borne.
    credit: f64,
    queued: bool,
}

impl Tolerant {
    fn bears(&mut self, lost_bytes: u64) -> bool {
        let lost = lost_bytes as f64;
        let sparse = self.credit >= lost;
        // What is not sparse uses the credit up, so that a burst does not count as its first part only.
        self.credit = (self.credit - lost).max(0.0);
        sparse && !self.queued
    }
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.credit = (self.credit + bytes as f64 * SHARE).min(BURST * self.mtu);
        self.queued = rtt.get().as_secs_f64() > rtt.min().as_secs_f64() * QUEUE_FACTOR + QUEUE_SLACK;
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.inner.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        let marked = lost_bytes == 0;
        if marked || is_persistent_congestion || !self.bears(lost_bytes) {
            self.inner.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = f64::from(new_mtu);
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        let Self { inner, mtu, credit, queued } = self;
        Box::new(Self { inner: inner.clone_box(), mtu: *mtu, credit: *credit, queued: *queued })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MTU: u16 = 1_200;

    fn controller() -> (Box<dyn Controller>, Instant) {
        let now = Instant::now();
        (Arc::new(TolerantConfig::default()).build(now, MTU), now)
    }

    fn lose(controller: &mut Box<dyn Controller>, at: Instant, packets: u64, persistent: bool) {
        controller.on_congestion_event(at, at, persistent, packets * u64::from(MTU));
    }

    #[test]
    fn a_few_sparse_losses_do_not_shrink_the_window_and_a_burst_does() {
        let (mut controller, now) = controller();
        let before = controller.window();
        for i in 1..=5 {
            lose(&mut controller, now + Duration::from_millis(i), 1, false);
        }
        assert_eq!(controller.window(), before);
        lose(&mut controller, now + Duration::from_millis(10), 8, false);
        assert!(controller.window() < before);
    }

    #[test]
    fn losses_that_go_on_without_acknowledgements_use_the_credit_up() {
        let (mut controller, now) = controller();
        let before = controller.window();
        for i in 1..=11 {
            lose(&mut controller, now + Duration::from_millis(i), 1, false);
        }
        assert!(controller.window() < before);
    }

    #[test]
    fn marks_and_persistent_congestion_always_count() {
        let (mut controller, now) = controller();
        let before = controller.window();
        lose(&mut controller, now + Duration::from_millis(1), 0, false);
        let marked = controller.window();
        assert!(marked < before);
        lose(&mut controller, now + Duration::from_millis(500), 1, true);
        assert!(controller.window() < marked);
    }
}
