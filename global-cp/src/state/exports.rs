//! What clusters export, and what becomes of it: publications, withdrawals that are held, merging.
//!
//! An export that a cluster published may yet not be seen by anybody: outside the cluster's grant, without a virtual IP
//! left for it. Nor need it be gone that the cluster does not publish any more: a sudden withdrawal of most exports is held
//! until it is confirmed. [`State::conditions`] says which and why.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use isthmus_api::convert::limits;
use isthmus_model::{
    global::{ClusterInfo, GlobalService, GlobalSnapshot},
    grant::MemberRole,
    ids::{ClusterName, ServiceName},
    merge::merge,
    service::{Export, GatewayAddress, Publication},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{
    Change, Publish, Rejection, State, apply::within, incarnation::Publisher, require_active, trust::check_successor,
};

/// Conditions that are told; whoever has more needs no longer list.
const MAX_CONDITIONS: usize = 1_000;

/// What is kept of a cluster beyond what all members see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Member {
    /// When it joined for the first time.
    pub(super) joined_at: Timestamp,
    /// Its latest publication's exports, and those that it withdrew but are held. Shared: a state is cloned for each view.
    pub(super) exports: Arc<BTreeMap<ServiceName, Claim>>,
    /// Its latest publication's gateways, whatever its grant makes of them. Sorted.
    #[serde(default)]
    pub(super) gateways: Vec<GatewayAddress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) held: Option<HeldWithdrawal>,
    #[serde(default)]
    pub(super) publisher: Publisher,
}

/// An export as merged, with the age that the cluster claimed for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Claim {
    /// As published, before it was clamped.
    pub(super) claimed_at: Timestamp,
    /// With `created_at` clamped to between the cluster's join and the time of the entry that brought it.
    pub(super) export: Export,
}

/// Exports that their cluster withdrew, too many at once to believe it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeldWithdrawal {
    /// When the first of them was withdrawn.
    pub since: Timestamp,
    /// Which.
    pub services: BTreeSet<ServiceName>,
}

/// What an operator, or a cluster, should know of one of its exports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExportCondition {
    /// Of which export; absent if of the publication as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// One word.
    pub reason: ConditionReason,
    /// A sentence: what is the matter, and what to do.
    pub message: String,
}

/// See [`ExportCondition::reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionReason {
    /// The cluster's grant leaves the namespace out.
    NotGranted,
    /// All virtual IPs are taken, or in quarantine.
    NoVirtualIp,
    /// The cluster withdrew it together with many others; it stays until that is confirmed.
    WithdrawalHeld,
}

impl ConditionReason {
    /// As it is written.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotGranted => "NotGranted",
            Self::NoVirtualIp => "NoVirtualIp",
            Self::WithdrawalHeld => "WithdrawalHeld",
        }
    }
}

impl Member {
    pub(super) fn new(joined_at: Timestamp) -> Self {
        Self { joined_at, exports: Arc::default(), gateways: Vec::new(), held: None, publisher: Publisher::default() }
    }

    /// How many exports its latest publication held.
    fn published(&self) -> usize {
        self.exports.len() - self.held.as_ref().map_or(0, |held| held.services.len())
    }

    fn holds(&self, name: &ServiceName) -> bool {
        self.held.as_ref().is_some_and(|held| held.services.contains(name))
    }
}

impl State {
    pub(super) fn publish(&mut self, publish: &Publish) -> Result<Change, Rejection> {
        let Publish { cluster, publication, incarnation, now } = publish;
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        require_active(global, cluster)?;
        let unknown = || Rejection::UnknownCluster { cluster: cluster.clone() };
        let mut info = global.clusters.get(cluster).ok_or_else(unknown)?.clone();
        let member = self.members.get(cluster).ok_or_else(unknown)?;
        let publisher = member.publisher.followed_by(cluster, *incarnation)?;
        check_publication(&info, publication)?;

        let now = self.clock.max(*now);
        let mut exports = claims(member, publication, now);
        let held = withheld_withdrawal(member, &exports, global, now);
        let kept = held.iter().flat_map(|held| &held.services);
        exports.extend(kept.filter_map(|name| Some((name.clone(), member.exports.get(name)?.clone()))));
        let touched: BTreeSet<ServiceName> = member.exports.keys().chain(exports.keys()).cloned().collect();
        let mut gateways = publication.gateways.clone();
        gateways.sort();
        info.gateways = granted_gateways(&info, &gateways);
        if info.bundle.document != publication.bundle.document {
            info.bundle = publication.bundle.clone();
        }

        self.clock = now;
        let joined_at = member.joined_at;
        let member = Member { joined_at, exports: Arc::new(exports), gateways, held, publisher };
        self.members.insert(cluster.clone(), member);
        let merged = self.remerge(cluster, &touched);
        Ok(self.replace_visible(info, merged))
    }

    /// Would publishing this again change nothing? Lets a session answer without writing to the log.
    pub fn already_published(
        &self,
        cluster: &ClusterName,
        publication: &Publication,
        incarnation: Option<super::Incarnation>,
    ) -> bool {
        let Some(info) = self.global.as_ref().and_then(|g| g.active_cluster(cluster)) else { return false };
        let Some(member) = self.members.get(cluster) else { return false };
        member.publisher.is(incarnation)
            && member.gateways == publication.gateways
            && info.bundle.trust_domain == publication.bundle.trust_domain
            && info.bundle.document == publication.bundle.document
            && member.published() == publication.exports.len()
            && publication.exports.iter().all(|(name, export)| {
                member.exports.get(name).filter(|_| !member.holds(name)).is_some_and(|claim| {
                    claim.claimed_at == export.created_at
                        && claim.export.kind == export.kind
                        && claim.export.ports == export.ports
                        && claim.export.identities == export.identities
                })
            })
    }

    /// The exports that `cluster` withdrew and that are held are gone for good.
    pub(super) fn confirm_withdrawal(&mut self, cluster: &ClusterName) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        require_active(global, cluster)?;
        let unknown = || Rejection::UnknownCluster { cluster: cluster.clone() };
        let info = global.clusters.get(cluster).ok_or_else(unknown)?.clone();
        let member = self.members.get_mut(cluster).ok_or_else(unknown)?;
        let Some(held) = member.held.take() else { return Ok(Change::default()) };
        Arc::make_mut(&mut member.exports).retain(|name, _| !held.services.contains(name));
        let merged = self.remerge(cluster, &held.services);
        Ok(self.replace_visible(info, merged))
    }

    /// What time brings: withdrawals that nobody objected to, virtual IPs whose quarantine is over.
    pub(super) fn pass_time(&mut self, now: Timestamp) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        self.clock = self.clock.max(now);
        let confirm_after = global.settings.withdrawals.confirm_after_ms;
        let due =
            |held: &HeldWithdrawal| confirm_after.is_some_and(|ms| held.since.0.saturating_add(ms) <= self.clock.0);
        let overdue: Vec<ClusterName> = self
            .members
            .iter()
            .filter(|(_, member)| member.held.as_ref().is_some_and(due))
            .map(|(cluster, _)| cluster.clone())
            .collect();
        let mut change = Change::default();
        for cluster in overdue {
            change.extend(self.confirm_withdrawal(&cluster)?);
        }
        if !self.waiting.is_empty() && self.vips.available(self.clock) > 0 {
            change.extend(self.serve_waiting());
        }
        Ok(change)
    }

    /// When [`Self::pass_time`] will have something to do, if ever.
    pub fn due(&self) -> Option<Timestamp> {
        let confirm_after = self.global.as_ref()?.settings.withdrawals.confirm_after_ms;
        let held = self.members.values().filter_map(|member| member.held.as_ref());
        let confirmed = held.filter_map(|held| Some(Timestamp(held.since.0.saturating_add(confirm_after?)))).min();
        let free = if self.waiting.is_empty() { None } else { self.vips.next_free() };
        confirmed.into_iter().chain(free).min()
    }

    /// What `cluster` withdrew and is held.
    pub fn held_withdrawal(&self, cluster: &ClusterName) -> Option<&HeldWithdrawal> {
        self.members.get(cluster)?.held.as_ref()
    }

    /// Of `cluster`'s exports those that are not as it says, and why; at most 1,000.
    pub fn conditions(&self, cluster: &ClusterName) -> Vec<ExportCondition> {
        let Some((global, member)) = self.global.as_ref().zip(self.members.get(cluster)) else { return Vec::new() };
        let Some(info) = global.active_cluster(cluster) else { return Vec::new() };
        let everything_granted = info.grant.export_namespaces == isthmus_model::grant::Namespaces::All;
        if everything_granted && self.waiting.is_empty() && member.held.is_none() && info.gateways == member.gateways {
            return Vec::new();
        }
        let of = |(reason, message), service: Option<&ServiceName>| ExportCondition {
            service: service.cloned(),
            reason,
            message,
        };
        let gateways = (info.gateways != member.gateways).then(|| of(gateways_not_granted(cluster), None));
        let exports = member.exports.keys().filter_map(|name| {
            let condition = if member.holds(name) {
                withdrawal_held(cluster, global.settings.withdrawals.confirm_after_ms)
            } else if !info.grant.may_export(&name.namespace) {
                not_granted(cluster, name)
            } else if self.waiting.contains(name) {
                no_virtual_ip()
            } else {
                return None;
            };
            Some(of(condition, Some(name)))
        });
        gateways.into_iter().chain(exports).take(MAX_CONDITIONS).collect()
    }

    /// Merges the exports of `touched` anew, of which only `cluster`'s have changed: what each of them became, `None` if
    /// nobody exports it any more.
    pub(super) fn remerge(
        &mut self,
        cluster: &ClusterName,
        touched: &BTreeSet<ServiceName>,
    ) -> Vec<(ServiceName, Option<Arc<GlobalService>>)> {
        let Some(global) = self.global.clone() else { return Vec::new() };
        let exported = |state: &Self, name: &ServiceName| !state.exporters(&global, cluster, name).is_empty();
        let appearing: BTreeSet<ServiceName> = touched
            .iter()
            .filter(|name| !global.services.contains_key(*name) && exported(self, name))
            .cloned()
            .collect();
        let fresh: BTreeMap<ServiceName, _> = self.vips.assign(&appearing, self.clock).into_iter().collect();
        let mut merged = Vec::with_capacity(touched.len());
        for name in touched {
            let held = global.services.get(name).map(|service| service.index);
            let index = held.or_else(|| fresh.get(name).copied());
            let service =
                index.and_then(|index| merge(name, index, &self.exporters(&global, cluster, name)).map(Arc::new));
            merged.push((name.clone(), service));
        }
        for (name, service) in &merged {
            match (service, global.services.get(name)) {
                (None, Some(gone)) => self.vips.release(name.clone(), gone.index, self.clock),
                (None, None) if appearing.contains(name) => drop(self.waiting.insert(name.clone())),
                _ => drop(self.waiting.remove(name)),
            }
        }
        merged
    }

    /// Gives the virtual IPs that are free to services that wait for one.
    fn serve_waiting(&mut self) -> Change {
        let mut change = Change::default();
        for name in self.waiting.clone() {
            let Some(cluster) =
                self.members.iter().find(|(_, m)| m.exports.contains_key(&name)).map(|(c, _)| c.clone())
            else {
                self.waiting.remove(&name);
                continue;
            };
            let Some(info) = self.global.as_ref().and_then(|g| g.clusters.get(&cluster)).cloned() else { continue };
            let merged = self.remerge(&cluster, &BTreeSet::from([name]));
            change.extend(self.replace_visible(info, merged));
        }
        change
    }

    /// Who exports `name` and may, when `changed` is the only one whose export of it may differ from what is merged. A
    /// revoked cluster exports nothing.
    fn exporters(
        &self,
        global: &GlobalSnapshot,
        changed: &ClusterName,
        name: &ServiceName,
    ) -> BTreeMap<&ClusterName, &Export> {
        let export = |cluster: &ClusterName| {
            let (cluster, member) = self.members.get_key_value(cluster)?;
            let granted = global.clusters.get(cluster).is_some_and(|info| info.grant.may_export(&name.namespace));
            Some((cluster, &member.exports.get(name).filter(|_| granted)?.export))
        };
        match global.services.get(name) {
            // Looking at all clusters for each name would make a large federation slow.
            Some(service) => service.exporters.keys().chain([changed]).filter_map(export).collect(),
            None if self.waiting.contains(name) => self.members.keys().filter_map(export).collect(),
            None => export(changed).into_iter().collect(),
        }
    }

    /// Writes what differs into what members see, and says what that was.
    pub(super) fn replace_visible(
        &mut self,
        info: ClusterInfo,
        services: Vec<(ServiceName, Option<Arc<GlobalService>>)>,
    ) -> Change {
        let mut change = Change::default();
        let Some(global) = &mut self.global else { return change };
        let cluster_differs = global.clusters.get(&info.name) != Some(&info);
        let differing: Vec<_> =
            services.into_iter().filter(|(name, service)| global.services.get(name) != service.as_ref()).collect();
        if !cluster_differs && differing.is_empty() {
            return change;
        }
        let global = Arc::make_mut(global);
        if cluster_differs {
            change.clusters.insert(info.name.clone());
            global.clusters.insert(info.name.clone(), info);
        }
        for (name, service) in differing {
            match service {
                Some(service) => global.services.insert(name.clone(), service),
                None => global.services.remove(&name),
            };
            change.services.insert(name);
        }
        change
    }
}

/// The gateways of a cluster that may have some.
pub(super) fn granted_gateways(info: &ClusterInfo, published: &[GatewayAddress]) -> Vec<GatewayAddress> {
    if info.grant.roles.contains(&MemberRole::Gateway) { published.to_vec() } else { Vec::new() }
}

/// What of `member`'s exports is to stay although `published` lacks it. What is held already stays held until it comes
/// back or is confirmed; what goes now is judged by itself.
fn withheld_withdrawal(
    member: &Member,
    published: &BTreeMap<ServiceName, Claim>,
    global: &GlobalSnapshot,
    now: Timestamp,
) -> Option<HeldWithdrawal> {
    let gone = |name: &&ServiceName| !published.contains_key(*name);
    let mut services: BTreeSet<ServiceName> = member.exports.keys().filter(gone).cloned().collect();
    let policy = global.settings.withdrawals;
    let sudden = services.iter().filter(|name| !member.holds(name)).count();
    if !policy.hold {
        return None;
    }
    if !policy.holds(member.published(), sudden) {
        services.retain(|name| member.holds(name));
    }
    let since = member.held.as_ref().map_or(now, |held| held.since);
    (!services.is_empty()).then_some(HeldWithdrawal { since, services })
}

fn withdrawal_held(cluster: &ClusterName, confirm_after_ms: Option<u64>) -> (ConditionReason, String) {
    let by_time = match confirm_after_ms {
        Some(ms) => format!("; without one it counts as meant after {} s", ms.div_ceil(1000)),
        None => String::new(),
    };
    let message = format!(
        "the cluster withdrew most of its exports at once, so it stays until that is confirmed: isthmusctl cluster \
         confirm-withdrawal {cluster}{by_time}"
    );
    (ConditionReason::WithdrawalHeld, message)
}

fn not_granted(cluster: &ClusterName, service: &ServiceName) -> (ConditionReason, String) {
    let message = format!(
        "{cluster}'s grant does not let it export services of namespace {}, so no other cluster sees it; widen the \
         grant (isthmusctl get clustergrant {cluster} -o yaml) or remove the ServiceExport",
        service.namespace
    );
    (ConditionReason::NotGranted, message)
}

fn gateways_not_granted(cluster: &ClusterName) -> (ConditionReason, String) {
    let message = format!(
        "{cluster}'s grant does not let it run gateways, so no other cluster sees them; add the role gateway to the grant \
         (isthmusctl get clustergrant {cluster} -o yaml)"
    );
    (ConditionReason::NotGranted, message)
}

fn no_virtual_ip() -> (ConditionReason, String) {
    let message =
        "no virtual IP is left for it: all 65,534 are in use, or were within the last day; it gets one as soon as \
                   one is free"
            .to_owned();
    (ConditionReason::NoVirtualIp, message)
}

/// A cluster speaks only for itself, and within limits.
fn check_publication(info: &ClusterInfo, publication: &Publication) -> Result<(), Rejection> {
    let own = &info.bundle.trust_domain;
    if publication.bundle.trust_domain != *own {
        return Err(Rejection::TrustDomainFixed {
            cluster: info.name.clone(),
            fixed: own.clone(),
            offered: publication.bundle.trust_domain.clone(),
        });
    }
    if publication.bundle.document != info.bundle.document {
        check_successor(&info.bundle, &publication.bundle)
            .map_err(|why| Rejection::Bundle { cluster: info.name.clone(), why })?;
    }
    let narrower = |granted: Option<u32>, limit: usize| granted.map_or(limit, |granted| limit.min(granted as usize));
    let granted = info.grant.limits;
    within("exports", publication.exports.len(), narrower(granted.exports, limits::EXPORTS))?;
    within("gateways", publication.gateways.len(), narrower(granted.gateways, limits::GATEWAYS))?;
    let names: BTreeSet<&str> = publication.gateways.iter().map(|gateway| gateway.name.as_str()).collect();
    if names.len() != publication.gateways.len() {
        return Err(Rejection::Malformed { what: "two gateways have the same name; each needs its own".to_owned() });
    }
    if names.iter().any(|name| !matches!(name.len(), 1..=63)) {
        return Err(Rejection::Malformed { what: "a gateway's name must have 1 to 63 characters".to_owned() });
    }
    for (name, export) in &publication.exports {
        if export.service != *name {
            return Err(Rejection::Malformed { what: format!("export {name} holds service {}", export.service) });
        }
        within(&format!("ports of export {name}"), export.ports.len(), limits::PORTS)?;
        within(&format!("identities of export {name}"), export.identities.len(), limits::IDENTITIES)?;
        if let Some(foreign) = export.identities.iter().find(|id| id.trust_domain() != own) {
            return Err(Rejection::ForeignIdentity {
                service: name.clone(),
                identity: foreign.clone(),
                trust_domain: own.clone(),
            });
        }
    }
    Ok(())
}

/// The exports with their ages clamped to between the cluster's join and now. An export whose claimed age did not change
/// keeps the age it was given, lest a clock that runs ahead makes every publication a change.
fn claims(member: &Member, publication: &Publication, now: Timestamp) -> BTreeMap<ServiceName, Claim> {
    let claim = |(name, export): (&ServiceName, &Export)| {
        let claimed_at = export.created_at;
        let before = member.exports.get(name).filter(|held| held.claimed_at == claimed_at);
        let created_at = match before {
            Some(held) => held.export.created_at,
            None => claimed_at.max(member.joined_at).min(now.max(member.joined_at)),
        };
        (name.clone(), Claim { claimed_at, export: Export { created_at, ..export.clone() } })
    };
    publication.exports.iter().map(claim).collect()
}
