//! `apply`: one command, one decision. Everything is checked before anything is touched, so that a refusal leaves the
//! state as it was.

use std::{collections::BTreeMap, sync::Arc};

use isthmus_model::{
    global::{GlobalSnapshot, Settings},
    ids::{Epoch, Revision, Stamp},
    service::TrustBundle,
};

use super::{
    Change, Command, Outcome, Rejection, ResourceKey, Response, State,
    trust::{check_first_bundle, check_successor},
};

/// Expired tokens are remembered this long, so that their refusal can say more than "unknown".
pub(super) const TOKEN_MEMORY_MS: u64 = 7 * 24 * 3600 * 1000;

impl State {
    /// Applies one command: the answer, and what members see of it, if anything.
    pub(crate) fn apply(&mut self, command: &Command) -> (Response, Option<Change>) {
        let result = match command {
            Command::SetFederationBundle { bundle } => self.set_federation_bundle(bundle),
            Command::SetSettings { settings } => self.set_settings(settings),
            Command::MintToken(mint) => self.mint_token(mint),
            Command::Join(join) => self.join(join),
            Command::Publish(publish) => self.publish(publish),
            Command::Revoke { cluster } => self.revoke(cluster),
            Command::Drain { cluster, drain } => self.drain(cluster, *drain),
            Command::ConfirmWithdrawal { cluster } => self.confirm_withdrawal(cluster),
            Command::PassTime { now } => self.pass_time(*now),
            Command::Apply(apply) => self.apply_resources(apply),
            Command::MintNodeToken(mint) => self.mint_node_token(mint),
            Command::AdmitNode(admit) => self.admit_node(admit),
            Command::SetNode(set) => self.set_node(set),
            Command::RemoveNode { node } => self.remove_node(node),
            Command::Rollback { to } => self.rollback(*to),
            Command::RaiseLevel { to } => self.raise_level(*to),
            Command::Restore(backup) => self.restore(backup),
            Command::StartEpoch => self.start_epoch(),
            Command::SetRoleBinding { binding, expected } => self.set_role_binding(binding, *expected),
            Command::DeleteRoleBinding { name, expected } => self.delete_role_binding(name, *expected),
            Command::MintApiToken(mint) => self.mint_api_token(mint),
            Command::DeleteApiToken { name } => self.delete_api_token(name),
        };
        match result {
            Err(rejection) => (Response::Rejected(rejection), None),
            Ok(change) if change.is_empty() => {
                (Response::Accepted(Outcome { stamp: self.stamp(), changed: false }), None)
            }
            Ok(change) => {
                let stamp = self.bump();
                if let Some(global) = self.global.as_ref().filter(|_| change.settings) {
                    self.past.remember(stamp.revision, &global.settings);
                }
                (Response::Accepted(Outcome { stamp, changed: true }), Some(change))
            }
        }
    }

    pub(super) fn set_federation_bundle(&mut self, bundle: &TrustBundle) -> Result<Change, Rejection> {
        let change = Change { bundle: true, ..Change::default() };
        let Some(global) = &mut self.global else {
            check_first_bundle(bundle).map_err(|why| Rejection::FederationBundle { why })?;
            self.global = Some(Arc::new(GlobalSnapshot {
                stamp: Stamp { epoch: Epoch(1), revision: Revision(0) },
                federation: bundle.trust_domain.clone(),
                federation_bundle: bundle.clone(),
                settings: Settings::default(),
                clusters: BTreeMap::new(),
                services: BTreeMap::new(),
            }));
            return Ok(change);
        };
        if global.federation != bundle.trust_domain {
            return Err(Rejection::OtherFederation {
                stored: global.federation.clone(),
                offered: bundle.trust_domain.clone(),
            });
        }
        if global.federation_bundle.document == bundle.document {
            return Ok(Change::default());
        }
        check_successor(&global.federation_bundle, bundle).map_err(|why| Rejection::FederationBundle { why })?;
        Arc::make_mut(global).federation_bundle = bundle.clone();
        Ok(change)
    }

    pub(super) fn set_settings(&mut self, settings: &Settings) -> Result<Change, Rejection> {
        let global = self.global.as_mut().ok_or(Rejection::NotFounded)?;
        if global.settings == *settings {
            return Ok(Change::default());
        }
        Arc::make_mut(global).settings = settings.clone();
        // However they change, whoever saw them before has not seen this.
        self.declare(&ResourceKey::Settings);
        Ok(Change { settings: true, ..Change::default() })
    }

    fn restore(&mut self, backup: &State) -> Result<Change, Rejection> {
        *self = self.restored(backup)?;
        Ok(Change { epoch: true, ..Change::default() })
    }

    /// Everything stays, the count of revisions included.
    fn start_epoch(&mut self) -> Result<Change, Rejection> {
        let global = self.global.as_mut().ok_or(Rejection::NotFounded)?;
        let stamp = &mut Arc::make_mut(global).stamp;
        stamp.epoch = Epoch(stamp.epoch.0.saturating_add(1));
        Ok(Change { epoch: true, ..Change::default() })
    }

    /// One revision further.
    fn bump(&mut self) -> Stamp {
        if let Some(global) = &mut self.global {
            let global = Arc::make_mut(global);
            global.stamp.revision = Revision(global.stamp.revision.0.saturating_add(1));
        }
        self.stamp()
    }
}

pub(super) fn within(what: &str, count: usize, limit: usize) -> Result<(), Rejection> {
    if count <= limit {
        return Ok(());
    }
    let wide = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    Err(Rejection::TooMany { what: what.to_owned(), count: wide(count), limit: wide(limit) })
}
