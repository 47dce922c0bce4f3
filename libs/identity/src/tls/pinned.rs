//! The root that a token pins: known by digest before the first handshake, as a certificate after it.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use rustls_pki_types::CertificateDer;

use super::sha256;

/// A pinned root. Clones share what was found.
#[derive(Clone, Debug)]
pub struct PinnedRoot {
    pin: [u8; 32],
    found: Arc<ArcSwapOption<CertificateDer<'static>>>,
}

impl PinnedRoot {
    pub(super) fn new(pin: [u8; 32]) -> Self {
        Self { pin, found: Arc::default() }
    }

    /// The root, once a server's chain verified with it.
    pub fn get(&self) -> Option<CertificateDer<'static>> {
        self.found.load().as_deref().cloned()
    }

    /// The certificate that the pin means, if it is among those presented.
    pub(super) fn pick<'a>(&self, presented: &'a [CertificateDer<'a>]) -> Option<&'a CertificateDer<'a>> {
        presented.iter().find(|certificate| sha256(certificate) == self.pin)
    }

    pub(super) fn verified(&self, root: CertificateDer<'static>) {
        self.found.store(Some(Arc::new(root)));
    }
}
