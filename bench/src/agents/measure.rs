//! One round at one size: a fresh control plane, all join, publish, and change something now and then.

use std::{
    fmt,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use rand::RngExt;

use super::fleet::Fleet;
use crate::{
    control::{
        group::{Group, Setting},
        process::{resident, resident_peak},
    },
    load::histogram::{Histogram, Summary},
};

/// Of the nodes' addresses.
const NET: u8 = 40;
/// Between two changes, at most: some find the agents' reports of the one before under way, some do not.
const PAUSE: Duration = Duration::from_millis(400);

/// What was seen.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Seconds until all had joined and all sessions were open.
    pub(super) join: f64,
    /// Seconds from the first publication until all held all.
    pub(super) sync: f64,
    /// From one change to the last agent that holds it, in microseconds.
    pub(super) change: Summary,
    /// Of the largest node after the changes, in bytes.
    pub(super) resident: f64,
    /// Of the largest node, ever.
    pub(super) peak: f64,
    /// What an open session of an agent that has published nothing takes at its node.
    pub(super) session: f64,
    pub(super) notes: Vec<String>,
}

/// Does it.
pub(super) async fn run(dir: &Path, keys: &str, agents: u16, changes: u16) -> anyhow::Result<Seen> {
    let mut group = Group::found(&Setting { dir, net: NET, keys }).await.context("start our nodes")?;
    let began = Instant::now();
    let mut fleet = Fleet::join(&group, usize::from(agents)).await.context("join")?;
    let joined = began.elapsed();
    let without = memory(&group, resident)?;
    let opening = Instant::now();
    fleet.open(&group).await?;
    let join = (joined + opening.elapsed()).as_secs_f64();
    let with = memory(&group, resident)?;
    let publishing = Instant::now();
    fleet.publish_all().await?;
    let sync = publishing.elapsed().as_secs_f64();
    let mut change = Histogram::default();
    for nth in 0..usize::from(changes) {
        let pause = PAUSE.mul_f64(rand::rng().random::<f64>());
        tokio::time::sleep(pause).await;
        change.record(fleet.change(nth).await?);
    }
    group.check()?;
    let (broken, why) = fleet.broken();
    let notes = (broken > 0).then(|| format!("{broken} sessions broke and were opened again, at last because: {why}"));
    let largest = |of: &[f64]| of.iter().copied().fold(0.0, f64::max);
    let sessions = fleet.len() as f64;
    let seen = Seen {
        join,
        sync,
        change: change.summary(),
        resident: largest(&memory(&group, resident)?),
        peak: largest(&memory(&group, resident_peak)?),
        session: (with.iter().sum::<f64>() - without.iter().sum::<f64>()) / sessions,
        notes: notes.into_iter().collect(),
    };
    drop(fleet);
    group.stop().await;
    Ok(seen)
}

/// Of each node.
fn memory(group: &Group, of: impl Fn(u32) -> anyhow::Result<f64>) -> anyhow::Result<Vec<f64>> {
    group.nodes.iter().map(|node| of(node.pid()?)).collect()
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        write!(
            f,
            "joined in {:.1} s, in sync in {:.1} s, one change to the last p50 {:.1} ms, p99 {:.1} ms, node {:.0} MiB (peak {:.0})",
            self.join,
            self.sync,
            self.change.p50 / 1e3,
            self.change.p99 / 1e3,
            mib(self.resident),
            mib(self.peak),
        )
    }
}
