//! What was in force at earlier revisions, as far as it can be put in force again: the settings.

use std::{collections::VecDeque, sync::Arc};

use isthmus_model::{global::Settings, ids::Revision};
use serde::{Deserialize, Serialize};

use super::{Change, Rejection, State};

/// Changes that are remembered.
const KEPT: usize = 1024;

/// The settings since each of the revisions that changed them, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Past {
    settings: VecDeque<(Revision, Arc<Settings>)>,
    /// Before the oldest one there were others.
    forgotten: bool,
}

impl Past {
    pub(super) fn remember(&mut self, revision: Revision, settings: &Settings) {
        self.settings.push_back((revision, Arc::new(settings.clone())));
        if self.settings.len() > KEPT {
            self.settings.pop_front();
            self.forgotten = true;
        }
    }
}

impl State {
    /// The settings that were in force at `revision`.
    pub fn settings_at(&self, revision: Revision) -> Result<Arc<Settings>, Rejection> {
        let latest = self.stamp().revision;
        if revision > latest {
            return Err(Rejection::FutureRevision { revision, latest });
        }
        match self.past.settings.iter().rev().find(|(since, _)| *since <= revision) {
            Some((_, settings)) => Ok(settings.clone()),
            None if self.past.forgotten => {
                let oldest = self.past.settings.front().map(|(since, _)| *since).unwrap_or_default();
                Err(Rejection::ForgottenRevision { revision, oldest })
            }
            None => Ok(Arc::default()),
        }
    }

    /// Puts the settings of `to` in force again, as a new revision.
    pub(super) fn rollback(&mut self, to: Revision) -> Result<Change, Rejection> {
        let settings = self.settings_at(to)?;
        self.set_settings(&settings)
    }
}
