//! The agent's feed: the global state and local endpoints down; applied revisions, availability and draining up.
//!
//! Reconnects for ever. Losing the agent changes nothing: the last view stands. A state that is older than the one held, of
//! another federation, or not valid is refused and reported, never half applied; one that takes a revocation back is applied
//! without that.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_api::{
    convert::{AvailabilityReport, ConvertError},
    proto::{
        common::v1::GlobalSnapshot as GlobalMessage,
        local::v1::{
            Draining, GatewayHello, GatewayMessage, GatewayUpdate, Problems, gateway_message::Kind as Up,
            gateway_update::Kind as Down, local_client::LocalClient,
        },
    },
};
use isthmus_identity::{
    enrol::{EnrolError, Member},
    svid::Svid,
};
use isthmus_model::{availability::Observations, global::GlobalSnapshot, local::LocalEndpoints};
use isthmus_runtime::{backoff::Backoff, tasks::chain};
use tokio::{
    sync::{mpsc, watch},
    time,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    disk::{self, Disk},
    refused::CallError,
};
use crate::{core::Core, metrics::Metrics, standing::Area, view::View};

/// Between two availability reports.
const REPORT_SPACING: Duration = Duration::from_millis(50);
/// Round-trip times change all the time; they go up this often.
const REPORT_REFRESH: Duration = Duration::from_secs(5);
/// Between two looks at the state on disk, once the agent feeds a successor. A revocation is to be obeyed within a second.
const REREAD_SPACING: Duration = Duration::from_millis(250);
/// Between two saves of what was observed.
const REMEMBER_SPACING: Duration = Duration::from_secs(1);
const CALL: Duration = Duration::from_secs(10);
const MAX_MESSAGE: usize = 256 << 20;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("configure TLS")]
    Configure(#[from] EnrolError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the agent ended the feed")]
    Ended,
    #[error("the agent did not answer, or took nothing, in time")]
    Timeout,
}

/// What the feed needs to know of its gateway's listeners.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    member: Member,
    state_dir: PathBuf,
    view: watch::Sender<Arc<View>>,
}

impl Agent {
    /// A feed that begins with what is on disk.
    pub(crate) fn new(member: Member, state_dir: PathBuf, metrics: &Metrics) -> Self {
        let view = disk::load(&state_dir, metrics);
        if let Some(global) = &view.global {
            tracing::info!(stamp = %global.stamp, "serving from the last known good state");
        }
        let inner = Inner { member, state_dir, view: watch::Sender::new(Arc::new(view)) };
        Self { inner: Arc::new(inner) }
    }

    /// What it tells.
    pub(crate) fn view(&self) -> watch::Receiver<Arc<View>> {
        self.inner.view.subscribe()
    }

    /// What an earlier run has observed, as far as it is readable.
    pub(crate) fn past(&self, metrics: &Metrics) -> Observations {
        disk::load_past(&self.inner.state_dir, metrics)
    }

    /// Keeps for the next run what this one observes, until no new connections are taken: the gateway's own end is no
    /// evidence against others. From a handover on, the successor does.
    pub(crate) async fn remember(self, core: Arc<Core>) {
        if !core.opened().await {
            return;
        }
        let mut version = core.observed.version();
        let mut saved = Observations::default();
        loop {
            let last = tokio::select! {
                changed = version.changed() => changed.is_err(),
                () = core.closing.cancelled() => true,
                () = core.steps.taken_over.cancelled() => return,
            };
            version.mark_unchanged();
            let now = core.observed.history();
            if now != saved {
                disk::save_past(&self.inner.state_dir, &now, &core.metrics).await;
                saved = now;
            }
            if last {
                return;
            }
            tokio::select! {
                () = time::sleep(REMEMBER_SPACING) => {}
                () = core.closing.cancelled() => {}
            }
        }
    }

    /// Follows the agent until the gateway stops, or until the agent feeds its successor.
    pub(crate) async fn follow(self, core: Arc<Core>, hello: GatewayHello) {
        // What the predecessor left is enough to take over. Without it, there is nobody to take over from.
        let begins_with_something = self.inner.view.borrow().global.is_some();
        if begins_with_something && !core.opened().await {
            return;
        }
        let disk = Disk::open(&self.inner.state_dir, &core.tasks, &core.metrics, &core.stop);
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(3));
        let mut refused = String::new();
        loop {
            let began = Instant::now();
            let ended = tokio::select! {
                ended = self.session(&core, &hello, &disk) => ended,
                () = core.stop.cancelled() => return,
                () = core.steps.feed_over.cancelled() => {
                    core.metrics.feed_connected(false);
                    tracing::info!("the agent feeds the successor; following what that one keeps on disk");
                    return self.follow_disk(&core).await;
                }
            };
            core.metrics.feed_connected(false);
            if let Err(error) = ended {
                let remedy = match &error {
                    SessionError::Call(error) => error.remedy(),
                    _ => None,
                };
                let error = chain(&error);
                match remedy {
                    // Until somebody acts, it is said again and again: once is enough.
                    Some(_) if refused == error => tracing::debug!(error, "the agent still refuses this gateway"),
                    Some(remedy) => {
                        tracing::error!(error, remedy, "the agent refuses this gateway; what is known stands");
                    }
                    None => tracing::warn!(error, "no feed from the agent; what is known stands"),
                }
                refused = remedy.map(|_| error).unwrap_or_default();
            }
            if began.elapsed() > Duration::from_secs(10) {
                backoff.reset();
            }
            tokio::select! {
                () = time::sleep(backoff.next()) => {}
                () = core.stop.cancelled() => return,
            }
        }
    }

    async fn session(&self, core: &Core, hello: &GatewayHello, disk: &Disk) -> Result<(), SessionError> {
        let mut client = LocalClient::new(self.inner.member.channel()?).max_decoding_message_size(MAX_MESSAGE);
        // Small: a message is taken within a deadline or the session is over.
        let (up, outgoing) = mpsc::channel(8);
        let up = Uplink(up);
        up.send(Up::Hello(hello.clone())).await?;
        let call = client.gateway_feed(ReceiverStream::new(outgoing));
        let down = time::timeout(CALL, call).await.map_err(|_| SessionError::Timeout)?;
        let mut down = down.map_err(CallError::from)?.into_inner();
        core.metrics.feed_connected(true);
        core.steps.following.cancel();
        tracing::info!(agent = self.inner.member.record().address, "feed connected");

        let mut in_force = core.standing.in_force();
        in_force.mark_changed();
        let mut problems = core.standing.problems_changed();
        // Even if there are none: the agent may remember some of before.
        problems.mark_changed();
        let mut evidence = core.observed.version();
        let mut told_draining = false;
        let mut report_at = time::Instant::now();
        loop {
            tokio::select! {
                update = down.message() => self.receive(core, disk, update.map_err(CallError::from)?.ok_or(SessionError::Ended)?),
                _ = in_force.changed() => {
                    let stamp = *in_force.borrow_and_update();
                    if let Some(stamp) = stamp {
                        up.send(Up::Applied(stamp.into())).await?;
                    }
                }
                _ = problems.changed() => {
                    problems.mark_unchanged();
                    up.send(Up::Problems(Problems { texts: core.standing.problems() })).await?;
                }
                _ = evidence.changed() => {
                    evidence.mark_unchanged();
                    // Never further away than it was, so that steady change cannot put it off.
                    report_at = report_at.min(time::Instant::now() + REPORT_SPACING);
                }
                () = time::sleep_until(report_at) => {
                    let report = AvailabilityReport {
                        availability: core.observed.report(),
                        tunnels: core.registry.states(),
                    };
                    up.send(Up::Availability((&report).into())).await?;
                    report_at = time::Instant::now() + REPORT_REFRESH;
                }
                () = core.draining.cancelled(), if !told_draining => {
                    told_draining = true;
                    // A gateway of this name goes on, and the agent knows them by name.
                    if !core.steps.taken_over.is_cancelled() {
                        up.send(Up::Draining(Draining {})).await?;
                    }
                }
            }
        }
    }

    fn receive(&self, core: &Core, disk: &Disk, update: GatewayUpdate) {
        let received = match update.kind {
            Some(Down::Global(message)) => self.global(core, Some(disk), message),
            Some(Down::Endpoints(message)) => {
                LocalEndpoints::try_from(message.clone()).map_err(Refusal::Invalid).map(|e| {
                    disk.save_endpoints(&message);
                    self.publish(|view| view.endpoints = Arc::new(e));
                })
            }
            None => Ok(()),
        };
        if let Err(refusal) = received {
            core.metrics.feed_problem(refusal.label());
            tracing::error!(error = %refusal, "what the agent sent is refused; the state before stands");
        }
    }

    /// A gateway that was taken over still obeys: a revoked peer must not stay connected to what it finishes.
    async fn follow_disk(&self, core: &Core) {
        let mut seen = None;
        loop {
            tokio::select! {
                () = time::sleep(REREAD_SPACING) => {}
                () = core.stop.cancelled() => return,
            }
            let changed = disk::changed(&self.inner.state_dir);
            if changed == seen {
                continue;
            }
            seen = changed;
            // Half a file is never seen: it is replaced as a whole. What is older than what is held is refused, as always.
            if let Some(message) = disk::load_global(self.inner.state_dir.clone(), core.metrics.clone()).await
                && let Err(refusal) = self.global(core, None, message)
            {
                tracing::debug!(error = %refusal, "the state on disk is not applied");
            }
        }
    }

    fn global(&self, core: &Core, disk: Option<&Disk>, message: GlobalMessage) -> Result<(), Refusal> {
        let mut next = GlobalSnapshot::try_from(message.clone()).map_err(Refusal::Invalid)?;
        if next.federation != *self.inner.member.record().federation() {
            return Err(Refusal::OtherFederation);
        }
        let held = self.inner.view.borrow().global.clone();
        let mut forced = Vec::new();
        if let Some(held) = held {
            if next.stamp < held.stamp {
                return Err(Refusal::Stale { held: held.stamp, sent: next.stamp });
            }
            forced = next.keep_revoked(&held);
            let text = |c| format!("the agent's state takes the revocation of {c} back; it stays revoked here");
            core.standing.set_problems(Area::Revocations, forced.iter().map(text).collect());
            if !forced.is_empty() {
                core.metrics.feed_problem("revocation");
                tracing::error!(clusters = ?forced, "the agent's state takes revocations back; they stand");
            }
            if next == *held {
                // The agent asks anew after a reconnect: say again what is applied.
                core.standing.repeat();
                return Ok(());
            }
        }
        self.trust(core, &next);
        if let Some(disk) = disk {
            disk.save_global(&if forced.is_empty() { message } else { (&next).into() });
        }
        self.publish(|view| view.global = Some(Arc::new(next)));
        Ok(())
    }

    /// Takes over a new federation bundle if its predecessor vouches for it. A refused one costs only itself: peers under
    /// the roots known go on working.
    fn trust(&self, core: &Core, next: &GlobalSnapshot) {
        if let Err(error) = self.inner.member.succeed(&next.federation_bundle) {
            core.metrics.feed_problem("bundle");
            tracing::error!(error = chain(&error), "the federation's new trust bundle is refused; the old one stands");
        }
    }

    /// Renews the certificate whenever it is time, until the gateway stops or is taken over.
    pub(crate) async fn renew(self, core: Arc<Core>) {
        if !core.opened().await {
            return;
        }
        let renewed = |outcome: Result<&Svid, &EnrolError>| {
            if let Ok(svid) = outcome {
                core.metrics.svid_expiry(svid.not_after().0);
            }
        };
        tokio::select! {
            () = self.inner.member.clone().keep_fresh(renewed) => {}
            () = core.stop.cancelled() => {}
            // The certificate in the state directory is the successor's to renew.
            () = core.steps.taken_over.cancelled() => {}
        }
    }

    fn publish(&self, change: impl FnOnce(&mut View)) {
        self.inner.view.send_modify(|view| {
            let mut next = View::clone(view);
            change(&mut next);
            *view = Arc::new(next);
        });
    }
}

/// A message of the agent that is not applied.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("it is not valid: {0}")]
    Invalid(ConvertError),
    #[error("it is of another federation")]
    OtherFederation,
    #[error("it is at {sent}, older than {held}, which is held")]
    Stale { held: isthmus_model::ids::Stamp, sent: isthmus_model::ids::Stamp },
}

impl Refusal {
    fn label(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::OtherFederation => "other_federation",
            Self::Stale { .. } => "stale",
        }
    }
}

/// The way up of one session.
struct Uplink(mpsc::Sender<GatewayMessage>);

impl Uplink {
    async fn send(&self, kind: Up) -> Result<(), SessionError> {
        let sent = self.0.send_timeout(GatewayMessage { kind: Some(kind) }, CALL).await;
        sent.map_err(|_| SessionError::Timeout)
    }
}
