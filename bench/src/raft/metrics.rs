//! What is measured, by name: units, which way is good, and the goals.

use crate::report::{Better, Contest, Goal, Metric, table::Column};

pub(super) const OURS: &str = "ours";
pub(super) const ETCD: &str = "etcd";

pub(super) const CONTEST: Contest = Contest { ours: &[OURS], rivals: &[ETCD] };
pub(super) const COLUMNS: [Column; 2] =
    [Column { system: ETCD, title: "etcd" }, Column { system: OURS, title: "ours" }];
pub(super) const GROUPS: [(&str, &str); 1] =
    [("raft", "Committed writes, three nodes on one disk, each write flushed by a majority")];

fn metric(quantity: &str, (unit, better): (&'static str, Better), writers: u16) -> Metric {
    let params = [("writers", writers.into())].into();
    Metric { group: "raft", quantity: quantity.to_owned(), params, unit, better, goals: Vec::new() }
}

/// One writer waits for the disk and nothing else; many share its flushes.
pub(super) fn throughput(writers: u16) -> Metric {
    let limit = if writers >= 64 { 1.5 } else { 1.0 };
    Metric { goals: goal(limit), ..metric("writes", ("1/s", Better::Higher), writers) }
}

/// `quantile` is a field of [`crate::load::histogram::Summary`].
pub(super) fn latency(quantile: &str, writers: u16) -> Metric {
    let goals = if quantile == "p99" { goal(1.0) } else { Vec::new() };
    Metric { goals, ..metric(&format!("latency {quantile}"), ("µs", Better::Lower), writers) }
}

pub(super) fn cpu(writers: u16) -> Metric {
    metric("CPU of all nodes per write", ("µs", Better::Lower), writers)
}

fn goal(limit: f64) -> Vec<Goal> {
    vec![Goal { ours: OURS, rivals: &[ETCD], limit }]
}
