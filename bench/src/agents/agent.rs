//! One simulated agent: its session, as a real agent has it, without what a real one does with what it hears.
//!
//! In: what it is to publish. Out: its [`Slot`]: which revision it holds and since when, and what of its publications is committed.
//! It reads every message to the point of knowing its stamp ([`wire`](super::wire)), checks that a delta starts at what it holds,
//! reports its status within 200 ms of a change and every ten seconds, and connects again after a loss, then publishing again, as
//! a real one does.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use isthmus_api::proto::{
    common::v1 as common,
    federation::v1::{Hello, Publication, Publish, Status, agent_message, control_message},
};
use isthmus_runtime::backoff::Backoff;
use tokio::{
    sync::watch,
    time::{interval, timeout},
};

use super::{
    exports,
    join::Member,
    wire::{Heard, Up, Wire},
};

/// As a real agent's.
const STATUS_PAUSE: Duration = Duration::from_millis(200);
const STATUS_IDLE: Duration = Duration::from_secs(10);
const CALL: Duration = Duration::from_secs(10);

/// What it is to publish, counted.
#[derive(Clone, Debug, Default)]
pub(super) struct Intent {
    pub(super) version: u64,
    /// Nothing at first.
    pub(super) publication: Option<Arc<Publication>>,
}

/// What the others know of it.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<Known>);

#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// The state that it holds.
    pub(super) revision: u64,
    /// Since when.
    pub(super) since: Option<Instant>,
    /// Of what it published: the version, and the revision that it is in.
    pub(super) committed: (u64, u64),
    /// How often its session broke, and why at last.
    pub(super) broken: u64,
    pub(super) why: String,
}

impl Slot {
    pub(super) fn known(&self) -> Known {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs until it is dropped.
pub(super) async fn run(member: Arc<Member>, address: SocketAddr, slot: Arc<Slot>, intent: watch::Receiver<Intent>) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let mut held = None;
    loop {
        let hello = Hello {
            cluster: exports::cluster(member.number),
            held,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            held_digest: Vec::new(),
        };
        let (ended, holds) = match timeout(CALL, Wire::open(address, &member.tls, agent_message::Kind::Hello(hello)))
            .await
        {
            Ok(Ok((up, down))) => {
                backoff.reset();
                let session =
                    Session { up, slot: &slot, held, coming: None, intent: intent.clone(), sequence: 0, sent: None };
                session.run(down).await
            }
            Ok(Err(error)) => (error, held),
            Err(_) => (anyhow!("no answer in time"), held),
        };
        held = holds;
        {
            let mut known = slot.lock();
            known.broken += 1;
            known.why = format!("{ended:#}");
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

struct Session<'a> {
    up: Up,
    slot: &'a Slot,
    held: Option<common::Stamp>,
    /// A state of which pieces have come.
    coming: Option<Box<Heard>>,
    intent: watch::Receiver<Intent>,
    sequence: u64,
    /// The version that is on its way; one at a time.
    sent: Option<u64>,
}

impl Session<'_> {
    /// Why it ended, and what is held then.
    async fn run(mut self, down: Wire) -> (anyhow::Error, Option<common::Stamp>) {
        let ended = self.serve(down).await.err().unwrap_or_else(|| anyhow!("the control plane ended the session"));
        (ended, self.held)
    }

    async fn serve(&mut self, mut down: Wire) -> anyhow::Result<()> {
        let mut tick = interval(STATUS_PAUSE);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.intent.mark_changed();
        let (mut said, mut news) = (Instant::now(), true);
        loop {
            if self.sent.is_none() && self.intent.has_changed().unwrap_or(false) {
                self.publish().await?;
            }
            // Receiving is cancel-safe in all branches.
            tokio::select! {
                heard = down.next() => match heard? {
                    Some(heard) => news |= self.take(heard)?,
                    None => return Ok(()),
                },
                changed = self.intent.changed(), if self.sent.is_none() => {
                    changed.context("nobody says any more what to publish")?;
                    self.intent.mark_changed();
                }
                _ = tick.tick() => if news || said.elapsed() >= STATUS_IDLE {
                    (said, news) = (Instant::now(), false);
                    self.send(agent_message::Kind::Status(self.status())).await?;
                },
            }
        }
    }

    async fn publish(&mut self) -> anyhow::Result<()> {
        let Intent { version, publication } = self.intent.borrow_and_update().clone();
        let Some(publication) = publication else { return Ok(()) };
        self.sequence += 1;
        self.sent = Some(version);
        let publish =
            Publish { sequence: self.sequence, publication: Some((*publication).clone()), incarnation: vec![1; 16] };
        self.send(agent_message::Kind::Publish(publish)).await
    }

    /// Whether the state is another one now.
    fn take(&mut self, heard: Heard) -> anyhow::Result<bool> {
        let heard = match heard {
            Heard::Piece { of, last } => {
                // Later pieces may look as if they began with stamps.
                if self.coming.is_none() {
                    self.coming = Some(of.context("the first piece of a state has no stamp")?);
                }
                match self.coming.take_if(|_| last) {
                    Some(whole) => *whole,
                    None => return Ok(false),
                }
            }
            heard => heard,
        };
        let to = match heard {
            Heard::Snapshot(stamp) => stamp,
            Heard::Delta { from, to } => {
                if Some(from) != self.held {
                    let held = self.held.take();
                    bail!("a delta starts at {from:?}, but this agent holds {held:?}");
                }
                to
            }
            // Put together above.
            Heard::Piece { .. } => return Ok(false),
            Heard::Other(Some(control_message::Kind::Published(published))) => {
                ensure!(published.sequence == self.sequence, "an answer to publication {}", published.sequence);
                let revision = published.stamp.context("a publication's stamp")?.revision;
                if let Some(version) = self.sent.take() {
                    self.slot.lock().committed = (version, revision);
                }
                return Ok(false);
            }
            Heard::Other(Some(control_message::Kind::Refused(refused))) => {
                bail!("a publication was refused: {}", refused.reason)
            }
            Heard::Other(_) => return Ok(false),
        };
        self.held = Some(to);
        let mut known = self.slot.lock();
        (known.revision, known.since) = (to.revision, Some(Instant::now()));
        Ok(true)
    }

    fn status(&self) -> Status {
        let agent = common::ConsumerStatus {
            kind: common::ConsumerKind::Agent.into(),
            name: "agent".to_owned(),
            applied: self.held,
            connected: true,
            problems: Vec::new(),
        };
        Status { consumers: vec![agent], ..Status::default() }
    }

    async fn send(&self, kind: agent_message::Kind) -> anyhow::Result<()> {
        timeout(CALL, self.up.send(kind)).await.context("the control plane does not read")?
    }
}
