//! The bundle document: a JWK Set (RFC 7517) with SPIFFE's members.
//!
//! Reading follows SPIFFE's rules for consumers: keys of unknown `kty` or `use` are skipped, so are `x509-svid` keys
//! without `x5c`; of several `x5c` values the first counts. What is then left must be a usable root, else the whole
//! document is refused: half a bundle would silently drop trust.

use std::time::Duration;

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use isthmus_model::ids::TrustDomain;
use rustls_pki_types::CertificateDer;
use serde_json::{Map, Value, json};

use super::{BundleError, MAX_DOCUMENT, MAX_KEYS, json::Strict};
use crate::x509;

/// A SPIFFE bundle document, its X.509 part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleDocument {
    /// `spiffe_sequence`: grows whenever the content changes; 0 if the document has none.
    pub sequence: u64,
    /// `spiffe_refresh_hint`: how often to look for a newer one.
    pub refresh_hint: Option<Duration>,
    /// The roots, DER, in document order. None: everything of this trust domain is revoked.
    pub x509_roots: Vec<CertificateDer<'static>>,
}

impl BundleDocument {
    /// Reads a document.
    pub fn parse(json: &str) -> Result<Self, BundleError> {
        if json.len() > MAX_DOCUMENT {
            return Err(BundleError::TooLarge(json.len()));
        }
        let Strict(value) = serde_json::from_str(json).map_err(|e| BundleError::Json(e.to_string()))?;
        let Value::Object(document) = value else {
            return Err(field("top level", "an object is expected"));
        };
        let whole = "a whole number of 0 or more is expected";
        let number = |name: &str| match document.get(name) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| field(name, whole)),
        };
        let sequence = number("spiffe_sequence")?.unwrap_or(0);
        let refresh_hint = number("spiffe_refresh_hint")?.map(Duration::from_secs);
        let Some(Value::Array(keys)) = document.get("keys") else {
            return Err(field("keys", "an array is required (empty: everything is revoked)"));
        };
        if keys.len() > MAX_KEYS {
            return Err(BundleError::TooManyKeys(keys.len()));
        }
        let mut x509_roots = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            let Value::Object(key) = key else {
                return Err(field(format!("keys[{index}]"), "an object is expected"));
            };
            if let Some(root) = root_of(index, key)? {
                if x509_roots.contains(&root) {
                    return Err(BundleError::Repeated(index));
                }
                x509_roots.push(root);
            }
        }
        Ok(Self { sequence, refresh_hint, x509_roots })
    }

    /// Whether every root that names its trust domain (a URI SAN, which SPIFFE leaves optional) names this one. For
    /// whoever takes bundles in: a cluster publishes its own roots only.
    pub fn require_domain(&self, wanted: &TrustDomain) -> Result<(), BundleError> {
        for (index, root) in self.x509_roots.iter().enumerate() {
            let facts = x509::root(root).map_err(|reason| BundleError::Root { index, reason })?;
            if let Some(found) = facts.trust_domain.filter(|found| found != wanted) {
                return Err(BundleError::ForeignRoot { index, found, wanted: wanted.clone() });
            }
        }
        Ok(())
    }

    /// Writes the document; the same content gives the same text. Only roots with ECDSA P-256 keys can be written.
    pub fn to_json(&self) -> Result<String, BundleError> {
        let keys = self.x509_roots.iter().enumerate().map(|(i, root)| jwk(i, root)).collect::<Result<Vec<_>, _>>()?;
        let mut document = Map::new();
        document.insert("keys".into(), keys.into());
        document.insert("spiffe_sequence".into(), self.sequence.into());
        if let Some(hint) = self.refresh_hint {
            document.insert("spiffe_refresh_hint".into(), hint.as_secs().into());
        }
        Ok(Value::Object(document).to_string())
    }
}

fn field(field: impl Into<String>, rule: &'static str) -> BundleError {
    BundleError::Field { field: field.into(), rule }
}

/// The root in a JWK; `None` if the key is of a kind that consumers skip.
fn root_of(index: usize, key: &Map<String, Value>) -> Result<Option<CertificateDer<'static>>, BundleError> {
    let text = |name: &str| key.get(name).and_then(Value::as_str);
    let kty = text("kty").ok_or_else(|| field(format!("keys[{index}].kty"), "a string is required"))?;
    if !matches!(kty, "EC" | "RSA" | "OKP") || text("use") != Some("x509-svid") {
        return Ok(None);
    }
    let encoded = match key.get("x5c") {
        None => return Ok(None),
        Some(Value::Array(values)) => match values.first() {
            None => return Ok(None),
            Some(first) => first.as_str(),
        },
        Some(_) => None,
    };
    let der = encoded.and_then(|text| STANDARD.decode(text).ok()).ok_or_else(|| {
        field(format!("keys[{index}].x5c"), "an array with one base64 (not base64url) DER certificate")
    })?;
    let facts = x509::root(&der).map_err(|reason| BundleError::Root { index, reason })?;
    if kty == "EC" && text("crv") == Some("P-256") {
        let (x, y) = coordinates(index, &facts)?;
        if text("x") != Some(x.as_str()) || text("y") != Some(y.as_str()) {
            return Err(BundleError::Coordinates(index));
        }
    }
    Ok(Some(CertificateDer::from(der)))
}

fn jwk(index: usize, root: &CertificateDer<'_>) -> Result<Value, BundleError> {
    let facts = x509::root(root).map_err(|reason| BundleError::Root { index, reason })?;
    let (x, y) = coordinates(index, &facts)?;
    Ok(json!({
        "use": "x509-svid", "kty": "EC", "crv": "P-256", "x": x, "y": y, "x5c": [STANDARD.encode(root)],
    }))
}

/// The point's coordinates as JWK text (RFC 7518, 6.2.1).
fn coordinates(index: usize, facts: &x509::Root) -> Result<(String, String), BundleError> {
    let point = match facts.public_key.split_first() {
        Some((4, point)) if facts.p256 => point,
        _ => &[],
    };
    match (point.len(), point.split_at_checked(32)) {
        (64, Some((x, y))) => Ok((URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y))),
        _ => Err(field(format!("keys[{index}]"), "the certificate's key is not ECDSA on P-256")),
    }
}
