//! Small datagrams twice, to peers on paths that lose some: a lost request then costs no round trip.
//!
//! In: how lossy the path to each peer has been of late, told by the links, and every datagram that the tunnel's socket
//! sends. Out: the same datagrams, those that are small and alone a second time while the path is lossy. To the peer the
//! copy is one that the network made (RFC 9000, 12.3: duplicates are discarded). What holds: nothing is sent twice on a path
//! without loss; copies are bounded in bytes per second and peer; bulk, which goes out in batches, is never doubled, since
//! there the next packets reveal a loss at once. While copies hide the losses that they cover, the path stays lossy for
//! [`HOLD`]; then the losses show again, or not.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use quinn::udp::Transmit;

use crate::clock;

/// A path that has lost so much of late, per million packets, is lossy.
pub(crate) const LOSSY_PPM: u32 = 2_000;
/// How long a path stays lossy without a new sign.
const HOLD: Duration = Duration::from_secs(30);
/// Larger datagrams are not doubled.
const SMALL: usize = 1_200;
/// Copies to one peer, in bytes per second, and how much may be saved up.
const RATE: f64 = 1_000_000.0;

/// Which peers' paths are lossy.
#[derive(Debug, Default)]
pub(crate) struct Redundancy {
    /// Whether there is any, so that the usual case costs nothing.
    any: AtomicBool,
    paths: Mutex<HashMap<SocketAddr, Path>>,
}

#[derive(Debug)]
struct Path {
    until: Instant,
    credit: f64,
    updated: Instant,
}

impl Redundancy {
    /// The path to `peer` is lossy now.
    pub(crate) fn lossy(&self, peer: SocketAddr) {
        let now = clock::now();
        let mut paths = self.lock();
        paths.retain(|_, path| path.until > now);
        let path = paths.entry(peer).or_insert(Path { until: now, credit: RATE, updated: now });
        path.until = now + HOLD;
        self.any.store(true, Ordering::Relaxed);
    }

    /// Sends by `send`; what deserves it, twice.
    pub(crate) fn send(
        &self,
        transmit: &Transmit<'_>,
        send: impl Fn(&Transmit<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        send(transmit)?;
        let alone = transmit.segment_size.is_none_or(|size| transmit.contents.len() <= size);
        if alone && self.doubles(transmit.destination, transmit.contents.len()) {
            // A copy that does not fit into the socket's buffer is no loss.
            drop(send(transmit));
        }
        Ok(())
    }

    /// Whether a datagram of so many bytes to `peer` goes out twice.
    fn doubles(&self, peer: SocketAddr, bytes: usize) -> bool {
        if bytes > SMALL || !self.any.load(Ordering::Relaxed) {
            return false;
        }
        let now = clock::now();
        let mut paths = self.lock();
        let Some(path) = paths.get_mut(&peer) else { return false };
        if path.until <= now {
            paths.remove(&peer);
            self.any.store(!paths.is_empty(), Ordering::Relaxed);
            return false;
        }
        let passed = now.saturating_duration_since(path.updated).as_secs_f64();
        path.updated = now;
        path.credit = (path.credit + passed * RATE).min(RATE);
        let allowed = path.credit >= bytes as f64;
        if allowed {
            path.credit -= bytes as f64;
        }
        allowed
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Path>> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[tokio::test(start_paused = true)]
    async fn only_small_datagrams_on_lossy_paths_go_twice_and_only_for_a_while() {
        let redundancy = Redundancy::default();
        assert!(!redundancy.doubles(peer(1), 100));
        redundancy.lossy(peer(1));
        assert!(redundancy.doubles(peer(1), 100));
        assert!(!redundancy.doubles(peer(1), 1_400), "not small");
        assert!(!redundancy.doubles(peer(2), 100), "another path");
        tokio::time::advance(HOLD + Duration::from_millis(1)).await;
        assert!(!redundancy.doubles(peer(1), 100));
        assert!(!redundancy.any.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn copies_are_bounded_in_bytes_per_second() {
        let redundancy = Redundancy::default();
        redundancy.lossy(peer(1));
        let burst = (0..10_000).filter(|_| redundancy.doubles(peer(1), 1_000)).count();
        assert_eq!(burst, 1_000);
        tokio::time::advance(Duration::from_secs(1)).await;
        let later = (0..10_000).filter(|_| redundancy.doubles(peer(1), 1_000)).count();
        assert_eq!(later, 1_000);
    }
}
