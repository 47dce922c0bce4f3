//! Our group, and its small write: `POST /v1/rollback/N` of the REST API, what `isthmusctl rollback` does.
//!
//! It puts the settings of an earlier revision in force again, and is as small as our writes get: with its id, author and time
//! it takes [`super::etcd::VALUE`] bytes in the log or slightly more. Each is one command, decided, answered, remembered by its id,
//! and recorded in the audit log; the first of each entry changes the settings, later ones of the same entry find them in force.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, ensure};
use futures_util::{FutureExt, future::BoxFuture};
use http_body_util::Full;
use hyper::{Request, body::Bytes};
use serde_json::Value;
use tokio::task::JoinSet;

use super::{
    drive::{Connections, Contender, Writes},
    metrics,
};
use crate::control::{
    group::{Group, Setting},
    http2::{Answer, Connection, rest},
};

/// Of the nodes' addresses.
const NET: u8 = 39;
/// Settings that are not the default ones, so that there is something to go back and forth between. And no word in the log for
/// each rollback: etcd writes none either.
const KEYS: &str = "settings: { failover: { holdDownMs: 5000 } }\ntelemetry: { log: { level: error } }\n";

/// Three nodes.
pub(super) struct Ours {
    group: Group,
    rollbacks: Arc<Rollbacks>,
    /// The number of the last event before the first write.
    events: u64,
}

struct Rollbacks {
    /// A revision whose settings are not those in force, unless someone was faster.
    other: AtomicU64,
    acknowledged: AtomicU64,
}

impl Ours {
    pub(super) async fn start(dir: &Path, keys: &str) -> anyhow::Result<Self> {
        let keys = format!("{KEYS}{keys}\n");
        let group = Group::found(&Setting { dir, net: NET, keys: &keys }).await?;
        // At the first revision the default settings were in force.
        let rollbacks = Arc::new(Rollbacks { other: AtomicU64::new(1), acknowledged: AtomicU64::new(0) });
        let mut ours = Self { group, rollbacks, events: 0 };
        ours.events = ours.last_event().await?;
        Ok(ours)
    }

    async fn last_event(&self) -> anyhow::Result<u64> {
        let mut tasks = JoinSet::new();
        // Not of the node that led at first.
        let node = self.group.nodes.last().context("there is no node")?;
        let events = node.connect(&mut tasks).await?.call("GET", "/v1/events?limit=1", "").await?;
        events.pointer("/0/number").and_then(Value::as_u64).context("the last event's number")
    }
}

impl Contender for Ours {
    fn name(&self) -> &'static str {
        metrics::OURS
    }

    fn writes(&self) -> Arc<dyn Writes> {
        self.rollbacks.clone()
    }

    fn pids(&mut self) -> anyhow::Result<Vec<u32>> {
        self.group.check()?;
        self.group.nodes.iter().map(|node| node.pid()).collect()
    }

    fn connect(&self, count: usize) -> BoxFuture<'_, anyhow::Result<Connections>> {
        async move {
            let (mut of_node, mut tasks) = (Vec::new(), JoinSet::new());
            for node in &self.group.nodes {
                let tls = node.tls()?;
                let mut connections = Vec::new();
                for _ in 0..count {
                    connections.push(Connection::open(node.admin, &tls, &mut tasks).await?);
                }
                of_node.push(connections);
            }
            Ok(Connections { of_node, _tasks: tasks })
        }
        .boxed()
    }

    fn kept(&mut self) -> BoxFuture<'_, anyhow::Result<(u64, u64)>> {
        async move {
            let kept = self.last_event().await?.saturating_sub(self.events);
            Ok((kept, self.rollbacks.acknowledged.load(Ordering::Relaxed)))
        }
        .boxed()
    }

    fn stop(self: Box<Self>) -> BoxFuture<'static, ()> {
        self.group.stop().boxed()
    }
}

impl Writes for Rollbacks {
    fn request(&self) -> anyhow::Result<Request<Full<Bytes>>> {
        rest("POST", &format!("/v1/rollback/{}", self.other.load(Ordering::Relaxed)), "")
    }

    fn committed(&self, answer: &Answer) -> anyhow::Result<()> {
        let said = answer.json()?;
        let changed = said.get("changed").and_then(Value::as_bool).context("`changed` in the answer")?;
        let stamp = said.get("stamp").context("`stamp` in the answer")?;
        let revision = revision(stamp).with_context(|| format!("a revision in {stamp}"))?;
        ensure!(revision > 0, "the state has not begun");
        if changed {
            self.other.fetch_max(revision - 1, Ordering::Relaxed);
        }
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn revision(stamp: &Value) -> Option<u64> {
    stamp.get("revision")?.as_u64()
}
