//! The verifiers: leaf rules, then the chain with the roots of the leaf's own trust domain, then the caller's policy.
//!
//! What holds: roots of different trust domains never meet in one verification; roots that the peer sends are not used
//! for building paths. A client gets the whole reason as an error; a server logs it and sends the alert that fits.

use std::{fmt, sync::Arc};

use isthmus_model::{
    ids::{SpiffeId, TrustDomain},
    time::Timestamp,
};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::{PeerPolicy, pinned::PinnedRoot};
use crate::{
    bundle::{TrustStore, store::Anchor},
    rfc3339,
    svid::{MAX_CHAIN, SvidError},
    x509,
};

/// Which check a peer's certificate failed. `Debug` is as `Display`, because rustls prints errors of verifiers by `Debug`.
#[derive(thiserror::Error)]
pub enum PeerError {
    /// The leaf is no X.509-SVID.
    #[error("the peer's certificate is not an SVID: {0}")]
    Leaf(SvidError),
    /// Too many certificates.
    #[error("the peer sent {0} certificates; at most 8 are allowed")]
    ChainLength(usize),
    /// No roots for its domain.
    #[error("{id}: no roots are known for trust domain {domain}")]
    UnknownTrustDomain {
        /// Who it claims to be.
        id: SpiffeId,
        /// The domain it claims.
        domain: TrustDomain,
    },
    /// All roots of its domain are past their lives.
    #[error("{id}: every root of its trust domain has expired")]
    RootsExpired {
        /// Who it claims to be.
        id: SpiffeId,
    },
    /// The certificate, or one above it, is past its life.
    #[error("{id}: its certificate expired at {at}; is it not being renewed, or is a clock wrong?")]
    Expired {
        /// Who it claims to be.
        id: SpiffeId,
        /// RFC 3339.
        at: String,
    },
    /// The certificate, or one above it, is not valid yet.
    #[error("{id}: its certificate is valid only from {from}; is a clock wrong?")]
    NotYetValid {
        /// Who it claims to be.
        id: SpiffeId,
        /// RFC 3339.
        from: String,
    },
    /// The chain does not verify.
    #[error("{id}: the chain does not verify with the roots of its trust domain: {reason}")]
    Chain {
        /// Who it claims to be.
        id: SpiffeId,
        /// Why not.
        reason: webpki::Error,
    },
    /// The pinned root is not in the chain.
    #[error(
        "{id}: the pinned root is not in its chain; the token is for another federation, or this is not its server"
    )]
    NotPinned {
        /// Who it claims to be.
        id: SpiffeId,
    },
    /// The pinned certificate is no root for the peer's trust domain.
    #[error("{id}: the pinned certificate is not a root of its trust domain")]
    PinnedRoot {
        /// Who it claims to be.
        id: SpiffeId,
    },
    /// Verified, but not wanted here.
    #[error("{id} is not accepted here")]
    Refused {
        /// Who it is.
        id: SpiffeId,
    },
}

impl fmt::Debug for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where roots come from.
pub(super) enum Roots {
    Store(TrustStore),
    Pinned(PinnedRoot),
}

/// The checks common to both sides.
pub(super) struct Verifier {
    roots: Roots,
    policy: PeerPolicy,
    algorithms: WebPkiSupportedAlgorithms,
    usage: KeyUsage,
}

impl Verifier {
    /// For clients' certificates, on the server.
    pub(super) fn for_servers(roots: Roots, policy: PeerPolicy, provider: &CryptoProvider) -> Self {
        let algorithms = provider.signature_verification_algorithms;
        Self { roots, policy, algorithms, usage: KeyUsage::client_auth() }
    }

    /// For servers' certificates, on the client.
    pub(super) fn for_clients(roots: Roots, policy: PeerPolicy, provider: &CryptoProvider) -> Self {
        let algorithms = provider.signature_verification_algorithms;
        Self { roots, policy, algorithms, usage: KeyUsage::server_auth() }
    }

    fn verify(&self, leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>], now: UnixTime) -> Result<(), PeerError> {
        if others.len() >= MAX_CHAIN {
            return Err(PeerError::ChainLength(others.len() + 1));
        }
        let id = x509::leaf(leaf).map_err(PeerError::Leaf)?.id;
        let at = Timestamp(now.as_secs().saturating_mul(1000));
        match &self.roots {
            Roots::Store(store) => {
                let domain = id.trust_domain();
                let anchors = store.anchors(domain).filter(|anchors| !anchors.is_empty());
                let anchors =
                    anchors.ok_or_else(|| PeerError::UnknownTrustDomain { id: id.clone(), domain: domain.clone() })?;
                let live: Vec<_> = anchors.iter().filter(|a| a.not_after >= at).map(|a| a.anchor.clone()).collect();
                if live.is_empty() {
                    return Err(PeerError::RootsExpired { id });
                }
                self.chain(&id, leaf, others, &live, now)?;
                self.judge(id)
            }
            Roots::Pinned(pinned) => {
                let root = pinned.pick(others).ok_or_else(|| PeerError::NotPinned { id: id.clone() })?;
                let root = root.clone().into_owned();
                let vouches = x509::root(&root).is_ok_and(|r| r.trust_domain.as_ref() == Some(id.trust_domain()));
                let anchor = Anchor::of(&root).filter(|_| vouches);
                let anchor = anchor.ok_or_else(|| PeerError::PinnedRoot { id: id.clone() })?;
                if anchor.not_after < at {
                    return Err(PeerError::RootsExpired { id });
                }
                self.chain(&id, leaf, others, &[anchor.anchor], now)?;
                self.judge(id)?;
                pinned.verified(root);
                Ok(())
            }
        }
    }

    fn chain(
        &self,
        id: &SpiffeId,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        anchors: &[TrustAnchor<'_>],
        now: UnixTime,
    ) -> Result<(), PeerError> {
        let time = |t: UnixTime| rfc3339(Timestamp(t.as_secs().saturating_mul(1000)));
        let fail = |source| match source {
            webpki::Error::CertExpired { not_after, .. } => PeerError::Expired { id: id.clone(), at: time(not_after) },
            webpki::Error::CertNotValidYet { not_before, .. } => {
                PeerError::NotYetValid { id: id.clone(), from: time(not_before) }
            }
            reason => PeerError::Chain { id: id.clone(), reason },
        };
        let leaf = EndEntityCert::try_from(leaf).map_err(fail)?;
        // Our servers send their root too, for pinning clients. As an intermediate it would only be a distraction.
        let intermediates: Vec<_> = others.iter().filter(|c| !x509::is_self_issued(c)).cloned().collect();
        leaf.verify_for_usage(self.algorithms.all, anchors, &intermediates, now, self.usage, None, None)
            .map(drop)
            .map_err(fail)
    }

    fn judge(&self, id: SpiffeId) -> Result<(), PeerError> {
        if (self.policy)(&id) { Ok(()) } else { Err(PeerError::Refused { id }) }
    }

    fn tls13(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, dss, &self.algorithms)
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

/// Verifies clients.
#[derive(Debug)]
pub(super) struct OfClients {
    pub(super) verifier: Verifier,
    pub(super) mandatory: bool,
}

impl ClientCertVerifier for OfClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Which domains we trust is nobody's business, and ours present what they have anyway.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verdict = self.verifier.verify(leaf, others, now);
        verdict.map(|()| ClientCertVerified::assertion()).map_err(|reason| {
            // The alert cannot carry the reason, so this is where it is told.
            tracing::debug!(%reason, "client certificate refused");
            Error::InvalidCertificate(alert_for(&reason))
        })
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.tls13(message, leaf, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.algorithms.supported_schemes()
    }
}

/// Verifies servers.
#[derive(Debug)]
pub(super) struct OfServers {
    pub(super) verifier: Verifier,
}

impl ServerCertVerifier for OfServers {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verdict = self.verifier.verify(leaf, others, now);
        verdict
            .map(|()| ServerCertVerified::assertion())
            .map_err(|reason| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(reason)))))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.tls13(message, leaf, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.algorithms.supported_schemes()
    }
}

/// The rustls error whose TLS alert (RFC 8446, 6.2) fits.
fn alert_for(reason: &PeerError) -> CertificateError {
    match reason {
        PeerError::Leaf(_) | PeerError::ChainLength(_) => CertificateError::BadEncoding,
        PeerError::Expired { .. } => CertificateError::Expired,
        PeerError::NotYetValid { .. } => CertificateError::NotValidYet,
        PeerError::Refused { .. } => CertificateError::ApplicationVerificationFailure,
        PeerError::UnknownTrustDomain { .. }
        | PeerError::RootsExpired { .. }
        | PeerError::Chain { .. }
        | PeerError::NotPinned { .. }
        | PeerError::PinnedRoot { .. } => CertificateError::UnknownIssuer,
    }
}
