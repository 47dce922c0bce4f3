//! `isthmusctl get`: what the whole federation sees and what was declared, by kind.

use std::{collections::BTreeMap, io::Write};

use anyhow::bail;
use isthmus_model::{
    global::{GlobalPort, GlobalService},
    ids::ClusterName,
    service::{AppProtocol, GatewayAddress, ServiceKind},
};
use serde_json::Value;

use crate::{
    Verdict,
    args::{GetArgs, GetFormat, Kind},
    client::Client,
    output,
    shapes::{Group, Member, NamedCluster, Node},
    suggest,
    table::Table,
};

pub(super) async fn run(client: &Client, args: GetArgs, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let is_table = matches!(args.output, GetFormat::Table | GetFormat::Wide);
    super::shown(args.watch, is_table, async || text(client, &args).await, out).await
}

async fn text(client: &Client, args: &GetArgs) -> anyhow::Result<String> {
    let found = fetch(client, args.kind, args.name.as_deref()).await?;
    let mut text = Vec::new();
    match (args.output, found.as_slice(), &args.name) {
        // One that was named is itself; several are a list.
        (GetFormat::Json, [one], Some(_)) => output::json(&mut text, one)?,
        (GetFormat::Json, all, _) => output::json(&mut text, &all)?,
        (GetFormat::Yaml, [one], Some(_)) => output::yaml(&mut text, one)?,
        (GetFormat::Yaml, all, _) if args.kind.is_declared() => output::yaml_documents(&mut text, all)?,
        (GetFormat::Yaml, all, _) => output::yaml(&mut text, &all)?,
        (format, _, _) => return table(args.kind, found, format == GetFormat::Wide),
    }
    Ok(String::from_utf8(text)?)
}

/// All of a kind, or the one of that name.
pub(super) async fn fetch(client: &Client, kind: Kind, name: Option<&str>) -> anyhow::Result<Vec<Value>> {
    let found: Vec<Value> = match kind {
        Kind::Services => client.get("services").await?,
        Kind::Clusters => client.get("clusters").await?,
        Kind::Nodes => {
            let group: Value = client.get("nodes").await?;
            group.get("nodes").and_then(Value::as_array).cloned().unwrap_or_default()
        }
        Kind::Settings | Kind::ClusterGrants => client.get(&format!("resources/{}", kind.path())).await?,
    };
    let Some(name) = name else { return Ok(found) };
    let names: Vec<String> = found.iter().map(|object| name_of(kind, object)).collect();
    match names.iter().position(|known| known == name) {
        Some(at) => Ok(found.into_iter().nth(at).into_iter().collect()),
        None => {
            let near = suggest::near(name, names);
            let hint = match near.as_slice() {
                [] => format!("`isthmusctl get {}` shows all", kind.path()),
                near => format!("did you mean {}?", near.join(" or ")),
            };
            bail!("there is no {name} among the {}; {hint}", kind.path())
        }
    }
}

fn name_of(kind: Kind, object: &Value) -> String {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    match kind {
        Kind::Services | Kind::Clusters | Kind::Nodes => text(object.get("name")),
        Kind::Settings | Kind::ClusterGrants => text(object.get("metadata").and_then(|m| m.get("name"))),
    }
}

fn table(kind: Kind, found: Vec<Value>, wide: bool) -> anyhow::Result<String> {
    let found = Value::Array(found);
    Ok(match kind {
        Kind::Services => services_table(&serde_json::from_value::<Vec<GlobalService>>(found)?, wide),
        Kind::Clusters => clusters_table(&serde_json::from_value::<Vec<NamedCluster>>(found)?, wide),
        Kind::Nodes => {
            let nodes: Vec<Node> = serde_json::from_value(found)?;
            let last_log_index = nodes.iter().filter_map(|node| node.log_index).max().unwrap_or_default();
            super::cp::nodes_table(&Group { nodes, last_log_index, ..Group::default() })
        }
        Kind::Settings => settings_table(found.get(0).unwrap_or(&Value::Null)),
        Kind::ClusterGrants => grants_table(found.as_array().map(Vec::as_slice).unwrap_or_default()),
    })
}

pub(super) fn services_table(services: &[GlobalService], wide: bool) -> String {
    let mut header = vec!["SERVICE", "KIND", "INDEX", "PORTS", "EXPORTED BY", "CONFLICTS"];
    if wide {
        header.push("IDENTITIES");
    }
    let mut table = Table::new(&header);
    for s in services {
        let ports: Vec<String> = s.ports.iter().map(port).collect();
        let exporters: Vec<&str> = s.exporters.keys().map(ClusterName::as_str).collect();
        let conflicts: Vec<&str> = s.conflicts.iter().map(|c| c.reason.as_str()).collect();
        let identities: Vec<String> =
            s.exporters.values().flat_map(|e| &e.identities).map(ToString::to_string).collect();
        let kind = match s.kind {
            ServiceKind::ClusterSetIp => "ClusterSetIP",
            ServiceKind::Headless => "Headless",
        };
        table.row([
            s.name.to_string(),
            kind.to_owned(),
            s.index.to_string(),
            ports.join(","),
            exporters.join(","),
            conflicts.join(","),
            identities.join(","),
        ]);
    }
    if table.is_empty() {
        return "No service is exported. A ServiceExport beside a Service exports it.\n".to_owned();
    }
    table.render(0)
}

pub(super) fn clusters_table(clusters: &[NamedCluster], wide: bool) -> String {
    let mut header = vec!["CLUSTER", "STATE", "REGION", "ZONE", "INDEX", "TRUST DOMAIN", "GATEWAYS", "EXPORTS"];
    if wide {
        header.extend(["MAY EXPORT", "MAY IMPORT", "ROLES"]);
    }
    let mut table = Table::new(&header);
    for c in clusters {
        let none = Member::default();
        let member = c.member.as_ref().unwrap_or(&none);
        let gateways: Vec<String> = member.gateways.iter().map(gateway).collect();
        let index = if member.index == 0 { String::new() } else { member.index.to_string() };
        let problems = match member.conditions.len() {
            0 => String::new(),
            n => format!(" ({n} with a problem)"),
        };
        let exports = if c.member.is_some() { format!("{}{problems}", member.exports.len()) } else { String::new() };
        let granted = |field: &str| list(c.grant.get(field));
        table.row([
            c.name.clone(),
            c.state.clone(),
            member.locality.region.clone(),
            member.locality.zone.clone(),
            index,
            member.trust_domain.clone(),
            gateways.join(","),
            exports,
            granted("exportNamespaces"),
            granted("importNamespaces"),
            granted("roles"),
        ]);
    }
    if table.is_empty() {
        return "No cluster has joined yet. `isthmusctl cluster join-token NAME` makes the first token.\n".to_owned();
    }
    table.render(0)
}

fn settings_table(object: &Value) -> String {
    let mut table = Table::new(&["SETTING", "VALUE"]);
    for (path, value) in leaves(object.get("spec").unwrap_or(&Value::Null)) {
        table.row([path, value]);
    }
    table.render(0)
}

fn grants_table(grants: &[Value]) -> String {
    let mut table = Table::new(&["CLUSTER", "MAY EXPORT", "MAY IMPORT", "ROLES", "LIMITS", "VERSION"]);
    for grant in grants {
        let spec = grant.get("spec").unwrap_or(&Value::Null);
        let limits: Vec<String> = leaves(spec.get("limits").unwrap_or(&Value::Null))
            .into_iter()
            .map(|(what, limit)| format!("{what}={limit}"))
            .collect();
        let metadata = |field: &str| grant.get("metadata").and_then(|m| m.get(field)).and_then(Value::as_str);
        table.row([
            metadata("name").unwrap_or_default().to_owned(),
            list(spec.get("exportNamespaces")),
            list(spec.get("importNamespaces")),
            list(spec.get("roles")),
            limits.join(","),
            metadata("resourceVersion").unwrap_or("by default").to_owned(),
        ]);
    }
    if table.is_empty() {
        return "No cluster has joined yet, and no grant was declared.\n".to_owned();
    }
    table.render(0)
}

/// "shop,pay"; nothing is "none", so that it is not taken for "everything".
fn list(value: Option<&Value>) -> String {
    let Some(items) = value.and_then(Value::as_array) else { return String::new() };
    if items.is_empty() {
        return "none".to_owned();
    }
    items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",")
}

/// Each value by its dotted path; what is empty is left out.
pub(super) fn leaves(value: &Value) -> BTreeMap<String, String> {
    fn walk(path: String, value: &Value, into: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(path, value, into);
                }
            }
            other => {
                into.insert(path, other.to_string());
            }
        }
    }
    let mut into = BTreeMap::new();
    if !value.is_null() {
        walk(String::new(), value, &mut into);
    }
    into
}

/// "gateway-1=192.0.2.7:15443".
fn gateway(gateway: &GatewayAddress) -> String {
    match gateway.tunnel {
        Some(tunnel) => format!("{}={tunnel}", gateway.name),
        None => format!("{} (dials out only)", gateway.name),
    }
}

/// "http:80/http", or "80/tcp" for a port without a name.
fn port(port: &GlobalPort) -> String {
    let protocol = match port.port.protocol {
        AppProtocol::Tcp => "tcp",
        AppProtocol::Http => "http",
        AppProtocol::Grpc => "grpc",
    };
    let number = port.port.number;
    match port.port.name.as_str() {
        "" => format!("{number}/{protocol}"),
        name => format!("{name}:{number}/{protocol}"),
    }
}
