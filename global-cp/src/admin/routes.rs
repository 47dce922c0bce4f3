//! The admin API's calls.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequestParts, Path, State},
    http::{Method, Uri, request::Parts},
    middleware::from_fn_with_state,
};
use isthmus_identity::token::{Token, TokenKind, TokenSpec};
use isthmus_model::{
    availability::Report,
    global::{GlobalService, GlobalSnapshot, Settings},
    grant::ClusterGrant,
    ids::{ClusterName, IdError, NodeName, Revision, Stamp},
    time::Timestamp,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Admin,
    auth::{Caller, Gate, pass},
    error::{ApiError, Body},
    openapi::{GrantShape, StampShape},
    table::endpoints,
};
use crate::{
    nodes::{reports, status::GroupStatus},
    state::{
        Command, Event, MintNodeToken, MintToken, Rejection, TokenHash,
        backup::{self, BackupError},
    },
    status::{self, Heard, StatusView},
};

/// Largest request body.
const MAX_BODY: usize = 64 << 10;
/// Events in one answer, unless the request says otherwise, and at most.
pub(super) const EVENTS: usize = 100;
pub(super) const MAX_EVENTS: usize = 10_240;
/// Largest backup.
pub(super) const MAX_BACKUP: usize = 512 << 20;
/// Life of a join token, unless the request says otherwise, and at most.
const TOKEN_TTL: Duration = Duration::from_secs(900);
const MAX_TOKEN_TTL: Duration = Duration::from_secs(24 * 3600);
/// The cluster that node tokens name.
const NO_CLUSTER: &str = "control-plane";

/// How long a token is to live.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct TokenRequest {
    /// Absent: the default of the kind.
    ttl_seconds: Option<u64>,
}

/// What a cluster's join token is good for.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ClusterTokenRequest {
    /// Absent: 900.
    ttl_seconds: Option<u64>,
    /// What the cluster may do once it has joined. Absent: what was declared for it, else everything.
    #[schemars(with = "Option<GrantShape>")]
    #[serde(default)]
    grant: Option<ClusterGrant>,
}

/// A one-time token.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct TokenResponse {
    /// To be given to the agent or node; secret.
    token: String,
    /// Unix time in milliseconds.
    #[schemars(with = "u64")]
    expires_at: Timestamp,
}

/// Where the state stands without the cluster.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Revoked {
    #[schemars(with = "StampShape")]
    stamp: Stamp,
}

pub(super) type Answer<T> = Result<Json<T>, ApiError>;

/// Which node was removed.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Removed {
    #[schemars(with = "String")]
    node: NodeName,
}

/// What a restore has brought.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Restored {
    /// Where the state stands now.
    #[schemars(with = "StampShape")]
    stamp: Stamp,
    /// Where it stood when the backup was taken.
    #[schemars(with = "StampShape")]
    of: Stamp,
    /// Unix time in milliseconds.
    #[schemars(with = "u64")]
    taken_at: Timestamp,
    /// The CAs are those of then: members go on. Else each must join again.
    same_authority: bool,
    clusters: usize,
    services: usize,
}

/// Between two revisions.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Difference {
    from: Revision,
    to: Revision,
    /// Then and then, if they differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    settings: Option<[Settings; 2]>,
    /// What changed the state meanwhile, oldest first, as far as it is kept.
    events: Vec<Event>,
}

/// What a rollback did.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct RolledBack {
    #[schemars(with = "StampShape")]
    stamp: Stamp,
    changed: bool,
}

/// Which events are asked for: `?limit=`, `?changes` (only what changed the state), `?who=`, `?subject=`.
#[derive(Debug)]
pub(super) struct EventFilter {
    limit: usize,
    changes: bool,
    who: Option<String>,
    subject: Option<String>,
}

impl EventFilter {
    fn takes(&self, event: &Event) -> bool {
        (!self.changes || event.outcome == "changed")
            && self.who.as_ref().is_none_or(|who| event.by.who == *who)
            && self.subject.as_ref().is_none_or(|subject| event.subject == *subject)
    }
}

/// How new what is read must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Consistency {
    /// All that was acknowledged before the read, by whichever node.
    #[default]
    Linearizable,
    /// What this node holds, also while nobody leads.
    Stale,
}

/// All routes, behind the gate.
pub(super) fn router(admin: Admin, gate: Gate) -> Router {
    let routes = endpoints().into_iter().fold(Router::new(), |router, it| router.route(it.rule.path, it.handler));
    routes
        .fallback(async |uri: Uri| {
            ApiError::not_found(format!("there is no {}; is isthmusctl newer than this control plane?", uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::method(format!("{} does not take {method}", uri.path()))
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(from_fn_with_state(gate, pass))
        .with_state(admin)
}

pub(super) async fn join_token(
    State(admin): State<Admin>,
    caller: Caller,
    Path(name): Path<String>,
    Body(body): Body,
) -> Answer<TokenResponse> {
    let cluster = cluster_name(&name)?;
    let (ttl, grant) = cluster_token(&body)?;
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
    admin
        .proposer
        .by(caller.actor())
        .propose(Command::MintToken(MintToken { hash, cluster: cluster.clone(), expires_at, grant, now }))
        .await?;
    tracing::info!(%cluster, by = %caller.who(), ttl_seconds = ttl.as_secs(), "join token minted");
    Ok(Json(TokenResponse { token: token.encode(), expires_at }))
}

pub(super) async fn revoke(State(admin): State<Admin>, caller: Caller, Path(name): Path<String>) -> Answer<Revoked> {
    let cluster = cluster_name(&name)?;
    let outcome = admin.proposer.by(caller.actor()).propose(Command::Revoke { cluster: cluster.clone() }).await?;
    tracing::warn!(%cluster, by = %caller.who(), stamp = %outcome.stamp, changed = outcome.changed, "cluster revoked");
    Ok(Json(Revoked { stamp: outcome.stamp }))
}

pub(super) async fn get_status(State(admin): State<Admin>, consistency: Consistency) -> Answer<StatusView> {
    let global = admin.global(consistency).await?;
    let (heard, unasked) = admin.heard().await;
    Ok(Json(status::view(&admin.node, &global, &heard, unasked)))
}

pub(super) async fn snapshot(State(admin): State<Admin>, consistency: Consistency) -> Answer<Arc<GlobalSnapshot>> {
    Ok(Json(admin.global(consistency).await?))
}

pub(super) async fn services(State(admin): State<Admin>, consistency: Consistency) -> Answer<Vec<Arc<GlobalService>>> {
    Ok(Json(admin.global(consistency).await?.services.values().cloned().collect()))
}

pub(super) async fn availability(
    State(admin): State<Admin>,
    consistency: Consistency,
    Path(name): Path<String>,
) -> Answer<Vec<Report>> {
    let cluster = cluster_name(&name)?;
    if !admin.global(consistency).await?.clusters.contains_key(&cluster) {
        return Err(Rejection::UnknownCluster { cluster }.into());
    }
    let (heard, _) = admin.heard().await;
    Ok(Json(heard.get(&cluster).map(|heard| heard.report.availability.clone()).unwrap_or_default()))
}

/// Latest first.
pub(super) async fn events(
    State(admin): State<Admin>,
    consistency: Consistency,
    filter: EventFilter,
) -> Answer<Vec<Event>> {
    admin.wait(consistency).await?;
    let view = admin.views.borrow().clone();
    Ok(Json(view.state().events().filter(|event| filter.takes(event)).take(filter.limit).cloned().collect()))
}

pub(super) async fn diff(
    State(admin): State<Admin>,
    consistency: Consistency,
    Path((from, to)): Path<(String, String)>,
) -> Answer<Difference> {
    let (from, to) = (revision("from", &from)?, revision("to", &to)?);
    admin.wait(consistency).await?;
    let view = admin.views.borrow().clone();
    let state = view.state();
    let (before, after) = (state.settings_at(from)?, state.settings_at(to)?);
    let within = from.min(to)..from.max(to);
    let events = state.events().filter(|e| e.outcome == "changed" && within.contains(&e.before.revision)).cloned();
    let mut events: Vec<Event> = events.collect();
    events.reverse();
    Ok(Json(Difference {
        from,
        to,
        settings: (before != after).then(|| [(*before).clone(), (*after).clone()]),
        events,
    }))
}

pub(super) async fn rollback(State(admin): State<Admin>, caller: Caller, Path(to): Path<String>) -> Answer<RolledBack> {
    let to = revision("revision", &to)?;
    let outcome = admin.proposer.by(caller.actor()).propose(Command::Rollback { to }).await?;
    tracing::warn!(%to, by = %caller.who(), stamp = %outcome.stamp, changed = outcome.changed, "rolled back");
    Ok(Json(RolledBack { stamp: outcome.stamp, changed: outcome.changed }))
}

pub(super) async fn take_backup(
    State(admin): State<Admin>,
    caller: Caller,
    consistency: Consistency,
) -> Result<Bytes, ApiError> {
    admin.wait(consistency).await?;
    let view = admin.views.borrow().clone();
    let now = Timestamp(isthmus_runtime::now());
    // A large state takes a while to write.
    let written = tokio::task::spawn_blocking(move || backup::write(view.state(), now)).await;
    let bytes = written.map_err(|_| ApiError::not_ready())?.map_err(|error| match error {
        BackupError::Empty => ApiError::not_ready(),
        error => ApiError::invalid("state", error.to_string()),
    })?;
    tracing::info!(bytes = bytes.len(), by = %caller.who(), "backup taken");
    Ok(bytes.into())
}

pub(super) async fn restore(State(admin): State<Admin>, caller: Caller, Body(body): Body) -> Answer<Restored> {
    let read = tokio::task::spawn_blocking(move || backup::read(&body)).await;
    let read = read.map_err(|_| ApiError::not_ready())?;
    let (head, state) = read.map_err(|error| ApiError::invalid("body", error.to_string()))?;
    let bundle = state.global().map(|global| global.federation_bundle.clone());
    let outcome = admin.proposer.by(caller.actor()).propose(Command::Restore(Box::new(state))).await?;
    let global = admin.global(Consistency::Stale).await?;
    tracing::warn!(of = %head.stamp, stamp = %outcome.stamp, by = %caller.who(), "state restored from a backup");
    Ok(Json(Restored {
        stamp: outcome.stamp,
        of: head.stamp,
        taken_at: head.taken_at,
        same_authority: bundle.is_some_and(|bundle| bundle == global.federation_bundle),
        clusters: global.clusters.len(),
        services: global.services.len(),
    }))
}

pub(super) async fn nodes(State(admin): State<Admin>, consistency: Consistency) -> Answer<GroupStatus> {
    admin.wait(consistency).await?;
    Ok(Json(GroupStatus::of(&admin.node, &admin.group, admin.views.borrow().state())))
}

pub(super) async fn node_token(
    State(admin): State<Admin>,
    caller: Caller,
    Path(name): Path<String>,
    Body(body): Body,
) -> Answer<TokenResponse> {
    let node = node_name(&name)?;
    let ttl = seconds(&body, TOKEN_TTL, MAX_TOKEN_TTL)?;
    let now = Timestamp(isthmus_runtime::now());
    let expires_at = now + ttl;
    let token = Token::mint(TokenSpec {
        kind: TokenKind::Node,
        address: admin.advertise.to_string(),
        ca_pin: admin.authority.root_sha256(),
        cluster: NO_CLUSTER.parse().map_err(|error: IdError| ApiError::invalid("name", error.to_string()))?,
        subject: format!("cp/{node}"),
        expires_at,
    });
    let hash = TokenHash(Token::secret_hash(&token.secret));
    admin
        .proposer
        .by(caller.actor())
        .propose(Command::MintNodeToken(MintNodeToken { hash, node: node.clone(), expires_at, now }))
        .await?;
    tracing::info!(%node, by = %caller.who(), ttl_seconds = ttl.as_secs(), "node token minted");
    Ok(Json(TokenResponse { token: token.encode(), expires_at }))
}

pub(super) async fn remove_node(
    State(admin): State<Admin>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Removed> {
    let node = node_name(&name)?;
    admin.proposer.by(caller.actor()).propose(Command::RemoveNode { node: node.clone() }).await?;
    tracing::warn!(%node, by = %caller.who(), "control plane node removed");
    Ok(Json(Removed { node }))
}

impl Admin {
    pub(super) async fn wait(&self, consistency: Consistency) -> Result<(), ApiError> {
        match consistency {
            Consistency::Linearizable => Ok(self.group.barrier().await?),
            Consistency::Stale => Ok(()),
        }
    }

    /// What agents have told all nodes.
    async fn heard(&self) -> (BTreeMap<ClusterName, Heard>, Vec<String>) {
        let view = self.views.borrow().clone();
        reports::gather(&self.node, &self.status, &self.peers, view.state()).await
    }

    async fn global(&self, consistency: Consistency) -> Result<Arc<GlobalSnapshot>, ApiError> {
        self.wait(consistency).await?;
        self.views.borrow().global().cloned().ok_or_else(ApiError::not_ready)
    }
}

/// From `?consistency=stale`.
impl<S: Sync> FromRequestParts<S> for Consistency {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let query = parts.uri.query().unwrap_or_default();
        match query.split('&').find_map(|pair| pair.strip_prefix("consistency=")) {
            None | Some("linearizable") => Ok(Self::Linearizable),
            Some("stale") => Ok(Self::Stale),
            Some(_) => Err(ApiError::invalid("consistency", "use linearizable (the default) or stale")),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for EventFilter {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let mut filter = Self { limit: EVENTS, changes: false, who: None, subject: None };
        for pair in parts.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=MAX_EVENTS).contains(limit));
                    let rule = || ApiError::invalid("limit", format!("use 1 to {MAX_EVENTS}"));
                    filter.limit = limit.ok_or_else(rule)?;
                }
                "changes" => filter.changes = true,
                "who" => filter.who = Some(value.to_owned()),
                "subject" => filter.subject = Some(value.to_owned()),
                "consistency" => {}
                _ => return Err(ApiError::invalid("query", "use limit, changes, who, subject or consistency")),
            }
        }
        Ok(filter)
    }
}

fn revision(field: &'static str, text: &str) -> Result<Revision, ApiError> {
    text.parse().map(Revision).map_err(|_| ApiError::invalid(field, "a revision is a whole number, for example 42"))
}

fn node_name(text: &str) -> Result<NodeName, ApiError> {
    text.parse().map_err(|error: IdError| ApiError::invalid("name", error.to_string()))
}

pub(super) fn cluster_name(text: &str) -> Result<ClusterName, ApiError> {
    text.parse().map_err(|error: IdError| ApiError::invalid("name", error.to_string()))
}

/// From `{"ttlSeconds": n}`, or nothing for the default.
pub(super) fn seconds(body: &[u8], default: Duration, most: Duration) -> Result<Duration, ApiError> {
    if body.is_empty() {
        return Ok(default);
    }
    let request: TokenRequest = serde_json::from_slice(body)
        .map_err(|error| ApiError::invalid("body", format!("send {{\"ttlSeconds\": 900}} or nothing: {error}")))?;
    life(request.ttl_seconds, default, most)
}

/// From `{"ttlSeconds": n, "grant": {…}}`, or nothing for the default.
fn cluster_token(body: &[u8]) -> Result<(Duration, Option<ClusterGrant>), ApiError> {
    if body.is_empty() {
        return Ok((TOKEN_TTL, None));
    }
    let rule = "send {\"ttlSeconds\": 900, \"grant\": {\"exportNamespaces\": [\"shop\"]}}, either of them or nothing";
    let request: ClusterTokenRequest =
        serde_json::from_slice(body).map_err(|error| ApiError::invalid("body", format!("{rule}: {error}")))?;
    Ok((life(request.ttl_seconds, TOKEN_TTL, MAX_TOKEN_TTL)?, request.grant))
}

fn life(seconds: Option<u64>, default: Duration, most: Duration) -> Result<Duration, ApiError> {
    let ttl = seconds.map_or(default, Duration::from_secs);
    if ttl.is_zero() || ttl > most {
        return Err(ApiError::invalid("ttlSeconds", format!("use 1 to {}", most.as_secs())));
    }
    Ok(ttl)
}
