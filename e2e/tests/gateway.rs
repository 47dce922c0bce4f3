//! Gateways under torture: ten thousand connections with every kind of end, compared byte for byte at both ends, a soak
//! with flat memory and files, and upgrades of the real program under load. Real processes; loopback only.
//!
//! `ISTHMUS_SEED=N` repeats a run's stories; `ISTHMUS_CONNECTIONS=N` and `SOAK=10m` change how much and how long.
#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unwrap_used, reason = "test code")]

#[path = "gateway/agent.rs"]
mod agent;
#[path = "gateway/carry.rs"]
mod carry;
#[path = "gateway/load.rs"]
mod load;
#[path = "gateway/plan.rs"]
mod plan;
#[path = "gateway/rig.rs"]
mod rig;
#[path = "gateway/soak.rs"]
mod soak;
#[path = "gateway/traffic.rs"]
mod traffic;
#[path = "gateway/upgrade.rs"]
mod upgrade;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_e2e::federation::repository;
use tokio::{sync::Semaphore, task::JoinSet};

use self::{
    carry::{End, judge},
    load::Load,
    plan::Plan,
    rig::{Transport, World},
};

/// Open at one time: each costs two files here, and two or so in each gateway.
const AT_ONCE: usize = 2_000;
/// Streams of one link.
const MOST_STREAMS: u32 = 4_096;
/// For each stream that a peer may open quinn keeps the largest buffer bookkeeping that any of them needed, for the next
/// ones: 2.5 KiB each, which grows for an hour of mixed load until all have it. With fewer it is there in a minute, and what
/// grows after that is a leak.
const FEW_STREAMS: u32 = 192;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "not a test: the gateways of the others, each in a process of its own"]
async fn gateway_process() {
    rig::serve().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_connections_arrive_as_sent_over_quic() {
    torture(Transport::Quic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_connections_arrive_as_sent_over_tcp() {
    torture(Transport::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_files_stay_flat_over_quic() {
    soak(Transport::Quic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_files_stay_flat_over_tcp() {
    soak(Transport::Tcp).await;
}

async fn torture(transport: Transport) {
    prepare();
    let seed = from_env("ISTHMUS_SEED").unwrap_or_else(isthmus_runtime::now);
    let connections = from_env("ISTHMUS_CONNECTIONS").unwrap_or(10_000);
    println!("{}: {connections} connections, {AT_ONCE} at once; ISTHMUS_SEED={seed} repeats them", transport.word());
    let load = Load::serve(None).await;
    let dir = repository().join(format!("target/e2e/gateway-{}", transport.word()));
    let world = World::start(&dir, transport, (&["gateway-1"], MOST_STREAMS), &load.endpoints).await;
    let auto = world.east().at.auto;

    let began = Instant::now();
    let open = Arc::new(Semaphore::new(AT_ONCE));
    let mut running = JoinSet::new();
    for id in 0..connections {
        let slot = open.clone().acquire_owned().await.unwrap();
        let (load, plan) = (load.clone(), Arc::new(Plan::draw(seed, id)));
        running.spawn(async move {
            let outcome = load.connection(auto, &plan).await;
            drop(slot);
            (plan, outcome)
        });
    }
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    let (mut bytes, mut wrong) = (0, Vec::new());
    while let Some(done) = running.join_next().await {
        let (plan, outcome) = done.unwrap();
        let faults = match &outcome {
            Ok((client, server)) => {
                bytes += client.received + server.received;
                *ends.entry(format!("client {:?}, server {:?}", client.end, server.end)).or_default() += 1;
                judge(&plan, client, server, false)
            }
            Err(fault) => vec![fault.to_string()],
        };
        if !faults.is_empty() {
            wrong.push(format!("{}\n  plan {plan:?}\n  saw {outcome:?}", faults.join("; ")));
        }
    }
    let took = began.elapsed();
    println!("{} MB in {took:.1?}; {:.0} connections/s", bytes / 1_000_000, connections as f64 / took.as_secs_f64());
    ends.iter().for_each(|(ends, count)| println!("  {count:>6}  {ends}"));
    wrong.extend(load.strange());
    let logs = world.logs();
    let some: Vec<&String> = wrong.iter().take(5).collect();
    assert!(wrong.is_empty(), "{} connections went wrong, seed {seed}, logs in {logs}; {some:#?}", wrong.len());
    assert!(ends.contains_key(&format!("client {:?}, server {:?}", End::Clean, End::Clean)), "{ends:?}");
    world.stop().await;
}

async fn soak(transport: Transport) {
    prepare();
    let seed = from_env("ISTHMUS_SEED").unwrap_or_else(isthmus_runtime::now);
    let lasting = std::env::var("SOAK").ok().filter(|text| !text.is_empty());
    let lasting = lasting.map_or(Duration::from_secs(30), |text| {
        humantime::parse_duration(&text).unwrap_or_else(|e| panic!("SOAK={text}: {e}; write 10m or 90s"))
    });
    println!("{}: soak for {lasting:?}; ISTHMUS_SEED={seed} repeats its stories", transport.word());
    let load = Load::serve(None).await;
    let dir = repository().join(format!("target/e2e/soak-{}", transport.word()));
    let world = World::start(&dir, transport, (&["gateway-1", "gateway-2"], FEW_STREAMS), &load.endpoints).await;
    soak::run(world, load, seed, lasting).await;
}

fn prepare() {
    isthmus_identity::install_crypto();
    isthmus_runtime::open_files::raise();
}

fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}
