//! Services that fail at a cluster: tried last there for a while, and then again; other services, and the way to the
//! cluster, are not touched by that.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use isthmus_model::{
    global::GlobalService,
    ids::{ServiceName, VipIndex},
    sni,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::rig::{Gateway, SOON, Server, answer_hello, introduce, knock, local, sni, until};
use crate::{
    View,
    core::Core,
    testkit::{FEDERATION, cluster, service_name},
};

/// Endpoints, many, so that their own gateway does not take all of them out before the service is out.
const MANY: usize = 16;

/// Endpoints of one service that may be broken: then they take connections and say nothing but an end.
struct Fragile {
    addresses: Vec<SocketAddr>,
    broken: Arc<AtomicBool>,
}

impl Fragile {
    async fn serve(greeting: &'static [u8]) -> Self {
        let mut fragile = Self { addresses: Vec::new(), broken: Arc::default() };
        for _ in 0..MANY {
            let listener = TcpListener::bind(local(0)).await.unwrap();
            fragile.addresses.push(listener.local_addr().unwrap());
            let broken = fragile.broken.clone();
            tokio::spawn(async move {
                while let Ok((mut tcp, _)) = listener.accept().await {
                    // Probes connect and say nothing.
                    if tcp.peek(&mut [0; 1]).await.unwrap_or(0) == 0 {
                        continue;
                    }
                    answer_hello(&mut tcp).await;
                    if !broken.load(Ordering::Relaxed) {
                        tcp.write_all(greeting).await.unwrap();
                    }
                }
            });
        }
        fragile
    }

    fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Relaxed);
    }
}

/// East is the near gateway; north comes before west in the order of choice.
struct Stage {
    gateways: Vec<Gateway>,
    north: Fragile,
    west: Fragile,
    core: Arc<Core>,
}

impl Stage {
    async fn set(pause: Duration) -> Self {
        let (north, west) = (Fragile::serve(b"N").await, Fragile::serve(b"W").await);
        let near = move |config: &mut crate::Config| config.egress.ejection_base = pause;
        let gateways =
            vec![Gateway::start_with("east", near).await, Gateway::start("north").await, Gateway::start("west").await];
        let members: [(&str, &[SocketAddr]); 3] =
            [("east", &[]), ("north", &north.addresses), ("west", &west.addresses)];
        let mut global = introduce(&gateways, &members);
        let cart =
            GlobalService { name: cart(), index: VipIndex(2), ..global.services[&service_name()].as_ref().clone() };
        global.services.insert(cart.name.clone(), cart.into());
        for (gateway, (_, endpoints)) in gateways.iter().zip(members) {
            gateway.set_endpoints(endpoints);
            gateway.set_global(&global);
        }
        for name in ["north", "west"] {
            gateways[0].sees_ready(name).await;
        }
        let core = gateways[0].core().await;
        Self { gateways, north, west, core }
    }

    /// Who serves a new connection at `entry`; `None`: nobody.
    async fn served(&self, entry: SocketAddr, name: &str) -> Option<u8> {
        let mut tcp = knock(entry, name).await;
        let mut greeting = [0; 1];
        let read = tokio::time::timeout(SOON, tcp.read_exact(&mut greeting)).await.expect("an answer, or an end");
        read.is_ok().then_some(greeting[0])
    }

    async fn orders(&self) -> Option<u8> {
        self.served(self.gateways[0].auto, &sni(None)).await
    }

    /// Failed attempts at `name` so far.
    fn failures(&self, name: &str) -> u64 {
        ["rejected_connect_failed", "rejected_no_endpoint"]
            .into_iter()
            .map(|label| self.core.metrics.attempted(&cluster(name), label))
            .sum()
    }
}

fn cart() -> ServiceName {
    ServiceName::new("shop", "cart").unwrap()
}

#[tokio::test]
async fn a_service_that_fails_at_a_cluster_is_tried_last_there_and_nothing_else_is() {
    let stage = Stage::set(Duration::from_secs(3_600)).await;
    let north = &stage.gateways[1];
    let other = Server::bind().await.echo(b"C");
    north.view.send_modify(|view| {
        let mut next = View::clone(view);
        let mut endpoints = isthmus_model::local::LocalEndpoints::clone(&next.endpoints);
        let mut serving = endpoints.services[&service_name()][0].clone();
        serving.ports.values_mut().for_each(|port| *port = other.port());
        endpoints.services.insert(cart(), vec![serving]);
        next.endpoints = Arc::new(endpoints);
        *view = Arc::new(next);
    });
    until("east hears of the other service, too", || {
        let candidates = stage.gateways[0].inspector.candidates(&cart(), 80).unwrap();
        candidates.iter().any(|c| c.cluster == cluster("north") && c.usable())
    })
    .await;
    assert_eq!(stage.orders().await, Some(b'N'));

    stage.north.set_broken(true);
    for failures in 1..=3 {
        assert_eq!(stage.orders().await, Some(b'W'), "replayed");
        assert_eq!(stage.failures("north"), failures);
    }
    assert_eq!(stage.core.metrics.rejected("service_out"), 1);
    for _ in 0..5 {
        assert_eq!(stage.orders().await, Some(b'W'));
    }
    assert_eq!(stage.failures("north"), 3, "not tried any more");
    assert_eq!(stage.gateways[0].eligibility("north").as_deref(), Some("ready"), "by its own word it would do");

    // Another service at the same cluster, by the same way.
    let route = sni::Route { service: cart(), port: 80, cluster: None, selector: None };
    let name = sni::encode(&route, &FEDERATION.parse().unwrap()).unwrap();
    assert_eq!(stage.served(stage.gateways[0].auto, &name).await, Some(b'C'));
    // The same service, where the client has chosen the cluster.
    stage.north.set_broken(false);
    let pinned = stage.gateways[0].inspector.pinned()[&cluster("north")];
    assert_eq!(stage.served(pinned, &sni(Some("north"))).await, Some(b'N'));
    // That was a success: its record is clean.
    assert_eq!(stage.orders().await, Some(b'N'));
}

#[tokio::test]
async fn where_a_service_fails_everywhere_it_is_still_tried_everywhere() {
    let stage = Stage::set(Duration::from_secs(3_600)).await;
    stage.north.set_broken(true);
    stage.west.set_broken(true);
    for _ in 0..3 {
        assert_eq!(stage.orders().await, None);
    }
    assert_eq!(stage.core.metrics.rejected("service_out"), 2);
    stage.west.set_broken(false);
    assert_eq!(stage.orders().await, Some(b'W'));
    assert_eq!(stage.failures("north"), 4, "both are out, so the order stands");
}

#[tokio::test]
async fn what_is_out_is_tried_again_after_pauses_that_double_and_comes_back_when_it_works() {
    const PAUSE: Duration = Duration::from_millis(400);
    let stage = Stage::set(PAUSE).await;
    stage.north.set_broken(true);
    for _ in 0..3 {
        assert_eq!(stage.orders().await, Some(b'W'));
    }
    assert_eq!(stage.core.metrics.rejected("service_out"), 1);
    let mut since = Instant::now();
    for pause in [PAUSE, PAUSE * 2] {
        let before = stage.failures("north");
        let tried = async || stage.orders().await == Some(b'W') && stage.failures("north") > before;
        isthmus_runtime::wait::wait_for("north is tried again", SOON, tried).await.unwrap();
        // The pause began when the failure was counted, a moment before this test knew.
        assert!(since.elapsed() + Duration::from_millis(50) >= pause, "{:?} of {pause:?}", since.elapsed());
        since = Instant::now();
    }
    stage.north.set_broken(false);
    let served = async || stage.orders().await == Some(b'N');
    isthmus_runtime::wait::wait_for("north serves again", SOON, served).await.unwrap();
    until("north is in again", || !stage.core.outcasts().is_out(&service_name(), &cluster("north"), Instant::now()))
        .await;
    for _ in 0..5 {
        assert_eq!(stage.orders().await, Some(b'N'));
    }
}
