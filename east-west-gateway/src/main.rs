//! The gateway's command line.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use isthmus_gateway::{Config, Feed, build, take_over};
use isthmus_runtime::{config, telemetry};

const EXAMPLES: &str = "\
Examples:
  isthmus-gateway --config gateway-1.yaml
  isthmus-gateway --config gateway-1.yaml --check-config
  isthmus-gateway --config gateway-1.yaml --take-over     # upgrade: the one that runs hands over and ends by itself
  ISTHMUS_GATEWAY__TUNNEL__MTU=6400 isthmus-gateway --config gateway-1.yaml

A minimal configuration:
  name: gateway-1
  stateDir: /var/lib/isthmus/gateway-1
  agentTokenFile: /etc/isthmus/gateway-1.token   # isthmus-agent token gateway gateway-1 --config agent.yaml
  listen:
    tunnel: 10.0.0.11:15443        # UDP, from other clusters' gateways
    local: 10.0.0.11               # TCP, from this cluster's sidecars:
    autoPort: 15440                #   the gateway chooses the cluster
    pinnedPortBase: 15500          #   plus the cluster's index: pinned to it
    health: 10.0.0.11:15080        # /livez /readyz /metrics /debug/tunnels /debug/candidates?service=NS/NAME&port=N";

/// Carries connections between clusters over QUIC tunnels, without reading them.
#[derive(Debug, Parser)]
#[command(name = "isthmus-gateway", version, after_help = EXAMPLES)]
struct Arguments {
    /// The YAML configuration; ISTHMUS_GATEWAY__SECTION__KEY in the environment overrides its keys.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Read and check the configuration, say what is wrong with it, and exit.
    #[arg(long)]
    check_config: bool,
    /// Take over from the gateway that runs with the same stateDir: it gives its sockets, and once this one serves it
    /// finishes its connections and ends. No connection is refused or cut. With none running, just start.
    #[arg(long)]
    take_over: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    isthmus_identity::install_crypto();
    match run(&Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain in one line, without a backtrace: what is wrong is for the operator, not for us.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config: Config = config::load(&arguments.config, "ISTHMUS_GATEWAY")?;
    if arguments.check_config {
        println!("{} is valid", arguments.config.display());
        return Ok(());
    }
    let telemetry = telemetry::init("isthmus-gateway", &config.name, &config.telemetry)?;
    let bound =
        if arguments.take_over { take_over(config, Feed::Agent).await } else { build(config, Feed::Agent).await };
    let bound = bound.context("start the gateway")?;
    let outcome = bound.run_until_signal().await;
    telemetry.shutdown();
    Ok(outcome?)
}
