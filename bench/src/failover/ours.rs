//! Our side: the demo's federation, real in every part, with only the apps that this needs.
//!
//! us-east has the client's sidecar and no cart of its own; us-west is the near far cluster, eu-central the next choice.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, time::Duration};

use anyhow::Context;
use isthmus_e2e::{
    federation::{
        self, Federation, START_DEADLINE,
        cluster::Cluster,
        layout::{Base, ClusterLayout},
        process::http_get,
    },
    shop::web::{Shop, ports},
};
use tokio::time::{Instant, sleep, timeout};

use super::fault::{Ending, Readiness, Scope, Victim};

/// Where the client is.
const HOME: &str = "us-east";
/// The first choice: the one that is hit.
pub(super) const NEAR: &str = "us-west";
/// The next choice.
pub(super) const FAR: &str = "eu-central";
/// Traffic returns so long after a recovery. Shorter than the default, for the benchmark's own sake: it plays no part in
/// failing over.
const HOLD_DOWN: Duration = Duration::from_secs(3);
const CART: &str = "cart";

/// A running federation.
pub(super) struct Ours {
    federation: Federation,
    /// What the app in us-east connects to.
    pub(super) target: SocketAddr,
}

impl Ours {
    /// Starts it and waits until cart has its VIP in us-east.
    pub(super) async fn start(dir: &Path) -> anyhow::Result<Self> {
        let options = federation::Options { dir: dir.to_owned(), hold_down: HOLD_DOWN, layout: Base::default() };
        let mut federation = Federation::start(options).await?;
        for (number, (name, region)) in (1..).zip([(HOME, "us"), (NEAR, "us"), (FAR, "eu")]) {
            let layout = only_needed(federation.layout(name, number, region));
            federation.join(layout).await?.start_workloads().await?;
        }
        for cluster in federation.clusters.values() {
            cluster.write_manifests()?;
        }
        let shop = Shop::new(federation.cluster(HOME)?.layout.dns)?;
        let vip = timeout(START_DEADLINE, async {
            loop {
                match shop.resolve(CART).await {
                    Ok(vip) => return vip,
                    Err(_) => sleep(Duration::from_millis(50)).await,
                }
            }
        });
        let vip = vip.await.context("us-east's DNS has no address for cart")?;
        federation.ctl.run(&["wait", "--timeout", "30s"]).await.context("wait for every consumer")?;
        Ok(Self { federation, target: SocketAddr::new(vip, ports::CART) })
    }

    /// Where the app of the cluster listens, behind its sidecar.
    pub(super) fn app(&self, cluster: &str) -> anyhow::Result<SocketAddr> {
        let workloads = &self.federation.clusters.get(cluster).context("no such cluster")?.workloads;
        let layout = &workloads.get(CART).context("no cart there")?.layout;
        layout.ports.first().map(|(_, _, app, _)| *app).context("cart has no port")
    }

    /// Whom a fault hits, by name. Of the gateways, the one that carries the most: a fault elsewhere proves nothing.
    pub(super) async fn choose(&self, scope: Scope) -> anyhow::Result<Vec<String>> {
        let carried = self.carried().await?;
        let mut names: Vec<String> = match scope {
            Scope::Gateway => {
                let busiest = carried.iter().max_by_key(|(_, open)| **open).filter(|(_, open)| **open > 0);
                vec![busiest.context("no gateway of us-west carries anything")?.0.clone()]
            }
            Scope::Cluster => self.near()?.gateways.keys().cloned().collect(),
        };
        if scope == Scope::Cluster {
            names.push(CART.to_owned());
        }
        Ok(names)
    }

    /// The processes of those names.
    pub(super) fn victims(&mut self, names: &[String]) -> anyhow::Result<Vec<Victim<'_>>> {
        let Cluster { layout, gateways, workloads, .. } = self.federation.cluster(NEAR)?;
        let gateways = gateways.iter_mut().filter(|(name, _)| names.contains(name)).filter_map(|(name, process)| {
            let address = layout.gateways.iter().find(|g| g.name == *name)?.local;
            Some(Victim { process, address, ending: Ending::Term, readiness: Readiness::Health })
        });
        let sidecars = workloads.iter_mut().filter(|(name, _)| names.contains(name)).map(|(_, workload)| Victim {
            process: &mut workload.sidecar,
            address: workload.layout.ip,
            ending: Ending::Term,
            readiness: Readiness::Health,
        });
        Ok(gateways.chain(sidecars).collect())
    }

    /// Both gateways of us-west are connected to both of us-east.
    pub(super) async fn is_whole(&self) -> anyhow::Result<bool> {
        let mut whole = true;
        for gateway in &self.federation.clusters.get(HOME).context("no us-east")?.layout.gateways {
            let tunnels = tunnels(gateway.health).await?;
            let up = tunnels.iter().filter(|t| t.cluster == NEAR && t.up && !t.draining && !t.suspect);
            whole &= up.count() == self.near()?.gateways.len();
        }
        Ok(whole)
    }

    /// Ends every process.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        self.federation.stop(Duration::from_secs(10)).await
    }

    /// Connections from us-east through each gateway of us-west.
    async fn carried(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let mut carried = BTreeMap::new();
        for gateway in &self.federation.clusters.get(HOME).context("no us-east")?.layout.gateways {
            for tunnel in tunnels(gateway.health).await?.into_iter().filter(|t| t.cluster == NEAR) {
                *carried.entry(tunnel.gateway).or_default() += tunnel.open_streams;
            }
        }
        Ok(carried)
    }

    fn near(&self) -> anyhow::Result<&Cluster> {
        self.federation.clusters.get(NEAR).context("no us-west")
    }
}

/// A line of a gateway's `/debug/tunnels`.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tunnel {
    cluster: String,
    gateway: String,
    up: bool,
    suspect: bool,
    draining: bool,
    open_streams: u64,
}

async fn tunnels(gateway: SocketAddr) -> anyhow::Result<Vec<Tunnel>> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let get = http_get(gateway, "/debug/tunnels");
    let (status, body) =
        tokio::time::timeout_at(deadline, get).await.context("a gateway's /debug/tunnels is silent")??;
    anyhow::ensure!(status == 200, "/debug/tunnels of {gateway} says {status}");
    serde_json::from_str(&body).with_context(|| format!("/debug/tunnels of {gateway} is not understood: {body}"))
}

/// The caller in us-east, the callee elsewhere.
fn only_needed(mut layout: ClusterLayout) -> ClusterLayout {
    let needed = if layout.name == HOME { "web" } else { CART };
    layout.workloads.retain(|w| w.app == needed);
    for workload in &mut layout.workloads {
        workload.upstreams.retain(|u| *u == CART);
    }
    layout
}
