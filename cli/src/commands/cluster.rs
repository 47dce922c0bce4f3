//! `isthmusctl cluster`: admit, cut off, list.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, IsTerminal as _, Write},
};

use anyhow::bail;
use isthmus_model::{
    grant::{ClusterGrant, Namespaces},
    ids::ClusterName,
};
use serde_json::Value;

use super::{now, rough};
use crate::{
    Verdict,
    args::{ClusterCommand, Format},
    client::Client,
    output,
    shapes::{Changed, Cluster, Revoked, Session, Status, TokenRequest, TokenResponse},
    suggest,
    table::Table,
};

pub(super) async fn run(client: &Client, command: ClusterCommand, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    match command {
        ClusterCommand::JoinToken { name, ttl, export_namespaces, import_namespaces } => {
            let path = Client::cluster_path(&name, "join-token");
            let grant = grant(export_namespaces, import_namespaces)?;
            let request = TokenRequest { ttl_seconds: ttl.as_secs(), grant: grant.clone() };
            let response: TokenResponse = client.post(&path, &request).await?;
            writeln!(out, "{}", response.token)?;
            eprintln!(
                "Valid once, for {}. On {name}'s machine: write it into the file that joinTokenFile in the agent's \
                 configuration names, then start `isthmus-agent run`.",
                humantime::format_duration(ttl)
            );
            if grant.is_none() {
                eprintln!(
                    "Unless a grant was declared for it, {name} may export and import services of all namespaces. Narrower: \
                     --export-namespaces shop,pay --import-namespaces shop here, or `isthmusctl apply` a ClusterGrant at \
                     any time (`isthmusctl get clustergrants`)."
                );
            }
        }
        ClusterCommand::Drain { name } => {
            let changed = change(client, &name, "drain").await?;
            tell(out, &changed, &format!("{name} is draining"), &format!("{name} is draining already"))?;
            if changed.changed {
                eprintln!(
                    "Other clusters send new connections elsewhere as long as anybody else can take them; `isthmusctl cluster \
                     undrain {name}` lets them come again."
                );
            }
        }
        ClusterCommand::Undrain { name } => {
            let changed = change(client, &name, "undrain").await?;
            tell(out, &changed, &format!("{name} takes traffic again"), &format!("{name} was not draining"))?;
        }
        ClusterCommand::ConfirmWithdrawal { name } => {
            let changed = change(client, &name, "confirm-withdrawal").await?;
            let withdrawn = format!("what {name} withdrew is gone");
            tell(out, &changed, &withdrawn, &format!("nothing that {name} withdrew is held"))?;
        }
        ClusterCommand::Revoke { name, yes } => return revoke(client, &name, yes, out).await,
        ClusterCommand::List(args) => {
            let raw: Value = client.get("status").await?;
            match args.output {
                Format::Json => output::json(out, raw.get("clusters").unwrap_or(&Value::Null))?,
                Format::Yaml => output::yaml(out, raw.get("clusters").unwrap_or(&Value::Null))?,
                Format::Table => {
                    let status: Status = serde_json::from_value(raw)?;
                    write!(out, "{}", list(&status))?;
                }
            }
        }
    }
    Ok(Verdict::Yes)
}

/// What the flags say; `None` if nothing.
fn grant(export: Vec<String>, import: Vec<String>) -> anyhow::Result<Option<ClusterGrant>> {
    if export.is_empty() && import.is_empty() {
        return Ok(None);
    }
    let namespaces = |names: Vec<String>| match names.is_empty() {
        true => Ok(Namespaces::All),
        // Nothing at all is written as an empty name.
        false => Namespaces::try_from(names.into_iter().filter(|name| !name.is_empty()).collect::<BTreeSet<_>>()),
    };
    Ok(Some(ClusterGrant {
        export_namespaces: namespaces(export)?,
        import_namespaces: namespaces(import)?,
        ..ClusterGrant::default()
    }))
}

async fn change(client: &Client, name: &ClusterName, verb: &str) -> anyhow::Result<Changed> {
    client.post(&Client::cluster_path(name, verb), &Value::Object(Default::default())).await
}

fn tell(out: &mut dyn Write, changed: &Changed, done: &str, nothing: &str) -> anyhow::Result<()> {
    match changed.changed {
        true => writeln!(out, "{done}, as revision {}", changed.stamp)?,
        false => writeln!(out, "{nothing}")?,
    }
    Ok(())
}

async fn revoke(client: &Client, name: &ClusterName, yes: bool, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let status: Status = client.get("status").await?;
    let Some(cluster) = status.clusters.iter().find(|c| c.name == name.as_str()) else {
        bail!(unknown_cluster(name, &status));
    };
    if !cluster.is_active() {
        eprintln!("{name} is revoked already.");
        return Ok(Verdict::Yes);
    }
    if !yes && !confirmed(name)? {
        eprintln!("Nothing was changed.");
        return Ok(Verdict::No);
    }
    let revoked: Revoked =
        client.post(&Client::cluster_path(name, "revoke"), &Value::Object(Default::default())).await?;
    writeln!(out, "{name} revoked at revision {}", revoked.stamp)?;
    eprintln!("`isthmusctl wait` tells when every connected consumer has it.");
    Ok(Verdict::Yes)
}

/// Asks for the name, as it cannot be undone.
fn confirmed(name: &ClusterName) -> anyhow::Result<bool> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        bail!("revoking {name} cannot be undone: say --yes if there is nobody to ask");
    }
    eprint!("Revoking cuts {name} off for good. Type its name to go on: ");
    let mut line = String::new();
    stdin.lock().read_line(&mut line)?;
    Ok(line.trim() == name.as_str())
}

/// With near names, if there are any.
pub(super) fn unknown_cluster(name: &ClusterName, status: &Status) -> String {
    let near = suggest::near(name.as_str(), status.clusters.iter().map(|c| c.name.clone()));
    let hint = match near.as_slice() {
        [] => "`isthmusctl cluster list` shows all".to_owned(),
        near => format!("did you mean {}?", near.join(" or ")),
    };
    format!("there is no cluster {name} in this federation; {hint}")
}

fn list(status: &Status) -> String {
    let mut table = Table::new(&["NAME", "STATE", "REGION", "ZONE", "SESSION"]);
    for c in &status.clusters {
        table.row([c.name.clone(), c.state.clone(), c.region.clone(), c.zone.clone(), session(c)]);
    }
    if table.is_empty() {
        return "No cluster has joined yet. `isthmusctl cluster join-token NAME` makes the first token.\n".to_owned();
    }
    table.render(0)
}

/// "connected", or since when it is not. Sessions are in the control plane's memory only.
pub(super) fn session(cluster: &Cluster) -> String {
    match cluster.session {
        Some(Session { connected: true, .. }) => "connected".to_owned(),
        Some(Session { last_seen_ms: Some(at), .. }) if at > 0 => {
            format!("lost {} ago", rough(now().since(isthmus_model::time::Timestamp(at))))
        }
        _ => "not since restart".to_owned(),
    }
}
