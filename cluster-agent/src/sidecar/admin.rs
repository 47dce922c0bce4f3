//! The launcher's talk with its Envoy: the admin page over a Unix socket.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

/// Envoy answers at once or is not well.
const DEADLINE: Duration = Duration::from_secs(2);
const MAX_ANSWER: usize = 4 * 1024 * 1024;

/// Why Envoy gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum AdminError {
    /// Nobody listens, or the connection broke.
    #[error("reach Envoy's admin socket")]
    Connect(#[from] io::Error),
    /// The exchange failed.
    #[error("talk to Envoy's admin socket")]
    Http(#[from] hyper::Error),
    /// No answer in time.
    #[error("Envoy's admin page did not answer within 2 s")]
    Deadline,
    /// More than any page of Envoy that is asked for here.
    #[error("read the answer of Envoy's admin page")]
    Answer,
}

/// Envoy's admin page.
#[derive(Clone, Debug)]
pub(super) struct Admin {
    socket: PathBuf,
}

impl Admin {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Initialized and serving.
    pub(super) async fn is_live(&self) -> bool {
        matches!(self.ask(Method::GET, "/ready").await, Ok((StatusCode::OK, _)))
    }

    /// Asks Envoy to exit.
    pub(super) async fn quit(&self) -> Result<(), AdminError> {
        self.ask(Method::POST, "/quitquitquit").await.map(drop)
    }

    /// Fails health checks and takes the inbound listeners down gracefully; the app's own calls go on.
    pub(super) async fn drain_inbound(&self) -> Result<(), AdminError> {
        self.ask(Method::POST, "/healthcheck/fail").await?;
        self.ask(Method::POST, "/drain_listeners?inboundonly&graceful&skip_exit").await.map(drop)
    }

    /// Requests and carried connections that the app is serving.
    pub(super) async fn active_inbound(&self) -> Result<u64, AdminError> {
        const FILTER: &str =
            "/stats?filter=%5E(http.inbound.downstream_rq_active%7Ctcp.inbound.downstream_cx_active)%24";
        let (_, text) = self.ask(Method::GET, FILTER).await?;
        Ok(text.lines().filter_map(|line| line.rsplit_once(": ")?.1.trim().parse::<u64>().ok()).sum())
    }

    async fn ask(&self, method: Method, path: &str) -> Result<(StatusCode, String), AdminError> {
        timeout(DEADLINE, self.exchange(method, path)).await.map_err(|_| AdminError::Deadline)?
    }

    async fn exchange(&self, method: Method, path: &str) -> Result<(StatusCode, String), AdminError> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::builder().method(method).uri(path).header("host", "envoy");
        let request = request.body(String::new()).map_err(io::Error::other)?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|_| AdminError::Answer)?.to_bytes();
            Ok((status, String::from_utf8_lossy(&body).into_owned()))
        };
        tokio::pin!(connection);
        tokio::pin!(exchange);
        // The connection only moves when polled; it may also end, with the answer still to be read.
        tokio::select! {
            answer = &mut exchange => answer,
            ended = &mut connection => {
                ended?;
                exchange.await
            }
        }
    }
}
