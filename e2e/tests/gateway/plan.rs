//! What happens on one carried connection, drawn from a seed: how much goes each way, who ends first and how, who reads
//! slowly. And the bytes themselves, which either end can make
//! again from the connection's number.

use std::{sync::OnceLock, time::Duration};

/// SplitMix64: small, and the same everywhere, so that a seed means the same story on any machine.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    pub(crate) fn percent(&mut self, share: u64) -> bool {
        self.next() % 100 < share
    }
}

/// One connection's story.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) id: u64,
    /// The client sends before it has heard anything.
    pub(crate) eager: bool,
    pub(crate) order: Order,
    pub(crate) client: Side,
    pub(crate) server: Side,
}

/// Who ends its direction first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As it comes.
    Both,
    /// The server says the most of it only when the client has ended.
    ClientFirst,
    /// The client says all of it only when the server has ended.
    ServerFirst,
}

/// One end's part.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    /// Bytes to send.
    pub(crate) length: u64,
    /// In writes of so many.
    pub(crate) write: usize,
    /// Between two writes.
    pub(crate) pause: Duration,
    pub(crate) reads: Reads,
    /// Resets the connection instead of going on to the end.
    pub(crate) reset: Option<Reset>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Reads {
    Fast,
    /// So many bytes at a time, and a pause.
    Slowly(usize, Duration),
    /// Nothing for so long, then fast.
    AfterSilence(Duration),
}

/// When an end resets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reset {
    /// With so many bytes sent, fewer than announced.
    Sent(u64),
    /// With so many received.
    Received(u64),
}

impl Plan {
    /// The story number `id` of `seed`.
    pub(crate) fn draw(seed: u64, id: u64) -> Self {
        let mut random = Random::new(seed ^ id.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let r = &mut random;
        let mut client = Side::draw(r);
        let mut server = Side::draw(r);
        // A gateway accepts with the endpoint's first byte.
        server.length = server.length.max(1);
        client.reads = Reads::draw(r, server.length);
        server.reads = Reads::draw(r, client.length);
        let mut order = match r.between(0, 3) {
            0 => Order::ClientFirst,
            1 => Order::ServerFirst,
            _ => Order::Both,
        };
        let resets = r.between(0, 99);
        if resets < 24 {
            order = Order::Both;
            // So that the server can tell that its first byte has arrived: a reset before that is another story.
            client.length = client.length.max(1);
            if resets < 14 {
                client.reset = Some(Reset::draw(r, client.length, server.length));
            }
            if resets >= 10 {
                server.reset = Some(Reset::draw(r, server.length, client.length));
            }
        }
        let eager = client.reset.is_none() && order != Order::ServerFirst && client.length > 0 && r.percent(40);
        Self { id, eager, order, client, server }
    }

    /// A long-lived trickle both ways, for about `lasting`.
    pub(crate) fn trickle(seed: u64, id: u64, lasting: Duration) -> Self {
        // By pauses of the sender: what a reader is slow to take waits in buffers, and is gone from the gateways.
        let pause = Duration::from_millis(20);
        let steps = u64::try_from(lasting.as_millis() / pause.as_millis()).unwrap_or(u64::MAX).max(1);
        let side = Side { length: steps * 512, write: 512, pause, reads: Reads::Fast, reset: None };
        let eager = Random::new(seed ^ id).percent(50);
        Self { id, eager, order: Order::Both, client: side.clone(), server: side }
    }
}

impl Side {
    fn draw(r: &mut Random) -> Self {
        let length = match r.between(0, 999) {
            0..50 => 0,
            50..800 => r.between(1, 2_000),
            800..950 => r.between(2_000, 30_000),
            950..999 => r.between(30_000, 120_000),
            _ => r.between(1_000_000, 3_000_000),
        };
        let write = usize::try_from(r.between(1, 4)).unwrap_or(1).pow(6) * 16;
        Self { length, write, pause: Duration::ZERO, reads: Reads::Fast, reset: None }
    }
}

impl Reads {
    /// For a stream of `length` bytes; slow is so slow that it takes twenty pauses.
    fn draw(r: &mut Random, length: u64) -> Self {
        match r.between(0, 9) {
            0 => {
                let most = usize::try_from(length / 20).unwrap_or(0).max(200);
                Self::Slowly(most, Duration::from_millis(r.between(1, 20)))
            }
            1 => Self::AfterSilence(Duration::from_millis(r.between(50, 1_000))),
            _ => Self::Fast,
        }
    }
}

impl Reset {
    fn draw(r: &mut Random, own: u64, others: u64) -> Self {
        if r.percent(50) { Self::Sent(r.between(0, own - 1)) } else { Self::Received(r.between(1, others)) }
    }
}

/// Which end's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    Client,
    Server,
}

/// The bytes that one end sends: a place in one long random pattern, by the connection's number, and on from there.
/// The pattern's length is prime, so that bytes out of their place do not pass for the right ones.
#[derive(Clone, Debug)]
pub(crate) struct Stream(usize);

const PATTERN: usize = 1_000_003;

fn pattern() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut random = Random::new(0x0069_7374_686d_7573);
        (0..PATTERN / 8 + 1).flat_map(|_| random.next().to_le_bytes()).take(PATTERN).collect()
    })
}

impl Stream {
    pub(crate) fn new(id: u64, sender: Sender) -> Self {
        let place = Random::new(id * 2 + u64::from(sender == Sender::Server)).next() % PATTERN as u64;
        Self(usize::try_from(place).unwrap())
    }

    /// The next bytes, at most `most`.
    pub(crate) fn take(&mut self, most: usize) -> &'static [u8] {
        let rest = &pattern()[self.0..];
        let taken = &rest[..rest.len().min(most)];
        self.0 = (self.0 + taken.len()) % PATTERN;
        taken
    }

    /// Whether `bytes` are the next ones.
    pub(crate) fn is_next(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let expected = self.take(bytes.len());
            let (now, later) = bytes.split_at(expected.len());
            if now != expected {
                return false;
            }
            bytes = later;
        }
        true
    }
}
