//! A federation small enough for a test: a control plane that speaks the real protocol over real TLS, and an agent run
//! in process with a folder of its own.

#![allow(dead_code, reason = "not every test binary uses everything")]

pub(crate) mod clients;
pub(crate) mod envoy;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::Stream;
use isthmus_agent::{
    Config,
    local::{admin, tokens::Subject},
};
use isthmus_api::{
    convert,
    proto::{
        common::v1 as common,
        federation::v1::{
            AgentMessage, ControlMessage, JoinRequest, JoinResponse, Published, Role, SignRequest, SignResponse,
            agent_message, control_message,
            federation_server::{Federation, FederationServer},
        },
        local::v1::{EnrolRequest, EnrolResponse, local_client::LocalClient},
    },
};
use isthmus_identity::{
    bundle::{BundleDocument, TrustStore},
    ca::CertificateAuthority,
    grpc::{PeerInfo, TlsIncoming, connect_lazy},
    keys::KeyPair,
    svid::Svid,
    tls::{ClientAuth, IdentitySource, PeerPolicy, client_config, pinned_client_config, server_config},
    token::{Token, TokenKind, TokenSpec},
};
use isthmus_model::{
    global::{ClusterInfo, ClusterState, GlobalSnapshot, Locality, Settings},
    ids::{ClusterIndex, ClusterName, Epoch, Revision, SpiffeId, Stamp, TrustDomain},
    service::{Publication, TrustBundle},
    time::Timestamp,
};
use isthmus_runtime::{
    tasks::{TaskError, Tasks},
    wait::wait_for,
};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Server},
};

pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn stamp(revision: u64) -> Stamp {
    Stamp { epoch: Epoch(1), revision: Revision(revision) }
}

pub(crate) async fn eventually(what: &str, condition: impl AsyncFnMut() -> bool) {
    wait_for(what, DEADLINE, condition).await.unwrap();
}

/// What the agent said.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) publications: Vec<Publication>,
    pub(crate) status: convert::Status,
    pub(crate) sessions: usize,
}

#[derive(Clone)]
pub(crate) struct ControlPlane {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Mutex<Seen>>,
    pub(crate) joined: Arc<Mutex<Option<TrustBundle>>>,
    pub(crate) state: Arc<watch::Sender<Option<GlobalSnapshot>>>,
    /// How long the certificates live that it signs.
    pub(crate) lifetime: Arc<Mutex<Duration>>,
    ca: Arc<CertificateAuthority>,
    used: Arc<Mutex<BTreeSet<String>>>,
    tasks: Arc<Mutex<Option<Tasks>>>,
}

pub(crate) fn federation() -> TrustDomain {
    "isthmus.example".parse().unwrap()
}

impl ControlPlane {
    pub(crate) async fn start() -> Self {
        isthmus_identity::install_crypto();
        let ca = Arc::new(CertificateAuthority::create(&federation(), HOUR).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let control = Self {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
            joined: Arc::default(),
            state: Arc::new(watch::Sender::new(None)),
            lifetime: Arc::new(Mutex::new(HOUR)),
            ca,
            used: Arc::default(),
            tasks: Arc::default(),
        };
        control.serve(listener);
        control
    }

    fn serve(&self, listener: TcpListener) {
        let key = KeyPair::generate().unwrap();
        let id = SpiffeId::new(&federation(), &["cp", "cp-1"]).unwrap();
        let chain = self.ca.sign_csr(&key.csr_der().unwrap(), &id, &[], HOUR).unwrap();
        let identity = IdentitySource::new(Svid::new(chain, &key).unwrap());
        let trust = TrustStore::new();
        trust.set([(federation(), vec![self.ca.root_der().clone()])].into());
        let policy: PeerPolicy = Arc::new(|id| id.segments().last() == Some("agent"));
        let tls = server_config(&identity, &trust, ClientAuth::Optional(policy), &[b"h2"]).unwrap();
        let incoming = TlsIncoming::new(listener, Arc::new(tls));
        let tasks = Tasks::new();
        let server = Server::builder().add_service(FederationServer::new(self.clone()));
        tasks.spawn("control-plane", async move { server.serve_with_incoming(incoming).await.unwrap() });
        *self.tasks.lock().unwrap() = Some(tasks);
    }

    /// Gone, with all its connections.
    pub(crate) async fn stop(&self) {
        let tasks = self.tasks.lock().unwrap().take().unwrap();
        tasks.shutdown().request();
        tasks.run_until(std::future::ready(()), Duration::from_millis(10)).await.unwrap();
    }

    pub(crate) fn join_token(&self) -> String {
        let token = Token::mint(TokenSpec {
            kind: TokenKind::Join,
            address: self.address.to_string(),
            ca_pin: self.ca.root_sha256(),
            cluster: "us-east".parse().unwrap(),
            subject: "agent".to_owned(),
            expires_at: Timestamp(isthmus_runtime::now()) + HOUR,
        });
        token.encode()
    }

    /// A state in which us-east is the only cluster, at this revision.
    pub(crate) fn set_state(&self, revision: u64) {
        self.state.send_replace(Some(self.snapshot(revision)));
    }

    pub(crate) fn snapshot(&self, revision: u64) -> GlobalSnapshot {
        let bundle = self.joined.lock().unwrap().clone().unwrap();
        let name: ClusterName = "us-east".parse().unwrap();
        let cluster = ClusterInfo {
            name: name.clone(),
            index: ClusterIndex(1),
            locality: Locality { region: "us".parse().unwrap(), zone: "us-east-1".parse().unwrap() },
            state: ClusterState::Active,
            bundle,
            gateways: Vec::new(),
            grant: Default::default(),
        };
        GlobalSnapshot {
            stamp: stamp(revision),
            federation: federation(),
            federation_bundle: self.ca.bundle(),
            settings: Settings::default(),
            clusters: [(name, cluster)].into(),
            services: BTreeMap::new(),
        }
    }
}

#[tonic::async_trait]
impl Federation for ControlPlane {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<ControlMessage, Status>> + Send>>;

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let request = request.into_inner();
        if !self.used.lock().unwrap().insert(request.secret) {
            return Err(Status::permission_denied("the token was already used"));
        }
        let cluster = request.cluster.parse().unwrap();
        let id = SpiffeId::component(&federation(), &cluster, "agent").unwrap();
        let life = *self.lifetime.lock().unwrap();
        let chain = self.ca.sign_csr(&request.csr, &id, &[], life).unwrap();
        *self.joined.lock().unwrap() = Some(request.bundle.unwrap().try_into().unwrap());
        Ok(Response::new(JoinResponse {
            certificate_chain: chain.iter().map(|c| c.to_vec()).collect(),
            federation: federation().to_string(),
            federation_bundle: Some((&self.ca.bundle()).into()),
        }))
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let agent = request.extensions().get::<PeerInfo>().unwrap().id.clone().unwrap();
        let cluster = agent.segments().nth(1).unwrap().parse().unwrap();
        let request = request.into_inner();
        let role = match request.role() {
            Role::Agent => "agent",
            Role::Gateway => "gateway",
            Role::Dns => "dns",
            Role::Unspecified => return Err(Status::invalid_argument("role")),
        };
        let id = SpiffeId::component(&federation(), &cluster, role).unwrap();
        let life = *self.lifetime.lock().unwrap();
        let chain =
            self.ca.sign_csr(&request.csr, &id, &[], life).map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Response::new(SignResponse {
            certificate_chain: chain.iter().map(|c| c.to_vec()).collect(),
            federation_bundle: Some((&self.ca.bundle()).into()),
        }))
    }

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        request
            .extensions()
            .get::<PeerInfo>()
            .and_then(|p| p.id.clone())
            .ok_or_else(|| Status::unauthenticated("no"))?;
        let mut inbound = request.into_inner();
        let (out, messages) = mpsc::channel(16);
        let (control, tasks) = (self.clone(), self.tasks.lock().unwrap().clone().unwrap());
        let shutdown = tasks.shutdown();
        tasks.spawn("session", async move {
            let mut states = control.state.subscribe();
            states.mark_changed();
            control.seen.lock().unwrap().sessions += 1;
            loop {
                let reply = tokio::select! {
                    () = shutdown.requested() => return,
                    message = inbound.message() => match message {
                        Ok(Some(message)) => control.take(message),
                        _ => return,
                    },
                    _ = states.changed() => {
                        let state = states.borrow_and_update().clone();
                        state.map(|s| control_message::Kind::Snapshot(common::GlobalSnapshot::from(&s).encode_to_vec().into()))
                    }
                };
                if let Some(kind) = reply
                    && out.send(Ok(ControlMessage { kind: Some(kind) })).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

impl ControlPlane {
    fn take(&self, message: AgentMessage) -> Option<control_message::Kind> {
        let mut seen = self.seen.lock().unwrap();
        match message.kind.unwrap() {
            agent_message::Kind::Hello(_) => None,
            agent_message::Kind::Status(status) => {
                seen.status = status.try_into().unwrap();
                None
            }
            agent_message::Kind::Publish(publish) => {
                seen.publications.push(publish.publication.unwrap().try_into().unwrap());
                let at = self.state.borrow().as_ref().map(|s| s.stamp.into());
                Some(control_message::Kind::Published(Published { sequence: publish.sequence, stamp: at }))
            }
        }
    }
}

/// An agent's folder, which outlives the agent.
pub(crate) struct Home {
    pub(crate) dir: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new(token: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("manifests")).unwrap();
        fs::write(dir.path().join("join.token"), token).unwrap();
        Self { dir }
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join("manifests").join(name), text).unwrap();
    }

    pub(crate) fn config(&self) -> Config {
        let root = self.dir.path().display();
        let text = format!(
            "cluster: us-east\ntrustDomain: us-east.example\nlocality: {{region: us, zone: us-east-1}}\n\
             stateDir: {root}/state\nmanifests: {root}/manifests\njoinTokenFile: {root}/join.token\n\
             listen: {{local: 127.0.0.1:0, health: 127.0.0.1:0}}\nvipRange: 127.64.0.0/16\n"
        );
        let path = self.dir.path().join("agent.yaml");
        fs::write(&path, text).unwrap();
        Config::load(&path).unwrap()
    }

    pub(crate) async fn start(&self) -> Agent {
        Agent::start(self.config()).await
    }

    pub(crate) async fn mint(&self, subject: Subject) -> String {
        admin::mint(&self.state_dir(), subject, HOUR).await.unwrap()
    }
}

/// An agent that runs.
pub(crate) struct Agent {
    pub(crate) health: SocketAddr,
    stop: oneshot::Sender<()>,
    running: tokio::task::JoinHandle<Result<(), TaskError>>,
}

impl Agent {
    pub(crate) async fn start(config: Config) -> Self {
        let bound = isthmus_agent::build(config).await.unwrap();
        let health = bound.health_addr();
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(bound.run_until(async {
            // Dropped with the test counts as a stop.
            drop(stopped.await);
        }));
        Self { health, stop, running }
    }

    pub(crate) async fn ready(&self) {
        eventually("the agent is ready", async || self.get("/readyz").await.starts_with("HTTP/1.1 200")).await;
    }

    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.running.await.unwrap().unwrap();
    }

    /// Ends by itself.
    pub(crate) async fn failure(self) -> String {
        let error = tokio::time::timeout(DEADLINE, self.running).await.unwrap().unwrap().unwrap_err();
        isthmus_runtime::tasks::chain(&error)
    }

    pub(crate) async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.health).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }
}

/// Trades a token for a certificate, as gateways and launchers do.
pub(crate) async fn enrol(token: &str) -> Result<(LocalClient<Channel>, Svid), Status> {
    let (channel, svid) = enrol_channel(token).await?;
    Ok((LocalClient::new(channel), svid))
}

/// As [`enrol`], for any service of the agent.
pub(crate) async fn enrol_channel(token: &str) -> Result<(Channel, Svid), Status> {
    let key = KeyPair::generate().unwrap();
    let response = enrol_with(token, &key).await?;
    let chain = response.certificate_chain.into_iter().map(Into::into).collect();
    let svid = Svid::new(chain, &key).unwrap();
    let bundle: TrustBundle = response.federation_bundle.unwrap().try_into().unwrap();
    let trust = TrustStore::new();
    trust.set([(bundle.trust_domain, BundleDocument::parse(&bundle.document).unwrap().x509_roots)].into());
    let policy: PeerPolicy = Arc::new(|id| id.as_str() == "spiffe://isthmus.example/cluster/us-east/agent");
    let tls = client_config(Some(&IdentitySource::new(svid.clone())), &trust, policy, &[b"h2"]).unwrap();
    let address = Token::parse(token).unwrap().address;
    Ok((connect_lazy(&address, Arc::new(tls)), svid))
}

async fn enrol_with(token: &str, key: &KeyPair) -> Result<EnrolResponse, Status> {
    let token = Token::parse(token).unwrap().require(TokenKind::Local).unwrap();
    let (tls, _) = pinned_client_config(token.ca_pin, Arc::new(|_| true)).unwrap();
    let mut client = LocalClient::new(connect_lazy(&token.address, Arc::new(tls)));
    let request = EnrolRequest { secret: token.secret, csr: key.csr_der().unwrap() };
    Ok(client.enrol(request).await?.into_inner())
}
