//! Clusters as operators see them: those that take part, those that are expected, and what may be done to each.

use std::collections::BTreeMap;

use axum::{
    Json,
    extract::{Path, State},
};
use isthmus_model::{
    global::{ClusterInfo, Locality},
    grant::ClusterGrant,
    ids::{ClusterName, ServiceName, Stamp, TrustDomain},
    service::GatewayAddress,
    time::Timestamp,
};
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    Admin,
    auth::Caller,
    openapi::StampShape,
    routes::{Answer, Consistency, cluster_name},
};
use crate::state::{Command, ExportCondition, HeldWithdrawal, Rejection, State as Replicated};

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Cluster {
    name: ClusterName,
    /// `pending` (it has a join token), `active`, `draining`, `revoked`.
    state: &'static str,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    member: Option<Member>,
    /// When the last of its unused tokens ends, in Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_expires_at: Option<Timestamp>,
    /// What it may do, or may once it has joined, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    grant: Option<ClusterGrant>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Member {
    index: u16,
    locality: Locality,
    trust_domain: TrustDomain,
    gateways: Vec<GatewayAddress>,
    /// Of its exports those that others see.
    exports: Vec<ServiceName>,
    /// What it withdrew, and is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    held_withdrawal: Option<HeldWithdrawal>,
    /// What is the matter with its exports.
    conditions: Vec<ExportCondition>,
}

/// Where the state stands, and whether it had to change for that.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Done {
    #[schemars(with = "StampShape")]
    stamp: Stamp,
    changed: bool,
}

pub(super) async fn list(State(admin): State<Admin>, consistency: Consistency) -> Answer<Vec<Cluster>> {
    admin.wait(consistency).await?;
    let view = admin.views.borrow().clone();
    Ok(Json(all(view.state()).into_values().collect()))
}

pub(super) async fn one(
    State(admin): State<Admin>,
    consistency: Consistency,
    Path(name): Path<String>,
) -> Answer<Cluster> {
    let cluster = cluster_name(&name)?;
    admin.wait(consistency).await?;
    let view = admin.views.borrow().clone();
    let found = all(view.state()).remove(&cluster);
    found.map(Json).ok_or_else(|| Rejection::UnknownCluster { cluster }.into())
}

pub(super) async fn drain(admin: State<Admin>, caller: Caller, Path(name): Path<String>) -> Answer<Done> {
    let cluster = cluster_name(&name)?;
    change(&admin, &caller, Command::Drain { cluster, drain: true }).await
}

pub(super) async fn undrain(admin: State<Admin>, caller: Caller, Path(name): Path<String>) -> Answer<Done> {
    let cluster = cluster_name(&name)?;
    change(&admin, &caller, Command::Drain { cluster, drain: false }).await
}

pub(super) async fn confirm_withdrawal(admin: State<Admin>, caller: Caller, Path(name): Path<String>) -> Answer<Done> {
    let cluster = cluster_name(&name)?;
    change(&admin, &caller, Command::ConfirmWithdrawal { cluster }).await
}

async fn change(admin: &Admin, caller: &Caller, command: Command) -> Answer<Done> {
    let outcome = admin.proposer.by(caller.actor()).propose(command).await?;
    Ok(Json(Done { stamp: outcome.stamp, changed: outcome.changed }))
}

fn all(state: &Replicated) -> BTreeMap<ClusterName, Cluster> {
    let mut all = BTreeMap::new();
    let Some(global) = state.global() else { return all };
    let mut exports: BTreeMap<&ClusterName, Vec<ServiceName>> = BTreeMap::new();
    for service in global.services.values() {
        for cluster in service.exporters.keys() {
            exports.entry(cluster).or_default().push(service.name.clone());
        }
    }
    for info in global.clusters.values() {
        let exports = exports.remove(&info.name).unwrap_or_default();
        all.insert(info.name.clone(), member(state, info, exports));
    }
    for (name, expires_at) in state.pending(Timestamp(isthmus_runtime::now())) {
        let cluster = Cluster {
            state: "pending",
            member: None,
            token_expires_at: Some(expires_at),
            grant: state.promised().get(&name).cloned(),
            name: name.clone(),
        };
        all.insert(name, cluster);
    }
    all
}

fn member(state: &Replicated, info: &ClusterInfo, exports: Vec<ServiceName>) -> Cluster {
    let member = Member {
        index: info.index.0,
        locality: info.locality.clone(),
        trust_domain: info.bundle.trust_domain.clone(),
        gateways: info.gateways.clone(),
        exports,
        held_withdrawal: state.held_withdrawal(&info.name).cloned(),
        conditions: state.conditions(&info.name),
    };
    Cluster {
        name: info.name.clone(),
        state: info.state.label(),
        member: Some(member),
        token_expires_at: None,
        grant: Some(info.grant.clone()),
    }
}
