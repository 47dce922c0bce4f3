//! What this crate needs to know of a certificate, read with x509-parser.
//!
//! In: DER from anywhere, hostile included. Out: facts, or which rule of the SPIFFE X.509-SVID standard it breaks.
//! Signatures are not judged here; webpki does that.

use isthmus_model::{
    ids::{SpiffeId, TrustDomain},
    time::Timestamp,
};
use x509_parser::prelude::*;

use crate::{bundle::RootError, svid::SvidError};

/// No certificate of ours comes near; anything larger is not worth parsing.
pub(crate) const MAX_CERTIFICATE: usize = 64 * 1024;

/// A leaf that obeys the SVID rules.
pub(crate) struct Leaf {
    pub(crate) id: SpiffeId,
    pub(crate) not_before: Timestamp,
    pub(crate) not_after: Timestamp,
    /// The subject's public key: for ECDSA, the uncompressed point.
    pub(crate) public_key: Vec<u8>,
}

/// A certificate authority's own certificate.
pub(crate) struct Root {
    /// From a URI SAN `spiffe://<trust domain>`, if it has one.
    pub(crate) trust_domain: Option<TrustDomain>,
    pub(crate) not_after: Timestamp,
    pub(crate) public_key: Vec<u8>,
    /// The key is on NIST P-256.
    pub(crate) p256: bool,
}

/// Reads a leaf, refusing whatever is not an X.509-SVID.
pub(crate) fn leaf(der: &[u8]) -> Result<Leaf, SvidError> {
    let certificate = parse(der).ok_or(SvidError::Malformed)?;
    let id = match uris(&certificate).ok_or(SvidError::Malformed)?.as_slice() {
        [uri] => uri.parse::<SpiffeId>().map_err(SvidError::Id)?,
        uris => return Err(SvidError::UriSans(uris.len())),
    };
    if certificate.is_ca() {
        return Err(SvidError::IsCa);
    }
    let usage = certificate.key_usage().map_err(|_| SvidError::Malformed)?.ok_or(SvidError::NoDigitalSignature)?;
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(SvidError::SignsCertificates);
    }
    if !usage.value.digital_signature() {
        return Err(SvidError::NoDigitalSignature);
    }
    let (not_before, not_after) = validity(&certificate);
    Ok(Leaf { id, not_before, not_after, public_key: public_key(&certificate) })
}

/// Reads a root, refusing what may not sign certificates.
pub(crate) fn root(der: &[u8]) -> Result<Root, RootError> {
    let certificate = parse(der).ok_or(RootError::Malformed)?;
    if !certificate.is_ca() {
        return Err(RootError::NotCa);
    }
    let signs = certificate.key_usage().map_err(|_| RootError::Malformed)?.is_some_and(|u| u.value.key_cert_sign());
    if !signs {
        return Err(RootError::NoKeyCertSign);
    }
    let trust_domain = match uris(&certificate).ok_or(RootError::Malformed)?.as_slice() {
        [] => None,
        [uri] => Some(uri.strip_prefix("spiffe://").and_then(|td| td.parse().ok()).ok_or(RootError::UriSan)?),
        _ => return Err(RootError::UriSan),
    };
    let (_, not_after) = validity(&certificate);
    let curve = certificate.public_key().algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
    let p256 = curve.is_some_and(|oid| oid == x509_parser::oid_registry::OID_EC_P256);
    Ok(Root { trust_domain, not_after, public_key: public_key(&certificate), p256 })
}

/// Whether subject and issuer are the same, as in a root.
pub(crate) fn is_self_issued(der: &[u8]) -> bool {
    parse(der).is_some_and(|c| c.subject().as_raw() == c.issuer().as_raw())
}

fn parse(der: &[u8]) -> Option<X509Certificate<'_>> {
    if der.len() > MAX_CERTIFICATE {
        return None;
    }
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Some(certificate),
        _ => None,
    }
}

/// `None` if the extension is damaged or appears twice.
fn uris<'a>(certificate: &X509Certificate<'a>) -> Option<Vec<&'a str>> {
    let Some(san) = certificate.subject_alternative_name().ok()? else { return Some(Vec::new()) };
    let uri = |name: &GeneralName<'a>| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    };
    Some(san.value.general_names.iter().filter_map(uri).collect())
}

fn validity(certificate: &X509Certificate<'_>) -> (Timestamp, Timestamp) {
    let millis = |t: ASN1Time| Timestamp(u64::try_from(t.timestamp()).unwrap_or_default().saturating_mul(1000));
    (millis(certificate.validity().not_before), millis(certificate.validity().not_after))
}

fn public_key(certificate: &X509Certificate<'_>) -> Vec<u8> {
    certificate.public_key().subject_public_key.data.to_vec()
}
