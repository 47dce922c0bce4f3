//! The admin REST API, for `isthmusctl`: JSON over mutual TLS, for holders of an administrator's certificate.
//!
//! Every error is `{"error": {"code", "message", "field"?, "problems"?}}`, where the message says what to do, and each problem
//! of what was sent has its file, line and field.

mod clusters;
mod credentials;
mod error;
mod resources;
mod routes;

use std::sync::Arc;

use isthmus_identity::{
    grpc::{PeerInfo, TlsIncoming},
    tls::{ClientAuth, PeerPolicy, TlsError, server_config},
};
use isthmus_model::ids::SpiffeId;
use isthmus_runtime::{health::Registry, tasks::Tasks};
use tokio::{net::TcpListener, sync::watch};

pub use self::credentials::{CredentialsError, write_credentials};
use crate::{
    authority::{Authority, is_admin},
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
}

impl Admin {
    /// Serves on `listener` until shutdown.
    pub(crate) fn serve(self, listener: TcpListener, tasks: &Tasks, registry: &mut Registry) -> Result<(), TlsError> {
        let federation = self.authority.federation().clone();
        let admins: PeerPolicy = Arc::new(move |id: &SpiffeId| is_admin(id, &federation));
        let auth = ClientAuth::Required(admins);
        let tls = server_config(self.authority.source(), self.authority.trust(), auth, &[b"h2", b"http/1.1"])?;
        let incoming = TlsIncoming::new(listener, Arc::new(tls));
        incoming.handshakes().register(registry, "admin");
        let service = routes::router(self).into_make_service_with_connect_info::<PeerInfo>();
        let shutdown = tasks.shutdown();
        tasks.critical("admin-api", async move {
            axum::serve(incoming, service).with_graceful_shutdown(async move { shutdown.requested().await }).await?;
            Ok(())
        });
        Ok(())
    }
}
