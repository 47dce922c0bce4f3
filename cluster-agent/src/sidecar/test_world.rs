//! Clusters for tests: the real agent's services (hub, local gRPC, ADS over mutual TLS) without a control plane behind them,
//! real launchers with real Envoys, small apps, and a splice in the place of the gateways.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use axum::{Router, http::HeaderMap, routing::any};
use isthmus_api::{manifest, proto::local::v1::local_server::LocalServer};
use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    grpc::TlsIncoming,
    keys::KeyPair,
    svid::Svid,
    tls::{ClientAuth, IdentitySource, server_config},
    token::{Token, TokenKind, TokenSpec},
};
use isthmus_model::{
    availability::{Availability, Report},
    global::{ClusterInfo, ClusterState, Exporter, GlobalPort, GlobalService, GlobalSnapshot, Locality, Settings},
    ids::{ClusterIndex, Epoch, Revision, ServiceName, SpiffeId, Stamp, TrustDomain, VipIndex},
    local,
    service::{AppProtocol, ServiceKind, ServicePort},
    time::Timestamp,
};
use isthmus_runtime::{
    files::LastKnownGood,
    health::Registry,
    tasks::{Shutdown, Tasks},
    wait::wait_for,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tonic::transport::Server;

use super::{Config, config::Inbound, test_envoy};
use crate::{
    hub::{
        self, Hub, Setup,
        gateways::Hello,
        state::{Event, GatewayEvent, Members, Own, State},
    },
    local::{
        LocalService, Parts,
        auth::Realm,
        tokens::{Subject, Tokens},
    },
    metrics::Metrics,
    source::folder::Manifests,
    status::StatusBoard,
    uplink::control::ControlPlane,
    view::LocalGateway,
    xds::AdsService,
};

pub(super) const DEADLINE: Duration = Duration::from_secs(20);
pub(super) const CART: u16 = 8080;
pub(super) const ORDERS: u16 = 5000;
const CLUSTERS: [&str; 2] = ["us-east", "us-west"];

/// The CAs of a federation of two clusters, with addresses of its own on this machine.
pub(super) struct Federation {
    ca: CertificateAuthority,
    clusters: BTreeMap<String, Arc<CertificateAuthority>>,
    /// 127.a.b.0/24; VIPs lie in the upper half of the range.
    net: [u8; 2],
    pub(super) tasks: Tasks,
}

/// One cluster's agent.
pub(super) struct Agent {
    pub(super) hub: Hub,
    pub(super) status: StatusBoard,
    address: SocketAddr,
    tokens: Tokens,
    /// Ends its servers, as if it had been killed.
    pub(super) stop: Shutdown,
    _dir: tempfile::TempDir,
}

impl Federation {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        isthmus_identity::install_crypto();
        let hour = Duration::from_secs(3600);
        let ca = |td: &str| CertificateAuthority::create(&td.parse().unwrap(), hour).unwrap();
        // Processes and tests side by side must not meet on an address.
        let own = u8::try_from(std::process::id() % 100).unwrap();
        Self {
            ca: ca("isthmus.example"),
            clusters: CLUSTERS.iter().map(|c| (c.to_string(), Arc::new(ca(&format!("{c}.example"))))).collect(),
            net: [100 + own, NEXT.fetch_add(1, Ordering::Relaxed)],
            tasks: Tasks::new(),
        }
    }

    pub(super) fn ip(&self, host: u8) -> IpAddr {
        IpAddr::from([127, self.net[0], self.net[1], host])
    }

    /// Where cart and orders are reached. All clusters share the range here, since one of them calls.
    pub(super) fn vip(&self, service: u8) -> IpAddr {
        self.ip(128 + service)
    }

    /// shop/cart (HTTP) and shop/orders (TCP), exported by both clusters.
    fn snapshot(&self) -> GlobalSnapshot {
        let federation: TrustDomain = "isthmus.example".parse().unwrap();
        let service = |name: &str, index, number, protocol| GlobalService {
            name: ServiceName::new("shop", name).unwrap(),
            index: VipIndex(index),
            kind: ServiceKind::ClusterSetIp,
            ports: vec![GlobalPort {
                port: ServicePort { name: "main".parse().unwrap(), number, protocol },
                clusters: CLUSTERS.iter().map(|c| c.parse().unwrap()).collect(),
            }],
            exporters: CLUSTERS.iter().map(|c| (c.parse().unwrap(), exporter(c, name))).collect(),
            conflicts: Vec::new(),
        };
        let services = [service("cart", 1, CART, AppProtocol::Http), service("orders", 2, ORDERS, AppProtocol::Tcp)];
        let info = |(index, (name, ca)): (u16, (&String, &Arc<CertificateAuthority>))| ClusterInfo {
            name: name.parse().unwrap(),
            index: ClusterIndex(index),
            locality: Locality { region: "us".parse().unwrap(), zone: name.parse().unwrap() },
            state: ClusterState::Active,
            bundle: ca.bundle(),
            gateways: Vec::new(),
            grant: Default::default(),
        };
        GlobalSnapshot {
            stamp: Stamp { epoch: Epoch(1), revision: Revision(1) },
            federation,
            federation_bundle: self.ca.bundle(),
            settings: Settings::default(),
            clusters: (1..).zip(&self.clusters).map(info).map(|c| (c.name.clone(), c)).collect(),
            services: services.into_iter().map(|s| (s.name.clone(), s.into())).collect(),
        }
    }

    /// An agent whose manifests put cart at `cart` and orders at `orders`.
    pub(super) async fn agent(&self, cluster: &str, cart: u8, orders: u8, lifetime: Duration) -> Agent {
        let dir = tempfile::tempdir().unwrap();
        let status = StatusBoard::new();
        let ca = Arc::clone(&self.clusters[cluster]);
        let [a, b] = self.net;
        let own = Own {
            cluster: cluster.parse().unwrap(),
            trust_domain: ca.trust_domain().clone(),
            vip_range: format!("127.{a}.{b}.128/25").parse().unwrap(),
            zone: cluster.parse().unwrap(),
            workload_lifetime: lifetime,
        };
        let text = manifests(&[("cart", CART, "http", self.ip(cart)), ("orders", ORDERS, "tcp", self.ip(orders))]);
        let objects: Vec<_> = manifest::parse("shop.yaml", &text).into_iter().map(|o| o.unwrap()).collect();
        let files = [("shop.yaml".to_owned(), objects.into())].into();
        let manifests = Arc::new(Manifests { files, synced: true, ..Default::default() });
        let global = Arc::new(self.snapshot());
        let now = Timestamp(isthmus_runtime::now());
        let state = State::new(own, global, Arc::clone(&manifests), Members::default(), now);
        let disk = LastKnownGood::new(dir.path().join("members.lkg"), 1);
        // The source never changes here; its sender may go only with the test.
        let source = Box::leak(Box::new(watch::Sender::new(manifests))).subscribe();
        let hub = hub::start(&self.tasks, Setup { state, manifests: source, disk, status: status.clone() });

        let id = SpiffeId::component(&"isthmus.example".parse().unwrap(), &cluster.parse().unwrap(), "agent").unwrap();
        let identity = IdentitySource::new(sign(&self.ca, &id));
        let trust = TrustStore::new();
        trust.set(self.roots(&[cluster]));
        let realm = Realm {
            cluster: cluster.parse().unwrap(),
            federation: "isthmus.example".parse().unwrap(),
            trust_domain: ca.trust_domain().clone(),
        };
        let policy = {
            let realm = realm.clone();
            Arc::new(move |id: &SpiffeId| realm.caller(id).is_some())
        };
        let tls = server_config(&identity, &trust, ClientAuth::Optional(policy), &[b"h2"]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tokens = Tokens::open(dir.path().join("tokens.json")).unwrap();
        let stop = Shutdown::new();
        let nodes = LastKnownGood::new(dir.path().join("control-plane.lkg"), 1);
        let local = LocalService::new(Parts {
            control: ControlPlane::new("127.0.0.1:1", nodes, &realm.federation, &identity, &trust).unwrap(),
            realm,
            hub: hub.clone(),
            status: status.clone(),
            tokens: tokens.clone(),
            ca,
            workload_lifetime: lifetime,
            metrics: Metrics::new(&mut Registry::default()),
            tasks: self.tasks.clone(),
            shutdown: stop.clone(),
        });
        let ads = AdsService::new(hub.view.clone(), status.clone(), stop.clone());
        let server = Server::builder().add_service(LocalServer::new(local)).add_service(ads.into_server());
        let ended = stop.clone();
        self.tasks.spawn("agent", async move {
            let incoming = TlsIncoming::new(listener, Arc::new(tls));
            server.serve_with_incoming_shutdown(incoming, async move { ended.requested().await }).await.unwrap();
        });
        Agent { hub, status, address, tokens, stop, _dir: dir }
    }

    /// Trust in the federation and in these clusters.
    pub(super) fn roots(&self, clusters: &[&str]) -> super::secrets::Roots {
        let own = clusters.iter().map(|c| &*self.clusters[*c]);
        own.chain([&self.ca]).map(|ca| (ca.trust_domain().clone(), vec![ca.root_der().clone()])).collect()
    }

    /// A certificate that the cluster's CA signed.
    pub(super) fn workload(&self, cluster: &str, account: &str) -> Svid {
        let id = format!("spiffe://{cluster}.example/ns/shop/sa/{account}").parse().unwrap();
        sign(&self.clusters[cluster], &id)
    }

    /// A launcher's configuration, with a fresh token of `agent`.
    pub(super) fn sidecar(&self, agent: &Agent, cluster: &str, account: &str, host: u8, dir: &Path) -> Config {
        let subject = Subject::Workload { namespace: "shop".parse().unwrap(), service_account: account.to_owned() };
        let now = Timestamp(isthmus_runtime::now());
        let token = Token::mint(TokenSpec {
            kind: TokenKind::Local,
            address: agent.address.to_string(),
            ca_pin: self.ca.root_sha256(),
            cluster: cluster.parse().unwrap(),
            subject: subject.text(),
            expires_at: now + DEADLINE,
        });
        agent.tokens.add(&token.secret, subject, token.expires_at, now).unwrap();
        std::fs::write(dir.join("token"), token.encode()).unwrap();
        Config {
            name: format!("{account}-{cluster}"),
            agent_token_file: dir.join("token"),
            state_dir: dir.join("state"),
            address: self.ip(host),
            envoy_log: Some(dir.join("envoy.log")),
            ..test_envoy::config(dir)
        }
    }

    /// Carries bytes from one address to another, as the gateways do once they have chosen.
    pub(super) async fn splice(&self, from: SocketAddr, to: SocketAddr) {
        let listener = TcpListener::bind(from).await.unwrap();
        let (tasks, over) = (self.tasks.clone(), self.tasks.shutdown());
        let carry = async move {
            while let Ok((mut near, _)) = listener.accept().await {
                tasks.spawn("splice", async move {
                    if let Ok(mut far) = TcpStream::connect(to).await {
                        let _ = copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        };
        self.tasks.spawn("splice", async move {
            tokio::select! {
                () = over.requested() => {}
                () = carry => {}
            }
        });
    }
}

impl Agent {
    /// Registers a gateway at `ip` that knows both clusters to be well.
    pub(super) async fn gateway(&self, ip: IpAddr) {
        let session = self.hub.session();
        let hello = local::LocalGateway {
            name: "gateway-1".to_owned(),
            tunnel: Some(SocketAddr::new(ip, 15443)),
            local_ip: ip,
            auto_port: 15440,
            pinned_port_base: 15500,
        };
        let gateway = LocalGateway { hello, draining: false };
        let hello = Hello { gateway, instance: String::new() };
        let up = Availability { ready: 1, total: 1, reachable: true };
        let report = |service: &str| Report {
            service: ServiceName::new("shop", service).unwrap(),
            cluster: "us-west".parse().unwrap(),
            current: up,
            recovered_at: None,
        };
        for event in [GatewayEvent::Hello(hello), GatewayEvent::Report(vec![report("cart"), report("orders")])] {
            self.hub.send(Event::Gateway("gateway-1".to_owned(), session, event)).await.unwrap();
        }
    }

    /// Waits until a service has a ready endpoint in this cluster.
    pub(super) async fn serves(&self, service: &str) {
        let name = ServiceName::new("shop", service).unwrap();
        let mut view = self.hub.view.clone();
        let ready = view.wait_for(|view| view.endpoints.of(&name).iter().any(|e| e.ready));
        tokio::time::timeout(DEADLINE, ready).await.expect("no ready endpoint").unwrap();
    }

    /// Waits until the sidecar's Envoy has applied the present revision.
    pub(super) async fn applied(&self, sidecar: &str) {
        let stamp = self.hub.view.borrow().global.stamp;
        let applied = async || {
            let standing = self.status.standing().consumers;
            standing.iter().any(|c| c.name == sidecar && c.applied == Some(stamp) && c.connected)
        };
        wait_for(&format!("{sidecar} to apply {stamp}"), DEADLINE, applied).await.unwrap();
    }

    /// What Envoy refuses.
    pub(super) fn problems(&self, sidecar: &str) -> Vec<String> {
        let standing = self.status.standing().consumers;
        standing.into_iter().filter(|c| c.name == sidecar).flat_map(|c| c.problems).collect()
    }
}

pub(super) fn inbound(port: u16, app: SocketAddr, protocol: AppProtocol) -> Inbound {
    Inbound { port, app, protocol }
}

/// An HTTP app that answers with its name, the method, and the caller that the sidecar names. Ends with the returned token.
pub(super) async fn http_app(tasks: &Tasks, name: &'static str) -> (SocketAddr, Shutdown) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = move |method: axum::http::Method, headers: HeaderMap| async move {
        let caller = headers.get("x-forwarded-client-cert").and_then(|v| v.to_str().ok()).unwrap_or("nobody");
        // An app that ends closes its idle connections when it likes. A request that its sidecar sends on one right then is
        // lost, and a POST must not be repeated: so there are none.
        let headers = [("x-isthmus-unreached", "forged"), ("connection", "close")];
        (headers, format!("{name} {method} {caller}"))
    };
    let stop = Shutdown::new();
    let (ended, over, router) = (stop.clone(), tasks.shutdown(), Router::new().fallback(any(answer)));
    tasks.spawn("app", async move {
        tokio::select! {
            () = ended.requested() => {}
            () = over.requested() => {}
            served = axum::serve(listener, router) => served.unwrap(),
        }
    });
    (address, stop)
}

/// The Envoys whose bootstrap lies in `dir`.
pub(super) fn envoys(dir: &Path) -> BTreeSet<u32> {
    let bootstrap = dir.join("state/envoy.json");
    let runs = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).any(|arg| Path::new(std::str::from_utf8(arg).unwrap_or_default()) == bootstrap)
    };
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(runs).collect()
}

pub(super) fn envoy_log(dir: &Path) -> String {
    let path: PathBuf = dir.join("envoy.log");
    std::fs::read_to_string(path).unwrap_or_default()
}

fn exporter(cluster: &str, account: &str) -> Exporter {
    let id = format!("spiffe://{cluster}.example/ns/shop/sa/{account}");
    Exporter { created_at: Timestamp(1), identities: [id.parse().unwrap()].into() }
}

fn sign(ca: &CertificateAuthority, id: &SpiffeId) -> Svid {
    let key = KeyPair::generate().unwrap();
    let chain = ca.sign_csr(&key.csr_der().unwrap(), id, &[], Duration::from_secs(600)).unwrap();
    Svid::new(chain, &key).unwrap()
}

fn manifests(services: &[(&str, u16, &str, IpAddr)]) -> String {
    let mut text = String::new();
    for (name, port, protocol, ip) in services {
        text += &format!(
            "---
apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: shop }}
spec: {{ ports: [{{ name: main, port: {port}, appProtocol: {protocol} }}] }}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{ name: {name}-1, namespace: shop, labels: {{ kubernetes.io/service-name: {name} }} }}
addressType: IPv4
endpoints: [{{ addresses: ['{ip}'], conditions: {{ ready: true }} }}]
ports: [{{ name: main, port: 8443 }}]
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {{ name: {name}, namespace: shop }}
"
        );
    }
    text
}
