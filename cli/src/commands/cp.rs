//! `isthmusctl cp`: the control plane's own nodes.

use std::io::{BufRead as _, IsTerminal as _, Write};

use anyhow::bail;
use isthmus_model::ids::NodeName;
use serde_json::Value;

use crate::{
    Verdict,
    args::{CpCommand, Format},
    client::Client,
    output,
    shapes::{Group, Removed, TokenRequest, TokenResponse},
    table::Table,
};

pub(super) async fn run(client: &Client, command: CpCommand, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    match command {
        CpCommand::Add { name, ttl } => {
            let request = TokenRequest { ttl_seconds: ttl.as_secs(), grant: None };
            let response: TokenResponse = client.post(&format!("nodes/{name}/join-token"), &request).await?;
            writeln!(out, "{}", response.token)?;
            eprintln!(
                "Valid once, for {}. On {name}'s machine: write it into the file that joinTokenFile in its configuration \
                 names, then start `isthmus-global-cp`. `isthmusctl cp status` shows it when it learns, and when it votes.",
                humantime::format_duration(ttl)
            );
            Ok(Verdict::Yes)
        }
        CpCommand::Status(args) => {
            let raw: Value = client.get("nodes").await?;
            match args.output {
                Format::Json => output::json(out, &raw)?,
                Format::Yaml => output::yaml(out, &raw)?,
                Format::Table => write!(out, "{}", status(&serde_json::from_value(raw)?))?,
            }
            Ok(Verdict::Yes)
        }
        CpCommand::Remove { name, yes } => remove(client, &name, yes, out).await,
    }
}

async fn remove(client: &Client, name: &NodeName, yes: bool, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    if !yes && !confirmed(name)? {
        eprintln!("Nothing was changed.");
        return Ok(Verdict::No);
    }
    let removed: Removed = client.delete(&format!("nodes/{name}")).await?;
    writeln!(out, "{} removed", removed.node)?;
    eprintln!("Stop its process; its state folder is of no use any more. `isthmusctl cp status` shows who is left.");
    Ok(Verdict::Yes)
}

fn confirmed(name: &NodeName) -> anyhow::Result<bool> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        bail!("removing {name} cannot be undone: say --yes if there is nobody to ask");
    }
    eprint!("Removing takes {name} out of the control plane for good. Type its name to go on: ");
    let mut line = String::new();
    stdin.lock().read_line(&mut line)?;
    Ok(line.trim() == name.as_str())
}

/// What it all comes to, then one line for each node.
pub(super) fn status(group: &Group) -> String {
    let voters = group.nodes.iter().filter(|node| node.votes()).count();
    let leader = group.leader.as_deref().unwrap_or("nobody");
    let survives = voters.saturating_sub(1) / 2;
    let mut text = format!(
        "{leader} leads (term {}); {voters} of {} vote, so {survives} may be lost\n\n",
        group.term,
        group.nodes.len()
    );
    text.push_str(&nodes_table(group));
    text
}

pub(super) fn nodes_table(group: &Group) -> String {
    let mut table = Table::new(&["NODE", "ID", "ROLE", "LOG", "BEHIND", "ADDRESS"]);
    for node in &group.nodes {
        let (log, behind) = match node.log_index {
            Some(at) => (at.to_string(), group.last_log_index.saturating_sub(at).to_string()),
            None => (String::new(), String::new()),
        };
        table.row([node.name.clone(), node.id.to_string(), node.role.clone(), log, behind, node.address.clone()]);
    }
    table.render(0)
}
