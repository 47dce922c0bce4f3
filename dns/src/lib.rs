//! The DNS server of a cluster: authoritative for `clusterset.local`, forwarder for the rest.
//!
//! In: the agent's feed ([`feed`]) and queries ([`server`]). Out: answers by the rules of [`zone`], which is pure. What
//! always holds: the zone changes as a whole, and survives the loss of the agent and a restart without it. It decides
//! nothing about failover; it shows what [`isthmus_model::failover`] decides.
//!
//! `main` and tests both start it with [`build`].

pub mod config;
mod feed;
#[cfg(test)]
mod fixture;
mod metrics;
mod server;
pub mod zone;

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use isthmus_identity::enrol::EnrolError;
use isthmus_runtime::{
    health::{self, Gate, HealthError, HealthListener, Readiness, Registry},
    net::BindError,
    tasks::{TaskError, Tasks},
};

pub use crate::config::Config;
use crate::{
    feed::{Feed, FeedConfig},
    metrics::Metrics,
    server::{CurrentZone, Handler, Listener},
};

/// How long a drain may take.
const GRACE: Duration = Duration::from_secs(5);

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// An address cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The health address cannot be bound.
    #[error(transparent)]
    Health(#[from] HealthError),
    /// A bound socket is not usable.
    #[error("use the DNS sockets")]
    Socket(#[source] io::Error),
    /// The forwarder.
    #[error("upstreams: set up the forwarder")]
    Forwarder(#[source] hickory_resolver::net::NetError),
    /// No certificate, and no way to one.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
}

/// A server with all its addresses bound, answering nothing yet.
pub struct Bound {
    listener: Listener,
    handler: Handler,
    feed: Feed,
    health: HealthListener,
    registry: Registry,
    readiness: Readiness,
    listening: Gate,
    dns: SocketAddr,
}

/// Binds everything that `config` names and reads what an earlier run left.
pub async fn build(config: Config) -> Result<Bound, BuildError> {
    let metrics = Metrics::default();
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let readiness = Readiness::new();
    let listening = readiness.gate("DNS sockets served");
    let known = readiness.gate("state from the agent or from disk");

    let health = health::bind(config.listen.health).await?;
    let listener = Listener::bind(config.listen.dns).await?;
    let dns = listener.address();
    let zone = CurrentZone::default();
    let feed = Feed::start(FeedConfig {
        name: config.name,
        state_dir: config.state_dir,
        token_file: config.agent_token_file,
        server: own_address(dns),
        zone: zone.clone(),
        metrics: metrics.clone(),
        known,
    })?;
    let handler = Handler::new(zone, &config.upstreams, metrics)?;
    Ok(Bound { listener, handler, feed, health, registry, readiness, listening, dns })
}

impl Bound {
    /// Where queries are answered, UDP and TCP.
    pub fn dns_addr(&self) -> SocketAddr {
        self.dns
    }

    /// Where health and metrics are served.
    pub fn health_addr(&self) -> SocketAddr {
        self.health.local_addr()
    }

    /// Serves until SIGTERM or SIGINT.
    pub async fn run(self) -> Result<(), TaskError> {
        self.start().run(GRACE).await
    }

    /// Serves until `stop` resolves.
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> Result<(), TaskError> {
        self.start().run_until(stop, GRACE).await
    }

    fn start(self) -> Tasks {
        let tasks = Tasks::new();
        let (readiness, shutdown) = (self.readiness.clone(), tasks.shutdown());
        tasks.spawn("drain", async move {
            shutdown.requested().await;
            readiness.begin_drain();
        });
        self.health.serve(&tasks, Arc::new(self.registry), self.readiness, axum::Router::new());
        let (listener, handler, shutdown) = (self.listener, self.handler, tasks.shutdown());
        let listening = self.listening;
        tasks.critical("dns-server", async move {
            listening.ready();
            Ok(listener.serve(handler, shutdown).await?)
        });
        tasks.critical("agent-feed", self.feed.run(tasks.shutdown()));
        tasks
    }
}

/// The address for the zone's NS; none if the server listens on all.
fn own_address(dns: SocketAddr) -> Option<Ipv4Addr> {
    match dns.ip() {
        IpAddr::V4(ip) if !ip.is_unspecified() => Some(ip),
        _ => None,
    }
}
