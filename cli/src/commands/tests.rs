//! Rendering and conditions as pure functions, then whole commands against a control plane's admin API in this process:
//! real mutual TLS, the JSON that the API is specified to give.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::Path,
    http::StatusCode,
    routing::{get, post},
};
use clap::Parser as _;
use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    grpc::{PeerInfo, TlsIncoming},
    keys::KeyPair,
    svid::Svid,
    tls::{ClientAuth, IdentitySource, server_config},
};
use isthmus_model::{
    global::GlobalSnapshot,
    ids::{SpiffeId, TrustDomain},
};
use serde_json::{Value, json};

use super::{
    declare, describe, explain, get as get_command, status,
    wait::{Progress, progress},
};
use crate::{
    Verdict,
    args::Cli,
    shapes::{ApplyResult, NamedCluster, Stamp, Status},
};

fn consumer(kind: &str, name: &str, revision: u64, connected: bool) -> Value {
    json!({"kind": kind, "name": name, "applied": {"epoch": 1, "revision": revision}, "connected": connected,
        "lagRevisions": 42_u64.saturating_sub(revision), "problems": []})
}

fn cluster(name: &str, connected: bool, consumers: &[Value]) -> Value {
    json!({"name": name, "state": "active", "region": "us", "zone": format!("{name}-1"), "index": 1,
        "session": {"connected": connected, "lastSeenMs": 0}, "consumers": consumers, "problems": [],
        "availability": []})
}

fn status_json(clusters: &[Value]) -> Value {
    json!({"federation": "isthmus.example", "stamp": {"epoch": 1, "revision": 42}, "node": "cp-1",
        "clusters": clusters})
}

fn parsed(clusters: &[Value]) -> Status {
    serde_json::from_value(status_json(clusters)).unwrap()
}

fn at(revision: u64) -> Stamp {
    Stamp { epoch: 1, revision }
}

/// us-east is done; us-west has a gateway behind and a DNS server that is gone.
fn two_clusters(gateway: u64) -> [Value; 2] {
    [
        cluster("us-east", true, &[consumer("gateway", "gateway-1", 42, true), consumer("dns", "dns-1", 42, true)]),
        cluster(
            "us-west",
            true,
            &[consumer("gateway", "gateway-1", gateway, true), consumer("dns", "dns-1", 1, false)],
        ),
    ]
}

fn snapshot() -> GlobalSnapshot {
    let cluster = |name: &str, region: &str, index: u16| {
        json!({"name": name, "index": index, "locality": {"region": region, "zone": format!("{name}-1")},
            "state": "Active", "gateways": [{"name": "gateway-1", "tunnel": "127.1.1.11:15443"}, {"name": "gateway-2", "tunnel": null}],
            "bundle": {"trust_domain": format!("{name}.example"), "document": "{}", "predecessor_signature": []}})
    };
    let exporter =
        |name: &str| json!({"created_at": 1, "identities": [format!("spiffe://{name}.example/ns/shop/sa/cart")]});
    let value = json!({
        "stamp": {"epoch": 1, "revision": 42}, "federation": "isthmus.example",
        "federation_bundle": {"trust_domain": "isthmus.example", "document": "{}", "predecessor_signature": []},
        "settings": {"failover": {"holdDownMs": 3000, "allowedRegions": null}},
        "clusters": {"us-east": cluster("us-east", "us", 1), "eu-central": cluster("eu-central", "eu", 2)},
        "services": {"shop/cart": {"name": "shop/cart", "index": 5, "kind": "ClusterSetIp", "conflicts": [],
            "ports": [{"port": {"name": "http", "number": 80, "protocol": "http"},
                "clusters": ["us-east", "eu-central"]}],
            "exporters": {"us-east": exporter("us-east"), "eu-central": exporter("eu-central")}}},
    });
    serde_json::from_value(value).unwrap()
}

#[test]
fn wait_counts_connected_consumers_of_active_clusters() {
    assert_eq!(progress(&parsed(&two_clusters(42)), at(42), None), Progress::Done(3));
    let Progress::Pending(laggards) = progress(&parsed(&two_clusters(41)), at(42), None) else { panic!() };
    assert_eq!(laggards, ["us-west gateway/gateway-1 (at 1.41)"]);
    assert_eq!(progress(&parsed(&two_clusters(41)), at(41), None), Progress::Done(3));
}

#[test]
fn wait_for_one_cluster_ignores_the_others() {
    let east = "us-east".parse().unwrap();
    assert_eq!(progress(&parsed(&two_clusters(1)), at(42), Some(&east)), Progress::Done(2));
}

#[test]
fn wait_does_not_believe_news_of_a_lost_agent() {
    let mut clusters = two_clusters(1);
    clusters[1]["session"]["connected"] = json!(false);
    assert_eq!(progress(&parsed(&clusters), at(42), None), Progress::Done(2));
    let west = "us-west".parse().unwrap();
    let Progress::Pending(laggards) = progress(&parsed(&clusters), at(42), Some(&west)) else { panic!() };
    assert_eq!(laggards, ["us-west (its agent is not connected)"]);
}

#[test]
fn wait_does_not_count_revoked_clusters() {
    let mut clusters = two_clusters(1);
    clusters[1]["state"] = json!("revoked");
    assert_eq!(progress(&parsed(&clusters), at(42), None), Progress::Done(2));
}

#[test]
fn wait_is_not_over_when_nobody_is_there_or_the_revision_does_not_exist_yet() {
    assert!(matches!(progress(&parsed(&[]), at(42), None), Progress::Pending(_)));
    let Progress::Pending(laggards) = progress(&parsed(&two_clusters(42)), at(43), None) else { panic!() };
    assert_eq!(laggards[0], "control plane cp-1 (at 1.42)");
}

#[test]
fn an_older_epoch_is_not_enough_however_high_its_revision() {
    let status = parsed(&two_clusters(42));
    let target = Stamp { epoch: 2, revision: 1 };
    let Progress::Pending(laggards) = progress(&status, target, None) else { panic!() };
    assert_eq!(laggards.len(), 4);
}

#[test]
fn status_shows_clusters_consumers_and_problems_with_their_place() {
    let mut clusters = two_clusters(40);
    clusters[1]["problems"] =
        json!([{"at": "cart.yaml:14", "field": "spec.ports[0].port", "message": "must be 1 to 65535"}]);
    clusters[1]["session"] = json!({"connected": false, "lastSeenMs": 0});
    let want = "\
Federation isthmus.example, revision 1.42, node cp-1

CLUSTER  STATE   REGION  ZONE       SESSION            CONSUMERS  PROBLEMS
us-east  active  us      us-east-1  connected          2/2        0
us-west  active  us      us-west-1  not since restart  0/2        1

CLUSTER  CONSUMER           CONNECTED  APPLIED  LAG
us-east  gateway/gateway-1  yes        1.42     0
us-east  dns/dns-1          yes        1.42     0
us-west  gateway/gateway-1  unknown    1.40     2
us-west  dns/dns-1          unknown    1.1      41

CLUSTER  WHERE         PROBLEM
us-west  cart.yaml:14  spec.ports[0].port: must be 1 to 65535
";
    assert_eq!(status::render(&parsed(&clusters)), want);
}

#[test]
fn status_shows_each_link_and_marks_those_that_fell_back_to_tcp() {
    let link = |gateway: &str, up: bool, transport: &str, downgraded: bool| {
        json!({"from": "gateway-1", "cluster": "us-west", "gateway": gateway, "up": up, "transport": transport,
            "downgraded": downgraded, "rttUs": 41_200, "lossPpm": 3_170, "cwndBytes": 131_072})
    };
    let mut clusters = two_clusters(42);
    clusters[0]["tunnels"] = json!([
        link("gateway-1", true, "quic", false),
        link("gateway-2", true, "tcp", true),
        link("gateway-3", false, "quic", false)
    ]);
    clusters[0]["tunnels"][2]["dialError"] = json!("no answer within 5s");
    let text = status::render(&parsed(&clusters));
    let want = "\
CLUSTER  GATEWAY    LINK TO            STATE  TRANSPORT       RTT    LOSS    WINDOW
us-east  gateway-1  us-west/gateway-1  up     quic            41 ms  0.31 %  128 KiB
us-east  gateway-1  us-west/gateway-2  up     tcp DOWNGRADED  41 ms  -       -
us-east  gateway-1  us-west/gateway-3  down   quic            -      -       -

NOT REACHED FROM   LINK TO            LAST ATTEMPT
us-east/gateway-1  us-west/gateway-3  no answer within 5s

DOWNGRADED: 1 link runs over TCP because QUIC does not get through. Let UDP pass between the gateways' tunnel addresses; a \
link goes back to QUIC by itself.
";
    assert!(text.contains(want), "{text}");
    clusters[0]["session"]["connected"] = json!(false);
    let text = status::render(&parsed(&clusters));
    assert!(text.contains("us-west/gateway-1  unknown  quic") && !text.contains("DOWNGRADED: "), "{text}");
}

#[test]
fn an_empty_federation_says_how_to_begin() {
    assert!(status::render(&parsed(&[])).contains("cluster join-token"));
    assert!(get_command::services_table(&[], false).contains("ServiceExport"));
}

#[test]
fn services_and_clusters_are_tables() {
    let global = snapshot();
    let services: Vec<_> = global.services.values().map(|service| service.as_ref().clone()).collect();
    let want = "\
SERVICE    KIND          INDEX  PORTS         EXPORTED BY         CONFLICTS
shop/cart  ClusterSetIP  5      http:80/http  eu-central,us-east  -
";
    assert_eq!(get_command::services_table(&services, false), want);
    let clusters: Vec<NamedCluster> = serde_json::from_value(clusters_json()).unwrap();
    let want = "\
CLUSTER  STATE    REGION  ZONE  INDEX  TRUST DOMAIN     GATEWAYS                                               EXPORTS
us-east  active   us      us-1  1      us-east.example  gateway-1=127.1.1.11:15443,gateway-2 (dials out only)  1 (1 with a problem)
us-west  pending  -       -     -      -                -                                                      -
";
    let text = get_command::clusters_table(&clusters, false);
    assert_eq!(text, want);
    let wide = get_command::clusters_table(&clusters, true);
    assert!(wide.contains("MAY EXPORT") && wide.contains("shop,pay    none        gateway"), "{wide}");
}

/// As `GET /v1/clusters` gives it.
fn clusters_json() -> Value {
    json!([
        {"name": "us-east", "state": "active", "index": 1, "locality": {"region": "us", "zone": "us-1"},
            "trustDomain": "us-east.example",
            "gateways": [{"name": "gateway-1", "tunnel": "127.1.1.11:15443"}, {"name": "gateway-2", "tunnel": null}],
            "exports": ["shop/cart"],
            "heldWithdrawal": {"since": 0, "services": ["shop/web"]},
            "conditions": [{"service": "shop/web", "reason": "WithdrawalHeld", "message": "it stays"}],
            "grant": {"exportNamespaces": ["shop", "pay"], "importNamespaces": [], "roles": ["gateway"], "limits": {}}},
        {"name": "us-west", "state": "pending", "tokenExpiresAt": 9_999_999_999_999_u64},
    ])
}

#[test]
fn a_cluster_is_described_with_what_it_may_and_what_is_wrong() {
    let clusters: Vec<NamedCluster> = serde_json::from_value(clusters_json()).unwrap();
    let text = describe::cluster(&clusters[0], None).unwrap();
    for part in [
        "exportNamespaces: [\"shop\",\"pay\"]",
        "shop/web: WithdrawalHeld: it stays",
        "1 exports were withdrawn at once, at 1970-01-01T00:00:00Z, and are held",
        "  shop/cart\n",
    ] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    let text = describe::cluster(&clusters[1], None).unwrap();
    assert!(text.contains("has not joined yet"), "{text}");
}

#[test]
fn a_difference_is_shown_line_by_line() {
    let result = |before: Value, after: Value| ApplyResult {
        kind: "ClusterGrant".to_owned(),
        name: "us-east".to_owned(),
        outcome: "configured".to_owned(),
        before: Some(before),
        after: Some(after),
    };
    let text = declare::difference(&result(json!({"a": 1, "b": 2}), json!({"a": 1, "b": 3}))).unwrap();
    let want = "--- ClusterGrant/us-east as it is\n+++ ClusterGrant/us-east as it would be\n a: 1\n-b: 2\n+b: 3\n";
    assert_eq!(text, want);
    assert_eq!(declare::difference(&result(json!({"a": 1}), json!({"a": 1}))).unwrap(), "");
}

#[test]
fn an_unknown_service_suggests_near_names() {
    let global = snapshot();
    let error = explain::find_service(&global, &"shop/crat".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("did you mean shop/cart?"), "{error}");
}

/// An admin API in this process, and a context file for it.
pub(super) struct ControlPlane {
    pub(super) address: SocketAddr,
    pub(super) dir: tempfile::TempDir,
    ca: CertificateAuthority,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn federation() -> TrustDomain {
    "isthmus.example".parse().unwrap()
}

fn svid(ca: &CertificateAuthority, path: &[&str]) -> Svid {
    let key = KeyPair::generate().unwrap();
    let id = SpiffeId::new(ca.trust_domain(), path).unwrap();
    let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], Duration::from_secs(3600)).unwrap();
    Svid::new(chain, &key).unwrap()
}

impl ControlPlane {
    pub(super) async fn start(routes: Router) -> Self {
        isthmus_identity::install_crypto();
        let ca = CertificateAuthority::create(&federation(), Duration::from_secs(86_400)).unwrap();
        let trust = TrustStore::new();
        trust.set([(federation(), vec![ca.root_der().clone()])].into());
        let policy = ClientAuth::Optional(Arc::new(|id| id.segments().next() == Some("admin")));
        let source = IdentitySource::new(svid(&ca, &["cp", "cp-1"]));
        let tls = server_config(&source, &trust, policy, &[b"http/1.1"]).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let incoming = TlsIncoming::new(listener, Arc::new(tls));
        let address = incoming.local_addr().unwrap();
        let service = Router::new().nest("/v1", routes).into_make_service_with_connect_info::<PeerInfo>();
        let server = tokio::spawn(async move { axum::serve(incoming, service).await.unwrap() });
        let plane = Self { address, dir: tempfile::tempdir().unwrap(), ca, server };
        plane.context(&["admin", "root"]);
        plane
    }

    /// Writes a context with a certificate for `path`.
    fn context(&self, path: &[&str]) -> PathBuf {
        let dir = self.dir.path();
        svid(&self.ca, path).save(dir, "admin").unwrap();
        let root = isthmus_identity::svid::Svid::chain_pem(&svid(&self.ca, path));
        // The chain ends with the root.
        let root =
            root.rsplit_once("-----BEGIN CERTIFICATE-----").map(|(_, r)| format!("-----BEGIN CERTIFICATE-----{r}"));
        std::fs::write(dir.join("ca.pem"), root.unwrap()).unwrap();
        let file = dir.join("context.yaml");
        let text = format!(
            "server: {}\nca: ca.pem\ncert: admin.pem\nkey: admin.key\nfederation: isthmus.example\n",
            self.address
        );
        std::fs::write(&file, text).unwrap();
        file
    }

    pub(super) async fn run(&self, line: &str) -> (anyhow::Result<Verdict>, String) {
        let file = self.dir.path().join("context.yaml");
        let words = ["isthmusctl", "--context", file.to_str().unwrap()].into_iter().chain(line.split(' '));
        let mut out = Vec::new();
        let verdict = super::run(Cli::try_parse_from(words).unwrap(), &mut out).await;
        (verdict, String::from_utf8(out).unwrap())
    }
}

fn api() -> Router {
    let availability = json!([
        {"service": "shop/cart", "cluster": "us-east", "ready": 0, "total": 1, "reachable": true},
        {"service": "shop/cart", "cluster": "eu-central", "ready": 2, "total": 2, "reachable": true},
    ]);
    Router::new()
        .route("/status", get(async || Json(status_json(&two_clusters(42)))))
        .route("/snapshot", get(async || Json(snapshot())))
        .route("/clusters", get(async || Json(clusters_json())))
        .route("/services", get(async || Json(snapshot().services.into_values().collect::<Vec<_>>())))
        .route("/availability/{cluster}", get(async move || Json(availability)))
        .route(
            "/clusters/{name}/join-token",
            post(async |Path(name): Path<String>, Json(body): Json<Value>| {
                if name == "taken" {
                    let error = json!({"error": {"code": "conflict", "message": "taken is revoked", "field": "name"}});
                    return (StatusCode::CONFLICT, Json(error));
                }
                let token = format!("isthmus-join.{name}-{}", body["ttlSeconds"]);
                (StatusCode::OK, Json(json!({"token": token, "expiresAt": 1})))
            }),
        )
        .route("/clusters/{name}/revoke", post(async || Json(json!({"stamp": {"epoch": 1, "revision": 43}}))))
}

#[tokio::test]
async fn join_token_prints_the_token_alone() {
    let plane = ControlPlane::start(api()).await;
    let (verdict, out) = plane.run("cluster join-token us-north --ttl 1h").await;
    assert_eq!((verdict.unwrap(), out.as_str()), (Verdict::Yes, "isthmus-join.us-north-3600\n"));
    let (verdict, _) = plane.run("cluster join-token taken").await;
    assert_eq!(verdict.unwrap_err().to_string(), "name: taken is revoked (conflict)");
}

#[tokio::test]
async fn status_and_lists_print_in_each_format() {
    let plane = ControlPlane::start(api()).await;
    let (_, table) = plane.run("status").await;
    assert!(table.starts_with("Federation isthmus.example, revision 1.42"), "{table}");
    let (_, text) = plane.run("status -o json").await;
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), status_json(&two_clusters(42)));
    let (_, text) = plane.run("get services -o json").await;
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()[0]["name"], "shop/cart");
    let (_, text) = plane.run("get clusters -o yaml").await;
    assert!(text.contains("name: us-east"), "{text}");
    let (_, text) = plane.run("cluster list").await;
    assert!(text.contains("us-west  active"), "{text}");
}

#[tokio::test]
async fn explain_orders_by_the_shared_choice_and_says_why() {
    let plane = ControlPlane::start(api()).await;
    let (verdict, out) = plane.run("explain shop/cart --from us-east --port 80").await;
    assert_eq!(verdict.unwrap(), Verdict::Yes);
    let rows: Vec<&str> = out.lines().filter(|l| l.starts_with(char::is_numeric)).collect();
    assert!(rows[0].starts_with("1  eu-central  ready"), "{out}");
    assert!(rows[1].starts_with("2  us-east     no-endpoints"), "{out}");
    for (line, want) in [
        ("explain shop/carts --from us-east", "did you mean shop/cart?"),
        ("explain shop/cart --from us-est", "did you mean us-east?"),
        ("explain shop/cart --from us-east --port 81", "has no port 81; it has 80"),
    ] {
        let error = plane.run(line).await.0.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[tokio::test]
async fn explain_without_a_usable_candidate_is_a_no() {
    let none = json!([
        {"service": "shop/cart", "cluster": "us-east", "ready": 0, "total": 1, "reachable": true},
        {"service": "shop/cart", "cluster": "eu-central", "ready": 2, "total": 2, "reachable": false},
    ]);
    let routes = Router::new()
        .route("/snapshot", get(async || Json(snapshot())))
        .route("/availability/{cluster}", get(async move || Json(none)));
    let plane = ControlPlane::start(routes).await;
    assert_eq!(plane.run("explain shop/cart --from us-east").await.0.unwrap(), Verdict::No);
}

#[tokio::test]
async fn wait_ends_when_the_last_consumer_has_it() {
    let asked = Arc::new(AtomicUsize::new(0));
    let status = async move || {
        let gateway = if asked.fetch_add(1, Ordering::SeqCst) < 2 { 40 } else { 42 };
        Json(status_json(&two_clusters(gateway)))
    };
    let plane = ControlPlane::start(Router::new().route("/status", get(status))).await;
    let (verdict, out) = plane.run("wait --timeout 30s").await;
    assert_eq!(verdict.unwrap(), Verdict::Yes);
    assert!(out.starts_with("revision 1.42 applied by 3 consumers"), "{out}");
    let (verdict, _) = plane.run("wait --revision 99 --timeout 300ms").await;
    assert_eq!(verdict.unwrap(), Verdict::No);
    let error = plane.run("wait --cluster us-norht").await.0.unwrap_err().to_string();
    assert!(error.contains("there is no cluster us-norht"), "{error}");
}

#[tokio::test]
async fn revoke_needs_a_yes_and_a_known_name() {
    let plane = ControlPlane::start(api()).await;
    let (verdict, out) = plane.run("cluster revoke us-west --yes").await;
    assert_eq!((verdict.unwrap(), out.as_str()), (Verdict::Yes, "us-west revoked at revision 1.43\n"));
    let error = plane.run("cluster revoke us-wst --yes").await.0.unwrap_err().to_string();
    assert!(error.contains("did you mean us-west"), "{error}");
}

#[tokio::test]
async fn a_control_plane_that_is_down_says_what_to_check() {
    let plane = ControlPlane::start(api()).await;
    plane.server.abort();
    let down = async || {
        let error = plane.run("status").await.0.err().map(|e| e.to_string()).unwrap_or_default();
        error.contains("does not answer")
            && error.contains("isthmus-global-cp")
            && error.contains(&plane.address.to_string())
    };
    for _ in 0..100 {
        if down().await {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("{:?}", plane.run("status").await);
}

#[tokio::test]
async fn a_certificate_that_is_not_an_admins_is_refused_clearly() {
    let plane = ControlPlane::start(api()).await;
    plane.context(&["cluster", "us-east", "agent"]);
    let error = plane.run("status").await.0.unwrap_err().to_string();
    assert!(error.contains("refused this program's certificate") && error.contains("context.yaml"), "{error}");
}

#[tokio::test]
async fn a_server_of_another_federation_is_not_believed() {
    let (plane, other) = (ControlPlane::start(api()).await, ControlPlane::start(api()).await);
    let file = plane.dir.path().join("context.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace(&plane.address.to_string(), &other.address.to_string())).unwrap();
    let error = plane.run("status").await.0.unwrap_err().to_string();
    assert!(error.contains("is not the control plane of this context's federation"), "{error}");
}
