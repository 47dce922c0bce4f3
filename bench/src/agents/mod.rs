//! Many agents: 10, 100 and 1,000 clusters with 100 exported services each, on a control plane of three nodes.
//!
//! Nodes are real processes; the agents are tasks of this one ([`agent`]), each with the session that a real agent has, in mutual
//! TLS, with the certificate of a cluster that joined with a token. [`fleet`] is all of them; [`measure`] is one round at one
//! size, on a fresh control plane. Nobody is beside us here: the goals are absolute.

mod agent;
mod exports;
mod fleet;
mod join;
mod measure;
mod metrics;
mod wire;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use self::{measure::Seen, metrics::CONTEST};
use crate::{
    load,
    report::{
        Row, json,
        machine::{Machine, Rival},
        print_goals,
        samples::Samples,
        table,
    },
};

/// Options.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  isthmus-bench agents                       three rounds of 10, 100 and 1,000 agents
  isthmus-bench agents --quick               a rough answer in two to three minutes
  isthmus-bench agents --agents 100 --changes 1000 --rounds 1")]
pub(crate) struct Args {
    /// One round with few changes.
    #[arg(long)]
    quick: bool,
    /// How many agents; 10, 100 and 1,000 unless given. In multiples of ten.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(10..=4_000))]
    agents: Vec<u16>,
    /// Changes of one export for each round and size; 200, with --quick 30.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    changes: Option<u16>,
    /// Rounds; 3, with --quick 1.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=20))]
    rounds: Option<u8>,
    /// Keys for the nodes' configuration over the defaults, as YAML: for trying things out.
    #[arg(long, value_name = "YAML", default_value = "")]
    keys: String,
    /// Folder for results; state and logs go to its subfolder `agents`.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

const SIZES: [u16; 3] = [10, 100, 1_000];

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
    let machine = Machine::here(Rival::Nobody);
    tokio::select! {
        outcome = measure_all(&args, &mut samples) => outcome?,
        stopped = crate::stop_signal() => {
            stopped?;
            bail!("stopped by a signal; nothing was written");
        }
    }
    machine.record(&args.out, "agents")?;
    report(&args, &samples)?;
    println!("\nTook {} s.", began.elapsed().as_secs());
    Ok(())
}

async fn measure_all(args: &Args, samples: &mut Samples) -> anyhow::Result<()> {
    let sizes = if args.agents.is_empty() { &SIZES[..] } else { &args.agents };
    ensure!(sizes.is_sorted() && sizes.iter().all(|n| n % 10 == 0), "name sizes in ascending multiples of ten");
    let most = sizes.last().copied().unwrap_or_default();
    let files = load::open_files();
    ensure!(files > u64::from(most) + 200, "{most} agents need as many open files; this process may have {files}");
    if !args.keys.is_empty() {
        samples.note(format!("the nodes are configured with {}", args.keys));
    }
    let changes = args.changes.unwrap_or(if args.quick { 30 } else { 200 });
    let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { 3 });
    for round in 1..=rounds {
        let mut before: Option<(u16, Seen)> = None;
        for agents in sizes.iter().copied() {
            let dir = crate::fresh_folder(&args.out, "agents")?;
            let seen = measure::run(&dir, &args.keys, agents, changes).await;
            let seen = seen.with_context(|| format!("{agents} agents"))?;
            println!("  round {round}  {agents:>5} agents: {seen}");
            for note in &seen.notes {
                samples.note(format!("{agents} agents: {note}"));
            }
            metrics::add(samples, agents, &seen);
            if let Some((fewer, then)) = &before {
                let each = (seen.resident - then.resident) / f64::from(agents - fewer);
                samples.add(&metrics::per_agent(agents), metrics::OURS, each);
            }
            before = Some((agents, seen));
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
    print_goals(&rows);
    let (judged, every) = (args.out.join("agents.json"), args.out.join("agents-raw.json"));
    json::write(&judged, &rows)?;
    json::write(&every, &Raw { quick: args.quick, samples })?;
    println!("Wrote {} and {}", judged.display(), every.display());
    Ok(())
}

/// What else may take as long as it takes, but not for ever.
const PATIENCE: Duration = Duration::from_secs(600);
