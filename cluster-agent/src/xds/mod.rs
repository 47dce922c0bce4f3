//! What Envoy gets: configuration computed from the agent's view, and the aggregated, incremental xDS server for it.
//!
//! [`build`] is pure (view → resources); [`delta::DeltaStream`] is the protocol without IO; [`AdsService`] is the thin shell
//! that joins them for each sidecar. Secrets are not served here: keys never leave the sidecar's machine, so the launcher
//! serves them, with [`secret`] and the same protocol core.

mod cluster;
pub mod delta;
mod endpoints;
mod listener;
pub mod names;
mod problems;
mod resources;
mod route;
pub mod secret;
mod service;
mod tls;
mod wire;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

pub use resources::{Resource, Resources, build};
pub use service::AdsService;
