//! `isthmusctl status`: clusters, consumers, applied revisions, problems.

use std::io::Write;

use serde_json::Value;

use super::{cluster::session, shown};
use crate::{
    Verdict,
    args::{Format, StatusArgs},
    client::Client,
    output,
    shapes::{Cluster, Status},
    table::Table,
};

pub(super) async fn run(client: &Client, args: StatusArgs, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let text = async || client.get::<Value>("status").await.and_then(|raw| print(raw, args.format.output));
    shown(args.watch, args.format.output == Format::Table, text, out).await
}

fn print(raw: Value, format: Format) -> anyhow::Result<String> {
    let mut out = Vec::new();
    match format {
        Format::Json => output::json(&mut out, &raw)?,
        Format::Yaml => output::yaml(&mut out, &raw)?,
        Format::Table => return Ok(render(&serde_json::from_value(raw)?)),
    }
    Ok(String::from_utf8(out)?)
}

/// The tables.
pub(super) fn render(status: &Status) -> String {
    let mut text = format!("Federation {}, revision {}, node {}\n\n", status.federation, status.stamp, status.node);
    if !status.unasked.is_empty() {
        let nodes = status.unasked.join(", ");
        text.push_str(&format!("Not reached: {nodes}. What agents told only them is missing below.\n\n"));
    }
    if status.clusters.is_empty() {
        text.push_str("No cluster has joined yet. `isthmusctl cluster join-token NAME` makes the first token.\n");
        return text;
    }
    let mut clusters = Table::new(&["CLUSTER", "STATE", "REGION", "ZONE", "SESSION", "CONSUMERS", "PROBLEMS"]);
    let mut consumers = Table::new(&["CLUSTER", "CONSUMER", "CONNECTED", "APPLIED", "LAG"]);
    for c in &status.clusters {
        // Of a cluster whose agent is away only the last word is known.
        let current = c.is_connected();
        let connected = c.consumers.iter().filter(|x| x.connected && current).count();
        clusters.row([
            c.name.clone(),
            c.state.clone(),
            c.region.clone(),
            c.zone.clone(),
            session(c),
            format!("{connected}/{}", c.consumers.len()),
            problems(c).len().to_string(),
        ]);
        for x in &c.consumers {
            consumers.row([
                c.name.clone(),
                format!("{}/{}", x.kind, x.name),
                match (current, x.connected) {
                    (false, _) => "unknown",
                    (true, true) => "yes",
                    (true, false) => "no",
                }
                .to_owned(),
                x.applied.map(|s| s.to_string()).unwrap_or_default(),
                x.lag_revisions.to_string(),
            ]);
        }
    }
    text.push_str(&clusters.render(0));
    if !consumers.is_empty() {
        text.push('\n');
        text.push_str(&consumers.render(0));
    }
    text.push_str(&links(status));
    let mut found = Table::new(&["CLUSTER", "WHERE", "PROBLEM"]);
    for c in &status.clusters {
        for (at, problem) in problems(c) {
            found.row([c.name.clone(), at, problem]);
        }
    }
    if !found.is_empty() {
        text.push('\n');
        text.push_str(&found.render(0));
    }
    text
}

/// The gateways' links to other clusters', and what to do about those that fell back to TCP.
fn links(status: &Status) -> String {
    let mut table = Table::new(&["CLUSTER", "GATEWAY", "LINK TO", "STATE", "TRANSPORT", "RTT", "LOSS", "WINDOW"]);
    let mut downgraded = 0_usize;
    let mut unreached = Table::new(&["NOT REACHED FROM", "LINK TO", "LAST ATTEMPT"]);
    for c in &status.clusters {
        for t in &c.tunnels {
            let up = t.up && c.is_connected();
            downgraded += usize::from(up && t.downgraded);
            let measured = |known: bool, text: String| if up && known { text } else { String::new() };
            // TCP tells nothing of its packets.
            let quic = t.transport != "tcp";
            if c.is_connected() && !t.dial_error.is_empty() {
                unreached.row([
                    format!("{}/{}", c.name, t.from),
                    format!("{}/{}", t.cluster, t.gateway),
                    t.dial_error.clone(),
                ]);
            }
            table.row([
                c.name.clone(),
                t.from.clone(),
                format!("{}/{}", t.cluster, t.gateway),
                match (c.is_connected(), t.up) {
                    (false, _) => "unknown",
                    (true, true) => "up",
                    (true, false) => "down",
                }
                .to_owned(),
                format!("{}{}", t.transport, if t.downgraded { " DOWNGRADED" } else { "" }),
                measured(t.rtt_us > 0, milliseconds(t.rtt_us)),
                measured(quic && t.rtt_us > 0, format!("{}.{:02} %", t.loss_ppm / 10_000, t.loss_ppm / 100 % 100)),
                measured(quic && t.cwnd_bytes > 0, format!("{} KiB", t.cwnd_bytes.div_ceil(1_024))),
            ]);
        }
    }
    if table.is_empty() {
        return String::new();
    }
    let mut text = format!("\n{}", table.render(0));
    if !unreached.is_empty() {
        text.push_str(&format!("\n{}", unreached.render(0)));
    }
    if downgraded > 0 {
        let links = if downgraded == 1 { "1 link runs".to_owned() } else { format!("{downgraded} links run") };
        text.push_str(&format!(
            "\nDOWNGRADED: {links} over TCP because QUIC does not get through. Let UDP pass between the gateways' \
             tunnel addresses; a link goes back to QUIC by itself.\n"
        ));
    }
    text
}

/// "0.42 ms", "41 ms".
fn milliseconds(us: u32) -> String {
    if us < 10_000 { format!("{}.{:02} ms", us / 1_000, us / 10 % 100) } else { format!("{} ms", us / 1_000) }
}

/// Where and what: of the cluster's manifests, then of its consumers.
fn problems(cluster: &Cluster) -> Vec<(String, String)> {
    let own = cluster.problems.iter().map(|p| {
        let field = if p.field.is_empty() { String::new() } else { format!("{}: ", p.field) };
        (p.at.clone(), format!("{field}{}", p.message))
    });
    let consumers = cluster
        .consumers
        .iter()
        .flat_map(|c| c.problems.iter().map(move |p| (format!("{}/{}", c.kind, c.name), p.clone())));
    own.chain(consumers).collect()
}
