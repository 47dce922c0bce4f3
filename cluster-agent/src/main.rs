//! The command line of `isthmus-agent`: the cluster's agent, its tokens, and the launcher beside a workload.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use isthmus_agent::{
    Config,
    local::{admin, tokens::Subject},
    sidecar,
};

/// The agent of one cluster of an Isthmus federation.
#[derive(Parser)]
#[command(
    name = "isthmus-agent",
    version,
    after_help = "Examples:\n  \
        isthmus-agent run --config agent.yaml --check-config\n  \
        isthmus-agent run --config agent.yaml\n  \
        isthmus-agent token --config agent.yaml gateway gateway-1 > gateway-1.token\n  \
        isthmus-agent token --config agent.yaml workload shop/cart > cart.token\n  \
        isthmus-agent sidecar --config cart-sidecar.yaml"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the cluster's agent.
    #[command(
        after_help = "Example:\n  isthmus-agent run --config agent.yaml\n\nThe first start needs `joinTokenFile` \
                            in the configuration: mint the token with `isthmusctl cluster join-token CLUSTER`."
    )]
    Run(RunArgs),
    /// Mint a one-time token for a gateway, DNS server or workload of this cluster.
    #[command(after_help = "Examples:\n  isthmus-agent token --config agent.yaml gateway gateway-1\n  \
                            isthmus-agent token --config agent.yaml dns dns-1\n  \
                            isthmus-agent token --config agent.yaml --ttl 1h workload shop/cart")]
    Token(TokenArgs),
    /// Run the launcher beside a workload: its certificate, its Envoy.
    #[command(after_help = "Example:\n  isthmus-agent sidecar --config cart-sidecar.yaml")]
    Sidecar(RunArgs),
}

#[derive(Args)]
struct RunArgs {
    /// The YAML configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration and exit.
    #[arg(long)]
    check_config: bool,
}

#[derive(Args)]
struct TokenArgs {
    /// The configuration file of the agent that runs on this machine.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// How long the token can be used, at most 24h.
    #[arg(long, default_value = "15m", value_parser = ttl, global = true)]
    ttl: Duration,
    #[command(subcommand)]
    subject: TokenSubject,
}

#[derive(Subcommand)]
enum TokenSubject {
    /// For the gateway of this name.
    Gateway {
        /// Unique within the cluster.
        name: String,
    },
    /// For the DNS server of this name.
    Dns {
        /// Unique within the cluster.
        name: String,
    },
    /// For a workload's sidecar launcher.
    Workload {
        /// NAMESPACE/SERVICE-ACCOUNT.
        account: String,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    isthmus_identity::install_crypto();
    let outcome = match Cli::parse().command {
        Command::Run(args) => run(args).await,
        Command::Token(args) => token(args).await,
        Command::Sidecar(args) => launch(args).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config)?;
    if args.check_config {
        println!("{}: ok", args.config.display());
        return Ok(());
    }
    let instance = config.cluster.to_string();
    let _telemetry =
        isthmus_runtime::telemetry::init("isthmus-agent", &instance, &config.telemetry).context("set up telemetry")?;
    let bound = isthmus_agent::build(config).await?;
    tracing::info!(local = %bound.local_addr(), health = %bound.health_addr(), "the agent starts");
    Ok(bound.run().await?)
}

async fn token(args: TokenArgs) -> anyhow::Result<()> {
    let path = args.config.context("say which agent: --config FILE of the agent that runs on this machine")?;
    let config = Config::load(&path)?;
    let subject = match args.subject {
        TokenSubject::Gateway { name } => Subject::Gateway(name),
        TokenSubject::Dns { name } => Subject::Dns(name),
        TokenSubject::Workload { account } => {
            let (namespace, service_account) =
                account.split_once('/').with_context(|| format!("write {account:?} as NAMESPACE/SERVICE-ACCOUNT"))?;
            Subject::Workload { namespace: namespace.parse()?, service_account: service_account.to_owned() }
        }
    };
    let token = admin::mint(&config.state_dir, subject, args.ttl).await?;
    println!("{token}");
    Ok(())
}

async fn launch(args: RunArgs) -> anyhow::Result<()> {
    let config = sidecar::Config::load(&args.config)?;
    if args.check_config {
        println!("{}: ok", args.config.display());
        return Ok(());
    }
    sidecar::run(config).await
}

fn ttl(text: &str) -> Result<Duration, String> {
    let ttl = humantime::parse_duration(text).map_err(|e| format!("{e}; write 15m or 1h"))?;
    match ttl.as_secs() {
        1..=86_400 => Ok(ttl),
        _ => Err("use 1s to 24h".to_owned()),
    }
}
