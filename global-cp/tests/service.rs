//! The control plane as its clients see it, in one process, over real TLS.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests; clippy knows only functions marked so"
)]

mod support;

use std::{os::unix::fs::PermissionsExt, time::Duration};

use hyper::StatusCode;
use isthmus_api::proto::{
    common::v1 as common,
    federation::v1::{self as pb, AgentMessage, agent_message, control_message::Kind},
};
use isthmus_global_cp::build;
use isthmus_identity::{keys::KeyPair, svid::Svid};
use isthmus_model::global::GlobalSnapshot;
use isthmus_runtime::wait::wait_for;
use rustls::pki_types::CertificateDer;
use support::{Agent, ControlPlane, Session, config, http_get};
use tokio::time::{Instant, timeout};
use tonic::Code;

fn published(kind: Kind) -> common::Stamp {
    match kind {
        Kind::Published(published) => published.stamp.unwrap(),
        other => panic!("not published: {other:?}"),
    }
}

#[tokio::test]
async fn a_token_joins_once_and_each_refusal_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let agent = Agent::new("us-east");
    let token = cp.admin.token("us-east", 900).await;
    assert_eq!(token.address, cp.grpc.to_string());

    let svid = agent.join(&token).await.unwrap();
    assert_eq!(svid.id().as_str(), "spiffe://isthmus.example/cluster/us-east/agent");
    let days = svid.not_after().since(svid.not_before()).as_secs() / 86_400;
    assert_eq!(days, 30);

    // The answer may have got lost: the same key may ask again, another one may not.
    agent.join(&token).await.unwrap();
    let thief = Agent::new("us-east");
    let used = thief.join(&token).await.unwrap_err();
    assert_eq!(used.code(), Code::PermissionDenied);
    assert!(used.message().contains("already used"), "{}", used.message());
    assert!(used.message().contains("isthmusctl cluster join-token us-east"), "{}", used.message());

    let other = cp.admin.token("us-west", 900).await;
    let wrong = agent.join(&other).await.unwrap_err();
    assert!(wrong.message().contains("is for cluster us-west, not us-east"), "{}", wrong.message());

    let mut garbage = other.clone();
    garbage.secret = "guessed".to_owned();
    let unknown = agent.join(&garbage).await.unwrap_err();
    assert!(unknown.message().contains("unknown"), "{}", unknown.message());

    let short = cp.admin.token("us-east", 1).await;
    let expired = || isthmus_runtime::now() > short.expires_at.0;
    wait_for("the token to expire", Duration::from_secs(5), async || expired()).await.unwrap();
    let late = agent.join(&short).await.unwrap_err();
    assert!(late.message().contains("expired at 20"), "{}", late.message());
    cp.stop().await;
}

#[tokio::test]
async fn a_bad_request_does_not_cost_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let agent = Agent::new("us-east");
    let token = cp.admin.token("us-east", 900).await;
    let mut client = cp.client(None);
    let bad_csr = pb::JoinRequest { csr: vec![1, 2, 3], ..agent.request(&token.secret) };
    assert_eq!(client.join(bad_csr).await.unwrap_err().code(), Code::InvalidArgument);
    let no_bundle = pb::JoinRequest { bundle: None, ..agent.request(&token.secret) };
    let status = client.join(no_bundle).await.unwrap_err();
    assert!(status.message().contains("bundle"), "{}", status.message());
    agent.join(&token).await.unwrap();
    cp.stop().await;
}

#[tokio::test]
async fn publications_become_snapshots_and_then_deltas() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (east, west) = (Agent::new("us-east"), Agent::new("us-west"));
    let (east_svid, west_svid) = (cp.join(&east).await, cp.join(&west).await);
    let mut east_session = Session::open(&mut cp.client(Some(&east_svid)), "us-east", None).await.unwrap();
    let first = east_session.snapshot().await;
    assert_eq!(first.clusters.len(), 2);
    assert!(first.services.is_empty());

    east_session.send(east.publish(1, &["cart", "web"])).await;
    let stamp = published(east_session.answer().await);
    let mut west_session = Session::open(&mut cp.client(Some(&west_svid)), "us-west", None).await.unwrap();
    let snapshot = west_session.snapshot().await;
    let held = GlobalSnapshot::try_from(snapshot.clone()).unwrap();
    assert_eq!(snapshot.stamp, Some(stamp));
    assert_eq!(snapshot.services.len(), 2);

    east_session.send(east.publish(2, &["cart", "web"])).await;
    assert_eq!(published(east_session.answer().await), stamp, "publishing the same changes nothing");

    east_session.send(east.publish(3, &["web", "orders"])).await;
    let later = published(east_session.answer().await);
    let delta = west_session.delta().await;
    assert_eq!((delta.from, delta.to), (Some(stamp), Some(later)));
    assert_eq!(delta.services.len(), 1);
    assert_eq!(delta.services[0].name.as_ref().unwrap().name, "orders");
    assert_eq!(delta.removed_services[0].name, "cart");

    // One who held the earlier state gets the difference, one who holds the latest nothing but what follows.
    let mut client = cp.client(Some(&west_svid));
    let mut again = Session::resume(&mut client, "us-west", &held).await.unwrap();
    assert_eq!(again.delta().await, delta);
    // One who held something else under that stamp, or does not say what, gets everything.
    let mut other = held.clone();
    other.services.clear();
    let mut again = Session::resume(&mut client, "us-west", &other).await.unwrap();
    assert_eq!(again.snapshot().await.stamp, Some(later));
    let mut again = Session::open(&mut client, "us-west", Some(stamp)).await.unwrap();
    assert_eq!(again.snapshot().await.stamp, Some(later));
    cp.stop().await;
}

#[tokio::test]
async fn a_refused_publication_says_why_and_the_session_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (east, west) = (Agent::new("us-east"), Agent::new("us-west"));
    let svid = cp.join(&east).await;
    cp.join(&west).await;
    let mut session = Session::open(&mut cp.client(Some(&svid)), "us-east", None).await.unwrap();
    session.snapshot().await;
    session.send(west.publish(1, &["cart"])).await;
    match session.answer().await {
        Kind::Refused(refused) => {
            assert_eq!(refused.sequence, 1);
            assert!(refused.reason.contains("us-east.example"), "{}", refused.reason);
        }
        other => panic!("not refused: {other:?}"),
    }
    session.send(east.publish(2, &["cart"])).await;
    published(session.answer().await);
    assert_eq!(cp.snapshot().await.services.len(), 1);
    cp.stop().await;
}

#[tokio::test]
async fn revocation_ends_sessions_within_a_second_and_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let east = Agent::new("us-east");
    let svid = cp.join(&east).await;
    let spare = cp.admin.token("us-east", 900).await;
    let mut client = cp.client(Some(&svid));
    let mut session = Session::open(&mut client, "us-east", None).await.unwrap();
    session.snapshot().await;
    let sign = || pb::SignRequest { role: pb::Role::Gateway.into(), csr: east.csr() };
    client.sign(sign()).await.unwrap();

    let (status, answer) = cp.admin.call("POST", "/v1/clusters/us-east/revoke", "").await;
    let revoked = Instant::now();
    assert_eq!(status, StatusCode::OK, "{answer}");
    let end = session.end().await;
    assert!(revoked.elapsed() < Duration::from_secs(1), "{:?}", revoked.elapsed());
    assert_eq!(end.code(), Code::PermissionDenied);
    assert!(end.message().contains("revoked"), "{}", end.message());

    assert_eq!(client.sign(sign()).await.unwrap_err().code(), Code::PermissionDenied);
    let refused = Session::open(&mut client, "us-east", None).await.map(|_| ()).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let refused = east.join(&spare).await.unwrap_err();
    assert!(refused.message().contains("cannot return"), "{}", refused.message());

    let (status, answer) = cp.admin.call("POST", "/v1/clusters/nobody/revoke", "").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(answer["error"]["code"], "unknown_cluster");
    cp.stop().await;
}

#[tokio::test]
async fn signing_needs_an_agents_certificate_and_names_the_role() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let east = Agent::new("us-east");
    let svid = cp.join(&east).await;
    let key = KeyPair::generate().unwrap();
    let request = |role: pb::Role| pb::SignRequest { role: role.into(), csr: key.csr_der().unwrap() };
    let mut client = cp.client(Some(&svid));
    let mut dns = None;
    for (role, name) in [(pb::Role::Gateway, "gateway"), (pb::Role::Dns, "dns"), (pb::Role::Agent, "agent")] {
        let chain = client.sign(request(role)).await.unwrap().into_inner().certificate_chain;
        let signed = Svid::new(chain.into_iter().map(CertificateDer::from).collect(), &key).unwrap();
        assert_eq!(signed.id().as_str(), format!("spiffe://isthmus.example/cluster/us-east/{name}"));
        if name == "dns" {
            dns = Some(signed);
        }
    }
    assert_eq!(client.sign(request(pb::Role::Unspecified)).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(cp.client(None).sign(request(pb::Role::Dns)).await.unwrap_err().code(), Code::Unauthenticated);
    // A DNS server's certificate is good for no call here: the handshake already fails.
    assert!(cp.client(dns.as_ref()).sign(request(pb::Role::Dns)).await.is_err());
    cp.stop().await;
}

#[tokio::test]
async fn a_session_is_for_the_cluster_in_the_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (east, west) = (Agent::new("us-east"), Agent::new("us-west"));
    let svid = cp.join(&east).await;
    cp.join(&west).await;
    let mut session = Session::open(&mut cp.client(Some(&svid)), "us-west", None).await.unwrap();
    let end = session.end().await;
    assert_eq!(end.code(), Code::PermissionDenied);
    assert!(end.message().contains("us-west") && end.message().contains("us-east"), "{}", end.message());
    cp.stop().await;
}

#[tokio::test]
async fn an_agent_that_holds_a_later_state_is_told_and_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let svid = cp.join(&Agent::new("us-east")).await;
    let later = Some(common::Stamp { epoch: 1, revision: 1_000_000 });
    let mut session = Session::open(&mut cp.client(Some(&svid)), "us-east", later).await.unwrap();
    let end = session.down.message().await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
    assert!(end.message().contains("behind") && end.message().contains("--new-epoch"), "{}", end.message());
    cp.stop().await;
}

#[tokio::test]
async fn an_agent_whose_history_parted_is_told_and_a_new_epoch_brings_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let svid = cp.join(&Agent::new("us-east")).await;
    let before = cp.snapshot().await;
    // As if other changes had led to the same revision before a restore.
    let mut parted = before.clone();
    parted.settings.failover.hold_down += Duration::from_secs(1);
    let mut session = Session::resume(&mut cp.client(Some(&svid)), "us-east", &parted).await.unwrap();
    let end = session.end().await;
    assert_eq!(end.code(), Code::Unavailable);
    assert!(end.message().contains("--new-epoch"), "{}", end.message());
    cp.stop().await;

    let mut again = config(dir.path());
    again.new_epoch = true;
    let cp = ControlPlane::start_with(dir.path(), again).await;
    let mut session = Session::resume(&mut cp.client(Some(&svid)), "us-east", &parted).await.unwrap();
    let now = GlobalSnapshot::try_from(session.snapshot().await).unwrap();
    assert_eq!(now.stamp.epoch.0, before.stamp.epoch.0 + 1);
    assert!(now.stamp.revision > before.stamp.revision);
    assert_eq!((now.clusters, now.settings), (before.clusters, before.settings));
    cp.stop().await;
}

#[tokio::test]
async fn status_shows_who_is_connected_what_they_applied_and_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let east = Agent::new("us-east");
    let svid = cp.join(&east).await;
    let mut session = Session::open(&mut cp.client(Some(&svid)), "us-east", None).await.unwrap();
    let stamp = session.snapshot().await.stamp.unwrap();
    let service = common::ServiceName { namespace: "shop".to_owned(), name: "cart".to_owned() };
    let report = pb::Status {
        consumers: vec![common::ConsumerStatus {
            kind: common::ConsumerKind::Gateway.into(),
            name: "gateway-1".to_owned(),
            applied: Some(common::Stamp { revision: stamp.revision - 1, ..stamp }),
            connected: true,
            problems: vec![],
        }],
        availability: vec![common::Availability {
            service: Some(service),
            cluster: "us-east".to_owned(),
            ready: 2,
            total: 3,
            reachable: true,
            recovered_at_unix_ms: 0,
        }],
        problems: vec![common::Problem {
            at: "cart.yaml:14".to_owned(),
            field: "spec.ports".to_owned(),
            message: "is missing".to_owned(),
        }],
        tunnels: vec![pb::TunnelReport {
            from: "gateway-1".to_owned(),
            tunnel: Some(common::TunnelStatus {
                cluster: "us-west".to_owned(),
                gateway: "gateway-2".to_owned(),
                up: true,
                rtt_us: 420,
                transport: common::Transport::Tcp.into(),
                downgraded: true,
                loss_ppm: 30,
                cwnd_bytes: 14_720,
                dial_error: "no answer over QUIC".to_owned(),
            }),
        }],
    };
    session.send(AgentMessage { kind: Some(agent_message::Kind::Status(report)) }).await;
    let arrived = async || cp.admin.get("/v1/status").await["clusters"][0]["consumers"][0].is_object();
    wait_for("the report", Duration::from_secs(5), arrived).await.unwrap();

    let status = cp.admin.get("/v1/status").await;
    assert_eq!(status["federation"], "isthmus.example");
    assert_eq!(status["node"], "cp-1");
    assert_eq!(status["stamp"]["revision"], stamp.revision);
    let cluster = &status["clusters"][0];
    assert_eq!(cluster["name"], "us-east");
    assert_eq!(cluster["state"], "active");
    assert_eq!(cluster["region"], "us");
    assert_eq!(cluster["index"], 1);
    assert_eq!(cluster["session"]["connected"], true);
    assert!(cluster["session"]["lastSeenMs"].as_u64().unwrap() > 1_600_000_000_000);
    let consumer = serde_json::json!({
        "kind": "gateway", "name": "gateway-1", "connected": true, "lagRevisions": 1, "problems": [],
        "applied": {"epoch": stamp.epoch, "revision": stamp.revision - 1},
    });
    assert_eq!(cluster["consumers"][0], consumer);
    assert_eq!(cluster["problems"][0]["at"], "cart.yaml:14");
    let seen = serde_json::json!([
        {"service": "shop/cart", "cluster": "us-east", "ready": 2, "total": 3, "reachable": true},
    ]);
    assert_eq!(cp.admin.get("/v1/availability/us-east").await, seen);
    assert_eq!(cluster["availability"], seen);
    let tunnel = serde_json::json!({
        "from": "gateway-1", "cluster": "us-west", "gateway": "gateway-2", "up": true, "rttUs": 420,
        "transport": "tcp", "downgraded": true, "lossPpm": 30, "cwndBytes": 14_720, "dialError": "no answer over QUIC",
    });
    assert_eq!(cluster["tunnels"][0], tunnel);
    assert_eq!(cp.admin.call("GET", "/v1/availability/nobody", "").await.0, StatusCode::NOT_FOUND);

    drop(session);
    let gone = async || cp.admin.get("/v1/status").await["clusters"][0]["session"]["connected"] == false;
    wait_for("the session's end", Duration::from_secs(5), gone).await.unwrap();
    let after = cp.admin.get("/v1/status").await;
    assert_eq!(after["clusters"][0]["consumers"][0], consumer, "the last report stays to be looked at");
    cp.stop().await;
}

#[tokio::test]
async fn the_admin_api_answers_errors_in_one_shape() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    for (method, path, body, status, code) in [
        ("GET", "/v1/nothing", "", 404, "not_found"),
        ("GET", "/v1/clusters/us-east/revoke", "", 405, "method_not_allowed"),
        ("POST", "/v1/clusters/US_EAST/join-token", "", 400, "invalid"),
        ("POST", "/v1/clusters/us-east/join-token", "{\"ttl\": 1}", 400, "invalid"),
        ("POST", "/v1/clusters/us-east/join-token", "{\"ttlSeconds\": 0}", 400, "invalid"),
        ("POST", "/v1/clusters/us-east/join-token", "{\"ttlSeconds\": 99999999}", 400, "invalid"),
        ("POST", "/v1/clusters/us-east/revoke", "", 404, "unknown_cluster"),
    ] {
        let (got, answer) = cp.admin.call(method, path, body).await;
        assert_eq!((got.as_u16(), answer["error"]["code"].as_str()), (status, Some(code)), "{method} {path}: {answer}");
        assert!(!answer["error"]["message"].as_str().unwrap().is_empty());
    }
    let (status, answer) = cp.admin.call("POST", "/v1/clusters/us-east/join-token", "").await;
    assert_eq!(status, StatusCode::OK);
    assert!(answer["expiresAt"].as_u64().unwrap() > isthmus_runtime::now() + 890_000);
    assert_eq!(cp.admin.get("/v1/services").await, serde_json::json!([]));
    cp.stop().await;
}

#[tokio::test]
async fn the_admin_api_is_closed_to_agents() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let svid = cp.join(&Agent::new("us-east")).await;
    let other = tempfile::tempdir().unwrap();
    svid.save(&other.path().join("admin"), "admin").unwrap();
    let intruder = support::Admin::of(other.path(), cp.admin.address());
    assert!(timeout(Duration::from_secs(5), intruder.try_call("GET", "/v1/status", "")).await.unwrap().is_err());
    cp.stop().await;
}

#[tokio::test]
async fn the_administrators_files_are_private_and_say_where_to_go() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let admin = dir.path().join("admin");
    for file in ["context.yaml", "ca.pem", "admin.pem", "admin.key"] {
        let mode = std::fs::metadata(admin.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let context = std::fs::read_to_string(admin.join("context.yaml")).unwrap();
    let address = cp.admin.address();
    assert_eq!(
        context,
        format!(
            "server: https://{address}\nca: ca.pem\ncert: admin.pem\nkey: admin.key\nfederation: isthmus.example\n"
        )
    );
    let certificate = std::fs::read(admin.join("admin.pem")).unwrap();
    cp.stop().await;
    let cp = ControlPlane::start(dir.path()).await;
    assert_eq!(std::fs::read(admin.join("admin.pem")).unwrap(), certificate, "still good, so it stays");
    cp.stop().await;
}

#[tokio::test]
async fn a_restart_from_disk_keeps_revision_indexes_and_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (east, west) = (Agent::new("us-east"), Agent::new("us-west"));
    let svid = cp.join(&east).await;
    let mut session = Session::open(&mut cp.client(Some(&svid)), "us-east", None).await.unwrap();
    session.send(east.publish(1, &["web", "cart"])).await;
    published(session.answer().await);
    session.send(east.publish(2, &["cart"])).await;
    published(session.answer().await);
    let token = cp.admin.token("us-west", 900).await;
    let before = cp.snapshot().await;
    drop(session);
    cp.stop().await;

    let cp = ControlPlane::start(dir.path()).await;
    assert_eq!(cp.snapshot().await, before);
    let held = before.stamp.into();
    let mut session = Session::resume(&mut cp.client(Some(&svid)), "us-east", &before).await.unwrap();
    // Up to date: it is connected before anything new comes.
    let connected = async || cp.admin.get("/v1/status").await["clusters"][0]["session"]["connected"] == true;
    wait_for("the session", Duration::from_secs(5), connected).await.unwrap();
    let moved = isthmus_identity::token::Token { address: cp.grpc.to_string(), ..token };
    west.join(&moved).await.unwrap();
    let delta = session.delta().await;
    assert_eq!(delta.from, Some(held));
    assert_eq!((delta.clusters[0].name.as_str(), delta.clusters[0].index), ("us-west", 2));
    cp.stop().await;
}

#[tokio::test]
async fn a_drain_ends_sessions_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let svid = cp.join(&Agent::new("us-east")).await;
    let mut session = Session::open(&mut cp.client(Some(&svid)), "us-east", None).await.unwrap();
    session.snapshot().await;
    let (ended, ()) = tokio::join!(session.end(), cp.stop());
    assert_eq!(ended.code(), Code::Unavailable);
    assert!(ended.message().contains("stopping"), "{}", ended.message());
}

#[tokio::test]
async fn a_state_folder_that_cannot_be_written_fails_the_start_by_name() {
    isthmus_identity::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a-file");
    std::fs::write(&file, "in the way").unwrap();
    let folder = file.join("state");
    let error = build(config(&folder)).await.map(|_| ()).unwrap_err();
    let text = isthmus_runtime::tasks::chain(&error);
    assert!(text.contains(folder.to_str().unwrap()) && text.contains("stateDir"), "{text}");
}

#[tokio::test]
async fn the_state_folder_of_another_federation_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    ControlPlane::start(dir.path()).await.stop().await;
    let mut other = config(dir.path());
    other.federation = "other.example".parse().unwrap();
    let error = build(other).await.map(|_| ()).unwrap_err();
    let text = isthmus_runtime::tasks::chain(&error);
    assert!(text.contains("isthmus.example") && text.contains("other.example"), "{text}");
}

#[tokio::test]
async fn health_and_metrics_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let ready = async || http_get(cp.health, "/readyz").await.0 == StatusCode::OK;
    wait_for("readiness", Duration::from_secs(5), ready).await.unwrap();
    let svid = cp.join(&Agent::new("us-east")).await;
    let mut session = Session::open(&mut cp.client(Some(&svid)), "us-east", None).await.unwrap();
    let revision = session.snapshot().await.stamp.unwrap().revision;
    let expected = [
        format!("isthmus_cp_revision {revision}\n"),
        "isthmus_cp_sessions 1\n".to_owned(),
        "isthmus_cp_raft_leader 1\n".to_owned(),
        "isthmus_cp_joins_total{result=\"joined\"} 1\n".to_owned(),
    ];
    let served = async || {
        let (_, text) = http_get(cp.health, "/metrics").await;
        expected.iter().all(|line| text.contains(line))
    };
    wait_for("the metrics", Duration::from_secs(5), served).await.unwrap();
    cp.stop().await;
}

#[tokio::test]
async fn a_long_state_comes_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let agent = Agent::new("us-east");
    let svid = cp.join(&agent).await;
    let mut session = Session::open(&mut cp.client(Some(&svid)), "us-east", None).await.unwrap();
    session.snapshot().await;
    assert_eq!(session.pieces, 0, "a short one is whole");
    let names: Vec<String> = (0..3_000).map(|i| format!("service-with-a-rather-long-name-{i}")).collect();
    session.send(agent.publish(1, &names.iter().map(String::as_str).collect::<Vec<_>>())).await;
    published(session.answer().await);
    assert!(session.pieces > 5, "{} pieces of the difference", session.pieces);

    let mut fresh = Session::open(&mut cp.client(Some(&svid)), "us-east", None).await.unwrap();
    assert_eq!(fresh.snapshot().await.services.len(), 3_000);
    assert!(fresh.pieces > 5, "{} pieces of the state", fresh.pieces);
    cp.admin.call("POST", "/v1/clusters/us-east/revoke", "").await;
    assert_eq!(fresh.end().await.code(), Code::PermissionDenied);
    cp.stop().await;
}
