//! The incremental (delta) xDS protocol of one stream, without IO: a request or a new configuration in, responses out.
//!
//! What holds:
//! - Make before break: clusters, then endpoints, then listeners and routes; removals when everything new is in place, in
//!   the opposite order. One response per type is under way at a time.
//! - A resource is sent when the client subscribes to it and does not hold that version. What a reconnecting client says it
//!   holds counts as held.
//! - After a refusal (NACK) the client keeps its last good version and the refused one is not sent again unless asked
//!   ([`DeltaStream::retry_rejected`], or the client waits for it). A refused batch does not say which member was bad, so its
//!   members follow one by one.
//! - A first wildcard request is always answered, if with nothing. A name that the client waits for is always answered: with
//!   the resource or, if there is none (any more), as removed.
//! - An updated cluster's endpoints follow it in the same breath, changed or not: Envoy neither uses nor confirms the update
//!   before it has them, and it does not ask for them.
//!
//! It neither knows who the client is nor what the resources mean.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource,
};

use super::{
    names::ResourceType,
    resources::{Resource, Resources},
};

#[cfg(test)]
mod tests;

/// Resources per response; keeps messages well below what receivers accept.
const BATCH: usize = 100;
/// The name that stands for "all".
const WILDCARD: &str = "*";
/// Stands for a version that is not known. No resource has it.
const UNSURE: &str = "";
/// Subscribed names kept per type. Envoy asks only for what it was told of, so more is a broken or hostile client.
const MAX_NAMES: usize = 20_000;

/// A refused resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Its type.
    pub kind: ResourceType,
    /// Its name.
    pub name: String,
    /// The client's words.
    pub detail: String,
}

/// A client that does not keep to the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It subscribes to more names than can be meant.
    #[error("more than {MAX_NAMES} names subscribed for one type")]
    TooManyNames,
}

/// The server's side of one stream.
#[derive(Debug, Default)]
pub struct DeltaStream {
    target: Arc<Resources>,
    types: BTreeMap<ResourceType, Subscription>,
    nonces: u64,
    impatient: bool,
}

#[derive(Debug, Default)]
struct Subscription {
    wildcard: bool,
    names: BTreeSet<String>,
    /// The first wildcard request awaits its answer.
    unanswered: bool,
    /// Names that the client waits for, whatever it was sent before: each gets one answer, its resource or "removed".
    awaited: BTreeSet<String>,
    /// Versions that the client has confirmed and that nothing under way takes from it; [`UNSURE`] if it may have any.
    held: BTreeMap<String, String>,
    /// Version refused, and why.
    rejected: BTreeMap<String, (String, String)>,
    /// Members of a refused batch, to be sent each on its own.
    suspects: BTreeSet<String>,
    in_flight: Option<InFlight>,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    /// Less what has become void since.
    sent: BTreeMap<String, String>,
    /// It had several members, so a refusal does not say whose fault it is.
    batch: bool,
}

impl DeltaStream {
    /// A stream that has been asked nothing yet.
    pub fn new(target: Arc<Resources>) -> Self {
        Self { target, ..Default::default() }
    }

    /// The configuration changed.
    pub fn update(&mut self, target: Arc<Resources>) -> Vec<DeltaDiscoveryResponse> {
        self.target = target;
        self.impatient = false;
        self.respond()
    }

    /// The client spoke. Types that are not served get no answer.
    pub fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<Vec<DeltaDiscoveryResponse>, DeltaError> {
        let Some(kind) = ResourceType::from_url(&request.type_url) else { return Ok(Vec::new()) };
        let target = &self.target;
        let first = !self.types.contains_key(&kind);
        let updating = self.clusters_under_way();
        let subscription = self.types.entry(kind).or_default();
        if first {
            // Envoy's habit: listeners and clusters without names mean all of them.
            let by_habit = request.resource_names_subscribe.is_empty()
                && matches!(kind, ResourceType::Cluster | ResourceType::Listener);
            subscription.wildcard = by_habit;
            subscription.unanswered = by_habit;
            subscription.held = request.initial_resource_versions.into_iter().take(MAX_NAMES).collect();
            if kind == ResourceType::Endpoints {
                // Said before the client saw the clusters, which make it wait for these anew.
                updating.iter().for_each(|name| drop(subscription.held.remove(name)));
            }
        } else if !request.response_nonce.is_empty() {
            subscription.settle(&request.response_nonce, request.error_detail.map(|status| status.message));
        }
        for name in request.resource_names_unsubscribe {
            subscription.unsubscribe(&name);
        }
        for name in request.resource_names_subscribe {
            let known = target.find(kind, &name).is_some();
            subscription.subscribe(name, first, known);
        }
        if subscription.names.len() > MAX_NAMES {
            return Err(DeltaError::TooManyNames);
        }
        Ok(self.respond())
    }

    /// Sends refused resources once more: for refusals whose cause lies in the client's surroundings, not in the resource.
    pub fn retry_rejected(&mut self, which: impl Fn(&Rejection) -> bool) -> Vec<DeltaDiscoveryResponse> {
        for (kind, subscription) in &mut self.types {
            subscription.rejected.retain(|name, (_, detail)| {
                let again = which(&Rejection { kind: *kind, name: name.clone(), detail: detail.clone() });
                if again {
                    subscription.suspects.insert(name.clone());
                }
                !again
            });
        }
        self.respond()
    }

    /// Stops waiting for the client's order of subscriptions until the configuration changes: a client that never asks for
    /// a cluster's endpoints must not keep its listeners back for ever.
    pub fn lose_patience(&mut self) -> Vec<DeltaDiscoveryResponse> {
        self.impatient = true;
        self.respond()
    }

    /// [`Self::lose_patience`] was called since the last change.
    pub fn is_impatient(&self) -> bool {
        self.impatient
    }

    /// The client holds exactly the configuration, all of it, and has said so.
    pub fn is_settled(&self) -> bool {
        ResourceType::ADS.into_iter().all(|kind| match self.types.get(&kind) {
            Some(s) => {
                s.in_flight.is_none()
                    && !s.unanswered
                    && self.target.of(kind).all(|(name, r)| s.held.get(name) == Some(&r.version))
                    && s.held.keys().all(|name| self.target.find(kind, name).is_some())
            }
            None => {
                // Names exist only below a cluster or listener, which a client must have asked for.
                !matches!(kind, ResourceType::Cluster | ResourceType::Listener) && self.target.of(kind).next().is_none()
            }
        })
    }

    /// What the client refuses of the present configuration.
    pub fn rejections(&self) -> Vec<Rejection> {
        let mut all = Vec::new();
        for (kind, subscription) in &self.types {
            for (name, (version, detail)) in &subscription.rejected {
                if self.target.find(*kind, name).is_some_and(|r| r.version == *version) {
                    all.push(Rejection { kind: *kind, name: name.clone(), detail: detail.clone() });
                }
            }
        }
        all
    }

    fn respond(&mut self) -> Vec<DeltaDiscoveryResponse> {
        for (kind, subscription) in &mut self.types {
            subscription.forget_outdated(*kind, &self.target);
        }
        let mut responses = Vec::new();
        for kind in [
            ResourceType::Cluster,
            ResourceType::Endpoints,
            ResourceType::Listener,
            ResourceType::Route,
            ResourceType::Secret,
        ] {
            let early = match kind {
                ResourceType::Cluster => !self.endpoints_can_follow(),
                ResourceType::Listener | ResourceType::Route => !self.clusters_are_made(),
                _ => false,
            };
            if early && !self.impatient {
                continue;
            }
            responses.extend(self.next(kind, Step::Make));
        }
        for kind in [
            ResourceType::Listener,
            ResourceType::Route,
            ResourceType::Cluster,
            ResourceType::Endpoints,
            ResourceType::Secret,
        ] {
            // Also waits for the removals of the types before, which are under way.
            let made = self.types.iter().all(|(k, s)| s.is_made(*k, &self.target));
            if !made && !self.impatient {
                break;
            }
            responses.extend(self.next(kind, Step::Break));
        }
        responses
    }

    /// Clusters and their endpoints are with the client, or refused, so that nothing new can point into the void.
    fn clusters_are_made(&self) -> bool {
        let Some(clusters) = self.types.get(&ResourceType::Cluster) else { return true };
        let empty = Subscription::default();
        let endpoints = self.types.get(&ResourceType::Endpoints).unwrap_or(&empty);
        clusters.is_made(ResourceType::Cluster, &self.target)
            && self.target.of(ResourceType::Endpoints).all(|(name, r)| {
                self.target.find(ResourceType::Cluster, name).is_some_and(|c| clusters.refuses(name, c))
                    || endpoints.refuses(name, r)
                    || endpoints.held.get(name) == Some(&r.version)
            })
    }

    /// The endpoints of a whole batch of clusters would go out at once. Otherwise a cluster could be withdrawn between its
    /// update and its endpoints, and Envoy would go over to a cluster without any.
    fn endpoints_can_follow(&self) -> bool {
        self.types
            .get(&ResourceType::Endpoints)
            .is_none_or(|e| e.in_flight.is_none() && e.awaited.is_empty() && e.suspects.is_empty())
    }

    fn clusters_under_way(&self) -> Vec<String> {
        let in_flight = self.types.get(&ResourceType::Cluster).and_then(|clusters| clusters.in_flight.as_ref());
        in_flight.map_or_else(Vec::new, |in_flight| in_flight.sent.keys().cloned().collect())
    }

    /// A cluster that Envoy updates warms up until its endpoints come again. It does not ask for them (the subscription,
    /// shared with the cluster's old self, stands already), and it confirms the update only once it is warm.
    fn endpoints_again(&mut self) {
        let updating = self.clusters_under_way();
        let Some(endpoints) = self.types.get_mut(&ResourceType::Endpoints) else { return };
        for name in updating.into_iter().filter(|name| endpoints.names.contains(name)).collect::<Vec<_>>() {
            endpoints.expect(name);
        }
    }

    fn next(&mut self, kind: ResourceType, step: Step) -> Option<DeltaDiscoveryResponse> {
        let target = Arc::clone(&self.target);
        let subscription = self.types.get_mut(&kind)?;
        if subscription.in_flight.is_some() {
            return None;
        }
        let (resources, removed, owed) = match step {
            Step::Make => (
                subscription.batch(kind, &target),
                subscription.awaited.iter().filter(|name| target.find(kind, name).is_none()).cloned().collect(),
                std::mem::take(&mut subscription.unanswered),
            ),
            Step::Break => (Vec::new(), subscription.gone(kind, &target), false),
        };
        if resources.is_empty() && removed.is_empty() && !owed {
            return None;
        }
        for name in resources.iter().map(|(name, _)| name).chain(&removed) {
            subscription.awaited.remove(name);
            subscription.suspects.remove(name);
        }
        for name in &removed {
            subscription.held.remove(name);
        }
        self.nonces += 1;
        let nonce = self.nonces.to_string();
        subscription.in_flight = Some(InFlight {
            nonce: nonce.clone(),
            sent: resources.iter().map(|(name, r)| (name.clone(), r.version.clone())).collect(),
            batch: resources.len() > 1,
        });
        if kind == ResourceType::Cluster {
            self.endpoints_again();
        }
        Some(DeltaDiscoveryResponse {
            system_version_info: target.stamp.to_string(),
            type_url: kind.url().to_owned(),
            nonce,
            removed_resources: removed.into_iter().collect(),
            resources: resources.into_iter().map(|(name, r)| wire(name, r)).collect(),
            ..Default::default()
        })
    }
}

#[derive(Clone, Copy)]
enum Step {
    Make,
    Break,
}

impl Subscription {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    fn subscribe(&mut self, name: String, first: bool, known: bool) {
        if name == WILDCARD {
            self.unanswered |= !self.wildcard;
            self.wildcard = true;
            return;
        }
        self.names.insert(name.clone());
        // Asking again means that the client has dropped what it had, even if that is still on its way.
        if !(first && known && self.held.contains_key(&name)) {
            self.expect(name);
        }
    }

    /// The client waits for this, and what it has or is about to get does not count.
    fn expect(&mut self, name: String) {
        self.held.remove(&name);
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.sent.remove(&name);
        }
        self.awaited.insert(name);
    }

    fn unsubscribe(&mut self, name: &str) {
        if name == WILDCARD {
            self.wildcard = false;
            self.held.retain(|held, _| self.names.contains(held));
            return;
        }
        self.names.remove(name);
        self.awaited.remove(name);
        if self.wildcard {
            return;
        }
        self.held.remove(name);
        self.rejected.remove(name);
        self.suspects.remove(name);
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.sent.remove(name);
        }
    }

    /// Takes the answer to the response under way; answers to older ones say nothing new.
    fn settle(&mut self, nonce: &str, refused: Option<String>) {
        let Some(done) = self.in_flight.take_if(|f| f.nonce == nonce) else { return };
        // A removal cannot be refused in a way that repeating it would mend, so it counts from the moment it is sent.
        match refused {
            None => {
                for (name, version) in done.sent {
                    self.rejected.remove(&name);
                    self.held.insert(name, version);
                }
            }
            Some(_) if done.batch => {
                for name in done.sent.into_keys() {
                    // Envoy keeps the good members, but does not say which.
                    self.held.insert(name.clone(), UNSURE.to_owned());
                    self.suspects.insert(name);
                }
            }
            Some(detail) => {
                self.rejected.extend(done.sent.into_iter().map(|(name, version)| (name, (version, detail.clone()))));
            }
        }
    }

    fn refuses(&self, name: &str, resource: &Resource) -> bool {
        self.rejected.get(name).is_some_and(|(version, _)| *version == resource.version)
    }

    fn is_due(&self, name: &str, resource: &Resource) -> bool {
        let has = self.held.get(name) == Some(&resource.version);
        self.wants(name) && (self.awaited.contains(name) || !has && !self.refuses(name, resource))
    }

    /// Drops what is remembered of versions that are no longer to be sent.
    fn forget_outdated(&mut self, kind: ResourceType, target: &Resources) {
        self.rejected.retain(|name, (version, _)| target.find(kind, name).is_some_and(|r| r.version == *version));
        let mut suspects = std::mem::take(&mut self.suspects);
        suspects.retain(|name| target.find(kind, name).is_some_and(|r| self.is_due(name, r)));
        self.suspects = suspects;
    }

    /// What to send next: the bulk first, in it what is waited for, then suspects one at a time.
    fn batch(&self, kind: ResourceType, target: &Resources) -> Vec<(String, Resource)> {
        let due = || target.of(kind).filter(|(name, r)| self.is_due(name, r));
        let bulk = || due().filter(|(name, _)| !self.suspects.contains(*name));
        let awaited = bulk().filter(|(name, _)| self.awaited.contains(*name));
        let others = bulk().filter(|(name, _)| !self.awaited.contains(*name));
        let mut batch: Vec<_> = awaited.chain(others).take(BATCH).collect();
        if batch.is_empty() {
            batch.extend(due().next());
        }
        batch.into_iter().map(|(name, r)| (name.to_owned(), r.clone())).collect()
    }

    fn gone(&self, kind: ResourceType, target: &Resources) -> BTreeSet<String> {
        self.held.keys().filter(|name| target.find(kind, name).is_none()).take(BATCH).cloned().collect()
    }

    /// Nothing of `target` is missing that the client asked for and did not refuse, and nothing is under way.
    fn is_made(&self, kind: ResourceType, target: &Resources) -> bool {
        self.in_flight.is_none() && !target.of(kind).any(|(name, r)| self.is_due(name, r))
    }
}

fn wire(name: String, resource: Resource) -> WireResource {
    WireResource { name, version: resource.version, resource: Some(resource.body), ..Default::default() }
}
