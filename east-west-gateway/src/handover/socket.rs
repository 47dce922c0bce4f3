//! The tunnel's UDP socket, which two processes may hold at once while one hands over to the other.
//!
//! Sending needs nothing: both have a descriptor of the same socket. Reading does: what one takes the other never sees. So
//! one of them reads, and passes on what belongs to the other; datagrams that belong to neither (a client's first ones,
//! garbage) stay with the reader. Without another process this is quinn's own socket and the test of one lock. What is
//! sent goes out by way of [`Redundancy`].

use std::{
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use prometheus_client::metrics::counter::Counter;
use quinn::{
    AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};

use super::{cids::CidKey, relay::Relay};
use crate::tunnel::link::redundancy::Redundancy;

/// A UDP socket that may be shared with another process.
#[derive(Debug)]
pub(crate) struct SharedSocket {
    quic: Arc<dyn AsyncUdpSocket>,
    /// To give away.
    raw: UdpSocket,
    key: CidKey,
    mode: Mutex<Mode>,
    /// Moves with the mode, so that a change is not slept through.
    changes: AtomicU64,
    reader: AtomicWaker,
    lost: Counter,
    redundancy: Arc<Redundancy>,
}

#[derive(Clone, Debug)]
struct Mode {
    reads: bool,
    other: Option<Arc<Other>>,
}

/// The process at the other end.
#[derive(Debug)]
struct Other {
    key: CidKey,
    relay: Relay,
}

impl SharedSocket {
    /// A socket that this process alone holds, and reads. `lost` counts datagrams that could not be passed on.
    pub(crate) fn alone(socket: UdpSocket, lost: Counter) -> io::Result<Arc<Self>> {
        Self::new(socket, lost, CidKey::random(), Mode { reads: true, other: None })
    }

    /// A socket that the process with the key `other` still reads; what is ours comes through `relay`. `own` is the key
    /// that it was told.
    pub(super) fn fed(
        socket: UdpSocket,
        lost: Counter,
        own: CidKey,
        (other, relay): (CidKey, Relay),
    ) -> io::Result<Arc<Self>> {
        Self::new(socket, lost, own, Mode { reads: false, other: Some(Arc::new(Other { key: other, relay })) })
    }

    fn new(socket: UdpSocket, lost: Counter, key: CidKey, mode: Mode) -> io::Result<Arc<Self>> {
        socket.set_nonblocking(true)?;
        let raw = socket.try_clone()?;
        let quic = TokioRuntime.wrap_udp_socket(socket)?;
        let (mode, changes, reader) = (Mutex::new(mode), AtomicU64::new(0), AtomicWaker::new());
        let redundancy = Arc::new(Redundancy::default());
        Ok(Arc::new(Self { quic, raw, key, mode, changes, reader, lost, redundancy }))
    }

    /// The key of this process: its connection IDs must come from it.
    pub(crate) fn key(&self) -> CidKey {
        self.key
    }

    /// To be told which paths lose datagrams.
    pub(crate) fn redundancy(&self) -> Arc<Redundancy> {
        self.redundancy.clone()
    }

    /// A descriptor to give away.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.raw.as_fd().try_clone_to_owned()
    }

    /// From now on another process holds the socket, too; this one reads.
    pub(super) fn share(&self, key: CidKey, relay: Relay) {
        self.change(|_| Mode { reads: true, other: Some(Arc::new(Other { key, relay })) });
    }

    /// The other process reads from now on, or this one does.
    pub(super) fn set_reads(&self, reads: bool) {
        self.change(|mode| Mode { reads, other: mode.other });
    }

    /// There is no other process any more.
    pub(super) fn set_alone(&self) {
        self.change(|_| Mode { reads: true, other: None });
    }

    fn change(&self, to: impl FnOnce(Mode) -> Mode) {
        let mut mode = self.lock();
        *mode = to(mode.clone());
        drop(mode);
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.reader.wake();
    }

    fn lock(&self) -> MutexGuard<'_, Mode> {
        // Every section leaves the mode whole, so a panic in another one does not spoil it.
        self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what is the other's, and leaves the rest in place.
    fn sort(&self, other: &Other, buffers: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) {
        for (buffer, meta) in buffers.iter_mut().zip(metas) {
            let Some(bytes) = buffer.get_mut(..meta.len) else { continue };
            let about = *meta;
            meta.len = keep(bytes, about.stride, |datagram| {
                let theirs = other.key.owns(datagram);
                if theirs && !other.relay.pass(datagram, &about) {
                    self.lost.inc();
                }
                !theirs
            });
        }
    }
}

/// Moves the datagrams (one every `stride` bytes, the last one perhaps shorter) that are wanted to the front. Returns their
/// length together.
fn keep(bytes: &mut [u8], stride: usize, mut wanted: impl FnMut(&[u8]) -> bool) -> usize {
    let (mut from, mut kept) = (0, 0);
    while from < bytes.len() {
        let to = from.saturating_add(stride.max(1)).min(bytes.len());
        if bytes.get(from..to).is_some_and(&mut wanted) {
            if kept != from {
                bytes.copy_within(from..to, kept);
            }
            kept += to - from;
        }
        from = to;
    }
    kept
}

impl AsFd for SharedSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.raw.as_fd()
    }
}

impl AsyncUdpSocket for SharedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.quic.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.redundancy.send(transmit, |transmit| self.quic.try_send(transmit))
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let seen = self.changes.load(Ordering::Acquire);
            let mode = self.lock().clone();
            if let Some(other) = &mode.other
                && let Poll::Ready(taken) = other.relay.poll_take(cx, buffers, metas)
            {
                return Poll::Ready(taken);
            }
            if mode.reads
                && let Poll::Ready(received) = self.quic.poll_recv(cx, buffers, metas)
            {
                if let (Ok(n), Some(other)) = (&received, &mode.other) {
                    self.sort(other, buffers, metas.get_mut(..*n).unwrap_or_default());
                }
                return Poll::Ready(received);
            }
            self.reader.register(cx.waker());
            if self.changes.load(Ordering::Acquire) == seen {
                return Poll::Pending;
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.quic.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.quic.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.quic.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.quic.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_datagrams_that_are_wanted_stay_in_order_and_whole() {
        for (bytes, stride, kept) in [
            ("aabbaabba", 2, "aaaaa"),
            ("bbaab", 2, "aa"),
            ("aab", 2, "aa"),
            ("aaaa", 2, "aaaa"),
            ("aab", 3, "aab"),
            ("bbbb", 2, ""),
            ("a", 0, "a"),
            ("", 2, ""),
        ] {
            let mut buffer = bytes.as_bytes().to_vec();
            let length = keep(&mut buffer, stride, |datagram| datagram[0] == b'a');
            assert_eq!(&buffer[..length], kept.as_bytes(), "{bytes} by {stride}");
        }
    }
}
