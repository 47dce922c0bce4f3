//! What gateways, launchers and Envoys do at an agent, and what may happen to its state folder.

use std::fs;

use envoy_types::pb::envoy::{
    config::core::v3::Node,
    service::discovery::v3::{
        DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use isthmus_agent::local::tokens::Subject;
use isthmus_api::proto::{
    common::v1 as common,
    local::v1::{
        GatewayHello, GatewayMessage, GatewayUpdate, InboundPort, LocalEndpoints, SidecarHello, SidecarMessage,
        SidecarUpdate, gateway_message, gateway_update, local_client::LocalClient, sidecar_message,
    },
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use super::{Agent, ControlPlane, DEADLINE, Home, eventually};

pub(crate) const CART: &str = "apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {ports: [{name: http, port: 80, appProtocol: http}]}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: cart, namespace: shop}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 15080}]
endpoints: [{addresses: [127.1.1.21]}]
";

pub(crate) fn gateway() -> Subject {
    Subject::Gateway("gateway-1".to_owned())
}

pub(crate) fn cart() -> Subject {
    Subject::Workload { namespace: "shop".parse().unwrap(), service_account: "cart".to_owned() }
}

/// A joined agent that has the federation's first state.
pub(crate) async fn joined() -> (ControlPlane, Home, Agent) {
    let control = ControlPlane::start().await;
    let home = Home::new(&control.join_token());
    home.write("cart.yaml", CART);
    let agent = home.start().await;
    eventually("the cluster has joined", async || control.joined.lock().unwrap().is_some()).await;
    control.set_state(1);
    agent.ready().await;
    (control, home, agent)
}

/// One end of a gateway's feed.
pub(crate) struct Gateway {
    up: mpsc::Sender<GatewayMessage>,
    down: Streaming<GatewayUpdate>,
}

impl Gateway {
    pub(crate) async fn connect(client: &mut LocalClient<Channel>) -> Self {
        Self::connect_as(client, "").await
    }

    /// As this process of gateway-1.
    pub(crate) async fn connect_as(client: &mut LocalClient<Channel>, instance: &str) -> Self {
        Self::connect_number(client, 1, instance).await
    }

    /// As this process of gateway-`number`.
    pub(crate) async fn connect_number(client: &mut LocalClient<Channel>, number: u8, instance: &str) -> Self {
        let (up, messages) = mpsc::channel(8);
        let gateway = Self { down: client.gateway_feed(ReceiverStream::new(messages)).await.unwrap().into_inner(), up };
        let hello = GatewayHello {
            name: format!("gateway-{number}"),
            tunnel_address: format!("127.1.1.1{number}:15443"),
            local_ip: format!("127.1.1.1{number}"),
            auto_port: 15440,
            pinned_port_base: 15500,
            instance: instance.to_owned(),
        };
        gateway.say(gateway_message::Kind::Hello(hello)).await;
        gateway
    }

    pub(crate) async fn say(&self, kind: gateway_message::Kind) {
        self.up.send(GatewayMessage { kind: Some(kind) }).await.unwrap();
    }

    /// Ends the feed in order, and waits until the agent has taken it.
    pub(crate) async fn leave(self) {
        let Self { up, mut down } = self;
        drop(up);
        while let Ok(Some(_)) = timeout(DEADLINE, down.message()).await.unwrap() {}
    }

    pub(crate) async fn hear(&mut self) -> gateway_update::Kind {
        timeout(DEADLINE, self.down.message()).await.unwrap().unwrap().unwrap().kind.unwrap()
    }

    pub(crate) async fn revision(&mut self, revision: u64) {
        loop {
            if let gateway_update::Kind::Global(global) = self.hear().await
                && global.stamp.unwrap().revision == revision
            {
                return;
            }
        }
    }

    pub(crate) async fn endpoints(&mut self, wanted: impl Fn(&LocalEndpoints) -> bool) {
        loop {
            if let gateway_update::Kind::Endpoints(endpoints) = self.hear().await
                && wanted(&endpoints)
            {
                return;
            }
        }
    }
}

/// Registers the cart's sidecar.
pub(crate) async fn sidecar(
    client: &mut LocalClient<Channel>,
) -> (mpsc::Sender<SidecarMessage>, Streaming<SidecarUpdate>) {
    sidecar_of(client, &[]).await
}

/// Registers the cart's sidecar, which calls these.
pub(crate) async fn sidecar_of(
    client: &mut LocalClient<Channel>,
    upstreams: &[&str],
) -> (mpsc::Sender<SidecarMessage>, Streaming<SidecarUpdate>) {
    let (up, messages) = mpsc::channel(8);
    let down = client.sidecar_feed(ReceiverStream::new(messages)).await.unwrap().into_inner();
    let inbound =
        InboundPort { port: 15080, app: "127.0.0.1:18080".to_owned(), protocol: common::AppProtocol::Http.into() };
    let hello = SidecarHello {
        name: "cart-1".to_owned(),
        address: "127.1.1.21".to_owned(),
        inbound: vec![inbound],
        upstreams: upstreams.iter().map(|s| (*s).to_owned()).collect(),
    };
    up.send(SidecarMessage { kind: Some(sidecar_message::Kind::Hello(hello)) }).await.unwrap();
    (up, down)
}

/// What an Envoy hears first that asks for its listeners.
pub(crate) async fn listeners(channel: Channel) -> Result<Vec<String>, tonic::Status> {
    let (up, requests) = mpsc::channel(1);
    let request = DeltaDiscoveryRequest {
        node: Some(Node { id: "cart-1".to_owned(), ..Default::default() }),
        type_url: "type.googleapis.com/envoy.config.listener.v3.Listener".to_owned(),
        ..Default::default()
    };
    up.send(request).await.unwrap();
    let mut ads = AggregatedDiscoveryServiceClient::new(channel);
    let mut responses = ads.delta_aggregated_resources(ReceiverStream::new(requests)).await?.into_inner();
    let response = timeout(DEADLINE, responses.message()).await.unwrap()?.unwrap();
    Ok(response.resources.into_iter().map(|r| r.name).collect())
}

/// The agent again, where its clients know it.
pub(crate) async fn restart(home: &Home, address: &str) -> Agent {
    let mut config = home.config();
    config.listen.local = address.parse().unwrap();
    Agent::start(config).await
}

pub(crate) fn damage(home: &Home, file: &str) {
    let path = home.state_dir().join(file);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

pub(crate) fn is_ready(endpoints: &LocalEndpoints) -> bool {
    endpoints.services.iter().flat_map(|s| &s.endpoints).any(|e| e.ready && e.has_sidecar)
}
