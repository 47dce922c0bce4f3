//! Gateways as processes of their own, so that their memory and files can be measured and one can be killed: this test's
//! own program, started again, with the gateway in it. They take their identity and their view from a folder that the
//! test writes; addresses are the system's choice.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use isthmus_e2e::federation::process::{Process, http_get};
use isthmus_gateway::{Feed, Given, View, build};
use isthmus_identity::{bundle::TrustStore, ca::CertificateAuthority, keys::KeyPair, svid::Svid, tls::IdentitySource};
use isthmus_model::{
    global::{ClusterInfo, ClusterState, Exporter, GlobalPort, GlobalService, GlobalSnapshot, Locality, Settings},
    ids::{ClusterIndex, ClusterName, Epoch, Revision, ServiceName, SpiffeId, Stamp, VipIndex},
    local::{Endpoint, LocalEndpoints},
    service::{AppProtocol, GatewayAddress, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};
use isthmus_runtime::{files, wait::wait_for};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    time::{interval, timeout},
};

pub(crate) const FEDERATION: &str = "isthmus.example";
/// Names the folder of a gateway process; set, this program is one.
const FOLDER: &str = "ISTHMUS_TEST_GATEWAY_DIR";
pub(crate) const DAY: Duration = Duration::from_secs(86_400);
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// What carries the streams between the gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Quic,
    Tcp,
}

impl Transport {
    /// As the configuration and the folders say it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        }
    }

    /// Files by which a gateway at rest may differ from itself at rest: sockets of peers that are being dialled, and over
    /// TCP four warm connections each way of each of two links.
    pub(crate) fn slack(self) -> usize {
        match self {
            Self::Quic => 4,
            Self::Tcp => 4 + 4 * 2 * 2,
        }
    }
}

/// Where a gateway is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Addresses {
    pub(crate) tunnel: SocketAddr,
    pub(crate) auto: SocketAddr,
    pub(crate) health: SocketAddr,
}

/// What a gateway is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) revision: u64,
    /// Cluster → its gateways.
    pub(crate) clusters: BTreeMap<String, BTreeMap<String, SocketAddr>>,
    /// The own cluster's endpoints of `shop/orders`.
    pub(crate) endpoints: Vec<SocketAddr>,
}

/// Two clusters, east and west, and the gateways between them. Clients enter in the east; endpoints are in the west.
pub(crate) struct World {
    pub(crate) gateways: BTreeMap<(&'static str, &'static str), Gateway>,
    pub(crate) transport: Transport,
    endpoints: Vec<SocketAddr>,
    revision: u64,
}

/// One gateway process.
pub(crate) struct Gateway {
    dir: PathBuf,
    process: Process,
    pub(crate) at: Addresses,
}

impl World {
    /// One gateway in the east, `western` in the west, in processes whose files are in `dir`.
    /// The gateways of west are these; each link may have so many streams.
    pub(crate) async fn start(
        dir: &Path,
        transport: Transport,
        (western, streams): (&[&'static str], u32),
        endpoints: &[SocketAddr],
    ) -> Self {
        drop(fs::remove_dir_all(dir));
        let ca = CertificateAuthority::create(&FEDERATION.parse().unwrap(), DAY).unwrap();
        let mut world = Self { gateways: BTreeMap::new(), transport, endpoints: endpoints.to_vec(), revision: 0 };
        let western = western.iter().map(|name| ("west", *name));
        for (cluster, name) in [("east", "gateway-1")].into_iter().chain(western) {
            let gateway = Gateway::start(dir, &ca, (cluster, name), (transport, streams)).await;
            world.gateways.insert((cluster, name), gateway);
        }
        world.tell();
        world.ready().await;
        world
    }

    pub(crate) fn east(&self) -> &Gateway {
        &self.gateways[&("east", "gateway-1")]
    }

    /// Tells all gateways of all.
    pub(crate) fn tell(&mut self) {
        self.revision += 1;
        let mut clusters: BTreeMap<String, BTreeMap<String, SocketAddr>> = BTreeMap::new();
        for ((cluster, name), gateway) in &self.gateways {
            clusters.entry((*cluster).to_owned()).or_default().insert((*name).to_owned(), gateway.at.tunnel);
        }
        for ((cluster, _), gateway) in &self.gateways {
            let endpoints = if *cluster == "west" { self.endpoints.clone() } else { Vec::new() };
            let facts = Facts { revision: self.revision, clusters: clusters.clone(), endpoints };
            files::write_atomic(&gateway.dir.join("facts.json"), &serde_json::to_vec(&facts).unwrap()).unwrap();
        }
    }

    /// Waits until clients can come.
    async fn ready(&self) {
        let health = self.east().at.health;
        let western = self.gateways.keys().filter(|(cluster, _)| *cluster == "west").count();
        let ready = async || useful_tunnels(health).await == western;
        wait_for("the east has its tunnels, and endpoints behind them", SOON, ready)
            .await
            .unwrap_or_else(|e| panic!("{e}; logs: {}", self.logs()));
    }

    pub(crate) fn logs(&self) -> String {
        self.east().process.log().parent().unwrap().display().to_string()
    }

    /// Ends all processes.
    pub(crate) async fn stop(mut self) {
        for gateway in self.gateways.values_mut() {
            gateway.process.kill().await.unwrap();
        }
    }
}

impl Gateway {
    async fn start(
        dir: &Path,
        ca: &CertificateAuthority,
        (cluster, name): (&str, &str),
        (transport, streams): (Transport, u32),
    ) -> Self {
        let config = |dir: &Path, at| {
            let mut config = config(dir, name, at, transport);
            config["tunnel"]["maxStreamsPerPeer"] = streams.into();
            config.to_string()
        };
        let own = dir.join(format!("{cluster}-{name}"));
        fs::create_dir_all(&own).unwrap();
        let id = SpiffeId::component(&FEDERATION.parse().unwrap(), &cluster.parse().unwrap(), "gateway").unwrap();
        let key = KeyPair::generate().unwrap();
        let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], DAY).unwrap();
        Svid::new(chain, &key).unwrap().save(&own, "gateway").unwrap();
        fs::write(own.join("root.der"), ca.root_der()).unwrap();
        fs::write(own.join("config.json"), config(&own, None)).unwrap();
        let program = std::env::current_exe().unwrap();
        let variable = format!("{FOLDER}={}", own.display());
        let process = Process::new(format!("{cluster}/{name}"), Path::new("env"), dir)
            .arg(variable)
            .arg(program)
            .args(["--exact", "gateway_process", "--ignored", "--nocapture"]);
        let anywhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let at = Addresses { tunnel: anywhere, auto: anywhere, health: anywhere };
        let mut gateway = Self { dir: own, process, at };
        gateway.restart().await;
        // It comes back at the same place.
        fs::write(gateway.dir.join("config.json"), config(&gateway.dir, Some(gateway.at))).unwrap();
        gateway
    }

    /// Kills it, if it runs, and starts it again; returns when it is bound.
    pub(crate) async fn restart(&mut self) {
        self.process.kill().await.unwrap();
        let file = self.dir.join("addresses.json");
        drop(fs::remove_file(&file));
        self.process.start().unwrap();
        let bound = || fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        wait_for("a gateway process is bound", SOON, async || bound().is_some() || !self.process.is_running())
            .await
            .unwrap();
        self.at = bound().unwrap_or_else(|| panic!("a gateway did not start; {}", self.process.tail()));
    }

    /// SIGKILL.
    pub(crate) async fn kill(&mut self) {
        self.process.kill().await.unwrap();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid().expect("the gateway runs")
    }

    /// Connections that it carries now, by its own count of streams.
    pub(crate) async fn open_streams(&self) -> Option<u64> {
        let tunnels = get(self.at.health, "/debug/tunnels").await?;
        Some(tunnels.iter().filter_map(|t| t["openStreams"].as_u64()).sum())
    }
}

/// A debug build on a busy machine gets time for everything: this is not about speed. No slow reader is given up, as
/// happens when there are too many for a link's window, and no connection turned away, as an overloaded gateway does.
pub(crate) fn config(dir: &Path, name: &str, at: Option<Addresses>, transport: Transport) -> serde_json::Value {
    let anywhere = "127.0.0.1:0".to_owned();
    let (tunnel, health) = at.map_or((anywhere.clone(), anywhere), |a| (a.tunnel.to_string(), a.health.to_string()));
    serde_json::json!({
        "name": name,
        "stateDir": dir,
        "listen": {
            "tunnel": tunnel, "local": "127.0.0.1", "autoPort": at.map_or(0, |a| a.auto.port()), "pinnedPortBase": 0,
            "health": health,
        },
        "tunnel": {
            "transport": transport.word(), "deadAfter": "20s", "idleTimeout": "60s", "handshakeTimeout": "30s",
            "dialBackoffMax": "500ms", "connectionWindowBytes": 256 << 20, "tcp": { "userTimeout": "30s", "maxPendingHandshakesPerSource": 1024, "idleTimeout": "5s" },
        },
        "ingress": {
            "helloTimeout": "30s", "attemptTimeout": "30s", "pinnedTimeout": "30s", "maxPendingHellosPerSource": 4096,
        },
        "egress": { "connectTimeout": "20s" },
        "overload": { "maxSchedulingDelay": "30s" },
        "telemetry": { "log": { "level": "info", "format": "text" } },
    })
}

/// The gateway process itself. Ends when it is killed.
pub(crate) async fn serve() {
    let Some(dir) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    isthmus_identity::install_crypto();
    isthmus_runtime::open_files::raise();
    let config: isthmus_gateway::Config = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    let telemetry = isthmus_runtime::telemetry::init("isthmus-gateway", &config.name, &config.telemetry).unwrap();
    let svid = Svid::load(&dir, "gateway").unwrap().unwrap();
    let cluster: ClusterName = svid.id().segments().nth(1).unwrap().parse().unwrap();
    let trust = TrustStore::new();
    let root = CertificateDer::from(fs::read(dir.join("root.der")).unwrap());
    trust.set([(FEDERATION.parse().unwrap(), vec![root])].into());
    let (view, seen) = watch::channel(Arc::default());
    let given = Given {
        cluster,
        federation: FEDERATION.parse().unwrap(),
        identity: IdentitySource::new(svid),
        trust,
        view: seen,
    };
    let bound = build(config, Feed::Given(given)).await.unwrap();
    let at = Addresses { tunnel: bound.tunnel_addr(), auto: bound.auto_addr(), health: bound.health_addr() };
    files::write_atomic(&dir.join("addresses.json"), &serde_json::to_vec(&at).unwrap()).unwrap();
    let facts = dir.join("facts.json");
    tokio::select! {
        ended = bound.run(std::future::pending()) => panic!("the gateway ended: {ended:?}"),
        () = follow(&facts, &view) => {}
    }
    drop(telemetry);
}

async fn follow(file: &Path, view: &watch::Sender<Arc<View>>) {
    let mut known = Facts::default();
    let mut tick = interval(Duration::from_millis(20));
    loop {
        tick.tick().await;
        // Written atomically: what is there is whole.
        let facts: Option<Facts> = fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(facts) = facts.filter(|facts| *facts != known) {
            view.send_replace(Arc::new(facts.view()));
            known = facts;
        }
    }
}

impl Facts {
    pub(crate) fn view(&self) -> View {
        let names: BTreeSet<ClusterName> = self.clusters.keys().map(|name| name.parse().unwrap()).collect();
        let exporter = Exporter { created_at: Timestamp(1), identities: BTreeSet::new() };
        let orders = GlobalService {
            name: service(),
            index: VipIndex(1),
            kind: ServiceKind::ClusterSetIp,
            ports: vec![GlobalPort {
                port: ServicePort { name: "tcp".parse().unwrap(), number: 80, protocol: AppProtocol::Tcp },
                clusters: names.clone(),
            }],
            exporters: names.iter().map(|name| (name.clone(), exporter.clone())).collect(),
            conflicts: Vec::new(),
        };
        let cluster = |(i, (name, gateways)): (usize, (&String, &BTreeMap<String, SocketAddr>))| {
            let address = |(name, at): (&String, &SocketAddr)| GatewayAddress { name: name.clone(), tunnel: Some(*at) };
            let info = ClusterInfo {
                name: name.parse().unwrap(),
                index: ClusterIndex(u16::try_from(i + 1).unwrap()),
                locality: Locality { region: "us".parse().unwrap(), zone: name.parse().unwrap() },
                state: ClusterState::Active,
                bundle: no_bundle(&format!("{name}.example")),
                gateways: gateways.iter().map(address).collect(),
                grant: Default::default(),
            };
            (info.name.clone(), info)
        };
        let global = GlobalSnapshot {
            stamp: Stamp { epoch: Epoch(1), revision: Revision(self.revision) },
            federation: FEDERATION.parse().unwrap(),
            federation_bundle: no_bundle(FEDERATION),
            settings: Settings::default(),
            clusters: self.clusters.iter().enumerate().map(cluster).collect(),
            services: [(service(), orders.into())].into(),
        };
        let endpoint = |at: &SocketAddr| Endpoint {
            ip: at.ip(),
            ports: BTreeMap::from([("tcp".parse().unwrap(), at.port())]),
            ready: true,
            has_sidecar: true,
            zone: "".parse().unwrap(),
        };
        let endpoints =
            LocalEndpoints { services: [(service(), self.endpoints.iter().map(endpoint).collect())].into() };
        View { global: Some(Arc::new(global)), endpoints: Arc::new(endpoints) }
    }
}

pub(crate) fn service() -> ServiceName {
    ServiceName::new("shop", "orders").unwrap()
}

fn no_bundle(domain: &str) -> TrustBundle {
    TrustBundle {
        trust_domain: domain.parse().unwrap(),
        document: r#"{"keys":[]}"#.to_owned(),
        predecessor_signature: Vec::new(),
    }
}

/// To how many peers with endpoints the gateway whose health server is `at` has tunnels.
pub(crate) async fn useful_tunnels(at: SocketAddr) -> usize {
    let useful = |t: &&serde_json::Value| t["up"] == true && t["ready"]["shop/orders"].as_u64() > Some(0);
    get(at, "/debug/tunnels").await.unwrap_or_default().iter().filter(useful).count()
}

/// The JSON of a 200 from a gateway's health server.
pub(crate) async fn get(at: SocketAddr, path: &str) -> Option<Vec<serde_json::Value>> {
    let (status, body) = timeout(Duration::from_secs(5), http_get(at, path)).await.ok()?.ok()?;
    (status == 200).then(|| serde_json::from_str(&body).ok()).flatten()
}
