//! The federation's certificate authority, and this node's own identity under it.
//!
//! Decides the names that certificates carry and how long they live; who may ask is decided before
//! ([`crate::federation`], [`crate::admin`], [`crate::nodes`]). Each node of the control plane has a CA of its own, whose
//! key stays in `<stateDir>/ca`; the federation's bundle holds the roots of all. The bundle that was last seen is kept
//! beside it, so that nodes find each other again before any of them has a state.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use isthmus_identity::{
    bundle::{BundleDocument, BundleError, TrustStore},
    ca::{CaError, CertificateAuthority},
    keys::{KeyError, KeyPair},
    svid::{Svid, SvidError},
    tls::IdentitySource,
};
use isthmus_model::{
    ids::{ClusterName, IdError, NodeName, SpiffeId, TrustDomain},
    service::TrustBundle,
};
use isthmus_runtime::files;
use rustls_pki_types::CertificateDer;

/// Life of certificates of agents, gateways, DNS servers and of this node.
pub const COMPONENT_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// The federation's bundle, in the CA's folder.
const BUNDLE: &str = "federation-bundle.json";
/// Life of the first administrator's certificate.
pub const ADMIN_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// The CA and what it made for this node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Authority {
    ca: Arc<CertificateAuthority>,
    own: SpiffeId,
    source: IdentitySource,
    trust: TrustStore,
    bundle: Arc<Mutex<TrustBundle>>,
    /// Where the bundle is kept.
    kept: PathBuf,
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
    /// The federation's bundle.
    #[error("read the federation's trust bundle")]
    Bundle(#[from] BundleError),
    /// The file that it is kept in.
    #[error("use {}", .path.display())]
    Keep {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("{} is damaged: remove it if this control plane has one node, else replace the node", .path.display())]
    Kept {
        /// Which.
        path: PathBuf,
        /// How that shows.
        source: serde_json::Error,
    },
}

impl Authority {
    /// Opens the CA in `<state_dir>/ca` (made if there is none), and makes this node a new certificate.
    pub fn open(state_dir: &Path, federation: &TrustDomain, node: &NodeName) -> Result<Self, AuthorityError> {
        let ca = Arc::new(CertificateAuthority::load_or_create(&state_dir.join("ca"), federation)?);
        let own = SpiffeId::new(federation, &["cp", node.as_str()])?;
        let source = IdentitySource::new(issue(&ca, &own, COMPONENT_LIFETIME)?);
        let kept = state_dir.join("ca").join(BUNDLE);
        let bundle = read(&kept)?.unwrap_or_else(|| ca.bundle());
        let authority =
            Self { ca, own, source, trust: TrustStore::new(), bundle: Arc::new(Mutex::new(bundle.clone())), kept };
        authority.believe(&bundle)?;
        Ok(authority)
    }

    /// Takes the federation's bundle, as the group has agreed on it, into use, and keeps it.
    /// Whether it was another one. One that holds nothing new and is older is not taken: what a node reads when it starts may
    /// be from before the others joined, and without their roots it would never hear of anything later.
    pub fn adopt(&self, bundle: &TrustBundle) -> Result<bool, AuthorityError> {
        let mut held = self.bundle.lock().unwrap_or_else(PoisonError::into_inner);
        if *held == *bundle || is_older(bundle, &held)? {
            return Ok(false);
        }
        self.believe(bundle)?;
        let text =
            serde_json::to_vec(bundle).map_err(|source| AuthorityError::Kept { path: self.kept.clone(), source })?;
        files::write_secret(&self.kept, &text)
            .map_err(|source| AuthorityError::Keep { path: self.kept.clone(), source })?;
        *held = bundle.clone();
        Ok(true)
    }

    fn believe(&self, bundle: &TrustBundle) -> Result<(), AuthorityError> {
        let mut roots = BundleDocument::parse(&bundle.document)?.x509_roots;
        // A node whose root is not in yet must still be able to serve those who were told of it.
        if !roots.contains(self.ca.root_der()) {
            roots.push(self.ca.root_der().clone());
        }
        self.trust.set([(self.federation().clone(), roots)].into());
        Ok(())
    }

    /// The bundle that follows `held`, with `root`; signed by this node's CA, whose root is in `held`.
    pub fn with_root(&self, held: &TrustBundle, root: &[u8]) -> Result<TrustBundle, AuthorityError> {
        let mut document = BundleDocument::parse(&held.document)?;
        let root = CertificateDer::from(root.to_vec());
        if document.x509_roots.contains(&root) {
            return Ok(held.clone());
        }
        document.x509_roots.push(root);
        document.sequence += 1;
        let document = document.to_json()?;
        let predecessor_signature = self.ca.sign_document(document.as_bytes())?;
        Ok(TrustBundle { trust_domain: held.trust_domain.clone(), document, predecessor_signature })
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

    /// Whether this node's root is in `bundle`.
    pub fn is_rooted_in(&self, bundle: &TrustBundle) -> bool {
        BundleDocument::parse(&bundle.document).is_ok_and(|document| document.x509_roots.contains(self.ca.root_der()))
    }

    /// The federation's trust bundle, as last seen.
    pub fn bundle(&self) -> TrustBundle {
        self.bundle.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The bundle of this node's CA alone: the federation's first one, if this node founds it.
    pub fn own_bundle(&self) -> TrustBundle {
        self.ca.bundle()
    }

    /// This node's root: what the tokens that it mints pin.
    pub fn root_sha256(&self) -> [u8; 32] {
        self.ca.root_sha256()
    }

    /// This node's root, DER.
    pub fn root_der(&self) -> &[u8] {
        self.ca.root_der()
    }

    /// All roots of the federation, DER.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.trust.get().get(self.federation()).cloned().unwrap_or_default()
    }

    /// The federation's trust domain.
    pub fn federation(&self) -> &TrustDomain {
        self.ca.trust_domain()
    }

    /// This node's name.
    pub fn own(&self) -> &SpiffeId {
        &self.own
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

fn read(kept: &Path) -> Result<Option<TrustBundle>, AuthorityError> {
    let text = match fs::read(kept) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(AuthorityError::Keep { path: kept.to_owned(), source }),
    };
    serde_json::from_slice(&text).map(Some).map_err(|source| AuthorityError::Kept { path: kept.to_owned(), source })
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

/// The control plane node that `id` is, if it is one of this federation.
pub fn node_of(id: &SpiffeId, federation: &TrustDomain) -> Option<NodeName> {
    if id.trust_domain() != federation {
        return None;
    }
    let mut segments = id.segments();
    match (segments.next(), segments.next(), segments.next()) {
        (Some("cp"), Some(node), None) => node.parse().ok(),
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

fn is_older(bundle: &TrustBundle, than: &TrustBundle) -> Result<bool, AuthorityError> {
    let (bundle, than) = (BundleDocument::parse(&bundle.document)?, BundleDocument::parse(&than.document)?);
    Ok(bundle.sequence < than.sequence && bundle.x509_roots.iter().all(|root| than.x509_roots.contains(root)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_from_before_others_joined_is_not_taken_again() {
        let federation: TrustDomain = "isthmus.example".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let open = || Authority::open(dir.path(), &federation, &"cp-1".parse().unwrap()).unwrap();
        let other = || CertificateAuthority::create(&federation, Duration::from_secs(60)).unwrap();
        let authority = open();
        let first = authority.own_bundle();
        let second = authority.with_root(&first, other().root_der()).unwrap();
        assert!(authority.adopt(&second).unwrap());
        assert!(!authority.adopt(&first).unwrap());
        drop(authority);
        let authority = open();
        assert!(!authority.adopt(&first).unwrap());
        assert_eq!(authority.bundle(), second);
        // Of a control plane that was founded anew, with the same CA: what is in it is new, whatever its number.
        let third = authority.with_root(&second, other().root_der()).unwrap();
        assert!(authority.adopt(&third).unwrap());
        let anew = authority.with_root(&first, other().root_der()).unwrap();
        assert!(authority.adopt(&anew).unwrap());
    }

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
