//! The load: a client and a server, each a process of its own, the same for every system that is measured.
//!
//! The [`server`] plays a far sidecar: it reads exactly one TLS ClientHello, greets with one byte, and then echoes, sends or
//! swallows, as the first [`ORDER`] bytes say. The [`client`] plays the near one: it writes a real ClientHello ([`hello`]),
//! waits for the greeting and only then speaks. Neither encrypts: that work is the sidecars' and the same for everybody. Both are
//! epoll loops ([`poll`]) on as few threads as do the work, so that they do not become what is measured.
//!
//! The client takes [`command::Command`]s as JSON lines on standard input and answers each with one line.

pub(crate) mod client;
pub(crate) mod command;
pub(crate) mod hello;
pub(crate) mod histogram;
mod poll;
pub(crate) mod server;

use std::num::NonZeroU64;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The greeting.
const GREETING: u8 = b'!';
/// Bytes of an order: what to do, and the size of a message.
const ORDER: usize = 5;
/// What is read or written at once in bulk.
const CHUNK: usize = 256 * 1024;

/// What a server does with a connection after its greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Sends back every message of so many bytes.
    Echo(u32),
    /// Sends for ever.
    Source,
    /// Reads for ever, and says now and then how many bytes it has read (8 bytes, big endian).
    Sink,
}

impl Order {
    fn encode(self) -> [u8; ORDER] {
        let (kind, size) = match self {
            Self::Echo(size) => (b'E', size),
            Self::Source => (b'D', 0),
            Self::Sink => (b'U', 0),
        };
        let [a, b, c, d] = size.to_be_bytes();
        [kind, a, b, c, d]
    }

    fn decode([kind, a, b, c, d]: [u8; ORDER]) -> Option<Self> {
        let size = u32::from_be_bytes([a, b, c, d]);
        match kind {
            b'E' if size > 0 && size <= CHUNK as u32 => Some(Self::Echo(size)),
            b'D' => Some(Self::Source),
            b'U' => Some(Self::Sink),
            _ => None,
        }
    }
}

/// Lifts the limit of open files as far as it goes and says how far that is.
pub(crate) fn open_files() -> u64 {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Without success the old limit is in force, and is what is returned.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Wakes within a microsecond of the time asked for; the usual 50 would show in latencies.
fn exact_timers() {
    // A kernel that refuses makes timers late, alike for every system.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1_000));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_the_wire_and_nonsense_is_refused() {
        for order in [Order::Echo(256), Order::Source, Order::Sink] {
            assert_eq!(Order::decode(order.encode()), Some(order));
        }
        assert_eq!(Order::decode([b'E', 0, 0, 0, 0]), None);
        assert_eq!(Order::decode([b'E', 255, 0, 0, 0]), None);
        assert_eq!(Order::decode([b'?', 0, 0, 0, 1]), None);
    }
}
