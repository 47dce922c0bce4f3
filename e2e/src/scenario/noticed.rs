//! Endpoints of one cluster change; who in another notices, and how fast: its Envoy, its gateways and its DNS server.
//!
//! Each is asked itself, over and over, side by side: Envoy for the hosts it balances over, the gateways for their
//! candidates, the DNS server for what it says of failover. All should follow within [`WITHIN`]; one that takes longer is
//! shown with its time, and does not hold.
#![expect(clippy::indexing_slicing, reason = "serde_json's indexing by name answers null where nothing is")]

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::{task::JoinSet, time::sleep};

use super::{
    report::Report,
    stage::{Part, Stage, dig},
    steps::window,
};
use crate::{
    federation::{layout::SIDECAR_ADMIN, manifests, process::http_get},
    shop::web::ports,
};

/// From the change to the last who acts on it.
const WITHIN: Duration = Duration::from_secs(1);
/// Who has not followed by then never will.
const GIVE_UP: Duration = Duration::from_secs(10);
/// Between two questions to one consumer.
const PAUSE: Duration = Duration::from_millis(5);

/// The part of step 6 in which single endpoints of us-west change, while no control plane runs and us-west serves us-east.
pub async fn endpoints(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    ensure!(!stage.federation.control_plane.is_running(), "the control plane runs, so that this would prove nothing");
    let catalog = Watch::new(stage, "us-east", "us-west", "catalog", ports::CATALOG).await?;
    catalog.all_say(Serves::Yes, Instant::now()).await.context("before anything happens")?;
    report.doing("us-west's catalog turns unready, and ready again");
    let west = stage.federation.cluster("us-west")?;
    let (folder, ready) = (west.manifests(), manifests::service(&west.workload("catalog")?.layout));
    let unready = ready.replace("ready: true", "ready: false");
    ensure!(unready != ready, "the manifest of catalog says nothing of readiness");
    for (text, serves, what) in
        [(&unready, Serves::No, "us-west's catalog unready"), (&ready, Serves::Yes, "us-west's catalog ready again")]
    {
        let since = Instant::now();
        manifests::replace(&folder, "catalog.yaml", text)?;
        let noticed = catalog.all_say(serves, since).await.context(what)?;
        noticed.tell(report, "6d", what);
    }

    let cart = Watch::new(stage, "us-east", "us-west", "cart", ports::CART).await?;
    cart.all_say(Serves::Yes, Instant::now()).await.context("before anything happens")?;
    report.doing("us-west's cart and orders die, and start again");
    let apps = [("us-west", Part::App("cart")), ("us-west", Part::App("orders"))];
    let since = Instant::now();
    let at = stage.kill(&apps).await?;
    let gone = cart.all_say(Serves::No, since).await.context("us-west's cart died")?;
    gone.tell(report, "6e", "us-west's cart died");
    let lost = window("6e", "us-west's apps killed, no control plane", at, &["us-west", "eu-central"]);
    stage.settle(report, lost).await?;
    let at = isthmus_runtime::now();
    let since = Instant::now();
    stage.revive(&apps).await?;
    let back = cart.all_say(Serves::Yes, since).await.context("us-west's cart started again")?;
    back.tell(report, "6f", "us-west's cart back");
    let window = window("6f", "us-west's apps back, no control plane", at, &["eu-central", "us-west"]);
    stage.settle(report, window).await
}

/// Whether a cluster can serve, as others should see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Serves {
    Yes,
    No,
}

/// One that acts on it.
#[derive(Clone, Debug)]
enum Consumer {
    /// By its admin page.
    Envoy(SocketAddr),
    /// Name and health server.
    Gateway(String, SocketAddr),
    /// By its DNS address.
    Dns(SocketAddr),
}

/// Whom to ask in one cluster about a service of another.
#[derive(Clone)]
struct Watch {
    consumers: Vec<Consumer>,
    /// Where the other cluster's traffic enters the local gateways: Envoy's hosts for it.
    pinned: Vec<String>,
    service: &'static str,
    port: u16,
    observed: &'static str,
}

/// Who noticed, and after how long.
struct Noticed(Vec<(String, Duration)>);

impl Watch {
    async fn new(
        stage: &mut Stage,
        observer: &str,
        observed: &'static str,
        service: &'static str,
        port: u16,
    ) -> anyhow::Result<Self> {
        let cluster = stage.federation.cluster(observer)?;
        let web = SocketAddr::new(cluster.workload("web")?.layout.ip, SIDECAR_ADMIN);
        let (mut consumers, mut pinned) = (vec![Consumer::Envoy(web)], Vec::new());
        for gateway in &cluster.layout.gateways {
            let (_, body) = http_get(gateway.health, "/debug/listeners").await?;
            let listeners: Value = serde_json::from_str(&body).context("read /debug/listeners")?;
            let at = listeners[observed].as_str();
            pinned.push(at.with_context(|| format!("{} has no port for {observed}: {body}", gateway.name))?.to_owned());
            consumers.push(Consumer::Gateway(gateway.name.clone(), gateway.health));
        }
        consumers.push(Consumer::Dns(cluster.layout.dns));
        Ok(Self { consumers, pinned, service, port, observed })
    }

    /// Waits until everyone says so; how long each took since the change.
    async fn all_say(&self, wanted: Serves, since: Instant) -> anyhow::Result<Noticed> {
        let mut asking = JoinSet::new();
        for (place, consumer) in self.consumers.iter().cloned().enumerate() {
            let watch = self.clone();
            asking.spawn(async move { (place, watch.time(&consumer, wanted, since).await) });
        }
        let mut all = BTreeMap::new();
        while let Some(answer) = asking.join_next().await {
            let (place, took) = answer.context("ask a consumer")?;
            all.insert(place, took?);
        }
        Ok(Noticed(self.consumers.iter().map(Consumer::name).zip(all.into_values()).collect()))
    }

    /// Asks one until it says what is wanted.
    async fn time(&self, consumer: &Consumer, wanted: Serves, since: Instant) -> anyhow::Result<Duration> {
        let (who, what) = (consumer.name(), format!("{} in {}", self.service, self.observed));
        loop {
            let asked = match consumer {
                Consumer::Envoy(admin) => self.envoy(*admin).await,
                Consumer::Gateway(_, health) => self.gateway(*health).await,
                Consumer::Dns(at) => self.dns(*at).await,
            };
            let (says, words) = asked.with_context(|| format!("ask {who}"))?;
            let took = since.elapsed();
            if says == Some(wanted) {
                return Ok(took);
            }
            ensure!(took < GIVE_UP, "{who} has not noticed within {GIVE_UP:?} that {what} changed: {words}");
            sleep(PAUSE).await;
        }
    }

    /// Envoy balances over the gateways' ports for the cluster, all or none of them; in between it has not followed yet.
    async fn envoy(&self, admin: SocketAddr) -> anyhow::Result<(Option<Serves>, String)> {
        let (code, body) = http_get(admin, "/clusters").await?;
        let name = format!("outbound|{}|shop/{}::", self.port, self.service);
        let hosts = || body.lines().filter_map(|line| line.strip_prefix(&name));
        ensure!(code == 200 && hosts().next().is_some(), "Envoy knows no cluster {name}");
        let has = |at: &String| hosts().any(|host| host.strip_prefix(at.as_str()).is_some_and(|r| r.starts_with("::")));
        let there = self.pinned.iter().filter(|at| has(at)).count();
        let says = match there {
            0 => Some(Serves::No),
            n if n == self.pinned.len() => Some(Serves::Yes),
            _ => None,
        };
        Ok((says, format!("it has {there} of {:?}", self.pinned)))
    }

    /// The gateway would send new connections there.
    async fn gateway(&self, health: SocketAddr) -> anyhow::Result<(Option<Serves>, String)> {
        let path = format!("/debug/candidates?service=shop/{}&port={}", self.service, self.port);
        let (_, body) = http_get(health, &path).await?;
        let candidates: Value = serde_json::from_str(&body).context("read /debug/candidates")?;
        let mut all = candidates.as_array().into_iter().flatten();
        let candidate = all.find(|c| c["cluster"] == self.observed).context("the cluster is no candidate")?;
        let says = match candidate["eligibility"]["state"].as_str() {
            Some("ready" | "holdDown") => Some(Serves::Yes),
            Some("noEndpoints") => Some(Serves::No),
            _ => None,
        };
        Ok((says, candidate.to_string()))
    }

    /// The DNS server names it as a place to go.
    async fn dns(&self, at: SocketAddr) -> anyhow::Result<(Option<Serves>, String)> {
        let name = format!("_failover.{}.shop.svc.clusterset.local", self.service);
        let (status, answers) = dig(at, &name, "TXT").await?;
        let answers = answers.join(" ");
        // For example "2 us-west ready: same region us, 1 of 1 endpoints ready".
        let state = answers.split('"').find_map(|line| {
            let mut words = line.split([' ', ':']).skip(1);
            (words.next() == Some(self.observed)).then(|| words.next().unwrap_or_default())
        });
        let state = state.with_context(|| format!("{name} does not mention {}: {status} {answers}", self.observed))?;
        let says = match state {
            "ready" | "hold-down" => Some(Serves::Yes),
            "no-endpoints" => Some(Serves::No),
            _ => None,
        };
        Ok((says, answers))
    }
}

impl Consumer {
    fn name(&self) -> String {
        match self {
            Self::Envoy(_) => "Envoy".to_owned(),
            Self::Gateway(name, _) => name.clone(),
            Self::Dns(_) => "DNS".to_owned(),
        }
    }
}

impl Noticed {
    /// A line now, and one in the closing table: it held if nobody took longer than allowed.
    fn tell(&self, report: &mut Report, step: &str, what: &str) {
        let held = self.0.iter().all(|(_, took)| *took <= WITHIN);
        let text = format!("{what}: noticed in us-east by {self}");
        if held {
            report.good(&text)
        } else {
            report.note(&format!("{text}: not all within {WITHIN:?}"))
        }
        let slowest = self.0.iter().map(|(_, took)| took.as_millis()).max().unwrap_or_default();
        report.judged(step, &format!("{what}: in {slowest} ms"), held);
    }
}

impl fmt::Display for Noticed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (who, took)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{who} {} ms", took.as_millis())?;
        }
        Ok(())
    }
}
