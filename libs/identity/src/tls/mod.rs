//! TLS configurations for everything that Isthmus parts say to each other: mutual TLS 1.3 by SPIFFE ID, for TCP and for
//! QUIC (quinn) alike.
//!
//! What holds: no session tickets, no resumption, no early data; DNS names are not looked at, SPIFFE IDs are; the
//! certificate shown and the roots trusted are read at each handshake, so renewals and revocations count from the next
//! one on. Live connections are not touched: whoever holds them must close them.

mod pinned;
mod source;
mod verify;

use std::sync::Arc;

use isthmus_model::ids::SpiffeId;
use rustls::{
    CipherSuite, ClientConfig, ServerConfig, client::Resumption, crypto::CryptoProvider, server::NoServerSessionStorage,
};
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};

use self::verify::{Roots, Verifier};
pub use self::{pinned::PinnedRoot, source::IdentitySource, verify::PeerError};
use crate::{bundle::TrustStore, svid};

/// Which SPIFFE IDs are acceptable, judged after the chain verified with its own trust domain's roots.
pub type PeerPolicy = Arc<dyn Fn(&SpiffeId) -> bool + Send + Sync>;

/// Whether clients must show a certificate. One that is shown must be acceptable in either case.
#[derive(Clone)]
pub enum ClientAuth {
    /// No handshake without one.
    Required(PeerPolicy),
    /// [`peer_id`] tells whether there was one.
    Optional(PeerPolicy),
}

/// Why a TLS configuration could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls refused.
    #[error("configure TLS")]
    Rustls(#[from] rustls::Error),
}

/// For servers. `source` is shown to clients; `alpn` in order of preference, empty for none.
pub fn server_config(
    source: &IdentitySource,
    trust: &TrustStore,
    auth: ClientAuth,
    alpn: &[&[u8]],
) -> Result<ServerConfig, TlsError> {
    let (policy, mandatory) = match auth {
        ClientAuth::Required(policy) => (policy, true),
        ClientAuth::Optional(policy) => (policy, false),
    };
    let provider = provider();
    let verifier = Verifier::for_servers(Roots::Store(trust.clone()), policy, &provider);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verify::OfClients { verifier, mandatory }))
        .with_cert_resolver(Arc::new(source.clone()));
    config.alpn_protocols = protocols(alpn);
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// For clients. `source`, if any, is shown to servers that ask; `peer` judges the server.
pub fn client_config(
    source: Option<&IdentitySource>,
    trust: &TrustStore,
    peer: PeerPolicy,
    alpn: &[&[u8]],
) -> Result<ClientConfig, TlsError> {
    client(source, Roots::Store(trust.clone()), peer, alpn)
}

/// For a newcomer with a token: trusts only a chain that contains the root with this SHA-256, which signs for the peer's
/// trust domain. After the handshake [`PinnedRoot::get`] gives that root. ALPN is "h2", for gRPC.
pub fn pinned_client_config(pin: [u8; 32], peer: PeerPolicy) -> Result<(ClientConfig, PinnedRoot), TlsError> {
    let root = PinnedRoot::new(pin);
    let config = client(None, Roots::Pinned(root.clone()), peer, &[b"h2"])?;
    Ok((config, root))
}

/// The SPIFFE ID of a peer, from the certificates of a *finished* handshake under one of this module's configurations.
pub fn peer_id(certificates: Option<&[CertificateDer<'_>]>) -> Option<SpiffeId> {
    svid::spiffe_id_of(certificates?.first()?).ok()
}

/// SHA-256, as used for pins.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn client(
    source: Option<&IdentitySource>,
    roots: Roots,
    peer: PeerPolicy,
    alpn: &[&[u8]],
) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier = Verifier::for_clients(roots, peer, &provider);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verify::OfServers { verifier }));
    let mut config = match source {
        Some(source) => builder.with_client_cert_resolver(Arc::new(source.clone())),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = protocols(alpn);
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

/// AES-128 first: as good as unbreakable, and a fifth cheaper per byte than AES-256, which stays on offer.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

fn protocols(alpn: &[&[u8]]) -> Vec<Vec<u8>> {
    alpn.iter().map(|protocol| protocol.to_vec()).collect()
}

#[cfg(test)]
mod tests;
