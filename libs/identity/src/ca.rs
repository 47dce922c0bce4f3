//! The certificate authority of one trust domain: a key (ECDSA P-256), a self-signed root, and what it signs.
//!
//! In: certificate signing requests, of which only the key and the proof of its possession are used; names, usages and
//! lifetime are decided here. Out: chains, leaf first, *root last*, so that a client that pins the root finds it.
//! A CA signs only for its own trust domain. Who may have which SPIFFE ID is the caller's to decide.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use isthmus_model::{
    ids::{SpiffeId, TrustDomain},
    service::TrustBundle,
    time::Timestamp,
};
use isthmus_runtime::files;
use rand::RngExt as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber, SigningKey as _,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};

use crate::{
    bundle::{BundleDocument, BundleError, RootError},
    keys::{KeyError, KeyPair},
    pem, x509,
};

/// Life of a root made by [`CertificateAuthority::load_or_create`].
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Largest signing request that is looked at; ours are under 300 bytes.
pub const MAX_CSR: usize = 16 * 1024;

/// How far certificates are backdated, for clocks that run behind.
pub(crate) const BACKDATE: Duration = Duration::from_secs(60);

const REFRESH_HINT: Duration = Duration::from_secs(300);

/// Why a CA could not be opened, or would not sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Making or reading the key failed.
    #[error("open the CA's key")]
    Key(#[from] KeyError),
    /// Reading or writing a file failed.
    #[error("access the CA's file {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The folder has the certificate but not the key.
    #[error("{dir} has ca.pem but no ca.key: restore the key, or move ca.pem away to start a new CA")]
    KeyMissing {
        /// The CA's folder.
        dir: PathBuf,
    },
    /// `ca.pem` is not one usable root.
    #[error("{path} does not hold one CA certificate: restore it, or move the folder away to start a new CA")]
    BadRoot {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: RootError,
    },
    /// `ca.pem` and `ca.key` do not belong together.
    #[error("{dir}/ca.key is not the key of ca.pem: restore the two from the same backup")]
    KeyMismatch {
        /// The CA's folder.
        dir: PathBuf,
    },
    /// The folder belongs to another trust domain.
    #[error("{dir} holds the CA of trust domain {found}, not of {wanted}: set another state folder, or the old name")]
    OtherTrustDomain {
        /// The CA's folder.
        dir: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose it should be.
        wanted: TrustDomain,
    },
    /// The root is past its life.
    #[error("the CA certificate of {trust_domain} ended at {not_after}: move the folder away to start a new CA")]
    RootExpired {
        /// Whose.
        trust_domain: TrustDomain,
        /// RFC 3339.
        not_after: String,
    },
    /// The request is unusable. Safe to tell the requester.
    #[error("the certificate signing request is refused: {0}")]
    Csr(&'static str),
    /// Asked to sign for another's trust domain.
    #[error("{id} is not in trust domain {trust_domain}, the only one this CA signs for")]
    ForeignId {
        /// The ID asked for.
        id: SpiffeId,
        /// The CA's own.
        trust_domain: TrustDomain,
    },
    /// Not usable as a DNS name.
    #[error("{0:?} is not a DNS name")]
    DnsName(String),
    /// The crypto library refused.
    #[error("sign")]
    Sign(#[from] rcgen::Error),
    /// The root does not fit into a bundle.
    #[error("make the trust bundle")]
    Bundle(#[from] BundleError),
}

impl CaError {
    /// Whether the requester is to blame: tell it the message. Any other error is ours, and not for a peer's eyes.
    pub fn is_requesters_fault(&self) -> bool {
        matches!(self, Self::Csr(_) | Self::ForeignId { .. } | Self::DnsName(_))
    }
}

/// One trust domain's certificate authority.
pub struct CertificateAuthority {
    trust_domain: TrustDomain,
    key: KeyPair,
    root: CertificateDer<'static>,
    root_not_after: Timestamp,
    bundle: TrustBundle,
}

impl CertificateAuthority {
    /// A new CA, in memory only, whose root lives that long.
    pub fn create(trust_domain: &TrustDomain, lifetime: Duration) -> Result<Self, CaError> {
        let key = KeyPair::generate()?;
        let root = self_signed(trust_domain, &key, lifetime)?;
        Self::assemble(trust_domain, key, root)
    }

    /// The CA in the folder (`ca.key`, `ca.pem`), made if there is none. Refuses the folder of another trust domain.
    pub fn load_or_create(dir: &Path, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        let (key_path, root_path) = (dir.join("ca.key"), dir.join("ca.pem"));
        let Some(text) = read(&root_path)? else {
            // A key without a root is a first start that was cut short: finish it.
            let key = KeyPair::load_or_create(&key_path)?;
            let root = self_signed(trust_domain, &key, ROOT_LIFETIME)?;
            let text = pem::encode_certificates(std::slice::from_ref(&root));
            files::write_atomic(&root_path, text.as_bytes())
                .map_err(|source| CaError::File { path: root_path, source })?;
            return Self::assemble(trust_domain, key, root);
        };
        let bad = |source| CaError::BadRoot { path: root_path.clone(), source };
        let root = match pem::decode_certificates(&text).as_deref() {
            Some([root]) => root.clone(),
            _ => return Err(bad(RootError::Malformed)),
        };
        let facts = x509::root(&root).map_err(bad)?;
        if facts.trust_domain.as_ref() != Some(trust_domain) {
            let found = facts.trust_domain.map_or_else(|| "unknown name".to_owned(), |td| td.to_string());
            return Err(CaError::OtherTrustDomain { dir: dir.into(), found, wanted: trust_domain.clone() });
        }
        let key = KeyPair::load(&key_path)?.ok_or_else(|| CaError::KeyMissing { dir: dir.into() })?;
        if facts.public_key != key.public_key() {
            return Err(CaError::KeyMismatch { dir: dir.into() });
        }
        if facts.not_after <= crate::now() {
            let not_after = crate::rfc3339(facts.not_after);
            return Err(CaError::RootExpired { trust_domain: trust_domain.clone(), not_after });
        }
        Self::assemble(trust_domain, key, root)
    }

    /// Signs the request's key for `id`, with `dns_sans` as further names, for at most `lifetime` (cut at the root's own
    /// end). The request's signature is checked; its names and extensions are ignored. Leaf first, root last.
    pub fn sign_csr(
        &self,
        csr_der: &[u8],
        id: &SpiffeId,
        dns_sans: &[String],
        lifetime: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        if id.trust_domain() != &self.trust_domain {
            return Err(CaError::ForeignId { id: id.clone(), trust_domain: self.trust_domain.clone() });
        }
        let mut request = parse_csr(csr_der)?;
        request.params = self.leaf_params(id, dns_sans, lifetime)?;
        let issuer = Issuer::from_ca_cert_der(&self.root, self.key.signer())?;
        let leaf = request.signed_by(&issuer)?;
        Ok(vec![leaf.into(), self.root.clone()])
    }

    /// The trust domain's bundle as published: this root, first of its line.
    pub fn bundle(&self) -> TrustBundle {
        self.bundle.clone()
    }

    /// The self-signed root.
    pub fn root_der(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// SHA-256 of the root: what tokens pin.
    pub fn root_sha256(&self) -> [u8; 32] {
        crate::tls::sha256(&self.root)
    }

    /// Whose CA.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Signs the bundle document that follows this CA's, for [`crate::bundle::verify_successor`].
    pub fn sign_document(&self, document: &[u8]) -> Result<Vec<u8>, CaError> {
        Ok(self.key.signer().sign(document)?)
    }

    /// A certificate as a hostile or broken CA would sign it.
    #[cfg(test)]
    pub(crate) fn sign_raw(&self, params: &CertificateParams, key: &KeyPair) -> CertificateDer<'static> {
        let issuer = Issuer::from_ca_cert_der(&self.root, self.key.signer()).unwrap();
        params.signed_by(key.signer(), &issuer).unwrap().into()
    }

    fn assemble(trust_domain: &TrustDomain, key: KeyPair, root: CertificateDer<'static>) -> Result<Self, CaError> {
        let document = BundleDocument { sequence: 1, refresh_hint: Some(REFRESH_HINT), x509_roots: vec![root.clone()] };
        let bundle = TrustBundle {
            trust_domain: trust_domain.clone(),
            document: document.to_json()?,
            predecessor_signature: Vec::new(),
        };
        let root_not_after = x509::root(&root).map_err(|reason| BundleError::Root { index: 0, reason })?.not_after;
        Ok(Self { trust_domain: trust_domain.clone(), key, root, root_not_after, bundle })
    }

    fn leaf_params(
        &self,
        id: &SpiffeId,
        dns_sans: &[String],
        lifetime: Duration,
    ) -> Result<CertificateParams, CaError> {
        let serial = random_serial();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Isthmus SVID");
        params.distinguished_name.push(DnType::CommonName, hex::encode(serial));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.subject_alt_names.push(SanType::URI(id.as_str().try_into()?));
        for name in dns_sans {
            let valid = rustls_pki_types::DnsName::try_from(name.as_str()).is_ok();
            let refused = || CaError::DnsName(name.chars().take(253).collect());
            let name = name.as_str().try_into().ok().filter(|_| valid);
            params.subject_alt_names.push(SanType::DnsName(name.ok_or_else(refused)?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let now = crate::now();
        set_validity(&mut params, now, (now + lifetime).min(self.root_not_after));
        Ok(params)
    }
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

fn self_signed(td: &TrustDomain, key: &KeyPair, lifetime: Duration) -> Result<CertificateDer<'static>, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Isthmus CA");
    // X.520 bounds a common name at 64 characters. The key's digest tells successive roots of one domain apart.
    let short: String = td.as_str().chars().take(47).collect();
    let digest = crate::tls::sha256(key.public_key());
    let tag: String = hex::encode(digest).chars().take(16).collect();
    params.distinguished_name.push(DnType::CommonName, format!("{short} {tag}"));
    params.serial_number = Some(SerialNumber::from_slice(&random_serial()));
    params.subject_alt_names.push(SanType::URI(format!("spiffe://{td}").try_into()?));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let now = crate::now();
    set_validity(&mut params, now, now + lifetime);
    Ok(params.self_signed(key.signer())?.into())
}

/// The request, if it is small, whole, well signed, and for the one kind of key that is used here.
fn parse_csr(der: &[u8]) -> Result<CertificateSigningRequestParams, CaError> {
    if der.len() > MAX_CSR {
        return Err(CaError::Csr("it is larger than 16 KiB"));
    }
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der)).map_err(|e| {
        CaError::Csr(match e {
            rcgen::Error::InvalidCertificationRequestSignature => "its signature is not by the key that it contains",
            rcgen::Error::UnsupportedExtension => "it asks for extensions that are not supported",
            _ => "it is not a PKCS#10 request in DER",
        })
    })?;
    // An uncompressed point on P-256 has 65 bytes.
    let p256 = request.public_key.algorithm() == &rcgen::PKCS_ECDSA_P256_SHA256;
    if !p256 || request.public_key.der_bytes().len() != 65 {
        return Err(CaError::Csr("its key is not ECDSA on P-256"));
    }
    Ok(request)
}

/// SHA-256 of the key that a request is for, once the request proved its possession.
pub fn csr_key_sha256(csr_der: &[u8]) -> Result<[u8; 32], CaError> {
    Ok(crate::tls::sha256(parse_csr(csr_der)?.public_key.der_bytes()))
}

/// 16 random bytes, positive as RFC 5280 (4.1.2.2) wants.
fn random_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::rng().random();
    if let Some(first) = serial.first_mut() {
        *first = *first & 0x7f | 0x40;
    }
    serial
}

fn set_validity(params: &mut CertificateParams, now: Timestamp, not_after: Timestamp) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let seconds = |t: Timestamp| Duration::from_secs(t.0 / 1000);
    params.not_before = epoch + seconds(now).saturating_sub(BACKDATE);
    params.not_after = epoch + seconds(not_after);
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, CaError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CaError::File { path: path.into(), source }),
    }
}

#[cfg(test)]
mod tests;
