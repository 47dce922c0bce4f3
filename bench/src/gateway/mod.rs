//! The data path beside its rivals: throughput, latency, new connections, memory, on one machine and over a long path.
//!
//! One run starts every [`system`] on the same topology, client → A-side → B-side → server, every side a process of its own, lets
//! them take turns in rounds, and compares medians. What is measured is in [`measure`], how much of it in [`plan`], the names and
//! goals in [`metrics`]. Out: a table, `gateway.json` (one row per metric and system of ours) and `gateway-raw.json` (every round).
//!
//! Nothing here fails because a goal is missed; it fails when a system cannot be started or does not carry what its name says.

mod certificates;
mod client;
mod envoy;
mod measure;
mod metrics;
mod ours;
mod place;
mod plan;
mod process;
mod session;
mod system;

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::bail;
use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

use self::{
    certificates::Certificates,
    place::Place,
    plan::Plan,
    samples::Samples,
    session::Session,
    system::{Setting, System},
};
use crate::{
    load,
    report::{
        Row, json,
        machine::{Machine, Rival},
        print_goals, samples, table,
    },
    wan::{Link, Path},
};

/// Options.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  isthmus-bench gateway                      everything, three rounds
  isthmus-bench gateway --quick              a rough answer in two to three minutes
  isthmus-bench gateway --only bulk,rr       some of it
  isthmus-bench gateway --only wan --systems envoy-h2,ours-quic
  isthmus-bench gateway --only wan --ours '{\"tunnel\":{\"congestion\":\"bbr\"}}'")]
pub(crate) struct Args {
    /// A rough answer in two to three minutes: one round, fewer sizes.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Measure only this.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Section>,
    /// Measure only these systems.
    #[arg(long, value_enum, value_delimiter = ',')]
    systems: Vec<System>,
    /// Rounds, if not as many as planned.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=20))]
    rounds: Option<u8>,
    /// Threads of the client, and of the server.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    threads: u8,
    /// Keys for our gateways' configuration, as JSON, over the defaults: for trying things out.
    #[arg(long, value_name = "JSON", value_parser = ours::keys)]
    ours: Option<Value>,
    /// Folder for results, configurations and logs.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Throughput with several streams.
    Bulk,
    /// Small requests on warm connections.
    Rr,
    /// New connections.
    Connect,
    /// Memory for each connection.
    Memory,
    /// Over a long path with loss.
    Wan,
}

/// The file with every round.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Raw<'a> {
    quick: bool,
    systems: Vec<&'static str>,
    #[serde(flatten)]
    samples: &'a Samples,
}

/// Measures, prints the table, writes the files.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let began = Instant::now();
    tokio::select! {
        outcome = measure_all(&args) => outcome?,
        stopped = crate::stop_signal() => {
            stopped?;
            bail!("stopped by a signal; nothing was written");
        }
    }
    println!("\nTook {} s.", began.elapsed().as_secs());
    Ok(())
}

async fn measure_all(args: &Args) -> anyhow::Result<()> {
    let mut samples = Samples::default();
    let systems: Vec<System> =
        System::ALL.into_iter().filter(|s| args.systems.is_empty() || args.systems.contains(s)).collect();
    if let Some(keys) = &args.ours {
        samples.note(format!("our gateways are configured with {keys}"));
    }
    let plan = plan(args, &systems, &mut samples);
    let wanted = |section| args.only.is_empty() || args.only.contains(&section);
    let envoy = envoy::find(isthmus_e2e::federation::repository())?;
    let machine = Machine::here(Rival::Envoy(&envoy));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    println!("Envoy with --concurrency {workers}, our gateways with {workers} worker threads");

    let rtt = std::time::Duration::from_millis(plan.wan.rtt_ms);
    let link = match Link::start(Path { rtt, loss: 0.0 }) {
        Ok(link) => Some(Arc::new(link)),
        Err(error) => {
            samples.note(format!("no network namespaces, so no long path, and the machine's own loopback: {error:#}"));
            None
        }
    };
    let dir = crate::fresh_folder(&args.out, "gateway")?;
    let mut proofs = Vec::new();
    let setting = |place: Place, name: &str| -> anyhow::Result<Setting> {
        Ok(Setting {
            place,
            certificates: Certificates::make(&dir.join("certificates"))?,
            envoy: envoy.clone(),
            dir: dir.join(name),
            workers,
            streams: 16_384,
            ours: args.ours.clone().unwrap_or_default(),
        })
    };
    if [Section::Bulk, Section::Rr, Section::Connect, Section::Memory].into_iter().any(wanted) {
        let setting = setting(Place::together(link.clone()), "loopback")?;
        let mut session = Session::start(setting, args.threads.into(), &systems).await?;
        if wanted(Section::Bulk) {
            measure::bulk::run(&mut session, &plan, &mut samples).await?;
        }
        if wanted(Section::Rr) {
            measure::exchange::run(&mut session, &plan, &mut samples).await?;
        }
        if wanted(Section::Connect) {
            measure::connect::run(&mut session, &plan, &mut samples).await?;
        }
        proofs.push(session.prove().await);
        if wanted(Section::Memory) {
            measure::memory::run(&mut session, &plan, &mut samples).await?;
        }
        session.stop().await?;
    }
    if let Some(link) = link.filter(|_| wanted(Section::Wan)) {
        let mut session =
            Session::start(setting(Place::apart(link.clone()), "wan")?, args.threads.into(), &systems).await?;
        measure::wan::run(&mut session, &plan, &link, &mut samples).await?;
        proofs.push(session.prove().await);
        session.stop().await?;
    }
    // A comparison with something else than its name says is worth nothing, but worth a look.
    let proof = proofs.into_iter().collect::<anyhow::Result<()>>();
    if let Err(error) = &proof {
        samples.note(format!("INVALID: {error:#}"));
    }
    // With the results: a run that was cut short leaves the files of the one before together.
    machine.record(&args.out, "gateway")?;
    report(args, &systems, &samples)?;
    proof
}

/// As asked for, with as many connections as this machine can hold.
fn plan(args: &Args, systems: &[System], samples: &mut Samples) -> Plan {
    const WANTED: usize = 10_000;
    let open_files = load::open_files();
    let sockets = systems.iter().map(|s| s.sockets()).max().unwrap_or(1);
    let allowed = usize::try_from((open_files.saturating_sub(200)) / sockets).unwrap_or(WANTED);
    // A round number below what is allowed.
    let most = if allowed >= WANTED { WANTED } else { allowed / 100 * 100 };
    let mut plan = if args.quick { Plan::quick(most) } else { Plan::full(most) };
    if plan.memory.connections < WANTED {
        let why =
            if args.quick { "--quick".to_owned() } else { format!("a process may have {open_files} open files here") };
        samples.note(format!("{} connections instead of {WANTED}: {why}", plan.memory.connections));
    }
    if let Some(rounds) = args.rounds {
        plan.rounds = rounds.into();
        plan.memory.rounds = rounds.into();
    }
    plan
}

fn report(args: &Args, systems: &[System], samples: &Samples) -> anyhow::Result<()> {
    let lines: Vec<table::Line<'_>> = samples.metrics.iter().map(|m| (&m.metric, &m.rounds)).collect();
    let columns: Vec<table::Column> =
        metrics::COLUMNS.into_iter().filter(|c| systems.iter().any(|s| s.name() == c.system)).collect();
    println!("{}", table::render(&lines, &columns, metrics::CONTEST, &metrics::GROUPS));
    for note in &samples.notes {
        println!("  note: {note}");
    }
    let rows: Vec<Row> = lines.iter().flat_map(|(metric, rounds)| metric.rows(metrics::CONTEST, rounds)).collect();
    print_goals(&rows);
    println!("Ratios are ours to the best rival of the same protection, medians of all rounds.");
    let raw = Raw { quick: args.quick, systems: systems.iter().map(|s| s.name()).collect(), samples };
    for (name, written) in [
        ("gateway.json", json::write(&args.out.join("gateway.json"), &rows)),
        ("gateway-raw.json", json::write(&args.out.join("gateway-raw.json"), &raw)),
    ] {
        written?;
        println!("Wrote {}", args.out.join(name).display());
    }
    Ok(())
}
