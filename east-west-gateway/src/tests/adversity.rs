//! Peers that do not behave, and many services: what must not follow from either.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use isthmus_api::proto::{
    common::v1 as common,
    tunnel::v1::{
        AvailabilityUpdate, ControlFrame, ControlHello, Goaway, RejectReason, StreamHeader, StreamReply,
        control_frame::Kind, stream_reply,
    },
};
use isthmus_model::{
    failover::Eligibility,
    global::GlobalSnapshot,
    ids::{ServiceName, VipIndex},
    local::LocalEndpoints,
    service::GatewayAddress,
};
use prometheus_client::metrics::counter::Counter;
use quinn::{Runtime as _, TokioRuntime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time,
};

use super::rig::{Gateway, Server, connected, hello, introduce, local, next, refusing, sni, svid, trust, until};
use crate::{
    View,
    frame::{self, FrameReader, MAX_CONTROL, MAX_HEADER},
    handover::cids::CidKey,
    testkit::{FEDERATION, cluster, service_name},
    tunnel::{
        link::{RecvHalf, SendHalf, quic},
        registry::{Origin, Registry, Tunnel},
    },
};

fn identity(name: &str) -> quic::Identity {
    quic::Identity {
        source: isthmus_identity::tls::IdentitySource::new(svid(name)),
        trust: trust(),
        federation: FEDERATION.parse().unwrap(),
    }
}

fn framed(kind: Kind) -> Vec<u8> {
    frame::encode(&ControlFrame { kind: Some(kind) }).unwrap().to_vec()
}

fn greeting(gateway: &str) -> Vec<u8> {
    framed(Kind::Hello(ControlHello { version: 1, gateway: gateway.to_owned() }))
}

fn says(snapshot: bool, ready: u32) -> Vec<u8> {
    let service = common::ServiceName { namespace: "shop".into(), name: "orders".into() };
    let entry = common::Availability { service: Some(service), ready, total: 1, reachable: true, ..Default::default() };
    framed(Kind::Availability(AvailabilityUpdate { snapshot, services: vec![entry], ..Default::default() }))
}

/// A link to `to` by a gateway of `name` that calls itself `gateway`, its control stream held by the test.
struct ByHand {
    connection: quinn::Connection,
    send: quinn::SendStream,
    _reader: FrameReader,
    _endpoint: quinn::Endpoint,
}

impl ByHand {
    async fn dial(name: &str, gateway: &str, to: &Gateway) -> Self {
        let core = to.core().await;
        let endpoint = quinn::Endpoint::client(local(0)).unwrap();
        let peer = (&core.cluster, to.tunnel);
        let connection = quic::connect(&endpoint, &core.config.tunnel, &identity(name), peer).await.unwrap();
        let (mut send, recv) = connection.open_bi().await.unwrap();
        send.write_all(&greeting(gateway)).await.unwrap();
        let mut reader = FrameReader::new(RecvHalf::Quic(recv.into()), MAX_CONTROL);
        assert!(matches!(reader.next::<ControlFrame>().await.unwrap().kind, Some(Kind::Hello(_))));
        Self { connection, send, _reader: reader, _endpoint: endpoint }
    }
}

fn patient(config: &mut crate::Config) {
    // Peers by hand answer no probes.
    (config.tunnel.dead_after, config.tunnel.idle_timeout) = (Duration::from_secs(60), Duration::from_secs(120));
}

/// As many services as an update does not hold.
const MANY: usize = 600;

fn numbered(i: usize) -> ServiceName {
    ServiceName::new("shop", &format!("s-{i:03}")).unwrap()
}

fn many(mut global: GlobalSnapshot) -> GlobalSnapshot {
    let one = global.services.remove(&service_name()).unwrap();
    global.services = (0..MANY)
        .map(|i| {
            let mut service = one.as_ref().clone();
            (service.name, service.index) = (numbered(i), VipIndex(u32::try_from(i + 1).unwrap()));
            (numbered(i), service.into())
        })
        .collect();
    global
}

fn word(gateway: &Gateway, service: &ServiceName, name: &str) -> Option<Eligibility> {
    let candidates = gateway.inspector.candidates(service, 80)?;
    candidates.into_iter().find(|c| c.cluster == cluster(name)).map(|c| c.eligibility)
}

#[tokio::test]
async fn a_new_link_is_no_news_of_services_that_do_not_fit_its_first_word() {
    let west = Server::bind().await.echo(b"west");
    let members: [(&str, &[_]); 2] = [("east", &[]), ("west", &[west])];
    let gateways = [Gateway::start("east").await, Gateway::start("west").await];
    let global = many(introduce(&gateways, &members));
    gateways[1].set_endpoints(&[west]);
    gateways[1].view.send_modify(|view| {
        let one = view.endpoints.of(&service_name()).to_vec();
        let services: BTreeMap<_, _> = (0..MANY).map(|i| (numbered(i), one.clone())).collect();
        *view = Arc::new(View { endpoints: Arc::new(LocalEndpoints { services }), ..View::clone(view) });
    });
    gateways.iter().for_each(|gateway| gateway.set_global(&global));
    let of_last = || word(&gateways[0], &numbered(MANY - 1), "west");
    until("all are ready", || of_last() == Some(Eligibility::Ready)).await;

    let core = gateways[0].core().await;
    for _ in 0..3 {
        let before = core.registry.own_links(&cluster("west"));
        core.identity.source.set(svid("east"));
        let only_new = || {
            let now = core.registry.own_links(&cluster("west"));
            !now.is_empty() && now.iter().all(|id| !before.contains(id))
        };
        until("a new link stands in for the old one", only_new).await;
    }
    until("it has spoken", || gateways[0].inspector.tunnels().iter().all(|t| t.ready.len() == MANY)).await;
    let disturbed = |i: &usize| word(&gateways[0], &numbered(*i), "west") != Some(Eligibility::Ready);
    assert_eq!((0..MANY).find(disturbed), None, "nothing went away and came back");
}

#[tokio::test]
async fn a_tunnel_whose_answers_are_overdue_comes_last() {
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = connected(&[("east", &[]), ("west", &[west])]).await;
    let core = gateways[0].core().await;
    let link = core.registry.pick(&cluster("west"), &[]).unwrap().link.clone();
    let registry = Registry::default();
    for name in ["stopped-1", "stopped-2", "stopped-3", "well"] {
        let key = (cluster("west"), name.to_owned());
        let tunnel = Arc::new(Tunnel::new(&core, key, link.clone(), Origin::Accepted));
        tunnel.set_suspect(name != "well");
        registry.up(&tunnel);
    }
    for _ in 0..50 {
        assert_eq!(registry.pick(&cluster("west"), &[]).unwrap().gateway, "well");
    }
}

#[tokio::test]
async fn a_hello_for_something_else_than_its_header_is_refused() {
    let west = Server::bind().await.echo(b"west");
    let (mut gateways, _) = connected(&[("east", &[]), ("west", &[west])]).await;
    let west = gateways.pop().unwrap();
    let peer = ByHand::dial("east", "by-hand", &west).await;
    let ask = async |name: String| {
        let service = common::ServiceName { namespace: "shop".into(), name: "orders".into() };
        let header =
            StreamHeader { version: 1, service: Some(service), port: 80, deadline_ms: 500, ..Default::default() };
        let (mut send, recv) = peer.connection.open_bi().await.unwrap();
        send.write_all(&[frame::encode(&header).unwrap().to_vec(), hello(&name)].concat()).await.unwrap();
        let mut reader = FrameReader::new(RecvHalf::Quic(recv.into()), MAX_HEADER);
        let reply = time::timeout(Duration::from_secs(3), reader.next::<StreamReply>()).await;
        match reply.expect("answered in time").unwrap().kind.unwrap() {
            stream_reply::Kind::Accept(_) => None,
            stream_reply::Kind::Reject(reject) => Some(reject.reason()),
        }
    };
    assert_eq!(ask(sni(None)).await, None);
    assert_eq!(ask(sni(Some("west"))).await, None);
    for name in [
        sni(Some("east")),
        format!("80.secret.shop.svc.any.{FEDERATION}"),
        format!("81.orders.shop.svc.any.{FEDERATION}"),
        format!("80.orders.shop.10-0-0-1.svc.any.{FEDERATION}"),
        "admin.internal".to_owned(),
    ] {
        assert_eq!(ask(name.clone()).await, Some(RejectReason::Malformed), "{name}");
    }
}

#[tokio::test]
async fn a_peer_that_says_much_is_followed_at_a_pace() {
    let east = Gateway::start_with("east", patient).await;
    east.set_global(&crate::testkit::federation(&["east", "west"]));
    let core = east.core().await;
    let mut peer = ByHand::dial("west", "by-hand", &east).await;
    peer.send.write_all(&says(true, 1)).await.unwrap();
    east.sees_ready("west").await;
    let before = *core.observed.version().borrow();
    let began = std::time::Instant::now();
    let flood: Vec<u8> = (0..2_000).flat_map(|i| says(false, i % 2)).chain(says(false, 0)).collect();
    peer.send.write_all(&flood).await.unwrap();
    until("the last word counts", || {
        east.inspector.tunnels().iter().all(|t| t.ready[&service_name()] == 0)
            && east.eligibility("west").as_deref() == Some("noEndpoints")
    })
    .await;
    let acted = u128::from(*core.observed.version().borrow() - before);
    let allowed = began.elapsed().as_millis() / 10 + 2;
    assert!(acted <= allowed, "{acted} times, {allowed} allowed");
}

#[tokio::test]
async fn a_peer_under_ever_new_names_leaves_no_metrics_behind() {
    let health = refusing().await;
    let east = Gateway::start_with("east", |config| {
        patient(config);
        config.listen.health = health;
    })
    .await;
    east.set_global(&crate::testkit::federation(&["east", "west"]));
    let core = east.core().await;
    let peer = ByHand::dial("west", "name-1", &east).await;
    until("it is known", || core.registry.count(&cluster("west")) == 1).await;
    let tunnel = core.registry.pick(&cluster("west"), &[]).unwrap();
    core.metrics.path(&tunnel);
    assert!(metrics(health).await.contains("name-1"));
    peer.connection.close(0_u32.into(), b"bye");
    until("it is gone", || core.registry.count(&cluster("west")) == 0).await;
    time::timeout(super::rig::SOON, async { while metrics(health).await.contains("name-1") {} })
        .await
        .expect("forgotten");
}

async fn metrics(health: SocketAddr) -> String {
    let mut tcp = tokio::net::TcpStream::connect(health).await.unwrap();
    tcp.write_all(b"GET /metrics HTTP/1.0\r\nhost: x\r\n\r\n").await.unwrap();
    let mut text = String::new();
    tcp.read_to_string(&mut text).await.unwrap();
    assert!(text.contains("isthmus_gateway_"), "{text}");
    text
}

#[tokio::test]
async fn a_peer_that_calls_for_its_successor_over_and_over_is_dialled_with_pauses() {
    let east = Gateway::start("east").await;
    let core = east.core().await;
    let socket = TokioRuntime.wrap_udp_socket(std::net::UdpSocket::bind(local(0)).unwrap()).unwrap();
    let (key, garbage) = (CidKey::random(), Counter::default());
    let config = &core.config.tunnel;
    let endpoint = quic::endpoint_on(socket, key, config, &identity("west"), garbage).unwrap();
    let mut global = crate::testkit::federation(&["east", "west"]);
    let address = GatewayAddress { name: "gateway-1".to_owned(), tunnel: Some(endpoint.local_addr().unwrap()) };
    global.clusters.get_mut(&cluster("west")).unwrap().gateways = vec![address];
    let dialled = Arc::new(AtomicUsize::new(0));
    let count = dialled.clone();
    tokio::spawn(async move {
        let mut links = Vec::new();
        while let Some(incoming) = endpoint.accept().await {
            let Ok(connection) = incoming.await else { continue };
            count.fetch_add(1, Ordering::Relaxed);
            let (mut send, recv) = connection.accept_bi().await.unwrap();
            let words = [greeting("gateway-1"), framed(Kind::Goaway(Goaway { successor: true }))].concat();
            send.write_all(&words).await.unwrap();
            links.push((connection, SendHalf::Quic(send.into()), recv));
        }
    });
    let began = std::time::Instant::now();
    east.set_global(&next(&global));
    until("it is dialled again", || dialled.load(Ordering::Relaxed) >= 3).await;
    // Pauses grow from 100 ms on, with jitter.
    until("a while has passed", || began.elapsed() >= Duration::from_millis(1_500)).await;
    let count = dialled.load(Ordering::Relaxed);
    assert!(count <= 30, "dialled {count} times in {:?}", began.elapsed());
}
