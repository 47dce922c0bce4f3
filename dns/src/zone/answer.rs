//! One question to a zone, one answer.
//!
//! The name is taken apart from the right; each level of the tree is one function. Owner names of answers repeat the
//! question's spelling (RFC 4343), comparison ignores case.

use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::rr::{
    Name, RData, Record, RecordType,
    rdata::{A, AAAA, HINFO, NS, SOA, SRV, TXT},
};
use isthmus_model::{
    failover::{self, Candidate, Eligibility},
    global::GlobalService,
    local::Endpoint,
    time::Timestamp,
};

use super::{Addresses, Entry, ORIGIN, TTL, Zone, contains};

/// The DNS schema version that the zone follows.
const SCHEMA: &str = "1.0.0";
/// A TXT character-string holds at most this (RFC 1035, 3.3).
const TXT_STRING: usize = 255;
/// Candidates shown in `_failover`, so that the answer fits any transport.
const TXT_CANDIDATES: usize = 64;

/// How a question ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There are records.
    Found,
    /// The name exists, but not with this type (RFC 2308, 2.2). NOERROR on the wire.
    NoData,
    /// The name does not exist.
    NxDomain,
}

/// What to send back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How the question ended.
    pub outcome: Outcome,
    /// The answer section; empty unless [`Outcome::Found`].
    pub records: Vec<Record>,
    /// The authority section: the SOA, unless [`Outcome::Found`].
    pub authority: Vec<Record>,
    /// The additional section: addresses of SRV targets.
    pub additional: Vec<Record>,
}

/// What stands at one name, before the question's type is looked at.
enum Node {
    Missing,
    /// Exists only because something is below it (RFC 8020).
    Empty,
    Records(Vec<RData>),
}

impl Zone {
    /// Answers for `name`, which must lie in the zone; `None` if it does not. `now` decides about hold-downs.
    pub fn answer(&self, name: &Name, kind: RecordType, now: Timestamp) -> Option<Answer> {
        if !contains(name) {
            return None;
        }
        let Some(labels) = labels_below_origin(name) else {
            return Some(self.negative(Outcome::NxDomain));
        };
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let data = match self.node(&labels, now) {
            Node::Missing => return Some(self.negative(Outcome::NxDomain)),
            Node::Empty => return Some(self.negative(Outcome::NoData)),
            Node::Records(data) => data,
        };
        Some(self.select(name, kind, ttl(&labels), data))
    }

    /// The records of the asked type among `data`.
    fn select(&self, name: &Name, kind: RecordType, ttl: u32, data: Vec<RData>) -> Answer {
        if kind == RecordType::ANY {
            // RFC 8482: one small record instead of everything, so that ANY amplifies nothing.
            let hinfo = RData::HINFO(HINFO::new("RFC8482".to_owned(), String::new()));
            return found(vec![Record::from_rdata(name.clone(), TTL, hinfo)], Vec::new());
        }
        let matching = data.into_iter().filter(|d| d.record_type() == kind);
        let records: Vec<Record> = matching.map(|d| Record::from_rdata(name.clone(), ttl, d)).collect();
        if records.is_empty() {
            return self.negative(Outcome::NoData);
        }
        let additional = self.target_addresses(&records);
        found(records, additional)
    }

    fn node(&self, labels: &[&str], now: Timestamp) -> Node {
        match labels {
            [] => Node::Records(vec![RData::SOA(self.soa()), RData::NS(NS(server_name()))]),
            ["dns-version"] => Node::Records(vec![RData::TXT(TXT::new(vec![SCHEMA.to_owned()]))]),
            ["dns"] | ["svc"] => Node::Empty,
            ["ns", "dns"] => Node::Records(self.server.iter().map(|ip| address(IpAddr::V4(*ip))).collect()),
            [namespace, "svc"] if self.services.contains_key(*namespace) => Node::Empty,
            [below @ .., service, namespace, "svc"] => {
                match self.services.get(*namespace).and_then(|by_name| by_name.get(*service)) {
                    Some(entry) => self.service_node(entry, below, now),
                    None => Node::Missing,
                }
            }
            _ => Node::Missing,
        }
    }

    /// `below` is what stands left of `<svc>.<ns>.svc.clusterset.local`.
    fn service_node(&self, entry: &Entry, below: &[&str], now: Timestamp) -> Node {
        let Some(service) = self.global.services.get(&entry.service) else {
            return Node::Missing;
        };
        if let ["_failover"] = below {
            return Node::Records(vec![RData::TXT(self.failover_text(service, now))]);
        }
        match &entry.addresses {
            Addresses::Vip(ip) => vip_node(service, Some(*ip), below),
            Addresses::Withheld => vip_node(service, None, below),
            Addresses::Headless(endpoints) => self.headless_node(service, endpoints, below),
        }
    }

    /// A service without ready endpoints here has no name; each endpoint has one of its own, below this cluster's.
    fn headless_node(&self, service: &GlobalService, endpoints: &[Endpoint], below: &[&str]) -> Node {
        if endpoints.is_empty() {
            return Node::Missing;
        }
        let srv = |wanted: Option<&str>| {
            let mut found = Vec::new();
            for endpoint in endpoints {
                let ports = endpoint.ports.iter().filter(|(name, _)| wanted.is_none_or(|w| name.as_str() == w));
                let target = endpoint_name(service, self.cluster.as_str(), endpoint);
                found.extend(ports.filter_map(|(_, port)| Some(srv_record(*port, target.clone()?))));
            }
            dedup(found)
        };
        match below {
            [] => {
                let mut data: Vec<RData> = endpoints.iter().map(|e| address(e.ip)).collect();
                data.extend(srv(None));
                Node::Records(dedup(data))
            }
            [cluster] if *cluster == self.cluster.as_str() => Node::Empty,
            [host, cluster] if *cluster == self.cluster.as_str() => {
                let own = endpoints.iter().filter(|e| dashed(e.ip) == *host);
                exists(dedup(own.map(|e| address(e.ip)).collect()))
            }
            ["_tcp"] if has_named_port(service) => Node::Empty,
            [port, "_tcp"] => exists(port.strip_prefix('_').map(|p| srv(Some(p))).unwrap_or_default()),
            _ => Node::Missing,
        }
    }

    /// Addresses for the additional section, so that a client of SRV need not ask again.
    fn target_addresses(&self, records: &[Record]) -> Vec<Record> {
        let mut targets: Vec<&Name> = records
            .iter()
            .filter_map(|r| match &r.data {
                RData::SRV(srv) => Some(&srv.target),
                _ => None,
            })
            .collect();
        targets.sort();
        targets.dedup();
        let addresses = targets.into_iter().flat_map(|target| {
            let labels = labels_below_origin(target).unwrap_or_default();
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            let data = match self.node(&labels, Timestamp(0)) {
                Node::Records(data) => data,
                Node::Missing | Node::Empty => Vec::new(),
            };
            let addresses = data.into_iter().filter(|d| matches!(d, RData::A(_) | RData::AAAA(_)));
            addresses.map(|d| Record::from_rdata(target.clone(), TTL, d)).collect::<Vec<_>>()
        });
        addresses.collect()
    }

    /// One string per candidate, best first: what [`failover::choose`] says.
    fn failover_text(&self, service: &GlobalService, now: Timestamp) -> TXT {
        let candidates = failover::choose(service, None, &self.cluster, &self.global, &self.observed, now);
        let hidden = candidates.len().saturating_sub(TXT_CANDIDATES);
        let mut lines: Vec<String> =
            candidates.iter().take(TXT_CANDIDATES).enumerate().map(|(i, c)| describe(i + 1, c)).collect();
        if hidden > 0 {
            lines.push(format!("and {hidden} more: isthmusctl explain {} --from {}", service.name, self.cluster));
        }
        TXT::new(lines)
    }

    fn negative(&self, outcome: Outcome) -> Answer {
        let soa = Record::from_rdata(ORIGIN.clone(), TTL, RData::SOA(self.soa()));
        Answer { outcome, records: Vec::new(), authority: vec![soa], additional: Vec::new() }
    }

    fn soa(&self) -> SOA {
        // Serial numbers wrap (RFC 1982); the low half of the revision does what a secondary needs.
        let serial = u32::try_from(self.global.stamp.revision.0 & u64::from(u32::MAX)).unwrap_or_default();
        let hostmaster = ORIGIN.prepend_label("hostmaster").unwrap_or_else(|_| ORIGIN.clone());
        SOA::new(server_name(), hostmaster, serial, 7200, 1800, 86_400, TTL)
    }
}

/// The virtual address, SRV for all ports at the name itself, one name per named port, and nothing per cluster.
fn vip_node(service: &GlobalService, ip: Option<Ipv4Addr>, below: &[&str]) -> Node {
    let Some(target) = service_host(service) else {
        return Node::Missing;
    };
    let srv = |number: u16| srv_record(number, target.clone());
    match below {
        [] => {
            let Some(ip) = ip else { return Node::Records(Vec::new()) };
            let mut data = vec![address(IpAddr::V4(ip))];
            data.extend(dedup(service.ports.iter().map(|p| srv(p.port.number)).collect()));
            Node::Records(data)
        }
        ["_tcp"] if has_named_port(service) => Node::Empty,
        [port, "_tcp"] => {
            let wanted = port.strip_prefix('_').filter(|p| !p.is_empty());
            let mut named = service.ports.iter().filter(|p| Some(p.port.name.as_str()) == wanted).peekable();
            match (named.peek(), ip) {
                (None, _) => Node::Missing,
                (Some(_), None) => Node::Records(Vec::new()),
                (Some(_), Some(_)) => Node::Records(dedup(named.map(|p| srv(p.port.number)).collect())),
            }
        }
        _ => Node::Missing,
    }
}

fn found(records: Vec<Record>, additional: Vec<Record>) -> Answer {
    Answer { outcome: Outcome::Found, records, authority: Vec::new(), additional }
}

fn exists(data: Vec<RData>) -> Node {
    if data.is_empty() { Node::Missing } else { Node::Records(data) }
}

fn has_named_port(service: &GlobalService) -> bool {
    service.ports.iter().any(|p| !p.port.name.as_str().is_empty())
}

/// `_failover` shows this very moment; everything else may be cached.
fn ttl(labels: &[&str]) -> u32 {
    if labels.first() == Some(&"_failover") { 0 } else { TTL }
}

/// The labels left of the apex, lower case; `None` if one is not text, which no name of ours is.
fn labels_below_origin(name: &Name) -> Option<Vec<String>> {
    let count = name.iter().count().checked_sub(ORIGIN.iter().count())?;
    name.iter().take(count).map(|l| std::str::from_utf8(l).ok().map(str::to_ascii_lowercase)).collect()
}

fn server_name() -> Name {
    ORIGIN.prepend_label("dns").and_then(|n| n.prepend_label("ns")).unwrap_or_else(|_| ORIGIN.clone())
}

fn service_host(service: &GlobalService) -> Option<Name> {
    let base = ORIGIN.prepend_label("svc").ok()?;
    base.prepend_label(service.name.namespace.as_str()).ok()?.prepend_label(service.name.name()).ok()
}

fn endpoint_name(service: &GlobalService, cluster: &str, endpoint: &Endpoint) -> Option<Name> {
    service_host(service)?.prepend_label(cluster).ok()?.prepend_label(dashed(endpoint.ip).as_str()).ok()
}

/// The host label of an endpoint that has no hostname of its own.
fn dashed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.octets().map(|o| o.to_string()).join("-"),
        IpAddr::V6(ip) => ip.segments().map(|s| format!("{s:x}")).join("-"),
    }
}

fn address(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    }
}

fn srv_record(port: u16, target: Name) -> RData {
    RData::SRV(SRV::new(0, 100, port, target))
}

fn dedup(data: Vec<RData>) -> Vec<RData> {
    let mut unique = Vec::with_capacity(data.len());
    for item in data {
        if !unique.contains(&item) {
            unique.push(item);
        }
    }
    unique
}

/// For example "1 us-east ready: own cluster, 1 of 1 endpoints ready".
fn describe(place: usize, candidate: &Candidate) -> String {
    let state = match candidate.eligibility {
        Eligibility::Ready => "ready",
        Eligibility::HoldDown { .. } => "hold-down",
        Eligibility::Unknown => "unknown",
        Eligibility::Draining => "draining",
        Eligibility::Unreachable => "unreachable",
        Eligibility::NoEndpoints => "no-endpoints",
        Eligibility::Forbidden => "forbidden",
    };
    let mut line = format!("{place} {} {state}: {}", candidate.cluster, candidate.reason);
    let mut end = line.len().min(TXT_STRING);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
    line
}
