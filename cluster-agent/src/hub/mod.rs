//! The one writer of the agent's state: events come in through a bounded queue, immutable snapshots go out.
//!
//! In: [`Event`]s of the feeds and the uplink, the source's `watch`, and time. Out, as `watch`es of the latest value: the
//! [`View`] (xDS), what the feeds send, what the uplink publishes. A full queue makes its senders wait. What must
//! outlive a restart is saved behind the scenes, the latest value at most five times a second.

pub mod gateways;
pub mod reports;
pub mod state;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use isthmus_api::convert::ConsumerKind;
use isthmus_model::{local::LocalEndpoints, time::Timestamp};
use isthmus_runtime::{
    files::LastKnownGood,
    tasks::{Shutdown, Tasks},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use self::state::{Event, Intent, Members, Refusal, Session, State};
use crate::{
    source::folder::Manifests,
    status::{Area, StatusBoard, problem},
    view::View,
};

const QUEUE: usize = 1_024;
/// How long a sender waits for the queue; the hub never blocks that long unless the machine is stuck.
const PATIENCE: Duration = Duration::from_secs(5);
/// Rest between two saves.
const SAVE_PAUSE: Duration = Duration::from_millis(200);
/// A save that failed is tried again after this.
const SAVE_RETRY: Duration = Duration::from_secs(5);
/// Something is looked at again at least this often.
const IDLE: Duration = Duration::from_secs(60);

/// What the feeds to gateways and DNS servers are made of.
#[derive(Clone, Debug)]
pub struct Feeds {
    /// Everything.
    pub view: Arc<View>,
    /// Endpoints of exported Services.
    pub exported: Arc<LocalEndpoints>,
}

/// A cheap handle to the hub.
#[derive(Clone, Debug)]
pub struct Hub {
    queue: mpsc::Sender<Command>,
    sessions: Arc<AtomicU64>,
    /// For xDS.
    pub view: watch::Receiver<Arc<View>>,
    /// For the local feeds.
    pub feeds: watch::Receiver<Feeds>,
    /// For the uplink; `None` until the source was read whole.
    pub intent: watch::Receiver<Option<Arc<Intent>>>,
}

/// Why an event was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HubError {
    /// The state does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The queue stays full, or the agent is going down.
    #[error("the agent is not taking events now; try again")]
    Busy,
}

#[derive(Debug)]
struct Command {
    event: Event,
    answer: oneshot::Sender<Result<(), Refusal>>,
}

/// What [`start`] needs.
#[derive(Debug)]
pub struct Setup {
    /// What is known so far.
    pub state: State,
    /// The source.
    pub manifests: watch::Receiver<Arc<Manifests>>,
    /// Where [`Members`] are kept.
    pub disk: LastKnownGood,
    /// For problems.
    pub status: StatusBoard,
}

/// Starts the hub's tasks.
pub fn start(tasks: &Tasks, setup: Setup) -> Hub {
    let Setup { state, manifests, disk, status } = setup;
    let view = Arc::new(state.view());
    let (queue, commands) = mpsc::channel(QUEUE);
    let (feeds_out, feeds) = watch::channel(Feeds { view: view.clone(), exported: state.exported() });
    let (view_out, view) = watch::channel(view);
    let (intent_out, intent) = watch::channel(state.intent().map(Arc::new));
    let (members_out, members) = watch::channel(Arc::new(state.members().clone()));
    let writer = Writer {
        state,
        commands,
        manifests,
        status: status.clone(),
        reported: Vec::new(),
        out: Outputs { view: view_out, feeds: feeds_out, intent: intent_out, members: members_out },
    };
    let shutdown = tasks.shutdown();
    tasks.critical("hub", async move {
        writer.run(shutdown).await;
        Ok(())
    });
    let shutdown = tasks.shutdown();
    tasks.spawn("save-members", save(members, disk, status, shutdown));
    Hub { queue, sessions: Arc::default(), view, feeds, intent }
}

impl Hub {
    /// A number for a new stream; larger than all before.
    pub fn session(&self) -> Session {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    /// Hands an event over, and waits until the state has taken it.
    pub async fn send(&self, event: Event) -> Result<(), HubError> {
        let (answer, answered) = oneshot::channel();
        let exchange = async {
            self.queue.send(Command { event, answer }).await.map_err(|_| HubError::Busy)?;
            answered.await.map_err(|_| HubError::Busy)
        };
        Ok(timeout(PATIENCE, exchange).await.map_err(|_| HubError::Busy)???)
    }
}

struct Writer {
    state: State,
    commands: mpsc::Receiver<Command>,
    manifests: watch::Receiver<Arc<Manifests>>,
    status: StatusBoard,
    reported: Vec<isthmus_api::convert::Problem>,
    out: Outputs,
}

struct Outputs {
    view: watch::Sender<Arc<View>>,
    feeds: watch::Sender<Feeds>,
    intent: watch::Sender<Option<Arc<Intent>>>,
    members: watch::Sender<Arc<Members>>,
}

impl Writer {
    async fn run(mut self, shutdown: Shutdown) {
        self.report();
        loop {
            let now = now();
            let due = self.state.next_change(now).map_or(IDLE, |at| at.since(now) + Duration::from_millis(1)).min(IDLE);
            // All branches only receive, and receiving is cancel-safe.
            tokio::select! {
                () = shutdown.requested() => return,
                command = self.commands.recv() => match command {
                    Some(command) => self.take(command),
                    None => return,
                },
                changed = self.manifests.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let manifests = self.manifests.borrow_and_update().clone();
                    drop(self.state.apply(Event::Manifests(manifests), crate::hub::now()));
                }
                () = sleep(due) => {
                    self.state.tick(crate::hub::now());
                    // A hold-down that ended changes the choice, not the state: consumers must look again.
                    self.publish(Republish::Always);
                    continue;
                }
            }
            self.publish(Republish::IfChanged);
        }
    }

    /// Takes a command and whatever else waits, so that a burst makes one snapshot.
    fn take(&mut self, first: Command) {
        let mut next = Some(first);
        let mut answers = Vec::new();
        while let Some(Command { event, answer }) = next {
            answers.push((answer, self.state.apply(event, now())));
            next = if answers.len() < QUEUE { self.commands.try_recv().ok() } else { None };
        }
        // The answer means that the snapshot has it.
        self.publish(Republish::IfChanged);
        for (answer, outcome) in answers {
            // A sender that gave up does not care.
            drop(answer.send(outcome));
        }
    }

    fn publish(&mut self, republish: Republish) {
        let view = self.state.view();
        self.forget(&view);
        let exported = self.state.exported();
        if republish == Republish::Always || !same(&view, &self.out.view.borrow()) {
            self.out.view.send_replace(Arc::new(view));
        }
        let view = self.out.view.borrow().clone();
        self.out.feeds.send_if_modified(|feeds| {
            let changed = !Arc::ptr_eq(&feeds.view, &view) || !Arc::ptr_eq(&feeds.exported, &exported);
            *feeds = Feeds { view, exported };
            changed
        });
        let intent = self.state.intent();
        self.out.intent.send_if_modified(|published| {
            let changed = published.as_deref() != intent.as_ref();
            if changed {
                *published = intent.map(Arc::new);
            }
            changed
        });
        self.out.members.send_if_modified(|members| {
            let changed = **members != *self.state.members();
            if changed {
                *members = Arc::new(self.state.members().clone());
            }
            changed
        });
        self.report();
    }

    /// Takes those who are gone for good off the board.
    fn forget(&self, next: &View) {
        let last = self.out.view.borrow();
        for name in last.sidecars.keys().filter(|name| !next.sidecars.contains_key(*name)) {
            self.status.forget(ConsumerKind::Sidecar, name);
        }
        for name in last.gateways.keys().filter(|name| !next.gateways.contains_key(*name)) {
            self.status.forget(ConsumerKind::Gateway, name);
        }
    }

    fn report(&mut self) {
        let problems = self.state.problems();
        if problems != self.reported {
            for p in problems.iter().filter(|p| !self.reported.contains(p)) {
                tracing::warn!(at = %p.at, field = %p.field, "objects: {}", p.message);
            }
            self.status.set_problems(Area::Objects, problems.clone());
            self.reported = problems;
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Republish {
    IfChanged,
    Always,
}

/// Shared parts are compared by pointer: the state makes a new one only for a change.
fn same(a: &View, b: &View) -> bool {
    Arc::ptr_eq(&a.global, &b.global)
        && a.objects_known == b.objects_known
        && Arc::ptr_eq(&a.endpoints, &b.endpoints)
        && Arc::ptr_eq(&a.observations, &b.observations)
        && a.gateways == b.gateways
        && a.sidecars == b.sidecars
}

/// Saves the latest members whenever they changed.
async fn save(
    mut members: watch::Receiver<Arc<Members>>,
    disk: LastKnownGood,
    status: StatusBoard,
    shutdown: Shutdown,
) {
    let disk = Arc::new(disk);
    let mut failed = false;
    loop {
        let last = tokio::select! {
            () = shutdown.requested() => true,
            changed = members.changed() => changed.is_err(),
            () = sleep(SAVE_RETRY), if failed => false,
        };
        let latest = members.borrow_and_update().clone();
        let disk = disk.clone();
        let saved = tokio::task::spawn_blocking(move || {
            let bytes = serde_json::to_vec(&*latest).map_err(|e| e.to_string())?;
            disk.save(&bytes).map_err(|e| e.to_string())
        });
        let outcome = saved.await.unwrap_or_else(|e| Err(e.to_string()));
        if let Err(error) = &outcome {
            tracing::error!(%error, "registered gateways and sidecars cannot be saved; a restart would not know them");
        }
        failed = outcome.is_err();
        let problems = outcome.err().map(|e| problem("state folder", format!("registrations cannot be saved: {e}")));
        status.set_problems(Area::Storage, problems.into_iter().collect());
        if last {
            return;
        }
        sleep(SAVE_PAUSE).await;
    }
}

fn now() -> Timestamp {
    Timestamp(isthmus_runtime::now())
}
