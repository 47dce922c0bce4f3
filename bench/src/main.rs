//! isthmus-bench: measures Isthmus against what people would use instead, side by side, in one run.
//!
//! One module per benchmark ([`gateway`], [`failover`], [`limits`], [`raft`], [`agents`]); [`load`] and [`node`] are processes that they
//! start; [`control`] is a control plane of three nodes; [`wan`] is a lossy link between network namespaces; [`report`] turns measurements into tables, JSON and plots. Nothing here asserts speed: it
//! measures and says what held.

mod agents;
mod control;
mod failover;
mod gateway;
mod limits;
mod load;
mod node;
mod raft;
mod report;
mod wan;

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::Parser;

/// Commands of our own processes. No mistyped word is near enough to one that clap would suggest it.
const INTERNAL_NODE: &str = "internal-part-node";
const INTERNAL_CLIENT: &str = "internal-part-client";
const INTERNAL_SERVER: &str = "internal-part-server";

/// Benchmarks of Isthmus against its rivals.
#[derive(Debug, Parser)]
#[command(version, after_help = "Examples:\n  isthmus-bench gateway --quick\n  isthmus-bench failover")]
enum Args {
    /// Throughput, latency, new connections and memory of the data path, beside Envoy.
    Gateway(gateway::Args),
    /// Faults of gateways and clusters under load, beside Envoy with Istio's defaults.
    Failover(failover::Args),
    /// Committed writes of the control plane, beside etcd.
    Raft(raft::Args),
    /// A thousand agents on one control plane: time to sync, time of a change, memory.
    Agents(agents::Args),
    /// What a packet costs on this machine, whoever sends it.
    Limits(limits::Args),
    /// A link with delay and loss between two network namespaces.
    Wan(wan::Args),
    /// Puts the last results into docs/benchmarks.md, with plots.
    Report(report::page::Args),
    /// One gateway, for the benchmarks' own use.
    #[command(hide = true, name = INTERNAL_NODE)]
    Node(node::Args),
    /// The load's client, for the benchmarks' own use.
    #[command(hide = true, name = INTERNAL_CLIENT)]
    Client(load::client::Args),
    /// The load's server, for the benchmarks' own use.
    #[command(hide = true, name = INTERNAL_SERVER)]
    Server(load::server::Args),
}

#[tokio::main]
async fn main() -> ExitCode {
    isthmus_identity::install_crypto();
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain in one line, without a backtrace: what is wrong is for whoever measures, not for us.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    match args {
        Args::Gateway(args) => gateway::run(args).await,
        Args::Failover(args) => failover::run(args).await,
        Args::Agents(args) => agents::run(args).await,
        Args::Raft(args) => raft::run(args).await,
        // With runtimes of its own.
        Args::Limits(args) => {
            let measured = std::thread::spawn(move || limits::run(&args)).join();
            measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        }
        Args::Wan(args) => wan::run(args).await,
        Args::Report(args) => report::page::run(&args),
        Args::Node(args) => node::run(&args).await,
        // These use no runtime: epoll loops on threads of their own.
        Args::Client(args) => load::client::run(&args),
        Args::Server(args) => load::server::run(&args),
    }
}

/// The folder `out`/`name`, absolute and empty: a run does not find what the one before left.
fn fresh_folder(out: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let dir = std::path::absolute(out).context("resolve --out")?.join(name);
    match std::fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("clear {}", dir.display()));
        }
        _ => std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?,
    }
    Ok(dir)
}

/// Returns when someone wants this to end.
async fn stop_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt.context("listen for Ctrl-C"),
        _ = terminate.recv() => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(arguments: &[&str]) -> String {
        Args::try_parse_from([&["isthmus-bench"], arguments].concat()).unwrap_err().to_string()
    }

    #[test]
    fn numbers_that_measure_nothing_are_refused() {
        for bad in [
            ["failover", "--rounds", "0"],
            ["gateway", "--rounds", "0"],
            ["gateway", "--threads", "0"],
            ["raft", "--rounds", "0"],
            ["raft", "--writers", "0"],
            ["agents", "--rounds", "0"],
            ["agents", "--changes", "0"],
        ] {
            assert!(refused(&bad).contains("0 is not in 1..="), "{bad:?}: {}", refused(&bad));
        }
        assert!(refused(&["failover", "--rounds", "21"]).contains("1..=20"));
    }

    #[test]
    fn a_mistyped_command_does_not_lead_to_one_of_our_own() {
        for word in ["nope", "nod", "node", "clinet", "serve"] {
            assert!(!refused(&[word]).contains("internal"), "{}", refused(&[word]));
        }
        assert!(refused(&["failovr"]).contains("'failover'"));
    }
}
