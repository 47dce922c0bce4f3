//! Plots of what was measured, as SVG.
//!
//! In: the benchmarks' files, read by [`super::read`]. Out: named drawings. One colour for each system throughout, values written
//! beside their marks. Four forms: [`bars`] for amounts, [`ranges`] for latencies (p50 to p99.9, logarithmic), [`timeline`] for
//! what a fault did over time, [`growth`] for what grows. What belongs in which is in [`gateway`]; nothing is computed here but medians.

mod bars;
mod gateway;
mod grid;
mod growth;
mod ranges;
mod svg;
mod timeline;

use super::read::{Fault, Gateway};

/// A drawing and what it is called.
#[derive(Debug)]
pub(crate) struct Plot {
    /// Of its file.
    pub(crate) name: &'static str,
    /// What it shows, for those who read and for those who cannot see it.
    pub(crate) title: String,
    pub(crate) svg: String,
}

/// All of the data path that was measured.
pub(crate) fn gateway(measured: &Gateway) -> Vec<Plot> {
    gateway::plots(measured)
}

/// Committed writes.
pub(crate) fn raft(measured: &Gateway) -> Vec<Plot> {
    gateway::plots(measured)
}

/// What more agents cost.
pub(crate) fn agents(measured: &Gateway) -> Vec<Plot> {
    growth::plot(measured).into_iter().collect()
}

/// Faults over time; `None` without measurements.
pub(crate) fn failover(faults: &[Fault]) -> Option<Plot> {
    timeline::plot(faults)
}

/// A system as readers see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct System {
    /// In the measurements.
    pub(crate) name: &'static str,
    /// On the page.
    pub(crate) title: &'static str,
    colour: &'static str,
}

/// In the order in which they are shown. Ours are cold, Envoy's are warm, what is no rival is grey; all of a lightness that stands
/// out from white and from black.
const SYSTEMS: [System; 12] = [
    System { name: "raw", title: "raw TCP", colour: "#8b949e" },
    System { name: "envoy-sni", title: "Envoy SNI", colour: "#b08d57" },
    System { name: "envoy-h2", title: "Envoy H2", colour: "#e0762b" },
    System { name: "envoy-h3", title: "Envoy H3", colour: "#d6589f" },
    System { name: "ours-quic", title: "ours QUIC", colour: "#3d8bfd" },
    System { name: "ours-tcp", title: "ours TCP", colour: "#1fa38c" },
    System { name: "ours", title: "ours", colour: "#3d8bfd" },
    System { name: "istio", title: "Envoy, Istio's defaults", colour: "#e0762b" },
    System { name: "istio-100", title: "the same, may eject all", colour: "#d6589f" },
    System { name: "istio-h2", title: "the same, HTTP/2", colour: "#9b7fd4" },
    System { name: "etcd", title: "etcd", colour: "#e0762b" },
    System { name: "tuned", title: "Envoy, tuned", colour: "#b08d57" },
];

/// Those of `names`, in their order; a name that is not known here is not shown.
pub(crate) fn systems<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<System> {
    let names: Vec<&str> = names.into_iter().collect();
    SYSTEMS.into_iter().filter(|system| names.contains(&system.name)).collect()
}

/// What to call it on the page.
pub(crate) fn title(name: &str) -> &str {
    SYSTEMS.iter().find(|system| system.name == name).map_or(name, |system| system.title)
}
