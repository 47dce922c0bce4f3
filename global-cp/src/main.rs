//! The `isthmus-global-cp` program: command line, configuration, telemetry, and the exit status.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use isthmus_global_cp::{build, config::Config};
use isthmus_runtime::{config, telemetry};

/// The global control plane of an Isthmus federation.
#[derive(Parser)]
#[command(version, about, after_help = EXAMPLES)]
struct Cli {
    /// The configuration file (YAML).
    #[arg(long, value_name = "FILE", env = "ISTHMUS_CP_CONFIG")]
    config: PathBuf,
    /// Only check the configuration: exit 0 if it is good, else say all that is wrong with it.
    #[arg(long)]
    check_config: bool,
    /// Once after the state folder was restored from a backup: makes every agent take this node's state, whatever it
    /// holds. Agents of clusters that joined after the backup must join again, and what was revoked after it must be
    /// revoked again. Indexes and revocations that the backup has stay.
    #[arg(long)]
    new_epoch: bool,
}

const EXAMPLES: &str = "\
Examples:
  isthmus-global-cp --config global-cp.yaml
  isthmus-global-cp --config global-cp.yaml --check-config
  # Once, after a restore from backup:
  isthmus-global-cp --config global-cp.yaml --new-epoch
  ISTHMUS_CP__TELEMETRY__LOG__LEVEL=debug isthmus-global-cp --config global-cp.yaml

A configuration file:
  node: cp-1
  federation: isthmus.example
  stateDir: /var/lib/isthmus/global-cp
  listen: { grpc: 127.1.0.1:7443, admin: 127.1.0.1:7444, health: 127.1.0.1:7445 }
  advertise: 127.1.0.1:7443             # agents dial it; goes into join tokens
  settings: { failover: { holdDownMs: 3000 } }

Then, on the same machine:
  isthmusctl --context /var/lib/isthmus/global-cp/admin/context.yaml cluster join-token us-east";

fn main() -> ExitCode {
    isthmus_identity::install_crypto();
    let args = Cli::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain in one line, without a backtrace: what is wrong is for the operator, not for us.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Cli) -> anyhow::Result<()> {
    let mut config: Config = config::load(&args.config, "ISTHMUS_CP")?;
    if args.check_config {
        println!("{} is valid", args.config.display());
        return Ok(());
    }
    config.new_epoch = args.new_epoch;
    if config.telemetry.log.level == "info" {
        // The engine tells every step of an election at INFO. Whoever wants that names a filter of their own.
        config.telemetry.log.level = "info,openraft=warn".to_owned();
    }
    let telemetry = telemetry::init("isthmus-global-cp", config.node.as_str(), &config.telemetry)?;
    let runtime = tokio::runtime::Runtime::new().context("start the async runtime")?;
    let ended = runtime.block_on(async {
        let bound = build(config).await.context("start the control plane")?;
        bound.run().await.context("run the control plane")
    });
    runtime.shutdown_background();
    telemetry.shutdown();
    ended
}
