//! One TLS connection of a TCP link, as the two halves of a stream.
//!
//! What holds: a TLS close_notify is the end of a stream and nothing else is; a connection that ends without one, is reset
//! or times out reads as [`Broken`], and so does all that follows. An abort is a TCP reset, so that the peer never takes
//! a cut for an end.

use std::{
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time,
};
use tokio_rustls::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::{splice, tunnel::link::Broken};

/// Written at a time: rustls buffers no more than 64 KiB of plaintext.
const WRITE: usize = 32 * 1024;
const LAST_WORDS: Duration = Duration::from_millis(200);

/// A handshaken connection. Clones are the same connection.
#[derive(Clone)]
pub(super) struct Connection(Arc<Inner>);

struct Inner {
    tls: Mutex<TlsStream<TcpStream>>,
    /// The link that it belongs to has ended.
    link_closed: CancellationToken,
    /// Its place among the link's connections.
    _slot: OwnedSemaphorePermit,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

impl Connection {
    pub(super) fn new(tls: TlsStream<TcpStream>, link_closed: CancellationToken, slot: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(Inner { tls: Mutex::new(tls), link_closed, _slot: slot }))
    }

    pub(super) fn halves(self) -> (Sender, Receiver) {
        let receiver = Receiver { connection: self.clone(), pushed_back: None };
        (Sender { connection: self }, receiver)
    }

    /// Whether an idle connection is still of use: the peer says nothing on it before it is used, so that anything to be
    /// read is its end.
    pub(super) fn is_quiet(&self) -> bool {
        let mut byte = [0; 1];
        let mut buffer = ReadBuf::new(&mut byte);
        let mut tls = self.lock();
        Pin::new(&mut *tls).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer).is_pending()
    }

    /// Makes its end a reset.
    pub(super) fn abort(&self) {
        splice::abort(self.lock().get_ref().0);
    }

    fn lock(&self) -> MutexGuard<'_, TlsStream<TcpStream>> {
        // A panic while polling leaves a stream that the next poll finds broken.
        self.0.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The peer's certificate.
pub(super) fn leaf(tls: &TlsStream<TcpStream>) -> Option<CertificateDer<'static>> {
    tls.get_ref().1.peer_certificates()?.first().cloned().map(CertificateDer::into_owned)
}

/// The written direction.
#[derive(Debug)]
pub(crate) struct Sender {
    connection: Connection,
}

impl Sender {
    pub(crate) async fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), Broken> {
        while !bytes.is_empty() {
            let part = bytes.get(..WRITE).unwrap_or(bytes);
            let written = poll_fn(|cx| self.poll(|tls| tls.poll_write(cx, part))).await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Some of the first of `chunks` that is not empty.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<usize, Broken>> {
        let Some(chunk) = chunks.iter_mut().find(|chunk| !chunk.is_empty()) else { return Poll::Ready(Ok(0)) };
        let part = chunk.get(..WRITE).unwrap_or(chunk);
        let written = ready!(self.poll(|tls| tls.poll_write(cx, part)))?;
        chunk.advance(written);
        Poll::Ready(Ok(written))
    }

    /// Without this a part may stay in rustls' buffer until the next write.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.poll(|tls| tls.poll_flush(cx))
    }

    /// As [`Sender::finish`].
    pub(crate) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.poll(|tls| tls.poll_shutdown(cx))
    }

    /// Sends close_notify and a FIN.
    pub(crate) async fn finish(&mut self) -> Result<(), Broken> {
        poll_fn(|cx| self.poll(|tls| tls.poll_shutdown(cx))).await
    }

    /// The last bytes and the end, although the link is closed. Best effort.
    pub(crate) async fn say_last(&mut self, bytes: &[u8]) {
        let say = async {
            let mut rest = bytes;
            while !rest.is_empty() {
                let written = poll_fn(|cx| Pin::new(&mut *self.connection.lock()).poll_write(cx, rest)).await?;
                rest = rest.get(written..).unwrap_or_default();
            }
            poll_fn(|cx| Pin::new(&mut *self.connection.lock()).poll_shutdown(cx)).await
        };
        // A peer that does not take it finds out otherwise.
        drop(time::timeout(LAST_WORDS, say).await);
    }

    pub(crate) fn abort(&self) {
        self.connection.abort();
    }

    pub(crate) fn link_closed(&self) -> impl Future<Output = ()> + Send + use<> {
        self.connection.0.link_closed.clone().cancelled_owned()
    }

    fn poll<T>(
        &self,
        operate: impl FnOnce(Pin<&mut TlsStream<TcpStream>>) -> Poll<io::Result<T>>,
    ) -> Poll<Result<T, Broken>> {
        if self.connection.0.link_closed.is_cancelled() {
            return Poll::Ready(Err(Broken));
        }
        operate(Pin::new(&mut *self.connection.lock())).map_err(|_| Broken)
    }
}

/// The read direction.
#[derive(Debug)]
pub(crate) struct Receiver {
    connection: Connection,
    /// Read before the stream was handed on.
    pushed_back: Option<Bytes>,
}

impl Receiver {
    /// The next bytes; `None` at the end. Cancel-safe.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// Bytes that the next read gives.
    pub(super) fn push_back(&mut self, bytes: Bytes) {
        self.pushed_back = Some(bytes);
    }

    pub(crate) fn abort(&self) {
        self.connection.abort();
    }

    /// As [`Receiver::chunk`].
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        if let Some(bytes) = self.pushed_back.take() {
            return Poll::Ready(Ok(Some(bytes)));
        }
        if self.connection.0.link_closed.is_cancelled() {
            return Poll::Ready(Err(Broken));
        }
        let mut tls = self.connection.lock();
        let mut tls = Pin::new(&mut *tls);
        // rustls' own buffer, so that an idle stream holds none of ours.
        let (chunk, n) = match tls.as_mut().poll_fill_buf(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(_)) => return Poll::Ready(Err(Broken)),
            Poll::Ready(Ok([])) => return Poll::Ready(Ok(None)),
            Poll::Ready(Ok(bytes)) => (Bytes::copy_from_slice(bytes), bytes.len()),
        };
        tls.consume(n);
        Poll::Ready(Ok(Some(chunk)))
    }
}
