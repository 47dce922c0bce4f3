//! The gateway's command line.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use isthmus_gateway::{Config, Feed, build, take_over};
use isthmus_runtime::{config, telemetry};

/// Verbatim: no line so long that it is wrapped, so that the configuration can be pasted.
const EXAMPLES: &str = "\
Examples:
  isthmus-gateway --config gateway-1.yaml --check-config
  isthmus-gateway --config gateway-1.yaml
  # Upgrade: the gateway that runs hands over, and ends by itself.
  isthmus-gateway --config gateway-1.yaml --take-over
  # Any key can be overridden:
  ISTHMUS_GATEWAY__TUNNEL__MTU=6400 isthmus-gateway --config gateway-1.yaml

A minimal configuration:
  name: gateway-1
  stateDir: /var/lib/isthmus/gateway-1
  # isthmus-agent token --config agent.yaml gateway gateway-1
  agentTokenFile: /etc/isthmus/gateway-1.token
  listen:
    # UDP and TCP, from other clusters' gateways (QUIC, or TLS over TCP)
    tunnel: 10.0.0.11:15443
    # TCP, from this cluster's sidecars
    local: 10.0.0.11
    # ... on this port the gateway chooses the cluster,
    autoPort: 15440
    # ... on this one plus a cluster's index, it is that cluster
    pinnedPortBase: 15500
    # HTTP: /livez /readyz /metrics /debug/tunnels /debug/listeners
    #       /debug/candidates?service=NAMESPACE/NAME&port=PORT
    health: 10.0.0.11:15080

Every key, metric and outcome: docs/gateway-configuration.md";

/// Carries connections between clusters through tunnels over QUIC or TCP, without reading them.
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
        Ok(code) => code,
        Err(error) => {
            // The chain in one line, without a backtrace: what is wrong is for the operator, not for us.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let config: Config = config::load(&arguments.config, "ISTHMUS_GATEWAY")?;
    if arguments.check_config {
        println!("{} is valid", arguments.config.display());
        return Ok(ExitCode::SUCCESS);
    }
    let telemetry = telemetry::init("isthmus-gateway", &config.name, &config.telemetry)?;
    let bound =
        if arguments.take_over { take_over(config, Feed::Agent).await } else { build(config, Feed::Agent).await };
    let bound = bound.context("start the gateway")?;
    let outcome = bound.run_until_signal().await;
    telemetry.shutdown();
    match outcome {
        // It is in the log already.
        Err(_) if tracing::enabled!(tracing::Level::ERROR) => Ok(ExitCode::FAILURE),
        outcome => Ok(outcome.map(|()| ExitCode::SUCCESS)?),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_help_shows_a_configuration_that_can_be_pasted() {
        let help = Arguments::command().render_long_help().to_string();
        let (_, rest) = help.split_once("A minimal configuration:\n").unwrap();
        let (yaml, _) = rest.split_once("\n\n").unwrap();
        assert!(yaml.lines().all(|line| line.starts_with("  ") && line.len() < 80), "{yaml}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gateway.yaml");
        // As pasted: indented.
        std::fs::write(&path, yaml).unwrap();
        let config: Config = config::load(&path, "").unwrap();
        assert_eq!(config.name, "gateway-1");
        assert!(EXAMPLES.lines().all(|line| line.len() < 80), "{EXAMPLES}");
    }
}
