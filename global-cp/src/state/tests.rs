//! What the replicated state promises, over single commands and over any sequence of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
    time::Duration,
};

use isthmus_identity::{bundle::BundleDocument, ca::CertificateAuthority};
use isthmus_model::{
    failover::FailoverPolicy,
    global::{GlobalService, GlobalSnapshot, Locality, Settings},
    grant::{ClusterGrant, Namespaces},
    ids::{TrustDomain, VipIndex},
    merge::merge,
    service::{AppProtocol, Export, GatewayAddress, Publication, ServiceKind, ServicePort, TrustBundle},
};
use proptest::prelude::*;

use super::*;

mod declared;
mod exports;
mod levels;
mod views;

const CLUSTERS: [&str; 3] = ["us-east", "us-west", "eu-central"];
const SERVICES: [&str; 5] = ["web", "cart", "catalog", "orders", "mail"];
const LATER: Timestamp = Timestamp(1_000_000);

static CAS: LazyLock<BTreeMap<&str, CertificateAuthority>> = LazyLock::new(|| {
    let ca = |name: &'static str| {
        let domain = format!("{name}.example").parse().unwrap();
        (name, CertificateAuthority::create(&domain, Duration::from_secs(86_400)).unwrap())
    };
    CLUSTERS.into_iter().chain(["isthmus", "stranger"]).map(ca).collect()
});

fn cluster(name: &str) -> ClusterName {
    name.parse().unwrap()
}

fn service(name: &str) -> ServiceName {
    ServiceName::new("shop", name).unwrap()
}

fn bundle(name: &str) -> TrustBundle {
    CAS[name].bundle()
}

/// `base` with a root more, signed by the key of `signer`.
fn successor(base: &str, signer: &str) -> TrustBundle {
    successor_with_root_of(&bundle(base).trust_domain, base, signer)
}

/// The same, where the further root names `domain`.
fn successor_with_root_of(domain: &TrustDomain, base: &str, signer: &str) -> TrustBundle {
    let stored = bundle(base);
    let mut document = BundleDocument::parse(&stored.document).unwrap();
    document.sequence += 1;
    let next = CertificateAuthority::create(domain, Duration::from_secs(86_400)).unwrap();
    document.x509_roots.push(next.root_der().clone());
    let document = document.to_json().unwrap();
    let predecessor_signature = CAS[signer].sign_document(document.as_bytes()).unwrap();
    TrustBundle { trust_domain: stored.trust_domain, document, predecessor_signature }
}

fn hash(token: u8) -> TokenHash {
    TokenHash([token; 32])
}

fn mint(token: u8, name: &str, now: u64) -> Command {
    let expires_at = Timestamp(now + 1000);
    Command::MintToken(MintToken {
        hash: hash(token),
        cluster: cluster(name),
        expires_at,
        grant: None,
        now: Timestamp(now),
    })
}

fn join_with(token: u8, name: &str, bundle: TrustBundle, now: u64) -> Command {
    let locality = Locality { region: "us".parse().unwrap(), zone: "us-1".parse().unwrap() };
    let now = Timestamp(now);
    Command::Join(Join { hash: hash(token), key: None, cluster: cluster(name), locality, bundle, now })
}

fn join(token: u8, name: &str, now: u64) -> Command {
    join_with(token, name, bundle(name), now)
}

fn export(of: &str, name: &str, created_at: u64, number: u16) -> Export {
    let identity = format!("spiffe://{of}.example/ns/shop/sa/{name}");
    Export {
        service: service(name),
        created_at: Timestamp(created_at),
        kind: ServiceKind::ClusterSetIp,
        ports: vec![ServicePort { name: "http".parse().unwrap(), number, protocol: AppProtocol::Http }],
        identities: [identity.parse().unwrap()].into(),
    }
}

fn publication(of: &str, exports: Vec<Export>) -> Publication {
    Publication {
        exports: exports.into_iter().map(|export| (export.service.clone(), export)).collect(),
        gateways: vec![GatewayAddress { name: "gateway-1".to_owned(), tunnel: "127.1.1.11:15443".parse().ok() }],
        bundle: bundle(of),
    }
}

fn publish(of: &str, publication: Publication, now: Timestamp) -> Command {
    Command::Publish(Publish { cluster: cluster(of), publication, incarnation: None, now })
}

fn grant(of: &str, grant: ClusterGrant) -> Command {
    let resource = Resource::ClusterGrant(cluster(of), grant);
    Command::Apply(Apply { writes: vec![Write::Put { resource, expected: None }] })
}

/// May export of these namespaces alone.
fn exporting(namespaces: &[&str]) -> ClusterGrant {
    let namespaces = namespaces.iter().map(|name| name.parse().unwrap()).collect();
    ClusterGrant { export_namespaces: Namespaces::Only(namespaces), ..ClusterGrant::default() }
}

/// The merge of all that members say, made anew.
fn merged_anew(state: &State) -> BTreeMap<ServiceName, Arc<GlobalService>> {
    let mut all: BTreeMap<&ServiceName, BTreeMap<&ClusterName, &Export>> = BTreeMap::new();
    for (cluster, member) in &state.members {
        let info = &global(state).clusters[cluster];
        for (name, claim) in member.exports.iter().filter(|(name, _)| info.grant.may_export(&name.namespace)) {
            all.entry(name).or_default().insert(cluster, &claim.export);
        }
    }
    let index = |name: &ServiceName| global(state).services.get(name).map_or(VipIndex(0), |service| service.index);
    all.into_iter().map(|(name, exports)| (name.clone(), merge(name, index(name), &exports).unwrap().into())).collect()
}

/// What a member holds that got it from this node.
fn known(stamp: Stamp) -> Option<Held> {
    Some(Held { stamp, content: Content::Known })
}

fn accept(state: &mut State, command: Command) -> Outcome {
    match state.apply(&command).0 {
        Response::Accepted(outcome) => outcome,
        other => panic!("{command:?}: {other:?}"),
    }
}

fn refuse(state: &mut State, command: Command) -> Rejection {
    let before = state.clone();
    let (Response::Rejected(rejection), None) = state.apply(&command) else { panic!("{command:?} was accepted") };
    assert_eq!(*state, before, "a refused command changes nothing");
    rejection
}

pub(super) fn founded() -> State {
    let mut state = State::default();
    accept(&mut state, Command::SetFederationBundle { bundle: bundle("isthmus") });
    state
}

/// All three clusters, joined at 1, 2 and 3.
fn joined() -> State {
    let mut state = founded();
    for (i, name) in (1..).zip(CLUSTERS) {
        accept(&mut state, mint(i, name, i.into()));
        accept(&mut state, join(i, name, i.into()));
    }
    state
}

fn global(state: &State) -> &GlobalSnapshot {
    state.global().unwrap()
}

#[test]
fn nothing_is_accepted_before_the_federation_is_founded() {
    let mut state = State::default();
    assert_eq!(refuse(&mut state, mint(1, "us-east", 1)), Rejection::NotFounded);
    assert_eq!(refuse(&mut state, join(1, "us-east", 1)), Rejection::NotFounded);
    assert_eq!(refuse(&mut state, Command::Revoke { cluster: cluster("us-east") }), Rejection::NotFounded);
}

#[test]
fn the_state_of_one_federation_refuses_the_bundle_of_another() {
    let mut state = founded();
    let other = Command::SetFederationBundle { bundle: bundle("stranger") };
    assert_eq!(refuse(&mut state, other).code(), "other_federation");
    let same = accept(&mut state, Command::SetFederationBundle { bundle: bundle("isthmus") });
    assert!(!same.changed);
    let forged = Command::SetFederationBundle { bundle: successor("isthmus", "stranger") };
    assert_eq!(refuse(&mut state, forged).code(), "federation_bundle");
    assert!(accept(&mut state, Command::SetFederationBundle { bundle: successor("isthmus", "isthmus") }).changed);
}

#[test]
fn a_token_joins_its_cluster_once_and_only_in_time() {
    let mut state = founded();
    assert!(!accept(&mut state, mint(1, "us-east", 10)).changed, "members do not see tokens");
    assert_eq!(refuse(&mut state, join(9, "us-east", 11)).code(), "unknown_token");
    assert_eq!(refuse(&mut state, join(1, "us-west", 11)).code(), "token_for_another_cluster");
    assert!(accept(&mut state, join(1, "us-east", 1009)).changed);
    assert_eq!(refuse(&mut state, join(1, "us-east", 1009)).code(), "token_used");

    accept(&mut state, mint(2, "us-west", 1009));
    assert_eq!(refuse(&mut state, join(2, "us-west", 2009)).code(), "token_expired");
}

#[test]
fn a_join_may_be_repeated_with_the_same_key_in_the_tokens_lifetime() {
    let with_key = |key: Option<u8>, now| match join(1, "us-east", now) {
        Command::Join(join) => Command::Join(Join { key: key.map(|k| KeyHash([k; 32])), ..join }),
        other => other,
    };
    let mut state = founded();
    accept(&mut state, mint(1, "us-east", 10));
    let joined = accept(&mut state, with_key(Some(7), 11));
    let again = accept(&mut state, with_key(Some(7), 12));
    assert_eq!((again.stamp, again.changed), (joined.stamp, false));
    assert_eq!(refuse(&mut state, with_key(Some(8), 12)).code(), "token_used");
    assert_eq!(refuse(&mut state, with_key(None, 12)).code(), "token_used");
    assert_eq!(refuse(&mut state, with_key(Some(7), 1010)).code(), "token_expired");

    // One that an earlier version recorded without a key stays used.
    let mut state = founded();
    accept(&mut state, mint(1, "us-east", 10));
    accept(&mut state, with_key(None, 11));
    assert_eq!(refuse(&mut state, with_key(Some(7), 12)).code(), "token_used");
}

#[test]
fn a_clock_that_runs_backwards_does_not_revive_a_token() {
    let mut state = founded();
    accept(&mut state, mint(1, "us-east", 10));
    accept(&mut state, mint(2, "us-west", 5000));
    assert_eq!(refuse(&mut state, join(1, "us-east", 11)).code(), "token_expired");
}

#[test]
fn a_clock_that_once_ran_ahead_leaves_later_tokens_their_life_and_their_end() {
    let mut state = founded();
    // By a node whose clock is wrong.
    accept(&mut state, mint(1, "eu-central", LATER.0));
    accept(&mut state, mint(2, "us-east", 10));
    accept(&mut state, mint(3, "us-west", 10));
    assert!(accept(&mut state, join(2, "us-east", 1009)).changed);
    assert_eq!(refuse(&mut state, join(3, "us-west", 1010)).code(), "token_expired");
    // As long as the state's clock has gone on for less than its life, none is revived by a clock that goes back.
    accept(&mut state, mint(4, "us-west", LATER.0 + 1000));
    assert_eq!(refuse(&mut state, join(3, "us-west", 11)).code(), "token_expired");
}

#[test]
fn long_expired_tokens_are_forgotten() {
    let mut state = founded();
    accept(&mut state, mint(1, "us-east", 10));
    accept(&mut state, mint(2, "us-east", 10 + 8 * 24 * 3600 * 1000));
    assert_eq!(state.tokens.keys().collect::<Vec<_>>(), [&hash(2)]);
}

#[test]
fn a_trust_domain_has_one_owner_even_after_its_revocation() {
    let mut state = founded();
    accept(&mut state, mint(1, "us-east", 1));
    accept(&mut state, join(1, "us-east", 2));
    accept(&mut state, mint(2, "us-west", 3));
    let stolen = || join_with(2, "us-west", bundle("us-east"), 4);
    assert_eq!(refuse(&mut state, stolen()).code(), "trust_domain_taken");
    let federations = join_with(2, "us-west", bundle("isthmus"), 4);
    assert_eq!(refuse(&mut state, federations).code(), "trust_domain_taken");
    accept(&mut state, Command::Revoke { cluster: cluster("us-east") });
    assert_eq!(refuse(&mut state, stolen()).code(), "trust_domain_taken");
    accept(&mut state, join(2, "us-west", 5));
}

#[test]
fn a_member_may_join_again_with_a_fresh_token_and_keeps_its_index() {
    let mut state = joined();
    let before = global(&state).clusters[&cluster("us-west")].clone();
    accept(&mut state, mint(9, "us-west", 10));
    assert!(!accept(&mut state, join(9, "us-west", 11)).changed);
    assert_eq!(global(&state).clusters[&cluster("us-west")], before);

    accept(&mut state, mint(10, "us-west", 12));
    let other_domain = join_with(10, "us-west", bundle("stranger"), 13);
    assert_eq!(refuse(&mut state, other_domain).code(), "trust_domain_fixed");
    let other_key = join_with(10, "us-west", successor("us-west", "stranger"), 13);
    assert_eq!(refuse(&mut state, other_key).code(), "bundle_refused");
}

#[test]
fn a_revoked_cluster_exports_nothing_and_cannot_return() {
    let mut state = joined();
    accept(&mut state, mint(9, "us-east", LATER.0));
    accept(&mut state, publish("us-east", publication("us-east", vec![export("us-east", "cart", 5, 80)]), LATER));
    let outcome = accept(&mut state, Command::Revoke { cluster: cluster("us-east") });
    assert!(outcome.changed);
    let global = global(&state);
    assert_eq!(global.clusters[&cluster("us-east")].state, ClusterState::Revoked);
    assert!(global.clusters[&cluster("us-east")].gateways.is_empty());
    assert!(global.services.is_empty());
    let again = accept(&mut state, Command::Revoke { cluster: cluster("us-east") });
    assert_eq!((again.changed, again.stamp), (false, outcome.stamp));

    assert_eq!(refuse(&mut state, join(9, "us-east", 11)).code(), "cluster_revoked");
    assert_eq!(refuse(&mut state, mint(10, "us-east", 11)).code(), "cluster_revoked");
    let more = publish("us-east", publication("us-east", vec![]), LATER);
    assert_eq!(refuse(&mut state, more).code(), "cluster_revoked");
    let unknown = Command::Revoke { cluster: cluster("nobody") };
    assert_eq!(refuse(&mut state, unknown).code(), "unknown_cluster");
}

#[test]
fn a_cluster_speaks_only_for_itself() {
    let mut state = joined();
    let foreign = publication("us-east", vec![export("us-west", "cart", 5, 80)]);
    assert_eq!(refuse(&mut state, publish("us-east", foreign, LATER)).code(), "foreign_identity");
    let of_another = Publication { bundle: bundle("us-west"), ..publication("us-east", vec![]) };
    assert_eq!(refuse(&mut state, publish("us-east", of_another, LATER)).code(), "trust_domain_fixed");
    let forged = Publication { bundle: successor("us-east", "stranger"), ..publication("us-east", vec![]) };
    assert_eq!(refuse(&mut state, publish("us-east", forged, LATER)).code(), "bundle_refused");
    let twice = publication("us-east", vec![]).gateways;
    let twice = Publication { gateways: [twice.clone(), twice].concat(), ..publication("us-east", vec![]) };
    assert_eq!(refuse(&mut state, publish("us-east", twice, LATER)).code(), "malformed");

    let rotated = Publication { bundle: successor("us-east", "us-east"), ..publication("us-east", vec![]) };
    assert!(accept(&mut state, publish("us-east", rotated.clone(), LATER)).changed);
    assert_eq!(global(&state).clusters[&cluster("us-east")].bundle, rotated.bundle);
}

#[test]
fn a_bundle_with_a_root_of_another_trust_domain_is_refused() {
    let mut state = joined();
    let stolen = successor_with_root_of(&bundle("us-west").trust_domain, "us-east", "us-east");
    let published = Publication { bundle: stolen.clone(), ..publication("us-east", vec![]) };
    let refused = refuse(&mut state, publish("us-east", published, LATER)).to_string();
    assert!(refused.contains("is of trust domain us-west.example, not of us-east.example"), "{refused}");

    accept(&mut state, mint(9, "eu-north", 10));
    let first = TrustBundle { trust_domain: "eu-north.example".parse().unwrap(), ..bundle("stranger") };
    let refused = refuse(&mut state, join_with(9, "eu-north", first, 11));
    assert_eq!(refused.code(), "bundle_refused", "{refused}");
}

#[test]
fn a_publication_that_changes_nothing_keeps_the_revision() {
    let mut state = joined();
    let same = || publication("us-east", vec![export("us-east", "cart", 5, 80), export("us-east", "web", 6, 80)]);
    assert!(!state.already_published(&cluster("us-east"), &same(), None));
    let first = accept(&mut state, publish("us-east", same(), LATER));
    assert!(first.changed);
    assert!(state.already_published(&cluster("us-east"), &same(), None));
    let second = accept(&mut state, publish("us-east", same(), Timestamp(LATER.0 + 1)));
    assert_eq!((second.changed, second.stamp), (false, first.stamp));
}

#[test]
fn a_claimed_age_is_clamped_to_between_join_and_now_and_then_stays() {
    let mut state = joined();
    let publish_at = |state: &mut State, created_at, now| {
        let exports = vec![export("us-east", "cart", created_at, 80)];
        accept(state, publish("us-east", publication("us-east", exports), Timestamp(now)));
        global(state).services[&service("cart")].exporters[&cluster("us-east")].created_at.0
    };
    assert_eq!(publish_at(&mut state, 0, 500), 1, "not before the join, which was at 1");
    assert_eq!(publish_at(&mut state, 400, 600), 400);
    assert_eq!(publish_at(&mut state, 9000, 700), 700, "not in the future");
    assert_eq!(publish_at(&mut state, 9000, 800), 700, "and it does not move with each publication");
}

#[test]
fn withdrawn_services_disappear_and_returning_ones_get_their_vip_back() {
    let mut state = joined();
    let of = |names: &[&str]| publication("us-east", names.iter().map(|n| export("us-east", n, 5, 80)).collect());
    accept(&mut state, publish("us-east", of(&["cart", "web"]), LATER));
    let index = |state: &State, name| global(state).services.get(&service(name)).map(|s| s.index);
    let (cart, web) = (index(&state, "cart"), index(&state, "web"));
    assert_eq!((cart, web), (Some(VipIndex(1)), Some(VipIndex(2))));
    accept(&mut state, publish("us-east", of(&["web"]), LATER));
    assert_eq!((index(&state, "cart"), index(&state, "web")), (None, web));
    accept(&mut state, publish("us-east", of(&["web", "mail"]), LATER));
    assert_eq!(index(&state, "mail"), Some(VipIndex(3)), "a number in quarantine is not given to another");
    accept(&mut state, publish("us-east", of(&["web", "mail", "cart"]), LATER));
    assert_eq!(index(&state, "cart"), cart);
}

#[test]
fn settings_change_the_revision_once() {
    let mut state = founded();
    let failover = FailoverPolicy { hold_down: Duration::from_secs(3), ..FailoverPolicy::default() };
    let settings = Settings { failover, ..Settings::default() };
    assert!(accept(&mut state, Command::SetSettings { settings: settings.clone() }).changed);
    assert!(!accept(&mut state, Command::SetSettings { settings: settings.clone() }).changed);
    assert_eq!(global(&state).settings, settings);
}

/// One publication, or a revocation, in a random history.
#[derive(Clone, Debug)]
enum Step {
    Publish { of: usize, exports: BTreeMap<usize, (u64, u16)> },
    Revoke { of: usize },
    Grant { of: usize, shop: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let exports = prop::collection::btree_map(0..SERVICES.len(), (3..500_u64, 80..83_u16), 0..SERVICES.len());
    prop_oneof![
        12 => (0..CLUSTERS.len(), exports).prop_map(|(of, exports)| Step::Publish { of, exports }),
        1 => (0..CLUSTERS.len()).prop_map(|of| Step::Revoke { of }),
        3 => (0..CLUSTERS.len(), any::<bool>()).prop_map(|(of, shop)| Step::Grant { of, shop }),
    ]
}

fn command(step: &Step) -> Command {
    match step {
        Step::Revoke { of } => Command::Revoke { cluster: cluster(CLUSTERS[*of]) },
        Step::Grant { of, shop: true } => grant(CLUSTERS[*of], ClusterGrant::default()),
        Step::Grant { of, shop: false } => grant(CLUSTERS[*of], exporting(&["pay"])),
        Step::Publish { of, exports } => {
            let of = CLUSTERS[*of];
            let exports = exports.iter().map(|(s, (at, port))| export(of, SERVICES[*s], *at, *port)).collect();
            publish(of, publication(of, exports), LATER)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn indexes_are_stable_and_unique_over_any_history(steps in prop::collection::vec(step(), 1..40)) {
        let mut state = joined();
        let clusters: BTreeMap<_, _> =
            global(&state).clusters.iter().map(|(name, info)| (name.clone(), info.index)).collect();
        let mut vips: BTreeMap<ServiceName, VipIndex> = BTreeMap::new();
        for step in &steps {
            let before = state.stamp();
            let (response, change) = state.apply(&command(step));
            let now = global(&state);
            prop_assert_eq!(change.is_some(), now.stamp != before, "{:?}", response);
            prop_assert!(now.check().is_ok(), "{:?}", now.check());
            prop_assert_eq!(&now.services, &merged_anew(&state), "only what was touched is merged, as if all were");
            for (name, info) in &now.clusters {
                prop_assert_eq!(clusters.get(name), Some(&info.index));
            }
            for (name, service) in &now.services {
                prop_assert_eq!(*vips.entry(name.clone()).or_insert(service.index), service.index);
            }
            let unique: BTreeSet<_> = vips.values().collect();
            prop_assert_eq!(unique.len(), vips.len(), "no two services ever shared a number");
        }
    }

    #[test]
    fn the_same_commands_give_the_same_state_and_survive_json(steps in prop::collection::vec(step(), 1..20)) {
        let (mut one, mut other) = (joined(), joined());
        for step in &steps {
            prop_assert_eq!(one.apply(&command(step)), other.apply(&command(step)));
            other = serde_json::from_slice(&serde_json::to_vec(&other).unwrap()).unwrap();
        }
        prop_assert_eq!(one, other);
    }

    #[test]
    fn the_order_of_publications_does_not_matter_to_the_merge(
        exports in prop::array::uniform3(
            prop::collection::btree_map(0..SERVICES.len(), (3..500_u64, 80..83_u16), 0..SERVICES.len()),
        ),
        order in Just([0_usize, 1, 2]).prop_shuffle(),
    ) {
        let merged = |order: [usize; 3]| {
            let mut state = joined();
            for of in order {
                accept(&mut state, command(&Step::Publish { of, exports: exports[of].clone() }));
            }
            let unnumbered = |s: &Arc<GlobalService>| GlobalService { index: VipIndex(0), ..s.as_ref().clone() };
            global(&state).services.values().map(unnumbered).collect::<Vec<_>>()
        };
        prop_assert_eq!(merged([0, 1, 2]), merged(order));
    }

    #[test]
    fn deltas_from_any_revision_lead_to_the_latest_state(steps in prop::collection::vec(step(), 1..30)) {
        let mut state = joined();
        let mut view = View::new(Arc::new(state.clone()));
        let mut past = vec![(**view.global().unwrap()).clone()];
        for step in &steps {
            let (_, change) = state.apply(&command(step));
            view.advance(Arc::new(state.clone()), change);
            past.push((**view.global().unwrap()).clone());
        }
        let latest = view.global().unwrap();
        for mut held in past {
            match view.since(known(held.stamp)) {
                Update::UpToDate => {}
                Update::Delta(delta) => held.apply(*delta).unwrap(),
                other => prop_assert!(false, "{:?}", other),
            }
            prop_assert_eq!(&held, &**latest);
        }
    }
}
