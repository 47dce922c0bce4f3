//! The reading half of a QUIC stream: once broken, broken for good.
//!
//! quinn tells of a reset once and of an orderly end from then on. Whoever looks whether more has come may be the one who
//! is told; the next read would take the cut for an end.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::FutureExt as _;

use super::{BATCH, Broken, RESET, gate::Gate};

/// As much as is read at once.
const MOST: usize = 64 * 1024;

/// What a peer writes to one stream.
#[derive(Debug)]
pub(crate) struct QuicReceiver {
    stream: quinn::RecvStream,
    gate: Arc<Gate>,
    broken: bool,
}

impl QuicReceiver {
    /// What is read counts at `gate`.
    pub(super) fn new(stream: quinn::RecvStream, gate: Arc<Gate>) -> Self {
        Self { stream, gate, broken: false }
    }

    /// The next bytes; `None` at the end.
    pub(super) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        if self.broken {
            return Poll::Ready(Err(Broken));
        }
        // The future holds nothing between polls that a new one would not find out.
        pin!(self.stream.read_chunk(MOST, true)).poll(cx).map(|read| match read {
            Ok(chunk) => Ok(chunk.map(|chunk| {
                self.gate.count_read(chunk.bytes.len());
                chunk.bytes
            })),
            Err(_) => {
                self.broken = true;
                Err(Broken)
            }
        })
    }

    /// What else has come already, in order; the next [`QuicReceiver::poll_chunk`] tells of an end.
    pub(super) fn more(&mut self) -> Vec<Bytes> {
        if self.broken {
            return Vec::new();
        }
        let mut chunks = [const { Bytes::new() }; BATCH];
        match self.stream.read_chunks(&mut chunks).now_or_never() {
            Some(Ok(Some(n))) => {
                let chunks: Vec<Bytes> = chunks.into_iter().take(n).collect();
                self.gate.count_read(chunks.iter().map(Bytes::len).sum());
                chunks
            }
            Some(Err(_)) => {
                self.broken = true;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// The peer need not send any more.
    pub(super) fn stop(&mut self) {
        // Fails only on a stream that has ended already.
        drop(self.stream.stop(RESET));
    }
}

impl From<quinn::RecvStream> for QuicReceiver {
    fn from(stream: quinn::RecvStream) -> Self {
        Self::new(stream, Arc::default())
    }
}

#[cfg(test)]
mod tests {
    use isthmus_identity::tls::IdentitySource;
    use prometheus_client::metrics::counter::Counter;
    use quinn::{Endpoint, Runtime as _, TokioRuntime};

    use crate::{
        handover::cids::CidKey,
        testkit::{FEDERATION, cluster},
        tests::rig::{config, local, svid, trust},
        tunnel::link::{
            Broken, Link, QuicLink,
            quic::{self, Identity},
            reset,
        },
    };

    fn identity(name: &str) -> Identity {
        Identity { source: IdentitySource::new(svid(name)), trust: trust(), federation: FEDERATION.parse().unwrap() }
    }

    /// Both ends of one link, and the endpoints that it needs.
    async fn link() -> ([Link; 2], [Endpoint; 2]) {
        let tunnel = config("east").tunnel;
        let endpoints = ["east", "west"].map(|name| {
            let socket = TokioRuntime.wrap_udp_socket(std::net::UdpSocket::bind(local(0)).unwrap()).unwrap();
            quic::endpoint_on(socket, CidKey::random(), &tunnel, &identity(name), Counter::default()).unwrap()
        });
        let (east, west) = (identity("east"), cluster("west"));
        let to = (&west, endpoints[1].local_addr().unwrap());
        let accept = async { endpoints[1].accept().await.unwrap().await.unwrap() };
        let (dialled, accepted) = tokio::join!(quic::connect(&endpoints[0], &tunnel, &east, to), accept);
        ([dialled.unwrap(), accepted].map(|connection| Link::Quic(QuicLink::from(connection))), endpoints)
    }

    #[tokio::test]
    async fn a_reset_found_while_looking_for_more_is_no_end() {
        let ([east, west], _endpoints) = link().await;
        let (mut send, mut recv) = east.open().await.unwrap();
        send.write_all(b"first").await.unwrap();
        let (peers_send, mut peers_recv) = west.accept().await.unwrap();
        assert_eq!(peers_recv.chunk().await.unwrap().unwrap(), "first");
        reset(&mut send, &mut recv);
        // Goes with the reset.
        peers_send.stopped().await;
        assert!(peers_recv.more().is_empty());
        for _ in 0..2 {
            assert_eq!(peers_recv.chunk().await, Err(Broken), "a cut is no end");
        }
        assert!(peers_recv.more().is_empty());
    }
}
