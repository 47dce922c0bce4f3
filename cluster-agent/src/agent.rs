//! The agent's parts and how they hang together: what is started when, and with what.
//!
//! Source, hub and health server start at once; what needs the agent's certificate after the join. With a last-known-good
//! state on disk everything serves without the control plane. Before the first state of the federation the hub holds an
//! empty one, at stamp zero.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use isthmus_api::{convert::ConsumerKind, proto::local::v1::local_server::LocalServer};
use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    grpc::{Handshakes, TlsIncoming},
    svid::Svid,
    tls::{ClientAuth, IdentitySource, PeerPolicy, server_config},
    token::Token,
};
use isthmus_model::{
    global::{GlobalSnapshot, Settings},
    ids::Stamp,
    service::TrustBundle,
    time::Timestamp,
};
use isthmus_runtime::{
    BoxError,
    files::LastKnownGood,
    health::{Gate, Readiness, Registry},
    tasks::{Tasks, chain},
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
};
use tonic::transport::Server;

use crate::{
    app::{Bound, Membership},
    config::Config,
    debug,
    hub::{
        self, Hub, Setup,
        state::{Event, Members, Own, State},
    },
    local::{LocalService, Parts, admin::Admin, auth::Realm, tokens::Tokens},
    lock::StateLock,
    metrics::Metrics,
    source::{Source, folder::Manifests},
    status::{Area, StatusBoard, problem},
    uplink::{
        Disk, Known, Uplink,
        admit::{Admitted, Pins, admit},
        control::{ControlPlane, NODES_FORMAT},
        join::{self, Joined, Member},
        load_global,
        renew::Renewal,
        roots, save_pins,
    },
    xds::AdsService,
};

const KEEPALIVE: Duration = Duration::from_secs(5);
/// Largest message of a gateway, DNS server or launcher: an availability report of a large federation.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;
/// For a call's request to arrive and be answered; a feed's first answer counts.
const CALL_DEADLINE: Duration = Duration::from_secs(15);
/// Calls, feeds included, under way on one connection.
const MAX_CALLS: u32 = 64;

struct Gates {
    manifests: Gate,
    join: Gate,
    global: Gate,
    listener: Gate,
}

/// What is needed from the join on.
struct Agent {
    config: Config,
    disk: Disk,
    ca: Arc<CertificateAuthority>,
    tokens: Tokens,
    local: TcpListener,
    local_addr: SocketAddr,
    admin: UnixListener,
    tasks: Tasks,
    status: StatusBoard,
    metrics: Metrics,
    hub: Hub,
    handshakes: Handshakes,
    ads: AdsService,
}

/// A member with what it knows of the federation.
struct Started {
    member: Member,
    svid: Svid,
    known: Known,
}

/// Starts all tasks; the lock is to be held until they have ended.
pub(crate) fn start(bound: Bound) -> (Tasks, StateLock) {
    let Bound { lock, config, files, ca, tokens, membership, local, local_addr, admin, health } = bound;
    let tasks = Tasks::new();
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let readiness = Readiness::new();
    let gates = Gates {
        manifests: readiness.gate("manifests"),
        join: readiness.gate("join"),
        global: readiness.gate("federation state"),
        listener: readiness.gate("listener"),
    };
    let status = StatusBoard::new();
    let (source, manifests) = Source::open(config.manifests.clone(), files.manifests, status.clone());
    tasks.spawn("source", source.run(tasks.shutdown()));

    let (global, known) = match &membership {
        Membership::Joined { pins, .. } | Membership::Joining { was: Some((_, pins)), .. } => {
            let (global, known) = restore(&config, &ca, pins, &files.disk, &status);
            (global, Some(known))
        }
        Membership::Joining { was: None, .. } => (nothing(&ca.bundle()), None),
    };
    if global.stamp != Stamp::default() {
        metrics.revision(global.stamp);
        gates.global.ready();
    }
    let hub = start_hub(&config, &tasks, &status, global, manifests.clone(), files.members);
    let ads = AdsService::new(hub.view.clone(), status.clone(), tasks.shutdown());
    ads.register(&mut registry);
    let handshakes = Handshakes::default();
    handshakes.register(&mut registry, "local");
    let debug = debug::router(hub.clone(), status.clone());
    health.serve(&tasks, Arc::new(registry), readiness.clone(), debug);

    let shutdown = tasks.shutdown();
    tasks.spawn("drain", async move {
        shutdown.requested().await;
        readiness.begin_drain();
    });
    let gauges = observe(manifests, hub.clone(), status.clone(), metrics.clone(), gates.manifests);
    let shutdown = tasks.shutdown();
    tasks.spawn("gauges", async move {
        tokio::select! {
            () = shutdown.requested() => {}
            () = gauges => {}
        }
    });
    let disk = files.disk;
    let agent = Agent {
        config,
        disk,
        ca,
        tokens,
        local,
        local_addr,
        admin,
        tasks: tasks.clone(),
        status,
        metrics,
        hub,
        handshakes,
        ads,
    };
    let shutdown = tasks.shutdown();
    tasks.critical("agent", async move {
        let serving = async {
            let started = match membership {
                Membership::Joined { member, svid, pins } => {
                    Started { member, svid, known: known.unwrap_or(Known { raw: None, pins }) }
                }
                Membership::Joining { token, was } => {
                    agent.join(&token, was.map(|(member, _)| member), known, &gates.join).await?
                }
            };
            gates.join.ready();
            agent.serve(started, gates.global, &gates.listener)
        };
        tokio::select! {
            () = shutdown.requested() => return Ok(()),
            // What fails because everything is going down is no failure.
            outcome = serving => if !shutdown.is_requested() {
                outcome?;
            },
        }
        shutdown.requested().await;
        Ok(())
    });
    (tasks, lock)
}

/// What was last accepted, judged again; an empty federation if there is nothing usable.
fn restore(
    config: &Config,
    ca: &CertificateAuthority,
    pins: &Pins,
    disk: &Disk,
    status: &StatusBoard,
) -> (GlobalSnapshot, Known) {
    let unknown = || (nothing(&pins.federation), Known { raw: None, pins: pins.clone() });
    let Some(raw) = load_global(&disk.global, status) else { return unknown() };
    match admit(&raw, pins, (&config.cluster, &ca.bundle())) {
        Ok(Admitted { snapshot, pins: judged, problems }) => {
            tracing::info!(stamp = %snapshot.stamp, "serving the last known state of the federation");
            status.set_problems(Area::Federation, problems);
            // The next state saves them only if it changes them again.
            if judged != *pins
                && let Err(e) = save_pins(&disk.pins, &judged)
            {
                tracing::error!("the believed bundles and revocations cannot be saved: {e}");
                status.set_problems(Area::GlobalStore, vec![problem("state folder", e)]);
            }
            (snapshot, Known { raw: Some(Arc::new(raw)), pins: judged })
        }
        Err(refused) => {
            tracing::error!("the last known state of the federation is not used: {}", chain(&refused));
            status.set_problems(Area::Refused, vec![problem("state folder", chain(&refused))]);
            unknown()
        }
    }
}

fn start_hub(
    config: &Config,
    tasks: &Tasks,
    status: &StatusBoard,
    global: GlobalSnapshot,
    manifests: watch::Receiver<Arc<Manifests>>,
    disk: LastKnownGood,
) -> Hub {
    let own = Own {
        cluster: config.cluster.clone(),
        trust_domain: config.trust_domain.clone(),
        vip_range: config.vip_range,
        zone: config.locality.zone.clone(),
        workload_lifetime: config.workload_certificate_lifetime,
    };
    let members = load_members(&disk);
    for name in members.gateways.keys() {
        status.remember(ConsumerKind::Gateway, name);
    }
    for name in members.sidecars.keys() {
        status.remember(ConsumerKind::Sidecar, name);
    }
    let now = Timestamp(isthmus_runtime::now());
    let objects = manifests.borrow().clone();
    let state = State::new(own, Arc::new(global), objects, members, now);
    hub::start(tasks, Setup { state, manifests, disk, status: status.clone() })
}

/// Gateways and sidecars register again by themselves, so a damaged file is no reason to stop.
fn load_members(disk: &LastKnownGood) -> Members {
    let loaded = disk.load().map_err(|e| chain(&e)).and_then(|bytes| {
        let parsed = bytes.map(|b| serde_json::from_slice(&b)).transpose();
        parsed.map_err(|e| e.to_string())
    });
    let members = loaded.unwrap_or_else(|e| {
        tracing::error!("known gateways and sidecars cannot be read, and must register again: {e}");
        None
    });
    members.unwrap_or_default()
}

impl Agent {
    /// Joins; what a cluster that `was` a member has `known` stays.
    async fn join(
        &self,
        token: &Token,
        was: Option<Member>,
        known: Option<Known>,
        gate: &Gate,
    ) -> Result<Started, BoxError> {
        tracing::info!(control_plane = %token.address, "joining the federation");
        let Joined { member, svid, federation_bundle } =
            join::join(&self.config, token, was.as_ref(), &self.ca, gate).await?;
        let Known { raw, pins } =
            known.unwrap_or_else(|| Known { raw: None, pins: Pins::new(federation_bundle.clone()) });
        // Whoever brings a token decides anew whom the cluster believes as its federation, and nothing else.
        let pins = Pins { federation: federation_bundle, ..pins };
        save_pins(&self.disk.pins, &pins)?;
        join::save(&self.config.state_dir, &member)?;
        tracing::info!(federation = %member.federation, id = %svid.id(), "joined the federation");
        if raw.is_none() {
            self.hub.send(Event::Global(Arc::new(nothing(&pins.federation)))).await?;
        }
        Ok(Started { member, svid, known: Known { raw, pins } })
    }

    /// Starts everything that needs the certificate.
    fn serve(self, started: Started, global_gate: Gate, listener: &Gate) -> Result<(), BoxError> {
        let Started { member, svid, known } = started;
        let identity = IdentitySource::new(svid);
        let trust = TrustStore::new();
        trust.set(roots(&known.pins.federation, &self.ca.bundle()));
        let address = self.config.control_plane.clone().unwrap_or_else(|| member.control_plane.clone());
        let nodes = LastKnownGood::new(self.config.state_dir.join("control-plane.lkg"), NODES_FORMAT);
        let control = ControlPlane::new(&address, nodes, &member.federation, &identity, &trust)?;
        let renewal = Renewal {
            control: control.clone(),
            identity: identity.clone(),
            state_dir: self.config.state_dir.clone(),
            status: self.status.clone(),
            metrics: self.metrics.clone(),
        };
        self.tasks.spawn("renewal", renewal.run(self.tasks.shutdown()));
        let admin = Admin {
            cluster: member.cluster.clone(),
            trust_domain: member.trust_domain.clone(),
            address: self.config.advertised(self.local_addr),
            identity: identity.clone(),
            tokens: self.tokens.clone(),
        };
        let (socket, shutdown) = (self.admin, self.tasks.shutdown());
        self.tasks.critical("admin", async move { admin.serve(socket, shutdown).await.map_err(BoxError::from) });
        let uplink = Uplink {
            own: member.cluster.clone(),
            ca: self.ca.clone(),
            control: control.clone(),
            known,
            disk: self.disk,
            trust: trust.clone(),
            hub: self.hub.clone(),
            status: self.status.clone(),
            metrics: self.metrics.clone(),
            gate: global_gate,
            shutdown: self.tasks.shutdown(),
            resync: false,
            published: None,
            incarnation: rand::random(),
        };
        self.tasks.spawn("uplink", uplink.run());

        let realm = Realm { cluster: member.cluster, federation: member.federation, trust_domain: member.trust_domain };
        let policy: PeerPolicy = {
            let realm = realm.clone();
            Arc::new(move |id| realm.caller(id).is_some())
        };
        let tls = server_config(&identity, &trust, ClientAuth::Optional(policy), &[b"h2"])?;
        let incoming = TlsIncoming::new(self.local, Arc::new(tls)).counted_by(self.handshakes);
        let service = LocalService::new(Parts {
            realm,
            hub: self.hub,
            status: self.status,
            tokens: self.tokens,
            ca: self.ca,
            control,
            workload_lifetime: self.config.workload_certificate_lifetime,
            metrics: self.metrics,
            tasks: self.tasks.clone(),
            shutdown: self.tasks.shutdown(),
        });
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .max_concurrent_streams(MAX_CALLS)
            .timeout(CALL_DEADLINE)
            .add_service(LocalServer::new(service).max_decoding_message_size(MAX_MESSAGE))
            .add_service(self.ads.into_server());
        let shutdown = self.tasks.shutdown();
        self.tasks.critical("local-server", async move {
            let stop = async move { shutdown.requested().await };
            server.serve_with_incoming_shutdown(incoming, stop).await.map_err(BoxError::from)
        });
        listener.ready();
        Ok(())
    }
}

/// The federation before its first state is known.
fn nothing(bundle: &TrustBundle) -> GlobalSnapshot {
    GlobalSnapshot {
        stamp: Stamp::default(),
        federation: bundle.trust_domain.clone(),
        federation_bundle: bundle.clone(),
        settings: Settings::default(),
        clusters: BTreeMap::new(),
        services: BTreeMap::new(),
    }
}

/// Keeps gauges and the manifests' gate in line.
async fn observe(
    mut manifests: watch::Receiver<Arc<Manifests>>,
    hub: Hub,
    status: StatusBoard,
    metrics: Metrics,
    gate: Gate,
) {
    let mut board = status.changes();
    let mut intent = hub.intent.clone();
    loop {
        let problems = status.count(&[Area::Manifests, Area::Objects]);
        metrics.manifest_problems.set(i64::try_from(problems).unwrap_or(i64::MAX));
        let exports = intent.borrow_and_update().as_ref().map_or(0, |i| i.exports.len());
        metrics.exports.set(i64::try_from(exports).unwrap_or(i64::MAX));
        // What was saved before is good enough to serve from, though not to publish from.
        let serving = manifests.borrow_and_update().are_known();
        match serving {
            true => gate.ready(),
            false => gate.unready("the manifests folder has not been read yet; the log says why"),
        }
        let ended = tokio::select! {
            changed = board.changed() => changed.is_err(),
            changed = intent.changed() => changed.is_err(),
            changed = manifests.changed() => changed.is_err(),
        };
        if ended {
            return;
        }
    }
}
