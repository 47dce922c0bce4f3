//! The measurements, one module each. In every round all systems take their turn, so that what changes on the machine meanwhile
//! meets all of them.

pub(super) mod bulk;
pub(super) mod connect;
pub(super) mod exchange;
pub(super) mod memory;
pub(super) mod wan;

use crate::{gateway::samples::Samples, load::histogram::Summary};

const MICRO: f64 = 1e-6;

/// The quantiles that are reported.
const NAMES: [&str; 4] = ["p50", "p90", "p99", "p99.9"];

/// Their values, by name.
fn quantiles(latency: &Summary) -> [(&'static str, f64); 4] {
    [("p50", latency.p50), ("p90", latency.p90), ("p99", latency.p99), ("p99.9", latency.p999)]
}

/// Says so where something was lost: a latency without it would be too good.
fn note_failures(samples: &mut Samples, what: &str, system: &str, failed: u64) {
    if failed > 0 {
        samples.note(format!("{what}, {system}: {failed} failed"));
    }
}

fn millis(micros: f64) -> String {
    format!("{:.2} ms", micros / 1e3)
}
