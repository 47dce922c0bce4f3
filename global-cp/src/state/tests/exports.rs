//! Exports that are not as their cluster says: outside its grant, without a virtual IP, withdrawn too suddenly; and who
//! may publish at all.

use super::*;
use crate::state::{ConditionReason, ExportCondition};

fn reasons(state: &State, of: &str) -> Vec<(Option<String>, ConditionReason)> {
    let conditions = state.conditions(&cluster(of)).into_iter();
    conditions.map(|ExportCondition { service, reason, .. }| (service.map(|s| s.to_string()), reason)).collect()
}

fn seen(state: &State) -> Vec<&str> {
    global(state).services.keys().map(ServiceName::name).collect()
}

/// A publication of services s0 to s(n-1).
fn many(n: usize) -> Publication {
    publication("us-east", (0..n).map(|i| export("us-east", &format!("s{i}"), 5, 80)).collect())
}

fn at(publication: Publication, now: u64) -> Command {
    publish("us-east", publication, Timestamp(LATER.0 + now))
}

#[test]
fn an_export_outside_the_grant_is_seen_by_nobody_until_the_grant_is_widened() {
    let mut state = joined();
    accept(&mut state, grant("us-east", exporting(&["pay"])));
    let cart = |of: &str| publication(of, vec![export(of, "cart", 5, 80)]);
    accept(&mut state, publish("us-east", cart("us-east"), LATER));
    accept(&mut state, publish("us-west", cart("us-west"), LATER));
    let exporters =
        |state: &State| global(state).services[&service("cart")].exporters.keys().cloned().collect::<Vec<_>>();
    assert_eq!(exporters(&state), [cluster("us-west")]);
    assert_eq!(reasons(&state, "us-east"), [(Some("shop/cart".to_owned()), ConditionReason::NotGranted)]);
    assert_eq!(reasons(&state, "us-west"), []);

    accept(&mut state, grant("us-east", exporting(&["pay", "shop"])));
    assert_eq!(exporters(&state), [cluster("us-east"), cluster("us-west")]);
    assert_eq!(reasons(&state, "us-east"), []);

    accept(&mut state, grant("us-east", exporting(&[])));
    assert_eq!(exporters(&state), [cluster("us-west")]);
    accept(&mut state, Command::Revoke { cluster: cluster("us-west") });
    assert!(global(&state).services.is_empty());
}

#[test]
fn a_cluster_that_may_not_run_gateways_has_none_until_it_may() {
    let mut state = joined();
    let without = ClusterGrant { roles: BTreeSet::new(), ..ClusterGrant::default() };
    accept(&mut state, grant("us-east", without));
    accept(&mut state, publish("us-east", publication("us-east", vec![]), LATER));
    let gateways = |state: &State| global(state).clusters[&cluster("us-east")].gateways.len();
    assert_eq!(gateways(&state), 0);
    assert_eq!(reasons(&state, "us-east"), [(None, ConditionReason::NotGranted)]);
    assert!(state.already_published(&cluster("us-east"), &publication("us-east", vec![]), None));
    accept(&mut state, grant("us-east", ClusterGrant::default()));
    assert_eq!((gateways(&state), reasons(&state, "us-east")), (1, vec![]));
}

#[test]
fn a_grants_limits_are_narrower_than_everybodys() {
    let mut state = joined();
    let mut two = ClusterGrant::default();
    two.limits.exports = Some(2);
    accept(&mut state, grant("us-east", two));
    assert_eq!(refuse(&mut state, at(many(3), 0)).to_string(), "exports: 3, but at most 2 are allowed");
    accept(&mut state, at(many(2), 0));
}

#[test]
fn a_sudden_withdrawal_of_most_exports_is_held_until_an_operator_confirms_it() {
    let mut state = joined();
    accept(&mut state, at(many(12), 0));
    let outcome = accept(&mut state, at(many(5), 10));
    assert!(!outcome.changed, "nobody sees a difference");
    assert_eq!(seen(&state).len(), 12);
    let held = state.held_withdrawal(&cluster("us-east")).unwrap();
    assert_eq!((held.since, held.services.len()), (Timestamp(LATER.0 + 10), 7));
    assert!(reasons(&state, "us-east").iter().all(|(_, reason)| *reason == ConditionReason::WithdrawalHeld));
    assert!(state.already_published(&cluster("us-east"), &many(5), None), "the agent need not repeat it");
    assert!(!state.already_published(&cluster("us-east"), &many(6), None), "one that came back is news");

    // It is said again, and others go meanwhile: what is held stays held, since when it was.
    accept(&mut state, at(many(4), 20));
    let held = state.held_withdrawal(&cluster("us-east")).unwrap();
    assert_eq!((held.since, held.services.len()), (Timestamp(LATER.0 + 10), 7));
    assert_eq!(seen(&state).len(), 11);

    assert!(accept(&mut state, Command::ConfirmWithdrawal { cluster: cluster("us-east") }).changed);
    assert_eq!(seen(&state), ["s0", "s1", "s2", "s3"]);
    assert_eq!(reasons(&state, "us-east"), []);
    assert!(!accept(&mut state, Command::ConfirmWithdrawal { cluster: cluster("us-east") }).changed);
}

#[test]
fn a_held_withdrawal_counts_as_meant_after_a_time_unless_the_exports_come_back() {
    let mut state = joined();
    accept(&mut state, at(many(12), 0));
    assert_eq!(state.due(), None);
    accept(&mut state, at(many(0), 10));
    let due = state.due().unwrap();
    assert_eq!(due, Timestamp(LATER.0 + 10 + 600_000));
    assert!(!accept(&mut state, Command::PassTime { now: Timestamp(due.0 - 1) }).changed);
    assert_eq!(seen(&state).len(), 12);
    let mut back = state.clone();
    assert!(accept(&mut state, Command::PassTime { now: due }).changed);
    assert!(seen(&state).is_empty() && state.due().is_none());

    accept(&mut back, publish("us-east", many(12), due));
    assert!(!accept(&mut back, Command::PassTime { now: due }).changed);
    assert_eq!((seen(&back).len(), back.due()), (12, None));
}

#[test]
fn small_and_gradual_withdrawals_and_those_of_few_exports_are_believed() {
    let mut state = joined();
    accept(&mut state, at(many(20), 0));
    accept(&mut state, at(many(10), 1));
    assert_eq!(seen(&state).len(), 10, "half is not more than half");
    accept(&mut state, at(many(0), 2));
    assert!(seen(&state).is_empty(), "ten are not more than ten");

    let mut settings = Settings::default();
    settings.withdrawals.hold = false;
    accept(&mut state, at(many(20), 3));
    accept(&mut state, Command::SetSettings { settings });
    accept(&mut state, at(many(0), 4));
    assert!(seen(&state).is_empty(), "the policy says so");
}

#[test]
fn a_service_without_a_virtual_ip_waits_for_one_and_nothing_else_does() {
    let mut state = joined();
    state.vips = VipIndexes::with_left(1);
    accept(&mut state, at(many(1), 0));
    let both = |of: &str| publication(of, vec![export(of, "cart", 5, 80), export(of, "web", 5, 80)]);
    let outcome = accept(&mut state, publish("us-west", both("us-west"), LATER));
    assert!(outcome.changed, "its gateway is new");
    accept(&mut state, publish("eu-central", both("eu-central"), LATER));
    assert_eq!(seen(&state), ["s0"]);
    let waits = [("shop/cart", ConditionReason::NoVirtualIp), ("shop/web", ConditionReason::NoVirtualIp)];
    assert_eq!(reasons(&state, "us-west"), waits.map(|(name, reason)| (Some(name.to_owned()), reason)));

    // Its number is in quarantine for a day, and then the next one's.
    accept(&mut state, at(many(0), 7));
    let due = state.due().unwrap();
    assert_eq!(due, Timestamp(LATER.0 + 7 + 24 * 3600 * 1000));
    assert!(!accept(&mut state, Command::PassTime { now: Timestamp(due.0 - 1) }).changed);
    assert!(accept(&mut state, Command::PassTime { now: due }).changed);
    assert_eq!(seen(&state), ["cart"]);
    assert_eq!(global(&state).services[&service("cart")].exporters.len(), 2, "of all that export it");
    assert_eq!(state.due(), None, "no number is in quarantine");
    assert_eq!(reasons(&state, "us-west"), [(Some("shop/web".to_owned()), ConditionReason::NoVirtualIp)]);

    // Who gives up does not wait any more.
    for of in ["us-west", "eu-central"] {
        accept(&mut state, publish(of, publication(of, vec![]), due));
    }
    assert!(state.waiting.is_empty() && seen(&state).is_empty());
}

#[test]
fn of_two_agents_that_claim_a_cluster_the_later_one_is_believed() {
    let mut state = joined();
    let by = |incarnation: u8, publication| {
        let incarnation = Some(Incarnation([incarnation; 16]));
        Command::Publish(Publish { cluster: cluster("us-east"), publication, incarnation, now: LATER })
    };
    accept(&mut state, by(1, many(3)));
    let takes_over = accept(&mut state, by(2, many(3)));
    assert!(!takes_over.changed, "it says the same");
    assert_eq!(refuse(&mut state, by(1, many(1))).code(), "fenced");
    assert!(!state.already_published(&cluster("us-east"), &many(3), Some(Incarnation([1; 16]))));
    assert!(state.already_published(&cluster("us-east"), &many(3), Some(Incarnation([2; 16]))));
    accept(&mut state, by(3, many(2)));
    assert_eq!(refuse(&mut state, by(2, many(3))).code(), "fenced");
    assert_eq!(seen(&state).len(), 2);
}
