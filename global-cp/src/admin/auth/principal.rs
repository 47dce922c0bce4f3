//! Who is calling: the four kinds of callers, and how each is told from its request.
//!
//! In: the connection's certificate and the `Authorization` header. Out: a [`Principal`], or a [`Stranger`] in words. A
//! bearer token decides even if there is a certificate, and a bad one is not made good by it: who sends a token wants to be
//! whom it names. Nothing of a token goes into an error.

use std::fmt;

use axum::http::{HeaderMap, header::AUTHORIZATION};
use isthmus_identity::tls::sha256;
use isthmus_model::{ids::SpiffeId, time::Timestamp};
use subtle::ConstantTimeEq;

use crate::state::{Access, AccessName, Subject, TokenHash};

/// Begins the text of an API token: `isthmus-api.NAME.SECRET`.
pub(crate) const API_TOKEN: &str = "isthmus-api.";
/// Longest bearer token that is looked at. Tokens of common issuers have 1 to 4 KiB.
pub(super) const MAX_BEARER: usize = 16 << 10;
/// The last segment of the certificate that the control plane writes to `stateDir/admin`.
const ROOT: &str = "root";

/// A caller whose identity was proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Principal {
    /// The bearer of a certificate.
    Spiffe { id: SpiffeId },
    /// The bearer of an API token.
    Token { name: AccessName },
    /// The bearer of an issuer's token. Names have the issuer's prefix; groups are sorted.
    User { name: String, groups: Vec<String> },
}

/// What the request shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Shown<'a> {
    /// Neither a certificate nor a token.
    Nothing,
    Certificate(&'a SpiffeId),
    /// A token of this control plane.
    ApiToken {
        name: &'a str,
        secret: &'a str,
    },
    /// A token of somebody else.
    Foreign(&'a str),
}

/// Why nobody is known to be calling.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stranger {
    /// Nothing was shown.
    #[error(
        "this needs a client certificate of the federation, or the header `Authorization: Bearer TOKEN`; isthmusctl takes \
         both from its context: `cert` and `key`, `token` or `tokenFile`"
    )]
    Nothing,
    /// A header that cannot be read.
    #[error("send one header `Authorization: Bearer TOKEN`; {0}")]
    Header(&'static str),
    /// Not, or not any more, a token of this control plane.
    #[error(
        "the API token is unknown: it was mistyped or deleted; an administrator can mint another one: isthmusctl token create NAME"
    )]
    UnknownToken,
    /// Too late.
    #[error("the API token has expired; an administrator can mint another one: isthmusctl token create NAME")]
    ExpiredToken,
    /// An issuer's token that is not good.
    #[error(transparent)]
    Jwt(#[from] super::oidc::JwtError),
}

impl Stranger {
    /// A short stable name.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::Nothing => "unauthenticated",
            Self::Header(_) => "bad_authorization_header",
            Self::UnknownToken => "unknown_api_token",
            Self::ExpiredToken => "api_token_expired",
            Self::Jwt(error) => error.code(),
        }
    }
}

/// What `headers` and the connection's certificate show.
pub(super) fn shown<'a>(headers: &'a HeaderMap, certificate: Option<&'a SpiffeId>) -> Result<Shown<'a>, Stranger> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(certificate.map_or(Shown::Nothing, Shown::Certificate)) };
    if values.next().is_some() {
        return Err(Stranger::Header("there are several"));
    }
    let text = value.to_str().map_err(|_| Stranger::Header("it holds bytes that no token has"))?;
    let (scheme, token) = text.split_once(' ').ok_or(Stranger::Header("there is no token in it"))?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Stranger::Header("another scheme is not known here"));
    }
    let token = token.trim();
    if token.is_empty() || token.len() > MAX_BEARER {
        return Err(Stranger::Header("the token is empty or far too long"));
    }
    match token.strip_prefix(API_TOKEN) {
        None => Ok(Shown::Foreign(token)),
        Some(rest) => {
            let (name, secret) = rest.split_once('.').ok_or(Stranger::UnknownToken)?;
            Ok(Shown::ApiToken { name, secret })
        }
    }
}

/// The owner of an API token, compared in constant time: how long it takes tells nothing about the secret.
pub(super) fn owner(access: &Access, name: &str, secret: &str, now: Timestamp) -> Result<Principal, Stranger> {
    let name: AccessName = name.parse().map_err(|_| Stranger::UnknownToken)?;
    let offered = sha256(secret.as_bytes());
    let held = access.tokens().get(&name);
    // No secret has this hash, so an unknown name is refused by the same work.
    let TokenHash(expected) = held.map_or(TokenHash([0; 32]), |held| held.hash);
    let same = bool::from(offered.ct_eq(&expected));
    match held.filter(|_| same) {
        None => Err(Stranger::UnknownToken),
        Some(held) if now >= held.expires_at => Err(Stranger::ExpiredToken),
        Some(_) => Ok(Principal::Token { name }),
    }
}

impl Principal {
    /// The control plane's own administrator, for whom no binding is needed.
    pub(crate) fn is_root(&self) -> bool {
        matches!(self, Self::Spiffe { id } if id.segments().eq(["admin", ROOT]))
    }

    /// Does a binding that names `subject` speak of this caller?
    pub(super) fn is(&self, subject: &Subject) -> bool {
        match (self, subject) {
            (Self::Spiffe { id }, Subject::Spiffe(wanted)) => id == wanted,
            (Self::Token { name }, Subject::Token(wanted)) => name == wanted,
            (Self::User { name, .. }, Subject::User(wanted)) => name == wanted,
            (Self::User { groups, .. }, Subject::Group(wanted)) => groups.binary_search(wanted).is_ok(),
            _ => false,
        }
    }

    /// As events name it. Certificates as ever, others with their kind in front.
    pub(crate) fn who(&self) -> String {
        match self {
            Self::Spiffe { id } => id.to_string(),
            Self::Token { name } => format!("token:{name}"),
            Self::User { name, .. } => format!("user:{name}"),
        }
    }

    /// As an option of `isthmusctl role-binding set`.
    pub(super) fn as_option(&self) -> String {
        match self {
            Self::Spiffe { id } => format!("--spiffe {id}"),
            Self::Token { name } => format!("--token {name}"),
            Self::User { name, .. } => format!("--user {name}"),
        }
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spiffe { id } => write!(f, "{id}"),
            Self::Token { name } => write!(f, "API token {name}"),
            Self::User { name, .. } => write!(f, "user {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (AUTHORIZATION, HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn a_token_decides_even_beside_a_certificate() {
        let id: SpiffeId = "spiffe://isthmus.example/admin/root".parse().unwrap();
        let none = headers(&[]);
        assert_eq!(shown(&none, None), Ok(Shown::Nothing));
        assert_eq!(shown(&none, Some(&id)), Ok(Shown::Certificate(&id)));
        let api = headers(&["bearer isthmus-api.ci.s3cret"]);
        assert_eq!(shown(&api, Some(&id)), Ok(Shown::ApiToken { name: "ci", secret: "s3cret" }));
        let jwt = headers(&["Bearer a.b.c"]);
        assert_eq!(shown(&jwt, Some(&id)), Ok(Shown::Foreign("a.b.c")));
    }

    #[test]
    fn a_header_that_cannot_be_read_is_no_certificate_either() {
        let id: SpiffeId = "spiffe://isthmus.example/admin/root".parse().unwrap();
        let long = format!("Bearer {}", "x".repeat(MAX_BEARER + 1));
        for bad in [
            &["Basic YTpi"][..],
            &["Bearer"],
            &["Bearer "],
            &["Bearer a", "Bearer b"],
            &[&long],
            &["Bearer isthmus-api.x"],
        ] {
            assert!(shown(&headers(bad), Some(&id)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_the_certificate_named_root_is_the_control_planes_own() {
        let spiffe = |id: &str| Principal::Spiffe { id: id.parse().unwrap() }.is_root();
        assert!(spiffe("spiffe://isthmus.example/admin/root"));
        assert!(!spiffe("spiffe://isthmus.example/admin/bob"));
        assert!(!spiffe("spiffe://isthmus.example/admin/root/x"));
        assert!(!Principal::User { name: "root".to_owned(), groups: vec![] }.is_root());
        assert!(!Principal::Token { name: "root".parse().unwrap() }.is_root());
    }
}
