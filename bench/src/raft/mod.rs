//! Committed writes: three nodes of our control plane beside three of etcd, on the same disk, in mutual TLS.
//!
//! What is written is [`ours`]' and [`etcd`]'s to say; [`drive`] is the same clients for both: as many writers as asked for, each
//! with one write under way, the nodes in turn. Both groups run throughout and take turns, round by round. Out come the table,
//! `raft.json` (one row per metric) and `raft-raw.json` (every round).
//!
//! It fails when a group cannot be started, or when one does not hold all writes that it acknowledged.

mod disk;
mod drive;
mod etcd;
mod metrics;
mod ours;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde::Serialize;

use self::{drive::Contender, etcd::Etcd, metrics::CONTEST, ours::Ours};
use crate::report::{
    Row, json,
    machine::{Machine, Rival},
    samples::Samples,
    table,
};

/// Options.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  isthmus-bench raft                         three rounds
  isthmus-bench raft --quick                 a rough answer in a minute
  isthmus-bench raft --writers 1 --rounds 9  some of it
  isthmus-bench raft --systems ours --keys 'raft: { snapshotAfterEntries: 10000 }'")]
pub(crate) struct Args {
    /// One short round.
    #[arg(long)]
    quick: bool,
    /// How many write at once; 1, 64, 256 and 1,000 unless given.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=4_000))]
    writers: Vec<u16>,
    /// Only these systems: ours, etcd.
    #[arg(long, value_delimiter = ',', value_parser = [metrics::OURS, metrics::ETCD])]
    systems: Vec<String>,
    /// Rounds, if not as many as planned.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: Option<u8>,
    /// Keys for our nodes' configuration over the defaults, as YAML: for trying things out.
    #[arg(long, value_name = "YAML", default_value = "")]
    keys: String,
    /// Folder for results; state and logs of both go to its subfolder `raft`.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

/// How many write at once.
const WRITERS: [u16; 4] = [1, 64, 256, 1_000];

/// How long one step takes.
#[derive(Clone, Copy, Debug)]
struct Pace {
    rounds: u8,
    warm: Duration,
    measure: Duration,
}

/// The file with every round.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Raw<'a> {
    quick: bool,
    #[serde(flatten)]
    samples: &'a Samples,
}

/// Measures, prints the table, writes the files.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut samples = Samples::default();
    tokio::select! {
        outcome = measure(&args, &mut samples) => outcome?,
        stopped = crate::stop_signal() => {
            stopped?;
            bail!("stopped by a signal; nothing was written");
        }
    }
    report(&args, &samples)?;
    println!("\nTook {} s.", began.elapsed().as_secs());
    Ok(())
}

async fn measure(args: &Args, samples: &mut Samples) -> anyhow::Result<()> {
    let dir = crate::fresh_folder(&args.out, "raft")?;
    let wanted = |name: &str| args.systems.is_empty() || args.systems.iter().any(|s| s == name);
    let mut contenders: Vec<Box<dyn Contender>> = Vec::new();
    let etcd = etcd::program()?;
    let machine = Machine::here(Rival::Etcd(&etcd));
    samples.note(disk::note(&dir)?);
    if wanted(metrics::OURS) {
        contenders.push(Box::new(Ours::start(&dir.join("ours"), &args.keys).await.context("start our nodes")?));
        if !args.keys.is_empty() {
            samples.note(format!("our nodes are configured with {}", args.keys));
        }
    }
    if wanted(metrics::ETCD) {
        contenders.push(Box::new(Etcd::start(&dir.join("etcd"), &etcd).await.context("start etcd")?));
    }
    play(args, &mut contenders, samples).await?;
    for contender in &mut contenders {
        let (kept, acknowledged) = contender.kept().await.with_context(|| format!("ask {}", contender.name()))?;
        anyhow::ensure!(
            kept >= acknowledged,
            "{} holds {kept} writes, but acknowledged {acknowledged}",
            contender.name()
        );
        println!("{} acknowledged {acknowledged} writes, and holds {kept}.", contender.name());
    }
    for contender in contenders {
        contender.stop().await;
    }
    machine.record(&args.out, "raft")
}

async fn play(args: &Args, contenders: &mut [Box<dyn Contender>], samples: &mut Samples) -> anyhow::Result<()> {
    let seconds = Duration::from_secs_f64;
    let mut pace = if args.quick {
        Pace { rounds: 1, warm: seconds(0.5), measure: seconds(2.0) }
    } else {
        Pace { rounds: 5, warm: seconds(1.0), measure: seconds(4.0) }
    };
    pace.rounds = args.rounds.unwrap_or(pace.rounds);
    let writers = if args.writers.is_empty() { &WRITERS[..] } else { &args.writers };
    for round in 1..=pace.rounds {
        for writers in writers.iter().copied() {
            // Who goes first finds the disk otherwise than who comes second.
            if round > 1 {
                contenders.rotate_left(1);
            }
            for contender in contenders.iter_mut() {
                let name = contender.name();
                let seen = drive::run(contender.as_mut(), writers, (pace.warm, pace.measure)).await;
                let seen = seen.with_context(|| format!("{name}, {writers} writers"))?;
                println!(
                    "  round {round}  {name:<5} {writers:>5} writers: {:>7.0} writes/s, p50 {:>7.2} ms, p99 {:>7.2} ms, \
                     CPU {:>5.0} µs a write{}",
                    seen.per_second,
                    seen.latency.p50 / 1e3,
                    seen.latency.p99 / 1e3,
                    seen.cpu_micros,
                    seen.failure.as_ref().map(|why| format!(", {} failed: {why}", seen.failed)).unwrap_or_default(),
                );
                if let Some(why) = &seen.failure {
                    samples.note(format!("{name}, {writers} writers: {} failed: {why}", seen.failed));
                }
                samples.add_with(&metrics::throughput(writers), name, seen.per_second, &seen);
                samples.add(&metrics::latency("p50", writers), name, seen.latency.p50);
                samples.add(&metrics::latency("p99", writers), name, seen.latency.p99);
                samples.add(&metrics::cpu(writers), name, seen.cpu_micros);
            }
        }
    }
    Ok(())
}

fn report(args: &Args, samples: &Samples) -> anyhow::Result<()> {
    let lines: Vec<table::Line<'_>> = samples.metrics.iter().map(|m| (&m.metric, &m.rounds)).collect();
    println!("{}", table::render(&lines, &metrics::COLUMNS, CONTEST, &metrics::GROUPS));
    for note in &samples.notes {
        println!("  note: {note}");
    }
    let rows: Vec<Row> = lines.iter().flat_map(|(metric, rounds)| metric.rows(CONTEST, rounds)).collect();
    crate::report::print_goals(&rows);
    write(&args.out, "raft", &rows, &Raw { quick: args.quick, samples })
}

/// The rows and the raw values.
fn write(out: &Path, name: &str, rows: &[Row], raw: &Raw<'_>) -> anyhow::Result<()> {
    let (judged, every) = (out.join(format!("{name}.json")), out.join(format!("{name}-raw.json")));
    json::write(&judged, &rows)?;
    json::write(&every, raw)?;
    println!("Wrote {} and {}", judged.display(), every.display());
    Ok(())
}
