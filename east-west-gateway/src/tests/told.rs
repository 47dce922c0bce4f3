//! What operators are told of links: in the log, in the status, in the metrics.

use isthmus_model::local::Transport;
use serde_json::Value;

use super::{
    rig::{Gateway, Server, introduce, linked, until},
    traces::Log,
};
use crate::{config::LinkTransport, testkit::cluster};

/// Starts east, whose log is kept, and west.
async fn pair(over: LinkTransport) -> (Log, Gateway, Gateway) {
    let (log, dispatch, _guard) = Log::open("east", None);
    let east = Gateway::start_logging("east", dispatch, |config| config.tunnel.transport = over).await;
    (log, east, Gateway::start_over(over, "west").await)
}

fn levels(lines: &[Value]) -> Vec<&str> {
    lines.iter().filter_map(|line| line["level"].as_str()).collect()
}

#[tokio::test]
async fn a_peer_that_cannot_be_dialled_is_warned_of_once_shown_and_counted() {
    let (log, east, mut west) = pair(LinkTransport::Tcp).await;
    let (east, global) = {
        let gateways = [east, Gateway::start("west").await];
        let mut global = introduce(&gateways, &[("east", &[]), ("west", &[])]);
        let address = &mut global.clusters.get_mut(&cluster("west")).unwrap().gateways[0].tunnel;
        *address = Some(west.tunnel);
        let [east, _] = gateways;
        (east, global)
    };
    west.drain();
    west.ended().await;
    east.set_global(&global);
    let core = east.core().await;
    until("it was tried again", || core.metrics.dials_failed(&cluster("west"), "gateway-1", "tcp") >= 3).await;
    let said = log.lines("peer not reached");
    assert_eq!(levels(&said), ["WARN"], "{said:?}");
    assert_eq!(said[0]["fields"]["transport"], "tcp");
    let shown = east.inspector.tunnels().remove(0);
    assert!(!shown.up && shown.transport == Transport::Tcp, "{shown:?}");
    assert!(shown.dial_error.as_ref().unwrap().contains("refused"), "{shown:?}");
    assert_eq!(core.registry.states()[0].dial_error, shown.dial_error.unwrap());
}

#[tokio::test]
async fn a_dead_peer_is_told_as_dead_and_a_drained_one_as_drained() {
    for over in [LinkTransport::Quic, LinkTransport::Tcp] {
        let server = Server::bind().await;
        for (kills, level) in [(true, "WARN"), (false, "INFO")] {
            let (log, east, mut west) = pair(over).await;
            let members: [(&str, &[_]); 2] = [("east", &[]), ("west", &[server.address])];
            let gateways = [east, west];
            let global = introduce(&gateways, &members);
            gateways[1].set_endpoints(&[server.address]);
            gateways.iter().for_each(|gateway| gateway.set_global(&global));
            gateways[0].sees_ready("west").await;
            // West may have dialled first.
            until("east's own link is up", || !log.lines("tunnel up").is_empty()).await;
            let [_east, gone] = gateways;
            west = gone;
            if kills {
                west.kill();
            } else {
                west.drain();
                west.ended().await;
            }
            let what = format!("its end is told: {over:?}, killed: {kills}");
            until(&what, || !log.lines("tunnel down").is_empty()).await;
            let said = log.lines("tunnel down");
            let why = said[0]["fields"]["why"].as_str().unwrap();
            let words = match (kills, over) {
                (false, _) => "closed by the peer: it has drained",
                // The system closes a dead process's TCP connections; nobody speaks for its UDP socket.
                (true, LinkTransport::Tcp) => "its control connection broke",
                (true, _) => "peer dead: no sign of life for 1.",
            };
            assert!(why.contains(words), "{over:?}: {why}");
            assert_eq!(levels(&said[..1]), [level]);
            let up = log.lines("tunnel up").remove(0);
            let measured = up["fields"].get("rtt").is_some();
            assert_eq!(measured, over == LinkTransport::Quic, "{up}");
        }
    }
}

#[tokio::test]
async fn a_drains_last_line_tells_how_many_finished_and_how_many_were_reset() {
    let (log, dispatch, _guard) = Log::open("west", None);
    let server = Server::bind().await;
    let short = |config: &mut crate::Config| config.drain.deadline = super::rig::ms(1_000);
    let gateways = [Gateway::start("east").await, Gateway::start_logging("west", dispatch, short).await];
    let global = introduce(&gateways, &[("east", &[]), ("west", &[server.address])]);
    gateways[1].set_endpoints(&[server.address]);
    gateways.iter().for_each(|gateway| gateway.set_global(&global));
    gateways[0].sees_ready("west").await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let client = super::rig::knock(gateways[0].auto, &super::rig::sni(None)).await;
        open.push((client, server.greet(b"hi").await));
    }
    let [_east, mut west] = gateways;
    let core = west.core().await;
    until("all are carried", || core.metrics.carried_now() == 3).await;
    west.drain();
    until("the drain has begun", || !log.lines("draining").is_empty()).await;
    drop(open.remove(0));
    west.ended().await;
    let said = log.lines("drained");
    assert_eq!((&said[0]["fields"]["finished"], &said[0]["fields"]["reset"]), (&1.into(), &2.into()), "{said:?}");
}

#[tokio::test]
async fn a_pinned_connection_without_a_tunnel_is_logged_with_where_it_was_to_go() {
    let (log, east, mut west) = pair(LinkTransport::Quic).await;
    let server = Server::bind().await;
    let gateways = [east, west];
    let global = introduce(&gateways, &[("east", &[]), ("west", &[server.address])]);
    let [east, gone] = gateways;
    west = gone;
    west.drain();
    west.ended().await;
    east.set_global(&global);
    until("west has a port", || east.inspector.pinned().contains_key(&cluster("west"))).await;
    let entry = east.inspector.pinned()[&cluster("west")];
    drop(super::rig::knock(entry, &super::rig::sni(Some("west"))).await);
    let line = log.one().await;
    assert_eq!((&line["destination"], &line["source"]), (&Value::from("west"), &Value::from("east")), "{line}");
    assert_eq!(line["tried"][0]["outcome"], "no_tunnel");
}

#[tokio::test]
async fn a_link_to_a_cluster_that_there_is_not_is_a_problem() {
    let (gateways, _) = linked(LinkTransport::Quic, &[("east", &[])]).await;
    let core = gateways[0].core().await;
    assert!(core.standing.problems().is_empty(), "{:?}", core.standing.problems());
    let (log, dispatch, _guard) = Log::open("east", None);
    let misspelt = |config: &mut crate::Config| {
        config.tunnel.links.insert("weest".parse().unwrap(), LinkTransport::Tcp);
        config.tunnel.links.insert("west".parse().unwrap(), LinkTransport::Tcp);
    };
    let east = Gateway::start_logging("east", dispatch, misspelt).await;
    let mut global = crate::testkit::federation(&["east", "west"]);
    for _ in 0..3 {
        east.set_global(&global);
        global = super::rig::next(&global);
        let core = east.core().await;
        until("it is told", || core.standing.problems().iter().any(|text| text.contains("weest"))).await;
        assert_eq!(core.standing.problems().len(), 1, "{:?}", core.standing.problems());
    }
    let said = log.lines("correct the configuration");
    assert_eq!(levels(&said), ["WARN"]);
    assert!(said[0]["fields"]["known"].as_str().unwrap().contains("west"), "{said:?}");
}
