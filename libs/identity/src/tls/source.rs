//! Where the certificate that we show comes from: a cell that renewal swaps in place.

use std::{fmt, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::svid::Svid;

/// The current SVID. Clones share one cell; a new SVID counts from the next handshake on.
#[derive(Clone)]
pub struct IdentitySource(Arc<ArcSwap<Svid>>);

impl IdentitySource {
    /// Starts with `svid`.
    pub fn new(svid: Svid) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(svid)))
    }

    /// Replaces the SVID.
    pub fn set(&self, svid: Svid) {
        self.0.store(Arc::new(svid));
    }

    /// The SVID as of now.
    pub fn current(&self) -> Arc<Svid> {
        self.0.load_full()
    }
}

impl fmt::Debug for IdentitySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IdentitySource").field(&*self.current()).finish()
    }
}

impl ResolvesServerCert for IdentitySource {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified())
    }
}

impl ResolvesClientCert for IdentitySource {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
