//! The agent's mutable state, sans IO: events in, an immutable view out.
//!
//! Level-triggered: whatever changes, everything that depends on it is computed again from what is held, so the order of
//! events does not matter and a lost one heals with the next. What holds: a gateway or sidecar whose stream ends without
//! a goodbye stays as it was for a day (the data path judges it); an older session never overrides a newer one of the same name.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use isthmus_api::convert::{Problem, limits};
use isthmus_model::{
    availability::{Availability, Observations, Report},
    failover::{self, choose},
    global::{ClusterState, GlobalSnapshot},
    ids::{ClusterName, ServiceName, TrustDomain, Zone},
    local::{Endpoint, LocalEndpoints},
    service::{Export, GatewayAddress},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{
    gateways::{self, GatewayFeeds},
    reports::{self, Said},
};
use crate::{
    index::{
        self, Context, Index,
        endpoints::{Probed, by_global_ports, exported, join},
    },
    source::folder::Manifests,
    status::problem,
    view::{LocalGateway, Sidecar, View},
};

/// Sidecars known at once, connected or not.
const MAX_SIDECARS: usize = 10_000;
/// A sidecar not heard of for this long, and for as long as its certificate may live, is forgotten.
const FORGET_SIDECAR: Duration = Duration::from_secs(24 * 60 * 60);
/// A gateway that is not connected for this long is forgotten, whether it said goodbye or not.
const FORGET_GATEWAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Tells one connection of a name from the next.
pub type Session = u64;

/// Who this cluster is.
#[derive(Clone, Debug)]
pub struct Own {
    /// Its name.
    pub cluster: ClusterName,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// Where its VIPs lie.
    pub vip_range: Ipv4Net,
    /// For endpoints that name no zone.
    pub zone: Zone,
    /// How long certificates of its workloads live.
    pub workload_lifetime: Duration,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The source's objects, whole.
    Manifests(Arc<Manifests>),
    /// An accepted state of the federation.
    Global(Arc<GlobalSnapshot>),
    /// A gateway's stream.
    Gateway(String, Session, GatewayEvent),
    /// A sidecar launcher's stream.
    Sidecar(String, Session, SidecarEvent),
}

/// What a gateway's stream brings.
#[derive(Clone, Debug)]
pub enum GatewayEvent {
    /// First.
    Hello(gateways::Hello),
    /// All it knows of other clusters.
    Report(Vec<Report>),
    /// It takes no new traffic.
    Draining,
    /// The stream broke.
    Lost,
    /// The stream ended in order: it goes on purpose.
    Goodbye,
}

/// What a launcher's stream brings.
#[derive(Clone, Debug)]
pub enum SidecarEvent {
    /// First.
    Hello(Sidecar),
    /// By inbound port.
    Readiness(BTreeMap<u16, bool>),
    /// The stream broke.
    Lost,
    /// The stream ended in order: the workload goes on purpose.
    Goodbye,
}

/// Why a hello was not accepted; for the one who said it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another workload is connected under the name.
    #[error("the sidecar name {name:?} is in use by {by}; give each sidecar a name of its own")]
    NameTaken {
        /// Which.
        name: String,
        /// Whose it is.
        by: String,
    },
    /// Too many.
    #[error("this agent knows {0} of them already, which is the limit")]
    Full(usize),
}

/// What outlives a restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Members {
    /// By name.
    pub gateways: BTreeMap<String, GatewayRecord>,
    /// By name.
    pub sidecars: BTreeMap<String, SidecarRecord>,
    /// When each export was first seen: its age decides conflicts.
    pub first_seen: BTreeMap<ServiceName, Timestamp>,
    /// So that a restart ends no hold-down.
    pub observations: Arc<Observations>,
}

/// A gateway, remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayRecord {
    /// As registered.
    pub gateway: LocalGateway,
    /// When its stream was last up.
    pub seen: Timestamp,
}

/// A sidecar, remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SidecarRecord {
    /// As registered.
    pub sidecar: Sidecar,
    /// What its launcher last said of the app, by inbound port.
    pub ready: BTreeMap<u16, bool>,
    /// When its stream was last up.
    pub seen: Timestamp,
}

/// What the control plane is to be told: exports and gateways. The bundle joins it in the uplink.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Intent {
    /// By name.
    pub exports: BTreeMap<ServiceName, Export>,
    /// Sorted by name.
    pub gateways: Vec<GatewayAddress>,
}

/// The state. [`State::apply`] and [`State::tick`] change it; the rest reads.
#[derive(Debug)]
pub struct State {
    own: Own,
    global: Arc<GlobalSnapshot>,
    manifests: Arc<Manifests>,
    index: Index,
    endpoints: Arc<LocalEndpoints>,
    exported: Arc<LocalEndpoints>,
    mismatches: Vec<Problem>,
    members: Members,
    gateways: BTreeMap<String, GatewayFeeds>,
    sidecars: BTreeMap<String, Session>,
}

impl State {
    /// What is known before anything happens.
    pub fn new(
        own: Own,
        global: Arc<GlobalSnapshot>,
        manifests: Arc<Manifests>,
        mut members: Members,
        now: Timestamp,
    ) -> Self {
        // While this agent was down, nobody could be heard: that counts against no one.
        members.sidecars.values_mut().for_each(|r| r.seen = now);
        members.gateways.values_mut().for_each(|r| r.seen = now);
        let mut state = Self {
            own,
            global,
            manifests,
            index: Index::default(),
            endpoints: Arc::default(),
            exported: Arc::default(),
            mismatches: Vec::new(),
            members,
            gateways: BTreeMap::new(),
            sidecars: BTreeMap::new(),
        };
        state.reindex(now);
        state
    }

    /// Takes one event.
    pub fn apply(&mut self, event: Event, now: Timestamp) -> Result<(), Refusal> {
        match event {
            Event::Manifests(manifests) => {
                self.manifests = manifests;
                self.reindex(now);
            }
            Event::Global(global) => {
                self.global = global;
                self.rejoin(now);
            }
            Event::Gateway(name, session, event) => self.gateway(name, session, event, now)?,
            Event::Sidecar(name, session, event) => self.sidecar(name, session, event, now)?,
        }
        Ok(())
    }

    /// Time passed.
    pub fn tick(&mut self, now: Timestamp) {
        let live = &self.sidecars;
        let before = self.members.sidecars.len();
        let forget = FORGET_SIDECAR.max(self.own.workload_lifetime);
        self.members.sidecars.retain(|name, r| live.contains_key(name) || now.since(r.seen) < forget);
        if self.members.sidecars.len() != before {
            self.rejoin(now);
        }
        let live = &self.gateways;
        let connected = |name: &String| live.get(name).is_some_and(GatewayFeeds::is_connected);
        self.members.gateways.retain(|name, r| connected(name) || now.since(r.seen) < FORGET_GATEWAY);
        let members = &self.members.gateways;
        self.gateways.retain(|name, _| members.contains_key(name));
        self.observe(now);
    }

    /// When something will change without an event: a hold-down or a report's freshness ends.
    pub fn next_change(&self, now: Timestamp) -> Option<Timestamp> {
        let observed = &self.members.observations;
        // Only what recovered at some time can be held down; each service once.
        let recovered: BTreeSet<&ServiceName> =
            observed.iter().filter(|(_, _, o)| o.recovered_at.is_some()).map(|(service, ..)| service).collect();
        let held = recovered.into_iter().filter_map(|name| {
            let service = self.global.services.get(name)?;
            failover::next_change(&choose(service, None, &self.own.cluster, &self.global, observed, now))
        });
        let stale = self.said().filter_map(|said| said.stale_at(now));
        held.chain(stale).min()
    }

    /// Everything, immutable.
    pub fn view(&self) -> View {
        View {
            cluster: self.own.cluster.clone(),
            vip_range: self.own.vip_range,
            global: self.global.clone(),
            objects_known: self.manifests.are_known(),
            endpoints: self.endpoints.clone(),
            gateways: self.members.gateways.iter().map(|(name, r)| (name.clone(), r.gateway.clone())).collect(),
            sidecars: self.members.sidecars.iter().map(|(name, r)| (name.clone(), r.sidecar.clone())).collect(),
            observations: self.members.observations.clone(),
        }
    }

    /// Endpoints of exported Services, for gateways.
    pub fn exported(&self) -> Arc<LocalEndpoints> {
        self.exported.clone()
    }

    /// What to publish; `None` until the source was read whole.
    pub fn intent(&self) -> Option<Intent> {
        let address = |LocalGateway { hello, .. }: &LocalGateway| GatewayAddress {
            name: hello.name.clone(),
            tunnel: hello.tunnel,
        };
        self.manifests.synced.then(|| Intent {
            exports: self.index.exports.clone(),
            gateways: self.members.gateways.values().map(|r| address(&r.gateway)).collect(),
        })
    }

    /// Objects, sidecars and Services that do not fit together.
    pub fn problems(&self) -> Vec<Problem> {
        let mut all: Vec<_> = self.index.problems.iter().chain(&self.mismatches).cloned().collect();
        let own = self.global.clusters.get(&self.own.cluster);
        if own.is_some_and(|c| c.state == ClusterState::Revoked) {
            all.push(problem(
                format!("cluster {}", self.own.cluster),
                "is revoked: the other clusters refuse it; to take part again, join under a new name with an empty state folder",
            ));
        }
        all
    }

    fn said(&self) -> impl Iterator<Item = &Said> {
        self.gateways.values().flat_map(GatewayFeeds::said)
    }

    /// What a restart begins with.
    pub fn members(&self) -> &Members {
        &self.members
    }

    fn gateway(&mut self, name: String, session: Session, event: GatewayEvent, now: Timestamp) -> Result<(), Refusal> {
        let known = self.members.gateways.contains_key(&name);
        if matches!(event, GatewayEvent::Hello(_)) && !known && self.members.gateways.len() >= limits::GATEWAYS {
            return Err(Refusal::Full(limits::GATEWAYS));
        }
        // Not for each report: the record is saved when it changes.
        let seen = !matches!(event, GatewayEvent::Report(_));
        let feeds = self.gateways.entry(name.clone()).or_default();
        let counts = match event {
            GatewayEvent::Hello(hello) => {
                feeds.begin(session, hello);
                true
            }
            GatewayEvent::Report(reports) => feeds.report(session, reports),
            GatewayEvent::Draining => feeds.drain(session),
            GatewayEvent::Goodbye => feeds.leave(session, now),
            GatewayEvent::Lost => feeds.lose(session, now),
        };
        let Some(gateway) = feeds.current().filter(|_| counts) else { return Ok(()) };
        if seen {
            self.members.gateways.insert(name, GatewayRecord { gateway: gateway.clone(), seen: now });
        }
        self.observe(now);
        Ok(())
    }

    fn sidecar(&mut self, name: String, session: Session, event: SidecarEvent, now: Timestamp) -> Result<(), Refusal> {
        if let SidecarEvent::Hello(sidecar) = event {
            let known = self.members.sidecars.get(&name);
            if let Some(other) = known.filter(|r| r.sidecar.identity != sidecar.identity)
                && self.sidecars.contains_key(&name)
            {
                return Err(Refusal::NameTaken { name, by: other.sidecar.identity.to_string() });
            }
            if known.is_none() && self.members.sidecars.len() >= MAX_SIDECARS {
                return Err(Refusal::Full(MAX_SIDECARS));
            }
            if self.sidecars.get(&name).is_some_and(|s| *s > session) {
                return Ok(());
            }
            // The same workload again: what was last known of its app stands until its launcher has probed it.
            let same = known
                .filter(|r| r.sidecar.identity == sidecar.identity && r.sidecar.hello.address == sidecar.hello.address);
            let ready = same.map(|r| r.ready.clone()).unwrap_or_default();
            self.sidecars.insert(name.clone(), session);
            self.members.sidecars.insert(name, SidecarRecord { sidecar, ready, seen: now });
            self.rejoin(now);
            return Ok(());
        }
        if self.sidecars.get(&name) != Some(&session) {
            return Ok(());
        }
        let Some(record) = self.members.sidecars.get_mut(&name) else { return Ok(()) };
        record.seen = now;
        match event {
            SidecarEvent::Readiness(ready) => {
                let accepted = &record.sidecar.hello.inbound;
                record.ready = ready.into_iter().filter(|(port, _)| accepted.contains_key(port)).collect();
            }
            SidecarEvent::Goodbye => {
                record.ready.clear();
                self.sidecars.remove(&name);
            }
            SidecarEvent::Lost => drop(self.sidecars.remove(&name)),
            SidecarEvent::Hello(_) => {}
        }
        self.rejoin(now);
        Ok(())
    }

    fn reindex(&mut self, now: Timestamp) {
        let context = Context { trust_domain: &self.own.trust_domain, first_seen: &self.members.first_seen, now };
        self.index = index::build(&self.manifests.files, context);
        if !self.manifests.are_known() {
            // What was never read has not gone: the exports keep their ages.
            return self.rejoin(now);
        }
        self.members.first_seen = self.index.exports.iter().map(|(name, e)| (name.clone(), e.created_at)).collect();
        self.rejoin(now);
    }

    fn rejoin(&mut self, now: Timestamp) {
        let probed = self.members.sidecars.values().map(|r| Probed { sidecar: &r.sidecar, ready: &r.ready });
        let (endpoints, mismatches) = join(&self.index, probed, &self.own.zone);
        self.mismatches = mismatches;
        let endpoints = by_global_ports(endpoints, &self.index, &self.own.cluster, &self.global);
        if *self.endpoints != endpoints {
            self.endpoints = Arc::new(endpoints);
        }
        let exported = exported(&self.endpoints, &self.index);
        if *self.exported != exported {
            self.exported = Arc::new(exported);
        }
        self.observe(now);
    }

    /// Brings the observations in line with endpoints, reports and exporters.
    fn observe(&mut self, now: Timestamp) {
        let observations = &mut self.members.observations;
        let own = &self.own.cluster;
        let exports = |service: &ServiceName, cluster: &ClusterName| {
            self.global.services.get(service).is_some_and(|s| s.exporters.contains_key(cluster))
        };
        let mut current: BTreeMap<(ServiceName, ClusterName), Availability> = BTreeMap::new();
        for ((service, cluster), availability) in
            reports::merge(self.gateways.values().flat_map(GatewayFeeds::said), now)
        {
            if cluster != own && exports(service, cluster) {
                current.insert((service.clone(), cluster.clone()), availability);
            }
        }
        for (service, endpoints) in &self.endpoints.services {
            current.insert((service.clone(), own.clone()), local(endpoints));
        }
        let gone = |service: &ServiceName, cluster: &ClusterName| match cluster == own {
            true => self.manifests.are_known() && !self.endpoints.services.contains_key(service),
            false => !exports(service, cluster),
        };
        let gone: Vec<_> = observations
            .iter()
            .filter(|(service, cluster, _)| gone(service, cluster))
            .map(|(service, cluster, _)| (service.clone(), cluster.clone()))
            .collect();
        for (service, cluster) in gone {
            Arc::make_mut(observations).forget(&service, &cluster);
        }
        for ((service, cluster), availability) in current {
            if observations.find(&service, &cluster).is_none_or(|known| known.current != availability) {
                Arc::make_mut(observations).observe(&service, &cluster, availability, now);
            }
        }
    }
}

/// This cluster's own availability of one Service.
fn local(endpoints: &[Endpoint]) -> Availability {
    let count = |n: usize| u8::try_from(n).unwrap_or(u8::MAX);
    Availability {
        ready: count(endpoints.iter().filter(|e| e.is_serving()).count()),
        total: count(endpoints.len()),
        reachable: true,
    }
}

#[cfg(test)]
mod tests;
