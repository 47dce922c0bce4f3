//! Carries bytes both ways between a TCP connection and its far end: a tunnel's stream, or another TCP connection.
//!
//! What holds: every byte in order, or a reset. An end of stream on one side becomes exactly that on the other while the
//! opposite direction goes on (FIN ↔ finish); an abrupt end of either side ends both at once, abruptly (RST ↔ reset and
//! stop). Memory per connection is bounded by one buffer and the stream's flow-control window, and an idle connection
//! holds neither. The bytes are TLS that only the two workloads can read.

mod direction;

use std::{
    future::poll_fn,
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use socket2::SockRef;
use tokio::{net::TcpStream, time};
use tokio_util::sync::CancellationToken;

use self::direction::{Both, Direction, Reader, Writer};
use crate::{
    clock,
    tunnel::{
        link::{self, RecvHalf, SendHalf},
        stalled::Stalled,
    },
};

/// How long a peer may take to acknowledge the last bytes during a drain.
const LINGER: Duration = Duration::from_secs(2);

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

/// Carries until both directions have ended. `first` came from far already and goes to near before anything else. Both are
/// to be dropped then: an end that was abrupt is told by that.
pub(crate) async fn splice(near: &TcpStream, far: &mut Far, first: Bytes, limits: Limits<'_>) -> Carried {
    let out = AtomicU64::new(0);
    let back = AtomicU64::new(0);
    // Whatever ends this process from here on is a reset to both: the kernel would end a killed one's connections in good
    // order, and a cut would be taken for an end.
    abort(near);
    if let Far::Tcp(tcp) = far {
        abort(tcp);
    }
    let end = {
        let (far_read, far_write) = match far {
            Far::Tunnel(send, recv) => (Reader::Link(recv), Writer::Link(send)),
            Far::Tcp(tcp) => (Reader::tcp(tcp), Writer::Tcp(tcp)),
        };
        let mut both = Both::new(
            Direction::new(Reader::tcp(near), far_write, &out, None),
            Direction::new(far_read, Writer::Tcp(near), &back, limits.stalled),
        );
        both.backward.push(first);
        tokio::select! {
            // A side that ends while the drain is being forced has still ended by itself.
            biased;
            end = poll_fn(|cx| both.poll(cx)) => end,
            end = outlived(limits.idle, limits.lifetime, [&out, &back]) => end,
            () = limits.force.cancelled() => End::Forced,
        }
    };
    match (end, far) {
        (End::Finished, far) => {
            keep(near);
            match far {
                Far::Tcp(tcp) => keep(tcp),
                Far::Tunnel(send @ SendHalf::Quic(_), _) if limits.draining.is_cancelled() => {
                    drop(time::timeout(LINGER, send.stopped()).await);
                }
                Far::Tunnel(..) => {}
            }
        }
        (_, Far::Tunnel(send, recv)) => link::reset(send, recv),
        (_, Far::Tcp(_)) => {}
    }
    Carried { out: out.into_inner(), back: back.into_inner(), end }
}

/// Makes the close of `tcp` a reset, so that its peer never takes a cut for an end; of a listener: that of all that it accepts.
pub(crate) fn abort(tcp: &impl AsFd) {
    // Fails only on a socket that is gone already.
    drop(SockRef::from(tcp).set_linger(Some(Duration::ZERO)));
}

/// Takes [`abort`] back.
fn keep(tcp: &TcpStream) {
    drop(SockRef::from(tcp).set_linger(None));
}

/// No latency from coalescing, and an end for peers that vanish without a word.
pub(crate) fn prepare(tcp: &TcpStream) {
    let keepalive =
        socket2::TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10));
    if let Err(error) = tcp.set_nodelay(true).and_then(|()| SockRef::from(tcp).set_tcp_keepalive(&keepalive)) {
        tracing::debug!(%error, "socket options refused");
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

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn what_a_listener_accepts_ends_in_a_reset_whoever_closes_it() {
        for aborts in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if aborts {
                abort(&listener);
            }
            let address = listener.local_addr().unwrap();
            let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
            // As the kernel does it for a killed process.
            drop(accepted.unwrap());
            let seen = client.unwrap().read(&mut [0; 1]).await.map_err(|error| error.kind());
            assert_eq!(seen, if aborts { Err(ErrorKind::ConnectionReset) } else { Ok(0) });
        }
    }
}
