//! The admin REST's answers, as far as this program reads them. Unknown fields are ignored, so that an older
//! `isthmusctl` can look at a newer control plane.

use isthmus_model::{grant::ClusterGrant, ids::ServiceName, service::GatewayAddress};
use serde::{Deserialize, Serialize};

/// `GET /v1/status`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Status {
    pub(crate) federation: String,
    pub(crate) stamp: Stamp,
    pub(crate) node: String,
    /// Nodes that could not be asked what agents told them.
    #[serde(default)]
    pub(crate) unasked: Vec<String>,
    #[serde(default)]
    pub(crate) clusters: Vec<Cluster>,
}

/// `GET /v1/nodes`: the control plane's group as one of its nodes sees it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Group {
    #[serde(default)]
    pub(crate) leader: Option<String>,
    #[serde(default)]
    pub(crate) term: u64,
    /// The last entry of the answering node's log.
    #[serde(default)]
    pub(crate) last_log_index: u64,
    #[serde(default)]
    pub(crate) nodes: Vec<Node>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) id: u64,
    #[serde(default)]
    pub(crate) address: String,
    /// `leader`, `voter`, `learner` or `joining`.
    pub(crate) role: String,
    /// The last entry that it is known to hold.
    #[serde(default)]
    pub(crate) log_index: Option<u64>,
}

impl Node {
    pub(crate) fn votes(&self) -> bool {
        matches!(self.role.as_str(), "leader" | "voter")
    }
}

/// One of `GET /v1/events`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Event {
    /// Unix time in milliseconds.
    pub(crate) at: u64,
    pub(crate) who: String,
    pub(crate) action: String,
    #[serde(default)]
    pub(crate) subject: String,
    /// `changed`, `unchanged`, or the code of a refusal.
    pub(crate) outcome: String,
    #[serde(default)]
    pub(crate) reason: String,
    pub(crate) after: Stamp,
}

/// `GET /v1/diff/{from}/{to}`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Difference {
    #[serde(default)]
    pub(crate) settings: Option<[serde_json::Value; 2]>,
    pub(crate) events: Vec<Event>,
}

/// `POST /v1/rollback/{revision}`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct RolledBack {
    pub(crate) stamp: Stamp,
    pub(crate) changed: bool,
}

/// `POST /v1/restore`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Restored {
    pub(crate) stamp: Stamp,
    pub(crate) of: Stamp,
    pub(crate) same_authority: bool,
    pub(crate) clusters: usize,
    pub(crate) services: usize,
}

/// `DELETE /v1/nodes/{name}`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Removed {
    pub(crate) node: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Cluster {
    pub(crate) name: String,
    pub(crate) state: String,
    #[serde(default)]
    pub(crate) region: String,
    #[serde(default)]
    pub(crate) zone: String,
    #[serde(default)]
    pub(crate) session: Option<Session>,
    #[serde(default)]
    pub(crate) consumers: Vec<Consumer>,
    #[serde(default)]
    pub(crate) problems: Vec<Problem>,
    #[serde(default)]
    pub(crate) tunnels: Vec<Tunnel>,
}

/// What one of the cluster's gateways says of its link to one of another cluster's.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Tunnel {
    /// The near gateway.
    pub(crate) from: String,
    /// The far cluster, and its gateway.
    pub(crate) cluster: String,
    pub(crate) gateway: String,
    pub(crate) up: bool,
    #[serde(default)]
    pub(crate) rtt_us: u32,
    #[serde(default)]
    pub(crate) transport: String,
    #[serde(default)]
    pub(crate) downgraded: bool,
    #[serde(default)]
    pub(crate) loss_ppm: u32,
    #[serde(default)]
    pub(crate) cwnd_bytes: u64,
    #[serde(default)]
    pub(crate) dial_error: String,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Session {
    pub(crate) connected: bool,
    /// Unix time in milliseconds; 0: never.
    #[serde(default)]
    pub(crate) last_seen_ms: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Consumer {
    pub(crate) kind: String,
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) applied: Option<Stamp>,
    pub(crate) connected: bool,
    #[serde(default)]
    pub(crate) lag_revisions: u64,
    #[serde(default)]
    pub(crate) problems: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Problem {
    pub(crate) at: String,
    #[serde(default)]
    pub(crate) field: String,
    pub(crate) message: String,
}

/// Ordered as [`isthmus_model::ids::Stamp`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) epoch: u64,
    pub(crate) revision: u64,
}

/// One of `GET /v1/clusters`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NamedCluster {
    pub(crate) name: String,
    /// `pending`, `active`, `draining` or `revoked`.
    pub(crate) state: String,
    /// Absent while it is pending.
    #[serde(flatten)]
    pub(crate) member: Option<Member>,
    /// Unix time in milliseconds.
    #[serde(default)]
    pub(crate) token_expires_at: Option<u64>,
    #[serde(default)]
    pub(crate) grant: serde_json::Value,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Member {
    pub(crate) index: u16,
    pub(crate) locality: Locality,
    pub(crate) trust_domain: String,
    #[serde(default)]
    pub(crate) gateways: Vec<GatewayAddress>,
    #[serde(default)]
    pub(crate) exports: Vec<ServiceName>,
    #[serde(default)]
    pub(crate) held_withdrawal: Option<HeldWithdrawal>,
    #[serde(default)]
    pub(crate) conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Locality {
    #[serde(default)]
    pub(crate) region: String,
    #[serde(default)]
    pub(crate) zone: String,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct HeldWithdrawal {
    /// Unix time in milliseconds.
    pub(crate) since: u64,
    pub(crate) services: Vec<ServiceName>,
}

/// What is the matter with an export.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Condition {
    /// Absent: with all of them.
    #[serde(default)]
    pub(crate) service: Option<String>,
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// `POST /v1/clusters/{name}/drain` and others.
#[derive(Debug, Deserialize)]
pub(crate) struct Changed {
    pub(crate) stamp: Stamp,
    pub(crate) changed: bool,
}

/// `POST /v1/apply`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ApplyRequest {
    pub(crate) files: Vec<ApplyFile>,
    pub(crate) dry_run: bool,
    pub(crate) delete: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct ApplyFile {
    /// For messages.
    pub(crate) name: String,
    pub(crate) text: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ApplyAnswer {
    pub(crate) stamp: Stamp,
    #[serde(default)]
    pub(crate) dry_run: bool,
    pub(crate) results: Vec<ApplyResult>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ApplyResult {
    pub(crate) kind: String,
    pub(crate) name: String,
    /// `created`, `configured`, `unchanged` or `deleted`.
    pub(crate) outcome: String,
    #[serde(default)]
    pub(crate) before: Option<serde_json::Value>,
    #[serde(default)]
    pub(crate) after: Option<serde_json::Value>,
}

/// `POST /v1/clusters/{name}/join-token`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TokenRequest {
    pub(crate) ttl_seconds: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grant: Option<ClusterGrant>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TokenResponse {
    pub(crate) token: String,
}

/// `POST /v1/clusters/{name}/revoke`.
#[derive(Debug, Deserialize)]
pub(crate) struct Revoked {
    pub(crate) stamp: Stamp,
}

/// What every failed call carries.
#[derive(Debug, Deserialize)]
pub(crate) struct Failure {
    pub(crate) error: FailureDetail,
}

#[derive(Debug, Deserialize)]
pub(crate) struct FailureDetail {
    pub(crate) code: String,
    pub(crate) message: String,
    #[serde(default)]
    pub(crate) field: Option<String>,
    /// Of the files that were sent.
    #[serde(default)]
    pub(crate) problems: Vec<FileProblem>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct FileProblem {
    pub(crate) file: String,
    #[serde(default)]
    pub(crate) line: u64,
    #[serde(default)]
    pub(crate) field: String,
    pub(crate) message: String,
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.epoch, self.revision)
    }
}

impl Cluster {
    pub(crate) fn is_active(&self) -> bool {
        matches!(self.state.as_str(), "active" | "draining")
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.session.is_some_and(|s| s.connected)
    }
}

impl std::fmt::Display for FileProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:", self.file)?;
        if self.line > 0 {
            write!(f, "{}:", self.line)?;
        }
        if !self.field.is_empty() {
            write!(f, " {}:", self.field)?;
        }
        write!(f, " {}", self.message)
    }
}

/// One of `GET /v1/tokens`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ApiToken {
    pub(crate) name: String,
    /// Unix time in milliseconds.
    pub(crate) created_at: u64,
    /// Unix time in milliseconds.
    pub(crate) expires_at: u64,
    pub(crate) expired: bool,
}

/// One of `GET /v1/role-bindings`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RoleBinding {
    pub(crate) name: String,
    /// Each is a kind and a name.
    pub(crate) subjects: Vec<std::collections::BTreeMap<String, String>>,
    pub(crate) role: String,
    pub(crate) namespaces: Vec<String>,
    pub(crate) resource_version: u64,
}

/// The answer to a deletion.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Deleted {
    pub(crate) deleted: String,
}

/// One of `GET /v1/audit`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AuditEntry {
    /// Unix time in milliseconds.
    pub(crate) at: u64,
    pub(crate) who: String,
    #[serde(default)]
    pub(crate) from: String,
    pub(crate) action: String,
    #[serde(default)]
    pub(crate) subject: String,
    pub(crate) outcome: String,
    pub(crate) count: u64,
    pub(crate) before: Stamp,
    pub(crate) after: Stamp,
}

/// `GET /v1/whoami`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct WhoAmI {
    pub(crate) who: String,
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) groups: Vec<String>,
    #[serde(default)]
    pub(crate) root: bool,
    #[serde(default)]
    pub(crate) roles: Vec<HeldRole>,
}

/// One of [`WhoAmI::roles`].
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct HeldRole {
    pub(crate) role: String,
    pub(crate) namespaces: Vec<String>,
}
