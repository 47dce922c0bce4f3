//! All simulated agents: they join, open their sessions, publish, and are waited for.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::{sync::watch, task::JoinSet, time::sleep};

use super::{
    PATIENCE,
    agent::{self, Intent, Known, Slot},
    exports,
    join::{Member, join},
};
use crate::control::group::Group;

/// That join at one time; the control plane takes sixteen.
const JOINING: usize = 8;
/// How often it is looked whether all are where they should be. What each did when is written down by itself.
const LOOK: Duration = Duration::from_millis(2);

/// The agents, by number. Their sessions end when this is dropped.
pub(super) struct Fleet {
    agents: Vec<Agent>,
    sessions: JoinSet<()>,
}

struct Agent {
    member: Arc<Member>,
    slot: Arc<Slot>,
    intent: watch::Sender<Intent>,
}

impl Fleet {
    /// Has `count` clusters join, a third at each node.
    pub(super) async fn join(group: &Group, count: usize) -> anyhow::Result<Self> {
        let (mut tasks, mut admins) = (JoinSet::new(), Vec::new());
        for node in &group.nodes {
            admins.push(node.connect(&mut tasks).await?);
        }
        let joining = (0..count).map(|number| {
            let admin = admins.get(number % admins.len()).cloned();
            async move {
                let mut admin = admin.context("there is no node")?;
                join(number, &mut admin).await.with_context(|| format!("cluster {number}"))
            }
        });
        let members: Vec<Member> = stream::iter(joining).buffered(JOINING).try_collect().await?;
        let agent = |member| {
            let (intent, _) = watch::channel(Intent::default());
            Agent { member: Arc::new(member), slot: Arc::default(), intent }
        };
        Ok(Self { agents: members.into_iter().map(agent).collect(), sessions: JoinSet::new() })
    }

    /// Opens all sessions, each at the node where its cluster joined, and waits until all hold a state.
    pub(super) async fn open(&mut self, group: &Group) -> anyhow::Result<()> {
        for (agent, node) in self.agents.iter().zip(group.nodes.iter().cycle()) {
            let (member, slot) = (agent.member.clone(), agent.slot.clone());
            self.sessions.spawn(agent::run(member, node.grpc, slot, agent.intent.subscribe()));
        }
        self.until("all hold a state", |known| known.since.is_some()).await
    }

    pub(super) fn len(&self) -> usize {
        self.agents.len()
    }

    /// Has every cluster publish what it has, and waits until all agents hold all of it.
    pub(super) async fn publish_all(&self) -> anyhow::Result<()> {
        for agent in &self.agents {
            agent.set(None);
        }
        self.until("all publications are committed", |known| known.committed.0 > 0).await?;
        let last = self.agents.iter().map(|agent| agent.slot.known().committed.1).max().unwrap_or_default();
        self.until("all are in sync", |known| known.revision >= last).await
    }

    /// Has one cluster change one export: how long until the last agent holds that.
    pub(super) async fn change(&self, nth: usize) -> anyhow::Result<Duration> {
        // Spread over clusters and their exports; the same one again is changed back.
        let agent = self.agents.get(nth * 7 % self.agents.len().max(1)).context("there is no agent")?;
        let changed = (agent.intent.borrow().version % 2 == 1).then_some(nth % exports::EXPORTS);
        let began = Instant::now();
        let version = agent.set(changed);
        let deadline = began + PATIENCE;
        let committed = loop {
            let (done, revision) = agent.slot.known().committed;
            if done == version {
                break revision;
            }
            ensure!(Instant::now() < deadline, "a change was not committed: {}", agent.slot.known().why);
            sleep(LOOK).await;
        };
        self.until("all hold the change", |known| known.revision >= committed).await?;
        let last = self.agents.iter().filter_map(|agent| agent.slot.known().since).max();
        Ok(last.context("nobody holds anything")?.saturating_duration_since(began))
    }

    /// How many sessions broke, and why one of them did.
    pub(super) fn broken(&self) -> (u64, String) {
        let known = self.agents.iter().map(|agent| agent.slot.known());
        known.fold((0, String::new()), |(count, why), known| {
            (count + known.broken, if known.broken > 0 { known.why } else { why })
        })
    }

    async fn until(&self, what: &str, holds: impl Fn(&Known) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let missing = self.agents.iter().filter(|agent| !holds(&agent.slot.known())).count();
            if missing == 0 {
                return Ok(());
            }
            let (broken, why) = self.broken();
            ensure!(
                Instant::now() < deadline,
                "{what}: {missing} of {} agents do not after {PATIENCE:?}; {broken} sessions broke: {why}",
                self.agents.len()
            );
            sleep(LOOK).await;
        }
    }
}

impl Agent {
    /// Gives it something else to publish: the version.
    fn set(&self, changed: Option<usize>) -> u64 {
        let member = &self.member;
        let publication = exports::publication(member.number, changed, &member.ca.bundle());
        let version = self.intent.borrow().version + 1;
        self.intent.send_replace(Intent { version, publication: Some(Arc::new(publication)) });
        version
    }
}
