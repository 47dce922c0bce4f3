//! The side that runs: offers its sockets to a successor, and steps back when that is ready.
//!
//! Nothing changes for this gateway until the successor has said that it is ready and `Go` is written; until then the
//! successor may come and go as it likes. One successor at a time: a second one is refused. When a successor is lost after
//! `Go`, this gateway reads its UDP socket again, finishes what it carries, and offers what it still has to the next one,
//! which finds the port of the tunnel taken otherwise.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::future::{BoxFuture, FutureExt};
use tokio::{
    net::{UnixListener, UnixStream},
    time,
};

use super::{
    VERSION,
    cids::CidKey,
    path, relay,
    shelf::Role,
    socket::SharedSocket,
    wire::{self, FromPredecessor, FromSuccessor},
};
use crate::core::Core;

/// For a message that the other side sends or takes at once.
const PROMPT: Duration = Duration::from_secs(5);
/// For the successor to become ready. It is bounded only so that one that hangs does not keep others out for ever.
const WARM_UP: Duration = Duration::from_secs(120);
/// After a failed accept, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Offers this gateway's sockets until it stops.
pub(crate) async fn serve(core: Arc<Core>, tunnel: Arc<SharedSocket>) {
    let predecessor = Predecessor { core, tunnel };
    let path = path(&predecessor.core.config.state_dir);
    loop {
        let listener = match listen(&path) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(
                    socket = %path.display(), %error,
                    "no successor can take this gateway over: its upgrade will be a restart"
                );
                return;
            }
        };
        // The socket's file stays: it may be a successor's by now, and one that nobody listens on is no obstacle.
        let Some(successor) = predecessor.hand_over(&listener).await else { return };
        drop(listener);
        predecessor.attend(successor).await;
        if predecessor.core.stop.is_cancelled() {
            return;
        }
    }
}

/// Listens at `path`, in the place of whoever listened or died there before. Only this user may connect.
fn listen(path: &Path) -> io::Result<UnixListener> {
    // Made under another name, so that there is no moment at which others may connect, and none without a socket.
    let own = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
    drop(std::fs::remove_file(&own));
    let listener = UnixListener::bind(&own)?;
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&own, path)?;
    Ok(listener)
}

struct Predecessor {
    core: Arc<Core>,
    tunnel: Arc<SharedSocket>,
}

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{0}")]
    Refused(String),
    #[error("talk to the successor")]
    Broken(#[from] io::Error),
    #[error("the successor was not ready in time")]
    Late,
}

impl Predecessor {
    /// Serves one successor after the other until one has taken over. `None`: this gateway stops.
    async fn hand_over(&self, listener: &UnixListener) -> Option<UnixStream> {
        let mut under_way: Option<BoxFuture<'_, Result<UnixStream, Failed>>> = None;
        loop {
            let stream = tokio::select! {
                () = self.core.stop.cancelled() => return None,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "accept on the handover socket failed");
                        time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                ended = async { Some(under_way.as_mut()?.await) }, if under_way.is_some() => {
                    under_way = None;
                    match ended? {
                        Ok(stream) => return Some(stream),
                        Err(error) => {
                            let error = isthmus_runtime::tasks::chain(&error);
                            tracing::warn!(error, "nothing was handed over; this gateway goes on");
                            continue;
                        }
                    }
                }
            };
            let busy = match (&under_way, self.core.steps.alone.is_cancelled()) {
                (Some(_), _) => Some("another successor is taking this gateway over; wait for it, or end it"),
                (None, false) => Some(
                    "this gateway took over from a predecessor that is still finishing its connections; \
                     wait until that has ended, or end it (SIGTERM)",
                ),
                (None, true) => None,
            };
            match busy {
                Some(why) => self.core.tasks.spawn("handover.refuse", refuse(stream, why.to_owned())),
                None => under_way = Some(self.offer(stream).boxed()),
            }
        }
    }

    /// From a connection to `Go`.
    async fn offer(&self, mut stream: UnixStream) -> Result<UnixStream, Failed> {
        let asked = self.asked(&mut stream).await;
        let (pid, key) = match asked {
            Ok(asked) => asked,
            Err(Failed::Refused(why)) => {
                refuse(stream, why.clone()).await;
                return Err(Failed::Refused(why));
            }
            Err(failed) => return Err(failed),
        };
        tracing::info!(successor = pid, "a successor prepares to take over");
        let handed = self.offer_to(&mut stream, key).await;
        match handed {
            Ok(()) => {
                tracing::info!(successor = pid, "taken over; finishing what is carried");
                self.core.steps.taken_over.cancel();
                self.core.doors.cancel();
                Ok(stream)
            }
            Err(failed) => {
                self.tunnel.set_alone();
                Err(failed)
            }
        }
    }

    /// Who asks, and whether it may.
    async fn asked(&self, stream: &mut UnixStream) -> Result<(u32, CidKey), Failed> {
        let uid = stream.peer_cred()?.uid();
        if uid != rustix::process::geteuid().as_raw() {
            return Err(Failed::Refused(format!("user {uid} is not the one that this gateway runs as")));
        }
        let message = time::timeout(PROMPT, wire::read(stream)).await.map_err(|_| Failed::Late)??;
        let FromSuccessor::TakeOver { version, pid, name, cid_key } = message else {
            return Err(Failed::Refused("the first message must ask to take over".to_owned()));
        };
        if version != VERSION {
            return Err(Failed::Refused(format!(
                "it hands over by version {VERSION} of the protocol, not {version}: restart it instead"
            )));
        }
        if name != self.core.config.name {
            return Err(Failed::Refused(format!("it is {:?}, not {name:?}", self.core.config.name)));
        }
        if self.core.draining.is_cancelled() && !self.core.steps.taken_over.is_cancelled() {
            return Err(Failed::Refused("it is draining; start the new one when it has ended".to_owned()));
        }
        Ok((pid, CidKey(cid_key)))
    }

    async fn offer_to(&self, stream: &mut UnixStream, key: CidKey) -> Result<(), Failed> {
        let (relay, their_end) = relay::pair(self.core.config.tunnel.socket_buffer_bytes)?;
        self.tunnel.share(key, relay);
        let mut sockets = self.core.shelf.copies()?;
        sockets.push((Role::Tunnel, self.tunnel.descriptor()?));
        let (roles, mut descriptors): (Vec<_>, Vec<_>) = sockets.into_iter().unzip();
        descriptors.push(their_end);
        let offer = FromPredecessor::Offer { pid: std::process::id(), cid_key: self.tunnel.key().0, sockets: roles };
        let given = async {
            wire::write(stream, &offer).await?;
            wire::send_sockets(stream, &descriptors).await
        };
        time::timeout(PROMPT, given).await.map_err(|_| Failed::Late)??;
        drop(descriptors);
        let ready = time::timeout(WARM_UP, wire::read(stream)).await.map_err(|_| Failed::Late)??;
        let FromSuccessor::Ready { shares_tunnel } = ready else {
            return Err(Failed::Refused("it said something else than that it is ready".to_owned()));
        };
        // Before `Go`: from then on the successor reads, and two readers would take each other's datagrams.
        if shares_tunnel {
            self.tunnel.set_reads(false);
        } else {
            self.tunnel.set_alone();
        }
        time::timeout(PROMPT, wire::write(stream, &FromPredecessor::Go)).await.map_err(|_| Failed::Late)??;
        Ok(())
    }

    /// Stays in touch with the successor until it, or this gateway, ends.
    async fn attend(&self, mut successor: UnixStream) {
        loop {
            let message = tokio::select! {
                message = wire::read(&mut successor) => message,
                () = self.core.stop.cancelled() => return,
            };
            match message {
                Ok(FromSuccessor::Following) => self.core.steps.feed_over.cancel(),
                Ok(other) => tracing::debug!(?other, "the successor says what means nothing now"),
                Err(error) => {
                    tracing::error!(%error, "the successor is lost; this gateway only finishes what it carries");
                    return self.tunnel.set_alone();
                }
            }
        }
    }
}

async fn refuse(mut stream: UnixStream, why: String) {
    // Whoever does not take it sees the end.
    drop(time::timeout(PROMPT, wire::write(&mut stream, &FromPredecessor::Refused { why })).await);
}
