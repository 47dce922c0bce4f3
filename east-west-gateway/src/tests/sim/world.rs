//! Three gateways' cores in one thread: east dials west and north over the network in memory. What is local to each
//! cluster (clients, endpoints) is on loopback, which takes no time.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use isthmus_identity::{svid::Svid, tls::IdentitySource};
use isthmus_model::{
    failover::Eligibility,
    global::GlobalSnapshot,
    ids::{ClusterName, ServiceName},
    local::{Endpoint, LocalEndpoints},
    service::GatewayAddress,
};
use isthmus_runtime::{health::Registry, tasks::Tasks};
use tokio::{net::TcpListener, sync::watch};

use super::net::Net;
use crate::{
    View,
    core::{Core, Parts},
    handover::{cids::CidKey, shelf::Shelf, steps::Steps},
    ingress,
    metrics::Metrics,
    serve,
    testkit::{FEDERATION, cluster, federation, service_name},
    tests::rig,
    tunnel::{
        accept,
        link::quic::{self, Identity},
        peers,
    },
};

/// Services beside the one that is called, whose endpoints come and go.
pub(super) const OTHERS: usize = 4;
const CLUSTERS: [&str; 3] = ["east", "west", "north"];

/// One gateway.
pub(super) struct Gateway {
    pub(super) core: Arc<Core>,
    /// Where its clients enter.
    pub(super) auto: SocketAddr,
    /// In the network in memory.
    pub(super) address: SocketAddr,
    view: watch::Sender<Arc<View>>,
}

/// All three, in the order of [`CLUSTERS`]; `endpoints` are those of west and north.
pub(super) async fn gateways(net: &Arc<Net>, endpoints: [SocketAddr; 2]) -> Vec<Gateway> {
    let mut all = Vec::new();
    for (i, name) in CLUSTERS.into_iter().enumerate() {
        let address = SocketAddr::from(([10, 0, 0, u8::try_from(i + 1).unwrap()], 1));
        all.push(Gateway::start(net, name, address).await);
    }
    for (gateway, name) in all.iter().zip(CLUSTERS) {
        let mut global = state();
        if name == "east" {
            // The others do not dial: one direction is enough, and half the handshakes.
            for (far, name) in all.iter().zip(CLUSTERS).skip(1) {
                let address = GatewayAddress { name: "gateway-1".to_owned(), tunnel: Some(far.address) };
                global.clusters.get_mut(&cluster(name)).unwrap().gateways = vec![address];
            }
        }
        let own = CLUSTERS[1..].iter().zip(endpoints).filter(|(n, _)| **n == name).map(|(_, e)| e);
        let endpoints = LocalEndpoints { services: [(service_name(), own.map(endpoint).collect())].into() };
        gateway.view.send_replace(Arc::new(View { global: Some(Arc::new(global)), endpoints: Arc::new(endpoints) }));
    }
    all
}

impl Gateway {
    async fn start(net: &Arc<Net>, name: &str, address: SocketAddr) -> Self {
        let mut config = rig::config("gateway-1");
        let tunnel = &mut config.tunnel;
        // A lost datagram or three in a row are no death.
        tunnel.ping_interval = rig::ms(200);
        tunnel.dead_after = rig::ms(2_000);
        tunnel.idle_timeout = rig::ms(6_000);
        config.ingress.attempt_timeout = rig::ms(3_000);
        config.ingress.hello_timeout = rig::ms(5_000);
        config.egress.connect_timeout = rig::ms(500);
        let identity = Identity {
            source: IdentitySource::new(svid(name)),
            trust: rig::trust(),
            federation: FEDERATION.parse().unwrap(),
        };
        let metrics = Metrics::register(&mut Registry::default());
        let garbage = metrics.reject_counter("quic_garbage");
        let endpoint =
            quic::endpoint_on(net.socket(address), CidKey::random(), &config.tunnel, &identity, garbage).unwrap();
        let (view, seen) = watch::channel(Arc::default());
        let tasks = Tasks::new();
        let core = Arc::new(Core::new(Parts {
            config: Arc::new(config),
            cluster: cluster(name),
            identity,
            view: seen,
            metrics,
            tasks: tasks.clone(),
            steps: Steps::afresh(),
            shelf: Shelf::default(),
            redundancy: Arc::default(),
        }));
        let listener = TcpListener::bind(rig::local(0)).await.unwrap();
        let auto = listener.local_addr().unwrap();
        tasks.spawn("accept", accept::accept(core.clone(), endpoint.clone()));
        tasks.spawn("peers", peers::manage(core.clone(), endpoint));
        tasks.spawn("listen", ingress::listen(core.clone(), listener, Arc::default(), Arc::default()));
        tasks.spawn("house", serve::keep_own_house(core.clone()));
        Self { core, auto, address, view }
    }

    /// So many endpoints serve the service `other` from now on.
    pub(super) fn set_endpoints(&self, other: usize, count: u16) {
        self.view.send_modify(|view| {
            let mut next = View::clone(view);
            let mut endpoints = LocalEndpoints::clone(&next.endpoints);
            let serving = (0..count).map(|i| endpoint(rig::local(i + 1))).collect();
            endpoints.services.insert(self::other(other), serving);
            next.endpoints = Arc::new(endpoints);
            *view = Arc::new(next);
        });
    }

    /// The first in line for the service that is called, once it is known that both far clusters serve.
    pub(super) fn first_choice(&self) -> Option<ClusterName> {
        let candidates = self.core.candidates(&service_name(), 80)?;
        // What they have said is acted on a little later.
        let ready =
            |name: &&str| candidates.iter().any(|c| c.cluster == cluster(name) && c.eligibility == Eligibility::Ready);
        if !CLUSTERS[1..].iter().all(ready) {
            return None;
        }
        candidates.into_iter().map(|candidate| candidate.cluster).find(|c| *c != self.core.cluster)
    }
}

fn state() -> GlobalSnapshot {
    let mut global = federation(&CLUSTERS);
    global.settings.failover.hold_down = rig::ms(0);
    let called = global.services[&service_name()].clone();
    // The east only calls.
    for service in global.services.values_mut() {
        std::sync::Arc::make_mut(service).exporters.remove(&cluster("east"));
    }
    for i in 0..OTHERS {
        let mut service = called.as_ref().clone();
        service.name = other(i);
        global.services.insert(other(i), service.into());
    }
    global
}

fn other(i: usize) -> ServiceName {
    ServiceName::new("shop", &format!("other-{i}")).unwrap()
}

fn endpoint(at: SocketAddr) -> Endpoint {
    Endpoint {
        ip: at.ip(),
        ports: BTreeMap::from([("tcp".parse().unwrap(), at.port())]),
        ready: true,
        has_sidecar: true,
        zone: "".parse().unwrap(),
    }
}

/// Keys take time to make: one for each cluster, for all cases.
fn svid(name: &str) -> Svid {
    static ALL: OnceLock<BTreeMap<&str, Svid>> = OnceLock::new();
    ALL.get_or_init(|| CLUSTERS.into_iter().map(|name| (name, rig::svid(name))).collect())[name].clone()
}
