//! The rival: Envoy in every place, as Istio would run it across clusters.
//!
//! client → sidecar → east-west gateway of the far cluster (SNI passthrough) → sidecar → app, mutual TLS between the
//! sidecars. The apps are the very processes that our side calls. Rows differ in the client's sidecar alone, so all share
//! gateways and server sidecars.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use isthmus_e2e::federation::process::{Binaries, Process};
use isthmus_identity::{ca::CertificateAuthority, keys::KeyPair, svid::Svid};
use isthmus_runtime::files::write_secret;
use serde_json::Value;

use super::{
    fault::{Ending, Readiness, Scope, Victim, ready},
    rival_config::{CLIENT_ID, ClientSidecar, Files, SERVER_ID, Tuning, gateway, sidecar},
};

const TRUST_DOMAIN: &str = "cluster.local";
const CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);
const ADMIN: u16 = 15000;
const PASSTHROUGH: u16 = 15443;
const INBOUND: u16 = 15006;
const OUTBOUND: u16 = 8080;
/// Istio's `terminationDrainDuration`.
const DRAIN: Duration = Duration::from_secs(5);

/// One row: a client's sidecar.
struct Client {
    process: Process,
    address: SocketAddr,
    admin: SocketAddr,
}

/// One Envoy of the far cluster.
struct Server {
    process: Process,
    address: SocketAddr,
    ending: Ending,
}

/// All of the rival's Envoys.
pub(super) struct Rival {
    clients: Vec<Client>,
    /// gateway-1, gateway-2, sidecar of the near cluster.
    near: Vec<Server>,
    /// And of the next choice; nobody touches them.
    _far: Vec<Server>,
}

impl Rival {
    /// Starts all; `apps` are those of the near cluster and of the next choice.
    pub(super) async fn start(dir: &Path, apps: [SocketAddr; 2], rows: &[(&str, Tuning)]) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let envoy = Binaries::find()?.envoy;
        let ca = CertificateAuthority::create(&TRUST_DOMAIN.parse()?, CERTIFICATE_LIFE)?;
        let maker = Maker { dir: dir.to_owned(), envoy, server: issue(&ca, SERVER_ID, dir)? };
        let [near_app, far_app] = apps;
        let near = maker.cluster("near", 2, near_app).await?;
        let far = maker.cluster("far", 3, far_app).await?;
        let files = issue(&ca, CLIENT_ID, dir)?;
        let gateways = |cluster: &[Server]| cluster.iter().take(2).map(|s| s.address).collect::<Vec<_>>();
        let mut clients = vec![];
        for (number, (name, tuning)) in (1..).zip(rows) {
            let ip = host(1, 20 + number);
            let (address, admin) = (SocketAddr::new(ip, OUTBOUND), SocketAddr::new(ip, ADMIN));
            let name = format!("client-{name}");
            let config = ClientSidecar {
                listen: address,
                admin,
                near: &gateways(&near),
                far: &gateways(&far),
                files: &files,
                access_log: &dir.join(format!("{name}-failures.log")),
                tuning,
            };
            let process = maker.envoy(&name, &config.config(), admin).await?;
            clients.push(Client { process, address, admin });
        }
        Ok(Self { clients, near, _far: far })
    }

    /// What the app of that row connects to.
    pub(super) fn target(&self, row: usize) -> anyhow::Result<SocketAddr> {
        Ok(self.clients.get(row).context("no such row")?.address)
    }

    /// Whom a fault hits. Both gateways carry alike, so the first one does.
    pub(super) fn victims(&mut self, scope: Scope) -> Vec<Victim<'_>> {
        let all = match scope {
            Scope::Gateway => 1,
            Scope::Cluster => self.near.len(),
        };
        let servers = self.near.iter_mut().take(all);
        servers
            .map(|server| Victim {
                readiness: Readiness::EnvoyAdmin(SocketAddr::new(server.address.ip(), ADMIN)),
                address: server.address.ip(),
                ending: server.ending,
                process: &mut server.process,
            })
            .collect()
    }

    /// Starts the row's client afresh: ejections last 30 s and longer each time, and the next fault is to find it new.
    pub(super) async fn renew(&mut self, row: usize) -> anyhow::Result<()> {
        let client = self.clients.get_mut(row).context("no such row")?;
        client.process.kill().await?;
        client.process.start()?;
        ready(&mut client.process, Readiness::EnvoyAdmin(client.admin)).await
    }
}

/// Makes Envoys.
struct Maker {
    dir: PathBuf,
    envoy: PathBuf,
    server: Files,
}

impl Maker {
    async fn cluster(&self, name: &str, number: u8, app: SocketAddr) -> anyhow::Result<Vec<Server>> {
        let at = |fourth, port| SocketAddr::new(host(number, fourth), port);
        let inbound = at(20, INBOUND);
        let mut servers = vec![];
        for i in [1, 2] {
            let address = at(10 + i, PASSTHROUGH);
            let admin = at(10 + i, ADMIN);
            let process = self.envoy(&format!("{name}-gateway-{i}"), &gateway(address, admin, inbound), admin).await?;
            let ending = Ending::DrainListeners { path: "/drain_listeners?graceful", then_term_after: DRAIN };
            servers.push(Server { process, address, ending });
        }
        let admin = at(20, ADMIN);
        let config = sidecar(inbound, admin, app, &self.server);
        let process = self.envoy(&format!("{name}-sidecar"), &config, admin).await?;
        let ending = Ending::DrainListeners { path: "/drain_listeners?inboundonly&graceful", then_term_after: DRAIN };
        servers.push(Server { process, address: inbound, ending });
        Ok(servers)
    }

    async fn envoy(&self, name: &str, config: &Value, admin: SocketAddr) -> anyhow::Result<Process> {
        let file = self.dir.join(format!("{name}.json"));
        std::fs::write(&file, format!("{config:#}")).with_context(|| format!("write {}", file.display()))?;
        let mut process = Process::new(name, &self.envoy, &self.dir)
            .arg("--config-path")
            .arg(file)
            // One worker, as our sidecars have. How Istio's agent drains: over 45 s, connections at once.
            .args(["--concurrency", "1", "--drain-time-s", "45", "--drain-strategy", "immediate"])
            .args(["--disable-hot-restart", "--log-level", "warning"]);
        process.start()?;
        ready(&mut process, Readiness::EnvoyAdmin(admin)).await?;
        Ok(process)
    }
}

fn issue(ca: &CertificateAuthority, id: &str, dir: &Path) -> anyhow::Result<Files> {
    let key = KeyPair::generate()?;
    let chain = ca.sign_csr(&key.csr_der()?, &id.parse()?, &[], CERTIFICATE_LIFE)?;
    let chain = Svid::new(chain, &key)?.chain_pem();
    // Leaf first, root last.
    let root = chain.rfind("-----BEGIN").and_then(|at| chain.get(at..)).context("the chain is empty")?;
    let name = id.rsplit('/').next().unwrap_or_default();
    let write = |suffix: &str, text: &str| {
        let path = dir.join(format!("{name}.{suffix}"));
        write_secret(&path, text.as_bytes()).with_context(|| format!("write {}", path.display()))?;
        anyhow::Ok(path.display().to_string())
    };
    Ok(Files { chain: write("pem", &chain)?, key: write("key", &key.to_pem())?, root: write("root.pem", root)? })
}

fn host(third: u8, fourth: u8) -> IpAddr {
    Ipv4Addr::new(127, 20, third, fourth).into()
}
