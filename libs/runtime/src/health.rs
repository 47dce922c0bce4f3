//! The HTTP server that orchestrators and monitoring talk to: `/livez`, `/readyz`, `/metrics`.
//!
//! `/livez` is 200 as long as the process turns its event loop. `/readyz` is 200 once every [`Gate`] is open and no drain
//! has begun, otherwise 503 and a line for each thing that is missing. `/metrics` is OpenMetrics text: the service's
//! registry and, without its doing, metrics of the process and its tasks. The server stays up through the drain, so that
//! "unready" is an answer and not a refused connection.

mod listener;
mod process;
mod readiness;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text;
use tokio::net::TcpListener;

use crate::BoxError;
use crate::net::{self, BindError};
use crate::tasks::Tasks;

use listener::Limited;
pub use readiness::{Gate, Readiness};

/// Where a service registers its metrics.
pub type Registry = prometheus_client::registry::Registry;

/// Most open connections; one more is closed at once. Probes and scrapers need a handful.
const MAX_CONNECTIONS: usize = 128;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why the health server did not start.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// Its address cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The bound socket does not tell its address, or cannot be waited for.
    #[error("use the health server's socket")]
    Address(#[source] std::io::Error),
}

/// A bound address that is not served yet.
#[derive(Debug)]
pub struct HealthListener {
    listener: TcpListener,
    local_addr: SocketAddr,
}

/// Binds `addr`, which errors call `listen.health`; port 0 takes a free one.
pub async fn bind(addr: SocketAddr) -> Result<HealthListener, HealthError> {
    let listener = net::bind_tcp(addr, "listen.health").await?;
    let local_addr = listener.local_addr().map_err(HealthError::Address)?;
    Ok(HealthListener { listener, local_addr })
}

/// Takes a listener that another process bound: one that this process succeeds.
pub fn adopt(listener: std::net::TcpListener) -> Result<HealthListener, HealthError> {
    listener.set_nonblocking(true).map_err(HealthError::Address)?;
    let listener = TcpListener::from_std(listener).map_err(HealthError::Address)?;
    let local_addr = listener.local_addr().map_err(HealthError::Address)?;
    Ok(HealthListener { listener, local_addr })
}

impl AsFd for HealthListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl HealthListener {
    /// The address that is bound, with the real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until the process has drained. `extra` adds the service's own debug routes; it must not repeat ours.
    pub fn serve(self, tasks: &Tasks, registry: Arc<Registry>, readiness: Readiness, extra: Router) {
        self.serve_until(tasks, registry, readiness, extra, std::future::pending());
    }

    /// The same, until `leave` resolves: another process answers on this socket from then on. Open connections end with
    /// the request that they are at.
    pub fn serve_until(
        self,
        tasks: &Tasks,
        registry: Arc<Registry>,
        readiness: Readiness,
        extra: Router,
        leave: impl Future<Output = ()> + Send + 'static,
    ) {
        let state = Served { own: Arc::new(process::registry(tasks)), registry, readiness };
        let router = Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(state)
            .merge(extra);
        let listener = Limited::new(self.listener, MAX_CONNECTIONS);
        tasks.background("health", async move {
            axum::serve(listener, router).with_graceful_shutdown(leave).await.map_err(BoxError::from)?;
            // Left, not failed: a background task must not end before the process does.
            std::future::pending().await
        });
    }
}

#[derive(Clone)]
struct Served {
    own: Arc<Registry>,
    registry: Arc<Registry>,
    readiness: Readiness,
}

async fn readyz(State(served): State<Served>) -> Response {
    if served.readiness.is_ready() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, served.readiness.report()).into_response()
}

async fn metrics(State(served): State<Served>) -> Response {
    let mut body = String::new();
    let encoded = text::encode_registry(&mut body, &served.own)
        .and_then(|()| text::encode_registry(&mut body, &served.registry))
        .and_then(|()| text::encode_eof(&mut body));
    match encoded {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], body).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "a metric cannot be encoded\n").into_response(),
    }
}
