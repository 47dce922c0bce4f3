//! Grants at the far side: what its own state says of the caller counts, whatever the near gateway believes.

use isthmus_model::grant::{ClusterGrant, Namespaces};
use tokio::io::AsyncReadExt as _;

use super::rig::{Server, connected, knock, read, sni, until};
use crate::testkit::cluster;

#[tokio::test]
async fn a_far_gateway_refuses_a_cluster_whose_grant_does_not_let_it_import() {
    let west = Server::bind().await.echo(b"west");
    let (gateways, mut global) = connected(&[("east", &[]), ("west", &[west])]).await;
    let mut before = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut before, 4).await, b"west");

    let nothing = ClusterGrant { import_namespaces: Namespaces::Only([].into()), ..ClusterGrant::default() };
    global.clusters.get_mut(&cluster("east")).unwrap().grant = nothing;
    gateways[1].set_global(&global);
    let near = gateways[0].core().await;
    let mut refused = knock(gateways[0].auto, &sni(None)).await;
    assert!(!matches!(refused.read(&mut [0; 1]).await, Ok(1..)), "nothing comes of it");
    until("told", || near.metrics.attempted(&cluster("west"), "rejected_forbidden") > 0).await;

    global.clusters.get_mut(&cluster("east")).unwrap().grant = ClusterGrant::default();
    gateways[1].set_global(&global);
    let mut again = knock(gateways[0].auto, &sni(None)).await;
    assert_eq!(read(&mut again, 4).await, b"west");
}
