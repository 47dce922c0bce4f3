//! Who this server is, and who its agent is: got once with a token, kept on disk, renewed with itself.
//!
//! Files in the state folder: `dns.pem` and `dns.key` (the SVID), `agent.json` (where the agent is and what verifies
//! it). `agent.json` is written first, so that an SVID never stands without it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use isthmus_api::{
    convert::ConvertError,
    proto::local::v1::{EnrolRequest, EnrolResponse, RenewRequest, local_client::LocalClient},
};
use isthmus_identity::{
    bundle::{BundleDocument, BundleError, TrustStore},
    grpc,
    keys::{KeyError, KeyPair},
    svid::{Svid, SvidError},
    tls::{self, IdentitySource, PeerPolicy, TlsError},
    token::{Token, TokenError, TokenKind},
};
use isthmus_model::{
    ids::{ClusterName, IdError, SpiffeId, TrustDomain},
    service::TrustBundle,
    time::Timestamp,
};
use isthmus_runtime::files;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

/// The SVID's file name without ending.
const SVID: &str = "dns";
const AGENT: &str = "agent.json";
/// For one call to the agent.
const CALL: Duration = Duration::from_secs(10);
/// A token file longer than this holds no token.
const MAX_TOKEN_FILE: u64 = 64 * 1024;

/// Why there is no usable certificate.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// First start without a token.
    #[error(
        "this server has no certificate yet and agentTokenFile is not set: mint a token with \
         `isthmus-agent token dns {name} --config <the agent's config>` and name its file there"
    )]
    NoToken {
        /// The server's configured name.
        name: String,
    },
    /// The token file cannot be read.
    #[error(
        "agentTokenFile {}: cannot be read; mint a token with \
         `isthmus-agent token dns {name} --config <the agent's config>` into it", path.display()
    )]
    ReadToken {
        /// The file.
        path: PathBuf,
        /// The server's configured name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The token is no good.
    #[error("agentTokenFile {}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TokenError,
    },
    /// Minted for something else.
    #[error(
        "the token is for {found:?}, this server is \"dns/{name}\": set name to match, or mint another with \
         `isthmus-agent token dns {name} --config <the agent's config>`"
    )]
    Subject {
        /// The token's subject.
        found: String,
        /// The server's configured name.
        name: String,
    },
    /// The agent is not there, or said no.
    #[error("the agent at {address} did not {what}: {message}")]
    Agent {
        /// Where it was dialled.
        address: String,
        /// What was asked.
        what: &'static str,
        /// Its own words, or the connection's failure.
        message: String,
    },
    /// The agent's answer does not hold together.
    #[error("the agent's answer to enrolment is not usable: {0}")]
    Answer(&'static str),
    /// The same, in a field.
    #[error("the agent's answer to enrolment is malformed")]
    Convert(#[from] ConvertError),
    /// The same, in a name.
    #[error("the agent's answer to enrolment has a malformed name")]
    Name(#[from] IdError),
    /// The certificate is no SVID, or not readable on disk.
    #[error("use this server's certificate")]
    Svid(#[from] SvidError),
    /// The key cannot be made.
    #[error("make a key")]
    Key(#[from] KeyError),
    /// The trust bundle is unusable.
    #[error("use the federation's trust bundle")]
    Bundle(#[from] BundleError),
    /// TLS cannot be configured.
    #[error("configure TLS towards the agent")]
    Tls(#[from] TlsError),
    /// The state folder.
    #[error("stateDir: {}: check that the folder exists and this server may write to it", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `agent.json` was damaged.
    #[error("{} is damaged; remove it together with dns.pem, and enrol again with a new token", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
}

/// The agent, as learned at enrolment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Agent {
    /// "host:port".
    pub(crate) address: String,
    /// Its cluster, and ours.
    pub(crate) cluster: ClusterName,
    pub(crate) federation: TrustDomain,
    /// The federation's bundle at that time.
    pub(crate) bundle: TrustBundle,
}

/// A certificate and the agent to use it with.
pub(crate) struct Credentials {
    pub(crate) agent: Agent,
    pub(crate) source: IdentitySource,
}

/// Where tokens and certificates lie, and under which name this server enrols.
#[derive(Clone, Debug)]
pub(crate) struct Desk {
    pub(crate) name: String,
    pub(crate) state_dir: PathBuf,
    pub(crate) token_file: Option<PathBuf>,
}

impl Desk {
    /// What an earlier run left, expired or not.
    pub(crate) fn load(&self) -> Result<Option<Credentials>, CredentialError> {
        let path = self.state_dir.join(AGENT);
        let Some(svid) = Svid::load(&self.state_dir, SVID)? else { return Ok(None) };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CredentialError::State { path, source }),
        };
        let agent = serde_json::from_slice(&text).map_err(|source| CredentialError::Damaged { path, source })?;
        Ok(Some(Credentials { agent, source: IdentitySource::new(svid) }))
    }

    /// The token in the token file, if it is one for this server.
    pub(crate) fn token(&self) -> Result<Token, CredentialError> {
        let name = self.name.clone();
        let Some(path) = self.token_file.clone() else { return Err(CredentialError::NoToken { name }) };
        let text = match read_limited(&path) {
            Ok(text) => text,
            Err(source) => return Err(CredentialError::ReadToken { path, name, source }),
        };
        let token = Token::parse(&text).and_then(|t| t.require(TokenKind::Local));
        let token = token.map_err(|source| CredentialError::Token { path, source })?;
        if token.subject != format!("dns/{name}") {
            return Err(CredentialError::Subject { found: token.subject, name });
        }
        Ok(token)
    }

    /// Trades the token for a certificate, and keeps both certificate and agent on disk.
    pub(crate) async fn enrol(&self) -> Result<Credentials, CredentialError> {
        let token = self.token()?;
        let key = KeyPair::generate()?;
        let (tls, pinned) = tls::pinned_client_config(token.ca_pin, is_agent_of(&token.cluster))?;
        let mut client = LocalClient::new(grpc::connect_lazy(&token.address, Arc::new(tls)));
        let request = EnrolRequest { secret: token.secret.clone(), csr: key.csr_der()? };
        let response = call(&token.address, "enrol this server", client.enrol(request)).await?;

        let (svid, agent) = self.check(&token, &key, response)?;
        let roots = BundleDocument::parse(&agent.bundle.document)?.x509_roots;
        if pinned.get().is_none_or(|root| !roots.contains(&root)) {
            return Err(CredentialError::Answer("its trust bundle lacks the CA that the token pins"));
        }
        self.save(&agent, &svid)?;
        Ok(Credentials { agent, source: IdentitySource::new(svid) })
    }

    /// A new key and certificate, proved by the current one.
    pub(crate) async fn renew(&self, held: &Credentials, trust: &TrustStore) -> Result<(), CredentialError> {
        let address = &held.agent.address;
        let tls = client_config(held, trust)?;
        let key = KeyPair::generate()?;
        let mut client = LocalClient::new(grpc::connect_lazy(address, tls));
        let request = RenewRequest { csr: key.csr_der()? };
        let response = call(address, "renew the certificate", client.renew(request)).await?;
        let chain = response.certificate_chain.into_iter().map(Into::into).collect();
        let svid = Svid::new(chain, &key)?;
        if svid.id() != held.source.current().id() {
            return Err(CredentialError::Answer("the new certificate is for someone else"));
        }
        svid.save(&self.state_dir, SVID)?;
        held.source.set(svid);
        Ok(())
    }

    fn check(&self, token: &Token, key: &KeyPair, response: EnrolResponse) -> Result<(Svid, Agent), CredentialError> {
        let bundle = response.federation_bundle.ok_or(CredentialError::Answer("there is no trust bundle"))?;
        let agent = Agent {
            address: token.address.clone(),
            cluster: response.cluster.parse()?,
            federation: response.federation.parse()?,
            bundle: bundle.try_into()?,
        };
        if agent.cluster != token.cluster || response.name != self.name {
            return Err(CredentialError::Answer("it is for another cluster or server"));
        }
        if agent.bundle.trust_domain != agent.federation {
            return Err(CredentialError::Answer("its trust bundle is another federation's"));
        }
        let chain = response.certificate_chain.into_iter().map(Into::into).collect();
        let svid = Svid::new(chain, key)?;
        if *svid.id() != SpiffeId::component(&agent.federation, &agent.cluster, "dns")? {
            return Err(CredentialError::Answer("the certificate is for another identity"));
        }
        Ok((svid, agent))
    }

    fn save(&self, agent: &Agent, svid: &Svid) -> Result<(), CredentialError> {
        let path = self.state_dir.join(AGENT);
        let text = serde_json::to_vec_pretty(agent)
            .map_err(|source| CredentialError::Damaged { path: path.clone(), source })?;
        files::write_secret(&path, &text).map_err(|source| CredentialError::State { path, source })?;
        Ok(svid.save(&self.state_dir, SVID)?)
    }
}

impl Credentials {
    /// Whether the certificate is past its end.
    pub(crate) fn expired(&self, now: Timestamp) -> bool {
        self.source.current().not_after() <= now
    }
}

/// Mutual TLS towards the agent of our own cluster.
pub(crate) fn client_config(
    held: &Credentials,
    trust: &TrustStore,
) -> Result<Arc<rustls::ClientConfig>, CredentialError> {
    let policy = is_agent_of(&held.agent.cluster);
    Ok(Arc::new(tls::client_config(Some(&held.source), trust, policy, &[b"h2"])?))
}

/// `spiffe://<any verified federation>/cluster/<cluster>/agent`.
fn is_agent_of(cluster: &ClusterName) -> PeerPolicy {
    let cluster = cluster.clone();
    Arc::new(move |id| id.segments().eq(["cluster", cluster.as_str(), "agent"]))
}

async fn call<T>(
    address: &str,
    what: &'static str,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, CredentialError> {
    let failed = |message| CredentialError::Agent { address: address.to_owned(), what, message };
    match timeout(CALL, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failed(crate::feed::describe(&status))),
        Err(_) => Err(failed(format!("no answer within {} s", CALL.as_secs()))),
    }
}

fn read_limited(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > MAX_TOKEN_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is too large to hold a token"));
    }
    fs::read_to_string(path)
}
