//! One cluster: agent, gateways, DNS, and workloads (an app and its sidecar each).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail};
use isthmus_runtime::files::write_secret;
use tokio::{process::Command, time::timeout};

use super::{
    START_DEADLINE,
    layout::{ClusterLayout, WorkloadLayout},
    manifests,
    process::{Binaries, Process},
};

/// An app and its sidecar.
pub struct Workload {
    /// Its addresses.
    pub layout: WorkloadLayout,
    /// The app itself.
    pub app: Process,
    /// The launcher, which runs Envoy.
    pub sidecar: Process,
}

/// A running cluster.
pub struct Cluster {
    /// Its addresses.
    pub layout: ClusterLayout,
    /// Its files.
    pub dir: PathBuf,
    /// The agent.
    pub agent: Process,
    /// By name.
    pub gateways: BTreeMap<String, Process>,
    /// The DNS server.
    pub dns: Process,
    /// By app.
    pub workloads: BTreeMap<String, Workload>,
    binaries: Binaries,
    agent_config: PathBuf,
}

impl Cluster {
    /// Starts agent, gateways and DNS with the join token, and waits until each is ready.
    pub async fn start(
        federation: &Path,
        binaries: &Binaries,
        layout: ClusterLayout,
        join_token: &str,
    ) -> anyhow::Result<Self> {
        let dir = federation.join(&layout.name);
        let manifests = dir.join("manifests");
        std::fs::create_dir_all(&manifests).with_context(|| format!("create {}", manifests.display()))?;
        write_secret(&dir.join("join-token"), join_token.as_bytes()).context("write the join token")?;
        let agent_config = write(&dir, "agent.yaml", &layout.agent_config(&dir))?;
        let named = |part: &str| format!("{}/{part}", layout.name);
        let mut agent = Process::new(named("agent"), &binaries.agent, federation)
            .args(["run", "--config"])
            .arg(&agent_config)
            .health(layout.agent_health);
        agent.start()?;
        agent.ready(START_DEADLINE).await?;

        let mut gateways = BTreeMap::new();
        for gateway in &layout.gateways {
            mint(binaries, &agent_config, "gateway", &gateway.name, &dir.join(format!("{}.token", gateway.name)))
                .await?;
            let file = write(&dir, &format!("{}.yaml", gateway.name), &ClusterLayout::gateway_config(gateway, &dir))?;
            let mut process = Process::new(named(&gateway.name), &binaries.gateway, federation)
                .arg("--config")
                .arg(file)
                .health(gateway.health);
            process.start()?;
            gateways.insert(gateway.name.clone(), process);
        }
        mint(binaries, &agent_config, "dns", "dns-1", &dir.join("dns-1.token")).await?;
        let file = write(&dir, "dns.yaml", &layout.dns_config(&dir))?;
        let mut dns =
            Process::new(named("dns-1"), &binaries.dns, federation).arg("--config").arg(file).health(layout.dns_health);
        dns.start()?;
        dns.ready(START_DEADLINE).await?;
        for gateway in gateways.values_mut() {
            gateway.ready(START_DEADLINE).await?;
        }
        Ok(Self {
            layout,
            dir,
            agent,
            gateways,
            dns,
            workloads: BTreeMap::new(),
            binaries: binaries.clone(),
            agent_config,
        })
    }

    /// Starts every workload of the layout: apps, then sidecars; waits until each sidecar's Envoy is live.
    pub async fn start_workloads(&mut self) -> anyhow::Result<()> {
        for layout in self.layout.workloads.clone() {
            let workload = self.start_workload(layout).await?;
            self.workloads.insert(workload.layout.app.to_owned(), workload);
        }
        for workload in self.workloads.values_mut() {
            workload.sidecar.ready(START_DEADLINE).await?;
        }
        Ok(())
    }

    async fn start_workload(&self, layout: WorkloadLayout) -> anyhow::Result<Workload> {
        let federation = self.dir.parent().context("the cluster's folder has a parent")?;
        let named = |part: &str| format!("{}/{part}", self.layout.name);
        let mut app = Process::new(named(&layout.instance), &self.binaries.shop, federation).arg(layout.app);
        let addresses: Vec<String> = layout.ports.iter().map(|(_, _, app, _)| app.to_string()).collect();
        for (flag, address) in ["--listen", "--listen-grpc"].iter().zip(&addresses) {
            app = app.args([flag, address.as_str()]);
        }
        app = match layout.app {
            "web" => app.args(["--dns", &self.layout.dns.to_string()]),
            _ => app.args(["--cluster", &self.layout.name, "--instance", &layout.instance]),
        };
        app.start()?;
        let token = self.dir.join(format!("{}.token", layout.instance));
        mint(&self.binaries, &self.agent_config, "workload", &format!("shop/{}", layout.app), &token).await?;
        let config = ClusterLayout::sidecar_config(&layout, &self.dir, &self.binaries.envoy);
        let file = write(&self.dir, &format!("{}.yaml", layout.instance), &config)?;
        let mut sidecar =
            Process::new(named(&format!("{}-sidecar", layout.instance)), &self.binaries.agent, federation)
                .args(["sidecar", "--config"])
                .arg(file)
                .health(layout.health);
        sidecar.start()?;
        Ok(Workload { layout, app, sidecar })
    }

    /// Writes the shop's manifests into the folder that the agent watches.
    pub fn write_manifests(&self) -> anyhow::Result<()> {
        manifests::write(&self.manifests(), &self.layout)
    }

    /// The folder that the agent watches.
    pub fn manifests(&self) -> PathBuf {
        self.dir.join("manifests")
    }

    /// The workload of `app`.
    pub fn workload(&mut self, app: &str) -> anyhow::Result<&mut Workload> {
        let cluster = &self.layout.name;
        self.workloads.get_mut(app).with_context(|| format!("no workload {app} in {cluster}"))
    }

    /// The gateway `name`.
    pub fn gateway(&mut self, name: &str) -> anyhow::Result<&mut Process> {
        let cluster = &self.layout.name;
        self.gateways.get_mut(name).with_context(|| format!("no gateway {name} in {cluster}"))
    }

    /// Every process of the cluster, sidecars first, so that they drain while the rest still runs.
    pub fn processes_mut(&mut self) -> impl Iterator<Item = &mut Process> {
        let workloads = self.workloads.values_mut().flat_map(|w| [&mut w.sidecar, &mut w.app]);
        workloads.chain(self.gateways.values_mut()).chain([&mut self.dns, &mut self.agent])
    }
}

fn write(dir: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// `isthmus-agent token <role> <subject>` into a file.
async fn mint(binaries: &Binaries, agent: &Path, role: &str, subject: &str, file: &Path) -> anyhow::Result<()> {
    let run = Command::new(&binaries.agent)
        .args(["token", role, subject, "--config"])
        .arg(agent)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(Duration::from_secs(30), run).await.context("isthmus-agent token does not end")??;
    if !output.status.success() {
        bail!("isthmus-agent token {role} {subject} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    write_secret(file, &output.stdout).with_context(|| format!("write {}", file.display()))
}
