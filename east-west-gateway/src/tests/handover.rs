//! Upgrades: a successor takes over from a running gateway, and nobody notices.
//!
//! Predecessor and successor are two gateways on runtimes of their own, with one state directory; a far gateway, an
//! endpoint behind each, and clients that connect all the while.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    task::JoinHandle,
};

use super::rig::{Gateway, SOON, Server, introduce, knock, read, sni, until};
use crate::{config::LinkTransport, handover, metrics::Direction, testkit::cluster};

/// East is upgraded; west is its peer. An endpoint that echoes stands behind each.
struct Stage {
    state: tempfile::TempDir,
    east: Gateway,
    west: Gateway,
}

impl Stage {
    async fn set() -> Self {
        Self::set_over(LinkTransport::Quic).await
    }

    async fn set_over(over: LinkTransport) -> Self {
        let state = tempfile::tempdir().unwrap();
        let dir = state.path().to_owned();
        let east = Gateway::start_with("east", |c| (c.state_dir, c.tunnel.transport) = (dir, over)).await;
        let west = Gateway::start_over(over, "west").await;
        let (here, there) = (Server::bind().await.echo(b"east"), Server::bind().await.echo(b"west"));
        let gateways = [east, west];
        let members: [(&str, &[SocketAddr]); 2] = [("east", &[here]), ("west", &[there])];
        let global = introduce(&gateways, &members);
        for (gateway, (_, endpoints)) in gateways.iter().zip(&members) {
            gateway.set_endpoints(endpoints);
            gateway.set_global(&global);
        }
        gateways[0].sees_ready("west").await;
        gateways[1].sees_ready("east").await;
        // Not by connecting: that would be a successor under way.
        until("the gateway offers its sockets", || handover::path(state.path()).exists()).await;
        let [east, west] = gateways;
        Self { state, east, west }
    }

    async fn successor(&self) -> Gateway {
        self.east.successor(self.state.path()).await
    }

    /// Where traffic enters that must cross the tunnel: at east for west, at west for east.
    fn entries(&self) -> [(SocketAddr, &'static str); 2] {
        [
            (self.east.inspector.pinned()[&cluster("west")], "west"),
            (self.west.inspector.pinned()[&cluster("east")], "east"),
        ]
    }
}

/// Waits until a gateway with this state directory can be asked.
async fn offers(state: &Path) {
    let connects = async || UnixStream::connect(handover::path(state)).await.is_ok();
    isthmus_runtime::wait::wait_for("the gateway offers its sockets", SOON, connects).await.unwrap();
}

/// Opens a connection, says something and hears it back.
async fn one(entry: SocketAddr, name: &str) -> Result<(), String> {
    let whole = async {
        let mut tcp = TcpStream::connect(entry).await.map_err(|e| format!("connect: {e}"))?;
        tcp.write_all(&super::rig::hello(&sni(Some(name)))).await.map_err(|e| format!("hello: {e}"))?;
        let mut greeting = [0; 4];
        tcp.read_exact(&mut greeting).await.map_err(|e| format!("greeting: {e}"))?;
        tcp.write_all(b"payload").await.map_err(|e| format!("send: {e}"))?;
        tcp.shutdown().await.map_err(|e| format!("shutdown: {e}"))?;
        let mut back = Vec::new();
        tcp.read_to_end(&mut back).await.map_err(|e| format!("receive: {e}"))?;
        if back == b"payload" { Ok(()) } else { Err(format!("heard {back:?}")) }
    };
    tokio::time::timeout(SOON, whole).await.unwrap_or(Err("no end in time".to_owned()))
}

/// Connects without a pause until told to stop. Gives how often, and what went wrong.
fn keep_connecting(
    entry: SocketAddr,
    name: &'static str,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
) -> JoinHandle<Vec<String>> {
    tokio::spawn(async move {
        let mut failures = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            if let Err(failure) = one(entry, name).await {
                failures.push(format!("to {name}: {failure}"));
            }
            count.fetch_add(1, Ordering::Relaxed);
        }
        failures
    })
}

/// A connection that lasts, and is used now and then.
struct Lasting {
    tcp: TcpStream,
}

impl Lasting {
    async fn open(entry: SocketAddr, name: &str) -> Self {
        let mut tcp = knock(entry, &sni(Some(name))).await;
        assert_eq!(read(&mut tcp, 4).await, name.as_bytes());
        Self { tcp }
    }

    /// Enough bytes both ways to need many datagrams.
    async fn works(&mut self) {
        let sent: Vec<u8> = (0..200_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let expected = sent.clone();
        let (mut reader, mut writer) = self.tcp.split();
        let mut back = vec![0; expected.len()];
        let both = async { tokio::join!(writer.write_all(&sent), reader.read_exact(&mut back)) };
        let (wrote, received) = tokio::time::timeout(SOON, both).await.expect("bytes flow");
        wrote.unwrap();
        received.unwrap();
        assert!(back == expected, "other bytes came back");
    }

    async fn ends_well(mut self) {
        self.works().await;
        self.tcp.shutdown().await.unwrap();
        assert_eq!(self.tcp.read(&mut [0; 1]).await.unwrap(), 0, "an orderly end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_under_load_fails_nothing_and_ends_the_predecessor() {
    upgrade_under_load(LinkTransport::Quic).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_holds_where_tunnels_run_over_tcp() {
    upgrade_under_load(LinkTransport::Tcp).await;
}

async fn upgrade_under_load(over: LinkTransport) {
    let mut stage = Stage::set_over(over).await;
    let mut lasting = Vec::new();
    for (entry, name) in stage.entries() {
        lasting.push(Lasting::open(entry, name).await);
    }
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = stage
        .entries()
        .into_iter()
        .cycle()
        .take(8)
        .map(|(entry, name)| keep_connecting(entry, name, stop.clone(), count.clone()))
        .collect();
    until("clients are at it", || count.load(Ordering::Relaxed) > 50).await;

    let state = stage.state.path().to_owned();
    let successor = stage.east.try_succeed(|c| (c.state_dir, c.tunnel.transport) = (state, over)).await.unwrap();
    let before = stage.east.core().await;
    before.steps.taken_over.cancelled().await;
    for lasting in &mut lasting {
        lasting.works().await;
    }
    let dialled = || stage.west.inspector.tunnels().iter().map(|t| t.links - t.accepted).sum::<usize>();
    let lanes = stage.west.core().await.config.tunnel.connections_per_peer;
    let both = if over == LinkTransport::Tcp { 2 } else { lanes + 1 };
    until("west has dialled the successor, too", || dialled() >= both).await;
    // Past the moment from which the predecessor refuses streams, and then some.
    before.closing.cancelled().await;
    let so_far = count.load(Ordering::Relaxed);
    until("clients go on", || count.load(Ordering::Relaxed) > so_far + 200).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        assert_eq!(client.await.unwrap(), Vec::<String>::new());
    }
    let after = successor.core().await;
    assert!(after.metrics.carried(Direction::Ingress) > 0 && after.metrics.carried(Direction::Egress) > 0);
    let ingress = before.metrics.carried(Direction::Ingress);
    for (entry, name) in stage.entries() {
        one(entry, name).await.unwrap();
    }
    assert_eq!(before.metrics.carried(Direction::Ingress), ingress, "the predecessor takes nothing new");

    assert_eq!(before.carried.len(), 2, "the predecessor still carries what lasts");
    for mut lasting in lasting {
        lasting.works().await;
        lasting.ends_well().await;
    }
    drop(before);
    stage.east.ended().await;
    for (entry, name) in stage.entries() {
        one(entry, name).await.unwrap();
    }
    offers(stage.state.path()).await;
}

/// A successor that never becomes ready: it is told nothing, and the rest is left on its way.
async fn stuck_successor(stage: &Stage) -> Gateway {
    let stuck = stage.east.stuck_successor(stage.state.path()).await;
    let refused = async || {
        let attempt = stage.east.try_succeed(|config| config.state_dir = stage.state.path().to_owned()).await;
        let Err(error) = attempt else { panic!("two successors at once") };
        isthmus_runtime::tasks::chain(&error).contains("another successor is taking this gateway over")
    };
    isthmus_runtime::wait::wait_for("a second successor is refused", SOON, refused).await.unwrap();
    stuck
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_dies_before_it_is_ready_changes_nothing_and_the_next_one_takes_over() {
    let mut stage = Stage::set().await;
    let [(entry, name), back] = stage.entries();
    let mut lasting = Lasting::open(entry, name).await;
    let mut stuck = stuck_successor(&stage).await;
    one(entry, name).await.unwrap();
    stuck.kill();
    drop(stuck);
    let core = stage.east.core().await;
    lasting.works().await;
    for (entry, name) in [(entry, name), back] {
        one(entry, name).await.unwrap();
    }
    assert!(!core.draining.is_cancelled());
    let next = async || stage.east.try_succeed(|config| config.state_dir = stage.state.path().to_owned()).await.ok();
    let mut successor = None;
    isthmus_runtime::wait::wait_for("the next one is let in", SOON, async || {
        successor = next().await;
        successor.is_some()
    })
    .await
    .unwrap();
    core.steps.taken_over.cancelled().await;
    one(entry, name).await.unwrap();
    lasting.ends_well().await;
    drop(core);
    stage.east.ended().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_predecessor_that_dies_before_the_handover_leaves_its_sockets_to_the_successor() {
    let mut stage = Stage::set().await;
    let stuck = stuck_successor(&stage).await;
    let entries = stage.entries();
    let view = stage.east.view.borrow().clone();
    stage.east.kill();
    stuck.view.send_replace(view);
    stuck.sees_ready("west").await;
    stage.west.sees_ready("east").await;
    for (entry, name) in entries {
        let reached = async || one(entry, name).await.is_ok();
        isthmus_runtime::wait::wait_for("the successor serves", SOON, reached).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_predecessor_that_dies_after_the_handover_takes_only_its_own_connections_along() {
    let mut stage = Stage::set().await;
    let entries = stage.entries();
    let mut lasting = Lasting::open(entries[0].0, entries[0].1).await;
    let successor = stage.successor().await;
    stage.east.core().await.steps.taken_over.cancelled().await;
    let mut young = Lasting::open(entries[0].0, entries[0].1).await;
    stage.east.kill();
    assert!(matches!(lasting.tcp.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    young.works().await;
    let core = successor.core().await;
    core.steps.alone.cancelled().await;
    for (entry, name) in entries {
        one(entry, name).await.unwrap();
    }
    young.ends_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_dies_after_the_handover_can_be_succeeded_while_the_predecessor_finishes() {
    let mut stage = Stage::set().await;
    let entries = stage.entries();
    let mut lasting = Lasting::open(entries[0].0, entries[0].1).await;
    let mut successor = stage.successor().await;
    let before = stage.east.core().await;
    before.steps.taken_over.cancelled().await;
    successor.core().await.steps.open.cancelled().await;
    successor.kill();
    drop(successor);
    lasting.works().await;
    let mut next = None;
    let addresses = (stage.east.auto, stage.east.tunnel);
    isthmus_runtime::wait::wait_for("the next one finds what is left", SOON, async || {
        let state = stage.state.path().to_owned();
        next = stage.east.try_succeed(|c| (c.listen.tunnel, c.state_dir) = (addresses.1, state)).await.ok();
        next.is_some()
    })
    .await
    .unwrap();
    let next = next.unwrap();
    assert_eq!(next.tunnel, addresses.1, "no other socket could have this address");
    next.core().await.steps.open.cancelled().await;
    next.sees_ready("west").await;
    let entry = next.inspector.pinned()[&cluster("west")];
    one(entry, "west").await.unwrap();
    lasting.ends_well().await;
    drop(before);
    stage.east.ended().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_binds_what_its_predecessor_has_not() {
    let mut stage = Stage::set().await;
    let free = super::rig::refusing().await;
    let state = stage.state.path().to_owned();
    let change = |config: &mut crate::Config| {
        (config.state_dir, config.listen.auto_port, config.listen.tunnel) =
            (state, free.port(), "127.0.0.2:0".parse().unwrap());
    };
    let successor = stage.east.try_succeed(change).await.unwrap();
    assert_eq!(successor.auto, free);
    assert_ne!(successor.tunnel, stage.east.tunnel);
    successor.core().await.steps.open.cancelled().await;
    let pinned = stage.east.inspector.pinned();
    stage.east.ended().await;
    assert_eq!(successor.inspector.pinned(), pinned);
    one(pinned[&cluster("west")], "west").await.unwrap();
    assert!(TcpStream::connect(stage.east.auto).await.is_err(), "what nobody configures is closed");
}

#[tokio::test]
async fn a_socket_that_a_dead_gateway_left_is_no_obstacle() {
    let state = tempfile::tempdir().unwrap();
    let path = handover::path(state.path());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let alone = Gateway::start("east").await;
    let afresh = alone.try_succeed(|config| config.state_dir = state.path().to_owned()).await.unwrap();
    assert!(afresh.core().await.steps.open.is_cancelled());
    offers(state.path()).await;
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_gateway_of_another_name_is_refused_and_told_why() {
    let stage = Stage::set().await;
    let state = stage.state.path().to_owned();
    let attempt = stage.east.try_succeed(|c| (c.name, c.state_dir) = ("gateway-2".to_owned(), state)).await;
    let Err(error) = attempt else { panic!("taken over by another") };
    let error = isthmus_runtime::tasks::chain(&error);
    assert!(error.contains("it is \"gateway-1\", not \"gateway-2\""), "{error}");
    assert!(!stage.east.core().await.draining.is_cancelled());
}
