//! A network in memory: datagrams that are lost, doubled, late and out of order, as a seed says, in tokio's time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use tokio::time::{Sleep, sleep_until};

use crate::clock;

/// What the path may carry; larger datagrams vanish, as on the Internet.
const MTU: usize = 1_472;

/// SplitMix64: the same on every machine.
#[derive(Clone, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// How bad it is. Shares are of a thousand datagrams.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) delay: Duration,
    /// On top, up to this, each datagram its own: so they overtake each other.
    pub(super) jitter: Duration,
}

/// All sockets.
#[derive(Debug)]
pub(super) struct Net {
    weather: Weather,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    random: Random,
    sockets: BTreeMap<SocketAddr, Arc<Mutex<Mailbox>>>,
    /// Nothing goes to or from these.
    cut_off: BTreeSet<SocketAddr>,
    sent: u64,
}

/// Arrival, number, sender, contents.
type Coming = (Instant, u64, SocketAddr, Vec<u8>);

#[derive(Default)]
struct Mailbox {
    /// By arrival; the number keeps the order of those that arrive at once.
    coming: BinaryHeap<Reverse<Coming>>,
    timer: Option<Pin<Box<Sleep>>>,
    waker: Option<Waker>,
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").field("coming", &self.coming.len()).finish_non_exhaustive()
    }
}

impl Net {
    pub(super) fn new(seed: u64, weather: Weather) -> Arc<Self> {
        let state = State { random: Random(seed), sockets: BTreeMap::new(), cut_off: BTreeSet::new(), sent: 0 };
        Arc::new(Self { weather, state: Mutex::new(state) })
    }

    pub(super) fn socket(self: &Arc<Self>, address: SocketAddr) -> Arc<dyn AsyncUdpSocket> {
        let mailbox = Arc::<Mutex<Mailbox>>::default();
        self.state.lock().unwrap().sockets.insert(address, mailbox.clone());
        Arc::new(Socket { net: self.clone(), address, mailbox })
    }

    /// From now on nothing goes to `address` or comes from it.
    pub(super) fn cut_off(&self, address: SocketAddr) {
        self.state.lock().unwrap().cut_off.insert(address);
    }

    pub(super) fn heal(&self) {
        self.state.lock().unwrap().cut_off.clear();
    }

    fn send(&self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap();
        let roll = state.random.below(1_000);
        let copies = match () {
            () if bytes.len() > MTU || state.cut_off.contains(&from) || state.cut_off.contains(&to) => 0,
            () if roll < self.weather.lost => 0,
            () if roll < self.weather.lost + self.weather.doubled => 2,
            () => 1,
        };
        for _ in 0..copies {
            state.sent += 1;
            let jitter = u64::try_from(self.weather.jitter.as_micros()).unwrap();
            let late = Duration::from_micros(state.random.below(jitter + 1));
            let arrival = clock::now() + self.weather.delay + late;
            let Some(mailbox) = state.sockets.get(&to) else { return };
            let mut mailbox = mailbox.lock().unwrap();
            mailbox.coming.push(Reverse((arrival, state.sent, from, bytes.to_vec())));
            if let Some(waker) = mailbox.waker.take() {
                waker.wake();
            }
        }
    }
}

#[derive(Debug)]
struct Socket {
    net: Arc<Net>,
    address: SocketAddr,
    mailbox: Arc<Mutex<Mailbox>>,
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for datagram in transmit.contents.chunks(size) {
            self.net.send(self.address, transmit.destination, datagram);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut mailbox = self.mailbox.lock().unwrap();
        loop {
            let next = mailbox.coming.peek().map(|Reverse((arrival, ..))| *arrival);
            match next {
                Some(arrival) if arrival <= clock::now() => {
                    let Reverse((_, _, addr, bytes)) = mailbox.coming.pop().unwrap();
                    let len = bytes.len().min(bufs[0].len());
                    bufs[0][..len].copy_from_slice(&bytes[..len]);
                    meta[0] = RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
                    return Poll::Ready(Ok(1));
                }
                Some(arrival) => {
                    let mut timer = Box::pin(sleep_until(arrival.into()));
                    if timer.as_mut().poll(cx).is_pending() {
                        mailbox.timer = Some(timer);
                        mailbox.waker = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                }
                None => {
                    mailbox.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
