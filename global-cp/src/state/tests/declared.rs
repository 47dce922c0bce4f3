//! What operators declare: settings and grants, all or none of a request, each with a version.

use super::*;
use isthmus_model::ids::Revision;

use crate::state::{Resource, ResourceKey};

fn put(resource: Resource, expected: Option<u64>) -> Write {
    Write::Put { resource, expected: expected.map(Revision) }
}

fn delete(key: ResourceKey) -> Write {
    Write::Delete { key, expected: None }
}

fn apply(writes: Vec<Write>) -> Command {
    Command::Apply(Apply { writes })
}

fn held_down(seconds: u64) -> Resource {
    let failover = FailoverPolicy { hold_down: Duration::from_secs(seconds), ..FailoverPolicy::default() };
    Resource::Settings(Settings { failover, ..Settings::default() })
}

fn of(name: &str, namespaces: &[&str]) -> Resource {
    Resource::ClusterGrant(cluster(name), exporting(namespaces))
}

fn version(state: &State, key: &ResourceKey) -> Option<u64> {
    state.declared(key).map(|(_, version)| version.0)
}

#[test]
fn each_change_of_a_resource_is_a_revision_and_its_version() {
    let mut state = joined();
    let first = accept(&mut state, apply(vec![put(held_down(3), None)]));
    assert!(first.changed);
    assert_eq!(version(&state, &ResourceKey::Settings), Some(first.stamp.revision.0));
    let same = accept(&mut state, apply(vec![put(held_down(3), None)]));
    assert_eq!((same.changed, same.stamp), (false, first.stamp));

    let stale = apply(vec![put(held_down(4), Some(first.stamp.revision.0 - 1))]);
    assert_eq!(refuse(&mut state, stale).code(), "version_conflict");
    let second = accept(&mut state, apply(vec![put(held_down(4), Some(first.stamp.revision.0))]));
    assert_eq!(second.stamp.revision.0, first.stamp.revision.0 + 1);
    assert_eq!(refuse(&mut state, apply(vec![put(of("us-east", &[]), Some(7))])).code(), "version_conflict");
    accept(&mut state, apply(vec![put(of("us-east", &[]), Some(0))]));
}

#[test]
fn a_request_happens_whole_or_not_at_all() {
    let mut state = joined();
    accept(&mut state, Command::Revoke { cluster: cluster("us-west") });
    let mixed = apply(vec![put(held_down(3), None), put(of("us-west", &[]), None)]);
    assert_eq!(refuse(&mut state, mixed).code(), "cluster_revoked");
    let absurd = Settings {
        withdrawals: isthmus_model::global::WithdrawalPolicy { above_percent: 101, ..Default::default() },
        ..Default::default()
    };
    assert_eq!(refuse(&mut state, apply(vec![put(Resource::Settings(absurd), None)])).code(), "malformed");
    let both = apply(vec![put(held_down(3), None), put(of("us-east", &[]), None)]);
    let outcome = accept(&mut state, both);
    assert_eq!(version(&state, &ResourceKey::Settings), Some(outcome.stamp.revision.0));
}

#[test]
fn what_is_deleted_is_as_by_default_again() {
    let mut state = joined();
    accept(&mut state, publish("us-east", publication("us-east", vec![export("us-east", "cart", 5, 80)]), LATER));
    assert_eq!(refuse(&mut state, apply(vec![delete(ResourceKey::Settings)])).code(), "unknown_resource");
    accept(&mut state, apply(vec![put(held_down(3), None), put(of("us-east", &["pay"]), None)]));
    assert!(global(&state).services.is_empty());
    let key = ResourceKey::ClusterGrant(cluster("us-east"));
    accept(&mut state, apply(vec![delete(ResourceKey::Settings), delete(key.clone())]));
    assert_eq!(global(&state).settings, Settings::default());
    assert_eq!(global(&state).services.len(), 1);
    assert_eq!(state.declared(&key), None);
}

#[test]
fn a_preview_tells_what_would_happen_and_changes_nothing() {
    let mut state = joined();
    accept(&mut state, apply(vec![put(held_down(3), None)]));
    let before = state.clone();
    let wanted = Apply { writes: vec![put(held_down(4), None), put(of("us-east", &[]), None)] };
    let applied = state.preview(&wanted).unwrap();
    assert_eq!(state, before);
    assert_eq!((&applied[0].before, &applied[0].after), (&Some(held_down(3)), &Some(held_down(4))));
    assert_eq!((&applied[1].before, &applied[1].after), (&None, &Some(of("us-east", &[]))));
    let refused = state.preview(&Apply { writes: vec![put(held_down(4), Some(1))] });
    assert_eq!(refused.unwrap_err().code(), "version_conflict");
}

#[test]
fn a_grant_may_be_declared_before_its_cluster_joins_and_a_tokens_goes_before_it() {
    let mut state = founded();
    let key = ResourceKey::ClusterGrant(cluster("us-east"));
    let outcome = accept(&mut state, apply(vec![put(of("us-east", &["pay"]), None)]));
    assert!(outcome.changed, "it is a revision");
    assert_eq!(state.declared(&key).unwrap().0, of("us-east", &["pay"]));
    accept(&mut state, mint(1, "us-east", 1));
    assert_eq!(state.pending(Timestamp(2)).keys().collect::<Vec<_>>(), [&cluster("us-east")]);
    assert!(state.pending(Timestamp(1002)).is_empty(), "the token is over");
    accept(&mut state, join(1, "us-east", 2));
    assert!(state.pending(Timestamp(2)).is_empty());
    assert_eq!(global(&state).clusters[&cluster("us-east")].grant, exporting(&["pay"]));
    assert_eq!(state.declared(&key).unwrap().0, of("us-east", &["pay"]), "it is the same resource");

    accept(&mut state, apply(vec![put(of("us-west", &["pay"]), None)]));
    let expires_at = Timestamp(1000);
    let grant = Some(exporting(&["shop"]));
    let minted = MintToken { hash: hash(2), cluster: cluster("us-west"), expires_at, grant, now: Timestamp(3) };
    accept(&mut state, Command::MintToken(minted));
    accept(&mut state, join(2, "us-west", 4));
    assert_eq!(global(&state).clusters[&cluster("us-west")].grant, exporting(&["shop"]));
    let key = ResourceKey::ClusterGrant(cluster("us-west"));
    assert_eq!(state.declared(&key).unwrap().0, of("us-west", &["shop"]));
}

#[test]
fn a_draining_cluster_stays_a_member_until_it_is_told_otherwise() {
    let mut state = joined();
    let drain = |drain| Command::Drain { cluster: cluster("us-east"), drain };
    assert!(accept(&mut state, drain(true)).changed);
    assert_eq!(global(&state).clusters[&cluster("us-east")].state, ClusterState::Draining);
    assert!(!accept(&mut state, drain(true)).changed);
    accept(&mut state, publish("us-east", publication("us-east", vec![export("us-east", "cart", 5, 80)]), LATER));
    accept(&mut state, drain(false));
    assert_eq!(global(&state).clusters[&cluster("us-east")].state, ClusterState::Active);
    accept(&mut state, Command::Revoke { cluster: cluster("us-east") });
    assert_eq!(refuse(&mut state, drain(true)).code(), "cluster_revoked");
}

#[test]
fn settings_that_were_rolled_back_have_a_version_of_their_own() {
    let mut state = joined();
    let before = accept(&mut state, apply(vec![put(held_down(3), None)]));
    let changed = accept(&mut state, apply(vec![put(held_down(4), None)]));
    let back = accept(&mut state, Command::Rollback { to: before.stamp.revision });
    assert_eq!(version(&state, &ResourceKey::Settings), Some(back.stamp.revision.0));
    let stale = apply(vec![put(held_down(5), Some(changed.stamp.revision.0))]);
    assert_eq!(refuse(&mut state, stale).code(), "version_conflict", "whoever saw them before has not seen this");

    accept(&mut state, apply(vec![delete(ResourceKey::Settings)]));
    assert_eq!(state.declared(&ResourceKey::Settings), None);
    accept(&mut state, Command::Rollback { to: before.stamp.revision });
    assert_eq!(state.declared(&ResourceKey::Settings).unwrap().0, held_down(3), "it can be deleted again");
}
