//! Endpoints that are slow or hang: what a stream's clients notice, what the pool makes of it, and what it costs.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
    time,
};

use super::rig::{Server, answer_hello, hello, knock, linked, linked_with, ms, over_both, read, sni, until};
use crate::{config::LinkTransport, testkit::cluster};

over_both!(
    endpoints_that_answer_late_but_in_time_serve_and_stay_in,
    a_hung_endpoint_costs_its_share_of_the_time_and_is_put_out,
    where_all_endpoints_hang_the_connection_goes_elsewhere_and_none_is_put_out,
    a_brown_out_is_amplified_by_the_budget_at_most,
);

/// An endpoint that takes so long to answer, and the number of hellos that it was sent.
async fn slow(answers_in: Duration, asked: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let asked = asked.clone();
            tokio::spawn(async move {
                // Probes connect and say nothing.
                if tcp.peek(&mut [0; 1]).await.unwrap_or(0) == 0 {
                    return;
                }
                answer_hello(&mut tcp).await;
                asked.fetch_add(1, Ordering::Relaxed);
                time::sleep(answers_in).await;
                drop(tcp.write_all(b"late").await);
                drop(tcp.read(&mut [0; 1]).await);
            });
        }
    });
    address
}

async fn endpoints_that_answer_late_but_in_time_serve_and_stay_in(over: LinkTransport) {
    let asked = Arc::default();
    let mut endpoints = Vec::new();
    for _ in 0..3 {
        endpoints.push(slow(ms(500), Arc::clone(&asked)).await);
    }
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &endpoints)]).await;
    for _ in 0..6 {
        let mut client = knock(gateways[0].auto, &sni(None)).await;
        assert_eq!(read(&mut client, 4).await, b"late");
    }
    assert_eq!(gateways[1].core().await.metrics.ejected(), 0);
    assert_eq!(gateways[0].eligibility("west").as_deref(), Some("ready"));
    assert!(asked.load(Ordering::Relaxed) <= 12, "{asked:?}: one beside each at most");
}

async fn a_hung_endpoint_costs_its_share_of_the_time_and_is_put_out(over: LinkTransport) {
    let hung = Server::bind().await;
    let (good, better) = (Server::bind().await.echo(b"good"), Server::bind().await.echo(b"good"));
    let (gateways, _) = linked(over, &[("east", &[]), ("west", &[hung.address, good, better])]).await;
    let heard = tokio::spawn(async move {
        let mut tcp = hung.accept().await;
        let mut heard = Vec::new();
        let end = tcp.read_to_end(&mut heard).await;
        (heard, end.is_err(), hung)
    });
    let core = gateways[1].core().await;
    let began = Instant::now();
    let mut connections = 0;
    while core.metrics.ejected() == 0 {
        let mut client = knock(gateways[0].auto, &sni(None)).await;
        assert_eq!(read(&mut client, 4).await, b"good");
        connections += 1;
        assert!(connections < 200, "it is never put out");
    }
    let near = gateways[0].core().await;
    assert_eq!(near.metrics.attempted(&cluster("west"), "accepted"), connections, "no attempt was lost");
    assert!(began.elapsed() < Duration::from_secs(5), "two shares, and a little for the others: {:?}", began.elapsed());
    let (heard, reset, _hung) = heard.await.unwrap();
    assert_eq!(heard.len(), hello(&sni(None)).len(), "the hello and nothing else");
    assert!(reset, "it is told that nobody waits for its answer");
}

async fn where_all_endpoints_hang_the_connection_goes_elsewhere_and_none_is_put_out(over: LinkTransport) {
    let hung = [Server::bind().await, Server::bind().await, Server::bind().await];
    let addresses = [hung[0].address, hung[1].address, hung[2].address];
    let west = Server::bind().await.echo(b"west");
    let (gateways, _) = linked(over, &[("east", &[]), ("central", &addresses), ("west", &[west])]).await;
    for _ in 0..2 {
        let began = Instant::now();
        let mut client = knock(gateways[0].auto, &sni(None)).await;
        assert_eq!(read(&mut client, 4).await, b"west");
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    }
    let metrics = &gateways[0].core().await.metrics;
    // Whether the far gateway's word still comes in time depends on how busy this machine is; if not, its other link is tried.
    let ends = ["rejected_timeout", "silent"].map(|end| metrics.attempted(&cluster("central"), end));
    assert!((2..=4).contains(&ends.iter().sum::<u64>()), "{ends:?}");
    assert_eq!(gateways[1].core().await.metrics.ejected(), 0);
    assert_eq!(gateways[0].eligibility("central").as_deref(), Some("ready"));
}

async fn a_brown_out_is_amplified_by_the_budget_at_most(over: LinkTransport) {
    const CONNECTIONS: usize = 20;
    let asked = Arc::default();
    let mut endpoints = Vec::new();
    for _ in 0..3 {
        endpoints.push(slow(ms(600), Arc::clone(&asked)).await);
    }
    let tenth = |config: &mut crate::Config| {
        config.tunnel.transport = over;
        config.ingress.replay_percent = 10;
        config.ingress.replay_floor_per_second = 0;
    };
    let (gateways, _) = linked_with(tenth, &[("east", &[]), ("west", &endpoints)]).await;
    let mut clients = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let auto = gateways[0].auto;
        clients.spawn(async move {
            let mut client = knock(auto, &sni(None)).await;
            read(&mut client, 4).await
        });
    }
    assert!(clients.join_all().await.iter().all(|word| word == b"late"));
    let far = gateways[1].core().await;
    until("the rest had no leave", || far.metrics.rejected("hedge_budget") > 0).await;
    let asked = asked.load(Ordering::Relaxed);
    assert!((CONNECTIONS + 1..=CONNECTIONS + 2).contains(&asked), "{asked} hellos for {CONNECTIONS} connections");
    assert_eq!(far.metrics.ejected(), 0);
}
