//! Real control plane processes, each with a network, a disk and a clock of its own, and clients of their admin APIs.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use isthmus_e2e::federation::process::{Process, program};
use isthmus_identity::{
    bundle::TrustStore,
    svid::Svid,
    tls::{IdentitySource, client_config},
};
use isthmus_model::ids::TrustDomain;
use isthmus_runtime::wait::wait_for;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::place;

const FEDERATION: &str = "isthmus.example";
const READY: Duration = Duration::from_secs(60);
/// Longer than the control plane takes to say that it has no leader.
const CALL: Duration = Duration::from_secs(8);

/// The group. Dropping it kills its processes and takes their disks away; their logs stay after a failure.
pub(crate) struct Group {
    pub(crate) nodes: Vec<Node>,
    dir: tempfile::TempDir,
}

/// One process, its disk and its clock.
pub(crate) struct Node {
    /// Counted from 1.
    pub(crate) number: u8,
    pub(crate) name: String,
    pub(crate) process: Process,
    pub(crate) state: PathBuf,
    pub(crate) admin: SocketAddr,
    token: PathBuf,
    clock: PathBuf,
    /// The administrator's TLS towards it; another one when it was replaced.
    tls: Arc<Mutex<Option<Arc<rustls::ClientConfig>>>>,
}

/// An administrator's way to one node. A connection for each call: nodes come and go.
#[derive(Clone)]
pub(crate) struct Admin {
    address: SocketAddr,
    tls: Arc<Mutex<Option<Arc<rustls::ClientConfig>>>>,
}

impl Group {
    /// Founds a control plane of `n` nodes, all of which vote.
    pub(crate) async fn found(n: u8) -> Self {
        isthmus_identity::install_crypto();
        let dir = tempfile::tempdir().unwrap();
        let mut group = Self { nodes: Vec::new(), dir };
        for number in 1..=n {
            group.add(number).await;
        }
        let first = group.nodes[0].client();
        let vote = async || {
            group.roles(&first).await.is_ok_and(|roles| roles.iter().filter(|r| votes(r)).count() == usize::from(n))
        };
        wait_for("all nodes to vote", READY, vote).await.unwrap();
        group
    }

    /// Starts one more node, which joins those that there are.
    async fn add(&mut self, number: u8) {
        let name = format!("cp-{number}");
        let home = self.dir.path().join(&name);
        std::fs::create_dir_all(&home).unwrap();
        let [state, file, token, clock] = ["state", "global-cp.yaml", "token", "clock"].map(|file| home.join(file));
        place::disk(&state);
        let [grpc, admin, health] = [place::GRPC, 7444, 9900].map(|port| place::at(number, port));
        let mut text = format!(
            "node: {name}\nfederation: {FEDERATION}\nstateDir: {state}\n\
             listen: {{ grpc: \"{grpc}\", admin: \"{admin}\", health: \"{health}\" }}\n\
             raft: {{ snapshotAfterEntries: 200, segmentBytes: 262144 }}\ndrainGrace: 1s\n\
             telemetry: {{ log: {{ level: info, format: text }} }}\n",
            state = state.display(),
        );
        if let Some(first) = self.nodes.first() {
            std::fs::write(&token, first.client().node_token(&name).await.unwrap()).unwrap();
            text.push_str(&format!("joinTokenFile: {}\n", token.display()));
        }
        std::fs::write(&file, text).unwrap();
        std::fs::write(&clock, "+0").unwrap();
        let process = Process::new(&name, Path::new("nsenter"), self.dir.path())
            .arg(format!("--net={}", place::node(number).display()))
            .args(["--", "env"])
            .arg(format!("LD_PRELOAD={}", place::faketime().display()))
            .arg(format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()))
            // Clocks are set while the process runs; what counts durations goes on evenly, as it does then.
            .args(["FAKETIME_CACHE_DURATION=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"])
            .arg(program("isthmus-global-cp").unwrap())
            .arg("--config")
            .arg(&file)
            .health(health);
        let tls = Arc::default();
        let mut node = Node { number, name, process, state, admin, token, clock, tls };
        node.process.start().unwrap();
        node.process.ready(READY).await.unwrap();
        node.read_credentials();
        self.nodes.push(node);
    }

    /// Takes the node out of the group, as one that is lost, and adds it anew with an empty disk.
    pub(crate) async fn replace(&mut self, at: usize) {
        let name = self.nodes[at].name.clone();
        let other = self.nodes[(at + 1) % self.nodes.len()].client();
        let removed = async || {
            let path = format!("/v1/nodes/{name}");
            // Not found: it was removed by a call whose answer was lost.
            matches!(other.call("DELETE", &path, "").await, Ok((StatusCode::OK | StatusCode::NOT_FOUND, _)))
        };
        wait_for("the lost node to be removed", READY, removed).await.unwrap();
        let mut token = None;
        let minted = async || {
            token = other.node_token(&name).await.ok();
            token.is_some()
        };
        wait_for("a token for the new node", READY, minted).await.unwrap();
        let node = &mut self.nodes[at];
        for entry in std::fs::read_dir(&node.state).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
        }
        // Whichever was first joins, too, from now on.
        std::fs::write(&node.token, token.unwrap()).unwrap();
        let config = node.token.with_file_name("global-cp.yaml");
        let text = std::fs::read_to_string(&config).unwrap();
        if !text.contains("joinTokenFile") {
            std::fs::write(&config, format!("{text}joinTokenFile: {}\n", node.token.display())).unwrap();
        }
        node.process.start().unwrap();
        node.process.ready(READY).await.unwrap();
        node.read_credentials();
        let votes = async || self.roles(&other).await.is_ok_and(|roles| roles.iter().all(|role| votes(role)));
        wait_for("the new node to vote", READY, votes).await.unwrap();
    }

    /// Each node's role, as the one at `admin` sees it.
    pub(crate) async fn roles(&self, admin: &Admin) -> anyhow::Result<Vec<String>> {
        let status = admin.get("/v1/nodes?consistency=stale").await?;
        let nodes = status["nodes"].as_array().context("nodes")?;
        Ok(nodes.iter().filter_map(|node| node["role"].as_str().map(str::to_owned)).collect())
    }

    /// The place of the node that leads, as any of the others says.
    pub(crate) async fn leader(&self) -> Option<usize> {
        for node in &self.nodes {
            let Ok(status) = node.client().get("/v1/nodes?consistency=stale").await else { continue };
            let Some(leader) = status["leader"].as_str() else { continue };
            return self.nodes.iter().position(|node| node.name == leader);
        }
        None
    }

    /// Waits until every node runs and serves reads that see everything.
    pub(crate) async fn healed(&mut self) {
        for node in &mut self.nodes {
            if !node.process.is_running() {
                node.process.start().unwrap();
            }
        }
        for node in &mut self.nodes {
            node.process.ready(READY).await.unwrap();
            let admin = node.client();
            wait_for("a read that sees everything", READY, async || admin.get("/v1/snapshot").await.is_ok())
                .await
                .unwrap();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.dir.disable_cleanup(true);
            println!("the nodes' logs are in {}", self.dir.path().join("logs").display());
        }
        for node in self.nodes.drain(..) {
            drop(node.process);
            place::unmount(&node.state);
        }
    }
}

fn votes(role: &str) -> bool {
    matches!(role, "leader" | "voter")
}

impl Node {
    /// Where agents and other nodes dial it.
    pub(crate) fn grpc(&self) -> SocketAddr {
        place::at(self.number, place::GRPC)
    }

    /// Sets its clock so many hours from the right time.
    pub(crate) fn set_clock(&self, hours: i32) {
        // Whole, since it is read at any time.
        let new = self.clock.with_extension("new");
        std::fs::write(&new, format!("{hours:+}h")).unwrap();
        std::fs::rename(new, &self.clock).unwrap();
    }

    pub(crate) fn client(&self) -> Admin {
        Admin { address: self.admin, tls: self.tls.clone() }
    }

    /// The credentials that the node left in its state folder.
    fn read_credentials(&self) {
        let folder = self.state.join("admin");
        let svid = Svid::load(&folder, "admin").unwrap().expect("the administrator's certificate");
        let trust = TrustStore::new();
        let domain: TrustDomain = FEDERATION.parse().unwrap();
        trust.set([(domain, vec![svid.chain().last().unwrap().clone()])].into());
        let tls = client_config(Some(&IdentitySource::new(svid)), &trust, Arc::new(|_| true), &[b"http/1.1"]).unwrap();
        *self.tls.lock().unwrap() = Some(Arc::new(tls));
    }
}

impl Admin {
    /// A token for a node to be added.
    async fn node_token(&self, name: &str) -> anyhow::Result<String> {
        let (status, answer) = self.call("POST", &format!("/v1/nodes/{name}/join-token"), "").await?;
        ensure!(status == StatusCode::OK, "{status} {answer}");
        Ok(answer["token"].as_str().context("token")?.to_owned())
    }

    /// A successful answer, or an error.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let (status, body) = self.call("GET", path, "").await?;
        ensure!(status == StatusCode::OK, "{path}: {status} {body}");
        Ok(body)
    }

    pub(crate) async fn call(&self, method: &str, path: &str, body: &str) -> anyhow::Result<(StatusCode, Value)> {
        timeout(CALL, self.exchange(method, path, body)).await.context("no answer in time")?
    }

    async fn exchange(&self, method: &str, path: &str, body: &str) -> anyhow::Result<(StatusCode, Value)> {
        let tcp = TcpStream::connect(self.address).await?;
        let tls = self.tls.lock().unwrap().clone().context("no credentials yet")?;
        let tls = TlsConnector::from(tls).connect(ServerName::try_from("127.0.0.1")?, tcp).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(tls)).await?;
        let driver = tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "cp");
        let answer = sender.send_request(request.body(Full::new(Bytes::from(body.to_owned())))?).await?;
        let status = answer.status();
        let bytes = answer.into_body().collect().await?.to_bytes();
        driver.abort();
        Ok((status, serde_json::from_slice(&bytes)?))
    }
}
