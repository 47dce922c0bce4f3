//! `isthmus-dns`: reads its configuration, starts the server, and says what went wrong.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use isthmus_dns::{Config, config::ENV_PREFIX};
use isthmus_runtime::{config, telemetry};

/// DNS server of an Isthmus cluster: answers clusterset.local, forwards everything else.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "Examples:\n  \
        isthmus-dns --config dns.yaml\n  \
        isthmus-dns --config dns.yaml --check-config\n  \
        ISTHMUS_DNS__LISTEN__DNS=127.1.1.2:5353 isthmus-dns --config dns.yaml\n\n\
        Configuration:\n  \
        name: dns-1\n  \
        stateDir: /var/lib/isthmus-dns\n  \
        # isthmus-agent token --config agent.yaml dns dns-1\n  \
        agentTokenFile: /run/isthmus/dns.token\n  \
        listen: { dns: 127.1.1.2:5353, health: 127.1.1.2:9153 }\n  \
        upstreams: [192.0.2.1:53]                  # for other names; none: they are refused\n\n\
        Ask it:\n  \
        dig @127.1.1.2 -p 5353 cart.shop.svc.clusterset.local\n  \
        dig @127.1.1.2 -p 5353 SRV _http._tcp.cart.shop.svc.clusterset.local\n  \
        dig @127.1.1.2 -p 5353 TXT _failover.cart.shop.svc.clusterset.local"
)]
struct Cli {
    /// YAML configuration file
    #[arg(long, env = "ISTHMUS_DNS_CONFIG", value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration, say what is wrong with it, and end
    #[arg(long)]
    check_config: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    isthmus_identity::install_crypto();
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain alone: a backtrace helps nobody who mistyped an address.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let config: Config = config::load(&cli.config, ENV_PREFIX)?;
    if cli.check_config {
        println!("{}: ok", cli.config.display());
        return Ok(());
    }
    let _telemetry = telemetry::init("isthmus-dns", &config.name, &config.telemetry).context("start telemetry")?;
    let bound = isthmus_dns::build(config).await?;
    tracing::info!(dns = %bound.dns_addr(), health = %bound.health_addr(), "listening");
    Ok(bound.run().await?)
}
