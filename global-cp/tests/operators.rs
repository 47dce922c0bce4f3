//! What operators do over the admin API, and what clusters notice of it, in one process, over real TLS.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests; clippy knows only functions marked so"
)]

mod support;

use std::time::Duration;

use hyper::StatusCode;
use isthmus_api::proto::federation::v1::{self as pb, control_message::Kind};
use isthmus_runtime::wait::wait_for;
use serde_json::{Value, json};
use support::{Agent, ControlPlane, Session};
use tonic::Code;

const SOON: Duration = Duration::from_secs(10);

fn grant(cluster: &str, spec: &str) -> String {
    format!("apiVersion: isthmus.io/v1alpha1\nkind: ClusterGrant\nmetadata: {{ name: {cluster} }}\nspec: {spec}\n")
}

fn settings(hold_down_ms: u64) -> String {
    format!(
        "apiVersion: isthmus.io/v1alpha1\nkind: Settings\nmetadata: {{ name: federation }}\n\
         spec: {{ failover: {{ holdDownMs: {hold_down_ms} }} }}\n"
    )
}

/// A member with a session, and its agent.
async fn member(cp: &ControlPlane, cluster: &str) -> (Agent, Session) {
    let agent = Agent::new(cluster);
    let svid = cp.join(&agent).await;
    let mut session = Session::open(&mut cp.client(Some(&svid)), cluster, None).await.unwrap();
    session.snapshot().await;
    (agent, session)
}

fn services(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("s{i}")).collect()
}

async fn publish(session: &mut Session, agent: &Agent, sequence: u64, services: &[String]) -> Kind {
    let services: Vec<&str> = services.iter().map(String::as_str).collect();
    session.send(agent.publish(sequence, &services)).await;
    session.answer().await
}

#[tokio::test]
async fn files_are_applied_whole_or_refused_with_all_their_problems() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let wrong = format!(
        "{}---\n{}---\n{}",
        settings(3),
        grant("us-east", "{ exportNamespaces: [Shop] }"),
        grant("us-west", "{ exports: [shop] }")
    );
    let (status, answer) = cp.admin.apply(&wrong).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let problems = answer["error"]["problems"].as_array().unwrap();
    let at =
        |problem: &Value| format!("{}:{} {}", problem["file"].as_str().unwrap(), problem["line"], problem["field"]);
    let at: Vec<String> = problems.iter().map(at).collect();
    assert_eq!(at, ["test.yaml:9 \"spec.exportNamespaces\"", "test.yaml:14 \"spec.exports\""], "{answer}");
    assert_eq!(cp.snapshot().await.settings, Default::default(), "nothing was applied");

    let twice = format!("{}---\n{}", settings(3), settings(4));
    let (_, answer) = cp.admin.apply(&twice).await;
    let message = answer["error"]["problems"][0]["message"].as_str().unwrap();
    assert!(message.contains("is there twice; first at test.yaml:1"), "{answer}");
    let (status, answer) = cp.admin.apply("# nothing\n").await;
    assert_eq!((status, &answer["error"]["field"]), (StatusCode::BAD_REQUEST, &json!("files")));
    let (status, answer) = cp.admin.call("POST", "/v1/apply", "{\"files\": 3}").await;
    assert_eq!((status, &answer["error"]["field"]), (StatusCode::BAD_REQUEST, &json!("body")));
    cp.stop().await;
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_a_version_guards_against_others() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let dry = json!({ "files": [{ "name": "a", "text": settings(7) }], "dryRun": true });
    let (status, answer) = cp.admin.call("POST", "/v1/apply", &dry.to_string()).await;
    assert_eq!((status, &answer["results"][0]["outcome"]), (StatusCode::OK, &json!("created")), "{answer}");
    assert_eq!(answer["results"][0]["after"]["spec"]["failover"]["holdDownMs"], 7);
    assert_ne!(cp.admin.get("/v1/resources/settings/federation").await["spec"]["failover"]["holdDownMs"], 7);

    let (_, answer) = cp.admin.apply(&settings(7)).await;
    assert_eq!((&answer["dryRun"], &answer["results"][0]["kind"]), (&json!(false), &json!("Settings")));
    let mut held = cp.admin.get("/v1/resources/settings/federation").await;
    let version = held["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    assert_eq!(version, answer["stamp"]["revision"].to_string(), "a version is a revision");
    let (_, answer) = cp.admin.apply(&settings(7)).await;
    assert_eq!(answer["results"][0]["outcome"], "unchanged");
    cp.admin.apply(&settings(8)).await;
    held["spec"]["failover"]["holdDownMs"] = json!(9);
    let (status, answer) = cp.admin.apply(&held.to_string()).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::CONFLICT, &json!("version_conflict")), "{answer}");

    let stale = format!("/v1/resources/settings/federation?resourceVersion={version}");
    assert_eq!(cp.admin.call("DELETE", &stale, "").await.0, StatusCode::CONFLICT);
    let (status, answer) = cp.admin.call("DELETE", "/v1/resources/settings/federation", "").await;
    assert_eq!((status, &answer["results"][0]["outcome"]), (StatusCode::OK, &json!("deleted")), "{answer}");
    assert_eq!(cp.admin.call("DELETE", "/v1/resources/settings/federation", "").await.0, StatusCode::NOT_FOUND);
    let held = cp.admin.get("/v1/resources/settings/federation").await;
    assert!(held["metadata"].get("resourceVersion").is_none(), "it is as by default: {held}");
    for (path, said) in
        [("pods", "there is no kind pods"), ("settings/other", "one Settings"), ("grants/nobody", "there is no")]
    {
        let (status, answer) = cp.admin.call("GET", &format!("/v1/resources/{path}"), "").await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert!(answer["error"]["message"].as_str().unwrap().contains(said), "{answer}");
    }
    cp.stop().await;
}

#[tokio::test]
async fn a_cluster_hears_at_once_what_its_grant_does_to_its_exports_and_gateways() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (agent, mut session) = member(&cp, "us-east").await;
    assert!(matches!(publish(&mut session, &agent, 1, &services(2)).await, Kind::Published(_)));
    cp.admin.apply(&grant("us-east", "{ exportNamespaces: [pay], roles: [dns] }")).await;
    assert_eq!(session.conditions().await, ["NotGranted", "shop/s0 NotGranted", "shop/s1 NotGranted"]);
    assert!(cp.snapshot().await.services.is_empty());

    let cluster = cp.admin.get("/v1/clusters/us-east").await;
    assert_eq!(
        (&cluster["state"], &cluster["exports"], &cluster["gateways"]),
        (&json!("active"), &json!([]), &json!([]))
    );
    assert_eq!(cluster["conditions"].as_array().unwrap().len(), 3);
    let mut client = cp.client(Some(&cp.join(&agent).await));
    let request = pb::SignRequest { role: pb::Role::Gateway.into(), csr: agent.csr() };
    let refused = client.sign(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("add the role gateway"), "{}", refused.message());

    cp.admin.call("DELETE", "/v1/resources/clustergrant/us-east", "").await;
    assert_eq!(session.conditions().await, Vec::<String>::new());
    assert_eq!(cp.snapshot().await.services.len(), 2);
    client.sign(request).await.unwrap();
    cp.stop().await;
}

#[tokio::test]
async fn a_grant_comes_with_the_token_and_clusters_are_pending_until_they_join() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let body = json!({ "ttlSeconds": 900, "grant": { "exportNamespaces": ["pay"] } }).to_string();
    let (status, answer) = cp.admin.call("POST", "/v1/clusters/us-east/join-token", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let pending = cp.admin.get("/v1/clusters").await;
    assert_eq!((&pending[0]["name"], &pending[0]["state"]), (&json!("us-east"), &json!("pending")), "{pending}");
    let token = isthmus_identity::token::Token::parse(answer["token"].as_str().unwrap()).unwrap();
    Agent::new("us-east").join(&token).await.unwrap();
    let grants = cp.admin.get("/v1/resources/clustergrants").await;
    assert_eq!(grants[0]["spec"]["exportNamespaces"], json!(["pay"]), "{grants}");
    assert_eq!(cp.admin.get("/v1/clusters/us-east").await["state"], "active");

    let (status, answer) =
        cp.admin.call("POST", "/v1/clusters/us-west/join-token", "{\"grant\": {\"roles\": [\"king\"]}}").await;
    assert_eq!((status, &answer["error"]["field"]), (StatusCode::BAD_REQUEST, &json!("body")), "{answer}");
    cp.stop().await;
}

#[tokio::test]
async fn a_sudden_withdrawal_is_shown_and_confirmed() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (agent, mut session) = member(&cp, "us-east").await;
    publish(&mut session, &agent, 1, &services(12)).await;
    session.send(agent.publish(2, &["s0"])).await;
    assert_eq!(session.conditions().await.len(), 11);
    assert!(matches!(session.answer().await, Kind::Published(_)), "it is heard");
    assert_eq!(cp.snapshot().await.services.len(), 12);
    let cluster = cp.admin.get("/v1/clusters/us-east").await;
    assert_eq!(cluster["heldWithdrawal"]["services"].as_array().unwrap().len(), 11, "{cluster}");

    let path = "/v1/clusters/us-east/confirm-withdrawal";
    let (status, answer) = cp.admin.call("POST", path, "").await;
    assert_eq!((status, &answer["changed"]), (StatusCode::OK, &json!(true)));
    assert_eq!(cp.snapshot().await.services.len(), 1);
    assert_eq!(cp.admin.call("POST", path, "").await.1["changed"], false);
    assert_eq!(cp.admin.call("POST", "/v1/clusters/nobody/drain", "").await.0, StatusCode::NOT_FOUND);
    cp.stop().await;
}

#[tokio::test]
async fn a_withdrawal_that_nobody_confirms_is_believed_after_its_time() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (agent, mut session) = member(&cp, "us-east").await;
    let soon = settings(1).replace("spec: {", "spec: { withdrawals: { confirmAfterMs: 1500 },");
    assert_eq!(cp.admin.apply(&soon).await.0, StatusCode::OK);
    publish(&mut session, &agent, 1, &services(12)).await;
    publish(&mut session, &agent, 2, &[]).await;
    assert_eq!(cp.snapshot().await.services.len(), 12);
    wait_for("them to go", SOON, async || cp.snapshot().await.services.is_empty()).await.unwrap();
    let events = cp.admin.get("/v1/events?changes").await;
    assert_eq!((&events[0]["action"], &events[0]["outcome"]), (&json!("pass-time"), &json!("changed")), "{events}");
    cp.stop().await;
}

#[tokio::test]
async fn the_agent_that_began_to_publish_last_is_believed_and_the_other_one_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let mut agent = Agent::new("us-east");
    let svid = cp.join(&agent).await;
    let open = async || Session::open(&mut cp.client(Some(&svid)), "us-east", None).await.unwrap();
    let (mut original, mut copy) = (open().await, open().await);
    agent.incarnation = [1; 16];
    assert!(matches!(publish(&mut original, &agent, 1, &services(3)).await, Kind::Published(_)));
    agent.incarnation = [2; 16];
    assert!(matches!(publish(&mut copy, &agent, 1, &services(2)).await, Kind::Published(_)));
    agent.incarnation = [1; 16];
    let Kind::Refused(refused) = publish(&mut original, &agent, 2, &services(3)).await else { panic!("not fenced") };
    assert!(refused.reason.contains("another agent publishes as cluster us-east"), "{}", refused.reason);
    assert_eq!(cp.snapshot().await.services.len(), 2);
    cp.stop().await;
}

#[tokio::test]
async fn a_drained_cluster_is_seen_as_such_by_all() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (_agent, mut session) = member(&cp, "us-east").await;
    let (status, answer) = cp.admin.call("POST", "/v1/clusters/us-east/drain", "").await;
    assert_eq!((status, &answer["changed"]), (StatusCode::OK, &json!(true)));
    let delta = session.delta().await;
    let draining = isthmus_api::proto::common::v1::ClusterState::Draining;
    assert_eq!(delta.clusters[0].state(), draining);
    assert_eq!(cp.admin.get("/v1/status").await["clusters"][0]["state"], "draining");
    cp.admin.call("POST", "/v1/clusters/us-east/undrain", "").await;
    assert_eq!(cp.admin.get("/v1/clusters/us-east").await["state"], "active");
    cp.stop().await;
}

#[tokio::test]
async fn history_tells_who_did_what_and_settings_can_be_put_back() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (_, first) = cp.admin.apply(&settings(7)).await;
    let (_, second) = cp.admin.apply(&settings(8)).await;
    cp.admin.call("POST", "/v1/clusters/nobody/revoke", "").await;
    let events = cp.admin.get("/v1/events").await;
    assert_eq!(
        (&events[0]["action"], &events[0]["outcome"]),
        (&json!("revoke"), &json!("unknown_cluster")),
        "{events}"
    );
    let (event, before) = (&events[1], &events[2]);
    assert_eq!((&event["action"], &event["subject"]), (&json!("apply"), &json!("Settings/federation")));
    assert!(event["who"].as_str().unwrap().starts_with("spiffe://isthmus.example/admin"), "{event}");
    assert!(event["from"].as_str().unwrap().starts_with("127.0.0.1:"), "{event}");
    assert_eq!((&event["before"], &event["after"]), (&before["after"], &second["stamp"]));
    let changes = cp.admin.get("/v1/events?changes&limit=1").await;
    assert_eq!(changes.as_array().unwrap().len(), 1);
    assert_eq!(changes[0]["outcome"], "changed");

    let [from, to] = [&first, &second].map(|answer| answer["stamp"]["revision"].to_string());
    let difference = cp.admin.get(&format!("/v1/diff/{from}/{to}")).await;
    let hold_down = |i: usize| &difference["settings"][i]["failover"]["holdDownMs"];
    assert_eq!((hold_down(0), hold_down(1)), (&json!(7), &json!(8)), "{difference}");
    let (status, answer) = cp.admin.call("POST", &format!("/v1/rollback/{from}"), "").await;
    assert_eq!((status, &answer["changed"]), (StatusCode::OK, &json!(true)), "{answer}");
    assert_eq!(cp.snapshot().await.settings.failover.hold_down, Duration::from_millis(7));
    assert_eq!(cp.admin.call("POST", "/v1/rollback/99", "").await.0, StatusCode::NOT_FOUND);
    cp.stop().await;
}

#[tokio::test]
async fn a_backup_is_restored_into_a_new_control_plane_with_its_indexes_and_revocations() {
    let [old, new] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let cp = ControlPlane::start(old.path()).await;
    let (agent, mut session) = member(&cp, "us-east").await;
    publish(&mut session, &agent, 1, &services(3)).await;
    cp.join(&Agent::new("us-west")).await;
    cp.admin.call("POST", "/v1/clusters/us-west/revoke", "").await;
    cp.admin.apply(&grant("us-east", "{ importNamespaces: [shop] }")).await;
    let token = cp.admin.token("us-north", 900).await;
    let before = cp.snapshot().await;
    let (status, backup) = cp.admin.transfer("GET", "/v1/backup", "").await.unwrap();
    assert_eq!(status, StatusCode::OK);
    let svid = cp.join(&agent).await;
    cp.stop().await;

    // With the CA of the old one its members believe it.
    let copied =
        std::process::Command::new("cp").arg("-r").args([old.path().join("ca"), new.path().join("ca")]).status();
    assert!(copied.unwrap().success());
    let cp = ControlPlane::start(new.path()).await;
    let mut damaged = backup.to_vec();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let (status, answer) = cp.admin.transfer("POST", "/v1/restore", damaged).await.unwrap();
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer:?}");
    let (status, answer) = cp.admin.transfer("POST", "/v1/restore", backup.clone()).await.unwrap();
    let answer: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!((status, &answer["sameAuthority"]), (StatusCode::OK, &json!(true)), "{answer}");
    let after = cp.snapshot().await;
    assert_eq!((&after.clusters, &after.services), (&before.clusters, &before.services));
    assert!(after.stamp.epoch > before.stamp.epoch);
    let grants = cp.admin.get("/v1/resources/clustergrants").await;
    assert_eq!(grants[0]["spec"]["importNamespaces"], json!(["shop"]), "{grants}");

    let mut resumed = Session::resume(&mut cp.client(Some(&svid)), "us-east", &before).await.unwrap();
    assert_eq!(resumed.snapshot().await.stamp.unwrap().epoch, after.stamp.epoch.0, "it gets the state whole");
    let refused = Agent::new("us-north").join(&support_token(&token, &cp)).await.unwrap_err();
    assert!(refused.message().contains("unknown"), "join tokens are void: {}", refused.message());
    let (status, _) = cp.admin.transfer("POST", "/v1/restore", backup).await.unwrap();
    assert_eq!(status, StatusCode::CONFLICT, "clusters are there");
    cp.stop().await;
}

/// A token of another control plane, shown to this one.
fn support_token(token: &isthmus_identity::token::Token, cp: &ControlPlane) -> isthmus_identity::token::Token {
    isthmus_identity::token::Token { address: cp.grpc.to_string(), ..token.clone() }
}
