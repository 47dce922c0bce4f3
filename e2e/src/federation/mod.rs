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
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};

use self::{
    cluster::Cluster,
    ctl::Isthmusctl,
    layout::{ClusterLayout, ControlPlaneLayout, FEDERATION},
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
}

impl Federation {
    /// Starts the control plane alone and waits until it is ready.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let Options { dir, hold_down, layout: base } = options;
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("empty {}", dir.display()))?;
        }
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let binaries = Binaries::find()?;
        let layout = ControlPlaneLayout::new(base);
        let config = dir.join("global-cp.yaml");
        std::fs::write(&config, layout.config(&dir.join("global-cp"), hold_down)).context("write the configuration")?;
        let mut control_plane =
            Process::new("global-cp", &binaries.global_cp, &dir).arg("--config").arg(&config).health(layout.health);
        control_plane.start()?;
        control_plane.ready(START_DEADLINE).await?;
        let ctl = Isthmusctl::new(&binaries.isthmusctl, &dir.join("global-cp/admin/context.yaml"));
        Ok(Self { dir, binaries, control_plane, ctl, clusters: BTreeMap::new(), base })
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

    /// The last lines of every process's log, for a failure's report.
    pub fn logs(&self) -> Vec<(String, PathBuf)> {
        let own = std::iter::once(&self.control_plane);
        let processes = own.chain(self.clusters.values().flat_map(Cluster::processes));
        processes.map(|p| (p.name().to_owned(), p.log().to_owned())).collect()
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

/// `spiffe://<cluster's trust domain>/ns/shop/sa/<service account>`.
pub fn workload_id(cluster: &str, service_account: &str) -> String {
    format!("spiffe://{cluster}.example/ns/shop/sa/{service_account}")
}

/// The federation's trust domain.
pub fn federation() -> &'static str {
    FEDERATION
}

/// Where the repository's root is: the folder above this crate.
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
