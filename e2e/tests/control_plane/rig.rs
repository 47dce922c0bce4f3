//! Three real control plane processes on loopback, and clients of their admin APIs.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

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

const FEDERATION: &str = "isthmus.example";
/// Addresses of these nodes alone.
const NET: u8 = 9;
const READY: Duration = Duration::from_secs(60);
/// Longer than the control plane takes to say that it has no leader.
const CALL: Duration = Duration::from_secs(8);

/// The group. Dropping it kills its processes.
pub(crate) struct Group {
    pub(crate) nodes: Vec<Node>,
    pub(crate) dir: tempfile::TempDir,
}

/// One process and its folder.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) process: Process,
    pub(crate) state: PathBuf,
    pub(crate) admin: SocketAddr,
}

/// An administrator's way to one node. A connection for each call: nodes come and go.
#[derive(Clone)]
pub(crate) struct Admin {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
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
    pub(crate) async fn add(&mut self, number: u8) {
        let name = format!("cp-{number}");
        let home = self.dir.path().join(&name);
        std::fs::create_dir_all(&home).unwrap();
        let (state, file, token) = (home.join("state"), home.join("global-cp.yaml"), home.join("token"));
        let at = |port: u16| SocketAddr::from(([127, NET, 0, number], port));
        let (grpc, admin, health) = (at(7443), at(7444), at(9900));
        let mut text = format!(
            "node: {name}\nfederation: {FEDERATION}\nstateDir: {state}\n\
             listen: {{ grpc: \"{grpc}\", admin: \"{admin}\", health: \"{health}\" }}\n\
             raft: {{ snapshotAfterEntries: 200, segmentBytes: 262144 }}\ndrainGrace: 1s\n\
             telemetry: {{ log: {{ level: info, format: text }} }}\n",
            state = state.display(),
        );
        if let Some(first) = self.nodes.first() {
            let answer = first.client().call("POST", &format!("/v1/nodes/{name}/join-token"), "").await.unwrap();
            assert_eq!(answer.0, StatusCode::OK, "{}", answer.1);
            std::fs::write(&token, answer.1["token"].as_str().unwrap()).unwrap();
            text.push_str(&format!("joinTokenFile: {}\n", token.display()));
        }
        std::fs::write(&file, text).unwrap();
        let binary = program("isthmus-global-cp").unwrap();
        let mut process = Process::new(&name, &binary, self.dir.path()).arg("--config").arg(&file).health(health);
        process.start().unwrap();
        process.ready(READY).await.unwrap();
        self.nodes.push(Node { name, process, state, admin });
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

fn votes(role: &str) -> bool {
    matches!(role, "leader" | "voter")
}

impl Node {
    /// With the credentials that the node left in its state folder.
    pub(crate) fn client(&self) -> Admin {
        let folder = self.state.join("admin");
        let svid = Svid::load(&folder, "admin").unwrap().expect("the administrator's certificate");
        let trust = TrustStore::new();
        let domain: TrustDomain = FEDERATION.parse().unwrap();
        trust.set([(domain, vec![svid.chain().last().unwrap().clone()])].into());
        let tls = client_config(Some(&IdentitySource::new(svid)), &trust, Arc::new(|_| true), &[b"http/1.1"]).unwrap();
        Admin { address: self.admin, tls: Arc::new(tls) }
    }
}

impl Admin {
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
        let tls = TlsConnector::from(self.tls.clone()).connect(ServerName::try_from("127.0.0.1")?, tcp).await?;
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
