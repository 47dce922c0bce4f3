//! What one peer says of its cluster, taken in: the receiving twin of [`super::outbox`]. Sans-IO.
//!
//! In: an update as it came. Out: the peer's table, brought up to date. A word is checked whole and then applied whole or
//! not at all; a table never grows beyond its limit, however often the peer comes back and goes on talking.

use std::collections::BTreeSet;

use isthmus_api::{
    convert::{ConvertError, own_availability},
    proto::tunnel::v1::AvailabilityUpdate,
};
use isthmus_model::{availability::Availability, ids::ServiceName};

use super::outbox::Table;

/// Services of which one peer may speak; a bound on memory, as for exports.
pub(crate) const MAX_SERVICES: usize = 10_000;

/// One update, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    /// Replaces all that was said before.
    snapshot: bool,
    /// Parts of the snapshot are still to come.
    more: bool,
    services: Vec<(ServiceName, Availability)>,
    removed: Vec<ServiceName>,
}

impl TryFrom<AvailabilityUpdate> for Word {
    type Error = ConvertError;

    fn try_from(update: AvailabilityUpdate) -> Result<Self, ConvertError> {
        Ok(Self {
            snapshot: update.snapshot,
            more: update.more,
            services: update.services.into_iter().map(own_availability).collect::<Result<_, _>>()?,
            removed: update.removed.into_iter().map(ServiceName::try_from).collect::<Result<_, _>>()?,
        })
    }
}

impl Word {
    /// It replaces all that was said before.
    pub(crate) fn is_snapshot(&self) -> bool {
        self.snapshot
    }

    /// No part of a snapshot is missing after it.
    pub(crate) fn is_last_part(&self) -> bool {
        !self.more
    }

    /// Brings `table` up to date. False, and nothing is changed, if it would come to hold more than `max` services.
    pub(crate) fn apply(self, table: &mut Table, max: usize) -> bool {
        let known = if self.snapshot { 0 } else { table.len() };
        let is_new = |service: &&ServiceName| self.snapshot || !table.contains_key(*service);
        let new: BTreeSet<&ServiceName> = self.services.iter().map(|(service, _)| service).filter(is_new).collect();
        if known + new.len() > max {
            return false;
        }
        if self.snapshot {
            table.clear();
        }
        table.extend(self.services);
        for service in &self.removed {
            table.remove(service);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use isthmus_api::proto::common::v1 as common;

    use super::*;

    fn update(snapshot: bool, names: &[&str]) -> AvailabilityUpdate {
        let of = |name: &&str| common::Availability {
            service: Some(common::ServiceName { namespace: "shop".into(), name: (*name).into() }),
            ready: 1,
            total: 1,
            reachable: true,
            ..Default::default()
        };
        AvailabilityUpdate { snapshot, services: names.iter().map(of).collect(), ..Default::default() }
    }

    fn word(snapshot: bool, names: &[&str]) -> Word {
        Word::try_from(update(snapshot, names)).unwrap()
    }

    fn names(table: &Table) -> Vec<&str> {
        table.keys().map(|service| service.name()).collect()
    }

    #[test]
    fn a_snapshot_replaces_and_an_update_adds() {
        let mut table = Table::new();
        assert!(word(true, &["a", "b"]).apply(&mut table, 10));
        assert!(word(false, &["b", "c"]).apply(&mut table, 10));
        assert_eq!(names(&table), ["a", "b", "c"]);
        assert!(word(true, &["d"]).apply(&mut table, 10));
        assert_eq!(names(&table), ["d"]);
    }

    #[test]
    fn a_peer_that_keeps_coming_back_cannot_grow_its_table() {
        let mut table = Table::new();
        assert!(word(false, &["a", "b"]).apply(&mut table, 3));
        assert!(!word(false, &["c", "d"]).apply(&mut table, 3));
        assert!(!word(true, &["c", "d", "e", "f"]).apply(&mut table, 3));
        assert_eq!(names(&table), ["a", "b"], "what is refused changes nothing");
        assert!(word(false, &["a", "b", "c", "c"]).apply(&mut table, 3), "what is known or repeated counts once");
    }

    #[test]
    fn one_bad_entry_spoils_the_word() {
        let mut bad = update(true, &["a", "b"]);
        bad.services[1].cluster = "west".into();
        assert!(Word::try_from(bad).is_err(), "a gateway speaks only for its own cluster");
    }
}
