//! The whole server against an agent in this process: real TLS, real gRPC, real packets.

use std::{
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::Stream;
use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use isthmus_api::{
    convert::AvailabilityReport,
    proto::local::v1::{
        EnrolRequest, EnrolResponse, GatewayMessage, GatewayUpdate, RenewRequest, SidecarMessage, SidecarUpdate,
        dns_update::Kind,
        local_server::{Local, LocalServer},
    },
};
use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    grpc::{PeerInfo, TlsIncoming},
    keys::KeyPair,
    svid::Svid,
    tls::{ClientAuth, IdentitySource, server_config},
    token::{Token, TokenKind, TokenSpec},
};
use isthmus_model::{
    availability::{Availability, Report},
    global::{ClusterState, GlobalSnapshot},
    ids::{SpiffeId, TrustDomain},
    time::Timestamp,
};
use isthmus_runtime::{
    tasks::{Shutdown, Tasks},
    wait::wait_for,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::watch,
    time::timeout,
};
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::{
    Bound, BuildError, Config,
    config::Listen,
    fixture::{bundle, config, snapshot, stamp},
};

const DEADLINE: Duration = Duration::from_secs(15);
const SECRET: &str = "once";

type Updates<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// An agent that gives out certificates and whatever state the test sets.
struct Agent {
    ca: Arc<CertificateAuthority>,
    address: SocketAddr,
    shared: Arc<Shared>,
    tasks: Tasks,
}

struct Shared {
    ca: Arc<CertificateAuthority>,
    lifetime: Duration,
    spent: Mutex<bool>,
    renewals: AtomicU64,
    applied: watch::Sender<Option<(u64, u64)>>,
    update: watch::Sender<Option<Kind>>,
    stop: Shutdown,
}

fn federation() -> TrustDomain {
    "isthmus.example".parse().unwrap()
}

/// The fixture's federation with the CA's real bundle.
fn state(ca: &CertificateAuthority, revision: u64) -> GlobalSnapshot {
    let mut global = snapshot();
    global.stamp = stamp(1, revision);
    global.federation_bundle = ca.bundle();
    global
}

impl Agent {
    async fn start(lifetime: Duration) -> Self {
        isthmus_identity::install_crypto();
        let ca = Arc::new(CertificateAuthority::create(&federation(), Duration::from_secs(86_400)).unwrap());
        let key = KeyPair::generate().unwrap();
        let id = SpiffeId::component(&federation(), &"us-east".parse().unwrap(), "agent").unwrap();
        let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], Duration::from_secs(3600)).unwrap();
        let source = IdentitySource::new(Svid::new(chain, &key).unwrap());
        let trust = TrustStore::new();
        trust.set([(federation(), vec![ca.root_der().clone()])].into());
        let policy = ClientAuth::Optional(Arc::new(|id| id.segments().eq(["cluster", "us-east", "dns"])));
        let tls = Arc::new(server_config(&source, &trust, policy, &[b"h2"]).unwrap());

        let tasks = Tasks::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let incoming = TlsIncoming::new(listener, tls);
        let address = incoming.local_addr().unwrap();
        let shared = Arc::new(Shared {
            ca: ca.clone(),
            lifetime,
            spent: Mutex::new(false),
            renewals: AtomicU64::new(0),
            applied: watch::Sender::new(None),
            update: watch::Sender::new(None),
            stop: tasks.shutdown(),
        });
        let service = LocalServer::from_arc(shared.clone());
        let stop = tasks.shutdown();
        tasks.spawn("agent", async move {
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming_shutdown(incoming, async move { stop.requested().await }).await.unwrap();
        });
        Self { ca, address, shared, tasks }
    }

    fn token(&self, subject: &str) -> String {
        let spec = TokenSpec {
            kind: TokenKind::Local,
            address: self.address.to_string(),
            ca_pin: self.ca.root_sha256(),
            cluster: "us-east".parse().unwrap(),
            subject: subject.into(),
            expires_at: Timestamp(isthmus_runtime::now() + 60_000),
        };
        let mut token = Token::mint(spec);
        token.secret = SECRET.into();
        token.encode()
    }

    fn publish(&self, revision: u64) {
        self.shared.update.send_replace(Some(Kind::Config(config(&state(&self.ca, revision)))));
    }

    async fn wait_applied(&self, revision: u64) {
        let mut applied = self.shared.applied.subscribe();
        timeout(DEADLINE, applied.wait_for(|a| *a == Some((1, revision)))).await.expect("applied").unwrap();
    }

    async fn stop(self) {
        self.tasks.run_until(async {}, Duration::from_secs(5)).await.unwrap();
    }
}

#[tonic::async_trait]
impl Local for Shared {
    type GatewayFeedStream = Updates<GatewayUpdate>;
    type DnsFeedStream = Updates<DnsUpdate>;
    type SidecarFeedStream = Updates<SidecarUpdate>;

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        let request = request.into_inner();
        let mut spent = self.spent.lock().unwrap();
        if request.secret != SECRET || *spent {
            return Err(Status::permission_denied("the token was used already"));
        }
        *spent = true;
        Ok(Response::new(self.certificate(&request.csr)))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<EnrolResponse>, Status> {
        let peer = request.extensions().get::<PeerInfo>().and_then(|p| p.id.clone());
        if peer.is_none() {
            return Err(Status::unauthenticated("no certificate"));
        }
        self.renewals.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(self.certificate(&request.into_inner().csr)))
    }

    async fn dns_feed(&self, request: Request<Streaming<DnsMessage>>) -> Result<Response<Self::DnsFeedStream>, Status> {
        if request.extensions().get::<PeerInfo>().and_then(|p| p.id.as_ref()).is_none() {
            return Err(Status::unauthenticated("no certificate"));
        }
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|m| m.kind);
        assert!(matches!(first, Some(dns_message::Kind::Hello(h)) if h.name == "dns-1"));
        let applied = self.applied.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                let Some(dns_message::Kind::Applied(at)) = message.kind else { continue };
                applied.send_replace(Some((at.epoch, at.revision)));
            }
        });
        let (mut update, stop) = (self.update.subscribe(), self.stop.clone());
        update.mark_changed();
        let updates = futures_util::stream::unfold((update, stop), |(mut update, stop)| async move {
            loop {
                tokio::select! {
                    changed = update.changed() => changed.ok()?,
                    () = stop.requested() => return None,
                }
                let kind = update.borrow_and_update().clone();
                if kind.is_some() {
                    return Some((Ok(DnsUpdate { kind }), (update, stop)));
                }
            }
        });
        Ok(Response::new(Box::pin(updates)))
    }

    async fn gateway_feed(
        &self,
        _: Request<Streaming<GatewayMessage>>,
    ) -> Result<Response<Self::GatewayFeedStream>, Status> {
        Err(Status::unimplemented("no gateways here"))
    }

    async fn sidecar_feed(
        &self,
        _: Request<Streaming<SidecarMessage>>,
    ) -> Result<Response<Self::SidecarFeedStream>, Status> {
        Err(Status::unimplemented("no sidecars here"))
    }
}

impl Shared {
    fn certificate(&self, csr: &[u8]) -> EnrolResponse {
        let id = SpiffeId::component(&federation(), &"us-east".parse().unwrap(), "dns").unwrap();
        let chain = self.ca.sign_csr(csr, &id, &[], self.lifetime).unwrap();
        EnrolResponse {
            certificate_chain: chain.iter().map(|c| c.to_vec()).collect(),
            cluster: "us-east".into(),
            federation: federation().to_string(),
            federation_bundle: Some((&self.ca.bundle()).into()),
            name: "dns-1".into(),
        }
    }
}

/// A running server.
struct Running {
    dns: SocketAddr,
    health: SocketAddr,
    stop: tokio::sync::oneshot::Sender<()>,
    done: tokio::task::JoinHandle<()>,
}

async fn bind(dir: &Path, token: Option<String>) -> Result<Bound, BuildError> {
    let token_file = token.map(|text| {
        let path = dir.join("token");
        std::fs::write(&path, text).unwrap();
        path
    });
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    crate::build(Config {
        name: "dns-1".into(),
        state_dir: dir.join("state"),
        agent_token_file: token_file,
        listen: Listen { dns: any, health: any },
        upstreams: Vec::new(),
        telemetry: Default::default(),
    })
    .await
}

async fn start(dir: &Path, token: Option<String>) -> Running {
    let bound = bind(dir, token).await.unwrap();
    let (dns, health) = (bound.dns_addr(), bound.health_addr());
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let run = bound.run_until(async move { drop(stopped.await) });
    let done = tokio::spawn(async move { run.await.unwrap() });
    Running { dns, health, stop, done }
}

impl Running {
    async fn stop(self) {
        self.stop.send(()).unwrap();
        timeout(DEADLINE, self.done).await.expect("drained").unwrap();
    }

    async fn http(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.health).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        (text.split(' ').nth(1).unwrap().parse().unwrap(), text)
    }

    async fn wait_ready(&self) {
        wait_for("ready", DEADLINE, async || self.http("/readyz").await.0 == 200).await.unwrap();
    }

    async fn ask(&self, name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(1, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(&message.to_vec().unwrap(), self.dns).await.unwrap();
        let mut buffer = [0; 4096];
        let length = timeout(DEADLINE, socket.recv(&mut buffer)).await.expect("an answer").unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    async fn cart(&self) -> Vec<String> {
        let answer = self.ask("cart.shop.svc.clusterset.local.", RecordType::A).await;
        answer.answers.iter().map(|r| r.data.to_string()).collect()
    }
}

const MONTH: Duration = Duration::from_secs(30 * 86_400);

#[tokio::test]
async fn a_token_leads_to_a_zone_and_each_revision_is_acknowledged() {
    let (agent, dir) = (Agent::start(MONTH).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    let early = server.ask("cart.shop.svc.clusterset.local.", RecordType::A).await;
    assert_eq!(early.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(server.http("/readyz").await.0, 503);

    agent.publish(7);
    agent.wait_applied(7).await;
    server.wait_ready().await;
    assert_eq!(server.cart().await, ["127.64.0.5"]);
    agent.publish(8);
    agent.wait_applied(8).await;

    let (_, metrics) = server.http("/metrics").await;
    for want in ["isthmus_dns_revision 8", "isthmus_dns_zone_names 3", "isthmus_dns_agent_connected 1"] {
        assert!(metrics.contains(want), "{want} is missing in {metrics}");
    }
    assert!(!metrics.contains("isthmus_dns_svid_expiry_timestamp_seconds 0"));
    server.stop().await;
    agent.stop().await;
}

#[tokio::test]
async fn a_restart_without_any_agent_serves_last_known_good() {
    let (agent, dir) = (Agent::start(MONTH).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    agent.publish(7);
    agent.wait_applied(7).await;
    server.stop().await;
    agent.stop().await;

    let server = start(dir.path(), None).await;
    server.wait_ready().await;
    assert_eq!(server.cart().await, ["127.64.0.5"]);
    server.stop().await;
}

#[tokio::test]
async fn what_is_saved_takes_no_revocation_back_either() {
    let (agent, dir) = (Agent::start(MONTH).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    let west = "us-west".parse().unwrap();
    let mut revoked = state(&agent.ca, 7);
    revoked.clusters.get_mut(&west).unwrap().state = ClusterState::Revoked;
    agent.shared.update.send_replace(Some(Kind::Config(config(&revoked))));
    agent.wait_applied(7).await;
    agent.publish(8);
    agent.wait_applied(8).await;
    assert!(server.http("/metrics").await.1.contains(r#"isthmus_dns_updates_refused_total{reason="revocation"} 1"#));
    server.stop().await;
    agent.stop().await;

    let saved = LastKnownGood::new(dir.path().join("state/dns.lkg"), LKG_FORMAT).load().unwrap().unwrap();
    let saved = DnsConfig::decode(saved.as_slice()).unwrap();
    assert_eq!(saved.vip_range, config(&revoked).vip_range);
    let global = GlobalSnapshot::try_from(saved.global.unwrap()).unwrap();
    assert_eq!(global.stamp, stamp(1, 8));
    assert!(global.active_cluster(&west).is_none());
}

#[tokio::test]
async fn losing_the_agent_changes_no_answer() {
    let (agent, dir) = (Agent::start(MONTH).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    agent.publish(7);
    agent.wait_applied(7).await;
    agent.stop().await;
    let lost = async || server.http("/metrics").await.1.contains("isthmus_dns_agent_connected 0");
    wait_for("the loss of the agent", DEADLINE, lost).await.unwrap();
    assert_eq!(server.cart().await, ["127.64.0.5"]);
    assert_eq!(server.http("/readyz").await.0, 200);
    server.stop().await;
}

#[tokio::test]
async fn a_stale_update_is_refused_and_counted() {
    let (agent, dir) = (Agent::start(MONTH).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    agent.publish(7);
    agent.wait_applied(7).await;
    agent.publish(6);
    let refused =
        async || server.http("/metrics").await.1.contains(r#"isthmus_dns_updates_refused_total{reason="stale"} 1"#);
    wait_for("the refusal", DEADLINE, refused).await.unwrap();
    assert!(server.http("/metrics").await.1.contains("isthmus_dns_revision 7"));
    server.stop().await;
    agent.stop().await;
}

#[tokio::test]
async fn availability_shows_under_failover() {
    let (agent, dir) = (Agent::start(MONTH).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    agent.publish(7);
    agent.wait_applied(7).await;
    let report = |cluster: &str, ready| Report {
        service: "shop/cart".parse().unwrap(),
        cluster: cluster.parse().unwrap(),
        current: Availability { ready, total: 1, reachable: true },
        recovered_at: None,
    };
    let availability = vec![report("us-east", 0), report("us-west", 1), report("eu-central", 1)];
    let report = AvailabilityReport { availability, tunnels: Vec::new() };
    agent.shared.update.send_replace(Some(Kind::Availability((&report).into())));
    let first = async || {
        let answer = server.ask("_failover.cart.shop.svc.clusterset.local.", RecordType::TXT).await;
        answer.answers.first().is_some_and(|r| r.data.to_string().starts_with("1 us-west ready"))
    };
    wait_for("us-west to come first", DEADLINE, first).await.unwrap();
    server.stop().await;
    agent.stop().await;
}

#[tokio::test]
async fn a_certificate_is_renewed_before_it_ends() {
    let (agent, dir) = (Agent::start(Duration::from_secs(3)).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    agent.publish(7);
    agent.wait_applied(7).await;
    let renewed = async || agent.shared.renewals.load(Ordering::SeqCst) > 0;
    wait_for("a renewal", DEADLINE, renewed).await.unwrap();
    server.stop().await;
    agent.stop().await;
}

#[tokio::test]
async fn a_used_token_ends_the_server_with_the_agents_words_and_the_remedy() {
    let (agent, dir) = (Agent::start(MONTH).await, tempfile::tempdir().unwrap());
    *agent.shared.spent.lock().unwrap() = true;
    let bound = bind(dir.path(), Some(agent.token("dns/dns-1"))).await.unwrap();
    let ended = timeout(DEADLINE, bound.run_until(std::future::pending())).await.unwrap();
    let text = chain(&ended.unwrap_err());
    assert!(text.contains("used already") && text.contains("isthmus-agent token dns dns-1"), "{text}");
    agent.stop().await;
}

#[tokio::test]
async fn a_certificate_that_has_ended_changes_no_answer_and_a_new_token_brings_the_feed_back() {
    let (agent, dir) = (Agent::start(Duration::from_secs(3)).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    agent.publish(7);
    agent.wait_applied(7).await;
    server.stop().await;
    let state = dir.path().join("state");
    let ended = async || Svid::load(&state, "dns").unwrap().unwrap().not_after().0 < isthmus_runtime::now();
    wait_for("the certificate to end", DEADLINE, ended).await.unwrap();
    *agent.shared.spent.lock().unwrap() = false;
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    server.wait_ready().await;
    assert_eq!(server.cart().await, ["127.64.0.5"]);
    agent.publish(8);
    agent.wait_applied(8).await;
    server.stop().await;
    agent.stop().await;
}

#[tokio::test]
async fn a_first_start_without_a_usable_token_says_what_to_do() {
    let agent = Agent::start(MONTH).await;
    let cases = [
        (None, "isthmus-agent token dns dns-1"),
        (Some("garbage".to_owned()), "agentTokenFile"),
        (Some(agent.token("dns/other")), "dns/other"),
        (Some(agent.token("gateway/dns-1")), "gateway/dns-1"),
    ];
    for (token, want) in cases {
        let dir = tempfile::tempdir().unwrap();
        let error = bind(dir.path(), token).await.err().unwrap();
        let text = chain(&error);
        assert!(text.contains(want), "{want} is missing in: {text}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn damaged_last_known_good_is_told_and_fetched_again() {
    let (agent, dir) = (Agent::start(MONTH).await, tempfile::tempdir().unwrap());
    let server = start(dir.path(), Some(agent.token("dns/dns-1"))).await;
    agent.publish(7);
    agent.wait_applied(7).await;
    server.stop().await;
    std::fs::write(dir.path().join("state/dns.lkg"), "damaged").unwrap();
    let server = start(dir.path(), None).await;
    server.wait_ready().await;
    assert_eq!(server.cart().await, ["127.64.0.5"]);
    server.stop().await;
    agent.stop().await;
}

#[test]
fn the_fixtures_bundle_is_accepted_as_its_own_successor() {
    let bundle = bundle("isthmus.example");
    assert!(isthmus_identity::bundle::verify_successor(&bundle, &bundle).is_ok());
}
