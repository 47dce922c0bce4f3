//! Role bindings, API tokens, and who one is: the part of the admin API that decides who may use the rest.
//!
//! What a token's secret is, is told once, to who minted it.

use axum::{
    Json,
    extract::{Path, State},
    http::{
        HeaderMap, HeaderName,
        header::{ETAG, IF_MATCH, IF_NONE_MATCH},
    },
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use isthmus_identity::token::Token;
use isthmus_model::time::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Duration;

use super::{
    Admin,
    auth::{
        Caller,
        principal::{API_TOKEN, Principal},
    },
    error::{ApiError, Body},
    routes::{Answer, Consistency, seconds},
};
use crate::state::{AccessName, Command, MintApiToken, Rejection, Role, RoleBinding, TokenHash};

/// Life of an API token, unless the request says otherwise, and at most.
const TTL: Duration = Duration::from_secs(90 * 86_400);
const MAX_TTL: Duration = Duration::from_secs(366 * 86_400);

/// Who is calling, as the control plane sees it.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct WhoAmI {
    /// As events name it.
    who: String,
    /// `certificate`, `apiToken` or `oidc`.
    kind: &'static str,
    groups: Vec<String>,
    /// The control plane's own administrator, who needs no binding.
    root: bool,
    roles: Vec<HeldRole>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct HeldRole {
    role: Role,
    namespaces: Vec<String>,
}

/// A token, without its secret.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ApiTokenView {
    name: AccessName,
    /// Unix time in milliseconds.
    #[schemars(with = "u64")]
    created_at: Timestamp,
    /// Unix time in milliseconds.
    #[schemars(with = "u64")]
    expires_at: Timestamp,
    /// It is of no use any more.
    expired: bool,
}

/// A token, with its secret.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct MintedApiToken {
    name: AccessName,
    /// To be sent as `Authorization: Bearer …`. It is told this once.
    token: String,
    /// Unix time in milliseconds.
    #[schemars(with = "u64")]
    expires_at: Timestamp,
}

/// What was removed.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Deleted {
    deleted: AccessName,
}

/// A binding, as it is sent: its name is in the path.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RoleBindingRequest {
    /// If there, that of the path.
    name: Option<AccessName>,
    subjects: Vec<crate::state::Subject>,
    role: Role,
    /// Where an operator may change things; `["*"]`, the default, is everywhere.
    namespaces: Option<Vec<String>>,
    /// The version that it must have now. `If-Match` says the same.
    #[serde(default)]
    resource_version: u64,
}

pub(super) async fn who_am_i(caller: Caller) -> Json<WhoAmI> {
    let (kind, groups) = match &*caller.principal {
        Principal::Spiffe { .. } => ("certificate", Vec::new()),
        Principal::Token { .. } => ("apiToken", Vec::new()),
        Principal::User { groups, .. } => ("oidc", groups.clone()),
    };
    let roles = caller.roles.iter().map(|held| HeldRole { role: held.role, namespaces: held.namespaces.clone() });
    let roles = roles.collect();
    Json(WhoAmI { who: caller.who(), kind, groups, root: caller.principal.is_root(), roles })
}

pub(super) async fn role_bindings(State(admin): State<Admin>, consistency: Consistency) -> Answer<Vec<RoleBinding>> {
    admin.wait(consistency).await?;
    let access = admin.views.borrow().state().access().clone();
    Ok(Json(access.bindings().values().cloned().collect()))
}

pub(super) async fn role_binding(
    State(admin): State<Admin>,
    consistency: Consistency,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let name = access_name(&name)?;
    admin.wait(consistency).await?;
    tagged(&admin, &name)
}

pub(super) async fn set_role_binding(
    State(admin): State<Admin>,
    caller: Caller,
    Path(name): Path<String>,
    headers: HeaderMap,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let name = access_name(&name)?;
    let request: RoleBindingRequest =
        serde_json::from_slice(&body).map_err(|error| ApiError::invalid("body", error.to_string()))?;
    if request.name.is_some_and(|told| told != name) {
        return Err(ApiError::invalid("name", format!("it is not that of the path, {name}")));
    }
    let told = Some(request.resource_version).filter(|version| *version > 0);
    let expected = expected(&headers)?.or(told);
    let binding = RoleBinding {
        name: name.clone(),
        subjects: request.subjects,
        role: request.role,
        namespaces: request.namespaces.unwrap_or_else(|| vec![crate::state::access::EVERYWHERE.to_owned()]),
        resource_version: 0,
    };
    let role = binding.role;
    admin.proposer.by(caller.actor()).propose(Command::SetRoleBinding { binding, expected }).await?;
    tracing::warn!(binding = %name, %role, by = %caller.who(), "role binding set");
    tagged(&admin, &name)
}

pub(super) async fn delete_role_binding(
    State(admin): State<Admin>,
    caller: Caller,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Answer<Deleted> {
    let (name, expected) = (access_name(&name)?, expected(&headers)?);
    let command = Command::DeleteRoleBinding { name: name.clone(), expected };
    admin.proposer.by(caller.actor()).propose(command).await?;
    tracing::warn!(binding = %name, by = %caller.who(), "role binding deleted");
    Ok(Json(Deleted { deleted: name }))
}

pub(super) async fn api_tokens(State(admin): State<Admin>, consistency: Consistency) -> Answer<Vec<ApiTokenView>> {
    admin.wait(consistency).await?;
    let access = admin.views.borrow().state().access().clone();
    let now = Timestamp(isthmus_runtime::now());
    let view = |(name, token): (&AccessName, &crate::state::ApiToken)| ApiTokenView {
        name: name.clone(),
        created_at: token.created_at,
        expires_at: token.expires_at,
        expired: now >= token.expires_at,
    };
    Ok(Json(access.tokens().iter().map(view).collect()))
}

pub(super) async fn mint_api_token(
    State(admin): State<Admin>,
    caller: Caller,
    Path(name): Path<String>,
    Body(body): Body,
) -> Answer<MintedApiToken> {
    let name = access_name(&name)?;
    let ttl = seconds(&body, TTL, MAX_TTL)?;
    let now = Timestamp(isthmus_runtime::now());
    let expires_at = now + ttl;
    let secret = URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
    let hash = TokenHash(Token::secret_hash(&secret));
    let mint = MintApiToken { name: name.clone(), hash, expires_at, now };
    admin.proposer.by(caller.actor()).propose(Command::MintApiToken(mint)).await?;
    tracing::warn!(token = %name, by = %caller.who(), ttl_seconds = ttl.as_secs(), "API token minted");
    Ok(Json(MintedApiToken { token: format!("{API_TOKEN}{name}.{secret}"), name, expires_at }))
}

pub(super) async fn delete_api_token(
    State(admin): State<Admin>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Deleted> {
    let name = access_name(&name)?;
    admin.proposer.by(caller.actor()).propose(Command::DeleteApiToken { name: name.clone() }).await?;
    tracing::warn!(token = %name, by = %caller.who(), "API token deleted");
    Ok(Json(Deleted { deleted: name }))
}

/// The binding, with its version as an entity tag.
fn tagged(admin: &Admin, name: &AccessName) -> Result<Response, ApiError> {
    let access = admin.views.borrow().state().access().clone();
    let binding = access.bindings().get(name).ok_or_else(|| Rejection::UnknownRoleBinding { name: name.clone() })?;
    Ok(([(ETAG, format!("\"{}\"", binding.resource_version))], Json(binding)).into_response())
}

/// From `If-Match: "7"`, or `If-None-Match: *` for what must not be there yet.
fn expected(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or_default().trim());
    match (text(IF_MATCH), text(IF_NONE_MATCH)) {
        (None, None) => Ok(None),
        (None, Some("*")) => Ok(Some(0)),
        (Some(tag), None) => {
            let version = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).unwrap_or(tag).parse();
            version.map(Some).map_err(|_| ApiError::invalid("If-Match", "send the resourceVersion, for example \"7\""))
        }
        _ => Err(ApiError::invalid("If-None-Match", "send If-Match: \"VERSION\", or If-None-Match: *, or neither")),
    }
}

fn access_name(text: &str) -> Result<AccessName, ApiError> {
    text.parse().map_err(|error: crate::state::access::NotALabel| ApiError::invalid("name", error.to_string()))
}
