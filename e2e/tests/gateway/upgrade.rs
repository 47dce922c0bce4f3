//! Upgrades of the real program: a second `isthmus-gateway` process takes over from the first with `--take-over`, while
//! connections run through it both ways and new ones are opened all the time.
//!
//! East is upgraded, west is its peer, each with an agent that this test plays; north is a cluster whose gateway never
//! answers, so that a successor has something to wait for and can be met while it prepares. All of it is at loopback
//! addresses that no other test has.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use isthmus_e2e::federation::{
    process::{Process, program},
    repository,
};
use isthmus_identity::ca::CertificateAuthority;
use isthmus_model::ids::ClusterName;
use isthmus_runtime::wait::wait_for;
use tokio::net::TcpListener;

use crate::{
    agent::Agent,
    from_env,
    load::Load,
    plan::{Random, Sender},
    prepare,
    rig::{Addresses, DAY, FEDERATION, Facts, SOON, Transport, config, get, useful_tunnels},
    traffic::{Attempts, Places, Route, Traffic},
};

const GATEWAY: &str = "gateway-1";
/// What clusters' pinned ports are counted from.
const PINNED: u16 = 15_500;
/// Each way.
const PLACES: Places = Places { short: 10, long: 4, lasting: (1_000, 2_000) };
/// For a process to end that has connections of up to 2 s to finish.
const END: Duration = Duration::from_secs(30);
/// A gateway says so when it takes connections.
const SERVES: &str = "gateway serves";

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_dropped_or_refused_and_the_old_process_ends_by_itself_over_quic() {
    upgrade(Transport::Quic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_dropped_or_refused_and_the_old_process_ends_by_itself_over_tcp() {
    upgrade(Transport::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_killed_before_it_is_ready_is_noticed_by_nobody_and_another_takes_over_over_quic() {
    successor_killed(Transport::Quic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_killed_before_it_is_ready_is_noticed_by_nobody_and_another_takes_over_over_tcp() {
    successor_killed(Transport::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_predecessor_killed_in_the_middle_loses_what_it_carries_and_nothing_that_comes_over_quic() {
    predecessor_killed(Transport::Quic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_predecessor_killed_in_the_middle_loses_what_it_carries_and_nothing_that_comes_over_tcp() {
    predecessor_killed(Transport::Tcp).await;
}

async fn upgrade(transport: Transport) {
    let mut stage = Stage::set("whole", transport, &["east", "west"]).await;
    let mut old = stage.running.remove("east").unwrap();
    stage.goes_on("traffic before", 30).await;

    let mut new = stage.east.successor("b");
    new.start().unwrap();
    stage.serves(&mut new).await;
    assert!(old.is_running(), "it has long connections to finish");
    ended(&mut old).await;
    stage.goes_on("traffic after", 40).await;
    let told = stage.east.agent.told();
    assert_eq!((told.enrolled, told.instances.len(), told.feeds, told.draining), (1, 2, 1, 0), "{told:?}");

    // And again, from the one that took over.
    let mut third = stage.east.successor("c");
    third.start().unwrap();
    stage.serves(&mut third).await;
    stage.goes_on("traffic after the second", 40).await;
    stage.ends_well().await;
    ended(&mut new).await;
}

async fn successor_killed(transport: Transport) {
    let mut stage = Stage::set("successor", transport, &["east", "north", "west"]).await;
    let mut old = stage.running.remove("east").unwrap();
    stage.goes_on("traffic before", 30).await;
    let mut new = stage.east.successor("b");
    stage.begins(&mut new).await;
    new.kill().await.unwrap();
    let gone = async || stage.links_to_east().await == 1;
    wait_for("west forgets the dead one", SOON, gone).await.unwrap();
    stage.goes_on("traffic after", 40).await;
    assert!(old.is_running());

    let mut next = stage.east.successor("c");
    next.start().unwrap();
    stage.serves(&mut next).await;
    stage.ends_well().await;
    ended(&mut old).await;
}

async fn predecessor_killed(transport: Transport) {
    let mut stage = Stage::set("predecessor", transport, &["east", "north", "west"]).await;
    let mut old = stage.running.remove("east").unwrap();
    stage.goes_on("traffic before", 30).await;
    let mut new = stage.east.successor("b");
    stage.begins(&mut new).await;
    stage.disturb();
    old.kill().await.unwrap();
    stage.disturb();
    stage.serves(&mut new).await;
    stage.goes_on("traffic after", 60).await;
    stage.ends_well().await;
}

/// One cluster's gateway, and who feeds it.
struct Site {
    at: Addresses,
    dir: PathBuf,
    agent: Agent,
}

impl Site {
    /// A process of its gateway, not started, that takes over if there is one to take over from.
    fn successor(&self, letter: &str) -> Process {
        let cluster = self.dir.file_name().unwrap().to_str().unwrap();
        let logs = self.dir.parent().unwrap();
        Process::new(format!("{cluster}/{GATEWAY}-{letter}"), &program("isthmus-gateway").unwrap(), logs)
            .arg("--config")
            .arg(self.dir.join("gateway.yaml"))
            .arg("--take-over")
            .health(self.at.health)
    }
}

struct Stage {
    east: Site,
    west: Site,
    /// The first process of each cluster's gateway.
    running: BTreeMap<&'static str, Process>,
    outward: Traffic,
    inward: Traffic,
    loads: [Arc<Load>; 2],
    seed: u64,
    _north: (UdpSocket, TcpListener),
}

impl Stage {
    /// East and west with traffic both ways; `clusters` are those that they know.
    async fn set(name: &str, transport: Transport, clusters: &[&str]) -> Self {
        prepare();
        let seed = from_env("ISTHMUS_SEED").unwrap_or_else(isthmus_runtime::now);
        println!("{name} over {}: ISTHMUS_SEED={seed} repeats its stories", transport.word());
        let dir = repository().canonicalize().unwrap().join(format!("target/e2e/upgrade-{name}-{}", transport.word()));
        drop(fs::remove_dir_all(&dir));
        let net = Net::own();
        let north = net.at(9, 15_443);
        let deaf = (UdpSocket::bind(north).unwrap(), TcpListener::bind(north).await.unwrap());
        let places = BTreeMap::from([("east", net.gateway(1)), ("north", net.gateway(9)), ("west", net.gateway(2))]);
        let gateways = |name: &&str| ((*name).to_owned(), [(GATEWAY.to_owned(), places[name].tunnel)].into());
        let clusters: BTreeMap<_, _> = clusters.iter().map(gateways).collect();
        let loads = [Load::serve(Some("west")).await, Load::serve(Some("east")).await];
        let ca = Arc::new(CertificateAuthority::create(&FEDERATION.parse().unwrap(), DAY).unwrap());
        let facts = |endpoints: &[SocketAddr]| {
            let mut view = Facts { revision: 1, clusters: clusters.clone(), endpoints: endpoints.to_vec() }.view();
            Arc::make_mut(view.global.as_mut().unwrap()).federation_bundle = ca.bundle();
            view
        };
        let [outward, inward] = &loads;
        let pinned = |view: &isthmus_gateway::View, to: &str| {
            let to: ClusterName = to.parse().unwrap();
            PINNED + view.global.as_ref().unwrap().clusters[&to].index.0
        };
        let mut sites = Vec::new();
        let mut entries = Vec::new();
        let mut running = BTreeMap::new();
        for (host, cluster, to, endpoints) in
            [(1, "east", "west", &inward.endpoints), (2, "west", "east", &outward.endpoints)]
        {
            let at = places[cluster];
            let view = facts(endpoints);
            entries.push(SocketAddr::new(at.auto.ip(), pinned(&view, to)));
            let (agent, token) = Agent::serve(&ca, net.at(host, 7_500), (cluster, GATEWAY), view).await;
            let own = dir.join(cluster);
            fs::create_dir_all(&own).unwrap();
            fs::write(own.join("token"), token.encode()).unwrap();
            let mut settings = config(&own.join("state"), GATEWAY, Some(at), transport);
            settings["agentTokenFile"] = own.join("token").to_str().into();
            settings["listen"]["local"] = at.auto.ip().to_string().into();
            settings["listen"]["pinnedPortBase"] = PINNED.into();
            settings["tunnel"]["deadAfter"] = "2s".into();
            settings["ingress"]["attemptTimeout"] = "5s".into();
            settings["ingress"]["pinnedTimeout"] = "10s".into();
            // For as long a successor waits for north.
            settings["tunnel"]["handshakeTimeout"] = "3s".into();
            // JSON is YAML.
            fs::write(own.join("gateway.yaml"), settings.to_string()).unwrap();
            let site = Site { at, dir: own, agent };
            let mut process = site.successor("a");
            process.start().unwrap();
            running.insert(cluster, process);
            sites.push(site);
        }
        for (site, process) in sites.iter().zip(running.values_mut()) {
            let ready = async || useful_tunnels(site.at.health).await == 1 || !process.is_running();
            let linked = wait_for("the gateways are linked, with endpoints behind them", SOON, ready).await;
            linked.unwrap_or_else(|e| panic!("{e}; logs in {}", dir.display()));
            assert!(process.is_running(), "{}", process.tail());
        }
        let (west, east) = (sites.pop().unwrap(), sites.pop().unwrap());
        let traffic = |i: usize, mortal| {
            Traffic::start(
                loads[i].clone(),
                Route { entry: entries[i], mortal, attempts: Attempts::Two },
                seed ^ i as u64,
                PLACES,
            )
        };
        let (outward, inward) = (traffic(0, Sender::Client), traffic(1, Sender::Server));
        Self { east, west, running, outward, inward, loads, seed, _north: deaf }
    }

    /// Starts `process` and waits until it prepares to take over: it has links, and does not serve.
    async fn begins(&self, process: &mut Process) {
        process.start().unwrap();
        let prepares = async || self.links_to_east().await == 2;
        let waited = wait_for("the successor has linked itself to west", SOON, prepares).await;
        waited.unwrap_or_else(|e| panic!("{e}; {}", process.tail()));
        assert!(!said(process, SERVES), "too fast to be met in the middle: {}", process.tail());
    }

    /// Waits until `process` serves.
    async fn serves(&self, process: &mut Process) {
        let serves = async || said(process, SERVES);
        let waited = wait_for("the successor serves", SOON, serves).await;
        waited.unwrap_or_else(|e| panic!("{e}; {}", process.tail()));
    }

    /// Links that processes of east's gateway have made to west.
    async fn links_to_east(&self) -> u64 {
        let tunnels = get(self.west.at.health, "/debug/tunnels").await.unwrap_or_default();
        tunnels.iter().filter(|t| t["cluster"] == "east").filter_map(|t| t["accepted"].as_u64()).sum()
    }

    /// Waits until so many more connections have come to their end, each way.
    async fn goes_on(&self, what: &str, count: u64) {
        let before = [self.outward.done(), self.inward.done()];
        let more = async || self.outward.done() >= before[0] + count && self.inward.done() >= before[1] + count;
        wait_for(what, SOON, more).await.unwrap();
    }

    fn disturb(&self) {
        self.outward.disturb();
        self.inward.disturb();
    }

    /// Ends the traffic, and judges it.
    async fn ends_well(self) {
        let logs = self.east.dir.parent().unwrap().join("logs");
        let mut wrong = Vec::new();
        let ends = tokio::join!(self.outward.stop(), self.inward.stop());
        for (word, (count, faults)) in [("outward", ends.0), ("inward", ends.1)] {
            println!("{count} connections {word}");
            wrong.extend(faults.into_iter().map(|fault| format!("{word}: {fault}")));
        }
        wrong.extend(self.loads.iter().flat_map(|load| load.strange()));
        let some: Vec<&String> = wrong.iter().take(5).collect();
        assert!(
            wrong.is_empty(),
            "{} went wrong, seed {}, logs in {}; {some:#?}",
            wrong.len(),
            self.seed,
            logs.display()
        );
    }
}

/// Waits until `process` has ended by itself, and with nothing left to do.
async fn ended(process: &mut Process) {
    let status = process.wait(END).await.unwrap();
    assert!(status.success(), "{status}: {}", process.tail());
    assert!(!said(process, "did not end in time"), "{}", process.tail());
}

fn said(process: &Process, words: &str) -> bool {
    fs::read_to_string(process.log()).is_ok_and(|log| log.contains(words))
}

/// Loopback addresses that nobody else has, with some certainty.
struct Net([u8; 2]);

impl Net {
    fn own() -> Self {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let mut random = Random::new(clock.as_nanos() as u64 ^ u64::from(std::process::id()) << 32);
        // Other end-to-end tests use 127.0 to 127.99.
        Self([100 + (random.next() % 100) as u8, (random.next() % 250) as u8])
    }

    fn at(&self, host: u8, port: u16) -> SocketAddr {
        let [second, third] = self.0;
        (Ipv4Addr::new(127, second, third, host), port).into()
    }

    fn gateway(&self, host: u8) -> Addresses {
        let at = |port| self.at(host, port);
        Addresses { tunnel: at(15_443), auto: at(15_440), health: at(15_080) }
    }
}
