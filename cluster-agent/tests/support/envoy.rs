//! What an Envoy does at its agent: asks for clusters and their endpoints, acknowledges, and is told of changes.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::{
    config::{
        cluster::v3::Cluster,
        core::v3::{Node, address, socket_address::PortSpecifier},
        endpoint::v3::{ClusterLoadAssignment, LbEndpoint, lb_endpoint::HostIdentifier},
    },
    service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use prost::Message as _;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use super::DEADLINE;

const CLUSTERS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";

/// The stream of cart-1's Envoy.
pub(crate) struct Envoy {
    up: mpsc::Sender<DeltaDiscoveryRequest>,
    down: Streaming<DeltaDiscoveryResponse>,
    asked: BTreeSet<String>,
}

impl Envoy {
    pub(crate) async fn connect(channel: Channel) -> Self {
        let (up, requests) = mpsc::channel(64);
        let first = DeltaDiscoveryRequest {
            node: Some(Node { id: "cart-1".to_owned(), ..Default::default() }),
            type_url: CLUSTERS.to_owned(),
            ..Default::default()
        };
        up.send(first).await.unwrap();
        let mut ads = AggregatedDiscoveryServiceClient::new(channel);
        let down = ads.delta_aggregated_resources(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { up, down, asked: BTreeSet::new() }
    }

    /// The next assignments that it is told: cluster, and "ip:port" of each endpoint.
    pub(crate) async fn endpoints(&mut self) -> Vec<(String, Vec<String>)> {
        loop {
            let response = timeout(DEADLINE, self.down.message()).await.unwrap().unwrap().unwrap();
            self.acknowledge(&response).await;
            if response.type_url == CLUSTERS {
                self.ask(&response).await;
            } else if response.type_url == ENDPOINTS && !response.resources.is_empty() {
                return response.resources.into_iter().map(|r| assignment(&r.resource.unwrap().value)).collect();
            }
        }
    }

    async fn acknowledge(&self, response: &DeltaDiscoveryResponse) {
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..Default::default()
        };
        self.up.send(ack).await.unwrap();
    }

    async fn ask(&mut self, response: &DeltaDiscoveryResponse) {
        let clusters = response.resources.iter().map(|r| {
            let cluster = Cluster::decode(r.resource.clone().unwrap().value.as_slice()).unwrap();
            cluster.eds_cluster_config.map(|_| cluster.name)
        });
        let names: Vec<String> = clusters.flatten().filter(|name| !self.asked.contains(name)).collect();
        self.asked.extend(names.iter().cloned());
        let request = DeltaDiscoveryRequest {
            type_url: ENDPOINTS.to_owned(),
            resource_names_subscribe: names,
            ..Default::default()
        };
        self.up.send(request).await.unwrap();
    }
}

fn assignment(bytes: &[u8]) -> (String, Vec<String>) {
    let load = ClusterLoadAssignment::decode(bytes).unwrap();
    (load.cluster_name, load.endpoints.iter().flat_map(|group| &group.lb_endpoints).map(text).collect())
}

fn text(endpoint: &LbEndpoint) -> String {
    let Some(HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier else { panic!("no endpoint") };
    let Some(address::Address::SocketAddress(at)) = endpoint.address.clone().unwrap().address else {
        panic!("no address")
    };
    let Some(PortSpecifier::PortValue(port)) = at.port_specifier else { panic!("no port") };
    format!("{}:{port}", at.address)
}
