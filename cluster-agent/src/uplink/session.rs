//! One session with the control plane: publications and status up, the federation's state down.
//!
//! What holds: nothing is published before the source was read whole; one publication is under way at a time, sent whole;
//! a delta that does not fit ends the session, and the next one asks for a snapshot; status is sent when it changed, at
//! most five times a second.

use std::time::Duration;

use bytes::Bytes;
use isthmus_api::{
    convert::{self, ConsumerKind, ConsumerStatus, ConvertError, Problem},
    proto::{
        common::v1 as common,
        federation::v1::{
            AgentMessage, ControlMessage, ExportCondition, Hello, Piece, PieceOf, Publish, agent_message,
            control_message,
        },
    },
};
use isthmus_model::{
    global::{GlobalDelta, GlobalSnapshot},
    service::Publication,
};
use prost::Message;
use tokio::{
    sync::mpsc,
    time::{Instant, interval, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    Accept, Uplink,
    control::{CALL_DEADLINE, MAX_MESSAGE, words},
};
use crate::status::{Area, problem};

/// Status at most this often.
const STATUS_PAUSE: Duration = Duration::from_millis(200);
/// And at least this often, so that the control plane sees that we live.
const STATUS_IDLE: Duration = Duration::from_secs(10);
/// A committed answer to a publication; a control plane without a quorum does not give one.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(15);
/// Conditions of exports that are shown; the rest is seen at the control plane.
const MAX_CONDITIONS: usize = 100;
/// A refused publication is offered again after this, in case the refusal's cause went away.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

fn decoded<M: Message + Default, T: TryFrom<M, Error = ConvertError>>(
    what: &'static str,
    bytes: Bytes,
) -> Result<T, Ended> {
    let message = M::decode(bytes).map_err(|error| ConvertError::new("", error.to_string()));
    message.and_then(T::try_from).map_err(|source| Ended::Invalid { what, source })
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// The agent goes down.
    #[error("the agent is going down")]
    Shutdown,
    /// The control plane ended it, or the connection broke.
    #[error("{}", words(_0))]
    Closed(Status),
    /// The control plane ended it in order.
    #[error("the control plane ended the session")]
    Finished,
    /// A publication was not answered.
    #[error("the control plane did not commit a publication within {PUBLISH_DEADLINE:?} (has it a quorum?)")]
    Unanswered,
    /// It sent something that is not valid.
    #[error("the control plane sent an invalid {what}")]
    Invalid {
        /// Which message.
        what: &'static str,
        /// Why.
        source: convert::ConvertError,
    },
    /// A delta that does not start at what is held.
    #[error("a delta does not fit what is held; asking for a snapshot")]
    Gap,
}

struct Session<'a> {
    uplink: &'a mut Uplink,
    up: mpsc::Sender<AgentMessage>,
    sequence: u64,
    publishing: Publishing,
    /// When something is to be done about `publishing`.
    due: Option<Instant>,
    pieces: Pieces,
}

#[derive(Debug, PartialEq)]
enum Publishing {
    /// The latest intent is not with the control plane yet.
    Due,
    /// It is on its way.
    Sent,
    /// The control plane has it, or nothing can be said yet.
    Settled,
}

/// Runs one session until it ends.
pub(super) async fn run(uplink: &mut Uplink) -> Ended {
    let (up, messages) = mpsc::channel(8);
    let held = uplink.held();
    let hello = Hello {
        cluster: uplink.own.to_string(),
        held: held.map(|s| s.stamp.into()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        held_digest: held.map(|s| convert::snapshot_digest(s).to_vec()).unwrap_or_default(),
    };
    if up.send(AgentMessage { kind: Some(agent_message::Kind::Hello(hello)) }).await.is_err() {
        return Ended::Finished;
    }
    let mut client = uplink.control.client();
    let call = timeout(CALL_DEADLINE, client.session(ReceiverStream::new(messages)));
    let answer = tokio::select! {
        () = uplink.shutdown.requested() => return Ended::Shutdown,
        answer = call => answer,
    };
    let down = match answer {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Ended::Closed(status),
        Err(_) => return Ended::Closed(Status::deadline_exceeded("no answer in time")),
    };
    tracing::info!(control_plane = %uplink.control.address(), "session with the control plane begins");
    uplink.metrics.uplink_connected.set(1);
    let session =
        Session { uplink, up, sequence: 0, publishing: Publishing::Due, due: None, pieces: Pieces::default() };
    session.run(down).await
}

impl Session<'_> {
    async fn run(mut self, mut down: tonic::Streaming<ControlMessage>) -> Ended {
        let mut board = self.uplink.status.changes();
        let mut view = self.uplink.hub.view.clone();
        let mut intent = self.uplink.hub.intent.clone();
        let mut tick = interval(STATUS_PAUSE);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        board.mark_changed();
        let mut said = Instant::now();
        let shutdown = self.uplink.shutdown.clone();
        loop {
            if self.publishing == Publishing::Due
                && let Err(ended) = self.publish().await
            {
                return ended;
            }
            // Receiving is cancel-safe in all branches.
            tokio::select! {
                () = shutdown.requested() => return Ended::Shutdown,
                message = down.message() => match message {
                    Ok(Some(message)) => {
                        if let Err(ended) = self.take(message).await {
                            return ended;
                        }
                    }
                    Ok(None) => return Ended::Finished,
                    Err(status) => return Ended::Closed(status),
                },
                changed = intent.changed() => {
                    if changed.is_err() {
                        return Ended::Shutdown;
                    }
                    // While one is under way, its answer finds that there is a later one.
                    if self.publishing != Publishing::Sent {
                        self.publishing = Publishing::Due;
                    }
                }
                () = until(self.due) => match self.publishing {
                    Publishing::Sent => return Ended::Unanswered,
                    _ => {
                        self.due = None;
                        self.publishing = Publishing::Due;
                    }
                },
                _ = tick.tick() => {
                    let changed = board.has_changed().unwrap_or(false) || view.has_changed().unwrap_or(false);
                    if changed || said.elapsed() >= STATUS_IDLE {
                        board.mark_unchanged();
                        view.mark_unchanged();
                        said = Instant::now();
                        let status = self.status();
                        if let Err(ended) = self.send(agent_message::Kind::Status(status)).await {
                            return ended;
                        }
                    }
                }
            }
        }
    }

    async fn publish(&mut self) -> Result<(), Ended> {
        let Some(intent) = self.uplink.hub.intent.borrow().clone() else {
            self.publishing = Publishing::Settled;
            return Ok(());
        };
        let publication = Publication {
            exports: intent.exports.clone(),
            gateways: intent.gateways.clone(),
            bundle: self.uplink.ca.bundle(),
        };
        self.sequence += 1;
        self.uplink.published = Some(intent);
        let publish = Publish {
            sequence: self.sequence,
            publication: Some((&publication).into()),
            incarnation: self.uplink.incarnation.to_vec(),
        };
        self.send(agent_message::Kind::Publish(publish)).await?;
        self.publishing = Publishing::Sent;
        self.due = Some(Instant::now() + PUBLISH_DEADLINE);
        Ok(())
    }

    async fn take(&mut self, message: ControlMessage) -> Result<(), Ended> {
        let kind = match message.kind {
            Some(control_message::Kind::Piece(piece)) => match self.pieces.add(piece)? {
                Some(whole) => Some(whole),
                None => return Ok(()),
            },
            kind => kind,
        };
        match kind {
            Some(control_message::Kind::Snapshot(snapshot)) => {
                let snapshot: GlobalSnapshot = decoded::<common::GlobalSnapshot, _>("snapshot", snapshot)?;
                self.uplink.accept(snapshot).await;
            }
            Some(control_message::Kind::Delta(delta)) => {
                let delta: GlobalDelta = decoded::<common::GlobalDelta, _>("delta", delta)?;
                let Some(held) = self.uplink.held() else {
                    self.uplink.resync = true;
                    return Err(Ended::Gap);
                };
                let mut next = held.clone();
                if next.apply(delta).is_err() || self.uplink.accept(next).await == Accept::Refused {
                    self.uplink.resync = true;
                    return Err(Ended::Gap);
                }
            }
            Some(control_message::Kind::Published(published)) if published.sequence == self.sequence => {
                self.uplink.metrics.published(true);
                self.uplink.status.set_problems(Area::Uplink, Vec::new());
                self.settle(None);
            }
            Some(control_message::Kind::Refused(refused)) if refused.sequence == self.sequence => {
                self.uplink.metrics.published(false);
                tracing::warn!(reason = %refused.reason, "the control plane refused what this cluster publishes");
                let message = format!(
                    "the control plane refused it whole, so the federation keeps the one before: {}",
                    refused.reason
                );
                self.uplink.status.set_problems(Area::Uplink, vec![problem("publication", message)]);
                self.settle(Some(Instant::now() + REFUSED_PAUSE));
            }
            Some(control_message::Kind::Nodes(nodes)) => {
                let control = self.uplink.control.clone();
                let learn = tokio::task::spawn_blocking(move || control.learn(&nodes.addresses));
                if let Err(error) = learn.await {
                    tracing::error!(%error, "the control plane's nodes were not remembered");
                }
            }
            Some(control_message::Kind::Conditions(told)) => {
                let conditions = told.conditions.into_iter().take(MAX_CONDITIONS);
                self.uplink.status.set_problems(Area::Exports, conditions.map(condition).collect());
            }
            // An answer to an older publication, or a message that a newer version knows.
            Some(
                control_message::Kind::Published(_)
                | control_message::Kind::Refused(_)
                | control_message::Kind::Piece(_),
            )
            | None => {}
        }
        Ok(())
    }

    fn settle(&mut self, again: Option<Instant>) {
        let latest = self.uplink.hub.intent.borrow().clone();
        let behind = latest != self.uplink.published;
        self.publishing = if behind { Publishing::Due } else { Publishing::Settled };
        self.due = again;
    }

    fn status(&self) -> isthmus_api::proto::federation::v1::Status {
        let standing = self.uplink.status.standing();
        let view = self.uplink.hub.view.borrow().clone();
        let reports = view.observations.reports();
        let agent = ConsumerStatus {
            kind: ConsumerKind::Agent,
            name: "agent".to_owned(),
            applied: self.uplink.held().map(|s| s.stamp),
            connected: true,
            problems: Vec::new(),
        };
        let status = convert::Status {
            consumers: std::iter::once(agent).chain(standing.consumers).take(convert::limits::STATUS).collect(),
            availability: reports.collect(),
            problems: standing.problems,
            tunnels: standing.tunnels.into_iter().take(convert::limits::TUNNELS).collect(),
        };
        (&status).into()
    }

    async fn send(&self, kind: agent_message::Kind) -> Result<(), Ended> {
        match timeout(CALL_DEADLINE, self.up.send(AgentMessage { kind: Some(kind) })).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Ended::Finished),
            Err(_) => Err(Ended::Closed(Status::deadline_exceeded("the control plane does not read"))),
        }
    }
}

/// An update that comes in pieces, as far as it has come.
#[derive(Default)]
struct Pieces(Vec<u8>);

impl Pieces {
    /// The whole, with its last piece.
    fn add(&mut self, piece: Piece) -> Result<Option<control_message::Kind>, Ended> {
        let invalid = |message: String| Ended::Invalid { what: "piece", source: ConvertError::new("", message) };
        if self.0.len() + piece.bytes.len() > MAX_MESSAGE {
            return Err(invalid(format!("all pieces together are over {MAX_MESSAGE} bytes")));
        }
        self.0.extend_from_slice(&piece.bytes);
        if !piece.last {
            return Ok(None);
        }
        let whole = Bytes::from(std::mem::take(&mut self.0));
        match piece.of() {
            PieceOf::Snapshot => Ok(Some(control_message::Kind::Snapshot(whole))),
            PieceOf::Delta => Ok(Some(control_message::Kind::Delta(whole))),
            PieceOf::Unspecified => Err(invalid("it is neither of a snapshot nor of a delta".to_owned())),
        }
    }
}

fn condition(told: ExportCondition) -> Problem {
    let at = match told.service {
        Some(service) => format!("ServiceExport {}/{}", service.namespace, service.name),
        None => "publication".to_owned(),
    };
    problem(
        at,
        format!("{}: {}", told.reason, told.message).chars().take(convert::limits::TEXT_BYTES).collect::<String>(),
    )
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The wire form of a state, for the disk.
pub(super) fn encode(snapshot: &GlobalSnapshot) -> Vec<u8> {
    prost::Message::encode_to_vec(&common::GlobalSnapshot::from(snapshot))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(bytes: &'static [u8], of: PieceOf, last: bool) -> Piece {
        Piece { bytes: Bytes::from_static(bytes), of: of.into(), last }
    }

    #[test]
    fn pieces_become_what_they_are_of_and_the_next_ones_begin_anew() {
        let mut pieces = Pieces::default();
        assert!(pieces.add(piece(b"ab", PieceOf::Snapshot, false)).unwrap().is_none());
        let whole = pieces.add(piece(b"c", PieceOf::Snapshot, true)).unwrap().unwrap();
        assert_eq!(whole, control_message::Kind::Snapshot(Bytes::from_static(b"abc")));
        let whole = pieces.add(piece(b"d", PieceOf::Delta, true)).unwrap().unwrap();
        assert_eq!(whole, control_message::Kind::Delta(Bytes::from_static(b"d")));
    }

    #[test]
    fn pieces_without_end_and_of_nothing_are_refused() {
        let mut pieces = Pieces(vec![0; MAX_MESSAGE]);
        let error = pieces.add(piece(b"x", PieceOf::Delta, false)).unwrap_err();
        assert!(matches!(error, Ended::Invalid { what: "piece", .. }));
        let error = Pieces::default().add(piece(b"x", PieceOf::Unspecified, true)).unwrap_err();
        assert!(matches!(error, Ended::Invalid { .. }));
    }
}
