//! The federation on one machine: a control plane and clusters of real processes on loopback addresses, without root.
//!
//! `layout` says what lives at which address; `process` starts, kills and watches one program; `manifests` writes a
//! cluster's Kubernetes objects; [`Federation`] puts them together.

pub mod cluster;
pub mod ctl;
pub mod envfile;
pub mod layout;
pub mod manifests;
pub mod process;

use std::{
    collections::BTreeMap,
    fs::File,
    net::TcpListener,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};

use self::{
    cluster::Cluster,
    ctl::Isthmusctl,
    layout::{ClusterLayout, ControlPlaneLayout},
    process::{Binaries, Process},
};

/// How long any single start may take on a busy two-core machine.
pub const START_DEADLINE: Duration = Duration::from_secs(30);

/// What a federation needs to know before it starts.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder for state, configs and logs; emptied first.
    pub dir: PathBuf,
    /// Recovered clusters wait this long before traffic returns.
    pub hold_down: Duration,
    /// First port of everything, so that two federations can run at once.
    pub layout: layout::Base,
}

/// A running federation. Dropping it kills every process.
pub struct Federation {
    /// Where its files are.
    pub dir: PathBuf,
    /// The programs it runs.
    pub binaries: Binaries,
    /// The control plane.
    pub control_plane: Process,
    /// `isthmusctl`, set up with administrator credentials.
    pub ctl: Isthmusctl,
    /// By name.
    pub clusters: BTreeMap<String, Cluster>,
    base: layout::Base,
    /// Released when the federation is dropped.
    _lock: File,
}

impl Federation {
    /// Starts the control plane alone and waits until it is ready.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let Options { dir, hold_down, layout: base } = options;
        // Before anything is emptied: a federation that runs must not lose its state to a second start.
        let lock = alone(&dir)?;
        let addresses = ControlPlaneLayout::new(base);
        for address in [addresses.grpc, addresses.admin, addresses.health] {
            drop(TcpListener::bind(address).with_context(|| {
                format!(
                    "{address} cannot be used; does another demo run? (`ss -ltnp | grep {}` says who)",
                    address.ip()
                )
            })?);
        }
        empty(&dir)?;
        let binaries = Binaries::find()?;
        let layout = ControlPlaneLayout::new(base);
        let config = dir.join("global-cp.yaml");
        std::fs::write(&config, layout.config(&dir.join("global-cp"), hold_down)).context("write the configuration")?;
        let mut control_plane =
            Process::new("global-cp", &binaries.global_cp, &dir).arg("--config").arg(&config).health(layout.health);
        control_plane.start()?;
        control_plane.ready(START_DEADLINE).await?;
        let ctl = Isthmusctl::new(&binaries.isthmusctl, &dir.join("global-cp/admin/context.yaml"));
        Ok(Self { dir, binaries, control_plane, ctl, clusters: BTreeMap::new(), base, _lock: lock })
    }

    /// Joins a cluster: agent, gateways and DNS, each ready. No workloads and no manifests yet.
    pub async fn join(&mut self, layout: ClusterLayout) -> anyhow::Result<&mut Cluster> {
        let name = layout.name.clone();
        let token = self.ctl.run(&["cluster", "join-token", &name]).await?;
        let cluster = Cluster::start(&self.dir, &self.binaries, layout, &token).await?;
        Ok(self.clusters.entry(name).insert_entry(cluster).into_mut())
    }

    /// A cluster's addresses in this federation.
    pub fn layout(&self, name: &str, number: u8, region: &str) -> ClusterLayout {
        ClusterLayout::new(self.base, name, number, region)
    }

    /// The cluster `name`, which must have joined.
    pub fn cluster(&mut self, name: &str) -> anyhow::Result<&mut Cluster> {
        self.clusters.get_mut(name).with_context(|| format!("no cluster {name}"))
    }

    /// SIGTERM to all, then SIGKILL to what is left after `grace`.
    pub async fn stop(&mut self, grace: Duration) -> anyhow::Result<()> {
        let clusters = self.clusters.values_mut().flat_map(Cluster::processes_mut);
        let mut all: Vec<&mut Process> = clusters.chain(std::iter::once(&mut self.control_plane)).collect();
        for process in &mut all {
            process.terminate();
        }
        let deadline = tokio::time::Instant::now() + grace;
        for process in &mut all {
            process.reap_until(deadline).await;
        }
        ensure!(all.iter_mut().all(|p| !p.is_running()), "a process outlived SIGKILL");
        Ok(())
    }
}

/// In a folder that a federation may empty.
const MARKER: &str = ".isthmus-federation";

/// Makes `dir` an empty folder of ours; refuses to empty one that was not.
fn empty(dir: &Path) -> anyhow::Result<()> {
    let used = std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    if used {
        let ours = dir.join(MARKER).exists();
        ensure!(ours, "{} holds something else than a demo: name an empty folder with --dir", dir.display());
        std::fs::remove_dir_all(dir).with_context(|| format!("empty {}", dir.display()))?;
    }
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    std::fs::write(dir.join(MARKER), "").with_context(|| format!("write into {}", dir.display()))
}

/// The lock on the federation in `dir`, a file beside it.
fn alone(dir: &Path) -> anyhow::Result<File> {
    let path = dir.with_extension("lock");
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    let busy = || format!("a federation runs in {} already: end it first, or use another --dir", dir.display());
    file.try_lock().with_context(busy)?;
    Ok(file)
}

/// `spiffe://<cluster's trust domain>/ns/shop/sa/<service account>`.
pub fn workload_id(cluster: &str, service_account: &str) -> String {
    format!("spiffe://{cluster}.example/ns/shop/sa/{service_account}")
}

/// Where the repository's root is: the folder above this crate.
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
