//! The clients, the same for both: writers, each with one write under way, over connections that are kept.
//!
//! There are [`CONNECTIONS`] connections over HTTP/2 and mutual TLS to each node, whatever the number of writers; a writer
//! goes from node to node, one write each, so that a third of all come to the leader directly, as with a client that knows no
//! leader. A write's time runs from its request to the whole answer.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures_util::future::BoxFuture;
use http_body_util::Full;
use hyper::{Request, body::Bytes};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::{
    control::{
        http2::{Answer, Connection},
        process::cpu_seconds,
    },
    load::histogram::{Histogram, Summary},
};

/// To each node. With 1,000 writers a connection carries 42 at once.
const CONNECTIONS: usize = 8;
/// Of all writes of a step; more, and it is no measurement.
const TOLERATED: f64 = 0.01;
/// After a failed write, so that a group without a leader is not stormed.
const PAUSE: Duration = Duration::from_millis(100);

/// What is written, and whether it was.
pub(super) trait Writes: Send + Sync {
    /// The next write's request.
    fn request(&self) -> anyhow::Result<Request<Full<Bytes>>>;
    /// Whether it is committed, as the answer says.
    fn committed(&self, answer: &Answer) -> anyhow::Result<()>;
}

/// A group of three under measurement.
pub(super) trait Contender: Send {
    fn name(&self) -> &'static str;
    fn writes(&self) -> Arc<dyn Writes>;
    /// Its processes.
    fn pids(&mut self) -> anyhow::Result<Vec<u32>>;
    /// New connections to each node.
    fn connect(&self, count: usize) -> BoxFuture<'_, anyhow::Result<Connections>>;
    /// How many writes it holds that were made since it started, and how many it has acknowledged.
    fn kept(&mut self) -> BoxFuture<'_, anyhow::Result<(u64, u64)>>;
    fn stop(self: Box<Self>) -> BoxFuture<'static, ()>;
}

/// By node.
pub(super) struct Connections {
    pub(super) of_node: Vec<Vec<Connection>>,
    /// Drives them.
    pub(super) _tasks: JoinSet<()>,
}

/// One step.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Seen {
    pub(super) per_second: f64,
    pub(super) latency: Summary,
    /// Of all three nodes, for each write.
    pub(super) cpu_micros: f64,
    pub(super) failed: u64,
    /// Of the last one that failed.
    pub(super) failure: Option<String>,
}

#[derive(Debug, Default)]
struct Tally {
    histogram: Histogram,
    failed: u64,
    failure: Option<String>,
}

/// `writers` write for as long as `warm` and `measure` take; what ends in the second is counted.
pub(super) async fn run(
    contender: &mut dyn Contender,
    writers: u16,
    (warm, measure): (Duration, Duration),
) -> anyhow::Result<Seen> {
    let connections = contender.connect(CONNECTIONS).await?;
    let pids = contender.pids()?;
    let nodes = connections.of_node.len();
    let from = Instant::now() + warm;
    let span = Span { from, to: from + measure };
    let mut tasks = JoinSet::new();
    for writer in 0..usize::from(writers) {
        let own = |node: &Vec<Connection>| node.get(writer % CONNECTIONS).cloned().context("a connection");
        let of_node: Vec<Connection> = connections.of_node.iter().map(own).collect::<anyhow::Result<_>>()?;
        tasks.spawn(write(of_node, writer % nodes, contender.writes(), span));
    }
    tokio::time::sleep_until(span.from.into()).await;
    let before = cpu(&pids)?;
    tokio::time::sleep_until(span.to.into()).await;
    let used = cpu(&pids)? - before;
    let mut all = Tally::default();
    while let Some(tally) = tasks.join_next().await {
        let tally = tally.context("a writer ended early")?;
        all.histogram.merge(&tally.histogram);
        all.failed += tally.failed;
        all.failure = tally.failure.or(all.failure);
    }
    let count = all.histogram.count();
    ensure!(count > 0, "no write ended in time; {}", all.failure.unwrap_or_default());
    ensure!(
        (all.failed as f64) < TOLERATED * (count + all.failed) as f64,
        "{} of {} writes failed: {}",
        all.failed,
        count + all.failed,
        all.failure.unwrap_or_default()
    );
    Ok(Seen {
        per_second: count as f64 / measure.as_secs_f64(),
        latency: all.histogram.summary(),
        cpu_micros: used * 1e6 / count as f64,
        failed: all.failed,
        failure: all.failure,
    })
}

/// When writes are counted.
#[derive(Clone, Copy, Debug)]
struct Span {
    from: Instant,
    to: Instant,
}

async fn write(mut of_node: Vec<Connection>, first: usize, writes: Arc<dyn Writes>, span: Span) -> Tally {
    let mut tally = Tally::default();
    of_node.rotate_left(first);
    for turn in 0.. {
        let began = Instant::now();
        if began >= span.to {
            break;
        }
        let node = turn % of_node.len().max(1);
        let Some(connection) = of_node.get_mut(node) else { break };
        let outcome = async {
            let answer = connection.exchange(writes.request()?).await?;
            writes.committed(&answer)
        };
        match outcome.await {
            Ok(()) => {
                let ended = Instant::now();
                if ended >= span.from && ended < span.to {
                    tally.histogram.record(ended - began);
                }
            }
            Err(error) => {
                tally.failed += 1;
                tally.failure = Some(format!("{error:#}"));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    tally
}

fn cpu(pids: &[u32]) -> anyhow::Result<f64> {
    pids.iter().map(|pid| cpu_seconds(*pid)).sum()
}
