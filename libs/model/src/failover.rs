//! Where traffic for a service goes, and why: the one choice that the agent (EDS), the gateway (candidates), DNS and
//! `isthmusctl explain` share.
//!
//! In: the service, who asks and where, the policy, what is known of each cluster, and the time. Out: every exporting
//! cluster, ordered, each with the reason for its place. A region outside the policy's boundary is never eligible.

use std::{collections::BTreeSet, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    access::granted,
    availability::{Observation, Observations},
    global::{ClusterInfo, ClusterState, GlobalService, GlobalSnapshot},
    ids::{ClusterName, Region, ServiceName},
    time::Timestamp,
};

/// Rules for services without a policy of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FailoverPolicy {
    /// How long a recovered cluster must stay healthy before traffic returns to it.
    #[serde(with = "duration_ms", rename = "holdDownMs")]
    pub hold_down: Duration,
    /// Regions that traffic may enter; `None`: all. A hard boundary.
    pub allowed_regions: Option<BTreeSet<Region>>,
}

impl Default for FailoverPolicy {
    fn default() -> Self {
        Self { hold_down: Duration::from_secs(10), allowed_regions: None }
    }
}

impl FailoverPolicy {
    /// May traffic enter this region? An unknown one, which is empty, is outside every boundary.
    pub fn allows(&self, region: &Region) -> bool {
        self.allowed_regions.as_ref().is_none_or(|allowed| allowed.contains(region) && !region.as_str().is_empty())
    }
}

/// How near a cluster is to the caller, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Tier {
    /// The caller's own cluster.
    LocalCluster,
    /// Same region and zone.
    LocalZone,
    /// Same region.
    LocalRegion,
    /// Anywhere.
    Any,
}

/// Whether a cluster may get traffic now. Ordered from best to worst.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "state")]
pub enum Eligibility {
    /// Healthy.
    Ready,
    /// Healthy again, but not for long enough; used only when nothing else is ready.
    HoldDown {
        /// When it becomes ready.
        until: Timestamp,
    },
    /// Nothing reported yet; tried after all that is known to work.
    Unknown,
    /// Healthy or not known to be otherwise, but an operator wants other clusters' traffic off it: used only when nothing
    /// else can be.
    Draining,
    /// No working tunnel leads there.
    Unreachable,
    /// Reachable, but no endpoint is ready.
    NoEndpoints,
    /// Outside the policy's regions or a grant, or revoked: never used.
    Forbidden,
}

/// One exporting cluster, with the reason for its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Where.
    pub cluster: ClusterName,
    /// How near.
    pub tier: Tier,
    /// Whether it may be used now.
    pub eligibility: Eligibility,
    /// One sentence for people.
    pub reason: String,
}

/// All exporters of `service` that expose port `port` (any port if `None`), best first.
///
/// `caller` must be a cluster of `global`, else every tier is [`Tier::Any`]. Order: by [`Eligibility`] (`Ready`,
/// `HoldDown`, `Unknown`, `Draining`, then what may not be used), then tier, then name. So the first one is the destination if it is
/// [`Candidate::usable`], and nothing may be used if it is not. A cluster that nobody has spoken of yet (`Unknown`, as
/// all are when a process starts) is tried when nothing better is known: starting never cuts traffic off.
pub fn choose(
    service: &GlobalService,
    port: Option<u16>,
    caller: &ClusterName,
    global: &GlobalSnapshot,
    observed: &Observations,
    now: Timestamp,
) -> Vec<Candidate> {
    let policy = &global.settings.failover;
    let caller = global.clusters.get(caller);
    let mut candidates: Vec<Candidate> = exposing(service, port)
        .map(|name| {
            let info = global.clusters.get(name);
            let tier = tier(caller, info);
            let (eligibility, why) = match forbidden(name, info, caller, (&service.name, policy)) {
                Some(why) => (Eligibility::Forbidden, why),
                None => {
                    let (eligibility, state) = eligibility(observed.find(&service.name, name), policy, now);
                    let (eligibility, state) = drained(info, tier, eligibility, state);
                    (eligibility, format!("{}, {state}", place(tier, info)))
                }
            };
            Candidate { cluster: name.clone(), tier, eligibility, reason: why }
        })
        .collect();
    candidates.sort_by(|a, b| a.rank().cmp(&b.rank()));
    candidates
}

/// When the order may change by time alone: the earliest end of a hold-down. Who holds a choice chooses again then.
pub fn next_change(candidates: &[Candidate]) -> Option<Timestamp> {
    candidates.iter().filter_map(Candidate::held_until).min()
}

impl Candidate {
    /// May a connection be tried here at all? `HoldDown`, `Unknown` and `Draining` may, in their place in the order.
    pub fn usable(&self) -> bool {
        match self.eligibility {
            Eligibility::Ready | Eligibility::HoldDown { .. } | Eligibility::Unknown | Eligibility::Draining => true,
            Eligibility::Unreachable | Eligibility::NoEndpoints | Eligibility::Forbidden => false,
        }
    }

    /// When its hold-down ends, if it is in one.
    pub fn held_until(&self) -> Option<Timestamp> {
        match self.eligibility {
            Eligibility::HoldDown { until } => Some(until),
            _ => None,
        }
    }

    /// The place in the order. Unlike [`Eligibility`]'s own order, when a hold-down ends does not matter.
    fn rank(&self) -> (u8, Tier, &ClusterName) {
        let class = match self.eligibility {
            Eligibility::Ready => 0,
            Eligibility::HoldDown { .. } => 1,
            Eligibility::Unknown => 2,
            Eligibility::Draining => 3,
            Eligibility::Unreachable => 4,
            Eligibility::NoEndpoints => 5,
            Eligibility::Forbidden => 6,
        };
        (class, self.tier, &self.cluster)
    }
}

/// The exporters that get traffic for `port`.
fn exposing(service: &GlobalService, port: Option<u16>) -> impl Iterator<Item = &ClusterName> {
    let exposes = move |cluster: &ClusterName, number: u16| {
        service.ports.iter().any(|p| p.port.number == number && p.clusters.contains(cluster))
    };
    service.exporters.keys().filter(move |cluster| port.is_none_or(|number| exposes(cluster, number)))
}

fn tier(caller: Option<&ClusterInfo>, candidate: Option<&ClusterInfo>) -> Tier {
    let (Some(caller), Some(candidate)) = (caller, candidate) else { return Tier::Any };
    let (here, there) = (&caller.locality, &candidate.locality);
    // Two unknown regions or zones are not the same one.
    let same_region = here.region == there.region && !here.region.as_str().is_empty();
    let same_zone = same_region && here.zone == there.zone && !here.zone.as_str().is_empty();
    match (caller.name == candidate.name, same_zone, same_region) {
        (true, ..) => Tier::LocalCluster,
        (_, true, _) => Tier::LocalZone,
        (_, _, true) => Tier::LocalRegion,
        _ => Tier::Any,
    }
}

/// Why `cluster` may never be used, if so. An unknown region is outside any boundary.
fn forbidden(
    cluster: &ClusterName,
    info: Option<&ClusterInfo>,
    caller: Option<&ClusterInfo>,
    (service, policy): (&ServiceName, &FailoverPolicy),
) -> Option<String> {
    let Some(info) = info else {
        return Some(format!("{cluster} is not a cluster of the federation"));
    };
    if info.state == ClusterState::Revoked {
        return Some(format!("{cluster} is revoked"));
    }
    if let Some(caller) = caller
        && let Err(denied) = granted(caller, info, &service.namespace)
    {
        return Some(denied.to_string());
    }
    let allowed = policy.allowed_regions.as_ref()?;
    if policy.allows(&info.locality.region) {
        return None;
    }
    let allowed: Vec<&str> = allowed.iter().map(Region::as_str).collect();
    Some(format!("{} is outside the allowed regions ({})", region(&info.locality.region), allowed.join(", ")))
}

fn eligibility(observation: Option<&Observation>, policy: &FailoverPolicy, now: Timestamp) -> (Eligibility, String) {
    let Some(Observation { current, recovered_at, .. }) = observation else {
        return (Eligibility::Unknown, "nothing reported yet".to_owned());
    };
    let endpoints = format!("{} of {} endpoints ready", current.ready, current.total);
    if !current.reachable {
        return (Eligibility::Unreachable, "no working tunnel leads there".to_owned());
    }
    if current.ready == 0 {
        return (Eligibility::NoEndpoints, endpoints);
    }
    match recovered_at {
        Some(recovered_at) if holds(*recovered_at, policy.hold_down, now) => {
            let until = *recovered_at + policy.hold_down;
            let why = format!(
                "held down for {} more (recovered {} ago, hold-down {}), {endpoints}",
                seconds(until.since(now)),
                seconds(now.since(*recovered_at)),
                seconds(policy.hold_down)
            );
            (Eligibility::HoldDown { until }, why)
        }
        _ => (Eligibility::Ready, endpoints),
    }
}

/// What becomes of a usable cluster that drains, for callers elsewhere.
fn drained(info: Option<&ClusterInfo>, tier: Tier, eligibility: Eligibility, state: String) -> (Eligibility, String) {
    let drains = info.is_some_and(|info| info.state == ClusterState::Draining) && tier != Tier::LocalCluster;
    match eligibility {
        Eligibility::Ready | Eligibility::HoldDown { .. } | Eligibility::Unknown if drains => {
            (Eligibility::Draining, format!("draining, {state}"))
        }
        eligibility => (eligibility, state),
    }
}

/// Still in the hold-down. A recovery that lies further ahead than the hold-down is long means that the clock was set
/// back; it must not hold the cluster down until the clock has caught up.
fn holds(recovered_at: Timestamp, hold_down: Duration, now: Timestamp) -> bool {
    recovered_at + hold_down > now && recovered_at.since(now) <= hold_down
}

fn place(tier: Tier, info: Option<&ClusterInfo>) -> String {
    let Some(locality) = info.map(|i| &i.locality) else { return "unknown place".to_owned() };
    match tier {
        Tier::LocalCluster => "the caller's own cluster".to_owned(),
        Tier::LocalZone => format!("same zone {}", locality.zone),
        Tier::LocalRegion => format!("same region {}", locality.region),
        Tier::Any => region(&locality.region),
    }
}

fn region(region: &Region) -> String {
    if region.as_str().is_empty() { "an unknown region".to_owned() } else { format!("region {region}") }
}

/// Tenths of a second are enough for people.
fn seconds(d: Duration) -> String {
    let tenths = d.as_millis().div_ceil(100);
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} s"),
        (whole, tenth) => format!("{whole}.{tenth} s"),
    }
}

mod duration_ms {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        u64::deserialize(d).map(Duration::from_millis)
    }
}

#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
