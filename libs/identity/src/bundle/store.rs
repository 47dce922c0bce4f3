//! All trust domains' roots, swapped as a whole. Every verifier reads it at the moment of verification, so a change
//! counts from the next handshake on.

use std::{collections::BTreeMap, fmt, sync::Arc};

use arc_swap::ArcSwap;
use isthmus_model::{ids::TrustDomain, time::Timestamp};
use rustls_pki_types::{CertificateDer, TrustAnchor};
use webpki::anchor_from_trusted_cert;

use crate::x509;

/// The roots of each trust domain. Clones share one store.
#[derive(Clone, Default)]
pub struct TrustStore(Arc<ArcSwap<Content>>);

#[derive(Default)]
struct Content {
    roots: Arc<BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>>,
    anchors: BTreeMap<TrustDomain, Arc<[Anchor]>>,
}

/// A root as webpki wants it.
pub(crate) struct Anchor {
    pub(crate) anchor: TrustAnchor<'static>,
    /// webpki does not look at a root's own validity.
    pub(crate) not_after: Timestamp,
}

impl TrustStore {
    /// An empty store: nobody is trusted.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces everything. A certificate that is no usable root is left out of verification, with a warning.
    pub fn set(&self, roots: BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>) {
        let anchors = roots.iter().map(|(domain, roots)| (domain.clone(), anchors(domain, roots))).collect();
        self.0.store(Arc::new(Content { roots: Arc::new(roots), anchors }));
    }

    /// What was last set.
    pub fn get(&self) -> Arc<BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>> {
        Arc::clone(&self.0.load().roots)
    }

    /// `None` if the domain is unknown.
    pub(crate) fn anchors(&self, domain: &TrustDomain) -> Option<Arc<[Anchor]>> {
        self.0.load().anchors.get(domain).cloned()
    }
}

impl fmt::Debug for TrustStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let content = self.0.load();
        f.debug_map().entries(content.roots.iter().map(|(domain, roots)| (domain, roots.len()))).finish()
    }
}

impl Anchor {
    pub(crate) fn of(root: &CertificateDer<'static>) -> Option<Self> {
        let facts = x509::root(root).ok()?;
        Some(Self { anchor: anchor_from_trusted_cert(root).ok()?.to_owned(), not_after: facts.not_after })
    }
}

fn anchors(domain: &TrustDomain, roots: &[CertificateDer<'static>]) -> Arc<[Anchor]> {
    let anchor = |root| {
        let anchor = Anchor::of(root);
        if anchor.is_none() {
            tracing::warn!(trust_domain = %domain, "a root certificate is not usable and is left out");
        }
        anchor
    };
    roots.iter().filter_map(anchor).collect()
}
