//! Launchers with real Envoys against the agent's real services: who reaches whom, what is retried, what survives.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use http_body_util::BodyExt;
use hyper::{HeaderMap, Method, Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use isthmus_identity::{
    bundle::TrustStore,
    tls::{IdentitySource, PeerPolicy, client_config},
};
use isthmus_model::service::AppProtocol;
use isthmus_runtime::{
    tasks::{Shutdown, TaskError},
    wait::wait_for,
};
use rustls_pki_types::ServerName;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    Config, build,
    test_world::{Agent, CART, DEADLINE, Federation, ORDERS, envoy_log, envoys, http_app, inbound},
};

/// A running launcher; its folder outlives it.
struct Launcher {
    dir: Arc<TempDir>,
    config: Config,
    health: SocketAddr,
    stop: Shutdown,
    ended: JoinHandle<Result<(), TaskError>>,
}

impl Launcher {
    /// Starts one and waits until it is ready.
    async fn start(dir: Arc<TempDir>, config: Config) -> Self {
        let bound = build(config.clone()).await.unwrap();
        let (health, stop) = (bound.health, Shutdown::new());
        let until = stop.clone();
        let ended = tokio::spawn(bound.run_until(async move { until.requested().await }));
        let launcher = Self { dir, config, health, stop, ended };
        let ready = async || {
            assert!(!launcher.ended.is_finished(), "the launcher ended");
            call(launcher.health, Method::GET, "/readyz").await.is_ok_and(|a| a.status == StatusCode::OK)
        };
        if let Err(error) = wait_for("the launcher to be ready", DEADLINE, ready).await {
            let why = call(launcher.health, Method::GET, "/readyz").await.map(|a| a.body);
            panic!("{error}: {why:?}\n{}", envoy_log(launcher.dir.path()));
        }
        launcher
    }

    async fn stop(self) -> (Arc<TempDir>, Config) {
        self.stop.request();
        timeout(DEADLINE, self.ended).await.unwrap().unwrap().unwrap();
        (self.dir, self.config)
    }

    async fn metric(&self, name: &str) -> u64 {
        let text = call(self.health, Method::GET, "/metrics").await.unwrap().body;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("{name} is missing in {text}"))
    }

    fn log(&self) -> String {
        envoy_log(self.dir.path())
    }
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

async fn call(to: SocketAddr, method: Method, path: &str) -> Result<Answer, Box<dyn std::error::Error>> {
    let stream = timeout(DEADLINE, TcpStream::connect(to)).await??;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", "cart").body(String::new())?;
    let response = timeout(DEADLINE, sender.send_request(request)).await??;
    let (head, body) = response.into_parts();
    let body = timeout(DEADLINE, body.collect()).await??.to_bytes();
    connection.abort();
    Ok(Answer { status: head.status, headers: head.headers, body: String::from_utf8(body.to_vec())? })
}

struct Shop {
    federation: Federation,
    east: Agent,
    cart: SocketAddr,
}

impl Shop {
    async fn open(lifetime: Duration) -> Self {
        let federation = Federation::new();
        let east = federation.agent("us-east", 21, 41, lifetime).await;
        let cart = SocketAddr::new(federation.vip(1), CART);
        Self { federation, east, cart }
    }

    async fn cart(&self, agent: &Agent, cluster: &str, host: u8, app: SocketAddr) -> Launcher {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let mut config = self.federation.sidecar(agent, cluster, "cart", host, dir.path());
        config.inbound = vec![inbound(8443, app, AppProtocol::Http)];
        let launcher = Launcher::start(dir, config).await;
        agent.serves("cart").await;
        launcher
    }

    async fn web(&self) -> Launcher {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let mut config = self.federation.sidecar(&self.east, "us-east", "web", 31, dir.path());
        config.upstreams = vec!["shop/cart".parse().unwrap(), "shop/orders".parse().unwrap()];
        let launcher = Launcher::start(dir, config).await;
        self.east.applied("web-us-east").await;
        launcher
    }

    async fn close(self) {
        self.east.stop.request();
        self.federation.tasks.run_until(async {}, Duration::from_secs(5)).await.unwrap();
    }
}

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test(flavor = "multi_thread")]
async fn requests_reach_the_near_app_with_the_callers_identity_and_the_far_one_when_it_dies() {
    let shop = Shop::open(DAY).await;
    let west = shop.federation.agent("us-west", 22, 42, DAY).await;
    let (near, near_stop) = http_app(&shop.federation.tasks, "near").await;
    let (far, _far_stop) = http_app(&shop.federation.tasks, "far").await;
    let near_cart = shop.cart(&shop.east, "us-east", 21, near).await;
    let far_cart = shop.cart(&west, "us-west", 22, far).await;
    let gateway = shop.federation.ip(11);
    // us-west has index 2.
    let far_sidecar = SocketAddr::new(shop.federation.ip(22), 8443);
    shop.federation.splice(SocketAddr::new(gateway, 15502), far_sidecar).await;
    shop.east.gateway(gateway).await;
    let web = shop.web().await;

    let answer = call(shop.cart, Method::GET, "/").await.unwrap();
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", web.log());
    assert!(answer.body.starts_with("near GET "), "{answer:?}");
    assert!(answer.body.contains("URI=spiffe://us-east.example/ns/shop/sa/web"), "{answer:?}");
    assert!(answer.headers.get("x-isthmus-unreached").is_none(), "an app's forgery came through: {answer:?}");

    near_stop.request();
    let refuses = async || TcpStream::connect(near).await.is_err();
    wait_for("the near app to be gone", DEADLINE, refuses).await.unwrap();
    // At once, while the near cluster still counts as ready: even a POST may be repeated, since it never reached the app.
    for method in [Method::POST, Method::GET, Method::POST] {
        let answer = call(shop.cart, method.clone(), "/").await.unwrap();
        assert_eq!(answer.status, StatusCode::OK, "{method}: {answer:?}\n{}", web.log());
        assert!(answer.body.starts_with(&format!("far {method} ")), "{answer:?}");
    }
    for launcher in [web, near_cart, far_cart] {
        launcher.stop().await;
    }
    west.stop.request();
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_stands_still_is_left_within_seconds() {
    let shop = Shop::open(DAY).await;
    let west = shop.federation.agent("us-west", 22, 42, DAY).await;
    let (near, _near_stop) = http_app(&shop.federation.tasks, "near").await;
    let (far, _far_stop) = http_app(&shop.federation.tasks, "far").await;
    let near_cart = shop.cart(&shop.east, "us-east", 21, near).await;
    let far_cart = shop.cart(&west, "us-west", 22, far).await;
    let gateway = shop.federation.ip(11);
    let far_sidecar = SocketAddr::new(shop.federation.ip(22), 8443);
    shop.federation.splice(SocketAddr::new(gateway, 15502), far_sidecar).await;
    shop.east.gateway(gateway).await;
    let web = shop.web().await;
    assert!(call(shop.cart, Method::GET, "/").await.unwrap().body.starts_with("near "));

    // The kernel still accepts for a stopped process, and its launcher, which probes the app, notices nothing.
    signal("-STOP", near_cart.dir.path());
    let stopped = Instant::now();
    let answer = call(shop.cart, Method::GET, "/").await.unwrap();
    assert!(answer.body.starts_with("far "), "{answer:?}");
    assert!(stopped.elapsed() < Duration::from_secs(6), "{:?}", stopped.elapsed());
    signal("-CONT", near_cart.dir.path());
    let returns = async || call(shop.cart, Method::GET, "/").await.is_ok_and(|a| a.body.starts_with("near "));
    wait_for("requests to return", DEADLINE, returns).await.unwrap();
    for launcher in [web, near_cart, far_cart] {
        launcher.stop().await;
    }
    west.stop.request();
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_first_protocol_works_and_a_dead_app_is_a_close_without_a_byte_of_tls() {
    let shop = Shop::open(DAY).await;
    let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = app.local_addr().unwrap();
    let ended = Shutdown::new();
    let stop = ended.clone();
    shop.federation.tasks.spawn("orders", async move {
        loop {
            tokio::select! {
                () = ended.requested() => return,
                accepted = app.accept() => {
                    // A probe may be gone already.
                    let _ = accepted.unwrap().0.write_all(b"220 orders\r\n").await;
                }
            }
        }
    });
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let mut config = shop.federation.sidecar(&shop.east, "us-east", "orders", 41, dir.path());
    config.inbound = vec![inbound(8443, address, AppProtocol::Tcp)];
    let orders = Launcher::start(dir, config).await;
    shop.east.serves("orders").await;
    shop.east.applied("orders-us-east").await;
    let sidecar = SocketAddr::new(shop.federation.ip(41), 8443);
    let gateway = shop.federation.ip(11);
    shop.federation.splice(SocketAddr::new(gateway, 15440), sidecar).await;
    shop.east.gateway(gateway).await;
    let web = shop.web().await;

    let vip = SocketAddr::new(shop.federation.vip(2), ORDERS);
    let mut greeting = [0; 12];
    let mut stream = TcpStream::connect(vip).await.unwrap();
    let read = timeout(DEADLINE, stream.read_exact(&mut greeting)).await.unwrap();
    read.unwrap_or_else(|e| panic!("{e}\n{}\n{}", web.log(), orders.log()));
    assert_eq!(&greeting, b"220 orders\r\n");

    stop.request();
    let refuses = async || TcpStream::connect(address).await.is_err();
    wait_for("the app to be gone", DEADLINE, refuses).await.unwrap();
    let mut knock = TcpStream::connect(sidecar).await.unwrap();
    let mut bytes = Vec::new();
    // A reset says the same as an orderly close: not one byte.
    let _ = timeout(DEADLINE, knock.read_to_end(&mut bytes)).await.unwrap();
    assert!(bytes.is_empty());
    web.stop().await;
    orders.stop().await;
    shop.close().await;
}

/// Asks an mTLS port over HTTP/1.1; `None` if no answer comes back.
async fn knock(at: SocketAddr, trust: &TrustStore, source: Option<&IdentitySource>) -> Option<String> {
    let anyone: PeerPolicy = Arc::new(|_| true);
    let tls = client_config(source, trust, anyone, &[b"http/1.1"]).unwrap();
    let tcp = TcpStream::connect(at).await.unwrap();
    let name = ServerName::try_from("cart.example").unwrap();
    let mut stream = timeout(DEADLINE, TlsConnector::from(Arc::new(tls)).connect(name, tcp)).await.unwrap().ok()?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: cart\r\nconnection: close\r\n\r\n").await.ok()?;
    let mut answer = String::new();
    timeout(DEADLINE, stream.read_to_string(&mut answer)).await.unwrap().ok()?;
    (!answer.is_empty()).then_some(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_no_answer_from_an_apps_port() {
    let shop = Shop::open(DAY).await;
    let (app, _stop) = http_app(&shop.federation.tasks, "cart").await;
    let cart = shop.cart(&shop.east, "us-east", 21, app).await;
    shop.east.applied("cart-us-east").await;
    let at = SocketAddr::new(shop.federation.ip(21), 8443);
    let trust = TrustStore::new();
    trust.set(shop.federation.roots(&["us-east"]));

    let friend = IdentitySource::new(shop.federation.workload("us-west", "web"));
    let answer = knock(at, &trust, Some(&friend)).await.unwrap_or_else(|| panic!("{}", cart.log()));
    assert!(answer.contains("200 OK") && answer.contains("URI=spiffe://us-west.example/ns/shop/sa/web"), "{answer}");

    assert_eq!(knock(at, &trust, None).await, None, "no certificate");
    let elsewhere = Federation::new();
    let impostor = IdentitySource::new(elsewhere.workload("us-east", "web"));
    assert_eq!(knock(at, &trust, Some(&impostor)).await, None, "the right name from another CA");
    let mut plain = TcpStream::connect(at).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: cart\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(DEADLINE, plain.read_to_end(&mut answer)).await.unwrap();
    assert!(!answer.starts_with(b"HTTP"), "{:?}", String::from_utf8_lossy(&answer));
    cart.stop().await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_under_a_running_envoy() {
    let shop = Shop::open(Duration::from_secs(6)).await;
    let (app, _stop) = http_app(&shop.federation.tasks, "cart").await;
    let cart = shop.cart(&shop.east, "us-east", 21, app).await;
    let web = shop.web().await;
    let expiry = "isthmus_sidecar_svid_expiry_timestamp_seconds";
    let first = (web.metric(expiry).await, cart.metric(expiry).await);
    let old_ended = async || isthmus_runtime::now() / 1000 > first.0.max(first.1) + 1;
    wait_for("the first certificates to end", DEADLINE, old_ended).await.unwrap();
    let answer = call(shop.cart, Method::GET, "/").await.unwrap();
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", web.log());
    for launcher in [web, cart] {
        assert_eq!(launcher.metric("isthmus_sidecar_envoy_starts_total").await, 1);
        assert!((1..20).contains(&launcher.metric("isthmus_sidecar_svid_renewals_total").await));
        assert!(launcher.metric(expiry).await > first.0.max(first.1));
        launcher.stop().await;
    }
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_needs_no_token_and_secrets_no_agent() {
    let shop = Shop::open(DAY).await;
    let (app, _stop) = http_app(&shop.federation.tasks, "cart").await;
    let cart = shop.cart(&shop.east, "us-east", 21, app).await;
    let (dir, config) = cart.stop().await;
    assert!(envoys(dir.path()).is_empty(), "an Envoy was left behind");
    std::fs::remove_file(&config.agent_token_file).unwrap();
    let cart = Launcher::start(Arc::clone(&dir), config).await;
    shop.east.serves("cart").await;
    shop.east.applied("cart-us-east").await;

    // Without the agent, an Envoy that runs keeps serving, and a launcher that starts gets as far as a live Envoy.
    shop.east.stop.request();
    let at = SocketAddr::new(shop.federation.ip(21), 8443);
    let trust = TrustStore::new();
    trust.set(shop.federation.roots(&["us-east"]));
    let friend = IdentitySource::new(shop.federation.workload("us-east", "web"));
    assert!(knock(at, &trust, Some(&friend)).await.is_some(), "{}", cart.log());
    let (dir, config) = cart.stop().await;
    let bound = build(config).await.unwrap();
    let health = bound.health;
    let stop = Shutdown::new();
    let until = stop.clone();
    let ended = tokio::spawn(bound.run_until(async move { until.requested().await }));
    let started = async || !envoys(dir.path()).is_empty();
    wait_for("Envoy to start without the agent", DEADLINE, started).await.unwrap();
    let pending = call(health, Method::GET, "/readyz").await.unwrap().body;
    assert!(!pending.contains("identity") && !pending.contains("trust"), "{pending}");
    stop.request();
    timeout(DEADLINE, ended).await.unwrap().unwrap().unwrap();
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_virtual_port_that_an_app_holds_is_told_and_taken_once_it_is_free() {
    let shop = Shop::open(DAY).await;
    let (app, _stop) = http_app(&shop.federation.tasks, "cart").await;
    let cart = shop.cart(&shop.east, "us-east", 21, app).await;
    let holder = TcpListener::bind(shop.cart).await.unwrap();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let mut config = shop.federation.sidecar(&shop.east, "us-east", "web", 31, dir.path());
    config.upstreams = vec!["shop/cart".parse().unwrap()];
    let web = Launcher::start(dir, config).await;
    let told = async || {
        let problems = shop.east.problems("web-us-east");
        problems.iter().any(|p| p.contains("shop/cart") && p.contains(&shop.cart.ip().to_string()))
    };
    wait_for("the status to say so", DEADLINE, told).await.unwrap();
    assert_eq!(web.metric("isthmus_sidecar_nacks_total").await, 1);
    drop(holder);
    shop.east.applied("web-us-east").await;
    assert_eq!(shop.east.problems("web-us-east"), Vec::<String>::new());
    assert_eq!(call(shop.cart, Method::GET, "/").await.unwrap().status, StatusCode::OK);
    web.stop().await;
    cart.stop().await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_dies_is_started_again() {
    let shop = Shop::open(DAY).await;
    let (app, _stop) = http_app(&shop.federation.tasks, "cart").await;
    let cart = shop.cart(&shop.east, "us-east", 21, app).await;
    shop.east.applied("cart-us-east").await;
    signal("-KILL", cart.dir.path());
    let again = async || cart.metric("isthmus_sidecar_envoy_starts_total").await == 2;
    wait_for("a second Envoy", DEADLINE, again).await.unwrap();
    assert_eq!(cart.metric("isthmus_sidecar_envoy_deaths_total").await, 1);
    let at = SocketAddr::new(shop.federation.ip(21), 8443);
    let trust = TrustStore::new();
    trust.set(shop.federation.roots(&["us-east"]));
    let friend = IdentitySource::new(shop.federation.workload("us-east", "web"));
    let serves = async || TcpStream::connect(at).await.is_ok() && knock(at, &trust, Some(&friend)).await.is_some();
    wait_for("it to serve", DEADLINE, serves).await.unwrap();
    let (dir, _) = cart.stop().await;
    assert!(envoys(dir.path()).is_empty());
    shop.close().await;
}

fn signal(signal: &str, dir: &Path) {
    let pids = envoys(dir);
    assert_eq!(pids.len(), 1);
    for pid in pids {
        assert!(std::process::Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    }
}

#[tokio::test]
async fn a_missing_envoy_is_an_error_that_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { envoy: dir.path().join("envoy"), ..super::test_envoy::config(dir.path()) };
    let error = build(config).await.err().unwrap().to_string();
    assert!(error.contains("`envoy`") && error.contains("make envoy"), "{error}");
}
