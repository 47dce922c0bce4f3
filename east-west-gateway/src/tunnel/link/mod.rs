//! One authenticated link to a gateway of another cluster, whatever carries it: a QUIC connection ([`quic`]), or TLS
//! over TCP ([`tcp`]). Both give the same: a control stream, streams that either side opens, an end with a reason.
//!
//! What holds for streams of both: bytes in order or a reset; a finish arrives as an end and only as that; a reset, a
//! lost link and a cut arrive as [`Broken`]. The peer's certificate was verified when the link was made; what its cluster
//! may do is judged by whoever uses the link.

mod gate;
pub(crate) mod quic;
mod receive;
pub(crate) mod redundancy;
pub(crate) mod tcp;
mod tolerant;
mod watch;

use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    ops::Deref,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use isthmus_model::local::Transport;
use quinn::VarInt;
use rustls::pki_types::CertificateDer;

pub(crate) use self::watch::Watch;
use self::{
    gate::{Gate, GatedSend},
    receive::QuicReceiver,
};
use super::{Close, ending, stalled::Windows};

/// QUIC error code of a carried connection that ended abruptly.
pub(crate) const RESET: VarInt = VarInt::from_u32(1);
/// Chunks gathered at a time.
const BATCH: usize = 32;

/// As logs and metrics say it.
pub(crate) fn label(transport: Transport) -> &'static str {
    match transport {
        Transport::Quic => "quic",
        Transport::Tcp => "tcp",
    }
}

/// The stream or its link ended abruptly; which and why no longer matters to its other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream broke")]
pub(crate) struct Broken;

/// A link. Clones are the same link.
#[derive(Clone, Debug)]
pub(crate) enum Link {
    /// A QUIC connection.
    Quic(QuicLink),
    /// A group of TCP connections.
    Tcp(Arc<tcp::TcpLink>),
}

/// A QUIC connection, and why this end has closed it, which quinn does not tell.
#[derive(Clone, Debug)]
pub(crate) struct QuicLink {
    connection: quinn::Connection,
    own_reason: Arc<OnceLock<Close>>,
    gate: Arc<Gate>,
}

impl From<quinn::Connection> for QuicLink {
    fn from(connection: quinn::Connection) -> Self {
        Self { connection, own_reason: Arc::default(), gate: Arc::default() }
    }
}

impl QuicLink {
    /// Both halves of one of its streams.
    pub(crate) fn halves(&self, (send, recv): (quinn::SendStream, quinn::RecvStream)) -> (SendHalf, RecvHalf) {
        (
            SendHalf::Quic(GatedSend::new(send, self.gate.clone())),
            RecvHalf::Quic(QuicReceiver::new(recv, self.gate.clone())),
        )
    }
}

impl Deref for QuicLink {
    type Target = quinn::Connection;

    fn deref(&self) -> &Self::Target {
        &self.connection
    }
}

/// A link that was just made, with its control stream.
#[derive(Debug)]
pub(crate) struct Fresh {
    pub(crate) link: Link,
    pub(crate) send: SendHalf,
    pub(crate) recv: RecvHalf,
}

/// What is known of the way that a link takes. Zero where the transport does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Path {
    /// The transport's own round-trip time.
    pub(crate) rtt: Duration,
    /// Packets sent and, of these, lost; since the beginning.
    pub(crate) sent: u64,
    pub(crate) lost: u64,
    /// Datagrams that have come from the peer; over TCP, pieces of its streams.
    pub(crate) received: u64,
    /// Congestion window, in bytes.
    pub(crate) window: u64,
}

impl Link {
    /// A new stream to the peer. The caller sets the deadline.
    pub(crate) async fn open(&self) -> Result<(SendHalf, RecvHalf), Broken> {
        match self {
            Self::Quic(link) => Ok(link.halves(link.open_bi().await.map_err(|_| Broken)?)),
            Self::Tcp(link) => link.open().await,
        }
    }

    /// The next stream that the peer opens; `None` when the link has ended. Cancel-safe.
    pub(crate) async fn accept(&self) -> Option<(SendHalf, RecvHalf)> {
        match self {
            Self::Quic(link) => Some(link.halves(link.accept_bi().await.ok()?)),
            Self::Tcp(link) => link.accept().await,
        }
    }

    /// Ends it and all its streams; the peer is told why. The first reason stands.
    pub(crate) fn close(&self, why: Close) {
        match self {
            // Quinn would let a later reason take the place of the first.
            Self::Quic(link) => {
                if link.close_reason().is_none() {
                    link.own_reason.get_or_init(|| why);
                    link.connection.close(why.code(), why.label().as_bytes());
                }
            }
            Self::Tcp(link) => link.close(why),
        }
    }

    /// The peer has said that it ends the link. One that has drained has finished its streams: over TCP the last bytes may
    /// be on their way yet, until [`tcp::TcpLink::end`].
    pub(crate) fn closed_by_peer(&self, reason: String) {
        match self {
            Self::Quic(connection) => connection.close(Close::Drained.code(), reason.as_bytes()),
            Self::Tcp(link) if reason == Close::Drained.label() => link.ended_in_order(reason),
            Self::Tcp(link) => link.ended(reason),
        }
    }

    /// How many connections this end would like to be offered for its own streams, if it `needs` them and cannot dial.
    pub(crate) fn wishes(&self, needs: bool) -> u32 {
        match self {
            Self::Quic(_) => 0,
            Self::Tcp(link) => link.wishes(needs),
        }
    }

    /// Resolves when it has ended, by whom ever.
    pub(crate) async fn closed(&self) {
        match self {
            Self::Quic(connection) => drop(connection.closed().await),
            Self::Tcp(link) => link.closed().await,
        }
    }

    /// Whether it has ended, and why: a [`Close::label`] if either end has said one, or words.
    pub(crate) fn why_closed(&self) -> Option<String> {
        match self {
            Self::Quic(connection) => connection.close_reason().map(|reason| ending::quic(&reason)),
            Self::Tcp(link) => link.why_closed(),
        }
    }

    /// Why this end has closed it, if it has.
    pub(crate) fn own_reason(&self) -> Option<Close> {
        match self {
            Self::Quic(link) => link.own_reason.get().copied(),
            Self::Tcp(link) => link.own_reason(),
        }
    }

    /// Where the peer is now; QUIC follows it when it moves.
    pub(crate) fn remote_address(&self) -> SocketAddr {
        match self {
            Self::Quic(connection) => connection.remote_address(),
            Self::Tcp(link) => link.remote_address(),
        }
    }

    /// The peer's certificate, as the handshake verified it.
    pub(crate) fn leaf(&self) -> Option<CertificateDer<'static>> {
        match self {
            Self::Quic(connection) => quic::leaf(connection),
            Self::Tcp(link) => Some(link.leaf().clone()),
        }
    }

    /// What the transport knows of its path.
    pub(crate) fn path(&self) -> Path {
        match self {
            Self::Quic(connection) => quic::path(connection),
            Self::Tcp(link) => Path { received: link.heard(), ..Path::default() },
        }
    }

    /// The windows that all its streams share, where they share one.
    pub(crate) fn windows(&self) -> Option<Windows> {
        let Self::Quic(link) = self else { return None };
        let (connection, gate) = (link.connection.clone(), link.gate.clone());
        let resize = move |receive, send| {
            connection.set_receive_window(VarInt::from_u64(receive).unwrap_or(VarInt::MAX));
            connection.set_send_window(send);
        };
        Some(Windows { resize: Box::new(resize), read: Box::new(move || gate.read()) })
    }

    /// What carries it.
    pub(crate) fn transport(&self) -> Transport {
        match self {
            Self::Quic(_) => Transport::Quic,
            Self::Tcp(_) => Transport::Tcp,
        }
    }
}

/// The direction of a stream that is written.
#[derive(Debug)]
pub(crate) enum SendHalf {
    Quic(GatedSend),
    Tcp(tcp::Sender),
}

impl SendHalf {
    /// All of `bytes`, copied; they are few.
    pub(crate) async fn write_all(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        match self {
            Self::Quic(send) => send.write_short(Bytes::copy_from_slice(bytes)).await,
            Self::Tcp(send) => send.write_all(bytes).await,
        }
    }

    /// All of `chunk`, which is short: it goes ahead of what [`SendHalf::poll_write`] writes to the same link.
    pub(crate) async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), Broken> {
        match self {
            Self::Quic(send) => send.write_short(chunk).await,
            Self::Tcp(send) => send.write_chunk(chunk).await,
        }
    }

    /// Some of `chunks`, at least a byte; what is written is gone from them.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<usize, Broken>> {
        match self {
            Self::Quic(send) => send.poll_some(cx, chunks),
            Self::Tcp(send) => send.poll_write(cx, chunks),
        }
    }

    /// Nothing of what was written is kept back.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match self {
            Self::Quic(_) => Poll::Ready(Ok(())),
            Self::Tcp(send) => send.poll_flush(cx),
        }
    }

    /// As [`SendHalf::finish`].
    pub(crate) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match self {
            Self::Quic(send) => Poll::Ready(send.finish().map_err(|_| Broken)),
            Self::Tcp(send) => send.poll_finish(cx),
        }
    }

    /// Nothing more will be written. Over TCP this waits until the end is handed to the system.
    pub(crate) async fn finish(&mut self) -> Result<(), Broken> {
        match self {
            Self::Quic(send) => send.finish().map_err(|_| Broken),
            Self::Tcp(send) => send.finish().await,
        }
    }

    /// The last words on a TCP link's control stream, after the link was closed: best effort.
    pub(crate) async fn say_last(&mut self, bytes: &[u8]) {
        if let Self::Tcp(send) = self {
            send.say_last(bytes).await;
        }
    }

    /// What a control stream says goes before what is carried.
    pub(crate) fn prioritize(&self) {
        if let Self::Quic(send) = self {
            // Fails only on a closed stream, which the next write tells.
            drop(send.set_priority(1));
        }
    }

    /// Resolves when the peer does not read any more, or has acknowledged a finished stream's end (QUIC), or when the
    /// connection or its link has broken (TCP).
    ///
    /// For a stream that may still be reset by us, use [`Watch`].
    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let (quic, tcp) = match self {
            Self::Quic(send) => (Some(send.stopped()), None),
            Self::Tcp(send) => (None, Some((send.link_closed(), send.broken()))),
        };
        async move {
            match (quic, tcp) {
                (Some(stopped), _) => drop(stopped.await),
                (None, Some((closed, broken))) => {
                    tokio::select! {
                        () = closed => {}
                        () = broken => {}
                    }
                }
                (None, None) => {}
            }
        }
    }

    /// Resolves when the link has ended, where the stream itself does not tell (TCP).
    pub(crate) fn link_closed(&self) -> Option<impl Future<Output = ()> + Send + use<>> {
        match self {
            Self::Quic(_) => None,
            Self::Tcp(send) => Some(send.link_closed()),
        }
    }
}

/// The direction of a stream that is read.
#[derive(Debug)]
pub(crate) enum RecvHalf {
    Quic(QuicReceiver),
    Tcp(tcp::Receiver),
}

impl RecvHalf {
    /// The next bytes; `None` at the end. Cancel-safe.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// As [`RecvHalf::chunk`].
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        match self {
            Self::Quic(recv) => recv.poll_chunk(cx),
            Self::Tcp(recv) => recv.poll_chunk(cx),
        }
    }

    /// What else has arrived already, in order. Never waits; the next [`RecvHalf::chunk`] tells of an end.
    pub(crate) fn more(&mut self) -> Vec<Bytes> {
        match self {
            Self::Quic(recv) => recv.more(),
            Self::Tcp(recv) => recv.more(),
        }
    }
}

/// Ends a stream abruptly, both ways.
pub(crate) fn reset(send: &mut SendHalf, recv: &mut RecvHalf) {
    match (send, recv) {
        (SendHalf::Quic(send), RecvHalf::Quic(recv)) => {
            // Fails only on a stream that has ended already.
            drop(send.reset(RESET));
            recv.stop();
        }
        (SendHalf::Tcp(send), _) => send.abort(),
        // Halves of one stream are of one kind.
        (SendHalf::Quic(send), RecvHalf::Tcp(recv)) => {
            drop(send.reset(RESET));
            recv.abort();
        }
    }
}

/// The peer need not send any more; what was written to it still arrives. The caller sets the deadline.
pub(crate) async fn stop(recv: &mut RecvHalf) -> Result<(), Broken> {
    match recv {
        RecvHalf::Quic(recv) => {
            recv.stop();
            Ok(())
        }
        // Closing a TCP connection with unread bytes would be a reset, which may overtake what was written.
        RecvHalf::Tcp(recv) => {
            while recv.chunk().await?.is_some() {}
            Ok(())
        }
    }
}
