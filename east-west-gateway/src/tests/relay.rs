//! A box between two gateways: it passes datagrams and connections on, until it is told to move or to drop. Of the
//! datagrams from near to far it tells how many were copies, and it can hold the answers back as soon as a certificate has
//! been shown.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{mpsc, watch},
};

use super::rig::local;

type Stalls = Box<dyn Fn(usize) -> bool + Send + Sync>;

/// Stands in front of one gateway's tunnel address, for UDP and TCP.
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    state: Arc<State>,
    stalls: watch::Sender<Stalls>,
}

#[derive(Default)]
struct State {
    drops_udp: AtomicBool,
    /// How often it has moved: each time, all that passes through gets new source ports.
    moves: AtomicU64,
    /// Of so many datagrams from near to far one is lost; 0: none.
    loses_one_in: AtomicU64,
    /// From near to far, each the same as the one before.
    copies: AtomicU64,
    largest_copy: AtomicUsize,
    /// Answers are dropped as soon as the near side has shown its certificate.
    holds_at_certificate: AtomicBool,
    held: AtomicBool,
    connections: AtomicUsize,
}

impl Relay {
    pub(super) async fn before(target: SocketAddr) -> Self {
        let (udp, tcp) = loop {
            let tcp = TcpListener::bind(local(0)).await.unwrap();
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let state = Arc::new(State::default());
        let (stalls, stalled) = watch::channel(Box::new(|_| false) as Stalls);
        tokio::spawn(datagrams(Arc::new(udp), target, state.clone()));
        let passed = state.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = tcp.accept().await {
                let nth = passed.connections.fetch_add(1, Ordering::Relaxed);
                let mut stalled = stalled.clone();
                tokio::spawn(async move {
                    let carry = async {
                        let mut far = TcpStream::connect(target).await?;
                        tokio::io::copy_bidirectional(&mut near, &mut far).await
                    };
                    tokio::select! {
                        biased;
                        () = async { drop(stalled.wait_for(|stalls| stalls(nth)).await) } => std::future::pending().await,
                        carried = carry => drop(carried),
                    }
                });
            }
        });
        Self { address, state, stalls }
    }

    /// From now on UDP goes nowhere, in silence.
    pub(super) fn block_udp(&self, blocked: bool) {
        self.state.drops_udp.store(blocked, Ordering::Relaxed);
    }

    /// From now on nothing passes on those TCP connections, counted from 0 as they were made, for which this is true. They
    /// stay open.
    pub(super) fn stall_tcp(&self, which: impl Fn(usize) -> bool + Send + Sync + 'static) {
        drop(self.stalls.send_replace(Box::new(which)));
    }

    /// How many TCP connections were made.
    pub(super) fn tcp_connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// From now on one in `n` datagrams from near to far is lost; 0: none.
    pub(super) fn lose_one_in(&self, n: u64) {
        self.state.loses_one_in.store(n, Ordering::Relaxed);
    }

    /// How many datagrams from near to far were the same as the one before, and how large the largest was.
    pub(super) fn copies(&self) -> (u64, usize) {
        (self.state.copies.load(Ordering::Relaxed), self.state.largest_copy.load(Ordering::Relaxed))
    }

    /// From when the near side shows its certificate in a QUIC handshake, it gets no answer, until this is taken back.
    pub(super) fn hold_at_certificate(&self, hold: bool) {
        self.state.held.store(false, Ordering::Relaxed);
        self.state.holds_at_certificate.store(hold, Ordering::Relaxed);
    }

    /// Whether answers are held back now.
    pub(super) fn holds(&self) -> bool {
        self.state.held.load(Ordering::Relaxed)
    }

    /// From now on everything comes from other ports, as when a NAT forgets.
    pub(super) fn rebind(&self) {
        self.state.moves.fetch_add(1, Ordering::Relaxed);
    }
}

async fn datagrams(near: Arc<UdpSocket>, target: SocketAddr, state: Arc<State>) {
    let mut ways: HashMap<(SocketAddr, u64), mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; 65_536];
    let (mut before, mut seen) = (Vec::new(), 0);
    while let Ok((n, client)) = near.recv_from(&mut buffer).await {
        let datagram = &buffer[..n];
        if datagram == before {
            state.copies.fetch_add(1, Ordering::Relaxed);
            state.largest_copy.fetch_max(n, Ordering::Relaxed);
        }
        before = datagram.to_vec();
        seen += 1;
        let loses_one_in = state.loses_one_in.load(Ordering::Relaxed);
        if state.drops_udp.load(Ordering::Relaxed) || (loses_one_in > 0 && seen % loses_one_in == 0) {
            continue;
        }
        if state.holds_at_certificate.load(Ordering::Relaxed) && shows_certificate(datagram) {
            state.held.store(true, Ordering::Relaxed);
        }
        let key = (client, state.moves.load(Ordering::Relaxed));
        let way = ways.entry(key).or_insert_with(|| {
            let (tx, rx) = mpsc::channel(1024);
            tokio::spawn(one_way(near.clone(), client, target, state.clone(), rx));
            tx
        });
        drop(way.try_send(buffer[..n].to_vec()));
    }
}

async fn one_way(
    near: Arc<UdpSocket>,
    client: SocketAddr,
    target: SocketAddr,
    state: Arc<State>,
    mut out: mpsc::Receiver<Vec<u8>>,
) {
    let far = UdpSocket::bind(local(0)).await.unwrap();
    let born = state.moves.load(Ordering::Relaxed);
    let mut buffer = vec![0; 65_536];
    loop {
        tokio::select! {
            datagram = out.recv() => match datagram {
                Some(datagram) => drop(far.send_to(&datagram, target).await),
                None => return,
            },
            back = far.recv_from(&mut buffer) => {
                let Ok((n, _)) = back else { continue };
                // A mapping that was forgotten lets nothing in.
                let forgotten = state.moves.load(Ordering::Relaxed) != born;
                let held = state.held.load(Ordering::Relaxed);
                if !forgotten && !held && !state.drops_udp.load(Ordering::Relaxed) {
                    drop(near.send_to(&buffer[..n], client).await);
                }
            }
        }
    }
}

/// Whether one of the packets of `datagram` is a Handshake packet (RFC 9000, 17.2.4) that is large enough to carry a
/// client's certificate: others only acknowledge.
fn shows_certificate(datagram: &[u8]) -> bool {
    const CERTIFICATE: u64 = 300;
    let mut rest = datagram;
    // Long headers only: those say how long their packets are.
    while rest.first().is_some_and(|first| first & 0x80 != 0) && rest.len() > 6 {
        let kind = (rest[0] >> 4) & 0b11;
        let mut at = 5;
        at += 1 + usize::from(rest[at]);
        at += 1 + usize::from(rest[at]);
        if kind == 0 {
            let (token, read) = varint(&rest[at..]);
            at += read + usize::try_from(token).unwrap();
        }
        let (length, read) = varint(&rest[at..]);
        if kind == 2 && length >= CERTIFICATE {
            return true;
        }
        rest = rest.get(at + read + usize::try_from(length).unwrap()..).unwrap_or_default();
    }
    false
}

/// A variable-length integer (RFC 9000, 16), and how many bytes it takes.
fn varint(bytes: &[u8]) -> (u64, usize) {
    let length = 1 << (bytes[0] >> 6);
    let rest = bytes[1..length].iter();
    (rest.fold(u64::from(bytes[0] & 0x3f), |n, byte| n << 8 | u64::from(*byte)), length)
}
