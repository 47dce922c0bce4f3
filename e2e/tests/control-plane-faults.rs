//! The control plane under faults: processes killed and paused, one and all, under concurrent writes and reads, whose
//! recorded history must be linearizable, with no acknowledged write lost.
//!
//! `ISTHMUS_SEED=N` repeats a run's faults; `FAULTS=10m` makes it longer.
#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unwrap_used, reason = "test code")]

#[path = "control_plane/history.rs"]
mod history;
#[path = "control_plane/rig.rs"]
mod rig;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::StatusCode;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{task::JoinSet, time::sleep};

use self::{
    history::{Operation, Seen, contradictions},
    rig::{Admin, Group},
};

const CLIENTS: u64 = 8;
/// The control plane keeps so many outstanding tokens, and events.
const MOST_APPENDS: u64 = 9_000;
/// Of a client after a failure: as long as nobody leads, refusals come fast, and names are few.
const PAUSE: Duration = Duration::from_millis(100);

fn seed() -> u64 {
    let given = std::env::var("ISTHMUS_SEED").ok().map(|seed| seed.parse().expect("ISTHMUS_SEED is a number"));
    let seed = given.unwrap_or_else(rand::random);
    println!("ISTHMUS_SEED={seed}");
    seed
}

fn lasting() -> Duration {
    let given = std::env::var("FAULTS").ok();
    given.map_or(Duration::from_secs(40), |text| humantime::parse_duration(&text).expect("FAULTS is a duration"))
}

/// What all clients did.
#[derive(Clone, Default)]
struct Recorder {
    operations: Arc<Mutex<Vec<Operation>>>,
    appends: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Recorder {
    fn record(&self, began: Instant, seen: Seen) {
        self.operations.lock().unwrap().push(Operation { began, ended: Instant::now(), seen });
    }
}

/// Appends and reads at nodes by chance, until told to stop.
async fn client(number: u64, admins: Vec<Admin>, recorder: Recorder, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed.wrapping_add(number));
    while !recorder.stop.load(Ordering::Relaxed) {
        let admin = &admins[rng.random_range(0..admins.len())];
        if rng.random_bool(0.5) {
            let nth = recorder.appends.fetch_add(1, Ordering::Relaxed);
            if nth >= MOST_APPENDS {
                return;
            }
            let name = format!("c{number}-{nth}");
            let began = Instant::now();
            let path = format!("/v1/clusters/{name}/join-token");
            let seen = match admin.call("POST", &path, "{\"ttlSeconds\": 86400}").await {
                Ok((StatusCode::OK, _)) => Seen::Appended(name),
                _ => Seen::Unknown(name),
            };
            let failed = matches!(seen, Seen::Unknown(_));
            recorder.record(began, seen);
            if failed {
                sleep(PAUSE).await;
            }
        } else {
            let began = Instant::now();
            match last(admin).await {
                Ok(last) => recorder.record(began, Seen::Read(last)),
                Err(_) => sleep(PAUSE).await,
            }
        }
    }
}

/// The last append that a node knows of.
async fn last(admin: &Admin) -> anyhow::Result<Option<(u64, String)>> {
    Ok(appends(&admin.get("/v1/events?limit=50&consistency=linearizable").await?).pop())
}

/// The appends among events, which come latest first; oldest first.
fn appends(events: &serde_json::Value) -> Vec<(u64, String)> {
    let events = events.as_array().unwrap().iter().rev();
    let minted = events.filter(|e| e["action"] == "mint-join-token" && e["outcome"] == "unchanged");
    minted.map(|e| (e["number"].as_u64().unwrap() + 1, e["subject"].as_str().unwrap().to_owned())).collect()
}

/// One fault, begun and ended.
async fn fault(group: &mut Group, rng: &mut StdRng) -> &'static str {
    let leader = group.leader().await;
    let any = rng.random_range(0..group.nodes.len());
    let follower = (leader.unwrap_or(any) + rng.random_range(1..group.nodes.len())) % group.nodes.len();
    let away = Duration::from_millis(rng.random_range(200..2_500));
    let (what, victims, pause): (_, Vec<usize>, _) = match rng.random_range(0..6) {
        0 => ("kill -9 of the leader", vec![leader.unwrap_or(any)], false),
        1 => ("kill -9 of a follower", vec![follower], false),
        2 => ("kill -9 of all", (0..group.nodes.len()).collect(), false),
        3 => ("SIGSTOP of the leader", vec![leader.unwrap_or(any)], true),
        4 => ("SIGSTOP of a follower", vec![follower], true),
        _ => ("kill -9 of a majority", vec![any, (any + 1) % group.nodes.len()], false),
    };
    for victim in &victims {
        let process = &mut group.nodes[*victim].process;
        if pause {
            process.signal("STOP");
        } else {
            process.kill().await.unwrap();
        }
    }
    sleep(away).await;
    for victim in &victims {
        let process = &mut group.nodes[*victim].process;
        if pause {
            process.signal("CONT");
        } else {
            process.start().unwrap();
        }
    }
    what
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_paused_nodes_lose_no_acknowledged_write_and_every_read_is_linearizable() {
    let (seed, lasting) = (seed(), lasting());
    let mut group = Group::found(3).await;
    let recorder = Recorder::default();
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let admins = group.nodes.iter().map(rig::Node::client).collect();
        clients.spawn(client(number, admins, recorder.clone(), seed));
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let mut faults: BTreeMap<&'static str, u32> = BTreeMap::new();
    let began = Instant::now();
    while began.elapsed() < lasting {
        *faults.entry(fault(&mut group, &mut rng).await).or_default() += 1;
        // Long enough for an election, most of the time.
        sleep(Duration::from_millis(rng.random_range(500..4_000))).await;
    }
    group.healed().await;
    recorder.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }

    let history = std::mem::take(&mut *recorder.operations.lock().unwrap());
    let count = |of: fn(&Seen) -> bool| history.iter().filter(|op| of(&op.seen)).count();
    let (acknowledged, unknown) = (count(|s| matches!(s, Seen::Appended(_))), count(|s| matches!(s, Seen::Unknown(_))));
    let reads = count(|s| matches!(s, Seen::Read(_)));
    for (what, times) in &faults {
        println!("{times:>4} x {what}");
    }
    println!("{acknowledged} writes acknowledged, {unknown} not, {reads} reads");
    assert!(acknowledged > 20 && reads > 20, "too little was done to say anything");

    let mut lists = Vec::new();
    for node in &group.nodes {
        lists.push(appends(&node.client().get("/v1/events?limit=10240").await.unwrap()));
    }
    assert!(lists.windows(2).all(|two| two[0] == two[1]), "the nodes differ; seed {seed}");
    let found = contradictions(&history, &lists[0]);
    let some: Vec<&String> = found.iter().take(10).collect();
    assert!(found.is_empty(), "{} contradictions, seed {seed}: {some:#?}", found.len());
}
