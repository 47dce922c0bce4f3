//! Where the gateway's identity and its view come from.
//!
//! From the cluster's agent: enrolled once with a one-time token ([`isthmus_identity::enrol`]), then a stream that reconnects
//! for ever ([`agent`]), with the last known good state on disk to begin from ([`disk`]). Or given from outside, for tests
//! and embedders.

mod agent;
mod disk;
mod refused;

use std::sync::Arc;

use isthmus_identity::{bundle::TrustStore, tls::IdentitySource};
use isthmus_model::ids::{ClusterName, TrustDomain};
use tokio::sync::watch;

pub(crate) use self::agent::Agent;
use crate::view::View;

/// Where the gateway's identity and its view come from.
#[derive(Debug)]
pub enum Feed {
    /// The cluster's agent, as configured.
    Agent,
    /// Whoever holds the other ends.
    Given(Given),
}

/// An identity and a view that are managed elsewhere.
#[derive(Debug)]
pub struct Given {
    /// The gateway's own cluster.
    pub cluster: ClusterName,
    /// The federation's trust domain.
    pub federation: TrustDomain,
    /// The gateway's certificate.
    pub identity: IdentitySource,
    /// The federation's roots.
    pub trust: TrustStore,
    /// What it is told.
    pub view: watch::Receiver<Arc<View>>,
}
