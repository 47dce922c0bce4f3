//! `apply`: one command, one decision. Everything is checked before anything is touched, so that a refusal leaves the
//! state as it was.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use isthmus_api::convert::limits;
use isthmus_model::{
    global::{ClusterInfo, ClusterState, GlobalService, GlobalSnapshot, Settings},
    ids::{ClusterIndex, ClusterName, Epoch, Revision, ServiceName, Stamp},
    merge::merge,
    service::{Export, Publication, TrustBundle},
    time::Timestamp,
};

use super::{
    Change, Claim, Command, Grant, Join, MAX_TOKENS, Member, MintToken, Outcome, Publish, Rejection, Response, State,
    require_active,
    trust::{check_first_bundle, check_successor},
};

/// Expired tokens are remembered this long, so that their refusal can say more than "unknown".
pub(super) const TOKEN_MEMORY_MS: u64 = 7 * 24 * 3600 * 1000;

impl State {
    /// Applies one command: the answer, and what members see of it, if anything.
    pub(crate) fn apply(&mut self, command: &Command) -> (Response, Option<Change>) {
        let result = match command {
            Command::SetFederationBundle { bundle } => self.set_federation_bundle(bundle),
            Command::SetSettings { settings } => self.set_settings(settings),
            Command::MintToken(mint) => self.mint_token(mint),
            Command::Join(join) => self.join(join),
            Command::Publish(publish) => self.publish(publish),
            Command::Revoke { cluster } => self.revoke(cluster),
            Command::MintNodeToken(mint) => self.mint_node_token(mint),
            Command::AdmitNode(admit) => self.admit_node(admit),
            Command::SetNode(set) => self.set_node(set),
            Command::RemoveNode { node } => self.remove_node(node),
            Command::Rollback { to } => self.rollback(*to),
            Command::Restore(backup) => self.restore(backup),
            Command::StartEpoch => self.start_epoch(),
        };
        match result {
            Err(rejection) => (Response::Rejected(rejection), None),
            Ok(change) if change.is_empty() => {
                (Response::Accepted(Outcome { stamp: self.stamp(), changed: false }), None)
            }
            Ok(change) => {
                let stamp = self.bump();
                if let Some(global) = self.global.as_ref().filter(|_| change.settings) {
                    self.past.remember(stamp.revision, &global.settings);
                }
                (Response::Accepted(Outcome { stamp, changed: true }), Some(change))
            }
        }
    }

    pub(super) fn set_federation_bundle(&mut self, bundle: &TrustBundle) -> Result<Change, Rejection> {
        let change = Change { bundle: true, ..Change::default() };
        let Some(global) = &mut self.global else {
            check_first_bundle(bundle).map_err(|why| Rejection::FederationBundle { why })?;
            self.global = Some(Arc::new(GlobalSnapshot {
                stamp: Stamp { epoch: Epoch(1), revision: Revision(0) },
                federation: bundle.trust_domain.clone(),
                federation_bundle: bundle.clone(),
                settings: Settings::default(),
                clusters: BTreeMap::new(),
                services: BTreeMap::new(),
            }));
            return Ok(change);
        };
        if global.federation != bundle.trust_domain {
            return Err(Rejection::OtherFederation {
                stored: global.federation.clone(),
                offered: bundle.trust_domain.clone(),
            });
        }
        if global.federation_bundle.document == bundle.document {
            return Ok(Change::default());
        }
        check_successor(&global.federation_bundle, bundle).map_err(|why| Rejection::FederationBundle { why })?;
        Arc::make_mut(global).federation_bundle = bundle.clone();
        Ok(change)
    }

    pub(super) fn set_settings(&mut self, settings: &Settings) -> Result<Change, Rejection> {
        let global = self.global.as_mut().ok_or(Rejection::NotFounded)?;
        if global.settings == *settings {
            return Ok(Change::default());
        }
        Arc::make_mut(global).settings = settings.clone();
        Ok(Change { settings: true, ..Change::default() })
    }

    fn mint_token(&mut self, mint: &MintToken) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        if global.clusters.get(&mint.cluster).is_some_and(|info| info.state == ClusterState::Revoked) {
            return Err(Rejection::ClusterRevoked { cluster: mint.cluster.clone() });
        }
        let now = self.clock.max(mint.now);
        let forgotten = |grant: &Grant| grant.expires_at.0.saturating_add(TOKEN_MEMORY_MS) <= now.0;
        let kept = self.tokens.values().filter(|grant| !forgotten(grant)).count();
        within("join tokens outstanding", kept + 1, MAX_TOKENS)?;
        self.clock = now;
        self.tokens.retain(|_, grant| !forgotten(grant));
        let grant = Grant { cluster: mint.cluster.clone(), expires_at: mint.expires_at, used_at: None, used_by: None };
        self.tokens.insert(mint.hash, grant);
        Ok(Change::default())
    }

    fn join(&mut self, join: &Join) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        let now = self.clock.max(join.now);
        self.check_token(&join.hash, join.key, &join.cluster, now)?;
        let info = match global.clusters.get(&join.cluster) {
            Some(member) => rejoined(member, join)?,
            None => {
                check_first_bundle(&join.bundle)
                    .map_err(|why| Rejection::Bundle { cluster: join.cluster.clone(), why })?;
                check_owner(global, join)?;
                within("clusters", global.clusters.len() + 1, limits::CLUSTERS)?;
                let index = self.last_cluster_index.checked_add(1).ok_or_else(|| Rejection::TooMany {
                    what: "clusters that ever joined".to_owned(),
                    count: u64::from(u16::MAX) + 1,
                    limit: u64::from(u16::MAX),
                })?;
                ClusterInfo {
                    name: join.cluster.clone(),
                    index: ClusterIndex(index),
                    locality: join.locality.clone(),
                    state: ClusterState::Active,
                    bundle: join.bundle.clone(),
                    gateways: Vec::new(),
                }
            }
        };

        self.clock = now;
        self.last_cluster_index = self.last_cluster_index.max(info.index.0);
        if let Some(grant) = self.tokens.get_mut(&join.hash) {
            grant.used_at = grant.used_at.or(Some(now));
            grant.used_by = grant.used_by.or(join.key);
        }
        self.members
            .entry(join.cluster.clone())
            .or_insert_with(|| Member { joined_at: now, exports: Arc::new(BTreeMap::new()) });
        Ok(self.replace_visible(info, Vec::new()))
    }

    fn publish(&mut self, publish: &Publish) -> Result<Change, Rejection> {
        let Publish { cluster, publication, now } = publish;
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        require_active(global, cluster)?;
        let unknown = || Rejection::UnknownCluster { cluster: cluster.clone() };
        let mut info = global.clusters.get(cluster).ok_or_else(unknown)?.clone();
        let member = self.members.get(cluster).ok_or_else(unknown)?;
        check_publication(&info, publication)?;
        let unnumbered = publication.exports.keys().filter(|name| !global.services.contains_key(*name)).count();
        within("global services that need a virtual IP", unnumbered, self.vips.available())?;

        let now = self.clock.max(*now);
        let claims = claims(member, publication, now);
        let touched: BTreeSet<ServiceName> = member.exports.keys().chain(claims.keys()).cloned().collect();
        info.gateways = publication.gateways.clone();
        info.gateways.sort();
        if info.bundle.document != publication.bundle.document {
            info.bundle = publication.bundle.clone();
        }

        self.clock = now;
        let joined_at = member.joined_at;
        self.members.insert(cluster.clone(), Member { joined_at, exports: Arc::new(claims) });
        let merged = self.remerge(&touched);
        Ok(self.replace_visible(info, merged))
    }

    fn revoke(&mut self, cluster: &ClusterName) -> Result<Change, Rejection> {
        let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        let info = global.clusters.get(cluster);
        let mut info = info.ok_or_else(|| Rejection::UnknownCluster { cluster: cluster.clone() })?.clone();
        info.state = ClusterState::Revoked;
        info.gateways.clear();
        let mut touched = BTreeSet::new();
        if let Some(member) = self.members.get_mut(cluster) {
            touched.extend(member.exports.keys().cloned());
            member.exports = Arc::new(BTreeMap::new());
        }
        let merged = self.remerge(&touched);
        Ok(self.replace_visible(info, merged))
    }

    fn restore(&mut self, backup: &State) -> Result<Change, Rejection> {
        *self = self.restored(backup)?;
        Ok(Change { epoch: true, ..Change::default() })
    }

    /// Everything stays, the count of revisions included.
    fn start_epoch(&mut self) -> Result<Change, Rejection> {
        let global = self.global.as_mut().ok_or(Rejection::NotFounded)?;
        let stamp = &mut Arc::make_mut(global).stamp;
        stamp.epoch = Epoch(stamp.epoch.0.saturating_add(1));
        Ok(Change { epoch: true, ..Change::default() })
    }

    /// Merges the exports of `touched` anew: what each of them became, `None` if nobody exports it any more.
    fn remerge(&mut self, touched: &BTreeSet<ServiceName>) -> Vec<(ServiceName, Option<GlobalService>)> {
        let Some(global) = self.global.clone() else { return Vec::new() };
        let appearing: BTreeSet<ServiceName> = touched
            .iter()
            .filter(|name| !global.services.contains_key(*name) && !self.exporters(name).is_empty())
            .cloned()
            .collect();
        let fresh: BTreeMap<ServiceName, _> = self.vips.assign(&appearing).into_iter().collect();
        let mut merged = Vec::with_capacity(touched.len());
        for name in touched {
            let held = global.services.get(name).map(|service| service.index);
            let service =
                held.or_else(|| fresh.get(name).copied()).and_then(|index| merge(name, index, &self.exporters(name)));
            merged.push((name.clone(), service));
        }
        for (name, service) in &merged {
            if let (None, Some(gone)) = (service, global.services.get(name)) {
                self.vips.release(name.clone(), gone.index);
            }
        }
        merged
    }

    /// Writes what differs into what members see, and says what that was.
    fn replace_visible(&mut self, info: ClusterInfo, services: Vec<(ServiceName, Option<GlobalService>)>) -> Change {
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

    /// One revision further.
    fn bump(&mut self) -> Stamp {
        if let Some(global) = &mut self.global {
            let global = Arc::make_mut(global);
            global.stamp.revision = Revision(global.stamp.revision.0.saturating_add(1));
        }
        self.stamp()
    }
}

/// A member that joins again keeps its index, its trust domain and what it published.
fn rejoined(member: &ClusterInfo, join: &Join) -> Result<ClusterInfo, Rejection> {
    let cluster = || join.cluster.clone();
    if member.state == ClusterState::Revoked {
        return Err(Rejection::ClusterRevoked { cluster: cluster() });
    }
    if member.bundle.trust_domain != join.bundle.trust_domain {
        return Err(Rejection::TrustDomainFixed {
            cluster: cluster(),
            fixed: member.bundle.trust_domain.clone(),
            offered: join.bundle.trust_domain.clone(),
        });
    }
    let mut info = member.clone();
    info.locality = join.locality.clone();
    if member.bundle.document != join.bundle.document {
        check_successor(&member.bundle, &join.bundle).map_err(|why| Rejection::Bundle { cluster: cluster(), why })?;
        info.bundle = join.bundle.clone();
    }
    Ok(info)
}

/// A trust domain has one owner for ever; a revoked cluster's is not free.
fn check_owner(global: &GlobalSnapshot, join: &Join) -> Result<(), Rejection> {
    let offered = &join.bundle.trust_domain;
    let owner = if *offered == global.federation {
        Some("the federation itself".to_owned())
    } else {
        let owner = global.clusters.values().find(|info| info.bundle.trust_domain == *offered);
        owner.map(|info| format!("cluster {}", info.name))
    };
    match owner {
        Some(owner) => {
            Err(Rejection::TrustDomainTaken { trust_domain: offered.clone(), owner, cluster: join.cluster.clone() })
        }
        None => Ok(()),
    }
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
    within("exports", publication.exports.len(), limits::EXPORTS)?;
    within("gateways", publication.gateways.len(), limits::GATEWAYS)?;
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

pub(super) fn within(what: &str, count: usize, limit: usize) -> Result<(), Rejection> {
    if count <= limit {
        return Ok(());
    }
    let wide = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    Err(Rejection::TooMany { what: what.to_owned(), count: wide(count), limit: wide(limit) })
}
