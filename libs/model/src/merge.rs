//! Exports of all clusters → global services, by the conflict rules of KEP-1645.
//!
//! Pure and order-free: the result depends on the set of exports only, never on the order of arrival. Where exports
//! disagree, the oldest wins (ties: the first by cluster name), and the disagreement is recorded for everyone to see.
//!
//! Ports. Every port is TCP below, and a service has one virtual address, so a number stands only once in the union. A
//! cluster's port is the global port of the same name, else the one of the same number; if that speaks another
//! protocol, the cluster does not get its traffic. A port that matches neither joins the union.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    global::{Conflict, Exporter, GlobalPort, GlobalService},
    ids::{ClusterName, ServiceName, VipIndex},
    service::{AppProtocol, Export, ServiceKind, ServicePort},
};

/// Different opinions that one conflict's message spells out; the rest is counted.
const MAX_OPINIONS: usize = 8;

/// Merges the exports of one name. `None` if `exports` is empty. All entries must be of service `name`.
pub fn merge(name: &ServiceName, index: VipIndex, exports: &BTreeMap<&ClusterName, &Export>) -> Option<GlobalService> {
    let mut by_age: Vec<(&ClusterName, &Export)> = exports.iter().map(|(c, e)| (*c, *e)).collect();
    by_age.sort_by_key(|(cluster, export)| (export.created_at, *cluster));
    let (oldest, first) = *by_age.first()?;

    let exporter = |e: &Export| Exporter { created_at: e.created_at, identities: e.identities.clone() };
    Some(GlobalService {
        name: name.clone(),
        index,
        kind: first.kind,
        ports: union(&by_age),
        exporters: by_age.iter().map(|(c, e)| ((*c).clone(), exporter(e))).collect(),
        conflicts: conflicts(oldest, &by_age),
    })
}

/// Which of `cluster`'s own ports carries the traffic of the global port `port`: `Some` if and only if `port` lists the
/// cluster. Number and name may differ from the global port's, so endpoints must be looked up by this port's name.
pub fn own_port<'e>(cluster: &ClusterName, export: &'e Export, port: &GlobalPort) -> Option<&'e ServicePort> {
    if !port.clusters.contains(cluster) {
        return None;
    }
    let port = &port.port;
    let same = |own: &&ServicePort| own.protocol == port.protocol;
    let by_name = export.ports.iter().find(|own| own.name == port.name).filter(same);
    by_name.or_else(|| export.ports.iter().find(|own| own.number == port.number).filter(same))
}

fn union(by_age: &[(&ClusterName, &Export)]) -> Vec<GlobalPort> {
    let mut union: Vec<GlobalPort> = Vec::new();
    for (cluster, export) in by_age {
        // Names before numbers, so that the order of the ports within the export does not matter.
        let mut unmatched = Vec::new();
        for port in &export.ports {
            match union.iter_mut().find(|g| g.port.name == port.name) {
                Some(global) => join(global, cluster, port),
                None => unmatched.push(port),
            }
        }
        for port in unmatched {
            match union.iter_mut().find(|g| g.port.number == port.number) {
                Some(global) => join(global, cluster, port),
                None => union.push(GlobalPort { port: port.clone(), clusters: BTreeSet::from([(*cluster).clone()]) }),
            }
        }
    }
    union.sort_by(|a, b| (a.port.number, &a.port.name).cmp(&(b.port.number, &b.port.name)));
    union
}

fn join(global: &mut GlobalPort, cluster: &ClusterName, port: &ServicePort) {
    if global.port.protocol == port.protocol {
        global.clusters.insert(cluster.clone());
    }
}

fn conflicts(oldest: &ClusterName, by_age: &[(&ClusterName, &Export)]) -> Vec<Conflict> {
    let kinds = opinions(by_age, |e| kind(e.kind).to_owned());
    let ports = opinions(by_age, |e| ports(&e.ports));
    let conflict = |reason: &str, what: &str, opinions: Vec<(String, Vec<&ClusterName>)>| {
        (opinions.len() > 1).then(|| Conflict { reason: reason.to_owned(), message: message(what, oldest, &opinions) })
    };
    // In order of reason.
    [conflict("PortConflict", "ports", ports), conflict("TypeConflict", "types", kinds)].into_iter().flatten().collect()
}

/// Who says what, the oldest opinion first.
fn opinions<'c>(
    by_age: &[(&'c ClusterName, &Export)],
    opinion: impl Fn(&Export) -> String,
) -> Vec<(String, Vec<&'c ClusterName>)> {
    let mut found: Vec<(String, Vec<&ClusterName>)> = Vec::new();
    for (cluster, export) in by_age {
        let opinion = opinion(export);
        match found.iter_mut().find(|(known, _)| *known == opinion) {
            Some((_, clusters)) => clusters.push(cluster),
            None => found.push((opinion, vec![cluster])),
        }
    }
    found
}

fn message(what: &str, oldest: &ClusterName, opinions: &[(String, Vec<&ClusterName>)]) -> String {
    let said = opinions.iter().take(MAX_OPINIONS).map(|(opinion, clusters)| {
        let named: Vec<&str> = clusters.iter().take(MAX_OPINIONS).map(|c| c.as_str()).collect();
        let more = clusters.len() - named.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{}{more}: {opinion}", named.join(", "))
    });
    let said: Vec<String> = said.collect();
    let more = opinions.len() - said.len();
    let more = if more > 0 { format!("; and {more} more opinions") } else { String::new() };
    format!("the {what} differ, and the oldest export ({oldest}) wins where they clash; {}{more}", said.join("; "))
}

fn kind(kind: ServiceKind) -> &'static str {
    match kind {
        ServiceKind::ClusterSetIp => "ClusterSetIP",
        ServiceKind::Headless => "Headless",
    }
}

/// The same text for the same set, whatever its order.
fn ports(ports: &[ServicePort]) -> String {
    let sorted: BTreeSet<&ServicePort> = ports.iter().collect();
    let text = |p: &&ServicePort| {
        let protocol = match p.protocol {
            AppProtocol::Tcp => "tcp",
            AppProtocol::Http => "http",
            AppProtocol::Grpc => "grpc",
        };
        if p.name.as_str().is_empty() {
            format!("{}/{protocol}", p.number)
        } else {
            format!("{} {}/{protocol}", p.name, p.number)
        }
    };
    if sorted.is_empty() { "none".to_owned() } else { sorted.iter().map(text).collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
