//! Joining the federation, once, and again when the certificate ran out: the join token is traded for this agent's certificate.
//!
//! In: the token file, the cluster's own CA. Out: a [`Member`] on disk with the agent's SVID beside it. What holds: the
//! key is made before the call and never leaves the machine; the control plane is believed only with the root that the
//! token pins, and when joining again only within the same federation; what says "joined" is written last, so that a crash in between joins again.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use isthmus_api::{
    convert::ConvertError,
    proto::federation::v1::{JoinRequest, JoinResponse},
};
use isthmus_identity::{
    bundle::{BundleDocument, BundleError},
    ca::CertificateAuthority,
    grpc::connect_lazy,
    keys::{KeyError, KeyPair},
    rfc3339,
    svid::{Svid, SvidError},
    tls::{PeerPolicy, PinnedRoot, TlsError, pinned_client_config},
    token::{Token, TokenError, TokenKind},
};
use isthmus_model::{
    ids::{ClusterName, IdError, SpiffeId, TrustDomain},
    service::TrustBundle,
    time::Timestamp,
};
use isthmus_runtime::{backoff::Backoff, files::write_secret, health::Gate, tasks::chain as causes};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

use super::control::{CALL_DEADLINE, chain, client, is_control_plane, words};
use crate::config::Config;

/// The agent's SVID in the state folder: `agent.pem`, `agent.key`.
pub const SVID_NAME: &str = "agent";
const MEMBER_FILE: &str = "member.json";
const TOKEN_BYTES: u64 = 16 * 1024;

/// What the agent remembers of having joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Member {
    /// As joined.
    pub cluster: ClusterName,
    /// As joined; fixed from then on.
    pub trust_domain: TrustDomain,
    /// The federation's trust domain.
    pub federation: TrustDomain,
    /// `host:port` from the token.
    pub control_plane: String,
}

/// A fresh member.
#[derive(Debug)]
pub struct Joined {
    /// On disk already.
    pub member: Member,
    /// On disk already.
    pub svid: Svid,
    /// Not on disk yet: the pins' owner keeps it.
    pub federation_bundle: TrustBundle,
}

/// Why the cluster could not join, or the state folder does not fit.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No token configured.
    #[error(
        "the cluster has not joined a federation and `joinTokenFile` is not set: mint a token with `isthmusctl cluster \
         join-token {0}`, write it to a file, and name that file in the configuration"
    )]
    NoTokenFile(ClusterName),
    /// The token file is not readable.
    #[error(
        "the join token file {path} cannot be read: mint a token with `isthmusctl cluster join-token \
         {cluster}` and write it there"
    )]
    TokenFile {
        /// As configured.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// Whose.
        cluster: ClusterName,
    },
    /// The file holds no usable token.
    #[error("join token file {path}")]
    Token {
        /// As configured.
        path: PathBuf,
        /// Why, and what to do.
        source: TokenError,
    },
    /// It was a member, and can be one again only with a token.
    #[error(
        "{lapse}, so the cluster must join again: mint a token with `isthmusctl cluster join-token {cluster}` and write \
         it to the `joinTokenFile`; its CA and all that it published stay"
    )]
    Lapsed {
        /// What happened.
        lapse: Lapse,
        /// Whose.
        cluster: ClusterName,
        /// Why there is no token to do it with.
        #[source]
        why: Box<JoinError>,
    },
    /// A token for another.
    #[error(
        "the join token is for cluster {token}, this one is {own}: mint one with `isthmusctl cluster join-token {own}`"
    )]
    OtherCluster {
        /// Of the token.
        token: ClusterName,
        /// Of the configuration.
        own: ClusterName,
    },
    /// The control plane refuses for good.
    #[error(
        "the control plane refused the join: {message}; if the token is used up or expired, mint a new one with `isthmusctl cluster join-token {cluster}`"
    )]
    Refused {
        /// In its words.
        message: String,
        /// Whose.
        cluster: ClusterName,
    },
    /// It answered with something that cannot be believed.
    #[error("the control plane's answer to the join is not to be trusted: {0}")]
    Answer(String),
    /// The state folder is another cluster's.
    #[error(
        "the state folder belongs to cluster {found_cluster} ({found_domain}), but the configuration says {cluster} \
         ({domain}): use another stateDir, or restore the old names (they are fixed when a cluster joins)"
    )]
    OtherState {
        /// In the folder.
        found_cluster: ClusterName,
        /// In the folder.
        found_domain: TrustDomain,
        /// Configured.
        cluster: ClusterName,
        /// Configured.
        domain: TrustDomain,
    },
    /// The state folder cannot be used.
    #[error("state file {path}")]
    State {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key cannot be made or read.
    #[error("the agent's key")]
    Key(#[from] KeyError),
    /// The certificate cannot be read or written.
    #[error("the agent's certificate")]
    Svid(#[from] SvidError),
    /// TLS cannot be set up.
    #[error("set up TLS for the join")]
    Tls(#[from] TlsError),
}

/// The membership on disk.
#[derive(Debug)]
pub enum Loaded {
    /// The cluster has never joined.
    Never,
    /// It is a member.
    Member {
        /// Where.
        member: Member,
        /// Its certificate, which is valid still.
        svid: Svid,
    },
    /// It is one that cannot prove it any more.
    Lapsed {
        /// Where.
        member: Member,
        /// Why.
        lapse: Lapse,
    },
}

/// Why a member must join again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lapse {
    /// It was not renewed in time: the control plane does not talk to this agent any more.
    #[error("the agent's certificate ended at {0}")]
    Expired(String),
    /// Its files are not there.
    #[error("the agent's certificate is missing from the state folder")]
    Missing,
}

/// The membership on disk, as of `now`; refuses a folder of another cluster.
pub fn load(config: &Config, now: Timestamp) -> Result<Loaded, JoinError> {
    let path = config.state_dir.join(MEMBER_FILE);
    let member: Member = match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| JoinError::State {
            path: path.clone(),
            source: io::Error::new(io::ErrorKind::InvalidData, e),
        })?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Loaded::Never),
        Err(source) => return Err(JoinError::State { path, source }),
    };
    if member.cluster != config.cluster || member.trust_domain != config.trust_domain {
        return Err(JoinError::OtherState {
            found_cluster: member.cluster,
            found_domain: member.trust_domain,
            cluster: config.cluster.clone(),
            domain: config.trust_domain.clone(),
        });
    }
    Ok(match Svid::load(&config.state_dir, SVID_NAME)? {
        Some(svid) if svid.not_after() > now => Loaded::Member { member, svid },
        Some(svid) => Loaded::Lapsed { member, lapse: Lapse::Expired(rfc3339(svid.not_after())) },
        None => Loaded::Lapsed { member, lapse: Lapse::Missing },
    })
}

/// Reads and checks the token before anything else starts.
pub fn token(config: &Config) -> Result<Token, JoinError> {
    let cluster = &config.cluster;
    let path = config.join_token_file.clone().ok_or_else(|| JoinError::NoTokenFile(cluster.clone()))?;
    let text = read_small(&path).map_err(|source| JoinError::TokenFile {
        path: path.clone(),
        source,
        cluster: cluster.clone(),
    })?;
    let token = Token::parse(&text)
        .and_then(|t| t.require(TokenKind::Join))
        .map_err(|source| JoinError::Token { path, source })?;
    if token.cluster != *cluster {
        return Err(JoinError::OtherCluster { token: token.cluster, own: cluster.clone() });
    }
    Ok(token)
}

/// Joins (again, if it `was` a member); tries again as long as the control plane is not to be reached, which `gate` tells.
pub async fn join(
    config: &Config,
    token: &Token,
    was: Option<&Member>,
    ca: &CertificateAuthority,
    gate: &Gate,
) -> Result<Joined, JoinError> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    loop {
        match attempt(config, token, was, ca).await? {
            Ok(joined) => return Ok(joined),
            Err(status) => {
                let why = format!("the control plane at {} cannot be reached: {}", token.address, words(&status));
                tracing::warn!(control_plane = %token.address, "{why}; trying again");
                gate.unready(&why);
                sleep(backoff.next()).await;
            }
        }
    }
}

/// One attempt; the inner error is one to try again after.
async fn attempt(
    config: &Config,
    token: &Token,
    was: Option<&Member>,
    ca: &CertificateAuthority,
) -> Result<Result<Joined, Status>, JoinError> {
    let key = KeyPair::load_or_create(&config.state_dir.join(format!("{SVID_NAME}.key")))?;
    let policy: PeerPolicy = Arc::new(is_control_plane);
    let (tls, root) = pinned_client_config(token.ca_pin, policy)?;
    let request = JoinRequest {
        secret: token.secret.clone(),
        cluster: config.cluster.to_string(),
        locality: Some((&config.locality).into()),
        bundle: Some((&ca.bundle()).into()),
        csr: key.csr_der()?,
    };
    let mut client = client(connect_lazy(&token.address, Arc::new(tls)));
    let response = match timeout(CALL_DEADLINE, client.join(request)).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) if is_transient(status.code()) => return Ok(Err(status)),
        Ok(Err(status)) => {
            let message = status.message().to_owned();
            return Err(JoinError::Refused { message, cluster: config.cluster.clone() });
        }
        Err(_) => return Ok(Err(Status::deadline_exceeded("no answer in time"))),
    };
    let joined = believe(config, token, was, response, &key, &root).map_err(|e| JoinError::Answer(causes(&e)))?;
    joined.svid.save(&config.state_dir, SVID_NAME)?;
    Ok(Ok(joined))
}

/// Marks the cluster as joined. To be called when everything else of the join is on disk.
pub fn save(state_dir: &Path, member: &Member) -> Result<(), JoinError> {
    let path = state_dir.join(MEMBER_FILE);
    let fail = |source| JoinError::State { path: path.clone(), source };
    let bytes = serde_json::to_vec_pretty(member).map_err(|e| fail(io::Error::other(e)))?;
    write_secret(&path, &bytes).map_err(fail)
}

#[derive(Debug, thiserror::Error)]
enum Doubt {
    #[error(transparent)]
    Convert(#[from] ConvertError),
    #[error(transparent)]
    Id(#[from] IdError),
    #[error(transparent)]
    Svid(#[from] SvidError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error("its trust bundle does not hold the root that the token pins")]
    Pin,
    #[error("the certificate is for {found}, not for {wanted}")]
    OtherId { found: SpiffeId, wanted: SpiffeId },
    #[error("it speaks for federation {found}, but this cluster is a member of {own}: use a token of that federation")]
    OtherFederation { found: TrustDomain, own: TrustDomain },
}

fn believe(
    config: &Config,
    token: &Token,
    was: Option<&Member>,
    response: JoinResponse,
    key: &KeyPair,
    root: &PinnedRoot,
) -> Result<Joined, Doubt> {
    let federation: TrustDomain = response.federation.parse()?;
    if let Some(own) = was.map(|m| &m.federation).filter(|own| **own != federation) {
        return Err(Doubt::OtherFederation { found: federation, own: own.clone() });
    }
    let bundle = response.federation_bundle.ok_or_else(|| ConvertError::new("federation_bundle", "is missing"))?;
    let bundle = TrustBundle::try_from(bundle).map_err(|e| e.within("federation_bundle"))?;
    let roots = BundleDocument::parse(&bundle.document)?.x509_roots;
    if bundle.trust_domain != federation || !root.get().is_some_and(|pinned| roots.contains(&pinned)) {
        return Err(Doubt::Pin);
    }
    let svid = Svid::new(chain(response.certificate_chain), key)?;
    let wanted = SpiffeId::component(&federation, &config.cluster, "agent")?;
    if *svid.id() != wanted {
        return Err(Doubt::OtherId { found: svid.id().clone(), wanted });
    }
    let member = Member {
        cluster: config.cluster.clone(),
        trust_domain: config.trust_domain.clone(),
        federation,
        control_plane: token.address.clone(),
    };
    Ok(Joined { member, svid, federation_bundle: bundle })
}

/// Worth another attempt with the same token.
fn is_transient(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Cancelled
            | Code::Unknown
            | Code::ResourceExhausted
    )
}

fn read_small(path: &Path) -> io::Result<String> {
    use io::Read as _;
    let mut text = String::new();
    fs::File::open(path)?.take(TOKEN_BYTES).read_to_string(&mut text)?;
    Ok(text)
}
