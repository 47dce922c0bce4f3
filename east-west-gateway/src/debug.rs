//! Looking inside a running gateway: `/debug/tunnels`, `/debug/candidates`, `/debug/listeners` on the health server, and
//! the same for tests.
//!
//! Read-only. Before the gateway is enrolled everything is empty.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use isthmus_model::{
    failover::Candidate,
    ids::{ClusterName, ServiceName},
};
use serde::Deserialize;

use crate::{core::Core, ingress::Listeners, tunnel::registry::TunnelInfo};

/// A view into a gateway, whether it runs yet or not.
#[derive(Clone, Debug, Default)]
pub struct Inspector {
    core: Arc<OnceLock<Arc<Core>>>,
    listeners: Arc<Listeners>,
}

impl Inspector {
    /// Its tunnels, working or not.
    pub fn tunnels(&self) -> Vec<TunnelInfo> {
        self.core.get().map(|core| core.registry.infos()).unwrap_or_default()
    }

    /// Where `port` of `service` may be reached, best first; `None` if there is no such service.
    pub fn candidates(&self, service: &ServiceName, port: u16) -> Option<Vec<Candidate>> {
        self.core.get()?.candidates(service, port)
    }

    /// Where traffic pinned to each cluster enters.
    pub fn pinned(&self) -> BTreeMap<ClusterName, SocketAddr> {
        self.listeners.pinned()
    }

    pub(crate) fn listeners(&self) -> Arc<Listeners> {
        self.listeners.clone()
    }

    /// From now on there is something to see.
    pub(crate) fn attach(&self, core: Arc<Core>) {
        // A second core would be a second gateway; there is one per inspector.
        drop(self.core.set(core));
    }

    #[cfg(test)]
    pub(crate) fn core(&self) -> Option<Arc<Core>> {
        self.core.get().cloned()
    }
}

/// The routes.
pub(crate) fn router(inspector: Inspector) -> Router {
    Router::new()
        .route("/debug/tunnels", get(async |State(i): State<Inspector>| Json(i.tunnels())))
        .route("/debug/listeners", get(async |State(i): State<Inspector>| Json(i.pinned())))
        .route("/debug/candidates", get(candidates))
        .with_state(inspector)
}

#[derive(Deserialize)]
struct Asked {
    service: ServiceName,
    port: u16,
}

async fn candidates(State(inspector): State<Inspector>, Query(asked): Query<Asked>) -> Response {
    match inspector.candidates(&asked.service, asked.port) {
        Some(candidates) => Json(candidates).into_response(),
        None => {
            let error = format!("no service {} in the state applied here", asked.service);
            (StatusCode::NOT_FOUND, Json(serde_json::json!({ "error": { "code": "not_found", "message": error } })))
                .into_response()
        }
    }
}
