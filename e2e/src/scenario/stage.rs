//! The federation with its load, and the few moves that the steps are made of.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use tokio::{
    process::Command,
    time::{sleep, timeout},
};

use super::{
    Options,
    ledger::{Ledger, Window},
    report::Report,
};
use crate::{
    federation::{self, Federation, envfile, layout::Base, process::Process},
    samples::{Samples, Span},
    shop::load::Kind,
};

/// Clusters of the demo: name, region.
pub const CLUSTERS: [(&str, &str); 3] = [("us-east", "us"), ("us-west", "us"), ("eu-central", "eu")];
/// Recovered clusters wait this long.
pub const HOLD_DOWN: Duration = Duration::from_secs(3);
/// How long traffic may take to move in a step before the demo gives up.
const SETTLE_DEADLINE: Duration = Duration::from_secs(20);
/// Traffic has moved when this many HTTP requests and sessions in a row went there.
const SETTLED_HTTP: usize = 400;
const SETTLED_TCP: usize = 12;

/// Everything the steps need.
pub struct Stage {
    /// The processes.
    pub federation: Federation,
    /// The load generator, once started.
    pub load: Process,
    /// What it saw.
    pub samples: Samples,
    /// What is to be judged.
    pub ledger: Ledger,
    /// When the manifests had been written.
    pub manifests_written: Instant,
    /// cart's VIP in each cluster, as first seen.
    pub vips: BTreeMap<String, String>,
}

impl Stage {
    /// Starts everything but the load: control plane, clusters, workloads; then writes the manifests.
    pub async fn set(options: &Options, report: &mut Report) -> anyhow::Result<Self> {
        which("dig").context("Debian's package bind9-dnsutils has dig: `make tools` installs it")?;
        report.step("0", "Three clusters on this machine");
        report.doing("control plane");
        let options = federation::Options { dir: options.dir.clone(), hold_down: HOLD_DOWN, layout: Base::default() };
        let mut federation = Federation::start(options).await?;
        for (number, (name, region)) in (1..).zip(CLUSTERS) {
            report.doing(&format!("{name}: join token, agent, two gateways, DNS, four apps with an Envoy each"));
            let layout = federation.layout(name, number, region);
            federation.join(layout).await?.start_workloads().await?;
        }
        report.doing("manifests");
        let manifests_written = Instant::now();
        for (name, _) in CLUSTERS {
            federation.cluster(name)?.write_manifests()?;
        }
        let samples = federation.dir.join("load.jsonl");
        let dns = federation.cluster("us-east")?.layout.dns;
        let load = Process::new("us-east/load", &federation.binaries.shop, &federation.dir)
            .args(["load", "--dns", &dns.to_string(), "--samples"])
            .arg(&samples);
        let samples = Samples::new(&samples);
        Ok(Self { federation, load, samples, ledger: Ledger::default(), manifests_written, vips: BTreeMap::new() })
    }

    /// Ends the load; requests under way get their outcome first.
    pub async fn stop_load(&mut self) -> anyhow::Result<()> {
        self.load.terminate();
        let status = self.load.wait(Duration::from_secs(15)).await?;
        ensure!(status.success(), "the load generator failed; {}", self.load.tail());
        self.ledger.close();
        Ok(())
    }

    /// Waits until the load has settled on `cluster` after `from_ms`, stays a little, and closes the window.
    pub async fn settle(&mut self, report: &Report, mut window: Window) -> anyhow::Result<()> {
        let cluster = window.settles_on;
        let deadline = Instant::now() + SETTLE_DEADLINE;
        loop {
            ensure!(self.load.is_running(), "the load generator ended; {}", self.load.tail());
            if self.all_served_by(cluster, window.from_ms)? {
                break;
            }
            if Instant::now() > deadline {
                let sum = self.samples.summary(&[Kind::Http, Kind::Tcp], Span::since(window.from_ms))?;
                bail!(
                    "the load did not settle on {cluster} within {SETTLE_DEADLINE:?}: served by {:?}, failures {:?}",
                    sum.clusters,
                    sum.failures
                );
            }
            sleep(Duration::from_millis(20)).await;
        }
        window.to_ms = isthmus_runtime::now();
        let sum = self.samples.summary(&[Kind::Http, Kind::Tcp], Span::since(window.from_ms))?;
        let affected = sum
            .last_affected_ms
            .map_or_else(|| "none affected".to_owned(), |ms| format!("last affected after {ms} ms"));
        let text = format!("{} requests, {} failed, {affected}; now all by {cluster}", sum.requests, sum.failed());
        report.good(&text);
        self.ledger.window(window);
        Ok(())
    }

    fn all_served_by(&mut self, cluster: &str, from_ms: u64) -> anyhow::Result<bool> {
        for (kind, n) in [(Kind::Http, SETTLED_HTTP), (Kind::Tcp, SETTLED_TCP)] {
            let latest = self.samples.latest(kind, n, from_ms)?;
            if latest.len() < n || latest.iter().any(|s| s.cluster.as_deref() != Some(cluster)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// SIGKILL, noted as a fault. Returns the time just before it.
    pub async fn kill(&mut self, what: &[(&str, Part<'_>)]) -> anyhow::Result<u64> {
        let before = isthmus_runtime::now();
        for (cluster, part) in what {
            self.part(cluster, part)?.kill().await?;
        }
        let after = isthmus_runtime::now();
        if what.iter().any(|(_, part)| matches!(part, Part::App(_))) {
            self.ledger.app_fault(before, after);
        } else {
            self.ledger.fault(before, after);
        }
        Ok(before)
    }

    /// Starts what was killed and waits until it is ready.
    pub async fn revive(&mut self, what: &[(&str, Part<'_>)]) -> anyhow::Result<()> {
        for (cluster, part) in what {
            self.part(cluster, part)?.start()?;
        }
        for (cluster, part) in what {
            if !matches!(part, Part::App(_)) {
                self.part(cluster, part)?.ready(federation::START_DEADLINE).await?;
            }
        }
        Ok(())
    }

    fn part(&mut self, cluster: &str, part: &Part<'_>) -> anyhow::Result<&mut Process> {
        let cluster = self.federation.cluster(cluster)?;
        Ok(match part {
            Part::Agent => &mut cluster.agent,
            Part::Dns => &mut cluster.dns,
            Part::Gateway(name) => cluster.gateway(name)?,
            Part::App(app) => &mut cluster.workload(app)?.app,
        })
    }

    /// `dig` at `server`: (status, answers).
    pub async fn dig(&self, server: SocketAddr, name: &str, kind: &str) -> anyhow::Result<(String, Vec<String>)> {
        dig(server, name, kind).await
    }

    /// Writes the file of shell variables; process ids change when something is restarted.
    pub fn write_env(&self) -> anyhow::Result<()> {
        envfile::write(&self.federation, &self.env_file())
    }

    /// The demo's file of shell variables.
    pub fn env_file(&self) -> PathBuf {
        self.federation.dir.join("env")
    }
}

/// One process of a cluster.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "each variant is the part of its name")]
pub enum Part<'a> {
    Agent,
    Dns,
    Gateway(&'a str),
    App(&'a str),
}

fn which(program: &str) -> anyhow::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    ensure!(std::env::split_paths(&path).any(|dir| dir.join(program).is_file()), "{program} is not on the PATH");
    Ok(())
}

/// Runs the real `dig` against `server` and returns the response's status and the answers' data.
pub async fn dig(server: SocketAddr, name: &str, kind: &str) -> anyhow::Result<(String, Vec<String>)> {
    let run = Command::new("dig")
        .args([&format!("@{}", server.ip()), "-p", &server.port().to_string(), "+tries=3", "+time=1", name, kind])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(Duration::from_secs(10), run).await.context("dig does not end")?;
    let output = output.context("run dig (Debian's package bind9-dnsutils has it: `make tools` installs it)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let status = text.split("status: ").nth(1).and_then(|rest| rest.split(',').next());
    let status = status.with_context(|| format!("dig got no answer from {server}: {}", text.trim()))?;
    let answers = text
        .lines()
        .skip_while(|line| !line.starts_with(";; ANSWER SECTION"))
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().skip(4).map(str::to_owned).reduce(|a, b| format!("{a} {b}")))
        .collect();
    Ok((status.to_owned(), answers))
}
