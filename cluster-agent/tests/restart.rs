//! The agent in process, started again on its state folder: without the control plane, with damaged files, after its
//! certificate ended.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs;

use isthmus_api::proto::local::v1::{RenewRequest, gateway_update, local_client::LocalClient};
use isthmus_identity::{keys::KeyPair, svid::Svid, token::Token};
use isthmus_model::{global::ClusterState, ids::Epoch};
use support::{
    Agent, ControlPlane, Home,
    clients::{Gateway, cart, damage, gateway, joined, listeners, restart, sidecar},
    enrol, enrol_channel, eventually,
};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn without_a_control_plane_a_restarted_agent_serves_what_it_knew() {
    let (control, home, agent) = joined().await;
    let (mut client, _) = enrol(&home.mint(gateway()).await).await.unwrap();
    let mut feed = Gateway::connect(&mut client).await;
    feed.revision(1).await;
    eventually("the gateway is known", async || agent.get("/debug/view").await.contains("gateway-1")).await;
    agent.stop().await;
    control.stop().await;

    // The join token is used up and gone; so is the folder of manifests.
    fs::remove_file(home.dir.path().join("join.token")).unwrap();
    fs::rename(home.dir.path().join("manifests"), home.dir.path().join("elsewhere")).unwrap();
    let agent = home.start().await;
    agent.ready().await;
    let view = agent.get("/debug/view").await;
    assert!(view.contains("gateway-1") && view.contains("shop/cart"), "{view}");
    let (mut client, _) = {
        // Workloads are signed by the cluster's own CA.
        let token = home.mint(cart()).await;
        enrol(&token).await.unwrap()
    };
    let csr = KeyPair::generate().unwrap().csr_der().unwrap();
    assert!(client.renew(RenewRequest { csr }).await.is_ok());
    // Gateways are not, and their token stays good.
    let token = home.mint(gateway()).await;
    for _ in 0..2 {
        assert_eq!(enrol(&token).await.unwrap_err().code(), Code::Unavailable);
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_damaged_state_of_the_federation_no_envoy_is_told_anything() {
    let (control, home, agent) = joined().await;
    let token = home.mint(cart()).await;
    let address = Token::parse(&token).unwrap().address;
    let (channel, _) = enrol_channel(&token).await.unwrap();
    let feed = sidecar(&mut LocalClient::new(channel.clone())).await;
    eventually("the sidecar is known", async || agent.get("/debug/view").await.contains("cart-1")).await;
    assert_eq!(listeners(channel.clone()).await.unwrap(), ["inbound|15080"]);
    agent.stop().await;
    drop(feed);
    control.stop().await;
    damage(&home, "global.lkg");

    let agent = restart(&home, &address).await;
    eventually("the agent answers", async || agent.get("/readyz").await.contains("federation state")).await;
    let mut refused = None;
    eventually("xDS answers", async || {
        refused = listeners(channel.clone()).await.err();
        refused.as_ref().is_some_and(|r| r.message().contains("no state of the federation"))
    })
    .await;
    assert_eq!(refused.unwrap().code(), Code::Unavailable);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_were_never_read_are_not_taken_from_a_gateway() {
    let (control, home, agent) = joined().await;
    let token = home.mint(gateway()).await;
    let address = Token::parse(&token).unwrap().address;
    let (mut client, _) = enrol(&token).await.unwrap();
    Gateway::connect(&mut client).await.endpoints(|e| e.services.len() == 1).await;
    agent.stop().await;
    control.stop().await;
    damage(&home, "manifests.lkg");
    let (folder, elsewhere) = (home.dir.path().join("manifests"), home.dir.path().join("elsewhere"));
    fs::rename(&folder, &elsewhere).unwrap();

    let agent = restart(&home, &address).await;
    eventually("the local server is up", async || !agent.get("/readyz").await.contains("listener")).await;
    let mut feed = Gateway::connect(&mut client).await;
    feed.revision(1).await;
    fs::rename(&elsewhere, &folder).unwrap();
    let gateway_update::Kind::Endpoints(first) = feed.hear().await else { panic!("endpoints follow") };
    assert_eq!(first.services.len(), 1);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_outlives_a_restart_without_the_state_it_came_with() {
    let (control, home, agent) = joined().await;
    let own = "us-east".parse().unwrap();
    let mut revoked = control.snapshot(2);
    revoked.clusters.get_mut(&own).unwrap().state = ClusterState::Revoked;
    control.state.send_replace(Some(revoked));
    let is_revoked = async |agent: &Agent, stamp: &str| {
        let view = agent.get("/debug/view").await;
        view.contains(stamp) && view.contains("\"state\":\"Revoked\"")
    };
    eventually("the revocation is known", async || is_revoked(&agent, "\"revision\":2").await).await;
    agent.stop().await;
    fs::remove_file(home.state_dir().join("global.lkg")).unwrap();
    let mut restored = control.snapshot(1);
    restored.stamp.epoch = Epoch(2);
    control.state.send_replace(Some(restored));

    let agent = home.start().await;
    agent.ready().await;
    eventually("it stands in the new epoch", async || is_revoked(&agent, "\"epoch\":2").await).await;
    eventually("the contradiction is reported", async || {
        control.seen.lock().unwrap().status.problems.iter().any(|p| p.message.contains("stays revoked"))
    })
    .await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_whose_agents_certificate_ended_joins_again_with_a_new_token() {
    let control = ControlPlane::start().await;
    let life = std::time::Duration::from_secs(1);
    *control.lifetime.lock().unwrap() = life;
    let home = Home::new(&control.join_token());
    let agent = home.start().await;
    eventually("the certificate is there", async || home.state_dir().join("member.json").exists()).await;
    agent.stop().await;
    let ca = fs::read(home.state_dir().join("ca/ca.pem")).unwrap();
    eventually("the certificate has ended", async || {
        let svid = Svid::load(&home.state_dir(), "agent").unwrap().unwrap();
        svid.not_after().0 <= isthmus_runtime::now()
    })
    .await;

    fs::remove_file(home.dir.path().join("join.token")).unwrap();
    let error = isthmus_agent::build(home.config()).await.err().unwrap();
    let error = isthmus_runtime::tasks::chain(&error);
    assert!(error.contains("ended at 20") && error.contains("isthmusctl cluster join-token us-east"), "{error}");

    *control.lifetime.lock().unwrap() = 3600 * life;
    fs::write(home.dir.path().join("join.token"), control.join_token()).unwrap();
    control.set_state(1);
    let agent = home.start().await;
    agent.ready().await;
    assert_eq!(fs::read(home.state_dir().join("ca/ca.pem")).unwrap(), ca);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_agents_folder_stays_its_own_without_its_socket() {
    let (_control, home, agent) = joined().await;
    fs::remove_file(home.state_dir().join("admin.sock")).unwrap();
    let second = isthmus_agent::build(home.config()).await.err().unwrap();
    assert!(second.to_string().contains(&home.state_dir().display().to_string()), "{second}");
    agent.stop().await;
    home.start().await.stop().await;
}
