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
    /// Updated clusters whose endpoints have not come again. Until they have, Envoy does not confirm the update.
    warming: BTreeSet<String>,
    /// The confirmation that waits for them.
    late: Option<DeltaDiscoveryRequest>,
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
            late: None,
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

    fn confirm_late(&mut self) {
        if self.warming.is_empty()
            && let Some(late) = self.late.take()
        {
            self.say(late);
        }
    }

    /// Takes one response; `false` if there is none.
    fn step(&mut self) -> bool {
        let Some(response) = self.inbox.pop_front() else { return false };
        let kind = ResourceType::from_url(&response.type_url).unwrap();
        let bad: Vec<_> = response.resources.iter().filter(|r| self.bad.contains(&r.version)).collect();
        for resource in &bad {
            *self.refused.entry((kind, resource.version.clone())).or_default() += 1;
        }
        if !bad.is_empty() {
            self.say(nack(&response, "bad"));
            if kind == ResourceType::Endpoints {
                // Endpoints refused end the wait as endpoints taken do.
                let all = response.resources.iter().map(|r| &r.name).chain(&response.removed_resources);
                all.for_each(|name| drop(self.warming.remove(name)));
                self.confirm_late();
            }
            return true;
        }
        let mut wanted = ask(ResourceType::Endpoints, &[]);
        let mut dropped = Vec::new();
        for resource in &response.resources {
            let new = !self.holds(kind, &resource.name);
            match kind {
                ResourceType::Cluster if !new => drop(self.warming.insert(resource.name.clone())),
                ResourceType::Endpoints => drop(self.warming.remove(&resource.name)),
                _ => {}
            }
            let parent = match kind {
                ResourceType::Endpoints => Some(ResourceType::Cluster),
                ResourceType::Route => Some(ResourceType::Listener),
                _ => None,
            };
            if parent.is_some_and(|parent| !self.holds(parent, &resource.name)) {
                // Unsubscribed while it was on its way: nobody is there to take it.
                continue;
            }
            if kind == ResourceType::Listener {
                for needed in [ResourceType::Cluster, ResourceType::Endpoints] {
                    assert!(self.holds(needed, &resource.name), "listener before {needed:?} of {}", resource.name);
                }
            }
            self.held.entry(kind).or_default().insert(resource.name.clone(), resource.version.clone());
            self.taken.insert(resource.version.clone());
            if new {
                wanted.resource_names_subscribe.push(resource.name.clone());
            }
        }
        for name in &response.removed_resources {
            if kind == ResourceType::Cluster {
                assert!(!self.holds(ResourceType::Listener, name), "cluster {name} removed under its listener");
            }
            self.held.entry(kind).or_default().remove(name);
            self.warming.remove(name);
            dropped.push(name.clone());
        }
        if kind == ResourceType::Cluster && !self.warming.is_empty() {
            self.late = Some(ack(&response));
        } else {
            self.say(ack(&response));
        }
        self.confirm_late();
        let child = match kind {
            ResourceType::Cluster => ResourceType::Endpoints,
            ResourceType::Listener => ResourceType::Route,
            _ => return true,
        };
        for name in &dropped {
            self.held.entry(child).or_default().remove(name);
        }
        wanted.type_url = child.url().to_owned();
        wanted.resource_names_unsubscribe = dropped;
        if !wanted.resource_names_subscribe.is_empty() || !wanted.resource_names_unsubscribe.is_empty() {
            self.say(wanted);
        }
        true
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
    /// the client then has everything it did not refuse, and nothing refused comes more than once alone and once in a batch.
    #[test]
    fn any_interleaving_ends_with_the_client_holding_what_it_accepts(actions in prop::collection::vec(action(), 1..30)) {
        let mut target = resources(0, &Services::new());
        let mut client = Client::connect(Arc::clone(&target));
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

#[test]
fn an_updated_cluster_gets_its_unchanged_endpoints_again_with_the_update() {
    let with_cluster = |revision, cluster: &str| {
        let stamp = Stamp { epoch: Epoch(1), revision: Revision(revision) };
        let mut all = Resources::new(stamp);
        let message = |text: &str| ClusterLoadAssignment { cluster_name: text.to_owned(), ..Default::default() };
        all.insert(ResourceType::Cluster, "cart".to_owned(), message(cluster));
        all.insert(ResourceType::Endpoints, "cart".to_owned(), message("the same"));
        Arc::new(all)
    };
    let mut client = Client::connect(with_cluster(1, "one identity"));
    while client.step() {}
    assert!(client.server.is_settled());
    client.update(with_cluster(2, "two identities"));
    let kinds: Vec<_> = client.inbox.iter().map(|r| r.type_url.clone()).collect();
    assert_eq!(
        kinds,
        [ResourceType::Cluster.url(), ResourceType::Endpoints.url()],
        "without waiting for a confirmation"
    );
    while client.step() {}
    assert!(client.warming.is_empty() && client.server.is_settled());
}
