//! An issuer's published keys: fetched in the background, kept while it is away.
//!
//! In: an [`OidcIssuer`] of the configuration. Out: [`Issuer::key`], at once. The keys are fetched at the start, every ten
//! minutes, and when a token names a key that is not among them, but never sooner than `keysMinRefresh` after the attempt
//! before, whoever asks. A failure changes nothing: the keys of before go on. The answer is bounded in size and time.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use isthmus_runtime::tasks::{Tasks, chain};
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse},
};
use reqwest::{Certificate, Client, redirect::Policy};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::oidc::{Issuers, JwtError};
use crate::config::OidcIssuer;

const DEADLINE: Duration = Duration::from_secs(5);
/// Largest set of keys, in bytes and in number.
const MAX_SET: usize = 256 << 10;
const MAX_KEYS: usize = 100;
/// Longest name of a key.
const MAX_KID: usize = 256;
/// How old keys get, unless something is wrong.
const REFRESH: Duration = Duration::from_secs(600);

/// One issuer. Cheap to clone.
#[derive(Clone)]
pub(super) struct Issuer {
    pub(super) config: Arc<OidcIssuer>,
    keys: Arc<RwLock<Keys>>,
    wanted: Arc<Notify>,
}

/// The usable keys: those with a name, and the only one if there is but one.
#[derive(Default)]
struct Keys {
    named: BTreeMap<String, Key>,
    only: Option<Key>,
}

#[derive(Clone)]
struct Key {
    algorithm: Algorithm,
    key: DecodingKey,
}

/// Why the issuers of the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OidcError {
    /// The roots that its server is checked with.
    #[error("read the certificates in {path} for the issuer {issuer}")]
    Roots {
        /// Whose.
        issuer: String,
        /// The file.
        path: String,
        /// Why.
        source: RootsError,
    },
    /// The client.
    #[error("prepare HTTPS for the issuer {issuer}")]
    Client {
        /// Whose.
        issuer: String,
        /// Why.
        source: reqwest::Error,
    },
}

/// Why a file of certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It holds something else.
    #[error("it does not hold PEM certificates")]
    Pem(#[source] Option<reqwest::Error>),
}

/// Why an attempt to get the keys failed.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("fetch the keys")]
    Http(#[from] reqwest::Error),
    #[error("the server answers {0}")]
    Status(reqwest::StatusCode),
    #[error("read the file of keys")]
    File(#[from] io::Error),
    #[error("the set of keys is over {MAX_SET} bytes")]
    TooLarge,
    #[error("the answer is no set of keys (RFC 7517)")]
    Json(#[from] serde_json::Error),
    #[error("it has {0} keys, more than {MAX_KEYS}")]
    TooMany(usize),
    #[error("it has no key for RS256, ES256 or EdDSA")]
    None,
}

/// Where keys come from.
enum Source {
    Uri(Client, String),
    File(std::path::PathBuf),
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<Value>,
}

impl Issuers {
    /// Begins to fetch the keys of each.
    pub(crate) fn start(configs: &[OidcIssuer], tasks: &Tasks) -> Result<Self, OidcError> {
        let mut issuers = Vec::with_capacity(configs.len());
        for config in configs {
            let source = Source::of(config)?;
            let issuer = Issuer { config: Arc::new(config.clone()), keys: Arc::default(), wanted: Arc::default() };
            let (following, shutdown) = (issuer.clone(), tasks.shutdown());
            tasks.spawn("issuer-keys", async move {
                tokio::select! {
                    () = shutdown.requested() => {}
                    () = following.follow(source) => {}
                }
            });
            issuers.push(issuer);
        }
        Ok(Self(Arc::new(issuers)))
    }
}

impl Issuer {
    /// The key of that name, if it is for that algorithm. An unknown one makes the keys be fetched again.
    pub(super) fn key(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<DecodingKey, JwtError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let found = match kid {
            Some(kid) => keys.named.get(kid),
            None => keys.only.as_ref(),
        };
        let Some(found) = found else {
            self.wanted.notify_one();
            return Err(JwtError::UnknownKey);
        };
        // What the token says of its algorithm never makes another use of a key.
        if found.algorithm != algorithm {
            return Err(JwtError::Algorithm);
        }
        Ok(found.key.clone())
    }

    async fn follow(&self, source: Source) {
        let min = self.config.keys_min_refresh;
        loop {
            let begun = Instant::now();
            match source.fetch().await {
                Ok(keys) => {
                    let mut held = self.keys.write().unwrap_or_else(PoisonError::into_inner);
                    *held = keys;
                }
                Err(error) => tracing::warn!(
                    issuer = %self.config.issuer, error = %chain(&error),
                    "cannot get the issuer's keys; those of before go on"
                ),
            }
            // Whoever asked for a key meanwhile has asked for what has just been fetched.
            sleep_until(begun + min).await;
            let unsuccessful = self.keys.read().unwrap_or_else(PoisonError::into_inner).is_empty();
            let next = if unsuccessful { begun + min } else { begun + REFRESH.max(min) };
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.wanted.notified() => {}
            }
        }
    }
}

impl Source {
    fn of(config: &OidcIssuer) -> Result<Self, OidcError> {
        let issuer = || config.issuer.clone();
        let Some(uri) = &config.jwks_uri else {
            return Ok(Self::File(config.jwks_file.clone().unwrap_or_default()));
        };
        // Dialled directly: a proxy of the environment is not to decide who gets in.
        let mut client = Client::builder()
            .https_only(true)
            .redirect(Policy::none())
            .no_proxy()
            .timeout(DEADLINE)
            .connect_timeout(DEADLINE);
        if let Some(path) = &config.ca_file {
            let roots = roots(path).map_err(|source| OidcError::Roots {
                issuer: issuer(),
                path: path.display().to_string(),
                source,
            })?;
            client = client.tls_certs_only(roots);
        }
        let client = client.build().map_err(|source| OidcError::Client { issuer: issuer(), source })?;
        Ok(Self::Uri(client, uri.clone()))
    }

    async fn fetch(&self) -> Result<Keys, FetchError> {
        let bytes = match self {
            Self::Uri(client, uri) => {
                let mut answer = client.get(uri).send().await?;
                if !answer.status().is_success() {
                    return Err(FetchError::Status(answer.status()));
                }
                let mut bytes = Vec::new();
                while let Some(chunk) = answer.chunk().await? {
                    if bytes.len() + chunk.len() > MAX_SET {
                        return Err(FetchError::TooLarge);
                    }
                    bytes.extend_from_slice(&chunk);
                }
                bytes
            }
            Self::File(path) => {
                let path = path.clone();
                let read = move || read_bounded(&path);
                tokio::task::spawn_blocking(read).await.map_err(|_| FetchError::TooLarge)??
            }
        };
        parse(&bytes)
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, FetchError> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_SET as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_SET { Err(FetchError::TooLarge) } else { Ok(bytes) }
}

fn roots(path: &Path) -> Result<Vec<Certificate>, RootsError> {
    let found = Certificate::from_pem_bundle(&fs::read(path)?).map_err(|error| RootsError::Pem(Some(error)))?;
    if found.is_empty() { Err(RootsError::Pem(None)) } else { Ok(found) }
}

/// The usable keys of a set. Others are passed over: sets hold keys for other purposes too.
fn parse(bytes: &[u8]) -> Result<Keys, FetchError> {
    let set: Set = serde_json::from_slice(bytes)?;
    if set.keys.len() > MAX_KEYS {
        return Err(FetchError::TooMany(set.keys.len()));
    }
    let usable: Vec<(Option<String>, Key)> = set.keys.into_iter().filter_map(usable).collect();
    let only = if let [(_, key)] = usable.as_slice() { Some(key.clone()) } else { None };
    let named = usable.into_iter().filter_map(|(kid, key)| Some((kid?, key))).collect();
    let keys = Keys { named, only };
    if keys.is_empty() { Err(FetchError::None) } else { Ok(keys) }
}

fn usable(value: Value) -> Option<(Option<String>, Key)> {
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    if jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature) {
        return None;
    }
    let (algorithm, named) = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
        AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P256 => {
            (Algorithm::ES256, KeyAlgorithm::ES256)
        }
        AlgorithmParameters::OctetKeyPair(ed) if ed.curve == EllipticCurve::Ed25519 => {
            (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
        }
        // A shared secret has no place in a published set.
        _ => return None,
    };
    if jwk.common.key_algorithm.is_some_and(|declared| declared != named) {
        return None;
    }
    let key = DecodingKey::from_jwk(&jwk).ok()?;
    let kid = jwk.common.key_id.filter(|kid| kid.len() <= MAX_KID);
    Some((kid, Key { algorithm, key }))
}

impl Keys {
    fn is_empty(&self) -> bool {
        self.named.is_empty() && self.only.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_for_other_purposes_are_passed_over() {
        let ec = r#""kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0""#;
        let set = format!(
            r#"{{"keys":[{{{ec},"kid":"good","use":"sig","alg":"ES256"}},{{{ec},"kid":"enc","use":"enc"}},
            {{{ec},"kid":"other","alg":"ES384"}},{{"kty":"oct","kid":"secret","k":"AAAA"}},{{"kty":"new"}},7]}}"#
        );
        let keys = parse(set.as_bytes()).unwrap();
        assert_eq!(keys.named.keys().collect::<Vec<_>>(), ["good"]);
        assert!(keys.only.is_some(), "the only one that is usable needs no name");
        let two = format!(r#"{{"keys":[{{{ec},"kid":"a"}},{{{ec},"kid":"b"}}]}}"#);
        assert!(parse(two.as_bytes()).unwrap().only.is_none());
    }

    #[test]
    fn sets_that_are_none_are_refused() {
        for (bad, says) in [
            ("", "no set"),
            ("[]", "no set"),
            (r#"{"keys":[]}"#, "no key"),
            (r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#, "no key"),
        ] {
            let error = parse(bad.as_bytes()).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
        let many = format!(r#"{{"keys":[{}]}}"#, vec!["0"; MAX_KEYS + 1].join(","));
        assert!(matches!(parse(many.as_bytes()), Err(FetchError::TooMany(_))));
    }
}
