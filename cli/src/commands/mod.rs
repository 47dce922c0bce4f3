//! One module per command. Each fetches, decides with a pure function, prints.

mod backup;
mod cluster;
mod cp;
mod explain;
mod get;
mod history;
mod status;
#[cfg(test)]
mod tests;
mod wait;

use std::{
    io::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use isthmus_model::{
    failover::{Eligibility, Tier},
    time::Timestamp,
};

use crate::{
    Verdict,
    args::{Cli, Command},
    client::Client,
    context,
};

/// Runs one command line; what it is asked for goes to `out`, everything else to stderr.
pub(crate) async fn run(cli: Cli, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    if let Command::Version = cli.command {
        writeln!(out, "isthmusctl {}", env!("CARGO_PKG_VERSION"))?;
        return Ok(Verdict::Yes);
    }
    let client = Client::new(context::load(cli.context)?)?;
    match cli.command {
        Command::Cluster(command) => cluster::run(&client, command, out).await,
        Command::Cp(command) => cp::run(&client, command, out).await,
        Command::Status(args) => status::run(&client, args, out).await,
        Command::Get(command) => get::run(&client, command, out).await,
        Command::Explain(args) => explain::run(&client, args, out).await,
        Command::Wait(args) => wait::run(&client, args, out).await,
        Command::History(args) => history::run(&client, args, out).await,
        Command::Diff { from, to, format } => history::diff(&client, (from, to), format.output, out).await,
        Command::Rollback { revision } => history::rollback(&client, revision, out).await,
        Command::Backup { file } => backup::take(&client, &file).await,
        Command::Restore { file, yes } => backup::restore(&client, &file, yes, out).await,
        Command::Version => Ok(Verdict::Yes),
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// "12s", "3m 5s": whole seconds, two units at most.
fn rough(duration: Duration) -> String {
    let text = humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

fn tier(tier: Tier) -> &'static str {
    match tier {
        Tier::LocalCluster => "own cluster",
        Tier::LocalZone => "same zone",
        Tier::LocalRegion => "same region",
        Tier::Any => "any",
    }
}

fn state(eligibility: &Eligibility) -> &'static str {
    match eligibility {
        Eligibility::Ready => "ready",
        Eligibility::HoldDown { .. } => "hold-down",
        Eligibility::Unknown => "unknown",
        Eligibility::Unreachable => "unreachable",
        Eligibility::NoEndpoints => "no-endpoints",
        Eligibility::Forbidden => "forbidden",
    }
}
