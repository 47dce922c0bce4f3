//! Real packets against a real listener: UDP, TCP, truncation, refusals, garbage, and the forwarder with a second
//! server as its upstream.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, RecordType},
};
use isthmus_model::{availability::Observations, service::ServiceKind};
use isthmus_runtime::tasks::{Shutdown, Tasks};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::*;
use crate::{
    fixture::{endpoint, endpoints, service, snapshot, sources},
    zone::Sources,
};

const DEADLINE: Duration = Duration::from_secs(10);

struct Served {
    at: SocketAddr,
    zone: CurrentZone,
    metrics: Metrics,
    shutdown: Shutdown,
    _tasks: Tasks,
}

async fn serve(zone: Option<Zone>, upstreams: &[SocketAddr]) -> Served {
    let zone: CurrentZone = Arc::new(ArcSwapOption::from_pointee(zone));
    let metrics = Metrics::default();
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let at = listener.address();
    let handler = Handler::new(zone.clone(), upstreams, metrics.clone()).unwrap();
    let tasks = Tasks::new();
    let shutdown = tasks.shutdown();
    let stop = shutdown.clone();
    tasks.spawn("dns", async move { listener.serve(handler, stop).await.unwrap() });
    Served { at, zone, metrics, shutdown, _tasks: tasks }
}

fn build(sources: &Sources) -> Zone {
    Zone::build(sources, Arc::new(Observations::default()))
}

/// A headless service so large that no UDP answer holds it.
fn large() -> Zone {
    let mut sources = sources(snapshot());
    sources.endpoints = endpoints((0..200).map(|i| endpoint(&format!("10.0.1.{i}"), true)).collect());
    build(&sources)
}

async fn started() -> Served {
    serve(Some(build(&sources(snapshot()))), &[]).await
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut message: Message, size: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(size);
    message.set_edns(edns);
    message
}

/// The answer and its length in bytes.
async fn udp(at: SocketAddr, message: &Message) -> (Message, usize) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&message.to_vec().unwrap(), at).await.unwrap();
    let mut buffer = vec![0; 65_535];
    let (length, _) = timeout(DEADLINE, socket.recv_from(&mut buffer)).await.expect("an answer").unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(answer.metadata.id, message.metadata.id);
    (answer, length)
}

async fn tcp(at: SocketAddr, message: &Message) -> Message {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let bytes = message.to_vec().unwrap();
    stream.write_all(&u16::try_from(bytes.len()).unwrap().to_be_bytes()).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    let length = timeout(DEADLINE, stream.read_u16()).await.expect("an answer").unwrap();
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await.unwrap();
    Message::from_vec(&answer).unwrap()
}

async fn code(at: SocketAddr, message: &Message) -> ResponseCode {
    udp(at, message).await.0.metadata.response_code
}

#[tokio::test]
async fn udp_and_tcp_give_the_same_authoritative_answer() {
    let served = started().await;
    let asked = query("Cart.shop.svc.clusterset.local.", RecordType::A);
    for answer in [udp(served.at, &asked).await.0, tcp(served.at, &asked).await] {
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.metadata.authoritative && !answer.metadata.truncation);
        assert!(!answer.metadata.recursion_available);
        let data: Vec<String> = answer.answers.iter().map(|r| r.data.to_string()).collect();
        assert_eq!(data, ["127.64.0.5"]);
        assert!(answer.answers[0].name.to_ascii().starts_with("Cart."), "{}", answer.answers[0].name);
        assert!(answer.queries[0].name().to_ascii().starts_with("Cart."));
    }
}

#[tokio::test]
async fn no_data_and_nxdomain_differ_and_both_carry_the_soa() {
    let served = started().await;
    let cases = [
        ("cart.shop.svc.clusterset.local.", RecordType::AAAA, ResponseCode::NoError),
        ("shop.svc.clusterset.local.", RecordType::A, ResponseCode::NoError),
        ("nope.shop.svc.clusterset.local.", RecordType::A, ResponseCode::NXDomain),
        ("us-west.cart.shop.svc.clusterset.local.", RecordType::A, ResponseCode::NXDomain),
    ];
    for (name, kind, want) in cases {
        let (answer, _) = udp(served.at, &query(name, kind)).await;
        assert_eq!(answer.metadata.response_code, want, "{name} {kind}");
        assert!(answer.answers.is_empty());
        assert!(matches!(answer.authorities[0].data, RData::SOA(_)), "{name} {kind}");
        assert!(answer.metadata.authoritative);
    }
}

#[tokio::test]
async fn a_long_answer_is_truncated_over_udp_and_whole_over_tcp() {
    let served = serve(Some(large()), &[]).await;
    let plain = query("db.shop.svc.clusterset.local.", RecordType::A);
    for (asked, limit) in
        [(plain.clone(), 512), (with_edns(plain.clone(), 4096), 1232), (with_edns(plain.clone(), 1), 512)]
    {
        let (answer, length) = udp(served.at, &asked).await;
        assert!(answer.metadata.truncation && answer.answers.is_empty());
        assert!(length <= limit, "{length} > {limit}");
        assert!(length <= asked.to_vec().unwrap().len() + 16, "truncated answers amplify nothing: {length}");
    }
    let answer = tcp(served.at, &plain).await;
    assert!(!answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 200);
}

#[tokio::test]
async fn udp_answers_use_the_size_that_edns_allows() {
    let mut sources = sources(snapshot());
    sources.endpoints = endpoints((0..30).map(|i| endpoint(&format!("10.0.1.{i}"), true)).collect());
    let served = serve(Some(build(&sources)), &[]).await;
    let plain = query("db.shop.svc.clusterset.local.", RecordType::A);
    assert!(udp(served.at, &plain).await.0.metadata.truncation);
    let (answer, length) = udp(served.at, &with_edns(plain, 4096)).await;
    assert!(!answer.metadata.truncation && length > 512 && length <= 1232, "{length}");
    assert_eq!(answer.answers.len(), 30);
    assert!(answer.edns.is_some());
}

#[tokio::test]
async fn additional_records_give_way_before_an_answer_is_truncated() {
    let mut global = snapshot();
    let ports: Vec<(String, u16)> = (0..7).map(|i| (format!("p{i}"), 8000 + i)).collect();
    let ports: Vec<(&str, u16)> = ports.iter().map(|(n, p)| (n.as_str(), *p)).collect();
    let cart = service("shop/cart", 5, ServiceKind::ClusterSetIp, &ports, &["us-east"]);
    global.services.insert(cart.name.clone(), cart.into());
    let served = serve(Some(build(&sources(global))), &[]).await;
    let (answer, length) = udp(served.at, &query("cart.shop.svc.clusterset.local.", RecordType::SRV)).await;
    assert!(length <= 512 && !answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 7);
}

#[tokio::test]
async fn what_is_not_ours_or_not_a_lookup_is_refused() {
    let served = started().await;
    let ours = "cart.shop.svc.clusterset.local.";
    assert_eq!(code(served.at, &query("example.com.", RecordType::A)).await, ResponseCode::Refused);
    assert_eq!(code(served.at, &query(ours, RecordType::AXFR)).await, ResponseCode::Refused);
    let mut chaos = query(ours, RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(code(served.at, &chaos).await, ResponseCode::Refused);
    let mut notify = query(ours, RecordType::SOA);
    notify.metadata.op_code = OpCode::Notify;
    assert_eq!(code(served.at, &notify).await, ResponseCode::NotImp);
    let mut two = query(ours, RecordType::A);
    two.add_query(Query::query(Name::from_ascii(ours).unwrap(), RecordType::AAAA));
    assert_eq!(code(served.at, &two).await, ResponseCode::FormErr);
    let mut edns1 = with_edns(query(ours, RecordType::A), 1232);
    edns1.edns.as_mut().unwrap().set_version(1);
    // 16 is BADSIG too; which of the two depends on whether there is an OPT record (RFC 6895, 2.3).
    assert_eq!(u16::from(code(served.at, &edns1).await), 16);
}

#[tokio::test]
async fn without_a_zone_our_names_fail_rather_than_being_denied() {
    let served = serve(None, &[]).await;
    let asked = query("cart.shop.svc.clusterset.local.", RecordType::A);
    assert_eq!(code(served.at, &asked).await, ResponseCode::ServFail);
    served.zone.store(Some(Arc::new(build(&sources(snapshot())))));
    assert_eq!(code(served.at, &asked).await, ResponseCode::NoError);
}

#[tokio::test]
async fn garbage_is_survived() {
    let served = started().await;
    let good = query("cart.shop.svc.clusterset.local.", RecordType::A);
    let bytes = good.to_vec().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..2_000_usize {
        let mut packet = bytes.clone();
        for _ in 0..=(round % 8) {
            // xorshift64: the same packets each time.
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let [position, value, ..] = seed.to_le_bytes();
            let at = usize::from(position) % packet.len();
            packet[at] = value;
        }
        packet.truncate(1 + round % bytes.len());
        socket.send_to(&packet, served.at).await.unwrap();
    }
    let mut stream = TcpStream::connect(served.at).await.unwrap();
    stream.write_all(b"\xff\xffGET / HTTP/1.1\r\n\r\n").await.unwrap();
    drop(stream);
    assert_eq!(tcp(served.at, &good).await.answers.len(), 1);
    // The flood may have filled the server's socket buffer; ask from a fresh socket until one gets through.
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut answered = false;
    for _ in 0..20 {
        socket.send_to(&bytes, served.at).await.unwrap();
        let mut buffer = [0; 2048];
        let Ok(Ok((length, _))) = timeout(Duration::from_secs(1), socket.recv_from(&mut buffer)).await else {
            continue;
        };
        answered |= Message::from_vec(&buffer[..length]).is_ok_and(|m| m.metadata.id == 4711 && m.answers.len() == 1);
        if answered {
            break;
        }
    }
    assert!(answered);
}

#[tokio::test]
async fn other_names_come_from_the_upstream() {
    // The upstream is another server of ours, authoritative for names that this one must not ask it about.
    let upstream = upstream().await;
    let served = serve(Some(build(&sources(snapshot()))), &[upstream]).await;
    let (answer, _) = udp(served.at, &query("www.example.com.", RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert!(answer.metadata.recursion_available && !answer.metadata.authoritative);
    assert_eq!(answer.answers[0].data.to_string(), "192.0.2.80");
    let (absent, _) = udp(served.at, &query("absent.example.com.", RecordType::A)).await;
    assert_eq!(absent.metadata.response_code, ResponseCode::NXDomain);
    // Ours stay ours.
    let (own, _) = udp(served.at, &query("nope.svc.clusterset.local.", RecordType::A)).await;
    assert!(own.metadata.authoritative);
    // Without RD nobody asks for recursion.
    let mut iterative = query("www.example.com.", RecordType::A);
    iterative.metadata.recursion_desired = false;
    assert_eq!(code(served.at, &iterative).await, ResponseCode::Refused);
}

#[tokio::test]
async fn a_dead_upstream_is_a_failure_in_time() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let served = serve(None, &[silent.local_addr().unwrap()]).await;
    let asked = query("www.example.com.", RecordType::A);
    assert_eq!(code(served.at, &asked).await, ResponseCode::ServFail);
}

#[tokio::test]
async fn queries_are_counted_by_outcome_and_type() {
    let served = started().await;
    code(served.at, &query("cart.shop.svc.clusterset.local.", RecordType::A)).await;
    code(served.at, &query("nope.svc.clusterset.local.", RecordType::Unknown(4242))).await;
    let mut registry = isthmus_runtime::health::Registry::default();
    served.metrics.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains(r#"isthmus_dns_queries_total{rcode="NOERROR",type="A"} 1"#), "{text}");
    assert!(text.contains(r#"isthmus_dns_queries_total{rcode="NXDOMAIN",type="OTHER"} 1"#), "{text}");
}

#[tokio::test]
async fn shutdown_frees_the_port() {
    let served = started().await;
    served.shutdown.request();
    let free = async || Listener::bind(served.at).await.is_ok();
    isthmus_runtime::wait::wait_for("the port to be free", DEADLINE, free).await.unwrap();
}

/// A resolver that knows `www.example.com` and nothing else.
async fn upstream() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let Ok(asked) = Message::from_vec(&buffer[..length]) else { continue };
            let mut answer = Message::response(asked.metadata.id, OpCode::Query);
            answer.metadata.recursion_available = true;
            let name = asked.queries[0].name().clone();
            answer.add_queries(asked.queries);
            if name.to_string() == "www.example.com." {
                let data = RData::A("192.0.2.80".parse().unwrap());
                answer.add_answer(hickory_proto::rr::Record::from_rdata(name, 60, data));
            } else {
                answer.metadata.response_code = ResponseCode::NXDomain;
            }
            socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
        }
    });
    at
}
