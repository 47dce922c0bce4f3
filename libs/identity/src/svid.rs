//! X.509 SVIDs: a key, the certificate chain for it, and the SPIFFE ID in the leaf.
//!
//! In: what a CA signed, or files. Out: what TLS configurations and Envoy present. An [`Svid`] exists only if its leaf
//! obeys the SVID rules (SPIFFE X509-SVID, 4 and 5.2) and belongs to its key. Whether it is trusted, or still valid, is
//! for the verifier to judge.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use isthmus_model::{
    ids::{IdError, SpiffeId},
    time::Timestamp,
};
use isthmus_runtime::files;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;

use crate::{
    keys::{KeyError, KeyPair},
    pem, x509,
};

/// Longest chain that is looked at: leaf, intermediates, root.
pub(crate) const MAX_CHAIN: usize = 8;

/// Why a certificate is no SVID, or an SVID could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// Not parseable as one X.509 certificate.
    #[error("not a well-formed X.509 certificate")]
    Malformed,
    /// An SVID has exactly one.
    #[error("the certificate has {0} URI names; an SVID has exactly one")]
    UriSans(usize),
    /// The URI is no SPIFFE ID.
    #[error("the certificate's URI name is not a SPIFFE ID: {0}")]
    Id(IdError),
    /// A leaf must not be a CA.
    #[error("the certificate is a CA's; a leaf SVID must not be")]
    IsCa,
    /// A leaf must not sign certificates or revocation lists.
    #[error("the certificate may sign certificates or revocation lists; a leaf SVID must not")]
    SignsCertificates,
    /// A leaf signs handshakes.
    #[error("the certificate lacks the key usage digitalSignature")]
    NoDigitalSignature,
    /// No certificate at all, or too many.
    #[error("the chain has {0} certificates; 1 to 8 are allowed")]
    ChainLength(usize),
    /// Key and leaf do not belong together.
    #[error("the private key does not belong to the certificate of {id}")]
    KeyMismatch {
        /// Whose certificate.
        id: SpiffeId,
    },
    /// A certificate file holds something else.
    #[error("{path} does not hold PEM certificates; restore it, or remove it and join again")]
    BadFile {
        /// The file.
        path: PathBuf,
    },
    /// The chain is there but no key that fits it.
    #[error("{path} holds no private key that fits the certificate next to it; remove both and join again")]
    NoFittingKey {
        /// The key file.
        path: PathBuf,
    },
    /// Reading failed.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Writing failed.
    #[error("write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The key is unusable.
    #[error("use the SVID's private key")]
    Key(#[from] KeyError),
}

/// A key with its certificate chain, leaf first; cheap to clone.
#[derive(Clone)]
pub struct Svid {
    id: SpiffeId,
    not_before: Timestamp,
    not_after: Timestamp,
    key: KeyPair,
    certified: Arc<CertifiedKey>,
}

impl Svid {
    /// Joins a chain (leaf first) and its key, if the leaf obeys the SVID rules and belongs to the key.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Result<Self, SvidError> {
        let leaf = match chain.as_slice() {
            [leaf, rest @ ..] if rest.len() < MAX_CHAIN => x509::leaf(leaf)?,
            other => return Err(SvidError::ChainLength(other.len())),
        };
        if leaf.public_key != key.public_key() {
            return Err(SvidError::KeyMismatch { id: leaf.id });
        }
        let certified = Arc::new(CertifiedKey::new(chain, key.tls_key()?));
        Ok(Self { id: leaf.id, not_before: leaf.not_before, not_after: leaf.not_after, key: key.clone(), certified })
    }

    /// Whose.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// From when on the leaf is valid.
    pub fn not_before(&self) -> Timestamp {
        self.not_before
    }

    /// Until when the leaf is valid.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// The certificates, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The chain as PEM, leaf first.
    pub fn chain_pem(&self) -> String {
        pem::encode_certificates(self.chain())
    }

    /// The key pair, for renewing with the same key.
    pub fn key(&self) -> &KeyPair {
        &self.key
    }

    /// The private key as PKCS#8 PEM. Secret.
    pub fn key_pem(&self) -> String {
        self.key.to_pem()
    }

    /// Reads `<name>.pem` and `<name>.key`; `None` if there is no certificate file.
    pub fn load(dir: &Path, name: &str) -> Result<Option<Self>, SvidError> {
        let (chain_path, key_path) = paths(dir, name);
        let Some(text) = read(&chain_path)? else { return Ok(None) };
        let chain = pem::decode_certificates(&text)
            .filter(|chain| !chain.is_empty())
            .ok_or_else(|| SvidError::BadFile { path: chain_path.clone() })?;
        for key in fitting_keys(&read(&key_path)?.unwrap_or_default()) {
            match Self::new(chain.clone(), &key) {
                Err(SvidError::KeyMismatch { .. }) => {}
                other => return other.map(Some),
            }
        }
        Err(SvidError::NoFittingKey { path: key_path })
    }

    /// Writes `<name>.pem` and `<name>.key` (mode 0600), so that a crash at any point leaves a pair that fits: the key
    /// file holds the old and the new key while the chain is replaced.
    pub fn save(&self, dir: &Path, name: &str) -> Result<(), SvidError> {
        let (chain_path, key_path) = paths(dir, name);
        let write_key = |text: &str| {
            files::write_secret(&key_path, text.as_bytes())
                .map_err(|source| SvidError::Write { path: key_path.clone(), source })
        };
        let key = self.key_pem();
        if let Some(old) = Self::load(dir, name).ok().flatten()
            && old.key.public_key() != self.key.public_key()
        {
            write_key(&format!("{key}{}", old.key_pem()))?;
        } else {
            write_key(&key)?;
        }
        files::write_atomic(&chain_path, self.chain_pem().as_bytes())
            .map_err(|source| SvidError::Write { path: chain_path, source })?;
        write_key(&key)
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// The SPIFFE ID of a certificate that obeys the rules for leaf SVIDs. Says nothing about who signed it.
pub fn spiffe_id_of(certificate: &[u8]) -> Result<SpiffeId, SvidError> {
    Ok(x509::leaf(certificate)?.id)
}

/// When a certificate that obeys the rules for leaf SVIDs ends. Says nothing about who signed it.
pub fn expiry_of(certificate: &[u8]) -> Result<Timestamp, SvidError> {
    Ok(x509::leaf(certificate)?.not_after)
}

fn paths(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, SvidError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SvidError::Read { path: path.into(), source }),
    }
}

fn fitting_keys(text: &[u8]) -> impl Iterator<Item = KeyPair> {
    const END: &str = "-----END PRIVATE KEY-----";
    let text = String::from_utf8_lossy(text).into_owned();
    let blocks: Vec<String> = text.split_inclusive(END).map(str::to_owned).collect();
    blocks.into_iter().filter_map(|block| KeyPair::from_pem(&block).ok())
}

#[cfg(test)]
mod tests;
