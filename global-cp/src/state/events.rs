//! What was asked of the state, by whom, and what came of it: the audit log and the history, the latest part of it.

use std::{collections::VecDeque, sync::Arc};

use isthmus_model::{ids::Stamp, time::Timestamp};
use serde::{Deserialize, Serialize};

use super::{Command, Proposal, Response};

/// How many events are kept, roughly.
const KEPT: usize = 10_240;
/// Of which one is copied with each entry of the log.
const PART: usize = 32;

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// A SPIFFE ID, `token:NAME` or `user:NAME`.
    pub who: String,
    /// IP and port; empty for a node itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub from: String,
}

/// One thing that was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Counts all events.
    pub number: u64,
    /// When it was proposed.
    pub at: Timestamp,
    /// Who asked.
    #[serde(flatten)]
    pub by: Actor,
    /// A verb: `publish`, `revoke`.
    pub action: String,
    /// What it was about: a cluster, a node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subject: String,
    /// `changed`, `unchanged`, `done` (something that members do not see), or the code of the refusal.
    pub outcome: String,
    /// In words, if it was refused.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Where the state stood before.
    pub before: Stamp,
    /// And after it.
    pub after: Stamp,
}

/// The latest events, in parts: a state is cloned for each view, and all but the last part are shared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Events {
    next: u64,
    /// Oldest first.
    parts: VecDeque<Arc<Vec<Event>>>,
}

impl Events {
    pub(super) fn record(&mut self, proposal: &Proposal, response: &Response, (before, after): (Stamp, Stamp)) {
        let (outcome, reason) = match response {
            Response::Accepted(outcome) if outcome.changed => ("changed", String::new()),
            Response::Accepted(_) if proposal.command.is_about_access() => ("done", String::new()),
            Response::Accepted(_) => ("unchanged", String::new()),
            Response::Rejected(rejection) => (rejection.code(), rejection.to_string()),
            Response::NoCommand => return,
        };
        let (action, subject) = proposal.command.describe();
        let event = Event {
            number: self.next,
            at: proposal.at,
            by: proposal.by.clone(),
            action: action.to_owned(),
            subject,
            outcome: outcome.to_owned(),
            reason,
            before,
            after,
        };
        self.next += 1;
        if self.parts.back().is_none_or(|part| part.len() >= PART) {
            self.parts.push_back(Arc::default());
        }
        if let Some(part) = self.parts.back_mut() {
            Arc::make_mut(part).push(event);
        }
        if self.parts.len() > KEPT / PART {
            self.parts.pop_front();
        }
    }

    /// All that are kept, latest first.
    pub(super) fn latest(&self) -> impl Iterator<Item = &Event> {
        self.parts.iter().rev().flat_map(|part| part.iter().rev())
    }
}

impl Command {
    /// Who may do what is not for members to see, so it is no change of what they see.
    fn is_about_access(&self) -> bool {
        matches!(
            self,
            Self::SetRoleBinding { .. }
                | Self::DeleteRoleBinding { .. }
                | Self::MintApiToken(_)
                | Self::DeleteApiToken { .. }
        )
    }

    /// A verb, and what it is about.
    fn describe(&self) -> (&'static str, String) {
        match self {
            Self::SetFederationBundle { bundle } => ("set-federation-bundle", bundle.trust_domain.to_string()),
            Self::SetSettings { .. } => ("set-settings", String::new()),
            Self::MintToken(mint) => ("mint-join-token", mint.cluster.to_string()),
            Self::Join(join) => ("join", join.cluster.to_string()),
            Self::Publish(publish) => ("publish", publish.cluster.to_string()),
            Self::Revoke { cluster } => ("revoke", cluster.to_string()),
            Self::Drain { cluster, drain: true } => ("drain", cluster.to_string()),
            Self::Drain { cluster, drain: false } => ("undrain", cluster.to_string()),
            Self::ConfirmWithdrawal { cluster } => ("confirm-withdrawal", cluster.to_string()),
            Self::PassTime { .. } => ("pass-time", String::new()),
            Self::Apply(apply) => ("apply", apply.describe()),
            Self::MintNodeToken(mint) => ("mint-node-token", mint.node.to_string()),
            Self::AdmitNode(admit) => ("admit-node", admit.node.to_string()),
            Self::SetNode(set) => ("set-node", set.node.to_string()),
            Self::RemoveNode { node } => ("remove-node", node.to_string()),
            Self::Restore(backup) => ("restore", backup.stamp().to_string()),
            Self::Rollback { to } => ("rollback", to.to_string()),
            Self::RaiseLevel { to } => ("raise-level", to.to_string()),
            Self::StartEpoch => ("start-epoch", String::new()),
            Self::SetRoleBinding { binding, .. } => ("set-role-binding", binding.name.to_string()),
            Self::DeleteRoleBinding { name, .. } => ("delete-role-binding", name.to_string()),
            Self::MintApiToken(mint) => ("mint-api-token", mint.name.to_string()),
            Self::DeleteApiToken { name } => ("delete-api-token", name.to_string()),
        }
    }
}
