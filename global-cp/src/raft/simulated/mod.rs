//! The engine itself, with the real log, machine, proposer and reads, three nodes in one thread under tokio's paused clock
//! and over a network of our own: crashes, partitions, lost answers, under concurrent writes and reads whose history must be
//! linearizable. A second of it takes milliseconds.
//!
//! The seed decides the faults, the clients and the network's delays. What it does not: the engine's own choices (its
//! election timeouts, and which of two ready tasks goes first), so that a seed makes a failure likely again, not certain.
//! `ISTHMUS_SEED=N` runs that schedule ten times, `SCHEDULES=N` so many.

#[path = "../../../../e2e/tests/control_plane/history.rs"]
mod history;
mod network;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use isthmus_identity::{ca::CertificateAuthority, keys::KeyPair, svid::Svid, tls::IdentitySource};
use isthmus_model::time::Timestamp;
use isthmus_runtime::{tasks::Tasks, wait::wait_for};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tempfile::TempDir;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

pub(in crate::raft) use self::network::Link;
use self::{
    history::{Operation, Seen, contradictions},
    network::Network,
};
use super::{Group, Inbound, Own, Peer, Peers, Proposer, Store, StoreError};
use crate::state::{Actor, Command, MintToken, ProposalId, State, TokenHash};

/// Schedules of one run of the suite; each of so long a time.
const SCHEDULES: u64 = 120;
const LASTING: Duration = Duration::from_secs(20);
const THREADS: usize = 2;
/// Schedules among which a planted bug must show.
const FOR_A_BUG: u64 = 150;
const NODES: [&str; 3] = ["cp-1", "cp-2", "cp-3"];
const CLIENTS: u64 = 4;
const SOON: Duration = Duration::from_secs(60);
const SEGMENT: u64 = 1 << 16;

/// A bug that is planted, to see that it is caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    /// Reads ask nobody.
    StaleReads,
    /// A leader that restarts does not know that more was committed than it can tell.
    ForgottenEnd,
    /// A client that got no answer asks again as for something new.
    NewIdOnRetry,
    /// A node that restarts has lost the end of its log.
    LostTail,
}

const BUGS: [Bug; 4] = [Bug::StaleReads, Bug::ForgottenEnd, Bug::NewIdOnRetry, Bug::LostTail];

static SOURCE: LazyLock<IdentitySource> = LazyLock::new(|| {
    let ca = CertificateAuthority::create(&"isthmus.example".parse().unwrap(), Duration::from_secs(3600)).unwrap();
    let key = KeyPair::generate().unwrap();
    let id = "spiffe://isthmus.example/cp/cp-1".parse().unwrap();
    let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], Duration::from_secs(60)).unwrap();
    IdentitySource::new(Svid::new(chain, &key).unwrap())
});

static BUNDLE: LazyLock<Command> = LazyLock::new(|| {
    let ca = CertificateAuthority::create(&"isthmus.example".parse().unwrap(), Duration::from_secs(3600)).unwrap();
    Command::SetFederationBundle { bundle: ca.bundle() }
});

/// A node that runs.
#[derive(Clone)]
struct Running {
    group: Group,
    proposer: Proposer,
    alive: Arc<AtomicBool>,
}

struct Simulation {
    dir: TempDir,
    network: Network,
    /// Shared with the clients.
    running: Arc<Mutex<BTreeMap<usize, Running>>>,
    bug: Option<Bug>,
}

fn peers() -> BTreeMap<u64, Peer> {
    let peer = |name: &str| Peer { name: name.to_owned(), address: format!("{name}:7443") };
    (1..).zip(NODES.map(peer)).collect()
}

impl Simulation {
    fn new(seed: u64, bug: Option<Bug>) -> Self {
        // In memory, if there is a place for that: files are flushed as always.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self { dir: dir.unwrap(), network: Network::new(seed), running: Arc::default(), bug }
    }

    async fn start(&self, node: usize) {
        let (name, folder) = (NODES[node], self.dir.path().join(NODES[node]));
        let store = loop {
            match Store::open(&folder, SEGMENT) {
                // What ran before lets go of it as soon as it notices.
                Err(StoreError::InUse { .. }) => sleep(Duration::from_millis(10)).await,
                opened => break opened.unwrap(),
            }
        };
        let id = node as u64 + 1;
        let own = Own { id, node: name.parse().unwrap(), peer: peers()[&id].clone(), founds: node == 0 };
        let link = self.network.link(name);
        let peers = Peers::simulated(SOURCE.clone(), "isthmus.example".parse().unwrap(), link);
        let mut group = Group::start(store, own, peers, 40).await.unwrap();
        if self.bug == Some(Bug::ForgottenEnd) {
            group.resumed = None;
        }
        let proposer = group.proposer(&Tasks::new(), Actor::default());
        self.network.starts(name, Inbound::new(group.clone()));
        let running = Running { group, proposer, alive: Arc::new(AtomicBool::new(true)) };
        self.running.lock().unwrap().insert(node, running);
    }

    /// Nothing that it does from now on is heard of.
    async fn kill(&self, node: usize) {
        self.network.ends(NODES[node]);
        let running = self.running.lock().unwrap().remove(&node);
        if let Some(running) = running {
            running.alive.store(false, Ordering::Relaxed);
            running.group.stop().await;
        }
        if self.bug == Some(Bug::LostTail) {
            lose_tail(&self.dir.path().join(NODES[node]));
        }
    }

    fn leader(&self) -> Option<usize> {
        let running = self.running.lock().unwrap();
        let leads = |running: &Running| running.group.metrics().borrow().state == openraft::ServerState::Leader;
        running.iter().find(|(_, running)| leads(running)).map(|(node, _)| *node)
    }

    fn get(&self, node: usize) -> Option<Running> {
        self.running.lock().unwrap().get(&node).cloned()
    }

    /// Three nodes that vote.
    async fn found(&self) {
        for node in 0..NODES.len() {
            self.start(node).await;
        }
        let first = self.get(0).unwrap();
        first.proposer.propose(BUNDLE.clone()).await.unwrap();
        let wanted = peers();
        let joined =
            async || matches!(first.group.follow(&wanted).await, Ok(false)) && voters(&first.group) == NODES.len();
        wait_for("all nodes to vote", SOON, joined).await.unwrap();
    }

    async fn fault(&self, rng: &mut StdRng) {
        let any = rng.random_range(0..NODES.len());
        let leader = self.leader().unwrap_or(any);
        let away = Duration::from_millis(if rng.random_bool(0.4) { 0 } else { rng.random_range(0..4_000) });
        let everyone = || (0..NODES.len()).collect::<Vec<_>>();
        match rng.random_range(0..7) {
            0 | 1 => self.crash(&[leader], away).await,
            2 => self.crash(&[any], away).await,
            3 => self.crash(&everyone(), away).await,
            4 => self.part(|from, to| from == leader || to == leader, away).await,
            5 => self.part(|from, _| from == any, away).await,
            _ => self.part(|from, to| (from == any) != (to == any), away).await,
        }
    }

    async fn crash(&self, nodes: &[usize], away: Duration) {
        for node in nodes {
            self.kill(*node).await;
        }
        sleep(away).await;
        for node in nodes {
            self.start(*node).await;
        }
    }

    async fn part(&self, lost: impl Fn(usize, usize) -> bool, away: Duration) {
        let pairs = (0..NODES.len()).flat_map(|from| (0..NODES.len()).map(move |to| (from, to)));
        let cuts = pairs.filter(|(from, to)| from != to && lost(*from, *to));
        self.network.cut(cuts.map(|(from, to)| (NODES[from].to_owned(), NODES[to].to_owned())).collect());
        sleep(away * 2).await;
        self.network.cut(BTreeSet::new());
    }

    /// Every node comes to hold the same: that state. A write that nobody got an answer to may be committed while they are
    /// looked at, so a difference counts only if it stays.
    async fn settled(&self) -> Result<State, String> {
        let mut differ = String::new();
        let mut settled = None;
        let agree = async || match self.compared().await {
            Ok(state) => {
                settled = Some(state);
                true
            }
            Err(error) => {
                differ = error;
                false
            }
        };
        drop(wait_for("the nodes to agree", SOON, agree).await);
        settled.ok_or(differ)
    }

    async fn compared(&self) -> Result<State, String> {
        let mut states = Vec::new();
        for node in 0..NODES.len() {
            let running = self.get(node).unwrap();
            let read = async || running.group.barrier().await.is_ok();
            wait_for("a read that sees everything", SOON, read).await.map_err(|error| format!("{node}: {error}"))?;
            states.push(running.group.views().borrow().state().clone());
        }
        let texts: Vec<String> = states.iter().map(|state| serde_json::to_string(state).unwrap()).collect();
        let Some([one, other]) = texts.windows(2).find(|two| two[0] != two[1]) else { return Ok(states.remove(0)) };
        let at = one.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count().saturating_sub(60);
        let shown = |text: &str| text.chars().skip(at).take(400).collect::<String>();
        Err(format!("the nodes differ:\n{}\n{}", shown(one), shown(other)))
    }
}

fn voters(group: &Group) -> usize {
    group.metrics().borrow().membership_config.voter_ids().count()
}

/// Cuts the last file of the log to its header, as if none of it had been flushed.
fn lose_tail(folder: &Path) {
    let Ok(files) = std::fs::read_dir(folder.join("raft/log")) else { return };
    let last = files.map(|file| file.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "log")).max();
    let Some(last) = last else { return };
    let mut bytes = std::fs::read(&last).unwrap();
    bytes.truncate(32);
    bytes.resize(usize::try_from(SEGMENT).unwrap(), 0);
    std::fs::write(last, bytes).unwrap();
}

/// What clients share.
#[derive(Clone)]
struct Clients {
    running: Arc<Mutex<BTreeMap<usize, Running>>>,
    operations: Arc<Mutex<Vec<Operation>>>,
    names: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    bug: Option<Bug>,
}

impl Clients {
    async fn run(self, mut rng: StdRng) {
        while !self.stop.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(rng.random_range(1..400))).await;
            let node = rng.random_range(0..NODES.len());
            let Some(node) = self.running.lock().unwrap().get(&node).cloned() else { continue };
            let began = Instant::now().into_std();
            let seen = if rng.random_bool(0.5) { self.append(&node, &mut rng).await } else { self.read(&node).await };
            if let Some(seen) = seen {
                let ended = Instant::now().into_std();
                self.operations.lock().unwrap().push(Operation { began, ended, seen });
            }
        }
    }

    async fn append(&self, node: &Running, rng: &mut StdRng) -> Option<Seen> {
        let name = format!("w{}", self.names.fetch_add(1, Ordering::Relaxed));
        let (cluster, now) = (name.parse().unwrap(), Timestamp(1));
        let token =
            MintToken { hash: TokenHash(rng.random()), cluster, expires_at: Timestamp(u64::MAX), grant: None, now };
        let mut id = ProposalId(rng.random());
        let mut done = node.proposer.propose_once(id, Command::MintToken(token.clone())).await.is_ok();
        // Some ask again, at another node.
        if rng.random_bool(0.3) || (!done && rng.random_bool(0.5)) {
            if self.bug == Some(Bug::NewIdOnRetry) {
                id = ProposalId(rng.random());
            }
            let other = self.running.lock().unwrap().values().next_back().cloned();
            if let Some(other) = other {
                done |= other.proposer.propose_once(id, Command::MintToken(token)).await.is_ok();
            }
        }
        Some(if done { Seen::Appended(name) } else { Seen::Unknown(name) })
    }

    async fn read(&self, node: &Running) -> Option<Seen> {
        if self.bug != Some(Bug::StaleReads) {
            node.group.barrier().await.ok()?;
        }
        let last = appends(node.group.views().borrow().state()).next();
        // A process that was killed answers nothing.
        node.alive.load(Ordering::Relaxed).then_some(Seen::Read(last))
    }
}

/// Latest first.
fn appends(state: &State) -> impl Iterator<Item = (u64, String)> {
    let appended = state.events().filter(|event| event.action == "mint-join-token" && event.outcome == "unchanged");
    appended.map(|event| (event.number + 1, event.subject.clone()))
}

/// One schedule: what contradicts what, and how much was done.
async fn schedule(seed: u64, bug: Option<Bug>) -> (Vec<String>, [usize; 4]) {
    let simulation = Simulation::new(seed, bug);
    simulation.found().await;
    let clients = Clients {
        running: simulation.running.clone(),
        operations: Arc::default(),
        names: Arc::default(),
        stop: Arc::default(),
        bug,
    };
    let mut tasks = JoinSet::new();
    for number in 0..CLIENTS {
        tasks.spawn(clients.clone().run(StdRng::seed_from_u64(seed.wrapping_add(number))));
    }
    let (mut rng, began, mut faults) = (StdRng::seed_from_u64(seed), Instant::now(), 0);
    while began.elapsed() < LASTING {
        simulation.fault(&mut rng).await;
        faults += 1;
        sleep(Duration::from_millis(rng.random_range(100..2_500))).await;
    }
    clients.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let history = std::mem::take(&mut *clients.operations.lock().unwrap());
    let count = |of: fn(&Seen) -> bool| history.iter().filter(|op| of(&op.seen)).count();
    let counts = [
        faults,
        count(|seen| matches!(seen, Seen::Appended(_))),
        count(|seen| matches!(seen, Seen::Unknown(_))),
        count(|seen| matches!(seen, Seen::Read(_))),
    ];
    let found = match simulation.settled().await {
        Ok(state) => {
            let mut list: Vec<_> = appends(&state).collect();
            list.reverse();
            contradictions(&history, &list)
        }
        Err(what) => vec![what],
    };
    for node in 0..NODES.len() {
        simulation.kill(node).await;
    }
    (found, counts)
}

/// Schedule after schedule until one finds something: which, and what; and how much was done in all.
fn run(seeds: &[u64], bug: Option<Bug>) -> (Option<(u64, Vec<String>)>, [usize; 4]) {
    isthmus_identity::install_crypto();
    let (next, results) = (AtomicUsize::new(0), Mutex::new((None, [0; 4])));
    let one_after_the_other = || {
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            if results.lock().unwrap().0.is_some() {
                return;
            }
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
            let (found, counts) = runtime.block_on(schedule(*seed, bug));
            let mut results = results.lock().unwrap();
            for (sum, count) in results.1.iter_mut().zip(counts) {
                *sum += count;
            }
            if !found.is_empty() {
                results.0 = Some((*seed, found));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(one_after_the_other);
        }
    });
    results.into_inner().unwrap()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn whatever_the_schedule_the_engine_loses_nothing_and_its_reads_are_linearizable() {
    let schedules = number("SCHEDULES").unwrap_or(SCHEDULES);
    let seeds: Vec<u64> = match number("ISTHMUS_SEED") {
        Some(seed) => vec![seed; 10],
        None => {
            let first = rand::random::<u64>() >> 16;
            (first..first + schedules).collect()
        }
    };
    println!("ISTHMUS_SEED={} and those that follow", seeds[0]);
    let (found, [faults, acknowledged, unknown, reads]) = run(&seeds, None);
    println!("{faults} faults, {acknowledged} writes acknowledged, {unknown} not, {reads} reads");
    if let Some((seed, what)) = found {
        panic!("ISTHMUS_SEED={seed}: {} contradictions: {:#?}", what.len(), &what[..what.len().min(5)]);
    }
}

#[test]
fn every_planted_bug_of_the_engine_is_caught() {
    let mut missed = Vec::new();
    let seeds: Vec<u64> = (0..FOR_A_BUG).collect();
    for bug in BUGS {
        match run(&seeds, Some(bug)).0 {
            Some((seed, what)) => println!("{bug:?}: seed {seed}: {}", what[0]),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught in {FOR_A_BUG} schedules: {missed:?}");
}
