//! Clusters' agents: they join with a token, publish changing exports, and follow the federation's state from node to node;
//! and what must hold of all that they and the nodes show, whatever happens meanwhile ([`Shown`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use isthmus_api::{
    convert::snapshot_digest,
    proto::{
        common::v1 as common,
        federation::v1::{
            self as pb, AgentMessage, JoinRequest, agent_message, control_message, federation_client::FederationClient,
        },
    },
};
use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    grpc::connect_lazy,
    keys::KeyPair,
    svid::Svid,
    tls::{IdentitySource, client_config, pinned_client_config},
    token::Token,
};
use isthmus_model::{
    global::{GlobalDelta, GlobalSnapshot},
    ids::Stamp,
};
use prost::Message as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rustls::pki_types::CertificateDer;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

const CALL: Duration = Duration::from_secs(8);
/// For an agent to be served when there are no faults any more.
const HEALED: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);
/// Services that agents export now and then.
const SERVICES: u32 = 12;

/// All that anybody was shown of the federation's state, as far as it must never change.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shown(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    services: Indexes,
    clusters: Indexes,
    digests: BTreeMap<Stamp, [u8; 32]>,
    contradictions: BTreeSet<String>,
    states: u64,
}

/// Numbers of names: they never move, and no two names share one.
#[derive(Debug, Default)]
struct Indexes {
    numbers: BTreeMap<String, u32>,
    owners: BTreeMap<u32, String>,
}

impl Indexes {
    fn see(&mut self, name: &str, number: u32) -> Option<String> {
        let held = *self.numbers.entry(name.to_owned()).or_insert(number);
        let owner = self.owners.entry(number).or_insert_with(|| name.to_owned());
        match () {
            () if held != number => Some(format!("the index of {name} moved from {held} to {number}")),
            () if owner != name => Some(format!("{owner} and {name} share the index {number}")),
            () => None,
        }
    }
}

impl Shown {
    /// `by` was shown `state`.
    pub(crate) fn see(&self, by: &str, state: &GlobalSnapshot) {
        let digest = snapshot_digest(state);
        let mut guard = self.0.lock().unwrap();
        let seen = &mut *guard;
        seen.states += 1;
        let services = state.services.values().filter_map(|s| seen.services.see(&s.name.to_string(), s.index.0));
        let clusters = state.clusters.values().filter_map(|c| seen.clusters.see(c.name.as_str(), u32::from(c.index.0)));
        let mut found: Vec<String> = services.chain(clusters).collect();
        found.extend(state.check().err().map(|error| error.to_string()));
        if *seen.digests.entry(state.stamp).or_insert(digest) != digest {
            found.push(format!("there are two states {}", state.stamp));
        }
        seen.contradictions.extend(found.into_iter().map(|what| format!("{by}: {what}")));
    }

    fn wrong(&self, by: &str, what: String) {
        self.0.lock().unwrap().contradictions.insert(format!("{by}: {what}"));
    }

    /// What contradicts what, how many states were seen, and how many services had a number.
    pub(crate) fn result(&self) -> (Vec<String>, u64, usize) {
        let seen = self.0.lock().unwrap();
        (seen.contradictions.iter().cloned().collect(), seen.states, seen.services.numbers.len())
    }
}

/// One cluster's agent.
pub(crate) struct Agent {
    cluster: String,
    nodes: Vec<SocketAddr>,
    ca: CertificateAuthority,
    /// The roots of the nodes, as the state says.
    trust: TrustStore,
    client: Vec<FederationClient<Channel>>,
    shown: Shown,
    rng: StdRng,
    /// What it holds of the federation's state.
    held: Option<GlobalSnapshot>,
    exports: BTreeSet<u32>,
    /// Of its publications that were acknowledged.
    pub(crate) published: u64,
}

impl Agent {
    /// Joins with `token`, at the node that minted it.
    pub(crate) async fn join(
        cluster: &str,
        token: &str,
        nodes: Vec<SocketAddr>,
        (shown, seed): (Shown, u64),
    ) -> anyhow::Result<Self> {
        let ca = CertificateAuthority::create(&format!("{cluster}.example").parse()?, Duration::from_secs(86_400))?;
        let key = KeyPair::generate()?;
        let token = Token::parse(token)?;
        let (tls, _root) = pinned_client_config(token.ca_pin, Arc::new(|_| true))?;
        let request = JoinRequest {
            secret: token.secret.clone(),
            cluster: cluster.to_owned(),
            locality: Some(common::Locality { region: "us".to_owned(), zone: "us-1".to_owned() }),
            bundle: Some((&ca.bundle()).into()),
            csr: key.csr_der()?,
        };
        let mut client = FederationClient::new(connect_lazy(&token.address, Arc::new(tls)));
        let answer = timeout(CALL, client.join(request)).await.context("no answer in time")??.into_inner();
        let chain: Vec<CertificateDer<'static>> =
            answer.certificate_chain.into_iter().map(CertificateDer::from).collect();
        let bundle = isthmus_model::service::TrustBundle::try_from(answer.federation_bundle.context("no bundle")?)?;
        let roots = isthmus_identity::bundle::BundleDocument::parse(&bundle.document)?.x509_roots;
        let trust = TrustStore::new();
        trust.set([(bundle.trust_domain, roots)].into());
        let follows = trust.clone();
        let source = IdentitySource::new(Svid::new(chain, &key)?);
        let client = nodes.iter().map(|node| {
            let tls = client_config(Some(&source), &trust, Arc::new(|_| true), &[b"h2"])?;
            anyhow::Ok(FederationClient::new(connect_lazy(&node.to_string(), Arc::new(tls))))
        });
        Ok(Self {
            cluster: cluster.to_owned(),
            client: client.collect::<Result<_, _>>()?,
            nodes,
            ca,
            trust: follows,
            shown,
            rng: StdRng::seed_from_u64(seed),
            held: None,
            exports: BTreeSet::from([0]),
            published: 0,
        })
    }

    /// Publishes and follows, at nodes by chance, until told to stop; then once more, until it is acknowledged.
    pub(crate) async fn run(mut self, stop: Arc<AtomicBool>, failures: Arc<AtomicU64>) -> Self {
        let mut deadline = None;
        loop {
            let last = stop.load(Ordering::Relaxed);
            if last {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + HEALED);
                assert!(Instant::now() < deadline, "{} could not publish when all was well again", self.cluster);
            }
            let before = self.published;
            let nth = self.rng.random_range(0..self.client.len());
            for _ in 0..self.rng.random_range(0..3) {
                let service = self.rng.random_range(0..SERVICES);
                if !self.exports.remove(&service) {
                    self.exports.insert(service);
                }
            }
            let long = Duration::from_millis(self.rng.random_range(100..3_000));
            let session = self.session(nth, long).await;
            if session.is_err() {
                failures.fetch_add(1, Ordering::Relaxed);
                sleep(PAUSE).await;
            }
            if last && self.published > before {
                return self;
            }
        }
    }

    /// The names of what it exports.
    pub(crate) fn exports(&self) -> BTreeSet<String> {
        self.exports.iter().map(|n| format!("shop/s{n}")).collect()
    }

    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// One session: publish, then follow for so `long`.
    async fn session(&mut self, nth: usize, long: Duration) -> anyhow::Result<()> {
        let (up, messages) = mpsc::channel(8);
        let hello = pb::Hello {
            cluster: self.cluster.clone(),
            held: self.held.as_ref().map(|held| held.stamp.into()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            held_digest: self.held.as_ref().map(|held| snapshot_digest(held).to_vec()).unwrap_or_default(),
        };
        up.send(AgentMessage { kind: Some(agent_message::Kind::Hello(hello)) }).await?;
        up.send(self.publish()).await?;
        let opened = self.client[nth].session(ReceiverStream::new(messages));
        let mut down = timeout(CALL, opened).await.context("no session in time")??.into_inner();
        let (until, answered) = (Instant::now() + long, Instant::now() + CALL);
        let mut acknowledged = false;
        loop {
            let deadline = if acknowledged { until } else { answered };
            let message = match timeout_at(deadline, down.message()).await {
                Ok(message) => message?.context("the session ended")?,
                Err(_) if acknowledged => return Ok(()),
                Err(_) => bail!("no answer to the publication in time"),
            };
            match message.kind {
                Some(control_message::Kind::Published(_)) => {
                    acknowledged = true;
                    self.published += 1;
                }
                Some(control_message::Kind::Refused(refused)) => {
                    let what = format!("its publication was refused by {}: {}", self.nodes[nth], refused.reason);
                    self.shown.wrong(&self.cluster, what);
                    bail!("refused");
                }
                Some(control_message::Kind::Snapshot(bytes)) => {
                    self.take(GlobalSnapshot::try_from(common::GlobalSnapshot::decode(bytes)?)?);
                }
                Some(control_message::Kind::Delta(bytes)) => {
                    let delta = GlobalDelta::try_from(common::GlobalDelta::decode(bytes)?)?;
                    let mut next = self.held.clone().context("a delta before any snapshot")?;
                    if let Err(gap) = next.apply(delta) {
                        self.shown.wrong(&self.cluster, gap.to_string());
                        bail!("a gap");
                    }
                    self.take(next);
                }
                Some(control_message::Kind::Piece(_)) => bail!("these states are too small for pieces"),
                Some(control_message::Kind::Nodes(_) | control_message::Kind::Conditions(_)) | None => {}
            }
        }
    }

    fn take(&mut self, next: GlobalSnapshot) {
        if let Some(held) = self.held.as_ref().filter(|held| held.stamp > next.stamp) {
            self.shown.wrong(&self.cluster, format!("it held {} and was given {}", held.stamp, next.stamp));
        }
        self.shown.see(&self.cluster, &next);
        if let Ok(bundle) = isthmus_identity::bundle::BundleDocument::parse(&next.federation_bundle.document) {
            self.trust.set([(next.federation.clone(), bundle.x509_roots)].into());
        }
        self.held = Some(next);
    }

    fn publish(&self) -> AgentMessage {
        let export = |number: &u32| pb::Export {
            service: Some(common::ServiceName { namespace: "shop".to_owned(), name: format!("s{number}") }),
            created_at_unix_ms: 1,
            kind: common::ServiceKind::ClusterSetIp.into(),
            ports: vec![common::ServicePort {
                name: String::new(),
                number: 80,
                protocol: common::AppProtocol::Http.into(),
            }],
            identities: vec![format!("spiffe://{}.example/ns/shop/sa/s{number}", self.cluster)],
        };
        let gateway = common::GatewayAddress { name: "gateway-1".to_owned(), tunnel: "198.18.99.1:15443".to_owned() };
        let publication = pb::Publication {
            exports: self.exports.iter().map(export).collect(),
            gateways: vec![gateway],
            bundle: Some((&self.ca.bundle()).into()),
        };
        // One agent, whatever node it goes to.
        let publish = pb::Publish { sequence: 1, publication: Some(publication), incarnation: vec![7; 16] };
        AgentMessage { kind: Some(agent_message::Kind::Publish(publish)) }
    }
}

/// What `state` shows of the exports of `cluster`.
pub(crate) fn exports_of(cluster: &str, state: &GlobalSnapshot) -> anyhow::Result<BTreeSet<String>> {
    ensure!(state.clusters.keys().any(|name| name.as_str() == cluster), "{cluster} is no member");
    let exported = |service: &&Arc<isthmus_model::global::GlobalService>| {
        service.exporters.keys().any(|exporter| exporter.as_str() == cluster)
    };
    Ok(state.services.values().filter(exported).map(|service| service.name.to_string()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(revision: u64) -> GlobalSnapshot {
        let federation: isthmus_model::ids::TrustDomain = "isthmus.example".parse().unwrap();
        let bundle = CertificateAuthority::create(&federation, Duration::from_secs(60)).unwrap().bundle();
        GlobalSnapshot {
            stamp: Stamp { epoch: isthmus_model::ids::Epoch(1), revision: isthmus_model::ids::Revision(revision) },
            federation,
            federation_bundle: bundle,
            settings: Default::default(),
            clusters: BTreeMap::new(),
            services: BTreeMap::new(),
        }
    }

    #[test]
    fn two_states_of_one_stamp_are_found() {
        let shown = Shown::default();
        let (one, other) = (state(1), state(1));
        for seen in [&one, &one, &state(2)] {
            shown.see("cp-1", seen);
        }
        assert_eq!(shown.result().0, Vec::<String>::new());
        shown.see("cp-2", &other);
        assert!(shown.result().0[0].contains("there are two states 1.1"), "{:?}", shown.result());
    }

    #[test]
    fn an_index_that_moves_or_is_shared_is_found() {
        let mut indexes = Indexes::default();
        assert_eq!(indexes.see("a", 1), None);
        assert_eq!(indexes.see("b", 2), None);
        assert_eq!(indexes.see("a", 1), None);
        assert!(indexes.see("a", 3).unwrap().contains("moved from 1 to 3"));
        assert!(indexes.see("c", 2).unwrap().contains("b and c share the index 2"));
    }
}
