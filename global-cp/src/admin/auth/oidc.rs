//! Tokens of OpenID Connect issuers: signed JWTs, checked against the issuer's published keys.
//!
//! In: a bearer token of unknown worth. Out: the user and its groups, or a [`JwtError`]. Holds: the algorithm is that of
//! the key and one of [`Algorithm::RS256`], [`Algorithm::ES256`] and [`Algorithm::EdDSA`]; never `none`, never one with a
//! shared secret; issuer, audience, expiry and beginning are checked, with [`LEEWAY`] for clocks. It waits for nobody: keys
//! are fetched elsewhere ([`super::jwks`]).

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, TokenData, Validation, decode, decode_header, errors::ErrorKind};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{jwks::Issuer, principal::Principal};
use crate::state::access::is_name;

/// By how much clocks may differ, in seconds.
const LEEWAY: u64 = 30;
/// Groups that are taken from a token.
const MAX_GROUPS: usize = 256;

/// All issuers that are believed. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Issuers(pub(super) Arc<Vec<Issuer>>);

/// Why a token of an issuer is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JwtError {
    /// Not three parts, or not what belongs into them.
    #[error("the bearer token is neither an API token (isthmus-api.…) nor a signed JWT")]
    Malformed,
    /// Nobody whom the configuration names.
    #[error("the token's issuer is not one of those in `admin.oidc` of the control plane's configuration")]
    UnknownIssuer,
    /// `none`, a shared secret, or something new.
    #[error("the token's algorithm is not RS256, ES256 or EdDSA")]
    Algorithm,
    /// It was not published, or not yet seen.
    #[error(
        "the token is signed with a key that the issuer has not published, as far as this node has heard; its keys are \
         being fetched again: if the token is new, try again in a moment"
    )]
    UnknownKey,
    /// Signed by somebody else.
    #[error("the token's signature does not fit")]
    Signature,
    /// Too late.
    #[error("the token has expired; get a new one from its issuer")]
    Expired,
    /// Too early.
    #[error("the token is not valid yet; check the clocks of its issuer and of this node")]
    Early,
    /// For somebody else.
    #[error("the token is for another audience; `audience` in `admin.oidc` says which is expected")]
    Audience,
    /// Something that is needed is missing or has another form.
    #[error("the token's claim {0:?} is missing or not usable")]
    Claim(String),
}

impl JwtError {
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::Malformed => "bad_token",
            Self::UnknownIssuer => "unknown_issuer",
            Self::Algorithm => "bad_algorithm",
            Self::UnknownKey => "unknown_key",
            Self::Signature => "bad_signature",
            Self::Expired => "token_expired",
            Self::Early => "token_not_yet_valid",
            Self::Audience => "wrong_audience",
            Self::Claim(_) => "bad_claim",
        }
    }
}

#[derive(Deserialize)]
struct Unverified {
    iss: String,
}

impl Issuers {
    /// Who bears `token`.
    pub(super) fn verify(&self, token: &str) -> Result<Principal, JwtError> {
        let header = decode_header(token).map_err(|error| match error.kind() {
            // The library knows no `none`, and no algorithm that it does not verify.
            ErrorKind::Json(error) if error.is_data() => JwtError::Algorithm,
            _ => JwtError::Malformed,
        })?;
        if !matches!(header.alg, Algorithm::RS256 | Algorithm::ES256 | Algorithm::EdDSA) {
            return Err(JwtError::Algorithm);
        }
        // What an extension means that one must understand, nobody here does (RFC 7515, 4.1.11).
        if header.crit.is_some() {
            return Err(JwtError::Malformed);
        }
        // What the token says of its issuer decides only whose keys must have signed it.
        let claimed = unverified_issuer(token)?;
        let issuer = self.0.iter().find(|issuer| issuer.config.issuer == claimed).ok_or(JwtError::UnknownIssuer)?;
        let key = issuer.key(header.kid.as_deref(), header.alg)?;
        let mut validation = Validation::new(header.alg);
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_audience(&[&issuer.config.audience]);
        validation.set_issuer(&[&issuer.config.issuer]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        let TokenData { claims, .. } =
            decode::<Map<String, Value>>(token, &key, &validation).map_err(|error| refusal(error.kind()))?;
        issuer.principal(&claims)
    }
}

impl Issuer {
    fn principal(&self, claims: &Map<String, Value>) -> Result<Principal, JwtError> {
        let config = &self.config;
        let prefixed = |text: &str| format!("{}{text}", config.prefix);
        let user = claims.get(&config.username_claim).and_then(Value::as_str).map(prefixed);
        let name = user.filter(|name| is_name(name)).ok_or_else(|| JwtError::Claim(config.username_claim.clone()))?;
        // An address that the issuer has not checked is whatever the user has typed.
        if config.username_claim == "email" && claims.get("email_verified").is_some_and(|v| *v != Value::Bool(true)) {
            return Err(JwtError::Claim("email_verified".to_owned()));
        }
        let unusable = || JwtError::Claim(config.groups_claim.clone());
        let groups: Vec<&str> = match claims.get(&config.groups_claim) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(all)) if all.len() <= MAX_GROUPS => {
                all.iter().map(|group| group.as_str().ok_or_else(unusable)).collect::<Result<_, _>>()?
            }
            Some(_) => return Err(unusable()),
        };
        let mut groups: Vec<String> = groups.into_iter().map(prefixed).filter(|group| is_name(group)).collect();
        groups.sort_unstable();
        Ok(Principal::User { name, groups })
    }
}

fn unverified_issuer(token: &str) -> Result<String, JwtError> {
    let mut parts = token.split('.');
    let (Some(_), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(JwtError::Malformed);
    };
    let json = URL_SAFE_NO_PAD.decode(payload).map_err(|_| JwtError::Malformed)?;
    let claims: Unverified = serde_json::from_slice(&json).map_err(|_| JwtError::Claim("iss".to_owned()))?;
    Ok(claims.iss)
}

fn refusal(kind: &ErrorKind) -> JwtError {
    match kind {
        ErrorKind::InvalidSignature => JwtError::Signature,
        ErrorKind::ExpiredSignature => JwtError::Expired,
        ErrorKind::ImmatureSignature => JwtError::Early,
        ErrorKind::InvalidAudience => JwtError::Audience,
        ErrorKind::InvalidIssuer => JwtError::UnknownIssuer,
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => JwtError::Algorithm,
        ErrorKind::MissingRequiredClaim(claim) => JwtError::Claim(claim.clone()),
        ErrorKind::InvalidClaimFormat(claim) => JwtError::Claim(claim.clone()),
        _ => JwtError::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_a_stranger_sends_is_refused_and_nothing_breaks(
            text in "\\PC{0,200}",
            header in proptest::collection::vec(any::<u8>(), 0..100),
            payload in proptest::collection::vec(any::<u8>(), 0..100),
            alg in proptest::sample::select(vec!["none", "HS256", "ES256", "RS256", "EdDSA", "x"]),
            iss in "[a-z:/]{0,12}",
        ) {
            let issuers = Issuers::default();
            let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
            let (real_header, claims) = (format!(r#"{{"alg":"{alg}"}}"#), format!(r#"{{"iss":"{iss}"}}"#));
            for token in [
                text.clone(),
                format!("{text}.{text}.{text}"),
                format!("{}.{}.x", encode(&header), encode(&payload)),
                format!("{}.{}.x", encode(real_header.as_bytes()), encode(&payload)),
                format!("{}.{}.{}", encode(real_header.as_bytes()), encode(claims.as_bytes()), encode(&header)),
            ] {
                prop_assert!(issuers.verify(&token).is_err());
            }
        }
    }
}
