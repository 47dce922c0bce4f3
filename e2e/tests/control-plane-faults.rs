//! The control plane under faults: processes killed and paused, partitions, full disks, damaged logs, wrong clocks, under
//! concurrent writes, reads and agents' sessions. The recorded history must be linearizable, no acknowledged write may be
//! lost, and no index may ever move.
//!
//! `ISTHMUS_SEED=N` repeats a run's faults; `FAULTS=10m` makes it longer.
#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unwrap_used, reason = "test code")]

#[path = "control_plane/agent.rs"]
mod agent;
#[path = "control_plane/clients.rs"]
mod clients;
#[path = "control_plane/damage.rs"]
mod damage;
#[path = "control_plane/faults.rs"]
mod faults;
#[path = "control_plane/history.rs"]
mod history;
#[path = "control_plane/place.rs"]
mod place;
#[path = "control_plane/rig.rs"]
mod rig;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::StatusCode;
use isthmus_model::global::GlobalSnapshot;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{task::JoinSet, time::sleep};

use self::{
    agent::{Agent, Shown, exports_of},
    clients::{Recorder, appends, client, observer},
    faults::Fault,
    history::{Seen, contradictions},
    rig::{Admin, Group},
};

const CLIENTS: u64 = 8;
const AGENTS: u64 = 3;
/// Long enough for each fault to happen once.
const ROUND: Duration = Duration::from_secs(105);

fn seed() -> u64 {
    let given = std::env::var("ISTHMUS_SEED").ok().map(|seed| seed.parse().expect("ISTHMUS_SEED is a number"));
    given.unwrap_or_else(rand::random)
}

fn lasting() -> Duration {
    let given = std::env::var("FAULTS").ok();
    given.map_or(ROUND, |text| humantime::parse_duration(&text).expect("FAULTS is a duration"))
}

#[test]
fn under_faults_no_acknowledged_write_is_lost_every_read_is_linearizable_and_no_index_moves() {
    place::within(
        "under_faults_no_acknowledged_write_is_lost_every_read_is_linearizable_and_no_index_moves",
        under_faults,
    );
}

/// In rounds, each with a control plane of its own: one keeps so many events and tokens.
async fn under_faults() {
    let (mut seed, mut left) = (seed(), lasting());
    while left > Duration::ZERO {
        round(seed, left.min(ROUND)).await;
        left = left.saturating_sub(ROUND);
        seed = seed.wrapping_add(1);
    }
}

async fn round(seed: u64, lasting: Duration) {
    println!("ISTHMUS_SEED={seed}");
    let mut group = Group::found(3).await;
    let (recorder, shown, failures) = (Recorder::new(lasting), Shown::default(), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let admins = group.nodes.iter().map(rig::Node::client).collect();
        clients.spawn(client(number, admins, recorder.clone(), seed));
    }
    clients.spawn(observer(group.nodes.iter().map(rig::Node::client).collect(), recorder.clone(), shown.clone()));
    let mut agents = JoinSet::new();
    for number in 0..AGENTS {
        let cluster = format!("cluster-{number}");
        let agent = join(&group, &cluster, (shown.clone(), seed.wrapping_add(1000 + number))).await;
        agents.spawn(agent.run(recorder.stop.clone(), failures.clone()));
    }

    let mut rng = StdRng::seed_from_u64(seed);
    let mut faults: BTreeMap<Fault, u32> = BTreeMap::new();
    let (began, mut next) = (Instant::now(), Vec::new());
    while began.elapsed() < lasting {
        let fault = match next.pop() {
            Some(fault) => fault,
            None => {
                next = Fault::shuffled(&mut rng);
                continue;
            }
        };
        println!("{:>6.1} s: {}", began.elapsed().as_secs_f32(), fault.what());
        fault.happen(&mut group, &mut rng).await;
        *faults.entry(fault).or_default() += 1;
        // Long enough for an election, most of the time.
        sleep(Duration::from_millis(rng.random_range(500..4_000))).await;
    }
    group.healed().await;
    recorder.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    let mut ended = Vec::new();
    while let Some(agent) = agents.join_next().await {
        ended.push(agent.unwrap());
    }

    for (fault, times) in &faults {
        println!("{times:>4} x {}", fault.what());
    }
    let lists = lists(&group).await;
    assert!(lists.windows(2).all(|two| two[0] == two[1]), "the nodes differ; seed {seed}");
    judge_history(&recorder, &lists[0], seed);
    judge_agents(&group, &ended, &shown, failures.load(Ordering::Relaxed)).await;
    // Whatever the clocks showed meanwhile: tokens work, for as long as they should.
    let late = join(&group, "late", (shown.clone(), seed)).await;
    drop(late);
    let admin = group.nodes[0].client();
    let short = mint(&admin, "too-late", 1).await;
    sleep(Duration::from_secs(2)).await;
    let nodes = vec![group.nodes[0].grpc()];
    let refused = Agent::join("too-late", &short, nodes, (shown, seed)).await.err().expect("a token that has ended");
    assert!(format!("{refused:#}").contains("expired"), "{refused:#}");
}

async fn mint(admin: &Admin, cluster: &str, seconds: u64) -> String {
    let body = format!("{{\"ttlSeconds\": {seconds}}}");
    let (status, answer) = admin.call("POST", &format!("/v1/clusters/{cluster}/join-token"), &body).await.unwrap();
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["token"].as_str().unwrap().to_owned()
}

async fn join(group: &Group, cluster: &str, watched: (Shown, u64)) -> Agent {
    let token = mint(&group.nodes[0].client(), cluster, 900).await;
    let nodes = group.nodes.iter().map(rig::Node::grpc).collect();
    Agent::join(cluster, &token, nodes, watched).await.unwrap()
}

/// What each node holds of all appends.
async fn lists(group: &Group) -> Vec<Vec<(u64, String)>> {
    let mut lists = Vec::new();
    for node in &group.nodes {
        lists.push(appends(&node.client().get("/v1/events?limit=10240").await.unwrap()));
    }
    lists
}

fn judge_history(recorder: &Recorder, list: &[(u64, String)], seed: u64) {
    let history = std::mem::take(&mut *recorder.operations.lock().unwrap());
    let count = |of: fn(&Seen) -> bool| history.iter().filter(|op| of(&op.seen)).count();
    let (acknowledged, unknown) = (count(|s| matches!(s, Seen::Appended(_))), count(|s| matches!(s, Seen::Unknown(_))));
    let reads = count(|s| matches!(s, Seen::Read(_)));
    println!("{acknowledged} writes acknowledged, {unknown} not, {reads} reads");
    assert!(acknowledged > 20 && reads > 20, "too little was done to say anything");
    let found = contradictions(&history, list);
    let some: Vec<&String> = found.iter().take(10).collect();
    assert!(found.is_empty(), "{} contradictions, seed {seed}: {some:#?}", found.len());
}

/// Nothing that was shown contradicts anything else, and the end is what the agents last published.
async fn judge_agents(group: &Group, agents: &[Agent], shown: &Shown, failures: u64) {
    let published: u64 = agents.iter().map(|agent| agent.published).sum();
    for node in &group.nodes {
        let state: GlobalSnapshot = serde_json::from_value(node.client().get("/v1/snapshot").await.unwrap()).unwrap();
        shown.see(&node.name, &state);
        for agent in agents {
            let exports = exports_of(agent.cluster(), &state).unwrap();
            assert_eq!(exports, agent.exports(), "{} at {}", agent.cluster(), node.name);
        }
    }
    let (contradictions, states, services) = shown.result();
    println!(
        "{published} publications acknowledged, {failures} sessions failed, {states} states seen, {services} services"
    );
    assert!(published > 20 && states > 20 && services > 5, "too little was done to say anything");
    assert!(contradictions.is_empty(), "{contradictions:#?}");
}
