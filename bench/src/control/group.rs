//! Three nodes of our control plane as real processes on loopback, in mutual TLS, with their folders side by side.
//!
//! The first one founds the group, the others join it with tokens. Where a key is not given, it has its default. Dropping the
//! group kills its processes; so does our own end.

use std::{net::SocketAddr, path::Path, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use isthmus_e2e::federation::process::{Process, program};
use isthmus_identity::{
    bundle::TrustStore,
    svid::Svid,
    tls::{IdentitySource, PeerPolicy, client_config},
};
use isthmus_model::ids::TrustDomain;
use rustls::pki_types::CertificateDer;
use serde_json::Value;
use tokio::task::JoinSet;

use super::http2::Connection;

pub(crate) const FEDERATION: &str = "isthmus.example";
pub(crate) const NODES: u8 = 3;
const READY: Duration = Duration::from_secs(60);

/// The nodes.
pub(crate) struct Group {
    pub(crate) nodes: Vec<Node>,
}

/// One of them.
pub(crate) struct Node {
    name: String,
    process: Process,
    state: PathBuf,
    /// Where agents dial.
    pub(crate) grpc: SocketAddr,
    /// The REST API.
    pub(crate) admin: SocketAddr,
}

/// Where and how they run.
#[derive(Clone, Debug)]
pub(crate) struct Setting<'a> {
    /// State, configuration and logs.
    pub(crate) dir: &'a Path,
    /// Their addresses are 127.N.0.1 to .3.
    pub(crate) net: u8,
    /// Lines for each node's configuration beyond names, addresses and folders.
    pub(crate) keys: &'a str,
}

impl Group {
    /// Founds a group, and waits until all its nodes vote.
    pub(crate) async fn found(setting: &Setting<'_>) -> anyhow::Result<Self> {
        let mut group = Self { nodes: Vec::new() };
        for number in 1..=NODES {
            group.add(setting, number).await?;
        }
        let mut tasks = JoinSet::new();
        let mut admin = group.first()?.connect(&mut tasks).await?;
        wait_votes(&mut admin).await?;
        Ok(group)
    }

    async fn add(&mut self, setting: &Setting<'_>, number: u8) -> anyhow::Result<()> {
        let name = format!("cp-{number}");
        let home = setting.dir.join(&name);
        std::fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
        let (state, file, token) = (home.join("state"), home.join("global-cp.yaml"), home.join("token"));
        let at = |port: u16| SocketAddr::from(([127, setting.net, 0, number], port));
        let (grpc, admin, health) = (at(7443), at(7444), at(9900));
        let mut text = format!(
            "node: {name}\nfederation: {FEDERATION}\nstateDir: {}\n\
             listen: {{ grpc: \"{grpc}\", admin: \"{admin}\", health: \"{health}\" }}\n\
             drainGrace: 1s\n{}\n",
            state.display(),
            setting.keys,
        );
        if let Some(first) = self.nodes.first() {
            let mut tasks = JoinSet::new();
            let mut client = first.connect(&mut tasks).await?;
            let answer = client.call("POST", &format!("/v1/nodes/{name}/join-token"), "").await?;
            let minted = answer.get("token").and_then(Value::as_str).context("`token` in the answer")?;
            std::fs::write(&token, minted).context("write a token")?;
            text.push_str(&format!("joinTokenFile: {}\n", token.display()));
        }
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        let binary = program("isthmus-global-cp")?;
        let mut process = Process::new(&name, &binary, setting.dir).arg("--config").arg(&file).health(health);
        process.start()?;
        process.ready(READY).await?;
        self.nodes.push(Node { name, process, state, grpc, admin });
        Ok(())
    }

    pub(crate) fn first(&self) -> anyhow::Result<&Node> {
        self.nodes.first().context("there is no node")
    }

    /// All still run.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        for node in &mut self.nodes {
            ensure!(node.process.is_running(), "{} has ended; {}", node.name, node.process.tail());
        }
        Ok(())
    }

    /// SIGTERM to all, then waits.
    pub(crate) async fn stop(mut self) {
        self.nodes.iter_mut().for_each(|node| node.process.terminate());
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        for node in &mut self.nodes {
            node.process.reap_until(deadline).await;
        }
    }
}

impl Node {
    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        self.process.pid().with_context(|| format!("{} does not run", self.name))
    }

    /// As the administrator whose credentials the node left in its folder.
    pub(crate) fn tls(&self) -> anyhow::Result<Arc<rustls::ClientConfig>> {
        let svid = Svid::load(&self.state.join("admin"), "admin")?.context("the administrator's certificate")?;
        let root = svid.chain().last().context("a root")?.clone();
        client_tls(Some(&IdentitySource::new(svid)), vec![root])
    }

    /// A connection to its REST API.
    pub(crate) async fn connect(&self, tasks: &mut JoinSet<()>) -> anyhow::Result<Connection> {
        Connection::open(self.admin, &self.tls()?, tasks).await
    }
}

/// For a client that shows `source` and trusts whom `roots` signed for.
pub(crate) fn client_tls(
    source: Option<&IdentitySource>,
    roots: Vec<CertificateDer<'static>>,
) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let trust = TrustStore::new();
    let domain: TrustDomain = FEDERATION.parse().context("the federation's name")?;
    trust.set([(domain, roots)].into());
    let anyone: PeerPolicy = Arc::new(|_| true);
    Ok(Arc::new(client_config(source, &trust, anyone, &[b"h2"])?))
}

async fn wait_votes(admin: &mut Connection) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + READY;
    loop {
        let status = admin.call("GET", "/v1/nodes?consistency=stale", "").await?;
        let nodes = status.get("nodes").and_then(Value::as_array).context("`nodes` in the answer")?;
        let votes = |node: &&Value| matches!(node.get("role").and_then(Value::as_str), Some("leader" | "voter"));
        if nodes.iter().filter(votes).count() == usize::from(NODES) {
            return Ok(());
        }
        ensure!(tokio::time::Instant::now() < deadline, "not all nodes vote after {READY:?}: {status}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
