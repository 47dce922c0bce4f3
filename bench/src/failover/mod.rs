//! failover.

/// Options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A rough answer in two minutes.
    #[arg(long)]
    pub quick: bool,
}

/// Runs it.
pub async fn run(_args: Args) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
