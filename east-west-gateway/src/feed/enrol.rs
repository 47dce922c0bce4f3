//! How the gateway becomes a member of its cluster: once, with a one-time token from the agent.
//!
//! The token names the agent's address and pins the federation's CA; the key is made here and never leaves. What comes
//! back is kept in the state folder (`gateway.pem`, `gateway.key`, `member.json`), so that a restart needs nobody. An agent
//! that cannot be reached is tried again; one that refuses ends the process with the reason.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use isthmus_api::proto::local::v1::{EnrolRequest, EnrolResponse, local_client::LocalClient};
use isthmus_identity::{
    bundle::{BundleDocument, BundleError, TrustStore},
    grpc,
    keys::{KeyError, KeyPair},
    svid::{Svid, SvidError},
    tls::{self, PeerPolicy, TlsError},
    token::{Token, TokenError, TokenKind},
};
use isthmus_model::{
    ids::{ClusterName, IdError, SpiffeId, TrustDomain},
    service::TrustBundle,
};
use isthmus_runtime::{backoff::Backoff, files, tasks::chain};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::time;

use crate::config::Config;

/// The files' name.
pub(super) const SVID_NAME: &str = "gateway";
const CALL: Duration = Duration::from_secs(10);

/// Why the gateway has no identity.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnrolError {
    #[error(
        "this gateway has no certificate and no token: run `isthmus-agent token gateway {name} --config …` in its \
         cluster, put the token into a file and name it in agentTokenFile"
    )]
    NoToken { name: String },
    #[error("read the token file {path} (agentTokenFile)")]
    ReadToken { path: PathBuf, source: io::Error },
    #[error("the token in {path} is not usable; mint one with `isthmus-agent token gateway {name} --config …`")]
    Token { path: PathBuf, name: String, source: TokenError },
    #[error("the token is for {subject:?}, but this gateway is called {name:?}: mint one for gateway/{name}")]
    OtherSubject { subject: String, name: String },
    #[error("the agent at {address} refused to enrol this gateway: {message}")]
    Refused { address: String, message: String },
    #[error("the agent's answer does not fit the token: {0}")]
    Answer(&'static str),
    #[error("the certificate in {dir} ended; {hint}", dir = .dir.display())]
    Expired { dir: PathBuf, hint: String },
    #[error("use the certificate")]
    Svid(#[from] SvidError),
    #[error("use the key")]
    Key(#[from] KeyError),
    #[error("use the federation's trust bundle")]
    Bundle(#[from] BundleError),
    #[error("configure TLS")]
    Tls(#[from] TlsError),
    #[error("build this gateway's SPIFFE ID")]
    Id(#[from] IdError),
    #[error("keep the membership in {path}")]
    Keep { path: PathBuf, source: io::Error },
    #[error("{path} is damaged: remove it and enrol again with a new token")]
    Damaged { path: PathBuf, source: serde_json::Error },
}

/// What a member knows besides its certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Membership {
    pub(crate) cluster: ClusterName,
    pub(crate) federation: TrustDomain,
    /// Where the agent is dialled.
    pub(crate) agent: String,
    pub(crate) bundle: TrustBundle,
}

/// A member.
#[derive(Debug)]
pub(crate) struct Enrolled {
    pub(crate) membership: Membership,
    pub(crate) svid: Svid,
    pub(crate) trust: TrustStore,
}

impl Membership {
    fn path(dir: &Path) -> PathBuf {
        dir.join("member.json")
    }

    fn load(dir: &Path) -> Result<Option<Self>, EnrolError> {
        let path = Self::path(dir);
        match std::fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).map_err(|source| EnrolError::Damaged { path, source })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(EnrolError::Keep { path, source }),
        }
    }

    /// Replaces what is on disk.
    pub(super) fn save(&self, dir: &Path) -> Result<(), EnrolError> {
        let path = Self::path(dir);
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        files::write_secret(&path, &text).map_err(|source| EnrolError::Keep { path, source })
    }

    /// The federation's roots, for verifiers.
    pub(super) fn apply(&self, trust: &TrustStore) -> Result<(), EnrolError> {
        let roots = BundleDocument::parse(&self.bundle.document)?.x509_roots;
        trust.set(BTreeMap::from([(self.federation.clone(), roots)]));
        Ok(())
    }

    /// The one that may sign for the agent's end of a connection.
    pub(super) fn agent_policy(&self) -> Result<PeerPolicy, EnrolError> {
        let agent = SpiffeId::component(&self.federation, &self.cluster, "agent")?;
        Ok(Arc::new(move |id| *id == agent))
    }
}

/// The membership from disk, or a new one by token. Waits for an agent that cannot be reached.
pub(crate) async fn enrolled(config: &Config) -> Result<Enrolled, EnrolError> {
    let dir = &config.state_dir;
    if let (Some(svid), Some(membership)) = (Svid::load(dir, SVID_NAME)?, Membership::load(dir)?) {
        if svid.not_after().0 > isthmus_runtime::now() {
            return finish(membership, svid);
        }
        tracing::warn!(dir = %dir.display(), "the certificate has ended; enrolling anew");
        return by_token(config).await.map_err(|error| EnrolError::Expired { dir: dir.clone(), hint: chain(&error) });
    }
    by_token(config).await
}

fn finish(membership: Membership, svid: Svid) -> Result<Enrolled, EnrolError> {
    let trust = TrustStore::new();
    membership.apply(&trust)?;
    Ok(Enrolled { membership, svid, trust })
}

async fn by_token(config: &Config) -> Result<Enrolled, EnrolError> {
    let name = config.name.clone();
    let path = config.agent_token_file.clone().ok_or(EnrolError::NoToken { name: name.clone() })?;
    let text = std::fs::read_to_string(&path).map_err(|source| EnrolError::ReadToken { path: path.clone(), source })?;
    let token = Token::parse(text.trim())
        .and_then(|t| t.require(TokenKind::Local))
        .map_err(|source| EnrolError::Token { path, name: name.clone(), source })?;
    if token.subject != format!("gateway/{name}") {
        return Err(EnrolError::OtherSubject { subject: token.subject, name });
    }
    let key = KeyPair::generate()?;
    let csr = key.csr_der()?;
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    loop {
        match call(&token, &csr).await? {
            Ok((response, root)) => return accept(config, &token, &key, response, &root),
            Err(status) => {
                tracing::warn!(agent = token.address, error = %status, "agent not reached; trying again");
                time::sleep(backoff.next()).await;
            }
        }
    }
}

type Answer = Result<(EnrolResponse, CertificateDer<'static>), tonic::Status>;

/// One call. The inner error is worth another.
async fn call(token: &Token, csr: &[u8]) -> Result<Answer, EnrolError> {
    let cluster = token.cluster.to_string();
    // The federation's name is not known yet; the pinned root speaks for it.
    let policy: PeerPolicy = Arc::new(move |id| id.segments().eq(["cluster", cluster.as_str(), "agent"]));
    let (tls, pinned) = tls::pinned_client_config(token.ca_pin, policy)?;
    let mut client = LocalClient::new(grpc::connect_lazy(&token.address, Arc::new(tls)));
    let request = EnrolRequest { secret: token.secret.clone(), csr: csr.to_vec() };
    let answer = match time::timeout(CALL, client.enrol(request)).await {
        Ok(answer) => answer,
        Err(_) => Err(tonic::Status::deadline_exceeded("no answer in time")),
    };
    match answer {
        Ok(response) => {
            let root = pinned.get().ok_or(EnrolError::Answer("its certificate's root is not known"))?;
            Ok(Ok((response.into_inner(), root)))
        }
        Err(status) if is_final(&status) => {
            Err(EnrolError::Refused { address: token.address.clone(), message: status.message().to_owned() })
        }
        Err(status) => Ok(Err(status)),
    }
}

/// The agent has judged; asking again changes nothing.
fn is_final(status: &tonic::Status) -> bool {
    use tonic::Code;
    matches!(
        status.code(),
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::Unimplemented
    )
}

fn accept(
    config: &Config,
    token: &Token,
    key: &KeyPair,
    response: EnrolResponse,
    root: &CertificateDer<'static>,
) -> Result<Enrolled, EnrolError> {
    let cluster: ClusterName = response.cluster.parse()?;
    let federation: TrustDomain = response.federation.parse()?;
    let bundle = response.federation_bundle.ok_or(EnrolError::Answer("it has no trust bundle"))?;
    let bundle = TrustBundle::try_from(bundle).map_err(|_| EnrolError::Answer("its trust bundle is malformed"))?;
    let roots = BundleDocument::parse(&bundle.document)?.x509_roots;
    if cluster != token.cluster || response.name != config.name {
        return Err(EnrolError::Answer("it is for another cluster or gateway"));
    }
    if bundle.trust_domain != federation || !roots.contains(root) {
        return Err(EnrolError::Answer("its trust bundle is not of the CA that the token pins"));
    }
    let chain = response.certificate_chain.into_iter().map(CertificateDer::from).collect();
    let svid = Svid::new(chain, key)?;
    if *svid.id() != SpiffeId::component(&federation, &cluster, "gateway")? {
        return Err(EnrolError::Answer("its certificate is not for a gateway of this cluster"));
    }
    let membership = Membership { cluster, federation, agent: token.address.clone(), bundle };
    // The certificate last: it is what tells a restart that all is there.
    membership.save(&config.state_dir)?;
    svid.save(&config.state_dir, SVID_NAME)?;
    tracing::info!(id = %svid.id(), "enrolled");
    finish(membership, svid)
}
