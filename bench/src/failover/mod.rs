//! Failover under load: kill -9, SIGSTOP, blackhole and drain of one far gateway and of a whole far cluster, ours beside
//! Envoy as Istio sets it up.
//!
//! A client in one cluster calls an HTTP service that lives in two others. [`ours`] is the demo's federation, real in every
//! part; [`rival`] is Envoy in every place, calling the same apps. [`load`] is the same for both; [`measure`] is one fault
//! from steady load to recovery; [`results`] sums up. All of it runs in a namespace of its own ([`netns`]) and ends with it.

mod client;
mod fault;
mod impact;
mod load;
mod measure;
mod netns;
mod ours;
mod results;
mod rival;
mod rival_config;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use isthmus_e2e::federation::process::Binaries;

use self::{
    fault::{Fault, Scope},
    measure::{Contender, Field, Pace, RATE},
    ours::{FAR, NEAR, Ours},
    results::{Entry, Results},
    rival::Rival,
    rival_config::Tuning,
};
use crate::report::machine::{self, Machine};

/// Options.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// One round with less patience instead of three
    #[arg(long)]
    quick: bool,
    /// Only these faults
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Fault>,
    /// Only faults of this extent
    #[arg(long, value_enum)]
    scope: Option<Scope>,
    /// Only these systems: ours, istio (its defaults), istio-100 (but may eject every gateway), tuned (as an expert would),
    /// istio-h2 (its defaults, HTTP/2 between sidecars). Default: ours, istio, and without --quick also istio-100, tuned
    #[arg(long, value_delimiter = ',')]
    systems: Vec<String>,
    /// How many rounds; 1 with --quick, else 3
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=20))]
    rounds: Option<u8>,
    /// Folder for the results; state and logs go to its subfolder `failover`
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

const FAULTS: [Fault; 4] = [Fault::Kill, Fault::Stop, Fault::Blackhole, Fault::Drain];
const OURS: &str = "ours";
/// What the ratio is to.
const RIVAL: &str = "istio";

/// Taken without being asked for.
const SYSTEMS: [&str; 4] = [OURS, RIVAL, "istio-100", "tuned"];
const QUICK_SYSTEMS: [&str; 2] = [OURS, RIVAL];

/// The rival's rows, the one that counts first.
fn rows() -> Vec<(&'static str, Tuning)> {
    let istio = Tuning {
        http2: false,
        pings: None,
        connect_timeout: Duration::from_secs(10),
        interval: Duration::from_secs(10),
        // Of four gateways that is none, so that Envoy ejects nothing here; hence the next row.
        max_ejection_percent: 10,
        expert_retries: false,
    };
    let second = Duration::from_secs(1);
    let tuned = Tuning {
        http2: true,
        pings: Some((second, second)),
        connect_timeout: second,
        interval: second,
        max_ejection_percent: 100,
        expert_retries: true,
    };
    vec![
        (RIVAL, istio.clone()),
        ("istio-100", Tuning { max_ejection_percent: 100, ..istio.clone() }),
        ("tuned", tuned),
        ("istio-h2", Tuning { http2: true, ..istio }),
    ]
}

/// Runs it.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    if !netns::inside() {
        let Some(status) = netns::enter().await? else {
            println!("\nInterrupted; everything is stopped.");
            std::process::exit(130);
        };
        std::process::exit(status.code().unwrap_or(1));
    }
    netns::set_up().await?;
    let dir = args.out.join("failover");
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let dir = dir.canonicalize().with_context(|| format!("resolve {}", dir.display()))?;
    let contenders = contenders(&args)?;
    Machine::here(machine::Rival::Envoy(&Binaries::find()?.envoy)).record(&args.out, "failover")?;
    let mut field = set_the_field(&dir).await?;
    let mut results = Results::default();
    let played = play(&args, &contenders, &mut field, &mut results).await;
    // What was measured is shown even if something went wrong later.
    let rivals: Vec<&str> = contenders.iter().map(|(name, _)| *name).filter(|name| *name != OURS).collect();
    println!("\n{}", results.table(&rivals));
    println!(
        "failed / slow (over 250 ms) / from the fault to the end of the last such request; medians of the rounds."
    );
    println!("≥: still affected when the benchmark stopped looking. Ratio: ours to {RIVAL}'s.");
    std::fs::write(args.out.join("failover-reasons.txt"), results.reasons()).context("write failover-reasons.txt")?;
    results.write(&args.out.join("failover.json"), RIVAL)?;
    println!(
        "Figures: {0}/failover.json, time lines: {0}/failover-raw.json, why requests failed: {0}/failover-reasons.txt, \
              logs: {0}/failover/",
        args.out.display()
    );
    field.ours.stop().await?;
    played?;
    println!("{}", results.conclusion());
    Ok(())
}

async fn set_the_field(dir: &Path) -> anyhow::Result<Field> {
    let began = Instant::now();
    println!("Starting three clusters of ours, and Envoy's two with their clients …");
    let ours = Ours::start(&dir.join("ours")).await.context("start our federation")?;
    let apps = [ours.app(NEAR)?, ours.app(FAR)?];
    let rival = Rival::start(&dir.join("rival"), apps, &rows()).await.context("start Envoys")?;
    println!(
        "All run after {:.1} s. {RATE} requests/s, each timed from when it was due.",
        began.elapsed().as_secs_f32()
    );
    Ok(Field { ours, rival })
}

async fn play(
    args: &Args,
    contenders: &[(&'static str, Contender)],
    field: &mut Field,
    results: &mut Results,
) -> anyhow::Result<()> {
    let seconds = Duration::from_secs;
    let pace = if args.quick {
        Pace { patience: seconds(5), quiet: seconds(2), at_most: seconds(10) }
    } else {
        Pace { patience: seconds(15), quiet: seconds(5), at_most: seconds(30) }
    };
    let rounds = u32::from(args.rounds.unwrap_or(if args.quick { 1 } else { 3 }));
    let faults: &[Fault] = if args.only.is_empty() { &FAULTS } else { &args.only };
    let began = Instant::now();
    for round in 1..=rounds {
        for fault in faults.iter().copied() {
            for scope in [Scope::Gateway, Scope::Cluster].into_iter().filter(|s| args.scope.is_none_or(|o| o == *s)) {
                for (name, who) in contenders {
                    let what = format!("{name}: {} of a {}", fault.name(), scope.name());
                    let finding = field.measure(*who, (fault, scope), pace).await.with_context(|| what.clone())?;
                    let i = &finding.impact;
                    let noise = if i.affected_before > 0 { ", some affected before it" } else { "" };
                    println!(
                        "{:6.1}s  round {round}  {what:<32} {:>5} requests, {:>5} failed, {:>5} slow, last affected after \
                         {}{} ms{noise}  {:?}",
                        began.elapsed().as_secs_f32(),
                        i.requests,
                        i.failed,
                        i.slow,
                        if i.settled { "" } else { "≥ " },
                        i.last_affected_ms,
                        i.served,
                    );
                    let (system, victims, impact) = ((*name).to_owned(), finding.victims, finding.impact);
                    results.add(Entry { round, system, fault, scope, victims, impact });
                    results.write_raw(&args.out.join("failover-raw.json"))?;
                }
            }
        }
    }
    Ok(())
}

/// By name, in the order in which they take turns.
fn contenders(args: &Args) -> anyhow::Result<Vec<(&'static str, Contender)>> {
    let rivals = rows().into_iter().enumerate().map(|(row, (name, _))| (name, Contender::Rival(row)));
    let all: Vec<_> = std::iter::once((OURS, Contender::Ours)).chain(rivals).collect();
    let unasked: &[&str] = if args.quick { &QUICK_SYSTEMS } else { &SYSTEMS };
    let asked: Vec<&str> = args.systems.iter().map(String::as_str).collect();
    let asked = if asked.is_empty() { unasked.to_vec() } else { asked };
    for name in &asked {
        ensure!(
            all.iter().any(|(known, _)| known == name),
            "there is no system {name}: {}",
            all.iter().map(|(known, _)| *known).collect::<Vec<_>>().join(", ")
        );
    }
    Ok(all.into_iter().filter(|(name, _)| asked.contains(name)).collect())
}
