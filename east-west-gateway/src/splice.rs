//! Carries bytes both ways between a TCP connection and its far end: a tunnel's stream, or another TCP connection.
//!
//! What holds: every byte in order, or a reset. An end of stream on one side becomes exactly that on the other while the
//! opposite direction goes on (FIN ↔ finish); an abrupt end of either side ends both at once, abruptly (RST ↔ reset and
//! stop). Memory per connection is bounded by one buffer and the stream's flow-control window. The bytes are TLS that
//! only the two workloads can read.

use std::{
    future::Future,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use quinn::{RecvStream, SendStream, VarInt};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    time,
};
use tokio_util::sync::CancellationToken;

/// QUIC error code of a carried connection that ended abruptly.
pub(crate) const RESET: VarInt = VarInt::from_u32(1);
/// How long a peer may take to acknowledge the last bytes during a drain.
const LINGER: Duration = Duration::from_secs(2);
const MIN_BUFFER: usize = 4 * 1024;
const MAX_BUFFER: usize = 64 * 1024;

/// Where the bytes of the near TCP connection go.
#[derive(Debug)]
pub(crate) enum Far {
    /// A tunnel's stream.
    Tunnel(SendStream, RecvStream),
    /// A local endpoint.
    Tcp(TcpStream),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Both directions came to their end.
    Finished,
    /// The near connection was reset.
    Near,
    /// The far side was reset or lost.
    Far,
    /// No byte for too long.
    Idle,
    /// The gateway's drain was over.
    Forced,
}

impl End {
    /// As logs say it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Near => "near_reset",
            Self::Far => "far_reset",
            Self::Idle => "idle",
            Self::Forced => "forced",
        }
    }
}

/// What was carried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Carried {
    /// Bytes from near to far.
    pub(crate) out: u64,
    /// Bytes from far to near.
    pub(crate) back: u64,
    /// How it ended.
    pub(crate) end: End,
}

/// When to stop although both sides are well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits<'a> {
    /// Reset after between one and two times this long without a byte.
    pub(crate) idle: Duration,
    /// Reset when cancelled.
    pub(crate) force: &'a CancellationToken,
    /// While cancelled, a finished stream is held until its peer has all bytes: its connection closes soon.
    pub(crate) draining: &'a CancellationToken,
}

/// Carries until both directions have ended. `first` came from far already and goes to near before anything else.
pub(crate) async fn splice(mut near: TcpStream, mut far: Far, first: Bytes, limits: Limits<'_>) -> Carried {
    let out = AtomicU64::new(0);
    let back = AtomicU64::new(0);
    let end = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = match &mut far {
            Far::Tunnel(send, recv) => (Source::Quic(recv), Sink::Quic(send)),
            Far::Tcp(tcp) => {
                let (read, write) = tcp.split();
                (Source::Tcp(read, BytesMut::new(), MIN_BUFFER), Sink::Tcp(write))
            }
        };
        let near_read = Source::Tcp(near_read, BytesMut::new(), MIN_BUFFER);
        let outward = pump(near_read, far_write, &out, (End::Near, End::Far));
        let backward = async {
            let mut near_write = Sink::Tcp(near_write);
            back.fetch_add(first.len() as u64, Ordering::Relaxed);
            near_write.write(first).await.map_err(|Broken| End::Near)?;
            pump(far_read, near_write, &back, (End::Far, End::Near)).await
        };
        tokio::select! {
            // A side that ends while the drain is being forced has still ended by itself.
            biased;
            done = async { tokio::try_join!(outward, backward) } => done.err().unwrap_or(End::Finished),
            () = idle(limits.idle, [&out, &back]) => End::Idle,
            () = limits.force.cancelled() => End::Forced,
        }
    };
    if end != End::Finished {
        abort(&near);
        match &mut far {
            Far::Tunnel(send, recv) => reset(send, recv),
            Far::Tcp(tcp) => abort(tcp),
        }
    } else if limits.draining.is_cancelled()
        && let Far::Tunnel(send, _) = &far
    {
        drop(time::timeout(LINGER, send.stopped()).await);
    }
    Carried { out: out.into_inner(), back: back.into_inner(), end }
}

/// Makes the close of `tcp` a reset, so that its peer never takes a cut for an end.
pub(crate) fn abort(tcp: &TcpStream) {
    // Fails only on a socket that is gone already.
    drop(SockRef::from(tcp).set_linger(Some(Duration::ZERO)));
}

/// Ends a tunnel's stream abruptly, both ways.
pub(crate) fn reset(send: &mut SendStream, recv: &mut RecvStream) {
    // Fail only on streams that have ended already.
    drop(send.reset(RESET));
    drop(recv.stop(RESET));
}

/// No latency from coalescing, and an end for peers that vanish without a word.
pub(crate) fn prepare(tcp: &TcpStream) {
    let keepalive =
        socket2::TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10));
    if let Err(error) = tcp.set_nodelay(true).and_then(|()| SockRef::from(tcp).set_tcp_keepalive(&keepalive)) {
        tracing::debug!(%error, "socket options refused");
    }
}

/// One direction. `Err` names the side that broke.
async fn pump(
    mut source: Source<'_>,
    mut sink: Sink<'_>,
    count: &AtomicU64,
    (source_end, sink_end): (End, End),
) -> Result<(), End> {
    // Made once: it remembers nothing between polls that a new one would not find out.
    let stopped = sink.stopped();
    tokio::pin!(stopped);
    loop {
        let bytes = tokio::select! {
            read = source.read() => read.map_err(|Broken| source_end)?,
            () = &mut stopped => return Err(sink_end),
        };
        let Some(bytes) = bytes else { return sink.finish().await.map_err(|Broken| sink_end) };
        let length = bytes.len() as u64;
        sink.write(bytes).await.map_err(|Broken| sink_end)?;
        count.fetch_add(length, Ordering::Relaxed);
    }
}

async fn idle(limit: Duration, counts: [&AtomicU64; 2]) {
    let total = || counts.iter().map(|c| c.load(Ordering::Relaxed)).fold(0, u64::wrapping_add);
    let mut before = total();
    loop {
        time::sleep(limit).await;
        let now = total();
        if now == before {
            return;
        }
        before = now;
    }
}

/// A side ended abruptly; which and why no longer matters to the other.
struct Broken;

enum Source<'a> {
    /// With its buffer, which starts small and grows while reads fill it: most connections never need much.
    Tcp(ReadHalf<'a>, BytesMut, usize),
    Quic(&'a mut RecvStream),
}

impl Source<'_> {
    /// The next bytes; `None` at the end. Cancel-safe.
    async fn read(&mut self) -> Result<Option<Bytes>, Broken> {
        match self {
            Self::Tcp(half, buffer, size) => {
                buffer.reserve(*size);
                let n = half.read_buf(buffer).await.map_err(|_| Broken)?;
                if n >= *size {
                    *size = (*size * 2).min(MAX_BUFFER);
                }
                Ok((n > 0).then(|| buffer.split().freeze()))
            }
            Self::Quic(recv) => {
                let chunk = recv.read_chunk(MAX_BUFFER, true).await.map_err(|_| Broken)?;
                Ok(chunk.map(|c| c.bytes))
            }
        }
    }
}

enum Sink<'a> {
    Tcp(WriteHalf<'a>),
    Quic(&'a mut SendStream),
}

impl Sink<'_> {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Broken> {
        match self {
            Self::Tcp(half) => half.write_all(&bytes).await.map_err(|_| Broken),
            Self::Quic(send) => send.write_chunk(bytes).await.map_err(|_| Broken),
        }
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        match self {
            Self::Tcp(half) => half.shutdown().await.map_err(|_| Broken),
            Self::Quic(send) => send.finish().map_err(|_| Broken),
        }
    }

    /// Resolves when nobody reads what is written here any more. A TCP socket tells only when written to.
    fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = match self {
            Self::Tcp(_) => None,
            Self::Quic(send) => Some(send.stopped()),
        };
        async {
            match stopped {
                Some(stopped) => drop(stopped.await),
                None => std::future::pending().await,
            }
        }
    }
}
