//! The federation's certificate authority, and this node's own identity under it.
//!
//! Decides the names that certificates carry and how long they live; who may ask is decided before
//! ([`crate::federation`], [`crate::admin`]). The CA's key stays in `<stateDir>/ca`.

use std::{path::Path, sync::Arc, time::Duration};

use isthmus_identity::{
    bundle::TrustStore,
    ca::{CaError, CertificateAuthority},
    keys::{KeyError, KeyPair},
    svid::{Svid, SvidError},
    tls::IdentitySource,
};
use isthmus_model::{
    ids::{ClusterName, IdError, SpiffeId, TrustDomain},
    service::TrustBundle,
};

/// Life of certificates of agents, gateways, DNS servers and of this node.
pub const COMPONENT_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Life of the first administrator's certificate.
pub const ADMIN_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// The CA and what it made for this node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Authority {
    ca: Arc<CertificateAuthority>,
    own: SpiffeId,
    source: IdentitySource,
    trust: TrustStore,
}

/// A part of a cluster that gets a certificate under the federation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// The cluster's agent.
    Agent,
    /// One of its gateways.
    Gateway,
    /// One of its DNS servers.
    Dns,
}

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The CA.
    #[error("use the federation's CA")]
    Ca(#[from] CaError),
    /// A key.
    #[error("make a key")]
    Key(#[from] KeyError),
    /// The signed certificate.
    #[error("take the certificate into use")]
    Svid(#[from] SvidError),
    /// The name.
    #[error("name the certificate's owner")]
    Id(#[from] IdError),
}

impl Authority {
    /// Opens the CA in `<state_dir>/ca` (made if there is none), and makes this node a new certificate.
    pub fn open(state_dir: &Path, federation: &TrustDomain, node: &str) -> Result<Self, AuthorityError> {
        let ca = Arc::new(CertificateAuthority::load_or_create(&state_dir.join("ca"), federation)?);
        let own = SpiffeId::new(federation, &["cp", node])?;
        let trust = TrustStore::new();
        trust.set([(federation.clone(), vec![ca.root_der().clone()])].into());
        let source = IdentitySource::new(issue(&ca, &own, COMPONENT_LIFETIME)?);
        Ok(Self { ca, own, source, trust })
    }

    /// Replaces this node's certificate by a new one, with a new key.
    pub fn renew(&self) -> Result<(), AuthorityError> {
        self.source.set(issue(&self.ca, &self.own, COMPONENT_LIFETIME)?);
        Ok(())
    }

    /// A certificate for a part of `cluster`, for the key that the request proves. Leaf first, root last, DER.
    pub fn sign(
        &self,
        csr: &[u8],
        cluster: &ClusterName,
        component: Component,
    ) -> Result<Vec<Vec<u8>>, AuthorityError> {
        let id = SpiffeId::component(self.ca.trust_domain(), cluster, component.name())?;
        let chain = self.ca.sign_csr(csr, &id, &[], COMPONENT_LIFETIME)?;
        Ok(chain.iter().map(|certificate| certificate.to_vec()).collect())
    }

    /// A key and certificate for an administrator.
    pub fn issue_admin(&self, name: &str) -> Result<Svid, AuthorityError> {
        issue(&self.ca, &SpiffeId::new(self.ca.trust_domain(), &["admin", name])?, ADMIN_LIFETIME)
    }

    /// The federation's trust bundle.
    pub fn bundle(&self) -> TrustBundle {
        self.ca.bundle()
    }

    /// What join tokens pin.
    pub fn root_sha256(&self) -> [u8; 32] {
        self.ca.root_sha256()
    }

    /// The root, DER.
    pub fn root_der(&self) -> &[u8] {
        self.ca.root_der()
    }

    /// The federation's trust domain.
    pub fn federation(&self) -> &TrustDomain {
        self.ca.trust_domain()
    }

    /// This node's certificate.
    pub fn source(&self) -> &IdentitySource {
        &self.source
    }

    /// The roots that peers are verified with: the federation's alone.
    pub fn trust(&self) -> &TrustStore {
        &self.trust
    }
}

impl Component {
    /// The last segment of its SPIFFE ID.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Gateway => "gateway",
            Self::Dns => "dns",
        }
    }
}

fn issue(ca: &CertificateAuthority, id: &SpiffeId, lifetime: Duration) -> Result<Svid, AuthorityError> {
    let key = KeyPair::generate()?;
    let chain = ca.sign_csr(&key.csr_der()?, id, &[], lifetime)?;
    Ok(Svid::new(chain, &key)?)
}

/// The cluster whose agent `id` is, if it is one of this federation.
pub fn agent_of(id: &SpiffeId, federation: &TrustDomain) -> Option<ClusterName> {
    if id.trust_domain() != federation {
        return None;
    }
    let mut segments = id.segments();
    match (segments.next(), segments.next(), segments.next(), segments.next()) {
        (Some("cluster"), Some(cluster), Some("agent"), None) => cluster.parse().ok(),
        _ => None,
    }
}

/// Is `id` an administrator of this federation?
pub fn is_admin(id: &SpiffeId, federation: &TrustDomain) -> bool {
    let mut segments = id.segments();
    id.trust_domain() == federation
        && segments.next() == Some("admin")
        && segments.next().is_some()
        && segments.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_agents_identity_of_this_federation_names_a_cluster() {
        let federation: TrustDomain = "isthmus.example".parse().unwrap();
        let cluster = |text: &str| agent_of(&text.parse().unwrap(), &federation).map(|c| c.to_string());
        assert_eq!(cluster("spiffe://isthmus.example/cluster/us-east/agent").as_deref(), Some("us-east"));
        for other in [
            "spiffe://isthmus.example/cluster/us-east/gateway",
            "spiffe://isthmus.example/cluster/us-east/agent/x",
            "spiffe://isthmus.example/cluster/us_east/agent",
            "spiffe://us-east.example/cluster/us-east/agent",
            "spiffe://isthmus.example/admin/root",
        ] {
            assert_eq!(cluster(other), None, "{other}");
        }
    }

    #[test]
    fn administrators_are_named_under_admin() {
        let federation: TrustDomain = "isthmus.example".parse().unwrap();
        let admin = |text: &str| is_admin(&text.parse().unwrap(), &federation);
        assert!(admin("spiffe://isthmus.example/admin/root"));
        assert!(!admin("spiffe://isthmus.example/admin"));
        assert!(!admin("spiffe://other.example/admin/root"));
        assert!(!admin("spiffe://isthmus.example/cluster/us-east/agent"));
    }
}
