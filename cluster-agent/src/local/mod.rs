//! What this agent serves inside its cluster: enrolment by one-time token, renewal, and the feeds of gateways, DNS
//! servers and sidecar launchers, all on one TLS listener beside xDS.
//!
//! In: calls of the cluster's own, told apart by their certificates ([`auth`]). Out: certificates (the federation's, by
//! way of the control plane, for gateways and DNS; the cluster's own for workloads), and what the hub holds. The feeds
//! live inside the response that tonic polls, watch the shutdown signal, and hold one message at most: a slow reader
//! skips states, it never queues them.

pub mod admin;
pub mod auth;
mod feeds;
pub mod tokens;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use isthmus_api::proto::{
    federation::v1::Role,
    local::v1::{
        DnsMessage, DnsUpdate, EnrolRequest, EnrolResponse, GatewayMessage, GatewayUpdate, RenewRequest,
        SidecarMessage, SidecarUpdate, local_server::Local,
    },
};
use isthmus_identity::ca::{CaError, CertificateAuthority, MAX_CSR};
use isthmus_model::{ids::SpiffeId, time::Timestamp};
use isthmus_runtime::tasks::{Shutdown, Tasks, chain};
use tonic::{Code, Request, Response, Status, Streaming};

use self::{
    auth::{Caller, Realm, denied},
    tokens::{Refusal, Subject, Tokens},
};
use crate::{
    hub::Hub,
    metrics::Metrics,
    status::StatusBoard,
    uplink::control::{ControlPlane, words},
};

/// Longest secret looked at; ours have 43 characters.
const MAX_SECRET: usize = 256;

/// The service. Clones share everything.
#[derive(Clone)]
pub struct LocalService(Arc<Parts>);

/// What the service is made of.
pub struct Parts {
    /// Whose agent this is.
    pub realm: Realm,
    /// The state.
    pub hub: Hub,
    /// Where consumers stand.
    pub status: StatusBoard,
    /// One-time tokens.
    pub tokens: Tokens,
    /// Signs workloads.
    pub ca: Arc<CertificateAuthority>,
    /// Signs gateways and DNS servers.
    pub control: ControlPlane,
    /// How long workloads' certificates live.
    pub workload_lifetime: Duration,
    /// Counters.
    pub metrics: Metrics,
    /// Runs the feeds.
    pub tasks: Tasks,
    /// The end.
    pub shutdown: Shutdown,
}

type Updates<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl LocalService {
    /// Serves with these parts.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    async fn sign_for(&self, subject: &Subject, csr: Vec<u8>) -> Result<Vec<Vec<u8>>, Status> {
        match subject {
            Subject::Gateway(_) => self.sign_component(Role::Gateway, csr).await,
            Subject::Dns(_) => self.sign_component(Role::Dns, csr).await,
            Subject::Workload { namespace, service_account } => {
                let id = SpiffeId::workload(&self.0.realm.trust_domain, namespace, service_account)
                    .map_err(|e| Status::internal(e.to_string()))?;
                self.sign_workload(&id, &csr)
            }
        }
    }

    async fn sign_component(&self, role: Role, csr: Vec<u8>) -> Result<Vec<Vec<u8>>, Status> {
        let signed = self.0.control.sign(role, csr).await.map_err(|status| {
            tracing::warn!(?role, "the control plane does not sign: {}", words(&status));
            match status.code() {
                Code::InvalidArgument | Code::PermissionDenied | Code::FailedPrecondition => {
                    Status::new(status.code(), format!("the control plane refuses: {}", status.message()))
                }
                _ => Status::unavailable(
                    "the control plane, which signs this certificate, cannot be reached now; try again",
                ),
            }
        })?;
        Ok(signed.chain.iter().map(|der| der.to_vec()).collect())
    }

    fn sign_workload(&self, id: &SpiffeId, csr: &[u8]) -> Result<Vec<Vec<u8>>, Status> {
        let signed = self.0.ca.sign_csr(csr, id, &[], self.0.workload_lifetime).map_err(|e| match &e {
            CaError::Csr(_) => Status::invalid_argument(e.to_string()),
            _ => {
                tracing::error!(%id, "the cluster's CA does not sign: {}", chain(&e));
                Status::internal("the cluster's CA cannot sign; see the agent's log")
            }
        })?;
        Ok(signed.iter().map(|der| der.to_vec()).collect())
    }

    fn certificate(&self, certificate_chain: Vec<Vec<u8>>, name: String) -> Response<EnrolResponse> {
        let view = self.0.hub.view.borrow();
        Response::new(EnrolResponse {
            certificate_chain,
            cluster: self.0.realm.cluster.to_string(),
            federation: self.0.realm.federation.to_string(),
            federation_bundle: Some((&view.global.federation_bundle).into()),
            name,
        })
    }

    async fn admit(&self, request: EnrolRequest) -> Result<Response<EnrolResponse>, Status> {
        if request.secret.len() > MAX_SECRET {
            return Err(refusal(&Refusal::Unknown));
        }
        check_csr(&request.csr)?;
        let claim = self.0.tokens.claim(&request.secret, now()).map_err(|e| refusal(&e))?;
        // A failure here drops the claim, and the token stays good.
        let chain_der = self.sign_for(claim.subject(), request.csr).await?;
        let subject = claim.subject().clone();
        let marked = tokio::task::spawn_blocking(move || claim.commit(now())).await;
        match marked {
            Ok(Ok(())) => {}
            Ok(Err(e)) => {
                tracing::error!("a token cannot be marked as used, so nobody is enrolled with it: {}", chain(&e));
                return Err(Status::internal("the agent cannot write to its state folder; see its log"));
            }
            Err(_) => return Err(Status::unavailable("the agent is going down; try again")),
        }
        tracing::info!(subject = %subject.text(), "enrolled");
        let name = match subject {
            Subject::Gateway(name) | Subject::Dns(name) => name,
            Subject::Workload { .. } => String::new(),
        };
        Ok(self.certificate(chain_der, name))
    }
}

#[tonic::async_trait]
impl Local for LocalService {
    type GatewayFeedStream = Updates<GatewayUpdate>;
    type DnsFeedStream = Updates<DnsUpdate>;
    type SidecarFeedStream = Updates<SidecarUpdate>;

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        let outcome = self.admit(request.into_inner()).await;
        self.0.metrics.enrolled(outcome.is_ok());
        outcome.inspect_err(|status| tracing::warn!(reason = status.message(), "an enrolment failed"))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<EnrolResponse>, Status> {
        let caller = self.0.realm.require(request.extensions())?;
        let csr = request.into_inner().csr;
        check_csr(&csr)?;
        let signed = match caller {
            Caller::Gateway => self.sign_component(Role::Gateway, csr).await?,
            Caller::Dns => self.sign_component(Role::Dns, csr).await?,
            Caller::Workload(id) => self.sign_workload(&id, &csr)?,
        };
        Ok(self.certificate(signed, String::new()))
    }

    async fn gateway_feed(
        &self,
        request: Request<Streaming<GatewayMessage>>,
    ) -> Result<Response<Self::GatewayFeedStream>, Status> {
        match self.0.realm.require(request.extensions())? {
            Caller::Gateway => Ok(Response::new(feeds::gateway(self.0.clone(), request.into_inner()))),
            _ => Err(denied("GatewayFeed", "gateways")),
        }
    }

    async fn dns_feed(&self, request: Request<Streaming<DnsMessage>>) -> Result<Response<Self::DnsFeedStream>, Status> {
        match self.0.realm.require(request.extensions())? {
            Caller::Dns => Ok(Response::new(feeds::dns(self.0.clone(), request.into_inner()))),
            _ => Err(denied("DnsFeed", "DNS servers")),
        }
    }

    async fn sidecar_feed(
        &self,
        request: Request<Streaming<SidecarMessage>>,
    ) -> Result<Response<Self::SidecarFeedStream>, Status> {
        match self.0.realm.require(request.extensions())? {
            Caller::Workload(id) => Ok(Response::new(feeds::sidecar(self.0.clone(), id, request.into_inner()))),
            _ => Err(denied("SidecarFeed", "workloads")),
        }
    }
}

fn refusal(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::Busy => Status::aborted(refusal.to_string()),
        Refusal::Unknown | Refusal::Expired(_) | Refusal::Used(_) => Status::permission_denied(refusal.to_string()),
    }
}

fn check_csr(csr: &[u8]) -> Result<(), Status> {
    match csr.len() {
        1..=MAX_CSR => Ok(()),
        n => Err(Status::invalid_argument(format!("csr: {n} bytes; 1 to {MAX_CSR} are allowed"))),
    }
}

fn now() -> Timestamp {
    Timestamp(isthmus_runtime::now())
}
