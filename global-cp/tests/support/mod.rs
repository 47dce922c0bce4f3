//! A control plane in this process, and clients of it over real TLS: an administrator, agents, and strangers.
#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod client;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use isthmus_api::proto::{
    common::v1 as common,
    federation::v1::{
        self as pb, AgentMessage, ControlMessage, JoinRequest, JoinResponse, agent_message, control_message,
        federation_client::FederationClient,
    },
};
use isthmus_global_cp::{
    Bound, build,
    config::{Config, Listen, Raft},
};
use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    grpc::connect_lazy,
    keys::KeyPair,
    svid::Svid,
    tls::{IdentitySource, PeerPolicy, client_config, pinned_client_config},
    token::Token,
};
use isthmus_model::{global::GlobalSnapshot, ids::TrustDomain};
use isthmus_runtime::tasks::{Shutdown, TaskError};
use prost::Message as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::{net::TcpStream, sync::mpsc, task::JoinHandle, time::timeout};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

pub(crate) const FEDERATION: &str = "isthmus.example";
const DEADLINE: Duration = Duration::from_secs(10);

/// A running control plane.
pub(crate) struct ControlPlane {
    pub(crate) grpc: SocketAddr,
    pub(crate) admin: Admin,
    pub(crate) health: SocketAddr,
    shutdown: Shutdown,
    running: JoinHandle<Result<(), TaskError>>,
}

/// The administrator's client.
pub(crate) struct Admin {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    root: CertificateDer<'static>,
}

/// A cluster's own CA and agent key.
pub(crate) struct Agent {
    pub(crate) cluster: String,
    pub(crate) ca: CertificateAuthority,
    key: KeyPair,
    pub(crate) incarnation: [u8; 16],
}

/// An agent's open session.
pub(crate) struct Session {
    pub(crate) up: mpsc::Sender<AgentMessage>,
    pub(crate) down: Streaming<ControlMessage>,
    /// So many have come.
    pub(crate) pieces: usize,
}

pub(crate) fn config(state_dir: &Path) -> Config {
    let free: SocketAddr = "127.0.0.1:0".parse().unwrap();
    Config {
        node: "cp-1".into(),
        federation: federation(),
        state_dir: state_dir.to_owned(),
        listen: Listen { grpc: free, admin: free, health: free },
        advertise: None,
        join_token_file: None,
        settings: Default::default(),
        raft: Raft::default(),
        admin: Default::default(),
        publications: Default::default(),
        drain_grace: Duration::from_secs(5),
        telemetry: Default::default(),
        new_epoch: false,
    }
}

pub(crate) fn federation() -> TrustDomain {
    FEDERATION.parse().unwrap()
}

pub(crate) fn anyone() -> PeerPolicy {
    Arc::new(|_| true)
}

impl ControlPlane {
    pub(crate) async fn start(state_dir: &Path) -> Self {
        Self::start_with(state_dir, config(state_dir)).await
    }

    pub(crate) async fn start_with(state_dir: &Path, config: Config) -> Self {
        isthmus_identity::install_crypto();
        let bound: Bound = build(config).await.unwrap();
        let (grpc, health, shutdown) = (bound.grpc, bound.health, bound.shutdown());
        let admin = Admin::of(state_dir, bound.admin);
        let running = tokio::spawn(bound.run_until(std::future::pending()));
        Self { grpc, admin, health, shutdown, running }
    }

    pub(crate) async fn stop(self) {
        self.shutdown.request();
        timeout(DEADLINE, self.running).await.expect("it stops in time").unwrap().unwrap();
    }

    /// Mints a token and joins with it; the agent's certificate.
    pub(crate) async fn join(&self, agent: &Agent) -> Svid {
        let token = self.admin.token(&agent.cluster, 900).await;
        agent.join(&token).await.unwrap()
    }

    /// A client with this identity, or none.
    pub(crate) fn client(&self, svid: Option<&Svid>) -> FederationClient<Channel> {
        client(self.grpc, svid, self.admin.root.clone())
    }

    pub(crate) async fn snapshot(&self) -> GlobalSnapshot {
        serde_json::from_value(self.admin.get("/v1/snapshot").await).unwrap()
    }
}

impl Admin {
    /// With the credentials that the control plane left in its state folder.
    pub(crate) fn of(state_dir: &Path, address: SocketAddr) -> Self {
        let svid = Svid::load(&state_dir.join("admin"), "admin").unwrap().expect("the administrator's certificate");
        let root = svid.chain().last().unwrap().clone();
        let tls = client_config(Some(&IdentitySource::new(svid)), &trust(&root), anyone(), &[b"http/1.1"]).unwrap();
        Self { address, tls: Arc::new(tls), root }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call("GET", path, "").await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body
    }

    pub(crate) async fn token(&self, cluster: &str, ttl_seconds: u64) -> Token {
        let body = format!("{{\"ttlSeconds\": {ttl_seconds}}}");
        let (status, answer) = self.call("POST", &format!("/v1/clusters/{cluster}/join-token"), &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        Token::parse(answer["token"].as_str().unwrap()).unwrap()
    }

    pub(crate) async fn call(&self, method: &str, path: &str, body: &str) -> (StatusCode, Value) {
        timeout(DEADLINE, self.try_call(method, path, body)).await.expect("an answer in time").unwrap()
    }

    pub(crate) async fn try_call(&self, method: &str, path: &str, body: &str) -> anyhow::Result<(StatusCode, Value)> {
        let (status, bytes) = self.transfer(method, path, body.to_owned()).await?;
        Ok((status, serde_json::from_slice(&bytes)?))
    }

    /// With bodies as they are.
    pub(crate) async fn transfer(
        &self,
        method: &str,
        path: &str,
        body: impl Into<Bytes>,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let tcp = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("127.0.0.1")?;
        let tls = TlsConnector::from(self.tls.clone()).connect(name, tcp).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(tls)).await?;
        let driver = tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "cp");
        let answer = sender.send_request(request.body(Full::new(body.into()))?).await?;
        let status = answer.status();
        let bytes = answer.into_body().collect().await?.to_bytes();
        driver.abort();
        Ok((status, bytes))
    }

    /// Puts this YAML in force.
    pub(crate) async fn apply(&self, yaml: &str) -> (StatusCode, Value) {
        let body = serde_json::json!({ "files": [{ "name": "test.yaml", "text": yaml }] });
        self.call("POST", "/v1/apply", &body.to_string()).await
    }
}

impl Agent {
    pub(crate) fn new(cluster: &str) -> Self {
        let domain = format!("{cluster}.example").parse().unwrap();
        let ca = CertificateAuthority::create(&domain, Duration::from_secs(86_400)).unwrap();
        Self { cluster: cluster.to_owned(), ca, key: KeyPair::generate().unwrap(), incarnation: [1; 16] }
    }

    /// As an agent does: over TLS that trusts only the root that the token pins.
    pub(crate) async fn join(&self, token: &Token) -> Result<Svid, Status> {
        let (tls, _root) = pinned_client_config(token.ca_pin, anyone()).unwrap();
        let mut client = FederationClient::new(connect_lazy(&token.address, Arc::new(tls)));
        let answer: JoinResponse = client.join(self.request(&token.secret)).await?.into_inner();
        assert_eq!(answer.federation, FEDERATION);
        let chain = answer.certificate_chain.into_iter().map(CertificateDer::from).collect();
        Ok(Svid::new(chain, &self.key).unwrap())
    }

    pub(crate) fn request(&self, secret: &str) -> JoinRequest {
        JoinRequest {
            secret: secret.to_owned(),
            cluster: self.cluster.clone(),
            locality: Some(common::Locality { region: "us".to_owned(), zone: "us-1".to_owned() }),
            bundle: Some((&self.ca.bundle()).into()),
            csr: self.csr(),
        }
    }

    pub(crate) fn csr(&self) -> Vec<u8> {
        self.key.csr_der().unwrap()
    }

    /// A publication that exports these services, each on port 80.
    pub(crate) fn publish(&self, sequence: u64, services: &[&str]) -> AgentMessage {
        let export = |name: &&str| pb::Export {
            service: Some(common::ServiceName { namespace: "shop".to_owned(), name: (*name).to_owned() }),
            created_at_unix_ms: 1,
            kind: common::ServiceKind::ClusterSetIp.into(),
            ports: vec![common::ServicePort {
                name: String::new(),
                number: 80,
                protocol: common::AppProtocol::Http.into(),
            }],
            identities: vec![format!("spiffe://{}.example/ns/shop/sa/{name}", self.cluster)],
        };
        let publication = pb::Publication {
            exports: services.iter().map(export).collect(),
            gateways: vec![common::GatewayAddress {
                name: "gateway-1".to_owned(),
                tunnel: "127.1.1.11:15443".to_owned(),
            }],
            bundle: Some((&self.ca.bundle()).into()),
        };
        let publish = pb::Publish { sequence, publication: Some(publication), incarnation: self.incarnation.to_vec() };
        AgentMessage { kind: Some(agent_message::Kind::Publish(publish)) }
    }
}

impl Session {
    /// Opens a session and says hello as `cluster`.
    pub(crate) async fn open(
        client: &mut FederationClient<Channel>,
        cluster: &str,
        held: Option<common::Stamp>,
    ) -> Result<Self, Status> {
        let hello = pb::Hello { cluster: cluster.to_owned(), held, version: "test".to_owned(), held_digest: vec![] };
        Self::greet(client, hello).await
    }

    /// As an agent of this version that holds `state`.
    pub(crate) async fn resume(
        client: &mut FederationClient<Channel>,
        cluster: &str,
        state: &GlobalSnapshot,
    ) -> Result<Self, Status> {
        let hello = pb::Hello {
            cluster: cluster.to_owned(),
            held: Some(state.stamp.into()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            held_digest: isthmus_api::convert::snapshot_digest(state).to_vec(),
        };
        Self::greet(client, hello).await
    }

    async fn greet(client: &mut FederationClient<Channel>, hello: pb::Hello) -> Result<Self, Status> {
        let (up, messages) = mpsc::channel(8);
        up.send(AgentMessage { kind: Some(agent_message::Kind::Hello(hello)) }).await.unwrap();
        let down = client.session(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Self { up, down, pieces: 0 })
    }

    pub(crate) async fn send(&self, message: AgentMessage) {
        self.up.send(message).await.unwrap();
    }

    /// Pieces of one state are put together.
    pub(crate) async fn next(&mut self) -> Result<control_message::Kind, Status> {
        let mut whole = Vec::new();
        loop {
            let message = timeout(DEADLINE, self.down.message()).await.expect("a message in time")?;
            match message.expect("the session goes on").kind.unwrap() {
                control_message::Kind::Nodes(_) => assert!(whole.is_empty(), "something came between pieces"),
                control_message::Kind::Piece(piece) => {
                    self.pieces += 1;
                    whole.extend_from_slice(&piece.bytes);
                    let whole = bytes::Bytes::from(if piece.last { std::mem::take(&mut whole) } else { continue });
                    return Ok(match piece.of() {
                        pb::PieceOf::Snapshot => control_message::Kind::Snapshot(whole),
                        _ => control_message::Kind::Delta(whole),
                    });
                }
                kind => {
                    assert!(whole.is_empty(), "something came between pieces");
                    return Ok(kind);
                }
            }
        }
    }

    pub(crate) async fn snapshot(&mut self) -> common::GlobalSnapshot {
        match self.next().await.unwrap() {
            control_message::Kind::Snapshot(snapshot) => common::GlobalSnapshot::decode(snapshot).unwrap(),
            other => panic!("not a snapshot: {other:?}"),
        }
    }

    pub(crate) async fn delta(&mut self) -> common::GlobalDelta {
        match self.next().await.unwrap() {
            control_message::Kind::Delta(delta) => common::GlobalDelta::decode(delta).unwrap(),
            other => panic!("not a delta: {other:?}"),
        }
    }

    /// The answer to a publication, and the deltas that came before it.
    pub(crate) async fn answer(&mut self) -> control_message::Kind {
        loop {
            match self.next().await.unwrap() {
                control_message::Kind::Delta(_)
                | control_message::Kind::Snapshot(_)
                | control_message::Kind::Conditions(_) => {}
                answer => return answer,
            }
        }
    }

    /// The next word of what is the matter with the cluster's exports, each as "service reason".
    pub(crate) async fn conditions(&mut self) -> Vec<String> {
        loop {
            if let control_message::Kind::Conditions(told) = self.next().await.unwrap() {
                let service = |service: Option<common::ServiceName>| {
                    service.map_or_else(String::new, |service| format!("{}/{} ", service.namespace, service.name))
                };
                return told.conditions.into_iter().map(|c| service(c.service) + &c.reason).collect();
            }
        }
    }

    /// Reads until the stream ends, and says why.
    pub(crate) async fn end(&mut self) -> Status {
        loop {
            match timeout(DEADLINE, self.down.message()).await.expect("it ends in time") {
                Ok(Some(_)) => {}
                Ok(None) => return Status::ok("ended"),
                Err(status) => return status,
            }
        }
    }
}

fn client(address: SocketAddr, svid: Option<&Svid>, root: CertificateDer<'static>) -> FederationClient<Channel> {
    let source = svid.map(|svid| IdentitySource::new(svid.clone()));
    let tls = client_config(source.as_ref(), &trust(&root), anyone(), &[b"h2"]).unwrap();
    FederationClient::new(connect_lazy(&address.to_string(), Arc::new(tls)))
}

fn trust(root: &CertificateDer<'static>) -> TrustStore {
    let trust = TrustStore::new();
    trust.set([(federation(), vec![root.clone()])].into());
    trust
}

/// A plain GET, for the health server.
pub(crate) async fn http_get(address: SocketAddr, path: &str) -> (StatusCode, String) {
    let tcp = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(tcp)).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::builder().uri(path).header("host", "cp").body(Full::new(Bytes::new())).unwrap();
    let answer = timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap();
    let status = answer.status();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    driver.abort();
    (status, String::from_utf8(body.to_vec()).unwrap())
}
