//! `Join` and `Sign`: the two calls that end with a certificate.

use std::net::SocketAddr;

use isthmus_api::{
    convert::ConvertError,
    proto::federation::v1::{JoinRequest, JoinResponse, Role, SignRequest, SignResponse},
};
use isthmus_identity::{ca::csr_key_sha256, token::Token};
use isthmus_model::{
    global::Locality,
    grant::MemberRole,
    ids::{ClusterName, IdError},
    service::TrustBundle,
    time::Timestamp,
};
use tonic::Status;

use super::{
    Shared,
    refusal::{status_of, status_of_proposal, status_of_signing},
};
use crate::{
    authority::Component,
    raft::ProposeError,
    state::{Actor, Command, Join, KeyHash, TokenHash},
};

impl Shared {
    /// Trades a join token for the agent's certificate. The token is used up only once the join is committed; should the
    /// answer then get lost, the agent may ask again with the same key.
    pub(super) async fn join(&self, request: JoinRequest, remote: Option<SocketAddr>) -> Result<JoinResponse, Status> {
        let _permit =
            self.joins.try_acquire().map_err(|_| Status::resource_exhausted("too many joins at once; try again"))?;
        let now = Timestamp(isthmus_runtime::now());
        let join = parse(&request, now)?;
        let cluster = join.cluster.clone();
        // Also decided in `apply`; here so that strangers can neither fill the log nor have anything signed.
        let likely = self.views.borrow().state().check_token(&join.hash, join.key, &cluster, now);
        if let Err(rejection) = likely {
            self.metrics.join(rejection.code());
            tracing::warn!(%cluster, ?remote, reason = rejection.code(), "join refused");
            return Err(status_of(&rejection));
        }
        // Before the token is used up: a bad request must not cost it.
        let chain = self.authority.sign(&request.csr, &cluster, Component::Agent).map_err(|e| status_of_signing(&e))?;
        let by = Actor { who: "join token".to_owned(), from: remote.map(|at| at.to_string()).unwrap_or_default() };
        match self.proposer.by(by).propose(Command::Join(join)).await {
            Ok(outcome) => {
                self.metrics.join("joined");
                self.metrics.certificate(Component::Agent.name());
                tracing::info!(%cluster, ?remote, stamp = %outcome.stamp, "cluster joined");
                Ok(JoinResponse {
                    certificate_chain: chain,
                    federation: self.authority.federation().to_string(),
                    federation_bundle: Some((&self.authority.bundle()).into()),
                })
            }
            Err(error) => {
                let code = if let ProposeError::Rejected(rejection) = &error { rejection.code() } else { "failed" };
                self.metrics.join(code);
                tracing::warn!(%cluster, ?remote, %error, "join refused");
                Err(status_of_proposal(&error))
            }
        }
    }

    /// Signs for a part of the caller's own cluster.
    pub(super) fn sign(&self, cluster: &ClusterName, request: &SignRequest) -> Result<SignResponse, Status> {
        let component = match request.role() {
            Role::Agent => Component::Agent,
            Role::Gateway => Component::Gateway,
            Role::Dns => Component::Dns,
            Role::Unspecified => {
                return Err(ConvertError::new("role", "is not specified; use agent, gateway or dns").into());
            }
        };
        let role = match component {
            Component::Agent => None,
            Component::Gateway => Some(MemberRole::Gateway),
            Component::Dns => Some(MemberRole::Dns),
        };
        let global = self.global()?;
        let granted = |role| global.active_cluster(cluster).is_some_and(|info| info.grant.roles.contains(&role));
        if role.is_some_and(|role| !granted(role)) {
            return Err(Status::permission_denied(format!(
                "{cluster}'s grant does not let it run a {name}; add the role {name} to the grant \
                 (isthmusctl get clustergrant {cluster} -o yaml)",
                name = component.name()
            )));
        }
        let chain = self.authority.sign(&request.csr, cluster, component).map_err(|e| status_of_signing(&e))?;
        self.metrics.certificate(component.name());
        tracing::info!(%cluster, role = component.name(), "certificate signed");
        Ok(SignResponse { certificate_chain: chain, federation_bundle: Some((&self.authority.bundle()).into()) })
    }
}

fn parse(request: &JoinRequest, now: Timestamp) -> Result<Join, Status> {
    let missing = |field| ConvertError::new(field, "is missing");
    let name = |error: IdError| ConvertError::new("cluster", error.to_string());
    let cluster: ClusterName = request.cluster.parse().map_err(name)?;
    let locality = request.locality.clone().ok_or_else(|| missing("locality"))?;
    let bundle = request.bundle.clone().ok_or_else(|| missing("bundle"))?;
    let key = csr_key_sha256(&request.csr).map_err(|error| status_of_signing(&error.into()))?;
    Ok(Join {
        hash: TokenHash(Token::secret_hash(&request.secret)),
        key: Some(KeyHash(key)),
        cluster,
        locality: Locality::try_from(locality).map_err(|error| error.within("locality"))?,
        bundle: TrustBundle::try_from(bundle).map_err(|error| error.within("bundle"))?,
        now,
    })
}
