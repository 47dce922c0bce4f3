//! One module per command. Each fetches, decides with a pure function, prints.

#[cfg(test)]
mod access_tests;
mod audit;
mod backup;
mod cluster;
mod context;
mod cp;
mod declare;
mod describe;
mod explain;
mod get;
mod history;
mod role_binding;
mod status;
#[cfg(test)]
mod tests;
mod token;
mod wait;
mod whoami;

use std::{
    io::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::CommandFactory as _;
use isthmus_model::{
    failover::{Eligibility, Tier},
    time::Timestamp,
};

use crate::{
    Verdict,
    args::{Cli, Command, Shell},
    client::Client,
    context::{self as contexts, Choice},
};

/// Runs one command line; what it is asked for goes to `out`, everything else to stderr.
pub(crate) async fn run(cli: Cli, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let choice = Choice { context: cli.context, contexts: cli.contexts };
    // Those that talk to nobody.
    match cli.command {
        Command::Version => {
            writeln!(out, "isthmusctl {}", env!("CARGO_PKG_VERSION"))?;
            return Ok(Verdict::Yes);
        }
        Command::Completion { shell } => return completion(shell, out),
        Command::Context(command) => return context::run(&choice, command, out),
        _ => {}
    }
    let client = Client::new(contexts::load(&choice)?)?;
    match cli.command {
        Command::Token(command) => token::run(&client, command, out).await,
        Command::RoleBinding(command) => role_binding::run(&client, command, out).await,
        Command::Audit(args) => audit::run(&client, args, out).await,
        Command::Whoami(args) => whoami::run(&client, args.output, out).await,
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
        Command::Version | Command::Completion { .. } | Command::Context(_) => Ok(Verdict::Yes),
    }
}

fn completion(shell: Shell, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    // It panics if it cannot write, which a reader that has gone must not cause.
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut text);
    out.write_all(&text)?;
    Ok(Verdict::Yes)
}

/// Between two looks of `--watch`.
const INTERVAL: Duration = Duration::from_secs(1);

/// Prints `text` once, or again on every change of it, a blank line between tables.
async fn shown(
    watch: bool,
    is_table: bool,
    text: impl AsyncFn() -> anyhow::Result<String>,
    out: &mut dyn Write,
) -> anyhow::Result<Verdict> {
    let mut before = None;
    loop {
        let text = match text().await {
            Ok(text) => text,
            // Someone who watches wants to see it come back.
            Err(error) if watch && before.is_some() => format!("{error:#}\n"),
            Err(error) => return Err(error),
        };
        if before.as_ref() != Some(&text) {
            if before.is_some() && is_table {
                writeln!(out)?;
            }
            write!(out, "{text}")?;
            out.flush()?;
            before = Some(text);
        }
        if !watch {
            return Ok(Verdict::Yes);
        }
        tokio::time::sleep(INTERVAL).await;
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
