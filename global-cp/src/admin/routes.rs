//! The admin API's calls.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{ConnectInfo, DefaultBodyLimit, Path, State},
    http::{Method, Uri},
    routing::{get, post},
};
use isthmus_identity::{
    grpc::PeerInfo,
    token::{Token, TokenKind, TokenSpec},
};
use isthmus_model::{
    availability::Report,
    global::{GlobalService, GlobalSnapshot},
    ids::{ClusterName, IdError, Stamp},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{Admin, error::ApiError};
use crate::{
    state::{Command, MintToken, Rejection, TokenHash},
    status::StatusView,
};

/// Largest request body.
const MAX_BODY: usize = 64 << 10;
/// Life of a join token, unless the request says otherwise, and at most.
const TOKEN_TTL: Duration = Duration::from_secs(900);
const MAX_TOKEN_TTL: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TokenRequest {
    ttl_seconds: Option<u64>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct TokenResponse {
    /// To be given to the agent; secret.
    token: String,
    /// Unix time in milliseconds.
    expires_at: Timestamp,
}

#[derive(Debug, Serialize)]
struct Revoked {
    stamp: Stamp,
}

type Answer<T> = Result<Json<T>, ApiError>;

/// All routes.
pub(super) fn router(admin: Admin) -> Router {
    Router::new()
        .route("/v1/clusters/{name}/join-token", post(join_token))
        .route("/v1/clusters/{name}/revoke", post(revoke))
        .route("/v1/status", get(status))
        .route("/v1/snapshot", get(snapshot))
        .route("/v1/services", get(services))
        .route("/v1/availability/{cluster}", get(availability))
        .fallback(async |uri: Uri| {
            ApiError::not_found(format!("there is no {}; is isthmusctl newer than this control plane?", uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::method(format!("{} does not take {method}", uri.path()))
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(admin)
}

async fn join_token(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<PeerInfo>,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer<TokenResponse> {
    let cluster = cluster_name(&name)?;
    let ttl = ttl(&body)?;
    let now = Timestamp(isthmus_runtime::now());
    let expires_at = now + ttl;
    let token = Token::mint(TokenSpec {
        kind: TokenKind::Join,
        address: admin.advertise.to_string(),
        ca_pin: admin.authority.root_sha256(),
        cluster: cluster.clone(),
        subject: "agent".to_owned(),
        expires_at,
    });
    let hash = TokenHash(Token::secret_hash(&token.secret));
    admin.proposer.propose(Command::MintToken(MintToken { hash, cluster: cluster.clone(), expires_at, now })).await?;
    tracing::info!(%cluster, by = %by(&peer), ttl_seconds = ttl.as_secs(), "join token minted");
    Ok(Json(TokenResponse { token: token.encode(), expires_at }))
}

async fn revoke(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<PeerInfo>,
    Path(name): Path<String>,
) -> Answer<Revoked> {
    let cluster = cluster_name(&name)?;
    let outcome = admin.proposer.propose(Command::Revoke { cluster: cluster.clone() }).await?;
    tracing::warn!(%cluster, by = %by(&peer), stamp = %outcome.stamp, changed = outcome.changed, "cluster revoked");
    Ok(Json(Revoked { stamp: outcome.stamp }))
}

async fn status(State(admin): State<Admin>) -> Answer<StatusView> {
    let global = admin.global()?;
    Ok(Json(admin.status.view(&admin.node, &global)))
}

async fn snapshot(State(admin): State<Admin>) -> Answer<Arc<GlobalSnapshot>> {
    Ok(Json(admin.global()?))
}

async fn services(State(admin): State<Admin>) -> Answer<Vec<GlobalService>> {
    Ok(Json(admin.global()?.services.values().cloned().collect()))
}

async fn availability(State(admin): State<Admin>, Path(name): Path<String>) -> Answer<Vec<Report>> {
    let cluster = cluster_name(&name)?;
    if !admin.global()?.clusters.contains_key(&cluster) {
        return Err(Rejection::UnknownCluster { cluster }.into());
    }
    let report = admin.status.report(&cluster);
    Ok(Json(report.iter().flat_map(|report| &report.availability).cloned().collect()))
}

impl Admin {
    fn global(&self) -> Result<Arc<GlobalSnapshot>, ApiError> {
        self.views.borrow().global().cloned().ok_or_else(ApiError::not_ready)
    }
}

fn cluster_name(text: &str) -> Result<ClusterName, ApiError> {
    text.parse().map_err(|error: IdError| ApiError::invalid("name", error.to_string()))
}

/// From `{"ttlSeconds": n}`, or nothing for the default.
fn ttl(body: &[u8]) -> Result<Duration, ApiError> {
    if body.is_empty() {
        return Ok(TOKEN_TTL);
    }
    let request: TokenRequest = serde_json::from_slice(body)
        .map_err(|error| ApiError::invalid("body", format!("send {{\"ttlSeconds\": 900}} or nothing: {error}")))?;
    let ttl = request.ttl_seconds.map_or(TOKEN_TTL, Duration::from_secs);
    if ttl.is_zero() || ttl > MAX_TOKEN_TTL {
        return Err(ApiError::invalid("ttlSeconds", format!("use 1 to {}", MAX_TOKEN_TTL.as_secs())));
    }
    Ok(ttl)
}

fn by(peer: &PeerInfo) -> String {
    peer.id.as_ref().map_or_else(|| peer.remote.to_string(), ToString::to_string)
}
