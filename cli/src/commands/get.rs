//! `isthmusctl get`: services and clusters as the whole federation sees them.

use std::io::Write;

use isthmus_model::{
    global::{ClusterInfo, ClusterState, GlobalPort, GlobalService, GlobalSnapshot},
    ids::ClusterName,
    service::{AppProtocol, GatewayAddress, ServiceKind},
};
use serde::Serialize;

use crate::{
    Verdict,
    args::{Format, GetCommand},
    client::Client,
    output,
    table::Table,
};

pub(super) async fn run(client: &Client, command: GetCommand, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    match command {
        GetCommand::Services(args) => {
            let services: Vec<GlobalService> = client.get("services").await?;
            print(out, args.output, &services, |s| services_table(s))
        }
        GetCommand::Clusters(args) => {
            let snapshot: GlobalSnapshot = client.get("snapshot").await?;
            let clusters: Vec<ClusterInfo> = snapshot.clusters.into_values().collect();
            print(out, args.output, &clusters, |c| clusters_table(c))
        }
    }
}

fn print<T: Serialize>(
    out: &mut dyn Write,
    format: Format,
    value: &T,
    table: impl Fn(&T) -> String,
) -> anyhow::Result<Verdict> {
    match format {
        Format::Json => output::json(out, value)?,
        Format::Yaml => output::yaml(out, value)?,
        Format::Table => write!(out, "{}", table(value))?,
    }
    Ok(Verdict::Yes)
}

pub(super) fn services_table(services: &[GlobalService]) -> String {
    let mut table = Table::new(&["SERVICE", "KIND", "INDEX", "PORTS", "EXPORTED BY", "CONFLICTS"]);
    for s in services {
        let ports: Vec<String> = s.ports.iter().map(port).collect();
        let exporters: Vec<&str> = s.exporters.keys().map(ClusterName::as_str).collect();
        let conflicts: Vec<&str> = s.conflicts.iter().map(|c| c.reason.as_str()).collect();
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
        ]);
    }
    if table.is_empty() {
        return "No service is exported. A ServiceExport beside a Service exports it.\n".to_owned();
    }
    table.render(0)
}

pub(super) fn clusters_table(clusters: &[ClusterInfo]) -> String {
    let mut table = Table::new(&["CLUSTER", "STATE", "REGION", "ZONE", "INDEX", "TRUST DOMAIN", "GATEWAYS"]);
    for c in clusters {
        let gateways: Vec<String> = c.gateways.iter().map(gateway).collect();
        let state = match c.state {
            ClusterState::Active => "active",
            ClusterState::Revoked => "revoked",
        };
        table.row([
            c.name.to_string(),
            state.to_owned(),
            c.locality.region.to_string(),
            c.locality.zone.to_string(),
            c.index.to_string(),
            c.bundle.trust_domain.to_string(),
            gateways.join(","),
        ]);
    }
    if table.is_empty() {
        return "No cluster has joined yet. `isthmusctl cluster join-token NAME` makes the first token.\n".to_owned();
    }
    table.render(0)
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
