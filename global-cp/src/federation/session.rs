//! One agent's session: publications and status come up, the global state goes down.
//!
//! The session is a stream that the transport polls whenever the agent can take more. So a slow agent is never queued
//! for: when it has room again it gets one delta from what it holds to what is then the latest. At most one publication
//! is under way; nothing more is read meanwhile. Revocation and shutdown end the stream at once, whatever it waits for.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{
    FutureExt, StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use isthmus_api::{
    convert::{self, ConvertError, Problem},
    proto::federation::v1::{
        self as wire, AgentMessage, ControlMessage, Hello, Nodes, Piece, PieceOf, Publish, Published, Refused,
        agent_message, control_message,
    },
};
use isthmus_model::{
    ids::{ClusterName, Stamp},
    service::Publication,
    time::Timestamp,
};
use isthmus_runtime::tasks::Shutdown;
use prost::Message as _;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tonic::{Status, Streaming};

use super::{
    Shared,
    refusal::{status_of, status_of_proposal},
};
use crate::{
    metrics::SessionCount,
    raft::ProposeError,
    state::{
        Actor, Command, Content, Digest, ExportCondition, Held, Incarnation, Publish as PublishCommand, Update, View,
        require_active,
    },
    status::SessionGuard,
};

/// How long an agent may take to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// How long a publication of a cluster that publishes too often may wait.
const LONGEST_TURN: Duration = Duration::from_secs(5);
/// Of a longer update so much at a time: what one connection has in its buffers is copied there, for each agent.
const PIECE: usize = 32 << 10;
/// Between two updates of an agent: much longer than a lone one takes, much shorter than anybody waits for one. While changes
/// come one after the other, what a thousand agents are sent is gathered meanwhile.
const PAUSE: Duration = Duration::from_millis(20);
/// And longer after a long one, by a second for so many bytes.
const BYTES_PER_SECOND: f64 = 8e6;
/// But no longer than this.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// What an operator is told when histories have parted.
const NEW_EPOCH: &str = "start it once with `isthmus-global-cp --config FILE --new-epoch`";

type Answer = Result<ControlMessage, Status>;

/// Whose session it is, as its certificate says.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) cluster: ClusterName,
    pub(super) by: Actor,
}

/// The stream of a session for `caller`.
pub(super) fn open(
    shared: Arc<Shared>,
    caller: Caller,
    inbound: Streaming<AgentMessage>,
) -> BoxStream<'static, Answer> {
    let start = Step::Hello { shared, caller, inbound: Box::new(inbound) };
    stream::unfold(start, |step| async {
        let session = match step {
            Step::Hello { shared, caller, inbound } => Session::begin(shared, caller, inbound).await.map(Box::new),
            Step::Open(session) => Ok(session),
            Step::Over => return None,
        };
        let mut session = match session {
            Ok(session) => session,
            Err(status) => return Some((Err(status), Step::Over)),
        };
        match session.next().await {
            Ok(Some(message)) => Some((Ok(message), Step::Open(session))),
            Ok(None) => None,
            Err(status) => {
                tracing::info!(cluster = %session.cluster, reason = status.message(), "session ends");
                Some((Err(status), Step::Over))
            }
        }
    })
    .boxed()
}

enum Step {
    Hello { shared: Arc<Shared>, caller: Caller, inbound: Box<Streaming<AgentMessage>> },
    Open(Box<Session>),
    Over,
}

struct Session {
    shared: Arc<Shared>,
    cluster: ClusterName,
    by: Actor,
    inbound: Box<Streaming<AgentMessage>>,
    views: watch::Receiver<View>,
    shutdown: Shutdown,
    /// What the agent holds once it has received all that was sent.
    held: Option<Held>,
    /// The rest of an update that goes out in pieces.
    rest: Option<(PieceOf, Bytes)>,
    /// No update goes out before.
    rested: Instant,
    /// Where the agent knows that nodes are.
    nodes: Vec<String>,
    /// What the agent knows to be the matter with its exports.
    conditions: Vec<ExportCondition>,
    /// Of the last publication; they grow.
    sequence: u64,
    /// The publication under way.
    publishing: Option<BoxFuture<'static, Answer>>,
    guard: SessionGuard,
    _count: SessionCount,
}

impl Session {
    /// Waits for the hello and checks it.
    async fn begin(
        shared: Arc<Shared>,
        Caller { cluster, by }: Caller,
        mut inbound: Box<Streaming<AgentMessage>>,
    ) -> Result<Self, Status> {
        let shutdown = shared.shutdown.clone();
        let first = tokio::select! {
            first = timeout(HELLO_DEADLINE, inbound.next()) => first,
            () = shutdown.requested() => return Err(stopping()),
        };
        let first = first.map_err(|_| Status::deadline_exceeded("no hello came; it must be the first message"))?;
        let hello = match first.transpose()?.and_then(|message| message.kind) {
            Some(agent_message::Kind::Hello(hello)) => hello,
            _ => return Err(Status::invalid_argument("the first message of a session must be a hello")),
        };
        let held = check_hello(&hello, &cluster)?;
        shared.catch_up(held.map(|held| held.stamp)).await;
        let guard = shared
            .status
            .connect(&cluster, Timestamp(isthmus_runtime::now()))
            .map_err(|error| Status::resource_exhausted(error.to_string()))?;
        let version: String = hello.version.chars().take(64).collect();
        tracing::info!(%cluster, %version, held = ?held.map(|held| held.stamp.to_string()), "session begins");
        Ok(Self {
            views: shared.views.clone(),
            _count: shared.metrics.session(),
            shared,
            cluster,
            by,
            inbound,
            shutdown,
            held,
            rest: None,
            rested: Instant::now(),
            nodes: Vec::new(),
            conditions: Vec::new(),
            sequence: 0,
            publishing: None,
            guard,
        })
    }

    /// The next message for the agent; `None` when the agent has ended the session.
    async fn next(&mut self) -> Result<Option<ControlMessage>, Status> {
        loop {
            self.check_membership()?;
            if let Some(piece) = self.piece() {
                return Ok(Some(piece));
            }
            let rested = Instant::now() >= self.rested;
            if rested && let Some(update) = self.update()? {
                self.rested = Instant::now() + pause(update.encoded_len());
                return Ok(Some(self.cut(update)));
            }
            if let Some(nodes) = self.moved() {
                return Ok(Some(nodes));
            }
            if let Some(conditions) = self.judged() {
                return Ok(Some(conditions));
            }
            let idle = self.publishing.is_none();
            let publishing = async {
                match &mut self.publishing {
                    Some(publication) => publication.await,
                    None => std::future::pending().await,
                }
            };
            // All may be dropped and asked again: some only look, a stream's `next` keeps its place in the stream,
            // and the publication's future lives in `self`.
            tokio::select! {
                () = self.shutdown.requested() => return Err(stopping()),
                // Also while it rests: a revocation does not wait.
                changed = self.views.changed() => changed.map_err(|_| stopping())?,
                () = sleep_until(self.rested), if !rested => {}
                answer = publishing => {
                    self.publishing = None;
                    return answer.map(Some);
                }
                message = self.inbound.next(), if idle => match message.transpose()? {
                    Some(message) => self.receive(message)?,
                    None => return Ok(None),
                },
            }
        }
    }

    /// Ends the session of a cluster that is no longer active.
    fn check_membership(&mut self) -> Result<(), Status> {
        let latest = self.views.borrow_and_update();
        let Some(global) = latest.global() else { return Ok(()) };
        require_active(global, &self.cluster).map_err(|rejection| status_of(&rejection))
    }

    /// What the agent lacks, if it lacks anything.
    fn update(&mut self) -> Result<Option<ControlMessage>, Status> {
        let view = {
            let latest = self.views.borrow_and_update();
            let Some(global) = latest.global() else { return Ok(None) };
            if self.held.is_some_and(|held| held.content == Content::Known && held.stamp == global.stamp) {
                return Ok(None);
            }
            // A digest may have to be made of it, and nobody should wait meanwhile.
            latest.clone()
        };
        let known = self.held.filter(|held| held.content == Content::Known).map(|held| held.stamp);
        let to = view.state().stamp();
        if let Some(delta) = known.and_then(|from| self.shared.encoded.made(from, to)) {
            view.remember();
            self.held = Some(Held { stamp: to, content: Content::Known });
            return Ok(Some(ControlMessage { kind: Some(control_message::Kind::Delta(delta)) }));
        }
        let update = view.since(self.held);
        let (stamp, kind) = match update {
            Update::UpToDate | Update::NotFounded => return Ok(None),
            Update::Snapshot(snapshot) => {
                (snapshot.stamp, control_message::Kind::Snapshot(self.shared.encoded.snapshot(&snapshot)))
            }
            Update::Delta(delta) => (delta.to, control_message::Kind::Delta(self.shared.encoded.delta(&delta))),
            Update::Ahead { here } => {
                let held = self.held.map(|held| held.stamp).unwrap_or_default();
                tracing::error!(cluster = %self.cluster, %held, %here, "an agent holds a later state than this node");
                return Err(Status::unavailable(format!(
                    "the agent holds state {held}, this control plane node only {here}: the node is behind, or its \
                     state was lost or restored from a backup; if it was, {NEW_EPOCH}, and again until its epoch is \
                     past {}",
                    held.epoch.0
                )));
            }
            Update::Diverged => {
                let here = view.state().stamp();
                tracing::error!(cluster = %self.cluster, %here, "an agent holds another state under the same stamp");
                return Err(Status::unavailable(format!(
                    "the agent holds another state {here} than this control plane node, whose state must have been \
                     restored from a backup: {NEW_EPOCH}"
                )));
            }
        };
        view.remember();
        self.held = Some(Held { stamp, content: Content::Known });
        Ok(Some(ControlMessage { kind: Some(kind) }))
    }

    /// The update, or, if it is long, its first piece.
    fn cut(&mut self, update: ControlMessage) -> ControlMessage {
        self.rest = match &update.kind {
            Some(control_message::Kind::Snapshot(bytes)) => Some((PieceOf::Snapshot, bytes.clone())),
            Some(control_message::Kind::Delta(bytes)) => Some((PieceOf::Delta, bytes.clone())),
            _ => None,
        };
        self.rest = self.rest.take().filter(|(_, bytes)| bytes.len() > PIECE);
        self.piece().unwrap_or(update)
    }

    fn piece(&mut self) -> Option<ControlMessage> {
        let (of, mut bytes) = self.rest.take()?;
        let piece = bytes.split_to(bytes.len().min(PIECE));
        let last = bytes.is_empty();
        if !last {
            self.rest = Some((of, bytes));
        }
        let piece = Piece { bytes: piece, of: of.into(), last };
        Some(ControlMessage { kind: Some(control_message::Kind::Piece(piece)) })
    }

    /// Where the control plane's nodes are, if the agent does not know it.
    fn moved(&mut self) -> Option<ControlMessage> {
        let addresses: Vec<String> =
            self.views.borrow().state().nodes().values().map(|node| node.address.clone()).collect();
        if addresses == self.nodes {
            return None;
        }
        self.nodes.clone_from(&addresses);
        Some(ControlMessage { kind: Some(control_message::Kind::Nodes(Nodes { addresses })) })
    }

    /// What is the matter with the cluster's exports, if the agent does not know it.
    fn judged(&mut self) -> Option<ControlMessage> {
        let conditions = self.views.borrow().state().conditions(&self.cluster);
        if conditions == self.conditions {
            return None;
        }
        self.conditions.clone_from(&conditions);
        let condition = |condition: ExportCondition| wire::ExportCondition {
            service: condition.service.map(Into::into),
            reason: condition.reason.label().to_owned(),
            message: condition.message,
        };
        let conditions = wire::ExportConditions { conditions: conditions.into_iter().map(condition).collect() };
        Some(ControlMessage { kind: Some(control_message::Kind::Conditions(conditions)) })
    }

    fn receive(&mut self, message: AgentMessage) -> Result<(), Status> {
        self.guard.seen(Timestamp(isthmus_runtime::now()));
        match message.kind {
            Some(agent_message::Kind::Publish(publish)) => {
                if publish.sequence <= self.sequence {
                    return Err(Status::invalid_argument(format!(
                        "publication {} follows {}; sequence numbers must grow",
                        publish.sequence, self.sequence
                    )));
                }
                self.sequence = publish.sequence;
                self.publishing =
                    Some(self.shared.clone().publish(self.cluster.clone(), self.by.clone(), publish).boxed());
                Ok(())
            }
            Some(agent_message::Kind::Status(status)) => {
                self.guard.report(convert::Status::try_from(status).unwrap_or_else(|error| self.unreadable(&error)));
                Ok(())
            }
            Some(agent_message::Kind::Hello(_)) => Err(Status::invalid_argument("a session has one hello")),
            // A kind that this version does not know.
            None => Ok(()),
        }
    }

    /// A report that does not parse must not end the session, which carries what matters; a person should see it.
    fn unreadable(&self, error: &ConvertError) -> convert::Status {
        tracing::warn!(cluster = %self.cluster, %error, "an agent's status report does not parse");
        let problem = Problem {
            at: "status report".to_owned(),
            field: error.field.clone(),
            message: format!("the agent's report was not understood: {}", error.message),
        };
        convert::Status { problems: vec![problem], ..convert::Status::default() }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        tracing::info!(cluster = %self.cluster, "session ended");
    }
}

impl Shared {
    /// Commits what a cluster says of itself. An error ends the session; a refusal does not.
    async fn publish(self: Arc<Self>, cluster: ClusterName, by: Actor, publish: Publish) -> Answer {
        let sequence = publish.sequence;
        // Of versions that know of none it is empty; of another length it is nobody's.
        let incarnation = <[u8; 16]>::try_from(publish.incarnation.as_slice()).ok().map(Incarnation);
        let refused = |code, reason: String| {
            self.metrics.publication(code);
            tracing::warn!(%cluster, sequence, %reason, "publication refused");
            Ok(control_message::Kind::Refused(Refused { sequence, reason }))
        };
        let published = |code, stamp: Stamp| {
            self.metrics.publication(code);
            Ok(control_message::Kind::Published(Published { sequence, stamp: Some(stamp.into()) }))
        };
        let parsed = publish
            .publication
            .ok_or_else(|| ConvertError::new("publication", "is missing"))
            .and_then(|publication| Publication::try_from(publication).map_err(|error| error.within("publication")));
        let kind = match parsed {
            Err(error) => refused("malformed", error.to_string()),
            Ok(publication) => match self.unchanged(&cluster, &publication, incarnation) {
                Some(stamp) => published("unchanged", stamp),
                None => match self.turn(&cluster).await {
                    Err(reason) => refused("throttled", reason),
                    Ok(()) => {
                        let now = Timestamp(isthmus_runtime::now());
                        let command = PublishCommand { cluster: cluster.clone(), publication, incarnation, now };
                        match self.proposer.by(by).propose(Command::Publish(command)).await {
                            Ok(outcome) => {
                                tracing::info!(%cluster, sequence, stamp = %outcome.stamp, "publication committed");
                                published("committed", outcome.stamp)
                            }
                            Err(ProposeError::Rejected(rejection)) => refused(rejection.code(), rejection.to_string()),
                            Err(error) => {
                                self.metrics.publication("failed");
                                tracing::warn!(%cluster, sequence, %error, "publication not committed");
                                Err(status_of_proposal(&error))
                            }
                        }
                    }
                },
            },
        };
        kind.map(|kind| ControlMessage { kind: Some(kind) })
    }

    /// Waits until the cluster may publish again. A session reads nothing meanwhile, so whoever floods waits for itself; only
    /// with several sessions, or new ones all the time, it gets so far ahead that it is refused.
    async fn turn(&self, cluster: &ClusterName) -> Result<(), String> {
        match self.publications.reserve(cluster, LONGEST_TURN, std::time::Instant::now()) {
            Ok(due) => {
                if !due.is_zero() {
                    self.metrics.publication("delayed");
                    tokio::time::sleep(due).await;
                }
                Ok(())
            }
            Err(due) => Err(format!(
                "cluster {cluster} publishes too often: {:.0} s of its publications wait already. What it last published \
                 stands; publish again later, and less often. `publications` in the control plane's configuration sets the \
                 limit",
                due.as_secs_f64()
            )),
        }
    }

    /// Where the state stands, if this publication would not move it.
    fn unchanged(
        &self,
        cluster: &ClusterName,
        publication: &Publication,
        incarnation: Option<Incarnation>,
    ) -> Option<Stamp> {
        let view = self.views.borrow();
        view.state().already_published(cluster, publication, incarnation).then(|| view.state().stamp())
    }
}

impl Shared {
    /// An agent that comes from another node may hold more than this one has applied yet.
    async fn catch_up(&self, held: Option<Stamp>) {
        let ahead = held.is_some_and(|held| held > self.views.borrow().state().stamp());
        if ahead && let Err(error) = self.group.barrier().await {
            tracing::warn!(%error, "an agent holds a later state than this node, which cannot catch up now");
        }
    }
}

/// The certificate decides; a hello that says otherwise is a misconfiguration worth telling.
fn check_hello(hello: &Hello, cluster: &ClusterName) -> Result<Option<Held>, Status> {
    if hello.cluster != cluster.as_str() {
        let said: String = hello.cluster.chars().take(64).collect();
        return Err(Status::permission_denied(format!(
            "the hello says cluster {said:?}, but the certificate is that of cluster {cluster}"
        )));
    }
    let held = hello.held.map(Stamp::try_from).transpose();
    let stamp = held.map_err(|error| error.within("hello.held"))?;
    // Another version may write the same state in other bytes.
    let comparable = hello.version == env!("CARGO_PKG_VERSION");
    let digest = Digest::try_from(hello.held_digest.as_slice()).ok().filter(|_| comparable);
    Ok(stamp.map(|stamp| Held { stamp, content: digest.map_or(Content::Unknown, Content::Digest) }))
}

/// After an update of this length.
fn pause(bytes: usize) -> Duration {
    (PAUSE + Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND)).min(LONGEST_PAUSE)
}

fn stopping() -> Status {
    Status::unavailable("this control plane node is stopping; connect again")
}
