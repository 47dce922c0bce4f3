//! The feature level: what all nodes understand. A command that not every node can apply must not be in the log, or nodes
//! would come to differ. So each node says what it supports, and the level rises, by an entry of its own, only when every
//! one supports it. It never falls.

use super::{Change, Rejection, State};

/// The highest level that this program supports. To be raised with each release that adds a command, or changes what one
/// does; [`super::Command::level`] says which needs what.
pub const SUPPORTED: u32 = 1;

impl State {
    /// What all nodes understand.
    pub fn level(&self) -> u32 {
        // States of before there was a level are of the first.
        self.level.max(1)
    }

    /// The level that all nodes support, if it is above the present one: to be proposed by whoever leads.
    pub fn attainable_level(&self) -> Option<u32> {
        let common = self.nodes().values().map(|node| node.supports).min()?;
        (common > self.level()).then_some(common)
    }

    pub(super) fn raise_level(&mut self, to: u32) -> Result<Change, Rejection> {
        if to <= self.level() {
            return Ok(Change::default());
        }
        if let Some((node, info)) = self.nodes().iter().find(|(_, info)| info.supports < to) {
            return Err(Rejection::NotSupported { node: node.clone(), supports: info.supports, level: to });
        }
        self.level = to;
        Ok(Change { declared: true, ..Change::default() })
    }
}
