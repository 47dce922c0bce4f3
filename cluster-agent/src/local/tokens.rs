//! One-time local tokens: who may enrol as what, once, until when.
//!
//! In: mint and claim. Out: the token's subject, or why it is refused. Only hashes of the secrets are kept, in a file of
//! the state folder, so that neither a restart nor a crash makes a used token good again. A claim that fails before its
//! certificate was made gives the token back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use isthmus_identity::token::Token;
use isthmus_model::{
    ids::{Namespace, check_label},
    time::Timestamp,
};
use isthmus_runtime::files::write_secret;
use serde::{Deserialize, Serialize};

/// Tokens remembered at once.
const MAX_TOKENS: usize = 10_000;
/// How long an expired token is remembered, so that its holder is told "expired" or "used" and not "unknown".
const REMEMBER: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Whom a token admits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Subject {
    /// A gateway of this name.
    Gateway(String),
    /// A DNS server of this name.
    Dns(String),
    /// A workload under this service account.
    #[serde(rename_all = "camelCase")]
    Workload {
        /// Its namespace.
        namespace: Namespace,
        /// Its service account.
        service_account: String,
    },
}

impl Subject {
    /// `gateway/NAME`, `dns/NAME` or `workload/NAMESPACE/SERVICE-ACCOUNT`, as written in the token.
    pub fn text(&self) -> String {
        match self {
            Self::Gateway(name) => format!("gateway/{name}"),
            Self::Dns(name) => format!("dns/{name}"),
            Self::Workload { namespace, service_account } => format!("workload/{namespace}/{service_account}"),
        }
    }

    /// How to mint another one.
    fn command(&self) -> String {
        match self {
            Self::Gateway(name) => format!("isthmus-agent token gateway {name}"),
            Self::Dns(name) => format!("isthmus-agent token dns {name}"),
            Self::Workload { namespace, service_account } => {
                format!("isthmus-agent token workload {namespace}/{service_account}")
            }
        }
    }

    /// Checks the name of a gateway, DNS server or service account.
    pub fn check_name(name: &str) -> Result<(), String> {
        check_label("name", name).map_err(|e| e.to_string())
    }
}

/// Why a token admits nobody. `Display` is for the one who holds it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Never minted here, or forgotten long after its end.
    #[error("this agent does not know the token; mint a new one on the agent's machine: isthmus-agent token …")]
    Unknown,
    /// Too late.
    #[error("the token has expired; mint a new one on the agent's machine: {0}")]
    Expired(String),
    /// Somebody enrolled with it.
    #[error("the token was already used, and works once only; mint a new one on the agent's machine: {0}")]
    Used(String),
    /// Somebody is enrolling with it right now.
    #[error("the token is being used by another enrolment at this moment")]
    Busy,
}

/// Why the book of tokens could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read or written.
    #[error("token file {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file holds something else.
    #[error(
        "token file {path} is damaged; remove it to start with no tokens: those handed out and unused must be minted again"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Too many live tokens.
    #[error("there are {MAX_TOKENS} unexpired tokens already; wait for some to expire")]
    Full,
}

/// The book of tokens. Clones share it. Calls block on the disk: use them off the async threads.
#[derive(Clone, Debug)]
pub struct Tokens {
    path: Arc<PathBuf>,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    book: Book,
    /// Claimed and not settled.
    busy: BTreeSet<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Book {
    /// By the hex of the secret's hash.
    tokens: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    subject: Subject,
    expires_at: Timestamp,
    used_at: Option<Timestamp>,
}

impl Tokens {
    /// Opens the book, or starts an empty one if there is no file.
    pub fn open(path: PathBuf) -> Result<Self, TokenError> {
        let book = match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| TokenError::Damaged { path: path.clone(), source })?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Book::default(),
            Err(source) => return Err(TokenError::Io { path, source }),
        };
        Ok(Self { path: Arc::new(path), inner: Arc::new(Mutex::new(Inner { book, busy: BTreeSet::new() })) })
    }

    /// Remembers a minted token. On disk when this returns.
    pub fn add(&self, secret: &str, subject: Subject, expires_at: Timestamp, now: Timestamp) -> Result<(), TokenError> {
        let mut inner = self.lock();
        let mut book = inner.book.clone();
        book.tokens.retain(|_, t| now < t.expires_at + REMEMBER);
        if book.tokens.len() >= MAX_TOKENS {
            // Those that can no longer be used go before their time.
            book.tokens.retain(|_, t| now < t.expires_at && t.used_at.is_none());
        }
        if book.tokens.len() >= MAX_TOKENS {
            return Err(TokenError::Full);
        }
        book.tokens.insert(key(secret), Entry { subject, expires_at, used_at: None });
        self.save(&book)?;
        inner.book = book;
        Ok(())
    }

    /// Takes the token for one enrolment. The claim must be settled with [`Claim::commit`]; dropped, it gives the token
    /// back.
    pub fn claim(&self, secret: &str, now: Timestamp) -> Result<Claim, Refusal> {
        let key = key(secret);
        let mut inner = self.lock();
        let entry = inner.book.tokens.get(&key).ok_or(Refusal::Unknown)?;
        if entry.used_at.is_some() {
            return Err(Refusal::Used(entry.subject.command()));
        }
        if entry.expires_at <= now {
            return Err(Refusal::Expired(entry.subject.command()));
        }
        let subject = entry.subject.clone();
        if !inner.busy.insert(key.clone()) {
            return Err(Refusal::Busy);
        }
        Ok(Claim { tokens: self.clone(), key, subject })
    }

    fn save(&self, book: &Book) -> Result<(), TokenError> {
        let path = self.path.as_ref();
        let bytes = serde_json::to_vec_pretty(book)
            .map_err(|e| TokenError::Io { path: path.clone(), source: io::Error::other(e) })?;
        write_secret(path, &bytes).map_err(|source| TokenError::Io { path: path.clone(), source })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The book is replaced whole, so it is sound even after a panic elsewhere.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A token in use by one enrolment.
#[derive(Debug)]
pub struct Claim {
    tokens: Tokens,
    key: String,
    subject: Subject,
}

impl Claim {
    /// Whom it admits.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Marks the token used, on disk, for good. To be called before the certificate is handed out.
    pub fn commit(self, now: Timestamp) -> Result<(), TokenError> {
        let mut inner = self.tokens.lock();
        let mut book = inner.book.clone();
        if let Some(entry) = book.tokens.get_mut(&self.key) {
            entry.used_at = Some(now);
        }
        self.tokens.save(&book)?;
        inner.book = book;
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.tokens.lock().busy.remove(&self.key);
    }
}

fn key(secret: &str) -> String {
    hex::encode(Token::secret_hash(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000);
    const LATER: Timestamp = Timestamp(2_000_000);

    fn gateway() -> Subject {
        Subject::Gateway("gateway-1".to_owned())
    }

    #[test]
    fn a_token_admits_once_even_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.json");
        let tokens = Tokens::open(path.clone()).unwrap();
        tokens.add("s3cret", gateway(), LATER, NOW).unwrap();

        let tokens = Tokens::open(path.clone()).unwrap();
        let claim = tokens.claim("s3cret", NOW).unwrap();
        assert_eq!(claim.subject(), &gateway());
        claim.commit(NOW).unwrap();
        assert!(matches!(tokens.claim("s3cret", NOW), Err(Refusal::Used(_))));

        let tokens = Tokens::open(path).unwrap();
        let refusal = tokens.claim("s3cret", NOW).unwrap_err();
        assert_eq!(refusal, Refusal::Used("isthmus-agent token gateway gateway-1".to_owned()));
    }

    #[test]
    fn a_failed_enrolment_gives_the_token_back() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path().join("tokens.json")).unwrap();
        tokens.add("s", gateway(), LATER, NOW).unwrap();
        let claim = tokens.claim("s", NOW).unwrap();
        assert_eq!(tokens.claim("s", NOW).unwrap_err(), Refusal::Busy);
        drop(claim);
        assert!(tokens.claim("s", NOW).is_ok());
    }

    #[test]
    fn expired_and_unknown_tokens_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path().join("tokens.json")).unwrap();
        tokens.add("s", gateway(), LATER, NOW).unwrap();
        assert!(matches!(tokens.claim("s", LATER), Err(Refusal::Expired(_))));
        assert_eq!(tokens.claim("other", NOW).unwrap_err(), Refusal::Unknown);
    }

    #[test]
    fn the_file_holds_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.json");
        Tokens::open(path.clone()).unwrap().add("s3cret", gateway(), LATER, NOW).unwrap();
        assert!(!fs::read_to_string(path).unwrap().contains("s3cret"));
    }

    #[test]
    fn a_damaged_file_is_an_error_and_not_an_empty_book() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.json");
        fs::write(&path, "{").unwrap();
        assert!(matches!(Tokens::open(path), Err(TokenError::Damaged { .. })));
    }
}
