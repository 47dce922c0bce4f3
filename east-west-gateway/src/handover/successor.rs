//! The side that starts: asks the running gateway for its sockets, prepares, and serves when it is told to.
//!
//! With no gateway to take over from, it starts like any other, so `--take-over` may always be given. When the predecessor
//! is lost, at whatever step, this gateway serves alone.

use std::{io, net::UdpSocket, os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use prometheus_client::metrics::counter::Counter;
use tokio::{net::UnixStream, time};

use super::{
    VERSION,
    cids::CidKey,
    path,
    relay::Relay,
    shelf::Given,
    socket::SharedSocket,
    steps::Steps,
    wire::{self, FromPredecessor, FromSuccessor},
};
use crate::config::Config;

/// For a message that the other side sends or takes at once.
const PROMPT: Duration = Duration::from_secs(5);

/// Why a running gateway could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// It said no.
    #[error("the gateway behind {} refuses: {why}", socket.display())]
    Refused {
        /// The handover socket.
        socket: PathBuf,
        /// Its words.
        why: String,
    },
    /// Somebody else listens there.
    #[error(
        "{} is served by user {uid}, not by the user of this process; run both gateways as the same user",
        socket.display()
    )]
    OtherUser {
        /// The handover socket.
        socket: PathBuf,
        /// Who listens.
        uid: u32,
    },
    /// The conversation broke.
    #[error("talk to the running gateway over {}; it goes on as before", socket.display())]
    Broken {
        /// The handover socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The running gateway takes too long.
    #[error("the running gateway (process {pid}) does not answer; nothing was taken over")]
    Silent {
        /// Its process; 0 before it said.
        pid: u32,
    },
}

/// A gateway that has been given its predecessor's sockets.
#[derive(Debug)]
pub(crate) struct Successor {
    stream: UnixStream,
    socket: PathBuf,
    pid: u32,
    own: CidKey,
    other: CidKey,
    relay: OwnedFd,
    /// What it was given.
    pub(crate) given: Arc<Given>,
    /// It uses the tunnel's UDP socket that it was given.
    pub(crate) shares_tunnel: bool,
}

impl Successor {
    /// Asks the gateway that runs with this configuration's state directory. `None`: there is none.
    pub(crate) async fn ask(config: &Config) -> Result<Option<Self>, TakeOverError> {
        let socket = path(&config.state_dir);
        let asked = time::timeout(PROMPT, Self::ask_at(config, socket)).await;
        asked.unwrap_or(Err(TakeOverError::Silent { pid: 0 }))
    }

    async fn ask_at(config: &Config, socket: PathBuf) -> Result<Option<Self>, TakeOverError> {
        let broken = |source| TakeOverError::Broken { socket: socket.clone(), source };
        let mut stream = match UnixStream::connect(&socket).await {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                tracing::info!(socket = %socket.display(), "no gateway runs here; starting afresh");
                return Ok(None);
            }
            Err(error) => return Err(broken(error)),
        };
        let uid = stream.peer_cred().map_err(broken)?.uid();
        if uid != rustix::process::geteuid().as_raw() {
            return Err(TakeOverError::OtherUser { socket, uid });
        }
        let own = CidKey::random();
        let (name, pid) = (config.name.clone(), std::process::id());
        let ask = FromSuccessor::TakeOver { version: VERSION, pid, name, cid_key: own.0 };
        wire::write(&mut stream, &ask).await.map_err(broken)?;
        let (pid, cid_key, roles) = match wire::read(&mut stream).await.map_err(broken)? {
            FromPredecessor::Offer { pid, cid_key, sockets } => (pid, cid_key, sockets),
            FromPredecessor::Refused { why } => return Err(TakeOverError::Refused { socket, why }),
            FromPredecessor::Go => return Err(broken(io::ErrorKind::InvalidData.into())),
        };
        let mut sockets = wire::receive_sockets(&stream, roles.len() + 1).await.map_err(broken)?;
        let relay = sockets.pop().ok_or_else(|| broken(io::ErrorKind::InvalidData.into()))?;
        tracing::info!(predecessor = pid, sockets = roles.len(), "taking over from the running gateway");
        let given = Arc::new(Given::new(roles.into_iter().zip(sockets)));
        let other = CidKey(cid_key);
        Ok(Some(Self { stream, socket, pid, own, other, relay, given, shares_tunnel: false }))
    }

    /// The tunnel's socket, of which the predecessor still reads. Call once.
    pub(crate) fn tunnel(&self, socket: UdpSocket, lost: Counter) -> io::Result<Arc<SharedSocket>> {
        if !self.shares_tunnel {
            return SharedSocket::alone(socket, lost);
        }
        let relay = Relay::adopt(self.relay.try_clone()?)?;
        SharedSocket::fed(socket, lost, self.own, (self.other, relay))
    }

    /// Prepares, and waits for the predecessor's word. Then this gateway serves: alone if the predecessor was lost.
    pub(crate) async fn go(
        mut self,
        tunnel: &SharedSocket,
        prepared: impl Future<Output = ()>,
    ) -> Result<Attendant, TakeOverError> {
        let lost = tokio::select! {
            () = prepared => None,
            // It says nothing before we are ready: what can be read is its end.
            end = wire::read::<FromPredecessor>(&mut self.stream) => Some(end.err()),
        };
        let gone = match lost {
            Some(error) => {
                tracing::warn!(predecessor = self.pid, ?error, "the predecessor is lost; serving alone");
                true
            }
            None => self.ready().await?,
        };
        if gone {
            tunnel.set_alone();
        } else {
            tunnel.set_reads(true);
            tracing::info!(predecessor = self.pid, "taken over; the predecessor finishes what it carries");
        }
        Ok(Attendant { stream: (!gone).then_some(self.stream), pid: self.pid })
    }

    /// Says that it is ready. Returns whether the predecessor is gone.
    async fn ready(&mut self) -> Result<bool, TakeOverError> {
        let told = async {
            wire::write(&mut self.stream, &FromSuccessor::Ready { shares_tunnel: self.shares_tunnel }).await?;
            wire::read(&mut self.stream).await
        };
        match time::timeout(PROMPT, told).await {
            Ok(Ok(FromPredecessor::Go)) => Ok(false),
            Ok(Ok(FromPredecessor::Refused { why })) => {
                Err(TakeOverError::Refused { socket: self.socket.clone(), why })
            }
            Ok(Ok(FromPredecessor::Offer { .. })) => {
                Err(TakeOverError::Broken { socket: self.socket.clone(), source: io::ErrorKind::InvalidData.into() })
            }
            Ok(Err(error)) => {
                tracing::warn!(predecessor = self.pid, %error, "the predecessor is lost; serving alone");
                Ok(true)
            }
            Err(_) => Err(TakeOverError::Silent { pid: self.pid }),
        }
    }
}

/// Stays in touch with a predecessor that finishes.
#[derive(Debug)]
pub(crate) struct Attendant {
    stream: Option<UnixStream>,
    pid: u32,
}

impl Attendant {
    /// Until the predecessor has ended.
    pub(crate) async fn attend(self, tunnel: Arc<SharedSocket>, steps: Steps) {
        let Some(mut stream) = self.stream else { return steps.alone.cancel() };
        let (mut read, mut write) = stream.split();
        let tell = async {
            steps.following.cancelled().await;
            // If it is gone, the other half says so.
            drop(time::timeout(PROMPT, wire::write(&mut write, &FromSuccessor::Following)).await);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = tell => {}
            // It has nothing more to say: this is its end.
            _ = wire::read::<FromPredecessor>(&mut read) => {}
        }
        tracing::info!(predecessor = self.pid, "the predecessor has ended");
        tunnel.set_alone();
        steps.alone.cancel();
    }
}
