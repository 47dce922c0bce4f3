//! The agent's feed, against a server that speaks the agent's part: enrolment, state, acknowledgements, restart from disk.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use isthmus_api::proto::local::v1::{
    DnsMessage, DnsUpdate, EnrolRequest, EnrolResponse, GatewayMessage, GatewayUpdate,
    LocalEndpoints as EndpointsMessage, RenewRequest, SidecarMessage, SidecarUpdate,
    gateway_message::Kind as Up,
    gateway_update::Kind as Down,
    local_server::{Local, LocalServer},
};
use isthmus_identity::{
    grpc::TlsIncoming,
    keys::KeyPair,
    svid::Svid,
    tls::{self, ClientAuth, IdentitySource},
    token::{Token, TokenKind, TokenSpec},
};
use isthmus_model::{
    global::{ClusterState, GlobalSnapshot},
    ids::{Epoch, Revision, SpiffeId},
    service::GatewayAddress,
    time::Timestamp,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming, transport};

use super::rig::{Gateway, Server, ca, config, eligibility, knock, local, next, read, sni, trust, until};
use crate::{
    Bound, Config, Feed, Inspector, build, take_over,
    testkit::{FEDERATION, cluster, federation, service_name},
};

const DAY: Duration = Duration::from_secs(86_400);

/// What the server was told, and the way down of the latest feed.
#[derive(Default)]
struct Told {
    enrolled: usize,
    messages: Vec<Up>,
    down: Option<mpsc::Sender<Result<GatewayUpdate, Status>>>,
}

#[derive(Clone, Default)]
struct Agent {
    told: Arc<Mutex<Told>>,
    secret: String,
}

fn sign(role: &str, csr: &[u8]) -> Vec<Vec<u8>> {
    let id = SpiffeId::component(&FEDERATION.parse().unwrap(), &cluster("east"), role).unwrap();
    ca().sign_csr(csr, &id, &[], DAY).unwrap().iter().map(|c| c.to_vec()).collect()
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
            return Err(Status::unauthenticated("the token was used already"));
        }
        self.told.lock().unwrap().enrolled += 1;
        Ok(Response::new(EnrolResponse {
            certificate_chain: sign("gateway", &request.csr),
            cluster: "east".into(),
            federation: FEDERATION.into(),
            federation_bundle: Some((&ca().bundle()).into()),
            name: "gateway-1".into(),
        }))
    }

    async fn renew(&self, _: Request<RenewRequest>) -> Result<Response<EnrolResponse>, Status> {
        Err(Status::unavailable("not needed"))
    }

    async fn gateway_feed(
        &self,
        request: Request<Streaming<GatewayMessage>>,
    ) -> Result<Response<Self::GatewayFeedStream>, Status> {
        let (down, stream) = mpsc::channel(8);
        self.told.lock().unwrap().down = Some(down);
        let (told, mut up) = (self.told.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Some(Ok(message)) = up.next().await {
                told.lock().unwrap().messages.extend(message.kind);
            }
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

impl Agent {
    /// Serves until aborted; the token admits `gateway-1`.
    async fn serve() -> (Self, Token, JoinHandle<()>) {
        isthmus_identity::install_crypto();
        let key = KeyPair::generate().unwrap();
        let chain = sign("agent", &key.csr_der().unwrap()).into_iter().map(Into::into).collect();
        let source = IdentitySource::new(Svid::new(chain, &key).unwrap());
        let tls = tls::server_config(&source, &trust(), ClientAuth::Optional(Arc::new(|_| true)), &[b"h2"]).unwrap();
        let listener = TcpListener::bind(local(0)).await.unwrap();
        let token = Token::mint(TokenSpec {
            kind: TokenKind::Local,
            address: listener.local_addr().unwrap().to_string(),
            ca_pin: ca().root_sha256(),
            cluster: cluster("east"),
            subject: "gateway/gateway-1".to_owned(),
            expires_at: Timestamp(isthmus_runtime::now() + 60_000),
        });
        let agent = Self { secret: token.secret.clone(), ..Self::default() };
        let server = transport::Server::builder().add_service(LocalServer::new(agent.clone()));
        let incoming = TlsIncoming::new(listener, Arc::new(tls));
        let task = tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        (agent, token, task)
    }

    async fn send(&self, kind: Down) {
        until("the feed is connected", || self.told.lock().unwrap().down.is_some()).await;
        let down = self.told.lock().unwrap().down.clone().unwrap();
        down.send(Ok(GatewayUpdate { kind: Some(kind) })).await.unwrap();
    }

    async fn send_global(&self, global: &GlobalSnapshot) {
        self.send(Down::Global(global.into())).await;
    }

    async fn hears(&self, what: &str, wanted: impl Fn(&Up) -> bool) {
        until(what, || self.told.lock().unwrap().messages.iter().any(&wanted)).await;
    }
}

/// A gateway that lives in `dir` and is fed by its agent.
struct Fed {
    inspector: Inspector,
    health: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), crate::RunError>>,
}

impl Fed {
    async fn start(dir: &Path, token: &Token) -> Self {
        Self::start_at(dir, token, 0).await
    }

    async fn start_at(dir: &Path, token: &Token, pinned_port_base: u16) -> Self {
        std::fs::write(dir.join("token"), token.encode()).unwrap();
        Self::run(build(Self::config(dir, pinned_port_base), Feed::Agent).await.unwrap())
    }

    /// One that takes over from the one that lives in `dir`.
    async fn succeed(dir: &Path) -> Self {
        Self::run(take_over(Self::config(dir, 0), Feed::Agent).await.unwrap())
    }

    fn config(dir: &Path, pinned_port_base: u16) -> Config {
        let mut config = config("gateway-1");
        config.state_dir = dir.join("state");
        config.agent_token_file = Some(dir.join("token"));
        config.listen.pinned_port_base = pinned_port_base;
        config
    }

    fn run(bound: Bound) -> Self {
        let (inspector, health) = (bound.inspector(), bound.health_addr());
        let (stop, stopped) = oneshot::channel();
        let ended = tokio::spawn(bound.run(async move { drop(stopped.await) }));
        Self { inspector, health, stop, ended }
    }

    /// The health server's answer to `path`.
    async fn get(&self, path: &str) -> String {
        let mut tcp = tokio::net::TcpStream::connect(self.health).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn becomes_ready(&self) {
        let ready = async || self.get("/readyz").await.starts_with("HTTP/1.1 200");
        isthmus_runtime::wait::wait_for("ready", super::rig::SOON, ready).await.unwrap();
    }

    async fn end(self) {
        self.stop.send(()).unwrap();
        self.ended.await.unwrap().unwrap();
    }
}

fn state() -> GlobalSnapshot {
    let mut global = federation(&["east", "west"]);
    global.federation_bundle = ca().bundle();
    // One bundle each, as trust domains have one owner; these are never read by a gateway.
    global
}

fn applied(global: &GlobalSnapshot) -> impl Fn(&Up) -> bool + use<> {
    let stamp = isthmus_api::proto::common::v1::Stamp::from(global.stamp);
    move |up| matches!(up, Up::Applied(s) if *s == stamp)
}

#[tokio::test]
async fn a_gateway_enrols_once_follows_its_agent_and_restarts_from_disk_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, token, serving) = Agent::serve().await;
    let gateway = Fed::start(dir.path(), &token).await;
    assert!(gateway.get("/readyz").await.starts_with("HTTP/1.1 503"), "not ready before the first state");
    let global = state();
    agent.send_global(&global).await;
    agent.send(Down::Endpoints(EndpointsMessage::default())).await;
    agent.hears("the state is applied", applied(&global)).await;
    agent.hears("a report", |up| matches!(up, Up::Availability(_))).await;
    assert!(matches!(agent.told.lock().unwrap().messages.first(), Some(Up::Hello(h)) if h.name == "gateway-1"));
    gateway.becomes_ready().await;
    let candidates = gateway.get("/debug/candidates?service=shop/orders&port=80").await;
    assert!(candidates.contains("\"cluster\":\"west\""), "{candidates}");
    assert!(gateway.get("/debug/candidates?service=shop/nothing&port=80").await.starts_with("HTTP/1.1 404"));
    let metrics = gateway.get("/metrics").await;
    assert!(metrics.contains("isthmus_gateway_revision 1\n"), "{metrics}");

    gateway.end().await;
    agent.hears("it drains", |up| matches!(up, Up::Draining(_))).await;
    assert_eq!(agent.told.lock().unwrap().enrolled, 1);
    serving.abort();
    // No agent any more, and a used token: the disk is enough.
    let gateway = Fed::start(dir.path(), &token).await;
    gateway.becomes_ready().await;
    assert!(gateway.inspector.candidates(&service_name(), 80).is_some());
    gateway.end().await;
}

#[tokio::test]
async fn a_gateway_that_drains_tells_its_agent_before_it_closes_any_door() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, token, _serving) = Agent::serve().await;
    std::fs::write(dir.path().join("token"), token.encode()).unwrap();
    let mut config = Fed::config(dir.path(), 0);
    config.drain.accept_for = Duration::from_secs(2);
    let gateway = Fed::run(build(config, Feed::Agent).await.unwrap());
    let global = state();
    agent.send_global(&global).await;
    agent.hears("the state is applied", applied(&global)).await;
    gateway.becomes_ready().await;
    let core = gateway.inspector.core().unwrap();
    gateway.stop.send(()).unwrap();
    agent.hears("it drains", |up| matches!(up, Up::Draining(_))).await;
    assert!(core.draining.is_cancelled() && !core.closing.is_cancelled() && !core.doors.is_cancelled());
    drop(core);
    gateway.ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_older_or_foreign_state_is_refused_and_the_one_held_stands() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, token, _serving) = Agent::serve().await;
    let gateway = Fed::start(dir.path(), &token).await;
    let mut held = next(&state());
    held.stamp.revision = Revision(7);
    agent.send_global(&held).await;
    agent.hears("revision 7 is applied", applied(&held)).await;
    agent.send_global(&state()).await;
    let mut foreign = next(&held);
    foreign.federation = "other.example".parse().unwrap();
    foreign.federation_bundle.trust_domain = foreign.federation.clone();
    agent.send_global(&foreign).await;
    let refused = async || {
        let metrics = gateway.get("/metrics").await;
        metrics.contains("feed_problems_total{reason=\"stale\"} 1")
            && metrics.contains("reason=\"other_federation\"} 1")
    };
    isthmus_runtime::wait::wait_for("both are refused", super::rig::SOON, refused).await.unwrap();
    assert!(gateway.get("/metrics").await.contains("isthmus_gateway_revision 7\n"));
    gateway.end().await;
}

#[tokio::test]
async fn a_token_that_was_used_stops_the_gateway_with_the_agents_words() {
    let dir = tempfile::tempdir().unwrap();
    let (_agent, mut token, _serving) = Agent::serve().await;
    token.secret = "used".to_owned();
    let gateway = Fed::start(dir.path(), &token).await;
    let error = gateway.ended.await.unwrap().unwrap_err();
    let text = isthmus_runtime::tasks::chain(&error);
    assert!(text.contains("refused to enrol") && text.contains("the token was used already"), "{text}");
}

#[tokio::test]
async fn a_token_for_another_gateway_is_not_even_sent() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, mut token, _serving) = Agent::serve().await;
    token.subject = "gateway/gateway-2".to_owned();
    let gateway = Fed::start(dir.path(), &token).await;
    let text = isthmus_runtime::tasks::chain(&gateway.ended.await.unwrap().unwrap_err());
    assert!(text.contains("gateway/gateway-2"), "{text}");
    assert_eq!(agent.told.lock().unwrap().enrolled, 0);
}

#[tokio::test]
async fn a_state_is_not_applied_while_one_of_its_ports_is_taken_and_the_agent_is_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, token, _serving) = Agent::serve().await;
    let taken = TcpListener::bind(local(0)).await.unwrap();
    let global = state();
    let port = taken.local_addr().unwrap().port();
    let base = port - global.clusters[&cluster("west")].index.0;
    let gateway = Fed::start_at(dir.path(), &token, base).await;
    agent.send_global(&global).await;
    let told = |up: &Up| matches!(up, Up::Problems(p) if p.texts.iter().any(|t| t.contains(&format!(":{port}"))));
    agent.hears("which port is taken", told).await;
    gateway.becomes_ready().await;
    assert!(!agent.told.lock().unwrap().messages.iter().any(applied(&global)));
    assert!(gateway.get("/metrics").await.contains("isthmus_gateway_revision 0\n"));
    drop(taken);
    agent.hears("the state is applied", applied(&global)).await;
    let last = || agent.told.lock().unwrap().messages.iter().rev().find(|up| matches!(up, Up::Problems(_))).cloned();
    until("nothing is wrong any more", || matches!(last(), Some(Up::Problems(p)) if p.texts.is_empty())).await;
    gateway.end().await;
}

#[tokio::test]
async fn a_revoked_cluster_stays_revoked_in_a_new_epoch_and_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, token, serving) = Agent::serve().await;
    let gateway = Fed::start(dir.path(), &token).await;
    let mut revoked = state();
    revoked.clusters.get_mut(&cluster("west")).unwrap().state = ClusterState::Revoked;
    agent.send_global(&revoked).await;
    agent.hears("the revocation is applied", applied(&revoked)).await;
    let mut restored = next(&state());
    restored.stamp.epoch = Epoch(2);
    agent.send_global(&restored).await;
    agent.hears("the new epoch is applied", applied(&restored)).await;
    let told = |up: &Up| matches!(up, Up::Problems(p) if p.texts.iter().any(|t| t.contains("revocation of west")));
    agent.hears("the revocation stands", told).await;
    assert!(gateway.inspector.pinned().is_empty());
    gateway.end().await;
    serving.abort();
    let gateway = Fed::start(dir.path(), &token).await;
    gateway.becomes_ready().await;
    let view = gateway.inspector.core().unwrap().current_view();
    assert_eq!(view.global.as_ref().unwrap().stamp, restored.stamp);
    assert!(view.is_active(&cluster("east")) && !view.is_active(&cluster("west")));
    gateway.end().await;
}

#[tokio::test]
async fn a_restart_does_not_end_a_hold_down() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, token, serving) = Agent::serve().await;
    let west = Gateway::start("west").await;
    let mut global = state();
    global.settings.failover.hold_down = Duration::from_secs(3_600);
    global.clusters.get_mut(&cluster("west")).unwrap().gateways =
        vec![GatewayAddress { name: "gateway-1".to_owned(), tunnel: Some(west.tunnel) }];
    west.set_global(&global);
    west.set_endpoints(&[local(1)]);
    let gateway = Fed::start(dir.path(), &token).await;
    agent.send_global(&global).await;
    let sees = async |gateway: &Fed, state: &str| {
        let sees = || eligibility(&gateway.inspector, "west").as_deref() == Some(state);
        until(&format!("west: {state}"), sees).await;
    };
    sees(&gateway, "ready").await;
    west.set_endpoints(&[]);
    sees(&gateway, "noEndpoints").await;
    west.set_endpoints(&[local(1)]);
    sees(&gateway, "holdDown").await;
    gateway.end().await;
    serving.abort();
    let gateway = Fed::start(dir.path(), &token).await;
    let known = || eligibility(&gateway.inspector, "west").filter(|state| state != "unknown");
    until("west is reached", || known().is_some_and(|state| state != "unreachable")).await;
    assert_eq!(known().as_deref(), Some("holdDown"));
    gateway.end().await;
}

#[tokio::test]
async fn an_upgrade_is_no_leaving_to_the_agent_and_a_revocation_reaches_what_the_predecessor_still_carries() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, token, _serving) = Agent::serve().await;
    let (west, orders) = (Gateway::start("west").await, Server::bind().await);
    let mut global = state();
    let address = GatewayAddress { name: "gateway-1".to_owned(), tunnel: Some(west.tunnel) };
    global.clusters.get_mut(&cluster("west")).unwrap().gateways = vec![address];
    west.set_global(&global);
    west.set_endpoints(&[orders.address]);
    let before = Fed::start(dir.path(), &token).await;
    agent.send_global(&global).await;
    until("west is ready", || eligibility(&before.inspector, "west").as_deref() == Some("ready")).await;
    let mut client = knock(before.inspector.pinned()[&cluster("west")], &sni(Some("west"))).await;
    let mut served = orders.greet(b"hi").await;
    read(&mut client, 2).await;
    let saved = || dir.path().join("state/global.lkg").exists();
    until("the state is on disk", saved).await;

    let after = Fed::succeed(dir.path()).await;
    let hellos = || agent.told.lock().unwrap().messages.iter().filter(|up| matches!(up, Up::Hello(_))).count();
    until("the successor says hello", || hellos() == 2).await;
    let core = before.inspector.core().unwrap();
    until("the predecessor ends its feed", || core.steps.feed_over.is_cancelled()).await;
    after.becomes_ready().await;
    client.write_all(b"still").await.unwrap();
    assert_eq!(read(&mut served, 5).await, b"still");

    let mut revoked = next(&global);
    revoked.clusters.get_mut(&cluster("west")).unwrap().state = ClusterState::Revoked;
    agent.send_global(&revoked).await;
    agent.hears("the successor applies it", applied(&revoked)).await;
    let cut = tokio::time::timeout(Duration::from_secs(1), client.read(&mut [0; 1])).await;
    assert!(cut.expect("within a second").is_err(), "what the predecessor carries is cut");
    before.ended.await.unwrap().unwrap();
    assert!(!agent.told.lock().unwrap().messages.iter().any(|up| matches!(up, Up::Draining(_))));
    assert_eq!(hellos(), 2);
    assert_eq!(agent.told.lock().unwrap().enrolled, 1);
    after.end().await;
}
