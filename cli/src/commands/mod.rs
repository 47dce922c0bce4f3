//! One module per command. Each fetches, decides with a pure function, prints.

mod backup;
mod cluster;
mod cp;
mod declare;
mod describe;
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
        Command::Get(args) => get::run(&client, args, out).await,
        Command::Describe { kind, name } => describe::run(&client, kind, &name, out).await,
        Command::Apply(args) => declare::apply(&client, args, out).await,
        Command::Delete(args) => declare::delete(&client, args, out).await,
        Command::Explain(args) => explain::run(&client, args, out).await,
        Command::Wait(args) => wait::run(&client, args, out).await,
        Command::History(args) => history::run(&client, args, out).await,
        Command::Diff(args) => match (args.from, args.to) {
            (Some(from), Some(to)) => history::diff(&client, (from, to), args.format.output, out).await,
            _ => declare::diff(&client, &args.files, out).await,
        },
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

/// "a, b and 3 more".
fn rough_list(items: impl Iterator<Item = String>) -> String {
    const NAMED: usize = 5;
    let items: Vec<String> = items.collect();
    let named = items.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match items.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
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
        Eligibility::Draining => "draining",
        Eligibility::Unreachable => "unreachable",
        Eligibility::NoEndpoints => "no-endpoints",
        Eligibility::Forbidden => "forbidden",
    }
}
