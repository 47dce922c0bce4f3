//! Resources: read, applied as whole files (all or none, with all problems at once), deleted.

use axum::{
    Json,
    extract::{Path, RawQuery, State},
};
use isthmus_api::manifest::{
    ManifestError,
    declared::{Declaration, Declared, Kind, SETTINGS, parse},
};
use isthmus_model::{
    global::Settings,
    grant::ClusterGrant,
    ids::{ClusterName, IdError, Revision, Stamp},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Admin,
    auth::Caller,
    error::{ApiError, Body, Place},
    openapi::StampShape,
    routes::{Answer, Consistency},
};
use crate::state::{Applied, Apply, Command, Resource, ResourceKey, State as Replicated, Write};

/// Largest set of files.
pub(super) const MAX_APPLY: usize = 4 << 20;
/// Problems that are told.
const MAX_PROBLEMS: usize = 100;

/// What to put in force.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ApplyRequest {
    /// In this order.
    files: Vec<ManifestFile>,
    /// Only say what would happen.
    #[serde(default)]
    dry_run: bool,
    /// Delete what the files name, rather than create it.
    #[serde(default)]
    delete: bool,
}

/// YAML or JSON, one document or several.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ManifestFile {
    /// For messages.
    name: String,
    text: String,
}

/// What became of it.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ApplyAnswer {
    /// Where the state stands now.
    #[schemars(with = "StampShape")]
    stamp: Stamp,
    dry_run: bool,
    results: Vec<ApplyResult>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ApplyResult {
    kind: &'static str,
    name: String,
    /// `created`, `configured`, `unchanged`, `deleted`.
    outcome: &'static str,
    /// The object before, if it was declared, and after, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<Value>,
}

pub(super) async fn apply(State(admin): State<Admin>, caller: Caller, Body(body): Body) -> Answer<ApplyAnswer> {
    let request: ApplyRequest = serde_json::from_slice(&body).map_err(|error| {
        ApiError::invalid("body", format!("send {{\"files\": [{{\"name\": …, \"text\": …}}]}}: {error}"))
    })?;
    let declared = read(&request.files)?;
    admin.wait(Consistency::Linearizable).await?;
    let state = admin.views.borrow().clone();
    let writes = declared.iter().map(|declared| write(declared, request.delete)).collect();
    let wanted = Apply { writes };
    let previewed = state.state().preview(&wanted)?;
    if request.dry_run {
        let results = previewed.iter().map(result).collect();
        return Ok(Json(ApplyAnswer { stamp: state.state().stamp(), dry_run: true, results }));
    }
    let outcome = admin.proposer.by(caller.actor()).propose(Command::Apply(wanted)).await?;
    tracing::info!(by = %caller.who(), stamp = %outcome.stamp, changed = outcome.changed, "resources applied");
    Ok(Json(ApplyAnswer { stamp: outcome.stamp, dry_run: false, results: previewed.iter().map(result).collect() }))
}

pub(super) async fn list(
    State(admin): State<Admin>,
    consistency: Consistency,
    Path(kind): Path<String>,
) -> Answer<Vec<Value>> {
    let kind = find(&kind)?;
    admin.wait(consistency).await?;
    let view = admin.views.borrow().clone();
    let state = view.state();
    let keys: Vec<ResourceKey> = match kind {
        Kind::Settings => vec![ResourceKey::Settings],
        Kind::ClusterGrant => {
            let members = state.global().into_iter().flat_map(|global| {
                global.clusters.values().filter(|info| info.state.is_member()).map(|info| &info.name)
            });
            let mut names: Vec<&ClusterName> = members.chain(state.promised().keys()).collect();
            names.sort_unstable();
            names.into_iter().cloned().map(ResourceKey::ClusterGrant).collect()
        }
    };
    Ok(Json(keys.iter().filter_map(|key| object(state, key)).collect()))
}

pub(super) async fn one(
    State(admin): State<Admin>,
    consistency: Consistency,
    Path((kind, name)): Path<(String, String)>,
) -> Answer<Value> {
    let key = key(&kind, &name)?;
    admin.wait(consistency).await?;
    let view = admin.views.borrow().clone();
    object(view.state(), &key).map(Json).ok_or_else(|| ApiError::not_found(format!("there is no {key}")))
}

pub(super) async fn delete(
    State(admin): State<Admin>,
    caller: Caller,
    Path((kind, name)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Answer<ApplyAnswer> {
    let key = key(&kind, &name)?;
    let expected =
        match query.as_deref().unwrap_or_default().split('&').find_map(|q| q.strip_prefix("resourceVersion=")) {
            None => None,
            Some(version) => {
                let rule = |_| ApiError::invalid("resourceVersion", "use the number that `get -o yaml` printed");
                Some(Revision(version.parse().map_err(rule)?))
            }
        };
    admin.wait(Consistency::Linearizable).await?;
    let wanted = Apply { writes: vec![Write::Delete { key, expected }] };
    let previewed = admin.views.borrow().state().preview(&wanted)?;
    let outcome = admin.proposer.by(caller.actor()).propose(Command::Apply(wanted)).await?;
    let results = previewed.iter().map(result).collect();
    Ok(Json(ApplyAnswer { stamp: outcome.stamp, dry_run: false, results }))
}

/// All objects of all files, or all that is wrong with them.
fn read(files: &[ManifestFile]) -> Result<Vec<Declared>, ApiError> {
    let (mut declared, mut problems): (Vec<Declared>, Vec<Place>) = (Vec::new(), Vec::new());
    for file in files {
        for read in parse(&file.name, &file.text) {
            match read {
                Ok(object) => {
                    let twin = declared.iter().find(|other: &&Declared| {
                        (other.declaration.kind(), other.declaration.name())
                            == (object.declaration.kind(), object.declaration.name())
                    });
                    problems.extend(twin.map(|twin| twice(&object, twin)));
                    declared.push(object);
                }
                Err(error) => problems.push(place(error)),
            }
        }
    }
    if !problems.is_empty() {
        problems.truncate(MAX_PROBLEMS);
        return Err(ApiError::problems(problems));
    }
    if declared.is_empty() {
        return Err(ApiError::invalid("files", "there is no object in them"));
    }
    Ok(declared)
}

fn place(error: ManifestError) -> Place {
    Place { file: error.file, line: error.line, field: error.field, message: error.message }
}

fn twice(object: &Declared, before: &Declared) -> Place {
    let (file, line) = object.at.clone();
    let (other, other_line) = &before.at;
    let declaration = &object.declaration;
    let message =
        format!("{}/{} is there twice; first at {other}:{other_line}", declaration.kind().name(), declaration.name());
    Place { file, line, field: "metadata.name".to_owned(), message }
}

fn write(declared: &Declared, delete: bool) -> Write {
    let resource = match declared.declaration.clone() {
        Declaration::Settings(settings) => Resource::Settings(settings),
        Declaration::ClusterGrant(cluster, grant) => Resource::ClusterGrant(cluster, grant),
    };
    let expected = declared.version.map(Revision);
    if delete { Write::Delete { key: resource.key(), expected } } else { Write::Put { resource, expected } }
}

fn result(applied: &Applied) -> ApplyResult {
    let outcome = match (&applied.before, &applied.after) {
        (before, after) if before == after => "unchanged",
        (None, _) => "created",
        (Some(_), Some(_)) => "configured",
        (Some(_), None) => "deleted",
    };
    let (kind, name) = match &applied.key {
        ResourceKey::Settings => (Kind::Settings, SETTINGS.to_owned()),
        ResourceKey::ClusterGrant(cluster) => (Kind::ClusterGrant, cluster.to_string()),
    };
    let shown = |resource: &Option<Resource>| resource.clone().map(|resource| declaration(resource).to_json(None));
    let (before, after) = (shown(&applied.before), shown(&applied.after));
    ApplyResult { kind: kind.name(), name, outcome, before, after }
}

/// The resource as it is in force; without a version if nobody declared it.
fn object(state: &Replicated, key: &ResourceKey) -> Option<Value> {
    if let Some((resource, version)) = state.declared(key) {
        return Some(declaration(resource).to_json(Some(version.0)));
    }
    let default = match key {
        ResourceKey::Settings => {
            Declaration::Settings(state.global().map_or_else(Settings::default, |g| g.settings.clone()))
        }
        ResourceKey::ClusterGrant(cluster) => {
            let info = state.global()?.active_cluster(cluster)?;
            Declaration::ClusterGrant(cluster.clone(), ClusterGrant::clone(&info.grant))
        }
    };
    Some(default.to_json(None))
}

fn declaration(resource: Resource) -> Declaration {
    match resource {
        Resource::Settings(settings) => Declaration::Settings(settings),
        Resource::ClusterGrant(cluster, grant) => Declaration::ClusterGrant(cluster, grant),
    }
}

fn find(kind: &str) -> Result<Kind, ApiError> {
    Kind::find(kind).ok_or_else(|| {
        let names: Vec<&str> = Kind::ALL.into_iter().map(Kind::name).collect();
        ApiError::not_found(format!("there is no kind {kind:.64}; there are {}", names.join(", ")))
    })
}

fn key(kind: &str, name: &str) -> Result<ResourceKey, ApiError> {
    match find(kind)? {
        Kind::Settings if name == SETTINGS => Ok(ResourceKey::Settings),
        Kind::Settings => Err(ApiError::not_found(format!("there is one Settings, named {SETTINGS}"))),
        Kind::ClusterGrant => {
            let cluster = name.parse().map_err(|error: IdError| ApiError::invalid("name", error.to_string()))?;
            Ok(ResourceKey::ClusterGrant(cluster))
        }
    }
}
