//! The admin REST API, for `isthmusctl`: JSON over TLS, for holders of a certificate of the federation or of a token.
//!
//! Who may do what is decided in one place ([`auth`]), for all routes of one list (`table`).
//!
//! Every error is `{"error": {"code", "message", "field"?, "problems"?}}`, where the message says what to do, and each problem
//! of what was sent has its file, line and field.

mod access;
mod audit;
pub(crate) mod auth;
mod clusters;
mod credentials;
mod endpoint;
mod error;
mod openapi;
mod resources;
mod routes;
mod table;

use std::sync::Arc;

use isthmus_identity::{
    grpc::{PeerInfo, TlsIncoming},
    tls::{ClientAuth, PeerPolicy, TlsError, server_config},
};
use isthmus_model::ids::SpiffeId;
use isthmus_runtime::{health::Registry, tasks::Tasks};
use tokio::{net::TcpListener, sync::watch};

use self::auth::{Gate, Issuers, journal::Journal};
pub use self::{
    auth::{OidcError, journal::JournalError},
    credentials::{CredentialsError, write_credentials},
};
use crate::{
    authority::{Authority, is_admin},
    config::AdminConfig,
    limits::Rate,
    raft::{Group, Peers, Proposer},
    state::View,
    status::StatusStore,
};

/// What all handlers share.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) node: Arc<str>,
    /// Goes into join tokens.
    pub(crate) advertise: Arc<str>,
    pub(crate) authority: Authority,
    pub(crate) proposer: Proposer,
    pub(crate) group: Group,
    pub(crate) peers: Peers,
    pub(crate) views: watch::Receiver<View>,
    pub(crate) status: StatusStore,
    pub(crate) journal: Journal,
}

impl Admin {
    /// Serves on `listener` until shutdown.
    ///
    /// A certificate is not needed, since there are tokens; but one that is shown must be an administrator's.
    pub(crate) fn serve(
        self,
        listener: TcpListener,
        (config, issuers): (&AdminConfig, Issuers),
        tasks: &Tasks,
        registry: &mut Registry,
    ) -> Result<(), TlsError> {
        let federation = self.authority.federation().clone();
        let admins: PeerPolicy = Arc::new(move |id: &SpiffeId| is_admin(id, &federation));
        let auth = ClientAuth::Optional(admins);
        let tls = server_config(self.authority.source(), self.authority.trust(), auth, &[b"h2", b"http/1.1"])?;
        let incoming = TlsIncoming::new(listener, Arc::new(tls));
        incoming.handshakes().register(registry, "admin");
        let rules = table::endpoints().into_iter().map(|endpoint| (endpoint.method, endpoint.rule));
        let rate = Rate { per_second: f64::from(config.requests_per_second), burst: f64::from(config.burst) };
        let gate = Gate::new(rules, (issuers, self.journal.clone()), self.group.clone(), rate);
        gate.register(registry);
        let service = routes::router(self, gate).into_make_service_with_connect_info::<PeerInfo>();
        let shutdown = tasks.shutdown();
        tasks.critical("admin-api", async move {
            axum::serve(incoming, service).with_graceful_shutdown(async move { shutdown.requested().await }).await?;
            Ok(())
        });
        Ok(())
    }
}
