//! An accepted connection, and who is at its other end.

use std::{
    future::Future as _,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{extract::connect_info, serve::IncomingStream};
use isthmus_model::ids::SpiffeId;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::{TlsIncoming, admission::Place};

/// Who is calling. In tonic: `request.extensions().get::<PeerInfo>()`. In axum: `ConnectInfo<PeerInfo>`, with
/// `into_make_service_with_connect_info::<PeerInfo>()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// The verified SPIFFE ID; `None` if the peer showed no certificate.
    pub id: Option<SpiffeId>,
    /// Where it calls from.
    pub remote: SocketAddr,
}

/// A TLS connection whose handshake is done.
#[derive(Debug)]
pub struct TlsConn {
    stream: TlsStream<TcpStream>,
    peer: PeerInfo,
    /// Over when this fires; only a connection without a certificate has one.
    end: Option<Pin<Box<Sleep>>>,
    _place: Place,
}

impl TlsConn {
    pub(super) fn new(stream: TlsStream<TcpStream>, peer: PeerInfo, place: Place) -> Self {
        Self { stream, peer, end: place.lifetime.map(|lifetime| Box::pin(sleep(lifetime))), _place: place }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }

    /// Writers need no waking: whoever serves a connection reads it all the time, and the first error ends it.
    fn check_end(&self) -> io::Result<()> {
        match &self.end {
            Some(end) if end.is_elapsed() => Err(over()),
            _ => Ok(()),
        }
    }
}

fn over() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "a connection without a certificate has had its time")
}

impl Connected for TlsConn {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl connect_info::Connected<IncomingStream<'_, TlsIncoming>> for PeerInfo {
    fn connect_info(stream: IncomingStream<'_, TlsIncoming>) -> Self {
        stream.io().peer.clone()
    }
}

impl AsyncRead for TlsConn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(end) = &mut self.end
            && end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(over()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsConn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check_end()?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_end()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
