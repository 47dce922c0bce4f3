//! Private keys: ECDSA on P-256, made here, kept in PKCS#8 PEM files of mode 0600.
//!
//! What holds: the key shows in no `Debug` and leaves only through [`KeyPair::to_pem`].

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use isthmus_runtime::files;
use rcgen::{CertificateParams, DistinguishedName, PublicKeyData as _};
use rustls::sign::SigningKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// Why a key could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The crypto library refused.
    #[error("make a key or sign with it")]
    Crypto(#[source] rcgen::Error),
    /// The text is no PKCS#8 PEM key on P-256.
    #[error("the text is not a private key this program can use (PKCS#8 PEM, ECDSA P-256)")]
    NotAKey(#[source] rcgen::Error),
    /// A key file holds something else.
    #[error("{path} does not hold a private key (PKCS#8 PEM, ECDSA P-256); restore it, or remove it to get a new key")]
    BadFile {
        /// The file.
        path: PathBuf,
    },
    /// Reading failed.
    #[error("read the key file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Writing failed.
    #[error("write the key file {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// rustls does not accept the key.
    #[error("use the key for TLS")]
    Tls(#[from] rustls::Error),
}

/// An ECDSA P-256 key pair; cheap to clone.
#[derive(Clone)]
pub struct KeyPair(Arc<rcgen::KeyPair>);

impl KeyPair {
    /// A new random key.
    pub fn generate() -> Result<Self, KeyError> {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(KeyError::Crypto)?;
        Ok(Self(Arc::new(pair)))
    }

    /// The key in the file, which is made (mode 0600) if there is none.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        if let Some(key) = Self::load(path)? {
            return Ok(key);
        }
        let key = Self::generate()?;
        files::write_secret(path, key.to_pem().as_bytes())
            .map_err(|source| KeyError::Write { path: path.into(), source })?;
        Ok(key)
    }

    /// The key in the file; `None` if there is no such file.
    pub fn load(path: &Path) -> Result<Option<Self>, KeyError> {
        match fs::read_to_string(path) {
            Ok(text) => Self::from_pem(&text).map(Some).map_err(|_| KeyError::BadFile { path: path.into() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => Err(KeyError::BadFile { path: path.into() }),
            Err(source) => Err(KeyError::Read { path: path.into(), source }),
        }
    }

    /// Reads PKCS#8 PEM.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        let pair = rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(text, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(KeyError::NotAKey)?;
        Ok(Self(Arc::new(pair)))
    }

    /// PKCS#8 PEM. Secret: for a file of mode 0600, or for Envoy over SDS, and nothing else.
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// A certificate signing request (PKCS#10, DER) that proves possession of the key. It carries no names: the signer
    /// decides them.
    pub fn csr_der(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&*self.0).map_err(KeyError::Crypto)?;
        Ok(request.der().to_vec())
    }

    /// The public key as an uncompressed point.
    pub fn public_key(&self) -> &[u8] {
        self.0.der_bytes()
    }

    pub(crate) fn signer(&self) -> &rcgen::KeyPair {
        &self.0
    }

    pub(crate) fn tls_key(&self) -> Result<Arc<dyn SigningKey>, KeyError> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialize_der()));
        Ok(rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&der)?)
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyPair(ECDSA P-256)")
    }
}
