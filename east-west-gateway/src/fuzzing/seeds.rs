//! Writes the seeds of `fuzz/corpus/`: real hellos, real frames, and plays of the availability feed.

use std::{fs, sync::Arc};

use isthmus_api::proto::{
    common::v1 as common,
    tunnel::v1::{
        Accept, AvailabilityUpdate, Closing, ControlFrame, ControlHello, Goaway, Offers, Ping, Reject, RejectReason,
        StreamHeader, StreamReply, TcpPreface, TcpPurpose, control_frame::Kind, stream_reply,
    },
};
use prost::Message;
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion, crypto::aws_lc_rs, version};

use super::{TARGETS, tests::corpus};
use crate::{
    frame::{self, MAX_HEADER},
    tunnel::outbox::PART,
};

const NAME: &str = "80.orders.shop.svc.any.isthmus.example";

#[test]
#[ignore = "writes files: run by `make fuzz-seeds` when a format changes"]
fn write_seeds() {
    for (target, run) in TARGETS {
        let seeds = match target {
            "tunnel" => tunnel(),
            "hello" => hello(),
            _ => availability(),
        };
        let dir = corpus(target);
        fs::create_dir_all(&dir).unwrap();
        for (name, bytes) in seeds {
            run(&bytes);
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
}

type Seeds = Vec<(&'static str, Vec<u8>)>;

/// The target's own front (see `Input::cuts`), then `bytes`.
fn input(front: u8, cuts: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![front, u8::try_from(cuts.len()).unwrap()];
    out.extend_from_slice(cuts);
    out.extend_from_slice(bytes);
    out
}

fn client_hello(versions: &[&'static SupportedProtocolVersion], name: &str, post_quantum: bool) -> Vec<u8> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
    if post_quantum {
        provider.kx_groups.insert(0, aws_lc_rs::kx_group::X25519MLKEM768);
    }
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
    let mut out = Vec::new();
    client.write_tls(&mut out).unwrap();
    out
}

/// The same handshake message in records of at most `size` bytes.
fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
    let record = |chunk: &[u8]| {
        let length = u16::try_from(chunk.len()).unwrap().to_be_bytes();
        [&[22, 3, 1], length.as_slice(), chunk].concat()
    };
    hello[5..].chunks(size).flat_map(record).collect()
}

fn hello() -> Seeds {
    let classic = client_hello(&[&version::TLS13], NAME, false);
    let post_quantum = client_hello(&[&version::TLS13], NAME, true);
    let pinned = client_hello(&[&version::TLS13], "8080.orders.shop.db-0.svc.west.isthmus.example", false);
    let both = client_hello(&[&version::TLS13, &version::TLS12], NAME, false);
    let followed = [&classic[..], &[23, 3, 3, 0, 1, 0]].concat();
    let input = |limit: u16, cuts: &[u8], hello: &[u8]| {
        let [high, low] = limit.to_be_bytes();
        [&[high][..], &super::seeds::input(low, cuts, hello)].concat()
    };
    vec![
        ("classic", input(16_000, &[], &classic)),
        ("classic-followed", input(16_000, &[99], &followed)),
        ("post-quantum", input(16_000, &[255, 3, 0], &post_quantum)),
        ("pinned-in-bytes", input(448, &[0], &pinned)),
        ("small-records", input(2_000, &[6, 1], &in_records(&classic, 7))),
        ("small-records-beyond-the-limit", input(243, &[6, 1], &in_records(&classic, 7))),
        ("large-records", input(16_000, &[40], &in_records(&post_quantum, 500))),
        ("beyond-its-limit", input(300, &[40], &in_records(&post_quantum, 50))),
        ("two-versions", input(16_000, &[7], &both)),
        ("http", input(16_000, &[], b"GET / HTTP/1.1\r\n")),
    ]
}

fn bytes(message: &impl Message) -> Vec<u8> {
    frame::encode(message).unwrap().to_vec()
}

fn header(selector: &str) -> StreamHeader {
    StreamHeader {
        version: 1,
        service: Some(name("orders")),
        port: 80,
        selector: selector.to_owned(),
        deadline_ms: 900,
        traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned(),
    }
}

fn name(service: &str) -> common::ServiceName {
    common::ServiceName { namespace: "shop".to_owned(), name: service.to_owned() }
}

fn control(kind: Kind) -> Vec<u8> {
    bytes(&ControlFrame { kind: Some(kind) })
}

fn update(snapshot: bool, services: &[(&str, u32)], removed: &[&str]) -> Vec<u8> {
    let entry = |(service, ready): &(&str, u32)| common::Availability {
        service: Some(name(service)),
        ready: *ready,
        total: 3,
        reachable: true,
        ..Default::default()
    };
    control(Kind::Availability(AvailabilityUpdate {
        snapshot,
        services: services.iter().map(entry).collect(),
        removed: removed.iter().map(|service| name(service)).collect(),
        ..Default::default()
    }))
}

fn tunnel() -> Seeds {
    let opening = [bytes(&header("")), client_hello(&[&version::TLS13], NAME, false)].concat();
    let reject = Reject { reason: RejectReason::Draining.into(), retry_elsewhere: true, detail: "drains".to_owned() };
    let accept = bytes(&StreamReply { kind: Some(stream_reply::Kind::Accept(Accept {})) });
    let reject = bytes(&StreamReply { kind: Some(stream_reply::Kind::Reject(reject)) });
    let preface = TcpPreface { version: 1, link: vec![7; 16], purpose: TcpPurpose::Stream.into() };
    let session = [
        control(Kind::Hello(ControlHello { version: 1, gateway: "gateway-1".to_owned() })),
        update(true, &[("orders", 2), ("cart", 1)], &[]),
        control(Kind::Ping(Ping { sequence: 1, load_permille: 0 })),
        control(Kind::Pong(Ping { sequence: 7, load_permille: 250 })),
        update(false, &[("orders", 0)], &["cart"]),
        control(Kind::Offers(Offers { connections: 8 })),
        control(Kind::Goaway(Goaway { successor: false })),
        control(Kind::Closing(Closing { code: 0, reason: "drained".to_owned() })),
    ]
    .concat();
    vec![
        ("header", input(0, &[], &bytes(&header("db-0")))),
        ("header-at-its-limit", input(0, &[], &bytes(&header(&"x".repeat(MAX_HEADER - 83))))),
        ("header-and-hello", input(0, &[20, 1], &opening)),
        ("accept-and-bytes", input(1, &[0], &[accept, b"first bytes".to_vec()].concat())),
        ("reject", input(1, &[2], &reject)),
        ("control", input(2, &[16, 0, 99], &session)),
        ("preface", input(3, &[3], &[bytes(&preface), bytes(&header(""))].concat())),
        ("too-long", input(0, &[], &[0xff, 0xff, 0])),
    ]
}

fn availability() -> Seeds {
    let lost = control(Kind::Ping(Ping { sequence: 1, load_permille: 0 }));
    let hostile = |limit: u8, parts: &[Vec<u8>]| [&[0, limit], parts.concat().as_slice()].concat();
    let part = u16::try_from(PART).unwrap().to_be_bytes();
    vec![
        (
            "hostile-words",
            hostile(2, &[update(true, &[("orders", 2), ("cart", 1)], &[]), update(false, &[("web", 1)], &[])]),
        ),
        (
            "hostile-flaps",
            hostile(
                9,
                &[
                    update(true, &[("orders", 2)], &[]),
                    lost.clone(),
                    update(false, &[("orders", 0)], &["orders"]),
                    lost,
                ],
            ),
        ),
        ("set-wait-set", vec![1, 0, 1, 2, 3, 6, 5, 30, 0, 1, 1, 3, 6, 5, 80, 6]),
        ("remove-and-return", vec![1, 0, 1, 2, 3, 6, 5, 120, 2, 1, 6, 5, 20, 0, 1, 2, 3, 6]),
        ("more-than-a-frame", [&[1, 3, 0][..], &part, &[3, 5, 6, 5, 100, 3, 0, 2, 0, 1, 1, 6]].concat()),
        ("reconnect", vec![1, 0, 1, 2, 3, 0, 2, 2, 3, 6, 7, 2, 1, 6, 5, 100, 6]),
        ("clear", vec![1, 3, 0, 2, 87, 3, 5, 6, 5, 200, 4, 6]),
    ]
}
