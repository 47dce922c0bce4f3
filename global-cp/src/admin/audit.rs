//! The audit log: the replicated events and this node's journal as one list.
//!
//! What reached the log of the control plane is the same on every node; what was refused before, and who took a backup, is
//! told by the node at which it happened.

use axum::{
    Json,
    extract::{FromRequestParts, Query, State},
    http::request::Parts,
};
use isthmus_model::{ids::Stamp, time::Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Admin,
    auth::journal::Entry,
    error::ApiError,
    routes::{Answer, Consistency, EVENTS, MAX_EVENTS},
};
use crate::state::Event;

/// Outcomes of what was done.
const DONE: [&str; 4] = ["changed", "unchanged", "done", "allowed"];

/// Which entries are asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Filter {
    who: Option<String>,
    subject: Option<String>,
    action: Option<String>,
    outcome: Option<String>,
    /// Unix time in milliseconds, inclusive.
    since: Option<u64>,
    until: Option<u64>,
    limit: Option<usize>,
    /// Read by [`Consistency`].
    #[serde(rename = "consistency")]
    _consistency: Option<String>,
}

/// One attempt, or many alike.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct AuditEntry {
    /// Unix time in milliseconds.
    #[schemars(with = "u64")]
    at: Timestamp,
    /// A SPIFFE ID, `token:NAME` or `user:NAME`; empty for a stranger.
    who: String,
    /// IP and port.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schemars(default)]
    from: String,
    /// A verb: `revoke`.
    action: String,
    /// What it was about.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schemars(default)]
    subject: String,
    /// `changed`, `unchanged`, `done`, `allowed`, or the code of the refusal.
    outcome: String,
    /// In words, if it was refused.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schemars(default)]
    reason: String,
    /// How many attempts it stands for.
    count: u64,
    /// Where the state stood before.
    #[schemars(with = "super::openapi::StampShape")]
    before: Stamp,
    /// And after it.
    #[schemars(with = "super::openapi::StampShape")]
    after: Stamp,
    /// Of a replicated event: counts all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    number: Option<u64>,
    /// Of what only one node knows: which.
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
}

/// Latest first.
pub(super) async fn audit(
    State(admin): State<Admin>,
    consistency: Consistency,
    filter: Filter,
) -> Answer<Vec<AuditEntry>> {
    admin.wait(consistency).await?;
    let limit = filter.limit.unwrap_or(EVENTS);
    let view = admin.views.borrow().clone();
    let replicated = view.state().events().map(|event| AuditEntry::replicated(event.clone()));
    let mut entries: Vec<AuditEntry> = replicated.filter(|entry| filter.takes(entry)).take(limit).collect();
    let (node, wanted) = (admin.node.to_string(), filter.clone());
    let of_node = node.clone();
    let local = admin
        .journal
        .latest(limit, move |entry| wanted.takes(&AuditEntry::of_node(entry.clone(), &of_node)))
        .await
        .map_err(|error| {
            tracing::error!(%error, "cannot read the audit log of this node");
            ApiError::internal()
        })?;
    entries.extend(local.into_iter().map(|entry| AuditEntry::of_node(entry, &node)));
    entries.sort_by(|a, b| b.at.cmp(&a.at).then(b.number.cmp(&a.number)));
    entries.truncate(limit);
    Ok(Json(entries))
}

impl Filter {
    fn takes(&self, entry: &AuditEntry) -> bool {
        let is = |wanted: &Option<String>, text: &str| wanted.as_ref().is_none_or(|wanted| wanted == text);
        let outcome = match self.outcome.as_deref() {
            Some("refused") => !DONE.contains(&entry.outcome.as_str()),
            _ => is(&self.outcome, &entry.outcome),
        };
        outcome
            && is(&self.who, &entry.who)
            && is(&self.subject, &entry.subject)
            && is(&self.action, &entry.action)
            && self.since.is_none_or(|since| entry.at.0 >= since)
            && self.until.is_none_or(|until| entry.at.0 <= until)
    }
}

impl AuditEntry {
    fn replicated(event: Event) -> Self {
        Self {
            at: event.at,
            who: event.by.who,
            from: event.by.from,
            action: event.action,
            subject: event.subject,
            outcome: event.outcome,
            reason: event.reason,
            count: 1,
            before: event.before,
            after: event.after,
            number: Some(event.number),
            node: None,
        }
    }

    fn of_node(entry: Entry, node: &str) -> Self {
        Self {
            at: entry.at,
            who: entry.who,
            from: entry.from,
            action: entry.action,
            subject: entry.subject,
            outcome: entry.outcome,
            reason: entry.reason,
            count: entry.count,
            before: entry.before,
            after: entry.after,
            number: None,
            node: Some(node.to_owned()),
        }
    }
}

impl<S: Sync + Send> FromRequestParts<S> for Filter {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let read = Query::<Self>::from_request_parts(parts, state).await;
        let Query(filter) = read.map_err(|error| ApiError::invalid("query", error.body_text()))?;
        if filter.limit.is_some_and(|limit| !(1..=MAX_EVENTS).contains(&limit)) {
            return Err(ApiError::invalid("limit", format!("use 1 to {MAX_EVENTS}")));
        }
        Ok(filter)
    }
}
