//! `isthmusctl explain`: where a service's traffic goes, by the function that decides it in the data path.
//!
//! The evidence is what the asking cluster's agent last reported.

use std::io::Write;

use anyhow::bail;
use isthmus_model::{
    availability::Report,
    failover::{self, Candidate},
    global::{GlobalService, GlobalSnapshot},
    ids::{ClusterName, ServiceName},
};

use super::{now, state, tier};
use crate::{
    Verdict,
    args::{ExplainArgs, Format},
    client::Client,
    output, suggest,
    table::Table,
};

pub(super) async fn run(client: &Client, args: ExplainArgs, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let global: GlobalSnapshot = client.get("snapshot").await?;
    let service = find_service(&global, &args.service)?;
    check_cluster(&global, &args.from)?;
    check_port(service, args.port)?;
    if global.active_cluster(&args.from).is_none() {
        bail!("{} is revoked: nothing is served to it", args.from);
    }
    let reports: Vec<Report> = client.get(&format!("availability/{}", args.from)).await?;

    let now = now();
    let candidates = failover::choose(service, args.port, &args.from, &global, &reports.into_iter().collect(), now);
    match args.format.output {
        Format::Json => output::json(out, &candidates)?,
        Format::Yaml => output::yaml(out, &candidates)?,
        Format::Table => {
            let port = args.port.map(|p| format!(" port {p}")).unwrap_or_default();
            writeln!(out, "{}{port} from {}, revision {}\n", args.service, args.from, global.stamp)?;
            write!(out, "{}", render(&candidates, &global))?;
        }
    }
    if candidates.iter().any(Candidate::usable) {
        return Ok(Verdict::Yes);
    }
    eprintln!("No cluster can take this traffic now.");
    Ok(Verdict::No)
}

pub(super) fn render(candidates: &[Candidate], global: &GlobalSnapshot) -> String {
    let mut table = Table::new(&["#", "CLUSTER", "STATE", "NEARNESS", "REGION", "ZONE", "REASON"]);
    for (candidate, place) in candidates.iter().zip(1..) {
        let locality = global.clusters.get(&candidate.cluster).map(|c| &c.locality);
        table.row([
            place.to_string(),
            candidate.cluster.to_string(),
            state(&candidate.eligibility).to_owned(),
            tier(candidate.tier).to_owned(),
            locality.map(|l| l.region.to_string()).unwrap_or_default(),
            locality.map(|l| l.zone.to_string()).unwrap_or_default(),
            candidate.reason.clone(),
        ]);
    }
    table.render(0)
}

pub(super) fn find_service<'a>(global: &'a GlobalSnapshot, name: &ServiceName) -> anyhow::Result<&'a GlobalService> {
    if let Some(service) = global.services.get(name) {
        return Ok(service);
    }
    let near = suggest::near(&name.to_string(), global.services.keys().map(ToString::to_string));
    match near.as_slice() {
        [] => bail!("no cluster exports {name}; `isthmusctl get services` shows what is exported"),
        near => bail!("no cluster exports {name}; did you mean {}?", near.join(" or ")),
    }
}

fn check_cluster(global: &GlobalSnapshot, name: &ClusterName) -> anyhow::Result<()> {
    if global.clusters.contains_key(name) {
        return Ok(());
    }
    let near = suggest::near(name.as_str(), global.clusters.keys().map(ToString::to_string));
    match near.as_slice() {
        [] => bail!("there is no cluster {name} in this federation; `isthmusctl get clusters` shows all"),
        near => bail!("there is no cluster {name} in this federation; did you mean {}?", near.join(" or ")),
    }
}

fn check_port(service: &GlobalService, port: Option<u16>) -> anyhow::Result<()> {
    let Some(port) = port else { return Ok(()) };
    let known: Vec<String> = service.ports.iter().map(|p| p.port.number.to_string()).collect();
    if known.contains(&port.to_string()) {
        return Ok(());
    }
    bail!("{} has no port {port}; it has {}", service.name, known.join(", "))
}
