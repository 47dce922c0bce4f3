//! A box between two gateways: it passes datagrams and connections on, until it is told to move or to drop.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::mpsc,
};

use super::rig::local;

/// Stands in front of one gateway's tunnel address, for UDP and TCP.
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    drops_udp: AtomicBool,
    /// How often it has moved: each time, all that passes through gets new source ports.
    moves: AtomicU64,
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
        tokio::spawn(datagrams(Arc::new(udp), target, state.clone()));
        tokio::spawn(async move {
            while let Ok((mut near, _)) = tcp.accept().await {
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(target).await?;
                    tokio::io::copy_bidirectional(&mut near, &mut far).await
                });
            }
        });
        Self { address, state }
    }

    /// From now on UDP goes nowhere, in silence.
    pub(super) fn block_udp(&self, blocked: bool) {
        self.state.drops_udp.store(blocked, Ordering::Relaxed);
    }

    /// From now on everything comes from other ports, as when a NAT forgets.
    pub(super) fn rebind(&self) {
        self.state.moves.fetch_add(1, Ordering::Relaxed);
    }
}

async fn datagrams(near: Arc<UdpSocket>, target: SocketAddr, state: Arc<State>) {
    let mut ways: HashMap<(SocketAddr, u64), mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; 65_536];
    while let Ok((n, client)) = near.recv_from(&mut buffer).await {
        if state.drops_udp.load(Ordering::Relaxed) {
            continue;
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
                if !forgotten && !state.drops_udp.load(Ordering::Relaxed) {
                    drop(near.send_to(&buffer[..n], client).await);
                }
            }
        }
    }
}
