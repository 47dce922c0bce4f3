//! The list of all endpoints: what is not in it is served to nobody.

use axum::{http::header::CONTENT_TYPE, response::IntoResponse};

use super::{
    access::{
        ApiTokenView, Deleted, MintedApiToken, RoleBindingRequest, WhoAmI, api_tokens, delete_api_token,
        delete_role_binding, mint_api_token, role_binding, role_bindings, set_role_binding, who_am_i,
    },
    audit::{AuditEntry, audit},
    auth::decide::Resource::{Api, ApiTokens, Backup, Clusters, Federation, History, Nodes, RoleBindings, Settings},
    clusters::{self, Done},
    endpoint::{Endpoint, Parameter},
    openapi::DOCUMENT,
    resources::{self, ApplyAnswer, ApplyRequest, MAX_APPLY},
    routes::{
        ClusterTokenRequest, MAX_BACKUP, Removed, Restored, Revoked, RolledBack, TokenRequest, TokenResponse,
        availability, diff, events, get_status, join_token, node_token, nodes, remove_node, restore, revoke, rollback,
        services, snapshot, take_backup,
    },
};
use crate::state::RoleBinding;

const CONSISTENCY: Parameter = Parameter {
    name: "consistency",
    summary: "`linearizable` (default): all that was acknowledged before; `stale`: what this node holds",
};
const READ: &[Parameter] = &[CONSISTENCY];
const EVENTS: &[Parameter] = &[
    CONSISTENCY,
    Parameter { name: "limit", summary: "So many, the latest first; 1 to 10240, default 100" },
    Parameter { name: "changes", summary: "Only what changed the state" },
    Parameter { name: "who", summary: "Only what this caller asked" },
    Parameter { name: "subject", summary: "Only what was about this cluster, node, binding or token" },
];
const AUDIT: &[Parameter] = &[
    CONSISTENCY,
    Parameter { name: "limit", summary: "So many, the latest first; 1 to 10240, default 100" },
    Parameter { name: "who", summary: "Only what this caller asked" },
    Parameter { name: "subject", summary: "Only what was about this" },
    Parameter { name: "action", summary: "Only this verb" },
    Parameter { name: "outcome", summary: "Only with this outcome; `refused` stands for all that were" },
    Parameter { name: "since", summary: "Unix time in milliseconds, inclusive" },
    Parameter { name: "until", summary: "Unix time in milliseconds, inclusive" },
];
const VERSION: Parameter =
    Parameter { name: "If-Match", summary: "The `resourceVersion` that it must have now, in quotes" };
const RESOURCE_VERSION: &[Parameter] =
    &[Parameter { name: "resourceVersion", summary: "Only if it is at this version" }];
const CONDITIONS: &[Parameter] =
    &[VERSION, Parameter { name: "If-None-Match", summary: "`*`: there must be none of that name yet" }];

/// All of them, in the order of the documentation.
pub(super) fn endpoints() -> Vec<Endpoint> {
    vec![
        Endpoint::get("/v1/openapi.json", "get-openapi", Api, openapi)
            .summary("This document")
            .gives_told("object", "OpenAPI 3.1"),
        Endpoint::get("/v1/whoami", "who-am-i", Api, who_am_i)
            .summary("Who is calling, and its roles")
            .gives::<WhoAmI>(),
        Endpoint::get("/v1/status", "get-status", Federation, get_status)
            .summary("Clusters, their consumers, applied revisions and problems")
            .query(READ)
            .errors(&[400])
            .gives_told("object", "Stamp, node, and the clusters by name"),
        Endpoint::get("/v1/snapshot", "get-snapshot", Federation, snapshot)
            .summary("The global state, as members see it")
            .query(READ)
            .errors(&[400])
            .gives_told("object", "Stamp, settings, bundles, clusters, services"),
        Endpoint::get("/v1/services", "get-services", Federation, services)
            .summary("Global services, merged")
            .query(READ)
            .errors(&[400])
            .gives_told("array", "Global services"),
        Endpoint::get("/v1/availability/{cluster}", "get-availability", Federation, availability)
            .summary("What a cluster reports of the services that it can reach")
            .query(READ)
            .errors(&[400, 404])
            .gives_told("array", "Availability reports"),
        Endpoint::get("/v1/events", "get-events", History, events)
            .summary("What was asked of the state, and what came of it")
            .query(EVENTS)
            .errors(&[400])
            .gives_told("array", "Replicated events, latest first"),
        Endpoint::get("/v1/audit", "get-audit", History, audit)
            .summary("The same, with what this node alone has refused")
            .query(AUDIT)
            .errors(&[400])
            .gives::<Vec<AuditEntry>>(),
        Endpoint::get("/v1/diff/{from}/{to}", "diff", History, diff)
            .summary("What differs between two revisions")
            .query(READ)
            .errors(&[400, 404])
            .gives_told("object", "Settings then and then, and the events between"),
        Endpoint::get("/v1/nodes", "get-nodes", Nodes, nodes)
            .summary("The control plane's own nodes")
            .query(READ)
            .errors(&[400])
            .gives_told("object", "Who leads, and each node's role and log"),
        Endpoint::get("/v1/backup", "take-backup", Backup, take_backup)
            .summary("The whole state as one file")
            .query(READ)
            .errors(&[400])
            .gives_file("application/octet-stream"),
        Endpoint::post("/v1/restore", "restore", Backup, restore)
            .summary("Takes over a backup, while no cluster has joined")
            .takes_file("application/octet-stream", MAX_BACKUP)
            .errors(&[409])
            .gives::<Restored>(),
        Endpoint::post("/v1/rollback/{revision}", "rollback", Settings, rollback)
            .summary("Puts the settings of an earlier revision in force again")
            .errors(&[400, 404])
            .gives::<RolledBack>(),
        Endpoint::post("/v1/clusters/{name}/join-token", "mint-join-token", Clusters, join_token)
            .summary("Mints a token with which a cluster joins")
            .takes::<ClusterTokenRequest>()
            .errors(&[409, 507])
            .gives::<TokenResponse>(),
        Endpoint::get("/v1/clusters", "get-clusters", Clusters, clusters::list)
            .summary("Clusters, those that have a token and have not joined among them")
            .query(READ)
            .errors(&[400])
            .gives_told("array", "Name, state, locality, gateways, exports, conditions, grant"),
        Endpoint::get("/v1/clusters/{name}", "get-cluster", Clusters, clusters::one)
            .summary("One of them")
            .query(READ)
            .errors(&[400, 404])
            .gives_told("object", "Name, state, locality, gateways, exports, conditions, grant"),
        Endpoint::post("/v1/clusters/{name}/drain", "drain", Federation, clusters::drain)
            .summary("Sends other clusters' new traffic elsewhere, as long as anybody else can take it")
            .errors(&[400, 404, 409])
            .gives::<Done>(),
        Endpoint::post("/v1/clusters/{name}/undrain", "undrain", Federation, clusters::undrain)
            .summary("Lets other clusters' traffic come again")
            .errors(&[400, 404, 409])
            .gives::<Done>(),
        Endpoint::post(
            "/v1/clusters/{name}/confirm-withdrawal",
            "confirm-withdrawal",
            Federation,
            clusters::confirm_withdrawal,
        )
        .summary("Believes that a cluster meant to withdraw most of its exports at once")
        .errors(&[400, 404, 409])
        .gives::<Done>(),
        Endpoint::post("/v1/apply", "apply", Settings, resources::apply)
            .summary("Puts in force, or deletes, what files declare: all of it or nothing")
            .takes::<ApplyRequest>()
            .at_most(MAX_APPLY)
            .errors(&[400, 404, 409, 507])
            .gives::<ApplyAnswer>(),
        Endpoint::get("/v1/resources/{kind}", "get-resources", Federation, resources::list)
            .summary("All objects of a kind that can be declared, as they are in force")
            .query(READ)
            .errors(&[400, 404])
            .gives_told("array", "Objects, as `apply` takes them"),
        Endpoint::get("/v1/resources/{kind}/{name}", "get-resource", Federation, resources::one)
            .summary("One of them")
            .query(READ)
            .errors(&[400, 404])
            .gives_told("object", "The object, as `apply` takes it"),
        Endpoint::delete("/v1/resources/{kind}/{name}", "delete-resource", Settings, resources::delete)
            .summary("Goes back to the default of what was declared")
            .query(RESOURCE_VERSION)
            .errors(&[400, 404, 409])
            .gives::<ApplyAnswer>(),
        Endpoint::post("/v1/clusters/{name}/revoke", "revoke", Clusters, revoke)
            .summary("Cuts a cluster off for good")
            .errors(&[400, 404])
            .gives::<Revoked>(),
        Endpoint::post("/v1/nodes/{name}/join-token", "mint-node-token", Nodes, node_token)
            .summary("Mints a token with which a node joins the control plane")
            .takes::<TokenRequest>()
            .errors(&[409, 507])
            .gives::<TokenResponse>(),
        Endpoint::delete("/v1/nodes/{name}", "remove-node", Nodes, remove_node)
            .summary("Takes a node out of the control plane for good")
            .errors(&[400, 404, 409])
            .gives::<Removed>(),
        Endpoint::get("/v1/role-bindings", "get-role-bindings", RoleBindings, role_bindings)
            .summary("All role bindings")
            .query(READ)
            .errors(&[400])
            .gives::<Vec<RoleBinding>>(),
        Endpoint::get("/v1/role-bindings/{name}", "get-role-binding", RoleBindings, role_binding)
            .summary("One of them; its version is also the entity tag")
            .query(READ)
            .errors(&[400, 404])
            .gives::<RoleBinding>(),
        Endpoint::put("/v1/role-bindings/{name}", "set-role-binding", RoleBindings, set_role_binding)
            .summary("Makes or replaces one")
            .headers(CONDITIONS)
            .takes::<RoleBindingRequest>()
            .errors(&[409, 507])
            .gives::<RoleBinding>(),
        Endpoint::delete("/v1/role-bindings/{name}", "delete-role-binding", RoleBindings, delete_role_binding)
            .summary("Removes one")
            .headers(&[VERSION])
            .errors(&[400, 404, 409])
            .gives::<Deleted>(),
        Endpoint::get("/v1/tokens", "get-api-tokens", ApiTokens, api_tokens)
            .summary("API tokens, without their secrets")
            .query(READ)
            .errors(&[400])
            .gives::<Vec<ApiTokenView>>(),
        Endpoint::post("/v1/tokens/{name}", "mint-api-token", ApiTokens, mint_api_token)
            .summary("Mints one; its secret is told this once")
            .takes::<TokenRequest>()
            .errors(&[409, 507])
            .gives::<MintedApiToken>(),
        Endpoint::delete("/v1/tokens/{name}", "delete-api-token", ApiTokens, delete_api_token)
            .summary("Makes one worthless")
            .errors(&[400, 404])
            .gives::<Deleted>(),
    ]
}

async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.as_str())
}
