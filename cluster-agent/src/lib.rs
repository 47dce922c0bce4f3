//! The cluster agent: one per cluster. It watches the cluster's manifests, publishes exports to the global control plane,
//! takes the federation's state from it, and feeds the cluster's Envoys (ADS), gateways, DNS servers and sidecar
//! launchers; it signs the cluster's workload certificates.
//!
//! State flows one way: `source` (files) and `uplink` (control plane) and the feeds of `local` send facts to `hub`, the
//! one writer, which publishes an immutable [`view::View`]; `xds` and the feeds read it. Nobody reaches back.
//! `sidecar` is another role of the same binary: the launcher beside a workload.

mod agent;
mod app;
pub mod config;
mod debug;
pub mod hub;
pub mod index;
pub mod local;
pub mod lock;
mod metrics;
pub mod sidecar;
pub mod source;
pub mod status;
pub mod uplink;
pub mod view;
pub mod xds;

pub use self::{
    app::{Bound, BuildError, build},
    config::Config,
};
