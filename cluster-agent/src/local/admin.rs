//! The administrator's door: a Unix socket in the state folder, mode 0600, where local tokens are minted; and the client
//! of it behind `isthmus-agent token`.
//!
//! Whoever can open the socket administers the machine: there is no other authentication. Of a leftover socket the holder
//! of the state folder's [lock](crate::lock) disposes.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use isthmus_api::proto::local::v1::{
    MintTokenRequest, MintTokenResponse, WorkloadSubject,
    local_admin_client::LocalAdminClient,
    local_admin_server::{LocalAdmin, LocalAdminServer},
    mint_token_request,
};
use isthmus_identity::{
    tls::{IdentitySource, sha256},
    token::{Token, TokenKind, TokenSpec},
};
use isthmus_model::{
    ids::{ClusterName, Namespace, SpiffeId, TrustDomain},
    time::Timestamp,
};
use isthmus_runtime::tasks::{Shutdown, chain};
use tokio::{
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Endpoint, Server},
};
use tower::service_fn;

use super::tokens::{Subject, Tokens};
use crate::{lock::StateLock, uplink::control::words};

/// In the state folder.
pub const SOCKET: &str = "admin.sock";
const MAX_TTL: u32 = 86_400;
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// Why the socket could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("admin socket {path}")]
pub struct AdminError {
    /// Where.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Binds `admin.sock` in a state folder that the caller has locked, so that a socket there is of an agent that is gone.
/// Needs a runtime.
pub fn bind(lock: &StateLock) -> Result<UnixListener, AdminError> {
    let path = lock.dir().join(SOCKET);
    let fail = |source| AdminError { path: path.clone(), source };
    match fs::symlink_metadata(&path) {
        // What is no socket was not left by an agent; binding tells that the name is taken.
        Ok(found) if found.file_type().is_socket() => fs::remove_file(&path).map_err(fail)?,
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(fail(e)),
    }
    let listener = UnixListener::bind(&path).map_err(fail)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

/// Mints tokens.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Whose they are.
    pub cluster: ClusterName,
    /// Of its workloads.
    pub trust_domain: TrustDomain,
    /// What they tell to dial.
    pub address: String,
    /// The chain whose root they pin.
    pub identity: IdentitySource,
    /// Where they are remembered.
    pub tokens: Tokens,
}

impl Admin {
    /// Serves until shutdown.
    pub async fn serve(self, listener: UnixListener, shutdown: Shutdown) -> Result<(), tonic::transport::Error> {
        Server::builder()
            .add_service(LocalAdminServer::new(self))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move { shutdown.requested().await })
            .await
    }

    fn subject(&self, subject: Option<mint_token_request::Subject>) -> Result<Subject, Status> {
        let invalid = |field: &str, e: String| Status::invalid_argument(format!("{field}: {e}"));
        match subject {
            Some(mint_token_request::Subject::Gateway(name)) => {
                Subject::check_name(&name).map_err(|e| invalid("gateway", e))?;
                Ok(Subject::Gateway(name))
            }
            Some(mint_token_request::Subject::Dns(name)) => {
                Subject::check_name(&name).map_err(|e| invalid("dns", e))?;
                Ok(Subject::Dns(name))
            }
            Some(mint_token_request::Subject::Workload(w)) => {
                let namespace: Namespace = w.namespace.parse().map_err(|e| invalid("namespace", format!("{e}")))?;
                // What the certificate will say must be sayable.
                SpiffeId::workload(&self.trust_domain, &namespace, &w.service_account)
                    .ok()
                    .filter(|id| id.segments().count() == 4)
                    .ok_or_else(|| {
                        invalid("service account", format!("{:.64?} is not the name of one", w.service_account))
                    })?;
                Ok(Subject::Workload { namespace, service_account: w.service_account })
            }
            None => Err(Status::invalid_argument("subject: name a gateway, a DNS server or a workload")),
        }
    }
}

#[tonic::async_trait]
impl LocalAdmin for Admin {
    async fn mint_token(&self, request: Request<MintTokenRequest>) -> Result<Response<MintTokenResponse>, Status> {
        let MintTokenRequest { subject, ttl_seconds } = request.into_inner();
        let subject = self.subject(subject)?;
        if !(1..=MAX_TTL).contains(&ttl_seconds) {
            return Err(Status::invalid_argument(format!("ttl_seconds: {ttl_seconds} is not within 1 to {MAX_TTL}")));
        }
        let now = Timestamp(isthmus_runtime::now());
        let svid = self.identity.current();
        let root = svid.chain().last().ok_or_else(|| Status::internal("the agent has no certificate chain"))?;
        let token = Token::mint(TokenSpec {
            kind: TokenKind::Local,
            address: self.address.clone(),
            ca_pin: sha256(root),
            cluster: self.cluster.clone(),
            subject: subject.text(),
            expires_at: now + Duration::from_secs(ttl_seconds.into()),
        });
        let (tokens, secret, expires_at) = (self.tokens.clone(), token.secret.clone(), token.expires_at);
        tracing::info!(subject = %subject.text(), ttl_seconds, "a local token is minted");
        tokio::task::spawn_blocking(move || tokens.add(&secret, subject, expires_at, now))
            .await
            .map_err(|_| Status::unavailable("the agent is going down"))?
            .map_err(|e| Status::failed_precondition(chain(&e)))?;
        Ok(Response::new(MintTokenResponse { token: token.encode(), expires_at_unix_ms: expires_at.0 }))
    }
}

/// Why `isthmus-agent token` got none.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// Nobody listens.
    #[error("no agent answers at {path}: is it running, with this configuration, and are you its user? ({reason})")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// It does not answer.
    #[error(
        "the agent does not answer at {0}: it serves tokens once its cluster has joined; /readyz says what is missing"
    )]
    Silent(PathBuf),
    /// It refused.
    #[error("the agent refused: {0}")]
    Refused(String),
}

/// Asks the running agent for a token.
pub async fn mint(state_dir: &Path, subject: Subject, ttl: Duration) -> Result<String, MintError> {
    let path = state_dir.join(SOCKET);
    let socket = path.clone();
    let connector = service_fn(move |_: http::Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let unreachable = |reason| MintError::Unreachable { path: path.clone(), reason };
    let endpoint = Endpoint::from_static("http://agent.invalid");
    let channel = timeout(CALL_DEADLINE, endpoint.connect_with_connector(connector))
        .await
        .map_err(|_| MintError::Silent(path.clone()))?
        .map_err(|e| unreachable(chain(&e)))?;
    let subject = match subject {
        Subject::Gateway(name) => mint_token_request::Subject::Gateway(name),
        Subject::Dns(name) => mint_token_request::Subject::Dns(name),
        Subject::Workload { namespace, service_account } => {
            mint_token_request::Subject::Workload(WorkloadSubject { namespace: namespace.to_string(), service_account })
        }
    };
    let ttl_seconds = u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX);
    let mut client = LocalAdminClient::new(channel);
    let call = client.mint_token(MintTokenRequest { subject: Some(subject), ttl_seconds });
    match timeout(CALL_DEADLINE, call).await {
        Ok(Ok(response)) => Ok(response.into_inner().token),
        Ok(Err(status)) if status.code() == tonic::Code::Unavailable => Err(unreachable(words(&status))),
        Ok(Err(status)) => Err(MintError::Refused(status.message().to_owned())),
        Err(_) => Err(MintError::Silent(path.clone())),
    }
}
