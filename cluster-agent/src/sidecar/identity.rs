//! The workload's certificate: got once with a one-time token, kept on disk, renewed at half of its life.
//!
//! The private key is made here and never leaves this machine. With a valid certificate on disk the launcher starts without
//! agent and without token. Each renewal uses a new key; Envoy gets the new pair over SDS, without a restart.

use std::{collections::BTreeMap, io, path::Path, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use isthmus_api::proto::local::v1::{EnrolRequest, EnrolResponse, RenewRequest, local_client::LocalClient};
use isthmus_identity::{
    bundle::{BundleDocument, BundleError, TrustStore},
    grpc::connect_lazy,
    keys::{KeyError, KeyPair},
    renew::renew_at,
    svid::{Svid, SvidError},
    tls::{IdentitySource, PeerPolicy, TlsError, client_config, pinned_client_config},
    token::{Token, TokenError, TokenKind},
};
use isthmus_model::{
    ids::{ClusterName, IdError, SpiffeId, TrustDomain},
    time::Timestamp,
};
use isthmus_runtime::{
    backoff::Backoff,
    files,
    tasks::{Shutdown, chain},
};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status, transport::Channel};

use super::{config::Config, metrics::Metrics, secrets::Secrets};

/// Name of the certificate's files in the state folder.
const SVID: &str = "workload";
const MEMBERSHIP: &str = "agent.json";
/// One call to the agent, connection included.
const CALL: Duration = Duration::from_secs(10);
const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(5);
/// No certificate is renewed sooner than this after it came, however short its life.
const SHORTEST_USE: Duration = Duration::from_secs(1);
/// The wait before a renewal is cut into pieces of this length, so that a suspended machine does not oversleep.
const RENEWAL_CHECK: Duration = Duration::from_secs(30);

/// Why there is no certificate. Says what to do.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Nothing to start from.
    #[error(
        "there is no valid certificate in {state} and no token in {token}: mint one with `isthmus-agent token workload \
         NAMESPACE/SERVICEACCOUNT --config <the agent's config>` and put it there"
    )]
    NoToken {
        /// The state folder.
        state: String,
        /// `agentTokenFile`.
        token: String,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// The token is of no use.
    #[error("use the token in {path}")]
    Token {
        /// `agentTokenFile`.
        path: String,
        /// What is wrong with it.
        source: TokenError,
    },
    /// A token for a gateway or DNS server.
    #[error("the token in {path} is for {subject:?}, a token for a workload is needed")]
    Subject {
        /// `agentTokenFile`.
        path: String,
        /// What it is for.
        subject: String,
    },
    /// The agent refuses.
    #[error("the agent at {address} refuses the token in {path}: {message}; mint a new one with `{command}`")]
    Refused {
        /// The agent's address.
        address: String,
        /// `agentTokenFile`.
        path: String,
        /// The agent's words.
        message: String,
        /// The command that mints another.
        command: String,
    },
    /// The agent's answer does not hold together.
    #[error("the agent's answer is not usable: {0}")]
    Answer(&'static str),
    /// A name in it is not valid.
    #[error("the agent's answer is not usable")]
    Name(#[from] IdError),
    /// The certificate is not usable.
    #[error("use the workload's certificate")]
    Svid(#[from] SvidError),
    /// No key.
    #[error("use the workload's key")]
    Key(#[from] KeyError),
    /// The federation's bundle is not usable.
    #[error("read the federation's trust bundle")]
    Bundle(#[from] BundleError),
    /// TLS.
    #[error("prepare TLS to the agent")]
    Tls(#[from] TlsError),
    /// The state folder.
    #[error("read or write {path}")]
    State {
        /// Which file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Asked to stop before there was a certificate.
    #[error("asked to stop before the agent had answered")]
    Stopped,
}

/// Which agent this workload belongs to.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Membership {
    /// `host:port`.
    pub(super) address: String,
    pub(super) cluster: ClusterName,
    pub(super) federation: TrustDomain,
    /// The federation's roots, base64 DER: they verify the agent.
    roots: Vec<String>,
}

/// What the launcher is.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) source: IdentitySource,
    pub(super) membership: Membership,
    /// Holds the federation's roots.
    pub(super) trust: TrustStore,
}

impl Identity {
    /// From disk, or else from the agent by token; waits for the agent as long as the token is valid.
    pub(super) async fn obtain(config: &Config, shutdown: &Shutdown) -> Result<Self, IdentityError> {
        if let Some(identity) = Self::load(&config.state_dir)? {
            return Ok(identity);
        }
        let token = read_token(config)?;
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        loop {
            match enrol(&token).await {
                Ok((svid, membership)) => {
                    membership.save(&config.state_dir)?;
                    svid.save(&config.state_dir, SVID)?;
                    tracing::info!(id = %svid.id(), cluster = %membership.cluster, "enrolled");
                    return Self::new(svid, membership);
                }
                Err(Attempt::Fatal(error)) => return Err(error),
                Err(Attempt::Refused(message)) => {
                    return Err(IdentityError::Refused {
                        address: token.address.clone(),
                        path: config.agent_token_file.display().to_string(),
                        message,
                        command: token.mint_command(),
                    });
                }
                Err(Attempt::Again(status)) => {
                    let wait = backoff.next();
                    tracing::warn!(agent = token.address, error = %chain(&status), "cannot enrol yet");
                    tokio::select! {
                        () = shutdown.requested() => return Err(IdentityError::Stopped),
                        () = sleep(wait) => {}
                    }
                    // Says so when the token has expired meanwhile.
                    read_token(config)?;
                }
            }
        }
    }

    fn load(state: &Path) -> Result<Option<Self>, IdentityError> {
        let Some(svid) = Svid::load(state, SVID)? else { return Ok(None) };
        let Some(membership) = Membership::load(state)? else { return Ok(None) };
        if svid.not_after() <= now() {
            tracing::warn!(id = %svid.id(), "the certificate in the state folder has expired; a token is needed");
            return Ok(None);
        }
        Self::new(svid, membership).map(Some)
    }

    fn new(svid: Svid, membership: Membership) -> Result<Self, IdentityError> {
        let trust = TrustStore::new();
        trust.set([(membership.federation.clone(), membership.roots()?)].into());
        Ok(Self { source: IdentitySource::new(svid), membership, trust })
    }

    /// A channel to the agent, and to nobody else, with the current certificate.
    pub(super) fn channel(&self) -> Result<Channel, IdentityError> {
        let agent = SpiffeId::component(&self.membership.federation, &self.membership.cluster, "agent")?;
        let policy: PeerPolicy = Arc::new(move |id| *id == agent);
        let tls = client_config(Some(&self.source), &self.trust, policy, &[b"h2"])?;
        Ok(connect_lazy(&self.membership.address, Arc::new(tls)))
    }

    /// Takes the federation's current roots; they are kept for the next start.
    pub(super) fn trust_federation(&self, state: &Path, roots: Vec<CertificateDer<'static>>) {
        let federation = &self.membership.federation;
        if roots.is_empty() || self.trust.get().get(federation) == Some(&roots) {
            return;
        }
        self.trust.set([(federation.clone(), roots.clone())].into());
        let membership = Membership { roots: encode(&roots), ..self.membership.clone() };
        if let Err(error) = membership.save(state) {
            tracing::error!(error = %chain(&error), "cannot keep the federation's new roots");
        }
    }

    /// Renews until shutdown.
    pub(super) async fn keep_fresh(self, config: Config, secrets: Secrets, metrics: Metrics, shutdown: Shutdown) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let mut earliest = Timestamp(0);
        loop {
            let svid = self.source.current();
            metrics.svid_expiry.set(i64::try_from(svid.not_after().0 / 1000).unwrap_or(i64::MAX));
            let due = renew_at(&svid).max(earliest);
            while now() < due {
                tokio::select! {
                    () = shutdown.requested() => return,
                    () = sleep(due.since(now()).min(RENEWAL_CHECK)) => {}
                }
            }
            if shutdown.is_requested() {
                return;
            }
            match self.renew(&config.state_dir).await {
                Ok(svid) => {
                    tracing::info!(id = %svid.id(), expires = %svid.not_after(), "certificate renewed");
                    // A CA dates certificates back, for clocks that differ; half of a short life may have passed at issue.
                    let now = now();
                    earliest = now + (svid.not_after().since(now) / 3).max(SHORTEST_USE);
                    metrics.renewals.inc();
                    self.source.set(svid.clone());
                    secrets.set_svid(svid);
                    backoff.reset();
                }
                Err(error) => {
                    metrics.renewal_failures.inc();
                    tracing::warn!(error = %chain(&error), expires = %svid.not_after(), "cannot renew the certificate");
                    tokio::select! {
                        () = shutdown.requested() => return,
                        () = sleep(backoff.next()) => {}
                    }
                }
            }
        }
    }

    async fn renew(&self, state: &Path) -> Result<Svid, RenewError> {
        let key = KeyPair::generate().map_err(IdentityError::from)?;
        let csr = key.csr_der().map_err(IdentityError::from)?;
        let mut client = LocalClient::new(self.channel()?);
        let answer = timeout(CALL, client.renew(RenewRequest { csr })).await.map_err(|_| RenewError::Deadline)??;
        let answer = answer.into_inner();
        let svid = svid_of(&answer, &key)?;
        if svid.id() != self.source.current().id() {
            return Err(IdentityError::Answer("the new certificate is for another identity").into());
        }
        self.trust_federation(state, federation_roots(&answer)?);
        svid.save(state, SVID).map_err(IdentityError::from)?;
        Ok(svid)
    }
}

#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error("the agent did not answer in time")]
    Deadline,
    #[error("the agent refuses")]
    Status(#[from] Status),
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl Membership {
    fn load(state: &Path) -> Result<Option<Self>, IdentityError> {
        let path = state.join(MEMBERSHIP);
        let failed = |source| IdentityError::State { path: path.display().to_string(), source };
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| failed(e.into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed(e)),
        }
    }

    fn save(&self, state: &Path) -> Result<(), IdentityError> {
        let path = state.join(MEMBERSHIP);
        serde_json::to_vec_pretty(self)
            .map_err(io::Error::from)
            .and_then(|bytes| files::write_atomic(&path, &bytes))
            .map_err(|source| IdentityError::State { path: path.display().to_string(), source })
    }

    fn roots(&self) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        let decode = |text: &String| STANDARD.decode(text).map(CertificateDer::from).ok();
        let roots: Option<Vec<_>> = self.roots.iter().map(decode).collect();
        roots
            .filter(|r| !r.is_empty())
            .ok_or(IdentityError::Answer("agent.json holds no roots; remove it and use a new token"))
    }
}

enum Attempt {
    Again(Status),
    Refused(String),
    Fatal(IdentityError),
}

impl<E: Into<IdentityError>> From<E> for Attempt {
    fn from(error: E) -> Self {
        Self::Fatal(error.into())
    }
}

async fn enrol(token: &Token) -> Result<(Svid, Membership), Attempt> {
    let cluster = token.cluster.clone();
    // The federation's name is not known yet; the pin says whose word counts.
    let policy: PeerPolicy = Arc::new(move |id| id.segments().eq(["cluster", cluster.as_str(), "agent"]));
    let (tls, pinned) = pinned_client_config(token.ca_pin, policy)?;
    let key = KeyPair::generate()?;
    let csr = key.csr_der()?;
    let mut client = LocalClient::new(connect_lazy(&token.address, Arc::new(tls)));
    let request = EnrolRequest { secret: token.secret.clone(), csr };
    let answer = match timeout(CALL, client.enrol(request)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => {
            return Err(match status.code() {
                Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled | Code::Internal => {
                    Attempt::Again(status)
                }
                _ => Attempt::Refused(status.message().to_owned()),
            });
        }
        Err(_) => return Err(Attempt::Again(Status::deadline_exceeded("no answer in time"))),
    };
    let svid = svid_of(&answer, &key)?;
    let roots = federation_roots(&answer)?;
    if pinned.get().is_none_or(|root| !roots.contains(&root)) {
        return Err(IdentityError::Answer("the federation's bundle lacks the root that the token pins").into());
    }
    let wanted = token.subject.split('/').skip(1);
    if !svid.id().segments().step_by(2).eq(["ns", "sa"]) || !svid.id().segments().skip(1).step_by(2).eq(wanted) {
        return Err(IdentityError::Answer("the certificate is not for the token's workload").into());
    }
    let membership = Membership {
        address: token.address.clone(),
        cluster: answer.cluster.parse().map_err(IdentityError::from)?,
        federation: answer.federation.parse().map_err(IdentityError::from)?,
        roots: encode(&roots),
    };
    if membership.cluster != token.cluster {
        return Err(IdentityError::Answer("it names another cluster than the token").into());
    }
    Ok((svid, membership))
}

fn read_token(config: &Config) -> Result<Token, IdentityError> {
    let path = config.agent_token_file.display().to_string();
    let text = std::fs::read_to_string(&config.agent_token_file).map_err(|source| IdentityError::NoToken {
        state: config.state_dir.display().to_string(),
        token: path.clone(),
        source,
    })?;
    let token = Token::parse(&text)
        .and_then(|token| token.require(TokenKind::Local))
        .map_err(|source| IdentityError::Token { path: path.clone(), source })?;
    if !token.subject.starts_with("workload/") {
        return Err(IdentityError::Subject { path, subject: token.subject });
    }
    Ok(token)
}

fn svid_of(answer: &EnrolResponse, key: &KeyPair) -> Result<Svid, IdentityError> {
    let chain = answer.certificate_chain.iter().cloned().map(CertificateDer::from).collect();
    Ok(Svid::new(chain, key)?)
}

fn federation_roots(answer: &EnrolResponse) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let bundle = answer.federation_bundle.as_ref().ok_or(IdentityError::Answer("it has no federation bundle"))?;
    let text = std::str::from_utf8(&bundle.document)
        .map_err(|_| IdentityError::Answer("the federation's bundle is not UTF-8"))?;
    Ok(BundleDocument::parse(text)?.x509_roots)
}

fn encode(roots: &[CertificateDer<'_>]) -> Vec<String> {
    roots.iter().map(|root| STANDARD.encode(root)).collect()
}

fn now() -> Timestamp {
    Timestamp(isthmus_runtime::now())
}

/// Roots by trust domain.
pub(super) type Roots = BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>;
