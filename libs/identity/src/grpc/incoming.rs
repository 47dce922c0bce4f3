//! The accept loop: TCP, then TLS, many handshakes at once.
//!
//! It runs inside its consumer's poll (tonic's or axum's accept loop), so there is no task to supervise. Handshakes are
//! bounded in number and time; beyond the bound new connections wait in the kernel's backlog. What comes out of them is
//! bounded too (see [`super::admission`]): a connection beyond that bound is closed at once.

use std::{
    error::Error as _,
    fmt::{self, Write as _},
    future::Future as _,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::serve::Listener;
use futures_util::{
    Stream, StreamExt as _,
    future::{BoxFuture, FutureExt as _, poll_fn},
    stream::FuturesUnordered,
};
use isthmus_runtime::health::Registry;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family},
};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    PeerInfo, TlsConn,
    admission::{Admission, Limits},
};

/// How long a peer may take for its handshake, unless set otherwise.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// Most handshakes under way per listener.
pub const MAX_PENDING: usize = 512;

/// Rest after an accept error such as EMFILE, which lasts until something is closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts TLS connections. A `Stream` for tonic's `serve_with_incoming`, a `Listener` for `axum::serve`. Never ends.
pub struct TlsIncoming {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    pending: FuturesUnordered<BoxFuture<'static, Result<TlsConn, Failure>>>,
    pause: Option<Pin<Box<Sleep>>>,
    deadline: Duration,
    pub(super) max_pending: usize,
    admission: Admission,
    handshakes: Handshakes,
}

impl TlsIncoming {
    /// Over a bound listener.
    pub fn new(listener: TcpListener, config: Arc<ServerConfig>) -> Self {
        Self {
            listener,
            acceptor: TlsAcceptor::from(config),
            pending: FuturesUnordered::new(),
            pause: None,
            deadline: HANDSHAKE_DEADLINE,
            max_pending: MAX_PENDING,
            admission: Admission::new(Limits::default()),
            handshakes: Handshakes::default(),
        }
    }

    /// Another deadline than [`HANDSHAKE_DEADLINE`].
    pub fn with_handshake_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Other bounds than the published ones.
    #[cfg(test)]
    pub(super) fn with_limits(mut self, limits: Limits) -> Self {
        self.admission = Admission::new(limits);
        self
    }

    /// Counts into `handshakes`, which may have been registered before there was a listener.
    pub fn counted_by(mut self, handshakes: Handshakes) -> Self {
        self.handshakes = handshakes;
        self
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Counts of handshakes by outcome; take it before handing the listener over.
    pub fn handshakes(&self) -> Handshakes {
        self.handshakes.clone()
    }

    fn poll_conn(&mut self, cx: &mut Context<'_>) -> Poll<TlsConn> {
        self.poll_accepts(cx);
        loop {
            match ready!(self.pending.poll_next_unpin(cx)) {
                Some(Ok(conn)) => {
                    self.handshakes.count(Outcome::Ok);
                    return Poll::Ready(conn);
                }
                Some(Err(failure)) => {
                    failure.log();
                    self.handshakes.count(failure.outcome);
                    // There is room for another one now, and nobody else would wake us for it.
                    self.poll_accepts(cx);
                }
                None => return Poll::Pending,
            }
        }
    }

    /// Accepts until nobody waits, the bound is reached, or the system says no.
    fn poll_accepts(&mut self, cx: &mut Context<'_>) {
        while self.pending.len() < self.max_pending {
            if let Some(pause) = &mut self.pause {
                if pause.as_mut().poll(cx).is_pending() {
                    return;
                }
                self.pause = None;
            }
            match self.listener.poll_accept(cx) {
                Poll::Pending => return,
                Poll::Ready(Ok((tcp, remote))) => {
                    let accepting =
                        handshake(self.acceptor.clone(), self.admission.clone(), tcp, remote, self.deadline);
                    self.pending.push(accepting.boxed());
                }
                Poll::Ready(Err(e)) if is_of_one_connection(&e) => {}
                Poll::Ready(Err(error)) => {
                    tracing::warn!(%error, "cannot accept connections; trying again");
                    self.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

impl Stream for TlsIncoming {
    type Item = io::Result<TlsConn>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_conn(cx).map(|conn| Some(Ok(conn)))
    }
}

impl Listener for TlsIncoming {
    type Io = TlsConn;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TlsConn, SocketAddr) {
        let conn = poll_fn(|cx| self.poll_conn(cx)).await;
        let remote = conn.peer().remote;
        (conn, remote)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// `isthmus_tls_handshakes_total` by outcome, of one listener. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub struct Handshakes(Family<OutcomeLabel, Counter>);

impl Handshakes {
    /// Exports the counts with the label `listener`.
    pub fn register(&self, registry: &mut Registry, listener: &'static str) {
        registry.sub_registry_with_label(("listener".into(), listener.into())).register(
            "isthmus_tls_handshakes",
            "TLS handshakes with clients, by outcome",
            self.0.clone(),
        );
    }

    /// Handshakes that led to a connection.
    pub fn succeeded(&self) -> u64 {
        self.of(Outcome::Ok)
    }

    /// Handshakes that did not, for whatever reason.
    pub fn failed(&self) -> u64 {
        use Outcome::{Certificate, Closed, Deadline, NoCertificate, NotTls, Tls, TooMany};
        let all = [Certificate, Closed, Deadline, NoCertificate, NotTls, Tls, TooMany];
        all.into_iter().map(|outcome| self.of(outcome)).sum()
    }

    /// Handshakes that succeeded, but whose connection was one too many.
    pub fn crowded_out(&self) -> u64 {
        self.of(Outcome::TooMany)
    }

    fn of(&self, outcome: Outcome) -> u64 {
        self.0.get_or_create(&OutcomeLabel { outcome }).get()
    }

    fn count(&self, outcome: Outcome) {
        self.0.get_or_create(&OutcomeLabel { outcome }).inc();
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Outcome {
    Ok,
    /// The peer's certificate was refused.
    Certificate,
    /// The peer closed, or its network failed.
    Closed,
    Deadline,
    NoCertificate,
    /// What came was not TLS.
    NotTls,
    /// Any other failure of the protocol, the peer's alerts included.
    Tls,
    /// The handshake succeeded, but too many connections are open.
    TooMany,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Certificate => "certificate",
            Self::Closed => "closed",
            Self::Deadline => "deadline",
            Self::NoCertificate => "no_certificate",
            Self::NotTls => "not_tls",
            Self::Tls => "tls",
            Self::TooMany => "too_many",
        }
    }
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(self.label())
    }
}

struct Failure {
    outcome: Outcome,
    remote: SocketAddr,
    error: Option<io::Error>,
}

impl Failure {
    fn of(remote: SocketAddr, error: io::Error) -> Self {
        let outcome = match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(_)) => Outcome::Certificate,
            Some(rustls::Error::NoCertificatesPresented) => Outcome::NoCertificate,
            Some(rustls::Error::InvalidMessage(_)) => Outcome::NotTls,
            Some(_) => Outcome::Tls,
            None => Outcome::Closed,
        };
        Self { outcome, remote, error: Some(error) }
    }

    fn log(&self) {
        let Self { outcome, remote, error } = self;
        match error {
            None => tracing::debug!(%remote, "TLS handshake took too long"),
            Some(error) if *outcome == Outcome::TooMany => {
                tracing::debug!(%remote, %error, "connection closed at once")
            }
            // The verifier has logged the reason, in more words.
            Some(_) if *outcome == Outcome::Certificate => {}
            Some(e) => {
                let source = e.source().map(ToString::to_string);
                tracing::debug!(%remote, ?outcome, error = %e, source, "TLS handshake failed");
            }
        }
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    admission: Admission,
    tcp: TcpStream,
    remote: SocketAddr,
    deadline: Duration,
) -> Result<TlsConn, Failure> {
    // Without it, small gRPC frames would wait for acknowledgements. A failure costs only latency.
    drop(tcp.set_nodelay(true));
    match timeout(deadline, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => {
            let peer = PeerInfo { id: crate::tls::peer_id(stream.get_ref().1.peer_certificates()), remote };
            match admission.admit(&peer) {
                Ok(place) => Ok(TlsConn::new(stream, peer, place)),
                Err(why) => Err(Failure { outcome: Outcome::TooMany, remote, error: Some(io::Error::other(why)) }),
            }
        }
        Ok(Err(error)) => Err(Failure::of(remote, error)),
        Err(_) => Err(Failure { outcome: Outcome::Deadline, remote, error: None }),
    }
}

/// Errors about the connection that was to be accepted, not about the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}
