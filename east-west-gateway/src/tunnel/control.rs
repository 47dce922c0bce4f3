//! Runs the control stream of one link: hellos first, then the rules of [`super::session`] until the link ends.
//!
//! In: the stream, what this gateway has to say, the peer's frames. Out: what the tunnel's users see of the peer (round
//! trip, load, draining, availability of its cluster). Ends when the link does, and ends the link with the reason.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use isthmus_api::proto::tunnel::v1::{Closing, ControlFrame, ControlHello, control_frame::Kind};
use isthmus_model::ids::check_label;
use tokio::time;

use super::{
    Close, VERSION, ending,
    link::{Broken, Link, RecvHalf, SendHalf},
    liveness::GRACE,
    registry::{Origin, Tunnel},
    session::{Own, Response, Rhythm, Session, Told},
};
use crate::{
    clock,
    core::Core,
    frame::{self, FrameError, FrameReader, MAX_CONTROL},
};

/// For the last bytes of streams that have ended at the side that closes the link.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// Of [`Early`] frames; the tables of [`super::inbox::MAX_SERVICES`] services are less.
const MAX_EARLY: usize = 4 << 20;

/// Why a control stream did not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    /// A frame could not be read or written.
    #[error("exchange control hellos")]
    Frame(#[from] FrameError),
    /// The stream broke.
    #[error("write the control hello")]
    Write(#[from] Broken),
    /// The peer speaks something else.
    #[error("the peer's first control frame is no hello of version 1 with a gateway's name")]
    NotHello,
}

/// A control stream whose hellos are exchanged.
#[derive(Debug)]
pub(crate) struct Control {
    send: SendHalf,
    reader: FrameReader,
    /// The peer's own name. Its cluster is read from its certificate.
    pub(crate) peer: String,
}

impl Control {
    /// Exchanges hellos. The caller sets the deadline.
    pub(crate) async fn open(mut send: SendHalf, recv: RecvHalf, own_name: &str) -> Result<Self, HelloError> {
        let hello = ControlHello { version: VERSION, gateway: own_name.to_owned() };
        send.write_all(&frame::encode(&ControlFrame { kind: Some(Kind::Hello(hello)) })?).await?;
        send.prioritize();
        let mut reader = FrameReader::new(recv, MAX_CONTROL);
        match reader.next::<ControlFrame>().await?.kind {
            Some(Kind::Hello(hello)) if hello.version == VERSION && check_label("gateway", &hello.gateway).is_ok() => {
                Ok(Self { send, reader, peer: hello.gateway })
            }
            _ => Err(HelloError::NotHello),
        }
    }

    /// Serves the stream until the link ends or must end; closes it then.
    pub(crate) async fn run(self, core: &Core, tunnel: &Arc<Tunnel>) {
        let config = &core.config.tunnel;
        let dead_after = ending::dead_after(config, tunnel.link.transport());
        let rhythm = Rhythm { interval: config.ping_interval, dead_after };
        let session = Session::new(rhythm, clock::now());
        let mut running = Running { control: self, early: Early::default(), core, tunnel, session, heard: None };
        let ended = tokio::select! {
            ended = running.run() => Some(ended),
            () = tunnel.link.closed() => None,
        };
        match ended {
            Some(End::Because(why)) => {
                // A link that has just been closed breaks its control stream, too: that is nobody's mistake.
                if why != Close::Drained && tunnel.link.why_closed().is_none() {
                    core.metrics.reject(why.label());
                }
                tunnel.link.close(why);
            }
            Some(End::Broken) => match &tunnel.link {
                Link::Tcp(link) => {
                    link.ended("its control connection broke: the peer or the way to it is gone".to_owned())
                }
                // Without its control stream a link is of no use; if the link itself broke, that reason stands.
                Link::Quic(_) => tunnel.link.close(Close::Protocol),
            },
            Some(End::ByPeer(reason)) => {
                tunnel.link.closed_by_peer(reason);
                if let Link::Tcp(link) = tunnel.link.clone() {
                    core.tasks.spawn("tunnel.linger", async move {
                        time::sleep(LINGER).await;
                        link.end();
                    });
                }
            }
            None => {}
        }
        say_why(&mut running.control.send, &tunnel.link).await;
    }
}

/// How the conversation ended.
enum End {
    Because(Close),
    /// Without a word.
    Broken,
    ByPeer(String),
}

impl From<Close> for End {
    fn from(why: Close) -> Self {
        Self::Because(why)
    }
}

/// Frames that came while one was being written: both ends begin with all that they have to say, and would wait for each
/// other for ever if neither read meanwhile.
#[derive(Default)]
struct Early {
    frames: VecDeque<Result<ControlFrame, FrameError>>,
    bytes: usize,
}

impl Early {
    /// Nothing more is read than a peer may well have to say, nor after an error.
    fn has_room(&self) -> bool {
        self.bytes < MAX_EARLY && self.frames.back().is_none_or(Result::is_ok)
    }

    fn push(&mut self, frame: Result<ControlFrame, FrameError>) {
        self.bytes += Self::weight(&frame);
        self.frames.push_back(frame);
    }

    fn pop(&mut self) -> Option<Result<ControlFrame, FrameError>> {
        let frame = self.frames.pop_front()?;
        self.bytes -= Self::weight(&frame);
        Some(frame)
    }

    /// A frame of two bytes takes much more than that.
    fn weight(frame: &Result<ControlFrame, FrameError>) -> usize {
        size_of_val(frame) + frame.as_ref().map_or(0, prost::Message::encoded_len)
    }
}

struct Running<'a> {
    control: Control,
    early: Early,
    core: &'a Core,
    tunnel: &'a Arc<Tunnel>,
    session: Session,
    /// When the peer said something of its cluster that was not acted on yet.
    heard: Option<Instant>,
}

/// What made the loop turn.
enum Event {
    Frame(Result<ControlFrame, FrameError>),
    Time,
    Stop,
}

impl Running<'_> {
    async fn run(&mut self) -> End {
        let mut table = self.core.pool.table();
        loop {
            let current = table.borrow_and_update().clone();
            let own = Own {
                table: &current,
                draining: self.core.draining.is_cancelled() || self.tunnel.is_past(),
                succeeded: self.core.steps.taken_over.is_cancelled(),
                offers: self.tunnel.link.wishes(self.core.registry.needs_reverse(self.tunnel)),
                packets: self.tunnel.link.path().received,
            };
            let now = clock::now();
            let (frames, mut wake) = match self.session.poll(&own, now) {
                Ok(due) => due,
                Err(why) => {
                    self.tunnel.set_dead_because(self.session.evidence(now));
                    return why.into();
                }
            };
            self.tunnel.set_suspect(self.session.is_suspect(now));
            if let Some(later) = self.follow(now) {
                wake = wake.min(later);
            }
            for kind in frames {
                if let Err(why) = self.send(kind).await {
                    return why.into();
                }
            }
            let draining = own.draining;
            let event = match self.early.pop() {
                Some(frame) => Event::Frame(frame),
                None => tokio::select! {
                    frame = self.control.reader.next() => Event::Frame(frame),
                    () = time::sleep_until(wake.into()) => Event::Time,
                    _ = table.changed() => Event::Time,
                    () = self.core.draining.cancelled(), if !draining => Event::Time,
                    () = self.core.stop.cancelled() => Event::Stop,
                },
            };
            let outcome = match event {
                Event::Frame(Ok(frame)) => self.handle(frame).await,
                Event::Frame(Err(error)) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "control stream ended");
                    let broken = matches!(error, FrameError::Ended | FrameError::Broken(_));
                    Err(if broken { End::Broken } else { Close::Protocol.into() })
                }
                Event::Time => Ok(()),
                Event::Stop => Err(Close::Drained.into()),
            };
            if let Err(end) = outcome {
                return end;
            }
        }
    }

    /// Acts on what the peer has said of its cluster; or says when to.
    fn follow(&mut self, now: Instant) -> Option<Instant> {
        let due = self.core.observed.due(&self.tunnel.cluster, self.heard?);
        if let Some(later) = due.filter(|due| *due > now) {
            return Some(later);
        }
        self.heard = None;
        if due.is_some() {
            self.core.refresh(&self.tunnel.cluster);
        }
        None
    }

    async fn handle(&mut self, frame: ControlFrame) -> Result<(), End> {
        let Response { reply, told } = self.session.heard(frame, self.core.load_permille(), clock::now())?;
        if let Some(reply) = reply {
            self.send(reply).await?;
        }
        let (core, tunnel) = (self.core, self.tunnel);
        match told {
            None => {}
            Some(Told::Alive { rtt, load_permille }) => {
                tunnel.set_rtt(rtt);
                tunnel.load.store(load_permille.min(1_000_000), Ordering::Relaxed);
                core.metrics.rtt(&tunnel.cluster, rtt);
                core.metrics.path(tunnel);
                if core.config.tunnel.redundancy && tunnel.is_lossy() {
                    core.redundancy.lossy(tunnel.link.remote_address());
                }
            }
            Some(Told::Goaway { successor: true }) if matches!(tunnel.origin, Origin::Dialled(_)) => {
                tracing::info!(cluster = %tunnel.cluster, gateway = tunnel.gateway, "peer is succeeded");
                tunnel.succeeded.cancel();
            }
            // A successor has dialled us before this was said.
            Some(Told::Goaway { .. }) if tunnel.set_goaway() => {
                tracing::info!(cluster = %tunnel.cluster, gateway = tunnel.gateway, "peer drains");
                core.refresh(&tunnel.cluster);
                core.observed.touch();
            }
            Some(Told::Goaway { .. }) => {}
            Some(Told::Availability(word)) => {
                if !core.registry.heard(tunnel, word) {
                    return Err(Close::Protocol.into());
                }
                self.heard = Some(clock::now());
            }
            Some(Told::Offers(connections)) => {
                if let Link::Tcp(link) = &tunnel.link {
                    link.want(connections);
                }
            }
            Some(Told::Closing(reason)) => return Err(End::ByPeer(reason)),
        }
        Ok(())
    }

    /// Control frames are small; a peer that takes none for so long is as good as dead. While packets come from it, it has as
    /// much longer as with its pongs: behind much bulk, room for a frame is told of late.
    async fn send(&mut self, kind: Kind) -> Result<(), Close> {
        let frame = frame::encode(&ControlFrame { kind: Some(kind) }).map_err(|_| Close::Protocol)?;
        let began = clock::now();
        let (reader, early) = (&mut self.control.reader, &mut self.early);
        let mut write = pin!(self.control.send.write_all(&frame));
        for _ in 0..GRACE {
            let packets = self.tunnel.link.path().received;
            let patience = time::sleep(self.core.config.tunnel.dead_after);
            let mut patience = pin!(patience);
            loop {
                tokio::select! {
                    biased;
                    written = write.as_mut() => return written.map_err(|_| Close::Protocol),
                    frame = reader.next(), if early.has_room() => early.push(frame),
                    () = patience.as_mut() => break,
                }
            }
            if self.tunnel.link.path().received <= packets {
                break;
            }
        }
        let evidence = self.session.evidence(clock::now());
        self.tunnel
            .set_dead_because(format!("no room for a control frame for {:.1?}, {evidence}", clock::since(began)));
        Err(Close::Dead)
    }
}

/// Tells the peer why the link was closed. Over TCP the reason is the last frame; QUIC has said it already.
pub(super) async fn say_why(send: &mut SendHalf, link: &Link) {
    let Link::Tcp(link) = link else { return };
    let Some(why) = link.own_reason() else { return };
    let code = u32::try_from(why.code().into_inner()).unwrap_or_default();
    let closing = Closing { code, reason: why.label().to_owned() };
    if let Ok(frame) = frame::encode(&ControlFrame { kind: Some(Kind::Closing(closing)) }) {
        send.say_last(&frame).await;
    }
}

#[cfg(test)]
mod tests {
    use isthmus_api::proto::tunnel::v1::Ping;

    use super::*;

    #[test]
    fn what_comes_early_is_bounded_however_small_the_frames_and_nothing_is_read_after_an_error() {
        let mut early = Early::default();
        while early.has_room() {
            early.push(Ok(ControlFrame { kind: Some(Kind::Ping(Ping::default())) }));
        }
        assert!(early.frames.len() * size_of::<ControlFrame>() <= MAX_EARLY + size_of::<Event>());
        while early.pop().is_some() {}
        assert_eq!(early.bytes, 0);
        early.push(Err(FrameError::Ended));
        assert!(!early.has_room());
    }
}
