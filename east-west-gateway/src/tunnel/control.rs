//! The control stream of one tunnel: probes both ways, the acceptor's availability, and the word that one drains.
//!
//! The first bidirectional stream of a connection, opened by the dialler; a hello each way comes first. Both sides probe,
//! so that each notices the other's death within `deadAfter`. The acceptor tells what its cluster can serve, since it is
//! the one that would serve; the dialler only listens. Ends when the connection does, for the reason it returns.

use std::{sync::Arc, time::Instant};

use isthmus_api::{
    convert::own_availability,
    proto::tunnel::v1::{ControlFrame, ControlHello, Goaway, Ping, control_frame::Kind},
};
use isthmus_model::ids::{ServiceName, check_label};
use quinn::{Connection, SendStream};
use tokio::time;

use super::{
    Close, VERSION,
    liveness::{Action, Liveness, Rhythm},
    outbox::Outbox,
    registry::Tunnel,
};
use crate::{
    core::Core,
    frame::{self, FrameError, FrameReader, MAX_CONTROL},
};

/// Which end this is.
#[derive(Debug)]
pub(crate) enum Role {
    /// Listens to the peer's availability for this tunnel.
    Dialler(Arc<Tunnel>),
    /// Tells its own cluster's availability to the peer.
    Acceptor,
}

/// Why a control stream did not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    /// A frame could not be read or written.
    #[error("exchange control hellos")]
    Frame(#[from] FrameError),
    /// The stream broke.
    #[error("write the control hello")]
    Write(#[from] quinn::WriteError),
    /// The peer speaks something else.
    #[error("the peer's first control frame is no hello of version 1 with a gateway's name")]
    NotHello,
}

/// A control stream whose hellos are exchanged.
#[derive(Debug)]
pub(crate) struct Control {
    send: SendStream,
    reader: FrameReader,
    /// The peer's own name. Its cluster is read from its certificate.
    pub(crate) peer: String,
}

impl Control {
    /// Exchanges hellos. The caller sets the deadline.
    pub(crate) async fn open(
        mut send: SendStream,
        recv: quinn::RecvStream,
        own_name: &str,
    ) -> Result<Self, HelloError> {
        let hello = ControlHello { version: VERSION, gateway: own_name.to_owned() };
        send.write_all(&frame::encode(&ControlFrame { kind: Some(Kind::Hello(hello)) })?).await?;
        // Fails only on a closed stream, which the next write tells.
        drop(send.set_priority(1));
        let mut reader = FrameReader::new(recv, MAX_CONTROL);
        match reader.next::<ControlFrame>().await?.kind {
            Some(Kind::Hello(hello)) if hello.version == VERSION && check_label("gateway", &hello.gateway).is_ok() => {
                Ok(Self { send, reader, peer: hello.gateway })
            }
            _ => Err(HelloError::NotHello),
        }
    }

    /// Serves the stream until the connection ends or must end; closes it then.
    pub(crate) async fn run(self, core: &Core, connection: &Connection, role: &Role) {
        let rhythm = Rhythm { interval: core.config.tunnel.ping_interval, dead_after: core.config.tunnel.dead_after };
        let liveness = Liveness::new(rhythm, Instant::now());
        let mut running = Running { control: self, core, role, liveness, outbox: Outbox::default() };
        let why = tokio::select! {
            why = running.run() => why,
            _ = connection.closed() => return,
        };
        if why != Close::Drained {
            core.metrics.reject(why.label());
        }
        why.apply(connection);
    }
}

struct Running<'a> {
    control: Control,
    core: &'a Core,
    role: &'a Role,
    liveness: Liveness,
    outbox: Outbox,
}

/// What made the loop turn.
enum Event {
    Frame(Result<ControlFrame, FrameError>),
    Time,
    Table,
    Draining,
    Stop,
}

impl Running<'_> {
    async fn run(&mut self) -> Close {
        let mut table = self.core.pool.table();
        let mut told_draining = false;
        loop {
            let current = table.borrow_and_update().clone();
            let wake = match self.turn(&current).await {
                Ok(wake) => wake,
                Err(why) => return why,
            };
            let event = tokio::select! {
                frame = self.control.reader.next() => Event::Frame(frame),
                () = time::sleep_until(wake.into()) => Event::Time,
                _ = table.changed() => Event::Table,
                () = self.core.draining.cancelled(), if !told_draining => Event::Draining,
                () = self.core.stop.cancelled() => Event::Stop,
            };
            let outcome = match event {
                Event::Frame(Ok(frame)) => self.handle(frame).await,
                Event::Frame(Err(error)) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "control stream ended");
                    Err(Close::Protocol)
                }
                Event::Time | Event::Table => Ok(()),
                Event::Draining => {
                    told_draining = true;
                    let successor = self.core.steps.taken_over.is_cancelled();
                    self.send(Kind::Goaway(Goaway { successor })).await
                }
                Event::Stop => Err(Close::Drained),
            };
            if let Err(why) = outcome {
                return why;
            }
        }
    }

    /// Sends what is due and says when the next thing is.
    async fn turn(&mut self, table: &super::outbox::Table) -> Result<Instant, Close> {
        let mut wake = loop {
            match self.liveness.poll(Instant::now()) {
                Action::Ping(sequence) => self.send(Kind::Ping(Ping { sequence })).await?,
                Action::Wait(until) => break until,
                Action::Dead => return Err(Close::Dead),
            }
        };
        match self.role {
            Role::Dialler(tunnel) => tunnel.set_suspect(self.liveness.is_suspect(Instant::now())),
            Role::Acceptor => {
                let (updates, later) = self.outbox.poll(table, Instant::now());
                for update in updates {
                    self.send(Kind::Availability(update)).await?;
                }
                wake = later.map_or(wake, |later| later.min(wake));
            }
        }
        Ok(wake)
    }

    async fn handle(&mut self, frame: ControlFrame) -> Result<(), Close> {
        match (frame.kind, self.role) {
            (Some(Kind::Ping(ping)), _) => self.send(Kind::Pong(ping)).await,
            (Some(Kind::Pong(pong)), role) => {
                if let Some(rtt) = self.liveness.pong(pong.sequence, Instant::now())
                    && let Role::Dialler(tunnel) = role
                {
                    tunnel.set_rtt(rtt);
                    self.core.metrics.rtt(&tunnel.cluster, rtt);
                }
                Ok(())
            }
            (Some(Kind::Goaway(Goaway { successor: true })), Role::Dialler(tunnel)) => {
                tracing::info!(cluster = %tunnel.cluster, gateway = tunnel.gateway, "peer is succeeded");
                tunnel.succeeded.cancel();
                Ok(())
            }
            (Some(Kind::Goaway(_)), Role::Dialler(tunnel)) => {
                if tunnel.set_goaway() {
                    tracing::info!(cluster = %tunnel.cluster, gateway = tunnel.gateway, "peer drains");
                    self.core.refresh(&tunnel.cluster);
                    self.core.observed.touch();
                }
                Ok(())
            }
            (Some(Kind::Availability(update)), Role::Dialler(tunnel)) => self.heard(tunnel, update),
            // A dialler may say these, but nothing follows from them here.
            (Some(Kind::Goaway(_) | Kind::Availability(_)), Role::Acceptor) => Ok(()),
            // A newer peer's frame of a kind we do not know.
            (None, _) => Ok(()),
            (Some(Kind::Hello(_)), _) => Err(Close::Protocol),
        }
    }

    fn heard(&self, tunnel: &Tunnel, update: isthmus_api::proto::tunnel::v1::AvailabilityUpdate) -> Result<(), Close> {
        let services = update.services.into_iter().map(own_availability).collect::<Result<_, _>>();
        let removed = update.removed.into_iter().map(ServiceName::try_from).collect::<Result<Vec<_>, _>>();
        let (Ok(services), Ok(removed)) = (services, removed) else { return Err(Close::Protocol) };
        if !self.core.registry.heard(tunnel, update.snapshot, services, &removed) {
            return Err(Close::Protocol);
        }
        self.core.refresh(&tunnel.cluster);
        Ok(())
    }

    /// Control frames are small; a peer that takes none for so long is as good as dead.
    async fn send(&mut self, kind: Kind) -> Result<(), Close> {
        let frame = frame::encode(&ControlFrame { kind: Some(kind) }).map_err(|_| Close::Protocol)?;
        let written = time::timeout(self.core.config.tunnel.dead_after, self.control.send.write_all(&frame)).await;
        written.map_err(|_| Close::Dead)?.map_err(|_| Close::Protocol)
    }
}
