//! Carries bytes both ways between a TCP connection and its far end: a tunnel's stream, or another TCP connection.
//!
//! What holds: every byte in order, or a reset. An end of stream on one side becomes exactly that on the other while the
//! opposite direction goes on (FIN ↔ finish); an abrupt end of either side ends both at once, abruptly (RST ↔ reset and
//! stop). Memory per connection is bounded by one buffer and the stream's flow-control window, and an idle connection
//! holds neither. The bytes are TLS that only the two workloads can read.

use std::{
    future::Future,
    io::{ErrorKind, IoSlice},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    time,
};
use tokio_util::sync::CancellationToken;

use crate::{
    clock,
    tunnel::{
        link::{self, Broken, RecvHalf, SendHalf},
        stalled::Stalled,
    },
};

/// How long a peer may take to acknowledge the last bytes during a drain.
const LINGER: Duration = Duration::from_secs(2);
const MIN_BUFFER: usize = 2 * 1024;
const MAX_BUFFER: usize = 64 * 1024;
/// A near side that takes nothing for so long is a slow reader.
const SLOW: Duration = Duration::from_millis(100);

/// Where the bytes of the near TCP connection go.
#[derive(Debug)]
pub(crate) enum Far {
    /// A tunnel's stream.
    Tunnel(SendHalf, RecvHalf),
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
    /// A slow reader, when there were too many.
    Stalled,
    /// It was as old as a connection may become.
    Old,
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
            Self::Stalled => "stalled",
            Self::Old => "lifetime",
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
    /// Reset at this age; zero for never.
    pub(crate) lifetime: Duration,
    /// Slow readers of the same tunnel, of which only so many are borne.
    pub(crate) stalled: Option<&'a Stalled>,
    /// Reset when cancelled.
    pub(crate) force: &'a CancellationToken,
    /// While cancelled, a finished stream is held until its peer has all bytes: its link closes soon.
    pub(crate) draining: &'a CancellationToken,
}

/// Carries until both directions have ended. `first` came from far already and goes to near before anything else.
pub(crate) async fn splice(mut near: TcpStream, mut far: Far, first: Bytes, limits: Limits<'_>) -> Carried {
    let out = AtomicU64::new(0);
    let back = AtomicU64::new(0);
    let end = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = match &mut far {
            Far::Tunnel(send, recv) => (Source::Link(recv), Sink::Link(send)),
            Far::Tcp(tcp) => {
                let (read, write) = tcp.split();
                (Source::Tcp(read, MIN_BUFFER), Sink::Tcp(write))
            }
        };
        let near_read = Source::Tcp(near_read, MIN_BUFFER);
        let outward = pump(near_read, far_write, &out, None, (End::Near, End::Far));
        let backward = async {
            let mut near_write = Sink::Tcp(near_write);
            back.fetch_add(first.len() as u64, Ordering::Relaxed);
            near_write.write(first).await.map_err(|Broken| End::Near)?;
            pump(far_read, near_write, &back, limits.stalled, (End::Far, End::Near)).await
        };
        tokio::select! {
            // A side that ends while the drain is being forced has still ended by itself.
            biased;
            done = async { tokio::try_join!(outward, backward) } => done.err().unwrap_or(End::Finished),
            end = outlived(limits.idle, limits.lifetime, [&out, &back]) => end,
            () = limits.force.cancelled() => End::Forced,
        }
    };
    if end != End::Finished {
        abort(&near);
        match &mut far {
            Far::Tunnel(send, recv) => link::reset(send, recv),
            Far::Tcp(tcp) => abort(tcp),
        }
    } else if limits.draining.is_cancelled()
        && let Far::Tunnel(send @ SendHalf::Quic(_), _) = &far
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
    stalled: Option<&Stalled>,
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
        let more = source.more();
        let length = (bytes.len() + more.iter().map(Bytes::len).sum::<usize>()) as u64;
        let write = async { if more.is_empty() { sink.write(bytes).await } else { sink.write_all(bytes, more).await } };
        bear(write, stalled).await.ok_or(End::Stalled)?.map_err(|Broken| sink_end)?;
        count.fetch_add(length, Ordering::Relaxed);
    }
}

/// Waits for `write`, unless it takes long and too many others do. `None`: it is borne no longer.
async fn bear<T>(write: impl Future<Output = T>, stalled: Option<&Stalled>) -> Option<T> {
    let Some(stalled) = stalled else { return Some(write.await) };
    tokio::pin!(write);
    tokio::select! {
        biased;
        done = &mut write => return Some(done),
        () = time::sleep(SLOW) => {}
    }
    let place = stalled.enter();
    tokio::select! {
        biased;
        done = write => Some(done),
        () = place.given_up() => None,
    }
}

/// One timer for both, since an idle connection should cost little.
async fn outlived(idle: Duration, lifetime: Duration, counts: [&AtomicU64; 2]) -> End {
    let began = clock::now();
    let left = || if lifetime.is_zero() { Duration::MAX } else { lifetime.saturating_sub(clock::since(began)) };
    let total = || counts.iter().map(|c| c.load(Ordering::Relaxed)).fold(0, u64::wrapping_add);
    let mut before = total();
    loop {
        time::sleep(idle.min(left())).await;
        if left().is_zero() {
            return End::Old;
        }
        let now = total();
        if now == before {
            return End::Idle;
        }
        before = now;
    }
}

enum Source<'a> {
    /// With the size of its next buffer, which starts small and grows while reads fill it: most connections never need
    /// much.
    Tcp(ReadHalf<'a>, usize),
    Link(&'a mut RecvHalf),
}

impl Source<'_> {
    /// The next bytes; `None` at the end. Cancel-safe.
    async fn read(&mut self) -> Result<Option<Bytes>, Broken> {
        match self {
            Self::Tcp(half, size) => loop {
                // No buffer while there is nothing to put into it.
                half.readable().await.map_err(|_| Broken)?;
                let mut buffer = BytesMut::with_capacity(*size);
                match half.try_read_buf(&mut buffer) {
                    Ok(0) => return Ok(None),
                    Ok(n) => {
                        if n >= *size {
                            *size = (*size * 2).min(MAX_BUFFER);
                        } else if n < *size / 8 {
                            *size = (*size / 2).max(MIN_BUFFER);
                        }
                        return Ok(Some(buffer.freeze()));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return Err(Broken),
                }
            },
            Self::Link(recv) => recv.chunk().await,
        }
    }

    /// What else is there without waiting.
    fn more(&mut self) -> Vec<Bytes> {
        match self {
            Self::Tcp(..) => Vec::new(),
            Self::Link(recv) => recv.more(),
        }
    }
}

enum Sink<'a> {
    Tcp(WriteHalf<'a>),
    Link(&'a mut SendHalf),
}

impl Sink<'_> {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Broken> {
        match self {
            Self::Tcp(half) => half.write_all(&bytes).await.map_err(|_| Broken),
            Self::Link(send) => send.write_chunk(bytes).await,
        }
    }

    /// `first`, then `rest`, in as few system calls as it takes.
    async fn write_all(&mut self, first: Bytes, rest: Vec<Bytes>) -> Result<(), Broken> {
        let mut chunks = rest;
        chunks.insert(0, first);
        match self {
            Self::Tcp(half) => write_vectored(half, &mut chunks).await.map_err(|_| Broken),
            Self::Link(send) => {
                for chunk in chunks {
                    send.write_chunk(chunk).await?;
                }
                Ok(())
            }
        }
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        match self {
            Self::Tcp(half) => half.shutdown().await.map_err(|_| Broken),
            Self::Link(send) => send.finish().await,
        }
    }

    /// Resolves when nobody reads what is written here any more. A TCP socket tells only when written to.
    fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = match self {
            Self::Tcp(_) => None,
            Self::Link(send) => Some(send.stopped()),
        };
        async {
            match stopped {
                Some(stopped) => stopped.await,
                None => std::future::pending().await,
            }
        }
    }
}

async fn write_vectored(half: &mut WriteHalf<'_>, chunks: &mut [Bytes]) -> std::io::Result<()> {
    let mut at = 0;
    while let Some(left) = chunks.get_mut(at..).filter(|left| !left.is_empty()) {
        let slices: Vec<IoSlice<'_>> = left.iter().map(|chunk| IoSlice::new(chunk)).collect();
        let mut written = half.write_vectored(&slices).await?;
        if written == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        for chunk in left {
            let n = written.min(chunk.len());
            chunk.advance(n);
            written -= n;
            if !chunk.is_empty() {
                break;
            }
            at += 1;
        }
    }
    Ok(())
}
