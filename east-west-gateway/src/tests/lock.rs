//! Who may use a state folder, and what whoever may not is told.

use std::path::Path;

use isthmus_runtime::tasks::chain;

use super::rig::{Gateway, until};
use crate::{BuildError, handover, testkit::cluster};

/// Why it did not start.
fn refusal(attempt: Result<Gateway, BuildError>) -> String {
    match attempt {
        Ok(_) => panic!("it started"),
        Err(error) => chain(&error),
    }
}

async fn start(state: &Path) -> Result<Gateway, BuildError> {
    Gateway::try_start(|config| config.state_dir = state.to_owned()).await
}

async fn offers(state: &Path) {
    // Not by connecting: that would be a successor under way.
    until("the gateway offers its sockets", || handover::path(state).exists()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_folder_has_one_gateway_and_passes_from_each_to_its_successor() {
    let state = tempfile::tempdir().unwrap();
    let mut first = start(state.path()).await.unwrap();
    let error = refusal(start(state.path()).await);
    assert!(error.contains("--take-over") && error.contains(&state.path().display().to_string()), "{error}");
    offers(state.path()).await;
    let global = crate::testkit::federation(&["east"]);
    first.set_global(&global);
    let mut second = first.successor(state.path()).await;
    second.core().await.steps.open.cancelled().await;
    assert!(refusal(start(state.path()).await).contains("--take-over"), "both hold it");
    first.ended().await;
    drop(first);
    assert!(refusal(start(state.path()).await).contains("--take-over"), "the successor holds it on");
    assert!(second.inspector.pinned().is_empty() || second.inspector.pinned().contains_key(&cluster("east")));
    second.drain();
    second.ended().await;
    start(state.path()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_offers_nothing_is_not_taken_over() {
    let state = tempfile::tempdir().unwrap();
    let first = start(state.path()).await.unwrap();
    offers(state.path()).await;
    std::fs::remove_file(handover::path(state.path())).unwrap();
    let error = refusal(first.try_succeed(|config| config.state_dir = state.path().to_owned()).await);
    assert!(error.contains("does not offer its sockets"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_address_says_what_to_do_about_the_gateway_that_may_hold_it() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = start(one.path()).await.unwrap();
    let (elsewhere, tunnel) = (other.path().to_owned(), first.tunnel);
    let there = |config: &mut crate::Config| (config.state_dir, config.listen.tunnel) = (elsewhere.clone(), tunnel);
    let error = refusal(Gateway::try_start(there).await);
    assert!(error.contains("start this one with --take-over") && error.contains("already in use"), "{error}");
    let error = refusal(first.try_succeed(there).await);
    assert!(error.contains("none with this stateDir") && error.contains("already in use"), "{error}");
}

#[tokio::test]
async fn an_ip_of_another_machine_is_told_with_its_own_field() {
    // TEST-NET-1 (RFC 5737) is on no interface.
    let error = refusal(Gateway::try_start(|config| config.listen.local = "192.0.2.1".parse().unwrap()).await);
    assert!(error.contains("set listen.local to") && !error.contains("autoPort"), "{error}");
}
