//! One TLS connection of a TCP link, as the two halves of a stream.
//!
//! What holds: a TLS close_notify is the end of a stream and nothing else is; a connection that ends without one, is reset
//! or times out reads as [`Broken`], and so does all that follows. An abort is a TCP reset, so that the peer never takes
//! a cut for an end.

use std::{
    future::{Future, poll_fn},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::{io::Interest, sync::OwnedSemaphorePermit, time};
use tokio_util::sync::CancellationToken;

use super::tls::Tls;
use crate::{
    shares::Place,
    splice,
    tunnel::link::{BATCH, Broken},
};

const LAST_WORDS: Duration = Duration::from_millis(200);

/// A handshaken connection. Clones are the same connection.
#[derive(Clone)]
pub(super) struct Connection(Arc<Inner>);

struct Inner {
    tls: Mutex<Tls>,
    bond: Bond,
    _slot: Slot,
}

/// What ties it to the link that it belongs to.
pub(super) struct Bond {
    /// It ends with this.
    pub(super) ended: CancellationToken,
    /// Counts what has come when everything before it had been read: a slow reader's backlog is no sign of life.
    pub(super) heard: Arc<AtomicU64>,
}

/// A connection's place among its link's; and among all that peers have open, if a peer has dialled it.
pub(super) struct Slot {
    pub(super) _link: OwnedSemaphorePermit,
    pub(super) _peers: Option<Place>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

impl Connection {
    pub(super) fn new(tls: Tls, bond: Bond, slot: Slot) -> Self {
        Self(Arc::new(Inner { tls: Mutex::new(tls), bond, _slot: slot }))
    }

    pub(super) fn halves(self) -> (Sender, Receiver) {
        (Sender { connection: self.clone() }, Receiver { connection: self, dry: true })
    }

    /// Whether an idle connection is still of use: the peer says nothing on it before it is used, so that anything to be
    /// read is its end.
    pub(super) fn is_quiet(&self) -> bool {
        self.lock().is_quiet()
    }

    /// Makes its end a reset.
    pub(super) fn abort(&self) {
        splice::abort(self.lock().tcp());
    }

    fn lock(&self) -> MutexGuard<'_, Tls> {
        // A panic while polling leaves a stream that the next poll finds broken.
        self.0.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The written direction.
#[derive(Debug)]
pub(crate) struct Sender {
    connection: Connection,
}

impl Sender {
    pub(crate) async fn write_all(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        self.write_chunk(Bytes::copy_from_slice(bytes)).await
    }

    /// As [`Sender::write_all`], without a copy.
    pub(crate) async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), Broken> {
        let mut chunks = [chunk];
        while chunks.iter().any(|chunk| !chunk.is_empty()) {
            poll_fn(|cx| self.poll_write(cx, &mut chunks)).await?;
        }
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Some of `chunks`, at least a byte; what is written is gone from them.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<usize, Broken>> {
        self.poll(|tls| tls.poll_write(cx, chunks))
    }

    /// Without this a part may be kept back until the next write.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.poll(|tls| tls.poll_flush(cx))
    }

    /// As [`Sender::finish`].
    pub(crate) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.poll(|tls| tls.poll_finish(cx))
    }

    /// Sends close_notify and a FIN.
    pub(crate) async fn finish(&mut self) -> Result<(), Broken> {
        poll_fn(|cx| self.poll_finish(cx)).await
    }

    /// The last bytes and the end, although the link is closed. Best effort.
    pub(crate) async fn say_last(&mut self, bytes: &[u8]) {
        let mut chunks = [Bytes::copy_from_slice(bytes)];
        let say = async {
            while chunks.iter().any(|chunk| !chunk.is_empty()) {
                poll_fn(|cx| self.connection.lock().poll_write(cx, &mut chunks)).await?;
            }
            poll_fn(|cx| self.connection.lock().poll_finish(cx)).await
        };
        // A peer that does not take it finds out otherwise.
        drop(time::timeout(LAST_WORDS, say).await);
    }

    pub(crate) fn abort(&self) {
        self.connection.abort();
    }

    pub(crate) fn link_closed(&self) -> impl Future<Output = ()> + Send + use<> {
        self.connection.0.bond.ended.clone().cancelled_owned()
    }

    /// Resolves when the connection has broken, although nothing is read from it.
    pub(crate) fn broken(&self) -> impl Future<Output = ()> + Send + use<> {
        let tcp = self.connection.lock().tcp().clone();
        async move { drop(tcp.ready(Interest::ERROR).await) }
    }

    fn poll<T>(&self, operate: impl FnOnce(&mut Tls) -> Poll<Result<T, Broken>>) -> Poll<Result<T, Broken>> {
        if self.connection.0.bond.ended.is_cancelled() {
            return Poll::Ready(Err(Broken));
        }
        operate(&mut self.connection.lock())
    }
}

/// The read direction.
#[derive(Debug)]
pub(crate) struct Receiver {
    connection: Connection,
    /// All that had come was read.
    dry: bool,
}

impl Receiver {
    /// The next bytes; `None` at the end. Cancel-safe.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// Bytes that the next read gives.
    pub(super) fn push_back(&mut self, bytes: Bytes) {
        self.connection.lock().push_back(bytes);
    }

    pub(crate) fn abort(&self) {
        self.connection.abort();
    }

    /// As [`Receiver::chunk`].
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        let bond = &self.connection.0.bond;
        if bond.ended.is_cancelled() {
            return Poll::Ready(Err(Broken));
        }
        let read = self.connection.lock().poll_chunk(cx);
        match &read {
            Poll::Pending => self.dry = true,
            Poll::Ready(Ok(Some(_))) if std::mem::take(&mut self.dry) => {
                bond.heard.fetch_add(1, Ordering::Relaxed);
            }
            Poll::Ready(_) => {}
        }
        read
    }

    /// What else was read already. Never waits; the next read tells of an end.
    pub(crate) fn more(&mut self) -> Vec<Bytes> {
        let mut tls = self.connection.lock();
        std::iter::from_fn(|| tls.opened().ok().flatten()).take(BATCH).collect()
    }
}
