//! What a packet costs on this machine, whoever sends it: the floor under every QUIC, ours and others'.
//!
//! Each step does what the one before does, and one thing more: datagrams of a network's size over loopback; as many of them
//! for each system call as the kernel takes; sealed and opened as QUIC does it; and quinn, with one connection and nothing
//! else around it. One thread sends and one receives. Beside them TCP, whose segments on loopback
//! are up to 64 KiB. They take turns; what is shown are medians.

mod datagrams;
mod quic;
mod tcp;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::json;

use crate::report::stats;

/// Of a QUIC packet on a path with an MTU of 1,500 bytes: without IPv4's and UDP's headers, and as large as discovery finds.
const DATAGRAM: usize = 1_452;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  isthmus-bench limits --seconds 2 --rounds 3")]
pub(crate) struct Args {
    /// How long each measurement takes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Half a second each, one round.
    #[arg(long)]
    quick: bool,
    /// How many rounds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: u32,
    /// Folder for the results.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

/// What one measurement moved, and what that took.
#[derive(Clone, Copy, Debug)]
struct Moved {
    bytes: u64,
    wall: Duration,
    /// Of both threads, user and system.
    cpu: Duration,
}

impl Moved {
    /// From `began` on, when the process had used `before`.
    fn since(began: Instant, before: Duration, bytes: u64) -> Self {
        Self { bytes, wall: began.elapsed(), cpu: cpu().saturating_sub(before) }
    }

    fn gbit_per_second(self) -> f64 {
        self.bytes as f64 * 8e-9 / self.wall.as_secs_f64()
    }

    fn seconds_per_gigabyte(self) -> f64 {
        self.cpu.as_secs_f64() / (self.bytes as f64 * 1e-9)
    }
}

/// What the process has used so far.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

type Measure = fn(Duration) -> anyhow::Result<Moved>;

const STEPS: [(&str, Measure); 5] = [
    ("TCP", tcp::measure),
    ("UDP datagrams of 1,452 bytes, one at a time", datagrams::single),
    ("the same, 45 for each system call (GSO, GRO)", datagrams::bare),
    ("the same, sealed and opened (AES-128-GCM)", datagrams::sealed),
    ("quinn, one connection, one stream", quic::measure),
];

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let (time, count) =
        if args.quick { (Duration::from_millis(500), 1) } else { (Duration::from_secs(args.seconds), args.rounds) };
    let mut rounds: Vec<Vec<Moved>> = vec![Vec::new(); STEPS.len()];
    for round in 1..=count {
        for ((name, measure), moved) in STEPS.iter().zip(&mut rounds) {
            let one = measure(time).with_context(|| format!("measure {name}"))?;
            println!(
                "round {round}/{}  {name:<44} {:>6.2} Gbit/s, {:.2} CPU s/GB",
                count,
                one.gbit_per_second(),
                one.seconds_per_gigabyte()
            );
            moved.push(one);
        }
    }
    println!("\n  {:<44}  Gbit/s  CPU s/GB  µs/datagram", "one way over loopback, one thread each");
    println!("  {}", "─".repeat(74));
    let mut rows = Vec::new();
    for ((name, _), moved) in STEPS.iter().zip(&rounds) {
        let median =
            |of: fn(Moved) -> f64| stats::median(&moved.iter().map(|m| of(*m)).collect::<Vec<_>>()).unwrap_or(f64::NAN);
        let (speed, cost) = (median(Moved::gbit_per_second), median(Moved::seconds_per_gigabyte));
        let each = if *name == "TCP" { "–".to_owned() } else { format!("{:.2}", cost * DATAGRAM as f64 * 1e-3) };
        println!("  {name:<44}  {speed:>6.2}  {cost:>8.2}  {each:>11}");
        for (unit, ours) in [("Gbit/s", speed), ("s/GB", cost)] {
            rows.push(json!({
                "metric": name, "unit": unit, "ours": ours,
                "rival": null, "rival_name": null, "ratio": null, "goal": null, "holds": null,
            }));
        }
    }
    std::fs::create_dir_all(&args.out).with_context(|| format!("create {}", args.out.display()))?;
    let path = args.out.join("limits.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&rows)?).with_context(|| format!("write {}", path.display()))?;
    println!("Wrote {}", path.display());
    Ok(())
}
