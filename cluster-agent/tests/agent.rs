//! The agent in process, against a control plane that speaks the real protocol: join, publish, feed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs;

use isthmus_api::proto::{
    common::v1 as common,
    local::v1::{
        AppReadiness, AvailabilityReport, GatewayMessage, PortReadiness, Problems, RenewRequest, SidecarMessage,
        gateway_message, sidecar_message, sidecar_update,
    },
};
use isthmus_identity::{keys::KeyPair, token::Token};
use support::{
    Agent, ControlPlane, DEADLINE, Home,
    clients::{Gateway, cart, gateway, is_ready, joined, sidecar},
    enrol, eventually,
};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_publishes_its_exports_and_reports_where_it_stands() {
    let (control, home, agent) = joined().await;
    eventually("the export is published", async || {
        control.seen.lock().unwrap().publications.last().is_some_and(|p| p.exports.len() == 1)
    })
    .await;
    eventually("the agent reports revision 1", async || {
        let seen = control.seen.lock().unwrap();
        seen.status.consumers.iter().any(|c| c.name == "agent" && c.applied == Some(support::stamp(1)))
    })
    .await;
    home.write(
        "bad.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: shop}\nspec: {ports: [{port: 0}]}\n",
    );
    eventually("the bad file is reported with its line", async || {
        control.seen.lock().unwrap().status.problems.iter().any(|p| p.at.starts_with("bad.yaml:"))
    })
    .await;
    fs::remove_file(home.dir.path().join("manifests/cart.yaml")).unwrap();
    eventually("the export is withdrawn", async || {
        control.seen.lock().unwrap().publications.last().unwrap().exports.is_empty()
    })
    .await;
    let metrics = agent.get("/metrics").await;
    for metric in ["isthmus_agent_revision 1", "isthmus_agent_uplink_connected 1", "isthmus_agent_exports 0"] {
        assert!(metrics.contains(metric), "{metric} is not in {metrics}");
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_manifests_folder_withdraws_nothing() {
    let (control, home, agent) = joined().await;
    let exported = || control.seen.lock().unwrap().publications.iter().map(|p| p.exports.len()).collect::<Vec<_>>();
    eventually("the export is published", async || exported().last() == Some(&1)).await;
    let before = exported().len();
    fs::rename(home.dir.path().join("manifests"), home.dir.path().join("elsewhere")).unwrap();
    eventually("the loss is reported", async || {
        control.seen.lock().unwrap().status.problems.iter().any(|p| p.message.contains("stay as they were"))
    })
    .await;
    // Something else may have been published meanwhile.
    assert!(exported()[before..].iter().all(|exports| *exports == 1), "{:?}", exported());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_enrols_gets_state_and_endpoints_and_is_published() {
    let (control, home, agent) = joined().await;
    let (mut client, svid) = enrol(&home.mint(gateway()).await).await.unwrap();
    assert_eq!(svid.id().as_str(), "spiffe://isthmus.example/cluster/us-east/gateway");
    let mut feed = Gateway::connect(&mut client).await;
    feed.revision(1).await;
    feed.endpoints(|e| e.services.len() == 1 && !is_ready(e)).await;
    control.set_state(2);
    feed.revision(2).await;
    feed.say(gateway_message::Kind::Applied(common::Stamp { epoch: 1, revision: 2 })).await;
    let tunnel = common::TunnelStatus {
        cluster: "us-west".to_owned(),
        gateway: "gateway-2".to_owned(),
        up: true,
        transport: common::Transport::Tcp.into(),
        downgraded: true,
        ..Default::default()
    };
    let report = AvailabilityReport { tunnels: vec![tunnel], ..Default::default() };
    feed.say(gateway_message::Kind::Availability(report)).await;
    feed.say(gateway_message::Kind::Problems(Problems { texts: vec!["a port is taken".to_owned()] })).await;
    eventually("the gateway is published and its revision reported", async || {
        let seen = control.seen.lock().unwrap();
        let published = seen.publications.last().is_some_and(|p| p.gateways.len() == 1);
        let gateway = seen.status.consumers.iter().find(|c| c.name == "gateway-1");
        let downgraded =
            seen.status.tunnels.iter().any(|t| t.from == "gateway-1" && t.tunnel.up && t.tunnel.downgraded);
        published
            && downgraded
            && gateway.is_some_and(|g| {
                g.connected && g.applied == Some(support::stamp(2)) && g.problems == ["a port is taken"]
            })
    })
    .await;
    drop(feed);
    eventually("the gateway is reported as gone", async || {
        control.seen.lock().unwrap().status.consumers.iter().any(|c| c.name == "gateway-1" && !c.connected)
    })
    .await;
    let csr = KeyPair::generate().unwrap().csr_der().unwrap();
    assert!(client.renew(RenewRequest { csr }).await.is_ok());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_registers_gets_bundles_and_its_readiness_reaches_gateways() {
    let (_control, home, agent) = joined().await;
    let (mut gateway_client, _) = enrol(&home.mint(gateway()).await).await.unwrap();
    let mut feed = Gateway::connect(&mut gateway_client).await;
    let (mut client, svid) = enrol(&home.mint(cart()).await).await.unwrap();
    assert_eq!(svid.id().as_str(), "spiffe://us-east.example/ns/shop/sa/cart");

    let (up, mut down) = sidecar(&mut client).await;
    let mut hear = async || timeout(DEADLINE, down.message()).await.unwrap().unwrap().unwrap().kind.unwrap();
    assert!(matches!(hear().await, sidecar_update::Kind::Registered(_)));
    let sidecar_update::Kind::Trust(trust) = hear().await else { panic!("bundles follow") };
    assert_eq!(trust.domains.len(), 1);
    assert_eq!(trust.domains[0].trust_domain, "us-east.example");

    let say = async |ready| {
        let ports = vec![PortReadiness { port: 15080, ready }];
        let kind = sidecar_message::Kind::Readiness(AppReadiness { ports });
        up.send(SidecarMessage { kind: Some(kind) }).await.unwrap();
    };
    say(true).await;
    feed.endpoints(is_ready).await;
    say(false).await;
    feed.endpoints(|e| !is_ready(e)).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_token_works_once_even_over_a_restart() {
    let (_control, home, agent) = joined().await;
    let token = home.mint(cart()).await;
    enrol(&token).await.unwrap();
    let refused = enrol(&token).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("isthmus-agent token workload shop/cart"), "{refused}");
    agent.stop().await;

    let mut config = home.config();
    config.listen.local = Token::parse(&token).unwrap().address.parse().unwrap();
    let agent = Agent::start(config).await;
    agent.ready().await;
    let refused = enrol(&token).await.unwrap_err();
    assert!(refused.message().contains("already used"), "{refused}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn feeds_are_only_for_those_they_are_meant_for() {
    let (_control, home, agent) = joined().await;
    let (mut workload, _) = enrol(&home.mint(cart()).await).await.unwrap();
    let (_up, messages) = mpsc::channel::<GatewayMessage>(1);
    let refused = workload.gateway_feed(ReceiverStream::new(messages)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let (mut gateway, _) = enrol(&home.mint(gateway()).await).await.unwrap();
    let (_up, messages) = mpsc::channel::<SidecarMessage>(1);
    let refused = gateway.sidecar_feed(ReceiverStream::new(messages)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_state_is_refused_and_reported() {
    let (control, _home, agent) = joined().await;
    control.set_state(5);
    eventually("revision 5 is applied", async || agent.get("/metrics").await.contains("isthmus_agent_revision 5"))
        .await;
    control.set_state(3);
    eventually("the stale state is reported", async || {
        control.seen.lock().unwrap().status.problems.iter().any(|p| p.message.contains("1.3"))
    })
    .await;
    assert!(agent.get("/metrics").await.contains("isthmus_agent_revision 5"));
    control.set_state(6);
    eventually("the next one is taken and nothing is left to mend", async || {
        let applied = agent.get("/metrics").await.contains("isthmus_agent_revision 6");
        applied && control.seen.lock().unwrap().status.problems.is_empty()
    })
    .await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_join_token_says_what_to_do() {
    let control = ControlPlane::start().await;
    let token = control.join_token();
    let home = Home::new(&token);
    let first = home.start().await;
    eventually("the cluster has joined", async || control.joined.lock().unwrap().is_some()).await;
    first.stop().await;
    let failure = Home::new(&token).start().await.failure().await;
    assert!(failure.contains("isthmusctl cluster join-token us-east"), "{failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_damaged_join_token_stops_the_start_with_advice() {
    let build_error = async |home: &Home| match isthmus_agent::build(home.config()).await {
        Ok(_) => panic!("it must not build"),
        Err(e) => isthmus_runtime::tasks::chain(&e),
    };
    let home = Home::new("isthmus-join.abc");
    assert!(build_error(&home).await.contains("mint a new one"));
    fs::remove_file(home.dir.path().join("join.token")).unwrap();
    assert!(build_error(&home).await.contains("isthmusctl cluster join-token us-east"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_and_a_taken_state_folder_are_named() {
    let (_control, home, agent) = joined().await;
    let second = isthmus_agent::build(home.config()).await.err().unwrap();
    assert!(second.to_string().contains("another agent"), "{second}");
    agent.stop().await;

    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = home.config();
    config.listen.local = taken.local_addr().unwrap();
    let error = isthmus_agent::build(config).await.err().unwrap();
    assert!(error.to_string().contains("listen.local"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_folder_of_another_cluster_is_refused() {
    let (_control, home, agent) = joined().await;
    agent.stop().await;
    let mut config = home.config();
    config.cluster = "us-west".parse().unwrap();
    let error = isthmus_agent::build(config).await.err().unwrap();
    assert!(error.to_string().contains("us-east"), "{error}");
}
