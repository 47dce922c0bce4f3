//! The rig: a federation's CA, gateways on runtimes of their own (so that one can be killed), endpoints and clients.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use isthmus_identity::{bundle::TrustStore, ca::CertificateAuthority, keys::KeyPair, svid::Svid, tls::IdentitySource};
use isthmus_model::{
    global::GlobalSnapshot,
    ids::{Revision, SpiffeId},
    local::{Endpoint, LocalEndpoints},
    service::GatewayAddress,
    sni,
};
use isthmus_runtime::wait::wait_for;
use rustls::ClientConnection;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tracing::Dispatch;

use crate::{
    Bound, BuildError, Config, Feed, Given, Inspector, View, build,
    config::LinkTransport,
    core::Core,
    hello::{HelloReader, Progress},
    take_over,
    testkit::{FEDERATION, cluster, federation, service_name},
};

pub(super) const SOON: Duration = Duration::from_secs(10);
const DAY: Duration = Duration::from_secs(86_400);

pub(super) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(crate) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

pub(super) fn ca() -> &'static CertificateAuthority {
    static CA: OnceLock<CertificateAuthority> = OnceLock::new();
    CA.get_or_init(|| {
        isthmus_identity::install_crypto();
        CertificateAuthority::create(&FEDERATION.parse().unwrap(), DAY).unwrap()
    })
}

pub(crate) fn svid(name: &str) -> Svid {
    let id = SpiffeId::component(&FEDERATION.parse().unwrap(), &cluster(name), "gateway").unwrap();
    let key = KeyPair::generate().unwrap();
    let chain = ca().sign_csr(&key.csr_der().unwrap(), &id, &[], DAY).unwrap();
    Svid::new(chain, &key).unwrap()
}

pub(crate) fn trust() -> TrustStore {
    let trust = TrustStore::new();
    trust.set(BTreeMap::from([(FEDERATION.parse().unwrap(), vec![ca().root_der().clone()])]));
    trust
}

pub(crate) fn config(name: &str) -> Config {
    let json = serde_json::json!({
        "name": name,
        "stateDir": "/nonexistent",
        "listen": {
            "tunnel": "127.0.0.1:0", "local": "127.0.0.1", "autoPort": 0, "pinnedPortBase": 0, "health": "127.0.0.1:0",
        },
        // Many gateways share a busy machine here: death is declared late, but where a test is about it.
        "tunnel": { "dialBackoffMax": "200ms", "deadAfter": "1500ms" },
        // A test that awaits connections is not to be surprised by a look.
        "egress": { "healthInterval": "0s" },
        "ingress": { "helloTimeout": "500ms" },
        // Nor is a busy machine what a test means by overload.
        "overload": { "maxSchedulingDelay": "60s" },
        "drain": { "acceptFor": "100ms", "deadline": "5s" },
    });
    serde_json::from_value(json).unwrap()
}

/// In what way a gateway is started.
#[derive(Default)]
struct How {
    takes_over: bool,
    log: Dispatch,
}

impl How {
    fn succeeding() -> Self {
        Self { takes_over: true, ..Self::default() }
    }
}

/// One gateway.
pub(super) struct Gateway {
    name: String,
    pub(super) inspector: Inspector,
    pub(super) auto: SocketAddr,
    pub(super) tunnel: SocketAddr,
    pub(super) view: watch::Sender<Arc<View>>,
    stop: Option<oneshot::Sender<()>>,
    ended: Option<JoinHandle<Result<(), crate::RunError>>>,
    runtime: Option<Runtime>,
}

impl Gateway {
    /// A gateway of cluster `name` with an empty view.
    pub(super) async fn start(name: &str) -> Self {
        Self::start_with(name, |_| {}).await
    }

    /// The same, dialling `over` something else.
    pub(super) async fn start_over(over: LinkTransport, name: &str) -> Self {
        Self::start_with(name, |config| config.tunnel.transport = over).await
    }

    pub(super) async fn start_with(name: &str, change: impl FnOnce(&mut Config)) -> Self {
        Self::start_logging(name, Dispatch::default(), change).await
    }

    /// The same, with its log and traces going to `log`.
    pub(super) async fn start_logging(name: &str, log: Dispatch, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = config("gateway-1");
        change(&mut config);
        Self::launch(name, config, watch::Sender::default(), How { log, ..How::default() }).await.unwrap()
    }

    /// One of a cluster of its own that may fail to start, beside whoever runs.
    pub(super) async fn try_start(change: impl FnOnce(&mut Config)) -> Result<Self, BuildError> {
        let mut config = config("gateway-1");
        change(&mut config);
        Self::launch("east", config, watch::Sender::default(), How::default()).await
    }

    /// One that takes over from this one, with the same view and configuration. Its addresses are in its inspector.
    pub(super) async fn successor(&self, state_dir: &Path) -> Self {
        self.try_succeed(|config| config.state_dir = state_dir.to_owned()).await.unwrap()
    }

    /// One that begins to take over and is told nothing until its own view is set, so that it cannot become ready.
    pub(super) async fn stuck_successor(&self, state_dir: &Path) -> Self {
        let mut config = config("gateway-1");
        config.state_dir = state_dir.to_owned();
        Self::launch(&self.name, config, watch::Sender::default(), How::succeeding()).await.unwrap()
    }

    /// As [`Gateway::successor`], with another configuration.
    pub(super) async fn try_succeed(&self, change: impl FnOnce(&mut Config)) -> Result<Self, BuildError> {
        let mut config = config("gateway-1");
        change(&mut config);
        Self::launch(&self.name, config, self.view.clone(), How::succeeding()).await
    }

    async fn launch(name: &str, config: Config, view: watch::Sender<Arc<View>>, how: How) -> Result<Self, BuildError> {
        let given = Given {
            cluster: cluster(name),
            federation: FEDERATION.parse().unwrap(),
            identity: IdentitySource::new(svid(name)),
            trust: trust(),
            view: view.subscribe(),
        };
        let mut runtime = Builder::new_multi_thread();
        runtime.worker_threads(1).enable_all();
        runtime.on_thread_start(move || {
            // For as long as the thread lives.
            std::mem::forget(tracing::dispatcher::set_default(&how.log));
        });
        let runtime = runtime.build().unwrap();
        let given = Feed::Given(given);
        let bound = match how.takes_over {
            true => runtime.spawn(take_over(config, given)).await.unwrap(),
            false => runtime.spawn(build(config, given)).await.unwrap(),
        };
        let bound: Bound = match bound {
            Ok(bound) => bound,
            Err(error) => {
                runtime.shutdown_background();
                return Err(error);
            }
        };
        let (inspector, auto, tunnel) = (bound.inspector(), bound.auto_addr(), bound.tunnel_addr());
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = runtime.spawn(bound.run(async move { drop(stopped.await) }));
        let (stop, ended, runtime) = (Some(stop), Some(ended), Some(runtime));
        Ok(Self { name: name.to_owned(), inspector, auto, tunnel, view, stop, ended, runtime })
    }

    /// Its insides, once it serves.
    pub(super) async fn core(&self) -> Arc<Core> {
        until("the gateway serves", || self.inspector.core().is_some()).await;
        self.inspector.core().unwrap()
    }

    /// Everything of it is gone from one moment to the next, without a word to anybody.
    pub(super) fn kill(&mut self) {
        // The inspector would keep the sockets open.
        self.inspector = Inspector::default();
        self.runtime.take().unwrap().shutdown_background();
    }

    /// Asks it to drain.
    pub(super) fn drain(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits until its drain is over.
    pub(super) async fn ended(&mut self) {
        self.ended.take().unwrap().await.unwrap().unwrap();
    }

    pub(super) fn set_endpoints(&self, endpoints: &[SocketAddr]) {
        self.view.send_modify(|view| {
            let mut next = View::clone(view);
            next.endpoints = Arc::new(serving(endpoints));
            *view = Arc::new(next);
        });
    }

    /// The same endpoints for each service of `global`.
    pub(super) fn set_endpoints_of_all(&self, global: &GlobalSnapshot, endpoints: &[SocketAddr]) {
        let one = serving(endpoints).services.into_values().next().unwrap();
        let services = global.services.keys().map(|name| (name.clone(), one.clone())).collect();
        self.view.send_modify(|view| {
            let mut next = View::clone(view);
            next.endpoints = Arc::new(LocalEndpoints { services });
            *view = Arc::new(next);
        });
    }

    pub(super) fn set_global(&self, global: &GlobalSnapshot) {
        self.view.send_modify(|view| {
            let mut next = View::clone(view);
            next.global = Some(Arc::new(global.clone()));
            *view = Arc::new(next);
        });
    }

    /// Waits until it counts `name`'s service as ready.
    pub(super) async fn sees_ready(&self, name: &str) {
        let what = format!("{name} is ready");
        until(&what, || self.eligibility(name).as_deref() == Some("ready")).await;
    }

    /// The state word of the candidate.
    pub(super) fn eligibility(&self, name: &str) -> Option<String> {
        eligibility(&self.inspector, name)
    }
}

/// The state word of the candidate `name` for `shop/orders:80`.
pub(super) fn eligibility(inspector: &Inspector, name: &str) -> Option<String> {
    let candidates = inspector.candidates(&service_name(), 80)?;
    let candidate = candidates.into_iter().find(|c| c.cluster == cluster(name))?;
    Some(serde_json::to_value(candidate.eligibility).unwrap()["state"].as_str().unwrap().to_owned())
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs each of these cases, functions of a [`LinkTransport`], over QUIC and over TCP.
macro_rules! over_both {
    ($($case:ident),+ $(,)?) => {
        mod quic {
            $(#[tokio::test]
            async fn $case() {
                super::$case(crate::config::LinkTransport::Quic).await;
            })+
        }
        mod tcp {
            $(#[tokio::test]
            async fn $case() {
                super::$case(crate::config::LinkTransport::Tcp).await;
            })+
        }
    };
}
pub(super) use over_both;

/// Gateways of these clusters that know each other, linked over QUIC; `endpoints` serve `shop/orders` in each.
pub(super) async fn connected(members: &[(&str, &[SocketAddr])]) -> (Vec<Gateway>, GlobalSnapshot) {
    linked(LinkTransport::Quic, members).await
}

/// The same with links `over` something else.
pub(super) async fn linked(over: LinkTransport, members: &[(&str, &[SocketAddr])]) -> (Vec<Gateway>, GlobalSnapshot) {
    linked_with(|config| config.tunnel.transport = over, members).await
}

/// The same with all gateways configured by `change`.
pub(super) async fn linked_with(
    change: impl Fn(&mut Config),
    members: &[(&str, &[SocketAddr])],
) -> (Vec<Gateway>, GlobalSnapshot) {
    let mut gateways = Vec::new();
    for (name, _) in members {
        gateways.push(Gateway::start_with(name, &change).await);
    }
    let global = introduce(&gateways, members);
    for (gateway, (_, endpoints)) in gateways.iter().zip(members) {
        gateway.set_endpoints(endpoints);
        gateway.set_global(&global);
    }
    for (gateway, (own, _)) in gateways.iter().zip(members) {
        for (other, endpoints) in members {
            if other != own && !endpoints.is_empty() {
                gateway.sees_ready(other).await;
            }
        }
    }
    (gateways, global)
}

/// Shows these gateways each other, and waits until the first sees the others ready.
pub(super) async fn show(gateways: &[Gateway], members: &[(&str, &[SocketAddr])]) {
    let global = introduce(gateways, members);
    for (gateway, (_, endpoints)) in gateways.iter().zip(members) {
        gateway.set_endpoints(endpoints);
        gateway.set_global(&global);
    }
    for (other, _) in &members[1..] {
        gateways[0].sees_ready(other).await;
    }
}

/// The state in which these gateways are the clusters' own.
pub(super) fn introduce(gateways: &[Gateway], members: &[(&str, &[SocketAddr])]) -> GlobalSnapshot {
    let names: Vec<&str> = members.iter().map(|(name, _)| *name).collect();
    let mut global = federation(&names);
    for (gateway, name) in gateways.iter().zip(&names) {
        let address = GatewayAddress { name: "gateway-1".to_owned(), tunnel: Some(gateway.tunnel) };
        global.clusters.get_mut(&cluster(name)).unwrap().gateways = vec![address];
    }
    global
}

/// The same state, one revision on.
pub(super) fn next(global: &GlobalSnapshot) -> GlobalSnapshot {
    let mut next = global.clone();
    next.stamp.revision = Revision(next.stamp.revision.0 + 1);
    next
}

fn serving(addresses: &[SocketAddr]) -> LocalEndpoints {
    // One IP each would be truer; tests tell endpoints apart by port.
    let endpoint = |a: &SocketAddr| Endpoint {
        ip: a.ip(),
        ports: BTreeMap::from([("tcp".parse().unwrap(), a.port())]),
        ready: true,
        has_sidecar: true,
        zone: "".parse().unwrap(),
    };
    LocalEndpoints { services: BTreeMap::from([(service_name(), addresses.iter().map(endpoint).collect())]) }
}

pub(super) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, SOON, async || condition()).await.unwrap();
}

/// The SNI for `shop/orders:80`, at any cluster or at `pinned`.
pub(super) fn sni(pinned: Option<&str>) -> String {
    let route = sni::Route { service: service_name(), port: 80, cluster: pinned.map(cluster), selector: None };
    sni::encode(&route, &FEDERATION.parse().unwrap()).unwrap()
}

/// A real TLS 1.3 ClientHello for `name`.
pub(super) fn hello(name: &str) -> Vec<u8> {
    isthmus_identity::install_crypto();
    let config = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
    let mut out = Vec::new();
    client.write_tls(&mut out).unwrap();
    out
}

/// Connects and sends a hello.
pub(super) async fn knock(address: SocketAddr, name: &str) -> TcpStream {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(&hello(name)).await.unwrap();
    tcp
}

/// Reads a ClientHello and nothing after it, as an endpoint's sidecar would; the gateway does not care what comes then.
pub(super) async fn answer_hello(tcp: &mut TcpStream) {
    let mut reader = HelloReader::new(16 * 1024);
    while reader.wanted() > 0 {
        let mut bytes = vec![0; reader.wanted()];
        let n = tcp.read(&mut bytes).await.unwrap();
        assert!(n > 0, "the connection ended before its hello");
        assert!(!matches!(reader.push(&bytes[..n]), Progress::Bad(_)));
    }
}

/// An endpoint that takes connections and leaves them to the test.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    listener: TcpListener,
}

impl Server {
    pub(super) async fn bind() -> Self {
        Self::at(local(0)).await
    }

    pub(super) async fn at(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        Self { address: listener.local_addr().unwrap(), listener }
    }

    /// The next connection, its hello read and `greeting` sent.
    pub(super) async fn greet(&self, greeting: &[u8]) -> TcpStream {
        let mut tcp = self.accept().await;
        answer_hello(&mut tcp).await;
        tcp.write_all(greeting).await.unwrap();
        tcp
    }

    pub(super) async fn accept(&self) -> TcpStream {
        tokio::time::timeout(SOON, self.listener.accept()).await.expect("a connection comes").unwrap().0
    }

    /// Greets every connection with `greeting` and echoes what follows, for ever.
    pub(super) fn echo(self, greeting: &'static [u8]) -> SocketAddr {
        let address = self.address;
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = self.listener.accept().await {
                tokio::spawn(async move {
                    // Probes connect and say nothing.
                    if tcp.peek(&mut [0; 1]).await.unwrap_or(0) == 0 {
                        return;
                    }
                    answer_hello(&mut tcp).await;
                    tcp.write_all(greeting).await.unwrap();
                    let (mut read, mut write) = tcp.split();
                    drop(tokio::io::copy(&mut read, &mut write).await);
                    drop(write.shutdown().await);
                });
            }
        });
        address
    }
}

/// Exactly `n` bytes.
pub(super) async fn read(tcp: &mut TcpStream, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    tokio::time::timeout(SOON, tcp.read_exact(&mut bytes)).await.expect("bytes come").unwrap();
    bytes
}

/// An address that refuses connections: it was free a moment ago.
pub(super) async fn refusing() -> SocketAddr {
    Server::bind().await.address
}
