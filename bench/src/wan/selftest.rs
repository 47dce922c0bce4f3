//! Measures the link itself, from inside: round trips, losses, TCP throughput. Used by `wan --selftest` and by the tests.
//!
//! Plain blocking sockets on threads of the two namespaces; nothing of Isthmus takes part.

use std::{
    fmt::{self, Display, Formatter},
    io::{ErrorKind, Read, Write},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use socket2::SockRef;

use super::{Link, Path, Side, Stats};

/// How long one side may wait for the other, beyond the path's own time.
const GRACE: Duration = Duration::from_secs(2);

const RECEIVE_BUFFER: usize = 4 << 20;

/// What the self-test found.
#[derive(Debug)]
pub(super) struct Report {
    path: Path,
    round_trips: RoundTrips,
    losses: Losses,
    streams: Vec<(usize, f64)>,
    stats: Stats,
}

/// Runs all of it: about 20 seconds.
pub(super) fn run(link: &Link, path: Path) -> anyhow::Result<Report> {
    let round_trips = round_trips(link, path, 100)?;
    let losses = losses(link, path, 50_000)?;
    let mut streams = Vec::new();
    for count in [1, 8] {
        streams.push((count, throughput(link, count, Duration::from_secs(6))?));
    }
    Ok(Report { path, round_trips, losses, streams, stats: link.stats() })
}

/// Sorted times of the answers that came.
#[derive(Debug)]
pub(super) struct RoundTrips {
    pub(super) sorted: Vec<Duration>,
}

impl RoundTrips {
    /// The time that this share of the answers did not exceed.
    pub(super) fn quantile(&self, share: f64) -> Duration {
        let last = self.sorted.len().saturating_sub(1);
        let at = (last as f64 * share).round() as usize;
        self.sorted.get(at).copied().unwrap_or_default()
    }
}

/// One UDP question after the other from A to B and back.
pub(super) fn round_trips(link: &Link, path: Path, count: u32) -> anyhow::Result<RoundTrips> {
    let [near, far] = link.addresses();
    // The client gives a lost answer up well before the server believes that nothing comes any more.
    let client = bind(link, Side::A, near, path.rtt + GRACE / 10)?;
    let server = bind(link, Side::B, far, path.rtt + GRACE)?;
    client.connect(server.local_addr().context("read an address")?).context("connect")?;
    let echo = std::thread::spawn(move || {
        let mut bytes = [0; 64];
        while let Ok((length, from)) = server.recv_from(&mut bytes) {
            let Some(question) = bytes.get(..length).filter(|question| !question.is_empty()) else { break };
            let _ = server.send_to(question, from);
        }
    });
    let mut sorted = Vec::new();
    for number in 0..count {
        let begin = Instant::now();
        client.send(&number.to_be_bytes()).context("send")?;
        if answer(&client, number)? {
            sorted.push(begin.elapsed());
        }
    }
    // An empty packet ends the echo; if it is lost, the socket's timeout does.
    client.send(&[]).context("send")?;
    echo.join().map_err(|_| anyhow!("the echo died"))?;
    sorted.sort_unstable();
    Ok(RoundTrips { sorted })
}

/// True if the answer to this question came, and not only late ones to earlier questions.
fn answer(client: &UdpSocket, number: u32) -> anyhow::Result<bool> {
    let mut bytes = [0; 64];
    loop {
        match client.recv(&mut bytes) {
            Ok(length) if bytes.get(..length) == Some(&number.to_be_bytes()) => return Ok(true),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(false),
            Err(error) => return Err(error).context("receive"),
        }
    }
}

/// What came of packets sent one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Losses {
    pub(super) sent: u32,
    pub(super) received: u32,
    /// Received after a packet that was sent later.
    pub(super) reordered: u32,
}

impl Losses {
    pub(super) fn share(self) -> f64 {
        f64::from(self.sent.saturating_sub(self.received)) / f64::from(self.sent.max(1))
    }
}

/// Numbered UDP packets from A to B, with pauses so that no socket overflows.
pub(super) fn losses(link: &Link, path: Path, count: u32) -> anyhow::Result<Losses> {
    let [near, far] = link.addresses();
    let (server, client) = (bind(link, Side::B, far, path.rtt + GRACE)?, bind(link, Side::A, near, GRACE)?);
    client.connect(server.local_addr().context("read an address")?).context("connect")?;
    // What a busy machine's receiver is late for must not look like loss.
    SockRef::from(&server).set_recv_buffer_size(RECEIVE_BUFFER).context("enlarge a socket's buffer")?;
    let receiver = std::thread::spawn(move || {
        let (mut received, mut reordered, mut highest) = (0, 0, None);
        let mut bytes = [0; 64];
        while let Ok(length) = server.recv(&mut bytes) {
            let number = bytes.get(..length).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
            received += 1;
            reordered += u32::from(number < highest);
            highest = highest.max(number);
        }
        (received, reordered)
    });
    for number in 0..count {
        client.send(&number.to_be_bytes()).context("send")?;
        if number % 64 == 63 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let (received, reordered) = receiver.join().map_err(|_| anyhow!("the receiver died"))?;
    Ok(Losses { sent: count, received, reordered })
}

/// TCP from A to B over `streams` connections, in bits per second as the receiver saw them, the first third of the time (slow
/// start) left out.
pub(super) fn throughput(link: &Link, streams: usize, time: Duration) -> anyhow::Result<f64> {
    let [_, far] = link.addresses();
    let listener = inside(link.spawn(Side::B, move || TcpListener::bind((far, 0)))?)?;
    let to = listener.local_addr().context("read an address")?;
    let begin = Instant::now();
    let (from, until) = (begin + time / 3, begin + time);
    let mut senders = Vec::new();
    let mut receivers = Vec::new();
    for _ in 0..streams {
        let mut sender = inside(link.spawn(Side::A, move || TcpStream::connect_timeout(&to, GRACE))?)?;
        let (mut receiver, _) = listener.accept().context("accept")?;
        receiver.set_read_timeout(Some(time + GRACE)).context("set a timeout")?;
        sender.set_write_timeout(Some(time + GRACE)).context("set a timeout")?;
        senders.push(std::thread::spawn(move || {
            let bytes = vec![0; 256 * 1024];
            while Instant::now() < until && sender.write(&bytes).is_ok() {}
        }));
        receivers.push(std::thread::spawn(move || {
            let (mut bytes, mut counted) = (vec![0; 256 * 1024], 0_u64);
            loop {
                match receiver.read(&mut bytes) {
                    Ok(0) | Err(_) => return counted,
                    Ok(length) if (from..until).contains(&Instant::now()) => counted += length as u64,
                    Ok(_) => {}
                }
            }
        }));
    }
    let mut total = 0;
    for receiver in receivers {
        total += receiver.join().map_err(|_| anyhow!("a receiver died"))?;
    }
    for sender in senders {
        sender.join().map_err(|_| anyhow!("a sender died"))?;
    }
    ensure!(total > 0, "nothing came through");
    Ok(total as f64 * 8.0 / (until - from).as_secs_f64())
}

fn bind(link: &Link, side: Side, address: IpAddr, patience: Duration) -> anyhow::Result<UdpSocket> {
    let socket = inside(link.spawn(side, move || UdpSocket::bind((address, 0)))?)?;
    socket.set_read_timeout(Some(patience)).context("set a timeout")?;
    Ok(socket)
}

/// The socket that a thread in a namespace has made.
fn inside<T>(thread: JoinHandle<anyhow::Result<std::io::Result<T>>>) -> anyhow::Result<T> {
    let made = thread.join().map_err(|_| anyhow!("a thread of the self-test died"))??;
    made.context("open a socket inside the link")
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let milliseconds = |share| self.round_trips.quantile(share).as_secs_f64() * 1e3;
        writeln!(f, "asked for      {}", self.path)?;
        writeln!(
            f,
            "round trip     min {:.3} ms, median {:.3} ms, p99 {:.3} ms, max {:.3} ms over {} answers",
            milliseconds(0.0),
            milliseconds(0.5),
            milliseconds(0.99),
            milliseconds(1.0),
            self.round_trips.sorted.len()
        )?;
        let Losses { sent, reordered, .. } = self.losses;
        writeln!(f, "loss           {:.3} % of {sent} packets, {reordered} out of order", self.losses.share() * 100.0)?;
        for (count, bits) in &self.streams {
            writeln!(f, "TCP, {count:>2} streams {:.3} Gbit/s", bits / 1e9)?;
        }
        write!(f, "{}", self.stats)
    }
}
