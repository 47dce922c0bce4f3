//! What is measured, by name: units, which way is good, and the goals.

use serde_json::Value;

use crate::{
    load::command::Way,
    report::{Better, Contest, Goal, Metric, table::Column},
};

/// Groups with their headings, in the order of the table.
pub(super) const GROUPS: [(&str, &str); 5] = [
    ("bulk", "Bulk, one way"),
    ("rr", "Requests and answers of 256 bytes on warm connections"),
    ("connect", "New connections, from connect to the server's first byte"),
    ("memory", "Memory of both sides for each connection, above the empty processes"),
    ("wan", "Over a long path (loss in each direction)"),
];

pub(super) const COLUMNS: [Column; 6] = [
    Column { system: "raw", title: "raw TCP" },
    Column { system: "envoy-sni", title: "Envoy SNI" },
    Column { system: "envoy-h2", title: "Envoy H2" },
    Column { system: "envoy-h3", title: "Envoy H3" },
    Column { system: "ours-quic", title: "ours QUIC" },
    Column { system: "ours-tcp", title: "ours TCP" },
];

/// Same protection: mutual TLS between the sides.
pub(super) const CONTEST: Contest = Contest { ours: &[QUIC, TCP], rivals: &[H2, H3] };

const QUIC: &str = "ours-quic";
const TCP: &str = "ours-tcp";
const H2: &str = "envoy-h2";
const H3: &str = "envoy-h3";

/// Both of ours against the best of both.
fn both(limit: f64) -> Vec<Goal> {
    [QUIC, TCP].into_iter().map(|ours| Goal { ours, rivals: &[H2, H3], limit }).collect()
}

/// Each against Envoy over the same transport.
fn like_for_like(quic: f64, tcp: f64) -> Vec<Goal> {
    vec![Goal { ours: QUIC, rivals: &[H3], limit: quic }, Goal { ours: TCP, rivals: &[H2], limit: tcp }]
}

fn metric<const N: usize>(
    group: &'static str,
    quantity: &str,
    unit: (&'static str, Better),
    params: [(&'static str, Value); N],
) -> Metric {
    let (unit, better) = unit;
    Metric { group, quantity: quantity.to_owned(), params: params.into(), unit, better, goals: Vec::new() }
}

const LATENCY: (&str, Better) = ("µs", Better::Lower);
const SPEED: (&str, Better) = ("bit/s", Better::Higher);
const PER_SECOND: (&str, Better) = ("1/s", Better::Higher);

fn direction(way: Way) -> &'static str {
    match way {
        Way::Down => "server to client",
        Way::Up => "client to server",
    }
}

pub(super) fn bulk(way: Way, streams: usize) -> Metric {
    let metric = metric("bulk", &format!("throughput {}", direction(way)), SPEED, [("streams", streams.into())]);
    Metric { goals: like_for_like(1.5, 1.2), ..metric }
}

pub(super) fn bulk_cpu(way: Way, streams: usize) -> Metric {
    let quantity = format!("CPU of both sides {}", direction(way));
    metric("bulk", &quantity, ("s/GB", Better::Lower), [("streams", streams.into())])
}

pub(super) fn closed(connections: usize) -> Metric {
    metric("rr", "requests, one after the other", PER_SECOND, [("connections", connections.into())])
}

/// `quantile` is a field of [`crate::load::histogram::Summary`].
pub(super) fn paced(quantile: &str, connections: usize) -> Metric {
    let metric = metric("rr", &format!("latency {quantile}"), LATENCY, [("connections", connections.into())]);
    let goals = if quantile == "p99" { both(1.0) } else { Vec::new() };
    Metric { goals, ..metric }
}

pub(super) fn paced_cpu(connections: usize) -> Metric {
    metric("rr", "CPU of both sides per request", ("µs", Better::Lower), [("connections", connections.into())])
}

pub(super) fn connects(at_once: usize) -> Metric {
    metric("connect", "new connections", PER_SECOND, [("at once", at_once.into())])
}

pub(super) fn connect_latency(quantile: &str) -> Metric {
    metric("connect", &format!("latency {quantile}"), LATENCY, [("at once", 1.into())])
}

pub(super) fn idle_memory(connections: usize) -> Metric {
    let metric = metric("memory", "idle", ("bytes", Better::Lower), [("connections", connections.into())]);
    Metric { goals: both(0.5), ..metric }
}

pub(super) fn busy_memory(connections: usize) -> Metric {
    let metric = metric("memory", "busy", ("bytes", Better::Lower), [("connections", connections.into())]);
    Metric { goals: both(0.5), ..metric }
}

pub(super) fn empty_memory() -> Metric {
    metric("memory", "both sides, empty", ("bytes", Better::Lower), [])
}

pub(super) fn wan_paced(quantile: &str, connections: usize, loss: f64) -> Metric {
    let params = [("connections", connections.into()), ("loss", loss.into())];
    let metric = metric("wan", &format!("request latency {quantile}"), LATENCY, params);
    let goals = if quantile == "p99" && loss == 1.0 { both(0.5) } else { Vec::new() };
    Metric { goals, ..metric }
}

pub(super) fn wan_connect(quantile: &str, loss: f64) -> Metric {
    let metric = metric("wan", &format!("new connection {quantile}"), LATENCY, [("loss", loss.into())]);
    let goals = if quantile == "p50" && loss == 0.0 { both(0.6) } else { Vec::new() };
    Metric { goals, ..metric }
}

pub(super) fn wan_bulk(streams: usize, loss: f64) -> Metric {
    let quantity = format!("throughput {}", direction(Way::Down));
    metric("wan", &quantity, SPEED, [("streams", streams.into()), ("loss", loss.into())])
}
