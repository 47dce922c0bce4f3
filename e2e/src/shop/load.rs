//! Steady load from `web`, open loop: requests start on schedule whether or not earlier ones have ended, so that a stall
//! is seen and not waited out. Every outcome becomes one line of JSON.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncWriteExt,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};

use super::web::{Shop, ports};

/// What kind of traffic a sample is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `GET` to cart.
    Http,
    /// A whole session with orders.
    Tcp,
}

/// One request's outcome.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// HTTP or TCP.
    pub kind: Kind,
    /// Unix time, milliseconds.
    pub start_ms: u64,
    /// How long it took.
    pub micros: u64,
    /// The cluster that served it, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// SPIFFE ID that the callee saw (HTTP).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Sample {
    /// When it ended: Unix time, milliseconds.
    pub fn end_ms(&self) -> u64 {
        self.start_ms + self.micros / 1000
    }
}

/// How much load, and where its samples go.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadArgs {
    /// HTTP requests per second to cart.
    #[arg(long, default_value_t = 250)]
    pub http_rate: u32,
    /// Sessions per second with orders.
    #[arg(long, default_value_t = 10)]
    pub tcp_rate: u32,
    /// File that gets one JSON object per request.
    #[arg(long)]
    pub samples: PathBuf,
}

/// Runs until SIGTERM; requests under way then get their outcome before it ends.
pub async fn run(shop: Arc<Shop>, args: LoadArgs) -> anyhow::Result<()> {
    let mut file = tokio::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&args.samples)
        .await
        .with_context(|| format!("open {}", args.samples.display()))?;
    let (tx, mut rx) = mpsc::channel::<Sample>(4096);
    let (stop, stopped) = watch::channel(false);
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut tasks = JoinSet::new();
    for (kind, rate) in [(Kind::Http, args.http_rate), (Kind::Tcp, args.tcp_rate)] {
        if rate > 0 {
            tasks.spawn(generate(shop.clone(), kind, Duration::from_secs(1) / rate, tx.clone(), stopped.clone()));
        }
    }
    drop(tx);
    let mut flush = interval(Duration::from_millis(20));
    let mut lines = Vec::new();
    loop {
        tokio::select! {
            sample = rx.recv() => match sample {
                Some(sample) => {
                    serde_json::to_writer(&mut lines, &sample)?;
                    lines.push(b'\n');
                }
                None => break,
            },
            _ = flush.tick() => {
                file.write_all(&lines).await.context("write samples")?;
                file.flush().await.context("write samples")?;
                lines.clear();
            }
            _ = term.recv() => {
                stop.send_replace(true);
            }
        }
    }
    file.write_all(&lines).await.context("write samples")?;
    file.flush().await.context("write samples")
}

async fn generate(
    shop: Arc<Shop>,
    kind: Kind,
    every: Duration,
    samples: mpsc::Sender<Sample>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut schedule = interval(every);
    schedule.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut running = JoinSet::new();
    let mut sequence = 0_u64;
    loop {
        tokio::select! {
            _ = schedule.tick() => {
                sequence += 1;
                let (shop, samples) = (shop.clone(), samples.clone());
                running.spawn(async move { samples.send(one(&shop, kind, sequence).await).await.ok() });
            }
            Some(_) = running.join_next() => {}
            _ = stopped.wait_for(|s| *s) => break,
        }
    }
    while running.join_next().await.is_some() {}
}

async fn one(shop: &Shop, kind: Kind, sequence: u64) -> Sample {
    let start_ms = isthmus_runtime::now();
    let start = Instant::now();
    let outcome = match kind {
        Kind::Http => shop
            .get("cart", ports::CART, &format!("items/{sequence}"))
            .await
            .map(|answer| (answer.cluster, Some(answer.caller))),
        Kind::Tcp => shop.order(ports::ORDERS, &sequence.to_string()).await.map(|cluster| (cluster, None)),
    };
    let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    match outcome {
        Ok((cluster, caller)) => Sample { kind, start_ms, micros, cluster: Some(cluster), caller, error: None },
        Err(e) => Sample { kind, start_ms, micros, cluster: None, caller: None, error: Some(format!("{e:#}")) },
    }
}
