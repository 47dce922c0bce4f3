//! Secret discovery for the launcher's own Envoy: the same protocol core as the agent's, over two secrets.

use std::{collections::VecDeque, pin::Pin};

use envoy_types::pb::envoy::service::{
    discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse},
    secret::v3::secret_discovery_service_server::SecretDiscoveryService,
};
use futures_util::{Stream, StreamExt, stream};
use isthmus_runtime::tasks::Shutdown;
use tonic::{Request, Response, Status, Streaming};

use super::{
    metrics::Metrics,
    secrets::{Secrets, SecretsWatch},
};
use crate::xds::delta::DeltaStream;

/// Serves the secrets.
pub(super) struct Sds {
    pub(super) secrets: Secrets,
    pub(super) metrics: Metrics,
    pub(super) shutdown: Shutdown,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SecretDiscoveryService for Sds {
    type DeltaSecretsStream = Responses<DeltaDiscoveryResponse>;
    type StreamSecretsStream = Responses<DiscoveryResponse>;

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        let mut secrets = self.secrets.watch();
        let session = Session {
            stream: DeltaStream::new(secrets.resources()),
            secrets,
            requests: request.into_inner(),
            metrics: self.metrics.clone(),
            shutdown: self.shutdown.clone(),
            outbox: VecDeque::new(),
        };
        let responses = stream::unfold(session, |mut session| async move {
            let response = session.next().await?;
            Some((response, session))
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn stream_secrets(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        Err(Status::unimplemented("use the incremental stream: api_type DELTA_GRPC"))
    }

    async fn fetch_secrets(&self, _: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        Err(Status::unimplemented("use the incremental stream: api_type DELTA_GRPC"))
    }
}

struct Session {
    stream: DeltaStream,
    secrets: SecretsWatch,
    requests: Streaming<DeltaDiscoveryRequest>,
    metrics: Metrics,
    shutdown: Shutdown,
    outbox: VecDeque<DeltaDiscoveryResponse>,
}

impl Session {
    async fn next(&mut self) -> Option<Result<DeltaDiscoveryResponse, Status>> {
        loop {
            if let Some(response) = self.outbox.pop_front() {
                return Some(Ok(response));
            }
            tokio::select! {
                // All of these are cancel-safe.
                () = self.shutdown.requested() => return None,
                changed = self.secrets.changed() => {
                    if !changed {
                        return None;
                    }
                    let resources = self.secrets.resources();
                    self.outbox.extend(self.stream.update(resources));
                }
                request = self.requests.next() => {
                    let request = request?.ok()?;
                    if let Some(detail) = &request.error_detail {
                        self.metrics.refusals.inc();
                        tracing::error!(detail = detail.message, "Envoy refused a secret");
                    }
                    match self.stream.request(request) {
                        Ok(responses) => self.outbox.extend(responses),
                        Err(error) => {
                            tracing::warn!(%error, "SDS stream closed");
                            return None;
                        }
                    }
                }
            }
        }
    }
}
