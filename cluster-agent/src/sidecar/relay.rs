//! Envoy's configuration stream, passed on to the agent as it is.
//!
//! The launcher adds its certificate and nothing else. When either side ends, both do, and Envoy comes again with what it
//! holds; meanwhile it keeps its configuration. Refusals are told in the launcher's log with what only this machine knows:
//! who holds the port.

use std::{net::SocketAddr, pin::Pin, time::Duration};

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    aggregated_discovery_service_server::AggregatedDiscoveryService,
};
use futures_util::{Stream, StreamExt};
use isthmus_runtime::tasks::Shutdown;
use tokio::{sync::watch, time::timeout};
use tonic::{Request, Response, Status, Streaming, transport::Channel};

use super::{metrics::Metrics, ports};

/// How long Envoy's stream waits for the agent to know this sidecar.
const REGISTRATION: Duration = Duration::from_secs(10);
const CALL: Duration = Duration::from_secs(10);
/// tonic's default of 4 MiB is less than a large configuration.
pub(super) const MAX_MESSAGE: usize = 64 * 1024 * 1024;

/// The relay.
pub(super) struct Relay {
    pub(super) agent: Channel,
    /// The agent knows this sidecar.
    pub(super) registered: watch::Receiver<bool>,
    pub(super) metrics: Metrics,
    pub(super) shutdown: Shutdown,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Relay {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("use the incremental stream: api_type DELTA_GRPC"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut registered = self.registered.clone();
        match timeout(REGISTRATION, registered.wait_for(|known| *known)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err(Status::unavailable("the launcher is stopping")),
            Err(_) => return Err(Status::unavailable("the agent does not know this sidecar yet")),
        }
        let metrics = self.metrics.clone();
        // A request stream has no way to pass an error on; its end is one.
        let requests = request.into_inner().take_while(|r| std::future::ready(r.is_ok())).filter_map(move |r| {
            if let Ok(request) = &r {
                note_refusal(request, &metrics);
            }
            std::future::ready(r.ok())
        });
        let mut agent = AggregatedDiscoveryServiceClient::new(self.agent.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let responses = timeout(CALL, agent.delta_aggregated_resources(requests))
            .await
            .map_err(|_| Status::unavailable("the agent did not answer in time"))??
            .into_inner();
        let shutdown = self.shutdown.clone();
        let responses = responses.take_until(async move { shutdown.requested().await });
        Ok(Response::new(Box::pin(responses)))
    }
}

fn note_refusal(request: &DeltaDiscoveryRequest, metrics: &Metrics) {
    let Some(detail) = &request.error_detail else { return };
    metrics.refusals.inc();
    let hint = bind_target(&detail.message).map(ports::explain).unwrap_or_default();
    tracing::warn!(type_url = request.type_url, detail = detail.message, hint, "Envoy refused configuration");
}

/// The address in Envoy's "cannot bind '127.64.0.1:80': Address already in use".
fn bind_target(detail: &str) -> Option<SocketAddr> {
    let (_, rest) = detail.split_once("cannot bind '")?;
    rest.split_once('\'')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_envoys_words() {
        let detail = "Error adding/updating listener(s) outbound|127.64.0.1:80: cannot bind '127.64.0.1:80': Address already in use\n";
        assert_eq!(bind_target(detail), Some("127.64.0.1:80".parse().unwrap()));
        assert_eq!(bind_target("no route"), None);
    }
}
