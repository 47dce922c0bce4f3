use std::{path::Path, pin::Pin};

use futures_util::Stream;
use isthmus_api::proto::local::v1::{
    DnsMessage, DnsUpdate, EnrolRequest, EnrolResponse, GatewayMessage, GatewayUpdate, SidecarMessage, SidecarUpdate,
    local_server::{Local, LocalServer},
};
use isthmus_runtime::{
    tasks::{Shutdown, Tasks},
    wait::wait_for,
};
use tokio::{net::TcpListener, time::timeout};
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::{
    ca::CertificateAuthority,
    grpc::{PeerInfo, TlsIncoming},
    testkit::*,
    tls::{ClientAuth, server_config},
    token::{Token, TokenKind, TokenSpec},
};

const FEDERATION: &str = "isthmus.example";
const GATEWAY: &str = "spiffe://isthmus.example/cluster/east/gateway";

type Updates<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the agent of a test does.
struct Script {
    ca: CertificateAuthority,
    /// Whom certificates are for.
    id: String,
    lifetime: Duration,
    bundle: Mutex<TrustBundle>,
    secrets: Mutex<Vec<String>>,
}

struct Agent {
    script: Arc<Script>,
    address: String,
    stop: Shutdown,
    tasks: Tasks,
}

impl Agent {
    async fn start(id: &str, lifetime: Duration) -> Self {
        crate::install_crypto();
        let ca = ca(FEDERATION);
        let tls =
            server_config(&source(&ca, "cluster/east/agent"), &store(&[&ca]), ClientAuth::Optional(anyone()), &[b"h2"]);
        let incoming = TlsIncoming::new(TcpListener::bind("127.0.0.1:0").await.unwrap(), Arc::new(tls.unwrap()));
        let address = incoming.local_addr().unwrap().to_string();
        let (bundle, secrets) = (Mutex::new(ca.bundle()), Mutex::default());
        let script = Arc::new(Script { ca, id: id.to_owned(), lifetime, bundle, secrets });
        let (tasks, stop, over) = (Tasks::new(), Shutdown::new(), script.clone());
        let ended = stop.clone();
        tasks.spawn("agent", async move {
            let server = tonic::transport::Server::builder().add_service(LocalServer::from_arc(over));
            server.serve_with_incoming_shutdown(incoming, async move { ended.requested().await }).await.unwrap();
        });
        Self { script, address, stop, tasks }
    }

    /// Puts a good token for `subject` into `dir`.
    fn token(&self, subject: &str, dir: &Path) -> Token {
        let token = Token::mint(TokenSpec {
            kind: TokenKind::Local,
            address: self.address.clone(),
            ca_pin: self.script.ca.root_sha256(),
            cluster: "east".parse().unwrap(),
            subject: subject.into(),
            expires_at: now() + DEADLINE,
        });
        self.script.secrets.lock().unwrap().push(token.secret.clone());
        fs::write(dir.join("token"), token.encode()).unwrap();
        token
    }

    async fn end(self) {
        self.stop.request();
        self.tasks.run_until(async {}, Duration::from_secs(5)).await.unwrap();
    }
}

impl Script {
    fn sign(&self, csr: &[u8], name: &str) -> Response<EnrolResponse> {
        let chain = self.ca.sign_csr(csr, &id(&self.id), &[], self.lifetime).unwrap();
        Response::new(EnrolResponse {
            certificate_chain: chain.iter().map(|c| c.to_vec()).collect(),
            cluster: "east".into(),
            federation: FEDERATION.into(),
            federation_bundle: Some((&*self.bundle.lock().unwrap()).into()),
            name: name.into(),
        })
    }
}

#[tonic::async_trait]
impl Local for Script {
    type GatewayFeedStream = Updates<GatewayUpdate>;
    type DnsFeedStream = Updates<DnsUpdate>;
    type SidecarFeedStream = Updates<SidecarUpdate>;

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        let request = request.into_inner();
        let mut secrets = self.secrets.lock().unwrap();
        let Some(place) = secrets.iter().position(|s| *s == request.secret) else {
            return Err(Status::permission_denied("the token was already used"));
        };
        secrets.remove(place);
        Ok(self.sign(&request.csr, "gw"))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<EnrolResponse>, Status> {
        let peer = request.extensions().get::<PeerInfo>().and_then(|p| p.id.clone());
        assert_eq!(peer, Some(id(&self.id)));
        Ok(self.sign(&request.into_inner().csr, ""))
    }

    async fn gateway_feed(
        &self,
        _: Request<Streaming<GatewayMessage>>,
    ) -> Result<Response<Self::GatewayFeedStream>, Status> {
        Err(Status::unimplemented("no feeds here"))
    }

    async fn dns_feed(&self, _: Request<Streaming<DnsMessage>>) -> Result<Response<Self::DnsFeedStream>, Status> {
        Err(Status::unimplemented("no feeds here"))
    }

    async fn sidecar_feed(
        &self,
        _: Request<Streaming<SidecarMessage>>,
    ) -> Result<Response<Self::SidecarFeedStream>, Status> {
        Err(Status::unimplemented("no feeds here"))
    }
}

fn gateway(dir: &Path) -> Newcomer {
    let subject = Subject::Gateway("gw".into());
    Newcomer { subject, state_dir: dir.join("state"), token_file: Some(dir.join("token")) }
}

async fn obtained(dir: &Path) -> Result<Member, EnrolError> {
    timeout(DEADLINE, gateway(dir).obtain()).await.unwrap()
}

#[tokio::test]
async fn a_token_leads_to_a_membership_that_a_restart_finds_without_agent_and_token() {
    let (agent, dir) = (Agent::start(GATEWAY, DAY).await, tempfile::tempdir().unwrap());
    agent.token("gateway/gw", dir.path());
    let member = obtained(dir.path()).await.unwrap();
    agent.end().await;
    fs::remove_file(dir.path().join("token")).unwrap();
    let again = obtained(dir.path()).await.unwrap();
    assert_eq!(again.record(), member.record());
    assert_eq!(again.source().current().chain(), member.source().current().chain());
    assert!(again.trust().get().contains_key(&domain(FEDERATION)));
}

#[tokio::test]
async fn tokens_that_cannot_work_are_told_with_the_remedy() {
    let (agent, dir) = (Agent::start(GATEWAY, DAY).await, tempfile::tempdir().unwrap());
    let mut token = agent.token("gateway/gw", dir.path());
    token.expires_at = Timestamp(1);
    let expired = token.encode();
    token.expires_at = now() + DEADLINE;
    token.secret = "used".into();
    let used = token.encode();
    let (other, foreign) = (agent.token("gateway/other", dir.path()), agent.token("dns/gw", dir.path()));
    let texts = [
        ("garbage", "not an Isthmus token"),
        (&expired, "expired"),
        (&used, "already used"),
        (&other.encode(), "gateway/other"),
        (&foreign.encode(), "dns/gw"),
    ];
    for (text, want) in texts {
        fs::write(dir.path().join("token"), text).unwrap();
        let error = chain(&obtained(dir.path()).await.unwrap_err());
        assert!(error.contains(want) && error.contains("isthmus-agent token gateway gw"), "{want}: {error}");
    }
    fs::remove_file(dir.path().join("token")).unwrap();
    assert!(matches!(obtained(dir.path()).await, Err(EnrolError::ReadToken { .. })));
    let bare = Newcomer { token_file: None, ..gateway(dir.path()) };
    assert!(matches!(bare.obtain().await, Err(EnrolError::NoToken { .. })));
    agent.end().await;
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_to_costs_no_token() {
    let (agent, dir) = (Agent::start(GATEWAY, DAY).await, tempfile::tempdir().unwrap());
    agent.token("gateway/gw", dir.path());
    // A file where the folder should be: even root cannot write below it.
    let blocked = dir.path().join("file");
    fs::write(&blocked, "").unwrap();
    let newcomer = Newcomer { state_dir: blocked.join("state"), ..gateway(dir.path()) };
    let error = chain(&timeout(DEADLINE, newcomer.enrol()).await.unwrap().unwrap_err());
    assert!(error.contains("stateDir") && error.contains("file"), "{error}");
    assert_eq!(agent.script.secrets.lock().unwrap().len(), 1, "the token was spent");
    assert!(timeout(DEADLINE, gateway(dir.path()).enrol()).await.unwrap().is_ok());
    assert!(!dir.path().join("state").join(PROBE).exists());
    agent.end().await;
}

#[tokio::test]
async fn an_agent_that_is_away_is_asked_again() {
    let (agent, dir) = (Agent::start(GATEWAY, DAY).await, tempfile::tempdir().unwrap());
    let mut token = agent.token("gateway/gw", dir.path());
    let real = token.address.clone();
    token.address = "127.0.0.1:1".into();
    fs::write(dir.path().join("token"), token.encode()).unwrap();
    assert!(gateway(dir.path()).enrol_once().await.unwrap_err().is_passing());
    let path = dir.path().to_owned();
    let waiting = tokio::spawn(async move { obtained(&path).await });
    token.address = real;
    fs::write(dir.path().join("token"), token.encode()).unwrap();
    assert!(waiting.await.unwrap().is_ok());
    agent.end().await;
}

#[tokio::test]
async fn an_agent_with_another_ca_is_not_even_sent_the_secret() {
    let (agent, other) = (Agent::start(GATEWAY, DAY).await, Agent::start(GATEWAY, DAY).await);
    let dir = tempfile::tempdir().unwrap();
    let mut token = agent.token("gateway/gw", dir.path());
    token.address = other.address.clone();
    other.script.secrets.lock().unwrap().push(token.secret.clone());
    fs::write(dir.path().join("token"), token.encode()).unwrap();
    assert!(gateway(dir.path()).enrol_once().await.unwrap_err().is_passing());
    assert_eq!(other.script.secrets.lock().unwrap().len(), 1);
    agent.end().await;
    other.end().await;
}

#[tokio::test]
async fn an_answer_for_someone_else_is_refused_and_leaves_nothing_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    for id in ["spiffe://isthmus.example/cluster/east/dns", "spiffe://isthmus.example/cluster/west/gateway"] {
        let agent = Agent::start(id, DAY).await;
        agent.token("gateway/gw", dir.path());
        assert!(matches!(obtained(dir.path()).await, Err(EnrolError::Answer(_))), "{id}");
        agent.end().await;
    }
    let agent = Agent::start(GATEWAY, DAY).await;
    *agent.script.bundle.lock().unwrap() = ca(FEDERATION).bundle();
    agent.token("gateway/gw", dir.path());
    let error = obtained(dir.path()).await.unwrap_err().to_string();
    assert!(error.contains("the root that the token pins"), "{error}");
    assert!(gateway(dir.path()).load().unwrap().is_none());
    agent.end().await;
}

#[tokio::test]
async fn a_certificate_is_renewed_before_it_ends_and_kept() {
    let (agent, dir) = (Agent::start(GATEWAY, Duration::from_secs(4)).await, tempfile::tempdir().unwrap());
    agent.token("gateway/gw", dir.path());
    let member = obtained(dir.path()).await.unwrap();
    let first = member.source().current();
    let mut told = false;
    let renewing = member.clone().keep_fresh(|outcome| told |= outcome.is_ok());
    let renewed = wait_for("a renewal", DEADLINE, async || member.source().current().chain() != first.chain());
    tokio::select! {
        () = renewing => {}
        renewed = renewed => renewed.unwrap(),
    }
    assert!(told && first.not_after() > now(), "renewed in time, and told");
    let kept = gateway(dir.path()).load().unwrap().unwrap();
    assert_eq!(kept.source().current().chain(), member.source().current().chain());
    agent.end().await;
}

#[tokio::test]
async fn a_certificate_that_has_ended_leads_back_to_the_token() {
    let (agent, dir) = (Agent::start(GATEWAY, Duration::from_secs(1)).await, tempfile::tempdir().unwrap());
    agent.token("gateway/gw", dir.path());
    let member = obtained(dir.path()).await.unwrap();
    wait_for("its end", DEADLINE, async || member.has_ended()).await.unwrap();
    let error = chain(&obtained(dir.path()).await.unwrap_err());
    assert!(error.contains("already used"), "{error}");
    // A running program takes the new token as well.
    assert!(matches!(member.refresh().await, Err(EnrolError::Refused { .. })));
    agent.token("gateway/gw", dir.path());
    member.refresh().await.unwrap();
    assert!(!member.has_ended());
    agent.end().await;
}

#[tokio::test]
async fn the_federations_bundle_is_replaced_only_by_one_it_vouches_for() {
    let (agent, dir) = (Agent::start(GATEWAY, DAY).await, tempfile::tempdir().unwrap());
    agent.token("gateway/gw", dir.path());
    let member = obtained(dir.path()).await.unwrap();
    let (old, new) = (&agent.script.ca, ca(FEDERATION));
    let mut document = BundleDocument::parse(&old.bundle().document).unwrap();
    document.sequence += 1;
    document.x509_roots.push(new.root_der().clone());
    let document = document.to_json().unwrap();
    let mut next = TrustBundle { document, ..old.bundle() };
    assert!(matches!(member.succeed(&next), Err(EnrolError::Bundle(_))));
    next.predecessor_signature = old.sign_document(next.document.as_bytes()).unwrap();
    member.succeed(&next).unwrap();
    assert_eq!(member.trust().get()[&domain(FEDERATION)].len(), 2);
    assert_eq!(gateway(dir.path()).load().unwrap().unwrap().record().bundle, next);
    agent.end().await;
}

#[test]
fn a_workload_takes_any_workloads_token_and_the_others_only_their_own() {
    assert!(Subject::Workload.admits("workload/shop/cart"));
    assert!(!Subject::Workload.admits("gateway/gw"));
    assert!(Subject::Dns("one".into()).admits("dns/one"));
    assert!(!Subject::Dns("one".into()).admits("dns/one2"));
}
