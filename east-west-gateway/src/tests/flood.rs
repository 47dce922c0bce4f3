//! A flood of handshakes that are never finished, from one address that is real: others link all the same.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::UdpSocket, task::JoinSet};

use super::rig::{Gateway, Server, introduce, knock, local, read, sni, svid, trust, until};
use crate::{
    config::TunnelConfig,
    testkit::{FEDERATION, cluster},
    tunnel::link::quic::{self, Identity},
};

/// QUIC, version 1, 17.2.5: a long header of type Retry.
const RETRY: u8 = 0xf0;
/// Longer than the test.
const LASTING: Duration = Duration::from_secs(120);

/// Carries datagrams to `target` from 127.0.0.2, and back nothing but address checks: what dials through it proves its
/// address and never finishes a handshake.
async fn half_deaf(target: SocketAddr) -> SocketAddr {
    let near = Arc::new(UdpSocket::bind(local(0)).await.unwrap());
    let far = Arc::new(UdpSocket::bind("127.0.0.2:0").await.unwrap());
    let address = near.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut out, mut back) = (vec![0; 65_536], vec![0; 65_536]);
        let mut client = None;
        loop {
            tokio::select! {
                got = near.recv_from(&mut out) => {
                    let (n, from) = got.unwrap();
                    client = Some(from);
                    drop(far.send_to(&out[..n], target).await);
                }
                got = far.recv_from(&mut back) => {
                    let Ok((n, _)) = got else { continue };
                    if let Some(client) = client.filter(|_| back[0] & 0xf0 == RETRY) {
                        drop(near.send_to(&back[..n], client).await);
                    }
                }
            }
        }
    });
    address
}

#[tokio::test]
async fn a_flood_of_handshakes_from_one_source_leaves_places_for_the_others() {
    let endpoint = Server::bind().await.echo(b"west");
    let west = Gateway::start_with("west", |config| {
        config.tunnel.max_pending_handshakes = 8;
        config.tunnel.max_pending_handshakes_per_source = 4;
        // No place comes back by itself while this lasts.
        (config.tunnel.handshake_timeout, config.tunnel.idle_timeout) = (LASTING, LASTING);
    })
    .await;
    let gateways = [Gateway::start("east").await, west];
    let members: [(&str, &[_]); 2] = [("east", &[]), ("west", &[endpoint])];
    let mut global = introduce(&gateways, &members);
    // West must not dial, or there would be a link all the same.
    global.clusters.get_mut(&cluster("east")).unwrap().gateways.iter_mut().for_each(|g| g.tunnel = None);
    gateways[1].set_endpoints(&[endpoint]);
    gateways[1].set_global(&global);
    let core = gateways[1].core().await;

    let source = isthmus_identity::tls::IdentitySource::new(svid("mallory"));
    let identity = Identity { source, trust: trust(), federation: FEDERATION.parse().unwrap() };
    let mut flood = JoinSet::new();
    for _ in 0..16 {
        let (identity, way) = (identity.clone(), half_deaf(gateways[1].tunnel).await);
        flood.spawn(async move {
            let dialler = quinn::Endpoint::client(local(0)).unwrap();
            let (to, config) = (cluster("west"), TunnelConfig { idle_timeout: LASTING, ..TunnelConfig::default() });
            drop(quic::connect(&dialler, &config, &identity, (&to, way)).await);
        });
    }
    until("the source has its share", || core.metrics.rejected("peer_source_pending") > 8).await;
    assert_eq!(core.quic_handshakes.available_permits(), 4, "and holds it");

    gateways[0].set_global(&global);
    gateways[0].sees_ready("west").await;
    let mut client = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
}
