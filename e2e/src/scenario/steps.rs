//! The story's steps, each with its checks. A check that does not hold ends the story with what was seen instead.
#![expect(clippy::indexing_slicing, reason = "serde_json's indexing by name answers null where nothing is")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use isthmus_identity::svid::Svid;
use tokio::time::sleep;

use super::{
    ledger::Window,
    noticed,
    report::Report,
    stage::{CLUSTERS, HOLD_DOWN, Part, Stage},
};
use crate::{
    federation::process::http_get,
    federation::{START_DEADLINE, workload_id},
    intruder,
    samples::Span,
    shop::{
        load::Kind,
        web::{Shop, ports},
    },
};

const CART: &str = "cart.shop.svc.clusterset.local";
/// How a TLS server says no to a client's certificate.
const ALERTS: &[&str] =
    &["fatal alert: CertificateUnknown", "fatal alert: CertificateRequired", "fatal alert: UnknownCA"];
const SERVICES: [&str; 3] = ["shop/cart", "shop/catalog", "shop/orders"];

pub(super) fn window(step: &'static str, what: &str, from_ms: u64, allowed: &[&'static str]) -> Window {
    let settles_on = allowed.last().copied().unwrap_or_default();
    Window { step, what: what.to_owned(), from_ms, to_ms: u64::MAX, allowed: allowed.to_vec(), settles_on }
}

/// 1. All consumers have applied the same revision.
pub async fn one_revision(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    report.step("1", "One revision everywhere");
    let deadline = Instant::now() + START_DEADLINE;
    // The services must be there first: until then "everyone is up to date" says nothing.
    loop {
        let services = stage.federation.ctl.json(&["get", "services"]).await?;
        let exported_everywhere =
            |name: &&str| {
                services.as_array().into_iter().flatten().any(|s| {
                    s["name"] == **name && s["exporters"].as_object().is_some_and(|e| e.len() == CLUSTERS.len())
                })
            };
        if SERVICES.iter().all(exported_everywhere) {
            break;
        }
        ensure!(Instant::now() < deadline, "not all clusters export {SERVICES:?}: {services:#}");
        sleep(Duration::from_millis(20)).await;
    }
    stage.federation.ctl.run(&["wait", "--timeout", "30s"]).await.context("wait for every consumer")?;
    let took = stage.manifests_written.elapsed();
    let status = stage.federation.ctl.json(&["status"]).await?;
    let stamp = &status["stamp"];
    let mut consumers = 0;
    for cluster in status["clusters"].as_array().context("status lists no clusters")? {
        for consumer in cluster["consumers"].as_array().into_iter().flatten() {
            ensure!(&consumer["applied"] == stamp, "{} is not at {stamp}", consumer);
            consumers += 1;
        }
    }
    // Each cluster: agent, two gateways, DNS, four sidecars.
    ensure!(consumers == CLUSTERS.len() * 8, "status lists {consumers} consumers, not {}", CLUSTERS.len() * 8);
    let text = format!(
        "{consumers} consumers in {} clusters applied revision {}, {} ms after the manifests were written",
        CLUSTERS.len(),
        stamp["revision"],
        took.as_millis()
    );
    report.good(&text);
    report.checked("1", &format!("{consumers} consumers at {} in {} ms", stamp["revision"], took.as_millis()));
    links(stage, report).await
}

/// Every gateway says of every one of another cluster that it reaches it, and over what.
async fn links(stage: &Stage, report: &Report) -> anyhow::Result<()> {
    const GATEWAYS: usize = 2;
    let wanted = CLUSTERS.len() * GATEWAYS * (CLUSTERS.len() - 1) * GATEWAYS;
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        let status = stage.federation.ctl.json(&["status"]).await?;
        let links =
            status["clusters"].as_array().into_iter().flatten().filter_map(|c| c["tunnels"].as_array()).flatten();
        let up: Vec<_> = links.filter(|l| l["up"] == true).collect();
        let odd = up.iter().find(|l| l["transport"] != "quic" || l["downgraded"] != false);
        ensure!(odd.is_none(), "a link does not run over QUIC here, where nothing hinders it: {odd:?}");
        if up.len() == wanted {
            report
                .good(&format!("{wanted} links between gateways are up, all over QUIC, as `isthmusctl status` shows"));
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{} of {wanted} links between gateways are up: {status:#}", up.len());
        sleep(Duration::from_millis(50)).await;
    }
}

/// 2. DNS answers with each cluster's own VIP; NXDOMAIN and NODATA are told apart.
pub async fn names(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    report.step("2", "Global names");
    for (name, _) in CLUSTERS {
        let layout = stage.federation.cluster(name)?.layout.clone();
        let (status, answers) = stage.dig(layout.dns, CART, "A").await?;
        let [vip] = answers.as_slice() else { bail!("{name}: {CART} has {answers:?} ({status})") };
        ensure!(vip.starts_with(&layout.vip_prefix()), "{name}: {vip} is not in {}0.0/16", layout.vip_prefix());
        let (unknown, none) = stage.dig(layout.dns, "nobody.shop.svc.clusterset.local", "A").await?;
        ensure!(unknown == "NXDOMAIN" && none.is_empty(), "{name}: an unknown name is {unknown} {none:?}");
        let (nodata, none) = stage.dig(layout.dns, CART, "AAAA").await?;
        ensure!(nodata == "NOERROR" && none.is_empty(), "{name}: AAAA of a known name is {nodata} {none:?}");
        stage.vips.insert(name.to_owned(), vip.clone());
        report.good(&format!("{name:<10} {CART} A {vip}; unknown name {unknown}; no AAAA: NODATA"));
    }
    report.checked("2", "dig: own VIPs, NXDOMAIN, NODATA");
    Ok(())
}

/// 3. Near while near is healthy.
pub async fn near(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    report.step("3", "Near while near is healthy");
    // Before load: every workload reachable over each protocol.
    let shop = Shop::new(stage.federation.cluster("us-east")?.layout.dns)?;
    let deadline = Instant::now() + START_DEADLINE;
    let lookup = loop {
        match shop.lookup(ports::CATALOG_GRPC, "tea").await {
            Ok(lookup) => break lookup,
            Err(e) if Instant::now() > deadline => return Err(e.context("gRPC to catalog")),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    };
    let web = workload_id("us-east", "web");
    ensure!(lookup.caller == web, "catalog saw {:?} over gRPC, not {web}", lookup.caller);
    report.good(&format!("gRPC: catalog in {} answered {}", lookup.cluster, lookup.caller));
    report.doing("load from web in us-east: 250 GET/s to cart, 10 orders sessions/s");
    stage.load.start()?;
    // The first requests open connections; the window starts when the load is steady.
    let warm = isthmus_runtime::now();
    let deadline = Instant::now() + START_DEADLINE;
    while stage.samples.latest(Kind::Http, 50, warm)?.len() < 50 {
        ensure!(stage.load.is_running(), "the load generator ended; {}", stage.load.tail());
        ensure!(Instant::now() < deadline, "the load does not start; {}", stage.load.tail());
        sleep(Duration::from_millis(20)).await;
    }
    let from = isthmus_runtime::now();
    hold(Duration::from_secs(3)).await;
    stage.settle(report, window("3", "steady load from us-east", from, &["us-east"])).await?;
    let sum = stage.samples.summary(&[Kind::Http], Span::since(from))?;
    report.note(&format!("GET cart: p50 {:.1} ms, p99 {:.1} ms", ms(sum.p50_micros), ms(sum.p99_micros)));
    Ok(())
}

/// 4. The apps in us-east die; us-west takes over, eu-central gets nothing.
pub async fn apps_killed(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    report.step("4", "cart and orders in us-east are killed");
    let at = stage.kill(&[("us-east", Part::App("cart")), ("us-east", Part::App("orders"))]).await?;
    stage.settle(report, window("4", "cart, orders of us-east killed", at, &["us-east", "us-west"])).await
}

/// 5. us-west loses one gateway, then the other.
pub async fn gateways_killed(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    report.step("5", "us-west loses its gateways, kill -9");
    report.doing("gateway-1");
    let at = stage.kill(&[("us-west", Part::Gateway("gateway-1"))]).await?;
    stage.settle(report, window("5a", "one gateway of us-west killed", at, &["us-west"])).await?;
    report.doing("gateway-2");
    let at = stage.kill(&[("us-west", Part::Gateway("gateway-2"))]).await?;
    stage.settle(report, window("5b", "both gateways of us-west killed", at, &["us-west", "eu-central"])).await
}

/// 6. No control plane: nothing changes, restarts serve from disk, failover works both ways, of endpoints and of gateways.
pub async fn control_plane_gone(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    report.step("6", "No control plane");
    report.doing("stopped");
    let at = isthmus_runtime::now();
    stage.federation.control_plane.terminate();
    stage.federation.control_plane.wait(Duration::from_secs(20)).await?;
    hold(Duration::from_secs(1)).await;
    stage.settle(report, window("6a", "control plane stopped", at, &["eu-central"])).await?;

    report.doing("agent, gateway-1 and DNS of us-east: kill -9, start from last-known-good");
    let east = [("us-east", Part::Agent), ("us-east", Part::Gateway("gateway-1")), ("us-east", Part::Dns)];
    let at = stage.kill(&east).await?;
    stage.revive(&east).await?;
    let dns = stage.federation.cluster("us-east")?.layout.dns;
    let (status, answers) = stage.dig(dns, CART, "A").await?;
    let vip = stage.vips.get("us-east").context("step 2 saw the VIP")?;
    ensure!(answers == std::slice::from_ref(vip), "restarted DNS answers {status} {answers:?}, not {vip}");
    stage.settle(report, window("6b", "agent, gateway, DNS restarted", at, &["eu-central"])).await?;

    report.doing("us-west's gateways start again");
    let west = [("us-west", Part::Gateway("gateway-1")), ("us-west", Part::Gateway("gateway-2"))];
    let at = isthmus_runtime::now();
    stage.revive(&west).await?;
    stage.settle(report, window("6c", "us-west back, no control plane", at, &["eu-central", "us-west"])).await?;
    noticed::endpoints(stage, report).await?;
    report.doing("us-west's gateways are killed again");
    let at = stage.kill(&west).await?;
    stage.settle(report, window("6g", "us-west lost, no control plane", at, &["us-west", "eu-central"])).await
}

/// 7. All comes back; traffic returns after the hold-down.
pub async fn all_back(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    report.step("7", "All comes back");
    let at = isthmus_runtime::now();
    stage.federation.control_plane.start()?;
    stage
        .revive(&[
            ("us-west", Part::Gateway("gateway-1")),
            ("us-west", Part::Gateway("gateway-2")),
            ("us-east", Part::App("cart")),
            ("us-east", Part::App("orders")),
        ])
        .await?;
    stage.federation.control_plane.ready(START_DEADLINE).await?;
    let window = window("7", "all back, after the hold-down", at, &["eu-central", "us-west", "us-east"]);
    stage.settle(report, window).await?;
    let first = stage.samples.since(Kind::Http, at)?.find(|s| s.cluster.as_deref() == Some("us-east"));
    let waited = first.context("no request reached us-east")?.start_ms.saturating_sub(at);
    ensure!(u128::from(waited) >= HOLD_DOWN.as_millis(), "us-east served after {waited} ms: before the hold-down");
    report.good(&format!(
        "us-east served again {waited} ms after its apps started (hold-down {} ms)",
        HOLD_DOWN.as_millis()
    ));
    stage.federation.ctl.run(&["wait", "--timeout", "30s"]).await.context("all consumers catch up")?;
    Ok(())
}

/// 8. Identity: who called is known; strangers get nothing.
pub async fn strangers(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    report.step("8", "Friends and strangers");
    let web = workload_id("us-east", "web");
    let sum = stage.samples.summary(&[Kind::Http], Span::since(0))?;
    let others: Vec<_> = sum.callers.keys().filter(|c| **c != web).collect();
    ensure!(sum.callers.contains_key(&web) && others.is_empty(), "cart saw callers {:?}", sum.callers);
    report
        .good(&format!("in all {} answers, whatever the cluster, cart saw {web}", sum.callers.values().sum::<usize>()));

    let east = stage.federation.cluster("us-east")?;
    let cart = SocketAddr::new(east.workload("cart")?.layout.ip, ports::CART);
    let first = east.layout.gateways.first().context("us-east has gateways")?;
    let (gateway, health) = (first.tunnel, first.health);
    let credentials = Svid::load(&east.dir.join("web-1"), "workload")?.context("web's certificate")?;
    let friend = intruder::knock(cart, Some(&credentials)).await.context("web's own certificate must open the door")?;
    ensure!(friend.contains("200"), "with web's certificate cart's port says {friend:?}");
    report.good(&format!("cart's mTLS port, with web's certificate: {friend}"));
    let forged = intruder::forged("spiffe://elsewhere.example/ns/shop/sa/web")?;
    report.good(&refused(
        "cart's mTLS port, certificate of a foreign trust domain",
        ALERTS,
        intruder::knock(cart, Some(&forged)).await,
    )?);
    let forged = intruder::forged(&web)?;
    report.good(&refused(
        "cart's mTLS port, web's name signed by another CA",
        ALERTS,
        intruder::knock(cart, Some(&forged)).await,
    )?);
    report.good(&refused("cart's mTLS port, no certificate", ALERTS, intruder::knock(cart, None).await)?);
    report.checked("8", "callers known; strangers refused");

    let sni = "8080.cart.shop.svc.us-east.isthmus.example";
    let forged = intruder::forged("spiffe://isthmus.example/cluster/never-joined/gateway")?;
    report.good(&refused(
        "tunnel, gateway of a cluster that never joined",
        &["invalid peer certificate"],
        intruder::tunnel(gateway, &forged, sni).await,
    )?);
    report.doing("ap-south joins, is served, and is revoked");
    let layout = stage.federation.layout("ap-south", 4, "ap");
    let south = stage.federation.join(layout).await?;
    let credentials = Svid::load(&south.dir.join("gateway-1"), "gateway")?.context("its gateway's certificate")?;
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        match intruder::tunnel(gateway, &credentials, sni).await {
            Ok(reply) if reply == "accept" => break,
            other if Instant::now() > deadline => bail!("a joined cluster's gateway got {other:?}"),
            _ => sleep(Duration::from_millis(20)).await,
        }
    }
    report.good("tunnel, gateway of ap-south while a member: accept");
    stage.federation.ctl.run(&["cluster", "revoke", "ap-south", "--yes"]).await?;
    let revoked = Instant::now();
    let last = loop {
        let answer = intruder::tunnel(gateway, &credentials, sni).await;
        match answer {
            Ok(reply) if reply == "accept" => {
                ensure!(revoked.elapsed() < Duration::from_secs(1), "still served 1 s after its revocation");
            }
            // A link that came up just before has its streams refused; then no link comes up any more.
            Ok(reply) if reply.starts_with("reject: Forbidden") => {
                ensure!(revoked.elapsed() < Duration::from_secs(2), "still linked 2 s after its revocation");
            }
            other => {
                break refused(
                    "tunnel, gateway of ap-south once revoked",
                    &["peer_revoked", "peer_not_a_member"],
                    other,
                )?;
            }
        }
    };
    report.good(&last);
    let took = revoked.elapsed().as_millis();
    let closed = tunnels_closed(health, "ap-south", revoked).await?;
    report.good(&format!("us-east's own tunnels to ap-south were closed {closed} ms after the revocation"));
    let west = stage.federation.cluster("us-west")?;
    let credentials = Svid::load(&west.dir.join("gateway-1"), "gateway")?.context("us-west's certificate")?;
    let member = intruder::tunnel(gateway, &credentials, sni).await.context("a member must go on being served")?;
    ensure!(member == "accept", "a member's gateway got {member:?} after the revocation of another");
    report.good("tunnel, gateway of us-west, still a member: accept");
    report.checked("8", &format!("revoked gateway refused in {took} ms"));
    Ok(())
}

/// The attempt must have been refused, with these words: a peer that is dead or silent refuses nobody. Says how.
fn refused(what: &str, words: &[&str], attempt: anyhow::Result<String>) -> anyhow::Result<String> {
    let said = match attempt {
        Ok(answer) => bail!("{what}: got {answer:?}"),
        Err(e) => format!("{e:#}"),
    };
    ensure!(words.iter().any(|w| said.contains(w)), "{what}: not refused, but failed: {said}");
    Ok(format!("{what}: refused ({said})"))
}

/// Waits until a gateway has no tunnel to `cluster` left.
async fn tunnels_closed(health: SocketAddr, cluster: &str, since: Instant) -> anyhow::Result<u128> {
    loop {
        let (_, body) = http_get(health, "/debug/tunnels").await?;
        let tunnels: Vec<serde_json::Value> = serde_json::from_str(&body).context("read /debug/tunnels")?;
        if !tunnels.iter().any(|t| t["cluster"] == cluster && t["up"] == true) {
            return Ok(since.elapsed().as_millis());
        }
        ensure!(since.elapsed() < Duration::from_secs(1), "tunnels to {cluster} outlive its revocation by a second");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Lets the load run for a while: the one thing here that waits for time and not for a condition, because "nothing
/// changes" has no event to wait for.
async fn hold(time: Duration) {
    sleep(time).await;
}

fn ms(micros: u64) -> f64 {
    std::time::Duration::from_micros(micros).as_secs_f64() * 1000.0
}
