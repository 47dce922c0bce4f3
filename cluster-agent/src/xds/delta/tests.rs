//! The protocol against a client that behaves as Envoy does, and against the letter of the protocol.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use envoy_types::pb::{envoy::config::endpoint::v3::ClusterLoadAssignment, google::rpc::Status};
use isthmus_model::ids::{Epoch, Revision, Stamp};
use proptest::prelude::*;

use super::*;

/// Services by name, each with a content number; a service is one resource of each type.
type Services = BTreeMap<String, u32>;

fn resources(revision: u64, services: &Services) -> Arc<Resources> {
    let stamp = Stamp { epoch: Epoch(1), revision: Revision(revision) };
    let mut all = Resources::new(stamp);
    for (name, content) in services {
        for kind in ResourceType::ADS {
            let message = ClusterLoadAssignment { cluster_name: format!("{name} {content}"), ..Default::default() };
            all.insert(kind, name.clone(), message);
        }
    }
    Arc::new(all)
}

fn services(list: &[(&str, u32)]) -> Services {
    list.iter().map(|(name, content)| (name.to_string(), *content)).collect()
}

fn ask(kind: ResourceType, names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.url().to_owned(),
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    }
}

fn nack(response: &DeltaDiscoveryResponse, why: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        error_detail: Some(Status { code: 13, message: why.to_owned(), details: Vec::new() }),
        ..ack(response)
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|r| r.name.as_str()).collect()
}

/// What an Envoy does with the stream: wildcard for clusters and listeners, endpoints per cluster, routes per listener.
struct Client {
    server: DeltaStream,
    inbox: VecDeque<DeltaDiscoveryResponse>,
    held: BTreeMap<ResourceType, BTreeMap<String, String>>,
    /// New and updated clusters whose endpoints have not come (again).
    warming: BTreeSet<String>,
    /// Its first clusters were all warm once: from now on it does not answer a cluster response until it is warm.
    started: bool,
    /// The answer that waits for that.
    late: Option<DeltaDiscoveryRequest>,
    /// It answers before it asks for what the answered made it want, rather than after.
    answers_first: bool,
    /// It takes the good members of a response that it refuses.
    takes_the_good: bool,
    /// Every version it ever took.
    taken: BTreeSet<String>,
    /// Versions that it refuses, with the whole response that has one.
    bad: BTreeSet<String>,
    /// How often it refused a response for each bad version.
    refused: BTreeMap<(ResourceType, String), usize>,
}

impl Client {
    fn connect(target: Arc<Resources>) -> Self {
        let mut client = Self {
            server: DeltaStream::new(target),
            inbox: VecDeque::new(),
            held: BTreeMap::new(),
            warming: BTreeSet::new(),
            started: false,
            late: None,
            answers_first: false,
            takes_the_good: true,
            taken: BTreeSet::new(),
            bad: BTreeSet::new(),
            refused: BTreeMap::new(),
        };
        client.say(ask(ResourceType::Cluster, &[]));
        client.say(ask(ResourceType::Listener, &[]));
        client
    }

    fn say(&mut self, request: DeltaDiscoveryRequest) {
        self.inbox.extend(self.server.request(request).unwrap());
    }

    fn update(&mut self, target: Arc<Resources>) {
        self.inbox.extend(self.server.update(target));
    }

    fn holds(&self, kind: ResourceType, name: &str) -> bool {
        self.held.get(&kind).is_some_and(|held| held.contains_key(name))
    }

    /// Answers a response; those about clusters only when all clusters are warm.
    fn answer(&mut self, request: DeltaDiscoveryRequest) {
        if request.type_url == ResourceType::Cluster.url() {
            self.late = Some(request);
        } else {
            self.say(request);
        }
        self.answer_late();
    }

    fn answer_late(&mut self) {
        if (self.warming.is_empty() || !self.started)
            && let Some(late) = self.late.take()
        {
            self.say(late);
        }
    }

    /// Takes one response; `false` if there is none.
    fn step(&mut self) -> bool {
        let Some(response) = self.inbox.pop_front() else { return false };
        let kind = ResourceType::from_url(&response.type_url).unwrap();
        let (bad, good): (Vec<_>, Vec<_>) =
            response.resources.iter().partition(|resource| self.bad.contains(&resource.version));
        for resource in &bad {
            *self.refused.entry((kind, resource.version.clone())).or_default() += 1;
        }
        let answer = if bad.is_empty() { ack(&response) } else { nack(&response, "bad") };
        let (subscribe, unsubscribe) = if bad.is_empty() || self.takes_the_good {
            (
                good.into_iter().filter(|r| self.take(kind, r)).map(|r| r.name.clone()).collect(),
                self.drop_removed(&response),
            )
        } else {
            (Vec::new(), Vec::new())
        };
        if kind == ResourceType::Endpoints {
            // Endpoints refused or gone end the wait as endpoints taken do.
            for name in response.resources.iter().map(|r| &r.name).chain(&response.removed_resources) {
                self.warming.remove(name);
            }
        }
        let child = match kind {
            ResourceType::Cluster => Some(ResourceType::Endpoints),
            ResourceType::Listener => Some(ResourceType::Route),
            _ => None,
        };
        let wanted = child.filter(|_| !subscribe.is_empty() || !unsubscribe.is_empty()).map(|child| {
            for name in &unsubscribe {
                self.held.entry(child).or_default().remove(name);
            }
            DeltaDiscoveryRequest {
                resource_names_subscribe: subscribe,
                resource_names_unsubscribe: unsubscribe,
                ..ask(child, &[])
            }
        });
        if self.answers_first {
            self.answer(answer);
            wanted.into_iter().for_each(|wanted| self.say(wanted));
        } else {
            wanted.into_iter().for_each(|wanted| self.say(wanted));
            self.answer(answer);
        }
        self.started |= self.warming.is_empty() && self.held.contains_key(&ResourceType::Cluster);
        self.answer_late();
        true
    }

    /// Takes a good resource; `true` if it is the first of that name.
    fn take(&mut self, kind: ResourceType, resource: &WireResource) -> bool {
        let (name, version) = (&resource.name, &resource.version);
        let parent = match kind {
            ResourceType::Endpoints => Some(ResourceType::Cluster),
            ResourceType::Route => Some(ResourceType::Listener),
            _ => None,
        };
        if parent.is_some_and(|parent| !self.holds(parent, name)) {
            // Unsubscribed while it was on its way: nobody is there to take it.
            return false;
        }
        if kind == ResourceType::Listener {
            for needed in [ResourceType::Cluster, ResourceType::Endpoints] {
                assert!(self.holds(needed, name), "listener before {needed:?} of {name}");
            }
            assert!(!self.warming.contains(name), "listener before {name} is warm");
        }
        self.taken.insert(version.clone());
        let old = self.held.entry(kind).or_default().insert(name.clone(), version.clone());
        if kind == ResourceType::Cluster && old.as_ref() != Some(version) {
            self.warming.insert(name.clone());
        }
        old.is_none()
    }

    fn drop_removed(&mut self, response: &DeltaDiscoveryResponse) -> Vec<String> {
        let kind = ResourceType::from_url(&response.type_url).unwrap();
        for name in &response.removed_resources {
            if kind == ResourceType::Cluster {
                assert!(!self.holds(ResourceType::Listener, name), "cluster {name} removed under its listener");
                self.warming.remove(name);
            }
            if kind == ResourceType::Endpoints && self.holds(ResourceType::Listener, name) {
                assert!(!self.warming.contains(name), "cluster {name} emptied under its listener");
            }
            self.held.entry(kind).or_default().remove(name);
        }
        response.removed_resources.clone()
    }

    fn run(&mut self) {
        let mut steps = 0;
        while self.step() {
            steps += 1;
            assert!(steps < 10_000, "the stream never comes to rest");
        }
    }

    fn assert_holds(&self, target: &Resources) {
        for kind in ResourceType::ADS {
            let held: Vec<_> = self.held.get(&kind).into_iter().flatten().collect();
            let wanted: Vec<_> = target.of(kind).map(|(name, r)| (name.to_owned(), r.version.clone())).collect();
            assert!(
                held.iter().map(|(n, v)| (*n, *v)).eq(wanted.iter().map(|(n, v)| (n, v))),
                "{kind:?}: {held:?} {wanted:?}"
            );
        }
    }
}

#[test]
fn a_new_client_gets_everything_and_is_settled_only_then() {
    let target = resources(1, &services(&[("a", 1), ("b", 1)]));
    let mut client = Client::connect(Arc::clone(&target));
    assert!(!client.server.is_settled());
    client.run();
    assert!(client.server.is_settled());
    client.assert_holds(&target);
}

#[test]
fn a_first_wildcard_request_is_answered_even_with_nothing() {
    let mut server = DeltaStream::new(resources(1, &Services::new()));
    assert!(!server.is_settled());
    for kind in [ResourceType::Cluster, ResourceType::Listener] {
        let responses = server.request(ask(kind, &[])).unwrap();
        assert_eq!(responses.len(), 1);
        assert!(responses[0].resources.is_empty());
        assert!(server.request(ack(&responses[0])).unwrap().is_empty());
    }
    assert!(server.is_settled());
}

#[test]
fn a_reconnecting_client_is_not_sent_what_it_holds_and_is_told_what_is_gone() {
    let old = resources(1, &services(&[("a", 1), ("b", 1), ("gone", 1)]));
    let mut server = DeltaStream::new(resources(2, &services(&[("a", 1), ("b", 2)])));
    let versions = |kind| old.of(kind).map(|(n, r)| (n.to_owned(), r.version.clone())).collect();
    let responses = server
        .request(DeltaDiscoveryRequest {
            initial_resource_versions: versions(ResourceType::Cluster),
            ..ask(ResourceType::Cluster, &[])
        })
        .unwrap();
    assert_eq!(names(&responses[0]), ["b"]);
    let responses = server.request(ack(&responses[0])).unwrap();
    assert_eq!(responses[0].removed_resources, ["gone"]);
    let responses = server
        .request(DeltaDiscoveryRequest {
            initial_resource_versions: versions(ResourceType::Endpoints),
            ..ask(ResourceType::Endpoints, &["a", "b"])
        })
        .unwrap();
    assert_eq!(names(&responses[0]), ["b"]);
}

#[test]
fn asking_again_for_a_name_is_a_request_to_send_it_again() {
    let mut server = DeltaStream::new(resources(1, &services(&[("a", 1)])));
    let first = server.request(ask(ResourceType::Endpoints, &["a"])).unwrap();
    assert!(server.request(ack(&first[0])).unwrap().is_empty());
    let again = server.request(ask(ResourceType::Endpoints, &["a"])).unwrap();
    assert_eq!(names(&again[0]), ["a"]);
}

#[test]
fn an_unknown_name_is_answered_as_removed_and_sent_once_it_exists() {
    let mut server = DeltaStream::new(resources(1, &Services::new()));
    let responses = server.request(ask(ResourceType::Endpoints, &["a"])).unwrap();
    assert_eq!(responses[0].removed_resources, ["a"]);
    server.request(ack(&responses[0])).unwrap();
    let responses = server.update(resources(2, &services(&[("a", 1)])));
    assert_eq!(names(&responses[0]), ["a"]);
}

#[test]
fn of_a_refused_batch_only_the_bad_member_stays_refused() {
    let target = resources(1, &services(&[("a", 1), ("b", 1), ("c", 1)]));
    let mut client = Client::connect(Arc::clone(&target));
    client.bad.insert(target.find(ResourceType::Cluster, "b").unwrap().version.clone());
    client.run();
    let clusters: Vec<_> = client.held[&ResourceType::Cluster].keys().collect();
    assert_eq!(clusters, ["a", "c"]);
    let rejected: Vec<_> = client.server.rejections().into_iter().map(|r| (r.name, r.detail)).collect();
    // Alone and in the first batch, for each type: the resources of one service have the same content here.
    assert!(client.refused.values().all(|times| *times <= 2), "{:?}", client.refused);
    assert!(rejected.contains(&("b".to_owned(), "bad".to_owned())));
    assert!(!client.server.is_settled());
}

#[test]
fn a_refused_resource_comes_again_when_it_changes_or_when_asked() {
    let mut server = DeltaStream::new(resources(1, &services(&[("a", 1)])));
    let responses = server.request(ask(ResourceType::Cluster, &[])).unwrap();
    assert!(server.request(nack(&responses[0], "no")).unwrap().is_empty());
    assert!(server.update(resources(2, &services(&[("a", 1)]))).is_empty());
    let responses = server.retry_rejected(|r| r.detail == "no");
    assert_eq!(names(&responses[0]), ["a"]);
    assert!(server.request(nack(&responses[0], "still no")).unwrap().is_empty());
    let responses = server.update(resources(3, &services(&[("a", 2)])));
    assert_eq!(names(&responses[0]), ["a"]);
    server.request(ack(&responses[0])).unwrap();
    assert!(server.rejections().is_empty());
}

#[test]
fn after_a_refusal_the_last_good_version_counts_as_held() {
    let mut server = DeltaStream::new(resources(1, &services(&[("a", 1)])));
    let good = server.request(ask(ResourceType::Cluster, &[])).unwrap();
    server.request(ack(&good[0])).unwrap();
    let bad = server.update(resources(2, &services(&[("a", 2)])));
    server.request(nack(&bad[0], "no")).unwrap();
    // Back to what the client still has: there is nothing to send.
    assert!(server.update(resources(3, &services(&[("a", 1)]))).is_empty());
}

#[test]
fn an_answer_to_an_old_nonce_changes_nothing() {
    let mut server = DeltaStream::new(resources(1, &services(&[("a", 1)])));
    server.request(ask(ResourceType::Cluster, &[])).unwrap();
    let stale = DeltaDiscoveryRequest { response_nonce: "77".to_owned(), ..ask(ResourceType::Cluster, &[]) };
    assert!(server.request(stale).unwrap().is_empty());
    assert!(!server.is_settled());
}

#[test]
fn a_client_that_never_asks_for_endpoints_gets_its_listeners_once_patience_is_lost() {
    let mut server = DeltaStream::new(resources(1, &services(&[("a", 1)])));
    let clusters = server.request(ask(ResourceType::Cluster, &[])).unwrap();
    assert!(server.request(ask(ResourceType::Listener, &[])).unwrap().is_empty());
    assert!(server.request(ack(&clusters[0])).unwrap().is_empty());
    assert_eq!(names(&server.lose_patience()[0]), ["a"]);
}

#[test]
fn more_names_than_can_be_meant_end_the_stream() {
    let mut server = DeltaStream::new(resources(1, &Services::new()));
    let names: Vec<_> = (0..=MAX_NAMES).map(|i| i.to_string()).collect();
    let request = DeltaDiscoveryRequest { resource_names_subscribe: names, ..ask(ResourceType::Endpoints, &[]) };
    assert_eq!(server.request(request).unwrap_err(), DeltaError::TooManyNames);
}

#[test]
fn large_configurations_come_in_batches() {
    let many: Services = (0..3 * BATCH).map(|i| (format!("s{i:04}"), 1)).collect();
    let target = resources(1, &many);
    let mut client = Client::connect(Arc::clone(&target));
    assert_eq!(client.inbox[0].resources.len(), BATCH);
    client.run();
    client.assert_holds(&target);
}

/// One service, whose clusters and endpoints change apart from each other.
fn cart(revision: u64, cluster: &str, endpoints: &str) -> Arc<Resources> {
    let mut all = Resources::new(Stamp { epoch: Epoch(1), revision: Revision(revision) });
    for (kind, text) in [(ResourceType::Cluster, cluster), (ResourceType::Endpoints, endpoints)] {
        let message = ClusterLoadAssignment { cluster_name: text.to_owned(), ..Default::default() };
        all.insert(kind, "cart".to_owned(), message);
    }
    Arc::new(all)
}

fn kinds<'a>(responses: impl IntoIterator<Item = &'a DeltaDiscoveryResponse>) -> Vec<ResourceType> {
    responses.into_iter().map(|r| ResourceType::from_url(&r.type_url).unwrap()).collect()
}

#[test]
fn an_updated_cluster_gets_its_unchanged_endpoints_again_with_the_update() {
    let mut client = Client::connect(cart(1, "one identity", "the same"));
    client.run();
    assert!(client.server.is_settled());
    client.update(cart(2, "two identities", "the same"));
    let without_waiting = [ResourceType::Cluster, ResourceType::Endpoints];
    assert_eq!(kinds(&client.inbox), without_waiting);
    client.run();
    assert!(client.late.is_none() && client.server.is_settled());
}

#[test]
fn a_cluster_is_not_updated_before_its_endpoints_can_follow() {
    let mut client = Client::connect(cart(1, "old", "old"));
    client.run();
    client.update(cart(2, "old", "new"));
    client.update(cart(3, "new", "new"));
    assert_eq!(kinds(&client.inbox), [ResourceType::Endpoints]);
    client.step();
    assert_eq!(kinds(&client.inbox), [ResourceType::Cluster, ResourceType::Endpoints]);
}

#[test]
fn refused_endpoints_come_once_more_for_an_updated_cluster_which_waits_for_them() {
    let mut client = Client::connect(cart(1, "old", "good"));
    client.run();
    let bad = cart(2, "old", "bad");
    client.bad.insert(bad.find(ResourceType::Endpoints, "cart").unwrap().version.clone());
    client.update(bad);
    client.run();
    client.update(cart(3, "new", "bad"));
    client.run();
    assert!(client.late.is_none());
    assert_eq!(client.refused.values().collect::<Vec<_>>(), [&2]);
}

#[test]
fn endpoints_that_a_reconnecting_client_holds_come_again_if_their_cluster_is_updated() {
    let old = cart(1, "old", "the same");
    let mut server = DeltaStream::new(cart(2, "new", "the same"));
    for kind in [ResourceType::Cluster, ResourceType::Endpoints] {
        let names: &[_] = if kind == ResourceType::Cluster { &[] } else { &["cart"] };
        let held = old.of(kind).map(|(name, r)| (name.to_owned(), r.version.clone())).collect();
        let request = DeltaDiscoveryRequest { initial_resource_versions: held, ..ask(kind, names) };
        assert_eq!(kinds(&server.request(request).unwrap()), [kind]);
    }
}

#[test]
fn a_service_that_returns_while_its_removal_is_under_way_gets_its_listener_last() {
    let target = resources(1, &services(&[("a", 1)]));
    let mut client = Client::connect(Arc::clone(&target));
    client.run();
    client.answers_first = true;
    client.update(resources(2, &Services::new()));
    // The listener's removal, then the cluster's. That of the endpoints is on its way when they are back.
    client.step();
    client.step();
    client.update(Arc::clone(&target));
    client.run();
    client.assert_holds(&target);
}

#[test]
fn a_cluster_withdrawn_before_its_endpoints_were_sent_does_not_wait_for_them() {
    let mut client = Client::connect(resources(1, &services(&[("a", 1)])));
    client.run();
    client.update(resources(2, &services(&[("a", 2), ("b", 1)])));
    // Asks for the endpoints of b while those of a are under way.
    client.step();
    let without = resources(3, &services(&[("a", 2)]));
    client.update(Arc::clone(&without));
    client.run();
    assert!(client.late.is_none() && client.server.is_settled());
    client.assert_holds(&without);
}

#[test]
fn what_a_client_kept_of_a_refused_batch_is_removed_with_the_rest() {
    let target = resources(1, &services(&[("a", 1), ("b", 1), ("c", 2)]));
    let empty = resources(2, &Services::new());
    let mut client = Client::connect(Arc::clone(&target));
    client.bad.insert(target.find(ResourceType::Cluster, "c").unwrap().version.clone());
    client.step();
    client.update(Arc::clone(&empty));
    client.run();
    client.assert_holds(&empty);
}

#[derive(Clone, Debug)]
enum Action {
    Update(Services, Vec<u32>),
    Steps(u8),
}

fn action() -> impl Strategy<Value = Action> {
    let names = prop::collection::btree_map("[a-f]", 0u32..4, 0..6);
    prop_oneof![
        (names, prop::collection::vec(0u32..4, 0..2)).prop_map(|(services, bad)| Action::Update(services, bad)),
        (1u8..6).prop_map(Action::Steps),
    ]
}

proptest! {
    /// However updates, answers and refusals interleave: the order holds (asserted in the client), the stream comes to rest,
    /// the client then waits for nothing and has everything it did not refuse.
    #[test]
    fn any_interleaving_ends_with_the_client_holding_what_it_accepts(
        actions in prop::collection::vec(action(), 1..30),
        answers_first: bool,
        takes_the_good: bool,
    ) {
        let mut target = resources(0, &Services::new());
        let mut client = Client::connect(Arc::clone(&target));
        client.answers_first = answers_first;
        client.takes_the_good = takes_the_good;
        for (revision, action) in (1..).zip(actions) {
            match action {
                Action::Update(services, bad) => {
                    target = resources(revision, &services);
                    for (name, _) in services.iter().filter(|(_, content)| bad.contains(content)) {
                        let version = target.find(ResourceType::Cluster, name).unwrap().version.clone();
                        // What a client took once it takes again.
                        if !client.taken.contains(&version) {
                            client.bad.insert(version);
                        }
                    }
                    client.update(Arc::clone(&target));
                }
                Action::Steps(n) => (0..n).for_each(|_| { client.step(); }),
            }
        }
        client.run();
        prop_assert!(client.late.is_none(), "{:?} wait for their endpoints", client.warming);
        for kind in ResourceType::ADS {
            for (name, resource) in target.of(kind) {
                let held = client.held.get(&kind).and_then(|held| held.get(name));
                if !client.bad.contains(&resource.version) {
                    prop_assert_eq!(held, Some(&resource.version), "{:?} {}", kind, name);
                }
            }
            for name in client.held.get(&kind).into_iter().flat_map(|held| held.keys()) {
                prop_assert!(target.find(kind, name).is_some(), "{kind:?} {name} is left over");
            }
        }
        let complete = ResourceType::ADS.into_iter().all(|kind| {
            target.of(kind).all(|(name, r)| client.held.get(&kind).and_then(|held| held.get(name)) == Some(&r.version))
        });
        prop_assert_eq!(client.server.is_settled(), complete);
    }
}
