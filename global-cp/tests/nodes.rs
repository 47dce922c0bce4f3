//! Several nodes in one process, over real mutual TLS: they join, agree, forward, and go on without one of them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests; clippy knows only functions marked so"
)]

mod support;

use std::time::Duration;

use hyper::StatusCode;
use isthmus_global_cp::config::Config;
use isthmus_runtime::wait::wait_for;
use serde_json::Value;
use support::{Admin, Agent, ControlPlane, config};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(20);

struct Node {
    dir: TempDir,
    name: String,
    running: Option<ControlPlane>,
}

impl Node {
    fn new(name: &str) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), name: name.to_owned(), running: None }
    }

    fn config(&self) -> Config {
        let state = self.dir.path().join("state");
        Config { node: self.name.clone(), ..config(&state) }
    }

    fn state(&self) -> std::path::PathBuf {
        self.dir.path().join("state")
    }

    async fn start(&mut self, config: Config) {
        self.running = Some(ControlPlane::start_with(&self.state(), config).await);
    }

    /// Joins with a token that `other` minted.
    async fn join(&mut self, other: &Node) {
        let token = mint(other.admin(), &self.name).await;
        let path = self.dir.path().join("token");
        std::fs::write(&path, token).unwrap();
        let config = Config { join_token_file: Some(path), ..self.config() };
        self.start(config).await;
    }

    fn admin(&self) -> &Admin {
        &self.cp().admin
    }

    fn cp(&self) -> &ControlPlane {
        self.running.as_ref().unwrap()
    }

    async fn stop(&mut self) {
        self.running.take().unwrap().stop().await;
    }
}

async fn mint(admin: &Admin, node: &str) -> String {
    let (status, answer) = admin.call("POST", &format!("/v1/nodes/{node}/join-token"), "").await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["token"].as_str().unwrap().to_owned()
}

async fn nodes(admin: &Admin) -> Value {
    admin.get("/v1/nodes").await
}

fn roles(status: &Value) -> Vec<&str> {
    status["nodes"].as_array().unwrap().iter().map(|node| node["role"].as_str().unwrap()).collect()
}

/// Waits until `n` nodes vote.
async fn voters(admin: &Admin, n: usize) {
    let all_vote = async || {
        let status = nodes(admin).await;
        let roles = roles(&status);
        roles.len() == n && roles.iter().all(|role| matches!(*role, "leader" | "voter"))
    };
    wait_for(&format!("{n} voters"), SOON, all_vote).await.unwrap();
}

/// Three nodes; the first one founded the group.
async fn three() -> [Node; 3] {
    let mut all = ["cp-1", "cp-2", "cp-3"].map(Node::new);
    let [first, rest @ ..] = &mut all;
    first.start(first.config()).await;
    for node in rest {
        node.join(first).await;
    }
    voters(first.admin(), 3).await;
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_form_a_group_and_every_one_takes_writes_and_serves_reads() {
    let mut all = three().await;
    for (i, node) in all.iter().enumerate() {
        let agent = Agent::new(&format!("cluster-{i}"));
        node.cp().join(&agent).await;
        // Whoever is asked next knows of it.
        for other in &all {
            assert!(other.cp().snapshot().await.clusters.len() == i + 1);
        }
    }
    for node in &mut all {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_leader_the_group_goes_on_and_the_leader_comes_back_as_a_voter() {
    let [mut first, mut second, mut third] = three().await;
    second.cp().join(&Agent::new("before")).await;
    first.stop().await;
    // Whoever leads now: the write may wait for the election.
    let joined = async || {
        let (status, _) = second.admin().call("POST", "/v1/clusters/after/join-token", "").await;
        status == StatusCode::OK
    };
    wait_for("a write without the first node", SOON, joined).await.unwrap();
    third.cp().join(&Agent::new("after")).await;
    first.start(first.config()).await;
    // At another address than before.
    let caught_up = async || {
        let (status, snapshot) = first.admin().call("GET", "/v1/snapshot", "").await;
        status == StatusCode::OK && snapshot["clusters"].as_object().unwrap().len() == 2
    };
    wait_for("the first node has all", SOON, caught_up).await.unwrap();
    assert_eq!(roles(&nodes(second.admin()).await).len(), 3);
    for node in [&mut first, &mut second, &mut third] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_majority_refuses_writes_and_serves_stale_reads_alone() {
    let [mut first, mut second, mut third] = three().await;
    first.cp().join(&Agent::new("us-east")).await;
    second.stop().await;
    third.stop().await;
    let lost = async || first.admin().call("GET", "/v1/snapshot", "").await.0 == StatusCode::SERVICE_UNAVAILABLE;
    wait_for("the lonely node knows that it is", SOON, lost).await.unwrap();
    let (status, error) = first.admin().call("POST", "/v1/clusters/x/join-token", "").await;
    assert!(matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT), "{status} {error}");
    let stale = first.admin().get("/v1/snapshot?consistency=stale").await;
    assert!(stale["clusters"]["us-east"].is_object(), "{stale}");
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_node_is_out_and_its_name_is_free_for_a_new_one() {
    let [mut first, mut second, mut third] = three().await;
    let (status, answer) = second.admin().call("DELETE", "/v1/nodes/cp-3", "").await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    voters(first.admin(), 2).await;
    third.stop().await;
    let mut again = Node::new("cp-3");
    again.join(&second).await;
    voters(first.admin(), 3).await;
    let status = nodes(first.admin()).await;
    let ids: Vec<u64> = status["nodes"].as_array().unwrap().iter().map(|node| node["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, [1, 2, 4], "a number is never used again");
    for node in [&mut first, &mut second, &mut again] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_token_works_once_and_for_its_node_alone() {
    let mut first = Node::new("cp-1");
    first.start(first.config()).await;
    let (status, error) = first.admin().call("POST", "/v1/nodes/cp-1/join-token", "").await;
    assert_eq!(status, StatusCode::CONFLICT, "{error}");
    let token = mint(first.admin(), "cp-2").await;
    let mut stranger = Node::new("cp-9");
    let path = stranger.dir.path().join("token");
    std::fs::write(&path, &token).unwrap();
    let config = Config { join_token_file: Some(path), ..stranger.config() };
    let refused = isthmus_runtime::tasks::chain(&isthmus_global_cp::build(config).await.err().unwrap());
    assert!(refused.contains("the token is for cp/cp-2, this node is cp-9"), "{refused}");
    let mut second = Node::new("cp-2");
    let path = second.dir.path().join("token");
    std::fs::write(&path, &token).unwrap();
    second.start(Config { join_token_file: Some(path.clone()), ..second.config() }).await;
    voters(first.admin(), 2).await;
    let twin = Node::new("cp-2");
    let config = Config { join_token_file: Some(path), ..twin.config() };
    let refused = isthmus_runtime::tasks::chain(&isthmus_global_cp::build(config).await.err().unwrap());
    assert!(refused.contains("already used"), "{refused}");
    drop(stranger.running.take());
    for node in [&mut first, &mut second] {
        node.stop().await;
    }
}
