//! `isthmusctl describe`: one thing, with what is known of it, for people.

use std::{fmt::Write as _, io::Write};

use isthmus_model::{global::GlobalService, time::Timestamp};

use super::{get, now, rough};
use crate::{
    Verdict,
    args::Kind,
    client::Client,
    output,
    shapes::{Cluster, NamedCluster, Status},
};

pub(super) async fn run(client: &Client, kind: Kind, name: &str, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let found = get::fetch(client, kind, Some(name)).await?;
    let Some(object) = found.into_iter().next() else { return Ok(Verdict::No) };
    match kind {
        Kind::Services => write!(out, "{}", service(&serde_json::from_value(object)?)?)?,
        Kind::Clusters => {
            let status: Status = client.get("status").await?;
            let session = status.clusters.iter().find(|cluster| cluster.name == name);
            write!(out, "{}", cluster(&serde_json::from_value(object)?, session)?)?;
        }
        Kind::Nodes | Kind::Settings | Kind::ClusterGrants => output::yaml(out, &object)?,
    }
    Ok(Verdict::Yes)
}

pub(super) fn service(service: &GlobalService) -> anyhow::Result<String> {
    let mut text = get::services_table(std::slice::from_ref(service), false);
    writeln!(text, "\nName: {}.{}.svc.clusterset.local", service.name.name(), service.name.namespace)?;
    writeln!(text, "Exported by, the oldest first, which wins where they differ:")?;
    let mut exporters: Vec<_> = service.exporters.iter().collect();
    exporters.sort_by_key(|(cluster, exporter)| (exporter.created_at, *cluster));
    for (cluster, exporter) in exporters {
        writeln!(text, "  {cluster}, since {}", time(exporter.created_at))?;
        let ports: Vec<String> =
            service.ports.iter().filter(|p| p.clusters.contains(cluster)).map(|p| p.port.number.to_string()).collect();
        writeln!(text, "    ports: {}", if ports.is_empty() { "none".to_owned() } else { ports.join(", ") })?;
        for identity in &exporter.identities {
            writeln!(text, "    {identity}")?;
        }
    }
    for conflict in &service.conflicts {
        writeln!(text, "{}: {}", conflict.reason, conflict.message)?;
    }
    Ok(text)
}

pub(super) fn cluster(cluster: &NamedCluster, session: Option<&Cluster>) -> anyhow::Result<String> {
    let mut text = get::clusters_table(std::slice::from_ref(cluster), false);
    text.push('\n');
    if let Some(until) = cluster.token_expires_at {
        let left = Timestamp(until).since(now());
        writeln!(text, "It has a join token, for {} more, and has not joined yet.", rough(left))?;
    }
    if let Some(session) = session {
        writeln!(text, "Session: {}", super::cluster::session(session))?;
    }
    if !cluster.grant.is_null() {
        writeln!(text, "Grant:")?;
        for (path, value) in get::leaves(&cluster.grant) {
            writeln!(text, "  {path}: {value}")?;
        }
    }
    let Some(member) = &cluster.member else { return Ok(text) };
    if !member.conditions.is_empty() {
        writeln!(text, "Problems of its exports:")?;
    }
    for condition in &member.conditions {
        let service = condition.service.as_deref().unwrap_or("publication");
        writeln!(text, "  {service}: {}: {}", condition.reason, condition.message)?;
    }
    if let Some(held) = &member.held_withdrawal {
        writeln!(
            text,
            "{} exports were withdrawn at once, at {}, and are held.",
            held.services.len(),
            time(Timestamp(held.since))
        )?;
    }
    writeln!(text, "Exports that others see: {}", if member.exports.is_empty() { "none" } else { "" })?;
    for export in &member.exports {
        writeln!(text, "  {export}")?;
    }
    let problems = session.map(|session| session.problems.as_slice()).unwrap_or_default();
    if !problems.is_empty() {
        writeln!(text, "Problems that its agent reports: {}; `isthmusctl status` shows them", problems.len())?;
    }
    Ok(text)
}

fn time(at: Timestamp) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(at.0);
    humantime::format_rfc3339_seconds(at).to_string()
}
