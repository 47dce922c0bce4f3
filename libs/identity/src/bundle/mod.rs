//! SPIFFE trust bundles: the document (a JWK Set), the proof that one document follows another, and the store of all
//! trust domains' roots that every verifier reads.
//!
//! In: JSON from other clusters, hostile included, bounded at [`MAX_DOCUMENT`] and [`MAX_KEYS`]. Out: roots. Roots of
//! different trust domains are never merged. Standard: SPIFFE Trust Domain and Bundle, 4; X509-SVID, 6.

mod document;
mod json;
pub(crate) mod store;

use isthmus_model::{ids::TrustDomain, service::TrustBundle};
use webpki::{EndEntityCert, aws_lc_rs as algorithms};

pub use self::{document::BundleDocument, store::TrustStore};

/// Largest bundle document, in bytes.
pub const MAX_DOCUMENT: usize = 1024 * 1024;

/// Most keys in a bundle document.
pub const MAX_KEYS: usize = 64;

/// Why a certificate is no usable root.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// Not parseable as one X.509 certificate.
    #[error("not a well-formed X.509 certificate")]
    Malformed,
    /// Basic constraints do not say CA.
    #[error("not a CA certificate (basicConstraints)")]
    NotCa,
    /// It may not sign certificates.
    #[error("the key usage keyCertSign is missing")]
    NoKeyCertSign,
    /// Its URI name is not the SPIFFE ID of a trust domain.
    #[error("its URI name is not spiffe://<trust domain>")]
    UriSan,
}

/// Why a bundle was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// Too many bytes.
    #[error("the bundle document has {0} bytes; at most 1048576 are allowed")]
    TooLarge(usize),
    /// Too many keys.
    #[error("the bundle document has {0} keys; at most 64 are allowed")]
    TooManyKeys(usize),
    /// Not JSON, or with duplicate members.
    #[error("the bundle document is not JSON without duplicate members: {0}")]
    Json(String),
    /// A member is missing or of the wrong type.
    #[error("the bundle document's {field} is not valid: {rule}")]
    Field {
        /// Where.
        field: String,
        /// What is expected there.
        rule: &'static str,
    },
    /// A root is not usable.
    #[error("root certificate {index} of the bundle is refused: {reason}")]
    Root {
        /// Its place among the keys, from 0.
        index: usize,
        /// What is wrong with it.
        reason: RootError,
    },
    /// The key's coordinates are not those of its certificate.
    #[error("keys[{0}]: x and y are not those of the certificate in x5c")]
    Coordinates(usize),
    /// The same root twice.
    #[error("keys[{0}] repeats an earlier root certificate")]
    Repeated(usize),
    /// A root that names another trust domain than the bundle is for.
    #[error("root certificate {index} of the bundle is of trust domain {found}, not of {wanted}")]
    ForeignRoot {
        /// Its place among the roots, from 0.
        index: usize,
        /// What the root says.
        found: TrustDomain,
        /// What the bundle is for.
        wanted: TrustDomain,
    },
    /// A bundle of another trust domain cannot follow.
    #[error("a bundle of {next} cannot follow one of {prev}")]
    OtherTrustDomain {
        /// The domain so far.
        prev: TrustDomain,
        /// The domain of the new bundle.
        next: TrustDomain,
    },
    /// The sequence must grow with every change.
    #[error("the new bundle's spiffe_sequence {next} is not larger than {prev}, yet its content differs")]
    Sequence {
        /// Sequence so far.
        prev: u64,
        /// Sequence of the new bundle.
        next: u64,
    },
    /// No key of the preceding bundle signed the new one.
    #[error("the new bundle of {0} is not signed by a key of the one before")]
    NotSigned(TrustDomain),
}

/// Whether `next` may replace `prev`: it has the same content, or a larger sequence and a signature by an x509-svid key
/// of `prev`. A stolen control plane thus cannot swap a cluster's roots.
pub fn verify_successor(prev: &TrustBundle, next: &TrustBundle) -> Result<(), BundleError> {
    if prev.trust_domain != next.trust_domain {
        let (prev, next) = (prev.trust_domain.clone(), next.trust_domain.clone());
        return Err(BundleError::OtherTrustDomain { prev, next });
    }
    if prev.document == next.document {
        return Ok(());
    }
    let old = BundleDocument::parse(&prev.document)?;
    let new = BundleDocument::parse(&next.document)?;
    if old == new {
        return Ok(());
    }
    if new.sequence <= old.sequence {
        return Err(BundleError::Sequence { prev: old.sequence, next: new.sequence });
    }
    let message = next.document.as_bytes();
    let signed = old.x509_roots.iter().any(|root| {
        let kinds = [algorithms::ECDSA_P256_SHA256, algorithms::ECDSA_P384_SHA384, algorithms::ED25519];
        EndEntityCert::try_from(root).is_ok_and(|root| {
            kinds.iter().any(|kind| root.verify_signature(*kind, message, &next.predecessor_signature).is_ok())
        })
    });
    if signed { Ok(()) } else { Err(BundleError::NotSigned(next.trust_domain.clone())) }
}

#[cfg(test)]
mod tests;
