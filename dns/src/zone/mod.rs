//! The zone `clusterset.local` as a value: what this cluster's DNS server answers, and nothing about how queries arrive.
//!
//! In: the federation's state, this cluster's VIP range, the ready endpoints of its headless services and what is known
//! of each cluster's availability. Out: [`Zone::answer`]. Pure and immutable: a change makes a new zone, which is
//! swapped in as a whole. Rules: Multicluster Services DNS specification 1.0.0 (KEP-1645); NXDOMAIN and NODATA are told
//! apart, and both carry the SOA (RFC 2308). Which cluster gets the traffic is decided by [`isthmus_model::failover`]
//! alone; the zone only shows it (`_failover`) and stays silent about services that policy closes to this cluster.
//! Addresses of other clusters' endpoints never appear here: they would not be routable.

mod answer;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, LazyLock},
};

use hickory_proto::rr::Name;
use ipnet::Ipv4Net;
use isthmus_model::{
    availability::Observations,
    failover::{self, Eligibility},
    global::{GlobalService, GlobalSnapshot},
    ids::{ClusterName, ServiceName, Stamp},
    local::{Endpoint, LocalEndpoints},
    service::ServiceKind,
    time::Timestamp,
    vip,
};

pub use answer::{Answer, Outcome};

/// Seconds that an answer, and by the SOA its absence, may be cached (MCS DNS 1.0.0).
pub const TTL: u32 = 5;

/// The apex.
static ORIGIN: LazyLock<Name> =
    LazyLock::new(|| Name::from_labels([b"clusterset".as_slice(), b"local"]).unwrap_or_else(|_| Name::root()));

/// Whether `name` lies in `clusterset.local`, in any case.
pub fn contains(name: &Name) -> bool {
    ORIGIN.zone_of(name)
}

/// What a zone is made of.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The cluster that this server answers for.
    pub cluster: ClusterName,
    /// The federation.
    pub global: Arc<GlobalSnapshot>,
    /// Where this cluster's virtual addresses lie.
    pub vip_range: Ipv4Net,
    /// This cluster's endpoints; those of headless services that are ready are named.
    pub endpoints: LocalEndpoints,
    /// This server's own address, for the zone's NS; `None` if it listens on all addresses.
    pub server: Option<Ipv4Addr>,
}

/// All names of `clusterset.local`, at one revision.
#[derive(Clone, Debug)]
pub struct Zone {
    cluster: ClusterName,
    global: Arc<GlobalSnapshot>,
    server: Option<Ipv4Addr>,
    /// Namespace → name → what is there. Namespaces are never empty.
    services: Arc<BTreeMap<String, BTreeMap<String, Entry>>>,
    observed: Arc<Observations>,
}

/// One service's share of the zone.
#[derive(Clone, Debug)]
struct Entry {
    service: ServiceName,
    addresses: Addresses,
}

#[derive(Clone, Debug)]
enum Addresses {
    /// One virtual address.
    Vip(Ipv4Addr),
    /// The name exists, but policy lets this cluster's traffic go nowhere, or the VIP range is too small for its index.
    Withheld,
    /// The endpoints themselves. Empty: the name does not exist.
    Headless(Vec<Endpoint>),
}

impl Zone {
    /// Builds the zone. Never fails: a service that cannot have an address is listed in [`Zone::unaddressed`].
    pub fn build(sources: &Sources, observed: Arc<Observations>) -> Self {
        let mut services: BTreeMap<String, BTreeMap<String, Entry>> = BTreeMap::new();
        for (name, service) in &sources.global.services {
            let entry = Entry { service: name.clone(), addresses: addresses(sources, service) };
            services.entry(name.namespace.to_string()).or_default().insert(name.name().to_owned(), entry);
        }
        Self {
            cluster: sources.cluster.clone(),
            global: sources.global.clone(),
            server: sources.server,
            services: Arc::new(services),
            observed,
        }
    }

    /// The same names with other evidence.
    pub fn with_observed(&self, observed: Arc<Observations>) -> Self {
        Self { observed, ..self.clone() }
    }

    /// Which state of the federation this zone shows.
    pub fn stamp(&self) -> Stamp {
        self.global.stamp
    }

    /// Number of services with a name here.
    pub fn len(&self) -> usize {
        self.services.values().map(BTreeMap::len).sum()
    }

    /// Whether no service has a name here.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// ClusterSetIP services whose name gives no address: closed by policy, or beyond the VIP range.
    pub fn unaddressed(&self) -> impl Iterator<Item = &ServiceName> {
        let entries = self.services.values().flat_map(BTreeMap::values);
        entries.filter(|e| matches!(e.addresses, Addresses::Withheld)).map(|e| &e.service)
    }
}

/// What `service`'s name points to, in this cluster.
fn addresses(sources: &Sources, service: &GlobalService) -> Addresses {
    match service.kind {
        ServiceKind::Headless => {
            let exported_here = service.exporters.contains_key(&sources.cluster);
            if !exported_here || is_closed(sources, service) {
                return Addresses::Headless(Vec::new());
            }
            let ready = sources.endpoints.of(&service.name).iter().filter(|e| e.ready);
            Addresses::Headless(ready.cloned().collect())
        }
        ServiceKind::ClusterSetIp if is_closed(sources, service) => Addresses::Withheld,
        ServiceKind::ClusterSetIp => match vip::vip(sources.vip_range, service.index) {
            Some(ip) => Addresses::Vip(ip),
            None => Addresses::Withheld,
        },
    }
}

/// Policy forbids every exporter. Policy does not look at the evidence or the time, so neither is needed here.
fn is_closed(sources: &Sources, service: &GlobalService) -> bool {
    let candidates =
        failover::choose(service, None, &sources.cluster, &sources.global, &Observations::default(), Timestamp(0));
    candidates.iter().all(|c| matches!(c.eligibility, Eligibility::Forbidden))
}
