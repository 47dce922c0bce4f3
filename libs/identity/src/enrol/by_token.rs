//! One attempt to trade a one-time token for a certificate, and the checks of what comes back.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use isthmus_api::proto::local::v1::{EnrolRequest, EnrolResponse, local_client::LocalClient};
use isthmus_model::{
    ids::{ClusterName, SpiffeId},
    service::TrustBundle,
};
use rustls_pki_types::CertificateDer;
use tokio::time::timeout;
use tonic::{Code, Response, Status};

use super::{EnrolError, Newcomer, Record, Subject};
use crate::{
    bundle::BundleDocument,
    grpc,
    keys::KeyPair,
    svid::Svid,
    tls::pinned_client_config,
    token::{MAX_TOKEN, Token, TokenKind},
};

/// One call to the agent, connection included.
const CALL: Duration = Duration::from_secs(10);

impl Newcomer {
    /// The token in the token file, if it is one for this program and not expired.
    pub fn token(&self) -> Result<Token, EnrolError> {
        let command = self.subject.mint_command();
        let Some(path) = self.token_file.clone() else {
            return Err(EnrolError::NoToken { state_dir: self.state_dir.clone(), command });
        };
        let text = match read_limited(&path) {
            Ok(text) => text,
            Err(source) => return Err(EnrolError::ReadToken { path, command, source }),
        };
        let token = match Token::parse(&text).and_then(|token| token.require(TokenKind::Local)) {
            Ok(token) => token,
            Err(source) => return Err(EnrolError::Token { path, command, source }),
        };
        if !self.subject.admits(&token.subject) {
            let wanted = self.subject.role();
            return Err(EnrolError::OtherSubject { path, found: token.subject, wanted, command });
        }
        Ok(token)
    }

    /// One call with the token.
    pub(super) async fn enrol_once(&self) -> Result<(Record, Svid), EnrolError> {
        let token = self.token()?;
        // The federation's name is not known yet; the pinned root speaks for it.
        let cluster = token.cluster.clone();
        let agent = Arc::new(move |id: &SpiffeId| id.segments().eq(["cluster", cluster.as_str(), "agent"]));
        let (tls, pinned) = pinned_client_config(token.ca_pin, agent)?;
        let key = KeyPair::generate()?;
        let mut client = LocalClient::new(grpc::connect_lazy(&token.address, Arc::new(tls)));
        let request = EnrolRequest { secret: token.secret.clone(), csr: key.csr_der()? };
        let answer = match call(client.enrol(request)).await {
            Ok(answer) => answer,
            Err(status) if is_final(&status) => {
                return Err(EnrolError::Refused {
                    address: token.address.clone(),
                    path: self.token_file.clone().unwrap_or_default(),
                    message: status.message().to_owned(),
                    command: token.mint_command(),
                });
            }
            Err(status) => return Err(unreached(&token.address, &status)),
        };
        let root = pinned.get().ok_or(EnrolError::Answer("the root of its certificate is not known"))?;
        self.check(&token, answer, &key, &root)
    }

    fn check(
        &self,
        token: &Token,
        answer: EnrolResponse,
        key: &KeyPair,
        root: &CertificateDer<'_>,
    ) -> Result<(Record, Svid), EnrolError> {
        let cluster: ClusterName = answer.cluster.parse()?;
        if cluster != token.cluster || answer.name != self.subject.name() {
            return Err(EnrolError::Answer("it is for another cluster or name"));
        }
        let bundle = bundle_of(&answer)?;
        if bundle.trust_domain.as_str() != answer.federation {
            return Err(EnrolError::Answer("its trust bundle is another federation's"));
        }
        if !BundleDocument::parse(&bundle.document)?.x509_roots.contains(root) {
            return Err(EnrolError::Answer("its trust bundle lacks the root that the token pins"));
        }
        let svid = svid_of(answer, key)?;
        let asked = match (&self.subject, token.subject.split('/').collect::<Vec<_>>().as_slice()) {
            (Subject::Workload, [_, namespace, account]) => svid.id().segments().eq(["ns", *namespace, "sa", *account]),
            _ => *svid.id() == SpiffeId::component(&bundle.trust_domain, &cluster, self.subject.role())?,
        };
        if !asked {
            return Err(EnrolError::Answer("the certificate is for another identity than the token"));
        }
        Ok((Record { address: token.address.clone(), cluster, bundle }, svid))
    }
}

/// Within the deadline for calls to the agent.
pub(super) async fn call<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    match timeout(CALL, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} s", CALL.as_secs()))),
    }
}

pub(super) fn unreached(address: &str, status: &Status) -> EnrolError {
    EnrolError::Agent { address: address.to_owned(), message: grpc::words(status) }
}

pub(super) fn svid_of(answer: EnrolResponse, key: &KeyPair) -> Result<Svid, EnrolError> {
    let chain = answer.certificate_chain.into_iter().map(CertificateDer::from).collect();
    Ok(Svid::new(chain, key)?)
}

pub(super) fn bundle_of(answer: &EnrolResponse) -> Result<TrustBundle, EnrolError> {
    let bundle = answer.federation_bundle.clone().ok_or(EnrolError::Answer("it has no trust bundle"))?;
    TrustBundle::try_from(bundle).map_err(|_| EnrolError::Answer("its trust bundle is malformed"))
}

fn is_final(status: &Status) -> bool {
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

/// Blanks around the token are allowed, so the file may be somewhat longer.
fn read_limited(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > 2 * MAX_TOKEN as u64 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is too large to hold a token"));
    }
    fs::read_to_string(path)
}
