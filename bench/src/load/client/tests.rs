//! Client and server against each other, and the client against a server that stalls.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    thread,
    time::Duration,
};

use serde::de::DeserializeOwned;

use super::{Client, Shard};
use crate::load::{
    GREETING, ORDER,
    command::{Command, Connected, Exchanged, Moved, Opened, Span, Target, Way},
    hello, server,
};

const NAME: &str = "80.orders.shop.svc.any.isthmus.example";

fn client(threads: usize) -> Client {
    isthmus_identity::install_crypto();
    Client { shards: (0..threads).map(|_| Shard::new(256).unwrap()).collect() }
}

fn ask<T: DeserializeOwned>(client: &mut Client, command: &Command) -> T {
    serde_json::from_value(client.obey(command).unwrap()).unwrap()
}

fn target(address: SocketAddr) -> Target {
    Target { address, name: NAME.to_owned() }
}

fn span(measure: f64) -> Span {
    Span { warm: 0.05, measure }
}

/// Accepts one connection, and holds back the answer of its tenth message.
fn stalling(stall: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut tcp, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        while hello::end(&bytes).unwrap().is_none() {
            let mut chunk = [0; 4096];
            let n = tcp.read(&mut chunk).unwrap();
            bytes.extend_from_slice(&chunk[..n]);
        }
        tcp.write_all(&[GREETING]).unwrap();
        tcp.read_exact(&mut [0; ORDER]).unwrap();
        let mut message = [0; 256];
        for number in 0.. {
            if tcp.read_exact(&mut message).is_err() {
                return;
            }
            if number == 10 {
                thread::sleep(stall);
            }
            tcp.write_all(&message).unwrap();
        }
    });
    address
}

#[test]
fn requests_are_answered_flat_out_and_paced_on_any_number_of_threads() {
    let address = server::in_background();
    for threads in [1, 3] {
        let mut client = client(threads);
        let open = Command::Open { target: target(address), connections: 5, at_once: 2 };
        let opened: Opened = ask(&mut client, &open);
        assert_eq!((opened.open, opened.failed), (5, 0));
        let seen: Exchanged = ask(&mut client, &Command::Closed { span: span(0.2) });
        assert!(seen.rate > 0.0 && seen.latency.count > 0 && seen.failed == 0, "{seen:?}");
        let seen: Exchanged = ask(&mut client, &Command::Paced { span: span(0.5), rate: 200.0 });
        assert!((95..=105).contains(&seen.latency.count), "{seen:?}");
        assert_eq!(seen.failed, 0);
        let closed: Opened = ask(&mut client, &Command::Close);
        assert_eq!(closed.open, 0);
    }
}

#[test]
fn a_stall_shows_in_every_request_that_it_held_up() {
    let mut client = client(1);
    let open = Command::Open { target: target(stalling(Duration::from_millis(400))), connections: 1, at_once: 1 };
    ask::<Opened>(&mut client, &open);
    let seen: Exchanged = ask(&mut client, &Command::Paced { span: span(1.0), rate: 100.0 });
    // Of a hundred requests some forty were due during the stall; one alone would not reach this quantile.
    assert!(seen.latency.p90 > 100_000.0, "{seen:?}");
    assert!(seen.latency.p50 < 100_000.0, "{seen:?}");
}

#[test]
fn bytes_flow_either_way_and_count_when_they_have_arrived() {
    let mut client = client(1);
    let address = server::in_background();
    for way in [Way::Down, Way::Up] {
        let bulk = Command::Bulk { target: target(address), streams: 3, way, span: span(0.2) };
        let moved: Moved = ask(&mut client, &bulk);
        assert!(moved.rate > 0.0 && moved.bytes > 0 && moved.failed == 0, "{way:?}: {moved:?}");
        assert!(moved.slowest > 0.0 && moved.slowest <= moved.fastest, "{way:?}: {moved:?}");
        assert!(moved.rate <= moved.bytes as f64 * 8.0 / 0.2, "{way:?}: {moved:?}");
    }
}

#[test]
fn new_connections_are_counted_and_refused_ones_are_an_error() {
    let mut client = client(1);
    let connect = |address| Command::Connect { target: target(address), at_once: 4, span: span(0.2) };
    let seen: Connected = ask(&mut client, &connect(server::in_background()));
    assert!(seen.latency.count > 0 && seen.failed == 0, "{seen:?}");
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = client.obey(&connect(nobody)).unwrap_err();
    assert!(error.to_string().contains("failed"), "{error:#}");
}
