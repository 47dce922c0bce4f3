//! The agent's part towards one gateway: enrols it by its one-time token, tells it the state whenever it connects, and
//! remembers what it hears. The state does not change, and nothing but the token is checked.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use isthmus_api::proto::local::v1::{
    DnsMessage, DnsUpdate, EnrolRequest, EnrolResponse, GatewayMessage, GatewayUpdate, RenewRequest, SidecarMessage,
    SidecarUpdate,
    gateway_message::Kind as Up,
    gateway_update::Kind as Down,
    local_server::{Local, LocalServer},
};
use isthmus_gateway::View;
use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    grpc::TlsIncoming,
    keys::KeyPair,
    svid::Svid,
    tls::{self, ClientAuth, IdentitySource},
    token::{Token, TokenKind, TokenSpec},
};
use isthmus_model::{ids::SpiffeId, time::Timestamp};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming, transport};

use crate::rig::{DAY, FEDERATION};

/// What the gateway said.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    pub(crate) enrolled: usize,
    /// Processes that said hello, in order.
    pub(crate) instances: Vec<String>,
    /// Feeds that are open now.
    pub(crate) feeds: usize,
    pub(crate) draining: usize,
}

/// The agent of one gateway.
#[derive(Clone)]
pub(crate) struct Agent {
    ca: Arc<CertificateAuthority>,
    cluster: String,
    gateway: String,
    view: Arc<View>,
    secret: String,
    told: Arc<Mutex<Told>>,
}

impl Agent {
    /// Serves at `address` until the test ends. Returns it and the token for the gateway `gateway` of `cluster`.
    pub(crate) async fn serve(
        ca: &Arc<CertificateAuthority>,
        address: SocketAddr,
        (cluster, gateway): (&str, &str),
        view: View,
    ) -> (Self, Token) {
        let key = KeyPair::generate().unwrap();
        let chain = ca.sign_csr(&key.csr_der().unwrap(), &id(cluster, "agent"), &[], DAY).unwrap();
        let source = IdentitySource::new(Svid::new(chain, &key).unwrap());
        let trust = TrustStore::new();
        trust.set([(FEDERATION.parse().unwrap(), vec![ca.root_der().clone()])].into());
        let tls = tls::server_config(&source, &trust, ClientAuth::Optional(Arc::new(|_| true)), &[b"h2"]).unwrap();
        let token = Token::mint(TokenSpec {
            kind: TokenKind::Local,
            address: address.to_string(),
            ca_pin: ca.root_sha256(),
            cluster: cluster.parse().unwrap(),
            subject: format!("gateway/{gateway}"),
            expires_at: Timestamp(isthmus_runtime::now()) + Duration::from_secs(60),
        });
        let agent = Self {
            ca: ca.clone(),
            cluster: cluster.to_owned(),
            gateway: gateway.to_owned(),
            view: Arc::new(view),
            secret: token.secret.clone(),
            told: Arc::default(),
        };
        let incoming = TlsIncoming::new(TcpListener::bind(address).await.unwrap(), Arc::new(tls));
        let server = transport::Server::builder().add_service(LocalServer::new(agent.clone()));
        tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        (agent, token)
    }

    /// What it has heard so far.
    pub(crate) fn told(&self) -> Told {
        self.told.lock().unwrap().clone()
    }
}

fn id(cluster: &str, role: &str) -> SpiffeId {
    SpiffeId::component(&FEDERATION.parse().unwrap(), &cluster.parse().unwrap(), role).unwrap()
}

fn never<T>() -> Result<Response<ReceiverStream<Result<T, Status>>>, Status> {
    Err(Status::unimplemented("not a gateway's"))
}

#[tonic::async_trait]
impl Local for Agent {
    type GatewayFeedStream = ReceiverStream<Result<GatewayUpdate, Status>>;
    type DnsFeedStream = ReceiverStream<Result<DnsUpdate, Status>>;
    type SidecarFeedStream = ReceiverStream<Result<SidecarUpdate, Status>>;

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        let request = request.into_inner();
        if request.secret != self.secret {
            return Err(Status::unauthenticated("not the token's secret"));
        }
        self.told.lock().unwrap().enrolled += 1;
        let chain = self.ca.sign_csr(&request.csr, &id(&self.cluster, "gateway"), &[], DAY).unwrap();
        Ok(Response::new(EnrolResponse {
            certificate_chain: chain.iter().map(|c| c.to_vec()).collect(),
            cluster: self.cluster.clone(),
            federation: FEDERATION.to_owned(),
            federation_bundle: Some((&self.ca.bundle()).into()),
            name: self.gateway.clone(),
        }))
    }

    async fn renew(&self, _: Request<RenewRequest>) -> Result<Response<EnrolResponse>, Status> {
        Err(Status::unavailable("not needed"))
    }

    async fn gateway_feed(
        &self,
        request: Request<Streaming<GatewayMessage>>,
    ) -> Result<Response<Self::GatewayFeedStream>, Status> {
        let (down, stream) = mpsc::channel(2);
        let global = self.view.global.as_deref().unwrap();
        for kind in [Down::Global(global.into()), Down::Endpoints((&*self.view.endpoints).into())] {
            down.try_send(Ok(GatewayUpdate { kind: Some(kind) })).unwrap();
        }
        let (told, mut up) = (self.told.clone(), request.into_inner());
        told.lock().unwrap().feeds += 1;
        tokio::spawn(async move {
            while let Some(Ok(message)) = up.next().await {
                let mut told = told.lock().unwrap();
                match message.kind {
                    Some(Up::Hello(hello)) => told.instances.push(hello.instance),
                    Some(Up::Draining(_)) => told.draining += 1,
                    _ => {}
                }
            }
            told.lock().unwrap().feeds -= 1;
            // Until here the feed was open.
            drop(down);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn dns_feed(&self, _: Request<Streaming<DnsMessage>>) -> Result<Response<Self::DnsFeedStream>, Status> {
        never()
    }

    async fn sidecar_feed(
        &self,
        _: Request<Streaming<SidecarMessage>>,
    ) -> Result<Response<Self::SidecarFeedStream>, Status> {
        never()
    }
}
